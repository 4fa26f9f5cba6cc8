//! One question to a service on this host: a bounded HTTP GET, or `select 1` over a PostgreSQL server's Unix socket.
//!
//! A probe asks on a new connection, as a client would: the kernel accepts connections for a hung process, so only an
//! answer proves that somebody is there. What is read is bounded and never interpreted beyond its status.

use std::fmt;
use std::os::unix::fs::MetadataExt as _;
use std::str::FromStr;
use std::time::Duration;

use theriac_heal::postgres::PostgresError;
use theriac_heal::postgres::owner::Owner;
use theriac_heal::postgres::session::{Session, Target};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Most bytes of an answer's head that are read, in bytes.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// What a service is asked, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// `http://HOST:PORT/PATH`.
    Http(ProbeUrl),
    /// `postgresql://ROLE@/SOCKET_DIR:PORT/DATABASE`.
    Postgres(Target),
}

impl Probe {
    /// The TCP port that is asked; `None` for a Unix socket.
    pub fn tcp_port(&self) -> Option<u16> {
        match self {
            Self::Http(url) => crate::config::host_and_port(&url.authority).map(|(_, port)| port),
            Self::Postgres(_) => None,
        }
    }
}

impl FromStr for Probe {
    type Err = ProbeUrlError;

    fn from_str(url: &str) -> Result<Self, Self::Err> {
        let wrong = |reason| ProbeUrlError {
            url: url.to_owned(),
            reason,
        };
        let Some(rest) = url.strip_prefix("postgresql://") else {
            return url.parse().map(Self::Http);
        };
        let (user, rest) = rest
            .split_once('@')
            .ok_or_else(|| wrong("the role is missing: postgresql://ROLE@/SOCKET_DIR:PORT/DATABASE"))?;
        let parts = rest
            .rsplit_once('/')
            .and_then(|(place, database)| Some((place.rsplit_once(':')?, database)));
        let Some(((socket_dir, port), database)) = parts else {
            return Err(wrong(
                "the port or the database is missing: …/SOCKET_DIR:PORT/DATABASE",
            ));
        };
        let port = port.parse().map_err(|_| wrong("the port is no number"))?;
        if !socket_dir.starts_with('/') || user.is_empty() || database.is_empty() || port == 0 {
            return Err(wrong(
                "a server is asked over the directory of its Unix socket, an absolute path",
            ));
        }
        Ok(Self::Postgres(Target {
            socket_dir: socket_dir.into(),
            port,
            user: user.to_owned(),
            database: database.to_owned(),
        }))
    }
}

/// Asks. Whether the answer is a good one, and what it was.
///
/// # Errors
/// [`ProbeError`] when there is none within `timeout`.
pub async fn ask(probe: &Probe, timeout: Duration) -> Result<(bool, String), ProbeError> {
    match probe {
        Probe::Http(url) => {
            let code = status(url, timeout).await?;
            Ok(((200..=299).contains(&code), format!("status {code}")))
        }
        Probe::Postgres(target) => {
            let asked = async {
                // Whoever made the socket is who the server runs as, and so whom `peer` lets in.
                let made = std::fs::metadata(target.socket())?;
                let owner = Owner {
                    uid: made.uid(),
                    gid: made.gid(),
                };
                let session = Session::open(target, Some(owner), timeout).await?;
                session.execute("the probe", "select 1").await?;
                Ok((true, "it answers select 1".to_owned()))
            };
            tokio::time::timeout(timeout, asked)
                .await
                .map_err(|_| ProbeError::TimedOut(timeout))?
        }
    }
}

/// `http://HOST:PORT/PATH`, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeUrl {
    /// Host and port as written, for the `Host` header and for connecting.
    authority: String,
    /// Path with query, starting with `/`.
    path: String,
}

/// Why a text is no [`ProbeUrl`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{url}` is no probe address: {reason}; write http://HOST:PORT/PATH or postgresql://ROLE@/SOCKET_DIR:PORT/DATABASE"
)]
pub struct ProbeUrlError {
    url: String,
    reason: &'static str,
}

impl ProbeUrl {
    /// An address made of a socket address and a path.
    pub fn new(address: std::net::SocketAddr, path: &str) -> Self {
        Self {
            authority: address.to_string(),
            path: path.to_owned(),
        }
    }
}

