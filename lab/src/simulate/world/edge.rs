//! An edge's program in a simulated world: what a driver does around [`Participant`], and no more.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use rand::Rng;
use theriac_protocol::codec;
use theriac_protocol::message::{
    AnnounceV1, DeclineReason, Encoding, FetchModelV1, GateVerdict, HelloV1, PROTOCOL_MAX, PROTOCOL_MIN,
    PrivacyClaimV1, ToAggregator, ToEdge, UpdateV1,
};
use theriac_protocol::participant::{
    Input, LayoutDigests, Output, Participant, ParticipantConfig, ParticipantStatus,
};
use theriac_protocol::round::BaseModel;
use theriac_protocol::units::{Delta, Digest, Epsilon, ModelVersion, Moment, NoiseMultiplier, Round};

use super::{Event, Fact, Frame, World, named, node};
use crate::simulate::disk::{Disk, Store};

/// The model that everybody holds from the beginning.
pub(super) const INITIAL_MODEL: BaseModel = BaseModel {
    version: ModelVersion(0),
    digest: Digest([0; 32]),
};

/// A session without a Welcome is given up after this.
const WELCOME_PATIENCE: Duration = Duration::from_secs(4);

/// Time of a training, unless an operation changes it.
const TRAINING_TIME: Duration = Duration::from_millis(400);

/// What is on an edge's disk.
#[derive(Debug)]
pub struct EdgeStore {
    /// Encoded updates by round. A row of an older round than the last is one whose removal a crash has forgotten.
    pub outbox: BTreeMap<Round, (UpdateV1, Bytes)>,
    /// The model it holds.
    pub model: BaseModel,
    /// The ledger: what has been paid for.
    pub charged: BTreeSet<(Round, u64)>,
}

/// One change of an edge's disk.
#[derive(Debug)]
pub(super) enum Write {
    Charge { round: Round, nonce: u64 },
    Outbox { header: UpdateV1, payload: Bytes },
    DropOutbox { round: Round },
    Model(BaseModel),
}

impl Store<Write> for EdgeStore {
    fn apply(&mut self, write: &Write) {
        match write {
            Write::Charge { round, nonce } => {
                self.charged.insert((*round, *nonce));
            }
            Write::Outbox { header, payload } => {
                self.outbox
                    .insert(header.round, (header.clone(), payload.clone()));
            }
            Write::DropOutbox { round } => {
                self.outbox.remove(round);
            }
            Write::Model(model) => self.model = *model,
        }
    }
}

/// What follows a durable write.
#[derive(Debug)]
pub(super) enum Then {
    Nothing,
    Train(Job),
    Answer(Input),
}

/// A training under way.
#[derive(Debug, Clone)]
pub(super) struct Job {
    announce: AnnounceV1,
}

/// The program and its disk.
#[derive(Debug)]
pub(super) struct Edge {
    disk: Disk<EdgeStore, Write, Then>,
    last_sync: Moment,
    life: u64,
    participant: Option<Participant>,
    session: Option<u64>,
    /// Trainings that were cancelled and have not been stopped yet.
    cancelled: BTreeSet<Round>,
    /// The header of the model that came last.
    arrived: Option<BaseModel>,
    training_time: Duration,
    budget_spent: bool,
}

impl Edge {
    pub(super) fn install(now: Moment) -> Self {
        let store = EdgeStore {
            outbox: BTreeMap::new(),
            model: INITIAL_MODEL,
            charged: BTreeSet::new(),
        };
        Self {
            disk: Disk::new(store),
            last_sync: now,
            life: 0,
            participant: Some(Participant::new(config(), INITIAL_MODEL, None, now)),
            session: None,
            cancelled: BTreeSet::new(),
            arrived: None,
            training_time: TRAINING_TIME,
            budget_spent: false,
        }
    }

    pub(super) fn store(&self) -> &EdgeStore {
        self.disk.durable()
    }

    pub(super) fn status(&self) -> Option<ParticipantStatus> {
        self.participant.as_ref().map(Participant::status)
    }

    pub(super) fn timeout(&self) -> Option<Moment> {
        self.participant.as_ref().and_then(Participant::poll_timeout)
    }

