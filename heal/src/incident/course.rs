//! The course of an incident: opened, looked at anew, handed over, closed, taken up again after a restart.

use std::time::Duration;

use super::act::RECORD_RETRY;
use super::decide::ladder;
use super::diagnose::{Diagnosis, diagnose, hypotheses};
use super::observe::Observed;
use super::people::DECLINED;
use super::{HealedRestart, IncidentMachine, Open, Output, Phase, Retry};
use crate::evidence::Came;
use crate::policy::fleet::RECORD_TIMEOUT;
use crate::types::{
    Evidence, FaultClass, Hypothesis, Incident, IncidentId, IncidentState, NoticeKind, Now, Verdict,
};

/// What the signs speak for, for the record.
pub(super) fn weighed(seen: &Observed) -> Vec<Hypothesis> {
    hypotheses(seen)
        .into_iter()
        .take(Incident::HYPOTHESES_MAX)
        .map(|found| Hypothesis {
            class: found.class,
            certainty: found.certainty,
            reason: found.reason,
        })
        .collect()
}
impl IncidentMachine {
    /// Looks at a service after something changed.
    pub(super) fn evaluate(&mut self, now: Now, service: &str) {
        let Some(seen) = self.services.get(service) else {
            return;
        };
        let diagnosis = diagnose(seen);
        let clear = seen.is_clear();
        let Some(open) = self.open.remove(service) else {
            if let Some(diagnosis) = diagnosis {
                self.open_incident_for(now, service, diagnosis);
            }
            return;
        };
        let in_flight = open.record.in_flight().is_some();
        match open.phase {
            Phase::Recording { .. } | Phase::Acting { .. } | Phase::Reconciling { .. } => self.put(open),
            Phase::Verifying { id, until } => self.verify(now, open.record, id, until),
            Phase::Watching { .. }
            | Phase::Excused { .. }
            | Phase::LetBe
            | Phase::AwaitingApproval { .. }
            | Phase::CoolingDown { .. }
            | Phase::Queued { .. }
            | Phase::Handed { .. }
                if clear && !in_flight =>
            {
                if let (Phase::AwaitingApproval { .. }, Some(plan)) = (&open.phase, &open.record.plan) {
                    // It was not needed.
                    let (service, action) = (plan.service.clone(), plan.action);
                    self.note_evidence(&service, action, Came::Wrong);
                }
                if matches!(open.phase, Phase::Watching { .. } | Phase::Excused { .. }) {
                    self.note_unneeded(&open.record);
                }
                self.close(now, open.record, IncidentState::Recovered);
            }
            Phase::Watching { undecided } => match diagnosis {
                Some(diagnosis) if undecided || diagnosis.class != open.record.class => {
                    self.decide(now, open.record, diagnosis, false);
                }
                _ => self.put(open),
            },
            // What is unexplained for a row or two needs no other person to be told.
            Phase::LetBe => match diagnosis {
                Some(diagnosis) if diagnosis.presses && diagnosis.class != FaultClass::Unknown => {
                    self.decide(now, open.record, diagnosis, false);
                }
                _ => self.put(open),
            },
            Phase::AwaitingApproval { .. }
            | Phase::CoolingDown { .. }
            | Phase::Queued { .. }
            | Phase::Excused { .. } => {
                match diagnosis {
                    // Approval was given for another diagnosis, so it does not carry over.
                    Some(diagnosis) if diagnosis.class != open.record.class => {
                        self.decide(now, open.record, diagnosis, false);
                    }
                    _ => self.put(open),
                }
            }
            Phase::Handed { .. } => match diagnosis {
                Some(diagnosis)
                    if !in_flight && diagnosis.presses && diagnosis.class != open.record.class =>
                {
                    self.reconsider(now, open, diagnosis);
                }
                _ => self.put(open),
            },
        }
    }

    /// The stop switch or a demotion changed.
    pub(super) fn decide_again(&mut self, now: Now, service: &str) {
        let Some(mut open) = self.open.remove(service) else {
            return;
        };
        if matches!(
            open.phase,
            Phase::Watching { .. }
                | Phase::Excused { .. }
                | Phase::LetBe
                | Phase::CoolingDown { .. }
                | Phase::Queued { .. }
                | Phase::AwaitingApproval { .. }
        ) {
            open.phase = Phase::Watching { undecided: true };
            let nothing = self.services.get(service).and_then(diagnose).is_none();
            if nothing && open.record.state == IncidentState::Held {
                // Nothing is to be done at present, so nothing is held back.
                self.fleet.held.remove(service);
                open.record.set_state(IncidentState::Open);
                self.outputs.push_back(Output::Updated(open.record.clone()));
            }
        }
        self.put(open);
        self.evaluate(now, service);
    }

