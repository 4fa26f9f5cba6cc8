//! Late updates in the next round and means of a site's updates: what the model is made of, what the records say, and that the past can be done again.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a failed helper is a failed test"
)]

mod federation;

use federation::hand::Hand;
use federation::node;
use theriac_aggregator::accumulate::Depth;
use theriac_aggregator::average::SiteAverage;
use theriac_aggregator::config::{RoundKind, RoundSettings};
use theriac_aggregator::evidence::{Decision, RULE_VERSION, Record};
use theriac_aggregator::publish::next_model_of;
use theriac_aggregator::replay::ReplayError;
use theriac_aggregator::robust::{Options, Row, RuleName, rule};
use theriac_aggregator::server_optimizer::ServerOptimizer;
use theriac_aggregator::store::evidence::{self, ChainError};
use theriac_aggregator::store::heads::TreeError;
use theriac_aggregator::store::{StoreError, Work, late, models, records, rounds};
use theriac_audit::leaf::SiteStanding;
use theriac_protocol::compress::encode_f32;
use theriac_protocol::message::{AnnounceV1, Encoding, UpdateV1};
use theriac_protocol::refusal::{AbortReason, RefusalCode};
use theriac_protocol::units::{Digest, ModelVersion, Round};

const KINDS: [RoundKind; 3] = [RoundKind::Moments, RoundKind::Gradient, RoundKind::Delta];

/// A federation of three sites, of whose updates the rule sees the mean with b = `average`.
fn federation_of(kind: RoundKind, average: f64) -> Hand {
    let rounds = RoundSettings {
        kind,
        ..RoundSettings::default()
    };
    let mut hand = Hand::new(rounds, &["a", "b", "c"], values);
    hand.plan.site_average = SiteAverage::new(average).unwrap();
    hand
}

/// Values of a site in a round, all different and further from one another than noise is, so that no screen takes them for copies.
fn values(hand: &Hand, site: &str, round: u64) -> Vec<f32> {
    let scale = 40.0 * hand.terms().clip_norm.value() as f32;
    let seed = u64::from(site.as_bytes()[0]) * 31 + round * 17;
    (0..u64::from(hand.terms().values))
        .map(|index| scale * (((index * 7 + seed) * 2_654_435_761 % 1_000) as f32 / 500.0 - 1.0))
        .collect()
}

impl Hand {
    /// The model in force, and what the mean of these rows makes of the model before it; `noise_ratio` as in [`next_model_of`].
    fn check(&self, announce: &AnnounceV1, rows: &[Vec<f32>], noise_ratio: f64) {
        let read = self.database.read();
        let base = models::model_payload(read, self.database.blobs(), announce.base_version).unwrap();
        let rows: Vec<Row> = rows
            .iter()
            .map(|values| Row {
                encoding: Encoding::F32,
                payload: encode_f32(values).into(),
            })
            .collect();
        let rule = rule(RuleName::MEAN, 0, &Options::default()).unwrap();
        let server = (&ServerOptimizer::default(), None);
        let (spec, terms) = (&self.config.model, self.terms());
        let depth = Depth {
            noise_ratio,
            ..Depth::ONE
        };
        let expected = next_model_of(spec, &terms, &base, rows, &*rule, server, depth).unwrap();
        let found = models::current_model(read).unwrap();
        assert_eq!(found.digest, expected.digest, "{:?}", terms.kind);
    }
}

fn times(values: Vec<f32>, factor: f64) -> Vec<f32> {
    values
        .into_iter()
        .map(|value| (f64::from(value) * factor) as f32)
        .collect()
}

fn record<'a>(records: &'a [Record], site: &str) -> &'a Record {
    records
        .iter()
        .find(|record| record.site == site && record.decision != Decision::Late)
        .unwrap()
}

