//! Inner products of all pairs of rows over one block of columns: the one place where the speed of pairwise rules is made.
//!
//! Rows are centred first, so that a common offset does not cancel away the differences, then scaled by a power of two each
//! where their squares would not fit an `f32`. Sums run in `f32` over a block of at most [`BLOCK`] columns, in 16 lanes whatever
//! the machine's vectors hold, and in `f64` between blocks: the same bits with any vector width and number of threads.

use pulp::{Arch, Simd, WithSimd};

use super::rows::Scalar;

/// Columns of a block, and terms of one `f32` sum times 16.
pub(super) const BLOCK: usize = 1024;
/// Partial sums of one inner product.
const LANES: usize = 16;
/// Rows are padded with zeros to a multiple of this.
pub(super) const ROW_STEP: usize = 4;
/// Magnitudes whose squares, summed over a block, neither overflow nor vanish in `f32`.
const SAFE: std::ops::Range<f32> = 1e-12..1e15;

/// One block: `rows × BLOCK` values of which the first `count` rows count, row after row, zeros behind the last column.
#[derive(Debug)]
pub(super) struct Block<'a, T> {
    /// `[padded rows][BLOCK]`; the rows from `count` on are scratch: the origin goes to row `count`.
    pub(super) values: &'a mut [T],
    /// Columns that count.
    pub(super) columns: usize,
    /// Rows, n.
    pub(super) count: usize,
}

/// Adds the block's inner products to `sums`, `[n + 1][n + 1]`, lower triangle; the last point is the origin.
pub(super) fn add_inner_products<T: Scalar>(block: Block<'_, T>, sums: &mut [f64]) {
    Arch::new().dispatch(AddInnerProducts { block, sums });
}

struct AddInnerProducts<'a, T> {
    block: Block<'a, T>,
    sums: &'a mut [f64],
}

impl<T: Scalar> WithSimd for AddInnerProducts<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { block, sums } = self;
        let points = block.count + 1;
        center(&mut *block.values, block.count, block.columns);
        let factors: Vec<f64> = block
            .values
            .chunks_exact_mut(BLOCK)
            .take(points)
            .map(T::bring_in_range)
            .collect();
        T::inner_products(simd, block.values, &mut |i, j, sum| {
            if i < points && j <= i {
                sums[i * points + j] += sum * (factors[i] * factors[j]);
            }
        });
    }
}

/// Moves every row, and the origin behind them, by the mean of the rows that are no longer than twice the median row: a row
/// of 1e30 must not be in the centre, or the others would be equal after it is taken away. Any centre gives the same distances.
#[inline(always)]
fn center<T: Scalar>(values: &mut [T], count: usize, columns: usize) {
    let norms: Vec<f64> = values
        .chunks_exact(BLOCK)
        .take(count)
        .map(|row| T::square_sum(&row[..columns]))
        .collect();
    let mut ordered = norms.clone();
    ordered.sort_unstable_by(f64::total_cmp);
    let limit = ordered[(count - 1) / 2] * 4.0;
    let near = norms.iter().filter(|norm| **norm <= limit).count();
    let share = T::round_from(1.0 / near as f64);
    let mut center = [T::default(); BLOCK];
    for (row, _) in values
        .chunks_exact(BLOCK)
        .zip(&norms)
        .filter(|(_, norm)| **norm <= limit)
    {
        for (sum, value) in center.iter_mut().zip(row) {
            *sum = *sum + *value * share;
        }
    }
    let center = &center[..columns];
    for row in values.chunks_exact_mut(BLOCK).take(count) {
        for (value, mid) in row.iter_mut().zip(center) {
            *value = *value - *mid;
        }
    }
    if let Some(origin) = values.chunks_exact_mut(BLOCK).nth(count) {
        for (value, mid) in origin.iter_mut().zip(center) {
            *value = T::default() - *mid;
        }
    }
}

