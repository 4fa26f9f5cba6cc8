//! `incidents list`, `incidents show`, `incidents why`, `incidents accept`, and the decisions of people: `actions list`, `approve`, `deny`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use theriac_command::output::{Output, table};
use theriac_command::problem::Problem;
use theriac_heal::executor::clock;
use theriac_heal::incident::Explained;
use theriac_heal::types::{Incident, IncidentId, IncidentState, Plan};
use theriac_privacy::policy::signed::{PolicyKey, Subject};

use super::privacy::read_key;
use super::{ConfigArguments, or_dash, standing, unprinted};
use crate::healing_policy;
use crate::run::EdgeError;
use crate::state_dir::StateDir;
use crate::status::IncidentView;
use crate::store::{StoreError, StoreReader, Word};
use crate::suspects::{self, Suspect};

/// Latest incidents among which those of dependencies are looked for.
const OTHERS_MAX: u32 = 1_000;

#[derive(Debug, Subcommand)]
pub(super) enum IncidentsCommand {
    /// Lists incidents, newest last.
    #[command(after_help = "Example:\n  theriac-edge incidents list --limit 20")]
    List {
        #[command(flatten)]
        config: ConfigArguments,
        /// Most incidents shown.
        #[arg(long, default_value_t = 50)]
        limit: u32,
    },
    /// Prints everything recorded of one incident.
    #[command(after_help = "Example:\n  theriac-edge incidents show 3 --format json")]
    Show(OneIncident),
    /// Tells in words what was seen, considered, done and found.
    #[command(after_help = "Example:\n  theriac-edge incidents why 3")]
    Why(OneIncident),
    /// Says that what an open incident is about is normal now, such as the level after a new release: the alarm ends and the
    /// running edge learns from the rows that follow.
    #[command(after_help = "Example:\n  theriac-edge incidents accept 3")]
    Accept(OneIncident),
}

#[derive(Debug, Subcommand)]
pub(super) enum ActionsCommand {
    /// Lists incidents whose recommended action waits for approval.
    #[command(after_help = "Example:\n  theriac-edge actions list")]
    List {
        #[command(flatten)]
        config: ConfigArguments,
    },
    /// Approves the recommended action of an incident as it is planned now; the running edge carries it out within a second, or once as
    /// many people as its policy asks for have signed. Of an incident that was handed to you it says that you have mended what stood in the
    /// way: what renews the process may be tried again, within the budgets.
    #[command(after_help = "Example:\n  theriac-edge actions approve 3 --key operator.key")]
    Approve(Approval),
    /// Declines it; the incident is then yours.
    #[command(after_help = "Example:\n  theriac-edge actions deny 3")]
    Deny(OneIncident),
    /// Lists what stands against acting without a person: classes of actions that harmed a service, and breakers that are open since an
    /// executor failed again and again.
    #[command(after_help = "Example:\n  theriac-edge actions standing")]
    Standing {
        #[command(flatten)]
        config: ConfigArguments,
    },
    /// Lifts everything that stands against a service, once you have mended what did harm or failed; the running edge takes it up within a
    /// second. Where `healing_policy.keys` names keys, as many people have to sign as the policy needs.
    #[command(after_help = "Example:\n  theriac-edge actions reinstate kv --key operator.key")]
    Reinstate(standing::Reinstatement),
}

#[derive(Debug, Args)]
pub(super) struct OneIncident {
    /// Number of the incident, as `incidents list` shows it.
    id: u64,
    #[command(flatten)]
    config: ConfigArguments,
}

#[derive(Debug, Args)]
pub(super) struct Approval {
    #[command(flatten)]
    incident: OneIncident,
    /// Private key of `privacy keygen` to sign with. Needed where the policy asks for `approvals`.
    #[arg(long)]
    key: Option<PathBuf>,
    /// The plan that you mean, as `actions list` shows it: any other one is refused. Without it the one of this moment is approved.
    #[arg(long)]
    plan: Option<String>,
}

/// What `incidents why` prints as JSON.
#[derive(serde::Serialize)]
struct Why<'a> {
    #[serde(flatten)]
    explained: Explained<'a>,
    suspects: &'a [Suspect],
    /// All of it for people.
    #[serde(rename = "why")]
    words: &'a str,
}

