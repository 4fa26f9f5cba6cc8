//! Bytes to messages and back: the only file that names bincode.
//!
//! The rules, each for a reason that was met in the wild (bincode 2.0.1, unmaintained, pinned):
//!
//! - the serde path only, fixed-width little-endian integers: a length prefix of 2^40 is an error, not an allocation;
//! - a byte limit for each kind, and the bytes consumed must be all the bytes there are;
//! - a byte limit does not bound a count, so every string and sequence is compared with its documented maximum;
//! - nothing recursive, no maps, no sequence of empty elements;
//! - tensors do not pass through serde. The body of an update or a model is: header length (`u32` little-endian),
//!   header, raw payload to the end of the frame.
//!
//! Both directions hold the same rules, so that no build sends what its own peer would refuse. The payload is
//! *not* judged here: its length, digest and values belong to validation, which refuses with a reason of its own.

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::frame::{FrameHeader, HEADER_BYTES, kind};
use crate::message::{
    AnnounceV1, AppraisalV1, CandidateV1, ClosedV1, DeclineV1, Encoding, FetchModelV1, FleetReportV1,
    GoodbyeV1, GuaranteeV1, HealthV1, HelloV1, JoinReplyV1, JoinRequestV1, LeaseGrantedV1, LeaseRefusedV1,
    LeaseReleaseV1, LeaseRequestV1, LedgerSealV1, ModelV1, ReceiptV1, ToAggregator, ToEdge, UpdateV1,
    VerdictV1, WelcomeV1,
};
use crate::refusal::{RefusalCode, RefusalV1};

/// Most bytes of a body without payload, and of the header of one with payload.
pub const PLAIN_BYTES_MAX: usize = 64 * 1024;
/// Most bytes of a body on the join listener.
pub const JOIN_BYTES_MAX: usize = 16 * 1024;

/// Most bytes of a message of the fleet: a few numbers each.
pub const FLEET_BYTES_MAX: usize = 64;

/// A message ready to send: write `head`, then `payload`. The payload is shared, not copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Frame header and everything before the payload.
    pub head: Bytes,
    /// The raw tensor bytes; empty for most kinds.
    pub payload: Bytes,
}

impl Encoded {
    /// Bytes on the wire.
    pub fn len(&self) -> usize {
        self.head.len() + self.payload.len()
    }

