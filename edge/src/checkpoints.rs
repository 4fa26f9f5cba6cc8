//! Copies of a service's state on a schedule, each checked before it counts, while the service is well.
//!
//! A copy that does not pass the service's own check may have been torn while the service wrote; so the state itself is
//! asked next, and only when *it* fails twice is it called corrupt. While an incident of corrupt state is open, the state is
//! asked again from time to time, so that a false or mended finding does not stand in the way of healing.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use theriac_heal::checkpoint::state_check::{StateCheck, StateVerdict};
use theriac_heal::checkpoint::store::{Checkpoint, CheckpointError, CheckpointStore};
use theriac_heal::executor::clock;
use theriac_heal::incident::Input;

use crate::config::StateSettings;
use crate::metrics::{kind, service as label};
use crate::service::{ServiceContext, open_checkpoints, state_check};
use crate::storage::StorageWatch;
use crate::store::Store;
use crate::supervise::Shutdown;

/// Longest wait for the first checkpoint of a service that has none.
const FIRST_AFTER: Duration = Duration::from_secs(5);
/// Time between two looks whether a checkpoint is due and possible.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Pause between two checks of the live state before it is called corrupt.
const SECOND_LOOK_AFTER: Duration = Duration::from_secs(1);
/// Longest time between two checks of a state that was found corrupt.
const ASK_AGAIN_EVERY: Duration = Duration::from_secs(30);

/// Takes checkpoints of one service until the signal to stop.
///
/// # Errors
/// When the store of checkpoints cannot be opened.
pub async fn run(
    context: ServiceContext,
    settings: StateSettings,
    store: Store,
    storage: StorageWatch,
    mut shutdown: Shutdown,
) -> Result<(), CheckpointError> {
    let taker = Taker {
        checkpoints: Arc::new(open_checkpoints(&context.dir, &context.shared.name, &settings)?),
        check: state_check(&settings),
        context,
        settings,
        store,
        storage,
    };
    let known = taker.list().await?;
    let first = known.is_empty();
    taker.show(known).await;
    let wait = if first {
        FIRST_AFTER.min(taker.settings.interval)
    } else {
        taker.settings.interval
    };
    let ask_every = taker.settings.interval.min(ASK_AGAIN_EVERY);
    let (mut due, mut ask_due) = (Instant::now() + wait, Instant::now() + ask_every);
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY.min(wait)) => {}
            () = shutdown.wait() => return Ok(()),
        }
        let now = Instant::now();
        if !taker.context.shared.corrupt.load(Ordering::Relaxed) {
            ask_due = now + ask_every;
        } else if now >= ask_due {
            taker.ask_again().await;
            ask_due = Instant::now() + ask_every;
        }
        if now >= due && taker.possible() {
            taker.take().await;
            due = Instant::now() + taker.settings.interval;
        }
    }
}

struct Taker {
    context: ServiceContext,
    settings: StateSettings,
    checkpoints: Arc<CheckpointStore>,
    check: Option<StateCheck>,
    store: Store,
    storage: StorageWatch,
}

impl Taker {
    /// A sick service's state is not worth keeping, and a full disk has no room for it.
    fn possible(&self) -> bool {
        self.context.shared.is_sound() && self.storage.is_ok() && self.settings.dir.exists()
    }

    async fn take(&self) {
        let in_use = self.context.shared.state_in_use.lock().await;
        let taken = self.stage_check_commit().await;
        drop(in_use);
        let service = &self.context.shared.name;
        let word = match &taken {
            Ok(_) => "taken",
            Err(CheckpointError::NotGood { .. }) => "not_good",
            Err(CheckpointError::DiskFull { .. }) => "disk_full",
            Err(CheckpointError::Changing { .. }) => "changing",
            Err(_) => "failed",
        };
        self.context.metrics.checkpoints.get_or_create(&kind(word)).inc();
        let failure = taken.as_ref().err().map(ToString::to_string);
        self.context
            .board
            .update_service(service, |line| line.checkpoint_failure = failure);
        match taken {
            Ok(taken) => {
                tracing::debug!(
                    service,
                    sequence = taken.sequence,
                    bytes = taken.bytes,
                    "checkpoint taken"
                );
                match self.list().await {
                    Ok(list) => self.show(list).await,
                    Err(error) => tracing::warn!(service, %error, "cannot list checkpoints"),
                }
            }
            Err(error @ CheckpointError::NotGood { .. }) => {
                tracing::warn!(service, %error, "checkpoint refused, asking the state itself");
                self.ask_the_state_itself().await;
            }
            // Too little room for a copy is no word on whether the state directory can be written: that is looked at
            // by itself.
            Err(error) => tracing::warn!(service, %error, "no checkpoint this time"),
        }
    }

