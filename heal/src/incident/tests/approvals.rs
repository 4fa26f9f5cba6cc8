//! Plans that people approve, evidence that is asked for, and what costs an action its leave.

use super::*;

const TWO: &str = "{ id = 'start', class = 'R2', autonomy = 'act', approvals = { need = 2, ttl = '10m' } }";

#[test]
fn two_different_people_sign_one_plan_and_the_same_one_twice_is_one() {
    let mut story = under("", TWO);
    story.crash();
    let incident = story.incident().unwrap();
    let (id, plan) = (incident.id, incident.plan.as_ref().unwrap().hash());
    for by in [None, Some("ann"), Some("ann")] {
        story.tell(approve(id, Some(&plan), by));
        assert_eq!(story.state(), Some(IncidentState::AwaitingApproval), "{by:?}");
    }
    story.tell(approve(id, Some(&plan), Some("bob")));
    let incident = story.incident().unwrap();
    assert_eq!(
        incident.approved_by,
        BTreeSet::from(["ann".to_owned(), "bob".to_owned()])
    );
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Start);
}

#[test]
fn an_approval_of_another_or_an_expired_plan_is_refused() {
    let mut story = under("", TWO);
    story.crash();
    let incident = story.incident().unwrap();
    let (id, old) = (incident.id, incident.plan.as_ref().unwrap().clone());
    story.tell(approve(id, Some("another"), Some("ann")));
    assert!(story.incident().unwrap().approved_by.is_empty());
    story.tell(approve(id, Some(&old.hash()), Some("ann")));
    // Its time is over: what was signed counts no more, also not together with a fresh one.
    story.pass(600_000);
    let incident = story.incident().unwrap();
    let new = incident.plan.as_ref().unwrap().clone();
    assert!(incident.approved_by.is_empty() && new.hash() != old.hash());
    story.tell(approve(id, Some(&old.hash()), Some("bob")));
    story.tell(approve(id, Some(&new.hash()), Some("bob")));
    assert_eq!(story.state(), Some(IncidentState::AwaitingApproval));
    story.tell(approve(id, Some(&new.hash()), Some("ann")));
    story.carry_out(Outcome::Done);
}

#[test]
fn a_changed_diagnosis_is_another_plan() {
    let mut story = Story::new(|policy| policy.autonomy = Autonomy::Recommend);
    story.probes(true, 3);
    story.probes(false, 2);
    let incident = story.incident().unwrap();
    let (id, plan) = (incident.id, incident.plan.as_ref().unwrap().hash());
    story.crash();
    story.tell(approve(id, Some(&plan), None));
    assert_eq!(
        story.state(),
        Some(IncidentState::AwaitingApproval),
        "a restart was approved, no start"
    );
    story.approve();
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Start);
}

#[test]
fn where_evidence_is_required_an_action_is_recommended_until_it_suffices() {
    let start = "{ id = 'start', class = 'R2', autonomy = 'act', max = '1000/1h' }";
    let mut story = under("autonomy = { require_evidence = true }\n", start);
    for round in 0..31 {
        story.pass(3_700_000);
        story.probes(true, 3);
        story.crash();
        let asks = story.state() == Some(IncidentState::AwaitingApproval);
        assert_eq!(asks, round < 30, "round {round}");
        if asks {
            story.approve();
        }
        story.carry_out(Outcome::Done);
        story.probes(true, 3);
        assert_eq!(story.closed().verdict, Some(Verdict::Healed));
    }
    // One harm and it is recommended again, for good.
    let counts = &mut story.machine.evidence[0].counts;
    assert_eq!((counts.right, counts.wrong, counts.harm), (31, 0, 0));
    counts.harm = 1;
    story.pass(3_700_000);
    story.probes(true, 3);
    story.crash();
    assert_eq!(story.state(), Some(IncidentState::AwaitingApproval));
    // What goes away while it waits was not needed, and that counts against it.
    story.tell(Input::Started {
        service: "a".into(),
        pid: 9,
    });
    story.probes(true, 3);
    assert_eq!(story.machine.evidence[0].counts.wrong, 1);
}

#[test]
fn harm_by_one_session_demotes_at_the_second_and_by_a_restart_at_the_first() {
    let mut story = Story::new(|_| {});
    for demoted in [false, true] {
        story.pass(3_700_000);
        story.probes(true, 3);
        looks(&mut story, Some(pile(false, true)), 20);
        story.carry_out(relieved());
        story.probes(false, 3);
        story.pass(31_000);
        assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
        assert_eq!(!story.machine.demoted.is_empty(), demoted);
        looks(&mut story, None, 20);
        story.probes(true, 3);
    }
}

