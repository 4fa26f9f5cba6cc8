//! Whether an action helped, judged at the user's side of the service.

use std::time::Duration;

use super::diagnose::{Diagnosis, diagnose};
use super::observe::Observed;
use super::{IncidentMachine, Open, Phase};
use crate::evidence::Came;
use crate::types::{ActionKind, FaultClass, Incident, IncidentState, IntentId, Now, Outcome, Verdict};

impl IncidentMachine {
    /// Judges the last action, now or at the end of its window.
    pub(super) fn verify(&mut self, now: Now, mut record: Incident, id: IntentId, until: Duration) {
        let Some(seen) = self.services.get(&record.service) else {
            return;
        };
        let answered_before = record.actions.last().is_some_and(|action| action.answered_before);
        // Nobody knows when it was done, or whether: then good answers at first may be from before, and say nothing of the action.
        let interrupted = record
            .actions
            .last()
            .is_some_and(|action| action.outcome == Some(Outcome::Interrupted));
        let early = interrupted && now.monotonic < until && seen.exit.is_none() && seen.corrupt.is_none();
        let renewed = record.last_action().is_some_and(ActionKind::renews_process);
        let begun = until.saturating_sub(seen.policy.verify_window);
        let long = now.monotonic >= begun.saturating_add(HARM_AFTER);
        let at_once = record.last_action().is_some_and(works_at_once);
        let verdict = if answered_before && at_once && long && is_silent(seen) {
            // No such action may cost so much: the rest of the window is not waited for.
            Some(Verdict::Harm)
        } else {
            judge(seen, record.class, answered_before, now.monotonic, until)
        };
        let another = diagnose(seen).filter(|found| {
            let commits = seen.sessions.commits()
                && found.class != record.class
                && matches!(found.class, FaultClass::DiskSlow | FaultClass::Unknown);
            renewed && (is_another(record.class, found.class) || commits)
        });
        let healed = verdict == Some(Verdict::Healed) && !early;
        if let Some(another) = another.filter(|_| !healed) {
            return self.give_way(now, record, another);
        }
        let Some(verdict) = verdict.filter(|_| !early) else {
            self.put(Open {
                record,
                phase: Phase::Verifying { id, until },
            });
            return;
        };
        if let Some(action) = record.actions.last_mut() {
            action.verdict = Some(verdict);
        }
        record.verdict = Some(verdict);
        let came = match verdict {
            Verdict::Healed => Some(Came::Right),
            Verdict::NoEffect => Some(Came::Wrong),
            Verdict::Harm => Some(Came::Harm),
            Verdict::Unknown => None,
        };
        if let (Some(action), Some(came)) = (record.last_action().filter(|_| !interrupted), came) {
            self.note_evidence(&record.service, action, came);
        }
        let Some(seen) = self.services.get(&record.service) else {
            return;
        };
        match verdict {
            Verdict::Healed => {
                self.note_relapse(now, &record);
                self.close(now, record, IncidentState::Healed);
            }
            Verdict::Unknown => self.close(now, record, IncidentState::Recovered),
            Verdict::Harm => self.harmed(now, record),
            Verdict::NoEffect if diagnose(seen).is_some() => self.go_on(now, record),
            Verdict::NoEffect => {
                let what = if record.class.from_detector() {
                    "the detector did not find the service normal"
                } else {
                    "the service did not come back"
                };
                self.hand_over(now, record, format!("{what} within the time for verification"));
            }
        }
    }
}

