//! Processes that the lab started: every one in a process group of its own, every one ended and reaped when the lab
//! is done with it, whether by success, failure, panic or Ctrl-C.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// Why a process could not be started or did not do what it should.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// The program cannot be run.
    #[error("cannot start {name}: {source}")]
    Start {
        /// Which process.
        name: String,
        /// What the system said.
        source: io::Error,
    },
    /// It ended when it should be running, or ended with another code than 0.
    #[error("{name} ended with {status}; its last words were:\n{tail}")]
    Ended {
        /// Which process.
        name: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of its log.
        tail: String,
    },
    /// It took too long and was ended.
    #[error("{name} did not end within {} s and was stopped; its last words were:\n{tail}", limit.as_secs())]
    Slow {
        /// Which process.
        name: String,
        /// The time it had.
        limit: Duration,
        /// The end of its log.
        tail: String,
    },
}

/// Starts processes and ends all of them when dropped.
#[derive(Debug)]
pub struct Processes {
    running: Vec<Process>,
    program: PathBuf,
    logs: PathBuf,
}

#[derive(Debug)]
struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    ended: Option<ExitStatus>,
}

impl Processes {
    /// Starts copies of this very program; what they print goes to `logs/NAME.log`.
    ///
    /// # Errors
    /// When the program's own path cannot be found or the folder cannot be made.
    pub fn new(logs: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(logs)?;
        Ok(Self {
            running: Vec::new(),
            program: std::env::current_exe()?,
            logs: logs.to_owned(),
        })
    }

    /// The program that is started.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Where the log of process `name` is.
    pub fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    /// Starts a process that is meant to run on.
    ///
    /// # Errors
    /// [`ProcessError::Start`].
    pub fn start<A: Into<OsString>>(
        &mut self,
        name: &str,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Pid, ProcessError> {
        let program = self.program.clone();
        self.start_program(&program, name, arguments)
    }

    /// As [`start`](Self::start), with another program than this one.
    ///
    /// # Errors
    /// [`ProcessError::Start`].
    pub fn start_program<A: Into<OsString>>(
        &mut self,
        program: &Path,
        name: &str,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Pid, ProcessError> {
        let failed = |source| ProcessError::Start {
            name: name.to_owned(),
            source,
        };
        let log = self.log(name);
        let output = File::create(&log).map_err(failed)?;
        let child = command(program, arguments, &output)
            .and_then(|mut command| command.spawn())
            .map_err(failed)?;
        let pid = pid_of(&child);
        self.running.push(Process {
            name: name.to_owned(),
            child,
            log,
            ended: None,
        });
        Ok(pid)
    }

    /// Runs a process to its end within `limit` and gives what it printed on standard output.
    ///
    /// # Errors
    /// [`ProcessError::Start`], [`ProcessError::Ended`] for an exit code other than 0, [`ProcessError::Slow`].
    pub fn run<A: Into<OsString>>(
        &mut self,
        name: &str,
        arguments: impl IntoIterator<Item = A>,
        limit: Duration,
    ) -> Result<String, ProcessError> {
        let failed = |source| ProcessError::Start {
            name: name.to_owned(),
            source,
        };
        let log = self.log(name);
        let printed = log.with_extension("out");
        let stdout = File::create(&printed).map_err(failed)?;
        let output = File::create(&log).map_err(failed)?;
        let mut command = command(&self.program, arguments, &output).map_err(failed)?;
        let mut child = command.stdout(stdout).spawn().map_err(failed)?;
        let Some(status) = wait(&mut child, limit) else {
            end_hard(&mut child);
            return Err(ProcessError::Slow {
                name: name.to_owned(),
                limit,
                tail: tail(&log),
            });
        };
        if !status.success() {
            return Err(ProcessError::Ended {
                name: name.to_owned(),
                status,
                tail: tail(&log),
            });
        }
        let text = std::fs::read_to_string(&printed).map_err(failed)?;
        std::fs::remove_file(&printed).map_err(failed)?;
        Ok(text)
    }

    /// Fails when a process that is meant to run on has ended.
    ///
    /// # Errors
    /// [`ProcessError::Ended`] with the end of its log.
    pub fn check(&mut self) -> Result<(), ProcessError> {
        for process in &mut self.running {
            if process.ended.is_none() {
                process.ended = process.child.try_wait().ok().flatten();
            }
            if let Some(status) = process.ended {
                return Err(ProcessError::Ended {
                    name: process.name.clone(),
                    status,
                    tail: tail(&process.log),
                });
            }
        }
        Ok(())
    }

    /// The process of this name, if it was started.
    pub fn pid(&self, name: &str) -> Option<Pid> {
        self.running
            .iter()
            .find(|process| process.name == name)
            .map(|process| pid_of(&process.child))
    }

    /// Asks every process to end, latest started first, and waits; one that is still there after `grace` is ended hard.
    /// Gives the names of those.
    pub fn stop_all(&mut self, grace: Duration) -> Vec<String> {
        let mut forced = Vec::new();
        let running: Vec<&mut Process> = self
            .running
            .iter_mut()
            .rev()
            .filter(|p| p.ended.is_none())
            .collect();
        for process in &running {
            // An error means that it is gone already, which is what is wanted.
            kill_process(pid_of(&process.child), Signal::TERM).ok();
        }
        let until = Instant::now() + grace;
        for process in running {
            let left = until.saturating_duration_since(Instant::now());
            if wait(&mut process.child, left).is_none() {
                end_hard(&mut process.child);
                forced.push(process.name.clone());
            }
        }
        self.running.clear();
        forced
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        self.stop_all(Duration::from_secs(5));
    }
}

fn command<A: Into<OsString>>(
    program: &Path,
    arguments: impl IntoIterator<Item = A>,
    output: &File,
) -> io::Result<Command> {
    let mut command = Command::new(program);
    // A configuration in the caller's environment must not reach into the lab's federation.
    let inherited = ["PATH", "HOME", "TMPDIR", "LANG", "THERIAC_PG_BIN"];
    let kept = inherited
        .into_iter()
        .filter_map(|name| std::env::var_os(name).map(|value| (name, value)));
    command
        .args(arguments.into_iter().map(Into::into))
        .env_clear()
        .envs(kept)
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output.try_clone()?)
        .process_group(0);
    Ok(command)
}

/// Ends processes of the program `program` that have `path` as one of their arguments: services whose edge had to be
/// ended hard. `path` must be a path that only this run of the lab knows. Gives their number.
pub fn end_leftovers(program: &Path, path: &Path) -> usize {
    let Ok(processes) = procfs::process::all_processes() else {
        return 0;
    };
    let is_ours = |process: &procfs::process::Process| {
        let same_program = process.exe().is_ok_and(|exe| exe == program);
        let named = process
            .cmdline()
            .is_ok_and(|words| words.iter().any(|word| Path::new(word) == path));
        same_program && named
    };
    let ours = processes.filter_map(Result::ok).filter(is_ours);
    ours.filter_map(|process| Pid::from_raw(process.pid()))
        .filter(|pid| kill_process(*pid, Signal::KILL).is_ok())
        .count()
}

/// The end of a log file, at most twelve lines.
pub fn tail(log: &Path) -> String {
    const BYTES: u64 = 4_096;
    let read = || -> io::Result<String> {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(BYTES)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_else(|error| format!("(no log: {error})"));
    let lines: Vec<&str> = text.lines().collect();
    let mut last = lines[lines.len().saturating_sub(12)..].join("\n");
    if last.is_empty() {
        "(nothing)".clone_into(&mut last);
    }
    last
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_child(child)
}

/// Waits for the end, at most `limit`, and reaps.
fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let until = Instant::now() + limit;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < until => thread::sleep(Duration::from_millis(10)),
            Ok(None) | Err(_) => return None,
        }
    }
}

