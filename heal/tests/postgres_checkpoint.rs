//! Checkpoints of a real server: what is good is kept, what is not is refused, and the primary never notices.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::fs::{self, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;
use std::time::Duration;

use support::{Cluster, forge_manifest};
use theriac_heal::checkpoint::postgres::workload::Template;
use theriac_heal::checkpoint::store::CheckpointError;

#[tokio::test]
async fn a_good_copy_is_proved_kept_restored_and_answers() {
    let mut cluster = Cluster::start(true, &["archive_mode = on", "archive_command = '/bin/false'"]);
    let balances = cluster.fill(1);
    cluster.psql("alter system set primary_conninfo = 'host=192.0.2.1 password=secret'");
    cluster.psql("select pg_create_physical_replication_slot('kept')");
    let store = cluster.store(2);
    let mut source = cluster.source(vec![balances]);
    source.shadow.templates = vec![Template {
        sql: "select abalance from pgbench_accounts where aid = $1".to_owned(),
        weight: 1,
    }];
    let mut kept = Vec::new();
    for unix_ms in 1..=3 {
        let valid = source.take(&store, unix_ms).await.unwrap();
        assert!(!source.work_dir.exists());
        let proof = store.proof(&valid.checkpoint).unwrap();
        assert_eq!(proof, valid.proof);
        assert_eq!(proof.run.checks.len(), 8, "{:#?}", proof.run);
        kept.push(valid.checkpoint.sequence);
    }
    let listed: Vec<u64> = store.list().unwrap().iter().map(|found| found.sequence).collect();
    assert_eq!(listed, [kept[2], kept[1]], "the newest two are kept");
    // The shadow of a stored copy, with the primary down, leaves its bytes as they are.
    cluster.psql("update pgbench_branches set bbalance = bbalance + 1");
    cluster.stop();
    let run = source.verify(&store, kept[1]).await.unwrap();
    assert!(
        run.checks
            .iter()
            .any(|check| check.name == "workload" && check.detail.starts_with("50 requests (0 refused")),
        "{run:#?}"
    );
    let restored = store.restore(&cluster.data()).unwrap();
    assert!(restored.replaced.unwrap().is_dir());
    cluster.begin();
    assert_eq!(cluster.psql(support::BALANCES), "t");
}

#[tokio::test]
async fn the_shadow_cannot_reach_the_primary() {
    let cluster = Cluster::start(false, &["wal_level = logical"]);
    cluster.fill(1);
    // A query that goes out by itself: from the shadow there is no way to the primary's socket, so it fails.
    cluster.psql("create extension dblink");
    let outward = cluster.dir.path().join("outward.sql");
    fs::write(
        &outward,
        format!(
            "select ok from dblink('host={} user=postgres dbname=postgres', 'select true') as t(ok bool)",
            cluster.target.socket_dir.display()
        ),
    )
    .unwrap();
    assert_eq!(cluster.psql(&fs::read_to_string(&outward).unwrap()), "t");
    let refused = cluster
        .source(vec![outward])
        .take(&cluster.store(1), 1)
        .await
        .unwrap_err();
    if rustix::process::geteuid().is_root() {
        assert!(
            matches!(&refused, CheckpointError::Unproven { detail, .. } if detail.contains("could not establish connection")),
            "{refused}"
        );
    }
    assert_eq!(
        cluster.psql("select count(*) from pg_replication_slots"),
        "0",
        "the backup's slot ended with it"
    );
}

type Damage<'a> = Box<dyn Fn(&Path) + 'a>;

