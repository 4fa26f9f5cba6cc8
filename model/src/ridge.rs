//! Linear regression of a row on its lags, leaning on a prior. All sums and solves are `f64`.

use nalgebra::{Cholesky, DMatrix, DVector};

use crate::forecaster::{forecast_full, forecast_own};
use crate::global::OwnLagWeights;
use crate::window::lags_of;
use crate::{LAG_COUNT, LAG_MAX, LAGS};

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

    /// Every channel from its own lags: `[channel, 5 lags + 1]`,
    /// `argmin ‖y − a w‖² + λ‖w_lags − prior‖² + 10 w_1²`, λ = 1000 · [`coldness`] but at least 10; without a prior
    /// λ = 10 towards zero.
    ///
    /// # Errors
    /// [`Unsolvable`] when a value was not finite.
    pub fn solve_own(&self, prior: Option<&OwnLagWeights>) -> Result<Vec<f32>, Unsolvable> {
        self.own_with(|channel, i| self.pull(prior.filter(|_| i < LAG_COUNT), channel, i))
    }

    /// Every channel from all lags: `[5C + 1, channel]`, row-major, pulled towards the own-lag prior as in
    /// [`solve_own`](Self::solve_own), other lags towards zero. Empty when only own lags are kept.
    ///
    /// # Errors
    /// [`Unsolvable`] when a value was not finite.
    pub fn solve_full(&self, prior: Option<&OwnLagWeights>) -> Result<Vec<f32>, Unsolvable> {
        let constant = self.channels * LAG_COUNT;
        let prior_of = |row: usize| prior.filter(|_| row < constant);
        self.full_with(
            |row| self.pull(prior_of(row), 0, 0).0,
            |row, channel| match prior_of(row) {
                Some(_) if row % self.channels == channel => self.pull(prior, channel, row / self.channels).1,
                _ => 0.0,
            },
        )
    }

    /// Proximal ridge of every channel on its own lags, `argmin ‖y − a w‖² + λ‖w − towards‖²`, intercept included;
    /// `towards` and the result are `[channel, 5 lags + 1]`.
    ///
    /// # Errors
    /// [`Unsolvable`] when a value was not finite.
    ///
    /// # Panics
    /// When `towards` has another length.
    pub fn solve_own_towards(&self, towards: &[f32], pull: Pull) -> Result<Vec<f32>, Unsolvable> {
        assert_eq!(
            towards.len(),
            self.channels * (LAG_COUNT + 1),
            "own-lag weights with intercepts"
        );
        let Some(lambda) = pull.lambda() else {
            return Ok(towards.to_vec());
        };
        let share = pull.share();
        self.own_with(|channel, i| {
            let towards = towards[channel * (LAG_COUNT + 1) + i];
            (lambda, share * f64::from(towards))
        })
    }

    /// Proximal ridge on all lags, `W = argmin ‖X − A W‖² + λ‖W − towards‖² = (AᵀA + λI)⁻¹(AᵀX + λ towards)`;
    /// `towards` and the result are `[5C + 1, channel]`, row-major. Empty when only own lags are kept.
    ///
    /// # Errors
    /// [`Unsolvable`] when a value was not finite.
    ///
    /// # Panics
    /// When `towards` has another length.
    pub fn solve_full_towards(&self, towards: &[f32], pull: Pull) -> Result<Vec<f32>, Unsolvable> {
        let size = self.channels * LAG_COUNT + 1;
        assert_eq!(towards.len(), size * self.channels, "full weights");
        let Some(lambda) = pull.lambda() else {
            return Ok(towards.to_vec());
        };
        let share = pull.share();
        self.full_with(
            |_| lambda,
            |row, channel| share * f64::from(towards[row * self.channels + channel]),
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

/// How strongly a fit leans on weights that were learnt elsewhere.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pull {
    /// Not at all: λ = 10 towards zero.
    LocalOnly,
    /// λ towards them, above 0.
    Lambda(f64),
    /// They are taken as they are: λ → ∞.
    AsIs,
}

/// What [`personalise_own`] and [`personalise_full`] try, from the weakest to the strongest.
pub const PULLS: [Pull; 9] = [
    Pull::LocalOnly,
    Pull::Lambda(30.0),
    Pull::Lambda(100.0),
    Pull::Lambda(300.0),
    Pull::Lambda(1e3),
    Pull::Lambda(3e3),
    Pull::Lambda(1e4),
    Pull::Lambda(3e4),
    Pull::AsIs,
];

impl Pull {
    /// Strength of the ridge; `None` when nothing is fitted.
    fn lambda(self) -> Option<f64> {
        match self {
            Self::LocalOnly => Some(LAMBDA_NO_PRIOR),
            Self::Lambda(lambda) => Some(lambda),
            Self::AsIs => None,
        }
    }

    /// Share of the foreign weights in the ridge's target.
    fn share(self) -> f64 {
        f64::from(u8::from(self != Self::LocalOnly))
    }
}

/// Weights fitted to one site, and how they were chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Personalised {
    /// In the form of the weights that were leant on.
    pub weights: Vec<f32>,
    /// The pull that did best on the tail.
    pub pull: Pull,
    /// Mean absolute residual on the tail of each of [`PULLS`], in scaled units; 0 where there was no tail.
    pub tail_errors: [f64; PULLS.len()],
}

