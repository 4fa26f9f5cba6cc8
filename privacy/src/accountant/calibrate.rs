//! The least noise for a promise.

use theriac_protocol::units::{Delta, Epsilon, NoiseMultiplier};

use super::gaussian::SamplingRate;
use crate::ledger::loss::Loss;

/// The least noise multiplier σ (to one part in 10⁹, never below) with which `steps` steps at rate `rate`, of a sensitivity of `sensitivity`·C, keep the
/// ledger's figure within `epsilon` at `delta`: the ledger takes it. `None` when no σ up to 10⁹ does.
///
/// Bisection on ln σ: the RDP of every order falls as σ grows.
pub fn calibrated_noise_multiplier(
    epsilon: Epsilon,
    delta: Delta,
    rate: SamplingRate,
    steps: u32,
    sensitivity: f64,
) -> Option<NoiseMultiplier> {
    let fits = |log_sigma: f64| {
        NoiseMultiplier::new(log_sigma.exp()).is_ok_and(|sigma| {
            // As the ledger counts: what it calibrates must also be charged.
            let loss = Loss::gaussian(sensitivity, sigma.value(), rate.value(), steps);
            loss.epsilon(delta).epsilon <= epsilon.value()
        })
    };
    let (mut low, mut high) = SIGMA_LN;
    if !fits(high) {
        return None;
    }
    while high - low > 1e-9 {
        let middle = f64::midpoint(low, high);
        if fits(middle) { high = middle } else { low = middle }
    }
    NoiseMultiplier::new(high.exp()).ok().filter(|_| fits(high))
}

/// ln of the least and the largest σ that is tried: 10⁻⁹ and 10⁹.
const SIGMA_LN: (f64, f64) = (-20.723_265_836_946_41, 20.723_265_836_946_41);

#[cfg(test)]
mod tests {
    use super::*;

    fn sigma(epsilon: f64, rate: f64, steps: u32) -> Option<f64> {
        let rate = SamplingRate::new(rate).unwrap();
        calibrated_noise_multiplier(
            Epsilon::new(epsilon).unwrap(),
            Delta::new(1e-6).unwrap(),
            rate,
            steps,
            1.0,
        )
        .map(NoiseMultiplier::value)
    }

    /// The table of the privacy design, at δ = 1e-6; the RDP accountant there has more orders, so a little less noise.
    #[test]
    fn noise_is_that_of_the_published_table() {
        for (epsilon, rate, steps, tabled) in [
            (1.0, 1.0, 1, 4.54),
            (4.0, 1.0, 1, 1.27),
            (4.0, 1.0, 20, 5.69),
            (4.0, 64.0 / 2160.0, 700, 1.28),
            (1.0, 64.0 / 2160.0, 700, 3.71),
            (4.0, 1.0, 90, 12.0),
        ] {
            let found = sigma(epsilon, rate, steps).unwrap();
            assert!(
                found > tabled * 0.98 && found < tabled * 1.03,
                "ε {epsilon}, q {rate}, {steps} steps: {found}, tabled {tabled}"
            );
        }
    }

    #[test]
    fn less_noise_would_break_the_promise() {
        let delta = Delta::new(1e-6).unwrap();
        let found = sigma(4.0, 0.03, 700).unwrap();
        let epsilon = |sigma: f64| Loss::gaussian(1.0, sigma, 0.03, 700).epsilon(delta).epsilon;
        assert!(epsilon(found) <= 4.0 && epsilon(found * (1.0 - 3e-9)) > 4.0);
    }

    #[test]
    fn a_budget_that_no_noise_keeps_has_no_answer() {
        assert_eq!(sigma(1e-300, 1.0, u32::MAX), None);
    }
}
