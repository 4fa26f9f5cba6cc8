//! The machine told as stories: one service, seconds passing, what it asks for.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::policy::Autonomy;
use crate::types::{FaultClass, Plan, Verdict};

mod another;
mod approvals;
mod budgets;
mod classes;
mod detection;
mod domain;
mod fleet;
mod handover;
mod ladder;
mod pressing;
mod record;
mod sessions;
mod standing;
mod verification;

/// A machine with the services `a` and `b`, and a clock in milliseconds.
struct Story {
    machine: IncidentMachine,
    policy: HealPolicy,
    node: NodeBudget,
    ms: u64,
    seen: Vec<Output>,
}

impl Story {
    fn new(change: impl FnOnce(&mut HealPolicy)) -> Self {
        let mut policy = HealPolicy {
            autonomy: Autonomy::Act,
            restore_autonomy: Autonomy::Act,
            settle: Duration::ZERO,
            anomaly_lasting: Duration::ZERO,
            ..HealPolicy::default()
        };
        change(&mut policy);
        let node = NodeBudget::default();
        let machine = IncidentMachine::new(config(&policy, node, "boot-1"));
        Self {
            machine,
            policy,
            node,
            ms: 1_000,
            seen: Vec::new(),
        }
    }

    fn now(&self) -> Now {
        Now {
            monotonic: Duration::from_millis(self.ms),
            unix_ms: 1_700_000_000_000 + self.ms,
        }
    }

    fn tell(&mut self, input: Input) -> Vec<Output> {
        self.machine.handle(self.now(), input);
        self.drain()
    }

    /// Lets time pass, with timeouts where they are due.
    fn pass(&mut self, ms: u64) -> Vec<Output> {
        let end = self.ms + ms;
        let mut outputs = Vec::new();
        while let Some(due) = self
            .machine
            .poll_timeout()
            .filter(|due| *due <= Duration::from_millis(end))
        {
            self.ms = self.ms.max(u64::try_from(due.as_millis()).unwrap());
            self.machine.handle_timeout(self.now());
            outputs.extend(self.drain());
        }
        self.ms = end;
        outputs
    }

    fn drain(&mut self) -> Vec<Output> {
        let outputs: Vec<Output> = std::iter::from_fn(|| self.machine.poll_output()).collect();
        self.seen.extend(outputs.clone());
        outputs
    }

    fn probe(&mut self, ok: bool) -> Vec<Output> {
        self.ms += 100;
        let detail = if ok { String::new() } else { "timed out".to_owned() };
        self.tell(Input::Probe {
            service: "a".into(),
            ok,
            latency: Duration::from_millis(3),
            detail,
        })
    }

    fn probes(&mut self, ok: bool, count: usize) -> Vec<Output> {
        (0..count).flat_map(|_| self.probe(ok)).collect()
    }

    /// Somebody at the host approves the plan as it stands.
    fn approve(&mut self) -> Vec<Output> {
        let incident = self.incident().unwrap();
        let (id, plan) = (incident.id, incident.plan.as_ref().map(Plan::hash));
        self.tell(approve(id, plan.as_deref(), None))
    }

    fn crash(&mut self) -> Vec<Output> {
        self.tell(Input::Exited {
            service: "a".into(),
            status: "it was killed by signal 9".into(),
        })
    }

    /// Nothing changed but the autonomy.
    fn with_defaults() -> Self {
        Self::new(|policy| {
            *policy = HealPolicy {
                autonomy: Autonomy::Act,
                ..HealPolicy::default()
            };
        })
    }

    /// One second with good probes and one row.
    fn second(&mut self, row: impl FnOnce(&mut Self)) {
        self.pass(800);
        self.probes(true, 2);
        row(self);
    }

    fn calm(&mut self) -> Vec<Output> {
        self.tell(Input::Calm { service: "a".into() })
    }

    fn cleared(&mut self) -> Vec<Output> {
        self.tell(Input::AnomalyCleared { service: "a".into() })
    }

    /// The alarm ended and began again before the service had answered often enough to be judged.
    fn cleared_then_anomaly(&mut self) {
        self.probe(false);
        self.cleared();
        self.anomaly("service_cpu");
    }

    /// One for which something presses: its memory is nearly used up, or its answers take longer.
    fn anomaly(&mut self, channel: &str) -> Vec<Output> {
        if channel == "service_memory" {
            self.memory(Some(0.95), None);
        }
        if channel == "service_cpu" {
            return self.caused(&[(channel, 5.0), ("service_probe_latency", 1.0)], 9.0);
        }
        self.scored(channel, 9.0)
    }

    fn memory(&mut self, share: Option<f64>, full_in: Option<Duration>) {
        let seen = MemorySeen { share, full_in };
        self.tell(Input::Memory {
            service: "a".into(),
            seen,
        });
    }

