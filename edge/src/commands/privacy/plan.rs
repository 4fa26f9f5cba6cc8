//! `privacy plan`: what a promise costs, before it is made. Reads no file.

use std::fmt;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Serialize;
use theriac_command::output::{Output, table};
use theriac_command::problem::Problem;
use theriac_model::global::{delta_layout, moments_layout};
use theriac_privacy::planner::{Candidate, Goal, Plan, recommended};
use theriac_privacy::policy::PrivacyUnit;
use theriac_privacy::windows::{BlockWindows, RecordWindows, WINDOW_DEFAULT, WindowsError};
use theriac_protocol::message::UpdateKind;
use theriac_protocol::units::{Delta, Epsilon};

use super::{TERMS, unprinted};

#[derive(Debug, Args)]
pub(in crate::commands) struct PlanArguments {
    /// Largest ε that any unit may lose.
    #[arg(long, allow_negative_numbers = true)]
    epsilon: f64,
    /// δ of the guarantee; at most a tenth of one over the number of blocks.
    #[arg(long, default_value_t = 1e-6, allow_negative_numbers = true)]
    delta: f64,
    /// Days of history that are learnt from.
    #[arg(long, default_value_t = 90)]
    days: u32,
    /// Length of one block in time, such as `1h` or `60s`.
    #[arg(long, default_value = "1h", value_parser = humantime::parse_duration)]
    block: Duration,
    /// What is hidden: everything within one block, or one sample.
    #[arg(long, value_enum, default_value_t = UnitName::Block)]
    unit: UnitName,
    /// Time between two samples; with `--unit record`.
    #[arg(long, default_value = "1s", value_parser = humantime::parse_duration)]
    interval: Duration,
    /// Samples of one window, as `record_window` of the policy; with `--unit record`.
    #[arg(long, default_value_t = WINDOW_DEFAULT)]
    record_window: u32,
    /// Samples from the beginning of one window to that of the next, as `record_stride` of the policy; with `--unit record` [default: `--record-window`].
    #[arg(long)]
    record_stride: Option<u32>,
    /// Channels of the model.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1000))]
    channels: u16,
    /// Releases that the history is cut into; each reads blocks of its own. The centre adds releases of moments, so these are planned together.
    #[arg(long, default_value_t = 1, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Sites whose moments the centre adds; the other ways of training are planned for one.
    #[arg(long, default_value_t = 1, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    sites: u32,
    /// Steps of gradient training on all blocks.
    #[arg(long, default_value_t = 20, allow_negative_numbers = true, value_parser = clap::value_parser!(u64).range(1..=u64::from(u32::MAX)))]
    steps: u64,
    /// Expected blocks of one step of sampled training.
    #[arg(long, default_value_t = 64, allow_negative_numbers = true, value_parser = clap::value_parser!(u64).range(1..))]
    batch: u64,
    /// Passes over the history of sampled training.
    #[arg(long, default_value_t = 20, allow_negative_numbers = true, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    passes: u64,
    /// Least noise multiplier that the policy allows.
    #[arg(long, default_value_t = 0.7, allow_negative_numbers = true)]
    noise_multiplier_min: f64,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum UnitName {
    Block,
    Record,
}

/// The answer.
#[derive(Debug, Serialize)]
struct Answer {
    epsilon: f64,
    delta: f64,
    unit: PrivacyUnit,
    /// How far one unit moves a release, in multiples of C.
    sensitivity: f64,
    blocks: u64,
    blocks_per_release: u64,
    plans: Vec<Plan>,
    /// Ways of training that no noise can bring within the budget, or that the history is too short for.
    refused: Vec<Refused>,
    /// Moments of all rounds and sites, as the centre adds them; none when no noise fits them.
    added: Option<Added>,
    /// Name of the plan to take; none when every one is hopeless.
    recommended: Option<&'static str>,
    warnings: Vec<String>,
}

/// See [`Answer::added`].
#[derive(Debug, Serialize)]
struct Added {
    /// Rounds, each of `blocks_per_release` blocks of its own.
    rounds: u32,
    sites: u32,
    /// Noise of all of them over the longest mean of all their blocks.
    noise_to_clip: f64,
    /// After so many rounds of that many blocks it is at most 1.
    rounds_until_it_trains: u64,
}

#[derive(Debug, Serialize)]
struct Refused {
    name: &'static str,
    reason: String,
}

pub(super) fn plan<W: Write>(arguments: &PlanArguments, output: &mut Output<W>) -> Result<ExitCode, Problem> {
    let answer = arguments.answer()?;
    output.result(&answer, &answer).map_err(unprinted)?;
    Ok(match answer.recommended {
        Some(_) => ExitCode::SUCCESS,
        None => ExitCode::FAILURE,
    })
}

impl PlanArguments {
    fn answer(&self) -> Result<Answer, Problem> {
        let wrong = |error: &dyn fmt::Display| {
            Problem::usage(TERMS, error).hint("see `theriac-edge privacy plan --help`")
        };
        let epsilon = Epsilon::new(self.epsilon).map_err(|error| wrong(&error))?;
        let delta = Delta::new(self.delta).map_err(|error| wrong(&error))?;
        if !(self.noise_multiplier_min >= 0.0 && self.noise_multiplier_min.is_finite()) {
            let text = format!(
                "--noise-multiplier-min must be 0 or more, got {}",
                self.noise_multiplier_min
            );
            return Err(wrong(&text));
        }
        let unit = match self.unit {
            UnitName::Block => PrivacyUnit::Block,
            UnitName::Record => PrivacyUnit::Record,
        };
        let history_ms = u128::from(self.days) * 86_400_000;
        let blocks = history_ms.checked_div(self.block.as_millis()).unwrap_or(0);
        let blocks = u64::try_from(blocks).unwrap_or(u64::MAX);
        let goal = Goal {
            epsilon,
            delta,
            blocks: blocks / u64::from(self.rounds),
            sensitivity: match unit {
                PrivacyUnit::Record => self.windows().map_err(|error| wrong(&error))?.sensitivity(),
                PrivacyUnit::Block | PrivacyUnit::Node => unit.sensitivity(UpdateKind::Moments),
            },
            noise_multiplier_min: self.noise_multiplier_min,
        };
        if goal.blocks == 0 {
            return Err(wrong(&theriac_privacy::planner::PlanError::NoBlocks));
        }
        let (mut plans, mut refused, mut added) = (Vec::new(), Vec::new(), None);
        for candidate in self.candidates(goal.blocks) {
            match goal.plan(&candidate) {
                Ok(plan) if plan.name == MOMENTS => {
                    let one = u64::from(self.rounds) * u64::from(self.sites);
                    let together = plan.added(one);
                    added = Some(Added {
                        rounds: self.rounds,
                        sites: self.sites,
                        noise_to_clip: together.noise_to_clip,
                        rounds_until_it_trains: plan
                            .releases_until_it_trains()
                            .div_ceil(u64::from(self.sites)),
                    });
                    plans.push(together);
                }
                Ok(plan) => plans.push(plan),
                Err(error) => refused.push(Refused {
                    name: candidate.name,
                    reason: error.to_string(),
                }),
            }
        }
        if plans.is_empty() {
            let reasons: Vec<&str> = refused.iter().map(|refused| refused.reason.as_str()).collect();
            return Err(
                Problem::failed(NO_PLAN, reasons.join("; ")).hint("allow a larger epsilon, or fewer steps")
            );
        }
        Ok(Answer {
            epsilon: epsilon.value(),
            delta: delta.value(),
            unit,
            sensitivity: goal.sensitivity,
            blocks,
            blocks_per_release: goal.blocks,
            added,
            recommended: recommended(&plans).map(|plan| plan.name),
            warnings: self.warnings(&goal),
            plans,
            refused,
        })
    }

