//! What is asked of the services, open loop and from outside: a request is due whatever the service does.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use theriac_heal::postgres::session::{Session, Target};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

use super::fault::Lane;
use super::redis::{self, Keys};
use super::ward::Ward;
use crate::demo::stage::unix_ms;
use crate::traffic::{Answered, Traffic, TrafficReport};

/// Requests a second against the HTTP service, 30 % of them writes.
const HTTP_RATE: f64 = 40.0;
/// Requests a second against the server, each over a connection of its own, half of them transactions that write.
const POSTGRES_RATE: f64 = 20.0;
/// A request of the server without an answer after this time has failed.
const POSTGRES_TIMEOUT: Duration = Duration::from_millis(2_500);
const HTTP_TIMEOUT: Duration = Duration::from_secs(1);
/// Time that reading back may take.
const READ_BACK_MAX: Duration = Duration::from_secs(15);
/// Failures kept one by one in one step.
pub(super) const FAILURES_MAX: usize = 20_000;

/// Rate of a lane's load, requests a second.
pub(super) fn rate(lane: Lane) -> f64 {
    match lane {
        Lane::Http => HTTP_RATE,
        Lane::Postgres => POSTGRES_RATE,
        Lane::Redis => redis::RATE,
    }
}

/// Time after which a failed request is known to have failed.
pub(super) fn patience(lane: Lane) -> Duration {
    match lane {
        Lane::Http => HTTP_TIMEOUT,
        Lane::Postgres => POSTGRES_TIMEOUT,
        Lane::Redis => redis::TIMEOUT,
    }
}

/// A request that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Failed {
    /// When it was due, Unix milliseconds.
    pub(super) ms: u64,
    pub(super) write: bool,
}

/// What was seen of one step.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    pub(super) requests: u64,
    pub(super) failures: Vec<Failed>,
    /// Acknowledged writes that are not there.
    pub(super) lost: u64,
    /// Acknowledged writes that could not be looked for.
    pub(super) unverified: u64,
    /// Requests that were answered well, as long as they are few enough to keep.
    pub(super) answers: Vec<Answered>,
}

impl Seen {
    /// A request that was due then is answered now.
    pub(super) fn answered(&mut self, due_ms: u64) {
        if self.answers.len() < FAILURES_MAX {
            self.answers.push(Answered {
                due_ms,
                at_ms: unix_ms(),
            });
        }
    }
}

/// A running load.
#[derive(Debug)]
pub(super) enum Load {
    Http(Traffic),
    Postgres(Ledger),
    Redis(Keys),
}

impl Load {
    /// Begins one. The same seed asks the same.
    pub(super) fn start(ward: &Ward, seed: u64) -> Self {
        match ward.app() {
            Some(target) => Self::Postgres(Ledger::start(target, seed)),
            None if ward.lane == Lane::Redis => Self::Redis(Keys::start(ward.address(), seed)),
            None => Self::Http(Traffic::start(ward.address(), HTTP_RATE, seed)),
        }
    }

    /// What was seen so far.
    pub(super) fn seen(&self) -> Seen {
        match self {
            Self::Http(traffic) => of_traffic(&traffic.snapshot()),
            Self::Postgres(ledger) => ledger.shared.seen().report.clone(),
            Self::Redis(keys) => keys.seen(),
        }
    }

    /// Ends it and looks for everything that was acknowledged.
    pub(super) async fn stop(self) -> Seen {
        match self {
            Self::Http(traffic) => of_traffic(&traffic.stop().await),
            Self::Postgres(ledger) => ledger.stop().await,
            Self::Redis(keys) => keys.stop().await,
        }
    }
}

fn of_traffic(report: &TrafficReport) -> Seen {
    Seen {
        requests: report.requests,
        failures: report
            .failures
            .iter()
            .map(|failure| Failed {
                ms: failure.unix_ms,
                write: failure.write,
            })
            .collect(),
        lost: report.lost_writes,
        unverified: report.unverified_writes,
        answers: report.answered.clone(),
    }
}

/// Transactions that each raise one common counter and leave a line of their own.
#[derive(Debug)]
pub(super) struct Ledger {
    shared: Arc<Shared>,
    stop: watch::Sender<()>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    target: Target,
    run: u64,
    seen: Mutex<Written>,
}

