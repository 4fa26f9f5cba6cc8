//! Detectors against each other on labelled recordings, under the same settings for every recording.
//!
//! Fits see the train part alone. The score files are for `evaluate`; the alarms are those that an edge would raise with the
//! threshold that it found without labels.

mod choose;
mod data;
mod measure;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rayon::prelude::*;
use serde::Serialize;
use theriac_command::output::{self, Format};
use theriac_command::progress::Steps;
use theriac_model::arm::Arm;
use theriac_model::detector::{Detector, DetectorError, FitOptions, NetworkOptions, WARM_UP_ROWS};
use theriac_model::feature::FeatureSchema;
use theriac_model::io::{write_npy_f32, write_npy_u8};
use theriac_model::threshold::AlarmState;

pub use choose::{CANDIDATES, choose};
pub use data::{DataError, Recording, UnknownView, View, load};
pub use measure::{Alarms, alarms, average_precision};

/// Compares detectors on labelled recordings.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Directory with NAME.train, NAME.test and NAME.label, or NAME.time, NAME.value and NAME.label, each .npy.gz.
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// Directory for VIEW/labels/, VIEW/ARM/ (scores), VIEW/ARM/alarms/ and summary.json.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Which views: all, 5min, even, odd, 5min-even, 5min-odd.
    #[arg(long, value_name = "A,B", value_delimiter = ',', default_value = "all")]
    pub views: Vec<View>,
    /// Which detectors; the first is what the others are compared with.
    #[arg(
        long,
        value_name = "A,B",
        value_delimiter = ',',
        default_value = "reference,own-full,own,full"
    )]
    pub arms: Vec<Arm>,
    /// Adds an arm that is chosen for each recording by faults injected into the tail of its train part.
    #[arg(long)]
    pub choose: bool,
    /// Fits the residual network once for each seed from 1 to N, as further arms.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub network_seeds: u64,
    /// Gradient steps of the residual network.
    #[arg(long, value_name = "N", default_value_t = 1500)]
    pub network_steps: usize,
    /// Share of a one-channel recording that is fitted on; the rest is scored.
    #[arg(long, value_name = "SHARE", default_value_t = 0.15)]
    pub fit_share: f64,
    /// False alarms per day that thresholds aim at, 0.01 to 1000.
    #[arg(long, value_name = "N", default_value_t = 1.0, value_parser = false_alarms)]
    pub false_alarms_per_day: f64,
    /// VUS-PR too, as `evaluate` gives it with windows up to 100 rows: some seconds more for each detector.
    #[arg(long)]
    pub vus: bool,
    /// `human`, or `json` for the summary on standard output.
    #[arg(long, default_value = "human")]
    pub format: Format,
}

/// Longest buffer of VUS-PR, in rows: that of `evaluate`.
const VUS_WINDOW: usize = 100;

fn false_alarms(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "it is no number".to_owned())?;
    (0.01..=1_000.0)
        .contains(&number)
        .then_some(number)
        .ok_or_else(|| "it must be 0.01 to 1000".to_owned())
}

/// Why there is no comparison.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompareError {
    /// There is nothing to compare on.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A recording cannot be fitted or scored.
    #[error("{name}: {source}")]
    Detector {
        /// Which.
        name: String,
        /// Why.
        source: DetectorError,
    },
    /// The disk said no.
    #[error("cannot write {path}: {source}")]
    Write {
        /// What.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// One detector on one recording.
#[derive(Debug, Clone, Serialize)]
pub struct Measured {
    /// Which arm it was.
    pub arm: Arm,
    /// Average precision of the scores, point by point; `None` without a labelled row.
    pub auc_pr: Option<f64>,
    /// Volume under the range-aware precision-recall surface, with `--vus`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vus_pr: Option<f64>,
    /// What the alarms came to.
    #[serde(flatten)]
    pub alarms: Alarms,
    /// Time of the fit.
    pub fit_seconds: f64,
    /// Time of scoring, per row.
    pub score_microseconds: f64,
}

/// One detector on all recordings of one view.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// The view.
    pub view: String,
    /// The detector.
    pub arm: String,
    /// Mean over the recordings with an event.
    pub auc_pr: f64,
    /// Recordings whose `auc_pr` is above that of the first detector.
    pub wins: usize,
    /// Mean VUS-PR over the recordings with an event, with `--vus`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vus_pr: Option<f64>,
    /// Recordings whose VUS-PR is above that of the first detector, with `--vus`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vus_wins: Option<usize>,
    /// Recordings with an event.
    pub of: usize,
    /// False alarms per day: mean over the recordings.
    pub false_alarms_per_day: f64,
    /// False alarms per day of the worst recording.
    pub false_alarms_per_day_worst: f64,
    /// Share of events with an alarm: mean over the recordings with an event.
    pub event_recall: f64,
    /// Longest fit.
    pub fit_seconds_max: f64,
    /// Every recording.
    pub recordings: BTreeMap<String, Measured>,
}

