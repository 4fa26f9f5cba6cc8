//! From residuals to one anomaly score.

use crate::normalise::{narrow, quantile};

/// Number of half-lives of the smoothing.
pub const HALF_LIVES: usize = 2;

/// No channel's unit is below this part of the largest channel's.
const BASE_SHARE_MIN: f64 = 0.05;
/// Nor below this, in scaled units.
const BASE_MIN: f64 = 1e-3;
/// Unit where no channel's residuals reach that: nothing moved, so the measure is a twentieth of the least change that the profile
/// says matters.
const BASE_CONSTANT: f64 = 0.05;
/// Quantile of the smoothed scores on history that makes their unit.
const LEVEL_QUANTILE: f64 = 0.99;
/// A history whose scores have a top per cent below this has no residuals to speak of, such as one of constants.
const LEVEL_QUIET: f64 = 0.01;

/// Turns the residuals of one forecaster into a score. With `z = |residual| / base`, `y^h` its causal
/// exponential mean of half-life `h`, and `a_h` the mean of the `max(1, ⌊C/6⌋)` largest `y^h`:
/// `score = max_h(a_h / level_h) / overall`. About 1 is the top per cent of the history.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    /// Unit of every channel's residual.
    pub(crate) base: Vec<f32>,
    /// Unit of `a_h`, one for each half-life.
    pub(crate) level: [f64; HALF_LIVES],
    /// Unit of their maximum.
    pub(crate) overall: f64,
    /// Weight of the newest value in each exponential mean.
    alpha: [f64; HALF_LIVES],
}

/// The exponential means of one head while it scores.
#[derive(Debug, Clone)]
pub struct HeadState {
    smoothed: [Vec<f64>; HALF_LIVES],
    largest: Vec<f64>,
    started: bool,
}

impl HeadState {
    /// Before the first row.
    pub fn new(channels: usize) -> Self {
        Self {
            smoothed: std::array::from_fn(|_| vec![0.0; channels]),
            largest: vec![0.0; channels],
            started: false,
        }
    }
}

impl Head {
    /// Fits the units on a history of residuals `[time, channel]` (absolute values; NaN = does not count) and returns
    /// the head with the score of every row, NaN where no channel counts. `half_lives` in rows, above 0; `base_quantile` of a channel's residuals makes its
    /// unit, 0 to 1, which is not below its floor, where there is one: `floors` is `[channel]` or empty.
    pub fn fit(
        residuals: &[f32],
        channels: usize,
        half_lives: [f64; HALF_LIVES],
        base_quantile: f64,
        floors: &[f32],
    ) -> (Self, Vec<f64>) {
        let mut head = Self {
            base: bases(residuals, channels, base_quantile, floors),
            level: [1.0; HALF_LIVES],
            overall: 1.0,
            alpha: half_lives.map(|rows| 1.0 - 0.5_f64.powf(1.0 / rows)),
        };
        let mut state = HeadState::new(channels);
        let mut column = vec![0.0; channels];
        // A row in which nothing counts says nothing about what is usual.
        let smoothed: Vec<Option<[f64; HALF_LIVES]>> = residuals
            .chunks_exact(channels.max(1))
            .map(|row| (!blind(row)).then(|| head.smooth(&mut state, row, &mut column)))
            .collect();
        for (index, level) in head.level.iter_mut().enumerate() {
            *level = upper(smoothed.iter().flatten().map(|a| a[index]));
        }
        let ratios: Vec<f64> = smoothed
            .into_iter()
            .map(|a| a.map_or(f64::NAN, |a| head.ratio(a)))
            .collect();
        head.overall = upper(ratios.iter().copied().filter(|ratio| !ratio.is_nan()));
        let scores = ratios.into_iter().map(|ratio| ratio / head.overall).collect();
        (head, scores)
    }

