//! What opens an incident, and what it is taken for.

use super::*;

#[test]
fn a_stopped_process_and_failing_probes_are_a_hang_and_restarted() {
    for stopped in [false, true] {
        let mut story = Story::new(|_| {});
        story.probes(true, 3);
        if stopped {
            for _ in 0..2 {
                story.tell(Input::Process {
                    service: "a".into(),
                    state: ProcessState::Stopped,
                });
            }
        } else {
            story.probes(false, 2);
        }
        assert_eq!(story.incident().unwrap().class, FaultClass::Hang);
        assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
        story.probes(true, 3);
        assert_eq!(story.closed().verdict, Some(Verdict::Healed));
    }
}

#[test]
fn a_short_burst_and_an_alarm_that_is_only_held_open_nothing() {
    let mut story = Story::with_defaults();
    story.ms = 60_000;
    for _ in 0..9 {
        story.second(|story| drop(story.anomaly("service_cpu")));
    }
    story.cleared();
    story.second(|story| drop(story.anomaly("service_cpu")));
    for _ in 0..60 {
        story.second(|story| drop(story.scored("service_cpu", 2.9)));
    }
    assert!(story.incident().is_none());
    for _ in 0..2 {
        story.second(|story| drop(story.anomaly("service_cpu")));
    }
    assert_eq!(story.incident().unwrap().class, FaultClass::CpuContention);
}

#[test]
fn a_crash_during_an_alarm_that_is_no_incident_yet_is_timed_from_the_crash() {
    let mut story = Story::new(|policy| policy.anomaly_lasting = Duration::from_secs(100));
    story.probes(true, 3);
    story.anomaly("host_load");
    story.pass(5_000);
    story.crash();
    let (crashed, incident) = (story.now().when(), story.incident().unwrap());
    assert_eq!((incident.opened, incident.detected), (crashed, crashed));
    assert!(incident.why().contains("-5.00 s"), "{}", incident.why());
}

#[test]
fn a_crash_during_an_unexplained_anomaly_is_timed_from_the_crash() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    for _ in 0..3 {
        story.anomaly("host_load");
    }
    assert_eq!(story.incident().unwrap().class, FaultClass::Unknown);
    story.pass(90_000);
    story.crash();
    let crashed = story.now().when();
    story.carry_out(Outcome::Done);
    story.probes(true, 3);
    let incident = story.incident().cloned().unwrap_or_else(|| story.closed());
    assert_eq!(incident.class, FaultClass::Crash);
    assert_eq!((incident.opened, incident.detected), (crashed, crashed));
    assert!(incident.why().contains("-90"), "{}", incident.why());
}

#[test]
fn what_happens_meanwhile_joins_the_open_incident() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    story.probes(false, 2);
    let id = story.incident().unwrap().id;
    story.crash();
    story.anomaly("service_cpu");
    story.tell(Input::Process {
        service: "a".into(),
        state: ProcessState::Stopped,
    });
    let opened = story
        .seen
        .iter()
        .filter(|output| matches!(output, Output::Opened(_)))
        .count();
    let recorded = story
        .seen
        .iter()
        .filter(|output| matches!(output, Output::RecordIntent(_)))
        .count();
    assert_eq!((opened, recorded, story.incident().unwrap().id), (1, 1, id));
}

#[test]
fn what_keeps_a_living_process_from_answering_is_told_apart_from_a_hang() {
    let slow_disk = PressureSeen {
        waits_for_disk: Some(2.0),
        host_io_full: Some(0.7),
        ..PressureSeen::default()
    };
    let starved = PressureSeen {
        waits_for_cpu: Some(0.9),
        uses_cpu: Some(0.1),
        runs: Some(0.2),
        ..PressureSeen::default()
    };
    for (seen, class) in [
        (slow_disk, FaultClass::DiskSlow),
        (starved, FaultClass::CpuStarvation),
    ] {
        let mut story = Story::new(|_| {});
        story.probes(true, 3);
        story.silent_under(seen, 2);
        let incident = story.incident().unwrap().clone();
        assert_eq!(
            (incident.class, incident.state),
            (class, IncidentState::HandedToHuman)
        );
        assert!(incident.actions.is_empty());
        let also: Vec<FaultClass> = incident.hypotheses.iter().map(|of| of.class).collect();
        assert_eq!(also, [class, FaultClass::Hang]);
        assert!(incident.why().contains("Restart helps: no."));
        // When that is over and it still does not answer, it is a hang.
        pressed(&mut story, PressureSeen::default());
        story.probes(false, 1);
        assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
    }
}