/// Proximal ridge of every channel on its own lags, towards weights `[channel, 5 lags + 1]` learnt elsewhere.
///
/// Each of [`PULLS`] is fitted on the first four fifths of `scaled` (`[time, channel]`, no NaN, oldest first) and judged on
/// the last fifth, which no fit saw and which needs no labels; the best one, at a tie the weaker, is fitted again on
/// all rows. Without a single row to judge on, the weights stay as they are. Below about 120 rows the tail is too short to choose
/// well: there a fixed [`LAMBDA_PRIOR`] is better.
///
/// # Errors
/// [`Unsolvable`] when a value was not finite.
///
/// # Panics
/// When `towards` has another length.
pub fn personalise_own(scaled: &[f32], channels: usize, towards: &[f32]) -> Result<Personalised, Unsolvable> {
    choose(
        scaled,
        channels,
        |equations, pull| equations.solve_own_towards(towards, pull),
        |weights, lags, out| forecast_own(weights, channels, lags, out),
    )
}

/// As [`personalise_own`], for weights `[5C + 1, channel]` on all lags.
///
/// # Errors
/// [`Unsolvable`] when a value was not finite.
///
/// # Panics
/// When `towards` has another length, or there are more than [`FULL_CHANNELS_MAX`] channels.
pub fn personalise_full(
    scaled: &[f32],
    channels: usize,
    towards: &[f32],
) -> Result<Personalised, Unsolvable> {
    assert!(channels <= FULL_CHANNELS_MAX, "a regression on all lags");
    choose(
        scaled,
        channels,
        |equations, pull| equations.solve_full_towards(towards, pull),
        |weights, lags, out| forecast_full(weights, channels, lags, out),
    )
}

fn choose(
    scaled: &[f32],
    channels: usize,
    solve: impl Fn(&NormalEquations, Pull) -> Result<Vec<f32>, Unsolvable>,
    forecast: impl Fn(&[f32], &[f32], &mut [f32]),
) -> Result<Personalised, Unsolvable> {
    let rows = scaled.len() / channels.max(1);
    let split = rows - rows / 5;
    let mut equations = NormalEquations::new(channels);
    equations.add_rows(scaled, 0..split);
    let mut tail_errors = [0.0; PULLS.len()];
    for (error, pull) in tail_errors.iter_mut().zip(PULLS) {
        let weights = solve(&equations, pull)?;
        *error = mean_residual(scaled, channels, split, |lags, out| {
            forecast(&weights, lags, out);
        });
    }
    equations.add_rows(scaled, split..rows);
    let pull = if split.max(LAG_MAX) < rows {
        let mut best = 0;
        for index in 1..PULLS.len() {
            if tail_errors[index] < tail_errors[best] {
                best = index;
            }
        }
        PULLS[best]
    } else {
        Pull::AsIs
    };
    Ok(Personalised {
        weights: solve(&equations, pull)?,
        pull,
        tail_errors,
    })
}

