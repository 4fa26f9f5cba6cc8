//! A PostgreSQL server supervised by a whole edge: proved checkpoints, a crash healed by one start, the commands, a restore.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "../../heal/tests/support/mod.rs"]
mod support;
mod whole;

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::Cluster;
use theriac_heal::postgres::PostgresError;
use theriac_heal::postgres::session::{Session, Target};
use whole::{Edge, Limits, signal};

const LIMITS: Limits = Limits {
    answer: Duration::from_mins(1),
    wait: Duration::from_mins(2),
};

/// An edge that supervises the server. `more` stands in the service's own table; `SOCKET` in it is the directory of the server's socket.
fn start(cluster: &Cluster, more: &str) -> Edge {
    let text = format!(
        "[[service]]\nname = 'pg'\nargv = {:?}\nstop_grace = '30s'\nstate = {{ dir = '{}', interval = '1h' }}\n{}",
        cluster.argv(),
        cluster.data().display(),
        more.replace("SOCKET", &cluster.target.socket_dir.display().to_string())
    );
    Edge::start(&cluster.dir.path().join("edge"), &text, LIMITS)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_is_checkpointed_healed_verified_and_restored() {
    let mut cluster = Cluster::made(true, &[]);
    let output = cluster.dir.path().join("service.log");
    let more = format!(
        "output = {output:?}\n\
         probe = {{ url = 'postgresql://postgres@SOCKET:5432/postgres', interval = '100ms', start_grace = '30s' }}\n\
         checkpoint = {{ kind = 'postgresql', socket_dir = 'SOCKET', user = 'postgres', requests = 20, \
         statements = ['select count(*) from kept where n = $1'] }}\n\
         healing = {{ autonomy = 'act' }}\n"
    );
    let running = start(&cluster, &more);
    let file = running.file.clone();
    running.service_until("up", |service| service.healthy).await;
    cluster.psql("create table kept as select n from generate_series(1, 1000) n");
    let service = running
        .service_until("checkpointed", |service| service.checkpoints == 1)
        .await;

    // A crash: one start, no failed one.
    let pid = service.pid.unwrap();
    signal(pid, Signal::KILL);
    let healed = running
        .service_until("healed", |service| {
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
    running.finish().await;
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

/// A whole edge on a live server: a lock pile-up and a full house, each healed by its own hand, and the postmaster never restarted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pile_up_and_a_full_house_are_healed_without_a_restart_and_why_tells_it() {
    let cluster = Cluster::made(
        false,
        &[
            "max_connections = 16",
            "superuser_reserved_connections = 3",
            "max_wal_senders = 2",
        ],
    );
    // The probe's role is made after the start, so the first probes ask as the superuser would; the grace covers the rest.
    let running = start(
        &cluster,
        "probe = { url = 'postgresql://app@SOCKET:5432/postgres', interval = '100ms', start_grace = '30s' }\n\
         checkpoint = { kind = 'postgresql', socket_dir = 'SOCKET', user = 'postgres', requests = 0 }\n\
         sessions = { look_every = '200ms', waited_min = '0s', idle_min = '0s', free_min = 2, free_after = 5 }\n\
         healing = { autonomy = 'act', cooldown = '0s' }\n",
    );
    running
        .service_until("running", |service| service.pid.is_some())
        .await;
    cluster.ready();
    cluster.psql("create role app login; create table t as select 1 id, 0 n; grant all on t to public");
    let before = running
        .service_until("up", |service| service.healthy && service.checkpoints == 1)
        .await;
    let started = cluster.psql("select pg_postmaster_start_time()");

    let root = app(&cluster).await.unwrap();
    root.execute("the root", "begin; update t set n = n + 1")
        .await
        .unwrap();
    let begun = Instant::now();
    let mut waiters = Vec::new();
    for _ in 0..4 {
        let session = app(&cluster).await.unwrap();
        waiters.push(tokio::spawn(async move {
            session.execute("a waiter", "update t set n = n + 1").await
        }));
    }
    for waiter in waiters {
        waiter.await.unwrap().unwrap();
    }
    let freed = begun.elapsed();
    drop(root);
    assert_eq!(
        cluster.psql("select n from t"),
        "4",
        "the root's change is gone, theirs are there"
    );
    let pile_up = healed(&running, "lock_pileup").await;
    assert_eq!(
        pile_up["actions"][0]["intent"]["action"], "terminate_blocker",
        "{pile_up}"
    );

    let mut clients = Vec::new();
    while let Ok(session) = app(&cluster).await {
        clients.push(session);
    }
    let begun = Instant::now();
    running
        .until("a client let in", async |_| app(&cluster).await.ok())
        .await;
    let let_in = begun.elapsed();
    println!(
        "the waiters went on after {:.2} s, an ordinary client was let in after {:.2} s",
        freed.as_secs_f64(),
        let_in.as_secs_f64()
    );
    let full = healed(&running, "connection_exhaustion").await;
    assert_eq!(
        full["actions"][0]["intent"]["action"], "end_idle_sessions",
        "{full}"
    );
    app(&cluster)
        .await
        .unwrap()
        .execute("an ordinary client", "select 1")
        .await
        .unwrap();

    for incident in [&pile_up, &full] {
        assert_eq!(incident["verdict"], "healed", "{incident}");
        let told = Command::new(env!("CARGO_BIN_EXE_theriac-edge"))
            .args(["incidents", "why", &incident["id"].to_string(), "--config"])
            .arg(&running.file)
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&told.stdout).into_owned();
        for words in [
            "Restart helps: no.",
            "(probability ",
            "expected: ",
            "done: ",
            "verified: healed",
        ] {
            assert!(told.contains(words), "{words} is missing:\n{told}");
        }
    }
    let after = running.service_until("healthy", |service| service.healthy).await;
    assert_eq!((after.pid, after.restarts), (before.pid, before.restarts));
    assert_eq!(cluster.psql("select pg_postmaster_start_time()"), started);
    drop(clients);
    running.finish().await;
}

/// The administrator runs the server on the same data. Whatever the edge may do by itself, and though it has a record of an earlier run that was
/// cleanly ended, that server lives through the edge's start, its incident and its end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_somebody_else_runs_is_a_persons_at_once_and_outlives_the_edge() {
    for autonomy in ["observe", "recommend", "act"] {
        let mut cluster = Cluster::made(false, &[]);
        cluster.begin();
        let started = cluster.psql("select pg_postmaster_start_time()");
        let more = format!(
            "probe = {{ url = 'postgresql://postgres@SOCKET:5432/postgres', interval = '100ms' }}\n\
             checkpoint = {{ kind = 'postgresql', socket_dir = 'SOCKET', user = 'postgres', requests = 0 }}\n\
             healing = {{ autonomy = '{autonomy}', cooldown = '0s' }}\n"
        );
        let running = start(&cluster, &more);
        let incident = running
            .until(&format!("handed over ({autonomy})"), async |running| {
                let listed = edge(&running.file, &["incidents", "list"]);
                let shown = serde_json::from_slice::<serde_json::Value>(&listed.stdout).ok()?;
                (shown[0]["state"] == "handed_to_human")
                    .then(|| json(&edge(&running.file, &["incidents", "show", "1"])))
            })
            .await;
        let pid = std::fs::read_to_string(cluster.data().join("postmaster.pid")).unwrap();
        let words = format!(
            "another server, process {}, which this edge did not start",
            pid.lines().next().unwrap()
        );
        assert!(
            incident["handed_over"].as_str().unwrap().contains(&words)
                && incident["actions"].as_array().unwrap().is_empty(),
            "{incident}"
        );
        running.finish().await;
        assert_eq!(
            cluster.psql("select pg_postmaster_start_time()"),
            started,
            "{autonomy}"
        );
        cluster.stop();
    }
}

async fn app(cluster: &Cluster) -> Result<Session, PostgresError> {
    let target = Target {
        user: "app".to_owned(),
        ..cluster.target.clone()
    };
    Session::open(&target, Some(cluster.owner), Duration::from_mins(1)).await
}

/// The incident of this class once it is closed as healed.
async fn healed(running: &Edge, class: &str) -> serde_json::Value {
    let what = format!("healed of {class}");
    running
        .until(&what, async |running| {
            let listed = json(&edge(&running.file, &["incidents", "list"]));
            let found = listed.as_array().unwrap().iter();
            let mut found =
                found.filter(|incident| incident["class"] == class && incident["state"] == "healed");
            let id = found.next()?["id"].to_string();
            Some(json(&edge(&running.file, &["incidents", "show", &id])))
        })
        .await
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
