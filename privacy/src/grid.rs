//! The public grid that values and noise live on.
//!
//! Its step is Δ = σC/2²⁰, so that the noise of every release has standard deviation 2²⁰ steps, and one unit may have an
//! L2 norm of K = ⌊2²⁰/σ⌋ steps, K·Δ ≤ C. The ratio of noise to sensitivity is 2²⁰/K ≥ σ in whole numbers, so nothing has to be added for rounding.
//! The step depends on public numbers alone. It is far below the noise: cutting a value to it loses nothing that can be seen.

use theriac_protocol::units::{L2Norm, NoiseMultiplier};

/// Standard deviation of the noise in steps.
pub(crate) const DEVIATION: i64 = 1 << crate::noise::DEVIATION_LOG2;

/// Largest K. Sums of 2¹⁸ units stay below 2⁵⁸ steps; a σ below 2⁻²⁰, which protects nothing, clips harder.
const NORM_MAX: i64 = 1 << 40;

/// A grid for one C and σ.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Grid {
    step: f64,
    norm_max: i64,
}

impl Grid {
    /// The grid of a release with clipping norm C and noise multiplier σ.
    pub(crate) fn new(clip_norm: L2Norm, noise_multiplier: NoiseMultiplier) -> Self {
        let deviation = DEVIATION as f64;
        #[expect(
            clippy::cast_possible_truncation,
            reason = "larger values saturate and are cut to NORM_MAX"
        )]
        let norm_max = (deviation / noise_multiplier.value()).floor() as i64;
        Self {
            step: noise_multiplier.value() * clip_norm.value() / deviation,
            // The quotient is rounded: K + 1 would pass for a σ just above 2²⁰/(K + 1).
            norm_max: if (norm_max as f64) * noise_multiplier.value() > deviation {
                norm_max - 1
            } else {
                norm_max
            }
            .clamp(0, NORM_MAX),
        }
    }

    /// Δ, in the values' own unit.
    pub(crate) fn step(self) -> f64 {
        self.step
    }

    /// K: the largest L2 norm of one unit, in steps.
    pub(crate) fn norm_max(self) -> i64 {
        self.norm_max
    }

    /// ρ (zCDP) of noise of [`DEVIATION`] steps when one unit moves the sum by at most `sensitivity`·K steps.
    pub(crate) fn rho(self, sensitivity: f64) -> f64 {
        let ratio = sensitivity * self.norm_max as f64 / DEVIATION as f64;
        ratio * ratio / 2.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn noise_is_never_less_than_the_multiplier_promises(sigma in 1e-3_f64..1e5, clip in 1e-9_f64..1e12) {
            let grid = Grid::new(L2Norm::new(clip).unwrap(), NoiseMultiplier::new(sigma).unwrap());
            prop_assert!(grid.norm_max() as f64 * sigma <= DEVIATION as f64 * (1.0 + f64::EPSILON));
            prop_assert!((grid.norm_max() + 1) as f64 * sigma > DEVIATION as f64 * (1.0 - f64::EPSILON));
            prop_assert!(grid.norm_max() as f64 * grid.step() <= clip * (1.0 + 4.0 * f64::EPSILON));
        }
    }

    #[test]
    fn extreme_multipliers_give_a_grid() {
        let grid = |sigma: f64| Grid::new(L2Norm::new(1.0).unwrap(), NoiseMultiplier::new(sigma).unwrap());
        assert_eq!((grid(1e-300).norm_max(), grid(1e300).norm_max()), (NORM_MAX, 0));
        assert_eq!(
            (grid(1.0).norm_max(), grid(2.0).norm_max()),
            (DEVIATION, DEVIATION / 2)
        );
    }
}
