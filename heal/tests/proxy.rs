//! The proxy before a live server: what it passes on, holds back, turns away, and tries again.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use theriac_heal::executor::proxy::{Circuit, Mode, Proxy, ProxySpec};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Nothing here waits for so long: it is what a test that hangs fails by.
const LONG: Duration = Duration::from_mins(1);

fn spec(upstream: SocketAddr) -> ProxySpec {
    ProxySpec {
        mode: Mode::Http,
        upstream,
        connections_max: 64,
        connect_timeout: LONG,
        response_timeout: LONG,
        header_timeout: LONG,
        idle_timeout: 2 * LONG,
        hold: LONG,
        drain_timeout: LONG,
        drain_for: LONG,
        failures_max: 1_000,
        open_for: 60 * LONG,
        retry_percent: 10,
    }
}

/// A proxy that serves.
struct Served {
    proxy: Arc<Proxy>,
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Served {
    async fn new(spec: ProxySpec) -> Self {
        let listener = Arc::new(TcpListener::bind("127.0.0.1:0").await.unwrap());
        let address = listener.local_addr().unwrap();
        let proxy = Proxy::new(spec);
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(Arc::clone(&proxy).serve(listener, LONG, stopped));
        Self {
            proxy,
            address,
            stop,
            task,
        }
    }

    async fn ask(&self, request: &str) -> String {
        ask(self.address, request.as_bytes()).await
    }

    async fn get(&self) -> String {
        self.ask(GET).await
    }

    async fn until(&self, mut holds: impl FnMut(&Proxy) -> bool) {
        let look = async {
            while !holds(&self.proxy) {
                tokio::task::yield_now().await;
            }
        };
        timeout(LONG, look).await.unwrap();
    }

    async fn finish(self) {
        self.stop.send(()).unwrap();
        timeout(LONG, self.task).await.unwrap().unwrap();
    }
}

const GET: &str = "GET /a?b=c HTTP/1.1\r\nHost: kv\r\nConnection: close\r\n\r\n";
const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok";

/// All that comes back until the connection ends; what came before a reset counts.
async fn ask(address: SocketAddr, request: &[u8]) -> String {
    let talk = async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        let _whole = stream.read_to_end(&mut answer).await.is_ok();
        String::from_utf8_lossy(&answer).into_owned()
    };
    timeout(LONG, talk).await.unwrap()
}

/// Reads one request up to the end of its head.
async fn head(stream: &mut TcpStream) -> Option<String> {
    let mut read = Vec::new();
    while !read.ends_with(b"\r\n\r\n") {
        read.push(stream.read_u8().await.ok()?);
    }
    Some(String::from_utf8(read).unwrap())
}

/// A server that answers each connection in its own way.
async fn server<F: Future<Output = ()> + Send + 'static>(
    answer: impl Fn(TcpStream) -> F + Send + 'static,
) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (address, tokio::spawn(serve(listener, answer)))
}

async fn serve<F: Future<Output = ()> + Send + 'static>(
    listener: TcpListener,
    answer: impl Fn(TcpStream) -> F,
) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        tokio::spawn(answer(stream));
    }
}

async fn well(mut stream: TcpStream) {
    if head(&mut stream).await.is_some() {
        drop(stream.write_all(OK).await);
    }
}

/// An address at which nobody listens while the socket is kept, and at which that one alone can begin to.
fn nobody() -> (SocketAddr, TcpSocket) {
    let kept = TcpSocket::new_v4().unwrap();
    kept.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    (kept.local_addr().unwrap(), kept)
}

