//! The ways of copying a service's state, behind one face.

use std::path::PathBuf;

use super::postgres::PostgresSource;
use super::state_check::{StateCheck, StateVerdict};
use super::store::{Checkpoint, CheckpointError, CheckpointStore};

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
