//! The only way out of the host: charge, read, clip, noise, compress, encode.
//!
//! ```text
//! announcement → uncharged blocks that are over → Ledger::reserve (durable) → LocalUpdate → clip → noise → compress → OutboxRow
//! ```
//!
//! The charge is durable before a row is read, and the stored bytes are the ones that are sent, however often. A round
//! that was charged and whose bytes were lost in a crash is declined: noise is never drawn twice for one charge.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use rand::Rng as _;
use theriac_model::global::{GlobalModel, delta_layout, gradient_layout, moments_layout};
use theriac_model::gradient::{BlockRows, GradientPoint};
use theriac_model::series::Series;
use theriac_model::{moments, train};
use theriac_privacy::ledger::{
    BLOCKS_MAX, KnownHead, Ledger, LedgerError, ReleasePlan, Reservation, ReservationId, ReserveError,
    Reserved, Seal, Spent,
};
use theriac_privacy::noise::NoiseMechanism;
use theriac_privacy::policy::PrivacyUnit;
use theriac_privacy::update::{LocalUpdate, UpdateError};
use theriac_privacy::windows::BlockWindows;
use theriac_protocol::codec::{CodecError, decode_to_aggregator, encode_to_aggregator};
use theriac_protocol::frame::{HEADER_BYTES, kind};
use theriac_protocol::message::{
    AnnounceV1, DeclineReason, GuaranteeUnit, GuaranteeV1, ToAggregator, UpdateKind,
};
use theriac_protocol::units::{Digest, NoiseMultiplier, Timestamp};

use crate::Tamper;
use crate::detect::LaneShared;
use crate::store::OutboxRow;

/// Most rows that one `delta` training looks at.
const DELTA_ROWS_MAX: usize = 7_200;

/// Why there is no update for a round.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Unreleased {
    /// Too few blocks are over and uncharged.
    #[error("{found} uncharged blocks that are over are at hand, the round wants {needed}")]
    TooFewBlocks {
        /// The round's minimum.
        needed: u32,
        /// Blocks at hand.
        found: usize,
    },
    /// The ledger refused.
    #[error(transparent)]
    Reserve(#[from] ReserveError),
    /// The round was charged before and its bytes are not there any more.
    #[error(
        "the round was charged before a crash and its bytes are lost; noise is never drawn twice for one charge"
    )]
    BytesLost,
    /// The charge stays, but no update came of it.
    #[error(transparent)]
    Update(#[from] UpdateError),
    /// The update cannot be written down.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// The layout is not the one of this edge.
    #[error("the round asks for {announced} values, this edge's layout has {own}")]
    Layout {
        /// The announcement's number.
        announced: u32,
        /// Ours.
        own: usize,
    },
}

impl Unreleased {
    /// One stable word for metrics and events, finer than what the aggregator is told.
    pub fn word(&self) -> &'static str {
        match self {
            Self::TooFewBlocks { .. } => "too_few_blocks",
            Self::Reserve(error) => error.word(),
            Self::Layout { .. } => "unknown_layout",
            Self::BytesLost => "bytes_lost",
            Self::Update(_) => "no_noise",
            Self::Codec(_) => "codec",
        }
    }

    /// What the aggregator is told: one word that depends on nothing measured.
    pub fn decline_reason(&self) -> DeclineReason {
        match self {
            Self::TooFewBlocks { .. } => DeclineReason::TooFewBlocks,
            Self::Reserve(error) => error.decline_reason(),
            Self::Layout { .. } => DeclineReason::UnknownLayout,
            Self::BytesLost | Self::Update(_) | Self::Codec(_) => DeclineReason::StorageUnavailable,
        }
    }
}

/// What became of a request for an update.
#[derive(Debug)]
pub enum Release {
    /// Fresh bytes: put them into the outbox, then [`Releaser::mark_released`].
    Fresh {
        /// The row for the outbox.
        row: OutboxRow,
        /// The charge that paid for it.
        id: ReservationId,
    },
    /// The same round was charged before; the outbox may still hold its bytes.
    Stored,
}

/// What was spent and how far the ledger has come, as last published by a [`Releaser`]; cheap to clone. Reading it never
/// waits for a release.
#[derive(Debug, Clone)]
pub struct Budget(Arc<Mutex<Published>>);

/// See [`Budget`].
#[derive(Debug, Clone, Copy)]
pub struct Published {
    /// What was spent.
    pub spent: Spent,
    /// How far the ledger has come.
    pub known: KnownHead,
    /// The policy's floor on the noise.
    pub noise_multiplier_min: NoiseMultiplier,
    /// How many records the aggregator has counter-signed.
    pub sealed_records: u64,
}

