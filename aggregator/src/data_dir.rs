//! The data directory: where each thing lies, who may read it, and one process at a time.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// Name of the aggregator's identity file in `identity/`.
pub const IDENTITY: &str = "aggregator";

/// Name of the configuration file that `init` writes.
const CONFIG: &str = "aggregator.toml";

/// Why the data directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataDirError {
    /// There is none, or it is not one of ours.
    #[error("{path} is no aggregator's data directory: {missing} is missing")]
    NotInitialised {
        /// The directory.
        path: PathBuf,
        /// What was looked for.
        missing: &'static str,
    },
    /// There was one, and a part of it is gone.
    #[error("{path} holds an aggregator ({found}), but {missing} is missing")]
    Incomplete {
        /// The directory.
        path: PathBuf,
        /// What is there.
        found: &'static str,
        /// What is not.
        missing: &'static str,
    },
    /// `init` would overwrite one.
    #[error("{path} already holds an aggregator ({found}); nothing was changed")]
    Occupied {
        /// The directory.
        path: PathBuf,
        /// What was found.
        found: &'static str,
    },
    /// Another process works on it.
    #[error("{path} is in use by another aggregator (process {holder})")]
    Locked {
        /// The directory.
        path: PathBuf,
        /// Its process id, as the lock file says.
        holder: String,
    },
    /// A file that others must not read is readable by them.
    #[error("{path} has mode {mode:03o}, others could read it: it must be {wanted:03o}")]
    Mode {
        /// The file or directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// The permission bits that are right.
        wanted: u32,
    },
    /// The file system refused.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl DataDirError {
    /// What to do next.
    pub fn hint(&self) -> String {
        match self {
            Self::NotInitialised { .. } => {
                "correct data_dir, or make an aggregator in an empty directory with `theriac-aggregator init --dir DIR`".into()
            }
            Self::Incomplete { missing, .. } => format!(
                "restore {missing} from a backup of the data directory; without one begin a new federation with `init` in \
                 another directory, where every site enrols anew"
            ),
            Self::Occupied { .. } => {
                "choose another --dir; an existing federation is never overwritten".into()
            }
            Self::Locked { holder, .. } => {
                format!("stop process {holder} first; two aggregators on one directory would break rounds")
            }
            Self::Mode { path, wanted, .. } => format!("run `chmod {wanted:o} {}`", path.display()),
            Self::Io { .. } => "check that the directory exists, belongs to this user and has space".into(),
        }
    }
}

/// Paths within a data directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataDir {
    root: PathBuf,
}

impl DataDir {
    /// The directory at `root`; looks at nothing yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }
    /// The configuration file that `init` writes.
    pub fn config(&self) -> PathBuf {
        self.root.join(CONFIG)
    }
    /// The SQLite file.
    pub fn database(&self) -> PathBuf {
        self.root.join("aggregator.db")
    }
    /// Payloads too large for a row.
    pub fn blobs(&self) -> PathBuf {
        self.root.join("blobs")
    }
    /// Where rows of a round lie that have no room in memory.
    pub fn spill(&self) -> PathBuf {
        self.root.join("spill")
    }
    /// The authority that issues aggregators.
    pub fn aggregator_authority(&self) -> PathBuf {
        self.root.join("authority/aggregators")
    }
    /// The authority that issues edges.
    pub fn edge_authority(&self) -> PathBuf {
        self.root.join("authority/edges")
    }
    /// Folder of this aggregator's own key and certificate.
    pub fn identity(&self) -> PathBuf {
        self.root.join("identity")
    }
    /// Seed of the audit log's signing key.
    pub fn audit_key(&self) -> PathBuf {
        self.root.join("audit.key")
    }
    /// Ledger of the noise that is added here.
    pub fn central_ledger(&self) -> PathBuf {
        self.root.join("central-ledger.log")
    }
    /// Bound addresses of the running server.
    pub fn addresses(&self) -> PathBuf {
        self.root.join("addresses.json")
    }

