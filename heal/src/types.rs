//! The words of the loop: times, fault classes, actions, verdicts, incidents. Serialisable, without I/O.
//!
//! None of these types can hold a sample: an incident carries scores, channel names and sentences.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The caller's clocks at one moment. The machine itself reads none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Now {
    /// Monotonic time since any fixed start (time since boot is best): every deadline, cool-down and budget uses it.
    pub monotonic: Duration,
    /// Wall clock, milliseconds since the Unix epoch: only for records and people.
    pub unix_ms: u64,
}

impl Now {
    /// This moment as it is written down.
    pub fn when(self) -> When {
        When {
            monotonic_ms: u64::try_from(self.monotonic.as_millis()).unwrap_or(u64::MAX),
            unix_ms: self.unix_ms,
        }
    }
}

/// A recorded moment on both clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct When {
    /// Milliseconds on the caller's monotonic clock; differences within one boot are exact.
    pub monotonic_ms: u64,
    /// Milliseconds since the Unix epoch.
    pub unix_ms: u64,
}

impl When {
    /// Time from `earlier` until this moment on the monotonic clock; zero when it lies ahead.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.monotonic_ms.saturating_sub(earlier.monotonic_ms))
    }
}

/// What kind of trouble an incident is, as far as the evidence tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FaultClass {
    /// The process ended.
    Crash,
    /// The process lives but does not answer, or is stopped.
    Hang,
    /// Memory of the service grows abnormally.
    MemoryLeak,
    /// The service uses abnormally much processor time.
    CpuContention,
    /// The service's durable state does not pass its check.
    Corruption,
    /// The file system of the service has no room: a restart cannot help and may make it worse.
    DiskFull,
    /// More work comes than the service can do: a restart throws away what it has in hand.
    Overload,
    /// A service that it calls is down: a restart of this one cannot help.
    DependencyDown,
    /// It waits for a disk that is too slow for all who use it: a restart reads everything again.
    DiskSlow,
    /// It is ready to run and others have the processors: a restart only makes it wait from the beginning.
    CpuStarvation,
    /// Its slots for clients are taken: those who hold them idly are to go, and a restart would throw out all.
    ConnectionExhaustion,
    /// Many of its sessions wait behind one: that one is to let go, and a restart would throw out all.
    LockPileup,
    /// It has as many files and connections open as it may: a restart closes them.
    FdExhaustion,
    /// The file system of its state could be written and cannot any more: a restart cannot help.
    ReadOnlyFs,
    /// What is sent to it gets lost on the way: a restart cannot help.
    NetworkLoss,
    /// Something is wrong and the evidence names nothing that an action here would mend.
    Unknown,
}

/// Whether a restart of the service can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestartHelps {
    /// It mends what is diagnosed.
    Yes,
    /// It cannot help, and may make it worse.
    No,
    /// Not known.
    Unknown,
}

impl RestartHelps {
    /// The word in files and records.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Yes => "yes",
            Self::No => "no",
            Self::Unknown => "unknown",
        }
    }
}

impl FaultClass {
    /// Every class there is.
    pub const ALL: [Self; 16] = [
        Self::Crash,
        Self::Hang,
        Self::MemoryLeak,
        Self::CpuContention,
        Self::Corruption,
        Self::DiskFull,
        Self::Overload,
        Self::DependencyDown,
        Self::DiskSlow,
        Self::CpuStarvation,
        Self::ConnectionExhaustion,
        Self::LockPileup,
        Self::FdExhaustion,
        Self::ReadOnlyFs,
        Self::NetworkLoss,
        Self::Unknown,
    ];

    fn unknown() -> Self {
        Self::Unknown
    }

