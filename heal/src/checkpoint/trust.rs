//! How far a predictor's word goes, by what came of the last ones: recall, precision, and the ratio of failures to claims.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Events that count: the latest failures for recall, the latest warnings for precision.
pub const EVENTS: usize = 20;
/// Failures before any recall is believed.
pub const EVENTS_MIN: usize = 5;
/// One-sided 90 %.
const Z: f64 = 1.281_551_565_544_600_4;
/// Claims count at most so many times what they say.
const CALIBRATION_MAX: f64 = 4.0;

/// A warning that has ended: the predictor claimed a hazard well above the usual one for a while.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Warning {
    /// Failures that it claimed: the integral of the hazard while it lasted.
    pub claimed: f64,
    /// Whether the service failed in it.
    pub hit: bool,
}

/// The record of one predictor on one service.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Trust {
    /// The latest failures, oldest first: whether a warning had come at least a checkpoint's time before.
    failures: VecDeque<bool>,
    /// The latest warnings, oldest first.
    warnings: VecDeque<Warning>,
}

impl Trust {
    /// The service failed; `foretold` when a warning had begun at least a checkpoint's time before.
    pub(super) fn failed(&mut self, foretold: bool) {
        push(&mut self.failures, foretold);
    }

    /// A warning ended.
    pub(super) fn warned(&mut self, warning: Warning) {
        let claimed = if warning.claimed.is_finite() {
            warning.claimed.max(0.0)
        } else {
            0.0
        };
        push(&mut self.warnings, Warning { claimed, ..warning });
    }

    /// Share of the latest failures that were foretold, 0 to 1; `None` before [`EVENTS_MIN`] failures.
    pub fn recall(&self) -> Option<f64> {
        let hits = self.failures.iter().filter(|foretold| **foretold).count();
        (self.failures.len() >= EVENTS_MIN).then(|| hits as f64 / self.failures.len() as f64)
    }

    /// The lower end of the recall, one-sided 90 % (Wilson 1927, score interval); 0 before [`EVENTS_MIN`] failures.
    pub fn recall_low(&self) -> f64 {
        let n = self.failures.len() as f64;
        self.recall().map_or(0.0, |share| {
            let z2 = Z * Z;
            let middle = share + z2 / (2.0 * n);
            let half = Z * (share * (1.0 - share) / n + z2 / (4.0 * n * n)).sqrt();
            ((middle - half) / (1.0 + z2 / n)).clamp(0.0, 1.0)
        })
    }

    /// Share of the latest warnings in which the service failed, 0 to 1; `None` before the first.
    pub fn precision(&self) -> Option<f64> {
        let hits = self.warnings.iter().filter(|warning| warning.hit).count();
        (!self.warnings.is_empty()).then(|| hits as f64 / self.warnings.len() as f64)
    }

    /// What a claimed hazard is multiplied by, 0 to 4: failures within the latest warnings per failure claimed, with one failure in
    /// two claimed as the prior (the mean of a Gamma posterior).
    pub fn calibration(&self) -> f64 {
        let hits = self.warnings.iter().filter(|warning| warning.hit).count() as f64;
        let claimed: f64 = self.warnings.iter().map(|warning| warning.claimed).sum();
        ((hits + 1.0) / (claimed + 2.0)).min(CALIBRATION_MAX)
    }

    /// A record from a file may be longer than ours, or hold what is no number.
    pub(super) fn checked(mut self) -> Self {
        let warnings = std::mem::take(&mut self.warnings);
        for warning in warnings {
            self.warned(warning);
        }
        let failures = std::mem::take(&mut self.failures);
        for foretold in failures {
            self.failed(foretold);
        }
        self
    }
}

fn push<T>(list: &mut VecDeque<T>, value: T) {
    list.push_back(value);
    while list.len() > EVENTS {
        list.pop_front();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(failures: &[bool]) -> Trust {
        let mut trust = Trust::default();
        for foretold in failures {
            trust.failed(*foretold);
        }
        trust
    }

    #[test]
    fn no_recall_is_believed_before_five_failures() {
        assert_eq!(after(&[true; 4]).recall(), None);
        assert!(after(&[true; 4]).recall_low().abs() < 1e-12);
        assert!(after(&[true; 5]).recall_low() > 0.7);
    }

    #[test]
    fn lower_end_of_recall_is_wilsons() {
        let mut failures = [true; 20];
        failures[..6].fill(false);
        // Python's statistics.NormalDist().inv_cdf(0.9) in Wilson's formula, 14 of 20.
        assert!((after(&failures).recall_low() - 0.557_674_584_3).abs() < 1e-9);
        assert!(after(&[false; 20]).recall_low().abs() < 1e-12);
    }

    #[test]
    fn only_the_latest_twenty_count() {
        let mut trust = after(&[true; 20]);
        for _ in 0..20 {
            trust.failed(false);
        }
        assert_eq!(trust.recall(), Some(0.0));
    }

    #[test]
    fn a_predictor_that_cries_wolf_is_believed_less_with_each_warning() {
        let mut trust = Trust::default();
        let mut last = trust.calibration();
        assert!((last - 0.5).abs() < 1e-12);
        for _ in 0..20 {
            trust.warned(Warning {
                claimed: 1.2,
                hit: false,
            });
            assert!(trust.calibration() < last);
            last = trust.calibration();
        }
        assert!(last < 0.04 && trust.precision() == Some(0.0));
    }

    #[test]
    fn numbers_that_are_none_claim_nothing() {
        let mut trust = Trust::default();
        trust.warned(Warning {
            claimed: f64::NAN,
            hit: false,
        });
        assert!((trust.calibration() - 0.5).abs() < 1e-12);
    }
}
