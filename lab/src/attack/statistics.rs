//! Mean and spread of rows, norms, and seeded noise.

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha20Rng;
use sha2::{Digest as _, Sha256};
use theriac_protocol::units::Round;

/// Mean and standard deviation of rows, coordinate by coordinate.
#[derive(Debug, Clone, PartialEq)]
pub struct Spread {
    /// Mean, `[d]`.
    pub mean: Vec<f32>,
    /// Sample standard deviation (divisor n − 1), `[d]`; 0 for a single row.
    pub deviation: Vec<f32>,
}

impl Spread {
    /// Of `[n, d]` rows; empty for none. Sums are `f64`.
    pub fn of(rows: &[Vec<f32>]) -> Self {
        let Some(first) = rows.first() else {
            return Self {
                mean: Vec::new(),
                deviation: Vec::new(),
            };
        };
        let count = rows.len() as f64;
        let (mut mean, mut deviation) = (Vec::new(), Vec::new());
        for index in 0..first.len() {
            let column = || {
                rows.iter()
                    .map(|row| row.get(index).copied().map_or(0.0, f64::from))
            };
            let middle = column().sum::<f64>() / count;
            let variance =
                column().map(|value| (value - middle).powi(2)).sum::<f64>() / (count - 1.0).max(1.0);
            mean.push(narrow(middle));
            deviation.push(narrow(variance.sqrt()));
        }
        Self { mean, deviation }
    }
}

/// Euclidean norm.
pub fn norm(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
}

/// Squared Euclidean distance.
pub fn distance_squared(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
}

/// `base + step · direction`.
pub fn moved(base: &[f32], step: f64, direction: &[f32]) -> Vec<f32> {
    base.iter()
        .zip(direction)
        .map(|(base, direction)| narrow(f64::from(*base) + step * f64::from(*direction)))
        .collect()
}

/// Rounds to `f32`.
#[expect(clippy::cast_possible_truncation, reason = "the one rounding")]
pub fn narrow(value: f64) -> f32 {
    value as f32
}

/// Standard normal numbers from a seed, a round and a place.
#[derive(Debug)]
pub struct Gaussian {
    rng: ChaCha20Rng,
    spare: Option<f32>,
}

impl Gaussian {
    /// The stream of one site in one round.
    pub fn new(seed: u64, round: Round, place: usize) -> Self {
        let hash = Sha256::new()
            .chain_update(seed.to_le_bytes())
            .chain_update(round.0.to_le_bytes())
            .chain_update((place as u64).to_le_bytes())
            .finalize();
        Self {
            rng: ChaCha20Rng::from_seed(hash.into()),
            spare: None,
        }
    }

    /// The next number (Box and Muller 1958).
    pub fn draw(&mut self) -> f32 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let (u, v): (f64, f64) = (1.0 - self.rng.random::<f64>(), self.rng.random());
        let (radius, angle) = ((-2.0 * u.ln()).sqrt(), std::f64::consts::TAU * v);
        self.spare = Some(narrow(radius * angle.sin()));
        narrow(radius * angle.cos())
    }
}
