//! A round is announced and updates come in.

use std::collections::{BTreeMap, BTreeSet};

use super::aggregating::Aggregating;
use super::closed::Aborting;
use super::{Context, Ignored, Input, Offer, OpenRound, Output, Phase};
use crate::message::AnnounceV1;
use crate::refusal::{AbortReason, RefusalCode};
use crate::units::{Digest, Moment, NodeId, Round};

/// A round that collects.
#[derive(Debug)]
pub(super) struct Collecting {
    round: Round,
    nonce: u64,
    deadline: Moment,
    /// Told of the round, ever: each has a place in it.
    told: BTreeSet<NodeId>,
    /// Told of the round, neither reported nor left since; `None` after a restart that does not know.
    awaited: Option<BTreeSet<NodeId>>,
    /// On their way to the disk.
    storing: BTreeMap<NodeId, Digest>,
    stored: BTreeMap<NodeId, Digest>,
    declined: BTreeSet<NodeId>,
    /// Sent something that was refused for good, and nothing valid since.
    refused: BTreeSet<NodeId>,
    /// Those of them that no honest node can be.
    faulty: BTreeSet<NodeId>,
    /// The deadline has passed; only what is on its way to the disk is waited for.
    over: bool,
}

impl Collecting {
    pub(super) fn opened(
        context: &Context,
        (round, nonce): (Round, u64),
        cohort: BTreeSet<NodeId>,
        now: Moment,
    ) -> Self {
        Self {
            round,
            nonce,
            deadline: now.after(context.config.deadline),
            awaited: Some(cohort.intersection(&context.admitted).cloned().collect()),
            told: cohort,
            storing: BTreeMap::new(),
            stored: BTreeMap::new(),
            declined: BTreeSet::new(),
            refused: BTreeSet::new(),
            faulty: BTreeSet::new(),
            over: false,
        }
    }

    pub(super) fn resumed(open: OpenRound, now: Moment) -> Self {
        let OpenRound {
            round,
            nonce,
            base: _,
            cohort,
            stored,
            declined,
            refused,
            faulty,
            remaining,
        } = open;
        let missing = || {
            cohort.iter().filter(|node| {
                !stored.contains_key(*node) && !declined.contains(*node) && !refused.contains(*node)
            })
        };
        let awaited = (!cohort.is_empty()).then(|| missing().cloned().collect());
        let deadline = now.after(remaining);
        let reported = stored.keys().chain(&declined).chain(&refused);
        let told = cohort.iter().chain(reported).cloned().collect();
        Self {
            told,
            round,
            nonce,
            deadline,
            awaited,
            storing: BTreeMap::new(),
            stored,
            declined,
            refused,
            faulty,
            over: false,
        }
    }

    pub(super) fn handle(mut self, context: &mut Context, now: Moment, input: Input) -> Phase {
        match input {
            Input::Admitted { node } => self.admitted(context, now, node),
            Input::Left { node } => {
                // Everybody gone at once is an outage of ours: the last one to go stays awaited, until the deadline.
                if let Some(awaited) = self.awaited.as_mut().filter(|_| !context.admitted.is_empty()) {
                    awaited.remove(&node);
                }
            }
            Input::Update {
                node,
                round,
                nonce,
                base_digest,
                payload_digest,
            } => {
                self.offered(
                    context,
                    Offer {
                        node,
                        round,
                        nonce,
                        base_digest,
                        payload_digest,
                    },
                );
            }
            Input::Declined {
                node,
                round,
                reason: _,
            } => self.declines(context, node, round),
            Input::Refused { node, round, faulty } => self.is_refused(context, node, round, faulty),
            Input::Stored { node, round } => self.is_stored(context, node, round),
            Input::StoreFailed { node, round } => {
                if round == self.round && self.storing.remove(&node).is_some() {
                    context.refuse(node, round, RefusalCode::StorageFull);
                } else {
                    context.ignore(Ignored::UnexpectedAnswer);
                }
            }
            Input::Stop => {}
            Input::Opened { .. }
            | Input::Aggregated { .. }
            | Input::AggregationFailed { .. }
            | Input::Published { .. }
            | Input::Aborted { .. } => context.ignore(Ignored::UnexpectedAnswer),
        }
        self.settle(context, now)
    }

    /// Ends the round if it is complete or its time is over.
    pub(super) fn settle(mut self, context: &mut Context, now: Moment) -> Phase {
        self.over |= now >= self.deadline;
        let quorum = self.has_quorum(context);
        let complete = quorum && self.awaited.as_ref().is_some_and(BTreeSet::is_empty);
        if !self.storing.is_empty() || !(self.over || complete) {
            return Phase::Collecting(self);
        }
        context.stops_collecting(self.round, self.nonce);
        if quorum {
            Phase::Aggregating(Aggregating::begin(context, self.round, self.stored))
        } else {
            Phase::Aborting(Aborting::begin(
                context,
                self.round,
                self.stored,
                AbortReason::QuorumMissed,
            ))
        }
    }

