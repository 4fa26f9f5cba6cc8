//! The aggregator's half of a round, as a state machine without I/O.
//!
//! ```text
//!            enough nodes, pause over            Opened                all reported, or deadline
//!   Idle ───────────────────────────▶ Opening ──────────▶ Collecting ───────────────────────────▶ Aggregating
//!    ▲                                 (Open)   (Announce)  Update → Store → Stored → Receipt       (Aggregate)
//!    │                                                        │ deadline, quorum missed                │ Aggregated
//!    │                             Aborted                    ▼                   AggregationFailed    ▼
//!    ├──────────────────────────────────────────────────── Aborting ◀───────────────────────────── Publishing
//!    │                                                      (Abort)                                 (Publish)
//!    └────────────────────────────────────────────────────────────────────────────────────────────────┘ Published
//! ```
//!
//! Idle becomes Closed when told to stop or after the last round. Nothing is said before it is durable: a round is
//! announced after [`Input::Opened`], a receipt follows [`Input::Stored`], an end is told after
//! [`Input::Published`] or [`Input::Aborted`]. A crash between any two steps is met by [`RoundMachine::resume`]
//! with what the store holds: the same round, the same nonce, the same updates.
//!
//! The rules:
//!
//! - A round ends when every node that was told of it and has not left since has reported, declined or been refused, and the quorum is met;
//!   at the deadline with the quorum it ends as well, and without it publishes nothing. No slow, silent, early,
//!   late, repeated or foreign message moves that deadline.
//! - Up to f nodes whose update was refused for what no honest node sends count towards the quorum. One that was refused for another reason may be honest
//!   and counts as a silent one.
//! - An update on its way to the disk at the deadline is waited for: what is stored and what is published are the same set.
//! - With [`RoundConfig::late_updates`] an update for the round that ended last, one a node, is stored apart from that round until the next one stops
//!   collecting. It ends, delays and completes no round.
//! - At most [`RoundConfig::updates_max`] nodes are told of a round. A node that was not is `busy` while no place is free.
//! - A node's first durable update counts. The same bytes again get the same receipt, other bytes are refused.
//!
//! The driver calls [`handle`](RoundMachine::handle) or [`handle_timeout`](RoundMachine::handle_timeout), then empties
//! [`poll_output`](RoundMachine::poll_output) and sets its timer by [`poll_timeout`](RoundMachine::poll_timeout). Memory is bounded by
//! the number of nodes that the driver admits.

mod aggregating;
mod closed;
mod collecting;
mod config;
mod idle;
mod input;
mod late;
mod output;
mod publishing;
mod status;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use sha2::{Digest as _, Sha256};

pub use self::config::{BaseModel, OpenRound, RoundConfig, RoundTerms};
pub use self::input::Input;
pub use self::output::Output;
pub use self::status::{Ignored, PhaseName, RoundCounters, RoundStatus};

use self::aggregating::Aggregating;
use self::closed::{Aborting, Closed};
use self::collecting::Collecting;
use self::idle::{Idle, Opening};
use self::late::Late;
use self::publishing::Publishing;
use crate::message::{AnnounceV1, ClosedV1};
use crate::refusal::{RefusalCode, RoundOutcome};
use crate::units::{Digest, Moment, NodeId, Round};

/// The aggregator's half of a round; see the module's page.
#[derive(Debug)]
pub struct RoundMachine {
    context: Context,
    phase: Phase,
}

impl RoundMachine {
    /// A machine with no open round. `last` is the highest round number ever used ([`Round`]`(0)`: none); `nonce_seed` comes
    /// from the operating system, or from the seed of a simulation.
    pub fn new(config: RoundConfig, base: BaseModel, last: Round, nonce_seed: [u8; 32], now: Moment) -> Self {
        let mut context = Context::new(config, base, last, nonce_seed);
        let phase = Idle::until(now).settle(&mut context, now);
        Self { context, phase }
    }

    /// A machine that goes on with a round that was open: same number, same nonce, same updates. When all of its
    /// cohort had reported, or its time is over, it asks for the aggregation at once; otherwise nodes are told
    /// of it as they come back. Poll outputs and the timeout.
    pub fn resume(config: RoundConfig, open: OpenRound, nonce_seed: [u8; 32], now: Moment) -> Self {
        let mut context = Context::new(config, open.base, open.round, nonce_seed);
        let phase = Collecting::resumed(open, now).settle(&mut context, now);
        Self { context, phase }
    }

    /// Takes an input. What is due at `now` happens first. Poll outputs and the timeout afterwards.
    pub fn handle(&mut self, now: Moment, input: Input) {
        self.handle_timeout(now);
        match &input {
            Input::Admitted { node } if !self.context.admitted.insert(node.clone()) => {
                self.context.ignore(Ignored::MembershipUnchanged);
            }
            Input::Left { node } if !self.context.admitted.remove(node) => {
                self.context.ignore(Ignored::MembershipUnchanged);
            }
            Input::Stop => self.context.stopping = true,
            Input::Stored { node, round } if self.context.late_is_stored(node, *round) => return,
            Input::StoreFailed { node, round } if self.context.late_failed(node, *round) => return,
            _ => {}
        }
        self.advance(|phase, context| phase.handle(context, now, input));
    }

