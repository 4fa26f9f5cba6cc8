//! `sites`, `rounds`, `models`, `audit`: what the store holds.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;
use serde_json::json;
use theriac_audit::checkpoint::LogPublicKey;
use theriac_audit::leaf::SiteStanding;
use theriac_audit::verify;
use theriac_command::output::{Format, table};
use theriac_command::problem::Problem;
use theriac_privacy::central::CentralLedger;
use theriac_protocol::units::{ModelVersion, NodeId, Round};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::evidence::{RoundShown, ShowArgs, decisions, replay, show_site};
use super::{Common, central_problem, load, open, output_problem, print, store_problem};
use theriac_protocol::message::{GuaranteeUnit, GuaranteeV1};

use crate::audit::{AuditKey, AuditLog, lines};
use crate::evidence::{Record, words};
use crate::serve::ServeError;
use crate::status::{SiteStatus, Standings};
use crate::store::evidence;
use crate::store::history::{self, RoundDetail, RoundRow};
use crate::store::{ledgers, models as stored_models, records as stored, sums};
use crate::validation::Validation;

/// How often `rounds follow` looks.
const FOLLOW_EVERY: Duration = Duration::from_millis(250);
/// Characters of an operator's reason that are kept.
const REASON_MAX: usize = 200;

#[derive(Debug, Subcommand)]
pub(super) enum SitesCommand {
    /// Lists every enrolled site.
    #[command(after_help = "Example: theriac-aggregator sites list --format json")]
    List(Common),
    /// Why a site counts as it does: its last rounds, its trust, the reasons in plain words, and what you can do.
    #[command(after_help = "Example: theriac-aggregator sites show plant-7")]
    Show(ShowArgs),
    /// Keeps a site out until it is resumed; its open connection is closed within a second.
    #[command(after_help = "Example: theriac-aggregator sites suspend plant-7 --reason 'odd updates'")]
    Suspend(SiteArgs),
    /// Lets a suspended site take part again.
    #[command(after_help = "Example: theriac-aggregator sites resume plant-7")]
    Resume(SiteArgs),
    /// Never takes this site's key again; it can only be enrolled anew with another key.
    #[command(after_help = "Example: theriac-aggregator sites revoke plant-7 --reason 'disk stolen'")]
    Revoke(SiteArgs),
    /// Adds what a site released in earlier rounds no more, from the next round on; what it sends from then on counts as ever.
    #[command(
        after_help = "Example: theriac-aggregator sites forget plant-7 --reason 'fed with test data until May'"
    )]
    Forget(SiteArgs),
    /// Takes the privacy ledger that a site began anew under another key, which `privacy_floor.ledger_continuity` keeps out.
    #[command(after_help = "Example: theriac-aggregator sites allow-ledger plant-7 --reason 'host replaced'")]
    AllowLedger(SiteArgs),
}

#[derive(Debug, clap::Args)]
pub(super) struct SiteArgs {
    #[command(flatten)]
    common: Common,
    /// Name of the site.
    name: NodeId,
    /// Why, for the audit log; at most 200 characters.
    #[arg(long, default_value = "")]
    reason: String,
}

pub(super) fn sites(command: SitesCommand) -> Result<ExitCode, Problem> {
    let (args, state) = match command {
        SitesCommand::List(common) => return list_sites(&common),
        SitesCommand::Show(args) => return show_site(&args),
        SitesCommand::Suspend(args) => (args, SiteStanding::Suspended),
        SitesCommand::Resume(args) => (args, SiteStanding::Active),
        SitesCommand::Revoke(args) => (args, SiteStanding::Revoked),
        SitesCommand::Forget(args) => return forget_site(&args),
        SitesCommand::AllowLedger(args) => return allow_ledger(&args),
    };
    let (_, mut database) = open(&load(&args.common.config)?)?;
    let reason: String = args.reason.chars().take(REASON_MAX).collect();
    database
        .write(|work| stored::set_standing(work, &args.name, state, &reason))
        .map_err(|error| store_problem(&error))?;
    let word = crate::store::word(state);
    let value = json!({ "site": args.name.as_str(), "state": word });
    print(
        args.common.format,
        &value,
        format!("{} is {word}; a running server knows within a second", args.name),
    )?;
    Ok(ExitCode::SUCCESS)
}

