//! A database server's sessions: pile-ups behind a lock, full houses, and who is left alone.

use super::*;

#[test]
fn a_pile_up_behind_an_idle_transaction_is_ended_at_its_root_and_verified_by_looks_and_probes() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    looks(&mut story, Some(pile(false, true)), 20);
    let intent = story.carry_out(relieved());
    assert_eq!(intent.action, ActionKind::TerminateBlocker);
    story.probes(true, 3);
    assert!(
        story.incident().is_some(),
        "good probes alone do not tell that the pile-up is gone"
    );
    looks(&mut story, None, 20);
    let closed = story.closed();
    assert_eq!(
        (closed.class, closed.state, closed.verdict),
        (
            FaultClass::LockPileup,
            IncidentState::Healed,
            Some(Verdict::Healed)
        )
    );
    let why = closed.why();
    for words in [
        "Restart helps: no.",
        "Taken for lock_pileup (probability 0.95): 4 sessions wait behind process 41",
        "done: 4 sessions waited behind process 41; it was ended; verified: healed",
        "expected: nobody waits for that session",
        "restart            is not on the ladder of lock_pileup",
    ] {
        assert!(why.contains(words), "{words} is missing:\n{why}");
    }
}

#[test]
fn a_running_statement_is_cancelled_first_and_its_session_ended_when_that_had_no_effect() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    looks(&mut story, Some(pile(true, true)), 20);
    assert_eq!(story.carry_out(relieved()).action, ActionKind::CancelQuery);
    looks(&mut story, Some(pile(true, true)), 20);
    story.probes(true, 3);
    story.pass(31_000);
    assert_eq!(story.carry_out(relieved()).action, ActionKind::TerminateBlocker);
    looks(&mut story, Some(pile(true, true)), 20);
    story.probes(true, 3);
    story.pass(31_000);
    let incident = story.incident().unwrap();
    assert_eq!(incident.state, IncidentState::HandedToHuman);
    assert!(
        incident
            .actions
            .iter()
            .all(|done| !done.intent.action.renews_process())
    );
    // What a person does ends it.
    looks(&mut story, None, 20);
    assert_eq!(story.closed().state, IncidentState::Recovered);
}

#[test]
fn a_root_that_may_not_be_touched_is_a_persons() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    looks(&mut story, Some(pile(false, false)), 20);
    let incident = story.incident().unwrap();
    assert_eq!(incident.state, IncidentState::HandedToHuman);
    assert!(incident.actions.is_empty());
    assert!(
        incident
            .handed_over
            .as_deref()
            .unwrap()
            .contains("may not be touched")
    );
}

#[test]
fn a_refused_client_is_no_hang_and_never_restarts_the_server() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    looks(&mut story, None, 20);
    for _ in 0..2 {
        story.tell(Input::SessionsRefused {
            service: "a".into(),
            detail: "sorry, too many clients already".into(),
        });
        story.probe(false);
    }
    let intent = story.carry_out(relieved());
    assert_eq!(intent.action, ActionKind::EndIdleSessions);
    looks(&mut story, None, 12);
    story.probes(true, 3);
    let closed = story.closed();
    assert_eq!(
        (closed.class, closed.verdict),
        (FaultClass::ConnectionExhaustion, Some(Verdict::Healed))
    );
}

#[test]
fn memory_that_came_with_more_sessions_is_no_leak_and_the_server_is_not_restarted_for_it() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    looks(&mut story, None, 50);
    looks(&mut story, None, 30);
    for _ in 0..10 {
        story.anomaly("service_memory");
    }
    let incident = story.incident().unwrap();
    assert_eq!(incident.class, FaultClass::Unknown);
    assert!(incident.actions.is_empty(), "{:?}", incident.actions);
    // When the slots run out it is their turn.
    looks(&mut story, None, 3);
    assert_eq!(story.carry_out(relieved()).action, ActionKind::EndIdleSessions);

    // Those that have gone leave a trace for a while, and no longer.
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    looks(&mut story, None, 50);
    looks(&mut story, None, 10);
    looks(&mut story, None, 50);
    story.probes(false, 1);
    for _ in 0..10 {
        story.anomaly("service_memory");
    }
    assert!(story.recorded().is_none());
    for _ in 0..15 {
        looks(&mut story, None, 50);
    }
    story.anomaly("service_memory");
    assert_eq!(
        story.recorded().map(|intent| intent.action),
        Some(ActionKind::Restart)
    );

    // With as many sessions as ever it is a leak.
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    looks(&mut story, None, 50);
    looks(&mut story, None, 47);
    for _ in 0..10 {
        story.anomaly("service_memory");
    }
    assert_eq!(
        story.recorded().map(|intent| intent.action),
        Some(ActionKind::Restart)
    );
}

