//! The one task that owns the round machine: sockets and timers in, what the machine asks for out.
//!
//! Nothing here waits for the disk or computes: writes, reads and the aggregation run elsewhere and come back as inputs.
//! State is bounded by the number of sessions, each with an outbox of [`OUTBOX_MAX`] messages; an edge that lets
//! it fill up is closed.

mod carry_out;
mod compute;
mod fleet;
mod link;
mod panel;
mod work;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use theriac_audit::leaf::AuditEvent;
use theriac_protocol::message::{AnnounceV1, AppraisalV1, DeclineReason, GuaranteeV1, UpdateV1};
use theriac_protocol::refusal::{AbortReason, RefusalCode};
use theriac_protocol::round::{Input, PhaseName, RoundConfig, RoundMachine, RoundTerms};
use theriac_protocol::units::{Digest, Moment, NodeId, Round};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use crate::admit::{AdmitError, check_ledger};
use crate::audit::AuditKey;
use crate::central::{Central, CentralStatus, OpenError};
use crate::config::CheckedConfig;
use crate::fleet::{Fleet, FleetStatus};
use crate::floor::FloorSettings;
use crate::metrics::Metrics;
use crate::models::{ModelError, Models};
use crate::robust::Row;
use crate::spill::RoundMemory;
use crate::store::evidence::RoundPlan;
use crate::store::history;
use crate::store::models::{self, ModelRow};
use crate::store::records::{self, LedgerHead, Registry};
use crate::store::rounds::{self, RoundRule, StoredUpload};
use crate::store::{Store, StoreError, Urgency};
use crate::validate::ValidatedUpdate;
use crate::validation::ValidationTerms;

pub(crate) use fleet::OfFleet;
pub(crate) use link::refusal;
pub use link::{Arrival, Link, OUTBOX_MAX};
use work::Done;

/// Inputs that may wait for the driver; more make the sessions wait.
pub(crate) const INPUTS_MAX: usize = 1_024;
/// Most bytes of stored updates that are kept in memory until the round is combined; the rest is read back.
const CACHE_BYTES_MAX: usize = 64 << 20;
/// Name of the meta row with the digest of the terms that rounds ran under last.
const META_TERMS: &str = "terms_digest";

/// Why the driver cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DriverError {
    /// The store cannot be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The model in force cannot be loaded.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The ledger of the centre's noise cannot be used.
    #[error(transparent)]
    Central(#[from] OpenError),
    /// The update's layout cannot be announced.
    #[error(transparent)]
    Layout(#[from] crate::layout::LayoutError),
    /// The model in force has another layout than the configuration.
    #[error(
        "the store's model has layout {found}, the configuration makes {expected}: [model] was changed after `init`"
    )]
    OtherModel {
        /// Of the configuration.
        expected: Digest,
        /// Of the store.
        found: Digest,
    },
}

/// What sessions tell the driver.
#[derive(Debug)]
pub(crate) enum DriverInput {
    /// A site said Hello and fits; the driver decides on its ledger and answers with a Welcome through the link.
    Arrived {
        arrival: Box<Arrival>,
        reply: oneshot::Sender<Result<(), AdmitError>>,
    },
    /// A session has ended.
    Left { node: NodeId, session: u64 },
    /// An update for the round that is open when it passed validation; without a validated form only the header, for the
    /// machine to refuse it by its round.
    Update {
        node: NodeId,
        header: Box<UpdateV1>,
        validated: Option<Box<ValidatedUpdate>>,
    },
    /// A site has said what it guarantees.
    Declared {
        node: NodeId,
        guarantee: Box<GuaranteeV1>,
    },
    /// An update was refused for good, and that is on record.
    Refused {
        node: NodeId,
        round: Round,
        code: RefusalCode,
    },
    /// A site says what a candidate does on its rows.
    Appraised { node: NodeId, appraisal: AppraisalV1 },
    /// A site speaks to the fleet.
    OfFleet { node: NodeId, said: OfFleet },
    /// A node takes no part.
    Declined {
        node: NodeId,
        round: Round,
        reason: DeclineReason,
    },
}

