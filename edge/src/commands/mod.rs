//! The command line: one function for each command, results through one writer, problems with code and hint.

mod checkpoints;
mod doctor;
mod drain;
mod explain;
mod incidents;
mod join;
mod model;
mod picture;
mod policy;
mod privacy;
mod run;
mod standing;
mod status;

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use theriac_command::output::{Format, Output};
use theriac_command::problem::{Problem, report};
use theriac_command::telemetry::{self, LogFormat};

use crate::config::{ConfigError, EdgeConfig};

/// One host: finds trouble, heals what its policy allows, learns together with others.
#[derive(Debug, Parser)]
#[command(name = "theriac-edge", version, about, arg_required_else_help = true)]
#[command(
    after_help = "Example:\n  theriac-edge run\n      watches this host with no configuration at all; \
                        its page is http://127.0.0.1:9466/status"
)]
pub struct Arguments {
    /// How results are printed: `human` or `json`.
    #[arg(long, global = true, value_enum, default_value_t = FormatName::Human)]
    format: FormatName,
    /// How logs are written to standard error.
    #[arg(long, global = true, value_enum, default_value_t = LogName::Auto)]
    log_format: LogName,
    /// What is logged, such as `info` or `theriac_edge=debug`; `RUST_LOG` wins.
    #[arg(long, global = true)]
    log: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum FormatName {
    /// Words and tables for people; may change between releases.
    Human,
    /// One JSON object or JSON lines; stable.
    Json,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogName {
    /// Human on a terminal, JSON elsewhere.
    Auto,
    /// For people.
    Human,
    /// One JSON object a line.
    Json,
}

/// Where the configuration is.
#[derive(Debug, Clone, Args)]
struct ConfigArguments {
    /// Configuration file; without one the defaults hold.
    #[arg(long, env = "THERIAC_EDGE_CONFIG")]
    config: Option<PathBuf>,
    /// State directory; overrides the file.
    #[arg(long)]
    state_dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
#[expect(
    clippy::large_enum_variant,
    reason = "made once a process from its command line"
)]
enum Command {
    /// Watches this host until it is told to stop (SIGTERM, Ctrl-C).
    #[command(
        after_help = "Example:\n  theriac-edge run --config /etc/theriac/edge.toml\n\nWithout a file it watches \
                            the host alone, federation off."
    )]
    Run(run::RunArguments),
    /// Enrols this host with an aggregator, once.
    #[command(
        after_help = "Example:\n  theriac-edge join --aggregator 10.0.0.5:7701 --token thrc1_…\n\nThe line with \
                            address and token is printed by `theriac-aggregator token create`."
    )]
    Join(join::JoinArguments),
    /// Fits a detector on recorded metrics.
    #[command(after_help = "Example:\n  theriac-edge train --input host.csv --model host.safetensors")]
    Train(model::TrainArguments),
    /// Scores recorded metrics with a fitted detector.
    #[command(
        after_help = "Example:\n  theriac-edge score --model host.safetensors --input today.csv --output scores.npy"
    )]
    Score(model::ScoreArguments),
    /// Shows what the running edge is doing; exit code 1 when it is not healthy.
    #[command(after_help = "Example:\n  theriac-edge status --format json")]
    Status(status::StatusArguments),
    /// What went wrong on this host, and what was done.
    #[command(subcommand, after_help = "Example:\n  theriac-edge incidents why 3")]
    Incidents(incidents::IncidentsCommand),
    /// Actions that wait for a person.
    #[command(subcommand, after_help = "Example:\n  theriac-edge actions approve 3")]
    Actions(incidents::ActionsCommand),
    /// Copies of the services' states.
    #[command(subcommand, after_help = "Example:\n  theriac-edge checkpoints list")]
    Checkpoints(checkpoints::CheckpointsCommand),
    /// The signed policy of healing.
    #[command(
        subcommand,
        after_help = "Example:\n  theriac-edge policy check --config edge.toml"
    )]
    Policy(policy::PolicyCommand),
    /// Begins no action any more, within a second; watching goes on.
    #[command(after_help = "Example:\n  theriac-edge stop-healing --config edge.toml")]
    StopHealing {
        #[command(flatten)]
        config: ConfigArguments,
    },
    /// Ends `stop-healing`.
    #[command(after_help = "Example:\n  theriac-edge resume-healing --config edge.toml")]
    ResumeHealing {
        #[command(flatten)]
        config: ConfigArguments,
    },
    /// Has the proxy before a service let what is in hand end and turn away what is new, within half a second.
    #[command(after_help = "Example:\n  theriac-edge drain kv --config edge.toml")]
    Drain(drain::DrainArguments),
    /// Ends `drain`.
    #[command(after_help = "Example:\n  theriac-edge undrain kv --config edge.toml")]
    Undrain(drain::DrainArguments),
    /// What was spent of the privacy budget.
    #[command(subcommand, after_help = "Example:\n  theriac-edge privacy status")]
    Privacy(privacy::PrivacyCommand),
    /// Loads the configuration exactly as `run` does and says what it found; opens nothing.
    #[command(after_help = "Example:\n  theriac-edge check-config --config edge.toml")]
    CheckConfig(run::CheckArguments),
    /// Checks clock, sockets, keys, disk, ledger, store and the way to the aggregator; exit code 1 when one fails.
    #[command(after_help = "Example:\n  theriac-edge doctor")]
    Doctor(doctor::DoctorArguments),
}

