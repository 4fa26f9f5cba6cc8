//! Noise: Gaussian, of standard deviation σC, on the **sum** of the clipped units.
//!
//! **Adjacency** add or remove one unit. **Sensitivity** s·C (1 or 2 clipping norms, see [`crate::policy::PrivacyUnit`]). **Mechanism** the
//! discrete Gaussian on a public grid (Canonne, Kamath and Steinke 2020), of standard deviation 2²⁰ grid steps where one unit moves the sum by at
//! most ⌊2²⁰/σ⌋ steps. **Guarantee** ρ-zCDP with ρ = s²/(2σ²), and the RDP of [`crate::accountant`].
//!
//! Value and noise live on one grid, and sampling is exact: noise added in floating point would leak the value through the gaps between floats
//! (Mironov 2012) or through a spacing that follows the value (Haney, Desfontaines, Hartman, Shrestha and Hay 2022). The generator is `ChaCha20` with a
//! key of the operating system; nobody can seed it. What the sum becomes afterwards (floats, bytes, a mean) is post-processing.
//!
//! Two mechanisms draw from the same distribution: [`ExactGaussian`], the default, and [`OpenDpGaussian`], a library's, a hundred times slower.

mod source;
mod split;
mod table;

#[cfg(test)]
mod attack;
#[cfg(test)]
mod check;
#[cfg(test)]
mod rejection;

use std::fmt;

use opendp::domains::{AtomDomain, VectorDomain};
use opendp::measurements::make_gaussian;
use opendp::measures::ZeroConcentratedDivergence;
use opendp::metrics::L2Distance;

use crate::accountant::Rho;
use crate::clip::GridSum;
use crate::grid::DEVIATION;

pub use self::source::{NoEntropy, SecureSource};
pub(crate) use self::split::DEVIATION_LOG2;

/// Why no noise could be added. The values stay where they are; the charge is not refunded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NoiseError {
    /// The library refused.
    #[error("the noise library refused: {0}")]
    Library(String),
    /// The noise would cost more than was charged.
    #[error("the release would cost rho {needed}, only {charged} was charged")]
    Undercharged {
        /// ρ in the ledger.
        charged: f64,
        /// ρ of what would be released.
        needed: f64,
    },
    /// No grid of floats has this step.
    #[error(
        "no value can be written in steps of {0}: the noise multiplier or the clipping norm is out of all proportion"
    )]
    Grid(f64),
    /// There is no randomness.
    #[error(transparent)]
    NoEntropy(#[from] NoEntropy),
}

/// Adds noise to a sum. Only this crate can implement it: an edge has no way to send something without noise.
pub trait NoiseMechanism: fmt::Debug + sealed::Mechanism {}

pub(crate) mod sealed {
    use super::{GridSum, NoiseError};

    /// The working half of [`super::NoiseMechanism`].
    pub trait Mechanism {
        /// The sum plus noise of standard deviation 2²⁰ steps, in steps. `sensitivity`: how far one unit can move the sum, in multiples of its
        /// grid's norm bound.
        #[doc(hidden)]
        fn noised(&self, sum: &GridSum, sensitivity: f64) -> Result<Vec<f64>, NoiseError>;
    }
}

/// A sum with noise on it, in the values' own unit; refused when it would cost more than `charged`.
pub(crate) fn release(
    mechanism: &dyn NoiseMechanism,
    sum: &GridSum,
    sensitivity: f64,
    charged: Rho,
) -> Result<Vec<f64>, NoiseError> {
    let (grid, charged) = (sum.grid(), charged.value());
    if !grid.step().is_normal() {
        return Err(NoiseError::Grid(grid.step()));
    }
    let needed = grid.rho(sensitivity);
    // Not `>`: what is not a number must refuse.
    let covered = needed <= charged;
    if !covered {
        return Err(NoiseError::Undercharged { charged, needed });
    }
    let steps = mechanism.noised(sum, sensitivity)?;
    Ok(steps.into_iter().map(|x| x * grid.step()).collect())
}

/// The mechanism of every edge: the exact split sampler of this crate. About 15 ns for each value.
#[derive(Debug, Clone, Copy, Default)]
pub struct ExactGaussian;

impl NoiseMechanism for ExactGaussian {}

