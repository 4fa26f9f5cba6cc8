//! A PostgreSQL server supervised by a whole edge: proved checkpoints, a crash healed by one start, the commands, a restore.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "../../heal/tests/support/mod.rs"]
mod support;

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use support::Cluster;
use theriac_edge::config::EdgeConfig;
use theriac_edge::probe::{self, ProbeUrl};
use theriac_edge::run;
use theriac_edge::status::{ServiceStatus, Status};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_is_checkpointed_healed_verified_and_restored() {
    let mut cluster = Cluster::made(true, &[]);
    let state = cluster.dir.path().join("edge");
    let file = cluster.dir.path().join("edge.toml");
    let output = cluster.dir.path().join("service.log");
    let socket = cluster.target.socket_dir.display();
    std::fs::write(
        &file,
        format!(
            "state_dir = {state:?}\nhttp.listen = '127.0.0.1:0'\n[[service]]\nname = 'pg'\nargv = {:?}\noutput = {output:?}\nstop_grace = '30s'\n\
             probe = {{ url = 'postgresql://postgres@{socket}:5432/postgres', interval = '100ms', start_grace = '30s' }}\n\
             state = {{ dir = {:?}, interval = '1h' }}\n\
             checkpoint = {{ kind = 'postgresql', socket_dir = '{socket}', user = 'postgres', requests = 20, \
             statements = ['select count(*) from kept where n = $1'] }}\n\
             healing = {{ autonomy = 'act' }}\n",
            cluster.argv(),
            cluster.data(),
        ),
    )
    .unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let config = EdgeConfig::load(Some(&file), []).unwrap();
    let running = tokio::spawn(async move {
        let until = async move { drop(stopped.await) };
        Box::pin(run(config, None, until)).await
    });
    until("up", &state, |service| service.healthy).await;
    cluster.psql("create table kept as select n from generate_series(1, 1000) n");
    let service = until("checkpointed", &state, |service| service.checkpoints == 1).await;

    // A crash: one start, no failed one.
    let pid = service.pid.unwrap();
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL).unwrap();
    let healed = until("healed", &state, |service| {
        service.healthy && service.pid.is_some_and(|now| now != pid)
    })
    .await;
    assert_eq!(healed.restarts, 1);
    let log = std::fs::read_to_string(&output).unwrap();
    assert!(
        !log.contains("pre-existing shared memory") && !log.contains("already exists"),
        "{log}"
    );

    let listed = json(&edge(&file, &["checkpoints", "list"]));
    assert_eq!(listed[0]["state"], "valid, proved by a shadow run", "{listed}");
    let number = listed[0]["sequence"].to_string();
    let verified = json(&edge(&file, &["checkpoints", "verify", "pg", &number]));
    assert_eq!(verified["good"], true);
    let refused = edge(&file, &["checkpoints", "restore", "pg", &number]);
    assert_eq!(refused.status.code(), Some(75), "the edge runs: {refused:?}");
    let unknown = edge(&file, &["checkpoints", "verify", "nobody", "1"]);
    assert!(
        String::from_utf8_lossy(&unknown.stderr).contains("TH-E0360"),
        "{unknown:?}"
    );

    cluster.psql("drop table kept");
    drop(stop);
    running.await.unwrap().unwrap();
    // Somebody else's server on the same data: it is not replaced under it.
    cluster.begin();
    let refused = edge(&file, &["checkpoints", "restore", "pg", &number]);
    assert!(
        String::from_utf8_lossy(&refused.stderr).contains("TH-E0362"),
        "{refused:?}"
    );
    cluster.stop();
    let restored = json(&edge(&file, &["checkpoints", "restore", "pg", &number]));
    assert!(
        Path::new(restored["replaced"].as_str().unwrap())
            .join("PG_VERSION")
            .exists()
    );
    cluster.begin();
    assert_eq!(cluster.psql("select count(*) from kept"), "1000");
    cluster.stop();

    // A flipped bit in the stored copy is found and named.
    let path = listed[0]["path"].as_str().unwrap().to_owned();
    let version = Path::new(&path).join("tree/PG_VERSION");
    std::fs::write(&version, "9\n").unwrap();
    let bad = edge(&file, &["checkpoints", "verify", "pg", &number]);
    assert!(
        bad.status.code() == Some(1) && String::from_utf8_lossy(&bad.stderr).contains("TH-E0361"),
        "{bad:?}"
    );
}

async fn until(what: &str, state: &Path, good: impl Fn(&ServiceStatus) -> bool) -> ServiceStatus {
    let begun = Instant::now();
    loop {
        let found = service(state).await;
        if let Some(service) = found.clone().filter(|service| good(service)) {
            return service;
        }
        assert!(
            begun.elapsed() < Duration::from_mins(1),
            "not {what} in time: {found:?}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn service(state: &Path) -> Option<ServiceStatus> {
    let address: SocketAddr = std::fs::read_to_string(state.join("http.addr"))
        .ok()?
        .parse()
        .ok()?;
    let url = ProbeUrl::new(address, "/status");
    let (_, body) = probe::get(&url, Duration::from_secs(5), 1 << 20).await.ok()?;
    let status: Status = serde_json::from_slice(&body).ok()?;
    status.services.into_iter().next()
}

fn edge(config: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_theriac-edge"))
        .args(["--format", "json"])
        .args(arguments)
        .arg("--config")
        .arg(config)
        .output()
        .unwrap()
}

fn json(output: &Output) -> serde_json::Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}