/// What came of it.
#[derive(Debug, Clone, Serialize)]
pub struct Compared {
    /// Views in the order asked, detectors within them.
    pub rows: Vec<Summary>,
}

impl Compared {
    /// A table for people.
    pub fn table(&self) -> String {
        let row = |row: &Summary| {
            let vus = row.vus_pr.zip(row.vus_wins);
            vec![
                row.view.clone(),
                row.arm.clone(),
                vus.map_or_else(|| "-".to_owned(), |(vus, _)| format!("{vus:.3}")),
                vus.map_or_else(|| "-".to_owned(), |(_, wins)| format!("{wins}/{}", row.of)),
                format!("{:.3}", row.auc_pr),
                format!("{}/{}", row.wins, row.of),
                format!("{:.2}", row.false_alarms_per_day),
                format!("{:.2}", row.false_alarms_per_day_worst),
                format!("{:.2}", row.event_recall),
                format!("{:.2}", row.fit_seconds_max),
            ]
        };
        let heads = [
            "View",
            "Arm",
            "VUS-PR",
            "Wins",
            "AUC-PR",
            "Wins",
            "FA a day",
            "Worst",
            "Recall",
            "Longest fit, s",
        ];
        output::table(&heads, &self.rows.iter().map(row).collect::<Vec<_>>())
    }
}

/// Runs the comparison. On a terminal a bar on standard error shows how far it is.
///
/// # Errors
/// [`CompareError`]; files written until then stay.
pub fn run(args: &Args) -> Result<Compared, CompareError> {
    let recordings = load(&args.data, args.fit_share)?;
    let mut rows = Vec::new();
    let work = args.views.len() * contestants(args).len() * recordings.len();
    let progress = Steps::new("recordings scored", work);
    for view in &args.views {
        let seen: Vec<Recording> = recordings
            .iter()
            .map(|recording| view.of(recording))
            .collect::<Result<_, _>>()?;
        let place = args.out.join(view.name());
        write_labels(&place.join("labels"), &seen)?;
        let mut first: Option<BTreeMap<String, Measured>> = None;
        for contestant in contestants(args) {
            let label = contestant.label();
            let dir = place.join(&label);
            create(&dir.join("alarms"))?;
            let measured: BTreeMap<String, Measured> = seen
                .par_iter()
                .map(|recording| {
                    let measured = one(args, contestant, recording, &dir)?;
                    progress.step();
                    Ok((recording.name.clone(), measured))
                })
                .collect::<Result<_, CompareError>>()?;
            let against = first.get_or_insert_with(|| measured.clone());
            let summary = summarise(&view.name(), &label, measured.clone(), against);
            rows.push(summary);
        }
    }
    let compared = Compared { rows };
    let path = args.out.join("summary.json");
    let text = serde_json::to_string_pretty(&compared).map_err(|error| write(&path, error.into()))?;
    fs::write(&path, text + "\n").map_err(|source| write(&path, source))?;
    Ok(compared)
}

/// One detector of a comparison.
#[derive(Debug, Clone, Copy)]
enum Contestant {
    Fixed(Arm),
    /// The default arm with a trained residual network.
    Network(NetworkOptions),
    Chosen,
}

