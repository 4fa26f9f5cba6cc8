//! A whole edge in this process, asked over its page, and the service that it supervises.

#![allow(dead_code, unreachable_pub, reason = "each test file uses what it needs")]

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde::de::DeserializeOwned;
use theriac_edge::config::EdgeConfig;
use theriac_edge::probe::{self, ProbeUrl};
use theriac_edge::status::{IncidentView, ServiceStatus, Status};
use theriac_edge::{EdgeError, run};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// The environment variable that makes a test program the service at this address.
pub const ADDRESS: &str = "THERIAC_TEST_SERVICE";

/// Longest times, far above what a busy machine needs.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// For one answer of the page.
    pub answer: Duration,
    /// For what a test waits for.
    pub wait: Duration,
}

pub struct Edge {
    /// Its configuration, for commands.
    pub file: PathBuf,
    pub state: PathBuf,
    pub running: JoinHandle<Result<(), EdgeError>>,
    stop: oneshot::Sender<()>,
    limits: Limits,
}

impl Edge {
    /// `more` is what the file says beside the state directory and the page's address.
    pub fn start(state: &Path, more: &str, limits: Limits) -> Self {
        let config = config(state, more);
        let (stop, stopped) = oneshot::channel::<()>();
        let until = async move { drop(stopped.await) };
        let running = tokio::spawn(async move { Box::pin(run(config, None, until)).await });
        Self {
            file: file(state),
            state: state.to_owned(),
            running,
            stop,
            limits,
        }
    }

    pub async fn get(&self, path: &str) -> Option<(u16, Vec<u8>)> {
        let address: SocketAddr = std::fs::read_to_string(self.state.join("http.addr"))
            .ok()?
            .parse()
            .ok()?;
        probe::get(&ProbeUrl::new(address, path), self.limits.answer, 1 << 20)
            .await
            .ok()
    }

    async fn page<T: DeserializeOwned>(&self, path: &str) -> Option<T> {
        serde_json::from_slice(&self.get(path).await?.1).ok()
    }

    pub async fn status(&self) -> Option<Status> {
        self.page("/status").await
    }

    /// What it says of its first service.
    pub async fn service(&self) -> Option<ServiceStatus> {
        self.status().await?.services.into_iter().next()
    }

    pub async fn incidents(&self) -> Option<Vec<IncidentView>> {
        self.page("/incidents").await
    }

    /// What `look` finds, before the limit and while the edge runs.
    pub async fn until<T>(&self, what: &str, mut look: impl AsyncFnMut(&Self) -> Option<T>) -> T {
        let deadline = Instant::now() + self.limits.wait;
        loop {
            if let Some(found) = look(self).await {
                return found;
            }
            let late = Instant::now() > deadline || self.running.is_finished();
            assert!(
                !late,
                "not {what} in time: {:?} {:?}",
                self.status().await,
                self.incidents().await
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Its first service, once that is so.
    pub async fn service_until(&self, what: &str, good: impl Fn(&ServiceStatus) -> bool) -> ServiceStatus {
        self.until(what, async |edge| {
            edge.service().await.filter(|service| good(service))
        })
        .await
    }

    pub async fn finish(self) {
        drop(self.stop);
        self.running.await.unwrap().unwrap();
    }
}

/// Writes the file and reads it.
pub fn config(state: &Path, more: &str) -> EdgeConfig {
    let file = file(state);
    let text = format!(
        "state_dir = '{}'\nhttp.listen = '127.0.0.1:0'\n{more}",
        state.display()
    );
    std::fs::write(&file, text).unwrap();
    EdgeConfig::load(Some(&file), []).unwrap()
}

fn file(state: &Path) -> PathBuf {
    state.with_extension("toml")
}

/// The service: answers whatever it is asked, that it is well where it `is_well`, until it is ended.
pub fn serve(address: &str, is_well: impl Fn() -> bool) {
    let listener = TcpListener::bind(address).unwrap();
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        let mut request = [0; 1024];
        // A prober that went away is none of the service's business.
        if stream.read(&mut request).is_ok() {
            let status = if is_well() { "200 OK" } else { "500 Not Well" };
            let _sent = write!(stream, "HTTP/1.0 {status}\r\n\r\nok").is_ok();
        }
    }
}

/// An address that nobody listens at, outside the range from which the system picks ports: so nobody gets it before the service has it, or while
/// that is restarted.
pub fn free_address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    const FIRST: u16 = 10_000;
    const COUNT: u16 = 20_000;
    let own = u16::try_from(std::process::id() % 200).unwrap() * 100;
    loop {
        let port = FIRST + own.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % COUNT;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}

/// The words of [`serve`] in this very test program.
pub fn service_argv() -> String {
    let program = std::env::current_exe().unwrap().display().to_string();
    format!("['{program}', '--exact', 'service_process', '--nocapture']")
}

pub fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), signal).unwrap();
}
