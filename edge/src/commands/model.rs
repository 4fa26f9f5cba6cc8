//! `train` and `score`: a detector on recorded metrics, without a running edge.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use theriac_command::output::Output;
use theriac_command::problem::Problem;
use theriac_model::detector::{Detector, FitOptions};
use theriac_model::feature::FeatureSchema;
use theriac_model::global::OwnLagWeights;
use theriac_model::io::{ReadReport, Recording, read_recording, write_npy_f32};
use theriac_model::series::Series;

use super::unprinted;

#[derive(Debug, Args)]
pub(super) struct TrainArguments {
    /// Recorded metrics: CSV with a header, .npy or .npy.gz `[time, channel]`.
    #[arg(long)]
    input: PathBuf,
    /// Where the model goes: NAME.safetensors, with its card NAME.json beside it.
    #[arg(long)]
    model: PathBuf,
    /// Seed. The fit itself draws nothing, so every seed gives the same bits; it is kept for models that do.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Time between two rows, where the file does not say.
    #[arg(long, default_value = "1m", value_parser = humantime::parse_duration)]
    step: Duration,
    /// The two half-lives of the score's memory; by default 3 and 12 steps.
    #[arg(long, num_args = 2, value_parser = humantime::parse_duration)]
    half_lives: Option<Vec<Duration>>,
    /// False alarms per day that the threshold aims at.
    #[arg(long, default_value_t = 1.0)]
    false_alarms_per_day: f64,
}

#[derive(Debug, Args)]
pub(super) struct ScoreArguments {
    /// The model's file, NAME.safetensors, with its card NAME.json beside it.
    #[arg(long)]
    model: PathBuf,
    /// Recorded metrics of the same channels.
    #[arg(long)]
    input: PathBuf,
    /// Where the scores go: .npy, one f32 a row.
    #[arg(long)]
    output: PathBuf,
    /// Also writes NAME.causes.npy, `[time, channel]`: what each channel adds to each row's score.
    #[arg(long)]
    explain: bool,
}

/// What `train` prints.
#[derive(Debug, Serialize)]
struct Trained {
    model: PathBuf,
    rows: usize,
    channels: usize,
    missing: u64,
    gaps: u64,
    threshold: f32,
    seed: u64,
}

/// What `score` prints.
#[derive(Debug, Serialize)]
struct ScoredFile {
    output: PathBuf,
    rows: usize,
    missing: u64,
    gaps: u64,
    threshold: f32,
    above_threshold: usize,
    causes: Option<PathBuf>,
}

