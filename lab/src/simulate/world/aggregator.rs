//! The aggregator's program in a simulated world: what a driver does around [`RoundMachine`], and no more.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use rand::Rng;
use theriac_protocol::codec;
use theriac_protocol::message::{
    AnnounceV1, ModelV1, ReceiptV1, ToAggregator, ToEdge, UpdateKind, UpdateV1, WelcomeV1,
};
use theriac_protocol::refusal::{RefusalCode, RefusalV1, RoundOutcome};
use theriac_protocol::round::{
    BaseModel, Input, OpenRound, Output, RoundConfig, RoundMachine, RoundStatus, RoundTerms,
};
use theriac_protocol::units::{
    Digest, L2Norm, ModelVersion, Moment, NodeId, NoiseMultiplier, Round, Timestamp,
};

use super::edge::INITIAL_MODEL;
use super::{Event, Fact, Forgery, Frame, World, WorldConfig, named, node, number};
use crate::simulate::disk::{Disk, Store};

/// What is on the aggregator's disk.
#[derive(Debug, Default)]
pub struct AggregatorStore {
    /// Every round that was ever durable.
    pub rounds: BTreeMap<Round, RoundRow>,
    /// Every update, by round and node: unique.
    pub updates: BTreeMap<(Round, NodeId), Digest>,
    /// Every published model.
    pub models: BTreeMap<ModelVersion, (Round, Digest)>,
}

/// A round as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoundRow {
    /// Its nonce.
    pub nonce: u64,
    /// What it builds on.
    pub base: BaseModel,
    /// Whom it was announced to at first.
    pub cohort: BTreeSet<NodeId>,
    /// When it stops collecting.
    pub deadline: Moment,
    /// Whether and how it has ended.
    pub ending: Option<Ending>,
}

/// How a round has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// With a model.
    Published(ModelVersion),
    /// Without.
    Aborted,
}

impl AggregatorStore {
    /// The latest model.
    pub fn base(&self) -> BaseModel {
        self.models
            .last_key_value()
            .map_or(INITIAL_MODEL, |(version, (_, digest))| BaseModel {
                version: *version,
                digest: *digest,
            })
    }

    /// The updates of a round, ordered by node.
    pub fn updates_of(&self, round: Round) -> Vec<(NodeId, Digest)> {
        let rows = self.updates.iter().filter(|((of, _), _)| *of == round);
        rows.map(|((_, node), digest)| (node.clone(), *digest)).collect()
    }

    /// The round that is open, if any.
    pub fn open(&self) -> Option<(Round, &RoundRow)> {
        let (round, row) = self.rounds.last_key_value()?;
        row.ending.is_none().then_some((*round, row))
    }
}

/// One change of the aggregator's disk.
#[derive(Debug)]
pub(super) enum Write {
    Open {
        round: Round,
        row: RoundRow,
    },
    Update {
        node: NodeId,
        round: Round,
        digest: Digest,
    },
    Publish {
        round: Round,
        version: ModelVersion,
        digest: Digest,
        members: Vec<(NodeId, Digest)>,
    },
    Abort {
        round: Round,
    },
}

impl Store<Write> for AggregatorStore {
    fn apply(&mut self, write: &Write) {
        match write {
            Write::Open { round, row } => {
                self.rounds.insert(*round, row.clone());
            }
            // First come, first kept, as a unique key has it.
            Write::Update { node, round, digest } => {
                self.updates.entry((*round, node.clone())).or_insert(*digest);
            }
            Write::Publish {
                round,
                version,
                digest,
                ..
            } => {
                self.models.insert(*version, (*round, *digest));
                self.end(*round, Ending::Published(*version));
            }
            Write::Abort { round } => self.end(*round, Ending::Aborted),
        }
    }
}

impl AggregatorStore {
    fn end(&mut self, round: Round, ending: Ending) {
        if let Some(row) = self.rounds.get_mut(&round) {
            row.ending = Some(ending);
        }
    }
}

