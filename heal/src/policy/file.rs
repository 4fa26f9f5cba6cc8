//! The policy file: what may be done to which service, by whom, how often. Strict: an unknown key is refused, a class that an
//! action does not deserve too, and what this build does not enforce cannot be written.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::expression::{Expression, ExpressionError};
use super::fleet::FleetBudget;
use super::{ActionRule, Autonomy, HealPolicy, NodeBudget, PolicyError, RiskClass};
use crate::types::{ActionKind, FaultClass};

/// `healing.toml` as it is written.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyFile {
    /// Grows with every change, so that an older file is noticed; from 1.
    pub version: u64,
    /// How much is done without a person where an action says nothing.
    #[serde(default)]
    pub autonomy: AutonomySection,
    /// Budgets over all services.
    #[serde(default)]
    pub budgets: Budgets,
    /// A table for each service. One that is not in here is only watched.
    #[serde(default)]
    pub service: Vec<ServicePolicy>,
}

/// `[autonomy]`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AutonomySection {
    /// For actions that say nothing. Default `recommend`.
    #[serde(default)]
    pub default: Level,
    /// Whether an action is done without a person only once its record suffices: at least 30 decisions of which it is known what came of
    /// them, none that harmed, and a lower 95 % bound of 0.9 on the share of right ones. Default `false`.
    #[serde(default)]
    pub require_evidence: bool,
}

/// The autonomy ladder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Writes down what would be done.
    Observe,
    /// Proposes and waits for a person.
    #[default]
    Recommend,
    /// Acts in risk classes R0 and R1, recommends the others.
    ActLowRisk,
    /// Acts up to R2, recommends the others.
    Act,
}

/// `[budgets]`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Budgets {
    /// Over all services of the node. Default: `[healing_budget]` of `edge.toml`.
    pub node: Option<NodeBudget>,
    /// Over all nodes of the federation. Default none: nothing of the fleet is heard or told.
    pub fleet: Option<FleetBudget>,
}

/// `[[service]]`
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ServicePolicy {
    /// As in `edge.toml`.
    pub name: String,
    /// Classes for which nothing is done to it, besides `disk_full`, `overload` and `dependency_down`, which never can be taken off.
    #[serde(default)]
    pub inhibit: BTreeSet<FaultClass>,
    /// Most actions on it. Default: `edge.toml`.
    pub max: Option<String>,
    /// What may be done.
    #[serde(default)]
    pub action: Vec<ActionPolicy>,
}

/// One entry of `action`.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ActionPolicy {
    /// `start`, `restart`, `restore_and_start`, `cancel_query`, `terminate_blocker`, `end_idle_sessions`, `reload`,
    /// `webhook`, `hook` or `relieve_space`.
    pub id: String,
    /// Its risk class, at least what the action deserves.
    pub class: RiskClass,
    /// Least time between two of them. Default: `edge.toml`.
    #[serde(default, with = "super::duration_opt")]
    pub cooldown: Option<Duration>,
    /// `"3/1h"`: most of them in a sliding window.
    pub max: Option<String>,
    /// Classes for which it is not done.
    #[serde(default)]
    pub inhibit: BTreeSet<FaultClass>,
    /// The condition, see [`Expression`].
    pub when: Option<String>,
    /// Default: `autonomy.default`.
    pub autonomy: Option<Level>,
    /// Whether a person has to approve, also below R3.
    #[serde(default)]
    pub approval: bool,
    /// So many different people have to sign each plan, within its time.
    pub approvals: Option<ApprovalsSection>,
    /// Whether it needs one of the fleet's slots, `budgets.fleet.max_nodes_acting` of them: without one it waits, and then goes to a person.
    #[serde(default)]
    pub shared: bool,
}

/// `approvals = { need = 2, ttl = "15m" }`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ApprovalsSection {
    /// Different people, 1 to 10; each signs with a key of `healing_policy.keys`.
    pub need: u32,
    /// Time from the plan to its end, 1 min to 24 h, default `15m`. Then another plan is made, and approvals of the old one count no more.
    #[serde(default = "default_ttl", with = "super::duration")]
    pub ttl: Duration,
}

fn default_ttl() -> Duration {
    super::Approvals::default().ttl
}