pub(super) fn incidents<W: Write>(
    command: IncidentsCommand,
    output: &mut Output<W>,
) -> Result<ExitCode, Problem> {
    match command {
        IncidentsCommand::List { config, limit } => {
            let found = reader(&config)?
                .map_or(Ok(Vec::new()), |reader| reader.incidents(limit))
                .map_err(failed)?;
            list(&found, "no incidents", output)
        }
        IncidentsCommand::Show(one) => {
            let incident = one.find()?;
            let pretty = serde_json::to_string_pretty(&incident).unwrap_or_default();
            output.result(&incident, pretty).map_err(unprinted)?;
            Ok(ExitCode::SUCCESS)
        }
        IncidentsCommand::Why(one) => {
            let incident = one.find()?;
            let services = one.config.load()?.services;
            let others = reader(&one.config)?
                .map_or(Ok(Vec::new()), |reader| reader.incidents(OTHERS_MAX))
                .map_err(failed)?;
            let suspects = suspects::suspects(&services, &incident, &others);
            let why = incident.why() + &suspects::words(&suspects, &incident);
            let value = Why {
                explained: incident.explained(),
                suspects: &suspects,
                words: &why,
            };
            output.result(&value, why.trim_end()).map_err(unprinted)?;
            Ok(ExitCode::SUCCESS)
        }
        IncidentsCommand::Accept(one) => one.accept(output),
    }
}

pub(super) fn actions<W: Write>(
    command: ActionsCommand,
    output: &mut Output<W>,
) -> Result<ExitCode, Problem> {
    match command {
        ActionsCommand::List { config } => {
            let all = reader(&config)?
                .map_or(Ok(Vec::new()), |reader| reader.incidents(1_000))
                .map_err(failed)?;
            let of = |state| all.iter().filter(move |found| found.state == state).cloned();
            let waiting: Vec<Incident> = of(IncidentState::AwaitingApproval).collect();
            let handed: Vec<Incident> = of(IncidentState::HandedToHuman).collect();
            let handed: Vec<String> = handed.iter().map(|found| found.id.to_string()).collect();
            let none = if handed.is_empty() {
                "nothing waits for approval".to_owned()
            } else {
                format!(
                    "nothing waits for approval; a person has incident {}: `theriac-edge incidents why ID` says what to do",
                    handed.join(", ")
                )
            };
            list(&waiting, &none, output)
        }
        ActionsCommand::Approve(approval) => {
            let (key, plan) = (approval.key.as_deref(), approval.plan.as_deref());
            approval.incident.decide(true, key, plan, output)
        }
        ActionsCommand::Deny(one) => one.decide(false, None, None, output),
        ActionsCommand::Standing { config } => standing::list(&config, output),
        ActionsCommand::Reinstate(arguments) => standing::reinstate(&arguments, output),
    }
}

impl OneIncident {
    fn find(&self) -> Result<Incident, Problem> {
        let found = reader(&self.config)?.map_or(Ok(None), |reader| reader.incident(IncidentId(self.id)));
        found.map_err(failed)?.ok_or_else(|| {
            Problem::failed("TH-E0331", format!("there is no incident {}", self.id))
                .hint("`theriac-edge incidents list` shows their numbers")
        })
    }

    fn accept<W: Write>(&self, output: &mut Output<W>) -> Result<ExitCode, Problem> {
        let incident = self.find()?;
        let refused = |text: String, hint: &str| Err(Problem::failed("TH-E0336", text).hint(hint.to_owned()));
        if incident.state.is_closed() {
            return refused(
                format!(
                    "incident {} is {}: nothing is left to accept",
                    self.id, incident.state
                ),
                "`theriac-edge incidents list` shows which are open",
            );
        }
        if !incident.class.from_detector() {
            return refused(
                format!(
                    "incident {} is a {}, which cannot be normal",
                    self.id, incident.class
                ),
                "only what the detector found can be accepted; `theriac-edge incidents why` tells what happened",
            );
        }
        if let Some(reader) = reader(&self.config)? {
            reader.accept_new_normal(incident.id).map_err(failed)?;
        }
        let value = serde_json::json!({
            "incident": self.id, "service": incident.service, "decision": "new_normal",
        });
        let words = format!(
            "incident {} taken for a new normal of {}; the running edge ends the alarm and gathers rows for a new model",
            self.id, incident.service
        );
        output.result(&value, words).map_err(unprinted)?;
        Ok(ExitCode::SUCCESS)
    }

