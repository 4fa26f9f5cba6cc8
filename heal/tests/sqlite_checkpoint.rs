//! Checkpoints of SQLite databases while they are written.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rusqlite::Connection;
use tempfile::TempDir;
use theriac_heal::background::Background;
use theriac_heal::checkpoint::sqlite::SqliteSource;
use theriac_heal::checkpoint::store::{CheckpointError, CheckpointStore, StoreLimits};

struct Place {
    dir: TempDir,
}

impl Place {
    /// A state of two accounts whose sum is always 1000, a table that refers to them, and a file that is no database.
    fn new(journal: &str) -> Self {
        let place = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        fs::create_dir_all(place.state().join("sub")).unwrap();
        fs::write(place.state().join("sub/notes"), "plain").unwrap();
        fs::set_permissions(place.state(), fs::Permissions::from_mode(0o750)).unwrap();
        let app = place.connect();
        app.pragma_update(None, "journal_mode", journal).unwrap();
        app.execute_batch(
            "create table account (id integer primary key, total integer not null);
             create table entry (id integer primary key, account integer references account, note text);
             create index entry_note on entry (note);
             insert into account values (1, 500), (2, 500);
             with recursive n(i) as (select 1 union all select i + 1 from n where i < 5000)
               insert into entry select i, 1 + i % 2, 'note ' || i from n;",
        )
        .unwrap();
        place
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn connect(&self) -> Connection {
        let app = Connection::open(self.state().join("app.db")).unwrap();
        app.busy_timeout(Duration::from_secs(30)).unwrap();
        app
    }

    fn store(&self) -> CheckpointStore {
        let limits = StoreLimits {
            free_bytes_min: 0,
            needs_proof: true,
            ..StoreLimits::default()
        };
        CheckpointStore::open(&self.dir.path().join("checkpoints"), limits).unwrap()
    }

    fn source(&self) -> SqliteSource {
        let sum = self.dir.path().join("sum.sql");
        fs::write(&sum, "select sum(total) = 1000 from account").unwrap();
        SqliteSource {
            dir: self.state(),
            work_dir: self.dir.path().join("work"),
            timeout: Duration::from_mins(1),
            free_bytes_min: 0,
            background: Background::new(0, None),
            foreign_keys: true,
            invariants: vec![sum],
        }
    }
}

#[tokio::test]
async fn a_copy_of_a_database_with_a_log_ends_at_its_timeout_too() {
    let place = Place::new("wal");
    place
        .connect()
        .execute_batch("insert into entry values (10000, 1, zeroblob(4000000))")
        .unwrap();
    let late = SqliteSource {
        timeout: Duration::ZERO,
        ..place.source()
    };
    let refused = late.take(&place.store(), 1).await.unwrap_err();
    assert!(
        matches!(&refused, CheckpointError::Unproven { detail, .. } if detail.contains("longer than the timeout")),
        "{refused}"
    );
    assert!(place.store().list().unwrap().is_empty() && !late.work_dir.exists());
    place.source().take(&place.store(), 2).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_written_all_the_time_is_copied_whole_proved_and_restored() {
    let place = Place::new("wal");
    let (store, source) = (place.store(), place.source());
    let (over, moved) = (AtomicBool::new(false), AtomicU64::new(0));
    // The writer moves an amount between the accounts for as long as the copies are made.
    let taken = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let app = place.connect();
            while !over.load(Ordering::Relaxed) {
                app.execute_batch(
                    "begin immediate; update account set total = total - 1 where id = 1;
                     update account set total = total + 1 where id = 2; commit",
                )
                .unwrap();
                moved.fetch_add(1, Ordering::Relaxed);
            }
        });
        while moved.load(Ordering::Relaxed) == 0 && !writer.is_finished() {
            std::thread::yield_now();
        }
        let taken: Vec<_> = (1..=3)
            .map(|unix_ms| tokio::task::block_in_place(|| wait(source.take(&store, unix_ms))))
            .collect();
        over.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        taken
    });
    for valid in taken {
        let valid = valid.unwrap();
        assert_eq!(store.proof(&valid.checkpoint), Some(valid.proof));
        assert_eq!(valid.checkpoint.files, 2, "no log and no journal is in it");
    }
    assert!(!source.work_dir.exists());
    fs::write(place.state().join("app.db"), "rubbish").unwrap();
    let newest = store.list().unwrap()[0].sequence;
    assert_eq!(source.verify(&store, newest).await.unwrap().checks.len(), 4);
    store.restore(&place.state()).unwrap();
    let sum: i64 = place
        .connect()
        .query_row("select sum(total) from account", [], |row| row.get(0))
        .unwrap();
    assert_eq!(sum, 1000);
    assert_eq!(
        fs::read_to_string(place.state().join("sub/notes")).unwrap(),
        "plain"
    );
    let mode = fs::metadata(place.state()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o750);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_with_a_rollback_journal_lets_its_writer_in_between() {
    let place = Place::new("delete");
    let valid = place.source().take(&place.store(), 1).await.unwrap();
    assert_eq!(valid.proof.run.checks.len(), 4, "{:?}", valid.proof.run);
    // One that never stands still is told, and nothing is kept of it: every step finds the source changed.
    let mut hurried = place.source();
    hurried.timeout = Duration::ZERO;
    let app = place.connect();
    app.execute_batch("begin exclusive").unwrap();
    let refused = hurried.take(&place.store(), 2).await.unwrap_err();
    assert!(
        matches!(
            refused,
            CheckpointError::Changing { .. } | CheckpointError::Unproven { .. }
        ),
        "{refused}"
    );
    assert_eq!(place.store().list().unwrap().len(), 1);
    assert!(!hurried.work_dir.exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_kind_of_damage_is_refused_and_set_aside() {
    type Damage = (&'static str, fn(&Place));
    let damages: [Damage; 4] = [
        ("integrity", |place| {
            let app = place.connect();
            let root: u32 = app
                .query_row(
                    "select rootpage from sqlite_schema where name = 'entry_note'",
                    [],
                    |row| row.get(0),
                )
                .unwrap();
            let size: u32 = app.query_row("pragma page_size", [], |row| row.get(0)).unwrap();
            drop(app);
            flip(&place.state().join("app.db"), u64::from((root - 1) * size) + 12);
        }),
        ("integrity", |place| {
            let path = place.state().join("app.db");
            let length = fs::metadata(&path).unwrap().len();
            fs::File::options()
                .write(true)
                .open(&path)
                .unwrap()
                .set_len(length / 2)
                .unwrap();
        }),
        ("foreign keys", |place| {
            let app = place.connect();
            app.execute_batch("pragma foreign_keys = off; delete from account where id = 2")
                .unwrap();
        }),
        ("invariants", |place| {
            let app = place.connect();
            app.execute_batch("update account set total = total + 1").unwrap();
        }),
    ];
    for (at, (check, damage)) in damages.into_iter().enumerate() {
        let place = Place::new("delete");
        let store = place.store();
        let good = place.source().take(&store, 1).await.unwrap();
        damage(&place);
        match place.source().take(&store, 2).await.unwrap_err() {
            CheckpointError::Invalid { path, reason } => {
                assert!(reason.starts_with(check), "{at}: {reason}");
                assert_eq!(fs::read_to_string(path.join("REASON")).unwrap(), reason);
            }
            // A database so broken that its own backup refuses it is not copied at all.
            CheckpointError::Unproven { detail, .. } => {
                assert!(at == 1 && detail.contains("copy failed"), "{at}: {detail}");
            }
            other => panic!("{at}: {other}"),
        }
        let kept = store.list().unwrap();
        assert_eq!(kept.len(), 1);
        assert_eq!(kept[0].sequence, good.checkpoint.sequence);
    }
}

#[tokio::test]
async fn what_is_no_database_and_what_cannot_be_judged_is_not_kept() {
    let place = Place::new("wal");
    let mut missing = place.source();
    missing.invariants = vec!["/nowhere/sum.sql".into()];
    assert!(matches!(
        missing.take(&place.store(), 1).await,
        Err(CheckpointError::Unproven { detail, .. }) if detail.contains("/nowhere/sum.sql")
    ));
    let mut full = place.source();
    full.free_bytes_min = u64::MAX / 2;
    assert!(matches!(
        full.take(&place.store(), 2).await,
        Err(CheckpointError::DiskFull { .. })
    ));
    let mut empty = place.source();
    empty.dir = place.state().join("sub");
    assert!(matches!(
        empty.take(&place.store(), 3).await,
        Err(CheckpointError::Unproven { detail, .. }) if detail.contains("no SQLite database")
    ));
    assert!(place.store().list().unwrap().is_empty());
    assert!(place.store().set_aside_copies().unwrap().is_empty());
}

fn flip(path: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x55], at).unwrap();
}

fn wait<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Handle::current().block_on(work)
}
