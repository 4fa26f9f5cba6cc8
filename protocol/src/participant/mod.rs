//! The edge's half of a round, as a state machine without I/O.
//!
//! ```text
//!            announced, terms fit, base held          Trained (outbox durable)
//!   Idle ─────────────────────────────────▶ Training ───────────────────────────▶ Reporting
//!    ▲ │                                     (Train)                               (SendUpdate, until Receipt)
//!    │ │ newer model, or a round on another base       the round is over            │
//!    │ ▼                                               (DropOutbox)                 │
//!   Applying ◀──────────────────────────────────────────────────────────────────────┘
//!   (FetchModel, Judge, SendVerdict)
//! ```
//!
//! The rules:
//!
//! - One training, one charge, one payload for each (round, nonce). What has been written to the outbox is sent again
//!   byte for byte, never made again, until the round is **known to be over**: a receipt is not enough, since an edge that forgot the
//!   round after its receipt and restarted would train for it a second time. A round is over when it is told closed, when a later
//!   one is announced, or when a newer model is published.
//! - An announcement is met with training or with a decline, never with silence, unless the session ends first.
//! - An edge never loosens terms; see [`ParticipantConfig::accepts`].
//! - Everything the aggregator says counts only within an admitted session, and a session's Welcome is what an older session's
//!   words give way to: after the aggregator was restored from a backup, lower round numbers are believed.
//! - A model that the gate turned down for its form is not fetched again; a round that builds on it is declined.
//!
//! The driver calls [`handle`](Participant::handle) or [`handle_timeout`](Participant::handle_timeout), then empties
//! [`poll_output`](Participant::poll_output) and sets its timer by [`poll_timeout`](Participant::poll_timeout).

mod applying;
mod config;
mod idle;
mod input;
mod output;
mod reporting;
mod status;
mod training;

use std::collections::VecDeque;
use std::time::Duration;

pub use self::config::{LayoutDigests, ParticipantConfig};
pub use self::input::Input;
pub use self::output::{Output, ParticipantEvent};
pub use self::status::{Ignored, ParticipantCounters, ParticipantStatus, PhaseName};

use self::applying::Applying;
use self::idle::Idle;
use self::reporting::Reporting;
use self::training::Training;
use crate::message::{AnnounceV1, ClosedV1, DeclineReason, DeclineV1, GateVerdict, VerdictV1, WelcomeV1};
use crate::refusal::{RefusalV1, RoundOutcome};
use crate::round::BaseModel;
use crate::units::{Digest, ModelVersion, Moment, Round};

/// The edge's half of a round; see the module's page.
#[derive(Debug)]
pub struct Participant {
    context: Context,
    phase: Phase,
}

impl Participant {
    /// A participant that holds `model` and, after a restart, what is in its outbox: round, nonce, payload digest.
    pub fn new(
        config: ParticipantConfig,
        model: BaseModel,
        outbox: Option<(Round, u64, Digest)>,
        _now: Moment,
    ) -> Self {
        let mut context = Context::new(config, model);
        let phase = match outbox {
            Some((round, nonce, digest)) => {
                let key = Key { round, nonce };
                context.latest = Some(round);
                Phase::Reporting(Reporting::restored(key, digest))
            }
            None => Phase::Idle(Idle),
        };
        Self { context, phase }
    }

    /// Takes an input. Poll outputs and the timeout afterwards.
    pub fn handle(&mut self, now: Moment, input: Input) {
        self.handle_timeout(now);
        if let Some(input) = self.context.filter(input) {
            self.advance(|phase, context| phase.handle(context, now, input));
        }
    }

    /// Takes note that time has passed. Poll outputs and the timeout afterwards.
    pub fn handle_timeout(&mut self, now: Moment) {
        self.advance(|phase, context| match phase {
            Phase::Reporting(reporting) => reporting.tick(context, now),
            Phase::Applying(applying) => applying.tick(context, now),
            quiet @ (Phase::Idle(_) | Phase::Training(_)) => quiet,
        });
    }

    /// The next thing to do, in order, until `None`. Poll after every call that takes `&mut self`.
    #[must_use = "an output that is not carried out stops the edge's part in the round"]
    pub fn poll_output(&mut self) -> Option<Output> {
        self.context.outputs.pop_front()
    }

