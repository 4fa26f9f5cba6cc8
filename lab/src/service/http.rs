//! What the service answers, on its own port and on the one for faults.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, RawQuery, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post, put};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use theriac_edge::probe::{self, ProbeUrl};

use super::fault::{CPU_THREADS_MAX, Faults, LEAK_MIB_PER_S_MAX};
use super::record::VALUE_BYTES_MAX;
use super::store::{Refused, Store};

/// What requests are answered from.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    store: Store,
    upstream: Option<ProbeUrl>,
}

impl Asked {
    /// A store, and the service that is asked before a write is taken.
    pub(super) fn new(store: Store, upstream: Option<SocketAddr>) -> Self {
        Self {
            store,
            upstream: upstream.map(|address| ProbeUrl::new(address, "/healthz")),
        }
    }

    async fn upstream_answers(&self) -> bool {
        match &self.upstream {
            Some(url) => matches!(probe::status(url, UPSTREAM_TIMEOUT).await, Ok(200..=299)),
            None => true,
        }
    }
}

/// `PUT` and `GET /kv/KEY`, `GET /healthz`, `GET /stats`, `GET /digest?ms=N`.
pub(super) fn routes(asked: Asked) -> Router {
    Router::new()
        .route("/kv/{key}", put(write).get(read))
        .route("/healthz", get(health))
        .route("/stats", get(stats))
        .route("/digest", get(digest))
        .layer(DefaultBodyLimit::max(VALUE_BYTES_MAX + 1))
        .with_state(asked)
}

/// `POST /fault/leak?mib_per_s=N`, `/fault/cpu?threads=N`, `/fault/none`.
pub(super) fn control_routes(faults: Faults) -> Router {
    Router::new()
        .route("/fault/leak", post(leak))
        .route("/fault/cpu", post(cpu))
        .route("/fault/none", post(none))
        .with_state(faults)
}

async fn write(State(asked): State<Asked>, Path(key): Path<String>, value: Bytes) -> Response {
    if !asked.upstream_answers().await {
        return no_upstream();
    }
    match asked.store.put(key, value.to_vec()).await {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(refused) => {
            let (status, words) = match refused {
                Refused::Key => (
                    StatusCode::BAD_REQUEST,
                    "a key is 1 to 128 letters, digits, -, _ and .",
                ),
                Refused::Value => (StatusCode::PAYLOAD_TOO_LARGE, "a value is at most 65536 bytes"),
                Refused::Full => (StatusCode::INSUFFICIENT_STORAGE, "there are too many keys"),
                Refused::Busy => (
                    StatusCode::SERVICE_UNAVAILABLE,
                    "too many writes wait for the disk",
                ),
                Refused::Disk => (
                    StatusCode::INSUFFICIENT_STORAGE,
                    "the disk did not take the write",
                ),
            };
            (status, words).into_response()
        }
    }
}

async fn read(State(asked): State<Asked>, Path(key): Path<String>) -> Response {
    match asked.store.get(&key) {
        Some(value) => value.into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

async fn health(State(asked): State<Asked>) -> Response {
    if !asked.upstream_answers().await {
        return no_upstream();
    }
    if asked.store.is_healthy() {
        "ok".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the writer has ended").into_response()
    }
}

async fn stats(State(asked): State<Asked>) -> Response {
    axum::Json(json!(asked.store.stats())).into_response()
}

fn no_upstream() -> Response {
    (
        StatusCode::SERVICE_UNAVAILABLE,
        "the service that this one asks does not answer",
    )
        .into_response()
}

/// A costly read: a digest over all that is stored, over and over for so many milliseconds of one processor.
async fn digest(State(asked): State<Asked>, RawQuery(query): RawQuery) -> Response {
    let ms = match number(query.as_deref(), "ms", DIGEST_MS_MAX) {
        Ok(ms) => ms,
        Err(words) => return (StatusCode::BAD_REQUEST, words).into_response(),
    };
    let until = Instant::now() + Duration::from_millis(ms.into());
    let mut sum = Sha256::digest(asked.store.stats().bytes.to_le_bytes());
    while Instant::now() < until {
        for _ in 0..200 {
            sum = Sha256::digest(sum);
        }
    }
    format!("{sum:x}").into_response()
}

async fn leak(State(faults): State<Faults>, RawQuery(query): RawQuery) -> Response {
    match number(query.as_deref(), "mib_per_s", LEAK_MIB_PER_S_MAX) {
        Ok(mib_per_s) => begun(faults.leak(mib_per_s)),
        Err(words) => (StatusCode::BAD_REQUEST, words).into_response(),
    }
}

async fn cpu(State(faults): State<Faults>, RawQuery(query): RawQuery) -> Response {
    match number(query.as_deref(), "threads", CPU_THREADS_MAX) {
        Ok(threads) => begun(faults.cpu(threads)),
        Err(words) => (StatusCode::BAD_REQUEST, words).into_response(),
    }
}

async fn none(State(faults): State<Faults>) -> Response {
    faults.none();
    StatusCode::NO_CONTENT.into_response()
}

/// Longest wait for the service that this one asks.
const UPSTREAM_TIMEOUT: Duration = Duration::from_millis(500);
/// Costliest read.
const DIGEST_MS_MAX: u32 = 100;

fn begun(result: std::io::Result<()>) -> Response {
    match result {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

fn number(query: Option<&str>, name: &str, max: u32) -> Result<u32, String> {
    query
        .unwrap_or_default()
        .split('&')
        .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
        .and_then(|text| text.parse().ok())
        .filter(|number| (1..=max).contains(number))
        .ok_or_else(|| format!("say ?{name}=N with N from 1 to {max}"))
}
