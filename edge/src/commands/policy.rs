//! `policy check`, `sign`, `replay`, and the stop switch: `stop-healing`, `resume-healing`.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use theriac_command::output::{Output, table};
use theriac_command::problem::Problem;
use theriac_heal::policy::evaluate::{self, RulingRecord};
use theriac_heal::policy::{HealPolicy, NodeBudget};
use theriac_heal::standing::Reinstated;
use theriac_privacy::policy::signed::{PolicyPublicKey, Subject, signature_path};

use super::{ConfigArguments, privacy, unprinted};
use crate::config::EdgeConfig;
use crate::healing_policy::{self, HealingPolicyError};
use crate::respond;
use crate::run::EdgeError;
use crate::state_dir::{StateDir, is_no_room, write_durably};
use crate::store::{StoreError, StoreReader};
use crate::warnings;

#[derive(Debug, Subcommand)]
pub(super) enum PolicyCommand {
    /// Checks the policy of healing that the configuration names, with its signatures, exactly as `run` does.
    #[command(after_help = "Example:\n  theriac-edge policy check --config edge.toml")]
    Check {
        #[command(flatten)]
        config: ConfigArguments,
    },
    /// Adds a signature to a policy of healing that holds under this configuration.
    #[command(
        after_help = "Example:\n  theriac-edge policy sign healing.toml --key operator.key --config edge.toml"
    )]
    Sign(SignArguments),
    /// Asks the policy again about every ruling in a log, and tells where it says something else; exit code 1 then.
    #[command(
        after_help = "Example:\n  theriac-edge policy replay --config edge.toml --rulings rulings.jsonl"
    )]
    Replay(ReplayArguments),
    /// Tells what came of each action on each service, and whether that suffices for `require_evidence`.
    #[command(after_help = "Example:\n  theriac-edge policy evidence --config edge.toml")]
    Evidence {
        #[command(flatten)]
        config: ConfigArguments,
    },
}

#[derive(Debug, Args)]
pub(super) struct SignArguments {
    /// The policy.
    file: PathBuf,
    /// Private key of `privacy keygen`.
    #[arg(long)]
    key: PathBuf,
    #[command(flatten)]
    config: ConfigArguments,
}

#[derive(Debug, Args)]
pub(super) struct ReplayArguments {
    /// The log of rulings; default: `rulings.jsonl` in the state directory, after the full one before it, `rulings.1.jsonl`, where it is there.
    #[arg(long, value_name = "FILE")]
    rulings: Option<PathBuf>,
    /// A head that an earlier replay printed: the log must still hold that line.
    #[arg(long)]
    head: Option<String>,
    #[command(flatten)]
    config: ConfigArguments,
}

pub(super) fn policy<W: Write>(command: PolicyCommand, output: &mut Output<W>) -> Result<ExitCode, Problem> {
    match command {
        PolicyCommand::Check { config } => check(&config, output),
        PolicyCommand::Sign(arguments) => sign(&arguments, output),
        PolicyCommand::Replay(arguments) => replay(&arguments, output),
        PolicyCommand::Evidence { config } => evidence(&config, output),
    }
}

/// `stop-healing` and `resume-healing`.
pub(super) fn switch<W: Write>(
    config: &ConfigArguments,
    stop: bool,
    output: &mut Output<W>,
) -> Result<ExitCode, Problem> {
    let dir = StateDir::existing(&config.load()?.state_dir.path);
    let path = dir.stop_file();
    let done = if stop {
        write_durably(&path, b"stopped by a person\n").or_else(|error| {
            // That it is there is what counts, and an empty file has room on a full disk.
            let bare = || std::fs::File::create(&path)?.sync_all();
            if is_no_room(&error) { bare() } else { Err(error) }
        })
    } else {
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    };
    done.map_err(|error| {
        Problem::failed("TH-E0372", format!("cannot change {}: {error}", path.display())).hint(
            "it lies in the state directory of the edge; give --config or --state-dir, and run as its user",
        )
    })?;
    let word = if stop { "stopped" } else { "resumed" };
    let value = serde_json::json!({ "healing": word, "file": path });
    let human = if stop {
        "healing is stopped: no new action is begun; watching goes on; `theriac-edge resume-healing` ends it"
    } else {
        "healing goes on"
    };
    output.result(&value, human).map_err(unprinted)?;
    Ok(ExitCode::SUCCESS)
}

