//! What `privacy status` shows: a statement that an officer can read and a third party can recompute from the ledger.

use std::fmt;

use serde::Serialize;
use theriac_protocol::units::NodeId;

use crate::ledger::{Spent, State};
use crate::policy::{Policy, PrivacyUnit};

/// The state of a node's privacy budget. Holds no measurement.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Status {
    /// The node.
    pub node: NodeId,
    /// What is hidden.
    pub unit: PrivacyUnit,
    /// Length of one block, in milliseconds.
    pub block_ms: u64,
    /// Neighbouring relation of the guarantee.
    pub adjacency: &'static str,
    /// ε that the most charged unit has lost, at `delta`.
    pub epsilon_spent: f64,
    /// Largest ε that the policy allows any unit.
    pub epsilon_limit: f64,
    /// δ of the guarantee.
    pub delta: f64,
    /// The same loss in zCDP.
    pub rho: f64,
    /// ε of all releases added up, for somebody whose data are in every block.
    pub epsilon_lifetime: f64,
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
            adjacency: "add or remove one unit",
            epsilon_spent: spent.epsilon,
            epsilon_limit: spent.epsilon_limit.value(),
            delta: spent.delta.value(),
            rho: spent.rho.value(),
            epsilon_lifetime: spent.epsilon_lifetime,
            releases: spent.releases,
            releases_max: policy.releases_max(),
            blocks_charged: state.blocks.count(),
            block_releases_max: policy.block_releases_max(),
            noise_multiplier_min: policy.noise_multiplier_min().value(),
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
        };
        writeln!(f, "node             {}", self.node)?;
        writeln!(f, "protected unit   {unit} ({})", self.adjacency)?;
        writeln!(
            f,
            "epsilon          {:.4} of {} at delta {:e} (most charged unit)",
            self.epsilon_spent, self.epsilon_limit, self.delta
        )?;
        writeln!(
            f,
            "epsilon, summed  {:.4} if one unit had been in every release",
            self.epsilon_lifetime
        )?;
        write!(f, "releases         {}", self.releases)?;
        match self.releases_max {
            Some(most) => writeln!(f, " of {most}, {} blocks charged", self.blocks_charged)?,
            None => writeln!(f, ", {} blocks charged", self.blocks_charged)?,
        }
        writeln!(
            f,
            "ledger           {} records, head {}",
            self.ledger_records, self.ledger_head
        )?;
        write!(f, "policy           {}", self.policy_hash)
    }
}
