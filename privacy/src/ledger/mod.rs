//! The durable ledger of privacy charges.
//!
//! A charge is written and synced **before** data are read, so a crash can only over-count. Nothing is ever refunded. The file
//! (`chain.rs`) is append-only and hash-chained; its records (`record.rs`) are JSON that a third party can recompute.
//!
//! Only one damage is repaired: an incomplete *last* record, whose write had not returned, so nothing was read for it. Any
//! other damage is an error naming file and offset, and nothing is trained until a person has looked.
//!
//! Clocks do no harm: a block's id is fixed when it is measured, and a block that was charged stays charged whatever the
//! clock says later. A clock that goes back brings no earlier period of the budget back.
//!
//! The loss is kept **by block**, as a curve over Rényi orders ([`loss`]): a block's vector enters only the releases that name the block, so
//! each block's loss is the sum of those, and the node's figure is the largest over all blocks.

mod chain;
mod charges;
mod error;
mod export;
pub mod loss;
mod open;
mod plan;
mod record;
mod reservation;
mod state;

use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use theriac_protocol::message::PrivacyClaimV1;
use theriac_protocol::units::{Delta, Digest, Epsilon, Timestamp};

use self::chain::Chain;
pub(crate) use self::charges::Charge as BlockCharge;
pub use self::error::{LedgerError, ReserveError};
pub(crate) use self::export::{ChargedTerms, ReadRecord, Replayed, charged_terms, replay_exported};
use self::record::Record;
pub use self::record::Seal;
pub(crate) use self::record::{Charge, PolicyNote};
pub use self::reservation::{BLOCKS_MAX, ReleasePlan, Reservation, ReservationId, Reserved, VALUES_MAX};
pub(crate) use self::state::{Owner, State};
use crate::accountant::Rho;
use crate::noise::{NoEntropy, SecureSource};
use crate::policy::{Period, Policy};
use crate::report::Status;

