//! The whole edge: configure, open, bind, announce, run, drain. What is wrong is found before a port opens.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use theriac_command::problem::Problem;
use theriac_heal::incident::Input;
use theriac_model::feature::FeatureSchema;
use theriac_privacy::ledger::Ledger;
use theriac_privacy::noise::{ExactGaussian, OpenDpGaussian};
use theriac_protocol::units::{NodeId, Timestamp};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use crate::client::{self, Client, opening};
use crate::config::{EdgeConfig, NoiseBackend};
use crate::detect::{LaneShared, load_detector};
use crate::fleet::{FleetDesk, FleetEnd};
use crate::healing_policy::{self, HealingPolicyError};
use crate::http::{self, Page};
use crate::metrics::Metrics;
use crate::respond::{self, Events, Hand, Responder};
use crate::risk::RiskModel;
use crate::service::{self, Command, Commands, ServiceContext, ServiceShared};
use crate::state_dir::{Joined, Lock, StateDir, StateDirError, is_no_room};
use crate::status::{Board, Federation};
use crate::storage::StorageWatch;
use crate::store::{Store, StoreError};
use crate::supervise::{Pace, Tasks, shutdown};
use crate::update::Releaser;
use crate::watch::{self, Watch};
use crate::{HOST, Tamper, bounds, checkpoints, proxy};

/// Observations that may wait for the incident machine.
const EVENTS: usize = 512;
/// Commands that may wait for one service.
const COMMANDS: usize = 16;
/// Incidents of earlier runs that the page shows.
const INCIDENTS_SHOWN: u32 = 200;
/// Samples that may be missing before the process counts as unhealthy.
const TICKS_MISSED_MAX: u32 = 10;

/// Why the edge does not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EdgeError {
    /// The state directory cannot be used.
    #[error(transparent)]
    StateDir(#[from] StateDirError),
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The configured name is not the enrolled one.
    #[error("edge.toml calls this node `{configured}`, but it joined as `{enrolled}`")]
    OtherName {
        /// In the configuration.
        configured: NodeId,
        /// In the certificate.
        enrolled: NodeId,
    },
    /// The policy of healing is refused.
    #[error(transparent)]
    HealingPolicy(#[from] HealingPolicyError),
    /// The address of a proxy cannot be bound.
    #[error("the proxy of `{service}` cannot listen on {address}: {source}")]
    Proxy {
        /// The service.
        service: String,
        /// The address.
        address: SocketAddr,
        /// The system's word.
        source: std::io::Error,
    },
    /// The page's address cannot be bound.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The system's word.
        source: std::io::Error,
    },
}

impl From<EdgeError> for Problem {
    fn from(error: EdgeError) -> Self {
        let text = error.to_string();
        match error {
            EdgeError::HealingPolicy(error) => crate::commands::policy_refused(error),
            EdgeError::StateDir(StateDirError::InUse { .. }) => Self::temporary("TH-E0304", text)
                .hint("stop that process, or give this one a state_dir of its own"),
            EdgeError::StateDir(StateDirError::Mode { .. }) => Self::config("TH-E0303", text)
                .hint("set state_dir in edge.toml to a directory that only this user can read and write"),
            EdgeError::StateDir(StateDirError::Io { source, .. }) if is_no_room(&source) => {
                Self::temporary("TH-E0303", text).hint(MAKE_ROOM)
            }
            EdgeError::StateDir(StateDirError::Io { source, .. })
                if source.kind() == std::io::ErrorKind::ReadOnlyFilesystem =>
            {
                Self::temporary("TH-E0303", text).hint(MOUNT)
            }
            EdgeError::StateDir(_) => Self::failed("TH-E0303", text)
                .hint("set state_dir in edge.toml to a directory that only this user can read and write"),
            EdgeError::Store(StoreError::Full { .. }) => Self::temporary("TH-E0305", text).hint(MAKE_ROOM),
            EdgeError::Store(StoreError::ReadOnly { .. }) => Self::temporary("TH-E0305", text).hint(MOUNT),
            EdgeError::Store(_) => Self::failed("TH-E0305", text).hint("run `theriac-edge doctor`"),
            EdgeError::OtherName { enrolled, .. } => Self::config("TH-E0308", text).hint(format!(
                "set node = \"{enrolled}\", or leave it out; another name needs another state_dir"
            )),
            EdgeError::Proxy { .. } => Self::temporary("TH-E0385", text)
                .hint("stop what uses the port, often the service itself, or set proxy.listen"),
            EdgeError::Listen { .. } => Self::temporary("TH-E0306", text)
                .hint("stop what uses the port, or set http.listen (127.0.0.1:0 takes a free one)"),
        }
    }
}

