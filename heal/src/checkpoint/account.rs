//! What the schedule has cost, against what the plain Young/Daly interval would have cost over the same failures.
//!
//! The comparison is exact, not a forecast: when the service fails, it is known when Young/Daly would have taken its last
//! checkpoint. While the schedule is behind by more than its allowance the predictor is not heard, so that no predictor, however
//! wrong, can cost more than a hundredth above Young/Daly for long.

use serde::{Deserialize, Serialize};

/// Share of Young/Daly's cost that a predictor may cost more.
const ALLOWANCE: f64 = 0.01;
/// The most that may be behind, and the most that is saved up, in Young/Daly intervals; one is about the waste of one failure.
const SPAN: f64 = 10.0;

/// Running comparison with Young/Daly.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Account {
    /// Seconds ahead of Young/Daly; below zero: behind.
    credit_s: f64,
    /// The predictor is not heard.
    muted: bool,
    /// Young/Daly's unprotected work, in seconds.
    #[serde(skip)]
    theirs_s: f64,
    #[serde(skip)]
    their_cost_s: f64,
    #[serde(skip)]
    our_cost_s: f64,
}

impl Account {
    /// The service worked for `seconds`; Young/Daly takes a checkpoint of `cost_s` every `interval_s` of work.
    pub(super) fn worked(&mut self, seconds: f64, interval_s: f64, cost_s: f64) {
        self.theirs_s += seconds;
        if self.theirs_s >= interval_s {
            let taken = (self.theirs_s / interval_s).floor();
            self.their_cost_s += taken * cost_s;
            self.theirs_s = (self.theirs_s - taken * interval_s).max(0.0);
        }
    }

    /// So many of the seconds counted as work were a checkpoint for which the service stood still.
    pub(super) fn stood_still(&mut self, seconds: f64) {
        self.theirs_s = (self.theirs_s - seconds).max(0.0);
    }

    /// A checkpoint was taken, or failed, at this cost.
    pub(super) fn paid(&mut self, cost_s: f64) {
        self.our_cost_s += cost_s;
    }

    /// The service failed and lost `lost_s` seconds of work.
    pub(super) fn failed(&mut self, lost_s: f64, interval_s: f64) {
        let theirs = self.their_cost_s + self.theirs_s;
        let ours = self.our_cost_s + lost_s;
        let span = SPAN * interval_s;
        self.credit_s = (self.credit_s + theirs * (1.0 + ALLOWANCE) - ours).min(span);
        if self.credit_s <= -span {
            self.muted = true;
        } else if self.credit_s >= -span / 2.0 {
            self.muted = false;
        }
        (self.theirs_s, self.their_cost_s, self.our_cost_s) = (0.0, 0.0, 0.0);
    }

    /// Whether the predictor has cost too much to be heard.
    pub fn is_muted(&self) -> bool {
        self.muted
    }

    /// Seconds saved against Young/Daly so far, at most ten intervals; below zero: lost.
    pub fn credit_s(&self) -> f64 {
        self.credit_s
    }

    pub(super) fn checked(self) -> Self {
        Self {
            credit_s: if self.credit_s.is_finite() {
                self.credit_s
            } else {
                0.0
            },
            muted: self.muted,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_itself_is_never_behind() {
        let mut account = Account::default();
        for failure in 0..1_000_u32 {
            let work = 37.0 * f64::from(failure % 29);
            account.worked(work, 100.0, 3.0);
            account.paid(3.0 * (work / 100.0).floor());
            account.failed(work % 100.0, 100.0);
            assert!(account.credit_s() >= -1e-9 && !account.is_muted());
        }
    }

    #[test]
    fn one_that_is_behind_by_ten_intervals_is_muted_until_half_is_made_good() {
        let mut account = Account::default();
        let mut failures = 0;
        while !account.is_muted() {
            account.worked(50.0, 100.0, 3.0);
            account.failed(300.0, 100.0);
            failures += 1;
        }
        assert_eq!(failures, 5, "250 s behind each time, less a hundredth");
        while account.is_muted() {
            account.worked(50.0, 100.0, 3.0);
            account.failed(0.0, 100.0);
            failures += 1;
        }
        assert!(failures > 10 && account.credit_s() >= -500.0);
    }

    #[test]
    fn what_is_saved_up_has_an_end() {
        let mut account = Account::default();
        for _ in 0..100 {
            account.worked(99.0, 100.0, 3.0);
            account.failed(0.0, 100.0);
        }
        assert!((account.credit_s() - 1_000.0).abs() < 1e-9);
    }
}