/// What was spent so far.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spent {
    /// ε of the most charged unit in the current period, at `delta`: what the policy limits. 0 when nothing was released.
    pub epsilon: f64,
    /// The Rényi order that gives it.
    pub order: u32,
    /// Kind of the period.
    pub period: Period,
    /// Its number, as of the last charge.
    pub period_index: u64,
    /// The policy's limit.
    pub epsilon_limit: Epsilon,
    /// ε of the most charged unit over all time: the node's statement.
    pub epsilon_unit_lifetime: f64,
    /// ε of all releases together, as if every one had read the same unit: what somebody loses whose data are in every block.
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

    /// What all records add up to.
    pub(crate) fn state(&self) -> &State {
        &self.state
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
    pub fn check(&self, plan: &ReleasePlan, now: Timestamp) -> Result<(), ReserveError> {
        if self.chain.is_broken() {
            return Err(LedgerError::Broken {
                path: self.path.clone(),
            }
            .into());
        }
        self.state.charge_of(&self.policy, plan, now).map(drop)
    }

    /// Charges a release. When this returns [`Reserved::Fresh`] the charge is durable, and only then may data be read.
    ///
    /// A repeated round and nonce is not charged again and gives no key to the data: [`Reserved::AlreadyCharged`].
    /// `now` decides only which period a calendar budget is charged in (never an earlier one than before) and which blocks are past their
    /// retention.
    ///
    /// # Errors
    /// [`ReserveError`]; then nothing is charged, and the state is as before.
    pub fn reserve(&mut self, plan: ReleasePlan, now: Timestamp) -> Result<Reserved, ReserveError> {
        let id = plan.id();
        if let Some(&payload_digest) = self.state.reservations.get(&id) {
            return Ok(Reserved::AlreadyCharged { id, payload_digest });
        }
        let mut charge = self.state.charge_of(&self.policy, &plan, now)?;
        charge.salt = Some(salt().map_err(|source| LedgerError::Io {
            path: self.path.clone(),
            action: "draw a salt for",
            source: io::Error::other(source),
        })?);
        let sensitivity = charge.sensitivity;
        let rho = Rho::gaussian(sensitivity, plan.noise_multiplier);
        self.append(&Record::Charge(Box::new(charge)))?;
        let spent = self.spent();
        // The header knows no ε of 0; `charge_of` has held the figure to the limit.
        let epsilon_spent =
            Epsilon::new(spent.epsilon_unit_lifetime.max(f64::MIN_POSITIVE)).unwrap_or(spent.epsilon_limit);
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
            unit: self.policy.unit(),
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
        self.state.lifetime.blocks.of(block).releases < self.policy.block_releases_max()
    }

    /// As [`Ledger::is_chargeable`], and whether the block is within the policy's retention at `now`.
    pub fn is_chargeable_at(&self, block: u64, now: Timestamp) -> bool {
        self.is_chargeable(block) && !plan::is_too_old(&self.policy, block, now)
    }

    /// Those of the plan's blocks that could be charged for it at `now`: within the policy's retention, read less often than it allows, and
    /// within its ε afterwards. Rounds that read the same blocks again ask this before they plan: a spent block must not keep
    /// the others from being read. It depends on charges and the clock alone.
    pub fn affordable(&self, plan: &ReleasePlan, now: Timestamp) -> Vec<u64> {
        let mut blocks = self.state.affordable(&self.policy, plan, now);
        blocks.retain(|block| !plan::is_too_old(&self.policy, *block, now));
        blocks
    }

    /// The blocks that were charged, as ascending runs.
    pub fn charged_blocks(&self) -> Vec<RangeInclusive<u64>> {
        self.state.lifetime.blocks.ranges()
    }

    /// Whether the chain ever had this head. A head that somebody saw and that is missing here means that the
    /// ledger went backwards.
    pub fn contains_head(&self, head: &Digest) -> bool {
        *head == Digest::default() || self.chain.heads().contains(head)
    }

    /// Whether the chain holds this position. One that somebody has signed and that is missing here means that the ledger went
    /// backwards, even if it grew since.
    pub fn holds(&self, known: &KnownHead) -> bool {
        known.records == 0 || open::holds(self.chain.heads(), known)
    }

    /// The last counter-signature of the aggregator.
    pub fn seal(&self) -> Option<&Seal> {
        self.state.seal.as_ref()
    }

    /// Keeps a counter-signature of the aggregator. The caller has checked its signature.
    ///
    /// # Errors
    /// [`LedgerError::WentBackwards`] when this ledger never was where the seal says, or a failed write.
    pub fn keep_seal(&mut self, seal: Seal) -> Result<(), LedgerError> {
        let known = KnownHead {
            head: seal.head,
            records: seal.records,
        };
        if !self.holds(&known) {
            return Err(LedgerError::WentBackwards {
                path: self.path.clone(),
                records: known.records,
                head: known.head,
                found: self.chain.heads().len() as u64,
            });
        }
        if self
            .state
            .seal
            .as_ref()
            .is_some_and(|last| last.records >= seal.records)
        {
            return Ok(());
        }
        self.append(&Record::Sealed(seal))
    }

    /// Appends durably, then counts it.
    fn append(&mut self, record: &Record) -> Result<(), LedgerError> {
        let path = || self.path.clone();
        if self.chain.is_broken() {
            return Err(LedgerError::Broken { path: path() });
        }
        let body = record.to_bytes();
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
        // Counted from the bytes, so that reading the file again gives the very same numbers. What cannot be counted is on the disk
        // all the same: then nothing more is charged until the file has been read again.
        self.state.take(&body).map_err(|what| {
            self.chain.break_off();
            LedgerError::Io {
                path: path(),
                action: "count a record of",
                source: io::Error::new(io::ErrorKind::InvalidData, what),
            }
        })
    }
}

/// 128 random bits, 32 hexadecimal digits: heads are told, and all else in a charge but the blocks and the millisecond can be guessed.
fn salt() -> Result<String, NoEntropy> {
    let mut source = SecureSource::from_system()?;
    Ok(format!("{:016x}{:016x}", source.bits(), source.bits()))
}

#[cfg(test)]
mod tests;