impl Contestant {
    fn label(self) -> String {
        match self {
            Self::Fixed(arm) => arm.to_string(),
            Self::Network(network) => format!("network-{}", network.seed),
            Self::Chosen => "chosen".to_owned(),
        }
    }
}

fn contestants(args: &Args) -> Vec<Contestant> {
    let networks = (1..=args.network_seeds).map(|seed| {
        let steps = args.network_steps;
        Contestant::Network(NetworkOptions { steps, seed })
    });
    let fixed = args.arms.iter().map(|arm| Contestant::Fixed(*arm));
    let chosen = args.choose.then_some(Contestant::Chosen);
    fixed.chain(chosen).chain(networks).collect()
}

fn one(
    args: &Args,
    contestant: Contestant,
    recording: &Recording,
    dir: &Path,
) -> Result<Measured, CompareError> {
    let failed = |source| CompareError::Detector {
        name: recording.name.clone(),
        source,
    };
    let (arm, network) = match contestant {
        Contestant::Fixed(arm) => (arm, None),
        Contestant::Network(network) => (Arm::default(), Some(network)),
        Contestant::Chosen => (choose(recording).map_err(failed)?, None),
    };
    let options = FitOptions {
        arm,
        network,
        false_alarms_per_day: args.false_alarms_per_day,
        ..FitOptions::new(recording.step)
    };
    let schema = FeatureSchema::recorded("recorded-v1", recording.train.channels());
    let started = Instant::now();
    let detector = Detector::fit(&schema, &recording.train, &options).map_err(failed)?;
    let fit_seconds = started.elapsed().as_secs_f64();
    let started = Instant::now();
    let scores = detector.score_series(&recording.test).map_err(failed)?;
    let rows = scores.len();
    let score_microseconds = started.elapsed().as_secs_f64() * 1e6 / rows.max(1) as f64;

    let mut state = AlarmState::new(detector.threshold()).with_step(recording.step);
    let alarmed: Vec<bool> = scores
        .iter()
        .enumerate()
        .map(|(row, score)| {
            let warm = row >= WARM_UP_ROWS;
            state.push(if warm { *score } else { f32::NAN }).alarmed()
        })
        .collect();
    let path = dir.join(format!("{}.npy", recording.name));
    write_npy_f32(&path, &[rows], &scores).map_err(|source| write(&path, source))?;
    write_flags(
        &dir.join("alarms").join(format!("{}.npy", recording.name)),
        &alarmed,
    )?;
    Ok(Measured {
        arm,
        auc_pr: average_precision(&recording.labels, &scores),
        vus_pr: (args.vus && recording.labels.contains(&true))
            .then(|| crate::evaluate::vus_pr(&recording.labels, &scores, VUS_WINDOW)),
        alarms: alarms(&recording.labels, &alarmed, recording.step),
        fit_seconds,
        score_microseconds,
    })
}

fn summarise(
    view: &str,
    arm: &str,
    recordings: BTreeMap<String, Measured>,
    first: &BTreeMap<String, Measured>,
) -> Summary {
    let mean = |values: &mut dyn Iterator<Item = f64>| {
        let (count, sum) = values.fold((0.0, 0.0), |(count, sum), value| (count + 1.0, sum + value));
        if count > 0.0 { sum / count } else { f64::NAN }
    };
    let rates = || recordings.values().map(|m| m.alarms.false_alarms_per_day);
    let won = |(name, measured): (&String, &Measured), of: fn(&Measured) -> Option<f64>| {
        let other = first.get(name).and_then(of);
        of(measured).zip(other).is_some_and(|(own, other)| own > other)
    };
    let wins = |of: fn(&Measured) -> Option<f64>| recordings.iter().filter(|pair| won(*pair, of)).count();
    let measured_vus = recordings.values().any(|m| m.vus_pr.is_some());
    Summary {
        view: view.to_owned(),
        arm: arm.to_owned(),
        auc_pr: mean(&mut recordings.values().filter_map(|m| m.auc_pr)),
        wins: wins(|m| m.auc_pr),
        vus_pr: measured_vus.then(|| mean(&mut recordings.values().filter_map(|m| m.vus_pr))),
        vus_wins: measured_vus.then(|| wins(|m| m.vus_pr)),
        of: recordings.values().filter(|m| m.auc_pr.is_some()).count(),
        false_alarms_per_day: mean(&mut rates()),
        false_alarms_per_day_worst: rates().fold(0.0, f64::max),
        event_recall: mean(&mut recordings.values().filter_map(|m| m.alarms.event_recall)),
        fit_seconds_max: recordings.values().map(|m| m.fit_seconds).fold(0.0, f64::max),
        recordings,
    }
}