#[test]
fn late_update_of_every_kind_counts_once_in_the_next_round_with_its_staleness_weight() {
    for kind in KINDS {
        let mut hand = federation_of(kind, 0.0);
        let first = hand.open(1);
        hand.send(&first, "a");
        let silent = record(&hand.publish(1), "c").decision;
        assert_eq!(silent, Decision::Silent);
        let header = hand.send_late(&first, "c");
        let other = UpdateV1 {
            payload_digest: Digest::of(b"other"),
            ..header
        };
        let conflict = hand
            .database
            .write(|work| late::insert(work, &node("c"), &other, b"other", 1.0, RuleName::MEAN));
        assert!(matches!(conflict, Err(StoreError::Conflict(_))), "{conflict:?}");
        let second = hand.open(2);
        hand.send(&second, "a");
        hand.send(&second, "b");
        let records = hand.publish(2);
        let weight = if kind == RoundKind::Moments {
            1.0
        } else {
            1.0 / 2.0_f64.sqrt()
        };
        let rows = [
            hand.values("a", 2),
            hand.values("b", 2),
            times(hand.values("c", 1), weight),
        ];
        let spread = ((2.0 + weight * weight) / 3.0).sqrt();
        hand.check(&second, &rows, spread);
        let stale = record(&records, "c").stale.expect("the record says so");
        assert_eq!((stale.of_round, stale.age, stale.weight), (1, 1, weight));
        assert_eq!(
            (record(&records, "c").weight, record(&records, "a").stale),
            (1, None)
        );
        let said = theriac_aggregator::evidence::words::decision(record(&records, "c"));
        assert!(said.contains("late for round 1"), "{said}");
        let of_first = evidence::of_round(hand.database.read(), Round(1)).unwrap();
        assert!(of_first.iter().any(|record| record.decision == Decision::Late));
        assert_eq!(
            (hand.replay(1).unwrap(), hand.replay(2).unwrap()),
            (1, 3),
            "{kind:?}"
        );
        // Not a second time.
        let third = hand.open(3);
        hand.send(&third, "a");
        assert_eq!(record(&hand.publish(3), "c").decision, Decision::Silent);
        assert_eq!((hand.replay(2).unwrap(), hand.replay(3).unwrap()), (3, 1));
    }
}

#[test]
fn late_update_gives_way_to_a_newer_one_to_a_roll_back_and_to_a_suspension() {
    let counts = |prepare: &dyn Fn(&mut Hand)| {
        let mut hand = federation_of(RoundKind::Delta, 0.0);
        let first = hand.open(1);
        hand.send(&first, "a");
        hand.publish(1);
        hand.send_late(&first, "c");
        prepare(&mut hand);
        let second = hand.open(2);
        hand.send(&second, "a");
        let found = late::waiting(hand.database.read(), &second).unwrap();
        let of_second: Vec<String> = found.iter().map(|row| row.node.to_string()).collect();
        hand.publish(2);
        assert!(hand.replay(2).is_ok());
        of_second
    };
    assert_eq!(counts(&|_| {}), ["c"]);
    let suspended = |hand: &mut Hand| {
        let state = SiteStanding::Suspended;
        let set = hand
            .database
            .write(|work| records::set_standing(work, &node("c"), state, "test"));
        set.unwrap();
    };
    assert!(counts(&suspended).is_empty());
    let rolled_back = |hand: &mut Hand| {
        let blobs = std::sync::Arc::clone(hand.database.blobs());
        let back = hand
            .database
            .write(|work| models::roll_back(work, &blobs, ModelVersion(0)));
        back.unwrap();
    };
    assert!(counts(&rolled_back).is_empty());
    // One that the site has sent since.
    let mut hand = federation_of(RoundKind::Delta, 0.0);
    let first = hand.open(1);
    hand.send(&first, "a");
    hand.publish(1);
    hand.send_late(&first, "c");
    let second = hand.open(2);
    hand.send(&second, "c");
    let records = hand.publish(2);
    assert_eq!(record(&records, "c").stale, None);
    hand.check(&second, &[hand.values("c", 2)], 1.0);
}

