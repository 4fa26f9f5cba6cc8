//! A real Redis server: what it says to a probe, and what a whole edge makes of it. Left out, and said, where there is none.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod whole;

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use theriac_edge::probe::{self, Probe, ProbeError};
use theriac_heal::checkpoint::redis::{Address, Client};
use whole::{Edge, Limits, signal};

/// Far above what a busy machine needs.
const LIMIT: Duration = Duration::from_mins(1);

struct Server {
    dir: TempDir,
    child: Option<Child>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

impl Server {
    /// Runs one on a socket of its own; nothing where there is none.
    async fn run(options: &[&str]) -> Option<Self> {
        let mut server = Self {
            dir: tempfile::tempdir().unwrap(),
            child: None,
        };
        std::fs::create_dir(server.data()).unwrap();
        server.begin(options)?;
        server.until_not_refused().await;
        Some(server)
    }

    fn begin(&mut self, options: &[&str]) -> Option<()> {
        let started = Command::new("redis-server")
            .args(self.words())
            .args(options)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        match started {
            Ok(child) => self.child = Some(child),
            Err(error) => {
                eprintln!("left out: redis-server: {error}");
                return None;
            }
        }
        Some(())
    }

    fn words(&self) -> Vec<String> {
        let socket = self.socket().display().to_string();
        let data = self.data().display().to_string();
        [
            "--port",
            "0",
            "--unixsocket",
            &socket,
            "--dir",
            &data,
            "--save",
            "",
            "--appendonly",
            "no",
        ]
        .map(str::to_owned)
        .to_vec()
    }

    async fn until_not_refused(&self) {
        let begun = Instant::now();
        while matches!(
            self.ask().await,
            Err(ProbeError::Redis(_) | ProbeError::TimedOut(_))
        ) {
            assert!(begun.elapsed() < LIMIT, "the server does not start");
            tokio::task::yield_now().await;
        }
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("r.sock")
    }

    fn probe(&self, password_file: Option<PathBuf>) -> Probe {
        let mut probe = format!("redis://{}", self.socket().display()).parse().unwrap();
        if let Probe::Redis(server) = &mut probe {
            server.password_file = password_file;
        }
        probe
    }

    async fn ask(&self) -> Result<(bool, String), ProbeError> {
        probe::ask(&self.probe(None), Duration::from_mins(1)).await
    }

    async fn client(&self) -> Client {
        let at = Address::Unix(self.socket());
        Client::open(&at, None, Duration::from_secs(30)).await.unwrap()
    }

    async fn does(&self, command: &[&str]) -> String {
        format!("{:?}", self.client().await.ask(command).await.unwrap())
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(self.child.as_ref().unwrap()), signal).unwrap();
    }

