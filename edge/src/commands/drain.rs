//! `drain` and `undrain`: a person's word to the proxy before a service.

use std::io::Write;
use std::process::ExitCode;

use clap::Args;
use theriac_command::output::Output;
use theriac_command::problem::Problem;

use super::{ConfigArguments, unprinted};
use crate::state_dir::{StateDir, write_durably};

#[derive(Debug, Args)]
pub(super) struct DrainArguments {
    /// The service.
    service: String,
    #[command(flatten)]
    config: ConfigArguments,
}

/// Lays the file that the running edge looks for, or takes it away.
pub(super) fn drain<W: Write>(
    arguments: &DrainArguments,
    drain: bool,
    output: &mut Output<W>,
) -> Result<ExitCode, Problem> {
    let config = arguments.config.load()?;
    let name = &arguments.service;
    let proxied = |service: &&crate::config::ServiceConfig| service.proxy.is_some();
    let known: Vec<&str> = config
        .services
        .iter()
        .filter(proxied)
        .map(|service| service.name.as_str())
        .collect();
    if !known.contains(&name.as_str()) {
        let text = if known.is_empty() {
            format!("`{name}` has no [service.proxy], and no service of this configuration has one")
        } else {
            format!(
                "`{name}` has no [service.proxy]; those that have: {}",
                known.join(", ")
            )
        };
        return Err(Problem::failed("TH-E0386", text).hint("give --config, and a service that it proxies"));
    }
    let path = StateDir::existing(&config.state_dir.path).drain_file(name);
    let done = if drain {
        write_durably(&path, b"drained by a person\n")
    } else {
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    };
    done.map_err(|error| {
        Problem::failed("TH-E0386", format!("cannot change {}: {error}", path.display())).hint(
            "it lies in the state directory of the edge; give --config or --state-dir, and run as its user",
        )
    })?;
    let value = serde_json::json!({ "service": name, "drained": drain, "file": path });
    let human = if drain {
        format!(
            "{name} is drained: what is in hand ends, what is new is told to come later; `theriac-edge undrain {name}` ends it"
        )
    } else {
        format!("{name} takes requests again")
    };
    output.result(&value, human).map_err(unprinted)?;
    Ok(ExitCode::SUCCESS)
}
