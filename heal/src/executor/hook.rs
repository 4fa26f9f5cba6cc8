//! A program of the operator's own as an action: an argument vector, no shell, an environment of its own, bounded time and output.
//!
//! | | |
//! |---|---|
//! | precondition | the class is one for which the hook is configured, and the policy allows it |
//! | effect | what the program does; it is told which service, incident and intent |
//! | undo | the program's own |
//! | verified by | the service, as after any other action; the exit code only says whether the program did its part |
//!
//! The intent's number is the idempotency key: a program that is called again with the same one was called already, as long as the edge's
//! store is kept; numbers begin anew when it is lost.
//!
//! It has done its part when it exits with 0. What it leaves running goes on; its output is read for [`DRAIN_MAX`] after the exit, and then
//! the pipe is closed: a daemon that it starts must write elsewhere.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::process::Command;

use crate::bounded::{self, Bounds, Left, NotRun};

/// What is run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hook {
    /// Program (an absolute path) and arguments, passed as they are.
    pub argv: Vec<String>,
    /// Its environment beside `PATH` and the `THERIAC_` variables; nothing is inherited.
    pub env: BTreeMap<String, String>,
    /// Longest time to its exit; then its whole process group is killed.
    pub timeout: Duration,
    /// Most bytes of its output that are kept.
    pub output_bytes_max: usize,
}

/// What a hook or webhook is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Called {
    /// The service.
    pub service: String,
    /// The incident's number.
    pub incident: u64,
    /// The intent's number: the same one never comes for two actions of one store.
    pub intent: u64,
    /// What the trouble is taken for.
    pub class: crate::types::FaultClass,
    /// When it was decided, which tells it from one with the same number after the store was lost.
    pub decided_unix_ms: u64,
    /// The diagnosis in words.
    pub reason: String,
}

/// Why a program did not do its part.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HookError {
    /// None is named.
    #[error("the hook names no program")]
    Empty,
    /// It could not be run.
    #[error("cannot run {program}: {source}")]
    Spawn {
        /// The program.
        program: String,
        /// The system's word.
        source: std::io::Error,
    },
    /// It took too long and was killed with everything in its group.
    #[error("{program} took longer than {after:?} and was killed")]
    Timeout {
        /// The program.
        program: String,
        /// Its time.
        after: Duration,
    },
    /// It ended with an error.
    #[error("{program} ended with {status}: {said}")]
    Failed {
        /// The program.
        program: String,
        /// How it ended.
        status: String,
        /// What it said, cut.
        said: String,
    },
}

impl Hook {
    /// Runs it. What it said, cut.
    ///
    /// # Errors
    /// [`HookError`]: it counts as done with exit code 0 alone.
    pub async fn run(&self, called: &Called) -> Result<String, HookError> {
        let (program, arguments) = self.argv.split_first().ok_or(HookError::Empty)?;
        let program = program.clone();
        let mut command = Command::new(&program);
        command
            .args(arguments)
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .envs(&self.env)
            .env("THERIAC_SERVICE", &called.service)
            .env("THERIAC_INCIDENT", called.incident.to_string())
            .env("THERIAC_INTENT", called.intent.to_string())
            .env("THERIAC_REASON", &called.reason)
            .current_dir("/");
        let bounds = Bounds {
            time: self.timeout,
            output_bytes: self.output_bytes_max,
            drain: DRAIN_MAX,
            left: Left::Alone,
        };
        let ran = match bounded::run(command, bounds, drop).await {
            Ok(ran) => ran,
            Err(NotRun::Failed(source)) => return Err(HookError::Spawn { program, source }),
            Err(NotRun::Late) => {
                return Err(HookError::Timeout {
                    program,
                    after: self.timeout,
                });
            }
        };
        let (status, mut said) = (ran.status, ran.out);
        said.extend_from_slice(&ran.err);
        said.truncate(self.output_bytes_max);
        let said = String::from_utf8_lossy(&said).trim().to_owned();
        if status.success() {
            Ok(format!("{program} did its part: {said}"))
        } else {
            Err(HookError::Failed {
                program,
                status: status.to_string(),
                said,
            })
        }
    }
}

