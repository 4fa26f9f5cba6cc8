//! `privacy account`: what steps of the mechanism cost, by both accountants. Reads no file.

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;
use theriac_command::output::Output;
use theriac_command::problem::Problem;
use theriac_privacy::accountant::{Job, MechanismError, SamplingRate, SubsampledGaussian, pld_epsilon};
use theriac_protocol::units::{Delta, NoiseMultiplier};

use super::{TERMS, unprinted};

#[derive(Debug, Args)]
pub(in crate::commands) struct AccountArguments {
    /// Noise multiplier σ: the noise's standard deviation, on the sum, over what one unit can move.
    #[arg(long, allow_negative_numbers = true)]
    sigma: f64,
    /// Probability with which each unit enters a step; 1: every unit, every step.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    rate: f64,
    /// Steps that read the same units.
    #[arg(long, default_value_t = 1)]
    steps: u64,
    /// δ of the guarantee.
    #[arg(long, default_value_t = 1e-6, allow_negative_numbers = true)]
    delta: f64,
}

/// Both figures; an infinite one is `null` in JSON.
#[derive(Debug, Serialize)]
struct Account {
    /// The ledger's figure: Rényi orders 2 to 1024, whole; holds for the discrete noise that is added.
    epsilon_rdp: f64,
    /// From the privacy loss distribution, for continuous noise; tighter.
    epsilon_pld: f64,
    /// The order that gives the first one.
    order: u32,
}

pub(super) fn account<W: Write>(
    arguments: &AccountArguments,
    output: &mut Output<W>,
) -> Result<ExitCode, Problem> {
    let wrong = |error: &dyn fmt::Display| {
        Problem::usage(TERMS, error).hint("see `theriac-edge privacy account --help`")
    };
    let delta = Delta::new(arguments.delta).map_err(|error| wrong(&error))?;
    let sigma = NoiseMultiplier::new(arguments.sigma).map_err(|error| wrong(&error))?;
    let rate = SamplingRate::new(arguments.rate).map_err(|error| wrong(&error))?;
    if arguments.steps == 0 {
        return Err(wrong(&MechanismError::NoSteps));
    }
    let job = Job {
        mechanism: SubsampledGaussian::new(sigma, rate),
        steps: arguments.steps,
    };
    let rdp = job.rdp().epsilon(delta);
    let account = Account {
        epsilon_rdp: rdp.epsilon,
        epsilon_pld: pld_epsilon(&[job], delta),
        order: rdp.order,
    };
    output.result(&account, &account).map_err(unprinted)?;
    Ok(ExitCode::SUCCESS)
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "epsilon, ledger  {:.6} (Rényi order {})",
            self.epsilon_rdp, self.order
        )?;
        write!(
            f,
            "epsilon, tighter {:.6} (privacy loss distribution)",
            self.epsilon_pld
        )
    }
}