pub(super) fn train<W: Write>(
    arguments: &TrainArguments,
    output: &mut Output<W>,
) -> Result<ExitCode, Problem> {
    let (dir, name) = model_place(&arguments.model)?;
    let recording = read(&arguments.input)?;
    let schema = schema_of(&recording);
    let series = select(&recording, &schema)?;
    let step = step_of(&series).unwrap_or(arguments.step);
    let mut options = FitOptions {
        prior: Some(OwnLagWeights::public_constant(schema.channels())),
        false_alarms_per_day: arguments.false_alarms_per_day,
        ..FitOptions::new(step)
    };
    if let Some([short, long]) = arguments.half_lives.as_deref() {
        options.half_lives = [*short, *long];
    }
    let unusable = |why: String| {
        Problem::failed("TH-E0322", format!("{}: {why}", arguments.input.display()))
            .hint("record longer, or check that the columns hold numbers")
    };
    if series.values().iter().all(|value| !value.is_finite()) {
        return Err(unusable(format!(
            "none of the {} rows holds a number (empty cells and values beyond ±3.4e38 count as missing)",
            series.rows()
        )));
    }
    let detector = Detector::fit(&schema, &series, &options).map_err(|error| unusable(error.to_string()))?;
    detector.save(&dir, &name).map_err(|error| {
        Problem::failed("TH-E0321", error).hint("check the path and the room on that disk")
    })?;
    let trained = Trained {
        model: arguments.model.clone(),
        rows: series.rows(),
        channels: series.channels(),
        missing: missing(&recording.report),
        gaps: recording.report.gaps,
        threshold: detector.threshold().level(),
        seed: arguments.seed,
    };
    let human = format!(
        "fitted on {} rows of {} channels{}\nthreshold {:.3}\nwrote {} and its card",
        trained.rows,
        trained.channels,
        flaws(&recording.report),
        trained.threshold,
        arguments.model.display(),
    );
    output.result(&trained, human).map_err(unprinted)?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn score<W: Write>(
    arguments: &ScoreArguments,
    output: &mut Output<W>,
) -> Result<ExitCode, Problem> {
    let (dir, name) = model_place(&arguments.model)?;
    let detector = Detector::load(&dir, &name).map_err(|error| {
        Problem::failed("TH-E0321", naming(&arguments.model, &error))
            .hint("train it again with `theriac-edge train`")
    })?;
    let recording = read(&arguments.input)?;
    let series = select(&recording, detector.schema())?;
    let other = |error: &dyn std::fmt::Display| {
        Problem::failed(
            "TH-E0323",
            format!("{} does not fit the model: {error}", arguments.input.display()),
        )
        .hint("score a file with the columns that the model was trained on; its card lists them")
    };
    let causes = arguments
        .explain
        .then(|| arguments.output.with_extension("causes.npy"));
    let scores = if let Some(path) = &causes {
        let (scores, contributions) = detector.explain_series(&series).map_err(|error| other(&error))?;
        write(path, &[series.rows(), series.channels()], &contributions)?;
        scores
    } else {
        detector.score_series(&series).map_err(|error| other(&error))?
    };
    write(&arguments.output, &[scores.len()], &scores)?;
    let threshold = detector.threshold().level();
    let scored = ScoredFile {
        output: arguments.output.clone(),
        rows: scores.len(),
        missing: missing(&recording.report),
        gaps: recording.report.gaps,
        threshold,
        above_threshold: scores.iter().filter(|score| **score >= threshold).count(),
        causes,
    };
    let human = format!(
        "scored {} rows{}\n{} at or above the threshold {threshold:.3}\nwrote {}",
        scored.rows,
        flaws(&recording.report),
        scored.above_threshold,
        arguments.output.display(),
    );
    output.result(&scored, human).map_err(unprinted)?;
    Ok(ExitCode::SUCCESS)
}

/// Folder and name of a model file.
fn model_place(path: &Path) -> Result<(PathBuf, String), Problem> {
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .and_then(|name| name.strip_suffix(".safetensors"));
    match name {
        Some(name) if !name.is_empty() => {
            let dir = path
                .parent()
                .filter(|dir| !dir.as_os_str().is_empty())
                .unwrap_or(Path::new("."));
            Ok((dir.to_owned(), name.to_owned()))
        }
        _ => Err(
            Problem::usage("TH-E0324", format!("`{}` is no model file", path.display()))
                .hint("name it NAME.safetensors; the card NAME.json lies beside it"),
        ),
    }
}

fn read(path: &Path) -> Result<Recording, Problem> {
    read_recording(path).map_err(|error| {
        Problem::failed("TH-E0320", naming(path, &error))
            .hint("metrics are CSV with a header (time first), or .npy or .npy.gz of [time, channel]")
    })
}

/// The error with the file's name, once.
fn naming(path: &Path, error: &dyn std::fmt::Display) -> String {
    let (name, text) = (path.display().to_string(), error.to_string());
    if text.contains(&name) {
        text
    } else {
        format!("{name}: {text}")
    }
}

/// The host's own profile when the columns are its, else one of already scaled recorded channels.
fn schema_of(recording: &Recording) -> FeatureSchema {
    let own = FeatureSchema::host_service_v1();
    let is_own = |names: &[String]| own.features.iter().all(|feature| names.contains(&feature.name));
    match &recording.names {
        Some(names) if is_own(names) => own,
        Some(names) => {
            let mut schema = FeatureSchema::recorded("recorded", names.len());
            for (feature, name) in schema.features.iter_mut().zip(names) {
                feature.name.clone_from(name);
            }
            schema
        }
        None if recording.series.channels() == own.channels() => own,
        None => FeatureSchema::recorded("recorded", recording.series.channels()),
    }
}

fn select(recording: &Recording, schema: &FeatureSchema) -> Result<Series, Problem> {
    recording.select(schema).map_err(|error| {
        Problem::failed("TH-E0323", format!("the file does not fit the model: {error}"))
            .hint("use a file with the columns that the model was trained on; its card lists them")
    })
}

/// The usual time between rows, where the file has times.
fn step_of(series: &Series) -> Option<Duration> {
    let times = series.times_ms()?;
    let mut steps: Vec<u64> = times
        .windows(2)
        .map(|pair| pair[1].saturating_sub(pair[0]))
        .filter(|s| *s > 0)
        .collect();
    steps.sort_unstable();
    steps
        .get(steps.len() / 2)
        .map(|step| Duration::from_millis(*step))
}

fn write(path: &Path, shape: &[usize], values: &[f32]) -> Result<(), Problem> {
    write_npy_f32(path, shape, values).map_err(|error| {
        Problem::failed("TH-E0325", format!("cannot write {}: {error}", path.display()))
            .hint("check the path and the room on that disk")
    })
}

fn missing(report: &ReadReport) -> u64 {
    report.missing.iter().sum()
}

fn flaws(report: &ReadReport) -> String {
    match (missing(report), report.gaps) {
        (0, 0) => String::new(),
        (missing, gaps) => format!(
            " ({missing} missing values, {gaps} gaps of {} rows)",
            report.gap_rows
        ),
    }
}
