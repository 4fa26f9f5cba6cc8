//! Actions that are configured for a class: where they stand on the ladder, who may allow them, and what a crash of the node makes of them.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;
use std::time::Duration;

use theriac_heal::incident::{HealConfig, IncidentMachine, Input, Output};
use theriac_heal::policy::{Autonomy, HealPolicy, NodeBudget, RiskClass};
use theriac_heal::types::{ActionKind, FaultClass, IncidentState, Intent, Now, Outcome};

struct Story {
    config: HealConfig,
    machine: IncidentMachine,
    now: Duration,
    asked: Vec<Intent>,
    reconcile: Vec<Intent>,
}

impl Story {
    fn new(actions: &[ActionKind]) -> Self {
        let policy = HealPolicy {
            autonomy: Autonomy::Act,
            cooldown: Duration::ZERO,
            configured: BTreeMap::from([(FaultClass::Hang, actions.to_vec())]),
            ..HealPolicy::default()
        };
        let config = HealConfig {
            services: BTreeMap::from([("kv".to_owned(), policy)]),
            node: NodeBudget::default(),
            depends_on: BTreeMap::new(),
            clock_id: "test".to_owned(),
        };
        let machine = IncidentMachine::new(config.clone());
        let mut story = Self {
            config,
            machine,
            now: Duration::from_secs(100),
            asked: Vec::new(),
            reconcile: Vec::new(),
        };
        story.tell(Input::Started {
            service: "kv".to_owned(),
            pid: 7,
        });
        story.probes(true, 3);
        story.probes(false, 3);
        story
    }

    fn tell(&mut self, input: Input) {
        let now = Now {
            monotonic: self.now,
            unix_ms: 0,
        };
        self.machine.handle(now, input);
        self.drain();
    }

    fn drain(&mut self) {
        let now = Now {
            monotonic: self.now,
            unix_ms: 0,
        };
        while let Some(output) = self.machine.poll_output() {
            match output {
                Output::RecordIntent(intent) => {
                    self.machine.handle(now, Input::IntentDurable { id: intent.id });
                }
                Output::Execute(intent) => self.asked.push(intent),
                Output::Reconcile(intent) => self.reconcile.push(intent),
                _ => {}
            }
        }
    }

    fn probes(&mut self, ok: bool, count: u32) {
        for _ in 0..count {
            self.now += Duration::from_secs(1);
            self.tell(Input::Probe {
                service: "kv".to_owned(),
                ok,
                latency: Duration::from_millis(5),
                detail: "no answer".to_owned(),
            });
        }
    }

    fn done(&mut self) {
        let id = self.asked.last().unwrap().id;
        let outcome = Outcome::Relieved {
            detail: "bounded".to_owned(),
        };
        self.tell(Input::Executed { id, outcome });
    }

    /// The time for verification passes, and nothing has become better.
    fn in_vain(&mut self) {
        self.probes(false, 40);
    }

    fn kinds(&self) -> Vec<ActionKind> {
        self.asked.iter().map(|intent| intent.action).collect()
    }
}

#[test]
fn configured_actions_come_before_the_classs_own_and_each_once() {
    let mut story = Story::new(&[ActionKind::ThrottleCpu, ActionKind::Freeze]);
    assert_eq!(story.kinds(), [ActionKind::ThrottleCpu]);
    story.done();
    story.in_vain();
    assert_eq!(story.kinds(), [ActionKind::ThrottleCpu, ActionKind::Freeze]);
    story.done();
    story.in_vain();
    assert_eq!(story.kinds().last(), Some(&ActionKind::Restart));
    assert_eq!(story.asked.len(), 3);
}

#[test]
fn a_drain_waits_for_a_person_also_without_a_policy_file() {
    assert_eq!(RiskClass::of(ActionKind::Drain), RiskClass::R3);
    let mut story = Story::new(&[ActionKind::Drain]);
    assert!(story.asked.is_empty(), "{:?}", story.asked);
    let open = story.machine.open_incident("kv").unwrap();
    assert_eq!(open.state, IncidentState::AwaitingApproval);
    let plan = open.plan.as_ref().unwrap();
    assert_eq!(plan.action, ActionKind::Drain);
    let (incident, plan) = (open.id, Some(plan.hash()));
    story.tell(Input::Approve {
        incident,
        plan,
        by: None,
    });
    assert_eq!(story.kinds(), [ActionKind::Drain]);
}

#[test]
fn after_a_crash_between_intent_and_effect_a_bound_counts_as_tried() {
    let mut story = Story::new(&[ActionKind::ThrottleCpu]);
    assert_eq!(story.asked.len(), 1);
    // The node dies; what it stored is all that is left.
    let stored = serde_json::to_vec(&story.machine.export()).unwrap();
    let state = serde_json::from_slice(&stored).unwrap();
    let now = Now {
        monotonic: story.now,
        unix_ms: 0,
    };
    story.machine = IncidentMachine::restore(story.config.clone(), state, now);
    story.asked.clear();
    story.drain();
    assert_eq!(story.reconcile.len(), 1);
    let id = story.reconcile[0].id;
    story.tell(Input::Reconciled {
        id,
        running: true,
        took_effect: false,
    });
    assert!(story.asked.is_empty(), "it was done again blindly");
    story.in_vain();
    assert_eq!(story.kinds(), [ActionKind::Restart]);
}
