//! CAF (arXiv 2505.01874, algorithm 1): rows lose weight by how far they reach along the direction of largest spread.

use super::RuleError;
use super::eigen;
use super::gram::Gram;
use super::method::{Method, Plan, Round};

/// Weights c from 1 down: while Σc > n − 2f, the mean μ under c, the top eigenvector of the covariance under c, and
/// cᵢ ← cᵢ(1 − τᵢ/τmax) with τᵢ the squared projection of xᵢ − μ; the mean of the smallest top eigenvalue is the result. All in
/// Gram space: the covariance's top pair is that of diag(√c)·H·diag(√c)/Σc with H the inner products about μ.
///
/// τmax is over rows that still have weight, so every step takes a row's last weight and there are at most 2f steps; over all
/// rows, one row of 1e30 that has lost its weight would stop all progress. The eigenvector is exact, not one power step.
///
/// Breakdown point 1/2 with a guarantee on the spectral norm of the honest spread. Cost n²·d/2 for the inner products, about
/// n³ a step, one pass for the result. Memory n² numbers. Under privacy noise: the rule of choice, its error does not grow with
/// d. Sites that differ: good.
#[derive(Debug, Clone, Copy)]
pub(super) struct Caf;

impl Method for Caf {
    fn plan(&self, round: Round<'_>) -> Result<Plan, RuleError> {
        let (weights, _) = filter(round.gram, round.f);
        Ok(Plan::Weights {
            scores: Some(weights.clone()),
            weights,
        })
    }
}

