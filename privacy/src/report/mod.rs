//! What an officer reads and a third party recomputes from the ledger: the status, the report, its page, and the check of it.

mod document;
mod html;
mod mechanisms;
mod verify;

use std::fmt;

use serde::{Deserialize, Serialize};
use theriac_protocol::units::NodeId;

pub(crate) use self::document::block_runs;
pub use self::document::{BlockRun, Document, ExportedRecord};
pub use self::html::page;
pub use self::verify::{SealCheck, Trust, Verified, VerifyError, verify};
use crate::ledger::{Spent, State};
use crate::policy::{Policy, PrivacyUnit};

/// The state of a node's privacy budget. Holds no measurement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The node.
    pub node: NodeId,
    /// What is hidden.
    pub unit: PrivacyUnit,
    /// Length of one block, in milliseconds.
    pub block_ms: u64,
    /// Neighbouring relation of the guarantee.
    pub adjacency: String,
    /// ε that the most charged unit has lost in the current period, at `delta`.
    pub epsilon_spent: f64,
    /// The same from privacy loss distributions: tighter, for continuous noise. The limit is held to `epsilon_spent`.
    pub epsilon_spent_pld: f64,
    /// Largest ε that the policy allows any unit in one period.
    pub epsilon_limit: f64,
    /// δ of the guarantee.
    pub delta: f64,
    /// The Rényi order that gives `epsilon_spent`.
    pub order: u32,
    /// The period, as of the last charge: `rolling`, or such as `2026-11`.
    pub period: String,
    /// ε that the most charged unit has lost in all.
    pub epsilon_unit_lifetime: f64,
    /// The same from privacy loss distributions.
    pub epsilon_unit_lifetime_pld: f64,
    /// ε of all releases added up, for somebody whose data are in every block.
    pub epsilon_lifetime: f64,
    /// The same from privacy loss distributions.
    pub epsilon_lifetime_pld: f64,
    /// Whether every release would be refused: they are used up, or what all blocks bear alike has reached the limit.
    pub exhausted: bool,
    /// Releases that were charged.
    pub releases: u64,
    /// The policy's limit on them.
    pub releases_max: Option<u64>,
    /// Blocks that were charged.
    pub blocks_charged: u64,
    /// Releases that the policy allows each block.
    pub block_releases_max: u32,
    /// Least noise multiplier that the node accepts.
    pub noise_multiplier_min: f64,
    /// Largest sampling rate of one step.
    pub sampling_rate_max: f64,
    /// Most steps of one release.
    pub steps_max: u32,
    /// Number of the policy in force.
    pub policy_version: u64,
    /// Who signed it; absent for one that was only parsed.
    pub policy_signer: Option<String>,
    /// Records that the aggregator has counter-signed; 0: none.
    pub sealed_records: u64,
    /// Digest of the policy in force.
    pub policy_hash: String,
    /// Head of the ledger's chain.
    pub ledger_head: String,
    /// Records in the ledger.
    pub ledger_records: u64,
}

impl Status {
    pub(crate) fn new(state: &State, policy: &Policy, spent: Spent) -> Self {
        Self {
            node: policy.site().clone(),
            unit: policy.unit(),
            block_ms: u64::try_from(policy.block_span().as_millis()).unwrap_or(u64::MAX),
            adjacency: "add or remove one unit".to_owned(),
            epsilon_spent: spent.epsilon,
            epsilon_spent_pld: state.current(policy).epsilon_pld(policy.delta()),
            epsilon_limit: spent.epsilon_limit.value(),
            delta: spent.delta.value(),
            order: spent.order,
            period: spent.period.label(spent.period_index),
            epsilon_unit_lifetime: spent.epsilon_unit_lifetime,
            epsilon_unit_lifetime_pld: state.lifetime.epsilon_pld(policy.delta()),
            epsilon_lifetime: spent.epsilon_lifetime,
            epsilon_lifetime_pld: state.summed.epsilon_pld(policy.delta()),
            exhausted: state.is_exhausted(policy),
            releases: spent.releases,
            releases_max: policy.releases_max(),
            blocks_charged: state.lifetime.blocks.count(),
            block_releases_max: policy.block_releases_max(),
            noise_multiplier_min: policy.noise_multiplier_min().value(),
            sampling_rate_max: policy.sampling_rate_max(),
            steps_max: policy.steps_max(),
            policy_version: policy.version(),
            policy_signer: policy.signature().map(|signature| signature.key.to_string()),
            sealed_records: state.seal.as_ref().map_or(0, |seal| seal.records),
            policy_hash: policy.hash().to_string(),
            ledger_head: spent.head.to_string(),
            ledger_records: spent.records,
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let span = humantime::format_duration(std::time::Duration::from_millis(self.block_ms));
        let unit = match self.unit {
            PrivacyUnit::Block => format!("one block of {span} of this node"),
            PrivacyUnit::Record => "one sample of this node".to_owned(),
            PrivacyUnit::Node => "everything that one site contributes".to_owned(),
        };
        writeln!(f, "node             {}", self.node)?;
        writeln!(f, "protected unit   {unit} ({})", self.adjacency)?;
        writeln!(
            f,
            "epsilon          {:.4} of {} at delta {:e} (most charged unit, period {}); {:.4} by PLD",
            self.epsilon_spent, self.epsilon_limit, self.delta, self.period, self.epsilon_spent_pld
        )?;
        writeln!(
            f,
            "epsilon, ever    {:.4} for the most charged unit; {:.4} by PLD",
            self.epsilon_unit_lifetime, self.epsilon_unit_lifetime_pld
        )?;
        writeln!(
            f,
            "epsilon, summed  {:.4} if one unit had been in every release; {:.4} by PLD",
            self.epsilon_lifetime, self.epsilon_lifetime_pld
        )?;
        write!(f, "releases         {}", self.releases)?;
        match self.releases_max {
            Some(most) => writeln!(f, " of {most}, {} blocks charged", self.blocks_charged)?,
            None => writeln!(f, ", {} blocks charged", self.blocks_charged)?,
        }
        writeln!(
            f,
            "ledger           {} records, {} counter-signed, head {}",
            self.ledger_records, self.sealed_records, self.ledger_head
        )?;
        writeln!(
            f,
            "policy           version {}, {}",
            self.policy_version, self.policy_hash
        )?;
        let signer = self.policy_signer.as_deref().unwrap_or("nobody");
        write!(f, "signed by        {signer}")
    }
}

/// As it is after it was written and read, so that both sides went the same way.
pub(crate) fn json(value: &impl Serialize) -> serde_json::Value {
    let text = serde_json::to_string(value).unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}
