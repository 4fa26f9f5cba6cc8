//! The directory that holds all an edge keeps, mode 0700, used by one process at a time.
//!
//! | path | what |
//! |---|---|
//! | `edge.db` | incidents, intents, action budget, outbox, checkpoint list (SQLite) |
//! | `ledger.log` | privacy ledger, append-only and hash-chained |
//! | `model/` | global and local model with their cards |
//! | `keys/` | key and certificates of the federation, files 0600 |
//! | `checkpoints/SERVICE/` | copies of a service's state |
//! | `join.json` | who we are in which federation, and where its aggregator is |
//! | `http.addr` | address of the running edge's page |
//! | `ballast` | space to let go of when the disk fills up |
//! | `lock` | held while a process runs |

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use theriac_protocol::units::NodeId;

/// Largest size of the ballast file, in bytes: enough for SQLite's largest transaction here.
const BALLAST_BYTES_MAX: u64 = 4 << 20;
/// Room below which the ballast is let go before a start.
const START_BYTES: u64 = 1 << 20;
/// Smallest size that helps: some records of healing.
const BALLAST_BYTES_MIN: u64 = 256 << 10;
/// The ballast takes at most this part of the room: 1/8.
const BALLAST_PART: u64 = 8;

/// How often, and after which pause, the lock is tried again.
const LOCK_ATTEMPTS: u32 = 4;
const LOCK_PAUSE: Duration = Duration::from_millis(25);

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateDirError {
    /// Something in it cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// Another process works here.
    #[error("another theriac-edge (process {holder}) uses the state directory {path}")]
    InUse {
        /// The directory.
        path: PathBuf,
        /// The process id it wrote, or `unknown`.
        holder: String,
    },
    /// Others may read it.
    #[error("{path} has mode {mode:04o}, others could read what is in it; run: chmod 700 {path}")]
    Mode {
        /// The directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A file of ours does not parse.
    #[error("{path} is damaged: {reason}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// What `join` learnt; the reason that `run` federates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Joined {
    /// Name of this site, as the token said.
    pub node: NodeId,
    /// Name of the federation.
    pub federation: String,
    /// `HOST:PORT` of the aggregator's main listener.
    pub aggregator: String,
}

/// An opened state directory.
#[derive(Debug, Clone)]
pub struct StateDir {
    root: PathBuf,
}

/// Held while a process works in the directory; the kernel lets go of it when the process ends, however it ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl StateDir {
    /// Opens the directory, making it (mode 0700) where it is missing.
    ///
    /// # Errors
    /// [`StateDirError::Mode`] when others may read it, [`StateDirError::Io`] when it cannot be made.
    pub fn open(root: &Path) -> Result<Self, StateDirError> {
        let at = |source| StateDirError::Io {
            path: root.to_owned(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(root)
            .map_err(at)?;
        let mode = std::fs::metadata(root).map_err(at)?.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(StateDirError::Mode {
                path: root.to_owned(),
                mode,
            });
        }
        let dir = Self {
            root: root.to_owned(),
        };
        for inner in [dir.model(), dir.keys(), dir.checkpoints()] {
            let at = |source| StateDirError::Io {
                path: inner.clone(),
                source,
            };
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&inner)
                .map_err(at)?;
        }
        Ok(dir)
    }

    /// The directory as it is, for commands that only look; makes nothing.
    pub fn existing(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// Takes the directory for this process.
    ///
    /// # Errors
    /// [`StateDirError::InUse`] when another process holds it.
    pub fn lock(&self) -> Result<Lock, StateDirError> {
        let path = self.root.join("lock");
        let at = |source| StateDirError::Io {
            path: path.clone(),
            source,
        };
        let mut options = OpenOptions::new();
        let file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(at)?;
        // A command that only looks holds the lock for a moment; an edge holds it for good.
        let mut attempts = 0;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::WOULDBLOCK) if attempts < LOCK_ATTEMPTS => {
                    attempts += 1;
                    std::thread::sleep(LOCK_PAUSE);
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    let holder = std::fs::read_to_string(&path)
                        .unwrap_or_default()
                        .trim()
                        .to_owned();
                    let holder = if holder.is_empty() {
                        "unknown".to_owned()
                    } else {
                        holder
                    };
                    return Err(StateDirError::InUse {
                        path: self.root.clone(),
                        holder,
                    });
                }
                Err(errno) => return Err(at(errno.into())),
            }
        }
        // The number is for people only; on a full disk the lock holds without it.
        let noted = file
            .set_len(0)
            .and_then(|()| (&file).write_all(std::process::id().to_string().as_bytes()));
        if let Err(error) = noted {
            tracing::warn!(%error, "cannot note the process id in the lock file");
        }
        Ok(Lock { _file: file })
    }

    /// Whether a process works in the directory now. Makes nothing.
    pub fn is_in_use(&self) -> bool {
        let Ok(file) = File::open(self.root.join("lock")) else {
            return false;
        };
        flock(&file, FlockOperation::NonBlockingLockShared) == Err(rustix::io::Errno::WOULDBLOCK)
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The SQLite file.
    pub fn database(&self) -> PathBuf {
        self.root.join("edge.db")
    }

    /// The privacy ledger.
    pub fn ledger(&self) -> PathBuf {
        self.root.join("ledger.log")
    }

    /// The default privacy policy.
    pub fn privacy_policy(&self) -> PathBuf {
        self.root.join("privacy.toml")
    }

    /// This edge's own key for policies, used where nobody else's is pinned.
    pub fn policy_key(&self) -> PathBuf {
        self.keys().join("policy.key")
    }

    /// The key that reports are signed with where policies are signed by somebody else.
    pub fn report_key(&self) -> PathBuf {
        self.keys().join("report.key")
    }

    /// While it exists no action is begun.
    pub fn stop_file(&self) -> PathBuf {
        self.root.join("healing.stopped")
    }

    /// While it exists the proxy before that service turns new requests away.
    pub fn drain_file(&self, service: &str) -> PathBuf {
        self.root.join(format!("drained-{service}"))
    }

    /// What is to be undone for that service in groups of processes.
    pub fn bounds_file(&self, service: &str) -> PathBuf {
        self.root.join(format!("bounds-{service}.json"))
    }

    /// All of them, also of services that are not configured any more.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn bounds_files(&self) -> io::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in self.root.read_dir()? {
            let path = entry?.path();
            let name = path
                .file_stem()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            let json = path.extension().is_some_and(|extension| extension == "json");
            if json && name.starts_with("bounds-") {
                found.push(path);
            }
        }
        Ok(found)
    }

    /// The highest version of the policy of healing that held here.
    pub fn healing_version(&self) -> PathBuf {
        self.root.join("healing.version")
    }

    /// What the policy was asked and said.
    pub fn rulings(&self) -> PathBuf {
        self.root.join("rulings.jsonl")
    }

    /// What went off-site of a service's checkpoints.
    pub fn offsite(&self, service: &str) -> PathBuf {
        self.checkpoints().join(format!("{service}.offsite"))
    }

    /// What was learnt of when to take a service's checkpoints.
    pub fn schedule(&self, service: &str) -> PathBuf {
        self.checkpoints().join(format!("{service}.schedule"))
    }

    /// Where models are kept.
    pub fn model(&self) -> PathBuf {
        self.root.join("model")
    }

    /// Where keys and certificates are kept.
    pub fn keys(&self) -> PathBuf {
        self.root.join("keys")
    }

    /// Where copies of services' state are kept.
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// What `join` learnt, or `None` for an edge that never joined.
    ///
    /// # Errors
    /// [`StateDirError::Damaged`] when the file does not parse.
    pub fn joined(&self) -> Result<Option<Joined>, StateDirError> {
        let path = self.root.join("join.json");
        match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|error| StateDirError::Damaged {
                    path,
                    reason: format!("{error}; run `theriac-edge join` again"),
                }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(StateDirError::Io { path, source }),
        }
    }

    /// Writes what `join` learnt, durably.
    ///
    /// # Errors
    /// [`StateDirError::Io`]
    pub fn save_joined(&self, joined: &Joined) -> Result<(), StateDirError> {
        let path = self.root.join("join.json");
        let text = serde_json::to_vec_pretty(joined).map_err(|error| StateDirError::Damaged {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        write_durably(&path, &text).map_err(|source| StateDirError::Io { path, source })
    }

    /// Tells other commands where the running edge's page is.
    ///
    /// # Errors
    /// [`StateDirError::Io`]
    pub fn save_http_address(&self, address: SocketAddr) -> Result<(), StateDirError> {
        let path = self.root.join("http.addr");
        write_durably(&path, address.to_string().as_bytes())
            .map_err(|source| StateDirError::Io { path, source })
    }

    /// Where the running (or last) edge's page is, if it ever ran.
    pub fn http_address(&self) -> Option<SocketAddr> {
        std::fs::read_to_string(self.root.join("http.addr"))
            .ok()?
            .trim()
            .parse()
            .ok()
    }

    /// Bytes that this process may still write on the directory's file system.
    ///
    /// # Errors
    /// The error of the file system.
    pub fn free_bytes(&self) -> io::Result<u64> {
        let space = rustix::fs::statvfs(&self.root)?;
        Ok(space.f_bavail.saturating_mul(space.f_frsize))
    }

    /// Writes the ballast file where it is missing or small for the room there is now: an eighth of the `free` bytes, at
    /// most 4 MiB and at least 256 KiB. Returns whether there is one.
    pub fn keep_ballast(&self, free: u64) -> bool {
        let path = self.root.join("ballast");
        let kept = std::fs::metadata(&path).map_or(0, |found| found.len());
        let wanted = (free.saturating_add(kept) / BALLAST_PART).min(BALLAST_BYTES_MAX);
        if kept >= BALLAST_BYTES_MIN && kept >= wanted / 2 {
            return true;
        }
        if wanted < BALLAST_BYTES_MIN {
            return kept > 0;
        }
        // Written, not only reserved: some file systems promise space for holes that they do not have.
        let bytes = usize::try_from(wanted).unwrap_or_default();
        let written = write_durably(&path, &vec![0xa5; bytes]);
        if written.is_err() {
            self.release_ballast();
        }
        written.is_ok()
    }

    /// Lets the ballast go where there is no room to start with.
    pub(crate) fn make_room(&self) {
        if self.free_bytes().is_ok_and(|free| free < START_BYTES) && self.release_ballast() {
            tracing::warn!(path = %self.root.display(), "the disk of the state directory is full: released the ballast to start");
        }
    }

    /// Gives the ballast's space back, so that the current commit can finish. Returns whether there was any.
    pub fn release_ballast(&self) -> bool {
        std::fs::remove_file(self.root.join("ballast")).is_ok()
    }
}

/// Whether a write found no room: on its file system, or in what its account may have there.
pub(crate) fn is_no_room(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// Write beside, sync, rename, sync the directory: after a crash there is the old file or the new one. Mode 0600.
pub(crate) fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let beside = path.with_extension("tmp");
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()
    })();
    if let Err(error) = written {
        // The half-written file must not eat the space that is missing; the first error is the one to tell.
        let _gone = std::fs::remove_file(&beside).is_ok();
        return Err(error);
    }
    std::fs::rename(&beside, path)?;
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_process_is_refused_with_the_first_ones_id() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::open(&root.path().join("state")).unwrap();
        assert!(!dir.is_in_use());
        let lock = dir.lock().unwrap();
        assert!(dir.is_in_use());
        let error = dir.lock().unwrap_err().to_string();
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        drop(lock);
        dir.lock().unwrap();
    }

    #[test]
    fn directory_is_private_and_a_wider_one_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("state");
        let dir = StateDir::open(&path).unwrap();
        for made in [dir.root().to_owned(), dir.model(), dir.keys(), dir.checkpoints()] {
            assert_eq!(
                std::fs::metadata(&made).unwrap().permissions().mode() & 0o7777,
                0o700,
                "{}",
                made.display()
            );
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let error = StateDir::open(&path).unwrap_err().to_string();
        assert!(error.contains("0755") && error.contains("chmod 700"), "{error}");
    }

    #[test]
    fn joined_survives_and_damage_is_told() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::open(&root.path().join("s")).unwrap();
        assert_eq!(dir.joined().unwrap(), None);
        let joined = Joined {
            node: "a".parse().unwrap(),
            federation: "f".into(),
            aggregator: "127.0.0.1:1".into(),
        };
        dir.save_joined(&joined).unwrap();
        assert_eq!(dir.joined().unwrap(), Some(joined));
        std::fs::write(dir.root().join("join.json"), "{").unwrap();
        assert!(dir.joined().unwrap_err().to_string().contains("join"));
    }

    #[test]
    fn ballast_is_kept_once_and_let_go() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::open(&root.path().join("s")).unwrap();
        assert!(dir.keep_ballast(1 << 30) && dir.keep_ballast(1 << 30));
        assert!(dir.release_ballast() && !dir.release_ballast());
    }

    #[test]
    fn ballast_is_an_eighth_of_little_room_and_grows_with_it() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::open(&root.path().join("s")).unwrap();
        let len = || std::fs::metadata(dir.root().join("ballast")).map_or(0, |found| found.len());
        assert!(!dir.keep_ballast(1 << 20), "128 KiB would help nobody");
        assert!(dir.keep_ballast(8 << 20));
        assert_eq!(len(), 1 << 20);
        assert!(dir.keep_ballast(100 << 10), "what is there stays");
        assert_eq!(len(), 1 << 20);
        assert!(dir.keep_ballast(1 << 30));
        assert_eq!(len(), 4 << 20);
    }

    #[test]
    fn failed_write_leaves_the_old_file() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a.json");
        write_durably(&path, b"old").unwrap();
        std::fs::create_dir(root.path().join("a.tmp")).unwrap();
        assert!(write_durably(&path, b"new").is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
    }
}
