//! Releases of moments over rounds: what the model is made of, that nothing is added twice or after it fell out of favour, and that the past can be done again.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a failed helper is a failed test"
)]

mod federation;

use std::collections::BTreeMap;

use federation::hand::Hand;
use federation::{node, series};
use theriac_aggregator::accumulate::{Accumulate, Behind, Depth, mean_of};
use theriac_aggregator::combine::{RoundInputs, RoundResult, RowSource, Which};
use theriac_aggregator::config::RoundSettings;
use theriac_aggregator::evidence::law::{Finding, Verdict};
use theriac_aggregator::evidence::reputation::Reputation;
use theriac_aggregator::evidence::{Decision, Record, words};
use theriac_aggregator::publish::next_model_of;
use theriac_aggregator::robust::{Options, Row, RuleName, rule};
use theriac_aggregator::server_optimizer::ServerOptimizer;
use theriac_aggregator::store::evidence::{self, RoundPlan};
use theriac_aggregator::store::models;
use theriac_aggregator::store::rounds;
use theriac_aggregator::store::{StoreError, records, sums};
use theriac_aggregator::validation::{Answer, Missing, Opinion, Tried, Validation};
use theriac_audit::leaf::SiteStanding;
use theriac_model::moments::MOMENTS_PER_CHANNEL;
use theriac_protocol::compress::encode_f32;
use theriac_protocol::message::{AnnounceV1, Encoding};
use theriac_protocol::refusal::{AbortReason, RefusalCode};
use theriac_protocol::units::{L2Norm, ModelVersion, NoiseMultiplier, Round, Timestamp};

/// A week of time that no round of a test takes.
const WEEK_MS: u64 = 7 * 86_400_000;
const SITES: [&str; 4] = ["a", "b", "c", "d"];

/// A federation that adds up to `keep` releases of a site.
fn federation_of(keep: u32) -> Hand {
    let rounds = RoundSettings {
        block_rows: 60,
        blocks_min: 3,
        blocks_max: 20,
        ..RoundSettings::default()
    };
    let mut hand = Hand::new(rounds, &SITES, released);
    assert_eq!(hand.config.rounds.accumulate.keep, 150, "on by default");
    hand.plan.accumulate = Accumulate {
        keep,
        age_ms: WEEK_MS,
    };
    hand
}

fn released(hand: &Hand, site: &str, round: u64) -> Vec<f32> {
    let channels = hand.config.model.channels().unwrap();
    let clip = hand.clip.value() as f32;
    let noise = hand.config.rounds.noise_multiplier.value() as f32 * clip;
    let seed = u32::from(site.as_bytes()[0]) * 1_000 + round as u32;
    series::release(channels, clip, noise, seed)
}

impl Hand {
    /// The model in force is what the mean rule makes of these sites, each the mean of its releases for these rounds, newest first.
    fn check(&self, round: u64, sites: &[(&str, &[u64])]) {
        let read = self.database.read();
        let announce = theriac_aggregator::store::history::announced(read, Round(round)).unwrap();
        let base = models::model_payload(read, self.database.blobs(), announce.base_version).unwrap();
        let dimension = usize::try_from(announce.values).unwrap();
        let (mut rows, mut depths) = (Vec::new(), Vec::new());
        for (site, of) in sites {
            let releases: Vec<Row> = of
                .iter()
                .map(|round| Row {
                    encoding: Encoding::F32,
                    payload: encode_f32(&self.values(site, *round)).into(),
                })
                .collect();
            let (mean, ratio) = mean_of(dimension, &releases);
            assert!((ratio - 1.0 / (of.len() as f64).sqrt()).abs() < 1e-12);
            rows.push(mean);
            depths.push((ratio, of.len() as u64));
        }
        let rule = rule(RuleName::MEAN, 0, &Options::default()).unwrap();
        let server = (&ServerOptimizer::default(), None);
        let depth = Depth::of(depths);
        let expected = next_model_of(
            &self.config.model,
            &self.terms(),
            &base,
            rows,
            &*rule,
            server,
            depth,
        )
        .unwrap();
        let found = models::current_model(read).unwrap();
        assert_eq!(found.digest, expected.digest, "round {round}: {sites:?}");
    }