    pub(super) fn is_up(&self) -> bool {
        self.participant.is_some()
    }

    pub(super) fn lives(&self, life: u64) -> bool {
        self.is_up() && self.life == life
    }

    pub(super) fn session(&self) -> Option<u64> {
        self.session
    }

    pub(super) fn spend_budget(&mut self) {
        self.budget_spent = true;
    }

    pub(super) fn set_training_time(&mut self, span: Duration) {
        self.training_time = span;
    }

    pub(super) fn heal(&mut self) {
        self.training_time = TRAINING_TIME;
        self.budget_spent = false;
    }
}

impl World {
    pub(super) fn edge_crash(&mut self, edge: usize) {
        let program = &mut self.edges[edge];
        program.participant = None;
        program.life += 1;
        program.cancelled.clear();
        program.arrived = None;
        let session = program.session.take();
        let survivors = self.rng.random_range(0..=program.disk.pending());
        for write in program.disk.crash(survivors) {
            self.edge_wrote(edge, &write);
        }
        if let Some(session) = session {
            self.break_numbered(edge, session);
        }
    }

    pub(super) fn edge_restart(&mut self, edge: usize) {
        let now = self.now;
        let program = &mut self.edges[edge];
        let store = program.disk.durable();
        let last = store.outbox.last_key_value();
        let outbox = last.map(|(round, (header, _))| (*round, header.nonce, header.payload_digest));
        program.participant = Some(Participant::new(config(), store.model, outbox, now));
        program.last_sync = now;
        self.facts.push(Fact::EdgeRestarted { node: node(edge) });
        self.connect_soon(edge);
        self.edge_outputs(edge);
    }

    pub(super) fn edge_tick(&mut self, edge: usize) {
        let now = self.now;
        if let Some(participant) = &mut self.edges[edge].participant {
            participant.handle_timeout(now);
        }
        self.edge_outputs(edge);
    }

    pub(super) fn edge_input(&mut self, edge: usize, input: Input) {
        let now = self.now;
        if let Some(participant) = &mut self.edges[edge].participant {
            participant.handle(now, input);
        }
        self.edge_outputs(edge);
    }

    pub(super) fn edge_receives(&mut self, edge: usize, session: u64, frame: Frame) {
        if self.edges[edge].session != Some(session) {
            return;
        }
        let input = match codec::decode_to_edge(frame.kind, frame.body) {
            Ok(ToEdge::Welcome(welcome)) => Input::Welcome(welcome),
            Ok(ToEdge::Refusal(refusal)) => Input::Refusal(refusal),
            Ok(ToEdge::Announce(announce)) => Input::Announce(announce),
            Ok(ToEdge::Receipt(receipt)) => Input::Receipt(receipt),
            Ok(ToEdge::Closed(closed)) => Input::Closed(closed),
            Ok(ToEdge::Model(header, _)) => {
                let model = BaseModel {
                    version: header.version,
                    digest: header.payload_digest,
                };
                self.edges[edge].arrived = Some(model);
                Input::Model { header }
            }
            // This edge's Hello does not ask for it.
            Ok(
                ToEdge::Seal(_)
                | ToEdge::Candidate(..)
                | ToEdge::Fleet(_)
                | ToEdge::LeaseGranted(_)
                | ToEdge::LeaseRefused(_),
            ) => return,
            Ok(ToEdge::Goodbye(_)) => return self.edge_notices(edge, session),
            Err(error) => return self.broken_codec(&error),
        };
        self.edge_input(edge, input);
    }

    /// A session has ended, and the edge notices.
    pub(super) fn edge_notices(&mut self, edge: usize, session: u64) {
        if self.edges[edge].session == Some(session) {
            self.edges[edge].session = None;
            self.edge_input(edge, Input::Disconnected);
            self.connect_soon(edge);
        }
    }

    pub(super) fn welcome_overdue(&mut self, edge: usize, session: u64) {
        let welcomed = self.edges[edge].status().is_some_and(|status| status.welcomed);
        if !welcomed {
            self.edge_notices(edge, session);
        }
    }

    pub(super) fn connect_soon(&mut self, edge: usize) {
        let (delay, life) = (self.millis(50..=1000), self.edges[edge].life);
        self.later(delay, Event::Connect { edge, life });
    }

