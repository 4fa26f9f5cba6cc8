//! `actions standing` and `actions reinstate`: what stands against acting without a person, and the word that lifts it.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use theriac_command::output::{Output, table};
use theriac_command::problem::Problem;
use theriac_heal::standing::Standing;
use theriac_heal::types::{Incident, IncidentState};
use theriac_privacy::policy::signed::Subject;

use super::incidents::{failed, reader, utc};
use super::privacy::read_key;
use super::{ConfigArguments, unprinted};
use crate::run::node_name;
use crate::state_dir::StateDir;
use crate::store::{REINSTATEMENT, Word};

#[derive(Debug, Args)]
pub(super) struct Reinstatement {
    /// The service.
    service: String,
    /// Private key of `privacy keygen` to sign with. Needed where `healing_policy.keys` names keys.
    #[arg(long)]
    key: Option<PathBuf>,
    #[command(flatten)]
    config: ConfigArguments,
}

/// What stands, by service, as the running edge stored it last.
fn standings(config: &ConfigArguments) -> Result<Vec<Standing>, Problem> {
    let loaded = config.load()?;
    let dir = StateDir::existing(&loaded.state_dir.path);
    let joined = dir.joined().map_err(crate::run::EdgeError::from)?;
    let node = node_name(loaded.node.clone(), joined.as_ref())?;
    let machine = reader(config)?
        .map_or(Ok(None), |reader| reader.machine())
        .map_err(failed)?
        .unwrap_or_default();
    let standing = |service: &str| Standing::of(node.as_str(), service, &machine.demoted, &machine.breakers);
    Ok(loaded
        .services
        .iter()
        .map(|service| standing(service.name.as_str()))
        .filter(|standing| !standing.is_empty())
        .collect())
}

pub(super) fn list<W: Write>(config: &ConfigArguments, output: &mut Output<W>) -> Result<ExitCode, Problem> {
    let found = standings(config)?;
    let rows: Vec<Vec<String>> = found
        .iter()
        .flat_map(|standing| {
            let since = standing
                .demotions
                .iter()
                .map(|demotion| utc(demotion.at.unix_ms))
                .chain(standing.breakers.iter().map(|_| "-".to_owned()));
            standing
                .words()
                .into_iter()
                .zip(since)
                .map(|(words, since)| vec![standing.service.clone(), words, since])
        })
        .collect();
    let human = if rows.is_empty() {
        "nothing stands against any service".to_owned()
    } else {
        table(&["service", "what", "since"], &rows)
    };
    output.result(&found, human).map_err(unprinted)?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn reinstate<W: Write>(
    arguments: &Reinstatement,
    output: &mut Output<W>,
) -> Result<ExitCode, Problem> {
    let found = standings(&arguments.config)?;
    let service = &arguments.service;
    let Some(standing) = found.iter().find(|standing| standing.service == *service) else {
        let text = format!("nothing stands against `{service}`");
        return Err(Problem::failed("TH-E0378", text)
            .hint("`theriac-edge actions standing` lists what stands against which service"));
    };
    let need = arguments.config.load()?.healing_policy.lifted_by();
    if need > 0 && arguments.key.is_none() {
        let text = format!("healing_policy.keys names keys: {need} of them have to sign");
        return Err(Problem::failed("TH-E0378", text).hint("give yours with --key"));
    }
    let sign = |key: &PathBuf| {
        let signature = read_key(key)?.sign_text(Subject::Reinstatement, &standing.text());
        Ok::<_, Problem>(signature.to_string())
    };
    let word = Word {
        incident: REINSTATEMENT,
        approve: true,
        plan: Some(standing.hash()),
        signature: arguments.key.as_ref().map(sign).transpose()?,
    };
    if let Some(reader) = reader(&arguments.config)? {
        reader.decide(&word).map_err(failed)?;
    }
    let value = serde_json::json!({
        "service": service, "decision": "reinstated", "standing": standing.hash(), "lifted": standing.words(), "need": need.max(1),
    });
    let handed = handed(&arguments.config, service)?;
    let human = format!(
        "{service}: {}\nyour word that this is lifted is left for the running edge{}{}",
        standing.words().join("; "),
        if need > 1 {
            format!(", which takes it up once {need} people have signed")
        } else {
            String::new()
        },
        handed.map_or_else(String::new, |id| {
            format!("\nincident {id} of it is a person's still: `theriac-edge actions approve {id}` has the next action tried")
        })
    );
    output.result(&value, human).map_err(unprinted)?;
    Ok(ExitCode::SUCCESS)
}

/// The incident of a service that a person has.
fn handed(config: &ConfigArguments, service: &str) -> Result<Option<u64>, Problem> {
    let all = reader(config)?
        .map_or(Ok(Vec::new()), |reader| reader.incidents(1_000))
        .map_err(failed)?;
    let is_it = |found: &Incident| found.service == service && found.state == IncidentState::HandedToHuman;
    Ok(all.iter().rfind(|found| is_it(found)).map(|found| found.id.0))
}
