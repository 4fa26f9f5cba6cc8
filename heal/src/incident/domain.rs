//! Failure domains: a service with everything that it calls, directly or through others.
//!
//! A caller is not blamed while what it calls is down, acted on, or not yet proved to serve again; then it is asked anew. In one domain one
//! action at a time is under way, from its decision until it is verified or its time is over; the others wait, and what is called goes first: a
//! caller whose effect is still being judged cannot be judged without it. Services that call each other in a ring take turns, and none is
//! excused by the others.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::diagnose::{Diagnosis, diagnose};
use super::people::plan;
use super::{IncidentMachine, Open, Output, Phase};
use crate::types::{ActionKind, FaultClass, Incident, IncidentState, Now};

/// What each service calls, also through others.
pub(super) fn called(depends_on: &BTreeMap<String, Vec<String>>) -> BTreeMap<String, BTreeSet<String>> {
    let of = |name: &String| {
        let mut found = BTreeSet::new();
        let mut next = vec![name];
        while let Some(name) = next.pop() {
            for called in depends_on.get(name).into_iter().flatten() {
                if found.insert(called.clone()) {
                    next.push(called);
                }
            }
        }
        (name.clone(), found)
    };
    depends_on.keys().map(of).collect()
}

impl Phase {
    /// From the decision until the effect is known, or its time is over.
    fn is_in_flight(&self) -> bool {
        matches!(
            self,
            Self::Recording { .. } | Self::Acting { .. } | Self::Verifying { .. } | Self::Reconciling { .. }
        )
    }
}

impl IncidentMachine {
    /// After anything happened: who is down for whom, and whose turn it is.
    pub(super) fn settle_domains(&mut self, now: Now) {
        self.look_at_dependencies(now);
        if self.release_queued(now) {
            self.look_at_dependencies(now);
        }
    }

    /// Notes of each service whether one that it calls is down. A service that is in trouble for another's sake is down itself, so it is
    /// looked again until nothing changes, at most once for every service.
    pub(super) fn look_at_dependencies(&mut self, now: Now) {
        for _ in 0..=self.services.len() {
            let changed: Vec<(String, Option<String>)> = self
                .depends_on
                .iter()
                .filter_map(|(name, called)| {
                    let down = called
                        .iter()
                        .find(|of| !self.calls(of, name) && self.is_down(of))
                        .cloned();
                    let seen = self.services.get(name)?;
                    (seen.dependency_down != down).then(|| (name.clone(), down))
                })
                .collect();
            if changed.is_empty() {
                return;
            }
            for (name, down) in changed {
                let Some(seen) = self.services.get_mut(&name) else {
                    continue;
                };
                if down.is_none() {
                    seen.ask_anew();
                }
                seen.dependency_down = down;
                self.evaluate(now, &name);
            }
        }
    }

    /// Whether those that call it are to wait for it: it does not serve, has to prove that it does, or is being acted on. What is left to a
    /// person, or watched, while it answers is no excuse: it may stay so for days.
    fn is_down(&self, name: &str) -> bool {
        let Some(seen) = self.services.get(name) else {
            return false;
        };
        let in_hand = |open: &Open| {
            open.phase.is_in_flight()
                || matches!(open.phase, Phase::Queued { .. })
                // Its clients wait behind a lock, whatever a probe of its own says. What the detector alone suspects is no excuse.
                || (!seen.answers() || seen.sessions.piled().is_some()) && !open.record.class.from_detector()
        };
        seen.is_down() || seen.is_starting() || self.open.get(name).is_some_and(in_hand)
    }

    /// Whether `caller` calls `name`, also through others.
    fn calls(&self, caller: &str, name: &str) -> bool {
        self.called
            .get(caller)
            .is_some_and(|called| called.contains(name))
    }

    fn share_a_domain(&self, a: &str, b: &str) -> bool {
        let both = |called: &BTreeSet<String>| called.contains(a) && called.contains(b);
        self.calls(a, b) || self.calls(b, a) || self.called.values().any(both)
    }

    /// Another service that an action on this one has to wait for: one of its domain that is acted on, or one that it calls and whose turn
    /// comes first.
    pub(super) fn in_the_way(&self, service: &str) -> Option<String> {
        let is_first = |other: &str| self.calls(service, other) && !self.calls(other, service);
        self.open
            .iter()
            .filter(|(other, _)| *other != service && self.share_a_domain(service, other))
            .find(|(other, open)| {
                open.phase.is_in_flight() || matches!(open.phase, Phase::Queued { .. }) && is_first(other)
            })
            .map(|(other, _)| other.clone())
    }

