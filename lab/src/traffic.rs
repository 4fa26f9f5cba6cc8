//! An open-loop load generator that counts failed requests from outside: it sends at its rate whatever the service does, so a
//! service that is down for a second fails a second's worth of requests.
//!
//! It knows what it wrote. A read that shows anything but the last acknowledged value (or a newer one on its way) is a failure,
//! and at the end every acknowledged write is read back.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Request, StatusCode};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

/// A request without an answer after this time has failed.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(1);
/// Share of writes.
const WRITE_SHARE: f64 = 0.3;
/// Keys in use at a time.
const SLOTS: usize = 64;
/// Failures kept one by one; more are only counted.
const FAILURES_MAX: usize = 100_000;
/// Requests under way; when there are more, the service is far too slow and the next ones count as timed out at once.
const UNDER_WAY_MAX: usize = 10_000;
/// Time that reading back may take, for a service that is still being healed.
const READ_BACK_MAX: Duration = Duration::from_secs(15);

/// What the generator saw.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct TrafficReport {
    /// Requests that ended.
    pub requests: u64,
    /// Requests that ended well.
    pub ok: u64,
    /// Requests that did not.
    pub failed: u64,
    /// How often each kind of failure was seen.
    pub kinds: BTreeMap<FailureKind, u64>,
    /// The failures, oldest first; at most 100 000, the rest is only counted.
    pub failures: Vec<Failure>,
    /// Those that ended well, oldest answer first; at most 100 000.
    #[serde(skip)]
    pub answered: Vec<Answered>,
    /// Writes that were acknowledged.
    pub acknowledged_writes: u64,
    /// Keys whose last acknowledged write could not be read back, known after [`Traffic::stop`].
    pub lost_writes: u64,
    /// Keys that could not be read back because the service did not answer, known after [`Traffic::stop`].
    pub unverified_writes: u64,
}

impl TrafficReport {
    /// Failures of requests that were due in the window from `from` to `until` (both included), Unix milliseconds.
    pub fn failed_between(&self, from: u64, until: u64) -> u64 {
        self.failures
            .iter()
            .filter(|failure| (from..=until).contains(&failure.unix_ms))
            .count() as u64
    }
}

/// One request that was answered well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answered {
    /// When it was due, milliseconds since the Unix epoch.
    pub due_ms: u64,
    /// When it was answered, likewise.
    pub at_ms: u64,
}

impl Answered {
    /// How long it took.
    pub fn took_ms(&self) -> u64 {
        self.at_ms.saturating_sub(self.due_ms)
    }
}

/// One failed request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// When the request was due, milliseconds since the Unix epoch.
    pub unix_ms: u64,
    /// How it failed.
    pub kind: FailureKind,
    /// Whether it was a write.
    pub write: bool,
}

/// How a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// No connection.
    Refused,
    /// No answer within a second.
    Timeout,
    /// Another status than 2xx.
    Status,
    /// Another value than the one last acknowledged, or none.
    WrongValue,
    /// The connection broke.
    Broken,
}

/// A running generator. It ends when this is dropped; [`Traffic::stop`] ends it and reads everything back.
#[derive(Debug)]
pub struct Traffic {
    shared: Arc<Shared>,
    stop: watch::Sender<()>,
    task: JoinHandle<()>,
}

impl Traffic {
    /// Starts `rate` requests a second (above 0, at most 10 000) against `addr`; the same seed gives the same keys and mix. Call within
    /// a tokio runtime.
    pub fn start(addr: SocketAddr, rate: f64, seed: u64) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(REQUEST_TIMEOUT));
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(5))
            .build(connector);
        let shared = Arc::new(Shared {
            addr,
            client,
            seed,
            seen: Mutex::default(),
        });
        let (stop, stopped) = watch::channel(());
        let task = tokio::spawn(generate(Arc::clone(&shared), rate.clamp(0.01, 10_000.0), stopped));
        Self { shared, stop, task }
    }

    /// What was seen so far.
    pub fn snapshot(&self) -> TrafficReport {
        self.shared.seen().report.clone()
    }

    /// Ends, waits for requests under way, then reads every acknowledged write back. Takes at most about 17 s.
    pub async fn stop(self) -> TrafficReport {
        drop(self.stop);
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the load generator ended early");
        }
        self.shared.read_back().await;
        self.shared.seen().report.clone()
    }
}

