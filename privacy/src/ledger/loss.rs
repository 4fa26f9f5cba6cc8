//! What a release costs, as the ledger keeps it: a Rényi curve, shared between the blocks that have the same.
//!
//! **Why a curve.** Composition adds the loss at each order, and only at the end is the best order chosen. One number (zCDP, or ε) would
//! choose it too early, and could not hold a subsampled mechanism, whose loss is not linear in the order. Formulae and sources are in
//! [`crate::accountant`].

use std::sync::{Arc, LazyLock};

use theriac_protocol::units::{Delta, NoiseMultiplier};

use crate::accountant::{Job, RdpCurve, RdpEpsilon, SamplingRate, SubsampledGaussian, pld_epsilon};

pub use crate::accountant::ORDERS;

/// Rényi loss at each of [`ORDERS`], at least 0, possibly infinite, never NaN; and the steps that it is made of, for the tighter second
/// figure, which no curve can give.
#[derive(Debug, Clone)]
pub struct Loss {
    curve: Arc<RdpCurve>,
    /// By ratio, then rate, each pair once.
    jobs: Arc<Vec<Job>>,
}

impl Loss {
    /// Nothing was released.
    pub fn none() -> Self {
        static NONE: LazyLock<Loss> = LazyLock::new(|| Loss {
            curve: Arc::new(RdpCurve::ZERO),
            jobs: Arc::default(),
        });
        NONE.clone()
    }

    fn of(job: Job) -> Self {
        Self {
            curve: Arc::new(job.rdp()),
            jobs: Arc::new(vec![job]),
        }
    }

    /// What nothing bounds.
    fn infinite() -> Self {
        Self {
            curve: Arc::new(RdpCurve::from_orders(|_| f64::INFINITY)),
            jobs: Arc::default(),
        }
    }

    /// Cost of `steps` Gaussian steps of noise multiplier `sigma`, each with sensitivity `sensitivity`·C on a Poisson sample of rate `rate`.
    /// What no formula covers (a rate below 1 with a sensitivity above 1, a number out of range) is infinite.
    pub fn gaussian(sensitivity: f64, sigma: f64, rate: f64, steps: u32) -> Self {
        let covered = sensitivity <= 1.0 || rate >= 1.0;
        let mechanism = NoiseMultiplier::new(sigma).ok().zip(SamplingRate::new(rate).ok());
        let mechanism = mechanism.map(|(sigma, rate)| SubsampledGaussian::new(sigma, rate));
        // The margin covers the rounding that a noise library may charge for its grid: one millionth in the loss.
        let one = mechanism.and_then(|one| one.with_sensitivity(sensitivity * (1.0 + MARGIN / 2.0)).ok());
        match one.filter(|_| covered && steps > 0) {
            Some(mechanism) => Self::of(Job {
                mechanism,
                steps: steps.into(),
            }),
            None => Self::infinite(),
        }
    }

    /// ρ-zCDP as a curve: ρ·a at order a (Bun and Steinke 2016).
    pub fn zcdp(rho: f64) -> Self {
        let gaussian = NoiseMultiplier::new((0.5 / rho).sqrt());
        let job = gaussian.map(|ratio| Job {
            mechanism: SubsampledGaussian::new(ratio, SamplingRate::FULL),
            steps: 1,
        });
        Self {
            curve: Arc::new(RdpCurve::from_orders(|order| f64::from(order) * rho)),
            jobs: Arc::new(job.into_iter().collect()),
        }
    }

    /// The curve.
    pub fn curve(&self) -> &RdpCurve {
        &self.curve
    }

