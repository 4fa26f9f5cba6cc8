//! `theriac-lab service` as a process: killed, stopped, corrupted, leaking, spinning.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on fails"
)]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use procfs::process::Process;
use rustix::process::{Pid, Signal, kill_process};
use theriac_lab::traffic::Traffic;

const PATIENCE: Duration = Duration::from_secs(30);

struct Service {
    child: Child,
    addr: SocketAddr,
    control: SocketAddr,
}

impl Service {
    fn start(state: &Path, listen: &str) -> Self {
        let mut child = program(&[
            "service",
            "--listen",
            listen,
            "--control",
            "127.0.0.1:0",
            "--state",
        ])
        .arg(state)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let addresses = line
            .trim()
            .strip_prefix("listening on ")
            .expect("an announcement");
        let (addr, control) = addresses.split_once(", control on ").unwrap();
        Self {
            child,
            addr: addr.parse().unwrap(),
            control: control.parse().unwrap(),
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.child.id().cast_signed()).unwrap(), signal).unwrap();
    }

    fn process(&self) -> Process {
        Process::new(self.child.id().cast_signed()).unwrap()
    }

    fn resident_mib(&self) -> u64 {
        self.process().status().unwrap().vmrss.unwrap() >> 10
    }

    fn spinning(&self) -> usize {
        let tasks = self.process().tasks().unwrap().flatten();
        tasks
            .filter(|task| task.stat().is_ok_and(|stat| stat.comm.starts_with("spin-")))
            .count()
    }

    fn fault(&self, path: &str) {
        let mut stream = TcpStream::connect(self.control).unwrap();
        let head = "HTTP/1.1\r\nhost: lab\r\ncontent-length: 0\r\nconnection: close";
        write!(stream, "POST /fault/{path} {head}\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn program(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_theriac-lab"));
    command.args(arguments).stdin(Stdio::null());
    command
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

async fn requests(traffic: &Traffic, more: u64) {
    let goal = traffic.snapshot().requests + more;
    let deadline = Instant::now() + PATIENCE;
    while traffic.snapshot().requests < goal {
        assert!(Instant::now() < deadline, "{:?}", traffic.snapshot());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_under_load_loses_no_acknowledged_write_and_its_failures_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let mut service = Service::start(dir.path(), "127.0.0.1:0");
    let addr = service.addr;
    let traffic = Traffic::start(addr, 400.0, 3);
    for _ in 0..3 {
        requests(&traffic, 200).await;
        service.signal(Signal::KILL);
        service.child.wait().unwrap();
        requests(&traffic, 40).await;
        service = Service::start(dir.path(), &addr.to_string());
    }
    requests(&traffic, 200).await;
    let report = traffic.stop().await;
    assert_eq!(
        (report.lost_writes, report.unverified_writes),
        (0, 0),
        "{:?}",
        report.kinds
    );
    assert!(
        report.failed >= 60 && report.acknowledged_writes > 100,
        "{} failed, {:?}",
        report.failed,
        report.kinds
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_service_times_out_and_a_continued_one_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let service = Service::start(dir.path(), "127.0.0.1:0");
    let traffic = Traffic::start(service.addr, 200.0, 3);
    requests(&traffic, 100).await;
    service.signal(Signal::STOP);
    requests(&traffic, 50).await;
    service.signal(Signal::CONT);
    requests(&traffic, 100).await;
    let report = traffic.stop().await;
    assert!(
        report.failed >= 40 && report.lost_writes == 0,
        "{} failed, {:?}",
        report.failed,
        report.kinds
    );
}

#[test]
fn term_ends_it_with_exit_code_0() {
    let dir = tempfile::tempdir().unwrap();
    let mut service = Service::start(dir.path(), "127.0.0.1:0");
    // An open connection does not hold it up.
    let _open = TcpStream::connect(service.addr).unwrap();
    service.signal(Signal::TERM);
    until("it to end", || service.child.try_wait().unwrap().is_some());
    assert_eq!(service.child.wait().unwrap().code(), Some(0));
}

#[test]
fn faults_really_take_memory_and_processor_time_and_end_when_told() {
    let dir = tempfile::tempdir().unwrap();
    let service = Service::start(dir.path(), "127.0.0.1:0");
    let before = service.resident_mib();
    service.fault("leak?mib_per_s=200");
    until("memory to grow", || service.resident_mib() > before + 60);
    service.fault("none");
    until("memory to be given back", || service.resident_mib() < before + 30);
    let ticks = service.process().stat().unwrap().utime;
    service.fault("cpu?threads=2");
    until("threads to spin", || service.spinning() == 2);
    until("processor time to be used", || {
        service.process().stat().unwrap().utime > ticks + 20
    });
    service.fault("none");
    until("threads to end", || service.spinning() == 0);
}

#[test]
fn corrupt_state_is_refused_with_exit_code_3_and_check_says_1() {
    let dir = tempfile::tempdir().unwrap();
    let mut service = Service::start(dir.path(), "127.0.0.1:0");
    let mut stream = TcpStream::connect(service.addr).unwrap();
    let head = "PUT /kv/a HTTP/1.1\r\nhost: lab\r\ncontent-length: 3\r\nconnection: close";
    write!(stream, "{head}\r\n\r\none").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
    let check = || {
        program(&["service", "check", "--state"])
            .arg(dir.path())
            .output()
            .unwrap()
    };
    let good = check();
    assert_eq!(
        (good.status.code(), good.stdout.starts_with(b"good: 1 keys")),
        (Some(0), true),
        "{good:?}"
    );
    service.signal(Signal::KILL);
    service.child.wait().unwrap();
    let log = dir.path().join("log-0");
    let mut bytes = std::fs::read(&log).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&log, bytes).unwrap();
    assert_eq!(check().status.code(), Some(1));
    let serve = ["service", "--listen", "127.0.0.1:0", "--state"];
    let refused = program(&serve).arg(dir.path()).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(3), "{said}");
    assert!(
        said.contains("log-0") && said.contains("Restore a checkpoint") && said.contains("\n  help: restore"),
        "{said}"
    );
}

#[test]
fn a_port_in_use_and_a_state_in_use_are_told_apart() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let service = Service::start(dir.path(), "127.0.0.1:0");
    let addr = service.addr.to_string();
    let refused = |state: &Path, listen: &str| {
        let output = program(&["service", "--listen", listen, "--state"])
            .arg(state)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(75));
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(refused(other.path(), &addr).contains(&addr));
    assert!(refused(dir.path(), "127.0.0.1:0").contains("in use by another process"));
}
