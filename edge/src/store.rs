//! What must survive a crash, in one SQLite file: incidents, the healing machine's state with its intents, the outbox,
//! approvals, the list of checkpoints.
//!
//! One thread owns the connection and takes jobs from a bounded queue. Settings: WAL, `synchronous = FULL`, strict
//! tables, a small WAL. The privacy ledger is *not* in here: it is its own file, and where the two disagree it wins.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use rusqlite::{Connection, ErrorCode, OptionalExtension as _, params};
use theriac_heal::checkpoint::store::Checkpoint;
use theriac_heal::incident::MachineState;
use theriac_heal::types::{Incident, IncidentId, Intent};
use theriac_privacy::ledger::KnownHead;
use theriac_protocol::units::{Digest, Round};
use tokio::sync::{mpsc, oneshot};

pub use self::reader::StoreReader;
use self::rows::{
    incidents, json_column, known_ledger, outbox_row, save_incident, save_machine, signed, unsigned,
};
use crate::state_dir::StateDir;

mod reader;
mod rows;
mod schema;
#[cfg(test)]
mod tests;

/// Jobs that may wait for the writer.
const QUEUE: usize = 256;

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
    #[error("the disk of {path} is full")]
    Full {
        /// The file.
        path: PathBuf,
    },
    /// Its file system cannot be written.
    #[error("the file system of {path} is mounted read-only")]
    ReadOnly {
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
        let connection = schema::open(&path)?;
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
            source => {
                let of_files = [
                    ErrorCode::CannotOpen,
                    ErrorCode::SystemIoFailure,
                    ErrorCode::ReadOnly,
                ];
                let code = source.sqlite_error_code().filter(|code| of_files.contains(code));
                code.and_then(|_| no_room(&path))
                    .unwrap_or(StoreError::Sqlite { path, source })
            }
        },
    }
}

/// What the library calls an input/output error, where its file system says more: it has no room for the files beside the database, or is mounted
/// read-only.
fn no_room(path: &Path) -> Option<StoreError> {
    let found = rustix::fs::statvfs(path.parent()?).ok()?;
    let path = path.to_owned();
    if found.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY) {
        return Some(StoreError::ReadOnly { path });
    }
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    (free < BESIDE_BYTES).then_some(StoreError::Full { path })
}

/// What the library needs beside the database to open it.
const BESIDE_BYTES: u64 = 64 << 10;
