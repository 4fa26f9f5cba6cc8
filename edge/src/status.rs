//! What the edge is doing, as `/status` and `/incidents` show it. Scores and counts, never samples.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use theriac_heal::types::Incident;
use theriac_model::risk::Risk;

use crate::proxy::ProxyStatus;

/// Most incidents that the page shows; older ones are in the store.
const INCIDENTS_SHOWN: usize = 200;

/// `/status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Name of this site.
    pub node: String,
    /// `warming_up` until the first model is fitted, then `watching`.
    pub phase: Phase,
    /// Samples in memory.
    pub rows: u64,
    /// Samples needed for the first model.
    pub warm_up_rows: u64,
    /// Latest score of the part that is worst off; absent during warm-up.
    pub score: Option<f32>,
    /// Its alarm threshold.
    pub threshold: Option<f32>,
    /// Whether an alarm is on anywhere.
    pub alarm: bool,
    /// Published model in use as prior; 0 for none.
    pub model_version: u64,
    /// What the gate made of the latest published model: `none`, `accepted`, `worse_on_tail`, …
    pub gate: String,
    /// Why, in words with the figures that decided; absent before the first one.
    #[serde(default)]
    pub gate_reason: Option<String>,
    /// Link to the aggregator.
    pub federation: Federation,
    /// Why federation is off or refused, in words.
    pub federation_detail: Option<String>,
    /// Latest round heard of.
    pub round: u64,
    /// ε that the most charged unit has lost in the policy's current period; absent without a ledger.
    pub epsilon_spent: Option<f64>,
    /// The same over all time.
    pub epsilon_ever: Option<f64>,
    /// The policy's limit.
    pub epsilon_limit: Option<f64>,
    /// δ of both.
    pub delta: Option<f64>,
    /// Updates that the aggregator has acknowledged.
    pub updates_accepted: u64,
    /// Updates that it refused.
    pub updates_refused: u64,
    /// Why the latest round that got nothing from this edge got nothing: a word and what it means; absent after an update.
    pub last_decline: Option<String>,
    /// Latest refusal's word.
    pub last_refusal: Option<String>,
    /// Whether the stop switch is on: nothing new is begun.
    #[serde(default)]
    pub healing_stopped: bool,
    /// How the fleet is, as the aggregator tells, and what that holds back, in words; absent where the policy has no budgets of the fleet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fleet: Option<String>,
    /// Whether the state directory can be written and has room: `ok`, `full` or `failing`. Unless `ok`, nothing is trained
    /// or sent.
    pub storage: Storage,
    /// Failure risk of the host itself, one for each horizon.
    #[serde(default)]
    pub risk: Vec<RiskView>,
    /// Services that are watched.
    pub services: Vec<ServiceStatus>,
    /// Seconds since the start.
    pub uptime_s: f64,
}

/// See [`Status::phase`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// No model yet: probes and exits are acted on, anomalies are not seen.
    WarmingUp,
    /// Every sample is scored.
    Watching,
}

/// See [`Status::federation`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Federation {
    /// Never joined, or switched off.
    Off,
    /// Not connected now; trying.
    Connecting,
    /// Welcomed.
    Connected,
    /// Turned away; trying again rarely.
    Refused,
}

/// See [`Status::storage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Storage {
    /// It can be written.
    Ok,
    /// The disk is full.
    Full,
    /// Writing fails for another reason.
    Failing,
}

