//! The page on loopback: read-only, no authentication, therefore loopback only and with a check of the `Host` header
//! (a web page elsewhere must not reach it through a name that resolves to loopback).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Json, Redirect, Response};
use axum::routing::get;
use tokio::net::TcpListener;

use crate::metrics::{Metrics, kind};
use crate::status::Board;
use crate::supervise::{Shutdown, TaskBoard};

/// What the page is drawn from.
#[derive(Debug, Clone)]
pub struct Page {
    /// The picture of what the edge does.
    pub board: Board,
    /// Its counters.
    pub metrics: Arc<Metrics>,
    /// Its tasks.
    pub tasks: TaskBoard,
    /// Longest time between two samples that is still healthy.
    pub tick_max: Duration,
}

/// Serves until the signal to stop.
///
/// # Errors
/// When the listener fails.
pub async fn serve(listener: Arc<TcpListener>, page: Page, mut shutdown: Shutdown) -> std::io::Result<()> {
    let listener = Shared(listener);
    let stop = async move { shutdown.wait().await };
    axum::serve(listener, router(page))
        .with_graceful_shutdown(stop)
        .await
}

/// The routes.
pub fn router(page: Page) -> Router {
    Router::new()
        .route("/", get(|| async { Redirect::temporary("/status") }))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .route("/incidents", get(incidents))
        .layer(middleware::from_fn(guard))
        .with_state(page)
}

/// A listener that outlives the task serving it, so that a restarted task keeps the port.
struct Shared(Arc<TcpListener>);

impl axum::serve::Listener for Shared {
    type Io = tokio::net::TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            match self.0.accept().await {
                Ok(accepted) => return accepted,
                Err(error) => {
                    // Out of file descriptors, most likely: wait for some to close.
                    tracing::warn!(%error, "cannot accept a connection to the page");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        self.0.local_addr()
    }
}

async fn guard(request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST).map(HeaderValue::to_str);
    let allowed = match host {
        // HTTP/1.0 without the header cannot come from a browser.
        None => true,
        Some(Ok(host)) => is_loopback_name(host),
        Some(Err(_)) => false,
    };
    if !allowed {
        return (StatusCode::FORBIDDEN, "this page answers to localhost only\n").into_response();
    }
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static("default-src 'none'"),
    );
    response
}

fn is_loopback_name(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .unwrap_or(name);
    bare.eq_ignore_ascii_case("localhost")
        || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

async fn healthz(State(page): State<Page>) -> Response {
    let down: Vec<String> = page
        .tasks
        .states()
        .into_iter()
        .filter(|(_, task)| !task.running)
        .map(|(name, task)| format!("task {name} is down: {}", task.last_failure.unwrap_or_default()))
        .collect();
    let since = page.board.since_tick();
    if since > page.tick_max {
        return (
            StatusCode::SERVICE_UNAVAILABLE,
            format!("no sample for {:.1} s\n", since.as_secs_f64()),
        )
            .into_response();
    }
    if down.is_empty() {
        (StatusCode::OK, "ok\n").into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, down.join("\n") + "\n").into_response()
    }
}

async fn readyz() -> &'static str {
    // The page is bound only after the store is open and every service's record was read.
    "ready\n"
}

async fn metrics(State(page): State<Page>) -> Response {
    for (name, task) in page.tasks.states() {
        page.metrics
            .task_restarts
            .get_or_create(&kind(name))
            .set(i64::try_from(task.restarts).unwrap_or(i64::MAX));
    }
    match page.metrics.encode() {
        Ok(text) => {
            let content = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, content)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn status(State(page): State<Page>) -> Response {
    Json(page.board.status()).into_response()
}

async fn incidents(State(page): State<Page>) -> Response {
    Json(page.board.incidents()).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::{self, ProbeUrl};
    use crate::supervise::{Tasks, shutdown};

    async fn start(tick_max: Duration) -> (SocketAddr, Page, crate::supervise::ShutdownSender) {
        let (sender, signal) = shutdown();
        let page = Page {
            board: Board::new("site-a", 300),
            metrics: Arc::new(Metrics::new()),
            tasks: Tasks::new(signal.clone(), crate::supervise::Pace::default()).board(),
            tick_max,
        };
        let listener = Arc::new(TcpListener::bind("127.0.0.1:0").await.unwrap());
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, page.clone(), signal));
        (address, page, sender)
    }

    async fn ask(address: SocketAddr, path: &str) -> (u16, String) {
        let (code, body) = probe::get(&ProbeUrl::new(address, path), Duration::from_mins(1), 1 << 20)
            .await
            .unwrap();
        (code, String::from_utf8(body).unwrap())
    }

    #[tokio::test]
    async fn every_route_answers() {
        let (address, page, sender) = start(Duration::from_mins(1)).await;
        assert_eq!(ask(address, "/healthz").await, (200, "ok\n".to_owned()));
        assert_eq!(ask(address, "/readyz").await.0, 200);
        assert_eq!(ask(address, "/incidents").await, (200, "[]".to_owned()));
        let (code, text) = ask(address, "/metrics").await;
        assert!(code == 200 && text.ends_with("# EOF\n"));
        page.board.update(|status| status.round = 9);
        let status: crate::status::Status = serde_json::from_str(&ask(address, "/status").await.1).unwrap();
        assert_eq!((status.round, status.node.as_str()), (9, "site-a"));
        assert_eq!(ask(address, "/nothing").await.0, 404);
        sender.stop();
    }

    #[tokio::test]
    async fn a_stuck_sample_loop_is_unhealthy() {
        let (address, page, _sender) = start(Duration::ZERO).await;
        assert_eq!(ask(address, "/healthz").await.0, 503);
        page.board.tick();
        assert_eq!(
            ask(address, "/healthz").await.0,
            503,
            "no time at all is allowed here"
        );
    }

    #[tokio::test]
    async fn a_foreign_host_header_is_refused() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let (address, _page, _sender) = start(Duration::from_mins(1)).await;
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        stream
            .write_all(b"GET /status HTTP/1.0\r\nHost: evil.example\r\n\r\n")
            .await
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.0 403"), "{answer}");
    }

    #[test]
    fn loopback_names_are_known() {
        for good in [
            "localhost",
            "LOCALHOST:80",
            "127.0.0.1:9466",
            "[::1]:9466",
            "127.8.8.8",
        ] {
            assert!(is_loopback_name(good), "{good}");
        }
        for bad in [
            "evil.example",
            "10.0.0.1:80",
            "localhost.evil.example",
            "",
            "[::2]",
        ] {
            assert!(!is_loopback_name(bad), "{bad}");
        }
    }
}
