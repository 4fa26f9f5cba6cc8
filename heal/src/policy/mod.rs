//! What is allowed: autonomy, cool-downs, budgets, inhibitions. Total, without loops; ranges checked when loaded.

pub mod evaluate;
pub mod expression;
pub mod file;
pub mod fleet;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use self::expression::Expression;
use self::fleet::FleetBudget;
use crate::types::{ActionKind, FaultClass};

/// How much the node may do by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Autonomy {
    /// Records what it would have done.
    Observe,
    /// Proposes an action and waits for a person.
    Recommend,
    /// Acts within the policy.
    Act,
}

/// `[healing]` of `edge.toml`, and `[service.healing]`: absent fields take the value of the section above, then the default.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HealingSection {
    /// See [`HealPolicy::autonomy`].
    pub autonomy: Option<Autonomy>,
    /// See [`HealPolicy::restore_autonomy`].
    pub restore_autonomy: Option<Autonomy>,
    /// See [`HealPolicy::cooldown`].
    #[serde(with = "duration_opt")]
    pub cooldown: Option<Duration>,
    /// See [`HealPolicy::max_actions`].
    pub max_actions: Option<u32>,
    /// See [`HealPolicy::window`].
    #[serde(with = "duration_opt")]
    pub window: Option<Duration>,
    /// See [`HealPolicy::inhibit`].
    pub inhibit: Option<BTreeSet<FaultClass>>,
    /// See [`HealPolicy::probe_failures`].
    pub probe_failures: Option<u32>,
    /// See [`HealPolicy::probe_window`].
    pub probe_window: Option<u32>,
    /// See [`HealPolicy::stopped_confirm`].
    pub stopped_confirm: Option<u32>,
    /// See [`HealPolicy::anomaly_confirm`].
    pub anomaly_confirm: Option<u32>,
    /// See [`HealPolicy::anomaly_lasting`].
    #[serde(with = "duration_opt")]
    pub anomaly_lasting: Option<Duration>,
    /// See [`HealPolicy::anomaly_restarts`].
    pub anomaly_restarts: Option<u32>,
    /// See [`HealPolicy::verify_probes`].
    pub verify_probes: Option<u32>,
    /// See [`HealPolicy::verify_window`].
    #[serde(with = "duration_opt")]
    pub verify_window: Option<Duration>,
    /// See [`HealPolicy::start_attempts`].
    pub start_attempts: Option<u32>,
    /// See [`HealPolicy::action_timeout`].
    #[serde(with = "duration_opt")]
    pub action_timeout: Option<Duration>,
    /// See [`HealPolicy::settle`].
    #[serde(with = "duration_opt")]
    pub settle: Option<Duration>,
    /// See [`HealPolicy::remind_every`].
    #[serde(with = "duration_opt")]
    pub remind_every: Option<Duration>,
}

/// What an action can do at worst. R5, deleting data or changing a security boundary, is no value of this type: no executor can have
/// it, and no file can ask for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum RiskClass {
    /// Reads only.
    R0,
    /// Reversible, within seconds, one process.
    R1,
    /// A brief interruption: start, restart, reload.
    R2,
    /// Moves state, recoverable: restore. A person approves each.
    R3,
    /// Topology or data. A person approves each.
    R4,
}

impl RiskClass {
    /// What an action deserves at least.
    pub fn of(action: ActionKind) -> Self {
        match action {
            ActionKind::CancelQuery | ActionKind::TerminateBlocker | ActionKind::EndIdleSessions => Self::R1,
            ActionKind::Start
            | ActionKind::Restart
            | ActionKind::Reload
            | ActionKind::Webhook
            | ActionKind::Hook
            | ActionKind::RelieveSpace
            | ActionKind::ThrottleCpu
            | ActionKind::LimitMemory
            | ActionKind::Freeze
            | ActionKind::RestartUnit
            | ActionKind::ReloadUnit
            | ActionKind::ResetFailedUnit
            | ActionKind::RolloutRestart => Self::R2,
            ActionKind::RestoreAndStart
            | ActionKind::Drain
            | ActionKind::ScaleUp
            | ActionKind::RolloutUndo => Self::R3,
        }
    }
}