/// The driver at a glance, for the page.
#[derive(Debug, Clone)]
pub struct DriverStatus {
    /// Where the machine is.
    pub phase: PhaseName,
    /// The round at hand.
    pub round: Round,
    /// The model in force.
    pub model_version: u64,
    /// Connected nodes, in order.
    pub connected: std::collections::BTreeSet<NodeId>,
    /// Updates of the round at hand.
    pub stored: usize,
    /// Rounds that published, in the store's life.
    pub published: u64,
    /// Rounds that were aborted, in the store's life.
    pub aborted: u64,
    /// Connected sites that a round needs.
    pub quorum: usize,
    /// Noise of the centre and what it has spent; `None`: off.
    pub central: Option<CentralStatus>,
    /// What validators made of the last candidate, in words; `None`: none was asked since the start.
    pub validation: Option<String>,
    /// How the fleet is; `None`: no account is kept of it.
    pub fleet: Option<FleetStatus>,
}

/// Shared views that the driver keeps up to date.
#[derive(Debug, Clone)]
pub(crate) struct Views {
    pub(crate) status: Arc<Mutex<DriverStatus>>,
    pub(crate) registry: watch::Receiver<Arc<Registry>>,
    pub(crate) terms: watch::Receiver<Option<Arc<AnnounceV1>>>,
    /// Terms of the round whose late updates are taken.
    pub(crate) late_terms: watch::Receiver<Option<Arc<AnnounceV1>>>,
}

