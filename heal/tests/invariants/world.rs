//! A node whose disk, hands, people and clocks do what they like, and the oracle that looks on.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use theriac_heal::incident::{
    HealConfig, IncidentMachine, Input, MachineState, MemorySeen, NetworkSeen, Output, PileUp, PressureSeen,
    ProcessState, SessionsSeen,
};
use theriac_heal::policy::evaluate::{Ruling, evaluate};
use theriac_heal::policy::fleet::FleetSeen;
use theriac_heal::policy::{HealPolicy, NodeBudget};
use theriac_heal::types::{
    ActionKind, Cause, FaultClass, Incident, IncidentId, IncidentState, Intent, IntentId, Now, Outcome, Plan,
    RestartHelps, RootWaits,
};

use crate::op::{HOLD_MAX, Of, Op, SERVICES, Setting, Word};
use crate::oracle::{Lasting, Oracle};

const NODE: &str = "site-a";

/// What the disk holds and what the oracle knew when it was written.
#[derive(Clone, Default)]
struct Disk {
    state: MachineState,
    oracle: Lasting,
}

#[derive(Clone)]
pub(crate) struct World {
    pub(crate) machine: IncidentMachine,
    config: HealConfig,
    /// True time, in milliseconds; the machine sees it less `boot_ms`.
    ms: u64,
    boot_ms: u64,
    boots: u64,
    wall_ms: u64,
    disk: Disk,
    pub(crate) to_record: Vec<Intent>,
    pub(crate) executing: Vec<Intent>,
    to_reconcile: Vec<Intent>,
    durable: BTreeSet<IntentId>,
    pub(crate) executed: BTreeSet<IntentId>,
    /// True time of each decision that was carried out.
    decided: BTreeMap<IntentId, u64>,
    pub(crate) done: Vec<(u64, Intent)>,
    pub(crate) outcomes: BTreeMap<(IncidentId, ActionKind), usize>,
    full: BTreeSet<String>,
    read_only: BTreeSet<String>,
    /// Whose process was seen stopped at the last look: that is its own trouble.
    stopped: BTreeSet<String>,
    /// Whose latest probe in this life of the node failed.
    silent: BTreeSet<String>,
    pub(crate) oracle: Oracle,
    /// Plans that stood before.
    former: BTreeMap<IncidentId, String>,
    /// Actions of an incident before the last time that a person who has it asked for another try.
    retried: BTreeMap<IncidentId, usize>,
    stale: String,
    halted: bool,
    stalled: bool,
}

impl World {
    pub(crate) fn new(setting: Setting) -> Self {
        Self::under(&setting.policy())
    }

    /// Both services under this policy.
    pub(crate) fn under(policy: &HealPolicy) -> Self {
        let services = SERVICES
            .iter()
            .map(|name| ((*name).to_owned(), policy.clone()))
            .collect();
        let node = NodeBudget {
            max_actions: 6 * policy.max_actions / 4,
            window: Duration::from_mins(15),
        };
        let config = HealConfig {
            services,
            node,
            // The second calls the first.
            depends_on: BTreeMap::from([(SERVICES[1].to_owned(), vec![SERVICES[0].to_owned()])]),
            clock_id: "boot-0".to_owned(),
        };
        Self {
            machine: IncidentMachine::new(config.clone()).named(NODE),
            config,
            ms: 10_000_000,
            boot_ms: 9_000_000,
            boots: 0,
            wall_ms: 1_700_000_000_000,
            disk: Disk::default(),
            to_record: Vec::new(),
            executing: Vec::new(),
            to_reconcile: Vec::new(),
            durable: BTreeSet::new(),
            executed: BTreeSet::new(),
            decided: BTreeMap::new(),
            done: Vec::new(),
            outcomes: BTreeMap::new(),
            full: BTreeSet::new(),
            read_only: BTreeSet::new(),
            stopped: BTreeSet::new(),
            silent: BTreeSet::new(),
            oracle: Oracle::default(),
            former: BTreeMap::new(),
            retried: BTreeMap::new(),
            stale: "none".to_owned(),
            halted: false,
            stalled: false,
        }
    }

