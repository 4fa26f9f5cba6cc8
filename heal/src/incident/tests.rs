//! The machine told as stories: one service, seconds passing, what it asks for.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::policy::Autonomy;
use crate::types::{FaultClass, Plan, Verdict};

mod another;
mod approvals;
mod classes;
mod domain;
mod fleet;
mod pressing;
mod sessions;
mod standing;

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
            waits_for_cpu: Some(waits),
            crowd,
            ..PressureSeen::default()
        };
        self.tell(Input::Pressure {
            service: "a".into(),
            seen,
        });
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
fn nothing_is_carried_out_before_its_intent_is_durable() {
    let mut story = Story::new(|_| {});
    let outputs = story.crash();
    assert!(matches!(outputs.last(), Some(Output::RecordIntent(_))));
    story.probes(false, 10);
    assert!(
        !story
            .seen
            .iter()
            .any(|output| matches!(output, Output::Execute(_)))
    );
}

#[test]
fn an_intent_that_cannot_be_recorded_is_never_carried_out() {
    for late in [false, true] {
        let mut story = Story::new(|_| {});
        story.crash();
        let id = story.recorded().unwrap().id;
        if late {
            story.pass(31_000);
        } else {
            story.tell(Input::IntentFailed {
                id,
                detail: "the disk is full".into(),
            });
        }
        assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
        story.tell(Input::IntentDurable { id });
        assert!(
            !story
                .seen
                .iter()
                .any(|output| matches!(output, Output::Execute(_)))
        );
    }
}

#[test]
fn an_action_is_called_off_when_the_symptom_went_away_before_it_began() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    story.probes(false, 2);
    let id = story.recorded().unwrap().id;
    story.probes(true, 3);
    let outputs = story.tell(Input::IntentDurable { id });
    assert!(!outputs.iter().any(|output| matches!(output, Output::Execute(_))));
    assert_eq!(story.closed().state, IncidentState::Recovered);
}

#[test]
fn a_stopped_process_and_failing_probes_are_a_hang_and_restarted() {
    for stopped in [false, true] {
        let mut story = Story::new(|_| {});
        story.probes(true, 3);
        if stopped {
            for _ in 0..2 {
                story.tell(Input::Process {
                    service: "a".into(),
                    state: ProcessState::Stopped,
                });
            }
        } else {
            story.probes(false, 2);
        }
        assert_eq!(story.incident().unwrap().class, FaultClass::Hang);
        assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
        story.probes(true, 3);
        assert_eq!(story.closed().verdict, Some(Verdict::Healed));
    }
}

#[test]
fn a_leak_is_restarted_and_verified_by_a_quiet_detector() {
    let mut story = Story::new(|policy| policy.settle = Duration::from_secs(5));
    story.ms = 60_000;
    story.probes(true, 3);
    for _ in 0..3 {
        story.anomaly("service_memory");
    }
    let incident = story.incident().unwrap();
    assert_eq!(
        (incident.class, incident.score),
        (FaultClass::MemoryLeak, Some(9.0))
    );
    assert_eq!(incident.causes[0].channel, "service_memory");
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
    story.probes(true, 10);
    // A young process looks unusual: that opens nothing, and it does not heal.
    story.anomaly("service_memory");
    assert_eq!(story.state(), Some(IncidentState::Verifying));
    story.pass(5_000);
    story.probe(true);
    assert_eq!(story.state(), Some(IncidentState::Verifying));
    story.cleared();
    assert_eq!(story.closed().verdict, Some(Verdict::Healed));
}

#[test]
fn a_leak_that_comes_back_at_once_is_handed_over_and_not_restarted_again() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    for _ in 0..3 {
        story.anomaly("service_memory");
    }
    story.carry_out(Outcome::Done);
    story.anomaly("service_memory");
    story.probes(true, 3);
    for _ in 0..400 {
        story.ms += 100;
        story.anomaly("service_memory");
        story.probe(true);
        story.pass(0);
    }
    let incident = story.incident().unwrap();
    assert_eq!(incident.state, IncidentState::HandedToHuman);
    assert_eq!(
        (incident.actions.len(), incident.verdict),
        (1, Some(Verdict::NoEffect))
    );
}

#[test]
fn with_defaults_a_hog_that_lasts_through_the_restart_is_not_called_healed() {
    let mut story = Story::with_defaults();
    story.ms = 60_000;
    story.probes(true, 3);
    for row in 0..=10 {
        assert!(story.incident().is_none(), "opened after {row} s");
        story.second(|story| drop(story.anomaly("service_cpu")));
    }
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
    for _ in 0..59 {
        story.second(|story| drop(story.anomaly("service_cpu")));
        assert_eq!(story.state(), Some(IncidentState::Verifying));
    }
    story.second(|story| drop(story.anomaly("service_cpu")));
    let incident = story.incident().unwrap();
    assert_eq!(
        (incident.state, incident.verdict, incident.actions.len()),
        (IncidentState::HandedToHuman, Some(Verdict::NoEffect), 1)
    );
}

