//! How often, how soon again, and when no more.

use super::*;

#[test]
fn trouble_that_returns_after_two_healing_restarts_is_handed_over_also_after_a_restart_of_the_node() {
    let mut story = Story::new(|_| {});
    for round in 0..3 {
        story.pass(60_000);
        story.probes(true, 3);
        for _ in 0..3 {
            story.anomaly("service_memory");
        }
        if round == 2 {
            break;
        }
        assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
        story.cleared();
        story.probes(true, 3);
        assert_eq!(story.closed().verdict, Some(Verdict::Healed));
        story.restart("boot-1");
    }
    let incident = story.incident().unwrap();
    assert_eq!(incident.state, IncidentState::HandedToHuman);
    assert!(incident.actions.is_empty());
    // A person may still have it done, and an hour later it is new again.
    let id = incident.id;
    story.tell(approve(id, None, None));
    story.carry_out(Outcome::Done);
    story.cleared();
    story.probes(true, 3);
    story.pass(3_700_000);
    story.probes(true, 3);
    for _ in 0..3 {
        story.anomaly("service_memory");
    }
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
}

#[test]
fn starts_are_spaced_and_bounded_and_then_a_person_hears_of_it_again_and_again() {
    let mut story = Story::new(|policy| policy.cooldown = Duration::from_secs(10));
    story.crash();
    story.carry_out(failed(false));
    assert_eq!(story.state(), Some(IncidentState::CoolingDown));
    assert!(story.pass(9_999).is_empty());
    story.pass(1);
    story.carry_out(failed(false));
    assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
    let notices = story.pass(3 * 900_000);
    assert_eq!(notices.len(), 3, "{notices:?}");
    assert!(matches!(&notices[0], Output::Notify(notice) if notice.kind == NoticeKind::StillOpen));
    // Another process that answers at its address is no recovery.
    story.probes(true, 3);
    assert_eq!(story.state(), Some(IncidentState::HandedToHuman));
    assert!(
        story
            .incident()
            .unwrap()
            .why()
            .contains("answered by another process")
    );
    // Still watched: when somebody mended it, it closes.
    story.tell(Input::Started {
        service: "a".into(),
        pid: 7,
    });
    story.probes(true, 3);
    assert_eq!(story.closed().state, IncidentState::Recovered);
}

#[test]
fn budgets_and_cool_downs_survive_a_restart_and_a_new_boot() {
    for clock in ["boot-1", "boot-2"] {
        let mut story = Story::new(|policy| {
            policy.max_actions = 1;
            policy.cooldown = Duration::ZERO;
        });
        story.crash();
        story.carry_out(Outcome::Done);
        story.probes(true, 3);
        if clock == "boot-2" {
            story.ms = 500;
        }
        story.restart(clock);
        story.crash();
        assert_eq!(story.state(), Some(IncidentState::HandedToHuman), "{clock}");
        assert!(
            story
                .incident()
                .unwrap()
                .handed_over
                .as_ref()
                .unwrap()
                .contains("budget of 1 actions")
        );
    }
}
