//! The one thread that writes: a bounded queue, and one transaction for all that waits.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use rusqlite::{Connection, TransactionBehavior};
use theriac_protocol::units::Digest;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};

use super::blob::BlobStore;
use super::{Database, StoreError, Work, records, rounds};
use crate::audit::AuditLog;
use crate::data_dir::DataDir;

/// Writes that may wait at one time; more make their callers wait.
const QUEUE_MAX: usize = 1_024;
/// Writes in one transaction.
const BATCH_MAX: usize = 256;
/// How long a first upload waits for company. A synchronisation costs several milliseconds on a common disk.
const COMPANY: Duration = Duration::from_millis(3);
/// How often the thread looks for changes by other processes.
const POLL: Duration = Duration::from_millis(250);
/// How often a full disk is tried again while nobody writes.
const ROOM_CHECK: Duration = Duration::from_secs(1);
/// What is written then: more than an enrolment needs.
const ROOM_BYTES: usize = 32 * 1_024;
/// Under which name in the table `meta`.
const META_ROOM: &str = "room";
/// How often unnamed blobs are collected.
const COLLECT: Duration = Duration::from_mins(10);

/// How soon a write is wanted on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Urgency {
    /// Committed at once, on the disk with the next write that is not lazy: lost by a power failure, not by a crash of the
    /// program. Only for what the next start would do again in the same way.
    Lazy,
    /// More of the kind are on their way: wait a moment for them.
    Company,
    /// At once.
    Now,
}

/// The store as the server shares it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    jobs: SyncSender<Job>,
    room: Arc<Semaphore>,
    reader: Arc<Mutex<Connection>>,
    /// A reader of its own for what takes long.
    loader: Arc<Mutex<Connection>>,
    blobs: Arc<BlobStore>,
    log: Arc<AuditLog>,
    changed: Arc<watch::Sender<u64>>,
    commits: Arc<AtomicU64>,
    full: Arc<AtomicBool>,
    /// How many wait for room that a small write does not prove.
    waiting: Arc<AtomicUsize>,
}

/// Something waits for room on the disk, for as long as this lives; see [`Store::is_full`].
#[derive(Debug)]
pub(crate) struct WaitsForRoom(Arc<AtomicUsize>);

impl Drop for WaitsForRoom {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The writing thread. It ends when every [`Store`] is dropped; what was queued is written first.
#[derive(Debug)]
pub struct StoreThread {
    thread: JoinHandle<()>,
}

impl StoreThread {
    /// Waits for the last write.
    pub fn join(self) {
        if self.thread.join().is_err() {
            tracing::error!("the store's thread panicked");
        }
    }
}

struct Job {
    urgency: Urgency,
    task: Box<dyn Task>,
    _room: OwnedSemaphorePermit,
}

impl Store {
    /// Opens the store of a data directory for a server.
    ///
    /// # Errors
    /// Those of [`Database::open`]; [`StoreError::Corrupt`] when the audit log has a hole.
    pub fn open(dir: &DataDir) -> Result<(Self, StoreThread), StoreError> {
        let database = Database::open(dir)?;
        let (reader, loader) = (Database::open(dir)?, Database::open(dir)?);
        let blobs = Arc::clone(database.blobs());
        let log = Arc::new(AuditLog::load(database.read())?);
        let (jobs, queue) = sync_channel(QUEUE_MAX);
        let changed = Arc::new(watch::channel(0).0);
        let commits = Arc::new(AtomicU64::new(0));
        let full = Arc::new(AtomicBool::new(false));
        let writer = Writer {
            database,
            queue,
            log: Arc::clone(&log),
            changed: Arc::clone(&changed),
            commits: Arc::clone(&commits),
            full: Arc::clone(&full),
            seen_version: 0,
            collected: None,
            room_sought: None,
        };
        let thread = std::thread::Builder::new()
            .name("store".into())
            .spawn(move || writer.run())
            .map_err(|error| StoreError::io("start a thread for", &dir.database(), &error))?;
        let store = Self {
            jobs,
            room: Arc::new(Semaphore::new(QUEUE_MAX)),
            reader: Arc::new(Mutex::new(reader.connection)),
            loader: Arc::new(Mutex::new(loader.connection)),
            blobs,
            log,
            changed,
            commits,
            full,
            waiting: Arc::default(),
        };
        Ok((store, StoreThread { thread }))
    }

