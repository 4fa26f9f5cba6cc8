//! Enrolment on its own listener: one small request, one answer, ten seconds, no client certificate.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use theriac_certs::trust::{self, TrustError};
use theriac_certs::{JoinToken, certificate_fingerprint};
use theriac_protocol::codec::{self, CodecError};
use theriac_protocol::message::{JoinRefusal, JoinReplyV1, JoinRequestV1};
use theriac_protocol::units::NodeId;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::connect::{ConnectError, dial};
use crate::endpoint::{Endpoint, EndpointError, bind_server};
use crate::frame::{FrameReader, FrameWriter};
use crate::limits::Limits;
use crate::loss::{CloseCode, Loss};
use crate::session::{Pieces, SessionError};
use crate::traffic::Counters;

/// Why a new edge is not enrolled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// The join listener cannot be reached, or is not who the token says.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// No TLS configuration.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The aggregator said no.
    #[error("{}", refusal_text(*.0))]
    Refused(JoinRefusal),
    /// No answer in time. The same command can be run again: the same token with the same key gives the same answer.
    #[error("no answer from {addr} for {waited:?}; run the same command again, the token is not lost")]
    NoAnswer {
        /// The address.
        addr: SocketAddr,
        /// How long.
        waited: Duration,
    },
    /// The connection broke. As [`JoinError::NoAnswer`].
    #[error(
        "the connection broke before the answer ({0}); run the same command again, the token is not lost"
    )]
    Broken(SessionError),
    /// The answer is no good.
    #[error("the join listener's answer is no good: {0}; is this the port of the join listener?")]
    Answer(CodecError),
    /// The answer holds another authority than the token.
    #[error(
        "the answer names another authority than the token: this is not the aggregator that made the token; do not use the answer"
    )]
    WrongAuthority,
    /// The request cannot be sent.
    #[error("the request cannot be sent: {0}")]
    Request(CodecError),
}

/// What a new edge gets. The authority of aggregators is the one in the token; certificate and authority of edges are
/// to be checked with `PendingIdentity::complete`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enrolled {
    /// The site's name, as the token said.
    pub node: NodeId,
    /// Name of the federation.
    pub federation: String,
    /// `HOST:PORT` of the main listener.
    pub aggregator: String,
    /// The edge's certificate, DER.
    pub certificate: Vec<u8>,
    /// The authority of edges, DER.
    pub edge_authority: Vec<u8>,
    /// The authority of aggregators, DER.
    pub aggregator_authority: Vec<u8>,
}

/// Asks the join listener at `addr` for a certificate. The server is authenticated by the token's fingerprint, and
/// must carry `server_name`, before the secret is sent. `csr` is `PendingIdentity::csr_der`, whose key must be on disk.
///
/// # Errors
/// [`JoinError`].
pub async fn request(
    endpoint: &Endpoint,
    addr: SocketAddr,
    server_name: &str,
    token: &JoinToken,
    csr: Vec<u8>,
) -> Result<Enrolled, JoinError> {
    let tls = trust::join_client_config(token.aggregator_authority_fingerprint)?;
    let waited = endpoint.limits().join_timeout;
    let pieces = timeout(waited, dial(endpoint, addr, server_name, tls))
        .await
        .map_err(|_| ConnectError::Unreachable { addr, waited })??;
    let handle = pieces.handle.clone();
    let reply = timeout(waited, ask(endpoint, pieces, token, csr)).await;
    handle.close(CloseCode::Done, "");
    let reply = reply
        .map_err(|_| JoinError::NoAnswer { addr, waited })?
        .map_err(|error| match error {
            // The server judged something in the handshake after all: say what.
            JoinError::Broken(SessionError::Lost(loss @ Loss::Tls { .. })) => {
                ConnectError::Lost { addr, loss }.into()
            }
            other => other,
        })?;
    match reply {
        JoinReplyV1::Refused(refusal) => Err(JoinError::Refused(refusal)),
        JoinReplyV1::Enrolled {
            aggregator_authority, ..
        } if certificate_fingerprint(&aggregator_authority) != token.aggregator_authority_fingerprint => {
            Err(JoinError::WrongAuthority)
        }
        JoinReplyV1::Enrolled {
            node,
            federation,
            aggregator,
            certificate,
            edge_authority,
            aggregator_authority,
        } => Ok(Enrolled {
            node,
            federation,
            aggregator,
            certificate,
            edge_authority,
            aggregator_authority,
        }),
    }
}

async fn ask(
    endpoint: &Endpoint,
    pieces: Pieces,
    token: &JoinToken,
    csr: Vec<u8>,
) -> Result<JoinReplyV1, JoinError> {
    let request = JoinRequestV1 {
        token_id: token.id,
        secret: token.secret,
        csr,
    };
    let frame = codec::encode_join_request(&request).map_err(JoinError::Request)?;
    let (mut reader, mut writer) = halves(pieces, endpoint.limits());
    writer.write(&frame).await.map_err(JoinError::Broken)?;
    let (kind, body) = reader.read().await.map_err(JoinError::Broken)?;
    codec::decode_join_reply(kind, body).map_err(JoinError::Answer)
}

