//! What the machine knows of the fleet, whom that holds back, and the slot that the node has.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::act::finish;
use super::diagnose::{Diagnosis, diagnose};
use super::{IncidentMachine, Open, Output, Phase};
use crate::policy::evaluate::{Facts, Ruling};
use crate::policy::fleet::{FleetFacts, FleetHeard, FleetSeen, Hold, hold, slot_needed};
use crate::types::{ActionKind, ActionRecord, Incident, IncidentState, IntentId, Now, Outcome};

/// Time that a slot which is asked for may be on its way.
const ANSWER_ROOM: Duration = Duration::from_secs(5);

/// Everything that is known of the fleet.
#[derive(Debug, Clone, Default)]
pub(super) struct Fleet {
    heard: Option<FleetHeard>,
    /// When the latest report gets old, while that has not been looked at.
    lapses_at: Option<Duration>,
    /// The node's slot lasts until then.
    slot_until: Option<Duration>,
    /// What is held back, by service.
    pub(super) held: BTreeMap<String, Held>,
    /// Services whose action needs no slot, by the word of a person who was asked after the longest wait for one.
    without: BTreeSet<String>,
}

/// An incident that the fleet holds back.
#[derive(Debug, Clone, Copy)]
pub(super) struct Held {
    action: ActionKind,
    since_ms: u64,
}

/// How the node's services are, as the fleet is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Health {
    /// Services with an open incident that presses.
    pub unhealthy: usize,
    /// Services on which an action is under way or being verified.
    pub acting: usize,
}

impl Fleet {
    /// What a decision about this service's incident may rest on.
    pub(super) fn facts(&self, service: &str) -> FleetFacts {
        FleetFacts {
            heard: self.heard,
            slot_until_ms: self.slot_until.map(millis),
            held_since_ms: self.held.get(service).map(|held| held.since_ms),
            waived: false,
        }
    }

    pub(super) fn lapses_at(&self) -> Option<Duration> {
        self.lapses_at.filter(|_| !self.held.is_empty())
    }
}

impl IncidentMachine {
    /// How the services are for which the policy has budgets of the fleet.
    pub fn health(&self) -> Health {
        let of_fleet = |service: &str| {
            let seen = self.services.get(service);
            seen.is_some_and(|seen| seen.policy.fleet.is_some())
        };
        let open = || {
            self.open
                .iter()
                .filter(|(service, _)| of_fleet(service))
                .map(|(_, open)| open)
        };
        Health {
            unhealthy: open().filter(|open| open.phase != Phase::LetBe).count(),
            acting: open().filter(|open| is_under_way(open)).count(),
        }
    }

    /// The latest report of the fleet, with when it came.
    pub fn fleet_heard(&self) -> Option<FleetHeard> {
        self.fleet.heard
    }

    /// Whether a slot of the fleet is wanted: one that lasts so long from now on, or only the one there is, while it lasts (zero).
    pub fn slot_wanted(&self) -> Option<Duration> {
        let now = Now {
            monotonic: self.latest,
            unix_ms: 0,
        };
        let waits = |service: &&String| {
            let by = self.hold_of(now, service);
            matches!(by, Some((Hold::NoSlot, _)))
        };
        let needs = self.fleet.held.keys().filter(waits);
        let longest = needs
            .filter_map(|name| Some(slot_needed(&self.services.get(name)?.policy)))
            .max()
            .map(|longest| longest.saturating_add(ANSWER_ROOM));
        longest.or_else(|| {
            let shares = |open: &Open| {
                let service = self.services.get(&open.record.service);
                let last = open.record.actions.last();
                last.zip(service)
                    .is_some_and(|(last, seen)| seen.policy.is_shared(last.intent.action))
            };
            let in_use = |open: &Open| is_under_way(open) && shares(open);
            self.open.values().any(in_use).then_some(Duration::ZERO)
        })
    }