impl FromStr for ProbeUrl {
    type Err = ProbeUrlError;

    fn from_str(url: &str) -> Result<Self, Self::Err> {
        let wrong = |reason| ProbeUrlError {
            url: url.to_owned(),
            reason,
        };
        let rest = url
            .strip_prefix("http://")
            .ok_or_else(|| wrong("only plain http is asked"))?;
        if rest.bytes().any(|b| b <= b' ' || b == 0x7f) {
            return Err(wrong("it holds a blank or a control character"));
        }
        let (authority, path) = rest.find('/').map_or((rest, "/"), |at| rest.split_at(at));
        let authority = if crate::config::host_and_port(authority).is_some() {
            authority.to_owned()
        } else {
            let with_port = format!("{authority}:80");
            crate::config::host_and_port(&with_port).ok_or_else(|| wrong("the host or the port is wrong"))?;
            with_port
        };
        Ok(Self {
            authority,
            path: path.to_owned(),
        })
    }
}

impl fmt::Display for ProbeUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}{}", self.authority, self.path)
    }
}

/// Why there was no answer. The text is evidence for an incident.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// Nothing came in time.
    #[error("no answer within {} ms", .0.as_millis())]
    TimedOut(Duration),
    /// The connection failed.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// The server let no session in, or did not answer.
    #[error(transparent)]
    Postgres(#[from] PostgresError),
    /// What came is no HTTP answer.
    #[error("the answer is not HTTP")]
    NotHttp,
    /// The answer is longer than the limit.
    #[error("the answer exceeds {0} bytes")]
    TooLong(usize),
}

impl ProbeError {
    /// Whether a PostgreSQL server said that it has no slot left for an ordinary client (`too_many_connections`).
    pub fn is_no_slot(&self) -> bool {
        matches!(self, Self::Postgres(error) if is_no_slot(error))
    }
}

/// Whether a PostgreSQL server said that it has no slot left for the one who asked (`too_many_connections`).
pub fn is_no_slot(error: &PostgresError) -> bool {
    matches!(error, PostgresError::Connect { code: Some(code), .. } if code == "53300")
}

/// Asks and returns the status code, reading no further than the status line.
///
/// # Errors
/// [`ProbeError`] when there is no HTTP status within `timeout`.
pub async fn status(url: &ProbeUrl, timeout: Duration) -> Result<u16, ProbeError> {
    let ask = async {
        let mut stream = request(url).await?;
        let mut head = Vec::with_capacity(256);
        loop {
            if let Some(line_end) = head.iter().position(|b| *b == b'\n') {
                return status_code(&head[..line_end]);
            }
            if head.len() > HEAD_BYTES_MAX {
                return Err(ProbeError::NotHttp);
            }
            if stream.read_buf(&mut head).await? == 0 {
                return Err(ProbeError::NotHttp);
            }
        }
    };
    tokio::time::timeout(timeout, ask)
        .await
        .map_err(|_| ProbeError::TimedOut(timeout))?
}

/// Asks and returns status code and body of at most `body_bytes_max` bytes.
///
/// # Errors
/// [`ProbeError`] when the answer does not come, does not end within `timeout`, or is too long.
pub async fn get(
    url: &ProbeUrl,
    timeout: Duration,
    body_bytes_max: usize,
) -> Result<(u16, Vec<u8>), ProbeError> {
    let ask = async {
        let mut stream = request(url).await?;
        let mut answer = Vec::with_capacity(4096);
        loop {
            if answer.len() > body_bytes_max + HEAD_BYTES_MAX {
                return Err(ProbeError::TooLong(body_bytes_max));
            }
            if stream.read_buf(&mut answer).await? == 0 {
                break;
            }
        }
        let head_end = answer
            .windows(4)
            .position(|w| w == b"\r\n\r\n")
            .ok_or(ProbeError::NotHttp)?;
        let line_end = answer
            .iter()
            .position(|b| *b == b'\n')
            .ok_or(ProbeError::NotHttp)?;
        let code = status_code(&answer[..line_end])?;
        Ok((code, answer.split_off(head_end + 4)))
    };
    tokio::time::timeout(timeout, ask)
        .await
        .map_err(|_| ProbeError::TimedOut(timeout))?
}

