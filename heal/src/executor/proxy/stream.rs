//! A connection on which nothing may move for only so long, and a body that must be whole by a deadline.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::body::{Body, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, Sleep, sleep, timeout};

/// Fails with [`io::ErrorKind::TimedOut`] when neither end moves a byte for `limit`.
#[derive(Debug)]
pub(super) struct IdleStream {
    stream: TcpStream,
    limit: Duration,
    timer: Pin<Box<Sleep>>,
}

impl IdleStream {
    pub(super) fn new(stream: TcpStream, limit: Duration) -> Self {
        Self {
            stream,
            limit,
            timer: Box::pin(sleep(limit)),
        }
    }

    fn judge<T>(&mut self, moved: Poll<io::Result<T>>, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        if moved.is_ready() {
            let next = Instant::now() + self.limit;
            self.timer.as_mut().reset(next);
            return moved;
        }
        ready!(self.timer.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for IdleStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let moved = Pin::new(&mut self.stream).poll_read(context, buffer);
        self.judge(moved, context)
    }
}

impl AsyncWrite for IdleStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        let moved = Pin::new(&mut self.stream).poll_write(context, buffer);
        self.judge(moved, context)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// For whom a request waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lacks {
    /// Its body has not come.
    Client,
    /// It takes no more of the body, or has it and does not answer.
    Service,
}

/// A client's body that must be whole in time, however steadily it trickles. It tells for whom it waits; whole or dropped, it tells no more.
#[derive(Debug)]
pub(super) struct TimedBody<B> {
    body: Option<B>,
    deadline: Pin<Box<Sleep>>,
    lacks: Option<watch::Sender<Lacks>>,
}

impl<B: Body> TimedBody<B> {
    /// `None` for a request without body.
    pub(super) fn new(body: Option<B>, within: Duration) -> (Self, watch::Receiver<Lacks>) {
        let (lacks, told) = watch::channel(Lacks::Service);
        let body = Self {
            lacks: body.is_some().then_some(lacks),
            body,
            deadline: Box::pin(sleep(within)),
        };
        (body, told)
    }

    fn tell(&self, now: Lacks) {
        if let Some(lacks) = &self.lacks {
            lacks.send_if_modified(|lacks| std::mem::replace(lacks, now) != now);
        }
    }
}

/// Waits for an answer: so long for the body to be whole, then as long again. Otherwise who is late.
pub(super) async fn in_time<T>(
    asked: impl Future<Output = T>,
    mut lacks: watch::Receiver<Lacks>,
    within: Duration,
) -> Result<T, Lacks> {
    tokio::pin!(asked);
    let whole = async { while lacks.changed().await.is_ok() {} };
    let first = async {
        tokio::select! {
            biased;
            answer = asked.as_mut() => Some(answer),
            () = whole => None,
        }
    };
    match timeout(within, first).await {
        Ok(Some(answer)) => return Ok(answer),
        Ok(None) => {}
        Err(_) => return Err(*lacks.borrow()),
    }
    timeout(within, asked).await.map_err(|_| Lacks::Service)
}

type BodyError = Box<dyn std::error::Error + Send + Sync>;

impl<B: Body<Error: Into<BodyError>> + Unpin> Body for TimedBody<B> {
    type Data = B::Data;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, BodyError>>> {
        let Some(body) = &mut self.body else {
            return Poll::Ready(None);
        };
        if let Poll::Ready(frame) = Pin::new(&mut *body).poll_frame(context) {
            let whole = !matches!(frame, Some(Ok(_))) || body.is_end_stream();
            self.tell(Lacks::Service);
            if whole {
                self.lacks = None;
            }
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        self.tell(Lacks::Client);
        ready!(self.deadline.as_mut().poll(context));
        Poll::Ready(Some(Err("the request's body took too long".into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body
            .as_ref()
            .map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::future::pending;

    use http_body_util::BodyExt as _;
    use hyper::body::Bytes;

    use super::*;

    /// Frames that are there, then the end, or silence.
    struct Slow {
        frames: VecDeque<&'static str>,
        ends: bool,
    }

    impl Body for Slow {
        type Data = Bytes;
        type Error = std::convert::Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _context: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
            match self.frames.pop_front() {
                Some(text) => Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(text.as_bytes()))))),
                None if self.ends => Poll::Ready(None),
                None => Poll::Pending,
            }
        }
    }

    const SOON: Duration = Duration::from_millis(5);
    const LONG: Duration = Duration::from_hours(1);

    fn slow(ends: bool) -> (TimedBody<Slow>, watch::Receiver<Lacks>) {
        let frames = VecDeque::from(["a"]);
        TimedBody::new(Some(Slow { frames, ends }), LONG)
    }

    #[tokio::test]
    async fn whoever_is_late_is_named() {
        // It takes nothing of the body.
        let (body, lacks) = slow(false);
        assert_eq!(in_time(pending::<()>(), lacks, SOON).await, Err(Lacks::Service));
        drop(body);
        // It takes what is there, and more does not come.
        let (mut body, lacks) = slow(false);
        let reads = async { while body.frame().await.is_some() {} };
        assert_eq!(in_time(reads, lacks, SOON).await, Err(Lacks::Client));
        // It has all of it.
        let (mut body, lacks) = slow(true);
        let reads = async {
            while body.frame().await.is_some() {}
            pending::<()>().await;
        };
        assert_eq!(in_time(reads, lacks, SOON).await, Err(Lacks::Service));
        // There is none.
        let (_body, lacks) = TimedBody::<Slow>::new(None, LONG);
        assert_eq!(in_time(pending::<()>(), lacks, SOON).await, Err(Lacks::Service));
    }
}
