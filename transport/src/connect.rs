//! The edge's way to a session.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use theriac_protocol::message::{HelloV1, PROTOCOL_MAX, PROTOCOL_MIN, ToAggregator, ToEdge, WelcomeV1};
use theriac_protocol::refusal::{RefusalCode, RefusalV1};
use tokio::time::{Instant, timeout_at};

use crate::endpoint::{Endpoint, EndpointError};
use crate::loss::{CloseCode, Loss};
use crate::session::{EdgeSession, Pieces, SessionError};

/// Why an edge is not connected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Address, server name or TLS configuration are no good.
    #[error("cannot dial {addr} as `{server_name}`: {reason}")]
    Dial {
        /// The address.
        addr: SocketAddr,
        /// The name in the aggregator's certificate.
        server_name: String,
        /// What is wrong.
        reason: String,
    },
    /// No answer at all.
    #[error("no answer from {addr} for {waited:?}")]
    Unreachable {
        /// The address.
        addr: SocketAddr,
        /// How long.
        waited: Duration,
    },
    /// The connection came to nothing: the handshake failed on either side, or it was lost before a Welcome.
    #[error("{addr}: {loss}")]
    Lost {
        /// The address.
        addr: SocketAddr,
        /// Why.
        loss: Loss,
    },
    /// The aggregator turned this edge away.
    #[error("the aggregator refused this edge: {}", .0.code)]
    Refused(RefusalV1),
    /// The aggregator is going down.
    #[error("the aggregator is going down")]
    GoingDown {
        /// Come back after this.
        retry_after: Duration,
    },
    /// The TLS handshake is done, but no Welcome came.
    #[error("{addr} sent no welcome for {waited:?}")]
    NoWelcome {
        /// The address.
        addr: SocketAddr,
        /// How long.
        waited: Duration,
    },
    /// The aggregator breaks the protocol.
    #[error("the aggregator's first message is no good: {0}")]
    Protocol(String),
}

impl ConnectError {
    /// What to do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Dial { .. } => Some("check the aggregator's host and port in the configuration"),
            Self::Unreachable { .. } => Loss::TimedOut.hint(),
            Self::Lost { loss, .. } => loss.hint(),
            Self::Refused(refusal) => refusal_hint(refusal.code),
            Self::NoWelcome { .. } => Some(
                "the aggregator is overloaded or stuck: look at its log; the edge will try again by itself",
            ),
            Self::Protocol(_) => Some("one side is too old: compare the versions of edge and aggregator"),
            Self::GoingDown { .. } => None,
        }
    }

    /// How long the aggregator wants to be left alone.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused(refusal) if refusal.retry_after_ms > 0 => {
                Some(Duration::from_millis(refusal.retry_after_ms.into()))
            }
            Self::GoingDown { retry_after } => Some(*retry_after),
            _ => None,
        }
    }

    /// Whether only a person can change the outcome: try again seldom, and say so.
    pub fn needs_a_person(&self) -> bool {
        match self {
            Self::Refused(refusal) => !refusal.code.retryable() && refusal.retry_after_ms == 0,
            Self::Dial { .. }
            | Self::Protocol(_)
            | Self::Lost {
                loss: Loss::Tls { .. },
                ..
            } => true,
            Self::Unreachable { .. }
            | Self::Lost { .. }
            | Self::GoingDown { .. }
            | Self::NoWelcome { .. } => false,
        }
    }
}

/// Connects to an aggregator and says Hello. `Ok` only after its Welcome, all within `welcome_timeout`.
///
/// `server_name` is the host name or address that the aggregator's certificate must carry.
///
/// # Errors
/// [`ConnectError`].
pub async fn connect(
    endpoint: &Endpoint,
    addr: SocketAddr,
    server_name: &str,
    tls: rustls::ClientConfig,
    hello: HelloV1,
) -> Result<(EdgeSession, WelcomeV1), ConnectError> {
    let waited = endpoint.limits().welcome_timeout;
    let due = Instant::now() + waited;
    let pieces = timeout_at(due, dial(endpoint, addr, server_name, tls))
        .await
        .map_err(|_| ConnectError::Unreachable { addr, waited })??;
    let handle = pieces.handle.clone();
    let session = EdgeSession::new(pieces, endpoint.limits());
    match timeout_at(due, greet(session, addr, hello)).await {
        Ok(Ok(connected)) => Ok(connected),
        Ok(Err(error)) => {
            handle.close(CloseCode::Done, "");
            Err(error)
        }
        Err(_) => {
            handle.close(CloseCode::TooSlow, "no welcome");
            Err(ConnectError::NoWelcome { addr, waited })
        }
    }
}

/// The highest protocol version that an edge and this build both speak.
pub fn common_version(hello: &HelloV1) -> Option<u16> {
    let highest = hello.protocol_max.min(PROTOCOL_MAX);
    (highest >= hello.protocol_min.max(PROTOCOL_MIN)).then_some(highest)
}