    pub(crate) fn now(&self) -> Now {
        Now {
            monotonic: Duration::from_millis(self.ms - self.boot_ms),
            unix_ms: self.wall_ms.saturating_add(self.ms),
        }
    }

    pub(crate) fn apply(&mut self, op: &Op) {
        match op {
            Op::Probe { service, ok } => {
                if *ok {
                    self.silent.remove(SERVICES[*service]);
                } else {
                    self.silent.insert(name(*service));
                }
                self.tell(Input::Probe {
                    service: name(*service),
                    ok: *ok,
                    latency: Duration::from_millis(2),
                    detail: "timed out".to_owned(),
                });
            }
            Op::Exit { service } => {
                self.tell(Input::Exited {
                    service: name(*service),
                    status: "signal 9".to_owned(),
                });
            }
            Op::Started { service } => self.tell(Input::Started {
                service: name(*service),
                pid: 7,
            }),
            Op::Process { service, stopped } => {
                let state = if *stopped {
                    self.stopped.insert(name(*service));
                    ProcessState::Stopped
                } else {
                    self.stopped.remove(SERVICES[*service]);
                    ProcessState::Alive
                };
                self.tell(Input::Process {
                    service: name(*service),
                    state,
                });
            }
            Op::Anomaly {
                service,
                channel,
                score,
            } => {
                let channel = [
                    "service_memory",
                    "service_cpu",
                    "host_cpu_used",
                    "service_probe_latency",
                ][*channel];
                let causes = vec![Cause {
                    channel: channel.to_owned(),
                    contribution: *score,
                    rising: Some(true),
                    evidence: None,
                }];
                self.tell(Input::Anomaly {
                    service: name(*service),
                    score: *score,
                    threshold: 3.0,
                    causes,
                });
            }
            Op::Suspicion { service, channel } => {
                self.apply(&Op::Probe {
                    service: *service,
                    ok: true,
                });
                for _ in 0..3 {
                    self.tell(Input::Memory {
                        service: name(*service),
                        seen: MemorySeen {
                            share: Some(0.95),
                            full_in: None,
                        },
                    });
                    self.apply(&Op::Anomaly {
                        service: *service,
                        channel: *channel,
                        score: 9.0,
                    });
                }
            }
            Op::Cleared { service } => self.tell(Input::AnomalyCleared {
                service: name(*service),
            }),
            Op::State { service, good: true } => self.tell(Input::StateGood {
                service: name(*service),
            }),
            Op::State { service, good: false } => {
                self.tell(Input::StateCorrupt {
                    service: name(*service),
                    detail: "page 7".to_owned(),
                });
            }
            Op::Disk { service, full: true } => {
                // One of the two has something that may be moved away.
                self.tell(Input::Relievable {
                    service: name(*service),
                    bytes: *service as u64,
                });
                self.full.insert(name(*service));
                self.tell(Input::DiskFull {
                    service: name(*service),
                    free_bytes: 0,
                });
            }
            Op::ReadOnly { service, on } => {
                let service = name(*service);
                if *on {
                    self.read_only.insert(service.clone());
                } else {
                    self.read_only.remove(&service);
                }
                self.tell(Input::ReadOnly { service, on: *on });
            }
            Op::Disk { service, full: false } => {
                self.full.remove(SERVICES[*service]);
                self.tell(Input::DiskRelieved {
                    service: name(*service),
                });
            }
            Op::Sessions {
                service,
                piled,
                running,
                full,
                pid,
            } => {
                for _ in 0..2 {
                    let pile_up = piled.then_some(PileUp {
                        pid: *pid,
                        birth: 1,
                        behind: 3,
                        waited_s: 6,
                        running: *running,
                        statement: 0,
                        waits: waits_of(*pid),
                        touchable: true,
                    });
                    self.tell(Input::Sessions {
                        service: name(*service),
                        seen: SessionsSeen {
                            pile_up,
                            free: if *full { 0 } else { 9 },
                            free_min: 5,
                        },
                    });
                }
            }
            Op::Pass { ms } => self.pass(*ms),
            Op::Record { stored } => self.record(*stored),
            Op::Execute { outcome } => self.end_executor(*outcome),
            Op::Die {
                new_boot,
                took_effect,
            } => {
                if !self.stalled {
                    self.store();
                }
                self.die(*new_boot, *took_effect);
            }
            Op::Refused { service, how } => {
                let (service, detail) = (name(*service), "too many clients".to_owned());
                self.tell(match how {
                    0 => Input::SessionsUnseen { service, detail },
                    1 => Input::SessionsRefused { service, detail },
                    _ => Input::Refused { service, detail },
                });
            }
            Op::Pressure { service, why } => self.tell(Input::Pressure {
                service: name(*service),
                seen: pressure(*why),
            }),
            Op::Sleep { ms } => self.ms += ms,
            Op::Agree { incident } => {
                for by in 0..2 {
                    let word = Word {
                        plan: Of::Present,
                        by: Some(by),
                    };
                    self.approve(IncidentId(*incident), word);
                }
            }
            Op::Failure {
                service,
                times,
                apart_ms,
            } => {
                let service = *service;
                for _ in 0..*times {
                    self.pass(*apart_ms);
                    for ok in [false, false] {
                        self.apply(&Op::Probe { service, ok });
                    }
                    self.record(true);
                    self.end_executor(3);
                    for ok in [true, true, true] {
                        self.apply(&Op::Probe { service, ok });
                    }
                }
            }
            Op::Lent {
                service,
                ms,
                late_ms,
                never,
            } => {
                let service = *service;
                if !self.config.services[SERVICES[service]].is_shared(ActionKind::Restart) {
                    return;
                }
                for ok in [false, false] {
                    self.apply(&Op::Probe { service, ok });
                }
                if *never {
                    self.pass(u64::try_from(HOLD_MAX.as_millis()).unwrap() + 1_000);
                    let (plan, by) = (Of::Present, None);
                    if let Some(open) = self.machine.open_incident(SERVICES[service]) {
                        self.approve(open.id, Word { plan, by });
                    }
                } else {
                    self.apply(&Op::Slot { ms: *ms });
                    self.ms += late_ms;
                }
                self.record(true);
            }
            Op::Approve { incident, word } => self.approve(IncidentId(*incident), *word),
            Op::Reinstate { service, stale } => {
                let present = self.machine.standing(SERVICES[*service]).hash();
                let standing = if *stale {
                    std::mem::replace(&mut self.stale, present)
                } else {
                    present
                };
                self.tell(Input::Reinstate {
                    service: name(*service),
                    standing,
                    by: None,
                });
            }
            Op::Deny { incident } => self.tell(Input::Deny {
                incident: IncidentId(*incident),
            }),
            Op::Report {
                nodes,
                unhealthy,
                acting,
            } => {
                let (nodes, unhealthy, acting) = (*nodes, *unhealthy, *acting);
                let now_ms = self.ms + 1 - self.boot_ms;
                self.oracle.fleet.told((nodes, unhealthy, acting), now_ms);
                self.tell(Input::Fleet(FleetSeen {
                    nodes,
                    unhealthy,
                    acting,
                }));
            }
            Op::Slot { ms } => {
                // Whether it wants one is asked at that very moment: a brake may have ended while nobody looked.
                self.ms += 1;
                self.machine.handle_timeout(self.now());
                self.drain();
                let until_ms = self.ms - self.boot_ms + ms;
                if self.machine.slot_wanted().is_some() {
                    self.oracle.fleet.lent(until_ms);
                }
                let until = Duration::from_millis(until_ms);
                self.machine.handle(self.now(), Input::Slot { until });
                self.drain();
            }
            Op::Halt(on) => {
                self.halted = *on;
                self.tell(Input::Halt(*on));
            }
            Op::Stall(stalled) => {
                if !self.stalled {
                    self.store();
                }
                self.stalled = *stalled;
            }
            Op::Wall { back } => {
                self.wall_ms = if *back {
                    self.wall_ms / 2
                } else {
                    self.wall_ms.saturating_mul(2)
                };
            }
        }
        // What is on disk is asked for by a death alone, so it is written then, or when writing ends.
    }