/// KILL to the whole group, then reaps.
fn end_hard(child: &mut Child) {
    // Errors mean that the group or the child is gone already.
    kill_process_group(pid_of(child), Signal::KILL).ok();
    child.wait().ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `/bin/sh` in place of the lab's own program.
    fn shell(logs: &Path) -> Processes {
        let mut processes = Processes::new(logs).unwrap();
        processes.program = "/bin/sh".into();
        processes
    }

    fn is_alive(pid: Pid) -> bool {
        rustix::process::test_kill_process(pid).is_ok()
    }

    #[test]
    fn ends_and_reaps_every_process_when_dropped() {
        let logs = tempfile::tempdir().unwrap();
        let mut processes = shell(logs.path());
        let polite = processes.start("polite", ["-c", "exec sleep 600"]).unwrap();
        let second = processes.start("second", ["-c", "exec sleep 600"]).unwrap();
        assert!(is_alive(polite) && is_alive(second));
        processes.check().unwrap();
        drop(processes);
        assert!(
            !is_alive(polite) && !is_alive(second),
            "a process outlived its owner"
        );
    }

    #[test]
    fn ends_hard_what_does_not_end_when_asked() {
        let logs = tempfile::tempdir().unwrap();
        let mut processes = shell(logs.path());
        let deaf = processes
            .start(
                "deaf",
                ["-c", "trap '' TERM; echo ready; while :; do sleep 1; done"],
            )
            .unwrap();
        let until = Instant::now() + Duration::from_mins(1);
        while tail(&processes.log("deaf")) != "ready" {
            assert!(Instant::now() < until, "it does not begin");
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(processes.stop_all(Duration::from_millis(100)), ["deaf"]);
        assert!(!is_alive(deaf));
    }

    #[test]
    fn an_early_end_is_told_with_its_last_words() {
        let logs = tempfile::tempdir().unwrap();
        let mut processes = shell(logs.path());
        processes
            .start("weak", ["-c", "echo the disk is full >&2; exit 3"])
            .unwrap();
        let until = Instant::now() + Duration::from_mins(1);
        let error = loop {
            match processes.check() {
                Err(error) => break error.to_string(),
                Ok(()) => assert!(Instant::now() < until, "the end was not noticed"),
            }
        };
        assert!(
            error.contains("weak") && error.contains("the disk is full"),
            "{error}"
        );
    }

    #[test]
    fn a_command_gives_its_output_or_its_failure() {
        let logs = tempfile::tempdir().unwrap();
        let mut processes = shell(logs.path());
        let limit = Duration::from_secs(20);
        assert_eq!(
            processes
                .run("say", ["-c", "echo yes; echo no >&2"], limit)
                .unwrap(),
            "yes\n"
        );
        let failed = processes
            .run("fail", ["-c", "echo why >&2; exit 1"], limit)
            .unwrap_err()
            .to_string();
        assert!(failed.contains("why"), "{failed}");
        let slow = processes
            .run("slow", ["-c", "exec sleep 600"], Duration::from_millis(50))
            .unwrap_err();
        assert!(matches!(slow, ProcessError::Slow { .. }));
    }

    #[test]
    fn leftovers_are_found_by_program_and_path_together() {
        let logs = tempfile::tempdir().unwrap();
        let mut processes = Processes::new(logs.path()).unwrap();
        processes.program = "/bin/sleep".into();
        processes.start("sleeper", ["600"]).unwrap();
        let program = std::fs::canonicalize("/bin/sleep").unwrap();
        assert_eq!(end_leftovers(&program, &logs.path().join("state")), 0);
        assert_eq!(end_leftovers(Path::new("/bin/other"), Path::new("600")), 0);
    }
}
