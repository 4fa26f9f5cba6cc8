//! What the policy says to one action under the facts at hand. Pure: the same policy and the same facts give the same ruling, so
//! anybody who has both can check what a node decided.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::fleet::{self, FleetFacts, Hold};
use super::{ActionRule, Autonomy, HealPolicy, NodeBudget, RiskClass};
use crate::breaker::Tripped;
use crate::budget::{Charge, Ledger, Refusal};
use crate::evidence::Counts;
use crate::types::{ActionKind, FaultClass, RestartHelps};

/// Everything that a ruling rests on besides the policy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct Facts {
    /// The incident.
    pub incident: u64,
    /// The service.
    pub service: String,
    /// The action that is considered.
    pub action: ActionKind,
    /// The diagnosis.
    pub class: FaultClass,
    /// How sure it is, 0 to 1.
    pub certainty: f64,
    /// Whether a restart can help against it.
    pub restart_helps: RestartHelps,
    /// The chance of failing within the shortest horizon, 0 to 1; `None` when not known.
    pub risk: Option<f64>,
    /// Whether the service answers.
    pub answers: bool,
    /// Actions on the service within its window.
    pub actions_of_service: u32,
    /// Actions on the node within its window.
    pub actions_of_node: u32,
    /// The charges that may count, of all services.
    pub charges: Vec<Charge>,
    /// Restarts within the window that seemed to heal this class of trouble.
    pub healed_before: u32,
    /// An earlier action harmed the service, and this one stands in a class that is demoted for it.
    pub demoted: bool,
    /// The stop switch is on.
    pub halted: bool,
    /// A person approved this action for this incident.
    pub approved: bool,
    /// Whose signatures are under the approval.
    #[serde(default)]
    pub approved_by: BTreeSet<String>,
    /// What came of this action on this service before.
    #[serde(default)]
    pub evidence: Counts,
    /// The breaker before the action's executor on this service, where it has opened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub breaker: Option<Tripped>,
    /// What is known of the fleet, where the policy has budgets for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fleet: Option<FleetFacts>,
    /// Milliseconds on the node's monotonic clock.
    pub now_ms: u64,
}

/// What the policy says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "says")]
pub enum Ruling {
    /// Do it.
    Act,
    /// Do it, but not before this moment of the monotonic clock.
    Wait {
        /// In milliseconds.
        until_ms: u64,
    },
    /// Not now: the fleet holds it back.
    Held {
        /// What does.
        by: Hold,
        /// Looked at again then, if nothing is heard before; in milliseconds.
        until_ms: u64,
    },
    /// The fleet has held it back for as long as it may: a person has to approve it.
    HeldTooLong {
        /// What holds it.
        by: Hold,
    },
    /// A person has to approve it.
    NeedApproval,
    /// Only say what would be done.
    Observe,
    /// Nothing new is begun at present.
    Halted,
    /// Not this action.
    Refuse {
        /// Why.
        because: Because,
    },
}

/// Why an action is refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "reason")]
#[non_exhaustive]
pub enum Because {
    /// The policy has no such action for the service.
    NotListed,
    /// The class of trouble inhibits it.
    Inhibited {
        /// The class.
        class: FaultClass,
    },
    /// It would not help.
    RestartWouldNotHelp {
        /// The class.
        class: FaultClass,
    },
    /// Its condition does not hold, or something that it needs is not known.
    WhenDoesNotHold {
        /// The condition.
        when: String,
    },
    /// The trouble came back after restarts that seemed to heal it.
    CameBack {
        /// How often.
        times: u32,
    },
    /// Its executor failed again and again, and is left alone for a while.
    BreakerOpen {
        /// Failures in a row.
        failures: u32,
        /// Until this moment of the monotonic clock, in milliseconds.
        until_ms: u64,
    },
    /// The action's budget is spent.
    ActionSpent {
        /// Most actions.
        max: u32,
        /// In so many milliseconds.
        window_ms: u64,
    },
    /// The service's budget is spent.
    ServiceSpent {
        /// Most actions.
        max: u32,
        /// In so many milliseconds.
        window_ms: u64,
    },
    /// The node's budget is spent.
    NodeSpent {
        /// Most actions.
        max: u32,
        /// In so many milliseconds.
        window_ms: u64,
    },
}

