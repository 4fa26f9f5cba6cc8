//! Second moments of the own-lag regression: what a site releases, and what the centre solves.
//!
//! With `p_{t,c}` the five lags of channel `c` and `y_{t,c}` its value, both centred and scaled **inside the block**, a block of
//! rows gives per channel the 15 entries of `Σ p pᵀ` (off-diagonal × √2, so that the vector's norm is the matrix's), the 5 of
//! `Σ p y`, whether it was there, and how far it usually moves. One block is the privacy unit: its vector is clipped and noised by
//! `theriac-privacy`. Nothing in this module is private by itself.
//!
//! Why centred: a channel that idles at 0.7 of its range has moments that say 0.7 and little else, and noise on them drowns how it
//! moves. The centre is the mean of the block's first ten rows, which are only lags: the mean of all rows would know the
//! future of every row and bend the weights towards it (Nickell 1981).
//!
//! Sums over rows and the solve are `f64`; what is released is `f32`.

use std::f64::consts::SQRT_2;

use nalgebra::{SMatrix, SVector};

use crate::feature::FeatureSchema;
use crate::global::{OwnLagWeights, PUBLIC_OWN_WEIGHT};
use crate::normalise::{Normaliser, PUBLIC_CLIP, narrow};
use crate::series::Series;
use crate::{LAG_COUNT, LAG_MAX, LAGS};

/// Numbers per channel: 15 of `Σ p pᵀ`, 5 of `Σ p y`, presence and level.
pub const MOMENTS_PER_CHANNEL: usize = LEVEL + 1;

/// Rows of one block, the privacy unit, by default; its first ten only serve as lags.
pub const BLOCK_ROWS: usize = 60;

/// Clipping norm C of one block of 60 rows by default: a public constant, below nearly all block norms of recorded servers
/// with 38 channels (quartiles 375, 491, 616). Clipping weighs every block alike; less of it only adds noise.
pub const BLOCK_CLIP_NORM: f64 = 240.0;

/// Smallest scale inside a block, in publicly scaled units: what moves less stays small instead of being blown up.
pub(crate) const SCALE_MIN: f64 = 0.25;

/// Largest level of a channel, in publicly scaled units. It bounds what a false level can do to an edge.
pub const LEVEL_MAX: f32 = 0.25;

/// What a channel that is there adds to its presence in one block of [`BLOCK_ROWS`]; longer blocks weigh by their regression rows, as
/// the other sums and the clipping norm do.
const PRESENCE_UNIT: f64 = 8.0;

/// Standard deviations of the noise on a sum that a channel's presence must exceed before its level is believed.
const PRESENCE_NOISE: f64 = 3.0;

/// What a channel at [`LEVEL_MAX`] adds to its level in one such block: enough to stand above noise, too little to fill the clipping norm.
const LEVEL_UNIT: f64 = 32.0;

/// Least strength of the pull towards the public constant.
const LAMBDA_MIN: f64 = 100.0;

/// Strength of that pull in units of the noise.
const LAMBDA_NOISE: f64 = 3.0;

/// What a channel's weights sum to at least and at most. Inside one hour a channel seems to return to its mean sooner than it does over
/// days, so the shape of the weights is learnt and their sum is not.
const WEIGHT_SUM: [f64; 2] = [0.95, 1.0];

/// Entries of the upper triangle of `Σ p pᵀ`.
const GRAM: usize = LAG_COUNT * (LAG_COUNT + 1) / 2;
/// Places of presence and level among a channel's numbers.
const PRESENCE: usize = GRAM + LAG_COUNT;
const LEVEL: usize = PRESENCE + 1;

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