/// The weights of the result, sum 1, and the number of steps.
fn filter(gram: &Gram, f: usize) -> (Vec<f64>, usize) {
    let n = gram.count();
    let target = (n - 2 * f) as f64;
    let mut weights = vec![1.0_f64; n];
    let mut best = (f64::INFINITY, vec![1.0 / n as f64; n]);
    let mut steps = 0;
    loop {
        let total: f64 = weights.iter().sum();
        if total <= target || total <= 0.0 {
            break;
        }
        let shares: Vec<f64> = weights.iter().map(|weight| weight / total).collect();
        let live: Vec<usize> = (0..n).filter(|row| weights[*row] > 0.0).collect();
        let centered = gram.centered(&shares);
        let spread = |i: usize, j: usize| centered[live[i] * n + live[j]];
        let roots: Vec<f64> = live.iter().map(|row| shares[*row].sqrt()).collect();
        let largest = (0..live.len()).map(|i| spread(i, i)).fold(0.0, f64::max);
        if largest <= 0.0 {
            // The rows that are left are one and the same.
            best = (0.0, shares);
            break;
        }
        let mut covariance = vec![0.0; live.len() * live.len()];
        for (i, row) in covariance.chunks_mut(live.len()).enumerate() {
            for (j, value) in row.iter_mut().enumerate() {
                *value = roots[i] * (spread(i, j) / largest) * roots[j];
            }
        }
        let (top, vector) = eigen::top_pair(covariance, live.len());
        if top * largest < best.0 {
            best = (top * largest, shares);
        }
        let projections: Vec<f64> = (0..live.len())
            .map(|i| {
                let along: f64 = (0..live.len())
                    .map(|j| spread(i, j) / largest * roots[j] * vector[j])
                    .sum();
                along * along
            })
            .collect();
        let most = projections.iter().copied().fold(0.0, f64::max);
        if most <= 0.0 {
            break;
        }
        for (row, projection) in live.iter().zip(projections) {
            weights[*row] *= 1.0 - projection / most;
        }
        steps += 1;
    }
    (best.1, steps)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::robust::MatrixRows;

    fn gram(rows: &[Vec<f64>]) -> Gram {
        Gram::of(&MatrixRows::from_rows(rows).unwrap(), &[]).unwrap()
    }

    fn noise(n: usize, d: usize, mut state: u64) -> Vec<Vec<f64>> {
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as f64 / f64::from(1_u32 << 30) - 1.0
        };
        (0..n).map(|_| (0..d).map(|_| next()).collect()).collect()
    }

    /// The definition over the full covariance `[d][d]`, by repeated squaring instead of an eigensolver.
    fn dense(rows: &[Vec<f64>], f: usize) -> Vec<f64> {
        let (n, d) = (rows.len(), rows[0].len());
        let mut weights = vec![1.0; n];
        let mut best = (f64::INFINITY, Vec::new());
        while weights.iter().sum::<f64>() > (n - 2 * f) as f64 {
            let total: f64 = weights.iter().sum();
            let mean: Vec<f64> = (0..d)
                .map(|k| rows.iter().zip(&weights).map(|(row, c)| row[k] * c).sum::<f64>() / total)
                .collect();
            let mut covariance = vec![vec![0.0; d]; d];
            for (row, c) in rows.iter().zip(&weights) {
                for i in 0..d {
                    for j in 0..d {
                        covariance[i][j] += c / total * (row[i] - mean[i]) * (row[j] - mean[j]);
                    }
                }
            }
            let mut vector: Vec<f64> = (0..d).map(|k| 1.0 + 0.1 * k as f64).collect();
            let mut value = 0.0;
            for _ in 0..20_000 {
                let next: Vec<f64> = covariance
                    .iter()
                    .map(|row| row.iter().zip(&vector).map(|(a, b)| a * b).sum())
                    .collect();
                value = next.iter().map(|v| v * v).sum::<f64>().sqrt();
                vector = next.iter().map(|v| v / value).collect();
            }
            if value < best.0 {
                best = (value, mean.clone());
            }
            let taus: Vec<f64> = rows
                .iter()
                .map(|row| {
                    row.iter()
                        .zip(&mean)
                        .zip(&vector)
                        .map(|((x, m), v)| (x - m) * v)
                        .sum::<f64>()
                        .powi(2)
                })
                .collect();
            let most = taus
                .iter()
                .zip(&weights)
                .filter(|(_, c)| **c > 0.0)
                .map(|(t, _)| *t)
                .fold(0.0, f64::max);
            for (c, tau) in weights.iter_mut().zip(taus).filter(|(c, _)| **c > 0.0) {
                *c *= 1.0 - tau / most;
            }
        }
        best.1
    }

    #[test]
    fn gram_space_gives_what_the_definition_gives() {
        for (n, d, f, seed) in [(9, 4, 2, 1), (12, 3, 5, 2), (15, 6, 4, 3)] {
            let mut rows = noise(n, d, seed);
            for row in rows.iter_mut().take(f) {
                for value in row {
                    *value = *value * 0.3 + 4.0;
                }
            }
            let (weights, _) = filter(&gram(&rows), f);
            for (k, expected) in dense(&rows, f).iter().enumerate() {
                let value: f64 = rows.iter().zip(&weights).map(|(row, w)| row[k] * w).sum();
                assert!(
                    (value - expected).abs() < 1e-8,
                    "seed {seed}: {value} is not {expected}"
                );
            }
        }
    }

    #[test]
    fn ends_within_two_f_steps_whatever_the_rows() {
        let huge = |rows: &mut [Vec<f64>], f: usize, size: f64| {
            for (i, row) in rows.iter_mut().take(f).enumerate() {
                for value in row {
                    *value *= size * (i + 1) as f64;
                }
            }
        };
        for (seed, size) in (0..20).zip([1.0, 1e30, 1e-30, 1e120, 1e8].into_iter().cycle()) {
            let (n, f) = (21, 10);
            let mut rows = noise(n, 5, seed);
            huge(&mut rows, f, size);
            let (weights, steps) = filter(&gram(&rows), f);
            assert!(steps <= 2 * f, "seed {seed}: {steps} steps");
            assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-9, "seed {seed}");
            assert!(weights.iter().all(|w| *w >= 0.0), "seed {seed}");
        }
        let same = vec![vec![1.0, -2.0, 3.0]; 7];
        assert!(filter(&gram(&same), 3).1 <= 6);
    }

    #[test]
    fn huge_rows_lose_their_weight() {
        let mut rows = noise(20, 6, 7);
        for row in rows.iter_mut().take(6) {
            for value in row {
                *value *= 1e30;
            }
        }
        let (weights, _) = filter(&gram(&rows), 6);
        assert!(weights[..6].iter().all(|weight| *weight == 0.0), "{weights:?}");
    }
}