impl fmt::Display for RiskClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What a policy file says to one action on one service, checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ActionRule {
    /// At least what the action deserves.
    pub class: RiskClass,
    /// How much the node may do by itself.
    pub autonomy: Autonomy,
    /// Least time between two of them, instead of the service's.
    pub cooldown: Option<Duration>,
    /// Most of them in a sliding window.
    pub max: Option<(u32, Duration)>,
    /// Classes for which it is not done.
    pub inhibit: BTreeSet<FaultClass>,
    /// Has to hold.
    pub when: Option<Expression>,
    /// Who has to approve it, where the file says so.
    pub approvals: Option<Approvals>,
    /// Whether the node acts by itself only on recorded evidence, see [`crate::evidence::Counts::suffice`].
    pub evidence: bool,
    /// Whether it needs a slot of the fleet.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub shared: bool,
}

/// Who has to approve an action, and for how long that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Approvals {
    /// So many different people.
    pub need: u32,
    /// From the plan to its end.
    pub ttl: Duration,
    /// Whether only signatures of pinned keys count; else the word of somebody at the host does.
    pub signed: bool,
}

impl Default for Approvals {
    /// One person at the host, for a quarter of an hour.
    fn default() -> Self {
        Self {
            need: 1,
            ttl: Duration::from_mins(15),
            signed: false,
        }
    }
}

/// The checked policy of one service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HealPolicy {
    /// What a policy file lists for the service; `None` without such a file: then every action may be done within the rest.
    pub rules: Option<BTreeMap<ActionKind, ActionRule>>,
    /// How much the node may do by itself. Default `recommend`: nothing is touched before somebody said so.
    pub autonomy: Autonomy,
    /// The same for restoring a checkpoint over corrupt state (R3; the replaced state is kept). The lower of the two holds.
    /// Default `recommend`: a person approves each. `act`, which somebody has to write, is a standing approval of every such restore;
    /// with a policy file it counts for nothing, and each is approved.
    pub restore_autonomy: Autonomy,
    /// Least time between two actions of one kind on this service. Default 10 s, 0 s to 24 h. Too short: a service that
    /// dies at once burns its budget in seconds. Too long: the second crash waits.
    pub cooldown: Duration,
    /// Most actions on this service in any `window`. Default 6, 1 to 1000. Afterwards a person has to look.
    pub max_actions: u32,
    /// The budget's sliding window. Default 1 h, 1 s to 7 days.
    pub window: Duration,
    /// Classes for which nothing is done because it would not help. `disk_full`, `overload` and `dependency_down` cannot be
    /// taken off.
    pub inhibit: BTreeSet<FaultClass>,
    /// So many failed probes among the last `probe_window` mean trouble. Default 2, 1 to `probe_window`.
    /// 1 restarts a service for one lost packet; many detect a hang late.
    pub probe_failures: u32,
    /// How many of the latest probes are looked at. Default 3, 1 to 60.
    pub probe_window: u32,
    /// So many sightings in a row of process state `T` (stopped) mean a hang. Default 2, 1 to 60.
    pub stopped_confirm: u32,
    /// So many rows whose score reaches the threshold, within one alarm, open an incident. Default 3, 1 to 600. Rows on which
    /// the alarm is only held do not count.
    pub anomaly_confirm: u32,
    /// Least time between the first and the latest such row of one alarm before an incident opens. Default 10 s, 0 s to 1 h.
    /// Too short: a burst of honest work restarts a healthy service. Too long: a leak goes on.
    pub anomaly_lasting: Duration,
    /// So many restarts within `window` that were verified as healed, for one class that the detector alone finds. When the
    /// class returns after them, a person has to look. Default 2, 1 to 1000.
    pub anomaly_restarts: u32,
    /// So many good probes in a row after an action mean healed. Default 3, 1 to 60.
    pub verify_probes: u32,
    /// Time that an action has to show its effect. Default 30 s, 1 s to 1 h. For trouble that the detector alone finds it
    /// begins when `settle` ends.
    pub verify_window: Duration,
    /// Most starts of a crashed service within one incident, each a cool-down apart. Default 2, 1 to 10.
    pub start_attempts: u32,
    /// Time after which an executor that has not reported is handed to a person. Default 2 min, 1 s to 1 h. Longer than the
    /// service's grace for stopping, its state check and its start together.
    pub action_timeout: Duration,
    /// Time after a start in which anomalies open no incident, because a young process looks unusual. An alarm that is on in
    /// it still keeps an action from being called healed. Default 30 s, 0 s to 1 h.
    pub settle: Duration,
    /// Classes for which a program is configured: it is run before anything else is done. Default none.
    pub hook_for: BTreeSet<FaultClass>,
    /// Classes for which another system is told, before that. Default none.
    pub webhook_for: BTreeSet<FaultClass>,
    /// Digests of what people configured an action to be, such as a hook's program or a webhook's address, by action: so that a record of
    /// another one does not speak for this one, and plans and rulings name what was meant. Default none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub target_digests: BTreeMap<ActionKind, String>,
    /// Whether a database server's sessions may be touched and its settings read again. The edge says so where `[service.sessions]` is
    /// written; else a person is told.
    pub session_actions: bool,
    /// Actions that are configured for some classes, in this order after hooks and before the class's own ladder. Default none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub configured: BTreeMap<FaultClass, Vec<ActionKind>>,
    /// The budgets of the fleet, where the policy file has them: one for all services of the node. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fleet: Option<FleetBudget>,
    /// An incident that a person has to look at is told again after this time. Default 15 min, 10 s to 24 h.
    pub remind_every: Duration,
}

