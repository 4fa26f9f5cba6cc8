//! A published model is fetched, then judged.

use std::time::Duration;

use super::idle::{Idle, consider};
use super::{Context, Ignored, Input, Key, Output, ParticipantEvent, Phase, Wanted, retry_delay};
use crate::message::{AnnounceV1, DeclineReason, GateVerdict, ModelV1};
use crate::refusal::RefusalV1;
use crate::round::BaseModel;
use crate::units::Moment;

/// On the way to a newer model.
#[derive(Debug)]
pub(super) struct Applying {
    stage: Stage,
    /// The round that waits for it, and when that was announced.
    then: Option<(AnnounceV1, Moment)>,
}

#[derive(Debug)]
enum Stage {
    /// Only within an admitted session.
    Fetching {
        wanted: Wanted,
        again_at: Option<Moment>,
        attempt: u32,
    },
    Judging(BaseModel),
}

impl Applying {
    /// Asks for a model. The session is admitted.
    pub(super) fn fetch(context: &mut Context, wanted: Wanted, then: Option<(AnnounceV1, Moment)>) -> Self {
        context.output(Output::FetchModel {
            version: wanted.version,
        });
        Self {
            stage: Stage::Fetching {
                wanted,
                again_at: None,
                attempt: 0,
            },
            then,
        }
    }

    pub(super) fn handle(mut self, context: &mut Context, now: Moment, input: Input) -> Phase {
        match input {
            Input::Connected => {}
            Input::Disconnected => {
                self.then = None;
                if matches!(self.stage, Stage::Fetching { .. }) {
                    return Phase::Idle(Idle);
                }
            }
            // While fetching there is always a session, and a second Welcome in it does not come this far.
            Input::Welcome(welcome) => self.then = welcome.round.map(|announce| (announce, now)),
            Input::Announce(announce) => return self.announced(context, now, announce),
            Input::Closed(closed) => {
                if self
                    .then
                    .as_ref()
                    .is_some_and(|(announce, _)| announce.round <= closed.round)
                {
                    self.then = None;
                } else {
                    context.ignore(Ignored::ClosedElsewhere);
                }
            }
            Input::Model { header } => return self.arrived(context, now, &header),
            Input::Judged { version, verdict } => match self.stage {
                Stage::Judging(model) if model.version == version => {
                    context.judged(model, verdict);
                    return self.go_on(context, now);
                }
                Stage::Judging(_) | Stage::Fetching { .. } => context.ignore(Ignored::UnexpectedAnswer),
            },
            Input::Held { version } => match self.stage {
                Stage::Judging(model) if model.version == version => {
                    context.held(model);
                    return self.go_on(context, now);
                }
                Stage::Judging(_) | Stage::Fetching { .. } => context.ignore(Ignored::UnexpectedAnswer),
            },
            Input::Refusal(refusal) => return self.refused(context, now, &refusal),
            Input::Receipt(_) => context.ignore(Ignored::ReceiptUnknown),
            Input::Trained { round, .. } => context.trained_in_vain(round, None),
            Input::CannotTrain { .. } => context.ignore(Ignored::UnexpectedAnswer),
        }
        Phase::Applying(self)
    }

    pub(super) fn tick(mut self, context: &mut Context, now: Moment) -> Phase {
        if let Stage::Fetching { wanted, again_at, .. } = &mut self.stage
            && again_at.is_some_and(|at| at <= now)
        {
            *again_at = None;
            context.output(Output::FetchModel {
                version: wanted.version,
            });
        }
        Phase::Applying(self)
    }

    pub(super) fn timeout(&self) -> Option<Moment> {
        match &self.stage {
            Stage::Fetching { again_at, .. } => *again_at,
            Stage::Judging(_) => None,
        }
    }

    fn announced(mut self, context: &mut Context, now: Moment, announce: AnnounceV1) -> Phase {
        if self
            .then
            .as_ref()
            .is_some_and(|(waiting, _)| Key::of(waiting) == Key::of(&announce))
        {
            context.ignore(Ignored::AnnounceRepeated);
            return Phase::Applying(self);
        }
        match self.stage {
            // Nothing is lost by starting over: the new round may build on another model.
            Stage::Fetching { .. } => consider(context, now, announce),
            Stage::Judging(_) => {
                self.then = Some((announce, now));
                Phase::Applying(self)
            }
        }
    }

    fn arrived(mut self, context: &mut Context, now: Moment, header: &ModelV1) -> Phase {
        let Stage::Fetching { wanted, .. } = &self.stage else {
            context.ignore(Ignored::ModelUnexpected);
            return Phase::Applying(self);
        };
        if header.version != wanted.version {
            context.ignore(Ignored::ModelUnexpected);
            return Phase::Applying(self);
        }
        let model = BaseModel {
            version: header.version,
            digest: header.payload_digest,
        };
        if wanted.digest.is_some_and(|digest| digest != model.digest) {
            // Not the model that was promised.
            return self.give_up(context, now);
        }
        let known = &context.config.layout_digests;
        if ![known.model, known.linear_model].contains(&header.layout_digest) {
            context.judged(model, GateVerdict::LayoutMismatch);
            return self.go_on(context, now);
        }
        context.output(Output::Judge {
            version: model.version,
        });
        self.stage = Stage::Judging(model);
        Phase::Applying(self)
    }

    fn refused(mut self, context: &mut Context, now: Moment, refusal: &RefusalV1) -> Phase {
        let Stage::Fetching {
            again_at, attempt, ..
        } = &mut self.stage
        else {
            context.ignore(Ignored::RefusalElsewhere);
            return Phase::Applying(self);
        };
        if refusal.round.is_some() {
            context.ignore(Ignored::RefusalElsewhere);
            return Phase::Applying(self);
        }
        if refusal.code.retryable() {
            *again_at = Some(now.after(retry_delay(refusal.retry_after_ms, *attempt)));
            *attempt = attempt.saturating_add(1);
            return Phase::Applying(self);
        }
        self.give_up(context, now)
    }

    /// The model cannot be had now; the next Welcome or round names it again.
    fn give_up(self, context: &mut Context, now: Moment) -> Phase {
        if let Stage::Fetching { wanted, .. } = self.stage {
            context.report(ParticipantEvent::ModelUnavailable {
                version: wanted.version,
            });
            context.no_longer_wanted(wanted.version);
        }
        match self.then {
            Some((announce, at)) if in_time(&announce, at, now) => {
                context.decline(Key::of(&announce), DeclineReason::UnknownLayout);
                Idle.settle(context)
            }
            _ => Idle.settle(context),
        }
    }

    /// To the round that waits, unless its time is over.
    fn go_on(self, context: &mut Context, now: Moment) -> Phase {
        match self.then {
            Some((announce, at)) if context.is_up() && in_time(&announce, at, now) => {
                consider(context, now, announce)
            }
            _ => Idle.settle(context),
        }
    }
}

fn in_time(announce: &AnnounceV1, announced: Moment, now: Moment) -> bool {
    now < announced.after(Duration::from_millis(u64::from(announce.deadline_ms)))
}