#[tokio::test]
async fn a_request_and_its_answer_are_passed_on_whole_without_what_is_for_one_connection() {
    const BYTES: usize = 3 << 20;
    let (told, mut heads) = tokio::sync::mpsc::unbounded_channel();
    let (upstream, _server) = server(move |mut stream| {
        let told = told.clone();
        async move {
            let head = head(&mut stream).await.unwrap();
            let mut body = vec![0; if head.starts_with("POST") { BYTES } else { 0 }];
            stream.read_exact(&mut body).await.unwrap();
            told.send(head).unwrap();
            let answer = format!("HTTP/1.1 201 Made\r\nX-Kept: 1\r\nX-Hop: 2\r\nConnection: X-Hop\r\nContent-Length: {}\r\n\r\n", body.len());
            stream.write_all(answer.as_bytes()).await.unwrap();
            stream.write_all(&body).await.unwrap();
        }
    })
    .await;
    let served = Served::new(spec(upstream)).await;
    let head = format!(
        "POST /a?b=c HTTP/1.1\r\nHost: kv\r\nX-Mine: 3\r\nKeep-Alive: 5\r\nConnection: close, x-mine\r\nContent-Length: {BYTES}\r\n\r\n"
    );
    let body: String = (0..BYTES)
        .map(|at| char::from(b"abcdefghijklmnopqrstuvw"[at % 23]))
        .collect();
    let answer = served.ask(&(head + &body)).await;
    assert!(answer.ends_with(&body), "{}", &answer[..200]);
    let answer = answer.to_lowercase();
    assert!(answer.starts_with("http/1.1 201") && answer.contains("x-kept: 1"));
    assert!(!answer.contains("x-hop"));
    let asked = heads.recv().await.unwrap().to_lowercase();
    assert!(asked.starts_with("post /a?b=c http/1.1\r\n"), "{asked}");
    for wanted in ["host: kv", "x-forwarded-for: 127.0.0.1", "connection: close"] {
        assert!(asked.contains(wanted), "{wanted} in {asked}");
    }
    assert!(
        !asked.contains("x-mine") && !asked.contains("keep-alive"),
        "{asked}"
    );
    let connect = served
        .ask("CONNECT a:1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        .await;
    assert!(connect.starts_with("HTTP/1.1 405"), "{connect}");
    assert_eq!(served.proxy.counts().answered, 1);
    served.finish().await;
}

#[tokio::test]
async fn a_drain_loses_no_request_in_hand_and_turns_new_ones_away_until_it_is_taken_back() {
    let gate = Arc::new(Notify::new());
    let opened = Arc::clone(&gate);
    let (upstream, _server) = server(move |mut stream| {
        let gate = Arc::clone(&gate);
        async move {
            if head(&mut stream).await.unwrap().contains("/slow") {
                stream.write_all(&OK[..20]).await.unwrap();
                gate.notified().await;
                stream.write_all(&OK[20..]).await.unwrap();
            } else {
                stream.write_all(OK).await.unwrap();
            }
        }
    })
    .await;
    let served = Served::new(spec(upstream)).await;
    let address = served.address;
    let slow = tokio::spawn(async move {
        ask(
            address,
            b"GET /slow HTTP/1.1\r\nHost: kv\r\nConnection: close\r\n\r\n",
        )
        .await
    });
    served.until(|proxy| proxy.in_hand() == 1).await;
    let proxy = Arc::clone(&served.proxy);
    let drain = tokio::spawn(async move { proxy.drain(1).await });
    served.until(Proxy::is_draining).await;
    let refused = served.get().await;
    assert!(refused.starts_with("HTTP/1.1 503"), "{refused}");
    assert!(refused.to_lowercase().contains("retry-after: "), "{refused}");
    assert!(!drain.is_finished(), "one is still in hand");
    opened.notify_one();
    let drained = timeout(LONG, drain).await.unwrap().unwrap();
    assert_eq!((drained.had, drained.left), (1, 0));
    assert!(
        slow.await.unwrap().ends_with("ok"),
        "the request in hand was lost"
    );
    assert!(served.get().await.starts_with("HTTP/1.1 503"), "it goes on");
    // Another intent's effect was none: that says nothing of this one.
    served.proxy.undrain(2);
    assert!(served.get().await.starts_with("HTTP/1.1 503"), "it goes on");
    served.proxy.undrain(1);
    assert!(served.get().await.ends_with("ok"));
    served.proxy.order_drained(true);
    served.proxy.undrain(1);
    assert!(
        served.get().await.starts_with("HTTP/1.1 503"),
        "a person's word stays"
    );
    served.proxy.order_drained(false);
    assert!(served.get().await.ends_with("ok"));
    assert_eq!(served.proxy.counts().drained, 4);
    served.finish().await;
}

#[tokio::test]
async fn a_drain_ends_by_itself_and_waits_no_longer_than_it_may() {
    let (upstream, _server) = server(|mut stream| async move {
        drop(head(&mut stream).await);
        std::future::pending::<()>().await;
    })
    .await;
    let mut spec = spec(upstream);
    (spec.drain_timeout, spec.drain_for) = (Duration::from_millis(20), Duration::from_millis(20));
    let served = Served::new(spec).await;
    let address = served.address;
    let stuck = tokio::spawn(async move { ask(address, GET.as_bytes()).await });
    served.until(|proxy| proxy.in_hand() == 1).await;
    let drained = timeout(LONG, served.proxy.drain(1)).await.unwrap();
    assert_eq!((drained.had, drained.left), (1, 1));
    served.until(|proxy| !proxy.is_draining()).await;
    stuck.abort();
}

#[tokio::test]
async fn a_dead_upstream_is_told_at_once_then_not_asked_until_one_request_finds_it_well() {
    let (upstream, kept) = nobody();
    let mut spec = spec(upstream);
    (spec.failures_max, spec.retry_percent) = (3, 0);
    let served = Served::new(spec).await;
    for _ in 0..3 {
        assert_eq!(served.proxy.circuit(), Circuit::Closed);
        let answer = served.get().await;
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    }
    assert_eq!(served.proxy.circuit(), Circuit::Open);
    let listener = kept.listen(64).unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&asked);
    let _server = tokio::spawn(serve(listener, move |stream| {
        counted.fetch_add(1, Ordering::SeqCst);
        well(stream)
    }));
    let answer = served.get().await;
    assert!(
        answer.contains("does not answer") && asked.load(Ordering::SeqCst) == 0,
        "{answer}"
    );
    served.proxy.note_probe(true);
    assert_eq!(served.proxy.circuit(), Circuit::HalfOpen);
    assert!(served.get().await.ends_with("ok"));
    assert_eq!(served.proxy.circuit(), Circuit::Closed);
    let counts = served.proxy.counts();
    assert_eq!((counts.failed, counts.broken, counts.answered), (3, 1, 1));
    served.finish().await;
}

