//! What came of actions, by service and action: the evidence on which a policy may let a node act by itself.
//!
//! | | counts as |
//! |---|---|
//! | verified as healed; in `observe`, a new process by other hands after which the service served | right |
//! | verified as without effect, or failed; declined by a person; trouble that went away while the action waited for approval, or was only observed | wrong |
//! | harm | harm, and wrong |
//!
//! What nobody could observe counts as nothing. So does an action that was only written down, unless it is a start or restart and what
//! became of the trouble without it tells: of others it cannot be seen whether somebody else did them.
//!
//! A record is of the action as it was configured: with another program or address it begins anew.

use serde::{Deserialize, Serialize};

use crate::types::ActionKind;

/// The record of one action on one service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// The service.
    pub service: String,
    /// The action.
    pub action: ActionKind,
    /// A digest of what people configured the action to be, see [`crate::policy::HealPolicy::target_digests`]; `None` where there is nothing
    /// to configure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of: Option<String>,
    /// What came of it.
    pub counts: Counts,
}

/// What came of decisions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counts {
    /// It was the right thing.
    pub right: u32,
    /// It was not, harm included.
    pub wrong: u32,
    /// It did harm.
    pub harm: u32,
}

/// What came of one decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Came {
    Right,
    Wrong,
    Harm,
}

impl Counts {
    /// Whether this is enough to act without a person: at least [`DECISIONS_MIN`] decisions, no harm, and the lower end of the one-sided
    /// 95 % interval of the share of right ones at least [`SHARE_MIN`].
    pub fn suffice(&self) -> bool {
        self.harm == 0 && self.decisions() >= DECISIONS_MIN && self.lower() >= SHARE_MIN
    }

    /// Decisions of which it is known what came of them.
    pub fn decisions(&self) -> u32 {
        self.right.saturating_add(self.wrong)
    }

    /// Lower end of the one-sided 95 % interval of the share of right decisions (Clopper and Pearson 1934): the share at which so many right
    /// ones or more have a chance of 5 %. 0 without decisions.
    pub fn lower(&self) -> f64 {
        if self.right == 0 {
            return 0.0;
        }
        let (mut low, mut high) = (0.0, 1.0);
        for _ in 0..60 {
            let share = f64::midpoint(low, high);
            if at_least(self.right, self.decisions(), share) < 0.05 {
                low = share;
            } else {
                high = share;
            }
        }
        low
    }

    pub(crate) fn add(&mut self, came: Came) {
        match came {
            Came::Right => self.right = self.right.saturating_add(1),
            Came::Wrong => self.wrong = self.wrong.saturating_add(1),
            Came::Harm => {
                self.wrong = self.wrong.saturating_add(1);
                self.harm = self.harm.saturating_add(1);
            }
        }
    }
}

/// Chance of `right` or more of `of` when each is right with the chance `share`, 0 < `share` < 1.
fn at_least(right: u32, of: u32, share: f64) -> f64 {
    let (log_yes, log_no) = (share.ln(), (1.0 - share).ln());
    let mut choose = 0.0_f64;
    let mut sum = 0.0;
    // From all right downwards, so that the binomial coefficient is a running product.
    for wrong in 0..=of.saturating_sub(right) {
        if wrong > 0 {
            choose += (f64::from(of - wrong + 1) / f64::from(wrong)).ln();
        }
        sum += (choose + f64::from(of - wrong) * log_yes + f64::from(wrong) * log_no).exp();
    }
    sum
}

/// Decisions before which none suffice.
pub const DECISIONS_MIN: u32 = 30;
/// Share of right ones that must be certain.
pub const SHARE_MIN: f64 = 0.9;

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(right: u32, wrong: u32, harm: u32) -> Counts {
        Counts { right, wrong, harm }
    }

    #[test]
    fn the_lower_end_is_that_of_clopper_and_pearson() {
        // scipy.stats.beta.ppf(0.05, k, n - k + 1)
        for (right, wrong, expected) in [
            (30, 0, 0.904_966),
            (29, 1, 0.851_404),
            (45, 1, 0.900_8),
            (5, 5, 0.222_441),
        ] {
            let found = counts(right, wrong, 0).lower();
            assert!((found - expected).abs() < 2e-3, "{right} {wrong}: {found}");
        }
        assert!(counts(0, 5, 0).lower().abs() < 1e-12 && counts(0, 0, 0).lower().abs() < 1e-12);
    }

    #[test]
    fn thirty_right_ones_suffice_and_one_harm_or_too_few_do_not() {
        assert!(counts(30, 0, 0).suffice());
        assert!(!counts(29, 0, 0).suffice() && !counts(30, 1, 0).suffice());
        assert!(!counts(1_000, 1, 1).suffice());
        assert!(counts(100, 2, 0).suffice());
    }
}
