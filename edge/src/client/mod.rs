//! The federation's link: drives the participant over transport.
//!
//! It connects with jittered backoff, answers rounds, fetches and judges models. Everything here may fail or stand still
//! without detection or healing noticing.

mod appraising;
mod fleet;
pub mod opening;
mod work;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use rand::Rng as _;
use theriac_audit::seal::verify_seal;
use theriac_certs::{Identity, files, trust};
use theriac_heal::executor::clock;
use theriac_model::gate::Judgement;
use theriac_model::global::{
    GlobalError, GlobalModel, delta_layout, gradient_layout, linear_model_layout, model_layout,
    moments_layout,
};
use theriac_privacy::ledger::{LedgerError, Seal};
use theriac_protocol::message::{
    AnnounceV1, FEATURE_FLEET, FEATURE_GRADIENT, FEATURE_LEDGER_SEAL, FEATURE_VALIDATOR, FetchModelV1,
    GateVerdict, HelloV1, LedgerSealV1, ModelV1, PROTOCOL_MAX, PROTOCOL_MIN, ToAggregator, ToEdge,
};
use theriac_protocol::participant::{Input, LayoutDigests, Output, Participant, ParticipantConfig};
use theriac_protocol::refusal::RefusalCode;
use theriac_protocol::round::BaseModel;
use theriac_protocol::units::{Digest, ModelVersion, Moment};
use theriac_transport::{
    Backoff, CloseCode, ConnectError, EdgeReceiver, EdgeSender, Endpoint, Limits, bind_client, connect,
};
use tokio::task::JoinHandle;

use crate::config::{FederationSettings, host_and_port};
use crate::detect::LaneShared;
use crate::fleet::FleetEnd;
use crate::global_store::{self, Held};
use crate::metrics::{Metrics, kind};
use crate::state_dir::{Joined, StateDir};
use crate::status::{Board, Federation};
use crate::storage::StorageWatch;
use crate::store::{OutboxRow, Store};
use crate::supervise::Shutdown;
use crate::update::{Budget, Releaser};

use self::work::next_answer;

/// File names of what `join` leaves in `keys/`.
pub const IDENTITY: &str = "edge";
/// The authority that the aggregator's certificate must come from.
pub const AGGREGATOR_AUTHORITY: &str = "aggregator-authority.pem";
/// A clock that is off by more than this is reported, in milliseconds.
const CLOCK_SKEW_MS: u64 = 60_000;
/// Longest wait for the farewell.
const FAREWELL: Duration = Duration::from_secs(2);
/// Time between two attempts to judge a model that came during the warm-up.
const REJUDGE_EVERY: Duration = Duration::from_secs(5);
/// Quiet rows that the gate looks at.
const GATE_ROWS: usize = 3_600;

/// Why the link is down.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The identity or the authority cannot be used.
    #[error("{reason}; run `theriac-edge join` again if it is lost")]
    Identity {
        /// What is wrong.
        reason: String,
    },
    /// The aggregator's name does not resolve.
    #[error("cannot resolve {address}: {reason}")]
    Resolve {
        /// The address.
        address: String,
        /// Why.
        reason: String,
    },
    /// No socket.
    #[error(transparent)]
    Endpoint(#[from] theriac_transport::EndpointError),
    /// No session.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The outbox holds bytes that the ledger does not know: the ledger wins.
    #[error("outbox and privacy ledger disagree, nothing is trained or sent: {reason}")]
    Disagree {
        /// What the ledger says.
        reason: String,
    },
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] crate::store::StoreError),
}

/// What the link works with.
#[derive(Debug, Clone)]
pub struct Client {
    /// Checked `[federation]`.
    pub settings: FederationSettings,
    /// Who we are and where the aggregator is.
    pub joined: Joined,
    /// Where keys and models are kept.
    pub dir: StateDir,
    /// The lane whose history is learnt from.
    pub lane: Arc<LaneShared>,
    /// Every lane: an accepted model helps all of them.
    pub lanes: Vec<Arc<LaneShared>>,
    /// The way out; held by one blocking task at a time.
    pub releaser: Arc<Mutex<Releaser>>,
    /// What the releaser's ledger says, without waiting for it.
    pub budget: Budget,
    /// Where the outbox is.
    pub store: Store,
    /// Whether the disk can be written.
    pub storage: StorageWatch,
    /// The page's picture.
    pub board: Board,
    /// The counters.
    pub metrics: Arc<Metrics>,
    /// What concerns the fleet; `None`: nothing is told and nothing heard.
    pub fleet: Option<FleetEnd>,
}

