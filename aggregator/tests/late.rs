//! Late updates in the next round and means of a site's updates: what the model is made of, what the records say, and that the past can be done again.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a failed helper is a failed test"
)]

use std::collections::BTreeMap;

use theriac_aggregator::accumulate::Depth;
use theriac_aggregator::average::SiteAverage;
use theriac_aggregator::combine::{RoundInputs, RoundResult, Which};
use theriac_aggregator::config::{CheckedConfig, ModelSettings, RoundKind, RoundSettings, Settings};
use theriac_aggregator::data_dir::DataDir;
use theriac_aggregator::evidence::{Decision, RULE_VERSION, Record};
use theriac_aggregator::publish::next_model_of;
use theriac_aggregator::replay::{ReplayError, replay};
use theriac_aggregator::robust::{Options, Row, RuleName, rule};
use theriac_aggregator::server_optimizer::ServerOptimizer;
use theriac_aggregator::store::evidence::{self, ChainError, Conclusion, RoundPlan};
use theriac_aggregator::store::models::{self, ModelRow};
use theriac_aggregator::store::records;
use theriac_aggregator::store::rounds::{self, RoundRule};
use theriac_aggregator::store::{Database, StoreError, late, wall_clock};
use theriac_aggregator::{InitOptions, enrol_directly, init};
use theriac_audit::checkpoint::LogKey;
use theriac_audit::leaf::SiteStanding;
use theriac_protocol::compress::encode_f32;
use theriac_protocol::message::{AnnounceV1, Encoding, PrivacyClaimV1, UpdateV1};
use theriac_protocol::refusal::{AbortReason, RefusalCode};
use theriac_protocol::round::RoundTerms;
use theriac_protocol::units::{Delta, Digest, Epsilon, ModelVersion, NodeId, Round};

const KINDS: [RoundKind; 3] = [RoundKind::Moments, RoundKind::Gradient, RoundKind::Delta];

/// A federation whose rounds are driven by hand.
struct Hand {
    _temporary: tempfile::TempDir,
    config: CheckedConfig,
    database: Database,
    plan: RoundPlan,
    ledger: u64,
}

