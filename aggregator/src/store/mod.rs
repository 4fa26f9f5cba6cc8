//! Durable state: one SQLite file and a folder of content-addressed blobs.
//!
//! - [`Database`] is one connection, used directly by the commands.
//! - [`Store`] is what the running server shares: one thread owns the writing connection and commits everything that waits
//!   in one transaction (**group commit**), so a hundred uploads cost one synchronisation of the disk.
//! - [`records`] (sites), [`models`], [`rounds`], [`history`], [`evidence`], [`sums`], [`validation`] and [`tokens`] are what is read and written; [`schema`] holds the tables,
//!   [`blob`] payloads too large for a row.
//!
//! Acknowledged means durable: a write's answer comes after its commit returned with `synchronous = FULL`. The one
//! exception is [`Urgency::Lazy`], which says so.

pub mod blob;
pub mod evidence;
pub mod heads;
pub mod history;
pub mod late;
pub mod ledgers;
pub mod models;
pub mod records;
pub mod rounds;
pub mod schema;
pub mod sums;
pub mod tokens;
mod uploads;
pub mod validation;
mod writer;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, OpenFlags, TransactionBehavior};
use theriac_audit::leaf::{AuditEvent, AuditRecord};
use theriac_audit::tree::leaf_hash;
use theriac_command::problem::Problem;
use theriac_protocol::units::{Digest, Timestamp};

use self::blob::BlobStore;
use crate::data_dir::DataDir;

pub use writer::{Store, StoreThread, Urgency};

/// Why something could not be stored or read.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The disk, or the quota, is full. Nothing that was acknowledged is lost; reads go on.
    #[error("the disk is full: {0}")]
    Full(String),
    /// Another process holds the database for too long.
    #[error("the database stayed locked by another process for 10 s")]
    Locked,
    /// The file is some other program's.
    #[error("this SQLite file belongs to another program (application id {found:#x})")]
    NotAStore {
        /// Its application id.
        found: i64,
    },
    /// The file was written by a newer build.
    #[error("the store has version {found}, this build knows up to {newest}")]
    Version {
        /// Version of the file.
        found: i64,
        /// Newest known one.
        newest: i64,
    },
    /// A row's blob is gone.
    #[error("the blob of {row} is missing: {path}")]
    BlobMissing {
        /// Which row.
        row: String,
        /// Where it should be.
        path: PathBuf,
    },
    /// A row's blob has other bytes.
    #[error("the blob of {row} is corrupt: {path} has SHA-256 {found}, expected {expected}")]
    BlobCorrupt {
        /// Which row.
        row: String,
        /// The file.
        path: PathBuf,
        /// The name it has.
        expected: Digest,
        /// What its bytes give.
        found: Digest,
    },
    /// The payload was deleted after its retention.
    #[error("the payload of {row} was deleted after limits.rounds_kept rounds")]
    Gone {
        /// Which row.
        row: String,
    },
    /// No such row.
    #[error("there is no {what} {name}")]
    NotFound {
        /// Kind of thing.
        what: &'static str,
        /// Which.
        name: String,
    },
    /// A rule of the store forbids it.
    #[error("{0}")]
    Conflict(String),
    /// A row does not read back.
    #[error("{row} does not read back: {reason}")]
    Corrupt {
        /// Which row.
        row: String,
        /// What is wrong.
        reason: String,
    },
    /// The writing thread is gone: the server is stopping.
    #[error("the store is closed")]
    Closed,
    /// The file system refused.
    #[error("cannot {what} {path}: {reason}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// SQLite refused.
    #[error("the database refused: {0}")]
    Database(#[source] Arc<rusqlite::Error>),
}

impl StoreError {
    /// What to do next.
    pub fn hint(&self) -> String {
        match self {
            Self::Full(_) => "make room on the volume of data_dir; the aggregator goes on by itself".into(),
            Self::Locked => "find out which program holds aggregator.db open, for example with `fuser`".into(),
            Self::NotAStore { .. } => "data_dir points at the wrong directory".into(),
            Self::Version { .. } => "install the newer build again, or restore a backup of the data directory".into(),
            Self::BlobMissing { .. } | Self::BlobCorrupt { .. } => {
                "restore the file from a backup, or end the round with another set of edges; nothing is guessed".into()
            }
            Self::Gone { .. } => "raise limits.rounds_kept to keep more".into(),
            Self::NotFound { .. } => "list what there is with the `list` command of the same name".into(),
            Self::Conflict(_) => "nothing was changed; `sites list` and `models list` show what is".into(),
            Self::Closed => "try again".into(),
            Self::Corrupt { .. } | Self::Database(_) => {
                "check the file with `sqlite3 aggregator.db 'PRAGMA integrity_check'` and restore a backup if it fails".into()
            }
            Self::Io { .. } => "check the directory's owner, mode and space".into(),
        }
    }

