//! The service as its clients see it, in this process; its end by signals is for tests with real processes.

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, StatusCode};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use std::net::SocketAddr;

use super::*;

struct Caller {
    addr: SocketAddr,
    client: Client<HttpConnector, Full<Bytes>>,
}

impl Caller {
    async fn of(routes: axum::Router) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, routes).await });
        Self {
            addr,
            client: Client::builder(TokioExecutor::new()).build_http(),
        }
    }

    async fn call(&self, method: Method, path: &str, body: &[u8]) -> (StatusCode, Vec<u8>) {
        let request = Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.addr))
            .body(Full::new(Bytes::copy_from_slice(body)))
            .unwrap();
        let response = self.client.request(request).await.unwrap();
        let status = response.status();
        (
            status,
            response.into_body().collect().await.unwrap().to_bytes().to_vec(),
        )
    }
}

#[tokio::test]
async fn what_was_put_is_got_and_survives_a_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let (store, writer) = Store::open(dir.path()).unwrap();
    let caller = Caller::of(http::routes(http::Asked::new(store.clone(), None))).await;
    assert_eq!(
        caller.call(Method::GET, "/kv/a", b"").await.0,
        StatusCode::NOT_FOUND
    );
    assert_eq!(
        caller.call(Method::PUT, "/kv/a", b"one").await.0,
        StatusCode::NO_CONTENT
    );
    assert_eq!(
        caller.call(Method::GET, "/kv/a", b"").await,
        (StatusCode::OK, b"one".to_vec())
    );
    assert_eq!(caller.call(Method::GET, "/healthz", b"").await.0, StatusCode::OK);
    let (_, stats) = caller.call(Method::GET, "/stats", b"").await;
    assert_eq!(
        serde_json::from_slice::<serde_json::Value>(&stats).unwrap()["keys"],
        1
    );
    // As after kill -9: nobody said goodbye, and what was acknowledged is there.
    assert_eq!(state::read(dir.path()).unwrap().table["a"], b"one");
    drop((store, caller, writer));
}

#[tokio::test]
async fn many_writes_at_once_are_all_durable() {
    let dir = tempfile::tempdir().unwrap();
    let (store, writer) = Store::open(dir.path()).unwrap();
    let mut writes = tokio::task::JoinSet::new();
    for n in 0..300 {
        let store = store.clone();
        writes.spawn(async move { store.put(format!("key-{n}"), vec![1; 100]).await });
    }
    while let Some(done) = writes.join_next().await {
        assert_eq!(done.unwrap(), Ok(()));
    }
    assert_eq!(state::read(dir.path()).unwrap().table.len(), 300);
    drop(store);
    tokio::task::spawn_blocking(move || writer.join())
        .await
        .unwrap()
        .unwrap();
    assert!(Store::open(dir.path()).is_ok(), "the writer let go of the state");
}

#[tokio::test]
async fn refuses_keys_and_values_out_of_bounds() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _writer) = Store::open(dir.path()).unwrap();
    let caller = Caller::of(http::routes(http::Asked::new(store, None))).await;
    let long = format!("/kv/{}", "k".repeat(129));
    for path in [long.as_str(), "/kv/a%20b", "/kv/%2e%2e%2fx"] {
        assert_eq!(
            caller.call(Method::PUT, path, b"x").await.0,
            StatusCode::BAD_REQUEST,
            "{path}"
        );
    }
    let big = vec![0; (64 << 10) + 1];
    assert_eq!(
        caller.call(Method::PUT, "/kv/a", &big).await.0,
        StatusCode::PAYLOAD_TOO_LARGE
    );
    assert_eq!(
        caller.call(Method::PUT, "/kv/a", &big[1..]).await.0,
        StatusCode::NO_CONTENT
    );
}

#[tokio::test]
async fn faults_are_refused_beyond_their_bounds() {
    let caller = Caller::of(http::control_routes(fault::Faults::default())).await;
    for path in [
        "/fault/leak",
        "/fault/leak?mib_per_s=0",
        "/fault/leak?mib_per_s=100000",
        "/fault/cpu?threads=x",
    ] {
        assert_eq!(
            caller.call(Method::POST, path, b"").await.0,
            StatusCode::BAD_REQUEST,
            "{path}"
        );
    }
}

#[tokio::test]
async fn check_tells_good_corrupt_and_unreadable_apart() {
    let dir = tempfile::tempdir().unwrap();
    let check = |state: PathBuf| {
        run(Args {
            command: Some(Command::Check { state }),
            listen: None,
            state: None,
            control: None,
            upstream: None,
            memory_max_mib: None,
        })
    };
    let (store, writer) = Store::open(dir.path()).unwrap();
    store.put("a".to_owned(), vec![1; 100]).await.unwrap();
    assert!(
        check(dir.path().to_owned()).await.is_ok(),
        "also while it is served"
    );
    drop(store);
    tokio::task::spawn_blocking(move || writer.join())
        .await
        .unwrap()
        .unwrap();
    let log = dir.path().join("log-0");
    let mut bytes = std::fs::read(&log).unwrap();
    bytes[50] ^= 1;
    std::fs::write(&log, bytes).unwrap();
    let corrupt = check(dir.path().to_owned()).await.unwrap_err();
    assert_eq!(corrupt.exit_code(), 1);
    assert!(corrupt.to_string().contains("checksum") && corrupt.to_string().contains("Restore a checkpoint"));
    assert_eq!(
        check(dir.path().join("nowhere")).await.unwrap_err().exit_code(),
        75
    );
    let serve = Args {
        command: None,
        listen: Some("127.0.0.1:0".parse().unwrap()),
        state: Some(dir.path().to_owned()),
        control: None,
        upstream: None,
        memory_max_mib: None,
    };
    assert_eq!(run(serve).await.unwrap_err().exit_code(), 3);
}
