//! `theriac-edge`: arguments in, an exit code out; everything else is the library's.

use std::process::ExitCode;

fn main() -> ExitCode {
    theriac_edge::commands::main(std::env::args_os())
}
