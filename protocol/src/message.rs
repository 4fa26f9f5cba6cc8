//! Every message of the exchange, one enum for each direction.
//!
//! A message is one frame: its *kind* (a number outside bincode, so that an unknown one is answered
//! [`RefusalCode::UnsupportedKind`](crate::refusal::RefusalCode) and not met with a decode error), then the
//! bincode body, then, for [`ToAggregator::Update`] and [`ToEdge::Model`], the raw tensor bytes.
//!
//! One struct for each kind and version. **A shipped struct is never edited**: add `…V2` with a kind of its own
//! and convert both to what the program uses. The golden files in `protocol/golden/` fail the build when a
//! struct's bytes change.

mod fleet;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::refusal::{RefusalV1, RoundOutcome};
use crate::units::{Delta, Digest, Epsilon, L2Norm, ModelVersion, NodeId, NoiseMultiplier, Round, Timestamp};

pub use fleet::{
    FEATURE_FLEET, FleetReportV1, HealthV1, LeaseGrantedV1, LeaseKind, LeaseRefusal, LeaseRefusedV1,
    LeaseReleaseV1, LeaseRequestV1,
};

/// Lowest protocol version that this build speaks.
pub const PROTOCOL_MIN: u16 = 1;
/// Highest protocol version that this build speaks.
pub const PROTOCOL_MAX: u16 = 1;

/// What an edge says.
#[derive(Debug, Clone, PartialEq)]
pub enum ToAggregator {
    /// First message of a session.
    Hello(HelloV1),
    /// The one noised, clipped update of a round; `payload` holds the values as
    /// [`UpdateV1::encoding`] says.
    Update(UpdateV1, Bytes),
    /// The edge takes no part in a round.
    Decline(DeclineV1),
    /// The edge asks for a published model.
    FetchModel(FetchModelV1),
    /// What the edge's gate made of a published model.
    Verdict(VerdictV1),
    /// What the edge's policy guarantees; said after the first [`ToEdge::Seal`], which tells that it is understood.
    Guarantee(GuaranteeV1),
    /// What a validator makes of a candidate; only an edge that was sent a [`ToEdge::Candidate`] says it.
    Appraisal(AppraisalV1),
    /// How the edge's services are; said after the first [`ToEdge::Fleet`], like the next two.
    Health(HealthV1),
    /// The edge asks for a slot of the fleet.
    LeaseRequest(LeaseRequestV1),
    /// The edge gives one back.
    LeaseRelease(LeaseReleaseV1),
    /// The edge leaves.
    Goodbye,
}

/// What an aggregator says.
#[derive(Debug, Clone, PartialEq)]
pub enum ToEdge {
    /// The edge is admitted. Only now is it "connected".
    Welcome(WelcomeV1),
    /// Something the edge sent, or the edge itself, is turned away.
    Refusal(RefusalV1),
    /// A round is open.
    Announce(AnnounceV1),
    /// An update is durable at the aggregator.
    Receipt(ReceiptV1),
    /// A published model; the payload holds little-endian `f32` values in layout order.
    Model(ModelV1, Bytes),
    /// A round has ended.
    Closed(ClosedV1),
    /// How far the aggregator has seen the edge's privacy ledger come; only said to an edge whose Hello lists
    /// [`FEATURE_LEDGER_SEAL`].
    Seal(LedgerSealV1),
    /// A model that is not published yet, for a validator to try on its own rows; the payload is as that of [`ToEdge::Model`]. Only said to an edge
    /// whose Hello lists [`FEATURE_VALIDATOR`] and that the aggregator's configuration names.
    Candidate(CandidateV1, Bytes),
    /// How the fleet is; only said to an edge whose Hello lists [`FEATURE_FLEET`], like the next two.
    Fleet(FleetReportV1),
    /// A slot is lent.
    LeaseGranted(LeaseGrantedV1),
    /// No slot is lent.
    LeaseRefused(LeaseRefusedV1),
    /// The aggregator is going down; come back after the given time.
    Goodbye(GoodbyeV1),
}

/// Feature of a [`HelloV1`]: the edge keeps [`LedgerSealV1`] and answers the first with a [`GuaranteeV1`].
pub const FEATURE_LEDGER_SEAL: &str = "ledger-seal-1";

/// Feature of a [`HelloV1`]: the edge can read an announcement of [`UpdateKind::Gradient`] and a model with a full linear part. An
/// aggregator whose rounds collect gradients admits no edge without it.
pub const FEATURE_GRADIENT: &str = "gradient-1";

