//! Numbered writes to a server, reads between them, and what became of the writes that were acknowledged.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

use super::load::{FAILURES_MAX, Failed, Seen};
use crate::demo::stage::unix_ms;

/// Time that reading back may take.
pub(super) const READ_BACK_MAX: Duration = Duration::from_secs(15);

/// A server that is asked over a connection of its own for each request.
pub(super) trait Server: Debug + Send + Sync + 'static {
    /// Requests a second, half of them writes.
    const RATE: f64;
    /// A request without an answer after this time has failed.
    const TIMEOUT: Duration;

    /// The write of this number, or a read: whether it was answered well.
    fn exchange(&self, number: Option<i64>) -> impl Future<Output = bool> + Send;

    /// How many of the acknowledged writes are there; then they go. `None`: it could not be seen.
    fn read_back(&self, acknowledged: &BTreeSet<i64>) -> impl Future<Output = Option<u64>> + Send;
}

/// A running load of them.
#[derive(Debug)]
pub(super) struct Writes<S> {
    shared: Arc<Shared<S>>,
    stop: watch::Sender<()>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
pub(super) struct Shared<S> {
    pub(super) server: S,
    seen: Mutex<Written>,
}

#[derive(Debug, Default)]
pub(super) struct Written {
    pub(super) report: Seen,
    pub(super) acknowledged: BTreeSet<i64>,
    next: i64,
}

impl<S: Server> Writes<S> {
    /// The same seed asks the same.
    pub(super) fn start(server: S, seed: u64) -> Self {
        let shared = Arc::new(Shared::new(server));
        let (stop, stopped) = watch::channel(());
        let asked = Arc::clone(&shared);
        let ask = move |write, due_ms| {
            let shared = Arc::clone(&asked);
            async move { shared.ask(write, due_ms).await }
        };
        let task = tokio::spawn(generate(S::RATE, seed, stopped, ask));
        Self { shared, stop, task }
    }

    pub(super) fn seen(&self) -> Seen {
        self.shared.seen().report.clone()
    }

    /// Ends it and looks for everything that was acknowledged.
    pub(super) async fn stop(self) -> Seen {
        drop(self.stop);
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the load ended early");
        }
        let acknowledged = self.shared.seen().acknowledged.clone();
        let deadline = Instant::now() + READ_BACK_MAX;
        let found = loop {
            match self.shared.server.read_back(&acknowledged).await {
                Some(found) => break Some(found),
                None if Instant::now() >= deadline => break None,
                None => sleep(Duration::from_millis(100)).await,
            }
        };
        let mut seen = self.shared.seen();
        let acknowledged = acknowledged.len() as u64;
        match found {
            Some(found) => seen.report.lost = acknowledged.saturating_sub(found),
            None => seen.report.unverified = acknowledged,
        }
        seen.report.clone()
    }
}

impl<S: Server> Shared<S> {
    pub(super) fn new(server: S) -> Self {
        Self {
            server,
            seen: Mutex::default(),
        }
    }

    pub(super) fn seen(&self) -> MutexGuard<'_, Written> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn ask(&self, write: bool, due_ms: u64) {
        let number = write.then(|| {
            let mut seen = self.seen();
            seen.next += 1;
            seen.next
        });
        let answered = timeout(S::TIMEOUT, self.server.exchange(number)).await;
        let good = matches!(answered, Ok(true));
        let mut seen = self.seen();
        seen.report.requests += 1;
        if good {
            // Only what was acknowledged is held to.
            seen.acknowledged.extend(number);
            seen.report.answered(due_ms);
        } else if seen.report.failures.len() < FAILURES_MAX {
            seen.report.failures.push(Failed { ms: due_ms, write });
        }
    }
}

/// Requests that are due `rate` times a second, half of them writes by `seed`, until the other end of `stopped` is gone; then those under way come to their end.
/// `ask(write, due_ms)`: one request, due at this Unix time.
async fn generate<F>(
    rate: f64,
    seed: u64,
    mut stopped: watch::Receiver<()>,
    ask: impl Fn(bool, u64) -> F + Send,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut ticks = interval(Duration::from_secs_f64(1.0 / rate));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut under_way = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            changed = stopped.changed() => if changed.is_err() { break },
            _ = ticks.tick() => {}
        }
        while under_way.try_join_next().is_some() {}
        under_way.spawn(ask(random.random_bool(0.5), unix_ms()));
    }
    while under_way.join_next().await.is_some() {}
}
