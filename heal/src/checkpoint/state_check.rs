//! A command that says whether a state directory is good.

use std::path::Path;
use std::time::Duration;

use tokio::process::Command;

use crate::bounded::{self, Bounds, Left, NotRun};

/// A check command. Exit code 0 means good, 1 means corrupt; anything else says nothing about the state, so that a mistyped
/// command cannot have good state replaced. No shell takes part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateCheck {
    /// Program and arguments; every `{state}` in an argument is replaced by the directory.
    pub argv: Vec<String>,
    /// Most time that it may take.
    pub timeout: Duration,
    /// Most bytes of its output that are kept.
    pub output_bytes_max: usize,
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StateVerdict {
    /// Exit code 0.
    Good,
    /// Exit code 1, with what the command said.
    Corrupt(String),
    /// The check itself failed: could not be run, ended otherwise, or took too long.
    Unknown(String),
}

impl StateCheck {
    /// A check with the defaults: 10 s, 4 KiB of output.
    pub fn new(argv: Vec<String>) -> Self {
        Self {
            argv,
            timeout: Duration::from_secs(10),
            output_bytes_max: 4096,
        }
    }

    /// Runs the check on `state`. It is over when the command exits; what that left running in its process group is killed. So is all of it when it takes
    /// too long, and when this future is dropped.
    pub async fn run(&self, state: &Path) -> StateVerdict {
        let Some((program, arguments)) = self.argv.split_first() else {
            return StateVerdict::Unknown("the state check names no program".to_owned());
        };
        let Some(state) = state.to_str() else {
            return StateVerdict::Unknown(format!("{} is not UTF-8", state.display()));
        };
        let mut command = Command::new(program);
        command.args(
            arguments
                .iter()
                .map(|argument| argument.replace("{state}", state)),
        );
        let bounds = Bounds {
            time: self.timeout,
            output_bytes: self.output_bytes_max,
            drain: DRAIN_MAX,
            // It would go on reading a state that may be replaced.
            left: Left::Killed,
        };
        let ran = match bounded::run(command, bounds, drop).await {
            Ok(ran) => ran,
            Err(NotRun::Failed(error)) => {
                return StateVerdict::Unknown(format!("cannot run {program}: {error}"));
            }
            Err(NotRun::Late) => {
                return StateVerdict::Unknown(format!("the state check took longer than {:?}", self.timeout));
            }
        };
        let mut said = ran.out;
        said.extend_from_slice(&ran.err);
        said.truncate(self.output_bytes_max);
        let said = String::from_utf8_lossy(&said).trim().to_owned();
        match ran.status.code() {
            Some(0) => StateVerdict::Good,
            Some(1) => StateVerdict::Corrupt(said),
            _ => StateVerdict::Unknown(format!("the state check ended with {}: {said}", ran.status)),
        }
    }
}

/// Longest time that output is waited for after the exit.
const DRAIN_MAX: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    fn check(script: &str) -> StateCheck {
        StateCheck::new(
            ["/bin/sh", "-c", script, "check", "{state}"]
                .map(str::to_owned)
                .to_vec(),
        )
    }

    #[tokio::test]
    async fn exit_codes_decide() {
        let state = Path::new("/nowhere/state");
        assert_eq!(
            check("test \"$1\" = /nowhere/state").run(state).await,
            StateVerdict::Good
        );
        let corrupt = check("echo page 7; echo differs >&2; exit 1").run(state).await;
        assert_eq!(corrupt, StateVerdict::Corrupt("page 7\ndiffers".to_owned()));
    }

    #[tokio::test]
    async fn a_check_that_fails_itself_does_not_condemn_the_state() {
        let state = Path::new("/nowhere");
        for (script, words) in [
            ("exit 2", "status: 2"),
            ("exit 127", "127"),
            ("kill -9 $$", "signal: 9"),
        ] {
            let StateVerdict::Unknown(said) = check(script).run(state).await else {
                panic!("{script} was a verdict")
            };
            assert!(said.contains(words), "{said}");
        }
        let missing = StateCheck::new(vec!["/nowhere/check".to_owned()])
            .run(state)
            .await;
        assert!(matches!(missing, StateVerdict::Unknown(said) if said.contains("/nowhere/check")));
        assert!(matches!(
            StateCheck::new(Vec::new()).run(state).await,
            StateVerdict::Unknown(_)
        ));
    }

    #[tokio::test]
    async fn time_and_output_are_bounded() {
        let slow = StateCheck {
            timeout: Duration::from_millis(50),
            ..check("sleep 60")
        };
        assert!(
            matches!(slow.run(Path::new("/")).await, StateVerdict::Unknown(said) if said.contains("longer"))
        );
        let loud = check("head -c 1000000 /dev/zero | tr '\\0' x; exit 1")
            .run(Path::new("/"))
            .await;
        assert!(matches!(loud, StateVerdict::Corrupt(said) if said.len() == 4096));
    }

    /// A check that leaves a process with its output open, and that one's number; `None` where its time was over before it began to.
    async fn left_by(script: &str, timeout: Duration) -> Option<(StateVerdict, Duration, u32)> {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let check = StateCheck {
            timeout,
            ..check(&format!("sleep 600 & echo $! > {}; {script}", pid.display()))
        };
        let begun = std::time::Instant::now();
        let verdict = check.run(Path::new("/")).await;
        let took = begun.elapsed();
        let child = std::fs::read_to_string(pid).ok()?.trim().parse().ok()?;
        Some((verdict, took, child))
    }

    async fn is_gone(pid: u32) -> bool {
        let state = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        for _ in 0..6_000 {
            if state().is_empty() || state().contains(") Z ") {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let own = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
        rustix::process::kill_process(own, rustix::process::Signal::KILL).unwrap();
        false
    }

    #[tokio::test]
    async fn what_a_late_check_started_is_killed_with_it() {
        let mut timeout = Duration::from_secs(1);
        let (verdict, child) = loop {
            assert!(timeout < Duration::from_mins(1), "no check begins in time");
            if let Some((verdict, _, child)) = left_by("wait", timeout).await {
                break (verdict, child);
            }
            timeout *= 5;
        };
        assert!(matches!(verdict, StateVerdict::Unknown(said) if said.contains("longer")));
        assert!(
            is_gone(child).await,
            "it would go on reading a state that is replaced"
        );
    }

    #[tokio::test]
    async fn a_check_is_over_when_it_exits_and_leaves_nothing_running() {
        for (script, expected) in [
            ("exit 0", StateVerdict::Good),
            ("echo bad; exit 1", StateVerdict::Corrupt("bad".to_owned())),
        ] {
            let (verdict, took, child) = left_by(script, Duration::from_mins(2)).await.unwrap();
            let gone = is_gone(child).await;
            assert_eq!(verdict, expected);
            assert!(took < Duration::from_mins(1) && gone, "{took:?} {gone}");
        }
    }
}
