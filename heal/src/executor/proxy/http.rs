//! Mode `http`: requests. Each gets an upstream connection of its own, so none meets one that the service is just closing.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::http::request::Parts;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, Uri, Version};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::breaker::Ended;
use super::door::{Draining, InHand};
use super::stream::{IdleStream, Lacks, TimedBody, in_time};
use super::{Admitted, BUFFER_BYTES_MAX, Proxy, RETRY_PAUSE, Turned};

type Answer = Response<UnsyncBoxBody<Bytes, hyper::Error>>;

/// One client's connection, until it or we close it.
pub(super) async fn serve(
    proxy: Arc<Proxy>,
    stream: TcpStream,
    client: SocketAddr,
    mut closing: watch::Receiver<bool>,
) {
    let io = TokioIo::new(IdleStream::new(stream, proxy.spec.idle_timeout));
    let header_timeout = proxy.spec.header_timeout;
    let service = service_fn(move |request| {
        let proxy = Arc::clone(&proxy);
        async move { Ok::<_, Infallible>(answer(&proxy, client, request).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .max_buf_size(BUFFER_BYTES_MAX)
        .half_close(true)
        .serve_connection(io, service);
    tokio::pin!(connection);
    let closing = async { closing.wait_for(|closing| *closing).await.is_ok() };
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        _told = closing => None,
    };
    let ended = if let Some(ended) = ended {
        ended
    } else {
        connection.as_mut().graceful_shutdown();
        connection.await
    };
    if let Err(error) = ended {
        tracing::debug!(%client, %error, "a client's connection ended");
    }
}

/// There is no place for one more connection: says so, and lets the client read it.
pub(super) async fn turn_away(mut stream: TcpStream) {
    const WORDS: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
    let told = async {
        stream.write_all(WORDS).await?;
        stream.shutdown().await?;
        // A close with unread bytes would be a reset, which may overtake the words.
        let mut unread = [0; 1024];
        while stream.read(&mut unread).await? > 0 {}
        Ok::<_, std::io::Error>(())
    };
    drop(timeout(TOLD_WITHIN, told).await);
}

async fn answer(proxy: &Arc<Proxy>, client: SocketAddr, request: Request<Incoming>) -> Answer {
    proxy.lock_retries().request();
    let (mut parts, body) = request.into_parts();
    if parts.method == Method::CONNECT {
        return plain(StatusCode::METHOD_NOT_ALLOWED, None, "CONNECT is not passed on\n");
    }
    let empty = body.is_end_stream();
    let chunked = !empty && body.size_hint().exact().is_none();
    prepare(&mut parts, client, chunked);
    // Asked twice, these do no more than asked once (RFC 9110, section 9.2.2), and there is no body that would be gone.
    let idempotent = empty && matches!(parts.method, Method::GET | Method::HEAD);
    let mut body = Some(body).filter(|_| !empty);
    let (mut retried, mut patience) = (false, None);
    loop {
        let admitted = match proxy.admit(&mut patience).await {
            Ok(admitted) => admitted,
            Err(turned) => return turned_away(turned),
        };
        let stream = match proxy.connect().await {
            Ok(stream) => stream,
            Err(error) => {
                drop(admitted.end(Ended::Badly));
                let refused = error.kind() == std::io::ErrorKind::ConnectionRefused;
                if refused && !retried && proxy.may_retry() {
                    retried = true;
                    proxy.door.held_within(RETRY_PAUSE).await;
                    continue;
                }
                proxy.counts.failed.fetch_add(1, Ordering::Relaxed);
                let words = "the service takes no connection\n";
                return plain(StatusCode::SERVICE_UNAVAILABLE, Some(SECOND), words);
            }
        };
        let within = proxy.spec.response_timeout;
        let (body, lacks) = TimedBody::new(body.take(), within);
        let request = Request::from_parts(parts.clone(), body);
        match in_time(ask(stream, request), lacks, within).await {
            Ok(Ok((response, driver))) => {
                proxy.counts.answered.fetch_add(1, Ordering::Relaxed);
                return passed_on(response, driver, admitted.end(Ended::Well));
            }
            // The client's body failed, not the service.
            Ok(Err(error)) if error.is_user() || error.is_body_write_aborted() => {
                return no_body(proxy, admitted);
            }
            Err(Lacks::Client) => return no_body(proxy, admitted),
            Ok(Err(_)) => {
                drop(admitted.end(Ended::Badly));
                if idempotent && !retried && proxy.may_retry() {
                    retried = true;
                    proxy.door.held_within(RETRY_PAUSE).await;
                    continue;
                }
                proxy.counts.failed.fetch_add(1, Ordering::Relaxed);
                let words = "the service closed the connection before it answered\n";
                return plain(StatusCode::BAD_GATEWAY, None, words);
            }
            Err(Lacks::Service) => {
                // A second attempt would take as long again.
                drop(admitted.end(Ended::Badly));
                proxy.counts.failed.fetch_add(1, Ordering::Relaxed);
                let words = "the service did not answer in time\n";
                return plain(StatusCode::GATEWAY_TIMEOUT, None, words);
            }
        }
    }
}

fn no_body(proxy: &Proxy, admitted: Admitted) -> Answer {
    drop(admitted.end(Ended::Unknown));
    proxy.counts.failed.fetch_add(1, Ordering::Relaxed);
    let words = "the request's body did not arrive\n";
    plain(StatusCode::REQUEST_TIMEOUT, None, words)
}

/// The task that moves an upstream connection; it ends with whoever waits for the answer.
struct Driver(JoinHandle<()>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn ask(
    stream: IdleStream,
    request: Request<TimedBody<Incoming>>,
) -> Result<(Response<Incoming>, Driver), hyper::Error> {
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .max_buf_size(BUFFER_BYTES_MAX)
        .handshake(TokioIo::new(stream))
        .await?;
    let driver = Driver(tokio::spawn(async move {
        // The sender's own error says the same.
        let _ended = connection.await.is_ok();
    }));
    Ok((sender.send_request(request).await?, driver))
}

/// The request as the service gets it.
fn prepare(parts: &mut Parts, client: SocketAddr, chunked: bool) {
    if let Some(path) = parts.uri.path_and_query() {
        parts.uri = Uri::from(path.clone());
    }
    parts.version = Version::HTTP_11;
    without_hops(&mut parts.headers);
    if chunked {
        // Otherwise hyper takes a GET of unknown length for one without body.
        let value = HeaderValue::from_static("chunked");
        parts.headers.insert(header::TRANSFER_ENCODING, value);
    }
    // It was answered here.
    parts.headers.remove(header::EXPECT);
    // One connection for each request.
    parts
        .headers
        .insert(header::CONNECTION, HeaderValue::from_static("close"));
    if let Ok(address) = HeaderValue::try_from(client.ip().to_string()) {
        parts.headers.append(FORWARDED_FOR, address);
    }
}

/// Takes out what is for one connection alone (RFC 9110, section 7.6.1).
fn without_hops(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    let known = [
        header::CONNECTION,
        header::TE,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
        HeaderName::from_static("keep-alive"),
        HeaderName::from_static("proxy-connection"),
    ];
    for name in named.into_iter().chain(known) {
        headers.remove(name);
    }
}

fn passed_on(response: Response<Incoming>, driver: Driver, in_hand: Option<InHand>) -> Answer {
    let (mut parts, body) = response.into_parts();
    without_hops(&mut parts.headers);
    let body = AnswerBody {
        body,
        _driver: driver,
        _in_hand: in_hand,
    };
    Response::from_parts(parts, body.boxed_unsync())
}

/// The service's answer; it is in hand until the client has all of it.
struct AnswerBody {
    body: Incoming,
    _driver: Driver,
    _in_hand: Option<InHand>,
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn turned_away(turned: Turned) -> Answer {
    let (after, words) = match turned {
        Turned::Draining(Draining(left)) => (left.unwrap_or(ORDERED_AFTER), "the service is being drained\n"),
        Turned::Broken { retry_after } => (retry_after, "the service does not answer\n"),
    };
    let mut answer = plain(StatusCode::SERVICE_UNAVAILABLE, Some(after), words);
    if matches!(turned, Turned::Draining(_)) {
        let close = HeaderValue::from_static("close");
        answer.headers_mut().insert(header::CONNECTION, close);
    }
    answer
}

fn plain(status: StatusCode, retry_after: Option<Duration>, words: &'static str) -> Answer {
    let body = Full::new(Bytes::from_static(words.as_bytes())).map_err(|never| match never {});
    let mut answer = Response::new(body.boxed_unsync());
    *answer.status_mut() = status;
    if let Some(after) = retry_after {
        let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
        answer
            .headers_mut()
            .insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
    }
    answer
}

const SECOND: Duration = Duration::from_secs(1);
/// What a client is told of a drain that ends only when a person says so.
const ORDERED_AFTER: Duration = Duration::from_secs(10);
const TOLD_WITHIN: Duration = Duration::from_millis(500);
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
