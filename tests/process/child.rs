//! Real processes, each killed by its id and reaped when its test is done with it.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Longest wait for anything that must happen.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// Lines of a process's output that a failing test shows.
const LINES_SHOWN: usize = 40;

/// The binary with the three programs in it.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_theriac-process");

/// Polls until `ready` gives something.
pub(crate) fn until<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = ready() {
            return found;
        }
        assert!(
            Instant::now() < deadline,
            "waited {PATIENCE:?} in vain for: {what}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A loopback address free for TCP and UDP, outside the range from which the system picks ports for clients: so nobody gets it while a
/// killed server is not yet back.
pub(crate) fn free_address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    const FIRST: u16 = 10_000;
    const COUNT: u16 = 20_000;
    let own = u16::try_from(std::process::id() % 200).unwrap() * 100;
    loop {
        let port = FIRST + own.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % COUNT;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        if TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok() {
            return address;
        }
    }
}

/// The command line of one of the programs, with nothing of our own environment but the path.
pub(crate) fn command(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command
        .arg(std::process::id().to_string())
        .arg(program)
        .args(arguments)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .stdin(Stdio::null());
    command
}

/// A process that is meant to run on.
pub(crate) struct Running {
    name: String,
    child: Child,
    log: PathBuf,
    reaped: bool,
}

impl Running {
    /// Starts it; what it prints is appended to `log`.
    pub(crate) fn start(name: &str, mut command: Command, log: &Path) -> Self {
        let output = OpenOptions::new().create(true).append(true).open(log).unwrap();
        let child = command
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        Self {
            name: name.to_owned(),
            child,
            log: log.to_owned(),
            reaped: false,
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Fails the test when it has ended by itself.
    pub(crate) fn must_run(&mut self) {
        if let Some(status) = self.child.try_wait().unwrap() {
            self.reaped = true;
            panic!("{} ended with {status}:\n{}", self.name, self.said());
        }
    }

    /// Everything that it and its predecessors printed.
    pub(crate) fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// kill −9, and reaped.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.reaped = true;
    }

    /// Asks it to end and gives its exit code.
    pub(crate) fn stop(mut self) -> Option<i32> {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        let status = until(&format!("{} to end after TERM", self.name), || {
            self.child.try_wait().unwrap()
        });
        self.reaped = true;
        status.code()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.reaped {
            // It may have ended by itself; reaping is what counts.
            self.child.kill().ok();
            self.child.wait().ok();
        }
        if std::thread::panicking() {
            let said = self.said();
            let lines: Vec<&str> = said.lines().collect();
            let last = lines[lines.len().saturating_sub(LINES_SHOWN)..].join("\n");
            eprintln!("--- {} said at last:\n{last}", self.name);
        }
    }
}

/// A command that ended.
pub(crate) struct Ended {
    line: String,
    code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs a command of one of the programs to its end.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Ended {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let dir = tempfile::tempdir().unwrap();
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let (out, err) = (
        dir.path().join(format!("{number}.out")),
        dir.path().join(format!("{number}.err")),
    );
    let line = format!("{program} {}", arguments.join(" "));
    let mut child = command(program, arguments)
        .stdout(File::create(&out).unwrap())
        .stderr(File::create(&err).unwrap())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if Instant::now() > deadline => {
                child.kill().unwrap();
                child.wait().unwrap();
                let said = fs::read_to_string(&err).unwrap_or_default();
                panic!("`{line}` did not end within {PATIENCE:?}:\n{said}");
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let text = |path| String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned();
    Ended {
        line,
        code: status.code(),
        stdout: text(out),
        stderr: text(err),
    }
}

impl Ended {
    /// It did what it was asked for.
    pub(crate) fn expect_done(self) -> Self {
        self.expect_code(0)
    }

    /// It ended with this code.
    pub(crate) fn expect_code(self, code: i32) -> Self {
        assert_eq!(
            self.code,
            Some(code),
            "`{}` printed:\n{}{}",
            self.line,
            self.stdout,
            self.stderr
        );
        self
    }

    /// It ended with this code and told, on standard error, a problem with every one of these words.
    pub(crate) fn expect_problem(self, code: i32, words: &[&str]) -> Self {
        let ended = self.expect_code(code);
        for word in words {
            assert!(
                ended.stderr.contains(word),
                "`{}` does not say `{word}`:\n{}",
                ended.line,
                ended.stderr
            );
        }
        ended
    }

    /// Standard output as JSON.
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("`{}` printed no JSON ({error}):\n{}", self.line, self.stdout))
    }
}

/// A path as an argument.
pub(crate) fn text(path: &(impl AsRef<OsStr> + ?Sized)) -> &str {
    path.as_ref().to_str().unwrap()
}
