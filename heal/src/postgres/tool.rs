//! One program of PostgreSQL, run to its end: argument vector, cleared environment, time and output bounded.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::process::Command;

use super::PostgresError;
use super::owner::Owner;
use crate::background::Background;
use crate::bounded::{self, Bounds, Left, NotRun};

/// What to run.
#[derive(Debug, Clone)]
pub struct Tool {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// The account to run it as; `None` is ours.
    pub owner: Option<Owner>,
    /// How far it stands back for others; `None`: not at all.
    pub background: Option<Background>,
    /// Most time that it may take; then it is killed.
    pub timeout: Duration,
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// How it ended, in words.
    pub status: String,
    /// The first 8 KiB of standard error, then of standard output.
    pub said: String,
}

impl Tool {
    /// Runs it. It is killed, with what it started, when it takes too long and when this future is dropped.
    ///
    /// # Errors
    /// [`PostgresError::Spawn`], [`PostgresError::Timeout`]. A bad exit code is no error here.
    pub async fn run(&self) -> Result<Ended, PostgresError> {
        let spawn = |source| PostgresError::Spawn {
            program: self.program.clone(),
            source,
        };
        let mut command = command(&self.program, self.owner);
        command.args(&self.arguments);
        let bounds = Bounds {
            time: self.timeout,
            output_bytes: SAID_BYTES_MAX,
            drain: DRAIN_MAX,
            left: Left::Killed,
        };
        let ran = bounded::run(command, bounds, |pid| {
            if let Some(background) = &self.background {
                background.put(pid);
            }
        })
        .await
        .map_err(|why| match why {
            NotRun::Failed(source) => spawn(source),
            NotRun::Late => PostgresError::Timeout {
                what: self.name(),
                after: self.timeout,
            },
        })?;
        let mut said = ran.err;
        said.extend_from_slice(&ran.out);
        said.truncate(SAID_BYTES_MAX);
        Ok(Ended {
            code: ran.status.code(),
            status: ran.status.to_string(),
            said: String::from_utf8_lossy(&said).trim().to_owned(),
        })
    }

    /// Runs it and takes a bad exit code for an error.
    ///
    /// # Errors
    /// As [`Self::run`], and [`PostgresError::Tool`].
    pub async fn succeed(&self) -> Result<Ended, PostgresError> {
        let ended = self.run().await?;
        if ended.code == Some(0) {
            return Ok(ended);
        }
        Err(PostgresError::Tool {
            program: self.name(),
            status: ended.status,
            said: ended.said,
        })
    }

    fn name(&self) -> String {
        let name = self.program.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }
}

/// A command of its own process group with nothing of our environment, as `owner` where that is another account.
pub(crate) fn command(program: &Path, owner: Option<Owner>) -> Command {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .env("LC_ALL", "C")
        .env("TZ", "UTC")
        .current_dir("/")
        .process_group(0)
        .kill_on_drop(true);
    if let Some(owner) = owner.filter(|owner| owner.is_other()) {
        command.gid(owner.gid).uid(owner.uid);
    }
    command
}

const SAID_BYTES_MAX: usize = 8 << 10;
/// Longest time that output is waited for after the exit: none of these programs leaves anything that could say more.
const DRAIN_MAX: Duration = Duration::from_secs(5);