    /// The first sign of an aggregator that is in the directory: `init` refuses it then.
    pub(crate) fn occupied_by(&self) -> Option<&'static str> {
        [
            (self.database(), "aggregator.db"),
            (self.aggregator_authority(), "authority/aggregators"),
            (self.edge_authority(), "authority/edges"),
            (self.audit_key(), "audit.key"),
            (self.config(), CONFIG),
        ]
        .into_iter()
        .find_map(|(path, found)| path.exists().then_some(found))
    }

    /// Checks that `init` has made it and that nobody else can read it.
    ///
    /// # Errors
    /// [`DataDirError::NotInitialised`], [`DataDirError::Incomplete`], [`DataDirError::Mode`].
    pub fn check(&self) -> Result<(), DataDirError> {
        for (path, missing) in [
            (self.database(), "aggregator.db"),
            (self.aggregator_authority(), "authority/aggregators"),
            (self.edge_authority(), "authority/edges"),
            (self.identity(), "identity"),
            (self.audit_key(), "audit.key"),
        ] {
            if !path.exists() {
                let path = self.root.clone();
                // A configuration alone is none: whoever wrote it by hand may have named the wrong directory.
                let found = self.occupied_by().filter(|found| *found != CONFIG);
                return Err(match found {
                    Some(found) => DataDirError::Incomplete { path, found, missing },
                    None => DataDirError::NotInitialised { path, missing },
                });
            }
        }
        refuse_wider(&self.root, 0o700)?;
        refuse_wider(&self.audit_key(), 0o600)
    }

    /// Takes the directory for this process until the guard is dropped (or the process dies).
    ///
    /// # Errors
    /// [`DataDirError::Locked`] when another process has it.
    pub fn lock(&self) -> Result<DataDirLock, DataDirError> {
        let path = self.root.join("lock");
        let io = |source| DataDirError::Io {
            what: "lock",
            path: path.clone(),
            source,
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // Only for the message: an unreadable lock file changes nothing.
                drop(file.read_to_string(&mut holder));
                let holder = holder.trim().to_owned();
                let holder = if holder.is_empty() {
                    "unknown".to_owned()
                } else {
                    holder
                };
                return Err(DataDirError::Locked {
                    path: self.root.clone(),
                    holder,
                });
            }
            Err(fs::TryLockError::Error(source)) => return Err(io(source)),
        }
        file.set_len(0).and_then(|()| file.rewind()).map_err(io)?;
        write!(file, "{}", std::process::id()).map_err(io)?;
        Ok(DataDirLock { _file: file })
    }
}

/// Held by the one process that works on a data directory.
#[derive(Debug)]
pub struct DataDirLock {
    _file: File,
}

/// Refuses a file or directory with permission bits beyond `wanted`.
///
/// # Errors
/// [`DataDirError::Mode`], [`DataDirError::Io`].
pub fn refuse_wider(path: &Path, wanted: u32) -> Result<(), DataDirError> {
    let metadata = fs::metadata(path).map_err(|source| DataDirError::Io {
        what: "look at",
        path: path.to_owned(),
        source,
    })?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & !wanted == 0 {
        Ok(())
    } else {
        Err(DataDirError::Mode {
            path: path.to_owned(),
            mode,
            wanted,
        })
    }
}

/// Makes a directory (and its parents) that only its owner can enter.
pub(crate) fn make_private(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Makes a new file that only its owner can read.
pub(crate) fn create_private(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

/// Replaces a small file in one step: write, sync, rename, sync the directory.
pub(crate) fn replace_file(path: &Path, text: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let write = || {
        drop(fs::remove_file(&temporary));
        let mut file = create_private(&temporary)?;
        file.write_all(text)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().inspect_err(|_| drop(fs::remove_file(&temporary)))?;
    path.parent()
        .map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_holder_of_a_directory_is_refused_with_the_first_ones_id() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::new(dir.path());
        let held = data.lock().unwrap();
        let error = data.lock().unwrap_err();
        assert!(
            matches!(&error, DataDirError::Locked { holder, .. } if *holder == std::process::id().to_string())
        );
        assert!(error.hint().contains(&std::process::id().to_string()));
        drop(held);
        assert!(data.lock().is_ok());
    }

    #[test]
    fn refuses_files_that_others_can_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.key");
        replace_file(&path, b"x").unwrap();
        assert!(refuse_wider(&path, 0o600).is_ok());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = refuse_wider(&path, 0o600).unwrap_err();
        assert!(
            error.to_string().contains("640") && error.hint().contains("chmod 600"),
            "{error}"
        );
    }

    #[test]
    fn what_is_gone_from_a_directory_is_not_to_be_made_anew() {
        let temporary = tempfile::tempdir().unwrap();
        let root = temporary.path().join("data");
        crate::init::init(crate::init::InitOptions::new(&root, "demo")).unwrap();
        let data = DataDir::new(&root);
        data.check().unwrap();
        for (path, missing) in [
            (data.audit_key(), "audit.key"),
            (root.join("authority"), "authority/aggregators"),
        ] {
            let aside = temporary.path().join("aside");
            fs::rename(&path, &aside).unwrap();
            let error = data.check().unwrap_err();
            assert!(error.to_string().contains(missing), "{error}");
            let hint = error.hint();
            assert!(
                hint.contains("from a backup") && !hint.contains("make one"),
                "{hint}"
            );
            fs::rename(&aside, &path).unwrap();
        }
    }

    #[test]
    fn directory_without_init_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let error = DataDir::new(dir.path()).check().unwrap_err();
        assert!(
            matches!(
                error,
                DataDirError::NotInitialised {
                    missing: "aggregator.db",
                    ..
                }
            ),
            "{error}"
        );
    }
}