    /// Never: there is always a frame header.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The longest body of a kind: what a reader hands to [`FrameHeader::parse`] or compares afterwards.
/// `payload_bytes_max` is what it holds for an update's or a model's values. `None`: the kind is unknown.
pub fn body_bytes_max(kind: u16, payload_bytes_max: u32) -> Option<u32> {
    #[expect(clippy::cast_possible_truncation, reason = "65,536")]
    const PLAIN: u32 = PLAIN_BYTES_MAX as u32;
    #[expect(clippy::cast_possible_truncation, reason = "16,384")]
    const JOIN: u32 = JOIN_BYTES_MAX as u32;
    #[expect(clippy::cast_possible_truncation, reason = "64")]
    const FLEET: u32 = FLEET_BYTES_MAX as u32;
    match kind {
        _ if is_of_fleet(kind) => Some(FLEET),
        kind::UPDATE_V1 | kind::MODEL_V1 | kind::CANDIDATE_V1 => {
            Some(payload_bytes_max.saturating_add(4 + PLAIN))
        }
        kind::JOIN_REQUEST_V1 | kind::JOIN_REPLY_V1 => Some(JOIN),
        kind::EDGE_GOODBYE_V1 => Some(0),
        kind::HELLO_V1
        | kind::DECLINE_V1
        | kind::FETCH_MODEL_V1
        | kind::VERDICT_V1
        | kind::GUARANTEE_V1
        | kind::APPRAISAL_V1
        | kind::WELCOME_V1
        | kind::REFUSAL_V1
        | kind::ANNOUNCE_V1
        | kind::RECEIPT_V1
        | kind::CLOSED_V1
        | kind::LEDGER_SEAL_V1
        | kind::AGGREGATOR_GOODBYE_V1 => Some(PLAIN),
        _ => None,
    }
}

/// Writes what an edge says.
///
/// # Errors
/// [`CodecError`] when a field is longer than its documented maximum or a number is out of range.
pub fn encode_to_aggregator(message: &ToAggregator) -> Result<Encoded, CodecError> {
    match message {
        ToAggregator::Hello(hello) => plain(kind::HELLO_V1, hello),
        ToAggregator::Update(update, payload) => with_payload(kind::UPDATE_V1, update, payload),
        ToAggregator::Decline(decline) => plain(kind::DECLINE_V1, decline),
        ToAggregator::FetchModel(fetch) => plain(kind::FETCH_MODEL_V1, fetch),
        ToAggregator::Verdict(verdict) => plain(kind::VERDICT_V1, verdict),
        ToAggregator::Guarantee(guarantee) => plain(kind::GUARANTEE_V1, guarantee),
        ToAggregator::Appraisal(appraisal) => plain(kind::APPRAISAL_V1, appraisal),
        ToAggregator::Health(health) => plain(kind::HEALTH_V1, health),
        ToAggregator::LeaseRequest(request) => plain(kind::LEASE_REQUEST_V1, request),
        ToAggregator::LeaseRelease(release) => plain(kind::LEASE_RELEASE_V1, release),
        ToAggregator::Goodbye => frame(kind::EDGE_GOODBYE_V1, &[], &Bytes::new()),
    }
}

/// Reads what an edge says. `body` is everything after the frame header.
///
/// # Errors
/// [`CodecError`]; its [`refusal_code`](CodecError::refusal_code) is what the peer is told.
pub fn decode_to_aggregator(kind: u16, body: Bytes) -> Result<ToAggregator, CodecError> {
    match kind {
        kind::HELLO_V1 => read_plain(kind, &body).map(ToAggregator::Hello),
        kind::UPDATE_V1 => {
            read_with_payload(kind, body).map(|(header, payload)| ToAggregator::Update(header, payload))
        }
        kind::DECLINE_V1 => read_plain(kind, &body).map(ToAggregator::Decline),
        kind::FETCH_MODEL_V1 => read_plain(kind, &body).map(ToAggregator::FetchModel),
        kind::VERDICT_V1 => read_plain(kind, &body).map(ToAggregator::Verdict),
        kind::GUARANTEE_V1 => read_plain(kind, &body).map(ToAggregator::Guarantee),
        kind::APPRAISAL_V1 => read_plain(kind, &body).map(ToAggregator::Appraisal),
        kind::HEALTH_V1 => read_plain(kind, &body).map(ToAggregator::Health),
        kind::LEASE_REQUEST_V1 => read_plain(kind, &body).map(ToAggregator::LeaseRequest),
        kind::LEASE_RELEASE_V1 => read_plain(kind, &body).map(ToAggregator::LeaseRelease),
        kind::EDGE_GOODBYE_V1 => consumed(kind, 0, body.len()).map(|()| ToAggregator::Goodbye),
        _ => Err(CodecError::UnsupportedKind { kind }),
    }
}

/// Writes what an aggregator says.
///
/// # Errors
/// [`CodecError`] when a field is longer than its documented maximum or a number is out of range.
pub fn encode_to_edge(message: &ToEdge) -> Result<Encoded, CodecError> {
    match message {
        ToEdge::Welcome(welcome) => plain(kind::WELCOME_V1, welcome),
        ToEdge::Refusal(refusal) => plain(kind::REFUSAL_V1, refusal),
        ToEdge::Announce(announce) => plain(kind::ANNOUNCE_V1, announce),
        ToEdge::Receipt(receipt) => plain(kind::RECEIPT_V1, receipt),
        ToEdge::Model(model, payload) => with_payload(kind::MODEL_V1, model, payload),
        ToEdge::Closed(closed) => plain(kind::CLOSED_V1, closed),
        ToEdge::Seal(seal) => plain(kind::LEDGER_SEAL_V1, seal),
        ToEdge::Candidate(candidate, payload) => with_payload(kind::CANDIDATE_V1, candidate, payload),
        ToEdge::Fleet(report) => plain(kind::FLEET_REPORT_V1, report),
        ToEdge::LeaseGranted(granted) => plain(kind::LEASE_GRANTED_V1, granted),
        ToEdge::LeaseRefused(refused) => plain(kind::LEASE_REFUSED_V1, refused),
        ToEdge::Goodbye(goodbye) => plain(kind::AGGREGATOR_GOODBYE_V1, goodbye),
    }
}

/// Reads what an aggregator says. `body` is everything after the frame header.
///
/// # Errors
/// [`CodecError`] when the bytes are no such message.
pub fn decode_to_edge(kind: u16, body: Bytes) -> Result<ToEdge, CodecError> {
    match kind {
        kind::WELCOME_V1 => read_plain(kind, &body).map(ToEdge::Welcome),
        kind::REFUSAL_V1 => read_plain(kind, &body).map(ToEdge::Refusal),
        kind::ANNOUNCE_V1 => read_plain(kind, &body).map(ToEdge::Announce),
        kind::RECEIPT_V1 => read_plain(kind, &body).map(ToEdge::Receipt),
        kind::MODEL_V1 => {
            read_with_payload(kind, body).map(|(header, payload)| ToEdge::Model(header, payload))
        }
        kind::CLOSED_V1 => read_plain(kind, &body).map(ToEdge::Closed),
        kind::LEDGER_SEAL_V1 => read_plain(kind, &body).map(ToEdge::Seal),
        kind::CANDIDATE_V1 => {
            read_with_payload(kind, body).map(|(header, payload)| ToEdge::Candidate(header, payload))
        }
        kind::FLEET_REPORT_V1 => read_plain(kind, &body).map(ToEdge::Fleet),
        kind::LEASE_GRANTED_V1 => read_plain(kind, &body).map(ToEdge::LeaseGranted),
        kind::LEASE_REFUSED_V1 => read_plain(kind, &body).map(ToEdge::LeaseRefused),
        kind::AGGREGATOR_GOODBYE_V1 => read_plain(kind, &body).map(ToEdge::Goodbye),
        _ => Err(CodecError::UnsupportedKind { kind }),
    }
}

/// Writes a request to the join listener.
///
/// # Errors
/// [`CodecError::Field`] when the certificate request is longer than 4 KiB.
pub fn encode_join_request(request: &JoinRequestV1) -> Result<Encoded, CodecError> {
    plain(kind::JOIN_REQUEST_V1, request)
}

/// Reads a request on the join listener.
///
/// # Errors
/// [`CodecError`] when the bytes are no such request.
pub fn decode_join_request(kind: u16, body: Bytes) -> Result<JoinRequestV1, CodecError> {
    match kind {
        kind::JOIN_REQUEST_V1 => read_plain(kind, &body),
        _ => Err(CodecError::UnsupportedKind { kind }),
    }
}

/// Writes the join listener's answer.
///
/// # Errors
/// [`CodecError::Field`] when a certificate or a name is longer than its maximum.
pub fn encode_join_reply(reply: &JoinReplyV1) -> Result<Encoded, CodecError> {
    plain(kind::JOIN_REPLY_V1, reply)
}

/// Reads the join listener's answer.
///
/// # Errors
/// [`CodecError`] when the bytes are no such answer.
pub fn decode_join_reply(kind: u16, body: Bytes) -> Result<JoinReplyV1, CodecError> {
    match kind {
        kind::JOIN_REPLY_V1 => read_plain(kind, &body),
        _ => Err(CodecError::UnsupportedKind { kind }),
    }
}

/// Why bytes are no message, or a message may not become bytes.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// No such kind in this direction.
    #[error("kind {kind:#06x} is unknown here: the peer is newer, or says what the other side should say")]
    UnsupportedKind {
        /// The frame's kind.
        kind: u16,
    },
    /// More bytes than the kind may have.
    #[error("kind {kind:#06x}: {bytes} bytes, at most {bytes_max} allowed")]
    TooLarge {
        /// The frame's kind.
        kind: u16,
        /// Bytes found.
        bytes: usize,
        /// Bytes allowed.
        bytes_max: usize,
    },
    /// The bytes do not decode.
    #[error("kind {kind:#06x} does not decode: {reason}")]
    Malformed {
        /// The frame's kind.
        kind: u16,
        /// The decoder's words, for the log.
        reason: String,
    },
    /// The message ends before its bytes do.
    #[error("kind {kind:#06x}: message of {used} bytes in a body of {found}")]
    Trailing {
        /// The frame's kind.
        kind: u16,
        /// Bytes the message takes.
        used: usize,
        /// Bytes there are.
        found: usize,
    },
    /// A string or sequence has another length than it may have.
    #[error("{field}: length {found}, {allowed} allowed")]
    Field {
        /// Struct and field.
        field: &'static str,
        /// Its length in bytes or elements.
        found: usize,
        /// The rule, in words.
        allowed: Allowed,
    },
    /// An int8 step that is negative or not finite.
    #[error("encoding scale {found}, expected a finite number of at least 0")]
    Scale {
        /// The scale.
        found: f32,
    },
}

