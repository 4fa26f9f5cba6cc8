//! Steps on a few units drawn at random (DP-SGD), for larger models and many steps.
//!
//! **Mechanism.** Before each step every unit of the pool throws a secret coin of probability q ([`crate::poisson`]). The gradients of those that came are clipped
//! to C on the grid, added, noised with σC and divided by the **expected** number qn of units, never by the number that came, which
//! depends on who is in the data. A step to which nobody came is made all the same: noise over qn. **Guarantee.** T steps of the Poisson-subsampled
//! Gaussian; their curve ([`Job::rdp`]) is what every unit of the pool is charged, drawn or not.

use theriac_protocol::units::{L2Norm, NoiseMultiplier};

use super::{DescentError, clipped};
use crate::accountant::{Job, Rho};
use crate::noise::{NoiseError, NoiseMechanism, release};
use crate::poisson::PoissonSampler;

/// The steps of one job. Make it only for a job whose curve was charged to every unit of the pool: it reads no ledger itself, and what
/// it gives is no update that could be sent.
#[derive(Debug)]
pub struct SampledDescent {
    job: Job,
    noise_multiplier: NoiseMultiplier,
    clip_norm: L2Norm,
    values: usize,
    units: usize,
    sampler: PoissonSampler,
    made: u64,
}

impl SampledDescent {
    /// A job over a pool of `units` units, gradients of `values` values, sensitivity C.
    ///
    /// # Errors
    /// [`DescentError::NoBlocks`] for an empty pool, [`DescentError::NoMultiplier`], and [`DescentError::Noise`] when there is no randomness.
    pub fn new(job: Job, clip_norm: L2Norm, values: usize, units: usize) -> Result<Self, DescentError> {
        if units == 0 {
            return Err(DescentError::NoBlocks);
        }
        let steps = u32::try_from(job.steps).unwrap_or(u32::MAX);
        let noise_multiplier =
            NoiseMultiplier::new(job.mechanism.ratio()).map_err(|_| DescentError::NoMultiplier { steps })?;
        Ok(Self {
            job,
            noise_multiplier,
            clip_norm,
            values,
            units,
            sampler: PoissonSampler::new(job.mechanism.rate()).map_err(NoiseError::from)?,
            made: 0,
        })
    }

    /// Steps that are left.
    pub fn left(&self) -> u64 {
        self.job.steps - self.made
    }

    /// The next noisy mean gradient. `read` gets the indices of the units that were drawn, perhaps none, and gives one gradient for each.
    ///
    /// # Errors
    /// [`DescentError::Exhausted`] before anybody is drawn, [`DescentError::WrongShape`], [`DescentError::Noise`]. A step that failed
    /// counts as made.
    pub fn step(
        &mut self,
        mechanism: &dyn NoiseMechanism,
        read: impl FnOnce(&[usize]) -> Vec<Vec<f32>>,
    ) -> Result<Vec<f32>, DescentError> {
        if self.left() == 0 {
            return Err(DescentError::Exhausted {
                steps: u32::try_from(self.job.steps).unwrap_or(u32::MAX),
            });
        }
        self.made += 1;
        let drawn = self.sampler.draw(self.units);
        let gradients = read(&drawn);
        if gradients.len() > drawn.len() || gradients.iter().any(|gradient| gradient.len() != self.values) {
            return Err(DescentError::WrongShape {
                found: drawn.len(),
                values: self.values,
            });
        }
        let noise = self.noise_multiplier;
        let sum = clipped(&gradients, self.values, self.clip_norm, noise);
        let noisy = release(mechanism, &sum, 1.0, Rho::gaussian(1.0, noise))?;
        let expected = self.job.mechanism.rate().value() * self.units as f64;
        #[expect(
            clippy::cast_possible_truncation,
            reason = "rounding noised values costs nothing"
        )]
        let mean = noisy.into_iter().map(|x| (x / expected) as f32).collect();
        Ok(mean)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::accountant::{SamplingRate, SubsampledGaussian};
    use crate::noise::{ExactGaussian, FixedNoise};

    fn descent(sigma: f64, rate: f64, steps: u64, units: usize) -> SampledDescent {
        let mechanism = SubsampledGaussian::new(
            NoiseMultiplier::new(sigma).unwrap(),
            SamplingRate::new(rate).unwrap(),
        );
        SampledDescent::new(Job { mechanism, steps }, L2Norm::new(1.0).unwrap(), 2, units).unwrap()
    }

    #[test]
    fn sums_are_divided_by_the_expected_number_and_not_by_the_drawn_one() {
        let mut descent = descent(1.0, 0.25, 200, 40);
        let mut numbers = std::collections::BTreeSet::new();
        while descent.left() > 0 {
            let came = Cell::new(0);
            let read = |drawn: &[usize]| {
                came.set(drawn.len());
                drawn.iter().map(|_| vec![0.5, 0.0]).collect()
            };
            let mean = descent.step(&FixedNoise(0.0), read).unwrap();
            assert!(
                (f64::from(mean[0]) - 0.5 * came.get() as f64 / 10.0).abs() < 1e-5,
                "{mean:?}"
            );
            numbers.insert(came.get());
        }
        assert!(
            numbers.len() > 5,
            "the number that came hardly varies: {numbers:?}"
        );
    }

    #[test]
    fn a_step_to_which_nobody_came_is_noise_over_the_expected_number() {
        let mut descent = descent(2.0, 0.001, 3000, 100);
        let (mut empty, mut squares) = (0_u32, 0.0);
        while descent.left() > 0 {
            let nobody = Cell::new(false);
            let read = |drawn: &[usize]| {
                nobody.set(drawn.is_empty());
                vec![]
            };
            let mean = descent.step(&ExactGaussian, read).unwrap();
            if nobody.get() {
                empty += 1;
                squares += mean.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
            }
        }
        // e^{−0.1} of the steps; σC/qn = 20.
        assert!(empty > 2500, "{empty}");
        let found = (squares / f64::from(2 * empty)).sqrt();
        assert!((found / 20.0 - 1.0).abs() < 0.06, "{found}");
    }

    #[test]
    fn no_step_beyond_the_job() {
        let mut descent = descent(1.0, 0.5, 1, 4);
        assert!(descent.step(&ExactGaussian, |_| vec![]).is_ok());
        let more = descent.step(&ExactGaussian, |_| panic!("units were read beyond the job"));
        assert!(
            matches!(more, Err(DescentError::Exhausted { steps: 1 })),
            "{more:?}"
        );
    }
}