/// The budget of the whole node, over all services: `[healing_budget]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NodeBudget {
    /// Most actions in any `window`. Default 12, 1 to 10 000. Many sick services at once mean a common cause.
    pub max_actions: u32,
    /// The sliding window. Default 1 h, 1 s to 7 days.
    #[serde(with = "duration")]
    pub window: Duration,
}

/// Why a policy was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// A number is outside its range.
    #[error("{field} is {found}, but must be {range}: change it in edge.toml")]
    Range {
        /// The key.
        field: &'static str,
        /// The value found.
        found: String,
        /// The range that holds.
        range: &'static str,
    },
}

impl HealingSection {
    /// This section laid over `above`: fields that are set here win.
    #[must_use]
    pub fn over(&self, above: &Self) -> Self {
        Self {
            autonomy: self.autonomy.or(above.autonomy),
            restore_autonomy: self.restore_autonomy.or(above.restore_autonomy),
            cooldown: self.cooldown.or(above.cooldown),
            max_actions: self.max_actions.or(above.max_actions),
            window: self.window.or(above.window),
            inhibit: self.inhibit.clone().or_else(|| above.inhibit.clone()),
            probe_failures: self.probe_failures.or(above.probe_failures),
            probe_window: self.probe_window.or(above.probe_window),
            stopped_confirm: self.stopped_confirm.or(above.stopped_confirm),
            anomaly_confirm: self.anomaly_confirm.or(above.anomaly_confirm),
            anomaly_lasting: self.anomaly_lasting.or(above.anomaly_lasting),
            anomaly_restarts: self.anomaly_restarts.or(above.anomaly_restarts),
            verify_probes: self.verify_probes.or(above.verify_probes),
            verify_window: self.verify_window.or(above.verify_window),
            start_attempts: self.start_attempts.or(above.start_attempts),
            action_timeout: self.action_timeout.or(above.action_timeout),
            settle: self.settle.or(above.settle),
            remind_every: self.remind_every.or(above.remind_every),
        }
    }

