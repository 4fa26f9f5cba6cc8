//! A second fault while the first is still in hand.

use super::*;

/// A service that was restarted for a leak, answers again, and is not yet known to be normal.
fn restarted_for_a_leak() -> Story {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    for _ in 0..10 {
        if story.recorded().is_none() {
            story.anomaly("service_memory");
        }
    }
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
    story.probes(true, 3);
    assert_eq!(story.state(), Some(IncidentState::Verifying));
    story
}

#[test]
fn a_full_house_while_a_restart_is_verified_is_acted_on_at_once_in_an_incident_of_its_own() {
    let mut story = restarted_for_a_leak();
    let first = story.incident().unwrap().id;
    let came = story.ms;
    looks(&mut story, None, 1);
    let incident = story.incident().unwrap().clone();
    assert_eq!(incident.class, FaultClass::ConnectionExhaustion);
    assert!(incident.id != first && incident.detected.monotonic_ms >= came);
    let left = story.closed();
    assert_eq!(
        (left.id, left.state, left.verdict),
        (first, IncidentState::Recovered, Some(Verdict::Unknown)),
        "nobody knows whether the restart had mended it"
    );
    assert!(
        left.why()
            .contains("connection_exhaustion came before it was verified")
    );
    story.pass(60_000);
    assert_eq!(story.carry_out(relieved()).action, ActionKind::EndIdleSessions);
    looks(&mut story, None, 12);
    story.probes(true, 3);
    let closed = story.closed();
    assert_eq!(closed.verdict, Some(Verdict::Healed));
    assert!(
        closed
            .actions
            .iter()
            .all(|done| !done.intent.action.renews_process())
    );
}

#[test]
fn a_disk_that_fills_while_a_restart_is_verified_is_no_harm_of_the_restart() {
    let mut story = restarted_for_a_leak();
    story.tell(Input::DiskFull {
        service: "a".into(),
        free_bytes: 12,
    });
    let incident = story.incident().unwrap();
    assert_eq!(incident.class, FaultClass::DiskFull);
    assert!(incident.actions.is_empty(), "no restart on a full disk");
    assert_eq!(story.closed().verdict, Some(Verdict::Unknown));
    assert!(story.machine.export().demoted.is_empty());
}

#[test]
fn a_restart_after_a_hang_that_brought_the_service_back_stays_healed_when_clients_take_every_slot() {
    let mut story = Story::new(|policy| policy.verify_probes = 2);
    story.probes(true, 3);
    for _ in 0..4 {
        story.tell(Input::Process {
            service: "a".into(),
            state: ProcessState::Stopped,
        });
    }
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
    // Refused before the first answer: the same incident goes on with what frees slots.
    for _ in 0..2 {
        story.tell(Input::SessionsRefused {
            service: "a".into(),
            detail: "sorry, too many clients already".into(),
        });
        story.probe(false);
    }
    let incident = story.incident().unwrap();
    assert_eq!(incident.class, FaultClass::ConnectionExhaustion);
    assert_eq!(incident.actions[0].verdict, Some(Verdict::Unknown));
    story.pass(60_000);
    assert_eq!(story.carry_out(relieved()).action, ActionKind::EndIdleSessions);
    looks(&mut story, None, 12);
    story.probes(true, 3);
    assert_eq!(story.closed().verdict, Some(Verdict::Healed));
}

#[test]
fn a_fault_that_joins_an_anomaly_nobody_acted_on_is_timed_from_its_own_first_sign() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    for _ in 0..10 {
        story.anomaly("host_disk_read");
    }
    assert_eq!(story.incident().unwrap().class, FaultClass::Unknown);
    story.pass(5_000);
    let came = story.ms;
    looks(&mut story, None, 1);
    let incident = story.incident().unwrap();
    assert_eq!(incident.class, FaultClass::ConnectionExhaustion);
    assert!(incident.opened.monotonic_ms >= came && incident.detected.monotonic_ms >= came);
}
