//! Second moments of the own-lag regression: what a site releases, and what the centre solves.
//!
//! With `p_{t,c}` the five lags of channel `c` and `y_{t,c}` its value, both scaled by **public** constants, a block of
//! rows gives per channel the 15 entries of `Σ p pᵀ` (off-diagonal × √2, so that the vector's norm is the matrix's) and
//! the 5 of `Σ p y`. One block is the privacy unit: its vector is clipped and noised by `theriac-privacy`.
//! Nothing in this module is private by itself.
//!
//! Sums over rows and the solve are `f64`; what is released is `f32`.

use std::f64::consts::SQRT_2;

use nalgebra::{SMatrix, SVector};

use crate::feature::FeatureSchema;
use crate::global::PUBLIC_OWN_WEIGHT;
use crate::normalise::{Normaliser, narrow};
use crate::series::Series;
use crate::{LAG_COUNT, LAG_MAX, LAGS};

/// Numbers per channel: 15 of `Σ p pᵀ` and 5 of `Σ p y`.
pub const MOMENTS_PER_CHANNEL: usize = GRAM + LAG_COUNT;

/// Rows of one block, the privacy unit, by default; its first ten only serve as lags.
pub const BLOCK_ROWS: usize = 60;

/// Clipping norm C of one block of 60 rows by default: a public constant, the lower quartile of block norms of
/// recorded servers with 38 channels.
pub const BLOCK_CLIP_NORM: f64 = 588.0;

/// Clipping norm C of one record by default; see [`record_rows`].
pub const RECORD_CLIP_NORM: f64 = 360.0;

/// Bound R of a row's norm over all lags, the constant 1 and all targets.
const ROW_NORM_MAX: f64 = 12.0;

/// Regression rows that one record is part of: five as a lag and one as the target.
const ROWS_PER_RECORD: usize = LAG_COUNT + 1;

/// Least strength of the pull towards the public constant.
const LAMBDA_MIN: f64 = 1e4;

/// Strength of that pull in units of the noise. Where a channel is nearly constant there is only noise: at 3 such a channel's
/// weights sum to anything between 0.4 and 1.4 and every second gate refuses the model, at 9 none does, at the same accuracy.
const LAMBDA_NOISE: f64 = 9.0;

/// Entries of the upper triangle of `Σ p pᵀ`.
const GRAM: usize = LAG_COUNT * (LAG_COUNT + 1) / 2;

type Gram = SMatrix<f64, LAG_COUNT, LAG_COUNT>;
type Cross = SVector<f64, LAG_COUNT>;

/// Rows scaled by the public constants and clipped to ±8, `[time, channel]`, row-major; NaN where missing. The input of
/// [`block`]: no value depends on any other row.
///
/// # Panics
/// When the series has other channels than the schema.
pub fn public_values(schema: &FeatureSchema, series: &Series) -> Vec<f32> {
    assert_eq!(
        schema.channels(),
        series.channels(),
        "series and schema have the same channels"
    );
    let scaler = Normaliser::public(schema);
    let mut values = vec![0.0; series.values().len()];
    for (raw, out) in series
        .iter_rows()
        .zip(values.chunks_exact_mut(schema.channels().max(1)))
    {
        scaler.apply(raw, out);
    }
    values
}

/// Moments `[channel, 20]` of one block of `rows` publicly scaled rows `[time, channel]`. The rows whose lags lie inside the
/// block count, each scaled to norm ≤ 12 over all its lags, 1 and all targets. Where a lag or the target of a
/// channel is missing, that channel adds nothing for that row. A block of ten rows or fewer is all zero.
///
/// # Panics
/// When `values` are not `rows` whole rows.
pub fn block(values: &[f32], rows: usize) -> Vec<f32> {
    let channels = channels_of(values, rows);
    let mut sum = vec![0.0_f64; channels * MOMENTS_PER_CHANNEL];
    for row in LAG_MAX..rows {
        add_row(values, channels, row, 1.0, &mut sum);
    }
    sum.into_iter().map(narrow).collect()
}

/// Moments `[channel, 20]` of each regression row on its own, for the privacy unit of **one record** (one row of metrics).
/// A record is part of at most six regression rows (five as a lag, one as the target), so each is clipped to
/// `clip_norm / 6` here: adding or removing one record then moves the sum by at most `clip_norm`, the sensitivity that the
/// noise is made for. (Removing one means that the rows it is part of are left out.)
///
/// # Panics
/// When `values` are not `rows` whole rows.
pub fn record_rows(values: &[f32], rows: usize, clip_norm: f64) -> Vec<Vec<f32>> {
    let channels = channels_of(values, rows);
    let bound = clip_norm / ROWS_PER_RECORD as f64;
    let mut moments = vec![0.0_f64; channels * MOMENTS_PER_CHANNEL];
    let one = |row| {
        moments.fill(0.0);
        add_row(values, channels, row, 1.0, &mut moments);
        let norm = moments.iter().map(|v| v * v).sum::<f64>().sqrt();
        // A hair below the bound: rounding to `f32` must not pass it.
        let scale = (bound * (1.0 - 1e-6) / norm).min(1.0);
        moments.iter().map(|v| narrow(v * scale)).collect()
    };
    (LAG_MAX..rows).map(one).collect()
}

