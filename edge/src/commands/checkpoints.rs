//! `checkpoints list`, `verify`, `restore`: what copies there are, whether they still prove good, and putting one back.

use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, Subcommand};
use theriac_command::output::{Output, table};
use theriac_command::problem::Problem;
use theriac_heal::checkpoint::kind::Source;
use theriac_heal::checkpoint::postgres::verdict::ShadowRun;
use theriac_heal::checkpoint::store::{CheckpointError, CheckpointStore};
use theriac_heal::executor::process::{recorded_process, working_in};

use super::{ConfigArguments, unprinted};
use crate::config::{EdgeConfig, ServiceConfig, StateSettings};
use crate::postgres::{is_postgres, source};
use crate::run::EdgeError;
use crate::service::open_checkpoints;
use crate::state_dir::StateDir;

#[derive(Debug, Subcommand)]
pub(super) enum CheckpointsCommand {
    /// Lists every service's checkpoints, the newest first, and what was set aside.
    #[command(after_help = "Example:\n  theriac-edge checkpoints list --format json")]
    List {
        #[command(flatten)]
        config: ConfigArguments,
    },
    /// Reads a checkpoint whole and, for a server, starts a second one on a copy of it; exit code 1 when it is not good.
    #[command(after_help = "Example:\n  theriac-edge checkpoints verify pg 12")]
    Verify(OneCheckpoint),
    /// Puts a checkpoint in the place of a stopped service's state. What was there is kept beside it.
    #[command(after_help = "Example:\n  theriac-edge checkpoints restore pg 12")]
    Restore(OneCheckpoint),
}

#[derive(Debug, Args)]
pub(super) struct OneCheckpoint {
    /// Name of the service.
    service: String,
    /// Number of the checkpoint, as `checkpoints list` shows it.
    sequence: u64,
    #[command(flatten)]
    config: ConfigArguments,
}

pub(super) async fn checkpoints<W: Write>(
    command: CheckpointsCommand,
    output: &mut Output<W>,
) -> Result<ExitCode, Problem> {
    match command {
        CheckpointsCommand::List { config } => list(&config.load()?, output),
        CheckpointsCommand::Verify(one) => one.verify(output).await,
        CheckpointsCommand::Restore(one) => one.restore(output).await,
    }
}

fn list<W: Write>(config: &EdgeConfig, output: &mut Output<W>) -> Result<ExitCode, Problem> {
    let dir = StateDir::existing(&config.state_dir.path);
    let mut values = Vec::new();
    let mut rows = Vec::new();
    for service in &config.services {
        let Some(state) = &service.state else { continue };
        let name = service.name.as_str();
        // Looking makes nothing.
        if !dir.checkpoints().join(name).is_dir() {
            continue;
        }
        let store = open(&dir, service, state)?;
        for found in store.list().map_err(failed)? {
            let proof = store.proof(&found);
            let word = match (&proof, is_postgres(service)) {
                (Some(_), _) => "valid, proved by a shadow run",
                (None, true) => "not proved",
                (None, false) => "valid",
            };
            rows.push(vec![
                name.to_owned(),
                found.sequence.to_string(),
                utc(found.unix_ms),
                found.files.to_string(),
                found.bytes.to_string(),
                word.to_owned(),
            ]);
            values.push(serde_json::json!({
                "service": name, "sequence": found.sequence, "taken_unix_ms": found.unix_ms, "files": found.files,
                "bytes": found.bytes, "state": word, "proof": proof, "path": found.path,
            }));
        }
        for aside in store.set_aside_copies().map_err(failed)? {
            let word = format!("set aside: {}", aside.reason.lines().next().unwrap_or("-"));
            let place = aside
                .path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            rows.push(vec![
                name.to_owned(),
                place,
                String::new(),
                String::new(),
                String::new(),
                word,
            ]);
            values.push(serde_json::json!({
                "service": name, "state": "set aside", "reason": aside.reason, "path": aside.path,
            }));
        }
    }
    let header = ["service", "number", "taken", "files", "bytes", "state"];
    let human = if rows.is_empty() {
        "no checkpoints".to_owned()
    } else {
        table(&header, &rows)
    };
    output.result(&values, human).map_err(unprinted)?;
    Ok(ExitCode::SUCCESS)
}

