//! What counts as healed after an action, and what as harm.

use super::*;

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
