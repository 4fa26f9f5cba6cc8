//! Cool-downs and budgets over sliding windows, on the monotonic clock alone. A restart of the node, a new boot or a set wall
//! clock can only make them stricter.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::policy::{HealPolicy, NodeBudget};
use crate::types::ActionKind;

/// One action that was charged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Charge {
    /// The service.
    pub service: String,
    /// What was to be done.
    pub action: ActionKind,
    /// When, milliseconds on the monotonic clock, rounded up.
    pub at_ms: u64,
}

/// The charges that may still count.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ledger {
    charges: Vec<Charge>,
}

/// Why an action has to wait or may not be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// It may be done at this moment.
    CoolingDown { until: Duration },
    /// The service's budget is spent.
    ServiceSpent { max: u32, window: Duration },
    /// The node's budget is spent.
    NodeSpent { max: u32, window: Duration },
}

impl Ledger {
    /// Charges from an earlier run. On another clock nothing is known of their age, so they count as made now.
    pub(crate) fn restore(charges: Vec<Charge>, same_clock: bool, now: Duration) -> Self {
        let now_ms = ceil_ms(now);
        let charges = charges
            .into_iter()
            .map(|charge| {
                let at_ms = if same_clock {
                    charge.at_ms.min(now_ms)
                } else {
                    now_ms
                };
                Charge { at_ms, ..charge }
            })
            .collect();
        Self { charges }
    }

    pub(crate) fn charges(&self) -> &[Charge] {
        &self.charges
    }

    /// Exactly these charges.
    pub(crate) fn of(charges: Vec<Charge>) -> Self {
        Self { charges }
    }

    /// Actions of one kind on a service within a window.
    pub(crate) fn of_action(
        &self,
        service: &str,
        action: ActionKind,
        window: Duration,
        now: Duration,
    ) -> u32 {
        self.count(now, window, |charge| {
            charge.service == service && charge.action == action
        })
    }

    /// Actions on a service, and on all, within their windows.
    pub(crate) fn spent(
        &self,
        service: &str,
        policy: &HealPolicy,
        node: NodeBudget,
        now: Duration,
    ) -> (u32, u32) {
        (
            self.count(now, policy.window, |charge| charge.service == service),
            self.count(now, node.window, |_| true),
        )
    }

    /// Whether one more action is allowed now, with the service's own cool-down.
    #[cfg(test)]
    pub(crate) fn allows(
        &self,
        service: &str,
        action: ActionKind,
        policy: &HealPolicy,
        node: NodeBudget,
        now: Duration,
    ) -> Result<(), Refusal> {
        self.allows_after(service, action, policy, policy.cooldown, node, now)
    }

    /// Whether one more action is allowed now.
    pub(crate) fn allows_after(
        &self,
        service: &str,
        action: ActionKind,
        policy: &HealPolicy,
        cooldown: Duration,
        node: NodeBudget,
        now: Duration,
    ) -> Result<(), Refusal> {
        if self.count(now, policy.window, |charge| charge.service == service) >= policy.max_actions {
            return Err(Refusal::ServiceSpent {
                max: policy.max_actions,
                window: policy.window,
            });
        }
        if self.count(now, node.window, |_| true) >= node.max_actions {
            return Err(Refusal::NodeSpent {
                max: node.max_actions,
                window: node.window,
            });
        }
        let last = self
            .charges
            .iter()
            .filter(|c| c.service == service && c.action == action)
            .map(|c| c.at_ms)
            .max();
        match last.map(|at_ms| Duration::from_millis(at_ms).saturating_add(cooldown)) {
            Some(until) if until > now => Err(Refusal::CoolingDown { until }),
            _ => Ok(()),
        }
    }

    /// Charges an action and forgets charges older than `keep`, the longest window or cool-down in use.
    pub(crate) fn charge(&mut self, service: &str, action: ActionKind, now: Duration, keep: Duration) {
        self.charges.retain(|charge| age(charge, now) <= keep);
        self.charges.push(Charge {
            service: service.to_owned(),
            action,
            at_ms: ceil_ms(now),
        });
    }

    /// Takes the last charge of an action back that could not be recorded and so was never carried out.
    pub(crate) fn take_back(&mut self, service: &str, action: ActionKind) {
        let of_it = |charge: &Charge| charge.service == service && charge.action == action;
        if let Some(at) = self.charges.iter().rposition(of_it) {
            self.charges.remove(at);
        }
    }

    /// How long until fewer than `max` of those charges are within the window.
    pub(crate) fn frees_in(
        &self,
        now: Duration,
        window: Duration,
        max: u32,
        which: impl Fn(&Charge) -> bool,
    ) -> Duration {
        let mut ages: Vec<Duration> = self
            .charges
            .iter()
            .filter(|charge| which(charge))
            .map(|charge| age(charge, now))
            .filter(|age| *age <= window)
            .collect();
        ages.sort_unstable();
        // The youngest `max - 1` may stay.
        let leaves = usize::try_from(max).unwrap_or(usize::MAX).saturating_sub(1);
        let next = ages.get(leaves).copied();
        next.map_or(Duration::ZERO, |age| window.saturating_sub(age))
    }

