//! What the rule sees of a site: its update as it came, or the weighted mean of its last ones, a late one weighed by its age.
//!
//! Between the screens, which look at updates as they came, and the rule. Both are functions of what a site has released already, so they cost no privacy.
//!
//! - **Average** (Karimireddy, He and Jaggi 2021, arXiv 2012.10333, the momentum of workers, kept at the server): with u the update that the site had in the
//!   round k rounds of this lineage ago, m = Σ bᵏ u / Σ bᵏ, over the last [`SiteAverage::rounds`] rounds. The division takes the place of a slow start from
//!   zero. Independent noise of standard deviation s in each update is s·√(Σ b²ᵏ) / Σ bᵏ in their mean: for b = 0.9 a quarter of s after 22 rounds.
//! - **Staleness**: an update that was made for an earlier model is multiplied by 1/√(1 + age), with the age in models (the polynomial weight of Xie, Koyejo
//!   and Gupta 2019, arXiv 1903.03934, a = ½). Moments do not depend on the model, so their weight is 1. It is never above 1.

use serde::{Deserialize, Serialize};
use theriac_protocol::compress::{decode_range, encode_f32};
use theriac_protocol::message::{Encoding, UpdateKind};

use crate::robust::Row;

/// What is left of an update's weight when it falls out of the mean.
const WEIGHT_MIN: f64 = 0.1;
/// Most rounds in a mean.
const ROUNDS_MAX: u64 = 64;
/// Values that are decoded at once.
const CHUNK: usize = 4_096;

/// How much a round before counts in a site's mean: b, in thousandths, so that it has the same value in every record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SiteAverage(u16);

impl SiteAverage {
    /// Only the update at hand.
    pub const OFF: Self = Self(0);
    /// Largest b.
    pub const KEEP_MAX: f64 = 0.99;

    /// `keep` is b, 0 (off) to [`SiteAverage::KEEP_MAX`], rounded to thousandths; `None`: it is outside.
    pub fn new(keep: f64) -> Option<Self> {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "between 0 and 990"
        )]
        (0.0..=Self::KEEP_MAX)
            .contains(&keep)
            .then(|| Self((keep * 1_000.0).round() as u16))
    }

    /// b.
    pub fn keep(self) -> f64 {
        f64::from(self.0) / 1_000.0
    }

    /// Rounds in a mean, the one at hand among them: until bᵏ is below a tenth, at most 64. 1: off.
    pub fn rounds(self) -> u64 {
        let within = |rounds: &u64| self.weight(*rounds) >= WEIGHT_MIN;
        (1..ROUNDS_MAX).take_while(within).count() as u64 + 1
    }

    /// bᵏ for an update of `age` = k rounds ago, by multiplication: the same bits everywhere.
    pub fn weight(self, age: u64) -> f64 {
        (0..age.min(ROUNDS_MAX)).fold(1.0, |weight, _| weight * self.keep())
    }
}

/// Weight of an update whose base is `age` models older than the round's.
pub fn staleness_weight(kind: UpdateKind, age: u32) -> f64 {
    match kind {
        UpdateKind::Moments => 1.0,
        UpdateKind::Delta | UpdateKind::Gradient => 1.0 / (1.0 + f64::from(age)).sqrt(),
    }
}

/// An update that was taken into a later round than it was made for.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Stale {
    /// The round that it was made for.
    pub of_round: u64,
    /// How many models its base is behind.
    pub age: u32,
    /// What it was multiplied by, above 0 and at most 1.
    pub weight: f64,
}

/// A weighted mean of a site's updates, `[d]`.
#[derive(Debug, Clone)]
pub struct Mean {
    sum: Vec<f64>,
    /// Σ bᵏ.
    weights: f64,
    /// Σ of squared factors.
    squares: f64,
    updates: u64,
}

impl Mean {
    /// Of nothing yet.
    pub fn new(dimension: usize) -> Self {
        Self {
            sum: vec![0.0; dimension],
            weights: 0.0,
            squares: 0.0,
            updates: 0,
        }
    }