    fn kept(&self) -> i64 {
        let count = "SELECT count(*) FROM kept_release WHERE dropped_round IS NULL";
        self.database
            .read()
            .query_row(count, [], |row| row.get(0))
            .unwrap()
    }

    fn all_are_the_same_again(&self, last: u64) {
        for round in 1..=last {
            let again = self.replay(round);
            assert!(again.is_ok(), "round {round}: {again:?}");
        }
    }
}

fn record<'a>(records: &'a [Record], site: &str, decision: Decision) -> &'a Record {
    let found = records
        .iter()
        .find(|record| record.site == site && record.decision == decision);
    found.unwrap_or_else(|| panic!("{site} is not on record as {decision:?}"))
}

fn releases(record: &Record) -> u64 {
    record.behind.map_or(0, |behind| behind.releases)
}

#[test]
fn every_release_is_added_once_and_the_same_bits_come_again() {
    let mut hand = federation_of(150);
    for round in 1..=4 {
        let records = hand.round(round, &["a", "b", "c"]);
        let rounds: Vec<u64> = (1..=round).rev().collect();
        hand.check(round, &[("a", &rounds), ("b", &rounds), ("c", &rounds)]);
        let behind = record(&records, "b", Decision::Combined).behind.unwrap();
        let expected = Behind {
            releases: round,
            blocks_min: 3 * round,
            blocks_max: 20 * round,
        };
        assert_eq!(behind, expected);
        assert_eq!(hand.kept(), 3 * i64::try_from(round).unwrap());
    }
    let records = evidence::of_round(hand.database.read(), Round(4)).unwrap();
    let said = words::all_behind(&records).unwrap();
    assert_eq!(said, "12 releases of 36 to 240 blocks in all from 3 sites");
    hand.all_are_the_same_again(4);
    // The round is over: doing it once more adds nothing, and neither do the same bytes under another round.
    assert!(matches!(hand.written(4, false), Err(StoreError::Conflict(_))));
    assert_eq!(hand.kept(), 12);
    let fifth = hand.open(5);
    let again = hand.values("a", 4);
    hand.send_values(&fifth, "a", &again);
    hand.publish(5);
    assert_eq!(hand.kept(), 12, "a copy of an earlier release was added");
    hand.check(
        5,
        &[("a", &[4, 3, 2, 1]), ("b", &[4, 3, 2, 1]), ("c", &[4, 3, 2, 1])],
    );
    hand.all_are_the_same_again(5);
}

#[test]
fn a_crash_between_model_and_records_leaves_both_or_neither() {
    let mut hand = federation_of(150);
    hand.round(1, &["a", "b", "c"]);
    let second = hand.open(2);
    hand.send(&second, "a");
    let (before, _) = hand.computed(2);
    assert!(hand.written(2, true).is_err());
    let found = models::current_model(hand.database.read()).unwrap();
    assert_eq!((found.version, hand.kept()), (ModelVersion(1), 3));
    hand.written(2, false).unwrap();
    let found = models::current_model(hand.database.read()).unwrap();
    assert_eq!(
        (found.digest, hand.kept()),
        (before.digest, 4),
        "the same model again"
    );
}

#[test]
fn a_site_that_sends_nothing_counts_by_what_it_has_released_and_no_more_once_it_is_kept_out() {
    let mut hand = federation_of(150);
    hand.round(1, &["a", "b", "c"]);
    let records = hand.round(2, &["a"]);
    hand.check(2, &[("a", &[2, 1]), ("b", &[1]), ("c", &[1])]);
    let carried = record(&records, "b", Decision::Carried);
    assert_eq!((carried.weight, releases(carried)), (1, 1));
    assert!(
        words::decision(carried).contains("1 release of 3 to 20 blocks"),
        "{}",
        words::decision(carried)
    );
    record(&records, "b", Decision::Silent);
    assert!(
        !records
            .iter()
            .any(|record| record.site == "d" && record.decision == Decision::Carried)
    );
    // Suspended: not while it is. Refused in this round for what it sent: not in this round.
    hand.database
        .write(|work| records::set_standing(work, &node("b"), SiteStanding::Suspended, ""))
        .unwrap();
    let third = hand.open(3);
    hand.send(&third, "a");
    let header = hand.header(&third, b"x");
    hand.database
        .write(|work| {
            let code = RefusalCode::NonFinite;
            rounds::refuse_upload(work, &node("c"), &header, code, RuleName::MEAN, None)
        })
        .unwrap();
    hand.publish(3);
    hand.check(3, &[("a", &[3, 2, 1])]);
    hand.database
        .write(|work| records::set_standing(work, &node("b"), SiteStanding::Active, ""))
        .unwrap();
    hand.round(4, &["a"]);
    hand.check(4, &[("a", &[4, 3, 2, 1]), ("b", &[1]), ("c", &[1])]);
    hand.all_are_the_same_again(4);
}

