//! `status`: asks the running edge's page.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use theriac_command::output::{Output, table};
use theriac_command::problem::Problem;

use super::{ConfigArguments, or_dash, unprinted};
use crate::probe::{self, ProbeUrl};
use crate::state_dir::StateDir;
use crate::status::{Phase, RiskView, ServiceStatus, Status, Storage};

/// Longest wait for the page.
const PATIENCE: Duration = Duration::from_secs(5);
/// Largest answer of the page, in bytes.
const ANSWER_BYTES_MAX: usize = 1 << 20;

#[derive(Debug, Args)]
pub(super) struct StatusArguments {
    #[command(flatten)]
    config: ConfigArguments,
}

pub(super) async fn status<W: Write>(
    arguments: &StatusArguments,
    output: &mut Output<W>,
) -> Result<ExitCode, Problem> {
    let config = arguments.config.load()?;
    let dir = StateDir::existing(&config.state_dir.path);
    let not_running = |why: String| {
        Problem::failed(
            "TH-E0330",
            format!("no edge answers in {}: {why}", dir.root().display()),
        )
        .hint("start it with `theriac-edge run`, or name its state directory with --state-dir")
    };
    let address = dir
        .http_address()
        .filter(|_| dir.is_in_use())
        .ok_or_else(|| not_running("none runs there".to_owned()))?;
    let ask = |path: &'static str| async move {
        probe::get(&ProbeUrl::new(address, path), PATIENCE, ANSWER_BYTES_MAX).await
    };
    let (_, body) = ask("/status")
        .await
        .map_err(|error| not_running(error.to_string()))?;
    let status: Status = serde_json::from_slice(&body)
        .map_err(|error| not_running(format!("the answer is not a status ({error})")))?;
    let (code, health) = ask("/healthz")
        .await
        .map_err(|error| not_running(error.to_string()))?;
    // A service that is down, or that waits for a person, is what an operator asks about first.
    let served = status.services.iter().all(|service| service.healthy);
    let healthy = code == 200 && status.storage == Storage::Ok && served;
    let health = String::from_utf8_lossy(&health);
    output
        .result(&status, human(&status, health.trim()))
        .map_err(unprinted)?;
    Ok(if healthy {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn human(status: &Status, health: &str) -> String {
    let phase = match status.phase {
        Phase::WarmingUp => format!("warming up, {} of {} samples", status.rows, status.warm_up_rows),
        Phase::Watching => "watching".to_owned(),
    };
    let detail = status
        .federation_detail
        .as_ref()
        .map(|detail| format!(" ({detail})"))
        .unwrap_or_default();
    let mut lines = vec![
        format!("node        {}", status.node),
        format!("health      {}", condition(status, health)),
        format!("phase       {phase}"),
        format!(
            "score       {} (threshold {}){}",
            or_dash(status.score.map(|score| format!("{score:.2}"))),
            or_dash(status.threshold.map(|threshold| format!("{threshold:.2}"))),
            if status.alarm { ", ALARM" } else { "" }
        ),
        format!(
            "federation  {}{detail}, round {}",
            word(status.federation),
            status.round
        ),
        format!(
            "model       version {}, gate: {}",
            status.model_version, status.gate
        ),
        format!(
            "privacy     epsilon {} of {} at delta {}",
            or_dash(status.epsilon_spent.map(|epsilon| format!("{epsilon:.3}"))),
            or_dash(status.epsilon_limit),
            or_dash(status.delta)
        ),
        format!(
            "healing     {}",
            if status.healing_stopped {
                "STOPPED by the stop switch: nothing new is begun until `theriac-edge resume-healing`"
            } else {
                "on"
            }
        ),
        format!("storage     {}", word(status.storage)),
        format!("host risk   {}", risk(&status.risk)),
    ];
    if let Some(fleet) = &status.fleet {
        lines.push(format!("fleet       {fleet}"));
    }
    if let Some(reason) = &status.gate_reason {
        lines.push(format!("gate        {reason}"));
    }
    if let Some(declined) = &status.last_decline {
        lines.push(format!("declining   {declined}"));
    }
    if !status.services.is_empty() {
        let rows: Vec<Vec<String>> = status
            .services
            .iter()
            .map(|service| {
                vec![
                    service.name.clone(),
                    service.state.clone(),
                    or_dash(service.pid),
                    service.restarts.to_string(),
                    if service.healthy { "yes" } else { "NO" }.to_owned(),
                    or_dash(service.score.map(|score| format!("{score:.2}"))),
                    risk(&service.risk),
                ]
            })
            .collect();
        lines.push(String::new());
        lines.push(table(
            &[
                "service",
                "state",
                "pid",
                "restarts",
                "healthy",
                "score",
                "failure risk",
            ],
            &rows,
        ));
    }
    lines.extend(status.services.iter().filter_map(checkpoints));
    for service in &status.services {
        let stands = service.standing.iter();
        lines.extend(stands.map(|words| format!("against {}: {words}", service.name)));
    }
    lines.extend(status.services.iter().filter_map(proxy));
    lines.join("\n")
}

/// The chance of each horizon, then what runs out and when: `0% 1m, 4% 5m, 61% 15m (memory, 640 s)`.
fn risk(risks: &[RiskView]) -> String {
    let Some(last) = risks.last() else {
        return "-".to_owned();
    };
    let chances: Vec<String> = risks
        .iter()
        .map(|risk| match (risk.probability, &risk.abstain) {
            (Some(probability), _) => format!("{:.0}% {}", 100.0 * probability, risk.horizon),
            (None, reason) => format!("{} {}", or_dash(reason.as_ref()), risk.horizon),
        })
        .collect();
    let lead = risks.iter().find_map(|risk| risk.lead_expected_s);
    let of = match (&last.resource, lead) {
        (Some(resource), Some(lead)) => format!(" ({resource}, {lead:.0} s)"),
        (Some(resource), None) => format!(" ({resource})"),
        (None, _) => String::new(),
    };
    format!("{}{of}", chances.join(", "))
}

/// Everything that makes the exit code 1, in words.
fn condition(status: &Status, health: &str) -> String {
    let mut wrong: Vec<String> = health
        .lines()
        .map(str::to_owned)
        .filter(|line| line != "ok")
        .collect();
    if status.storage != Storage::Ok {
        wrong.push(format!("storage {}", word(status.storage)));
    }
    let unwell = status.services.iter().filter(|service| !service.healthy);
    wrong
        .extend(unwell.map(|service| format!("service {} is not healthy ({})", service.name, service.state)));
    if wrong.is_empty() {
        health.to_owned()
    } else {
        wrong.join("; ")
    }
}

/// What the proxy before a service does.
fn proxy(service: &ServiceStatus) -> Option<String> {
    let proxy = service.proxy.as_ref()?;
    let draining = if proxy.draining { ", DRAINING" } else { "" };
    let holding = if proxy.holding { ", holding back" } else { "" };
    Some(format!(
        "proxy of {}: {}, circuit {}{draining}{holding}; {} answered, {} failed, {} turned away, {} retried, {} held",
        service.name,
        proxy.listen,
        proxy.circuit,
        proxy.answered,
        proxy.failed,
        proxy.turned_away,
        proxy.retries,
        proxy.held
    ))
}

/// How many copies of a service's state there are, and why the latest attempt failed.
fn checkpoints(service: &ServiceStatus) -> Option<String> {
    let failure = service
        .checkpoint_failure
        .as_ref()
        .map(|failure| format!("; the last attempt FAILED: {failure}"));
    // That one was taken is no news, that one is due and not taken is.
    let waits = service
        .checkpoint_reason
        .as_ref()
        .filter(|reason| reason.starts_with("not taken"))
        .map(|reason| format!("; the next is {reason}"));
    (service.checkpoints > 0 || failure.is_some() || waits.is_some()).then(|| {
        format!(
            "checkpoints of {}: {} valid{}{}",
            service.name,
            service.checkpoints,
            failure.unwrap_or_default(),
            waits.unwrap_or_default()
        )
    })
}

/// The word that the JSON form has for a state.
fn word(value: impl serde::Serialize) -> String {
    serde_json::to_value(value)
        .ok()
        .and_then(|value| value.as_str().map(str::to_owned))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::Board;

    #[test]
    fn the_stop_switch_is_told() {
        let board = Board::new("a", 60);
        assert!(human(&board.status(), "ok").contains("healing     on\n"));
        board.update(|status| status.healing_stopped = true);
        let told = human(&board.status(), "ok");
        assert!(told.contains("healing     STOPPED by the stop switch"), "{told}");
    }

    #[test]
    fn a_stopped_service_and_failing_checkpoints_are_told() {
        let board = Board::new("a", 60);
        board.update_service("kv", |line| {
            line.healthy = true;
            "running".clone_into(&mut line.state);
        });
        let well = human(&board.status(), "ok");
        assert!(well.contains("health      ok\n"), "{well}");
        assert!(!well.contains("checkpoints of"), "{well}");
        board.update_service("kv", |line| {
            line.healthy = false;
            "stopped".clone_into(&mut line.state);
            line.checkpoint_failure = Some("the state check ended with exit status: 2".to_owned());
        });
        let told = human(&board.status(), "ok");
        assert!(
            told.contains("health      service kv is not healthy (stopped)\n"),
            "{told}"
        );
        let line =
            "checkpoints of kv: 0 valid; the last attempt FAILED: the state check ended with exit status: 2";
        assert!(told.contains(line), "{told}");
        board.update_service("kv", |line| {
            line.checkpoints = 2;
            line.checkpoint_failure = None;
        });
        let told = human(&board.status(), "sampling has stopped");
        assert!(
            told.contains("health      sampling has stopped; service kv"),
            "{told}"
        );
        assert!(told.ends_with("checkpoints of kv: 2 valid"), "{told}");
    }
}
