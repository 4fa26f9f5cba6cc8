//! Operations on a world, scenarios made of them, and how a failing one is made short.

use std::fmt;
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use theriac_lab::simulate::link::Weather;
use theriac_lab::simulate::world::{Forgery, World, WorldConfig};
use theriac_protocol::round::PhaseName;

use crate::oracle::{Oracle, Violation};

const DEADLINE: Duration = Duration::from_secs(8);
const PAUSE: Duration = Duration::from_millis(500);

/// Time in which the calm world must have brought a round with every edge in it: several rounds, one of which may
/// have begun before the calm.
const PATIENCE: Duration = Duration::from_mins(2);

/// Steps of one operation at most: more is a loop in which time stands still.
const STEPS_PER_RUN_MAX: u64 = 200_000;

/// One thing done to the world, or left to happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    /// The world runs for that many milliseconds.
    Run(u64),
    /// All messages from now on.
    Weather(Weather),
    /// Power failure of the aggregator, for milliseconds.
    CrashAggregator(u64),
    /// Power failure of an edge, for milliseconds.
    CrashEdge(usize, u64),
    /// An edge is cut off, for milliseconds.
    Partition(usize, u64),
    /// An edge's session ends.
    BreakSession(usize),
    /// The next updates find the disk full.
    FailStores(u32),
    /// The next aggregation gives no model.
    FailAggregation,
    /// The edge declines its next round.
    SpendBudget(usize),
    /// The edge's trainings take that many milliseconds: more than the deadline, now and then.
    TrainingTime(usize, u64),
    /// Somebody speaks in the edge's name.
    Forge(usize, Forgery),
}

/// A world and what is done to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Scenario {
    pub(crate) seed: u64,
    pub(crate) edges: usize,
    pub(crate) quorum: usize,
    pub(crate) ops: Vec<Op>,
}

/// What a run met, so that a run that met nothing shows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) steps: u64,
    pub(crate) published: u64,
    pub(crate) aborted: u64,
    pub(crate) resumed: u64,
    pub(crate) edge_restarts: u64,
    pub(crate) receipts_repeated: u64,
    pub(crate) updates_resent: u64,
    pub(crate) trainings: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.published += other.published;
        self.aborted += other.aborted;
        self.resumed += other.resumed;
        self.edge_restarts += other.edge_restarts;
        self.receipts_repeated += other.receipts_repeated;
        self.updates_resent += other.updates_resent;
        self.trainings += other.trainings;
    }

    /// Each kind of trouble happened often.
    pub(crate) fn assert_varied(&self, seeds: u64) {
        assert!(self.published >= 2 * seeds, "{self:?}");
        for rare in [
            self.aborted,
            self.resumed,
            self.edge_restarts,
            self.receipts_repeated,
            self.updates_resent,
        ] {
            assert!(rare >= seeds / 10, "{self:?}");
        }
    }
}

/// A scenario that broke a rule, made as short as it goes.
#[derive(Debug)]
pub(crate) struct Failure {
    scenario: Scenario,
    violation: Violation,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Scenario {
            seed,
            edges,
            quorum,
            ops,
        } = &self.scenario;
        writeln!(f, "seed {seed}: {}", self.violation)?;
        writeln!(f, "for regressions.rs:\n")?;
        write!(
            f,
            "Scenario {{ seed: {seed}, edges: {edges}, quorum: {quorum}, ops: vec!{ops:?} }}"
        )
    }
}

impl Scenario {
    /// A scenario by its number.
    pub(crate) fn from_seed(seed: u64) -> Self {
        // Another stream than the world's own, which has the same seed.
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(1);
        let edges = rng.random_range(2..=5);
        let quorum = rng.random_range(1..=edges);
        let count = rng.random_range(4..30);
        let ops = (0..count).map(|_| op(&mut rng, edges)).collect();
        Self {
            seed,
            edges,
            quorum,
            ops,
        }
    }

    /// Runs the operations with the oracle after every step, then the calm phase.
    pub(crate) fn run(&self) -> Result<Tally, Violation> {
        let mut run = Run::new(self);
        for op in &self.ops {
            run.apply(*op)?;
        }
        run.calm_down()?;
        Ok(run.tally)
    }

    /// Leaves out what is not needed for a rule to break: halves first, then single operations.
    pub(crate) fn shrink(self) -> Failure {
        let Err(mut violation) = self.run() else {
            panic!("seed {}: fails and does not fail", self.seed)
        };
        let mut scenario = self;
        let mut size = scenario.ops.len().div_ceil(2).max(1);
        loop {
            let mut at = 0;
            while at < scenario.ops.len() {
                let mut shorter = scenario.clone();
                shorter.ops.drain(at..(at + size).min(shorter.ops.len()));
                match shorter.run() {
                    Err(found) => (scenario, violation) = (shorter, found),
                    Ok(_) => at += size,
                }
            }
            if size == 1 {
                return Failure { scenario, violation };
            }
            size = size.div_ceil(2);
        }
    }
}

