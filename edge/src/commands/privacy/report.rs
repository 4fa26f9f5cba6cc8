//! `privacy report` and `privacy verify`: the statement with its proof, and the check of both.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use theriac_audit::checkpoint::LogPublicKey;
use theriac_audit::seal::verify_seal;
use theriac_command::output::Output;
use theriac_command::problem::Problem;
use theriac_privacy::ledger::{KnownHead, Ledger, Seal};
use theriac_privacy::policy::signed::PolicyPublicKey;
use theriac_privacy::report::{SealCheck, Trust, Verified, VerifyError, page, verify};
use theriac_protocol::message::LedgerSealV1;
use theriac_protocol::units::{NodeId, Timestamp};

use super::super::{ConfigArguments, unprinted};
use super::known_ledger;
use crate::client::opening::{self, Barred};
use crate::state_dir::StateDir;

#[derive(Debug, Args)]
pub(in crate::commands) struct ReportArguments {
    /// Where to write the report (JSON, with every record of the ledger); default: standard output.
    #[arg(long)]
    output: Option<PathBuf>,
    /// Where to write the page for an officer: one sheet, self-contained.
    #[arg(long)]
    html: Option<PathBuf>,
    #[command(flatten)]
    config: ConfigArguments,
}

#[derive(Debug, Args)]
pub(in crate::commands) struct VerifyArguments {
    /// A report of `privacy report`.
    file: PathBuf,
    /// The officer's public key (`thpk1_…`): every policy must be signed with it.
    #[arg(long)]
    policy_key: Option<PolicyPublicKey>,
    /// The edge's own public key, as an earlier report named it: the report must be signed with it.
    #[arg(long)]
    edge_key: Option<PolicyPublicKey>,
    /// Public key of the aggregator's audit log, as `theriac-aggregator audit export` printed it: counter-signatures must be made with it.
    #[arg(long)]
    log_key: Option<LogPublicKey>,
    /// RECORDS:HEAD that the ledger is known to have reached, as `theriac-aggregator sites list` shows them: finds a cut-off end.
    #[arg(long, value_parser = known_head)]
    known: Option<KnownHead>,
}

