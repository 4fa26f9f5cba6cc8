//! Checkpoints of a running Redis server, each loaded by a second server before it counts.
//!
//! ```text
//! taken     BGSAVE, and the snapshot that it wrote → WORK/data/dump.rdb
//! hashed    WORK/data is read once: each byte is digested and written to the store on the way
//! shadowed  redis-check-rdb where it is there; then a second server loads WORK/data/dump.rdb, every value checked as it is loaded
//!           (`sanitize-dump-payload yes`), and answers the configured commands
//! valid     the stored copy is read once more, equals its digests, and is renamed into place with the proof beside it
//! ```
//!
//! A checkpoint holds the snapshot alone: it takes the place of the whole directory, and the server loads it at its start. A server
//! that keeps an append-only file would not: it is refused, with what to do instead.

mod client;
mod server;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::time::sleep;

pub use self::client::{Address, Client, Pinged, Value, ping};
use super::proof::{self, Validated};
use super::store::{CheckpointError, CheckpointStore, at};
use super::verdict::{Check, Finding, ShadowKind, ShadowRun, State};
use super::which::Which;
use super::work::Work;
use super::{unblock_behind, work};
use crate::background::Background;
use crate::postgres::owner::Owner;

/// A server whose checkpoints are taken, and how.
#[derive(Debug, Clone)]
pub struct RedisSource {
    /// The server's working directory, where its snapshot is.
    pub dir: PathBuf,
    /// Where the copy is received and the shadow runs; removed afterwards. Its parent must exist.
    pub work_dir: PathBuf,
    /// Where the server listens.
    pub address: Address,
    /// A file with its password; read anew each time.
    pub password_file: Option<PathBuf>,
    /// Most time for the snapshot, and again for its proof.
    pub timeout: Duration,
    /// Bytes that must stay free beside the copies.
    pub free_bytes_min: u64,
    /// How far all of it stands back for the host's services.
    pub background: Background,
    /// Memory limit of the shadow in bytes where control groups are there; raised to what the server itself uses and half of that.
    pub memory_bytes: u64,
    /// Its processor limit in cores, likewise.
    pub cpu_cores: f64,
    /// Files of one command a line, asked of the shadow. Each answer must be a whole number above 0 or a text that is not empty.
    pub invariants: Vec<PathBuf>,
}

/// Why something with Redis did not work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RedisError {
    /// A program was not found.
    #[error("{program} was not found ({looked}): install Redis or name its directory in THERIAC_REDIS_BIN")]
    NoBinary {
        /// Which.
        program: String,
        /// Where was looked.
        looked: String,
    },
    /// The server does not answer.
    #[error("Redis at {address} does not answer: {source}")]
    Unreachable {
        /// Where.
        address: String,
        /// The system's word.
        source: std::io::Error,
    },
    /// The server refuses a command.
    #[error("Redis refuses {command}: {detail}")]
    Refused {
        /// Its first word.
        command: String,
        /// The server's words.
        detail: String,
    },
    /// The snapshot was not written.
    #[error("the snapshot was not written: {detail}")]
    NotSaved {
        /// Why.
        detail: String,
    },
    /// The server's setting does not allow a checkpoint of this kind.
    #[error("{0}")]
    Setting(String),
}

impl From<RedisError> for CheckpointError {
    fn from(error: RedisError) -> Self {
        Self::Redis(Box::new(error))
    }
}

/// What the server said before its snapshot.
#[derive(Debug)]
struct Before {
    keys: u64,
    used_memory: u64,
    snapshot: PathBuf,
}

impl RedisSource {
    /// Takes, hashes, shadows and keeps a checkpoint.
    ///
    /// # Errors
    /// [`CheckpointError::Redis`] when the server does not answer or does not save; [`CheckpointError::DiskFull`] before anything is
    /// written; [`CheckpointError::Invalid`] when the copy is bad, which then is in quarantine; [`CheckpointError::Unproven`] when it
    /// could not be judged; others as for a directory.
    pub async fn take(&self, store: &CheckpointStore, unix_ms: u64) -> Result<Validated, CheckpointError> {
        Box::pin(self.background.during(self.take_behind(store, unix_ms))).await
    }