/// How long a field may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowed {
    /// That long at most.
    AtMost(usize),
    /// Exactly that long.
    Exactly(usize),
}

impl std::fmt::Display for Allowed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtMost(length) => write!(f, "at most {length}"),
            Self::Exactly(length) => write!(f, "exactly {length}"),
        }
    }
}

impl CodecError {
    /// What the peer is told.
    pub fn refusal_code(&self) -> RefusalCode {
        match self {
            Self::UnsupportedKind { .. } => RefusalCode::UnsupportedKind,
            Self::TooLarge { .. } => RefusalCode::TooLarge,
            Self::Malformed { .. } | Self::Trailing { .. } | Self::Field { .. } | Self::Scale { .. } => {
                RefusalCode::Malformed
            }
        }
    }
}

/// A struct that travels, and the documented maximum of each of its parts that can grow.
trait Checked {
    fn check(&self) -> Result<(), CodecError> {
        Ok(())
    }
}

impl Checked for HelloV1 {
    fn check(&self) -> Result<(), CodecError> {
        at_most("HelloV1.software", self.software.len(), 64)?;
        at_most("HelloV1.features", self.features.len(), 16)?;
        self.features
            .iter()
            .try_for_each(|name| at_most("HelloV1.features[..]", name.len(), 32))?;
        at_most("HelloV1.profile", self.profile.len(), 32)
    }
}

