//! An action: decided, recorded, carried out, reconciled.

use std::time::Duration;

use super::course::weighed;
use super::decide::{Circumstances, Decided, Decision, decide};
use super::diagnose::{Diagnosis, diagnose};
use super::people::plan;
use super::verify::is_another;
use super::{IncidentMachine, Open, Output, Phase};
use crate::evidence::Came;
use crate::policy::evaluate::{CERTAIN, Facts, Ruling, RulingRecord};
use crate::policy::fleet::RECORD_TIMEOUT;
use crate::types::{
    ActionKind, ActionRecord, FaultClass, Incident, IncidentState, Intent, IntentId, NoticeKind, Now,
    Outcome, Verdict, Would,
};

impl IncidentMachine {
    pub(super) fn intent_durable(&mut self, now: Now, id: IntentId) {
        let Some(mut open) =
            self.take_if(|phase| matches!(phase, Phase::Recording { id: of, .. } if *of == id))
        else {
            self.ignored += 1;
            return;
        };
        let service = open.record.service.clone();
        let Some(seen) = self.services.get(&service) else {
            return;
        };
        let timeout = seen.policy.action_timeout;
        let late = self.slot_is_over(now, &open.record);
        let diagnosis = diagnose(seen);
        let waits = self.has_to_wait(&service, diagnosis.as_ref());
        // Meanwhile something else has come to the fore, and what was decided is not for that.
        let other = diagnosis
            .as_ref()
            .is_some_and(|found| found.class != open.record.class);
        let called_off = self.halted || waits || other || diagnosis.is_none();
        if (waits || other || late && called_off)
            && let Some(action) = open.record.actions.last()
        {
            // It is asked for again, or its slot ended meanwhile: nobody is to pay for that, and once is enough.
            self.ledger.take_back(&service, action.intent.action);
        }
        self.unrecorded.remove(&service);
        open.record.handed_over = None;
        if late
            && !called_off
            && let Some(diagnosis) = diagnosis
        {
            return self.slot_too_short(now, open.record, diagnosis);
        }
        if called_off {
            self.fleet.held.remove(&service);
            finish(&mut open.record, now, Outcome::NotNeeded, None);
            open.record
                .note(now, "the action was called off before it began".to_owned());
            open.phase = Phase::Watching { undecided: true };
            open.record.set_state(IncidentState::Open);
            self.outputs.push_back(Output::Updated(open.record.clone()));
            self.put(open);
            self.evaluate(now, &service);
            return;
        }
        open.phase = Phase::Acting {
            id,
            deadline: now.monotonic.saturating_add(timeout),
        };
        let mut intent = None;
        if let Some(action) = open.record.actions.last_mut() {
            action.acted = Some(now.when());
            intent = Some(action.intent.clone());
        }
        open.record.acted.get_or_insert(now.when());
        // Only now the wait for the fleet is over.
        self.fleet.held.remove(&service);
        if let Some(intent) = &intent {
            self.breakers.attempted(&service, intent.action, now.monotonic);
        }
        self.outputs.push_back(Output::Updated(open.record.clone()));
        self.outputs.extend(intent.map(Output::Execute));
        self.put(open);
    }

    pub(super) fn intent_failed(&mut self, now: Now, id: IntentId, detail: &str) {
        match self.take_if(|phase| matches!(phase, Phase::Recording { id: of, .. } if *of == id)) {
            Some(open) => self.not_recorded(
                now,
                open.record,
                format!("intent {id} could not be recorded: {detail}"),
            ),
            None => self.ignored += 1,
        }
    }