/// A late update is no way round what was found in the update for the round itself.
#[test]
fn late_update_of_a_site_that_was_refused_does_not_count_and_the_refusal_stays_on_record() {
    let mut hand = federation_of(RoundKind::Delta, 0.0);
    let first = hand.open(1);
    hand.send(&first, "a");
    hand.publish(1);
    hand.send_late(&first, "c");
    let second = hand.open(2);
    hand.send(&second, "a");
    let header = hand.header(&second, b"not finite");
    hand.database
        .write(|work| {
            let code = RefusalCode::NonFinite;
            rounds::refuse_upload(work, &node("c"), &header, code, RuleName::MEAN, None)
        })
        .unwrap();
    assert!(late::waiting(hand.database.read(), &second).unwrap().is_empty());
    let records = hand.publish(2);
    let refused = record(&records, "c");
    assert_eq!(
        (refused.decision, refused.reason.as_deref()),
        (Decision::Refused, Some("non_finite"))
    );
    assert_eq!(
        refused.verdict,
        theriac_aggregator::evidence::law::Verdict::Inconsistent
    );
    hand.check(&second, &[hand.values("a", 2)], 1.0);
    assert_eq!(hand.replay(2).unwrap(), 1);
}

/// What comes while its round is still being combined is on record as late all the same, once, whether or not the round gave a model.
#[test]
fn late_update_that_came_before_the_rounds_own_records_is_on_record() {
    for published in [true, false] {
        let mut hand = federation_of(RoundKind::Delta, 0.0);
        let first = hand.open(1);
        hand.send(&first, "a");
        hand.send_late(&first, "c");
        if published {
            hand.publish(1);
            assert_eq!(hand.replay(1).unwrap(), 1);
        } else {
            hand.database
                .write(|work| rounds::abort(work, Round(1), AbortReason::QuorumMissed))
                .unwrap();
        }
        hand.send_late(&first, "b");
        let of_first = evidence::of_round(hand.database.read(), Round(1)).unwrap();
        for site in ["b", "c"] {
            let said: Vec<(Decision, Option<&str>)> = of_first
                .iter()
                .filter(|record| record.site == site)
                .map(|record| (record.decision, record.reason.as_deref()))
                .collect();
            let late = (Decision::Late, Some("kept_for_next_round"));
            assert_eq!(said, [(Decision::Silent, None), late], "{site}, {published}");
        }
        assert_eq!(of_first.len(), 5, "{published}");
        // The log names the last record of the chain, whoever it is about.
        let last = "SELECT EXISTS (SELECT 1 FROM audit_leaf WHERE line LIKE '%decisions_recorded%'
            AND line LIKE '%' || (SELECT lower(hex(hash)) FROM decision ORDER BY seq DESC LIMIT 1) || '%')";
        let named: bool = hand
            .database
            .read()
            .query_row(last, [], |row| row.get(0))
            .unwrap();
        assert!(named, "{published}");
        let second = hand.open(2);
        hand.send(&second, "a");
        hand.publish(2);
        assert_eq!(hand.replay(2).unwrap(), 3, "{published}");
    }
}

#[test]
fn late_update_for_a_round_without_a_model_is_as_fresh_as_any() {
    let mut hand = federation_of(RoundKind::Delta, 0.0);
    let first = hand.open(1);
    hand.database
        .write(|work| rounds::abort(work, Round(1), AbortReason::QuorumMissed))
        .unwrap();
    hand.send_late(&first, "c");
    let second = hand.open(2);
    hand.send(&second, "a");
    let records = hand.publish(2);
    let stale = record(&records, "c").stale.unwrap();
    assert_eq!((stale.age, stale.weight), (0, 1.0));
    hand.check(&second, &[hand.values("a", 2), hand.values("c", 1)], 1.0);
    assert_eq!(hand.replay(2).unwrap(), 2);
}

