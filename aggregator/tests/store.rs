//! What the store promises: acknowledged means durable, one update per site and round, and errors that say what is wrong.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a failed helper is a failed test"
)]

use std::path::Path;

use theriac_aggregator::data_dir::DataDir;
use theriac_aggregator::robust::RuleName;
use theriac_aggregator::store::records::{self, LedgerHead};
use theriac_aggregator::store::rounds::{self, RoundRule};
use theriac_aggregator::store::tokens::{self, Redemption};
use theriac_aggregator::store::{Database, Store, StoreError, Urgency, history, models, schema};
use theriac_aggregator::{InitOptions, init};
use theriac_audit::leaf::SiteStanding;
use theriac_protocol::message::{AnnounceV1, Encoding, JoinRefusal, PrivacyClaimV1, UpdateKind, UpdateV1};
use theriac_protocol::refusal::RefusalCode;
use theriac_protocol::units::{Delta, Digest, Epsilon, L2Norm, ModelVersion, NodeId, NoiseMultiplier, Round};

const RULE: RoundRule = RoundRule {
    rule: RuleName::MEAN,
    byzantine: 0,
    quorum: 1,
};

fn new_store() -> (tempfile::TempDir, DataDir) {
    let temporary = tempfile::tempdir().unwrap();
    let root = temporary.path().join("data");
    init(InitOptions {
        site: None,
        ..InitOptions::new(&root, "demo")
    })
    .unwrap();
    (temporary, DataDir::new(root))
}