    pub(super) fn executed(&mut self, now: Now, id: IntentId, outcome: Outcome) {
        // Also an executor that reports after its time is heard: until then no other action could begin.
        let service = self
            .open
            .iter()
            .find(|(_, open)| {
                let begun = open
                    .record
                    .actions
                    .last()
                    .is_some_and(|action| action.acted.is_some());
                begun
                    && open.record.in_flight().is_some_and(|intent| intent.id == id)
                    && matches!(open.phase, Phase::Acting { .. } | Phase::Handed { .. })
            })
            .map(|(service, _)| service.clone());
        let Some(mut open) = service.and_then(|service| self.open.remove(&service)) else {
            self.ignored += 1;
            return;
        };
        let service = open.record.service.clone();
        if let Some(action) = open.record.last_action() {
            // One that reports after its time has been counted then.
            let late = !matches!(open.phase, Phase::Acting { .. });
            match outcome {
                Outcome::Done | Outcome::Restored { .. } | Outcome::Relieved { .. } => {
                    self.breakers.succeeded(&service, action);
                }
                Outcome::Failed { .. } if !late && self.breakers.failed(&service, action, now) => {
                    let words = format!("{action} failed again: its breaker opens");
                    open.record.note(now, words);
                }
                // A state that does not pass its check, or an effect that nobody saw, is no failure of the executor.
                _ => {}
            }
        }
        match outcome {
            Outcome::Done | Outcome::Restored { .. } | Outcome::Relieved { .. } => {
                finish(&mut open.record, now, outcome, None);
                self.begin_verifying(now, open.record, id);
            }
            Outcome::NotNeeded | Outcome::Interrupted => {
                finish(&mut open.record, now, outcome, None);
                self.go_on(now, open.record);
            }
            Outcome::StateCorrupt { ref detail, running } => {
                open.record.note(now, format!("the state check failed: {detail}"));
                if let Some(seen) = self.services.get_mut(&service) {
                    seen.corrupt = Some(super::observe::brief(detail));
                    if !running {
                        seen.exit = Some("it was not started, because its state is corrupt".to_owned());
                    }
                }
                finish(&mut open.record, now, outcome, Some(Verdict::NoEffect));
                self.go_on(now, open.record);
            }
            Outcome::Fruitless { ref detail } => {
                open.record.note(
                    now,
                    format!("the action came to nothing: {}", super::observe::brief(detail)),
                );
                if let Some(action) = open.record.last_action() {
                    self.note_evidence(&service, action, Came::Wrong);
                }
                finish(&mut open.record, now, outcome, Some(Verdict::NoEffect));
                self.go_on(now, open.record);
            }
            Outcome::Spared { ref detail } => {
                let words = format!("the action touched nobody: {}", super::observe::brief(detail));
                open.record.note(now, words);
                finish(&mut open.record, now, outcome, Some(Verdict::NoEffect));
                self.go_on(now, open.record);
            }
            Outcome::Failed { ref detail, running } => {
                open.record.note(
                    now,
                    format!("the action failed: {}", super::observe::brief(detail)),
                );
                if let Some(seen) = self.services.get_mut(&service).filter(|_| !running) {
                    seen.exit = Some(super::observe::brief(detail));
                }
                let harm = !running
                    && open
                        .record
                        .actions
                        .last()
                        .is_some_and(|action| action.answered_before);
                let verdict = if harm { Verdict::Harm } else { Verdict::NoEffect };
                if let Some(action) = open.record.last_action() {
                    let came = if harm { Came::Harm } else { Came::Wrong };
                    self.note_evidence(&service, action, came);
                }
                finish(&mut open.record, now, outcome, Some(verdict));
                if harm {
                    self.harmed(now, open.record);
                } else {
                    self.go_on(now, open.record);
                }
            }
        }
    }