#[test]
fn the_window_forgets_the_oldest_release_and_what_is_too_old() {
    let mut hand = federation_of(3);
    for round in 1..=5 {
        hand.round(round, &["a", "b"]);
    }
    hand.check(5, &[("a", &[5, 4, 3]), ("b", &[5, 4, 3])]);
    hand.round(6, &["a"]);
    hand.check(6, &[("a", &[6, 5, 4]), ("b", &[5, 4, 3])]);
    // Round 5 took place more than a week before round 7, as far as the store knows.
    let older = i64::try_from(WEEK_MS).unwrap() + 60_000;
    hand.database
        .write(|work| {
            let connection = work.connection();
            let age = "UPDATE kept_release SET opened_unix_ms = opened_unix_ms - ?1 WHERE into_round <= 5";
            Ok(connection.execute(age, [older])?)
        })
        .unwrap();
    hand.round(7, &["b"]);
    hand.check(7, &[("a", &[6]), ("b", &[7])]);
    assert!(hand.replay(7).is_ok());
}

#[test]
fn other_terms_begin_other_sums_and_the_former_come_back_with_theirs() {
    let mut hand = federation_of(150);
    hand.round(1, &["a", "b"]);
    let clip = hand.clip;
    hand.clip = L2Norm::new(120.0).unwrap();
    let records = hand.round(2, &["a"]);
    hand.check(2, &[("a", &[2])]);
    assert!(!records.iter().any(|record| record.decision == Decision::Carried));
    hand.clip = clip;
    let records = hand.round(3, &["a"]);
    assert_eq!(releases(record(&records, "a", Decision::Combined)), 2);
    assert_eq!(releases(record(&records, "b", Decision::Carried)), 1);
    hand.all_are_the_same_again(3);
}

#[test]
fn what_a_screen_or_the_quarantine_leaves_out_is_in_no_later_sum_either() {
    let mut hand = federation_of(150);
    let first = hand.open(1);
    hand.send(&first, "a");
    hand.send(&first, "b");
    // The same as b's, in the next place by name.
    let copied = hand.values("b", 1);
    hand.send_values(&first, "c", &copied);
    let records = hand.publish(1);
    record(&records, "c", Decision::Screened);
    assert_eq!(hand.kept(), 2);
    hand.round(2, &["a", "b", "c", "d"]);
    assert_eq!(hand.kept(), 6);
    hand.check(2, &[("a", &[2, 1]), ("b", &[2, 1]), ("c", &[2]), ("d", &[2])]);
    // d enters quarantine: what it sent before counts no more, neither now nor when it is back.
    hand.plan.byzantine = 1;
    let inside = Reputation {
        // Millionths of a round.
        inconsistent: 1_000_000_000,
        quarantined_since: Some(2),
        ..Reputation::default()
    };
    let text = serde_json::to_string(&inside).unwrap();
    hand.database
        .write(|work| {
            let put = "INSERT OR REPLACE INTO reputation (node, reputation) VALUES ('d', ?1)";
            Ok(work.connection().execute(put, [text])?)
        })
        .unwrap();
    let records = hand.round(3, &["a", "b", "c", "d"]);
    record(&records, "d", Decision::Quarantined);
    hand.check(3, &[("a", &[3, 2, 1]), ("b", &[3, 2, 1]), ("c", &[3, 2])]);
    let why = "SELECT dropped_for, dropped_round FROM kept_release WHERE node = 'd'";
    let why: (String, i64) = hand
        .database
        .read()
        .query_row(why, [], |row| Ok((row.get(0)?, row.get(1)?)))
        .unwrap();
    assert_eq!(why, ("quarantine".to_owned(), 4));
    // What d had earned before round 3 was put there by hand.
    hand.all_are_the_same_again(2);
}

