//! The Poisson-subsampled Gaussian mechanism, the one mechanism that everything here is made of.
//!
//! **Mechanism.** Each unit enters a step with probability q, by a secret coin of its own. The clipped vectors of those that came are
//! added up and Gaussian noise of standard deviation σC is added to the sum. q = 1 is the plain Gaussian mechanism.
//! **Adjacency** add or remove one unit. **Sensitivity** s·C.
//!
//! Only σ/s matters: noise in multiples of what one unit can move.

use std::fmt;
use std::sync::LazyLock;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use theriac_protocol::units::NoiseMultiplier;

use super::rdp::{ORDERS, RdpCurve};

/// Why numbers make no mechanism.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MechanismError {
    /// The sampling rate is outside its range.
    #[error("a sampling rate must be above 0 and at most 1, got {0}")]
    Rate(f64),
    /// The sensitivity is no number above 0.
    #[error("a sensitivity must be above 0 and finite, got {0}")]
    Sensitivity(f64),
    /// There is no step.
    #[error("a job has at least one step; one without releases nothing and needs no budget")]
    NoSteps,
}

/// Probability q with which each unit enters a step, in (0, 1].
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct SamplingRate(f64);

impl SamplingRate {
    /// Every unit, every step.
    pub const FULL: Self = Self(1.0);

    /// Checks and takes a rate.
    ///
    /// # Errors
    /// [`MechanismError::Rate`] outside (0, 1], and for NaN.
    pub fn new(value: f64) -> Result<Self, MechanismError> {
        if value > 0.0 && value <= 1.0 {
            Ok(Self(value))
        } else {
            Err(MechanismError::Rate(value))
        }
    }

    /// The plain number.
    pub fn value(self) -> f64 {
        self.0
    }

    /// Whether every unit takes part.
    pub fn is_full(self) -> bool {
        self.0 >= 1.0
    }
}

impl fmt::Display for SamplingRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for SamplingRate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for SamplingRate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(f64::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// One step of the mechanism.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SubsampledGaussian {
    /// σ/s.
    ratio: f64,
    rate: SamplingRate,
}

impl SubsampledGaussian {
    /// Noise multiplier σ at rate q, for sensitivity C.
    pub fn new(noise_multiplier: NoiseMultiplier, rate: SamplingRate) -> Self {
        Self {
            ratio: noise_multiplier.value(),
            rate,
        }
    }

    /// The same for sensitivity `sensitivity`·C.
    ///
    /// # Errors
    /// [`MechanismError::Sensitivity`] unless it is above 0 and finite.
    pub fn with_sensitivity(self, sensitivity: f64) -> Result<Self, MechanismError> {
        if sensitivity > 0.0 && sensitivity.is_finite() {
            Ok(Self {
                ratio: self.ratio / sensitivity,
                ..self
            })
        } else {
            Err(MechanismError::Sensitivity(sensitivity))
        }
    }

    /// σ/s: the noise in multiples of what one unit can move.
    pub fn ratio(self) -> f64 {
        self.ratio
    }

    /// Probability with which each unit takes part.
    pub fn rate(self) -> SamplingRate {
        self.rate
    }

    /// RDP of one step.
    ///
    /// For order a (whole): `RDP(a) = ln( Σ_{k=0..a} C(a,k) (1−q)^(a−k) q^k exp(k(k−1)/2σ²) ) / (a−1)` (Mironov, Talwar and
    /// Zhang 2019, section 3.3); for q = 1 that is `a/2σ²`. That it bounds both directions of add-or-remove is their theorem 5, whose
    /// reflection x → 1 − x the discrete Gaussian on whole numbers has as well.
    ///
    /// The terms k = 0 and 1 hold no privacy loss, and the binomial weights add up to one. So the sum is `1 + Σ_{k≥2} … (exp(…) − 1)` of
    /// positive terms, which keeps its digits however small q is. About 5 000 terms, 0.2 ms.
    pub fn rdp(self) -> RdpCurve {
        let per_pair = 0.5 / self.ratio / self.ratio;
        // A release loses something, however little: what a float cannot hold is not zero.
        let at_least = |rdp: f64| {
            if rdp < f64::MIN_POSITIVE {
                f64::MIN_POSITIVE
            } else {
                rdp
            }
        };
        if self.rate.is_full() {
            return RdpCurve::from_orders(|order| at_least(f64::from(order) * per_pair));
        }
        let table = LogPowers::new(self.rate.0, per_pair);
        RdpCurve::from_orders(|order| at_least(table.rdp(order)))
    }
}

/// Logarithms that all orders share.
struct LogPowers {
    rate: f64,
    rest: f64,
    /// ln(exp(k(k−1)/2σ²) − 1) for k = 0 ….
    gain: Vec<f64>,
}

impl LogPowers {
    fn new(rate: f64, per_pair: f64) -> Self {
        let gain = (0..=ORDERS[ORDERS.len() - 1])
            .map(|k| ln_exp_m1(f64::from(k) * f64::from(k.saturating_sub(1)) * per_pair))
            .collect();
        Self {
            rate: rate.ln(),
            rest: (-rate).ln_1p(),
            gain,
        }
    }