    /// Whether no round may open for now, whoever is there; an open one goes on. False when that is so already. Poll outputs and the timeout afterwards.
    pub fn hold(&mut self, now: Moment, held: bool) -> bool {
        let changed = self.context.held != held;
        self.context.held = held;
        self.handle_timeout(now);
        changed
    }

    /// Takes note that time has passed. Poll outputs and the timeout afterwards.
    pub fn handle_timeout(&mut self, now: Moment) {
        self.advance(|phase, context| phase.settle(context, now));
    }

    /// The next thing to do, in order, until `None`. Poll after every call that takes `&mut self`.
    #[must_use = "an output that is not carried out stops the round"]
    pub fn poll_output(&mut self) -> Option<Output> {
        self.context.outputs.pop_front()
    }

    /// When to call [`handle_timeout`](Self::handle_timeout) at the latest; `None`: only an input can change anything.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Moment> {
        match &self.phase {
            Phase::Idle(idle) => idle.timeout(&self.context),
            Phase::Collecting(collecting) => collecting.timeout(),
            Phase::Opening(_)
            | Phase::Aggregating(_)
            | Phase::Publishing(_)
            | Phase::Aborting(_)
            | Phase::Closed(_) => None,
        }
    }

    /// The open round as a node would be told now, for its Welcome; `None` when nothing is being collected.
    pub fn announcement(&self, now: Moment) -> Option<AnnounceV1> {
        match &self.phase {
            Phase::Collecting(collecting) => collecting.announcement(&self.context, now),
            _ => None,
        }
    }

    /// The machine at a glance.
    pub fn status(&self) -> RoundStatus {
        let at = |phase, round, stored, declined, deadline| RoundStatus {
            phase,
            round,
            base: self.context.base,
            admitted: self.context.admitted.len(),
            stored,
            declined,
            deadline,
        };
        match &self.phase {
            Phase::Idle(_) => at(PhaseName::Idle, self.context.last, 0, 0, None),
            Phase::Opening(opening) => at(PhaseName::Opening, opening.round(), 0, 0, None),
            Phase::Collecting(c) => at(
                PhaseName::Collecting,
                c.round(),
                c.stored(),
                c.declined(),
                Some(c.deadline()),
            ),
            Phase::Aggregating(a) => at(PhaseName::Aggregating, a.round(), a.stored(), 0, None),
            Phase::Publishing(p) => at(PhaseName::Publishing, p.round(), p.stored(), 0, None),
            Phase::Aborting(a) => at(PhaseName::Aborting, a.round(), a.stored(), 0, None),
            Phase::Closed(_) => at(PhaseName::Closed, self.context.last, 0, 0, None),
        }
    }

    /// What happened how often.
    pub fn counters(&self) -> &RoundCounters {
        &self.context.counters
    }

    fn advance(&mut self, step: impl FnOnce(Phase, &mut Context) -> Phase) {
        let phase = std::mem::replace(&mut self.phase, Phase::Closed(Closed));
        self.phase = step(phase, &mut self.context);
    }
}

/// One of the phases, each owning only what it knows and consuming itself.
#[derive(Debug)]
enum Phase {
    Idle(Idle),
    Opening(Opening),
    Collecting(Collecting),
    Aggregating(Aggregating),
    Publishing(Publishing),
    Aborting(Aborting),
    Closed(Closed),
}

impl Phase {
    fn handle(self, context: &mut Context, now: Moment, input: Input) -> Self {
        match self {
            Self::Idle(phase) => phase.handle(context, now, input),
            Self::Opening(phase) => phase.handle(context, now, input),
            Self::Collecting(phase) => phase.handle(context, now, input),
            Self::Aggregating(phase) => phase.handle(context, now, input),
            Self::Publishing(phase) => phase.handle(context, now, input),
            Self::Aborting(phase) => phase.handle(context, now, input),
            Self::Closed(phase) => phase.handle(context, input),
        }
    }

    /// Does what time, and nothing else, makes due.
    fn settle(self, context: &mut Context, now: Moment) -> Self {
        match self {
            Self::Idle(phase) => phase.settle(context, now),
            Self::Collecting(phase) => phase.settle(context, now),
            other @ (Self::Opening(_)
            | Self::Aggregating(_)
            | Self::Publishing(_)
            | Self::Aborting(_)
            | Self::Closed(_)) => other,
        }
    }
}

/// What all phases share.
#[derive(Debug)]
struct Context {
    config: RoundConfig,
    nonce_seed: [u8; 32],
    base: BaseModel,
    /// The highest round that nodes may have heard of.
    last: Round,
    admitted: BTreeSet<NodeId>,
    stopping: bool,
    /// No round may open for now.
    held: bool,
    /// The durable updates of the round that ended last: a node that missed its receipt still gets it.
    before: Option<(Round, BTreeMap<NodeId, Digest>)>,
    /// Updates that came after their round's end.
    late: Late,
    outputs: VecDeque<Output>,
    counters: RoundCounters,
}