impl sealed::Mechanism for ExactGaussian {
    fn noised(&self, sum: &GridSum, _sensitivity: f64) -> Result<Vec<f64>, NoiseError> {
        let mut source = SecureSource::from_system()?;
        Ok(noised_by(sum, || split::RELEASE.draw(&mut source)))
    }
}

/// The same distribution from `OpenDP` (`make_gaussian` on whole numbers), for who would rather trust a library with published proofs;
/// its own proof must agree with the charge. About 4 µs for each value, so for releases that happen once a round.
#[derive(Debug, Clone, Copy, Default)]
pub struct OpenDpGaussian;

impl NoiseMechanism for OpenDpGaussian {}

impl sealed::Mechanism for OpenDpGaussian {
    fn noised(&self, sum: &GridSum, sensitivity: f64) -> Result<Vec<f64>, NoiseError> {
        let library = |error: opendp::error::Error| NoiseError::Library(error.to_string());
        // Made and used in one call: it is not `Send`.
        let measurement = make_gaussian::<_, _, ZeroConcentratedDivergence>(
            VectorDomain::new(AtomDomain::<i64>::default()),
            L2Distance::<f64>::default(),
            DEVIATION as f64,
            None,
        )
        .map_err(library)?;
        let charged = sum.grid().rho(sensitivity) * (1.0 + LIBRARY_MARGIN);
        let needed = measurement
            .map(&(sensitivity * sum.grid().norm_max() as f64))
            .map_err(library)?;
        let covered = needed <= charged;
        if !covered {
            return Err(NoiseError::Undercharged { charged, needed });
        }
        let noisy = measurement.invoke(&sum.steps().to_vec()).map_err(library)?;
        Ok(noisy.into_iter().map(|x| x as f64).collect())
    }
}

/// Noise that the test chose, the same for every value. Exists only in tests.
#[cfg(any(test, feature = "test-noise"))]
#[derive(Debug, Clone, Copy)]
pub struct FixedNoise(
    /// Added to every value, in units of the noise's standard deviation.
    pub f64,
);

#[cfg(any(test, feature = "test-noise"))]
impl NoiseMechanism for FixedNoise {}

#[cfg(any(test, feature = "test-noise"))]
impl sealed::Mechanism for FixedNoise {
    fn noised(&self, sum: &GridSum, _sensitivity: f64) -> Result<Vec<f64>, NoiseError> {
        Ok(sum
            .steps()
            .iter()
            .map(|x| *x as f64 + self.0 * DEVIATION as f64)
            .collect())
    }
}

/// Adds a draw of the exact discrete Gaussian of standard deviation 2²⁰ to every value: the sampler alone, for measurements and for who keeps a grid
/// of their own. It charges nothing and checks nothing.
///
/// # Errors
/// [`NoEntropy`]; then nothing was changed.
pub fn add_exact_noise(steps: &mut [i64]) -> Result<(), NoEntropy> {
    let mut source = SecureSource::from_system()?;
    for step in steps {
        *step = step.saturating_add(split::RELEASE.draw(&mut source));
    }
    Ok(())
}

/// Each value plus a draw, added as whole numbers: 2⁵⁸ and a draw below 2²⁴ cannot overflow.
fn noised_by(sum: &GridSum, mut draw: impl FnMut() -> i64) -> Vec<f64> {
    sum.steps()
        .iter()
        .map(|x| x.saturating_add(draw()) as f64)
        .collect()
}

/// The library rounds its proof upwards by some parts in 10¹⁵.
const LIBRARY_MARGIN: f64 = 1e-9;

#[cfg(test)]
mod tests {
    use theriac_protocol::units::{L2Norm, NoiseMultiplier};

    use super::*;

    fn sigma(value: f64) -> NoiseMultiplier {
        NoiseMultiplier::new(value).unwrap()
    }

    fn sum_of(units: usize, values: usize, clip_norm: f64, noise: f64) -> GridSum {
        let mut sum = GridSum::new(values, L2Norm::new(clip_norm).unwrap(), sigma(noise));
        // Each unit is far longer than C, so clipping matters.
        (0..units).for_each(|_| sum.add(&vec![1e4; values]));
        sum
    }

