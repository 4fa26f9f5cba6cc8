//! `aggregate`: one rule over a matrix, with times.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use serde_json::json;
use theriac_command::output::Format;
use theriac_command::problem::Problem;

use super::print;
use crate::metrics::ProcessUse;
use crate::npy::{Matrix, NpyError, NpyValue, open_matrix, read_matrix, write_matrix, write_vector};
use crate::robust::{Composed, Options, Rows, RuleError, RuleName, Scalar};

#[derive(Debug, Args)]
pub(super) struct AggregateArgs {
    /// mean, median, `trimmed_mean`, meamed, krum, `multi_krum`, `krum_flower`, `multi_krum_flower`, `geometric_median`,
    /// `geometric_median_converged`, `centered_clipping`, `centered_clipping_two_calls`, mda, monna, caf or bulyan; before it,
    /// joined by `+`, any of nnm, clipping, arc, bucketing, `bucketing_identity`, dedup. Without a rule behind them they
    /// write the [n, d] rows that they make.
    #[arg(long)]
    rule: RuleName,
    /// Assumed number f of hostile rows, below half of all.
    #[arg(long, default_value_t = 0)]
    byzantine: usize,
    /// Matrix [n, d] of updates, .npy, float32 or float64 (with --spill: float16 or float32).
    #[arg(long)]
    input: PathBuf,
    /// Where the combined [d] vector (or the [n, d] rows) goes, .npy of the same type.
    #[arg(long)]
    output: PathBuf,
    /// Radius of centered clipping, above 0.
    #[arg(long, allow_negative_numbers = true)]
    tau: Option<f64>,
    /// Passes of centered clipping (default 1), steps of the geometric median (default 3; converged: at most 2000).
    #[arg(long)]
    iterations: Option<u32>,
    /// Smallest distance that the geometric median divides by (default 0.1; converged: 1e-9).
    #[arg(long, allow_negative_numbers = true)]
    nu: Option<f64>,
    /// How many of the best rows Multi-Krum keeps (default n − f).
    #[arg(long)]
    keep: Option<usize>,
    /// Largest norm that `clipping` leaves alone.
    #[arg(long, allow_negative_numbers = true)]
    clip: Option<f64>,
    /// Rows in a bucket (default 2).
    #[arg(long)]
    bucket: Option<usize>,
    /// The row that `MoNNA` trusts, from 0 (default 0).
    #[arg(long)]
    reference: Option<usize>,
    /// Seed of the permutation before bucketing (default 0); the permutation is in the result.
    #[arg(long)]
    seed: Option<u64>,
    /// The rows carry privacy noise: rules that would publish one row's whole noise are refused.
    #[arg(long)]
    private: bool,
    /// Leave the matrix (float16 or float32) in its file and read columns as they are needed: for updates that do not fit in
    /// memory.
    #[arg(long)]
    spill: bool,
    /// How often it is computed and timed.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    repeat: u32,
    /// Threads; default: one for each core.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// `json` (the default here), or `human`.
    #[arg(long, default_value = "json")]
    format: Format,
}

pub(super) fn aggregate(args: AggregateArgs) -> Result<ExitCode, Problem> {
    // A rule that cannot be is refused before a matrix of gigabytes is read.
    let rule = Composed::new(args.rule, args.byzantine, &options(&args)).map_err(rule_problem)?;
    if let (Ok(input), Ok(output)) = (args.input.canonicalize(), args.output.canonicalize())
        && input == output
    {
        let problem = Problem::usage(
            "TH-E0721",
            format!("--output {}: it is the input", args.output.display()),
        );
        return Err(problem.hint("the result would take the place of the updates: name another file"));
    }
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(args.threads.map_or(0, usize::from))
        .build()
        .map_err(|error| Problem::failed("TH-E0716", format!("cannot start threads: {error}")))?;
    let done = if args.spill {
        let rows = open_matrix(&args.input).map_err(|error| npy_problem(&error))?;
        let finite = || match rows.failure() {
            None => Ok(()),
            Some(failure) => {
                let problem = Problem::failed("TH-E0718", format!("{}: {failure}", args.input.display()));
                Err(problem.hint("leave out that row; no rule sees an update that is not finite"))
            }
        };
        let done = pool.install(|| run::<f32>(&rule, &rows, &args, &finite));
        // What could not be read is why the rule failed.
        finite()?;
        done?
    } else {
        match &read_matrix(&args.input).map_err(|error| npy_problem(&error))? {
            Matrix::F32(rows) => pool.install(|| run::<f32>(&rule, rows, &args, &|| Ok(())))?,
            Matrix::F64(rows) => pool.install(|| run::<f64>(&rule, rows, &args, &|| Ok(())))?,
        }
    };
    let (n, d) = done.shape;
    let peak = ProcessUse::now().peak_resident_bytes;
    let mut value = json!({
        "rule": args.rule, "n": n, "d": d, "seconds": done.seconds, "cpu_seconds": done.cpu_seconds,
        "peak_rss_bytes": peak, "scores": done.scores,
    });
    if let (Some(permutation), Some(object)) = (done.permutation, value.as_object_mut()) {
        object.insert("permutation".to_owned(), json!(permutation));
    }
    let best = done.seconds.iter().copied().fold(f64::INFINITY, f64::min);
    print(
        args.format,
        &value,
        format!(
            "{} of {n} × {d}: {best:.6} s (best of {})",
            args.rule, args.repeat
        ),
    )?;
    Ok(ExitCode::SUCCESS)
}

