//! The three programs as one binary, for the process tests: `theriac-process PID edge|aggregator|service ARGUMENTS`.
//! It calls what `theriac-edge`, `theriac-aggregator` and `theriac-lab service` call, and ends with process PID, the test's
//! own, so that a test that was killed leaves nothing behind.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use theriac_lab::service;

/// How often the test is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(250);

#[derive(Debug, Parser)]
#[command(name = "service")]
struct Service {
    #[command(flatten)]
    arguments: service::Args,
}

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    let (Some(test), Some(program)) = (words.next(), words.next()) else {
        eprintln!("theriac-process PID edge|aggregator|service ARGUMENTS");
        return ExitCode::from(2);
    };
    end_with(test);
    let arguments = std::iter::once(program.clone()).chain(words);
    match program.to_str() {
        Some("edge") => theriac_edge::commands::main(arguments),
        Some("aggregator") => theriac_aggregator::commands::main(arguments),
        Some("service") => serve(arguments),
        _ => {
            eprintln!("there is no program {}", program.display());
            ExitCode::from(2)
        }
    }
}

/// Ends this process when `test` has ended.
fn end_with(test: OsString) {
    std::thread::spawn(move || {
        let test = Path::new("/proc").join(test);
        while test.exists() {
            std::thread::sleep(LOOK_EVERY);
        }
        std::process::exit(75);
    });
}

fn serve(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let arguments = Service::parse_from(arguments).arguments;
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(service::run(arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(error.exit_code())
        }
    }
}
