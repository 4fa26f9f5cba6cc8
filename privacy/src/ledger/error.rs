//! Why the ledger cannot be used, and why a release is not charged.

use std::io;
use std::path::{Path, PathBuf};

use theriac_protocol::message::{DeclineReason, UpdateKind};
use theriac_protocol::units::{Digest, Epsilon, NodeId, Round};

use crate::policy::PrivacyUnit;

/// Why the ledger cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// Another process has it open.
    #[error("{path} is in use by another process; stop the other theriac-edge of this state directory")]
    InUse {
        /// The ledger.
        path: PathBuf,
    },
    /// It is the ledger of another node.
    #[error(
        "{path} belongs to node `{found}`, not to `{expected}`; every node keeps its own state directory"
    )]
    OtherNode {
        /// The ledger.
        path: PathBuf,
        /// Who opens it.
        expected: NodeId,
        /// Whose it is.
        found: NodeId,
    },
    /// The policy is for another node.
    #[error("the privacy policy is for site `{found}`, but this node is `{expected}`")]
    OtherSite {
        /// The node.
        expected: NodeId,
        /// The policy's site.
        found: NodeId,
    },
    /// The policy's unit is not the one that the charges were made for.
    #[error(
        "{path} was begun with unit {expected_unit}, block {expected_ms} ms; the policy says {found_unit}, block \
         {found_ms} ms; a ledger keeps its unit: restore it in privacy.toml"
    )]
    UnitChanged {
        /// The ledger.
        path: PathBuf,
        /// Its unit.
        expected_unit: PrivacyUnit,
        /// Its block length.
        expected_ms: u64,
        /// The policy's unit.
        found_unit: PrivacyUnit,
        /// The policy's block length.
        found_ms: u64,
    },
    /// The policy is older than one that was in force.
    #[error(
        "privacy.toml is version {found}, but version {seen} was in force; an older policy is never taken again: restore the \
         newest, or have a version {} signed", .seen + 1
    )]
    PolicyOlder {
        /// Version of the policy.
        found: u64,
        /// Highest version in the ledger.
        seen: u64,
    },
    /// The policy says something else under the same version.
    #[error(
        "privacy.toml says something else than before, but still calls itself version {version}; a changed policy needs a \
         higher version and a new signature"
    )]
    PolicyUnversioned {
        /// Version of both.
        version: u64,
    },
    /// The policy has not come into force yet.
    #[error(
        "version {version} of privacy.toml is not in the ledger yet: start the edge once, which records it"
    )]
    PolicyNotInForce {
        /// Version of the policy.
        version: u64,
    },
    /// The file is damaged elsewhere than in an incomplete last record.
    #[error(
        "{path} is damaged at byte {offset}: {what}; nothing will be trained: keep the file as evidence, find out \
         what happened, and restore a newer or equal copy"
    )]
    Damaged {
        /// The ledger.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What is wrong.
        what: String,
    },
    /// The disk is full. Nothing was written.
    #[error("the disk of {path} is full; nothing was charged: free some space")]
    StorageFull {
        /// The ledger.
        path: PathBuf,
    },
    /// Reading or writing failed. Nothing was charged as far as this process knows.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// The ledger.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A write or sync failed before, so what is on the disk is unknown.
    #[error("{path} could not be written earlier; restart the edge, which reads it again")]
    Broken {
        /// The ledger.
        path: PathBuf,
    },
    /// Bytes are to be marked released that nobody was charged for.
    #[error("round {round}, nonce {nonce}: no charge is recorded; the bytes must not be sent")]
    NotReserved {
        /// The round.
        round: Round,
        /// The nonce.
        nonce: u64,
    },
    /// The file is gone although charges are known to have been made.
    #[error(
        "{path} is missing, but {records} records of it are known to have been written; nothing will be trained: put the \
         file back (the newest copy there is)"
    )]
    Lost {
        /// The ledger.
        path: PathBuf,
        /// Records that were once written.
        records: u64,
    },
    /// The file is an older copy, or another ledger, than the one last written.
    #[error(
        "{path} went backwards: {records} records ending in {head} are known to have been written, this file has \
         {found} and not that one; nothing will be trained: restore a newer or equal copy"
    )]
    WentBackwards {
        /// The ledger.
        path: PathBuf,
        /// Records that were once written.
        records: u64,
        /// Head of the last one.
        head: Digest,
        /// Records in the file.
        found: u64,
    },
    /// Other bytes were released for the same charge.
    #[error("round {round}: {expected} was released, and now {found}; send only the stored bytes")]
    OtherBytes {
        /// The round.
        round: Round,
        /// Digest on record.
        expected: Digest,
        /// Digest that came now.
        found: Digest,
    },
}

