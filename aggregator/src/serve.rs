//! The running server: configure, check, lock, bind, announce, run, drain. A bad configuration fails before a port opens.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};
use theriac_certs::{Authority, AuthorityError, Identity, IdentityError};
use theriac_command::problem::Problem;
use theriac_protocol::units::{Digest, NodeId};
use theriac_transport::join::JoinListener;
use theriac_transport::{CloseCode, Endpoint, EndpointError, Limits, bind_lasting_server};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::accept::{Sessions, accept};
use crate::audit::{AuditKey, AuditKeyError};
use crate::central::{CENTRAL_HINT, OpenError};
use crate::config::CheckedConfig;
use crate::data_dir::{DataDir, DataDirError, DataDirLock, IDENTITY, replace_file};
use crate::driver::{Driver, DriverError, INPUTS_MAX};
use crate::enrol::Enrolment;
use crate::http::{self, Page};
use crate::metrics::Metrics;
use crate::models::{Models, frame_bytes_max};
use crate::store::{Store, StoreError, StoreThread, records};

/// Part of a certificate's life that must be left; below it the aggregator gives itself a new one.
const RENEW_BELOW: f64 = 1.0 / 3.0;
/// How often the certificate's age is looked at.
const RENEW_CHECK: Duration = Duration::from_hours(1);
/// Name of the meta row with the certificate's hosts.
pub(crate) const META_HOSTS: &str = "hosts";