    fn end(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

#[tokio::test]
async fn a_password_is_said_and_a_wrong_one_or_none_is_a_refusal() {
    let Some(server) = Server::run(&["--requirepass", "open sesame"]).await else {
        return;
    };
    let refused = server.ask().await.unwrap_err();
    assert!(
        refused.is_refusal() && refused.to_string().starts_with("NOAUTH"),
        "{refused}"
    );
    let file = server.dir.path().join("password");
    let probe = server.probe(Some(file.clone()));
    let ask = || probe::ask(&probe, Duration::from_mins(1));
    let missing = ask().await.unwrap_err();
    assert!(
        missing.is_refusal() && missing.to_string().contains("cannot be read"),
        "{missing}"
    );
    std::fs::write(&file, "wrong one\n").unwrap();
    let wrong = ask().await.unwrap_err();
    assert!(
        wrong.is_refusal() && !wrong.to_string().contains("wrong one"),
        "{wrong}"
    );
    std::fs::write(&file, "open sesame\n").unwrap();
    assert!(ask().await.unwrap().0);
}

#[tokio::test]
async fn one_client_too_many_is_told_from_a_server_that_is_stopped_or_gone() {
    let Some(mut server) = Server::run(&["--maxclients", "2"]).await else {
        return;
    };
    let held = [server.client().await, server.client().await];
    let refused = loop {
        // The probe before may still be counted.
        if let Err(error) = server.ask().await {
            break error;
        }
    };
    assert!(refused.is_no_slot() && !refused.is_refusal(), "{refused}");
    drop(held);
    let begun = Instant::now();
    while server.ask().await.is_err() {
        assert!(begun.elapsed() < LIMIT, "clients that went make room");
    }
    server.signal(Signal::STOP);
    let silent = probe::ask(&server.probe(None), Duration::from_millis(200))
        .await
        .unwrap_err();
    assert!(
        !silent.is_no_slot() && !silent.is_refusal() && !silent.is_loading(),
        "{silent}"
    );
    server.signal(Signal::CONT);
    assert!(server.ask().await.unwrap().0);
    server.end();
    let gone = server.ask().await.unwrap_err();
    assert!(matches!(gone, ProbeError::Redis(_)), "{gone}");
}

#[tokio::test]
async fn a_server_whose_snapshots_fail_refuses_in_its_own_words() {
    let Some(server) = Server::run(&["--save", "3600 1"]).await else {
        return;
    };
    server.does(&["SET", "a", "1"]).await;
    std::fs::remove_dir_all(server.data()).unwrap();
    server.does(&["BGSAVE"]).await;
    let begun = Instant::now();
    let refused = loop {
        match server.ask().await {
            Err(error) => break error,
            Ok(_) => assert!(begun.elapsed() < LIMIT, "the snapshot does not fail"),
        }
    };
    assert!(
        refused.is_refusal() && refused.to_string().starts_with("MISCONF"),
        "{refused}"
    );
}

#[tokio::test]
async fn a_server_that_reads_its_data_says_so() {
    let slow = [
        "--key-load-delay",
        "20000",
        "--loading-process-events-interval-bytes",
        "1024",
    ];
    let Some(mut server) = Server::run(&["--enable-debug-command", "local"]).await else {
        return;
    };
    let made = server.does(&["DEBUG", "POPULATE", "2000", "k", "100"]).await;
    assert!(made.contains("OK"), "{made}");
    server.does(&["SAVE"]).await;
    server.end();
    // Forty seconds for all of it.
    server.begin(&slow).unwrap();
    server.until_not_refused().await;
    let loading = server.ask().await.unwrap_err();
    assert!(loading.is_loading() && !loading.is_refusal(), "{loading}");
}

/// A whole edge: a hang and a crash are healed, and a refusal is no reason for a restart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_restarts_a_stopped_server_and_not_one_that_refuses() {
    let mut server = Server {
        dir: tempfile::tempdir().unwrap(),
        child: None,
    };
    std::fs::create_dir(server.data()).unwrap();
    // Only to know whether there is one.
    if server.begin(&[]).is_none() {
        return;
    }
    server.end();
    let mut argv = vec!["redis-server".to_owned()];
    argv.extend(server.words());
    let more = format!(
        "[[service]]\nname = 'redis'\nargv = {argv:?}\nstop_grace = '100ms'\n\
         probe = {{ url = 'redis://{}', interval = '100ms', timeout = '10s', start_grace = '30s' }}\n\
         healing = {{ autonomy = 'act', cooldown = '1s', settle = '0s' }}\n",
        server.socket().display()
    );
    let limits = Limits {
        answer: Duration::from_mins(1),
        wait: LIMIT,
    };
    let edge = Edge::start(&server.dir.path().join("edge"), &more, limits);
    let first = edge.another("up", None).await;
    // It asks for a password from now on: it is there, and a restart would only cost what is in it.
    server.does(&["CONFIG", "SET", "requirepass", "secret"]).await;
    let told = edge
        .until("told", async |edge| {
            let incidents = edge.incidents().await?;
            incidents.into_iter().find(|of| of.state == "handed_to_human")
        })
        .await;
    assert_eq!(told.class, "unknown", "{told:?}");
    signal(first, Signal::STOP);
    // Silent now: that is a hang, and the server after it asks for no password.
    let second = edge.another("restarted", Some(first)).await;
    signal(second, Signal::KILL);
    edge.another("started", Some(second)).await;
    edge.finish().await;
}

impl Edge {
    /// The process of the server, once it is well and not `before`.
    async fn another(&self, what: &str, before: Option<u32>) -> u32 {
        let service = self
            .service_until(what, |service| {
                service.healthy && service.pid.is_some() && service.pid != before
            })
            .await;
        service.pid.unwrap()
    }
}
