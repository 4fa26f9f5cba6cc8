//! `train` and `score`: a detector on recorded metrics, without a running edge.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use theriac_command::output::Output;
use theriac_command::problem::Problem;
use theriac_command::progress::{Progress, during};
use theriac_model::causes::Explained;
use theriac_model::detector::{Detector, FitOptions};
use theriac_model::feature::FeatureSchema;
use theriac_model::global::OwnLagWeights;
use theriac_model::io::{ReadReport, Recording, Selected, read_recording_with, write_npy_f32};
use theriac_model::series::Series;

use super::explain::{self, AlarmView};
use super::picture::{self, Clock, View};
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
    /// Tells every alarm with its ranked causes, and writes NAME.causes.npy, `[time, channel]`: what each channel adds to
    /// each row's score.
    #[arg(long)]
    explain: bool,
    /// Draws metrics, score, threshold, alarms and causes as an SVG.
    #[arg(long, value_name = "OUT.svg")]
    plot: Option<PathBuf>,
}

/// What `train` prints.
#[derive(Debug, Serialize)]
struct Trained {
    model: PathBuf,
    rows: usize,
    channels: usize,
    missing: u64,
    gaps: u64,
    gap_rows: u64,
    threshold: f32,
    /// How strongly each path leans on the public constant, own lags first; `null` = not at all.
    prior_lambda: [Option<f64>; 2],
    seed: u64,
}

/// What `score` prints.
#[derive(Debug, Serialize)]
struct ScoredFile {
    output: PathBuf,
    rows: usize,
    missing: u64,
    /// Columns of the profile that the file does not have.
    absent: Vec<String>,
    gaps: u64,
    gap_rows: u64,
    threshold: f32,
    above_threshold: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    causes: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    plot: Option<PathBuf>,
    /// With `--explain`.
    #[serde(skip_serializing_if = "Option::is_none")]
    alarms: Option<Vec<AlarmView>>,
    /// With `--explain`: version of the global model that the detector leans on, 0 for none.
    #[serde(skip_serializing_if = "Option::is_none")]
    model_version: Option<u64>,
    /// With `--explain`: how strongly each path leans on it or on the public constant, own lags first; `null` = not at all.
    #[serde(skip_serializing_if = "Option::is_none")]
    prior_lambda: Option<[Option<f64>; 2]>,
}

