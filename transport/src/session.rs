//! Sessions: typed messages in both directions, whole or in two halves.

use std::net::SocketAddr;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use theriac_certs::{IdentityError, PeerName};
use theriac_protocol::codec::{self, CodecError, Encoded};
use theriac_protocol::frame::{FrameError, HEADER_BYTES};
use theriac_protocol::message::{ToAggregator, ToEdge};
use theriac_protocol::refusal::{RefusalCode, RefusalV1};
use tokio::sync::Semaphore;

use crate::frame::{FrameReader, FrameWriter};
use crate::limits::Limits;
use crate::loss::{CloseCode, Loss};
use crate::traffic::{Counters, Traffic};

/// A peer that was told `busy` should wait this long, milliseconds.
const BUSY_RETRY_MS: u32 = 2_000;

/// Why nothing was received or sent.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The peer has said all it wanted, between two messages.
    #[error("the peer ended the session")]
    Ended,
    /// The peer ended in the middle of a message.
    #[error("the peer ended after {received} of {expected} bytes")]
    Truncated {
        /// Bytes that came.
        received: usize,
        /// Bytes that were announced.
        expected: usize,
    },
    /// The connection is gone.
    #[error("the connection is lost: {0}")]
    Lost(Loss),
    /// Not a word before admission.
    #[error("not a word for {waited:?}")]
    Silent {
        /// How long.
        waited: std::time::Duration,
    },
    /// The peer sends or takes a frame too slowly, or stopped half-way.
    #[error("only {done} of {of} bytes in the time for them")]
    TooSlow {
        /// Bytes moved.
        done: usize,
        /// Bytes of the frame.
        of: usize,
    },
    /// The bytes begin no frame, or one over the limit; what follows cannot be read.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The message is whole but no good, or of an unknown kind. The session lives on.
    #[error(transparent)]
    Message(CodecError),
    /// No memory for a message of this size now: it was read and dropped. The session lives on.
    #[error("no room for a message of {length} bytes now; it was dropped")]
    Busy {
        /// Bytes of the message.
        length: u32,
    },
    /// Our own message does not encode. Nothing was sent; the session lives on.
    #[error("this message cannot be sent: {0}")]
    Encode(CodecError),
    /// Our own message is longer than the peer takes. Nothing was sent; the session lives on.
    #[error("a message of {length} bytes cannot be sent, the peer takes at most {length_max}")]
    TooLarge {
        /// Bytes of its body.
        length: usize,
        /// What the peer said.
        length_max: u32,
    },
}

impl SessionError {
    /// Whether the session is of no further use: close it.
    pub fn is_fatal(&self) -> bool {
        match self {
            Self::Ended
            | Self::Truncated { .. }
            | Self::Lost(_)
            | Self::Silent { .. }
            | Self::TooSlow { .. }
            | Self::Frame(_) => true,
            Self::Message(_) | Self::Busy { .. } | Self::Encode(_) | Self::TooLarge { .. } => false,
        }
    }

    /// What the peer should be told, when something it sent caused this.
    pub fn refusal(&self) -> Option<RefusalV1> {
        let refusal = |code, retry_after_ms| {
            Some(RefusalV1 {
                code,
                round: None,
                retry_after_ms,
            })
        };
        match self {
            Self::Frame(error) => refusal(error.refusal_code(), 0),
            Self::Message(error) => refusal(error.refusal_code(), 0),
            Self::Busy { .. } => refusal(RefusalCode::Busy, BUSY_RETRY_MS),
            _ => None,
        }
    }

    /// The code to close with after a fatal error.
    pub fn close_code(&self) -> CloseCode {
        match self {
            Self::Frame(FrameError::TooLong { .. }) => CloseCode::TooLarge,
            Self::Frame(_) | Self::Truncated { .. } | Self::Message(_) => CloseCode::Malformed,
            Self::Silent { .. } | Self::TooSlow { .. } => CloseCode::TooSlow,
            _ => CloseCode::Done,
        }
    }
}

