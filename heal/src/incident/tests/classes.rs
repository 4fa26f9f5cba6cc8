//! Classes of trouble that the kernel tells of beside failing probes.

use super::*;

#[test]
fn as_many_open_files_as_it_may_have_are_restarted_away_and_a_crowd_that_holds_them_is_not() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    let seen = PressureSeen {
        descriptors: Some(0.99),
        ..PressureSeen::default()
    };
    story.silent_under(seen, 2);
    assert_eq!(story.incident().unwrap().class, FaultClass::FdExhaustion);
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
    story.probes(true, 3);
    assert_eq!(story.closed().verdict, Some(Verdict::Healed));
    // Honest clients hold them.
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    let crowd = PressureSeen {
        uses_cpu: Some(0.9),
        runs: Some(1.8),
        crowd: Some(5.0),
        ..seen
    };
    story.asked_under(crowd, &[false, true, false]);
    let incident = story.incident().unwrap();
    assert_eq!(incident.class, FaultClass::Overload);
    assert!(story.recorded().is_none(), "{incident:?}");
}

#[test]
fn a_file_system_that_cannot_be_written_any_more_keeps_a_crash_from_being_restarted() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    let read_only = |on| Input::ReadOnly {
        service: "a".into(),
        on,
    };
    story.tell(read_only(true));
    assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
    story.crash();
    let incident = story.incident().unwrap();
    assert_eq!(incident.class, FaultClass::ReadOnlyFs);
    assert!(story.recorded().is_none(), "{incident:?}");
    // A restart of the node forgets nothing of it.
    story.restart("boot-1");
    story.crash();
    assert_eq!(story.incident().unwrap().class, FaultClass::ReadOnlyFs);
    assert!(story.recorded().is_none());
    // It is mended: what is left is the crash.
    story.tell(read_only(false));
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Start);
}

#[test]
fn what_it_did_not_answer_while_it_could_not_write_is_no_hang_afterwards() {
    let full: fn(bool) -> Input = |on| {
        let service = "a".to_owned();
        if on {
            Input::DiskFull {
                service,
                free_bytes: 0,
            }
        } else {
            Input::DiskRelieved { service }
        }
    };
    let read_only: fn(bool) -> Input = |on| Input::ReadOnly {
        service: "a".into(),
        on,
    };
    for told in [full, read_only] {
        let mut story = Story::new(|_| {});
        story.probes(true, 3);
        story.tell(told(true));
        story.silent_under(PressureSeen::default(), 4);
        story.tell(told(false));
        assert!(story.recorded().is_none());
        story.probes(true, 3);
        assert_eq!(story.closed().state, IncidentState::Recovered);
        // And one that does not answer when it could is one.
        story.tell(told(true));
        story.silent_under(PressureSeen::default(), 4);
        story.tell(told(false));
        story.silent_under(PressureSeen::default(), 2);
        assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
    }
}

/// Packets get lost on the way to it.
fn lossy() -> NetworkSeen {
    NetworkSeen {
        resent: 0.2,
        unheard: 3,
        unread: 0,
        dropped: 7,
    }
}

fn on_the_way(network: Option<NetworkSeen>) -> PressureSeen {
    PressureSeen {
        network,
        ..PressureSeen::default()
    }
}

#[test]
fn lost_packets_are_a_persons_and_what_is_silent_without_them_is_restarted() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    story.silent_under(on_the_way(Some(lossy())), 2);
    let incident = story.incident().unwrap().clone();
    assert_eq!(
        (incident.class, incident.state),
        (FaultClass::NetworkLoss, IncidentState::HandedToHuman)
    );
    let why = incident.why();
    assert!(
        why.contains("Restart helps: no.") && why.contains("20.0 % of the host's TCP segments"),
        "{why}"
    );
    assert!(why.contains("interfaces dropped 7 packets"), "{why}");
    let also: Vec<FaultClass> = incident.hypotheses.iter().map(|of| of.class).collect();
    assert_eq!(also, [FaultClass::NetworkLoss, FaultClass::Hang]);
    assert!(story.recorded().is_none());
    // The way is sound again: it is asked anew, and silent still. It hangs.
    story.silent_under(on_the_way(None), 1);
    assert!(story.recorded().is_none());
    story.silent_under(on_the_way(None), 1);
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
}

#[test]
fn a_hung_service_whose_clients_send_again_is_a_hang_all_the_same() {
    // The kernel takes nothing more for it, so that its clients hear nothing; or the loss is on somebody else's way; or there is hardly any.
    let full = NetworkSeen { unread: 9, ..lossy() };
    let others = NetworkSeen {
        unheard: 0,
        ..lossy()
    };
    let slight = NetworkSeen {
        resent: 0.001,
        ..lossy()
    };
    for network in [full, others, slight] {
        let mut story = Story::new(|_| {});
        story.probes(true, 3);
        story.silent_under(on_the_way(Some(network)), 2);
        assert_eq!(
            story.carry_out(Outcome::Done).action,
            ActionKind::Restart,
            "{network:?}"
        );
    }
    // A process that is stopped is stopped, whatever the network does.
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    pressed(&mut story, on_the_way(Some(lossy())));
    for _ in 0..2 {
        story.tell(Input::Process {
            service: "a".into(),
            state: ProcessState::Stopped,
        });
    }
    assert_eq!(story.incident().unwrap().class, FaultClass::Hang);
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
}

fn refused(story: &mut Story, words: &str) {
    story.tell(Input::Refused {
        service: "a".into(),
        detail: words.to_owned(),
    });
    story.probe(false);
}

#[test]
fn a_server_that_answers_with_a_refusal_is_a_persons_and_one_that_falls_silent_after_it_is_restarted() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    for _ in 0..4 {
        refused(&mut story, "MISCONF snapshots fail");
    }
    let incident = story.incident().unwrap();
    assert_eq!(
        (incident.class, incident.state),
        (FaultClass::Unknown, IncidentState::HandedToHuman)
    );
    assert!(
        incident.why().contains("refuses: MISCONF snapshots fail"),
        "{}",
        incident.why()
    );
    assert!(story.recorded().is_none());
    // Mended: it is not restarted for what it refused before.
    story.probes(true, 1);
    assert!(story.recorded().is_none());
    refused(&mut story, "NOAUTH");
    story.probes(false, 1);
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
}

#[test]
fn a_full_house_that_nobody_can_look_into_is_over_once_a_client_is_let_in() {
    let mut story = Story::new(|policy| policy.session_actions = false);
    story.probes(true, 3);
    for _ in 0..3 {
        story.tell(Input::SessionsRefused {
            service: "a".into(),
            detail: "max number of clients reached".into(),
        });
        story.probe(false);
    }
    let incident = story.incident().unwrap();
    assert_eq!(
        (incident.class, incident.state),
        (FaultClass::ConnectionExhaustion, IncidentState::HandedToHuman)
    );
    story.probes(true, 3);
    assert_eq!(story.closed().class, FaultClass::ConnectionExhaustion);
    // Silence after a refusal is a hang, found as soon as any.
    story.tell(Input::SessionsRefused {
        service: "a".into(),
        detail: "max number of clients reached".into(),
    });
    story.probe(false);
    story.probes(false, 3);
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
}
