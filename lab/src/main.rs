//! `theriac-lab`: arguments, the experiment, an exit code.

use std::ffi::OsString;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use theriac_command::output::{self, Format, Output};
use theriac_command::problem::{self, Problem};
use theriac_command::telemetry::{self, LogFormat};
use theriac_edge::config::EdgeConfig;
use theriac_lab::attack::{self, Attack};
use theriac_lab::campaign::{self, Healer, Plan, Trouble};
use theriac_lab::causes::{self, CausesError};
use theriac_lab::compare;
use theriac_lab::demo;
use theriac_lab::evaluate::{self, EvaluateError};
use theriac_lab::fleet::lifeline;
use theriac_lab::hostile;
use theriac_lab::load::{self, LoadError};
use theriac_lab::quiet::{self, QuietError};
use theriac_lab::risk;
use theriac_lab::robustness;
use theriac_lab::schedule::{self, ScheduleError};
use theriac_lab::service;
use theriac_lab::simulate::{self, SimulateError};

/// Experiments: a demo of everything, simulations, attacks, faults and load. Never install it on a production host.
#[derive(Debug, Parser)]
#[command(
    name = "theriac-lab",
    version,
    arg_required_else_help = true,
    propagate_version = true,
    after_help = "Example: theriac-lab demo"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the main job on this machine: real processes, real faults; ends by itself.
    #[command(after_help = "Example: theriac-lab demo --out theriac-demo")]
    Demo(DemoArgs),
    /// The small HTTP key-value service that the demo breaks and heals.
    #[command(
        after_help = "Example: theriac-lab service --listen 127.0.0.1:8080 --control 127.0.0.1:8081 --state kv"
    )]
    Service(service::Args),
    /// Brings real faults to services under load that Theriac, other healers and Theriac without its parts look after.
    #[command(
        after_help = "Example: theriac-lab campaign --faults kill9,hang --runs 10 --out theriac-campaign"
    )]
    Campaign(CampaignArgs),
    /// Measures the aggregator alone, with light edges that train nothing.
    #[command(
        after_help = "Example: theriac-lab load --edges 10 --dimension 10000 --rounds 100 --format json"
    )]
    Load(LoadArgs),
    /// Trains on recorded metrics, many sites in one process on virtual time, and scores their test parts.
    #[command(
        after_help = "Example: theriac-lab simulate --data recorded --out simulation --mode federated --rounds 2"
    )]
    Simulate(simulate::Args),
    /// Measures anomaly scores against labels: areas, F1, alarms a day, delay; compares two detectors machine by machine.
    #[command(
        after_help = "Example: theriac-lab evaluate --scores simulation/scores --alarms simulation/alarms --labels recorded"
    )]
    Evaluate(evaluate::Args),
    /// Measures how well causes are found: channels of recorded servers, services of a recorded shop.
    #[command(after_help = "Example: theriac-lab causes --data recorded --petshop shop")]
    Causes(causes::Args),
    /// Judges how well failures are foretold, on recorded engines and drives and on made ramps.
    #[command(after_help = "Example: theriac-lab risk --data recorded --out theriac-risk")]
    Risk(risk::Args),
    /// Simulates when checkpoints are taken, and what that wastes, against Young/Daly and a fixed interval.
    #[command(after_help = "Example: theriac-lab schedule --mtbf 1h --costs 3.1,30 --runs 10")]
    Schedule(schedule::Args),
    /// Counts actions that nobody needed: recorded normal metrics replayed through the edge's detector and a healer that acts.
    #[command(after_help = "Example: theriac-lab quiet --data recorded")]
    Quiet(quiet::Args),
    /// Fits several detectors on labelled recordings and measures them against each other.
    #[command(
        after_help = "Example: theriac-lab compare --data recorded --out comparison --views all,5min,even,odd"
    )]
    Compare(compare::Args),
    /// Measures rules against attacks, over seeds, as ratios to what the honest sites alone learn.
    #[command(
        after_help = "Example: theriac-lab robustness --out table --rules mean,caf --attacks none,ipm-3 --seeds 2"
    )]
    Robustness(robustness::Args),
    /// A real edge that changes its updates after they were clipped and noised.
    #[command(after_help = "Example: theriac-lab hostile-edge --config edge.toml --attack sign-flip")]
    HostileEdge(HostileArgs),
    /// What a hostile edge can do.
    #[command(after_help = "Example: theriac-lab attack list")]
    Attack {
        #[command(subcommand)]
        command: AttackCommand,
    },
    /// `theriac-edge`, ending with its parent.
    #[command(name = "__edge", hide = true)]
    Edge(Passed),
    /// `theriac-aggregator`, ending with its parent.
    #[command(name = "__aggregator", hide = true)]
    Aggregator(Passed),
    /// `service`, ending with its parent.
    #[command(name = "__service", hide = true)]
    SupervisedService(service::Args),
    /// Takes a campaign back when the process that started this one is gone.
    #[command(name = "__warden", hide = true)]
    Warden {
        /// What is to be taken back.
        record: PathBuf,
    },
}

