//! An S3 server on loopback, faithful in what its clients lean on: path-style addresses, Signature Version 4 checked over what came in
//! (AWS, "Signature Calculations for the Authorization Header"), digests of the body, pages of a list, many deletes in one request, and
//! S3's own words for what it refuses.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::fmt::Write as _;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use aws_lc_rs::{digest, hmac};
use data_encoding::{BASE64, HEXLOWER};
use http_body_util::BodyExt as _;
use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::http::request::Parts;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

pub(crate) const KEY_ID: &str = "AKIDTHERIAC";
pub(crate) const SECRET: &str = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY";
const REGION: &str = "eu-central-2";
const BUCKET: &str = "copies";
/// Keys and prefixes in one page of a list; S3's own is 1 000.
const PAGE: usize = 2;

/// How the server behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mood {
    Well,
    /// So many further requests are told to slow down.
    Busy(u32),
    /// The key may read and list, not write.
    ReadOnly,
    /// Nothing is answered.
    Silent,
    /// The next object that is read ends after half of its bytes.
    CutsOnce,
}

#[derive(Debug)]
pub(crate) struct Bucket {
    pub(crate) objects: BTreeMap<String, Bytes>,
    pub(crate) mood: Mood,
    /// Whether the bucket is there.
    pub(crate) exists: bool,
    /// Method and query's first name of each request.
    pub(crate) calls: Vec<String>,
    /// Where it listens.
    endpoint: String,
}

pub(crate) type Shared = Arc<Mutex<Bucket>>;

/// A status, a body; or silence.
type Answer = Option<(u16, Bytes)>;

/// An empty bucket on a port of its own, until the runtime ends.
pub(crate) async fn serve() -> Shared {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let bucket = Arc::new(Mutex::new(Bucket {
        objects: BTreeMap::new(),
        mood: Mood::Well,
        exists: true,
        calls: Vec::new(),
        endpoint: format!("http://{}", listener.local_addr().unwrap()),
    }));
    let shared = Arc::clone(&bucket);
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let shared = Arc::clone(&shared);
            let service = service_fn(move |request| answered(Arc::clone(&shared), request));
            tokio::spawn(
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
            );
        }
    });
    bucket
}

/// What a client of this server has in its environment.
pub(crate) fn variables(bucket: &Shared, secret: &str) -> Vec<(String, String)> {
    [
        ("AWS_ENDPOINT", bucket.lock().unwrap().endpoint.as_str()),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_REGION", REGION),
        ("AWS_ACCESS_KEY_ID", KEY_ID),
        ("AWS_SECRET_ACCESS_KEY", secret),
        ("AWS_TIMEOUT", "300ms"),
        ("PATH", "/bin"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .to_vec()
}

pub(crate) fn url() -> String {
    format!("s3://{BUCKET}/site a/backups")
}

async fn answered(bucket: Shared, request: Request<Incoming>) -> Result<Response<Sent>, Infallible> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let (answer, cut) = {
        let mut bucket = bucket.lock().unwrap();
        let answer = bucket.answer(&parts, &body);
        let cut = bucket.mood == Mood::CutsOnce && is_read(&parts);
        if cut {
            bucket.mood = Mood::Well;
        }
        (answer, cut)
    };
    let Some((code, body)) = answer else {
        return std::future::pending().await;
    };
    let response = Response::builder()
        .status(code)
        .header("ETag", format!("\"{}\"", hex_digest(&body)))
        .header("Last-Modified", "Wed, 12 Oct 2022 17:50:00 GMT")
        // Of the whole, also where the body is cut.
        .header("Content-Length", body.len());
    let shown = if cut { body.slice(..body.len() / 2) } else { body };
    Ok(response.body(Sent(Some(shown))).unwrap())
}

/// A body that makes no claim of its length: the header does.
struct Sent(Option<Bytes>);

impl Body for Sent {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.take().map(|bytes| Ok(Frame::data(bytes))))
    }
}

fn is_read(parts: &Parts) -> bool {
    parts.method == Method::GET && parts.uri.query().is_none()
}