/// The runtime of the program: two threads, since the work that needs more runs off them.
///
/// # Errors
/// When the system gives no threads.
pub fn runtime() -> Result<tokio::runtime::Runtime, Problem> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(8)
        .thread_keep_alive(std::time::Duration::from_secs(2))
        .enable_all()
        .build()
        .map_err(|error| Problem::failed("TH-E0300", format!("cannot start the runtime: {error}")))
}

/// Runs one command line, the program's name first, and gives its exit code: 0 done, 1 failed, 2 usage, 75 try again, 78 bad
/// configuration. Results go to standard output, everything else to standard error.
pub fn main(arguments: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> ExitCode {
    let run = || {
        let arguments = parse(arguments)?;
        let mut out = std::io::stdout();
        runtime()?.block_on(Box::pin(execute(arguments, &mut out)))
    };
    run().unwrap_or_else(|problem| report(&problem, &mut std::io::stderr()))
}

/// Help and version are printed and end the program here, with code 0 where they were asked for.
fn parse(arguments: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> Result<Arguments, Problem> {
    let unasked = clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
    Arguments::try_parse_from(arguments).map_err(|error| {
        if !error.use_stderr() || error.kind() == unasked {
            error.exit()
        }
        Problem::command_line("TH-E0334", &error.to_string())
    })
}

/// Carries a command out. Results go to `out`, everything else to standard error.
///
/// # Errors
/// A [`Problem`] that says what happened and what to do next.
pub async fn execute(arguments: Arguments, out: &mut (dyn Write + Send)) -> Result<ExitCode, Problem> {
    let format = match arguments.format {
        FormatName::Human => Format::Human,
        FormatName::Json => Format::Json,
    };
    let log_format = match arguments.log_format {
        LogName::Auto => LogFormat::Auto,
        LogName::Human => LogFormat::Human,
        LogName::Json => LogFormat::Json,
    };
    let quiet = !matches!(arguments.command, Command::Run(_));
    let filter = arguments.log.unwrap_or_else(|| {
        if quiet {
            "warn".to_owned()
        } else {
            "info".to_owned()
        }
    });
    telemetry::init(&filter, log_format);
    let mut output = Output::new(format, out);
    match arguments.command {
        Command::Run(arguments) => Box::pin(run::run(arguments)).await,
        Command::Join(arguments) => Box::pin(join::join(arguments, &mut output)).await,
        Command::Train(arguments) => model::train(&arguments, &mut output),
        Command::Score(arguments) => model::score(&arguments, &mut output),
        Command::Status(arguments) => status::status(&arguments, &mut output).await,
        Command::Incidents(command) => incidents::incidents(command, &mut output),
        Command::Actions(command) => incidents::actions(command, &mut output),
        Command::Checkpoints(command) => Box::pin(checkpoints::checkpoints(command, &mut output)).await,
        Command::Privacy(command) => privacy::privacy(command, &mut output),
        Command::Policy(command) => policy::policy(command, &mut output),
        Command::StopHealing { config } => policy::switch(&config, true, &mut output),
        Command::ResumeHealing { config } => policy::switch(&config, false, &mut output),
        Command::Drain(arguments) => drain::drain(&arguments, true, &mut output),
        Command::Undrain(arguments) => drain::drain(&arguments, false, &mut output),
        Command::CheckConfig(arguments) => run::check(&arguments, &mut output),
        Command::Doctor(arguments) => Box::pin(doctor::doctor(&arguments, &mut output)).await,
    }
}

impl ConfigArguments {
    /// Flags over environment over file over defaults.
    fn load(&self) -> Result<EdgeConfig, Problem> {
        let mut config = EdgeConfig::load(self.config.as_deref(), std::env::vars())?;
        if let Some(path) = &self.state_dir {
            config.state_dir = crate::config::StateDirChoice {
                path: path.clone(),
                by_default: false,
            };
        }
        Ok(config)
    }

    /// The words that make another command work with the same configuration.
    fn again(&self) -> String {
        let flag = |name: &str, path: Option<&PathBuf>| {
            path.map_or_else(String::new, |path| {
                format!(" {name} {}", quoted(&path.display().to_string()))
            })
        };
        flag("--config", self.config.as_ref()) + &flag("--state-dir", self.state_dir.as_ref())
    }
}

/// A refused policy of healing, for people.
pub(crate) fn policy_refused(error: crate::healing_policy::HealingPolicyError) -> Problem {
    policy::refused(error)
}

/// As a shell takes it for one word.
fn quoted(word: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "/._-+=:,@%".contains(letter);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

impl From<ConfigError> for Problem {
    fn from(error: ConfigError) -> Self {
        match error {
            ConfigError::Settings(error) => Self::config("TH-E0301", &error).hint(error.hint()),
            ConfigError::Value { .. } => Self::config("TH-E0302", &error)
                .hint("docs/edge.md lists every key with unit, default and range"),
        }
    }
}

/// A result that could not be printed; a closed pipe is the reader's choice and no failure of ours.
fn unprinted(error: std::io::Error) -> Problem {
    Problem::failed("TH-E0332", format!("cannot print the result: {error}"))
}

/// A table cell for something that may be missing.
fn or_dash(text: Option<impl ToString>) -> String {
    text.map_or_else(|| "-".to_owned(), |text| text.to_string())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn check(command: &clap::Command) {
        let help = command
            .get_after_help()
            .map(ToString::to_string)
            .unwrap_or_default();
        assert!(
            help.starts_with("Example:\n  theriac-edge "),
            "`{}` has no example",
            command.get_name()
        );
        let subcommands = command.get_subcommands();
        subcommands.filter(|sub| sub.get_name() != "help").for_each(check);
    }

    #[test]
    fn every_command_and_every_group_is_well_formed_and_has_an_example() {
        let mut command = Arguments::command();
        command.build();
        command.clone().debug_assert();
        check(&command);
    }

    #[test]
    fn the_next_command_keeps_the_configuration() {
        let arguments = |config: Option<&str>, state_dir: Option<&str>| ConfigArguments {
            config: config.map(PathBuf::from),
            state_dir: state_dir.map(PathBuf::from),
        };
        assert_eq!(arguments(None, None).again(), "");
        assert_eq!(arguments(Some("e1.toml"), None).again(), " --config e1.toml");
        assert_eq!(
            arguments(Some("a b.toml"), Some("it's")).again(),
            " --config 'a b.toml' --state-dir 'it'\\''s'"
        );
    }

    #[test]
    fn the_ports_in_examples_and_hints_are_the_default_of_the_join_listener() {
        let join = Arguments::command()
            .find_subcommand("join")
            .and_then(|join| join.get_after_help().map(ToString::to_string))
            .unwrap();
        assert!(join.contains("10.0.0.5:7701"), "{join}");
    }

    #[test]
    fn problems_carry_code_hint_and_exit_code() {
        let error = EdgeConfig::load(Some(std::path::Path::new("/nowhere/edge.toml")), []).unwrap_err();
        let problem = Problem::from(error);
        assert_eq!(problem.code, "TH-E0301");
        assert!(problem.to_string().contains("/nowhere/edge.toml") && problem.hint.is_some());
    }
}
