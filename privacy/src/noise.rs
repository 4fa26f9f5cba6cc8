//! Noise: Gaussian, of standard deviation σC, on the **sum** of the clipped units.
//!
//! **Adjacency** add or remove one unit. **Sensitivity** s·C (1 or 2 clipping norms, see [`crate::policy::PrivacyUnit`]). **Mechanism** the
//! discrete Gaussian on a public grid (OpenDP `make_gaussian`, after Canonne, Kamath and Steinke 2020). **Guarantee** ρ-zCDP with
//! ρ = s²/(2σ²), see [`crate::accountant`].
//!
//! Value and noise live on one grid, and sampling is exact: noise added in floating point would leak the value
//! through the gaps between floats (Mironov 2012). The generator is OpenDP's own, seeded by the operating system; nobody can seed it.

use std::fmt;

use opendp::domains::{AtomDomain, VectorDomain};
use opendp::measurements::make_gaussian;
use opendp::measures::ZeroConcentratedDivergence;
use opendp::metrics::L2Distance;

use crate::accountant::Rho;
use crate::clip::GridSum;

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
        /// ρ by the library's own proof.
        needed: f64,
    },
}

/// Adds noise to a sum. Only this crate can implement it: an edge has no way to send something without noise.
pub trait NoiseMechanism: fmt::Debug + sealed::Mechanism {}

pub(crate) mod sealed {
    use super::{GridSum, NoiseError, Rho};

    /// The working half of [`super::NoiseMechanism`].
    pub trait Mechanism {
        /// The sum plus noise of standard deviation `deviation`, refused when it costs more than `charged` at
        /// L2 sensitivity `sensitivity`.
        #[doc(hidden)]
        fn release(
            &self,
            sum: &GridSum,
            deviation: f64,
            sensitivity: f64,
            charged: Rho,
        ) -> Result<Vec<f64>, NoiseError>;
    }
}

/// The mechanism of every edge.
///
/// About 5 µs for each value; memory of a few vectors of the sum's length.
#[derive(Debug, Clone, Copy, Default)]
pub struct OpenDpGaussian;

impl NoiseMechanism for OpenDpGaussian {}

impl sealed::Mechanism for OpenDpGaussian {
    fn release(
        &self,
        sum: &GridSum,
        deviation: f64,
        sensitivity: f64,
        charged: Rho,
    ) -> Result<Vec<f64>, NoiseError> {
        let library = |error: opendp::error::Error| NoiseError::Library(error.to_string());
        // Made and used in one call: it is not `Send`.
        let measurement = make_gaussian::<_, _, ZeroConcentratedDivergence>(
            VectorDomain::new(AtomDomain::<f64>::new_non_nan()).with_size(sum.len()),
            L2Distance::<f64>::default(),
            deviation,
            Some(sum.grid().exponent()),
        )
        .map_err(library)?;
        let needed = measurement.map(&sensitivity).map_err(library)?;
        // Not `>`: what is not a number must refuse.
        let covered = needed <= charged.value();
        if !covered {
            return Err(NoiseError::Undercharged {
                charged: charged.value(),
                needed,
            });
        }
        measurement.invoke(&sum.to_f64()).map_err(library)
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
    fn release(
        &self,
        sum: &GridSum,
        deviation: f64,
        _sensitivity: f64,
        _charged: Rho,
    ) -> Result<Vec<f64>, NoiseError> {
        Ok(sum.to_f64().into_iter().map(|x| x + self.0 * deviation).collect())
    }
}

#[cfg(test)]
mod tests {
    use theriac_protocol::units::{L2Norm, NoiseMultiplier};

    use super::sealed::Mechanism as _;
    use super::*;

    fn sum_of(units: usize, values: usize, clip_norm: f64) -> GridSum {
        let mut sum = GridSum::new(values, L2Norm::new(clip_norm).unwrap());
        // Each unit is far longer than C, so clipping matters.
        (0..units).for_each(|_| sum.add(&vec![1e4; values]));
        sum
    }

    /// The factor-B bug: noise on the mean instead of the sum would be `units` times too small. 40,000 draws put the sample
    /// deviation within 2.5 % of the true one with a probability beyond 1 − 1e-11.
    #[test]
    fn noise_deviation_is_sigma_c_on_the_sum_whatever_the_number_of_units() {
        let (clip_norm, sigma, values) = (588.0, 1.27, 40_000);
        for units in [1, 64] {
            let sum = sum_of(units, values, clip_norm);
            let exact = sum.to_f64();
            let charged = Rho::gaussian(1.0, NoiseMultiplier::new(sigma).unwrap());
            let noisy = OpenDpGaussian
                .release(&sum, sigma * clip_norm, clip_norm, charged)
                .unwrap();
            let noise: Vec<f64> = noisy.iter().zip(&exact).map(|(a, b)| a - b).collect();
            let mean = noise.iter().sum::<f64>() / values as f64;
            let deviation = (noise.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / values as f64).sqrt();
            let expected = sigma * clip_norm;
            assert!(
                (deviation / expected - 1.0).abs() < 0.025,
                "{units} units: {deviation}, expected {expected}"
            );
            assert!(
                mean.abs() < 7.0 * expected / (values as f64).sqrt(),
                "the noise has mean {mean}"
            );
        }
    }

    #[test]
    fn library_proves_no_more_than_the_accountant_charges() {
        for (values, clip_norm) in [(1, 1e-9), (760, 588.0), (50_000, 1.0), (1_000_000, 3.0e11)] {
            for sigma in [0.7, 1.27, 20.0] {
                let sum = GridSum::new(values, L2Norm::new(clip_norm).unwrap());
                let measurement = make_gaussian::<_, _, ZeroConcentratedDivergence>(
                    VectorDomain::new(AtomDomain::<f64>::new_non_nan()).with_size(values),
                    L2Distance::<f64>::default(),
                    sigma * clip_norm,
                    Some(sum.grid().exponent()),
                )
                .unwrap();
                for sensitivity in [1.0, 2.0] {
                    let needed = measurement.map(&(sensitivity * clip_norm)).unwrap();
                    let charged = Rho::gaussian(sensitivity, NoiseMultiplier::new(sigma).unwrap()).value();
                    assert!(
                        needed <= charged,
                        "{values} values, C {clip_norm}, sigma {sigma}: {needed} > {charged}"
                    );
                    assert!(charged < needed * 1.000_01);
                }
            }
        }
    }

    #[test]
    fn weaker_noise_than_was_charged_is_refused() {
        let sum = sum_of(2, 5, 1.0);
        let charged = Rho::gaussian(1.0, NoiseMultiplier::new(2.0).unwrap());
        let refused = OpenDpGaussian.release(&sum, 1.9, 1.0, charged);
        assert!(
            matches!(refused, Err(NoiseError::Undercharged { .. })),
            "{refused:?}"
        );
        assert!(OpenDpGaussian.release(&sum, f64::NAN, 1.0, charged).is_err());
        assert!(OpenDpGaussian.release(&sum, 0.0, 1.0, charged).is_err());
    }

    #[test]
    fn two_releases_of_one_sum_differ() {
        let sum = sum_of(1, 16, 1.0);
        let release = || OpenDpGaussian.release(&sum, 2.0, 1.0, Rho::new(1.0)).unwrap();
        assert_ne!(release(), release());
    }
}