    /// How the policy would cut a block.
    fn windows(&self) -> Result<BlockWindows, WindowsError> {
        let rows = self
            .block
            .as_nanos()
            .checked_div(self.interval.as_nanos())
            .unwrap_or(0);
        let rows = u32::try_from(rows).unwrap_or(u32::MAX);
        RecordWindows::new(
            self.record_window,
            self.record_stride.unwrap_or(self.record_window),
        )?
        .in_block(rows)
    }

    fn candidates(&self, blocks: u64) -> [Candidate; 4] {
        let channels = usize::from(self.channels);
        let linear = ((5 * channels + 1) * channels) as u64;
        let network = delta_layout(channels).len() as u64;
        let sampled = (self.passes.saturating_mul(blocks) / self.batch.max(1)).max(1);
        [
            Candidate {
                name: MOMENTS,
                values: moments_layout(channels).len() as u64,
                steps: 1,
                batch: None,
            },
            Candidate {
                name: "network, full batch (library)",
                values: network,
                steps: self.steps,
                batch: None,
            },
            Candidate {
                name: "linear, full batch",
                values: linear,
                steps: self.steps,
                batch: None,
            },
            Candidate {
                name: "network, sampled (library)",
                values: network,
                steps: sampled,
                batch: Some(self.batch),
            },
        ]
    }

