//! The table in memory and the one thread that writes. A write is seen and acknowledged once it is durable.

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;

use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

use super::record::{KEY_BYTES_MAX, Table, VALUE_BYTES_MAX};
use super::state::{State, StateError};

/// Writes that wait for the disk; more are refused.
const QUEUE_MAX: usize = 1024;
/// Most writes synced together.
const BATCH_MAX: usize = 256;
/// Most keys.
const KEYS_MAX: usize = 100_000;

/// A handle to the store; cheap to copy.
#[derive(Debug, Clone)]
pub(super) struct Store {
    table: Arc<RwLock<Table>>,
    writes: mpsc::Sender<Write>,
}

/// Why a write was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// The key is empty, too long, or holds something other than letters, digits, `-`, `_` and `.`.
    Key,
    /// The value is too long.
    Value,
    /// There are too many keys.
    Full,
    /// Too many writes wait.
    Busy,
    /// The disk did not take it.
    Disk,
}

/// Figures of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Stats {
    pub(super) keys: usize,
    pub(super) bytes: usize,
}

struct Write {
    key: String,
    value: Vec<u8>,
    done: oneshot::Sender<Result<(), Refused>>,
}

impl Store {
    /// Opens the state and starts the writer, which ends when the last handle is dropped.
    ///
    /// # Errors
    /// [`StateError`].
    pub(super) fn open(dir: &Path) -> Result<(Self, JoinHandle<()>), StateError> {
        let (state, table) = State::open(dir)?;
        let table = Arc::new(RwLock::new(table));
        let (writes, queue) = mpsc::channel(QUEUE_MAX);
        let shared = Arc::clone(&table);
        let writer = std::thread::Builder::new()
            .name("writer".to_owned())
            .spawn(move || write_batches(state, &shared, queue))
            .map_err(|source| StateError::Io {
                path: dir.to_owned(),
                source,
            })?;
        Ok((Self { table, writes }, writer))
    }

    /// Writes durably.
    ///
    /// # Errors
    /// [`Refused`].
    pub(super) async fn put(&self, key: String, value: Vec<u8>) -> Result<(), Refused> {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if key.is_empty() || key.len() > KEY_BYTES_MAX || !key.bytes().all(fits) {
            return Err(Refused::Key);
        }
        if value.len() > VALUE_BYTES_MAX {
            return Err(Refused::Value);
        }
        let (done, answer) = oneshot::channel();
        self.writes
            .try_send(Write { key, value, done })
            .map_err(|_| Refused::Busy)?;
        answer.await.unwrap_or(Err(Refused::Disk))
    }

    /// The value of a key.
    pub(super) fn get(&self, key: &str) -> Option<Vec<u8>> {
        self.table
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(key)
            .cloned()
    }

    /// Whether the writer is there; reads the table on the way.
    pub(super) fn is_healthy(&self) -> bool {
        let readable = self.table.read().is_ok();
        readable && !self.writes.is_closed()
    }

    /// Figures; walks the table.
    pub(super) fn stats(&self) -> Stats {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        Stats {
            keys: table.len(),
            bytes: table.iter().map(|(key, value)| key.len() + value.len()).sum(),
        }
    }
}

fn write_batches(mut state: State, table: &RwLock<Table>, mut queue: mpsc::Receiver<Write>) {
    while let Some(first) = queue.blocking_recv() {
        let mut batch = vec![first];
        while batch.len() < BATCH_MAX
            && let Ok(next) = queue.try_recv()
        {
            batch.push(next);
        }
        if is_full(table, &batch) {
            for write in batch {
                answer(write.done, Err(Refused::Full));
            }
            continue;
        }
        let (dones, writes): (Vec<_>, Vec<_>) = batch
            .into_iter()
            .map(|write| (write.done, (write.key, write.value)))
            .unzip();
        match state.append(&writes) {
            Ok(()) => {
                table
                    .write()
                    .unwrap_or_else(PoisonError::into_inner)
                    .extend(writes);
                for done in dones {
                    answer(done, Ok(()));
                }
            }
            Err(error) => {
                tracing::error!(%error, "writes not taken");
                for done in dones {
                    answer(done, Err(Refused::Disk));
                }
            }
        }
        if let Err(error) = state.fold(&table.read().unwrap_or_else(PoisonError::into_inner)) {
            tracing::warn!(%error, "log not folded");
        }
    }
}

fn is_full(table: &RwLock<Table>, batch: &[Write]) -> bool {
    let table = table.read().unwrap_or_else(PoisonError::into_inner);
    let new = batch
        .iter()
        .filter(|write| !table.contains_key(&write.key))
        .count();
    new > 0 && table.len() + new > KEYS_MAX
}

fn answer(done: oneshot::Sender<Result<(), Refused>>, result: Result<(), Refused>) {
    if done.send(result).is_err() {
        tracing::debug!("the client of a write went away");
    }
}
