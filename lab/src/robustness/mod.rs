//! Rules against attacks: the whole table, over seeds, as ratios to what the honest sites alone would have learnt.
//!
//! ```text
//! workload (recorded.rs, synthetic.rs) → honest rows, own rows of the hostile
//!   → attack (crate::attack) → pipeline (pipeline.rs: validation, screens, rule) → model → measure / oracle
//!   → table (table.rs): CSV, Markdown, heat maps
//! ```

mod journal;
pub mod network;
pub mod pipeline;
pub mod recorded;
pub mod round;
pub mod synthetic;
pub mod table;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::io::{self, IsTerminal as _};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use theriac_aggregator::evidence::RULE_VERSION;
use theriac_aggregator::robust::{Options, RuleError, rule};
use theriac_command::output::{self, Format};
use theriac_model::detector::DetectorError;
use theriac_model::global::GlobalError;
use theriac_protocol::units::UnitError;

use crate::attack::{Attack, UnknownAttack};
use crate::evaluate::EvaluateError;
use crate::simulate::data::DataError;
use journal::{Journal, Plan};
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
    /// Directory for robustness.csv, robustness.md, a heat map for each measure, and seeds.jsonl, by which `--resume` goes on.
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
    /// Keeps the seeds that `--out` holds of the same table, and measures the others: after an end before its time, or for more seeds.
    #[arg(long)]
    pub resume: bool,
    /// Whether updates carry noise.
    #[arg(long, value_enum, default_value_t = Privacy::Block)]
    pub privacy: Privacy,
    /// ε of one block, for the workload `smd` with noise [default: 4].
    #[arg(long, value_name = "E")]
    pub epsilon: Option<f64>,
    /// Hostile sites among those that train, for the workload `smd` [default: 4].
    #[arg(long, value_name = "F")]
    pub malicious: Option<usize>,
    /// Honest sites that try each model in the place of sending, as `rounds.validators`, for the workload `smd` [default: 0].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    pub validators: Option<u8>,
    /// Only the one-step loss, not the detection: fast; for the workload `smd`.
    #[arg(long)]
    pub loss_only: bool,
    /// Rounds of the workload `synthetic` [default: 60].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub rounds: Option<u32>,
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
    /// An option that the workload does not take.
    #[error("--{option} says nothing about the workload {workload}: leave it out")]
    Unused {
        /// Without dashes.
        option: &'static str,
        /// The workload's name.
        workload: &'static str,
    },
    /// A screen that does nothing there.
    #[error("--rules: `{pipeline}`: {reason}")]
    Idle {
        /// The pipeline.
        pipeline: String,
        /// Why a part of it does nothing.
        reason: &'static str,
    },
    /// A rule that cannot hold with so many sites.
    #[error("--rules: `{pipeline}` of {sites} sites, {hostile} of them hostile: {source}")]
    Rule {
        /// The pipeline.
        pipeline: String,
        /// Sites that send.
        sites: usize,
        /// Hostile ones.
        hostile: usize,
        /// What the rule says.
        source: RuleError,
    },
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
    /// `--resume` without a table to go on with.
    #[error("--resume: there is no table to go on with: {path}: {source}")]
    NothingToResume {
        /// Where its seeds would be.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// `--resume` of another table.
    #[error(
        "--resume: {0} is of another table (other rules, attacks, options, or another program): repeat its options, or leave --resume out and begin anew"
    )]
    AnotherTable(PathBuf),
    /// A seed's line cannot be read, and it is not the end of the file.
    #[error("--resume: line {1} of {0} is damaged: leave --resume out and begin anew")]
    Damaged(PathBuf, usize),
    /// Another run writes there.
    #[error("--out: another run is at {0}: wait for it, or name another folder")]
    InUse(PathBuf),
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
                | Self::Unused { .. }
                | Self::Idle { .. }
                | Self::Rule { .. }
                | Self::TooFewSites { .. }
                | Self::NoData
                | Self::NothingToResume { .. }
                | Self::AnotherTable(_)
                | Self::Damaged(..)
                | Self::InUse(_)
        )
    }
}

/// One measure as a ratio to the oracle.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Value {
    /// Its name: `loss`, `vus_120`, `vus_120_gate`, …, `auroc`, or of validators `loss_validated`, `published`, `harmful`, `harmful_published`.
    pub measure: Cow<'static, str>,
    /// Of `loss`, `loss_validated`, `vus_…` and `auroc` the ratio to the honest alone: 1 is as good, larger is better. Of the others a share of the new machines, 0 to 1: of
    /// `harmful` and `harmful_published` less is better.
    #[serde(deserialize_with = "or_no_number")]
    pub ratio: f64,
}

