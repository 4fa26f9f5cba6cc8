//! kill −9 of an edge while it learns: one charge, one set of bytes.

use std::time::Duration;

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use theriac_protocol::message::{ClosedV1, DeclineReason, ReceiptV1, ToAggregator, ToEdge, UpdateV1};
use theriac_protocol::refusal::{AbortReason, RoundOutcome};
use theriac_protocol::units::{Digest, Round};
use theriac_transport::AggregatorSession;
use tokio::runtime::Runtime;

use crate::fleet::Edge;
use crate::played::Played;

/// Samples that hold a complete block for certain.
const ROWS: u64 = 23;

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

fn closed(round: u64) -> ToEdge {
    let outcome = RoundOutcome::Aborted(AbortReason::QuorumMissed);
    ToEdge::Closed(ClosedV1 {
        round: Round(round),
        outcome,
    })
}

fn receipt(update: &UpdateV1) -> ToEdge {
    ToEdge::Receipt(ReceiptV1 {
        round: update.round,
        payload_digest: update.payload_digest,
        leaf_index: 0,
        ledger_head: update.privacy.ledger_head,
        signature: vec![0; 64],
    })
}

#[test]
fn a_charged_update_is_sent_again_with_the_same_bytes_and_never_made_anew() {
    let root = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let centre = runtime.block_on(async { Played::new() });
    let mut edge = Edge::new(root.path(), "press-1", "");
    centre.enlist(&edge);
    let announce = centre.announce(1);

    edge.start();
    let (mut session, hello) = runtime.block_on(centre.welcome(None));
    assert_eq!(hello.receipt_missing, None);
    edge.until_rows(ROWS);
    let first = runtime.block_on(async {
        session.send(&ToEdge::Announce(announce.clone())).await.unwrap();
        centre.report(&mut session).await.expect("an update")
    });
    let ToAggregator::Update(header, _) = &first else {
        panic!("{first:?} instead of an update")
    };
    // The update has been sent, so charge, bytes and mark are on the disk; nobody has acknowledged it.
    edge.kill();
    let (ledger, spent) = (edge.ledger(), edge.privacy());
    assert_eq!(spent["releases"], 1);

    // The round is still open, then the aggregator has closed it and the receipt was lost: the same bytes both times.
    for open in [Some(announce.clone()), None] {
        edge.start();
        let (mut session, hello) = runtime.block_on(centre.welcome(open));
        assert_eq!(hello.receipt_missing, Some(Round(1)));
        let again = runtime.block_on(centre.report(&mut session)).expect("the update");
        assert!(again == first, "other bytes were sent for the same charge");
        assert_eq!(edge.ledger(), ledger);
        edge.kill();
    }

    // Acknowledged and over. A kill may come between the receipt and the end of the outbox row: then the same bytes are sent
    // once more, and acknowledged once more. In the end nothing is left to send, and the same round asked for anew gets no
    // fresh noise.
    let mut attempts = 0;
    let mut session = loop {
        edge.start();
        let (mut session, hello) = runtime.block_on(centre.welcome(None));
        if hello.receipt_missing.is_none() {
            break session;
        }
        attempts += 1;
        assert!(attempts < 20, "the outbox never empties");
        runtime.block_on(async {
            let again = centre.report(&mut session).await.expect("the update");
            assert!(again == first, "other bytes were sent for the same charge");
            session.send(&receipt(header)).await.unwrap();
            session.send(&closed(1)).await.unwrap();
        });
        edge.until("its receipt", |status| status.updates_accepted == 1);
        edge.kill();
    };
    assert!(attempts > 0, "the update was gone before it was acknowledged");
    edge.until_rows(ROWS);
    let report = runtime.block_on(async {
        session.send(&ToEdge::Announce(announce)).await.unwrap();
        centre.report(&mut session).await.expect("a word")
    });
    let ToAggregator::Decline(decline) = report else {
        panic!("a second release of one charge: {report:?}")
    };
    assert_eq!(decline.reason, DeclineReason::StorageUnavailable);
    assert_eq!((edge.ledger(), edge.privacy()), (ledger, spent));
    edge.stop();
}

/// The one set of bytes that a round may ever get.
fn note(sent: &mut Option<Digest>, report: Option<&ToAggregator>) {
    if let Some(ToAggregator::Update(header, _)) = report {
        let first = *sent.get_or_insert(header.payload_digest);
        assert_eq!(first, header.payload_digest, "two releases for one charge");
    }
}

#[test]
fn at_any_moment_the_charge_stands_and_no_second_release_is_made() {
    const KILLS: u64 = 5;
    let root = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let centre = runtime.block_on(async { Played::new() });
    let mut edge = Edge::new(root.path(), "press-1", "");
    centre.enlist(&edge);
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let (mut spent, mut releases, mut outcomes) = (0.0, 0, Vec::new());
    edge.start();
    let (mut session, _) = runtime.block_on(centre.welcome(None));
    for round in 1..=KILLS {
        edge.until_rows(ROWS);
        let announce = centre.announce(round);
        // A kill somewhere between the announcement and a moment after the update.
        let moment = Duration::from_micros(rng.random_range(0..15_000));
        let until_the_end = async |session: &mut AggregatorSession| {
            session.send(&ToEdge::Announce(announce.clone())).await.unwrap();
            tokio::time::timeout(moment, centre.report(session)).await
        };
        let early = runtime.block_on(until_the_end(&mut session)).ok().flatten();
        edge.kill();
        // What was still on its way when the process ended.
        let late = runtime.block_on(async {
            let rest = tokio::time::timeout(Duration::from_millis(50), centre.report(&mut session));
            rest.await.ok().flatten()
        });
        let mut sent = None;
        note(&mut sent, early.as_ref());
        note(&mut sent, late.as_ref());
        let ledger = edge.ledger();

        edge.start();
        let (again, hello) = runtime.block_on(centre.welcome(Some(announce)));
        session = again;
        let report = runtime.block_on(centre.report(&mut session));
        note(&mut sent, report.as_ref());
        let word = match report.expect("a word about the open round") {
            ToAggregator::Update(..) => "sent",
            ToAggregator::Decline(decline) if decline.reason == DeclineReason::StorageUnavailable => "lost",
            // Not charged, and a young process has no complete block.
            ToAggregator::Decline(decline) => {
                assert_eq!(decline.reason, DeclineReason::TooFewBlocks);
                assert_eq!((sent, hello.receipt_missing), (None, None));
                "not charged"
            }
            other => panic!("{other:?}"),
        };
        outcomes.push(word);
        assert!(edge.ledger().starts_with(&ledger), "the ledger was rewritten");
        let now = edge.privacy();
        let (epsilon, count) = (
            now["epsilon_spent"].as_f64().unwrap(),
            now["releases"].as_u64().unwrap(),
        );
        assert!(epsilon >= spent && count >= releases && count <= round, "{now}");
        assert_eq!(count - releases, u64::from(word != "not charged"), "{word}");
        (spent, releases) = (epsilon, count);
        runtime.block_on(session.send(&closed(round))).unwrap();
    }
    println!("{outcomes:?}");
    edge.stop();
}