/// Own-lag weights `[channel, 5]` from the sum of `sites` sites' moments: per channel
/// `(M + λI) w = h + λ·(.19, …, .19)`, `M` with negative eigenvalues set to 0 (noise makes some),
/// `λ = max(1e4, 9 σ C √(10 · sites))` with the noise multiplier `sigma` (0 without noise) and the clipping norm C of one unit.
/// Values that are not finite count as 0, so the result is always finite; numbers beyond `20·channels` are not looked
/// at, missing ones count as 0.
pub fn solve(sum: &[f32], sites: usize, sigma: f64, clip_norm: f64, channels: usize) -> Vec<f32> {
    let lambda = (LAMBDA_NOISE * sigma * clip_norm * (10.0 * sites as f64).sqrt()).max(LAMBDA_MIN);
    let constant = Cross::repeat(f64::from(PUBLIC_OWN_WEIGHT));
    let mut weights = Vec::with_capacity(channels * LAG_COUNT);
    for channel in 0..channels {
        let (gram, cross) = unpack(sum.get(channel * MOMENTS_PER_CHANNEL..).unwrap_or_default());
        let mut eigen = gram.symmetric_eigen();
        eigen.eigenvalues.apply(|value| *value = value.max(0.0) + lambda);
        let right = cross + lambda * constant;
        // (Q D Qᵀ)⁻¹ r, D at least λ > 0.
        let rotated = (eigen.eigenvectors.transpose() * right).component_div(&eigen.eigenvalues);
        let solution = eigen.eigenvectors * rotated;
        weights.extend(solution.iter().map(|w| narrow(*w)));
    }
    weights
}

fn channels_of(values: &[f32], rows: usize) -> usize {
    let channels = values.len().checked_div(rows).unwrap_or(0);
    assert_eq!(values.len(), channels * rows, "values are whole rows");
    channels
}

/// Adds one regression row, scaled to norm ≤ 12, times `weight`.
fn add_row(values: &[f32], channels: usize, row: usize, weight: f64, sum: &mut [f64]) {
    let at = |row: usize, channel: usize| f64::from(values[row * channels + channel]);
    let lags = |channel: usize| LAGS.map(|lag| at(row - lag, channel));
    let square = |v: f64| if v.is_finite() { v * v } else { 0.0 };
    let squares: f64 = (0..channels)
        .map(|channel| lags(channel).map(square).iter().sum::<f64>() + square(at(row, channel)))
        .sum();
    // Moments are quadratic in the row, so its scale enters squared.
    let scale = (ROW_NORM_MAX * ROW_NORM_MAX / (1.0 + squares)).min(1.0) * weight;
    for (channel, sum) in sum.chunks_exact_mut(MOMENTS_PER_CHANNEL).enumerate() {
        let (p, y) = (lags(channel), at(row, channel));
        if !(y.is_finite() && p.iter().all(|v| v.is_finite())) {
            continue;
        }
        let mut index = 0;
        for i in 0..LAG_COUNT {
            sum[index] += scale * p[i] * p[i];
            index += 1;
            for j in i + 1..LAG_COUNT {
                sum[index] += scale * SQRT_2 * p[i] * p[j];
                index += 1;
            }
        }
        for (i, p) in p.iter().enumerate() {
            sum[GRAM + i] += scale * p * y;
        }
    }
}

