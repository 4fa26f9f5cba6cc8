//! Checkpoints of a real Redis server. Where `redis-server` is not installed each test says so and ends.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking and names what it left out"
)]

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use theriac_heal::background::Background;
use theriac_heal::checkpoint::redis::{Address, RedisError, RedisSource, program};
use theriac_heal::checkpoint::store::{CheckpointError, CheckpointStore, StoreLimits};

struct Redis {
    dir: TempDir,
    server: Option<Child>,
    settings: Vec<&'static str>,
}

impl Redis {
    /// Three keys, one of which expires; `None` where there is no Redis.
    fn start(settings: &[&'static str]) -> Option<Self> {
        Self::start_on(settings, |_state| true)
    }

    /// The same after `ready` has prepared the state directory; `None` too where it cannot.
    fn start_on(settings: &[&'static str], ready: impl FnOnce(&Path) -> bool) -> Option<Self> {
        if let Err(missing) = program("redis-server") {
            println!("left out: {missing}");
            return None;
        }
        let dir = tempfile::Builder::new().prefix("rd").tempdir_in("/tmp").unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let mut redis = Self {
            dir,
            server: None,
            settings: settings.to_vec(),
        };
        fs::create_dir(redis.state()).unwrap();
        if !ready(&redis.state()) {
            return None;
        }
        redis.begin();
        redis.tell("SET a 1");
        redis.tell("SET b 2");
        redis.tell("SET c 3 EX 10000");
        Some(redis)
    }

    fn begin(&mut self) {
        let mut server = Command::new(program("redis-server").unwrap());
        server
            .arg("--dir")
            .arg(self.state())
            .arg("--unixsocket")
            .arg(self.socket())
            .args(["--port", "0", "--save", ""])
            .args(&self.settings)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        self.server = Some(server.spawn().unwrap());
        let begun = Instant::now();
        while self.ask("PING").as_deref() != Some("+PONG") {
            assert!(begun.elapsed() < Duration::from_mins(1), "redis-server is not up");
            std::thread::yield_now();
        }
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("r.sock")
    }

    /// The first line of the answer to an inline command.
    fn ask(&self, command: &str) -> Option<String> {
        let mut stream = UnixStream::connect(self.socket()).ok()?;
        stream.write_all(format!("{command}\r\n").as_bytes()).ok()?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).ok()?;
        Some(line.trim_end().to_owned())
    }

    fn tell(&self, command: &str) {
        assert_eq!(self.ask(command).as_deref(), Some("+OK"), "{command}");
    }

    fn store(&self) -> CheckpointStore {
        let limits = StoreLimits {
            free_bytes_min: 0,
            needs_proof: true,
            ..StoreLimits::default()
        };
        CheckpointStore::open(&self.dir.path().join("checkpoints"), limits).unwrap()
    }

    fn source(&self) -> RedisSource {
        let commands = self.dir.path().join("commands");
        fs::write(
            &commands,
            "# what must hold\nexists a\neval \"return redis.call('get', 'a') + redis.call('get', 'b') == 3\" 0\n",
        )
        .unwrap();
        RedisSource {
            dir: self.state(),
            work_dir: self.dir.path().join("work"),
            address: Address::Unix(self.socket()),
            password_file: None,
            timeout: Duration::from_mins(1),
            free_bytes_min: 0,
            background: Background::new(0, None),
            memory_bytes: 256 << 20,
            cpu_cores: 1.0,
            invariants: vec![commands],
        }
    }

    fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill().unwrap();
            server.wait().unwrap();
        }
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.stop();
    }
}

#[tokio::test]
async fn a_snapshot_is_proved_kept_and_restored_with_the_server_gone() {
    let Some(mut redis) = Redis::start(&[]) else {
        return;
    };
    let (store, source) = (redis.store(), redis.source());
    let valid = source.take(&store, 1).await.unwrap();
    let run = &valid.proof.run;
    assert!(
        run.checks
            .iter()
            .any(|check| check.name == "keys" && check.detail == "3 keys")
    );
    assert!(
        run.checks
            .iter()
            .any(|check| check.name == "invariants" && check.detail == "2 commands")
    );
    assert!(!source.work_dir.exists());
    assert_eq!(valid.checkpoint.files, 1);
    // The primary changes and dies; the copy is proved without it.
    redis.tell("SET a 7");
    redis.stop();
    source.verify(&store, valid.checkpoint.sequence).await.unwrap();
    store.restore(&redis.state()).unwrap();
    redis.begin();
    assert_eq!(redis.ask("GET a").as_deref(), Some("$1"));
    assert_eq!(redis.ask("STRLEN a").as_deref(), Some(":1"));
    assert_eq!(redis.ask("INCRBY a 0").as_deref(), Some(":1"));
}

