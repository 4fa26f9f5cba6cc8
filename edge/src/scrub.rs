//! Reading kept checkpoints again, so that one that was damaged since it was taken is found before it is needed.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use theriac_heal::background::Background;
use theriac_heal::checkpoint::schedule::SATURATED;
use theriac_heal::checkpoint::store::{Checkpoint, CheckpointStore};
use tokio::time::sleep;

use crate::metrics::kind;
use crate::postgres::standing_back;
use crate::pressure::Pressure;
use crate::service::{ServiceContext, ServiceShared};

/// Word that a kept checkpoint was set aside: whether it was the newest.
pub(crate) type Damaged = Arc<Mutex<Option<bool>>>;

/// Reads one service's checkpoints again from time to time, one after the other, beside everything else.
pub(crate) struct Scrubber {
    context: ServiceContext,
    every: Duration,
    checkpoints: Arc<CheckpointStore>,
    damaged: Damaged,
    background: Background,
}

impl Scrubber {
    pub(crate) fn new(
        context: ServiceContext,
        every: Duration,
        checkpoints: Arc<CheckpointStore>,
        damaged: Damaged,
    ) -> Self {
        Self {
            background: standing_back(&context.shared.config),
            context,
            every,
            checkpoints,
            damaged,
        }
    }

    /// Without end. What lay there over a stop is read soon after the start, and not while everything else starts.
    pub(crate) async fn run(self) {
        sleep(FIRST_AFTER.min(self.every)).await;
        loop {
            self.read_all().await;
            sleep(self.every).await;
        }
    }

    async fn read_all(&self) {
        let service = &self.context.shared.name;
        let store = Arc::clone(&self.checkpoints);
        let kept = match tokio::task::spawn_blocking(move || store.list()).await {
            Ok(Ok(kept)) => kept,
            Ok(Err(error)) => {
                tracing::warn!(service, %error, "the kept checkpoints cannot be read again");
                return;
            }
            Err(_ending) => return,
        };
        for (age, checkpoint) in kept.iter().enumerate() {
            while !is_quiet(&self.context.shared) {
                sleep(LOOK_EVERY).await;
            }
            self.read(checkpoint, age == 0).await;
        }
    }

    async fn read(&self, checkpoint: &Checkpoint, newest: bool) {
        let (service, sequence) = (&self.context.shared.name, checkpoint.sequence);
        let (shared, mut looked) = (Arc::clone(&self.context.shared), Instant::now());
        // On the thread that reads, which nothing else waits for.
        let pause = move || {
            while looked.elapsed() >= LOOK_EVERY {
                looked = Instant::now();
                if !is_quiet(&shared) {
                    std::thread::sleep(LOOK_EVERY);
                }
            }
        };
        match self.checkpoints.scrub(checkpoint, &self.background, pause).await {
            Ok(None) => tracing::debug!(service, sequence, "a kept checkpoint was read again"),
            Ok(Some(what)) => {
                tracing::error!(
                    service,
                    sequence,
                    what,
                    "a kept checkpoint is damaged and was set aside"
                );
                let counted = kind("damaged");
                self.context.metrics.checkpoints.get_or_create(&counted).inc();
                let mut damaged = self.damaged.lock().unwrap_or_else(PoisonError::into_inner);
                *damaged = Some(newest || *damaged == Some(true));
            }
            Err(error) => {
                let counted = kind("unread");
                self.context.metrics.checkpoints.get_or_create(&counted).inc();
                tracing::error!(service, sequence, %error, "a kept checkpoint cannot be read again, or is damaged and cannot be set aside");
            }
        }
    }
}

/// Whether neither the service nor the disk needs everything now.
fn is_quiet(shared: &ServiceShared) -> bool {
    shared.is_sound() && Pressure::of_host().io_full.is_none_or(|share| share < SATURATED)
}

/// Longest time from the start until what is kept is read again.
const FIRST_AFTER: Duration = Duration::from_mins(10);
/// Time between two looks whether it may be read.
const LOOK_EVERY: Duration = Duration::from_secs(1);
