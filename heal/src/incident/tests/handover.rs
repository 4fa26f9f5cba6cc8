//! What is left to a person, and what a person says.

use super::*;

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
