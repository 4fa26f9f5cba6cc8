//! A few calls of the Kubernetes API over HTTPS, as a service account: one connection each, bounded answers.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Where the API is and who asks. Certificate and token are read for each call, since both are rotated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiServer {
    /// A name or address; the server's certificate must hold it.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// The cluster's authority, PEM.
    pub ca_file: PathBuf,
    /// The service account's token.
    pub token_file: PathBuf,
}

/// Why a call brought nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApiError {
    /// A file of the service account cannot be used.
    #[error("{}: {reason}", path.display())]
    Account {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The server cannot be reached, or is not the one that the authority vouches for.
    #[error("{host}:{port}: {source}")]
    Unreachable {
        /// Where.
        host: String,
        /// Where.
        port: u16,
        /// The system's word.
        source: io::Error,
    },
    /// It ended in the middle, or said what is no answer.
    #[error("the API server's answer: {0}")]
    Answer(String),
    /// Somebody else changed the object meanwhile (409).
    #[error("the object was changed by somebody else: {0}")]
    Conflict(String),
    /// The service account may not do that (401, 403).
    #[error("the service account may not: {0}")]
    Forbidden(String),
    /// Any other refusal.
    #[error("the API server refuses with {code}: {message}")]
    Refused {
        /// The status code.
        code: u16,
        /// Its words.
        message: String,
    },
}

/// What is sent with a call.
#[derive(Debug, Clone)]
pub(super) enum Sent {
    Nothing,
    /// `PUT` of a whole object.
    Object(Value),
    /// `PATCH`, strategic merge.
    Merge(Value),
    /// `PATCH`, RFC 6902.
    Patch(Value),
}

impl ApiServer {
    pub(super) async fn call(&self, path: &str, sent: Sent) -> Result<Value, ApiError> {
        let (method, kind, body) = match sent {
            Sent::Nothing => (Method::GET, JSON, None),
            Sent::Object(value) => (Method::PUT, JSON, Some(value)),
            Sent::Merge(value) => (Method::PATCH, MERGE, Some(value)),
            Sent::Patch(value) => (Method::PATCH, PATCH, Some(value)),
        };
        let body = body.map(|value| value.to_string()).unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, format!("{}:{}", self.host, self.port))
            .header(ACCEPT, JSON)
            .header(CONTENT_TYPE, kind)
            .header(AUTHORIZATION, self.bearer()?)
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| ApiError::Answer(error.to_string()))?;
        let (status, text) = self.exchange(request).await?;
        let value: Value = serde_json::from_slice(&text).unwrap_or(Value::Null);
        if status.is_success() {
            return match value {
                Value::Object(_) => Ok(value),
                _ => Err(ApiError::Answer("no JSON object".to_owned())),
            };
        }
        let said = value["message"].as_str().unwrap_or_default();
        let message: String = said.chars().take(MESSAGE_MAX).collect();
        Err(match status {
            StatusCode::CONFLICT => ApiError::Conflict(message),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ApiError::Forbidden(message),
            other => ApiError::Refused {
                code: other.as_u16(),
                message,
            },
        })
    }

    async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<(StatusCode, Bytes), ApiError> {
        let unreachable = |source| ApiError::Unreachable {
            host: self.host.clone(),
            port: self.port,
            source,
        };
        let answer = |error: hyper::Error| ApiError::Answer(error.to_string());
        let name =
            ServerName::try_from(self.host.clone()).map_err(|error| unreachable(io::Error::other(error)))?;
        let connector = TlsConnector::from(Arc::new(self.tls()?));
        let stream = TcpStream::connect((self.host.as_str(), self.port))
            .await
            .map_err(unreachable)?;
        let stream = connector.connect(name, stream).await.map_err(unreachable)?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(answer)?;
        let talk = async {
            let response = sender.send_request(request).await.map_err(answer)?;
            let status = response.status();
            let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
                .collect()
                .await;
            let body = body.map_err(|error| ApiError::Answer(error.to_string()))?;
            Ok((status, body.to_bytes()))
        };
        tokio::pin!(talk, connection);
        let mut open = true;
        loop {
            tokio::select! {
                said = &mut talk => return said,
                // Its own error reaches whoever waits for the answer.
                _ended = &mut connection, if open => open = false,
            }
        }
    }

    fn tls(&self) -> Result<ClientConfig, ApiError> {
        let wrong = |reason: String| ApiError::Account {
            path: self.ca_file.clone(),
            reason,
        };
        let mut roots = RootCertStore::empty();
        let found = CertificateDer::pem_file_iter(&self.ca_file).map_err(|error| wrong(error.to_string()))?;
        for certificate in found {
            let certificate = certificate.map_err(|error| wrong(error.to_string()))?;
            roots.add(certificate).map_err(|error| wrong(error.to_string()))?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| wrong(error.to_string()))?;
        Ok(config.with_root_certificates(roots).with_no_client_auth())
    }

    fn bearer(&self) -> Result<HeaderValue, ApiError> {
        let wrong = |reason: String| ApiError::Account {
            path: self.token_file.clone(),
            reason,
        };
        let token = std::fs::read_to_string(&self.token_file).map_err(|error| wrong(error.to_string()))?;
        let mut value = HeaderValue::try_from(format!("Bearer {}", token.trim()))
            .map_err(|_| wrong("it is no token".to_owned()))?;
        value.set_sensitive(true);
        Ok(value)
    }
}

const JSON: &str = "application/json";
const MERGE: &str = "application/strategic-merge-patch+json";
const PATCH: &str = "application/json-patch+json";
const ANSWER_BYTES_MAX: usize = 4 << 20;
const MESSAGE_MAX: usize = 300;
