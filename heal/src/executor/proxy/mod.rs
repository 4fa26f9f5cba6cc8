//! A proxy before one service: it holds requests back while the service restarts, turns new ones away while it drains, and stops asking
//! an upstream that does not answer.
//!
//! | `drain` | |
//! |---|---|
//! | precondition | the service has a proxy, and the policy allows it (risk class R3: a person approves, unless the file says otherwise) |
//! | effect | what is in hand ends, within [`ProxySpec::drain_timeout`]; whatever is new is told to come later |
//! | undo | by itself after [`ProxySpec::drain_for`], or [`Proxy::undrain`] for the same intent; it lives in this process, so a crash of it ends it too |
//! | verified by | the service's own probe, which does not go through the proxy |
//!
//! Each request is bounded in every part: head, body, connecting, waiting for the answer, silence of either end, bytes buffered; but for an
//! answer's whole time, which is as long as its reader takes a byte within [`ProxySpec::idle_timeout`]. There are at most
//! [`ProxySpec::connections_max`] connections. HTTP/1 is parsed and framed anew by `hyper` on both sides, so what one side means by a
//! message's end the other does too; upgrades (`WebSocket`) and `CONNECT` are for the mode `tcp`.

mod breaker;
mod door;
mod http;
mod stream;
mod tcp;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

pub use self::breaker::Circuit;
use self::breaker::{Admission, Breaker, Ended, RetryBudget};
use self::door::{Door, Draining, InHand};
use self::stream::IdleStream;

/// What a proxy understands of what it passes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// HTTP/1.0 and 1.1: requests.
    Http,
    /// Connections.
    Tcp,
}

/// How a proxy works. Whoever makes one has checked the ranges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProxySpec {
    /// What it understands.
    pub mode: Mode,
    /// The service.
    pub upstream: SocketAddr,
    /// Most clients' connections at once, at least 1.
    pub connections_max: usize,
    /// Longest time to connect upstream.
    pub connect_timeout: Duration,
    /// Longest time for a request's body to arrive, and then from its end to the head of the answer.
    pub response_timeout: Duration,
    /// Longest time for a request's head, and between two requests of a connection.
    pub header_timeout: Duration,
    /// Longest silence of either end of a connection; longer than `response_timeout`.
    pub idle_timeout: Duration,
    /// Longest time that a request is held back while the service restarts, however often it does.
    pub hold: Duration,
    /// Longest time that a drain waits for what is in hand.
    pub drain_timeout: Duration,
    /// How long new requests are turned away after that.
    pub drain_for: Duration,
    /// Failures in a row that open the circuit, at least 1.
    pub failures_max: u32,
    /// How long it stays open before one request finds out.
    pub open_for: Duration,
    /// Retries in per cent of requests, 0 to 10.
    pub retry_percent: u32,
}

/// What became of requests (or, in mode `tcp`, connections). Each is counted once, but for `retries` and `held`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProxyCounts {
    /// Answered by the service, whatever it said.
    pub answered: u64,
    /// The service did not answer.
    pub failed: u64,
    /// Turned away while draining.
    pub drained: u64,
    /// Turned away because the circuit was open.
    pub broken: u64,
    /// Turned away because there were too many connections.
    pub crowded: u64,
    /// Sent upstream a second time.
    pub retries: u64,
    /// Held back while the service restarted.
    pub held: u64,
}

/// The same, while it is counted.
#[derive(Debug, Default)]
struct Counting {
    answered: AtomicU64,
    failed: AtomicU64,
    drained: AtomicU64,
    broken: AtomicU64,
    crowded: AtomicU64,
    retries: AtomicU64,
    held: AtomicU64,
}

/// How a drain went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drained {
    /// Requests in hand when it began.
    pub had: usize,
    /// Those that had not ended in time; they go on.
    pub left: usize,
    /// How long new ones are turned away from now.
    pub lasts: Duration,
}

/// One proxy; shared between those who serve, those who act and those who tell.
#[derive(Debug)]
pub struct Proxy {
    spec: ProxySpec,
    begun: Instant,
    door: Door,
    // Both held for a few assignments, never across an await.
    breaker: Mutex<Breaker>,
    retries: Mutex<RetryBudget>,
    counts: Counting,
}

