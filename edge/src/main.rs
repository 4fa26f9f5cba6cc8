//! `theriac-edge`: arguments, telemetry, run, exit code.

use std::process::ExitCode;

use clap::Parser as _;
use theriac_command::problem::report;
use theriac_edge::commands::{self, Arguments};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match commands::runtime() {
        Ok(runtime) => runtime,
        Err(problem) => return report(&problem, &mut std::io::stderr()),
    };
    let mut out = std::io::stdout();
    match runtime.block_on(Box::pin(commands::execute(arguments, &mut out))) {
        Ok(code) => code,
        Err(problem) => report(&problem, &mut std::io::stderr()),
    }
}
