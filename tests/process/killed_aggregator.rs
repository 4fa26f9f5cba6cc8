//! kill −9 of the aggregator.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use rustix::process::{Pid, Signal, kill_process};
use theriac_aggregator::config::RoundSettings;
use theriac_aggregator::store::rounds as stored;
use theriac_protocol::message::{AnnounceV1, ToEdge};
use theriac_protocol::units::{Digest, Round};

use crate::child::PATIENCE;
use crate::fleet::{Centre, Edge, moments};
use crate::site::{self, Site, Update, enrol};

/// Three edges: `press-1` has sent its update and holds the receipt, `press-2` has declined, `press-3` has not heard of the
/// round when the aggregator is killed in the middle of it.
#[test]
fn the_open_round_goes_on_with_the_acknowledged_update_and_nobody_trains_twice() {
    let root = tempfile::tempdir().unwrap();
    let rounds = "quorum = 2\nrule = \"median\"\nbyzantine = 0\ndeadline = \"3m\"\nrounds_max = 1";
    let mut centre = Centre::init(root.path(), &moments(rounds));
    centre.serve();
    let mut first = Edge::new(root.path(), "press-1", "");
    let mut second = Edge::on(root.path(), "press-2", root.path(), "receive_only = true", "");
    let mut third = Edge::new(root.path(), "press-3", "");
    for edge in [&first, &second, &third] {
        edge.enrol(&centre);
    }
    first.start();
    first.until_connected();
    first.until_rows(35);
    second.start();
    first.until("its receipt", |status| status.updates_accepted == 1);
    centre.until("the decline on record", |status| {
        status.sites.iter().any(|site| !site.declines.is_empty())
    });
    let ledger = first.ledger();

    centre.kill();
    let left = stored::unfinished(centre.database().read())
        .unwrap()
        .expect("the round is open")
        .open;
    assert_eq!((left.round, left.stored.len()), (Round(1), 1));
    // Ready to report before it hears of the round, and stopped until the first edge is back.
    third.start();
    third.until_rows(35);
    let waiting = Pid::from_raw(third.pid().cast_signed()).unwrap();
    kill_process(waiting, Signal::STOP).unwrap();
    centre.serve();
    let back = centre.until("the edges of the open round", |status| {
        status.connected.len() == 2
    });
    assert_eq!(
        (back.round, back.phase.as_str(), back.stored),
        (1, "collecting", 1)
    );
    let resumed = stored::unfinished(centre.database().read())
        .unwrap()
        .unwrap()
        .open;
    assert_eq!(
        (resumed.round, resumed.nonce, resumed.base, &resumed.stored),
        (left.round, left.nonce, left.base, &left.stored)
    );
    kill_process(waiting, Signal::CONT).unwrap();

    centre.until("a published model", |status| status.rounds_published == 1);
    let round = centre.round(1);
    assert_eq!(
        (round.round.state.as_str(), round.round.published),
        ("published", Some(1))
    );
    assert_eq!(round.terms["nonce"], serde_json::json!(left.nonce));
    let members: Vec<(&str, &str)> = round
        .uploads
        .iter()
        .map(|upload| (upload.node.as_str(), upload.payload_digest.as_str()))
        .collect();
    let acknowledged = left.stored[&"press-1".parse().unwrap()].to_string();
    assert_eq!(members[0], ("press-1", acknowledged.as_str()));
    assert_eq!((members.len(), members[1].0), (2, "press-3"));
    assert_eq!(
        centre.published(1),
        centre.recomputed(Round(1)),
        "the model's bits"
    );
    let status = first.until("the new model", |status| status.gate != "none");
    assert_eq!(status.updates_accepted, 1);
    assert_eq!(first.ledger(), ledger, "the ledger of an edge that was to wait");
    assert_eq!(first.privacy()["releases"], 1);
    for edge in [&mut first, &mut second, &mut third] {
        edge.stop();
    }
    centre.stop();
}

/// What the two sites were promised and told.
#[derive(Default)]
pub(crate) struct Heard {
    pub(crate) receipts: BTreeMap<(Round, String), Digest>,
    nonces: BTreeMap<Round, u64>,
    /// The first session that ended by the reset of a new process.
    fault: Option<String>,
}

impl Heard {
    fn announced(&mut self, announce: &AnnounceV1) {
        let nonce = *self.nonces.entry(announce.round).or_insert(announce.nonce);
        if nonce != announce.nonce {
            self.fault = Some(format!("round {} was announced with two nonces", announce.round));
        }
    }
}

