//! What must hold, kept apart from the machine: it knows what was told, what was asked for and the true time, and nothing of how the
//! machine decides.

use std::collections::{BTreeMap, BTreeSet};

use crate::fleet::FleetOracle;
use theriac_heal::breaker::{FAILURES_MAX, FORGOTTEN_AFTER, OPEN_FOR};
use theriac_heal::policy::{Autonomy, HealPolicy, RiskClass};
use theriac_heal::standing::{Demotion, Standing};
use theriac_heal::types::{
    ActionKind, FaultClass, Incident, IncidentId, Intent, IntentId, Outcome, SessionId, Verdict, When,
};

/// What people said of one plan.
#[derive(Debug, Clone)]
pub(crate) struct Granted {
    incident: IncidentId,
    action: ActionKind,
    class: FaultClass,
    session: Option<SessionId>,
    expires: When,
    need: usize,
    signed: bool,
    by: BTreeSet<usize>,
    unsigned: bool,
}

/// What survives a death of the node, as far as it was stored.
#[derive(Debug, Clone, Default)]
pub(crate) struct Lasting {
    /// Harm that was done, by intent.
    harms: BTreeMap<IntentId, (String, RiskClass)>,
    /// All that ever was, lifted or not.
    known: BTreeSet<IntentId>,
    /// Failures in a row that were reported in time, with the true time of the last.
    failures: BTreeMap<(String, ActionKind), (u32, u64)>,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Oracle {
    pub(crate) lasting: Lasting,
    /// Approvals of plans by their digest; of this life of the node.
    granted: BTreeMap<String, Granted>,
    /// Incidents of which a person who has them said that the next action is to be done.
    spoken: BTreeSet<IncidentId>,
    /// Effects that do not renew the process, for ever.
    beside: BTreeSet<(IncidentId, ActionKind)>,
    /// The fleet.
    pub(crate) fleet: FleetOracle,
    /// Reached, so that a test can ask whether anything was tested.
    pub(crate) reached: BTreeMap<&'static str, usize>,
}

impl Oracle {
    /// A person approves what stands at this moment.
    pub(crate) fn approved(
        &mut self,
        policy: &HealPolicy,
        open: &Incident,
        hash: &str,
        by: Option<usize>,
        now_ms: u64,
    ) {
        let Some(plan) = open.plan.as_ref().filter(|plan| plan.hash() == hash) else {
            return;
        };
        if plan.expires.monotonic_ms <= now_ms {
            return;
        }
        let asked = policy.approvals(plan.action);
        let granted = self.granted.entry(hash.to_owned()).or_insert_with(|| Granted {
            incident: plan.incident,
            action: plan.action,
            class: plan.class,
            session: plan.session,
            expires: plan.expires,
            need: asked.need as usize,
            signed: asked.signed,
            by: BTreeSet::new(),
            unsigned: false,
        });
        granted.by.extend(by);
        granted.unsigned |= by.is_none();
    }

    pub(crate) fn spoke(&mut self, incident: IncidentId) {
        self.spoken.insert(incident);
    }

    /// The node died: approvals are given anew.
    pub(crate) fn died(&mut self, lasting: Lasting) {
        self.granted.clear();
        self.spoken.clear();
        self.fleet.died();
        self.lasting = lasting;
    }

    /// An intent is asked for.
    pub(crate) fn decided(&mut self, policy: &HealPolicy, intent: &Intent, now_ms: u64) {
        let class = policy.class_of(intent.action);
        assert!(
            written(policy, intent.action) != Autonomy::Observe,
            "an effect of a node that only observes: {intent:?}"
        );
        let called = match intent.action {
            ActionKind::Hook => policy.hook_for.contains(&intent.class),
            ActionKind::Webhook => policy.webhook_for.contains(&intent.class),
            ActionKind::RelieveSpace => intent.class == FaultClass::DiskFull,
            action => policy.configured_for(intent.class).contains(&action),
        };
        assert!(
            !policy.inhibit.contains(&intent.class) || called,
            "an action that its class inhibits: {intent:?}"
        );
        let live = self.is_live(intent, now_ms);
        let spoken = self.spoken.contains(&intent.incident) && !policy.approvals(intent.action).signed;
        self.fleet.decided(policy, intent, live || spoken, now_ms);
        let demoted = self.demotions(&intent.service).iter().any(|of| of.covers(class));
        let alone = written(policy, intent.action) == Autonomy::Act
            && !demoted
            // Without a file `restore_autonomy` may be a standing approval of restores, where it was written.
            && !(class >= RiskClass::R3
                && (policy.rules.is_some() || intent.action != ActionKind::RestoreAndStart));
        if alone {
            // What a person said of the next action is used up by it, whether it was needed or not.
            self.spoken.remove(&intent.incident);
            return;
        }
        // A word that names no plan is for nothing of R3 or above.
        let word = self.spoken.remove(&intent.incident)
            && !policy.approvals(intent.action).signed
            && class < RiskClass::R3;
        assert!(
            live || word,
            "done without a live approval of it: {intent:?}, {:?}",
            self.granted
        );
        *self.reached.entry("approved").or_default() += 1;
        if policy.rules.is_none() && class >= RiskClass::R3 {
            *self.reached.entry("R3 approved").or_default() += 1;
        }
        if policy.approvals(intent.action).signed {
            *self.reached.entry("signed").or_default() += 1;
        }
        if demoted {
            *self.reached.entry("demoted and approved").or_default() += 1;
        }
    }

