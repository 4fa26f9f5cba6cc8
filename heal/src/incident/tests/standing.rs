//! Breakers, demotions and how they are lifted, and what `observe` learns.

use super::*;
use crate::breaker::{FAILURES_MAX, OPEN_FOR};
use crate::policy::RiskClass;
use crate::policy::evaluate::{Because, Ruling};

/// A service whose hook for hangs stands before the restart; incidents follow each other without waiting for budgets.
fn hooked() -> Story {
    Story::new(|policy| {
        policy.hook_for = BTreeSet::from([FaultClass::Hang]);
        policy.max_actions = 1_000;
        policy.cooldown = Duration::ZERO;
    })
}

/// One hang from its beginning: what was done, in order. The hook fails, a restart heals.
fn hang(story: &mut Story) -> Vec<ActionKind> {
    story.probes(true, 3);
    story.probes(false, 2);
    let mut done = Vec::new();
    while let Some(intent) = story.recorded() {
        done.push(intent.action);
        let outcome = if intent.action == ActionKind::Hook {
            failed(true)
        } else {
            Outcome::Done
        };
        story.carry_out(outcome);
    }
    story.probes(true, 3);
    assert!(story.incident().is_none());
    done
}

fn lift(story: &Story, by: Option<&str>) -> Input {
    Input::Reinstate {
        service: "a".into(),
        standing: story.machine.standing("a").hash(),
        by: by.map(str::to_owned),
    }
}

#[test]
fn an_executor_that_failed_three_times_is_passed_over_until_one_attempt_is_let_through() {
    let mut story = hooked();
    story.node.max_actions = 1_000;
    story.machine = IncidentMachine::new(config(&story.policy, story.node, "boot-1"));
    let both = [ActionKind::Hook, ActionKind::Restart];
    for _ in 0..FAILURES_MAX {
        assert_eq!(hang(&mut story), both);
    }
    assert_eq!(hang(&mut story), [ActionKind::Restart]);
    let why = story.closed().why();
    assert!(
        why.contains("its breaker is open after 3 failures in a row"),
        "{why}"
    );
    let refused = story.seen.iter().any(|output| {
        matches!(output, Output::Ruled(record)
            if matches!(record.ruling, Ruling::Refuse { because: Because::BreakerOpen { failures: 3, .. } }))
    });
    assert!(refused, "it is among the rulings");
    // A restart of the node, and a new boot, do not close it.
    story.restart("boot-1");
    assert_eq!(hang(&mut story), [ActionKind::Restart]);
    story.pass(u64::try_from(OPEN_FOR.as_millis()).unwrap() - 10_000);
    story.restart("boot-2");
    assert_eq!(hang(&mut story), [ActionKind::Restart]);
    // Half open: one attempt, which fails.
    story.pass(u64::try_from(OPEN_FOR.as_millis()).unwrap());
    assert_eq!(hang(&mut story), both);
    assert_eq!(hang(&mut story), [ActionKind::Restart]);
    // Somebody mended it.
    story.tell(lift(&story, None));
    assert!(story.machine.standing("a").is_empty());
    assert_eq!(hang(&mut story), both);
}

#[test]
fn an_incident_for_which_only_a_broken_executor_is_left_waits_for_the_breaker() {
    let mut story = Story::new(|policy| {
        policy.max_actions = 1_000;
        policy.cooldown = Duration::ZERO;
        policy.start_attempts = 5;
    });
    story.probes(true, 3);
    story.crash();
    for _ in 0..FAILURES_MAX {
        story.carry_out(failed(false));
    }
    assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
    assert!(
        story
            .incident()
            .unwrap()
            .handed_over
            .as_ref()
            .unwrap()
            .contains("breaker")
    );
    // A person's approval does not close it.
    let id = story.incident().unwrap().id;
    story.tell(approve(id, None, None));
    assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
    story.pass(u64::try_from(OPEN_FOR.as_millis()).unwrap() - 1_000);
    assert!(story.recorded().is_none());
    story.pass(1_000);
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Start);
    story.probes(true, 3);
    assert_eq!(story.closed().verdict, Some(Verdict::Healed));
    assert!(story.machine.breakers.all().is_empty());
}

#[test]
fn an_executor_that_does_not_report_in_time_counts_as_failed_once() {
    let mut story = hooked();
    story.probes(true, 3);
    story.probes(false, 2);
    let intent = story.recorded().unwrap();
    story.tell(Input::IntentDurable { id: intent.id });
    story.pass(121_000);
    assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
    story.tell(Input::Executed {
        id: intent.id,
        outcome: failed(true),
    });
    let failures: Vec<u32> = story
        .machine
        .breakers
        .all()
        .iter()
        .map(|of| of.failures)
        .collect();
    assert_eq!(failures, [1]);
}