#[tokio::test]
async fn every_kind_of_damage_is_refused_and_set_aside_and_the_valid_copy_stays() {
    let cluster = Cluster::start(true, &[]);
    let balances = cluster.fill(1);
    let store = cluster.store(1);
    let source = cluster.source(vec![balances]);
    // Invariants would find some of it first.
    let bare = cluster.source(Vec::new());
    let beside = cluster.store_named("beside", 1);
    let valid = source.take(&store, 1).await.unwrap().checkpoint;
    let accounts = cluster.psql("select pg_relation_filepath('pgbench_accounts')");
    let damages: Vec<(&str, Damage<'_>)> = vec![
        (
            "manifest",
            Box::new(|data| flip(&data.join(&accounts), 8192 * 7 + 4000)),
        ),
        ("manifest", Box::new(|data| cut(&data.join(&accounts), 8192 * 3))),
        ("manifest", Box::new(remove_wal)),
        (
            "manifest",
            Box::new(|data| fs::write(data.join("PG_VERSION"), "9\n").unwrap()),
        ),
        // With a manifest that agrees, so that the shadow alone has to find it.
        (
            "structure",
            Box::new(|data| {
                flip(&data.join(&accounts), 8192 * 7 + 4000);
                forge_manifest(data);
            }),
        ),
        (
            "heap read",
            Box::new(|data| {
                cut(&data.join(&accounts), 8192 * 3);
                forge_manifest(data);
            }),
        ),
        (
            "recovery",
            Box::new(|data| {
                remove_wal(data);
                forge_manifest(data);
            }),
        ),
        (
            "version",
            Box::new(|data| {
                fs::write(data.join("PG_VERSION"), "9\n").unwrap();
                forge_manifest(data);
            }),
        ),
    ];
    for (at, (check, damage)) in damages.iter().enumerate() {
        let (source, store) = if at < 4 {
            (&source, &store)
        } else {
            (&bare, &beside)
        };
        let taken = source.receive(store).await.unwrap();
        damage(&taken.data);
        let refused = source.prove(store, taken, 2 + at as u64).await.unwrap_err();
        let CheckpointError::Invalid { path, reason } = refused else {
            panic!("{at}: {refused}")
        };
        assert!(reason.starts_with(check), "{at}: {reason}");
        assert_eq!(fs::read_to_string(path.join("REASON")).unwrap(), reason);
        assert!(!source.work_dir.exists());
    }
    // The primary itself is out of balance: its copy is whole and is refused all the same.
    cluster.psql("update pgbench_branches set bbalance = bbalance + 1");
    let refused = source.take(&store, 90).await.unwrap_err();
    assert!(
        matches!(&refused, CheckpointError::Invalid { reason, .. } if reason.starts_with("invariants")),
        "{refused}"
    );
    assert_eq!(store.set_aside_copies().unwrap().len(), 5);
    assert_eq!(store.list().unwrap()[0].sequence, valid.sequence);
    assert!(store.proof(&valid).is_some());
}

#[tokio::test]
async fn what_cannot_be_judged_is_not_kept_and_not_called_bad() {
    let cluster = Cluster::start(false, &[]);
    let store = cluster.store(1);
    let missing = cluster.source(vec!["/nowhere/invariant.sql".into()]);
    assert!(matches!(
        missing.take(&store, 1).await,
        Err(CheckpointError::Unproven { detail, .. }) if detail.contains("/nowhere/invariant.sql")
    ));
    let mut late = cluster.source(Vec::new());
    late.shadow.timeout = Duration::from_millis(1);
    assert!(matches!(
        late.take(&store, 2).await,
        Err(CheckpointError::Unproven { .. })
    ));
    // Too little room is found before anything is written.
    let mut full = cluster.source(Vec::new());
    full.free_bytes_min = u64::MAX / 2;
    assert!(matches!(
        full.take(&store, 3).await,
        Err(CheckpointError::DiskFull { .. })
    ));
    assert_eq!(
        (
            store.list().unwrap().len(),
            store.set_aside_copies().unwrap().len()
        ),
        (0, 0)
    );
    // A work directory that is not ours stays untouched.
    let precious = cluster.dir.path().join("precious");
    fs::create_dir(&precious).unwrap();
    fs::write(precious.join("file"), b"x").unwrap();
    let mut mistyped = cluster.source(Vec::new());
    mistyped.work_dir.clone_from(&precious);
    assert!(mistyped.take(&store, 4).await.is_err());
    assert!(precious.join("file").exists());
}

fn flip(path: &Path, at: u64) {
    let mut file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.seek(SeekFrom::Start(at)).unwrap();
    file.read_exact(&mut byte).unwrap();
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(&[byte[0] ^ 0x10]).unwrap();
}

fn cut(path: &Path, bytes: u64) {
    OpenOptions::new()
        .write(true)
        .open(path)
        .unwrap()
        .set_len(bytes)
        .unwrap();
}

fn remove_wal(data: &Path) {
    for entry in fs::read_dir(data.join("pg_wal")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::remove_file(path).unwrap();
        }
    }
}