    fn saturated(&mut self, uses: f64, waits: f64, crowd: Option<f64>) {
        let seen = PressureSeen {
            uses_cpu: Some(uses),
            runs: Some(2.0 * uses),
            waits_for_cpu: Some(waits),
            crowd,
            ..PressureSeen::default()
        };
        self.tell(Input::Pressure {
            service: "a".into(),
            seen,
        });
    }

    /// Fails so many probes, its threads looked at with each, as the edge does.
    fn silent_under(&mut self, seen: PressureSeen, times: usize) {
        self.asked_under(seen, &vec![false; times]);
    }

    fn asked_under(&mut self, seen: PressureSeen, answers: &[bool]) {
        for ok in answers {
            if !ok {
                self.tell(Input::Pressure {
                    service: "a".into(),
                    seen,
                });
            }
            self.probe(*ok);
        }
    }

    fn scored(&mut self, channel: &str, score: f32) -> Vec<Output> {
        self.caused(&[(channel, 5.0)], score)
    }

    fn caused(&mut self, causes: &[(&str, f32)], score: f32) -> Vec<Output> {
        let cause = |(channel, contribution): &(&str, f32)| Cause {
            channel: (*channel).to_owned(),
            contribution: *contribution,
            rising: Some(true),
            evidence: None,
        };
        let causes = causes.iter().map(cause).collect();
        self.tell(Input::Anomaly {
            service: "a".into(),
            score,
            threshold: 3.0,
            causes,
        })
    }

    /// The intent that waits to be recorded, made durable: the machine must ask to carry it out.
    fn carry_out(&mut self, outcome: Outcome) -> Intent {
        let intent = self.recorded().expect("an intent was expected");
        let outputs = self.tell(Input::IntentDurable { id: intent.id });
        assert!(outputs.contains(&Output::Execute(intent.clone())), "{outputs:?}");
        self.tell(Input::Executed {
            id: intent.id,
            outcome,
        });
        intent
    }

    /// The last intent that was asked to be recorded, if it still waits for that.
    fn recorded(&self) -> Option<Intent> {
        let intent = self.seen.iter().rev().find_map(|output| match output {
            Output::RecordIntent(intent) => Some(intent.clone()),
            _ => None,
        })?;
        self.incident()
            .and_then(Incident::in_flight)
            .is_some_and(|waiting| *waiting == intent)
            .then_some(intent)
    }

    fn incident(&self) -> Option<&Incident> {
        self.machine.open_incident("a")
    }

    fn state(&self) -> Option<IncidentState> {
        self.incident().map(|incident| incident.state)
    }

    fn closed(&self) -> Incident {
        let closed = self.seen.iter().rev().find_map(|output| match output {
            Output::Closed(incident) => Some(incident.clone()),
            _ => None,
        });
        closed.expect("an incident was closed")
    }

    /// The node ends and begins anew with what it had stored.
    fn restart(&mut self, clock_id: &str) {
        let stored = serde_json::to_string(&self.machine.export()).unwrap();
        let state = serde_json::from_str(&stored).unwrap();
        self.machine = IncidentMachine::restore(config(&self.policy, self.node, clock_id), state, self.now());
        self.drain();
    }
}

fn config(policy: &HealPolicy, node: NodeBudget, clock_id: &str) -> HealConfig {
    let services = BTreeMap::from([("a".to_owned(), policy.clone()), ("b".to_owned(), policy.clone())]);
    HealConfig {
        services,
        node,
        depends_on: std::collections::BTreeMap::new(),
        clock_id: clock_id.to_owned(),
    }
}

fn failed(running: bool) -> Outcome {
    Outcome::Failed {
        detail: "cannot run it".to_owned(),
        running,
    }
}

fn corrupt(running: bool) -> Outcome {
    Outcome::StateCorrupt {
        detail: "page 7 differs".to_owned(),
        running,
    }
}

#[test]
fn a_crash_is_started_again_and_healed_by_good_probes() {
    let mut story = Story::new(|_| {});
    story.probes(true, 5);
    story.crash();
    let intent = story.carry_out(Outcome::Done);
    assert_eq!(intent.action, ActionKind::Start);
    story.probes(false, 2);
    story.probes(true, 2);
    assert_eq!(story.state(), Some(IncidentState::Verifying));
    story.probe(true);
    let incident = story.closed();
    assert_eq!(
        (incident.class, incident.state, incident.verdict),
        (FaultClass::Crash, IncidentState::Healed, Some(Verdict::Healed))
    );
    assert_eq!(
        incident.healed.unwrap().since(incident.detected),
        Duration::from_millis(500)
    );
    assert!(story.incident().is_none());
}

#[test]
fn services_do_not_disturb_each_other() {
    let mut story = Story::new(|_| {});
    story.crash();
    story.tell(Input::Exited {
        service: "b".into(),
        status: "it ended with exit code 1".into(),
    });
    assert_eq!(story.machine.open_incidents().count(), 2);
    let ids: BTreeSet<IncidentId> = story
        .machine
        .open_incidents()
        .map(|incident| incident.id)
        .collect();
    assert_eq!(ids.len(), 2);
}

