//! Transitions of an incident: opened, decided, recorded, carried out, reconciled, handed over, closed.

use std::time::Duration;

use super::decide::{Circumstances, Decided, Decision, decide, ladder};
use super::diagnose::{Diagnosis, diagnose, hypotheses};
use super::observe::Observed;
use super::verify::is_another;
use super::{HealedRestart, IncidentMachine, Open, Output, Phase, Retry};
use crate::evidence::Came;
use crate::policy::evaluate::{CERTAIN, Facts, Ruling, RulingRecord};
use crate::policy::fleet::RECORD_TIMEOUT;
use crate::types::{
    ActionKind, ActionRecord, Evidence, FaultClass, Hypothesis, Incident, IncidentId, IncidentState, Intent,
    IntentId, NoticeKind, Now, Outcome, Plan, Verdict, When, Would,
};

/// What the signs speak for, for the record.
fn weighed(seen: &Observed) -> Vec<Hypothesis> {
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

    /// Approvals count for the present plan alone, each signer once, and only until it expires.
    pub(super) fn approve(&mut self, now: Now, incident: IncidentId, plan: Option<&str>, by: Option<&str>) {
        let waits = |open: &Open| {
            matches!(open.phase, Phase::AwaitingApproval { .. } | Phase::Handed { .. })
                && open.record.in_flight().is_none()
        };
        let service = self
            .open
            .values()
            .find(|open| open.record.id == incident && waits(open))
            .map(|open| open.record.service.clone());
        let Some((mut open, seen)) = service
            .as_ref()
            .and_then(|service| Some((self.open.remove(service)?, self.services.get_mut(service)?)))
        else {
            self.ignored += 1;
            return;
        };
        // The clock may have run on in a sleep of the host before anybody looked at it.
        if let Phase::AwaitingApproval { expires_at, .. } = open.phase
            && expires_at <= now.monotonic
        {
            self.plan_again(now, open.record);
            return;
        }
        // Whoever has it says that the way is free; the hands look again.
        seen.occupied = false;
        let Some(diagnosis) = diagnose(seen) else {
            self.ignored += 1;
            self.put(open);
            return;
        };
        if matches!(open.phase, Phase::AwaitingApproval { .. }) {
            let present = open.record.plan.as_ref().map(Plan::hash);
            let asked = open
                .record
                .plan
                .as_ref()
                .map_or_else(Default::default, |plan| seen.policy.approvals(plan.action));
            let refused = if present.as_deref() != plan {
                Some("an approval of another plan, or of one that has expired, was refused".to_owned())
            } else if asked.signed && by.is_none() {
                Some(format!(
                    "an approval without signature was refused: {} are needed",
                    asked.need
                ))
            } else {
                open.record.approved_by.extend(by.map(str::to_owned));
                let found = open.record.approved_by.len();
                (asked.signed && found < asked.need as usize)
                    .then(|| format!("{found} of {} people have approved", asked.need))
            };
            if let Some(words) = refused {
                open.record.note(now, words);
                self.outputs.push_back(Output::Updated(open.record.clone()));
                self.put(open);
                return;
            }
        } else if plan.is_some() {
            self.ignored += 1;
            self.put(open);
            return;
        } else {
            // Who signed an earlier plan has not signed what comes now. What was tried before the person mended something may be tried again.
            for action in &mut open.record.actions {
                action.before_retry = true;
            }
            open.record.plan = None;
            open.record.approved_by.clear();
        }
        open.record.note(now, "a person approved the action".to_owned());
        self.decide(now, open.record, diagnosis, true);
    }

    /// The plan expired before enough people had approved it: another one is open, and approvals of the old one count no more.
    fn plan_again(&mut self, now: Now, mut record: Incident) {
        let Some(action) = record.plan.as_ref().map(|plan| plan.action) else {
            return self.put(Open {
                record,
                phase: Phase::Watching { undecided: true },
            });
        };
        record.note(now, "the plan expired; approvals of it count no more".to_owned());
        self.recommend(now, record, action);
    }

    fn recommend(&mut self, now: Now, mut record: Incident, action: ActionKind) {
        let Some(seen) = self.services.get(&record.service) else {
            return;
        };
        let ttl = seen.policy.approvals(action).ttl;
        let remind_at = now.monotonic.saturating_add(seen.policy.remind_every);
        let expires_at = now.monotonic.saturating_add(ttl);
        record.approved_by.clear();
        record.plan = Some(plan(now, &record, action, seen, &self.policy, &self.name));
        record.set_state(IncidentState::AwaitingApproval);
        self.outputs.push_back(Output::Updated(record.clone()));
        let reason = record
            .hypotheses
            .first()
            .map_or("", |taken| taken.reason.as_str());
        let held = self.hold_of(now, &record.service);
        let held = held.map_or_else(String::new, |(by, _)| format!("; {by}"));
        let words = format!("{action} is recommended for {}: {reason}{held}", record.service);
        self.notify(&record, NoticeKind::Recommended, words);
        self.put(Open {
            record,
            phase: Phase::AwaitingApproval {
                remind_at,
                expires_at,
            },
        });
    }

    pub(super) fn deny(&mut self, now: Now, incident: IncidentId) {
        let waits = |phase: &Phase| {
            matches!(
                phase,
                Phase::AwaitingApproval { .. } | Phase::CoolingDown { .. } | Phase::Queued { .. }
            )
        };
        let service = self
            .open
            .values()
            .find(|open| open.record.id == incident && waits(&open.phase))
            .map(|open| open.record.service.clone());
        match service.and_then(|service| self.open.remove(&service)) {
            Some(open) => {
                if let Some(plan) = &open.record.plan {
                    let (service, action) = (plan.service.clone(), plan.action);
                    self.note_evidence(&service, action, Came::Wrong);
                }
                self.fleet.held.remove(&open.record.service);
                self.hand_over(now, open.record, "a person declined the action".to_owned());
            }
            None => self.ignored += 1,
        }
    }

    pub(super) fn new_normal(&mut self, now: Now, incident: IncidentId) {
        if let Some(open) = self.open.values_mut().find(|open| open.record.id == incident) {
            open.record
                .note(now, "a person said that this is normal now".to_owned());
            self.outputs.push_back(Output::Updated(open.record.clone()));
        } else {
            self.ignored += 1;
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

    fn open_incident_for(&mut self, now: Now, service: &str, diagnosis: Diagnosis) {
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
    fn reconsider(&mut self, now: Now, mut open: Open, diagnosis: Diagnosis) {
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

    /// A person has a full disk, and by now there is something that may be moved away.
    pub(super) fn room_was_found(&mut self, now: Now, service: &str) {
        let untried = |open: &mut Open| {
            matches!(open.phase, Phase::Handed { .. })
                && open.record.class == FaultClass::DiskFull
                && open.record.actions.is_empty()
        };
        let diagnosis = self.services.get(service).and_then(diagnose);
        if let Some(diagnosis) = diagnosis.filter(|found| found.class == FaultClass::DiskFull)
            && self.open.get_mut(service).is_some_and(untried)
            && let Some(open) = self.open.remove(service)
        {
            self.reconsider(now, open, diagnosis);
        }
    }

    /// Lets an action wait until a cool-down or the fleet's hold is over. The word of a person who has the incident (`approved`) is for this action, also when its
    /// time comes.
    fn put_off(
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
    fn note_ruling(&mut self, now: Now, facts: Facts, ruling: Ruling) {
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

    fn record_intent(&mut self, now: Now, mut record: Incident, action: ActionKind, reason: String) {
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

    fn begin_verifying(&mut self, now: Now, mut record: Incident, id: IntentId) {
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
    fn healed_before(&self, now: Now, record: &Incident) -> u32 {
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

    /// Nothing is done without a record. A person hears of it once; the record is tried again, since a disk may get room.
    fn not_recorded(&mut self, now: Now, mut record: Incident, reason: String) {
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

    fn remind(&mut self, record: &Incident) {
        let why = record
            .handed_over
            .clone()
            .unwrap_or_else(|| "an action waits for approval".to_owned());
        self.tell_still_open(record, &why);
    }

    fn tell_still_open(&mut self, record: &Incident, why: &str) {
        let words = format!("{} is still {}: {why}", record.service, record.class);
        self.notify(record, NoticeKind::StillOpen, words);
    }

    fn update_score(&self, record: &mut Incident) {
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

    fn take_if(&mut self, wanted: impl Fn(&Phase) -> bool) -> Option<Open> {
        let service = self
            .open
            .iter()
            .find(|(_, open)| wanted(&open.phase))
            .map(|(service, _)| service.clone());
        service.and_then(|service| self.open.remove(&service))
    }
}

/// What a person is asked to approve now.
pub(super) fn plan(
    now: Now,
    record: &Incident,
    action: ActionKind,
    seen: &Observed,
    policy: &str,
    node: &str,
) -> Plan {
    let made = now.when();
    let ttl_ms = u64::try_from(seen.policy.approvals(action).ttl.as_millis()).unwrap_or(u64::MAX);
    Plan {
        node: node.to_owned(),
        incident: record.id,
        service: record.service.clone(),
        action,
        class: record.class,
        session: seen.session_of(action),
        policy: policy.to_owned(),
        made,
        expires: When {
            monotonic_ms: made.monotonic_ms.saturating_add(ttl_ms),
            unix_ms: made.unix_ms.saturating_add(ttl_ms),
        },
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
const RECORD_RETRY: Duration = Duration::from_secs(10);