/// One service in [`Status::services`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// Its name.
    pub name: String,
    /// `running`, `stopped`, `starting`, `acting`.
    pub state: String,
    /// Its process, while it runs.
    pub pid: Option<u32>,
    /// How often this edge started it beyond the first time.
    pub restarts: u64,
    /// Whether the latest probe was answered well; without a probe, whether it runs.
    pub healthy: bool,
    /// Latest score of its detector.
    pub score: Option<f32>,
    /// Its alarm threshold.
    pub threshold: Option<f32>,
    /// Whether its alarm is on.
    pub alarm: bool,
    /// Complete checkpoints of its state.
    pub checkpoints: u64,
    /// Seconds spent on taking and proving checkpoints since the edge started, failed attempts too.
    #[serde(default)]
    pub checkpoint_seconds: f64,
    /// Checkpoints that became valid since then.
    #[serde(default)]
    pub checkpoints_taken: u64,
    /// Copies since then that were found to be bad, and are in quarantine or gone.
    #[serde(default)]
    pub checkpoints_refused: u64,
    /// Why the latest attempt to take one failed; absent after one that did not.
    #[serde(default)]
    pub checkpoint_failure: Option<String>,
    /// Why the latest one was taken, or why one that is due is not; absent before the first.
    #[serde(default)]
    pub checkpoint_reason: Option<String>,
    /// Its failure risk, one for each horizon; empty before the first sample.
    #[serde(default)]
    pub risk: Vec<RiskView>,
    /// What stands against acting on it without a person, in words: demotions after harm, open breakers.
    #[serde(default)]
    pub standing: Vec<String>,
    /// What stands before it; absent where clients come straight to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy: Option<ProxyStatus>,
}

/// The failure risk within one horizon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RiskView {
    /// Such as `5m`.
    pub horizon: String,
    /// Chance of failing within it, 0 to 1; absent when the model abstains.
    pub probability: Option<f64>,
    /// Lower bound of the chance.
    pub low: Option<f64>,
    /// Upper bound of the chance.
    pub high: Option<f64>,
    /// Why the model abstains: `no_limit`, `too_short`, `missing`, `out_of_domain`.
    pub abstain: Option<String>,
    /// What runs out: `memory`, `host_memory`, `disk`, `file_descriptors`.
    pub resource: Option<String>,
    /// The earliest time at which it runs out, in seconds from now; absent while nothing is in sight.
    pub lead_low_s: Option<f64>,
    /// The expected time, in seconds.
    pub lead_expected_s: Option<f64>,
    /// The latest time, in seconds; absent where the interval is open.
    pub lead_high_s: Option<f64>,
    /// `linear-1`, or the fitted model's version.
    pub model: String,
}

impl From<&Risk> for RiskView {
    fn from(risk: &Risk) -> Self {
        let chance = risk.chance.ok();
        // What a JSON number cannot say is left out.
        let finite = |value: f64| Some(value).filter(|value| value.is_finite());
        Self {
            horizon: risk.horizon.to_string(),
            probability: chance.map(|chance| chance.probability),
            low: chance.map(|chance| chance.low),
            high: chance.map(|chance| chance.high),
            abstain: risk.chance.err().map(|abstain| abstain.word().to_owned()),
            resource: risk.resource.map(str::to_owned),
            lead_low_s: risk.lead.and_then(|lead| finite(lead.low)),
            lead_expected_s: risk.lead.and_then(|lead| finite(lead.expected)),
            lead_high_s: risk.lead.and_then(|lead| lead.high.and_then(finite)),
            model: risk.model.to_string(),
        }
    }
}

/// One incident as `/incidents` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct IncidentView {
    /// Its number on this host.
    pub id: u64,
    /// The service, or `host`.
    pub service: String,
    /// What kind of trouble.
    pub class: String,
    /// Where it stands.
    pub state: String,
    /// Highest anomaly score seen, if an anomaly took part.
    pub score: Option<f32>,
    /// Leading channels, greatest first.
    pub causes: Vec<String>,
    /// First sign, milliseconds since the Unix epoch.
    pub opened_unix_ms: u64,
    /// The sign was confirmed.
    pub detected_unix_ms: u64,
    /// The first action began.
    pub acted_unix_ms: Option<u64>,
    /// The service was verified healthy.
    pub healed_unix_ms: Option<u64>,
    /// The latest action; while the incident waits for approval, the one that would be approved.
    pub action: Option<String>,
    /// Every action that was begun, in order.
    #[serde(default)]
    pub actions: Vec<ActionView>,
    /// What verification found.
    pub verdict: Option<String>,
    /// Why a person has to look.
    pub handed_over: Option<String>,
    /// While it waits for approval: SHA-256 of the plan that an approval would be of, as `actions approve --plan` takes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<String>,
}

