//! The incident machine: observations in, intents out. It reads no clock, touches no process and no file.
//!
//! ```text
//! Open → Acting → Verifying → Healed
//!  │  ↖ CoolingDown, AwaitingApproval        NoEffect → next rung of the ladder
//!  └→ Recovered (the signs went away)        nothing left, budget spent, harm → HandedToHuman (still watched)
//! ```
//!
//! One incident is open for a service at a time, and what happens to the service meanwhile joins it. One action at a time is under
//! way in a failure domain, which is a service with what it calls, see `domain`. An action is charged to its budget when it is decided, recorded durably before it begins, and after a restart
//! of the node its outcome is found out by looking. What renews the process and is found not to have happened is decided anew; anything
//! else counts as done once its intent was durable, and is verified.

mod act;
mod course;
mod decide;
mod detect;
mod diagnose;
mod domain;
mod fleet;
mod latency;
mod observe;
mod people;
mod sessions;
mod standing;
mod verify;
mod why;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::fleet::Health;
use self::observe::Observed;
pub use self::why::Explained;
use crate::breaker::{Breaker, Breakers};
use crate::budget::{Charge, Ledger};
use crate::evidence::Evidence as Record;
use crate::policy::evaluate::{self, RulingRecord};
use crate::policy::fleet::FleetSeen;
use crate::policy::{HealPolicy, NodeBudget};
use crate::standing::{Demotion, Reinstated};
use crate::types::{
    ActionKind, Cause, Evidence, FaultClass, Incident, IncidentId, IncidentState, Intent, IntentId, Notice,
    NoticeKind, Now, Outcome, RootWaits, SessionId,
};

/// State of a process as `/proc/PID/stat` tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessState {
    /// Running, sleeping or waiting for the disk: it may answer.
    Alive,
    /// Stopped (`T` or `t`).
    Stopped,
}

/// What a database server's own views tell of its sessions, as its healer was let in to see them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SessionsSeen {
    /// The session that most others wait for, where enough of them have waited for long enough.
    pub pile_up: Option<PileUp>,
    /// Slots that ordinary clients can still have.
    pub free: u32,
    /// Below so many they count as exhausted.
    pub free_min: u32,
}

/// What the kernel tells of a service's threads since the last look, and of the host.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct PressureSeen {
    /// Its threads that were ready to run and waited for a processor, in the mean; 0 or more.
    pub waits_for_cpu: Option<f64>,
    /// Its threads that waited for a disk (state `D`), in the mean of the latest looks; 0 or more.
    pub waits_for_disk: Option<f64>,
    /// Its threads that ran, in the mean: so many processors it kept busy; 0 or more.
    pub runs: Option<f64>,
    /// Share of all the host's processors that it used, 0 to 1.
    pub uses_cpu: Option<f64>,
    /// Clients that are connected now, against what is usual while it is well; `None` where that is not known or they are few.
    pub crowd: Option<f64>,
    /// Whether that number was taken from an earlier look, since the table of sockets takes long to read.
    pub crowd_is_old: bool,
    /// Share of the latest time in which everything on the host that could run waited for a disk, 0 to 1.
    pub host_io_full: Option<f64>,
    /// Of its processes the largest share of its limit of open files that is open, 0 to 1.
    pub descriptors: Option<f64>,
    /// What the way to it loses; `None` where that is not known or no more than usual.
    pub network: Option<NetworkSeen>,
}

/// What the kernel tells of TCP since the last look, where far more is sent again than usual.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct NetworkSeen {
    /// Share of the host's segments that were sent again, 0 to 1.
    pub resent: f64,
    /// Connections within the host to or from the service's port, such as its probe's, that wait for word of what they sent again.
    pub unheard: u32,
    /// Connections, taken or not, with something for the service that it has not read: it may be the one that does not answer.
    pub unread: u32,
    /// Packets that the host's interfaces dropped or found damaged.
    pub dropped: u64,
}

/// How far a service's memory is from the most that it can have.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct MemorySeen {
    /// Share of its limit in use, or of what it has and the host could still give; 0 or more.
    pub share: Option<f64>,
    /// When that is all used, should it go on as steadily as it rises; `None` while it does not rise steadily, or reaches it too late to matter.
    pub full_in: Option<Duration>,
}

