//! `privacy report`: the statement, every figure, and the records that they follow from, in one file.

use serde::{Deserialize, Serialize};
use theriac_protocol::units::{Digest, Timestamp};

use crate::ledger::State;
use crate::ledger::loss::{Loss, ORDERS};
use crate::policy::Policy;
use crate::policy::signed::PolicyKey;

/// The report. It holds no measurement: only what was charged, under which policy, and what follows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// 1.
    pub format: String,
    /// Program and version that wrote it.
    pub software: String,
    /// When it was written, by the node's clock.
    pub made: Timestamp,
    /// The figures; see [`super::Status`].
    pub statement: serde_json::Value,
    /// What the figures rest on.
    pub assumptions: Vec<String>,
    /// Loss of every block that was charged, as runs of neighbours with the same loss.
    pub blocks: Vec<BlockRun>,
    /// The Rényi orders of the charges' `rdp`.
    pub orders: Vec<u32>,
    /// Format of the ledger's file.
    pub ledger_version: u32,
    /// The ledger, record after record.
    pub records: Vec<ExportedRecord>,
    /// SHA-256 of the format's line and of this report as compact JSON, names in order, with an empty `digest` and no `signature`: no field can be changed
    /// alone.
    pub digest: String,
    /// The edge's own signature of that digest, `thpk1_… <128 hexadecimal digits>`; absent: it has no key of its own. Then `software` and `made` are
    /// nobody's word; all else follows from the records.
    #[serde(default)]
    pub signature: Option<String>,
}

/// Neighbouring blocks with the same loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockRun {
    /// Id of the first: its Unix time divided by the block's length.
    pub first: u64,
    /// Id of the last.
    pub last: u64,
    /// Releases that read each of them, besides those that every block bears.
    pub releases: u32,
    /// ε of each of them over all time, at the policy's δ.
    pub epsilon: f64,
    /// The order that gives it.
    pub order: u32,
    /// The same ε from privacy loss distributions: tighter, for continuous noise.
    pub epsilon_pld: f64,
}

/// One record as it lies on the disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportedRecord {
    /// Its bytes, which are JSON.
    pub body: String,
    /// The chain's head after it, 64 hexadecimal digits.
    pub head: String,
}

impl Document {
    pub(crate) fn new(
        statement: serde_json::Value,
        blocks: Vec<BlockRun>,
        ledger_version: u32,
        records: Vec<ExportedRecord>,
        made: Timestamp,
    ) -> Self {
        let mut document = Self {
            format: FORMAT.to_owned(),
            software: concat!("theriac-privacy ", env!("CARGO_PKG_VERSION")).to_owned(),
            made,
            statement,
            assumptions: ASSUMPTIONS.iter().map(ToString::to_string).collect(),
            blocks,
            orders: ORDERS.to_vec(),
            ledger_version,
            records,
            digest: String::new(),
            signature: None,
        };
        // Of the numbers as a reader will have them: a float may change its last bit on the way through a file.
        document.digest = digest_of(&super::json(&document.bare())).to_string();
        document
    }

    /// The digest that the fields give, of a report that was read.
    pub(crate) fn digest_as_read(&self) -> Digest {
        digest_of(&serde_json::to_value(self.bare()).unwrap_or_default())
    }

    fn bare(&self) -> Self {
        Self {
            digest: String::new(),
            signature: None,
            ..self.clone()
        }
    }

    /// Signs it with the edge's own key.
    #[must_use]
    pub fn signed(mut self, key: &PolicyKey) -> Self {
        self.signature = self
            .digest
            .parse()
            .ok()
            .map(|digest| key.sign_report(&digest).to_line());
        self
    }
}

fn digest_of(report: &serde_json::Value) -> Digest {
    Digest::of(format!("{FORMAT}\n{report}").as_bytes())
}

/// The table of blocks that the records give.
pub(crate) fn block_runs(state: &State, policy: &Policy) -> Vec<BlockRun> {
    let lifetime = &state.lifetime;
    // Blocks mostly have one of a few losses, and a sampled one takes a while.
    let mut known: Vec<(Loss, f64)> = Vec::new();
    let mut pld = |loss: &Loss| {
        if let Some((_, epsilon)) = known.iter().find(|(seen, _)| seen == loss) {
            return *epsilon;
        }
        let epsilon = loss.epsilon_pld(policy.delta());
        known.truncate(KNOWN_MAX);
        known.push((loss.clone(), epsilon));
        epsilon
    };
    let run = |(blocks, charge): (std::ops::RangeInclusive<u64>, &crate::ledger::BlockCharge)| {
        let loss = lifetime.node.plus(&charge.loss);
        let at = loss.epsilon(policy.delta());
        BlockRun {
            first: *blocks.start(),
            last: *blocks.end(),
            releases: charge.releases,
            epsilon: at.epsilon,
            order: at.order,
            epsilon_pld: pld(&loss),
        }
    };
    lifetime.blocks.runs().map(run).collect()
}

/// Losses whose second figure is remembered while blocks are listed.
const KNOWN_MAX: usize = 63;
/// Name and version of the report's format.
pub(crate) const FORMAT: &str = "theriac privacy report v2";

/// What the figures rest on, for the reader.
pub(crate) const ASSUMPTIONS: [&str; 6] = [
    "Neighbouring data sets differ by one unit, present or absent; the unit and its length are in the statement.",
    "Everyone who sees the updates is an adversary, the aggregator included; nobody with code execution on the node is.",
    "Each release is a sum of vectors clipped to norm C on a public integer grid plus discrete Gaussian noise of standard deviation sigma*C; \
     nothing else that depends on data leaves the node.",
    "The order-wise losses of releases that read the same block add up; a block that a release does not name loses nothing by it. \
     Which blocks are named depends on time and on what was charged before, never on un-noised data.",
    "epsilon = RDP(a) + ln(1 - 1/a) - (ln delta + ln a)/(a - 1), at the best order a of the list (Canonne, Kamath and Steinke 2020, \
     proposition 12).",
    "Records after the last counter-signature are vouched for by the node alone.",
];
