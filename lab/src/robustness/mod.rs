//! Rules against attacks: the whole table, over seeds, as ratios to what the honest sites alone would have learnt.
//!
//! ```text
//! workload (recorded.rs, synthetic.rs) → honest rows, own rows of the hostile
//!   → attack (crate::attack) → pipeline (pipeline.rs: validation, screens, rule) → model → measure / oracle
//!   → table (table.rs): CSV, Markdown, heat maps
//! ```

pub mod network;
pub mod pipeline;
pub mod recorded;
pub mod round;
pub mod synthetic;
pub mod table;
#[cfg(test)]
mod tests;

use std::io;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use theriac_command::output::{self, Format};
use theriac_model::detector::DetectorError;
use theriac_model::global::GlobalError;
use theriac_protocol::units::UnitError;

use crate::attack::{Attack, UnknownAttack};
use crate::evaluate::EvaluateError;
use crate::simulate::data::DataError;
use pipeline::{Pipeline, PipelineError};
use recorded::{Depth, Recorded};
use synthetic::Synthetic;
use table::Entry;

/// The name of no attack.
const NONE: &str = "none";

/// What is learnt and from whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Workload {
    /// Moments of recorded machines, one round; each machine in turn is the new one.
    Smd,
    /// A made fleet of 30 sites and 60 rounds of gradients.
    Synthetic,
}

/// Whether updates carry noise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Privacy {
    /// No noise.
    Off,
    /// The noise of `--epsilon` for one block; in the made fleet noise as long as the clipping norm.
    Block,
}

/// Measures rules against attacks.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Directory for robustness.csv, robustness.md and a heat map for each measure.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// What is learnt and from whom.
    #[arg(long, value_enum, default_value_t = Workload::Synthetic)]
    pub workload: Workload,
    /// Directory with NAME.train.npy.gz, NAME.test.npy.gz and NAME.label.npy.gz, for the workload `smd`.
    #[arg(long, value_name = "DIR", required_if_eq("workload", "smd"))]
    pub data: Option<PathBuf>,
    /// Screens and rules: vet+, law+, copies+ and ema+ before a rule's name [default: what is shipped, and the mean].
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    pub rules: Vec<String>,
    /// Attacks, `none` among them; `theriac-lab attack list` shows all [default: all].
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    pub attacks: Vec<String>,
    /// Seeds, from 1.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub seeds: u64,
    /// Whether updates carry noise.
    #[arg(long, value_enum, default_value_t = Privacy::Block)]
    pub privacy: Privacy,
    /// ε of one block, for the workload `smd`.
    #[arg(long, value_name = "E", default_value_t = 4.0)]
    pub epsilon: f64,
    /// Hostile sites among those that train, for the workload `smd`.
    #[arg(long, value_name = "F", default_value_t = 4)]
    pub malicious: usize,
    /// Only the one-step loss, not the detection: fast.
    #[arg(long)]
    pub loss_only: bool,
    /// Rounds of the workload `synthetic`.
    #[arg(long, value_name = "N", default_value_t = synthetic::ROUNDS, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub rounds: u32,
    /// Threads [default: one for each processor].
    #[arg(long, value_name = "T")]
    pub threads: Option<NonZeroUsize>,
    /// `human`, or `json` for the entries on standard output.
    #[arg(long, default_value = "human")]
    pub format: Format,
}