fn check<W: Write>(arguments: &ConfigArguments, output: &mut Output<W>) -> Result<ExitCode, Problem> {
    let mut config = arguments.load()?;
    let loaded = healing_policy::apply(&mut config).map_err(refused)?;
    let digest = digest(&config);
    if let Some(loaded) = &loaded {
        healing_policy::check_version(loaded, &StateDir::existing(&config.state_dir.path))
            .map_err(refused)?;
    }
    let Some(loaded) = loaded else {
        let value = serde_json::json!({ "file": null, "digest": digest, "warnings": [] });
        let place = arguments.config.as_ref().map_or_else(
            || "no configuration was read (give --config)".to_owned(),
            |path| format!("{} names no policy file", path.display()),
        );
        let human =
            format!("{place}: [healing] as it stands there holds, or its defaults\n  digest   {digest}");
        output.result(&value, human).map_err(unprinted)?;
        return Ok(ExitCode::SUCCESS);
    };
    let signers: Vec<String> = loaded.signers.iter().map(ToString::to_string).collect();
    let joined = StateDir::existing(&config.state_dir.path)
        .joined()
        .map_err(EdgeError::from)?
        .is_some();
    let warnings: Vec<String> = config
        .services
        .iter()
        .flat_map(|service| warnings::of_policy(service, joined))
        .collect();
    let value = serde_json::json!({
        "file": loaded.path, "version": loaded.version, "signers": signers, "digest": digest, "warnings": warnings,
    });
    let mut human = format!(
        "{} holds\n  version  {}\n  signers  {}\n  digest   {digest}",
        loaded.path.display(),
        loaded.version,
        signers.join(", ")
    );
    for warning in &warnings {
        human.push_str("\n  but      ");
        human.push_str(warning);
    }
    output.result(&value, human).map_err(unprinted)?;
    Ok(ExitCode::SUCCESS)
}

fn sign<W: Write>(arguments: &SignArguments, output: &mut Output<W>) -> Result<ExitCode, Problem> {
    let config = arguments.config.load()?;
    let (path, text) = (
        &arguments.file,
        healing_policy::read(&arguments.file).map_err(refused)?,
    );
    // What cannot be used is not signed.
    let file = healing_policy::parse(path, &text).map_err(refused)?;
    let mut policies = of_services(&config);
    healing_policy::lay(path, &file, &mut policies, config.healing_budget).map_err(refused)?;
    let key = privacy::read_key(&arguments.key)?;
    // Signatures over an older text say nothing about this one.
    let mut signatures = healing_policy::signatures(path).map_err(refused)?;
    signatures
        .retain(|old| old.key != key.public() && old.verify_text(Subject::Healing, &text, old.key).is_ok());
    signatures.push(key.sign_text(Subject::Healing, &text));
    let all: String = signatures.iter().map(ToString::to_string).collect();
    let beside = signature_path(path);
    write_durably(&beside, all.as_bytes()).map_err(|source| {
        refused(HealingPolicyError::Read {
            path: beside.clone(),
            source,
        })
    })?;
    let pinned = &config.healing_policy.keys;
    let counts = |key: &PolicyPublicKey| pinned.contains(key);
    let counting = signatures.iter().filter(|by| counts(&by.key)).count();
    let value = serde_json::json!({
        "file": path, "signature": beside, "signer": key.public().to_string(), "signatures": signatures.len(),
        "counting": counting, "need": config.healing_policy.need,
    });
    let mut human = format!(
        "{} is signed by {} ({} signatures, {counting} of {} needed count)",
        path.display(),
        key.public(),
        signatures.len(),
        config.healing_policy.need,
    );
    if !counts(&key.public()) {
        human.push_str("\nThis key is not named in healing_policy.keys of the configuration, so its signature does not count there.");
    }
    output.result(&value, human).map_err(unprinted)?;
    Ok(ExitCode::SUCCESS)
}

/// What a replay found.
#[derive(Debug, Default, PartialEq, Eq)]
struct Replayed {
    same: u64,
    /// Made under other policies.
    other_policy: u64,
    /// What differs, in words.
    different: Vec<String>,
    /// Where a line is missing or was changed, in words.
    broken: Vec<String>,
    /// Lines that name none before them: the first of all, and those of builds that did not chain them.
    unchained: u64,
    /// Lines that tell of what people lifted.
    reinstated: u64,
    /// Digest of the line before the first one, which is not here.
    continues: Option<String>,
    /// Digest of each line, in order.
    heads: Vec<String>,
}