impl Bucket {
    fn answer(&mut self, parts: &Parts, body: &Bytes) -> Answer {
        let queries = queries(parts);
        let first = queries
            .iter()
            .next()
            .map(|(name, _)| name.clone())
            .unwrap_or_default();
        self.calls
            .push(format!("{} {first}", parts.method).trim_end().to_owned());
        match &mut self.mood {
            Mood::Silent => return None,
            Mood::Busy(left) if *left > 0 => {
                *left -= 1;
                return Some(refused(503, "SlowDown", "Please reduce your request rate."));
            }
            _ => {}
        }
        if let Err(what) = signed(parts, body) {
            return Some(refused(403, what, "refused"));
        }
        let path = decoded(parts.uri.path());
        let Some(key) = path.strip_prefix(&format!("/{BUCKET}")).filter(|_| self.exists) else {
            return Some(refused(
                404,
                "NoSuchBucket",
                "The specified bucket does not exist",
            ));
        };
        let key = key.trim_start_matches('/').to_owned();
        if self.mood == Mood::ReadOnly && parts.method != Method::GET && parts.method != Method::HEAD {
            return Some(refused(403, "AccessDenied", "Access Denied"));
        }
        match (parts.method.as_str(), key.is_empty()) {
            ("GET", true) if queries.contains_key("list-type") => Some((200, self.page(&queries).into())),
            ("POST", true) if queries.contains_key("delete") => Some(self.delete_many(parts, body)),
            ("PUT", false) => {
                self.objects.insert(key, body.clone());
                Some((200, Bytes::new()))
            }
            ("GET" | "HEAD", false) => match self.objects.get(&key) {
                Some(object) => Some((200, object.clone())),
                None => Some(refused(404, "NoSuchKey", "The specified key does not exist.")),
            },
            ("DELETE", false) => {
                self.objects.remove(&key);
                Some((204, Bytes::new()))
            }
            _ => Some(refused(
                405,
                "MethodNotAllowed",
                "not allowed against this resource",
            )),
        }
    }

    /// `ListObjectsV2`: keys below `prefix`, those with a further delimiter as one common prefix, `PAGE` at a time.
    fn page(&self, queries: &BTreeMap<String, String>) -> String {
        let get = |name: &str| queries.get(name).map(String::as_str).unwrap_or_default();
        let (prefix, delimiter, after) = (get("prefix"), get("delimiter"), get("continuation-token"));
        let mut shown = BTreeMap::new();
        let mut common = BTreeSet::new();
        for (key, object) in &self.objects {
            let Some(rest) = key.strip_prefix(prefix) else {
                continue;
            };
            let cut = if delimiter.is_empty() {
                None
            } else {
                rest.find(delimiter)
            };
            let name = match cut {
                Some(at) => format!("{prefix}{}", &rest[..at + delimiter.len()]),
                None => key.clone(),
            };
            if name.as_str() <= after {
                continue;
            }
            if shown.len() + common.len() == PAGE && !common.contains(&name) {
                let last = shown.keys().chain(&common).max().cloned().unwrap_or_default();
                return listed(&shown, &common, Some(&last));
            }
            match cut {
                Some(_) => drop(common.insert(name)),
                None => drop(shown.insert(name, object.len())),
            }
        }
        listed(&shown, &common, None)
    }

    /// `DeleteObjects`: needs a digest of the body beside the signature; a key that is not there counts as removed.
    fn delete_many(&mut self, parts: &Parts, body: &Bytes) -> (u16, Bytes) {
        let given = |name: &str| {
            parts
                .headers
                .get(name)
                .map(|value| value.to_str().unwrap().to_owned())
        };
        let checksum = given("x-amz-checksum-sha256");
        if given("content-md5").is_none()
            || checksum != Some(BASE64.encode(digest::digest(&digest::SHA256, body).as_ref()))
        {
            return refused(
                400,
                "InvalidRequest",
                "Missing required header for this request: Content-MD5",
            );
        }
        let text = String::from_utf8(body.to_vec()).unwrap();
        let mut answer = String::from("<DeleteResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">");
        for key in text
            .split("<Key>")
            .skip(1)
            .map(|rest| rest.split("</Key>").next().unwrap())
        {
            self.objects.remove(key);
            write!(answer, "<Deleted><Key>{key}</Key></Deleted>").unwrap();
        }
        (200, (answer + "</DeleteResult>").into())
    }
}

fn listed(shown: &BTreeMap<String, usize>, common: &BTreeSet<String>, next: Option<&String>) -> String {
    let mut text = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?><ListBucketResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Name>{BUCKET}</Name><KeyCount>{}</KeyCount><MaxKeys>{PAGE}</MaxKeys><IsTruncated>{}</IsTruncated>",
        shown.len() + common.len(),
        next.is_some()
    );
    if let Some(next) = next {
        write!(text, "<NextContinuationToken>{next}</NextContinuationToken>").unwrap();
    }
    for (key, bytes) in shown {
        write!(text, "<Contents><Key>{key}</Key><LastModified>2022-10-12T17:50:00.000Z</LastModified><ETag>&quot;e&quot;</ETag><Size>{bytes}</Size><StorageClass>STANDARD</StorageClass></Contents>").unwrap();
    }
    for prefix in common {
        write!(text, "<CommonPrefixes><Prefix>{prefix}</Prefix></CommonPrefixes>").unwrap();
    }
    text + "</ListBucketResult>"
}