fn forget_site(args: &SiteArgs) -> Result<ExitCode, Problem> {
    let (_, mut database) = open(&load(&args.common.config)?)?;
    let reason: String = args.reason.chars().take(REASON_MAX).collect();
    let dropped = database
        .write(|work| sums::forget_site(work, &args.name, &reason))
        .map_err(|error| store_problem(&error))?;
    let value = json!({ "site": args.name.as_str(), "dropped": dropped });
    let human = format!(
        "{dropped} earlier releases of {} count no more, from the next round on",
        args.name
    );
    print(args.common.format, &value, human)?;
    Ok(ExitCode::SUCCESS)
}

fn allow_ledger(args: &SiteArgs) -> Result<ExitCode, Problem> {
    let (_, mut database) = open(&load(&args.common.config)?)?;
    let reason: String = args.reason.chars().take(REASON_MAX).collect();
    database
        .write(|work| ledgers::allow(work, &args.name, &reason))
        .map_err(|error| store_problem(&error))?;
    let value = json!({ "site": args.name.as_str(), "ledger": "allowed" });
    let human = format!(
        "{}'s new ledger is taken; a running server knows within a second",
        args.name
    );
    print(args.common.format, &value, human)?;
    Ok(ExitCode::SUCCESS)
}

fn list_sites(common: &Common) -> Result<ExitCode, Problem> {
    let (_, database) = open(&load(&common.config)?)?;
    let rows = stored::sites(database.read()).map_err(|error| store_problem(&error))?;
    let standings = Standings::read(database.read()).map_err(|error| store_problem(&error))?;
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            vec![
                row.node.to_string(),
                crate::store::word(row.state),
                standings.word(&row.node),
                rfc3339(row.enrolled.0),
                row.accepted.to_string(),
                row.refusals.values().sum::<u64>().to_string(),
                row.epsilon
                    .map_or_else(|| "-".to_owned(), |epsilon| format!("{epsilon:.3}")),
                row.guarantee.as_ref().map_or_else(|| "-".to_owned(), promise),
                row.ledger.records.to_string(),
                row.last_verdict.clone().unwrap_or_default(),
                reasons(&row.refusals),
            ]
        })
        .collect();
    // The store does not know who is connected; `status` asks the server.
    let values: Vec<serde_json::Value> = rows
        .into_iter()
        .map(|row| {
            let mut value = json!(SiteStatus::new(row, false).with_standing(&standings));
            if let Some(fields) = value.as_object_mut() {
                fields.remove("connected");
            }
            value
        })
        .collect();
    let header = [
        "site",
        "state",
        "standing",
        "enrolled",
        "accepted",
        "refused",
        "epsilon",
        "guarantee",
        "sealed",
        "gate",
        "refused for",
    ];
    print(common.format, &values, table(&header, &cells))?;
    Ok(ExitCode::SUCCESS)
}

/// A declared guarantee in a cell: `4@1e-6/block 1h/rolling`.
fn promise(declared: &GuaranteeV1) -> String {
    let unit = match declared.unit {
        GuaranteeUnit::Block => {
            let span = std::time::Duration::from_millis(declared.block_ms);
            format!("block {}", humantime::format_duration(span))
        }
        GuaranteeUnit::Record => "record".to_owned(),
    };
    format!(
        "{}@{:e}/{unit}/{}",
        declared.epsilon,
        declared.delta.value(),
        declared.period
    )
}

