//! What is asked of the services, open loop and from outside: a request is due whatever the service does.

use std::collections::BTreeSet;
use std::time::Duration;

use theriac_heal::postgres::PostgresError;
use theriac_heal::postgres::session::{Session, Target};
use tokio::time::timeout;

use super::fault::Lane;
use super::redis::Keys;
use super::ward::Ward;
use super::writes::{READ_BACK_MAX, Server, Writes};
use crate::demo::stage::unix_ms;
use crate::traffic::{Answered, Traffic, TrafficReport};

/// Requests a second against the HTTP service, 30 % of them writes.
const HTTP_RATE: f64 = 40.0;
const HTTP_TIMEOUT: Duration = Duration::from_secs(1);
/// Failures kept one by one in one step.
pub(super) const FAILURES_MAX: usize = 20_000;

/// Rate of a lane's load, requests a second.
pub(super) fn rate(lane: Lane) -> f64 {
    match lane {
        Lane::Http => HTTP_RATE,
        Lane::Postgres => Ledger::RATE,
        Lane::Redis => Keys::RATE,
    }
}

/// Time after which a failed request is known to have failed.
pub(super) fn patience(lane: Lane) -> Duration {
    match lane {
        Lane::Http => HTTP_TIMEOUT,
        Lane::Postgres => Ledger::TIMEOUT,
        Lane::Redis => Keys::TIMEOUT,
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
    Postgres(Writes<Ledger>),
    Redis(Writes<Keys>),
}

impl Load {
    /// Begins one. The same seed asks the same.
    pub(super) fn start(ward: &Ward, seed: u64) -> Self {
        match ward.app() {
            Some(target) => Self::Postgres(Writes::start(Ledger { target, run: seed }, seed)),
            None if ward.lane == Lane::Redis => {
                Self::Redis(Writes::start(Keys::new(ward.address(), seed), seed))
            }
            None => Self::Http(Traffic::start(ward.address(), HTTP_RATE, seed)),
        }
    }

    /// What was seen so far.
    pub(super) fn seen(&self) -> Seen {
        match self {
            Self::Http(traffic) => of_traffic(&traffic.snapshot()),
            Self::Postgres(ledger) => ledger.seen(),
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
    target: Target,
    run: u64,
}

impl Server for Ledger {
    const RATE: f64 = 20.0;
    const TIMEOUT: Duration = Duration::from_millis(2_500);

    /// A commit whose answer never came may still have taken effect.
    async fn exchange(&self, number: Option<i64>) -> bool {
        self.transact(number).await.is_ok()
    }

    async fn read_back(&self, acknowledged: &BTreeSet<i64>) -> Option<u64> {
        let lines = self.lines().await?;
        self.make_room().await;
        Some(acknowledged.intersection(&lines).count() as u64)
    }
}

impl Ledger {
    async fn transact(&self, number: Option<i64>) -> Result<(), PostgresError> {
        let session = Session::open(&self.target, None, Self::TIMEOUT).await?;
        let Some(number) = number else {
            let rows = session
                .rows("a read", "select n from hot where id = 1", &[])
                .await?;
            return match rows.len() {
                1 => Ok(()),
                _ => Err(PostgresError::Query {
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
    async fn lines(&self) -> Option<BTreeSet<i64>> {
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
