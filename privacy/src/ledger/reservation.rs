//! The plan of a release, and the key to the data that its charge buys.

use std::time::Duration;

use theriac_protocol::message::{PrivacyClaimV1, UpdateKind};
use theriac_protocol::units::{Digest, L2Norm, NoiseMultiplier, Round};

use crate::accountant::Rho;
use crate::policy::PrivacyUnit;
use crate::windows::BlockWindows;

/// One release that is wanted. Everything in here is public: it comes from the announcement and from the clock.
#[derive(Debug, Clone, PartialEq)]
pub struct ReleasePlan {
    /// The round.
    pub round: Round,
    /// Nonce of the announcement.
    pub nonce: u64,
    /// What is released.
    pub kind: UpdateKind,
    /// Number of values, 1 to [`VALUES_MAX`].
    pub values: u32,
    /// Length of one block in time; must equal the policy's.
    pub block_span: Duration,
    /// Ids (Unix time / span) of the blocks that will be read, strictly ascending, at most [`BLOCKS_MAX`].
    /// Empty for a [`UpdateKind::Delta`] that is one vector made of all the node's data; every block is charged then.
    pub blocks: Vec<u64>,
    /// Unit `record`: the windows that each block is cut into, which must be the policy's; each gives one vector. `None`: one vector for each block.
    pub windows: Option<BlockWindows>,
    /// Poisson sampling rate q of one step, above 0, at most 1; 1: every unit is in every step.
    pub sampling_rate: f64,
    /// Steps T, at least 1; all are charged at once.
    pub steps: u32,
    /// Clipping norm C, 1e-9 to 1e12.
    pub clip_norm: L2Norm,
    /// Noise multiplier σ.
    pub noise_multiplier: NoiseMultiplier,
}

/// Names a reservation: a node releases at most once for a round and nonce.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReservationId {
    /// The round.
    pub round: Round,
    /// Nonce of the announcement.
    pub nonce: u64,
}

/// A durable charge: the only key to the data of a release.
///
/// It cannot be copied or made outside of [`Ledger::reserve`](super::Ledger::reserve), and reading the data consumes it, so one charge pays
/// for one noise. Dropping it refunds nothing.
#[derive(Debug)]
pub struct Reservation {
    pub(super) plan: ReleasePlan,
    pub(super) unit: PrivacyUnit,
    pub(super) sensitivity: f64,
    pub(super) rho: Rho,
    pub(super) claim: PrivacyClaimV1,
}

impl Reservation {
    /// Its name.
    pub fn id(&self) -> ReservationId {
        self.plan.id()
    }

    /// What was charged for.
    pub fn plan(&self) -> &ReleasePlan {
        &self.plan
    }

    /// The blocks that may be read.
    pub fn blocks(&self) -> &[u64] {
        &self.plan.blocks
    }

    /// The unit that it was charged for.
    pub fn unit(&self) -> PrivacyUnit {
        self.unit
    }

    /// Sensitivity in multiples of the clipping norm.
    pub fn sensitivity(&self) -> f64 {
        self.sensitivity
    }

    /// Cost of one full-batch step, for the noise's own check.
    pub fn rho(&self) -> Rho {
        self.rho
    }

    /// What the update's header will claim.
    pub fn claim(&self) -> &PrivacyClaimV1 {
        &self.claim
    }
}

impl ReleasePlan {
    /// Vectors that one block may add, each clipped to C over this number.
    pub fn vectors_per_block(&self) -> u32 {
        self.windows.map_or(1, BlockWindows::count)
    }

    /// The name that its reservation would have.
    pub fn id(&self) -> ReservationId {
        ReservationId {
            round: self.round,
            nonce: self.nonce,
        }
    }
}

/// What [`Ledger::reserve`](super::Ledger::reserve) gives.
#[derive(Debug)]
#[must_use]
pub enum Reserved {
    /// A new charge.
    Fresh(Reservation),
    /// This round and nonce were charged before. Send the stored bytes; if they were lost, send nothing: new noise
    /// on the same charge would not be covered.
    AlreadyCharged {
        /// Which reservation.
        id: ReservationId,
        /// Digest of the released bytes, when it came that far.
        payload_digest: Option<Digest>,
    },
}

/// Most values of one release.
pub const VALUES_MAX: u32 = 1 << 24;
/// Most blocks of one release: the sum stays exact in 53 bits.
pub const BLOCKS_MAX: usize = 1 << 18;
