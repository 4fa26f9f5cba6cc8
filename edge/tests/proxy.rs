//! A whole edge in this process with a proxy before a real service, and with a real group of processes.
//!
//! The service is this very test program, started again with an address in its environment: see `service_process`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod whole;

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use theriac_edge::commands;
use theriac_edge::probe::{self, ProbeUrl};
use theriac_edge::proxy::ProxyStatus;
use theriac_heal::executor::cgroup::{Controller, Hierarchies, Version};
use whole::{ADDRESS, Edge, Limits, free_address, serve, service_argv, signal};

/// What a test that hangs fails by.
const LONG: Duration = Duration::from_mins(1);
const LIMITS: Limits = Limits {
    answer: LONG,
    wait: LONG,
};

/// Not a test of its own: with an address in the environment it is the service that the tests supervise.
#[test]
fn service_process() {
    if let Ok(address) = std::env::var(ADDRESS) {
        serve(&address, || true);
    }
}

/// `more` stands in the service's own table; `SERVICE` in it is the service's address, which is given back.
fn start(root: &Path, more: &str) -> (Edge, SocketAddr) {
    start_asking(root, "10s", more)
}

/// The same with the longest time for an answer to a probe.
fn start_asking(root: &Path, probe_timeout: &str, more: &str) -> (Edge, SocketAddr) {
    let (service, argv) = (free_address(), service_argv());
    let more = more.replace("SERVICE", &service.to_string());
    let text = format!(
        "healing = {{ autonomy = 'act', cooldown = '0s', max_actions = 100, verify_window = '30s' }}\n\
         [[service]]\nname = 'kv'\nargv = {argv}\n\
         env = {{ {ADDRESS} = '{service}' }}\nstop_grace = '200ms'\n\
         probe = {{ url = 'http://{service}/', interval = '100ms', timeout = '{probe_timeout}' }}\n{more}"
    );
    (Edge::start(&root.join("s"), &text, LIMITS), service)
}

impl Edge {
    async fn proxy(&self) -> Option<ProxyStatus> {
        self.service().await?.proxy
    }

    async fn well(&self) -> u32 {
        self.until("well", async |edge| {
            let line = edge.service().await?;
            line.pid.filter(|_| line.healthy)
        })
        .await
    }

    /// Where clients connect to.
    async fn listen(&self) -> SocketAddr {
        self.until("told", async |edge| edge.proxy().await).await.listen
    }

    /// One of the program's own commands, as a person at the host gives it.
    async fn command(&self, words: &[&str]) -> ExitCode {
        let mut words: Vec<String> = words.iter().copied().map(str::to_owned).collect();
        words.insert(0, "theriac-edge".to_owned());
        words.extend(["--config".to_owned(), self.file.display().to_string()]);
        tokio::task::spawn_blocking(move || commands::main(words))
            .await
            .unwrap()
    }
}

async fn answers(address: SocketAddr) -> bool {
    let url = ProbeUrl::new(address, "/");
    probe::get(&url, LONG, 1 << 10)
        .await
        .is_ok_and(|(code, body)| code == 200 && body == b"ok")
}

const PROXY: &str = "[service.proxy]\nlisten = '127.0.0.1:0'\nupstream = 'SERVICE'\nhold = '1m'\n";

/// What one client met.
#[derive(Debug, Clone, Copy, Default)]
struct Met {
    asked: u32,
    failed: u32,
    /// The longest time without a good answer.
    longest: Duration,
}