/// Owns the machine.
#[derive(Debug)]
pub(crate) struct Driver {
    machine: RoundMachine,
    config: RoundConfig,
    rule: RoundRule,
    spec: Arc<crate::layout::ModelSpec>,
    federation: String,
    frame_bytes_max: u32,
    cache_bytes_max: usize,
    nonce_seed: [u8; 32],
    start: Instant,
    store: Store,
    models: Arc<Models>,
    key: Arc<AuditKey>,
    metrics: Metrics,
    links: BTreeMap<NodeId, Link>,
    /// What each site has declared.
    guarantees: BTreeMap<NodeId, GuaranteeV1>,
    floor: FloorSettings,
    /// Account of the fleet; `None`: off.
    fleet: Option<Fleet>,
    central: Option<Central>,
    ledgers: BTreeMap<NodeId, LedgerHead>,
    receipts: BTreeMap<(Round, NodeId), StoredUpload>,
    cache: BTreeMap<NodeId, Row>,
    cache_bytes: usize,
    /// Updates on their way to the disk.
    storing: usize,
    rounds_kept: u64,
    records_kept: u64,
    /// With what a round is combined.
    plan: RoundPlan,
    candidate: Option<work::Computed>,
    /// Who tries a model before it is published; `None`: nobody.
    validation_terms: Option<ValidationTerms>,
    /// A model at its validators.
    waiting: Option<panel::Waiting>,
    /// What they made of the model of the round that ends for it.
    turned_down: Option<panel::TurnedDown>,
    /// The round that could not be combined last, and the word for it.
    failed: Option<(Round, &'static str)>,
    /// Where the rows of a round are while it is combined.
    round_memory: RoundMemory,
    /// Another model is being put in force: until that is done nothing of what the machine asks for is carried out, and nothing new is taken.
    rolling: bool,
    opened_at: Option<Instant>,
    work: JoinSet<Done>,
    status: Arc<Mutex<DriverStatus>>,
    registry: watch::Sender<Arc<Registry>>,
    terms: watch::Sender<Option<Arc<AnnounceV1>>>,
    late_terms: watch::Sender<Option<Arc<AnnounceV1>>>,
}

impl Driver {
    /// Reads where the last process stopped and goes on from there.
    ///
    /// # Errors
    /// [`DriverError`].
    pub(crate) async fn resume(
        config: &CheckedConfig,
        store: Store,
        models: Arc<Models>,
        key: Arc<AuditKey>,
        metrics: Metrics,
    ) -> Result<(Self, Views), DriverError> {
        let layout = config.model.update(config.rounds.kind)?;
        let rounds = &config.rounds;
        let terms = RoundTerms {
            kind: rounds.kind,
            values: layout.values,
            layout_digest: layout.digest,
            clip_norm: rounds.clip_norm,
            noise_multiplier: rounds.noise_multiplier,
            block_rows: rounds.block_rows,
            blocks_min: rounds.blocks_min,
            blocks_max: rounds.blocks_max,
        };
        let round_config = RoundConfig {
            quorum: rounds.quorum,
            byzantine: rounds.rule.withstands(rounds.byzantine),
            deadline: rounds.deadline,
            pause: rounds.pause,
            late_updates: rounds.late_updates,
            updates_max: rounds.updates_max,
            rounds_max: rounds.rounds_max,
            terms,
        };
        let rule = RoundRule {
            rule: rounds.rule,
            byzantine: rounds.byzantine,
            quorum: rounds.quorum,
        };
        let found = store.read(Found::read).await?;
        let values = usize::try_from(found.model.values).unwrap_or(usize::MAX);
        if config.model.layout_of(values) != Some(found.model.layout_digest) {
            let expected = config.model.layout_digest();
            return Err(DriverError::OtherModel {
                expected,
                found: found.model.layout_digest,
            });
        }
        models.load(&store, &found.model).await?;
        let start = Instant::now();
        let now = Moment::default();
        record_terms(&store, &round_config, rule, &found).await?;
        let central = Central::open(config, &store).await?;
        let central_status = central.as_ref().map(Central::status);
        if let Some(central) = &central_status {
            tracing::warn!("{}", central.statement);
        }
        let (machine, receipts) = begin(&store, &round_config, rule, &found, now).await?;
        let fleet = fleet::begin(&store, config.fleet, now).await?;
        let status = Arc::new(Mutex::new(DriverStatus {
            phase: machine.status().phase,
            round: machine.status().round,
            model_version: found.model.version.0,
            connected: std::collections::BTreeSet::new(),
            stored: machine.status().stored,
            published: found.outcomes.0,
            aborted: found.outcomes.1,
            quorum: rounds.quorum,
            central: central_status,
            validation: None,
            fleet: None,
        }));
        let ledgers = found
            .registry
            .iter()
            .map(|(node, entry)| (node.clone(), entry.ledger))
            .collect();
        let (registry, registry_view) = watch::channel(Arc::new(found.registry));
        let (terms, terms_view) = watch::channel(machine.announcement(now).map(Arc::new));
        let (late_terms, late_terms_view) = watch::channel(None);
        metrics.model_version.set(found.model.version.0);
        let mut driver = Self {
            opened_at: (machine.status().phase == PhaseName::Collecting).then_some(start),
            machine,
            config: round_config,
            rule,
            spec: Arc::new(config.model.clone()),
            federation: config.federation.clone(),
            frame_bytes_max: crate::models::frame_bytes_max(layout.values),
            cache_bytes_max: CACHE_BYTES_MAX
                .min(config.limits.upload_bytes_in_flight_max / 2)
                .min(usize::try_from(config.limits.round_memory_bytes).unwrap_or(usize::MAX)),
            nonce_seed: found.nonce_seed,
            start,
            store,
            models,
            key,
            metrics,
            links: BTreeMap::new(),
            guarantees: found.guarantees,
            floor: config.privacy_floor.clone(),
            fleet,
            central,
            ledgers,
            receipts,
            cache: BTreeMap::new(),
            cache_bytes: 0,
            storing: 0,
            rounds_kept: config.limits.rounds_kept,
            records_kept: config.limits.records_kept,
            plan: RoundPlan {
                rule: rounds.rule,
                byzantine: rounds.byzantine,
                quarantine: config.quarantine,
                optimizer: config.server_optimizer,
                rule_version: crate::evidence::RULE_VERSION,
                central_noise: config.central_noise.is_some(),
                late_updates: rounds.late_updates,
                site_average: rounds.site_average,
                accumulate: rounds.accumulate,
            },
            candidate: None,
            validation_terms: config.validation.clone(),
            waiting: None,
            turned_down: None,
            failed: None,
            round_memory: RoundMemory::of(config),
            rolling: false,
            work: JoinSet::new(),
            status: Arc::clone(&status),
            registry,
            terms,
            late_terms,
        };
        driver.heed_budget();
        driver.heed_validators();
        driver.show_fleet();
        Ok((
            driver,
            Views {
                status,
                registry: registry_view,
                terms: terms_view,
                late_terms: late_terms_view,
            },
        ))
    }