fn replay<W: Write>(arguments: &ReplayArguments, output: &mut Output<W>) -> Result<ExitCode, Problem> {
    let mut config = arguments.config.load()?;
    healing_policy::apply(&mut config).map_err(refused)?;
    let path = arguments
        .rulings
        .clone()
        .unwrap_or_else(|| StateDir::existing(&config.state_dir.path).rulings());
    let read = |path: &Path| std::fs::read_to_string(path).map_err(|error| unreadable(path, &error));
    let older =
        Some(healing_policy::older(&path)).filter(|older| arguments.rulings.is_none() && older.exists());
    let text = older.as_deref().map_or_else(|| Ok(String::new()), read)? + &read(&path)?;
    let policies = respond::policies(of_services(&config));
    let mut found = replayed(&text, &policies, config.healing_budget, &digest(&config))
        .map_err(|error| unreadable(&path, &error))?;
    if arguments.rulings.is_none() && older.is_none() {
        found.is_whole_log();
    }
    if let Some(head) = &arguments.head {
        found.holds(head);
    }
    let head = found.heads.last().cloned();
    let value = serde_json::json!({
        "same": found.same, "other_policy": found.other_policy, "different": found.different,
        "broken": found.broken, "unchained": found.unchained, "continues": found.continues, "head": head,
        "reinstated": found.reinstated,
    });
    let mut human = format!(
        "{} rulings are the same, {} differ, {} were made under other policies",
        found.same,
        found.different.len(),
        found.other_policy
    );
    if found.reinstated > 0 {
        let words = format!(
            "\n{} lines tell that people reinstated a service",
            found.reinstated
        );
        human.push_str(&words);
    }
    if let Some(continues) = &found.continues {
        let words = format!("\nthe first line continues {continues}: what was before it is not here");
        human.push_str(&words);
    }
    if found.unchained > 1 {
        let words = format!(
            "\n{} of {} lines name none before them, as builds before lines were chained wrote them: nothing vouches for their number, \
             order or words",
            found.unchained,
            found.heads.len()
        );
        human.push_str(&words);
    }
    if let Some(head) = &head {
        let words = format!("\nhead {head}: note it, and give it with --head the next time");
        human.push_str(&words);
    }
    for different in found.different.iter().chain(&found.broken) {
        human.push('\n');
        human.push_str(different);
    }
    output.result(&value, human).map_err(unprinted)?;
    Ok(if found.different.is_empty() && found.broken.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

impl Replayed {
    /// The log was never full, so nothing can have been before its first line.
    fn is_whole_log(&mut self) {
        if self.continues.is_some() {
            self.broken
                .push("the first line follows another one: lines at the beginning are missing".to_owned());
        }
    }

    /// The line with this digest must be here, or be the one that the first line continues.
    fn holds(&mut self, head: &str) {
        if !self.heads.iter().any(|of| of == head) && self.continues.as_deref() != Some(head) {
            self.broken.push(format!(
                "no line has the digest {head}: lines at the end are missing, or it is in a file before this one"
            ));
        }
    }
}

fn replayed(
    text: &str,
    policies: &BTreeMap<String, HealPolicy>,
    node: NodeBudget,
    digest: &str,
) -> Result<Replayed, String> {
    let mut found = Replayed::default();
    for (at, line) in text.lines().enumerate() {
        let unreadable = |error: serde_json::Error| format!("line {}: {error}", at + 1);
        let (record, previous) = if let Some(told) = of_people(line) {
            (None, told.map_err(unreadable)?.previous)
        } else {
            let record: RulingRecord = serde_json::from_str(line).map_err(unreadable)?;
            let previous = record.previous.clone();
            (Some(record), previous)
        };
        match found.heads.last() {
            // The first line of a file names one in the file before it.
            None => found.continues = Some(previous.clone()).filter(|previous| !previous.is_empty()),
            Some(before) if *before == previous => {}
            Some(_) if previous.is_empty() && found.unchained == at as u64 => {}
            Some(_) => found.broken.push(format!(
                "line {} does not follow the one before it: a line between them is missing, or that one was changed",
                at + 1
            )),
        }
        found.unchained += u64::from(previous.is_empty());
        found.heads.push(evaluate::line_digest(line.as_bytes()));
        let Some(record) = record else {
            found.reinstated += 1;
            continue;
        };
        let Some(policy) = policies
            .get(&record.facts.service)
            .filter(|_| record.policy == digest)
        else {
            found.other_policy += 1;
            continue;
        };
        let says = evaluate::evaluate(policy, node, &record.facts);
        if says == record.ruling {
            found.same += 1;
        } else {
            found.different.push(format!(
                "line {}: incident {} of {}, {}: the log says {:?}, the policy {says:?}",
                at + 1,
                record.facts.incident,
                record.facts.service,
                record.facts.action,
                record.ruling
            ));
        }
    }
    Ok(found)
}

/// A line that tells what people lifted; `None` for a ruling.
fn of_people(line: &str) -> Option<serde_json::Result<Reinstated>> {
    let written: serde_json::Map<String, serde_json::Value> = serde_json::from_str(line).ok()?;
    written.contains_key("lifted").then(|| serde_json::from_str(line))
}

/// What is on record of each action.
fn evidence<W: Write>(config: &ConfigArguments, output: &mut Output<W>) -> Result<ExitCode, Problem> {
    let database = StateDir::existing(&config.load()?.state_dir.path).database();
    let failed = |error: StoreError| Problem::from(EdgeError::from(error));
    let state = StoreReader::open(&database)
        .and_then(|reader| reader.map_or(Ok(None), |reader| reader.machine()))
        .map_err(failed)?
        .unwrap_or_default();
    let rows: Vec<Vec<String>> = state
        .evidence
        .iter()
        .map(|of| {
            vec![
                of.service.clone(),
                of.action.to_string(),
                of.counts.right.to_string(),
                of.counts.wrong.to_string(),
                of.counts.harm.to_string(),
                format!("{:.3}", of.counts.lower()),
                if of.counts.suffice() { "yes" } else { "no" }.to_owned(),
            ]
        })
        .collect();
    let header = [
        "service",
        "action",
        "right",
        "wrong",
        "harm",
        "lower 95 % bound",
        "suffices",
    ];
    let human = if rows.is_empty() {
        "nothing is on record yet".to_owned()
    } else {
        table(&header, &rows)
    };
    output.result(&state.evidence, human).map_err(unprinted)?;
    Ok(ExitCode::SUCCESS)
}

fn of_services(config: &EdgeConfig) -> BTreeMap<String, HealPolicy> {
    config
        .services
        .iter()
        .map(|service| (service.name.to_string(), service.healing.clone()))
        .collect()
}

fn digest(config: &EdgeConfig) -> String {
    evaluate::digest(
        respond::policies(of_services(config)).iter(),
        config.healing_budget,
    )
}

pub(super) fn refused(error: HealingPolicyError) -> Problem {
    let hint = match &error {
        HealingPolicyError::Form(form) => form.hint(),
        _ => "docs/healing.md explains every key and who signs".to_owned(),
    };
    Problem::config("TH-E0370", error).hint(hint)
}

fn unreadable(path: &Path, error: &dyn std::fmt::Display) -> Problem {
    Problem::failed("TH-E0371", format!("{}: {error}", path.display()))
        .hint("give the rulings.jsonl of the edge's state directory with --rulings; a line that was cut or edited is no ruling")
}

#[cfg(test)]
mod tests {
    use theriac_heal::budget::Charge;
    use theriac_heal::policy::evaluate::{Facts, Ruling};
    use theriac_heal::types::{ActionKind, FaultClass, RestartHelps};

    use super::*;

    fn facts(charges: usize) -> Facts {
        let charge = |at: usize| Charge {
            service: "kv".to_owned(),
            action: ActionKind::Start,
            at_ms: at as u64 * 60_000,
        };
        Facts {
            incident: 1,
            service: "kv".to_owned(),
            action: ActionKind::Restart,
            class: FaultClass::Hang,
            certainty: 0.9,
            restart_helps: RestartHelps::Yes,
            risk: Some(0.2),
            answers: false,
            actions_of_service: 0,
            actions_of_node: 0,
            charges: (0..charges).map(charge).collect(),
            healed_before: 0,
            demoted: false,
            breaker: None,
            fleet: None,
            halted: false,
            approved: false,
            approved_by: std::collections::BTreeSet::new(),
            evidence: theriac_heal::evidence::Counts::default(),
            now_ms: 900_000,
        }
    }

    #[test]
    fn a_log_replays_to_its_rulings_and_an_edited_one_does_not() {
        let policies = BTreeMap::from([("kv".to_owned(), HealPolicy::default())]);
        let (node, digest) = (NodeBudget::default(), "d".to_owned());
        let line = |facts: Facts, policy: &str| {
            let ruling = evaluate::evaluate(&policies["kv"], node, &facts);
            let record = RulingRecord {
                unix_ms: 1,
                policy: policy.to_owned(),
                facts,
                ruling,
                propensity: evaluate::CERTAIN,
                previous: String::new(),
            };
            serde_json::to_string(&record).unwrap() + "\n"
        };
        // Recommended, then the service's budget of six is spent, then under another policy.
        let log = line(facts(0), "d") + &line(facts(6), "d") + &line(facts(0), "e");
        let found = replayed(&log, &policies, node, &digest).unwrap();
        assert_eq!((found.same, found.other_policy, found.different.len()), (2, 1, 0));
        let edited = log.replacen("need_approval", "act", 1);
        let found = replayed(&edited, &policies, node, &digest).unwrap();
        assert_eq!((found.same, found.different.len()), (1, 1));
        assert!(found.different[0].contains(&format!("{:?}", Ruling::NeedApproval)));
        assert!(replayed("{}\n", &policies, node, &digest).is_err());
    }

    #[test]
    fn a_line_that_was_taken_out_changed_or_cut_off_is_noticed() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::open(&root.path().join("s")).unwrap();
        let policies = BTreeMap::from([("kv".to_owned(), HealPolicy::default())]);
        let node = NodeBudget::default();
        for charges in 0..5 {
            let facts = facts(charges);
            let record = RulingRecord {
                unix_ms: 1,
                policy: "d".to_owned(),
                ruling: evaluate::evaluate(&policies["kv"], node, &facts),
                facts,
                propensity: evaluate::CERTAIN,
                previous: String::new(),
            };
            healing_policy::Rulings::of(&dir).append(&record).unwrap();
        }
        let log = std::fs::read_to_string(dir.rulings()).unwrap();
        let broken = |log: &str| replayed(log, &policies, node, "d").unwrap().broken.len();
        assert_eq!(broken(&log), 0);
        let lines: Vec<&str> = log.lines().collect();
        let without = |at: usize| [&lines[..at], &lines[at + 1..]].concat().join("\n");
        for at in 1..4 {
            assert_eq!(broken(&without(at)), 1, "line {at} taken out");
        }
        assert_eq!(
            broken(&log.replacen("\"unix_ms\":1", "\"unix_ms\":2", 1)),
            1,
            "a line was changed"
        );
        // The beginning is known to be missing where there is no file before this one; what was stripped of its chain is counted.
        let mut headless = replayed(&without(0), &policies, node, "d").unwrap();
        assert!(
            headless.broken.is_empty()
                && headless.continues == Some(evaluate::line_digest(lines[0].as_bytes()))
        );
        headless.holds(&evaluate::line_digest(lines[0].as_bytes()));
        assert!(headless.broken.is_empty(), "{headless:?}");
        headless.is_whole_log();
        assert_eq!(headless.broken.len(), 1);
        let stripped: Vec<String> = lines
            .iter()
            .map(|line| {
                let mut record: RulingRecord = serde_json::from_str(line).unwrap();
                record.previous.clear();
                serde_json::to_string(&record).unwrap()
            })
            .collect();
        let stripped = replayed(&stripped.join("\n"), &policies, node, "d").unwrap();
        assert_eq!((stripped.unchained, stripped.broken.len()), (5, 0));
        // What people lifted stands in the same chain.
        let lifted = Reinstated {
            unix_ms: 2,
            policy: "d".to_owned(),
            lifted: theriac_heal::standing::Standing::of("a", "kv", &[], &[]),
            by: ["ann".to_owned()].into(),
            previous: String::new(),
        };
        healing_policy::Rulings::of(&dir)
            .append_reinstated(&lifted)
            .unwrap();
        let told = std::fs::read_to_string(dir.rulings()).unwrap();
        let whole = replayed(&told, &policies, node, "d").unwrap();
        assert_eq!(
            (whole.reinstated, whole.same, whole.broken.len(), whole.unchained),
            (1, 5, 0, 1)
        );
        assert_eq!(
            broken(&(told.replace("ann", "eve") + &log)),
            1,
            "who lifted it was changed"
        );
        // A cut end looks whole by itself; the head that was noted before does not.
        let whole = replayed(&log, &policies, node, "d").unwrap();
        let cut = replayed(&without(4), &policies, node, "d").unwrap();
        assert!(cut.broken.is_empty() && !cut.heads.contains(whole.heads.last().unwrap()));
    }
}
