//! False actions: recorded normal metrics, replayed on virtual time through the edge's own detector and the healer that acts.
//!
//! ```text
//! NAME.train.npy.gz → Lane (detector, levels, alarm) → IncidentMachine (autonomy `act`) → actions that nobody needed
//! ```
//!
//! The service answers every probe and its process never ends, so that whatever is done is done for an alarm alone: a restart for what looks
//! like a leak or a loop. Each action is verified, charged and cooled down as in a running edge, and the lane begins anew after it. A new
//! detector is fitted on the quiet rows from time to time, and a lasting alarm is taken for a new normal, as in a running edge; rows that are
//! gathered meanwhile are not watched, and not counted.
//!
//! Where its memory stands is told as a running edge tells it, of the leading channel. Of its processor time the recordings hold no unit: what a
//! channel of it shows is taken for the share of the host's processors that it uses, times a factor of the caller's.
//!
//! Recordings hold no time of an answer either. By default every answer takes as long as ever, so that processor time, which presses only with
//! such a sign, is never acted on: that is what the rule says, and nothing measured. With `--queueing` an answer takes `1 / (1 - ρ)` times as
//! long at the share ρ, as in a queue whose processor is shared out (Kleinrock 1976, "Queueing Systems" 2, section 4.4): an upper end, since
//! a server that went on at its highest then answers a hundred times as slowly.
//!
//! What it leaves out: probes that fail or get slow, the host's own pressure and sessions, which recordings do not hold; the failure risk, which no rule
//! of the default policy asks for; and [`least rises`](theriac_edge::detect) of a service's resources, since the recordings are scaled: any
//! rise counts, which makes more actions and not fewer.

mod replay;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::time::Duration;

use rayon::prelude::*;
use serde::Serialize;
use theriac_command::output::{Format, table};
use theriac_model::detector::DetectorError;
use theriac_model::feature::FeatureSchema;
use theriac_model::io::{ReadError, read_series};

pub use replay::Machine;

/// Arguments of `theriac-lab quiet`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Recordings of normal metrics: `NAME.train.npy.gz`, rows of channels scaled to about 0..1.
    #[arg(long)]
    pub data: PathBuf,
    /// Time between rows.
    #[arg(long, default_value = "60s", value_parser = humantime::parse_duration)]
    pub step: Duration,
    /// Channels, from 0, that are taken for the service's memory. Neither this nor `--cpu`: every channel is, so that every alarm that
    /// lasts is blamed on the service.
    #[arg(long, value_delimiter = ',')]
    pub memory: Vec<usize>,
    /// Channels that are taken for the service's processor time; the others are the host's.
    #[arg(long, value_delimiter = ',')]
    pub cpu: Vec<usize>,
    /// What the service's memory can have at most, in the recordings' scale, whose highest value is 1: a server that went on at its highest
    /// had at least that.
    #[arg(long, default_value_t = 1.0)]
    pub limit: f64,
    /// What a channel of the service's processor time shows when it takes all of the host's, in the recordings' scale, whose highest value is 1.
    #[arg(long, default_value_t = 1.0)]
    pub processors: f64,
    /// Answers take the longer the more of its processors it uses, as in a queue; else as long as ever.
    #[arg(long)]
    pub queueing: bool,
    /// Rows between two fits.
    #[arg(long, default_value_t = 1_440, value_parser = clap::value_parser!(u32).range(300..=1_000_000))]
    pub refit_rows: u32,
    /// Least time that an alarm must last before it opens an incident: `healing.anomaly_lasting`.
    #[arg(long, default_value = "10s", value_parser = humantime::parse_duration)]
    pub lasting: Duration,
    /// `human` or `json`.
    #[arg(long, default_value = "human")]
    pub format: Format,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuietError {
    /// An option makes no sense.
    #[error("{option} {reason}")]
    Option {
        /// The option.
        option: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The folder cannot be listed.
    #[error("cannot list {path}: {source}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// It holds no recording.
    #[error("{path} holds no NAME.train.npy.gz")]
    Nothing {
        /// The folder.
        path: PathBuf,
    },
    /// A recording cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// No detector can be fitted on a recording.
    #[error("{machine}: {source}")]
    Detector {
        /// The recording.
        machine: String,
        /// Why.
        source: DetectorError,
    },
}

/// What was done to nodes that needed nothing.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Quiet {
    /// Each recording.
    pub machines: Vec<Machine>,
    /// Days that were watched, over all.
    pub node_days: f64,
    /// Actions, over all.
    pub actions: u64,
    /// Actions a node and day.
    pub per_node_day: f64,
}