    /// When to call [`handle_timeout`](Self::handle_timeout) at the latest; `None`: only an input can change anything.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Moment> {
        match &self.phase {
            Phase::Reporting(reporting) => reporting.timeout(),
            Phase::Applying(applying) => applying.timeout(),
            Phase::Idle(_) | Phase::Training(_) => None,
        }
    }

    /// The participant at a glance.
    pub fn status(&self) -> ParticipantStatus {
        let phase = match &self.phase {
            Phase::Idle(_) => PhaseName::Idle,
            Phase::Training(_) => PhaseName::Training,
            Phase::Reporting(_) => PhaseName::Reporting,
            Phase::Applying(_) => PhaseName::Applying,
        };
        let Context {
            link, latest, model, ..
        } = &self.context;
        ParticipantStatus {
            phase,
            welcomed: *link == Link::Up,
            round: *latest,
            model: *model,
        }
    }

    /// The round whose receipt is still missing, for the Hello.
    pub fn receipt_missing(&self) -> Option<Round> {
        match &self.phase {
            Phase::Reporting(reporting) => reporting.receipt_missing(),
            Phase::Idle(_) | Phase::Training(_) | Phase::Applying(_) => None,
        }
    }

    /// What happened how often.
    pub fn counters(&self) -> &ParticipantCounters {
        &self.context.counters
    }

    fn advance(&mut self, step: impl FnOnce(Phase, &mut Context) -> Phase) {
        let phase = std::mem::replace(&mut self.phase, Phase::Idle(Idle));
        self.phase = step(phase, &mut self.context);
    }
}

/// One of the phases, each owning only what it knows and consuming itself.
#[derive(Debug)]
enum Phase {
    Idle(Idle),
    Training(Training),
    Reporting(Reporting),
    Applying(Applying),
}

impl Phase {
    fn handle(self, context: &mut Context, now: Moment, input: Input) -> Self {
        match self {
            Self::Idle(phase) => phase.handle(context, now, input),
            Self::Training(phase) => phase.handle(context, now, input),
            Self::Reporting(phase) => phase.handle(context, now, input),
            Self::Applying(phase) => phase.handle(context, now, input),
        }
    }
}

/// One attempt at a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    round: Round,
    nonce: u64,
}

impl Key {
    fn of(announce: &AnnounceV1) -> Self {
        Self {
            round: announce.round,
            nonce: announce.nonce,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    Down,
    /// The Hello is out, no Welcome yet.
    Greeting,
    Up,
}

/// A model that is published and not held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wanted {
    version: ModelVersion,
    /// Where it is known.
    digest: Option<Digest>,
}

/// What all phases share.
#[derive(Debug)]
struct Context {
    config: ParticipantConfig,
    model: BaseModel,
    link: Link,
    /// Announcements below this are older than something said in this session.
    session_round: Round,
    wanted: Option<Wanted>,
    /// The model that was turned down last.
    rejected: Option<BaseModel>,
    /// The attempt that was finished last, and the decline it was met with.
    done: Option<(Key, Option<DeclineReason>)>,
    latest: Option<Round>,
    verdict_unsent: Option<VerdictV1>,
    outputs: VecDeque<Output>,
    counters: ParticipantCounters,
}

impl Context {
    fn new(config: ParticipantConfig, model: BaseModel) -> Self {
        Self {
            config,
            model,
            link: Link::Down,
            session_round: Round(0),
            wanted: None,
            rejected: None,
            done: None,
            latest: None,
            verdict_unsent: None,
            outputs: VecDeque::new(),
            counters: ParticipantCounters::default(),
        }
    }

    /// What no phase has to think about: words outside a session, stale announcements, the session itself.
    fn filter(&mut self, input: Input) -> Option<Input> {
        match &input {
            Input::Connected => self.link = Link::Greeting,
            Input::Disconnected => self.link = Link::Down,
            Input::Welcome(_) if self.link == Link::Up => {
                self.ignore(Ignored::WelcomeRepeated);
                return None;
            }
            Input::Welcome(welcome) if self.link == Link::Greeting => self.welcomed(welcome),
            Input::Refusal(refusal) if self.link != Link::Down => self.refused(refusal),
            Input::Announce(announce) if self.link == Link::Up => {
                if announce.round < self.session_round {
                    self.ignore(Ignored::AnnounceStale);
                    return None;
                }
                self.session_round = announce.round;
            }
            Input::Closed(closed) if self.link == Link::Up => self.heard_of_end(closed),
            Input::Receipt(_) | Input::Model { .. } if self.link == Link::Up => {}
            Input::Welcome(_)
            | Input::Announce(_)
            | Input::Refusal(_)
            | Input::Receipt(_)
            | Input::Model { .. }
            | Input::Closed(_) => {
                self.ignore(Ignored::NotWelcomed);
                return None;
            }
            Input::Trained { .. } | Input::CannotTrain { .. } | Input::Judged { .. } | Input::Held { .. } => {
            }
        }
        Some(input)
    }