    pub(super) fn edge_connects(&mut self, edge: usize) {
        if self.edges[edge].session.is_some() {
            return;
        }
        if !self.aggregator.is_up() || self.is_partitioned(edge) {
            return self.connect_soon(edge);
        }
        self.sessions += 1;
        let session = self.sessions;
        self.edges[edge].session = Some(session);
        self.edge_input(edge, Input::Connected);
        let hello = ToAggregator::Hello(self.hello_of(edge));
        self.send_to_aggregator(edge, session, &hello);
        self.later(WELCOME_PATIENCE, Event::WelcomeOverdue { edge, session });
    }

    pub(super) fn edge_synced(&mut self, edge: usize, life: u64) {
        if !self.edges[edge].lives(life) {
            return;
        }
        let Some((writes, then)) = self.edges[edge].disk.sync_next() else {
            return;
        };
        for write in &writes {
            self.edge_wrote(edge, write);
        }
        match then {
            Then::Nothing => {}
            Then::Train(job) => {
                let span = self.edges[edge].training_time + self.millis(0..=200);
                self.later(span, Event::EdgeTrained { edge, life, job });
            }
            Then::Answer(input) => {
                let delay = self.millis(0..=5);
                self.later(delay, Event::EdgeAnswer { edge, life, input });
            }
        }
    }

    pub(super) fn edge_trained(&mut self, edge: usize, job: Job) {
        let round = job.announce.round;
        // A cancelled training may be too far to be stopped.
        if self.edges[edge].cancelled.remove(&round) && self.rng.random_ratio(1, 2) {
            return;
        }
        // Noise differs every time, so a second training for one charge would show.
        let payload = Bytes::copy_from_slice(&self.rng.random::<u64>().to_le_bytes());
        let header = update_header(&job.announce, &payload);
        let answer = Input::Trained {
            round,
            nonce: header.nonce,
            payload_digest: header.payload_digest,
        };
        self.edge_write(edge, Write::Outbox { header, payload }, Then::Answer(answer));
    }

    fn hello_of(&self, edge: usize) -> HelloV1 {
        let program = &self.edges[edge];
        let held = program.status().map_or(INITIAL_MODEL, |status| status.model);
        HelloV1 {
            protocol_min: PROTOCOL_MIN,
            protocol_max: PROTOCOL_MAX,
            software: "simulated".to_owned(),
            features: Vec::new(),
            profile: "simulated".to_owned(),
            profile_digest: Digest::default(),
            layout_digest: named("model"),
            noise_multiplier_min: config().noise_multiplier_min,
            ledger_head: Digest::default(),
            ledger_records: u64::try_from(program.store().charged.len()).unwrap_or(u64::MAX),
            model_version: held.version,
            model_digest: held.digest,
            audit_checkpoint: None,
            receipt_missing: program
                .participant
                .as_ref()
                .and_then(Participant::receipt_missing),
        }
    }

    fn edge_outputs(&mut self, edge: usize) {
        while let Some(output) = self.edges[edge]
            .participant
            .as_mut()
            .and_then(Participant::poll_output)
        {
            self.edge_output(edge, output);
        }
    }

    fn edge_output(&mut self, edge: usize, output: Output) {
        match output {
            Output::Train { announce } => self.train(edge, announce),
            Output::CancelTraining { round } => {
                self.edges[edge].cancelled.insert(round);
            }
            Output::SendUpdate { round } => self.send_update(edge, round),
            Output::SendDecline(decline) => self.say(edge, &ToAggregator::Decline(decline)),
            Output::FetchModel { version } => {
                self.say(edge, &ToAggregator::FetchModel(FetchModelV1 { version }));
            }
            Output::Judge { version } => self.judge(edge, version),
            Output::SendVerdict(verdict) => self.say(edge, &ToAggregator::Verdict(verdict)),
            Output::DropOutbox { round } => self.edge_write(edge, Write::DropOutbox { round }, Then::Nothing),
            Output::Report(_) => {}
        }
    }

    fn say(&mut self, edge: usize, message: &ToAggregator) {
        if let Some(session) = self.edges[edge].session {
            self.send_to_aggregator(edge, session, message);
        }
    }