/// The program and its disk.
#[derive(Debug)]
pub(super) struct Aggregator {
    disk: Disk<AggregatorStore, Write, Input>,
    last_sync: Moment,
    life: u64,
    machine: Option<RoundMachine>,
    config: RoundConfig,
    /// The admitted session of each edge.
    sessions: BTreeMap<usize, u64>,
    store_failures: u32,
    aggregation_fails: bool,
}

impl Aggregator {
    pub(super) fn install(config: &WorldConfig, nonce_seed: [u8; 32], now: Moment) -> Self {
        let config = RoundConfig {
            quorum: config.quorum,
            byzantine: 0,
            deadline: config.deadline,
            pause: config.pause,
            late_updates: false,
            updates_max: usize::MAX,
            rounds_max: None,
            terms: terms(),
        };
        let machine = RoundMachine::new(config.clone(), INITIAL_MODEL, Round(0), nonce_seed, now);
        Self {
            disk: Disk::new(AggregatorStore::default()),
            last_sync: now,
            life: 0,
            machine: Some(machine),
            config,
            sessions: BTreeMap::new(),
            store_failures: 0,
            aggregation_fails: false,
        }
    }

    pub(super) fn store(&self) -> &AggregatorStore {
        self.disk.durable()
    }

    pub(super) fn status(&self) -> Option<RoundStatus> {
        self.machine.as_ref().map(RoundMachine::status)
    }

    pub(super) fn timeout(&self) -> Option<Moment> {
        self.machine.as_ref().and_then(RoundMachine::poll_timeout)
    }

    pub(super) fn is_up(&self) -> bool {
        self.machine.is_some()
    }

    pub(super) fn lives(&self, life: u64) -> bool {
        self.is_up() && self.life == life
    }

    pub(super) fn session(&self, edge: usize) -> Option<u64> {
        self.sessions.get(&edge).copied()
    }

    pub(super) fn fail_stores(&mut self, count: u32) {
        self.store_failures = count;
    }

    pub(super) fn fail_aggregation(&mut self) {
        self.aggregation_fails = true;
    }

    pub(super) fn heal(&mut self) {
        self.store_failures = 0;
        self.aggregation_fails = false;
    }
}

impl World {
    pub(super) fn aggregator_crash(&mut self) {
        let aggregator = &mut self.aggregator;
        aggregator.machine = None;
        aggregator.life += 1;
        let survivors = self.rng.random_range(0..=aggregator.disk.pending());
        for write in aggregator.disk.crash(survivors) {
            self.aggregator_wrote(write);
        }
        for (edge, session) in std::mem::take(&mut self.aggregator.sessions) {
            self.break_numbered(edge, session);
        }
    }

    pub(super) fn aggregator_restart(&mut self) {
        let now = self.now;
        // The seed is another one: an open round's nonce must come from the disk.
        let nonce_seed = self.rng.random();
        let aggregator = &mut self.aggregator;
        let store = aggregator.disk.durable();
        let config = aggregator.config.clone();
        let open = store.open().map(|(round, row)| OpenRound {
            round,
            nonce: row.nonce,
            base: row.base,
            cohort: row.cohort.clone(),
            stored: store.updates_of(round).into_iter().collect(),
            declined: BTreeSet::new(),
            refused: BTreeSet::new(),
            faulty: BTreeSet::new(),
            remaining: row.deadline.since(now),
        });
        let last = store
            .rounds
            .last_key_value()
            .map_or(Round(0), |(round, _)| *round);
        let resumed = open.as_ref().map(|open| (open.round, open.nonce));
        let machine = match open {
            Some(open) => RoundMachine::resume(config, open, nonce_seed, now),
            None => RoundMachine::new(config, store.base(), last, nonce_seed, now),
        };
        aggregator.machine = Some(machine);
        aggregator.last_sync = now;
        self.facts.push(Fact::AggregatorRestarted { resumed });
        self.aggregator_outputs();
    }

    pub(super) fn aggregator_tick(&mut self) {
        let now = self.now;
        if let Some(machine) = &mut self.aggregator.machine {
            machine.handle_timeout(now);
        }
        self.aggregator_outputs();
    }

