//! What the driver tells the participant.

use crate::message::{AnnounceV1, ClosedV1, DeclineReason, GateVerdict, ModelV1, ReceiptV1, WelcomeV1};
use crate::refusal::RefusalV1;
use crate::units::{Digest, ModelVersion, Round};

/// What happens to the participant.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// A session is up and the Hello is sent.
    Connected,
    /// The session has ended.
    Disconnected,
    /// The aggregator's answer to the Hello.
    Welcome(WelcomeV1),
    /// A round is open.
    Announce(AnnounceV1),
    /// Something was turned away.
    Refusal(RefusalV1),
    /// The update is durable at the aggregator.
    Receipt(ReceiptV1),
    /// A model has come; the driver holds its payload, already compared with the header's digest and length.
    Model {
        /// Its header.
        header: ModelV1,
    },
    /// A round has ended.
    Closed(ClosedV1),
    /// Answer to [`Output::Train`](super::Output::Train): the encoded update is durable in the outbox.
    Trained {
        /// The round.
        round: Round,
        /// The announcement's nonce.
        nonce: u64,
        /// SHA-256 of the payload.
        payload_digest: Digest,
    },
    /// Answer to [`Output::Train`](super::Output::Train): there will be no update.
    CannotTrain {
        /// The round.
        round: Round,
        /// The announcement's nonce.
        nonce: u64,
        /// Why.
        reason: DeclineReason,
    },
    /// Answer to [`Output::Judge`](super::Output::Judge): the model can be used and is held. Whether it is used is nobody else's business, and
    /// neither is how long that takes to find out: what the gate decides depends on the host's rows, and everything said after a
    /// [`Judged`](Self::Judged) waits for it. So an edge answers thus at once, and judges behind closed doors.
    Held {
        /// The model.
        version: ModelVersion,
    },
    /// Answer to [`Output::Judge`](super::Output::Judge): a verdict to tell. An edge gives only those that depend on no row of its own.
    Judged {
        /// The model.
        version: ModelVersion,
        /// What the gate decided.
        verdict: GateVerdict,
    },
}