fn node(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

fn enrol(dir: &DataDir, names: &[&str]) {
    let mut database = Database::open(dir).unwrap();
    let end = theriac_protocol::units::Timestamp(u64::MAX / 4);
    for name in names {
        let key = Digest::of(name.as_bytes()).0;
        database
            .write(|work| records::enrol(work, &node(name), key, key, end, false))
            .unwrap();
    }
}

fn announce(database: &Database, round: u64) -> AnnounceV1 {
    let base = models::current_model(database.read()).unwrap();
    AnnounceV1 {
        round: Round(round),
        nonce: u64::MAX - round,
        kind: UpdateKind::Delta,
        values: 3,
        layout_digest: Digest::of(b"layout"),
        base_version: base.version,
        base_digest: base.digest,
        clip_norm: L2Norm::new(1.0).unwrap(),
        noise_multiplier: NoiseMultiplier::new(1.0).unwrap(),
        block_rows: 60,
        blocks_min: 1,
        blocks_max: 2,
        deadline_ms: 60_000,
    }
}

fn update(announce: &AnnounceV1, payload: &[u8], records: u64) -> UpdateV1 {
    UpdateV1 {
        round: announce.round,
        nonce: announce.nonce,
        kind: announce.kind,
        base_digest: announce.base_digest,
        layout_digest: announce.layout_digest,
        values: u32::try_from(payload.len()).unwrap(),
        encoding: Encoding::Int8 { scale: 0.1 },
        payload_digest: Digest::of(payload),
        blocks_bound: 2,
        privacy: PrivacyClaimV1 {
            clip_norm: announce.clip_norm,
            noise_multiplier: announce.noise_multiplier,
            epsilon_spent: Epsilon::new(0.5).unwrap(),
            delta: Delta::new(1e-6).unwrap(),
            ledger_head: Digest::of(&records.to_le_bytes()),
            ledger_records: records,
        },
    }
}

fn open_round(dir: &DataDir, round: u64) -> AnnounceV1 {
    let mut database = Database::open(dir).unwrap();
    let terms = announce(&database, round);
    database
        .write(|work| rounds::open(work, &terms, &[node("a"), node("b")], RULE))
        .unwrap();
    terms
}

#[test]
fn open_round_comes_back_as_it_was() {
    let (_temporary, dir) = new_store();
    enrol(&dir, &["a", "b"]);
    let terms = open_round(&dir, 1);
    let mut database = Database::open(&dir).unwrap();
    let header = update(&terms, &[1, 2, 3], 4);
    let stored = database
        .write(|work| rounds::insert_upload(work, &node("a"), &header, &[1, 2, 3], 0.5, RuleName::MEAN))
        .unwrap();
    let reason = theriac_protocol::message::DeclineReason::TooFewBlocks;
    database
        .write(|work| rounds::decline(work, Round(1), &node("b"), reason))
        .unwrap();
    // As after a crash: nothing is closed, another process reads.
    std::mem::forget(database);
    let database = Database::open(&dir).unwrap();
    let found = rounds::unfinished(database.read()).unwrap().unwrap();
    assert_eq!((found.open.round, found.open.nonce), (Round(1), u64::MAX - 1));
    assert_eq!(found.open.cohort.len(), 2);
    assert_eq!(found.open.declined.iter().collect::<Vec<_>>(), [&node("b")]);
    assert_eq!(found.open.stored[&node("a")], header.payload_digest);
    assert_eq!(found.uploads[&node("a")], stored);
    assert_eq!(found.terms_digest, rounds::terms_digest(&terms, RULE));
    let row = rounds::upload_row(database.read(), database.blobs(), Round(1), &node("a")).unwrap();
    assert_eq!(row.payload.as_ref(), [1, 2, 3]);
    assert_eq!(
        row.encoding,
        Encoding::Int8 { scale: 0.1 },
        "the scale must come back to the last bit"
    );
    let entry = records::registry(database.read()).unwrap()[&node("a")];
    assert_eq!(
        entry.ledger,
        LedgerHead {
            head: header.privacy.ledger_head,
            records: 4
        }
    );
}

#[test]
fn second_update_of_a_site_is_refused_by_the_store_itself() {
    let (_temporary, dir) = new_store();
    enrol(&dir, &["a"]);
    let terms = open_round(&dir, 1);
    let mut database = Database::open(&dir).unwrap();
    let mut insert = |payload: &[u8]| {
        let header = update(&terms, payload, 1);
        database.write(|work| rounds::insert_upload(work, &node("a"), &header, payload, 0.1, RuleName::MEAN))
    };
    insert(&[1, 2, 3]).unwrap();
    assert!(matches!(insert(&[3, 2, 1]), Err(StoreError::Database(_))));
    let stored = rounds::stored_upload(database.read(), Round(1), &node("a"))
        .unwrap()
        .unwrap();
    assert_eq!(
        stored.payload_digest,
        Digest::of(&[1, 2, 3]),
        "the first one wins"
    );
}

#[test]
fn opening_a_round_ends_a_stale_one_and_no_number_comes_twice() {
    let (_temporary, dir) = new_store();
    let terms = open_round(&dir, 1);
    let mut database = Database::open(&dir).unwrap();
    let next = AnnounceV1 {
        round: Round(2),
        ..terms.clone()
    };
    database
        .write(|work| rounds::open(work, &next, &[], RULE))
        .unwrap();
    let stale = history::detail(database.read(), Round(1)).unwrap().round;
    assert_eq!(stale.state, "aborted");
    // A write that was held up, of the round before: it must not end the new one.
    let late = database.write(|work| rounds::open(work, &terms, &[], RULE));
    assert!(
        matches!(late, Err(StoreError::Conflict(_))),
        "a number was used again: {late:?}"
    );
    assert_eq!(
        rounds::unfinished(database.read()).unwrap().unwrap().open.round,
        Round(2)
    );
    assert_eq!(rounds::last_round(database.read()).unwrap(), Round(2));
}

#[test]
fn failed_transaction_leaves_no_audit_leaf() {
    let (_temporary, dir) = new_store();
    enrol(&dir, &["a"]);
    let terms = open_round(&dir, 1);
    let mut database = Database::open(&dir).unwrap();
    let leaves = |database: &Database| theriac_aggregator::audit::lines(database.read()).unwrap().len();
    let before = leaves(&database);
    let failed = database.write(|work| {
        let header = update(&terms, &[1], 1);
        rounds::refuse_upload(
            work,
            &node("a"),
            &header,
            RefusalCode::NonFinite,
            RuleName::MEAN,
            None,
        )?;
        Err::<(), _>(StoreError::Conflict("on purpose".into()))
    });
    assert!(failed.is_err());
    assert_eq!(leaves(&database), before);
}

#[test]
fn large_payloads_are_blobs_and_a_missing_one_names_its_row() {
    let (_temporary, dir) = new_store();
    enrol(&dir, &["a"]);
    let terms = open_round(&dir, 1);
    let payload = vec![7_u8; 100_000];
    let header = update(&terms, &payload, 1);
    let mut database = Database::open(&dir).unwrap();
    database.blobs().put(&header.payload_digest, &payload).unwrap();
    database
        .write(|work| rounds::insert_upload(work, &node("a"), &header, &payload, 1.0, RuleName::MEAN))
        .unwrap();
    let read =
        |database: &Database| rounds::upload_row(database.read(), database.blobs(), Round(1), &node("a"));
    assert_eq!(read(&database).unwrap().payload, payload);
    std::fs::remove_file(dir.blobs().join(header.payload_digest.to_string())).unwrap();
    assert!(matches!(read(&database), Err(StoreError::BlobMissing { row, .. }) if row == "upload 1/a"));
    database
        .write(|work| rounds::forget_payloads(work, Round(1)))
        .unwrap();
    assert!(matches!(read(&database), Err(StoreError::Gone { .. })));
}

#[test]
fn roll_back_releases_the_old_values_under_a_new_version() {
    let (_temporary, dir) = new_store();
    let terms = open_round(&dir, 1);
    let mut database = Database::open(&dir).unwrap();
    let first = models::current_model(database.read()).unwrap();
    let payload = vec![1_u8; 8];
    let second = models::ModelRow {
        version: ModelVersion(1),
        round: Round(1),
        digest: Digest::of(&payload),
        rule: "mean".into(),
        contributors: 1,
        ..first.clone()
    };
    database
        .write(|work| rounds::publish(work, &second, &payload, &[], &[]))
        .unwrap();
    assert_eq!(rounds::unfinished(database.read()).unwrap(), None);
    let blobs = std::sync::Arc::clone(database.blobs());
    let third = database
        .write(|work| models::roll_back(work, &blobs, ModelVersion(0)))
        .unwrap();
    assert_eq!((third.version, third.digest), (ModelVersion(2), first.digest));
    assert_eq!(models::current_model(database.read()).unwrap(), third);
    let again = database.write(|work| models::roll_back(work, &blobs, ModelVersion(0)));
    assert!(matches!(again, Err(StoreError::Conflict(_))));
    let unknown = database.write(|work| models::roll_back(work, &blobs, ModelVersion(99)));
    assert!(matches!(unknown, Err(StoreError::NotFound { .. })));
    // A publication that comes too late changes nothing.
    let late = database.write(|work| rounds::publish(work, &second, &payload, &[], &[]));
    assert!(matches!(late, Err(StoreError::Conflict(_))), "{late:?} {terms:?}");
}

#[test]
fn revoked_key_stays_revoked_and_a_new_key_begins_a_new_ledger() {
    let (_temporary, dir) = new_store();
    enrol(&dir, &["a"]);
    let mut database = Database::open(&dir).unwrap();
    let token = theriac_certs::JoinToken::generate([1; 32]).unwrap();
    database
        .write(|work| tokens::create(work, &token, &node("a"), tokens::LIFETIME, false))
        .unwrap();
    let mut set = |state| database.write(|work| records::set_standing(work, &node("a"), state, "test"));
    set(SiteStanding::Suspended).unwrap();
    set(SiteStanding::Active).unwrap();
    set(SiteStanding::Revoked).unwrap();
    let spent = database.write(|work| tokens::look_up(work, &token.id, &token.secret, &[9; 32]));
    assert_eq!(spent.unwrap(), Redemption::Refused(JoinRefusal::UnknownToken));
    let mut set = |state| database.write(|work| records::set_standing(work, &node("a"), state, "test"));
    assert!(matches!(set(SiteStanding::Active), Err(StoreError::Conflict(_))));
    let end = theriac_protocol::units::Timestamp(0);
    let revoked = records::registry(database.read()).unwrap()[&node("a")].key_fingerprint;
    let mut again = |key| database.write(|work| records::enrol(work, &node("a"), key, key, end, false));
    assert!(matches!(again(revoked), Err(StoreError::Conflict(_))));
    again([9; 32]).unwrap();
    // Not with a newer key in force either.
    assert!(matches!(again(revoked), Err(StoreError::Conflict(_))));
    let entry = records::registry(database.read()).unwrap()[&node("a")];
    assert_eq!(
        (entry.state, entry.ledger),
        (SiteStanding::Active, LedgerHead::default())
    );
    assert!(matches!(
        database.write(|work| records::set_standing(work, &node("zz"), SiteStanding::Suspended, "")),
        Err(StoreError::NotFound { .. })
    ));
}

#[test]
fn other_files_and_newer_stores_are_refused() {
    let (_temporary, dir) = new_store();
    let raw = rusqlite::Connection::open(dir.database()).unwrap();
    raw.pragma_update(None, "user_version", schema::VERSION + 1)
        .unwrap();
    assert!(matches!(
        Database::open(&dir),
        Err(StoreError::Version { found, newest }) if found == newest + 1
    ));
    raw.pragma_update(None, "user_version", schema::VERSION).unwrap();
    raw.pragma_update(None, "application_id", 7).unwrap();
    assert!(matches!(
        Database::open(&dir),
        Err(StoreError::NotAStore { found: 7 })
    ));
    raw.pragma_update(None, "application_id", schema::APPLICATION_ID)
        .unwrap();
    assert!(Database::open(&dir).is_ok());
    std::fs::write(
        dir.database(),
        b"this is no database at all, but long enough to look",
    )
    .unwrap();
    assert!(matches!(Database::open(&dir), Err(StoreError::Database(_))));
}

#[test]
fn file_of_the_first_version_is_taken_up() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = DataDir::new(temporary.path());
    std::fs::write(dir.database(), b"").unwrap();
    let database = Database::open(&dir).unwrap();
    let version: i64 = database
        .read()
        .pragma_query_value(None, "user_version", |row| row.get(0))
        .unwrap();
    assert_eq!(version, schema::VERSION);
    let mode: String = database
        .read()
        .pragma_query_value(None, "journal_mode", |row| row.get(0))
        .unwrap();
    let sync: i64 = database
        .read()
        .pragma_query_value(None, "synchronous", |row| row.get(0))
        .unwrap();
    assert_eq!((mode.as_str(), sync), ("wal", 2), "write-ahead log, FULL");
}

