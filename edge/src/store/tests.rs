//! The store on files, full disks among them.

use theriac_heal::types::{ActionKind, FaultClass, IncidentState, IntentId, When};

use super::*;

fn incident(id: u64, state: IncidentState) -> Incident {
    Incident {
        id: IncidentId(id),
        service: "kv".to_owned(),
        class: FaultClass::Crash,
        state,
        opened: When {
            monotonic_ms: 1,
            unix_ms: 1_000,
        },
        detected: When {
            monotonic_ms: 2,
            unix_ms: 1_001,
        },
        acted: None,
        healed: None,
        closed: None,
        score: Some(2.5),
        threshold: Some(1.5),
        evidence: Vec::new(),
        evidence_dropped: 0,
        causes: vec![("service_memory".to_owned(), 1.0).into()],
        hypotheses: Vec::new(),
        alternatives: Vec::new(),
        would: None,
        plan: None,
        approved_by: std::collections::BTreeSet::new(),
        actions: Vec::new(),
        verdict: None,
        handed_over: None,
    }
}

fn intent(id: u64) -> Intent {
    Intent {
        id: IntentId(id),
        incident: IncidentId(1),
        service: "kv".to_owned(),
        action: ActionKind::Restart,
        class: FaultClass::Crash,
        session: None,
        decided: When::default(),
        reason: "it ended".to_owned(),
    }
}

fn dir() -> (tempfile::TempDir, StateDir) {
    let root = tempfile::tempdir().unwrap();
    let dir = StateDir::open(&root.path().join("state")).unwrap();
    (root, dir)
}

#[tokio::test]
async fn what_was_acknowledged_is_there_after_reopening() {
    let (_root, dir) = dir();
    let row = OutboxRow {
        round: Round(7),
        nonce: u64::MAX,
        payload_digest: Digest::of(b"x"),
        body: Bytes::from_static(b"body"),
    };
    {
        let store = Store::open(&dir).unwrap();
        assert_eq!(store.machine().await.unwrap(), None);
        store
            .save_incident(&incident(1, IncidentState::Acting))
            .await
            .unwrap();
        store
            .record_intent(&MachineState::default(), &intent(1))
            .await
            .unwrap();
        store.put_outbox(&row).await.unwrap();
    }
    let store = Store::open(&dir).unwrap();
    assert_eq!(
        store.incidents(10).await.unwrap(),
        [incident(1, IncidentState::Acting)]
    );
    assert_eq!(store.machine().await.unwrap(), Some(MachineState::default()));
    assert_eq!(store.outbox().await.unwrap(), Some(row.clone()));
    let other = OutboxRow {
        body: Bytes::from_static(b"other"),
        ..row.clone()
    };
    store.put_outbox(&other).await.unwrap();
    assert_eq!(
        store.outbox().await.unwrap(),
        Some(row),
        "the first bytes of a round are the ones that count"
    );
    store.drop_outbox(Round(7)).await.unwrap();
    assert_eq!(store.outbox().await.unwrap(), None);
}

fn update(round: u64, nonce: u64, payload: &[u8]) -> OutboxRow {
    OutboxRow {
        round: Round(round),
        nonce,
        payload_digest: Digest::of(payload),
        body: Bytes::copy_from_slice(payload),
    }
}

#[tokio::test]
async fn another_nonce_of_a_round_is_another_update_and_other_bytes_for_the_same_are_refused() {
    let (_root, dir) = dir();
    let store = Store::open(&dir).unwrap();
    store.put_outbox(&update(7, 9, b"first")).await.unwrap();
    let second = update(7, 2, b"second");
    store.put_outbox(&second).await.unwrap();
    assert_eq!(
        store.outbox().await.unwrap(),
        Some(second.clone()),
        "the last announcement is the one that is answered"
    );
    let error = store.put_outbox(&update(7, 2, b"other")).await.unwrap_err();
    assert!(
        matches!(error, StoreError::OtherBytes { expected, .. } if expected == second.payload_digest),
        "{error}"
    );
    assert_eq!(store.outbox().await.unwrap(), Some(second));
    store.drop_outbox(Round(7)).await.unwrap();
    assert_eq!(store.outbox().await.unwrap(), None);
}