    /// Fills in the defaults and checks every range.
    ///
    /// # Errors
    /// [`PolicyError::Range`] names the first field outside its range.
    pub fn check(&self) -> Result<HealPolicy, PolicyError> {
        let mut inhibit = self.inhibit.clone().unwrap_or_default();
        inhibit.extend([
            FaultClass::DiskFull,
            FaultClass::Overload,
            FaultClass::DependencyDown,
        ]);
        let probe_window = count(
            "healing.probe_window",
            self.probe_window.unwrap_or(3),
            1,
            60,
            "1 to 60",
        )?;
        Ok(HealPolicy {
            rules: None,
            autonomy: self.autonomy.unwrap_or(Autonomy::Recommend),
            restore_autonomy: self.restore_autonomy.unwrap_or(Autonomy::Recommend),
            cooldown: span(
                "healing.cooldown",
                self.cooldown,
                seconds(10),
                Duration::ZERO,
                DAY,
                "0s to 24h",
            )?,
            max_actions: count(
                "healing.max_actions",
                self.max_actions.unwrap_or(6),
                1,
                1000,
                "1 to 1000",
            )?,
            window: span(
                "healing.window",
                self.window,
                HOUR,
                seconds(1),
                7 * DAY,
                "1s to 7days",
            )?,
            inhibit,
            hook_for: BTreeSet::new(),
            webhook_for: BTreeSet::new(),
            target_digests: BTreeMap::new(),
            session_actions: true,
            configured: BTreeMap::new(),
            fleet: None,
            probe_failures: count(
                "healing.probe_failures",
                self.probe_failures.unwrap_or_else(|| probe_window.min(2)),
                1,
                probe_window,
                "1 to probe_window",
            )?,
            probe_window,
            stopped_confirm: count(
                "healing.stopped_confirm",
                self.stopped_confirm.unwrap_or(2),
                1,
                60,
                "1 to 60",
            )?,
            anomaly_confirm: count(
                "healing.anomaly_confirm",
                self.anomaly_confirm.unwrap_or(3),
                1,
                600,
                "1 to 600",
            )?,
            anomaly_lasting: span(
                "healing.anomaly_lasting",
                self.anomaly_lasting,
                seconds(10),
                Duration::ZERO,
                HOUR,
                "0s to 1h",
            )?,
            anomaly_restarts: count(
                "healing.anomaly_restarts",
                self.anomaly_restarts.unwrap_or(2),
                1,
                1000,
                "1 to 1000",
            )?,
            verify_probes: count(
                "healing.verify_probes",
                self.verify_probes.unwrap_or(3),
                1,
                60,
                "1 to 60",
            )?,
            verify_window: span(
                "healing.verify_window",
                self.verify_window,
                seconds(30),
                seconds(1),
                HOUR,
                "1s to 1h",
            )?,
            start_attempts: count(
                "healing.start_attempts",
                self.start_attempts.unwrap_or(2),
                1,
                10,
                "1 to 10",
            )?,
            action_timeout: span(
                "healing.action_timeout",
                self.action_timeout,
                seconds(120),
                seconds(1),
                HOUR,
                "1s to 1h",
            )?,
            settle: span(
                "healing.settle",
                self.settle,
                seconds(30),
                Duration::ZERO,
                HOUR,
                "0s to 1h",
            )?,
            remind_every: span(
                "healing.remind_every",
                self.remind_every,
                seconds(900),
                seconds(10),
                DAY,
                "10s to 24h",
            )?,
        })
    }
}

impl HealPolicy {
    /// The risk class in which an action stands for this service.
    pub fn class_of(&self, action: ActionKind) -> RiskClass {
        let rule = self.rules.as_ref().and_then(|rules| rules.get(&action));
        rule.map_or(RiskClass::of(action), |rule| rule.class)
    }

    /// Whether an action may ever be done here, by the node or on a person's word.
    pub fn may_ever(&self, action: ActionKind) -> bool {
        let written = match &self.rules {
            Some(rules) => rules.get(&action).map(|rule| rule.autonomy),
            None => Some(self.autonomy),
        };
        written.is_some_and(|written| written > Autonomy::Observe)
    }

    /// How far back what was done still counts: the longest window or cool-down, those of single actions included.
    pub fn looks_back(&self) -> Duration {
        let of_rule = |rule: &ActionRule| {
            let window = rule.max.map_or(Duration::ZERO, |(_, window)| window);
            rule.cooldown.unwrap_or_default().max(window)
        };
        self.rules
            .iter()
            .flat_map(BTreeMap::values)
            .map(of_rule)
            .fold(self.window.max(self.cooldown), Duration::max)
    }

