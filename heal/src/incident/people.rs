//! What people are asked, and what they say: approved, declined, normal from now on.

use super::diagnose::diagnose;
use super::observe::Observed;
use super::{IncidentMachine, Open, Output, Phase};
use crate::evidence::Came;
use crate::types::{ActionKind, Incident, IncidentId, IncidentState, NoticeKind, Now, Plan, When};

impl IncidentMachine {
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
    pub(super) fn plan_again(&mut self, now: Now, mut record: Incident) {
        let Some(action) = record.plan.as_ref().map(|plan| plan.action) else {
            return self.put(Open {
                record,
                phase: Phase::Watching { undecided: true },
            });
        };
        record.note(now, "the plan expired; approvals of it count no more".to_owned());
        self.recommend(now, record, action);
    }

    pub(super) fn recommend(&mut self, now: Now, mut record: Incident, action: ActionKind) {
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
                self.hand_over(now, open.record, DECLINED.to_owned());
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

/// Why a person has an incident whose action somebody declined.
pub(super) const DECLINED: &str = "a person declined the action";
