//! Nothing is done that is not written down: intents, what carries them out, and a node that ends in between.

use super::*;

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
fn what_was_down_is_decided_after_a_restart_of_the_node_and_is_down_no_more_when_it_was_started() {
    let mut story = Story::new(|policy| policy.autonomy = Autonomy::Recommend);
    story.probes(true, 3);
    story.crash();
    let incident = story.incident().unwrap().id;
    story.tell(Input::Deny { incident });
    assert!(story.machine.export().down.contains("a"));
    story.restart("boot-1");
    assert!(!story.machine.may_begin("a"));
    // Also when the node ends before anybody has looked.
    story.restart("boot-1");
    assert!(!story.machine.may_begin("a"));
    story.crash();
    story.tell(approve(incident, None, None));
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Start);
    story.probes(true, 3);
    assert_eq!(story.closed().verdict, Some(Verdict::Healed));
    assert!(story.machine.export().down.is_empty());
}

#[test]
fn where_nothing_may_be_started_a_restart_of_the_node_starts_what_is_down() {
    let mut story = Story::new(|policy| policy.autonomy = Autonomy::Observe);
    story.probes(true, 3);
    story.crash();
    story.restart("boot-1");
    assert!(story.machine.may_begin("a"));
    let mut story = under("", "{ id = 'cancel_query', class = 'R1', autonomy = 'act' }");
    story.probes(true, 3);
    story.crash();
    story.restart("boot-1");
    assert!(story.machine.may_begin("a"));
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