/// Refusals by reason, the most frequent first.
fn reasons(refusals: &BTreeMap<String, u64>) -> String {
    let mut reasons: Vec<_> = refusals.iter().collect();
    reasons.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let said: Vec<String> = reasons
        .iter()
        .map(|(reason, count)| format!("{reason} ×{count}"))
        .collect();
    said.join(", ")
}

#[derive(Debug, Subcommand)]
pub(super) enum RoundsCommand {
    /// Lists rounds, newest first.
    #[command(after_help = "Example: theriac-aggregator rounds list --limit 20")]
    List {
        #[command(flatten)]
        common: Common,
        /// How many.
        #[arg(long, default_value_t = 50)]
        limit: u32,
    },
    /// One round: its terms and what it decided about each edge.
    #[command(after_help = "Example: theriac-aggregator rounds show 12 --format json")]
    Show {
        #[command(flatten)]
        common: Common,
        /// Number of the round.
        round: u64,
    },
    /// Does a past round again from what is stored and compares every bit. Exit code 0: the same; 1: not; 3: it cannot be done.
    #[command(after_help = "Example: theriac-aggregator rounds replay 12")]
    Replay {
        #[command(flatten)]
        common: Common,
        /// Number of the round.
        round: u64,
    },
    /// Prints each round as it ends.
    #[command(after_help = "Example: theriac-aggregator rounds follow --count 3")]
    Follow {
        #[command(flatten)]
        common: Common,
        /// Ends after this many; default: never.
        #[arg(long)]
        count: Option<u64>,
    },
}