#[tokio::test]
async fn concurrent_writes_share_commits_and_one_failure_spares_the_others() {
    let (_temporary, dir) = new_store();
    let (store, thread) = Store::open(&dir).unwrap();
    let before = store.commits();
    let write = |index: u8| {
        let store = store.clone();
        async move {
            let work = move |work: &theriac_aggregator::store::Work<'_>| {
                records::set_meta(work, &format!("key {index}"), &[index])?;
                if index % 10 == 3 {
                    Err(StoreError::Conflict("on purpose".into()))
                } else {
                    Ok(index)
                }
            };
            store.write(Urgency::Company, work).await
        }
    };
    let mut tasks = tokio::task::JoinSet::new();
    for index in 0..60 {
        tasks.spawn(write(index));
    }
    let results = tasks.join_all().await;
    assert_eq!(results.iter().filter(|result| result.is_err()).count(), 6);
    let commits = store.commits() - before;
    assert!(commits < 30, "{commits} commits for 60 writes");
    for index in 0..60_u8 {
        let kept = store
            .read(move |connection| records::meta(connection, &format!("key {index}")))
            .await;
        assert_eq!(kept.is_ok(), index % 10 != 3, "key {index}");
    }
    drop(store);
    thread.join();
}

#[tokio::test]
async fn full_disk_refuses_writes_and_answers_reads() {
    let (_temporary, dir) = new_store();
    let (store, thread) = Store::open(&dir).unwrap();
    // SQLite reports a full disk the same way when its file may not grow.
    let pages = |work: &theriac_aggregator::store::Work<'_>, most: i64| {
        work.connection()
            .query_row(&format!("PRAGMA max_page_count = {most}"), [], |row| {
                row.get::<_, i64>(0)
            })
    };
    store
        .write(Urgency::Now, move |work| Ok(pages(work, 1)?))
        .await
        .unwrap();
    let big = vec![0_u8; 1 << 20];
    let refused = store
        .write(Urgency::Now, move |work| records::set_meta(work, "big", &big))
        .await;
    assert!(matches!(refused, Err(StoreError::Full(_))), "{refused:?}");
    assert!(store.read(models::current_model).await.is_ok());
    store
        .write(Urgency::Now, move |work| Ok(pages(work, 1 << 30)?))
        .await
        .unwrap();
    let again = store
        .write(Urgency::Now, |work| records::set_meta(work, "big", &[1]))
        .await;
    assert!(again.is_ok(), "room came back: {again:?}");
    drop(store);
    thread.join();
}