/// One session that others wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PileUp {
    /// Its process.
    pub pid: i32,
    /// A digest of its start, see [`SessionId::birth`].
    pub birth: u64,
    /// Sessions behind it.
    pub behind: u32,
    /// Whole seconds that the longest of them has waited.
    pub waited_s: u64,
    /// Whether it runs a statement, so that there is one to cancel.
    pub running: bool,
    /// A digest of the moments at which its transaction and its statement began.
    pub statement: u64,
    /// What it waits for itself.
    pub waits: RootWaits,
    /// Whether it may be touched at all.
    pub touchable: bool,
}

impl PileUp {
    /// The session that others wait for.
    pub fn id(&self) -> SessionId {
        SessionId {
            pid: self.pid,
            birth: self.birth,
        }
    }
}

/// What the machine is told.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// A probe from outside ended.
    Probe {
        /// The service.
        service: String,
        /// Whether it answered well and in time.
        ok: bool,
        /// How long it took.
        latency: Duration,
        /// What happened, in words, when it was not ok.
        detail: String,
    },
    /// The service's process runs: started at boot, or adopted. Not for starts by [`Output::Execute`].
    Started {
        /// The service.
        service: String,
        /// Its process.
        pid: u32,
    },
    /// The service's process ended.
    Exited {
        /// The service.
        service: String,
        /// How, in words, such as `killed by signal 9`.
        status: String,
    },
    /// The service cannot be started here: a server that was not started here runs on its data. A person has it then, at once.
    Occupied {
        /// The service.
        service: String,
        /// In words, with that server's process.
        detail: String,
    },
    /// The state of the service's process was looked at.
    Process {
        /// The service.
        service: String,
        /// The state found.
        state: ProcessState,
    },
    /// The detector's verdict on the latest sample is anomalous (given again for each such sample).
    Anomaly {
        /// The service.
        service: String,
        /// The score.
        score: f32,
        /// The threshold that it passed.
        threshold: f32,
        /// Leading causes.
        causes: Vec<Cause>,
    },
    /// The detector's alarm ended.
    AnomalyCleared {
        /// The service.
        service: String,
    },
    /// The detector's verdict on the latest sample is normal. Needed only while an incident of the service is open.
    Calm {
        /// The service.
        service: String,
    },
    /// The service's durable state did not pass its check.
    StateCorrupt {
        /// The service.
        service: String,
        /// What the check said.
        detail: String,
    },
    /// The service's durable state passed its check (after an earlier [`Input::StateCorrupt`]).
    StateGood {
        /// The service.
        service: String,
    },
    /// The service's file system has no room.
    DiskFull {
        /// The service.
        service: String,
        /// Bytes left.
        free_bytes: u64,
    },
    /// Whether the file system of the service's state, which could be written, cannot any more.
    ReadOnly {
        /// The service.
        service: String,
        /// It cannot.
        on: bool,
    },
    /// The service's file system has room again.
    DiskRelieved {
        /// The service.
        service: String,
    },
    /// The sessions of a database server were looked at, over a slot that is kept back from ordinary clients.
    Sessions {
        /// The service.
        service: String,
        /// What was seen.
        seen: SessionsSeen,
    },
    /// The server let nobody in to look at its sessions.
    SessionsUnseen {
        /// The service.
        service: String,
        /// Why.
        detail: String,
    },
    /// The server itself refused an ordinary client for want of a slot.
    SessionsRefused {
        /// The service.
        service: String,
        /// Its words.
        detail: String,
    },
    /// What could be moved away on a full file system.
    Relievable {
        /// The service.
        service: String,
        /// In bytes; 0 where nothing is listed or eligible.
        bytes: u64,
    },
    /// What keeps the service's threads from running.
    Pressure {
        /// The service.
        service: String,
        /// What was seen.
        seen: PressureSeen,
    },
    /// Where the service's memory stands; told before an [`Input::Anomaly`], and forgotten with the alarm.
    Memory {
        /// The service.
        service: String,
        /// What was seen.
        seen: MemorySeen,
    },
    /// The service's output says unusually often that something failed.
    LogErrors {
        /// The service.
        service: String,
        /// Lines since the last look.
        lines: u32,
        /// The most frequent one, with everything that varies taken out.
        template: String,
        /// What such a line speaks for, where it is known.
        hint: Option<FaultClass>,
    },
    /// The service itself answered a probe with a refusal that no restart mends, such as a wrong password or a server that takes no writes
    /// since its snapshots fail. Told before the [`Input::Probe`] that failed for it.
    Refused {
        /// The service.
        service: String,
        /// Its words.
        detail: String,
    },
    /// The service's failure risk at the shortest horizon. Policies may ask for it; nothing else goes by it.
    Risk {
        /// The service.
        service: String,
        /// 0 to 1; `None` when not known.
        probability: Option<f64>,
    },
    /// The intent is on disk.
    IntentDurable {
        /// The intent.
        id: IntentId,
    },
    /// The intent could not be written: it will not be carried out.
    IntentFailed {
        /// The intent.
        id: IntentId,
        /// Why.
        detail: String,
    },
    /// The hands have finished.
    Executed {
        /// The intent.
        id: IntentId,
        /// How it ended.
        outcome: Outcome,
    },
    /// Answer to [`Output::Reconcile`].
    Reconciled {
        /// The intent.
        id: IntentId,
        /// Whether the service's process runs now.
        running: bool,
        /// Whether the running process was started for this intent.
        took_effect: bool,
    },
    /// A person approves the recommended action. The caller has checked the signature.
    Approve {
        /// The incident.
        incident: IncidentId,
        /// Digest of the plan that was approved; `None` for an incident that a person has, which has no plan.
        plan: Option<String>,
        /// Whose signature it is; `None` for the word of somebody at the host.
        by: Option<String>,
    },
    /// A person declines the recommended action: the incident is theirs.
    Deny {
        /// The incident.
        incident: IncidentId,
    },
    /// A person says that what the incident is about is normal now: it is noted. The end of the alarm is told like any other, by
    /// [`Input::AnomalyCleared`].
    NewNormal {
        /// The incident.
        incident: IncidentId,
    },
    /// A person lifts what stands against a service: demotions after harm, open breakers. The caller has checked the signature.
    Reinstate {
        /// The service.
        service: String,
        /// Digest of what they lift, see [`crate::standing::Standing::hash`].
        standing: String,
        /// Whose signature it is; `None` for the word of somebody at the host.
        by: Option<String>,
    },
    /// How the fleet is. It only ever holds something back, see [`crate::policy::fleet`].
    Fleet(FleetSeen),
    /// The node holds a slot of the fleet, and lets go of it by then on the monotonic clock of [`Now`]. Counts while it is wanted, see
    /// [`IncidentMachine::slot_wanted`].
    Slot {
        /// That moment.
        until: Duration,
    },
    /// The stop switch: while on, nothing new is begun.
    Halt(bool),
}