const MAKE_ROOM: &str = "make room on that disk";
const MOUNT: &str = "mount it so that it can be written; a disk with errors is turned read-only by the system, whose log tells";

/// Runs an edge until `shutdown` resolves, then drains it.
///
/// `tamper` makes it hostile: see [`Tamper`]. The `theriac-edge` binary always passes `None`.
///
/// # Errors
/// [`EdgeError`] when it cannot start. Once it runs, a failing part is restarted and told in `/healthz`, not returned.
pub async fn run(
    config: EdgeConfig,
    tamper: Option<Tamper>,
    until: impl Future<Output = ()> + Send,
) -> Result<(), EdgeError> {
    let edge = Box::pin(Edge::open(config, tamper)).await?;
    let (stop, signal) = shutdown();
    let tasks = edge.start(Tasks::new(signal, edge.pace()));
    until.await;
    tracing::info!("stopping");
    stop.stop();
    tasks.finish().await;
    tracing::info!("stopped");
    Ok(())
}

/// Everything open and bound, nothing running yet.
struct Edge {
    config: EdgeConfig,
    dir: StateDir,
    _lock: Lock,
    store: Store,
    storage: StorageWatch,
    board: Board,
    metrics: Arc<Metrics>,
    listener: Arc<TcpListener>,
    services: Vec<Arc<ServiceShared>>,
    proxies: BTreeMap<String, Arc<TcpListener>>,
    lanes: Vec<Arc<LaneShared>>,
    client: Option<Client>,
}

impl Edge {
    async fn open(mut config: EdgeConfig, tamper: Option<Tamper>) -> Result<Self, EdgeError> {
        let policy = healing_policy::apply(&mut config)?;
        let dir = StateDir::open(&config.state_dir.path)?;
        let lock = dir.lock()?;
        dir.make_room();
        if let Some(policy) = &policy {
            healing_policy::note_version(policy, &dir)?;
            tracing::info!(
                path = %policy.path.display(),
                version = policy.version,
                signers = policy.signers.len(),
                "the signed policy of healing holds"
            );
        }
        if config.state_dir.by_default {
            tracing::info!(path = %dir.root().display(), "no state_dir is set, keeping state here");
        }
        let joined = dir.joined()?;
        let node = node_name(config.node.clone(), joined.as_ref())?;
        let store = Store::open(&dir)?;
        let board = Board::new(node.as_str(), config.detection.warm_up_rows);
        let metrics = Arc::new(Metrics::new());
        let storage = StorageWatch::new(dir.clone(), board.clone(), Arc::clone(&metrics));
        for incident in store.incidents(INCIDENTS_SHOWN).await? {
            board.show_incident(&incident);
        }
        let services: Vec<Arc<ServiceShared>> = config
            .services
            .iter()
            .map(|service| Arc::new(ServiceShared::new(service.clone())))
            .collect();
        let lanes = lanes(&config, &dir, &board);
        let client = match Box::pin(federation(&config, &dir, &node, joined, &store)).await? {
            Err(reason) => {
                board.update(|status| {
                    status.federation = Federation::Off;
                    status.federation_detail = Some(reason);
                });
                None
            }
            Ok((joined, ledger)) => {
                let releaser = Releaser::new(
                    ledger,
                    Arc::clone(&lanes[0]),
                    config.sampling.interval,
                    config.federation.local_steps,
                    match config.federation.noise {
                        NoiseBackend::Exact => Box::new(ExactGaussian),
                        NoiseBackend::OpenDp => Box::new(OpenDpGaussian),
                    },
                    tamper,
                );
                Some(Client {
                    settings: config.federation.clone(),
                    joined,
                    dir: dir.clone(),
                    lane: Arc::clone(&lanes[0]),
                    lanes: lanes.clone(),
                    budget: releaser.budget(),
                    releaser: Arc::new(Mutex::new(releaser)),
                    store: store.clone(),
                    storage: storage.clone(),
                    board: board.clone(),
                    metrics: Arc::clone(&metrics),
                    fleet: None,
                })
            }
        };
        bounds::undo_left(&dir, &config.services);
        let mut proxies = BTreeMap::new();
        for service in &services {
            if let Some(settings) = &service.config.proxy {
                let bound = TcpListener::bind(settings.listen).await;
                let listener = bound.map_err(|source| EdgeError::Proxy {
                    service: service.name.clone(),
                    address: settings.listen,
                    source,
                })?;
                proxies.insert(service.name.clone(), Arc::new(listener));
            }
        }
        let listener = bind(config.http.listen).await?;
        let address = listener.local_addr().map_err(|source| EdgeError::Listen {
            address: config.http.listen,
            source,
        })?;
        match dir.save_http_address(address) {
            // Who has no room for that has the more need of being looked after.
            Err(StateDirError::Io { path, source }) if is_no_room(&source) => {
                // What an earlier one wrote may be another's by now.
                drop(std::fs::remove_file(&path));
                tracing::error!(path = %path.display(), %address, "no room to tell commands where the page is");
            }
            other => other?,
        }
        announce(&node, &config, address, client.as_ref(), &board);
        Ok(Self {
            config,
            dir,
            _lock: lock,
            store,
            storage,
            board,
            metrics,
            listener: Arc::new(listener),
            services,
            proxies,
            lanes,
            client,
        })
    }

