//! The aggregator's process, and the edges that connect to it.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use theriac_aggregator::InitOptions;
use theriac_aggregator::config::{ModelSettings, RoundKind, RoundSettings, Settings};
use theriac_aggregator::layout::ModelSpec;
use theriac_aggregator::robust::RuleName;
use theriac_certs::{Authority, Identity};
use theriac_protocol::units::NodeId;
use theriac_transport::{Endpoint, Limits, bind_client};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::edge::{LightEdge, Prepared};
use super::usage::{self, Usage};
use super::{LoadError, Options};
use crate::fleet::free_addresses;
use crate::fleet::place::Centre;
use crate::fleet::process::Processes;

/// Handshakes under way at one time.
const HANDSHAKES_MAX: usize = 64;
/// Edges that share a socket.
const EDGES_PER_SOCKET: usize = 128;
/// Different updates in memory; edges beyond share them.
const UPDATES_MAX: usize = 16;

/// The aggregator's process and what edges need to reach it.
pub(super) struct Fleet {
    at: SocketAddr,
    aggregator: rustix::process::Pid,
    authority: Arc<Vec<u8>>,
    identities: Vec<Identity>,
    pub(super) spec: ModelSpec,
    pub(super) endpoints: Vec<Endpoint>,
}

impl Fleet {
    pub(super) async fn prepare(
        options: &Options,
        root: &Path,
        processes: &mut Processes,
    ) -> Result<Self, LoadError> {
        let free = free_addresses(3).map_err(|error| LoadError::System("no free ports", error))?;
        let centre = Centre::new(root, [free[0], free[1], free[2]]);
        let identities = enrol(&centre, options)?;
        let configuration = centre.config().to_string_lossy().into_owned();
        let serve = ["serve", "--config", &configuration];
        let aggregator = match &options.aggregator {
            Some(program) => processes.start_program(program, "aggregator", serve)?,
            None => processes.start("aggregator", std::iter::once("__aggregator").chain(serve))?,
        };
        wait_until_open(&centre, processes).await?;
        let authority = Authority::load(&centre.dir.join("authority/aggregators"))?
            .certificate_der()
            .to_vec();
        let sockets = options.edges.div_ceil(EDGES_PER_SOCKET);
        let endpoints: Result<Vec<Endpoint>, _> =
            (0..sockets).map(|_| bind_client(&Limits::default())).collect();
        Ok(Self {
            at: centre.listen,
            aggregator,
            authority: Arc::new(authority),
            identities,
            spec: ModelSpec::raw(options.dimension)?,
            endpoints: endpoints?,
        })
    }

    pub(super) fn usage(&self) -> Result<Usage, LoadError> {
        Ok(usage::of(self.aggregator)?)
    }

    /// Connects every edge, many at a time; gives them with the handshakes a second.
    pub(super) async fn connect(&self, options: &Options) -> Result<(Vec<LightEdge>, f64), LoadError> {
        let updates: Vec<Prepared> = (1..)
            .take(options.edges.min(UPDATES_MAX))
            .map(|seed| {
                Prepared::new(
                    if options.idle.is_some() {
                        1
                    } else {
                        options.dimension
                    },
                    seed,
                )
            })
            .collect();
        let gate = Arc::new(Semaphore::new(HANDSHAKES_MAX));
        let mut connecting = JoinSet::new();
        let began = Instant::now();
        for (index, identity) in self.identities.iter().cloned().enumerate() {
            let (endpoint, at) = (self.endpoints[index % self.endpoints.len()].clone(), self.at);
            let (authority, spec) = (Arc::clone(&self.authority), self.spec.clone());
            let (gate, update) = (Arc::clone(&gate), updates[index % updates.len()].clone());
            connecting.spawn(async move {
                let _permit = gate.acquire().await;
                LightEdge::connect(index, &endpoint, at, &identity, &authority, &spec, update).await
            });
        }
        let mut edges = Vec::with_capacity(options.edges);
        while let Some(edge) = connecting.join_next().await {
            edges.push(edge.map_err(|error| LoadError::Prepare(error.to_string()))??);
        }
        Ok((edges, options.edges as f64 / began.elapsed().as_secs_f64()))
    }
}

/// Makes a data directory in which every edge is already enrolled.
fn enrol(centre: &Centre, options: &Options) -> Result<Vec<Identity>, LoadError> {
    let prepare = |error: &dyn std::fmt::Display| LoadError::Prepare(error.to_string());
    let mut init = InitOptions::new(&centre.dir, "load");
    init.site = None;
    init.settings = Settings {
        rounds: terms(options),
        model: model(options),
        ..init.settings
    };
    theriac_aggregator::init(init).map_err(|error| prepare(&error))?;
    centre
        .configure("load", terms(options), model(options))
        .map_err(|error| LoadError::System("cannot write the configuration", error))?;
    let nodes: Result<Vec<NodeId>, _> = (0..options.edges)
        .map(|index| NodeId::new(format!("edge-{index}")))
        .collect();
    theriac_aggregator::enrol_directly(&centre.dir, &nodes?).map_err(|error| prepare(&error))
}

/// Rounds without a pause that wait for every edge; none at all when the edges only stay connected.
fn terms(options: &Options) -> RoundSettings {
    let idle = options.idle.is_some();
    RoundSettings {
        kind: RoundKind::Delta,
        quorum: options.edges + usize::from(idle),
        deadline: Duration::from_mins(1),
        pause: Duration::ZERO,
        rounds_max: (!idle).then_some(options.rounds),
        clip_norm: Some(1.0),
        noise_multiplier: Some(1.0),
        rule: if options.edges >= 3 {
            RuleName::TRIMMED_MEAN
        } else {
            RuleName::MEAN
        },
        byzantine: usize::from(options.edges >= 3),
        ..RoundSettings::default()
    }
}

fn model(options: &Options) -> ModelSettings {
    ModelSettings {
        dimension: Some(options.dimension),
        ..ModelSettings::default()
    }
}

async fn wait_until_open(centre: &Centre, processes: &mut Processes) -> Result<(), LoadError> {
    let client = crate::fleet::http::Client::new(Duration::from_secs(1));
    let deadline = Instant::now() + Duration::from_secs(30);
    while client
        .json::<serde_json::Value>(centre.page, "/status")
        .await
        .is_err()
    {
        processes.check()?;
        if Instant::now() > deadline {
            return Err(LoadError::Prepare("its page did not open within 30 s".to_owned()));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}