fn refused(code: u16, what: &str, message: &str) -> (u16, Bytes) {
    let text = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>{what}</Code><Message>{message}</Message></Error>"
    );
    (code, text.into())
}

/// Checks the request's signature from its own bytes, as S3 does; the error is S3's code.
fn signed(parts: &Parts, body: &Bytes) -> Result<(), &'static str> {
    let header = |name: &str| {
        let value = parts.headers.get(name).ok_or("AccessDenied")?;
        value.to_str().map_err(|_| "AccessDenied")
    };
    let field = |name: &str| {
        let all = header("authorization")?
            .strip_prefix("AWS4-HMAC-SHA256 ")
            .ok_or("AccessDenied")?;
        let mut fields = all.split(", ").filter_map(|field| field.split_once('='));
        fields
            .find(|(have, _)| *have == name)
            .map(|(_, value)| value)
            .ok_or("AuthorizationHeaderMalformed")
    };
    let payload = header("x-amz-content-sha256")?;
    if payload != hex_digest(body) {
        return Err("XAmzContentSHA256Mismatch");
    }
    let names = field("SignedHeaders")?;
    let mut canonical = format!("{}\n{}\n", parts.method, parts.uri.path());
    let query: Vec<String> = queries(parts)
        .iter()
        .map(|(name, value)| format!("{}={}", encoded(name), encoded(value)))
        .collect();
    writeln!(canonical, "{}", query.join("&")).unwrap();
    for name in names.split(';') {
        writeln!(canonical, "{name}:{}", header(name)?.trim()).unwrap();
    }
    write!(canonical, "\n{names}\n{payload}").unwrap();
    let date = header("x-amz-date")?;
    let day = date.get(..8).ok_or("AccessDenied")?;
    let scope = format!("{day}/{REGION}/s3/aws4_request");
    if field("Credential")? != format!("{KEY_ID}/{scope}") {
        return Err("InvalidAccessKeyId");
    }
    let text = format!(
        "AWS4-HMAC-SHA256\n{date}\n{scope}\n{}",
        hex_digest(canonical.as_bytes())
    );
    let mut key = format!("AWS4{SECRET}").into_bytes();
    for step in [day, REGION, "s3", "aws4_request"] {
        key = mac(&key, step);
    }
    if field("Signature")? == HEXLOWER.encode(&mac(&key, &text)) {
        Ok(())
    } else {
        Err("SignatureDoesNotMatch")
    }
}

fn mac(key: &[u8], text: &str) -> Vec<u8> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key);
    hmac::sign(&key, text.as_bytes()).as_ref().to_vec()
}

fn hex_digest(bytes: &[u8]) -> String {
    HEXLOWER.encode(digest::digest(&digest::SHA256, bytes).as_ref())
}

fn queries(parts: &Parts) -> BTreeMap<String, String> {
    let pairs = parts.uri.query().into_iter().flat_map(|query| query.split('&'));
    pairs
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            // In a query, unlike in a path, a plus is a space.
            (decoded(name), decoded(&value.replace('+', " ")))
        })
        .collect()
}

/// Percent signs undone.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let pair = [rest.next().unwrap(), rest.next().unwrap()];
            bytes.push(u8::from_str_radix(str::from_utf8(&pair).unwrap(), 16).unwrap());
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).unwrap()
}

/// As the canonical request has it: all but the unreserved characters behind percent signs.
fn encoded(text: &str) -> String {
    let shown = |byte: u8| match byte {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(shown).collect()
}
