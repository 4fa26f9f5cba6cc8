//! False data: a site whose program is honest and whose rows are not.
//!
//! What is spoilt are the rows before clip and noise, so that what is released has the norm and the noise of an honest update.

use rand::seq::SliceRandom as _;
use rand::{SeedableRng as _, rngs::StdRng};
use theriac_model::moments::MOMENTS_PER_CHANNEL;
use theriac_model::series::Series;
use theriac_model::{LAG_COUNT, LAG_MAX};

use super::Kind;

/// What [`Kind::PoisonScale`] multiplies targets by.
pub const TARGET_FACTOR: f32 = 0.6;

/// What [`Kind::PoisonScaleMild`] multiplies targets by: the vet's bound on the same ratio in honest moments is 0.85.
pub const TARGET_FACTOR_MILD: f32 = 0.87;

/// Place of the five sums Σ p y among a channel's moments: behind the 15 of Σ p pᵀ.
const CROSS: std::ops::Range<usize> = 15..15 + LAG_COUNT;

/// Moments of one block (or one row) as a site has them that feeds false targets: every Σ p y is a multiple of what it was. Other kinds
/// leave them alone.
pub fn moments(kind: Kind, block: &mut [f32]) {
    let factor = match kind {
        Kind::PoisonNegate => -1.0,
        Kind::PoisonScale => TARGET_FACTOR,
        Kind::PoisonScaleMild => TARGET_FACTOR_MILD,
        _ => return,
    };
    for channel in block.chunks_exact_mut(MOMENTS_PER_CHANNEL) {
        channel[CROSS].iter_mut().for_each(|value| *value *= factor);
    }
}

/// The rows that a poisoned site learns from: in random order for [`Kind::PoisonShuffle`]. For moments the targets of the
/// other kinds are spoilt in [`moments`].
pub fn rows(kind: Kind, series: &Series, seed: u64) -> Series {
    let channels = series.channels();
    if kind != Kind::PoisonShuffle || channels == 0 {
        return series.clone();
    }
    let mut order: Vec<usize> = (0..series.rows()).collect();
    order.shuffle(&mut StdRng::seed_from_u64(seed));
    let values = order
        .into_iter()
        .flat_map(|row| {
            series.values()[row * channels..(row + 1) * channels]
                .iter()
                .copied()
        })
        .collect();
    Series::new(channels, values).unwrap_or_else(|_| series.clone())
}

/// The same for the weights of a network, whose targets are rows themselves: each row behind the lags is negated or made smaller
/// in every other row, so that what follows does not fit what went before.
pub fn targets(kind: Kind, series: &Series, seed: u64) -> Series {
    let factor = match kind {
        Kind::PoisonNegate => -1.0,
        Kind::PoisonScale => TARGET_FACTOR,
        Kind::PoisonScaleMild => TARGET_FACTOR_MILD,
        _ => return rows(kind, series, seed),
    };
    let channels = series.channels();
    let spoilt = series.values().iter().enumerate().map(|(index, value)| {
        let row = index.checked_div(channels).unwrap_or(0);
        if row >= LAG_MAX && row % 2 == 1 {
            value * factor
        } else {
            *value
        }
    });
    Series::new(channels, spoilt.collect()).unwrap_or_else(|_| series.clone())
}
