//! Endings: [`Aborting`] is the end of a round without a model, [`Closed`] the end of all rounds.

use std::collections::BTreeMap;

use super::{Context, Ignored, Input, Offer, Output, Phase};
use crate::refusal::{AbortReason, RoundOutcome};
use crate::units::{Digest, Moment, NodeId, Round};

/// Waits for the end of a round without a model to be durable.
#[derive(Debug)]
pub(super) struct Aborting {
    round: Round,
    stored: BTreeMap<NodeId, Digest>,
    reason: AbortReason,
}

impl Aborting {
    pub(super) fn begin(
        context: &mut Context,
        round: Round,
        stored: BTreeMap<NodeId, Digest>,
        reason: AbortReason,
    ) -> Self {
        context.output(Output::Abort { round, reason });
        Self {
            round,
            stored,
            reason,
        }
    }

    pub(super) fn handle(self, context: &mut Context, now: Moment, input: Input) -> Phase {
        match input {
            Input::Aborted { round } if round == self.round => {
                return context.end(now, self.round, self.stored, RoundOutcome::Aborted(self.reason));
            }
            Input::Admitted { .. } | Input::Left { .. } | Input::Stop => {}
            Input::Update {
                node,
                round,
                nonce,
                base_digest,
                payload_digest,
            } => {
                let offer = Offer {
                    node,
                    round,
                    nonce,
                    base_digest,
                    payload_digest,
                };
                context.offer_out_of_turn(offer, Some((self.round, &self.stored)));
            }
            Input::Declined { .. } => context.ignore(Ignored::DeclineOutOfTurn),
            Input::Refused { .. } => context.ignore(Ignored::RefusalOutOfTurn),
            Input::Stored { .. }
            | Input::StoreFailed { .. }
            | Input::Opened { .. }
            | Input::Aggregated { .. }
            | Input::AggregationFailed { .. }
            | Input::Published { .. }
            | Input::Aborted { .. } => context.ignore(Ignored::UnexpectedAnswer),
        }
        Phase::Aborting(self)
    }

    pub(super) fn round(&self) -> Round {
        self.round
    }

    pub(super) fn stored(&self) -> usize {
        self.stored.len()
    }
}

/// No further round opens. Nodes may come, go and ask for their receipts.
#[derive(Debug)]
pub(super) struct Closed;

impl Closed {
    pub(super) fn handle(self, context: &mut Context, input: Input) -> Phase {
        match input {
            Input::Admitted { .. } | Input::Left { .. } | Input::Stop => {}
            Input::Update {
                node,
                round,
                nonce,
                base_digest,
                payload_digest,
            } => {
                context.offer_out_of_turn(
                    Offer {
                        node,
                        round,
                        nonce,
                        base_digest,
                        payload_digest,
                    },
                    None,
                );
            }
            Input::Declined { .. } => context.ignore(Ignored::DeclineOutOfTurn),
            Input::Refused { .. } => context.ignore(Ignored::RefusalOutOfTurn),
            Input::Stored { .. }
            | Input::StoreFailed { .. }
            | Input::Opened { .. }
            | Input::Aggregated { .. }
            | Input::AggregationFailed { .. }
            | Input::Published { .. }
            | Input::Aborted { .. } => context.ignore(Ignored::UnexpectedAnswer),
        }
        Phase::Closed(self)
    }
}