/// Replays every recording.
///
/// # Errors
/// [`QuietError`]
pub fn run(args: &Args) -> Result<Quiet, QuietError> {
    if !(Duration::from_millis(100)..=Duration::from_hours(1)).contains(&args.step) {
        return Err(QuietError::Option {
            option: "--step",
            reason: "is outside 100ms to 1h".to_owned(),
        });
    }
    for (option, value) in [("--limit", args.limit), ("--processors", args.processors)] {
        if !(value.is_finite() && value > 0.0) {
            return Err(QuietError::Option {
                option,
                reason: "is not above 0".to_owned(),
            });
        }
    }
    if args.lasting > Duration::from_hours(1) {
        return Err(QuietError::Option {
            option: "--lasting",
            reason: "is outside 0s to 1h".to_owned(),
        });
    }
    let machines: Vec<Machine> = names(&args.data)?
        .par_iter()
        .map(|name| machine(args, name))
        .collect::<Result<_, _>>()?;
    let node_days: f64 = machines.iter().map(|machine| machine.days).sum();
    let actions = machines.iter().map(Machine::actions).sum();
    Ok(Quiet {
        per_node_day: actions as f64 / node_days.max(f64::MIN_POSITIVE),
        machines,
        node_days,
        actions,
    })
}

fn machine(args: &Args, name: &str) -> Result<Machine, QuietError> {
    let series = read_series(&args.data.join(format!("{name}{ENDING}")))?;
    let schema = schema(args, series.channels())?;
    replay::replay(name, &series, schema, args).map_err(|source| QuietError::Detector {
        machine: name.to_owned(),
        source,
    })
}

/// The channels by whose they are.
fn schema(args: &Args, channels: usize) -> Result<FeatureSchema, QuietError> {
    for (option, list) in [("--memory", &args.memory), ("--cpu", &args.cpu)] {
        if let Some(channel) = list.iter().find(|channel| **channel >= channels) {
            let reason = format!("names channel {channel} of {channels}, counted from 0");
            return Err(QuietError::Option { option, reason });
        }
    }
    let all = args.memory.is_empty() && args.cpu.is_empty();
    let mut schema = FeatureSchema::recorded("recorded", channels);
    for (channel, feature) in schema.features.iter_mut().enumerate() {
        let whose = if all || args.memory.contains(&channel) {
            "service_memory"
        } else if args.cpu.contains(&channel) {
            "service_cpu"
        } else {
            "host"
        };
        feature.name = format!("{whose}-{channel:02}");
    }
    Ok(schema)
}

fn names(folder: &Path) -> Result<Vec<String>, QuietError> {
    let refused = |source| QuietError::Folder {
        path: folder.to_owned(),
        source,
    };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(refused)? {
        let name = entry.map_err(refused)?.file_name();
        names.extend(name.to_string_lossy().strip_suffix(ENDING).map(str::to_owned));
    }
    if names.is_empty() {
        return Err(QuietError::Nothing {
            path: folder.to_owned(),
        });
    }
    names.sort();
    Ok(names)
}

impl Quiet {
    /// The machines, and all of them together.
    pub fn table(&self) -> String {
        let row = |name: &str, machine: &Machine| {
            vec![
                name.to_owned(),
                format!("{:.1}", machine.days),
                machine.alarms.to_string(),
                machine.incidents.to_string(),
                machine.restarts_for_memory.to_string(),
                machine.restarts_for_cpu.to_string(),
                machine.handed_over.to_string(),
                format!(
                    "{:.3}",
                    machine.actions() as f64 / machine.days.max(f64::MIN_POSITIVE)
                ),
            ]
        };
        let mut all = Machine::default();
        for machine in &self.machines {
            all.add(machine);
        }
        let mut rows: Vec<Vec<String>> = self
            .machines
            .iter()
            .map(|machine| row(&machine.name, machine))
            .collect();
        rows.push(row("all", &all));
        let header = [
            "machine",
            "days watched",
            "alarms",
            "incidents",
            "restarts (memory)",
            "restarts (cpu)",
            "handed over",
            "actions a node and day",
        ];
        table(&header, &rows)
    }
}

/// How a recording's file ends.
const ENDING: &str = ".train.npy.gz";
