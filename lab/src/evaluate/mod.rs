//! Scores against labels: the detection table, and two detectors compared machine by machine.
//!
//! ```text
//! labels/NAME.label.npy.gz + scores/NAME.npy → Ranking → areas, volumes      (curves.rs: all thresholds)
//!                                            → prediction → alarms, ranges   (events.rs: one threshold)
//!                                            → Measures of each machine → mean, paired differences
//! ```
//!
//! It shares no code with the detector that it judges: it reads files only. Measures named `oracle_*` pick their threshold
//! with the labels and are upper bounds; `bud_*` lowers the threshold until the false alarms reach the budget, which
//! compares detectors at an equal load; `op_*` uses the scores of the train part and no label; `alarm_*` judges the
//! alarms as the detector raised them, which is what an operator gets.

mod curves;
mod events;
mod files;
mod measure;
mod paired;
mod report;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Serialize;
use theriac_command::output::Format;
use theriac_model::io::ReadError;

use files::{find, labelled_machines, read_mask, read_values};
use measure::{Given, measure};

pub use measure::{Measures, Settings};
pub use paired::PairedDifference;

/// Measures that are compared when a second folder is given.
const COMPARED: [&str; 6] = [
    "vus_pr",
    "auc_pr",
    "vus_roc",
    "oracle_range_f1",
    "bud_event_recall",
    "op_event_recall",
];
/// Longest window: the work grows with it.
const WINDOW_MAX: u64 = 10_000;

/// Arguments of `theriac-lab evaluate`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Scores, one file a machine: `NAME.npy`, `.npy.gz`, `.csv` or `.csv.gz`, larger = more anomalous, NaN = no alarm.
    #[arg(long)]
    pub scores: PathBuf,
    /// Labels: `NAME.label.npy.gz` (or `.npy`, `.csv`, `.csv.gz`), 1 for each anomalous sample, else 0.
    #[arg(long)]
    pub labels: PathBuf,
    /// Scores of the train parts: adds the operating point that needs no labels.
    #[arg(long)]
    pub train_scores: Option<PathBuf>,
    /// Alarms as they were raised, 0 or 1 a sample: adds what an operator gets.
    #[arg(long)]
    pub alarms: Option<PathBuf>,
    /// Scores of another detector: adds paired differences with 90 % bootstrap intervals over machines.
    #[arg(long)]
    pub against: Option<PathBuf>,
    /// Time between samples in seconds.
    #[arg(long, default_value_t = 60.0)]
    pub step_seconds: f64,
    /// Longest buffer of the range-aware measures, in samples.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(0..=WINDOW_MAX))]
    pub window: u64,
    /// False alarms per day and machine.
    #[arg(long, default_value_t = 1.0)]
    pub budget: f64,
    /// Alarms with at most so many samples between them are one.
    #[arg(long, default_value_t = 5)]
    pub merge_gap: usize,
    /// Seed of the bootstrap.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// `human` or `json`.
    #[arg(long, default_value = "human")]
    pub format: Format,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvaluateError {
    /// An option makes no sense.
    #[error("{option} {value} is out of range: {range}")]
    Option {
        /// The option.
        option: &'static str,
        /// What was given.
        value: f64,
        /// What is taken.
        range: &'static str,
    },
    /// A folder cannot be listed.
    #[error("cannot list {path}: {source}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A table's cell is no number.
    #[error("{path}, line {line}: the last column is no number")]
    NotANumber {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// A label or alarm is neither 0 nor 1.
    #[error("{path}, sample {row} is {found}: labels and alarms are 0 or 1")]
    NotAMask {
        /// The file.
        path: PathBuf,
        /// The sample, from 0.
        row: usize,
        /// What is there.
        found: f64,
    },
    /// A file has another number of samples than the labels.
    #[error(
        "{path} has {found} samples, the labels of {machine} have {expected}: they must be of the same rows"
    )]
    Length {
        /// The file.
        path: PathBuf,
        /// The machine.
        machine: String,
        /// Samples with a label.
        expected: usize,
        /// Samples in the file.
        found: usize,
    },
    /// A file of train scores is empty.
    #[error("{0} holds no value")]
    Empty(PathBuf),
    /// No machine has both labels with an anomaly and scores.
    #[error(
        "nothing to evaluate: {labelled} machines have labels in {labels}, none of them with an anomaly has scores in {scores}"
    )]
    Nothing {
        /// Machines with labels.
        labelled: usize,
        /// Where they were looked for.
        labels: PathBuf,
        /// Where scores were looked for.
        scores: PathBuf,
    },
}