    pub(super) fn timed_out(&mut self, now: Now, service: &str) {
        let Some(open) = self.open.remove(service) else {
            return;
        };
        let Some(seen) = self.services.get(service) else {
            return;
        };
        let remind_at = now.monotonic.saturating_add(seen.policy.remind_every);
        match open.phase {
            Phase::Watching { .. } | Phase::LetBe => self.put(open),
            Phase::Excused { .. } => {
                let why = diagnose(seen).map_or_else(
                    || "what it calls serves again, and it has yet to".to_owned(),
                    |found| found.reason,
                );
                self.tell_still_open(&open.record, &why);
                self.put(Open {
                    phase: Phase::Excused { remind_at },
                    ..open
                });
            }
            Phase::Queued { approved, .. } => {
                let other = self.in_the_way(service).unwrap_or_default();
                let why =
                    format!("its action still waits for the one on {other}, in the same failure domain");
                self.tell_still_open(&open.record, &why);
                self.put(Open {
                    phase: Phase::Queued { approved, remind_at },
                    ..open
                });
            }
            Phase::Reconciling { id, .. } => {
                let reason = format!(
                    "what became of intent {id} when the node restarted was not found out within {:?}",
                    seen.policy.action_timeout
                );
                self.hand_over(now, open.record, reason);
            }
            Phase::AwaitingApproval { expires_at, .. } if expires_at <= now.monotonic => {
                self.plan_again(now, open.record);
            }
            Phase::AwaitingApproval { expires_at, .. } => {
                self.remind(&open.record);
                self.put(Open {
                    phase: Phase::AwaitingApproval {
                        remind_at,
                        expires_at,
                    },
                    ..open
                });
            }
            Phase::Handed {
                retry_at: Some(retry_at),
                ..
            } if retry_at <= now.monotonic => match diagnose(seen) {
                Some(diagnosis) => self.decide(now, open.record, diagnosis, false),
                None => self.put(Open {
                    phase: Phase::Watching { undecided: true },
                    ..open
                }),
            },
            Phase::Handed { retry_at, .. } => {
                self.remind(&open.record);
                self.put(Open {
                    phase: Phase::Handed { remind_at, retry_at },
                    ..open
                });
            }
            Phase::CoolingDown { approved, .. } => self.waited(now, open.record, approved),
            Phase::Recording { id, .. } => {
                let reason = format!(
                    "intent {id} was not recorded within {} s",
                    RECORD_TIMEOUT.as_secs()
                );
                self.not_recorded(now, open.record, reason);
            }
            Phase::Acting { id, .. } => {
                let reason = format!(
                    "intent {id} was not carried out within {:?}",
                    seen.policy.action_timeout
                );
                if let Some(intent) = open.record.in_flight() {
                    self.breakers.failed(service, intent.action, now);
                }
                self.hand_over(now, open.record, reason);
            }
            Phase::Verifying { id, until } => self.verify(now, open.record, id, until),
        }
    }

