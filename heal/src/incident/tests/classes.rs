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
    pressed(&mut story, seen);
    story.probes(false, 2);
    assert_eq!(story.incident().unwrap().class, FaultClass::FdExhaustion);
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
    story.probes(true, 3);
    assert_eq!(story.closed().verdict, Some(Verdict::Healed));
    // Honest clients hold them.
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    let crowd = PressureSeen {
        uses_cpu: Some(0.9),
        crowd: Some(5.0),
        ..seen
    };
    pressed(&mut story, crowd);
    for ok in [false, true, false] {
        story.probe(ok);
    }
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
