//! What the page says, and the command `status` with it.

use std::collections::BTreeMap;

use rusqlite::Connection;
use serde::{Deserialize, Serialize};
use theriac_protocol::message::{GuaranteeUnit, GuaranteeV1};
use theriac_protocol::round::PhaseName;
use theriac_protocol::units::NodeId;

use crate::central::CentralStatus;
use crate::driver::DriverStatus;
use crate::evidence::reputation::Reputation;
use crate::fleet::FleetStatus;
use crate::store::ledgers::FormerLedger;
use crate::store::records::{self, SiteRow};
use crate::store::{StoreError, evidence, history, models, rounds, validation, word};

/// `/status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Name of the federation.
    pub federation: String,
    /// Whether the server runs.
    pub running: bool,
    /// The round at hand, else the last one.
    pub round: u64,
    /// Where it is: `idle`, `opening`, `collecting`, `aggregating`, `publishing`, `aborting`, `closed`; `stopped` without a
    /// running server.
    pub phase: String,
    /// Updates stored in the round at hand.
    pub stored: usize,
    /// Connected sites.
    pub connected: Vec<String>,
    /// Connected sites that a round needs.
    #[serde(default)]
    pub quorum: usize,
    /// Sites that must still connect before a round opens; 0 while enough are there, or when no server runs.
    #[serde(default)]
    pub missing: usize,
    /// The model in force.
    pub model_version: u64,
    /// Rounds that published.
    pub rounds_published: u64,
    /// Rounds that were aborted.
    pub rounds_aborted: u64,
    /// Bytes from the edges since the start.
    pub bytes_up: u64,
    /// Bytes to the edges since the start.
    pub bytes_down: u64,
    /// Seconds since the start.
    pub uptime_s: u64,
    /// Most resident memory so far.
    pub peak_rss_bytes: u64,
    /// CPU time so far.
    pub cpu_seconds: f64,
    /// `ok`, or `full` from a write that failed for want of room until one succeeds.
    pub storage: String,
    /// Noise of the centre and what it has spent; absent: off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub central_noise: Option<CentralStatus>,
    /// What validators made of the last candidate; absent: none was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<String>,
    /// How the fleet is and who holds its slots; absent: `[fleet]` is off, or no server runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fleet: Option<FleetStatus>,
    /// Every enrolled site.
    pub sites: Vec<SiteStatus>,
}

/// One site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SiteStatus {
    /// Its name.
    pub name: String,
    /// `active`, `suspended` or `revoked`.
    pub state: String,
    /// Whether it is connected.
    pub connected: bool,
    /// Updates stored.
    pub accepted: u64,
    /// Things refused.
    pub refused: u64,
    /// The same by reason.
    pub refusals: BTreeMap<String, u64>,
    /// Rounds declined, by reason.
    pub declines: BTreeMap<String, u64>,
    /// ε spent, as its last update claimed.
    pub epsilon: Option<f64>,
    /// δ of its policy, as its last update claimed.
    pub delta: Option<f64>,
    /// What its gate said last.
    pub last_verdict: Option<String>,
    /// What it guarantees, as it declared; absent for an edge that is too old to say.
    pub guarantee: Option<GuaranteeStatus>,
    /// What it has earned by its updates, 0 to 1; below `[quarantine] enter_below` it enters quarantine.
    #[serde(default)]
    pub trust: Option<f64>,
    /// The round after which it entered quarantine, while it is in it: its updates are scored and count nothing.
    #[serde(default)]
    pub quarantined_since: Option<u64>,
    /// What became of its part in the last round on record: `combined`, `quarantined`, `refused`, …
    #[serde(default)]
    pub last_decision: Option<String>,
    /// That round.
    #[serde(default)]
    pub last_decision_round: Option<u64>,
    /// Records of its privacy ledger that are counter-signed.
    pub ledger_records: u64,
    /// Head of the last of them.
    pub ledger_head: String,
    /// Ledgers that the name had under earlier keys, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub former_ledgers: Vec<FormerLedgerStatus>,
    /// Whether the present ledger was begun after another one, which no operator has allowed so far.
    #[serde(default)]
    pub ledger_unallowed: bool,
}

/// See [`SiteStatus::former_ledgers`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FormerLedgerStatus {
    /// When its key was enrolled.
    pub began_unix_ms: u64,
    /// When another key took its place.
    pub ended_unix_ms: u64,
    /// Its counter-signed records.
    pub records: u64,
    /// Head of the last of them.
    pub head: String,
    /// ε spent, as the last update under it claimed.
    pub epsilon: Option<f64>,
    /// δ of it.
    pub delta: Option<f64>,
}

impl From<FormerLedger> for FormerLedgerStatus {
    fn from(former: FormerLedger) -> Self {
        Self {
            began_unix_ms: former.began.0,
            ended_unix_ms: former.ended.0,
            records: former.head.records,
            head: former.head.head.to_string(),
            epsilon: former.epsilon,
            delta: former.delta,
        }
    }
}

/// See [`SiteStatus::guarantee`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GuaranteeStatus {
    /// `block` or `record`.
    pub unit: String,
    /// Length of one block.
    pub block_ms: u64,
    /// Largest ε of one period.
    pub epsilon: f64,
    /// δ.
    pub delta: f64,
    /// Time over which ε holds.
    pub period: String,
    /// Least noise multiplier.
    pub noise_multiplier_min: f64,
    /// Version of the policy.
    pub policy_version: u64,
    /// Its digest.
    pub policy_hash: String,
    /// Who signed it; absent: nobody.
    pub policy_signer: Option<String>,
}