pub(super) fn report<W: Write>(
    arguments: &ReportArguments,
    output: &mut Output<W>,
) -> Result<ExitCode, Problem> {
    let config = arguments.config.load()?;
    let dir = StateDir::existing(&config.state_dir.path);
    let known = known_ledger(&dir)?;
    if !dir.ledger().exists() && known.is_none() {
        return Err(Problem::failed(
            "TH-E0341",
            "there is no privacy ledger: nothing was ever released",
        )
        .hint("a ledger is begun when the edge first runs after `theriac-edge join`"));
    }
    let policy = opening::existing_policy(&config, &dir)?.ok_or_else(|| {
        Problem::from(Barred::PolicyMissing {
            path: opening::policy_path(&config, &dir),
        })
    })?;
    let document = Ledger::report(&dir.ledger(), &policy, known.as_ref(), now())
        .map_err(|error| Problem::from(Barred::Ledger(error)))?;
    let document = document.signed(&opening::report_key(&dir).map_err(Problem::from)?);
    if let Some(path) = &arguments.html {
        let html = page(&document)
            .ok_or_else(|| Problem::failed("TH-E0341", "the page cannot be made of this report"))?;
        write(path, &html)?;
    }
    let text = serde_json::to_string_pretty(&document).map_err(|error| Problem::failed("TH-E0341", error))?;
    if let Some(path) = &arguments.output {
        write(path, &text)?;
        let value =
            serde_json::json!({ "report": path, "html": arguments.html, "statement": document.statement });
        let sheet = match &arguments.html {
            Some(html) => format!("wrote the page {}", html.display()),
            None => "for a page that an officer can file, add --html report.html".to_owned(),
        };
        let human = format!(
            "wrote {}; check it with: theriac-edge privacy verify {0}\n{sheet}",
            path.display()
        );
        output.result(&value, human).map_err(unprinted)?;
    } else {
        output.result(&document, text).map_err(unprinted)?;
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn verify_report<W: Write>(
    arguments: &VerifyArguments,
    output: &mut Output<W>,
) -> Result<ExitCode, Problem> {
    let text = std::fs::read_to_string(&arguments.file).map_err(|error| {
        Problem::failed(
            "TH-E0341",
            format!("cannot read {}: {error}", arguments.file.display()),
        )
        .hint("name the file that `theriac-edge privacy report --output FILE` wrote")
    })?;
    let seals = |seal: &Seal, node: &NodeId| check_seal(seal, node, arguments.log_key.as_ref());
    let trust = Trust {
        policy_key: arguments.policy_key,
        edge_key: arguments.edge_key,
        known: arguments.known,
        seals: &seals,
    };
    let verified = verify(&text, &trust).map_err(|error| match error {
        VerifyError::Format(_) => Problem::failed("TH-E0342", error)
            .hint("name the file that `theriac-edge privacy report --output FILE` wrote; if this is it, it was damaged or changed"),
        error => {
            Problem::failed("TH-E0342", error).hint("keep the file as evidence and ask the site for its ledger")
        }
    })?;
    output.result(&verified, human(&verified)).map_err(unprinted)?;
    Ok(ExitCode::SUCCESS)
}

/// Whether the aggregator's signature holds: with the verifier's key, else with the one that the record names.
fn check_seal(seal: &Seal, node: &NodeId, trusted: Option<&LogPublicKey>) -> SealCheck {
    let signature = (0..seal.signature.len() / 2)
        .map(|byte| seal.signature.get(2 * byte..2 * byte + 2))
        .map(|pair| pair.and_then(|pair| u8::from_str_radix(pair, 16).ok()))
        .collect::<Option<Vec<u8>>>();
    let Some(signature) = signature else {
        return SealCheck::Wrong;
    };
    let message = LedgerSealV1 {
        records: seal.records,
        head: seal.head,
        signed: seal.signed,
        key: seal.key.clone(),
        signature,
    };
    match (trusted, seal.key.parse::<LogPublicKey>()) {
        (Some(key), _) if verify_seal(&message, node, key) => SealCheck::Trusted,
        (None, Ok(named)) if verify_seal(&message, node, &named) => SealCheck::Consistent,
        _ => SealCheck::Wrong,
    }
}

fn human(verified: &Verified) -> String {
    let trusted = |yes: bool, no: &str| {
        if yes {
            "with the key you gave".to_owned()
        } else {
            no.to_owned()
        }
    };
    let Verified {
        node,
        records,
        releases,
        releases_unheld,
        sealed_records,
        epsilon,
        epsilon_pld,
        epsilon_limit,
        epsilon_unit_lifetime,
        delta,
        ..
    } = verified;
    let signer = verified.policy_signer.as_deref().unwrap_or("nobody");
    let unheld = match releases_unheld {
        0 => String::new(),
        unheld => format!(" ({unheld} of an old format are held to no policy: no record holds its text)"),
    };
    format!(
        "every figure follows from the records\n  node         {node}\n  epsilon      {epsilon:.4} of {epsilon_limit} at delta {delta:e} in the \
         period ({epsilon_pld:.4} by PLD), {epsilon_unit_lifetime:.4} ever, for the most charged unit\n  records      {records}, {releases} charges{unheld}\n  policy       signed \
         by {signer}, {}\n  counter-signed {sealed_records} records, {}\n  made by      {}",
        trusted(
            verified.policy_trusted,
            "not held to a key of yours (--policy-key)"
        ),
        trusted(
            verified.seals_trusted,
            "not held to a key of yours (--log-key); what comes after is the node's word"
        ),
        match (&verified.report_signer, verified.report_trusted) {
            (Some(key), true) => format!("{key}, the key you gave"),
            (Some(key), false) => format!("{key}, not held to a key of yours (--edge-key)"),
            (None, _) => "nobody signed it: its time and program version are no evidence".to_owned(),
        },
    )
}

fn write(path: &Path, text: &str) -> Result<(), Problem> {
    std::fs::write(path, text)
        .map_err(|error| Problem::failed("TH-E0341", format!("cannot write {}: {error}", path.display())))
}

fn known_head(text: &str) -> Result<KnownHead, String> {
    let wrong = || "write RECORDS:HEAD, such as 12:9f86d0…".to_owned();
    let (records, head) = text.split_once(':').ok_or_else(wrong)?;
    Ok(KnownHead {
        records: records.parse().map_err(|_| wrong())?,
        head: head.parse().map_err(|_| wrong())?,
    })
}

fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