    fn count(&self, now: Duration, window: Duration, which: impl Fn(&Charge) -> bool) -> u32 {
        let count = self
            .charges
            .iter()
            .filter(|charge| which(charge) && age(charge, now) <= window)
            .count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }
}

fn age(charge: &Charge, now: Duration) -> Duration {
    now.saturating_sub(Duration::from_millis(charge.at_ms))
}

fn ceil_ms(at: Duration) -> u64 {
    u64::try_from(at.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_hours(1);

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn policy(max_actions: u32, cooldown: u64) -> HealPolicy {
        HealPolicy {
            max_actions,
            cooldown: at(cooldown),
            ..HealPolicy::default()
        }
    }

    #[test]
    fn a_spent_budget_frees_when_enough_charges_are_older_than_its_window() {
        let mut ledger = Ledger::default();
        for (service, second) in [("a", 100), ("b", 150), ("a", 200), ("a", 300)] {
            ledger.charge(service, ActionKind::Start, at(second), HOUR);
        }
        let of_a = |charge: &Charge| charge.service == "a";
        let frees_in = |max, now| ledger.frees_in(at(now), HOUR, max, of_a);
        assert_eq!(frees_in(3, 400), at(3_300), "the first of three has to go");
        assert_eq!(frees_in(2, 400), at(3_400));
        assert_eq!(frees_in(4, 400), Duration::ZERO);
        assert_eq!(frees_in(1, 3_900), Duration::ZERO, "at its very end");
        assert_eq!(frees_in(1, 9_000), Duration::ZERO);
    }

    #[test]
    fn cool_down_is_per_service_and_action() {
        let (policy, node) = (policy(10, 60), NodeBudget::default());
        let mut ledger = Ledger::default();
        ledger.charge("a", ActionKind::Start, at(100), HOUR);
        let allows = |service, action, now| ledger.allows(service, action, &policy, node, now);
        assert_eq!(
            allows("a", ActionKind::Start, at(159)),
            Err(Refusal::CoolingDown { until: at(160) })
        );
        assert_eq!(allows("a", ActionKind::Start, at(160)), Ok(()));
        assert_eq!(allows("a", ActionKind::Restart, at(101)), Ok(()));
        assert_eq!(allows("b", ActionKind::Start, at(101)), Ok(()));
    }

    #[test]
    fn the_budget_counts_a_sliding_window() {
        let (policy, node) = (policy(2, 0), NodeBudget::default());
        let mut ledger = Ledger::default();
        ledger.charge("a", ActionKind::Start, at(0), HOUR);
        ledger.charge("a", ActionKind::Restart, at(1000), HOUR);
        let refused = Err(Refusal::ServiceSpent { max: 2, window: HOUR });
        assert_eq!(
            ledger.allows("a", ActionKind::Start, &policy, node, at(3600)),
            refused
        );
        assert_eq!(
            ledger.allows("a", ActionKind::Start, &policy, node, at(3601)),
            Ok(())
        );
    }

    #[test]
    fn the_node_budget_counts_all_services() {
        let (policy, node) = (
            policy(10, 0),
            NodeBudget {
                max_actions: 2,
                window: HOUR,
            },
        );
        let mut ledger = Ledger::default();
        ledger.charge("a", ActionKind::Start, at(0), HOUR);
        ledger.charge("b", ActionKind::Start, at(0), HOUR);
        let refused = Err(Refusal::NodeSpent { max: 2, window: HOUR });
        assert_eq!(
            ledger.allows("c", ActionKind::Start, &policy, node, at(1)),
            refused
        );
    }

    #[test]
    fn charges_from_another_clock_count_as_made_now() {
        let (policy, node) = (policy(1, 0), NodeBudget::default());
        let mut ledger = Ledger::default();
        ledger.charge("a", ActionKind::Start, at(0), HOUR);
        let charges = ledger.charges().to_vec();
        let later = at(900_000);
        let other = Ledger::restore(charges.clone(), false, later);
        assert!(
            other
                .allows("a", ActionKind::Restart, &policy, node, later + HOUR)
                .is_err()
        );
        assert!(
            other
                .allows("a", ActionKind::Restart, &policy, node, later + HOUR + at(1))
                .is_ok()
        );
        let same = Ledger::restore(charges.clone(), true, at(10));
        assert!(
            same.allows("a", ActionKind::Restart, &policy, node, at(3601))
                .is_ok()
        );
        let behind = Ledger::restore(
            vec![Charge {
                at_ms: 50_000,
                ..charges[0].clone()
            }],
            true,
            at(10),
        );
        assert_eq!(
            behind.charges()[0].at_ms,
            10_000,
            "a charge cannot lie in the future"
        );
    }

    #[test]
    fn forgets_what_cannot_count_any_more() {
        let mut ledger = Ledger::default();
        for second in 0..10_000 {
            ledger.charge("a", ActionKind::Start, at(second), at(100));
        }
        assert!(ledger.charges().len() <= 102);
    }
}