    /// A service may take its own time to stop, and then what is left of it is ended.
    fn pace(&self) -> Pace {
        let slowest = self
            .config
            .services
            .iter()
            .map(|service| service.stop_grace)
            .max()
            .unwrap_or_default();
        let pace = Pace::default();
        Pace {
            grace: pace.grace + slowest,
            ..pace
        }
    }

    fn start(&self, mut tasks: Tasks) -> Tasks {
        let (events, received) = mpsc::channel(EVENTS);
        let received: Events = Arc::new(tokio::sync::Mutex::new(received));
        self.start_page(&mut tasks);
        let (storage, store) = (self.storage.clone(), self.store.clone());
        tasks.spawn("storage", move |shutdown| {
            storage.clone().run(store.clone(), shutdown)
        });
        let hands = self.start_services(&mut tasks, &events);
        let desk = FleetDesk::default();
        let fleet = self.fleet_end(&desk);
        let new_normals = respond::NewNormals::default();
        let responder = Responder {
            hands,
            budget: self.config.healing_budget,
            store: self.store.clone(),
            storage: self.storage.clone(),
            board: self.board.clone(),
            metrics: Arc::clone(&self.metrics),
            unsaved: respond::Unsaved::default(),
            new_normals: new_normals.clone(),
            dir: self.dir.clone(),
            undone: respond::Undone::default(),
            keys: self.config.healing_policy.keys.clone(),
            lifted_by: self.config.healing_policy.lifted_by(),
            fleet: desk,
        };
        tasks.spawn("respond", move |shutdown| {
            respond::run(responder.clone(), Arc::clone(&received), shutdown)
        });
        let watch = Watch {
            sampling: self.config.sampling.clone(),
            detection: self.config.detection.clone(),
            risk: risk_model(&self.config),
            lanes: self.lanes.iter().cloned().zip(self.services_of_lanes()).collect(),
            dir: self.dir.clone(),
            events,
            storage: self.storage.clone(),
            board: self.board.clone(),
            metrics: Arc::clone(&self.metrics),
            new_normals,
        };
        tasks.spawn("watch", move |shutdown| watch::run(watch.clone(), shutdown));
        if fleet.is_some() && self.client.is_none() {
            tracing::warn!(
                "the policy of healing has budgets of the fleet, and this edge is in no federation: nothing is braked, and shared actions go to a person"
            );
        }
        if let Some(mut client) = self.client.clone() {
            client.fleet = fleet;
            tasks.spawn("federation", move |shutdown| {
                Box::pin(client::run(client.clone(), shutdown))
            });
        }
        tasks
    }

    /// The link's end of what concerns the fleet; `None` where the policy has no budgets of it: then nothing is told and nothing heard.
    fn fleet_end(&self, desk: &FleetDesk) -> Option<FleetEnd> {
        let mut policies = self.config.services.iter().map(|service| &service.healing);
        policies.find_map(|policy| policy.fleet).map(|budget| FleetEnd {
            budget,
            desk: desk.clone(),
        })
    }

    fn start_page(&self, tasks: &mut Tasks) {
        let page = Page {
            board: self.board.clone(),
            metrics: Arc::clone(&self.metrics),
            tasks: tasks.board(),
            tick_max: self.config.sampling.interval * TICKS_MISSED_MAX + Duration::from_secs(1),
        };
        let listener = Arc::clone(&self.listener);
        tasks.spawn("page", move |shutdown| {
            http::serve(Arc::clone(&listener), page.clone(), shutdown)
        });
    }

