//! `run` and `check-config`.

use std::io::Write;
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;
use theriac_command::output::Output;
use theriac_command::problem::Problem;
use tokio::signal::unix::{SignalKind, signal};

use super::{ConfigArguments, unprinted};
use crate::client::opening;
use crate::healing_policy;
use crate::run::{EdgeError, node_name};
use crate::state_dir::StateDir;
use crate::warnings;

#[derive(Debug, Args)]
pub(super) struct RunArguments {
    #[command(flatten)]
    config: ConfigArguments,
}

#[derive(Debug, Args)]
pub(super) struct CheckArguments {
    #[command(flatten)]
    config: ConfigArguments,
    /// Prints a complete example file instead.
    #[arg(long)]
    example: bool,
}

pub(super) async fn run(arguments: RunArguments) -> Result<ExitCode, Problem> {
    let config = arguments.config.load()?;
    let no_signal = |error| Problem::failed("TH-E0300", format!("cannot listen for signals: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(no_signal)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(no_signal)?;
    let until = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    Box::pin(crate::run(config, None, until)).await?;
    Ok(ExitCode::SUCCESS)
}

/// What `check-config` prints.
#[derive(Debug, Serialize)]
struct Checked {
    valid: bool,
    node: String,
    state_dir: String,
    interval_ms: u64,
    services: Vec<String>,
    page: String,
    joined: bool,
    /// The site that the privacy policy is for; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    policy_site: Option<String>,
    /// The policy of healing that holds; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    healing: Option<HealingChecked>,
    /// What holds, and is yet not as it was asked for.
    warnings: Vec<String>,
    #[serde(rename = "not_checked")]
    left_out: [&'static str; 3],
}

#[derive(Debug, Serialize)]
struct HealingChecked {
    file: String,
    version: u64,
    signers: usize,
}

pub(super) fn check<W: Write>(
    arguments: &CheckArguments,
    output: &mut Output<W>,
) -> Result<ExitCode, Problem> {
    if arguments.example {
        let example = crate::config::example();
        output.result(&example, example.trim_end()).map_err(unprinted)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut config = arguments.config.load()?;
    let healing = healing_policy::apply(&mut config).map_err(super::policy::refused)?;
    let dir = StateDir::existing(&config.state_dir.path);
    if let Some(policy) = &healing {
        healing_policy::check_version(policy, &dir).map_err(super::policy::refused)?;
    }
    let joined = dir.joined().map_err(EdgeError::from)?;
    let node = node_name(config.node.clone(), joined.as_ref())?;
    let joined = joined.is_some();
    let policy = if config.federation.enabled {
        opening::existing_policy(&config, &dir)?
    } else {
        None
    };
    let checked = Checked {
        valid: true,
        node: node.to_string(),
        state_dir: config.state_dir.path.display().to_string(),
        interval_ms: u64::try_from(config.sampling.interval.as_millis()).unwrap_or(u64::MAX),
        services: config
            .services
            .iter()
            .map(|service| service.name.to_string())
            .collect(),
        page: format!("http://{}/status", config.http.listen),
        joined,
        policy_site: policy.as_ref().map(|policy| policy.site().to_string()),
        healing: healing.map(|loaded| HealingChecked {
            file: loaded.path.display().to_string(),
            version: loaded.version,
            signers: loaded.signers.len(),
        }),
        warnings: config
            .services
            .iter()
            .flat_map(|service| warnings::of_service(service, joined))
            .collect(),
        left_out: [
            "programs and files of services",
            "whether ports are free",
            "the way to the aggregator",
        ],
    };
    let human = format!(
        "valid\n  node        {}\n  state       {}{}\n  services    {}\n  page        {}\n  federation  {}\n  privacy     {}\n  healing     {}{}\n  not checked: {}",
        checked.node,
        checked.state_dir,
        if config.state_dir.by_default {
            " (default)"
        } else {
            ""
        },
        if checked.services.is_empty() {
            "none".to_owned()
        } else {
            checked.services.join(", ")
        },
        checked.page,
        if joined { "joined" } else { "off: not joined" },
        policy.as_ref().map_or_else(
            || "no policy yet".to_owned(),
            |policy| format!("for {}, epsilon {} at most", policy.site(), policy.epsilon())
        ),
        checked.healing.as_ref().map_or_else(
            || "as [healing] says: no signed policy is named".to_owned(),
            |healing| format!(
                "version {} of {}, {} signed",
                healing.version, healing.file, healing.signers
            )
        ),
        checked.warnings.iter().fold(String::new(), |all, warning| {
            all + "\n  but         " + warning
        }),
        checked.left_out.join(", "),
    );
    output.result(&checked, human).map_err(unprinted)?;
    Ok(ExitCode::SUCCESS)
}