/// Moments `[channel, 22]` of one block of `rows` publicly scaled rows `[time, channel]`. Every channel is centred on the mean of
/// its first ten rows and divided by its root mean square distance from it (at least 0.25); the rows whose lags lie inside the block count.
/// Where a lag or the target is missing, that channel adds nothing for that row. A block of ten rows or fewer is all zero.
///
/// # Panics
/// When `values` are not `rows` whole rows.
pub fn block(values: &[f32], rows: usize) -> Vec<f32> {
    let channels = channels_of(values, rows);
    let mut moments = vec![0.0_f64; channels * MOMENTS_PER_CHANNEL];
    for (channel, sum) in moments.chunks_exact_mut(MOMENTS_PER_CHANNEL).enumerate() {
        let column = Column {
            values,
            channels,
            channel,
        };
        let Some(centre) = column.mean(0..LAG_MAX.min(rows)) else {
            continue;
        };
        let scale = column.distance(0..rows, centre).max(SCALE_MIN);
        let (mut counted, mut level) = (0.0, 0.0);
        for row in LAG_MAX..rows {
            if let Some((lags, target)) = column.at(row) {
                add_row(lags, target, centre, scale, sum);
                level += step_size(lags, target);
                counted += 1.0;
            }
        }
        if counted > 0.0 {
            let weight = (rows - LAG_MAX) as f64 / (BLOCK_ROWS - LAG_MAX) as f64;
            sum[PRESENCE] = PRESENCE_UNIT * weight;
            sum[LEVEL] = LEVEL_UNIT * weight * (level / counted / f64::from(LEVEL_MAX)).min(1.0);
        }
    }
    moments.into_iter().map(narrow).collect()
}

/// What the fleet knows of a channel, from the sum of `sites` sites' moments. Weights: per channel
/// `(M + λI) w = h + λ·(.19, …, .19)`, `M` with negative eigenvalues set to 0 (noise makes some),
/// `λ = max(100, 3 σ C √(10 · sites))` with the noise multiplier `sigma` (0 without noise) and the clipping norm C of one unit;
/// then shifted, all five alike, until they sum to a value within 0.95 and 1. Level: its sum over that of the presence, within 0 and
/// [`LEVEL_MAX`]. Values that are not finite count as 0, so the result is always finite; numbers beyond `22·channels` are not
/// looked at, missing ones count as 0.
pub fn solve(sum: &[f32], sites: usize, sigma: f64, clip_norm: f64, channels: usize) -> OwnLagWeights {
    let lambda = (LAMBDA_NOISE * sigma * clip_norm * (10.0 * sites as f64).sqrt()).max(LAMBDA_MIN);
    let noise = sigma * clip_norm * (sites as f64).sqrt();
    let constant = Cross::repeat(f64::from(PUBLIC_OWN_WEIGHT));
    let (mut weights, mut levels) = (
        Vec::with_capacity(channels * LAG_COUNT),
        Vec::with_capacity(channels),
    );
    for channel in 0..channels {
        let moments = sum.get(channel * MOMENTS_PER_CHANNEL..).unwrap_or_default();
        let (gram, cross) = unpack(moments);
        let mut eigen = gram.symmetric_eigen();
        eigen.eigenvalues.apply(|value| *value = value.max(0.0) + lambda);
        let right = cross + lambda * constant;
        // (Q D Qᵀ)⁻¹ r, D at least λ > 0.
        let rotated = (eigen.eigenvectors.transpose() * right).component_div(&eigen.eigenvalues);
        let solution = eigen.eigenvectors * rotated;
        let found = solution.sum();
        let shift = (found.clamp(WEIGHT_SUM[0], WEIGHT_SUM[1]) - found) / LAG_COUNT as f64;
        weights.extend(solution.iter().map(|w| narrow(*w + shift)));
        levels.push(level_of(moments, noise));
    }
    OwnLagWeights::finite(weights, levels)
}

/// A channel's level from its sums, each with noise of this standard deviation; 0, which asks for nothing, when the channel was
/// hardly there or its presence does not stand out from the noise.
fn level_of(moments: &[f32], noise: f64) -> f32 {
    let presence = finite(moments, PRESENCE);
    let blocks = presence / PRESENCE_UNIT;
    if blocks < 1.0 || presence < PRESENCE_NOISE * noise {
        return 0.0;
    }
    narrow((finite(moments, LEVEL) / LEVEL_UNIT / blocks).clamp(0.0, 1.0) * f64::from(LEVEL_MAX))
}

/// One channel of rows `[time, channel]`.
struct Column<'a> {
    values: &'a [f32],
    channels: usize,
    channel: usize,
}