#[test]
fn a_roll_back_a_new_key_a_revocation_and_an_operator_take_releases_out_and_the_past_stays_what_it_was() {
    let mut hand = federation_of(150);
    for round in 1..=3 {
        hand.round(round, &SITES);
    }
    let blobs = std::sync::Arc::clone(hand.database.blobs());
    hand.database
        .write(|work| models::roll_back(work, &blobs, ModelVersion(2)))
        .unwrap();
    // What round 3 took in was in the model that was taken back.
    assert_eq!(hand.kept(), 8);
    let dropped = hand
        .database
        .write(|work| {
            let end = Timestamp(u64::MAX / 4);
            records::enrol(work, &node("b"), [7; 32], [7; 32], end, false)?;
            records::set_standing(work, &node("c"), SiteStanding::Revoked, "")?;
            sums::forget_site(work, &node("d"), "fed with test data")
        })
        .unwrap();
    assert_eq!((dropped, hand.kept()), (2, 2));
    let nobody = hand
        .database
        .write(|work| sums::forget_site(work, &node("z"), ""));
    assert!(matches!(nobody, Err(StoreError::NotFound { .. })), "{nobody:?}");
    let records = hand.round(4, &["a", "b", "d"]);
    hand.check(4, &[("a", &[4, 2, 1]), ("b", &[4]), ("d", &[4])]);
    assert!(!records.iter().any(|record| record.decision == Decision::Carried));
    hand.all_are_the_same_again(4);
    let standing = sums::standing(hand.database.read(), hand.plan.accumulate).unwrap();
    assert_eq!(standing[&node("a")].behind.releases, 3);
    assert_eq!(standing[&node("d")].since, 4);
    assert!(!standing.contains_key(&node("c")));
}

#[test]
fn payloads_stay_while_they_count_and_then_a_replay_says_that_it_cannot() {
    let mut hand = federation_of(3);
    for round in 1..=6 {
        hand.round(round, &["a", "b"]);
    }
    let forget = |hand: &mut Hand, last: u64, announce: &AnnounceV1| {
        let window = hand.plan.accumulate;
        hand.database
            .write(|work| {
                sums::prune(work, Round(last), announce, window)?;
                rounds::forget_payloads(work, Round(last))
            })
            .unwrap();
    };
    let last = theriac_aggregator::store::history::announced(hand.database.read(), Round(6)).unwrap();
    forget(&mut hand, 4, &last);
    // Round 5 needs 3, 4 and 5; the payloads of 1 are gone, and so is what round 4 needs.
    assert!(hand.replay(5).is_ok() && hand.replay(6).is_ok());
    let gone = hand.replay(3).unwrap_err();
    assert!(gone.is_impossible(), "{gone}");
    let rows: i64 = hand
        .database
        .read()
        .query_row(
            "SELECT count(*) FROM upload WHERE place <> 'gone' AND round <= 4",
            [],
            |row| row.get(0),
        )
        .unwrap();
    assert_eq!(rows, 6, "rounds 2, 3 and 4 of two sites");
    hand.round(7, &["a", "b"]);
    hand.check(7, &[("a", &[7, 6, 5]), ("b", &[7, 6, 5])]);
}

#[test]
fn a_late_release_is_added_under_the_round_that_took_it_in() {
    let mut hand = federation_of(150);
    let first = hand.open(1);
    hand.send(&first, "a");
    hand.publish(1);
    hand.send_late(&first, "b");
    hand.round(2, &["a"]);
    hand.check(2, &[("a", &[2, 1]), ("b", &[1])]);
    hand.round(3, &["a", "b"]);
    hand.check(3, &[("a", &[3, 2, 1]), ("b", &[3, 1])]);
    hand.all_are_the_same_again(3);
}

