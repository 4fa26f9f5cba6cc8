//! The budgets of the fleet: a brake on what a node would do by itself, and slots for actions that the policy marks `shared`.
//!
//! Many sick nodes at once mean a common cause, so above a share of them nobody acts. What the fleet says only ever holds something back; whatever
//! is done is permitted by the node's own policy alone. A report that is old or impossible holds nothing back, and a hold ends with a person's
//! being told.

use std::fmt;
use std::time::Duration;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::evaluate::{Facts, Ruling, is_approved};
use super::{HealPolicy, PolicyError, RiskClass, span};
use crate::types::ActionKind;

/// Fewest unhealthy nodes that speak for a common cause: one is only itself.
pub const UNHEALTHY_MIN: u32 = 2;

/// Time that the caller has to make an intent durable. A slot has to outlast it and the action: else whoever lends slots that end a moment too early
/// could have every action called off after it was decided.
pub const RECORD_TIMEOUT: Duration = Duration::from_secs(30);

/// A whole number of hundredths, 1 to 100: `"20%"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Percent(u8);

impl Percent {
    /// `None` outside 1 to 100.
    pub fn new(hundredths: u8) -> Option<Self> {
        (1..=100).contains(&hundredths).then_some(Self(hundredths))
    }

    /// In hundredths, 1 to 100.
    pub fn hundredths(self) -> u8 {
        self.0
    }

    /// Whether `part` is more than this share of `whole`.
    fn is_passed(self, part: u32, whole: u32) -> bool {
        u64::from(part) * 100 > u64::from(self.0) * u64::from(whole)
    }

    /// This share of `whole`, rounded down, and at least one.
    fn of(self, whole: u32) -> u32 {
        let part = u64::from(self.0) * u64::from(whole) / 100;
        u32::try_from(part).unwrap_or(u32::MAX).max(1)
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

impl Serialize for Percent {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Percent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.strip_suffix('%')
            .and_then(|number| number.trim().parse().ok())
            .and_then(Self::new)
            .ok_or_else(|| D::Error::custom(format!("`{text}` is no share: write \"20%\", from 1% to 100%")))
    }
}

/// `[budgets] fleet`. Only for an edge that has joined a federation whose aggregator has `[fleet]` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FleetBudget {
    /// Most nodes that act at a time, as a share of those that tell how they are; one always may. Default `"20%"`. Slots of actions with
    /// `shared = true` are counted exactly; for the others it is as exact as the latest report.
    pub max_nodes_acting: Percent,
    /// Above this share of unhealthy nodes, and from two of them on, nothing is done without a person. Default `"40%"`.
    pub stop_if_unhealthy_over: Percent,
    /// A report older than this holds nothing back. Default 30 s, 10 s to 10 min. Too short: a slow network lets the brake go. Too long: an
    /// aggregator that is gone holds for so long.
    #[serde(with = "super::duration")]
    pub report_age: Duration,
    /// An incident is held back so long at most, by brake and slots together; then a person is told. Default 10 min, 10 s to 24 h.
    #[serde(with = "super::duration")]
    pub hold_max: Duration,
}

impl Default for FleetBudget {
    fn default() -> Self {
        Self {
            max_nodes_acting: Percent(20),
            stop_if_unhealthy_over: Percent(40),
            report_age: Duration::from_secs(30),
            hold_max: Duration::from_mins(10),
        }
    }
}

impl FleetBudget {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`PolicyError::Range`] names the first field outside its range.
    pub fn check(self) -> Result<Self, PolicyError> {
        let ten = super::seconds(10);
        let (age, max) = ("budgets.fleet.report_age", "budgets.fleet.hold_max");
        span(
            age,
            Some(self.report_age),
            ten,
            ten,
            super::seconds(600),
            "10s to 10min",
        )?;
        span(max, Some(self.hold_max), ten, ten, super::DAY, "10s to 24h")?;
        Ok(self)
    }
}

/// How the fleet is, as its aggregator tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FleetSeen {
    /// Nodes that tell how they are.
    pub nodes: u32,
    /// Those of them with an unhealthy service.
    pub unhealthy: u32,
    /// Other nodes that act on one.
    pub acting: u32,
}

impl FleetSeen {
    /// Whether such a fleet can be.
    pub fn is_possible(self) -> bool {
        self.nodes > 0 && self.unhealthy <= self.nodes && self.acting <= self.nodes
    }
}