#[test]
fn second_init_changes_nothing() {
    let (_temporary, dir) = new_store();
    let before = std::fs::read(dir.config()).unwrap();
    let error = init(InitOptions::new(dir.root(), "other")).unwrap_err();
    assert!(
        error.to_string().contains("already holds an aggregator"),
        "{error}"
    );
    assert_eq!(std::fs::read(dir.config()).unwrap(), before);
}

#[test]
fn init_makes_files_that_only_the_owner_can_read() {
    use std::os::unix::fs::PermissionsExt as _;
    fn walk(path: &Path, check: &mut dyn FnMut(&Path, u32)) {
        let mode = std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        check(path, mode);
        if path.is_dir() {
            for entry in std::fs::read_dir(path).unwrap() {
                walk(&entry.unwrap().path(), check);
            }
        }
    }
    let (_temporary, dir) = new_store();
    walk(dir.root(), &mut |path, mode| {
        assert_eq!(
            mode & 0o077 & if path.is_dir() { 0o777 } else { 0o077 },
            0,
            "{} has {mode:o}",
            path.display()
        );
    });
}

#[test]
fn a_round_keeps_why_an_update_was_refused() {
    let (_temporary, dir) = new_store();
    enrol(&dir, &["a", "b"]);
    let terms = open_round(&dir, 1);
    let mut database = Database::open(&dir).unwrap();
    let header = update(&terms, &[1, 2, 3], 1);
    database
        .write(|work| {
            rounds::refuse_upload(
                work,
                &node("a"),
                &header,
                RefusalCode::NonFinite,
                RuleName::MEAN,
                None,
            )
        })
        .unwrap();
    let detail = history::detail(database.read(), Round(1)).unwrap();
    assert_eq!(detail.refusals.get("a").map(String::as_str), Some("non_finite"));
    assert!(!detail.refusals.contains_key("b"));
}