    /// Runs until `shutdown` turns true, then says good-bye to every edge and finishes what is being written.
    pub(crate) async fn run(
        mut self,
        mut inputs: mpsc::Receiver<DriverInput>,
        mut shutdown: watch::Receiver<bool>,
    ) {
        let mut changes = self.store.changes();
        self.pump(None);
        loop {
            let rolling = self.rolling;
            let waiting = self.waiting.as_ref().map(panel::Waiting::timeout);
            let of_fleet = self.fleet_timeout();
            let deadline = [self.machine.poll_timeout(), waiting, of_fleet]
                .into_iter()
                .flatten()
                .min();
            let deadline = deadline.filter(|_| !rolling);
            let deadline = deadline.map(|moment| self.start + moment.0);
            let timer = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                input = inputs.recv(), if !rolling => match input {
                    Some(input) => self.take(input),
                    None => break,
                },
                Some(done) = self.work.join_next() => match done {
                    Ok(done) => self.done(done),
                    Err(error) => tracing::error!(%error, "a task of the driver failed"),
                },
                () = timer => {
                    let now = self.now();
                    self.machine.handle_timeout(now);
                    self.pump(None);
                    self.conclude_validation();
                    self.tell_fleet();
                }
                changed = changes.changed() => if changed.is_ok() {
                    self.refresh();
                },
                _ = shutdown.wait_for(|stop| *stop) => break,
            }
        }
        self.good_bye().await;
    }

    fn take(&mut self, input: DriverInput) {
        let now = self.now();
        match input {
            DriverInput::Arrived { arrival, reply } => self.arrived(*arrival, reply),
            DriverInput::Left { node, session } => self.left(&node, session),
            DriverInput::Declined { node, round, reason } => self.declined(now, node, round, reason),
            DriverInput::Refused { node, round, code } => {
                let faulty = crate::evidence::tells(code.word());
                self.machine.handle(now, Input::Refused { node, round, faulty });
                self.pump(None);
            }
            DriverInput::Appraised { node, appraisal } => self.appraised(&node, &appraisal),
            DriverInput::OfFleet { node, said } => self.of_fleet(&node, said),
            DriverInput::Declared { node, guarantee } => self.declared(node, *guarantee),
            DriverInput::Update {
                node,
                header,
                validated,
            } => self.update(now, node, *header, validated),
        }
    }

    fn update(
        &mut self,
        now: Moment,
        node: NodeId,
        header: UpdateV1,
        validated: Option<Box<ValidatedUpdate>>,
    ) {
        let claim = &header.privacy;
        let offered = LedgerHead {
            head: claim.ledger_head,
            records: claim.ledger_records,
        };
        let repeated = self.receipts.get(&(header.round, node.clone()));
        let is_repeat = repeated.is_some_and(|stored| stored.payload_digest == header.payload_digest);
        // A repeated upload shows the head of its own time, which is behind by design.
        if !is_repeat && let Err(error) = check_ledger(self.ledger(&node), offered) {
            return self.refuse_update(&node, &header, error.code(), &error.to_string());
        }
        if !is_repeat && let Err(error) = self.floor.check(self.guarantees.get(&node)) {
            return self.refuse_update(&node, &header, RefusalCode::PrivacyTooWeak, &error.to_string());
        }
        let open = self
            .terms
            .borrow()
            .as_ref()
            .is_some_and(|terms| terms.round == header.round);
        let late = self
            .late_terms
            .borrow()
            .as_ref()
            .is_some_and(|terms| terms.round == header.round);
        if (open || late) && validated.is_none() && !is_repeat {
            // The round opened, or ended, while the update was judged; nobody has looked at its bytes.
            return self.send_refusal(&node, Some(header.round), RefusalCode::Busy);
        }
        let input = Input::Update {
            node,
            round: header.round,
            nonce: header.nonce,
            base_digest: header.base_digest,
            payload_digest: header.payload_digest,
        };
        self.machine.handle(now, input);
        self.pump(Some(carry_out::Offered { header, validated }));
    }

    fn declined(&mut self, now: Moment, node: NodeId, round: Round, reason: DeclineReason) {
        let outcome = rounds::decline_word(reason);
        self.metrics
            .declines
            .get_or_create(&crate::metrics::Outcome { outcome })
            .inc();
        let name = node.clone();
        self.write_later(Urgency::Lazy, move |work| {
            rounds::decline(work, round, &name, reason)
        });
        self.machine.handle(now, Input::Declined { node, round, reason });
        self.pump(None);
    }

