//! Frames on a QUIC stream: bounded, timed, and safe to cancel in the middle.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use quinn::{ReadError, RecvStream, SendStream, WriteError};
use theriac_protocol::codec::Encoded;
use theriac_protocol::frame::{FrameHeader, HEADER_BYTES};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use crate::limits::Limits;
use crate::session::SessionError;
use crate::traffic::Counters;

/// Frames up to this size need no share of the endpoint's memory, and a peer must have sent this much of a longer
/// one before room for the whole of it is reserved.
const SMALL_BYTES: usize = 64 * 1024;

/// Reads frames. Its state is in here and not in the future, so a `read` that is dropped half-way loses nothing.
#[derive(Debug)]
pub(crate) struct FrameReader {
    stream: RecvStream,
    limits: Arc<Limits>,
    counters: Arc<Counters>,
    /// Shared by the sessions of a server endpoint; one permit is 1 KiB.
    memory: Option<Arc<Semaphore>>,
    length_max: u32,
    /// When the next frame must be there whole, whatever its length: before admission.
    due: Option<(Instant, Duration)>,
    header: [u8; HEADER_BYTES],
    header_filled: usize,
    header_due: Option<Instant>,
    body: Option<Body>,
    /// After an error that leaves no frame boundary to go on from.
    broken: bool,
}

#[derive(Debug)]
struct Body {
    header: FrameHeader,
    bytes: BytesMut,
    received: usize,
    due: Instant,
    room: Room,
}

/// Where a body's bytes go.
#[derive(Debug)]
enum Room {
    /// Small, or no shared limit.
    Free,
    /// Counted until the last reference to the message is gone.
    Counted(OwnedSemaphorePermit),
    /// No room: read and dropped.
    None,
}

