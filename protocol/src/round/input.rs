//! What the driver tells the machine.

use crate::message::DeclineReason;
use crate::units::{Digest, ModelVersion, NodeId, Round};

/// What happens to the machine.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// A node has been authenticated, admitted and sent its Welcome.
    Admitted {
        /// Who.
        node: NodeId,
    },
    /// A node's last session has ended.
    Left {
        /// Who.
        node: NodeId,
    },
    /// A node sent an update that validation has passed; its bytes are held by the driver, not yet durable.
    Update {
        /// Who, out of the certificate.
        node: NodeId,
        /// The round it names.
        round: Round,
        /// The nonce it repeats.
        nonce: u64,
        /// The base model it names.
        base_digest: Digest,
        /// SHA-256 of the payload.
        payload_digest: Digest,
    },
    /// A node takes no part.
    Declined {
        /// Who.
        node: NodeId,
        /// The round it names.
        round: Round,
        /// Why.
        reason: DeclineReason,
    },
    /// A node's update for this round was refused for good, and that is on record: nobody waits for the node any more. A valid update
    /// of it is still taken.
    Refused {
        /// Who.
        node: NodeId,
        /// The round it named.
        round: Round,
        /// Whether no honest node sends such a thing: then it stands in for an update, as one of the f.
        faulty: bool,
    },
    /// Answer to [`Output::Store`](super::Output::Store): the update is durable.
    Stored {
        /// Whose.
        node: NodeId,
        /// Of which round.
        round: Round,
    },
    /// Answer to [`Output::Store`](super::Output::Store): it could not be made durable, and no trace of it is left.
    StoreFailed {
        /// Whose.
        node: NodeId,
        /// Of which round.
        round: Round,
    },
    /// Answer to [`Output::Open`](super::Output::Open): the open round is durable.
    Opened {
        /// Which.
        round: Round,
    },
    /// Answer to [`Output::Aggregate`](super::Output::Aggregate): the new model is computed.
    Aggregated {
        /// Of which round.
        round: Round,
        /// The version after the base.
        version: ModelVersion,
        /// Digest of the new payload.
        digest: Digest,
    },
    /// Answer to [`Output::Aggregate`](super::Output::Aggregate): the rule gave no model.
    AggregationFailed {
        /// Of which round.
        round: Round,
    },
    /// Answer to [`Output::Publish`](super::Output::Publish): the new model is durable.
    Published {
        /// Of which round.
        round: Round,
    },
    /// Answer to [`Output::Abort`](super::Output::Abort): the end of the round is durable.
    Aborted {
        /// Which.
        round: Round,
    },
    /// Open no further round; a running one goes to its end.
    Stop,
}