#[tokio::test]
async fn while_half_open_one_request_at_a_time_is_passed_on() {
    let gate = Arc::new(Notify::new());
    let opened = Arc::clone(&gate);
    let (upstream, _server) = server(move |stream| {
        let gate = Arc::clone(&gate);
        async move {
            gate.notified().await;
            well(stream).await;
        }
    })
    .await;
    let mut spec = spec(upstream);
    spec.failures_max = 1;
    let served = Served::new(spec).await;
    served.proxy.note_probe(false);
    assert!(served.get().await.starts_with("HTTP/1.1 503"));
    served.proxy.note_probe(true);
    let address = served.address;
    let first = tokio::spawn(async move { ask(address, GET.as_bytes()).await });
    served.until(|proxy| proxy.in_hand() == 1).await;
    assert!(
        served.get().await.starts_with("HTTP/1.1 503"),
        "a second one beside it"
    );
    opened.notify_one();
    assert!(first.await.unwrap().ends_with("ok"));
    opened.notify_one();
    assert!(served.get().await.ends_with("ok"));
    served.finish().await;
}

#[tokio::test]
async fn retries_are_within_their_share_and_only_of_what_may_be_asked_twice() {
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&asked);
    // Reads the request and closes: it may have been done.
    let (upstream, _server) = server(move |mut stream| {
        let asked = Arc::clone(&counted);
        async move {
            if head(&mut stream).await.is_some() {
                asked.fetch_add(1, Ordering::SeqCst);
            }
        }
    })
    .await;
    let served = Served::new(spec(upstream)).await;
    let post = "POST / HTTP/1.1\r\nHost: kv\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx";
    for _ in 0..30 {
        let answer = served.ask(post).await;
        assert!(answer.starts_with("HTTP/1.1 502"), "{answer}");
    }
    assert_eq!(asked.load(Ordering::SeqCst), 30, "a write was asked twice");
    for _ in 0..70 {
        assert!(served.get().await.starts_with("HTTP/1.1 502"));
    }
    assert_eq!(served.proxy.counts().retries, 10);
    assert_eq!(asked.load(Ordering::SeqCst), 110);
    served.finish().await;
}

