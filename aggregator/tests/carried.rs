//! What is on record of a site that sent nothing in a round and counted by its earlier releases.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a failed helper is a failed test"
)]

mod federation;

use federation::hand::Hand;
use federation::series;
use theriac_aggregator::accumulate::Accumulate;
use theriac_aggregator::config::RoundSettings;
use theriac_aggregator::evidence::law::Verdict;
use theriac_aggregator::evidence::{Decision, Record, words};
use theriac_aggregator::replay::ReplayError;
use theriac_aggregator::robust::RuleName;
use theriac_aggregator::store::{StoreError, Work};
use theriac_audit::tree::leaf_hash;
use theriac_protocol::units::Digest;

/// A federation that adds up releases of moments.
fn federation() -> Hand {
    let rounds = RoundSettings {
        block_rows: 60,
        blocks_min: 3,
        blocks_max: 20,
        ..RoundSettings::default()
    };
    let mut hand = Hand::new(rounds, &["a", "b", "c", "d"], released);
    hand.plan.accumulate = Accumulate {
        keep: 150,
        age_ms: 7 * 86_400_000,
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

fn record<'a>(records: &'a [Record], site: &str, decision: Decision) -> &'a Record {
    let found = records
        .iter()
        .find(|record| record.site == site && record.decision == decision);
    found.unwrap_or_else(|| panic!("{site} is not on record as {decision:?}"))
}

/// Writes the record of a site anew, with every later one, the end of the chain and the leaf that names it: as somebody does who can write all of the store.
fn rewritten(work: &Work<'_>, first: i64, change: &dyn Fn(&mut Record)) -> Result<(), StoreError> {
    let connection = work.connection();
    let head = |of: &str| -> Result<[u8; 32], StoreError> {
        let query = format!("SELECT hash FROM decision WHERE seq = {of}");
        Ok(connection.query_row(&query, [], |row| row.get(0))?)
    };
    let last = "(SELECT max(seq) FROM decision)";
    let before = Digest(head(last)?).to_string();
    let lines: Vec<(i64, String)> = connection
        .prepare("SELECT seq, record FROM decision WHERE seq >= ?1 ORDER BY seq")?
        .query_map([first], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<Result<_, _>>()?;
    let mut previous = Digest(head(&(first - 1).to_string())?);
    for (seq, line) in lines {
        let mut record: Record = serde_json::from_str(&line).unwrap();
        if seq == first {
            change(&mut record);
        }
        record.previous = previous.to_string();
        let line = record.to_line().unwrap();
        previous = Record::hash(&line);
        let put = "UPDATE decision SET record = ?2, hash = ?3 WHERE seq = ?1";
        connection.execute(put, (seq, line, previous.0))?;
    }
    connection.execute(
        "UPDATE meta SET value = ?1 WHERE key = 'decision_head'",
        [previous.0],
    )?;
    let leaf = format!("SELECT idx, line FROM audit_leaf WHERE line LIKE '%{before}%'");
    let (index, line): (i64, String) =
        connection.query_row(&leaf, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let line = line.replace(&before, &previous.to_string());
    let put = "UPDATE audit_leaf SET line = ?2, hash = ?3 WHERE idx = ?1";
    connection.execute(put, (index, &line, leaf_hash(line.as_bytes()).0))?;
    Ok(())
}

#[test]
fn figures_of_a_carried_site_are_on_record_and_a_replay_holds_them_to_what_the_rule_saw() {
    let mut hand = federation();
    hand.plan.rule = RuleName::TRIMMED_MEAN;
    hand.plan.byzantine = 1;
    let first = hand.open(1);
    for site in ["a", "b", "c"] {
        hand.send(&first, site);
    }
    let far: Vec<f32> = hand.values("d", 1).iter().map(|value| 50.0 * value).collect();
    hand.send_values(&first, "d", &far);
    hand.publish(1);
    let kept = "SELECT count(*) FROM kept_release WHERE dropped_round IS NULL";
    let kept: i64 = hand
        .database
        .read()
        .query_row(kept, [], |row| row.get(0))
        .unwrap();
    assert_eq!(kept, 4, "nothing in it is what no honest row can be");
    let records = hand.round(2, &["a", "b", "c"]);
    let carried = record(&records, "d", Decision::Carried);
    let own = record(&records, "a", Decision::Combined);
    let (found, of_own) = (carried.features.as_ref().unwrap(), own.features.as_ref().unwrap());
    let norm = far.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    assert!((found.norm / norm - 1.0).abs() < 1e-6, "{} {norm}", found.norm);
    assert!(
        found.trimmed_share.unwrap() > 0.9 && of_own.trimmed_share.unwrap() < 0.9,
        "{found:?}\n{of_own:?}"
    );
    assert!(found.distance > 10.0 * of_own.distance && found.layers[0].ratio > 10.0);
    assert_eq!((found.nearest, found.neighbours_median), (None, None));
    // Beside those of updates, among which it is not.
    assert_eq!(carried.quantiles, own.quantiles);
    assert!(carried.quantiles["norm"][4] < found.norm);
    assert_eq!(
        (carried.verdict, carried.before),
        (Verdict::Neutral, carried.after)
    );
    let said = words::figures(carried);
    assert!(
        said[0].contains("the mean of 1 release of 3 to 20 blocks"),
        "{said:?}"
    );
    let beside = |record: &Record| {
        words::figures(record)
            .iter()
            .any(|line| line.contains("(round: "))
    };
    assert!(
        beside(own) && !beside(carried),
        "a mean is not read against the figures of updates"
    );
    let mut outvoted = carried.clone();
    if let Some(features) = &mut outvoted.features {
        features.trimmed_share = Some(1.0);
    }
    let said = words::decision(&outvoted);
    assert!(said.contains("outvoted"), "{said}");
    assert!(hand.replay(1).is_ok() && hand.replay(2).is_ok());
    let seq = "SELECT seq FROM decision WHERE round = 2 AND decision = 'carried'";
    let seq: i64 = hand.database.read().query_row(seq, [], |row| row.get(0)).unwrap();
    let nearer = |record: &mut Record| {
        if let Some(features) = &mut record.features {
            features.distance /= 2.0;
        }
    };
    hand.database.write(|work| rewritten(work, seq, &nearer)).unwrap();
    let found = hand.replay(2);
    assert!(
        matches!(&found, Err(ReplayError::Record { site, what: "figure" }) if site == "d"),
        "{found:?}"
    );
}