impl From<GuaranteeV1> for GuaranteeStatus {
    fn from(declared: GuaranteeV1) -> Self {
        Self {
            unit: match declared.unit {
                GuaranteeUnit::Block => "block",
                GuaranteeUnit::Record => "record",
            }
            .to_owned(),
            block_ms: declared.block_ms,
            epsilon: declared.epsilon.value(),
            delta: declared.delta.value(),
            period: declared.period,
            noise_multiplier_min: declared.noise_multiplier_min.value(),
            policy_version: declared.policy_version,
            policy_hash: declared.policy_hash.to_string(),
            policy_signer: Some(declared.policy_signer).filter(|signer| !signer.is_empty()),
        }
    }
}

impl SiteStatus {
    /// From the store's row.
    pub fn new(row: SiteRow, connected: bool) -> Self {
        Self {
            name: row.node.to_string(),
            state: word(row.state),
            connected,
            accepted: row.accepted,
            refused: row.refusals.values().sum(),
            refusals: row.refusals,
            declines: row.declines,
            epsilon: row.epsilon,
            delta: row.delta,
            last_verdict: row.last_verdict,
            guarantee: row.guarantee.map(GuaranteeStatus::from),
            trust: None,
            quarantined_since: None,
            last_decision: None,
            last_decision_round: None,
            ledger_records: row.ledger.records,
            ledger_head: row.ledger.head.to_string(),
            former_ledgers: row
                .former_ledgers
                .into_iter()
                .map(FormerLedgerStatus::from)
                .collect(),
            ledger_unallowed: row.ledger_unallowed,
        }
    }

    /// With what the records of decisions say about it.
    #[must_use]
    pub fn with_standing(mut self, standings: &Standings) -> Self {
        let reputation = standings
            .reputations
            .iter()
            .find(|(node, _)| node.as_str() == self.name)
            .map(|(_, reputation)| *reputation)
            .unwrap_or_default();
        self.trust = Some(reputation.trust());
        self.quarantined_since = reputation.quarantined_since;
        if let Some((decision, round)) = standings.last.get(&self.name) {
            self.last_decision = Some(decision.clone());
            self.last_decision_round = Some(*round);
        }
        self
    }
}

/// Where the sites stand.
#[derive(Debug, Clone, PartialEq)]
pub struct Standings {
    reputations: BTreeMap<NodeId, Reputation>,
    last: BTreeMap<String, (String, u64)>,
}

impl Standings {
    /// Reads them.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn read(connection: &Connection) -> Result<Self, StoreError> {
        Ok(Self {
            reputations: evidence::reputations(connection)?,
            last: evidence::last_decisions(connection)?,
        })
    }

    /// A site's standing in a cell: `0.953`, or `quarantine 0.213`.
    pub fn word(&self, node: &NodeId) -> String {
        let reputation = self.reputations.get(node).copied().unwrap_or_default();
        let quarantine = if reputation.is_quarantined() {
            "quarantine "
        } else {
            ""
        };
        format!("{quarantine}{:.3}", reputation.trust())
    }
}

impl Status {
    /// From the store alone, when no server runs.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn at_rest(connection: &Connection, federation: &str, quorum: usize) -> Result<Self, StoreError> {
        let (published, aborted) = history::outcomes(connection)?;
        let sites = records::sites(connection)?;
        let standings = Standings::read(connection)?;
        Ok(Self {
            federation: federation.to_owned(),
            running: false,
            round: rounds::last_round(connection)?.0,
            phase: "stopped".into(),
            stored: 0,
            connected: Vec::new(),
            quorum,
            missing: 0,
            model_version: models::current_model(connection)?.version.0,
            rounds_published: published,
            rounds_aborted: aborted,
            bytes_up: 0,
            bytes_down: 0,
            uptime_s: 0,
            peak_rss_bytes: 0,
            cpu_seconds: 0.0,
            storage: "ok".into(),
            central_noise: None,
            validation: validation::newest(connection)?
                .map(|validation| format!("round {}: {}", validation.round, validation.words())),
            fleet: None,
            sites: sites
                .into_iter()
                .map(|row| SiteStatus::new(row, false).with_standing(&standings))
                .collect(),
        })
    }

    /// With what the running driver says, and whether the store's disk is full.
    #[must_use]
    pub fn with_driver(mut self, driver: &DriverStatus, storage_full: bool) -> Self {
        self.running = true;
        self.round = driver.round.0;
        self.phase = format!("{:?}", driver.phase).to_lowercase();
        self.stored = driver.stored;
        self.connected = driver.connected.iter().map(ToString::to_string).collect();
        self.model_version = driver.model_version;
        self.rounds_published = driver.published;
        self.rounds_aborted = driver.aborted;
        self.quorum = driver.quorum;
        self.central_noise.clone_from(&driver.central);
        if driver.validation.is_some() {
            self.validation.clone_from(&driver.validation);
        }
        self.fleet.clone_from(&driver.fleet);
        self.missing = match driver.phase {
            PhaseName::Idle => driver.quorum.saturating_sub(driver.connected.len()),
            _ => 0,
        };
        self.storage = if storage_full { "full" } else { "ok" }.into();
        for site in &mut self.sites {
            site.connected = driver.connected.iter().any(|node| node.as_str() == site.name);
        }
        self
    }
}
