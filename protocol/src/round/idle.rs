//! Between rounds: [`Idle`] waits for the pause to end and for a quorum of nodes, [`Opening`] for the new round to be durable.

use std::collections::BTreeSet;

use super::closed::Closed;
use super::collecting::Collecting;
use super::{Context, Ignored, Input, Offer, Output, Phase};
use crate::units::{Moment, NodeId, Round};

/// No round is open.
#[derive(Debug)]
pub(super) struct Idle {
    not_before: Moment,
}

impl Idle {
    pub(super) fn until(not_before: Moment) -> Self {
        Self { not_before }
    }

    pub(super) fn handle(self, context: &mut Context, now: Moment, input: Input) -> Phase {
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
        self.settle(context, now)
    }

    /// Opens a round if it is time and there are nodes for it.
    pub(super) fn settle(self, context: &mut Context, now: Moment) -> Phase {
        let round = context.last.next();
        let past_last = round == context.last || context.config.rounds_max.is_some_and(|max| round.0 > max);
        if context.stopping || past_last {
            return Phase::Closed(Closed);
        }
        if context.held || now < self.not_before || context.admitted.len() < context.quorum() {
            return Phase::Idle(self);
        }
        let nonce = context.nonce(round);
        let announce = context.announcement(round, nonce, context.config.deadline);
        let cohort = context.cohort(nonce);
        let asked = cohort.iter().cloned().collect();
        context.output(Output::Open {
            announce,
            cohort: asked,
        });
        Phase::Opening(Opening { round, nonce, cohort })
    }

    /// The end of the pause, where that is what is waited for.
    pub(super) fn timeout(&self, context: &Context) -> Option<Moment> {
        (!context.held && context.admitted.len() >= context.quorum()).then_some(self.not_before)
    }
}

/// A round is on its way to the disk; nobody knows of it yet.
#[derive(Debug)]
pub(super) struct Opening {
    round: Round,
    nonce: u64,
    /// For whom it is, as the disk will have it.
    cohort: BTreeSet<NodeId>,
}

impl Opening {
    pub(super) fn round(&self) -> Round {
        self.round
    }

    pub(super) fn handle(self, context: &mut Context, now: Moment, input: Input) -> Phase {
        match input {
            Input::Opened { round } if round == self.round => return self.opened(context, now),
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
        Phase::Opening(self)
    }

    fn opened(self, context: &mut Context, now: Moment) -> Phase {
        context.counters.rounds_opened += 1;
        context.last = self.round;
        let mut told = self.cohort;
        // Who came in the meantime joins as one that comes later does, while there are places.
        let places = context.config.updates_max.max(1).saturating_sub(told.len());
        let came: Vec<NodeId> = context.admitted.difference(&told).take(places).cloned().collect();
        told.extend(came);
        let to = told.intersection(&context.admitted).cloned().collect();
        let announce = context.announcement(self.round, self.nonce, context.config.deadline);
        context.output(Output::Announce { to, announce });
        Collecting::opened(context, (self.round, self.nonce), told, now).settle(context, now)
    }
}
