//! The incident machine's invariants under random operations: crashes of the node at the worst moments, new boots, jumping clocks,
//! hostile scores, lost storage, impatient people. An oracle looks after every step.
//!
//! `THERIAC_CASES` and `THERIAC_SEED` set how many histories and from which seed, `THERIAC_DEPTH` how deep the small scope is searched.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod fleet;
mod op;
mod oracle;
mod small;
mod world;

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestRunner};

use crate::op::{Op, Setting, op, setting};
use crate::world::World;

fn run(setting: Setting, ops: &[Op]) -> World {
    let mut world = World::new(setting);
    for op in ops {
        world.apply(op);
    }
    world.everything_gets_well();
    world
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn the_invariants_hold_under_any_operations() {
    let (cases, seed) = (number("THERIAC_CASES", 2_000), number("THERIAC_SEED", 2));
    println!("{cases} cases, seed {seed}");
    let config = ProptestConfig {
        cases: u32::try_from(cases).unwrap(),
        rng_seed: RngSeed::Fixed(seed),
        max_shrink_iters: 20_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let histories = (setting(), prop::collection::vec(op(), 1..120));
    let checked = TestRunner::new(config).run(&histories, |(setting, ops)| {
        run(setting, &ops);
        Ok(())
    });
    if let Err(found) = checked {
        panic!("{found}");
    }
}

#[test]
fn the_generator_reaches_what_the_invariants_are_about() {
    use proptest::strategy::ValueTree as _;

    let mut runner = TestRunner::deterministic();
    let (mut executed, mut repeated, mut restored, mut harmed, mut relieved) = (0, 0, 0, 0, 0);
    let mut reached: BTreeMap<&str, usize> = BTreeMap::new();
    for _ in 0..1_200 {
        let strategy = (setting(), prop::collection::vec(op(), 60..120));
        let (setting, ops) = strategy.new_tree(&mut runner).unwrap().current();
        let world = run(setting, &ops);
        executed += world.executed.len();
        repeated += world.outcomes.values().filter(|tried| **tried > 1).count();
        let of = |which: &dyn Fn(theriac_heal::types::ActionKind) -> bool| {
            world.done.iter().filter(|(_, done)| which(done.action)).count()
        };
        restored += of(&|action| action == theriac_heal::types::ActionKind::RestoreAndStart);
        relieved += of(&|action| !action.renews_process());
        harmed += usize::from(!world.machine.export().demoted.is_empty());
        for (what, times) in world.oracle.reached.iter().chain(&world.oracle.fleet.reached) {
            *reached.entry(what).or_default() += times;
        }
    }
    println!("{executed} {repeated} {restored} {harmed} {relieved} {reached:?}");
    assert!(executed > 800 && relieved > 80, "{executed} {relieved}");
    assert!(
        repeated > 10 && restored > 20 && harmed > 20,
        "{repeated} {restored} {harmed}"
    );
    for what in [
        "approved",
        "R3 approved",
        "reinstated",
        "signed",
        "half-open",
        "spared",
        "an action's own budget spent",
        "let go",
        "not for the brake",
        "brake overruled",
        "a person was asked",
        "slot",
        "slot waived",
        "called off",
    ] {
        assert!(
            // The rarest has stories of its own.
            reached
                .get(what)
                .is_some_and(|times| *times >= 2 || what == "slot waived"),
            "{what}: {reached:?}"
        );
    }
}

/// What a node does while its aggregator says nothing but what cannot be, it does as if it had no budgets of the fleet.
#[test]
fn an_absurd_fleet_changes_nothing_that_is_done() {
    use proptest::strategy::ValueTree as _;

    let mut runner = TestRunner::deterministic();
    let with = Setting::Fleet.policy();
    let without = theriac_heal::policy::HealPolicy {
        fleet: None,
        ..with.clone()
    };
    let mut done = 0;
    for _ in 0..300 {
        let strategy = prop::collection::vec(op(), 60..120);
        let told = strategy.new_tree(&mut runner).unwrap().current();
        let absurd = told.into_iter().map(|op| match op {
            Op::Report { acting, .. } => Op::Report {
                nodes: 7,
                unhealthy: 8,
                acting,
            },
            other => other,
        });
        let ops: Vec<Op> = absurd.collect();
        let acted = |policy| {
            let mut world = World::under(policy);
            for op in &ops {
                world.apply(op);
            }
            world.done
        };
        let alone = acted(&without);
        done += alone.len();
        assert_eq!(acted(&with), alone, "{ops:?}");
    }
    assert!(done > 300, "{done}");
}
