//! A PostgreSQL server that somebody else runs on the supervised data directory: it is never touched, whatever ours has left behind.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use support::Cluster;
use theriac_heal::executor::process::{
    Leftover, OutputTo, Polite, ProcessError, ServiceExit, ServiceSpec, Supervisor, working_in,
};

fn supervisor(cluster: &Cluster, record: &str) -> Supervisor {
    let spec = ServiceSpec {
        run_as: Some(cluster.owner),
        polite: Polite::Interrupt,
        works_in: Some(cluster.data()),
        stop_grace: Duration::from_secs(30),
        start_spacing: Duration::ZERO,
        ..ServiceSpec::new("pg", cluster.argv())
    };
    Supervisor::new(spec, cluster.dir.path().join(record))
}

async fn refused(supervisor: &mut Supervisor, cluster: &Cluster) {
    let other = cluster.psql("select pg_postmaster_start_time()");
    let error = supervisor.start().await.unwrap_err();
    let first = std::fs::read_to_string(cluster.data().join("postmaster.pid")).unwrap();
    let (named, said) = (first.lines().next().unwrap(), error.to_string());
    assert!(
        matches!(error, ProcessError::Occupied { .. }) && said.contains(&format!("process {named},")),
        "{said}"
    );
    assert_eq!(supervisor.stop().await.unwrap().exit, None);
    assert_eq!(cluster.psql("select pg_postmaster_start_time()"), other);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_somebody_else_started_survives_starts_stops_and_take_overs() {
    let mut cluster = Cluster::made(false, &[]);
    let mut ours = supervisor(&cluster, "ours.json");

    // A clean run of ours leaves no record.
    ours.start().await.unwrap();
    cluster.ready();
    ours.stop().await.unwrap();
    assert!(!cluster.dir.path().join("ours.json").exists());

    // Ours was killed, nobody stopped it or started it again, and then somebody starts one of their own.
    let pid = ours.start().await.unwrap();
    cluster.ready();
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL).unwrap();
    assert_eq!(ours.exited().await, ServiceExit::Signal(9));
    let begun = Instant::now();
    while !working_in(&cluster.data()).is_empty() {
        assert!(begun.elapsed() < Duration::from_mins(1), "ours does not go away");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let record = std::fs::read(cluster.dir.path().join("ours.json")).unwrap();
    cluster.begin();
    refused(&mut ours, &cluster).await;

    // The record of a later run that finds only a dead leader.
    std::fs::write(cluster.dir.path().join("ours.json"), record).unwrap();
    let mut later = supervisor(&cluster, "ours.json");
    assert_eq!(later.take_over().await.unwrap(), Leftover::None);
    refused(&mut later, &cluster).await;

    // Theirs was killed: what it left is not ours either, and its lock file is what a start then goes by.
    cluster.stop();
    later.start().await.unwrap();
    cluster.ready();
    later.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_supervisors_on_one_data_directory_leave_each_others_server_alone() {
    let cluster = Cluster::made(false, &[]);
    let (mut first, mut second) = (supervisor(&cluster, "1.json"), supervisor(&cluster, "2.json"));
    let pid = first.start().await.unwrap();
    cluster.ready();
    for _ in 0..3 {
        refused(&mut second, &cluster).await;
        assert_eq!(second.take_over().await.unwrap(), Leftover::None);
    }
    assert_eq!(first.pid(), Some(pid));
    first.stop().await.unwrap();
    second.start().await.unwrap();
    cluster.ready();
    refused(&mut first, &cluster).await;
    second.stop().await.unwrap();
}

/// A script that does not `exec` the server: what leads the group is the shell.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_a_wrapper_runs_is_ours_and_is_ended_and_started_again_when_the_wrapper_was_killed() {
    let cluster = Cluster::made(false, &[]);
    let mut argv: Vec<String> = ["/bin/sh", "-c", "\"$@\"; exit $?", "wrapper"]
        .map(str::to_owned)
        .into();
    argv.extend(cluster.argv());
    let spec = ServiceSpec {
        run_as: Some(cluster.owner),
        polite: Polite::Interrupt,
        works_in: Some(cluster.data()),
        stop_grace: Duration::from_mins(2),
        start_spacing: Duration::ZERO,
        output: OutputTo::File {
            path: cluster.dir.path().join("log"),
            bytes_max: 1 << 20,
        },
        ..ServiceSpec::new("pg", argv)
    };
    let mut ours = Supervisor::new(spec, cluster.dir.path().join("ours.json"));
    let server = || -> u32 {
        let lock = std::fs::read_to_string(cluster.data().join("postmaster.pid")).unwrap();
        lock.lines().next().unwrap().parse().unwrap()
    };
    let kill = |pid: u32| kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL).unwrap();
    let wrapper = ours.start().await.unwrap();
    cluster.ready();
    let first = server();
    assert_ne!(first, wrapper);
    kill(wrapper);
    assert_eq!(ours.exited().await, ServiceExit::Signal(9));
    ours.free_for_a_start().unwrap();
    let wrapper = ours.start().await.unwrap();
    cluster.ready();
    assert_ne!(server(), first, "it is started anew");
    // Both at once, and one of the server's own that does not hear of it: it holds the server's memory until it is ended.
    let second = server();
    assert!(
        tokio::time::timeout(Duration::ZERO, ours.exited()).await.is_err(),
        "it ended by itself"
    );
    // A process of the server's that stays, and not one of a client that has just gone.
    let stays = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.starts_with(b"postgres: checkpointer")
    };
    let deadline = Instant::now() + Duration::from_mins(1);
    let left = loop {
        assert!(Instant::now() < deadline, "the server has no checkpointer");
        if let Some(left) = working_in(&cluster.data()).into_iter().find(stays) {
            break left;
        }
        tokio::task::yield_now().await;
    };
    kill_process(Pid::from_raw(left.cast_signed()).unwrap(), Signal::STOP).unwrap();
    kill(second);
    kill(wrapper);
    ours.exited().await;
    ours.start().await.unwrap();
    cluster.ready();
    assert!(!working_in(&cluster.data()).contains(&left));
    assert!(ours.stop().await.unwrap().exit.is_some());
    assert!(working_in(&cluster.data()).is_empty());
}
