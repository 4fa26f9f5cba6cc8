//! What the service answers, on its own port and on the one for faults.

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, RawQuery, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post, put};
use serde_json::json;

use super::fault::{CPU_THREADS_MAX, Faults, LEAK_MIB_PER_S_MAX};
use super::record::VALUE_BYTES_MAX;
use super::store::{Refused, Store};

/// `PUT` and `GET /kv/KEY`, `GET /healthz`, `GET /stats`.
pub(super) fn routes(store: Store) -> Router {
    Router::new()
        .route("/kv/{key}", put(write).get(read))
        .route("/healthz", get(health))
        .route("/stats", get(stats))
        .layer(DefaultBodyLimit::max(VALUE_BYTES_MAX + 1))
        .with_state(store)
}

/// `POST /fault/leak?mib_per_s=N`, `/fault/cpu?threads=N`, `/fault/none`.
pub(super) fn control_routes(faults: Faults) -> Router {
    Router::new()
        .route("/fault/leak", post(leak))
        .route("/fault/cpu", post(cpu))
        .route("/fault/none", post(none))
        .with_state(faults)
}

async fn write(State(store): State<Store>, Path(key): Path<String>, value: Bytes) -> Response {
    match store.put(key, value.to_vec()).await {
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

async fn read(State(store): State<Store>, Path(key): Path<String>) -> Response {
    match store.get(&key) {
        Some(value) => value.into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

async fn health(State(store): State<Store>) -> Response {
    if store.is_healthy() {
        "ok".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the writer has ended").into_response()
    }
}

async fn stats(State(store): State<Store>) -> Response {
    axum::Json(json!(store.stats())).into_response()
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