    /// An incident from before the node's restart.
    pub(super) fn reopen(&mut self, now: Now, mut record: Incident, retry: Retry) {
        let Some(seen) = self
            .services
            .get_mut(&record.service)
            .filter(|_| !self.open.contains_key(&record.service))
        else {
            record.note(now, "its service is not configured any more".to_owned());
            self.close(now, record, IncidentState::Recovered);
            return;
        };
        // It was seen to turn; whoever looks tells when it can be written again.
        seen.read_only |= record.class == FaultClass::ReadOnlyFs;
        let after = |span: Duration| now.monotonic.saturating_add(span);
        let (verify_window, remind_every) = (seen.policy.verify_window, seen.policy.remind_every);
        let action_timeout = seen.policy.action_timeout;
        let in_flight = record.in_flight().cloned();
        let last = record.actions.last().map(|action| action.intent.id);
        let phase = match (in_flight, record.state, last) {
            (Some(intent), ..) => {
                let id = intent.id;
                self.outputs.push_back(Output::Reconcile(intent));
                record.set_state(IncidentState::Acting);
                Phase::Reconciling {
                    id,
                    deadline: after(action_timeout),
                }
            }
            (None, IncidentState::Verifying, Some(id)) => Phase::Verifying {
                id,
                until: after(verify_window),
            },
            (None, IncidentState::HandedToHuman, _) => Phase::Handed {
                remind_at: after(remind_every),
                retry_at: match retry {
                    Retry::Breaker => {
                        let earliest = self.breakers.earliest(&record.service);
                        Some(earliest.unwrap_or(now.monotonic).max(now.monotonic))
                    }
                    Retry::Record => Some(after(RECORD_RETRY)),
                    Retry::Never => None,
                },
            },
            _ => {
                record.set_state(IncidentState::Open);
                Phase::Watching { undecided: true }
            }
        };
        self.last_intent = record
            .actions
            .iter()
            .map(|action| action.intent.id.0)
            .fold(self.last_intent, u64::max);
        self.put(Open { record, phase });
    }

    pub(super) fn open_incident_for(&mut self, now: Now, service: &str, diagnosis: Diagnosis) {
        self.last_incident += 1;
        let signs = self
            .services
            .get(service)
            .map_or(Vec::new(), |seen| seen.signs.clone());
        // An alarm that had led to nothing is not the beginning of a crash or a hang.
        let tells = |sign: &&Evidence| {
            diagnosis.class.from_detector() || !sign.words.starts_with(super::observe::ALARM_WORDS)
        };
        let first = signs.iter().find(tells).map(|sign| sign.at);
        let mut record = Incident {
            id: IncidentId(self.last_incident),
            service: service.to_owned(),
            class: diagnosis.class,
            state: IncidentState::Open,
            opened: first.unwrap_or(now.when()),
            detected: now.when(),
            acted: None,
            healed: None,
            closed: None,
            score: None,
            threshold: None,
            evidence: signs,
            evidence_dropped: 0,
            causes: Vec::new(),
            hypotheses: Vec::new(),
            alternatives: Vec::new(),
            would: None,
            plan: None,
            approved_by: std::collections::BTreeSet::new(),
            actions: Vec::new(),
            verdict: None,
            handed_over: None,
        };
        record.note(
            now,
            format!("taken for {}: {}", diagnosis.class, diagnosis.reason),
        );
        self.update_score(&mut record);
        self.outputs.push_back(Output::Opened(record.clone()));
        self.decide(now, record, diagnosis, false);
    }

    /// A person has the incident, and the evidence now says something else: act when that can be mended.
    pub(super) fn reconsider(&mut self, now: Now, mut open: Open, diagnosis: Diagnosis) {
        let mendable = self
            .services
            .get(&open.record.service)
            .is_some_and(|seen| !ladder(diagnosis.class, seen).is_empty());
        if mendable
            && !open
                .record
                .actions
                .iter()
                .any(|action| action.verdict == Some(Verdict::Harm))
        {
            self.decide(now, open.record, diagnosis, false);
        } else {
            self.fleet.held.remove(&open.record.service);
            open.record.class = diagnosis.class;
            if let Some(seen) = self.services.get(&open.record.service) {
                open.record.hypotheses = weighed(seen);
            }
            open.record.note(now, diagnosis.reason);
            self.outputs.push_back(Output::Updated(open.record.clone()));
            self.put(open);
        }
    }

    /// A person has a full disk, and by now there is something that may be moved away. Who declined that is not asked again.
    pub(super) fn room_was_found(&mut self, now: Now, service: &str) {
        let untried = |open: &mut Open| {
            matches!(open.phase, Phase::Handed { .. })
                && open.record.class == FaultClass::DiskFull
                && open.record.actions.is_empty()
                && open.record.handed_over.as_deref() != Some(DECLINED)
        };
        let diagnosis = self.services.get(service).and_then(diagnose);
        if let Some(diagnosis) = diagnosis.filter(|found| found.class == FaultClass::DiskFull)
            && self.open.get_mut(service).is_some_and(untried)
            && let Some(open) = self.open.remove(service)
        {
            self.reconsider(now, open, diagnosis);
        }
    }

