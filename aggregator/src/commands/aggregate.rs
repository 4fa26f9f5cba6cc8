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
use crate::npy::{Matrix, NpyError, read_matrix, write_f32, write_f64};
use crate::robust::{Rows, Rule, RuleError, RuleName, rule};

#[derive(Debug, Args)]
pub(super) struct AggregateArgs {
    /// mean, median or `trimmed_mean`.
    #[arg(long)]
    rule: RuleName,
    /// Assumed number f of hostile rows, below half of all.
    #[arg(long, default_value_t = 0)]
    byzantine: usize,
    /// Matrix [n, d] of updates, .npy, float32 or float64.
    #[arg(long)]
    input: PathBuf,
    /// Where the combined [d] vector goes, .npy of the same type.
    #[arg(long)]
    output: PathBuf,
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
    let matrix = read_matrix(&args.input).map_err(|error| npy_problem(&error))?;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(args.threads.map_or(0, usize::from))
        .build()
        .map_err(|error| Problem::failed("TH-E0716", format!("cannot start threads: {error}")))?;
    let rule = rule(args.rule, args.byzantine);
    let (n, d, seconds, written) = match &matrix {
        Matrix::F32(rows) => {
            let (values, seconds) = timed(args.repeat, || pool.install(|| combine_f32(&*rule, rows)))?;
            (
                rows.count(),
                rows.dimension(),
                seconds,
                write_f32(&args.output, &values),
            )
        }
        Matrix::F64(rows) => {
            let (values, seconds) = timed(args.repeat, || pool.install(|| combine_f64(&*rule, rows)))?;
            (
                rows.count(),
                rows.dimension(),
                seconds,
                write_f64(&args.output, &values),
            )
        }
    };
    written.map_err(|error| npy_problem(&error))?;
    let peak = ProcessUse::now().peak_resident_bytes;
    let value = json!({
        "rule": args.rule, "n": n, "d": d, "seconds": seconds, "peak_rss_bytes": peak, "scores": null,
    });
    let best = seconds.iter().copied().fold(f64::INFINITY, f64::min);
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

fn combine_f32(rule: &dyn Rule, rows: &dyn Rows<f32>) -> Result<Vec<f32>, RuleError> {
    rule.combine(rows).map(|combined| combined.values)
}

fn combine_f64(rule: &dyn Rule, rows: &dyn Rows<f64>) -> Result<Vec<f64>, RuleError> {
    rule.combine_f64(rows).map(|combined| combined.values)
}

fn timed<T>(repeat: u32, run: impl Fn() -> Result<Vec<T>, RuleError>) -> Result<(Vec<T>, Vec<f64>), Problem> {
    let (mut last, mut seconds) = (Vec::new(), Vec::new());
    for _ in 0..repeat {
        let begun = Instant::now();
        last = run().map_err(|error| {
            Problem::usage("TH-E0717", error).hint("choose --byzantine below half the rows")
        })?;
        seconds.push(begun.elapsed().as_secs_f64());
    }
    Ok((last, seconds))
}

fn npy_problem(error: &NpyError) -> Problem {
    Problem::failed("TH-E0718", error).hint(error.hint())
}