/// JSON has no word for what is no finite number.
fn or_no_number<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
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
                entry.measure.to_string(),
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
    check_options(args)?;
    let mut pipelines: Vec<Pipeline> = if args.rules.is_empty() {
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
    // Twice the same is once.
    let mut seen = BTreeSet::new();
    pipelines.retain(|pipeline| seen.insert(*pipeline));
    check_pipelines(args, &pipelines)?;
    let mut attacks: Vec<Option<Attack>> = if args.attacks.is_empty() {
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
    let mut seen = BTreeSet::new();
    attacks.retain(|attack| seen.insert(*attack));
    // Before the work, not after the first seed of it.
    let plan = plan(args, &pipelines, &attacks);
    let (mut journal, known) = Journal::open(&args.out, &plan, args.resume)?;
    if !args.resume {
        table::write(&args.out, &[], &provenance(args, 0))?;
    }
    let work = match args.workload {
        Workload::Synthetic => {
            let rounds = args.rounds.unwrap_or(synthetic::ROUNDS);
            Work::Synthetic(Synthetic::new(private, rounds)?)
        }
        Workload::Smd => {
            let data = args.data.as_ref().ok_or(RobustnessError::NoData)?;
            let depth = if args.loss_only {
                Depth::Loss
            } else {
                Depth::Detection
            };
            let epsilon = private.then_some(args.epsilon.unwrap_or(EPSILON));
            let validators = usize::from(args.validators.unwrap_or(0));
            let recorded = Recorded::new(data, epsilon, hostile(args), validators, 1, depth)?;
            for pipeline in &pipelines {
                check_rule(pipeline, recorded.senders(), hostile(args), private)?;
            }
            Work::Recorded(Box::new(recorded))
        }
    };
    let total = (pipelines.len() * attacks.len()) as u64 * args.seeds;
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} (left: {eta})")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(total).with_style(style);
    let counted = AtomicU64::new(0);
    let in_a_terminal = io::stderr().is_terminal();
    let done = || {
        bar.inc(1);
        let count = counted.fetch_add(1, Ordering::Relaxed) + 1;
        // A log gets a line for each twentieth.
        if !in_a_terminal && (count * 20) / total > ((count - 1) * 20) / total {
            eprintln!("{count} of {total} done");
        }
    };
    let mut entries: Vec<Entry> = Vec::new();
    if !known.is_empty() {
        let kept = (known.len() as u64).min(args.seeds);
        eprintln!("{kept} of {} seeds were measured before and are kept", args.seeds);
    }
    let mut known = known.into_iter();
    for seed in 1..=args.seeds {
        let values = if let Some(values) = known.next() {
            (0..values.len()).for_each(|_| done());
            bar.reset_eta();
            values
        } else {
            let values = match &work {
                Work::Recorded(recorded) => recorded.seed(seed, &pipelines, &attacks, &done)?,
                Work::Synthetic(synthetic) => synthetic.seed(seed, &pipelines, &attacks, &done)?,
            };
            journal.take(&values)?;
            values
        };
        let names = plan
            .pipelines
            .iter()
            .flat_map(|pipeline| plan.attacks.iter().map(move |attack| (pipeline, attack)));
        for ((pipeline, attack), values) in names.zip(values) {
            for Value { measure, ratio } in values {
                let known = entries.iter_mut().find(|entry| {
                    entry.measure == measure && entry.pipeline == *pipeline && entry.attack == *attack
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
        table::write(&args.out, &entries, &provenance(args, seed))?;
    }
    bar.finish_and_clear();
    Ok(Table { entries })
}

/// What a seed's figures depend on, but the seed.
fn plan(args: &Args, pipelines: &[Pipeline], attacks: &[Option<Attack>]) -> Plan {
    Plan {
        program: format!("theriac-lab {}, rules {RULE_VERSION}", env!("CARGO_PKG_VERSION")),
        options: format!(
            "{:?} {} {:?} epsilon {:?} malicious {} validators {:?} loss only {} rounds {:?}",
            args.workload,
            args.data.as_deref().map(files).unwrap_or_default(),
            args.privacy,
            args.epsilon.unwrap_or(EPSILON),
            hostile(args),
            args.validators,
            args.loss_only,
            args.rounds.unwrap_or(synthetic::ROUNDS)
        ),
        pipelines: pipelines.iter().map(ToString::to_string).collect(),
        attacks: attacks
            .iter()
            .map(|attack| attack.map_or_else(|| NONE.to_owned(), Attack::name))
            .collect(),
    }
}

/// How many files a folder has and how long they are together: other data are another table.
fn files(dir: &Path) -> String {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let sizes = entries.filter_map(|entry| Some(entry.metadata().ok()?.len()));
    let (count, bytes) = sizes.fold((0_u64, 0_u64), |(count, bytes), size| {
        (count + 1, bytes.saturating_add(size))
    });
    format!("{count} files, {bytes} bytes")
}

/// ε of one block where none is asked for.
const EPSILON: f64 = 4.0;
/// Hostile machines where no number is asked for.
const MALICIOUS: usize = 4;

fn hostile(args: &Args) -> usize {
    match args.workload {
        Workload::Smd => args.malicious.unwrap_or(MALICIOUS),
        Workload::Synthetic => synthetic::HOSTILE,
    }
}

/// Options that say nothing about the workload are a mistake.
fn check_options(args: &Args) -> Result<(), RobustnessError> {
    let given: &[(&'static str, bool)] = match args.workload {
        Workload::Synthetic => &[
            ("data", args.data.is_some()),
            ("epsilon", args.epsilon.is_some()),
            ("malicious", args.malicious.is_some()),
            ("validators", args.validators.is_some()),
            ("loss-only", args.loss_only),
        ],
        Workload::Smd => &[
            ("rounds", args.rounds.is_some()),
            ("epsilon", args.epsilon.is_some() && args.privacy == Privacy::Off),
        ],
    };
    let workload = match args.workload {
        Workload::Smd => "smd",
        Workload::Synthetic => "synthetic",
    };
    match given.iter().find(|(_, given)| *given) {
        Some((option, _)) => Err(RobustnessError::Unused { option, workload }),
        None => Ok(()),
    }
}

fn check_pipelines(args: &Args, pipelines: &[Pipeline]) -> Result<(), RobustnessError> {
    for pipeline in pipelines {
        let idle = match args.workload {
            Workload::Synthetic if pipeline.vet => {
                Some("vet+ looks at moments, and this workload sends weight changes")
            }
            Workload::Smd if pipeline.memory => Some("ema+ is a mean over rounds, and this workload has one"),
            _ => None,
        };
        if let Some(reason) = idle {
            let pipeline = pipeline.to_string();
            return Err(RobustnessError::Idle { pipeline, reason });
        }
        if args.workload == Workload::Synthetic {
            check_rule(
                pipeline,
                synthetic::SITES,
                hostile(args),
                args.privacy == Privacy::Block,
            )?;
        }
    }
    Ok(())
}

/// A rule that no round can end with gives no figure.
fn check_rule(
    pipeline: &Pipeline,
    sites: usize,
    hostile: usize,
    private: bool,
) -> Result<(), RobustnessError> {
    let options = Options {
        private,
        ..Options::default()
    };
    let made = rule(pipeline.rule, pipeline.rule.withstands(hostile), &options);
    made.and_then(|rule| rule.check(sites))
        .map_err(|source| RobustnessError::Rule {
            pipeline: pipeline.to_string(),
            sites,
            hostile,
            source,
        })
}

/// How a table came about, for its head.
fn provenance(args: &Args, seeds: u64) -> String {
    let work = match args.workload {
        Workload::Smd => format!(
            "recorded machines, each in turn new, {} of the others hostile{}, one round of moments",
            hostile(args),
            args.validators
                .map_or_else(String::new, |count| format!(", {count} of the honest validators"))
        ),
        Workload::Synthetic => format!(
            "a made fleet of {} sites, {} hostile, {} rounds of weight changes",
            synthetic::SITES,
            synthetic::HOSTILE,
            args.rounds.unwrap_or(synthetic::ROUNDS)
        ),
    };
    let noise = match (args.privacy, args.workload) {
        (Privacy::Off, _) => "no noise".to_owned(),
        (Privacy::Block, Workload::Smd) => {
            format!(
                "noise of epsilon {} for one block",
                args.epsilon.unwrap_or(EPSILON)
            )
        }
        (Privacy::Block, Workload::Synthetic) => "noise as long as the clipping norm".to_owned(),
    };
    format!(
        "theriac-lab {} robustness: {work}; {noise}; seeds 1 to {seeds}. Ratio to the mean of the honest sites alone, 1 is as good: mean over the seeds, \
         in brackets the worst. An aggregator's f: it shrinks by copies, not by refused updates.{}",
        env!("CARGO_PKG_VERSION"),
        if args.validators.is_some() { SHARES } else { "" }
    )
}

/// What the measures of validators are.
const SHARES: &str = " loss_validated is loss where a model that validators turned down left the one before it in force; the others are shares of the new machines: \
    published, harmful (loss more than 5 % above that of the model in force), and harmful and published; a round without a result is none of them.";

/// The mean, and what is shipped.
fn default_pipelines(workload: Workload, private: bool) -> &'static [&'static str] {
    match (workload, private) {
        (Workload::Smd, true) => &["mean", "vet+law+copies+caf"],
        (Workload::Smd, false) => &["mean", "vet+nnm+trimmed_mean"],
        (Workload::Synthetic, true) => &["mean", "law+copies+caf"],
        (Workload::Synthetic, false) => &["mean", "dedup+nnm+trimmed_mean"],
    }
}
