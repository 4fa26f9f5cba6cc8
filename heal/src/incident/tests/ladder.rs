//! Which action comes first, which next, and which not at all.

use super::*;

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
fn a_full_disk_with_nothing_to_move_is_relieved_when_something_becomes_old_enough() {
    let mut story = Story::new(|_| {});
    let movable = |bytes| Input::Relievable {
        service: "a".into(),
        bytes,
    };
    story.probes(true, 3);
    story.tell(movable(0));
    story.tell(Input::DiskFull {
        service: "a".into(),
        free_bytes: 12,
    });
    assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
    story.tell(movable(4096));
    let room = Outcome::Relieved {
        detail: "3 files of 4096 bytes were moved to quarantine".to_owned(),
    };
    assert_eq!(story.carry_out(room).action, ActionKind::RelieveSpace);
    // It is done once, whatever is found later.
    story.tell(movable(0));
    story.pass(31_000);
    story.tell(movable(4096));
    assert!(story.recorded().is_none());
    assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
}

#[test]
fn who_declined_to_have_room_made_is_not_asked_again_when_more_can_be_moved() {
    let mut story = Story::new(|policy| policy.autonomy = Autonomy::Recommend);
    let movable = |bytes| Input::Relievable {
        service: "a".into(),
        bytes,
    };
    story.probes(true, 3);
    story.tell(movable(4096));
    story.tell(Input::DiskFull {
        service: "a".into(),
        free_bytes: 12,
    });
    assert_eq!(story.state(), Some(IncidentState::AwaitingApproval));
    let incident = story.incident().unwrap().id;
    story.tell(Input::Deny { incident });
    for bytes in [0, 8192] {
        story.tell(movable(bytes));
        assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
    }
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
    let busy = PressureSeen {
        uses_cpu: Some(0.9),
        runs: Some(1.8),
        crowd: Some(5.0),
        ..PressureSeen::default()
    };
    story.asked_under(busy, &[false, true, false]);
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