    fn train(&mut self, edge: usize, announce: AnnounceV1) {
        let (round, nonce) = (announce.round, announce.nonce);
        self.facts.push(Fact::TrainingAsked {
            node: node(edge),
            round,
            nonce,
        });
        let spent = std::mem::take(&mut self.edges[edge].budget_spent);
        // Paid for and nothing to show: a crash fell between charge and outbox. The charge is not used twice.
        let paid = self.edges[edge].store().charged.contains(&(round, nonce));
        if spent || paid {
            let reason = if spent {
                DeclineReason::BudgetSpent
            } else {
                DeclineReason::TooFewBlocks
            };
            let (delay, life) = (self.millis(0..=50), self.edges[edge].life);
            let input = Input::CannotTrain { round, nonce, reason };
            return self.later(delay, Event::EdgeAnswer { edge, life, input });
        }
        self.edges[edge].cancelled.remove(&round);
        self.edge_write(
            edge,
            Write::Charge { round, nonce },
            Then::Train(Job { announce }),
        );
    }

    fn send_update(&mut self, edge: usize, round: Round) {
        let Some((header, payload)) = self.edges[edge].store().outbox.get(&round).cloned() else {
            return self.facts.push(Fact::OutboxMissing {
                node: node(edge),
                round,
            });
        };
        let (nonce, digest) = (header.nonce, header.payload_digest);
        self.facts.push(Fact::UpdateSent {
            node: node(edge),
            round,
            nonce,
            digest,
        });
        self.say(edge, &ToAggregator::Update(header, payload));
    }

    fn judge(&mut self, edge: usize, version: ModelVersion) {
        let Some(model) = self.edges[edge].arrived.filter(|model| model.version == version) else {
            return;
        };
        let verdict = if self.rng.random_ratio(1, 4) {
            GateVerdict::WorseOnTail
        } else {
            GateVerdict::Accepted
        };
        self.edge_write(
            edge,
            Write::Model(model),
            Then::Answer(Input::Judged { version, verdict }),
        );
    }

    fn edge_write(&mut self, edge: usize, write: Write, then: Then) {
        let at = self
            .now
            .after(self.millis(1..=40))
            .max(self.edges[edge].last_sync);
        let program = &mut self.edges[edge];
        program.last_sync = at;
        program.disk.begin(vec![write], then);
        let life = program.life;
        self.at(at, Event::EdgeSync { edge, life });
    }

    fn edge_wrote(&mut self, edge: usize, write: &Write) {
        if let Write::Outbox { header, .. } = write {
            self.facts.push(Fact::OutboxDurable {
                node: node(edge),
                round: header.round,
                nonce: header.nonce,
                digest: header.payload_digest,
            });
        }
    }
}

/// The update that answers an announcement.
#[expect(clippy::expect_used, reason = "constants within their ranges")]
pub(super) fn update_header(announce: &AnnounceV1, payload: &[u8]) -> UpdateV1 {
    UpdateV1 {
        round: announce.round,
        nonce: announce.nonce,
        kind: announce.kind,
        base_digest: announce.base_digest,
        layout_digest: announce.layout_digest,
        values: announce.values,
        encoding: Encoding::F32,
        payload_digest: Digest::of(payload),
        blocks_bound: announce.blocks_max,
        privacy: PrivacyClaimV1 {
            clip_norm: announce.clip_norm,
            noise_multiplier: announce.noise_multiplier,
            epsilon_spent: Epsilon::new(1.0).expect("1 is above 0"),
            delta: Delta::new(1e-6).expect("1e-6 is in (0, 1)"),
            ledger_head: Digest::default(),
            ledger_records: 1,
        },
    }
}

#[expect(clippy::expect_used, reason = "constants within their ranges")]
fn config() -> ParticipantConfig {
    ParticipantConfig {
        noise_multiplier_min: NoiseMultiplier::new(0.5).expect("0.5 is above 0"),
        clip_norm_max: None,
        layout_digests: LayoutDigests {
            model: named("model"),
            moments: named("moments"),
            delta: named("delta"),
            linear_model: named("linear model"),
            gradient: named("gradient"),
        },
    }
}