impl OneCheckpoint {
    async fn verify<W: Write>(&self, output: &mut Output<W>) -> Result<ExitCode, Problem> {
        let config = self.config.load()?;
        let dir = StateDir::existing(&config.state_dir.path);
        let (service, state) = self.service(&config)?;
        let store = open(&dir, service, state)?;
        let begun = Instant::now();
        let run: Option<ShadowRun> =
            match source(service, state, true).map_err(|error| failed(error.into()))? {
                Source::Postgres(source) => Some(source.verify(&store, self.sequence).await.map_err(failed)?),
                Source::Directory { .. } => {
                    store.verify(self.sequence).map_err(failed)?;
                    None
                }
            };
        let seconds = begun.elapsed().as_secs_f64();
        let value = serde_json::json!({
            "service": self.service, "sequence": self.sequence, "good": true, "seconds": seconds, "run": run,
        });
        let mut lines = vec![format!(
            "checkpoint {} of {} is good: every byte is as it was taken",
            self.sequence, self.service
        )];
        if let Some(run) = &run {
            lines.extend(run.checks.iter().map(|check| {
                format!(
                    "  {:<16} passed in {:.2} s  {}",
                    check.name, check.seconds, check.detail
                )
            }));
            lines.push(format!("  kept apart by    {}", run.isolation));
            lines.push(format!("  bounded by       {}", run.limits));
        }
        let human = lines.join("\n");
        output.result(&value, human).map_err(unprinted)?;
        Ok(ExitCode::SUCCESS)
    }

    async fn restore<W: Write>(&self, output: &mut Output<W>) -> Result<ExitCode, Problem> {
        let config = self.config.load()?;
        let dir = StateDir::existing(&config.state_dir.path);
        let (service, state) = self.service(&config)?;
        // No edge may start the service or copy its state meanwhile.
        let lock = dir
            .lock()
            .map_err(|error| Problem::from(EdgeError::from(error)))?;
        let record = dir.root().join(format!("service-{}.json", service.name));
        let mut running = working_in(&state.dir);
        running.extend(recorded_process(&record));
        if !running.is_empty() {
            let text = format!(
                "processes {running:?} work in {}: a state is replaced only while nobody uses it",
                state.dir.display()
            );
            return Err(
                Problem::temporary("TH-E0362", text).hint("stop the service, then the same command again")
            );
        }
        let store = open(&dir, service, state)?;
        let (from, to, sequence) = (store, state.dir.clone(), self.sequence);
        let restored = tokio::task::spawn_blocking(move || from.restore_sequence(sequence, &to))
            .await
            .map_err(|error| Problem::failed("TH-E0363", error))?
            .map_err(failed)?;
        drop(lock);
        let replaced = restored.replaced.as_ref().map(|path| path.display().to_string());
        let value = serde_json::json!({
            "service": self.service, "sequence": self.sequence, "state": state.dir, "replaced": replaced,
        });
        let kept = replaced.map_or_else(
            || "there was no state before".to_owned(),
            |path| format!("what was there is kept as {path}"),
        );
        let human = format!(
            "{} is checkpoint {} now; {kept}",
            state.dir.display(),
            self.sequence
        );
        output.result(&value, human).map_err(unprinted)?;
        Ok(ExitCode::SUCCESS)
    }

    fn service<'a>(&self, config: &'a EdgeConfig) -> Result<(&'a ServiceConfig, &'a StateSettings), Problem> {
        let found = config
            .services
            .iter()
            .find(|service| service.name.as_str() == self.service);
        found
            .and_then(|service| Some((service, service.state.as_ref()?)))
            .ok_or_else(|| {
                Problem::usage(
                    "TH-E0360",
                    format!("no service `{}` with a [service.state]", self.service),
                )
                .hint("`theriac-edge checkpoints list` shows what there is")
            })
    }
}

fn open(dir: &StateDir, service: &ServiceConfig, state: &StateSettings) -> Result<CheckpointStore, Problem> {
    open_checkpoints(dir, service.name.as_str(), state, is_postgres(service)).map_err(failed)
}

fn failed(error: CheckpointError) -> Problem {
    match &error {
        CheckpointError::Corrupt { .. }
        | CheckpointError::Invalid { .. }
        | CheckpointError::Unproven { .. } => {
            Problem::failed("TH-E0361", error).hint("`theriac-edge checkpoints list` shows the others")
        }
        CheckpointError::DiskFull { .. } => Problem::temporary("TH-E0363", error),
        _ => Problem::failed("TH-E0363", error),
    }
}

fn utc(unix_ms: u64) -> String {
    let seconds = i64::try_from(unix_ms / 1_000).unwrap_or(i64::MAX);
    time::OffsetDateTime::from_unix_timestamp(seconds)
        .ok()
        .and_then(|at| at.format(&time::format_description::well_known::Rfc3339).ok())
        .unwrap_or_else(|| unix_ms.to_string())
}