/// What the machine wants done, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// An incident was opened: store it.
    Opened(Incident),
    /// The policy was asked: write it down, so that the ruling can be checked later.
    Ruled(Box<RulingRecord>),
    /// Store [`IncidentMachine::export`] and the intent durably, then answer [`Input::IntentDurable`] (or [`Input::IntentFailed`]).
    RecordIntent(Intent),
    /// Carry the intent out, then answer [`Input::Executed`].
    Execute(Intent),
    /// After a restart: find out whether the service runs, then answer [`Input::Reconciled`].
    Reconcile(Intent),
    /// An incident changed: store it.
    Updated(Incident),
    /// An incident ended: store it.
    Closed(Incident),
    /// A person lifted what stood against a service: write it down among the rulings.
    Reinstated(Box<Reinstated>),
    /// Tell a person.
    Notify(Notice),
}

/// Which services there are and what is allowed.
#[derive(Debug, Clone)]
pub struct HealConfig {
    /// Policy by service name.
    pub services: BTreeMap<String, HealPolicy>,
    /// The budget over all services.
    pub node: NodeBudget,
    /// Which services each one calls. One that does not answer while a service it calls is down is not restarted for it.
    pub depends_on: BTreeMap<String, Vec<String>>,
    /// Identifies the monotonic clock of [`Now`]: the boot id for time since boot, else something new for each process.
    pub clock_id: String,
}

