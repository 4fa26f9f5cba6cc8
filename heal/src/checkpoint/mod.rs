//! Copies of a service's state that are known to be good, and when to take them.

pub mod account;
mod apart;
mod durable;
pub mod kind;
mod limits;
mod manifest;
pub mod offsite;
pub mod postgres;
pub mod proof;
pub mod redis;
mod remnant;
pub mod schedule;
pub mod sqlite;
pub mod state_check;
pub mod store;
pub mod trust;
pub mod verdict;
pub mod which;
mod work;

/// Runs file work off the async threads, standing back for the host's services.
async fn unblock_behind<T: Send + 'static>(
    background: &crate::background::Background,
    work: impl FnOnce() -> Result<T, store::CheckpointError> + Send + 'static,
) -> Result<T, store::CheckpointError> {
    background.unblock(work).await.unwrap_or_else(|source| {
        Err(store::CheckpointError::Io {
            path: std::path::PathBuf::new(),
            source,
        })
    })
}

/// Runs file work off the async threads.
async fn unblock<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, store::CheckpointError> + Send + 'static,
) -> Result<T, store::CheckpointError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(store::CheckpointError::Io {
            path: std::path::PathBuf::new(),
            source: std::io::Error::other(error),
        })
    })
}