    /// Stands where an arm does not look.
    pub(crate) fn unused(channels: usize) -> Self {
        Self::from_parts(vec![1.0; channels], [1.0; HALF_LIVES], 1.0, [1.0; HALF_LIVES])
    }

    /// A head read back from a model file.
    pub(crate) fn from_parts(
        base: Vec<f32>,
        level: [f64; HALF_LIVES],
        overall: f64,
        half_lives: [f64; HALF_LIVES],
    ) -> Self {
        Self {
            base,
            level,
            overall,
            alpha: half_lives.map(|rows| 1.0 - 0.5_f64.powf(1.0 / rows)),
        }
    }

    /// Takes the residuals of the next row and returns its score; writes every channel's `z` into `z` (0 where it
    /// does not count). A row in which no channel counts leaves the means as they were.
    pub fn push(&self, state: &mut HeadState, residuals: &[f32], z: &mut [f32]) -> f64 {
        let smoothed = self.smooth(state, residuals, z);
        self.ratio(smoothed) / self.overall
    }

    fn ratio(&self, smoothed: [f64; HALF_LIVES]) -> f64 {
        smoothed
            .iter()
            .zip(&self.level)
            .map(|(a, level)| a / level)
            .fold(0.0, f64::max)
    }

    fn smooth(&self, state: &mut HeadState, residuals: &[f32], z: &mut [f32]) -> [f64; HALF_LIVES] {
        for ((z, residual), base) in z.iter_mut().zip(residuals).zip(&self.base) {
            *z = if residual.is_nan() { 0.0 } else { residual / base };
        }
        if blind(residuals) {
            return std::array::from_fn(|index| {
                state.largest.copy_from_slice(&state.smoothed[index]);
                mean_of_largest(&mut state.largest)
            });
        }
        let first = !std::mem::replace(&mut state.started, true);
        std::array::from_fn(|index| {
            // The exponential mean starts at the first value.
            let alpha = if first { 1.0 } else { self.alpha[index] };
            let smoothed = &mut state.smoothed[index];
            for (y, z) in smoothed.iter_mut().zip(z.iter()) {
                *y += alpha * (f64::from(*z) - *y);
            }
            state.largest.copy_from_slice(smoothed);
            mean_of_largest(&mut state.largest)
        })
    }
}

/// Whether no channel counts.
fn blind(residuals: &[f32]) -> bool {
    residuals.iter().all(|residual| residual.is_nan())
}

/// Mean of the `max(1, ⌊n/6⌋)` largest values; 0 for none. Reorders them.
fn mean_of_largest(values: &mut [f64]) -> f64 {
    let count = (values.len() / 6).max(1);
    if values.is_empty() {
        return 0.0;
    }
    values.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a));
    values[..count].iter().sum::<f64>() / count as f64
}

fn bases(residuals: &[f32], channels: usize, base_quantile: f64, floors: &[f32]) -> Vec<f32> {
    let mut column = Vec::with_capacity(residuals.len() / channels.max(1));
    let raw: Vec<f64> = (0..channels)
        .map(|channel| {
            column.clear();
            let values = residuals.iter().skip(channel).step_by(channels);
            column.extend(values.copied().filter(|r| !r.is_nan()));
            let floor = floors.get(channel).copied().map_or(0.0, f64::from);
            quantile(&mut column, base_quantile).max(floor)
        })
        .collect();
    let largest = raw.iter().copied().fold(0.0, f64::max);
    let least = if largest < BASE_MIN {
        BASE_CONSTANT
    } else {
        (BASE_SHARE_MIN * largest).max(BASE_MIN)
    };
    raw.into_iter().map(|base| narrow(base.max(least))).collect()
}

fn upper(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f32> = values.map(narrow).collect();
    unit_or_one(quantile(&mut values, LEVEL_QUANTILE))
}