#[test]
fn calm_rows_heal_only_after_settling_and_an_alarm_takes_them_back() {
    let mut story = Story::with_defaults();
    story.ms = 60_000;
    story.probes(true, 3);
    for _ in 0..=10 {
        story.second(|story| drop(story.anomaly("service_cpu")));
    }
    story.carry_out(Outcome::Done);
    for _ in 0..29 {
        story.second(|story| drop(story.calm()));
    }
    assert_eq!(story.state(), Some(IncidentState::Verifying), "still settling");
    // The alarm ends and is raised again: only its second end counts.
    story.cleared_then_anomaly();
    for _ in 0..5 {
        story.second(|story| drop(story.calm()));
    }
    assert_eq!(story.state(), Some(IncidentState::Verifying));
    story.cleared();
    story.probe(true);
    assert_eq!(story.closed().verdict, Some(Verdict::Healed));
}

#[test]
fn a_restart_without_any_word_of_the_detector_is_not_called_healed() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    for _ in 0..3 {
        story.anomaly("service_memory");
    }
    story.carry_out(Outcome::Done);
    story.probes(true, 400);
    let incident = story.closed();
    assert_eq!(
        (incident.state, incident.verdict),
        (IncidentState::Recovered, Some(Verdict::NoEffect))
    );
}

#[test]
fn a_short_burst_and_an_alarm_that_is_only_held_open_nothing() {
    let mut story = Story::with_defaults();
    story.ms = 60_000;
    for _ in 0..9 {
        story.second(|story| drop(story.anomaly("service_cpu")));
    }
    story.cleared();
    story.second(|story| drop(story.anomaly("service_cpu")));
    for _ in 0..60 {
        story.second(|story| drop(story.scored("service_cpu", 2.9)));
    }
    assert!(story.incident().is_none());
    for _ in 0..2 {
        story.second(|story| drop(story.anomaly("service_cpu")));
    }
    assert_eq!(story.incident().unwrap().class, FaultClass::CpuContention);
}

#[test]
fn trouble_that_returns_after_two_healing_restarts_is_handed_over_also_after_a_restart_of_the_node() {
    let mut story = Story::new(|_| {});
    for round in 0..3 {
        story.pass(60_000);
        story.probes(true, 3);
        for _ in 0..3 {
            story.anomaly("service_memory");
        }
        if round == 2 {
            break;
        }
        assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
        story.cleared();
        story.probes(true, 3);
        assert_eq!(story.closed().verdict, Some(Verdict::Healed));
        story.restart("boot-1");
    }
    let incident = story.incident().unwrap();
    assert_eq!(incident.state, IncidentState::HandedToHuman);
    assert!(incident.actions.is_empty());
    // A person may still have it done, and an hour later it is new again.
    let id = incident.id;
    story.tell(approve(id, None, None));
    story.carry_out(Outcome::Done);
    story.cleared();
    story.probes(true, 3);
    story.pass(3_700_000);
    story.probes(true, 3);
    for _ in 0..3 {
        story.anomaly("service_memory");
    }
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
}

#[test]
fn an_exit_while_corrupt_state_was_handed_over_is_acted_on() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    story.tell(Input::StateCorrupt {
        service: "a".into(),
        detail: "page 7 differs".into(),
    });
    assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
    story.crash();
    // The start checks the state again: corrupt means restoring, good means that it runs.
    assert_eq!(story.carry_out(corrupt(false)).action, ActionKind::Start);
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::RestoreAndStart);
    story.probes(true, 3);
    assert_eq!(story.closed().verdict, Some(Verdict::Healed));
}

#[test]
fn the_state_of_an_unprobed_service_is_not_replaced_while_its_process_runs() {
    for process in [false, true] {
        let mut story = Story::new(|_| {});
        let service = || "a".to_owned();
        if process {
            let state = ProcessState::Alive;
            story.tell(Input::Process {
                service: service(),
                state,
            });
        } else {
            story.tell(Input::Started {
                service: service(),
                pid: 7,
            });
        }
        story.tell(Input::StateCorrupt {
            service: service(),
            detail: "page 7 differs".into(),
        });
        assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
        assert!(story.incident().unwrap().actions.is_empty());
    }
    // Not started because of its state: nothing serves, so it is restored.
    let mut story = Story::new(|_| {});
    story.tell(Input::StateCorrupt {
        service: "a".into(),
        detail: "page 7 differs".into(),
    });
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::RestoreAndStart);
}