    /// Does `work` in a transaction, together with whatever else waits. With [`Urgency::Now`] and [`Urgency::Company`] it is on
    /// the disk when this returns. When `work` fails, nothing of it is kept and the others are not touched.
    ///
    /// # Errors
    /// Those of `work`; [`StoreError::Full`], [`StoreError::Closed`].
    pub async fn write<T: Send + 'static>(
        &self,
        urgency: Urgency,
        work: impl FnOnce(&Work<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let room = Arc::clone(&self.room)
            .acquire_owned()
            .await
            .map_err(|_| StoreError::Closed)?;
        let (reply, answer) = oneshot::channel();
        let task = Box::new(Typed {
            work: Some(work),
            result: None,
            reply,
        });
        // The queue has as many places as the semaphore, so this never finds it full.
        self.jobs
            .try_send(Job {
                urgency,
                task,
                _room: room,
            })
            .map_err(|_| StoreError::Closed)?;
        self.noting_a_full_disk(answer.await.map_err(|_| StoreError::Closed)?)
    }

    /// Reads off the async threads.
    ///
    /// # Errors
    /// Those of `work`; [`StoreError::Closed`].
    pub async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = self.clone();
        tokio::task::spawn_blocking(move || store.read_blocking(work))
            .await
            .map_err(|_| StoreError::Closed)?
    }

    /// Reads on this thread, which must not be an async one.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn read_blocking<T>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        // A reader that panicked leaves a connection that is still good: reads change nothing.
        let connection = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        self.noting_a_full_disk(work(&connection))
    }

    /// As [`Store::read_blocking`] for the rows of a whole round, which may take minutes: no other reader waits for it.
    ///
    /// # Errors
    /// Those of `work`.
    pub(crate) fn load_blocking<T>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let connection = self.loader.lock().unwrap_or_else(PoisonError::into_inner);
        self.noting_a_full_disk(work(&connection))
    }

    /// Says that something large waits for room: until what is returned is dropped the disk counts as full, whatever small write succeeds.
    pub(crate) fn waits_for_room(&self) -> WaitsForRoom {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        WaitsForRoom(Arc::clone(&self.waiting))
    }

    /// Makes a payload that does not fit a row durable, off the async threads.
    ///
    /// # Errors
    /// [`StoreError::Full`], [`StoreError::Io`].
    pub async fn put_blob(&self, digest: Digest, bytes: Bytes) -> Result<(), StoreError> {
        if super::models::fits_row(bytes.len()) {
            return Ok(());
        }
        let blobs = Arc::clone(&self.blobs);
        let put = tokio::task::spawn_blocking(move || blobs.put(&digest, &bytes)).await;
        self.noting_a_full_disk(put.map_err(|_| StoreError::Closed)?)
    }

    fn noting_a_full_disk<T>(&self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        if matches!(result, Err(StoreError::Full(_))) {
            self.full.store(true, Ordering::Relaxed);
        }
        result
    }

    /// Whether a write has failed for want of room and none has succeeded since, or the rows of a round wait for room. While nobody writes, the writing thread tries by
    /// itself, so this turns false soon after there is room again.
    pub fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed) || self.waiting.load(Ordering::Relaxed) > 0
    }

    /// The blobs.
    pub fn blobs(&self) -> &BlobStore {
        &self.blobs
    }

    /// The audit log up to the last durable commit.
    pub fn audit_log(&self) -> &AuditLog {
        &self.log
    }

    /// Rises when the registry or the model in force may have changed: another process (a command) wrote, or
    /// [`Store::touch`] was called.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Says that this process has changed the registry.
    pub fn touch(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    /// Transactions committed by this process, for the metrics.
    pub fn commits(&self) -> u64 {
        self.commits.load(Ordering::Relaxed)
    }
}

