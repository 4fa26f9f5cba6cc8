//! Validators at the whole server, over real QUIC and certificates: a model that one finds worse is not published, and everything that may happen to one
//! in between ends the round as the configuration says.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failed helper is a failed test"
)]

mod federation;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use federation::centre::{Centre, Edge};
use federation::header;
use theriac_aggregator::config::{RoundKind, RoundSettings, Settings};
use theriac_aggregator::data_dir::DataDir;
use theriac_aggregator::replay::ReplayError;
use theriac_aggregator::robust::RuleName;
use theriac_aggregator::store::heads::TreeError;
use theriac_aggregator::store::{evidence, history, validation};
use theriac_aggregator::validation::{Decision, Missing, Opinion};
use theriac_certs::Identity;
use theriac_protocol::compress::encode_f32;
use theriac_protocol::message::{
    Appraisal, AppraisalV1, CandidateV1, DeclineReason, DeclineV1, FEATURE_VALIDATOR, ToAggregator, ToEdge,
};
use theriac_protocol::refusal::{AbortReason, RoundOutcome};
use theriac_protocol::units::{Digest, ModelVersion, Round};

const SEED: u32 = 20;

static LEDGER: AtomicU64 = AtomicU64::new(1);

/// Sites `a` and `b` learn, `v` validates.
async fn start(change: impl FnOnce(&mut RoundSettings)) -> (Centre, [Identity; 3]) {
    let mut rounds = RoundSettings {
        kind: RoundKind::Delta,
        quorum: 2,
        deadline: Duration::from_secs(25),
        pause: Duration::ZERO,
        clip_norm: Some(10.0),
        noise_multiplier: Some(1.0),
        rule: RuleName::MEAN,
        byzantine: 0,
        validators: vec!["v".into()],
        validation_timeout: Duration::from_secs(30),
        ..RoundSettings::default()
    };
    change(&mut rounds);
    let mut centre = Centre::made(Settings {
        rounds,
        ..Settings::default()
    });
    let identities = centre.enrol(&["a", "b", "v"]);
    centre.serve().await;
    (centre, identities.try_into().map_err(|_| "three").unwrap())
}

impl Centre {
    fn change(&self, sql: &str) {
        let connection = rusqlite::Connection::open(DataDir::new(&self.dir).database()).unwrap();
        assert!(connection.execute(sql, []).unwrap() > 0, "{sql} changes nothing");
    }
}

async fn dial(centre: &Centre, identity: &Identity, features: &[&str]) -> Edge {
    let records = LEDGER.fetch_add(1, Ordering::Relaxed);
    centre.dial_soon(identity, centre.hello(records, features)).await
}

impl Edge {
    /// Noise of the agreed strength, as an honest site's update mostly is.
    async fn reports(&mut self, seed: u32) {
        let announce = self.announced().await;
        let mut state = SEED.wrapping_mul(7_919).wrapping_add(seed);
        let mut noise = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 8) as f32 / 16_777_216.0 - 0.5) * 34.6
        };
        let values: Vec<f32> = (0..announce.values).map(|_| noise()).collect();
        let payload = encode_f32(&values);
        let records = LEDGER.fetch_add(1, Ordering::Relaxed);
        let header = header(&announce, &payload, records);
        let update = ToAggregator::Update(header, payload.into());
        self.session.send(&update).await.unwrap();
        loop {
            match self.recv().await {
                ToEdge::Receipt(_) => return,
                ToEdge::Refusal(refusal) => panic!("refused: {}", refusal.code),
                _ => {}
            }
        }
    }

    async fn declines(&mut self) {
        let round = self.announced().await.round;
        let reason = DeclineReason::ReceiveOnly;
        let decline = ToAggregator::Decline(DeclineV1 { round, reason });
        self.session.send(&decline).await.unwrap();
    }

    async fn asked(&mut self) -> CandidateV1 {
        loop {
            match self.recv().await {
                ToEdge::Candidate(candidate, payload) => {
                    assert_eq!(candidate.payload_digest, Digest::of(&payload));
                    return candidate;
                }
                ToEdge::Closed(closed) => panic!("round {} ended unasked", closed.round),
                ToEdge::Announce(announce) => self.round = Some(announce),
                _ => {}
            }
        }
    }

    async fn says(&mut self, candidate: &CandidateV1, appraisal: Appraisal) {
        let said = AppraisalV1 {
            round: candidate.round,
            payload_digest: candidate.payload_digest,
            appraisal,
            ratio_permille: 1_500,
        };
        self.session.send(&ToAggregator::Appraisal(said)).await.unwrap();
    }

    /// How the round ended; nobody but a validator may be asked before.
    async fn ended(&mut self) -> (Round, RoundOutcome) {
        loop {
            match self.recv().await {
                ToEdge::Closed(closed) => return (closed.round, closed.outcome),
                ToEdge::Candidate(..) => panic!("asked about a candidate"),
                ToEdge::Announce(announce) => self.round = Some(announce),
                _ => {}
            }
        }
    }
}