    fn welcomed(&mut self, welcome: &WelcomeV1) {
        self.link = Link::Up;
        self.session_round = welcome.round.as_ref().map_or(Round(0), |announce| announce.round);
        let published = BaseModel {
            version: welcome.model_version,
            digest: welcome.model_digest,
        };
        let wanted = published != self.model && Some(published) != self.rejected;
        self.wanted = wanted.then_some(Wanted {
            version: published.version,
            digest: Some(published.digest),
        });
        self.report(ParticipantEvent::Welcomed);
        if let Some(verdict) = self.verdict_unsent.take() {
            self.output(Output::SendVerdict(verdict));
        }
    }

    fn refused(&mut self, refusal: &RefusalV1) {
        *self.counters.refused.entry(refusal.code).or_default() += 1;
        self.report(ParticipantEvent::Refused {
            round: refusal.round,
            code: refusal.code,
        });
    }

    fn heard_of_end(&mut self, closed: &ClosedV1) {
        self.session_round = self.session_round.max(closed.round.next());
        if let RoundOutcome::Published(version) = closed.outcome {
            let rejected = self.rejected.is_some_and(|model| model.version == version);
            let newer = self.wanted.is_none_or(|wanted| wanted.version < version);
            if version > self.model.version && newer && !rejected {
                self.wanted = Some(Wanted {
                    version,
                    digest: None,
                });
            }
        }
    }

    fn is_up(&self) -> bool {
        self.link == Link::Up
    }

    fn output(&mut self, output: Output) {
        self.outputs.push_back(output);
    }

    fn report(&mut self, event: ParticipantEvent) {
        self.output(Output::Report(event));
    }

    fn ignore(&mut self, why: Ignored) {
        *self.counters.ignored.entry(why).or_default() += 1;
    }

    fn decline(&mut self, key: Key, reason: DeclineReason) {
        self.latest = Some(key.round);
        self.done = Some((key, Some(reason)));
        self.counters.declines += 1;
        if self.is_up() {
            self.output(Output::SendDecline(DeclineV1 {
                round: key.round,
                reason,
            }));
        }
        self.report(ParticipantEvent::Declined {
            round: key.round,
            reason,
        });
    }

    fn round_over(&mut self, key: Key, outcome: Option<RoundOutcome>, acknowledged: bool) {
        self.done = Some((key, None));
        self.report(ParticipantEvent::RoundOver {
            round: key.round,
            outcome,
            acknowledged,
        });
    }

    /// An update came out of a training that nobody waits for any more.
    fn trained_in_vain(&mut self, round: Round, at_hand: Option<Round>) {
        self.ignore(Ignored::UnexpectedAnswer);
        if at_hand != Some(round) {
            self.output(Output::DropOutbox { round });
        }
    }

    /// A model is held; nothing is said of it.
    fn held(&mut self, model: BaseModel) {
        self.model = model;
        self.no_longer_wanted(model.version);
    }

    fn judged(&mut self, model: BaseModel, verdict: GateVerdict) {
        match verdict {
            GateVerdict::Accepted | GateVerdict::WorseOnTail | GateVerdict::TooFewRows => self.model = model,
            GateVerdict::NonFinite | GateVerdict::LayoutMismatch | GateVerdict::Stale => {
                self.rejected = Some(model);
            }
        }
        self.no_longer_wanted(model.version);
        self.report(ParticipantEvent::ModelJudged {
            version: model.version,
            verdict,
        });
        let verdict = VerdictV1 {
            version: model.version,
            verdict,
        };
        if self.is_up() {
            self.output(Output::SendVerdict(verdict));
        } else {
            self.verdict_unsent = Some(verdict);
        }
    }

    fn no_longer_wanted(&mut self, version: ModelVersion) {
        self.wanted = self.wanted.filter(|wanted| wanted.version != version);
    }
}

/// How long to wait before the same thing is tried again: what the aggregator asks for, at least a second, and
/// doubled with each attempt up to a minute.
fn retry_delay(retry_after_ms: u32, attempt: u32) -> Duration {
    let own = Duration::from_secs(1)
        .saturating_mul(1 << attempt.min(6))
        .min(Duration::from_mins(1));
    own.max(Duration::from_millis(u64::from(retry_after_ms)))
}

#[cfg(test)]
mod tests;
