//! `checkpoints list`, `verify`, `drill`, `restore`, `key`: what copies there are, here and off-site, whether they still prove good, and
//! putting one back.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, Subcommand, ValueEnum};
use theriac_command::output::{Output, table};
use theriac_command::problem::Problem;
use theriac_heal::checkpoint::kind::StoredCopy;
use theriac_heal::checkpoint::offsite::{OffsiteError, OffsiteKey};
use theriac_heal::checkpoint::store::{CheckpointError, CheckpointStore, StoreLimits};
use theriac_heal::checkpoint::verdict::ShadowRun;
use theriac_heal::checkpoint::which::Which;
use theriac_heal::executor::process::{recorded_process, working_in};

use super::{ConfigArguments, unprinted};
use crate::config::{EdgeConfig, ServiceConfig, StateSettings};
use crate::offsite::{OffsiteRecord, OffsiteSettings, fetch, note_drill};
use crate::postgres::{needs_proof, source};
use crate::run::EdgeError;
use crate::service::open_checkpoints;
use crate::state_dir::StateDir;

#[derive(Debug, Subcommand)]
pub(super) enum CheckpointsCommand {
    /// Lists every service's checkpoints, the newest first, whether they have an off-site copy, and what was set aside.
    #[command(after_help = "Example:\n  theriac-edge checkpoints list --format json")]
    List {
        /// Asks the off-site store instead of this host: the copies there are, also of a host that lost its own.
        #[arg(long)]
        offsite: bool,
        #[command(flatten)]
        config: ConfigArguments,
    },
    /// Reads a checkpoint whole and, for a server, starts a second one on a copy of it; exit code 1 when it is not good.
    #[command(after_help = "Example:\n  theriac-edge checkpoints verify pg 12")]
    Verify(OneCheckpoint),
    /// Restores an off-site copy into an empty place, from the copy alone, and proves it there; exit code 1 when it is not good.
    #[command(after_help = "Example:\n  theriac-edge checkpoints drill pg")]
    Drill(DrillArguments),
    /// Puts a checkpoint in the place of a stopped service's state. What was there is kept beside it.
    #[command(after_help = "Example:\n  theriac-edge checkpoints restore pg 12")]
    Restore(RestoreArguments),
    /// Makes the key that seals off-site copies, mode 0600. One that is there is never replaced.
    #[command(after_help = "Example:\n  theriac-edge checkpoints key --out offsite.key")]
    Key {
        /// File to make.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(super) struct DrillArguments {
    /// Name of the service.
    service: String,
    /// Number of the checkpoint; without it the copy with the newest time. `NUMBER-UNIXMS` where two copies have the number.
    number: Option<Which>,
    #[command(flatten)]
    config: ConfigArguments,
}

#[derive(Debug, Args)]
pub(super) struct RestoreArguments {
    #[command(flatten)]
    one: OneCheckpoint,
    /// Where the checkpoint is taken from: `local`, or `offsite` when the local ones are gone; the copy becomes a local one first.
    #[arg(long, value_enum, default_value_t = Origin::Local)]
    from: Origin,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Origin {
    Local,
    Offsite,
}

#[derive(Debug, Args)]
pub(super) struct OneCheckpoint {
    /// Name of the service.
    service: String,
    /// Number of the checkpoint, as `checkpoints list` shows it; `NUMBER-UNIXMS` where two have it.
    number: Which,
    #[command(flatten)]
    config: ConfigArguments,
}

pub(super) async fn checkpoints<W: Write>(
    command: CheckpointsCommand,
    output: &mut Output<W>,
) -> Result<ExitCode, Problem> {
    match command {
        CheckpointsCommand::List {
            offsite: false,
            config,
        } => list(&config.load()?, output),
        CheckpointsCommand::List {
            offsite: true,
            config,
        } => list_offsite(&config.load()?, output).await,
        CheckpointsCommand::Verify(one) => one.verify(output).await,
        CheckpointsCommand::Drill(drill) => drill.run(output).await,
        CheckpointsCommand::Restore(restore) => restore.one.restore(restore.from, output).await,
        CheckpointsCommand::Key { out } => {
            let key = OffsiteKey::create(&out).map_err(offsite_failed)?;
            let value = serde_json::json!({ "key_file": out, "key": key.id() });
            let human = format!(
                "{} holds key {}: name it in offsite.key_file, and keep a copy away from this host, since no off-site copy opens without it",
                out.display(),
                key.id()
            );
            output.result(&value, human).map_err(unprinted)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn list_offsite<W: Write>(config: &EdgeConfig, output: &mut Output<W>) -> Result<ExitCode, Problem> {
    let settings = offsite_of(config)?;
    let mut values = Vec::new();
    let mut rows = Vec::new();
    for service in config.services.iter().filter(|service| service.state.is_some()) {
        let name = service.name.as_str();
        let store = settings.open(name).map_err(offsite_failed)?;
        for copy in store.list().await.map_err(offsite_failed)? {
            rows.push(vec![
                name.to_owned(),
                copy.sequence.to_string(),
                utc(copy.unix_ms),
            ]);
            values.push(serde_json::json!({
                "service": name, "sequence": copy.sequence, "taken_unix_ms": copy.unix_ms,
            }));
        }
    }
    let human = if rows.is_empty() {
        format!("{} holds no copies of this host's checkpoints", settings.url)
    } else {
        table(&["service", "number", "taken"], &rows)
    };
    output.result(&values, human).map_err(unprinted)?;
    Ok(ExitCode::SUCCESS)
}

fn list<W: Write>(config: &EdgeConfig, output: &mut Output<W>) -> Result<ExitCode, Problem> {
    let dir = StateDir::existing(&config.state_dir.path);
    let mut listing = Listing::default();
    let mut configured = BTreeSet::new();
    for service in &config.services {
        let Some(state) = &service.state else { continue };
        let name = service.name.as_str();
        configured.insert(name.to_owned());
        // Looking makes nothing.
        if dir.checkpoints().join(name).is_dir() {
            let store = open(&dir, service, state)?;
            let record = OffsiteRecord::read(&dir, name);
            let kind = Known {
                needs_proof: Some(needs_proof(service)),
                goes_off_site: config.offsite.is_some(),
            };
            listing.take(name, &store, &record, kind)?;
        }
    }
    for name in names_below(&dir.checkpoints()).difference(&configured) {
        let store =
            CheckpointStore::open(&dir.checkpoints().join(name), StoreLimits::default()).map_err(failed)?;
        let kind = Known {
            needs_proof: None,
            goes_off_site: false,
        };
        listing.take(name, &store, &OffsiteRecord::read(&dir, name), kind)?;
        let note = format!(
            "{name}: no service of the configuration that was read has this state; is --config missing?"
        );
        listing.notes.push(note);
    }
    let header = ["service", "number", "taken", "files", "bytes", "where", "state"];
    let mut human = if listing.rows.is_empty() {
        format!("no checkpoints in {}", dir.checkpoints().display())
    } else {
        table(&header, &listing.rows)
    };
    for note in &listing.notes {
        human.push('\n');
        human.push_str(note);
    }
    output.result(&listing.values, human).map_err(unprinted)?;
    Ok(ExitCode::SUCCESS)
}

/// Directories in this one, by name.
fn names_below(dir: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

/// What the configuration says of a service's checkpoints.
#[derive(Debug, Clone, Copy)]
struct Known {
    /// `None`: no configuration says so.
    needs_proof: Option<bool>,
    goes_off_site: bool,
}

/// What `checkpoints list` prints.
#[derive(Debug, Default)]
struct Listing {
    values: Vec<serde_json::Value>,
    rows: Vec<Vec<String>>,
    notes: Vec<String>,
}

impl Listing {
    fn take(
        &mut self,
        name: &str,
        store: &CheckpointStore,
        record: &OffsiteRecord,
        kind: Known,
    ) -> Result<(), Problem> {
        for found in store.list().map_err(failed)? {
            let proof = store.proof(&found);
            let place = match (kind.goes_off_site, record.holds(&found)) {
                (_, true) => "here and off-site",
                (true, false) => "here; not yet off-site",
                (false, false) => "here",
            };
            let word = match (&proof, kind.needs_proof) {
                (Some(_), _) => "valid, proved by a shadow run",
                (None, Some(true)) => "not proved",
                (None, Some(false)) => "valid",
                (None, None) => "not proved; whether it has to be is not known",
            };
            self.rows.push(vec![
                name.to_owned(),
                found.sequence.to_string(),
                utc(found.unix_ms),
                found.files.to_string(),
                found.bytes.to_string(),
                place.to_owned(),
                word.to_owned(),
            ]);
            self.values.push(serde_json::json!({
                "service": name, "sequence": found.sequence, "taken_unix_ms": found.unix_ms, "files": found.files,
                "bytes": found.bytes, "state": word, "offsite": record.holds(&found), "proof": proof, "path": found.path,
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
            self.rows.push(vec![
                name.to_owned(),
                place,
                String::new(),
                String::new(),
                String::new(),
                "here".to_owned(),
                word,
            ]);
            self.values.push(serde_json::json!({
                "service": name, "state": "set aside", "reason": aside.reason, "path": aside.path,
            }));
        }
        if let Some(failure) = &record.failure {
            self.notes
                .push(format!("{name}: the last off-site copy failed: {failure}"));
        }
        if let Some(drill) = &record.drill {
            let word = if drill.good { "good" } else { &drill.detail };
            self.notes.push(format!(
                "{name}: last restore drill {}, checkpoint {}: {word}",
                utc(drill.unix_ms),
                drill.sequence
            ));
        }
        Ok(())
    }
}

impl OneCheckpoint {
    async fn verify<W: Write>(&self, output: &mut Output<W>) -> Result<ExitCode, Problem> {
        let config = self.config.load()?;
        let dir = StateDir::existing(&config.state_dir.path);
        let (service, state) = self.service(&config)?;
        let store = open(&dir, service, state)?;
        let begun = Instant::now();
        let run: Option<ShadowRun> = source(service, state, true)
            .map_err(|error| failed(error.into()))?
            .verify(&store, self.number, StoredCopy::Kept)
            .await
            .map_err(failed)?;
        let seconds = begun.elapsed().as_secs_f64();
        let value = serde_json::json!({
            "service": self.service, "sequence": self.number.sequence, "good": true, "seconds": seconds, "run": run,
        });
        let mut lines = vec![format!(
            "checkpoint {} of {} is good: every byte is as it was taken",
            self.number, self.service
        )];
        if let Some(run) = &run {
            lines.extend(words_of(run));
        }
        let human = lines.join("\n");
        output.result(&value, human).map_err(unprinted)?;
        Ok(ExitCode::SUCCESS)
    }

    async fn restore<W: Write>(&self, origin: Origin, output: &mut Output<W>) -> Result<ExitCode, Problem> {
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
        let mut which = self.number;
        if origin == Origin::Offsite {
            let copies = offsite_of(&config)?.open(&self.service).map_err(offsite_failed)?;
            let fetched = copies
                .fetch(Some(self.number), &store)
                .await
                .map_err(offsite_failed)?;
            // This one, also when a local one has its number.
            which.unix_ms = Some(fetched.unix_ms);
        }
        let (from, to) = (store, state.dir.clone());
        let restored = tokio::task::spawn_blocking(move || from.restore_sequence(which, &to))
            .await
            .map_err(|error| Problem::failed("TH-E0363", error))?
            .map_err(failed)?;
        drop(lock);
        let replaced = restored.replaced.as_ref().map(|path| path.display().to_string());
        let value = serde_json::json!({
            "service": self.service, "sequence": restored.checkpoint.sequence, "taken_unix_ms": restored.checkpoint.unix_ms,
            "state": state.dir, "replaced": replaced,
        });
        let kept = replaced.map_or_else(
            || "there was no state before".to_owned(),
            |path| format!("what was there is kept as {path}"),
        );
        let human = format!(
            "{} is checkpoint {} now, taken {}; {kept}",
            state.dir.display(),
            restored.checkpoint.sequence,
            utc(restored.checkpoint.unix_ms)
        );
        output.result(&value, human).map_err(unprinted)?;
        Ok(ExitCode::SUCCESS)
    }

    fn service<'a>(&self, config: &'a EdgeConfig) -> Result<(&'a ServiceConfig, &'a StateSettings), Problem> {
        stateful(config, &self.service)
    }
}

impl DrillArguments {
    async fn run<W: Write>(&self, output: &mut Output<W>) -> Result<ExitCode, Problem> {
        let config = self.config.load()?;
        let dir = StateDir::existing(&config.state_dir.path);
        let (service, state) = stateful(&config, &self.service)?;
        let settings = offsite_of(&config)?;
        let begun = Instant::now();
        // Made anew and removed, so that nothing of this host's checkpoints can help.
        let place = dir.checkpoints().join(format!("{}.drill", self.service));
        let remove = || match std::fs::remove_dir_all(&place) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Problem::failed(
                "TH-E0363",
                format!("{}: {error}", place.display()),
            )),
            _ => Ok(()),
        };
        remove()?;
        let fetched = fetch(settings, &self.service, self.number, &place).await;
        let proved = match &fetched {
            Ok((store, checkpoint)) => source(service, state, true)
                .map_err(|error| failed(error.into()))?
                .verify(store, checkpoint.sequence.into(), StoredCopy::ThrownAway)
                .await
                .map_err(OffsiteError::from),
            Err(_) => Ok(None),
        };
        remove()?;
        let sequence = fetched
            .as_ref()
            .map_or(self.number.map_or(0, |number| number.sequence), |(_, found)| {
                found.sequence
            });
        let outcome = match (&fetched, &proved) {
            (Err(error), _) | (_, Err(error)) => Err(error),
            (Ok(_), Ok(_)) => Ok(()),
        };
        if let Err(error) = note_drill(&dir, &self.service, sequence, outcome) {
            let path = dir.offsite(&self.service);
            return Err(Problem::failed(
                "TH-E0363",
                format!("{}: {error}", path.display()),
            ));
        }
        let (_, checkpoint) = fetched.map_err(offsite_failed)?;
        let run = proved.map_err(offsite_failed)?;
        let seconds = begun.elapsed().as_secs_f64();
        let value = serde_json::json!({
            "service": self.service, "sequence": sequence, "taken_unix_ms": checkpoint.unix_ms, "good": true,
            "bytes": checkpoint.bytes, "seconds": seconds, "run": run,
        });
        let mut lines = vec![format!(
            "checkpoint {sequence} of {}, taken {}, was restored from its off-site copy alone and is good ({} bytes in {seconds:.1} s)",
            self.service,
            utc(checkpoint.unix_ms),
            checkpoint.bytes
        )];
        lines.extend(run.iter().flat_map(words_of));
        output.result(&value, lines.join("\n")).map_err(unprinted)?;
        Ok(ExitCode::SUCCESS)
    }
}

fn stateful<'a>(
    config: &'a EdgeConfig,
    name: &str,
) -> Result<(&'a ServiceConfig, &'a StateSettings), Problem> {
    let found = config
        .services
        .iter()
        .find(|service| service.name.as_str() == name);
    found
        .and_then(|service| Some((service, service.state.as_ref()?)))
        .ok_or_else(|| {
            Problem::usage("TH-E0360", format!("no service `{name}` with a [service.state]"))
                .hint("`theriac-edge checkpoints list` shows what there is")
        })
}

fn offsite_of(config: &EdgeConfig) -> Result<&OffsiteSettings, Problem> {
    config.offsite.as_ref().ok_or_else(|| {
        Problem::config("TH-E0364", "no off-site store is configured")
            .hint("name one in [offsite]: url and key_file")
    })
}

/// One line for each check of a run, then what bounded it.
fn words_of(run: &ShadowRun) -> Vec<String> {
    let mut lines: Vec<String> = run
        .checks
        .iter()
        .map(|check| {
            format!(
                "  {:<16} passed in {:.2} s  {}",
                check.name, check.seconds, check.detail
            )
        })
        .collect();
    lines.push(format!("  kept apart by    {}", run.isolation));
    lines.push(format!("  bounded by       {}", run.limits));
    lines
}

fn offsite_failed(error: OffsiteError) -> Problem {
    match error {
        OffsiteError::Checkpoint(error) => failed(error),
        OffsiteError::Unreachable { .. } => Problem::temporary("TH-E0365", error)
            .hint("the local checkpoints stay as they are; try again when the store is there"),
        OffsiteError::Damaged { .. } | OffsiteError::Missing { .. } | OffsiteError::NoCopy { .. } => {
            Problem::failed("TH-E0366", error)
                .hint("`theriac-edge checkpoints list --offsite` shows what there is")
        }
        _ => Problem::failed("TH-E0367", error),
    }
}

fn open(dir: &StateDir, service: &ServiceConfig, state: &StateSettings) -> Result<CheckpointStore, Problem> {
    open_checkpoints(dir, service.name.as_str(), state, needs_proof(service)).map_err(failed)
}

fn failed(error: CheckpointError) -> Problem {
    match &error {
        CheckpointError::Corrupt { .. }
        | CheckpointError::Invalid { .. }
        | CheckpointError::Unproven { .. } => {
            Problem::failed("TH-E0361", error).hint("`theriac-edge checkpoints list` shows the others")
        }
        CheckpointError::DiskFull { .. } => Problem::temporary("TH-E0363", error),
        CheckpointError::SeveralOfNumber { .. } => Problem::failed("TH-E0361", error)
            .hint("name it as NUMBER-UNIXMS; `theriac-edge checkpoints list` shows when each was taken"),
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
