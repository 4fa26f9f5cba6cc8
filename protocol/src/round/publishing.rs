//! The new model is being made durable.

use std::collections::BTreeMap;

use super::{BaseModel, Context, Ignored, Input, Offer, Output, Phase};
use crate::refusal::RoundOutcome;
use crate::units::{Digest, Moment, NodeId, Round};

/// Waits for model, members and the round's end to be durable.
#[derive(Debug)]
pub(super) struct Publishing {
    round: Round,
    stored: BTreeMap<NodeId, Digest>,
    model: BaseModel,
}

impl Publishing {
    pub(super) fn begin(
        context: &mut Context,
        round: Round,
        stored: BTreeMap<NodeId, Digest>,
        model: BaseModel,
    ) -> Self {
        let members = stored
            .iter()
            .map(|(node, digest)| (node.clone(), *digest))
            .collect();
        context.output(Output::Publish {
            round,
            version: model.version,
            digest: model.digest,
            members,
        });
        Self { round, stored, model }
    }

    pub(super) fn handle(self, context: &mut Context, now: Moment, input: Input) -> Phase {
        match input {
            Input::Published { round } if round == self.round => {
                context.base = self.model;
                return context.end(
                    now,
                    self.round,
                    self.stored,
                    RoundOutcome::Published(self.model.version),
                );
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
        Phase::Publishing(self)
    }

    pub(super) fn round(&self) -> Round {
        self.round
    }

    pub(super) fn stored(&self) -> usize {
        self.stored.len()
    }
}