    /// Keeps what a site guarantees. An update that comes later is held to it.
    fn declared(&mut self, node: NodeId, guarantee: GuaranteeV1) {
        if let Err(error) = self.floor.check(Some(&guarantee)) {
            tracing::warn!(%node, %error, "the site's updates will not be taken");
        }
        if self.guarantees.get(&node) == Some(&guarantee) {
            return;
        }
        let (name, said) = (node.clone(), guarantee.clone());
        self.write_later(Urgency::Lazy, move |work| records::declare(work, &name, &said));
        self.guarantees.insert(node, guarantee);
    }

    fn ledger(&self, node: &NodeId) -> LedgerHead {
        self.ledgers.get(node).copied().unwrap_or_default()
    }

    /// A command has changed the store: read registry and model in force again.
    fn refresh(&mut self) {
        let store = self.store.clone();
        self.work.spawn(async move {
            let read = |connection: &rusqlite::Connection| {
                Ok((records::registry(connection)?, models::current_model(connection)?))
            };
            Done::Refreshed(store.read(read).await.map(Box::new))
        });
    }

    fn refreshed(&mut self, registry: Registry, model: ModelRow) {
        let before = Arc::clone(&self.registry.borrow());
        for (node, entry) in &registry {
            let same_key = before
                .get(node)
                .is_some_and(|known| known.key_fingerprint == entry.key_fingerprint);
            if !same_key {
                self.ledgers.insert(node.clone(), entry.ledger);
            }
        }
        // Sessions look at the registry at every message and wake up for this.
        self.registry.send_replace(Arc::new(registry));
        let ours = self
            .candidate
            .as_ref()
            .is_some_and(|computed| computed.row.digest == model.digest);
        // During a roll-over the registry is read again at its end.
        if model.version > self.machine.status().base.version && !ours && !self.rolling {
            self.roll_over(model);
        }
    }

    /// An operator released another model: the open round builds on the wrong one and ends; the next builds on the new one.
    fn roll_over(&mut self, model: ModelRow) {
        tracing::info!(
            version = model.version.0,
            rule = model.rule,
            "another model is in force"
        );
        self.rolling = true;
        let (store, models) = (self.store.clone(), Arc::clone(&self.models));
        let reason = AbortReason::Operator;
        self.work.spawn(async move {
            let loaded = models.load(&store, &model).await;
            if let Err(error) = loaded {
                return Done::RolledOver(Err(error.to_string()));
            }
            let aborted = work::until_it_works(&store, "end the open round", move |work| {
                let open = rounds::unfinished(work.connection())?.map(|unfinished| unfinished.open.round);
                open.map(|round| rounds::abort(work, round, reason).map(|()| round))
                    .transpose()
            });
            let aborted = aborted.await.flatten();
            Done::RolledOver(Ok(Box::new((model, aborted))))
        });
    }