    fn start_services(&self, tasks: &mut Tasks, events: &mpsc::Sender<Input>) -> BTreeMap<String, Hand> {
        let mut hands = BTreeMap::new();
        for shared in &self.services {
            let (commands, received) = mpsc::channel::<Command>(COMMANDS);
            let received: Commands = Arc::new(tokio::sync::Mutex::new(received));
            let context = ServiceContext {
                shared: Arc::clone(shared),
                dir: self.dir.clone(),
                events: events.clone(),
                board: self.board.clone(),
                metrics: Arc::clone(&self.metrics),
            };
            self.board.update_service(&shared.name, |_| {});
            let own = context.clone();
            tasks.spawn(format!("service {}", shared.name), move |shutdown| {
                service::own(own.clone(), Arc::clone(&received), shutdown)
            });
            if let (Some(proxy), Some(listener)) = (&shared.proxy, self.proxies.get(&shared.name)) {
                let (context, proxy, listener) = (context.clone(), Arc::clone(proxy), Arc::clone(listener));
                tasks.spawn(format!("proxy {}", shared.name), move |shutdown| {
                    proxy::run(
                        context.clone(),
                        Arc::clone(&proxy),
                        Arc::clone(&listener),
                        shutdown,
                    )
                });
            }
            let probe = context.clone();
            tasks.spawn(format!("probe {}", shared.name), move |shutdown| {
                service::watch(probe.clone(), shutdown)
            });
            if let Some(state) = shared.config.state.clone() {
                let offsite = self.config.offsite.clone();
                let (store, storage) = (self.store.clone(), self.storage.clone());
                tasks.spawn(format!("checkpoint {}", shared.name), move |shutdown| {
                    checkpoints::run(
                        context.clone(),
                        state.clone(),
                        offsite.clone(),
                        store.clone(),
                        storage.clone(),
                        shutdown,
                    )
                });
            }
            hands.insert(
                shared.name.clone(),
                Hand {
                    shared: Arc::clone(shared),
                    commands,
                },
            );
        }
        hands
    }

    fn services_of_lanes(&self) -> impl Iterator<Item = Option<Arc<ServiceShared>>> {
        let services: Vec<_> = self.services.iter().cloned().map(Some).collect();
        if services.is_empty() { vec![None] } else { services }.into_iter()
    }
}

/// The fitted risk model; the linear extrapolation when it cannot be used, for a bad file must not stop detection and
/// healing.
fn risk_model(config: &EdgeConfig) -> RiskModel {
    RiskModel::load(&config.risk).unwrap_or_else(|error| {
        tracing::error!(code = "TH-E0335", %error, "the risk model is not used; resources are extrapolated linearly");
        RiskModel::linear(config.risk.horizons.clone())
    })
}

/// One lane for each service; without services one for the bare host.
fn lanes(config: &EdgeConfig, dir: &StateDir, board: &Board) -> Vec<Arc<LaneShared>> {
    let mut names: Vec<String> = config
        .services
        .iter()
        .map(|service| service.name.to_string())
        .collect();
    if names.is_empty() {
        names.push(HOST.to_owned());
    }
    let schema = FeatureSchema::host_service_v1();
    let lane = |name: String| {
        let lane = LaneShared::new(
            &name,
            schema.clone(),
            config.sampling.history_rows,
            &config.detection,
            config.sampling.interval,
        );
        if let Some(detector) = load_detector(&dir.model(), &lane) {
            tracing::info!(
                lane = name,
                rows = detector.rows(),
                "the model of the last run is in use"
            );
            let version = detector.provenance().model_version;
            board.update(|status| status.model_version = status.model_version.max(version));
            lane.replace(detector);
        }
        Arc::new(lane)
    };
    names.into_iter().map(lane).collect()
}

/// The name that this host goes by: as it joined, else as it is configured, else its own.
///
/// # Errors
/// [`EdgeError::OtherName`]: the certificate holds another name than the configuration.
pub(crate) fn node_name(configured: Option<NodeId>, joined: Option<&Joined>) -> Result<NodeId, EdgeError> {
    match (configured, joined) {
        (Some(configured), Some(joined)) if configured != joined.node => Err(EdgeError::OtherName {
            configured,
            enrolled: joined.node.clone(),
        }),
        (_, Some(joined)) => Ok(joined.node.clone()),
        (Some(configured), None) => Ok(configured),
        (None, None) => Ok(host_name()),
    }
}

/// The host's name as far as it can be a node id.
#[expect(clippy::expect_used, reason = "the constant is a node id")]
fn host_name() -> NodeId {
    let name = sysinfo::System::host_name().unwrap_or_default().to_lowercase();
    let label = name.split('.').next().unwrap_or_default();
    let kept: String = label
        .chars()
        .filter(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || *c == '-')
        .collect();
    let kept = kept
        .trim_matches('-')
        .chars()
        .take(NodeId::LEN_MAX)
        .collect::<String>();
    kept.parse()
        .unwrap_or_else(|_| "edge".parse().expect("a letter word is a node id"))
}

