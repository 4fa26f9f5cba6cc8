//! From data to bytes, one type for each step; the only way out of a node.
//!
//! ```text
//! Reservation → LocalUpdate → ClippedUpdate → NoisyUpdate → CompressedUpdate
//! ```
//!
//! Each step consumes the one before. The values are private up to and including [`ClippedUpdate`]; a [`NoisyUpdate`] and all that
//! is made of it are post-processing, which costs no privacy.
//!
//! A [`CompressedUpdate`] cannot be made without a reservation:
//!
//! ```compile_fail,E0451
//! let update = theriac_privacy::update::CompressedUpdate { payload: bytes::Bytes::new() };
//! ```
//!
//! nor can a reservation be made without the ledger:
//!
//! ```compile_fail,E0451
//! # fn forge(plan: theriac_privacy::ledger::ReleasePlan) {
//! let reservation = theriac_privacy::ledger::Reservation { plan };
//! # }
//! ```
//!
//! nor used twice, because reading the data consumes it:
//!
//! ```compile_fail,E0382
//! use theriac_privacy::{ledger::Reservation, update::LocalUpdate};
//! # fn twice(reservation: Reservation, layout: theriac_protocol::units::Digest) {
//! let first = LocalUpdate::delta(reservation, layout, || vec![1.0]);
//! let second = LocalUpdate::delta(reservation, layout, || vec![1.0]);
//! # }
//! ```
//!
//! nor can a step be left out:
//!
//! ```compile_fail,E0599
//! # fn skip(local: theriac_privacy::update::LocalUpdate) {
//! let sent = local.clip().compress(|| 0.5);
//! # }
//! ```
//!
//! nor can anybody else bring a noise of their own:
//!
//! ```compile_fail,E0277
//! #[derive(Debug)]
//! struct Silence;
//! impl theriac_privacy::noise::NoiseMechanism for Silence {}
//! ```

use std::fmt;

use bytes::Bytes;
use theriac_protocol::compress::encode_int8;
use theriac_protocol::message::{Encoding, PrivacyClaimV1, UpdateKind, UpdateV1};
use theriac_protocol::units::Digest;

use crate::clip::GridSum;
use crate::ledger::{ReleasePlan, Reservation, ReservationId};
use crate::noise::{NoiseError, NoiseMechanism, release};

/// Why no update came of a reservation. The charge stays.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UpdateError {
    /// The reservation is for another kind of update.
    #[error("the reservation is for {reserved:?}, not for {asked:?}")]
    OtherKind {
        /// What was charged.
        reserved: UpdateKind,
        /// What was asked.
        asked: UpdateKind,
    },
    /// A unit has another number of values than was announced.
    #[error("a unit holds {found} values, the round's layout has {expected}")]
    WrongLength {
        /// The announced number.
        expected: usize,
        /// The number that came.
        found: usize,
    },
    /// More units came than were charged: they could not all be bounded by the charge.
    #[error("{found} vectors were read, only {charged} were charged")]
    TooManyUnits {
        /// Vectors that the charge covers: one for each block, or for each window of it.
        charged: usize,
        /// Vectors that came.
        found: usize,
    },
    /// A weight change bears on all data at once, and its charge says otherwise.
    #[error("a weight change bears on all data: its charge must name no blocks, one step and no sampling")]
    PartialCharge,
    /// No noise could be added.
    #[error(transparent)]
    Noise(#[from] NoiseError),
}

/// What is carried along from the reservation to the message; all of it is public.
#[derive(Debug, Clone, PartialEq)]
struct Terms {
    plan: ReleasePlan,
    layout_digest: Digest,
    claim: PrivacyClaimV1,
}

/// The units' vectors, unclipped. Nothing in here can be read out again.
pub struct LocalUpdate {
    terms: Terms,
    reservation: Reservation,
    units: Vec<Vec<f32>>,
}