/// The measures of one machine.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Machine {
    /// Its name.
    pub name: String,
    /// Samples.
    pub samples: usize,
    /// What was measured.
    pub measures: Measures,
}

/// The whole table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Evaluation {
    /// What the measures depend on.
    pub settings: Settings,
    /// Means over the machines, each without NaN.
    pub mean: Measures,
    /// Greatest false-alarm rate of any machine where alarms were given.
    pub worst_alarm_fa_per_day: Option<f64>,
    /// Each machine, by name.
    pub machines: Vec<Machine>,
    /// Differences to `--against`.
    pub paired: Vec<PairedDifference>,
    /// Machines with labels and no scores.
    pub missing: Vec<String>,
    /// Machines whose labels hold no anomaly: nothing but false alarms could be told of them.
    pub without_anomaly: Vec<String>,
    /// Files of train scores, alarms or the other detector that were not there.
    pub absent: Vec<PathBuf>,
}

/// Volume under the range-aware precision-recall surface of one machine over buffers of 0 to `window` samples; NaN where one of
/// the classes is missing. Labels and scores are `[time]`.
///
/// # Panics
/// When there are not as many labels as scores.
pub fn vus_pr(labelled: &[bool], scores: &[f32], window: usize) -> f64 {
    let scores = scores.iter().map(|score| f64::from(*score)).collect();
    curves::Ranking::new(labelled.to_vec(), scores).volumes(window).1
}

/// The labels of one machine, from a file as `--labels` holds them.
///
/// # Errors
/// [`EvaluateError`], whose text names the file.
pub fn labels(path: &Path) -> Result<Vec<bool>, EvaluateError> {
    read_mask(path, None)
}

/// Measures every machine that has labels and scores, in parallel.
///
/// # Errors
/// [`EvaluateError`], whose text names the file.
pub fn run(args: &Args) -> Result<Evaluation, EvaluateError> {
    let settings = check(args)?;
    let names = labelled_machines(&args.labels)?;
    let read: Vec<Found> = names
        .par_iter()
        .map(|name| evaluate(name, args, settings))
        .collect::<Result<_, _>>()?;
    let mut evaluation = Evaluation {
        settings,
        mean: Measures { columns: Vec::new() },
        worst_alarm_fa_per_day: None,
        machines: Vec::new(),
        paired: Vec::new(),
        missing: Vec::new(),
        without_anomaly: Vec::new(),
        absent: Vec::new(),
    };
    let mut theirs = Vec::new();
    for (name, found) in names.iter().zip(read) {
        match found {
            Found::NoScores => evaluation.missing.push(name.clone()),
            Found::NoAnomaly => evaluation.without_anomaly.push(name.clone()),
            Found::Measured {
                machine,
                other,
                absent,
            } => {
                evaluation.machines.push(machine);
                theirs.push(other);
                evaluation.absent.extend(absent);
            }
        }
    }
    if evaluation.machines.is_empty() {
        return Err(EvaluateError::Nothing {
            labelled: names.len(),
            labels: args.labels.clone(),
            scores: args.scores.clone(),
        });
    }
    evaluation.mean = mean(&evaluation.machines);
    evaluation.worst_alarm_fa_per_day = evaluation
        .machines
        .iter()
        .filter_map(|machine| machine.measures.get("alarm_fa_per_day"))
        .reduce(f64::max);
    evaluation.paired = COMPARED
        .iter()
        .filter_map(|measure| difference(measure, &evaluation.machines, &theirs, args.seed))
        .collect();
    Ok(evaluation)
}

