//! The updates are being combined.

use std::collections::BTreeMap;

use super::closed::Aborting;
use super::publishing::Publishing;
use super::{BaseModel, Context, Ignored, Input, Offer, Output, Phase};
use crate::refusal::AbortReason;
use crate::units::{Digest, Moment, NodeId, Round};

/// Waits for the rule's result.
#[derive(Debug)]
pub(super) struct Aggregating {
    round: Round,
    stored: BTreeMap<NodeId, Digest>,
}

impl Aggregating {
    pub(super) fn begin(context: &mut Context, round: Round, stored: BTreeMap<NodeId, Digest>) -> Self {
        let members = stored
            .iter()
            .map(|(node, digest)| (node.clone(), *digest))
            .collect();
        context.output(Output::Aggregate {
            round,
            base: context.base,
            members,
        });
        Self { round, stored }
    }

    pub(super) fn handle(self, context: &mut Context, _now: Moment, input: Input) -> Phase {
        match input {
            Input::Aggregated {
                round,
                version,
                digest,
            } if round == self.round && version == context.base.version.next() => {
                let model = BaseModel { version, digest };
                return Phase::Publishing(Publishing::begin(context, self.round, self.stored, model));
            }
            // A version that does not follow the base is no result either.
            Input::Aggregated { round, .. } | Input::AggregationFailed { round } if round == self.round => {
                let reason = AbortReason::AggregationFailed;
                return Phase::Aborting(Aborting::begin(context, self.round, self.stored, reason));
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
        Phase::Aggregating(self)
    }

    pub(super) fn round(&self) -> Round {
        self.round
    }

    pub(super) fn stored(&self) -> usize {
        self.stored.len()
    }
}
