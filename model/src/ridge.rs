//! Linear regression of a row on its lags, leaning on a prior. All sums and solves are `f64`.

use nalgebra::{Cholesky, DMatrix, DVector};

use crate::global::OwnLagWeights;
use crate::linear::FullWeights;
use crate::window::lags_of;
use crate::{LAG_COUNT, LAG_MAX, LAGS};

/// Ridge towards zero.
pub const LAMBDA_NO_PRIOR: f64 = 10.0;

/// Usual ridge towards own-lag weights learnt elsewhere, up to [`COLD_ROWS`] rows; [`personalise`](crate::personalise)
/// says when it is another.
pub const LAMBDA_PRIOR: f64 = 1000.0;

/// Up to this many rows a prior has its full weight; beyond, it fades as `COLD_ROWS / rows`.
pub const COLD_ROWS: f64 = 1000.0;

/// How cold a start of so many rows is: 1 up to [`COLD_ROWS`], then falling as `COLD_ROWS / rows`.
pub fn coldness(rows: u64) -> f64 {
    (COLD_ROWS / rows.max(1) as f64).min(1.0)
}

/// From so many channels on there is no regression on all lags: its normal equations grow with the square of the channels and
/// their solution with the cube. A fit on own lags grows with the channels alone.
pub const FULL_CHANNELS_MAX: usize = 128;

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
///
/// Above [`FULL_CHANNELS_MAX`] channels only what the own-lag fit needs is kept.
#[derive(Debug, Clone)]
pub struct NormalEquations {
    channels: usize,
    rows: u64,
    sums: Sums,
}

#[derive(Debug, Clone)]
enum Sums {
    Full {
        /// `[5C + 1, 5C + 1]`.
        gram: DMatrix<f64>,
        /// `[5C + 1, C]`.
        cross: DMatrix<f64>,
    },
    /// For each channel.
    Own(Vec<OwnSums>),
}

/// Size of one channel's own-lag fit.
const OWN: usize = LAG_COUNT + 1;

#[derive(Debug, Clone, Default)]
struct OwnSums {
    /// Upper triangle; the lower is not looked at.
    gram: [[f64; OWN]; OWN],
    cross: [f64; OWN],
}

impl NormalEquations {
    /// Of no rows.
    pub fn new(channels: usize) -> Self {
        if channels > FULL_CHANNELS_MAX {
            return Self::own_only(channels);
        }
        let size = channels * LAG_COUNT + 1;
        Self {
            channels,
            rows: 0,
            sums: Sums::Full {
                gram: DMatrix::zeros(size, size),
                cross: DMatrix::zeros(size, channels),
            },
        }
    }

    /// Of no rows, for [`solve_own`](Self::solve_own) alone: memory and time grow with the channels, not their square.
    pub fn own_only(channels: usize) -> Self {
        Self {
            channels,
            rows: 0,
            sums: Sums::Own(vec![OwnSums::default(); channels]),
        }
    }

    /// Adds the rows `range` of scaled rows `[time, channel]`; those without all lags are left out.
    pub fn add_rows(&mut self, scaled: &[f32], range: std::ops::Range<usize>) {
        let range = range.start.max(LAG_MAX)..range.end;
        self.rows += range.len() as u64;
        match &mut self.sums {
            Sums::Full { gram, cross } => add_full(gram, cross, self.channels, scaled, range),
            Sums::Own(sums) => add_own(sums, scaled, range),
        }
    }

    /// Adds the rows of `other`.
    ///
    /// # Panics
    /// When it has other channels, or was made for another kind of fit.
    pub fn add(&mut self, other: &Self) {
        assert_eq!(self.channels, other.channels, "both have the same channels");
        match (&mut self.sums, &other.sums) {
            (Sums::Full { gram, cross }, Sums::Full { gram: g, cross: c }) => {
                *gram += g;
                *cross += c;
            }
            (Sums::Own(sums), Sums::Own(others)) => {
                for (sum, other) in sums.iter_mut().zip(others) {
                    let entries = sum.gram.iter_mut().flatten().chain(&mut sum.cross);
                    let others = other.gram.iter().flatten().chain(&other.cross);
                    entries.zip(others).for_each(|(entry, other)| *entry += other);
                }
            }
            _ => panic!("equations of all lags and of own lags alone cannot be added"),
        }
        self.rows += other.rows;
    }

