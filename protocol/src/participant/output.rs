//! What the participant tells the driver to do.

use crate::message::{AnnounceV1, DeclineReason, DeclineV1, GateVerdict, VerdictV1};
use crate::refusal::{RefusalCode, RoundOutcome};
use crate::units::{ModelVersion, Round};

/// What the driver must do.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Charge the ledger, train, write the encoded update to the outbox, then answer [`Input::Trained`](super::Input::Trained) or
    /// [`Input::CannotTrain`](super::Input::CannotTrain).
    Train {
        /// The terms.
        announce: AnnounceV1,
    },
    /// Stop training; an answer that still comes is harmless.
    CancelTraining {
        /// Of which round.
        round: Round,
    },
    /// Send the outbox's bytes exactly as they are.
    SendUpdate {
        /// Of which round.
        round: Round,
    },
    /// Say that no update will come.
    SendDecline(DeclineV1),
    /// Ask for a model.
    FetchModel {
        /// Which.
        version: ModelVersion,
    },
    /// Hold the model that has just come and answer, without a look at any row, [`Input::Held`](super::Input::Held) or
    /// [`Input::Judged`](super::Input::Judged).
    Judge {
        /// Which.
        version: ModelVersion,
    },
    /// Tell what became of a model.
    SendVerdict(VerdictV1),
    /// The round is over: remove its row from the outbox.
    DropOutbox {
        /// Of which round.
        round: Round,
    },
    /// Something that people and metrics want to know.
    Report(ParticipantEvent),
}

/// Something that people and metrics want to know.
#[derive(Debug, Clone, PartialEq)]
pub enum ParticipantEvent {
    /// The session is admitted: the edge is connected.
    Welcomed,
    /// Local training for a round has begun.
    TrainingStarted {
        /// Which.
        round: Round,
    },
    /// The edge takes no part.
    Declined {
        /// In which round.
        round: Round,
        /// Why.
        reason: DeclineReason,
    },
    /// The update is durable at the aggregator.
    Acknowledged {
        /// Of which round.
        round: Round,
    },
    /// The aggregator turned something away.
    Refused {
        /// The round it concerns.
        round: Option<Round>,
        /// Why.
        code: RefusalCode,
    },
    /// A round that the edge took part in is over.
    RoundOver {
        /// Which.
        round: Round,
        /// How it ended, when that is known.
        outcome: Option<RoundOutcome>,
        /// Whether the edge's update was durable at the aggregator.
        acknowledged: bool,
    },
    /// The gate has judged a model.
    ModelJudged {
        /// Which.
        version: ModelVersion,
        /// What it decided.
        verdict: GateVerdict,
    },
    /// A model could not be had.
    ModelUnavailable {
        /// Which.
        version: ModelVersion,
    },
}