    /// The class in fixed words, without anything that was measured or said.
    pub fn words(self) -> &'static str {
        match self {
            Self::Crash => "its process ended",
            Self::Hang => "its process lives and does not answer",
            Self::MemoryLeak => "its memory grows abnormally",
            Self::CpuContention => "it uses abnormally much processor time",
            Self::Corruption => "its state does not pass its check",
            Self::DiskFull => "its file system has no room",
            Self::Overload => "it has more to do than it can",
            Self::DependencyDown => "a service that it calls is down",
            Self::DiskSlow => "it waits for a slow disk",
            Self::CpuStarvation => "others have the processors",
            Self::ConnectionExhaustion => "its slots for clients are taken",
            Self::LockPileup => "many of its sessions wait behind one",
            Self::FdExhaustion => "it has as many files open as it may",
            Self::ReadOnlyFs => "its file system cannot be written any more",
            Self::NetworkLoss => "packets to it or from it get lost",
            Self::Unknown => "something is wrong, and it is not known what",
        }
    }

    /// Whether a restart mends it.
    pub fn restart_helps(self) -> RestartHelps {
        match self {
            Self::Crash | Self::Hang | Self::MemoryLeak | Self::CpuContention | Self::FdExhaustion => {
                RestartHelps::Yes
            }
            Self::Corruption
            | Self::DiskFull
            | Self::Overload
            | Self::DependencyDown
            | Self::DiskSlow
            | Self::CpuStarvation
            | Self::ConnectionExhaustion
            | Self::LockPileup
            | Self::ReadOnlyFs
            | Self::NetworkLoss => RestartHelps::No,
            Self::Unknown => RestartHelps::Unknown,
        }
    }

    /// Whether the detector alone finds trouble of this class.
    pub fn from_detector(self) -> bool {
        matches!(self, Self::MemoryLeak | Self::CpuContention | Self::Unknown)
    }

    /// Whether a copy of the service's state that is taken meanwhile may be a bad one.
    pub fn speaks_against_state(self) -> bool {
        matches!(
            self,
            Self::Crash
                | Self::Hang
                | Self::Corruption
                | Self::DiskFull
                | Self::DependencyDown
                | Self::Overload
        )
    }

    /// The class as the contract's files spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Crash => "crash",
            Self::Hang => "hang",
            Self::MemoryLeak => "memory_leak",
            Self::CpuContention => "cpu_contention",
            Self::Corruption => "corruption",
            Self::DiskFull => "disk_full",
            Self::Overload => "overload",
            Self::DependencyDown => "dependency_down",
            Self::DiskSlow => "disk_slow",
            Self::CpuStarvation => "cpu_starvation",
            Self::ConnectionExhaustion => "connection_exhaustion",
            Self::LockPileup => "lock_pileup",
            Self::FdExhaustion => "fd_exhaustion",
            Self::ReadOnlyFs => "read_only_fs",
            Self::NetworkLoss => "network_loss",
            Self::Unknown => "unknown",
        }
    }
}

impl fmt::Display for FaultClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What the hands can do to a service. Nothing here can delete data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ActionKind {
    /// Check the state, then start a service that is not running. Refused when the state is corrupt.
    Start,
    /// TERM, KILL, reaped, group gone, check the state, start.
    Restart,
    /// Stop, put the last good checkpoint in the state's place (the replaced state is kept), start.
    RestoreAndStart,
    /// Cancel the statement of the session that others wait for. Its session goes on.
    CancelQuery,
    /// End the session that others wait for. Its transaction is rolled back, as at a crash of its client.
    TerminateBlocker,
    /// End sessions that hold slots idly, the longest first, until enough are free. Their clients connect again.
    EndIdleSessions,
    /// Have the service read its settings again, where their files are newer than what it runs on.
    Reload,
    /// Tell another system, by a signed request, which does what it does.
    Webhook,
    /// Run the program that is configured for it.
    Hook,
    /// Move files that the policy's people listed as ones that can be made again to a quarantine on another file system.
    RelieveSpace,
    /// Bound the processor time of a listed group of processes; taken back by itself.
    ThrottleCpu,
    /// Bound the memory of a listed group of processes; taken back by itself.
    LimitMemory,
    /// Stop a listed group of processes where it is; it goes on by itself.
    Freeze,
    /// Let what the service's proxy has in hand end and turn away what is new; taken back by itself.
    Drain,
    /// Have systemd restart a named unit.
    RestartUnit,
    /// Have systemd reload a named unit.
    ReloadUnit,
    /// Have systemd forget that a named unit failed.
    ResetFailedUnit,
    /// Have Kubernetes replace the pods of a named deployment, one after the other.
    RolloutRestart,
    /// Have Kubernetes run one more pod of a named deployment, up to a bound.
    ScaleUp,
    /// Have Kubernetes go back to the revision before of a named deployment.
    RolloutUndo,
}

impl ActionKind {
    /// Every action there is.
    pub const ALL: [Self; 20] = [
        Self::Start,
        Self::Restart,
        Self::RestoreAndStart,
        Self::CancelQuery,
        Self::TerminateBlocker,
        Self::EndIdleSessions,
        Self::Reload,
        Self::Webhook,
        Self::Hook,
        Self::RelieveSpace,
        Self::ThrottleCpu,
        Self::LimitMemory,
        Self::Freeze,
        Self::Drain,
        Self::RestartUnit,
        Self::ReloadUnit,
        Self::ResetFailedUnit,
        Self::RolloutRestart,
        Self::ScaleUp,
        Self::RolloutUndo,
    ];

