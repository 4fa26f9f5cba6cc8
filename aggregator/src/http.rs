//! The page on loopback: an overview for people, health, readiness, metrics, status and rounds. Read-only, no login, small answers.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{Html, IntoResponse as _, Response};
use axum::routing::get;
use axum::{Json, Router};
use prometheus_client::registry::Registry;
use theriac_protocol::units::Round;
use theriac_transport::Endpoint;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::driver::DriverStatus;
use crate::metrics::{Buffer, Direction, Metrics, Outcome, ProcessUse, text};
use crate::page::render;
use crate::status::Status;
use crate::store::{Store, StoreError, evidence, history, rounds, sums};

/// Rounds in one answer, at most.
const ROUNDS_MAX: u32 = 1_000;
/// Rounds in one answer unless told otherwise.
const ROUNDS_DEFAULT: u32 = 100;
/// Rounds on the page for people.
const ROUNDS_SHOWN: u32 = 20;

/// What the page shows.
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) federation: String,
    pub(crate) store: Store,
    pub(crate) status: Arc<Mutex<DriverStatus>>,
    pub(crate) endpoint: Endpoint,
    pub(crate) metrics: Metrics,
    pub(crate) registry: Registry,
    pub(crate) started: Instant,
    pub(crate) certificate_ends: Arc<Mutex<SystemTime>>,
    pub(crate) driver_alive: watch::Receiver<bool>,
}

/// Serves until `shutdown` turns true.
pub(crate) async fn serve(listener: TcpListener, page: Arc<Page>, mut shutdown: watch::Receiver<bool>) {
    let router = Router::new()
        .route("/", get(overview))
        .route("/healthz", get(health))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .route("/rounds", get(list_rounds))
        .with_state(page);
    let until = async move { drop(shutdown.wait_for(|stop| *stop).await) };
    if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(until).await {
        tracing::error!(%error, "the page has ended");
    }
}

/// Another site's page could make a browser ask us under its own name; only loopback names are answered.
fn is_local(headers: &HeaderMap) -> bool {
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok())
        .unwrap_or_default();
    let address: Option<SocketAddr> = host.parse().ok();
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    address.is_some_and(|address| address.ip().is_loopback())
        || matches!(name, "localhost" | "127.0.0.1" | "[::1]")
        // Without a port the last colon is the address's own.
        || host == "[::1]"
}

fn foreign() -> Response {
    (
        StatusCode::FORBIDDEN,
        "this page answers only to loopback names\n",
    )
        .into_response()
}

async fn health(State(page): State<Arc<Page>>) -> Response {
    if *page.driver_alive.borrow() {
        "ok\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the round driver has ended\n").into_response()
    }
}

/// Listeners are bound and authorities loaded before the page exists; what is left is the store.
async fn ready(State(page): State<Arc<Page>>) -> Response {
    match page.store.read(rounds::last_round).await {
        Ok(_) if page.store.is_full() => {
            let why = "the disk is full: nobody can enrol and no update is stored until there is room\n";
            (StatusCode::SERVICE_UNAVAILABLE, why).into_response()
        }
        Ok(_) if *page.driver_alive.borrow() => "ready\n".into_response(),
        Ok(_) => (StatusCode::SERVICE_UNAVAILABLE, "the round driver has ended\n").into_response(),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")).into_response(),
    }
}