/// Everything that lives longer than one session.
struct Driver {
    client: Client,
    participant: Participant,
    held: Option<(Held, Digest, Arc<GlobalModel>)>,
    outbox: Option<OutboxRow>,
    arrived: Option<(ModelV1, Bytes, Result<Arc<GlobalModel>, GlobalError>)>,
    training: work::Training,
    /// What is to be trained for once the training at hand has ended: one release at a time.
    announced: Option<AnnounceV1>,
    judging: Option<Judging>,
    /// A candidate of the aggregator's that waits, see [`appraising`].
    asked: Option<appraising::Asked>,
    appraising: appraising::Appraising,
    /// The fleet, where the policy has budgets of it.
    fleet: Option<fleet::Fleet>,
    /// What is to be said in the session at hand.
    to_say: Option<ToAggregator>,
    /// Lanes, by their place in [`Client::lanes`], on whose rows the held model was not judged yet: it has just come, or there are too few rows.
    unjudged: BTreeSet<usize>,
    /// What the gates of the lanes said last, and why, with the version; in the order of [`Client::lanes`].
    verdicts: Vec<Option<(ModelVersion, GateVerdict, String)>>,
    /// The held model on its way to the disk.
    keeping: Option<JoinHandle<()>>,
    /// Whether this session's aggregator was told what our policy guarantees.
    declared: bool,
    /// Whether the first seal of this session was read and our ledger holds what it signs. Before that nothing is charged or trained: the ledger may be
    /// an old copy that has grown.
    sealed: bool,
    /// Addresses of the aggregator's name that did not answer in a row.
    dials: usize,
    epoch: Instant,
}

/// A model at the gates of some lanes.
struct Judging {
    model: AtGate,
    outcome: JoinHandle<Vec<(usize, Judgement)>>,
}

/// Which model, and at the gates of which lanes. An aggregator may give one version to two models; the digest tells them apart.
#[derive(Debug, Clone)]
struct AtGate {
    held: Held,
    digest: Digest,
    model: Arc<GlobalModel>,
    lanes: Vec<usize>,
}

/// Why a session ended.
enum Ended {
    ByUs,
    Lost(String),
    Asked(Duration),
    Refused(RefusalCode),
    /// The aggregator has signed more of our ledger than there is.
    LedgerBehind(String),
}

/// Keeps the link up until the signal to stop.
///
/// # Errors
/// When outbox and ledger disagree, or the store cannot be read.
pub async fn run(client: Client, mut shutdown: Shutdown) -> Result<(), ClientError> {
    let mut driver = Driver::new(client).await?;
    let settings = driver.client.settings.clone();
    let mut backoff = Backoff::new(settings.retry_base, settings.retry_max);
    let endpoint = bind_client(&Limits::default())?;
    driver.client.show_buffers(&endpoint);
    if settings.validator {
        tracing::warn!(
            "federation.validator is true: this edge tells the aggregator what candidate models do on its rows, which no privacy guarantee covers"
        );
    }
    loop {
        driver
            .client
            .board
            .update(|status| status.federation = Federation::Connecting);
        driver.client.metrics.connect_attempts.inc();
        let session = tokio::select! {
            session = driver.connect(&endpoint) => session,
            () = shutdown.wait() => return Ok(()),
        };
        let wait = match session {
            Ok((sender, receiver)) => {
                let begun = Instant::now();
                let ended = driver.session(sender, receiver, &mut shutdown, &endpoint).await;
                driver.client.metrics.connected.set(0);
                // Only a session that lasted is a reason to come back at once.
                if begun.elapsed() > settings.retry_base * 4 {
                    backoff.reset();
                }
                match ended {
                    Ended::ByUs => return Ok(()),
                    Ended::Asked(wait) => wait + backoff.next(rand::rng().random()),
                    Ended::Refused(code) => {
                        driver.client.refused(code.word());
                        backoff.next(rand::rng().random()).max(settings.retry_base)
                    }
                    Ended::LedgerBehind(reason) => {
                        driver.client.ledger_behind(&reason);
                        shutdown.wait().await;
                        return Ok(());
                    }
                    Ended::Lost(reason) => {
                        tracing::warn!(reason, "lost the aggregator");
                        driver.client.down(Federation::Connecting, &reason);
                        backoff.next(rand::rng().random())
                    }
                }
            }
            Err(error) => driver.client.not_connected(&error, &mut backoff),
        };
        if !driver.wait(wait, &mut shutdown).await {
            return Ok(());
        }
    }
}

