//! From observations to confirmed symptoms, with hysteresis: what raises one is stricter than a single sighting, and what clears
//! one is stricter than its absence.

use super::observe::Observed;

impl Observed {
    /// Latches and releases symptoms after an observation.
    pub(super) fn detect(&mut self) {
        let failed = self.probes.iter().filter(|ok| !**ok).count();
        if failed >= self.policy.probe_failures as usize {
            self.unresponsive = true;
        }
        if self.ok_run >= self.policy.verify_probes {
            self.unresponsive = false;
            self.probes.iter_mut().for_each(|ok| *ok = true);
            self.looked_amid = false;
        }
        if failed == 0 {
            self.looked_amid = false;
        }
        if self.stopped_run >= self.policy.stopped_confirm {
            self.stopped = true;
        }
        let lasted = self
            .anomaly_span
            .is_some_and(|(since, latest)| latest.saturating_sub(since) >= self.policy.anomaly_lasting);
        if lasted && self.anomaly_run >= self.policy.anomaly_confirm {
            self.anomalous = true;
        }
    }

    /// Whether a symptom is confirmed.
    pub(super) fn is_sick(&self) -> bool {
        self.exit.is_some()
            || self.stopped
            || self.unresponsive
            || self.anomalous
            || self.corrupt.is_some()
            || self.disk_full.is_some()
            || self.read_only
            || self.sessions.is_sick()
    }

    /// Whether it does not serve those that call it, or did not at the last look: one failed probe is no symptom of its own but reason
    /// enough not to blame a caller.
    pub(super) fn is_down(&self) -> bool {
        self.exit.is_some() || self.unresponsive || self.stopped_run > 0 || self.bad_run > 0
    }

    /// Whether its process was started and has yet to prove that it serves.
    pub(super) fn is_starting(&self) -> bool {
        self.fresh && self.probed
    }

    /// Whether every sign is gone: no symptom, nothing on the way to one, and good probes in a row where there are probes.
    pub(super) fn is_clear(&self) -> bool {
        self.known
            && !self.is_sick()
            && self.stopped_run == 0
            && self.anomaly.is_none()
            && !self.sessions.suspect()
            && (!self.probed || self.ok_run >= self.policy.verify_probes)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{Input, ProcessState};
    use super::*;
    use crate::policy::HealPolicy;
    use crate::types::Now;

    fn observed() -> Observed {
        // 2 of 3 probes, T twice, 3 anomalies; 3 good probes clear.
        Observed::new(HealPolicy {
            settle: Duration::ZERO,
            anomaly_lasting: Duration::ZERO,
            ..HealPolicy::default()
        })
    }

    fn probe(observed: &mut Observed, ok: bool) {
        let input = Input::Probe {
            service: "a".into(),
            ok,
            latency: Duration::ZERO,
            detail: String::new(),
        };
        observed.take(Now::default(), &input);
        observed.detect();
    }

    #[test]
    fn one_failed_probe_is_no_symptom_and_two_of_three_are() {
        let mut seen = observed();
        for ok in [true, false, true, true] {
            probe(&mut seen, ok);
            assert!(!seen.is_sick());
        }
        for ok in [false, true, false] {
            probe(&mut seen, ok);
        }
        assert!(seen.is_sick());
    }

    #[test]
    fn an_unresponsive_service_is_cleared_by_three_good_probes_and_not_by_two() {
        let mut seen = observed();
        for ok in [false, false, true, true] {
            probe(&mut seen, ok);
        }
        assert!(seen.is_sick() && !seen.is_clear());
        probe(&mut seen, true);
        assert!(seen.is_clear());
        probe(&mut seen, false);
        assert!(!seen.is_sick(), "failures from before the recovery count no more");
    }

    #[test]
    fn one_sighting_of_a_stopped_process_is_no_symptom() {
        let mut seen = observed();
        let look = |state| Input::Process {
            service: "a".into(),
            state,
        };
        for (state, sick) in [
            (ProcessState::Stopped, false),
            (ProcessState::Alive, false),
            (ProcessState::Stopped, false),
            (ProcessState::Stopped, true),
            (ProcessState::Alive, false),
        ] {
            seen.take(Now::default(), &look(state));
            seen.detect();
            assert_eq!(seen.is_sick(), sick);
        }
    }

    #[test]
    fn an_anomaly_is_confirmed_after_three_and_ignored_while_settling() {
        let mut seen = Observed::new(HealPolicy {
            settle: Duration::from_secs(10),
            anomaly_lasting: Duration::from_secs(2),
            ..HealPolicy::default()
        });
        let anomaly = Input::Anomaly {
            service: "a".into(),
            score: 9.0,
            threshold: 3.0,
            causes: Vec::new(),
        };
        let at = |seconds| Now {
            monotonic: Duration::from_secs(seconds),
            unix_ms: 0,
        };
        seen.take(
            at(0),
            &Input::Started {
                service: "a".into(),
                pid: 1,
            },
        );
        for second in 1..10 {
            seen.take(at(second), &anomaly);
            seen.detect();
            assert!(!seen.is_sick());
        }
        for second in 10..13 {
            assert!(!seen.is_sick());
            seen.take(at(second), &anomaly);
            seen.detect();
        }
        assert!(seen.is_sick());
        seen.take(at(13), &Input::AnomalyCleared { service: "a".into() });
        assert!(seen.is_clear());
    }
}