/// Feature of a [`HelloV1`]: the edge's operator lets it say what candidate models do on its own rows. It is the platform team's own edge and gives up that much of
/// its privacy: no guarantee covers an [`AppraisalV1`].
pub const FEATURE_VALIDATOR: &str = "validator-1";

/// Who an edge is and what it knows. Its node id is *not* in here: it comes from the certificate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HelloV1 {
    /// Lowest protocol version the edge speaks.
    pub protocol_min: u16,
    /// Highest protocol version the edge speaks.
    pub protocol_max: u16,
    /// Program and version, at most 64 bytes.
    pub software: String,
    /// Optional abilities by name, at most 16 of at most 32 bytes.
    pub features: Vec<String>,
    /// Name of the feature profile (`host-service-v1`), at most 32 bytes.
    pub profile: String,
    /// Digest of the feature profile.
    pub profile_digest: Digest,
    /// Digest of the model's parameter layout.
    pub layout_digest: Digest,
    /// The edge takes part in no round with less noise than this.
    pub noise_multiplier_min: NoiseMultiplier,
    /// Head of the edge's privacy ledger (all zero when empty).
    pub ledger_head: Digest,
    /// Number of records in the ledger.
    pub ledger_records: u64,
    /// Latest model that the edge holds.
    pub model_version: ModelVersion,
    /// Digest of that model's payload (all zero when it holds none).
    pub model_digest: Digest,
    /// Tree size and root of the last audit checkpoint the edge has seen.
    pub audit_checkpoint: Option<(u64, Digest)>,
    /// The round whose receipt the edge still misses.
    pub receipt_missing: Option<Round>,
}

/// The answer to a [`HelloV1`] that was admitted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WelcomeV1 {
    /// The version that both will speak.
    pub protocol: u16,
    /// Name of the federation.
    pub federation: String,
    /// The node id that the aggregator read out of the certificate.
    pub node: NodeId,
    /// The aggregator's wall clock, so that an edge can tell when its own is wrong.
    pub time: Timestamp,
    /// Largest frame body the aggregator will take from now on, in bytes.
    pub frame_bytes_max: u32,
    /// Latest published model.
    pub model_version: ModelVersion,
    /// Digest of that model's payload.
    pub model_digest: Digest,
    /// Audit log's size and root now.
    pub audit_checkpoint: (u64, Digest),
    /// RFC 6962 consistency proof from the edge's checkpoint to this one, at most 64 hashes.
    pub audit_consistency: Vec<Digest>,
    /// The round that is open, if any.
    pub round: Option<AnnounceV1>,
}

/// What kind of update a round collects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum UpdateKind {
    /// Block-clipped second moments of the own-lag regression (`[channel, 20]`); the aggregator solves for the weights.
    Moments,
    /// A clipped weight delta of the residual network.
    Delta,
    /// Block-clipped gradients of the full linear model at the announced base (`[5 · channels + 1, channel]`, in whitened coordinates); the
    /// aggregator steps. Only announced to edges whose Hello lists [`FEATURE_GRADIENT`]: others cannot read it.
    Gradient,
}

/// A round's terms. The edge intersects them with its own policy and may decline, never loosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AnnounceV1 {
    /// The round.
    pub round: Round,
    /// Random number of this attempt; an update must repeat it.
    pub nonce: u64,
    /// What to send.
    pub kind: UpdateKind,
    /// Number of values in the update.
    pub values: u32,
    /// Digest of the update's layout.
    pub layout_digest: Digest,
    /// The model that the round builds on.
    pub base_version: ModelVersion,
    /// Digest of that model's payload.
    pub base_digest: Digest,
    /// Clipping norm C of one privacy unit.
    pub clip_norm: L2Norm,
    /// Noise multiplier σ: noise of standard deviation σC on the sum.
    pub noise_multiplier: NoiseMultiplier,
    /// Samples in one block, the privacy unit of [`UpdateKind::Moments`] and [`UpdateKind::Gradient`].
    pub block_rows: u32,
    /// Fewest blocks worth sending; with fewer an edge declines.
    pub blocks_min: u32,
    /// Most blocks that one release may cover; bounds the norm of an honest update.
    pub blocks_max: u32,
    /// Time left until the round closes, in milliseconds, counted from receipt.
    pub deadline_ms: u32,
}