#[test]
fn harm_by_a_restart_leaves_what_touches_one_session_to_the_node() {
    let mut story = Story::new(|policy| policy.cooldown = Duration::ZERO);
    story.probes(true, 5);
    for _ in 0..3 {
        story.anomaly("service_cpu");
    }
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
    story.probes(false, 5);
    story.pass(31_000);
    let standing = story.machine.standing("a");
    let classes: Vec<RiskClass> = standing.demotions.iter().map(|of| of.class).collect();
    assert_eq!(classes, [RiskClass::R2]);
    story.cleared();
    story.probes(true, 3);
    looks(&mut story, Some(pile(true, true)), 20);
    assert_eq!(story.recorded().unwrap().action, ActionKind::CancelQuery);
    story.carry_out(relieved());
    looks(&mut story, None, 20);
    story.probes(true, 3);
    story.crash();
    assert_eq!(story.state(), Some(IncidentState::AwaitingApproval));
}

#[test]
fn a_demotion_is_lifted_by_as_many_signatures_as_it_takes_over_exactly_it() {
    let mut story = Story::new(|policy| policy.cooldown = Duration::ZERO);
    story.machine = IncidentMachine::new(config(&story.policy, story.node, "boot-1"))
        .named("site-a")
        .reinstated_by(2);
    story.probes(true, 5);
    for _ in 0..3 {
        story.anomaly("service_cpu");
    }
    story.carry_out(Outcome::Done);
    story.probes(false, 5);
    story.pass(31_000);
    assert!(
        story
            .machine
            .standing("a")
            .text()
            .starts_with("reinstate\nnode site-a\nservice a\ndemoted R2 at ")
    );
    let lifted = |outputs: &[Output]| {
        outputs
            .iter()
            .any(|output| matches!(output, Output::Reinstated(_)))
    };
    for by in [None, Some("ann"), Some("ann")] {
        let outputs = story.tell(lift(&story, by));
        assert!(!lifted(&outputs), "{by:?}");
    }
    let outputs = story.tell(lift(&story, Some("bob")));
    assert!(lifted(&outputs) && story.machine.standing("a").is_empty());
    assert!(
        story.machine.export().evidence.is_empty(),
        "what harmed proves itself anew"
    );
}

#[test]
fn a_plan_names_its_node_and_one_of_an_earlier_build_keeps_its_text() {
    let mut story = Story::new(|policy| policy.autonomy = Autonomy::Recommend);
    story.machine = IncidentMachine::new(config(&story.policy, story.node, "boot-1")).named("site-a");
    story.probes(true, 3);
    story.crash();
    let plan = story.incident().unwrap().plan.clone().unwrap();
    assert!(
        plan.text().starts_with("node site-a\nincident 1\n"),
        "{}",
        plan.text()
    );
    let mut written = serde_json::to_value(&plan).unwrap();
    written.as_object_mut().unwrap().remove("node");
    let old: Plan = serde_json::from_value(written).unwrap();
    assert!(old.text().starts_with("incident 1\nservice a\n") && old.hash() != plan.hash());
}

#[test]
fn observing_learns_from_trouble_that_ends_without_it_and_from_what_others_did() {
    let observe = |policy: &mut HealPolicy| policy.autonomy = Autonomy::Observe;
    let counts = |story: &Story| {
        let evidence = story.machine.export().evidence;
        evidence
            .first()
            .map(|of| (of.action, of.counts.right, of.counts.wrong))
    };
    // A hang that ended by itself needed no restart.
    let mut story = Story::new(observe);
    story.probes(true, 3);
    story.probes(false, 2);
    story.probes(true, 3);
    assert_eq!(counts(&story), Some((ActionKind::Restart, 0, 1)));
    // A crash after which somebody else started it, and it served.
    let mut story = Story::new(observe);
    story.probes(true, 3);
    story.crash();
    story.restart("boot-1");
    story.tell(Input::Started {
        service: "a".into(),
        pid: 9,
    });
    assert_eq!(counts(&story), None, "not before it serves");
    story.probes(true, 3);
    assert_eq!(counts(&story), Some((ActionKind::Start, 1, 0)));
    // Who ended the pile-up is not known.
    let mut story = Story::new(observe);
    story.probes(true, 3);
    looks(&mut story, Some(pile(true, true)), 20);
    looks(&mut story, None, 20);
    story.probes(true, 3);
    assert!(story.incident().is_none() && counts(&story).is_none());
    assert!(
        !story
            .seen
            .iter()
            .any(|output| matches!(output, Output::RecordIntent(_)))
    );
}

#[test]
fn evidence_of_another_program_says_nothing_of_the_one_that_is_configured_now() {
    let mut story = hooked();
    story
        .policy
        .target_digests
        .insert(ActionKind::Hook, "one".to_owned());
    story.machine = IncidentMachine::new(config(&story.policy, story.node, "boot-1"));
    hang(&mut story);
    let kept = |story: &Story| {
        let evidence = story.machine.export().evidence;
        evidence.iter().map(|of| of.action).collect::<Vec<_>>()
    };
    assert_eq!(kept(&story), [ActionKind::Hook, ActionKind::Restart]);
    story.restart("boot-1");
    assert_eq!(kept(&story), [ActionKind::Hook, ActionKind::Restart]);
    story
        .policy
        .target_digests
        .insert(ActionKind::Hook, "other".to_owned());
    story.restart("boot-1");
    assert_eq!(kept(&story), [ActionKind::Restart]);
}