#[test]
fn trouble_of_the_host_and_unknown_anomalies_touch_nothing() {
    for channel in ["host_cpu_used", "service_probe_latency"] {
        let mut story = Story::new(|_| {});
        for _ in 0..10 {
            story.anomaly(channel);
        }
        let incident = story.incident().unwrap();
        assert_eq!(
            (incident.class, incident.state),
            (FaultClass::Unknown, IncidentState::HandedToHuman)
        );
        assert!(incident.actions.is_empty());
        story.probes(true, 3);
        story.tell(Input::AnomalyCleared { service: "a".into() });
        assert_eq!(story.closed().state, IncidentState::Recovered);
    }
}

#[test]
fn a_full_disk_inhibits_the_restart_of_a_crashed_service() {
    let mut story = Story::new(|_| {});
    story.tell(Input::DiskFull {
        service: "a".into(),
        free_bytes: 4096,
    });
    story.crash();
    let incident = story.incident().unwrap();
    assert_eq!(
        (incident.class, incident.state),
        (FaultClass::DiskFull, IncidentState::HandedToHuman)
    );
    assert!(incident.actions.is_empty());
    // Once there is room the crash is what remains, and that can be mended.
    story.tell(Input::DiskRelieved { service: "a".into() });
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Start);
}

#[test]
fn an_inhibited_class_is_handed_over_and_never_acted_on() {
    let mut story = Story::new(|policy| policy.inhibit = BTreeSet::from([FaultClass::Hang]));
    story.probes(true, 3);
    story.probes(false, 2);
    let incident = story.incident().unwrap();
    assert_eq!(
        (incident.class, incident.state),
        (FaultClass::Hang, IncidentState::HandedToHuman)
    );
    assert!(
        incident
            .handed_over
            .as_ref()
            .unwrap()
            .starts_with("hang inhibits every action")
    );
    story.probes(false, 50);
    assert!(story.recorded().is_none());
}

#[test]
fn corrupt_state_found_at_a_start_is_restored_as_the_next_rung() {
    let mut story = Story::new(|_| {});
    story.crash();
    assert_eq!(story.carry_out(corrupt(false)).action, ActionKind::Start);
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::RestoreAndStart);
    story.probes(true, 3);
    let incident = story.closed();
    assert_eq!(
        (incident.class, incident.actions.len()),
        (FaultClass::Corruption, 2)
    );
    assert_eq!(incident.verdict, Some(Verdict::Healed));
}

#[test]
fn corrupt_state_of_a_service_that_answers_is_not_replaced() {
    let mut story = Story::new(|policy| policy.restore_autonomy = Autonomy::Recommend);
    story.probes(true, 3);
    story.tell(Input::StateCorrupt {
        service: "a".into(),
        detail: "page 7 differs".into(),
    });
    assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
    assert!(story.incident().unwrap().actions.is_empty());
    // Whoever wants it all the same is shown the plan and asked for that.
    let id = story.incident().unwrap().id;
    story.tell(approve(id, None, None));
    assert!(story.recorded().is_none(), "R3 is for a plan alone");
    assert_eq!(story.state(), Some(IncidentState::AwaitingApproval));
    let plan = story.incident().unwrap().plan.clone().unwrap();
    assert_eq!(plan.action, ActionKind::RestoreAndStart);
    story.tell(Input::StateGood { service: "a".into() });
    story.probe(true);
    assert_eq!(story.closed().state, IncidentState::Recovered);
}

#[test]
fn a_restore_needs_approval_where_nobody_wrote_otherwise_and_a_start_does_not() {
    let unwritten = HealPolicy::default().restore_autonomy;
    assert_eq!(unwritten, Autonomy::Recommend);
    let mut story = Story::new(|policy| policy.restore_autonomy = unwritten);
    story.crash();
    story.carry_out(corrupt(false));
    assert_eq!(story.state(), Some(IncidentState::AwaitingApproval));
    story.approve();
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::RestoreAndStart);
}

#[test]
fn starts_are_spaced_and_bounded_and_then_a_person_hears_of_it_again_and_again() {
    let mut story = Story::new(|policy| policy.cooldown = Duration::from_secs(10));
    story.crash();
    story.carry_out(failed(false));
    assert_eq!(story.state(), Some(IncidentState::CoolingDown));
    assert!(story.pass(9_999).is_empty());
    story.pass(1);
    story.carry_out(failed(false));
    assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
    let notices = story.pass(3 * 900_000);
    assert_eq!(notices.len(), 3, "{notices:?}");
    assert!(matches!(&notices[0], Output::Notify(notice) if notice.kind == NoticeKind::StillOpen));
    // Another process that answers at its address is no recovery.
    story.probes(true, 3);
    assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
    assert!(
        story
            .incident()
            .unwrap()
            .why()
            .contains("answered by another process")
    );
    // Still watched: when somebody mended it, it closes.
    story.tell(Input::Started {
        service: "a".into(),
        pid: 7,
    });
    story.probes(true, 3);
    assert_eq!(story.closed().state, IncidentState::Recovered);
}