    /// Until when the slot lasts that the machine counts on.
    pub fn slot(&self) -> Option<Duration> {
        self.fleet.slot_until
    }

    /// What cannot be says nothing, not even that the report before it is over: that one gets old by itself.
    pub(super) fn fleet_told(&mut self, now: Now, seen: FleetSeen) {
        if !seen.is_possible() {
            self.ignored += 1;
            return;
        }
        let ages = self.services.values().filter_map(|seen| seen.policy.fleet);
        let age = ages.map(|budget| budget.report_age).max();
        self.fleet.lapses_at = age.map(|age| now.monotonic.saturating_add(age));
        self.fleet.heard = Some(FleetHeard {
            seen,
            at_ms: now.when().monotonic_ms,
        });
        self.fleet_moved(now);
    }

    pub(super) fn slot_lent(&mut self, now: Now, until: Duration) {
        if self.slot_wanted().is_none() || until <= now.monotonic {
            self.ignored += 1;
            return;
        }
        self.fleet.slot_until = Some(until);
        self.fleet_moved(now);
    }

    /// A report that has got old holds nothing back.
    pub(super) fn fleet_fell_silent(&mut self, now: Now) {
        if self.fleet.lapses_at.is_some_and(|at| at <= now.monotonic) {
            self.fleet.lapses_at = None;
            self.fleet_moved(now);
        }
    }

    pub(super) fn drop_unwanted_slot(&mut self) {
        if self.fleet.slot_until.is_some() && self.slot_wanted().is_none() {
            self.fleet.slot_until = None;
        }
    }

    /// What holds a service's incident back now.
    pub(super) fn hold_of(&self, now: Now, service: &str) -> Option<(Hold, u64)> {
        let held = self.fleet.held.get(service)?;
        let approved = self
            .open
            .get(service)
            .is_some_and(|open| matches!(open.phase, Phase::CoolingDown { approved: true, .. }));
        let policy = &self.services.get(service)?.policy;
        let facts = self.fleet.facts(service);
        hold(policy, held.action, approved, facts, now.when().monotonic_ms)
    }

    /// By when the effect of an intent has to begin, on the monotonic clock of [`Now`]: within the time that the action has, after which a person is
    /// told, and so that the node's slot outlasts it where it needs one. `None`: it is not to begin any more.
    pub fn begin_by(&self, id: IntentId) -> Option<Duration> {
        let acts = |open: &&Open| matches!(open.phase, Phase::Acting { id: of, .. } if of == id);
        let open = self.open.values().find(acts)?;
        let deadline = open.phase.deadline()?;
        let policy = &self.services.get(&open.record.service)?.policy;
        let shared = policy.is_shared(open.record.actions.last()?.intent.action);
        if !shared || self.fleet.without.contains(&open.record.service) {
            return Some(deadline);
        }
        let latest = self.fleet.slot_until?.checked_sub(policy.action_timeout)?;
        Some(deadline.min(latest))
    }

    /// Notes since when an incident is held back, or that it is not.
    pub(super) fn note_hold(&mut self, now: Now, record: &mut Incident, ruled: Option<&(Facts, Ruling)>) {
        let by = match ruled {
            Some((facts, Ruling::Held { by, .. } | Ruling::HeldTooLong { by })) => Some((facts.action, by)),
            _ => None,
        };
        let waived = ruled.is_some_and(|(facts, _)| facts.fleet.is_some_and(|fleet| fleet.waived));
        if waived {
            self.fleet.without.insert(record.service.clone());
        } else {
            self.fleet.without.remove(&record.service);
        }
        let Some((action, by)) = by else {
            // What was decided may still be called off before it begins: until then it has not waited to the end.
            if !matches!(ruled, Some((_, Ruling::Act))) {
                self.fleet.held.remove(&record.service);
            }
            return;
        };
        let since_ms = now.when().monotonic_ms;
        let known = self.fleet.held.get_mut(&record.service);
        if let Some(held) = known {
            held.action = action;
        } else {
            record.note(now, format!("{action}: {by}"));
            self.fleet
                .held
                .insert(record.service.clone(), Held { action, since_ms });
        }
    }