    async fn take_behind(&self, store: &CheckpointStore, unix_ms: u64) -> Result<Validated, CheckpointError> {
        store.refuse_full_quarantine()?;
        work::clear(&self.work_dir).await?;
        let owner = owner(&self.dir)?;
        let mut run = ShadowRun::of(ShadowKind::Redis);
        let begun = Instant::now();
        let before = self.snapshot(store).await?;
        let taken = self.receive(store, &before.snapshot, owner).await;
        let (work, taken) = match taken {
            Ok(work) => (Some(work), Ok(())),
            Err(error) => (None, Err(error)),
        };
        let worked = async {
            taken?;
            run.reached(State::Taken, begun.elapsed());
            let begun = Instant::now();
            let from = work::open_data(&self.work_dir).map_err(at(&self.work_dir))?;
            let to = store.clone();
            let staged = unblock_behind(&self.background, move || to.stage_from(&from, unix_ms)).await?;
            run.reached(State::Hashed, begun.elapsed());
            self.shadow(owner, Some(&before), &mut run).await;
            Ok::<_, CheckpointError>(staged)
        }
        .await;
        let cleared = match work {
            Some(work) => work::end(work).await,
            None => work::clear(&self.work_dir).await,
        };
        let staged = worked?;
        cleared?;
        proof::settle(store, staged, run, unix_ms, &self.background).await
    }

    /// Proves a stored checkpoint again on a copy of it. The server itself is not asked anything and may be down.
    ///
    /// # Errors
    /// [`CheckpointError::Corrupt`], [`CheckpointError::Invalid`], [`CheckpointError::Unproven`] and others.
    pub async fn verify(
        &self,
        store: &CheckpointStore,
        which: impl Into<Which>,
    ) -> Result<ShadowRun, CheckpointError> {
        Box::pin(self.background.during(self.verify_behind(store, which.into()))).await
    }

    async fn verify_behind(
        &self,
        store: &CheckpointStore,
        which: Which,
    ) -> Result<ShadowRun, CheckpointError> {
        work::clear(&self.work_dir).await?;
        let found = store.verify(which)?;
        let owner = owner(&self.dir).or_else(|_gone| owner(work::parent(&self.work_dir)))?;
        super::store::needs_room(work::parent(&self.work_dir), found.bytes, self.free_bytes_min)?;
        let work = work::make(&self.work_dir, owner)?;
        let (from, to) = (store.clone(), work::data(&self.work_dir));
        let copied = unblock_behind(&self.background, move || from.export(which, &to)).await;
        let mut run = ShadowRun::of(ShadowKind::Redis);
        if copied.is_ok() {
            self.shadow(owner, None, &mut run).await;
        }
        let cleared = work::end(work).await;
        copied?;
        cleared?;
        proof::judged(run, found.path)
    }

