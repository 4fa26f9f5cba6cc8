//! A new federation: two authorities, the aggregator's identity, the audit key, the store, the configuration, a first token.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use rand::RngCore as _;
use theriac_audit::leaf::AuditEvent;
use theriac_certs::{Authority, Identity, JoinToken, Role, certificate_fingerprint, public_key_fingerprint};
use theriac_protocol::compress::encode_f32;
use theriac_protocol::units::{Digest, ModelVersion, NodeId, Round};

use crate::audit::AuditKey;
use crate::config::{self, CheckedConfig, ConfigError, Settings};
use crate::data_dir::{DataDir, DataDirError, IDENTITY, make_private, replace_file};
use crate::enrol::not_after;
use crate::serve::{META_HOSTS, ServeError};
use crate::store::models::{self, ModelRow};
use crate::store::records;
use crate::store::{Database, StoreError, tokens, wall_clock};

/// What `init` is asked for.
#[derive(Debug, Clone)]
pub struct InitOptions {
    /// The new data directory; made if it is not there, refused if it holds an aggregator.
    pub dir: PathBuf,
    /// DNS names and addresses in the aggregator's certificate; the first one is in the join line.
    pub hosts: Vec<String>,
    /// What the configuration file will say. `federation` must be set; `data_dir` is written as `.`.
    pub settings: Settings,
    /// Site of the first token; `None` makes none.
    pub site: Option<NodeId>,
}

impl InitOptions {
    /// A federation on this machine, with a first token for `edge-1`.
    pub fn new(dir: impl Into<PathBuf>, federation: &str) -> Self {
        Self {
            dir: dir.into(),
            hosts: ["localhost", "127.0.0.1", "::1"].map(str::to_owned).to_vec(),
            settings: Settings {
                federation: federation.to_owned(),
                ..Settings::default()
            },
            site: NodeId::new("edge-1").ok(),
        }
    }
}

/// What `init` has made.
#[derive(Debug)]
pub struct Initialised {
    /// The configuration file.
    pub config: PathBuf,
    /// The same, checked.
    pub checked: CheckedConfig,
    /// SHA-256 of the aggregators' authority: what a token pins.
    pub authority_fingerprint: [u8; 32],
    /// The first token, with its site.
    pub token: Option<(NodeId, JoinToken)>,
    /// `HOST:PORT` of the join listener as new edges reach it.
    pub join_address: String,
}

impl Initialised {
    /// The command that enrols the first edge.
    pub fn join_line(&self) -> Option<String> {
        self.token
            .as_ref()
            .map(|(_, token)| join_line(&self.join_address, token))
    }
}

/// The command that enrols an edge with a token.
pub fn join_line(join_address: &str, token: &JoinToken) -> String {
    format!("theriac-edge join --aggregator {join_address} --token {token}")
}

/// `HOST:PORT` of the join listener for people: an IPv6 address gets its brackets.
pub fn join_address(host: &str, port: u16) -> String {
    if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

/// Why there is no new federation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InitError {
    /// The settings are no good.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Keys, files or the store.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// No host to put into the certificate.
    #[error("no host for the aggregator's certificate: edges could not tell it from another")]
    NoHosts,
}

impl From<DataDirError> for InitError {
    fn from(error: DataDirError) -> Self {
        Self::Serve(error.into())
    }
}
impl From<StoreError> for InitError {
    fn from(error: StoreError) -> Self {
        Self::Serve(error.into())
    }
}