/// Why a policy file is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// A version of 0.
    #[error("version is 0: it begins at 1 and grows with every change")]
    Version,
    /// A budget out of range.
    #[error(transparent)]
    Range(#[from] PolicyError),
    /// A service that the edge does not supervise, or twice.
    #[error("[[service]] `{name}` {what}")]
    Service {
        /// Its name.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// An action that there is not, or twice, or in too low a class.
    #[error("service `{service}`, action `{id}`: {what}")]
    Action {
        /// The service.
        service: String,
        /// The action.
        id: String,
        /// What is wrong.
        what: String,
    },
    /// A condition.
    #[error("service `{service}`, action `{id}`, when: {source}")]
    When {
        /// The service.
        service: String,
        /// The action.
        id: String,
        /// What is wrong.
        source: ExpressionError,
    },
}

impl PolicyFile {
    /// Lays the file over the policies that `edge.toml` gives; what the file says wins. Gives the budget of the node.
    ///
    /// # Errors
    /// [`FileError`] for the first thing that does not hold.
    pub fn over(
        &self,
        services: &mut BTreeMap<String, HealPolicy>,
        node: NodeBudget,
    ) -> Result<NodeBudget, FileError> {
        if self.version == 0 {
            return Err(FileError::Version);
        }
        let node = self.budgets.node.unwrap_or(node).check()?;
        let fleet = self.budgets.fleet.map(FleetBudget::check).transpose()?;
        let known: Vec<String> = services.keys().cloned().collect();
        let mut listed = BTreeMap::new();
        for service in &self.service {
            let wrong = |what: String| FileError::Service {
                name: service.name.clone(),
                what,
            };
            let Some(policy) = services.get(&service.name) else {
                let names: Vec<&str> = known.iter().map(String::as_str).collect();
                let hint = super::did_you_mean(&service.name, &names);
                return Err(wrong(format!("is no [[service]] of edge.toml{hint}")));
            };
            let policy = service.over(policy, self.autonomy, fleet, &wrong)?;
            if listed.insert(service.name.clone(), policy).is_some() {
                return Err(wrong("is there twice".to_owned()));
            }
        }
        for (name, policy) in services.iter_mut() {
            policy.fleet = fleet;
            match listed.remove(name) {
                Some(laid) => *policy = laid,
                // Nothing is listed for it, so nothing is done to it.
                None => policy.rules = Some(BTreeMap::new()),
            }
        }
        Ok(node)
    }
}

impl ServicePolicy {
    fn over(
        &self,
        below: &HealPolicy,
        autonomy: AutonomySection,
        fleet: Option<FleetBudget>,
        wrong: &dyn Fn(String) -> FileError,
    ) -> Result<HealPolicy, FileError> {
        let mut policy = below.clone();
        policy.fleet = fleet;
        policy.inhibit.extend(self.inhibit.iter().copied());
        if let Some(max) = &self.max {
            (policy.max_actions, policy.window) = rate(max).map_err(wrong)?;
        }
        let mut rules = BTreeMap::new();
        for action in &self.action {
            let wrong = |what: String| FileError::Action {
                service: self.name.clone(),
                id: action.id.clone(),
                what,
            };
            let Some(kind) = ActionKind::ALL
                .into_iter()
                .find(|kind| kind.as_str() == action.id)
            else {
                let names = ActionKind::ALL.map(ActionKind::as_str);
                let hint = super::did_you_mean(&action.id, &names);
                return Err(wrong(format!(
                    "there is no such action{hint}; there are {}",
                    names.join(", ")
                )));
            };
            let deserved = RiskClass::of(kind);
            if action.class < deserved {
                return Err(wrong(format!("it is {deserved}, and {} is less", action.class)));
            }
            if action.cooldown.is_some_and(|cooldown| cooldown > super::DAY) {
                return Err(wrong("a cooldown of more than 24h".to_owned()));
            }
            if action.shared && fleet.is_none() {
                return Err(wrong(
                    "shared = true asks for a slot of the fleet, and there is no fleet in [budgets]"
                        .to_owned(),
                ));
            }
            let when = action.when.as_deref().map(Expression::parse).transpose();
            let when = when.map_err(|source| FileError::When {
                service: self.name.clone(),
                id: action.id.clone(),
                source,
            })?;
            let rule = ActionRule {
                class: action.class,
                autonomy: action
                    .autonomy
                    .unwrap_or(autonomy.default)
                    .within(action.class, action.approval || action.approvals.is_some()),
                cooldown: action.cooldown,
                max: action.max.as_deref().map(rate).transpose().map_err(wrong)?,
                inhibit: action.inhibit.clone(),
                when,
                approvals: action
                    .approvals
                    .map(ApprovalsSection::check)
                    .transpose()
                    .map_err(wrong)?,
                evidence: autonomy.require_evidence,
                shared: action.shared,
            };
            if rules.insert(kind, rule).is_some() {
                return Err(wrong("is there twice".to_owned()));
            }
        }
        policy.rules = Some(rules);
        Ok(policy)
    }
}

impl ApprovalsSection {
    fn check(self) -> Result<super::Approvals, String> {
        if !(1..=10).contains(&self.need) {
            return Err(format!("approvals.need is {}, outside 1 to 10", self.need));
        }
        // Each end makes another plan, another word to people and another write.
        if !(super::seconds(60)..=super::DAY).contains(&self.ttl) {
            return Err("approvals.ttl is outside 1m to 24h".to_owned());
        }
        Ok(super::Approvals {
            need: self.need,
            ttl: self.ttl,
            signed: true,
        })
    }
}

impl Level {
    fn within(self, class: RiskClass, approval: bool) -> Autonomy {
        let acts = match self {
            Self::Observe => return Autonomy::Observe,
            Self::Recommend => false,
            Self::ActLowRisk => class <= RiskClass::R1,
            Self::Act => class <= RiskClass::R2,
        };
        if acts && !approval {
            Autonomy::Act
        } else {
            Autonomy::Recommend
        }
    }
}

/// `"3/1h"`
fn rate(text: &str) -> Result<(u32, Duration), String> {
    let parsed = text.split_once('/').and_then(|(count, window)| {
        let count: u32 = count.trim().parse().ok()?;
        let window = humantime::parse_duration(window.trim()).ok()?;
        let in_range = (1..=1_000).contains(&count) && (super::seconds(1)..=7 * super::DAY).contains(&window);
        in_range.then_some((count, window))
    });
    parsed.ok_or_else(|| {
        format!("max is `{text}`: write how many in what time, such as \"3/1h\" (1 to 1000, 1s to 7days)")
    })
}
