//! Full-batch gradient descent of the full linear model: what a site releases in each round, and what the centre makes of it.
//!
//! With `a_t` all lags of all channels and 1, `x_t` the row itself, a block `b` of rows has the gradient of half its squared loss,
//!
//! ```text
//! site     g_b = S A_bᵀ (A_b W − X_b)          one vector of (5C + 1)·C numbers for each block, clipped and noised by theriac-privacy
//! centre   u   = rule(Σ_b clip(g_b) + noise) / (blocks · rows of a block)
//!          M ← 0.8 M − rate · S u,  W ← W + M   momentum at the centre (`FedAvgM`: Hsu, Qi and Brown 2019, with one full-batch local step)
//! released = mean of the last ten W            (Polyak and Juditsky 1992)
//! ```
//!
//! **Whitening.** Lags of one channel resemble each other, so plain gradients point almost all one way. `S = K^{−1/2} ⊗ I`, with the public
//! constant `K_ij = 0.8^|lag_i − lag_j|` (1 for the constant), undoes that: clipping and noise live in coordinates in which a slow series has a
//! round loss. It depends on no data, and both sides know it.
//!
//! **Rows** are those of [`moments`](crate::moments): publicly scaled, then centred and scaled inside their block, so that what a block
//! adds depends on that block alone. Nothing in this module is private by itself.

mod local;

use nalgebra::{DMatrix, SMatrix};

use crate::linear::{FullWeights, full_values};
use crate::moments::{SCALE_MIN, channels_of};
use crate::normalise::{PUBLIC_CLIP, narrow};
use crate::{LAG_COUNT, LAG_MAX, LAGS};

pub use self::local::LocalDescent;

/// Rounds of one job: what the noise is worked out for.
pub const JOB_ROUNDS: u32 = 20;

/// Clipping norm C of one block's gradient for each of its rows after the first ten: 200 at 60 rows.
pub const CLIP_NORM_PER_ROW: f64 = 4.0;

/// Clipping norm C of one block of [`BLOCK_ROWS`](crate::moments::BLOCK_ROWS) rows.
pub const GRADIENT_CLIP_NORM: f64 = 200.0;

/// Share of the last move that is added to the next.
pub const MOMENTUM: f64 = 0.8;

/// Length of a step.
pub const RATE: f64 = 0.03;

/// Noise multiplier up to which a step has its full length; beyond, it falls as its inverse.
const RATE_NOISE: f64 = 10.15;

/// Iterates in the released mean.
const AVERAGED: u32 = 10;

/// Correlation that is taken for granted between two rows that are one apart.
const CORRELATION: f64 = 0.8;

type Mix = SMatrix<f64, LAG_COUNT, LAG_COUNT>;

/// The public change of coordinates.
#[derive(Debug, Clone)]
pub struct Whitening {
    /// `K^{−1/2}`.
    shrink: [[f32; LAG_COUNT]; LAG_COUNT],
    /// `K^{1/2}`.
    stretch: [[f32; LAG_COUNT]; LAG_COUNT],
}

impl Default for Whitening {
    fn default() -> Self {
        Self::new()
    }
}

impl Whitening {
    /// The one of [`crate::LAGS`].
    pub fn new() -> Self {
        let distance = |i: usize, j: usize| LAGS[i].abs_diff(LAGS[j]) as f64;
        let eigen = Mix::from_fn(|i, j| CORRELATION.powf(distance(i, j))).symmetric_eigen();
        let power = |exponent: f64| {
            let scaled = Mix::from_diagonal(&eigen.eigenvalues.map(|value| value.powf(exponent)));
            let mixed = eigen.eigenvectors * scaled * eigen.eigenvectors.transpose();
            std::array::from_fn(|i| std::array::from_fn(|j| narrow(mixed[(i, j)])))
        };
        Self {
            shrink: power(-0.5),
            stretch: power(0.5),
        }
    }

    /// `S g`: weights or gradients `[5C + 1, C]` out of whitened coordinates, or gradients into them.
    ///
    /// # Panics
    /// When the length is not `(5C + 1)·C`.
    pub fn shrink(&self, values: &[f32], channels: usize) -> Vec<f32> {
        mix(&self.shrink, values, channels)
    }

    /// `S⁻¹ W`: weights `[5C + 1, C]` into whitened coordinates.
    ///
    /// # Panics
    /// When the length is not `(5C + 1)·C`.
    pub fn stretch(&self, values: &[f32], channels: usize) -> Vec<f32> {
        mix(&self.stretch, values, channels)
    }
}

