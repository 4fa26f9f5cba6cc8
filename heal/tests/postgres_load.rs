//! A server under load: a checkpoint from the signal to its proof, and a crash healed by one start.
//!
//! `THERIAC_PG_SCALE=10 THERIAC_PG_ROUNDS=10` with `--nocapture` print the figures that docs/checkpoints.md states.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails, and the long run tells its figures"
)]

mod support;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use support::Cluster;
use theriac_heal::background::Background;
use theriac_heal::executor::process::{OutputTo, Polite, ServiceExit, ServiceSpec, Supervisor};
use theriac_heal::postgres::session::Session;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_under_load_is_proved_and_the_load_goes_on() {
    let (scale, rounds) = (
        number("THERIAC_PG_SCALE").unwrap_or(1),
        number("THERIAC_PG_ROUNDS").unwrap_or(1),
    );
    let quiet = Duration::from_secs(if scale > 1 { 15 } else { 1 });
    let cluster = Cluster::start(
        true,
        &[
            "fsync = on",
            "max_wal_size = 1GB",
            "shared_buffers = 128MB",
            "shared_preload_libraries = 'pg_stat_statements'",
        ],
    );
    let balances = cluster.fill(scale);
    cluster.psql("create extension pg_stat_statements");
    let store = cluster.store(1);
    let mut source = cluster.source(vec![balances]);
    source.shadow.requests = 800;
    source.background = Background::new(
        number("THERIAC_PG_NICE").unwrap_or(10),
        Some(Duration::from_secs(number("THERIAC_PG_PATIENCE").unwrap_or(8))),
    );
    source.max_rate_kib = number("THERIAC_PG_RATE");
    if let Some(cpu) = number("THERIAC_PG_CPU") {
        source.shadow.cpu_cores = cpu;
    }
    // Transactions a second that come whether or not the last was answered.
    let load_rate = number::<String>("THERIAC_PG_LOAD");
    let size = cluster.psql("select pg_size_pretty(sum(pg_database_size(oid))) from pg_database");
    let mut ratios = Vec::new();
    for round in 0..rounds {
        let log = cluster.dir.path().join(format!("load-{round}"));
        std::fs::create_dir(&log).unwrap();
        cluster.owner.take(&log).unwrap();
        let prefix = log.join("l");
        let mut arguments = vec!["-c", "8", "-j", "2", "-T", "100000", "-l", "--log-prefix"];
        arguments.push(prefix.to_str().unwrap());
        // Without it as fast as each is answered.
        arguments.extend(load_rate.iter().flat_map(|rate| ["-R", rate.as_str()]));
        let mut load = cluster.pgbench(&arguments);
        tokio::time::sleep(quiet).await;
        let signal = now_us();
        let begun = Instant::now();
        let valid = source.take(&store, 1).await.unwrap();
        let took = begun.elapsed();
        let end = now_us();
        // The same time without a checkpoint, so that both are judged over as many transactions.
        let control = quiet.max(took);
        tokio::time::sleep(control).await;
        // The server's own checkpoint, with which every backup begins: nothing of ours hastens or softens that.
        let bare = now_us();
        cluster.psql("checkpoint");
        let bare_end = now_us();
        tokio::time::sleep(Duration::from_millis(200)).await;
        rustix::process::kill_process(
            rustix::process::Pid::from_child(&load),
            rustix::process::Signal::INT,
        )
        .unwrap();
        load.wait().unwrap();
        let latencies = read_log(&log);
        let without: Vec<(u128, u64)> = latencies
            .iter()
            .copied()
            .filter(|(at, _)| {
                (signal - quiet.as_micros()..signal).contains(at)
                    || (end..end + control.as_micros()).contains(at)
            })
            .collect();
        let (before, during, after) = (
            summary(&latencies, signal - quiet.as_micros(), signal),
            summary(&latencies, signal, end),
            summary(&latencies, end, end + control.as_micros()),
        );
        let quiet_p99 = percentile(&without);
        ratios.push((during.0 / quiet_p99, took.as_secs_f64()));
        println!(
            "round {round}: {size}, signal to valid {:.2} s; {:?}",
            took.as_secs_f64(),
            valid.proof.run.states
        );
        for check in &valid.proof.run.checks {
            println!("  {:<15} {:.2} s {}", check.name, check.seconds, check.detail);
        }
        println!(
            "  p99 ms before {:.1}, during {:.1}, after {:.1}; tps {:.0}, {:.0}, {:.0}; during against before and after {:+.0} %",
            before.0,
            during.0,
            after.0,
            before.1,
            during.1,
            after.1,
            (during.0 / quiet_p99 - 1.0) * 100.0
        );
        // Which part of it the clients notice.
        let second = 1_000_000;
        let parts: Vec<String> = (0..took.as_micros().div_ceil(second))
            .map(|at| {
                let from = signal + at * second;
                format!("{:.1}", summary(&latencies, from, (from + second).min(end)).0)
            })
            .collect();
        println!("  p99 ms of each second: {}", parts.join(" "));
        let after_it = signal + (bare_end - bare).max(second);
        println!(
            "  p99 ms while the server alone makes a checkpoint ({:.2} s) {:.1}; of the whole without its first {:.1} s {:.1}",
            Duration::from_micros(u64::try_from(bare_end - bare).unwrap()).as_secs_f64(),
            summary(&latencies, bare, bare_end).0,
            Duration::from_micros(u64::try_from(after_it - signal).unwrap()).as_secs_f64(),
            summary(&latencies, after_it.min(end), end).0
        );
        assert!(during.1 > 0.0, "the load stood still");
        // Shapes of what the load sent, with made-up values, single statements of its transaction among them.
        let workload = valid
            .proof
            .run
            .checks
            .iter()
            .find(|check| check.name == "workload")
            .unwrap();
        assert!(
            workload.detail.starts_with("800 requests") && workload.detail.contains(" 0 errors"),
            "{}",
            workload.detail
        );
        cluster.psql("checkpoint");
    }
    let median = |mut of: Vec<f64>| {
        of.sort_by(f64::total_cmp);
        of[of.len() / 2]
    };
    println!(
        "{rounds} rounds: p99 during a checkpoint against without, median {:+.0} %; signal to valid, median {:.2} s",
        (median(ratios.iter().map(|(ratio, _)| *ratio).collect()) - 1.0) * 100.0,
        median(ratios.iter().map(|(_, took)| *took).collect())
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_server_is_up_again_after_one_start() {
    let (scale, rounds): (u32, u64) = (
        number("THERIAC_PG_SCALE").unwrap_or(1),
        number("THERIAC_PG_ROUNDS").unwrap_or(1),
    );
    let cluster = Cluster::made(false, &["fsync = on", "max_wal_size = 1GB"]);
    let output = cluster.dir.path().join("service.log");
    let spec = ServiceSpec {
        run_as: Some(cluster.owner),
        polite: Polite::Interrupt,
        works_in: Some(cluster.data()),
        stop_grace: Duration::from_mins(2),
        output: OutputTo::File {
            path: output.clone(),
            bytes_max: 1 << 30,
        },
        ..ServiceSpec::new("pg", cluster.argv())
    };
    let mut supervisor = Supervisor::new(spec, cluster.dir.path().join("record.json"));
    supervisor.start().await.unwrap();
    cluster.ready();
    cluster.fill(scale);
    for round in 1..=rounds {
        let mut load = cluster.pgbench(&["-c", "8", "-j", "2", "-T", "100000"]);
        tokio::time::sleep(Duration::from_secs(if scale > 1 { 10 } else { 1 })).await;
        // A statement that never looks whether its server is still there: it holds the shared memory for hours.
        let busy = cluster.session().await;
        let busy = tokio::spawn(async move {
            busy.execute("busy", "select count(*) from generate_series(1, 100000000000)")
                .await
        });
        let look = cluster.session().await;
        let running = "select count(*) from pg_stat_activity where query like '%generate_series(1%' and state = 'active' and pid <> pg_backend_pid()";
        while look.rows("busy", running, &[]).await.unwrap()[0].get::<_, i64>(0) == 0 {}
        let pid = rustix::process::Pid::from_raw(supervisor.pid().unwrap().cast_signed()).unwrap();
        let begun = Instant::now();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        assert_eq!(supervisor.exited().await, ServiceExit::Signal(9));
        supervisor.start().await.unwrap();
        let started = begun.elapsed();
        while Session::open(&cluster.target, Some(cluster.owner), Duration::from_secs(1))
            .await
            .is_err()
        {
            assert!(
                begun.elapsed() < Duration::from_mins(2),
                "{}",
                std::fs::read_to_string(&output).unwrap()
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        println!(
            "round {round}: started after {:.2} s, healthy after {:.2} s",
            started.as_secs_f64(),
            begun.elapsed().as_secs_f64()
        );
        assert_eq!(supervisor.starts(), 1 + round);
        assert!(busy.await.unwrap().is_err());
        load.kill().unwrap();
        load.wait().unwrap();
    }
    // Clients whose server dies see FATAL too, so it is the failed start's own words that must not be there.
    let log = std::fs::read_to_string(&output).unwrap();
    for word in [
        "pre-existing shared memory",
        "lock file \"postmaster.pid\" already exists",
        "Is another postmaster",
    ] {
        assert!(!log.contains(word), "{log}");
    }
    let stopped = supervisor.stop().await.unwrap();
    assert_eq!(
        (stopped.exit, stopped.killed),
        (Some(ServiceExit::Code(0)), false),
        "a fast shutdown"
    );
}

fn now_us() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros()
}

/// End (µs since the epoch) and latency (µs) of each transaction.
fn read_log(dir: &std::path::Path) -> Vec<(u128, u64)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        for line in std::fs::read_to_string(entry.unwrap().path()).unwrap().lines() {
            let fields: Vec<&str> = line.split(' ').collect();
            if let [_, _, latency, _, seconds, micros, ..] = fields[..]
                && let (Ok(latency), Ok(seconds), Ok(micros)) =
                    (latency.parse(), seconds.parse::<u128>(), micros.parse::<u128>())
            {
                found.push((seconds * 1_000_000 + micros, latency));
            }
        }
    }
    found
}

/// 99th percentile in ms, and transactions a second.
fn summary(log: &[(u128, u64)], from: u128, to: u128) -> (f64, f64) {
    let taken: Vec<(u128, u64)> = log
        .iter()
        .copied()
        .filter(|(end, _)| (from..to).contains(end))
        .collect();
    (percentile(&taken), taken.len() as f64 * 1e6 / (to - from) as f64)
}

/// The 99th percentile of the latencies, nearest rank, in ms.
fn percentile(log: &[(u128, u64)]) -> f64 {
    let mut taken: Vec<u64> = log.iter().map(|(_, latency)| *latency).collect();
    taken.sort_unstable();
    let rank = (taken.len() * 99).div_ceil(100).max(1) - 1;
    taken.get(rank).copied().unwrap_or(0) as f64 / 1e3
}

fn number<T: std::str::FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok()?.parse().ok()
}