    /// Whether an action needs a slot of the fleet here.
    pub fn is_shared(&self, action: ActionKind) -> bool {
        let rule = self.rules.as_ref().and_then(|rules| rules.get(&action));
        rule.is_some_and(|rule| rule.shared)
    }

    /// Who has to approve an action. What changes topology or data asks for two unless the file says otherwise.
    pub fn approvals(&self, action: ActionKind) -> Approvals {
        let rule = self.rules.as_ref().and_then(|rules| rules.get(&action));
        rule.and_then(|rule| rule.approvals).unwrap_or_else(|| {
            let two = rule.is_some_and(|rule| rule.class >= RiskClass::R4);
            Approvals {
                need: if two { 2 } else { 1 },
                signed: two,
                ..Approvals::default()
            }
        })
    }

    /// What is configured for a class beside hooks.
    pub fn configured_for(&self, class: FaultClass) -> &[ActionKind] {
        self.configured.get(&class).map_or(&[], Vec::as_slice)
    }

    /// Whether a class of trouble forbids an action. A full disk forbids all but making room on it and what is configured for it.
    pub fn inhibits(&self, class: FaultClass, action: ActionKind) -> bool {
        // Who configured a hook for a class meant it.
        let mends = match action {
            ActionKind::RelieveSpace => class == FaultClass::DiskFull,
            ActionKind::Hook => self.hook_for.contains(&class),
            ActionKind::Webhook => self.webhook_for.contains(&class),
            _ => self.configured_for(class).contains(&action),
        };
        self.inhibit.contains(&class) && !mends
    }
}

impl Default for HealPolicy {
    /// The policy of an empty section.
    #[expect(
        clippy::expect_used,
        reason = "the defaults lie within the ranges; a test holds it"
    )]
    fn default() -> Self {
        HealingSection::default()
            .check()
            .expect("defaults lie within their ranges")
    }
}

impl NodeBudget {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`PolicyError::Range`] names the first field outside its range.
    pub fn check(self) -> Result<Self, PolicyError> {
        Ok(Self {
            max_actions: count(
                "healing_budget.max_actions",
                self.max_actions,
                1,
                10_000,
                "1 to 10000",
            )?,
            window: span(
                "healing_budget.window",
                Some(self.window),
                HOUR,
                seconds(1),
                7 * DAY,
                "1s to 7days",
            )?,
        })
    }
}

impl Default for NodeBudget {
    fn default() -> Self {
        Self {
            max_actions: 12,
            window: HOUR,
        }
    }
}

/// `; did you mean …?`, or nothing when no known word is near.
fn did_you_mean(word: &str, known: &[&str]) -> String {
    known
        .iter()
        .map(|known| (strsim::damerau_levenshtein(word, known), known))
        .min()
        .filter(|(distance, known)| *distance <= known.len().max(word.len()) / 2)
        .map_or_else(String::new, |(_, known)| format!("; did you mean `{known}`?"))
}

fn count(
    field: &'static str,
    value: u32,
    min: u32,
    max: u32,
    range: &'static str,
) -> Result<u32, PolicyError> {
    if (min..=max).contains(&value) {
        Ok(value)
    } else {
        Err(PolicyError::Range {
            field,
            found: value.to_string(),
            range,
        })
    }
}

fn span(
    field: &'static str,
    value: Option<Duration>,
    default: Duration,
    min: Duration,
    max: Duration,
    range: &'static str,
) -> Result<Duration, PolicyError> {
    let value = value.unwrap_or(default);
    if (min..=max).contains(&value) {
        Ok(value)
    } else {
        Err(PolicyError::Range {
            field,
            found: humantime::format_duration(value).to_string(),
            range,
        })
    }
}

const fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

const HOUR: Duration = seconds(3600);
const DAY: Duration = seconds(86_400);

/// `"500ms"` in files.
mod duration {
    use std::time::Duration;

    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_duration(*value))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(deserializer)?;
        humantime::parse_duration(&text).map_err(|why| {
            serde::de::Error::custom(format!("`{text}` is no duration ({why}): write 500ms, 30s or 2m"))
        })
    }
}

/// The same where the field may be absent.
mod duration_opt {
    use std::time::Duration;