    /// Whether an action that needs a slot has none that outlasts it any more: the host slept over it.
    pub(super) fn slot_is_over(&self, now: Now, record: &Incident) -> bool {
        let policy = self.services.get(&record.service).map(|seen| &seen.policy);
        let Some((policy, action)) = policy.zip(record.actions.last()) else {
            return false;
        };
        let needed = now.monotonic.saturating_add(policy.action_timeout);
        let lasts = self.fleet.slot_until.is_some_and(|until| until >= needed);
        policy.is_shared(action.intent.action) && !lasts && !self.fleet.without.contains(&record.service)
    }

    /// An action whose intent is durable too late for the slot that it needs: it is held anew, and since when stays. Nobody pays for it, a person's word
    /// is used up, and a repetition adds nothing to the incident.
    pub(super) fn slot_too_short(&mut self, now: Now, mut record: Incident, diagnosis: Diagnosis) {
        finish(&mut record, now, Outcome::NotNeeded, None);
        let called_off =
            |done: &&ActionRecord| done.acted.is_none() && done.outcome == Some(Outcome::NotNeeded);
        let times = record.actions.iter().filter(called_off).count();
        if let Some(last) = record.actions.last() {
            self.ledger.take_back(&record.service, last.intent.action);
        }
        if times > 1 {
            record.actions.pop();
        } else {
            let words = "the action was called off before it began: its slot does not outlast it any more";
            record.note(now, words.to_owned());
        }
        self.decide(now, record, diagnosis, false);
    }

    /// What an action waited for, a cool-down or the fleet, may be over: it is decided anew where there is still something to decide.
    pub(super) fn waited(&mut self, now: Now, mut record: Incident, approved: bool) {
        let Some(seen) = self.services.get(&record.service) else {
            return;
        };
        if let Some(diagnosis) = diagnose(seen) {
            let expires = record.plan.as_ref().map(|plan| plan.expires.monotonic_ms);
            let valid = expires.is_none_or(|expires| now.when().monotonic_ms <= expires);
            return self.decide(now, record, diagnosis, approved && valid);
        }
        if record.state == IncidentState::Held {
            // Nothing is to be done at present, so nothing is held back.
            self.fleet.held.remove(&record.service);
            record.set_state(IncidentState::Open);
            self.outputs.push_back(Output::Updated(record.clone()));
        }
        self.put(Open {
            record,
            phase: Phase::Watching { undecided: true },
        });
    }

    /// Decides anew on what nothing holds any more.
    fn fleet_moved(&mut self, now: Now) {
        let held = self.fleet.held.keys();
        let free = held.filter(|service| self.hold_of(now, service).is_none());
        let free: Vec<String> = free.cloned().collect();
        for service in free {
            match self.open.get_mut(&service) {
                Some(open) if matches!(open.phase, Phase::AwaitingApproval { .. }) => {
                    open.phase = Phase::CoolingDown {
                        until: now.monotonic,
                        approved: false,
                    };
                    self.timed_out(now, &service);
                }
                Some(open) if matches!(open.phase, Phase::CoolingDown { .. }) => {
                    self.timed_out(now, &service);
                }
                // It is decided already, or tried again when its record can be written.
                Some(_) => {}
                None => drop(self.fleet.held.remove(&service)),
            }
        }
    }
}

/// Also where its time is over, a person was told, and the hands are still at work.
fn is_under_way(open: &Open) -> bool {
    let last = open.record.actions.last();
    let begun = last.is_some_and(|action| action.acted.is_some() && action.outcome.is_none());
    begun
        || matches!(
            open.phase,
            Phase::Recording { .. }
                | Phase::Acting { .. }
                | Phase::Verifying { .. }
                | Phase::Reconciling { .. }
        )
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}