impl LocalUpdate {
    /// Reads the charged blocks. `read` gets their ids and gives one vector of `plan.values` numbers for each block that holds
    /// data; blocks without data may be left out. Where the charge names windows, one vector for each window that is whole, of its samples alone: every
    /// sample in at most [`BlockWindows::multiplicity`](crate::windows::BlockWindows::multiplicity) of them.
    ///
    /// # Errors
    /// [`UpdateError::OtherKind`] before `read` is called, [`UpdateError::WrongLength`] and [`UpdateError::TooManyUnits`] after.
    pub fn moments(
        reservation: Reservation,
        layout_digest: Digest,
        read: impl FnOnce(&[u64]) -> Vec<Vec<f32>>,
    ) -> Result<Self, UpdateError> {
        check_kind(&reservation, UpdateKind::Moments)?;
        let units = read(reservation.blocks());
        Self::of(reservation, layout_digest, units)
    }

    /// As [`LocalUpdate::moments`], for one round of gradients: `read` gives one gradient for each charged block that holds data, all taken
    /// at the same weights, which are public.
    ///
    /// # Errors
    /// As for [`LocalUpdate::moments`].
    pub fn gradient(
        reservation: Reservation,
        layout_digest: Digest,
        read: impl FnOnce(&[u64]) -> Vec<Vec<f32>>,
    ) -> Result<Self, UpdateError> {
        check_kind(&reservation, UpdateKind::Gradient)?;
        let units = read(reservation.blocks());
        Self::of(reservation, layout_digest, units)
    }

    /// Reads all the node's data: `read` gives one weight delta of `plan.values` numbers.
    ///
    /// # Errors
    /// As for [`LocalUpdate::moments`]; [`UpdateError::PartialCharge`] when the charge is for less than all data, once.
    pub fn delta(
        reservation: Reservation,
        layout_digest: Digest,
        read: impl FnOnce() -> Vec<f32>,
    ) -> Result<Self, UpdateError> {
        check_kind(&reservation, UpdateKind::Delta)?;
        let plan = reservation.plan();
        if !plan.blocks.is_empty() || plan.steps != 1 || plan.sampling_rate < 1.0 {
            return Err(UpdateError::PartialCharge);
        }
        let units = vec![read()];
        Self::of(reservation, layout_digest, units)
    }

    /// Clips every unit to the norm C, every window of a block of n to C/n, and adds them up.
    pub fn clip(self) -> ClippedUpdate {
        let Self {
            terms,
            reservation,
            units,
        } = self;
        let mut sum = GridSum::of_parts(
            values(&terms.plan),
            terms.plan.clip_norm,
            terms.plan.noise_multiplier,
            terms.plan.vectors_per_block(),
        );
        for unit in &units {
            sum.add(unit);
        }
        ClippedUpdate {
            terms,
            reservation,
            sum,
        }
    }

    fn of(
        reservation: Reservation,
        layout_digest: Digest,
        units: Vec<Vec<f32>>,
    ) -> Result<Self, UpdateError> {
        let plan = reservation.plan();
        let charged = match plan.kind {
            UpdateKind::Moments | UpdateKind::Gradient => plan
                .blocks
                .len()
                .saturating_mul(usize::try_from(plan.vectors_per_block()).unwrap_or(usize::MAX)),
            UpdateKind::Delta => 1,
        };
        if units.len() > charged {
            return Err(UpdateError::TooManyUnits {
                charged,
                found: units.len(),
            });
        }
        let expected = values(plan);
        if let Some(unit) = units.iter().find(|unit| unit.len() != expected) {
            return Err(UpdateError::WrongLength {
                expected,
                found: unit.len(),
            });
        }
        let terms = Terms {
            plan: plan.clone(),
            layout_digest,
            claim: reservation.claim().clone(),
        };
        Ok(Self {
            terms,
            reservation,
            units,
        })
    }
}