impl Client {
    fn show_buffers(&self, endpoint: &Endpoint) {
        let granted = endpoint.granted();
        for (word, bytes) in [("send", granted.send), ("receive", granted.receive)] {
            let gauge = self.metrics.socket_buffer_bytes.get_or_create(&kind(word));
            gauge.set(i64::try_from(bytes).unwrap_or(i64::MAX));
        }
    }

    fn down(&self, state: Federation, detail: &str) {
        self.board.update(|status| {
            status.federation = state;
            status.federation_detail = Some(detail.to_owned());
        });
    }

    /// Nothing is trained or sent any more, until a person has put the right ledger back and started the edge again.
    fn ledger_behind(&self, reason: &str) {
        let code = "TH-E0309";
        tracing::error!(code, reason, "federation is off; detection and healing go on");
        self.down(Federation::Off, &format!("{code}: {reason}"));
    }

    fn refused(&self, word: &str) {
        tracing::error!(
            code = word,
            "the aggregator turned this edge away; detection and healing go on"
        );
        self.down(Federation::Refused, word);
        self.board
            .update(|status| status.last_refusal = Some(word.to_owned()));
    }

    fn not_connected(&self, error: &ClientError, backoff: &mut Backoff) -> Duration {
        let own = backoff.next(rand::rng().random());
        match error {
            ClientError::Connect(ConnectError::Refused(refusal)) => {
                self.refused(refusal.code.word());
                own.max(Duration::from_millis(u64::from(refusal.retry_after_ms)))
            }
            ClientError::Connect(connect) => {
                let hint = connect.hint().unwrap_or_default();
                tracing::warn!(%error, hint, "no aggregator; trying again");
                let told = match hint {
                    "" => error.to_string(),
                    hint => format!("{error}; {hint}"),
                };
                self.down(Federation::Connecting, &told);
                own.max(connect.retry_after().unwrap_or_default())
            }
            _ => {
                tracing::warn!(%error, "no aggregator; trying again");
                self.down(Federation::Connecting, &error.to_string());
                own
            }
        }
    }

    fn address(&self) -> Result<(String, u16), ClientError> {
        let address = self
            .settings
            .aggregator
            .as_ref()
            .unwrap_or(&self.joined.aggregator);
        host_and_port(address).ok_or_else(|| ClientError::Resolve {
            address: address.clone(),
            reason: "it is not HOST:PORT".to_owned(),
        })
    }

    fn load_identity(&self) -> Result<(Identity, Vec<u8>), ClientError> {
        let wrong = |error: &dyn std::fmt::Display| ClientError::Identity {
            reason: error.to_string(),
        };
        let identity = Identity::load(&self.dir.keys(), IDENTITY).map_err(|error| wrong(&error))?;
        let authority: PathBuf = self.dir.keys().join(AGGREGATOR_AUTHORITY);
        let authority = files::load_certificate(&authority).map_err(|error| wrong(&error))?;
        let left = identity
            .expires()
            .duration_since(SystemTime::now())
            .unwrap_or_default();
        self.metrics.certificate_expiry_seconds.set(left.as_secs_f64());
        Ok((identity, authority))
    }

    /// Lanes that still have to judge the held model. Those whose detector of the last run was made with it have accepted it before and lean on it again.
    fn unjudged(&self, held: &(Held, Digest, Arc<GlobalModel>)) -> BTreeSet<usize> {
        let digest = held.1.to_string();
        let uses = |lane: &Arc<LaneShared>| {
            lane.detector().is_some_and(|detector| {
                let provenance = detector.provenance();
                provenance.model_version == held.0.version.0 && provenance.model_digest == digest
            })
        };
        let (accepted, unjudged): (BTreeSet<_>, _) =
            (0..self.lanes.len()).partition(|place| uses(&self.lanes[*place]));
        for place in &accepted {
            self.lanes[*place].set_global(Arc::clone(&held.2));
        }
        if unjudged.is_empty() {
            self.board
                .update(|status| "accepted".clone_into(&mut status.gate));
        }
        unjudged
    }