impl Checked for WelcomeV1 {
    fn check(&self) -> Result<(), CodecError> {
        at_most(
            "WelcomeV1.federation",
            self.federation.len(),
            FEDERATION_BYTES_MAX,
        )?;
        at_most("WelcomeV1.audit_consistency", self.audit_consistency.len(), 64)
    }
}

impl Checked for UpdateV1 {
    fn check(&self) -> Result<(), CodecError> {
        match self.encoding {
            Encoding::Int8 { scale } if !(scale.is_finite() && scale >= 0.0) => {
                Err(CodecError::Scale { found: scale })
            }
            Encoding::F32 | Encoding::Int8 { .. } => Ok(()),
        }
    }
}

impl Checked for ReceiptV1 {
    fn check(&self) -> Result<(), CodecError> {
        signature("ReceiptV1.signature", self.signature.len())
    }
}

impl Checked for LedgerSealV1 {
    fn check(&self) -> Result<(), CodecError> {
        at_most("LedgerSealV1.key", self.key.len(), 512)?;
        signature("LedgerSealV1.signature", self.signature.len())
    }
}

impl Checked for GuaranteeV1 {
    fn check(&self) -> Result<(), CodecError> {
        at_most("GuaranteeV1.period", self.period.len(), 16)?;
        at_most("GuaranteeV1.policy_signer", self.policy_signer.len(), 128)
    }
}

