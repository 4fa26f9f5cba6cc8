//! Another system is told of an incident by one signed request, and does what it does: a webhook.
//!
//! | | |
//! |---|---|
//! | precondition | the class is one for which the webhook is configured, and the policy allows it |
//! | effect | the receiver's |
//! | undo | the receiver's |
//! | verified by | the service, as after any other action; an answer of 2xx only says that the receiver took it |
//!
//! `POST` of a small JSON body with
//! - `Idempotency-Key: NODE-INTENT-DECIDED`, the same in every repetition: a receiver that has seen it answers 2xx and does nothing. DECIDED is
//!   in milliseconds since the Unix epoch, since the numbers of intents begin anew when the edge's store is lost;
//! - `Theriac-Timestamp: MILLISECONDS` since the Unix epoch, and
//! - `Theriac-Signature: sha256=HEX`, HMAC-SHA256 (RFC 2104) with the shared secret over timestamp, `.`, key, `.`, body. The receiver
//!   refuses old timestamps; a recorded request is then worth nothing.
//!
//! It is plain HTTP, so the body holds names, numbers of records, the class of trouble and fixed words for it, and nothing that was measured
//! or that a check, a client or the output said. What matters, that nobody else can ask, is in the signature.
//! Repeated are only requests of which it is not known whether they arrived, 429 and 5xx; at most `attempts` times, each later than the last.

use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use data_encoding::HEXLOWER;
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::hook::Called;

/// Who is told, and how.
#[derive(Clone, PartialEq, Eq)]
pub struct Webhook {
    /// Where.
    pub url: WebhookUrl,
    /// Shared with the receiver; at least [`SECRET_BYTES_MIN`] bytes.
    pub secret: Vec<u8>,
    /// Distinguishes this node in idempotency keys: letters, digits, `-`, `_`, `.`.
    pub node: String,
    /// Longest time for one attempt.
    pub timeout: Duration,
    /// Most attempts.
    pub attempts: u32,
    /// Time before the second attempt; twice that before the third, and so on.
    pub pause: Duration,
}

impl std::fmt::Debug for Webhook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Webhook")
            .field("url", &self.url)
            .field("secret", &"[redacted]")
            .finish_non_exhaustive()
    }
}

/// `http://HOST:PORT/PATH`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebhookUrl {
    authority: String,
    path: String,
}

/// Why nobody was told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WebhookError {
    /// It is no address.
    #[error("`{0}` is no address of a webhook: write http://HOST:PORT/PATH")]
    Url(String),
    /// The receiver refused it; repeating would change nothing.
    #[error("the receiver answered {status}: {said}")]
    Refused {
        /// The status.
        status: u16,
        /// The beginning of its answer.
        said: String,
    },
    /// No attempt arrived for certain.
    #[error("nobody answered in {attempts} attempts, the last time: {last}")]
    Unreachable {
        /// Attempts made.
        attempts: u32,
        /// What the last one met.
        last: String,
    },
}

impl FromStr for WebhookUrl {
    type Err = WebhookError;

    fn from_str(url: &str) -> Result<Self, Self::Err> {
        let wrong = || WebhookError::Url(url.to_owned());
        let rest = url.strip_prefix("http://").ok_or_else(wrong)?;
        let (authority, path) = rest.find('/').map_or((rest, "/"), |at| rest.split_at(at));
        let port = authority.rsplit_once(':').and_then(|(host, port)| {
            let port: u16 = port.parse().ok()?;
            (!host.is_empty() && port != 0).then_some(port)
        });
        // Nothing that could end a line of the request.
        if port.is_none() || rest.bytes().any(|byte| !byte.is_ascii_graphic()) {
            return Err(wrong());
        }
        Ok(Self {
            authority: authority.to_owned(),
            path: path.to_owned(),
        })
    }
}

#[derive(Serialize)]
struct Body<'a> {
    node: &'a str,
    service: &'a str,
    incident: u64,
    intent: u64,
    class: &'static str,
    reason: &'static str,
}

impl Webhook {
    /// Tells the receiver. What it answered, in words.
    ///
    /// # Errors
    /// [`WebhookError`]
    pub async fn send(&self, called: &Called) -> Result<String, WebhookError> {
        let key = format!("{}-{}-{}", self.node, called.intent, called.decided_unix_ms);
        let body = serde_json::to_string(&Body {
            node: &self.node,
            service: &called.service,
            incident: called.incident,
            intent: called.intent,
            class: called.class.as_str(),
            reason: called.class.words(),
        })
        .unwrap_or_default();
        let mut last = String::new();
        for attempt in 1..=self.attempts.max(1) {
            if attempt > 1 {
                sleep(self.pause * 2_u32.saturating_pow(attempt - 2)).await;
            }
            match timeout(self.timeout, self.once(&key, &body)).await {
                Ok(Ok((200..=299, _))) => return Ok(format!("the receiver took it at attempt {attempt}")),
                Ok(Ok((status @ (429 | 500..=599), said))) => last = format!("status {status}: {said}"),
                Ok(Ok((status, said))) => return Err(WebhookError::Refused { status, said }),
                Ok(Err(error)) => last = error.to_string(),
                Err(_late) => last = format!("no answer within {:?}", self.timeout),
            }
        }
        Err(WebhookError::Unreachable {
            attempts: self.attempts.max(1),
            last,
        })
    }