    /// The factor-B bug: noise on the mean instead of the sum would be `units` times too small. 40,000 draws put the sample
    /// deviation within 2.5 % of the true one with a probability beyond 1 − 1e-11.
    #[test]
    fn noise_deviation_is_sigma_c_on_the_sum_whatever_the_number_of_units() {
        let (clip_norm, noise, values) = (588.0, 1.27, 40_000);
        for mechanism in [&ExactGaussian as &dyn NoiseMechanism, &OpenDpGaussian] {
            for units in [1, 64] {
                let sum = sum_of(units, values, clip_norm, noise);
                let step = sum.grid().step();
                let exact = sum.steps().iter().map(|x| *x as f64 * step);
                let noisy = release(mechanism, &sum, 1.0, Rho::gaussian(1.0, sigma(noise))).unwrap();
                let noise_of: Vec<f64> = noisy.iter().zip(exact).map(|(a, b)| a - b).collect();
                let mean = noise_of.iter().sum::<f64>() / values as f64;
                let deviation =
                    (noise_of.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / values as f64).sqrt();
                let expected = noise * clip_norm;
                assert!(
                    (deviation / expected - 1.0).abs() < 0.025,
                    "{mechanism:?}, {units} units: {deviation}, expected {expected}"
                );
                assert!(
                    mean.abs() < 7.0 * expected / (values as f64).sqrt(),
                    "the noise has mean {mean}"
                );
            }
        }
    }

    /// The library's sampler and the one of this crate, against the same exact probabilities.
    #[test]
    fn the_library_draws_from_the_same_distribution() {
        let sum = GridSum::new(20_000, L2Norm::new(1.0).unwrap(), sigma(1.27));
        let noisy = sealed::Mechanism::noised(&OpenDpGaussian, &sum, 1.0).unwrap();
        #[expect(clippy::cast_possible_truncation, reason = "whole numbers far below 2^53")]
        let draws: Vec<i64> = noisy.into_iter().map(|x| x as i64).collect();
        check::chi_squared(&draws, DEVIATION as f64);
        check::Moments::of(&draws).check(DEVIATION as f64);
    }

    #[test]
    fn the_library_proves_what_the_grid_says_and_no_more_than_is_charged() {
        for noise in [0.7, 1.27, 20.0] {
            let sum = GridSum::new(5, L2Norm::new(588.0).unwrap(), sigma(noise));
            for sensitivity in [1.0, 2.0] {
                let charged = Rho::gaussian(sensitivity, sigma(noise));
                assert!(sum.grid().rho(sensitivity) <= charged.value());
                assert!(
                    release(&OpenDpGaussian, &sum, sensitivity, charged).is_ok(),
                    "σ {noise}"
                );
            }
        }
    }

    #[test]
    fn weaker_noise_than_was_charged_is_refused() {
        let charged = Rho::gaussian(1.0, sigma(2.0));
        for mechanism in [&ExactGaussian as &dyn NoiseMechanism, &OpenDpGaussian] {
            let weak = release(mechanism, &sum_of(2, 5, 1.0, 1.9), 1.0, charged);
            assert!(matches!(weak, Err(NoiseError::Undercharged { .. })), "{weak:?}");
            let moved_twice = release(mechanism, &sum_of(2, 5, 1.0, 2.0), 2.0, charged);
            assert!(
                matches!(moved_twice, Err(NoiseError::Undercharged { .. })),
                "{moved_twice:?}"
            );
            assert!(release(mechanism, &sum_of(2, 5, 1.0, 2.0), f64::NAN, charged).is_err());
            assert!(release(mechanism, &sum_of(2, 5, 1.0, 2.0), 1.0, charged).is_ok());
        }
        let vast = GridSum::new(1, L2Norm::new(1e12).unwrap(), sigma(1e308));
        let refused = release(&ExactGaussian, &vast, 1.0, Rho::new(1.0));
        assert!(matches!(refused, Err(NoiseError::Grid(_))), "{refused:?}");
    }

    #[test]
    fn two_releases_of_one_sum_differ() {
        let sum = sum_of(1, 16, 1.0, 2.0);
        let release = || release(&ExactGaussian, &sum, 1.0, Rho::new(1.0)).unwrap();
        assert_ne!(release(), release());
    }
}