impl Checked for ModelV1 {
    fn check(&self) -> Result<(), CodecError> {
        at_most("ModelV1.rule", self.rule.len(), 32)
    }
}

impl Checked for JoinRequestV1 {
    fn check(&self) -> Result<(), CodecError> {
        at_most("JoinRequestV1.csr", self.csr.len(), CERTIFICATE_BYTES_MAX)
    }
}

impl Checked for JoinReplyV1 {
    fn check(&self) -> Result<(), CodecError> {
        let Self::Enrolled {
            node: _,
            federation,
            aggregator,
            certificate,
            edge_authority,
            aggregator_authority,
        } = self
        else {
            return Ok(());
        };
        at_most("JoinReplyV1.federation", federation.len(), FEDERATION_BYTES_MAX)?;
        at_most("JoinReplyV1.aggregator", aggregator.len(), HOST_PORT_BYTES_MAX)?;
        at_most(
            "JoinReplyV1.certificate",
            certificate.len(),
            CERTIFICATE_BYTES_MAX,
        )?;
        at_most(
            "JoinReplyV1.edge_authority",
            edge_authority.len(),
            CERTIFICATE_BYTES_MAX,
        )?;
        at_most(
            "JoinReplyV1.aggregator_authority",
            aggregator_authority.len(),
            CERTIFICATE_BYTES_MAX,
        )
    }
}

// Fixed-size parts only.
impl Checked for DeclineV1 {}
impl Checked for FetchModelV1 {}
impl Checked for VerdictV1 {}
impl Checked for RefusalV1 {}
impl Checked for AppraisalV1 {}
impl Checked for CandidateV1 {}
impl Checked for AnnounceV1 {}
impl Checked for ClosedV1 {}
impl Checked for GoodbyeV1 {}
// Counts may be impossible together: whoever reads them judges that.
impl Checked for HealthV1 {}
impl Checked for LeaseRequestV1 {}
impl Checked for LeaseReleaseV1 {}
impl Checked for FleetReportV1 {}
impl Checked for LeaseGrantedV1 {}
impl Checked for LeaseRefusedV1 {}

fn signature(field: &'static str, found: usize) -> Result<(), CodecError> {
    match found {
        64 => Ok(()),
        found => Err(CodecError::Field {
            field,
            found,
            allowed: Allowed::Exactly(64),
        }),
    }
}

fn at_most(field: &'static str, found: usize, max: usize) -> Result<(), CodecError> {
    if found <= max {
        Ok(())
    } else {
        Err(CodecError::Field {
            field,
            found,
            allowed: Allowed::AtMost(max),
        })
    }
}

/// The message must be the whole body.
fn consumed(kind: u16, used: usize, found: usize) -> Result<(), CodecError> {
    if used == found {
        Ok(())
    } else {
        Err(CodecError::Trailing { kind, used, found })
    }
}

fn plain<T: Serialize + Checked>(kind: u16, message: &T) -> Result<Encoded, CodecError> {
    frame(kind, &to_bytes(kind, message)?, &Bytes::new())
}

fn with_payload<T: Serialize + Checked>(
    kind: u16,
    header: &T,
    payload: &Bytes,
) -> Result<Encoded, CodecError> {
    let header = to_bytes(kind, header)?;
    let length = u32::try_from(header.len()).map_err(|_| too_large(kind, header.len()))?;
    let before: Vec<u8> = length.to_le_bytes().into_iter().chain(header).collect();
    frame(kind, &before, payload)
}

fn frame(kind: u16, before: &[u8], payload: &Bytes) -> Result<Encoded, CodecError> {
    let bytes = before.len() + payload.len();
    let length = u32::try_from(bytes).map_err(|_| CodecError::TooLarge {
        kind,
        bytes,
        bytes_max: usize::try_from(u32::MAX).unwrap_or(usize::MAX),
    })?;
    let mut head = Vec::with_capacity(HEADER_BYTES + before.len());
    head.extend_from_slice(&FrameHeader { kind, length }.encode());
    head.extend_from_slice(before);
    Ok(Encoded {
        head: head.into(),
        payload: payload.clone(),
    })
}