/// Takes part in every round for ever, comes back whenever the aggregator is gone, and sends the same bytes again.
pub(crate) async fn take_part(mut site: Site, name: String, value: f32, heard: Arc<Mutex<Heard>>) {
    let mut update: Option<Update> = None;
    let mut missing = None;
    loop {
        let (mut session, mut round) = site.connect_at_last(missing).await;
        loop {
            if let Some(announce) = round.take() {
                heard.lock().unwrap().announced(&announce);
                if update
                    .as_ref()
                    .is_none_or(|update| update.0.round != announce.round)
                {
                    // Below the norm that an honest update may have, however many rounds there are.
                    let turn = u8::try_from(announce.round.0 % 64).unwrap_or_default();
                    let values = [value, f32::from(turn), 0.25, -value];
                    update = Some(site.update(&announce, values));
                }
                if let Some(update) = &update {
                    missing = Some(update.0.round);
                    if update.send(&mut session).await.is_err() {
                        break;
                    }
                }
            }
            match site::next(&mut session).await {
                Ok(ToEdge::Announce(announce)) => round = Some(announce),
                Ok(ToEdge::Receipt(receipt)) => {
                    let key = (receipt.round, name.clone());
                    heard.lock().unwrap().receipts.insert(key, receipt.payload_digest);
                    missing = missing.filter(|round| *round != receipt.round);
                }
                Ok(_) => {}
                Err(_) => break,
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_was_acknowledged_survives_kills_at_any_moment() {
    const KILLS: usize = 12;
    let root = tempfile::tempdir().unwrap();
    let mut centre = Centre::bare(
        root.path(),
        &root.path().join("centre"),
        RoundSettings {
            quorum: 2,
            deadline: Duration::from_mins(5),
            pause: Duration::ZERO,
            ..RoundSettings::default()
        },
    );
    let identities = enrol(&centre, &["a", "b"]);
    centre.serve();
    let heard = Arc::new(Mutex::new(Heard::default()));
    let mut tasks = tokio::task::JoinSet::new();
    for (identity, value) in identities.iter().zip([1.0, 3.0]) {
        let name = identity.name().node.to_string();
        tasks.spawn(take_part(
            Site::new(&centre, identity),
            name,
            value,
            Arc::clone(&heard),
        ));
    }
    let promised = || heard.lock().unwrap().receipts.len();
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    for kill in 0..KILLS {
        // Some rounds pass, then at any moment of the next one.
        let (before, since) = (promised(), Instant::now());
        while promised() < before + 4 {
            assert!(since.elapsed() < PATIENCE, "no round after kill {kill}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        tokio::time::sleep(Duration::from_micros(rng.random_range(0..20_000))).await;
        centre.kill();
        centre.serve();
    }
    tasks.abort_all();
    while tasks.join_next().await.is_some() {}
    centre.kill();

    let heard = heard.lock().unwrap();
    assert_eq!(heard.fault, None);
    let mut rounds = BTreeMap::new();
    for ((round, node), digest) in &heard.receipts {
        let detail = rounds.entry(*round).or_insert_with(|| centre.round(round.0));
        let stored = detail.uploads.iter().find(|upload| upload.node == *node);
        assert_eq!(
            stored.map(|upload| upload.payload_digest.clone()),
            Some(digest.to_string()),
            "the acknowledged update of {node} in round {round}"
        );
    }
    let published: Vec<_> = rounds
        .values()
        .filter_map(|detail| detail.round.published)
        .collect();
    assert!(
        published.len() > KILLS,
        "{} rounds were published",
        published.len()
    );
    for detail in rounds.values() {
        let round = detail.round.round;
        assert_ne!(detail.round.state, "aborted", "round {round}");
        if let Some(version) = detail.round.published {
            assert_eq!((version, detail.uploads.len()), (round, 2), "round {round}");
            if let Some(nonce) = heard.nonces.get(&Round(round)) {
                assert_eq!(detail.terms["nonce"], serde_json::json!(nonce));
            }
            assert_eq!(
                centre.published(version),
                centre.recomputed(Round(round)),
                "round {round}"
            );
        }
    }
    println!(
        "{} updates acknowledged in {} rounds over {KILLS} kills",
        heard.receipts.len(),
        rounds.len()
    );
}
