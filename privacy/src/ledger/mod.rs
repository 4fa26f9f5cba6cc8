//! The durable ledger of privacy charges.
//!
//! A charge is written and synced **before** data are read, so a crash can only over-count. Nothing is ever refunded. The file
//! (`chain.rs`) is append-only and hash-chained; its records (`record.rs`) are JSON that a third party can recompute.
//!
//! Only one damage is repaired: an incomplete *last* record, whose write had not returned, so nothing was read for it. Any
//! other damage is an error naming file and offset, and nothing is trained until a person has looked.
//!
//! Clocks do no harm: a block's id is fixed when it is measured, and a block that was charged stays charged whatever the
//! clock says later.

mod chain;
mod charges;
mod open;
mod record;
mod reservation;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use theriac_protocol::message::{DeclineReason, PrivacyClaimV1, UpdateKind};
use theriac_protocol::units::{Delta, Digest, Epsilon, NodeId, Round, Timestamp};

use self::chain::Chain;
use self::charges::{BlockCharges, to_ranges};
use self::record::{Charged, Record};
pub use self::reservation::{BLOCKS_MAX, ReleasePlan, Reservation, ReservationId, Reserved, VALUES_MAX};
use crate::accountant::Rho;
use crate::policy::{Policy, PrivacyUnit};
use crate::report::Status;

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
        "privacy budget spent: this release would bring a {unit} to epsilon {epsilon_after:.4}, the policy allows {epsilon_limit}"
    )]
    BudgetSpent {
        /// The unit.
        unit: PrivacyUnit,
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

impl ReserveError {
    /// What to tell the aggregator.
    pub fn decline_reason(&self) -> DeclineReason {
        match self {
            Self::BudgetSpent { .. } | Self::ReleasesSpent { .. } => DeclineReason::BudgetSpent,
            Self::TermsTooWeak { .. } | Self::OtherBlocks { .. } | Self::BadPlan(_) => {
                DeclineReason::TermsTooWeak
            }
            Self::BlockAlreadyCharged { .. } | Self::NoBlocks => DeclineReason::TooFewBlocks,
            Self::KindNotAllowed { .. } => DeclineReason::UnknownLayout,
            Self::Ledger(_) => DeclineReason::StorageUnavailable,
        }
    }
}

/// What was spent so far.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spent {
    /// ρ of the most charged unit.
    pub rho: Rho,
    /// Its ε at `delta`: the node's statement. 0 when nothing was released.
    pub epsilon: f64,
    /// The policy's limit on it.
    pub epsilon_limit: Epsilon,
    /// ρ of all releases together, as if every one had read the same unit.
    pub rho_lifetime: Rho,
    /// ε of that at `delta`: what somebody loses whose data are in every block.
    pub epsilon_lifetime: f64,
    /// δ of the policy.
    pub delta: Delta,
    /// Releases that were charged.
    pub releases: u64,
    /// Head of the chain.
    pub head: Digest,
    /// Records in the chain.
    pub records: u64,
}

/// How far a ledger is known to have come, kept outside of its file: a ledger that does not hold this head was lost or
/// rolled back, and what it says was spent is too little.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownHead {
    /// Head of the chain.
    pub head: Digest,
    /// Records up to it.
    pub records: u64,
}

/// The open ledger of one node. Only one process holds it.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    policy: Policy,
    chain: Chain,
    state: State,
    opening: Opening,
    /// Held for as long as the ledger lives.
    lock: Option<File>,
}

/// What [`Ledger::open`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opening {
    /// There was no ledger, so one was begun. A node that released before and finds this has lost its ledger.
    pub created: bool,
    /// Bytes of an incomplete last record that were cut off.
    pub torn_bytes: u64,
}

impl Ledger {
    /// What was found when it was opened.
    pub fn opening(&self) -> Opening {
        self.opening
    }

    /// The policy in force.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// What was spent so far.
    pub fn spent(&self) -> Spent {
        self.state.spent(&self.policy, self.chain.heads())
    }