/// Why a release is not charged, so not made. Nothing was written and no data were read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReserveError {
    /// The budget does not cover it.
    #[error(
        "privacy budget spent: this release would bring a {unit} to epsilon {epsilon_after:.4} in the period {period}, the policy \
         allows {epsilon_limit}"
    )]
    BudgetSpent {
        /// The unit.
        unit: PrivacyUnit,
        /// The period: `rolling`, or such as `2026-11`.
        period: String,
        /// ε of the most charged unit afterwards.
        epsilon_after: f64,
        /// The policy's limit.
        epsilon_limit: Epsilon,
    },
    /// The node's releases are used up.
    #[error("privacy budget spent: {releases} releases were made, the policy allows {releases_max}")]
    ReleasesSpent {
        /// Releases so far.
        releases: u64,
        /// The policy's limit.
        releases_max: u64,
    },
    /// A block was released as often as the policy allows.
    #[error(
        "block {block} was released {releases} times, the policy allows {releases_max}; plan uncharged blocks"
    )]
    BlockAlreadyCharged {
        /// The block.
        block: u64,
        /// Its releases.
        releases: u32,
        /// The policy's limit.
        releases_max: u32,
    },
    /// The noise is weaker than the policy wants.
    #[error("the round offers noise multiplier {found}, the policy wants at least {expected}")]
    TermsTooWeak {
        /// The policy's floor.
        expected: f64,
        /// The plan's value.
        found: f64,
    },
    /// A step would see a larger part of the data than the policy wants.
    #[error("a sampling rate of {found} is planned, the policy allows at most {expected}")]
    SamplingRateTooHigh {
        /// The policy's ceiling.
        expected: f64,
        /// The plan's value.
        found: f64,
    },
    /// More steps than the policy wants.
    #[error("{found} steps are planned, the policy allows at most {expected}")]
    TooManySteps {
        /// The policy's ceiling.
        expected: u32,
        /// The plan's value.
        found: u32,
    },
    /// The policy's retention is over.
    #[error("block {block} is older than the policy's retention; it is never read again")]
    BlockTooOld {
        /// The block.
        block: u64,
    },
    /// The policy does not allow this kind of release.
    #[error("the policy does not list {kind:?} among its mechanisms")]
    KindNotAllowed {
        /// The kind.
        kind: UpdateKind,
    },
    /// Blocks of another length would be charged under wrong ids.
    #[error("the plan's blocks last {found_ms} ms, the policy's {expected_ms} ms")]
    OtherBlocks {
        /// The policy's length.
        expected_ms: u128,
        /// The plan's length.
        found_ms: u128,
    },
    /// No block is left to read.
    #[error("the plan names no block; wait for a complete, uncharged one")]
    NoBlocks,
    /// The plan contradicts itself.
    #[error("the plan cannot be released: {0}")]
    BadPlan(&'static str),
    /// The ledger cannot be written.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

impl LedgerError {
    pub(super) fn damaged(path: &Path, offset: u64, what: &str) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            offset,
            what: what.to_owned(),
        }
    }
}

impl ReserveError {
    /// What to tell the aggregator.
    pub fn decline_reason(&self) -> DeclineReason {
        match self {
            Self::BudgetSpent { .. } | Self::ReleasesSpent { .. } => DeclineReason::BudgetSpent,
            Self::TermsTooWeak { .. }
            | Self::SamplingRateTooHigh { .. }
            | Self::TooManySteps { .. }
            | Self::OtherBlocks { .. }
            | Self::BadPlan(_) => DeclineReason::TermsTooWeak,
            Self::BlockAlreadyCharged { .. } | Self::BlockTooOld { .. } | Self::NoBlocks => {
                DeclineReason::TooFewBlocks
            }
            Self::KindNotAllowed { .. } => DeclineReason::UnknownLayout,
            Self::Ledger(_) => DeclineReason::StorageUnavailable,
        }
    }

    /// One stable word for metrics and events.
    pub fn word(&self) -> &'static str {
        match self {
            Self::BudgetSpent { .. } => "budget_spent",
            Self::ReleasesSpent { .. } => "releases_spent",
            Self::BlockAlreadyCharged { .. } => "block_already_charged",
            Self::BlockTooOld { .. } => "block_too_old",
            Self::TermsTooWeak { .. } => "noise_too_weak",
            Self::SamplingRateTooHigh { .. } => "sampling_rate_too_high",
            Self::TooManySteps { .. } => "too_many_steps",
            Self::KindNotAllowed { .. } => "kind_not_allowed",
            Self::OtherBlocks { .. } => "other_blocks",
            Self::NoBlocks => "no_blocks",
            Self::BadPlan(_) => "bad_plan",
            Self::Ledger(LedgerError::StorageFull { .. }) => "storage_full",
            Self::Ledger(_) => "ledger",
        }
    }
}
