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
use crate::vet::{self, Screens};

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
        Row {
            encoding: self.header.encoding,
            payload: self.payload.clone(),
        }
    }
}

/// Why an update is refused. Carries both values; the peer is told only [`UpdateError::code`].
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum UpdateError {
    /// Another kind or layout of update than announced.
    #[error(
        "{found:?} with layout {found_layout}, the round collects {expected:?} with layout {expected_layout}"
    )]
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
    /// Moments that no time series has, or less noise than was agreed, beyond what chance explains.
    #[error("{what} is {found}, beyond {bound}: no series gives that with the agreed noise")]
    Implausible {
        /// Which sum.
        what: &'static str,
        /// The bound, noise allowed for.
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
    validate_with(raw, terms, Screens::ALL)
}

/// The same with some screens only, for measurement.
///
/// # Errors
/// As [`validate`].
pub fn validate_with(
    raw: RawUpdate,
    terms: &AnnounceV1,
    screens: Screens,
) -> Result<ValidatedUpdate, UpdateError> {
    let RawUpdate {
        node,
        header,
        payload,
    } = raw;
    check_header(&header, payload.len(), terms)?;
    let found = Digest::of(&payload);
    if found != header.payload_digest {
        return Err(UpdateError::Digest {
            expected: header.payload_digest,
            found,
        });
    }
    let norm = scan(header.encoding, &payload)
        .map_err(|error| UpdateError::NonFinite { index: error.index })?
        .norm;
    let bound = norm_bound(terms) * rounding_slack(header.encoding);
    if norm > bound || norm.is_nan() {
        return Err(UpdateError::Norm { bound, found: norm });
    }
    check_step(header.encoding, &payload)?;
    vet::look(header.encoding, &payload, norm, terms, screens).map_err(|finding| {
        UpdateError::Implausible {
            what: finding.what,
            bound: finding.bound,
            found: finding.found,
        }
    })?;
    Ok(ValidatedUpdate {
        node,
        header,
        payload,
        norm,
    })
}

/// An honest encoder spans its grid: the largest value is its last point (Int8, [`encode_int8`](theriac_protocol::compress::encode_int8)), or one below it by
/// rounding. A coarser step would hide from every test of the noise's shape.
fn check_step(encoding: Encoding, payload: &[u8]) -> Result<(), UpdateError> {
    let Encoding::Int8 { scale } = encoding else {
        return Ok(());
    };
    let most = payload
        .iter()
        .map(|byte| i8::from_le_bytes([*byte]).unsigned_abs())
        .max()
        .unwrap_or(0);
    // A step at the smallest normal number is as fine as one can be.
    if scale <= f32::MIN_POSITIVE || most >= GRID_SPANNED {
        return Ok(());
    }
    Err(UpdateError::Implausible {
        what: "the largest of its whole numbers",
        bound: f64::from(GRID_SPANNED),
        found: f64::from(most),
    })
}

/// The least that the largest whole number of an honest int8 payload is; the grid ends at 127.
const GRID_SPANNED: u8 = 120;

fn check_header(header: &UpdateV1, payload_bytes: usize, terms: &AnnounceV1) -> Result<(), UpdateError> {
    if header.kind != terms.kind || header.layout_digest != terms.layout_digest {
        return Err(UpdateError::Layout {
            expected: terms.kind,
            expected_layout: terms.layout_digest,
            found: header.kind,
            found_layout: header.layout_digest,
        });
    }
    let length = |unit, expected, found| {
        Err(UpdateError::Length {
            unit,
            expected,
            found,
        })
    };
    if header.values != terms.values {
        return length("values", terms.values.into(), header.values.into());
    }
    let expected = payload_len(header.encoding, header.values);
    if expected != Some(payload_bytes) {
        return length(
            "bytes",
            expected.unwrap_or(usize::MAX) as u64,
            payload_bytes as u64,
        );
    }
    let claim = &header.privacy;
    let weak = |what, expected, found| {
        Err(UpdateError::Privacy {
            what,
            expected,
            found,
        })
    };
    let (sigma, claimed) = (terms.noise_multiplier.value(), claim.noise_multiplier.value());
    if claimed < sigma {
        return weak("the noise multiplier", sigma, claimed);
    }
    let (clip, claimed) = (terms.clip_norm.value(), claim.clip_norm.value());
    if claimed > clip {
        return weak("the clipping norm", clip, claimed);
    }
    if header.blocks_bound > terms.blocks_max {
        return weak(
            "the bound on blocks",
            terms.blocks_max.into(),
            header.blocks_bound.into(),
        );
    }
    Ok(())
}