    /// Has the server write a snapshot that begins after now.
    async fn snapshot(&self, store: &CheckpointStore) -> Result<Before, CheckpointError> {
        let password = self.password()?;
        let mut client = Client::open(&self.address, password.as_deref(), ASK_MAX).await?;
        let info = client.text(&["INFO"]).await?;
        if number(&info, "aof_enabled") != Some(0) {
            let words = "Redis keeps an append-only file (`appendonly yes`) and would not load a snapshot in its stead: set `appendonly no`, \
                         or use checkpoint.kind = \"directory\" with a check";
            return Err(RedisError::Setting(words.to_owned()).into());
        }
        let used_memory = number(&info, "used_memory").unwrap_or(0);
        let snapshot = self.snapshot_file(&mut client).await?;
        // A snapshot is smaller than what it is made of. The server writes it beside the old one: a disk too full for that would
        // have it refuse every write afterwards (`stop-writes-on-bgsave-error`).
        let dirs = [self.dir.as_path(), work::parent(&self.work_dir), store.dir()];
        work::refuse_full_disks(&dirs, used_memory, self.free_bytes_min)?;
        let old = identity(&snapshot);
        let keys = keys(&info);
        let deadline = Instant::now() + self.timeout;
        let late = || RedisError::NotSaved {
            detail: format!("no end after {:?}", self.timeout),
        };
        // One that runs already began before what was written since.
        loop {
            let began = client.ask(&["BGSAVE"]).await?;
            match began {
                Value::Text(_) => break,
                Value::Error(words) if words.contains("in progress") || words.contains("can't BGSAVE") => {}
                Value::Error(detail) => {
                    let command = "BGSAVE".to_owned();
                    return Err(RedisError::Refused { command, detail }.into());
                }
                other => {
                    let detail = format!("BGSAVE is answered by {}", other.kind());
                    return Err(RedisError::NotSaved { detail }.into());
                }
            }
            if Instant::now() >= deadline {
                return Err(late().into());
            }
            sleep(ASK_EVERY).await;
        }
        loop {
            let info = client.text(&["INFO", "persistence"]).await?;
            if number(&info, "rdb_bgsave_in_progress") == Some(0) {
                if value(&info, "rdb_last_bgsave_status") == Some("ok") {
                    break;
                }
                let detail = "the server says `rdb_last_bgsave_status:err`: its log says why, most often a full disk or no memory";
                return Err(RedisError::NotSaved {
                    detail: detail.to_owned(),
                }
                .into());
            }
            if Instant::now() >= deadline {
                return Err(late().into());
            }
            sleep(ASK_EVERY).await;
        }
        // It is renamed into place. Where the server does not tell its settings, this alone says that it is there that it writes.
        let new = identity(&snapshot);
        if new.is_none() || new == old {
            let words = format!(
                "Redis saved, and {} is not what it saved: state.dir must be its `dir`, with `dbfilename {DUMP}`",
                snapshot.display()
            );
            return Err(RedisError::Setting(words).into());
        }
        Ok(Before {
            keys,
            used_memory,
            snapshot,
        })
    }

    /// Where the server writes its snapshot, which must be in the state directory, or a restore would put it elsewhere.
    async fn snapshot_file(&self, client: &mut Client) -> Result<PathBuf, RedisError> {
        let mut setting = async |name: &str| match client.ask(&["CONFIG", "GET", name]).await {
            Ok(Value::List(list)) => list.into_iter().nth(1).and_then(|found| match found {
                Value::Text(text) => Some(text),
                _ => None,
            }),
            // Not every server tells: then it is where it is by default, or is found not to be after the snapshot.
            Ok(_) | Err(_) => None,
        };
        let name = setting("dbfilename").await.unwrap_or_else(|| DUMP.to_owned());
        if name != DUMP {
            return Err(RedisError::Setting(format!(
                "Redis calls its snapshot `{name}`: set `dbfilename {DUMP}`"
            )));
        }
        let dir = setting("dir")
            .await
            .map_or_else(|| self.dir.clone(), PathBuf::from);
        let same = |path: &Path| fs::canonicalize(path).ok();
        if same(&dir) != same(&self.dir) {
            return Err(RedisError::Setting(format!(
                "Redis keeps its state in {}, and state.dir is {}",
                dir.display(),
                self.dir.display()
            )));
        }
        Ok(self.dir.join(DUMP))
    }

    /// Copies the snapshot: the server replaces it by a rename, so an open one stays whole.
    async fn receive(
        &self,
        store: &CheckpointStore,
        snapshot: &Path,
        owner: Owner,
    ) -> Result<Work, CheckpointError> {
        let found = fs::metadata(&self.dir).map_err(at(&self.dir))?;
        let work = work::make(&self.work_dir, owner)?;
        let (from, store, left) = (snapshot.to_owned(), store.clone(), self.free_bytes_min);
        unblock_behind(&self.background, move || {
            let data = work.path_of(work::DATA);
            let to = data.join(DUMP);
            let made = work.make(work::DATA).map_err(at(&data))?;
            let mut source = fs::File::options()
                .read(true)
                .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
                .open(&from)
                .map_err(at(&from))?;
            let original = source.metadata().map_err(at(&from))?;
            work::refuse_full_disk(work.path(), &store, original.len(), left)?;
            let mut copy = made.create(DUMP).map_err(at(&to))?;
            std::io::copy(&mut source, &mut copy).map_err(at(&to))?;
            let root = rustix::process::geteuid().is_root();
            if root {
                made.give(Path::new(DUMP), original.uid(), original.gid())
                    .map_err(at(&to))?;
            }
            copy.set_permissions(fs::Permissions::from_mode(original.mode() & 0o7777))
                .map_err(at(&to))?;
            // Last: until then nobody else can enter it.
            if root {
                made.give(Path::new(""), found.uid(), found.gid())
                    .map_err(at(&data))?;
            }
            made.set_mode(found.mode()).map_err(at(&data))?;
            Ok(work)
        })
        .await
    }