    async fn stage_check_commit(&self) -> Result<Checkpoint, CheckpointError> {
        let (store, dir) = (Arc::clone(&self.checkpoints), self.settings.dir.clone());
        let unix_ms = clock::now().unix_ms;
        let staged = off_the_async_threads(move || store.stage(&dir, unix_ms)).await?;
        let verdict = match &self.check {
            Some(check) => check.run(staged.tree()).await,
            None => StateVerdict::Good,
        };
        // A copy that could not be checked must not displace one that was found good.
        if let StateVerdict::Corrupt(detail) | StateVerdict::Unknown(detail) = verdict {
            let store = Arc::clone(&self.checkpoints);
            off_the_async_threads(move || store.discard(staged)).await?;
            return Err(CheckpointError::NotGood {
                path: self.settings.dir.clone(),
                detail,
            });
        }
        let store = Arc::clone(&self.checkpoints);
        off_the_async_threads(move || store.commit(staged)).await
    }

    async fn ask_the_state_itself(&self) {
        let Some(check) = &self.check else { return };
        for last in [false, true] {
            let StateVerdict::Corrupt(detail) = check.run(&self.settings.dir).await else {
                return;
            };
            if last && self.context.shared.is_sound() {
                let service = self.context.shared.name.clone();
                // Only while the process ends is nobody listening.
                let _heard = self
                    .context
                    .events
                    .send(Input::StateCorrupt { service, detail })
                    .await
                    .is_ok();
            } else {
                tokio::time::sleep(SECOND_LOOK_AFTER).await;
            }
        }
    }

    /// Looks whether a state that was found corrupt passes its check now, twice.
    async fn ask_again(&self) {
        let Some(check) = &self.check else { return };
        for last in [false, true] {
            let in_use = self.context.shared.state_in_use.lock().await;
            let verdict = check.run(&self.settings.dir).await;
            drop(in_use);
            let open = self.context.shared.corrupt.load(Ordering::Relaxed);
            if verdict != StateVerdict::Good || !open || !self.settings.dir.exists() {
                return;
            }
            if !last {
                tokio::time::sleep(SECOND_LOOK_AFTER).await;
            }
        }
        let service = self.context.shared.name.clone();
        let input = if self.context.shared.pid().is_some() {
            Input::StateGood { service }
        } else {
            // It was not started because of its state: what remains is a service that does not run.
            let status = "it does not run, and its state passes its check again".to_owned();
            Input::Exited { service, status }
        };
        // Only while the process ends is nobody listening.
        let _heard = self.context.events.send(input).await.is_ok();
    }

    async fn list(&self) -> Result<Vec<Checkpoint>, CheckpointError> {
        let store = Arc::clone(&self.checkpoints);
        off_the_async_threads(move || store.list()).await
    }

    async fn show(&self, list: Vec<Checkpoint>) {
        let service = &self.context.shared.name;
        let count = list.len();
        let valid = i64::try_from(count).unwrap_or(i64::MAX);
        self.context
            .metrics
            .checkpoints_valid
            .get_or_create(&label(service))
            .set(valid);
        self.context
            .board
            .update_service(service, |line| line.checkpoints = count as u64);
        if let Err(error) = self.store.list_checkpoints(service, list).await {
            self.storage.failed("list checkpoints", &error);
        }
    }
}

async fn off_the_async_threads<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CheckpointError> + Send + 'static,
) -> Result<T, CheckpointError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|join| {
        let source = std::io::Error::other(join.to_string());
        Err(CheckpointError::Io {
            path: "checkpoint".into(),
            source,
        })
    })
}