impl IncidentMachine {
    /// Another fault came before what was renewed could be judged. That one is not waited out: it gets an incident of its own where the new
    /// process had served, and its own means at once where it had not.
    pub(super) fn give_way(&mut self, now: Now, mut record: Incident, another: Diagnosis) {
        let Some(seen) = self.services.get(&record.service) else {
            return;
        };
        let up = seen.served || (!seen.probed && seen.answers());
        // Whether the detector would have found it normal is not known any more; who serves again has come back from a crash or a hang.
        let verdict = if up && !record.class.from_detector() {
            Verdict::Healed
        } else {
            Verdict::Unknown
        };
        if let Some(action) = record.actions.last_mut() {
            action.verdict = Some(verdict);
        }
        record.verdict = Some(verdict);
        let words = format!(
            "{} came before it was verified: {}",
            another.class, another.reason
        );
        record.note(now, words);
        if !up {
            return self.decide(now, record, another, false);
        }
        let interrupted = record
            .actions
            .last()
            .is_some_and(|action| action.outcome == Some(Outcome::Interrupted));
        if let Some(action) = record
            .last_action()
            .filter(|_| verdict == Verdict::Healed && !interrupted)
        {
            self.note_evidence(&record.service, action, Came::Right);
        }
        let service = record.service.clone();
        let state = if verdict == Verdict::Healed {
            IncidentState::Healed
        } else {
            IncidentState::Recovered
        };
        self.close(now, record, state);
        self.evaluate(now, &service);
    }
}

/// Whether `now` is a fault that neither was `before` nor came of it, and that is dealt with while the process goes on.
pub(super) fn is_another(before: FaultClass, now: FaultClass) -> bool {
    before != now
        && matches!(
            now,
            FaultClass::ConnectionExhaustion
                | FaultClass::LockPileup
                | FaultClass::DiskFull
                | FaultClass::ReadOnlyFs
                | FaultClass::DependencyDown
        )
}

/// The verdict, or `None` while it is open. A process that ended again is judged at once, everything else that is bad only at the
/// end of the window, because a starting service may fail its first probes.
fn judge(
    seen: &Observed,
    class: FaultClass,
    answered_before: bool,
    now: Duration,
    until: Duration,
) -> Option<Verdict> {
    let bad = if answered_before {
        Verdict::Harm
    } else {
        Verdict::NoEffect
    };
    if seen.exit.is_some() || seen.corrupt.is_some() {
        // What it was started for was done: a process that had served and ended later met another fault.
        return Some(if seen.served { Verdict::NoEffect } else { bad });
    }
    let answers = seen.ok_run >= seen.policy.verify_probes;
    if matches!(class, FaultClass::ConnectionExhaustion | FaultClass::LockPileup)
        && !seen.probed
        && !seen.sessions.is_sick()
    {
        return Some(Verdict::Healed);
    }
    if class.from_detector() {
        let healthy = answers || !seen.probed;
        if healthy && seen.is_quiet() {
            return Some(Verdict::Healed);
        }
        return match (now >= until, healthy) {
            (false, _) => None,
            (true, false) => Some(bad),
            // The alarm lasts, or the detector said nothing: that is no proof of healing.
            (true, true) => Some(Verdict::NoEffect),
        };
    }
    let full = class == FaultClass::DiskFull && seen.disk_full.is_some();
    if class == FaultClass::DiskFull && !full && !seen.probed {
        return Some(Verdict::Healed);
    }
    if answers && !seen.stopped && !seen.sessions.is_sick() && !full {
        return Some(Verdict::Healed);
    }
    match (now >= until, seen.probed) {
        (false, _) => None,
        // It answers, and what it was done for is still there.
        (true, _) if (seen.sessions.is_sick() || full) && (answers || !seen.probed) => {
            Some(Verdict::NoEffect)
        }
        (true, true) => Some(bad),
        (true, false) => Some(if seen.stopped {
            Verdict::NoEffect
        } else {
            Verdict::Unknown
        }),
    }
}

/// Whether it has not answered for two windows of probes.
fn is_silent(seen: &Observed) -> bool {
    seen.unresponsive && seen.bad_run >= seen.policy.probe_window.saturating_mul(2)
}

/// Whether an action has its effect when it is done, and none that takes its time, as what people configured and what other programs do may.
fn works_at_once(action: ActionKind) -> bool {
    use ActionKind as A;
    matches!(
        action,
        A::CancelQuery
            | A::TerminateBlocker
            | A::EndIdleSessions
            | A::Reload
            | A::RelieveSpace
            | A::ThrottleCpu
            | A::LimitMemory
            | A::Freeze
    )
}

/// Time within which a service that answered before has to answer again after an action that works at once. A judgement.
const HARM_AFTER: Duration = Duration::from_secs(5);