/// Asks again and again, one request after the other, until `done`.
async fn load(address: SocketAddr, done: impl Fn() -> bool) -> Met {
    let (mut met, mut good) = (Met::default(), Instant::now());
    // A client that asks without a pause takes the processor from who starts the service, and on loopback may take its port (a connection to itself).
    let mut pace = tokio::time::interval(Duration::from_millis(5));
    while !done() {
        pace.tick().await;
        met.asked += 1;
        if answers(address).await {
            met.longest = met.longest.max(good.elapsed());
            good = Instant::now();
        } else {
            met.failed += 1;
        }
    }
    met.longest = met.longest.max(good.elapsed());
    met
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_service_loses_fewer_requests_behind_its_proxy_than_without() {
    const KILLS: u32 = 5;
    let root = tempfile::tempdir().unwrap();
    let (edge, service) = start(root.path(), PROXY);
    let mut pid = edge.well().await;
    let listen = edge.listen().await;
    // So that retries are paid for.
    for _ in 0..100 {
        assert!(answers(listen).await);
    }
    let (mut through, mut direct) = (Met::default(), Met::default());
    for _ in 0..KILLS {
        let over = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let clients = [listen, service].map(|address| {
            let over = std::sync::Arc::clone(&over);
            tokio::spawn(load(address, move || {
                over.load(std::sync::atomic::Ordering::Relaxed)
            }))
        });
        signal(pid, Signal::KILL);
        pid = edge
            .until("started again", async |edge| {
                let line = edge.service().await?;
                line.pid.filter(|new| *new != pid && line.healthy)
            })
            .await;
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        // Another kill within the same incident would be another attempt of it.
        edge.until("healed", async |edge| {
            let open = edge
                .incidents()
                .await?
                .into_iter()
                .any(|incident| incident.healed_unix_ms.is_none());
            (!open).then_some(())
        })
        .await;
        for (client, sum) in clients.into_iter().zip([&mut through, &mut direct]) {
            let met = client.await.unwrap();
            sum.asked += met.asked;
            sum.failed += met.failed;
            sum.longest = sum.longest.max(met.longest);
        }
    }
    let told = edge.proxy().await;
    println!("{KILLS} kills: through the proxy {through:?}, directly {direct:?}; {told:?}");
    assert!(
        through.failed <= KILLS && through.failed < direct.failed,
        "{through:?} {direct:?}"
    );
    assert!(told.unwrap().held >= 1);
    edge.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_person_drains_a_service_and_takes_it_back_and_metrics_tell() {
    let root = tempfile::tempdir().unwrap();
    let (edge, _) = start(root.path(), PROXY);
    edge.well().await;
    let listen = edge.listen().await;
    assert!(answers(listen).await);
    assert_eq!(edge.command(&["drain", "other"]).await, ExitCode::FAILURE);
    assert_eq!(edge.command(&["drain", "kv"]).await, ExitCode::SUCCESS);
    let draining =
        async |edge: &Edge, wanted: bool| edge.proxy().await.filter(|proxy| proxy.draining == wanted);
    edge.until("drained", async |edge| draining(edge, true).await)
        .await;
    let (code, _) = probe::get(&ProbeUrl::new(listen, "/"), LONG, 1 << 10)
        .await
        .unwrap();
    assert_eq!(code, 503);
    // Its own probe goes past the proxy.
    edge.service_until("well", |service| service.healthy).await;
    assert_eq!(edge.command(&["undrain", "kv"]).await, ExitCode::SUCCESS);
    edge.until("undrained", async |edge| draining(edge, false).await)
        .await;
    assert!(answers(listen).await);
    let line = "theriac_edge_proxy_requests_total{service=\"kv\",outcome=\"drained\"} 1";
    edge.until("counted", async |edge| {
        let (_, text) = edge.get("/metrics").await?;
        String::from_utf8(text)
            .unwrap()
            .lines()
            .any(|found| found == line)
            .then_some(())
    })
    .await;
    assert_eq!(edge.command(&["status"]).await, ExitCode::SUCCESS);
    edge.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_taken_address_is_told_before_anything_runs() {
    let root = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (edge, _) = start(root.path(), &PROXY.replace("127.0.0.1:0", &address));
    let error = edge.running.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("the proxy of `kv` cannot listen on"), "{error}");
}

/// The service's directory in one of the kernel's trees; removed at the end.
struct Group(PathBuf);

impl Drop for Group {
    fn drop(&mut self) {
        let deadline = Instant::now() + LONG;
        while fs::remove_dir(&self.0).is_err() && self.0.exists() && Instant::now() < deadline {
            std::thread::yield_now();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bound_that_does_not_help_is_taken_back_before_the_next_rung() {
    let found = Hierarchies::read().unwrap();
    let Some((version, cpu)) = found.of(Controller::Cpu) else {
        println!("left out: no cpu controller is mounted here");
        return;
    };
    let name = format!("theriac-edge-test-{}", std::process::id());
    if fs::create_dir(cpu.join(&name)).is_err() {
        println!("left out: no group can be made in {}", cpu.display());
        return;
    }
    let all = [Controller::Cpu, Controller::Memory, Controller::Freezer];
    let _groups: Vec<Group> = all
        .into_iter()
        .filter_map(|controller| Some(Group(found.of(controller)?.1.join(&name))))
        .collect();
    let root = tempfile::tempdir().unwrap();
    // Found by its silence alone: where the kernel's word comes first, a service that had just answered is taken to have been harmed by what does not help.
    let more = format!(
        "healing = {{ stopped_confirm = 50, verify_window = '5s' }}\n[service.cgroup]\nplace = '{name}'\nthrottle_cpu = {{ group = '{name}', for = ['hang'], percent = 50, lasts = '1h' }}\n"
    );
    let (edge, _) = start_asking(root.path(), "1s", &more);
    let pid = edge.well().await;
    let procs = fs::read_to_string(cpu.join(&name).join("cgroup.procs")).unwrap();
    assert!(procs.lines().any(|line| line == pid.to_string()), "{procs}");
    signal(pid, Signal::STOP);
    let bounds = edge.state.join("bounds-kv.json");
    edge.until("bounded", async |_| bounds.exists().then_some(()))
        .await;
    let healed = edge
        .until("healed", async |edge| {
            let incidents = edge.incidents().await?;
            incidents
                .into_iter()
                .find(|incident| incident.healed_unix_ms.is_some())
        })
        .await;
    // A stopped process is helped by no bound; the next rung was the restart.
    assert_eq!(healed.action.as_deref(), Some("restart"));
    edge.until("taken back", async |_| {
        (fs::read_to_string(&bounds).ok()? == "[]").then_some(())
    })
    .await;
    let (file, free) = match version {
        Version::V1 => ("cpu.cfs_quota_us", "-1"),
        Version::V2 => ("cpu.max", "max"),
    };
    let quota = fs::read_to_string(cpu.join(&name).join(file)).unwrap();
    assert!(quota.starts_with(free), "{quota}");
    edge.finish().await;
}
