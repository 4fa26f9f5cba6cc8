//! The incident machine's invariants under random operations: crashes of the node at the worst moments, new boots, jumping clocks,
//! hostile scores, lost storage, impatient people. An oracle looks after every step.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use theriac_heal::incident::{
    HealConfig, IncidentMachine, Input, MachineState, Output, PileUp, ProcessState, SessionsSeen,
};
use theriac_heal::policy::evaluate::{Ruling, evaluate};
use theriac_heal::policy::{Autonomy, HealPolicy, NodeBudget};
use theriac_heal::types::{
    ActionKind, Cause, FaultClass, IncidentId, IncidentState, Intent, IntentId, NoticeKind, Now, Outcome,
    Plan, RestartHelps,
};

const SERVICES: [&str; 2] = ["a", "b"];

#[derive(Debug, Clone)]
enum Op {
    Probe {
        service: usize,
        ok: bool,
    },
    Exit {
        service: usize,
    },
    Started {
        service: usize,
    },
    Process {
        service: usize,
        stopped: bool,
    },
    Anomaly {
        service: usize,
        channel: usize,
        score: f32,
    },
    Suspicion {
        service: usize,
        channel: usize,
    },
    Cleared {
        service: usize,
    },
    State {
        service: usize,
        good: bool,
    },
    Disk {
        service: usize,
        full: bool,
    },
    /// Two looks at a server's sessions, alike.
    Sessions {
        service: usize,
        piled: bool,
        running: bool,
        full: bool,
    },
    Pass {
        ms: u64,
    },
    /// The oldest intent that waits for storage is stored, or cannot be.
    Record {
        stored: bool,
    },
    /// The oldest executor ends.
    Execute {
        outcome: usize,
    },
    /// From here on only intents are stored, or everything again.
    Stall(bool),
    /// The node dies; what was not stored is forgotten.
    Die {
        new_boot: bool,
        took_effect: bool,
    },
    Approve {
        incident: u64,
    },
    Deny {
        incident: u64,
    },
    Halt(bool),
    Wall {
        back: bool,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let service = 0..SERVICES.len();
    prop_oneof![
            4 => (service.clone(), any::<bool>()).prop_map(|(service, ok)| Op::Probe { service, ok }),
            3 => service.clone().prop_map(|service| Op::Exit { service }),
            1 => service.clone().prop_map(|service| Op::Started { service }),
            1 => (service.clone(), any::<bool>()).prop_map(|(service, stopped)| Op::Process { service, stopped }),
            // Three of a kind with a probe before: trouble that the detector finds while the service still answers.
            2 => (service.clone(), 0..4_usize).prop_map(|(service, channel)| Op::Suspicion { service, channel }),
            2 => (service.clone(), 0..4_usize, prop_oneof![Just(9.0_f32), Just(f32::NAN), Just(f32::INFINITY)])
                .prop_map(|(service, channel, score)| Op::Anomaly { service, channel, score }),
            1 => service.clone().prop_map(|service| Op::Cleared { service }),
            1 => (service.clone(), any::<bool>()).prop_map(|(service, good)| Op::State { service, good }),
            2 => (service.clone(), any::<bool>(), any::<bool>(), any::<bool>())
                .prop_map(|(service, piled, running, full)| Op::Sessions { service, piled, running, full }),
            1 => (service, any::<bool>()).prop_map(|(service, full)| Op::Disk { service, full }),
            4 => prop_oneof![1..2_000_u64, 1_000..60_000_u64, 100_000..2_000_000_u64].prop_map(|ms| Op::Pass { ms }),
            6 => prop::bool::weighted(0.9).prop_map(|stored| Op::Record { stored }),
            6 => (0..6_usize).prop_map(|outcome| Op::Execute { outcome }),
            2 => (any::<bool>(), any::<bool>())
    .prop_map(|(new_boot, took_effect)| Op::Die { new_boot, took_effect }),
    1 => any::<bool>().prop_map(Op::Stall),
            1 => (1..8_u64).prop_map(|incident| Op::Approve { incident }),
            1 => (1..8_u64).prop_map(|incident| Op::Deny { incident }),
            1 => prop::bool::weighted(0.3).prop_map(Op::Halt),
            1 => any::<bool>().prop_map(|back| Op::Wall { back }),
        ]
}

/// What the disk holds and what the oracle knew when it was written.
#[derive(Clone, Default)]
struct Disk {
    state: MachineState,
    demoted: BTreeSet<String>,
}

struct World {
    machine: IncidentMachine,
    config: HealConfig,
    /// True time, in milliseconds; the machine sees it less `boot_ms`.
    ms: u64,
    boot_ms: u64,
    boots: u64,
    wall_ms: u64,
    disk: Disk,
    to_record: Vec<Intent>,
    executing: Vec<Intent>,
    to_reconcile: Vec<Intent>,
    durable: BTreeSet<IntentId>,
    executed: BTreeSet<IntentId>,
    /// True time of each decision that was carried out.
    decided: BTreeMap<IntentId, u64>,
    done: Vec<(u64, Intent)>,
    outcomes: BTreeMap<(IncidentId, ActionKind), usize>,
    full: BTreeSet<String>,
    demoted: BTreeSet<String>,
    halted: bool,
    stalled: bool,
}

impl World {
    fn new() -> Self {
        let policy = HealPolicy {
            autonomy: Autonomy::Act,
            max_actions: 4,
            window: Duration::from_mins(10),
            cooldown: Duration::from_secs(5),
            settle: Duration::from_secs(2),
            anomaly_lasting: Duration::ZERO,
            ..HealPolicy::default()
        };
        let services = SERVICES
            .iter()
            .map(|name| ((*name).to_owned(), policy.clone()))
            .collect();
        let node = NodeBudget {
            max_actions: 6,
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
            machine: IncidentMachine::new(config.clone()),
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
            demoted: BTreeSet::new(),
            halted: false,
            stalled: false,
        }
    }