#[test]
fn rule_sees_the_mean_of_a_sites_updates_back_to_a_roll_back_and_can_see_it_again() {
    for kind in KINDS {
        let mut hand = federation_of(kind, 0.5);
        for round in 1..=3 {
            let announce = hand.open(round);
            hand.send(&announce, "a");
            if round != 2 {
                hand.send(&announce, "b");
            }
            let records = hand.publish(round);
            if round < 3 {
                continue;
            }
            let mean = |site: &str, parts: &[(u64, f64)]| -> Vec<f32> {
                let all: f64 = parts.iter().map(|(_, weight)| weight).sum();
                let of: Vec<Vec<f32>> = parts.iter().map(|(round, _)| hand.values(site, *round)).collect();
                (0..of[0].len())
                    .map(|at| {
                        let parts = parts.iter().zip(&of);
                        let sum: f64 = parts.map(|((_, weight), row)| weight * f64::from(row[at])).sum();
                        (sum / all) as f32
                    })
                    .collect()
            };
            let a = mean("a", &[(3, 1.0), (2, 0.5), (1, 0.25)]);
            let b = mean("b", &[(3, 1.0), (1, 0.25)]);
            let (of_a, of_b) = (1.3125_f64.sqrt() / 1.75, 1.0625_f64.sqrt() / 1.25);
            let spread = f64::midpoint(of_a * of_a, of_b * of_b);
            hand.check(&announce, &[a, b], spread.sqrt());
            let averaged = ["a", "b"].map(|site| record(&records, site).averaged);
            assert_eq!(averaged, [Some(3), Some(2)]);
        }
        for round in 1..=3 {
            assert!(hand.replay(round).is_ok(), "{kind:?} {round}");
        }
        // What led to a model that was taken back does not come again.
        let blobs = std::sync::Arc::clone(hand.database.blobs());
        hand.database
            .write(|work| models::roll_back(work, &blobs, ModelVersion(1)))
            .unwrap();
        let fourth = hand.open(4);
        hand.send(&fourth, "a");
        assert_eq!(record(&hand.publish(4), "a").averaged, None);
        hand.check(&fourth, &[hand.values("a", 4)], 1.0);
        // Without the earlier payloads nothing can be held against the record.
        hand.database
            .write(|work| rounds::forget_payloads(work, Round(1)))
            .unwrap();
        let gone = hand.replay(3).unwrap_err();
        assert!(
            gone.is_impossible() && gone.to_string().contains("deleted"),
            "{gone}"
        );
        assert!(hand.replay(4).is_ok());
    }
}

/// Whoever writes the chain of records anew must also cut it loose from the audit log, or change the log: both are seen.
#[test]
fn records_that_are_cut_loose_from_the_audit_log_are_tampered_with() {
    for change in [
        "UPDATE round_plan SET leaf_index = 999999",
        "UPDATE audit_leaf SET line = line || ' ' WHERE idx = (SELECT leaf_index FROM round_plan)",
        "UPDATE audit_leaf SET hash = zeroblob(32) WHERE idx = (SELECT leaf_index FROM round_plan)",
        "DELETE FROM audit_leaf WHERE idx = (SELECT leaf_index FROM round_plan)",
        "DELETE FROM round_plan",
    ] {
        let mut hand = federation_of(RoundKind::Delta, 0.0);
        let first = hand.open(1);
        hand.send(&first, "a");
        hand.publish(1);
        assert_eq!(hand.replay(1).unwrap(), 1);
        let changed = hand
            .database
            .write(|work| Ok(work.connection().execute(change, [])?))
            .unwrap();
        assert_eq!(changed, 1, "{change}");
        let found = hand.replay(1);
        assert!(
            matches!(found, Err(ReplayError::Chain(ChainError::Audit { round: 1 }))),
            "{change}: {found:?}"
        );
    }
}

/// Takes the newest record away, and makes the chain end before it.
fn removed(work: &Work<'_>, seq: i64, _: &Record) -> Result<usize, StoreError> {
    let connection = work.connection();
    let head =
        "UPDATE meta SET value = (SELECT hash FROM decision WHERE seq = ?1 - 1) WHERE key = 'decision_head'";
    connection.execute(head, [seq])?;
    Ok(connection.execute("DELETE FROM decision WHERE seq = ?1", [seq])?)
}

/// Writes the newest record anew, with another reason, and makes the chain end in it.
fn changed(work: &Work<'_>, seq: i64, record: &Record) -> Result<usize, StoreError> {
    let connection = work.connection();
    let other = Record {
        reason: None,
        ..record.clone()
    };
    let line = other.to_line().unwrap();
    let hash = Record::hash(&line).0;
    connection.execute("UPDATE meta SET value = ?1 WHERE key = 'decision_head'", [hash])?;
    let put = "UPDATE decision SET record = ?2, hash = ?3 WHERE seq = ?1";
    Ok(connection.execute(put, (seq, line, hash))?)
}

