//! `serve`, `status`, `check-config`.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde_json::json;
use theriac_command::output::table;
use theriac_command::problem::Problem;
use theriac_command::telemetry::{self, LogFormat};
use tokio::sync::watch;

use super::{Common, central_problem, load, open, print, store_problem};
use crate::central::{CentralStatus, statement};
use crate::config::CheckedConfig;
use crate::data_dir::DataDir;
use crate::serve::{Addresses, serve as start};
use crate::status::{SiteStatus, Status};

/// Longest answer of our own page that is taken.
const STATUS_BYTES_MAX: u64 = 16 << 20;
/// How long our own page may take.
const STATUS_TIMEOUT: Duration = Duration::from_secs(3);

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// The configuration file.
    #[arg(long, default_value = "aggregator.toml")]
    config: PathBuf,
    /// What is logged, as in `RUST_LOG`.
    #[arg(long, default_value = "info")]
    log: String,
}

pub(super) fn serve(args: ServeArgs) -> Result<ExitCode, Problem> {
    telemetry::init(&args.log, LogFormat::Auto);
    let config = load(&args.config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Problem::failed("TH-E0709", format!("cannot start the runtime: {error}")))?;
    runtime.block_on(async {
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(async move {
            asked_to_stop().await;
            stop.send_replace(true);
        });
        let running = start(config, stopped).await.map_err(|error| error.problem())?;
        running.wait().await.map_err(|error| error.problem())
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Ctrl-C or TERM.
async fn asked_to_stop() {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut terminate) => {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
        }
        Err(error) => {
            tracing::warn!(%error, "TERM is not handled; its ordinary effect loses nothing that was acknowledged");
            drop(tokio::signal::ctrl_c().await);
        }
    }
}

pub(super) fn check_config(common: &Common) -> Result<ExitCode, Problem> {
    let config = load(&common.config)?;
    let rounds = &config.rounds;
    let value = json!({
        "config": common.config, "ok": true, "federation": config.federation, "data_dir": config.data_dir,
        "listen": config.listen, "join_listen": config.join_listen, "http": config.http,
        "rule": rounds.rule, "byzantine": rounds.byzantine, "withstands": rounds.rule.withstands(rounds.byzantine), "quorum": rounds.quorum,
        "central_noise": config.central_noise.as_ref().map(statement),
        "quarantine": config.quarantine, "server_optimizer": config.server_optimizer,
    });
    let central = config
        .central_noise
        .as_ref()
        .map_or_else(String::new, |terms| format!("\n{}", statement(terms)));
    let nobody = if rounds.rule.withstands(rounds.byzantine) < rounds.byzantine {
        format!(
            "\n{} withstands nobody: f = {} bounds the quorum and the quarantine, not the harm",
            rounds.rule, rounds.byzantine
        )
    } else {
        String::new()
    };
    let human = format!(
        "{} is good: federation {}, {} with quorum {} and f = {}, data in {}{central}{nobody}",
        common.config.display(),
        config.federation,
        rounds.rule,
        rounds.quorum,
        rounds.byzantine,
        config.data_dir.display()
    );
    print(common.format, &value, human)?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn status(common: &Common) -> Result<ExitCode, Problem> {
    let config = load(&common.config)?;
    let status = if let Some(status) = running(&config) {
        status
    } else {
        let (_, database) = open(&config)?;
        let mut status = Status::at_rest(database.read(), &config.federation, config.rounds.quorum)
            .map_err(|error| store_problem(&error))?;
        status.central_noise = CentralStatus::read(&config).map_err(|error| central_problem(&error))?;
        status
    };
    print(common.format, &status, human(&status))?;
    Ok(if status.running && status.storage == "ok" {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn human(status: &Status) -> String {
    let rows: Vec<Vec<String>> = status
        .sites
        .iter()
        .map(|site| {
            vec![
                site.name.clone(),
                site.state.clone(),
                if site.connected { "yes" } else { "no" }.to_owned(),
                standing(site),
                site.last_decision.clone().unwrap_or_default(),
                site.accepted.to_string(),
                site.refused.to_string(),
                site.epsilon
                    .map_or_else(|| "-".to_owned(), |epsilon| format!("{epsilon:.3}")),
                site.last_verdict.clone().unwrap_or_default(),
            ]
        })
        .collect();
    let header = [
        "site",
        "state",
        "connected",
        "standing",
        "last decision",
        "accepted",
        "refused",
        "epsilon",
        "gate",
    ];
    format!(
        "federation {}: {} in round {}, model {}, {} rounds published, {} aborted, {} of {} sites connected\n{}\n{}",
        status.federation,
        status.phase,
        status.round,
        status.model_version,
        status.rounds_published,
        status.rounds_aborted,
        status.connected.len(),
        status.sites.len(),
        wants(status)
            + &status
                .central_noise
                .as_ref()
                .map_or_else(String::new, |central| format!("{central}\n"))
            + &status
                .validation
                .as_ref()
                .map_or_else(String::new, |said| format!("validation, {said}\n")),
        table(&header, &rows)
    )
}

/// Trust, and whether it is in quarantine.
fn standing(site: &SiteStatus) -> String {
    match (site.trust, site.quarantined_since) {
        (Some(trust), Some(round)) => format!("quarantine since {round} ({trust:.3})"),
        (Some(trust), None) => format!("{trust:.3}"),
        (None, _) => "-".into(),
    }
}

/// What the aggregator waits for, one line each.
fn wants(status: &Status) -> String {
    let full = "the disk is full: make room on the volume of data_dir, the aggregator goes on by itself\n";
    let full = if status.storage == "ok" { "" } else { full };
    let (missing, quorum) = (status.missing, status.quorum);
    if missing == 0 {
        return full.to_owned();
    }
    let able = status.sites.iter().filter(|site| site.state == "active").count();
    let enrol = if able < quorum {
        format!(
            "; {able} enrolled, so enrol more with `theriac-aggregator token create --site NAME`, or lower rounds.quorum"
        )
    } else {
        String::new()
    };
    format!("{full}no round opens: waiting for {missing} more of quorum {quorum}{enrol}\n")
}

/// What the running server's own page says.
fn running(config: &CheckedConfig) -> Option<Status> {
    let text = std::fs::read(DataDir::new(&config.data_dir).addresses()).ok()?;
    let addresses: Addresses = serde_json::from_slice(&text).ok()?;
    let body = get(addresses.http, "/status").ok()?;
    let status: Status = serde_json::from_slice(&body).ok()?;
    // Another program may have the port by now.
    (status.federation == config.federation).then_some(status)
}

/// One plain HTTP request to our own page on loopback.
fn get(address: SocketAddr, path: &str) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&address, STATUS_TIMEOUT)?;
    stream.set_read_timeout(Some(STATUS_TIMEOUT))?;
    stream.set_write_timeout(Some(STATUS_TIMEOUT))?;
    // HTTP/1.0, so that the answer ends with the connection and is never chunked.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(STATUS_BYTES_MAX).read_to_end(&mut answer)?;
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n");
    let body = end.filter(|_| answer.starts_with(b"HTTP/1") && answer.get(9..12) == Some(b"200"));
    body.map(|end| answer.split_off(end + 4))
        .ok_or_else(|| std::io::Error::other("no good answer"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use theriac_protocol::round::PhaseName;
    use theriac_protocol::units::{NodeId, Round};

    use super::*;
    use crate::driver::DriverStatus;
    use crate::init::{InitOptions, init};

    fn status(connected: &[&str], phase: PhaseName, storage_full: bool) -> Status {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path().join("data");
        init(InitOptions::new(&dir, "demo")).unwrap();
        let database = crate::store::Database::open(&DataDir::new(&dir)).unwrap();
        let driver = DriverStatus {
            phase,
            round: Round(0),
            model_version: 0,
            connected: connected
                .iter()
                .map(|name| NodeId::new(*name).unwrap())
                .collect::<BTreeSet<_>>(),
            stored: 0,
            published: 0,
            aborted: 0,
            quorum: 3,
            central: None,
            validation: None,
            fleet: None,
        };
        let at_rest = Status::at_rest(database.read(), "demo", 3).unwrap();
        at_rest.with_driver(&driver, storage_full)
    }

    #[test]
    fn an_idle_aggregator_says_how_many_sites_it_waits_for() {
        let one = status(&["a"], PhaseName::Idle, false);
        assert_eq!((one.missing, one.quorum), (2, 3));
        let said = human(&one);
        assert!(said.contains("waiting for 2 more of quorum 3"), "{said}");
        assert!(
            said.contains("token create"),
            "nobody is enrolled, and that is not said: {said}"
        );
        for enough in [
            status(&["a", "b", "c"], PhaseName::Idle, false),
            status(&["a"], PhaseName::Collecting, false),
        ] {
            let said = human(&enough);
            assert!(enough.missing == 0 && !said.contains("waiting"), "{said}");
        }
    }

    #[test]
    fn a_full_disk_is_said() {
        let said = human(&status(&["a", "b", "c"], PhaseName::Idle, true));
        assert!(said.contains("the disk is full"), "{said}");
    }
}
