//! One question to a service on this host: a bounded HTTP GET, `select 1` over a PostgreSQL server's Unix socket, or `PING` to a Redis server.
//!
//! A probe asks on a new connection, as a client would: the kernel accepts connections for a hung process, so only an
//! answer proves that somebody is there. What is read is bounded and never interpreted beyond its status.

use std::fmt;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use theriac_heal::checkpoint::redis::{self, Address, Pinged, RedisError};
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
    /// `redis://HOST:PORT` or `redis:///SOCKET`.
    Redis(RedisProbe),
}

/// A Redis server and where its password stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RedisProbe {
    /// Where it listens.
    pub address: Address,
    /// A file with its password, read anew at each probe; at most 4 KiB, blanks at its ends are left out.
    pub password_file: Option<PathBuf>,
}

impl Probe {
    /// Whether a loopback address of this host is asked.
    pub fn is_of_this_host(&self) -> bool {
        let host = match self {
            Self::Http(url) => crate::config::host_and_port(&url.authority).map(|(host, _)| host),
            Self::Postgres(_) => return true,
            Self::Redis(server) => match &server.address {
                Address::Unix(_) => return true,
                Address::Tcp(text) => text.rsplit_once(':').map(|(host, _)| host.to_owned()),
            },
        };
        host.is_some_and(|host| {
            let host = host.trim_start_matches('[').trim_end_matches(']');
            host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
        })
    }

