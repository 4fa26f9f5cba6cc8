//! What the fleet holds back, for how long, and what ends that.

use super::*;
use crate::policy::fleet::{FleetBudget, FleetSeen, RECORD_TIMEOUT, slot_needed};
use crate::policy::{ActionRule, RiskClass};

const SICK: FleetSeen = FleetSeen {
    nodes: 20,
    unhealthy: 9,
    acting: 0,
};
const WELL: FleetSeen = FleetSeen {
    nodes: 20,
    unhealthy: 1,
    acting: 0,
};

fn in_a_fleet(shared: bool) -> Story {
    Story::new(|policy| {
        policy.fleet = Some(FleetBudget::default());
        let rule = |action| ActionRule {
            shared: shared && action == ActionKind::Restart,
            ..ActionRule::example(RiskClass::of(action))
        };
        policy.rules = Some(
            ActionKind::ALL
                .into_iter()
                .map(|action| (action, rule(action)))
                .collect(),
        );
    })
}

/// A hang while the fleet is so, told anew every 5 s for so many seconds.
fn hang(story: &mut Story, seen: FleetSeen, seconds: u64) {
    story.probes(true, 3);
    story.tell(Input::Fleet(seen));
    story.probes(false, 2);
    for _ in 0..seconds / 5 {
        story.pass(5_000);
        story.tell(Input::Fleet(seen));
    }
}

/// What is asked for: what is needed, and the way.
fn wanted(story: &Story) -> Duration {
    slot_needed(&story.policy) + Duration::from_secs(5)
}

fn lend(story: &mut Story, seconds: u64) {
    let until = story.now().monotonic + Duration::from_secs(seconds);
    story.tell(Input::Slot { until });
}

#[test]
fn a_hang_is_held_while_the_fleet_is_sick_says_so_and_is_mended_when_it_is_well() {
    let mut story = in_a_fleet(false);
    hang(&mut story, SICK, 60);
    assert_eq!(story.state(), Some(IncidentState::Held));
    let words = "held by the fleet: 45 % of 20 nodes are unhealthy";
    let why = story.incident().unwrap().why();
    assert!(why.contains(&format!("hang of a, {words}.")), "{why}");
    assert_eq!(story.incident().unwrap().held(), Some(words));
    assert!(story.recorded().is_none());
    story.tell(Input::Fleet(WELL));
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
    story.probes(true, 3);
    assert_eq!(story.closed().verdict, Some(Verdict::Healed));
}

#[test]
fn a_fleet_that_falls_silent_holds_for_the_age_of_a_report_and_no_longer() {
    let mut story = in_a_fleet(false);
    hang(&mut story, SICK, 0);
    story.pass(29_000);
    assert_eq!(story.state(), Some(IncidentState::Held));
    story.pass(2_000);
    assert!(
        story.recorded().is_some(),
        "an aggregator that is gone still holds"
    );
}

#[test]
fn an_empty_or_impossible_report_is_counted_and_the_one_before_it_holds_until_it_is_old() {
    let mut story = in_a_fleet(false);
    hang(&mut story, SICK, 0);
    // The first is what an aggregator says that has just started.
    for (nodes, unhealthy, acting) in [(0, 0, 0), (3, u32::MAX, 0), (3, 0, 4)] {
        story.tell(Input::Fleet(FleetSeen {
            nodes,
            unhealthy,
            acting,
        }));
    }
    story.pass(28_000);
    assert_eq!(
        (story.state(), story.machine.ignored_inputs()),
        (Some(IncidentState::Held), 3)
    );
    story.pass(3_000);
    assert!(story.recorded().is_some(), "held by a report that is old");
}

#[test]
fn a_hostile_aggregator_holds_for_ten_minutes_then_a_person_is_asked_and_decides() {
    let mut story = in_a_fleet(false);
    hang(&mut story, SICK, 595);
    assert_eq!(story.state(), Some(IncidentState::Held));
    let told = |story: &Story| {
        let notices = story.seen.iter().filter_map(|output| match output {
            Output::Notify(notice) => Some(notice.words.clone()),
            _ => None,
        });
        notices.collect::<Vec<_>>()
    };
    assert!(told(&story).is_empty());
    for _ in 0..4 {
        story.pass(5_000);
        story.tell(Input::Fleet(SICK));
    }
    assert_eq!(story.state(), Some(IncidentState::AwaitingApproval));
    let words = told(&story);
    assert!(
        words.len() == 1 && words[0].contains("held by the fleet: 45 %"),
        "{words:?}"
    );
    story.approve();
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
}

#[test]
fn what_a_person_was_asked_for_is_done_by_itself_once_the_fleet_is_well_or_silent() {
    for silent in [false, true] {
        let mut story = in_a_fleet(false);
        hang(&mut story, SICK, 610);
        assert_eq!(story.state(), Some(IncidentState::AwaitingApproval));
        if silent {
            story.pass(31_000);
        } else {
            story.tell(Input::Fleet(WELL));
        }
        assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
    }
}