#[test]
fn what_names_nothing_known_is_counted_and_ignored() {
    let mut story = Story::new(|_| {});
    story.tell(Input::Exited {
        service: "zebra".into(),
        status: String::new(),
    });
    story.tell(Input::IntentDurable { id: IntentId(7) });
    story.tell(Input::Executed {
        id: IntentId(7),
        outcome: Outcome::Done,
    });
    story.tell(Input::Reconciled {
        id: IntentId(7),
        running: true,
        took_effect: true,
    });
    story.tell(Input::Deny {
        incident: IncidentId(1),
    });
    assert_eq!((story.machine.ignored_inputs(), story.seen.len()), (5, 0));
}

#[test]
fn evidence_is_bounded_and_holds_no_control_characters() {
    let mut story = Story::new(|policy| policy.autonomy = Autonomy::Observe);
    story.crash();
    for _ in 0..100 {
        story.probe(true);
        story.tell(Input::Exited {
            service: "a".into(),
            status: format!("x\n\u{1b}[31m{}", "y".repeat(10_000)),
        });
    }
    let incident = story.incident().unwrap();
    assert_eq!(incident.evidence.len(), Incident::EVIDENCE_MAX);
    assert!(incident.evidence_dropped > 0);
    assert!(
        incident
            .evidence
            .iter()
            .all(|e| e.words.len() < 300 && !e.words.contains(char::is_control))
    );
}

#[test]
fn non_finite_scores_and_contributions_change_no_decision() {
    let mut story = Story::new(|_| {});
    let causes = vec![
        Cause {
            channel: "service_memory".into(),
            contribution: f32::NAN,
            rising: None,
            evidence: None,
        },
        Cause {
            channel: "service_memory".into(),
            contribution: f32::INFINITY,
            rising: None,
            evidence: None,
        },
    ];
    for _ in 0..5 {
        story.tell(Input::Anomaly {
            service: "a".into(),
            score: f32::NAN,
            threshold: 1.0,
            causes: causes.clone(),
        });
    }
    assert!(story.incident().is_none(), "no number is no exceedance");
    for _ in 0..5 {
        story.tell(Input::Anomaly {
            service: "a".into(),
            score: f32::INFINITY,
            threshold: 1.0,
            causes: causes.clone(),
        });
    }
    let incident = story.incident().unwrap();
    assert_eq!((incident.class, incident.score), (FaultClass::Unknown, None));
    assert!(serde_json::to_string(&story.machine.export()).is_ok());
}

#[test]
fn why_tells_what_was_seen_considered_and_done() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    story.crash();
    story.carry_out(corrupt(false));
    story.carry_out(Outcome::Done);
    story.probes(true, 3);
    let why = story.closed().why();
    for words in [
        "Incident 1: corruption of a, healed after 0.30 s.",
        "the process ended: it was killed by signal 9",
        "confirmed: this is the moment of detection",
        "* restore_and_start  its state did not pass the check: page 7 differs",
        "restart            is not on the ladder of corruption",
        "nothing            the symptom would stay",
        "start (its process ended: it was killed by signal 9); not done, the state is corrupt: page 7 differs; no effect",
        "done; verified: healed",
    ] {
        assert!(why.contains(words), "`{words}` is missing in\n{why}");
    }
}

fn looks(story: &mut Story, pile_up: Option<PileUp>, free: u32) {
    for _ in 0..2 {
        story.ms += 100;
        story.tell(Input::Sessions {
            service: "a".into(),
            seen: SessionsSeen {
                pile_up,
                free,
                free_min: 5,
            },
        });
    }
}

fn pile(running: bool, touchable: bool) -> PileUp {
    PileUp {
        pid: 41,
        birth: 1,
        behind: 4,
        waited_s: 6,
        running,
        statement: 0,
        waits: RootWaits::Nothing,
        touchable,
    }
}

fn relieved() -> Outcome {
    Outcome::Relieved {
        detail: "4 sessions waited behind process 41; it was ended".to_owned(),
    }
}

fn pressed(story: &mut Story, seen: PressureSeen) {
    story.tell(Input::Pressure {
        service: "a".into(),
        seen,
    });
}

fn approve(incident: IncidentId, plan: Option<&str>, by: Option<&str>) -> Input {
    Input::Approve {
        incident,
        plan: plan.map(str::to_owned),
        by: by.map(str::to_owned),
    }
}

/// A story under a policy file for the service `a`.
fn under(head: &str, action: &str) -> Story {
    use crate::policy::file::PolicyFile;
    let text = format!("version = 1\n{head}[[service]]\nname = 'a'\naction = [{action}]\n");
    let file: PolicyFile = toml::from_str(&text).unwrap();
    let below = HealPolicy {
        cooldown: Duration::ZERO,
        ..HealPolicy::default()
    };
    let mut services = BTreeMap::from([("a".to_owned(), below)]);
    file.over(&mut services, NodeBudget::default()).unwrap();
    let laid = services.remove("a").unwrap();
    Story::new(|policy| *policy = laid)
}