    fn approve(&mut self, incident: IncidentId, word: Word) {
        let policy = self.config.services[SERVICES[0]].clone();
        let open = self.machine.open_incidents().find(|open| open.id == incident);
        let (plan, by) = (open.and_then(|open| open.plan.as_ref().map(Plan::hash)), word.by);
        let hash = match word.plan {
            Of::Present => open
                .filter(|open| open.state == IncidentState::AwaitingApproval)
                .and(plan.clone()),
            Of::Former => self.former.get(&incident).cloned(),
            Of::Nothing => None,
        };
        self.ms += 1;
        let now = self.now();
        if let Some(open) = open {
            match &hash {
                Some(hash) => self
                    .oracle
                    .approved(&policy, open, hash, by, now.when().monotonic_ms),
                None if open.state == IncidentState::HandedToHuman => {
                    self.oracle.spoke(incident);
                    self.retried.insert(incident, open.actions.len());
                }
                None => {}
            }
        }
        if let Some(plan) = plan {
            self.former.insert(incident, plan);
        }
        let by = by.map(|at| ["ann", "bob", "eve"][at].to_owned());
        let input = Input::Approve {
            incident,
            plan: hash,
            by,
        };
        self.machine.handle(now, input);
        self.drain();
    }

    fn tell(&mut self, input: Input) {
        self.ms += 1;
        self.machine.handle(self.now(), input);
        self.drain();
    }