    /// After an action that did not help: next rung or a person.
    pub(super) fn go_on(&mut self, now: Now, mut record: Incident) {
        let Some(seen) = self.services.get(&record.service) else {
            return;
        };
        if let Some(diagnosis) = diagnose(seen) {
            self.decide(now, record, diagnosis, false);
        } else {
            record.set_state(IncidentState::Open);
            self.outputs.push_back(Output::Updated(record.clone()));
            let service = record.service.clone();
            self.put(Open {
                record,
                phase: Phase::Watching { undecided: true },
            });
            self.evaluate(now, &service);
        }
    }

    /// Remembers a restart that was verified as healed, so that the same trouble is not restarted away for ever.
    pub(super) fn note_relapse(&mut self, now: Now, record: &Incident) {
        let window = self
            .services
            .get(&record.service)
            .map_or(Duration::ZERO, |seen| seen.policy.window);
        let at_ms = now.when().monotonic_ms;
        self.healed
            .retain(|healed| healed.service != record.service || healed.age(at_ms) <= window);
        if record.class.from_detector() {
            self.healed.push(HealedRestart {
                service: record.service.clone(),
                class: record.class,
                at_ms,
            });
        }
    }

    /// Restarts within the service's window that were verified as healed for this class.
    pub(super) fn healed_before(&self, now: Now, record: &Incident) -> u32 {
        let window = self
            .services
            .get(&record.service)
            .map_or(Duration::ZERO, |seen| seen.policy.window);
        let at_ms = now.when().monotonic_ms;
        let same = |healed: &&HealedRestart| {
            healed.service == record.service && healed.class == record.class && healed.age(at_ms) <= window
        };
        u32::try_from(self.healed.iter().filter(same).count()).unwrap_or(u32::MAX)
    }

    pub(super) fn hand_over(&mut self, now: Now, mut record: Incident, reason: String) {
        let remind_every = self
            .services
            .get(&record.service)
            .map_or(RECORD_TIMEOUT, |seen| seen.policy.remind_every);
        record.set_state(IncidentState::HandedToHuman);
        record.note(now, format!("handed to a person: {reason}"));
        record.handed_over = Some(reason.clone());
        self.outputs.push_back(Output::Updated(record.clone()));
        self.notify(
            &record,
            NoticeKind::HandedToHuman,
            format!("{} needs a person: {reason}", record.service),
        );
        self.put(Open {
            record,
            phase: Phase::Handed {
                remind_at: now.monotonic.saturating_add(remind_every),
                retry_at: None,
            },
        });
    }

    pub(super) fn close(&mut self, now: Now, mut record: Incident, state: IncidentState) {
        record.set_state(state);
        record.closed = Some(now.when());
        if state == IncidentState::Healed {
            record.healed = Some(now.when());
        }
        if let Some(seen) = self.services.get_mut(&record.service) {
            seen.signs.clear();
        }
        self.fleet.held.remove(&record.service);
        self.unrecorded.remove(&record.service);
        self.outputs.push_back(Output::Closed(record));
    }

    pub(super) fn remind(&mut self, record: &Incident) {
        let why = record
            .handed_over
            .clone()
            .unwrap_or_else(|| "an action waits for approval".to_owned());
        self.tell_still_open(record, &why);
    }

    pub(super) fn tell_still_open(&mut self, record: &Incident, why: &str) {
        let words = format!("{} is still {}: {why}", record.service, record.class);
        self.notify(record, NoticeKind::StillOpen, words);
    }

    pub(super) fn update_score(&self, record: &mut Incident) {
        let anomaly = self
            .services
            .get(&record.service)
            .and_then(|seen| seen.anomaly.as_ref());
        let Some(anomaly) = anomaly.filter(|anomaly| anomaly.score.is_finite()) else {
            return;
        };
        if record.score.is_none_or(|score| anomaly.score > score) {
            record.score = Some(anomaly.score);
            record.threshold = Some(anomaly.threshold);
        }
        if record.class.from_detector() {
            record.causes.clone_from(&anomaly.causes);
        }
    }

    pub(super) fn put(&mut self, open: Open) {
        self.open.insert(open.record.service.clone(), open);
    }

    pub(super) fn take_if(&mut self, wanted: impl Fn(&Phase) -> bool) -> Option<Open> {
        let service = self
            .open
            .iter()
            .find(|(_, open)| wanted(&open.phase))
            .map(|(service, _)| service.clone());
        service.and_then(|service| self.open.remove(&service))
    }
}
