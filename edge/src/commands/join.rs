//! `join`: makes a key here, has it certified, and leaves word for `run`.
//!
//! The token pins the aggregator by its authority's fingerprint, so nothing is trusted on first use. The key is on disk
//! before the request is sent, and asking again with the same key and token gives the same answer: a lost answer costs
//! nothing.

use std::io::Write;
use std::process::ExitCode;
use std::time::SystemTime;

use clap::Args;
use serde::Serialize;
use theriac_certs::{Identity, JoinToken, PendingIdentity, files};
use theriac_command::output::Output;
use theriac_command::problem::Problem;
use theriac_protocol::message::JoinRefusal;
use theriac_protocol::units::NodeId;
use theriac_transport::join::{Enrolled, JoinError, request};
use theriac_transport::{Limits, bind_client};

use super::{ConfigArguments, unprinted};
use crate::client::{AGGREGATOR_AUTHORITY, IDENTITY, resolve};
use crate::config::host_and_port;
use crate::run::EdgeError;
use crate::state_dir::{Joined, StateDir};

#[derive(Debug, Args)]
pub(super) struct JoinArguments {
    /// `HOST:PORT` of the aggregator's join listener.
    #[arg(long)]
    aggregator: String,
    /// The one-time token, `thrc1_…`.
    #[arg(long, env = "THERIAC_JOIN_TOKEN", hide_env_values = true)]
    token: String,
    /// Joins again, with a new key and a new token, although this host has joined: before its certificate ends, or after
    /// its key was lost.
    #[arg(long)]
    renew: bool,
    #[command(flatten)]
    config: ConfigArguments,
}

/// What `join` prints.
#[derive(Debug, Serialize)]
struct JoinedReport {
    node: NodeId,
    federation: String,
    aggregator: String,
    certificate_days: u64,
    state_dir: String,
}

impl JoinedReport {
    fn of(joined: Joined, identity: &Identity, dir: &StateDir) -> Self {
        let left = identity
            .expires()
            .duration_since(SystemTime::now())
            .unwrap_or_default();
        Self {
            node: joined.node,
            federation: joined.federation,
            aggregator: joined.aggregator,
            certificate_days: left.as_secs() / 86_400,
            state_dir: dir.root().display().to_string(),
        }
    }
}

pub(super) async fn join<W: Write>(
    arguments: JoinArguments,
    output: &mut Output<W>,
) -> Result<ExitCode, Problem> {
    let config = arguments.config.load()?;
    let token: JoinToken = arguments.token.trim().parse().map_err(|error| {
        Problem::usage("TH-E0312", error)
            .hint("copy the whole line that `theriac-aggregator token create` printed")
    })?;
    let (host, port) = host_and_port(&arguments.aggregator).ok_or_else(|| {
        Problem::usage("TH-E0310", format!("`{}` is not HOST:PORT", arguments.aggregator))
            .hint("for example 10.0.0.5:7701, the join listener's address")
    })?;
    let dir = StateDir::open(&config.state_dir.path).map_err(EdgeError::from)?;
    let _lock = dir.lock().map_err(EdgeError::from)?;
    if let Some(report) = already_joined(&dir, arguments.renew)? {
        let human = format!(
            "already joined {} as {}: nothing to do\n  next  theriac-edge run{}\n  (--renew joins again with a new key)",
            report.federation,
            report.node,
            arguments.config.again()
        );
        output.result(&report, human).map_err(unprinted)?;
        return Ok(ExitCode::SUCCESS);
    }
    let pending = PendingIdentity::load_or_generate(&dir.keys(), IDENTITY).map_err(bad_keys)?;
    let csr = pending.csr_der().map_err(bad_keys)?;
    let enrolled = ask(&host, port, &token, csr).await?;
    if let Some(configured) = config
        .node
        .as_ref()
        .filter(|configured| **configured != enrolled.node)
    {
        let (configured, enrolled) = (configured.clone(), enrolled.node);
        return Err(EdgeError::OtherName { configured, enrolled }.into());
    }
    let identity = pending
        .complete(&enrolled.certificate, &enrolled.edge_authority)
        .map_err(bad_keys)?;
    keep(&dir, &identity, &enrolled)?;
    let report = JoinedReport::of(joined_as(&enrolled), &identity, &dir);
    let human = format!(
        "joined {} as {}\n  aggregator   {}\n  certificate  {} days left\n  next         theriac-edge run{}",
        report.federation,
        report.node,
        report.aggregator,
        report.certificate_days,
        arguments.config.again()
    );
    output.result(&report, human).map_err(unprinted)?;
    check_clock(&identity)?;
    Ok(ExitCode::SUCCESS)
}

