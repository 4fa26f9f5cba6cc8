//! The fleet's account on a running server: who hears of it, who gets a slot, what is too much.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use theriac_aggregator::config::Settings;
use theriac_aggregator::data_dir::DataDir;
use theriac_aggregator::fleet::FleetSettings;
use theriac_aggregator::layout::ModelSpec;
use theriac_aggregator::{InitOptions, Running, enrol_directly, init, serve};
use theriac_certs::{Authority, Identity, trust};
use theriac_protocol::message::{
    FEATURE_FLEET, FleetReportV1, HealthV1, HelloV1, LeaseGrantedV1, LeaseKind, LeaseRefusal, LeaseReleaseV1,
    LeaseRequestV1, ToAggregator, ToEdge,
};
use theriac_protocol::refusal::RefusalCode;
use theriac_protocol::units::{Digest, ModelVersion, NodeId, NoiseMultiplier};
use theriac_transport::{EdgeSession, Limits, SessionError, bind_client, connect};
use tokio::sync::watch;

const WAIT: Duration = Duration::from_mins(1);

struct Centre {
    dir: std::path::PathBuf,
    running: Running,
    stop: watch::Sender<bool>,
    identities: Vec<Identity>,
    _temporary: tempfile::TempDir,
}

impl Centre {
    async fn start(enabled: bool) -> Self {
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let settings = Settings {
            federation: "demo".into(),
            listen: any,
            join_listen: any,
            http: any,
            fleet: FleetSettings {
                enabled,
                lease_ttl: Duration::from_secs(15),
                state_age: Duration::from_secs(10),
                ..FleetSettings::default()
            },
            ..Settings::default()
        };
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path().join("data");
        let options = InitOptions {
            settings,
            ..InitOptions::new(&dir, "demo")
        };
        let made = init(options).unwrap();
        let nodes = ["a", "b"].map(|name| NodeId::new(name).unwrap());
        let identities = enrol_directly(&dir, &nodes).unwrap();
        let config = theriac_aggregator::config::load(&made.config, []).unwrap();
        let (stop, stopped) = watch::channel(false);
        Self {
            dir,
            running: serve(config, stopped).await.unwrap(),
            stop,
            identities,
            _temporary: temporary,
        }
    }

    async fn dial(&self, site: usize, features: &[&str]) -> Edge {
        let spec = ModelSpec::profile("host-service-v1", 1).unwrap();
        let hello = HelloV1 {
            protocol_min: 1,
            protocol_max: 1,
            software: "test".into(),
            features: features.iter().map(|name| (*name).to_owned()).collect(),
            profile: "host-service-v1".into(),
            profile_digest: spec.profile_digest(),
            layout_digest: spec.layout_digest(),
            noise_multiplier_min: NoiseMultiplier::new(1.0).unwrap(),
            ledger_head: Digest::default(),
            ledger_records: 0,
            model_version: ModelVersion(0),
            model_digest: Digest::default(),
            audit_checkpoint: None,
            receipt_missing: None,
        };
        let authority = Authority::load(&DataDir::new(&self.dir).aggregator_authority()).unwrap();
        let tls = trust::client_config(&self.identities[site], authority.certificate_der()).unwrap();
        let endpoint = bind_client(&Limits::default()).unwrap();
        let listen = self.running.addresses().listen;
        let (session, _) = connect(&endpoint, listen, "localhost", tls, hello).await.unwrap();
        Edge(session)
    }

    async fn stop(self) {
        self.stop.send_replace(true);
        self.running.wait().await.unwrap();
    }
}

struct Edge(EdgeSession);

impl Edge {
    async fn recv(&mut self) -> Result<ToEdge, SessionError> {
        tokio::time::timeout(WAIT, self.0.recv()).await.unwrap()
    }

    async fn say(&mut self, message: ToAggregator) {
        self.0.send(&message).await.unwrap();
    }

    async fn is(&mut self, unhealthy: u16, acting: u16) {
        self.say(ToAggregator::Health(HealthV1 { unhealthy, acting }))
            .await;
    }

    /// The next report: nodes, unhealthy, acting.
    async fn report(&mut self) -> (u32, u32, u32) {
        loop {
            if let ToEdge::Fleet(report) = self.recv().await.unwrap() {
                return (report.nodes, report.unhealthy, report.acting);
            }
        }
    }

    /// Reports until one says so.
    async fn hears(&mut self, nodes: u32, unhealthy: u32, acting: u32) {
        let wanted = FleetReportV1 {
            nodes,
            unhealthy,
            acting,
        };
        while self.recv().await.unwrap() != ToEdge::Fleet(wanted) {}
    }

