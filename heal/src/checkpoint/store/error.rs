//! Why a checkpoint could not be taken, verified or restored.

use std::path::PathBuf;

use crate::checkpoint::which::Which;

/// Why a checkpoint could not be taken, verified or restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// Too little room. Nothing was changed.
    #[error("{path}: {needed} bytes are needed and {free} are free: make room, then try again")]
    DiskFull {
        /// Where.
        path: PathBuf,
        /// Bytes needed, with those that must stay free.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// The checkpoint is not what its manifest says.
    #[error("checkpoint {path} is corrupt: {what}")]
    Corrupt {
        /// The checkpoint.
        path: PathBuf,
        /// What differs: expected and found.
        what: String,
    },
    /// There is no valid checkpoint.
    #[error("{path} holds no valid checkpoint ({refused} were refused){}", unread.as_ref().map_or_else(String::new, |words| format!("; the first that could not be read: {words}")))]
    NoneValid {
        /// The store.
        path: PathBuf,
        /// How many were refused.
        refused: usize,
        /// Why the first one could not be read, where that was so.
        unread: Option<String>,
    },
    /// None has the number that was named.
    #[error("{place} holds no valid checkpoint {named}; valid are: {}", if names.is_empty() { "none".to_owned() } else { names.join(", ") })]
    NoSuch {
        /// The store.
        place: String,
        /// What was named.
        named: Which,
        /// Those that are there.
        names: Vec<String>,
    },
    /// Two have the number that was named.
    #[error("{place} holds more than one checkpoint of number {sequence}: name one of {}", names.join(", "))]
    SeveralOfNumber {
        /// The store.
        place: String,
        /// The number.
        sequence: u64,
        /// Their numbers and times, which tell them apart.
        names: Vec<String>,
    },
    /// The copy did not pass the service's own check.
    #[error("the copy of {path} did not pass the state check: {detail}")]
    NotGood {
        /// The state.
        path: PathBuf,
        /// What the check said.
        detail: String,
    },
    /// The copy is bad; it was set aside, or it lies where it was found.
    #[error("the copy in {path} is not valid: {reason}")]
    Invalid {
        /// Where it is.
        path: PathBuf,
        /// Which check refused it, and why.
        reason: String,
    },
    /// Whether the copy is good could not be found out, so it was not kept.
    #[error("a copy for {path} could not be proved: {detail}")]
    Unproven {
        /// The store or the checkpoint.
        path: PathBuf,
        /// Which check could not be made, and why.
        detail: String,
    },
    /// The server or one of its programs did not do as asked.
    #[error(transparent)]
    Postgres(Box<crate::postgres::PostgresError>),
    /// The Redis server did not do as asked.
    #[error(transparent)]
    Redis(Box<crate::checkpoint::redis::RedisError>),
    /// The state kept changing while it was copied.
    #[error("{path} kept changing while it was copied ({attempts} attempts)")]
    Changing {
        /// What vanished or changed.
        path: PathBuf,
        /// How often it was tried.
        attempts: u32,
    },
    /// Too many directories are set aside.
    #[error(
        "{found} directories are set aside beside {path}, {max} are allowed: look at them and move them away"
    )]
    TooManySetAside {
        /// The state or the store.
        path: PathBuf,
        /// How many there are.
        found: usize,
        /// How many are allowed.
        max: usize,
    },
    /// The state has more entries than allowed.
    #[error(
        "{path} has more than {max} files and folders: raise the limit or name a smaller state directory"
    )]
    TooManyEntries {
        /// The state.
        path: PathBuf,
        /// The limit.
        max: usize,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
}
