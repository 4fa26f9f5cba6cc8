//! The largest eigenvalue of a symmetric matrix and its vector: exact and the same each time.
//!
//! Householder's reduction to a tridiagonal matrix, its largest eigenvalue by bisection over Sturm counts, its vector by
//! inverse iteration from a fixed start, turned back by the reflections (Golub and Van Loan, Matrix Computations, 4th edition,
//! sections 8.3.1, 8.4.1 and 8.2.2). About ⅔n³ multiplications, against 10n³ for all eigenvectors. Above [`DENSE_MAX`] rows by
//! Lanczos' steps with full reorthogonalisation, restarted, from a fixed start (section 10.1).

use pulp::{Arch, Simd, WithSimd};

/// Largest order that is reduced as a whole.
const DENSE_MAX: usize = 320;
/// Lanczos steps before a restart.
const KRYLOV: usize = 64;
/// Stands for the size of a matrix of zeros.
const TINY: f64 = 1e-200;
/// Restarts at most: 64 of them have found a top vector to rounding, or one as good as it for a step of a filter.
const RESTARTS: usize = 24;

/// Largest eigenvalue and unit eigenvector of the symmetric `matrix`, `[n][n]`, n ≥ 1, finite.
pub(super) fn top_pair(matrix: Vec<f64>, n: usize) -> (f64, Vec<f64>) {
    if n > DENSE_MAX {
        return lanczos(&matrix, n);
    }
    Arch::new().dispatch(Dense { matrix, n })
}

struct Dense {
    matrix: Vec<f64>,
    n: usize,
}

impl WithSimd for Dense {
    type Output = (f64, Vec<f64>);

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) -> Self::Output {
        let Self { mut matrix, n } = self;
        let mut reflections: Vec<Vec<f64>> = Vec::new();
        let mut beside = Vec::new();
        for k in 0..n.saturating_sub(1) {
            let below: Vec<f64> = (k + 1..n).map(|row| matrix[row * n + k]).collect();
            let (reflection, length) = reflection(below);
            beside.push(length);
            reflect(&mut matrix, n, k + 1, &reflection);
            reflections.push(reflection);
        }
        let diagonal: Vec<f64> = (0..n).map(|row| matrix[row * n + row]).collect();
        let (value, mut vector) = tridiagonal_top(&diagonal, &beside);
        for (k, reflection) in reflections.iter().enumerate().rev() {
            let part = &mut vector[k + 1..];
            let along = 2.0 * dot(reflection, part);
            part.iter_mut()
                .zip(reflection)
                .for_each(|(value, r)| *value -= along * r);
        }
        (value, vector)
    }
}

/// The unit vector r for which (1 − 2rrᵀ)x lies along the first axis, and the length there; r is zero where x already does.
#[inline(always)]
fn reflection(mut x: Vec<f64>) -> (Vec<f64>, f64) {
    let norm = dot(&x, &x).sqrt();
    let tail: f64 = x[1..].iter().map(|value| value * value).sum();
    if tail == 0.0 {
        let first = x[0];
        x.fill(0.0);
        return (x, first);
    }
    let length = if x[0] > 0.0 { -norm } else { norm };
    x[0] -= length;
    let size = dot(&x, &x).sqrt();
    for value in &mut x {
        *value /= size;
    }
    (x, length)
}

/// Both sides of the lower right part of the matrix from `from` on.
#[inline(always)]
fn reflect(matrix: &mut [f64], n: usize, from: usize, r: &[f64]) {
    let rows = || (from..n).map(|row| row * n + from..row * n + n);
    let mut p: Vec<f64> = rows().map(|row| 2.0 * dot(&matrix[row], r)).collect();
    let along = dot(&p, r);
    p.iter_mut().zip(r).for_each(|(p, r)| *p -= along * r);
    for ((row, ri), pi) in rows().zip(r).zip(&p) {
        for (value, (rj, pj)) in matrix[row].iter_mut().zip(r.iter().zip(&p)) {
            *value -= ri * pj + pi * rj;
        }
    }
}