    async fn once(&self, key: &str, body: &str) -> std::io::Result<(u16, String)> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let at = since.as_millis().to_string();
        let signed = [at.as_bytes(), b".", key.as_bytes(), b".", body.as_bytes()].concat();
        let signature = HEXLOWER.encode(&hmac(&self.secret, &signed));
        let mut stream = TcpStream::connect(&self.url.authority).await?;
        let request = format!(
            "POST {} HTTP/1.1\r\nHost: {}\r\nUser-Agent: theriac\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\nIdempotency-Key: {key}\r\nTheriac-Timestamp: {at}\r\nTheriac-Signature: sha256={signature}\r\n\r\n{body}",
            self.url.path,
            self.url.authority,
            body.len()
        );
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).await?;
        let text = String::from_utf8_lossy(&answer);
        let status = text
            .strip_prefix("HTTP/1.")
            .and_then(|rest| rest.get(2..5)?.parse().ok())
            .ok_or_else(|| std::io::Error::other("the answer is not HTTP"))?;
        let said = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        let said = said.chars().filter(|c| !c.is_control()).take(200).collect();
        Ok((status, said))
    }
}

/// The longest time that all attempts and the pauses between them take.
pub fn longest(timeout: Duration, attempts: u32, pause: Duration) -> Duration {
    let attempts = attempts.max(1);
    let pauses = 2_u32.saturating_pow(attempts - 1) - 1;
    timeout
        .saturating_mul(attempts)
        .saturating_add(pause.saturating_mul(pauses))
}

/// HMAC-SHA256 (RFC 2104).
pub fn hmac(key: &[u8], message: &[u8]) -> [u8; 32] {
    let mut block = [0_u8; 64];
    if key.len() > block.len() {
        block[..32].copy_from_slice(&Sha256::digest(key));
    } else {
        block[..key.len()].copy_from_slice(key);
    }
    let padded = |with: u8| block.map(|byte| byte ^ with);
    let inner = Sha256::new()
        .chain_update(padded(0x36))
        .chain_update(message)
        .finalize();
    Sha256::new()
        .chain_update(padded(0x5c))
        .chain_update(inner)
        .finalize()
        .into()
}