fn write_labels(dir: &Path, recordings: &[Recording]) -> Result<(), CompareError> {
    create(dir)?;
    recordings
        .iter()
        .try_for_each(|r| write_flags(&dir.join(format!("{}.label.npy", r.name)), &r.labels))
}

fn write_flags(path: &Path, flags: &[bool]) -> Result<(), CompareError> {
    let flags: Vec<u8> = flags.iter().map(|flag| u8::from(*flag)).collect();
    write_npy_u8(path, &[flags.len()], &flags).map_err(|source| write(path, source))
}

fn create(dir: &Path) -> Result<(), CompareError> {
    fs::create_dir_all(dir).map_err(|source| write(dir, source))
}

fn write(path: &Path, source: io::Error) -> CompareError {
    CompareError::Write {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evaluate;

    /// VUS-PR of one machine's scores, by the evaluator.
    fn vus_pr(out: &Path, arm: &str, machine: &str) -> f64 {
        let scores = out.join("one").join(arm).join(machine);
        create(&scores).unwrap();
        let file = format!("{machine}.npy");
        fs::copy(out.join("all").join(arm).join(&file), scores.join(&file)).unwrap();
        let args = evaluate::Args {
            scores,
            labels: out.join("all/labels"),
            train_scores: None,
            alarms: None,
            against: None,
            step_seconds: 60.0,
            window: 100,
            budget: 1.0,
            merge_gap: 5,
            seed: 1,
            format: Format::Human,
        };
        let measured = serde_json::to_value(evaluate::run(&args).unwrap()).unwrap();
        measured["mean"]["vus_pr"].as_f64().unwrap()
    }

    /// The published figures of the reference and of the default, to the third digit; only where the recordings are.
    #[test]
    fn reference_and_default_have_their_known_areas() {
        let data = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/data/smd"));
        if !data.exists() {
            println!("left out: no recorded servers in {}", data.display());
            return;
        }
        let out = tempfile::tempdir().unwrap();
        let args = Args {
            data: data.to_owned(),
            out: out.path().to_owned(),
            views: vec![View::ALL],
            arms: vec![Arm::Reference, Arm::OwnFull],
            choose: false,
            network_seeds: 0,
            network_steps: 0,
            fit_share: 0.15,
            false_alarms_per_day: 1.0,
            vus: false,
            format: Format::Human,
        };
        let compared = run(&args).unwrap();
        let [reference, default] = &compared.rows[..] else {
            panic!("two detectors");
        };
        assert!((reference.auc_pr - 0.397).abs() < 0.0006, "{}", reference.auc_pr);
        assert!((default.auc_pr - 0.499).abs() < 0.0006, "{}", default.auc_pr);
        // Three of the machines, because the volume under the surface takes seconds each in an unoptimised build.
        let machines = ["machine-1-6", "machine-2-4", "machine-3-3"];
        for (arm, expected) in [
            ("reference", [0.6436, 0.3560, 0.3202]),
            ("own-full", [0.9212, 0.9227, 0.4976]),
        ] {
            for (machine, expected) in machines.into_iter().zip(expected) {
                let found = vus_pr(out.path(), arm, machine);
                assert!(
                    (found - expected).abs() < 0.001,
                    "{arm} on {machine}: VUS-PR {found}"
                );
            }
        }
        // In AUC-PR; in VUS-PR it is 12.
        assert!(default.wins >= 10, "{} of 13", default.wins);
        assert!(
            default.false_alarms_per_day <= 1.0,
            "{}",
            default.false_alarms_per_day
        );
        assert!(default.false_alarms_per_day_worst <= 2.0);
        assert!(default.event_recall >= 0.75, "{}", default.event_recall);
    }
}
