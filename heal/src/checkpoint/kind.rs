//! The ways of copying a service's state, behind one face.

use std::path::PathBuf;

use super::postgres::PostgresSource;
use super::redis::RedisSource;
use super::sqlite::SqliteSource;
use super::state_check::{StateCheck, StateVerdict};
use super::store::{Checkpoint, CheckpointError, CheckpointStore, TREE};
use super::verdict::ShadowRun;
use super::which::Which;

/// What becomes of the stored copy that is proved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredCopy {
    /// It is a checkpoint: its bytes stay as they are.
    Kept,
    /// It was fetched for this alone.
    ThrownAway,
}

/// How a service's state becomes a checkpoint.
#[derive(Debug, Clone)]
pub enum Source {
    /// The directory is copied as it is, and the copy is checked by a command.
    Directory {
        /// The state directory.
        dir: PathBuf,
        /// Says whether the copy is good; `None` takes every copy for good.
        check: Option<StateCheck>,
    },
    /// The server is asked for a backup, and a second server proves it.
    Postgres(Box<PostgresSource>),
    /// The server is asked for a snapshot, and a second server proves it.
    Redis(Box<RedisSource>),
    /// The databases are copied page by page, and read whole.
    Sqlite(Box<SqliteSource>),
}

impl Source {
    /// Takes one checkpoint. Only one that was found good is kept.
    ///
    /// # Errors
    /// [`CheckpointError::NotGood`] for a directory whose copy did not pass, [`CheckpointError::Invalid`] and
    /// [`CheckpointError::Unproven`] for a server; others as the store has them.
    pub async fn take(&self, store: &CheckpointStore, unix_ms: u64) -> Result<Checkpoint, CheckpointError> {
        match self {
            Self::Directory { dir, check } => directory(store, dir, check.as_ref(), unix_ms).await,
            Self::Postgres(source) => Ok(Box::pin(source.take(store, unix_ms)).await?.checkpoint),
            Self::Redis(source) => Ok(Box::pin(source.take(store, unix_ms)).await?.checkpoint),
            Self::Sqlite(source) => Ok(Box::pin(source.take(store, unix_ms)).await?.checkpoint),
        }
    }
}

impl Source {
    /// Proves a stored checkpoint again: its bytes against its digests, then, where the kind has one, a shadow run, which is
    /// returned. The service is not asked anything and may be down. A directory's check is run on a copy that is thrown away only.
    ///
    /// # Errors
    /// [`CheckpointError::Corrupt`], [`CheckpointError::Invalid`], [`CheckpointError::Unproven`] and others.
    pub async fn verify(
        &self,
        store: &CheckpointStore,
        which: Which,
        copy: StoredCopy,
    ) -> Result<Option<ShadowRun>, CheckpointError> {
        match self {
            Self::Directory { check, .. } => {
                let from = store.clone();
                let found = super::unblock(move || from.verify(which)).await?;
                // The check may write into what it looks at.
                let Some(check) = check.as_ref().filter(|_| copy == StoredCopy::ThrownAway) else {
                    return Ok(None);
                };
                match check.run(&found.path.join(TREE)).await {
                    StateVerdict::Good => Ok(None),
                    StateVerdict::Corrupt(reason) => Err(CheckpointError::Invalid {
                        path: found.path,
                        reason,
                    }),
                    StateVerdict::Unknown(detail) => Err(CheckpointError::Unproven {
                        path: found.path,
                        detail,
                    }),
                }
            }
            Self::Postgres(source) => Box::pin(source.verify(store, which)).await.map(Some),
            Self::Redis(source) => Box::pin(source.verify(store, which)).await.map(Some),
            Self::Sqlite(source) => Box::pin(source.verify(store, which)).await.map(Some),
        }
    }
}

async fn directory(
    store: &CheckpointStore,
    dir: &std::path::Path,
    check: Option<&StateCheck>,
    unix_ms: u64,
) -> Result<Checkpoint, CheckpointError> {
    let (to, from) = (store.clone(), dir.to_owned());
    let staged = super::unblock(move || to.stage(&from, unix_ms)).await?;
    let verdict = match check {
        Some(check) => check.run(staged.tree()).await,
        None => StateVerdict::Good,
    };
    let store = store.clone();
    // A copy that could not be checked must not displace one that was found good.
    if let StateVerdict::Corrupt(detail) | StateVerdict::Unknown(detail) = verdict {
        super::unblock(move || store.discard(staged)).await?;
        return Err(CheckpointError::NotGood {
            path: dir.to_owned(),
            detail,
        });
    }
    super::unblock(move || store.commit(staged)).await
}
