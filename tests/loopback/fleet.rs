//! A federation with its two authorities, an aggregator that judges by a callback, and peers that misbehave.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use theriac_certs::{Authority, Identity, PeerName, Role, trust};
use theriac_protocol::codec;
use theriac_protocol::frame::{FrameHeader, HEADER_BYTES};
use theriac_protocol::message::{
    Encoding, HelloV1, ModelV1, PROTOCOL_MAX, PROTOCOL_MIN, PrivacyClaimV1, ReceiptV1, ToAggregator, ToEdge,
    UpdateKind, UpdateV1, WelcomeV1,
};
use theriac_protocol::refusal::RefusalV1;
use theriac_protocol::units::{
    Delta, Digest, Epsilon, L2Norm, ModelVersion, NodeId, NoiseMultiplier, Round, Timestamp,
};
use theriac_transport::{
    AggregatorSession, ConnectError, EdgeSession, Endpoint, Limits, Loss, SessionError, TlsSide, bind_client,
    bind_server, connect,
};
use tokio::sync::mpsc;

/// The largest frame that the test's aggregator takes after admission.
pub(crate) const FRAME_BYTES_MAX: u32 = 4 << 20;

/// Longest wait for anything that must happen.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// The node `name`.
pub(crate) fn node(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

/// Long times: on a busy machine both ends wait for one another.
pub(crate) fn limits() -> Limits {
    Limits {
        handshake_timeout: PATIENCE,
        hello_timeout: PATIENCE,
        welcome_timeout: PATIENCE,
        frame_timeout: PATIENCE,
        frame_bytes_per_second_min: 16 << 20,
        ..Limits::default()
    }
}

/// Short times, so that what must time out does so within a test.
pub(crate) fn hasty() -> Limits {
    Limits {
        hello_timeout: Duration::from_secs(3),
        frame_timeout: Duration::from_secs(3),
        ..limits()
    }
}

/// Two authorities.
pub(crate) struct Federation {
    pub(crate) aggregators: Authority,
    pub(crate) edges: Authority,
}

impl Federation {
    pub(crate) fn new() -> Self {
        let make = |role| Authority::generate("plant", role, SystemTime::now()).unwrap();
        Self {
            aggregators: make(Role::Aggregator),
            edges: make(Role::Edge),
        }
    }

    pub(crate) fn aggregator(&self) -> Identity {
        self.aggregators
            .issue_aggregator(&node("main"), &["localhost".to_owned()])
            .unwrap()
    }

    pub(crate) fn edge(&self, name: &str) -> Identity {
        self.edges.issue_edge(&node(name)).unwrap()
    }

    /// TLS of an edge of this federation.
    pub(crate) fn tls(&self, edge: &Identity) -> rustls::ClientConfig {
        trust::client_config(edge, self.aggregators.certificate_der()).unwrap()
    }

    /// TLS of a client that presents whatever it likes, or nothing, under any ALPN name.
    pub(crate) fn tls_with(&self, certificate: Option<Credentials>, alpn: &[u8]) -> rustls::ClientConfig {
        let mut roots = rustls::RootCertStore::empty();
        roots
            .add(self.aggregators.certificate_der().to_vec().into())
            .unwrap();
        let builder = rustls::ClientConfig::builder_with_provider(trust::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match certificate {
            Some((certificate, key)) => builder.with_client_auth_cert(vec![certificate], key).unwrap(),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![alpn.to_vec()];
        config
    }

    /// A certificate that the authority of edges signed, with these URI names and usages.
    pub(crate) fn forged_edge(&self, uris: &[&str], usage: rcgen::ExtendedKeyUsagePurpose) -> Credentials {
        forged(&self.edges, uris, usage)
    }
}

/// A certificate and its key, as any TLS library takes them.
pub(crate) type Credentials = (CertificateDer<'static>, PrivateKeyDer<'static>);

/// What a broken or bribed authority could issue.
pub(crate) fn forged(
    authority: &Authority,
    uris: &[&str],
    usage: rcgen::ExtendedKeyUsagePurpose,
) -> Credentials {
    let dir = tempfile::tempdir().unwrap();
    authority.save(dir.path()).unwrap();
    let issuer_key = rcgen::KeyPair::from_pem(&private_key(&dir.path().join("authority.pem"))).unwrap();
    let authority = authority.certificate_der().into();
    let issuer = rcgen::Issuer::from_ca_cert_der(&authority, issuer_key).unwrap();
    let mut params = rcgen::CertificateParams::default();
    for uri in uris {
        params
            .subject_alt_names
            .push(rcgen::SanType::URI((*uri).try_into().unwrap()));
    }
    params.extended_key_usages = vec![usage];
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, &issuer).unwrap();
    (
        certificate.der().clone(),
        PrivateKeyDer::Pkcs8(key.serialize_der().into()),
    )
}

/// Certificate and key of an identity.
pub(crate) fn certificate_and_key(identity: &Identity) -> Credentials {
    let dir = tempfile::tempdir().unwrap();
    identity.save(dir.path(), "identity").unwrap();
    let key = rcgen::KeyPair::from_pem(&private_key(&dir.path().join("identity.pem"))).unwrap();
    (
        identity.certificate_der().to_vec().into(),
        PrivateKeyDer::Pkcs8(key.serialize_der().into()),
    )
}

/// The first block of a PEM file.
fn private_key(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap();
    let end = "-----END PRIVATE KEY-----";
    text[..text.find(end).unwrap() + end.len()].to_owned()
}

type Judge = dyn Fn(&HelloV1, &PeerName) -> Result<(), RefusalV1> + Send + Sync;

/// What the aggregator's driver saw of a session.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Seen {
    Message(Box<ToAggregator>),
    Error(SessionError),
}

/// A small aggregator: welcomes whom `judge` lets in, answers updates with receipts and errors with their refusals.
pub(crate) struct Aggregator {
    pub(crate) endpoint: Endpoint,
    pub(crate) addr: SocketAddr,
    pub(crate) seen: mpsc::UnboundedReceiver<Seen>,
    welcomed: Arc<AtomicUsize>,
}

impl Aggregator {
    pub(crate) fn start(federation: &Federation, limits: &Limits) -> Self {
        Self::judging(federation, limits, |_, _| Ok(()))
    }

    pub(crate) fn judging(
        federation: &Federation,
        limits: &Limits,
        judge: impl Fn(&HelloV1, &PeerName) -> Result<(), RefusalV1> + Send + Sync + 'static,
    ) -> Self {
        let tls = trust::server_config(&federation.aggregator(), federation.edges.certificate_der()).unwrap();
        let endpoint = bind_server("127.0.0.1:0".parse().unwrap(), tls, limits).unwrap();
        let (report, seen) = mpsc::unbounded_channel();
        let welcomed = Arc::new(AtomicUsize::new(0));
        let judge: Arc<Judge> = Arc::new(judge);
        let (accepting, count) = (endpoint.clone(), Arc::clone(&welcomed));
        tokio::spawn(async move {
            while let Some(session) = accepting.accept().await {
                tokio::spawn(drive(
                    session,
                    Arc::clone(&judge),
                    Arc::clone(&count),
                    report.clone(),
                ));
            }
        });
        Self {
            addr: endpoint.local_addr().unwrap(),
            endpoint,
            seen,
            welcomed,
        }
    }

    /// How many were ever welcomed.
    pub(crate) fn welcomed(&self) -> usize {
        self.welcomed.load(Ordering::SeqCst)
    }

    /// The next thing the driver saw.
    pub(crate) async fn next_seen(&mut self) -> Seen {
        tokio::time::timeout(PATIENCE, self.seen.recv())
            .await
            .expect("seen in time")
            .expect("the aggregator runs")
    }

    /// Skips until an error was seen.
    pub(crate) async fn next_error(&mut self) -> SessionError {
        loop {
            if let Seen::Error(error) = self.next_seen().await {
                return error;
            }
        }
    }

    /// Nothing is left of anyone: no connection, no pending handshake.
    pub(crate) async fn expect_empty(&self) {
        until(|| self.endpoint.open_connections() == 0 && self.endpoint.accept_stats().pending == 0).await;
    }
}

async fn drive(
    mut session: AggregatorSession,
    judge: Arc<Judge>,
    welcomed: Arc<AtomicUsize>,
    report: mpsc::UnboundedSender<Seen>,
) {
    let name = session.handle().peer_name().unwrap();
    match session.recv().await {
        Ok(ToAggregator::Hello(hello)) => {
            if let Err(refusal) = judge(&hello, &name) {
                session.refuse(refusal).await;
                return;
            }
        }
        Ok(other) => panic!("a hello is first, not {other:?}"),
        Err(error) => {
            report.send(Seen::Error(error.clone())).ok();
            match error.refusal() {
                Some(refusal) => session.refuse(refusal).await,
                None => session.close(error.close_code(), "no hello"),
            }
            return;
        }
    }
    welcomed.fetch_add(1, Ordering::SeqCst);
    session.admit(FRAME_BYTES_MAX);
    let sent = session.send(&ToEdge::Welcome(welcome(name))).await;
    if sent.is_err() {
        return;
    }
    loop {
        match session.recv().await {
            Ok(message) => {
                let answer = match &message {
                    ToAggregator::Update(update, _) => Some(ToEdge::Receipt(receipt(update))),
                    ToAggregator::FetchModel(_) => Some(model(12_000_000)),
                    _ => None,
                };
                report.send(Seen::Message(Box::new(message))).ok();
                if let Some(answer) = answer
                    && let Err(error) = session.send(&answer).await
                {
                    report.send(Seen::Error(error.clone())).ok();
                    session.close(error.close_code(), "cannot send");
                    return;
                }
            }
            Err(error) => {
                report.send(Seen::Error(error.clone())).ok();
                match (error.refusal(), error.is_fatal()) {
                    (Some(refusal), true) => return session.refuse(refusal).await,
                    (Some(refusal), false) => session.send(&ToEdge::Refusal(refusal)).await.unwrap(),
                    (None, _) => return session.close(error.close_code(), "gone"),
                }
            }
        }
    }
}

/// Polls until `done`, at most [`PATIENCE`].
pub(crate) async fn until(done: impl Fn() -> bool) {
    let due = tokio::time::Instant::now() + PATIENCE;
    let mut tick = tokio::time::interval(Duration::from_millis(5));
    while !done() {
        assert!(
            tokio::time::Instant::now() < due,
            "still not so after {PATIENCE:?}"
        );
        tick.tick().await;
    }
}

/// Connects as an edge does.
pub(crate) async fn knock(
    aggregator: &Aggregator,
    tls: rustls::ClientConfig,
) -> Result<(EdgeSession, WelcomeV1), ConnectError> {
    knock_as(aggregator, "localhost", tls, hello()).await
}

/// Connects under another server name or with another hello.
pub(crate) async fn knock_as(
    aggregator: &Aggregator,
    server_name: &str,
    tls: rustls::ClientConfig,
    hello: HelloV1,
) -> Result<(EdgeSession, WelcomeV1), ConnectError> {
    let endpoint = bind_client(&limits()).unwrap();
    connect(&endpoint, aggregator.addr, server_name, tls, hello).await
}

/// Asserts that the handshake was broken off by `side` with `alert`, with a hint, and that nobody was connected.
pub(crate) async fn expect_alert(
    aggregator: &Aggregator,
    outcome: Result<(EdgeSession, WelcomeV1), ConnectError>,
    side: TlsSide,
    alert: u8,
) -> String {
    let error = outcome.expect_err("must not be connected");
    let reason = match &error {
        ConnectError::Lost {
            loss:
                Loss::Tls {
                    side: found_side,
                    alert: found,
                    reason,
                },
            ..
        } => {
            assert_eq!((*found_side, *found), (side, alert), "{error}");
            reason.clone()
        }
        other => panic!("expected alert {alert}, got {other:?}"),
    };
    assert!(error.hint().is_some(), "no hint for {error}");
    assert!(error.needs_a_person());
    assert_eq!(aggregator.welcomed(), 0);
    aggregator.expect_empty().await;
    assert_eq!(aggregator.endpoint.accept_stats().accepted, 0);
    reason
}

/// A client that writes what it likes on its stream.
pub(crate) struct Raw {
    pub(crate) connection: quinn::Connection,
    pub(crate) send: quinn::SendStream,
    pub(crate) receive: quinn::RecvStream,
    _endpoint: quinn::Endpoint,
}

impl Raw {
    pub(crate) async fn connect(addr: SocketAddr, tls: rustls::ClientConfig) -> Self {
        let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
        let config = quinn::ClientConfig::new(Arc::new(crypto));
        let connection = endpoint
            .connect_with(config, addr, "localhost")
            .unwrap()
            .await
            .unwrap();
        let (send, receive) = connection.open_bi().await.unwrap();
        Self {
            connection,
            send,
            receive,
            _endpoint: endpoint,
        }
    }

    /// Says a proper Hello and reads the Welcome.
    pub(crate) async fn admitted(addr: SocketAddr, tls: rustls::ClientConfig) -> Self {
        let mut raw = Self::connect(addr, tls).await;
        raw.say(&ToAggregator::Hello(hello())).await;
        assert!(matches!(raw.hear().await, ToEdge::Welcome(_)));
        raw
    }

    pub(crate) async fn say(&mut self, message: &ToAggregator) {
        let frame = codec::encode_to_aggregator(message).unwrap();
        self.send.write_all(&frame.head).await.unwrap();
        self.send.write_all(&frame.payload).await.unwrap();
    }

    /// A header that announces `length` bytes of `kind`.
    pub(crate) async fn announce(&mut self, kind: u16, length: u32) {
        self.send
            .write_all(&FrameHeader { kind, length }.encode())
            .await
            .unwrap();
    }

    pub(crate) async fn hear(&mut self) -> ToEdge {
        let read = async {
            let mut header = [0; HEADER_BYTES];
            self.receive.read_exact(&mut header).await.unwrap();
            let header = FrameHeader::parse(&header, 64 << 20).unwrap();
            let mut body = vec![0; header.length as usize];
            self.receive.read_exact(&mut body).await.unwrap();
            codec::decode_to_edge(header.kind, body.into()).unwrap()
        };
        tokio::time::timeout(PATIENCE, read)
            .await
            .expect("an answer in time")
    }

    /// The application code with which the server closed.
    pub(crate) async fn closed_with(&self) -> u64 {
        match tokio::time::timeout(PATIENCE, self.connection.closed())
            .await
            .expect("closed in time")
        {
            quinn::ConnectionError::ApplicationClosed(close) => close.error_code.into_inner(),
            other => panic!("not closed by the aggregator: {other:?}"),
        }
    }
}

pub(crate) fn hello() -> HelloV1 {
    HelloV1 {
        protocol_min: PROTOCOL_MIN,
        protocol_max: PROTOCOL_MAX,
        software: "loopback test".to_owned(),
        features: Vec::new(),
        profile: "host-service-v1".to_owned(),
        profile_digest: Digest::default(),
        layout_digest: Digest::default(),
        noise_multiplier_min: NoiseMultiplier::new(1.0).unwrap(),
        ledger_head: Digest::default(),
        ledger_records: 0,
        model_version: ModelVersion(0),
        model_digest: Digest::default(),
        audit_checkpoint: None,
        receipt_missing: None,
    }
}

fn welcome(name: PeerName) -> WelcomeV1 {
    WelcomeV1 {
        protocol: PROTOCOL_MAX,
        federation: name.federation,
        node: name.node,
        time: Timestamp(0),
        frame_bytes_max: FRAME_BYTES_MAX,
        model_version: ModelVersion(0),
        model_digest: Digest::default(),
        audit_checkpoint: (0, Digest::default()),
        audit_consistency: Vec::new(),
        round: None,
    }
}

/// An update with `bytes` of payload.
pub(crate) fn update(bytes: usize) -> ToAggregator {
    let payload: Bytes = (0..bytes).map(|index| index.to_le_bytes()[0]).collect();
    let header = UpdateV1 {
        round: Round(7),
        nonce: 1,
        kind: UpdateKind::Moments,
        base_digest: Digest::default(),
        layout_digest: Digest::default(),
        values: 0,
        encoding: Encoding::F32,
        payload_digest: Digest::of(&payload),
        blocks_bound: 1,
        privacy: PrivacyClaimV1 {
            clip_norm: L2Norm::new(1.0).unwrap(),
            noise_multiplier: NoiseMultiplier::new(1.0).unwrap(),
            epsilon_spent: Epsilon::new(1.0).unwrap(),
            delta: Delta::new(1e-6).unwrap(),
            ledger_head: Digest::default(),
            ledger_records: 1,
        },
    };
    ToAggregator::Update(header, payload)
}

fn receipt(update: &UpdateV1) -> ReceiptV1 {
    ReceiptV1 {
        round: update.round,
        payload_digest: update.payload_digest,
        leaf_index: 0,
        ledger_head: update.privacy.ledger_head,
        signature: vec![0; 64],
    }
}

/// A model with `bytes` of payload.
pub(crate) fn model(bytes: usize) -> ToEdge {
    let payload = Bytes::from(vec![3; bytes]);
    let header = ModelV1 {
        version: ModelVersion(1),
        round: Round(1),
        layout_digest: Digest::default(),
        values: u32::try_from(bytes / 4).unwrap(),
        payload_digest: Digest::of(&payload),
        rule: "mean".to_owned(),
        contributors: 1,
    };
    ToEdge::Model(header, payload)
}
