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
fn a_busy_service_is_restarted_once_its_probes_suffer_or_the_processors_do_not_suffice_and_no_crowd_is_why() {
    let cpu = "service_cpu";
    let mut story = suspected(cpu);
    assert_eq!(
        then(&mut story, cpu, |story| story.saturated(0.9, 0.1, None)),
        None
    );
    assert_eq!(
        then(&mut story, cpu, |story| story.saturated(0.3, 2.0, None)),
        None
    );
    assert_eq!(
        then(&mut story, cpu, |story| story.saturated(0.9, 2.0, Some(5.0))),
        None
    );
    assert_eq!(
        then(&mut story, cpu, |story| story.saturated(0.9, 2.0, Some(1.0))),
        Some(ActionKind::Restart)
    );
    let mut story = suspected(cpu);
    let cause = |channel: &str, contribution| Cause {
        channel: channel.to_owned(),
        contribution,
        rising: Some(true),
        evidence: None,
    };
    story.tell(Input::Anomaly {
        service: "a".into(),
        score: 9.0,
        threshold: 3.0,
        causes: vec![cause(cpu, 5.0), cause("service_probe_latency", 3.0)],
    });
    assert_eq!(story.recorded().unwrap().action, ActionKind::Restart);
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
