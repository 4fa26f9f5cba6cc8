//! `central-noise`: what noise at the centre would cost, by the number of sites. It reads nothing.

use std::process::ExitCode;

use clap::Args;
use serde::Serialize;
use theriac_command::output::{Format, table};
use theriac_command::problem::Problem;
use theriac_privacy::accountant::{Job, SamplingRate, SubsampledGaussian, pld_epsilon};
use theriac_protocol::units::{Delta, NoiseMultiplier};

use super::print;

#[derive(Debug, Args)]
pub(super) struct CentralNoiseArgs {
    /// Sites of the fleet, one line of the table each.
    #[arg(long, value_delimiter = ',', default_value = "10,50,100,1000,10000")]
    sites: Vec<u32>,
    /// Values of one update, d.
    #[arg(long, default_value_t = 7_000)]
    values: u32,
    /// Rounds that every site is in the pool of.
    #[arg(long, default_value_t = 90)]
    rounds: u32,
    /// Probability with which an update enters a sum.
    #[arg(long, default_value_t = 1.0)]
    sampling_rate: f64,
    /// Utility that is wanted: the noise of the mean over the clipping norm, σ√d/(qN). 1 or less trains, above 5 does not.
    #[arg(long, default_value_t = 1.0)]
    noise_to_signal: f64,
    /// δ of the guarantee.
    #[arg(long, default_value_t = 1e-6)]
    delta: f64,
    /// `human`, or `json` for programs.
    #[arg(long, default_value = "human")]
    format: Format,
}

/// One line.
#[derive(Debug, PartialEq, Serialize)]
struct Line {
    sites: u32,
    /// σ that gives the wanted utility.
    noise_multiplier: f64,
    /// What that costs every site over all rounds; `null`: infinite.
    epsilon_rdp: Option<f64>,
    epsilon_pld: Option<f64>,
}

pub(super) fn central_noise(args: &CentralNoiseArgs) -> Result<ExitCode, Problem> {
    let lines = lines(args).map_err(|reason| Problem::usage("TH-E0721", reason))?;
    let digits = |epsilon: Option<f64>| match epsilon {
        Some(epsilon) if epsilon >= 100.0 => format!("{epsilon:.0}"),
        Some(epsilon) => format!("{epsilon:.2}"),
        None => "infinite".to_owned(),
    };
    let cells: Vec<Vec<String>> = lines
        .iter()
        .map(|line| {
            vec![
                line.sites.to_string(),
                format!("{:.3}", line.noise_multiplier),
                digits(line.epsilon_rdp),
                digits(line.epsilon_pld),
            ]
        })
        .collect();
    let human = format!(
        "unit: a whole site; {} rounds of {} values at rate {}, delta {:e}, noise {} times the clipping norm\n{}",
        args.rounds,
        args.values,
        args.sampling_rate,
        args.delta,
        args.noise_to_signal,
        table(&["sites", "sigma", "epsilon", "by PLD"], &cells)
    );
    print(args.format, &lines, human)?;
    Ok(ExitCode::SUCCESS)
}

fn lines(args: &CentralNoiseArgs) -> Result<Vec<Line>, String> {
    let delta = Delta::new(args.delta).map_err(|error| error.to_string())?;
    let rate = SamplingRate::new(args.sampling_rate).map_err(|error| error.to_string())?;
    if args.values == 0 || args.rounds == 0 {
        return Err("--values and --rounds must be at least 1".to_owned());
    }
    let line = |sites: &u32| {
        let sigma = args.noise_to_signal * rate.value() * f64::from(*sites) / f64::from(args.values).sqrt();
        let sigma = NoiseMultiplier::new(sigma).map_err(|error| error.to_string())?;
        let job = Job {
            mechanism: SubsampledGaussian::new(sigma, rate),
            steps: args.rounds.into(),
        };
        let finite = |epsilon: f64| epsilon.is_finite().then_some(epsilon);
        Ok(Line {
            sites: *sites,
            noise_multiplier: sigma.value(),
            epsilon_rdp: finite(job.rdp().epsilon(delta).epsilon),
            epsilon_pld: finite(pld_epsilon(&[job], delta)),
        })
    };
    args.sites.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(sites: Vec<u32>) -> CentralNoiseArgs {
        CentralNoiseArgs {
            sites,
            values: 7_000,
            rounds: 90,
            sampling_rate: 1.0,
            noise_to_signal: 20.0,
            delta: 1e-6,
            format: Format::Human,
        }
    }

    /// The design's table: 50 sites at ε = 4 over 90 rounds leave noise of 20 clipping norms.
    #[test]
    fn fifty_sites_pay_what_the_design_says() {
        let lines = lines(&args(vec![50, 500])).unwrap();
        assert!((lines[0].noise_multiplier / 12.0 - 1.0).abs() < 0.01, "{lines:?}");
        let epsilon = lines[0].epsilon_rdp.unwrap();
        assert!((epsilon - 4.0).abs() < 0.1, "{lines:?}");
        assert!(lines[1].epsilon_rdp.unwrap() < 0.4 && lines[0].epsilon_pld.unwrap() <= epsilon);
    }

    #[test]
    fn what_is_no_mechanism_is_a_wrong_command_line() {
        let changes: [fn(&mut CentralNoiseArgs); 4] = [
            |a| a.delta = 2.0,
            |a| a.sampling_rate = 0.0,
            |a| a.values = 0,
            |a| a.noise_to_signal = -1.0,
        ];
        for change in changes {
            let mut wrong = args(vec![10]);
            change(&mut wrong);
            assert!(lines(&wrong).is_err());
        }
    }
}
