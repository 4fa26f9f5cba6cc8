//! How much privacy releases cost: Rényi curves of the (subsampled) Gaussian, privacy loss distributions, and zero-concentrated
//! differential privacy (zCDP), with their conversions to (ε, δ).
//!
//! The ledger charges [`RdpCurve`]s. ρ, told of below, is what the noise is checked by when a release is made and how charges of
//! ledger files of version 1 are read; what is said of composition holds for curves alike.
//!
//! **Mechanism.** A sum with L2 sensitivity `s·C` (under add or remove one unit, see [`crate::policy::PrivacyUnit`]) is released with Gaussian
//! noise of standard deviation `σ·C`. That is ρ-zCDP with `ρ = s² / (2σ²)` (Bun and Steinke 2016, proposition 1.6; for the discrete
//! Gaussian Canonne, Kamath and Steinke 2020, theorem 4).
//!
//! **Sequential composition.** Releases that read the same unit add their ρ, also when later ones are chosen by
//! what earlier ones showed.
//!
//! **Parallel composition.** A block's vector enters only the releases whose plan names the block. For two data sets that
//! differ in block `b`, every other release has, given the earlier outputs, the same distribution on both. So
//! the whole sequence costs block `b` only the ρ of the releases that name it, and each block's loss is
//! bounded by its own sum. The node's figure is the **largest sum over all blocks**. Which blocks a plan names may depend on time and
//! on earlier outputs, never on un-noised data.
//!
//! **Conversion.** For every α > 1, ρ-zCDP gives (ε, δ) with
//! `ε = αρ + ln(1 − 1/α) − (ln δ + ln α)/(α − 1)` (Canonne, Kamath and Steinke 2020, proposition 12, solved for ε).
//! Every α is a sound bound; we take the best one.

mod analytic;
mod calibrate;
mod fft;
mod gaussian;
mod loss;
mod normal;
mod pld;
mod rdp;
#[cfg(test)]
mod reference;

use std::fmt;

use theriac_protocol::units::{Delta, NoiseMultiplier};

pub use self::calibrate::calibrated_noise_multiplier;
pub use self::gaussian::{MechanismError, SamplingRate, SubsampledGaussian};
pub use self::pld::{Job, pld_epsilon};
pub use self::rdp::{ORDER_COUNT, ORDERS, RdpCurve, RdpEpsilon};

/// Privacy loss in zCDP: at least 0, possibly infinite, never NaN.
#[derive(Debug, Clone, Copy, Default, PartialEq, PartialOrd)]
pub struct Rho(f64);

impl Rho {
    /// Nothing was released.
    pub const ZERO: Self = Self(0.0);

    /// Takes a number; what is no loss at all (NaN, below 0) becomes infinite.
    pub fn new(value: f64) -> Self {
        if value >= 0.0 {
            Self(value)
        } else {
            Self(f64::INFINITY)
        }
    }

    /// Cost of one Gaussian release: sensitivity `sensitivity`·C, noise of standard deviation `noise_multiplier`·C.
    /// A margin of one millionth covers the rounding that the noise library charges for its grid.
    pub fn gaussian(sensitivity: f64, noise_multiplier: NoiseMultiplier) -> Self {
        let ratio = sensitivity / noise_multiplier.value();
        Self::new(ratio * ratio / 2.0 * (1.0 + MARGIN))
    }

    /// Cost of two releases that read the same unit.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self::new(self.0 + other.0)
    }

    /// The larger one.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        if other.0 > self.0 { other } else { self }
    }

    /// The plain number.
    pub fn value(self) -> f64 {
        self.0
    }

    /// The smallest ε that this conversion can prove at `delta`. Infinite when ρ is; never NaN.
    pub fn epsilon(self, delta: Delta) -> f64 {
        let (rho, delta) = (self.0, delta.value());
        if !rho.is_finite() {
            return f64::INFINITY;
        }
        // Total variation is at most sqrt(1 - exp(-KL)) (Bretagnolle and Huber), and KL is at most rho.
        if delta * delta + (-rho).exp_m1() > 0.0 || rho == 0.0 {
            return 0.0;
        }
        let bound = |log_order: f64| epsilon_at_order(rho, delta, log_order);
        let middle = 0.5 * (-delta.ln() / rho).ln();
        let best = golden_minimum(bound, middle - 8.0, middle + 8.0, 80).value;
        // One part in 10^12 upwards, so that rounding never favours us.
        let epsilon = best.max(0.0) * (1.0 + 1e-12);
        if epsilon.is_nan() { f64::INFINITY } else { epsilon }
    }
}

