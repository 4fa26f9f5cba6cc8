//! A whole edge in this process, with real services as child processes.
//!
//! The service is this very test program, started again with an address in its environment: see `service_process`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use theriac_edge::config::EdgeConfig;
use theriac_edge::probe::{self, ProbeUrl};
use theriac_edge::status::{Federation, IncidentView, Phase, Status, Storage};
use theriac_edge::{EdgeError, run};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

const ADDRESS: &str = "THERIAC_TEST_SERVICE";
const DELAY_MS: &str = "THERIAC_TEST_SERVICE_DELAY_MS";

/// Not a test of its own: with an address in the environment it is the service that the tests supervise.
#[test]
fn service_process() {
    let Ok(address) = std::env::var(ADDRESS) else {
        return;
    };
    if let Ok(delay_ms) = std::env::var(DELAY_MS) {
        std::thread::sleep(Duration::from_millis(delay_ms.parse().unwrap()));
    }
    let listener = TcpListener::bind(address).unwrap();
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        let mut request = [0; 1024];
        // A prober that went away is none of the service's business.
        if stream.read(&mut request).is_ok() {
            let _sent = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nok").is_ok();
        }
    }
}

struct Edge {
    state: PathBuf,
    stop: oneshot::Sender<()>,
    running: JoinHandle<Result<(), EdgeError>>,
}

impl Edge {
    fn start(state: &Path, more: &str) -> Self {
        let config = config(state, more);
        let (stop, stopped) = oneshot::channel::<()>();
        let until = async move {
            let _told = stopped.await.is_ok();
        };
        let running = tokio::spawn(async move { Box::pin(run(config, None, until)).await });
        Self {
            state: state.to_owned(),
            stop,
            running,
        }
    }

    async fn get(&self, path: &str) -> Option<(u16, Vec<u8>)> {
        let address: SocketAddr = std::fs::read_to_string(self.state.join("http.addr"))
            .ok()?
            .parse()
            .ok()?;
        probe::get(&ProbeUrl::new(address, path), Duration::from_secs(5), 1 << 20)
            .await
            .ok()
    }

    async fn status(&self) -> Option<Status> {
        serde_json::from_slice(&self.get("/status").await?.1).ok()
    }

    async fn incidents(&self) -> Option<Vec<IncidentView>> {
        serde_json::from_slice(&self.get("/incidents").await?.1).ok()
    }

    async fn until<T>(&self, what: &str, mut look: impl AsyncFnMut(&Self) -> Option<T>) -> T {
        let deadline = Instant::now() + Duration::from_secs(30);
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

    /// The process of the service, once it answers and has a checkpoint where it should have one.
    async fn well(&self, checkpoints: u64) -> u32 {
        self.until("well", async |edge| {
            let status = edge.status().await?;
            let service = status.services.first()?;
            (service.healthy && service.checkpoints >= checkpoints)
                .then_some(service.pid)
                .flatten()
        })
        .await
    }

    async fn healed(&self) -> IncidentView {
        self.until("healed", async |edge| {
            edge.incidents()
                .await?
                .into_iter()
                .find(|incident| incident.healed_unix_ms.is_some())
        })
        .await
    }

    async fn finish(self) {
        drop(self.stop);
        self.running.await.unwrap().unwrap();
    }
}

fn config(state: &Path, more: &str) -> EdgeConfig {
    let file = state.with_extension("toml");
    std::fs::write(
        &file,
        format!(
            "state_dir = '{}'\nhttp.listen = '127.0.0.1:0'\n{more}",
            state.display()
        ),
    )
    .unwrap();
    EdgeConfig::load(Some(&file), []).unwrap()
}

fn service(more: &str) -> String {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let program = std::env::current_exe().unwrap().display().to_string();
    format!(
        "healing.autonomy = 'act'\nhealing.restore_autonomy = 'act'\nhealing.cooldown = '1s'\n[[service]]\nname = 'kv'\n\
         argv = ['{program}', '--exact', 'service_process', '--nocapture']\nenv = {{ {ADDRESS} = '{free}' }}\n\
         stop_grace = '200ms'\nprobe = {{ url = 'http://{free}/', interval = '100ms', timeout = '500ms' }}\n{more}"
    )
}

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal).unwrap();
}

