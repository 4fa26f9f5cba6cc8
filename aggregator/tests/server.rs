//! The whole server over real QUIC and certificates, in one process: rounds, refusals, the registry, a restart, enrolment.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a failed helper is a failed test"
)]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use theriac_aggregator::config::{ModelSettings, RoundKind, RoundSettings, Settings};
use theriac_aggregator::data_dir::DataDir;
use theriac_aggregator::layout::ModelSpec;
use theriac_aggregator::robust::RuleName;
use theriac_aggregator::store::{Database, history, models, records};
use theriac_aggregator::{InitOptions, Running, enrol_directly, init, serve};
use theriac_audit::leaf::SiteStanding;
use theriac_certs::{Identity, JoinToken, PendingIdentity, trust};
use theriac_protocol::compress::encode_f32;
use theriac_protocol::message::{
    AnnounceV1, Encoding, FetchModelV1, HelloV1, PrivacyClaimV1, ReceiptV1, ToAggregator, ToEdge, UpdateV1,
    WelcomeV1,
};
use theriac_protocol::refusal::{RefusalCode, RoundOutcome};
use theriac_protocol::units::{Delta, Digest, Epsilon, ModelVersion, NodeId, NoiseMultiplier, Round};
use theriac_transport::{ConnectError, EdgeSession, Limits, bind_client, connect, join};
use tokio::sync::watch;

const WAIT: Duration = Duration::from_secs(20);

struct Centre {
    _temporary: tempfile::TempDir,
    dir: PathBuf,
    config: PathBuf,
    running: Option<Running>,
    stop: watch::Sender<bool>,
    token: JoinToken,
}

/// Of rounds, far longer than [`WAIT`].
const DEADLINE: Duration = Duration::from_mins(5);

fn settings(change: impl FnOnce(&mut Settings)) -> Settings {
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let mut settings = Settings {
        federation: "demo".into(),
        listen: any,
        join_listen: any,
        http: any,
        rounds: RoundSettings {
            kind: RoundKind::Delta,
            quorum: 2,
            deadline: DEADLINE,
            pause: Duration::ZERO,
            clip_norm: Some(10.0),
            noise_multiplier: Some(1.0),
            rule: RuleName::MEAN,
            byzantine: 0,
            ..RoundSettings::default()
        },
        model: ModelSettings {
            dimension: Some(4),
            ..ModelSettings::default()
        },
        ..Settings::default()
    };
    change(&mut settings);
    settings
}

impl Centre {
    async fn start(change: impl FnOnce(&mut Settings)) -> Self {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path().join("data");
        let made = init(InitOptions {
            settings: settings(change),
            ..InitOptions::new(&dir, "demo")
        })
        .unwrap();
        let (_, token) = made.token.unwrap();
        let (stop, _) = watch::channel(false);
        let mut centre = Self {
            _temporary: temporary,
            dir,
            config: made.config,
            running: None,
            stop,
            token,
        };
        centre.serve().await;
        centre
    }

    async fn serve(&mut self) {
        let config = theriac_aggregator::config::load(&self.config, []).unwrap();
        self.stop = watch::channel(false).0;
        self.running = Some(serve(config, self.stop.subscribe()).await.unwrap());
    }

    async fn stop(&mut self) {
        self.stop.send_replace(true);
        self.running.take().unwrap().wait().await.unwrap();
    }

    fn listen(&self) -> SocketAddr {
        self.running.as_ref().unwrap().addresses().listen
    }

    fn database(&self) -> Database {
        Database::open(&DataDir::new(&self.dir)).unwrap()
    }
}

struct Edge {
    session: EdgeSession,
    welcome: WelcomeV1,
    round: Option<AnnounceV1>,
}

type Break = fn(&mut UpdateV1);

static LEDGER: AtomicU64 = AtomicU64::new(1);

