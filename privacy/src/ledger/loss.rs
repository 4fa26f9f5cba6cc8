//! What a release costs, as the ledger keeps it: a Rényi curve, shared between the blocks that have the same.
//!
//! **Why a curve.** Composition adds the loss at each order, and only at the end is the best order chosen. One number (zCDP, or ε) would
//! choose it too early, and could not hold a subsampled mechanism, whose loss is not linear in the order. Formulae and sources are in
//! [`crate::accountant`].

use std::sync::{Arc, LazyLock};

use theriac_protocol::units::{Delta, NoiseMultiplier};

use crate::accountant::{RdpCurve, RdpEpsilon, SamplingRate, SubsampledGaussian};

pub use crate::accountant::ORDERS;

/// Rényi loss at each of [`ORDERS`]: at least 0, possibly infinite, never NaN.
#[derive(Debug, Clone)]
pub struct Loss(Arc<RdpCurve>);

impl Loss {
    /// Nothing was released.
    pub fn none() -> Self {
        static NONE: LazyLock<Loss> = LazyLock::new(|| Loss::from(RdpCurve::ZERO));
        NONE.clone()
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
            Some(one) => Self::from(one.rdp().times(u64::from(steps))),
            None => Self::from(RdpCurve::from_orders(|_| f64::INFINITY)),
        }
    }

    /// ρ-zCDP as a curve: ρ·a at order a (Bun and Steinke 2016).
    pub fn zcdp(rho: f64) -> Self {
        Self::from(RdpCurve::from_orders(|order| f64::from(order) * rho))
    }

    /// The curve.
    pub fn curve(&self) -> &RdpCurve {
        &self.0
    }

    /// Cost of two releases that read the same unit.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self::from(self.0.plus(&other.0))
    }

    /// Whether both curves agree to one part in 10⁹.
    pub fn agrees_with(&self, other: &RdpCurve) -> bool {
        let near = |(a, b): (&f64, &f64)| a.to_bits() == b.to_bits() || (a - b).abs() <= 1e-9 * b.abs();
        self.0.values().iter().zip(other.values()).all(near)
    }

    /// The least ε that the grid can prove at `delta`.
    pub fn epsilon(&self, delta: Delta) -> RdpEpsilon {
        self.0.epsilon(delta)
    }
}

impl From<RdpCurve> for Loss {
    fn from(curve: RdpCurve) -> Self {
        Self(Arc::new(curve))
    }
}

impl Default for Loss {
    fn default() -> Self {
        Self::none()
    }
}

impl PartialEq for Loss {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0 == other.0
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