/// One write, whatever its result.
trait Task: Send {
    /// Does the work inside the open transaction; false: undo it.
    fn run(&mut self, work: &Work<'_>) -> bool;
    /// Tells the caller, after the commit.
    fn finish(self: Box<Self>, commit: Result<(), StoreError>);
}

struct Typed<T, F> {
    work: Option<F>,
    result: Option<Result<T, StoreError>>,
    reply: oneshot::Sender<Result<T, StoreError>>,
}

impl<T: Send, F: FnOnce(&Work<'_>) -> Result<T, StoreError> + Send> Task for Typed<T, F> {
    fn run(&mut self, work: &Work<'_>) -> bool {
        let result = self.work.take().map(|run| run(work));
        let ok = matches!(result, Some(Ok(_)));
        self.result = result;
        ok
    }

    fn finish(self: Box<Self>, commit: Result<(), StoreError>) {
        let result = match (self.result, commit) {
            (Some(Err(error)), _) | (_, Err(error)) => Err(error),
            (Some(Ok(value)), Ok(())) => Ok(value),
            (None, Ok(())) => Err(StoreError::Closed),
        };
        // A caller that went away does not mind.
        drop(self.reply.send(result));
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job")
            .field("urgency", &self.urgency)
            .finish_non_exhaustive()
    }
}

struct Writer {
    database: Database,
    queue: Receiver<Job>,
    log: Arc<AuditLog>,
    changed: Arc<watch::Sender<u64>>,
    commits: Arc<AtomicU64>,
    full: Arc<AtomicBool>,
    seen_version: i64,
    collected: Option<Instant>,
    room_sought: Option<Instant>,
}

impl Writer {
    fn run(mut self) {
        self.seen_version = self.data_version();
        loop {
            match self.queue.recv_timeout(POLL) {
                Ok(job) => {
                    let batch = self.gather(job);
                    self.commit(batch);
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.collect_blobs();
                    self.seek_room();
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.notice_other_processes();
        }
        // Leaves a short log behind; the next start would manage without it.
        drop(
            self.database
                .connection
                .execute_batch("PRAGMA wal_checkpoint(TRUNCATE)"),
        );
    }

    /// The first job and all that wait; while nobody is in a hurry, those that come within a moment too.
    fn gather(&self, first: Job) -> Vec<Job> {
        let mut until = (first.urgency == Urgency::Company).then(|| Instant::now() + COMPANY);
        let mut batch = vec![first];
        while batch.len() < BATCH_MAX {
            let left = until.map_or(Duration::ZERO, |until| {
                until.saturating_duration_since(Instant::now())
            });
            let next = if left.is_zero() {
                self.queue.try_recv().ok()
            } else {
                self.queue.recv_timeout(left).ok()
            };
            let Some(job) = next else { break };
            if job.urgency == Urgency::Now {
                until = None;
            }
            batch.push(job);
        }
        batch
    }

    fn commit(&mut self, mut batch: Vec<Job>) {
        let lazy = batch.iter().all(|job| job.urgency == Urgency::Lazy);
        let result = self.transact(&mut batch, lazy);
        if result.is_ok() {
            self.commits.fetch_add(1, Ordering::Relaxed);
            // A lazy write is small and proves little. Who failed inside this commit says so when its answer comes.
            if !lazy {
                self.full.store(false, Ordering::Relaxed);
            }
            if !lazy && let Err(error) = self.log.catch_up(&self.database.connection) {
                tracing::error!(%error, "cannot read the audit log back");
            }
        }
        for job in batch {
            job.task.finish(result.clone());
        }
    }

    fn transact(&mut self, batch: &mut [Job], lazy: bool) -> Result<(), StoreError> {
        // With a write-ahead log, NORMAL leaves out the synchronisation at commit; the next FULL commit covers it too.
        self.database
            .connection
            .pragma_update(None, "synchronous", if lazy { "NORMAL" } else { "FULL" })?;
        let mut transaction = self
            .database
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        for job in batch {
            let savepoint = transaction.savepoint()?;
            if job.task.run(&Work {
                connection: &savepoint,
            }) {
                savepoint.commit()?;
            } else {
                // Dropping it rolls back. A full disk may have rolled back everything: then nothing of the batch holds.
                drop(savepoint);
                if transaction.is_autocommit() {
                    return Err(StoreError::Full("aggregator.db cannot grow".into()));
                }
            }
        }
        transaction.commit()?;
        Ok(())
    }

    fn notice_other_processes(&mut self) {
        let version = self.data_version();
        if version != self.seen_version {
            self.seen_version = version;
            if let Err(error) = self.log.catch_up(&self.database.connection) {
                tracing::error!(%error, "cannot read the audit log back");
            }
            self.changed.send_modify(|count| *count += 1);
        }
    }

    /// SQLite's counter of commits by *other* connections.
    fn data_version(&self) -> i64 {
        let read = self
            .database
            .connection
            .pragma_query_value(None, "data_version", |row| row.get(0));
        read.unwrap_or(self.seen_version)
    }

    /// Tries whether a disk that was full has room again.
    fn seek_room(&mut self) {
        let soon = self.room_sought.is_some_and(|last| last.elapsed() < ROOM_CHECK);
        if soon || !self.full.load(Ordering::Relaxed) {
            return;
        }
        self.room_sought = Some(Instant::now());
        let room = vec![0; ROOM_BYTES];
        let written = self
            .database
            .write(|work| records::set_meta(work, META_ROOM, &room));
        if written.is_ok() {
            self.full.store(false, Ordering::Relaxed);
            tracing::info!("the disk has room again");
        }
    }

    fn collect_blobs(&mut self) {
        if self.collected.is_some_and(|last| last.elapsed() < COLLECT) {
            return;
        }
        self.collected = Some(Instant::now());
        let collected = rounds::named_blobs(&self.database.connection)
            .and_then(|named| self.database.blobs.collect(&named, SystemTime::now()));
        match collected {
            Ok(0) => {}
            Ok(blobs) => tracing::info!(blobs, "blobs that no row names were deleted"),
            Err(error) => tracing::warn!(%error, "cannot collect blobs"),
        }
    }
}