/// A session seen from outside its two halves: who is there, how much went over it, and the way to end it. Cheap to
/// clone. Holding one keeps the connection open, also when both halves are dropped: whoever keeps a table of handles
/// must [close](Self::close) them.
#[derive(Debug, Clone)]
pub struct SessionHandle {
    connection: quinn::Connection,
    peer_certificate: Arc<[u8]>,
    counters: Arc<Counters>,
}

impl SessionHandle {
    pub(crate) fn new(connection: quinn::Connection, counters: Arc<Counters>) -> Self {
        let chain = connection
            .peer_identity()
            .and_then(|any| any.downcast::<Vec<CertificateDer>>().ok());
        let leaf = chain.and_then(|chain| chain.into_iter().next());
        let peer_certificate = leaf.map_or_else(|| [].into(), |leaf| Arc::from(leaf.as_ref()));
        Self {
            connection,
            peer_certificate,
            counters,
        }
    }

    /// The peer's address now; an IPv4 address is given as such.
    pub fn remote(&self) -> SocketAddr {
        let remote = self.connection.remote_address();
        SocketAddr::new(remote.ip().to_canonical(), remote.port())
    }

    /// The peer's certificate, DER, as verified in the handshake; empty on the join listener.
    pub fn peer_certificate_der(&self) -> &[u8] {
        &self.peer_certificate
    }

    /// The name in the peer's certificate.
    ///
    /// # Errors
    /// [`IdentityError`]; not on the main listener, which verified it.
    pub fn peer_name(&self) -> Result<PeerName, IdentityError> {
        theriac_certs::peer_name(&self.peer_certificate)
    }

    /// What went over this session.
    pub fn traffic(&self) -> Traffic {
        self.counters.read()
    }

    /// Ends the session at once. What is not acknowledged is lost, both halves fail from now on, and no further byte
    /// is taken from the peer.
    pub fn close(&self, code: CloseCode, reason: &str) {
        let cut = reason
            .char_indices()
            .nth(200)
            .map_or(reason.len(), |(index, _)| index);
        self.connection
            .close((code as u32).into(), &reason.as_bytes()[..cut]);
    }

    /// Waits until the session has ended, by whichever side.
    pub async fn closed(&self) -> Loss {
        self.connection.closed().await.into()
    }

    /// Round-trip time as QUIC estimates it.
    pub fn round_trip(&self) -> std::time::Duration {
        self.connection.rtt()
    }
}

/// The edge's sending half.
#[derive(Debug)]
pub struct EdgeSender {
    writer: FrameWriter,
    handle: SessionHandle,
    length_max: u32,
}

impl EdgeSender {
    /// Sends one message. When this is cancelled the next `send` completes it first.
    ///
    /// # Errors
    /// [`SessionError`].
    pub async fn send(&mut self, message: &ToAggregator) -> Result<(), SessionError> {
        let frame = codec::encode_to_aggregator(message).map_err(SessionError::Encode)?;
        check_length(&frame, self.length_max)?;
        self.writer.write(&frame).await
    }

    /// Waits until the aggregator has everything that was sent (at most `goodbye_timeout`), then closes.
    pub async fn finish(self) {
        self.writer.finish().await;
        self.handle.close(CloseCode::Done, "");
    }
}

/// The edge's receiving half.
#[derive(Debug)]
pub struct EdgeReceiver {
    reader: FrameReader,
}

impl EdgeReceiver {
    /// The next message. Safe to cancel.
    ///
    /// # Errors
    /// [`SessionError`]; go on unless it [is fatal](SessionError::is_fatal).
    pub async fn recv(&mut self) -> Result<ToEdge, SessionError> {
        let (kind, body) = self.reader.read().await?;
        codec::decode_to_edge(kind, body).map_err(SessionError::Message)
    }
}