    /// How far it has come: keep it elsewhere after each reservation and release, for [`Ledger::open_known`].
    pub fn known_head(&self) -> KnownHead {
        let heads = self.chain.heads();
        KnownHead {
            head: heads.last().copied().unwrap_or_default(),
            records: heads.len() as u64,
        }
    }

    /// Everything that `privacy status` shows.
    pub fn status(&self) -> Status {
        Status::new(&self.state, &self.policy, self.spent())
    }

    /// Whether `plan` would be charged now. Writes nothing.
    ///
    /// # Errors
    /// The [`ReserveError`] that [`Ledger::reserve`] would give.
    pub fn check(&self, plan: &ReleasePlan) -> Result<(), ReserveError> {
        if self.chain.is_broken() {
            return Err(LedgerError::Broken {
                path: self.path.clone(),
            }
            .into());
        }
        self.state
            .charge_of(&self.policy, plan, Timestamp::default())
            .map(drop)
    }

    /// Charges a release. When this returns [`Reserved::Fresh`] the charge is durable, and only then may data be read.
    ///
    /// A repeated round and nonce is not charged again and gives no key to the data: [`Reserved::AlreadyCharged`].
    /// `now` is written for people; nothing is decided by it.
    ///
    /// # Errors
    /// [`ReserveError`]; then nothing is charged, and the state is as before.
    pub fn reserve(&mut self, plan: ReleasePlan, now: Timestamp) -> Result<Reserved, ReserveError> {
        let id = plan.id();
        if let Some(&payload_digest) = self.state.reservations.get(&id) {
            return Ok(Reserved::AlreadyCharged { id, payload_digest });
        }
        let charged = self.state.charge_of(&self.policy, &plan, now)?;
        let (sensitivity, rho) = (charged.sensitivity, Rho::new(charged.rho));
        self.append(&Record::Reserve(charged))?;
        let spent = self.spent();
        // The header knows no ε of 0; `charge_of` has held the figure to the limit.
        let epsilon_spent = Epsilon::new(spent.epsilon.max(f64::MIN_POSITIVE)).unwrap_or(spent.epsilon_limit);
        let claim = PrivacyClaimV1 {
            clip_norm: plan.clip_norm,
            noise_multiplier: plan.noise_multiplier,
            epsilon_spent,
            delta: spent.delta,
            ledger_head: spent.head,
            ledger_records: spent.records,
        };
        Ok(Reserved::Fresh(Reservation {
            plan,
            sensitivity,
            rho,
            claim,
        }))
    }

    /// Records that the noised bytes of a reservation exist. Call it when they are safe in the outbox, before they are sent.
    /// Saying the same again is harmless.
    ///
    /// # Errors
    /// [`LedgerError::NotReserved`], [`LedgerError::OtherBytes`], or a failed write; none of them refunds anything.
    pub fn mark_released(
        &mut self,
        id: ReservationId,
        payload_digest: Digest,
        now: Timestamp,
    ) -> Result<(), LedgerError> {
        let ReservationId { round, nonce } = id;
        match self.state.reservations.get(&id) {
            None => Err(LedgerError::NotReserved { round, nonce }),
            Some(Some(expected)) if *expected == payload_digest => Ok(()),
            Some(Some(expected)) => Err(LedgerError::OtherBytes {
                round,
                expected: *expected,
                found: payload_digest,
            }),
            Some(None) => self.append(&Record::Released {
                round,
                nonce,
                payload: payload_digest,
                at: now,
            }),
        }
    }

    /// Whether a release was charged, and the digest of its bytes when it came that far.
    pub fn reservation(&self, id: ReservationId) -> Option<Option<Digest>> {
        self.state.reservations.get(&id).copied()
    }

    /// Whether the policy lets this block be read once more. (ε may still forbid it.)
    pub fn is_chargeable(&self, block: u64) -> bool {
        self.state.blocks.of(block).releases < self.policy.block_releases_max()
    }

    /// The blocks that were charged, as ascending runs.
    pub fn charged_blocks(&self) -> Vec<RangeInclusive<u64>> {
        self.state.blocks.ranges()
    }