fn check(args: &Args) -> Result<Settings, EvaluateError> {
    let refuse = |option, value, range| Err(EvaluateError::Option { option, value, range });
    if !(args.step_seconds > 0.0 && args.step_seconds.is_finite()) {
        return refuse("--step-seconds", args.step_seconds, "above 0");
    }
    if !(args.budget > 0.0 && args.budget * args.step_seconds < events::SECONDS_PER_DAY) {
        return refuse(
            "--budget",
            args.budget,
            "above 0 and less than one alarm a sample",
        );
    }
    Ok(Settings {
        step_seconds: args.step_seconds,
        window: usize::try_from(args.window).unwrap_or(usize::MAX),
        budget: args.budget,
        merge_gap: args.merge_gap,
    })
}

/// What there is of one machine.
enum Found {
    NoScores,
    NoAnomaly,
    Measured {
        machine: Machine,
        /// Measures of the other detector.
        other: Option<Measures>,
        absent: Vec<PathBuf>,
    },
}

fn evaluate(name: &str, args: &Args, settings: Settings) -> Result<Found, EvaluateError> {
    let Some(scores_path) = find(&args.scores, name) else {
        return Ok(Found::NoScores);
    };
    let Some(labels_path) = find(&args.labels, &format!("{name}.label")) else {
        return Ok(Found::NoScores);
    };
    let labelled = read_mask(&labels_path, None)?;
    let scores = sized(read_values(&scores_path)?, name, labelled.len(), &scores_path)?;
    if !labelled.contains(&true) {
        return Ok(Found::NoAnomaly);
    }
    let mut absent = Vec::new();
    let mut beside = |folder: Option<&PathBuf>| {
        let folder = folder?;
        let found = find(folder, name);
        if found.is_none() {
            absent.push(folder.join(name));
        }
        found
    };
    let (train, alarms, against) = (
        beside(args.train_scores.as_ref()),
        beside(args.alarms.as_ref()),
        beside(args.against.as_ref()),
    );
    let train = train.map(|path| filled(&path)).transpose()?;
    let alarms = alarms
        .map(|path| sized(read_mask(&path, Some(false))?, name, labelled.len(), &path))
        .transpose()?;
    let other = against
        .map(|path| sized(read_values(&path)?, name, labelled.len(), &path))
        .transpose()?;
    let other = other.map(|scores| {
        let given = Given {
            scores,
            ..Given::default()
        };
        measure(labelled.clone(), given, settings)
    });
    let machine = Machine {
        name: name.to_owned(),
        samples: labelled.len(),
        measures: measure(
            labelled,
            Given {
                scores,
                train,
                alarms,
            },
            settings,
        ),
    };
    Ok(Found::Measured {
        machine,
        other,
        absent,
    })
}

fn sized<T>(values: Vec<T>, machine: &str, expected: usize, path: &Path) -> Result<Vec<T>, EvaluateError> {
    if values.len() == expected {
        return Ok(values);
    }
    Err(EvaluateError::Length {
        path: path.to_owned(),
        machine: machine.to_owned(),
        expected,
        found: values.len(),
    })
}

fn filled(path: &Path) -> Result<Vec<f64>, EvaluateError> {
    let values = read_values(path)?;
    if values.is_empty() {
        return Err(EvaluateError::Empty(path.to_owned()));
    }
    Ok(values)
}

/// Means of the measures that every machine has, without NaN.
fn mean(machines: &[Machine]) -> Measures {
    let Some(first) = machines.first() else {
        return Measures { columns: Vec::new() };
    };
    let columns = first.measures.columns.iter().filter_map(|(name, _)| {
        let all: Option<Vec<f64>> = machines
            .iter()
            .map(|machine| machine.measures.get(name))
            .collect();
        let known: Vec<f64> = all?.into_iter().filter(|value| !value.is_nan()).collect();
        // None left: NaN, as it should be.
        Some((*name, known.iter().sum::<f64>() / known.len() as f64))
    });
    Measures {
        columns: columns.collect(),
    }
}

fn difference(
    measure: &'static str,
    machines: &[Machine],
    theirs: &[Option<Measures>],
    seed: u64,
) -> Option<PairedDifference> {
    let pairs = machines.iter().zip(theirs).filter_map(|(machine, other)| {
        let ours = machine.measures.get(measure)?;
        Some((machine.name.clone(), ours, other.as_ref()?.get(measure)?))
    });
    paired::compare(measure, pairs, seed)
}