fn hello(records: u64) -> HelloV1 {
    let spec = ModelSpec::raw(4).unwrap();
    HelloV1 {
        protocol_min: 1,
        protocol_max: 1,
        software: "test".into(),
        features: Vec::new(),
        profile: "raw".into(),
        profile_digest: spec.profile_digest(),
        layout_digest: spec.layout_digest(),
        noise_multiplier_min: NoiseMultiplier::new(1.0).unwrap(),
        ledger_head: if records == 0 {
            Digest::default()
        } else {
            Digest::of(&records.to_le_bytes())
        },
        ledger_records: records,
        model_version: ModelVersion(0),
        model_digest: Digest::default(),
        audit_checkpoint: None,
        receipt_missing: None,
    }
}

async fn dial(centre: &Centre, identity: &Identity, hello: HelloV1) -> Result<Edge, ConnectError> {
    let authority =
        theriac_certs::Authority::load(&DataDir::new(&centre.dir).aggregator_authority()).unwrap();
    let tls = trust::client_config(identity, authority.certificate_der()).unwrap();
    let endpoint = bind_client(&Limits::default()).unwrap();
    let (session, welcome) = connect(&endpoint, centre.listen(), "localhost", tls, hello).await?;
    let round = welcome.round.clone();
    Ok(Edge {
        session,
        welcome,
        round,
    })
}

fn enrol(centre: &Centre, names: &[&str]) -> Vec<Identity> {
    let nodes: Vec<NodeId> = names.iter().map(|name| NodeId::new(*name).unwrap()).collect();
    enrol_directly(&centre.dir, &nodes).unwrap()
}

/// A site is known to a running server within a second.
async fn dial_soon(centre: &Centre, identity: &Identity, hello: HelloV1) -> Edge {
    let deadline = tokio::time::Instant::now() + WAIT;
    loop {
        match dial(centre, identity, hello.clone()).await {
            Ok(edge) => return edge,
            Err(error) => assert!(tokio::time::Instant::now() < deadline, "not admitted: {error}"),
        }
    }
}

fn update(announce: &AnnounceV1, values: &[f32]) -> (UpdateV1, Vec<u8>) {
    let payload = encode_f32(values);
    let records = LEDGER.fetch_add(1, Ordering::Relaxed);
    let header = UpdateV1 {
        round: announce.round,
        nonce: announce.nonce,
        kind: announce.kind,
        base_digest: announce.base_digest,
        layout_digest: announce.layout_digest,
        values: u32::try_from(values.len()).unwrap(),
        encoding: Encoding::F32,
        payload_digest: Digest::of(&payload),
        blocks_bound: announce.blocks_max,
        privacy: PrivacyClaimV1 {
            clip_norm: announce.clip_norm,
            noise_multiplier: announce.noise_multiplier,
            epsilon_spent: Epsilon::new(1.0).unwrap(),
            delta: Delta::new(1e-6).unwrap(),
            ledger_head: Digest::of(&records.to_le_bytes()),
            ledger_records: records,
        },
    };
    (header, payload)
}

impl Edge {
    async fn recv(&mut self) -> ToEdge {
        tokio::time::timeout(WAIT, self.session.recv())
            .await
            .expect("nothing came")
            .expect("the session ended")
    }

    async fn announced(&mut self) -> AnnounceV1 {
        if let Some(announce) = self.round.take() {
            return announce;
        }
        loop {
            if let ToEdge::Announce(announce) = self.recv().await {
                return announce;
            }
        }
    }

    async fn send(&mut self, header: UpdateV1, payload: Vec<u8>) {
        self.session
            .send(&ToAggregator::Update(header, payload.into()))
            .await
            .unwrap();
    }

    async fn receipt(&mut self) -> ReceiptV1 {
        match self.recv().await {
            ToEdge::Receipt(receipt) => receipt,
            other => panic!("{other:?} instead of a receipt"),
        }
    }

    async fn refused(&mut self) -> RefusalCode {
        loop {
            match self.recv().await {
                ToEdge::Refusal(refusal) => return refusal.code,
                ToEdge::Announce(_) | ToEdge::Closed(_) => {}
                other => panic!("{other:?} instead of a refusal"),
            }
        }
    }