    pub(crate) fn pass(&mut self, ms: u64) {
        let end = self.ms + ms;
        while let Some(due) = self.machine.poll_timeout() {
            let due = u64::try_from(due.as_millis()).unwrap() + self.boot_ms;
            if due > end {
                break;
            }
            self.ms = self.ms.max(due);
            self.machine.handle_timeout(self.now());
            self.drain();
        }
        self.ms = end;
        let now_ms = self.ms - self.boot_ms;
        self.oracle.fleet.bounded(self.machine.open_incidents(), now_ms);
    }

    pub(crate) fn record(&mut self, stored: bool) {
        if self.to_record.is_empty() {
            return;
        }
        let intent = self.to_record.remove(0);
        if stored {
            self.store();
            self.durable.insert(intent.id);
            self.tell(Input::IntentDurable { id: intent.id });
        } else {
            self.tell(Input::IntentFailed {
                id: intent.id,
                detail: "the disk is full".to_owned(),
            });
        }
    }

    pub(crate) fn end_executor(&mut self, outcome: usize) {
        if self.executing.is_empty() {
            return;
        }
        let intent = self.executing.remove(0);
        let detail = "words".to_owned();
        let outcome = match outcome {
            0 => Outcome::StateCorrupt {
                detail,
                running: false,
            },
            1 => Outcome::StateCorrupt {
                detail,
                running: true,
            },
            2 => Outcome::Failed {
                detail,
                running: false,
            },
            3 => Outcome::Failed {
                detail,
                running: true,
            },
            4 if !intent.action.renews_process() => Outcome::Fruitless { detail },
            6 if matches!(
                intent.action,
                ActionKind::CancelQuery | ActionKind::TerminateBlocker
            ) =>
            {
                Outcome::Spared { detail }
            }
            _ if !intent.action.renews_process() => Outcome::Relieved { detail },
            _ => Outcome::Done,
        };
        let in_time = self
            .machine
            .open_incident(&intent.service)
            .is_some_and(|open| open.state == IncidentState::Acting);
        let failed = match &outcome {
            Outcome::Failed { .. } => in_time.then_some(true),
            Outcome::Done | Outcome::Relieved { .. } => Some(false),
            _ => None,
        };
        if matches!(outcome, Outcome::Spared { .. }) {
            self.oracle.spared(&intent);
        }
        self.oracle.reported(&intent, failed, self.ms + 1);
        self.tell(Input::Executed {
            id: intent.id,
            outcome,
        });
    }