/// Smaller targets that hide in the noise of one release show in the mean of a dozen.
#[test]
fn poison_that_one_release_hides_is_found_in_their_mean_and_added_no_more() {
    let mut hand = federation_of(150);
    let poisoned = |hand: &Hand, round: u64| {
        let mut values = hand.values("c", round);
        for channel in values.chunks_exact_mut(MOMENTS_PER_CHANNEL) {
            channel[15..20].iter_mut().for_each(|value| *value *= 0.4);
        }
        values
    };
    let mut found = None;
    for round in 1..=40 {
        let announce = hand.open(round);
        hand.send(&announce, "a");
        hand.send(&announce, "b");
        let values = poisoned(&hand, round);
        let norm = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let alone = theriac_aggregator::vet::look(
            Encoding::F32,
            &encode_f32(&values),
            norm,
            &announce,
            theriac_aggregator::vet::Screens::ALL,
        );
        assert_eq!(alone, Ok(()), "round {round}: one release hides it");
        hand.send_values(&announce, "c", &values);
        let records = hand.publish(round);
        if let Some(record) = records
            .iter()
            .find(|record| record.decision == Decision::Screened)
        {
            assert_eq!(record.site, "c");
            found = record.reason.clone().map(|reason| (round, reason));
            break;
        }
    }
    let (round, reason) = found.expect("the vet never saw it");
    println!("found in round {round}: {reason}");
    assert!(
        reason.contains("releases together are no moments of a series"),
        "{reason}"
    );
    let others = 2 * i64::try_from(round).unwrap();
    assert_eq!(hand.kept(), others, "what was in that mean is dropped");
    assert!(hand.replay(round).is_ok());
    let found = evidence::of_round(hand.database.read(), Round(round)).unwrap();
    let found = record(&found, "c", Decision::Screened);
    assert_eq!((found.verdict, found.before), (Verdict::Neutral, found.after));
    assert!(matches!(found.findings[..], [Finding::NoSeries { .. }]));
    // It cannot go silent and count by what it was found with.
    let records = hand.round(round + 1, &["a", "b"]);
    assert!(!records.iter().any(|record| record.decision == Decision::Carried));
    let rounds: Vec<u64> = (1..=round + 1).rev().collect();
    hand.check(round + 1, &[("a", &rounds), ("b", &rounds)]);
    let records = hand.round(round + 2, &["a", "c"]);
    assert_eq!(
        releases(record(&records, "c", Decision::Combined)),
        1,
        "it begins anew"
    );
    assert!(hand.replay(round + 2).is_ok());
}

#[test]
fn poison_that_shows_only_once_its_site_is_silent_does_not_count_either() {
    let mut hand = federation_of(2);
    let last = 40;
    for round in 1..=last {
        let announce = hand.open(round);
        hand.send(&announce, "a");
        hand.send(&announce, "b");
        let mut values = hand.values("c", round);
        for channel in values.chunks_exact_mut(MOMENTS_PER_CHANNEL) {
            channel[15..20].iter_mut().for_each(|value| *value *= 0.4);
        }
        hand.send_values(&announce, "c", &values);
        let records = hand.publish(round);
        record(&records, "c", Decision::Combined);
    }
    // Two together hid it; forty, which a wider window takes in, do not.
    hand.plan.accumulate.keep = 150;
    let records = hand.round(last + 1, &["a"]);
    let found = record(&records, "c", Decision::Carried);
    assert_eq!((found.weight, releases(found)), (0, last));
    assert!(
        words::decision(found).contains("count no more"),
        "{}",
        words::decision(found)
    );
    let (all, earlier): (Vec<u64>, Vec<u64>) = ((1..=last + 1).rev().collect(), (1..=last).rev().collect());
    hand.check(last + 1, &[("a", &all), ("b", &earlier)]);
    assert!(words::all_behind(&records).unwrap().contains("from 2 sites"));
    assert!(hand.replay(last + 1).is_ok());
    let records = hand.round(last + 2, &["a"]);
    assert!(
        !records
            .iter()
            .any(|record| record.site == "c" && record.decision == Decision::Carried)
    );
}