#[test]
fn a_host_that_no_certificate_can_carry_leaves_nothing_behind() {
    let temporary = tempfile::tempdir().unwrap();
    let root = temporary.path().join("data");
    let with = |host: &str| {
        init(InitOptions {
            hosts: vec![host.to_owned()],
            ..InitOptions::new(&root, "demo")
        })
    };
    let theriac_aggregator::init::InitError::Serve(error) = with("bad host").unwrap_err() else {
        panic!("another error");
    };
    let problem = error.problem();
    assert_eq!(problem.code, "TH-E0711", "{problem}");
    let said = problem.to_string();
    assert!(
        said.contains("bad host") && said.contains("--hosts") && !said.contains("chmod"),
        "{said}"
    );
    assert!(!root.exists(), "half an aggregator is left");
    with("agg.example.org").unwrap();
}

#[test]
fn silence_lateness_and_rounds_without_a_model_are_on_record_and_count_for_nothing() {
    use theriac_aggregator::evidence::Decision;
    use theriac_aggregator::store::evidence;
    use theriac_protocol::refusal::AbortReason;
    let (_temporary, dir) = new_store();
    enrol(&dir, &["a", "b"]);
    let terms = open_round(&dir, 1);
    let mut database = Database::open(&dir).unwrap();
    let sent = update(&terms, &[1, 2, 3], 1);
    database
        .write(|work| {
            rounds::insert_upload(work, &node("a"), &sent, &[1, 2, 3], 1.0, RuleName::MEAN)?;
            rounds::abort(work, Round(1), AbortReason::QuorumMissed)?;
            // Ended is ended: the records are written once.
            rounds::abort(work, Round(1), AbortReason::QuorumMissed)
        })
        .unwrap();
    let decisions = |database: &Database| -> Vec<(String, Decision)> {
        let records = evidence::of_round(database.read(), Round(1)).unwrap();
        records
            .into_iter()
            .map(|record| (record.site, record.decision))
            .collect()
    };
    let at_the_end = [
        ("a".to_owned(), Decision::NotCombined),
        ("b".to_owned(), Decision::Silent),
    ];
    assert_eq!(decisions(&database), at_the_end);
    let late = update(&terms, &[4, 5, 6], 1);
    for name in ["b", "b", "a"] {
        let refuse = |work: &theriac_aggregator::store::Work<'_>| {
            rounds::refuse_upload(
                work,
                &node(name),
                &late,
                RefusalCode::RoundClosed,
                RuleName::MEAN,
                None,
            )
        };
        database.write(refuse).unwrap();
    }
    let with_the_late_one = [&at_the_end[..], &[("b".to_owned(), Decision::Late)]].concat();
    assert_eq!(
        decisions(&database),
        with_the_late_one,
        "once, and only of who was silent"
    );
    assert!(evidence::reputations(database.read()).unwrap().is_empty());
    assert_eq!(evidence::check_chain(database.read(), Round(1)).unwrap(), Ok(3));
    // The beginning of the chain goes, the rest still holds together.
    open_round(&dir, 2);
    database
        .write(|work| rounds::abort(work, Round(2), AbortReason::QuorumMissed))
        .unwrap();
    assert_eq!(
        database.write(|work| evidence::forget(work, Round(1))).unwrap(),
        3
    );
    assert_eq!(evidence::check_chain(database.read(), Round(2)).unwrap(), Ok(2));
    // Its end is missed.
    let cut = database.write(|work| {
        Ok(work
            .connection()
            .execute("DELETE FROM decision WHERE seq = 5", [])?)
    });
    assert_eq!(cut.unwrap(), 1);
    assert_eq!(
        evidence::check_chain(database.read(), Round(2)).unwrap(),
        Err(evidence::ChainError::Head)
    );
}