/// What the policy says to `facts.action`.
pub fn evaluate(policy: &HealPolicy, node: NodeBudget, facts: &Facts) -> Ruling {
    if facts.halted {
        return Ruling::Halted;
    }
    let refuse = |because| Ruling::Refuse { because };
    let class = facts.class;
    let rule = match &policy.rules {
        None => None,
        Some(rules) => match rules.get(&facts.action) {
            None => return refuse(Because::NotListed),
            listed => listed,
        },
    };
    let by_rule = rule.is_some_and(|rule| rule.inhibit.contains(&class));
    if policy.inhibits(class, facts.action) || by_rule {
        return refuse(Because::Inhibited { class });
    }
    if facts.restart_helps == RestartHelps::No && facts.action == ActionKind::Restart {
        return refuse(Because::RestartWouldNotHelp { class });
    }
    if let Some(when) = rule.and_then(|rule| rule.when.as_ref())
        && when.holds(facts) != Some(true)
    {
        let when = when.to_string();
        return refuse(Because::WhenDoesNotHold { when });
    }
    if class.from_detector() && !is_approved(policy, facts) && facts.healed_before >= policy.anomaly_restarts
    {
        return refuse(Because::CameBack {
            times: facts.healed_before,
        });
    }
    let now = Duration::from_millis(facts.now_ms);
    let ledger = Ledger::of(facts.charges.clone());
    if let Some((max, window)) = rule.and_then(|rule| rule.max)
        && ledger.of_action(&facts.service, facts.action, window, now) >= max
    {
        let window_ms = millis(window);
        return refuse(Because::ActionSpent { max, window_ms });
    }
    let cooldown = rule.and_then(|rule| rule.cooldown).unwrap_or(policy.cooldown);
    let allowed = ledger.allows_after(&facts.service, facts.action, policy, cooldown, node, now);
    match &allowed {
        Err(Refusal::ServiceSpent { max, window }) => {
            let (max, window_ms) = (*max, millis(*window));
            return refuse(Because::ServiceSpent { max, window_ms });
        }
        Err(Refusal::NodeSpent { max, window }) => {
            let (max, window_ms) = (*max, millis(*window));
            return refuse(Because::NodeSpent { max, window_ms });
        }
        Ok(()) | Err(Refusal::CoolingDown { .. }) => {}
    }
    // Also against a person's approval: what fails is to be mended, and `reinstate` says that it was.
    if let Some(Tripped { failures, until_ms }) = facts.breaker
        && facts.now_ms < until_ms
    {
        return refuse(Because::BreakerOpen { failures, until_ms });
    }
    match (autonomy(policy, rule, facts), allowed) {
        (Autonomy::Observe, _) => Ruling::Observe,
        (Autonomy::Recommend, _) => Ruling::NeedApproval,
        (Autonomy::Act, Err(Refusal::CoolingDown { until })) => Ruling::Wait {
            until_ms: millis(until),
        },
        (Autonomy::Act, _) => fleet::ruling(policy, facts).unwrap_or(Ruling::Act),
    }
}

/// How much the node may do by itself here. From risk class R3 on nothing is done without a person, who may have approved restores beforehand by
/// [`HealPolicy::restore_autonomy`] where there is no file; after harm neither.
fn autonomy(policy: &HealPolicy, rule: Option<&ActionRule>, facts: &Facts) -> Autonomy {
    let written = match (rule, facts.action) {
        (Some(rule), _) => rule.autonomy,
        // Nobody can have meant beforehand that a service which answers loses what it wrote since the checkpoint.
        (None, ActionKind::RestoreAndStart) if facts.answers => policy
            .autonomy
            .min(policy.restore_autonomy)
            .min(Autonomy::Recommend),
        (None, ActionKind::RestoreAndStart) => policy.autonomy.min(policy.restore_autonomy),
        (None, _) => policy.autonomy,
    };
    // Without a file restoring has a key of its own: who wrote `act` there has approved every restore beforehand.
    let by_class = match rule {
        Some(rule) => rule.class >= RiskClass::R3,
        None => facts.action != ActionKind::RestoreAndStart && RiskClass::of(facts.action) >= RiskClass::R3,
    };
    let unproved = rule.is_some_and(|rule| rule.evidence) && !facts.evidence.suffice();
    if is_approved(policy, facts) && written != Autonomy::Observe {
        return Autonomy::Act;
    }
    if facts.demoted || by_class || unproved {
        written.min(Autonomy::Recommend)
    } else {
        written
    }
}

