//! What can be read out of a machine.

use std::collections::BTreeMap;

use super::BaseModel;
use crate::refusal::RefusalCode;
use crate::units::{Moment, Round};

/// Where the machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PhaseName {
    /// No round; waits for the pause to end and for enough nodes.
    Idle,
    /// A round is being made durable; nobody knows of it yet.
    Opening,
    /// A round is announced; updates come in.
    Collecting,
    /// Updates are being combined.
    Aggregating,
    /// The new model is being made durable.
    Publishing,
    /// The end without a model is being made durable.
    Aborting,
    /// No further round will open.
    Closed,
}

/// Why an input changed nothing, on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ignored {
    /// The same bytes again while the first copy is on its way to the disk; the receipt follows.
    RepeatedWhileStoring,
    /// A decline of a round that is not collecting.
    DeclineOutOfTurn,
    /// A refusal of a round that is not collecting, of a node whose update is already there, or the same again.
    RefusalOutOfTurn,
    /// A decline by a node whose update is already there.
    DeclineAfterUpdate,
    /// A decline by a node that has declined.
    DeclineRepeated,
    /// An answer that nothing asked for, or of another round.
    UnexpectedAnswer,
    /// A node that was there came, or one that was not left.
    MembershipUnchanged,
}

/// How often each thing happened since the machine was made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RoundCounters {
    /// Rounds opened (resumed ones not counted).
    pub rounds_opened: u64,
    /// Rounds that published a model.
    pub rounds_published: u64,
    /// Rounds that ended without one.
    pub rounds_aborted: u64,
    /// Updates handed to the store.
    pub updates_taken: u64,
    /// Updates handed to the store after their round's end.
    pub updates_late: u64,
    /// Updates that became durable.
    pub updates_stored: u64,
    /// Identical updates answered with the receipt again.
    pub updates_repeated: u64,
    /// Declines taken.
    pub declines: u64,
    /// Updates refused, by reason.
    pub refused: BTreeMap<RefusalCode, u64>,
    /// Inputs that changed nothing, by reason.
    pub ignored: BTreeMap<Ignored, u64>,
}

/// The machine at a glance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoundStatus {
    /// Where it is.
    pub phase: PhaseName,
    /// The round that is open, else the last one.
    pub round: Round,
    /// The latest published model.
    pub base: BaseModel,
    /// Nodes admitted now.
    pub admitted: usize,
    /// Durable updates of the open round.
    pub stored: usize,
    /// Declines of the open round.
    pub declined: usize,
    /// When the open round stops collecting.
    pub deadline: Option<Moment>,
}
