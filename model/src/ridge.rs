//! Linear regression of a row on its lags, leaning on a prior. All sums and solves are `f64`.

use nalgebra::{Cholesky, DMatrix, DVector};

use crate::global::OwnLagWeights;
use crate::window::lags_of;
use crate::{LAG_COUNT, LAG_MAX};

/// Ridge towards zero.
pub const LAMBDA_NO_PRIOR: f64 = 10.0;

/// Ridge towards own-lag weights learnt elsewhere, up to [`COLD_ROWS`] rows. Fixed: choosing it on the last few rows
/// loses at 120 rows.
pub const LAMBDA_PRIOR: f64 = 1000.0;

/// Up to this many rows a prior has its full weight; beyond, it fades as `COLD_ROWS / rows`.
pub const COLD_ROWS: f64 = 1000.0;

/// How cold a start of so many rows is: 1 up to [`COLD_ROWS`], then falling as `COLD_ROWS / rows`.
pub fn coldness(rows: u64) -> f64 {
    (COLD_ROWS / rows.max(1) as f64).min(1.0)
}

/// Rows multiplied at once, which bounds the memory of a fit.
const ROWS_AT_ONCE: usize = 256;

/// The normal equations could not be solved, which only values that are not finite can cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the normal equations of {rows} rows cannot be solved: a value is not finite")]
pub struct Unsolvable {
    /// Rows in them.
    pub rows: u64,
}

/// `AᵀA` and `AᵀX` of rows `a_t = [x_{t−1}, x_{t−2}, x_{t−3}, x_{t−5}, x_{t−10}, 1]` and targets `x_t`: all that a
/// linear fit needs to know of the rows. Adding two is fitting on both.
#[derive(Debug, Clone)]
pub struct NormalEquations {
    channels: usize,
    rows: u64,
    /// `[5C + 1, 5C + 1]`.
    gram: DMatrix<f64>,
    /// `[5C + 1, C]`.
    cross: DMatrix<f64>,
}

impl NormalEquations {
    /// Of no rows.
    pub fn new(channels: usize) -> Self {
        let size = channels * LAG_COUNT + 1;
        Self {
            channels,
            rows: 0,
            gram: DMatrix::zeros(size, size),
            cross: DMatrix::zeros(size, channels),
        }
    }

    /// Adds the rows `range` of scaled rows `[time, channel]`; those without all lags are left out.
    pub fn add_rows(&mut self, scaled: &[f32], range: std::ops::Range<usize>) {
        let (channels, size) = (self.channels, self.channels * LAG_COUNT + 1);
        let mut lags = vec![0.0; size - 1];
        let mut start = range.start.max(LAG_MAX);
        while start < range.end {
            let count = (range.end - start).min(ROWS_AT_ONCE);
            let mut design = DMatrix::from_element(count, size, 1.0);
            for row in 0..count {
                lags_of(scaled, channels, start + row, &mut lags);
                for (column, lag) in lags.iter().enumerate() {
                    design[(row, column)] = f64::from(*lag);
                }
            }
            let target = &scaled[start * channels..(start + count) * channels];
            let target = DMatrix::from_row_iterator(count, channels, target.iter().map(|v| f64::from(*v)));
            self.gram.gemm_tr(1.0, &design, &design, 1.0);
            self.cross.gemm_tr(1.0, &design, &target, 1.0);
            self.rows += count as u64;
            start += count;
        }
    }

    /// Adds the rows of `other`.
    ///
    /// # Panics
    /// When it has other channels.
    pub fn add(&mut self, other: &Self) {
        self.gram += &other.gram;
        self.cross += &other.cross;
        self.rows += other.rows;
    }

    /// Number of channels.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Number of rows added.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Every channel from its own lags: `[channel, 5 lags + 1]`,
    /// `argmin ‖y − a w‖² + λ‖w_lags − prior‖² + 10 w_1²`, λ = 1000 · [`coldness`] but at least 10; without a prior
    /// λ = 10 towards zero.
    ///
    /// # Errors
    /// [`Unsolvable`] when a value was not finite.
    pub fn solve_own(&self, prior: Option<&OwnLagWeights>) -> Result<Vec<f32>, Unsolvable> {
        let constant = self.channels * LAG_COUNT;
        let mut weights = Vec::with_capacity(self.channels * (LAG_COUNT + 1));
        for channel in 0..self.channels {
            let index: [usize; LAG_COUNT + 1] = std::array::from_fn(|i| {
                if i < LAG_COUNT {
                    i * self.channels + channel
                } else {
                    constant
                }
            });
            let mut gram = DMatrix::from_fn(index.len(), index.len(), |i, j| self.gram[(index[i], index[j])]);
            let mut cross = DVector::from_fn(index.len(), |i, _| self.cross[(index[i], channel)]);
            for i in 0..index.len() {
                let (lambda, towards) = self.pull(prior.filter(|_| i < LAG_COUNT), channel, i);
                gram[(i, i)] += lambda;
                cross[i] += lambda * towards;
            }
            let solution = Cholesky::new(gram)
                .ok_or(Unsolvable { rows: self.rows })?
                .solve(&cross);
            weights.extend(solution.iter().map(|w| crate::normalise::narrow(*w)));
        }
        Ok(weights)
    }

