//! `init` and `token`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;
use theriac_certs::Authority;
use theriac_command::output::Format;
use theriac_command::problem::Problem;
use theriac_protocol::units::{Digest, NodeId};

use super::{Common, load, open, parse_duration, print, store_problem};
use crate::config::Settings;
use crate::init::{InitError, InitOptions, create_token, init as make, join_address, join_line};
use crate::serve::Addresses;
use crate::store::{ledgers, records};

#[derive(Debug, Args)]
pub(super) struct InitArgs {
    /// The new data directory.
    #[arg(long)]
    dir: PathBuf,
    /// Name of the federation, 1 to 63 characters of a-z, 0-9 and -.
    #[arg(long, default_value = "theriac")]
    federation: String,
    /// DNS names and addresses of this aggregator, separated by commas; the first one goes into the join line.
    #[arg(long, value_delimiter = ',', default_value = "localhost,127.0.0.1,::1")]
    hosts: Vec<String>,
    /// UDP address of the main listener.
    #[arg(long, default_value = "0.0.0.0:7700")]
    listen: SocketAddr,
    /// UDP address of the join listener.
    #[arg(long, default_value = "0.0.0.0:7701")]
    join_listen: SocketAddr,
    /// TCP address of the page, loopback only.
    #[arg(long, default_value = "127.0.0.1:7702")]
    http: SocketAddr,
    /// Site of the first join token.
    #[arg(long, default_value = "edge-1")]
    site: NodeId,
    /// `human`, or `json` for programs.
    #[arg(long, default_value = "human")]
    format: Format,
}

pub(super) fn init(args: InitArgs) -> Result<ExitCode, Problem> {
    let settings = Settings {
        federation: args.federation,
        listen: args.listen,
        join_listen: args.join_listen,
        http: args.http,
        ..Settings::default()
    };
    let options = InitOptions {
        dir: args.dir,
        hosts: args.hosts,
        settings,
        site: Some(args.site),
    };
    let made = make(options).map_err(|error| match &error {
        InitError::Config(inner) => Problem::config("TH-E0701", inner).hint(inner.hint()),
        InitError::Serve(inner) => inner.problem(),
        InitError::NoHosts => {
            Problem::usage("TH-E0711", &error).hint("name one with --hosts agg.example.org")
        }
    })?;
    let line = made.join_line().unwrap_or_default();
    let fingerprint = Digest(made.authority_fingerprint);
    let site = made
        .token
        .as_ref()
        .map(|(site, _)| site.to_string())
        .unwrap_or_default();
    let value = json!({
        "config": made.config, "federation": made.checked.federation, "authority_fingerprint": fingerprint.to_string(),
        "site": site, "token": made.token.as_ref().map(|(_, token)| token.to_string()), "join": line,
    });
    let config = made.config.display();
    let human = format!(
        "federation {} is ready in {}\n\nstart the aggregator:\n  theriac-aggregator serve --config {config}\n\n\
         then enrol {site} on its own host, within the hour (one use):\n  {line}",
        made.checked.federation,
        made.checked.data_dir.display(),
    );
    print(args.format, &value, human)?;
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Subcommand)]
pub(super) enum TokenCommand {
    /// Makes a token that enrols one named site, once.
    #[command(after_help = "Example: theriac-aggregator token create --site plant-7 --ttl 30m")]
    Create {
        #[command(flatten)]
        common: Common,
        /// Name of the site.
        #[arg(long)]
        site: NodeId,
        /// How long it is good for, 1 s to 7 days.
        #[arg(long, default_value = "1h", value_parser = parse_duration)]
        ttl: Duration,
        /// The site may begin a new privacy ledger in the place of the one that it has; needed where `privacy_floor.ledger_continuity` is on.
        #[arg(long)]
        new_ledger: bool,
    },
}

pub(super) fn token(command: TokenCommand) -> Result<ExitCode, Problem> {
    let TokenCommand::Create {
        common,
        site,
        ttl,
        new_ledger,
    } = command;
    if !(Duration::from_secs(1)..=Duration::from_hours(7 * 24)).contains(&ttl) {
        let text = humantime::format_duration(ttl);
        return Err(
            Problem::usage("TH-E0712", format!("a token of {text} is too short or too long"))
                .hint("choose between 1s and 7days; an hour is usual"),
        );
    }
    let config = load(&common.config)?;
    let (dir, mut database) = open(&config)?;
    let authority = Authority::load(&dir.aggregator_authority())
        .map_err(|error| crate::serve::ServeError::from(error).problem())?;
    let present = ledgers::present(database.read(), &site).map_err(|error| store_problem(&error))?;
    let before = present.map(|(head, epsilon)| spent_before(head.records, epsilon));
    if let Some(before) = before.as_ref().filter(|_| !new_ledger) {
        let what = format!(
            "{site} is enrolled and has a privacy ledger of {before}: with another key it would begin a new one, at zero"
        );
        if config.privacy_floor.ledger_continuity {
            return Err(Problem::failed("TH-E0725", what).hint(
                "[privacy_floor] ledger_continuity keeps such a site out: give --new-ledger if that is meant, or enrol the host under another name",
            ));
        }
        tracing::warn!("{what}; `sites show {site}` will say so");
    }
    let token = create_token(&mut database, authority.fingerprint(), &site, ttl, new_ledger)
        .map_err(|error| store_problem(&error))?;
    // The running server knows its real port; the configuration may say 0.
    let running: Option<Addresses> = std::fs::read(dir.addresses())
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok());
    let port = match config.join_listen.port() {
        0 => running.map_or(0, |addresses| addresses.join_listen.port()),
        port => port,
    };
    let hosts =
        records::meta(database.read(), crate::serve::META_HOSTS).map_err(|error| store_problem(&error))?;
    let hosts: Vec<String> = serde_json::from_slice(&hosts).unwrap_or_default();
    let address = join_address(hosts.first().map_or("localhost", String::as_str), port);
    let line = join_line(&address, &token);
    let lifetime_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
    let expires = crate::store::wall_clock().0.saturating_add(lifetime_ms);
    let value = json!({
        "site": site.as_str(), "token": token.to_string(), "expires_unix_ms": expires, "join": line, "new_ledger": new_ledger,
        "ledger_before": before,
    });
    let before = before.map_or_else(String::new, |before| {
        format!("\n{site} has a privacy ledger of {before}; with another key it begins a new one, at zero")
    });
    let human = format!(
        "good for {} and one use:\n  {line}{before}",
        humantime::format_duration(ttl)
    );
    print(common.format, &value, human)?;
    Ok(ExitCode::SUCCESS)
}

/// A ledger in words: `12 records, epsilon 3.2 spent`.
fn spent_before(records: u64, epsilon: Option<f64>) -> String {
    let epsilon = epsilon.map_or_else(String::new, |epsilon| format!(", epsilon {epsilon:.3} spent"));
    format!("{records} records{epsilon}")
}