impl Published {
    fn of(ledger: &Ledger) -> Self {
        Self {
            spent: ledger.spent(),
            known: ledger.known_head(),
            noise_multiplier_min: ledger.policy().noise_multiplier_min(),
            sealed_records: ledger.seal().map_or(0, |seal| seal.records),
        }
    }
}

impl Budget {
    /// The state after the last charge or mark.
    pub fn published(&self) -> Published {
        // Held for a copy.
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes updates of one lane's history under one ledger.
#[derive(Debug)]
pub struct Releaser {
    ledger: Ledger,
    budget: Budget,
    lane: Arc<LaneShared>,
    step: Duration,
    local_steps: usize,
    mechanism: Box<dyn NoiseMechanism + Send>,
    tamper: Hook,
    clock: Clock,
}

/// The time, for which blocks are over and which period is charged.
type Clock = fn() -> Timestamp;

/// See [`Tamper`].
struct Hook(Option<Tamper>);

impl std::fmt::Debug for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hook({})", if self.0.is_some() { "hostile" } else { "none" })
    }
}

impl Releaser {
    /// A releaser over an open ledger. Rows of `lane` are `step` apart.
    pub fn new(
        ledger: Ledger,
        lane: Arc<LaneShared>,
        step: Duration,
        local_steps: usize,
        mechanism: Box<dyn NoiseMechanism + Send>,
        tamper: Option<Tamper>,
    ) -> Self {
        let budget = Budget(Arc::new(Mutex::new(Published::of(&ledger))));
        Self {
            ledger,
            budget,
            lane,
            step,
            local_steps,
            mechanism,
            tamper: Hook(tamper),
            clock: system_time,
        }
    }

    /// The same with another clock than the system's.
    #[must_use]
    pub fn with_clock(self, clock: fn() -> Timestamp) -> Self {
        Self { clock, ..self }
    }

    /// The ledger.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// What the ledger says, to be read without waiting for a release.
    pub fn budget(&self) -> Budget {
        self.budget.clone()
    }

    /// Keeps what the aggregator has signed of this ledger. The caller has checked the signature.
    ///
    /// # Errors
    /// [`LedgerError::WentBackwards`] when this ledger never was there: then nothing may be trained or sent with it.
    pub fn keep_seal(&mut self, seal: Seal) -> Result<(), LedgerError> {
        let kept = self.ledger.keep_seal(seal);
        self.publish();
        kept
    }

    /// What the policy guarantees, as the aggregator is told.
    pub fn guarantee(&self) -> GuaranteeV1 {
        let policy = self.ledger.policy();
        GuaranteeV1 {
            unit: match policy.unit() {
                // No site's policy has the unit `node`.
                PrivacyUnit::Block | PrivacyUnit::Node => GuaranteeUnit::Block,
                PrivacyUnit::Record => GuaranteeUnit::Record,
            },
            block_ms: u64::try_from(policy.block_span().as_millis()).unwrap_or(u64::MAX),
            epsilon: policy.epsilon(),
            delta: policy.delta(),
            period: policy.period().to_string(),
            noise_multiplier_min: policy.noise_multiplier_min(),
            policy_version: policy.version(),
            policy_hash: policy.hash(),
            policy_signer: policy
                .signature()
                .map(|by| by.key.to_string())
                .unwrap_or_default(),
        }
    }

    fn publish(&self) {
        *self.budget.0.lock().unwrap_or_else(PoisonError::into_inner) = Published::of(&self.ledger);
    }

    /// Makes the update of a round: blocks the thread for the ledger's sync and the arithmetic. `base` is the model that the
    /// round builds on.
    ///
    /// # Errors
    /// [`Unreleased`]; unless it is [`Unreleased::Update`] or later, nothing was charged.
    pub fn release(&mut self, announce: &AnnounceV1, base: &GlobalModel) -> Result<Release, Unreleased> {
        let id = ReservationId {
            round: announce.round,
            nonce: announce.nonce,
        };
        // Before the plan: after a restart there may be no blocks, and that is not why this round gets nothing new.
        if self.ledger.reservation(id).is_some() {
            return Ok(Release::Stored);
        }
        let plan = self.plan(announce)?;
        let reserved = self.ledger.reserve(plan, (self.clock)());
        self.publish();
        let reservation = match reserved? {
            Reserved::Fresh(reservation) => reservation,
            Reserved::AlreadyCharged { .. } => return Ok(Release::Stored),
        };
        let id = reservation.id();
        let row = self.make(reservation, announce, base)?;
        Ok(Release::Fresh { row, id })
    }