impl fmt::Display for Rho {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The bound at α = 1 + exp(`log_order`).
fn epsilon_at_order(rho: f64, delta: f64, log_order: f64) -> f64 {
    let above_one = log_order.exp();
    let order = 1.0 + above_one;
    order * rho - (1.0 / above_one).ln_1p() - (delta.ln() + above_one.ln_1p()) / above_one
}

/// Where golden-section search ends.
#[derive(Debug, Clone, Copy)]
struct Minimum {
    /// The middle of what is left of the range.
    at: f64,
    /// The least value that was seen in the last step.
    value: f64,
}

/// The least value of `f` that `steps` steps of golden-section search find in `[low, high]`.
fn golden_minimum(f: impl Fn(f64) -> f64, mut low: f64, mut high: f64, steps: u32) -> Minimum {
    const RATIO: f64 = 0.618_033_988_749_894_9;
    let (mut left, mut right) = (high - RATIO * (high - low), low + RATIO * (high - low));
    let (mut at_left, mut at_right) = (f(left), f(right));
    for _ in 0..steps {
        if at_left <= at_right {
            (high, right, at_right) = (right, left, at_left);
            left = high - RATIO * (high - low);
            at_left = f(left);
        } else {
            (low, left, at_left) = (left, right, at_right);
            right = low + RATIO * (high - low);
            at_right = f(right);
        }
    }
    Minimum {
        at: f64::midpoint(low, high),
        value: at_left.min(at_right),
    }
}

/// Relative margin on every charge; see [`Rho::gaussian`].
const MARGIN: f64 = 1e-6;

#[cfg(test)]
mod tests {
    use opendp::combinators::make_zCDP_to_approxDP;
    use opendp::domains::{AtomDomain, VectorDomain};
    use opendp::measurements::make_gaussian;
    use opendp::measures::ZeroConcentratedDivergence;
    use opendp::metrics::L2Distance;

    use theriac_protocol::units::Epsilon;

    use super::*;
    use crate::ledger::loss::Loss;

    fn delta(value: f64) -> Delta {
        Delta::new(value).unwrap()
    }

    fn sigma(value: f64) -> NoiseMultiplier {
        NoiseMultiplier::new(value).unwrap()
    }

    #[test]
    fn epsilon_agrees_with_opendp() {
        for scale in [0.5, 0.7, 1.27, 2.0, 4.54, 20.0] {
            for d in [1e-4, 1e-6, 1e-9] {
                let domain = VectorDomain::new(AtomDomain::<f64>::new_non_nan()).with_size(10);
                let gaussian = make_gaussian::<_, _, ZeroConcentratedDivergence>(
                    domain,
                    L2Distance::<f64>::default(),
                    scale,
                    Some(-40),
                )
                .unwrap();
                let theirs = make_zCDP_to_approxDP(gaussian)
                    .unwrap()
                    .map(&1.0)
                    .unwrap()
                    .epsilon(d)
                    .unwrap();
                let ours = Rho::gaussian(1.0, sigma(scale)).epsilon(delta(d));
                assert!(
                    (ours / theirs - 1.0).abs() < 1e-5,
                    "sigma {scale}, delta {d}: {ours} against {theirs}"
                );
            }
        }
    }

    /// Full-batch rows (q = 1, L2 sensitivity 1, add or remove one) of Google's dp-accounting 0.6.0: σ, steps, δ, exact ε
    /// of the analytic Gaussian, ε of its RDP accountant. Always checked, also in a clone without the whole table.
    const REFERENCE: [(f64, f64, f64, f64, f64); 10] = [
        (0.5, 1.0, 1e-5, 9.997_256_146, 10.725_509_697),
        (0.6, 10.0, 1e-6, 38.230_858_808, 40.206_993_975),
        (0.7, 10.0, 1e-6, 30.996_793_828, 32.667_010_822),
        (0.8, 1000.0, 1e-6, 968.201_454_583, 994.179_108_509),
        (1.0, 1000.0, 1e-5, 633.929_851_335, 654.861_260_072),
        (1.6, 10.0, 1e-5, 9.852_385_331, 10.570_822_197),
        (2.0, 100.0, 1e-5, 33.103_732_335, 35.081_754_02),
        (3.0, 100.0, 1e-5, 19.130_767_834, 20.392_520_21),
        (5.0, 10.0, 1e-5, 2.594_383_38, 2.813_653_248),
        (10.0, 1000.0, 1e-5, 17.856_586_83, 19.053_597_532),
    ];