    use serde::{Deserializer, Serializer};

    #[expect(clippy::ref_option, reason = "the signature that serde asks for")]
    pub(super) fn serialize<S: Serializer>(
        value: &Option<Duration>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => super::duration::serialize(value, serializer),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Duration>, D::Error> {
        super::duration::deserialize(deserializer).map(Some)
    }
}

#[cfg(test)]
impl ActionRule {
    /// Done without a person, and nothing else said of it.
    pub(crate) fn example(class: RiskClass) -> Self {
        Self {
            class,
            autonomy: Autonomy::Act,
            cooldown: None,
            max: None,
            inhibit: BTreeSet::new(),
            when: None,
            approvals: None,
            evidence: false,
            shared: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(text: &str) -> Result<HealingSection, toml::de::Error> {
        toml::from_str(text)
    }

    #[test]
    fn defaults_lie_within_their_ranges_and_touch_nothing() {
        let policy = HealPolicy::default();
        assert_eq!(policy.autonomy, Autonomy::Recommend);
        assert!(policy.inhibit.contains(&FaultClass::DiskFull));
        assert!(NodeBudget::default().check().is_ok());
    }

    #[test]
    fn reads_every_field() {
        let text = r#"
            autonomy = "act"
            restore_autonomy = "recommend"
            cooldown = "2s"
            max_actions = 20
            window = "10m"
            inhibit = ["hang", "unknown"]
            probe_failures = 3
            probe_window = 5
            stopped_confirm = 1
            anomaly_confirm = 4
            anomaly_lasting = "2s"
            anomaly_restarts = 3
            verify_probes = 2
            verify_window = "8s"
            start_attempts = 3
            action_timeout = "30s"
            settle = "5s"
            remind_every = "1m"
        "#;
        let section = section(text).unwrap();
        let again: HealingSection = toml::from_str(&toml::to_string(&section).unwrap()).unwrap();
        assert_eq!(again, section);
        let policy = section.check().unwrap();
        assert_eq!(policy.autonomy, Autonomy::Act);
        assert_eq!(policy.cooldown, seconds(2));
        assert_eq!(policy.probe_window, 5);
        assert_eq!(
            policy.inhibit,
            BTreeSet::from([
                FaultClass::Hang,
                FaultClass::Unknown,
                FaultClass::DiskFull,
                FaultClass::Overload,
                FaultClass::DependencyDown,
            ])
        );
    }

    #[test]
    fn refuses_unknown_keys_and_unreadable_durations() {
        let unknown = section("autonmy = \"act\"").unwrap_err().to_string();
        assert!(
            unknown.contains("autonmy") && unknown.contains("autonomy"),
            "{unknown}"
        );
        let duration = section("cooldown = \"soon\"").unwrap_err().to_string();
        assert!(
            duration.contains("`soon`") && duration.contains("30s"),
            "{duration}"
        );
    }

    #[test]
    fn refuses_values_outside_their_range() {
        for bad in [
            "cooldown = \"25h\"",
            "max_actions = 0",
            "window = \"500ms\"",
            "probe_window = 0",
            "probe_window = 2\nprobe_failures = 3",
            "verify_probes = 61",
            "start_attempts = 11",
            "action_timeout = \"2h\"",
            "remind_every = \"1s\"",
        ] {
            assert!(section(bad).unwrap().check().is_err(), "{bad} was taken");
        }
        assert!(
            NodeBudget {
                max_actions: 0,
                window: HOUR
            }
            .check()
            .is_err()
        );
    }

    #[test]
    fn one_probe_window_needs_one_failure() {
        assert_eq!(
            section("probe_window = 1")
                .unwrap()
                .check()
                .unwrap()
                .probe_failures,
            1
        );
    }

    #[test]
    fn a_service_section_wins_over_the_common_one() {
        let common = section("autonomy = \"recommend\"\ncooldown = \"1m\"").unwrap();
        let own = section("autonomy = \"act\"").unwrap();
        let policy = own.over(&common).check().unwrap();
        assert_eq!((policy.autonomy, policy.cooldown), (Autonomy::Act, seconds(60)));
    }
}
