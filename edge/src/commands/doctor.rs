//! `doctor`: one line a check, with what to do about it.

use std::io::{ErrorKind, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use clap::Args;
use serde::Serialize;
use theriac_certs::files::FileError;
use theriac_certs::{Identity, IdentityError, files, trust};
use theriac_command::output::Output;
use theriac_command::problem::Problem;
use theriac_heal::checkpoint::offsite::OffsiteKey;
use theriac_heal::checkpoint::state_check::StateVerdict;
use theriac_model::feature::FeatureSchema;
use theriac_model::global::model_layout;
use theriac_privacy::ledger::Ledger;
use theriac_protocol::message::{FEATURE_GRADIENT, HelloV1, PROTOCOL_MAX, PROTOCOL_MIN};
use theriac_protocol::units::{Digest, ModelVersion, NoiseMultiplier};
use theriac_transport::{ConnectError, Limits, bind_client, connect};

use super::{ConfigArguments, unprinted};
use crate::client::{AGGREGATOR_AUTHORITY, IDENTITY, opening, resolve};
use crate::config::{EdgeConfig, StateSettings, host_and_port};
use crate::offsite::{OffsiteRecord, OffsiteSettings};
use crate::probe::{self, ProbeUrl};
use crate::service::{open_checkpoints, state_check};
use crate::state_dir::{Joined, StateDir};
use crate::status::{Federation, Status};
use crate::store::{StoreError, StoreReader};

/// Socket buffer that a busy link wants, in bytes.
const BUFFER_BYTES: usize = 4 << 20;
/// Free room below which training stops soon, in bytes.
const FREE_BYTES: u64 = 256 << 20;
/// Certificates should be renewed before this.
const CERTIFICATE_LEFT: Duration = Duration::from_hours(48);
/// A clock before this (2024-01-01) was never set.
const CLOCK_MIN: Duration = Duration::from_hours(473_352);

#[derive(Debug, Args)]
pub(super) struct DoctorArguments {
    #[command(flatten)]
    config: ConfigArguments,
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Check {
    #[serde(rename = "check")]
    name: &'static str,
    result: Finding,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Finding {
    Ok,
    /// Works, but not as well as it could.
    Warn,
    Fail,
    /// Does not apply here.
    Skip,
}

impl Check {
    fn ok(name: &'static str, detail: impl ToString) -> Self {
        Self {
            name,
            result: Finding::Ok,
            detail: detail.to_string(),
            fix: None,
        }
    }

    fn skip(name: &'static str, detail: impl ToString) -> Self {
        Self {
            result: Finding::Skip,
            ..Self::ok(name, detail)
        }
    }

    fn warn(name: &'static str, detail: impl ToString, fix: impl ToString) -> Self {
        Self {
            name,
            result: Finding::Warn,
            detail: detail.to_string(),
            fix: Some(fix.to_string()),
        }
    }

    fn fail(name: &'static str, detail: impl ToString, fix: impl ToString) -> Self {
        Self {
            result: Finding::Fail,
            ..Self::warn(name, detail, fix)
        }
    }
}

pub(super) async fn doctor<W: Write>(
    arguments: &DoctorArguments,
    output: &mut Output<W>,
) -> Result<ExitCode, Problem> {
    let config = arguments.config.load()?;
    let dir = StateDir::existing(&config.state_dir.path);
    let joined = dir.joined();
    let mut checks = vec![
        clock(&dir),
        proc_readable(),
        sockets(),
        state_dir(&dir),
        disk(&dir),
        keys(&dir),
        store(&dir),
    ];
    checks.push(ledger(&config, &dir));
    let page = page(&dir).await;
    for service in &config.services {
        if let Some(state) = &service.state {
            let proof = crate::postgres::needs_proof(service);
            checks.push(checkpoints(&dir, service.name.as_str(), state, proof, page.as_ref()).await);
            if let Some(settings) = &config.offsite {
                checks.push(offsite(settings, &dir, service.name.as_str()));
            }
        }
    }
    checks.push(match joined {
        // A second session of the same site would push the running edge's out: ask that edge instead.
        Ok(Some(_)) if dir.is_in_use() => running_link(page),
        Ok(Some(joined)) => aggregator(&config, &dir, &joined).await,
        Ok(None) => Check::skip("aggregator", "this edge has not joined a federation"),
        Err(error) => Check::fail("aggregator", error, "run `theriac-edge join` again"),
    });
    let failed = checks.iter().any(|check| check.result == Finding::Fail);
    output.result(&checks, human(&checks)).map_err(unprinted)?;
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn human(checks: &[Check]) -> String {
    let lines = checks.iter().map(|check| {
        let word = match check.result {
            Finding::Ok => "ok  ",
            Finding::Warn => "warn",
            Finding::Fail => "FAIL",
            Finding::Skip => "-   ",
        };
        let fix = check
            .fix
            .as_ref()
            .map(|fix| format!("\n      fix: {fix}"))
            .unwrap_or_default();
        format!("{word}  {:<14} {}{fix}", check.name, check.detail)
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn clock(dir: &StateDir) -> Check {
    const FIX: &str = "set it: timedatectl set-ntp true, or chronyc makestep";
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    if now < CLOCK_MIN {
        let detail = format!("the wall clock says {} s after 1970", now.as_secs());
        return Check::fail("clock", detail, FIX);
    }
    // Our own certificate is older than now, or the clock is wrong.
    let identity = Identity::load(&dir.keys(), IDENTITY).ok();
    let valid = identity.map_or(Ok(()), |identity| identity.check_valid(SystemTime::now()));
    if let Err(error @ IdentityError::NotYetValid { .. }) = valid {
        return Check::fail("clock", error, FIX);
    }
    Check::ok("clock", "set (compared with the aggregator's on connecting)")
}

fn proc_readable() -> Check {
    let own = procfs::process::Process::myself().and_then(|process| process.stat());
    match (own, std::fs::read("/proc/self/io")) {
        (Ok(_), Ok(_)) => Check::ok("/proc", "readable"),
        (Ok(_), Err(error)) => Check::warn(
            "/proc",
            format!("/proc/PID/io: {error}"),
            "run as the services' user, or disk I/O stays unseen",
        ),
        (Err(error), _) => Check::fail("/proc", error, "mount it: mount -t proc proc /proc"),
    }
}

fn sockets() -> Check {
    let endpoint = match bind_client(&Limits::default()) {
        Ok(endpoint) => endpoint,
        Err(error) => return Check::fail("socket", error, "allow this user to open UDP sockets"),
    };
    let granted = endpoint.granted();
    let detail = format!(
        "{} KiB send, {} KiB receive",
        granted.send / 1024,
        granted.receive / 1024
    );
    if granted.send < BUFFER_BYTES || granted.receive < BUFFER_BYTES {
        let fix = format!(
            "sysctl -w net.core.rmem_max={BUFFER_BYTES} net.core.wmem_max={BUFFER_BYTES} (works without)"
        );
        return Check::warn("socket", format!("{detail}, 4096 KiB were asked for"), fix);
    }
    Check::ok("socket", detail)
}

fn state_dir(dir: &StateDir) -> Check {
    match std::fs::metadata(dir.root()) {
        Ok(found) if found.permissions().mode() & 0o077 != 0 => Check::fail(
            "state",
            format!(
                "{} has mode {:04o}",
                dir.root().display(),
                found.permissions().mode() & 0o7777
            ),
            format!("chmod 700 {}", dir.root().display()),
        ),
        Ok(_) if dir.is_in_use() => Check::ok(
            "state",
            format!("{}, in use by a running edge", dir.root().display()),
        ),
        Ok(_) => Check::ok("state", format!("{}, no edge runs here", dir.root().display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Check::skip("state", format!("{} does not exist yet", dir.root().display()))
        }
        Err(error) => Check::fail("state", error, "check the path and its permissions"),
    }
}

fn disk(dir: &StateDir) -> Check {
    let existing = dir
        .root()
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("."));
    match StateDir::existing(existing).free_bytes() {
        Ok(free) if free < FREE_BYTES => Check::warn(
            "disk",
            format!("{} MiB free", free >> 20),
            "make room: below 16 MiB training stops, detection goes on",
        ),
        Ok(free) => Check::ok("disk", format!("{} MiB free", free >> 20)),
        Err(error) => Check::fail("disk", error, "check the file system of the state directory"),
    }
}

fn keys(dir: &StateDir) -> Check {
    let Ok(files) = std::fs::read_dir(dir.keys()) else {
        return Check::skip("keys", "there are none yet");
    };
    let mut count = 0;
    for file in files.flatten() {
        let private = file.file_name() != AGGREGATOR_AUTHORITY;
        let Ok(found) = file.metadata() else { continue };
        count += 1;
        if private && found.permissions().mode() & 0o077 != 0 {
            let path = file.path();
            let detail = format!(
                "{} has mode {:04o}",
                path.display(),
                found.permissions().mode() & 0o7777
            );
            return Check::fail(
                "keys",
                detail,
                format!("chmod 600 {}; others may have read it: join anew", path.display()),
            );
        }
    }
    let identity = match Identity::load(&dir.keys(), IDENTITY) {
        Ok(identity) => identity,
        Err(_) if count == 0 => return Check::skip("keys", "there are none yet"),
        Err(error) => return no_identity("keys", &error),
    };
    if let Err(error @ IdentityError::NotYetValid { .. }) = identity.check_valid(SystemTime::now()) {
        return Check::fail("keys", error, "set the clock; nothing has to be joined again");
    }
    match identity.expires().duration_since(SystemTime::now()) {
        Ok(left) if left > CERTIFICATE_LEFT => {
            Check::ok("keys", format!("{} days left", left.as_secs() / 86_400))
        }
        Ok(left) => Check::warn(
            "keys",
            format!("{} hours left", left.as_secs() / 3_600),
            "join again before it ends",
        ),
        Err(_) => Check::fail(
            "keys",
            "the certificate has ended",
            "join again; if it should not have, set the clock",
        ),
    }
}

/// Why the identity cannot be used, and what mends it.
fn no_identity(name: &'static str, error: &IdentityError) -> Check {
    const JOIN: &str = "theriac-edge join --renew with a new token";
    match error {
        IdentityError::File(FileError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
            Check::warn(
                name,
                "there is no complete identity: joining was begun and not ended, or edge.pem was lost",
                "run the same `theriac-edge join` again, or `theriac-edge join --renew` with a new token",
            )
        }
        IdentityError::File(FileError::TooWide { path, .. }) => Check::fail(
            name,
            error,
            format!("chmod 600 {}; if others may have read it: {JOIN}", path.display()),
        ),
        IdentityError::File(FileError::Io { .. }) => Check::fail(
            name,
            error,
            "check its owner and permissions; the edge's user must be able to read it",
        ),
        _ => Check::fail(
            name,
            format!("{IDENTITY}.pem is damaged: {error}"),
            format!("restore it from a backup, or {JOIN}"),
        ),
    }
}

fn store(dir: &StateDir) -> Check {
    match StoreReader::open(&dir.database()) {
        Ok(Some(reader)) => match reader.integrity() {
            Ok(()) => Check::ok("store", "sound"),
            Err(error) => unsound(error),
        },
        Ok(None) => Check::skip("store", "there is none yet"),
        Err(error) => unsound(error),
    }
}

fn unsound(error: StoreError) -> Check {
    let fix = match error {
        StoreError::Full { .. } => "make room on that disk; edge.db itself may be sound",
        StoreError::ReadOnly { .. } => "mount it so that it can be written; edge.db itself may be sound",
        _ => "restore edge.db from a backup, or move it away",
    };
    Check::fail("store", error, fix)
}

/// What is known of a service's off-site copies without asking the store, which may take long to say nothing.
fn offsite(settings: &OffsiteSettings, dir: &StateDir, service: &str) -> Check {
    if let Err(error) = OffsiteKey::load(&settings.key_file) {
        let fix = "put back the key that sealed the copies, mode 0600; `theriac-edge checkpoints key` makes the first one";
        return Check::fail("offsite", format!("{service}: {error}"), fix);
    }
    let known = OffsiteRecord::read(dir, service);
    let count = format!("{service}: {} of them at the last contact", known.copies.len());
    match known.failure {
        Some(failure) => Check::warn(
            "offsite",
            format!("{count}; the last attempt failed: {failure}"),
            "look at the store of offsite.url; the local checkpoints stay valid",
        ),
        None if known.suspect => Check::warn(
            "offsite",
            format!("{count}; a drill found damage"),
            "theriac-edge checkpoints list shows which; the next copy is opened whole",
        ),
        None => Check::ok("offsite", count),
    }
}

fn ledger(config: &EdgeConfig, dir: &StateDir) -> Check {
    // A store that cannot be read has its own line.
    let known = StoreReader::open(&dir.database())
        .ok()
        .flatten()
        .and_then(|reader| reader.known_ledger().ok().flatten());
    match opening::inspect(config, dir, known.as_ref()) {
        Ok(None) => Check::skip("ledger", "nothing was ever released"),
        Ok(Some(status)) => {
            let detail = format!(
                "sound, {} releases, epsilon {:.3} of {}",
                status.releases, status.epsilon_spent, status.epsilon_limit
            );
            if status.epsilon_spent >= status.epsilon_limit {
                return Check::warn("ledger", detail, "the budget is spent: only detection goes on");
            }
            Check::ok("ledger", detail)
        }
        Err(barred) => Check::fail(
            "ledger",
            format!("{}: {barred}; federation is off", barred.code()),
            barred.fix(),
        ),
    }
}

/// Copies of a service's state: how many there are, and whether another one can be taken.
async fn checkpoints(
    dir: &StateDir,
    service: &str,
    state: &StateSettings,
    needs_proof: bool,
    page: Option<&Status>,
) -> Check {
    const NAME: &str = "checkpoints";
    let valid = std::fs::read_dir(dir.checkpoints().join(service))
        .ok()
        .and_then(|_| {
            open_checkpoints(dir, service, state, needs_proof)
                .ok()?
                .list()
                .ok()
        })
        .map_or(0, |list| list.len());
    let detail = |what: &str| format!("{service}: {valid} valid{what}");
    let running = page.and_then(|page| page.services.iter().find(|line| line.name == service));
    let failure = match (running, state_check(state)) {
        (Some(line), _) => line.checkpoint_failure.clone(),
        // No edge runs: the check is tried as the edge would before it starts the service.
        (None, Some(check)) if state.dir.exists() => match check.run(&state.dir).await {
            StateVerdict::Good => None,
            StateVerdict::Corrupt(said) => Some(format!("the state did not pass its check: {said}")),
            StateVerdict::Unknown(said) => Some(said),
        },
        (None, _) => None,
    };
    let Some(failure) = failure else {
        return Check::ok(NAME, detail(""));
    };
    let fix =
        "mend what it names; state.check, run by hand, must end with 0 for good state and 1 for corrupt";
    let told = detail(&format!("; the last attempt failed: {failure}"));
    if valid == 0 {
        Check::fail(NAME, told, fix)
    } else {
        Check::warn(NAME, told, fix)
    }
}

/// What the page of the running edge says.
async fn page(dir: &StateDir) -> Option<Status> {
    let address = dir.http_address().filter(|_| dir.is_in_use())?;
    let (_, body) = probe::get(
        &ProbeUrl::new(address, "/status"),
        Duration::from_secs(5),
        1 << 20,
    )
    .await
    .ok()?;
    serde_json::from_slice(&body).ok()
}

fn running_link(status: Option<Status>) -> Check {
    let fix = "see the log of the running edge; stop it and run doctor again for the whole handshake";
    match status {
        Some(status) if status.federation == Federation::Connected => {
            Check::ok("aggregator", "the running edge is connected")
        }
        Some(status) => Check::fail(
            "aggregator",
            status
                .federation_detail
                .unwrap_or_else(|| "not connected".to_owned()),
            fix,
        ),
        None => Check::fail("aggregator", "the running edge does not answer on its page", fix),
    }
}

/// The whole way: name, UDP, handshake, certificate on both ends, Welcome.
async fn aggregator(config: &EdgeConfig, dir: &StateDir, joined: &Joined) -> Check {
    const NAME: &str = "aggregator";
    let address = config
        .federation
        .aggregator
        .as_ref()
        .unwrap_or(&joined.aggregator);
    let keys_lost = "run `theriac-edge join --renew` with a new token";
    let identity = match Identity::load(&dir.keys(), IDENTITY) {
        Ok(identity) => identity,
        Err(error) => {
            return Check {
                result: Finding::Fail,
                ..no_identity(NAME, &error)
            };
        }
    };
    let Ok(authority) = files::load_certificate(&dir.keys().join(AGGREGATOR_AUTHORITY)) else {
        return Check::fail(NAME, "the authority's certificate is missing", keys_lost);
    };
    let tls = match trust::client_config(&identity, &authority) {
        Ok(tls) => tls,
        Err(error) => return Check::fail(NAME, error, keys_lost),
    };
    let Some((host, port)) = host_and_port(address) else {
        return Check::fail(
            NAME,
            format!("`{address}` is not HOST:PORT"),
            "correct federation.aggregator",
        );
    };
    let resolved = resolve(&host, port).await.unwrap_or_default();
    let Some(socket) = resolved.first().copied() else {
        return Check::fail(
            NAME,
            format!("`{host}` does not resolve"),
            "check DNS or /etc/hosts",
        );
    };
    let endpoint = match bind_client(&Limits::default()) {
        Ok(endpoint) => endpoint,
        Err(error) => return Check::fail(NAME, error, "allow this user to open UDP sockets"),
    };
    match hello(config, dir) {
        None => Check::warn(
            NAME,
            format!("{address} resolves to {socket}"),
            "the ledger or the policy cannot be read, so the handshake was left out",
        ),
        Some(hello) => match Box::pin(connect(&endpoint, socket, &host, tls, hello)).await {
            Ok((session, welcome)) => {
                let skew = welcome.time.0.abs_diff(unix_ms()) / 1_000;
                session
                    .handle()
                    .close(theriac_transport::CloseCode::Done, "doctor");
                if skew > 60 {
                    return Check::warn(
                        NAME,
                        format!("welcome, but the clocks differ by {skew} s"),
                        "check the time service",
                    );
                }
                Check::ok(
                    NAME,
                    format!("welcome at {socket}, model {}", welcome.model_version),
                )
            }
            Err(ConnectError::Refused(refusal)) => Check::fail(
                NAME,
                format!("refused: {}", refusal.code),
                "ask the aggregator's operator: theriac-aggregator sites list",
            ),
            Err(error) => {
                let hint = error.hint().unwrap_or("check that UDP passes the firewall");
                Check::fail(NAME, error, hint)
            }
        },
    }
}

fn hello(config: &EdgeConfig, dir: &StateDir) -> Option<HelloV1> {
    let (head, records, floor): (Digest, u64, NoiseMultiplier) = if dir.ledger().exists() {
        let policy = opening::existing_policy(config, dir).ok()??;
        let floor = policy.noise_multiplier_min();
        let status = Ledger::inspect(&dir.ledger(), policy).ok()?;
        (status.ledger_head.parse().ok()?, status.ledger_records, floor)
    } else {
        (Digest::default(), 0, NoiseMultiplier::new(1.0).ok()?)
    };
    let schema = FeatureSchema::host_service_v1();
    Some(HelloV1 {
        protocol_min: PROTOCOL_MIN,
        protocol_max: PROTOCOL_MAX,
        software: concat!("theriac-edge doctor ", env!("CARGO_PKG_VERSION")).to_owned(),
        features: vec![FEATURE_GRADIENT.to_owned()],
        profile: schema.name.clone(),
        profile_digest: Digest(schema.digest()),
        layout_digest: Digest(model_layout(schema.channels()).digest()),
        noise_multiplier_min: floor,
        ledger_head: head,
        ledger_records: records,
        model_version: ModelVersion(0),
        model_digest: Digest::default(),
        audit_checkpoint: None,
        receipt_missing: None,
    })
}

fn unix_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