/// What survives a restart of the node. Store it whenever the machine asks to record an intent, and after other outputs.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct MachineState {
    /// Clock of the recorded charges, see [`HealConfig::clock_id`].
    pub clock_id: String,
    /// The last incident's number.
    pub last_incident: u64,
    /// The last intent's number.
    pub last_intent: u64,
    /// Actions that may still count against a budget.
    pub charges: Vec<Charge>,
    /// What came of actions, as evidence for letting the node act by itself.
    #[serde(default)]
    pub evidence: Vec<Record>,
    /// Classes of actions that are only recommended for a service, since one of them harmed it.
    #[serde(default, deserialize_with = "crate::standing::demotions")]
    pub demoted: Vec<Demotion>,
    /// Executors that failed last time.
    #[serde(default)]
    pub breakers: Vec<Breaker>,
    /// Services whose incident a person has until a breaker lets an attempt through.
    #[serde(default)]
    pub broken: BTreeSet<String>,
    /// Services whose incident a person has only because its intent could not be recorded.
    #[serde(default)]
    pub unrecorded: BTreeSet<String>,
    /// Services whose process had ended by itself, or could not be started, and that nobody has started since.
    #[serde(default)]
    pub down: BTreeSet<String>,
    /// Restarts that healed trouble found by the detector alone, see [`HealPolicy::anomaly_restarts`].
    #[serde(default)]
    pub healed: Vec<HealedRestart>,
    /// Services that were probed.
    pub probed: BTreeSet<String>,
    /// Whether the stop switch was on.
    pub halted: bool,
    /// Incidents that are not closed, oldest first.
    pub open: Vec<Incident>,
}

/// A restart that was verified as healed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealedRestart {
    /// The service.
    pub service: String,
    /// What it was restarted for.
    pub class: FaultClass,
    /// When, milliseconds on the monotonic clock.
    pub at_ms: u64,
}

impl HealedRestart {
    fn age(&self, now_ms: u64) -> Duration {
        Duration::from_millis(now_ms.saturating_sub(self.at_ms))
    }
}

/// The loop's brain for one host. Memory is bounded by the number of services and the budgets.
#[derive(Debug, Clone)]
pub struct IncidentMachine {
    /// The node, as plans name it.
    name: String,
    /// So many people have to sign before what stands against a service is lifted; 0 for the word of somebody at the host.
    reinstate_need: u32,
    /// What is being lifted, by service, and who has signed. Not kept: after a restart people sign anew.
    reinstating: BTreeMap<String, (String, BTreeSet<String>)>,
    clock_id: String,
    node: NodeBudget,
    depends_on: BTreeMap<String, Vec<String>>,
    /// What each service calls, also through others.
    called: BTreeMap<String, BTreeSet<String>>,
    /// Digest of all policies.
    policy: String,
    /// The last ruling of each service and action, so that one that is asked for again is written down once.
    ruled: BTreeMap<(String, ActionKind), RulingRecord>,
    services: BTreeMap<String, Observed>,
    open: BTreeMap<String, Open>,
    ledger: Ledger,
    breakers: Breakers,
    demoted: Vec<Demotion>,
    evidence: Vec<Record>,
    healed: Vec<HealedRestart>,
    /// Services whose last intent could not be recorded, with the time of the next reminder.
    unrecorded: BTreeMap<String, Duration>,
    /// Services that were down by themselves when the node's last run ended, until they are started.
    was_down: BTreeSet<String>,
    /// What is known of the fleet. Not kept: after a restart it is heard anew.
    fleet: fleet::Fleet,
    halted: bool,
    last_incident: u64,
    last_intent: u64,
    latest: Duration,
    outputs: VecDeque<Output>,
    ignored: u64,
}

/// Why an incident that a person has is tried again by itself after a restart of the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Retry {
    /// A breaker lets an attempt through.
    Breaker,
    /// Its intent could not be recorded.
    Record,
    Never,
}

/// An incident that is not closed.
#[derive(Debug, Clone)]
struct Open {
    record: Incident,
    phase: Phase,
}

/// What an open incident waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    /// More observations; `undecided` asks for a decision at the next diagnosis.
    Watching { undecided: bool },
    /// What it calls to serve again.
    Excused { remind_at: Duration },
    /// A sign that something presses: the detector alone suspects it, and it serves.
    LetBe,
    /// A person's word.
    AwaitingApproval {
        remind_at: Duration,
        expires_at: Duration,
    },
    /// The end of a cool-down.
    CoolingDown { until: Duration, approved: bool },
    /// The end of another action in its failure domain.
    Queued { approved: bool, remind_at: Duration },
    /// The intent to be durable.
    Recording { id: IntentId, deadline: Duration },
    /// The hands.
    Acting { id: IntentId, deadline: Duration },
    /// The effect.
    Verifying { id: IntentId, until: Duration },
    /// Word of what became of an intent before the node's restart.
    Reconciling { id: IntentId, deadline: Duration },
    /// A person. The class is the one that was handed over. `retry_at`: only the record failed, or an executor, so it is tried again.
    Handed {
        remind_at: Duration,
        retry_at: Option<Duration>,
    },
}

