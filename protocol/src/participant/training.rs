//! An update is being made.

use super::idle::{Idle, consider};
use super::reporting::Reporting;
use super::{Context, Ignored, Input, Key, Output, ParticipantEvent, Phase};
use crate::message::AnnounceV1;
use crate::refusal::RoundOutcome;
use crate::units::Moment;

/// The driver charges, trains and fills the outbox.
#[derive(Debug)]
pub(super) struct Training {
    key: Key,
}

impl Training {
    pub(super) fn begin(context: &mut Context, announce: AnnounceV1) -> Self {
        let key = Key::of(&announce);
        context.latest = Some(key.round);
        // The base is held and is the latest: whatever is heard of from now on is newer.
        context.wanted = None;
        context.counters.trainings += 1;
        context.output(Output::Train { announce });
        context.report(ParticipantEvent::TrainingStarted { round: key.round });
        Self { key }
    }

    pub(super) fn handle(self, context: &mut Context, now: Moment, input: Input) -> Phase {
        match input {
            Input::Connected | Input::Disconnected => {}
            Input::Welcome(welcome) => match welcome.round {
                Some(announce) => return self.announced(context, now, announce),
                // A model newer than our base: the round that made it was ours or came after.
                None if context.wanted.is_some() => return self.cancel(context, None),
                None => {}
            },
            Input::Announce(announce) => return self.announced(context, now, announce),
            Input::Closed(closed) if closed.round >= self.key.round => {
                let outcome = (closed.round == self.key.round).then_some(closed.outcome);
                return self.cancel(context, outcome);
            }
            Input::Closed(_) => context.ignore(Ignored::ClosedElsewhere),
            Input::Trained {
                round,
                nonce,
                payload_digest,
            } => {
                let key = Key { round, nonce };
                if key == self.key {
                    return Reporting::begin(context, key, payload_digest);
                }
                context.trained_in_vain(round, Some(self.key.round));
            }
            Input::CannotTrain { round, nonce, reason } => {
                if (Key { round, nonce }) == self.key {
                    context.decline(self.key, reason);
                    return Idle.settle(context);
                }
                context.ignore(Ignored::UnexpectedAnswer);
            }
            Input::Receipt(_) => context.ignore(Ignored::ReceiptUnknown),
            Input::Refusal(_) => context.ignore(Ignored::RefusalElsewhere),
            Input::Model { .. } => context.ignore(Ignored::ModelUnexpected),
            Input::Judged { .. } | Input::Held { .. } => context.ignore(Ignored::UnexpectedAnswer),
        }
        Phase::Training(self)
    }

    fn announced(self, context: &mut Context, now: Moment, announce: AnnounceV1) -> Phase {
        if Key::of(&announce) == self.key {
            context.ignore(Ignored::AnnounceRepeated);
            return Phase::Training(self);
        }
        context.output(Output::CancelTraining {
            round: self.key.round,
        });
        context.round_over(self.key, None, false);
        consider(context, now, announce)
    }

    fn cancel(self, context: &mut Context, outcome: Option<RoundOutcome>) -> Phase {
        context.output(Output::CancelTraining {
            round: self.key.round,
        });
        context.round_over(self.key, outcome, false);
        Idle.settle(context)
    }
}
