//! `privacy status`.

use std::io::Write;
use std::process::ExitCode;

use clap::Subcommand;
use theriac_command::output::Output;
use theriac_command::problem::Problem;
use theriac_privacy::ledger::Ledger;
use theriac_privacy::policy::Policy;

use super::{ConfigArguments, unprinted};
use crate::state_dir::StateDir;

#[derive(Debug, Subcommand)]
pub(super) enum PrivacyCommand {
    /// Shows what was spent, what is left, and the ledger's head; works beside a running edge.
    #[command(after_help = "Example:\n  theriac-edge privacy status --format json")]
    Status {
        #[command(flatten)]
        config: ConfigArguments,
    },
}

pub(super) fn privacy<W: Write>(
    command: PrivacyCommand,
    output: &mut Output<W>,
) -> Result<ExitCode, Problem> {
    let PrivacyCommand::Status { config } = command;
    let config = config.load()?;
    let dir = StateDir::existing(&config.state_dir.path);
    let path = config
        .federation
        .privacy_policy
        .clone()
        .unwrap_or_else(|| dir.privacy_policy());
    if !dir.ledger().exists() {
        let value = serde_json::json!({ "federated": false, "epsilon_spent": 0.0, "releases": 0 });
        let human = "nothing was ever released: this edge has no privacy ledger";
        output.result(&value, human).map_err(unprinted)?;
        return Ok(ExitCode::SUCCESS);
    }
    let policy = Policy::load(&path).map_err(|error| {
        Problem::config("TH-E0307", format!("{}: {error}", path.display()))
            .hint("the ledger cannot be read without the policy it is held to")
    })?;
    let status = Ledger::inspect(&dir.ledger(), policy).map_err(|error| {
        Problem::failed("TH-E0309", error).hint("keep the file as evidence; nothing is sent meanwhile")
    })?;
    output.result(&status, &status).map_err(unprinted)?;
    Ok(ExitCode::SUCCESS)
}