/// Why the server does not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The data directory cannot be used.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An authority cannot be loaded.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The aggregator's identity cannot be loaded or has expired.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The audit key cannot be loaded.
    #[error(transparent)]
    AuditKey(#[from] AuditKeyError),
    /// TLS cannot be set up.
    #[error(transparent)]
    Trust(#[from] theriac_certs::trust::TrustError),
    /// The configuration names another federation than the data directory.
    #[error("the configuration says federation `{configured}`, {data_dir} belongs to `{found}`")]
    OtherFederation {
        /// In the configuration.
        configured: String,
        /// In the store.
        found: String,
        /// The data directory.
        data_dir: PathBuf,
    },
    /// A UDP port cannot be opened.
    #[error("cannot open {what} on {address}: {source}")]
    Listen {
        /// `listen` or `join_listen`.
        what: &'static str,
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: EndpointError,
    },
    /// The TCP port of the page cannot be opened.
    #[error("cannot open http on {address}: {source}")]
    Http {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// The last state cannot be taken up.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// A part of the server has ended by a fault of its own.
    #[error("the {0} has ended unexpectedly")]
    Ended(&'static str),
}

impl ServeError {
    /// As a person meets it.
    pub fn problem(&self) -> Problem {
        match self {
            Self::DataDir(error @ DataDirError::Locked { .. }) => {
                Problem::temporary("TH-E0703", error).hint(error.hint())
            }
            Self::DataDir(error) => Problem::config("TH-E0702", error).hint(error.hint()),
            Self::Store(error)
            | Self::Driver(DriverError::Store(error) | DriverError::Central(OpenError::Store(error))) => {
                error.problem()
            }
            Self::Authority(AuthorityError::Host(_) | AuthorityError::NoHost) => {
                Problem::usage("TH-E0711", self)
                    .hint("give what edges dial, separated by commas: --hosts agg.example.org,192.0.2.7")
            }
            Self::Authority(_) | Self::Identity(_) | Self::AuditKey(_) | Self::Trust(_) => {
                Problem::config("TH-E0705", self).hint(
                    "keys must be there, unexpired, and readable by their owner alone (chmod 600); \
                     restore the data directory from a backup rather than making new authorities",
                )
            }
            Self::OtherFederation { found, .. } => Problem::config("TH-E0706", self).hint(format!(
                "set federation = \"{found}\", or point data_dir at the right directory"
            )),
            Self::Listen { address, .. } | Self::Http { address, .. } => Problem::temporary("TH-E0707", self)
                .hint(format!(
                    "another program may use port {}: choose a free one, or 0 for any",
                    address.port()
                )),
            Self::Driver(DriverError::Central(error @ OpenError::Ledger(_))) => {
                Problem::config("TH-E0722", error).hint(CENTRAL_HINT)
            }
            Self::Driver(error) => Problem::config("TH-E0708", error)
                .hint("restore the [model] section to what it was at `init`, or begin a new federation"),
            Self::Ended(_) => {
                Problem::failed("TH-E0709", self).hint("this is a bug: the log above says more")
            }
        }
    }
}

/// Where the server listens; also in `DATA/addresses.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    /// Main listener, UDP.
    pub listen: SocketAddr,
    /// Join listener, UDP.
    pub join_listen: SocketAddr,
    /// Page, TCP.
    pub http: SocketAddr,
    /// The server's process.
    pub pid: u32,
}

/// A running server.
#[derive(Debug)]
pub struct Running {
    addresses: Addresses,
    task: JoinHandle<Result<(), ServeError>>,
}

impl Running {
    /// Where it listens.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Waits until it has ended: after `shutdown` turned true, with everything that was acknowledged on the disk.
    ///
    /// # Errors
    /// [`ServeError::Ended`] when a part of it failed.
    pub async fn wait(self) -> Result<(), ServeError> {
        self.task.await.unwrap_or(Err(ServeError::Ended("server")))
    }
}

/// Starts the server and returns once all its ports are open.
///
/// # Errors
/// [`ServeError`]; nothing is left running then.
pub async fn serve(config: CheckedConfig, shutdown: watch::Receiver<bool>) -> Result<Running, ServeError> {
    let dir = DataDir::new(&config.data_dir);
    let ground = Ground::prepare(&config, &dir)?;
    crate::spill::prepare(&dir.spill()).map_err(|source| DataDirError::Io {
        what: "put rows of a round in",
        path: dir.spill(),
        source,
    })?;
    match crate::spill::sweep(&dir.spill()) {
        Ok(0) => {}
        Ok(files) => tracing::info!(files, "removed what an interrupted round had left of its rows"),
        Err(error) => tracing::warn!(%error, "cannot remove what an interrupted round has left of its rows"),
    }
    let (store, thread) = Store::open(&dir)?;
    let (metrics, registry) = Metrics::new();
    let models = Arc::new(Models::default());
    let resumed = Driver::resume(
        &config,
        store.clone(),
        Arc::clone(&models),
        Arc::new(ground.audit_key),
        metrics.clone(),
    )
    .await;
    let (driver, views) = match resumed {
        Ok(resumed) => resumed,
        Err(error) => {
            drop(store);
            thread.join();
            return Err(error.into());
        }
    };

    let mut limits = Limits {
        connections_max: config.limits.connections_max,
        ..Limits::default()
    };
    limits.upload_bytes_in_flight_max =
        u32::try_from(config.limits.upload_bytes_in_flight_max).unwrap_or(u32::MAX);
    limits.frame_timeout = config.limits.write_timeout;
    let edge_authority = ground.edge_authority.certificate_der().to_vec();
    let tls = theriac_certs::trust::server_config(&ground.identity, &edge_authority)?;
    let endpoint =
        bind_lasting_server(config.listen, tls, &limits, &ground.reset_secret).map_err(|source| {
            ServeError::Listen {
                what: "listen",
                address: config.listen,
                source,
            }
        })?;
    let join_tls = theriac_certs::trust::join_server_config(&ground.identity)?;
    let join_error = |source| ServeError::Listen {
        what: "join_listen",
        address: config.join_listen,
        source,
    };
    let joins = JoinListener::bind(config.join_listen, join_tls, &limits).map_err(join_error)?;
    let http_error = |source| ServeError::Http {
        address: config.http,
        source,
    };
    let page_listener = TcpListener::bind(config.http).await.map_err(http_error)?;
    let addresses = Addresses {
        listen: endpoint.local_addr().map_err(|source| ServeError::Listen {
            what: "listen",
            address: config.listen,
            source,
        })?,
        join_listen: joins.local_addr().map_err(join_error)?,
        http: page_listener.local_addr().map_err(http_error)?,
        pid: std::process::id(),
    };
    write_addresses(&dir, &addresses)?;

    let (inputs, queue) = mpsc::channel(INPUTS_MAX);
    let layout = config
        .model
        .update(config.rounds.kind)
        .map_err(DriverError::from)?;
    let sessions = Arc::new(Sessions {
        federation: config.federation.clone(),
        spec: config.model.clone(),
        limits: config.limits.clone(),
        kind: config.rounds.kind,
        rule: config.rounds.rule,
        update_bytes: u64::from(layout.values) * 4,
        frame_bytes_max: frame_bytes_max(layout.values),
        registry: views.registry.clone(),
        terms: views.terms.clone(),
        late_terms: views.late_terms.clone(),
        driver: inputs,
        store: store.clone(),
        models,
        metrics: metrics.clone(),
        numbers: AtomicU64::new(1),
    });
    let advertise = config
        .advertise
        .clone()
        .unwrap_or_else(|| format!("localhost:{}", addresses.listen.port()));
    let enrolment = Arc::new(Enrolment::new(
        config.federation.clone(),
        advertise,
        Arc::new(ground.edge_authority),
        ground.aggregator_authority.certificate_der().to_vec(),
        store.clone(),
        metrics.clone(),
    ));
    let ends = Arc::new(Mutex::new(ground.identity.expires()));
    let (alive, driver_alive) = watch::channel(true);
    let page = Arc::new(Page {
        federation: config.federation.clone(),
        store: store.clone(),
        status: views.status,
        endpoint: endpoint.clone(),
        metrics,
        registry,
        started: Instant::now(),
        certificate_ends: Arc::clone(&ends),
        driver_alive,
    });
    let renewal = Renewal {
        dir,
        authority: ground.aggregator_authority,
        name: ground.identity.name().node.clone(),
        hosts: ground.hosts,
        edge_authority,
        ends,
        endpoint: endpoint.clone(),
        join_endpoint: joins.endpoint().clone(),
        _lock: ground.lock,
    };
    drop(store);
    let parts = Parts {
        driver,
        queue,
        endpoint,
        joins,
        enrolment,
        sessions,
        page,
        page_listener,
        renewal,
        alive,
        thread,
    };
    let task = tokio::spawn(parts.run(shutdown));
    tracing::info!(listen = %addresses.listen, join = %addresses.join_listen, http = %addresses.http, "serving");
    Ok(Running { addresses, task })
}

/// What must be in order before anything is opened.
struct Ground {
    lock: DataDirLock,
    aggregator_authority: Authority,
    edge_authority: Authority,
    identity: Identity,
    hosts: Vec<String>,
    audit_key: AuditKey,
    /// By which edges learn that an earlier process of this data directory, and their session with it, is gone.
    reset_secret: [u8; 32],
}

impl Ground {
    fn prepare(config: &CheckedConfig, dir: &DataDir) -> Result<Self, ServeError> {
        dir.check()?;
        let lock = dir.lock()?;
        let database = crate::store::Database::open(dir)?;
        let found = records::meta(database.read(), records::META_FEDERATION)?;
        let found = String::from_utf8_lossy(&found).into_owned();
        if found != config.federation {
            let (configured, data_dir) = (config.federation.clone(), config.data_dir.clone());
            return Err(ServeError::OtherFederation {
                configured,
                found,
                data_dir,
            });
        }
        let hosts = records::meta(database.read(), META_HOSTS)?;
        let hosts: Vec<String> = serde_json::from_slice(&hosts).unwrap_or_default();
        let seed = records::meta(database.read(), records::META_NONCE_SEED)?;
        let reset_secret = Digest::of(&[b"stateless reset".as_slice(), &seed].concat()).0;
        let aggregator_authority = Authority::load(&dir.aggregator_authority())?;
        let edge_authority = Authority::load(&dir.edge_authority())?;
        let identity = Identity::load(&dir.identity(), IDENTITY)?;
        let identity = renewed(&identity, &aggregator_authority, &hosts, dir)?.unwrap_or(identity);
        identity.check_valid(SystemTime::now())?;
        let audit_key = AuditKey::load(&dir.audit_key(), &config.federation)?;
        Ok(Self {
            lock,
            aggregator_authority,
            edge_authority,
            identity,
            hosts,
            audit_key,
            reset_secret,
        })
    }
}

/// A new certificate for the aggregator when the old one is in the last third of its life.
fn renewed(
    identity: &Identity,
    authority: &Authority,
    hosts: &[String],
    dir: &DataDir,
) -> Result<Option<Identity>, ServeError> {
    let validity = identity.validity();
    let life = validity
        .not_after
        .duration_since(validity.not_before)
        .unwrap_or_default();
    let left = validity
        .not_after
        .duration_since(SystemTime::now())
        .unwrap_or_default();
    if left.as_secs_f64() > life.as_secs_f64() * RENEW_BELOW {
        return Ok(None);
    }
    let next = authority.issue_aggregator(&identity.name().node, hosts)?;
    next.save(&dir.identity(), IDENTITY)?;
    tracing::info!("the aggregator's certificate was renewed");
    Ok(Some(next))
}

fn write_addresses(dir: &DataDir, addresses: &Addresses) -> Result<(), ServeError> {
    let path = dir.addresses();
    let text = serde_json::to_vec_pretty(addresses).unwrap_or_default();
    replace_file(&path, &text).map_err(|source| {
        DataDirError::Io {
            what: "write",
            path,
            source,
        }
        .into()
    })
}

struct Renewal {
    dir: DataDir,
    authority: Authority,
    name: NodeId,
    hosts: Vec<String>,
    edge_authority: Vec<u8>,
    ends: Arc<Mutex<SystemTime>>,
    endpoint: Endpoint,
    join_endpoint: Endpoint,
    /// Lives as long as the server.
    _lock: DataDirLock,
}

impl Renewal {
    /// Looks once an hour; open connections are not touched.
    async fn run(self) {
        loop {
            tokio::time::sleep(RENEW_CHECK).await;
            if let Err(error) = self.renew() {
                tracing::error!(%error, node = %self.name, "the aggregator's certificate could not be renewed");
            }
        }
    }

    fn renew(&self) -> Result<(), ServeError> {
        let identity = Identity::load(&self.dir.identity(), IDENTITY)?;
        if let Some(next) = renewed(&identity, &self.authority, &self.hosts, &self.dir)? {
            let tls = theriac_certs::trust::server_config(&next, &self.edge_authority)?;
            let join_tls = theriac_certs::trust::join_server_config(&next)?;
            let failed = not_renewed("listen", &self.endpoint);
            self.endpoint.set_server_tls(tls).map_err(failed)?;
            let failed = not_renewed("join_listen", &self.join_endpoint);
            self.join_endpoint.set_server_tls(join_tls).map_err(failed)?;
            *self.ends.lock().unwrap_or_else(PoisonError::into_inner) = next.expires();
        }
        Ok(())
    }
}

/// A listener that does not take the new certificate.
fn not_renewed(what: &'static str, endpoint: &Endpoint) -> impl FnOnce(EndpointError) -> ServeError {
    let address = endpoint.local_addr();
    let address = address.unwrap_or_else(|_| SocketAddr::from(([0, 0, 0, 0], 0)));
    move |source| ServeError::Listen {
        what,
        address,
        source,
    }
}

/// Everything that runs.
struct Parts {
    driver: Driver,
    queue: mpsc::Receiver<crate::driver::DriverInput>,
    endpoint: Endpoint,
    joins: JoinListener,
    enrolment: Arc<Enrolment>,
    sessions: Arc<Sessions>,
    page: Arc<Page>,
    page_listener: TcpListener,
    renewal: Renewal,
    alive: watch::Sender<bool>,
    thread: StoreThread,
}

impl Parts {
    async fn run(self, shutdown: watch::Receiver<bool>) -> Result<(), ServeError> {
        let Self {
            driver,
            queue,
            endpoint,
            joins,
            enrolment,
            sessions,
            page,
            page_listener,
            renewal,
            alive,
            thread,
        } = self;
        let join_endpoint = joins.endpoint().clone();
        // One signal for all parts: from the caller, or because the driver ended by itself.
        let (stop, stopped) = watch::channel(false);
        let accepting = tokio::spawn(accept(endpoint.clone(), sessions));
        let joining = tokio::spawn(joins.serve(move |request, _from| {
            let enrolment = Arc::clone(&enrolment);
            async move { enrolment.answer(request).await }
        }));
        let paging = tokio::spawn(http::serve(page_listener, page, stopped));
        let renewing = tokio::spawn(renewal.run());
        let driving = tokio::spawn(driver.run(queue, shutdown.clone())).await;
        alive.send_replace(false);
        let asked = *shutdown.borrow();
        // The driver has said good-bye to all; sessions end by themselves, at the latest when the endpoint closes.
        join_endpoint.close(CloseCode::GoingDown, "the aggregator goes down");
        let endpoint_closes = async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            endpoint.close(CloseCode::GoingDown, "the aggregator goes down");
        };
        let drained = async { drop(tokio::join!(accepting, endpoint_closes)) };
        if tokio::time::timeout(Duration::from_secs(5), drained)
            .await
            .is_err()
        {
            tracing::warn!("some sessions did not end in time");
        }
        stop.send_replace(true);
        renewing.abort();
        drop(tokio::time::timeout(Duration::from_secs(2), paging).await);
        drop(tokio::time::timeout(Duration::from_secs(2), joining).await);
        drop(tokio::time::timeout(Duration::from_secs(1), endpoint.wait_idle()).await);
        drop(renewing.await);
        drop(
            tokio::time::timeout(
                Duration::from_secs(5),
                tokio::task::spawn_blocking(move || thread.join()),
            )
            .await,
        );
        match driving {
            Ok(()) if asked => Ok(()),
            _ => Err(ServeError::Ended("round driver")),
        }
    }
}