#[derive(Debug)]
struct Shared {
    addr: SocketAddr,
    client: Client<HttpConnector, Full<Bytes>>,
    seed: u64,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    report: TrafficReport,
    /// Every key that was ever written.
    keys: BTreeMap<String, Known>,
    /// The generation of each slot's key. A write of unknown fate retires its key: it might still take effect later.
    generations: BTreeMap<usize, u64>,
}

/// What is known of a key. Versions are numbers from 1; a value names its version.
#[derive(Debug, Clone, Copy, Default)]
struct Known {
    acknowledged: u64,
    sent: u64,
    writing: bool,
}

/// A request that is due.
#[derive(Debug)]
enum Task {
    Write {
        slot: usize,
        key: String,
        version: u64,
    },
    /// At least this version has to be seen.
    Read {
        key: String,
        least: u64,
    },
}

async fn generate(shared: Arc<Shared>, rate: f64, mut stopped: watch::Receiver<()>) {
    let mut random = ChaCha8Rng::seed_from_u64(shared.seed);
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
        let due_ms = unix_ms();
        let (slot, write) = (random.random_range(0..SLOTS), random.random_bool(WRITE_SHARE));
        if under_way.len() >= UNDER_WAY_MAX {
            shared.seen().failed(due_ms, FailureKind::Timeout, write);
            continue;
        }
        let task = shared.seen().plan(slot, write);
        let shared = Arc::clone(&shared);
        under_way.spawn(async move { shared.carry_out(task, due_ms).await });
    }
    while under_way.join_next().await.is_some() {}
}

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn carry_out(&self, task: Task, due_ms: u64) {
        match task {
            Task::Write { slot, key, version } => {
                let value = value(self.seed, &key, version);
                let result = self.request(Method::PUT, &key, value.into_bytes().into()).await;
                self.seen().written(slot, &key, version, result.err(), due_ms);
            }
            Task::Read { key, least } => {
                let found = self.request(Method::GET, &key, Bytes::new()).await;
                let mut seen = self.seen();
                let sent = seen.keys.get(&key).map_or(0, |known| known.sent);
                match found {
                    Ok(Some(bytes))
                        if version_of(self.seed, &key, &bytes)
                            .is_some_and(|v| (least..=sent).contains(&v)) =>
                    {
                        seen.succeeded(due_ms);
                    }
                    Ok(_) => seen.failed(due_ms, FailureKind::WrongValue, false),
                    Err(kind) => seen.failed(due_ms, kind, false),
                }
            }
        }
    }

    /// The answer's body; `None` for 404.
    async fn request(&self, method: Method, key: &str, body: Bytes) -> Result<Option<Bytes>, FailureKind> {
        let request = Request::builder()
            .method(method)
            .uri(format!("http://{}/kv/{key}", self.addr))
            .body(Full::new(body))
            .map_err(|_| FailureKind::Broken)?;
        let exchange = async {
            let response = self.client.request(request).await.map_err(|error| {
                if error.is_connect() {
                    FailureKind::Refused
                } else {
                    FailureKind::Broken
                }
            })?;
            let status = response.status();
            let body = Limited::new(response.into_body(), 1 << 20)
                .collect()
                .await
                .map_err(|_| FailureKind::Broken)?;
            match status {
                StatusCode::NOT_FOUND => Ok(None),
                status if status.is_success() => Ok(Some(body.to_bytes())),
                _ => Err(FailureKind::Status),
            }
        };
        timeout(REQUEST_TIMEOUT, exchange)
            .await
            .unwrap_or(Err(FailureKind::Timeout))
    }

    /// Reads every key with an acknowledged write, again and again while the service does not answer.
    async fn read_back(&self) {
        let keys: Vec<(String, Known)> = self
            .seen()
            .keys
            .iter()
            .filter(|(_, known)| known.acknowledged > 0)
            .map(|(key, known)| (key.clone(), *known))
            .collect();
        let deadline = Instant::now() + READ_BACK_MAX;
        let (mut lost, mut unverified) = (0, 0);
        for (key, known) in keys {
            let found = loop {
                match self.request(Method::GET, &key, Bytes::new()).await {
                    Ok(found) => break Some(found),
                    Err(_) if Instant::now() >= deadline => break None,
                    Err(_) => sleep(Duration::from_millis(100)).await,
                }
            };
            match found {
                None => unverified += 1,
                Some(found) => {
                    let version = found.and_then(|bytes| version_of(self.seed, &key, &bytes));
                    let good =
                        version.is_some_and(|version| (known.acknowledged..=known.sent).contains(&version));
                    lost += u64::from(!good);
                }
            }
        }
        let mut seen = self.seen();
        seen.report.lost_writes = lost;
        seen.report.unverified_writes = unverified;
    }
}