    /// The node dies and comes back; executors die with it, done or not.
    pub(crate) fn die(&mut self, new_boot: bool, took_effect: bool) {
        if new_boot {
            self.boots += 1;
            self.ms += 1_000;
            // A young clock, or one with another origin.
            self.boot_ms = if self.boots.is_multiple_of(2) {
                1_000
            } else {
                self.ms - 500
            };
            self.config.clock_id = format!("boot-{}", self.boots);
        }
        self.to_record.clear();
        self.executing.clear();
        self.to_reconcile.clear();
        self.full.clear();
        self.read_only.clear();
        self.silent.clear();
        self.oracle.died(self.disk.oracle.clone());
        self.former.clear();
        self.halted = self.disk.state.halted;
        let state = serde_json::from_slice(&serde_json::to_vec(&self.disk.state).unwrap()).unwrap();
        self.machine = IncidentMachine::restore(self.config.clone(), state, self.now()).named(NODE);
        self.drain();
        for intent in std::mem::take(&mut self.to_reconcile) {
            // What does not renew the process leaves it running, and nobody can see whether it was done.
            let renews = intent.action.renews_process();
            let running = took_effect && (!renews || self.executed.contains(&intent.id));
            self.tell(Input::Reconciled {
                id: intent.id,
                running,
                took_effect: running && renews,
            });
        }
    }

    fn store(&mut self) {
        self.disk = Disk {
            state: self.machine.export(),
            oracle: self.oracle.lasting.clone(),
        };
    }

    fn drain(&mut self) {
        while let Some(output) = self.machine.poll_output() {
            match output {
                Output::RecordIntent(intent) => {
                    assert!(
                        intent.action == ActionKind::RelieveSpace || !self.full.contains(&intent.service),
                        "an action on a full disk: {intent:?}"
                    );
                    assert!(
                        !intent.action.renews_process()
                            || self.full.contains(&intent.service)
                            || !self.read_only.contains(&intent.service),
                        "a process renewed where nothing can be written: {intent:?}"
                    );
                    assert!(!self.halted, "an action while halted: {intent:?}");
                    let now_ms = self.now().when().monotonic_ms;
                    let policy = self.config.services[&intent.service].clone();
                    self.oracle.decided(&policy, &intent, now_ms);
                    self.nothing_else_under_way(&intent);
                    self.domain_is_free(&intent);
                    let incident = self.machine.open_incident(&intent.service).unwrap();
                    assert!(
                        !matches!(
                            incident.class,
                            FaultClass::ConnectionExhaustion | FaultClass::LockPileup | FaultClass::DiskFull
                        ) || !intent.action.renews_process(),
                        "a restart that cannot help: {incident:?}"
                    );
                    let waits = intent
                        .session
                        .map_or(RootWaits::Nothing, |root| waits_of(root.pid));
                    assert!(
                        waits == RootWaits::Nothing
                            || !matches!(
                                intent.action,
                                ActionKind::CancelQuery | ActionKind::TerminateBlocker
                            ),
                        "{waits:?} is disturbed: {intent:?}"
                    );
                    // A number may be given again only when its first bearer was never durable.
                    assert!(
                        !self.durable.contains(&intent.id),
                        "intent number given twice: {intent:?}"
                    );
                    self.decided.insert(intent.id, self.ms);
                    self.to_record.push(intent);
                }
                Output::Execute(intent) => {
                    assert!(
                        self.durable.contains(&intent.id),
                        "effect before intent: {intent:?}"
                    );
                    assert!(
                        self.executed.insert(intent.id),
                        "intent carried out twice: {intent:?}"
                    );
                    assert!(!self.halted, "effect while halted: {intent:?}");
                    self.nothing_else_under_way(&intent);
                    self.domain_is_free(&intent);
                    self.within_budgets(&intent);
                    let policy = self.config.services[&intent.service].clone();
                    let now_ms = self.now().when().monotonic_ms;
                    self.oracle.fleet.executes(&policy, &intent, now_ms);
                    self.oracle.executes(&intent, self.ms);
                    self.executing.push(intent);
                }
                Output::Reconcile(intent) => self.to_reconcile.push(intent),
                Output::Ruled(record) => {
                    let policy = &self.config.services[&record.facts.service];
                    let says = evaluate(policy, self.config.node, &record.facts);
                    assert_eq!(says, record.ruling, "a ruling that does not replay: {record:?}");
                    let helps = record.facts.restart_helps;
                    assert!(
                        says != Ruling::Act
                            || record.facts.action != ActionKind::Restart
                            || helps != RestartHelps::No,
                        "a restart that cannot help: {record:?}"
                    );
                }
                Output::Reinstated(record) => self.oracle.reinstated(&record.lifted),
                Output::Opened(incident) | Output::Updated(incident) | Output::Closed(incident) => {
                    assert!(incident.state.is_closed() == incident.closed.is_some());
                    let now_ms = self.now().when().monotonic_ms;
                    self.oracle.fleet.sees(&incident, now_ms);
                    self.oracle
                        .sees(&self.config.services[&incident.service], &incident);
                    for action in ActionKind::ALL {
                        let tried = incident
                            .actions
                            .iter()
                            .skip(self.retried_before(&incident, action))
                            .filter(|done| done.intent.action == action)
                            .filter(|done| match done.outcome {
                                Some(Outcome::NotNeeded | Outcome::Spared { .. }) => false,
                                // What became of it cannot be seen, so it counts as done.
                                Some(Outcome::Interrupted) => !action.renews_process(),
                                _ => true,
                            })
                            .count();
                        let rungs = if action == ActionKind::Start { 2 } else { 1 };
                        assert!(
                            tried <= rungs,
                            "{action} repeated beyond the ladder: {incident:?}"
                        );
                        self.outcomes.insert((incident.id, action), tried);
                    }
                }
                Output::Notify(_) => {}
            }
        }
    }

