//! What a machine is made from.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::message::UpdateKind;
use crate::units::{Digest, L2Norm, ModelVersion, NodeId, NoiseMultiplier, Round};

/// The model that a round builds on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BaseModel {
    /// Its version.
    pub version: ModelVersion,
    /// Digest of its payload.
    pub digest: Digest,
}

/// What every announcement of this federation says, see [`AnnounceV1`](crate::message::AnnounceV1).
#[derive(Debug, Clone, PartialEq)]
pub struct RoundTerms {
    /// What to send.
    pub kind: UpdateKind,
    /// Number of values in an update.
    pub values: u32,
    /// Digest of the update's layout.
    pub layout_digest: Digest,
    /// Clipping norm of one privacy unit.
    pub clip_norm: L2Norm,
    /// Noise multiplier σ.
    pub noise_multiplier: NoiseMultiplier,
    /// Samples in one block.
    pub block_rows: u32,
    /// Fewest blocks worth sending.
    pub blocks_min: u32,
    /// Most blocks that one release may cover.
    pub blocks_max: u32,
}

/// How rounds are run.
#[derive(Debug, Clone, PartialEq)]
pub struct RoundConfig {
    /// Fewest updates that make a model, at least 1 (0 counts as 1). Rounds open only while as many nodes are admitted.
    pub quorum: usize,
    /// Number f of faulty nodes that the rule withstands; 0 for a rule that withstands none. Up to f nodes whose update was refused for what no
    /// honest node sends count towards the quorum: they are of the f, so what is left needs to withstand fewer.
    pub byzantine: usize,
    /// Time from a round's opening to its end at the latest.
    pub deadline: Duration,
    /// Time from a round's end to the next one's opening at the earliest.
    pub pause: Duration,
    /// Whether an update for the round that ended last is still stored, until the next one stops collecting; see
    /// [`Output::StoreLate`](super::Output::StoreLate). Otherwise it is refused as `round_closed`.
    pub late_updates: bool,
    /// Most nodes that are told of a round, and most updates that it takes: what the rule can combine. Of more nodes each round tells others, drawn by its
    /// nonce. 0 counts as 1.
    pub updates_max: usize,
    /// No round with a higher number than this is opened; `None`: no end.
    pub rounds_max: Option<u64>,
    /// The terms of every round.
    pub terms: RoundTerms,
}

/// What the store knows of a round that was open when the program ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenRound {
    /// The round.
    pub round: Round,
    /// Its nonce, as announced.
    pub nonce: u64,
    /// The model it builds on.
    pub base: BaseModel,
    /// The nodes of [`Output::Open`](super::Output::Open): with them known, a resumed round ends as soon as all have reported. Empty means
    /// unknown: then only the deadline ends it.
    pub cohort: BTreeSet<NodeId>,
    /// Durable updates: node and payload digest.
    pub stored: BTreeMap<NodeId, Digest>,
    /// Nodes that declined.
    pub declined: BTreeSet<NodeId>,
    /// Nodes whose update was refused and that have none stored.
    pub refused: BTreeSet<NodeId>,
    /// Those of them whose update no honest node sends.
    pub faulty: BTreeSet<NodeId>,
    /// What is left of the deadline.
    pub remaining: Duration,
}