    fn decide<W: Write>(
        &self,
        approve: bool,
        key: Option<&Path>,
        meant: Option<&str>,
        output: &mut Output<W>,
    ) -> Result<ExitCode, Problem> {
        let incident = self.find()?;
        if approve && incident.state == IncidentState::HandedToHuman {
            if let Some(intent) = incident.in_flight() {
                let text = format!(
                    "intent {} of incident {}, {}, is still under way, beyond its time",
                    intent.id.0, self.id, intent.action
                );
                return Err(Problem::failed("TH-E0333", text)
                    .hint("what became of it is told when it ends, or by the next start of the edge"));
            }
            if key.is_none() && meant.is_none() {
                return self.retry(&incident, output);
            }
            let text = format!(
                "incident {} is a person's, and has no plan that could be signed or named",
                self.id
            );
            return Err(Problem::failed("TH-E0333", text)
                .hint("without --key and --plan `actions approve` has its next action tried, or planned for signatures"));
        }
        if incident.state != IncidentState::AwaitingApproval {
            let text = format!(
                "incident {} is {}: nothing waits for approval",
                self.id, incident.state
            );
            return Err(
                Problem::failed("TH-E0333", text).hint("`theriac-edge actions list` shows what waits")
            );
        }
        let present = incident.plan.as_ref().map(planned).unwrap_or_default();
        let hash = incident.plan.as_ref().map(Plan::hash);
        if meant.is_some() && meant != hash.as_deref() {
            let text = format!("incident {} has another plan now: {present}", self.id);
            return Err(Problem::failed("TH-E0333", text).hint("approve that one, if it is what you want"));
        }
        // The edge at its start plans anew, and a word on another plan does not count.
        if approve && !self.edge_runs()? {
            let text = format!(
                "no edge runs, so nobody has the plan of incident {} any more",
                self.id
            );
            return Err(Problem::temporary("TH-E0333", text)
                .hint("start it; `theriac-edge actions list` shows the plan that it makes"));
        }
        // By the clock that the edge goes by.
        let is_over = |plan: &Plan| plan.expires.monotonic_ms <= clock::now().when().monotonic_ms;
        if approve && incident.plan.as_ref().is_some_and(is_over) {
            let text = format!("the plan of incident {} is over: {present}", self.id);
            return Err(Problem::failed("TH-E0333", text)
                .hint("the running edge makes a new one; `theriac-edge actions list` shows it"));
        }
        let key = key.map(read_key).transpose()?;
        let asked = match &incident.plan {
            Some(plan) if approve => self.counts(plan, key.as_ref())?,
            _ => None,
        };
        if let Some(reader) = reader(&self.config)? {
            let text = incident.plan.as_ref().map(Plan::text).unwrap_or_default();
            let word = Word {
                incident: incident.id,
                approve,
                plan: hash.clone(),
                signature: key.map(|key| key.sign_text(Subject::Approval, &text).to_string()),
            };
            reader.decide(&word).map_err(failed)?;
        }
        let word = if approve { "approved" } else { "denied" };
        let what = incident.plan.as_ref();
        let value = serde_json::json!({
            "incident": self.id, "decision": word, "plan": hash,
            "action": what.map(|plan| plan.action), "class": what.map(|plan| plan.class),
            "service": incident.service, "expires_unix_ms": what.map(|plan| plan.expires.unix_ms),
            "signatures_needed": asked,
        });
        let needed = asked.filter(|need| *need > 1).map_or_else(String::new, |need| {
            format!(" once {need} different people have signed it")
        });
        let human = format!(
            "incident {} {word}: {present}; the running edge takes it up{needed} while that is its plan",
            self.id
        );
        output.result(&value, human).map_err(unprinted)?;
        Ok(ExitCode::SUCCESS)
    }

    fn edge_runs(&self) -> Result<bool, Problem> {
        Ok(StateDir::existing(&self.config.load()?.state_dir.path).is_in_use())
    }

    /// A person who has the incident, and mended what stood in the way, has the next action tried again.
    fn retry<W: Write>(&self, incident: &Incident, output: &mut Output<W>) -> Result<ExitCode, Problem> {
        if let Some(reader) = reader(&self.config)? {
            let word = Word {
                incident: incident.id,
                approve: true,
                plan: None,
                signature: None,
            };
            reader.decide(&word).map_err(failed)?;
        }
        let value = serde_json::json!({
            "incident": self.id, "decision": "retry", "class": incident.class, "service": incident.service,
        });
        let when = if self.edge_runs()? {
            ""
        } else {
            " when the edge runs"
        };
        let human = format!(
            "incident {} of {} is taken up again for {}{when}; what comes of it stands in `theriac-edge incidents why {}`",
            self.id, incident.service, incident.class, self.id
        );
        output.result(&value, human).map_err(unprinted)?;
        Ok(ExitCode::SUCCESS)
    }
}

