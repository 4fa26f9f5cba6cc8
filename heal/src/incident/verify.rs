//! Whether an action helped, judged at the user's side of the service.

use std::time::Duration;

use super::diagnose::diagnose;
use super::observe::Observed;
use super::{IncidentMachine, Open, Phase};
use crate::types::{FaultClass, Incident, IncidentState, IntentId, Now, Verdict};

impl IncidentMachine {
    /// Judges the last action, now or at the end of its window.
    pub(super) fn verify(&mut self, now: Now, mut record: Incident, id: IntentId, until: Duration) {
        let Some(seen) = self.services.get(&record.service) else {
            return;
        };
        let answered_before = record.actions.last().is_some_and(|action| action.answered_before);
        let Some(verdict) = judge(seen, record.class, answered_before, now.monotonic, until) else {
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
        match verdict {
            Verdict::Healed => self.close(now, record, IncidentState::Healed),
            Verdict::Unknown => self.close(now, record, IncidentState::Recovered),
            Verdict::Harm => self.harmed(now, record),
            Verdict::NoEffect if diagnose(seen).is_some() => self.go_on(now, record),
            Verdict::NoEffect => {
                let reason = "the service did not come back within the time for verification".to_owned();
                self.hand_over(now, record, reason);
            }
        }
    }
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
        return Some(bad);
    }
    let answers = seen.ok_run >= seen.policy.verify_probes;
    let from_detector = matches!(
        class,
        FaultClass::MemoryLeak | FaultClass::CpuContention | FaultClass::Unknown
    );
    if from_detector {
        let quiet = seen.anomaly_cleared || (now >= seen.settle_until && seen.anomaly_run == 0);
        let healthy = answers || !seen.probed;
        if healthy && quiet && !seen.anomalous {
            return Some(Verdict::Healed);
        }
        let same = seen.anomalous && diagnose(seen).is_some_and(|diagnosis| diagnosis.class == class);
        return match (now >= until, healthy) {
            (false, _) => None,
            (true, false) => Some(bad),
            (true, true) => Some(if same { Verdict::NoEffect } else { Verdict::Healed }),
        };
    }
    if answers && !seen.stopped {
        return Some(Verdict::Healed);
    }
    match (now >= until, seen.probed) {
        (false, _) => None,
        (true, true) => Some(bad),
        (true, false) => Some(if seen.stopped {
            Verdict::NoEffect
        } else {
            Verdict::Unknown
        }),
    }
}