#[test]
fn too_few_slots_that_nothing_frees_end_at_a_person_after_every_hand_was_tried() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    looks(&mut story, None, 1);
    for action in [ActionKind::EndIdleSessions, ActionKind::Reload] {
        let failed = Outcome::Failed {
            detail: "nobody is idle".to_owned(),
            running: true,
        };
        assert_eq!(story.carry_out(failed).action, action);
    }
    assert_eq!(story.incident().unwrap().state, IncidentState::HandedToHuman);
}

#[test]
fn a_server_that_answers_over_its_reserved_slot_is_not_restarted_for_failed_probes() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    looks(&mut story, None, 20);
    story.probes(false, 3);
    assert!(story.incident().is_none(), "it is asked first");
    looks(&mut story, None, 20);
    let incident = story.incident().unwrap();
    assert_eq!(
        (incident.class, incident.state),
        (FaultClass::Unknown, IncidentState::HandedToHuman)
    );
    // It lets nobody in any more: then it is a hang.
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    looks(&mut story, None, 20);
    story.probes(false, 3);
    story.tell(Input::SessionsUnseen {
        service: "a".into(),
        detail: "no answer".into(),
    });
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
}

#[test]
fn a_rung_that_the_policy_does_not_list_is_left_out_and_the_next_one_taken() {
    use crate::policy::file::PolicyFile;
    let text = "version = 1\n[[service]]\nname = 'a'\naction = [{ id = 'terminate_blocker', class = 'R1', autonomy = 'act-low-risk' }]\n";
    let file: PolicyFile = toml::from_str(text).unwrap();
    let mut services = BTreeMap::from([("a".to_owned(), HealPolicy::default())]);
    file.over(&mut services, NodeBudget::default()).unwrap();
    let laid = services.remove("a").unwrap();
    let mut story = Story::new(|policy| *policy = laid);
    story.probes(true, 3);
    looks(&mut story, Some(pile(true, true)), 20);
    assert_eq!(story.carry_out(relieved()).action, ActionKind::TerminateBlocker);
}

#[test]
fn processor_time_does_not_press_while_sessions_wait_behind_another_one() {
    for waits in [false, true] {
        let mut story = Story::new(|_| {});
        story.probes(true, 3);
        let seen = SessionsSeen {
            pile_up: waits.then(|| pile(true, true)),
            free: 20,
            free_min: 5,
        };
        // One look confirms no pile-up yet.
        story.tell(Input::Sessions {
            service: "a".into(),
            seen,
        });
        for _ in 0..9 {
            story.anomaly("service_cpu");
        }
        let intent = story.recorded().map(|intent| intent.action);
        assert_eq!(intent, (!waits).then_some(ActionKind::Restart));
        if waits {
            let why = story.incident().unwrap().why();
            assert!(why.contains("its sessions wait behind another one"), "{why}");
        }
    }
}

#[test]
fn who_waits_for_its_commit_is_left_to_it_until_it_holds_others_up_otherwise() {
    for (waits, class, words) in [
        (
            RootWaits::Commit,
            FaultClass::DiskSlow,
            "process 41, which waits for its commit to be on the disk",
        ),
        (
            RootWaits::Standby,
            FaultClass::Unknown,
            "process 41, which waits for a standby to have its commit too",
        ),
    ] {
        let mut story = Story::new(|_| {});
        story.probes(true, 3);
        let commits = PileUp {
            waits,
            ..pile(true, true)
        };
        looks(&mut story, Some(commits), 20);
        let incident = story.incident().unwrap();
        assert_eq!(
            (incident.class, incident.state, incident.actions.len()),
            (class, IncidentState::HandedToHuman, 0)
        );
        assert!(incident.why().contains(words), "{}", incident.why());
        // The same session, in a transaction that it leaves open.
        looks(&mut story, Some(pile(false, true)), 20);
        assert_eq!(story.carry_out(relieved()).action, ActionKind::TerminateBlocker);
    }
}