/// Longest time that output is waited for after the exit.
pub const DRAIN_MAX: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use rustix::process::{Pid, Signal};

    use super::*;

    fn called() -> Called {
        Called {
            service: "kv; touch /x".to_owned(),
            incident: 3,
            intent: 7,
            class: crate::types::FaultClass::Hang,
            decided_unix_ms: 1_700_000_000_000,
            reason: "2 of the last 3 probes failed".to_owned(),
        }
    }

    fn script(text: &str) -> Hook {
        Hook {
            argv: ["/bin/sh", "-c", text].map(str::to_owned).to_vec(),
            env: BTreeMap::from([("COLOUR".to_owned(), "blue".to_owned())]),
            timeout: Duration::from_secs(20),
            output_bytes_max: 4096,
        }
    }

    #[tokio::test]
    async fn it_is_told_what_it_is_about_and_inherits_nothing() {
        let said = script("env | sort | tr '\\n' ' '").run(&called()).await.unwrap();
        for words in [
            "THERIAC_SERVICE=kv; touch /x",
            "THERIAC_INCIDENT=3",
            "THERIAC_INTENT=7",
            "COLOUR=blue",
        ] {
            assert!(said.contains(words), "{said}");
        }
        assert!(!said.contains("HOME=") && !said.contains("CARGO"), "{said}");
    }

    #[tokio::test]
    async fn arguments_are_no_shell_text() {
        let hook = Hook {
            argv: ["/bin/echo", "$(id)", "; true", "`id`"]
                .map(str::to_owned)
                .to_vec(),
            ..script("")
        };
        let said = hook.run(&called()).await.unwrap();
        assert!(said.ends_with("$(id) ; true `id`"), "{said}");
    }

    #[tokio::test]
    async fn failure_of_every_kind_is_said_and_is_no_success() {
        let failed = script("echo no luck; exit 3")
            .run(&called())
            .await
            .unwrap_err()
            .to_string();
        assert!(
            failed.contains("status: 3") && failed.contains("no luck"),
            "{failed}"
        );
        let killed = script("kill -9 $$").run(&called()).await.unwrap_err().to_string();
        assert!(killed.contains("signal: 9"), "{killed}");
        let missing = Hook {
            argv: vec!["/nowhere/hook".to_owned()],
            ..script("")
        };
        assert!(matches!(
            missing.run(&called()).await,
            Err(HookError::Spawn { .. })
        ));
        let empty = Hook {
            argv: Vec::new(),
            ..script("")
        };
        assert!(matches!(empty.run(&called()).await, Err(HookError::Empty)));
    }

    /// Less than what the hooks start would last.
    const PATIENCE: Duration = Duration::from_mins(4);

    #[tokio::test]
    async fn time_and_output_are_bounded_and_its_children_go_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        // The child holds the pipe open, so waiting for the shell alone would wait for it.
        let mut slow = script(&format!("sleep 600 & echo $! > {}; wait", pid.display()));
        let begun = Instant::now();
        slow.timeout = Duration::from_secs(1);
        // Its time may be over before it began to on a busy machine.
        let child: u32 = loop {
            assert!(slow.timeout < Duration::from_mins(1), "no hook begins in time");
            assert!(matches!(
                slow.run(&called()).await,
                Err(HookError::Timeout { .. })
            ));
            let number = std::fs::read_to_string(&pid).unwrap_or_default();
            if let Ok(number) = number.trim().parse() {
                break number;
            }
            slow.timeout *= 5;
        };
        let state = || std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        while !state().is_empty() && !state().contains(") Z ") {
            assert!(begun.elapsed() < PATIENCE, "{}", state());
            tokio::task::yield_now().await;
        }
        let loud = script("head -c 1000000 /dev/zero | tr '\\0' x")
            .run(&called())
            .await
            .unwrap();
        assert!(loud.len() < 4200, "{}", loud.len());
    }

    #[tokio::test]
    async fn a_hook_that_nobody_waits_for_any_more_is_killed_with_what_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let hook = script(&format!(
            "sleep 600 & echo $! > {0}.new; mv {0}.new {0}; wait",
            pid.display()
        ));
        let task = tokio::spawn(async move { hook.run(&called()).await });
        let begun = Instant::now();
        let child: u32 = loop {
            assert!(begun.elapsed() < PATIENCE, "it never began");
            if let Ok(text) = std::fs::read_to_string(&pid) {
                break text.trim().parse().unwrap();
            }
            tokio::task::yield_now().await;
        };
        task.abort();
        assert!(task.await.unwrap_err().is_cancelled());
        let state = || std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        while !state().is_empty() && !state().contains(") Z ") {
            assert!(begun.elapsed() < PATIENCE, "{}", state());
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_hook_is_done_when_it_exits_and_what_it_leaves_running_lives() {
        let begun = Instant::now();
        let said = script("echo started; sleep 600 & echo $!; exit 0")
            .run(&called())
            .await
            .unwrap();
        assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
        assert!(said.contains("started"), "{said}");
        let pid: i32 = said.split_whitespace().last().unwrap().parse().unwrap();
        // It may be about to become that program. A dead one has no line of arguments.
        let sleeps = || {
            let read = |file| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
            read("comm").trim() == "sleep" && !read("cmdline").is_empty()
        };
        while !sleeps() {
            assert!(begun.elapsed() < PATIENCE, "it does not live");
            tokio::task::yield_now().await;
        }
        rustix::process::kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    }
}