impl Seen {
    /// A write where nothing can be read yet; a read where a write of the same key is under way.
    fn plan(&mut self, slot: usize, write: bool) -> Task {
        let generation = *self.generations.entry(slot).or_default();
        let key = format!("slot-{slot}-{generation}");
        let known = self.keys.entry(key.clone()).or_default();
        if (write || known.acknowledged == 0) && !known.writing {
            known.writing = true;
            known.sent += 1;
            return Task::Write {
                slot,
                version: known.sent,
                key,
            };
        }
        if known.acknowledged > 0 {
            return Task::Read {
                least: known.acknowledged,
                key,
            };
        }
        // The first write is still under way: a key of its own keeps the rate.
        self.generations.insert(slot, generation + 1);
        self.plan(slot, true)
    }

    fn written(&mut self, slot: usize, key: &str, version: u64, failure: Option<FailureKind>, due_ms: u64) {
        if let Some(known) = self.keys.get_mut(key) {
            known.writing = false;
            if failure.is_none() {
                known.acknowledged = known.acknowledged.max(version);
            }
        }
        match failure {
            None => {
                self.report.acknowledged_writes += 1;
                self.succeeded(due_ms);
            }
            Some(kind) => {
                // Only a refused connection says for certain that it will not take effect later.
                if kind != FailureKind::Refused {
                    let current = self.generations.entry(slot).or_default();
                    if format!("slot-{slot}-{current}") == key {
                        *current += 1;
                    }
                }
                self.failed(due_ms, kind, true);
            }
        }
    }

    fn succeeded(&mut self, due_ms: u64) {
        self.report.requests += 1;
        self.report.ok += 1;
        if self.report.answered.len() < FAILURES_MAX {
            let at_ms = unix_ms();
            self.report.answered.push(Answered { due_ms, at_ms });
        }
    }

    fn failed(&mut self, due_ms: u64, kind: FailureKind, write: bool) {
        self.report.requests += 1;
        self.report.failed += 1;
        *self.report.kinds.entry(kind).or_default() += 1;
        if self.report.failures.len() < FAILURES_MAX {
            self.report.failures.push(Failure {
                unix_ms: due_ms,
                kind,
                write,
            });
        }
    }
}

/// A value that names its key, its version and the run, with some weight.
fn value(seed: u64, key: &str, version: u64) -> String {
    format!("{seed} {key} {version} {}", "x".repeat(200))
}