/// A session as an edge has it, after its Welcome.
#[derive(Debug)]
pub struct EdgeSession {
    sender: EdgeSender,
    receiver: EdgeReceiver,
}

impl EdgeSession {
    pub(crate) fn new(pieces: Pieces, limits: &Arc<Limits>) -> Self {
        let Pieces {
            handle,
            send,
            receive,
        } = pieces;
        let counters = Arc::clone(&handle.counters);
        let length_max = limits.model_frame_bytes_max;
        let reader = FrameReader::new(
            receive,
            Arc::clone(limits),
            Arc::clone(&counters),
            None,
            length_max,
        );
        let writer = FrameWriter::new(send, Arc::clone(limits), counters);
        let sender = EdgeSender {
            writer,
            handle,
            length_max: limits.hello_bytes_max,
        };
        Self {
            sender,
            receiver: EdgeReceiver { reader },
        }
    }

    /// What the Welcome said.
    pub(crate) fn set_length_max(&mut self, length_max: u32) {
        self.sender.length_max = length_max;
    }

    /// As [`EdgeSender::send`].
    ///
    /// # Errors
    /// [`SessionError`].
    pub async fn send(&mut self, message: &ToAggregator) -> Result<(), SessionError> {
        self.sender.send(message).await
    }

    /// As [`EdgeReceiver::recv`].
    ///
    /// # Errors
    /// [`SessionError`].
    pub async fn recv(&mut self) -> Result<ToEdge, SessionError> {
        self.receiver.recv().await
    }

    /// The session seen from outside.
    pub fn handle(&self) -> &SessionHandle {
        &self.sender.handle
    }

    /// Two halves for two tasks.
    pub fn split(self) -> (EdgeSender, EdgeReceiver) {
        (self.sender, self.receiver)
    }

    /// As [`EdgeSender::finish`].
    pub async fn finish(self) {
        self.sender.finish().await;
    }
}

/// The aggregator's sending half.
#[derive(Debug)]
pub struct AggregatorSender {
    writer: FrameWriter,
    handle: SessionHandle,
    length_max: u32,
}

impl AggregatorSender {
    /// Sends one message. When this is cancelled the next `send` completes it first.
    ///
    /// # Errors
    /// [`SessionError`].
    pub async fn send(&mut self, message: &ToEdge) -> Result<(), SessionError> {
        self.send_encoded(&codec::encode_to_edge(message).map_err(SessionError::Encode)?)
            .await
    }

    /// Sends a message that was encoded once for many: `theriac_protocol::codec::encode_to_edge`.
    ///
    /// # Errors
    /// [`SessionError`].
    pub async fn send_encoded(&mut self, frame: &Encoded) -> Result<(), SessionError> {
        check_length(frame, self.length_max)?;
        self.writer.write(frame).await
    }

    /// Waits until the edge has everything that was sent (at most `goodbye_timeout`), then closes.
    pub async fn finish(self, code: CloseCode, reason: &str) {
        self.writer.finish().await;
        self.handle.close(code, reason);
    }
}

/// The aggregator's receiving half. Until [`AggregatorReceiver::admit`] it takes small frames only, and the first
/// message must be there within `hello_timeout`.
#[derive(Debug)]
pub struct AggregatorReceiver {
    reader: FrameReader,
    handle: SessionHandle,
    receive_window_bytes: u32,
}

impl AggregatorReceiver {
    /// The next message. Safe to cancel.
    ///
    /// # Errors
    /// [`SessionError`]: answer its [refusal](SessionError::refusal), and close when it
    /// [is fatal](SessionError::is_fatal).
    pub async fn recv(&mut self) -> Result<ToAggregator, SessionError> {
        let (kind, body) = self.reader.read().await?;
        codec::decode_to_aggregator(kind, body).map_err(SessionError::Message)
    }