#[test]
fn a_crash_during_verification_has_no_effect_and_goes_on_at_once() {
    let mut story = Story::new(|policy| policy.cooldown = Duration::ZERO);
    story.crash();
    story.carry_out(Outcome::Done);
    story.crash();
    assert_eq!(
        story.incident().unwrap().actions[0].verdict,
        Some(Verdict::NoEffect)
    );
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Start);
}

#[test]
fn an_action_that_stops_an_answering_service_for_good_is_harm_and_demotes() {
    let mut story = Story::new(|_| {});
    story.probes(true, 5);
    for _ in 0..3 {
        story.anomaly("service_cpu");
    }
    story.carry_out(Outcome::Done);
    story.probes(false, 5);
    story.pass(31_000);
    let incident = story.incident().unwrap();
    assert_eq!(
        (incident.state, incident.verdict),
        (IncidentState::HandedToHuman, Some(Verdict::Harm))
    );
    assert_eq!(incident.actions.len(), 1);
    // A later incident is only recommended, also after a restart of the node, until a person lifts it.
    story.probes(true, 3);
    story.restart("boot-1");
    story.pass(60_000);
    story.crash();
    assert_eq!(story.state(), Some(IncidentState::AwaitingApproval));
    let standing = story.machine.standing("a");
    assert!(standing.demotions.len() == 1 && standing.breakers.is_empty());
    let lift = |standing: String| Input::Reinstate {
        service: "a".into(),
        standing,
        by: None,
    };
    story.tell(lift("of something else".to_owned()));
    assert!(!story.machine.standing("a").is_empty());
    let outputs = story.tell(lift(standing.hash()));
    assert!(matches!(&outputs[0], Output::Reinstated(written) if written.lifted == standing));
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Start);
}

#[test]
fn a_kill_while_a_restart_for_cpu_is_verified_is_another_fault_and_no_harm() {
    let mut story = Story::new(|policy| policy.cooldown = Duration::ZERO);
    story.probes(true, 5);
    for _ in 0..3 {
        story.anomaly("service_cpu");
    }
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
    story.probes(true, 3);
    story.crash();
    let incident = story.incident().unwrap();
    assert_eq!(incident.actions[0].verdict, Some(Verdict::NoEffect));
    assert_eq!(incident.class, FaultClass::Crash);
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Start);
    story.probes(true, 3);
    assert_eq!(story.closed().state, IncidentState::Healed);
}

#[test]
fn a_restart_after_which_an_answering_service_ends_at_once_is_harm() {
    let mut story = Story::new(|policy| policy.cooldown = Duration::ZERO);
    story.probes(true, 5);
    for _ in 0..3 {
        story.anomaly("service_cpu");
    }
    story.carry_out(Outcome::Done);
    story.crash();
    assert_eq!(story.incident().unwrap().verdict, Some(Verdict::Harm));
}

#[test]
fn an_intent_that_could_not_be_recorded_is_tried_again_told_once_and_costs_no_budget() {
    let mut story = Story::new(|policy| policy.max_actions = 1);
    story.crash();
    for round in 0..5 {
        let intent = story.recorded().expect("an intent");
        let outputs = story.tell(Input::IntentFailed {
            id: intent.id,
            detail: "no space left on device".into(),
        });
        let told = outputs
            .iter()
            .filter(|output| matches!(output, Output::Notify(_)))
            .count();
        assert_eq!(told, usize::from(round == 0), "{outputs:?}");
        assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
        assert!(story.recorded().is_none());
        story.pass(10_000);
    }
    assert_eq!(story.incident().unwrap().actions.len(), 2);
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Start);
    story.probes(true, 3);
    let closed = story.closed();
    assert_eq!((closed.state, closed.handed_over), (IncidentState::Healed, None));
}

#[test]
fn while_the_record_keeps_failing_a_person_is_reminded_and_a_restart_goes_on_trying() {
    let mut story = Story::new(|policy| policy.remind_every = Duration::from_mins(1));
    story.crash();
    let mut told = Vec::new();
    for _ in 0..13 {
        let intent = story.recorded().expect("an intent");
        let outputs = story.tell(Input::IntentFailed {
            id: intent.id,
            detail: "no space left on device".into(),
        });
        told.extend(outputs.into_iter().filter_map(|output| match output {
            Output::Notify(notice) => Some(notice.kind),
            _ => None,
        }));
        story.pass(10_000);
    }
    assert_eq!(
        told,
        [
            NoticeKind::HandedToHuman,
            NoticeKind::StillOpen,
            NoticeKind::StillOpen
        ]
    );
    let intent = story.recorded().expect("an intent");
    story.tell(Input::IntentFailed {
        id: intent.id,
        detail: "no space left on device".into(),
    });
    story.restart("boot-1");
    story.crash();
    story.pass(10_000);
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Start);
}

