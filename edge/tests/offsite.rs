//! The commands round off-site copies, on a host that lost its own checkpoints.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser as _;
use theriac_command::problem::{Exit, Problem};
use theriac_edge::commands::{Arguments, execute};
use theriac_edge::offsite::OffsiteSettings;
use theriac_edge::state_dir::StateDir;
use theriac_heal::background::Background;
use theriac_heal::checkpoint::sqlite::SqliteSource;
use theriac_heal::checkpoint::store::{Checkpoint, CheckpointStore, StoreLimits};

struct Place(tempfile::TempDir);

impl Place {
    /// A service with a database, its key made by the command, and a store.
    async fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        fs::create_dir(place.path("app")).unwrap();
        fs::create_dir(place.path("remote")).unwrap();
        let app = rusqlite::Connection::open(place.path("app/app.db")).unwrap();
        app.execute_batch("create table t (a integer); insert into t values (42)")
            .unwrap();
        let key = place.path("key");
        let made = place
            .json(&["checkpoints", "key", "--out", key.to_str().unwrap()])
            .await;
        assert_eq!(made["key"].as_str().unwrap().len(), 16);
        let text = |name: &str| place.path(name).display().to_string();
        let config = format!(
            "state_dir = '{}'\n[offsite]\nurl = 'file://{}'\nkey_file = '{}'\nname = 'old-host'\n\
             [[service]]\nname = 'app'\nargv = ['true']\n[service.state]\ndir = '{}'\n[service.checkpoint]\nkind = 'sqlite'\n",
            text("state"),
            text("remote"),
            text("key"),
            text("app")
        );
        fs::write(place.path("edge.toml"), config).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A valid checkpoint.
    async fn taken(&self, unix_ms: u64) -> Checkpoint {
        let limits = StoreLimits {
            free_bytes_min: 0,
            ..StoreLimits::default()
        };
        let dir = StateDir::open(&self.path("state")).unwrap();
        let store = CheckpointStore::open(&dir.checkpoints().join("app"), limits).unwrap();
        let source = SqliteSource {
            dir: self.path("app"),
            work_dir: self.path("work"),
            timeout: Duration::from_mins(1),
            free_bytes_min: 0,
            background: Background::new(0, None),
            foreign_keys: true,
            invariants: Vec::new(),
        };
        source.take(&store, unix_ms).await.unwrap().checkpoint
    }

    /// A valid checkpoint and its copy.
    async fn copied(&self) {
        let taken = self.taken(1_700_000_000_000).await;
        let settings = OffsiteSettings {
            url: format!("file://{}", self.path("remote").display()),
            key_file: self.path("key"),
            name: Some("old-host".to_owned()),
            keep: 3,
        };
        let offsite = settings.open("app").unwrap();
        offsite.push(&taken, 3).await.unwrap();
    }

    async fn command(&self, words: &[&str]) -> (Result<ExitCode, Problem>, String) {
        let words = ["theriac-edge", "--format", "json"].iter().chain(words);
        let arguments = Arguments::try_parse_from(words).unwrap();
        let mut out = Vec::new();
        let result = Box::pin(execute(arguments, &mut out)).await;
        (result, String::from_utf8(out).unwrap())
    }

    async fn json(&self, words: &[&str]) -> serde_json::Value {
        let (result, out) = self.command(words).await;
        result.unwrap();
        serde_json::from_str(&out).unwrap()
    }

    async fn checkpoints(&self, words: &[&str]) -> serde_json::Value {
        let config = self.path("edge.toml");
        let words = [&["checkpoints"], words, &["--config", config.to_str().unwrap()]].concat();
        self.json(&words).await
    }

    async fn refused(&self, words: &[&str]) -> Problem {
        let config = self.path("edge.toml");
        let words = [&["checkpoints"], words, &["--config", config.to_str().unwrap()]].concat();
        self.command(&words).await.0.unwrap_err()
    }
}