/// Bytes that give their share of memory back when the last slice of them is dropped.
struct CountedBytes {
    bytes: BytesMut,
    _permit: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for CountedBytes {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl FrameReader {
    pub(crate) fn new(
        stream: RecvStream,
        limits: Arc<Limits>,
        counters: Arc<Counters>,
        memory: Option<Arc<Semaphore>>,
        length_max: u32,
    ) -> Self {
        Self {
            stream,
            limits,
            counters,
            memory,
            length_max,
            due: None,
            header: [0; HEADER_BYTES],
            header_filled: 0,
            header_due: None,
            body: None,
            broken: false,
        }
    }

    /// From now on bodies may be this long.
    pub(crate) fn set_length_max(&mut self, length_max: u32) {
        self.length_max = length_max;
    }

    /// The next frame must be there within `span` from now, or whenever it comes (`None`).
    pub(crate) fn set_due(&mut self, span: Option<Duration>) {
        self.due = span.map(|span| (Instant::now() + span, span));
    }

    /// The next frame's kind and body. Safe to cancel.
    pub(crate) async fn read(&mut self) -> Result<(u16, Bytes), SessionError> {
        if self.broken {
            return Err(SessionError::Ended);
        }
        let result = self.read_frame().await;
        self.broken = result.as_ref().is_err_and(SessionError::is_fatal);
        result
    }

    async fn read_frame(&mut self) -> Result<(u16, Bytes), SessionError> {
        while self.header_filled < HEADER_BYTES {
            let due = self
                .header_due
                .into_iter()
                .chain(self.due.map(|(due, _)| due))
                .min();
            let read = self.stream.read(&mut self.header[self.header_filled..]);
            let Some(read) = within(due, read).await.map_err(|TooLate| self.late(0))?? else {
                return Err(self.ended());
            };
            self.counters.received(read);
            self.header_filled += read;
            self.header_due
                .get_or_insert_with(|| Instant::now() + self.limits.frame_timeout);
        }
        if self.body.is_none() {
            self.body = Some(self.begin_body()?);
        }
        self.fill_body().await?;
        let Some(body) = self.body.take() else {
            return Err(SessionError::Ended);
        };
        self.header_filled = 0;
        self.header_due = None;
        self.counters.frame_received();
        let bytes = match body.room {
            Room::Free => body.bytes.freeze(),
            Room::Counted(permit) => Bytes::from_owner(CountedBytes {
                bytes: body.bytes,
                _permit: permit,
            }),
            Room::None => {
                return Err(SessionError::Busy {
                    length: body.header.length,
                });
            }
        };
        Ok((body.header.kind, bytes))
    }

    /// Judges the length first; reserves little until much has come.
    fn begin_body(&self) -> Result<Body, SessionError> {
        let header = FrameHeader::parse(&self.header, self.length_max)?;
        let length = header.length as usize;
        let room = match &self.memory {
            Some(memory) if length > SMALL_BYTES => {
                match Arc::clone(memory).try_acquire_many_owned(header.length.div_ceil(1024)) {
                    Ok(permit) => Room::Counted(permit),
                    Err(_) => Room::None,
                }
            }
            _ => Room::Free,
        };
        let reserve = if matches!(room, Room::None) {
            0
        } else {
            length.min(SMALL_BYTES)
        };
        let frame_due = Instant::now() + self.limits.frame_time(length);
        let due = self.due.map_or(frame_due, |(due, _)| due.min(frame_due));
        Ok(Body {
            header,
            bytes: BytesMut::with_capacity(reserve),
            received: 0,
            due,
            room,
        })
    }

    async fn fill_body(&mut self) -> Result<(), SessionError> {
        let Some(body) = &mut self.body else { return Ok(()) };
        let length = body.header.length as usize;
        while body.received < length {
            let chunk = self.stream.read_chunk(length - body.received, true);
            let chunk = match within(Some(body.due), chunk).await {
                Err(TooLate) => {
                    let received = body.received;
                    return Err(self.late(received));
                }
                Ok(Err(error)) => return Err(error.into()),
                Ok(Ok(None)) => return Err(self.ended()),
                Ok(Ok(Some(chunk))) => chunk.bytes,
            };
            self.counters.received(chunk.len());
            body.received += chunk.len();
            if matches!(body.room, Room::None) {
                continue;
            }
            if body.bytes.len() + chunk.len() > body.bytes.capacity() {
                body.bytes.reserve(length - body.bytes.len());
            }
            body.bytes.extend_from_slice(&chunk);
        }
        Ok(())
    }

    fn ended(&self) -> SessionError {
        match &self.body {
            None if self.header_filled == 0 => SessionError::Ended,
            None => SessionError::Truncated {
                received: self.header_filled,
                expected: HEADER_BYTES,
            },
            Some(body) => SessionError::Truncated {
                received: body.received,
                expected: body.header.length as usize,
            },
        }
    }

    fn late(&self, received: usize) -> SessionError {
        match (&self.body, self.due) {
            (None, Some((_, span))) if self.header_filled == 0 => SessionError::Silent { waited: span },
            (body, _) => {
                let expected = body
                    .as_ref()
                    .map_or(HEADER_BYTES, |body| body.header.length as usize);
                let received = if body.is_some() {
                    received
                } else {
                    self.header_filled
                };
                SessionError::TooSlow {
                    done: received,
                    of: expected,
                }
            }
        }
    }
}

/// Writes frames. What a dropped `write` left over is written first by the next one, so frames stay whole.
#[derive(Debug)]
pub(crate) struct FrameWriter {
    stream: SendStream,
    limits: Arc<Limits>,
    counters: Arc<Counters>,
    pending: Vec<Bytes>,
}

impl FrameWriter {
    pub(crate) fn new(stream: SendStream, limits: Arc<Limits>, counters: Arc<Counters>) -> Self {
        Self {
            stream,
            limits,
            counters,
            pending: Vec::new(),
        }
    }

    /// Hands one frame to QUIC, whose buffers hold it until it is acknowledged. The payload is shared, not copied.
    pub(crate) async fn write(&mut self, frame: &Encoded) -> Result<(), SessionError> {
        self.pending.push(frame.head.clone());
        if !frame.payload.is_empty() {
            self.pending.push(frame.payload.clone());
        }
        self.flush().await?;
        self.counters.frame_sent();
        Ok(())
    }

    /// Says that nothing follows and waits until the peer has everything, or `goodbye_timeout`.
    pub(crate) async fn finish(mut self) {
        if self.flush().await.is_err() || self.stream.finish().is_err() {
            return;
        }
        let due = Instant::now() + self.limits.goodbye_timeout;
        if timeout_at(due, self.stream.stopped()).await.is_err() {
            tracing::debug!("the peer did not acknowledge the last message in time");
        }
    }

    async fn flush(&mut self) -> Result<(), SessionError> {
        let length: usize = self.pending.iter().map(Bytes::len).sum();
        let due = Instant::now() + self.limits.frame_time(length);
        while !self.pending.is_empty() {
            let write = self.stream.write_chunks(&mut self.pending);
            let Ok(written) = timeout_at(due, write).await else {
                let left: usize = self.pending.iter().map(Bytes::len).sum();
                return Err(SessionError::TooSlow {
                    done: length - left,
                    of: length,
                });
            };
            let written = written?;
            self.counters.sent(written.bytes);
            self.pending.drain(..written.chunks);
        }
        Ok(())
    }
}

struct TooLate;

async fn within<T>(due: Option<Instant>, future: impl Future<Output = T>) -> Result<T, TooLate> {
    match due {
        Some(due) => timeout_at(due, future).await.map_err(|_| TooLate),
        None => Ok(future.await),
    }
}

impl From<ReadError> for SessionError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::ConnectionLost(error) => Self::Lost(error.into()),
            ReadError::Reset(_)
            | ReadError::ClosedStream
            | ReadError::IllegalOrderedRead
            | ReadError::ZeroRttRejected => Self::Ended,
        }
    }
}

impl From<WriteError> for SessionError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::ConnectionLost(error) => Self::Lost(error.into()),
            WriteError::Stopped(_) | WriteError::ClosedStream | WriteError::ZeroRttRejected => Self::Ended,
        }
    }
}