    async fn published(&mut self) -> (Round, ModelVersion) {
        loop {
            if let ToEdge::Closed(closed) = self.recv().await {
                match closed.outcome {
                    RoundOutcome::Published(version) => return (closed.round, version),
                    RoundOutcome::Aborted(reason) => panic!("aborted: {reason:?}"),
                }
            }
        }
    }

    async fn model(&mut self, version: ModelVersion) -> Vec<f32> {
        self.session
            .send(&ToAggregator::FetchModel(FetchModelV1 { version }))
            .await
            .unwrap();
        loop {
            match self.recv().await {
                ToEdge::Model(header, payload) => {
                    assert_eq!(
                        (header.version, header.payload_digest),
                        (version, Digest::of(&payload))
                    );
                    return payload
                        .as_chunks::<4>()
                        .0
                        .iter()
                        .map(|bytes| f32::from_le_bytes(*bytes))
                        .collect();
                }
                // The next round does not wait for the model to be fetched.
                ToEdge::Announce(announce) => self.round = Some(announce),
                _ => {}
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rounds_publish_what_the_rule_makes_of_the_updates() {
    let mut centre = Centre::start(|settings| settings.rounds.rounds_max = Some(2)).await;
    let identities = enrol(&centre, &["a", "b"]);
    let mut a = dial_soon(&centre, &identities[0], hello(0)).await;
    let mut b = dial_soon(&centre, &identities[1], hello(0)).await;
    assert_eq!(
        (a.welcome.node.as_str(), a.welcome.federation.as_str()),
        ("a", "demo")
    );
    let mut expected = [0.0_f32; 4];
    let mut receipts = Vec::new();
    for round in 1..=2 {
        for (edge, values) in [(&mut a, [1.0, 2.0, 3.0, 4.0]), (&mut b, [3.0, 2.0, 1.0, 0.0])] {
            let announce = edge.announced().await;
            assert_eq!(announce.round, Round(round));
            let (header, payload) = update(&announce, &values);
            let digest = header.payload_digest;
            edge.send(header, payload).await;
            let receipt = edge.receipt().await;
            assert_eq!((receipt.round, receipt.payload_digest), (Round(round), digest));
            receipts.push((edge.welcome.node.clone(), receipt));
        }
        for value in &mut expected {
            *value += 2.0;
        }
        for edge in [&mut a, &mut b] {
            assert_eq!(edge.published().await, (Round(round), ModelVersion(round)));
            assert_eq!(edge.model(ModelVersion(round)).await, expected);
        }
    }
    check_audit(&centre, &receipts);
    let database = centre.database();
    let detail = history::detail(database.read(), Round(2)).unwrap();
    assert_eq!(
        (detail.round.state.as_str(), detail.uploads.len()),
        ("published", 2)
    );
    assert!(
        detail
            .uploads
            .iter()
            .all(|upload| upload.distance.is_some_and(|distance| distance > 1.0))
    );
    centre.stop().await;
}

/// The log verifies offline as exported, and every receipt points at the leaf of its update.
fn check_audit(centre: &Centre, receipts: &[(NodeId, ReceiptV1)]) {
    let dir = DataDir::new(&centre.dir);
    let key = theriac_aggregator::audit::AuditKey::load(&dir.audit_key(), "demo").unwrap();
    let public = key.log_key().public();
    let database = centre.database();
    let head = theriac_aggregator::audit::AuditLog::load(database.read())
        .unwrap()
        .signed_head(&key);
    let lines = theriac_aggregator::audit::lines(database.read()).unwrap();
    let export = theriac_audit::verify::export(&public, lines.iter().map(String::as_str), &head);
    let verified = theriac_audit::verify::verify(export.as_bytes(), &public, &[]).unwrap();
    assert_eq!(verified.size, lines.len() as u64);
    for (node, receipt) in receipts {
        assert!(theriac_audit::receipt::verify_receipt(receipt, node, &public));
        let line = &lines[usize::try_from(receipt.leaf_index).unwrap()];
        assert!(
            line.contains(node.as_str()) && line.contains(&receipt.payload_digest.to_string()),
            "{line}"
        );
    }
    assert!(!receipts.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_updates_cost_only_their_sender_and_leave_evidence() {
    let mut centre = Centre::start(|settings| settings.rounds.rounds_max = Some(1)).await;
    let identities = enrol(&centre, &["a", "b", "liar"]);
    let mut liar = dial_soon(&centre, &identities[2], hello(0)).await;
    let mut a = dial_soon(&centre, &identities[0], hello(0)).await;
    let mut b = dial_soon(&centre, &identities[1], hello(0)).await;
    let announce = liar.announced().await;
    for (values, code) in [
        (vec![f32::NAN, 0.0, 0.0, 0.0], RefusalCode::NonFinite),
        (vec![1e30, 0.0, 0.0, 0.0], RefusalCode::NormExceeded),
        (vec![1.0; 5], RefusalCode::WrongLength),
    ] {
        let (header, payload) = update(&announce, &values);
        liar.send(header, payload).await;
        assert_eq!(liar.refused().await, code);
    }
    let cases: [(Break, RefusalCode); 4] = [
        (|header| header.nonce ^= 1, RefusalCode::WrongNonce),
        (
            |header| header.base_digest = Digest::of(b"x"),
            RefusalCode::WrongBase,
        ),
        (|header| header.round = Round(9), RefusalCode::RoundUnknown),
        (|header| header.round = Round(0), RefusalCode::RoundClosed),
    ];
    for (break_it, code) in cases {
        let (mut header, payload) = update(&announce, &[1.0; 4]);
        break_it(&mut header);
        liar.send(header, payload).await;
        assert_eq!(liar.refused().await, code);
    }
    liar.session.send(&ToAggregator::Hello(hello(0))).await.unwrap();
    assert_eq!(liar.refused().await, RefusalCode::OutOfTurn);
    // It stays connected, and nobody waits for it.
    for edge in [&mut a, &mut b] {
        let announce = edge.announced().await;
        let (header, payload) = update(&announce, &[1.0; 4]);
        edge.send(header.clone(), payload.clone()).await;
        let first = edge.receipt().await;
        // The same bytes again get the same receipt, other bytes are refused.
        edge.send(header, payload).await;
        assert_eq!(edge.receipt().await, first);
    }
    // Nobody waits for as long as to the round's deadline.
    assert_eq!(a.published().await, (Round(1), ModelVersion(1)));
    assert_eq!(b.model(ModelVersion(1)).await, [1.0; 4]);
    drop(liar);
    let sites = records::sites(centre.database().read()).unwrap();
    let liar = sites.iter().find(|site| site.node.as_str() == "liar").unwrap();
    assert_eq!(
        (
            liar.accepted,
            liar.refusals["non_finite"],
            liar.refusals["norm_exceeded"]
        ),
        (0, 1, 1)
    );
    let lines = theriac_aggregator::audit::lines(centre.database().read()).unwrap();
    assert!(
        lines
            .iter()
            .any(|line| line.contains("\"liar\"") && line.contains("norm_exceeded")),
        "{lines:?}"
    );
    centre.stop().await;
}

/// Three edges, f = 1: the refused one counts as the one, so the other two make a model, with or without a restart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_many_refused_edges_as_the_rule_withstands_do_not_stop_the_round() {
    let mut centre = Centre::start(|settings| {
        settings.rounds.rounds_max = Some(1);
        settings.rounds.rule = RuleName::TRIMMED_MEAN;
        settings.rounds.quorum = 3;
        settings.rounds.byzantine = 1;
        settings.rounds.deadline = Duration::from_mins(10);
    })
    .await;
    let identities = enrol(&centre, &["a", "b", "liar"]);
    let mut liar = dial_soon(&centre, &identities[2], hello(0)).await;
    let mut a = dial_soon(&centre, &identities[0], hello(0)).await;
    let b = dial_soon(&centre, &identities[1], hello(0)).await;
    let announce = liar.announced().await;
    let (header, payload) = update(&announce, &[f32::NAN, 0.0, 0.0, 0.0]);
    liar.send(header, payload).await;
    assert_eq!(liar.refused().await, RefusalCode::NonFinite);
    let (header, payload) = update(&a.announced().await, &[1.0, 0.0, 0.0, 0.0]);
    let records = header.privacy.ledger_records;
    a.send(header, payload).await;
    a.receipt().await;
    drop((a, b, liar));
    centre.stop().await;
    centre.serve().await;
    let mut a = dial_soon(&centre, &identities[0], hello(records)).await;
    let mut b = dial_soon(&centre, &identities[1], hello(0)).await;
    let (header, payload) = update(&b.announced().await, &[3.0, 0.0, 0.0, 0.0]);
    b.send(header, payload).await;
    b.receipt().await;
    assert_eq!(a.published().await, (Round(1), ModelVersion(1)));
    assert_eq!(a.model(ModelVersion(1)).await, [2.0, 0.0, 0.0, 0.0]);
    centre.stop().await;
}

/// Its site was away when the round ended, and takes no part in the next one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn late_update_is_receipted_and_counts_in_the_next_round_by_its_staleness_weight() {
    let mut centre = Centre::start(|settings| settings.rounds.rounds_max = Some(2)).await;
    let identities = enrol(&centre, &["a", "b", "c"]);
    let mut c = dial_soon(&centre, &identities[2], hello(0)).await;
    let mut a = dial_soon(&centre, &identities[0], hello(0)).await;
    let first = a.announced().await;
    assert_eq!(c.announced().await.nonce, first.nonce);
    let mut b = dial_soon(&centre, &identities[1], hello(0)).await;
    assert_eq!(b.announced().await.nonce, first.nonce);
    drop(c);
    let (late, late_payload) = update(&first, &[2.0, 0.0, 0.0, 4.0]);
    for edge in [&mut a, &mut b] {
        let (header, payload) = update(&first, &[1.0; 4]);
        edge.send(header, payload).await;
        edge.receipt().await;
    }
    assert_eq!(a.published().await, (Round(1), ModelVersion(1)));
    assert_eq!(b.published().await, (Round(1), ModelVersion(1)));
    let second = a.announced().await;
    assert_eq!((second.round, b.announced().await.round), (Round(2), Round(2)));
    let mut c = dial_soon(&centre, &identities[2], hello(0)).await;
    c.announced().await;
    let digest = late.payload_digest;
    c.send(late.clone(), late_payload.clone()).await;
    let receipt = c.receipt().await;
    assert_eq!((receipt.round, receipt.payload_digest), (Round(1), digest));
    c.send(late.clone(), late_payload).await;
    assert_eq!(c.receipt().await, receipt, "the same bytes get the same receipt");
    let (other, payload) = update(&first, &[3.0; 4]);
    c.send(other, payload).await;
    assert_eq!(c.refused().await, RefusalCode::Duplicate);
    let (wrong, payload) = update(&first, &[f32::NAN; 4]);
    c.send(wrong, payload).await;
    assert_eq!(
        c.refused().await,
        RefusalCode::NonFinite,
        "late ones are looked at as all are"
    );
    check_audit(&centre, &[(c.welcome.node.clone(), receipt)]);
    drop(c);
    for edge in [&mut a, &mut b] {
        let (header, payload) = update(&second, &[1.0; 4]);
        edge.send(header, payload).await;
        edge.receipt().await;
    }
    assert_eq!(a.published().await, (Round(2), ModelVersion(2)));
    let weight = 0.5_f32.sqrt();
    let expected = [2.0, 0.0, 0.0, 4.0].map(|value| 1.0 + (2.0 + weight * value) / 3.0);
    let found = a.model(ModelVersion(2)).await;
    let close = found
        .iter()
        .zip(expected)
        .all(|(found, expected)| (found - expected).abs() < 1e-6);
    assert!(close, "{found:?} {expected:?}");
    let detail = history::detail(centre.database().read(), Round(1)).unwrap();
    assert_eq!(
        detail.uploads.len(),
        2,
        "the round that it was made for is what it was"
    );
    centre.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restart_goes_on_with_the_same_round_and_its_updates() {
    let mut centre = Centre::start(|settings| settings.rounds.rounds_max = Some(1)).await;
    let identities = enrol(&centre, &["a", "b"]);
    let mut a = dial_soon(&centre, &identities[0], hello(0)).await;
    let b = dial_soon(&centre, &identities[1], hello(0)).await;
    let before = a.announced().await;
    let (header, payload) = update(&before, &[1.0, 0.0, 0.0, 0.0]);
    let records = header.privacy.ledger_records;
    a.send(header, payload).await;
    let receipt = a.receipt().await;
    drop((a, b));
    centre.stop().await;
    centre.serve().await;
    let mut a = dial_soon(
        &centre,
        &identities[0],
        HelloV1 {
            receipt_missing: Some(before.round),
            ..hello(records)
        },
    )
    .await;
    assert_eq!(
        a.receipt().await,
        receipt,
        "the receipt that was missing, to the last bit"
    );
    let mut b = dial_soon(&centre, &identities[1], hello(0)).await;
    let after = b.announced().await;
    assert_eq!((after.round, after.nonce), (before.round, before.nonce));
    let (header, payload) = update(&after, &[3.0, 0.0, 0.0, 0.0]);
    b.send(header, payload).await;
    b.receipt().await;
    assert_eq!(a.published().await, (Round(1), ModelVersion(1)));
    assert_eq!(a.model(ModelVersion(1)).await, [2.0, 0.0, 0.0, 0.0]);
    centre.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn registry_decides_at_hello_and_on_open_connections() {
    let mut centre = Centre::start(|settings| settings.rounds.quorum = 2).await;
    let identities = enrol(&centre, &["a", "b"]);
    let mut a = dial_soon(&centre, &identities[0], hello(0)).await;
    let set = |state| {
        let mut database = centre.database();
        database
            .write(|work| records::set_standing(work, &NodeId::new("a").unwrap(), state, "test"))
            .unwrap();
    };
    set(SiteStanding::Suspended);
    assert_eq!(a.refused().await, RefusalCode::Suspended);
    let ended = tokio::time::timeout(WAIT, a.session.recv()).await.unwrap();
    assert!(ended.is_err(), "the connection stayed open: {ended:?}");
    let refused = dial(&centre, &identities[0], hello(0)).await.err().unwrap();
    assert!(
        matches!(&refused, ConnectError::Refused(refusal) if refusal.code == RefusalCode::Suspended),
        "{refused}"
    );
    set(SiteStanding::Active);
    dial_soon(&centre, &identities[0], hello(0)).await;
    set(SiteStanding::Revoked);
    let deadline = tokio::time::Instant::now() + WAIT;
    loop {
        match dial(&centre, &identities[0], hello(0)).await {
            Err(ConnectError::Refused(refusal)) if refusal.code == RefusalCode::Revoked => break,
            _ => assert!(tokio::time::Instant::now() < deadline, "a revoked key got in"),
        }
    }
    // An edge of this federation that nobody enrolled.
    let edges = theriac_certs::Authority::load(&DataDir::new(&centre.dir).edge_authority()).unwrap();
    let stranger = edges.issue_edge(&NodeId::new("stranger").unwrap()).unwrap();
    let refused = dial(&centre, &stranger, hello(0)).await.err().unwrap();
    assert!(
        matches!(&refused, ConnectError::Refused(refusal) if refusal.code == RefusalCode::UnknownSite),
        "{refused}"
    );
    centre.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn incompatible_and_rolled_back_edges_are_told_why() {
    let mut centre = Centre::start(|settings| settings.rounds.quorum = 1).await;
    let identities = enrol(&centre, &["a"]);
    let mut a = dial_soon(&centre, &identities[0], hello(0)).await;
    let announce = a.announced().await;
    let (header, payload) = update(&announce, &[1.0; 4]);
    a.send(header, payload).await;
    a.receipt().await;
    let code = |hello: HelloV1| {
        let (centre, identity) = (&centre, &identities[0]);
        async move {
            match dial(centre, identity, hello).await.err().unwrap() {
                ConnectError::Refused(refusal) => refusal.code,
                other => panic!("{other}"),
            }
        }
    };
    // The ledger of the update above had at least one record.
    assert_eq!(code(hello(0)).await, RefusalCode::LedgerRollback);
    let newer = HelloV1 {
        protocol_min: 2,
        protocol_max: 9,
        ..hello(1_000)
    };
    assert_eq!(code(newer).await, RefusalCode::UnsupportedVersion);
    let other = HelloV1 {
        layout_digest: Digest::of(b"x"),
        ..hello(1_000)
    };
    assert_eq!(code(other).await, RefusalCode::LayoutMismatch);
    let other = HelloV1 {
        profile_digest: Digest::of(b"x"),
        ..hello(1_000)
    };
    assert_eq!(code(other).await, RefusalCode::LayoutMismatch);
    centre.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn token_enrols_one_key_once() {
    let mut centre = Centre::start(|settings| settings.rounds.quorum = 1).await;
    let endpoint = bind_client(&Limits::default()).unwrap();
    let address = centre.running.as_ref().unwrap().addresses().join_listen;
    let ask = |csr: Vec<u8>| join::request(&endpoint, address, "localhost", &centre.token, csr);
    let mine = PendingIdentity::generate().unwrap();
    let csr = mine.csr_der().unwrap();
    let enrolled = ask(csr.clone()).await.unwrap();
    assert_eq!(
        (enrolled.node.as_str(), enrolled.federation.as_str()),
        ("edge-1", "demo")
    );
    let again = ask(csr).await.unwrap();
    assert_eq!(
        again.certificate, enrolled.certificate,
        "a lost answer is given again"
    );
    let theirs = PendingIdentity::generate().unwrap();
    let spent = ask(theirs.csr_der().unwrap()).await;
    assert!(spent.is_err(), "a token worked twice");
    let nonsense = ask(vec![1, 2, 3]).await;
    assert!(nonsense.is_err(), "a request that does not parse was signed");
    let forged = JoinToken {
        secret: [0; 16],
        ..centre.token.clone()
    };
    let csr = theirs.csr_der().unwrap();
    assert!(
        join::request(&endpoint, address, "localhost", &forged, csr)
            .await
            .is_err(),
        "a wrong secret worked"
    );
    let identity = mine
        .complete(&enrolled.certificate, &enrolled.edge_authority)
        .unwrap();
    let edge = dial_soon(&centre, &identity, hello(0)).await;
    assert_eq!(edge.welcome.node.as_str(), "edge-1");
    centre.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn expired_token_is_refused() {
    let mut centre = Centre::start(|settings| settings.rounds.quorum = 1).await;
    let fingerprint = centre.token.aggregator_authority_fingerprint;
    let site = NodeId::new("late").unwrap();
    let token = theriac_aggregator::init::create_token(
        &mut centre.database(),
        fingerprint,
        &site,
        Duration::ZERO,
        false,
    )
    .unwrap();
    let endpoint = bind_client(&Limits::default()).unwrap();
    let address = centre.running.as_ref().unwrap().addresses().join_listen;
    let csr = PendingIdentity::generate().unwrap().csr_der().unwrap();
    let refused = join::request(&endpoint, address, "localhost", &token, csr).await;
    assert!(
        matches!(
            &refused,
            Err(join::JoinError::Refused(
                theriac_protocol::message::JoinRefusal::Expired
            ))
        ),
        "{refused:?}"
    );
    centre.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rollback_ends_the_open_round_and_the_next_builds_on_the_old_model() {
    let mut centre = Centre::start(|settings| settings.rounds.quorum = 1).await;
    let identities = enrol(&centre, &["a"]);
    let mut a = dial_soon(&centre, &identities[0], hello(0)).await;
    let announce = a.announced().await;
    let (header, payload) = update(&announce, &[5.0; 4]);
    a.send(header, payload).await;
    assert_eq!(a.published().await, (Round(1), ModelVersion(1)));
    let second = a.announced().await;
    assert_eq!((second.round, second.base_version), (Round(2), ModelVersion(1)));
    let mut database = centre.database();
    let blobs = std::sync::Arc::clone(database.blobs());
    database
        .write(|work| models::roll_back(work, &blobs, ModelVersion(0)))
        .unwrap();
    let third = loop {
        match a.recv().await {
            ToEdge::Announce(announce) => break announce,
            ToEdge::Closed(closed) => assert_eq!(closed.round, Round(2)),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((third.round, third.base_version), (Round(3), ModelVersion(2)));
    assert_eq!(a.model(ModelVersion(2)).await, [0.0; 4]);
    let (header, payload) = update(&third, &[1.0; 4]);
    a.send(header, payload).await;
    assert_eq!(a.published().await, (Round(3), ModelVersion(3)));
    assert_eq!(a.model(ModelVersion(3)).await, [1.0; 4]);
    centre.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_starts_fail_clearly_before_anything_is_open() {
    let mut centre = Centre::start(|_| {}).await;
    let path = centre.config.clone();
    let config = || theriac_aggregator::config::load(&path, []).unwrap();
    let (_stop, stopped) = watch::channel(false);
    let second = serve(config(), stopped.clone()).await.unwrap_err().problem();
    assert_eq!((second.code, second.exit as u8), ("TH-E0703", 75), "{second}");
    assert!(second.hint.is_some_and(|hint| hint.contains("stop process")));
    centre.stop().await;
    let mut other = config();
    other.federation = "other".into();
    let refused = serve(other, stopped.clone()).await.unwrap_err().problem();
    assert_eq!(refused.code, "TH-E0706", "{refused}");
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut busy = config();
    busy.http = holder.local_addr().unwrap();
    let refused = serve(busy, stopped.clone()).await.unwrap_err().problem();
    assert_eq!((refused.code, refused.exit as u8), ("TH-E0707", 75), "{refused}");
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut busy = config();
    busy.listen = udp.local_addr().unwrap();
    let refused = serve(busy, stopped.clone()).await.unwrap_err().problem();
    assert_eq!(refused.code, "TH-E0707", "{refused}");
    widen(&DataDir::new(&centre.dir).audit_key());
    let refused = serve(config(), stopped).await.unwrap_err().problem();
    assert_eq!((refused.code, refused.exit as u8), ("TH-E0702", 78), "{refused}");
    assert!(refused.hint.is_some_and(|hint| hint.contains("chmod 600")));
}

fn widen(path: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn page_tells_health_metrics_and_status() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut centre = Centre::start(|_| {}).await;
    let identities = enrol(&centre, &["a"]);
    let _a = dial_soon(&centre, &identities[0], hello(0)).await;
    let http = centre.running.as_ref().unwrap().addresses().http;
    let get = |path: &'static str, host: &'static str| async move {
        let mut stream = tokio::net::TcpStream::connect(http).await.unwrap();
        stream
            .write_all(format!("GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n").as_bytes())
            .await
            .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    };
    for path in ["/healthz", "/readyz"] {
        assert!(get(path, "localhost").await.contains("200 OK"), "{path}");
    }
    let metrics = get("/metrics", "localhost").await;
    assert!(
        metrics.contains("theriac_aggregator_connected_nodes 1") && metrics.ends_with("# EOF\n"),
        "{metrics}"
    );
    let status = get("/status", "localhost").await;
    let status: theriac_aggregator::status::Status =
        serde_json::from_str(status.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    assert!(
        status.running && status.connected == ["a"] && status.sites.len() == 1,
        "{status:?}"
    );
    assert!(get("/rounds?limit=5", "localhost").await.ends_with("[]"));
    assert!(get("/status", "evil.example").await.contains("403"));
    centre.stop().await;
}