#[test]
fn a_crash_during_an_alarm_that_is_no_incident_yet_is_timed_from_the_crash() {
    let mut story = Story::new(|policy| policy.anomaly_lasting = Duration::from_secs(100));
    story.probes(true, 3);
    story.anomaly("host_load");
    story.pass(5_000);
    story.crash();
    let (crashed, incident) = (story.now().when(), story.incident().unwrap());
    assert_eq!((incident.opened, incident.detected), (crashed, crashed));
    assert!(incident.why().contains("-5.00 s"), "{}", incident.why());
}

#[test]
fn a_crash_during_an_unexplained_anomaly_is_timed_from_the_crash() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    for _ in 0..3 {
        story.anomaly("host_load");
    }
    assert_eq!(story.incident().unwrap().class, FaultClass::Unknown);
    story.pass(90_000);
    story.crash();
    let crashed = story.now().when();
    story.carry_out(Outcome::Done);
    story.probes(true, 3);
    let incident = story.incident().cloned().unwrap_or_else(|| story.closed());
    assert_eq!(incident.class, FaultClass::Crash);
    assert_eq!((incident.opened, incident.detected), (crashed, crashed));
    assert!(incident.why().contains("-90"), "{}", incident.why());
}

#[test]
fn an_action_on_a_hung_service_that_does_not_help_is_no_harm() {
    let mut story = Story::new(|_| {});
    story.probes(true, 5);
    story.probes(false, 2);
    story.carry_out(Outcome::Done);
    story.probes(false, 3);
    story.pass(31_000);
    assert_eq!(story.incident().unwrap().verdict, Some(Verdict::NoEffect));
}

#[test]
fn without_a_probe_the_verdict_is_unknown() {
    let mut story = Story::new(|_| {});
    story.crash();
    story.carry_out(Outcome::Done);
    story.pass(30_000);
    let incident = story.closed();
    assert_eq!(
        (incident.state, incident.verdict),
        (IncidentState::Recovered, Some(Verdict::Unknown))
    );
}

#[test]
fn autonomy_observe_and_recommend_have_no_effect() {
    for (autonomy, kind) in [
        (Autonomy::Observe, NoticeKind::WouldHaveActed),
        (Autonomy::Recommend, NoticeKind::Recommended),
    ] {
        let mut story = Story::new(|policy| policy.autonomy = autonomy);
        story.crash();
        story.probes(false, 10);
        story.pass(3_600_000);
        let acts = |output: &Output| matches!(output, Output::RecordIntent(_) | Output::Execute(_));
        assert!(!story.seen.iter().any(acts));
        assert!(
            story
                .seen
                .iter()
                .any(|output| matches!(output, Output::Notify(notice) if notice.kind == kind))
        );
        story.tell(Input::Started {
            service: "a".into(),
            pid: 7,
        });
        story.probes(true, 3);
        assert_eq!(story.closed().state, IncidentState::Recovered);
    }
}

#[test]
fn a_recommended_action_is_done_once_approved_and_not_when_denied() {
    let mut story = Story::new(|policy| policy.autonomy = Autonomy::Recommend);
    story.crash();
    let id = story.incident().unwrap().id;
    story.tell(Input::Deny { incident: id });
    assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
    story.tell(approve(IncidentId(99), None, None));
    assert_eq!(story.machine.ignored_inputs(), 1);
    story.tell(approve(id, None, None));
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Start);
}

#[test]
fn the_stop_switch_stops_what_has_not_begun_and_survives_a_restart() {
    let mut story = Story::new(|_| {});
    story.crash();
    let id = story.recorded().unwrap().id;
    story.tell(Input::Halt(true));
    let outputs = story.tell(Input::IntentDurable { id });
    assert!(!outputs.iter().any(|output| matches!(output, Output::Execute(_))));
    story.pass(3_600_000);
    story.restart("boot-2");
    assert!(story.machine.is_halted());
    story.crash();
    assert!(story.recorded().is_none());
    story.tell(Input::Halt(false));
    assert!(story.recorded().is_some() || story.state() == Some(IncidentState::CoolingDown));
}