/// Why there is no table.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RobustnessError {
    /// No attack of this name.
    #[error("--attacks: {0}")]
    Attack(#[from] UnknownAttack),
    /// No pipeline of this name.
    #[error("--rules: {0}")]
    Pipeline(#[from] PipelineError),
    /// A number is out of range.
    #[error("--epsilon: {0}")]
    Unit(#[from] UnitError),
    /// No noise is strong enough.
    #[error("--epsilon {0}: no noise reaches it; ask for more")]
    NoNoise(f64),
    /// Too few machines for so many hostile ones.
    #[error("{found} machines: for so many hostile ones at least {needed} are needed; lower --malicious")]
    TooFewSites {
        /// Machines found.
        found: usize,
        /// Machines needed.
        needed: usize,
    },
    /// `--data` is missing.
    #[error("the workload smd needs --data")]
    NoData,
    /// The machines cannot be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The labels cannot be read.
    #[error(transparent)]
    Labels(#[from] EvaluateError),
    /// A detector cannot be fitted.
    #[error(transparent)]
    Detector(#[from] DetectorError),
    /// A result gives no model.
    #[error(transparent)]
    Model(#[from] GlobalError),
    /// No threads.
    #[error("cannot start threads: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
    /// The disk said no.
    #[error("cannot write {path}: {source}")]
    Write {
        /// What.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A heat map cannot be drawn.
    #[error("cannot draw a heat map: {0}")]
    Draw(String),
}

impl RobustnessError {
    /// Whether the command line is at fault.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::Attack(_)
                | Self::Pipeline(_)
                | Self::Unit(_)
                | Self::NoNoise(_)
                | Self::TooFewSites { .. }
                | Self::NoData
        )
    }
}

/// One measure as a ratio to the oracle.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Value {
    /// Its name: `loss`, `vus_120`, `vus_120_gate`, …, or `auroc`.
    pub measure: &'static str,
    /// 1: as good as the honest alone. Larger is better for every measure.
    pub ratio: f64,
}

/// What came of all runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Table {
    /// Every pipeline, attack and measure.
    pub entries: Vec<Entry>,
}

impl Table {
    /// A table for people: mean over seeds and worst seed.
    pub fn table(&self) -> String {
        let row = |entry: &Entry| {
            vec![
                entry.pipeline.clone(),
                entry.attack.clone(),
                entry.measure.to_owned(),
                format!("{:.3}", entry.mean()),
                format!("{:.3}", entry.worst()),
                entry.ratios.len().to_string(),
            ]
        };
        let rows: Vec<_> = self.entries.iter().map(row).collect();
        output::table(
            &["Pipeline", "Attack", "Measure", "Mean", "Worst", "Seeds"],
            &rows,
        )
    }
}

/// Measures everything that is asked for and writes it down. Progress goes to standard error.
///
/// # Errors
/// [`RobustnessError`]
pub fn run(args: &Args) -> Result<Table, RobustnessError> {
    let mut pool = rayon::ThreadPoolBuilder::new();
    if let Some(threads) = args.threads {
        pool = pool.num_threads(threads.get());
    }
    pool.build()?.install(|| measure(args))
}

enum Work {
    Recorded(Box<Recorded>),
    Synthetic(Synthetic),
}

fn measure(args: &Args) -> Result<Table, RobustnessError> {
    let private = args.privacy == Privacy::Block;
    let pipelines: Vec<Pipeline> = if args.rules.is_empty() {
        default_pipelines(args.workload, private)
            .iter()
            .map(|name| name.parse())
            .collect::<Result<_, _>>()?
    } else {
        args.rules
            .iter()
            .map(|name| name.parse())
            .collect::<Result<_, _>>()?
    };
    let attacks: Vec<Option<Attack>> = if args.attacks.is_empty() {
        std::iter::once(None)
            .chain(Attack::all().into_iter().map(Some))
            .collect()
    } else {
        let parse = |name: &String| {
            if name == NONE {
                Ok(None)
            } else {
                name.parse().map(Some)
            }
        };
        args.attacks.iter().map(parse).collect::<Result<_, _>>()?
    };
    let work = match args.workload {
        Workload::Synthetic => Work::Synthetic(Synthetic::new(private, args.rounds)?),
        Workload::Smd => {
            let data = args.data.as_ref().ok_or(RobustnessError::NoData)?;
            let depth = if args.loss_only {
                Depth::Loss
            } else {
                Depth::Detection
            };
            let epsilon = private.then_some(args.epsilon);
            Work::Recorded(Box::new(Recorded::new(data, epsilon, args.malicious, 1, depth)?))
        }
    };
    let total = (pipelines.len() * attacks.len()) as u64 * args.seeds;
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} (left: {eta})")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(total).with_style(style);
    let done = || bar.inc(1);
    let mut entries: Vec<Entry> = Vec::new();
    for seed in 1..=args.seeds {
        let values = match &work {
            Work::Recorded(recorded) => recorded.seed(seed, &pipelines, &attacks, &done)?,
            Work::Synthetic(synthetic) => synthetic.seed(seed, &pipelines, &attacks, &done)?,
        };
        let names = pipelines
            .iter()
            .flat_map(|pipeline| attacks.iter().map(move |attack| (pipeline, attack)));
        for ((pipeline, attack), values) in names.zip(values) {
            let pipeline = pipeline.to_string();
            let attack = attack.map_or_else(|| NONE.to_owned(), Attack::name);
            for Value { measure, ratio } in values {
                let known = entries.iter_mut().find(|entry| {
                    entry.measure == measure && entry.pipeline == pipeline && entry.attack == attack
                });
                match known {
                    Some(entry) => entry.ratios.push(ratio),
                    None => entries.push(Entry {
                        pipeline: pipeline.clone(),
                        attack: attack.clone(),
                        measure,
                        ratios: vec![ratio],
                    }),
                }
            }
        }
        // What there is so far, in case it is ended.
        table::write(&args.out, &entries)?;
    }
    bar.finish_and_clear();
    Ok(Table { entries })
}

/// The mean, and what is shipped.
fn default_pipelines(workload: Workload, private: bool) -> &'static [&'static str] {
    match (workload, private) {
        (Workload::Smd, true) => &["mean", "vet+law+copies+caf"],
        (Workload::Smd, false) => &["mean", "vet+nnm+trimmed_mean"],
        (Workload::Synthetic, true) => &["ema+mean", "law+copies+ema+caf"],
        (Workload::Synthetic, false) => &["mean", "dedup+nnm+trimmed_mean"],
    }
}