    /// One channel's part of `AᵀA` and `AᵀX`.
    fn own_sums(&self, channel: usize) -> OwnSums {
        match &self.sums {
            Sums::Own(sums) => sums[channel].clone(),
            Sums::Full { gram, cross } => {
                let index: [usize; OWN] = std::array::from_fn(|i| {
                    if i < LAG_COUNT {
                        i * self.channels + channel
                    } else {
                        self.channels * LAG_COUNT
                    }
                });
                OwnSums {
                    gram: index.map(|i| index.map(|j| gram[(i, j)])),
                    cross: index.map(|i| cross[(i, channel)]),
                }
            }
        }
    }

    /// Number of channels.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Number of rows added.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// The strength with which a fit of these rows leans on a prior unless its own tail says otherwise: λ = 1000 ·
    /// [`coldness`] but at least 10.
    pub fn usual_lambda(&self) -> f64 {
        (LAMBDA_PRIOR * coldness(self.rows)).max(LAMBDA_NO_PRIOR)
    }

    /// Proximal ridge of every channel on its own lags, `[channel, 5 lags + 1]`:
    /// `argmin ‖y − a w‖² + λ‖w_lags − prior‖² + 10 w_1²`, λ above 0; without a prior λ = 10 towards zero.
    ///
    /// # Errors
    /// [`Unsolvable`] when a value was not finite.
    pub fn solve_own(&self, lean: Lean<'_>) -> Result<Vec<f32>, Unsolvable> {
        self.own_with(|channel, i| lean.own(channel, i))
    }

    /// Proximal ridge of every channel on all lags, `[5C + 1, channel]`, row-major:
    /// `W = argmin ‖X − A W‖² + λ‖W − V‖² = (AᵀA + λI)⁻¹(AᵀX + λV)`, `V` = the prior's weights on all lags where it has some, else its own-lag
    /// weights and 0 elsewhere. The constant has λ = 10 towards zero: it depends on where the local scaler has its centre, so nobody
    /// else's is leant on. Empty when only own lags are kept.
    ///
    /// # Errors
    /// [`Unsolvable`] when a value was not finite.
    pub fn solve_full(&self, lean: Lean<'_>) -> Result<Vec<f32>, Unsolvable> {
        self.full_with(
            |row| lean.full_strength(row, self.channels),
            |row, channel| lean.full_target(row, channel, self.channels),
        )
    }