#[derive(Debug, Default)]
struct Written {
    report: Seen,
    acknowledged: BTreeSet<i64>,
    next: i64,
}

impl Ledger {
    fn start(target: Target, run: u64) -> Self {
        let shared = Arc::new(Shared {
            target,
            run,
            seen: Mutex::default(),
        });
        let (stop, stopped) = watch::channel(());
        let asked = Arc::clone(&shared);
        let ask = move |write, due_ms| {
            let shared = Arc::clone(&asked);
            async move { shared.ask(write, due_ms).await }
        };
        let task = tokio::spawn(generate(POSTGRES_RATE, run, stopped, ask));
        Self { shared, stop, task }
    }

    async fn stop(self) -> Seen {
        drop(self.stop);
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the load ended early");
        }
        let deadline = Instant::now() + READ_BACK_MAX;
        let found = loop {
            match self.shared.read_back().await {
                Some(found) => break Some(found),
                None if Instant::now() >= deadline => break None,
                None => sleep(Duration::from_millis(100)).await,
            }
        };
        if found.is_some() {
            self.shared.make_room().await;
        }
        let mut seen = self.shared.seen();
        let acknowledged = seen.acknowledged.len() as u64;
        match found {
            Some(found) => seen.report.lost = seen.acknowledged.difference(&found).count() as u64,
            None => seen.report.unverified = acknowledged,
        }
        seen.report.clone()
    }
}

/// Requests that are due `rate` times a second, half of them writes by `seed`, until the other end of `stopped` is gone; then those under way come to their end.
/// `ask(write, due_ms)`: one request, due at this Unix time.
pub(super) async fn generate<F>(
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

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Written> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ask(&self, write: bool, due_ms: u64) {
        let number = write.then(|| {
            let mut seen = self.seen();
            seen.next += 1;
            seen.next
        });
        let answered = timeout(POSTGRES_TIMEOUT, self.exchange(number)).await;
        let good = matches!(answered, Ok(Ok(())));
        let mut seen = self.seen();
        seen.report.requests += 1;
        if good {
            // A commit whose answer never came may still have taken effect: only what was acknowledged is held to.
            seen.acknowledged.extend(number);
            seen.report.answered(due_ms);
        } else if seen.report.failures.len() < FAILURES_MAX {
            seen.report.failures.push(Failed { ms: due_ms, write });
        }
    }

    async fn exchange(&self, number: Option<i64>) -> Result<(), theriac_heal::postgres::PostgresError> {
        let session = Session::open(&self.target, None, POSTGRES_TIMEOUT).await?;
        let Some(number) = number else {
            let rows = session
                .rows("a read", "select n from hot where id = 1", &[])
                .await?;
            return match rows.len() {
                1 => Ok(()),
                _ => Err(theriac_heal::postgres::PostgresError::Query {
                    what: "a read".to_owned(),
                    detail: "the row is not there".to_owned(),
                    code: None,
                }),
            };
        };
        let run = self.run;
        let transaction = format!(
            "begin; update hot set n = n + 1 where id = 1; \
             insert into ledger values ({run}, {number}, repeat(md5({number}::text), 60)); commit"
        );
        session.execute("a write", &transaction).await
    }

    /// Numbers of this run's lines.
    async fn read_back(&self) -> Option<BTreeSet<i64>> {
        let look = async {
            let session = Session::open(&self.target, None, READ_BACK_MAX).await.ok()?;
            let sql = format!("select n from ledger where run = {}", self.run);
            let rows = session.rows("reading back", &sql, &[]).await.ok()?;
            Some(rows.iter().map(|row| row.get::<_, i64>(0)).collect())
        };
        timeout(Duration::from_secs(5), look).await.ok()?
    }

    /// Lines that were looked for go. Apart from the reading: it may be done although its answer never came, and a second reading would then
    /// find nothing. What stays is another run's, and only takes room.
    async fn make_room(&self) {
        let clear = async {
            let session = Session::open(&self.target, None, READ_BACK_MAX).await?;
            session.execute("making room", "truncate ledger").await
        };
        match timeout(Duration::from_secs(5), clear).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "the ledger stays"),
            Err(_) => tracing::debug!("the ledger stays: no answer"),
        }
    }
}