fn op(rng: &mut ChaCha8Rng, edges: usize) -> Op {
    let edge = rng.random_range(0..edges);
    match rng.random_range(0..24) {
        0..=6 => Op::Run(rng.random_range(1..4000)),
        // Short runs hit the middle of things: a write under way, a training just done.
        7..=10 => Op::Run(rng.random_range(1..60)),
        11 | 12 => Op::Weather(
            [Weather::Calm, Weather::Lossy, Weather::Lossy, Weather::Storm][rng.random_range(0..4)],
        ),
        13 | 14 => Op::CrashAggregator(rng.random_range(1..6000)),
        15 | 16 => Op::CrashEdge(edge, rng.random_range(1..6000)),
        17 => Op::Partition(edge, rng.random_range(1..12_000)),
        18 => Op::BreakSession(edge),
        19 => Op::FailStores(rng.random_range(1..5)),
        20 => Op::FailAggregation,
        21 => Op::SpendBudget(edge),
        22 => Op::TrainingTime(edge, rng.random_range(1..12_000)),
        _ => {
            let forgeries = [
                Forgery::WrongNonce,
                Forgery::WrongBase,
                Forgery::Early,
                Forgery::OtherBytes,
            ];
            Op::Forge(edge, forgeries[rng.random_range(0..4)])
        }
    }
}

/// A scenario under way.
struct Run {
    world: World,
    oracle: Oracle,
    edges: usize,
    tally: Tally,
}

impl Run {
    fn new(scenario: &Scenario) -> Self {
        let Scenario {
            seed, edges, quorum, ..
        } = *scenario;
        let world = World::new(WorldConfig {
            seed,
            edges,
            quorum,
            deadline: DEADLINE,
            pause: PAUSE,
        });
        Self {
            world,
            oracle: Oracle::new(quorum),
            edges,
            tally: Tally::default(),
        }
    }

    fn apply(&mut self, op: Op) -> Result<(), Violation> {
        let millis = Duration::from_millis;
        match op {
            Op::Run(span) => return self.run_until(span, |_| false).map(|_| ()),
            Op::Weather(weather) => self.world.set_weather(weather),
            Op::CrashAggregator(down) => self.world.crash_aggregator(millis(down)),
            Op::CrashEdge(edge, down) => self.world.crash_edge(edge, millis(down)),
            Op::Partition(edge, span) => self.world.partition(edge, millis(span)),
            Op::BreakSession(edge) => self.world.break_session(edge),
            Op::FailStores(count) => self.world.fail_stores(count),
            Op::FailAggregation => self.world.fail_aggregation(),
            Op::SpendBudget(edge) => self.world.spend_budget(edge),
            Op::TrainingTime(edge, span) => self.world.set_training_time(edge, millis(span)),
            Op::Forge(edge, forgery) => self.world.forge(edge, forgery),
        }
        self.judge()
    }

    /// Steps until the condition holds (`true`) or the time is over.
    fn run_until(&mut self, span_ms: u64, done: impl Fn(&Self) -> bool) -> Result<bool, Violation> {
        let end = self.world.now().after(Duration::from_millis(span_ms));
        let steps = self.tally.steps;
        while self.world.next().is_some_and(|at| at <= end) {
            self.world.step();
            self.tally.steps += 1;
            self.judge()?;
            if done(self) {
                return Ok(true);
            }
            if self.tally.steps - steps > STEPS_PER_RUN_MAX {
                return Err(Violation::new("time stands still", &self.world.now()));
            }
        }
        Ok(false)
    }

    fn judge(&mut self) -> Result<(), Violation> {
        for fact in self.world.take_facts() {
            self.oracle
                .note(&fact, self.world.aggregator_store(), &mut self.tally)?;
        }
        Ok(())
    }

    /// Faults end. A round in which every edge has a part must be published, and everybody must come to hold its model.
    fn calm_down(&mut self) -> Result<(), Violation> {
        self.world.heal();
        let everybody = self.edges;
        let begun = self.tally.published;
        let patience = u64::try_from(PATIENCE.as_millis()).unwrap();
        let together = |run: &Self| run.oracle.last_members() == everybody && run.tally.published > begun;
        if !self.run_until(patience, together)? {
            let phases = (self.world.aggregator_status(), self.edge_statuses());
            return Err(Violation::new(
                "no round with every edge after the faults ended",
                &phases,
            ));
        }
        self.world.stop();
        let ended = |run: &Self| {
            let stopped = run
                .world
                .aggregator_status()
                .is_some_and(|status| status.phase == PhaseName::Closed);
            let base = run.world.aggregator_store().base();
            let held = |edge| {
                run.world
                    .edge_status(edge)
                    .is_some_and(|status| status.model == base)
            };
            stopped && (0..run.edges).all(held)
        };
        if !self.run_until(patience, ended)? {
            let phases = (self.world.aggregator_status(), self.edge_statuses());
            return Err(Violation::new(
                "not everybody came to hold the last model",
                &phases,
            ));
        }
        self.oracle.end(self.world.aggregator_store())
    }

    fn edge_statuses(&self) -> Vec<impl fmt::Debug + use<>> {
        (0..self.edges).map(|edge| self.world.edge_status(edge)).collect()
    }
}
