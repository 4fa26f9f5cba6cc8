//! Randomness that nobody can choose: `ChaCha20` with a key from the operating system.
//!
//! A release build has no way to seed it. Tests have, behind `cfg(test)`.

use rand::{RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha20Rng;

/// The operating system gave no randomness; nothing is released without.
#[derive(Debug, thiserror::Error)]
#[error("the operating system gave no randomness: {0}")]
pub struct NoEntropy(String);

/// A generator for one purpose. Noise, sampling coins and initial weights each take one of their own, with a key of its own.
pub struct SecureSource(ChaCha20Rng);

impl SecureSource {
    /// A generator with a fresh key.
    ///
    /// # Errors
    /// [`NoEntropy`]
    pub fn from_system() -> Result<Self, NoEntropy> {
        ChaCha20Rng::try_from_os_rng()
            .map(Self)
            .map_err(|error| NoEntropy(error.to_string()))
    }

    /// A generator that repeats itself.
    #[cfg(test)]
    pub(crate) fn seeded(seed: u64) -> Self {
        Self(ChaCha20Rng::seed_from_u64(seed))
    }

    /// 64 random bits.
    pub(crate) fn bits(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// A uniform whole number below `bound`, without bias; 0 when `bound` is 0.
    pub(crate) fn below(&mut self, bound: u128) -> u128 {
        let mask = match bound {
            0 | 1 => return 0,
            _ => u128::MAX >> (bound - 1).leading_zeros(),
        };
        loop {
            let high = if mask > u128::from(u64::MAX) {
                self.bits()
            } else {
                0
            };
            let drawn = (u128::from(high) << 64 | u128::from(self.bits())) & mask;
            if drawn < bound {
                return drawn;
            }
        }
    }
}

impl std::fmt::Debug for SecureSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Its state would tell the noise.
        f.write_str("SecureSource")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_sources_of_the_system_differ_and_show_no_state() {
        let (mut one, mut two) = (
            SecureSource::from_system().unwrap(),
            SecureSource::from_system().unwrap(),
        );
        assert_ne!((one.bits(), one.bits()), (two.bits(), two.bits()));
        assert_eq!(format!("{one:?}"), "SecureSource");
    }

    #[test]
    fn every_number_below_the_bound_is_as_likely() {
        let mut source = SecureSource::seeded(4);
        let mut counts = [0_u32; 6];
        (0..60_000).for_each(|_| counts[source.below(6) as usize] += 1);
        // χ² with 5 degrees of freedom stays below 30 with probability 1 − 1.5e-5.
        let square: f64 = counts.iter().map(|c| (f64::from(*c) - 1e4).powi(2) / 1e4).sum();
        assert!(square < 30.0, "{counts:?}");
        let bound = (1_u128 << 100) + 1;
        assert!((0..100).all(|_| source.below(bound) < bound));
        assert_eq!((source.below(0), source.below(1)), (0, 0));
    }
}
