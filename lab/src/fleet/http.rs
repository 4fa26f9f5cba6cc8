//! Small requests to the pages that the programs serve on loopback.

use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::de::DeserializeOwned;

/// Longest answer taken.
const BODY_BYTES_MAX: usize = 8 << 20;

/// Why a page gave no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HttpError {
    /// No answer in time.
    #[error("{page} did not answer within {} ms", limit.as_millis())]
    Slow {
        /// Which page.
        page: String,
        /// The time it had.
        limit: Duration,
    },
    /// No connection, or it broke.
    #[error("{0}: {1}")]
    Broken(String, String),
    /// Another status than 2xx.
    #[error("{0} answered {1}: {2}")]
    Status(String, u16, String),
    /// The answer does not read as what it should be.
    #[error("{0} answered something else than expected: {1}")]
    Unreadable(String, serde_json::Error),
}

/// Asks pages on loopback.
#[derive(Debug, Clone)]
pub struct Client {
    inner: HyperClient<HttpConnector, Empty<Bytes>>,
    limit: Duration,
}

impl Client {
    /// Every request ends within `limit`.
    pub fn new(limit: Duration) -> Self {
        Self {
            inner: HyperClient::builder(TokioExecutor::new()).build_http(),
            limit,
        }
    }

    /// Reads a page as JSON.
    ///
    /// # Errors
    /// [`HttpError`].
    pub async fn json<T: DeserializeOwned>(&self, at: SocketAddr, path: &str) -> Result<T, HttpError> {
        let body = self.ask(Method::GET, at, path).await?;
        serde_json::from_slice(&body).map_err(|error| HttpError::Unreadable(format!("{at}{path}"), error))
    }

    /// Asks, and drops what is answered.
    ///
    /// # Errors
    /// [`HttpError`].
    pub async fn get(&self, at: SocketAddr, path: &str) -> Result<(), HttpError> {
        self.ask(Method::GET, at, path).await.map(drop)
    }

    /// Sends an empty POST.
    ///
    /// # Errors
    /// [`HttpError`].
    pub async fn post(&self, at: SocketAddr, path: &str) -> Result<(), HttpError> {
        self.ask(Method::POST, at, path).await.map(drop)
    }

    async fn ask(&self, method: Method, at: SocketAddr, path: &str) -> Result<Bytes, HttpError> {
        let whole = format!("{at}{path}");
        let broken = |error: &dyn std::error::Error| HttpError::Broken(whole.clone(), chain(error));
        let request = Request::builder()
            .method(method)
            .uri(format!("http://{at}{path}"))
            .body(Empty::new());
        let request = request.map_err(|error| broken(&error))?;
        let exchange = async {
            let answer = self
                .inner
                .request(request)
                .await
                .map_err(|error| broken(&error))?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), BODY_BYTES_MAX).collect().await;
            let body = body.map_err(|error| broken(error.as_ref()))?.to_bytes();
            if status.is_success() {
                Ok(body)
            } else {
                let said = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
                Err(HttpError::Status(whole.clone(), status.as_u16(), said))
            }
        };
        let answer = tokio::time::timeout(self.limit, exchange).await;
        answer.unwrap_or_else(|_| {
            Err(HttpError::Slow {
                page: whole.clone(),
                limit: self.limit,
            })
        })
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Router;
    use axum::http::StatusCode;
    use axum::routing::{get, post};

    async fn page() -> SocketAddr {
        let router = Router::new()
            .route("/status", get(|| async { "{\"round\":7}" }))
            .route("/odd", get(|| async { "round 7" }))
            .route(
                "/fault",
                post(|| async { (StatusCode::NOT_FOUND, "no such fault") }),
            )
            .route("/never", get(std::future::pending::<&'static str>));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        at
    }

    #[tokio::test]
    async fn reads_json_and_tells_every_kind_of_failure_apart() {
        let at = page().await;
        let client = Client::new(Duration::from_mins(1));
        let status: serde_json::Value = client.json(at, "/status").await.unwrap();
        assert_eq!(status["round"], 7);
        let odd = client.json::<serde_json::Value>(at, "/odd").await.unwrap_err();
        assert!(matches!(odd, HttpError::Unreadable(..)), "{odd}");
        let refused = client.post(at, "/fault").await.unwrap_err();
        assert!(refused.to_string().contains("404: no such fault"), "{refused}");
        let hasty = Client::new(Duration::from_millis(50));
        let slow = hasty.json::<serde_json::Value>(at, "/never").await.unwrap_err();
        assert!(matches!(slow, HttpError::Slow { .. }), "{slow}");
        // Nobody listens there, and nobody else can begin to.
        let kept = tokio::net::TcpSocket::new_v4().unwrap();
        kept.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let nobody = kept.local_addr().unwrap();
        let broken = client.post(nobody, "/fault").await.unwrap_err();
        assert!(matches!(broken, HttpError::Broken(..)), "{broken}");
    }
}
