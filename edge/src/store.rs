//! What must survive a crash, in one SQLite file: incidents, the healing machine's state with its intents, the outbox,
//! approvals, the list of checkpoints.
//!
//! One thread owns the connection and takes jobs from a bounded queue. Settings: WAL, `synchronous = FULL`, strict
//! tables, a small WAL. The privacy ledger is *not* in here: it is its own file, and where the two disagree it wins.

use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension as _, Row, params};
use theriac_heal::checkpoint::store::Checkpoint;
use theriac_heal::incident::MachineState;
use theriac_heal::types::{Incident, IncidentId, Intent};
use theriac_privacy::ledger::KnownHead;
use theriac_protocol::units::{Digest, Round};
use tokio::sync::{mpsc, oneshot};

use crate::state_dir::StateDir;

/// `THEE` in `application_id`, so that a foreign file is told apart.
const APPLICATION_ID: i32 = 0x5448_4545;
/// Version of the schema below.
const SCHEMA_VERSION: i32 = 4;
/// Closed incidents kept.
const INCIDENTS_KEPT: u32 = 10_000;
/// Jobs that may wait for the writer.
const QUEUE: usize = 256;

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

/// The number under which word is left that lifts what stands against a service: incidents begin at 1.
pub const REINSTATEMENT: IncidentId = IncidentId(0);

/// What a person decided about an incident; or, as [`REINSTATEMENT`], that what stands against a service is lifted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Word {
    /// The incident.
    pub incident: IncidentId,
    /// Approved, or denied.
    pub approve: bool,
    /// Digest of the plan that was approved, or of what stands and is lifted.
    pub plan: Option<String>,
    /// A signature over the text that the digest is of, as a signature file has it; `None` for the word of somebody at the host.
    pub signature: Option<String>,
}

/// Why the store failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The disk is full; nothing of the transaction was kept.
    #[error("the disk of {path} is full: make room; detection goes on meanwhile")]
    Full {
        /// The file.
        path: PathBuf,
    },
    /// The file is no store of ours, or of a newer build.
    #[error("{path}: {reason}")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What was expected and found.
        reason: String,
    },
    /// The file is damaged.
    #[error(
        "{path} is damaged: {reason}; run `theriac-edge doctor`, then restore it from a backup or move it away"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// SQLite failed otherwise.
    #[error("{path}: {source}")]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// SQLite's word.
        source: rusqlite::Error,
    },
    /// Other bytes wait for the same announcement already.
    #[error("round {round}: the outbox holds {expected}, not {found}; only the stored bytes may be sent")]
    OtherBytes {
        /// The round.
        round: Round,
        /// Digest of what is stored.
        expected: Digest,
        /// Digest of what came.
        found: Digest,
    },
    /// The writer's thread is gone.
    #[error("the store is closed")]
    Closed,
}

impl StoreError {
    /// Whether it failed for want of room.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. })
    }
}

/// One encoded update that waits for its receipt. Retries send exactly these bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutboxRow {
    /// Its round.
    pub round: Round,
    /// Nonce of the announcement it answers.
    pub nonce: u64,
    /// SHA-256 of the payload.
    pub payload_digest: Digest,
    /// The frame's body as it goes over the wire.
    pub body: Bytes,
}

/// Handle on the store; cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    jobs: mpsc::Sender<Job>,
}

struct Job(Box<dyn FnOnce(&mut Writer) + Send>);

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Job")
    }
}

struct Writer {
    connection: Connection,
    path: PathBuf,
    dir: StateDir,
}

