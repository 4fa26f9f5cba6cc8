//! What happened in a world, for an oracle to judge.

use theriac_protocol::round::BaseModel;
use theriac_protocol::units::{Digest, ModelVersion, NodeId, Round};

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fact {
    /// An edge was told by its participant to train.
    TrainingAsked {
        /// Who.
        node: NodeId,
        /// For which round.
        round: Round,
        /// For which attempt.
        nonce: u64,
    },
    /// An update is on an edge's disk.
    OutboxDurable {
        /// Whose.
        node: NodeId,
        /// Of which round.
        round: Round,
        /// Of which attempt.
        nonce: u64,
        /// Of which bytes.
        digest: Digest,
    },
    /// An edge's participant had an update sent.
    UpdateSent {
        /// Whose.
        node: NodeId,
        /// Of which round.
        round: Round,
        /// Of which attempt.
        nonce: u64,
        /// Of which bytes.
        digest: Digest,
    },
    /// An edge was to send an update that its disk does not hold.
    OutboxMissing {
        /// Whose.
        node: NodeId,
        /// Of which round.
        round: Round,
    },
    /// A round is on the aggregator's disk as open.
    RoundDurable {
        /// Which.
        round: Round,
        /// Its nonce.
        nonce: u64,
        /// What it builds on.
        base: BaseModel,
    },
    /// A node was told of a round, by announcement or Welcome.
    Announced {
        /// Which round.
        round: Round,
        /// Its nonce.
        nonce: u64,
        /// What it builds on.
        base: BaseModel,
    },
    /// An update is on the aggregator's disk.
    UpdateDurable {
        /// Whose.
        node: NodeId,
        /// Of which round.
        round: Round,
        /// Of which bytes.
        digest: Digest,
    },
    /// A node was told that its update is durable.
    ReceiptSent {
        /// Who.
        node: NodeId,
        /// Of which round.
        round: Round,
        /// Of which bytes.
        digest: Digest,
    },
    /// The aggregator's machine asked for the aggregation.
    AggregationAsked {
        /// Of which round.
        round: Round,
        /// From what.
        base: BaseModel,
        /// Of which updates.
        members: Vec<(NodeId, Digest)>,
    },
    /// A new model and its round's end are on the aggregator's disk.
    PublishDurable {
        /// Which round.
        round: Round,
        /// Which version.
        version: ModelVersion,
        /// The model's digest.
        digest: Digest,
        /// The updates in it.
        members: Vec<(NodeId, Digest)>,
    },
    /// A round's end without a model is on the aggregator's disk.
    AbortDurable {
        /// Which round.
        round: Round,
    },
    /// A node was told that a round is over.
    ClosedSent {
        /// Which round.
        round: Round,
    },
    /// The aggregator is back after a crash.
    AggregatorRestarted {
        /// The round it goes on with, and that round's nonce as it announces it.
        resumed: Option<(Round, u64)>,
    },
    /// An edge is back after a crash.
    EdgeRestarted {
        /// Who.
        node: NodeId,
    },
    /// A message of ours could not be written or read.
    CodecFailed {
        /// What the codec said.
        error: String,
    },
}