    /// What renews the process counts anew after a person's word.
    fn retried_before(&self, incident: &Incident, action: ActionKind) -> usize {
        let retried = self.retried.get(&incident.id).copied();
        retried.filter(|_| action.renews_process()).unwrap_or(0)
    }

    /// One action at a time in a failure domain, and none on a caller for its silence while what it calls is in trouble and silent too.
    fn domain_is_free(&self, intent: &Intent) {
        for other in SERVICES.iter().filter(|name| **name != intent.service) {
            let Some(open) = self.machine.open_incident(other) else {
                continue;
            };
            assert!(
                !matches!(open.state, IncidentState::Acting | IncidentState::Verifying),
                "two actions in one failure domain: {intent:?} beside {open:?}"
            );
            let excused = intent.service == SERVICES[1]
                && intent.class == FaultClass::Hang
                && intent.action.renews_process()
                && !self.stopped.contains(&intent.service)
                && !open.class.from_detector()
                && self.silent.contains(*other);
            assert!(
                !excused,
                "a caller renewed for what it calls: {intent:?} beside {open:?}, {:?}",
                self.machine.open_incident(&intent.service)
            );
        }
    }

    fn nothing_else_under_way(&self, intent: &Intent) {
        let busy = |others: &[Intent]| {
            others
                .iter()
                .any(|o| o.service == intent.service && o.id != intent.id)
        };
        assert!(
            !busy(&self.executing) && !busy(&self.to_reconcile),
            "two actions on one service: {intent:?}"
        );
    }

