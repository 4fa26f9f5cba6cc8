//! Whether the state directory can take writes. Unless it can, nothing is trained or sent, while detection and the page
//! go on, and healing as long as its records can be written; the status, a metric and the log say so.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::metrics::Metrics;
use crate::state_dir::StateDir;
use crate::status::{Board, Storage};
use crate::store::{Store, StoreError};
use crate::supervise::Shutdown;

/// Room below which training and sending stop, in bytes.
pub(crate) const FREE_MIN: u64 = 16 << 20;
/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Watches the state directory; cheap to clone.
#[derive(Debug, Clone)]
pub struct StorageWatch(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: StateDir,
    board: Board,
    metrics: Arc<Metrics>,
    state: AtomicU8,
    // Text of the latest failure; held for an assignment.
    detail: Mutex<String>,
}

impl StorageWatch {
    /// A watch that begins in good faith.
    pub fn new(dir: StateDir, board: Board, metrics: Arc<Metrics>) -> Self {
        Self(Arc::new(Inner {
            dir,
            board,
            metrics,
            state: AtomicU8::new(0),
            detail: Mutex::default(),
        }))
    }

    /// Whether new work that needs the disk may begin.
    pub fn is_ok(&self) -> bool {
        self.0.state.load(Ordering::Relaxed) == 0
    }

    /// Counts a failed write of the store and stops what needs the disk.
    pub fn failed(&self, what: &str, error: &StoreError) {
        let state = if error.is_full() {
            Storage::Full
        } else {
            Storage::Failing
        };
        self.report_failure(what, &error.to_string(), state);
    }

    /// Counts a failed write of a file.
    pub fn failed_io(&self, what: &str, error: &dyn std::fmt::Display, full: bool) {
        self.report_failure(
            what,
            &error.to_string(),
            if full { Storage::Full } else { Storage::Failing },
        );
    }

    /// Looks at the room and tries a small write, again and again.
    ///
    /// # Errors
    /// Never; the signature is the one of a task.
    pub async fn run(self, store: Store, mut shutdown: Shutdown) -> Result<(), StoreError> {
        let mut ticks = tokio::time::interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => self.look(&store).await,
                () = shutdown.wait() => return Ok(()),
            }
        }
    }

    pub(crate) async fn look(&self, store: &Store) {
        let free = match self.0.dir.free_bytes() {
            Ok(free) => free,
            Err(error) => return self.failed_io("look at the disk", &error, false),
        };
        self.0
            .metrics
            .disk_free_bytes
            .set(i64::try_from(free).unwrap_or(i64::MAX));
        let dir = self.0.dir.clone();
        // Also where there is little room: it is healing's own records that need it then. Whether it could be kept is
        // seen at the next look; it is a comfort, not a promise.
        let _kept = tokio::task::spawn_blocking(move || dir.keep_ballast(free))
            .await
            .is_ok_and(|kept| kept);
        if free < FREE_MIN {
            let text = format!("{free} bytes are free on the disk, {FREE_MIN} are needed");
            return self.report_failure("keep room", &text, Storage::Full);
        }
        if !self.is_ok()
            && let Err(error) = store.probe_write().await
        {
            return self.failed("try a write", &error);
        }
        self.set(Storage::Ok, "");
    }

    fn report_failure(&self, what: &str, error: &str, state: Storage) {
        self.0.metrics.storage_failures.inc();
        if self.set(state, error) {
            tracing::error!(
                what,
                error,
                "the state directory has no room or cannot be written: training and sending stop, detection goes on, \
                 healing too while its records can be written"
            );
        }
    }

    /// Returns whether the state is a new one.
    fn set(&self, state: Storage, detail: &str) -> bool {
        let number = match state {
            Storage::Ok => 0,
            Storage::Full => 1,
            Storage::Failing => 2,
        };
        let before = self.0.state.swap(number, Ordering::Relaxed);
        detail.clone_into(&mut self.0.detail.lock().unwrap_or_else(PoisonError::into_inner));
        if before == number {
            return false;
        }
        if number == 0 {
            tracing::info!("the state directory can be written again");
        }
        self.0.metrics.storage_ok.set(i64::from(number == 0));
        self.0.board.update(|status| status.storage = state);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_failure_stops_work_until_a_write_succeeds_again() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::open(&root.path().join("s")).unwrap();
        let store = Store::open(&dir).unwrap();
        let board = Board::new("a", 60);
        let watch = StorageWatch::new(dir, board.clone(), Arc::new(Metrics::new()));
        assert!(watch.is_ok());
        watch.failed(
            "test",
            &StoreError::Full {
                path: "edge.db".into(),
            },
        );
        assert!(!watch.is_ok());
        assert_eq!(board.status().storage, Storage::Full);
        store.limit_pages(1).await;
        watch.look(&store).await;
        assert!(!watch.is_ok(), "the store is still full");
        store.limit_pages(1_000_000).await;
        watch.look(&store).await;
        assert!(watch.is_ok());
        assert_eq!(board.status().storage, Storage::Ok);
    }
}