async fn ask(host: &str, port: u16, token: &JoinToken, csr: Vec<u8>) -> Result<Enrolled, Problem> {
    let unreachable = |why: String| {
        Problem::temporary("TH-E0310", format!("cannot reach the join listener at {host}:{port}: {why}")).hint(
            "check the address, that UDP passes the firewall, and this host's clock; the same token may be used again",
        )
    };
    let found = resolve(host, port)
        .await
        .map_err(|error| unreachable(error.to_string()))?;
    let endpoint = bind_client(&Limits::default()).map_err(|error| unreachable(error.to_string()))?;
    let mut last = "no address".to_owned();
    for address in found {
        match Box::pin(request(&endpoint, address, host, token, csr.clone())).await {
            Ok(enrolled) => return Ok(enrolled),
            Err(JoinError::Refused(refusal)) => return Err(refused(refusal)),
            Err(other) => last = other.to_string(),
        }
    }
    Err(unreachable(last))
}

fn refused(refusal: JoinRefusal) -> Problem {
    let (text, hint) = match refusal {
        JoinRefusal::UnknownToken => (
            "the aggregator does not know this token",
            "create a new one: theriac-aggregator token create --site NAME",
        ),
        JoinRefusal::Expired => (
            "the token has expired",
            "create a new one: theriac-aggregator token create --site NAME; a wrong clock can be the cause as well",
        ),
        JoinRefusal::Spent => (
            "the token was already used, with another key",
            "create a new one; if you did not use it, somebody else did: revoke that site",
        ),
        JoinRefusal::BadRequest => (
            "the aggregator could not read the request",
            "use the same release of edge and aggregator",
        ),
        JoinRefusal::RevokedKey => (
            "the operator of the aggregator has revoked this key, which is for ever",
            "join with a new state directory, which makes a new key, and a new token",
        ),
        JoinRefusal::Busy => {
            return Problem::temporary("TH-E0315", "the aggregator has too many requests right now")
                .hint("try again in a minute; the token stays good");
        }
        JoinRefusal::StorageFull => {
            return Problem::temporary(
                "TH-E0315",
                "the aggregator's disk is full, so it can enrol nobody now",
            )
            .hint("tell its operator; when there is room run the same command again, the token stays good");
        }
    };
    Problem::failed("TH-E0311", text).hint(hint)
}

/// The command may be given again: a host with a good identity has nothing more to ask for.
fn already_joined(dir: &StateDir, renew: bool) -> Result<Option<JoinedReport>, Problem> {
    let Some(joined) = dir.joined().map_err(EdgeError::from)?.filter(|_| !renew) else {
        return Ok(None);
    };
    let identity = Identity::load(&dir.keys(), IDENTITY).ok();
    let good = identity.filter(|identity| {
        identity.name().node == joined.node && identity.check_valid(SystemTime::now()).is_ok()
    });
    Ok(good.map(|identity| JoinedReport::of(joined, &identity, dir)))
}

fn joined_as(enrolled: &Enrolled) -> Joined {
    Joined {
        node: enrolled.node.clone(),
        federation: enrolled.federation.clone(),
        aggregator: enrolled.aggregator.clone(),
    }
}

fn keep(dir: &StateDir, identity: &Identity, enrolled: &Enrolled) -> Result<(), Problem> {
    let failed = |error: &dyn std::fmt::Display| {
        Problem::failed("TH-E0313", format!("cannot keep the identity: {error}"))
            .hint("make room or correct the permissions, then run the same command again; the token stays good for this key")
    };
    files::save_certificate(
        &dir.keys().join(AGGREGATOR_AUTHORITY),
        &enrolled.aggregator_authority,
    )
    .map_err(|error| failed(&error))?;
    identity
        .save(&dir.keys(), IDENTITY)
        .map_err(|error| failed(&error))?;
    // Last, because it is what makes `run` federate; the pending key goes only when all is in place.
    dir.save_joined(&joined_as(enrolled))
        .map_err(|error| failed(&error))?;
    PendingIdentity::discard(&dir.keys(), IDENTITY).map_err(|error| failed(&error))
}

fn check_clock(identity: &Identity) -> Result<(), Problem> {
    identity.check_valid(SystemTime::now()).map_err(|error| {
        Problem::failed(
            "TH-E0314",
            format!("joined, but by this host's clock the certificate is not valid now: {error}"),
        )
        .hint("set the clock (timedatectl, chronyc makestep); nothing has to be joined again")
    })
}

fn bad_keys(error: theriac_certs::EnrolError) -> Problem {
    Problem::failed("TH-E0313", error)
        .hint("move the keys directory away to begin with a new key and a new token")
}