    /// Over any window that ends now, counted by true time.
    fn within_budgets(&mut self, intent: &Intent) {
        let at = self.decided[&intent.id];
        let policy = &self.config.services[&intent.service];
        let within = |window: Duration, which: &dyn Fn(&Intent) -> bool| {
            let window = u64::try_from(window.as_millis()).unwrap();
            1 + self
                .done
                .iter()
                .filter(|(t, done)| at.saturating_sub(*t) <= window && which(done))
                .count()
        };
        let of_service = within(policy.window, &|done| done.service == intent.service);
        assert!(
            of_service <= policy.max_actions as usize,
            "{of_service} actions on {}",
            intent.service
        );
        let of_node = within(self.config.node.window, &|_| true);
        assert!(
            of_node <= self.config.node.max_actions as usize,
            "{of_node} actions on the node"
        );
        let rule = policy.rules.as_ref().and_then(|rules| rules.get(&intent.action));
        if let Some((max, window)) = rule.and_then(|rule| rule.max) {
            let of_action = within(window, &|done| {
                done.service == intent.service && done.action == intent.action
            });
            assert!(of_action <= max as usize, "{of_action} times {intent:?}");
            if of_action == max as usize {
                *self
                    .oracle
                    .reached
                    .entry("an action's own budget spent")
                    .or_default() += 1;
            }
        }
        let cooldown = rule.and_then(|rule| rule.cooldown).unwrap_or(policy.cooldown);
        let cooldown = u64::try_from(cooldown.as_millis()).unwrap();
        let hot = self.done.iter().any(|(t, done)| {
            done.service == intent.service && done.action == intent.action && at.saturating_sub(*t) < cooldown
        });
        assert!(!hot, "within its cool-down: {intent:?}");
        self.done.push((at, intent.clone()));
    }

    /// Everything gets well and every question is answered: then no incident may stay open.
    pub(crate) fn everything_gets_well(&mut self) {
        self.apply(&Op::Halt(false));
        self.stalled = false;
        for _ in 0..8 {
            while !self.to_record.is_empty() {
                self.record(true);
            }
            while !self.executing.is_empty() {
                self.end_executor(5);
            }
            for service in 0..SERVICES.len() {
                self.apply(&Op::Started { service });
                self.apply(&Op::Disk { service, full: false });
                self.apply(&Op::ReadOnly { service, on: false });
                self.apply(&Op::Sessions {
                    service,
                    piled: false,
                    running: false,
                    full: false,
                    pid: 7,
                });
                self.apply(&Op::Pressure { service, why: 0 });
                self.apply(&Op::Cleared { service });
                self.apply(&Op::State { service, good: true });
                self.apply(&Op::Process {
                    service,
                    stopped: false,
                });
                for _ in 0..3 {
                    self.apply(&Op::Probe { service, ok: true });
                }
            }
            self.pass(5_000);
        }
        let open: Vec<_> = self.machine.open_incidents().collect();
        assert!(open.is_empty(), "still open though all is well: {open:?}");
    }
}

/// Two of the four roots are at their commit.
fn waits_of(pid: i32) -> RootWaits {
    match pid {
        9 => RootWaits::Commit,
        10 => RootWaits::Standby,
        _ => RootWaits::Nothing,
    }
}

fn pressure(why: usize) -> PressureSeen {
    let calm = PressureSeen {
        waits_for_cpu: Some(0.0),
        waits_for_disk: Some(0.0),
        uses_cpu: Some(0.1),
        runs: Some(0.2),
        crowd: Some(1.0),
        crowd_is_old: false,
        host_io_full: Some(0.0),
        descriptors: Some(0.1),
        network: None,
    };
    match why {
        1 => PressureSeen {
            uses_cpu: Some(0.9),
            runs: Some(1.8),
            crowd: Some(5.0),
            ..calm
        },
        2 => PressureSeen {
            waits_for_cpu: Some(2.0),
            ..calm
        },
        3 => PressureSeen {
            waits_for_disk: Some(2.0),
            host_io_full: Some(0.8),
            ..calm
        },
        4 => PressureSeen {
            descriptors: Some(1.0),
            ..calm
        },
        5 => PressureSeen {
            uses_cpu: Some(0.9),
            runs: Some(1.8),
            waits_for_cpu: Some(2.0),
            ..calm
        },
        6 => PressureSeen {
            network: Some(NetworkSeen {
                resent: 0.3,
                unheard: 2,
                unread: 0,
                dropped: 5,
            }),
            ..calm
        },
        _ => calm,
    }
}

fn name(service: usize) -> String {
    SERVICES[service].to_owned()
}