impl IncidentMachine {
    /// A machine that knows of no incident.
    pub fn new(config: HealConfig) -> Self {
        Self {
            name: String::new(),
            reinstate_need: 0,
            reinstating: BTreeMap::new(),
            policy: evaluate::digest(config.services.iter(), config.node),
            clock_id: config.clock_id,
            node: config.node,
            called: domain::called(&config.depends_on),
            depends_on: config.depends_on,
            ruled: BTreeMap::new(),
            services: config
                .services
                .into_iter()
                .map(|(name, policy)| (name, Observed::new(policy)))
                .collect(),
            open: BTreeMap::new(),
            ledger: Ledger::default(),
            breakers: Breakers::default(),
            demoted: Vec::new(),
            evidence: Vec::new(),
            healed: Vec::new(),
            unrecorded: BTreeMap::new(),
            was_down: BTreeSet::new(),
            fleet: fleet::Fleet::default(),
            halted: false,
            last_incident: 0,
            last_intent: 0,
            latest: Duration::ZERO,
            outputs: VecDeque::new(),
            ignored: 0,
        }
    }

    /// The same, on a node of this name: plans say it, so that an approval for one node is none for another.
    #[must_use]
    pub fn named(mut self, node: &str) -> Self {
        node.clone_into(&mut self.name);
        self
    }

    /// The same, where so many different people have to sign before what stands against a service is lifted. 0, as at first: the word of
    /// somebody at the host is enough.
    #[must_use]
    pub fn reinstated_by(mut self, need: u32) -> Self {
        self.reinstate_need = need;
        self
    }