async fn metrics(State(page): State<Arc<Page>>, headers: HeaderMap) -> Response {
    if !is_local(&headers) {
        return foreign();
    }
    page.refresh();
    let counted = page.store.read(|connection| {
        let records = evidence::count(connection)?;
        Ok((
            evidence::reputations(connection)?,
            records,
            sums::count(connection)?,
        ))
    });
    match counted.await {
        Ok((reputations, count, kept)) => {
            page.metrics.kept_releases.set(kept);
            let inside = reputations.values().filter(|site| site.is_quarantined()).count();
            page.metrics
                .quarantined
                .set(i64::try_from(inside).unwrap_or(i64::MAX));
            page.metrics.decision_records.set(count);
        }
        // Metrics of everything else are worth more than none.
        Err(error) => tracing::warn!(%error, "cannot count the records of decisions"),
    }
    match text(&page.registry) {
        Ok(text) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn status(State(page): State<Arc<Page>>, headers: HeaderMap) -> Response {
    if !is_local(&headers) {
        return foreign();
    }
    match page.status_now().await {
        Ok(status) => Json(status).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

/// For people: `/status`, the last rounds, and what the last one that ended decided.
async fn overview(State(page): State<Arc<Page>>, headers: HeaderMap) -> Response {
    if !is_local(&headers) {
        return foreign();
    }
    let read = |connection: &rusqlite::Connection| {
        let rounds = history::list(connection, ROUNDS_SHOWN)?;
        let ended = rounds.iter().find(|round| round.ended_unix_ms.is_some());
        let decisions = match ended {
            Some(round) => evidence::of_round(connection, Round(round.round))?,
            None => Vec::new(),
        };
        Ok((rounds, decisions))
    };
    match (page.status_now().await, page.store.read(read).await) {
        (Ok(status), Ok((rounds, decisions))) => {
            let policy = "default-src 'none'; style-src 'unsafe-inline'";
            let headers = [(header::CONTENT_SECURITY_POLICY, policy)];
            (headers, Html(render(&status, &rounds, &decisions))).into_response()
        }
        (Err(error), _) | (_, Err(error)) => {
            (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response()
        }
    }
}

/// `?limit=N` gives the newest N rounds.
async fn list_rounds(
    State(page): State<Arc<Page>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    if !is_local(&headers) {
        return foreign();
    }
    let asked = query.and_then(|query| query.strip_prefix("limit=").and_then(|limit| limit.parse().ok()));
    let limit = asked.unwrap_or(ROUNDS_DEFAULT).min(ROUNDS_MAX);
    match page
        .store
        .read(move |connection| history::list(connection, limit))
        .await
    {
        Ok(rows) => Json(rows).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

impl Page {
    async fn status_now(&self) -> Result<Status, StoreError> {
        let federation = self.federation.clone();
        let driver = || self.status.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let quorum = driver().quorum;
        let at_rest = self
            .store
            .read(move |connection| Status::at_rest(connection, &federation, quorum))
            .await?;
        let (traffic, used) = (self.endpoint.traffic(), ProcessUse::now());
        Ok(Status {
            bytes_up: traffic.bytes_received,
            bytes_down: traffic.bytes_sent,
            uptime_s: self.started.elapsed().as_secs(),
            peak_rss_bytes: used.peak_resident_bytes,
            cpu_seconds: used.cpu_seconds,
            ..at_rest.with_driver(&driver(), self.store.is_full())
        })
    }

    /// Brings what is counted elsewhere up to date. Those counts only grow, so they may be stored into counters.
    fn refresh(&self) {
        let m = &self.metrics;
        let traffic = self.endpoint.traffic();
        m.bytes
            .get_or_create(&Direction { direction: "up" })
            .inner()
            .store(traffic.bytes_received, Ordering::Relaxed);
        m.bytes
            .get_or_create(&Direction { direction: "down" })
            .inner()
            .store(traffic.bytes_sent, Ordering::Relaxed);
        let accepts = self.endpoint.accept_stats();
        for (outcome, count) in [
            ("accepted", accepts.accepted),
            ("failed", accepts.failed),
            ("timed_out", accepts.timed_out),
            ("retried", accepts.retried),
            ("refused", accepts.refused),
        ] {
            m.handshakes
                .get_or_create(&Outcome { outcome })
                .inner()
                .store(count, Ordering::Relaxed);
        }
        let granted = self.endpoint.granted();
        for (buffer, bytes) in [("send", granted.send), ("receive", granted.receive)] {
            m.socket_buffer
                .get_or_create(&Buffer { buffer })
                .set(i64::try_from(bytes).unwrap_or(i64::MAX));
        }
        m.commits.inner().store(self.store.commits(), Ordering::Relaxed);
        m.storage_full.set(i64::from(self.store.is_full()));
        m.audit_leaves.set(self.store.audit_log().head().0);
        let ends = *self
            .certificate_ends
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let left = ends.duration_since(SystemTime::now()).unwrap_or(Duration::ZERO);
        m.certificate_left.set(left.as_secs_f64());
        let used = ProcessUse::now();
        m.resident.set(used.resident_bytes);
        // A counter of seconds keeps the bits of its `f64`.
        let seconds = used.cpu_seconds.to_bits();
        m.cpu_seconds.inner().store(seconds, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_only_to_loopback_names() {
        let asked = |host: &str| is_local(&HeaderMap::from_iter([(header::HOST, host.parse().unwrap())]));
        for good in [
            "127.0.0.1:7702",
            "[::1]:7702",
            "[::1]",
            "localhost:7702",
            "localhost",
        ] {
            assert!(asked(good), "{good} was turned away");
        }
        for bad in ["evil.example:7702", "192.168.0.2:7702", ""] {
            assert!(!asked(bad), "{bad} was answered");
        }
    }
}
