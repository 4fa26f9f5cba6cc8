//! Copies of a service's state that are known to be good, and when to take them.

pub mod account;
pub mod kind;
mod manifest;
pub mod postgres;
pub mod proof;
pub mod schedule;
pub mod state_check;
pub mod store;
pub mod trust;

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
