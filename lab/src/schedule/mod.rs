//! What a schedule of checkpoints wastes, on virtual time: lost work, checkpoints and restores, as a share of all time.
//!
//! Every schedule meets the same failures, exponential with a known mean, and the same warnings. The competitors are told the true
//! mean time between failures and the true cost; the schedule of the edge ([`theriac_heal::checkpoint::schedule`]) has to learn both,
//! and what the warnings are worth.

mod competitor;
pub mod foresight;
#[cfg(test)]
mod tests;

use std::time::Duration;

use rand::SeedableRng as _;
use rand_chacha::ChaCha12Rng;
use rayon::iter::{IntoParallelIterator as _, ParallelIterator as _};
use serde::Serialize;
use theriac_command::output::{Format, table};
use theriac_heal::checkpoint::schedule::LimitsError;

use self::foresight::{Foresight, Life};

/// Arguments of `theriac-lab schedule`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Mean time between failures.
    #[arg(long, default_value = "1h", value_parser = humantime::parse_duration)]
    pub mtbf: Duration,
    /// Costs of a checkpoint, in seconds for which the service stands still.
    #[arg(long, value_delimiter = ',', default_value = "3.1,30")]
    pub costs: Vec<f64>,
    /// Failures in each run, 100 to 1 000 000.
    #[arg(long, default_value_t = 40_000, value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    pub failures: u32,
    /// Runs of each cell, from `--seed` upwards.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub runs: u32,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// `human` or `json`.
    #[arg(long, default_value = "human")]
    pub format: Format,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScheduleError {
    /// A number out of range.
    #[error("--{option} is {found}: it has to be {range}")]
    Option {
        /// Its name.
        option: &'static str,
        /// What was given.
        found: String,
        /// What may be.
        range: &'static str,
    },
    /// The schedule refused its limits.
    #[error(transparent)]
    Limits(#[from] LimitsError),
}

/// All cells.
#[derive(Debug, Clone, Serialize)]
pub struct Measured {
    /// Mean time between failures, in seconds.
    pub mtbf_s: f64,
    /// Failures in each run.
    pub failures: u32,
    /// Seeds, first and last.
    pub seeds: [u64; 2],
    /// A line for each cost and each predictor.
    pub cells: Vec<Cell>,
}

/// One cost and one predictor: wastes as shares of all time, means over the seeds.
#[derive(Debug, Clone, Serialize)]
pub struct Cell {
    /// Cost of a checkpoint, in seconds.
    pub cost_s: f64,
    /// The predictor.
    pub predictor: String,
    /// A timer: one every 300 s.
    pub fixed_300s: f64,
    /// Young/Daly with the true mean.
    pub daly: f64,
    /// The schedule of the edge.
    pub theriac: f64,
    /// `theriac / daly − 1`, mean.
    pub against_daly: f64,
    /// The same: least and greatest over the seeds.
    pub against_daly_span: [f64; 2],
    /// `theriac / fixed_300s − 1`, mean.
    pub against_fixed: f64,
    /// The same: least and greatest over the seeds.
    pub against_fixed_span: [f64; 2],
}

/// Measures every cost with every predictor.
///
/// # Errors
/// [`ScheduleError`] when an option is out of range.
pub fn run(args: &Args) -> Result<Measured, ScheduleError> {
    let mtbf_s = args.mtbf.as_secs_f64();
    if !(600.0..=1e7).contains(&mtbf_s) {
        return Err(ScheduleError::Option {
            option: "mtbf",
            found: humantime::format_duration(args.mtbf).to_string(),
            range: "10m to 115days",
        });
    }
    if let Some(cost) = args.costs.iter().find(|cost| !(0.01..=300.0).contains(*cost)) {
        return Err(ScheduleError::Option {
            option: "costs",
            found: cost.to_string(),
            range: "0.01 to 300",
        });
    }
    let mut cells = Vec::new();
    for cost_s in &args.costs {
        for foresight in Foresight::all() {
            cells.push(cell(args, mtbf_s, *cost_s, foresight)?);
        }
    }
    Ok(Measured {
        mtbf_s,
        failures: args.failures,
        seeds: [args.seed, args.seed + u64::from(args.runs - 1)],
        cells,
    })
}

fn cell(args: &Args, mtbf_s: f64, cost_s: f64, foresight: Foresight) -> Result<Cell, ScheduleError> {
    let wastes: Vec<[f64; 3]> = (0..args.runs)
        .into_par_iter()
        .map(|run| {
            let seed = args.seed + u64::from(run);
            wastes(seed, args.failures, mtbf_s, cost_s, foresight)
        })
        .collect::<Result<_, _>>()?;
    let mean = |which: &dyn Fn(&[f64; 3]) -> f64| wastes.iter().map(which).sum::<f64>() / wastes.len() as f64;
    let span = |which: &dyn Fn(&[f64; 3]) -> f64| {
        let values = || wastes.iter().map(which);
        [
            values().fold(f64::INFINITY, f64::min),
            values().fold(f64::NEG_INFINITY, f64::max),
        ]
    };
    let (to_daly, to_fixed) = (|w: &[f64; 3]| w[2] / w[1] - 1.0, |w: &[f64; 3]| w[2] / w[0] - 1.0);
    Ok(Cell {
        cost_s,
        predictor: foresight.to_string(),
        fixed_300s: mean(&|w| w[0]),
        daly: mean(&|w| w[1]),
        theriac: mean(&|w| w[2]),
        against_daly: mean(&to_daly),
        against_daly_span: span(&to_daly),
        against_fixed: mean(&to_fixed),
        against_fixed_span: span(&to_fixed),
    })
}

/// Wastes of fixed 300 s, Young/Daly and the edge's schedule over the same lives.
fn wastes(
    seed: u64,
    failures: u32,
    mtbf_s: f64,
    cost_s: f64,
    foresight: Foresight,
) -> Result<[f64; 3], ScheduleError> {
    let mut rng = ChaCha12Rng::seed_from_u64(seed);
    let mut ours = competitor::Ours::new()?;
    let (mut total, mut wasted) = (0.0, [0.0; 3]);
    for number in 0..failures {
        let progress = f64::from(number) / f64::from(failures);
        let life = Life::draw(&mut rng, mtbf_s, cost_s, foresight, progress);
        total += life.length_s + RESTORE_S;
        let each = [
            // A timer goes on while the checkpoint is taken; Young/Daly's interval is one of work.
            competitor::fixed(life.length_s, 300.0_f64.max(cost_s), cost_s),
            competitor::fixed(life.length_s, (2.0 * cost_s * mtbf_s).sqrt() + cost_s, cost_s),
            ours.live(&life),
        ];
        for (sum, waste) in wasted.iter_mut().zip(each) {
            *sum += waste + RESTORE_S;
        }
    }
    Ok(wasted.map(|waste| waste / total))
}

impl Measured {
    /// For people.
    pub fn table(&self) -> String {
        let percent = |share: f64| format!("{:.2} %", 100.0 * share);
        let change = |share: f64, [low, high]: [f64; 2]| {
            format!(
                "{:+.1} % ({:+.1} to {:+.1})",
                100.0 * share,
                100.0 * low,
                100.0 * high
            )
        };
        let rows: Vec<Vec<String>> = self
            .cells
            .iter()
            .map(|cell| {
                vec![
                    format!("{} s", cell.cost_s),
                    cell.predictor.clone(),
                    percent(cell.fixed_300s),
                    percent(cell.daly),
                    percent(cell.theriac),
                    change(cell.against_daly, cell.against_daly_span),
                    change(cell.against_fixed, cell.against_fixed_span),
                ]
            })
            .collect();
        let header = [
            "C",
            "predictor",
            "fixed 300 s",
            "Daly",
            "Theriac",
            "against Daly",
            "against fixed",
        ];
        format!(
            "waste as a share of all time; mean time between failures {} s, {} failures, seeds {} to {}\n{}",
            self.mtbf_s,
            self.failures,
            self.seeds[0],
            self.seeds[1],
            table(&header, &rows)
        )
    }
}

/// Seconds that a restore takes.
const RESTORE_S: f64 = 6.0;