    #[test]
    fn epsilon_lies_between_the_exact_value_and_the_rdp_accountant() {
        for (noise, steps, d, exact, rdp) in REFERENCE {
            let one = Rho::gaussian(1.0, sigma(noise)).value();
            let ours = Rho::new(one * steps).epsilon(delta(d));
            assert!(
                exact <= ours && ours <= rdp * (1.0 + 2e-6),
                "sigma {noise}, {steps} steps, delta {d}: {ours}, exact {exact}, accountant {rdp}"
            );
        }
    }

    /// Rows with q = 1 of dp-accounting 0.6.0: never below the optimistic bound nor the exact value, and near the exact one.
    #[test]
    fn epsilon_is_never_below_the_reference() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../shared/reference/dp_accounting_epsilon.json"
        );
        let Ok(text) = std::fs::read_to_string(path) else {
            eprintln!(
                "left out: the 71 recorded dp-accounting rows are not here ({path}); the rows above were checked"
            );
            return;
        };
        let reference: serde_json::Value = serde_json::from_str(&text).unwrap();
        let mut rows = 0;
        for row in reference["rows"].as_array().unwrap() {
            let number = |key: &str| row[key].as_f64();
            if number("q") != Some(1.0) {
                continue;
            }
            rows += 1;
            let one = Rho::gaussian(1.0, sigma(number("sigma").unwrap())).value();
            let ours = Rho::new(one * number("steps").unwrap()).epsilon(delta(number("delta").unwrap()));
            for floor in ["eps_pld_low", "eps_exact_q1"] {
                if let Some(floor) = number(floor) {
                    assert!(ours >= floor, "{ours} is below {floor} in {row}");
                }
            }
            // Their accountant does the same conversion on a list of orders, so the best order is at most theirs.
            let rdp = number("eps_rdp").unwrap();
            assert!(
                ours <= rdp * (1.0 + 2e-6) + 1e-12,
                "{ours} is above {rdp} in {row}"
            );
        }
        assert_eq!(rows, 71);
    }

    /// Proposition 12 evaluated by brute force over orders: no order is better than the one we found.
    #[test]
    fn no_order_is_better_than_the_one_found() {
        for rho in [1e-9, 1e-4, 0.01, 0.5, 3.0, 100.0, 1e6] {
            for d in [1e-3, 1e-6, 1e-12] {
                let found = Rho::new(rho).epsilon(delta(d));
                for step in -4000..4000 {
                    let bound = epsilon_at_order(rho, d, f64::from(step) * 0.005);
                    assert!(
                        found <= bound.max(0.0) * (1.0 + 1e-9),
                        "rho {rho}, delta {d}, step {step}"
                    );
                }
            }
        }
    }

    #[test]
    fn overflow_is_infinite_and_never_nan() {
        let huge = Rho::gaussian(1.0, sigma(1e-200));
        assert!(huge.value().is_infinite() && huge.epsilon(delta(1e-6)).is_infinite());
        assert!(Rho::new(f64::NAN).value().is_infinite() && Rho::new(-1.0).value().is_infinite());
        assert!(
            huge.plus(huge).value().is_infinite()
                && Rho::new(f64::MAX).plus(Rho::new(f64::MAX)).value().is_infinite()
        );
        for rho in [0.0, f64::MIN_POSITIVE, 1e-300, 1e-17, 1e17, 1e300, f64::MAX] {
            for d in [f64::MIN_POSITIVE, 1e-300, 1e-6, 0.999_999] {
                let epsilon = Rho::new(rho).epsilon(delta(d));
                assert!(epsilon >= 0.0, "rho {rho}, delta {d}: {epsilon}");
            }
        }
    }

    #[test]
    fn noise_multiplier_is_the_least_that_fits() {
        // sigma of the design's table for one release at delta 1e-6, rounded to two decimals.
        for (epsilon, tabled) in [(1.0, 4.54), (2.0, 2.39), (4.0, 1.27), (8.0, 0.69)] {
            let target = Epsilon::new(epsilon).unwrap();
            let found = calibrated_noise_multiplier(target, delta(1e-6), SamplingRate::FULL, 1, 1.0).unwrap();
            assert!(
                (found.value() - tabled).abs() < 0.01,
                "epsilon {epsilon}: {found}, tabled {tabled}"
            );
            let charged = |sigma: NoiseMultiplier| {
                Loss::gaussian(1.0, sigma.value(), 1.0, 1)
                    .epsilon(delta(1e-6))
                    .epsilon
            };
            assert!(charged(found) <= epsilon && charged(sigma(found.value() * 0.999)) > epsilon);
        }
        let twenty = calibrated_noise_multiplier(
            Epsilon::new(4.0).unwrap(),
            delta(1e-6),
            SamplingRate::FULL,
            20,
            1.0,
        )
        .unwrap();
        assert!((twenty.value() - 5.672).abs() < 0.001, "{twenty}");
    }
}