    /// As a person meets it.
    pub fn problem(&self) -> Problem {
        let problem = match self {
            Self::Locked | Self::Full(_) => Problem::temporary("TH-E0704", self),
            Self::NotFound { .. } | Self::Gone { .. } => Problem::failed("TH-E0719", self),
            Self::Conflict(_) => Problem::failed("TH-E0720", self),
            _ => Problem::failed("TH-E0704", self),
        };
        problem.hint(self.hint())
    }

    pub(crate) fn io(what: &'static str, path: &Path, error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::Full(format!("cannot {what} {}", path.display()))
            }
            _ => Self::Io {
                what,
                path: path.to_owned(),
                reason: error.to_string(),
            },
        }
    }
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DiskFull) => Self::Full("aggregator.db cannot grow".into()),
            Some(rusqlite::ErrorCode::DatabaseBusy) => Self::Locked,
            _ => Self::Database(Arc::new(error)),
        }
    }
}

/// One connection to the store, with its blobs.
#[derive(Debug)]
pub struct Database {
    connection: Connection,
    blobs: Arc<BlobStore>,
}

impl Database {
    /// Makes a new store.
    ///
    /// # Errors
    /// [`StoreError::Database`] when there is one already, [`StoreError::Io`].
    pub fn create(dir: &DataDir) -> Result<Self, StoreError> {
        // Made by us first, so that it has its mode before SQLite writes to it.
        let path = dir.database();
        crate::data_dir::create_private(&path).map_err(|error| StoreError::io("make", &path, &error))?;
        Self::open(dir)
    }

    /// Opens the store and brings it to this build's version.
    ///
    /// # Errors
    /// [`StoreError::NotAStore`], [`StoreError::Version`], [`StoreError::Database`].
    pub fn open(dir: &DataDir) -> Result<Self, StoreError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut connection = Connection::open_with_flags(dir.database(), flags)?;
        schema::prepare(&connection)?;
        schema::migrate(&mut connection)?;
        let blobs = Arc::new(BlobStore::open(&dir.blobs())?);
        Ok(Self { connection, blobs })
    }

    /// The connection, for reading.
    pub fn read(&self) -> &Connection {
        &self.connection
    }

    /// The blobs.
    pub fn blobs(&self) -> &Arc<BlobStore> {
        &self.blobs
    }

    /// Does `work` in one transaction: all of it is durable when this returns, or none.
    ///
    /// # Errors
    /// Those of `work`, [`StoreError::Full`], [`StoreError::Locked`].
    pub fn write<T>(
        &mut self,
        work: impl FnOnce(&Work<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let transaction = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        let value = work(&Work {
            connection: &transaction,
        })?;
        transaction.commit()?;
        Ok(value)
    }
}

/// An open transaction.
#[derive(Debug)]
pub struct Work<'a> {
    connection: &'a Connection,
}

impl Work<'_> {
    /// The connection inside the transaction.
    pub fn connection(&self) -> &Connection {
        self.connection
    }

    /// Appends a fact to the audit log, as part of this transaction. Gives its leaf index.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Full`].
    pub fn audit(&self, event: AuditEvent) -> Result<u64, StoreError> {
        let line = AuditRecord {
            at: wall_clock(),
            event,
        }
        .to_line();
        let next = "SELECT coalesce(max(idx) + 1, 0) FROM audit_leaf";
        let index: i64 = self
            .connection
            .prepare_cached(next)?
            .query_row([], |row| row.get(0))?;
        self.connection
            .prepare_cached("INSERT INTO audit_leaf (idx, hash, line) VALUES (?1, ?2, ?3)")?
            .execute((index, leaf_hash(line.as_bytes()).0, &line))?;
        Ok(from_sql(index))
    }
}

/// Wall clock, for records only.
pub fn wall_clock() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// Counters in SQLite are signed; ours stay far below the edge.
pub(crate) fn to_sql(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// The way back; nothing negative is ever written.
pub(crate) fn from_sql(number: i64) -> u64 {
    u64::try_from(number).unwrap_or_default()
}

/// Reads a JSON word of an enum, or writes one.
pub(crate) fn word<T: serde::Serialize>(value: T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        Ok(other) => other.to_string(),
        Err(error) => error.to_string(),
    }
}