    pub(super) fn aggregator_input(&mut self, input: Input) {
        let now = self.now;
        if let Some(machine) = &mut self.aggregator.machine {
            machine.handle(now, input);
        }
        self.aggregator_outputs();
    }

    pub(super) fn aggregator_receives(&mut self, edge: usize, session: u64, frame: Frame) {
        if !self.aggregator.is_up() {
            return;
        }
        let message = match codec::decode_to_aggregator(frame.kind, frame.body) {
            Ok(message) => message,
            Err(error) => return self.broken_codec(&error),
        };
        if let ToAggregator::Hello(_) = message {
            return self.hello(edge, session);
        }
        if self.aggregator.session(edge) != Some(session) {
            // No admitted session: a real transport would not have let it through.
            return;
        }
        match message {
            ToAggregator::Hello(_)
            | ToAggregator::Verdict(_)
            | ToAggregator::Guarantee(_)
            | ToAggregator::Appraisal(_)
            | ToAggregator::Health(_)
            | ToAggregator::LeaseRequest(_)
            | ToAggregator::LeaseRelease(_) => {}
            ToAggregator::Update(header, payload) => self.update(edge, &header, &payload),
            ToAggregator::Decline(decline) => {
                let (round, reason) = (decline.round, decline.reason);
                self.aggregator_input(Input::Declined {
                    node: node(edge),
                    round,
                    reason,
                });
            }
            ToAggregator::FetchModel(fetch) => self.send_model(edge, session, fetch.version),
            ToAggregator::Goodbye => self.aggregator_notices(edge, session),
        }
    }

    /// A session has ended, and the aggregator notices.
    pub(super) fn aggregator_notices(&mut self, edge: usize, session: u64) {
        if self.aggregator.session(edge) == Some(session) {
            self.aggregator.sessions.remove(&edge);
            self.aggregator_input(Input::Left { node: node(edge) });
        }
    }

    pub(super) fn aggregator_synced(&mut self, life: u64) {
        if !self.aggregator.lives(life) {
            return;
        }
        if let Some((writes, answer)) = self.aggregator.disk.sync_next() {
            for write in writes {
                self.aggregator_wrote(write);
            }
            // Durable, and nobody knows yet: a crash may fall in here.
            let delay = self.millis(0..=5);
            self.later(delay, Event::AggregatorAnswer { life, input: answer });
        }
    }

    pub(super) fn forge_update(&mut self, edge: usize, forgery: Forgery) {
        let (Some(session), Some(machine)) = (self.aggregator.session(edge), &self.aggregator.machine) else {
            return;
        };
        let Some(announce) = machine.announcement(self.now) else {
            return;
        };
        let payload = Bytes::copy_from_slice(&self.rng.random::<u64>().to_le_bytes());
        let mut header = super::edge::update_header(&announce, &payload);
        match forgery {
            Forgery::WrongNonce => header.nonce ^= 1,
            Forgery::WrongBase => header.base_digest = named("another base"),
            Forgery::Early => header.round = announce.round.next(),
            Forgery::OtherBytes => {}
        }
        self.send_to_aggregator(edge, session, &ToAggregator::Update(header, payload));
    }

    fn hello(&mut self, edge: usize, session: u64) {
        if self
            .aggregator
            .session(edge)
            .is_some_and(|known| known >= session)
        {
            // A copy, or older than the session that is there.
            return;
        }
        self.aggregator.sessions.insert(edge, session);
        let now = self.now;
        let Some(machine) = &self.aggregator.machine else {
            return;
        };
        let (base, round) = (machine.status().base, machine.announcement(now));
        if let Some(announce) = &round {
            self.announced(announce);
        }
        let welcome = WelcomeV1 {
            protocol: 1,
            federation: "simulated".to_owned(),
            node: node(edge),
            time: Timestamp::default(),
            frame_bytes_max: 1 << 20,
            model_version: base.version,
            model_digest: base.digest,
            audit_checkpoint: (0, Digest::default()),
            audit_consistency: Vec::new(),
            round,
        };
        self.send_to_edge(edge, session, &ToEdge::Welcome(welcome));
        self.aggregator_input(Input::Admitted { node: node(edge) });
    }