    /// The edge is admitted: bodies up to `frame_bytes_max`, larger windows, no more hurry. Say the same number in the
    /// Welcome.
    pub fn admit(&mut self, frame_bytes_max: u32) {
        self.reader.set_length_max(frame_bytes_max);
        self.reader.set_due(None);
        self.handle
            .connection
            .set_receive_window(self.receive_window_bytes.into());
    }
}

/// A session as an aggregator has it. The certificate is verified; whether the site is welcome is the registry's word.
#[derive(Debug)]
pub struct AggregatorSession {
    sender: AggregatorSender,
    receiver: AggregatorReceiver,
}

impl AggregatorSession {
    pub(crate) fn new(pieces: Pieces, limits: &Arc<Limits>, memory: Arc<Semaphore>) -> Self {
        let Pieces {
            handle,
            send,
            receive,
        } = pieces;
        let counters = Arc::clone(&handle.counters);
        let length_max = limits.hello_bytes_max;
        let mut reader = FrameReader::new(
            receive,
            Arc::clone(limits),
            Arc::clone(&counters),
            Some(memory),
            length_max,
        );
        reader.set_due(Some(limits.hello_timeout));
        let writer = FrameWriter::new(send, Arc::clone(limits), counters);
        let receive_window_bytes = limits.receive_window_bytes;
        Self {
            sender: AggregatorSender {
                writer,
                handle: handle.clone(),
                length_max: limits.model_frame_bytes_max,
            },
            receiver: AggregatorReceiver {
                reader,
                handle,
                receive_window_bytes,
            },
        }
    }

    /// The edge's certificate, DER, as verified in the handshake.
    pub fn peer_certificate_der(&self) -> &[u8] {
        self.handle().peer_certificate_der()
    }

    /// The edge's address.
    pub fn remote(&self) -> SocketAddr {
        self.handle().remote()
    }

    /// As [`AggregatorSender::send`].
    ///
    /// # Errors
    /// [`SessionError`].
    pub async fn send(&mut self, message: &ToEdge) -> Result<(), SessionError> {
        self.sender.send(message).await
    }

    /// As [`AggregatorReceiver::recv`].
    ///
    /// # Errors
    /// [`SessionError`].
    pub async fn recv(&mut self) -> Result<ToAggregator, SessionError> {
        self.receiver.recv().await
    }

    /// As [`AggregatorReceiver::admit`].
    pub fn admit(&mut self, frame_bytes_max: u32) {
        self.receiver.admit(frame_bytes_max);
    }

    /// Turns the edge away: sends the refusal, waits until it is delivered (at most `goodbye_timeout`), closes.
    pub async fn refuse(mut self, refusal: RefusalV1) {
        let reason = refusal.code.word();
        if let Err(error) = self.send(&ToEdge::Refusal(refusal)).await {
            tracing::debug!(%error, reason, "the refusal could not be sent");
        }
        self.sender.finish(CloseCode::Refused, reason).await;
    }

    /// Ends the session at once: [`SessionHandle::close`].
    pub fn close(&self, code: CloseCode, reason: &str) {
        self.handle().close(code, reason);
    }

    /// The session seen from outside.
    pub fn handle(&self) -> &SessionHandle {
        &self.sender.handle
    }

    /// Two halves for two tasks.
    pub fn split(self) -> (AggregatorSender, AggregatorReceiver) {
        (self.sender, self.receiver)
    }
}

/// A connection with its one open stream.
#[derive(Debug)]
pub(crate) struct Pieces {
    pub(crate) handle: SessionHandle,
    pub(crate) send: quinn::SendStream,
    pub(crate) receive: quinn::RecvStream,
}

fn check_length(frame: &Encoded, length_max: u32) -> Result<(), SessionError> {
    let length = frame.len() - HEADER_BYTES;
    if u32::try_from(length).is_ok_and(|length| length <= length_max) {
        Ok(())
    } else {
        Err(SessionError::TooLarge { length, length_max })
    }
}