impl Column<'_> {
    fn value(&self, row: usize) -> Option<f64> {
        let value = f64::from(self.values[row * self.channels + self.channel]);
        value.is_finite().then_some(value)
    }

    /// The five lags of a row and the row itself, if all are there.
    fn at(&self, row: usize) -> Option<([f64; LAG_COUNT], f64)> {
        let mut lags = [0.0; LAG_COUNT];
        for (value, lag) in lags.iter_mut().zip(LAGS) {
            *value = self.value(row - lag)?;
        }
        Some((lags, self.value(row)?))
    }

    fn mean(&self, rows: std::ops::Range<usize>) -> Option<f64> {
        let (count, sum) = rows
            .filter_map(|row| self.value(row))
            .fold((0.0, 0.0), |(count, sum), value| (count + 1.0, sum + value));
        (count > 0.0).then(|| sum / count)
    }

    /// Root mean square distance from `centre`.
    fn distance(&self, rows: std::ops::Range<usize>, centre: f64) -> f64 {
        let (count, sum) = rows
            .filter_map(|row| self.value(row))
            .fold((0.0_f64, 0.0), |(count, sum), v| {
                (count + 1.0, sum + (v - centre).powi(2))
            });
        (sum / count.max(1.0)).sqrt()
    }
}

fn mean(lags: [f64; LAG_COUNT]) -> f64 {
    lags.iter().sum::<f64>() / LAG_COUNT as f64
}

/// How far a value lies from the mean of its lags.
fn step_size(lags: [f64; LAG_COUNT], target: f64) -> f64 {
    (target - mean(lags)).abs()
}

pub(crate) fn channels_of(values: &[f32], rows: usize) -> usize {
    let channels = values.len().checked_div(rows).unwrap_or(0);
    assert_eq!(values.len(), channels * rows, "values are whole rows");
    channels
}

/// Adds one regression row of one channel.
fn add_row(lags: [f64; LAG_COUNT], target: f64, centre: f64, scale: f64, sum: &mut [f64]) {
    let bound = f64::from(PUBLIC_CLIP);
    let scaled = |value: f64| ((value - centre) / scale).clamp(-bound, bound);
    let (p, y) = (lags.map(scaled), scaled(target));
    let mut index = 0;
    for i in 0..LAG_COUNT {
        sum[index] += p[i] * p[i];
        index += 1;
        for j in i + 1..LAG_COUNT {
            sum[index] += SQRT_2 * p[i] * p[j];
            index += 1;
        }
    }
    for (i, p) in p.iter().enumerate() {
        sum[GRAM + i] += p * y;
    }
}

fn finite(moments: &[f32], index: usize) -> f64 {
    let value = moments.get(index).copied().map_or(0.0, f64::from);
    if value.is_finite() { value } else { 0.0 }
}