/// The sum of the clipped units: one unit more or less moves it by at most C.
pub struct ClippedUpdate {
    terms: Terms,
    reservation: Reservation,
    sum: GridSum,
}

impl ClippedUpdate {
    /// Adds noise of standard deviation σC to the sum. This ends the reservation.
    ///
    /// # Errors
    /// [`UpdateError::Noise`]; the charge stays.
    pub fn noise(self, mechanism: &dyn NoiseMechanism) -> Result<NoisyUpdate, UpdateError> {
        let Self {
            terms,
            reservation,
            sum,
        } = self;
        let noisy = release(mechanism, &sum, reservation.sensitivity(), reservation.rho())?;
        #[expect(
            clippy::cast_possible_truncation,
            reason = "updates are sent in f32; rounding noised values costs nothing"
        )]
        let values = noisy.into_iter().map(|x| x as f32).collect();
        Ok(NoisyUpdate { terms, values })
    }
}

/// The noised sum: public from here on.
#[derive(Debug, Clone, PartialEq)]
pub struct NoisyUpdate {
    terms: Terms,
    values: Vec<f32>,
}

impl NoisyUpdate {
    /// The noised values, in layout order.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Changes noised values; that costs no privacy. Meant for the laboratory's hostile edges.
    #[must_use]
    pub fn post_process(self, change: impl FnOnce(Vec<f32>) -> Vec<f32>) -> Self {
        Self {
            terms: self.terms,
            values: change(self.values),
        }
    }

    /// Writes the values as one byte each with one scale, rounded stochastically; `uniform` gives numbers in [0, 1).
    pub fn compress(self, uniform: impl FnMut() -> f32) -> CompressedUpdate {
        let (encoding, payload) = encode_int8(&self.values, uniform);
        let payload = Bytes::from(payload);
        CompressedUpdate {
            terms: self.terms,
            values: u32::try_from(self.values.len()).unwrap_or(u32::MAX),
            encoding,
            payload_digest: Digest::of(&payload),
            payload,
        }
    }
}

/// The noised, compressed update: the only thing that can be sent.
#[derive(Debug, Clone, PartialEq)]
pub struct CompressedUpdate {
    terms: Terms,
    values: u32,
    encoding: Encoding,
    payload_digest: Digest,
    payload: Bytes,
}

impl CompressedUpdate {
    /// The reservation that paid for it.
    pub fn id(&self) -> ReservationId {
        self.terms.plan.id()
    }

    /// SHA-256 of the payload.
    pub fn payload_digest(&self) -> Digest {
        self.payload_digest
    }

    /// The values as they will be sent.
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// The message. `base_digest` and `blocks_bound` (`blocks_max`) are the announcement's, so the real number of blocks
    /// is not told.
    pub fn into_message(self, base_digest: Digest, blocks_bound: u32) -> (UpdateV1, Bytes) {
        let Terms {
            plan,
            layout_digest,
            claim,
        } = self.terms;
        let header = UpdateV1 {
            round: plan.round,
            nonce: plan.nonce,
            kind: plan.kind,
            base_digest,
            layout_digest,
            values: self.values,
            encoding: self.encoding,
            payload_digest: self.payload_digest,
            blocks_bound,
            privacy: claim,
        };
        (header, self.payload)
    }
}

impl fmt::Debug for LocalUpdate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalUpdate")
            .field("terms", &self.terms)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for ClippedUpdate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClippedUpdate")
            .field("terms", &self.terms)
            .finish_non_exhaustive()
    }
}

fn check_kind(reservation: &Reservation, asked: UpdateKind) -> Result<(), UpdateError> {
    let reserved = reservation.plan().kind;
    if reserved == asked {
        Ok(())
    } else {
        Err(UpdateError::OtherKind { reserved, asked })
    }
}

fn values(plan: &ReleasePlan) -> usize {
    plan.values as usize
}

#[cfg(test)]
mod tests;