    /// Whether the service gets another process by it, so that what was seen of the former one says nothing any more.
    pub fn renews_process(self) -> bool {
        matches!(self, Self::Start | Self::Restart | Self::RestoreAndStart)
    }

    /// Whether it is taken back by itself after a time.
    pub fn ends_by_itself(self) -> bool {
        matches!(
            self,
            Self::ThrottleCpu | Self::LimitMemory | Self::Freeze | Self::Drain
        )
    }

    /// The action as the contract's files spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Restart => "restart",
            Self::RestoreAndStart => "restore_and_start",
            Self::CancelQuery => "cancel_query",
            Self::TerminateBlocker => "terminate_blocker",
            Self::EndIdleSessions => "end_idle_sessions",
            Self::Reload => "reload",
            Self::Webhook => "webhook",
            Self::Hook => "hook",
            Self::RelieveSpace => "relieve_space",
            Self::ThrottleCpu => "throttle_cpu",
            Self::LimitMemory => "limit_memory",
            Self::Freeze => "freeze",
            Self::Drain => "drain",
            Self::RestartUnit => "restart_unit",
            Self::ReloadUnit => "reload_unit",
            Self::ResetFailedUnit => "reset_failed_unit",
            Self::RolloutRestart => "rollout_restart",
            Self::ScaleUp => "scale_up",
            Self::RolloutUndo => "rollout_undo",
        }
    }
}

impl fmt::Display for ActionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What verification found after an action.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The service answers again and the symptom is gone.
    Healed,
    /// The symptom is still there.
    NoEffect,
    /// The service answered before the action and does not after it.
    Harm,
    /// Nothing could be observed, for instance because no probe is configured.
    Unknown,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Healed => "healed",
            Self::NoEffect => "no_effect",
            Self::Harm => "harm",
            Self::Unknown => "unknown",
        })
    }
}

/// The number of an incident, from 1, unique on its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct IncidentId(pub u64);

impl fmt::Display for IncidentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The number of an intent, from 1, unique on its node: the key by which a restarted node finds out what became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct IntentId(pub u64);

impl fmt::Display for IntentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One session of a database server: its process, and what tells it from a later one with the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SessionId {
    /// Its process.
    pub pid: i32,
    /// A digest of the moment of its start.
    pub birth: u64,
}

/// What a session that others wait for waits for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RootWaits {
    /// For none of these.
    #[default]
    Nothing,
    /// For the log to be written: at its commit, or because it writes much.
    Log,
    /// For its commit to be on the disk. Nothing that is done to it would hasten that.
    Commit,
    /// For its commit to be on a standby. Ending that wait would leave a commit that the standby may not have.
    Standby,
}

/// One planned action. It is recorded durably before anything is done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// Its number.
    pub id: IntentId,
    /// The incident that it is to end.
    pub incident: IncidentId,
    /// The service that it touches.
    pub service: String,
    /// What is to be done.
    pub action: ActionKind,
    /// For what. A record of an earlier build does not say.
    #[serde(default = "FaultClass::unknown")]
    pub class: FaultClass,
    /// The session that it is to touch, where it touches one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<SessionId>,
    /// When it was decided.
    pub decided: When,
    /// Why, in words.
    pub reason: String,
}

/// What a person approves: exactly this action for exactly this diagnosis under exactly these policies, until it expires.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The node; empty in a plan of a build that did not name it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub node: String,
    /// The incident.
    pub incident: IncidentId,
    /// The service.
    pub service: String,
    /// What is to be done.
    pub action: ActionKind,
    /// For what.
    pub class: FaultClass,
    /// The session that is to be touched, where one is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<SessionId>,
    /// Digest of the policies.
    pub policy: String,
    /// When it was made.
    pub made: When,
    /// Approvals count until then.
    pub expires: When,
}

impl Plan {
    /// The text that is signed: one line each, in this order. `node` is left out where it is empty, so that what was signed under an earlier
    /// build stays signed; `session` stands only where one is to be touched.
    pub fn text(&self) -> String {
        let session = self.session.map_or_else(String::new, |session| {
            format!("session {} {:016x}\n", session.pid, session.birth)
        });
        let node = if self.node.is_empty() {
            String::new()
        } else {
            format!("node {}\n", self.node)
        };
        format!(
            "{node}incident {}\nservice {}\naction {}\nclass {}\n{session}policy {}\nmade {}\nexpires {}\n",
            self.incident,
            self.service,
            self.action,
            self.class,
            self.policy,
            self.made.unix_ms,
            self.expires.unix_ms
        )
    }