#[test]
fn what_happens_meanwhile_joins_the_open_incident() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    story.probes(false, 2);
    let id = story.incident().unwrap().id;
    story.crash();
    story.anomaly("service_cpu");
    story.tell(Input::Process {
        service: "a".into(),
        state: ProcessState::Stopped,
    });
    let opened = story
        .seen
        .iter()
        .filter(|output| matches!(output, Output::Opened(_)))
        .count();
    let recorded = story
        .seen
        .iter()
        .filter(|output| matches!(output, Output::RecordIntent(_)))
        .count();
    assert_eq!((opened, recorded, story.incident().unwrap().id), (1, 1, id));
}

#[test]
fn a_hung_executor_blocks_further_actions_until_it_reports() {
    let mut story = Story::new(|_| {});
    story.crash();
    let id = story.recorded().unwrap().id;
    story.tell(Input::IntentDurable { id });
    story.pass(121_000);
    assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
    story.probes(true, 5);
    story.crash();
    story.tell(Input::StateCorrupt {
        service: "a".into(),
        detail: "page 7".into(),
    });
    let count = |story: &Story| {
        story
            .seen
            .iter()
            .filter(|o| matches!(o, Output::RecordIntent(_)))
            .count()
    };
    assert_eq!(count(&story), 1);
    assert!(
        story.incident().is_some(),
        "an incident with an action under way stays open"
    );
    story.tell(Input::Executed {
        id,
        outcome: corrupt(false),
    });
    assert_eq!(count(&story), 2);
}

#[test]
fn after_a_restart_of_the_node_an_intent_is_reconciled_and_never_repeated_blindly() {
    for durable in [false, true] {
        let mut story = Story::new(|_| {});
        story.crash();
        let intent = story.recorded().unwrap();
        if durable {
            story.tell(Input::IntentDurable { id: intent.id });
        }
        story.restart("boot-1");
        assert_eq!(story.seen.last(), Some(&Output::Reconcile(intent.clone())));
        story.crash();
        story.probes(false, 5);
        assert!(
            story.recorded().is_none_or(|again| again == intent),
            "nothing new before it is reconciled"
        );
        story.tell(Input::Reconciled {
            id: intent.id,
            running: true,
            took_effect: true,
        });
        assert_eq!(story.state(), Some(IncidentState::Verifying));
        story.probes(true, 3);
        assert_eq!(story.closed().verdict, Some(Verdict::Healed));
    }
}

#[test]
fn an_interrupted_action_that_did_not_happen_is_decided_anew_and_charged_again() {
    let mut story = Story::new(|policy| policy.cooldown = Duration::from_secs(10));
    story.crash();
    let first = story.recorded().unwrap();
    story.restart("boot-1");
    story.tell(Input::Reconciled {
        id: first.id,
        running: false,
        took_effect: false,
    });
    assert_eq!(story.state(), Some(IncidentState::CoolingDown));
    story.pass(10_000);
    let second = story.carry_out(Outcome::Done);
    assert!(second.id > first.id);
    assert_eq!(story.machine.export().charges.len(), 2);
}

#[test]
fn budgets_and_cool_downs_survive_a_restart_and_a_new_boot() {
    for clock in ["boot-1", "boot-2"] {
        let mut story = Story::new(|policy| {
            policy.max_actions = 1;
            policy.cooldown = Duration::ZERO;
        });
        story.crash();
        story.carry_out(Outcome::Done);
        story.probes(true, 3);
        if clock == "boot-2" {
            story.ms = 500;
        }
        story.restart(clock);
        story.crash();
        assert_eq!(story.state(), Some(IncidentState::HandedToHuman), "{clock}");
        assert!(
            story
                .incident()
                .unwrap()
                .handed_over
                .as_ref()
                .unwrap()
                .contains("budget of 1 actions")
        );
    }
}

#[test]
fn a_restart_of_the_node_keeps_watching_what_was_handed_over() {
    let mut story = Story::new(|policy| policy.max_actions = 1);
    story.probes(true, 3);
    story.crash();
    story.carry_out(failed(false));
    assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
    story.restart("boot-1");
    assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
    // Knowing nothing yet is not knowing that it is well.
    story.tell(Input::Started {
        service: "a".into(),
        pid: 7,
    });
    assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
    story.probes(true, 3);
    assert_eq!(story.closed().state, IncidentState::Recovered);
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

#[test]
fn a_full_disk_is_relieved_where_something_is_listed_and_never_restarted() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    story.tell(Input::Relievable {
        service: "a".into(),
        bytes: 4096,
    });
    story.tell(Input::DiskFull {
        service: "a".into(),
        free_bytes: 12,
    });
    let room = Outcome::Relieved {
        detail: "3 files of 4096 bytes were moved to quarantine".to_owned(),
    };
    assert_eq!(story.carry_out(room).action, ActionKind::RelieveSpace);
    story.probes(true, 3);
    assert!(story.incident().is_some(), "room is what it was done for");
    story.tell(Input::DiskRelieved { service: "a".into() });
    let closed = story.closed();
    assert_eq!(
        (closed.class, closed.verdict),
        (FaultClass::DiskFull, Some(Verdict::Healed))
    );
    assert!(
        closed.why().contains("3 files of 4096 bytes were moved"),
        "{}",
        closed.why()
    );
}