#[tokio::test]
async fn damaged_snapshots_are_refused_and_set_aside_and_the_valid_one_stays() {
    let Some(mut redis) = Redis::start(&[]) else {
        return;
    };
    let (store, source) = (redis.store(), redis.source());
    let valid = source.take(&store, 1).await.unwrap().checkpoint;
    redis.tell("SET a 2");
    let refused = source.take(&store, 2).await.unwrap_err();
    assert!(
        matches!(&refused, CheckpointError::Invalid { reason, .. } if reason.starts_with("invariants: commands, line 3")),
        "{refused}"
    );
    // A stored one that rots is refused by its digest, and by the shadow where the digest was made to agree.
    redis.stop();
    let rotten = redis.dir.path().join("rotten");
    let other = CheckpointStore::open(
        &rotten,
        StoreLimits {
            free_bytes_min: 0,
            ..StoreLimits::default()
        },
    )
    .unwrap();
    let whole = fs::read(valid.path.join("tree/dump.rdb")).unwrap();
    let state = redis.dir.path().join("damaged");
    fs::create_dir(&state).unwrap();
    for (at, bytes) in [
        (3, &whole[..whole.len() - 12]),
        (4, b"rubbish".as_slice()),
        (5, &flipped(&whole)),
    ] {
        fs::write(state.join("dump.rdb"), bytes).unwrap();
        let sequence = other.take(&state, at).unwrap().sequence;
        let refused = source.verify(&other, sequence).await.unwrap_err();
        assert!(
            matches!(refused, CheckpointError::Invalid { .. }),
            "{at}: {refused}"
        );
    }
    let file = fs::File::options()
        .write(true)
        .open(valid.path.join("tree/dump.rdb"))
        .unwrap();
    file.write_all_at(b"X", 3).unwrap();
    assert!(matches!(
        source.verify(&store, valid.sequence).await,
        Err(CheckpointError::Corrupt { .. })
    ));
    assert_eq!(store.set_aside_copies().unwrap().len(), 1);
}

#[tokio::test]
async fn a_server_that_does_not_answer_or_save_is_told_and_nothing_is_kept() {
    let Some(mut redis) = Redis::start(&[]) else {
        return;
    };
    redis.tell("CONFIG SET requirepass secret-word");
    let store = redis.store();
    let refused = redis.source().take(&store, 1).await.unwrap_err();
    assert!(refused.to_string().contains("NOAUTH"), "{refused}");
    let password = redis.dir.path().join("password");
    let with_password = RedisSource {
        password_file: Some(password.clone()),
        ..redis.source()
    };
    fs::write(&password, "wrong-word\n").unwrap();
    let refused = with_password.take(&store, 1).await.unwrap_err().to_string();
    assert!(
        refused.contains("AUTH") && !refused.contains("wrong-word"),
        "{refused}"
    );
    fs::write(&password, "secret-word\n").unwrap();
    let valid = with_password.take(&other_store(&redis), 1).await.unwrap();
    assert_eq!(valid.checkpoint.files, 1);
    redis.stop();
    let gone = redis.source().take(&store, 1).await.unwrap_err();
    let CheckpointError::Redis(error) = gone else {
        panic!("{gone}")
    };
    assert!(matches!(*error, RedisError::Unreachable { .. }));
    assert!(store.list().unwrap().is_empty() && !redis.source().work_dir.exists());
}

#[tokio::test]
async fn a_snapshot_that_fails_is_no_checkpoint() {
    let Some(redis) = Redis::start(&[]) else { return };
    // The server cannot write its snapshot: a folder is where the file belongs.
    fs::create_dir_all(redis.state().join("dump.rdb/in")).unwrap();
    let store = redis.store();
    let failed = redis.source().take(&store, 1).await.unwrap_err();
    assert!(
        failed.to_string().contains("rdb_last_bgsave_status:err"),
        "{failed}"
    );
    assert!(store.list().unwrap().is_empty());
}

/// Unmounts when dropped.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(&self.0).status());
    }
}

#[tokio::test]
async fn a_server_whose_disk_has_no_room_for_a_snapshot_is_not_asked_for_one() {
    let mut mounted = None;
    let defaults = ["--save", "3600 1"];
    let redis = Redis::start_on(&defaults, |state| {
        let made = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=64k,mode=0755", "tmpfs"])
            .arg(state)
            .output();
        let good = made.is_ok_and(|made| made.status.success());
        if good {
            mounted = Some(Mounted(state.to_owned()));
        } else {
            println!("left out: a full disk, because no file system can be mounted here (root may)");
        }
        good
    });
    let Some(mut redis) = redis else { return };
    let store = redis.store();
    let refused = redis.source().take(&store, 1).await.unwrap_err();
    assert!(
        matches!(&refused, CheckpointError::DiskFull { path, .. } if *path == redis.state()),
        "{refused}"
    );
    // The server goes on.
    redis.tell("SET a 2");
    assert_eq!(fs::read_dir(redis.state()).unwrap().count(), 0);
    redis.stop();
    drop(mounted);
}