    /// At most f faulty nodes stand in for updates: more of them would let fewer than f + 1 nodes make a model.
    fn has_quorum(&self, context: &Context) -> bool {
        let (stored, f) = (self.stored.len(), context.config.byzantine);
        let faulty = self.faulty.len().min(f);
        let majority = (f - faulty).saturating_mul(2).saturating_add(1);
        stored.saturating_add(faulty) >= context.quorum() && stored >= majority
    }

    /// The deadline; `None` once it has passed and only the disk is waited for.
    pub(super) fn timeout(&self) -> Option<Moment> {
        (!self.over).then_some(self.deadline)
    }

    pub(super) fn announcement(&self, context: &Context, now: Moment) -> Option<AnnounceV1> {
        (!self.over).then(|| context.announcement(self.round, self.nonce, self.deadline.since(now)))
    }

    fn admitted(&mut self, context: &mut Context, now: Moment, node: NodeId) {
        if self.stored.contains_key(&node)
            || self.storing.contains_key(&node)
            || self.declined.contains(&node)
        {
            return;
        }
        let has_place = self.has_place(context, &node);
        if let Some(announce) = self.announcement(context, now).filter(|_| has_place) {
            self.told.insert(node.clone());
            // Coming back does not make anybody wait for a node that was refused.
            if let Some(awaited) = self.awaited.as_mut().filter(|_| !self.refused.contains(&node)) {
                awaited.insert(node.clone());
            }
            context.output(Output::Announce {
                to: vec![node],
                announce,
            });
        }
    }

    /// Whether a node is told of the round, or may still be.
    fn has_place(&self, context: &Context, node: &NodeId) -> bool {
        self.told.contains(node) || self.told.len() < context.config.updates_max.max(1)
    }

    fn offered(&mut self, context: &mut Context, offer: Offer) {
        if offer.round != self.round {
            return context.offer_out_of_turn(offer, None);
        }
        let Offer {
            node,
            round,
            nonce,
            base_digest,
            payload_digest,
        } = offer;
        if let Some(first) = self.stored.get(&node) {
            if *first == payload_digest {
                context.repeat_receipt(node, round, payload_digest);
            } else {
                context.refuse(node, round, RefusalCode::Duplicate);
            }
        } else if let Some(first) = self.storing.get(&node) {
            if *first == payload_digest {
                context.ignore(Ignored::RepeatedWhileStoring);
            } else {
                context.refuse(node, round, RefusalCode::Duplicate);
            }
        } else if self.over {
            context.refuse(node, round, RefusalCode::RoundClosed);
        } else if nonce != self.nonce {
            context.refuse(node, round, RefusalCode::WrongNonce);
        } else if base_digest != context.base.digest {
            context.refuse(node, round, RefusalCode::WrongBase);
        } else if !self.has_place(context, &node) {
            context.refuse(node, round, RefusalCode::Busy);
        } else {
            self.told.insert(node.clone());
            // A decline is no promise: a node whose disk has room again may still report.
            self.declined.remove(&node);
            context.counters.updates_taken += 1;
            self.storing.insert(node.clone(), payload_digest);
            context.output(Output::Store {
                node,
                round,
                payload_digest,
            });
        }
    }

    fn declines(&mut self, context: &mut Context, node: NodeId, round: Round) {
        if round != self.round || self.over {
            context.ignore(Ignored::DeclineOutOfTurn);
        } else if self.stored.contains_key(&node) || self.storing.contains_key(&node) {
            context.ignore(Ignored::DeclineAfterUpdate);
        } else {
            if let Some(awaited) = &mut self.awaited {
                awaited.remove(&node);
            }
            if self.declined.insert(node) {
                context.counters.declines += 1;
            } else {
                context.ignore(Ignored::DeclineRepeated);
            }
        }
    }

    fn is_refused(&mut self, context: &mut Context, node: NodeId, round: Round, faulty: bool) {
        let has_update = self.stored.contains_key(&node) || self.storing.contains_key(&node);
        if round != self.round || self.over || has_update {
            return context.ignore(Ignored::RefusalOutOfTurn);
        }
        if let Some(awaited) = &mut self.awaited {
            awaited.remove(&node);
        }
        let is_new = faulty && self.faulty.insert(node.clone());
        if !self.refused.insert(node) && !is_new {
            context.ignore(Ignored::RefusalOutOfTurn);
        }
    }

    fn is_stored(&mut self, context: &mut Context, node: NodeId, round: Round) {
        let Some(payload_digest) = (round == self.round)
            .then(|| self.storing.remove(&node))
            .flatten()
        else {
            return context.ignore(Ignored::UnexpectedAnswer);
        };
        context.counters.updates_stored += 1;
        if let Some(awaited) = &mut self.awaited {
            awaited.remove(&node);
        }
        self.refused.remove(&node);
        self.faulty.remove(&node);
        self.stored.insert(node.clone(), payload_digest);
        context.output(Output::Receipt {
            node,
            round,
            payload_digest,
        });
    }

    pub(super) fn round(&self) -> Round {
        self.round
    }

    pub(super) fn deadline(&self) -> Moment {
        self.deadline
    }

    pub(super) fn stored(&self) -> usize {
        self.stored.len()
    }

    pub(super) fn declined(&self) -> usize {
        self.declined.len()
    }
}