    /// Notes that the bytes are in the outbox and may be sent.
    ///
    /// # Errors
    /// [`LedgerError`]; then they must not be sent.
    pub fn mark_released(&mut self, id: ReservationId, payload_digest: Digest) -> Result<(), LedgerError> {
        let marked = self.ledger.mark_released(id, payload_digest, (self.clock)());
        self.publish();
        marked
    }

    /// Whether the ledger knows of the charge for these bytes. Where it does not, the ledger wins: nothing may be sent.
    ///
    /// # Errors
    /// [`LedgerError`] when the ledger knows other bytes or no charge.
    pub fn confirm(&mut self, row: &OutboxRow) -> Result<(), LedgerError> {
        let id = ReservationId {
            round: row.round,
            nonce: row.nonce,
        };
        match self.ledger.reservation(id) {
            Some(Some(released)) if released == row.payload_digest => Ok(()),
            // Not yet marked: the crash came between the outbox and the mark. Other bytes are refused in there.
            _ => self.mark_released(id, row.payload_digest),
        }
    }

    fn plan(&self, announce: &AnnounceV1) -> Result<ReleasePlan, Unreleased> {
        let channels = self.lane.schema.channels();
        let own = match announce.kind {
            UpdateKind::Moments => moments_layout(channels).len(),
            UpdateKind::Delta => delta_layout(channels).len(),
            UpdateKind::Gradient => gradient_layout(channels).len(),
        };
        if announce.values as usize != own {
            return Err(Unreleased::Layout {
                announced: announce.values,
                own,
            });
        }
        let mut plan = ReleasePlan {
            round: announce.round,
            nonce: announce.nonce,
            kind: announce.kind,
            values: announce.values,
            block_span: self.ledger.policy().block_span(),
            blocks: Vec::new(),
            windows: None,
            sampling_rate: 1.0,
            steps: 1,
            clip_norm: announce.clip_norm,
            noise_multiplier: announce.noise_multiplier,
        };
        if announce.kind != UpdateKind::Delta {
            // Before anything is counted: the aggregator does not choose how the history is cut up.
            let expected = plan.block_span;
            plan.block_span = self.step * announce.block_rows;
            if plan.block_span != expected {
                return Err(Unreleased::Reserve(ReserveError::OtherBlocks {
                    expected_ms: expected.as_millis(),
                    found_ms: plan.block_span.as_millis(),
                }));
            }
            plan.windows = self.windows(announce)?;
            let now = (self.clock)();
            let mut blocks = self.at_hand(plan.block_span, now);
            if announce.kind == UpdateKind::Moments {
                blocks.retain(|block| self.ledger.is_chargeable_at(*block, now));
            }
            blocks = self.affordable(&mut plan, blocks, announce, now)?;
            // The newest ones: they say most about now.
            blocks.drain(..blocks.len().saturating_sub(announce.blocks_max as usize));
            if blocks.len() < announce.blocks_min.max(1) as usize {
                return Err(Unreleased::TooFewBlocks {
                    needed: announce.blocks_min.max(1),
                    found: blocks.len(),
                });
            }
            plan.blocks = blocks;
        }
        Ok(plan)
    }

    /// How the policy cuts this round's blocks.
    fn windows(&self, announce: &AnnounceV1) -> Result<Option<BlockWindows>, Unreleased> {
        let windows = self.ledger.policy().record_windows();
        let cut = windows.map(|windows| windows.in_block(announce.block_rows));
        cut.transpose().map_err(|_| {
            Unreleased::Reserve(ReserveError::BadPlan(
                "the policy's record_window is longer than the round's blocks",
            ))
        })
    }

    /// The newest blocks that a round may name, there or not; no more than one release can.
    fn at_hand(&self, span: Duration, now: Timestamp) -> Vec<u64> {
        let millis = |span: Duration| u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
        let blocks = self
            .lane
            .history()
            .spanned_blocks(now.0, millis(span), millis(self.step));
        let newest = blocks.end.saturating_sub(BLOCKS_MAX as u64);
        (blocks.start.max(newest)..blocks.end).collect()
    }

    /// The blocks that can bear this release besides what they bore before. Rounds of gradients read the same blocks again, so at some time the budget of
    /// those at hand is spent, which is another reason to decline than that there are none.
    fn affordable(
        &self,
        plan: &mut ReleasePlan,
        blocks: Vec<u64>,
        announce: &AnnounceV1,
        now: Timestamp,
    ) -> Result<Vec<u64>, Unreleased> {
        plan.blocks = blocks;
        let affordable = self.ledger.affordable(plan, now);
        let enough = |count: usize| count >= announce.blocks_min.max(1) as usize;
        if !enough(affordable.len()) && enough(plan.blocks.len()) {
            // The ledger's own words.
            self.ledger.check(plan, now)?;
        }
        Ok(affordable)
    }