fn mix(by: &[[f32; LAG_COUNT]; LAG_COUNT], values: &[f32], channels: usize) -> Vec<f32> {
    assert_eq!(values.len(), full_values(channels), "weights of all lags");
    let part = channels * channels;
    let mut mixed = vec![0.0; values.len()];
    for (to, row) in by.iter().enumerate() {
        for (from, factor) in row.iter().enumerate() {
            let source = &values[from * part..][..part];
            let target = &mut mixed[to * part..][..part];
            target.iter_mut().zip(source).for_each(|(t, s)| *t += factor * s);
        }
    }
    mixed[LAG_COUNT * part..].copy_from_slice(&values[LAG_COUNT * part..]);
    mixed
}

/// Weights at which gradients are taken, ready for many blocks.
#[derive(Debug, Clone)]
pub struct GradientPoint {
    channels: usize,
    whitening: Whitening,
    /// `S⁻¹ W`, `[C, 5C + 1]`.
    weights: DMatrix<f32>,
}

impl GradientPoint {
    /// Gradients will be taken at these weights.
    pub fn new(weights: &FullWeights) -> Self {
        let (channels, whitening) = (weights.channels(), Whitening::new());
        let stretched = whitening.stretch(weights.values(), channels);
        let size = channels * LAG_COUNT + 1;
        Self {
            channels,
            weights: DMatrix::from_vec(channels, size, stretched),
            whitening,
        }
    }

    /// The whitened gradient `S Aᵀ(A W − X)` of one block, `[5C + 1, C]` row-major, a sum over its rows. All zero for a block of ten rows or
    /// fewer.
    ///
    /// # Panics
    /// When the block has other channels.
    pub fn gradient(&self, block: &BlockRows) -> Vec<f32> {
        let channels = self.channels;
        let rows = block.regression_rows();
        let size = channels * LAG_COUNT + 1;
        if rows == 0 {
            return vec![0.0; full_values(channels)];
        }
        assert_eq!(
            block.channels, channels,
            "block and weights have the same channels"
        );
        let design = block.design(&self.whitening);
        let mut residual = DMatrix::<f32>::zeros(channels, rows);
        residual.gemm(1.0, &self.weights, &design, 0.0);
        for (row, mut column) in residual.column_iter_mut().enumerate() {
            let place = (row + LAG_MAX) * channels;
            for (channel, residual) in column.iter_mut().enumerate() {
                *residual = if block.missing.get(place + channel).copied().unwrap_or(false) {
                    0.0
                } else {
                    *residual - block.values[place + channel]
                };
            }
        }
        let mut gradient = DMatrix::<f32>::zeros(channels, size);
        gradient.gemm(1.0, &residual, &design.transpose(), 0.0);
        gradient.as_slice().to_vec()
    }
}

/// The rows of one block, scaled inside it.
#[derive(Debug, Clone)]
pub struct BlockRows {
    channels: usize,
    /// `[time, channel]`, 0 where missing.
    values: Vec<f32>,
    /// Whether a value is missing; empty when none is.
    missing: Vec<bool>,
}

impl BlockRows {
    /// Of `rows` publicly scaled rows `[time, channel]`. As in [`moments::block`](crate::moments::block), every channel is centred on the mean
    /// of its first ten rows, divided by its root mean square distance from it (at least 0.25), and bounded by ±8. A lag that is missing counts
    /// as the centre; a missing target adds nothing.
    ///
    /// # Panics
    /// When `values` are not `rows` whole rows.
    pub fn new(values: &[f32], rows: usize) -> Self {
        let channels = channels_of(values, rows);
        let mut scaled = vec![0.0; values.len()];
        let mut missing = Vec::new();
        for channel in 0..channels {
            let column = || values.iter().skip(channel).step_by(channels);
            let mean = |values: &mut dyn Iterator<Item = f64>| {
                let (count, sum) = values.fold((0.0_f64, 0.0), |(n, sum), v| (n + 1.0, sum + v));
                (count > 0.0).then(|| sum / count)
            };
            let there = |v: &&f32| v.is_finite();
            let first = &mut column().take(LAG_MAX).filter(there).map(|v| f64::from(*v));
            let centre = mean(first);
            let squares = &mut column()
                .filter(there)
                .map(|v| (f64::from(*v) - centre.unwrap_or(0.0)).powi(2));
            let scale = mean(squares).unwrap_or(0.0).sqrt().max(SCALE_MIN);
            let bound = f64::from(PUBLIC_CLIP);
            for (row, value) in column().enumerate() {
                let place = row * channels + channel;
                if let Some(centre) = centre.filter(|_| value.is_finite()) {
                    scaled[place] = narrow(((f64::from(*value) - centre) / scale).clamp(-bound, bound));
                } else {
                    missing.resize(values.len(), false);
                    missing[place] = true;
                }
            }
        }
        Self {
            channels,
            values: scaled,
            missing,
        }
    }