    /// The same, where these services are probed: one of them that was just started has to answer before it counts as up.
    #[must_use]
    pub fn probing<'a>(mut self, services: impl IntoIterator<Item = &'a str>) -> Self {
        for name in services {
            if let Some(seen) = self.services.get_mut(name) {
                seen.probed = true;
            }
        }
        self
    }

    /// A machine that goes on after a restart of the node. Poll for outputs at once: intents without outcome are reconciled first.
    ///
    /// Incidents of services that are configured no more are closed as recovered, and those whose action had not ended are
    /// reconciled. A stored second incident for one service is closed likewise.
    pub fn restore(config: HealConfig, state: MachineState, now: Now) -> Self {
        let mut machine = Self::new(config);
        machine.latest = now.monotonic;
        machine.ledger = Ledger::restore(state.charges, state.clock_id == machine.clock_id, now.monotonic);
        machine.demoted = state.demoted;
        machine.evidence = state.evidence;
        machine.drop_foreign_evidence();
        // On another clock nothing is known of their age, so they count as made now.
        let (same_clock, now_ms) = (state.clock_id == machine.clock_id, now.when().monotonic_ms);
        machine.breakers = Breakers::restore(state.breakers, same_clock, now.monotonic);
        let services = &machine.services;
        machine.breakers.retain(|name| services.contains_key(name));
        machine.healed = state.healed;
        for healed in &mut machine.healed {
            healed.at_ms = if same_clock {
                healed.at_ms.min(now_ms)
            } else {
                now_ms
            };
        }
        machine.halted = state.halted;
        machine.was_down = state.down;
        machine.last_incident = state
            .open
            .iter()
            .map(|open| open.id.0)
            .fold(state.last_incident, u64::max);
        machine.last_intent = state.last_intent;
        for service in state.probed {
            if let Some(seen) = machine.services.get_mut(&service) {
                seen.probed = true;
            }
        }
        for record in state.open {
            let retry = if state.broken.contains(&record.service) {
                Retry::Breaker
            } else if state.unrecorded.contains(&record.service) {
                Retry::Record
            } else {
                Retry::Never
            };
            machine.reopen(now, record, retry);
        }
        machine.look_at_dependencies(now);
        machine
    }

    /// Takes one input. Poll outputs and the timeout afterwards. Time that runs backwards counts as standing still.
    ///
    /// Inputs that name an unknown service, incident or intent, or come too late, change nothing and are counted.
    pub fn handle(&mut self, now: Now, input: Input) {
        let now = self.advance(now);
        match &input {
            Input::Probe { service, .. }
            | Input::Started { service, .. }
            | Input::Exited { service, .. }
            | Input::Occupied { service, .. }
            | Input::Process { service, .. }
            | Input::Anomaly { service, .. }
            | Input::AnomalyCleared { service }
            | Input::Calm { service }
            | Input::StateCorrupt { service, .. }
            | Input::StateGood { service }
            | Input::DiskFull { service, .. }
            | Input::ReadOnly { service, .. }
            | Input::Risk { service, .. }
            | Input::Relievable { service, .. }
            | Input::Pressure { service, .. }
            | Input::Memory { service, .. }
            | Input::LogErrors { service, .. }
            | Input::Sessions { service, .. }
            | Input::SessionsUnseen { service, .. }
            | Input::SessionsRefused { service, .. }
            | Input::Refused { service, .. }
            | Input::DiskRelieved { service } => {
                let service = service.clone();
                self.observe(now, &service, &input);
            }
            Input::IntentDurable { id } => self.intent_durable(now, *id),
            Input::IntentFailed { id, detail } => self.intent_failed(now, *id, detail),
            Input::Executed { id, outcome } => self.executed(now, *id, outcome.clone()),
            Input::Reconciled {
                id,
                running,
                took_effect,
            } => self.reconciled(now, *id, *running, *took_effect),
            Input::Approve { incident, plan, by } => {
                self.approve(now, *incident, plan.as_deref(), by.as_deref());
            }
            Input::Deny { incident } => self.deny(now, *incident),
            Input::NewNormal { incident } => self.new_normal(now, *incident),
            Input::Reinstate {
                service,
                standing,
                by,
            } => self.reinstate(now, service, standing, by.clone()),
            Input::Fleet(seen) => self.fleet_told(now, *seen),
            Input::Slot { until } => self.slot_lent(now, *until),
            Input::Halt(on) if *on == self.halted => {}
            Input::Halt(on) => {
                self.halted = *on;
                let services: Vec<String> = self.open.keys().cloned().collect();
                for service in services {
                    self.decide_again(now, &service);
                }
            }
        }
        self.settle_domains(now);
        self.drop_former_words();
        self.drop_unwanted_slot();
    }

    /// Lets time pass. Call when the moment of [`Self::poll_timeout`] has come; poll outputs and the timeout afterwards.
    pub fn handle_timeout(&mut self, now: Now) {
        let now = self.advance(now);
        let due: Vec<String> = self
            .open
            .iter()
            .filter(|(_, open)| {
                open.phase
                    .deadline()
                    .is_some_and(|deadline| deadline <= now.monotonic)
            })
            .map(|(service, _)| service.clone())
            .collect();
        for service in due {
            self.timed_out(now, &service);
        }
        self.settle_domains(now);
        self.fleet_fell_silent(now);
        self.drop_former_words();
        self.drop_unwanted_slot();
    }

    /// The next output, until `None`.
    #[must_use]
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// The monotonic time at which [`Self::handle_timeout`] is due.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Duration> {
        let of_fleet = self.fleet.lapses_at();
        let open = self.open.values().filter_map(|open| open.phase.deadline());
        open.chain(of_fleet).min()
    }

    /// What has to survive a restart of the node.
    pub fn export(&self) -> MachineState {
        let mut open: Vec<Incident> = self.open.values().map(|open| open.record.clone()).collect();
        open.sort_by_key(|record| record.id);
        MachineState {
            clock_id: self.clock_id.clone(),
            last_incident: self.last_incident,
            last_intent: self.last_intent,
            charges: self.ledger.charges().to_vec(),
            demoted: self.demoted.clone(),
            breakers: self.breakers.all().to_vec(),
            unrecorded: self.unrecorded.keys().cloned().collect(),
            down: self
                .services
                .iter()
                .filter(|(service, seen)| seen.exit.is_some() || self.was_down.contains(*service))
                .map(|(service, _)| service.clone())
                .collect(),
            broken: self
                .open
                .iter()
                .filter(|(service, open)| {
                    let retried = matches!(
                        open.phase,
                        Phase::Handed {
                            retry_at: Some(_),
                            ..
                        }
                    );
                    retried && !self.unrecorded.contains_key(*service)
                })
                .map(|(service, _)| service.clone())
                .collect(),
            evidence: self.evidence.clone(),
            healed: self.healed.clone(),
            probed: self
                .services
                .iter()
                .filter(|(_, seen)| seen.probed)
                .map(|(name, _)| name.clone())
                .collect(),
            halted: self.halted,
            open,
        }
    }

    /// Incidents that are not closed, by service.
    pub fn open_incidents(&self) -> impl Iterator<Item = &Incident> {
        self.open.values().map(|open| &open.record)
    }

    /// The open incident of a service.
    pub fn open_incident(&self, service: &str) -> Option<&Incident> {
        self.open.get(service).map(|open| &open.record)
    }

    /// Whether a service may be started at the node's start without a decision: not while a decision is pending, nor where the process had ended by
    /// itself and its incident is open. That one is told as it is, and what follows is for policy, budget and people to say, where the policy leaves
    /// them a start at all.
    pub fn may_begin(&self, service: &str) -> bool {
        use IncidentState::{Acting, AwaitingApproval, CoolingDown, Held};
        self.open_incident(service).is_none_or(|incident| {
            let pending = matches!(incident.state, Acting | AwaitingApproval | CoolingDown | Held);
            let policy = self.services.get(service).map(|seen| &seen.policy);
            let is_decided = policy.is_some_and(|policy| policy.may_ever(ActionKind::Start));
            let is_left_down = is_decided && self.was_down.contains(service);
            !pending && !is_left_down
        })
    }

    /// Whether the stop switch is on.
    pub fn is_halted(&self) -> bool {
        self.halted
    }

    /// Inputs that named nothing known or came too late.
    pub fn ignored_inputs(&self) -> u64 {
        self.ignored
    }

    fn advance(&mut self, now: Now) -> Now {
        self.latest = self.latest.max(now.monotonic);
        Now {
            monotonic: self.latest,
            ..now
        }
    }

    fn observe(&mut self, now: Now, service: &str, input: &Input) {
        let Some(seen) = self.services.get_mut(service) else {
            self.ignored += 1;
            return;
        };
        let nothing_movable = seen.relievable == 0;
        let words = seen.take(now, input);
        seen.detect();
        let found_room = nothing_movable && seen.relievable > 0;
        // Once its end is told it is known as it is now, whoever starts it then.
        if matches!(
            input,
            Input::Started { .. } | Input::Exited { .. } | Input::Occupied { .. }
        ) {
            self.was_down.remove(service);
        }
        if let (Some(open), Input::Started { .. }) = (self.open.get_mut(service), input)
            && let Some(would) = &mut open.record.would
        {
            would.renewed = true;
        }
        if let (Some(open), Some(words)) = (self.open.get_mut(service), words) {
            open.record.note(now, words);
        }
        self.evaluate(now, service);
        if found_room {
            self.room_was_found(now, service);
        }
    }

    fn notify(&mut self, record: &Incident, kind: NoticeKind, words: String) {
        let notice = Notice {
            incident: record.id,
            service: record.service.clone(),
            kind,
            words,
        };
        self.outputs.push_back(Output::Notify(notice));
    }
}

