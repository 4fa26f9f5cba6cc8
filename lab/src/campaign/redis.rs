//! The Redis server of a ward and the load on it.
//!
//! It keeps no append-only file and saves a snapshot 5 s after a write at the earliest: what was written since the last one is lost by
//! design when it is killed, whoever starts it again. Lost writes are counted for every healer alike, and are no harm of any.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use theriac_heal::checkpoint::redis::{Address, Client, RedisError, Value};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use super::load::{FAILURES_MAX, Failed, Seen, generate};
use super::ward::text;

/// Requests a second, each over a connection of its own, half of them writes.
pub(super) const RATE: f64 = 20.0;
/// A request without an answer after this time has failed.
pub(super) const TIMEOUT: Duration = Duration::from_secs(1);
/// Time that reading back may take.
const READ_BACK_MAX: Duration = Duration::from_secs(15);
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
    shared: Arc<Shared>,
    stop: watch::Sender<()>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    at: Address,
    run: u64,
    seen: Mutex<Written>,
}

#[derive(Debug, Default)]
struct Written {
    report: Seen,
    acknowledged: BTreeSet<u64>,
    next: u64,
}

impl Keys {
    pub(super) fn start(at: SocketAddr, run: u64) -> Self {
        let shared = Arc::new(Shared {
            at: Address::Tcp(at.to_string()),
            run,
            seen: Mutex::default(),
        });
        let (stop, stopped) = watch::channel(());
        let asked = Arc::clone(&shared);
        let ask = move |write, due_ms| {
            let shared = Arc::clone(&asked);
            async move { shared.ask(write, due_ms).await }
        };
        let task = tokio::spawn(generate(RATE, run, stopped, ask));
        Self { shared, stop, task }
    }

    pub(super) fn seen(&self) -> Seen {
        self.shared.seen().report.clone()
    }

    /// Ends it and looks for everything that was acknowledged.
    pub(super) async fn stop(self) -> Seen {
        drop(self.stop);
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the load ended early");
        }
        let deadline = Instant::now() + READ_BACK_MAX;
        let found = loop {
            match timeout(READ_BACK_MAX, self.shared.read_back()).await {
                Ok(Ok(found)) => break Some(found),
                _ if Instant::now() >= deadline => break None,
                _ => sleep(Duration::from_millis(100)).await,
            }
        };
        let mut seen = self.shared.seen();
        let acknowledged = seen.acknowledged.len() as u64;
        match found {
            Some(found) => seen.report.lost = acknowledged.saturating_sub(found),
            None => seen.report.unverified = acknowledged,
        }
        seen.report.clone()
    }
}

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Written> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn key(&self, number: u64) -> String {
        format!("{}:{number}", self.run)
    }

    async fn ask(&self, write: bool, due_ms: u64) {
        let number = write.then(|| {
            let mut seen = self.seen();
            seen.next += 1;
            seen.next
        });
        let answered = timeout(TIMEOUT, self.exchange(number)).await;
        let good = matches!(answered, Ok(Ok(true)));
        let mut seen = self.seen();
        seen.report.requests += 1;
        if good {
            // Only what was acknowledged is held to.
            seen.acknowledged.extend(number);
            seen.report.answered(due_ms);
        } else if seen.report.failures.len() < FAILURES_MAX {
            seen.report.failures.push(Failed { ms: due_ms, write });
        }
    }

    /// Whether it was answered well. Of a read any value is good, and none: what a crash took is not asked after again and again.
    async fn exchange(&self, number: Option<u64>) -> Result<bool, RedisError> {
        let mut client = Client::open(&self.at, None, TIMEOUT).await?;
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
    async fn read_back(&self) -> Result<u64, RedisError> {
        let mut client = Client::open(&self.at, None, READ_BACK_MAX).await?;
        let numbers: Vec<u64> = self.seen().acknowledged.iter().copied().collect();
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
            let there = |(number, value): (&u64, &Value)| *value == Value::Text(number.to_string());
            found += numbers.iter().zip(&values).filter(|pair| there(*pair)).count() as u64;
        }
        client.ask(&["FLUSHALL"]).await?;
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_a_server_forgot_is_counted_as_lost_and_no_other_write() {
        let Some(program) = super::super::fault::path_of("redis-server") else {
            eprintln!("left out: `redis-server` is not on PATH");
            return;
        };
        let dir = tempfile::tempdir().unwrap();
        let at = crate::fleet::free_addresses(1).unwrap()[0];
        let argv = argv(&program, at, dir.path(), &dir.path().join("pid"));
        let mut server = std::process::Command::new(&argv[0])
            .args(&argv[1..])
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let asked = Shared {
            at: Address::Tcp(at.to_string()),
            run: 7,
            seen: Mutex::default(),
        };
        let begun = Instant::now();
        while !matches!(asked.exchange(None).await, Ok(true)) {
            assert!(
                begun.elapsed() < Duration::from_mins(1),
                "the server does not start"
            );
        }
        for _ in 0..6 {
            asked.ask(true, 1).await;
        }
        let mut client = Client::open(&asked.at, None, TIMEOUT).await.unwrap();
        client.ask(&["DEL", "7:2", "7:5"]).await.unwrap();
        assert_eq!(asked.seen().acknowledged.len(), 6);
        assert_eq!(asked.read_back().await.unwrap(), 4);
        server.kill().unwrap();
        server.wait().unwrap();
        asked.ask(true, 9).await;
        let report = asked.seen().report.clone();
        assert_eq!(report.failures, [Failed { ms: 9, write: true }]);
    }
}
