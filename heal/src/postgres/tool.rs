//! One program of PostgreSQL, run to its end: argument vector, cleared environment, time and output bounded.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;
use tokio::time::timeout;

use super::PostgresError;
use super::owner::Owner;
use crate::background::Background;

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
    /// Runs it. It is killed when this future is dropped.
    ///
    /// # Errors
    /// [`PostgresError::Spawn`], [`PostgresError::Timeout`]. A bad exit code is no error here.
    pub async fn run(&self) -> Result<Ended, PostgresError> {
        let spawn = |source| PostgresError::Spawn {
            program: self.program.clone(),
            source,
        };
        let mut child = command(&self.program, self.owner)
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(spawn)?;
        if let Some(background) = &self.background {
            background.put(child.id());
        }
        let (out, err) = (child.stdout.take(), child.stderr.take());
        let all = async { tokio::join!(capped(out), capped(err), child.wait()) };
        let (out, mut said, status) =
            timeout(self.timeout, all)
                .await
                .map_err(|_late| PostgresError::Timeout {
                    what: self.name(),
                    after: self.timeout,
                })?;
        let status = status.map_err(spawn)?;
        said.extend_from_slice(&out);
        said.truncate(SAID_BYTES_MAX);
        Ok(Ended {
            code: status.code(),
            status: status.to_string(),
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

/// Reads to the end, so that the program is never blocked, and keeps the beginning.
async fn capped(pipe: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut kept = Vec::new();
    let Some(mut pipe) = pipe else { return kept };
    let mut block = [0_u8; 4096];
    while let Ok(read @ 1..) = pipe.read(&mut block).await {
        let room = SAID_BYTES_MAX.saturating_sub(kept.len());
        kept.extend_from_slice(&block[..read.min(room)]);
    }
    kept
}

const SAID_BYTES_MAX: usize = 8 << 10;