#[test]
fn words_for_a_breaker_that_closed_count_no_more_when_it_opens_again() {
    let mut story = hooked();
    story.node.max_actions = 1_000;
    story.machine = IncidentMachine::new(config(&story.policy, story.node, "boot-1")).reinstated_by(2);
    for _ in 0..FAILURES_MAX {
        hang(&mut story);
    }
    let former = lift(&story, Some("ann"));
    story.tell(former.clone());
    // While attempts fail it is the same text: two people can sign it.
    let text = story.machine.standing("a").text();
    story.pass(u64::try_from(OPEN_FOR.as_millis()).unwrap());
    hang(&mut story);
    assert_eq!(story.machine.standing("a").text(), text);
    // An attempt succeeds, and later it fails three times again.
    story.pass(u64::try_from(OPEN_FOR.as_millis()).unwrap());
    story.probes(true, 3);
    story.probes(false, 2);
    assert_eq!(story.carry_out(relieved()).action, ActionKind::Hook);
    story.probes(true, 3);
    assert!(story.machine.standing("a").is_empty());
    for _ in 0..FAILURES_MAX {
        hang(&mut story);
    }
    assert!(!story.machine.standing("a").is_empty());
    story.tell(former);
    story.tell(lift(&story, Some("bob")));
    assert!(
        !story.machine.standing("a").is_empty(),
        "one has signed this, not two"
    );
    story.tell(lift(&story, Some("ann")));
    assert!(story.machine.standing("a").is_empty());
}

#[test]
fn an_incident_that_waits_for_a_breaker_is_tried_again_also_after_a_restart_of_the_node() {
    for lifted in [false, true] {
        let mut story = Story::new(|policy| {
            policy.max_actions = 1_000;
            policy.cooldown = Duration::ZERO;
            policy.start_attempts = 5;
        });
        story.probes(true, 3);
        story.crash();
        for _ in 0..FAILURES_MAX {
            story.carry_out(failed(false));
        }
        story.restart("boot-1");
        story.crash();
        assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
        assert!(story.recorded().is_none());
        if lifted {
            story.tell(lift(&story, None));
        } else {
            story.pass(u64::try_from(OPEN_FOR.as_millis()).unwrap());
        }
        assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Start);
    }
}

#[test]
fn breakers_of_services_that_are_no_more_are_forgotten() {
    let mut story = hooked();
    hang(&mut story);
    let mut state = story.machine.export();
    assert_eq!(state.breakers.len(), 1);
    state.breakers[0].service = "gone".to_owned();
    let config = config(&story.policy, story.node, "boot-1");
    let machine = IncidentMachine::restore(config, state, story.now());
    assert!(machine.export().breakers.is_empty());
}

#[test]
fn an_executor_that_found_nothing_left_to_touch_has_not_failed() {
    let mut story = hooked();
    story.node.max_actions = 1_000;
    story.machine = IncidentMachine::new(config(&story.policy, story.node, "boot-1"));
    for _ in 0..=FAILURES_MAX {
        story.probes(true, 3);
        story.probes(false, 2);
        let detail = "it was gone".to_owned();
        assert_eq!(
            story.carry_out(Outcome::Fruitless { detail }).action,
            ActionKind::Hook
        );
        story.carry_out(Outcome::Done);
        story.probes(true, 3);
    }
    assert!(story.machine.export().breakers.is_empty());
    let evidence = story.machine.export().evidence;
    let of = evidence.iter().find(|of| of.action == ActionKind::Hook).unwrap();
    assert_eq!((of.counts.right, of.counts.wrong), (0, FAILURES_MAX + 1));
}

#[test]
fn a_word_that_names_no_plan_is_for_nothing_of_r3_or_above() {
    let mut story = Story::new(|policy| policy.restore_autonomy = Autonomy::Recommend);
    story.probes(true, 3);
    story.crash();
    story.carry_out(corrupt(false));
    assert_eq!(story.state(), Some(IncidentState::AwaitingApproval));
    let incident = story.incident().unwrap().id;
    story.tell(Input::Deny { incident });
    assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
    // Whoever says "again" has not been shown what that would be.
    story.tell(approve(incident, None, None));
    assert!(story.recorded().is_none());
    let open = story.incident().unwrap();
    let planned = open.plan.as_ref().map(|plan| plan.action);
    assert_eq!(
        (open.state, planned),
        (IncidentState::AwaitingApproval, Some(ActionKind::RestoreAndStart))
    );
    story.approve();
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::RestoreAndStart);
}
