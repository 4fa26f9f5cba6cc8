//! As much of the protocol of Redis (RESP 2, redis.io, "Redis serialization protocol specification") as is asked here.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use tokio::io::{
    AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader,
};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::RedisError;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A socket file.
    Unix(PathBuf),
    /// `HOST:PORT`.
    Tcp(String),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(path) = text.strip_prefix("unix:") {
            return match PathBuf::from(path) {
                path if path.is_absolute() => Ok(Self::Unix(path)),
                _ => Err(format!("`{text}` is no absolute path after `unix:`")),
            };
        }
        match text.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0) => {
                Ok(Self::Tcp(text.to_owned()))
            }
            _ => Err(format!("`{text}` is neither `unix:/PATH` nor `HOST:PORT`")),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(text) => f.write_str(text),
        }
    }
}

impl Address {
    /// The TCP port; `None` for a socket file.
    pub fn tcp_port(&self) -> Option<u16> {
        match self {
            Self::Unix(_) => None,
            Self::Tcp(text) => text.rsplit_once(':')?.1.parse().ok(),
        }
    }
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// A text, simple or with its length before it; bytes that are no UTF-8 are replaced.
    Text(String),
    /// A whole number.
    Integer(i64),
    /// Nothing: no such key.
    Nil,
    /// The server's error, its code first.
    Error(String),
    /// A list; at most 100 000 values are read.
    List(Vec<Value>),
}

impl Value {
    /// What it is, with nothing of what is in it: that is a user's.
    pub(super) fn kind(&self) -> String {
        match self {
            Self::Text(text) if text.is_empty() => "an empty text".to_owned(),
            Self::Text(_) => "a text".to_owned(),
            Self::Integer(..=0) => "a whole number that is not above 0".to_owned(),
            Self::Integer(_) => "a whole number".to_owned(),
            Self::Nil => "nothing".to_owned(),
            Self::List(list) => format!("a list of {}", list.len()),
            Self::Error(words) => {
                // The code alone: a script's error may hold values.
                let code = words.split(' ').next().unwrap_or_default();
                let plain = code.len() <= 32 && code.bytes().all(|byte| byte.is_ascii_uppercase());
                format!("the error {}", if plain { code } else { "of a script" })
            }
        }
    }
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// One connection.
pub struct Client {
    address: Address,
    stream: BufReader<Box<dyn Stream>>,
    limit: Duration,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

/// What a server that answers says to a `PING`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pinged {
    /// `PONG`: it serves.
    Pong,
    /// `LOADING`: it reads its data, and will serve.
    Loading(String),
    /// It has as many clients as it may (`maxclients`).
    NoPlace(String),
    /// It is there and refuses: `NOAUTH`, `WRONGPASS`, `MISCONF`, `BUSY` or another error, in its own words.
    Refused(String),
}

/// Asks a server whether it serves, as a new client would: connects, says the password, where there is one, then `PING`.
///
/// # Errors
/// [`RedisError::Unreachable`] when nobody is there, nothing comes within `limit` (for each of the three), or what comes is no RESP.
pub async fn ping(address: &Address, password: Option<&str>, limit: Duration) -> Result<Pinged, RedisError> {
    let mut client = Client::open(address, None, limit).await?;
    if let Some(password) = password {
        match client.ask(&["AUTH", password]).await? {
            Value::Error(words) => return Ok(refusal(words)),
            Value::Text(_) => {}
            other => return Ok(Pinged::Refused(format!("AUTH is answered by {}", other.kind()))),
        }
    }
    Ok(match client.ask(&["PING"]).await? {
        Value::Text(text) if text == "PONG" => Pinged::Pong,
        Value::Error(words) => refusal(words),
        other => Pinged::Refused(format!("PING is answered by {}", other.kind())),
    })
}

/// What an error to `AUTH` or `PING` means. None of them repeats a password.
fn refusal(words: String) -> Pinged {
    match words.split(' ').next() {
        Some("LOADING") => Pinged::Loading(words),
        _ if words.contains("max number of clients") => Pinged::NoPlace(words),
        _ => Pinged::Refused(words),
    }
}

impl Client {
    /// Connects and says the password, where there is one; each answer may take `limit`.
    ///
    /// # Errors
    /// [`RedisError::Unreachable`] when nobody answers in time, [`RedisError::Refused`] for another password.
    pub async fn open(
        address: &Address,
        password: Option<&str>,
        limit: Duration,
    ) -> Result<Self, RedisError> {
        let connecting = async {
            Ok::<Box<dyn Stream>, std::io::Error>(match address {
                Address::Unix(path) => Box::new(UnixStream::connect(path).await?),
                Address::Tcp(text) => Box::new(TcpStream::connect(text.as_str()).await?),
            })
        };
        let unreachable = |source| RedisError::Unreachable {
            address: address.to_string(),
            source,
        };
        let stream = timeout(limit, connecting)
            .await
            .map_err(|_late| unreachable(std::io::ErrorKind::TimedOut.into()))?
            .map_err(unreachable)?;
        let mut client = Self {
            address: address.clone(),
            stream: BufReader::new(stream),
            limit,
        };
        if let Some(password) = password {
            client.text(&["AUTH", password]).await?;
        }
        Ok(client)
    }

