//! What the machine tells the driver to do.

use super::BaseModel;
use crate::message::{AnnounceV1, ClosedV1};
use crate::refusal::{AbortReason, RefusalCode};
use crate::units::{Digest, ModelVersion, NodeId, Round};

/// What the driver must do. Every output that asks for an answer gets exactly one.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Persist the round as open, then answer [`Input::Opened`](super::Input::Opened).
    Open {
        /// Its terms, for the record; each node is sent its own by [`Output::Announce`].
        announce: AnnounceV1,
        /// Nodes that it will be announced to, in order: keep them for [`OpenRound::cohort`](super::OpenRound::cohort).
        cohort: Vec<NodeId>,
    },
    /// Send the announcement to these nodes.
    Announce {
        /// To whom, in order.
        to: Vec<NodeId>,
        /// What.
        announce: AnnounceV1,
    },
    /// Tell a node that its update is not taken, and forget the bytes.
    Refuse {
        /// Whom.
        node: NodeId,
        /// The round it named.
        round: Round,
        /// Why.
        code: RefusalCode,
    },
    /// Make the update durable, then answer [`Input::Stored`](super::Input::Stored) or [`Input::StoreFailed`](super::Input::StoreFailed).
    Store {
        /// Whose.
        node: NodeId,
        /// Of which round.
        round: Round,
        /// Of which bytes.
        payload_digest: Digest,
    },
    /// Make an update durable that came after its round had ended, apart from those of the round: it is no part of what the round publishes,
    /// and the next round may use it. Then answer [`Input::Stored`](super::Input::Stored) or [`Input::StoreFailed`](super::Input::StoreFailed).
    StoreLate {
        /// Whose.
        node: NodeId,
        /// Of which round.
        round: Round,
        /// Of which bytes.
        payload_digest: Digest,
    },
    /// Tell a node that its update is durable; also said again for a repeated identical one.
    Receipt {
        /// Whom.
        node: NodeId,
        /// Of which round.
        round: Round,
        /// Of which bytes.
        payload_digest: Digest,
    },
    /// Combine the stored updates, then answer [`Input::Aggregated`](super::Input::Aggregated) or [`Input::AggregationFailed`](super::Input::AggregationFailed).
    Aggregate {
        /// The round.
        round: Round,
        /// The model it builds on.
        base: BaseModel,
        /// The updates, ordered by node.
        members: Vec<(NodeId, Digest)>,
    },
    /// Persist model, members and the round's end in one transaction, then answer [`Input::Published`](super::Input::Published).
    Publish {
        /// The round.
        round: Round,
        /// The new model's version.
        version: ModelVersion,
        /// The new model's digest.
        digest: Digest,
        /// The updates in it, ordered by node.
        members: Vec<(NodeId, Digest)>,
    },
    /// Persist that the round ended without a model, then answer [`Input::Aborted`](super::Input::Aborted).
    Abort {
        /// The round.
        round: Round,
        /// Why.
        reason: AbortReason,
    },
    /// Tell these nodes how the round ended.
    Closed {
        /// To whom, in order.
        to: Vec<NodeId>,
        /// What.
        closed: ClosedV1,
    },
}