    /// Solves for own lags; `pull(channel, i)` gives strength and target of the ridge on one weight.
    fn own_with(&self, pull: impl Fn(usize, usize) -> (f64, f64)) -> Result<Vec<f32>, Unsolvable> {
        let mut weights = Vec::with_capacity(self.channels * OWN);
        for channel in 0..self.channels {
            let sums = self.own_sums(channel);
            let mut gram = DMatrix::from_fn(OWN, OWN, |i, j| sums.gram[i.min(j)][i.max(j)]);
            let mut cross = DVector::from_column_slice(&sums.cross);
            for i in 0..OWN {
                let (lambda, towards) = pull(channel, i);
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

    /// Solves for all lags, with the ridge's strength for each row of `W` and its target for each weight.
    fn full_with(
        &self,
        lambda: impl Fn(usize) -> f64,
        towards: impl Fn(usize, usize) -> f64,
    ) -> Result<Vec<f32>, Unsolvable> {
        let Sums::Full { gram, cross } = &self.sums else {
            return Ok(Vec::new());
        };
        let (mut gram, mut cross) = (gram.clone(), cross.clone());
        for row in 0..gram.nrows() {
            let lambda = lambda(row);
            gram[(row, row)] += lambda;
            for channel in 0..self.channels {
                cross[(row, channel)] += lambda * towards(row, channel);
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
}

fn add_full(
    gram: &mut DMatrix<f64>,
    cross: &mut DMatrix<f64>,
    channels: usize,
    scaled: &[f32],
    range: std::ops::Range<usize>,
) {
    let size = channels * LAG_COUNT + 1;
    let mut lags = vec![0.0; size - 1];
    let mut start = range.start;
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
        gram.gemm_tr(1.0, &design, &design, 1.0);
        cross.gemm_tr(1.0, &design, &target, 1.0);
        start += count;
    }
}

fn add_own(sums: &mut [OwnSums], scaled: &[f32], range: std::ops::Range<usize>) {
    let channels = sums.len();
    for row in range {
        for (channel, sum) in sums.iter_mut().enumerate() {
            let value = |back: usize| f64::from(scaled[(row - back) * channels + channel]);
            let mut a = [1.0; OWN];
            for (a, lag) in a.iter_mut().zip(LAGS) {
                *a = value(lag);
            }
            let target = value(0);
            for i in 0..OWN {
                for j in i..OWN {
                    sum.gram[i][j] += a[i] * a[j];
                }
                sum.cross[i] += a[i] * target;
            }
        }
    }
}

/// Weights learnt elsewhere that a fit leans on.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Priors<'a> {
    /// Own-lag weights.
    pub own: Option<&'a OwnLagWeights>,
    /// Weights on all lags; `None`: a fit on all lags leans on the own-lag ones too, with 0 for other channels.
    pub full: Option<&'a FullWeights>,
}

impl<'a> Priors<'a> {
    /// Own-lag weights alone, or nothing.
    pub fn own_lag(own: Option<&'a OwnLagWeights>) -> Self {
        Self { own, full: None }
    }

    /// Whether there is anything to lean on.
    pub fn is_some(&self) -> bool {
        self.own.is_some() || self.full.is_some()
    }
}

/// What a fit leans on, and how strongly.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lean<'a> {
    priors: Priors<'a>,
    lambda: f64,
}

impl<'a> Lean<'a> {
    /// On nothing: λ = 10 towards zero.
    pub const NOTHING: Self = Self {
        priors: Priors {
            own: None,
            full: None,
        },
        lambda: LAMBDA_NO_PRIOR,
    };

    /// On priors with strength `lambda`, above 0; on nothing where there are none.
    pub fn on(priors: Priors<'a>, lambda: f64) -> Self {
        if priors.is_some() {
            Self { priors, lambda }
        } else {
            Self::NOTHING
        }
    }

    /// The strength where there is a prior.
    pub fn lambda(self) -> Option<f64> {
        self.priors.is_some().then_some(self.lambda)
    }

    /// Strength of the ridge on one weight of the own-lag fit, and its target.
    fn own(self, channel: usize, lag: usize) -> (f64, f64) {
        if lag == LAG_COUNT {
            return (LAMBDA_NO_PRIOR, 0.0);
        }
        match self.priors.own {
            Some(own) => (self.lambda, f64::from(own.channel(channel)[lag])),
            None => (LAMBDA_NO_PRIOR, 0.0),
        }
    }

    /// Strength of the ridge on one row of the fit on all lags of `channels` channels.
    fn full_strength(self, row: usize, channels: usize) -> f64 {
        if row < channels * LAG_COUNT {
            self.lambda
        } else {
            LAMBDA_NO_PRIOR
        }
    }

    /// Its target for one weight.
    fn full_target(self, row: usize, channel: usize, channels: usize) -> f64 {
        if row == channels * LAG_COUNT {
            return 0.0;
        }
        match (self.priors.full, self.priors.own) {
            (Some(full), _) => f64::from(full.values()[row * channels + channel]),
            (None, Some(own)) if row % channels == channel => f64::from(own.channel(channel)[row / channels]),
            (None, _) => 0.0,
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
        let own = equations.solve_own(Lean::NOTHING).unwrap();
        assert!(
            (own[0] - 0.5).abs() < 0.05,
            "own lag 1 of channel 0 is {}",
            own[0]
        );
        let full = equations.solve_full(Lean::NOTHING).unwrap();
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
        let lean = Lean::on(Priors::own_lag(Some(&prior)), equations.usual_lambda());
        let own = equations.solve_own(lean).unwrap();
        assert_eq!(own[..5], prior.values()[..5]);
        assert_eq!(own[5].to_bits(), 0.0_f32.to_bits());
        let full = equations.solve_full(lean).unwrap();
        // Row = lag · 2 + channel, column = channel.
        assert!((full[(3 * 2 + 1) * 2 + 1] - prior.channel(1)[3]).abs() < 1e-6);
        assert!(full[(3 * 2) * 2 + 1].abs() < 1e-6);
        assert!(
            equations
                .solve_own(Lean::NOTHING)
                .unwrap()
                .iter()
                .all(|w| *w == 0.0)
        );
    }

    #[test]
    fn leaning_on_full_weights_is_leaning_on_own_ones_when_they_hold_no_others() {
        let equations = equations(&coupled(300));
        let own = OwnLagWeights::new(2, (0..10_u8).map(|i| f32::from(i) / 20.0).collect()).unwrap();
        let full = FullWeights::of_own_lag(&own);
        let on_full = |full| {
            let priors = Priors {
                own: None,
                full: Some(full),
            };
            equations.solve_full(Lean::on(priors, 1000.0)).unwrap()
        };
        let (a, b) = (
            equations
                .solve_full(Lean::on(Priors::own_lag(Some(&own)), 1000.0))
                .unwrap(),
            on_full(&full),
        );
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-6));
        let mut other = full.values().to_vec();
        other[1] += 0.5;
        let other = FullWeights::new(2, other).unwrap();
        let c = on_full(&other);
        assert!(
            c[1] - b[1] > 0.01,
            "the second channel from the first: {} {}",
            c[1],
            b[1]
        );
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
            .solve_full(Lean::NOTHING)
            .unwrap()
            .iter()
            .zip(whole.solve_full(Lean::NOTHING).unwrap())
        {
            assert!((a - b).abs() < 1e-6);
        }
    }

    #[test]
    fn values_that_are_not_finite_are_an_error() {
        let mut values = coupled(50);
        values[60] = f32::NAN;
        assert!(equations(&values).solve_full(Lean::NOTHING).is_err());
        assert!(equations(&values).solve_own(Lean::NOTHING).is_err());
    }

    #[test]
    fn proximal_solution_has_no_gradient() {
        let values = coupled(300);
        let equations = equations(&values);
        let prior = OwnLagWeights::new(2, (0..10_u8).map(|i| f32::from(i) / 10.0 - 0.5).collect()).unwrap();
        let weights = equations
            .solve_full(Lean::on(Priors::own_lag(Some(&prior)), 100.0))
            .unwrap();
        // Half the gradient of ‖X − A W‖² + λ‖W − V‖²: AᵀA W − AᵀX + λ(W − V), summed row by row from the definition.
        let mut gradient = [0.0_f64; 22];
        for (index, gradient) in gradient.iter_mut().enumerate() {
            let (row, channel) = (index / 2, index % 2);
            let (lambda, towards) = match row {
                10 => (LAMBDA_NO_PRIOR, 0.0),
                row if row % 2 == channel => (100.0, prior.channel(channel)[row / 2]),
                _ => (100.0, 0.0),
            };
            *gradient = lambda * f64::from(weights[index] - towards);
        }
        for t in LAG_MAX..300 {
            let mut a = [1.0_f32; 11];
            lags_of(&values, 2, t, &mut a[..10]);
            for channel in 0..2 {
                let forecast: f64 = (0..11)
                    .map(|i| f64::from(a[i]) * f64::from(weights[i * 2 + channel]))
                    .sum();
                for i in 0..11 {
                    let error = forecast - f64::from(values[t * 2 + channel]);
                    gradient[i * 2 + channel] += f64::from(a[i]) * error;
                }
            }
        }
        assert!(gradient.iter().all(|g| g.abs() < 0.05), "{gradient:?}");
    }

    #[test]
    fn stronger_pull_is_nearer_to_the_foreign_weights() {
        let equations = equations(&coupled(300));
        let prior = OwnLagWeights::new(2, vec![0.9; 10]).unwrap();
        let distance = |lambda| {
            let own = equations
                .solve_own(Lean::on(Priors::own_lag(Some(&prior)), lambda))
                .unwrap();
            let lags = own.iter().enumerate().filter(|(i, _)| i % 6 < LAG_COUNT);
            lags.map(|(_, w)| f64::from(w - 0.9).powi(2)).sum::<f64>()
        };
        let distances = [10.0, 100.0, 1e3, 1e4, 1e6].map(distance);
        assert!(distances.is_sorted_by(|a, b| a > b), "{distances:?}");
        assert!(distances[4] < 1e-3, "{distances:?}");
        let nothing = equations.solve_own(Lean::NOTHING).unwrap();
        assert_eq!(
            equations.solve_own(Lean::on(Priors::default(), 300.0)).unwrap(),
            nothing
        );
    }

    #[test]
    fn own_lags_alone_give_the_own_lag_fit_and_nothing_else() {
        let values = coupled(500);
        let whole = equations(&values);
        let mut alone = NormalEquations::own_only(2);
        alone.add_rows(&values, 0..300);
        let mut rest = NormalEquations::own_only(2);
        rest.add_rows(&values, 300..500);
        alone.add(&rest);
        assert_eq!(alone.rows(), whole.rows());
        let (a, b) = (
            alone.solve_own(Lean::NOTHING).unwrap(),
            whole.solve_own(Lean::NOTHING).unwrap(),
        );
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-6), "{a:?} {b:?}");
        assert!(alone.solve_full(Lean::NOTHING).unwrap().is_empty());
        let many = NormalEquations::new(FULL_CHANNELS_MAX + 1);
        assert!(many.solve_full(Lean::NOTHING).unwrap().is_empty());
    }
}