/// A report as a ruling knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FleetHeard {
    /// What it says.
    pub seen: FleetSeen,
    /// When it came, milliseconds on the node's monotonic clock.
    pub at_ms: u64,
}

/// What a ruling knows of the fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FleetFacts {
    /// The latest report.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heard: Option<FleetHeard>,
    /// The slot that the node holds lasts until then, in milliseconds of the monotonic clock; only told of actions that need one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot_until_ms: Option<u64>,
    /// Since when the fleet holds this incident back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_since_ms: Option<u64>,
    /// The approval is of a plan that was made because the incident had been held back for too long.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub waived: bool,
}

/// What holds an action back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "hold")]
pub enum Hold {
    /// Too many nodes are unhealthy at once.
    Unhealthy {
        /// So many are.
        unhealthy: u32,
        /// Of so many.
        nodes: u32,
    },
    /// Enough other nodes act already.
    Acting {
        /// So many do.
        acting: u32,
        /// Of so many.
        nodes: u32,
    },
    /// It needs a slot of the fleet, and there is none that lasts long enough.
    NoSlot,
}

impl fmt::Display for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unhealthy { unhealthy, nodes } => {
                let share = 100.0 * f64::from(*unhealthy) / f64::from((*nodes).max(1));
                write!(
                    f,
                    "held by the fleet: {share:.0} % of {nodes} nodes are unhealthy"
                )
            }
            Self::Acting { acting, nodes } => {
                write!(f, "held by the fleet: {acting} of {nodes} nodes act already")
            }
            Self::NoSlot => f.write_str("waits for a slot of the fleet"),
        }
    }
}

/// What the brake says, with the moment from which on it says nothing if nothing more is heard; `None`: it is off.
pub fn brake(budget: FleetBudget, heard: Option<FleetHeard>, now_ms: u64) -> Option<(Hold, u64)> {
    let FleetHeard { seen, at_ms } = heard.filter(|heard| heard.seen.is_possible())?;
    let until_ms = at_ms.saturating_add(millis(budget.report_age));
    let (nodes, unhealthy, acting) = (seen.nodes, seen.unhealthy, seen.acting);
    let hold = if unhealthy >= UNHEALTHY_MIN && budget.stop_if_unhealthy_over.is_passed(unhealthy, nodes) {
        Hold::Unhealthy { unhealthy, nodes }
    } else if acting >= budget.max_nodes_acting.of(nodes) {
        Hold::Acting { acting, nodes }
    } else {
        return None;
    };
    (now_ms < until_ms).then_some((hold, until_ms))
}

/// What holds an action back that the node would do now, with the moment at which to look again. The brake is for what the node does by itself, of
/// R2 and above, and never for starting what is dead. A slot is needed whoever approved, unless that was after the longest wait for it; it has to last
/// as [`slot_needed`] says.
pub(crate) fn hold(
    policy: &HealPolicy,
    action: ActionKind,
    approved: bool,
    fleet: FleetFacts,
    now_ms: u64,
) -> Option<(Hold, u64)> {
    let budget = policy.fleet?;
    let braked = policy.class_of(action) >= RiskClass::R2 && action != ActionKind::Start && !approved;
    let stopped = braked.then(|| brake(budget, fleet.heard, now_ms)).flatten();
    stopped.or_else(|| {
        let needed = now_ms.saturating_add(millis(slot_needed(policy)));
        let lasts = fleet.slot_until_ms.is_some_and(|until| until >= needed);
        let missing = policy.is_shared(action) && !lasts && !(approved && fleet.waived);
        missing.then_some((Hold::NoSlot, u64::MAX))
    })
}

/// So long a slot has to last when its action is decided: until the intent is durable, and then as long as the action may take.
pub(crate) fn slot_needed(policy: &HealPolicy) -> Duration {
    policy.action_timeout.saturating_add(RECORD_TIMEOUT)
}

/// When an incident that is held since then is a person's.
pub(crate) fn held_until_ms(budget: FleetBudget, since_ms: u64) -> u64 {
    since_ms.saturating_add(millis(budget.hold_max))
}