#[derive(Debug, Args)]
struct DemoArgs {
    /// Directory for report.html, summary.json and logs.
    #[arg(long, default_value = "theriac-demo")]
    out: PathBuf,
    /// About how long it takes, in seconds.
    #[arg(long, default_value_t = demo::SECONDS_DEFAULT, value_parser = clap::value_parser!(u64).range(demo::SECONDS_MIN..=demo::SECONDS_MAX))]
    seconds: u64,
    /// As short as still shows everything.
    #[arg(long, conflicts_with = "seconds")]
    quick: bool,
    /// Plain lines even on a terminal.
    #[arg(long)]
    plain: bool,
    /// Keeps the state directories of all processes.
    #[arg(long)]
    keep: bool,
    /// `human`, or `json` for the summary on standard output.
    #[arg(long, default_value = "human")]
    format: Format,
}

#[derive(Debug, Args)]
struct CampaignArgs {
    /// Directory for report.html, summary.json, table.md, runs.jsonl and logs.
    #[arg(long, default_value = "theriac-campaign")]
    out: PathBuf,
    /// Which faults, all that this machine can bring by default: `kill9`, `hang`, `memory_leak`, `cpu_hog`, `disk_full`, `disk_creep`,
    /// `overload`, `dependency_down`; on PostgreSQL `pg_kill9`, `pg_hang`, `connection_exhaustion`, `connection_creep`, `lock_pileup`,
    /// `pg_disk_full`, `slow_disk`; on Redis `redis_kill9`, `redis_hang`, `packet_loss`.
    #[arg(long, value_delimiter = ',', conflicts_with = "slice")]
    faults: Vec<Trouble>,
    /// Who heals, all by default: `theriac`, `theriac_direct` (no proxy before the HTTP service), `without_prediction`, `without_diagnosis`,
    /// `threshold`, `monit` (its Debian package).
    #[arg(long, value_delimiter = ',')]
    healers: Vec<Healer>,
    /// How often each fault comes.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1_000), conflicts_with = "slice")]
    runs: u32,
    /// Two runs of each.
    #[arg(long, conflicts_with_all = ["runs", "slice"])]
    quick: bool,
    /// Three minutes for every change: nine faults once each under Theriac (or `--healers`). The exit code says whether kill -9, hangs,
    /// full connections, pile-ups and full disks were healed, nothing was restarted that may not be, and no acknowledged write was lost.
    #[arg(long)]
    slice: bool,
    /// Gives the order of the faults and the pauses between them: the same for every healer.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Goes on with the runs in `--out`, where the options are the same.
    #[arg(long, conflicts_with = "slice")]
    resume: bool,
    /// `human`, or `json` for the summary on standard output.
    #[arg(long, default_value = "human")]
    format: Format,
}

#[derive(Debug, Args)]
struct LoadArgs {
    /// Number of edges, 1 to 20000.
    #[arg(long)]
    edges: usize,
    /// Number of values in the model and in an update.
    #[arg(long, default_value_t = 10_000)]
    dimension: u32,
    /// Number of rounds.
    #[arg(long, default_value_t = 100)]
    rounds: u64,
    /// Instead of rounds: stay connected for so many seconds.
    #[arg(long, value_name = "SECONDS")]
    idle: Option<u64>,
    /// The `theriac-aggregator` to measure instead of the one inside this program.
    #[arg(long, value_name = "FILE")]
    aggregator: Option<PathBuf>,
    /// `human` or `json`.
    #[arg(long, default_value = "human")]
    format: Format,
}