#[tokio::test]
async fn a_left_over_snapshot_is_not_taken_for_the_one_that_was_just_made() {
    let secretive = ["--rename-command", "CONFIG", "", "--dbfilename", "other.rdb"];
    let Some(redis) = Redis::start(&secretive) else {
        return;
    };
    let store = redis.store();
    // One that would be proved good: what the server wrote at another time.
    redis.tell("SET a 1");
    assert_eq!(redis.ask("SAVE").as_deref(), Some("+OK"));
    fs::copy(redis.state().join("other.rdb"), redis.state().join("dump.rdb")).unwrap();
    let refused = redis.source().take(&store, 1).await.unwrap_err();
    assert!(refused.to_string().contains("is not what it saved"), "{refused}");
    assert!(store.list().unwrap().is_empty());
    drop(redis);
    let silent = ["--rename-command", "CONFIG", ""];
    let Some(redis) = Redis::start(&silent) else {
        return;
    };
    fs::write(redis.state().join("dump.rdb"), "old").unwrap();
    redis.source().take(&redis.store(), 1).await.unwrap();
}

#[tokio::test]
async fn a_shadow_that_ends_before_it_answers_says_nothing_of_the_copy() {
    let Some(redis) = Redis::start(&[]) else { return };
    let store = redis.store();
    let source = redis.source();
    fs::write(&source.invariants[0], "exists a\nshutdown nosave\nexists b\n").unwrap();
    let unproven = source.take(&store, 1).await.unwrap_err();
    assert!(
        matches!(&unproven, CheckpointError::Unproven { detail, .. } if detail.contains("commands, line 2")),
        "{unproven}"
    );
    assert!(store.set_aside_copies().unwrap().is_empty());
    assert_eq!(
        redis.ask("PING").as_deref(),
        Some("+PONG"),
        "the primary is not asked"
    );
}

#[tokio::test]
async fn a_snapshot_that_is_newer_than_the_programs_here_is_not_called_bad() {
    let Some(redis) = Redis::start(&[]) else { return };
    let source = redis.source();
    let valid = source.take(&redis.store(), 1).await.unwrap().checkpoint;
    let mut bytes = fs::read(valid.path.join("tree/dump.rdb")).unwrap();
    assert!(bytes.starts_with(b"REDIS"));
    bytes[5..9].copy_from_slice(b"0999");
    let state = redis.dir.path().join("newer");
    fs::create_dir(&state).unwrap();
    fs::write(state.join("dump.rdb"), bytes).unwrap();
    let other = other_store(&redis);
    let sequence = other.take(&state, 2).unwrap().sequence;
    let unproven = source.verify(&other, sequence).await.unwrap_err();
    assert!(
        matches!(&unproven, CheckpointError::Unproven { detail, .. } if detail.contains("version")),
        "{unproven}"
    );
}

#[tokio::test]
async fn what_is_said_of_an_invariant_holds_nothing_of_the_data() {
    let Some(redis) = Redis::start(&[]) else { return };
    redis.tell("SET secret-key secret-value");
    let (store, source) = (redis.store(), redis.source());
    fs::write(&source.invariants[0], "mget secret-key a\n").unwrap();
    let refused = source.take(&store, 1).await.unwrap_err().to_string();
    assert!(
        refused.contains("a list of 2") && !refused.contains("secret-value"),
        "{refused}"
    );
}

#[tokio::test]
async fn an_append_only_file_is_refused_with_what_to_do() {
    let Some(redis) = Redis::start(&["--appendonly", "yes"]) else {
        return;
    };
    let refused = redis.source().take(&redis.store(), 1).await.unwrap_err();
    assert!(refused.to_string().contains("appendonly no"), "{refused}");
}

fn other_store(redis: &Redis) -> CheckpointStore {
    CheckpointStore::open(&redis.dir.path().join("other"), StoreLimits::default()).unwrap()
}

fn flipped(whole: &[u8]) -> Vec<u8> {
    let mut other = whole.to_vec();
    let last = other.len() - 1;
    // The checksum at the end.
    other[last] ^= 0xFF;
    other
}

#[test]
fn a_directory_without_redis_is_named() {
    assert!(!Path::new("/nowhere").join("redis-server").is_file());
    let words = program("redis-no-such-program").unwrap_err().to_string();
    assert!(words.contains("THERIAC_REDIS_BIN"), "{words}");
}