fn node(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

impl Hand {
    fn new(kind: RoundKind, average: f64) -> Self {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path().join("data");
        let settings = Settings {
            federation: "demo".into(),
            rounds: RoundSettings {
                kind,
                rule: RuleName::MEAN,
                byzantine: 0,
                quorum: 1,
                ..RoundSettings::default()
            },
            model: ModelSettings::default(),
            ..Settings::default()
        };
        let made = init(InitOptions {
            settings,
            ..InitOptions::new(&dir, "demo")
        })
        .unwrap();
        enrol_directly(&dir, &["a", "b", "c"].map(node)).unwrap();
        let config = made.checked;
        Self {
            _temporary: temporary,
            database: Database::open(&DataDir::new(&dir)).unwrap(),
            plan: RoundPlan {
                rule: RuleName::MEAN,
                byzantine: 0,
                quarantine: config.quarantine,
                optimizer: ServerOptimizer::default(),
                rule_version: RULE_VERSION,
                central_noise: false,
                late_updates: true,
                site_average: SiteAverage::new(average).unwrap(),
                accumulate: theriac_aggregator::accumulate::Accumulate::OFF,
            },
            config,
            ledger: 0,
        }
    }

    fn terms(&self) -> RoundTerms {
        let rounds = &self.config.rounds;
        let layout = self.config.model.update(rounds.kind).unwrap();
        RoundTerms {
            kind: rounds.kind,
            values: layout.values,
            layout_digest: layout.digest,
            clip_norm: rounds.clip_norm,
            noise_multiplier: rounds.noise_multiplier,
            block_rows: rounds.block_rows,
            blocks_min: rounds.blocks_min,
            blocks_max: rounds.blocks_max,
        }
    }

    fn open(&mut self, round: u64) -> AnnounceV1 {
        let base = models::current_model(self.database.read()).unwrap();
        let terms = self.terms();
        let announce = AnnounceV1 {
            round: Round(round),
            nonce: round,
            kind: terms.kind,
            values: terms.values,
            layout_digest: terms.layout_digest,
            base_version: base.version,
            base_digest: base.digest,
            clip_norm: terms.clip_norm,
            noise_multiplier: terms.noise_multiplier,
            block_rows: terms.block_rows,
            blocks_min: terms.blocks_min,
            blocks_max: terms.blocks_max,
            deadline_ms: 60_000,
        };
        let rule = RoundRule {
            rule: RuleName::MEAN,
            byzantine: 0,
            quorum: 1,
        };
        let cohort = ["a", "b", "c"].map(node);
        self.database
            .write(|work| rounds::open(work, &announce, &cohort, rule))
            .unwrap();
        announce
    }

    /// Values of a site in a round, all different and further from one another than noise is, so that no screen takes them for copies.
    fn values(&self, site: &str, round: u64) -> Vec<f32> {
        let scale = 40.0 * self.terms().clip_norm.value() as f32;
        let seed = u64::from(site.as_bytes()[0]) * 31 + round * 17;
        (0..u64::from(self.terms().values))
            .map(|index| scale * (((index * 7 + seed) * 2_654_435_761 % 1_000) as f32 / 500.0 - 1.0))
            .collect()
    }

    fn header(&mut self, announce: &AnnounceV1, payload: &[u8]) -> UpdateV1 {
        self.ledger += 1;
        UpdateV1 {
            round: announce.round,
            nonce: announce.nonce,
            kind: announce.kind,
            base_digest: announce.base_digest,
            layout_digest: announce.layout_digest,
            values: announce.values,
            encoding: Encoding::F32,
            payload_digest: Digest::of(payload),
            blocks_bound: announce.blocks_max,
            privacy: PrivacyClaimV1 {
                clip_norm: announce.clip_norm,
                noise_multiplier: announce.noise_multiplier,
                epsilon_spent: Epsilon::new(1.0).unwrap(),
                delta: Delta::new(1e-6).unwrap(),
                ledger_head: Digest::of(&self.ledger.to_le_bytes()),
                ledger_records: self.ledger,
            },
        }
    }

    fn send(&mut self, announce: &AnnounceV1, site: &str) {
        let payload = encode_f32(&self.values(site, announce.round.0));
        let header = self.header(announce, &payload);
        self.database
            .blobs()
            .put(&header.payload_digest, &payload)
            .unwrap();
        self.database
            .write(|work| rounds::insert_upload(work, &node(site), &header, &payload, 1.0, RuleName::MEAN))
            .unwrap();
    }

    fn send_late(&mut self, announce: &AnnounceV1, site: &str) -> UpdateV1 {
        let payload = encode_f32(&self.values(site, announce.round.0));
        let header = self.header(announce, &payload);
        self.database
            .blobs()
            .put(&header.payload_digest, &payload)
            .unwrap();
        let insert = |database: &mut Database| {
            database.write(|work| late::insert(work, &node(site), &header, &payload, 1.0, RuleName::MEAN))
        };
        let stored = insert(&mut self.database).unwrap();
        assert_eq!(insert(&mut self.database).unwrap(), stored, "the same again");
        let found = rounds::stored_upload(self.database.read(), announce.round, &node(site)).unwrap();
        assert_eq!(found, Some(stored), "its receipt can be given again");
        header
    }

    /// Combines and publishes as the driver does; the records of the round.
    fn publish(&mut self, round: u64) -> Vec<Record> {
        let read = self.database.read();
        let earned = evidence::reputations(read).unwrap();
        let (plan, none) = (self.plan.clone(), &mut BTreeMap::new());
        let inputs = RoundInputs::load(
            read,
            self.database.blobs(),
            Round(round),
            plan.clone(),
            &earned,
            none,
            Which::Waiting,
        )
        .unwrap();
        let base = inputs.announce.base_version;
        let RoundResult { candidate, account } = inputs.run(&self.config.model, None).unwrap();
        let row = ModelRow {
            version: base.next(),
            round: Round(round),
            layout_digest: candidate.layout_digest,
            values: candidate.values,
            digest: candidate.digest,
            rule: plan.rule.to_string(),
            contributors: 3,
            rolled_back_to: None,
            released: wall_clock(),
        };
        let blobs = self.database.blobs();
        blobs.put(&candidate.digest, &candidate.payload).unwrap();
        let counted = account
            .rows
            .iter()
            .filter(|row| row.decision == Decision::Combined);
        let members: Vec<(NodeId, Digest)> = counted
            .map(|row| (row.node.clone(), row.payload_digest))
            .collect();
        let conclusion = Conclusion {
            plan,
            account,
            memory: None,
        };
        self.database
            .write(|work| {
                rounds::publish(work, &row, &candidate.payload, &members, &candidate.evidence)?;
                evidence::conclude_round(work, Round(round), conclusion.clone())
            })
            .unwrap();
        evidence::of_round(self.database.read(), Round(round)).unwrap()
    }

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

    fn replay(&self, round: u64) -> Result<usize, ReplayError> {
        let (read, blobs) = (self.database.read(), self.database.blobs());
        let key = LogKey::from_seed("theriac/demo", &[7; 32]).unwrap().public();
        replay(read, blobs, &self.config.model, &key, Round(round)).map(|done| done.combined)
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
        let mut hand = Hand::new(kind, 0.0);
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
        let mut hand = Hand::new(RoundKind::Delta, 0.0);
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
    let mut hand = Hand::new(RoundKind::Delta, 0.0);
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
    let mut hand = Hand::new(RoundKind::Delta, 0.0);
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
        let mut hand = Hand::new(RoundKind::Delta, 0.0);
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
        let second = hand.open(2);
        hand.send(&second, "a");
        hand.publish(2);
        assert_eq!(hand.replay(2).unwrap(), 3, "{published}");
    }
}

#[test]
fn late_update_for_a_round_without_a_model_is_as_fresh_as_any() {
    let mut hand = Hand::new(RoundKind::Delta, 0.0);
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
        let mut hand = Hand::new(kind, 0.5);
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
        let mut hand = Hand::new(RoundKind::Delta, 0.0);
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

/// A copy and a row that is near to everybody have no part in the round, and the records say whose noise they share.
#[test]
fn screened_rows_are_on_record_as_screened_and_counted_nowhere() {
    let mut hand = Hand::new(RoundKind::Moments, 0.0);
    let first = hand.open(1);
    hand.send(&first, "a");
    hand.send(&first, "b");
    // The same as b's, in the next place by name.
    let payload = encode_f32(&hand.values("b", 1));
    let header = hand.header(&first, &payload);
    hand.database
        .blobs()
        .put(&header.payload_digest, &payload)
        .unwrap();
    hand.database
        .write(|work| rounds::insert_upload(work, &node("c"), &header, &payload, 1.0, RuleName::MEAN))
        .unwrap();
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