/// The TLS handshake as this side sees it, and an open stream. The server may still think otherwise.
pub(crate) async fn dial(
    endpoint: &Endpoint,
    addr: SocketAddr,
    server_name: &str,
    tls: rustls::ClientConfig,
) -> Result<Pieces, ConnectError> {
    let bad = |reason: String| ConnectError::Dial {
        addr,
        server_name: server_name.to_owned(),
        reason,
    };
    let lost = |error: quinn::ConnectionError| ConnectError::Lost {
        addr,
        loss: error.into(),
    };
    let config = endpoint
        .client_config(Arc::new(tls))
        .map_err(|error: EndpointError| bad(error.to_string()))?;
    let connecting = endpoint
        .quinn()
        .connect_with(config, addr, server_name)
        .map_err(|error| bad(error.to_string()))?;
    let connection = connecting.await.map_err(lost)?;
    let (send, receive) = connection.open_bi().await.map_err(lost)?;
    Ok(Pieces {
        handle: endpoint.handle(connection),
        send,
        receive,
    })
}

async fn greet(
    mut session: EdgeSession,
    addr: SocketAddr,
    hello: HelloV1,
) -> Result<(EdgeSession, WelcomeV1), ConnectError> {
    let failed = |error| match error {
        SessionError::Lost(loss) => ConnectError::Lost { addr, loss },
        other => ConnectError::Protocol(other.to_string()),
    };
    let offered = (hello.protocol_min, hello.protocol_max);
    session.send(&ToAggregator::Hello(hello)).await.map_err(failed)?;
    match session.recv().await {
        Ok(ToEdge::Welcome(welcome)) if (offered.0..=offered.1).contains(&welcome.protocol) => {
            session.set_length_max(welcome.frame_bytes_max);
            Ok((session, welcome))
        }
        Ok(ToEdge::Welcome(welcome)) => Err(ConnectError::Protocol(format!(
            "it chose protocol version {}, offered were {} to {}",
            welcome.protocol, offered.0, offered.1
        ))),
        Ok(ToEdge::Refusal(refusal)) => Err(ConnectError::Refused(refusal)),
        Ok(ToEdge::Goodbye(goodbye)) => {
            let retry_after = Duration::from_millis(goodbye.retry_after_ms.into());
            Err(ConnectError::GoingDown { retry_after })
        }
        Ok(
            other @ (ToEdge::Announce(_)
            | ToEdge::Receipt(_)
            | ToEdge::Model(..)
            | ToEdge::Closed(_)
            | ToEdge::Seal(_)
            | ToEdge::Candidate(..)
            | ToEdge::Fleet(_)
            | ToEdge::LeaseGranted(_)
            | ToEdge::LeaseRefused(_)),
        ) => Err(ConnectError::Protocol(format!(
            "a {} before the welcome",
            word(&other)
        ))),
        Err(SessionError::Ended) => {
            // A closed connection says more than an ended stream.
            match timeout_at(
                Instant::now() + Duration::from_millis(200),
                session.handle().closed(),
            )
            .await
            {
                Ok(loss) => Err(ConnectError::Lost { addr, loss }),
                Err(_) => Err(ConnectError::Protocol(
                    "it ended the session without a word".to_owned(),
                )),
            }
        }
        Err(error) => Err(failed(error)),
    }
}

fn word(message: &ToEdge) -> &'static str {
    match message {
        ToEdge::Welcome(_) => "welcome",
        ToEdge::Refusal(_) => "refusal",
        ToEdge::Announce(_) => "announcement",
        ToEdge::Receipt(_) => "receipt",
        ToEdge::Model(..) => "model",
        ToEdge::Closed(_) => "round's end",
        ToEdge::Seal(_) => "counter-signature",
        ToEdge::Candidate(..) => "candidate",
        ToEdge::Fleet(_) => "report of the fleet",
        ToEdge::LeaseGranted(_) | ToEdge::LeaseRefused(_) => "word on a slot",
        ToEdge::Goodbye(_) => "goodbye",
    }
}

fn refusal_hint(code: RefusalCode) -> Option<&'static str> {
    match code {
        RefusalCode::UnsupportedVersion => Some("no protocol version in common: upgrade the older side"),
        RefusalCode::LayoutMismatch => Some(
            "edge and aggregator have different feature profiles: compare `profile` in both configurations",
        ),
        RefusalCode::UnknownSite => {
            Some("the registry does not know this site: enrol again with a new token")
        }
        RefusalCode::Suspended => Some("the site is suspended: ask the operator of the aggregator"),
        RefusalCode::Revoked => Some(
            "the certificate's key is not the one on record, or was revoked: enrol again with a new token",
        ),
        RefusalCode::LedgerRollback => Some(
            "the privacy ledger is older than the aggregator remembers: was a snapshot restored or a disk copied?",
        ),
        RefusalCode::Busy | RefusalCode::StorageFull => Some("the edge will try again by itself"),
        _ => None,
    }
}