    /// Adds `stale · update` with `weight`. Values beyond the mean's dimension are not read.
    pub fn add(&mut self, update: &Row, weight: f64, stale: f64) {
        let mut chunk = [0.0; CHUNK];
        for (index, sums) in self.sum.chunks_mut(CHUNK).enumerate() {
            let values = &mut chunk[..sums.len()];
            decode_range(update.encoding, &update.payload, index * CHUNK, values);
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum += weight * stale * f64::from(*value);
            }
        }
        self.weights += weight;
        self.squares += (weight * stale).powi(2);
        self.updates += 1;
    }

    /// Updates in it.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Standard deviation of its noise in that of one update, above 0 and at most 1.
    pub fn noise_ratio(&self) -> f64 {
        self.squares.sqrt() / self.weights
    }

    /// The mean as a row for a rule. Each value is rounded once, here.
    pub fn into_row(self) -> Row {
        let divisor = self.weights;
        #[expect(clippy::cast_possible_truncation, reason = "the one rounding of a mean")]
        let values: Vec<f32> = self.sum.iter().map(|sum| (sum / divisor) as f32).collect();
        Row {
            encoding: Encoding::F32,
            payload: encode_f32(&values).into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(values: &[f32]) -> Row {
        Row {
            encoding: Encoding::F32,
            payload: encode_f32(values).into(),
        }
    }

    fn values(row: &Row) -> Vec<f32> {
        let mut values = vec![0.0; row.payload.len() / 4];
        decode_range(row.encoding, &row.payload, 0, &mut values);
        values
    }

    #[test]
    fn mean_forgets_by_powers_and_is_as_long_as_its_updates() {
        let average = SiteAverage::new(0.5).unwrap();
        assert_eq!((average.rounds(), SiteAverage::OFF.rounds()), (4, 1));
        assert_eq!(SiteAverage::new(0.9).unwrap().rounds(), 22);
        assert_eq!(SiteAverage::new(0.99).unwrap().rounds(), 64);
        assert!(SiteAverage::new(0.995).is_none() && SiteAverage::new(f64::NAN).is_none());
        let mut mean = Mean::new(2);
        for (age, update) in [(0, [8.0, 1.0]), (1, [2.0, 1.0]), (3, [0.0, 1.0])] {
            mean.add(&row(&update), average.weight(age), 1.0);
        }
        assert_eq!(mean.updates(), 3);
        let ratio = (1.0_f64 + 0.25 + 1.0 / 64.0).sqrt() / 1.625;
        assert!((mean.noise_ratio() - ratio).abs() < 1e-12);
        assert_eq!(values(&mean.into_row()), [9.0 / 1.625, 1.0]);
    }

    #[test]
    fn stale_update_counts_less_and_never_more() {
        for (kind, expected) in [
            (UpdateKind::Moments, [1.0; 3]),
            (UpdateKind::Delta, [1.0, 0.5, 1.0 / 6.0_f64.sqrt()]),
            (UpdateKind::Gradient, [1.0, 0.5, 1.0 / 6.0_f64.sqrt()]),
        ] {
            for (age, expected) in [0, 3, 5].into_iter().zip(expected) {
                assert!(
                    (staleness_weight(kind, age) - expected).abs() < 1e-15,
                    "{kind:?} {age}"
                );
            }
        }
        let mut mean = Mean::new(2);
        mean.add(&row(&[4.0, -2.0]), 1.0, 0.5);
        assert!((mean.noise_ratio() - 0.5).abs() < 1e-15);
        assert_eq!(values(&mean.into_row()), [2.0, -1.0]);
    }

    #[test]
    fn noise_of_twenty_two_rounds_is_a_quarter() {
        let average = SiteAverage::new(0.9).unwrap();
        let mut mean = Mean::new(1);
        for age in 0..average.rounds() {
            mean.add(&row(&[1.0]), average.weight(age), 1.0);
        }
        assert!(
            (0.24..0.27).contains(&mean.noise_ratio()),
            "{}",
            mean.noise_ratio()
        );
    }
}