    fn warnings(&self, goal: &Goal) -> Vec<String> {
        let mut warnings = Vec::new();
        let most = goal.delta_max();
        if goal.delta.value() > most {
            warnings.push(format!(
                "delta {:e} is more than a tenth of one over {} blocks ({most:.1e}): the promise is weak",
                goal.delta.value(),
                goal.blocks
            ));
        }
        // 14 400 samples in memory by default, and 200 000 at the most, besides two turns of slack; the block that is being filled is not over.
        let held = |samples: u128| {
            (self.interval.as_nanos() * samples / self.block.as_nanos().max(1)).saturating_sub(1)
        };
        if u128::from(goal.blocks) > held(14_400) {
            warnings.push(format!(
                "one release reads at most the {} whole blocks that an edge holds in memory with the default sampling.history_rows ({} with the largest), and \
                 rounds.blocks_max of them: cut the history into more --rounds",
                held(14_400),
                held(200_000)
            ));
        }
        if self.epsilon > 10.0 {
            warnings.push("an epsilon above 10 promises little".to_owned());
        }
        warnings
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hidden = match self.unit {
            PrivacyUnit::Block => "one block",
            PrivacyUnit::Record => "one sample",
            PrivacyUnit::Node => "one site",
        };
        writeln!(
            f,
            "hides {hidden}, which moves a release by {:.4} C at most; epsilon {} at delta {:e}, {} blocks, {} for each release\n",
            self.sensitivity, self.epsilon, self.delta, self.blocks, self.blocks_per_release
        )?;
        let header = [
            "",
            "sigma",
            "rate",
            "steps",
            "values",
            "epsilon",
            "(tighter)",
            "noise/C",
        ];
        let row = |plan: &Plan| {
            vec![
                plan.name.to_owned(),
                format!("{:.3}", plan.noise_multiplier_shown()),
                format!("{:.4}", plan.sampling_rate),
                plan.steps.to_string(),
                plan.values.to_string(),
                digits(plan.epsilon_rdp),
                digits(plan.epsilon_pld),
                format!("{:.3}", plan.noise_to_clip),
            ]
        };
        writeln!(
            f,
            "{}\n",
            table(&header, &self.plans.iter().map(row).collect::<Vec<_>>())
        )?;
        for plan in &self.plans {
            writeln!(f, "{}: {}", plan.name, plan.verdict.words())?;
        }
        if let Some(added) = &self.added {
            let (blocks, rounds) = (self.blocks_per_release, added.rounds_until_it_trains);
            writeln!(
                f,
                "moments: the row is of {} round{} of {blocks} block{} from {} site{}, added at the centre; noise/C is 1 after {rounds} such round{}",
                added.rounds,
                plural(added.rounds.into()),
                plural(blocks),
                added.sites,
                plural(added.sites.into()),
                plural(rounds),
            )?;
        }
        writeln!(
            f,
            "(library): no round offers it; the loops are in theriac-privacy"
        )?;
        for refused in &self.refused {
            writeln!(f, "{}: {}", refused.name, refused.reason)?;
        }
        for warning in &self.warnings {
            writeln!(f, "warning: {warning}")?;
        }
        match self.recommended {
            Some(name) => write!(f, "\nrecommended: {name}"),
            None => write!(
                f,
                "\nnothing is recommended: noise/C is above 5 everywhere; plan for more days, shorter blocks, fewer values, or a \
                 larger epsilon"
            ),
        }
    }
}

fn plural(count: u64) -> &'static str {
    if count == 1 { "" } else { "s" }
}

/// Three decimals, or as many as a small number needs.
fn digits(value: f64) -> String {
    if value > 0.0 && value < 0.1 {
        format!("{value:.2e}")
    } else {
        format!("{value:.3}")
    }
}

/// The way of training whose releases the centre adds.
const MOMENTS: &str = "moments";
/// Exit code and words when not one way of training fits the budget.
const NO_PLAN: &str = "TH-E0351";