    fn show_budget(&self) {
        let spent = self.budget.published().spent;
        self.metrics.epsilon_spent.set(spent.epsilon);
        self.metrics.epsilon_ever.set(spent.epsilon_unit_lifetime);
        self.metrics.epsilon_limit.set(spent.epsilon_limit.value());
        self.board.update(|status| {
            status.epsilon_spent = Some(spent.epsilon);
            status.epsilon_ever = Some(spent.epsilon_unit_lifetime);
            status.epsilon_limit = Some(spent.epsilon_limit.value());
            status.delta = Some(spent.delta.value());
        });
    }
}

impl Driver {
    async fn new(client: Client) -> Result<Self, ClientError> {
        let channels = client.lane.schema.channels();
        let held = global_store::load(&client.dir.model(), channels)
            .map(|(held, digest, model)| (held, digest, Arc::new(model)));
        let outbox = client.store.outbox().await?;
        if let Some(row) = outbox.clone() {
            let disagree = |reason: String| ClientError::Disagree { reason };
            let confirmed = client.with_releaser(move |releaser| releaser.confirm(&row)).await;
            confirmed
                .map_err(|join| disagree(join.to_string()))?
                .map_err(|error| disagree(error.to_string()))?;
            client.store.note_ledger(client.budget.published().known).await?;
        }
        let config = ParticipantConfig {
            noise_multiplier_min: client.budget.published().noise_multiplier_min,
            clip_norm_max: None,
            layout_digests: LayoutDigests {
                model: Digest(model_layout(channels).digest()),
                linear_model: Digest(linear_model_layout(channels).digest()),
                moments: Digest(moments_layout(channels).digest()),
                delta: Digest(delta_layout(channels).digest()),
                gradient: Digest(gradient_layout(channels).digest()),
            },
        };
        let base = held.as_ref().map_or(
            BaseModel {
                version: ModelVersion(0),
                digest: Digest::default(),
            },
            |held| BaseModel {
                version: held.0.version,
                digest: held.1,
            },
        );
        let key = outbox
            .as_ref()
            .map(|row| (row.round, row.nonce, row.payload_digest));
        let epoch = Instant::now();
        let participant = Participant::new(config, base, key, Moment(Duration::ZERO));
        client.show_budget();
        let unjudged = held
            .as_ref()
            .map(|held| client.unjudged(held))
            .unwrap_or_default();
        let verdicts = vec![None; client.lanes.len()];
        let fleet = client.fleet.clone().map(fleet::Fleet::new);
        Ok(Self {
            client,
            participant,
            held,
            outbox,
            arrived: None,
            training: None,
            announced: None,
            judging: None,
            asked: None,
            appraising: None,
            fleet,
            to_say: None,
            unjudged,
            verdicts,
            keeping: None,
            declared: false,
            sealed: false,
            dials: 0,
            epoch,
        })
    }