fn unpack(moments: &[f32]) -> (Gram, Cross) {
    let value = |index: usize| {
        let value = moments.get(index).copied().map_or(0.0, f64::from);
        if value.is_finite() { value } else { 0.0 }
    };
    let mut gram = Gram::zeros();
    let mut index = 0;
    for i in 0..LAG_COUNT {
        gram[(i, i)] = value(index);
        index += 1;
        for j in i + 1..LAG_COUNT {
            gram[(i, j)] = value(index) / SQRT_2;
            gram[(j, i)] = gram[(i, j)];
            index += 1;
        }
    }
    (gram, Cross::from_fn(|i, _| value(GRAM + i)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Places of the diagonal entries among the first 15.
    fn diagonal() -> impl Iterator<Item = usize> {
        (0..LAG_COUNT).scan(0, |next, i| {
            let index = *next;
            *next += LAG_COUNT - i;
            Some(index)
        })
    }

    /// `x_t = a x_{t−1} + shock`, one series per channel.
    fn process(rows: usize, channels: usize, a: f32) -> Vec<f32> {
        let mut state = 77_u32;
        let mut values = vec![0.0_f32; rows * channels];
        for t in 1..rows {
            for c in 0..channels {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let shock = (state >> 8) as f32 / 16_777_216.0 - 0.5;
                values[t * channels + c] = a * values[(t - 1) * channels + c] + shock;
            }
        }
        values
    }

    fn norm(values: &[f32]) -> f64 {
        values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
    }

    #[test]
    fn moments_of_a_constant_are_those_worked_out_by_hand() {
        // 12 rows of 0.5: two regression rows, each of squared norm 1 + 6 · 0.25 = 2.5, below 144.
        let moments = block(&[0.5; 12], 12);
        let expected: Vec<f32> = (0..GRAM)
            .map(|i| {
                if diagonal().any(|d| d == i) {
                    0.5
                } else {
                    0.5 * std::f32::consts::SQRT_2
                }
            })
            .chain([0.5; 5])
            .collect();
        assert!(
            moments.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-6),
            "{moments:?}"
        );
        assert_eq!(diagonal().collect::<Vec<_>>(), [0, 5, 9, 12, 14]);
    }

    #[test]
    fn solve_finds_a_known_process_when_there_are_rows_enough() {
        let values = process(120_000, 1, 0.9);
        let mut sum = [0.0; MOMENTS_PER_CHANNEL];
        for rows in values.chunks_exact(BLOCK_ROWS) {
            sum.iter_mut()
                .zip(block(rows, BLOCK_ROWS))
                .for_each(|(s, m)| *s += m);
        }
        let many: Vec<f32> = sum.iter().map(|s| s * 1000.0).collect();
        let weights = solve(&many, 1, 0.0, BLOCK_CLIP_NORM, 1);
        assert!(
            (weights[0] - 0.9).abs() < 0.02 && weights[1].abs() < 0.02,
            "{weights:?}"
        );
    }

    #[test]
    fn nothing_learnt_is_the_public_constant() {
        for sum in [&[0.0; 40][..], &[f32::NAN; 40], &[]] {
            let weights = solve(sum, 3, 1.0, 588.0, 2);
            assert_eq!(weights.len(), 10);
            assert!(
                weights.iter().all(|w| (w - PUBLIC_OWN_WEIGHT).abs() < 1e-6),
                "{weights:?}"
            );
        }
    }

    /// Noise can turn a small matrix of squares negative; its inverse would point the wrong way.
    #[test]
    fn negative_squares_count_as_none() {
        let mut sum = [0.0; MOMENTS_PER_CHANNEL];
        diagonal().for_each(|index| sum[index] = -2e4);
        let weights = solve(&sum, 1, 0.0, BLOCK_CLIP_NORM, 1);
        assert!(
            weights.iter().all(|w| (w - PUBLIC_OWN_WEIGHT).abs() < 1e-6),
            "{weights:?}"
        );
    }

    #[test]
    fn missing_values_add_nothing_and_leave_other_channels_alone() {
        let mut values = process(30, 2, 0.5);
        for t in 12..16 {
            values[t * 2] = f32::NAN;
        }
        let moments = block(&values, 30);
        assert!(moments.iter().all(|m| m.is_finite()));
        assert!(moments[MOMENTS_PER_CHANNEL] > 0.0);
        let all_missing = block(&[f32::NAN; 60], 60);
        assert!(all_missing.iter().all(|m| *m == 0.0));
    }

    #[test]
    fn short_blocks_are_zero() {
        assert!(block(&[1.0; 20], 10).iter().all(|m| *m == 0.0));
        assert!(block(&[], 0).is_empty());
        assert!(record_rows(&[1.0; 20], 10, 1.0).is_empty());
    }

    proptest! {
        /// The privacy claim of the record unit: whatever one record holds, the sum moves by at most C.
        #[test]
        fn one_record_moves_the_sum_by_at_most_the_clipping_norm(
            values in prop::collection::vec(-8.0_f32..8.0, 50 * 2), record in 0_usize..50, clip in 1.0_f64..200.0,
        ) {
            let with = record_rows(&values, 50, clip);
            let mut gone = values.clone();
            gone[record * 2..record * 2 + 2].fill(f32::NAN);
            let without = record_rows(&gone, 50, clip);
            let difference: Vec<f32> = (0..40)
                .map(|i| with.iter().map(|v| v[i]).sum::<f32>() - without.iter().map(|v| v[i]).sum::<f32>())
                .collect();
            prop_assert!(norm(&difference) <= clip * 1.0001, "{} > {clip}", norm(&difference));
            prop_assert!(with.iter().all(|v| norm(v) <= clip / 6.0));
        }

        /// `‖v‖ ≤ Σ rows R²`: clipped rows bound every block.
        #[test]
        fn a_block_is_bounded_by_its_rows(values in prop::collection::vec(-8.0_f32..8.0, 40 * 3)) {
            prop_assert!(norm(&block(&values, 40)) <= 30.0 * 144.0 * 1.0001);
        }

        #[test]
        fn solve_is_finite_for_any_sum(sum in prop::collection::vec(any::<f32>(), 20)) {
            prop_assert!(solve(&sum, 13, 1.3, 588.0, 1).iter().all(|w| w.is_finite()));
        }
    }
}
