//! A PostgreSQL server on this host: its programs, the account it belongs to, and sessions over its Unix socket.
//!
//! Nothing here travels over a network: a server is reached through its socket directory, as the account that its data directory
//! belongs to (`peer` or `trust` in `pg_hba.conf`). The server's programs refuse to run as root, so a healer that is root starts
//! them as that account.

pub mod binaries;
pub mod owner;
pub mod session;
pub mod tool;

use std::path::PathBuf;
use std::time::Duration;

/// Why something with PostgreSQL did not work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PostgresError {
    /// No directory with the server's programs was found.
    #[error(
        "PostgreSQL's programs were not found: {looked}. Install them or name their directory in THERIAC_PG_BIN"
    )]
    NoBinaries {
        /// Where was looked, and what was there.
        looked: String,
    },
    /// We may not act as the account that the server belongs to.
    #[error(
        "{path} belongs to user {wanted}, and this process is user {ours}: run it as that user or as root"
    )]
    OtherUser {
        /// The data directory.
        path: PathBuf,
        /// Its owner.
        wanted: u32,
        /// Who we are.
        ours: u32,
    },
    /// The server does not run as root.
    #[error("{path} belongs to root, and PostgreSQL refuses to run as root: give it an account of its own")]
    OwnedByRoot {
        /// The data directory.
        path: PathBuf,
    },
    /// A program could not be run.
    #[error("cannot run {program}: {source}")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// Something took too long.
    #[error("{what} took longer than {after:?}")]
    Timeout {
        /// What.
        what: String,
        /// How long was waited.
        after: Duration,
    },
    /// A program ended with an error.
    #[error("{program} ended with {status}: {said}")]
    Tool {
        /// The program.
        program: String,
        /// How it ended.
        status: String,
        /// What it said, cut.
        said: String,
    },
    /// No session.
    #[error("no session with {target}: {detail}")]
    Connect {
        /// Socket, user and database.
        target: String,
        /// The server's or the system's word.
        detail: String,
        /// The server's error code, where it gave one.
        code: Option<String>,
    },
    /// A statement failed.
    #[error("{what}: {detail}")]
    Query {
        /// What it was for.
        what: String,
        /// The server's word.
        detail: String,
        /// The server's error code, where it gave one.
        code: Option<String>,
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

pub(crate) fn at(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> PostgresError + use<> {
    let path = path.to_owned();
    move |source| PostgresError::Io { path, source }
}
