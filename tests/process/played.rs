//! An aggregator that the test plays, word by word, over real QUIC and certificates.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use theriac_certs::{Authority, Identity, Role, files, trust};
use theriac_edge::client::{AGGREGATOR_AUTHORITY, IDENTITY};
use theriac_edge::state_dir::{Joined, StateDir};
use theriac_model::feature::FeatureSchema;
use theriac_model::global::{GlobalModel, moments_layout};
use theriac_protocol::compress::encode_f32;
use theriac_protocol::message::{
    AnnounceV1, HelloV1, LedgerSealV1, ModelV1, PROTOCOL_MAX, ToAggregator, ToEdge, UpdateKind, WelcomeV1,
};
use theriac_protocol::units::{Digest, L2Norm, ModelVersion, NodeId, NoiseMultiplier, Round, Timestamp};
use theriac_transport::{AggregatorSession, Endpoint, Limits, bind_server};

use crate::child::PATIENCE;
use crate::fleet::{BLOCK_ROWS, Edge};

/// Largest frame that it takes.
const FRAME_BYTES_MAX: u32 = 1 << 20;

pub(crate) struct Played {
    edges: Authority,
    aggregators: Authority,
    endpoint: Endpoint,
    address: SocketAddr,
    base: Bytes,
}

impl Played {
    /// Call it within a runtime.
    pub(crate) fn new() -> Self {
        let authority = |role| Authority::generate("plant", role, SystemTime::now()).unwrap();
        let (edges, aggregators) = (authority(Role::Edge), authority(Role::Aggregator));
        let own = aggregators
            .issue_aggregator(&"main".parse().unwrap(), &["127.0.0.1".to_owned()])
            .unwrap();
        let tls = trust::server_config(&own, edges.certificate_der()).unwrap();
        let endpoint = bind_server(SocketAddr::from(([127, 0, 0, 1], 0)), tls, &Limits::default()).unwrap();
        let channels = FeatureSchema::host_service_v1().channels();
        Self {
            edges,
            aggregators,
            address: endpoint.local_addr().unwrap(),
            endpoint,
            base: encode_f32(GlobalModel::initial(channels, 1).values()).into(),
        }
    }

    /// Gives an edge what `join` would give it.
    pub(crate) fn enlist(&self, edge: &Edge) {
        let node: NodeId = edge.name.parse().unwrap();
        self.enlist_as(edge, &self.edges.issue_edge(&node).unwrap());
    }

    /// The same with a certificate of the test's making.
    pub(crate) fn enlist_as(&self, edge: &Edge, identity: &Identity) {
        let dir = StateDir::open(&edge.dir).unwrap();
        identity.save(&dir.keys(), IDENTITY).unwrap();
        files::save_certificate(
            &dir.keys().join(AGGREGATOR_AUTHORITY),
            self.aggregators.certificate_der(),
        )
        .unwrap();
        let joined = Joined {
            node: edge.name.parse().unwrap(),
            federation: "plant".to_owned(),
            aggregator: self.address.to_string(),
        };
        dir.save_joined(&joined).unwrap();
    }

    /// The authority of edges, for certificates of the test's making.
    pub(crate) fn edges(&self) -> &Authority {
        &self.edges
    }

    /// Terms of a round that an edge of these tests takes part in; the nonce follows from the number.
    pub(crate) fn announce(&self, round: u64) -> AnnounceV1 {
        let layout = moments_layout(FeatureSchema::host_service_v1().channels());
        AnnounceV1 {
            round: Round(round),
            nonce: round * 1_000 + 7,
            kind: UpdateKind::Moments,
            values: u32::try_from(layout.len()).unwrap(),
            layout_digest: Digest(layout.digest()),
            base_version: ModelVersion(0),
            base_digest: Digest::of(&self.base),
            clip_norm: L2Norm::new(100.0).unwrap(),
            noise_multiplier: NoiseMultiplier::new(1.27).unwrap(),
            block_rows: BLOCK_ROWS,
            blocks_min: 1,
            blocks_max: 1,
            deadline_ms: 60_000,
        }
    }

    /// Waits for an edge, hears its Hello and lets it in, into the open round if there is one.
    pub(crate) async fn welcome(&self, round: Option<AnnounceV1>) -> (AggregatorSession, HelloV1) {
        let mut session = in_time(self.endpoint.accept())
            .await
            .expect("the endpoint is open");
        let ToAggregator::Hello(hello) = in_time(session.recv()).await.unwrap() else {
            panic!("a hello is first")
        };
        session.admit(FRAME_BYTES_MAX);
        let name = session.handle().peer_name().unwrap();
        let welcome = WelcomeV1 {
            protocol: PROTOCOL_MAX,
            federation: name.federation,
            node: name.node,
            time: Timestamp(unix_ms()),
            frame_bytes_max: FRAME_BYTES_MAX,
            model_version: ModelVersion(0),
            model_digest: Digest::of(&self.base),
            audit_checkpoint: (0, Digest::default()),
            audit_consistency: Vec::new(),
            round,
        };
        session.send(&ToEdge::Welcome(welcome)).await.unwrap();
        // Nothing of its ledger is on record here: an edge trains once it knows.
        let seal = LedgerSealV1 {
            records: 0,
            head: Digest::default(),
            signed: Timestamp(unix_ms()),
            key: String::new(),
            signature: vec![0; 64],
        };
        session.send(&ToEdge::Seal(seal)).await.unwrap();
        (session, hello)
    }

    /// The next update or decline, serving the base model meanwhile; `None` when the session ends before.
    pub(crate) async fn report(&self, session: &mut AggregatorSession) -> Option<ToAggregator> {
        loop {
            match in_time(session.recv()).await {
                Ok(ToAggregator::FetchModel(_)) => {
                    let sent = session.send(&self.model()).await;
                    sent.ok()?;
                }
                Ok(report @ (ToAggregator::Update(..) | ToAggregator::Decline(_))) => return Some(report),
                Ok(
                    ToAggregator::Verdict(_)
                    | ToAggregator::Guarantee(_)
                    | ToAggregator::Appraisal(_)
                    | ToAggregator::Health(_),
                ) => {}
                Ok(other) => panic!("{other:?} instead of a report"),
                Err(_) => return None,
            }
        }
    }

    fn model(&self) -> ToEdge {
        let channels = FeatureSchema::host_service_v1().channels();
        let initial = GlobalModel::initial(channels, 1);
        let header = ModelV1 {
            version: ModelVersion(0),
            round: Round(0),
            layout_digest: Digest(initial.layout().digest()),
            values: u32::try_from(initial.values().len()).unwrap(),
            payload_digest: Digest::of(&self.base),
            rule: "initial".to_owned(),
            contributors: 0,
        };
        ToEdge::Model(header, self.base.clone())
    }
}

async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future)
        .await
        .expect("something in time")
}

fn unix_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    u64::try_from(since.as_millis()).unwrap()
}