/// Mean absolute residual of the rows from `start`; 0 for none.
fn mean_residual(
    scaled: &[f32],
    channels: usize,
    start: usize,
    forecast: impl Fn(&[f32], &mut [f32]),
) -> f64 {
    let rows = scaled.len() / channels.max(1);
    let (mut lags, mut row) = (vec![0.0; channels * LAG_COUNT], vec![0.0; channels]);
    let (mut sum, mut count) = (0.0, 0.0);
    for t in start.max(LAG_MAX)..rows {
        lags_of(scaled, channels, t, &mut lags);
        forecast(&lags, &mut row);
        for (value, forecast) in scaled[t * channels..].iter().zip(&row) {
            sum += f64::from((value - forecast).abs());
            count += 1.0;
        }
    }
    if count > 0.0 { sum / count } else { 0.0 }
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

    /// `[channel, 6]` own-lag weights of `coupled`: the second channel is the first, a row later.
    const TRUE_OWN: [f32; 12] = [0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0];

    #[test]
    fn proximal_solution_has_no_gradient() {
        let values = coupled(300);
        let equations = equations(&values);
        let towards: Vec<f32> = (0..22_u8).map(|i| f32::from(i) / 22.0 - 0.5).collect();
        let weights = equations
            .solve_full_towards(&towards, Pull::Lambda(100.0))
            .unwrap();
        // Half the gradient of ‖X − A W‖² + λ‖W − V‖²: AᵀA W − AᵀX + λ(W − V), summed row by row from the definition.
        let mut gradient: Vec<f64> = weights
            .iter()
            .zip(&towards)
            .map(|(w, v)| 100.0 * f64::from(w - v))
            .collect();
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
        let towards = [0.9_f32; 12];
        let distance = |pull| {
            let own = equations.solve_own_towards(&towards, pull).unwrap();
            own.iter()
                .zip(&towards)
                .map(|(w, v)| f64::from(w - v).powi(2))
                .sum::<f64>()
        };
        let distances: Vec<f64> = PULLS.into_iter().map(distance).collect();
        assert!(distances.is_sorted_by(|a, b| a > b), "{distances:?}");
        assert!(distances[PULLS.len() - 1].abs() < 1e-12);
        assert_eq!(
            equations.solve_own_towards(&towards, Pull::LocalOnly).unwrap(),
            equations.solve_own(None).unwrap()
        );
        let full = equations.solve_full_towards(&[0.9; 22], Pull::LocalOnly).unwrap();
        assert_eq!(full, equations.solve_full(None).unwrap());
    }

    #[test]
    fn good_foreign_weights_are_leant_on_and_bad_ones_are_not() {
        // Idle for four fifths, then as elsewhere: what the site itself saw teaches nothing.
        let mut idle = vec![0.0; 1600];
        idle.extend(coupled(200));
        let good = personalise_own(&idle, 2, &TRUE_OWN).unwrap();
        assert_ne!(good.pull, Pull::LocalOnly, "{:?}", good.tail_errors);
        let many = coupled(3000);
        let bad = TRUE_OWN.map(|w| w - 2.0);
        let bad = personalise_own(&many, 2, &bad).unwrap();
        let chosen = PULLS.iter().position(|pull| *pull == bad.pull).unwrap();
        assert!(chosen <= 3, "{:?} of {:?}", bad.pull, bad.tail_errors);
        assert!((bad.weights[0] - 0.5).abs() < 0.15, "{:?}", bad.weights);
        let mut best = 0.0;
        let full = personalise_full(&many, 2, &[5.0; 22]).unwrap();
        for (error, pull) in full.tail_errors.iter().zip(PULLS) {
            if pull == full.pull {
                best = *error;
            }
        }
        assert!(full.tail_errors.iter().all(|error| *error >= best));
    }

    #[test]
    fn without_a_tail_the_foreign_weights_stay() {
        for rows in [0, 1, 4, 10] {
            let values = &coupled(10)[..rows * 2];
            let kept = personalise_own(values, 2, &TRUE_OWN).unwrap();
            assert_eq!((kept.pull, &kept.weights[..]), (Pull::AsIs, &TRUE_OWN[..]));
        }
        let mut values = coupled(50);
        values[60] = f32::NAN;
        assert!(personalise_own(&values, 2, &TRUE_OWN).is_err());
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
        let (a, b) = (alone.solve_own(None).unwrap(), whole.solve_own(None).unwrap());
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-6), "{a:?} {b:?}");
        assert!(alone.solve_full(None).unwrap().is_empty());
        let many = NormalEquations::new(FULL_CHANNELS_MAX + 1);
        assert!(many.solve_full(None).unwrap().is_empty());
    }
}
