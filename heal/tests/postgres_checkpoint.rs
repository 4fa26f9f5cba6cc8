//! Checkpoints of a real server: what is good is kept, what is not is refused, and the primary never notices.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::fs::{self, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;
use std::time::Duration;

use support::{Cluster, forge_manifest};
use theriac_heal::checkpoint::postgres::PostgresSource;
use theriac_heal::checkpoint::postgres::workload::Template;
use theriac_heal::checkpoint::store::CheckpointError;
use theriac_heal::postgres::owner::Owner;

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

/// The account of the server may plant what it likes in the copy that belongs to it.
#[tokio::test]
async fn links_in_the_copy_lead_the_edge_nowhere() {
    let cluster = Cluster::start(false, &[]);
    let store = cluster.store(1);
    let source = cluster.source(Vec::new());
    let outside = tempfile::tempdir().unwrap();
    let (file, folder) = (outside.path().join("file"), outside.path().join("folder"));
    fs::write(&file, "precious").unwrap();
    fs::create_dir_all(folder.join("sub")).unwrap();
    fs::write(folder.join("sub/file"), "precious").unwrap();
    for round in 0..3 {
        let taken = source.receive(&store).await.unwrap();
        let plant = |name: &str, target: &Path| {
            let path = source.work_dir.join(name);
            drop(fs::remove_dir_all(&path).or_else(|_file| fs::remove_file(&path)));
            std::os::unix::fs::symlink(target, &path).unwrap();
        };
        plant("data/postgresql.auto.conf", &file);
        match round {
            0 => plant("log", &file),
            1 => plant("data/pg_replslot", &folder),
            _ => plant("conf", &folder),
        }
        source.prove(&store, taken, 1 + round).await.unwrap_err();
        assert!(!source.work_dir.exists());
        assert_eq!(fs::read_to_string(&file).unwrap(), "precious", "{round}");
        assert_eq!(fs::read_to_string(folder.join("sub/file")).unwrap(), "precious");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "{round}");
    }
    assert!(store.list().unwrap().is_empty());
}

/// What somebody wrote down to be asked has to be asked.
#[tokio::test]
async fn a_configured_statement_that_cannot_be_sent_is_no_pass() {
    let cluster = Cluster::start(false, &[]);
    cluster.psql("create table here (id int)");
    let store = cluster.store(1);
    let good = Template {
        sql: "select id from here where id = $1".to_owned(),
        weight: 1,
    };
    for (sql, words) in [
        ("select id from missing where id = $1", "missing"),
        ("selct 1", "syntax error"),
        ("select $1::point", "point"),
    ] {
        let mut source = cluster.source(Vec::new());
        let bad = Template {
            sql: sql.to_owned(),
            weight: 1,
        };
        source.shadow.templates = vec![good.clone(), bad];
        let refused = source.take(&store, 1).await.unwrap_err();
        assert!(
            matches!(&refused, CheckpointError::Unproven { detail, .. }
                if detail.contains("workload: statement 2") && detail.contains(words)),
            "{refused}"
        );
    }
    let mut source = cluster.source(Vec::new());
    source.shadow.templates = vec![good];
    source.take(&store, 2).await.unwrap();
    // Nothing configured is nothing missed.
    let valid = cluster.source(Vec::new()).take(&store, 3).await.unwrap();
    let checks = valid.proof.run.checks;
    let workload = checks.iter().find(|check| check.name == "workload").unwrap();
    assert!(workload.detail.starts_with("0 requests"), "{workload:?}");
    assert_eq!(store.set_aside_copies().unwrap().len(), 0);
}

/// A statement of the statistics may reach out by itself, so it is sent only where there is nothing to reach.
#[test]
fn sampled_statements_are_sent_only_where_the_shadow_is_kept_apart() {
    let cluster = Cluster::start(false, &["shared_preload_libraries = 'pg_stat_statements'"]);
    cluster.psql("create extension pg_stat_statements");
    cluster.psql("create table here (id int)");
    for _ in 0..20 {
        cluster.psql("select id from here where id = 5");
    }
    let store = cluster.store(1);
    let mut source = cluster.source(Vec::new());
    source.shadow.requests = 20;
    let run = async |source: &PostgresSource| {
        let valid = source.take(&store, 1).await.unwrap();
        let checks = valid.proof.run.checks;
        let workload = checks.into_iter().find(|check| check.name == "workload").unwrap();
        (workload.detail, valid.proof.run.isolation)
    };
    let block_on = |source: &PostgresSource| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.unwrap().block_on(run(source))
    };
    if cluster.owner.is_other() {
        let (sent, how) = block_on(&source);
        assert!(how.contains("namespace"), "{how}");
        assert!(sent.starts_with("20 requests"), "{sent}");
        owned(store.dir(), cluster.owner);
    }
    std::thread::scope(|scope| {
        scope.spawn(|| {
            become_account(cluster.owner);
            let (sent, how) = block_on(&source);
            assert!(how.contains("namespaces need root"), "{how}");
            assert!(
                sent.starts_with("0 requests") && sent.contains("sampled statements were left out"),
                "{sent}"
            );
            let mut source = source.clone();
            source.shadow.templates = vec![Template {
                sql: "select id from here where id > $1".to_owned(),
                weight: 1,
            }];
            let (sent, _) = block_on(&source);
            assert!(sent.starts_with("20 requests"), "{sent}");
        });
    });
}

/// Two commands of two people.
#[tokio::test]
async fn a_second_proof_in_the_same_place_waits_its_turn_and_the_first_comes_to_its_end() {
    let cluster = Cluster::start(false, &[]);
    let store = cluster.store(1);
    let source = cluster.source(Vec::new());
    source.take(&store, 1).await.unwrap();
    let second = async {
        while !source.work_dir.join("data/postmaster.pid").exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        source.verify(&store, 1).await
    };
    let (first, second) = tokio::join!(source.verify(&store, 1), second);
    let refused = second.unwrap_err().to_string();
    assert!(refused.contains("is being proved here by another"), "{refused}");
    first.unwrap();
    source.verify(&store, 1).await.unwrap();
    assert!(!source.work_dir.exists());
}

fn owned(dir: &Path, owner: Owner) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        owner.take(&path).unwrap();
        if path.is_dir() {
            owned(&path, owner);
        }
    }
    owner.take(dir).unwrap();
}

/// This thread and those that it starts.
fn become_account(owner: Owner) {
    use rustix::thread::{Gid, Uid, set_thread_groups, set_thread_res_gid, set_thread_res_uid};
    if owner.is_other() {
        let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
        set_thread_groups(&[gid]).unwrap();
        set_thread_res_gid(gid, gid, gid).unwrap();
        set_thread_res_uid(uid, uid, uid).unwrap();
    }
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