#[tokio::test]
async fn a_body_of_unknown_length_is_passed_on_whatever_the_method() {
    let (upstream, _server) = server(|mut stream| async move {
        let head = head(&mut stream).await.unwrap().to_lowercase();
        let mut body = Vec::new();
        while head.contains("transfer-encoding: chunked") && !body.ends_with(b"0\r\n\r\n") {
            body.push(stream.read_u8().await.unwrap());
        }
        let answer = format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        );
        stream.write_all(answer.as_bytes()).await.unwrap();
        stream.write_all(&body).await.unwrap();
    })
    .await;
    let served = Served::new(spec(upstream)).await;
    for method in ["GET", "POST"] {
        let request = format!(
            "{method} /_search HTTP/1.1\r\nHost: kv\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nquery\r\n0\r\n\r\n"
        );
        let answer = served.ask(&request).await;
        assert!(answer.ends_with("5\r\nquery\r\n0\r\n\r\n"), "{method}: {answer}");
    }
    served.finish().await;
}

#[tokio::test]
async fn a_service_that_never_answers_costs_a_client_so_long_and_no_longer() {
    let (upstream, _server) = server(|mut stream| async move {
        drop(head(&mut stream).await);
        std::future::pending::<()>().await;
    })
    .await;
    let mut spec = spec(upstream);
    spec.response_timeout = Duration::from_millis(50);
    let served = Served::new(spec).await;
    let answer = served.get().await;
    assert!(answer.starts_with("HTTP/1.1 504"), "{answer}");
    assert_eq!(served.proxy.counts().retries, 0);
    served.finish().await;
}

#[tokio::test]
async fn a_slow_client_holds_neither_head_nor_body_nor_silence() {
    let (upstream, _server) = server(well).await;
    let mut spec = spec(upstream);
    spec.header_timeout = Duration::from_millis(50);
    let served = Served::new(spec).await;
    let answer = served.ask("GET / HTTP/1.1\r\nHost: ").await;
    assert!(!answer.contains("200"), "{answer}");
    served.finish().await;
    // A body that never ends; the server waits for it.
    let (upstream, _server) = server(|mut stream| async move {
        let mut all = Vec::new();
        drop(stream.read_to_end(&mut all).await);
    })
    .await;
    let mut short = self::spec(upstream);
    (short.response_timeout, short.failures_max) = (Duration::from_millis(200), 1);
    let served = Served::new(short).await;
    let answer = served
        .ask("POST / HTTP/1.1\r\nHost: kv\r\nContent-Length: 9\r\n\r\nx")
        .await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    served.until(|proxy| proxy.in_hand() == 0).await;
    assert_eq!(
        served.proxy.circuit(),
        Circuit::Closed,
        "one slow client shut the door for all"
    );
    // Bytes both ways: silence of both ends them.
    let (upstream, _server) = server(|stream| async move {
        let _open = stream;
        std::future::pending::<()>().await;
    })
    .await;
    let mut silent = self::spec(upstream);
    (silent.mode, silent.idle_timeout) = (Mode::Tcp, Duration::from_millis(50));
    let served = Served::new(silent).await;
    assert_eq!(served.ask("hello").await, "");
    served.until(|proxy| proxy.in_hand() == 0).await;
}

#[tokio::test]
async fn one_connection_too_many_is_told_so() {
    let (upstream, _server) = server(well).await;
    let mut spec = spec(upstream);
    spec.connections_max = 2;
    let served = Served::new(spec).await;
    let idle = [
        TcpStream::connect(served.address).await.unwrap(),
        TcpStream::connect(served.address).await.unwrap(),
    ];
    let answer = served.get().await;
    assert!(
        answer.starts_with("HTTP/1.1 503") && answer.contains("Retry-After"),
        "{answer}"
    );
    assert_eq!(served.proxy.counts().crowded, 1);
    drop(idle);
    // Their places are free as soon as the proxy has seen them go.
    let again = async { while !served.get().await.ends_with("ok") {} };
    timeout(LONG, again).await.unwrap();
    served.finish().await;
}