fn now_ms() -> u64 {
    let since = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    u64::try_from(since.as_millis()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edge_without_configuration_watches_the_host_with_federation_off() {
    let root = tempfile::tempdir().unwrap();
    let edge = Edge::start(
        &root.path().join("state"),
        "sampling.interval = '100ms'\ndetection.warm_up_rows = 60\n",
    );
    let status = edge
        .until("watching", async |edge| {
            edge.status()
                .await
                .filter(|status| status.phase == Phase::Watching)
        })
        .await;
    assert_eq!(
        (status.federation, status.storage),
        (Federation::Off, Storage::Ok)
    );
    assert!(status.federation_detail.unwrap().contains("join") && status.services.is_empty());
    assert_eq!(edge.get("/healthz").await.unwrap().0, 200);
    let metrics = String::from_utf8(edge.get("/metrics").await.unwrap().1).unwrap();
    assert!(
        metrics.contains("theriac_edge_fits_total{kind=\"fitted\"} 1"),
        "{metrics}"
    );
    let state = edge.state.clone();
    edge.finish().await;
    assert!(
        state.join("model/detector-host.safetensors").exists(),
        "the model was not kept"
    );
    assert!(
        !state.join("ledger.log").exists(),
        "an edge that never joined has nothing to charge"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_service_is_started_again_and_verified() {
    let root = tempfile::tempdir().unwrap();
    let edge = Edge::start(&root.path().join("state"), &service(""));
    let pid = edge.well(0).await;
    let killed = now_ms();
    signal(pid, Signal::KILL);
    let incident = edge.healed().await;
    let healed = incident.healed_unix_ms.unwrap();
    assert_eq!(
        (incident.class.as_str(), incident.action.as_deref()),
        ("crash", Some("start"))
    );
    assert_eq!(
        (incident.service.as_str(), incident.verdict.as_deref()),
        ("kv", Some("healed"))
    );
    assert!(
        incident.detected_unix_ms >= killed && incident.acted_unix_ms.unwrap() >= incident.detected_unix_ms
    );
    assert!(healed - killed < 10_000, "healed after {} ms", healed - killed);
    assert_ne!(edge.well(0).await, pid);
    edge.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_service_is_found_from_outside_and_replaced() {
    let root = tempfile::tempdir().unwrap();
    let edge = Edge::start(&root.path().join("state"), &service(""));
    let pid = edge.well(0).await;
    signal(pid, Signal::STOP);
    let incident = edge.healed().await;
    assert_eq!(
        (incident.class.as_str(), incident.action.as_deref()),
        ("hang", Some("restart"))
    );
    let next = edge.well(0).await;
    assert_ne!(next, pid);
    edge.finish().await;
    let gone = |pid: u32| !Path::new(&format!("/proc/{pid}")).exists();
    assert!(gone(pid) && gone(next), "a service outlived its edge");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_takes_its_time_to_start_is_left_alone() {
    let root = tempfile::tempdir().unwrap();
    let slow = service("").replace("env = { ", &format!("env = {{ {DELAY_MS} = '1500', "));
    let edge = Edge::start(&root.path().join("state"), &slow);
    edge.well(0).await;
    assert_eq!(edge.incidents().await.unwrap(), []);
    edge.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_leave_to_act_a_crash_waits_for_a_person() {
    let root = tempfile::tempdir().unwrap();
    let state = root.path().join("state");
    let edge = Edge::start(&state, &service("").replace("'act'", "'recommend'"));
    let pid = edge.well(0).await;
    signal(pid, Signal::KILL);
    let waiting = edge
        .until("waiting", async |edge| {
            edge.incidents()
                .await?
                .into_iter()
                .find(|incident| incident.state == "awaiting_approval")
        })
        .await;
    assert_eq!(waiting.acted_unix_ms, None);
    let reader = theriac_edge::store::StoreReader::open(&state.join("edge.db"))
        .unwrap()
        .unwrap();
    let incident = theriac_heal::types::IncidentId(waiting.id);
    // The page shows it a moment before the store has it.
    let plan = edge
        .until("planned", async |_| reader.incident(incident).unwrap()?.plan)
        .await;
    let word = |plan: Option<String>| theriac_edge::store::Word {
        incident,
        approve: true,
        plan,
        signature: None,
    };
    reader.decide(&word(Some("another plan".to_owned()))).unwrap();
    let why = edge
        .until("refused", async |_| {
            let why = reader.incident(incident).unwrap()?.why();
            why.contains("another plan, or of one that has expired, was refused")
                .then_some(why)
        })
        .await;
    assert!(!why.contains("Done:"), "{why}");
    reader.decide(&word(Some(plan.hash()))).unwrap();
    assert_eq!(edge.healed().await.id, waiting.id);
    edge.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn corrupt_state_is_replaced_by_the_last_good_checkpoint_and_kept_for_a_person() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("data");
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("a"), "good").unwrap();
    let state = format!(
        "state = {{ dir = {data:?}, check = ['grep', '-q', 'good', '{{state}}/a'], interval = '1s' }}\n"
    );
    let edge = Edge::start(&root.path().join("state"), &service(&state));
    let pid = edge.well(1).await;
    std::fs::write(data.join("a"), "rotten").unwrap();
    signal(pid, Signal::KILL);
    let incident = edge.healed().await;
    assert_eq!(
        incident.action.as_deref(),
        Some("restore_and_start"),
        "{incident:?}"
    );
    assert_eq!(std::fs::read_to_string(data.join("a")).unwrap(), "good");
    let kept = walk(root.path())
        .into_iter()
        .any(|file| std::fs::read(&file).is_ok_and(|bytes| bytes == b"rotten"));
    assert!(kept, "the replaced state was deleted");
    edge.well(1).await;
    edge.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kept_checkpoint_that_was_damaged_since_is_set_aside_and_another_one_taken() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("data");
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("a"), "good").unwrap();
    let state = format!("state = {{ dir = {data:?}, interval = '1h', verify_every = '1s' }}\n");
    let edge = Edge::start(&root.path().join("state"), &service(&state));
    edge.well(1).await;
    let copies = edge.state.join("checkpoints/kv");
    let kept = walk(&copies)
        .into_iter()
        .find(|file| file.ends_with("tree/a"))
        .unwrap();
    std::fs::write(&kept, "goof").unwrap();
    edge.until("another", async |edge| {
        let taken = edge.status().await?.services.first()?.checkpoints_taken;
        (taken == 2).then_some(())
    })
    .await;
    let copies: Vec<(bool, String)> = walk(&copies)
        .into_iter()
        .filter(|file| file.ends_with("tree/a"))
        .map(|file| {
            let aside = file.components().any(|part| part.as_os_str() == "quarantine");
            (aside, std::fs::read_to_string(file).unwrap())
        })
        .collect();
    assert!(
        copies.len() == 2
            && copies.contains(&(true, "goof".to_owned()))
            && copies.contains(&(false, "good".to_owned())),
        "{copies:?}"
    );
    edge.well(1).await;
    edge.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checkpoints_that_cannot_be_taken_are_told_and_do_not_stop_anything_else() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let failure = async |edge: &Edge| {
        edge.until("word of the failure", async |edge| {
            let status = edge.status().await?;
            let line = status.services.first()?;
            assert_eq!(line.checkpoints, 0);
            line.checkpoint_failure.clone()
        })
        .await
    };
    // A check with a usage error.
    let state = format!(
        "state = {{ dir = {data:?}, check = ['sh', '-c', 'echo usage >&2; exit 2', '{{state}}'], interval = '1s' }}\n"
    );
    let edge = Edge::start(&root.path().join("state"), &service(&state));
    let told = failure(&edge).await;
    assert!(told.contains("status: 2") && told.contains("usage"), "{told}");
    edge.finish().await;

    // A state that is larger than any disk: the state directory of the edge has room all the same.
    let file = std::fs::File::create(data.join("large")).unwrap();
    file.set_len(8 << 40).unwrap();
    let state = format!("state = {{ dir = {data:?}, interval = '1s' }}\n");
    let edge = Edge::start(&root.path().join("state"), &service(&state));
    let told = failure(&edge).await;
    assert!(told.contains("bytes are needed"), "{told}");
    let metric = |page: &str, name: &str| {
        let line = page.lines().find(|line| line.starts_with(name))?;
        line.rsplit(' ').next()?.parse::<f64>().ok()
    };
    let page = edge
        .until("two failed attempts", async |edge| {
            let page = String::from_utf8(edge.get("/metrics").await?.1).ok()?;
            let failed = metric(&page, "theriac_edge_checkpoints_total{kind=\"disk_full\"}")?;
            (failed >= 2.0).then_some(page)
        })
        .await;
    assert_eq!(metric(&page, "theriac_edge_storage_failures_total"), Some(0.0));
    assert_eq!(edge.status().await.unwrap().storage, Storage::Ok);
    edge.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_edge_on_one_state_directory_and_a_taken_port_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let state = root.path().join("state");
    let edge = Edge::start(&state, "");
    edge.until("up", async |edge| edge.status().await).await;
    let error = run(config(&state, ""), None, std::future::ready(()))
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains(&std::process::id().to_string()),
        "{error}"
    );
    let taken = std::fs::read_to_string(state.join("http.addr")).unwrap();
    let mut other = config(&root.path().join("other"), "");
    other.http.listen = taken.parse().unwrap();
    let error = run(other, None, std::future::ready(())).await.unwrap_err();
    assert!(
        matches!(&error, EdgeError::Listen { .. }) && error.to_string().contains(&taken),
        "{error}"
    );
    edge.finish().await;
}

/// The port is another program's, which answers for as long as the service lives.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_dies_is_not_healed_by_another_program_on_its_port_and_a_person_has_it_started_again() {
    let root = tempfile::tempdir().unwrap();
    let stranger = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = stranger.local_addr().unwrap();
    let answering = tokio::spawn(async move {
        loop {
            use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
            let (mut stream, _) = stranger.accept().await.unwrap();
            // A prober that went away is none of its business.
            let _read = stream.read(&mut [0; 1024]).await;
            let _sent = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nok").await;
        }
    });
    let program = std::env::current_exe().unwrap().display().to_string();
    let state = root.path().join("state");
    // It takes its time before it finds that it cannot have the port.
    let edge = Edge::start(
        &state,
        &format!(
            "healing = {{ autonomy = 'act', cooldown = '0s' }}\n[[service]]\nname = 'kv'\n\
             argv = ['{program}', '--exact', 'service_process', '--nocapture']\n\
             env = {{ {ADDRESS} = '{address}', {DELAY_MS} = '1500' }}\n\
             probe = {{ url = 'http://{address}/', interval = '100ms', timeout = '500ms', start_grace = '0s' }}\n"
        ),
    );
    let handed = |state: &'static str| {
        async move |edge: &Edge| {
            let incidents = edge.incidents().await?;
            assert!(
                incidents.iter().all(|incident| incident.healed_unix_ms.is_none()) || state == "healed",
                "{incidents:?}"
            );
            incidents.into_iter().find(|incident| incident.state == state)
        }
    };
    let incident = edge.until("handed over", handed("handed_to_human")).await;
    answering.abort();
    assert!(answering.await.unwrap_err().is_cancelled());
    let reader = theriac_edge::store::StoreReader::open(&state.join("edge.db"))
        .unwrap()
        .unwrap();
    let retry = theriac_edge::store::Word {
        incident: theriac_heal::types::IncidentId(incident.id),
        approve: true,
        plan: None,
        signature: None,
    };
    reader.decide(&retry).unwrap();
    let healed = edge.until("healed", handed("healed")).await;
    assert_eq!(healed.id, incident.id);
    edge.finish().await;
}

/// The port that is asked belongs to a proxy, which passes what it is asked on, and was there before.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_behind_a_proxy_of_somebody_else_is_well_and_is_healed() {
    let root = tempfile::tempdir().unwrap();
    let proxy = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (front, behind) = (proxy.local_addr().unwrap(), {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap()
    });
    let passing = tokio::spawn(async move {
        loop {
            let (mut client, _) = proxy.accept().await.unwrap();
            // Whom it cannot reach it cannot answer for.
            if let Ok(mut service) = tokio::net::TcpStream::connect(behind).await {
                let _passed = tokio::io::copy_bidirectional(&mut client, &mut service).await;
            }
        }
    });
    let program = std::env::current_exe().unwrap().display().to_string();
    let edge = Edge::start(
        &root.path().join("state"),
        &format!(
            "healing = {{ autonomy = 'act', cooldown = '0s', verify_window = '9s' }}\n[[service]]\nname = 'kv'\n\
             argv = ['{program}', '--exact', 'service_process', '--nocapture']\n\
             env = {{ {ADDRESS} = '{behind}' }}\n\
             probe = {{ url = 'http://{front}/', interval = '100ms', timeout = '500ms', start_grace = '2s' }}\n"
        ),
    );
    let first = edge.well(0).await;
    signal(first, Signal::KILL);
    let healed = edge.healed().await;
    assert_eq!(healed.actions.len(), 1, "{healed:?}");
    // It goes on so: nobody restarts it for its proxy.
    let second = edge.well(0).await;
    assert_ne!(first, second);
    assert_eq!(edge.incidents().await.unwrap().len(), 1);
    edge.finish().await;
    passing.abort();
    assert!(passing.await.unwrap_err().is_cancelled());
}

#[tokio::test(flavor = "multi_thread")]
async fn incidents_and_budgets_survive_the_edge() {
    let root = tempfile::tempdir().unwrap();
    let state = root.path().join("state");
    let more = service("");
    let edge = Edge::start(&state, &more);
    signal(edge.well(0).await, Signal::KILL);
    let first = edge.healed().await;
    edge.finish().await;
    let edge = Edge::start(&state, &more);
    edge.well(0).await;
    assert_eq!(edge.incidents().await.unwrap(), [first]);
    edge.finish().await;
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(walk(&path));
        } else {
            files.push(path);
        }
    }
    files
}
