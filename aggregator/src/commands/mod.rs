//! The command line: arguments to results and exit codes. `main.rs` and the lab call [`main`].

mod aggregate;
mod central;
mod evidence;
mod records;
mod server;
mod setup;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use serde::Serialize;
use theriac_command::output::{Format, Output};
use theriac_command::problem::{self, Problem};

use crate::config::{self, CheckedConfig};
use crate::data_dir::DataDir;
use crate::store::{Database, StoreError};

/// The fleet: rounds with many edges, none of them trusted.
#[derive(Debug, Parser)]
#[command(
    name = "theriac-aggregator",
    version,
    arg_required_else_help = true,
    propagate_version = true,
    after_help = "Example: theriac-aggregator init --dir /var/lib/theriac --hosts agg.example.org\n\nIt prints the two \
                  commands that come next: `serve` here, `theriac-edge join` on the first host."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Makes a new federation: authorities, identity, store, configuration, and a first join token.
    #[command(
        after_help = "Example: theriac-aggregator init --dir /var/lib/theriac --federation plant --hosts agg.example.org"
    )]
    Init(setup::InitArgs),
    /// Runs the aggregator until it is asked to stop (Ctrl-C, TERM).
    #[command(after_help = "Example: theriac-aggregator serve --config /var/lib/theriac/aggregator.toml")]
    Serve(server::ServeArgs),
    /// Join tokens for new edges.
    #[command(after_help = "Example: theriac-aggregator token create --site plant-7")]
    Token {
        #[command(subcommand)]
        command: setup::TokenCommand,
    },
    /// The registry of sites; changes take effect on a running server within a second.
    #[command(after_help = "Example: theriac-aggregator sites list")]
    Sites {
        #[command(subcommand)]
        command: records::SitesCommand,
    },
    /// Rounds and what they decided about each edge.
    #[command(after_help = "Example: theriac-aggregator rounds show 12")]
    Rounds {
        #[command(subcommand)]
        command: records::RoundsCommand,
    },
    /// Published models.
    #[command(after_help = "Example: theriac-aggregator models list --limit 10")]
    Models {
        #[command(subcommand)]
        command: records::ModelsCommand,
    },
    /// The audit log.
    #[command(after_help = "Example: theriac-aggregator audit export --output log.txt")]
    Audit {
        #[command(subcommand)]
        command: records::AuditCommand,
    },
    /// What the server does now; exit code 1 when it does not run or its disk is full.
    #[command(after_help = "Example: theriac-aggregator status --config aggregator.toml --format json")]
    Status(Common),
    /// Loads the configuration exactly as `serve` does, and opens no port.
    #[command(after_help = "Example: theriac-aggregator check-config --config aggregator.toml")]
    CheckConfig(Common),
    /// Applies a robust rule to an [n, d] matrix of updates.
    #[command(
        after_help = "Example: theriac-aggregator aggregate --rule trimmed_mean --byzantine 3 --input u.npy --output a.npy"
    )]
    Aggregate(aggregate::AggregateArgs),
    /// What `[central_noise]` would cost, by the number of sites; it reads nothing.
    #[command(
        after_help = "Example: theriac-aggregator central-noise --sites 50,1000 --values 7000 --rounds 90"
    )]
    CentralNoise(central::CentralNoiseArgs),
}

/// What every command takes that looks at a data directory.
#[derive(Debug, Clone, Args)]
struct Common {
    /// The configuration file.
    #[arg(long, default_value = "aggregator.toml")]
    config: PathBuf,
    /// `human`, or `json` for programs.
    #[arg(long, default_value = "human")]
    format: Format,
}