/// Why a request did not reach the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turned {
    Draining(Draining),
    Broken { retry_after: Duration },
}

/// A request that was let in. Dropped before it [`Self::end`]s, nothing was learnt of the upstream.
#[derive(Debug)]
struct Admitted {
    proxy: Arc<Proxy>,
    by: Admission,
    ended: Ended,
    in_hand: Option<InHand>,
}

impl Admitted {
    /// What it told of the upstream; whatever is still in hand of it is returned.
    fn end(mut self, ended: Ended) -> Option<InHand> {
        self.ended = ended;
        self.in_hand.take()
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let now = self.proxy.now();
        self.proxy.breaker().note(self.by, self.ended, now);
    }
}

impl Proxy {
    /// A proxy that serves nobody yet.
    pub fn new(spec: ProxySpec) -> Arc<Self> {
        Arc::new(Self {
            spec,
            begun: Instant::now(),
            door: Door::new(),
            breaker: Mutex::new(Breaker::new(spec.failures_max, spec.open_for)),
            retries: Mutex::new(RetryBudget::new(spec.retry_percent)),
            counts: Counting::default(),
        })
    }

    /// Serves until `stop` ends; then lets what is in hand end within `grace`.
    pub async fn serve(self: Arc<Self>, listener: Arc<TcpListener>, grace: Duration, stop: impl Future) {
        let places = Arc::new(Semaphore::new(self.spec.connections_max));
        // Those who are told that there is no place wait for nobody, but are not unlimited either.
        let porch = Arc::new(Semaphore::new(REFUSED_MAX));
        let closing = watch::Sender::new(false);
        let mut connections = JoinSet::new();
        tokio::pin!(stop);
        loop {
            let accepted = tokio::select! {
                _ = &mut stop => break,
                Some(_ended) = connections.join_next() => continue,
                accepted = listener.accept() => accepted,
            };
            let (stream, client) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, most likely: wait for some to close.
                    tracing::warn!(%error, "the proxy cannot accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            // Small messages wait for nobody; where it cannot be set they are only slower.
            let _set = stream.set_nodelay(true).is_ok();
            if let Ok(place) = Arc::clone(&places).try_acquire_owned() {
                let (proxy, closing) = (Arc::clone(&self), closing.subscribe());
                connections.spawn(async move {
                    match proxy.spec.mode {
                        Mode::Http => http::serve(proxy, stream, client, closing).await,
                        Mode::Tcp => tcp::serve(proxy, stream).await,
                    }
                    drop(place);
                });
            } else {
                self.counts.crowded.fetch_add(1, Ordering::Relaxed);
                if self.spec.mode == Mode::Http
                    && let Ok(place) = Arc::clone(&porch).try_acquire_owned()
                {
                    connections.spawn(async move {
                        http::turn_away(stream).await;
                        drop(place);
                    });
                }
            }
        }
        closing.send_replace(true);
        let all = async { while connections.join_next().await.is_some() {} };
        if timeout(grace, all).await.is_err() {
            tracing::warn!(left = connections.len(), "connections of the proxy are cut off");
        }
    }

    /// The service is about to restart, or has just ended: requests wait, at most [`ProxySpec::hold`] from now.
    pub fn hold(&self) {
        self.door.hold(self.spec.hold);
    }

    /// Lets those who wait go on.
    pub fn release(&self) {
        self.door.release();
    }

    /// Waits until what is in hand has ended, or for so long. How many have not.
    pub async fn finished(&self, longest: Duration) -> usize {
        self.door.finished(longest).await
    }

    /// Lets those who wait go on as soon as the service takes connections, or the time for which they are held is over.
    pub async fn release_when_up(&self) {
        while self.door.holds_until().is_some() {
            let connected = timeout(self.spec.connect_timeout, TcpStream::connect(self.spec.upstream)).await;
            if matches!(connected, Ok(Ok(_))) {
                self.breaker().reset();
                break;
            }
            sleep(LOOK_EVERY).await;
        }
        self.door.release();
    }

    /// Lets what is in hand end and turns away what is new, for that intent; ends by itself.
    pub async fn drain(&self, intent: u64) -> Drained {
        let ProxySpec {
            drain_timeout,
            drain_for,
            ..
        } = self.spec;
        self.door.drain(drain_timeout + drain_for, intent);
        let had = self.door.in_hand();
        let left = self.door.finished(drain_timeout).await;
        self.door.drain(drain_for, intent);
        Drained {
            had,
            left,
            lasts: drain_for,
        }
    }

    /// Takes [`Self::drain`] back, if it is of that intent.
    pub fn undrain(&self, intent: u64) {
        self.door.undrain(intent);
    }

    /// A person wants it drained until they say otherwise.
    pub fn order_drained(&self, drained: bool) {
        self.door.order(drained);
    }

    /// The service's own probe ended.
    pub fn note_probe(&self, well: bool) {
        let now = self.now();
        self.breaker().told(well, now);
    }

    /// Whether new requests are turned away.
    pub fn is_draining(&self) -> bool {
        self.door.is_draining()
    }

    /// Whether requests are held back.
    pub fn is_holding(&self) -> bool {
        self.door.holds_until().is_some()
    }

    /// Requests, or connections, in hand.
    pub fn in_hand(&self) -> usize {
        self.door.in_hand()
    }

    /// Whether the service is asked.
    pub fn circuit(&self) -> Circuit {
        self.breaker().circuit()
    }

    /// How it works.
    pub fn spec(&self) -> &ProxySpec {
        &self.spec
    }

    /// What became of requests so far.
    pub fn counts(&self) -> ProxyCounts {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        ProxyCounts {
            answered: read(&self.counts.answered),
            failed: read(&self.counts.failed),
            drained: read(&self.counts.drained),
            broken: read(&self.counts.broken),
            crowded: read(&self.counts.crowded),
            retries: read(&self.counts.retries),
            held: read(&self.counts.held),
        }
    }

    /// Waits while it is held, and asks drain and breaker. `patience` is one for all attempts of a request.
    async fn admit(self: &Arc<Self>, patience: &mut Option<Instant>) -> Result<Admitted, Turned> {
        if self.door.holds_until().is_some() {
            self.counts.held.fetch_add(1, Ordering::Relaxed);
        }
        let in_hand = self
            .door
            .enter(patience, self.spec.hold)
            .await
            .map_err(|draining| {
                self.counts.drained.fetch_add(1, Ordering::Relaxed);
                Turned::Draining(draining)
            })?;
        let now = self.now();
        match self.breaker().admit(now) {
            Admission::Refused { retry_after } => {
                self.counts.broken.fetch_add(1, Ordering::Relaxed);
                Err(Turned::Broken { retry_after })
            }
            by => Ok(Admitted {
                proxy: Arc::clone(self),
                by,
                ended: Ended::Unknown,
                in_hand: Some(in_hand),
            }),
        }
    }

    async fn connect(&self) -> std::io::Result<IdleStream> {
        let connecting = TcpStream::connect(self.spec.upstream);
        let stream = timeout(self.spec.connect_timeout, connecting)
            .await
            .map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))??;
        stream.set_nodelay(true)?;
        Ok(IdleStream::new(stream, self.spec.idle_timeout))
    }

    /// Whether one more attempt may be made; it is paid for and counted.
    fn may_retry(&self) -> bool {
        let may = self.lock_retries().retry();
        if may {
            self.counts.retries.fetch_add(1, Ordering::Relaxed);
        }
        may
    }

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        // Each change is one assignment, so a poisoned lock still guards a whole state.
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_retries(&self) -> MutexGuard<'_, RetryBudget> {
        self.retries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Time between two looks whether the service takes connections again.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Longest time before a second attempt. It ends when requests begin to be held back: then the service is known to have ended.
const RETRY_PAUSE: Duration = Duration::from_millis(250);
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// Clients that are being told that there is no place.
const REFUSED_MAX: usize = 64;
/// Most bytes buffered for one direction of one connection.
const BUFFER_BYTES_MAX: usize = 64 << 10;