#[tokio::test]
async fn requests_wait_while_the_service_restarts_and_are_answered_by_the_new_process() {
    let (upstream, kept) = nobody();
    let served = Served::new(spec(upstream)).await;
    served.proxy.hold();
    let address = served.address;
    let waiting: Vec<_> = (0..5)
        .map(|_| tokio::spawn(async move { ask(address, GET.as_bytes()).await }))
        .collect();
    served.until(|proxy| proxy.counts().held == 5).await;
    let proxy = Arc::clone(&served.proxy);
    let up = tokio::spawn(async move { proxy.release_when_up().await });
    let listener = kept.listen(64).unwrap();
    let _server = tokio::spawn(serve(listener, well));
    for request in waiting {
        assert!(request.await.unwrap().ends_with("ok"));
    }
    up.await.unwrap();
    assert!(!served.proxy.is_holding());
    assert_eq!(served.proxy.counts().failed, 0);
    served.finish().await;
}

#[tokio::test]
async fn nobody_is_held_back_longer_than_the_hold() {
    let (upstream, _kept) = nobody();
    let mut spec = spec(upstream);
    (spec.hold, spec.retry_percent) = (Duration::from_millis(50), 0);
    let served = Served::new(spec).await;
    served.proxy.hold();
    let answer = served.get().await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    timeout(LONG, served.proxy.release_when_up()).await.unwrap();
    served.finish().await;
}

#[tokio::test]
async fn a_service_that_ends_again_and_again_holds_a_request_no_longer_than_once() {
    let (upstream, _kept) = nobody();
    let mut spec = spec(upstream);
    (spec.hold, spec.retry_percent) = (Duration::from_millis(50), 0);
    let served = Served::new(spec).await;
    served.proxy.hold();
    let address = served.address;
    let request = tokio::spawn(async move { ask(address, GET.as_bytes()).await });
    let crashes = async {
        while !request.is_finished() {
            served.proxy.hold();
            tokio::task::yield_now().await;
        }
    };
    timeout(LONG, crashes).await.unwrap();
    assert!(request.await.unwrap().starts_with("HTTP/1.1 503"));
    served.finish().await;
}

#[tokio::test]
async fn connections_pass_both_ways_and_are_drained_as_a_whole() {
    let (upstream, _server) = server(|mut stream| async move {
        let (mut read, mut write) = stream.split();
        drop(tokio::io::copy(&mut read, &mut write).await);
    })
    .await;
    let mut spec = spec(upstream);
    spec.mode = Mode::Tcp;
    let served = Served::new(spec).await;
    let mut client = TcpStream::connect(served.address).await.unwrap();
    client.write_all(b"one").await.unwrap();
    let mut read = [0; 3];
    client.read_exact(&mut read).await.unwrap();
    let proxy = Arc::clone(&served.proxy);
    let drain = tokio::spawn(async move { proxy.drain(1).await });
    served.until(Proxy::is_draining).await;
    assert_eq!(served.ask("two").await, "", "a new one is closed");
    client.write_all(b"six").await.unwrap();
    client.read_exact(&mut read).await.unwrap();
    assert_eq!(&read, b"six", "the one in hand goes on");
    drop(client);
    assert_eq!(timeout(LONG, drain).await.unwrap().unwrap().left, 0);
    served.finish().await;
}

#[tokio::test]
async fn a_dead_upstream_closes_a_connection_at_once_and_is_tried_again_within_the_share() {
    let (upstream, _kept) = nobody();
    let mut spec = spec(upstream);
    spec.mode = Mode::Tcp;
    let served = Served::new(spec).await;
    for _ in 0..20 {
        assert_eq!(served.ask("x").await, "");
    }
    let counts = served.proxy.counts();
    assert_eq!((counts.failed, counts.retries), (20, 2));
    served.finish().await;
}