/// The public norm bound S of a round: what an honest update exceeds with negligible probability.
///
/// Moments and gradients are a sum of at most `blocks_max` blocks, each clipped to norm C; a delta is one vector clipped to C. Gaussian
/// noise of standard deviation σC on d values has a norm below σC(√d + 5) except with probability e^(−12.5) (the norm is a
/// 1-Lipschitz function of the noise with mean at most √d: Boucheron, Lugosi and Massart 2013, theorem 5.6). Norms add at
/// most: S = units·C + σC(√d + 5).
pub fn norm_bound(terms: &AnnounceV1) -> f64 {
    let clip = terms.clip_norm.value();
    let units = match terms.kind {
        UpdateKind::Moments | UpdateKind::Gradient => f64::from(terms.blocks_max),
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

#[cfg(test)]
mod tests {
    use theriac_protocol::compress::{encode_f32, encode_int8};
    use theriac_protocol::message::PrivacyClaimV1;
    use theriac_protocol::units::{Delta, Epsilon, L2Norm, ModelVersion, NoiseMultiplier, Round};

    use super::*;
    use crate::vet::DIAGONAL;

    fn terms(kind: UpdateKind, values: u32) -> AnnounceV1 {
        AnnounceV1 {
            round: Round(3),
            nonce: 7,
            kind,
            values,
            layout_digest: Digest::of(b"layout"),
            base_version: ModelVersion(2),
            base_digest: Digest::of(b"base"),
            clip_norm: L2Norm::new(2.0).unwrap(),
            noise_multiplier: NoiseMultiplier::new(1.5).unwrap(),
            block_rows: 60,
            blocks_min: 1,
            blocks_max: 4,
            deadline_ms: 1_000,
        }
    }

    type Break = fn(&mut RawUpdate);

    fn raw(values: &[f32], encoding: Encoding, payload: Vec<u8>, terms: &AnnounceV1) -> RawUpdate {
        let header = UpdateV1 {
            round: terms.round,
            nonce: terms.nonce,
            kind: terms.kind,
            base_digest: terms.base_digest,
            layout_digest: terms.layout_digest,
            values: u32::try_from(values.len()).unwrap(),
            encoding,
            payload_digest: Digest::of(&payload),
            blocks_bound: terms.blocks_max,
            privacy: PrivacyClaimV1 {
                clip_norm: terms.clip_norm,
                noise_multiplier: terms.noise_multiplier,
                epsilon_spent: Epsilon::new(1.0).unwrap(),
                delta: Delta::new(1e-6).unwrap(),
                ledger_head: Digest::of(b"ledger"),
                ledger_records: 1,
            },
        };
        RawUpdate {
            node: NodeId::new("a").unwrap(),
            header,
            payload: payload.into(),
        }
    }

    fn f32_update(values: &[f32], terms: &AnnounceV1) -> RawUpdate {
        raw(values, Encoding::F32, encode_f32(values), terms)
    }

    fn code(raw: RawUpdate, terms: &AnnounceV1) -> Option<RefusalCode> {
        validate(raw, terms).err().map(|error| error.code())
    }

    #[test]
    fn takes_an_honest_update_in_both_encodings() {
        let terms = terms(UpdateKind::Delta, 3);
        let values = [1.0, -2.0, 2.0];
        let valid = validate(f32_update(&values, &terms), &terms).unwrap();
        assert!((valid.norm() - 3.0).abs() < 1e-9);
        let (encoding, payload) = encode_int8(&values, || 0.5);
        assert!(validate(raw(&values, encoding, payload, &terms), &terms).is_ok());
    }

    #[test]
    fn refuses_each_defect_with_its_own_code() {
        let terms = terms(UpdateKind::Delta, 2);
        let good = || f32_update(&[1.0, 1.0], &terms);
        let cases: [(Break, RefusalCode); 10] = [
            (
                |u| u.header.kind = UpdateKind::Moments,
                RefusalCode::LayoutMismatch,
            ),
            (
                |u| u.header.layout_digest = Digest::of(b"x"),
                RefusalCode::LayoutMismatch,
            ),
            (|u| u.header.values = 3, RefusalCode::WrongLength),
            (|u| u.payload = u.payload.slice(..7), RefusalCode::WrongLength),
            (
                |u| u.header.encoding = Encoding::Int8 { scale: 1.0 },
                RefusalCode::WrongLength,
            ),
            (
                |u| u.header.payload_digest = Digest::of(b"x"),
                RefusalCode::DigestMismatch,
            ),
            (
                |u| u.header.privacy.noise_multiplier = NoiseMultiplier::new(1.4).unwrap(),
                RefusalCode::PrivacyTooWeak,
            ),
            (
                |u| u.header.privacy.clip_norm = L2Norm::new(2.1).unwrap(),
                RefusalCode::PrivacyTooWeak,
            ),
            (|u| u.header.blocks_bound = 5, RefusalCode::PrivacyTooWeak),
            (|u| u.header.values = u32::MAX, RefusalCode::WrongLength),
        ];
        assert_eq!(code(good(), &terms), None);
        for (index, (break_it, expected)) in cases.into_iter().enumerate() {
            let mut update = good();
            break_it(&mut update);
            assert_eq!(code(update, &terms), Some(expected), "case {index}");
        }
    }

    #[test]
    fn refuses_what_no_arithmetic_should_meet() {
        let terms = terms(UpdateKind::Delta, 2);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(
                code(f32_update(&[0.0, bad], &terms), &terms),
                Some(RefusalCode::NonFinite)
            );
        }
        for huge in [1e30, f32::MAX, -1e30] {
            assert_eq!(
                code(f32_update(&[huge, 0.0], &terms), &terms),
                Some(RefusalCode::NormExceeded)
            );
        }
        let scale = Encoding::Int8 { scale: f32::NAN };
        assert_eq!(
            code(raw(&[0.0; 2], scale, vec![1, 1], &terms), &terms),
            Some(RefusalCode::NonFinite)
        );
        let tiny = f32_update(&[f32::from_bits(1), 0.0], &terms);
        assert_eq!(code(tiny, &terms), None, "a subnormal value is a value");
    }

    #[test]
    fn norm_bound_is_units_times_clip_plus_noise() {
        let delta = terms(UpdateKind::Delta, 100);
        assert!((norm_bound(&delta) - (2.0 + 1.5 * 2.0 * 15.0)).abs() < 1e-9);
        let moments = terms(UpdateKind::Moments, 100);
        assert!((norm_bound(&moments) - (4.0 * 2.0 + 1.5 * 2.0 * 15.0)).abs() < 1e-9);
        let gradient = terms(UpdateKind::Gradient, 100);
        assert!((norm_bound(&gradient) - norm_bound(&moments)).abs() < 1e-9);
    }

    #[test]
    fn honest_noise_stays_below_the_bound() {
        use rand::{Rng as _, SeedableRng as _};
        let terms = terms(UpdateKind::Delta, 400);
        let mut rng = rand::rngs::StdRng::seed_from_u64(5);
        for _ in 0..200 {
            // Box and Muller; the signal is at its clip norm.
            let mut values: Vec<f32> = (0..400)
                .map(|_| {
                    let (u, v): (f32, f32) = (rng.random_range(f32::EPSILON..1.0), rng.random());
                    3.0 * (-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * v).cos()
                })
                .collect();
            values[0] += 2.0;
            assert_eq!(code(f32_update(&values, &terms), &terms), None);
            let (encoding, payload) = encode_int8(&values, || rng.random());
            assert_eq!(code(raw(&values, encoding, payload, &terms), &terms), None);
        }
    }

    #[test]
    fn sums_of_squares_far_below_zero_come_from_no_series() {
        let mut terms = terms(UpdateKind::Moments, 22);
        terms.blocks_max = 100;
        let moments = |square: f32| {
            let mut values = [0.0_f32; 22];
            for index in DIAGONAL {
                values[index] = square;
            }
            f32_update(&values, &terms)
        };
        // Five standard deviations: 5 · 1.5 · 2 · √5 = 33.5 over five entries.
        assert_eq!(code(moments(-7.5), &terms), Some(RefusalCode::Implausible));
        assert_eq!(code(moments(-5.5), &terms), None, "noise alone can do that");
        assert_eq!(code(moments(5.0), &terms), None);
    }

    #[test]
    fn squares_lie_where_the_model_puts_them() {
        // One spike long after the centre was taken: each row knows it by one lag at most, so of the moments only squares are set.
        let rows = 60;
        let mut values = vec![0.0_f32; rows];
        values[30] = 1.0;
        let block = theriac_model::moments::block(&values, rows);
        let set: Vec<usize> = (0..20).filter(|index| block[*index] != 0.0).collect();
        assert_eq!(set, DIAGONAL);
    }
}
