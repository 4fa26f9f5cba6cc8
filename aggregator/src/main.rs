//! `theriac-aggregator`: arguments in, an exit code out; everything else is the library's.

use std::process::ExitCode;

fn main() -> ExitCode {
    theriac_aggregator::commands::main(std::env::args_os())
}
