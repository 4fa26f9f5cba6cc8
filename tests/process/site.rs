//! A site without an edge: a real session that says what the test wants, when the test wants it.

use std::time::Duration;

use bytes::Bytes;
use theriac_aggregator::layout::ModelSpec;
use theriac_certs::{Authority, Identity, trust};
use theriac_protocol::compress::encode_f32;
use theriac_protocol::message::{
    AnnounceV1, Encoding, HelloV1, PROTOCOL_MAX, PROTOCOL_MIN, PrivacyClaimV1, ToAggregator, ToEdge, UpdateV1,
};
use theriac_protocol::units::{Delta, Digest, Epsilon, ModelVersion, NodeId, NoiseMultiplier, Round};
use theriac_transport::{ConnectError, EdgeSession, Endpoint, Limits, SessionError, bind_client, connect};

use crate::child::PATIENCE;
use crate::fleet::{Centre, DIMENSION};

/// Sites of these names, enrolled without tokens. Before the aggregator runs.
pub(crate) fn enrol(centre: &Centre, names: &[&str]) -> Vec<Identity> {
    let nodes: Vec<NodeId> = names.iter().map(|name| name.parse().unwrap()).collect();
    theriac_aggregator::enrol_directly(&centre.dir, &nodes).unwrap()
}

/// What one site knows between its sessions.
pub(crate) struct Site {
    endpoint: Endpoint,
    tls: rustls::ClientConfig,
    centre: std::net::SocketAddr,
    name: String,
    /// Records in the ledger that it claims to keep.
    records: u64,
    /// Values of the model.
    dimension: u32,
}

impl Site {
    /// Call it within a runtime. A lost aggregator is noticed at once: it is spoken to all the time.
    pub(crate) fn new(centre: &Centre, identity: &Identity) -> Self {
        Self::of(centre, identity, DIMENSION)
    }

    /// The same for a model of `dimension` bare numbers.
    pub(crate) fn of(centre: &Centre, identity: &Identity, dimension: u32) -> Self {
        let authority = Authority::load(&centre.dir.join("authority/aggregators")).expect("init has made it");
        let limits = Limits {
            keep_alive: Duration::from_millis(50),
            ..Limits::default()
        };
        Self {
            endpoint: bind_client(&limits).unwrap(),
            tls: trust::client_config(identity, authority.certificate_der()).unwrap(),
            centre: centre.listen,
            name: identity.name().node.to_string(),
            records: 0,
            dimension,
        }
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// A session and, if one is open, the round.
    pub(crate) async fn connect(
        &self,
        receipt_missing: Option<Round>,
    ) -> Result<(EdgeSession, Option<AnnounceV1>), ConnectError> {
        let hello = self.hello(receipt_missing);
        let (endpoint, tls) = (&self.endpoint, self.tls.clone());
        let connecting = connect(endpoint, self.centre, "127.0.0.1", tls, hello);
        let (session, welcome) = Box::pin(connecting).await?;
        Ok((session, welcome.round))
    }

    /// The same, as often as it takes.
    pub(crate) async fn connect_at_last(
        &self,
        receipt_missing: Option<Round>,
    ) -> (EdgeSession, Option<AnnounceV1>) {
        let patient = async {
            loop {
                match self.connect(receipt_missing).await {
                    Ok(connected) => return connected,
                    Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
        };
        tokio::time::timeout(PATIENCE, patient)
            .await
            .unwrap_or_else(|_| panic!("{} was not let in", self.name))
    }

    /// An update of these values, charged to the ledger that there is not.
    pub(crate) fn update(&mut self, announce: &AnnounceV1, values: impl AsRef<[f32]>) -> Update {
        self.records += 1;
        let payload = Bytes::from(encode_f32(values.as_ref()));
        let header = UpdateV1 {
            round: announce.round,
            nonce: announce.nonce,
            kind: announce.kind,
            base_digest: announce.base_digest,
            layout_digest: announce.layout_digest,
            values: self.dimension,
            encoding: Encoding::F32,
            payload_digest: Digest::of(&payload),
            blocks_bound: announce.blocks_max,
            privacy: PrivacyClaimV1 {
                clip_norm: announce.clip_norm,
                noise_multiplier: announce.noise_multiplier,
                epsilon_spent: Epsilon::new(1.0).unwrap(),
                delta: Delta::new(1e-6).unwrap(),
                ledger_head: self.head(),
                ledger_records: self.records,
            },
        };
        Update(header, payload)
    }

    fn head(&self) -> Digest {
        if self.records == 0 {
            return Digest::default();
        }
        Digest::of(format!("{} {}", self.name, self.records).as_bytes())
    }

    fn hello(&self, receipt_missing: Option<Round>) -> HelloV1 {
        let spec = ModelSpec::raw(self.dimension).unwrap();
        HelloV1 {
            protocol_min: PROTOCOL_MIN,
            protocol_max: PROTOCOL_MAX,
            software: "process test".to_owned(),
            features: Vec::new(),
            profile: spec.profile_name().to_owned(),
            profile_digest: spec.profile_digest(),
            layout_digest: spec.layout_digest(),
            noise_multiplier_min: NoiseMultiplier::new(1.0).unwrap(),
            ledger_head: self.head(),
            ledger_records: self.records,
            model_version: ModelVersion(0),
            model_digest: Digest::default(),
            audit_checkpoint: None,
            receipt_missing,
        }
    }
}

/// An update that can be sent again and again.
#[derive(Clone)]
pub(crate) struct Update(pub(crate) UpdateV1, Bytes);

impl Update {
    pub(crate) async fn send(&self, session: &mut EdgeSession) -> Result<(), SessionError> {
        let Self(header, payload) = self.clone();
        session.send(&ToAggregator::Update(header, payload)).await
    }
}

/// The next message, in time.
pub(crate) async fn next(session: &mut EdgeSession) -> Result<ToEdge, SessionError> {
    tokio::time::timeout(PATIENCE, session.recv())
        .await
        .expect("a message in time")
}