    fn update(&mut self, edge: usize, header: &UpdateV1, payload: &Bytes) {
        if Digest::of(payload) != header.payload_digest {
            return self.refuse(edge, header.round, RefusalCode::DigestMismatch);
        }
        self.aggregator_input(Input::Update {
            node: node(edge),
            round: header.round,
            nonce: header.nonce,
            base_digest: header.base_digest,
            payload_digest: header.payload_digest,
        });
    }

    fn send_model(&mut self, edge: usize, session: u64, version: ModelVersion) {
        let stored = self.aggregator.store().models.get(&version).copied();
        let Some((round, payload_digest)) = stored else {
            let refusal = RefusalV1 {
                code: RefusalCode::OutOfTurn,
                round: None,
                retry_after_ms: 0,
            };
            return self.send_to_edge(edge, session, &ToEdge::Refusal(refusal));
        };
        let header = ModelV1 {
            version,
            round,
            layout_digest: named("model"),
            values: 0,
            payload_digest,
            rule: "mean".to_owned(),
            contributors: 1,
        };
        self.send_to_edge(edge, session, &ToEdge::Model(header, Bytes::new()));
    }

    fn refuse(&mut self, edge: usize, round: Round, code: RefusalCode) {
        let retry_after_ms = if code.retryable() { 500 } else { 0 };
        self.tell(
            edge,
            &ToEdge::Refusal(RefusalV1 {
                code,
                round: Some(round),
                retry_after_ms,
            }),
        );
    }

    fn tell(&mut self, edge: usize, message: &ToEdge) {
        if let Some(session) = self.aggregator.session(edge) {
            self.send_to_edge(edge, session, message);
        }
    }

    fn aggregator_outputs(&mut self) {
        while let Some(output) = self
            .aggregator
            .machine
            .as_mut()
            .and_then(RoundMachine::poll_output)
        {
            self.aggregator_output(output);
        }
    }

    fn aggregator_output(&mut self, output: Output) {
        match output {
            Output::Open { announce, cohort } => {
                let row = RoundRow {
                    nonce: announce.nonce,
                    base: base_of(&announce),
                    cohort: cohort.into_iter().collect(),
                    deadline: self
                        .now
                        .after(Duration::from_millis(u64::from(announce.deadline_ms))),
                    ending: None,
                };
                let round = announce.round;
                self.write(vec![Write::Open { round, row }], Input::Opened { round });
            }
            Output::Announce { to, announce } => {
                self.announced(&announce);
                let message = ToEdge::Announce(announce);
                to.iter()
                    .filter_map(number)
                    .for_each(|edge| self.tell(edge, &message));
            }
            Output::Refuse { node, round, code } => {
                if let Some(edge) = number(&node) {
                    self.refuse(edge, round, code);
                }
            }
            Output::Store {
                node,
                round,
                payload_digest: digest,
            } => self.store(node, round, digest),
            Output::StoreLate { node, round, .. } => {
                // Not asked for: `late_updates` is off.
                let (delay, life) = (self.millis(1..=20), self.aggregator.life);
                let input = Input::StoreFailed { node, round };
                self.later(delay, Event::AggregatorAnswer { life, input });
            }
            Output::Receipt {
                node,
                round,
                payload_digest,
            } => {
                self.facts.push(Fact::ReceiptSent {
                    node: node.clone(),
                    round,
                    digest: payload_digest,
                });
                let receipt = ReceiptV1 {
                    round,
                    payload_digest,
                    leaf_index: 0,
                    ledger_head: Digest::default(),
                    signature: vec![0; 64],
                };
                if let Some(edge) = number(&node) {
                    self.tell(edge, &ToEdge::Receipt(receipt));
                }
            }
            Output::Aggregate { round, base, members } => self.aggregate(round, base, members),
            Output::Publish {
                round,
                version,
                digest,
                members,
            } => {
                let publish = Write::Publish {
                    round,
                    version,
                    digest,
                    members,
                };
                self.write(vec![publish], Input::Published { round });
            }
            Output::Abort { round, reason: _ } => {
                self.write(vec![Write::Abort { round }], Input::Aborted { round });
            }
            Output::Closed { to, closed } => {
                self.facts.push(Fact::ClosedSent { round: closed.round });
                debug_assert!(!matches!(
                    closed.outcome,
                    RoundOutcome::Published(ModelVersion(0))
                ));
                let message = ToEdge::Closed(closed);
                to.iter()
                    .filter_map(number)
                    .for_each(|edge| self.tell(edge, &message));
            }
        }
    }