impl Store {
    /// Opens or makes the store and starts its thread, which ends with the last handle.
    ///
    /// # Errors
    /// [`StoreError::Foreign`] and [`StoreError::Damaged`] when the file is not what it should be.
    pub fn open(dir: &StateDir) -> Result<Self, StoreError> {
        let path = dir.database();
        let connection = open(&path)?;
        let mut writer = Writer {
            connection,
            path: path.clone(),
            dir: dir.clone(),
        };
        let (jobs, mut queue) = mpsc::channel::<Job>(QUEUE);
        std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || {
                while let Some(job) = queue.blocking_recv() {
                    (job.0)(&mut writer);
                }
            })
            .map_err(|error| StoreError::Damaged {
                path,
                reason: format!("no thread for it: {error}"),
            })?;
        Ok(Self { jobs })
    }

    /// Keeps an incident's latest state.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn save_incident(&self, incident: &Incident) -> Result<(), StoreError> {
        let incident = incident.clone();
        self.call(move |connection| save_incident(connection, &incident))
            .await
    }

    /// Makes an intent durable together with the machine's state. Only then may it be carried out.
    ///
    /// # Errors
    /// [`StoreError`]; nothing was kept.
    pub async fn record_intent(&self, machine: &MachineState, intent: &Intent) -> Result<(), StoreError> {
        let (machine, intent) = (machine.clone(), intent.clone());
        self.call(move |connection| {
            let transaction = connection.transaction()?;
            transaction.execute(
                "INSERT INTO intent (id, incident, service, action, decided_ms, reason) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
                 ON CONFLICT (id) DO NOTHING",
                params![
                    signed(intent.id.0),
                    signed(intent.incident.0),
                    intent.service,
                    intent.action.as_str(),
                    signed(intent.decided.unix_ms),
                    intent.reason
                ],
            )?;
            save_machine(&transaction, &machine)?;
            transaction.commit()
        })
        .await
    }

    /// Keeps the machine's state.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn save_machine(&self, machine: &MachineState) -> Result<(), StoreError> {
        let machine = machine.clone();
        self.call(move |connection| save_machine(connection, &machine))
            .await
    }

    /// The machine's state, or `None` on a new host.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when it does not parse.
    pub async fn machine(&self) -> Result<Option<MachineState>, StoreError> {
        self.call(|connection| {
            connection
                .query_row("SELECT body FROM machine WHERE id = 1", [], |row| {
                    json_column(row, 0)
                })
                .optional()
        })
        .await
    }

    /// The latest `limit` incidents, oldest first.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn incidents(&self, limit: u32) -> Result<Vec<Incident>, StoreError> {
        self.call(move |connection| incidents(connection, limit)).await
    }

    /// Puts an encoded update where it survives, before it is sent. A second one of the same round and nonce is ignored:
    /// the first bytes are the ones that count. Another nonce is another announcement and another row.
    ///
    /// # Errors
    /// [`StoreError::OtherBytes`] when other bytes wait for the same round and nonce, [`StoreError`] otherwise.
    pub async fn put_outbox(&self, row: &OutboxRow) -> Result<(), StoreError> {
        let row = row.clone();
        let (round, found) = (row.round, row.payload_digest);
        let stored = self
            .call(move |connection| {
                let nonce = format!("{:016x}", row.nonce);
                connection.execute(
                    "INSERT INTO outbox (round, nonce, payload_digest, body) VALUES (?1, ?2, ?3, ?4)
                     ON CONFLICT (round, nonce) DO NOTHING",
                    params![
                        signed(row.round.0),
                        nonce,
                        row.payload_digest.to_string(),
                        row.body.as_ref()
                    ],
                )?;
                connection.query_row(
                    "SELECT round, nonce, payload_digest, body FROM outbox WHERE round = ?1 AND nonce = ?2",
                    params![signed(row.round.0), nonce],
                    outbox_row,
                )
            })
            .await?;
        if stored.payload_digest == found {
            return Ok(());
        }
        Err(StoreError::OtherBytes {
            round,
            expected: stored.payload_digest,
            found,
        })
    }

    /// Notes how far the privacy ledger has come, so that a lost or older one is noticed. An earlier state of the ledger
    /// does not overwrite a later one.
    ///
    /// # Errors
    /// [`StoreError`]; then nothing may be sent.
    pub async fn note_ledger(&self, known: KnownHead) -> Result<(), StoreError> {
        self.call(move |connection| {
            connection.execute(
                "INSERT INTO ledger (id, head, records) VALUES (1, ?1, ?2)
                 ON CONFLICT (id) DO UPDATE SET head = excluded.head, records = excluded.records
                 WHERE excluded.records > ledger.records",
                params![known.head.to_string(), signed(known.records)],
            )?;
            Ok(())
        })
        .await
    }

    /// How far the privacy ledger is known to have come; `None` when nothing was ever charged.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn known_ledger(&self) -> Result<Option<KnownHead>, StoreError> {
        self.call(|connection| known_ledger(connection)).await
    }

    /// The update that waits for its receipt: the last one of the latest round.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn outbox(&self) -> Result<Option<OutboxRow>, StoreError> {
        self.call(|connection| {
            connection
                .query_row(
                    "SELECT round, nonce, payload_digest, body FROM outbox ORDER BY round DESC, rowid DESC LIMIT 1",
                    [],
                    outbox_row,
                )
                .optional()
        })
        .await
    }

    /// Forgets the update of `round` and of earlier rounds.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn drop_outbox(&self, round: Round) -> Result<(), StoreError> {
        self.call(move |connection| {
            connection.execute("DELETE FROM outbox WHERE round <= ?1", [signed(round.0)])?;
            Ok(())
        })
        .await
    }

    /// Replaces the list of a service's checkpoints.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn list_checkpoints(
        &self,
        service: &str,
        checkpoints: Vec<Checkpoint>,
    ) -> Result<(), StoreError> {
        let service = service.to_owned();
        self.call(move |connection| {
            let transaction = connection.transaction()?;
            transaction.execute("DELETE FROM checkpoint WHERE service = ?1", [&service])?;
            for found in &checkpoints {
                transaction.execute(
                    "INSERT INTO checkpoint (service, sequence, taken_ms, files, bytes) VALUES (?1, ?2, ?3, ?4, ?5)",
                    params![
                        service,
                        signed(found.sequence),
                        signed(found.unix_ms),
                        signed(found.files),
                        signed(found.bytes)
                    ],
                )?;
            }
            transaction.commit()
        })
        .await
    }

    /// Takes what people decided since the last call, in the order of incidents.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn take_approvals(&self) -> Result<Vec<Word>, StoreError> {
        self.call(|connection| {
            let taken: Vec<Word> = connection
                .prepare_cached("SELECT incident, approve, plan, signature FROM approval ORDER BY rowid")?
                .query_map([], |row| {
                    Ok(Word {
                        incident: IncidentId(unsigned(row.get(0)?)),
                        approve: row.get(1)?,
                        plan: Some(row.get::<_, String>(2)?).filter(|text| !text.is_empty()),
                        signature: Some(row.get::<_, String>(3)?).filter(|text| !text.is_empty()),
                    })
                })?
                .collect::<Result<_, _>>()?;
            if !taken.is_empty() {
                connection.execute("DELETE FROM approval", [])?;
            }
            Ok(taken)
        })
        .await
    }

    /// Takes the incidents of which people said since the last call that they show a new normal.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn take_new_normals(&self) -> Result<Vec<IncidentId>, StoreError> {
        self.call(|connection| {
            let taken: Vec<IncidentId> = connection
                .prepare_cached("SELECT incident FROM new_normal ORDER BY incident")?
                .query_map([], |row| Ok(IncidentId(unsigned(row.get(0)?))))?
                .collect::<Result<_, _>>()?;
            if !taken.is_empty() {
                connection.execute("DELETE FROM new_normal", [])?;
            }
            Ok(taken)
        })
        .await
    }

    /// Whether a small write succeeds: how a full disk that got room again is noticed.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn probe_write(&self) -> Result<(), StoreError> {
        self.call(|connection| {
            connection.execute("INSERT INTO outbox VALUES (-1, '', '', zeroblob(65536))", [])?;
            connection.execute("DELETE FROM outbox WHERE round = -1", [])?;
            Ok(())
        })
        .await
    }

    /// Bounds the file at `pages` pages, to act out a full disk.
    #[cfg(test)]
    pub(crate) async fn limit_pages(&self, pages: u32) {
        self.call(move |connection| {
            connection.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(()))
        })
        .await
        .unwrap();
    }

    /// Fills the pages of the intents, so that the next one needs a new page.
    #[cfg(test)]
    pub(crate) async fn fill(&self) {
        let filled = self
            .call(|connection| {
                for row in 0..10_000 {
                    connection.execute(
                        "INSERT INTO intent (id, incident, service, action, decided_ms, reason)
                         VALUES (?1, 0, '', '', 0, '')",
                        [1_000_000 + row],
                    )?;
                }
                Ok(())
            })
            .await;
        assert!(filled.is_err_and(|error| error.is_full()), "the disk is not full");
    }

    async fn call<T: Send + 'static>(
        &self,
        work: impl Fn(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, answered) = oneshot::channel();
        let job = Job(Box::new(move |writer| {
            let mut result = work(&mut writer.connection).map_err(|error| classify(&writer.path, error));
            // The commit at hand gets the ballast's room; whoever asked for it learns of the full disk next time.
            if result.as_ref().is_err_and(StoreError::is_full) && writer.dir.release_ballast() {
                tracing::warn!("the disk is full: released the ballast to finish the current commit");
                result = work(&mut writer.connection).map_err(|error| classify(&writer.path, error));
            }
            // Whoever asked may be gone; the work is done all the same.
            let _heard = answer.send(result).is_ok();
        }));
        self.jobs.send(job).await.map_err(|_| StoreError::Closed)?;
        answered.await.map_err(|_| StoreError::Closed)?
    }
}

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