#[tokio::test]
async fn a_host_that_lost_everything_but_the_key_drills_and_restores_from_the_copy() {
    let place = Place::new().await;
    place.copied().await;
    fs::remove_dir_all(place.path("state")).unwrap();
    fs::remove_dir_all(place.path("app")).unwrap();
    StateDir::open(&place.path("state")).unwrap();
    let copies = place.checkpoints(&["list", "--offsite"]).await;
    assert_eq!(
        (&copies[0]["service"], &copies[0]["sequence"]),
        (&"app".into(), &1.into())
    );
    let drill = place.checkpoints(&["drill", "app"]).await;
    assert_eq!((&drill["good"], &drill["sequence"]), (&true.into(), &1.into()));
    assert_eq!(drill["run"]["checks"].as_array().unwrap().len(), 4, "{drill}");
    assert!(!place.path("app").exists(), "a drill touches no state");
    assert!(!place.path("state/checkpoints/app.drill").exists());
    place
        .checkpoints(&["restore", "app", "1", "--from", "offsite"])
        .await;
    let app = rusqlite::Connection::open(place.path("app/app.db")).unwrap();
    let found: i64 = app.query_row("select a from t", [], |row| row.get(0)).unwrap();
    assert_eq!(found, 42);
}

#[tokio::test]
async fn what_was_fetched_is_restored_though_a_local_one_has_its_number() {
    let place = Place::new().await;
    place.copied().await;
    // An older image of the host: a checkpoint of the same number, of other data.
    fs::remove_dir_all(place.path("state/checkpoints")).unwrap();
    let app = rusqlite::Connection::open(place.path("app/app.db")).unwrap();
    app.execute_batch("update t set a = 7").unwrap();
    drop(app);
    assert_eq!(place.taken(1_600_000_000_000).await.sequence, 1);
    let restored = place
        .checkpoints(&["restore", "app", "1", "--from", "offsite"])
        .await;
    assert_eq!(restored["taken_unix_ms"], 1_700_000_000_000_u64);
    let value = || -> i64 {
        let app = rusqlite::Connection::open(place.path("app/app.db")).unwrap();
        app.query_row("select a from t", [], |row| row.get(0)).unwrap()
    };
    assert_eq!(value(), 42);
    let refused = place.refused(&["restore", "app", "1"]).await;
    assert_eq!(refused.code, "TH-E0361", "{refused}");
    assert!(
        refused.to_string().contains("1-1600000000000, 1-1700000000000"),
        "{refused}"
    );
    place.checkpoints(&["verify", "app", "1-1600000000000"]).await;
    place.checkpoints(&["restore", "app", "1-1600000000000"]).await;
    assert_eq!(value(), 7);
}

#[tokio::test]
async fn a_damaged_copy_fails_its_drill_and_a_store_that_is_away_is_for_later() {
    let place = Place::new().await;
    place.copied().await;
    let parts = place.path("remote/old-host/app/parts");
    let part = fs::read_dir(parts).unwrap().next().unwrap().unwrap().path();
    let mut bytes = fs::read(&part).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&part, bytes).unwrap();
    let refused = place.refused(&["drill", "app"]).await;
    assert_eq!(
        (refused.code, refused.exit),
        ("TH-E0366", Exit::Failed),
        "{refused}"
    );
    let noted = fs::read_to_string(place.path("state/checkpoints/app.offsite")).unwrap();
    assert!(
        noted.contains("\"good\":false") && noted.contains("\"suspect\":true"),
        "{noted}"
    );
    fs::rename(place.path("remote"), place.path("unmounted")).unwrap();
    let refused = place.refused(&["list", "--offsite"]).await;
    assert_eq!((refused.code, refused.exit), ("TH-E0365", Exit::Temporary));
    assert!(!place.path("remote").exists());
    let stands = || {
        let now = fs::read_to_string(place.path("state/checkpoints/app.offsite")).unwrap();
        assert_eq!(
            now, noted,
            "a drill that learnt nothing overwrote what one had found"
        );
    };
    assert_eq!(place.refused(&["drill", "app"]).await.code, "TH-E0365");
    stands();
    fs::remove_file(place.path("key")).unwrap();
    assert_eq!(place.refused(&["drill", "app"]).await.code, "TH-E0367");
    stands();
    let listed = place.checkpoints(&["list"]).await;
    assert_eq!(
        listed[0]["state"], "valid, proved by a shadow run",
        "the local one stays"
    );
}