/// Top pair of a tridiagonal matrix.
fn tridiagonal_top(diagonal: &[f64], beside: &[f64]) -> (f64, Vec<f64>) {
    let n = diagonal.len();
    let reach = |i: usize| {
        let left = if i > 0 { beside[i - 1].abs() } else { 0.0 };
        left + beside.get(i).map_or(0.0, |value| value.abs())
    };
    let mut high = (0..n)
        .map(|i| diagonal[i] + reach(i))
        .fold(f64::NEG_INFINITY, f64::max);
    let mut low = diagonal.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let size = high.abs().max(low.abs()).max(TINY);
    // The largest diagonal entry is at most the largest eigenvalue, Gershgorin's bound is at least it.
    for _ in 0..128 {
        let middle = f64::midpoint(low, high);
        if high - low <= 4.0 * f64::EPSILON * size || middle <= low || middle >= high {
            break;
        }
        if any_above(diagonal, beside, middle) {
            low = middle;
        } else {
            high = middle;
        }
    }
    let value = f64::midpoint(low, high);
    (value, inverse_iteration(diagonal, beside, value, size))
}

/// Whether an eigenvalue is above `x`: whether a pivot of T − x is positive.
fn any_above(diagonal: &[f64], beside: &[f64], x: f64) -> bool {
    let mut pivot = diagonal[0] - x;
    for (i, value) in diagonal.iter().enumerate().skip(1) {
        if pivot > 0.0 {
            return true;
        }
        let safe = if pivot == 0.0 { -f64::MIN_POSITIVE } else { pivot };
        pivot = value - x - beside[i - 1] * beside[i - 1] / safe;
    }
    pivot > 0.0
}

fn inverse_iteration(diagonal: &[f64], beside: &[f64], value: f64, size: f64) -> Vec<f64> {
    let n = diagonal.len();
    // No symmetry that a top vector could be orthogonal to by construction of the data.
    let mut vector: Vec<f64> = (0..n).map(|i| 1.0 + 0.37 * libm::sin(i as f64 * 0.73)).collect();
    // Just above the eigenvalue every pivot is negative, so elimination needs no exchange of rows.
    let shift = value + 8.0 * f64::EPSILON * size;
    let mut pivots = Vec::with_capacity(n);
    for i in 0..n {
        let coupling = if i > 0 {
            beside[i - 1] * beside[i - 1] / pivots[i - 1]
        } else {
            0.0
        };
        let pivot: f64 = diagonal[i] - shift - coupling;
        pivots.push(pivot.min(-f64::EPSILON * f64::EPSILON * size));
    }
    for _ in 0..4 {
        for i in 1..n {
            vector[i] -= beside[i - 1] / pivots[i - 1] * vector[i - 1];
        }
        vector[n - 1] /= pivots[n - 1];
        for i in (0..n - 1).rev() {
            vector[i] = (vector[i] - beside[i] * vector[i + 1]) / pivots[i];
        }
        let most = vector.iter().fold(0.0_f64, |most, v| most.max(v.abs()));
        for v in &mut vector {
            *v /= most;
        }
        normalise(&mut vector);
    }
    vector
}

