//! kill −9 of an edge that supervises a service: the service lives on, and exactly one of it.

use std::fs;
use std::time::{Duration, Instant};

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use theriac_edge::status::{IncidentView, Phase, ServiceStatus, Status};

use crate::child::until;
use crate::fleet::{Edge, Service};

/// Half of what it would take to learn anew after [`SLOW`]. The design's bar is 2 s on an idle host; a test host is busy.
const BACK_WITHIN: Duration = Duration::from_secs(30);
const QUICK: &str = "warm_up_rows = 60\n";
const SLOW: &str = "warm_up_rows = 600\n";

fn healthy(status: &Status) -> Option<&ServiceStatus> {
    status
        .services
        .first()
        .filter(|service| service.healthy && service.pid.is_some())
}

/// Waits until the service is well, and gives its process.
fn until_healthy(edge: &mut Edge) -> u32 {
    let status = edge.until("a healthy service", |status| healthy(status).is_some());
    status.services[0].pid.unwrap()
}

/// Waits for the end of every incident of the service, and gives them.
fn until_over(edge: &Edge) -> Vec<IncidentView> {
    until("the end of every incident", || {
        let incidents = edge.incidents();
        let is_over = |state: &str| state == "healed" || state == "recovered";
        let ours = incidents.iter().filter(|incident| incident.service == "kv");
        ours.map(|incident| &incident.state)
            .all(|state| is_over(state))
            .then_some(incidents)
    })
}

#[test]
fn a_restarted_edge_takes_the_running_service_over_and_detects_at_once() {
    let root = tempfile::tempdir().unwrap();
    let service = Service::new(root.path());
    let mut edge = Edge::new(root.path(), "press-1", &service.table("1h"));
    edge.start();
    edge.until("a model of normal", |status| status.phase == Phase::Watching);
    let pid = until_healthy(&mut edge);
    service.put("key", "value");
    // The model is written beside the sample loop.
    until("the model on disk", || {
        fs::read_dir(edge.dir.join("model"))
            .unwrap()
            .any(|file| file.unwrap().path().extension().is_some_and(|end| end == "json"))
            .then_some(())
    });

    edge.kill();
    assert_eq!(
        service.processes(),
        [pid],
        "the service went down with its healer"
    );
    edge.reconfigure(QUICK, SLOW);
    let begun = Instant::now();
    edge.start();
    edge.until("detection and the service as before", |status| {
        status.phase == Phase::Watching && healthy(status).is_some()
    });
    let took = begun.elapsed();
    assert!(took < BACK_WITHIN, "detection was back after {took:?}");
    assert_eq!(until_healthy(&mut edge), pid, "another process serves now");
    assert_eq!(service.processes(), [pid]);

    // It heals what it did not start.
    service.kill();
    let next = edge
        .until("a new process", |status| {
            healthy(status).is_some_and(|service| service.pid != Some(pid))
        })
        .services[0]
        .pid;
    assert_eq!(service.processes(), [next.unwrap()]);
    let incident = until("the incident's end", || {
        edge.incidents()
            .into_iter()
            .find(|incident| incident.healed_unix_ms.is_some())
    });
    assert_eq!(
        (incident.service.as_str(), incident.class.as_str()),
        ("kv", "crash")
    );

    // The service dies while nobody watches.
    edge.kill();
    service.kill();
    edge.start();
    let last = until_healthy(&mut edge);
    assert_eq!(service.processes(), [last]);
    assert_eq!(service.get("key").as_deref(), Some("value"));
    edge.stop();
    assert_eq!(service.processes(), [0; 0], "an orderly end leaves nothing");
    println!("detection was back after {took:?}");
}

#[test]
fn an_edge_killed_while_it_heals_ends_with_one_healthy_service() {
    const KILLS: u32 = 4;
    let root = tempfile::tempdir().unwrap();
    let service = Service::new(root.path());
    let mut edge = Edge::new(root.path(), "press-1", &service.table("1h"));
    edge.start();
    until_healthy(&mut edge);
    service.put("key", "value");
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for kill in 0..KILLS {
        service.kill();
        std::thread::sleep(Duration::from_millis(rng.random_range(0..250)));
        edge.kill();
        edge.start();
        let pid = until_healthy(&mut edge);
        assert_eq!(service.processes(), [pid], "after kill {kill}");
        // A crash that comes before the start is verified is one more of the same incident, whose starts are counted.
        until_over(&edge);
        assert_eq!(service.get("key").as_deref(), Some("value"));
    }
    let ended = until_over(&edge);
    assert!(!ended.is_empty());
    edge.stop();
}

/// The service's state is corrupt and the newest checkpoint is cut short: the one before it comes back, and nothing is thrown
/// away.
#[test]
fn corrupt_state_is_replaced_by_the_last_checkpoint_that_is_whole() {
    let root = tempfile::tempdir().unwrap();
    let service = Service::new(root.path());
    let mut edge = Edge::new(root.path(), "press-1", &service.table("1s"));
    edge.start();
    until_healthy(&mut edge);
    service.put("key", "value");
    let seen = edge.until("the service", |status| !status.services.is_empty());
    let before = seen.services[0].checkpoints_taken;
    // One may have been under way.
    edge.until("two that were begun since", |status| {
        status.services[0].checkpoints_taken >= before + 3
    });
    edge.kill();
    service.kill();
    until("the service to be gone", || {
        service.processes().is_empty().then_some(())
    });

    let checkpoints = edge.dir.join("checkpoints/kv");
    let mut whole: Vec<_> = fs::read_dir(&checkpoints)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("MANIFEST").is_file())
        .collect();
    whole.sort();
    assert!(whole.len() >= 2, "{whole:?}");
    let newest = whole.pop().unwrap();
    for file in fs::read_dir(newest.join("tree")).unwrap() {
        let path = file.unwrap().path();
        if path.file_name().unwrap().to_str().unwrap().starts_with("log-") {
            fs::OpenOptions::new()
                .write(true)
                .open(&path)
                .unwrap()
                .set_len(5)
                .unwrap();
        }
    }
    let log = service.state.join("log-0");
    let mut bytes = fs::read(&log).unwrap();
    bytes[30] ^= 0xff;
    fs::write(&log, &bytes).unwrap();

    edge.start();
    until_healthy(&mut edge);
    assert_eq!(service.get("key").as_deref(), Some("value"));
    let incident = until("the incident's end", || {
        edge.incidents()
            .into_iter()
            .find(|incident| incident.healed_unix_ms.is_some())
    });
    assert_eq!(
        (incident.class.as_str(), incident.action.as_deref()),
        ("corruption", Some("restore_and_start"))
    );
    let kept: Vec<_> = fs::read_dir(root.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("kv.replaced-"))
        .collect();
    assert_eq!(kept.len(), 1, "the corrupt state is kept for a person");
    assert_eq!(fs::read(root.path().join(&kept[0]).join("log-0")).unwrap(), bytes);
    assert!(
        checkpoints
            .join("quarantine")
            .join(newest.file_name().unwrap())
            .exists(),
        "the cut checkpoint is kept for a person"
    );
    edge.stop();
}