fn open(path: &Path) -> Result<Connection, StoreError> {
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

fn check_identity(connection: &Connection, path: &Path, oldest: i32) -> Result<(), StoreError> {
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

fn classify(path: &Path, source: rusqlite::Error) -> StoreError {
    let path = path.to_owned();
    match source.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => StoreError::Full { path },
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => StoreError::Damaged {
            path,
            reason: source.to_string(),
        },
        _ => match source {
            rusqlite::Error::FromSqlConversionFailure(..) => StoreError::Damaged {
                path,
                reason: source.to_string(),
            },
            source => StoreError::Sqlite { path, source },
        },
    }
}

fn save_incident(connection: &mut Connection, incident: &Incident) -> rusqlite::Result<()> {
    let transaction = connection.transaction()?;
    transaction.execute(
        "INSERT OR REPLACE INTO incident (id, service, state, detected_ms, body) VALUES (?1, ?2, ?3, ?4, ?5)",
        params![
            signed(incident.id.0),
            incident.service,
            incident.state.to_string(),
            signed(incident.detected.unix_ms),
            to_json(incident)?
        ],
    )?;
    transaction.execute(
        "DELETE FROM incident WHERE id <= (SELECT max(id) FROM incident) - ?1 AND state IN ('healed', 'recovered')",
        [INCIDENTS_KEPT],
    )?;
    transaction.commit()
}

fn save_machine(connection: &Connection, machine: &MachineState) -> rusqlite::Result<()> {
    connection
        .execute(
            "INSERT OR REPLACE INTO machine (id, body) VALUES (1, ?1)",
            [to_json(machine)?],
        )
        .map(drop)
}

fn incidents(connection: &Connection, limit: u32) -> rusqlite::Result<Vec<Incident>> {
    let mut found: Vec<Incident> = connection
        .prepare_cached("SELECT body FROM incident ORDER BY id DESC LIMIT ?1")?
        .query_map([limit], |row| json_column(row, 0))?
        .collect::<Result<_, _>>()?;
    found.reverse();
    Ok(found)
}

fn known_ledger(connection: &Connection) -> rusqlite::Result<Option<KnownHead>> {
    connection
        .query_row("SELECT head, records FROM ledger WHERE id = 1", [], |row| {
            let head: String = row.get(0)?;
            Ok(KnownHead {
                head: head.parse().map_err(|error| conversion(0, error))?,
                records: unsigned(row.get(1)?),
            })
        })
        .optional()
}

fn outbox_row(row: &Row<'_>) -> rusqlite::Result<OutboxRow> {
    let nonce: String = row.get(1)?;
    let digest: String = row.get(2)?;
    let body: Vec<u8> = row.get(3)?;
    Ok(OutboxRow {
        round: Round(unsigned(row.get(0)?)),
        nonce: u64::from_str_radix(&nonce, 16).map_err(|error| conversion(1, error))?,
        payload_digest: digest.parse().map_err(|error| conversion(2, error))?,
        body: Bytes::from(body),
    })
}

fn json_column<T: serde::de::DeserializeOwned>(row: &Row<'_>, column: usize) -> rusqlite::Result<T> {
    let text: String = row.get(column)?;
    serde_json::from_str(&text).map_err(|error| conversion(column, error))
}

fn conversion(column: usize, error: impl std::error::Error + Send + Sync + 'static) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Text, Box::new(error))
}

fn to_json<T: serde::Serialize>(value: &T) -> rusqlite::Result<String> {
    serde_json::to_string(value).map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))
}