    /// The TCP port that is asked; `None` for a Unix socket.
    pub fn tcp_port(&self) -> Option<u16> {
        match self {
            Self::Http(url) => crate::config::host_and_port(&url.authority).map(|(_, port)| port),
            Self::Postgres(_) => None,
            Self::Redis(server) => server.address.tcp_port(),
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
        if let Some(rest) = url.strip_prefix("redis://") {
            let address = match rest.strip_prefix('/') {
                Some(_) => format!("unix:{rest}"),
                None => rest.to_owned(),
            };
            let address = address.parse().map_err(|_| {
                wrong("a Redis server is asked at redis://HOST:PORT or redis:///SOCKET; its password stands in probe.password_file")
            })?;
            return Ok(Self::Redis(RedisProbe {
                address,
                password_file: None,
            }));
        }
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
        Probe::Redis(server) => {
            let asked = async {
                let password = server
                    .password_file
                    .as_deref()
                    .map(password)
                    .transpose()
                    .map_err(|error| {
                        ProbeError::Refused(format!("the password file cannot be read: {error}"))
                    })?;
                match redis::ping(&server.address, password.as_deref(), timeout).await? {
                    Pinged::Pong => Ok((true, "it answers PING".to_owned())),
                    Pinged::Loading(words) => Err(ProbeError::Loading(words)),
                    Pinged::NoPlace(words) => Err(ProbeError::NoPlace(words)),
                    Pinged::Refused(words) => Err(ProbeError::Refused(words)),
                }
            };
            tokio::time::timeout(timeout, asked)
                .await
                .map_err(|_| ProbeError::TimedOut(timeout))?
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

/// A password from its file.
fn password(path: &Path) -> std::io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(path)?
        .take(PASSWORD_BYTES_MAX)
        .read_to_string(&mut text)?;
    Ok(text.trim().to_owned())
}

/// Most bytes of a file with a password that are read.
const PASSWORD_BYTES_MAX: u64 = 4 << 10;

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
    "`{url}` is no probe address: {reason}; write http://HOST:PORT/PATH, postgresql://ROLE@/SOCKET_DIR:PORT/DATABASE or redis://HOST:PORT"
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
    /// The Redis server is not there, or what came is not its protocol.
    #[error(transparent)]
    Redis(#[from] RedisError),
    /// The Redis server reads its data: it starts.
    #[error("{0}")]
    Loading(String),
    /// The Redis server has as many clients as it may.
    #[error("{0}")]
    NoPlace(String),
    /// The Redis server is there and refuses.
    #[error("{0}")]
    Refused(String),
    /// What came is no HTTP answer.
    #[error("the answer is not HTTP")]
    NotHttp,
    /// The answer is longer than the limit.
    #[error("the answer exceeds {0} bytes")]
    TooLong(usize),
}

impl ProbeError {
    /// Whether the server itself said that it has no slot left for an ordinary client (`too_many_connections`, `max number of clients`).
    pub fn is_no_slot(&self) -> bool {
        matches!(self, Self::NoPlace(_)) || matches!(self, Self::Postgres(error) if is_no_slot(error))
    }

    /// Whether the server said that it starts, and will serve.
    pub fn is_loading(&self) -> bool {
        matches!(self, Self::Loading(_))
    }

    /// Whether the server answered with a refusal that no restart mends.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused(_))
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

    const LONG: Duration = Duration::from_mins(1);

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

    #[test]
    fn a_redis_server_is_named_by_port_or_socket() {
        let probe = |text: &str| text.parse::<Probe>().unwrap();
        assert_eq!(probe("redis://127.0.0.1:6379").tcp_port(), Some(6379));
        let Probe::Redis(server) = probe("redis:///run/redis/redis.sock") else {
            panic!("it is one")
        };
        assert_eq!(server.address, Address::Unix("/run/redis/redis.sock".into()));
        assert_eq!(probe("redis:///run/redis/redis.sock").tcp_port(), None);
        for wrong in [
            "redis://",
            "redis://127.0.0.1",
            "redis://:secret@h:6379/0",
            "redis://h:0",
        ] {
            let refused = wrong.parse::<Probe>().unwrap_err().to_string();
            assert!(refused.contains("probe.password_file"), "{refused}");
        }
    }

    /// A server that says one thing to whoever comes, and then closes.
    async fn says(words: &'static [u8]) -> Probe {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let probe = format!("redis://{}", listener.local_addr().unwrap())
            .parse()
            .unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(words).await.unwrap();
        });
        probe
    }

    #[tokio::test]
    async fn what_a_redis_server_answers_instead_of_pong_is_told_apart() {
        let of = |error: &ProbeError| (error.is_loading(), error.is_no_slot(), error.is_refusal());
        for (words, kind) in [
            (
                &b"-LOADING Redis is loading the dataset in memory\r\n"[..],
                (true, false, false),
            ),
            (b"-ERR max number of clients reached\r\n", (false, true, false)),
            (
                b"-MISCONF Redis is configured to save RDB snapshots\r\n",
                (false, false, true),
            ),
            (b"-NOAUTH Authentication required.\r\n", (false, false, true)),
            (b"-BUSY Redis is busy running a script.\r\n", (false, false, true)),
            (b":7\r\n", (false, false, true)),
            (b"HTTP/1.1 400 Bad Request\r\n", (false, false, false)),
            (b"", (false, false, false)),
        ] {
            let error = ask(&says(words).await, LONG).await.unwrap_err();
            assert_eq!(of(&error), kind, "{error}");
        }
        let answered = ask(&says(b"+PONG\r\n").await, LONG).await;
        assert!(answered.unwrap().0);
    }

    #[tokio::test]
    async fn reads_status_and_body() {
        let url = server(b"HTTP/1.1 204 No Content\r\n\r\n").await;
        assert_eq!(status(&url, LONG).await.unwrap(), 204);
        let url = server(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await;
        assert_eq!(get(&url, LONG, 10).await.unwrap(), (200, b"{}".to_vec()));
    }

    #[tokio::test]
    async fn silence_times_out_and_refusal_is_an_error() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = ProbeUrl::new(listener.local_addr().unwrap(), "/");
        let error = status(&url, Duration::from_millis(30)).await.unwrap_err();
        assert!(matches!(error, ProbeError::TimedOut(_)), "{error}");
        // Nobody listens there, and nobody else can begin to.
        let kept = tokio::net::TcpSocket::new_v4().unwrap();
        kept.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let url = ProbeUrl::new(kept.local_addr().unwrap(), "/");
        let error = status(&url, LONG).await.unwrap_err();
        assert!(matches!(error, ProbeError::Io(_)), "{error}");
    }

    #[tokio::test]
    async fn answers_that_are_not_http_are_errors() {
        for answer in [&b"hello\n"[..], b"", b"HTTP/1.1 abc\r\n\r\n", b"\xff\xff\n"] {
            let url = server(answer).await;
            let error = status(&url, LONG).await.unwrap_err();
            assert!(matches!(error, ProbeError::NotHttp), "{error}");
        }
        let url = server(vec![b'x'; 40_000].leak()).await;
        assert!(status(&url, LONG).await.is_err());
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
