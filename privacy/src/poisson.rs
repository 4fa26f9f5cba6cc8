//! Which units take part in a step: one secret, secure coin for each (Poisson sampling).
//!
//! The accountant's amplification by sampling holds for exactly this: every unit enters a step with probability q, independently of all
//! others and of all other steps, and nobody outside of the site learns who came. The number of units in a step varies, and may be none; such a
//! step still adds noise and still moves the model. Shuffled epochs or batches of fixed size do not earn the same figure.

use crate::accountant::SamplingRate;
use crate::noise::{NoEntropy, SecureSource};

/// Draws the units of each step.
#[derive(Debug)]
pub struct PoissonSampler {
    /// ⌊q·2⁶⁴⌋: a coin shows heads when 64 random bits are below. Never more often than q.
    threshold: u128,
    source: SecureSource,
}

impl PoissonSampler {
    /// A sampler with a key of its own from the operating system.
    ///
    /// # Errors
    /// [`NoEntropy`]
    pub fn new(rate: SamplingRate) -> Result<Self, NoEntropy> {
        Ok(Self::with(rate, SecureSource::from_system()?))
    }

    fn with(rate: SamplingRate, source: SecureSource) -> Self {
        // 2⁶⁴ times a float is exact; the cut is towards zero.
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a rate lies in (0, 1]"
        )]
        let threshold = (rate.value() * 64.0_f64.exp2()) as u128;
        Self { threshold, source }
    }

    /// The indices, ascending, of those of `units` units that take part in the next step. May be empty.
    pub fn draw(&mut self, units: usize) -> Vec<usize> {
        (0..units)
            .filter(|_| u128::from(self.source.bits()) < self.threshold)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(rate: f64, seed: u64) -> PoissonSampler {
        PoissonSampler::with(SamplingRate::new(rate).unwrap(), SecureSource::seeded(seed))
    }

    #[test]
    fn every_unit_comes_as_often_as_the_rate_says_and_alone() {
        let mut sampler = sampler(0.1, 1);
        let (units, steps) = (50, 20_000);
        let mut counts = vec![0_u32; units];
        let mut together = 0_u32;
        for _ in 0..steps {
            let drawn = sampler.draw(units);
            for unit in &drawn {
                counts[*unit] += 1;
            }
            together += u32::from(drawn.contains(&3) && drawn.contains(&4));
        }
        // Standard deviation √(20 000 · .09) = 42; six of them. For the pair √(20 000 · .0099) = 14.
        assert!(counts.iter().all(|n| n.abs_diff(2000) < 255), "{counts:?}");
        assert!(together.abs_diff(200) < 85, "{together}");
    }

    #[test]
    fn empty_draws_happen_and_the_full_rate_takes_all() {
        let mut rare = sampler(0.01, 2);
        assert!((0..100).any(|_| rare.draw(5).is_empty()));
        assert_eq!(sampler(1.0, 3).draw(4), [0, 1, 2, 3]);
        assert!(sampler(f64::MIN_POSITIVE, 4).draw(1000).is_empty());
    }
}
