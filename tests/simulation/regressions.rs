//! Scenarios that broke a rule once, as literal lists, and a few written by hand for what chance reaches rarely.

use theriac_lab::simulate::link::Weather;
use theriac_lab::simulate::world::Forgery;

use crate::op::{Op, Scenario};

fn holds(scenario: &Scenario) {
    if let Err(violation) = scenario.run() {
        panic!("{scenario:?}: {violation}");
    }
}

/// At every millisecond of a whole round, one crash of the aggregator.
#[test]
fn aggregator_crash_at_any_moment_of_a_round() {
    for at in (1..2600).step_by(7) {
        let ops = vec![
            Op::Run(at),
            Op::CrashAggregator(40),
            Op::Run(50),
            Op::CrashAggregator(1),
        ];
        holds(&Scenario {
            seed: 1,
            edges: 3,
            quorum: 2,
            ops,
        });
    }
}

/// At every millisecond of a whole round, one crash of an edge, and another soon after.
#[test]
fn edge_crash_at_any_moment_of_a_round() {
    for at in (1..2600).step_by(7) {
        let ops = vec![
            Op::Run(at),
            Op::CrashEdge(0, 30),
            Op::Run(700),
            Op::CrashEdge(0, 1),
        ];
        holds(&Scenario {
            seed: 2,
            edges: 3,
            quorum: 3,
            ops,
        });
    }
}

/// Both sides at once, in a storm, while the disk is full and somebody speaks for edge 0.
#[test]
fn everything_at_once() {
    for seed in 0..50 {
        let ops = vec![
            Op::Weather(Weather::Storm),
            Op::Run(1500),
            Op::Forge(0, Forgery::OtherBytes),
            Op::FailStores(3),
            Op::Run(1000),
            Op::CrashEdge(1, 500),
            Op::CrashAggregator(500),
            Op::Run(2000),
            Op::Forge(0, Forgery::WrongNonce),
            Op::Partition(2, 5000),
            Op::CrashAggregator(1),
        ];
        holds(&Scenario {
            seed,
            edges: 4,
            quorum: 3,
            ops,
        });
    }
}

/// An edge slower than the deadline: every round ends without it, none waits for it.
#[test]
fn edge_slower_than_every_deadline_blocks_nobody() {
    let scenario = Scenario {
        seed: 3,
        edges: 3,
        quorum: 2,
        ops: vec![Op::TrainingTime(0, 60_000), Op::Run(60_000)],
    };
    let tally = scenario.run().unwrap();
    assert!(tally.published >= 6, "{tally:?}");
}