impl Phase {
    fn deadline(&self) -> Option<Duration> {
        match self {
            Self::Watching { .. } | Self::LetBe => None,
            Self::Excused { remind_at } | Self::Queued { remind_at, .. } => Some(*remind_at),
            Self::AwaitingApproval {
                remind_at,
                expires_at,
            } => Some(*remind_at.min(expires_at)),
            Self::Handed { remind_at, retry_at } => {
                Some(retry_at.map_or(*remind_at, |retry| retry.min(*remind_at)))
            }
            Self::CoolingDown { until, .. } | Self::Verifying { until, .. } => Some(*until),
            Self::Recording { deadline, .. }
            | Self::Acting { deadline, .. }
            | Self::Reconciling { deadline, .. } => Some(*deadline),
        }
    }
}

impl Incident {
    /// The intent whose outcome is not known yet.
    pub fn in_flight(&self) -> Option<&Intent> {
        self.actions
            .last()
            .filter(|action| action.outcome.is_none())
            .map(|action| &action.intent)
    }

    /// The last action that was begun.
    pub fn last_action(&self) -> Option<ActionKind> {
        self.actions
            .iter()
            .rev()
            .find(|action| action.acted.is_some())
            .map(|action| action.intent.action)
    }

    fn note(&mut self, now: Now, words: String) {
        if self.evidence.len() < Self::EVIDENCE_MAX {
            self.evidence.push(Evidence {
                at: now.when(),
                words,
            });
        } else {
            self.evidence_dropped += 1;
        }
    }

    fn set_state(&mut self, state: IncidentState) {
        self.state = state;
    }
}

#[cfg(test)]
mod tests;