    /// Whitened lags and 1 of every row whose lags lie inside the block, `[5C + 1, rows]`.
    fn design(&self, whitening: &Whitening) -> DMatrix<f32> {
        let (channels, size) = (self.channels, self.channels * LAG_COUNT + 1);
        let mut design = DMatrix::<f32>::zeros(size, self.regression_rows());
        for (row, mut column) in design.column_iter_mut().enumerate() {
            let column = column.as_mut_slice();
            for (to, factors) in whitening.shrink.iter().enumerate() {
                let target = &mut column[to * channels..][..channels];
                for (lag, factor) in LAGS.iter().zip(factors) {
                    let source = self.row(row + LAG_MAX - lag);
                    target.iter_mut().zip(source).for_each(|(t, s)| *t += factor * s);
                }
            }
            column[size - 1] = 1.0;
        }
        design
    }

    /// Rows whose lags lie inside the block.
    fn regression_rows(&self) -> usize {
        let rows = self.values.len().checked_div(self.channels).unwrap_or(0);
        rows.saturating_sub(LAG_MAX)
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.channels..][..self.channels]
    }
}

/// Length of a step under this noise multiplier of one round: [`RATE`], and less beyond about 10, as its inverse.
pub fn step_length(sigma: f64) -> f64 {
    RATE * (RATE_NOISE / sigma).min(1.0)
}

/// Where the descent stands: post-processing of what was released, so all of it is public.
#[derive(Debug, Clone, PartialEq)]
pub struct Descent {
    /// The weights that the next round's gradients are taken at.
    pub iterate: FullWeights,
    /// The last move, `[5C + 1, C]`.
    pub velocity: Vec<f32>,
    /// The mean of the last ten iterates (fewer at first): what edges use.
    pub average: FullWeights,
    /// Steps made.
    pub steps: u32,
}

impl Descent {
    /// Before the first step.
    pub fn begin(weights: FullWeights) -> Self {
        Self {
            velocity: vec![0.0; weights.values().len()],
            average: weights.clone(),
            iterate: weights,
            steps: 0,
        }
    }

    /// The next one. `sums` is the rule's result over the sites' noised sums of whitened block gradients, `[5C + 1, C]`; `blocks` and `rows`
    /// are the public bounds that it is divided by; `sigma` is the noise multiplier of one round (0 without noise).
    ///
    /// The released mean begins anew after ten steps, so that at the 20th it holds exactly the last ten iterates; from then on it forgets
    /// with a time constant of ten steps.
    ///
    /// # Errors
    /// [`GlobalError`](crate::global::GlobalError) when `sums` have another length, or the step leads to a weight that is not finite.
    pub fn step(
        &self,
        sums: &[f32],
        blocks: u32,
        rows: u32,
        sigma: f64,
    ) -> Result<Self, crate::global::GlobalError> {
        self.step_with(sums, blocks, rows, step_length(sigma), MOMENTUM)
    }

    /// The same with another length of step and another momentum.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn step_with(
        &self,
        sums: &[f32],
        blocks: u32,
        rows: u32,
        rate: f64,
        momentum: f64,
    ) -> Result<Self, crate::global::GlobalError> {
        let channels = self.iterate.channels();
        crate::global::check(sums, channels, full_values(channels))?;
        let direction = Whitening::new().shrink(sums, channels);
        let parts = f64::from(blocks.max(1)) * (f64::from(rows) - LAG_MAX as f64).max(1.0);
        let (rate, momentum) = (narrow(rate / parts), narrow(momentum));
        let moved = self.velocity.iter().zip(&direction);
        let velocity: Vec<f32> = moved.map(|(v, u)| momentum * v - rate * u).collect();
        let steps = self.steps.saturating_add(1);
        let iterate: Vec<f32> = (self.iterate.values().iter().zip(&velocity))
            .map(|(w, v)| w + v)
            .collect();
        let share = 1.0 / steps.saturating_sub(AVERAGED).clamp(1, AVERAGED) as f32;
        let average = (self.average.values().iter().zip(&iterate))
            .map(|(mean, w)| mean + share * (w - mean))
            .collect();
        Ok(Self {
            iterate: FullWeights::new(channels, iterate)?,
            average: FullWeights::new(channels, average)?,
            velocity,
            steps,
        })
    }
}

#[cfg(test)]
mod tests;