#[test]
fn what_a_person_declined_stays_theirs_when_the_fleet_is_well() {
    let mut story = in_a_fleet(false);
    hang(&mut story, SICK, 610);
    let incident = story.incident().unwrap().id;
    story.tell(Input::Deny { incident });
    story.tell(Input::Fleet(WELL));
    story.pass(60_000);
    assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
}

#[test]
fn a_fleet_that_flaps_holds_back_nothing_that_a_single_good_report_lets_go() {
    let mut story = in_a_fleet(false);
    hang(&mut story, SICK, 0);
    story.tell(Input::Fleet(WELL));
    story.tell(Input::Fleet(SICK));
    let budget = story.machine.export().charges.len();
    assert_eq!(
        (story.carry_out(Outcome::Done).action, budget),
        (ActionKind::Restart, 1)
    );
}

#[test]
fn what_is_dead_is_started_however_sick_the_fleet_is() {
    let mut story = in_a_fleet(false);
    story.probes(true, 3);
    story.tell(Input::Fleet(SICK));
    story.crash();
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Start);
}

#[test]
fn a_shared_action_waits_for_a_slot_that_outlasts_it_and_gives_it_back_after_verification() {
    let mut story = in_a_fleet(true);
    let (needed, wanted) = (slot_needed(&story.policy), wanted(&story));
    assert_eq!(story.machine.slot_wanted(), None);
    hang(&mut story, WELL, 10);
    assert_eq!(
        (story.state(), story.machine.slot_wanted()),
        (Some(IncidentState::Held), Some(wanted))
    );
    lend(&mut story, needed.as_secs() - 1);
    assert!(story.recorded().is_none(), "begun with a slot that is too short");
    lend(&mut story, needed.as_secs() + 1);
    story.carry_out(Outcome::Done);
    assert_eq!(story.machine.slot_wanted(), Some(Duration::ZERO));
    story.probes(true, 3);
    assert_eq!((story.state(), story.machine.slot_wanted()), (None, None));
    // The next one needs another.
    story.pass(20_000);
    hang(&mut story, WELL, 0);
    assert_eq!(story.machine.slot_wanted(), Some(wanted));
}

#[test]
fn a_host_that_slept_over_its_slot_does_not_begin_and_pays_nothing() {
    let mut story = in_a_fleet(true);
    hang(&mut story, WELL, 0);
    let lasts = slot_needed(&story.policy).as_secs() + 10;
    lend(&mut story, lasts);
    let id = story.recorded().unwrap().id;
    story.ms += 50_000;
    let outputs = story.tell(Input::IntentDurable { id });
    assert!(
        !outputs.iter().any(|output| matches!(output, Output::Execute(_))),
        "{outputs:?}"
    );
    assert_eq!(
        (story.state(), story.machine.export().charges.len()),
        (Some(IncidentState::Held), 0)
    );
    assert_eq!(story.machine.slot_wanted(), Some(wanted(&story)));
}

/// The slot lasts when it is decided, never when the intent is durable; a slow disk, or somebody who lends slots so that it comes to that.
#[test]
fn a_slot_that_never_outlasts_the_record_ends_after_the_longest_hold_with_a_person_and_adds_nothing() {
    let mut story = in_a_fleet(true);
    hang(&mut story, WELL, 0);
    let (begun, lasts) = (story.ms, slot_needed(&story.policy).as_secs());
    let mut turns = 0;
    while story.state() == Some(IncidentState::Held) {
        turns += 1;
        assert!(turns < 20, "held for {} ms", story.ms - begun);
        lend(&mut story, lasts);
        let id = story.recorded().unwrap().id;
        story.ms += 40_000;
        let outputs = story.tell(Input::IntentDurable { id });
        assert!(!outputs.iter().any(|output| matches!(output, Output::Execute(_))));
    }
    assert_eq!(story.state(), Some(IncidentState::AwaitingApproval));
    let charges = story.machine.export().charges.len();
    assert_eq!((story.incident().unwrap().actions.len(), charges), (1, 0));
    let notes = &story.incident().unwrap().evidence;
    let told = notes
        .iter()
        .filter(|note| note.words.contains("called off"))
        .count();
    assert_eq!(told, 1);
    // Asked after the longest wait, their word is enough.
    story.approve();
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
}

#[test]
fn a_slot_that_ends_a_moment_after_the_action_is_not_enough_to_decide_it() {
    let mut story = in_a_fleet(true);
    hang(&mut story, WELL, 0);
    let timeout = story.policy.action_timeout;
    for more_ms in [0, 3, 5_000, 29_999] {
        let until = story.now().monotonic + timeout + Duration::from_millis(more_ms);
        story.tell(Input::Slot { until });
        assert!(
            story.recorded().is_none(),
            "decided with {more_ms} ms to record it"
        );
    }
    let until = story.now().monotonic + timeout + RECORD_TIMEOUT;
    story.tell(Input::Slot { until });
    assert!(story.recorded().is_some());
}

