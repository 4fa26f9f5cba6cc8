//! The Redis server of a ward and the load on it.
//!
//! It keeps no append-only file and saves a snapshot 5 s after a write at the earliest: what was written since the last one is lost by
//! design when it is killed, whoever starts it again. Lost writes are counted for every healer alike, and are no harm of any.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use theriac_heal::checkpoint::redis::{Address, Client, RedisError, Value};
use tokio::time::timeout;

use super::ward::text;
use super::writes::{READ_BACK_MAX, Server};

/// Keys read back at once.
const CHUNK: usize = 500;

/// The server's words. Its title is not changed: what it was started with tells it from any other.
pub(super) fn argv(program: &Path, at: SocketAddr, state: &Path, pid_file: &Path) -> Vec<String> {
    let port = at.port().to_string();
    [
        &*text(program),
        "--bind",
        "127.0.0.1",
        "--port",
        &port,
        "--dir",
        &text(state),
        "--pidfile",
        &text(pid_file),
        "--save",
        "5 1",
        "--appendonly",
        "no",
        "--set-proc-title",
        "no",
    ]
    .map(str::to_owned)
    .to_vec()
}

/// Numbers that are set, one key each, and read.
#[derive(Debug)]
pub(super) struct Keys {
    at: Address,
    run: u64,
}

impl Server for Keys {
    const RATE: f64 = 20.0;
    const TIMEOUT: Duration = Duration::from_secs(1);

    async fn exchange(&self, number: Option<i64>) -> bool {
        matches!(self.ask(number).await, Ok(true))
    }

    async fn read_back(&self, acknowledged: &BTreeSet<i64>) -> Option<u64> {
        timeout(READ_BACK_MAX, self.take(acknowledged)).await.ok()?.ok()
    }
}

impl Keys {
    pub(super) fn new(at: SocketAddr, run: u64) -> Self {
        Self {
            at: Address::Tcp(at.to_string()),
            run,
        }
    }

    fn key(&self, number: i64) -> String {
        format!("{}:{number}", self.run)
    }

    /// Whether it was answered well. Of a read any value is good, and none: what a crash took is not asked after again and again.
    async fn ask(&self, number: Option<i64>) -> Result<bool, RedisError> {
        let mut client = Client::open(&self.at, None, Self::TIMEOUT).await?;
        let answer = match number {
            Some(number) => {
                client
                    .ask(&["SET", &self.key(number), &number.to_string()])
                    .await?
            }
            None => client.ask(&["GET", &self.key(1)]).await?,
        };
        Ok(!matches!(answer, Value::Error(_)))
    }

    /// How many of the acknowledged writes are there; then they go.
    async fn take(&self, acknowledged: &BTreeSet<i64>) -> Result<u64, RedisError> {
        let mut client = Client::open(&self.at, None, READ_BACK_MAX).await?;
        let numbers: Vec<i64> = acknowledged.iter().copied().collect();
        let mut found = 0;
        for numbers in numbers.chunks(CHUNK) {
            let keys: Vec<String> = numbers.iter().map(|number| self.key(*number)).collect();
            let words: Vec<&str> = std::iter::once("MGET")
                .chain(keys.iter().map(String::as_str))
                .collect();
            let Value::List(values) = client.ask(&words).await? else {
                let detail = "MGET is answered by no list".to_owned();
                return Err(RedisError::Setting(detail));
            };
            let there = |(number, value): (&i64, &Value)| *value == Value::Text(number.to_string());
            found += numbers.iter().zip(&values).filter(|pair| there(*pair)).count() as u64;
        }
        client.ask(&["FLUSHALL"]).await?;
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;
    use crate::campaign::load::Failed;
    use crate::campaign::writes::Shared;

    const MINUTE: Duration = Duration::from_mins(1);

    #[tokio::test]
    async fn what_a_server_forgot_is_counted_as_lost_and_no_other_write() {
        let Some(program) = super::super::fault::path_of("redis-server") else {
            eprintln!("left out: `redis-server` is not on PATH");
            return;
        };
        let dir = tempfile::tempdir().unwrap();
        let begun = Instant::now();
        let (asked, mut server) = 'started: loop {
            let at = crate::fleet::free_addresses(1).unwrap()[0];
            let argv = argv(&program, at, dir.path(), &dir.path().join("pid"));
            let mut server = std::process::Command::new(&argv[0])
                .args(&argv[1..])
                .stdout(std::process::Stdio::null())
                .spawn()
                .unwrap();
            let asked = Shared::new(Keys::new(at, 7));
            // Its address may have been taken meanwhile: then it ends.
            while server.try_wait().unwrap().is_none() {
                assert!(begun.elapsed() < MINUTE, "the server does not start");
                if asked.server.exchange(None).await {
                    break 'started (asked, server);
                }
            }
        };
        // One that was not answered in time may be there all the same.
        while asked.seen().acknowledged.len() < 6 {
            assert!(begun.elapsed() < 2 * MINUTE, "writes are not acknowledged");
            asked.ask(true, 1).await;
        }
        let mut client = Client::open(&asked.server.at, None, MINUTE).await.unwrap();
        let acknowledged = asked.seen().acknowledged.clone();
        for number in acknowledged.iter().step_by(3) {
            client.ask(&["DEL", &asked.server.key(*number)]).await.unwrap();
        }
        assert_eq!(asked.server.read_back(&acknowledged).await.unwrap(), 4);
        server.kill().unwrap();
        server.wait().unwrap();
        asked.ask(true, 9).await;
        let report = asked.seen().report.clone();
        assert_eq!(report.failures.last(), Some(&Failed { ms: 9, write: true }));
    }
}