    fn now(&self) -> Now {
        Now {
            monotonic: Duration::from_millis(self.ms - self.boot_ms),
            unix_ms: self.wall_ms,
        }
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Probe { service, ok } => self.tell(Input::Probe {
                service: name(*service),
                ok: *ok,
                latency: Duration::from_millis(2),
                detail: "timed out".to_owned(),
            }),
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
                    ProcessState::Stopped
                } else {
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
            } => {
                for _ in 0..2 {
                    let pile_up = piled.then_some(PileUp {
                        pid: 7,
                        birth: 1,
                        behind: 3,
                        waited_s: 6,
                        running: *running,
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
            } => self.die(*new_boot, *took_effect),
            Op::Approve { incident } => {
                // An approval is the one thing that lets a demoted service be touched.
                if let Some(open) = self
                    .machine
                    .open_incidents()
                    .find(|open| open.id == IncidentId(*incident))
                {
                    self.demoted.remove(&open.service.clone());
                }
                let open = self.machine.open_incidents().find(|open| open.id.0 == *incident);
                let plan = open
                    .filter(|open| open.state == IncidentState::AwaitingApproval)
                    .and_then(|open| open.plan.as_ref().map(Plan::hash));
                self.tell(Input::Approve {
                    incident: IncidentId(*incident),
                    plan,
                    by: None,
                });
            }
            Op::Deny { incident } => self.tell(Input::Deny {
                incident: IncidentId(*incident),
            }),
            Op::Halt(on) => {
                self.halted = *on;
                self.tell(Input::Halt(*on));
            }
            Op::Stall(stalled) => self.stalled = *stalled,
            Op::Wall { back } => {
                self.wall_ms = if *back {
                    self.wall_ms / 2
                } else {
                    self.wall_ms.saturating_mul(2)
                };
            }
        }
        if !self.stalled {
            self.store();
        }
    }

    fn tell(&mut self, input: Input) {
        self.ms += 1;
        self.machine.handle(self.now(), input);
        self.drain();
    }

    fn pass(&mut self, ms: u64) {
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
    }

    fn record(&mut self, stored: bool) {
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

    fn end_executor(&mut self, outcome: usize) {
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
            _ if !intent.action.renews_process() => Outcome::Relieved { detail },
            _ => Outcome::Done,
        };
        self.tell(Input::Executed {
            id: intent.id,
            outcome,
        });
    }

    /// The node dies and comes back; executors die with it, done or not.
    fn die(&mut self, new_boot: bool, took_effect: bool) {
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
        self.demoted.clone_from(&self.disk.demoted);
        self.halted = self.disk.state.halted;
        let state = serde_json::from_slice(&serde_json::to_vec(&self.disk.state).unwrap()).unwrap();
        self.machine = IncidentMachine::restore(self.config.clone(), state, self.now());
        self.drain();
        for intent in std::mem::take(&mut self.to_reconcile) {
            let took_effect = took_effect && self.executed.contains(&intent.id);
            self.tell(Input::Reconciled {
                id: intent.id,
                running: took_effect,
                took_effect,
            });
        }
    }

    fn store(&mut self) {
        self.disk = Disk {
            state: self.machine.export(),
            demoted: self.demoted.clone(),
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
                    assert!(!self.halted, "an action while halted: {intent:?}");
                    assert!(
                        !self.demoted.contains(&intent.service),
                        "an action after harm: {intent:?}"
                    );
                    self.nothing_else_under_way(&intent);
                    let incident = self.machine.open_incident(&intent.service).unwrap();
                    assert!(
                        !matches!(
                            incident.class,
                            FaultClass::ConnectionExhaustion | FaultClass::LockPileup | FaultClass::DiskFull
                        ) || !intent.action.renews_process(),
                        "a restart that cannot help: {incident:?}"
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
                    self.within_budgets(&intent);
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
                Output::Notify(notice) if notice.kind == NoticeKind::Demoted => {
                    self.demoted.insert(notice.service);
                }
                Output::Opened(incident) | Output::Updated(incident) | Output::Closed(incident) => {
                    assert!(incident.state.is_closed() == incident.closed.is_some());
                    for action in ActionKind::ALL {
                        let tried = incident
                            .actions
                            .iter()
                            .filter(|done| done.intent.action == action)
                            .filter(|done| match done.outcome {
                                Some(Outcome::NotNeeded) => false,
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
        let cooldown = u64::try_from(policy.cooldown.as_millis()).unwrap();
        let hot = self.done.iter().any(|(t, done)| {
            done.service == intent.service && done.action == intent.action && at.saturating_sub(*t) < cooldown
        });
        assert!(!hot, "within its cool-down: {intent:?}");
        self.done.push((at, intent.clone()));
    }

    /// Everything gets well and every question is answered: then no incident may stay open.
    fn everything_gets_well(&mut self) {
        self.apply(&Op::Halt(false));
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
                self.apply(&Op::Sessions {
                    service,
                    piled: false,
                    running: false,
                    full: false,
                });
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

fn name(service: usize) -> String {
    SERVICES[service].to_owned()
}

fn run(ops: &[Op]) -> World {
    let mut world = World::new();
    for op in ops {
        world.apply(op);
    }
    world.everything_gets_well();
    world
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, rng_seed: RngSeed::Fixed(2), max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn the_invariants_hold_under_any_operations(ops in prop::collection::vec(op(), 1..120)) {
        run(&ops);
    }
}

#[test]
fn the_generator_reaches_what_the_invariants_are_about() {
    use proptest::strategy::ValueTree as _;
    use proptest::test_runner::TestRunner;

    let mut runner = TestRunner::deterministic();
    let (mut executed, mut repeated, mut restored, mut harmed, mut relieved) = (0, 0, 0, 0, 0);
    for _ in 0..300 {
        let ops = prop::collection::vec(op(), 60..120)
            .new_tree(&mut runner)
            .unwrap()
            .current();
        let world = run(&ops);
        executed += world.executed.len();
        repeated += world.outcomes.values().filter(|tried| **tried > 1).count();
        restored += world
            .done
            .iter()
            .filter(|(_, done)| done.action == ActionKind::RestoreAndStart)
            .count();
        relieved += world
            .done
            .iter()
            .filter(|(_, done)| !done.action.renews_process())
            .count();
        harmed += usize::from(!world.machine.export().demoted.is_empty());
    }
    assert!(executed > 300 && relieved > 20, "{executed} {relieved}");
    assert!(
        repeated > 5 && restored > 20 && harmed > 10,
        "{repeated} {restored} {harmed}"
    );
}