#[test]
fn what_no_honest_row_can_be_counts_in_no_later_round() {
    let mut hand = federation_of(150);
    let first = hand.open(1);
    hand.send(&first, "a");
    hand.send(&first, "b");
    // It claims three times the noise that it carries.
    let payload = encode_f32(&hand.values("c", 1));
    let mut header = hand.header(&first, &payload);
    let claimed = 3.0 * first.noise_multiplier.value();
    header.privacy.noise_multiplier = NoiseMultiplier::new(claimed).unwrap();
    hand.insert("c", &header, &payload);
    let records = hand.publish(1);
    assert_eq!(
        record(&records, "c", Decision::Combined).verdict,
        Verdict::Inconsistent
    );
    assert_eq!(hand.kept(), 2);
    let records = hand.round(2, &["a"]);
    record(&records, "b", Decision::Carried);
    assert!(
        !records
            .iter()
            .any(|record| record.site == "c" && record.decision == Decision::Carried)
    );
    hand.check(2, &[("a", &[2, 1]), ("b", &[1])]);
    hand.all_are_the_same_again(2);
}

#[test]
fn sites_that_are_carried_leave_room_for_the_quarantine() {
    let mut hand = federation_of(150);
    hand.round(1, &SITES);
    hand.plan.byzantine = 1;
    let inside = Reputation {
        inconsistent: 1_000_000_000,
        quarantined_since: Some(1),
        ..Reputation::default()
    };
    let text = serde_json::to_string(&inside).unwrap();
    hand.database
        .write(|work| {
            let put = "INSERT OR REPLACE INTO reputation (node, reputation) VALUES ('d', ?1)";
            Ok(work.connection().execute(put, [text])?)
        })
        .unwrap();
    // Of two rows that are sent none could be spared; with b and c four are there.
    let records = hand.round(2, &["a", "d"]);
    record(&records, "d", Decision::Quarantined);
    hand.check(2, &[("a", &[2, 1]), ("b", &[1]), ("c", &[1])]);
}

#[test]
fn what_is_dropped_while_a_round_is_open_is_not_kept_from_that_round_either() {
    let mut hand = federation_of(150);
    hand.round(1, &SITES);
    let second = hand.open(2);
    for site in ["a", "b", "d"] {
        hand.send(&second, site);
    }
    hand.database
        .write(|work| {
            let end = Timestamp(u64::MAX / 4);
            records::enrol(work, &node("b"), [7; 32], [7; 32], end, false)?;
            sums::forget_site(work, &node("c"), "fed with test data")?;
            sums::forget_site(work, &node("d"), "fed with test data")
        })
        .unwrap();
    hand.publish(2);
    hand.send_late(&second, "c");
    let records = hand.round(3, &["a"]);
    hand.check(3, &[("a", &[3, 2, 1])]);
    assert!(!records.iter().any(|record| record.decision == Decision::Carried));
    let records = hand.round(4, &SITES);
    assert_eq!(releases(record(&records, "d", Decision::Combined)), 1);
    hand.round(5, &["d"]);
    hand.check(
        5,
        &[("a", &[4, 3, 2, 1]), ("b", &[4]), ("c", &[4]), ("d", &[5, 4])],
    );
    hand.all_are_the_same_again(5);
}