/// One action of an incident.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActionView {
    /// Which.
    pub action: String,
    /// When it began, milliseconds since the Unix epoch.
    pub acted_unix_ms: u64,
    /// What verification found.
    pub verdict: Option<String>,
}

impl From<&Incident> for IncidentView {
    fn from(incident: &Incident) -> Self {
        Self {
            id: incident.id.0,
            service: incident.service.clone(),
            class: incident.class.to_string(),
            state: incident.state.to_string(),
            score: incident.score,
            causes: incident
                .causes
                .iter()
                .map(|cause| cause.channel.clone())
                .collect(),
            opened_unix_ms: incident.opened.unix_ms,
            detected_unix_ms: incident.detected.unix_ms,
            acted_unix_ms: incident.acted.map(|when| when.unix_ms),
            healed_unix_ms: incident.healed.map(|when| when.unix_ms),
            action: incident
                .recommended()
                .or_else(|| incident.actions.last().map(|record| record.intent.action))
                .map(|action| action.to_string()),
            actions: incident
                .actions
                .iter()
                .filter_map(|record| {
                    Some(ActionView {
                        action: record.intent.action.to_string(),
                        acted_unix_ms: record.acted?.unix_ms,
                        verdict: record.verdict.map(|verdict| verdict.to_string()),
                    })
                })
                .collect(),
            // Not the one before it, while the action shown has none yet.
            verdict: incident
                .verdict
                .filter(|_| incident.state.is_closed() || !unjudged(incident))
                .map(|verdict| verdict.to_string()),
            handed_over: incident.handed_over.clone(),
            plan: incident
                .recommended()
                .and(incident.plan.as_ref())
                .map(theriac_heal::types::Plan::hash),
        }
    }
}

/// Whether the action that is shown has not been judged.
fn unjudged(incident: &Incident) -> bool {
    let last = incident.actions.last();
    incident.recommended().is_some() || last.is_some_and(|record| record.verdict.is_none())
}

/// The one shared picture. Tasks write their part, the page reads all of it.
#[derive(Debug, Clone)]
pub struct Board(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    started: Instant,
    // Held for a few assignments only, never across an await.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    status: Status,
    incidents: VecDeque<IncidentView>,
    services: BTreeMap<String, ServiceStatus>,
    last_tick: Option<Instant>,
}

impl Board {
    /// A picture in which nothing has happened yet.
    pub fn new(node: &str, warm_up_rows: usize) -> Self {
        let status = Status {
            node: node.to_owned(),
            phase: Phase::WarmingUp,
            rows: 0,
            warm_up_rows: warm_up_rows as u64,
            score: None,
            threshold: None,
            alarm: false,
            model_version: 0,
            gate: "none".to_owned(),
            gate_reason: None,
            federation: Federation::Off,
            federation_detail: None,
            healing_stopped: false,
            fleet: None,
            round: 0,
            epsilon_spent: None,
            epsilon_ever: None,
            epsilon_limit: None,
            delta: None,
            updates_accepted: 0,
            updates_refused: 0,
            last_decline: None,
            last_refusal: None,
            storage: Storage::Ok,
            risk: Vec::new(),
            services: Vec::new(),
            uptime_s: 0.0,
        };
        let state = State {
            status,
            incidents: VecDeque::new(),
            services: BTreeMap::new(),
            last_tick: None,
        };
        Self(Arc::new(Inner {
            started: Instant::now(),
            state: Mutex::new(state),
        }))
    }