    pub(super) fn reconciled(&mut self, now: Now, id: IntentId, running: bool, took_effect: bool) {
        // Also word that comes after its time is heard: until then a person has it.
        let service = self
            .open
            .iter()
            .find(|(_, open)| {
                matches!(open.phase, Phase::Reconciling { .. } | Phase::Handed { .. })
                    && open.record.in_flight().is_some_and(|intent| intent.id == id)
            })
            .map(|(service, _)| service.clone());
        let Some(mut open) = service.and_then(|service| self.open.remove(&service)) else {
            self.ignored += 1;
            return;
        };
        if running && took_effect {
            open.record.note(
                now,
                format!("the node restarted: intent {id} had been carried out"),
            );
            if let Some(action) = open.record.actions.last_mut() {
                action.acted.get_or_insert(now.when());
            }
            open.record.acted.get_or_insert(now.when());
            finish(&mut open.record, now, Outcome::Done, None);
            self.begin_verifying(now, open.record, id);
            return;
        }
        let unseen = open
            .record
            .in_flight()
            .is_some_and(|intent| !intent.action.renews_process());
        let found = if running && unseen {
            "what became of it is seen by looking at the service"
        } else if running {
            "it had not been carried out"
        } else {
            "the service does not run"
        };
        open.record
            .note(now, format!("the node restarted at intent {id}: {found}"));
        if let Some(seen) = self.services.get_mut(&open.record.service).filter(|_| !running) {
            seen.known = true;
            seen.exit = Some("it did not run when the node had restarted".to_owned());
        }
        finish(&mut open.record, now, Outcome::Interrupted, None);
        if running && unseen {
            // It may have been done, or in part: it is not done again, and the service tells.
            if let Some(action) = open.record.actions.last_mut() {
                action.acted.get_or_insert(now.when());
            }
            open.record.acted.get_or_insert(now.when());
            self.begin_verifying(now, open.record, id);
        } else {
            self.go_on(now, open.record);
        }
    }

    /// Lets an action wait until a cool-down or the fleet's hold is over. The word of a person who has the incident (`approved`) is for this action, also when its
    /// time comes.
    pub(super) fn put_off(
        &mut self,
        now: Now,
        mut record: Incident,
        action: ActionKind,
        until: Duration,
        (state, approved): (IncidentState, bool),
    ) {
        if approved
            && record.plan.is_none()
            && let Some(seen) = self.services.get(&record.service)
        {
            record.plan = Some(plan(now, &record, action, seen, &self.policy, &self.name));
        }
        record.set_state(state);
        self.outputs.push_back(Output::Updated(record.clone()));
        self.put(Open {
            record,
            phase: Phase::CoolingDown { until, approved },
        });
    }

