//! What commands read, and the word that people leave.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension as _, params};
use theriac_heal::incident::MachineState;
use theriac_heal::types::{Incident, IncidentId};
use theriac_privacy::ledger::KnownHead;

use super::rows::{incidents, json_column, known_ledger, signed, unsigned};
use super::schema::check_identity;
use super::{StoreError, Word, classify};

/// Reads the store beside a running edge, or without one.
#[derive(Debug)]
pub struct StoreReader {
    connection: Connection,
    path: PathBuf,
}

impl StoreReader {
    /// Opens for reading (and, for approvals, one small write). `None` when there is no store yet.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn open(path: &Path) -> Result<Option<Self>, StoreError> {
        if !path.exists() {
            return Ok(None);
        }
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags).map_err(|error| classify(path, error))?;
        check_identity(&connection, path, 1)?;
        connection
            .busy_timeout(Duration::from_secs(5))
            .map_err(|error| classify(path, error))?;
        Ok(Some(Self {
            connection,
            path: path.to_owned(),
        }))
    }

    /// The latest `limit` incidents, oldest first.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn incidents(&self, limit: u32) -> Result<Vec<Incident>, StoreError> {
        incidents(&self.connection, limit).map_err(|error| classify(&self.path, error))
    }

    /// One incident.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn incident(&self, id: IncidentId) -> Result<Option<Incident>, StoreError> {
        self.connection
            .query_row("SELECT body FROM incident WHERE id = ?1", [signed(id.0)], |row| {
                json_column(row, 0)
            })
            .optional()
            .map_err(|error| classify(&self.path, error))
    }

    /// Numbers of the intents that were recorded, oldest first.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn intents(&self) -> Result<Vec<u64>, StoreError> {
        let read = || -> rusqlite::Result<Vec<u64>> {
            let mut statement = self
                .connection
                .prepare_cached("SELECT id FROM intent ORDER BY id")?;
            let rows = statement.query_map([], |row| Ok(unsigned(row.get(0)?)))?;
            rows.collect()
        };
        read().map_err(|error| classify(&self.path, error))
    }

    /// How far the privacy ledger is known to have come; `None` when nothing was ever charged.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn known_ledger(&self) -> Result<Option<KnownHead>, StoreError> {
        let read = || {
            let kept: bool = self.connection.query_row(
                "SELECT count(*) > 0 FROM sqlite_schema WHERE type = 'table' AND name = 'ledger'",
                [],
                |row| row.get(0),
            )?;
            // A store of version 1, which no edge of this build has opened yet, knows nothing of it.
            if kept {
                known_ledger(&self.connection)
            } else {
                Ok(None)
            }
        };
        read().map_err(|error| classify(&self.path, error))
    }

    /// The machine's state, or `None` on a new host.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn machine(&self) -> Result<Option<MachineState>, StoreError> {
        self.connection
            .query_row("SELECT body FROM machine WHERE id = 1", [], |row| {
                json_column(row, 0)
            })
            .optional()
            .map_err(|error| classify(&self.path, error))
    }

    /// Leaves word for the running edge.
    ///
    /// # Errors
    /// [`StoreError`], also of a store that no edge of this build has opened yet.
    pub fn decide(&self, word: &Word) -> Result<(), StoreError> {
        let or_empty = |text: &Option<String>| text.clone().unwrap_or_default();
        self.connection
            .execute(
                "INSERT OR REPLACE INTO approval (incident, approve, plan, signature) VALUES (?1, ?2, ?3, ?4)",
                params![
                    signed(word.incident.0),
                    word.approve,
                    or_empty(&word.plan),
                    or_empty(&word.signature)
                ],
            )
            .map(drop)
            .map_err(|error| classify(&self.path, error))
    }

    /// Leaves word for the running edge that what an incident is about is normal now.
    ///
    /// # Errors
    /// [`StoreError`], also of a store that no edge of this build has opened yet.
    pub fn accept_new_normal(&self, incident: IncidentId) -> Result<(), StoreError> {
        self.connection
            .execute(
                "INSERT OR REPLACE INTO new_normal (incident) VALUES (?1)",
                params![signed(incident.0)],
            )
            .map(drop)
            .map_err(|error| classify(&self.path, error))
    }

    /// Runs SQLite's own check over the whole file.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] with what it found.
    pub fn integrity(&self) -> Result<(), StoreError> {
        let found: String = self
            .connection
            .query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))
            .map_err(|error| classify(&self.path, error))?;
        if found == "ok" {
            Ok(())
        } else {
            Err(StoreError::Damaged {
                path: self.path.clone(),
                reason: found,
            })
        }
    }
}
