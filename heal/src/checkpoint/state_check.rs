//! A command that says whether a state directory is good.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;
use tokio::time::timeout;

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

    /// Runs the check on `state`. The command is killed when it takes too long, and when this future is dropped.
    pub async fn run(&self, state: &Path) -> StateVerdict {
        let Some((program, arguments)) = self.argv.split_first() else {
            return StateVerdict::Unknown("the state check names no program".to_owned());
        };
        let Some(state) = state.to_str() else {
            return StateVerdict::Unknown(format!("{} is not UTF-8", state.display()));
        };
        let mut command = Command::new(program);
        command
            .args(
                arguments
                    .iter()
                    .map(|argument| argument.replace("{state}", state)),
            )
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => return StateVerdict::Unknown(format!("cannot run {program}: {error}")),
        };
        let stdout = child.stdout.take();
        let stderr = child.stderr.take();
        let max = self.output_bytes_max;
        let all = async {
            let (out, err, status) = tokio::join!(capped(stdout, max), capped(stderr, max), child.wait());
            (out, err, status)
        };
        match timeout(self.timeout, all).await {
            Err(_) => StateVerdict::Unknown(format!("the state check took longer than {:?}", self.timeout)),
            Ok((_, _, Err(error))) => StateVerdict::Unknown(format!("the state check was lost: {error}")),
            Ok((mut said, err, Ok(status))) => {
                said.extend_from_slice(&err);
                said.truncate(max);
                let said = String::from_utf8_lossy(&said).trim().to_owned();
                match status.code() {
                    Some(0) => StateVerdict::Good,
                    Some(1) => StateVerdict::Corrupt(said),
                    _ => StateVerdict::Unknown(format!("the state check ended with {status}: {said}")),
                }
            }
        }
    }
}

/// Reads to the end, so that the command is never blocked, and keeps the first `max` bytes.
async fn capped(pipe: Option<impl AsyncRead + Unpin>, max: usize) -> Vec<u8> {
    let mut kept = Vec::new();
    let Some(mut pipe) = pipe else { return kept };
    let mut block = [0_u8; 1024];
    while let Ok(read @ 1..) = pipe.read(&mut block).await {
        let room = max.saturating_sub(kept.len());
        kept.extend_from_slice(&block[..read.min(room)]);
    }
    kept
}

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
}
