//! `policy check`, `sign`, `replay`, and the stop switch: `stop-healing`, `resume-healing`.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use theriac_command::output::Output;
use theriac_command::problem::Problem;
use theriac_heal::policy::evaluate::{self, RulingRecord};
use theriac_heal::policy::{HealPolicy, NodeBudget};
use theriac_privacy::policy::signed::{Subject, signature_path};

use super::{ConfigArguments, privacy, unprinted};
use crate::config::EdgeConfig;
use crate::healing_policy::{self, HealingPolicyError};
use crate::respond;
use crate::state_dir::{StateDir, write_durably};

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
    #[command(after_help = "Example:\n  theriac-edge policy replay --config edge.toml --log rulings.jsonl")]
    Replay(ReplayArguments),
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
    /// The log; default: `rulings.jsonl` in the state directory.
    #[arg(long)]
    log: Option<PathBuf>,
    #[command(flatten)]
    config: ConfigArguments,
}

pub(super) fn policy<W: Write>(command: PolicyCommand, output: &mut Output<W>) -> Result<ExitCode, Problem> {
    match command {
        PolicyCommand::Check { config } => check(&config, output),
        PolicyCommand::Sign(arguments) => sign(&arguments, output),
        PolicyCommand::Replay(arguments) => replay(&arguments, output),
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
        write_durably(&path, b"stopped by a person\n")
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
    let Some(loaded) = loaded else {
        let value = serde_json::json!({ "file": null, "digest": digest });
        let human = format!("no policy file is named: [healing] of edge.toml holds\n  digest   {digest}");
        output.result(&value, human).map_err(unprinted)?;
        return Ok(ExitCode::SUCCESS);
    };
    let signers: Vec<String> = loaded.signers.iter().map(ToString::to_string).collect();
    let value = serde_json::json!({
        "file": loaded.path, "version": loaded.version, "signers": signers, "digest": digest,
    });
    let human = format!(
        "{} holds\n  version  {}\n  signers  {}\n  digest   {digest}",
        loaded.path.display(),
        loaded.version,
        signers.join(", ")
    );
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
    let value = serde_json::json!({
        "file": path, "signature": beside, "signer": key.public().to_string(), "signatures": signatures.len(),
    });
    let human = format!(
        "{} is signed by {} ({} signatures)",
        path.display(),
        key.public(),
        signatures.len()
    );
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
}

fn replay<W: Write>(arguments: &ReplayArguments, output: &mut Output<W>) -> Result<ExitCode, Problem> {
    let mut config = arguments.config.load()?;
    healing_policy::apply(&mut config).map_err(refused)?;
    let path = arguments
        .log
        .clone()
        .unwrap_or_else(|| StateDir::existing(&config.state_dir.path).rulings());
    let text = std::fs::read_to_string(&path).map_err(|error| unreadable(&path, &error))?;
    let policies = respond::policies(of_services(&config));
    let found = replayed(&text, &policies, config.healing_budget, &digest(&config))
        .map_err(|error| unreadable(&path, &error))?;
    let value = serde_json::json!({
        "same": found.same, "other_policy": found.other_policy, "different": found.different,
    });
    let mut human = format!(
        "{} rulings are the same, {} differ, {} were made under other policies",
        found.same,
        found.different.len(),
        found.other_policy
    );
    for different in &found.different {
        human.push('\n');
        human.push_str(different);
    }
    output.result(&value, human).map_err(unprinted)?;
    Ok(if found.different.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn replayed(
    text: &str,
    policies: &BTreeMap<String, HealPolicy>,
    node: NodeBudget,
    digest: &str,
) -> Result<Replayed, String> {
    let mut found = Replayed::default();
    for (at, line) in text.lines().enumerate() {
        let record: RulingRecord =
            serde_json::from_str(line).map_err(|error| format!("line {}: {error}", at + 1))?;
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
        .hint("give the rulings.jsonl of the edge's state directory with --log; a line that was cut or edited is no ruling")
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
            halted: false,
            approved: false,
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
}