/// Makes a federation in a directory that holds none. The configuration file is written last: without it nothing runs, so
/// an interrupted `init` leaves nothing that looks finished.
///
/// # Errors
/// [`InitError`]; an existing aggregator is never touched.
pub fn init(options: InitOptions) -> Result<Initialised, InitError> {
    let InitOptions {
        dir: root,
        hosts,
        mut settings,
        site,
    } = options;
    if hosts.is_empty() {
        return Err(InitError::NoHosts);
    }
    settings.data_dir = PathBuf::from(".");
    if settings.advertise.is_none() && settings.listen.port() != 0 {
        settings.advertise = Some(join_address(&hosts[0], settings.listen.port()));
    }
    let checked = settings.clone().check(&root)?;
    let dir = DataDir::new(root);
    refuse_occupied(&dir)?;
    let federation = checked.federation.as_str();
    let now = SystemTime::now();
    let authority = |role| Authority::generate(federation, role, now).map_err(ServeError::from);
    let (aggregators, edges) = (authority(Role::Aggregator)?, authority(Role::Edge)?);
    let name =
        NodeId::new(IDENTITY).map_err(|error| ServeError::Store(StoreError::Conflict(error.to_string())))?;
    // Before anything is on the disk: a host that no certificate can carry must not leave half an aggregator behind.
    let identity = aggregators
        .issue_aggregator(&name, &hosts)
        .map_err(ServeError::from)?;
    let file = |what, path: PathBuf| move |source| DataDirError::Io { what, path, source };
    for path in [
        dir.root().to_owned(),
        dir.aggregator_authority(),
        dir.edge_authority(),
        dir.identity(),
    ] {
        make_private(&path).map_err(file("make", path))?;
    }
    let _lock = dir.lock()?;
    aggregators
        .save(&dir.aggregator_authority())
        .map_err(ServeError::from)?;
    edges.save(&dir.edge_authority()).map_err(ServeError::from)?;
    identity
        .save(&dir.identity(), IDENTITY)
        .map_err(ServeError::from)?;
    AuditKey::generate(&dir.audit_key(), federation).map_err(ServeError::from)?;
    let mut database = Database::create(&dir)?;
    fill(&mut database, &checked, &hosts)?;
    let token = match site {
        Some(site) => Some((
            site.clone(),
            create_token(
                &mut database,
                aggregators.fingerprint(),
                &site,
                tokens::LIFETIME,
                false,
            )?,
        )),
        None => None,
    };
    let path = dir.config();
    replace_file(&path, config::example(&settings).as_bytes()).map_err(file("write", path.clone()))?;
    Ok(Initialised {
        config: path,
        checked,
        authority_fingerprint: aggregators.fingerprint(),
        token,
        join_address: join_address(&hosts[0], settings.join_listen.port()),
    })
}

fn refuse_occupied(dir: &DataDir) -> Result<(), DataDirError> {
    dir.occupied_by().map_or(Ok(()), |found| {
        Err(DataDirError::Occupied {
            path: dir.root().to_owned(),
            found,
        })
    })
}

/// Name, seed and version 0.
fn fill(database: &mut Database, config: &CheckedConfig, hosts: &[String]) -> Result<(), StoreError> {
    let mut nonce_seed = [0_u8; 32];
    rand::rng().fill_bytes(&mut nonce_seed);
    let payload = encode_f32(&config.model.initial());
    let model = ModelRow {
        version: ModelVersion(0),
        round: Round(0),
        layout_digest: config.model.layout_digest(),
        values: config.model.values(),
        digest: Digest::of(&payload),
        rule: "initial".into(),
        contributors: 0,
        rolled_back_to: None,
        released: wall_clock(),
    };
    if !models::fits_row(payload.len()) {
        database.blobs().put(&model.digest, &payload)?;
    }
    let hosts = serde_json::to_vec(hosts).unwrap_or_default();
    database.write(|work| {
        records::set_meta(work, records::META_FEDERATION, config.federation.as_bytes())?;
        records::set_meta(work, records::META_NONCE_SEED, &nonce_seed)?;
        records::set_meta(work, META_HOSTS, &hosts)?;
        models::insert_model(work, &model, &payload)?;
        work.audit(AuditEvent::ModelReleased {
            version: model.version,
            round: model.round,
            digest: model.digest,
            rule: model.rule.clone(),
            members: Vec::new(),
        })?;
        Ok(())
    })
}

/// Makes a token for one site; only its hash is kept. `new_ledger` as in [`tokens::create`].
///
/// # Errors
/// [`StoreError`].
pub fn create_token(
    database: &mut Database,
    authority_fingerprint: [u8; 32],
    site: &NodeId,
    lifetime: Duration,
    new_ledger: bool,
) -> Result<JoinToken, StoreError> {
    let token = JoinToken::generate(authority_fingerprint)
        .map_err(|error| StoreError::Conflict(format!("no token could be made: {error}")))?;
    database.write(|work| tokens::create(work, &token, site, lifetime, new_ledger))?;
    Ok(token)
}

/// Enrols edges without token and join listener, with keys made here. For load tests and simulations in the lab: a real
/// edge makes its own key and nobody else ever sees it.
///
/// # Errors
/// [`ServeError`].
pub fn enrol_directly(dir: &std::path::Path, nodes: &[NodeId]) -> Result<Vec<Identity>, ServeError> {
    let dir = DataDir::new(dir);
    let edges = Authority::load(&dir.edge_authority())?;
    let mut identities = Vec::with_capacity(nodes.len());
    for node in nodes {
        identities.push(edges.issue_edge(node)?);
    }
    let mut rows = Vec::with_capacity(nodes.len());
    for (node, identity) in nodes.iter().zip(&identities) {
        let der = identity.certificate_der();
        rows.push((
            node,
            public_key_fingerprint(der)?,
            certificate_fingerprint(der),
            not_after(der),
        ));
    }
    Database::open(&dir)?.write(|work| {
        rows.into_iter().try_for_each(|(node, key, certificate, end)| {
            records::enrol(work, node, key, certificate, end, false)
        })
    })?;
    Ok(identities)
}
