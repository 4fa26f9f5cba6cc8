//! `privacy keygen`, `sign` and `check`: a policy that somebody answers for.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;
use theriac_command::output::Output;
use theriac_command::problem::Problem;
use theriac_privacy::policy::Policy;
use theriac_privacy::policy::signed::{PolicyKey, PolicyPublicKey, signature_path};

use super::super::{ConfigArguments, unprinted};
use crate::client::opening;
use crate::state_dir::StateDir;

#[derive(Debug, Args)]
pub(in crate::commands) struct KeygenArguments {
    /// Where to write the private key, mode 0600; an existing file is never overwritten. Keep it off the edges.
    #[arg(long)]
    out: PathBuf,
}

#[derive(Debug, Args)]
pub(in crate::commands) struct SignArguments {
    /// The policy; default: the one that this edge's configuration names.
    file: Option<PathBuf>,
    /// Private key of `privacy keygen`; default: this edge's own key, which is made when there is none.
    #[arg(long)]
    key: Option<PathBuf>,
    #[command(flatten)]
    config: ConfigArguments,
}

#[derive(Debug, Args)]
pub(in crate::commands) struct CheckArguments {
    /// The policy; default: the one that this edge's configuration names.
    file: Option<PathBuf>,
    /// The officer's public key (`thpk1_…`); default: the one that this edge trusts.
    #[arg(long)]
    policy_key: Option<PolicyPublicKey>,
    #[command(flatten)]
    config: ConfigArguments,
}

/// What a policy says, for the person who signs or checks it.
#[derive(Debug, Serialize)]
struct Said {
    file: String,
    signature: String,
    signer: String,
    site: String,
    version: u64,
    unit: String,
    block: String,
    epsilon: f64,
    delta: f64,
    period: String,
    hash: String,
}

pub(super) fn keygen<W: Write>(
    arguments: &KeygenArguments,
    output: &mut Output<W>,
) -> Result<ExitCode, Problem> {
    let key = opening::new_key();
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&arguments.out)
        .and_then(|mut file| {
            file.write_all(key.to_text().as_bytes())
                .and_then(|()| file.sync_all())
        });
    let path = arguments.out.display();
    written.map_err(|error| {
        Problem::failed("TH-E0340", format!("cannot write {path}: {error}"))
            .hint("choose a place that does not exist yet; a key is never overwritten")
    })?;
    let public = key.public().to_string();
    let value = serde_json::json!({ "key_file": arguments.out, "policy_key": public });
    let human = format!(
        "private key  {path} (keep it off the edges)\npin it in edge.toml\n\nfor the policy of the privacy budget:\n[federation]\npolicy_key = \"{public}\"\n\nor for the policy of healing:\n[healing_policy]\nkeys = [\"{public}\"]"
    );
    output.result(&value, human).map_err(unprinted)?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn sign<W: Write>(arguments: &SignArguments, output: &mut Output<W>) -> Result<ExitCode, Problem> {
    let config = arguments.config.load()?;
    let dir = StateDir::existing(&config.state_dir.path);
    let path = arguments
        .file
        .clone()
        .unwrap_or_else(|| opening::policy_path(&config, &dir));
    let key = match &arguments.key {
        Some(path) => read_key(path)?,
        None => opening::own_key_or_new(&dir)?,
    };
    let text = std::fs::read_to_string(&path).map_err(|error| {
        Problem::config("TH-E0307", format!("cannot read {}: {error}", path.display()))
            .hint("name the policy: theriac-edge privacy sign privacy.toml --key officer.key")
    })?;
    opening::sign(&path, &text, &key)?;
    let policy = Policy::load_signed(&path, key.public()).map_err(refused)?;
    tell(&path, &policy, "signed", output)
}

pub(super) fn check<W: Write>(
    arguments: &CheckArguments,
    output: &mut Output<W>,
) -> Result<ExitCode, Problem> {
    let config = arguments.config.load()?;
    let dir = StateDir::existing(&config.state_dir.path);
    let path = arguments
        .file
        .clone()
        .unwrap_or_else(|| opening::policy_path(&config, &dir));
    let trusted = match arguments.policy_key {
        Some(key) => Some(key),
        None => opening::trusted_key(&config, &dir)?,
    };
    let trusted = trusted.ok_or_else(|| {
        Problem::config(
            "TH-E0307",
            "whose signature is to be checked? this edge trusts no key yet",
        )
        .hint("give --policy-key, or pin federation.policy_key in edge.toml")
    })?;
    let policy = Policy::load_signed(&path, trusted).map_err(refused)?;
    tell(&path, &policy, "signed and unchanged", output)
}

pub(in crate::commands) fn read_key(path: &Path) -> Result<PolicyKey, Problem> {
    let unusable = |error: &dyn std::fmt::Display| {
        Problem::failed(
            "TH-E0340",
            format!("cannot use the key {}: {error}", path.display()),
        )
        .hint("make one with `theriac-edge privacy keygen --out officer.key`")
    };
    let text = std::fs::read_to_string(path).map_err(|error| unusable(&error))?;
    PolicyKey::from_text(&text).map_err(|error| unusable(&error))
}

fn refused(error: theriac_privacy::policy::PolicyError) -> Problem {
    Problem::config("TH-E0307", error).hint("docs/privacy.md explains every key and who signs")
}

fn tell<W: Write>(
    path: &Path,
    policy: &Policy,
    done: &str,
    output: &mut Output<W>,
) -> Result<ExitCode, Problem> {
    let said = Said {
        file: path.display().to_string(),
        signature: signature_path(path).display().to_string(),
        signer: policy
            .signature()
            .map(|by| by.key.to_string())
            .unwrap_or_default(),
        site: policy.site().to_string(),
        version: policy.version(),
        unit: policy.unit().to_string(),
        block: humantime::format_duration(policy.block_span()).to_string(),
        epsilon: policy.epsilon().value(),
        delta: policy.delta().value(),
        period: policy.period().to_string(),
        hash: policy.hash().to_string(),
    };
    let human = format!(
        "{} is {done}\n  site     {}, version {}\n  promise  epsilon {} at delta {:e} for one {} of {}, period {}\n  \
         signer   {}\n  hash     {}",
        said.file,
        said.site,
        said.version,
        said.epsilon,
        said.delta,
        said.unit,
        said.block,
        said.period,
        said.signer,
        said.hash
    );
    output.result(&said, human).map_err(unprinted)?;
    Ok(ExitCode::SUCCESS)
}