    pub(super) fn decide(&mut self, now: Now, mut record: Incident, diagnosis: Diagnosis, approved: bool) {
        let Some(seen) = self.services.get(&record.service) else {
            return;
        };
        // What was said to a person before holds no longer, except while the record keeps failing.
        if !self.unrecorded.contains_key(&record.service) {
            record.handed_over = None;
        }
        if !approved {
            record.plan = None;
            record.approved_by.clear();
        }
        if record.class != diagnosis.class {
            record.note(
                now,
                format!("it now looks like {}: {}", diagnosis.class, diagnosis.reason),
            );
            let unexplained = record.class == FaultClass::Unknown
                || (record.class.from_detector() && is_another(record.class, diagnosis.class));
            if unexplained && record.last_action().is_none() {
                // An anomaly that is unexplained, or was let be, is not the beginning of what is now seen.
                let first = seen.signs.iter().map(|sign| sign.at);
                record.opened = first
                    .filter(|at| at.since(record.detected) > Duration::ZERO)
                    .min_by_key(|at| at.monotonic_ms)
                    .unwrap_or(now.when());
                record.detected = now.when();
            }
            record.class = diagnosis.class;
        }
        let with = Circumstances {
            seen,
            ledger: &self.ledger,
            node: self.node,
            halted: self.halted,
            breakers: &self.breakers,
            demoted: &self.demoted,
            healed_before: self.healed_before(now, &record),
            fleet: self.fleet.facts(&record.service),
            evidence: &self.evidence,
            approved,
            now: now.monotonic,
        };
        let Decided {
            decision,
            alternatives,
            ruled,
        } = decide(&record, &diagnosis, &with);
        record.hypotheses = weighed(seen);
        record.alternatives = alternatives;
        // Whether the approval was of what is now to be done.
        let holds = ruled.last().is_some_and(|(facts, _)| facts.approved);
        if approved && !holds && !ruled.is_empty() {
            let words = if record.plan.is_some() {
                "what was approved is not what would be done now, so the approval counts no more"
            } else {
                "what would be done now needs an approval of its own plan"
            };
            record.note(now, words.to_owned());
            record.plan = None;
            record.approved_by.clear();
        }
        self.note_hold(now, &mut record, ruled.last());
        for (facts, ruling) in ruled {
            self.note_ruling(now, facts, ruling);
        }
        self.update_score(&mut record);
        match decision {
            Decision::Act(action) => match self.in_the_way(&record.service) {
                Some(other) => {
                    self.fleet.held.remove(&record.service);
                    self.queue(now, record, action, &other, holds);
                }
                None => self.record_intent(now, record, action, diagnosis.reason),
            },
            Decision::Wait { action, until } => {
                self.put_off(now, record, action, until, (IncidentState::CoolingDown, holds));
            }
            Decision::Held { action, until, .. } => {
                self.put_off(now, record, action, until, (IncidentState::Held, holds));
            }
            Decision::Recommend(action) => self.recommend(now, record, action),
            Decision::WouldAct(action) => {
                if record.would.as_ref().map(|would| would.action) != Some(action) {
                    record.would = matches!(action, ActionKind::Start | ActionKind::Restart).then(|| Would {
                        action,
                        at: now.when(),
                        renewed: false,
                    });
                }
                record.set_state(IncidentState::Open);
                self.outputs.push_back(Output::Updated(record.clone()));
                let words = format!(
                    "{action} would be done to {}: {}",
                    record.service, diagnosis.reason
                );
                self.notify(&record, NoticeKind::WouldHaveActed, words);
                self.put(Open {
                    record,
                    phase: Phase::Watching { undecided: false },
                });
            }
            Decision::Hold(_) | Decision::LetBe(_) => {
                let phase = match decision {
                    Decision::LetBe(_) => Phase::LetBe,
                    _ if record.class == FaultClass::DependencyDown => {
                        let seen = self.services.get(&record.service);
                        let every = seen.map_or(RECORD_TIMEOUT, |seen| seen.policy.remind_every);
                        Phase::Excused {
                            remind_at: now.monotonic.saturating_add(every),
                        }
                    }
                    _ => Phase::Watching { undecided: false },
                };
                record.set_state(IncidentState::Open);
                self.outputs.push_back(Output::Updated(record.clone()));
                self.put(Open { record, phase });
            }
            Decision::HandOver(reason) => self.hand_over(now, record, reason),
            Decision::Broken { reason, until } => {
                let service = record.service.clone();
                self.hand_over(now, record, reason);
                if let Some(open) = self.open.get_mut(&service)
                    && let Phase::Handed { retry_at, .. } = &mut open.phase
                {
                    *retry_at = Some(until);
                }
            }
        }
    }

    /// One ruling is written down once, however often it is asked for while nothing changes but the time.
    pub(super) fn note_ruling(&mut self, now: Now, facts: Facts, ruling: Ruling) {
        let record = RulingRecord {
            unix_ms: now.unix_ms,
            policy: self.policy.clone(),
            facts,
            ruling,
            propensity: CERTAIN,
            previous: String::new(),
        };
        let key = (record.facts.service.clone(), record.facts.action);
        let timeless = |record: &RulingRecord| Facts {
            now_ms: 0,
            ..record.facts.clone()
        };
        let same = self
            .ruled
            .get(&key)
            .is_some_and(|last| last.ruling == record.ruling && timeless(last) == timeless(&record));
        if !same {
            self.ruled.insert(key, record.clone());
            self.outputs.push_back(Output::Ruled(Box::new(record)));
        }
    }