    /// Waits between two attempts to connect, finishing what was begun. `false`: it is time to stop.
    async fn wait(&mut self, wait: Duration, shutdown: &mut Shutdown) -> bool {
        let until = tokio::time::Instant::now() + wait;
        self.judge_held();
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(until) => return true,
                () = shutdown.wait() => return false,
                answer = next_answer(&mut self.training, &mut self.judging, &mut self.appraising) => {
                    if let Some(input) = self.answered(answer) {
                        self.participant.handle(self.now(), input);
                    }
                    if let Err(reason) = self.carry_out(None).await {
                        tracing::debug!(reason, "left undone between sessions");
                    }
                }
            }
        }
    }

    fn now(&self) -> Moment {
        Moment(self.epoch.elapsed())
    }

    async fn connect(&mut self, endpoint: &Endpoint) -> Result<(EdgeSender, EdgeReceiver), ClientError> {
        let (identity, authority) = self.client.load_identity()?;
        let tls = trust::client_config(&identity, &authority).map_err(|error| ClientError::Identity {
            reason: error.to_string(),
        })?;
        let (host, port) = self.client.address()?;
        let unresolved = |reason: String| ClientError::Resolve {
            address: format!("{host}:{port}"),
            reason,
        };
        let found = resolve(&host, port)
            .await
            .map_err(|error| unresolved(error.to_string()))?;
        // The next one each time, for a name of which only one address answers.
        let address = found.get(self.dials % found.len().max(1)).copied();
        let address = address.ok_or_else(|| unresolved("no address".to_owned()))?;
        self.dials = self.dials.wrapping_add(1);
        let hello = self.hello();
        let (session, welcome) = Box::pin(connect(endpoint, address, &host, tls, hello)).await?;
        let skew = welcome.time.0.abs_diff(unix_ms());
        if skew > CLOCK_SKEW_MS {
            tracing::warn!(
                seconds = skew / 1000,
                "this host's clock and the aggregator's differ: check the time service"
            );
        }
        tracing::info!(
            federation = welcome.federation,
            model = welcome.model_version.0,
            "connected"
        );
        // The address that answered is tried first again.
        self.dials = self.dials.wrapping_sub(1);
        (self.declared, self.sealed) = (false, false);
        self.client.metrics.connected.set(1);
        self.client.board.update(|status| {
            status.federation = Federation::Connected;
            status.federation_detail = None;
        });
        let now = self.now();
        self.participant.handle(now, Input::Connected);
        self.participant.handle(now, Input::Welcome(welcome));
        Ok(session.split())
    }

    fn hello(&self) -> HelloV1 {
        let schema = &self.client.lane.schema;
        let published = self.client.budget.published();
        let spent = published.spent;
        let model = self.participant.status().model;
        HelloV1 {
            protocol_min: PROTOCOL_MIN,
            protocol_max: PROTOCOL_MAX,
            software: concat!("theriac-edge ", env!("CARGO_PKG_VERSION")).to_owned(),
            features: [FEATURE_LEDGER_SEAL, FEATURE_GRADIENT]
                .into_iter()
                .chain(self.client.settings.validator.then_some(FEATURE_VALIDATOR))
                .chain(self.client.fleet.is_some().then_some(FEATURE_FLEET))
                .map(str::to_owned)
                .collect(),
            profile: schema.name.clone(),
            profile_digest: Digest(schema.digest()),
            layout_digest: Digest(model_layout(schema.channels()).digest()),
            noise_multiplier_min: published.noise_multiplier_min,
            ledger_head: spent.head,
            ledger_records: spent.records,
            model_version: model.version,
            model_digest: model.digest,
            audit_checkpoint: None,
            receipt_missing: self.participant.receipt_missing(),
        }
    }

    async fn session(
        &mut self,
        mut sender: EdgeSender,
        mut receiver: EdgeReceiver,
        shutdown: &mut Shutdown,
        endpoint: &Endpoint,
    ) -> Ended {
        let mut rejudge = tokio::time::interval(REJUDGE_EVERY);
        rejudge.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let ended = loop {
            if let Err(reason) = self.carry_out(Some(&mut sender)).await {
                break Ended::Lost(reason);
            }
            self.show_traffic(endpoint);
            let timeout = sleep_until(self.epoch, self.participant.poll_timeout());
            let input = tokio::select! {
                () = shutdown.wait() => break Ended::ByUs,
                message = receiver.recv() => match message {
                    Ok(ToEdge::Seal(seal)) => match self.read_seal(seal, &mut sender).await {
                        Ok(()) => {
                            self.may_train();
                            None
                        }
                        Err(ended) => break ended,
                    },
                    Ok(message) => match self.received(message) {
                        Ok(input) => input,
                        Err(ended) => break ended,
                    },
                    Err(error) => break Ended::Lost(error.to_string()),
                },
                answer = next_answer(&mut self.training, &mut self.judging, &mut self.appraising) => self.answered(answer),
                () = timeout => None,
                () = fleet::due(self.fleet.as_ref()) => None,
                _ = rejudge.tick() => {
                    self.judge_held();
                    None
                }
            };
            let now = self.now();
            match input {
                Some(input) => self.participant.handle(now, input),
                None => self.participant.handle_timeout(now),
            }
        };
        self.sealed = false;
        self.forget_asked();
        if let Some(fleet) = &mut self.fleet {
            fleet.disconnected();
        }
        self.participant.handle(self.now(), Input::Disconnected);
        if let Err(reason) = self.carry_out(None).await {
            tracing::debug!(reason, "left undone at the end of the session");
        }
        if matches!(ended, Ended::ByUs) {
            let farewell = async {
                // The aggregator learns it from the closed connection as well.
                let _told = sender.send(&ToAggregator::Goodbye).await.is_ok();
                sender.finish().await;
            };
            let _in_time = tokio::time::timeout(FAREWELL, farewell).await.is_ok();
            endpoint.close(CloseCode::Done, "");
        }
        ended
    }

    /// What a message means for the participant; `Err` when it ends the session.
    fn received(&mut self, message: ToEdge) -> Result<Option<Input>, Ended> {
        Ok(Some(match message {
            ToEdge::Welcome(welcome) => Input::Welcome(welcome),
            ToEdge::Refusal(refusal) => {
                if refusal.round.is_none() && ends_the_session(refusal.code) {
                    return Err(Ended::Refused(refusal.code));
                }
                Input::Refusal(refusal)
            }
            ToEdge::Announce(announce) => {
                self.client.board.update(|status| status.round = announce.round.0);
                Input::Announce(announce)
            }
            ToEdge::Receipt(receipt) => Input::Receipt(receipt),
            ToEdge::Model(header, payload) => {
                if Digest::of(&payload) != header.payload_digest {
                    return Err(Ended::Lost(
                        "a model came whose digest is not the announced one".to_owned(),
                    ));
                }
                let model =
                    global_store::model_of(self.client.lane.schema.channels(), &payload).map(Arc::new);
                self.arrived = Some((header.clone(), payload, model));
                Input::Model { header }
            }
            ToEdge::Closed(closed) => Input::Closed(closed),
            ToEdge::Candidate(candidate, payload) => {
                if !appraising::is_whole(&candidate, &payload) {
                    return Err(Ended::Lost(
                        "a candidate came whose digest is not the announced one".to_owned(),
                    ));
                }
                self.asked(candidate, &payload);
                return Ok(None);
            }
            // Taken out before.
            ToEdge::Seal(_) => return Ok(None),
            ToEdge::Fleet(_) | ToEdge::LeaseGranted(_) | ToEdge::LeaseRefused(_) => {
                self.heard_of_fleet(&message)?;
                return Ok(None);
            }
            ToEdge::Goodbye(goodbye) => {
                return Err(Ended::Asked(Duration::from_millis(u64::from(
                    goodbye.retry_after_ms,
                ))));
            }
        }))
    }

    /// Keeps what the aggregator has signed of our ledger, and answers the first seal of a session with what our policy guarantees.
    async fn read_seal(&mut self, seal: LedgerSealV1, sender: &mut EdgeSender) -> Result<(), Ended> {
        let lost = |error: String| Ended::Lost(error);
        if !std::mem::replace(&mut self.declared, true) {
            let guarantee = self.client.with_releaser(|releaser| releaser.guarantee()).await;
            let guarantee = guarantee.map_err(|error| lost(error.to_string()))?;
            let told = sender.send(&ToAggregator::Guarantee(guarantee)).await;
            told.map_err(|error| lost(error.to_string()))?;
        }
        if seal.records == 0 || seal.records <= self.client.budget.published().sealed_records {
            return Ok(());
        }
        let node = &self.client.joined.node;
        let holds = seal.key.parse().is_ok_and(|key| verify_seal(&seal, node, &key));
        if !holds {
            return Err(lost(
                "the counter-signature of the privacy ledger is wrong".to_owned(),
            ));
        }
        let kept = Seal {
            records: seal.records,
            head: seal.head,
            signed: seal.signed,
            key: seal.key,
            signature: hexadecimal(&seal.signature),
        };
        let kept = self
            .client
            .with_releaser(|releaser| releaser.keep_seal(kept))
            .await;
        match kept.map_err(|error| lost(error.to_string()))? {
            Ok(()) => {
                self.client
                    .store
                    .note_ledger(self.client.budget.published().known)
                    .await
            }
            Err(error @ LedgerError::WentBackwards { .. }) => {
                return Err(Ended::LedgerBehind(error.to_string()));
            }
            // The charge is on record; only the evidence of the aggregator's word is missing.
            Err(error) => {
                tracing::warn!(%error, "a counter-signature of the privacy ledger could not be kept");
                Ok(())
            }
        }
        .map_err(|error| lost(error.to_string()))
    }

    /// `Err`: more was said than is borne.
    fn heard_of_fleet(&mut self, message: &ToEdge) -> Result<(), Ended> {
        let fleet = self.fleet.as_mut();
        if fleet.is_some_and(|fleet| !fleet.bears(clock::now().monotonic)) {
            return Err(Ended::Lost(
                "the aggregator says more of the fleet than any honest one does".to_owned(),
            ));
        }
        match (&mut self.fleet, message) {
            (Some(fleet), ToEdge::Fleet(report)) => fleet.reported(report),
            (Some(fleet), ToEdge::LeaseGranted(granted)) => fleet.granted(granted),
            (Some(fleet), ToEdge::LeaseRefused(refused)) => fleet.refused(refused),
            // This edge's Hello does not ask for it.
            _ => {}
        }
        Ok(())
    }

    /// Does what the participant asks for. `sender` is `None` between sessions.
    async fn carry_out(&mut self, mut sender: Option<&mut EdgeSender>) -> Result<(), String> {
        while let Some(output) = self.participant.poll_output() {
            let message = match output {
                Output::Train { announce } => {
                    self.train(announce);
                    continue;
                }
                Output::CancelTraining { round } => {
                    // The charge, if made, stays; an answer that still comes is harmless.
                    tracing::debug!(round = round.0, "training is not wanted any more");
                    self.announced = self.announced.take().filter(|announce| announce.round != round);
                    continue;
                }
                Output::SendUpdate { round } => {
                    let Some(message) = self.outbox_message(round) else {
                        continue;
                    };
                    message
                }
                Output::SendDecline(decline) => ToAggregator::Decline(decline),
                Output::FetchModel { version } => ToAggregator::FetchModel(FetchModelV1 { version }),
                Output::Judge { version } => {
                    if let Some(answer) = self.hold(version) {
                        self.participant.handle(self.now(), answer);
                    }
                    continue;
                }
                Output::SendVerdict(verdict) => match work::told(verdict) {
                    Some(message) => message,
                    None => continue,
                },
                Output::DropOutbox { round } => {
                    self.drop_outbox(round).await;
                    continue;
                }
                Output::Report(event) => {
                    self.report(&event);
                    continue;
                }
            };
            if let Some(sender) = sender.as_deref_mut() {
                sender.send(&message).await.map_err(|error| error.to_string())?;
            }
        }
        if let Some(sender) = sender {
            let said = self.to_say.take();
            let of_fleet = self.fleet.iter_mut();
            let of_fleet = of_fleet.flat_map(|fleet| std::iter::from_fn(|| fleet.next_to_say()));
            for message in said.into_iter().chain(of_fleet) {
                sender.send(&message).await.map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }
}

/// Codes after which the same session is of no more use.
fn ends_the_session(code: RefusalCode) -> bool {
    matches!(
        code,
        RefusalCode::UnsupportedVersion
            | RefusalCode::UnknownSite
            | RefusalCode::Suspended
            | RefusalCode::Revoked
            | RefusalCode::LedgerRollback
    )
}

/// The addresses of a name, IPv4 first: `localhost` often means `::1` as well, where an aggregator that listens on
/// `0.0.0.0` is not.
///
/// # Errors
/// The resolver's.
pub(crate) async fn resolve(host: &str, port: u16) -> std::io::Result<Vec<SocketAddr>> {
    let mut found: Vec<SocketAddr> = tokio::net::lookup_host((host, port)).await?.collect();
    found.sort_by_key(SocketAddr::is_ipv6);
    Ok(found)
}

async fn sleep_until(epoch: Instant, due: Option<Moment>) {
    match due {
        Some(due) => tokio::time::sleep_until((epoch + due.0).into()).await,
        None => std::future::pending().await,
    }
}

fn unix_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn hexadecimal(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digits = |byte: &u8| [byte >> 4, byte & 15].map(|half| char::from(DIGITS[usize::from(half)]));
    bytes.iter().flat_map(digits).collect()
}

#[cfg(test)]
mod tests;