/// Opens the ledger of a joined edge; else says why federation stays off. Detection and healing must not stand still for
/// a policy or a ledger that needs a person.
async fn federation(
    config: &EdgeConfig,
    dir: &StateDir,
    node: &NodeId,
    joined: Option<Joined>,
    store: &Store,
) -> Result<Result<(Joined, Ledger), String>, EdgeError> {
    if !config.federation.enabled {
        return Ok(Err("federation.enabled is false".to_owned()));
    }
    let Some(joined) = joined else {
        return Ok(Err("this edge has not joined: run `theriac-edge join`".to_owned()));
    };
    let known = store.known_ledger().await?;
    match opening::ledger(config, dir, node, known.as_ref(), now()) {
        Ok(ledger) => {
            if ledger.opening().torn_bytes > 0 {
                tracing::warn!(
                    bytes = ledger.opening().torn_bytes,
                    "the privacy ledger ended in an incomplete record, for which nothing had been read: cut it off"
                );
            }
            // A ledger that was charged before `edge.db` kept its head, or whose last note was lost in a crash.
            if ledger.spent().releases > 0 {
                store.note_ledger(ledger.known_head()).await?;
            }
            Ok(Ok((joined, ledger)))
        }
        Err(barred) => {
            let code = barred.code();
            tracing::error!(code, %barred, fix = barred.fix(), "federation is off; detection and healing go on");
            Ok(Err(format!("{code}: {barred}; {}", barred.fix())))
        }
    }
}

async fn bind(address: SocketAddr) -> Result<TcpListener, EdgeError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| EdgeError::Listen { address, source })
}

fn announce(node: &NodeId, config: &EdgeConfig, address: SocketAddr, client: Option<&Client>, board: &Board) {
    let federation = match client {
        Some(client) => format!("federation {}", client.joined.federation),
        None => format!(
            "federation off ({})",
            board.status().federation_detail.unwrap_or_default()
        ),
    };
    tracing::info!(
        node = node.as_str(),
        services = config.services.len(),
        page = %format_args!("http://{address}/status"),
        warm_up_rows = config.detection.warm_up_rows,
        interval_ms = u64::try_from(config.sampling.interval.as_millis()).unwrap_or(u64::MAX),
        "watching; {federation}"
    );
}

fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use theriac_privacy::ledger::KnownHead;
    use theriac_protocol::units::Digest;

    use super::*;

    /// A joined edge's state directory and configuration.
    fn joined(root: &std::path::Path) -> (EdgeConfig, StateDir) {
        let dir = StateDir::open(&root.join("s")).unwrap();
        dir.save_joined(&Joined {
            node: "site-a".parse().unwrap(),
            federation: "f".to_owned(),
            aggregator: "127.0.0.1:1".to_owned(),
        })
        .unwrap();
        let mut config = EdgeConfig::load(None, []).unwrap();
        config.state_dir.path = dir.root().to_owned();
        config.http.listen = "127.0.0.1:0".parse().unwrap();
        (config, dir)
    }

    #[tokio::test]
    async fn a_lost_ledger_and_a_bad_policy_turn_federation_off_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let (config, dir) = joined(root.path());
        let edge = Box::pin(Edge::open(config.clone(), None)).await.unwrap();
        assert!(edge.client.is_some() && dir.ledger().exists());
        let known = KnownHead {
            head: Digest([7; 32]),
            records: 3,
        };
        edge.store.note_ledger(known).await.unwrap();
        drop(edge);
        std::fs::remove_file(dir.ledger()).unwrap();
        let off = async |code: &str| {
            let edge = Box::pin(Edge::open(config.clone(), None)).await.unwrap();
            let status = edge.board.status();
            assert!(edge.client.is_none() && status.federation == Federation::Off);
            let detail = status.federation_detail.unwrap();
            assert!(detail.starts_with(code), "{detail}");
            assert!(!dir.ledger().exists(), "a new ledger was begun");
        };
        off("TH-E0309").await;
        std::fs::write(dir.privacy_policy(), "epsilon = 'much'").unwrap();
        off("TH-E0307").await;
        std::fs::remove_file(dir.privacy_policy()).unwrap();
        off("TH-E0307").await;
        assert!(!dir.privacy_policy().exists(), "a lost policy was replaced");
    }
}