    /// Asks for a slot; `Err` says why there is none.
    async fn asks(&mut self, request: u64, need_ms: u32) -> Result<LeaseGrantedV1, LeaseRefusal> {
        self.say(ToAggregator::LeaseRequest(LeaseRequestV1 {
            request,
            kind: LeaseKind::Action,
            share: 20,
            need_ms,
        }))
        .await;
        loop {
            match self.recv().await.unwrap() {
                ToEdge::LeaseGranted(granted) => {
                    assert_eq!(granted.request, request);
                    return Ok(granted);
                }
                ToEdge::LeaseRefused(refused) => {
                    assert_eq!(refused.request, request);
                    return Err(refused.reason);
                }
                _ => {}
            }
        }
    }
}

#[tokio::test]
async fn nodes_hear_of_each_other_but_not_right_after_a_start_and_one_slot_goes_round() {
    let started = Instant::now();
    let centre = Centre::start(true).await;
    let (mut a, mut b) = (
        centre.dial(0, &[FEATURE_FLEET]).await,
        centre.dial(1, &[FEATURE_FLEET]).await,
    );
    a.hears(0, 0, 0).await;
    // Of a server that has just started nobody hears that few nodes are sick, only because few have told yet.
    loop {
        a.is(2, 1).await;
        b.is(0, 0).await;
        let heard = a.report().await;
        if heard != (0, 0, 0) {
            assert_eq!(heard, (2, 1, 0));
            break;
        }
    }
    assert!(
        started.elapsed() >= Duration::from_secs(15),
        "{:?}",
        started.elapsed()
    );
    b.hears(2, 1, 1).await;
    // A server that has just started lends nothing for the term of a lease.
    let mut granted = a.asks(1, 100).await;
    let mut request = 1;
    while granted == Err(LeaseRefusal::Young) {
        a.hears(2, 1, 0).await;
        a.is(2, 1).await;
        b.is(0, 0).await;
        request += 1;
        granted = a.asks(request, 100).await;
    }
    let lease = granted.unwrap().lease;
    assert_eq!(b.asks(50, 100).await, Err(LeaseRefusal::Taken));
    assert_eq!(b.asks(51, 60_000).await, Err(LeaseRefusal::TooShort));
    let kind = LeaseKind::Action;
    a.say(ToAggregator::LeaseRelease(LeaseReleaseV1 { kind, lease }))
        .await;
    // Said before, and answered in order, so it is free when this is answered.
    a.is(0, 0).await;
    a.hears(2, 0, 0).await;
    assert!(b.asks(52, 100).await.is_ok());
    centre.stop().await;
}

#[tokio::test]
async fn who_did_not_ask_for_it_hears_nothing_and_where_it_is_off_nobody_does() {
    for (enabled, features) in [(true, vec![]), (false, vec![FEATURE_FLEET])] {
        let centre = Centre::start(enabled).await;
        let mut quiet = centre.dial(0, &features).await;
        quiet.is(1, 0).await;
        // Something that is answered, after it.
        quiet.say(ToAggregator::Hello(hello_again())).await;
        loop {
            match quiet.recv().await.unwrap() {
                ToEdge::Refusal(refusal) => break assert_eq!(refusal.code, RefusalCode::OutOfTurn),
                ToEdge::Fleet(report) => panic!("told {report:?}"),
                _ => {}
            }
        }
        drop(quiet);
        centre.stop().await;
    }
}

fn hello_again() -> HelloV1 {
    HelloV1 {
        protocol_min: 1,
        protocol_max: 1,
        software: "test".into(),
        features: Vec::new(),
        profile: "host-service-v1".into(),
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

#[tokio::test]
async fn who_says_more_than_the_quota_is_closed_and_costs_nobody_else() {
    let centre = Centre::start(true).await;
    let (mut loud, mut other) = (
        centre.dial(0, &[FEATURE_FLEET]).await,
        centre.dial(1, &[FEATURE_FLEET]).await,
    );
    for count in 0..2_000_u16 {
        let health = HealthV1 {
            unhealthy: count,
            acting: 0,
        };
        if loud.0.send(&ToAggregator::Health(health)).await.is_err() {
            break;
        }
    }
    let refused = loop {
        match loud.recv().await {
            Ok(ToEdge::Refusal(refusal)) => break refusal.code,
            Ok(_) => {}
            Err(error) => panic!("closed without a word: {error}"),
        }
    };
    assert_eq!(refused, RefusalCode::Busy);
    // The loud one is forgotten after a while, the other is counted.
    let mut heard = (0, 0, 0);
    while heard != (1, 0, 0) {
        other.is(0, 0).await;
        heard = other.report().await;
    }
    centre.stop().await;
}