#[test]
fn no_more_sites_are_carried_than_the_rule_has_places_and_in_time_each_has_its_turn() {
    let mut hand = federation_of(150);
    hand.round(1, &["a", "b"]);
    let many = 2_200;
    hand.database
        .write(|work| {
            let n = format!("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {many})");
            work.connection().execute_batch(&format!(
                "INSERT INTO site (node, state, key_fingerprint, enrolled_unix_ms, ledger_head, ledger_records)
                     {n} SELECT 's' || i, 'active', randomblob(32), 0, zeroblob(32), 0 FROM n;
                 INSERT INTO upload (round, node, payload_digest, bytes, scale, header, ledger_head, leaf_index, stored_unix_ms, norm, place, payload)
                     {n} SELECT round, 's' || i, payload_digest, bytes, scale, header, ledger_head, leaf_index, stored_unix_ms, norm, place, payload
                     FROM n, upload WHERE node = 'a';
                 INSERT INTO kept_release (node, round, late, into_round, terms_digest, payload_digest, blocks_min, blocks_max, opened_unix_ms)
                     {n} SELECT 's' || i, round, late, into_round, terms_digest, payload_digest, blocks_min, blocks_max, opened_unix_ms
                     FROM n, kept_release WHERE node = 'a';"
            ))?;
            Ok(())
        })
        .unwrap();
    let plan = RoundPlan {
        rule: RuleName::CAF,
        ..hand.plan.clone()
    };
    let mut carried = Vec::new();
    for round in 2..=3 {
        let announce = hand.open(round);
        hand.send(&announce, "a");
        let source = RowSource {
            connection: hand.database.read(),
            blobs: hand.database.blobs(),
            memory: &hand.memory,
        };
        let none = &mut BTreeMap::new();
        let inputs = RoundInputs::load(
            source,
            Round(round),
            plan.clone(),
            &BTreeMap::new(),
            none,
            Which::Waiting,
        )
        .unwrap();
        let rows = inputs.stored.len() + inputs.carried.len();
        assert_eq!(rows, plan.rule.rows_max());
        rule(plan.rule, 0, &Options::default())
            .unwrap()
            .check(rows)
            .unwrap();
        carried.push(inputs.carried.into_iter().map(|row| row.node).collect::<Vec<_>>());
        hand.database
            .write(|work| rounds::abort(work, Round(round), AbortReason::AggregationFailed))
            .unwrap();
    }
    assert!(carried[0].is_sorted(), "by name");
    assert_ne!(carried[0], carried[1], "another draw each round");
}

#[test]
fn a_round_that_validators_turned_down_is_done_again_whatever_became_of_who_was_carried() {
    let mut hand = federation_of(150);
    hand.round(1, &["a", "b", "c"]);
    let second = hand.open(2);
    hand.send(&second, "a");
    let (row, RoundResult { account, .. }) = hand.computed(2);
    let own = account.rows.iter().map(|row| (&row.node, false, row.behind));
    let carried = account
        .carried
        .iter()
        .map(|row| (&row.node, true, Some(row.behind)));
    let tried = own.chain(carried).filter_map(|(site, carried, behind)| {
        Some(Tried {
            site: site.clone(),
            carried,
            behind: behind?,
        })
    });
    let validation = Validation {
        round: 2,
        candidate: row.digest.to_string(),
        base_version: 1,
        missing: Missing::Hold,
        timeout_ms: 1,
        answers: vec![Answer {
            site: node("v"),
            opinion: Opinion::Worse,
            ratio_permille: 1_500,
        }],
        decision: theriac_aggregator::validation::Decision::Worse,
        rows: vec![node("a")],
        behind: tried.collect(),
    };
    assert_eq!(validation.behind.len(), 3);
    let plan = hand.plan.clone();
    hand.database
        .write(|work| {
            let word = validation.decision.abort_word();
            rounds::abort_as(work, Round(2), AbortReason::AggregationFailed, word)?;
            theriac_aggregator::store::validation::record(work, &validation, &plan)
        })
        .unwrap();
    assert_eq!(hand.replay(2).unwrap(), 1);
    // As an operator is told to do until a round passes.
    hand.database
        .write(|work| records::set_standing(work, &node("b"), SiteStanding::Suspended, ""))
        .unwrap();
    assert_eq!(hand.replay(2).unwrap(), 1);
    // And what is deleted is no sign of tampering.
    hand.database
        .write(|work| {
            let delete = "DELETE FROM kept_release WHERE node = 'c'";
            Ok(work.connection().execute(delete, [])?)
        })
        .unwrap();
    let gone = hand.replay(2).unwrap_err();
    assert!(gone.is_impossible(), "{gone}");
}

#[test]
fn a_round_of_a_store_from_before_there_were_records_cannot_be_done_again_and_is_not_called_tampered() {
    let mut hand = federation_of(150);
    let first = hand.open(1);
    hand.send(&first, "a");
    let (row, RoundResult { candidate, .. }) = hand.computed(1);
    hand.database
        .blobs()
        .put(&candidate.digest, &candidate.payload)
        .unwrap();
    hand.database
        .write(|work| rounds::publish(work, &row, &candidate.payload, &[], &candidate.evidence))
        .unwrap();
    let none = hand.replay(1).unwrap_err();
    assert!(none.is_impossible(), "{none}");
}