    /// SHA-256 of [`Plan::text`], hexadecimal.
    pub fn hash(&self) -> String {
        use sha2::Digest as _;
        data_encoding::HEXLOWER.encode(&sha2::Sha256::digest(self.text()))
    }
}

/// A channel of the detector that explains part of an anomaly.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cause {
    /// The channel's name, such as `service_memory_bytes`.
    pub channel: String,
    /// Its share of the score; compared within one anomaly only.
    pub contribution: f32,
    /// Whether the channel lies above what was expected; `None` when the detector does not say.
    pub rising: Option<bool>,
    /// What speaks for it over the whole incident; for people only, no decision goes by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evidence: Option<CauseEvidence>,
}

/// What speaks for a cause over the rows of the incident so far. It holds no measured value.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CauseEvidence {
    /// What people's ranking goes by, ≥ 0.
    pub strength: f32,
    /// The channel's share of the squared residuals of all channels, 0 to 1.
    pub residual_share: f32,
    /// Its mean distance from the median of the history, in robust spreads; above 0 = higher than usual.
    pub change: f32,
    /// When it left its usual range, milliseconds since the Unix epoch; `None` when it did not.
    pub since_unix_ms: Option<u64>,
}

impl From<(String, f32)> for Cause {
    fn from((channel, contribution): (String, f32)) -> Self {
        Self {
            channel,
            contribution,
            rising: None,
            evidence: None,
        }
    }
}

/// One observation in words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// When it was seen.
    pub at: When,
    /// What was seen.
    pub words: String,
}

/// What the trouble may be, by the evidence at the latest decision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hypothesis {
    /// The class.
    pub class: FaultClass,
    /// How sure it is, 0 to 1.
    pub certainty: f64,
    /// Why, in words.
    pub reason: String,
}

/// An action that was considered, and what spoke for or against it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alternative {
    /// The action; `None` is doing nothing, always a candidate.
    pub action: Option<ActionKind>,
    /// Whether it was the one chosen.
    pub chosen: bool,
    /// The reason, in words.
    pub reason: String,
}

/// How carrying out an intent ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "result")]
pub enum Outcome {
    /// Done: the service was started (its health is for verification to say).
    Done,
    /// Done: an earlier state was put in place, or the present one found good after all, and the service was started.
    Restored {
        /// Which state, and what was met on the way.
        detail: String,
    },
    /// Done without touching the service's process.
    Relieved {
        /// What the hands did and saw.
        detail: String,
    },
    /// Not done: the state did not pass its check. No state was changed.
    StateCorrupt {
        /// What the check said.
        detail: String,
        /// Whether the service's process runs now.
        running: bool,
    },
    /// Not done, or done in part.
    Failed {
        /// What happened.
        detail: String,
        /// Whether the service's process runs now.
        running: bool,
    },
    /// The executor did its part, and there was nothing left to touch, or too little came of it. The service's process was left alone.
    Fruitless {
        /// What it did and saw.
        detail: String,
    },
    /// Not done: who was to be touched had come to a commit, which the action is not for. Nobody was touched, so it speaks neither for nor against
    /// the action, and the incident may try it again within the policy's budgets.
    Spared {
        /// Who, and at what.
        detail: String,
    },
    /// Not carried out: the symptom had gone before the intent was durable.
    NotNeeded,
    /// The node stopped between intent and outcome; what became of it was found out by looking. What does not renew the process is not
    /// done again in that incident.
    Interrupted,
}

/// One action of an incident, from intent to verdict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActionRecord {
    /// The intent.
    pub intent: Intent,
    /// Whether the service answered probes when the action was decided: if it does not afterwards, the action did harm.
    pub answered_before: bool,
    /// When the effect began (the intent was durable).
    pub acted: Option<When>,
    /// When the executor reported.
    pub finished: Option<When>,
    /// How it ended.
    pub outcome: Option<Outcome>,
    /// What verification found.
    pub verdict: Option<Verdict>,
    /// A person who had the incident asked for another try after it: what renews the process may be done anew.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub before_retry: bool,
}