#[test]
fn who_came_to_its_commit_before_it_could_be_ended_costs_the_action_nothing_but_its_budget() {
    let spared = || Outcome::Spared {
        detail: "4 sessions waited behind process 41: it waits for the disk".into(),
    };
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    looks(&mut story, Some(pile(false, true)), 20);
    assert_eq!(story.carry_out(spared()).action, ActionKind::TerminateBlocker);
    let incident = story.incident().unwrap();
    assert_eq!(incident.actions[0].verdict, Some(Verdict::NoEffect));
    assert!(
        incident.why().contains("touched nobody: 4 sessions"),
        "{}",
        incident.why()
    );
    assert!(story.machine.export().evidence.is_empty());
    // Its commit is done, its transaction is not: the same action is still to be had. What is never done comes to an end nevertheless.
    let mut tries = 1;
    while story.incident().unwrap().state != IncidentState::HandedToHuman {
        assert!(tries < 20, "it goes on for ever");
        looks(&mut story, Some(pile(false, true)), 20);
        if story.recorded().is_some() {
            assert_eq!(story.carry_out(spared()).action, ActionKind::TerminateBlocker);
            tries += 1;
        }
        story.pass(1_000);
    }
    assert!(tries >= 2, "{}", story.incident().unwrap().why());
}

#[test]
fn a_start_is_not_judged_by_those_who_wait_for_the_disk_after_it() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    story.crash();
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Start);
    story.probes(true, 1);
    let commits = PileUp {
        waits: RootWaits::Commit,
        ..pile(true, true)
    };
    looks(&mut story, Some(commits), 20);
    let incident = story.incident().unwrap();
    assert_eq!(
        (incident.class, incident.state, incident.actions[0].verdict),
        (
            FaultClass::DiskSlow,
            IncidentState::HandedToHuman,
            Some(Verdict::Unknown)
        )
    );
    looks(&mut story, None, 20);
    story.probes(true, 3);
    assert_eq!(story.closed().state, IncidentState::Recovered);
}

#[test]
fn who_holds_the_lock_next_is_not_ended_for_it() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    looks(&mut story, Some(pile(true, true)), 20);
    let intent = story.carry_out(relieved());
    assert_eq!(
        (intent.action, intent.session),
        (ActionKind::CancelQuery, Some(pile(true, true).id()))
    );
    let next = PileUp {
        pid: 42,
        ..pile(false, true)
    };
    looks(&mut story, Some(next), 20);
    story.probes(true, 3);
    story.pass(31_000);
    let incident = story.incident().unwrap();
    assert_eq!(
        (incident.state, incident.actions.len()),
        (IncidentState::HandedToHuman, 1)
    );
    assert!(incident.handed_over.as_deref().unwrap().contains("not to blame"));
}

#[test]
fn sessions_are_left_alone_where_nobody_asked_for_it() {
    for (pile_up, free) in [(Some(pile(true, true)), 20), (None, 1)] {
        let mut story = Story::new(|policy| policy.session_actions = false);
        story.probes(true, 3);
        looks(&mut story, pile_up, free);
        let incident = story.incident().unwrap();
        assert_eq!(
            (incident.state, incident.actions.len()),
            (IncidentState::HandedToHuman, 0)
        );
        assert!(
            incident
                .handed_over
                .as_deref()
                .unwrap()
                .contains("[service.sessions]")
        );
    }
}

#[test]
fn a_full_house_that_falls_silent_is_a_hang_and_restarted() {
    let mut story = Story::new(|policy| policy.session_actions = false);
    story.probes(true, 3);
    looks(&mut story, None, 1);
    assert_eq!(story.incident().unwrap().class, FaultClass::ConnectionExhaustion);
    // As long as it refuses it lives.
    for _ in 0..4 {
        for input in [
            Input::SessionsRefused {
                service: "a".into(),
                detail: "sorry, too many clients already".into(),
            },
            Input::SessionsUnseen {
                service: "a".into(),
                detail: "no answer".into(),
            },
        ] {
            story.tell(input);
        }
        story.probe(false);
    }
    assert_eq!(story.incident().unwrap().class, FaultClass::ConnectionExhaustion);
    story.probes(false, 2);
    story.tell(Input::SessionsUnseen {
        service: "a".into(),
        detail: "no answer".into(),
    });
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
}
