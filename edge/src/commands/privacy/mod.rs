//! `privacy …`: what was promised, what was spent, and the proof of both.

mod account;
mod plan;
mod policy;
mod report;

pub(super) use self::policy::read_key;

use std::io::Write;
use std::process::ExitCode;

use clap::Subcommand;
use theriac_command::output::Output;
use theriac_command::problem::Problem;
use theriac_privacy::ledger::KnownHead;

use super::{ConfigArguments, unprinted};
use crate::client::opening;
use crate::state_dir::StateDir;
use crate::store::StoreReader;

#[derive(Debug, Subcommand)]
#[expect(
    clippy::large_enum_variant,
    reason = "made once a process from its command line"
)]
pub(super) enum PrivacyCommand {
    /// Shows what was spent, what is left, and the ledger's head; works beside a running edge. Exit code 1 when every release
    /// would be refused.
    #[command(after_help = "Example:\n  theriac-edge privacy status --format json")]
    Status {
        #[command(flatten)]
        config: ConfigArguments,
    },
    /// Makes a key for whoever answers for privacy.
    #[command(after_help = "Example:\n  theriac-edge privacy keygen --out officer.key")]
    Keygen(policy::KeygenArguments),
    /// Signs a policy; writes FILE.sig beside it.
    #[command(after_help = "Example:\n  theriac-edge privacy sign privacy.toml --key officer.key")]
    Sign(policy::SignArguments),
    /// Checks that a policy is signed and unchanged, and says what it promises.
    #[command(after_help = "Example:\n  theriac-edge privacy check privacy.toml --policy-key thpk1_…")]
    Check(policy::CheckArguments),
    /// Writes the statement with all its evidence, and a page for an officer; works beside a running edge.
    #[command(after_help = "Example:\n  theriac-edge privacy report --output report.json --html report.html")]
    Report(report::ReportArguments),
    /// Recomputes every figure of a report from its records alone, offline; exit code 1 when one is not true.
    #[command(after_help = "Example:\n  theriac-edge privacy verify report.json --policy-key thpk1_…")]
    Verify(report::VerifyArguments),
    /// Computes what steps of the mechanism cost, by both accountants.
    #[command(
        after_help = "Example:\n  theriac-edge privacy account --sigma 1.27 --rate 1 --steps 1 --delta 1e-6 --format json"
    )]
    Account(account::AccountArguments),
    /// Computes the noise that a promise needs, and whether anything can be learnt under it; exit code 1 when nothing can.
    #[command(
        after_help = "Example:\n  theriac-edge privacy plan --epsilon 4 --delta 1e-6 --days 90 --block 1h"
    )]
    Plan(plan::PlanArguments),
}

pub(super) fn privacy<W: Write>(
    command: PrivacyCommand,
    output: &mut Output<W>,
) -> Result<ExitCode, Problem> {
    match command {
        PrivacyCommand::Status { config } => status(&config, output),
        PrivacyCommand::Keygen(arguments) => policy::keygen(&arguments, output),
        PrivacyCommand::Sign(arguments) => policy::sign(&arguments, output),
        PrivacyCommand::Check(arguments) => policy::check(&arguments, output),
        PrivacyCommand::Report(arguments) => report::report(&arguments, output),
        PrivacyCommand::Verify(arguments) => report::verify_report(&arguments, output),
        PrivacyCommand::Account(arguments) => account::account(&arguments, output),
        PrivacyCommand::Plan(arguments) => plan::plan(&arguments, output),
    }
}

/// Code of numbers that make no mechanism.
const TERMS: &str = "TH-E0350";

fn status<W: Write>(config: &ConfigArguments, output: &mut Output<W>) -> Result<ExitCode, Problem> {
    let config = config.load()?;
    let dir = StateDir::existing(&config.state_dir.path);
    let known = known_ledger(&dir)?;
    let Some(status) = opening::inspect(&config, &dir, known.as_ref())? else {
        let value = serde_json::json!({ "federated": false, "epsilon_spent": 0.0, "releases": 0 });
        let human = "nothing was ever released: this edge has no privacy ledger";
        output.result(&value, human).map_err(unprinted)?;
        return Ok(ExitCode::SUCCESS);
    };
    output.result(&status, &status).map_err(unprinted)?;
    Ok(if status.exhausted {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// How far the edge knows its ledger to have come.
fn known_ledger(dir: &StateDir) -> Result<Option<KnownHead>, Problem> {
    let known = match StoreReader::open(&dir.database()) {
        Ok(reader) => reader.map_or(Ok(None), |reader| reader.known_ledger()),
        Err(error) => Err(error),
    };
    known.map_err(|error| Problem::failed("TH-E0305", error).hint("run `theriac-edge doctor`"))
}
