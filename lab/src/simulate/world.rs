//! A whole federation as one seeded loop: an aggregator, its edges, the links between them and their disks. Nothing
//! moves but by [`World::step`], so a seed and a list of operations are the whole story, and can be told again.
//!
//! The two state machines are the real ones and every message goes through the real codec; what surrounds them here (sessions,
//! disks, training) is the least that a driver must do, done with every delay and crash a driver may meet.
//!
//! What happened is written down as [`Fact`]s, for an oracle to judge after each step.

mod aggregator;
mod edge;
mod fact;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use theriac_protocol::codec::{self, CodecError, Encoded};
use theriac_protocol::frame::HEADER_BYTES;
use theriac_protocol::message::{ToAggregator, ToEdge};
use theriac_protocol::participant::{self, ParticipantStatus};
use theriac_protocol::round::{self, RoundStatus};
use theriac_protocol::units::{Digest, Moment, NodeId};

pub use self::aggregator::{AggregatorStore, Ending, RoundRow};
pub use self::edge::EdgeStore;
pub use self::fact::Fact;

use self::aggregator::Aggregator;
use self::edge::Edge;
use super::link::Weather;

/// The size of a world and its rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorldConfig {
    /// Seed of everything that is left to chance.
    pub seed: u64,
    /// Number of edges.
    pub edges: usize,
    /// The aggregator's quorum.
    pub quorum: usize,
    /// Time of a round at most.
    pub deadline: Duration,
    /// Time between rounds at least.
    pub pause: Duration,
}

/// Something an edge's session says that its participant did not: a replay, or a lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forgery {
    /// The right round, another nonce.
    WrongNonce,
    /// The right round and nonce, another base model.
    WrongBase,
    /// The round after the open one.
    Early,
    /// The right round, nonce and base: bytes that may well come before the honest ones, or after.
    OtherBytes,
}

/// The world.
#[derive(Debug)]
pub struct World {
    rng: ChaCha8Rng,
    now: Moment,
    /// Happens in this order; the number keeps simultaneous events in the order they were made.
    queue: BTreeMap<(Moment, u64), Event>,
    sequence: u64,
    weather: Weather,
    /// Edges that no message reaches or leaves, until when.
    partitioned: BTreeMap<usize, Moment>,
    aggregator: Aggregator,
    edges: Vec<Edge>,
    sessions: u64,
    facts: Vec<Fact>,
}

/// Something that will happen. What belongs to a program's life carries its number and is void after a crash; what belongs
/// to a session carries the session's.
#[derive(Debug)]
enum Event {
    ToAggregator {
        edge: usize,
        session: u64,
        frame: Frame,
    },
    ToEdge {
        edge: usize,
        session: u64,
        frame: Frame,
    },
    AggregatorSync {
        life: u64,
    },
    AggregatorAnswer {
        life: u64,
        input: round::Input,
    },
    AggregatorNotices {
        edge: usize,
        session: u64,
    },
    RestartAggregator,
    EdgeSync {
        edge: usize,
        life: u64,
    },
    EdgeAnswer {
        edge: usize,
        life: u64,
        input: participant::Input,
    },
    EdgeNotices {
        edge: usize,
        session: u64,
    },
    EdgeTrained {
        edge: usize,
        life: u64,
        job: edge::Job,
    },
    Connect {
        edge: usize,
        life: u64,
    },
    WelcomeOverdue {
        edge: usize,
        session: u64,
    },
    RestartEdge {
        edge: usize,
    },
}

/// A message as bytes.
#[derive(Debug, Clone)]
struct Frame {
    kind: u16,
    body: Bytes,
}

impl Frame {
    fn of(encoded: &Encoded) -> Self {
        let kind = u16::from_le_bytes([encoded.head[5], encoded.head[6]]);
        Self {
            kind,
            body: [&encoded.head[HEADER_BYTES..], &encoded.payload].concat().into(),
        }
    }
}