    /// Whether enough people have approved exactly this.
    fn is_live(&self, intent: &Intent, now_ms: u64) -> bool {
        self.granted.values().any(|plan| {
            plan.incident == intent.incident
                && plan.action == intent.action
                && plan.class == intent.class
                && plan.session == intent.session
                && plan.expires.monotonic_ms >= now_ms
                && if plan.signed {
                    plan.by.len() >= plan.need
                } else {
                    plan.unsigned || !plan.by.is_empty()
                }
        })
    }

    /// An effect begins.
    pub(crate) fn executes(&mut self, intent: &Intent, true_ms: u64) {
        assert!(
            intent.action.renews_process() || self.beside.insert((intent.incident, intent.action)),
            "what cannot be looked up was done twice in an incident: {intent:?}"
        );
        let key = (intent.service.clone(), intent.action);
        if let Some((failures, last)) = self.lasting.failures.get(&key)
            && *failures >= FAILURES_MAX
        {
            let open_for = u64::try_from(OPEN_FOR.as_millis()).unwrap_or(u64::MAX);
            assert!(
                true_ms.saturating_sub(*last) >= open_for,
                "through an open breaker after {failures} failures: {intent:?}"
            );
            *self.reached.entry("half-open").or_default() += 1;
        }
    }

    /// An executor reported while its incident waited for it.
    pub(crate) fn reported(&mut self, intent: &Intent, failed: Option<bool>, true_ms: u64) {
        let key = (intent.service.clone(), intent.action);
        match failed {
            Some(true) => {
                let (failures, last) = self.lasting.failures.entry(key).or_default();
                let forgotten = u64::try_from(FORGOTTEN_AFTER.as_millis()).unwrap_or(u64::MAX);
                if *failures < FAILURES_MAX && true_ms.saturating_sub(*last) > forgotten {
                    *failures = 0;
                }
                *failures += 1;
                *last = true_ms;
            }
            Some(false) => drop(self.lasting.failures.remove(&key)),
            None => {}
        }
    }

    /// Nobody was touched, so it may be done again.
    pub(crate) fn spared(&mut self, intent: &Intent) {
        self.beside.remove(&(intent.incident, intent.action));
        *self.reached.entry("spared").or_default() += 1;
    }

    /// An incident as it is told.
    pub(crate) fn sees(&mut self, policy: &HealPolicy, incident: &Incident) {
        for done in &incident.actions {
            let class = policy.class_of(done.intent.action);
            // Whether an interrupted action of that kind was done at all is not known.
            let unseen = done.outcome == Some(Outcome::Interrupted) && class <= RiskClass::R1;
            // An incident goes on telling of harm that was lifted.
            if done.verdict == Some(Verdict::Harm) && !unseen && self.lasting.known.insert(done.intent.id) {
                let of = (incident.service.clone(), class);
                self.lasting.harms.insert(done.intent.id, of);
            }
        }
    }

    pub(crate) fn reinstated(&mut self, lifted: &Standing) {
        self.lasting.harms.retain(|_, (service, class)| {
            *service != lifted.service || !lifted.demotions.iter().any(|of| of.covers(*class))
        });
        self.lasting
            .failures
            .retain(|(service, _), _| *service != lifted.service);
        *self.reached.entry("reinstated").or_default() += 1;
    }

    /// One harm of R2 or above, or two below.
    fn demotions(&self, service: &str) -> Vec<Demotion> {
        let of = || self.lasting.harms.values().filter(|(of, _)| of == service);
        let demotion = |class| Demotion {
            service: service.to_owned(),
            class,
            at: When::default(),
        };
        let above = of()
            .map(|(_, class)| *class)
            .filter(|class| *class > RiskClass::R1);
        let low = (of().filter(|(_, class)| *class <= RiskClass::R1).count() >= 2).then_some(RiskClass::R1);
        above.chain(low).map(demotion).collect()
    }
}

/// What the policy says of an action, before harm, evidence and people.
fn written(policy: &HealPolicy, action: ActionKind) -> Autonomy {
    match policy.rules.as_ref().map(|rules| rules.get(&action)) {
        Some(Some(rule)) => rule.autonomy,
        Some(None) => Autonomy::Observe,
        None if action == ActionKind::RestoreAndStart => policy.autonomy.min(policy.restore_autonomy),
        None => policy.autonomy,
    }
}
