//! Nothing to do; and the decision what to do about an announcement.

use super::applying::Applying;
use super::training::Training;
use super::{Context, Ignored, Input, Key, Phase, Wanted};
use crate::message::{AnnounceV1, DeclineReason};
use crate::round::BaseModel;
use crate::units::Moment;

/// No round and no model at hand.
#[derive(Debug)]
pub(super) struct Idle;

impl Idle {
    pub(super) fn handle(self, context: &mut Context, now: Moment, input: Input) -> Phase {
        match input {
            Input::Connected | Input::Disconnected => {}
            Input::Welcome(welcome) => {
                if let Some(announce) = welcome.round {
                    return consider(context, now, announce);
                }
            }
            Input::Announce(announce) => return consider(context, now, announce),
            // The context has taken note of what was published.
            Input::Closed(_) => context.ignore(Ignored::ClosedElsewhere),
            Input::Receipt(_) => context.ignore(Ignored::ReceiptUnknown),
            Input::Refusal(_) => context.ignore(Ignored::RefusalElsewhere),
            Input::Model { .. } => context.ignore(Ignored::ModelUnexpected),
            Input::Trained { round, .. } => context.trained_in_vain(round, None),
            Input::CannotTrain { .. } | Input::Judged { .. } | Input::Held { .. } => {
                context.ignore(Ignored::UnexpectedAnswer);
            }
        }
        self.settle(context)
    }

    /// Fetches the model that is published and not held, if there is one.
    pub(super) fn settle(self, context: &mut Context) -> Phase {
        match context.wanted {
            Some(wanted) if context.is_up() => Phase::Applying(Applying::fetch(context, wanted, None)),
            _ => Phase::Idle(self),
        }
    }
}

/// Trains, declines, or fetches the base first.
pub(super) fn consider(context: &mut Context, now: Moment, announce: AnnounceV1) -> Phase {
    let key = Key::of(&announce);
    match context.done {
        Some((done, Some(reason))) if done == key => {
            // The aggregator asks again, so it has not heard.
            context.decline(key, reason);
            return Idle.settle(context);
        }
        Some((done, None)) if done == key => {
            context.ignore(Ignored::AnnounceRepeated);
            return Idle.settle(context);
        }
        _ => {}
    }
    if let Err(reason) = context.config.accepts(&announce) {
        context.decline(key, reason);
        return Idle.settle(context);
    }
    let base = BaseModel {
        version: announce.base_version,
        digest: announce.base_digest,
    };
    if base == context.model {
        return Phase::Training(Training::begin(context, announce));
    }
    if Some(base) == context.rejected {
        context.decline(key, DeclineReason::UnknownLayout);
        return Idle.settle(context);
    }
    let wanted = Wanted {
        version: base.version,
        digest: Some(base.digest),
    };
    Phase::Applying(Applying::fetch(context, wanted, Some((announce, now))))
}
