//! The file: its tables, how an older one is brought up, and how a foreign one is told apart.

use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use rusqlite::Connection;

use super::{StoreError, classify};

/// `THEE` in `application_id`, so that a foreign file is told apart.
const APPLICATION_ID: i32 = 0x5448_4545;
/// Version of the schema below.
const SCHEMA_VERSION: i32 = 4;

const SCHEMA: &str = "
CREATE TABLE incident (
    id INTEGER PRIMARY KEY, service TEXT NOT NULL, state TEXT NOT NULL, detected_ms INTEGER NOT NULL, body TEXT NOT NULL
) STRICT;
CREATE TABLE intent (
    id INTEGER PRIMARY KEY, incident INTEGER NOT NULL, service TEXT NOT NULL, action TEXT NOT NULL,
    decided_ms INTEGER NOT NULL, reason TEXT NOT NULL
) STRICT;
CREATE TABLE machine (id INTEGER PRIMARY KEY CHECK (id = 1), body TEXT NOT NULL) STRICT;
CREATE TABLE outbox (
    round INTEGER NOT NULL, nonce TEXT NOT NULL, payload_digest TEXT NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (round, nonce)
) STRICT;
CREATE TABLE ledger (id INTEGER PRIMARY KEY CHECK (id = 1), head TEXT NOT NULL, records INTEGER NOT NULL) STRICT;
CREATE TABLE checkpoint (
    service TEXT NOT NULL, sequence INTEGER NOT NULL, taken_ms INTEGER NOT NULL, files INTEGER NOT NULL,
    bytes INTEGER NOT NULL, PRIMARY KEY (service, sequence)
) STRICT;
CREATE TABLE approval (
    incident INTEGER NOT NULL, approve INTEGER NOT NULL CHECK (approve IN (0, 1)), plan TEXT NOT NULL, signature TEXT NOT NULL,
    PRIMARY KEY (incident, approve, plan, signature)
) STRICT;
CREATE TABLE new_normal (incident INTEGER PRIMARY KEY) STRICT;
";

/// From version 3: an approval was of an incident, not of a plan, and nobody signed it. What still waited there is asked for again.
const FROM_VERSION_3: &str = "
DROP TABLE approval;
CREATE TABLE approval (
    incident INTEGER NOT NULL, approve INTEGER NOT NULL CHECK (approve IN (0, 1)), plan TEXT NOT NULL, signature TEXT NOT NULL,
    PRIMARY KEY (incident, approve, plan, signature)
) STRICT;
";

/// From version 2: nobody could say that what an incident is about is normal now.
const FROM_VERSION_2: &str = "CREATE TABLE new_normal (incident INTEGER PRIMARY KEY) STRICT;";

/// From version 1: the outbox was keyed by the round alone, and the ledger's head was not kept.
const FROM_VERSION_1: &str = "
ALTER TABLE outbox RENAME TO outbox_1;
CREATE TABLE outbox (
    round INTEGER NOT NULL, nonce TEXT NOT NULL, payload_digest TEXT NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (round, nonce)
) STRICT;
INSERT INTO outbox (round, nonce, payload_digest, body) SELECT round, nonce, payload_digest, body FROM outbox_1;
DROP TABLE outbox_1;
CREATE TABLE ledger (id INTEGER PRIMARY KEY CHECK (id = 1), head TEXT NOT NULL, records INTEGER NOT NULL) STRICT;
";

pub(super) fn open(path: &Path) -> Result<Connection, StoreError> {
    let at = |error| classify(path, error);
    let existed = path.exists();
    // Made here and not by SQLite, which would leave it to the umask; its -wal and -shm take the mode of the file.
    // Where that fails SQLite fails too, and says why.
    drop(
        std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(path),
    );
    let mut connection = Connection::open(path).map_err(at)?;
    connection
        .execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;
             PRAGMA busy_timeout = 5000; PRAGMA wal_autocheckpoint = 200; PRAGMA journal_size_limit = 1048576;
             PRAGMA cache_size = -512;",
        )
        .map_err(at)?;
    let version: i32 = connection
        .query_row("PRAGMA user_version", [], |row| row.get(0))
        .map_err(at)?;
    if version == 0 && (!existed || is_empty(&connection).map_err(at)?) {
        let transaction = connection.transaction().map_err(at)?;
        transaction.execute_batch(SCHEMA).map_err(at)?;
        transaction
            .pragma_update(None, "application_id", APPLICATION_ID)
            .map_err(at)?;
        transaction
            .pragma_update(None, "user_version", SCHEMA_VERSION)
            .map_err(at)?;
        transaction.commit().map_err(at)?;
    }
    check_identity(&connection, path, 1)?;
    if (1..SCHEMA_VERSION).contains(&version) {
        let transaction = connection.transaction().map_err(at)?;
        if version == 1 {
            transaction.execute_batch(FROM_VERSION_1).map_err(at)?;
        }
        if version <= 2 {
            transaction.execute_batch(FROM_VERSION_2).map_err(at)?;
        }
        transaction.execute_batch(FROM_VERSION_3).map_err(at)?;
        transaction
            .pragma_update(None, "user_version", SCHEMA_VERSION)
            .map_err(at)?;
        transaction.commit().map_err(at)?;
    }
    check_identity(&connection, path, SCHEMA_VERSION)?;
    Ok(connection)
}

fn is_empty(connection: &Connection) -> rusqlite::Result<bool> {
    connection.query_row("SELECT count(*) = 0 FROM sqlite_schema", [], |row| row.get(0))
}

pub(super) fn check_identity(connection: &Connection, path: &Path, oldest: i32) -> Result<(), StoreError> {
    let pragma = |name: &str| -> Result<i32, StoreError> {
        connection
            .query_row(&format!("PRAGMA {name}"), [], |row| row.get(0))
            .map_err(|error| classify(path, error))
    };
    let (application, version) = (pragma("application_id")?, pragma("user_version")?);
    let foreign = |reason| {
        Err(StoreError::Foreign {
            path: path.to_owned(),
            reason,
        })
    };
    if application != APPLICATION_ID {
        return foreign(format!(
            "not a store of theriac-edge (application id {application:#x}, expected {APPLICATION_ID:#x})"
        ));
    }
    if !(oldest..=SCHEMA_VERSION).contains(&version) {
        return foreign(format!(
            "its schema is version {version}, this build knows {SCHEMA_VERSION}: use the build that wrote it"
        ));
    }
    Ok(())
}