pub(super) fn train<W: Write>(
    arguments: &TrainArguments,
    output: &mut Output<W>,
) -> Result<ExitCode, Problem> {
    let (dir, name) = model_place(&arguments.model)?;
    let recording = read(&arguments.input)?;
    let schema = schema_of(&recording);
    // The profile was made of the file's own columns, so none is absent.
    let Selected { series, .. } = select(&recording, &schema)?;
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
    let fitting = format!("fitting on {} rows", series.rows());
    let detector = during(fitting, || Detector::fit(&schema, &series, &options))
        .map_err(|error| unusable(error.to_string()))?;
    detector.save(&dir, &name).map_err(|error| {
        Problem::failed("TH-E0321", error).hint("check the path and the room on that disk")
    })?;
    let trained = Trained {
        model: arguments.model.clone(),
        rows: series.rows(),
        channels: series.channels(),
        missing: missing(&series),
        gaps: recording.report.gaps,
        gap_rows: recording.report.gap_rows,
        threshold: detector.threshold().level(),
        prior_lambda: detector.leaning(),
        seed: arguments.seed,
    };
    let human = format!(
        "fitted on {} rows of {} channels{}\nthreshold {:.3}\nwrote {} and its card",
        trained.rows,
        trained.channels,
        flaws(&series, &recording.report),
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
    let Selected { series, absent } = select(&recording, detector.schema())?;
    let judged = judge(arguments, &detector, &series)?;
    write(&arguments.output, &[judged.scores.len()], &judged.scores)?;
    let step = step_of(&series).unwrap_or(detector.options().step);
    let clock = Clock::new(series.times_ms(), step.as_secs_f64());
    let causes = arguments
        .explain
        .then(|| arguments.output.with_extension("causes.npy"));
    if let Some(path) = &causes {
        write(path, &[series.rows(), series.channels()], &judged.contributions)?;
    }
    if let Some(path) = &arguments.plot {
        plot(path, arguments, &detector, &series, &judged, clock.clone())?;
    }
    let threshold = detector.threshold().level();
    let scored = ScoredFile {
        output: arguments.output.clone(),
        rows: judged.scores.len(),
        missing: missing(&series),
        gaps: recording.report.gaps,
        gap_rows: recording.report.gap_rows,
        threshold,
        above_threshold: judged.scores.iter().filter(|score| **score >= threshold).count(),
        plot: arguments.plot.clone(),
        alarms: arguments
            .explain
            .then(|| explain::alarms(&detector, &judged, &clock)),
        model_version: arguments.explain.then(|| detector.provenance().model_version),
        prior_lambda: arguments.explain.then(|| detector.leaning()),
        causes,
        absent,
    };
    output
        .result(
            &scored,
            scored.words(&detector, &judged, &clock, &flaws(&series, &recording.report)),
        )
        .map_err(unprinted)?;
    Ok(ExitCode::SUCCESS)
}

/// Scores, and with `--explain` or `--plot` contributions and alarms.
fn judge(arguments: &ScoreArguments, detector: &Detector, series: &Series) -> Result<Explained, Problem> {
    let judged = during(format!("scoring {} rows", series.rows()), || {
        if arguments.explain || arguments.plot.is_some() {
            return detector.explain_alarms(series);
        }
        detector.score_series(series).map(|scores| Explained {
            scores,
            contributions: Vec::new(),
            levels: Vec::new(),
            alarms: Vec::new(),
        })
    });
    judged.map_err(|error| {
        Problem::failed(
            "TH-E0323",
            format!("{} does not fit the model: {error}", arguments.input.display()),
        )
        .hint("score a file with the columns that the model was trained on; its card lists them")
    })
}

fn plot(
    path: &Path,
    arguments: &ScoreArguments,
    detector: &Detector,
    series: &Series,
    judged: &Explained,
    clock: Clock,
) -> Result<(), Problem> {
    let title = arguments.input.file_name().unwrap_or_default().to_string_lossy();
    let view = View {
        title: title.into_owned(),
        detector,
        series,
        explained: judged,
        clock,
    };
    let unwritten = |error: &dyn std::fmt::Display| {
        Problem::failed("TH-E0325", format!("cannot write {}: {error}", path.display()))
            .hint("check the path and the room on that disk")
    };
    let svg = picture::svg(&view).map_err(|error| unwritten(&error))?;
    std::fs::write(path, svg).map_err(|error| unwritten(&error))
}

impl ScoredFile {
    fn words(&self, detector: &Detector, judged: &Explained, clock: &Clock, flaws: &str) -> String {
        let mut lines = vec![
            format!("scored {} rows{flaws}", self.rows),
            format!(
                "{} at or above the threshold {:.3}",
                self.above_threshold, self.threshold
            ),
        ];
        if !self.absent.is_empty() {
            let names = self.absent.join(", ");
            lines.push(format!(
                "columns that the file does not have, taken as missing: {names}"
            ));
        }
        let written = [Some(&self.output), self.causes.as_ref(), self.plot.as_ref()];
        lines.extend(
            written
                .into_iter()
                .flatten()
                .map(|path| format!("wrote {}", path.display())),
        );
        if self.alarms.is_some() {
            lines.push(format!("\n{}", explain::model_words(detector)));
            lines.push(format!("\n{}", explain::words(detector, judged, clock)));
        }
        lines.join("\n")
    }
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
    let bytes = std::fs::metadata(path).map_or(0, |file| file.len());
    let mut reading = Progress::new(format!("reading {}", path.display()), bytes);
    read_recording_with(path, |done| reading.set(done)).map_err(|error| {
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

fn select(recording: &Recording, schema: &FeatureSchema) -> Result<Selected, Problem> {
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

fn missing(series: &Series) -> u64 {
    series.missing().iter().sum()
}

fn flaws(series: &Series, report: &ReadReport) -> String {
    match (missing(series), report.gaps) {
        (0, 0) => String::new(),
        (missing, gaps) => format!(
            " ({missing} missing values, {gaps} gaps of {} rows)",
            report.gap_rows
        ),
    }
}