/// Whether enough people have approved it.
pub(super) fn is_approved(policy: &HealPolicy, facts: &Facts) -> bool {
    let asked = policy.approvals(facts.action);
    facts.approved && (!asked.signed || facts.approved_by.len() >= asked.need as usize)
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

impl fmt::Display for Because {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let human = |ms: &u64| humantime::format_duration(Duration::from_millis(*ms)).to_string();
        match self {
            Self::NotListed => f.write_str("the policy does not list it for this service"),
            Self::Inhibited { class } => write!(f, "{class} inhibits it"),
            Self::RestartWouldNotHelp { class } => write!(f, "a restart does not help against {class}"),
            Self::WhenDoesNotHold { when } => write!(f, "its condition does not hold: {when}"),
            Self::CameBack { times } => {
                write!(
                    f,
                    "the trouble came back after {times} restarts that seemed to heal it"
                )
            }
            Self::BreakerOpen { failures, .. } => {
                write!(f, "its breaker is open after {failures} failures in a row")
            }
            Self::ActionSpent { max, window_ms } => {
                write!(f, "its own budget of {max} in {} is spent", human(window_ms))
            }
            Self::ServiceSpent { max, window_ms } => {
                write!(f, "its budget of {max} actions in {} is spent", human(window_ms))
            }
            Self::NodeSpent { max, window_ms } => {
                write!(
                    f,
                    "the node's budget of {max} actions in {} is spent",
                    human(window_ms)
                )
            }
        }
    }
}

/// One ruling with what it rests on, as it is written down.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RulingRecord {
    /// Milliseconds since the Unix epoch.
    pub unix_ms: u64,
    /// The policies that held, see [`digest`].
    pub policy: String,
    /// What the ruling rests on.
    pub facts: Facts,
    /// The ruling.
    pub ruling: Ruling,
    /// Probability, above 0 to 1, with which this ruling is made where these facts hold under that policy. 1: [`evaluate`] draws nothing by lot.
    /// Logged all the same, so that the log stays one that other policies can be weighed on (inverse propensity, Horvitz and Thompson 1952)
    /// should one ever draw.
    #[serde(default = "certain")]
    pub propensity: f64,
    /// SHA-256 of the line before it in the log, hexadecimal; empty in the first one. Whoever writes the log fills it in.
    #[serde(default)]
    pub previous: String,
}

/// The propensity of a ruling that follows from its facts.
pub const CERTAIN: f64 = 1.0;

/// Lines from before it was logged were made by rules as well.
fn certain() -> f64 {
    CERTAIN
}

/// SHA-256 of one line of a log of rulings, without its end, hexadecimal: what the next line holds as [`RulingRecord::previous`].
pub fn line_digest(line: &[u8]) -> String {
    use sha2::Digest as _;
    data_encoding::HEXLOWER.encode(&sha2::Sha256::digest(line))
}

/// SHA-256 of every service's policy and the node's budget, hexadecimal: which policy a ruling was made under.
pub fn digest<'a>(services: impl Iterator<Item = (&'a String, &'a HealPolicy)>, node: NodeBudget) -> String {
    use sha2::{Digest as _, Sha256};
    let mut hash = Sha256::new();
    let mut add = |part: Result<Vec<u8>, serde_json::Error>| {
        // Strings, numbers and lists always serialise; were one not to, the digest would only be another one.
        let part = part.unwrap_or_default();
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    };
    add(serde_json::to_vec(&node));
    for (name, policy) in services {
        add(serde_json::to_vec(name));
        add(serde_json::to_vec(policy));
    }
    data_encoding::HEXLOWER.encode(&hash.finalize())
}

#[cfg(test)]
impl Facts {
    pub(crate) fn example() -> Self {
        Self {
            incident: 1,
            service: "kv".to_owned(),
            action: ActionKind::Restart,
            class: FaultClass::Hang,
            certainty: 1.0,
            restart_helps: RestartHelps::Yes,
            risk: None,
            answers: false,
            actions_of_service: 0,
            actions_of_node: 0,
            charges: Vec::new(),
            healed_before: 0,
            demoted: false,
            halted: false,
            approved: false,
            approved_by: BTreeSet::new(),
            evidence: Counts::default(),
            breaker: None,
            fleet: None,
            now_ms: 1_000_000,
        }
    }
}