/// Where an incident stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IncidentState {
    /// Under observation; nothing may or need be done yet.
    Open,
    /// An action is recommended and waits for a person.
    AwaitingApproval,
    /// An action is chosen and waits for its cool-down.
    CoolingDown,
    /// An action is chosen, and the fleet holds it back.
    Held,
    /// An intent is being recorded or carried out.
    Acting,
    /// The action is done; the service is watched.
    Verifying,
    /// Closed: an action was verified.
    Healed,
    /// Closed: the symptom went away without a verified action.
    Recovered,
    /// A person has to look. The service is still watched.
    HandedToHuman,
}

impl IncidentState {
    /// Whether the incident has ended.
    pub fn is_closed(self) -> bool {
        matches!(self, Self::Healed | Self::Recovered)
    }
}

impl fmt::Display for IncidentState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open => "open",
            Self::AwaitingApproval => "awaiting_approval",
            Self::CoolingDown => "cooling_down",
            Self::Held => "held",
            Self::Acting => "acting",
            Self::Verifying => "verifying",
            Self::Healed => "healed",
            Self::Recovered => "recovered",
            Self::HandedToHuman => "handed_to_human",
        })
    }
}

/// An action on the process that was written down and not done, because autonomy is `observe`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Would {
    /// The action.
    pub action: ActionKind,
    /// When it was decided first.
    pub at: When,
    /// Whether the service got another process since, by other hands.
    pub renewed: bool,
}

/// Everything that is recorded of one incident.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Incident {
    /// Its number.
    pub id: IncidentId,
    /// The service.
    pub service: String,
    /// The latest diagnosis.
    pub class: FaultClass,
    /// Where it stands.
    pub state: IncidentState,
    /// The first sign that belongs to it (such as the first failed probe).
    pub opened: When,
    /// The sign was confirmed: this is the moment of detection.
    pub detected: When,
    /// The first effect began.
    pub acted: Option<When>,
    /// Verification ended with [`Verdict::Healed`].
    pub healed: Option<When>,
    /// It was closed.
    pub closed: Option<When>,
    /// The highest anomaly score seen, with the threshold then; `None` when no anomaly took part.
    pub score: Option<f32>,
    /// The threshold that belongs to `score`.
    pub threshold: Option<f32>,
    /// What was seen, oldest first; at most [`Incident::EVIDENCE_MAX`].
    pub evidence: Vec<Evidence>,
    /// Observations that were left out because the list was full.
    pub evidence_dropped: u64,
    /// Leading causes of the latest anomaly, greatest first; at most [`Incident::CAUSES_MAX`].
    pub causes: Vec<Cause>,
    /// What the trouble was taken for at the latest decision, then what else its signs speak for; at most
    /// [`Incident::HYPOTHESES_MAX`].
    #[serde(default)]
    pub hypotheses: Vec<Hypothesis>,
    /// What was considered at the latest decision.
    pub alternatives: Vec<Alternative>,
    /// What autonomy `observe` kept from being done, where what became of the trouble without it tells something of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub would: Option<Would>,
    /// What waits for approval, or was approved last.
    #[serde(default)]
    pub plan: Option<Plan>,
    /// Whose signatures under that plan count.
    #[serde(default)]
    pub approved_by: BTreeSet<String>,
    /// What was done, oldest first.
    pub actions: Vec<ActionRecord>,
    /// The verdict of the last verified action.
    pub verdict: Option<Verdict>,
    /// Why a person has to look.
    pub handed_over: Option<String>,
}

impl Incident {
    /// Most observations kept for one incident.
    pub const EVIDENCE_MAX: usize = 32;
    /// Most causes kept for one incident.
    pub const CAUSES_MAX: usize = 5;
    /// Most hypotheses kept for one incident.
    pub const HYPOTHESES_MAX: usize = 4;

    /// The action that waits for a person's approval.
    pub fn recommended(&self) -> Option<ActionKind> {
        self.plan
            .as_ref()
            .filter(|_| self.state == IncidentState::AwaitingApproval)
            .map(|plan| plan.action)
    }
}

/// Something that a person should hear about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    /// The incident.
    pub incident: IncidentId,
    /// The service.
    pub service: String,
    /// What kind of word it is.
    pub kind: NoticeKind,
    /// The word itself, one or two sentences.
    pub words: String,
}

/// Kinds of notices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NoticeKind {
    /// An action is recommended and needs approval.
    Recommended,
    /// In autonomy `observe`: what would have been done.
    WouldHaveActed,
    /// The node will not act by itself any more: a person has to look.
    HandedToHuman,
    /// The incident that was handed over is still there.
    StillOpen,
    /// An action did harm: until a person says otherwise the node does nothing of that risk class to this service by itself.
    Demoted,
}