/// HTTP/1.0 on purpose: the answer ends with the connection and is never sent in chunks.
async fn request(url: &ProbeUrl) -> Result<TcpStream, ProbeError> {
    let mut stream = TcpStream::connect(&url.authority).await?;
    let text = format!(
        "GET {} HTTP/1.0\r\nHost: {}\r\nUser-Agent: theriac-edge\r\nConnection: close\r\n\r\n",
        url.path, url.authority
    );
    stream.write_all(text.as_bytes()).await?;
    Ok(stream)
}

fn status_code(line: &[u8]) -> Result<u16, ProbeError> {
    let line = std::str::from_utf8(line).map_err(|_| ProbeError::NotHttp)?;
    let mut words = line.split_ascii_whitespace();
    match (words.next(), words.next().map(str::parse)) {
        (Some(version), Some(Ok(code))) if version.starts_with("HTTP/") => Ok(code),
        _ => Err(ProbeError::NotHttp),
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    async fn server(answer: &'static [u8]) -> ProbeUrl {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = ProbeUrl::new(listener.local_addr().unwrap(), "/health");
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 512];
            let read = stream.read(&mut request).await.unwrap();
            assert!(request[..read].starts_with(b"GET /health HTTP/1.0\r\n"));
            stream.write_all(answer).await.unwrap();
        });
        url
    }

    #[test]
    fn a_server_is_named_by_role_socket_and_database() {
        let probe: Probe = "postgresql://app@/var/run/postgresql:5433/shop".parse().unwrap();
        let Probe::Postgres(target) = probe else {
            panic!("{probe:?}")
        };
        assert_eq!(
            target.socket(),
            std::path::Path::new("/var/run/postgresql/.s.PGSQL.5433")
        );
        assert_eq!((target.user.as_str(), target.database.as_str()), ("app", "shop"));
        for wrong in [
            "postgresql:///var/run/postgresql:5432/shop",
            "postgresql://app@db.example:5432/shop",
            "postgresql://app@/run/pg:0/shop",
            "postgresql://app@/run/pg:5432/",
            "postgresql://app@/run/pg",
            "ftp://host/",
        ] {
            assert!(wrong.parse::<Probe>().is_err(), "{wrong}");
        }
    }

    #[tokio::test]
    async fn reads_status_and_body() {
        let url = server(b"HTTP/1.1 204 No Content\r\n\r\n").await;
        assert_eq!(status(&url, Duration::from_secs(5)).await.unwrap(), 204);
        let url = server(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await;
        assert_eq!(
            get(&url, Duration::from_secs(5), 10).await.unwrap(),
            (200, b"{}".to_vec())
        );
    }

    #[tokio::test]
    async fn silence_times_out_and_refusal_is_an_error() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = ProbeUrl::new(listener.local_addr().unwrap(), "/");
        let error = status(&url, Duration::from_millis(30)).await.unwrap_err();
        assert!(matches!(error, ProbeError::TimedOut(_)), "{error}");
        drop(listener);
        let error = status(&url, Duration::from_secs(5)).await.unwrap_err();
        assert!(matches!(error, ProbeError::Io(_)), "{error}");
    }

    #[tokio::test]
    async fn answers_that_are_not_http_are_errors() {
        for answer in [&b"hello\n"[..], b"", b"HTTP/1.1 abc\r\n\r\n", b"\xff\xff\n"] {
            let url = server(answer).await;
            let error = status(&url, Duration::from_secs(5)).await.unwrap_err();
            assert!(matches!(error, ProbeError::NotHttp), "{error}");
        }
        let url = server(vec![b'x'; 40_000].leak()).await;
        assert!(status(&url, Duration::from_secs(5)).await.is_err());
    }

    #[test]
    fn addresses_are_checked() {
        assert_eq!(
            "http://127.0.0.1:80/a?b".parse::<ProbeUrl>().unwrap().to_string(),
            "http://127.0.0.1:80/a?b"
        );
        assert_eq!(
            "http://localhost".parse::<ProbeUrl>().unwrap().to_string(),
            "http://localhost:80/"
        );
        for bad in [
            "",
            "127.0.0.1",
            "https://a/",
            "http://",
            "http://:80/",
            "http://a:0/",
            "http://a/ b",
            "http://a/\r\nX: y",
        ] {
            assert!(bad.parse::<ProbeUrl>().is_err(), "{bad:?} was taken");
        }
    }
}