/// How an update's values are written.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Encoding {
    /// Four bytes a value, little-endian IEEE 754.
    F32,
    /// One signed byte a value, times the scale.
    Int8 {
        /// Value of one step, finite and ≥ 0.
        scale: f32,
    },
}

/// What protects the update: the edge's claim, kept as evidence and checked against the announced terms.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PrivacyClaimV1 {
    /// Clipping norm of one unit.
    pub clip_norm: L2Norm,
    /// Noise multiplier used.
    pub noise_multiplier: NoiseMultiplier,
    /// ε spent in all after this release, at `delta`.
    pub epsilon_spent: Epsilon,
    /// δ of the edge's policy.
    pub delta: Delta,
    /// Head of the ledger that holds the charge.
    pub ledger_head: Digest,
    /// Number of records in that ledger.
    pub ledger_records: u64,
}

/// Header of an update; the values follow as raw bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UpdateV1 {
    /// The round.
    pub round: Round,
    /// Nonce of the announcement.
    pub nonce: u64,
    /// What the values are.
    pub kind: UpdateKind,
    /// Digest of the base model's payload.
    pub base_digest: Digest,
    /// Digest of the values' layout.
    pub layout_digest: Digest,
    /// Number of values.
    pub values: u32,
    /// How they are written.
    pub encoding: Encoding,
    /// SHA-256 of the payload.
    pub payload_digest: Digest,
    /// Number of privacy units in the sum as a *public* bound (`blocks_max`), never the real count.
    pub blocks_bound: u32,
    /// What protects them.
    pub privacy: PrivacyClaimV1,
}

/// Why an edge takes no part in a round. Nothing here depends on data beyond what the budget permits to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DeclineReason {
    /// The privacy budget does not cover this round.
    BudgetSpent,
    /// The terms are weaker than the edge's own policy.
    TermsTooWeak,
    /// Not enough complete, unspent blocks yet.
    TooFewBlocks,
    /// The edge does not know this layout or kind.
    UnknownLayout,
    /// The disk is full or the ledger cannot be written.
    StorageUnavailable,
    /// The operator has switched federation to receive-only.
    ReceiveOnly,
}

/// Says that no update will come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeclineV1 {
    /// The round.
    pub round: Round,
    /// Why.
    pub reason: DeclineReason,
}

/// Asks for one published model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FetchModelV1 {
    /// Which one.
    pub version: ModelVersion,
}

/// What an edge's accept-or-keep gate decided. One of a few words, no measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum GateVerdict {
    /// The model is in use.
    Accepted,
    /// It does worse than the local one on the edge's own validation tail.
    WorseOnTail,
    /// It holds a value that is not finite.
    NonFinite,
    /// It has another layout.
    LayoutMismatch,
    /// It is older than the one in use.
    Stale,
    /// The edge has too few rows to judge; it keeps what it has.
    TooFewRows,
}

/// Tells the aggregator what became of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerdictV1 {
    /// Which model.
    pub version: ModelVersion,
    /// What the gate decided.
    pub verdict: GateVerdict,
}

/// An update is durable. The signature covers round, node, payload digest and leaf index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiptV1 {
    /// The round.
    pub round: Round,
    /// SHA-256 of the payload that was stored.
    pub payload_digest: Digest,
    /// Position of the verdict in the audit log.
    pub leaf_index: u64,
    /// Ledger head that the aggregator has counter-signed.
    pub ledger_head: Digest,
    /// Ed25519 signature, 64 bytes.
    pub signature: Vec<u8>,
}

/// A counter-signature: the aggregator has a charge of this ledger on record that was made when it held so many records. A
/// ledger that does not hold this head was lost, restored from a copy, or swapped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerSealV1 {
    /// Records of the ledger up to that charge; 0: nothing is on record.
    pub records: u64,
    /// Head of the last of them (all zero for none).
    pub head: Digest,
    /// When it was signed, by the aggregator's clock.
    pub signed: Timestamp,
    /// Public key of the audit log, at most 512 bytes.
    pub key: String,
    /// Ed25519 signature by the audit log's key, 64 bytes.
    pub signature: Vec<u8>,
}

/// What an edge's guarantee hides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum GuaranteeUnit {
    /// All that the node measured in one block of time.
    Block,
    /// One sample.
    Record,
}