    fn announced(&mut self, announce: &AnnounceV1) {
        let (round, nonce, base) = (announce.round, announce.nonce, base_of(announce));
        self.facts.push(Fact::Announced { round, nonce, base });
    }

    fn store(&mut self, node: NodeId, round: Round, digest: Digest) {
        if self.aggregator.store_failures > 0 {
            self.aggregator.store_failures -= 1;
            let (delay, life) = (self.millis(1..=20), self.aggregator.life);
            let input = Input::StoreFailed { node, round };
            return self.later(delay, Event::AggregatorAnswer { life, input });
        }
        let write = Write::Update {
            node: node.clone(),
            round,
            digest,
        };
        self.write(vec![write], Input::Stored { node, round });
    }

    /// The stand-in for a rule: a pure function of base and ordered members.
    fn aggregate(&mut self, round: Round, base: BaseModel, members: Vec<(NodeId, Digest)>) {
        let failed = std::mem::take(&mut self.aggregator.aggregation_fails);
        let mut bytes = base.digest.0.to_vec();
        for (node, digest) in &members {
            bytes.extend_from_slice(node.as_str().as_bytes());
            bytes.extend_from_slice(&digest.0);
        }
        let input = if failed {
            Input::AggregationFailed { round }
        } else {
            Input::Aggregated {
                round,
                version: base.version.next(),
                digest: Digest::of(&bytes),
            }
        };
        self.facts.push(Fact::AggregationAsked { round, base, members });
        let (delay, life) = (self.millis(1..=300), self.aggregator.life);
        self.later(delay, Event::AggregatorAnswer { life, input });
    }

    fn write(&mut self, writes: Vec<Write>, answer: Input) {
        let at = self.now.after(self.millis(1..=40)).max(self.aggregator.last_sync);
        self.aggregator.last_sync = at;
        self.aggregator.disk.begin(writes, answer);
        let life = self.aggregator.life;
        self.at(at, Event::AggregatorSync { life });
    }

    fn aggregator_wrote(&mut self, write: Write) {
        self.facts.push(match write {
            Write::Open { round, row } => Fact::RoundDurable {
                round,
                nonce: row.nonce,
                base: row.base,
            },
            Write::Update { node, round, digest } => Fact::UpdateDurable { node, round, digest },
            Write::Publish {
                round,
                version,
                digest,
                members,
            } => Fact::PublishDurable {
                round,
                version,
                digest,
                members,
            },
            Write::Abort { round } => Fact::AbortDurable { round },
        });
    }
}

fn base_of(announce: &AnnounceV1) -> BaseModel {
    BaseModel {
        version: announce.base_version,
        digest: announce.base_digest,
    }
}

#[expect(clippy::expect_used, reason = "constants within their ranges")]
fn terms() -> RoundTerms {
    RoundTerms {
        kind: UpdateKind::Moments,
        values: 2,
        layout_digest: named("moments"),
        clip_norm: L2Norm::new(1.0).expect("1 is above 0"),
        noise_multiplier: NoiseMultiplier::new(1.0).expect("1 is above 0"),
        block_rows: 60,
        blocks_min: 1,
        blocks_max: 4,
    }
}