fn read_plain<T: DeserializeOwned + Checked>(kind: u16, body: &[u8]) -> Result<T, CodecError> {
    from_bytes(kind, body)
}

fn read_with_payload<T: DeserializeOwned + Checked>(
    kind: u16,
    mut body: Bytes,
) -> Result<(T, Bytes), CodecError> {
    let cut = |reason: &str| CodecError::Malformed {
        kind,
        reason: reason.to_owned(),
    };
    let length = body
        .split_first_chunk::<4>()
        .map(|(length, _)| u32::from_le_bytes(*length));
    let length = length.ok_or_else(|| cut("ends within the header's length"))?;
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length > PLAIN_BYTES_MAX {
        return Err(too_large(kind, length));
    }
    if body.len() - 4 < length {
        return Err(cut("ends within the header"));
    }
    let payload = body.split_off(4 + length);
    Ok((from_bytes(kind, &body[4..])?, payload))
}

fn is_of_fleet(kind: u16) -> bool {
    matches!(
        kind,
        kind::HEALTH_V1
            | kind::LEASE_REQUEST_V1
            | kind::LEASE_RELEASE_V1
            | kind::FLEET_REPORT_V1
            | kind::LEASE_GRANTED_V1
            | kind::LEASE_REFUSED_V1
    )
}

fn limit(kind: u16) -> usize {
    if is_of_fleet(kind) {
        FLEET_BYTES_MAX
    } else if kind == kind::JOIN_REQUEST_V1 || kind == kind::JOIN_REPLY_V1 {
        JOIN_BYTES_MAX
    } else {
        PLAIN_BYTES_MAX
    }
}

fn too_large(kind: u16, bytes: usize) -> CodecError {
    CodecError::TooLarge {
        kind,
        bytes,
        bytes_max: limit(kind),
    }
}

fn to_bytes<T: Serialize + Checked>(kind: u16, message: &T) -> Result<Vec<u8>, CodecError> {
    message.check()?;
    let bytes = bincode::serde::encode_to_vec(message, CONFIG).map_err(|error| CodecError::Malformed {
        kind,
        reason: error.to_string(),
    })?;
    if bytes.len() > limit(kind) {
        Err(too_large(kind, bytes.len()))
    } else {
        Ok(bytes)
    }
}

fn from_bytes<T: DeserializeOwned + Checked>(kind: u16, bytes: &[u8]) -> Result<T, CodecError> {
    if bytes.len() > limit(kind) {
        return Err(too_large(kind, bytes.len()));
    }
    // The limit is part of bincode's type, hence the two calls.
    let decoded = match limit(kind) {
        JOIN_BYTES_MAX => bincode::serde::decode_from_slice(bytes, CONFIG.with_limit::<JOIN_BYTES_MAX>()),
        _ => bincode::serde::decode_from_slice(bytes, CONFIG.with_limit::<PLAIN_BYTES_MAX>()),
    };
    let (message, used): (T, usize) = decoded.map_err(|error| CodecError::Malformed {
        kind,
        reason: error.to_string(),
    })?;
    consumed(kind, used, bytes.len())?;
    message.check()?;
    Ok(message)
}

/// Longest federation name, in bytes: the longest SPIFFE trust domain.
const FEDERATION_BYTES_MAX: usize = 255;
/// Longest `HOST:PORT`, in bytes: a DNS name of 253, a colon, five digits, and brackets.
const HOST_PORT_BYTES_MAX: usize = 261;
/// Longest certificate or certificate request, DER.
const CERTIFICATE_BYTES_MAX: usize = 4096;

const CONFIG: bincode::config::Configuration<bincode::config::LittleEndian, bincode::config::Fixint> =
    bincode::config::standard()
        .with_little_endian()
        .with_fixed_int_encoding();