fn options(args: &AggregateArgs) -> Options {
    Options {
        tau: args.tau,
        iterations: args.iterations,
        nu: args.nu,
        keep: args.keep,
        clip: args.clip,
        bucket: args.bucket,
        reference: args.reference,
        seed: args.seed,
        private: args.private,
    }
}

/// What is printed about a finished run.
struct Done {
    shape: (usize, usize),
    seconds: Vec<f64>,
    /// Processor time of all threads, for machines that others share.
    cpu_seconds: Vec<f64>,
    scores: Option<Vec<f64>>,
    permutation: Option<Vec<usize>>,
}

/// What rows that are read while they are combined turned out to be is asked before anything is written.
fn run<T: Scalar + NpyValue>(
    rule: &Composed,
    rows: &dyn Rows<T>,
    args: &AggregateArgs,
    sound: &(dyn Fn() -> Result<(), Problem> + Sync),
) -> Result<Done, Problem> {
    let shape = (rows.count(), rows.dimension());
    if shape.0 > 0 {
        // Also of a mean, which takes no f: what is assumed must be possible.
        crate::robust::minority(shape.0, args.byzantine).map_err(rule_problem)?;
    }
    let (written, seconds, cpu_seconds, scores, permutation) = if args.rule.base().is_some() {
        let (combined, seconds, cpu) = timed(args.repeat, || rule.values(rows))?;
        sound()?;
        let written = write_vector(&args.output, &combined.values);
        (written, seconds, cpu, combined.scores, combined.permutation)
    } else {
        let (mixed, seconds, cpu) = timed(args.repeat, || rule.mixed(rows))?;
        sound()?;
        let written = write_matrix(&args.output, &mixed.values, mixed.count);
        (written, seconds, cpu, None, mixed.permutation)
    };
    written.map_err(|error| npy_problem(&error))?;
    Ok(Done {
        shape,
        seconds,
        cpu_seconds,
        scores,
        permutation,
    })
}

/// The last result, and seconds by the clock and of the processor for each time.
type Timed<R> = (R, Vec<f64>, Vec<f64>);

fn timed<R>(repeat: u32, run: impl Fn() -> Result<R, RuleError>) -> Result<Timed<R>, Problem> {
    let (mut last, mut seconds, mut cpu_seconds) = (None, Vec::new(), Vec::new());
    for _ in 0..repeat.max(1) {
        // The former result goes first: it must not count as memory that the rule needs.
        drop(last.take());
        let (begun, used) = (Instant::now(), processor_seconds());
        last = Some(run().map_err(rule_problem)?);
        seconds.push(begun.elapsed().as_secs_f64());
        cpu_seconds.push(processor_seconds() - used);
    }
    let result = last.ok_or_else(|| Problem::failed("TH-E0717", "nothing was computed"))?;
    Ok((result, seconds, cpu_seconds))
}

fn processor_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

fn rule_problem(error: RuleError) -> Problem {
    let hint = match &error {
        RuleError::TooManyByzantine { .. } => "choose --byzantine below half the rows",
        RuleError::NoRows | RuleError::NoColumns | RuleError::Ragged { .. } => {
            "one row for each update, at least one row and one column"
        }
        _ => "theriac-aggregator aggregate --help names the rules and what each takes",
    };
    Problem::usage("TH-E0717", error).hint(hint)
}

fn npy_problem(error: &NpyError) -> Problem {
    Problem::failed("TH-E0718", error).hint(error.hint())
}