#[test]
fn a_relief_that_made_too_little_room_is_a_persons_and_no_restart_follows() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    story.tell(Input::Relievable {
        service: "a".into(),
        bytes: 1,
    });
    story.tell(Input::DiskFull {
        service: "a".into(),
        free_bytes: 12,
    });
    let failed = Outcome::Failed {
        detail: "nothing more is listed".to_owned(),
        running: true,
    };
    assert_eq!(story.carry_out(failed).action, ActionKind::RelieveSpace);
    story.probes(false, 5);
    let incident = story.incident().unwrap();
    assert_eq!(incident.state, IncidentState::HandedToHuman);
    assert_eq!(incident.actions.len(), 1);
}

#[test]
fn what_keeps_a_living_process_from_answering_is_told_apart_from_a_hang() {
    let slow_disk = PressureSeen {
        waits_for_disk: Some(2.0),
        host_io_full: Some(0.7),
        ..PressureSeen::default()
    };
    let starved = PressureSeen {
        waits_for_cpu: Some(0.9),
        uses_cpu: Some(0.1),
        ..PressureSeen::default()
    };
    for (seen, class) in [
        (slow_disk, FaultClass::DiskSlow),
        (starved, FaultClass::CpuStarvation),
    ] {
        let mut story = Story::new(|_| {});
        story.probes(true, 3);
        pressed(&mut story, seen);
        story.probes(false, 2);
        let incident = story.incident().unwrap().clone();
        assert_eq!(
            (incident.class, incident.state),
            (class, IncidentState::HandedToHuman)
        );
        assert!(incident.actions.is_empty());
        let also: Vec<FaultClass> = incident.hypotheses.iter().map(|of| of.class).collect();
        assert_eq!(also, [class, FaultClass::Hang]);
        assert!(incident.why().contains("Restart helps: no."));
        // When that is over and it still does not answer, it is a hang.
        pressed(&mut story, PressureSeen::default());
        story.probes(false, 1);
        assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
    }
}

#[test]
fn a_restart_of_a_stopped_process_that_does_not_help_is_no_harm() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    for _ in 0..2 {
        story.tell(Input::Process {
            service: "a".into(),
            state: ProcessState::Stopped,
        });
    }
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
    story.probes(false, 9);
    story.pass(31_000);
    let verdict = story.incident().unwrap().actions[0].verdict;
    assert_eq!(verdict, Some(Verdict::NoEffect));
}

#[test]
fn a_busy_service_that_answers_now_and_then_is_overloaded_and_one_that_never_does_hangs() {
    let busy = PressureSeen {
        uses_cpu: Some(0.9),
        crowd: Some(5.0),
        ..PressureSeen::default()
    };
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    pressed(&mut story, busy);
    for ok in [false, true, false] {
        story.probe(ok);
    }
    let incident = story.incident().unwrap();
    assert_eq!(
        (incident.class, incident.state),
        (FaultClass::Overload, IncidentState::HandedToHuman)
    );
    assert!(incident.actions.is_empty());
    // Without a crowd it is a loop of its own, and where nothing is answered too.
    let loops = PressureSeen {
        crowd: Some(1.2),
        ..busy
    };
    for (seen, probes) in [(loops, &[false, true, false][..]), (busy, &[false; 6])] {
        let mut story = Story::new(|_| {});
        story.probes(true, 3);
        pressed(&mut story, seen);
        for ok in probes {
            assert!(story.recorded().is_none(), "{seen:?}: the next may be answered");
            story.probe(*ok);
        }
        assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
    }
    // One answer in time, and it is the crowd.
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    pressed(&mut story, busy);
    story.probes(false, 5);
    story.probe(true);
    story.probe(false);
    assert_eq!(story.incident().unwrap().class, FaultClass::Overload);
    assert!(story.recorded().is_none());
}

#[test]
fn a_service_whose_output_says_that_a_disk_is_full_is_not_restarted_for_not_answering() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    story.tell(Input::LogErrors {
        service: "a".into(),
        lines: 9,
        template: "ERROR: could not write <*> No space left on device".into(),
        hint: Some(FaultClass::DiskFull),
    });
    assert!(
        story.incident().is_none(),
        "errors alone are evidence, no symptom"
    );
    story.probes(false, 2);
    let incident = story.incident().unwrap();
    assert_eq!(
        (incident.class, incident.state),
        (FaultClass::DiskFull, IncidentState::HandedToHuman)
    );
    assert!(
        incident.why().contains("its output tells of 9 errors"),
        "{}",
        incident.why()
    );
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