pub(super) fn rounds(command: RoundsCommand) -> Result<ExitCode, Problem> {
    match command {
        RoundsCommand::List { common, limit } => {
            let (_, database) = open(&load(&common.config)?)?;
            let rows = history::list(database.read(), limit).map_err(|error| store_problem(&error))?;
            let header = [
                "round", "outcome", "base", "rule", "accepted", "refused", "declined", "opened",
            ];
            let cells: Vec<Vec<String>> = rows.iter().map(cells).collect();
            print(common.format, &rows, table(&header, &cells))?;
        }
        RoundsCommand::Show { common, round } => {
            let (dir, database) = open(&load(&common.config)?)?;
            let mut detail =
                history::detail(database.read(), Round(round)).map_err(|error| store_problem(&error))?;
            let ledger = dir.central_ledger();
            if ledger.exists() {
                detail.central_noise = CentralLedger::charges_of(&ledger, Round(round))
                    .map_err(|error| central_problem(&error))?;
            }
            let decisions =
                evidence::of_round(database.read(), Round(round)).map_err(|error| store_problem(&error))?;
            let plan =
                evidence::plan(database.read(), Round(round)).map_err(|error| store_problem(&error))?;
            let validated = crate::store::validation::of_round(database.read(), Round(round));
            let validated = validated.map_err(|error| store_problem(&error))?;
            let validation = validated.map(|recorded| recorded.validation);
            let human = shown(&detail, validation.as_ref(), &decisions);
            let value = RoundShown {
                detail,
                plan,
                validation,
                decisions,
            };
            print(common.format, &value, human)?;
        }
        RoundsCommand::Replay { common, round } => return replay(&common, round),
        RoundsCommand::Follow { common, count } => follow(&common, count)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// One round for people.
fn shown(detail: &RoundDetail, validation: Option<&Validation>, records: &[Record]) -> String {
    format!(
        "round {}: {}\n{}{}{}{}\n\n{}",
        detail.round.round,
        outcome(&detail.round),
        terms(detail),
        central(detail),
        words::all_behind(records).map_or_else(String::new, |said| format!("\n  behind the model: {said}")),
        validation.map_or_else(String::new, |validation| format!(
            "\n  validation: {}",
            validation.words()
        )),
        match records {
            // Not closed yet, or closed too long ago: what the round's own rows say.
            [] => so_far(detail),
            records => decisions(records),
        }
    )
}

/// What the centre added to this round, as a line under the terms.
fn central(detail: &RoundDetail) -> String {
    detail.central_noise.map_or_else(String::new, |noise| {
        format!(
            "\n  central noise: sigma {}, clip norm {}, sampling rate {}, charged {} times; private for each whole site against everybody \
             but this aggregator, which must be trusted",
            noise.noise_multiplier, noise.clip_norm, noise.sampling_rate, noise.charges
        )
    })
}

fn so_far(detail: &RoundDetail) -> String {
    let header = ["site", "norm", "distance", "trimmed", "bytes", "leaf"];
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"));
    let uploads: Vec<Vec<String>> = detail
        .uploads
        .iter()
        .map(|upload| {
            vec![
                upload.node.clone(),
                number(Some(upload.norm)),
                number(upload.distance),
                number(upload.trimmed_share),
                upload.bytes.to_string(),
                upload.leaf_index.to_string(),
            ]
        })
        .collect();
    let said = |what: &str, reasons: &BTreeMap<String, String>| -> String {
        let lines = reasons
            .iter()
            .map(|(node, reason)| format!("\n{node} {what}: {reason}"));
        lines.collect()
    };
    format!(
        "{}{}{}\n{}",
        table(&header, &uploads),
        said("declined", &detail.declines),
        said("was refused", &detail.refusals),
        decisions(&[])
    )
}

/// The terms as announced, in words.
fn terms(detail: &RoundDetail) -> String {
    let RoundRow {
        rule,
        byzantine,
        quorum,
        base_version,
        ..
    } = &detail.round;
    let term = |name: &str| match &detail.terms[name] {
        serde_json::Value::String(text) => text.to_lowercase(),
        serde_json::Value::Null => "-".to_owned(),
        other => other.to_string(),
    };
    format!(
        "  terms  {} of {} values on model {base_version}, {rule} f={byzantine}, quorum {quorum}, deadline {} s\n         \
         clip norm {}, noise multiplier {}, {} to {} blocks of {} rows",
        term("kind"),
        term("values"),
        detail.terms["deadline_ms"].as_f64().unwrap_or_default() / 1_000.0,
        term("clip_norm"),
        term("noise_multiplier"),
        term("blocks_min"),
        term("blocks_max"),
        term("block_rows"),
    )
}

fn follow(common: &Common, count: Option<u64>) -> Result<(), Problem> {
    let (_, database) = open(&load(&common.config)?)?;
    let latest = |limit| history::list(database.read(), limit).map_err(|error| store_problem(&error));
    let mut told = latest(2)?
        .iter()
        .filter(|row| row.ended_unix_ms.is_some())
        .map(|row| row.round)
        .max()
        .unwrap_or(0);
    let mut left = count;
    while left != Some(0) {
        let mut ended: Vec<RoundRow> = latest(100)?
            .into_iter()
            .filter(|row| row.ended_unix_ms.is_some() && row.round > told)
            .collect();
        ended.reverse();
        for row in ended {
            told = row.round;
            print(
                common.format,
                &row,
                format!("round {}: {}", row.round, outcome(&row)),
            )?;
            left = left.map(|left| left.saturating_sub(1));
            if left == Some(0) {
                return Ok(());
            }
        }
        std::thread::sleep(FOLLOW_EVERY);
    }
    Ok(())
}

fn cells(row: &RoundRow) -> Vec<String> {
    vec![
        row.round.to_string(),
        outcome(row),
        row.base_version.to_string(),
        format!("{} f={}", row.rule, row.byzantine),
        row.accepted.to_string(),
        row.refused.to_string(),
        row.declined.to_string(),
        rfc3339(row.opened_unix_ms),
    ]
}

fn outcome(row: &RoundRow) -> String {
    match (row.published, &row.abort_reason) {
        (Some(version), _) => format!("published model {version}"),
        (None, Some(reason)) => format!("aborted: {reason}"),
        (None, None) => row.state.clone(),
    }
}

#[derive(Debug, Subcommand)]
pub(super) enum ModelsCommand {
    /// Lists models, newest first; the first one is in force.
    #[command(after_help = "Example: theriac-aggregator models list --limit 10")]
    List {
        #[command(flatten)]
        common: Common,
        /// How many.
        #[arg(long, default_value_t = 50)]
        limit: u32,
    },
    /// Releases an older model again, under a new version. A round that is open ends without a model.
    #[command(after_help = "Example: theriac-aggregator models rollback 41")]
    Rollback {
        #[command(flatten)]
        common: Common,
        /// The version to go back to.
        #[arg(value_name = "VERSION")]
        back_to: u64,
    },
}

pub(super) fn models(command: ModelsCommand) -> Result<ExitCode, Problem> {
    match command {
        ModelsCommand::List { common, limit } => {
            let (_, database) = open(&load(&common.config)?)?;
            let rows =
                stored_models::models(database.read(), limit).map_err(|error| store_problem(&error))?;
            let cells: Vec<Vec<String>> = rows
                .iter()
                .map(|row| {
                    vec![
                        row.version.to_string(),
                        row.round.to_string(),
                        row.rule.clone(),
                        row.contributors.to_string(),
                        row.digest.short(),
                        rfc3339(row.released.0),
                    ]
                })
                .collect();
            let values: Vec<_> = rows
                .iter()
                .map(|row| {
                    json!({
                        "version": row.version.0, "round": row.round.0, "rule": row.rule,
                        "contributors": row.contributors, "digest": row.digest.to_string(), "values": row.values,
                        "rolled_back_to": row.rolled_back_to.map(|version| version.0),
                        "released_unix_ms": row.released.0,
                    })
                })
                .collect();
            let header = ["version", "round", "rule", "updates", "digest", "released"];
            print(common.format, &values, table(&header, &cells))?;
        }
        ModelsCommand::Rollback {
            common,
            back_to: version,
        } => {
            let (_, mut database) = open(&load(&common.config)?)?;
            let blobs = std::sync::Arc::clone(database.blobs());
            let row = database
                .write(|work| stored_models::roll_back(work, &blobs, ModelVersion(version)))
                .map_err(|error| store_problem(&error))?;
            let value = json!({ "version": row.version.0, "rolled_back_to": version, "digest": row.digest.to_string() });
            let human = format!(
                "version {} is in force now and repeats version {version}",
                row.version
            );
            print(common.format, &value, human)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Subcommand)]
pub(super) enum AuditCommand {
    /// Writes the log with its signed head, and prints the public key that verifies it.
    #[command(after_help = "Example: theriac-aggregator audit export --output log.txt")]
    Export {
        #[command(flatten)]
        common: Common,
        /// The file.
        #[arg(long)]
        output: PathBuf,
    },
    /// Checks an exported log offline, with the public key alone.
    #[command(
        after_help = "Example: theriac-aggregator audit verify log.txt --key 'theriac/plant+5b2e1d5f+AbC…'"
    )]
    Verify {
        /// The exported file.
        file: PathBuf,
        /// The public key that `audit export` printed.
        #[arg(long)]
        key: String,
        /// `human`, or `json` for programs.
        #[arg(long, default_value = "human")]
        format: Format,
    },
}

pub(super) fn audit(command: AuditCommand) -> Result<ExitCode, Problem> {
    match command {
        AuditCommand::Export { common, output } => {
            let config = load(&common.config)?;
            let (dir, database) = open(&config)?;
            let key = AuditKey::load(&dir.audit_key(), &config.federation)
                .map_err(|error| ServeError::from(error).problem())?;
            let log = AuditLog::load(database.read()).map_err(|error| store_problem(&error))?;
            let head = log.signed_head(&key);
            let lines = lines(database.read()).map_err(|error| store_problem(&error))?;
            let size = usize::try_from(head.size()).unwrap_or(usize::MAX);
            // A server that runs may have appended since the head was signed.
            let text = verify::export(
                &key.log_key().public(),
                lines.iter().take(size).map(String::as_str),
                &head,
            );
            let written = File::create(&output).and_then(|mut file| file.write_all(text.as_bytes()));
            written.map_err(|error| output_problem(&error))?;
            let public = key.log_key().public().to_string();
            let value = json!({ "file": output, "records": head.size(), "root": head.root().to_string(), "key": public });
            let human = format!("{} records in {}\nkey {public}", head.size(), output.display());
            print(common.format, &value, human)?;
            Ok(ExitCode::SUCCESS)
        }
        AuditCommand::Verify { file, key, format } => {
            let key: LogPublicKey = key.parse().map_err(|error| {
                Problem::usage("TH-E0713", format!("`{key}` is no public key of a log: {error}"))
                    .hint("use the line that `audit export` printed")
            })?;
            let open = File::open(&file).map_err(|error| {
                Problem::failed("TH-E0714", format!("cannot read {}: {error}", file.display()))
            })?;
            let verified = verify::verify(BufReader::new(open), &key, &[]).map_err(|error| {
                Problem::failed("TH-E0715", format!("{}: {error}", file.display()))
                    .hint("the file was changed, or it was made by another federation")
            })?;
            let value = json!({ "file": file, "records": verified.size, "root": verified.root.to_string() });
            print(
                format,
                &value,
                format!("{}: every record is as it was signed", file.display()),
            )?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// A wall-clock time for people.
pub(super) fn rfc3339(unix_ms: u64) -> String {
    let time = OffsetDateTime::from_unix_timestamp_nanos(i128::from(unix_ms / 1_000) * 1_000_000_000);
    time.ok()
        .and_then(|time| time.format(&Rfc3339).ok())
        .unwrap_or_else(|| unix_ms.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_listed_with_the_most_frequent_first() {
        let refusals = BTreeMap::from([("busy".to_owned(), 1), ("non_finite".to_owned(), 4)]);
        assert_eq!(reasons(&refusals), "non_finite ×4, busy ×1");
        assert_eq!(reasons(&BTreeMap::new()), "");
    }

    #[test]
    fn a_round_is_shown_with_its_terms_and_every_verdict() {
        let detail = RoundDetail {
            round: RoundRow {
                round: 12,
                state: "published".into(),
                abort_reason: None,
                base_version: 7,
                published: Some(8),
                rule: "trimmed_mean".into(),
                byzantine: 1,
                quorum: 3,
                accepted: 0,
                refused: 1,
                declined: 1,
                opened_unix_ms: 0,
                ended_unix_ms: Some(1),
            },
            terms: json!({
                "kind": "Moments", "values": 240, "clip_norm": 1.5, "noise_multiplier": 0.7, "blocks_min": 2,
                "blocks_max": 60, "block_rows": 60, "deadline_ms": 90_000,
            }),
            uploads: Vec::new(),
            declines: BTreeMap::from([("a".into(), "budget_spent".into())]),
            refusals: BTreeMap::from([("b".into(), "non_finite".into())]),
            central_noise: Some(theriac_privacy::central::CentralRound {
                round: 12,
                charges: 2,
                noise_multiplier: 3.0,
                sampling_rate: 0.5,
                clip_norm: 1.5,
            }),
        };
        let said = shown(&detail, None, &[]);
        for wanted in [
            "round 12: published model 8",
            "moments of 240 values on model 7, trimmed_mean f=1, quorum 3, deadline 90 s",
            "clip norm 1.5, noise multiplier 0.7, 2 to 60 blocks of 60 rows",
            "a declined: budget_spent",
            "b was refused: non_finite",
        ] {
            assert!(said.contains(wanted), "{wanted} is not in\n{said}");
        }
    }
}