#[test]
fn hands_that_outlast_their_time_keep_the_slot_and_count_as_acting_until_they_report() {
    let mut story = in_a_fleet(true);
    hang(&mut story, WELL, 0);
    lend(&mut story, 3_600);
    let id = story.recorded().unwrap().id;
    story.tell(Input::IntentDurable { id });
    let timeout = story.policy.action_timeout;
    story.pass(u64::try_from(timeout.as_millis()).unwrap() + 1_000);
    assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
    let counts = |story: &Story| (story.machine.slot_wanted(), story.machine.health().acting);
    assert_eq!(counts(&story), (Some(Duration::ZERO), 1));
    let outcome = Outcome::Done;
    story.tell(Input::Executed { id, outcome });
    story.probes(true, 3);
    assert_eq!((story.state(), counts(&story)), (None, (None, 0)));
}

#[test]
fn an_effect_begins_while_its_action_has_time_and_its_slot_outlasts_it_or_not_at_all() {
    let mut story = in_a_fleet(true);
    hang(&mut story, WELL, 0);
    let timeout = story.policy.action_timeout;
    lend(&mut story, timeout.as_secs() + 40);
    let id = story.recorded().unwrap().id;
    assert_eq!(story.machine.begin_by(id), None, "not durable yet");
    let begun = story.now().monotonic;
    story.tell(Input::IntentDurable { id });
    assert_eq!(story.machine.begin_by(id), Some(begun + Duration::from_secs(40)));
    story.pass(u64::try_from(timeout.as_millis()).unwrap() + 1_000);
    assert_eq!(story.machine.begin_by(id), None, "a person was told");
    // Without a slot there is only the time of the action.
    let mut story = in_a_fleet(false);
    hang(&mut story, WELL, 0);
    let id = story.recorded().unwrap().id;
    let begun = story.now().monotonic;
    story.tell(Input::IntentDurable { id });
    assert_eq!(story.machine.begin_by(id), Some(begun + timeout));
}

#[test]
fn without_a_slot_a_person_is_asked_and_their_word_after_the_wait_is_enough() {
    let mut story = in_a_fleet(true);
    hang(&mut story, WELL, 590);
    assert_eq!(story.state(), Some(IncidentState::Held));
    story.pass(20_000);
    assert_eq!(story.state(), Some(IncidentState::AwaitingApproval));
    story.approve();
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
}

#[test]
fn an_approval_from_before_the_wait_is_no_slot() {
    let mut story = in_a_fleet(true);
    story
        .policy
        .rules
        .as_mut()
        .unwrap()
        .get_mut(&ActionKind::Restart)
        .unwrap()
        .autonomy = Autonomy::Recommend;
    story.machine = IncidentMachine::new(config(&story.policy, story.node, "boot-1"));
    hang(&mut story, WELL, 0);
    assert_eq!(story.state(), Some(IncidentState::AwaitingApproval));
    story.approve();
    assert_eq!(story.state(), Some(IncidentState::Held));
    story.pass(605_000);
    assert!(story.recorded().is_none());
    assert_eq!(story.state(), Some(IncidentState::AwaitingApproval));
    story.approve();
    assert!(story.recorded().is_some());
}

#[test]
fn a_slot_that_nobody_wants_is_not_kept() {
    let mut story = in_a_fleet(true);
    lend(&mut story, 3_600);
    hang(&mut story, WELL, 0);
    assert_eq!(story.state(), Some(IncidentState::Held));
}

#[test]
fn health_counts_services_that_press_and_those_that_are_acted_on() {
    let mut story = in_a_fleet(false);
    assert_eq!(story.machine.health(), Health::default());
    hang(&mut story, WELL, 0);
    let counts = |story: &Story| (story.machine.health().unhealthy, story.machine.health().acting);
    assert_eq!(counts(&story), (1, 1));
    story.carry_out(Outcome::Done);
    story.probes(true, 3);
    assert_eq!(counts(&story), (0, 0));
    let mut alone = Story::new(|_| {});
    alone.probes(true, 3);
    alone.probes(false, 2);
    assert_eq!(
        alone.machine.health(),
        Health::default(),
        "told without budgets of the fleet"
    );
}

#[test]
fn a_held_incident_is_decided_anew_after_a_restart_of_the_node() {
    let mut story = in_a_fleet(false);
    hang(&mut story, SICK, 10);
    story.restart("boot-1");
    story.probes(true, 1);
    story.probes(false, 2);
    assert!(story.recorded().is_some(), "nothing was heard in this life");
}

#[test]
fn without_budgets_of_the_fleet_its_words_change_nothing() {
    let mut story = Story::new(|_| {});
    hang(&mut story, SICK, 0);
    assert!(story.recorded().is_some());
    let ruled = story.seen.iter().find_map(|output| match output {
        Output::Ruled(record) => Some(serde_json::to_string(&record.facts).unwrap()),
        _ => None,
    });
    assert!(!ruled.unwrap().contains("fleet"));
}