    /// One command and its answer, an error of the server among them.
    ///
    /// # Errors
    /// [`RedisError::Unreachable`] when no whole answer comes in time.
    pub async fn ask(&mut self, command: &[&str]) -> Result<Value, RedisError> {
        let mut request = format!("*{}\r\n", command.len());
        for word in command {
            request.extend(["$", &word.len().to_string(), "\r\n", word, "\r\n"]);
        }
        let failed = |source| RedisError::Unreachable {
            address: self.address.to_string(),
            source,
        };
        let stream = &mut self.stream;
        let exchange = async {
            let sent = async {
                stream.write_all(request.as_bytes()).await?;
                stream.flush().await
            };
            let sent = sent.await;
            match read(stream, 0).await {
                // One client too many is told so and cut off at once, which sending may find before reading does.
                Err(error) => Err(sent.err().unwrap_or(error)),
                answer => answer,
            }
        };
        timeout(self.limit, exchange)
            .await
            .unwrap_or_else(|_late| Err(std::io::ErrorKind::TimedOut.into()))
            .map_err(failed)
    }

    /// The same where only a text is an answer. The words of a command are not repeated in the error: they may be a password.
    pub(super) async fn text(&mut self, command: &[&str]) -> Result<String, RedisError> {
        let refused = |detail: String| RedisError::Refused {
            command: command.first().copied().unwrap_or_default().to_owned(),
            detail,
        };
        match self.ask(command).await? {
            Value::Text(text) => Ok(text),
            Value::Error(words) => Err(refused(words)),
            other => Err(refused(format!("it is answered by {}", other.kind()))),
        }
    }
}

/// Reads one value. Lists may be nested a few times, and no text is longer than 16 MiB.
async fn read(stream: &mut BufReader<Box<dyn Stream>>, depth: u8) -> std::io::Result<Value> {
    let bad = || std::io::Error::new(std::io::ErrorKind::InvalidData, "not the protocol of Redis");
    let mut line = Vec::new();
    (&mut *stream).take(LINE_MAX).read_until(b'\n', &mut line).await?;
    let line = line.strip_suffix(b"\r\n").ok_or_else(bad)?;
    let line = std::str::from_utf8(line).map_err(|_not_utf8| bad())?;
    let (kind, rest) = line.split_at_checked(1).ok_or_else(bad)?;
    let number = || rest.parse::<i64>().map_err(|_no_number| bad());
    match kind {
        "+" => Ok(Value::Text(rest.to_owned())),
        "-" => Ok(Value::Error(rest.to_owned())),
        ":" => Ok(Value::Integer(number()?)),
        "$" | "*" if number()? < 0 => Ok(Value::Nil),
        "$" => {
            let length = usize::try_from(number()?)
                .ok()
                .filter(|length| *length <= TEXT_MAX)
                .ok_or_else(bad)?;
            let mut text = vec![0; length + 2];
            stream.read_exact(&mut text).await?;
            text.truncate(length);
            Ok(Value::Text(String::from_utf8_lossy(&text).into_owned()))
        }
        "*" if depth < 4 => {
            let mut list = Vec::new();
            for _ in 0..number()?.min(LIST_MAX) {
                list.push(Box::pin(read(stream, depth + 1)).await?);
            }
            Ok(Value::List(list))
        }
        _ => Err(bad()),
    }
}

/// The words of a line: separated by spaces, `"…"` and `'…'` hold them together, `\` takes the next letter as it is within `"…"`.
pub(super) fn words(line: &str) -> Option<Vec<String>> {
    let mut words = Vec::new();
    let mut letters = line.trim().chars().peekable();
    while letters.peek().is_some() {
        let mut word = String::new();
        let mut quote = None;
        loop {
            match (letters.next(), quote) {
                (None, None) => break,
                (None, Some(_)) => return None,
                (Some(letter), Some(open)) if letter == open => quote = None,
                (Some('\\'), Some('"')) => word.push(letters.next()?),
                (Some(letter @ ('"' | '\'')), None) => quote = Some(letter),
                (Some(letter), None) if letter.is_whitespace() => break,
                (Some(letter), _) => word.push(letter),
            }
        }
        while letters.next_if(|letter| letter.is_whitespace()).is_some() {}
        words.push(word);
    }
    Some(words)
}

const LINE_MAX: u64 = 64 << 10;
const TEXT_MAX: usize = 16 << 20;
const LIST_MAX: i64 = 100_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_split_as_redis_cli_splits_them() {
        let split = |line| words(line).unwrap();
        assert_eq!(split("exists a"), ["exists", "a"]);
        assert_eq!(
            split(r#"eval "return redis.call('get','a') == '1'"  0"#),
            ["eval", "return redis.call('get','a') == '1'", "0"]
        );
        assert_eq!(split(r#"get "a \" b" ''"#), ["get", "a \" b", ""]);
        assert_eq!(words("get 'a"), None);
    }

    #[test]
    fn what_an_answer_is_tells_nothing_of_what_is_in_it() {
        let secret = || "4711 secret".to_owned();
        for value in [
            Value::Text(secret()),
            Value::Error(secret()),
            Value::Integer(4_711),
            Value::List(vec![Value::Text(secret())]),
        ] {
            let words = value.kind();
            assert!(!words.contains("secret") && !words.contains("4711"), "{words}");
        }
        let wrong = Value::Error("WRONGTYPE Operation against secret".to_owned());
        assert_eq!(wrong.kind(), "the error WRONGTYPE");
    }

    #[test]
    fn addresses_are_checked() {
        assert_eq!(
            "unix:/run/r.sock".parse(),
            Ok(Address::Unix("/run/r.sock".into()))
        );
        assert_eq!("[::1]:6379".parse(), Ok(Address::Tcp("[::1]:6379".to_owned())));
        for bad in ["unix:r.sock", "6379", "host:0", "host:99999", ":1", ""] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn answers_are_read_and_what_is_none_is_refused() {
        let read_all = |bytes: &'static [u8]| async move {
            let (mut ours, theirs) = tokio::io::duplex(1 << 16);
            ours.write_all(bytes).await.unwrap();
            drop(ours);
            let boxed: Box<dyn Stream> = Box::new(theirs);
            read(&mut BufReader::new(boxed), 0).await
        };
        let list = read_all(b"*3\r\n$2\r\nab\r\n:-7\r\n$-1\r\n").await.unwrap();
        let ab = Value::Text("ab".to_owned());
        assert_eq!(list, Value::List(vec![ab, Value::Integer(-7), Value::Nil]));
        assert_eq!(
            read_all(b"-ERR x\r\n").await.unwrap(),
            Value::Error("ERR x".to_owned())
        );
        for bad in [
            &b"HTTP/1.1 400\r\n"[..],
            b"$99999999999\r\n",
            b":x\r\n",
            b"+cut",
            b"$5\r\nab",
            b"*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n:1\r\n",
        ] {
            assert!(read_all(bad).await.is_err());
        }
    }
}
