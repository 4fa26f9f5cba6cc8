//! What the detector alone suspects of a service that serves is let be until something presses.

use super::*;

fn suspected(channel: &str) -> Story {
    let mut story = Story::new(|_| {});
    story.probes(true, 3);
    for _ in 0..3 {
        story.scored(channel, 9.0);
    }
    story
}

/// Of the same suspicion, once more.
fn then(story: &mut Story, channel: &str, sign: impl FnOnce(&mut Story)) -> Option<ActionKind> {
    sign(story);
    story.scored(channel, 9.0);
    story.recorded().map(|intent| intent.action)
}

#[test]
fn memory_that_grew_while_the_service_answers_is_let_be_until_it_is_about_to_be_used_up() {
    let signs: [fn(&mut Story); 3] = [
        |story| story.memory(Some(0.91), None),
        |story| story.memory(Some(0.3), Some(Duration::from_secs(40))),
        |story| drop(story.probe(false)),
    ];
    for sign in signs {
        let mut story = suspected("service_memory");
        let incident = story.incident().unwrap();
        assert_eq!(
            (incident.class, incident.state),
            (FaultClass::MemoryLeak, IncidentState::Open)
        );
        let harmless = |story: &mut Story| story.memory(Some(0.5), None);
        assert_eq!(then(&mut story, "service_memory", harmless), None);
        let told = story
            .seen
            .iter()
            .any(|output| matches!(output, Output::Notify(_)));
        assert!(!told, "nobody is called for it");
        assert!(story.incident().unwrap().why().contains("nothing presses"));
        assert_eq!(
            then(&mut story, "service_memory", sign),
            Some(ActionKind::Restart)
        );
    }
    // It goes away again by itself.
    let mut story = suspected("service_memory");
    story.cleared();
    story.probes(true, 3);
    assert_eq!(story.closed().state, IncidentState::Recovered);
}

#[test]
fn a_busy_service_is_restarted_once_its_probes_suffer_and_never_for_its_processor_time_alone() {
    let cpu = "service_cpu";
    let answers = |story: &mut Story, ms, count| {
        for _ in 0..count {
            story.tell(Input::Probe {
                service: "a".into(),
                ok: true,
                latency: Duration::from_millis(ms),
                detail: String::new(),
            });
        }
    };
    // It takes all processors and has to wait for them: as long as it answers as fast as ever nobody notices.
    let mut story = Story::new(|_| {});
    answers(&mut story, 3, 20);
    for _ in 0..4 {
        assert_eq!(
            then(&mut story, cpu, |story| story.saturated(1.0, 3.0, Some(1.0))),
            None
        );
    }
    let incident = story.incident().unwrap();
    assert_eq!(
        (incident.class, incident.state),
        (FaultClass::CpuContention, IncidentState::Open)
    );
    assert!(
        incident.why().contains("answers as fast as ever"),
        "{}",
        incident.why()
    );
    // A crowd brings it along.
    let slow = |story: &mut Story, crowd| {
        story.saturated(1.0, 3.0, crowd);
        answers(story, 8, 5);
    };
    assert_eq!(then(&mut story, cpu, |story| slow(story, Some(5.0))), None);
    assert_eq!(
        then(&mut story, cpu, |story| slow(story, None)),
        Some(ActionKind::Restart)
    );
    let why = story.incident().unwrap().why();
    assert!(why.contains("it answers in 8.0 ms instead of 3.0 ms"), "{why}");
    // The detector's own view of them.
    let mut story = suspected(cpu);
    story.caused(&[(cpu, 5.0), ("service_probe_latency", 3.0)], 9.0);
    assert_eq!(story.recorded().unwrap().action, ActionKind::Restart);
    let mut story = suspected(cpu);
    assert_eq!(
        then(&mut story, cpu, |story| drop(story.probe(false))),
        Some(ActionKind::Restart)
    );
}

#[test]
fn what_is_let_be_is_let_be_after_a_restart_of_the_node_and_a_bound_that_was_meant_for_it_is_set_at_once() {
    let mut story = suspected("service_memory");
    story.restart("boot-1");
    story.probes(true, 3);
    for _ in 0..3 {
        story.scored("service_memory", 9.0);
    }
    assert!(story.recorded().is_none());
    let mut story = Story::new(|policy| {
        let bound = vec![ActionKind::LimitMemory];
        policy.configured = BTreeMap::from([(FaultClass::MemoryLeak, bound)]);
    });
    story.probes(true, 3);
    for _ in 0..3 {
        story.scored("service_memory", 9.0);
    }
    assert_eq!(story.carry_out(relieved()).action, ActionKind::LimitMemory);
}