#[tokio::test]
async fn the_known_ledger_never_goes_backwards() {
    let (_root, dir) = dir();
    let head = |records| KnownHead {
        head: Digest([u8::try_from(records).unwrap(); 32]),
        records,
    };
    let store = Store::open(&dir).unwrap();
    assert_eq!(store.known_ledger().await.unwrap(), None);
    for records in [3, 5, 4] {
        store.note_ledger(head(records)).await.unwrap();
    }
    assert_eq!(store.known_ledger().await.unwrap(), Some(head(5)));
    let reader = StoreReader::open(&dir.database()).unwrap().unwrap();
    assert_eq!(reader.known_ledger().unwrap(), Some(head(5)));
}

#[tokio::test]
async fn a_store_of_version_1_is_read_and_brought_up_with_its_outbox() {
    let (_root, dir) = dir();
    let row = update(7, 9, b"first");
    Store::open(&dir).unwrap().put_outbox(&row).await.unwrap();
    let old = Connection::open(dir.database()).unwrap();
    old.execute_batch(
        "DROP TABLE ledger; DROP TABLE new_normal; ALTER TABLE outbox RENAME TO o;
         CREATE TABLE outbox (
             round INTEGER PRIMARY KEY, nonce TEXT NOT NULL, payload_digest TEXT NOT NULL, body BLOB NOT NULL
         ) STRICT;
         INSERT INTO outbox SELECT * FROM o; DROP TABLE o; PRAGMA user_version = 1;",
    )
    .unwrap();
    drop(old);
    let reader = StoreReader::open(&dir.database()).unwrap().unwrap();
    assert_eq!(reader.known_ledger().unwrap(), None);
    let store = Store::open(&dir).unwrap();
    assert_eq!(store.outbox().await.unwrap(), Some(row));
    store.put_outbox(&update(7, 2, b"second")).await.unwrap();
    assert_eq!(store.known_ledger().await.unwrap(), None);
}