#[derive(Debug, Args)]
struct HostileArgs {
    /// Configuration of the edge.
    #[arg(long)]
    config: PathBuf,
    /// What it does to its updates: one that needs no others' updates; `theriac-lab attack list` shows them.
    #[arg(long, value_parser = attack::alone)]
    attack: Attack,
    /// Ends when the process that started it is gone.
    #[arg(long, hide = true)]
    follow_parent: bool,
}

#[derive(Debug, Subcommand)]
enum AttackCommand {
    /// Lists every attack.
    #[command(after_help = "Example: theriac-lab attack list --format json")]
    List {
        /// `human` or `json`.
        #[arg(long, default_value = "human")]
        format: Format,
    },
}

#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
struct Passed {
    /// Arguments of the other program.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

fn main() -> ExitCode {
    match parse().and_then(|cli| run(cli.command)) {
        Ok(code) => code,
        Err(problem) => problem::report(&problem, &mut std::io::stderr()),
    }
}

/// Help and version are printed and end the program here, with code 0 where they were asked for.
fn parse() -> Result<Cli, Problem> {
    let unasked = clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
    Cli::try_parse().map_err(|error| {
        if !error.use_stderr() || error.kind() == unasked {
            error.exit()
        }
        Problem::command_line("TH-E0830", &error.to_string())
    })
}

fn run(command: Command) -> Result<ExitCode, Problem> {
    match command {
        Command::Demo(args) => run_demo(args),
        Command::Service(args) => run_service(args),
        Command::SupervisedService(args) => {
            lifeline::follow_parent();
            run_service(args)
        }
        Command::Campaign(args) => run_campaign(args),
        Command::Load(args) => run_load(args),
        Command::Simulate(args) => run_simulate(args),
        Command::Evaluate(args) => run_evaluate(args),
        Command::Causes(args) => run_causes(args),
        Command::Risk(args) => run_risk(&args),
        Command::Schedule(args) => run_schedule(&args),
        Command::Quiet(args) => run_quiet(&args),
        Command::Compare(args) => run_compare(args),
        Command::Robustness(args) => run_robustness(&args),
        Command::HostileEdge(args) => run_hostile(args),
        Command::Attack {
            command: AttackCommand::List { format },
        } => list_attacks(format),
        Command::Edge(passed) => run_edge(passed),
        Command::Warden { record } => match campaign::watch_over(&record) {
            Ok(()) => Ok(ExitCode::SUCCESS),
            Err(error) => Err(Problem::failed("TH-E0805", error)
                .hint("see what is mounted and runs in the folder of the campaign")),
        },
        Command::Aggregator(passed) => {
            lifeline::follow_parent();
            let words = std::iter::once("theriac-aggregator".into()).chain(passed.arguments);
            Ok(theriac_aggregator::commands::main(words))
        }
    }
}

fn run_demo(args: DemoArgs) -> Result<ExitCode, Problem> {
    telemetry::init("warn", LogFormat::Human);
    let seconds = if args.quick {
        demo::SECONDS_QUICK
    } else {
        args.seconds
    };
    let plain = args.plain || args.format == Format::Json;
    let options = demo::Options {
        out: args.out,
        seconds,
        plain,
        keep: args.keep,
    };
    let outcome = runtime()?.block_on(demo::run(&options)).map_err(|error| {
        let hint = format!(
            "the logs of every process are in {}",
            options.out.join("logs").display()
        );
        Problem::failed("TH-E0801", error).hint(hint)
    })?;
    print(args.format, &outcome.record.summary(), demo::results(&outcome))?;
    Ok(if outcome.record.shortfalls.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn run_campaign(args: CampaignArgs) -> Result<ExitCode, Problem> {
    telemetry::init("warn", LogFormat::Human);
    let or_all = |given: Vec<Healer>, all: &[Healer]| if given.is_empty() { all.to_vec() } else { given };
    let options = if args.slice {
        campaign::Options::slice(args.out, or_all(args.healers, &[Healer::Theriac]), args.seed)
    } else {
        campaign::Options {
            plan: Plan {
                faults: if args.faults.is_empty() {
                    Trouble::ALL.to_vec()
                } else {
                    args.faults
                },
                healers: or_all(args.healers, &Healer::ALL),
                runs: if args.quick { 2 } else { args.runs },
                seed: args.seed,
            },
            out: args.out,
            resume: args.resume,
        }
    };
    let summary = runtime()?.block_on(campaign::run(&options)).map_err(|error| {
        let hint = format!(
            "the logs of every process are in {}",
            options.out.join("logs").display()
        );
        Problem::failed("TH-E0805", error).hint(hint)
    })?;
    print(args.format, &summary, campaign::results(&summary))?;
    for short in &summary.shortfalls {
        writeln!(std::io::stderr(), "fell short: {short}").ok();
    }
    let well = summary.shortfalls.is_empty() && !summary.interrupted && !summary.results.is_empty();
    Ok(if well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn run_load(args: LoadArgs) -> Result<ExitCode, Problem> {
    telemetry::init("warn", LogFormat::Human);
    let idle = args.idle.map(Duration::from_secs);
    let options = load::Options {
        edges: args.edges,
        dimension: args.dimension,
        rounds: args.rounds,
        idle,
        aggregator: args.aggregator,
    };
    let measured = runtime()?
        .block_on(load::run(options))
        .map_err(|error| load_problem(&error))?;
    print(args.format, &measured, load::results(&measured))?;
    Ok(ExitCode::SUCCESS)
}

fn load_problem(error: &LoadError) -> Problem {
    match error {
        LoadError::Options(_) => {
            Problem::usage("TH-E0831", error).hint("`theriac-lab load --help` shows an example")
        }
        LoadError::Slow { .. } => Problem::failed("TH-E0806", error)
            .hint("fewer rounds or edges, or a machine with nothing else to do"),
        _ => Problem::failed("TH-E0806", error)
            .hint("with thousands of edges, raise the limit of open files: ulimit -n 20000"),
    }
}

fn run_simulate(args: simulate::Args) -> Result<ExitCode, Problem> {
    let format = args.format;
    let simulated = simulate::run(args).map_err(|error| match error {
        SimulateError::Args(error) => Problem::usage("TH-E0808", error)
            .hint("`theriac-lab simulate --help` shows every option with its range"),
        error => Problem::failed("TH-E0809", error)
            .hint("a site is SITE.train.npy.gz beside SITE.test.npy.gz in --data; --out needs room and must be writable"),
    })?;
    print(format, &simulated.summary, simulated.table())?;
    Ok(ExitCode::SUCCESS)
}

fn run_evaluate(args: evaluate::Args) -> Result<ExitCode, Problem> {
    let format = args.format;
    let evaluation = evaluate::run(&args).map_err(|error| match error {
        EvaluateError::Option { .. } => Problem::usage("TH-E0810", error),
        error => Problem::failed("TH-E0811", error).hint(
            "one file a machine: NAME.npy of scores beside NAME.label.npy.gz of labels, of the same rows",
        ),
    })?;
    print(format, &evaluation, evaluation.table())?;
    // A mean over fewer machines than have labels must not pass for the whole.
    Ok(if evaluation.missing.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn run_causes(args: causes::Args) -> Result<ExitCode, Problem> {
    let measured = causes::run(&args).map_err(|error| match error {
        CausesError::Step(_) => Problem::usage("TH-E0812", error),
        error => {
            Problem::failed("TH-E0813", error).hint("`theriac-lab causes --help` says which files are read")
        }
    })?;
    print(args.format, &measured, measured.table())?;
    Ok(ExitCode::SUCCESS)
}

fn run_risk(args: &risk::Args) -> Result<ExitCode, Problem> {
    telemetry::init("warn", LogFormat::Human);
    let figures = risk::run(args).map_err(|error| Problem::failed("TH-E0820", error))?;
    print(args.format, &figures, risk::table(&figures))?;
    Ok(ExitCode::SUCCESS)
}

fn run_schedule(args: &schedule::Args) -> Result<ExitCode, Problem> {
    let measured = schedule::run(args).map_err(|error| match error {
        ScheduleError::Option { .. } => Problem::usage("TH-E0850", error),
        error => Problem::failed("TH-E0851", error),
    })?;
    print(args.format, &measured, measured.table())?;
    Ok(ExitCode::SUCCESS)
}

fn run_quiet(args: &quiet::Args) -> Result<ExitCode, Problem> {
    telemetry::init("error", LogFormat::Human);
    let measured = quiet::run(args).map_err(|error| match error {
        QuietError::Option { .. } => Problem::usage("TH-E0860", error),
        error => Problem::failed("TH-E0861", error)
            .hint("a recording is NAME.train.npy.gz in --data: rows of channels scaled to about 0..1"),
    })?;
    print(args.format, &measured, measured.table())?;
    Ok(ExitCode::SUCCESS)
}

fn run_compare(args: compare::Args) -> Result<ExitCode, Problem> {
    let compared = compare::run(&args).map_err(|error| Problem::failed("TH-E0815", error))?;
    print(args.format, &compared, compared.table())?;
    Ok(ExitCode::SUCCESS)
}

fn run_robustness(args: &robustness::Args) -> Result<ExitCode, Problem> {
    let table = robustness::run(args).map_err(|error| {
        if error.is_usage() {
            Problem::usage("TH-E0816", error).hint("`theriac-lab robustness --help` shows an example")
        } else {
            Problem::failed("TH-E0817", error).hint(
                "a machine is NAME.train.npy.gz, NAME.test.npy.gz and NAME.label.npy.gz in --data; --out needs room and must be writable",
            )
        }
    })?;
    print(args.format, &table, table.table())?;
    Ok(ExitCode::SUCCESS)
}

fn run_service(args: service::Args) -> Result<ExitCode, Problem> {
    telemetry::init("info", LogFormat::Auto);
    match runtime()?.block_on(service::run(args)) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => {
            writeln!(
                std::io::stderr(),
                "error[TH-E0802]: {error}\n  help: {}",
                error.hint()
            )
            .ok();
            Ok(ExitCode::from(error.exit_code()))
        }
    }
}

fn run_hostile(args: HostileArgs) -> Result<ExitCode, Problem> {
    telemetry::init("info", LogFormat::Auto);
    if args.follow_parent {
        lifeline::follow_parent();
    }
    let config = EdgeConfig::load(Some(&args.config), std::env::vars())
        .map_err(|error| Problem::config("TH-E0807", error).hint("`theriac-edge check-config` says more"))?;
    runtime()?.block_on(hostile::run(config, args.attack))?;
    Ok(ExitCode::SUCCESS)
}

/// What `theriac-edge` does with these arguments.
fn run_edge(passed: Passed) -> Result<ExitCode, Problem> {
    lifeline::follow_parent();
    let words = std::iter::once("theriac-edge".into()).chain(passed.arguments);
    let arguments = theriac_edge::commands::Arguments::parse_from(words);
    let mut out = std::io::stdout();
    let run = theriac_edge::commands::execute(arguments, &mut out);
    theriac_edge::commands::runtime()?.block_on(Box::pin(run))
}

fn list_attacks(format: Format) -> Result<ExitCode, Problem> {
    let all = Attack::all();
    let listed: Vec<_> = all
        .iter()
        .map(|attack| serde_json::json!({ "name": attack.name(), "description": attack.description() }))
        .collect();
    let rows: Vec<Vec<String>> = all
        .iter()
        .map(|attack| vec![attack.name(), attack.description()])
        .collect();
    print(format, &listed, output::table(&["Attack", "What it does"], &rows))?;
    Ok(ExitCode::SUCCESS)
}

fn print(format: Format, value: &impl serde::Serialize, human: String) -> Result<(), Problem> {
    Output::new(format, std::io::stdout().lock())
        .result(value, human)
        .map_err(|error| Problem::failed("TH-E0803", format!("cannot write the result: {error}")))
}

fn runtime() -> Result<tokio::runtime::Runtime, Problem> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Problem::failed("TH-E0804", format!("cannot start the runtime: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_number_out_of_range_is_a_wrong_command_line_and_no_matter_of_open_files() {
        let problem = load_problem(&LoadError::Options("--edges must be 1 to 20000".into()));
        assert_eq!(problem.exit, problem::Exit::Usage);
        assert!(!problem.to_string().contains("ulimit"), "{problem}");
    }

    #[test]
    fn every_command_and_every_group_shows_an_example() {
        fn check(command: &clap::Command) {
            let help = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            assert!(
                help.starts_with("Example: theriac-lab "),
                "{} has no example",
                command.get_name()
            );
            // Hidden are the other programs' own command lines.
            let shown = command.get_subcommands().filter(|sub| !sub.is_hide_set());
            shown.filter(|sub| sub.get_name() != "help").for_each(check);
        }
        check(&Cli::command());
    }
}