    /// Whether the chain ever had this head. A head that somebody saw and that is missing here means that the
    /// ledger went backwards.
    pub fn contains_head(&self, head: &Digest) -> bool {
        *head == Digest::default() || self.chain.heads().contains(head)
    }

    /// Appends durably, then counts it.
    fn append(&mut self, record: &Record) -> Result<(), LedgerError> {
        let path = || self.path.clone();
        if self.chain.is_broken() {
            return Err(LedgerError::Broken { path: path() });
        }
        let body = record.to_bytes();
        // Counted from the bytes, so that reading the file again gives the very same numbers.
        let next = self.state.clone().after(&body).map_err(|what| LedgerError::Io {
            path: path(),
            action: "write a record to",
            source: io::Error::new(io::ErrorKind::InvalidData, what),
        })?;
        self.chain.append(&body).map_err(|source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                LedgerError::StorageFull { path: path() }
            }
            _ => LedgerError::Io {
                path: path(),
                action: "write to",
                source,
            },
        })?;
        self.state = next;
        Ok(())
    }
}

/// What the records add up to.
#[derive(Debug, Clone, Default)]
pub(crate) struct State {
    pub(crate) owner: Option<Owner>,
    pub(crate) policy_hash: Digest,
    pub(crate) blocks: BlockCharges,
    /// ρ of releases made of all the node's data: every block bears it.
    pub(crate) rho_node: Rho,
    pub(crate) rho_lifetime: Rho,
    pub(crate) releases: u64,
    reservations: BTreeMap<ReservationId, Option<Digest>>,
}

/// What the first record says.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Owner {
    pub(crate) node: NodeId,
    pub(crate) unit: PrivacyUnit,
    pub(crate) block_ms: u64,
}

impl State {
    /// The state after one more record, or what is wrong with the record.
    fn after(mut self, body: &[u8]) -> Result<Self, &'static str> {
        let record: Record = serde_json::from_slice(body).map_err(|_| "a record does not parse")?;
        match record {
            Record::Genesis {
                node, unit, block_ms, ..
            } if self.owner.is_none() => {
                self.owner = Some(Owner { node, unit, block_ms });
            }
            Record::Genesis { .. } => return Err("a second first record"),
            _ if self.owner.is_none() => return Err("the first record is missing"),
            Record::Policy { hash, .. } => self.policy_hash = hash,
            Record::Reserve(charged) => self.charge(&charged)?,
            Record::Released {
                round,
                nonce,
                payload,
                ..
            } => {
                let slot = self.reservations.get_mut(&ReservationId { round, nonce });
                match slot {
                    Some(released @ None) => *released = Some(payload),
                    _ => return Err("a release without its charge, or a second one"),
                }
            }
        }
        Ok(self)
    }

    fn charge(&mut self, charged: &Charged) -> Result<(), &'static str> {
        if !charged.is_consistent() {
            return Err("a charge does not follow from its terms");
        }
        let id = ReservationId {
            round: charged.round,
            nonce: charged.nonce,
        };
        if self.reservations.insert(id, None).is_some() {
            return Err("a round was charged twice");
        }
        let rho = Rho::new(charged.rho);
        match charged.kind {
            UpdateKind::Moments => {
                charged
                    .blocks
                    .iter()
                    .for_each(|(first, last)| self.blocks.add(*first..=*last, rho));
            }
            UpdateKind::Delta => self.rho_node = self.rho_node.plus(rho),
        }
        self.rho_lifetime = self.rho_lifetime.plus(rho);
        self.releases += 1;
        Ok(())
    }

    /// The charge of `plan`, or why it is not made.
    fn charge_of(&self, policy: &Policy, plan: &ReleasePlan, at: Timestamp) -> Result<Charged, ReserveError> {
        let blocks = check_plan(policy, plan)?;
        if let Some(releases_max) = policy.releases_max().filter(|max| self.releases >= *max) {
            return Err(ReserveError::ReleasesSpent {
                releases: self.releases,
                releases_max,
            });
        }
        let sensitivity = policy.unit().sensitivity(plan.kind);
        let rho = Rho::gaussian(sensitivity, plan.noise_multiplier);
        let mut fullest = self.blocks.rho_max();
        for block in &plan.blocks {
            let charge = self.blocks.of(*block);
            if charge.releases >= policy.block_releases_max() {
                return Err(ReserveError::BlockAlreadyCharged {
                    block: *block,
                    releases: charge.releases,
                    releases_max: policy.block_releases_max(),
                });
            }
            fullest = fullest.max(charge.rho.plus(rho));
        }
        let node = match plan.kind {
            UpdateKind::Moments => self.rho_node,
            UpdateKind::Delta => self.rho_node.plus(rho),
        };
        let epsilon_after = fullest.plus(node).epsilon(policy.delta());
        let epsilon_limit = policy.epsilon();
        // Not `>`: what is not a number must refuse.
        let covered = epsilon_after <= epsilon_limit.value();
        if !covered {
            return Err(ReserveError::BudgetSpent {
                unit: policy.unit(),
                epsilon_after,
                epsilon_limit,
            });
        }
        Ok(Charged {
            round: plan.round,
            nonce: plan.nonce,
            kind: plan.kind,
            values: plan.values,
            blocks,
            clip_norm: plan.clip_norm,
            noise_multiplier: plan.noise_multiplier,
            sensitivity,
            rho: rho.value(),
            policy: policy.hash(),
            at,
        })
    }

    pub(crate) fn spent(&self, policy: &Policy, heads: &[Digest]) -> Spent {
        let rho = self.blocks.rho_max().plus(self.rho_node);
        Spent {
            rho,
            epsilon: rho.epsilon(policy.delta()),
            epsilon_limit: policy.epsilon(),
            rho_lifetime: self.rho_lifetime,
            epsilon_lifetime: self.rho_lifetime.epsilon(policy.delta()),
            delta: policy.delta(),
            releases: self.releases,
            head: heads.last().copied().unwrap_or_default(),
            records: heads.len() as u64,
        }
    }
}