    /// Cost of two releases that read the same unit.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        let mut sum = self.clone();
        sum.add(other);
        sum
    }

    /// Adds another release that reads the same unit.
    pub fn add(&mut self, other: &Self) {
        self.curve = Arc::new(self.curve.plus(&other.curve));
        if self.jobs.is_empty() {
            self.jobs = Arc::clone(&other.jobs);
            return;
        }
        let key = |job: &Job| {
            (
                job.mechanism.ratio().to_bits(),
                job.mechanism.rate().value().to_bits(),
            )
        };
        for job in &*other.jobs {
            let jobs = Arc::make_mut(&mut self.jobs);
            match jobs.binary_search_by_key(&key(job), key) {
                Ok(at) => jobs[at].steps = jobs[at].steps.saturating_add(job.steps),
                Err(at) => jobs.insert(at, *job),
            }
        }
    }

    /// Whether both curves agree to one part in 10⁹.
    pub fn agrees_with(&self, other: &RdpCurve) -> bool {
        let near = |(a, b): (&f64, &f64)| a.to_bits() == b.to_bits() || (a - b).abs() <= 1e-9 * b.abs();
        self.curve.values().iter().zip(other.values()).all(near)
    }

    /// The least ε that the grid can prove at `delta`.
    pub fn epsilon(&self, delta: Delta) -> RdpEpsilon {
        self.curve.epsilon(delta)
    }

    /// ε from privacy loss distributions, for continuous noise: at most the figure of [`Loss::epsilon`]. Closed form when nothing was sampled, else up to a
    /// second.
    pub fn epsilon_pld(&self, delta: Delta) -> f64 {
        let rdp = self.epsilon(delta).epsilon;
        if rdp.is_finite() {
            pld_epsilon(&self.jobs, delta).min(rdp)
        } else {
            rdp
        }
    }
}

impl Default for Loss {
    fn default() -> Self {
        Self::none()
    }
}

impl PartialEq for Loss {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.curve, &other.curve) || (self.curve == other.curve && self.jobs == other.jobs)
    }
}

/// Relative margin on every charge.
const MARGIN: f64 = 1e-6;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_formula_covers_is_infinite_and_refused() {
        let delta = Delta::new(1e-6).unwrap();
        for (sensitivity, sigma, rate, steps) in [
            (2.0, 1.0, 0.5, 1),
            (1.0, 0.0, 1.0, 1),
            (1.0, 1.0, 1.5, 1),
            (1.0, f64::NAN, 1.0, 1),
            (1.0, 1.0, 1.0, 0),
            (1.0, 1e-200, 1.0, 1),
        ] {
            let loss = Loss::gaussian(sensitivity, sigma, rate, steps);
            assert!(
                loss.epsilon(delta).epsilon.is_infinite(),
                "{sensitivity}, {sigma}, {rate}, {steps}: {loss:?}"
            );
        }
        assert!(Loss::none().epsilon(delta).epsilon == 0.0);
    }

    #[test]
    fn the_second_figure_is_that_of_all_steps_together_and_never_above_the_first() {
        let delta = Delta::new(1e-6).unwrap();
        let (one, two) = (
            Loss::gaussian(1.0, 3.0, 0.1, 50),
            Loss::gaussian(1.0, 2.0, 1.0, 1),
        );
        let together = one.plus(&two).plus(&one);
        let jobs = [
            Job {
                mechanism: two.jobs[0].mechanism,
                steps: 1,
            },
            Job {
                mechanism: one.jobs[0].mechanism,
                steps: 100,
            },
        ];
        assert_eq!(
            *together.jobs, jobs,
            "steps of one mechanism are one job, in order"
        );
        let (found, expected) = (together.epsilon_pld(delta), pld_epsilon(&jobs, delta));
        assert!(
            (found - expected).abs() < 1e-12 && found > 0.0,
            "{found}, {expected}"
        );
        assert!(found <= together.epsilon(delta).epsilon);
        let of_zcdp = Loss::zcdp(0.125).epsilon_pld(delta);
        assert!((of_zcdp / Loss::gaussian(1.0, 2.0, 1.0, 1).epsilon_pld(delta) - 1.0).abs() < 1e-5);
        assert!(Loss::none().epsilon_pld(delta) == 0.0 && Loss::infinite().epsilon_pld(delta).is_infinite());
    }

    #[test]
    fn a_full_batch_is_charged_its_zcdp_and_a_millionth() {
        let full = Loss::gaussian(2.0, 4.0, 1.0, 3);
        let zcdp = Loss::zcdp(3.0 * 4.0 / 32.0);
        for (charged, exact) in full.curve().values().iter().zip(zcdp.curve().values()) {
            assert!(
                charged > exact && *charged < exact * (1.0 + 1.1e-6),
                "{charged} for {exact}"
            );
        }
    }
}