fn version_of(seed: u64, key: &str, bytes: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(bytes).ok()?;
    let mut parts = text.split(' ');
    let (of_seed, of_key, version) = (parts.next()?, parts.next()?, parts.next()?);
    (of_seed.parse() == Ok(seed) && of_key == key).then_some(())?;
    let version = version.parse().ok()?;
    (value(seed, key, version) == text).then_some(version)
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use axum::extract::{Path, State};
    use axum::routing::put;
    use tokio::net::TcpListener;

    use super::*;

    type Table = Arc<Mutex<BTreeMap<String, Bytes>>>;

    /// A service that forgets every `forget`-th write that it acknowledges, and answers 500 to every `refuse`-th request.
    async fn serve(forget: u64, refuse: u64) -> SocketAddr {
        let (table, count) = (Table::default(), Arc::new(AtomicU64::new(0)));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let hit = move |every: u64, n: u64| every > 0 && n % every == every - 1;
        let write = move |State((table, count)): State<(Table, Arc<AtomicU64>)>,
                          Path(key): Path<String>,
                          value: Bytes| async move {
            let n = count.fetch_add(1, Ordering::Relaxed);
            if hit(refuse, n) {
                return StatusCode::INTERNAL_SERVER_ERROR;
            }
            if !hit(forget, n) {
                table.lock().unwrap().insert(key, value);
            }
            StatusCode::NO_CONTENT
        };
        let read = |State((table, _)): State<(Table, Arc<AtomicU64>)>, Path(key): Path<String>| async move {
            table
                .lock()
                .unwrap()
                .get(&key)
                .cloned()
                .ok_or(StatusCode::NOT_FOUND)
        };
        let routes = axum::Router::new()
            .route("/kv/{key}", put(write).get(read))
            .with_state((table, count));
        tokio::spawn(async move { axum::serve(listener, routes).await });
        addr
    }

    async fn until(traffic: &Traffic, requests: u64) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while traffic.snapshot().requests < requests {
            assert!(Instant::now() < deadline, "{:?}", traffic.snapshot());
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Failures of the service: an answer that came too late on a busy machine is none.
    fn of_the_service(report: &TrafficReport) -> BTreeMap<FailureKind, u64> {
        let mut kinds = report.kinds.clone();
        kinds.remove(&FailureKind::Timeout);
        kinds
    }

    #[tokio::test]
    async fn a_good_service_has_no_failures_and_loses_nothing() {
        let traffic = Traffic::start(serve(0, 0).await, 100.0, 7);
        until(&traffic, 200).await;
        let report = traffic.stop().await;
        assert_eq!(of_the_service(&report), BTreeMap::new());
        assert_eq!((report.lost_writes, report.unverified_writes), (0, 0));
        assert_eq!(report.ok + report.failed, report.requests);
        assert!(report.acknowledged_writes > 20, "{report:?}");
    }

    #[tokio::test]
    async fn a_service_that_forgets_what_it_acknowledged_is_found_out() {
        let traffic = Traffic::start(serve(3, 0).await, 100.0, 7);
        until(&traffic, 200).await;
        let report = traffic.stop().await;
        assert!(
            report.lost_writes > 0 && report.kinds.contains_key(&FailureKind::WrongValue),
            "{:?}",
            report.kinds
        );
    }

    #[tokio::test]
    async fn refused_writes_are_failures_and_not_lost() {
        let traffic = Traffic::start(serve(0, 4).await, 100.0, 7);
        until(&traffic, 200).await;
        let report = traffic.stop().await;
        let kinds = of_the_service(&report);
        assert!(
            kinds[&FailureKind::Status] > 5 && kinds.len() == 1 && report.lost_writes == 0,
            "{report:?}"
        );
    }

    #[tokio::test]
    async fn nobody_there_is_refused_at_the_full_rate() {
        // Nobody listens there, and nobody else can begin to.
        let kept = tokio::net::TcpSocket::new_v4().unwrap();
        kept.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let addr = kept.local_addr().unwrap();
        let begun = unix_ms();
        let traffic = Traffic::start(addr, 500.0, 7);
        until(&traffic, 200).await;
        let report = traffic.snapshot();
        assert_eq!(report.failed, report.requests);
        assert_eq!(report.kinds.keys().collect::<Vec<_>>(), [&FailureKind::Refused]);
        assert_eq!(report.failed_between(begun, unix_ms()), report.failed);
        assert_eq!(report.failed_between(0, begun - 1), 0);
    }

    #[test]
    fn a_value_of_another_key_version_or_run_is_not_taken() {
        let good = value(7, "slot-1-0", 3);
        assert_eq!(version_of(7, "slot-1-0", good.as_bytes()), Some(3));
        assert_eq!(version_of(8, "slot-1-0", good.as_bytes()), None);
        assert_eq!(version_of(7, "slot-2-0", good.as_bytes()), None);
        assert_eq!(
            version_of(7, "slot-1-0", &good.as_bytes()[..good.len() - 1]),
            None
        );
        assert_eq!(version_of(7, "slot-1-0", b"\xff"), None);
    }

    #[test]
    fn the_same_seed_plans_the_same_requests() {
        let plan = |seed| {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            let mut seen = Seen::default();
            let plan = |_| {
                format!(
                    "{:?}",
                    seen.plan(random.random_range(0..SLOTS), random.random_bool(WRITE_SHARE))
                )
            };
            (0..200).map(plan).collect::<Vec<_>>()
        };
        assert_eq!(plan(1), plan(1));
        assert_ne!(plan(1), plan(2));
    }
}