#[test]
fn what_its_threads_were_at_before_it_fell_silent_does_not_make_it_a_hang() {
    let starved = PressureSeen {
        waits_for_cpu: Some(3.0),
        uses_cpu: Some(0.1),
        runs: Some(0.2),
        ..PressureSeen::default()
    };
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    pressed(&mut story, PressureSeen::default());
    // Two fail at once, faster than anybody looks at its threads again.
    story.probes(false, 3);
    assert!(story.recorded().is_none(), "on a look from before");
    story.silent_under(starved, 1);
    let incident = story.incident().unwrap();
    assert_eq!(
        (incident.class, incident.actions.len()),
        (FaultClass::CpuStarvation, 0)
    );
    // With a look that shows nothing it is a hang at once.
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    pressed(&mut story, starved);
    story.silent_under(PressureSeen::default(), 2);
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
}

#[test]
fn clients_are_counted_since_an_alarm_began_before_processor_time_is_a_service_own_fault() {
    let crowd = PressureSeen {
        crowd: Some(20.0),
        runs: Some(1.8),
        ..PressureSeen::default()
    };
    for (seen, acts) in [(PressureSeen::default(), true), (crowd, false)] {
        let mut story = Story::new(|_| {});
        story.probes(true, 3);
        pressed(&mut story, PressureSeen::default());
        story.pass(60_000);
        for _ in 0..5 {
            story.caused(&[("service_cpu", 8.0), ("service_probe_latency", 2.0)], 3.0);
            story.pass(250);
        }
        assert!(story.recorded().is_none(), "nobody has counted them since");
        let old = PressureSeen {
            crowd_is_old: true,
            ..PressureSeen::default()
        };
        pressed(&mut story, old);
        assert!(story.recorded().is_none(), "this is what was counted before");
        pressed(&mut story, seen);
        assert_eq!(story.recorded().is_some(), acts, "{seen:?}");
    }
}

#[test]
fn a_busy_service_that_answers_now_and_then_is_overloaded_and_one_that_never_does_hangs() {
    let busy = PressureSeen {
        uses_cpu: Some(0.9),
        runs: Some(1.8),
        crowd: Some(5.0),
        ..PressureSeen::default()
    };
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    story.asked_under(busy, &[false, true, false]);
    let incident = story.incident().unwrap();
    assert_eq!(
        (incident.class, incident.state),
        (FaultClass::Overload, IncidentState::HandedToHuman)
    );
    assert!(incident.actions.is_empty());
    // Without a crowd it is a loop of its own, and where nothing is answered too.
    let loops = PressureSeen {
        crowd: Some(1.2),
        ..busy
    };
    for (seen, probes) in [(loops, &[false, true, false][..]), (busy, &[false; 301])] {
        let mut story = Story::new(|_| {});
        story.probes(true, 3);
        for ok in probes {
            assert!(story.recorded().is_none(), "{seen:?}: the next may be answered");
            story.asked_under(seen, &[*ok]);
        }
        assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
    }
    // One answer in time, and it is the crowd.
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    story.silent_under(busy, 29);
    story.asked_under(busy, &[true, false]);
    assert_eq!(story.incident().unwrap().class, FaultClass::Overload);
    assert!(story.recorded().is_none());
}

#[test]
fn a_service_whose_output_says_that_a_disk_is_full_is_not_restarted_for_not_answering() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    story.tell(Input::LogErrors {
        service: "a".into(),
        lines: 9,
        template: "ERROR: could not write <*> No space left on device".into(),
        hint: Some(FaultClass::DiskFull),
    });
    assert!(
        story.incident().is_none(),
        "errors alone are evidence, no symptom"
    );
    story.probes(false, 2);
    let incident = story.incident().unwrap();
    assert_eq!(
        (incident.class, incident.state),
        (FaultClass::DiskFull, IncidentState::HandedToHuman)
    );
    assert!(
        incident.why().contains("its output tells of 9 errors"),
        "{}",
        incident.why()
    );
}

#[test]
fn lines_that_clients_can_have_written_hold_a_restart_back_for_a_minute_at_most() {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    let says = Input::LogErrors {
        service: "a".into(),
        lines: 9,
        template: "ERROR: <*> no space left on device".into(),
        hint: Some(FaultClass::DiskFull),
    };
    story.tell(says.clone());
    story.probes(false, 2);
    assert_eq!(story.incident().unwrap().class, FaultClass::DiskFull);
    story.pass(61_000);
    story.probe(false);
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
    // Room on the disk ends it too.
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    story.tell(says);
    story.tell(Input::DiskRelieved { service: "a".into() });
    story.probes(false, 2);
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Restart);
}
