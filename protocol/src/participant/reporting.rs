//! An update is in the outbox, until its round is known to be over.

use super::idle::{Idle, consider};
use super::{Context, Ignored, Input, Key, Output, ParticipantEvent, Phase, retry_delay};
use crate::message::{AnnounceV1, ReceiptV1};
use crate::refusal::{RefusalV1, RoundOutcome};
use crate::units::{Digest, Moment, Round};

/// Sends the outbox and waits for the round's end.
#[derive(Debug)]
pub(super) struct Reporting {
    key: Key,
    payload_digest: Digest,
    standing: Standing,
    /// Whether the update has been sent in this session.
    sent: bool,
    /// When to send again, after the aggregator asked for it.
    again_at: Option<Moment>,
    attempt: u32,
}

/// What the aggregator has said about the update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Unanswered,
    Acknowledged,
    /// Not to be sent again until the aggregator announces the same round again.
    Refused,
}

impl Reporting {
    pub(super) fn begin(context: &mut Context, key: Key, payload_digest: Digest) -> Phase {
        let mut reporting = Self::restored(key, payload_digest);
        reporting.send(context);
        Phase::Reporting(reporting)
    }

    /// What a restarted edge finds in its outbox.
    pub(super) fn restored(key: Key, payload_digest: Digest) -> Self {
        Self {
            key,
            payload_digest,
            standing: Standing::Unanswered,
            sent: false,
            again_at: None,
            attempt: 0,
        }
    }

    pub(super) fn handle(mut self, context: &mut Context, now: Moment, input: Input) -> Phase {
        match input {
            Input::Connected => {}
            Input::Disconnected => {
                self.sent = false;
                self.again_at = None;
            }
            Input::Welcome(welcome) => match welcome.round {
                Some(announce) => return self.announced(context, now, announce),
                // Perhaps the round is being aggregated, perhaps it is over: the answer will tell.
                None if self.standing == Standing::Unanswered => self.send(context),
                None => {}
            },
            Input::Announce(announce) => return self.announced(context, now, announce),
            Input::Receipt(receipt) => self.receipt(context, &receipt),
            Input::Refusal(refusal) => self.refused(context, now, &refusal),
            Input::Closed(closed) if closed.round >= self.key.round => {
                let outcome = (closed.round == self.key.round).then_some(closed.outcome);
                self.over(context, outcome);
                return Idle.settle(context);
            }
            Input::Closed(_) => context.ignore(Ignored::ClosedElsewhere),
            Input::Model { .. } => context.ignore(Ignored::ModelUnexpected),
            Input::Trained { round, .. } => context.trained_in_vain(round, Some(self.key.round)),
            Input::CannotTrain { .. } | Input::Judged { .. } | Input::Held { .. } => {
                context.ignore(Ignored::UnexpectedAnswer);
            }
        }
        self.settle(context)
    }

    pub(super) fn tick(mut self, context: &mut Context, now: Moment) -> Phase {
        if self.again_at.is_some_and(|at| at <= now) {
            self.again_at = None;
            self.send(context);
        }
        Phase::Reporting(self)
    }

    pub(super) fn timeout(&self) -> Option<Moment> {
        self.again_at
    }

    pub(super) fn receipt_missing(&self) -> Option<Round> {
        (self.standing != Standing::Acknowledged).then_some(self.key.round)
    }

    /// With an answer in hand, a model newer than our base says that the round is over.
    fn settle(self, context: &mut Context) -> Phase {
        if self.standing != Standing::Unanswered && context.wanted.is_some() {
            self.over(context, None);
            return Idle.settle(context);
        }
        Phase::Reporting(self)
    }

    fn announced(mut self, context: &mut Context, now: Moment, announce: AnnounceV1) -> Phase {
        if Key::of(&announce) != self.key {
            self.over(context, None);
            return consider(context, now, announce);
        }
        if self.sent || self.standing == Standing::Acknowledged {
            context.ignore(Ignored::AnnounceRepeated);
        } else {
            self.standing = Standing::Unanswered;
            self.send(context);
        }
        self.settle(context)
    }

    fn receipt(&mut self, context: &mut Context, receipt: &ReceiptV1) {
        if receipt.round != self.key.round || receipt.payload_digest != self.payload_digest {
            context.ignore(Ignored::ReceiptUnknown);
        } else if self.standing == Standing::Acknowledged {
            context.ignore(Ignored::ReceiptRepeated);
        } else {
            self.standing = Standing::Acknowledged;
            self.again_at = None;
            context.counters.acknowledged += 1;
            context.report(ParticipantEvent::Acknowledged {
                round: self.key.round,
            });
        }
    }

    fn refused(&mut self, context: &mut Context, now: Moment, refusal: &RefusalV1) {
        use crate::refusal::RefusalCode::{Busy, RoundUnknown, StorageFull};
        if refusal.round != Some(self.key.round) || self.standing != Standing::Unanswered {
            context.ignore(Ignored::RefusalElsewhere);
        } else if matches!(refusal.code, Busy | StorageFull | RoundUnknown) {
            self.again_at = Some(now.after(retry_delay(refusal.retry_after_ms, self.attempt)));
            self.attempt = self.attempt.saturating_add(1);
        } else {
            self.standing = Standing::Refused;
            self.again_at = None;
        }
    }

    fn send(&mut self, context: &mut Context) {
        if context.is_up() {
            self.sent = true;
            context.counters.updates_sent += 1;
            context.output(Output::SendUpdate {
                round: self.key.round,
            });
        }
    }

    fn over(&self, context: &mut Context, outcome: Option<RoundOutcome>) {
        context.output(Output::DropOutbox {
            round: self.key.round,
        });
        context.round_over(self.key, outcome, self.standing == Standing::Acknowledged);
    }
}