    /// Whether what was to be done to a service is not to begin now: another action has come in its way since, also one whose executor reported
    /// after its time, or what it calls is why it does not answer.
    pub(super) fn has_to_wait(&self, service: &str, diagnosis: Option<&Diagnosis>) -> bool {
        let excused = diagnosis.is_some_and(|found| found.class == FaultClass::DependencyDown);
        excused || self.in_the_way(service).is_some()
    }

    /// Keeps what is to be done until nothing is in its way.
    pub(super) fn queue(
        &mut self,
        now: Now,
        mut record: Incident,
        action: ActionKind,
        other: &str,
        approved: bool,
    ) {
        if approved
            && record.plan.is_none()
            && let Some(seen) = self.services.get(&record.service)
        {
            // The word of a person who has the incident is for this action, also when its turn comes.
            record.plan = Some(plan(now, &record, action, seen, &self.policy, &self.name));
        }
        record.note(
            now,
            format!("{action} waits: {other}, in the same failure domain, is acted on first"),
        );
        record.set_state(IncidentState::Open);
        self.outputs.push_back(Output::Updated(record.clone()));
        let first = self.services.get(&record.service).map_or(Duration::ZERO, |seen| {
            seen.policy
                .action_timeout
                .saturating_add(seen.policy.verify_window)
        });
        self.put(Open {
            record,
            phase: Phase::Queued {
                approved,
                remind_at: now.monotonic.saturating_add(first),
            },
        });
    }

    /// Decides anew about those whose turn has come, what is called before who calls it. Whether there were any.
    fn release_queued(&mut self, now: Now) -> bool {
        let mut any = false;
        for _ in 0..=self.services.len() {
            let mut queued: Vec<String> = self
                .open
                .iter()
                .filter(|(_, open)| matches!(open.phase, Phase::Queued { .. }))
                .map(|(service, _)| service.clone())
                .collect();
            queued.sort_by_key(|service| self.called.get(service).map_or(0, BTreeSet::len));
            for service in &queued {
                self.make_way(now, service);
            }
            let Some(service) = queued
                .into_iter()
                .find(|service| self.in_the_way(service).is_none())
            else {
                return any;
            };
            any = true;
            let Some(Open { mut record, phase }) = self.open.remove(&service) else {
                return any;
            };
            let approved = matches!(phase, Phase::Queued { approved: true, .. });
            let valid = record
                .plan
                .as_ref()
                .is_none_or(|plan| now.when().monotonic_ms <= plan.expires.monotonic_ms);
            if let Some(diagnosis) = self.services.get(&service).and_then(diagnose) {
                self.decide(now, record, diagnosis, approved && valid);
            } else {
                record.set_state(IncidentState::Open);
                self.put(Open {
                    record,
                    phase: Phase::Watching { undecided: true },
                });
            }
        }
        any
    }

    /// Ends the judging of actions that cannot be judged, or need not be, while `service` is in trouble: those on services that call it, and
    /// those that wait for the detector's word alone while a process is gone or does not answer.
    fn make_way(&mut self, now: Now, service: &str) {
        let Some(class) = self.open.get(service).map(|open| open.record.class) else {
            return;
        };
        let gives_way = |other: &str, open: &Open| {
            let calls = self.calls(other, service) && !self.calls(service, other);
            // One that has yet to serve goes on being judged: what the other one needs is nothing to be done to it.
            let serves = self
                .services
                .get(other)
                .is_some_and(|seen| seen.answers() && (seen.served || !seen.probed));
            let suspected = open.record.class.from_detector() && !class.from_detector() && serves;
            matches!(open.phase, Phase::Verifying { .. })
                && self.share_a_domain(other, service)
                && (calls || suspected)
        };
        let giving: Vec<String> = self
            .open
            .iter()
            .filter(|(other, open)| *other != service && gives_way(other, open))
            .map(|(other, _)| other.clone())
            .collect();
        for other in giving {
            if let Some(open) = self.open.remove(&other) {
                let reason = format!("{service}, in the same failure domain, needs an action first");
                let need = Diagnosis {
                    class: if self.calls(&other, service) {
                        FaultClass::DependencyDown
                    } else {
                        class
                    },
                    reason,
                    certainty: 1.0,
                    presses: true,
                };
                self.give_way(now, open.record, need);
            }
        }
    }
}