/// An update as it is offered; [`Input::Update`] by value.
#[derive(Debug)]
struct Offer {
    node: NodeId,
    round: Round,
    nonce: u64,
    base_digest: Digest,
    payload_digest: Digest,
}

impl Context {
    fn new(config: RoundConfig, base: BaseModel, last: Round, nonce_seed: [u8; 32]) -> Self {
        Self {
            config,
            nonce_seed,
            base,
            last,
            admitted: BTreeSet::new(),
            stopping: false,
            held: false,
            before: None,
            late: Late::default(),
            outputs: VecDeque::new(),
            counters: RoundCounters::default(),
        }
    }

    fn quorum(&self) -> usize {
        self.config.quorum.max(1)
    }

    /// The admitted nodes that a round with this nonce is for: all, or of too many those with the least SHA-256(nonce ‖ name).
    fn cohort(&self, nonce: u64) -> BTreeSet<NodeId> {
        let places = self.config.updates_max.max(1);
        if self.admitted.len() <= places {
            return self.admitted.clone();
        }
        let drawn = |node: &NodeId| -> [u8; 32] {
            let hash = Sha256::new().chain_update(nonce.to_le_bytes());
            hash.chain_update(node.as_str()).finalize().into()
        };
        let mut nodes: Vec<([u8; 32], &NodeId)> =
            self.admitted.iter().map(|node| (drawn(node), node)).collect();
        nodes.sort_unstable();
        nodes.truncate(places);
        nodes.into_iter().map(|(_, node)| node.clone()).collect()
    }

    /// First eight bytes of SHA-256(seed ‖ round), both little-endian.
    fn nonce(&self, round: Round) -> u64 {
        let hash: [u8; 32] = Sha256::new()
            .chain_update(self.nonce_seed)
            .chain_update(round.0.to_le_bytes())
            .finalize()
            .into();
        hash.first_chunk().copied().map_or(0, u64::from_le_bytes)
    }

    fn announcement(&self, round: Round, nonce: u64, left: std::time::Duration) -> AnnounceV1 {
        let terms = &self.config.terms;
        AnnounceV1 {
            round,
            nonce,
            kind: terms.kind,
            values: terms.values,
            layout_digest: terms.layout_digest,
            base_version: self.base.version,
            base_digest: self.base.digest,
            clip_norm: terms.clip_norm,
            noise_multiplier: terms.noise_multiplier,
            block_rows: terms.block_rows,
            blocks_min: terms.blocks_min,
            blocks_max: terms.blocks_max,
            deadline_ms: u32::try_from(left.as_millis()).unwrap_or(u32::MAX),
        }
    }

    fn output(&mut self, output: Output) {
        self.outputs.push_back(output);
    }

    fn ignore(&mut self, why: Ignored) {
        *self.counters.ignored.entry(why).or_default() += 1;
    }

    fn refuse(&mut self, node: NodeId, round: Round, code: RefusalCode) {
        *self.counters.refused.entry(code).or_default() += 1;
        self.output(Output::Refuse { node, round, code });
    }

    fn repeat_receipt(&mut self, node: NodeId, round: Round, payload_digest: Digest) {
        self.counters.updates_repeated += 1;
        self.output(Output::Receipt {
            node,
            round,
            payload_digest,
        });
    }

    /// An update while its round does not, or no longer, collect. `stored` are the durable updates of the round at hand.
    fn offer_out_of_turn(&mut self, offer: Offer, at_hand: Option<(Round, &BTreeMap<NodeId, Digest>)>) {
        let Offer {
            node,
            round,
            nonce,
            base_digest,
            payload_digest,
        } = offer;
        let before = self.before.as_ref().map(|(round, stored)| (*round, stored));
        let known = at_hand
            .into_iter()
            .chain(before)
            .find(|(known, _)| *known == round);
        match known.and_then(|(_, stored)| stored.get(&node)) {
            Some(first) if *first == payload_digest => self.repeat_receipt(node, round, payload_digest),
            Some(_) => self.refuse(node, round, RefusalCode::Duplicate),
            None if self.late.takes(round) => self.offer_late(Offer {
                node,
                round,
                nonce,
                base_digest,
                payload_digest,
            }),
            None if round <= self.last => self.refuse(node, round, RefusalCode::RoundClosed),
            None => self.refuse(node, round, RefusalCode::RoundUnknown),
        }
    }

    /// The round has ended and its end is durable: everybody is told, and the pause begins.
    fn end(
        &mut self,
        now: Moment,
        round: Round,
        stored: BTreeMap<NodeId, Digest>,
        outcome: RoundOutcome,
    ) -> Phase {
        match outcome {
            RoundOutcome::Published(_) => self.counters.rounds_published += 1,
            RoundOutcome::Aborted(_) => self.counters.rounds_aborted += 1,
        }
        self.before = Some((round, stored));
        let to = self.admitted.iter().cloned().collect();
        self.output(Output::Closed {
            to,
            closed: ClosedV1 { round, outcome },
        });
        Idle::until(now.after(self.config.pause)).settle(self, now)
    }
}

#[cfg(test)]
mod tests;
