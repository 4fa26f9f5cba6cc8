//! As far from the honest mean as an honest update could be (Shejwalkar and Houmansadr, NDSS 2021).

use super::statistics::{Spread, distance_squared, moved, norm};

/// First step of the search, in units of the honest spread.
const START: f64 = 10.0;

/// The search ends when steps are this small.
const PRECISION: f64 = 1e-5;

/// The way that is gone from the honest mean. Sign and mean are as long as the honest standard deviations together, so that the
/// search does not depend on the unit of the values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// Against the standard deviation of every coordinate.
    Deviation,
    /// Against the sign of every coordinate.
    Sign,
    /// Against the mean.
    Mean,
}

impl Direction {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Deviation => "std",
            Self::Sign => "sign",
            Self::Mean => "unit",
        }
    }

    pub(super) fn phrase(self) -> &'static str {
        match self {
            Self::Deviation => "the standard deviations",
            Self::Sign => "the signs of the mean",
            Self::Mean => "the mean",
        }
    }

    /// `[d]`, of the norm of the honest standard deviations.
    pub fn of(self, honest: &Spread) -> Vec<f32> {
        let direction: Vec<f32> = match self {
            Self::Deviation => honest.deviation.iter().map(|v| -v).collect(),
            Self::Sign => honest
                .mean
                .iter()
                .map(|v| if *v == 0.0 { 0.0 } else { -v.signum() })
                .collect(),
            Self::Mean => honest.mean.iter().map(|v| -v).collect(),
        };
        let scale = norm(&honest.deviation) / norm(&direction).max(f64::MIN_POSITIVE);
        moved(&vec![0.0; direction.len()], scale, &direction)
    }
}

/// The honest mean moved until its largest distance to an honest row is the largest between two of them (their algorithm 1).
pub fn min_max(rows: &[Vec<f32>], honest: &Spread, along: Direction) -> Vec<f32> {
    let limit = pairs(rows).into_iter().flatten().fold(0.0, f64::max);
    farthest(honest, along, |row| {
        rows.iter()
            .map(|other| distance_squared(row, other))
            .fold(0.0, f64::max)
            <= limit
    })
}

/// The honest mean moved until the sum of its squared distances to honest rows is the largest that one of them has.
pub fn min_sum(rows: &[Vec<f32>], honest: &Spread, along: Direction) -> Vec<f32> {
    let limit = pairs(rows)
        .iter()
        .map(|row| row.iter().sum::<f64>())
        .fold(0.0, f64::max);
    farthest(honest, along, |row| {
        rows.iter().map(|other| distance_squared(row, other)).sum::<f64>() <= limit
    })
}

/// The mean plus the largest γ that `fits`: from 10, by half as much in each step (the authors' published code).
fn farthest(honest: &Spread, along: Direction, fits: impl Fn(&[f32]) -> bool) -> Vec<f32> {
    let direction = along.of(honest);
    let (mut gamma, mut step, mut found) = (START, START, 0.0);
    while step > PRECISION {
        step /= 2.0;
        if fits(&moved(&honest.mean, gamma, &direction)) {
            found = gamma;
            gamma += step;
        } else {
            gamma -= step;
        }
    }
    moved(&honest.mean, found, &direction)
}

/// Squared distances between all rows.
fn pairs(rows: &[Vec<f32>]) -> Vec<Vec<f64>> {
    rows.iter()
        .map(|a| rows.iter().map(|b| distance_squared(a, b)).collect())
        .collect()
}
