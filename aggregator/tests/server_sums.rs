//! Releases over rounds through the whole server, over real QUIC and certificates: a restart between rounds, a site that declines, and a site that enrols anew.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a failed helper is a failed test"
)]

mod series;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use theriac_aggregator::audit::AuditKey;
use theriac_aggregator::config::{CheckedConfig, RoundSettings, Settings};
use theriac_aggregator::data_dir::DataDir;
use theriac_aggregator::evidence::{Decision, Record};
use theriac_aggregator::floor::FloorSettings;
use theriac_aggregator::replay::replay;
use theriac_aggregator::robust::RuleName;
use theriac_aggregator::store::{Database, evidence, ledgers, models, records};
use theriac_aggregator::{InitOptions, Running, enrol_directly, init, serve};
use theriac_certs::{Authority, Identity, trust};
use theriac_protocol::compress::encode_f32;
use theriac_protocol::message::{
    AnnounceV1, DeclineReason, DeclineV1, Encoding, HelloV1, PrivacyClaimV1, ToAggregator, ToEdge, UpdateV1,
};
use theriac_protocol::refusal::{RefusalCode, RoundOutcome};
use theriac_protocol::units::{Delta, Digest, Epsilon, ModelVersion, NodeId, NoiseMultiplier, Round};
use theriac_transport::{ConnectError, EdgeSession, Limits, bind_client, connect};
use tokio::sync::watch;

const WAIT: Duration = Duration::from_mins(1);

struct Centre {
    _temporary: tempfile::TempDir,
    dir: PathBuf,
    config: PathBuf,
    running: Option<Running>,
    stop: watch::Sender<bool>,
}

impl Centre {
    async fn start() -> Self {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path().join("data");
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let settings = Settings {
            federation: "demo".into(),
            listen: any,
            join_listen: any,
            http: any,
            rounds: RoundSettings {
                quorum: 1,
                deadline: Duration::from_secs(50),
                pause: Duration::ZERO,
                block_rows: 60,
                rule: RuleName::MEAN,
                byzantine: 0,
                rounds_max: Some(3),
                ..RoundSettings::default()
            },
            privacy_floor: FloorSettings {
                ledger_continuity: true,
                ..FloorSettings::default()
            },
            ..Settings::default()
        };
        let made = init(InitOptions {
            settings,
            ..InitOptions::new(&dir, "demo")
        })
        .unwrap();
        let mut centre = Self {
            _temporary: temporary,
            dir,
            config: made.config,
            running: None,
            stop: watch::channel(false).0,
        };
        centre.serve().await;
        centre
    }

    fn checked(&self) -> CheckedConfig {
        theriac_aggregator::config::load(&self.config, []).unwrap()
    }

    async fn serve(&mut self) {
        self.stop = watch::channel(false).0;
        let running = serve(self.checked(), self.stop.subscribe()).await.unwrap();
        self.running = Some(running);
    }

    async fn stop(&mut self) {
        self.stop.send_replace(true);
        self.running.take().unwrap().wait().await.unwrap();
    }

    fn database(&self) -> Database {
        Database::open(&DataDir::new(&self.dir)).unwrap()
    }

    fn enrol(&self, names: &[&str]) -> Vec<Identity> {
        let nodes: Vec<NodeId> = names.iter().map(|name| node(name)).collect();
        enrol_directly(&self.dir, &nodes).unwrap()
    }

    fn records(&self, round: u64) -> Vec<Record> {
        evidence::of_round(self.database().read(), Round(round)).unwrap()
    }
}