/// SQLite's integers are signed; our counters never come near the sign.
fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use theriac_heal::types::{ActionKind, FaultClass, IncidentState, IntentId, When};

    use super::*;

    fn incident(id: u64, state: IncidentState) -> Incident {
        Incident {
            id: IncidentId(id),
            service: "kv".to_owned(),
            class: FaultClass::Crash,
            state,
            opened: When {
                monotonic_ms: 1,
                unix_ms: 1_000,
            },
            detected: When {
                monotonic_ms: 2,
                unix_ms: 1_001,
            },
            acted: None,
            healed: None,
            closed: None,
            score: Some(2.5),
            threshold: Some(1.5),
            evidence: Vec::new(),
            evidence_dropped: 0,
            causes: vec![("service_memory".to_owned(), 1.0).into()],
            hypotheses: Vec::new(),
            alternatives: Vec::new(),
            would: None,
            plan: None,
            approved_by: std::collections::BTreeSet::new(),
            actions: Vec::new(),
            verdict: None,
            handed_over: None,
        }
    }

    fn intent(id: u64) -> Intent {
        Intent {
            id: IntentId(id),
            incident: IncidentId(1),
            service: "kv".to_owned(),
            action: ActionKind::Restart,
            class: FaultClass::Crash,
            session: None,
            decided: When::default(),
            reason: "it ended".to_owned(),
        }
    }

    fn dir() -> (tempfile::TempDir, StateDir) {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::open(&root.path().join("state")).unwrap();
        (root, dir)
    }

    #[tokio::test]
    async fn what_was_acknowledged_is_there_after_reopening() {
        let (_root, dir) = dir();
        let row = OutboxRow {
            round: Round(7),
            nonce: u64::MAX,
            payload_digest: Digest::of(b"x"),
            body: Bytes::from_static(b"body"),
        };
        {
            let store = Store::open(&dir).unwrap();
            assert_eq!(store.machine().await.unwrap(), None);
            store
                .save_incident(&incident(1, IncidentState::Acting))
                .await
                .unwrap();
            store
                .record_intent(&MachineState::default(), &intent(1))
                .await
                .unwrap();
            store.put_outbox(&row).await.unwrap();
        }
        let store = Store::open(&dir).unwrap();
        assert_eq!(
            store.incidents(10).await.unwrap(),
            [incident(1, IncidentState::Acting)]
        );
        assert_eq!(store.machine().await.unwrap(), Some(MachineState::default()));
        assert_eq!(store.outbox().await.unwrap(), Some(row.clone()));
        let other = OutboxRow {
            body: Bytes::from_static(b"other"),
            ..row.clone()
        };
        store.put_outbox(&other).await.unwrap();
        assert_eq!(
            store.outbox().await.unwrap(),
            Some(row),
            "the first bytes of a round are the ones that count"
        );
        store.drop_outbox(Round(7)).await.unwrap();
        assert_eq!(store.outbox().await.unwrap(), None);
    }

    fn update(round: u64, nonce: u64, payload: &[u8]) -> OutboxRow {
        OutboxRow {
            round: Round(round),
            nonce,
            payload_digest: Digest::of(payload),
            body: Bytes::copy_from_slice(payload),
        }
    }

    #[tokio::test]
    async fn another_nonce_of_a_round_is_another_update_and_other_bytes_for_the_same_are_refused() {
        let (_root, dir) = dir();
        let store = Store::open(&dir).unwrap();
        store.put_outbox(&update(7, 9, b"first")).await.unwrap();
        let second = update(7, 2, b"second");
        store.put_outbox(&second).await.unwrap();
        assert_eq!(
            store.outbox().await.unwrap(),
            Some(second.clone()),
            "the last announcement is the one that is answered"
        );
        let error = store.put_outbox(&update(7, 2, b"other")).await.unwrap_err();
        assert!(
            matches!(error, StoreError::OtherBytes { expected, .. } if expected == second.payload_digest),
            "{error}"
        );
        assert_eq!(store.outbox().await.unwrap(), Some(second));
        store.drop_outbox(Round(7)).await.unwrap();
        assert_eq!(store.outbox().await.unwrap(), None);
    }

    #[tokio::test]
    async fn the_known_ledger_never_goes_backwards() {
        let (_root, dir) = dir();
        let head = |records| KnownHead {
            head: Digest([u8::try_from(records).unwrap(); 32]),
            records,
        };
        let store = Store::open(&dir).unwrap();
        assert_eq!(store.known_ledger().await.unwrap(), None);
        for records in [3, 5, 4] {
            store.note_ledger(head(records)).await.unwrap();
        }
        assert_eq!(store.known_ledger().await.unwrap(), Some(head(5)));
        let reader = StoreReader::open(&dir.database()).unwrap().unwrap();
        assert_eq!(reader.known_ledger().unwrap(), Some(head(5)));
    }

    #[tokio::test]
    async fn a_store_of_version_1_is_read_and_brought_up_with_its_outbox() {
        let (_root, dir) = dir();
        let row = update(7, 9, b"first");
        Store::open(&dir).unwrap().put_outbox(&row).await.unwrap();
        let old = Connection::open(dir.database()).unwrap();
        old.execute_batch(
            "DROP TABLE ledger; DROP TABLE new_normal; ALTER TABLE outbox RENAME TO o;
             CREATE TABLE outbox (
                 round INTEGER PRIMARY KEY, nonce TEXT NOT NULL, payload_digest TEXT NOT NULL, body BLOB NOT NULL
             ) STRICT;
             INSERT INTO outbox SELECT * FROM o; DROP TABLE o; PRAGMA user_version = 1;",
        )
        .unwrap();
        drop(old);
        let reader = StoreReader::open(&dir.database()).unwrap().unwrap();
        assert_eq!(reader.known_ledger().unwrap(), None);
        let store = Store::open(&dir).unwrap();
        assert_eq!(store.outbox().await.unwrap(), Some(row));
        store.put_outbox(&update(7, 2, b"second")).await.unwrap();
        assert_eq!(store.known_ledger().await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_store_of_version_2_is_brought_up_and_takes_new_normals() {
        let (_root, dir) = dir();
        Store::open(&dir)
            .unwrap()
            .save_incident(&incident(4, IncidentState::Open))
            .await
            .unwrap();
        let old = Connection::open(dir.database()).unwrap();
        old.execute_batch("DROP TABLE new_normal; PRAGMA user_version = 2;")
            .unwrap();
        drop(old);
        let reader = StoreReader::open(&dir.database()).unwrap().unwrap();
        assert!(
            reader.accept_new_normal(IncidentId(4)).is_err(),
            "not brought up yet"
        );
        let store = Store::open(&dir).unwrap();
        reader.accept_new_normal(IncidentId(4)).unwrap();
        assert_eq!(store.take_new_normals().await.unwrap(), [IncidentId(4)]);
        assert_eq!(store.incidents(9).await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn a_store_of_version_3_is_brought_up_and_takes_approvals_of_plans() {
        let (_root, dir) = dir();
        drop(Store::open(&dir).unwrap());
        let old = Connection::open(dir.database()).unwrap();
        old.execute_batch(
            "DROP TABLE approval; CREATE TABLE approval (incident INTEGER PRIMARY KEY, approve INTEGER NOT NULL) STRICT;
             INSERT INTO approval VALUES (3, 1); PRAGMA user_version = 3;",
        )
        .unwrap();
        drop(old);
        let word = Word {
            incident: IncidentId(3),
            approve: false,
            plan: None,
            signature: None,
        };
        let reader = StoreReader::open(&dir.database()).unwrap().unwrap();
        assert!(reader.decide(&word).is_err(), "not brought up yet");
        let store = Store::open(&dir).unwrap();
        reader.decide(&word).unwrap();
        assert_eq!(
            store.take_approvals().await.unwrap(),
            [word],
            "an old approval was of no plan"
        );
    }

    #[tokio::test]
    async fn the_reader_sees_incidents_and_leaves_decisions() {
        let (_root, dir) = dir();
        assert!(StoreReader::open(&dir.database()).unwrap().is_none());
        let store = Store::open(&dir).unwrap();
        for id in 1..=3 {
            store
                .save_incident(&incident(id, IncidentState::Open))
                .await
                .unwrap();
        }
        let reader = StoreReader::open(&dir.database()).unwrap().unwrap();
        let ids: Vec<u64> = reader
            .incidents(2)
            .unwrap()
            .iter()
            .map(|found| found.id.0)
            .collect();
        assert_eq!(ids, [2, 3]);
        assert!(reader.incident(IncidentId(9)).unwrap().is_none());
        reader.integrity().unwrap();
        let word = |signature: Option<&str>| Word {
            incident: IncidentId(2),
            approve: true,
            plan: Some("p".to_owned()),
            signature: signature.map(str::to_owned),
        };
        for signature in [Some("a"), Some("b"), Some("a"), None] {
            reader.decide(&word(signature)).unwrap();
        }
        let mut taken = store.take_approvals().await.unwrap();
        taken.sort_by(|a, b| a.signature.cmp(&b.signature));
        assert_eq!(taken, [word(None), word(Some("a")), word(Some("b"))]);
        assert_eq!(store.take_approvals().await.unwrap(), []);
        reader.accept_new_normal(IncidentId(3)).unwrap();
        reader.accept_new_normal(IncidentId(3)).unwrap();
        assert_eq!(store.take_new_normals().await.unwrap(), [IncidentId(3)]);
        assert_eq!(store.take_new_normals().await.unwrap(), []);
    }

    #[tokio::test]
    async fn a_full_disk_is_told_apart_keeps_what_was_acknowledged_and_recovers() {
        let (_root, dir) = dir();
        let store = Store::open(&dir).unwrap();
        store
            .save_incident(&incident(1, IncidentState::Open))
            .await
            .unwrap();
        store.limit_pages(1).await;
        let mut big = incident(2, IncidentState::Open);
        big.handed_over = Some("x".repeat(200_000));
        let error = store.save_incident(&big).await.unwrap_err();
        assert!(error.is_full(), "{error}");
        assert!(store.probe_write().await.unwrap_err().is_full());
        assert_eq!(store.incidents(10).await.unwrap().len(), 1);
        store.limit_pages(1_000_000).await;
        store.probe_write().await.unwrap();
        store.save_incident(&big).await.unwrap();
        assert_eq!(
            store.outbox().await.unwrap(),
            None,
            "the probe leaves nothing behind"
        );
    }

    #[tokio::test]
    async fn foreign_and_damaged_files_are_refused_and_left_as_they_are() {
        let (_root, dir) = dir();
        let other = Connection::open(dir.database()).unwrap();
        other
            .execute_batch("CREATE TABLE a (b); PRAGMA user_version = 9;")
            .unwrap();
        drop(other);
        assert!(matches!(
            Store::open(&dir).unwrap_err(),
            StoreError::Foreign { .. }
        ));
        let garbage = vec![b'x'; 8192];
        for side in ["edge.db-wal", "edge.db-shm"] {
            let _gone = std::fs::remove_file(dir.root().join(side)).is_ok();
        }
        std::fs::write(dir.database(), &garbage).unwrap();
        let error = Store::open(&dir).unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
        assert_eq!(std::fs::read(dir.database()).unwrap(), garbage);
    }

    #[tokio::test]
    async fn old_closed_incidents_make_room_and_open_ones_stay() {
        let (_root, dir) = dir();
        let store = Store::open(&dir).unwrap();
        store
            .save_incident(&incident(1, IncidentState::HandedToHuman))
            .await
            .unwrap();
        store
            .save_incident(&incident(2, IncidentState::Healed))
            .await
            .unwrap();
        store
            .save_incident(&incident(20_000, IncidentState::Healed))
            .await
            .unwrap();
        let ids: Vec<u64> = store
            .incidents(10)
            .await
            .unwrap()
            .iter()
            .map(|found| found.id.0)
            .collect();
        assert_eq!(ids, [1, 20_000]);
    }
}