/// The listener for new edges.
#[derive(Debug)]
pub struct JoinListener {
    endpoint: Endpoint,
}

impl JoinListener {
    /// Opens it. `tls` is `theriac_certs::trust::join_server_config`. Call it within a tokio runtime.
    ///
    /// # Errors
    /// [`EndpointError`].
    pub fn bind(addr: SocketAddr, tls: rustls::ServerConfig, limits: &Limits) -> Result<Self, EndpointError> {
        Ok(Self {
            endpoint: bind_server(addr, tls, &limits.for_join())?,
        })
    }

    /// The address that is bound.
    ///
    /// # Errors
    /// [`EndpointError::Socket`].
    pub fn local_addr(&self) -> Result<SocketAddr, EndpointError> {
        self.endpoint.local_addr()
    }

    /// Its endpoint: to close it, exchange its certificate, read its counters.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Answers requests until the endpoint is closed: `answer` gets each request with the peer's address. Requests are
    /// worked on side by side, at most `joins_max`, each within `join_timeout`; one that is no request is answered
    /// [`JoinRefusal::BadRequest`] without asking.
    pub async fn serve<F, Fut>(self, answer: F)
    where
        F: Fn(JoinRequestV1, SocketAddr) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = JoinReplyV1> + Send + 'static,
    {
        let answer = Arc::new(answer);
        let slots = Arc::new(Semaphore::new(self.endpoint.limits().joins_max));
        while let Some(pieces) = self.endpoint.accept_pieces().await {
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
                return;
            };
            let (answer, limits) = (Arc::clone(&answer), Arc::clone(self.endpoint.limits()));
            tokio::spawn(async move {
                let handle = pieces.handle.clone();
                let answered =
                    timeout(limits.join_timeout, answer_one(pieces, &limits, answer.as_ref())).await;
                let (code, reason) = match &answered {
                    Ok(Ok(())) => (CloseCode::Done, String::new()),
                    Ok(Err(error)) => (error.close_code(), error.to_string()),
                    Err(_) => (CloseCode::TooSlow, "enrolment took too long".to_owned()),
                };
                if code != CloseCode::Done {
                    tracing::debug!(remote = %handle.remote(), reason, "enrolment came to nothing");
                }
                handle.close(code, &reason);
                drop(slot);
            });
        }
    }
}

async fn answer_one<F, Fut>(pieces: Pieces, limits: &Arc<Limits>, answer: &F) -> Result<(), SessionError>
where
    F: Fn(JoinRequestV1, SocketAddr) -> Fut,
    Fut: Future<Output = JoinReplyV1>,
{
    let remote = pieces.handle.remote();
    let (mut reader, mut writer) = halves(pieces, limits);
    let (kind, body) = reader.read().await?;
    let reply = match codec::decode_join_request(kind, body) {
        Ok(request) => answer(request, remote).await,
        Err(error) => {
            tracing::debug!(%remote, %error, "no join request");
            JoinReplyV1::Refused(JoinRefusal::BadRequest)
        }
    };
    writer
        .write(&codec::encode_join_reply(&reply).map_err(SessionError::Encode)?)
        .await?;
    writer.finish().await;
    Ok(())
}

fn halves(pieces: Pieces, limits: &Arc<Limits>) -> (FrameReader, FrameWriter) {
    // Enrolments are not counted as traffic of sessions.
    let counters: Arc<Counters> = Arc::default();
    let length_max = limits.join_bytes_max;
    let reader = FrameReader::new(
        pieces.receive,
        Arc::clone(limits),
        Arc::clone(&counters),
        None,
        length_max,
    );
    (
        reader,
        FrameWriter::new(pieces.send, Arc::clone(limits), counters),
    )
}

fn refusal_text(refusal: JoinRefusal) -> &'static str {
    match refusal {
        JoinRefusal::UnknownToken => {
            "the aggregator does not know this token: ask for a new one (`theriac-aggregator token create --site NAME`)"
        }
        JoinRefusal::Expired => {
            "the token has expired: ask for a new one (`theriac-aggregator token create --site NAME`)"
        }
        JoinRefusal::Spent => {
            "the token was already used with another key: if that was not you, tell the operator of the aggregator; \
             ask for a new one"
        }
        JoinRefusal::BadRequest => {
            "the aggregator could not read the certificate request: are both of one version?"
        }
        JoinRefusal::RevokedKey => {
            "the operator of the aggregator has revoked this key, which is for ever: join with a new state directory, \
             which makes a new key, and a new token"
        }
        JoinRefusal::Busy => "the aggregator has too much to do now: run the same command again in a minute",
        JoinRefusal::StorageFull => {
            "the aggregator's disk is full: tell its operator, and run the same command again when there is room"
        }
    }
}