fn node(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

struct Edge {
    session: EdgeSession,
    round: Option<AnnounceV1>,
}

/// A ledger has as many records as the site has sent updates.
fn head(records: u64) -> Digest {
    if records == 0 {
        Digest::default()
    } else {
        Digest::of(&records.to_le_bytes())
    }
}

async fn dial(centre: &Centre, identity: &Identity, records: u64) -> Result<Edge, ConnectError> {
    let spec = centre.checked().model;
    let hello = HelloV1 {
        protocol_min: 1,
        protocol_max: 1,
        software: "test".into(),
        features: Vec::new(),
        profile: spec.profile_name().to_owned(),
        profile_digest: spec.profile_digest(),
        layout_digest: spec.layout_digest(),
        noise_multiplier_min: NoiseMultiplier::new(1.0).unwrap(),
        ledger_head: head(records),
        ledger_records: records,
        model_version: ModelVersion(0),
        model_digest: Digest::default(),
        audit_checkpoint: None,
        receipt_missing: None,
    };
    let authority = Authority::load(&DataDir::new(&centre.dir).aggregator_authority()).unwrap();
    let tls = trust::client_config(identity, authority.certificate_der()).unwrap();
    let endpoint = bind_client(&Limits::default()).unwrap();
    let listen = centre.running.as_ref().unwrap().addresses().listen;
    let (session, welcome) = connect(&endpoint, listen, "localhost", tls, hello).await?;
    Ok(Edge {
        session,
        round: welcome.round,
    })
}

/// What an operator changed is known to a running server within a second.
async fn dial_soon(centre: &Centre, identity: &Identity, records: u64) -> Edge {
    let deadline = tokio::time::Instant::now() + WAIT;
    loop {
        match dial(centre, identity, records).await {
            Ok(edge) => return edge,
            Err(error) => assert!(tokio::time::Instant::now() < deadline, "not admitted: {error}"),
        }
    }
}

impl Edge {
    async fn recv(&mut self) -> ToEdge {
        tokio::time::timeout(WAIT, self.session.recv())
            .await
            .expect("nothing came")
            .expect("the session ended")
    }

    async fn announced(&mut self, round: u64) -> AnnounceV1 {
        loop {
            let announce = match self.round.take() {
                Some(announce) => announce,
                None => match self.recv().await {
                    ToEdge::Announce(announce) => announce,
                    _ => continue,
                },
            };
            if announce.round == Round(round) {
                return announce;
            }
        }
    }

    async fn send(&mut self, announce: &AnnounceV1, channels: usize, site: &str) {
        let clip = announce.clip_norm.value() as f32;
        let noise = announce.noise_multiplier.value() as f32 * clip;
        let seed = u32::from(site.as_bytes()[0]) * 1_000 + announce.round.0 as u32;
        let payload = encode_f32(&series::release(channels, clip, noise, seed));
        let header = UpdateV1 {
            round: announce.round,
            nonce: announce.nonce,
            kind: announce.kind,
            base_digest: announce.base_digest,
            layout_digest: announce.layout_digest,
            values: announce.values,
            encoding: Encoding::F32,
            payload_digest: Digest::of(&payload),
            blocks_bound: announce.blocks_max,
            privacy: PrivacyClaimV1 {
                clip_norm: announce.clip_norm,
                noise_multiplier: announce.noise_multiplier,
                epsilon_spent: Epsilon::new(4.0).unwrap(),
                delta: Delta::new(1e-6).unwrap(),
                ledger_head: head(announce.round.0),
                ledger_records: announce.round.0,
            },
        };
        let update = ToAggregator::Update(header, payload.into());
        self.session.send(&update).await.unwrap();
    }

    async fn published(&mut self, round: u64) {
        loop {
            match self.recv().await {
                ToEdge::Closed(closed) if closed.round == Round(round) => {
                    assert!(matches!(closed.outcome, RoundOutcome::Published(_)), "{closed:?}");
                    return;
                }
                ToEdge::Announce(announce) => self.round = Some(announce),
                ToEdge::Refusal(refusal) => panic!("{refusal:?}"),
                _ => {}
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn releases_add_up_over_rounds_and_a_restart_and_a_new_ledger_needs_leave() {
    let mut centre = Centre::start().await;
    let channels = centre.checked().model.channels().unwrap();
    let identities = centre.enrol(&["a", "b"]);
    // Both are there before the first round opens to one alone: the second joins it, or the next.
    let mut a = dial_soon(&centre, &identities[0], 0).await;
    let mut b = dial_soon(&centre, &identities[1], 0).await;
    for round in 1..=2 {
        for (edge, site) in [(&mut a, "a"), (&mut b, "b")] {
            let announce = edge.announced(round).await;
            edge.send(&announce, channels, site).await;
        }
        a.published(round).await;
        b.published(round).await;
    }
    centre.stop().await;
    centre.serve().await;
    let mut a = dial_soon(&centre, &identities[0], 2).await;
    let mut b = dial_soon(&centre, &identities[1], 2).await;
    let announce = b.announced(3).await;
    let decline = DeclineV1 {
        round: announce.round,
        reason: DeclineReason::TooFewBlocks,
    };
    b.session.send(&ToAggregator::Decline(decline)).await.unwrap();
    let announce = a.announced(3).await;
    a.send(&announce, channels, "a").await;
    a.published(3).await;
    let of = |site: &str, decision: Decision| -> u64 {
        let records = centre.records(3);
        let found = records
            .iter()
            .find(|record| record.site == site && record.decision == decision);
        found
            .and_then(|record| record.behind)
            .map_or(0, |behind| behind.releases)
    };
    assert_eq!((of("a", Decision::Combined), of("b", Decision::Carried)), (3, 2));
    let model = models::current_model(centre.database().read()).unwrap();
    assert_eq!((model.version, model.contributors), (ModelVersion(3), 2));
    let key = AuditKey::load(&DataDir::new(&centre.dir).audit_key(), "demo").unwrap();
    let key = key.log_key().public();
    for round in 1..=3 {
        let database = centre.database();
        let again = replay(
            database.read(),
            database.blobs(),
            &centre.checked().model,
            &key,
            Round(round),
        );
        assert!(again.is_ok(), "round {round}: {again:?}");
    }
    // Another key under a known name: a new ledger, at zero.
    let anew = centre.enrol(&["b"]).remove(0);
    let sites = records::sites(centre.database().read()).unwrap();
    let former = &sites[1].former_ledgers[0];
    assert_eq!((former.head.records, former.epsilon), (2, Some(4.0)));
    assert_eq!((sites[1].epsilon, sites[1].ledger_unallowed), (None, true));
    let deadline = tokio::time::Instant::now() + WAIT;
    loop {
        // Until the server has read the registry again it knows another key, or none.
        match dial(&centre, &anew, 0).await {
            Err(ConnectError::Refused(refusal)) if refusal.code == RefusalCode::LedgerRollback => break,
            Err(_) => assert!(
                tokio::time::Instant::now() < deadline,
                "never refused for its ledger"
            ),
            Ok(_) => panic!("a new ledger was taken without leave"),
        }
    }
    centre
        .database()
        .write(|work| ledgers::allow(work, &node("b"), "host replaced"))
        .unwrap();
    drop(dial_soon(&centre, &anew, 0).await);
    let again = centre
        .database()
        .write(|work| ledgers::allow(work, &node("b"), "twice"));
    assert!(again.is_err(), "there is nothing left to allow");
    centre.stop().await;
}