/// Scales a row by a power of two when its squares would not fit; what one unit then stands for.
#[inline(always)]
pub(super) fn bring_in_range_f32(row: &mut [f32]) -> f64 {
    let mut most = [0.0_f32; LANES];
    for lanes in row.as_chunks::<LANES>().0 {
        for (most, value) in most.iter_mut().zip(lanes) {
            let size = value.abs();
            *most = if *most < size { size } else { *most };
        }
    }
    let most = most.into_iter().fold(0.0, f32::max);
    if most == 0.0 || SAFE.contains(&most) {
        return 1.0;
    }
    // The power of two at or below the largest magnitude.
    let unit = f64::from_bits(f64::from(most).to_bits() & 0x7ff0_0000_0000_0000);
    for value in row {
        *value = f32::round_from(f64::from(*value) / unit);
    }
    unit
}

/// Sum of squares in 16 partial sums of `f32`; infinite where a square does not fit.
#[inline(always)]
pub(super) fn square_sum_f32(row: &[f32]) -> f64 {
    let mut sums = [0.0_f32; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for lanes in chunks {
        for (sum, value) in sums.iter_mut().zip(lanes) {
            *sum += value * value;
        }
    }
    for (sum, value) in sums.iter_mut().zip(rest) {
        *sum += value * value;
    }
    sums.into_iter().map(f64::from).sum()
}

/// The lower triangle of the inner products of `[rows][BLOCK]`, rows a multiple of [`ROW_STEP`].
#[inline(always)]
pub(super) fn inner_products_f32<S: Simd>(simd: S, values: &[f32], take: &mut impl FnMut(usize, usize, f64)) {
    // The widest tile whose sums stay in registers. Its shape changes no sum.
    match S::F32_LANES {
        LANES => tiles_f32::<S, 4, 4>(simd, values, take),
        8 => tiles_f32::<S, 4, 2>(simd, values, take),
        _ => tiles_f32::<S, 2, 2>(simd, values, take),
    }
}

#[inline(always)]
fn tiles_f32<S: Simd, const A: usize, const B: usize>(
    simd: S,
    values: &[f32],
    take: &mut impl FnMut(usize, usize, f64),
) {
    let rows = values.len() / BLOCK;
    let row = |index: usize| S::as_simd_f32s(&values[index * BLOCK..(index + 1) * BLOCK]).0;
    let step = LANES / S::F32_LANES.min(LANES);
    for top in (0..rows).step_by(A) {
        let a: [&[S::f32s]; A] = std::array::from_fn(|k| row(top + k));
        for left in (0..top + A).step_by(B) {
            let b: [&[S::f32s]; B] = std::array::from_fn(|k| row(left + k));
            let mut lanes = [[[0.0_f32; LANES]; B]; A];
            for part in 0..step {
                let sums = tile_f32(simd, a, b, part, step);
                for (lanes, sums) in lanes.iter_mut().zip(&sums) {
                    for (lanes, sum) in lanes.iter_mut().zip(sums) {
                        let place = S::as_mut_simd_f32s(lanes).0;
                        if let Some(place) = place.get_mut(part) {
                            *place = *sum;
                        }
                    }
                }
            }
            for (i, lanes) in lanes.iter().enumerate() {
                for (j, lanes) in lanes.iter().enumerate() {
                    take(top + i, left + j, fold(*lanes));
                }
            }
        }
    }
}

/// Every `step`-th vector from `part` on.
#[inline(always)]
fn tile_f32<S: Simd, const A: usize, const B: usize>(
    simd: S,
    a: [&[S::f32s]; A],
    b: [&[S::f32s]; B],
    part: usize,
    step: usize,
) -> [[S::f32s; B]; A] {
    let mut sums = [[simd.splat_f32s(0.0); B]; A];
    let length = a[0].len();
    // Equal lengths, where the compiler can see them.
    let (a, b) = (a.map(|row| &row[..length]), b.map(|row| &row[..length]));
    let mut at = part;
    while at < length {
        let right: [S::f32s; B] = std::array::from_fn(|k| b[k][at]);
        for (sums, row) in sums.iter_mut().zip(&a) {
            for (sum, right) in sums.iter_mut().zip(&right) {
                *sum = simd.mul_add_f32s(row[at], *right, *sum);
            }
        }
        at += step;
    }
    sums
}

/// Adds the lanes in a fixed order.
#[inline(always)]
fn fold(mut lanes: [f32; LANES]) -> f64 {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    f64::from(lanes[0])
}

/// The same in `f64`, for the command line: exact enough to be the reference, not made for speed.
#[inline(always)]
pub(super) fn inner_products_f64(values: &[f64], take: &mut impl FnMut(usize, usize, f64)) {
    let rows: Vec<&[f64]> = values.chunks_exact(BLOCK).collect();
    for (i, a) in rows.iter().enumerate() {
        for (j, b) in rows[..=i].iter().enumerate() {
            let mut sums = [0.0_f64; LANES];
            for (a, b) in a.as_chunks::<LANES>().0.iter().zip(b.as_chunks::<LANES>().0) {
                for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
                    *sum += a * b;
                }
            }
            take(i, j, sums.into_iter().sum());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Squared distances of three rows and the origin, by the kernel.
    fn distances<T: Scalar>(rows: &[Vec<T>]) -> Vec<f64> {
        let (count, points) = (rows.len(), rows.len() + 1);
        let mut values = vec![T::default(); points.next_multiple_of(ROW_STEP) * BLOCK];
        for (place, row) in values.chunks_exact_mut(BLOCK).zip(rows) {
            place[..row.len()].copy_from_slice(row);
        }
        let columns = rows[0].len();
        let mut sums = vec![0.0; points * points];
        let block = Block {
            values: &mut values,
            columns,
            count,
        };
        add_inner_products(block, &mut sums);
        let at = |i: usize, j: usize| sums[i.max(j) * points + i.min(j)];
        (0..points)
            .flat_map(|i| (0..i).map(move |j| at(i, i) + at(j, j) - 2.0 * at(i, j)))
            .collect()
    }

    fn plain(rows: &[Vec<f64>]) -> Vec<f64> {
        let mut all = rows.to_vec();
        all.push(vec![0.0; rows[0].len()]);
        let squared = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>();
        (0..all.len())
            .flat_map(|i| (0..i).map(|j| squared(&all[i], &all[j])).collect::<Vec<_>>())
            .collect()
    }

    #[expect(clippy::cast_possible_truncation, reason = "test values")]
    fn agree(rows: &[Vec<f64>]) {
        let expected = plain(rows);
        let narrow: Vec<Vec<f32>> = rows
            .iter()
            .map(|row| row.iter().map(|v| *v as f32).collect())
            .collect();
        for ((f64s, f32s), expected) in distances(rows).iter().zip(distances(&narrow)).zip(expected) {
            assert!(
                (f64s - expected).abs() <= 1e-12 * expected,
                "{f64s} is not {expected}"
            );
            assert!(
                (f32s - expected).abs() <= 1e-5 * expected,
                "{f32s} is not {expected}"
            );
        }
    }

    fn wave(seed: f64, columns: usize, size: f64) -> Vec<f64> {
        (0..columns)
            .map(|i| size * (seed + i as f64 * seed).sin())
            .collect()
    }

    #[test]
    fn distances_are_those_of_the_definition() {
        for columns in [1, 15, 16, 100, BLOCK] {
            agree(&[
                wave(1.3, columns, 1.0),
                wave(2.1, columns, 1.0),
                wave(3.7, columns, 2.0),
            ]);
        }
    }

    #[test]
    fn values_whose_squares_do_not_fit_are_measured() {
        agree(&[wave(1.3, 64, 1e30), wave(2.1, 64, 1e30), wave(3.7, 64, 1e31)]);
        agree(&[wave(1.3, 64, 1e-25), wave(2.1, 64, 1e-25), wave(3.7, 64, 1e-24)]);
    }

    #[test]
    fn one_huge_row_does_not_hide_the_differences_of_the_others() {
        let rows = [
            wave(1.3, 64, 1.0),
            wave(2.1, 64, 1.0),
            wave(3.7, 64, 1.0),
            wave(0.7, 64, 1e30),
        ];
        agree(&rows);
    }

    #[test]
    fn a_common_offset_does_not_hide_differences() {
        let offset =
            |row: Vec<f64>| -> Vec<f64> { row.iter().map(|v| (v * 16.0).round() / 16.0 + 4096.0).collect() };
        agree(&[
            offset(wave(1.3, 64, 1.0)),
            offset(wave(2.1, 64, 1.0)),
            offset(wave(3.7, 64, 1.0)),
        ]);
    }
}