    fn make(
        &self,
        reservation: Reservation,
        announce: &AnnounceV1,
        base: &GlobalModel,
    ) -> Result<OutboxRow, Unreleased> {
        let layout = announce.layout_digest;
        let windows = reservation.plan().windows;
        let local = match announce.kind {
            UpdateKind::Moments => LocalUpdate::moments(reservation, layout, |blocks| {
                self.moments(blocks, announce.block_rows, windows)
            })?,
            UpdateKind::Delta => LocalUpdate::delta(reservation, layout, || self.delta(announce, base))?,
            UpdateKind::Gradient => LocalUpdate::gradient(reservation, layout, |blocks| {
                self.gradients(blocks, announce.block_rows, windows, base)
            })?,
        };
        let noisy = local.clip().noise(self.mechanism.as_ref())?;
        let noisy = match &self.tamper.0 {
            Some(tamper) => noisy.post_process(|values| tamper(announce.round, values)),
            None => noisy,
        };
        let mut rng = rand::rng();
        let compressed = noisy.compress(|| rng.random::<f32>());
        let payload_digest = compressed.payload_digest();
        let (header, payload) = compressed.into_message(announce.base_digest, announce.blocks_max);
        let body = encode_body(&ToAggregator::Update(header, payload))?;
        Ok(OutboxRow {
            round: announce.round,
            nonce: announce.nonce,
            payload_digest,
            body,
        })
    }

    /// The rows that give one vector each: of every charged block that is complete, or of every whole window.
    fn pieces(&self, blocks: &[u64], block_rows: u32, windows: Option<BlockWindows>) -> Vec<Series> {
        let span_ms = u64::try_from((self.step * block_rows).as_millis()).unwrap_or(u64::MAX);
        let history = self.lane.history();
        let of_block = |block: &u64| match windows {
            Some(windows) => history.windows(*block, span_ms, windows),
            None => history
                .complete_block(*block, span_ms, block_rows)
                .into_iter()
                .collect(),
        };
        blocks.iter().flat_map(of_block).collect()
    }

    /// Their moments, each from its own rows alone.
    fn moments(&self, blocks: &[u64], block_rows: u32, windows: Option<BlockWindows>) -> Vec<Vec<f32>> {
        let schema = &self.lane.schema;
        self.pieces(blocks, block_rows, windows)
            .iter()
            .map(|series| moments::block(&moments::public_values(schema, series), series.rows()))
            .collect()
    }

    /// Their gradients at the weights that the round builds on, each from its own rows alone.
    fn gradients(
        &self,
        blocks: &[u64],
        block_rows: u32,
        windows: Option<BlockWindows>,
        base: &GlobalModel,
    ) -> Vec<Vec<f32>> {
        let schema = &self.lane.schema;
        let point = GradientPoint::new(&base.descent().iterate);
        self.pieces(blocks, block_rows, windows)
            .iter()
            .map(|series| {
                point.gradient(&BlockRows::new(
                    &moments::public_values(schema, series),
                    series.rows(),
                ))
            })
            .collect()
    }

    fn delta(&self, announce: &AnnounceV1, base: &GlobalModel) -> Vec<f32> {
        let series = self.lane.history().quiet(DELTA_ROWS_MAX);
        let schema = &self.lane.schema;
        train::delta(base, schema, &series, self.local_steps, announce.round.0).unwrap_or_else(|error| {
            // The charge is made, so something must be said; a zero update says nothing about the data.
            tracing::warn!(round = announce.round.0, %error, "no weight change could be trained, sending noise only");
            vec![0.0; announce.values as usize]
        })
    }
}

/// The message as it goes over the wire, without the frame's header.
fn encode_body(message: &ToAggregator) -> Result<Bytes, CodecError> {
    let encoded = encode_to_aggregator(message)?;
    let mut body = BytesMut::with_capacity(encoded.len() - HEADER_BYTES);
    body.extend_from_slice(&encoded.head[HEADER_BYTES..]);
    body.extend_from_slice(&encoded.payload);
    Ok(body.freeze())
}

/// The message that an outbox row holds; encoding it again gives the same bytes.
///
/// # Errors
/// [`CodecError`] when the row is damaged.
pub fn message_of(row: &OutboxRow) -> Result<ToAggregator, CodecError> {
    decode_to_aggregator(kind::UPDATE_V1, row.body.clone())
}

/// The system's clock. It decides which blocks are over, which period of a calendar budget is charged (never an earlier one than before) and which blocks
/// are past their retention.
pub(crate) fn system_time() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests;