/// The ruling on what would be done now, if the fleet has anything against it.
pub(super) fn ruling(policy: &HealPolicy, facts: &Facts) -> Option<Ruling> {
    let budget = policy.fleet?;
    let fleet = facts.fleet.unwrap_or_default();
    let approved = is_approved(policy, facts);
    let (by, until_ms) = hold(policy, facts.action, approved, fleet, facts.now_ms)?;
    let end_ms = held_until_ms(budget, fleet.held_since_ms.unwrap_or(facts.now_ms));
    Some(if facts.now_ms < end_ms {
        let until_ms = until_ms.min(end_ms);
        Ruling::Held { by, until_ms }
    } else {
        Ruling::HeldTooLong { by }
    })
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::policy::evaluate::evaluate;
    use crate::policy::{ActionRule, Autonomy, NodeBudget};

    fn policy() -> HealPolicy {
        HealPolicy {
            autonomy: Autonomy::Act,
            fleet: Some(FleetBudget::default()),
            ..HealPolicy::default()
        }
    }

    fn heard(nodes: u32, unhealthy: u32, acting: u32) -> FleetFacts {
        FleetFacts {
            heard: Some(FleetHeard {
                seen: FleetSeen {
                    nodes,
                    unhealthy,
                    acting,
                },
                at_ms: 990_000,
            }),
            ..FleetFacts::default()
        }
    }

    fn says(policy: &HealPolicy, fleet: FleetFacts, change: impl FnOnce(&mut Facts)) -> Ruling {
        let mut facts = Facts {
            fleet: Some(fleet),
            ..Facts::example()
        };
        change(&mut facts);
        evaluate(policy, NodeBudget::default(), &facts)
    }

    #[test]
    fn the_brake_holds_above_its_share_from_two_nodes_on_and_says_so_in_words() {
        let held = |fleet| matches!(says(&policy(), fleet, |_| {}), Ruling::Held { .. });
        assert!(held(heard(20, 9, 0)) && !held(heard(20, 8, 0)));
        assert!(!held(heard(2, 1, 0)), "one sick node is no common cause");
        assert!(held(heard(3, 2, 0)));
        assert!(held(heard(20, 1, 4)) && !held(heard(20, 1, 3)));
        assert!(
            held(heard(2, 1, 1)) && !held(heard(2, 1, 0)),
            "one node may always act"
        );
        let (hold, _) = brake(FleetBudget::default(), heard(20, 9, 0).heard, 1_000_000).unwrap();
        assert_eq!(
            hold.to_string(),
            "held by the fleet: 45 % of 20 nodes are unhealthy"
        );
    }

    #[test]
    fn old_and_impossible_reports_hold_nothing() {
        let at = |now_ms| says(&policy(), heard(20, 20, 0), |facts| facts.now_ms = now_ms);
        assert_eq!(
            at(1_019_999),
            Ruling::Held {
                by: Hold::Unhealthy {
                    unhealthy: 20,
                    nodes: 20
                },
                until_ms: 1_020_000
            }
        );
        assert_eq!(at(1_020_000), Ruling::Act);
        for (nodes, unhealthy, acting) in [
            (0, 0, 0),
            (0, 9, 9),
            (3, 4, 0),
            (3, 0, 4),
            (u32::MAX - 1, u32::MAX, 0),
        ] {
            assert_eq!(
                says(&policy(), heard(nodes, unhealthy, acting), |_| {}),
                Ruling::Act
            );
        }
        let most = heard(u32::MAX, u32::MAX, u32::MAX);
        assert!(matches!(says(&policy(), most, |_| {}), Ruling::Held { .. }));
    }

    #[test]
    fn starting_what_is_dead_low_risk_and_what_a_person_approved_are_never_braked() {
        use crate::types::{FaultClass, RestartHelps};
        let all_sick = || heard(20, 20, 20);
        let start = |facts: &mut Facts| {
            facts.action = ActionKind::Start;
            facts.class = FaultClass::Crash;
        };
        assert_eq!(says(&policy(), all_sick(), start), Ruling::Act);
        let cancel = |facts: &mut Facts| {
            facts.action = ActionKind::CancelQuery;
            facts.class = FaultClass::LockPileup;
            facts.restart_helps = RestartHelps::No;
        };
        assert_eq!(says(&policy(), all_sick(), cancel), Ruling::Act);
        assert_eq!(
            says(&policy(), all_sick(), |facts| facts.approved = true),
            Ruling::Act
        );
        let asks = HealPolicy {
            autonomy: Autonomy::Recommend,
            ..policy()
        };
        assert_eq!(says(&asks, all_sick(), |_| {}), Ruling::NeedApproval);
        let without = HealPolicy {
            fleet: None,
            ..policy()
        };
        assert_eq!(says(&without, all_sick(), |_| {}), Ruling::Act);
    }

    #[test]
    fn the_fleet_never_permits_what_the_policy_does_not() {
        let well = || FleetFacts {
            slot_until_ms: Some(u64::MAX),
            ..heard(20, 0, 0)
        };
        for autonomy in [Autonomy::Observe, Autonomy::Recommend] {
            let less = HealPolicy { autonomy, ..policy() };
            assert_ne!(says(&less, well(), |_| {}), Ruling::Act);
        }
        let spent = |facts: &mut Facts| facts.halted = true;
        assert_eq!(says(&policy(), well(), spent), Ruling::Halted);
    }

    #[test]
    fn a_hold_ends_with_a_person() {
        let budget = FleetBudget::default();
        let since = |ms| FleetFacts {
            held_since_ms: Some(1_000_000 - ms),
            ..heard(20, 9, 0)
        };
        let longest = millis(budget.hold_max);
        assert_eq!(
            says(&policy(), since(longest - 1), |_| {}),
            Ruling::Held {
                by: Hold::Unhealthy {
                    unhealthy: 9,
                    nodes: 20
                },
                until_ms: 1_000_001
            }
        );
        let by = Hold::Unhealthy {
            unhealthy: 9,
            nodes: 20,
        };
        assert_eq!(
            says(&policy(), since(longest), |_| {}),
            Ruling::HeldTooLong { by }
        );
    }

    #[test]
    fn a_shared_action_needs_a_slot_that_outlasts_it_whoever_approved() {
        let rule = ActionRule {
            shared: true,
            ..ActionRule::example(RiskClass::R2)
        };
        let shared = HealPolicy {
            rules: Some(BTreeMap::from([(ActionKind::Restart, rule)])),
            ..policy()
        };
        let needed = millis(slot_needed(&shared));
        let slot = |ms: Option<u64>| FleetFacts {
            slot_until_ms: ms.map(|ms| 1_000_000 + ms),
            ..FleetFacts::default()
        };
        for (ms, approved) in [(None, false), (Some(needed - 1), false), (None, true)] {
            let says = says(&shared, slot(ms), |facts| facts.approved = approved);
            assert!(matches!(says, Ruling::Held { by: Hold::NoSlot, .. }), "{says:?}");
        }
        assert_eq!(says(&shared, slot(Some(needed)), |_| {}), Ruling::Act);
        // But for the word of a person who was asked because there was none for so long.
        let longest = millis(FleetBudget::default().hold_max);
        let waited = |waived| FleetFacts {
            held_since_ms: Some(1_000_000 - longest),
            waived,
            ..FleetFacts::default()
        };
        let too_long = Ruling::HeldTooLong { by: Hold::NoSlot };
        assert_eq!(
            says(&shared, waited(false), |facts| facts.approved = true),
            too_long
        );
        assert_eq!(says(&shared, waited(true), |_| {}), too_long);
        assert_eq!(
            says(&shared, waited(true), |facts| facts.approved = true),
            Ruling::Act
        );
    }

    #[test]
    fn keys_are_read_strictly_and_within_their_ranges() {
        let read = |text: &str| toml::from_str::<FleetBudget>(text);
        let text =
            "max_nodes_acting = '10%'\nstop_if_unhealthy_over = '33%'\nreport_age = '20s'\nhold_max = '5m'";
        let budget = read(text).unwrap().check().unwrap();
        assert_eq!(budget.max_nodes_acting.hundredths(), 10);
        let again: FleetBudget = toml::from_str(&toml::to_string(&budget).unwrap()).unwrap();
        assert_eq!(again, budget);
        for bad in [
            "max_nodes_acting = '0%'",
            "max_nodes_acting = '101%'",
            "max_nodes_acting = 20",
            "max_nodes = '20%'",
        ] {
            assert!(read(bad).is_err(), "{bad} was taken");
        }
        for bad in ["report_age = '9s'", "hold_max = '25h'"] {
            assert!(read(bad).unwrap().check().is_err(), "{bad} was taken");
        }
    }
}