/// A shorter secret could be guessed.
pub const SECRET_BYTES_MIN: usize = 16;
const ANSWER_BYTES_MAX: u64 = 4 << 10;

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// A receiver that gives these answers in turn, one a connection, and the requests that it had. An empty answer hangs up.
    async fn receiver(answers: &'static [&'static str]) -> (Webhook, tokio::task::JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/heal?team=a", listener.local_addr().unwrap());
        let had = tokio::spawn(async move {
            let mut had = Vec::new();
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"}") {
                    assert!(stream.read_buf(&mut request).await.unwrap() > 0);
                }
                had.push(String::from_utf8(request).unwrap());
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
            had
        });
        let webhook = Webhook {
            url: url.parse().unwrap(),
            secret: b"0123456789abcdef".to_vec(),
            node: "site-a".to_owned(),
            timeout: Duration::from_mins(1),
            attempts: 3,
            pause: Duration::from_millis(1),
        };
        (webhook, had)
    }

    fn called() -> Called {
        Called {
            service: "kv".to_owned(),
            incident: 3,
            intent: 7,
            decided_unix_ms: 42,
            class: crate::types::FaultClass::Corruption,
            reason: "page 7 holds secret\r\nX: y".to_owned(),
        }
    }

    fn header<'a>(request: &'a str, name: &str) -> &'a str {
        let line = request
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.unwrap_or_else(|| panic!("no {name}: {request}"))
    }

    #[tokio::test]
    async fn a_request_that_may_not_have_arrived_is_repeated_with_the_same_key_and_signed() {
        let (webhook, had) = receiver(&[
            "",
            "HTTP/1.1 503 Busy\r\n\r\nlater",
            "HTTP/1.1 202 Accepted\r\n\r\n",
        ])
        .await;
        let said = webhook.send(&called()).await.unwrap();
        assert!(said.contains("attempt 3"), "{said}");
        let had = had.await.unwrap();
        for request in &had {
            assert!(request.starts_with("POST /heal?team=a HTTP/1.1\r\n"), "{request}");
            assert_eq!(header(request, "Idempotency-Key"), "site-a-7-42");
            let (_, body) = request.split_once("\r\n\r\n").unwrap();
            assert!(
                body.contains(r#""class":"corruption","reason":"its state does not pass its check""#)
                    && !body.contains("secret"),
                "what a check said stays here: {body}"
            );
            let signed = format!("{}.site-a-7-42.{body}", header(request, "Theriac-Timestamp"));
            let expected = format!(
                "sha256={}",
                HEXLOWER.encode(&hmac(b"0123456789abcdef", signed.as_bytes()))
            );
            assert_eq!(header(request, "Theriac-Signature"), expected);
            assert!(
                !request.contains("\r\nX: y"),
                "the reason ends no line: {request}"
            );
        }
    }

    #[tokio::test]
    async fn a_refusal_is_final_and_attempts_are_bounded() {
        let (webhook, had) = receiver(&["HTTP/1.1 403 No\r\n\r\nwho are you"]).await;
        let error = webhook.send(&called()).await.unwrap_err();
        assert!(
            matches!(&error, WebhookError::Refused { status: 403, said } if said == "who are you"),
            "{error}"
        );
        assert_eq!(had.await.unwrap().len(), 1);
        let (webhook, had) = receiver(&["HTTP/1.1 500 Oh\r\n\r\n", "nonsense", ""]).await;
        let error = webhook.send(&called()).await.unwrap_err();
        assert!(
            matches!(error, WebhookError::Unreachable { attempts: 3, .. }),
            "{error}"
        );
        assert_eq!(had.await.unwrap().len(), 3);
    }

    #[tokio::test]
    async fn silence_ends_and_nobody_there_is_said() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (mut webhook, _) = receiver(&[]).await;
        let to = |at: std::net::SocketAddr| format!("http://{at}/").parse().unwrap();
        webhook.url = to(listener.local_addr().unwrap());
        webhook.timeout = Duration::from_millis(20);
        webhook.attempts = 2;
        let error = webhook.send(&called()).await.unwrap_err().to_string();
        assert!(
            error.contains("2 attempts") && error.contains("no answer within"),
            "{error}"
        );
        // Nobody listens there, and nobody else can begin to.
        let kept = tokio::net::TcpSocket::new_v4().unwrap();
        kept.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        webhook.url = to(kept.local_addr().unwrap());
        webhook.timeout = Duration::from_mins(1);
        let error = webhook.send(&called()).await.unwrap_err().to_string();
        assert!(error.contains("refused"), "{error}");
        assert!(
            !format!("{webhook:?}").contains("0123"),
            "the secret is never printed"
        );
    }

    #[tokio::test]
    async fn the_key_of_an_intent_whose_number_came_again_is_another() {
        let (webhook, had) = receiver(&["HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n"]).await;
        let mut called = called();
        webhook.send(&called).await.unwrap();
        called.decided_unix_ms += 1;
        webhook.send(&called).await.unwrap();
        let had = had.await.unwrap();
        let keys: Vec<&str> = had
            .iter()
            .map(|request| header(request, "Idempotency-Key"))
            .collect();
        assert_eq!(keys, ["site-a-7-42", "site-a-7-43"]);
    }

    #[test]
    fn the_longest_time_counts_attempts_and_growing_pauses() {
        let second = Duration::from_secs(1);
        assert_eq!(longest(5 * second, 1, second), 5 * second);
        assert_eq!(longest(5 * second, 3, second), (15 + 1 + 2) * second);
        assert_eq!(longest(second, 10, second), (10 + 511) * second);
    }

    #[test]
    fn the_signature_is_that_of_rfc_4231_and_addresses_are_checked() {
        // RFC 4231, test cases 1, 2 and 6.
        let long = [0xaa; 131];
        for (key, message, expected) in [
            (
                &[0x0b; 20][..],
                &b"Hi There"[..],
                "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7",
            ),
            (
                b"Jefe",
                b"what do ya want for nothing?",
                "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
            ),
            (
                &long,
                b"Test Using Larger Than Block-Size Key - Hash Key First",
                "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54",
            ),
        ] {
            assert_eq!(HEXLOWER.encode(&hmac(key, message)), expected);
        }
        for bad in [
            "",
            "https://a:1/",
            "http://a/",
            "http://:80/",
            "http://a:0/",
            "http://a:80/ x",
            "http://a:80/\r\nX: y",
        ] {
            assert!(bad.parse::<WebhookUrl>().is_err(), "{bad:?}");
        }
    }
}