impl OneIncident {
    /// How many signatures the plan asks for, `None` where the word of one person at the host is enough.
    ///
    /// # Errors
    /// An approval that would not count: without a key where signatures are asked for, or by a key that is not pinned.
    fn counts(&self, plan: &Plan, key: Option<&PolicyKey>) -> Result<Option<u32>, Problem> {
        let mut config = self.config.load()?;
        healing_policy::apply(&mut config).map_err(super::policy::refused)?;
        let pinned = |key: &PolicyKey| config.healing_policy.keys.contains(&key.public());
        let refused = |text: String, hint: &str| Err(Problem::failed("TH-E0333", text).hint(hint.to_owned()));
        if let Some(key) = key.filter(|key| !pinned(key)) {
            let text = format!(
                "an approval by {} would not count: healing_policy.keys does not name it",
                key.public()
            );
            return refused(text, "sign with a key that is named there");
        }
        let mut services = config.services.iter();
        let service = services.find(|service| service.name.as_str() == plan.service);
        let asked = service
            .map(|service| service.healing.approvals(plan.action))
            .filter(|asked| asked.signed);
        match asked {
            Some(asked) if key.is_none() => refused(
                format!(
                    "{} of {} asks for {} signatures: one without a key would not count",
                    plan.action, plan.service, asked.need
                ),
                "give --key FILE, a private key of `privacy keygen` whose public one healing_policy.keys names",
            ),
            asked => Ok(asked.map(|asked| asked.need)),
        }
    }
}

/// A plan in one line.
fn planned(plan: &Plan) -> String {
    let session = plan.session.map_or_else(String::new, |session| {
        format!(", session of process {}", session.pid)
    });
    format!(
        "{} of {} for {}{session}, until {}, plan {}",
        plan.action,
        plan.service,
        plan.class,
        utc(plan.expires.unix_ms),
        plan.hash()
    )
}

fn list<W: Write>(incidents: &[Incident], none: &str, output: &mut Output<W>) -> Result<ExitCode, Problem> {
    let views: Vec<IncidentView> = incidents.iter().map(IncidentView::from).collect();
    let rows: Vec<Vec<String>> = incidents
        .iter()
        .zip(&views)
        .map(|(incident, view)| line(incident, view))
        .collect();
    let header = [
        "id",
        "service",
        "class",
        "state",
        "detected",
        "healed after",
        "action",
        "verdict",
        "causes",
    ];
    let human = if rows.is_empty() {
        none.to_owned()
    } else {
        let plans = incidents
            .iter()
            .filter(|incident| incident.recommended().is_some())
            .filter_map(|incident| {
                let so_far = match incident.approved_by.len() {
                    0 => String::new(),
                    count => format!("; approved by {count} so far"),
                };
                Some(format!(
                    "\nincident {}: {}{so_far}",
                    incident.id,
                    planned(incident.plan.as_ref()?)
                ))
            });
        table(&header, &rows).trim_end().to_owned() + &plans.collect::<String>()
    };
    output.result(&views, human).map_err(unprinted)?;
    Ok(ExitCode::SUCCESS)
}

fn line(incident: &Incident, view: &IncidentView) -> Vec<String> {
    let healed = incident
        .healed
        .map(|healed| format!("{:.1} s", healed.since(incident.opened).as_secs_f64()));
    vec![
        view.id.to_string(),
        view.service.clone(),
        view.class.clone(),
        view.state.clone(),
        utc(view.detected_unix_ms),
        or_dash(healed),
        or_dash(view.action.as_deref()),
        or_dash(view.verdict.as_deref()),
        view.causes.first().cloned().unwrap_or_default(),
    ]
}

pub(super) fn utc(unix_ms: u64) -> String {
    let seconds = i64::try_from(unix_ms / 1_000).unwrap_or(i64::MAX);
    time::OffsetDateTime::from_unix_timestamp(seconds)
        .ok()
        .and_then(|at| at.format(&time::format_description::well_known::Rfc3339).ok())
        .unwrap_or_else(|| unix_ms.to_string())
}

pub(super) fn reader(config: &ConfigArguments) -> Result<Option<StoreReader>, Problem> {
    let config = config.load()?;
    StoreReader::open(&StateDir::existing(&config.state_dir.path).database()).map_err(failed)
}

pub(super) fn failed(error: StoreError) -> Problem {
    EdgeError::from(error).into()
}