fn unpack(moments: &[f32]) -> (Gram, Cross) {
    let value = |index: usize| finite(moments, index);
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

    #[test]
    fn a_level_weighs_as_much_in_a_block_of_an_hour_and_is_not_read_out_of_noise() {
        let (rows, clip_norm) = (3_600, 17_200.0);
        let hour = block(&process(rows, 1, 0.9), rows);
        let short = block(&process(BLOCK_ROWS, 1, 0.9), BLOCK_ROWS);
        let per_row = |moments: &[f32], rows: usize| moments[PRESENCE] / (rows - LAG_MAX) as f32;
        assert!((per_row(&hour, rows) - per_row(&short, BLOCK_ROWS)).abs() < 1e-4);
        assert!(solve(&hour, 1, 0.0, clip_norm, 1).levels()[0] > 0.1);
        // One hour under the noise of epsilon 4: nothing can be known of the level.
        let mut noised = hour;
        noised[PRESENCE] += 21_000.0;
        noised[LEVEL] += 21_000.0;
        assert!(solve(&noised, 1, 1.27, clip_norm, 1).levels()[0] == 0.0);
    }

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

    fn is_constant(own: &OwnLagWeights) -> bool {
        own.values().iter().all(|w| (w - PUBLIC_OWN_WEIGHT).abs() < 1e-6)
    }

    #[test]
    fn moments_are_those_worked_out_by_hand() {
        // Ten rows at 0.5 are the centre. Then 2.5 and 0.5: root mean square distance √(4/12) = 0.577.
        let mut values = [0.5; 12];
        values[10] = 2.5;
        let moments = block(&values, 12);
        let z = 2.0 / (4.0_f64 / 12.0).sqrt();
        // Row 10 has lags 0 and target z; row 11 has z at lag 1 and target 0.
        let mut expected = [0.0; MOMENTS_PER_CHANNEL];
        expected[0] = z * z;
        // Two regression rows of the fifty of a usual block. Steps 2 and 0.4 are beyond the largest level.
        expected[PRESENCE] = 8.0 * 2.0 / 50.0;
        expected[LEVEL] = 32.0 * 2.0 / 50.0;
        let close = |(a, b): (&f32, &f64)| (f64::from(*a) - b).abs() < 1e-5;
        assert!(moments.iter().zip(&expected).all(close), "{moments:?}");
        assert_eq!(diagonal().collect::<Vec<_>>(), [0, 5, 9, 12, 14]);
    }

    /// The resting level of a channel must not show, or noise on it drowns what it does.
    #[test]
    fn where_a_channel_rests_does_not_matter() {
        let low = process(BLOCK_ROWS, 2, 0.8);
        let high: Vec<f32> = low.iter().map(|v| v + 3.0).collect();
        let (low, high) = (block(&low, BLOCK_ROWS), block(&high, BLOCK_ROWS));
        assert!(
            low.iter().zip(&high).all(|(a, b)| (a - b).abs() < 1e-2),
            "{low:?} {high:?}"
        );
        assert!(block(&[0.5; 60], 60)[..PRESENCE].iter().all(|m| *m == 0.0));
    }

    #[test]
    fn level_is_the_mean_step_over_all_blocks_where_the_channel_was() {
        // A sawtooth of 0.1 is 0.05 or so from the mean of its lags in every row.
        let saw: Vec<f32> = (0..60_u8).map(|t| f32::from(t % 2) * 0.1).collect();
        let mut sum = vec![0.0; MOMENTS_PER_CHANNEL];
        for values in [&saw[..], &[f32::NAN; 60], &saw] {
            sum.iter_mut().zip(block(values, 60)).for_each(|(s, m)| *s += m);
        }
        let expected = saw[10..].iter().enumerate().map(|(i, v)| {
            let lags = LAGS.map(|lag| saw[10 + i - lag]).iter().sum::<f32>() / 5.0;
            (v - lags).abs()
        });
        let expected = expected.sum::<f32>() / 50.0;
        let level = solve(&sum, 1, 0.0, BLOCK_CLIP_NORM, 1).levels()[0];
        assert!((level - expected).abs() < 1e-5, "{level} against {expected}");
        let swings: Vec<f32> = saw.iter().map(|v| v * 50.0).collect();
        let bounded = solve(&block(&swings, 60), 1, 0.0, BLOCK_CLIP_NORM, 1);
        assert_eq!(bounded.levels(), [LEVEL_MAX]);
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
        let own = solve(&sum, 1, 0.0, BLOCK_CLIP_NORM, 1);
        let weights = own.channel(0);
        // 0.9 and its sum lifted to 0.95: 0.01 more on each.
        assert!((weights[0] - 0.91).abs() < 0.03, "{weights:?}");
        assert!(
            weights[1..].iter().all(|w| (w - 0.01).abs() < 0.03),
            "{weights:?}"
        );
    }

    #[test]
    fn nothing_learnt_is_the_public_constant() {
        for sum in [&[0.0; 44][..], &[f32::NAN; 44], &[]] {
            let own = solve(sum, 3, 1.0, 588.0, 2);
            assert_eq!((own.values().len(), own.levels()), (10, &[0.0, 0.0][..]));
            assert!(is_constant(&own), "{own:?}");
        }
    }

    /// Noise can turn a small matrix of squares negative; its inverse would point the wrong way.
    #[test]
    fn negative_squares_count_as_none() {
        let mut sum = [0.0; MOMENTS_PER_CHANNEL];
        diagonal().for_each(|index| sum[index] = -2e4);
        let own = solve(&sum, 1, 0.0, BLOCK_CLIP_NORM, 1);
        assert!(is_constant(&own), "{own:?}");
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
    }

    proptest! {
        /// Whatever comes in, what goes out to be clipped is a number.
        #[test]
        fn a_block_is_finite(values in prop::collection::vec(any::<f32>(), 40 * 3)) {
            prop_assert!(block(&values, 40).iter().all(|m| m.is_finite()));
        }

        #[test]
        fn what_is_learnt_is_bounded_for_any_sum(sum in prop::collection::vec(any::<f32>(), MOMENTS_PER_CHANNEL)) {
            let own = solve(&sum, 13, 1.3, 588.0, 1);
            prop_assert!(own.values().iter().all(|w| w.is_finite()));
            prop_assert!((0.0..=LEVEL_MAX).contains(&own.levels()[0]));
        }
    }
}
