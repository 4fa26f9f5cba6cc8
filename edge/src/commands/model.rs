//! `train` and `score`: a detector on recorded metrics, without a running edge.

use std::fmt::Write as _;
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Serialize;
use theriac_command::output::Output;
use theriac_command::problem::Problem;
use theriac_command::progress::{Progress, during};
use theriac_model::causes::{Explained, ExplainedAlarm};
use theriac_model::detector::{Detector, FitOptions};
use theriac_model::feature::FeatureSchema;
use theriac_model::global::OwnLagWeights;
use theriac_model::io::{ReadReport, Recording, Selected, read_recording_with, write_npy_f32};
use theriac_model::series::Series;

use super::explain::{self, AlarmView};
use super::picture::{self, Clock, View};
use super::unprinted;
use crate::config::DetectorArm;

/// How far the pace of a file's rows may be off the model's.
const PACE_RATIO_MAX: f64 = 1.5;

#[derive(Debug, Args)]
pub(super) struct TrainArguments {
    /// Recorded metrics: CSV with a header, .npy or .npy.gz `[time, channel]`.
    #[arg(long)]
    input: PathBuf,
    /// Where the model goes: NAME.safetensors. Its card lies in it, and beside it as NAME.json for people to read.
    #[arg(long)]
    model: PathBuf,
    /// Seed. The fit itself draws nothing, so every seed gives the same bits; it is kept for models that do.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Time between two rows of an array, 1 ms to 7 days; the times of a CSV go before it.
    #[arg(long, default_value = "1m", value_parser = step)]
    step: Duration,
    /// The two half-lives of the score's memory, each 1 ms to 7 days, the second longer [default: 3m 12m; 3s 12s for rows less than 10 s apart].
    #[arg(long, num_args = 2, value_names = ["SHORT", "LONG"], value_parser = step)]
    half_lives: Option<Vec<Duration>>,
    /// False alarms per day that the threshold aims at, 0.01 to 1000.
    #[arg(long, default_value_t = 1.0, value_parser = false_alarms)]
    false_alarms_per_day: f64,
    /// Which detector: `own-full`, or `own` for little memory or hundreds of channels.
    #[arg(long, value_enum, default_value_t)]
    arm: DetectorArm,
    /// What an array without names holds: `recorded` values, scaled to about 0..1, or the edge's own `host-service-v1`.
    #[arg(long, value_enum, default_value_t)]
    profile: ArrayProfile,
}

/// What the columns of an array without names are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum ArrayProfile {
    /// Scaled values of any kind.
    #[default]
    Recorded,
    /// The 16 channels that an edge samples, in its own units.
    #[value(name = "host-service-v1")]
    HostService,
}

fn step(text: &str) -> Result<Duration, String> {
    let step = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    let range = Duration::from_millis(1)..=Duration::from_hours(7 * 24);
    range
        .contains(&step)
        .then_some(step)
        .ok_or_else(|| "it must be 1ms to 7days".to_owned())
}

fn false_alarms(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "it is no number".to_owned())?;
    (0.01..=1_000.0)
        .contains(&number)
        .then_some(number)
        .ok_or_else(|| "it must be 0.01 to 1000".to_owned())
}

