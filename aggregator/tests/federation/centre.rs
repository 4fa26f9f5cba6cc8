//! A whole server over real QUIC and certificates, and edges that dial it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use theriac_aggregator::audit::AuditKey;
use theriac_aggregator::combine::RowSource;
use theriac_aggregator::config::{CheckedConfig, Settings};
use theriac_aggregator::data_dir::DataDir;
use theriac_aggregator::replay::{ReplayError, Replayed, replay};
use theriac_aggregator::spill::RoundMemory;
use theriac_aggregator::store::Database;
use theriac_aggregator::{InitOptions, Running, enrol_directly, init, serve};
use theriac_certs::{Authority, Identity, trust};
use theriac_protocol::message::{AnnounceV1, HelloV1, ToEdge};
use theriac_protocol::units::{Digest, ModelVersion, NodeId, NoiseMultiplier, Round};
use theriac_transport::{ConnectError, EdgeSession, Limits, bind_client, connect};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;

use super::{ledger_head, node};

/// Longest time for anything that must come.
pub(crate) const WAIT: Duration = Duration::from_mins(1);

pub(crate) struct Centre {
    _temporary: tempfile::TempDir,
    pub(crate) dir: PathBuf,
    pub(crate) config: PathBuf,
    pub(crate) running: Option<Running>,
    stop: watch::Sender<bool>,
}

impl Centre {
    /// On any free ports.
    pub(crate) async fn start(settings: Settings) -> Self {
        let mut centre = Self::made(settings);
        centre.serve().await;
        centre
    }

    /// As [`Centre::start`], without a server yet.
    pub(crate) fn made(settings: Settings) -> Self {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path().join("data");
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let settings = Settings {
            federation: "demo".into(),
            listen: any,
            join_listen: any,
            http: any,
            ..settings
        };
        let made = init(InitOptions {
            settings,
            ..InitOptions::new(&dir, "demo")
        })
        .unwrap();
        Self {
            _temporary: temporary,
            dir,
            config: made.config,
            running: None,
            stop: watch::channel(false).0,
        }
    }

    pub(crate) fn checked(&self) -> CheckedConfig {
        theriac_aggregator::config::load(&self.config, []).unwrap()
    }

    pub(crate) async fn serve(&mut self) {
        self.stop = watch::channel(false).0;
        let running = serve(self.checked(), self.stop.subscribe()).await.unwrap();
        self.running = Some(running);
    }

    pub(crate) async fn stop(&mut self) {
        self.stop.send_replace(true);
        self.running.take().unwrap().wait().await.unwrap();
    }

    pub(crate) fn database(&self) -> Database {
        Database::open(&DataDir::new(&self.dir)).unwrap()
    }

    pub(crate) fn enrol(&self, names: &[&str]) -> Vec<Identity> {
        let nodes: Vec<NodeId> = names.iter().map(|name| node(name)).collect();
        enrol_directly(&self.dir, &nodes).unwrap()
    }

    pub(crate) fn replay(&self, round: u64) -> Result<Replayed, ReplayError> {
        let key = AuditKey::load(&DataDir::new(&self.dir).audit_key(), "demo").unwrap();
        let (database, config) = (self.database(), self.checked());
        let source = RowSource {
            connection: database.read(),
            blobs: database.blobs(),
            memory: &RoundMemory::of(&config),
        };
        replay(source, &config.model, &key.log_key().public(), Round(round))
    }

    /// Whether the page says that all is in order.
    async fn is_ready(&self) -> bool {
        let page = self.running.as_ref().unwrap().addresses().http;
        let mut stream = tokio::net::TcpStream::connect(page).await.unwrap();
        let asked = stream.write_all(b"GET /readyz HTTP/1.0\r\nHost: localhost\r\n\r\n");
        asked.await.unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).await.unwrap();
        said.contains("200 OK")
    }

    /// Waits until the page says that all is in order, or that it is not.
    pub(crate) async fn until_ready(&self, wanted: bool) {
        let deadline = tokio::time::Instant::now() + WAIT;
        while self.is_ready().await != wanted {
            assert!(
                tokio::time::Instant::now() < deadline,
                "never so: ready = {wanted}"
            );
        }
    }

    /// What an edge says first, whose ledger has so many records.
    pub(crate) fn hello(&self, records: u64, features: &[&str]) -> HelloV1 {
        let spec = self.checked().model;
        HelloV1 {
            protocol_min: 1,
            protocol_max: 1,
            software: "test".into(),
            features: features.iter().map(|name| (*name).to_owned()).collect(),
            profile: spec.profile_name().to_owned(),
            profile_digest: spec.profile_digest(),
            layout_digest: spec.layout_digest(),
            noise_multiplier_min: NoiseMultiplier::new(1.0).unwrap(),
            ledger_head: ledger_head(records),
            ledger_records: records,
            model_version: ModelVersion(0),
            model_digest: Digest::default(),
            audit_checkpoint: None,
            receipt_missing: None,
        }
    }

    pub(crate) async fn dial(&self, identity: &Identity, hello: HelloV1) -> Result<Edge, ConnectError> {
        let authority = Authority::load(&DataDir::new(&self.dir).aggregator_authority()).unwrap();
        let tls = trust::client_config(identity, authority.certificate_der()).unwrap();
        let endpoint = bind_client(&Limits::default()).unwrap();
        let listen = self.running.as_ref().unwrap().addresses().listen;
        let (session, welcome) = connect(&endpoint, listen, "localhost", tls, hello).await?;
        Ok(Edge {
            session,
            round: welcome.round,
        })
    }

    /// What an operator changed is known to a running server within a second.
    pub(crate) async fn dial_soon(&self, identity: &Identity, hello: HelloV1) -> Edge {
        let deadline = tokio::time::Instant::now() + WAIT;
        loop {
            match self.dial(identity, hello.clone()).await {
                Ok(edge) => return edge,
                Err(error) => assert!(tokio::time::Instant::now() < deadline, "not admitted: {error}"),
            }
        }
    }
}

pub(crate) struct Edge {
    pub(crate) session: EdgeSession,
    /// The round that was announced last and is not answered.
    pub(crate) round: Option<AnnounceV1>,
}

impl Edge {
    pub(crate) async fn recv(&mut self) -> ToEdge {
        tokio::time::timeout(WAIT, self.session.recv())
            .await
            .expect("nothing came")
            .expect("the session ended")
    }

    pub(crate) async fn announced(&mut self) -> AnnounceV1 {
        if let Some(announce) = self.round.take() {
            return announce;
        }
        loop {
            if let ToEdge::Announce(announce) = self.recv().await {
                return announce;
            }
        }
    }

    /// The announcement of this round; those of others are passed over.
    pub(crate) async fn announced_for(&mut self, round: u64) -> AnnounceV1 {
        loop {
            let announce = self.announced().await;
            if announce.round == Round(round) {
                return announce;
            }
        }
    }
}