#[tokio::test]
async fn a_store_of_version_2_is_brought_up_and_takes_new_normals() {
    let (_root, dir) = dir();
    Store::open(&dir)
        .unwrap()
        .save_incident(&incident(4, IncidentState::Open))
        .await
        .unwrap();
    let old = Connection::open(dir.database()).unwrap();
    old.execute_batch("DROP TABLE new_normal; PRAGMA user_version = 2;")
        .unwrap();
    drop(old);
    let reader = StoreReader::open(&dir.database()).unwrap().unwrap();
    assert!(
        reader.accept_new_normal(IncidentId(4)).is_err(),
        "not brought up yet"
    );
    let store = Store::open(&dir).unwrap();
    reader.accept_new_normal(IncidentId(4)).unwrap();
    assert_eq!(store.take_new_normals().await.unwrap(), [IncidentId(4)]);
    assert_eq!(store.incidents(9).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_store_of_version_3_is_brought_up_and_takes_approvals_of_plans() {
    let (_root, dir) = dir();
    drop(Store::open(&dir).unwrap());
    let old = Connection::open(dir.database()).unwrap();
    old.execute_batch(
        "DROP TABLE approval; CREATE TABLE approval (incident INTEGER PRIMARY KEY, approve INTEGER NOT NULL) STRICT;
         INSERT INTO approval VALUES (3, 1); PRAGMA user_version = 3;",
    )
    .unwrap();
    drop(old);
    let word = Word {
        incident: IncidentId(3),
        approve: false,
        plan: None,
        signature: None,
    };
    let reader = StoreReader::open(&dir.database()).unwrap().unwrap();
    assert!(reader.decide(&word).is_err(), "not brought up yet");
    let store = Store::open(&dir).unwrap();
    reader.decide(&word).unwrap();
    assert_eq!(
        store.take_approvals().await.unwrap(),
        [word],
        "an old approval was of no plan"
    );
}

#[tokio::test]
async fn the_reader_sees_incidents_and_leaves_decisions() {
    let (_root, dir) = dir();
    assert!(StoreReader::open(&dir.database()).unwrap().is_none());
    let store = Store::open(&dir).unwrap();
    for id in 1..=3 {
        store
            .save_incident(&incident(id, IncidentState::Open))
            .await
            .unwrap();
    }
    let reader = StoreReader::open(&dir.database()).unwrap().unwrap();
    let ids: Vec<u64> = reader
        .incidents(2)
        .unwrap()
        .iter()
        .map(|found| found.id.0)
        .collect();
    assert_eq!(ids, [2, 3]);
    assert!(reader.incident(IncidentId(9)).unwrap().is_none());
    reader.integrity().unwrap();
    let word = |signature: Option<&str>| Word {
        incident: IncidentId(2),
        approve: true,
        plan: Some("p".to_owned()),
        signature: signature.map(str::to_owned),
    };
    for signature in [Some("a"), Some("b"), Some("a"), None] {
        reader.decide(&word(signature)).unwrap();
    }
    let mut taken = store.take_approvals().await.unwrap();
    taken.sort_by(|a, b| a.signature.cmp(&b.signature));
    assert_eq!(taken, [word(None), word(Some("a")), word(Some("b"))]);
    assert_eq!(store.take_approvals().await.unwrap(), []);
    reader.accept_new_normal(IncidentId(3)).unwrap();
    reader.accept_new_normal(IncidentId(3)).unwrap();
    assert_eq!(store.take_new_normals().await.unwrap(), [IncidentId(3)]);
    assert_eq!(store.take_new_normals().await.unwrap(), []);
}

#[tokio::test]
async fn a_full_disk_is_told_apart_keeps_what_was_acknowledged_and_recovers() {
    let (_root, dir) = dir();
    let store = Store::open(&dir).unwrap();
    store
        .save_incident(&incident(1, IncidentState::Open))
        .await
        .unwrap();
    store.limit_pages(1).await;
    let mut big = incident(2, IncidentState::Open);
    big.handed_over = Some("x".repeat(200_000));
    let error = store.save_incident(&big).await.unwrap_err();
    assert!(error.is_full(), "{error}");
    assert!(store.probe_write().await.unwrap_err().is_full());
    assert_eq!(store.incidents(10).await.unwrap().len(), 1);
    store.limit_pages(1_000_000).await;
    store.probe_write().await.unwrap();
    store.save_incident(&big).await.unwrap();
    assert_eq!(
        store.outbox().await.unwrap(),
        None,
        "the probe leaves nothing behind"
    );
}

#[tokio::test]
async fn foreign_and_damaged_files_are_refused_and_left_as_they_are() {
    let (_root, dir) = dir();
    let other = Connection::open(dir.database()).unwrap();
    other
        .execute_batch("CREATE TABLE a (b); PRAGMA user_version = 9;")
        .unwrap();
    drop(other);
    assert!(matches!(
        Store::open(&dir).unwrap_err(),
        StoreError::Foreign { .. }
    ));
    let garbage = vec![b'x'; 8192];
    for side in ["edge.db-wal", "edge.db-shm"] {
        let _gone = std::fs::remove_file(dir.root().join(side)).is_ok();
    }
    std::fs::write(dir.database(), &garbage).unwrap();
    let error = Store::open(&dir).unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
    assert_eq!(std::fs::read(dir.database()).unwrap(), garbage);
}

#[tokio::test]
async fn old_closed_incidents_make_room_and_open_ones_stay() {
    let (_root, dir) = dir();
    let store = Store::open(&dir).unwrap();
    store
        .save_incident(&incident(1, IncidentState::HandedToHuman))
        .await
        .unwrap();
    store
        .save_incident(&incident(2, IncidentState::Healed))
        .await
        .unwrap();
    store
        .save_incident(&incident(20_000, IncidentState::Healed))
        .await
        .unwrap();
    let ids: Vec<u64> = store
        .incidents(10)
        .await
        .unwrap()
        .iter()
        .map(|found| found.id.0)
        .collect();
    assert_eq!(ids, [1, 20_000]);
}