#[test]
fn harm_by_what_works_at_once_is_found_after_seconds_and_by_a_hook_at_the_end_of_its_window() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    looks(&mut story, Some(pile(false, true)), 20);
    story.carry_out(relieved());
    story.probes(false, 6);
    story.pass(4_000);
    story.probes(false, 1);
    assert_eq!(story.state(), Some(IncidentState::Verifying));
    story.pass(1_000);
    story.probes(false, 1);
    let incident = story.incident().unwrap();
    assert_eq!(
        (incident.state, incident.verdict),
        (IncidentState::HandedToHuman, Some(Verdict::Harm))
    );
    // What people configured may take its time.
    let mut story = Story::new(|policy| policy.hook_for = BTreeSet::from([FaultClass::LockPileup]));
    story.probes(true, 3);
    looks(&mut story, Some(pile(false, true)), 20);
    assert_eq!(story.carry_out(relieved()).action, ActionKind::Hook);
    story.probes(false, 6);
    story.pass(10_000);
    story.probes(false, 6);
    assert_eq!(story.state(), Some(IncidentState::Verifying));
}

#[test]
fn an_approval_is_of_the_action_and_the_session_that_were_planned() {
    let mut story = Story::new(|policy| policy.autonomy = Autonomy::Recommend);
    story.probes(true, 3);
    looks(&mut story, Some(pile(true, true)), 20);
    let incident = story.incident().unwrap();
    let (id, plan) = (incident.id, incident.plan.clone().unwrap());
    assert_eq!(plan.action, ActionKind::CancelQuery);
    assert!(plan.text().contains("\nsession 41 "), "{}", plan.text());
    // Its statement ends, and it stays in its transaction: of the same class, and another action.
    looks(&mut story, Some(pile(false, true)), 20);
    story.tell(approve(id, Some(&plan.hash()), None));
    assert!(story.recorded().is_none());
    let next = story.incident().unwrap().plan.clone().unwrap();
    assert_eq!(story.state(), Some(IncidentState::AwaitingApproval));
    assert_eq!(next.action, ActionKind::TerminateBlocker);
    // Another session holds the lock now.
    let other = PileUp {
        birth: 2,
        ..pile(false, true)
    };
    looks(&mut story, Some(other), 20);
    story.tell(approve(id, Some(&next.hash()), None));
    assert!(story.recorded().is_none());
    assert_eq!(story.state(), Some(IncidentState::AwaitingApproval));
    story.approve();
    let intent = story.carry_out(relieved());
    assert_eq!(
        (intent.action, intent.session),
        (ActionKind::TerminateBlocker, Some(other.id()))
    );
}

#[test]
fn an_approved_action_that_cools_down_is_not_exchanged_for_another() {
    let mut story = Story::new(|policy| {
        policy.autonomy = Autonomy::Recommend;
        policy.cooldown = Duration::from_mins(2);
    });
    story.probes(true, 3);
    looks(&mut story, Some(pile(true, true)), 20);
    story.approve();
    story.carry_out(relieved());
    looks(&mut story, None, 20);
    story.probes(true, 3);
    story.closed();
    looks(&mut story, Some(pile(true, true)), 20);
    story.approve();
    assert_eq!(story.state(), Some(IncidentState::CoolingDown));
    looks(&mut story, Some(pile(false, true)), 20);
    story.pass(121_000);
    assert!(story.recorded().is_none());
    assert_eq!(story.state(), Some(IncidentState::AwaitingApproval));
}

#[test]
fn signatures_of_an_earlier_plan_do_not_count_for_an_incident_that_a_person_has() {
    let restart = "{ id = 'restart', class = 'R2', autonomy = 'act', approvals = { need = 2, ttl = '10m' } }";
    let mut story = under("", &format!("{TWO}, {restart}"));
    story.probes(true, 3);
    for _ in 0..60 {
        story.anomaly("service_memory");
        story.pass(1_000);
    }
    let incident = story.incident().unwrap();
    let (id, plan) = (incident.id, incident.plan.as_ref().unwrap().hash());
    for by in ["ann", "bob"] {
        story.tell(approve(id, Some(&plan), Some(by)));
    }
    assert_eq!(story.carry_out(failed(false)).action, ActionKind::Restart);
    let incident = story.incident().unwrap();
    assert_eq!(
        (incident.state, incident.approved_by.len()),
        (IncidentState::HandedToHuman, 2),
        "it did harm, and who had approved it stays on record"
    );
    story.tell(approve(id, None, None));
    let incident = story.incident().unwrap();
    assert!(story.recorded().is_none(), "nobody has signed a start");
    assert_eq!(
        (incident.state, incident.approved_by.len()),
        (IncidentState::AwaitingApproval, 0)
    );
    assert_eq!(incident.plan.as_ref().unwrap().action, ActionKind::Start);
}

#[test]
fn a_plan_that_has_expired_is_not_carried_out_before_the_timeout_was_handled() {
    let mut story = Story::new(|policy| policy.autonomy = Autonomy::Recommend);
    story.crash();
    let incident = story.incident().unwrap();
    let (id, plan) = (incident.id, incident.plan.as_ref().unwrap().hash());
    // The host slept: the approval is read first.
    story.ms += 900_000;
    story.tell(approve(id, Some(&plan), None));
    assert!(story.recorded().is_none());
    assert_eq!(story.state(), Some(IncidentState::AwaitingApproval));
    story.approve();
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Start);
}