    /// Changes the status.
    pub fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.lock().status);
    }

    /// Changes one service's line, adding it where it is missing.
    pub fn update_service(&self, name: &str, change: impl FnOnce(&mut ServiceStatus)) {
        let fresh = || ServiceStatus {
            name: name.to_owned(),
            state: "stopped".to_owned(),
            pid: None,
            restarts: 0,
            healthy: false,
            score: None,
            threshold: None,
            alarm: false,
            checkpoints: 0,
            checkpoint_seconds: 0.0,
            checkpoints_taken: 0,
            checkpoints_refused: 0,
            checkpoint_failure: None,
            standing: Vec::new(),
            checkpoint_reason: None,
            risk: Vec::new(),
            proxy: None,
        };
        change(self.lock().services.entry(name.to_owned()).or_insert_with(fresh));
    }

    /// Shows an incident's latest state.
    pub fn show_incident(&self, incident: &Incident) {
        let view = IncidentView::from(incident);
        let incidents = &mut self.lock().incidents;
        if let Some(known) = incidents.iter_mut().find(|known| known.id == view.id) {
            *known = view;
            return;
        }
        incidents.push_back(view);
        if incidents.len() > INCIDENTS_SHOWN {
            incidents.pop_front();
        }
    }

    /// The status now.
    pub fn status(&self) -> Status {
        let state = self.lock();
        let mut status = state.status.clone();
        status.services = state.services.values().cloned().collect();
        status.uptime_s = self.0.started.elapsed().as_secs_f64();
        status
    }

    /// Incidents, oldest first.
    pub fn incidents(&self) -> Vec<IncidentView> {
        self.lock().incidents.iter().cloned().collect()
    }

    /// A sample was taken: the sample loop feeds this, not a timer, so that a stuck loop shows.
    pub fn tick(&self) {
        self.lock().last_tick = Some(Instant::now());
    }

    /// Time since the latest sample (since the start when there was none).
    pub fn since_tick(&self) -> std::time::Duration {
        self.lock().last_tick.unwrap_or(self.0.started).elapsed()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is one assignment or push, so a poisoned lock still guards a whole picture.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use theriac_heal::incident::{HealConfig, IncidentMachine, Input};
    use theriac_heal::policy::{HealingSection, NodeBudget};
    use theriac_heal::types::Now;

    use super::*;

    /// A crash under the default autonomy, a thousand seconds after 1970.
    fn crashed() -> IncidentMachine {
        let mut machine = IncidentMachine::new(HealConfig {
            services: BTreeMap::from([("kv".to_owned(), HealingSection::default().check().unwrap())]),
            node: NodeBudget::default(),
            depends_on: std::collections::BTreeMap::new(),
            clock_id: "test".to_owned(),
        });
        let now = Now {
            monotonic: Duration::from_secs(100),
            unix_ms: 1_000_000,
        };
        let service = || "kv".to_owned();
        machine.handle(
            now,
            Input::Started {
                service: service(),
                pid: 7,
            },
        );
        let status = "killed by signal 9".to_owned();
        machine.handle(
            now,
            Input::Exited {
                service: service(),
                status,
            },
        );
        machine
    }

    #[test]
    fn an_incident_that_waits_for_approval_names_the_action_that_would_be_approved() {
        let machine = crashed();
        let view = IncidentView::from(machine.open_incident("kv").unwrap());
        assert_eq!(view.state, "awaiting_approval");
        assert_eq!(view.action.as_deref(), Some("start"));
    }

    #[test]
    fn an_incident_tells_its_first_sign_as_people_write_times() {
        let told = crashed().open_incident("kv").unwrap().why();
        assert!(told.contains("First sign at 1970-01-01T00:16:40.000Z."), "{told}");
    }

    #[test]
    fn status_has_the_documented_keys() {
        let board = Board::new("site-a", 300);
        board.update_service("kv", |service| service.pid = Some(7));
        let json = serde_json::to_value(board.status()).unwrap();
        for key in [
            "node",
            "phase",
            "rows",
            "warm_up_rows",
            "score",
            "threshold",
            "alarm",
            "model_version",
            "gate",
            "gate_reason",
            "federation",
            "round",
            "epsilon_spent",
            "epsilon_ever",
            "epsilon_limit",
            "delta",
            "updates_accepted",
            "updates_refused",
            "last_decline",
            "last_refusal",
            "risk",
            "services",
            "uptime_s",
        ] {
            assert!(json.get(key).is_some(), "{key} is missing");
        }
        assert_eq!(json["federation"], "off");
        assert_eq!(json["services"][0]["pid"], 7);
        for key in ["name", "state", "pid", "restarts", "healthy"] {
            assert!(json["services"][0].get(key).is_some(), "{key} is missing");
        }
        let back: Status = serde_json::from_value(json).unwrap();
        assert_eq!(back.node, "site-a");
    }
}
