//! What can be read out of a participant.

use std::collections::BTreeMap;

use crate::refusal::RefusalCode;
use crate::round::BaseModel;
use crate::units::Round;

/// Where the participant is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PhaseName {
    /// Nothing to do.
    Idle,
    /// An update is being made.
    Training,
    /// An update is in the outbox.
    Reporting,
    /// A model is being fetched or judged.
    Applying,
}

/// Why an input changed nothing, on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ignored {
    /// Came outside an admitted session.
    NotWelcomed,
    /// A Welcome within an admitted session.
    WelcomeRepeated,
    /// The same announcement again.
    AnnounceRepeated,
    /// An announcement older than one of this session.
    AnnounceStale,
    /// The end of a round in which the edge has no part now.
    ClosedElsewhere,
    /// A receipt for something that is not in the outbox.
    ReceiptUnknown,
    /// A receipt that was there already.
    ReceiptRepeated,
    /// A refusal of nothing that is under way.
    RefusalElsewhere,
    /// A model that was not asked for.
    ModelUnexpected,
    /// An answer that nothing asked for, or of another round.
    UnexpectedAnswer,
}

/// How often each thing happened since the participant was made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ParticipantCounters {
    /// Trainings begun.
    pub trainings: u64,
    /// Updates sent, repeats included.
    pub updates_sent: u64,
    /// Updates acknowledged.
    pub acknowledged: u64,
    /// Rounds declined.
    pub declines: u64,
    /// Refusals received, by reason.
    pub refused: BTreeMap<RefusalCode, u64>,
    /// Inputs that changed nothing, by reason.
    pub ignored: BTreeMap<Ignored, u64>,
}

/// The participant at a glance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParticipantStatus {
    /// Where it is.
    pub phase: PhaseName,
    /// Whether the session is admitted.
    pub welcomed: bool,
    /// The round at hand, else the last one it took part in or declined.
    pub round: Option<Round>,
    /// The latest model it holds.
    pub model: BaseModel,
}