impl World {
    /// A world in which everything is up and nobody is connected yet.
    pub fn new(config: WorldConfig) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
        let now = Moment::default();
        let aggregator = Aggregator::install(&config, rng.random(), now);
        let edges = (0..config.edges).map(|_| Edge::install(now)).collect();
        let mut world = Self {
            rng,
            now,
            queue: BTreeMap::new(),
            sequence: 0,
            weather: Weather::Calm,
            partitioned: BTreeMap::new(),
            aggregator,
            edges,
            sessions: 0,
            facts: Vec::new(),
        };
        (0..config.edges).for_each(|edge| world.connect_soon(edge));
        world
    }

    /// The next thing happens. `false`: nothing will ever happen again.
    pub fn step(&mut self) -> bool {
        let queued = self.queue.first_key_value().map(|((at, _), _)| *at);
        let aggregator = self.aggregator.timeout();
        let edge = (0..self.edges.len())
            .filter_map(|edge| Some((self.edges[edge].timeout()?, edge)))
            .min();
        let Some(at) = [queued, aggregator, edge.map(|(at, _)| at)]
            .into_iter()
            .flatten()
            .min()
        else {
            return false;
        };
        self.now = self.now.max(at);
        if queued == Some(at) {
            if let Some((_, event)) = self.queue.pop_first() {
                self.happen(event);
            }
        } else if aggregator == Some(at) {
            self.aggregator_tick();
        } else if let Some((_, edge)) = edge {
            self.edge_tick(edge);
        }
        true
    }

    /// When the next thing will happen.
    pub fn next(&self) -> Option<Moment> {
        let queued = self.queue.first_key_value().map(|((at, _), _)| *at);
        let timeouts = self.edges.iter().filter_map(Edge::timeout);
        queued
            .into_iter()
            .chain(self.aggregator.timeout())
            .chain(timeouts)
            .min()
    }

    /// Time now.
    pub fn now(&self) -> Moment {
        self.now
    }

    /// What has happened since the last call.
    pub fn take_facts(&mut self) -> Vec<Fact> {
        std::mem::take(&mut self.facts)
    }

    /// What is on the aggregator's disk.
    pub fn aggregator_store(&self) -> &AggregatorStore {
        self.aggregator.store()
    }

    /// What is on an edge's disk.
    pub fn edge_store(&self, edge: usize) -> &EdgeStore {
        self.edges[edge].store()
    }

    /// The aggregator's machine at a glance; `None` while it is down.
    pub fn aggregator_status(&self) -> Option<RoundStatus> {
        self.aggregator.status()
    }

    /// An edge's machine at a glance; `None` while it is down.
    pub fn edge_status(&self, edge: usize) -> Option<ParticipantStatus> {
        self.edges[edge].status()
    }

    /// Changes the network for all messages from now on.
    pub fn set_weather(&mut self, weather: Weather) {
        self.weather = weather;
    }

    /// The aggregator's machine loses power and is back after `down`.
    pub fn crash_aggregator(&mut self, down: Duration) {
        if self.aggregator.is_up() {
            self.aggregator_crash();
            self.later(down, Event::RestartAggregator);
        }
    }

    /// An edge's machine loses power and is back after `down`.
    pub fn crash_edge(&mut self, edge: usize, down: Duration) {
        if self.edges[edge].is_up() {
            self.edge_crash(edge);
            self.later(down, Event::RestartEdge { edge });
        }
    }

    /// No message of this edge arrives anywhere, and its session is given up, for that long.
    pub fn partition(&mut self, edge: usize, span: Duration) {
        self.partitioned.insert(edge, self.now.after(span));
        self.break_session(edge);
    }

    /// The session of an edge ends; each side notices in its own time.
    pub fn break_session(&mut self, edge: usize) {
        let edge_side = self.edges[edge].session();
        let aggregator_side = self.aggregator.session(edge);
        for session in edge_side
            .into_iter()
            .chain(aggregator_side)
            .collect::<BTreeSet<u64>>()
        {
            self.break_numbered(edge, session);
        }
    }

    /// The aggregator's next `count` updates find the disk full.
    pub fn fail_stores(&mut self, count: u32) {
        self.aggregator.fail_stores(count);
    }

    /// The aggregator's next aggregation gives no model.
    pub fn fail_aggregation(&mut self) {
        self.aggregator.fail_aggregation();
    }

    /// The edge's next training ends in a decline.
    pub fn spend_budget(&mut self, edge: usize) {
        self.edges[edge].spend_budget();
    }

    /// The edge's trainings take that long from now on.
    pub fn set_training_time(&mut self, edge: usize, span: Duration) {
        self.edges[edge].set_training_time(span);
    }

    /// The edge's session says something that its participant did not.
    pub fn forge(&mut self, edge: usize, forgery: Forgery) {
        self.forge_update(edge, forgery);
    }

    /// The end of all faults: calm network, no partition, normal disks and trainings. What is down comes back in its own time.
    /// Every session ends: a message lost within one that goes on, which a real transport does not know, may be missed for ever.
    pub fn heal(&mut self) {
        (0..self.edges.len()).for_each(|edge| self.break_session(edge));
        self.weather = Weather::Calm;
        self.partitioned.clear();
        self.aggregator.heal();
        self.edges.iter_mut().for_each(Edge::heal);
    }

    /// The aggregator is asked to open no further round.
    pub fn stop(&mut self) {
        self.aggregator_input(round::Input::Stop);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::ToAggregator { edge, session, frame } => self.aggregator_receives(edge, session, frame),
            Event::AggregatorSync { life } => self.aggregator_synced(life),
            Event::AggregatorAnswer { life, input } if self.aggregator.lives(life) => {
                self.aggregator_input(input);
            }
            Event::AggregatorNotices { edge, session } => self.aggregator_notices(edge, session),
            Event::RestartAggregator => self.aggregator_restart(),
            Event::ToEdge { edge, session, frame } => self.edge_receives(edge, session, frame),
            Event::EdgeSync { edge, life } => self.edge_synced(edge, life),
            Event::EdgeAnswer { edge, life, input } if self.edges[edge].lives(life) => {
                self.edge_input(edge, input);
            }
            Event::EdgeNotices { edge, session } => self.edge_notices(edge, session),
            Event::EdgeTrained { edge, life, job } if self.edges[edge].lives(life) => {
                self.edge_trained(edge, job);
            }
            Event::Connect { edge, life } if self.edges[edge].lives(life) => self.edge_connects(edge),
            Event::WelcomeOverdue { edge, session } => self.welcome_overdue(edge, session),
            Event::RestartEdge { edge } => self.edge_restart(edge),
            // The life it belonged to is over.
            Event::AggregatorAnswer { .. }
            | Event::EdgeAnswer { .. }
            | Event::EdgeTrained { .. }
            | Event::Connect { .. } => {}
        }
    }

    fn later(&mut self, span: Duration, event: Event) {
        self.at(self.now.after(span), event);
    }

    fn at(&mut self, at: Moment, event: Event) {
        self.sequence += 1;
        self.queue.insert((at, self.sequence), event);
    }

    fn millis(&mut self, range: std::ops::RangeInclusive<u64>) -> Duration {
        Duration::from_millis(self.rng.random_range(range))
    }

    fn is_partitioned(&self, edge: usize) -> bool {
        self.partitioned.get(&edge).is_some_and(|until| self.now < *until)
    }

    fn break_numbered(&mut self, edge: usize, session: u64) {
        let (one, other) = (self.millis(0..=2000), self.millis(0..=2000));
        self.later(one, Event::AggregatorNotices { edge, session });
        self.later(other, Event::EdgeNotices { edge, session });
    }

    fn send(&mut self, edge: usize, session: u64, frame: &Frame, event: impl Fn(Frame) -> Event) {
        let weather = self.weather;
        let copies = if self.is_partitioned(edge) {
            Vec::new()
        } else {
            weather.copies(&mut self.rng)
        };
        if copies.is_empty() && weather.breaks(&mut self.rng) {
            self.break_numbered(edge, session);
        }
        for delay in copies {
            self.later(delay, event(frame.clone()));
        }
    }

    fn send_to_aggregator(&mut self, edge: usize, session: u64, message: &ToAggregator) {
        match codec::encode_to_aggregator(message) {
            Ok(encoded) => {
                let frame = Frame::of(&encoded);
                self.send(edge, session, &frame, |frame| Event::ToAggregator {
                    edge,
                    session,
                    frame,
                });
            }
            Err(error) => self.broken_codec(&error),
        }
    }

    fn send_to_edge(&mut self, edge: usize, session: u64, message: &ToEdge) {
        match codec::encode_to_edge(message) {
            Ok(encoded) => {
                let frame = Frame::of(&encoded);
                self.send(edge, session, &frame, |frame| Event::ToEdge {
                    edge,
                    session,
                    frame,
                });
            }
            Err(error) => self.broken_codec(&error),
        }
    }

    fn broken_codec(&mut self, error: &CodecError) {
        self.facts.push(Fact::CodecFailed {
            error: error.to_string(),
        });
    }
}

/// The name of an edge by its number.
///
/// # Panics
/// Never: letters, a hyphen and digits make a name.
pub fn node(edge: usize) -> NodeId {
    #[expect(clippy::expect_used, reason = "letters, a hyphen and digits")]
    NodeId::new(format!("edge-{edge}")).expect("a valid name")
}

/// The number of an edge by its name.
fn number(node: &NodeId) -> Option<usize> {
    node.as_str().strip_prefix("edge-")?.parse().ok()
}

/// Layout digests and the like: the same everywhere in a world.
fn named(name: &str) -> Digest {
    Digest::of(name.as_bytes())
}
