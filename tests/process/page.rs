//! Small blocking requests to pages on loopback.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde::de::DeserializeOwned;

/// Status and body of an answer; `None` when nobody answers.
pub(crate) fn ask(method: &str, at: SocketAddr, path: &str, body: &[u8]) -> Option<(u16, Vec<u8>)> {
    let limit = Duration::from_secs(30);
    let mut stream = TcpStream::connect_timeout(&at, limit).ok()?;
    stream.set_read_timeout(Some(limit)).ok()?;
    let length = body.len();
    // HTTP/1.0: the answer ends with the connection.
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nHost: {at}\r\nContent-Length: {length}\r\n\r\n"
    )
    .ok()?;
    stream.write_all(body).ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let code = std::str::from_utf8(answer.get(9..12)?).ok()?.parse().ok()?;
    Some((code, answer.split_off(end + 4)))
}

/// The JSON of a page, when it answers well.
pub(crate) fn json<T: DeserializeOwned>(at: SocketAddr, path: &str) -> Option<T> {
    let (code, body) = ask("GET", at, path, b"")?;
    (code == 200)
        .then(|| serde_json::from_slice(&body).ok())
        .flatten()
}

/// Whether the page is there and well.
pub(crate) fn is_well(at: SocketAddr) -> bool {
    ask("GET", at, "/healthz", b"").is_some_and(|(code, _)| code == 200)
}

/// The body of a page, whatever it is.
pub(crate) fn text(at: SocketAddr, path: &str) -> String {
    let (code, body) = ask("GET", at, path, b"").expect("the page answers");
    let text = String::from_utf8(body).unwrap();
    assert_eq!(code, 200, "{path}: {text}");
    text
}
