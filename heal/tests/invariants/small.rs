//! Every history of a small world, and a death of the node at every action.

use std::collections::BTreeMap;

use theriac_heal::policy::RiskClass;
use theriac_heal::types::{ActionKind, FaultClass, IncidentState, Outcome};

use crate::number;
use crate::op::{Of, Op, Setting, Word};
use crate::world::World;

/// Every event of the small world: two services, and with them three actions (start, restart, restore).
const LETTERS: usize = 7;

fn letter(world: &mut World, at: usize) {
    match at {
        0 => hang(world, 0),
        1 => {
            world.apply(&Op::Exit { service: 0 });
            world.apply(&Op::State {
                service: 0,
                good: false,
            });
        }
        2 => world.apply(&Op::Exit { service: 1 }),
        3 | 4 => {
            if world.to_record.is_empty() {
                // Done, or failed with the process gone.
                world.apply(&Op::Execute {
                    outcome: if at == 3 { 5 } else { 2 },
                });
            } else {
                world.apply(&Op::Record { stored: at == 3 });
            }
        }
        5 => {
            for service in 0..2 {
                for _ in 0..3 {
                    world.apply(&Op::Probe { service, ok: true });
                }
            }
            world.apply(&Op::Pass { ms: 6_000 });
        }
        _ => world.apply(&Op::Die {
            new_boot: false,
            took_effect: true,
        }),
    }
}

fn hang(world: &mut World, service: usize) {
    for _ in 0..2 {
        world.apply(&Op::Probe { service, ok: false });
    }
}

fn search(world: &World, left: u64, histories: &mut u64) {
    *histories += 1;
    if left == 0 {
        return;
    }
    for at in 0..LETTERS {
        let mut next = world.clone();
        letter(&mut next, at);
        search(&next, left - 1, histories);
    }
}

#[test]
fn every_history_of_two_services_and_three_actions_keeps_the_invariants() {
    let depth = number("THERIAC_DEPTH", 4);
    let mut histories = 0;
    search(&World::new(Setting::Act), depth, &mut histories);
    println!("{histories} histories of up to {depth} of {LETTERS} events");
    assert!(histories > 2_000);
}

/// Whether it stands on no class's own ladder.
fn is_configured(action: ActionKind) -> bool {
    matches!(
        action,
        ActionKind::ThrottleCpu
            | ActionKind::LimitMemory
            | ActionKind::Freeze
            | ActionKind::Drain
            | ActionKind::RestartUnit
            | ActionKind::ReloadUnit
            | ActionKind::ResetFailedUnit
            | ActionKind::RolloutRestart
            | ActionKind::ScaleUp
            | ActionKind::RolloutUndo
    )
}

/// Leads a fresh world to where the intent of exactly this action waits to be recorded.
fn lead_to(action: ActionKind) -> World {
    let hooked = matches!(action, ActionKind::Hook | ActionKind::Webhook);
    let mut policy = if hooked { Setting::Hooked } else { Setting::Act }.policy();
    if is_configured(action) {
        policy.configured = BTreeMap::from([(FaultClass::Hang, vec![action])]);
    }
    let mut world = World::under(&policy);
    // The second has something to move away.
    let service = usize::from(action == ActionKind::RelieveSpace);
    for _ in 0..3 {
        world.apply(&Op::Probe { service, ok: true });
    }
    let sessions = |piled, running, full| Op::Sessions {
        service,
        piled,
        running,
        full,
        pid: 7,
    };
    match action {
        ActionKind::Start => world.apply(&Op::Exit { service }),
        ActionKind::RestoreAndStart => letter(&mut world, 1),
        ActionKind::CancelQuery => world.apply(&sessions(true, true, false)),
        ActionKind::TerminateBlocker => world.apply(&sessions(true, false, false)),
        ActionKind::EndIdleSessions | ActionKind::Reload => world.apply(&sessions(false, false, true)),
        ActionKind::RelieveSpace => world.apply(&Op::Disk { service, full: true }),
        _ => hang(&mut world, service),
    }
    // From R3 on a person has to say so.
    if is_configured(action) && policy.class_of(action) >= RiskClass::R3 {
        assert!(world.to_record.is_empty(), "{action} without a person");
        let word = Word {
            plan: Of::Present,
            by: None,
        };
        world.apply(&Op::Approve { incident: 1, word });
    }
    // What stands before it on the ladder fails.
    for _ in 0..3 {
        if let Some(intent) = world.to_record.first()
            && intent.action != action
        {
            world.apply(&Op::Record { stored: true });
            world.apply(&Op::Execute { outcome: 3 });
        }
    }
    assert_eq!(world.to_record.first().map(|intent| intent.action), Some(action));
    world
}

#[test]
fn a_death_between_intent_and_effect_of_every_action_repeats_nothing_that_cannot_be_looked_up() {
    let mut tested = 0;
    for action in ActionKind::ALL {
        for (took_effect, new_boot) in [(false, false), (true, false), (true, true)] {
            let mut world = lead_to(action);
            world.apply(&Op::Record { stored: true });
            let intent = world.executing[0].clone();
            world.apply(&Op::Die {
                new_boot,
                took_effect,
            });
            let open = world.machine.open_incident(&intent.service).unwrap();
            let done = open
                .actions
                .iter()
                .find(|done| done.intent.id == intent.id)
                .unwrap();
            let expected = if took_effect && action.renews_process() {
                Outcome::Done
            } else {
                Outcome::Interrupted
            };
            assert_eq!(done.outcome, Some(expected), "{action}");
            if took_effect {
                assert_eq!(open.state, IncidentState::Verifying, "{action}");
            }
            // Whatever follows: the same action of the same incident comes again only where it was looked up and found not done.
            for _ in 0..6 {
                world.apply(&Op::Pass { ms: 31_000 });
                world.apply(&Op::Record { stored: true });
                world.apply(&Op::Execute { outcome: 3 });
            }
            let again = world
                .done
                .iter()
                .filter(|(_, done)| done.action == action)
                .count();
            assert!(
                again == 1 || action.renews_process(),
                "{action} was done {again} times"
            );
            // A death before the intent was durable: nothing had begun, and nothing is known of it.
            let mut world = lead_to(action);
            world.apply(&Op::Die {
                new_boot,
                took_effect: false,
            });
            assert!(world.executed.iter().all(|id| *id != intent.id) || intent.id.0 == 1);
            tested += 1;
        }
    }
    assert_eq!(tested, 3 * ActionKind::ALL.len());
}
