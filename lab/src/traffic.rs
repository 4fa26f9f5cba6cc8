//! An open-loop load generator that counts failed requests from outside.

use std::net::SocketAddr;

use serde::Serialize;

/// What the generator saw.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct TrafficReport {
    /// Requests that ended.
    pub requests: u64,
    /// Requests that ended well.
    pub ok: u64,
    /// Requests that did not.
    pub failed: u64,
    /// The failures, oldest first, bounded.
    pub failures: Vec<Failure>,
    /// Acknowledged writes that could not be read back (known after [`Traffic::stop`]).
    pub lost_writes: u64,
    /// Writes that were acknowledged.
    pub acknowledged_writes: u64,
}

/// One failed request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// When the request was due, milliseconds since the Unix epoch.
    pub unix_ms: u64,
    /// How it failed.
    pub kind: FailureKind,
}

/// How a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// No connection.
    Refused,
    /// No answer within a second.
    Timeout,
    /// Another status than 2xx.
    Status,
    /// Another value than the one last acknowledged.
    WrongValue,
    /// The connection broke.
    Broken,
}

/// A running generator.
#[derive(Debug)]
pub struct Traffic {}

impl Traffic {
    /// Starts `rate` requests a second against `addr`; the same seed gives the same keys and mix.
    pub fn start(addr: SocketAddr, rate: f64, seed: u64) -> Self {
        unimplemented!("{addr} {rate} {seed}")
    }

    /// What was seen so far.
    pub fn snapshot(&self) -> TrafficReport {
        unimplemented!()
    }

    /// Ends, waits for requests under way, then reads every acknowledged write back.
    pub async fn stop(self) -> TrafficReport {
        unimplemented!()
    }
}