    /// Writes something whose result only matters when it fails.
    fn write_later(
        &mut self,
        urgency: Urgency,
        work: impl FnOnce(&crate::store::Work<'_>) -> Result<(), StoreError> + Send + 'static,
    ) {
        let store = self.store.clone();
        self.work
            .spawn(async move { Done::Written(store.write(urgency, work).await) });
    }

    async fn good_bye(mut self) {
        let now = self.now();
        self.machine.handle(now, Input::Stop);
        let retry_after_ms = 2_000;
        let message = theriac_protocol::message::ToEdge::Goodbye(theriac_protocol::message::GoodbyeV1 {
            retry_after_ms,
        });
        for (_, link) in std::mem::take(&mut self.links) {
            // Dropping the link ends the session after what is in its outbox.
            link.send(&message);
        }
        let last_writes = async { while self.work.join_next().await.is_some() {} };
        if tokio::time::timeout(Duration::from_secs(5), last_writes)
            .await
            .is_err()
        {
            tracing::warn!("writes were still waiting at the end; they were not acknowledged to anybody");
        }
    }

    /// Opens no further round once the centre's budget is spent: the model stays, sessions and downloads go on.
    fn heed_budget(&mut self) {
        let central = self
            .status
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .central
            .clone();
        let Some(central) = central else { return };
        self.metrics.central_epsilon.set(central.epsilon);
        self.metrics.central_epsilon_limit.set(central.epsilon_limit);
        if central.exhausted {
            tracing::warn!(
                epsilon = central.epsilon,
                limit = central.epsilon_limit,
                "the budget of the central noise is spent: no round opens any more, the model stays"
            );
            let now = self.now();
            self.machine.handle(now, Input::Stop);
        }
    }

    fn now(&self) -> Moment {
        Moment(self.start.elapsed())
    }

    fn with_status(&self, change: impl FnOnce(&mut DriverStatus)) {
        change(&mut self.status.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// What the last process left.
#[derive(Debug)]
struct Found {
    registry: Registry,
    model: ModelRow,
    unfinished: Option<rounds::Unfinished>,
    last: Round,
    outcomes: (u64, u64),
    nonce_seed: [u8; 32],
    guarantees: BTreeMap<NodeId, GuaranteeV1>,
}

impl Found {
    fn read(connection: &rusqlite::Connection) -> Result<Self, StoreError> {
        let seed = records::meta(connection, records::META_NONCE_SEED)?;
        let nonce_seed = seed.try_into().map_err(|_| StoreError::Corrupt {
            row: "meta nonce_seed".into(),
            reason: "it has not 32 bytes".into(),
        })?;
        Ok(Self {
            registry: records::registry(connection)?,
            model: models::current_model(connection)?,
            unfinished: rounds::unfinished(connection)?,
            last: rounds::last_round(connection)?,
            outcomes: history::outcomes(connection)?,
            nonce_seed,
            guarantees: records::guarantees(connection)?,
        })
    }
}

/// The machine where the last one stopped. A round that was open under other terms, or on another model, cannot go on: its
/// updates were made for something else.
async fn begin(
    store: &Store,
    config: &RoundConfig,
    rule: RoundRule,
    found: &Found,
    now: Moment,
) -> Result<(RoundMachine, BTreeMap<(Round, NodeId), StoredUpload>), StoreError> {
    let base = theriac_protocol::round::BaseModel {
        version: found.model.version,
        digest: found.model.digest,
    };
    let fresh = || RoundMachine::new(config.clone(), base, found.last, found.nonce_seed, now);
    let Some(unfinished) = &found.unfinished else {
        return Ok((fresh(), BTreeMap::new()));
    };
    let round = unfinished.open.round;
    let same_terms = unfinished.terms_digest == rounds::terms_digest(&announcement(config, base), rule);
    if !same_terms || unfinished.open.base != base {
        tracing::warn!(
            round = round.0,
            same_terms,
            "the open round was made for other terms or another model: it ends"
        );
        store
            .write(Urgency::Now, move |work| {
                rounds::abort(work, round, AbortReason::Operator)
            })
            .await?;
        return Ok((fresh(), BTreeMap::new()));
    }
    tracing::info!(
        round = round.0,
        updates = unfinished.open.stored.len(),
        "the open round goes on"
    );
    let receipts = unfinished
        .uploads
        .iter()
        .map(|(node, upload)| ((round, node.clone()), *upload))
        .collect();
    Ok((
        RoundMachine::resume(config.clone(), unfinished.open.clone(), found.nonce_seed, now),
        receipts,
    ))
}

/// The audit log says when rounds began to run under other terms.
async fn record_terms(
    store: &Store,
    config: &RoundConfig,
    rule: RoundRule,
    found: &Found,
) -> Result<(), StoreError> {
    let base = theriac_protocol::round::BaseModel {
        version: found.model.version,
        digest: found.model.digest,
    };
    let config_digest = rounds::terms_digest(&announcement(config, base), rule);
    let record = move |work: &crate::store::Work<'_>| {
        let known = records::meta(work.connection(), META_TERMS);
        if known.is_ok_and(|known| known == config_digest.0) {
            return Ok(());
        }
        records::set_meta(work, META_TERMS, &config_digest.0)?;
        work.audit(AuditEvent::ConfigChanged { config_digest }).map(drop)
    };
    store.write(Urgency::Now, record).await
}

/// An announcement under `config`, for comparing terms.
fn announcement(config: &RoundConfig, base: theriac_protocol::round::BaseModel) -> AnnounceV1 {
    let terms = &config.terms;
    AnnounceV1 {
        round: Round(0),
        nonce: 0,
        kind: terms.kind,
        values: terms.values,
        layout_digest: terms.layout_digest,
        base_version: base.version,
        base_digest: base.digest,
        clip_norm: terms.clip_norm,
        noise_multiplier: terms.noise_multiplier,
        block_rows: terms.block_rows,
        blocks_min: terms.blocks_min,
        blocks_max: terms.blocks_max,
        deadline_ms: 0,
    }
}