/// Runs one command line, the program's name first, and gives its exit code: 0 done, 1 failed, 2 usage, 75 try again, 78 bad
/// configuration. Results go to standard output, everything else to standard error.
pub fn main(arguments: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) if asks_for_help(&error) => {
            // Help and version go to standard output with code 0; help that nobody asked for to standard error with code 2.
            let code = if error.use_stderr() { 2 } else { 0 };
            drop(error.print());
            return ExitCode::from(code);
        }
        Err(error) => {
            let problem = Problem::command_line("TH-E0721", &error.to_string());
            return problem::report(&problem, &mut std::io::stderr());
        }
    };
    match run(cli.command) {
        Ok(code) => code,
        Err(problem) => problem::report(&problem, &mut std::io::stderr()),
    }
}

fn asks_for_help(error: &clap::Error) -> bool {
    let unasked = clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
    !error.use_stderr() || error.kind() == unasked
}

fn run(command: Command) -> Result<ExitCode, Problem> {
    match command {
        Command::Init(args) => setup::init(args),
        Command::Serve(args) => server::serve(args),
        Command::Token { command } => setup::token(command),
        Command::Sites { command } => records::sites(command),
        Command::Rounds { command } => records::rounds(command),
        Command::Models { command } => records::models(command),
        Command::Audit { command } => records::audit(command),
        Command::Status(common) => server::status(&common),
        Command::CheckConfig(common) => server::check_config(&common),
        Command::Aggregate(args) => aggregate::aggregate(args),
        Command::CentralNoise(args) => central::central_noise(&args),
    }
}

/// Loads the configuration: the one loader of every command.
fn load(path: &Path) -> Result<CheckedConfig, Problem> {
    config::load(path, std::env::vars())
        .map_err(|error| Problem::config("TH-E0701", &error).hint(error.hint()))
}

/// Opens the store that a configuration names.
fn open(config: &CheckedConfig) -> Result<(DataDir, Database), Problem> {
    let dir = DataDir::new(&config.data_dir);
    dir.check()
        .map_err(|error| Problem::config("TH-E0702", &error).hint(error.hint()))?;
    let database = Database::open(&dir).map_err(|error| store_problem(&error))?;
    Ok((dir, database))
}

/// A wall-clock time for people, to the day and second.
pub(crate) fn day(unix_ms: u64) -> String {
    records::rfc3339(unix_ms)
}

fn central_problem(error: &dyn std::error::Error) -> Problem {
    Problem::config("TH-E0722", format!("[central_noise]: {error}")).hint(crate::central::CENTRAL_HINT)
}

fn store_problem(error: &StoreError) -> Problem {
    error.problem()
}

/// Prints one result.
fn print<T: Serialize>(format: Format, value: &T, human: impl std::fmt::Display) -> Result<(), Problem> {
    Output::new(format, std::io::stdout().lock())
        .result(value, human)
        .map_err(|error| output_problem(&error))
}

fn output_problem(error: &std::io::Error) -> Problem {
    Problem::failed("TH-E0710", format!("cannot write the result: {error}"))
}

/// For `--ttl 30m`.
fn parse_duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| format!("{error}: use for example 30m or 2h"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_is_not_there_or_not_allowed_is_not_called_a_store_that_cannot_be_used() {
        let not_there = StoreError::NotFound {
            what: "round",
            name: "99".into(),
        };
        let problem = store_problem(&not_there);
        assert_eq!(problem.code, "TH-E0719");
        assert!(problem.to_string().contains("`list` command"), "{problem}");
        let problem = store_problem(&StoreError::Conflict("revoked for ever".into()));
        assert_eq!(problem.code, "TH-E0720");
        assert!(!problem.to_string().contains("try again"), "{problem}");
        let problem = store_problem(&StoreError::Full("x".into()));
        assert_eq!(
            (problem.code, problem.exit),
            ("TH-E0704", problem::Exit::Temporary)
        );
    }

    #[test]
    fn every_command_and_every_group_shows_an_example() {
        fn check(command: &clap::Command) {
            let help = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            assert!(
                help.starts_with("Example: theriac-aggregator "),
                "{} has no example",
                command.get_name()
            );
            let subcommands = command.get_subcommands();
            subcommands.filter(|sub| sub.get_name() != "help").for_each(check);
        }
        check(&Cli::command());
    }
}