/// Checks what does not depend on earlier charges; gives the plan's blocks as runs.
fn check_plan(policy: &Policy, plan: &ReleasePlan) -> Result<Vec<(u64, u64)>, ReserveError> {
    if !policy.allows(plan.kind) {
        return Err(ReserveError::KindNotAllowed { kind: plan.kind });
    }
    let (expected, found) = (
        policy.noise_multiplier_min().value(),
        plan.noise_multiplier.value(),
    );
    if found < expected {
        return Err(ReserveError::TermsTooWeak { expected, found });
    }
    if plan.block_span != policy.block_span() {
        let (expected_ms, found_ms) = (policy.block_span().as_millis(), plan.block_span.as_millis());
        return Err(ReserveError::OtherBlocks {
            expected_ms,
            found_ms,
        });
    }
    if plan.values == 0 || plan.values > VALUES_MAX {
        return Err(ReserveError::BadPlan("a release holds 1 to 16777216 values"));
    }
    if !CLIP_NORM.contains(&plan.clip_norm.value()) {
        return Err(ReserveError::BadPlan(
            "the clipping norm must lie between 1e-9 and 1e12",
        ));
    }
    match plan.kind {
        UpdateKind::Delta if !plan.blocks.is_empty() => Err(ReserveError::BadPlan(
            "a weight delta is made of all data: it names no blocks",
        )),
        UpdateKind::Moments if plan.blocks.is_empty() => Err(ReserveError::NoBlocks),
        UpdateKind::Moments if plan.blocks.len() > BLOCKS_MAX => {
            Err(ReserveError::BadPlan("one release reads at most 262144 blocks"))
        }
        UpdateKind::Moments | UpdateKind::Delta => {
            to_ranges(&plan.blocks).ok_or(ReserveError::BadPlan("block ids must strictly ascend"))
        }
    }
}

const CLIP_NORM: RangeInclusive<f64> = 1e-9..=1e12;

#[cfg(test)]
mod tests;