    /// Runs the shadow on the work directory and notes what it showed.
    async fn shadow(&self, owner: Owner, before: Option<&Before>, run: &mut ShadowRun) {
        let begun = Instant::now();
        let shadowed = tokio::time::timeout(self.timeout, server::prove(self, owner, before, run));
        if Box::pin(shadowed).await.is_err() {
            let late = format!("the shadow run took longer than {:?}", self.timeout);
            run.push(Check::new("time", Finding::Unknown(late)), begun);
        }
        run.reached(State::Shadowed, begun.elapsed());
    }

    fn password(&self) -> Result<Option<String>, CheckpointError> {
        self.password_file
            .as_ref()
            .map(|path| {
                let text = fs::read_to_string(path).map_err(at(path))?;
                Ok(text.trim_end_matches(['\r', '\n']).to_owned())
            })
            .transpose()
    }
}

/// Finds a program of Redis: `THERIAC_REDIS_BIN` alone where it is set, else `PATH` and the usual directories.
///
/// # Errors
/// [`RedisError::NoBinary`].
pub fn program(name: &str) -> Result<PathBuf, RedisError> {
    let dirs: Vec<PathBuf> = match std::env::var_os("THERIAC_REDIS_BIN") {
        Some(dir) => vec![dir.into()],
        None => std::env::var_os("PATH")
            .iter()
            .flat_map(std::env::split_paths)
            .chain(["/usr/local/bin".into(), "/usr/bin".into()])
            .collect(),
    };
    let found = dirs.iter().map(|dir| dir.join(name)).find(|path| path.is_file());
    found.ok_or_else(|| RedisError::NoBinary {
        program: name.to_owned(),
        looked: format!("looked in {} directories", dirs.len()),
    })
}

/// As whom the shadow runs: the directory's owner where we are root, else we.
fn owner(dir: &Path) -> Result<Owner, CheckpointError> {
    let found = fs::metadata(dir).map_err(at(dir))?;
    Ok(if rustix::process::geteuid().is_root() {
        Owner {
            uid: found.uid(),
            gid: found.gid(),
        }
    } else {
        Owner {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        }
    })
}

/// What a file that takes the place of another does not have in common with it. The time tells two apart when another snapshot was
/// between them, so that the number was free again.
fn identity(path: &Path) -> Option<(u64, u64, i64, i64)> {
    let found = path.symlink_metadata().ok()?;
    Some((found.dev(), found.ino(), found.mtime(), found.mtime_nsec()))
}

/// A field of `INFO`.
fn value<'a>(info: &'a str, key: &str) -> Option<&'a str> {
    info.lines()
        .find_map(|line| line.trim_end().strip_prefix(key)?.strip_prefix(':'))
}

fn number(info: &str, key: &str) -> Option<u64> {
    value(info, key)?.parse().ok()
}

/// Keys of all databases, by `INFO keyspace`.
fn keys(info: &str) -> u64 {
    info.lines()
        .filter_map(|line| {
            let fields = line.strip_prefix("db")?.split_once(":keys=")?.1;
            fields.split(',').next()?.parse::<u64>().ok()
        })
        .sum()
}

const DUMP: &str = "dump.rdb";
const ASK_EVERY: Duration = Duration::from_millis(50);
/// Longest time for one answer.
const ASK_MAX: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_is_read_by_field() {
        let info = "# Persistence\r\naof_enabled:0\r\nrdb_last_bgsave_status:ok\r\n# Keyspace\r\ndb0:keys=12,expires=1,avg_ttl=0\r\ndb7:keys=3,expires=0\r\n";
        assert_eq!(number(info, "aof_enabled"), Some(0));
        assert_eq!(value(info, "rdb_last_bgsave_status"), Some("ok"));
        assert_eq!((value(info, "aof"), keys(info), keys("")), (None, 15, 0));
    }
}