/// A unit taken from a history that has something to measure by; else 1, which leaves values as they are.
pub(crate) fn unit_or_one(unit: f64) -> f64 {
    if unit < LEVEL_QUIET { 1.0 } else { unit }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_the_largest_sixth() {
        let mut values: Vec<f64> = (0..38_u8).map(f64::from).collect();
        assert!((mean_of_largest(&mut values) - 34.5).abs() < 1e-12, "6 of 38");
        assert!(
            (mean_of_largest(&mut [2.0, 1.0]) - 2.0).abs() < 1e-12,
            "at least one"
        );
        assert!(mean_of_largest(&mut []).abs() < 1e-12);
    }

    #[test]
    fn unit_of_a_quiet_channel_is_a_share_of_the_loudest() {
        let residuals: Vec<f32> = (0..100).flat_map(|_| [10.0, 0.0]).collect();
        assert_eq!(bases(&residuals, 2, 0.75, &[]), [10.0, 0.5]);
        assert_eq!(bases(&[0.0, f32::NAN], 2, 0.75, &[]), [0.05, 0.05]);
        assert_eq!(
            bases(&residuals, 2, 0.75, &[1.0, 2.0]),
            [10.0, 2.0],
            "a floor lifts only what lies below"
        );
    }

    #[test]
    fn history_without_residuals_gives_finite_scores() {
        let (head, scores) = Head::fit(&[0.0; 60], 2, [3.0, 12.0], 0.75, &[]);
        assert!(scores.iter().all(|s| *s == 0.0));
        let score = |residual| head.push(&mut HeadState::new(2), &[residual, 0.0], &mut [0.0; 2]);
        // A step of one floor is 20 units of 0.05; rounding of an f32 is none.
        assert!((score(1.0) - 20.0).abs() < 1e-3, "{}", score(1.0));
        assert!(score(1e-5) < 0.01, "{}", score(1e-5));
    }

    #[test]
    fn one_spike_decays_by_half_in_a_half_life() {
        let (head, _) = Head::fit(&[1.0; 40], 1, [3.0, 3.0], 0.75, &[]);
        let mut state = HeadState::new(1);
        let mut z = [0.0];
        let first = head.push(&mut state, &[8.0], &mut z);
        for _ in 0..3 {
            head.push(&mut state, &[0.0], &mut z);
        }
        let later = head.push(&mut state, &[0.0], &mut z);
        assert!((later / first - 0.5_f64.powf(4.0 / 3.0)).abs() < 1e-9);
        // A row in which nothing counts is no calm row.
        let blind = head.push(&mut state, &[f32::NAN], &mut z);
        assert!((blind - later).abs() < 1e-12);
    }

    #[test]
    fn one_missing_channel_of_two_decays_and_rows_without_any_say_nothing_about_what_is_usual() {
        let (head, _) = Head::fit(&[1.0; 80], 2, [3.0, 3.0], 0.75, &[]);
        let mut state = HeadState::new(2);
        let mut z = [0.0; 2];
        let first = head.push(&mut state, &[8.0, 0.0], &mut z);
        let later = head.push(&mut state, &[f32::NAN, 0.0], &mut z);
        assert!((later / first - 0.5_f64.powf(1.0 / 3.0)).abs() < 1e-9);

        let rows = |blind: bool| -> Vec<f32> {
            (0..200_u8)
                .flat_map(|row| {
                    [if blind && row % 2 == 1 {
                        f32::NAN
                    } else {
                        f32::from(row / 2 % 7)
                    }; 2]
                })
                .collect()
        };
        let ((whole, _), (torn, scores)) = (
            Head::fit(&rows(false), 2, [3.0, 3.0], 0.75, &[]),
            Head::fit(&rows(true), 2, [3.0, 3.0], 0.75, &[]),
        );
        assert_eq!(scores.iter().filter(|score| score.is_nan()).count(), 100);
        let levels = whole.level.iter().zip(torn.level);
        levels.for_each(|(whole, torn)| assert!((torn / whole - 1.0).abs() < 0.2, "{torn} and {whole}"));
    }
}