    fn rdp(&self, order: u32) -> f64 {
        let ln_factorial = |n: u32| LN_FACTORIAL[n as usize];
        let term = |k: u32| {
            ln_factorial(order) - ln_factorial(k) - ln_factorial(order - k)
                + f64::from(order - k) * self.rest
                + f64::from(k) * self.rate
                + self.gain[k as usize]
        };
        let terms = || (2..=order).map(term);
        let largest = terms().fold(f64::NEG_INFINITY, f64::max);
        if !largest.is_finite() {
            // No gain at all that a float can hold, or more than one can.
            return if largest > 0.0 { f64::INFINITY } else { 0.0 };
        }
        let excess = largest + terms().map(|term| (term - largest).exp()).sum::<f64>().ln();
        // ln(1 + exp(excess)), without overflow.
        let ln_moment = if excess > 0.0 {
            excess + (-excess).exp().ln_1p()
        } else {
            excess.exp().ln_1p()
        };
        ln_moment / f64::from(order - 1)
    }
}

/// ln(eˣ − 1) for x ≥ 0.
fn ln_exp_m1(x: f64) -> f64 {
    if x > 1.0 {
        x + (-(-x).exp()).ln_1p()
    } else {
        x.exp_m1().ln()
    }
}

/// ln(n!) for n up to the largest order, added up with compensation (Kahan).
static LN_FACTORIAL: LazyLock<Vec<f64>> = LazyLock::new(|| {
    let (mut sum, mut lost) = (0.0_f64, 0.0_f64);
    let mut table = vec![0.0];
    for n in 1..=ORDERS[ORDERS.len() - 1] {
        let term = f64::from(n).ln() - lost;
        let next = sum + term;
        lost = (next - sum) - term;
        sum = next;
        table.push(sum);
    }
    table
});

#[cfg(test)]
mod tests {
    use theriac_protocol::units::Delta;

    use super::*;

    fn mechanism(sigma: f64, rate: f64) -> SubsampledGaussian {
        SubsampledGaussian::new(
            NoiseMultiplier::new(sigma).unwrap(),
            SamplingRate::new(rate).unwrap(),
        )
    }

    /// The formula as it is printed, for small orders where nothing overflows.
    fn by_the_formula(sigma: f64, q: f64, order: u32) -> f64 {
        let choose = |k: u32| (1..=k).fold(1.0, |c, i| c * f64::from(order - k + i) / f64::from(i));
        let sum: f64 = (0..=order)
            .map(|k| {
                let pairs = f64::from(k) * (f64::from(k) - 1.0) / 2.0;
                choose(k)
                    * (1.0 - q).powf(f64::from(order - k))
                    * q.powf(f64::from(k))
                    * (pairs / sigma / sigma).exp()
            })
            .sum();
        sum.ln() / f64::from(order - 1)
    }

    #[test]
    fn rdp_is_the_printed_formula() {
        for (sigma, q) in [(0.7, 0.3), (1.27, 0.03), (4.0, 0.5), (2.0, 0.999)] {
            let curve = mechanism(sigma, q).rdp();
            for order in [2_u32, 3, 5, 8, 13] {
                let (found, expected) = (
                    curve.values()[order as usize - 2],
                    by_the_formula(sigma, q, order),
                );
                assert!(
                    (found / expected - 1.0).abs() < 1e-11,
                    "σ {sigma}, q {q}, order {order}: {found} {expected}"
                );
            }
        }
    }

    #[test]
    fn digits_survive_a_tiny_rate() {
        // To second order in q, RDP(2) = q² (e^{1/σ²} − 1).
        for q in [1e-6, 1e-9, 1e-12] {
            let found = mechanism(1.0, q).rdp().values()[0];
            let expected = q * q * 1.0_f64.exp_m1();
            assert!((found / expected - 1.0).abs() < 1e-9, "q {q}: {found} {expected}");
        }
    }

    #[test]
    fn full_rate_is_the_closed_form_and_the_limit() {
        let full = mechanism(2.0, 1.0).rdp();
        for (value, order) in full.values().iter().zip(ORDERS) {
            assert!((value / (f64::from(order) / 8.0) - 1.0).abs() < 1e-14);
        }
        let nearly = mechanism(2.0, 1.0 - 1e-12).rdp();
        assert!((nearly.values()[5] / full.values()[5] - 1.0).abs() < 1e-9);
    }

    #[test]
    fn sensitivity_divides_the_noise() {
        let twice = mechanism(3.0, 0.1).with_sensitivity(2.0).unwrap();
        assert_eq!(twice, mechanism(1.5, 0.1));
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(mechanism(1.0, 0.1).with_sensitivity(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn rates_outside_their_range_are_refused() {
        for bad in [0.0, -0.1, 1.000_1, f64::NAN, f64::INFINITY] {
            assert!(
                matches!(SamplingRate::new(bad), Err(MechanismError::Rate(_))),
                "{bad}"
            );
        }
    }

    #[test]
    fn no_noise_and_no_rate_give_no_nan() {
        for sigma in [1e-300, 1e-160, 1e-3, 0.3, 1e3, 1e150, 1e300] {
            for q in [f64::MIN_POSITIVE, 1e-30, 1e-6, 0.5, 1.0 - f64::EPSILON, 1.0] {
                let curve = mechanism(sigma, q).rdp().times(u64::MAX);
                assert!(curve.values().iter().all(|v| *v >= 0.0), "σ {sigma}, q {q}");
                for d in [f64::MIN_POSITIVE, 1e-6, 0.999] {
                    let found = curve.epsilon(Delta::new(d).unwrap());
                    assert!(found.epsilon >= 0.0, "σ {sigma}, q {q}, δ {d}: {found:?}");
                }
            }
        }
        assert!(!mechanism(1e-300, 0.5).rdp().is_finite());
    }
}
