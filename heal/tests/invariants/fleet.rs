//! What must hold of the fleet's brake and slots, whoever speaks for the fleet.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use theriac_heal::policy::{HealPolicy, RiskClass};
use theriac_heal::types::{ActionKind, Incident, IncidentId, IncidentState, Intent, IntentId, Outcome};

use crate::op::HOLD_MAX;

/// Told by the aggregator, with the moment of the node's monotonic clock; of this life of the node.
#[derive(Debug, Clone, Default)]
pub(crate) struct FleetOracle {
    /// The latest report.
    report: Option<(u32, u32, u32, u64)>,
    /// Ends of the slots that were lent while the machine wanted one.
    slots: BTreeSet<u64>,
    /// Since when each incident is held without a break, by brake, slot or a person who was asked because of them. A decision is no break, its effect is:
    /// what is called off between them was held all the time.
    held: BTreeMap<IncidentId, u64>,
    /// Intents under a person's word.
    approved: BTreeSet<IntentId>,
    pub(crate) reached: BTreeMap<&'static str, usize>,
}

impl FleetOracle {
    /// What cannot be says nothing; the report before it stands until it is old.
    pub(crate) fn told(&mut self, (nodes, unhealthy, acting): (u32, u32, u32), now_ms: u64) {
        if nodes >= 1 && nodes >= unhealthy && nodes >= acting {
            self.report = Some((nodes, unhealthy, acting, now_ms));
        }
    }

    pub(crate) fn lent(&mut self, until_ms: u64) {
        self.slots.insert(until_ms);
    }

    /// The node died: what was told is forgotten.
    pub(crate) fn died(&mut self) {
        let reached = std::mem::take(&mut self.reached);
        *self = Self {
            reached,
            ..Self::default()
        };
    }

    /// Whether many are sick, or enough act, by a report that is fresh. In hundredths that are not rounded.
    fn brakes(&self, now_ms: u64) -> bool {
        let Some((nodes, unhealthy, acting, at_ms)) = self.report else {
            return false;
        };
        let (all, sick, busy) = (f64::from(nodes), f64::from(unhealthy), f64::from(acting));
        let over = unhealthy > 1 && sick / all > 0.4;
        let full = busy >= (0.2 * all + 1e-9).floor().max(1.0);
        now_ms.saturating_sub(at_ms) < 30_000 && (over || full)
    }

    /// An intent is asked for; `approved`: under a live approval of exactly this, or a person's word on what they have.
    pub(crate) fn decided(&mut self, policy: &HealPolicy, intent: &Intent, approved: bool, now_ms: u64) {
        if policy.fleet.is_none() {
            return;
        }
        let since = self.held.get(&intent.incident).copied();
        if approved {
            self.approved.insert(intent.id);
        } else {
            self.approved.remove(&intent.id);
        }
        let high = policy.class_of(intent.action) >= RiskClass::R2 && intent.action != ActionKind::Start;
        let brakes = self.brakes(now_ms);
        assert!(
            !brakes || !high || approved,
            "through the brake {:?}: {intent:?}",
            self.report
        );
        if brakes {
            let what = if high {
                "brake overruled"
            } else {
                "not for the brake"
            };
            *self.reached.entry(what).or_default() += 1;
        } else if since.is_some() {
            *self.reached.entry("let go").or_default() += 1;
        }
        self.slot_outlasts(policy, intent, approved, since, now_ms);
    }

    /// An effect begins.
    pub(crate) fn executes(&mut self, policy: &HealPolicy, intent: &Intent, now_ms: u64) {
        let approved = self.approved.contains(&intent.id);
        let since = self.held.remove(&intent.incident);
        // Whoever approved: only who was asked after the longest wait needs none.
        self.slot_outlasts(policy, intent, approved, since, now_ms);
    }

    fn slot_outlasts(
        &mut self,
        policy: &HealPolicy,
        intent: &Intent,
        approved: bool,
        since: Option<u64>,
        now_ms: u64,
    ) {
        if !policy.is_shared(intent.action) {
            return;
        }
        let needed = now_ms + millis(policy.action_timeout);
        let lent = self.slots.iter().any(|until| *until >= needed);
        let waited = since.is_some_and(|since| now_ms.saturating_sub(since) >= millis(HOLD_MAX));
        assert!(
            lent || (approved && waited),
            "without a slot: {intent:?}, {:?}",
            self.slots
        );
        *self
            .reached
            .entry(if lent { "slot" } else { "slot waived" })
            .or_default() += 1;
    }

    /// An incident as it is told.
    pub(crate) fn sees(&mut self, incident: &Incident, now_ms: u64) {
        let last = incident.actions.last();
        let called_off =
            last.is_some_and(|done| done.acted.is_none() && done.outcome == Some(Outcome::NotNeeded));
        if incident.state == IncidentState::Held && called_off {
            *self.reached.entry("called off").or_default() += 1;
        }
        match incident.state {
            IncidentState::Held => drop(self.held.entry(incident.id).or_insert(now_ms)),
            // Asked for a restore, which is never held back: what was held is not wanted meanwhile, and waits anew.
            IncidentState::AwaitingApproval
                if incident
                    .plan
                    .as_ref()
                    .is_some_and(|plan| plan.action == ActionKind::RestoreAndStart) =>
            {
                self.held.remove(&incident.id);
            }
            IncidentState::AwaitingApproval | IncidentState::Acting => {}
            _ => drop(self.held.remove(&incident.id)),
        }
    }

    /// Time has passed and was looked at: nothing is held for longer than it may be.
    pub(crate) fn bounded<'a>(&mut self, open: impl Iterator<Item = &'a Incident>, now_ms: u64) {
        for incident in open {
            if incident.state == IncidentState::Held {
                let since = self.held.get(&incident.id).copied().unwrap_or(now_ms);
                let held = now_ms.saturating_sub(since);
                assert!(held <= millis(HOLD_MAX), "held for {held} ms: {incident:?}");
            } else if incident.state == IncidentState::AwaitingApproval
                && self.held.contains_key(&incident.id)
            {
                *self.reached.entry("a person was asked").or_default() += 1;
            }
        }
    }
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}