#[derive(Debug, Args)]
pub(super) struct ScoreArguments {
    /// The model's file, NAME.safetensors. The card beside it is for people; the one inside counts.
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
    /// Time between two rows, in seconds: the usual one of the file, or `--step`.
    step_seconds: f64,
    /// Channels whose whole range lies within the profile's floor, so that they hardly count.
    muted: Vec<String>,
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
    /// Columns of the file that the profile does not name.
    ignored: Vec<String>,
    gaps: u64,
    gap_rows: u64,
    /// Rows without a score: every channel is missing, or lies behind a gap.
    unscored: usize,
    /// The level that the alarms began with; it moves.
    threshold: f32,
    above_threshold: usize,
    /// How many alarms a running edge would have raised.
    alarm_count: usize,
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
    let card = dir.join(format!("{name}.json"));
    overwrites_none(
        &[("--model", &arguments.model), ("--model", &card)],
        &[&arguments.input],
    )?;
    let recording = read(&arguments.input)?;
    let schema = schema_of(&recording, arguments.profile)?;
    // The profile was made of the file's own columns, so none is absent.
    let Selected { series, .. } = select(&recording, &schema)?;
    let step = step_of(&series).unwrap_or(arguments.step);
    let mut options = FitOptions {
        prior: Some(OwnLagWeights::public_constant(schema.channels())),
        false_alarms_per_day: arguments.false_alarms_per_day,
        arm: arguments.arm.into(),
        ..FitOptions::new(step)
    };
    if let Some([short, long]) = arguments.half_lives.as_deref() {
        if short >= long {
            return Err(Problem::command_line(
                "TH-E0334",
                "--half-lives: the second must be longer than the first",
            ));
        }
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
        step_seconds: step.as_secs_f64(),
        muted: muted(&schema, &series),
        prior_lambda: detector.leaning(),
        seed: arguments.seed,
    };
    let mut human = format!(
        "fitted on {} rows of {} channels, one every {}{}\nthreshold {:.3}\nwrote {} and its card",
        trained.rows,
        trained.channels,
        humantime::format_duration(step),
        flaws(&series, &recording.report),
        trained.threshold,
        arguments.model.display(),
    );
    if !trained.muted.is_empty() {
        _ = write!(
            human,
            "\nchannels that move less than the profile's floor and hardly count: {}",
            trained.muted.join(", ")
        );
    }
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
    let causes = arguments
        .explain
        .then(|| arguments.output.with_extension("causes.npy"));
    check_outputs(arguments, causes.as_deref())?;
    let recording = read(&arguments.input)?;
    let Selected {
        series,
        absent,
        ignored,
    } = select(&recording, detector.schema())?;
    let step = step_of(&series).unwrap_or(detector.options().step);
    same_pace(&arguments.input, step, detector.options().step)?;
    let judged = judge(arguments, &detector, &series)?;
    write(&arguments.output, &[judged.scores.len()], &judged.scores)?;
    let clock = Clock::new(series.times_ms(), step.as_secs_f64());
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
        unscored: judged.scores.iter().filter(|score| score.is_nan()).count(),
        above_threshold: judged.scores.iter().filter(|score| **score >= threshold).count(),
        alarm_count: judged.alarms.len(),
        plot: arguments.plot.clone(),
        alarms: arguments
            .explain
            .then(|| explain::alarms(&detector, &judged, &clock)),
        model_version: arguments.explain.then(|| detector.provenance().model_version),
        prior_lambda: arguments.explain.then(|| detector.leaning()),
        causes,
        absent,
        ignored,
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
        detector.score_series(series).map(|scores| {
            let (levels, rows) = detector.alarm_rows(&scores);
            let alarm = |rows: Range<usize>| ExplainedAlarm {
                score: scores[rows.clone()].iter().copied().fold(f32::MIN, f32::max),
                rows,
                causes: Vec::new(),
            };
            Explained {
                alarms: rows.into_iter().map(alarm).collect(),
                contributions: Vec::new(),
                levels,
                scores,
            }
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
                "{} {}, by the threshold as it moved; {} rows at or above {:.3}, where it began",
                self.alarm_count,
                if self.alarm_count == 1 { "alarm" } else { "alarms" },
                self.above_threshold,
                self.threshold
            ),
        ];
        if self.unscored == self.rows {
            lines.push(
                "no row has a score: every channel is missing everywhere, so nothing was watched".to_owned(),
            );
        } else if self.unscored > 0 {
            lines.push(format!(
                "no score for {} rows, where every channel is missing or lies behind a gap: nothing was watched there",
                self.unscored
            ));
        }
        if !self.ignored.is_empty() {
            let names = self.ignored.join(", ");
            lines.push(format!("columns that the model does not know, left out: {names}"));
        }
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

/// Refuses to write over what is read.
fn overwrites_none(outputs: &[(&str, &PathBuf)], inputs: &[&PathBuf]) -> Result<(), Problem> {
    // Another name of the same file is the same file; one that is not there yet is none that is read.
    let place = |path: &Path| std::fs::metadata(path).ok().map(|file| (file.dev(), file.ino()));
    for (option, output) in outputs {
        let same = |input: &&&PathBuf| place(input).is_some_and(|input| place(output) == Some(input));
        if let Some(input) = inputs.iter().find(same) {
            return Err(Problem::usage(
                "TH-E0334",
                format!(
                    "{option} {} would overwrite {}",
                    output.display(),
                    input.display()
                ),
            )
            .hint("write to another file"));
        }
    }
    Ok(())
}

fn check_outputs(arguments: &ScoreArguments, causes: Option<&Path>) -> Result<(), Problem> {
    let causes = causes.map(Path::to_owned);
    let mut outputs = vec![("--output", &arguments.output)];
    outputs.extend(causes.as_ref().map(|path| ("--explain", path)));
    outputs.extend(arguments.plot.as_ref().map(|path| ("--plot", path)));
    overwrites_none(&outputs, &[&arguments.input, &arguments.model])?;
    let ends = |path: &Path, ending: &str| {
        path.extension()
            .is_some_and(|found| found.eq_ignore_ascii_case(ending))
    };
    let wrong = |option: &str, path: &Path, kind: &str, ending: &str| {
        let text = format!("{option} {} is written as {kind}", path.display());
        Err(Problem::usage("TH-E0334", text).hint(format!("name it NAME.{ending}")))
    };
    if !ends(&arguments.output, "npy") {
        return wrong("--output", &arguments.output, "a NumPy array", "npy");
    }
    match &arguments.plot {
        Some(path) if !ends(path, "svg") => wrong("--plot", path, "SVG", "svg"),
        _ => Ok(()),
    }
}

/// Half-lives, lags and threshold were fitted for one pace of rows: another makes them other times.
fn same_pace(input: &Path, found: Duration, fitted: Duration) -> Result<(), Problem> {
    let ratio = found.as_secs_f64() / fitted.as_secs_f64().max(1e-3);
    if (1.0 / PACE_RATIO_MAX..=PACE_RATIO_MAX).contains(&ratio) {
        return Ok(());
    }
    let text = humantime::format_duration;
    Err(Problem::failed(
        "TH-E0323",
        format!(
            "{}: rows come every {}, the model was fitted on one every {}",
            input.display(),
            text(found),
            text(fitted)
        ),
    )
    .hint("train on rows of the same interval, or average the file to the model's"))
}

/// Channels whose whole range is within the floor of their scale: such a channel moves less than what matters.
fn muted(schema: &FeatureSchema, series: &Series) -> Vec<String> {
    let still = |channel: usize| {
        let transform = schema.features[channel].transform;
        let values = series.iter_rows().map(|row| transform.apply(row[channel]));
        let (low, high) = values
            .filter(|value| value.is_finite())
            .fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), v| {
                (low.min(v), high.max(v))
            });
        high - low < schema.features[channel].floor
    };
    (0..schema.channels())
        .filter(|channel| still(*channel))
        .map(|channel| schema.features[channel].name.clone())
        .collect()
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

/// The host's own profile when the columns have its names, else one of already scaled recorded channels; an array without names is what the caller
/// says.
fn schema_of(recording: &Recording, profile: ArrayProfile) -> Result<FeatureSchema, Problem> {
    let own = FeatureSchema::host_service_v1();
    let is_own = |names: &[String]| own.features.iter().all(|feature| names.contains(&feature.name));
    let channels = recording.series.channels();
    Ok(match (&recording.names, profile) {
        (Some(names), _) if is_own(names) => own,
        (Some(names), _) => {
            let mut schema = FeatureSchema::recorded("recorded", names.len());
            for (feature, name) in schema.features.iter_mut().zip(names) {
                feature.name.clone_from(name);
            }
            schema
        }
        (None, ArrayProfile::HostService) if channels == own.channels() => own,
        (None, ArrayProfile::HostService) => {
            let text = format!(
                "--profile host-service-v1 has {} channels, the array {channels}",
                own.channels()
            );
            return Err(Problem::failed("TH-E0323", text).hint("leave --profile out"));
        }
        (None, ArrayProfile::Recorded) => FeatureSchema::recorded("recorded", channels),
    })
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
