//! A whole edge in this process, with real services as child processes.
//!
//! The service is this very test program, started again with an address in its environment: see `service_process`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod whole;

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;
use theriac_edge::state_dir::StateDir;
use theriac_edge::status::{Federation, IncidentView, Phase, Storage};
use theriac_edge::store::{StoreReader, Word};
use theriac_edge::{EdgeError, run};
use theriac_heal::types::IncidentId;
use whole::{ADDRESS, Edge, Limits, config, free_address, serve, service_argv, signal};

const DELAY_MS: &str = "THERIAC_TEST_SERVICE_DELAY_MS";
const LIMITS: Limits = Limits {
    answer: Duration::from_mins(1),
    wait: Duration::from_mins(2),
};

/// Not a test of its own: with an address in the environment it is the service that the tests supervise.
#[test]
fn service_process() {
    let Ok(address) = std::env::var(ADDRESS) else {
        return;
    };
    if let Ok(delay_ms) = std::env::var(DELAY_MS) {
        std::thread::sleep(Duration::from_millis(delay_ms.parse().unwrap()));
    }
    serve(&address, || true);
}

impl Edge {
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
}

fn service(more: &str) -> String {
    let (free, argv) = (free_address(), service_argv());
    format!(
        "healing.autonomy = 'act'\nhealing.restore_autonomy = 'act'\nhealing.cooldown = '1s'\n[[service]]\nname = 'kv'\n\
         argv = {argv}\nenv = {{ {ADDRESS} = '{free}' }}\n\
         stop_grace = '200ms'\nprobe = {{ url = 'http://{free}/', interval = '100ms', timeout = '10s' }}\n{more}"
    )
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
        LIMITS,
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
    edge.until("healthy", async |edge| {
        (edge.get("/healthz").await?.0 == 200).then_some(())
    })
    .await;
    let metrics = String::from_utf8(edge.get("/metrics").await.unwrap().1).unwrap();
    assert!(
        metrics.contains("theriac_edge_fits_total{kind=\"fitted\"} 1"),
        "{metrics}"
    );
    let state = edge.state.clone();
    edge.until("the model to be kept", async |edge| {
        edge.state
            .join("model/detector-host.safetensors")
            .exists()
            .then_some(())
    })
    .await;
    edge.finish().await;
    assert!(
        !state.join("ledger.log").exists(),
        "an edge that never joined has nothing to charge"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_service_is_started_again_and_verified() {
    let root = tempfile::tempdir().unwrap();
    let edge = Edge::start(&root.path().join("state"), &service(""), LIMITS);
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
    assert!(healed >= incident.acted_unix_ms.unwrap());
    assert_ne!(edge.well(0).await, pid);
    edge.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_service_is_found_from_outside_and_replaced() {
    let root = tempfile::tempdir().unwrap();
    let edge = Edge::start(&root.path().join("state"), &service(""), LIMITS);
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
    let edge = Edge::start(&root.path().join("state"), &slow, LIMITS);
    edge.well(0).await;
    assert_eq!(edge.incidents().await.unwrap(), []);
    edge.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_leave_to_act_a_crash_waits_for_a_person() {
    let root = tempfile::tempdir().unwrap();
    let state = root.path().join("state");
    let edge = Edge::start(&state, &service("").replace("'act'", "'recommend'"), LIMITS);
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
    let reader = decisions(&state);
    let incident = IncidentId(waiting.id);
    // The page shows it a moment before the store has it.
    let plan = edge
        .until("planned", async |_| reader.incident(incident).unwrap()?.plan)
        .await;
    let word = |plan: Option<String>| Word {
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
    let edge = Edge::start(&root.path().join("state"), &service(&state), LIMITS);
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
    let edge = Edge::start(&root.path().join("state"), &service(&state), LIMITS);
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
    let edge = Edge::start(&root.path().join("state"), &service(&state), LIMITS);
    let told = failure(&edge).await;
    assert!(told.contains("status: 2") && told.contains("usage"), "{told}");
    edge.finish().await;

    // A state that is larger than any disk: the state directory of the edge has room all the same.
    let file = std::fs::File::create(data.join("large")).unwrap();
    file.set_len(8 << 40).unwrap();
    let state = format!("state = {{ dir = {data:?}, interval = '1s' }}\n");
    let edge = Edge::start(&root.path().join("state"), &service(&state), LIMITS);
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
    let edge = Edge::start(&state, "", LIMITS);
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
    let argv = service_argv();
    let state = root.path().join("state");
    // It takes its time before it finds that it cannot have the port.
    let edge = Edge::start(
        &state,
        &format!(
            "healing = {{ autonomy = 'act', cooldown = '0s' }}\n[[service]]\nname = 'kv'\n\
             argv = {argv}\n\
             env = {{ {ADDRESS} = '{address}', {DELAY_MS} = '1500' }}\n\
             probe = {{ url = 'http://{address}/', interval = '100ms', timeout = '10s', start_grace = '0s' }}\n"
        ),
        LIMITS,
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
    let reader = decisions(&state);
    let retry = Word {
        incident: IncidentId(incident.id),
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
    let (front, behind) = (proxy.local_addr().unwrap(), free_address());
    let passing = tokio::spawn(async move {
        loop {
            let (mut client, _) = proxy.accept().await.unwrap();
            // Whom it cannot reach it cannot answer for.
            if let Ok(mut service) = tokio::net::TcpStream::connect(behind).await {
                let _passed = tokio::io::copy_bidirectional(&mut client, &mut service).await;
            }
        }
    });
    let argv = service_argv();
    let edge = Edge::start(
        &root.path().join("state"),
        &format!(
            "healing = {{ autonomy = 'act', cooldown = '0s', verify_window = '9s' }}\n[[service]]\nname = 'kv'\n\
             argv = {argv}\n\
             env = {{ {ADDRESS} = '{behind}' }}\n\
             probe = {{ url = 'http://{front}/', interval = '100ms', timeout = '10s', start_grace = '30s' }}\n"
        ),
        LIMITS,
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
    let edge = Edge::start(&state, &more, LIMITS);
    signal(edge.well(0).await, Signal::KILL);
    let first = edge.healed().await;
    edge.finish().await;
    let edge = Edge::start(&state, &more, LIMITS);
    edge.well(0).await;
    assert_eq!(edge.incidents().await.unwrap(), [first]);
    edge.finish().await;
}

/// Nobody has said that it may be started: what a restart of the edge is done for is another matter.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_down_by_itself_and_is_a_persons_stays_down_over_a_restart_of_the_edge() {
    let root = tempfile::tempdir().unwrap();
    let state = root.path().join("state");
    let more = service("").replace("'act'", "'recommend'");
    let edge = Edge::start(&state, &more, LIMITS);
    signal(edge.well(0).await, Signal::KILL);
    let in_state = |wanted: &'static str| {
        async move |edge: &Edge| {
            let incidents = edge.incidents().await?;
            incidents.into_iter().find(|incident| incident.state == wanted)
        }
    };
    let waiting = edge.until("waiting", in_state("awaiting_approval")).await;
    let incident = IncidentId(waiting.id);
    let planned = async |_: &Edge| decisions(&state).incident(incident).unwrap()?.plan;
    let plan = edge.until("planned", planned).await;
    let word = |approve, plan| Word {
        incident,
        approve,
        plan,
        signature: None,
    };
    decisions(&state).decide(&word(false, Some(plan.hash()))).unwrap();
    edge.until("declined", in_state("handed_to_human")).await;
    edge.finish().await;

    let edge = Edge::start(&state, &more, LIMITS);
    edge.until("there again", in_state("handed_to_human")).await;
    edge.service_until("told", |service| service.state == "stopped")
        .await;
    decisions(&state).decide(&word(true, None)).unwrap();
    let healed = edge.healed().await;
    // Had the edge started it by itself, it would have recovered without an action.
    assert_eq!((healed.id, healed.actions.len()), (waiting.id, 1), "{healed:?}");
    edge.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_crashed_while_healing_was_stopped_is_started_by_no_restart_of_the_edge() {
    let root = tempfile::tempdir().unwrap();
    let state = root.path().join("state");
    let more = service("");
    let edge = Edge::start(&state, &more, LIMITS);
    let pid = edge.well(0).await;
    let switch = StateDir::existing(&state).stop_file();
    std::fs::write(&switch, "").unwrap();
    edge.until("stopped", async |edge| {
        edge.status().await?.healing_stopped.then_some(())
    })
    .await;
    signal(pid, Signal::KILL);
    let open = edge
        .until("seen", async |edge| edge.incidents().await?.into_iter().next())
        .await;
    edge.finish().await;

    let edge = Edge::start(&state, &more, LIMITS);
    edge.service_until("told", |service| service.state == "stopped")
        .await;
    assert!(edge.incidents().await.unwrap()[0].actions.is_empty());
    std::fs::remove_file(&switch).unwrap();
    let healed = edge.healed().await;
    assert_eq!((healed.id, healed.actions.len()), (open.id, 1), "{healed:?}");
    edge.finish().await;
}

/// What a person's words go through.
fn decisions(state: &Path) -> StoreReader {
    StoreReader::open(&state.join("edge.db")).unwrap().unwrap()
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    // What a running edge removes meanwhile is not there any more.
    for entry in std::fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(walk(&path));
        } else {
            files.push(path);
        }
    }
    files
}