/// What an edge's policy guarantees. Public: nothing in here depends on data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GuaranteeV1 {
    /// What is hidden; neighbouring data sets differ by one of them, present or absent.
    pub unit: GuaranteeUnit,
    /// Length of one block, in milliseconds.
    pub block_ms: u64,
    /// Largest ε of any unit in one period.
    pub epsilon: Epsilon,
    /// δ of the guarantee.
    pub delta: Delta,
    /// Time over which ε holds (`rolling`, `month`, …), at most 16 bytes.
    pub period: String,
    /// Least noise multiplier.
    pub noise_multiplier_min: NoiseMultiplier,
    /// Version of the policy.
    pub policy_version: u64,
    /// Digest of what the policy says.
    pub policy_hash: Digest,
    /// Public key of whoever signed it, at most 128 bytes; empty for nobody.
    pub policy_signer: String,
}

/// Header of a published model; the values follow as raw bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelV1 {
    /// Its version.
    pub version: ModelVersion,
    /// The round that made it (0 for the initial model).
    pub round: Round,
    /// Digest of its layout.
    pub layout_digest: Digest,
    /// Number of values.
    pub values: u32,
    /// SHA-256 of the payload.
    pub payload_digest: Digest,
    /// Rule that combined the updates, at most 32 bytes.
    pub rule: String,
    /// Number of updates in it.
    pub contributors: u32,
}

/// Header of a model that a validator is asked about before it is published; the values follow as raw bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CandidateV1 {
    /// The round that made it.
    pub round: Round,
    /// The model in force, which it is held against.
    pub base_version: ModelVersion,
    /// Digest of that model's payload.
    pub base_digest: Digest,
    /// Digest of the candidate's layout.
    pub layout_digest: Digest,
    /// Number of values.
    pub values: u32,
    /// SHA-256 of the payload.
    pub payload_digest: Digest,
    /// Time left to answer, in milliseconds, counted from receipt.
    pub deadline_ms: u32,
}

/// What a validator makes of a candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Appraisal {
    /// It forecasts the validator's rows at least as well as the model in force, up to chance and a small margin.
    NotWorse,
    /// It forecasts them worse.
    Worse,
    /// Too few rows, another layout, or the model in force is not held.
    CannotTell,
}

/// A validator's answer to a [`CandidateV1`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppraisalV1 {
    /// The round of the candidate.
    pub round: Round,
    /// Digest of the candidate's payload.
    pub payload_digest: Digest,
    /// What was found.
    pub appraisal: Appraisal,
    /// Residual of the candidate over that of the model in force, in thousandths, on the test that told most against it; 0 when it cannot be told,
    /// saturating.
    pub ratio_permille: u32,
}

/// A round has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClosedV1 {
    /// The round.
    pub round: Round,
    /// How.
    pub outcome: RoundOutcome,
}

/// What a new edge sends to the join listener.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequestV1 {
    /// Public part of the token.
    pub token_id: [u8; 8],
    /// Secret part of the token, 128 bits.
    pub secret: [u8; 16],
    /// PKCS#10 request in DER, at most 4 KiB; its key was made on the edge.
    pub csr: Vec<u8>,
}

impl std::fmt::Debug for JoinRequestV1 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JoinRequestV1")
            .field("token_id", &self.token_id)
            .finish_non_exhaustive()
    }
}

/// The answer of the join listener.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum JoinReplyV1 {
    /// The edge is enrolled.
    Enrolled {
        /// The site's name, as the token said.
        node: NodeId,
        /// Name of the federation.
        federation: String,
        /// `HOST:PORT` of the main listener.
        aggregator: String,
        /// The edge's certificate, DER.
        certificate: Vec<u8>,
        /// The authority of edges, DER.
        edge_authority: Vec<u8>,
        /// The authority of aggregators, DER: the only one an edge trusts for servers.
        aggregator_authority: Vec<u8>,
    },
    /// The token is unknown, spent with another key, or expired, or the request is no good.
    Refused(JoinRefusal),
}

/// Why enrolment was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum JoinRefusal {
    /// No such token, or a wrong secret.
    UnknownToken,
    /// The token's hour is over.
    Expired,
    /// The token was used with another key.
    Spent,
    /// The request does not parse or its signature is wrong.
    BadRequest,
    /// Too many requests right now.
    Busy,
    /// The request's key was revoked.
    RevokedKey,
    /// The aggregator's disk is full.
    StorageFull,
}

/// The aggregator goes down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GoodbyeV1 {
    /// Wait this long, plus jitter, before coming back.
    pub retry_after_ms: u32,
}