fn lanczos(matrix: &[f64], n: usize) -> (f64, Vec<f64>) {
    let mut start: Vec<f64> = (0..n).map(|i| 1.0 + 0.37 * libm::sin(i as f64 * 0.73)).collect();
    normalise(&mut start);
    let mut value = 0.0;
    for _ in 0..RESTARTS {
        let (mut diagonal, mut beside, mut basis) = (Vec::new(), Vec::new(), vec![start.clone()]);
        while basis.len() <= KRYLOV.min(n) {
            let last = &basis[basis.len() - 1];
            let mut next: Vec<f64> = matrix.chunks_exact(n).map(|row| dot(row, last)).collect();
            diagonal.push(dot(&next, last));
            // Twice is enough (Parlett, The Symmetric Eigenvalue Problem, section 6.9).
            for _ in 0..2 {
                for earlier in &basis {
                    let along = dot(&next, earlier);
                    next.iter_mut()
                        .zip(earlier)
                        .for_each(|(value, e)| *value -= along * e);
                }
            }
            let length = dot(&next, &next).sqrt();
            if length <= 1e-14 * diagonal.iter().fold(0.0_f64, |most, v| most.max(v.abs())) {
                break;
            }
            for value in &mut next {
                *value /= length;
            }
            beside.push(length);
            basis.push(next);
        }
        let couplings = &beside[..diagonal.len() - 1];
        let (top, small) = tridiagonal_top(&diagonal, couplings);
        let mut vector = vec![0.0; n];
        for (basis, share) in basis.iter().zip(&small) {
            vector
                .iter_mut()
                .zip(basis)
                .for_each(|(value, b)| *value += share * b);
        }
        normalise(&mut vector);
        let residual = beside.get(diagonal.len() - 1).copied().unwrap_or(0.0) * small[small.len() - 1].abs();
        (value, start) = (top, vector);
        if residual <= 1e-12 * top.abs() {
            break;
        }
    }
    (value, start)
}

fn normalise(vector: &mut [f64]) {
    let norm = dot(vector, vector).sqrt();
    for value in vector {
        *value /= norm;
    }
}

#[inline(always)]
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (a, a_rest) = a.as_chunks::<8>();
    let (b, b_rest) = b.as_chunks::<8>();
    for (a, b) in a.iter().zip(b) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.into_iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `QᵀDQ` with a product of reflections as Q: the top pair is known.
    fn known(values: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let n = values.len();
        let mut matrix = vec![0.0; n * n];
        let mut top = vec![0.0; n];
        for (i, value) in values.iter().enumerate() {
            matrix[i * n + i] = *value;
        }
        let best = (0..n).fold(0, |best, i| if values[i] > values[best] { i } else { best });
        top[best] = 1.0;
        for turn in 0..3 {
            let mut r: Vec<f64> = (0..n)
                .map(|i| libm::sin((i * 7 + turn * 3 + 1) as f64 * 1.3))
                .collect();
            normalise(&mut r);
            reflect(&mut matrix, n, 0, &r);
            let along = 2.0 * dot(&r, &top);
            top.iter_mut().zip(&r).for_each(|(value, r)| *value -= along * r);
        }
        (matrix, top)
    }

    #[test]
    fn finds_the_top_pair() {
        for n in [1, 2, 3, 10, 101, 400] {
            let values: Vec<f64> = (0..n)
                .map(|i| ((i * 31 + 7) % 97) as f64 + 0.001 * i as f64)
                .collect();
            let (matrix, vector) = known(&values);
            let (value, found) = top_pair(matrix, n);
            let expected = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            assert!(
                (value - expected).abs() <= 1e-9 * expected,
                "{n}: {value} is not {expected}"
            );
            let overlap = dot(&found, &vector).abs();
            assert!((overlap - 1.0).abs() < 1e-9, "{n}: {overlap}");
        }
    }

    #[test]
    fn extreme_spectra_give_finite_unit_vectors() {
        for values in [
            vec![0.0; 5],
            vec![1.0; 6],
            vec![1.0, 1e-300, 1e-16, 0.0],
            vec![1.0, 1.0, 0.5],
        ] {
            let (matrix, _) = known(&values);
            let (value, vector) = top_pair(matrix, values.len());
            assert!((value - values.iter().copied().fold(0.0, f64::max)).abs() < 1e-12);
            assert!(
                (dot(&vector, &vector) - 1.0).abs() < 1e-9,
                "{values:?}: {vector:?}"
            );
        }
    }
}
