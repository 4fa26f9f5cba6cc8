//! Releases over rounds through the whole server, over real QUIC and certificates: a restart between rounds, a site that declines, and a site that enrols anew.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a failed helper is a failed test"
)]

mod federation;

use std::time::Duration;

use federation::centre::{Centre, Edge, WAIT};
use federation::{header, node, series};
use theriac_aggregator::config::{RoundSettings, Settings};
use theriac_aggregator::evidence::{Decision, Record};
use theriac_aggregator::floor::FloorSettings;
use theriac_aggregator::robust::RuleName;
use theriac_aggregator::store::{evidence, ledgers, models, records};
use theriac_protocol::compress::encode_f32;
use theriac_protocol::message::{AnnounceV1, DeclineReason, DeclineV1, ToAggregator, ToEdge};
use theriac_protocol::refusal::{RefusalCode, RoundOutcome};
use theriac_protocol::units::{ModelVersion, Round};
use theriac_transport::ConnectError;

fn settings() -> Settings {
    Settings {
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
    }
}

impl Centre {
    fn records(&self, round: u64) -> Vec<Record> {
        evidence::of_round(self.database().read(), Round(round)).unwrap()
    }
}

impl Edge {
    async fn send(&mut self, announce: &AnnounceV1, channels: usize, site: &str) {
        let clip = announce.clip_norm.value() as f32;
        let noise = announce.noise_multiplier.value() as f32 * clip;
        let seed = u32::from(site.as_bytes()[0]) * 1_000 + announce.round.0 as u32;
        let payload = encode_f32(&series::release(channels, clip, noise, seed));
        let header = header(announce, &payload, announce.round.0);
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
    let mut centre = Centre::start(settings()).await;
    let channels = centre.checked().model.channels().unwrap();
    let identities = centre.enrol(&["a", "b"]);
    // Both are there before the first round opens to one alone: the second joins it, or the next.
    let mut a = centre.dial_soon(&identities[0], centre.hello(0, &[])).await;
    let mut b = centre.dial_soon(&identities[1], centre.hello(0, &[])).await;
    for round in 1..=2 {
        for (edge, site) in [(&mut a, "a"), (&mut b, "b")] {
            let announce = edge.announced_for(round).await;
            edge.send(&announce, channels, site).await;
        }
        a.published(round).await;
        b.published(round).await;
    }
    centre.stop().await;
    centre.serve().await;
    let mut a = centre.dial_soon(&identities[0], centre.hello(2, &[])).await;
    let mut b = centre.dial_soon(&identities[1], centre.hello(2, &[])).await;
    let announce = b.announced_for(3).await;
    let decline = DeclineV1 {
        round: announce.round,
        reason: DeclineReason::TooFewBlocks,
    };
    b.session.send(&ToAggregator::Decline(decline)).await.unwrap();
    let announce = a.announced_for(3).await;
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
    for round in 1..=3 {
        let again = centre.replay(round);
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
        match centre.dial(&anew, centre.hello(0, &[])).await {
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
    drop(centre.dial_soon(&anew, centre.hello(0, &[])).await);
    let again = centre
        .database()
        .write(|work| ledgers::allow(work, &node("b"), "twice"));
    assert!(again.is_err(), "there is nothing left to allow");
    centre.stop().await;
}