const NO_MODEL: RoundOutcome = RoundOutcome::Aborted(AbortReason::AggregationFailed);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_a_validator_finds_worse_is_not_published_and_the_record_says_so_again() {
    let (mut centre, [a, b, v]) = start(|rounds| rounds.rounds_max = Some(2)).await;
    let mut v = dial(&centre, &v, &[FEATURE_VALIDATOR]).await;
    let (mut a, mut b) = (dial(&centre, &a, &[]).await, dial(&centre, &b, &[]).await);
    for (round, appraisal, outcome) in [
        (1, Appraisal::Worse, NO_MODEL),
        (2, Appraisal::NotWorse, RoundOutcome::Published(ModelVersion(1))),
    ] {
        v.declines().await;
        a.reports(round).await;
        b.reports(round + 100).await;
        let candidate = v.asked().await;
        assert_eq!(
            (candidate.round.0, candidate.base_version.0),
            (u64::from(round), 0)
        );
        v.says(&candidate, appraisal).await;
        for edge in [&mut a, &mut b, &mut v] {
            assert_eq!(
                edge.ended().await,
                (Round(u64::from(round)), outcome),
                "seed {SEED}"
            );
        }
    }
    centre.stop().await;
    let database = centre.database();
    let first = history::detail(database.read(), Round(1)).unwrap();
    assert_eq!(first.round.abort_reason.as_deref(), Some("validation_worse"));
    let recorded = validation::of_round(database.read(), Round(1)).unwrap().unwrap();
    assert!(recorded.audited && recorded.validation.decision == Decision::Worse);
    assert!(
        recorded
            .validation
            .words()
            .contains("v says worse (1.500 times the residual)")
    );
    for record in evidence::of_round(database.read(), Round(1)).unwrap() {
        assert_eq!(record.before, record.after, "{} is blamed for it", record.site);
    }
    let (first, second) = (centre.replay(1).unwrap(), centre.replay(2).unwrap());
    assert_eq!((first.model_version, second.model_version), (None, Some(1)));
    assert_eq!((first.combined, second.combined), (2, 2));
    assert!(
        first
            .validation
            .unwrap()
            .contains("not published: a validator found it worse")
    );
    assert!(first.signed_head.is_some(), "round 2 ended after it");
    // Another word in the record, or another decision, is noticed.
    centre.change("UPDATE validation SET record = replace(record, '\"worse\",\"ratio', '\"not_worse\",\"ratio') WHERE round = 1");
    let changed = centre.replay(1).unwrap_err();
    assert!(matches!(changed, ReplayError::Validation { .. }), "{changed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_whose_stored_bytes_were_changed_is_not_the_same_bits() {
    let (mut centre, [a, b, _]) = start(|rounds| {
        rounds.rounds_max = Some(1);
        rounds.validators.clear();
    })
    .await;
    let (mut a, mut b) = (dial(&centre, &a, &[]).await, dial(&centre, &b, &[]).await);
    a.reports(1).await;
    b.reports(101).await;
    a.ended().await;
    b.ended().await;
    centre.stop().await;
    assert_eq!(centre.replay(1).unwrap().model_version, Some(1));
    centre.change("UPDATE model SET payload = zeroblob(length(payload)) WHERE version = 1");
    let changed = centre.replay(1).unwrap_err();
    assert!(matches!(changed, ReplayError::Payload(_)), "{changed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_leaf_and_a_changed_root_are_named_by_the_replay() {
    let (mut centre, [a, b, _]) = start(|rounds| {
        rounds.rounds_max = Some(2);
        rounds.validators.clear();
    })
    .await;
    let (mut a, mut b) = (dial(&centre, &a, &[]).await, dial(&centre, &b, &[]).await);
    for round in 1..=2 {
        a.reports(round).await;
        b.reports(round + 100).await;
        a.ended().await;
        b.ended().await;
    }
    centre.stop().await;
    assert!(centre.replay(1).unwrap().signed_head.is_some());
    let leaf = "(SELECT idx FROM audit_leaf WHERE line LIKE '%update_verdict%' LIMIT 1)";
    let line = |to: &str, from: &str| {
        format!(
            "UPDATE audit_leaf SET line = replace(line, '\"rule\":\"{from}\"', '\"rule\":\"{to}\"') WHERE idx = {leaf}"
        )
    };
    centre.change(&line("best", "mean"));
    let named = centre.replay(1).unwrap_err();
    assert!(
        matches!(named, ReplayError::Tree(TreeError::Leaf { .. })),
        "{named}"
    );
    // With its hash changed as well only the signed root tells.
    let (idx, text): (i64, String) = {
        let connection = rusqlite::Connection::open(DataDir::new(&centre.dir).database()).unwrap();
        let query = format!("SELECT idx, line FROM audit_leaf WHERE idx = {leaf}");
        connection
            .query_row(&query, [], |row| Ok((row.get(0)?, row.get(1)?)))
            .unwrap()
    };
    let hash = theriac_audit::tree::leaf_hash(text.as_bytes());
    let hex = hash.to_string();
    centre.change(&format!(
        "UPDATE audit_leaf SET hash = x'{hex}' WHERE idx = {idx}"
    ));
    let named = centre.replay(1).unwrap_err();
    assert!(
        matches!(named, ReplayError::Tree(TreeError::Root { .. })),
        "{named}"
    );
    // And a head that was written anew has no signature.
    centre.change("UPDATE audit_head SET root = zeroblob(32)");
    let named = centre.replay(1).unwrap_err();
    assert!(
        matches!(named, ReplayError::Tree(TreeError::Head { .. })),
        "{named}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_validator_that_goes_is_asked_again_when_it_is_back_also_by_a_restarted_server() {
    let (mut centre, [a, b, v]) = start(|rounds| rounds.rounds_max = Some(1)).await;
    let mut validator = dial(&centre, &v, &[FEATURE_VALIDATOR]).await;
    let (mut first, mut second) = (dial(&centre, &a, &[]).await, dial(&centre, &b, &[]).await);
    validator.declines().await;
    first.reports(1).await;
    second.reports(2).await;
    let asked = validator.asked().await;
    drop(validator);
    let mut validator = dial(&centre, &v, &[FEATURE_VALIDATOR]).await;
    assert_eq!(validator.asked().await.payload_digest, asked.payload_digest);
    centre.stop().await;
    assert_eq!(
        history::detail(centre.database().read(), Round(1))
            .unwrap()
            .round
            .state,
        "open",
        "nothing of the candidate is durable"
    );
    centre.serve().await;
    let mut validator = dial(&centre, &v, &[FEATURE_VALIDATOR]).await;
    let again = validator.asked().await;
    assert_eq!(
        again.payload_digest, asked.payload_digest,
        "the same updates give the same bits"
    );
    validator.says(&again, Appraisal::NotWorse).await;
    let published = RoundOutcome::Published(ModelVersion(1));
    assert_eq!(validator.ended().await, (Round(1), published));
    centre.stop().await;
    assert!(centre.replay(1).is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_that_did_not_opt_in_is_never_asked_and_silence_holds_or_publishes() {
    for (missing, outcome, decision) in [
        (Missing::Hold, NO_MODEL, Decision::Held),
        (
            Missing::Publish,
            RoundOutcome::Published(ModelVersion(1)),
            Decision::Unvalidated,
        ),
    ] {
        let (mut centre, [a, b, v]) = start(|rounds| {
            rounds.rounds_max = Some(1);
            rounds.validation_missing = missing;
            rounds.validation_timeout = Duration::from_secs(1);
        })
        .await;
        // With `hold` no round opens without one that opted in: there it is asked, and silent.
        let features: &[&str] = if missing == Missing::Hold {
            &[FEATURE_VALIDATOR]
        } else {
            &[]
        };
        let mut v = dial(&centre, &v, features).await;
        let (mut a, mut b) = (dial(&centre, &a, &[]).await, dial(&centre, &b, &[]).await);
        v.declines().await;
        a.reports(1).await;
        b.reports(2).await;
        if missing == Missing::Hold {
            v.asked().await;
        }
        for edge in [&mut a, &mut b, &mut v] {
            assert_eq!(edge.ended().await, (Round(1), outcome));
        }
        centre.stop().await;
        let recorded = validation::of_round(centre.database().read(), Round(1))
            .unwrap()
            .unwrap();
        assert_eq!(recorded.validation.decision, decision);
        assert_eq!(recorded.validation.answers[0].opinion, Opinion::Silent);
        assert!(centre.replay(1).is_ok());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_round_opens_while_no_validator_is_there_whose_word_it_would_wait_for() {
    let (mut centre, [a, b, v]) = start(|rounds| rounds.rounds_max = Some(1)).await;
    let (_a, _b) = (dial(&centre, &a, &[]).await, dial(&centre, &b, &[]).await);
    // Connected, and not opted in.
    drop(dial(&centre, &v, &[]).await);
    let mut v = dial(&centre, &v, &[FEATURE_VALIDATOR]).await;
    assert_eq!(v.announced().await.round, Round(1));
    let asked = "SELECT count(*) FROM cohort WHERE round = 1";
    let asked: i64 = centre
        .database()
        .read()
        .query_row(asked, [], |row| row.get(0))
        .unwrap();
    // Two are a quorum: it would have opened to them alone.
    assert_eq!(asked, 3, "the round opened when the validator came");
    centre.stop().await;
}