    /// Every channel from all lags: `[5C + 1, channel]`, row-major, pulled towards the own-lag prior as in
    /// [`solve_own`](Self::solve_own), other lags towards zero.
    ///
    /// # Errors
    /// [`Unsolvable`] when a value was not finite.
    pub fn solve_full(&self, prior: Option<&OwnLagWeights>) -> Result<Vec<f32>, Unsolvable> {
        let constant = self.channels * LAG_COUNT;
        let (mut gram, mut cross) = (self.gram.clone(), self.cross.clone());
        for row in 0..=constant {
            let prior = prior.filter(|_| row < constant);
            gram[(row, row)] += self.pull(prior, 0, 0).0;
            if row < constant {
                let (lag, channel) = (row / self.channels, row % self.channels);
                let (lambda, towards) = self.pull(prior, channel, lag);
                cross[(row, channel)] += lambda * towards;
            }
        }
        Cholesky::new(gram)
            .ok_or(Unsolvable { rows: self.rows })?
            .solve_mut(&mut cross);
        Ok(cross
            .transpose()
            .iter()
            .map(|w| crate::normalise::narrow(*w))
            .collect())
    }

    /// Strength and target of the ridge on one weight.
    fn pull(&self, prior: Option<&OwnLagWeights>, channel: usize, lag: usize) -> (f64, f64) {
        match prior {
            Some(prior) => {
                let lambda = (LAMBDA_PRIOR * coldness(self.rows)).max(LAMBDA_NO_PRIOR);
                (lambda, f64::from(prior.channel(channel)[lag]))
            }
            None => (LAMBDA_NO_PRIOR, 0.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two channels: the first halves its own last value, the second copies the first.
    fn coupled(rows: usize) -> Vec<f32> {
        let mut noise = 12345_u32;
        let mut values: Vec<f32> = vec![1.0, 0.0];
        for t in 1..rows {
            noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let shock = (noise >> 8) as f32 / 16_777_216.0 - 0.5;
            let first = 0.5 * values[2 * (t - 1)] + 10.0 * shock;
            let second = values[2 * (t - 1)];
            values.extend([first, second]);
        }
        values
    }

    fn equations(values: &[f32]) -> NormalEquations {
        let mut equations = NormalEquations::new(2);
        equations.add_rows(values, 0..values.len() / 2);
        equations
    }

    #[test]
    fn finds_the_coefficients_of_a_known_process() {
        let equations = equations(&coupled(4000));
        let own = equations.solve_own(None).unwrap();
        assert!(
            (own[0] - 0.5).abs() < 0.05,
            "own lag 1 of channel 0 is {}",
            own[0]
        );
        let full = equations.solve_full(None).unwrap();
        assert!(
            (full[1] - 1.0).abs() < 0.01,
            "channel 1 from lag 1 of channel 0 is {}",
            full[1]
        );
    }

    #[test]
    fn without_rows_the_prior_remains() {
        let equations = NormalEquations::new(2);
        let prior = OwnLagWeights::new(2, (0..10_u8).map(|i| f32::from(i) / 10.0).collect()).unwrap();
        let own = equations.solve_own(Some(&prior)).unwrap();
        assert_eq!(own[..5], prior.values()[..5]);
        assert_eq!(own[5].to_bits(), 0.0_f32.to_bits());
        let full = equations.solve_full(Some(&prior)).unwrap();
        // Row = lag · 2 + channel, column = channel.
        assert!((full[(3 * 2 + 1) * 2 + 1] - prior.channel(1)[3]).abs() < 1e-6);
        assert!(full[(3 * 2) * 2 + 1].abs() < 1e-6);
        assert!(equations.solve_own(None).unwrap().iter().all(|w| *w == 0.0));
    }

    #[test]
    fn fitting_in_parts_is_fitting_at_once() {
        let values = coupled(700);
        let whole = equations(&values);
        let mut parts = NormalEquations::new(2);
        parts.add_rows(&values, 0..400);
        let mut rest = NormalEquations::new(2);
        rest.add_rows(&values, 400..700);
        parts.add(&rest);
        assert_eq!(parts.rows(), whole.rows());
        for (a, b) in parts
            .solve_full(None)
            .unwrap()
            .iter()
            .zip(whole.solve_full(None).unwrap())
        {
            assert!((a - b).abs() < 1e-6);
        }
    }

    #[test]
    fn values_that_are_not_finite_are_an_error() {
        let mut values = coupled(50);
        values[60] = f32::NAN;
        assert!(equations(&values).solve_full(None).is_err());
        assert!(equations(&values).solve_own(None).is_err());
    }
}