    pub(super) fn record_intent(
        &mut self,
        now: Now,
        mut record: Incident,
        action: ActionKind,
        reason: String,
    ) {
        self.last_intent += 1;
        let id = IntentId(self.last_intent);
        let keep = self
            .services
            .values()
            .map(|seen| seen.policy.looks_back())
            .fold(self.node.window, Duration::max);
        self.ledger.charge(&record.service, action, now.monotonic, keep);
        let session = self
            .services
            .get(&record.service)
            .and_then(|seen| seen.session_of(action));
        let intent = Intent {
            id,
            incident: record.id,
            service: record.service.clone(),
            action,
            class: record.class,
            session,
            decided: now.when(),
            reason,
        };
        // The last good answer of a stopped process was before it was stopped.
        let answered_before = self
            .services
            .get(&record.service)
            .is_some_and(|seen| seen.answers() && !seen.stopped);
        record.actions.push(ActionRecord {
            intent: intent.clone(),
            answered_before,
            acted: None,
            finished: None,
            outcome: None,
            verdict: None,
            before_retry: false,
        });
        record.set_state(IncidentState::Acting);
        let deadline = now.monotonic.saturating_add(RECORD_TIMEOUT);
        self.put(Open {
            record,
            phase: Phase::Recording { id, deadline },
        });
        self.outputs.push_back(Output::RecordIntent(intent));
    }

    pub(super) fn begin_verifying(&mut self, now: Now, mut record: Incident, id: IntentId) {
        let Some(seen) = self.services.get_mut(&record.service) else {
            return;
        };
        if record.last_action().is_none_or(ActionKind::renews_process) {
            seen.renew(now);
        } else {
            // The process is the same: only what is seen from now on tells of the effect.
            seen.ok_run = 0;
            seen.sessions.await_effect();
        }
        let from = if record.class.from_detector() {
            seen.settle_until
        } else {
            now.monotonic
        };
        let until = from.saturating_add(seen.policy.verify_window);
        record.set_state(IncidentState::Verifying);
        self.outputs.push_back(Output::Updated(record.clone()));
        self.put(Open {
            record,
            phase: Phase::Verifying { id, until },
        });
    }

    /// Nothing is done without a record. A person hears of it once; the record is tried again, since a disk may get room.
    pub(super) fn not_recorded(&mut self, now: Now, mut record: Incident, reason: String) {
        let Some(remind_every) = self
            .services
            .get(&record.service)
            .map(|seen| seen.policy.remind_every)
        else {
            return;
        };
        finish(&mut record, now, Outcome::NotNeeded, None);
        if let Some(action) = record.actions.last().map(|action| action.intent.action) {
            self.ledger.take_back(&record.service, action);
        }
        let service = record.service.clone();
        let next = now.monotonic.saturating_add(remind_every);
        if let Some(due) = self.unrecorded.get(&service).copied() {
            // A repeated failure adds nothing to the incident, and its reminders come at their own pace.
            record.actions.pop();
            record.set_state(IncidentState::HandedToHuman);
            let remind_at = if due <= now.monotonic {
                self.remind(&record);
                next
            } else {
                due
            };
            self.unrecorded.insert(service.clone(), remind_at);
            self.put(Open {
                record,
                phase: Phase::Handed {
                    remind_at,
                    retry_at: None,
                },
            });
        } else {
            self.unrecorded.insert(service.clone(), next);
            self.fleet.held.remove(&service);
            self.hand_over(now, record, format!("{reason}; nothing is done without a record"));
        }
        if let Some(open) = self.open.get_mut(&service)
            && let Phase::Handed { retry_at, .. } = &mut open.phase
        {
            *retry_at = Some(now.monotonic.saturating_add(RECORD_RETRY));
        }
    }
}

pub(super) fn finish(record: &mut Incident, now: Now, outcome: Outcome, verdict: Option<Verdict>) {
    if let Some(action) = record.actions.last_mut() {
        action.finished = Some(now.when());
        action.outcome = Some(outcome);
        action.verdict = verdict;
    }
    if verdict.is_some() {
        record.verdict = verdict;
    }
}

/// Time after which an intent that could not be recorded is decided anew.
pub(super) const RECORD_RETRY: Duration = Duration::from_secs(10);