#[test]
fn a_hook_stands_before_the_own_rungs_and_may_be_for_a_class_that_inhibits_the_rest() {
    let mut story = Story::new(|policy| {
        policy.hook_for = BTreeSet::from([FaultClass::Hang, FaultClass::Overload]);
        policy.webhook_for = BTreeSet::from([FaultClass::Hang]);
        policy.inhibit.insert(FaultClass::Overload);
    });
    story.probes(true, 3);
    story.probes(false, 2);
    for (action, outcome) in [
        (ActionKind::Webhook, failed(true)),
        (ActionKind::Hook, failed(true)),
        (ActionKind::Restart, Outcome::Done),
    ] {
        assert_eq!(story.carry_out(outcome).action, action);
    }
    story.probes(true, 3);
    assert_eq!(story.closed().verdict, Some(Verdict::Healed));
    pressed(
        &mut story,
        PressureSeen {
            uses_cpu: Some(0.9),
            crowd: Some(5.0),
            ..PressureSeen::default()
        },
    );
    for ok in [false, true, false] {
        story.probe(ok);
    }
    story.pass(60_000);
    assert_eq!(story.carry_out(relieved()).action, ActionKind::Hook);
    story.probes(true, 3);
    let closed = story.closed();
    assert_eq!(
        (closed.class, closed.verdict),
        (FaultClass::Overload, Some(Verdict::Healed))
    );
}

#[test]
fn what_does_not_renew_the_process_is_done_once_an_incident_also_when_the_node_dies_over_it() {
    for (durable, running) in [(true, true), (false, true), (true, false)] {
        let mut story = Story::new(|policy| {
            policy.hook_for = BTreeSet::from([FaultClass::Hang, FaultClass::Crash]);
        });
        story.probes(true, 3);
        story.probes(false, 2);
        let intent = story.recorded().unwrap();
        assert_eq!(intent.action, ActionKind::Hook);
        if durable {
            story.tell(Input::IntentDurable { id: intent.id });
        }
        story.restart("boot-1");
        story.tell(Input::Reconciled {
            id: intent.id,
            running,
            took_effect: false,
        });
        if running {
            assert_eq!(story.state(), Some(IncidentState::Verifying));
            story.probes(false, 3);
            story.pass(31_000);
        }
        let next = story.carry_out(Outcome::Done);
        let expected = if running {
            ActionKind::Restart
        } else {
            ActionKind::Start
        };
        assert_eq!(
            next.action, expected,
            "the symptom stayed, and the hook is not run again"
        );
        story.probes(true, 3);
        let hooks = |done: &&crate::types::ActionRecord| done.intent.action == ActionKind::Hook;
        assert_eq!(story.closed().actions.iter().filter(hooks).count(), 1);
        let counted = story
            .machine
            .evidence
            .iter()
            .any(|of| of.action == ActionKind::Hook);
        assert!(!counted, "nobody knows what the hook did");
    }
}

#[test]
fn an_interrupted_action_is_judged_at_the_end_of_its_window_alone() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    looks(&mut story, Some(pile(false, true)), 20);
    let id = story.recorded().unwrap().id;
    story.tell(Input::IntentDurable { id });
    story.restart("boot-1");
    story.tell(Input::Reconciled {
        id,
        running: true,
        took_effect: false,
    });
    // Its clients are answered before anybody has looked at its sessions.
    story.probes(true, 3);
    looks(&mut story, Some(pile(false, true)), 20);
    story.probes(true, 3);
    story.pass(31_000);
    let incident = story.incident().unwrap();
    assert_eq!(
        (incident.id, incident.state, incident.actions.len()),
        (IncidentId(1), IncidentState::HandedToHuman, 1)
    );
}

#[test]
fn lines_that_clients_can_have_written_hold_a_restart_back_for_a_minute_at_most() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    let says = Input::LogErrors {
        service: "a".into(),
        lines: 9,
        template: "ERROR: <*> no space left on device".into(),
        hint: Some(FaultClass::DiskFull),
    };
    story.tell(says.clone());
    story.probes(false, 2);
    assert_eq!(story.incident().unwrap().class, FaultClass::DiskFull);
    story.pass(61_000);
    story.probe(false);
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
    // Room on the disk ends it too.
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    story.tell(says);
    story.tell(Input::DiskRelieved { service: "a".into() });
    story.probes(false, 2);
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
}