/// The leaf of a late record names it, so that whoever changes the end of the chain and makes it fit again has the log against them.
#[test]
fn late_record_that_is_removed_or_changed_at_the_end_of_the_chain_is_tampered_with() {
    type Change = fn(&Work<'_>, i64, &Record) -> Result<usize, StoreError>;
    let changes: [(&str, Change); 2] = [("removed", removed), ("changed", changed)];
    for (what, change) in changes {
        let mut hand = federation_of(RoundKind::Delta, 0.0);
        let first = hand.open(1);
        hand.send(&first, "a");
        hand.publish(1);
        hand.send_late(&first, "c");
        hand.send_late(&first, "b");
        assert_eq!(hand.replay(1).unwrap(), 1, "{what}");
        let newest = "SELECT seq, record FROM decision ORDER BY seq DESC LIMIT 1";
        let (seq, record): (i64, String) = hand
            .database
            .read()
            .query_row(newest, [], |row| Ok((row.get(0)?, row.get(1)?)))
            .unwrap();
        let record: Record = serde_json::from_str(&record).unwrap();
        assert_eq!((record.site.as_str(), record.decision), ("b", Decision::Late));
        let rows = hand.database.write(|work| change(work, seq, &record)).unwrap();
        assert_eq!(rows, 1, "{what}");
        let found = hand.replay(1);
        assert!(
            matches!(found, Err(ReplayError::Tree(TreeError::Record { round: 1, .. }))),
            "{what}: {found:?}"
        );
    }
}

/// Records are deleted after their time from the beginning of the chain, a late one with those before it; their leaves stay.
#[test]
fn late_record_that_was_deleted_after_its_time_is_not_missed() {
    let mut hand = federation_of(RoundKind::Delta, 0.0);
    let first = hand.open(1);
    hand.send(&first, "a");
    hand.publish(1);
    hand.send_late(&first, "c");
    for round in 2..=3 {
        let announce = hand.open(round);
        hand.send(&announce, "a");
        hand.publish(round);
    }
    let deleted = hand
        .database
        .write(|work| evidence::forget(work, Round(1)))
        .unwrap();
    assert_eq!(deleted, 4, "three of the round and the late one");
    let none = hand.replay(1).unwrap_err();
    assert!(none.is_impossible(), "{none}");
    assert!(hand.replay(2).is_ok() && hand.replay(3).is_ok());
}

/// What another version of rules and measures did may have other bits, and nobody has tampered with it.
#[test]
fn round_of_another_version_of_the_rules_cannot_be_done_again_and_is_not_called_tampered() {
    let mut hand = federation_of(RoundKind::Delta, 0.0);
    let first = hand.open(1);
    hand.send(&first, "a");
    hand.plan.rule_version = RULE_VERSION - 1;
    hand.publish(1);
    let found = hand.replay(1).unwrap_err();
    assert!(
        found.is_impossible() && found.to_string().contains("by version 2 of"),
        "{found}"
    );
}

/// A copy and a row that is near to everybody have no part in the round, and the records say whose noise they share.
#[test]
fn screened_rows_are_on_record_as_screened_and_counted_nowhere() {
    let mut hand = federation_of(RoundKind::Moments, 0.0);
    let first = hand.open(1);
    hand.send(&first, "a");
    hand.send(&first, "b");
    // The same as b's, in the next place by name.
    let copied = hand.values("b", 1);
    hand.send_values(&first, "c", &copied);
    let records = hand.publish(1);
    let copied = record(&records, "c");
    assert_eq!((copied.decision, copied.weight), (Decision::Screened, 0));
    assert_eq!(copied.reason.as_deref(), Some("it shares its noise with b"));
    assert_eq!(
        copied.verdict,
        theriac_aggregator::evidence::law::Verdict::Neutral
    );
    hand.check(&first, &[hand.values("a", 1), hand.values("b", 1)], 1.0);
    assert_eq!(hand.replay(1).unwrap(), 2);
}
