//! From a diagnosis to a decision. Doing nothing is always a candidate.

use std::collections::BTreeSet;
use std::time::Duration;

use super::diagnose::Diagnosis;
use super::observe::Observed;
use crate::breaker::Breakers;
use crate::budget::{Charge, Ledger};
use crate::evidence::{Counts, Evidence};
use crate::policy::evaluate::{Because, Facts, Ruling, evaluate};
use crate::policy::fleet::{FleetFacts, held_until_ms};
use crate::policy::{HealPolicy, NodeBudget, RiskClass};
use crate::standing::Demotion;
use crate::types::{ActionKind, ActionRecord, Alternative, FaultClass, Incident, Outcome, Plan};

/// What to do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Decision {
    /// Record the intent.
    Act(ActionKind),
    /// The action is right and has to wait.
    Wait { action: ActionKind, until: Duration },
    /// A person has to approve it.
    Recommend(ActionKind),
    /// Autonomy `observe`: only say what would be done.
    WouldAct(ActionKind),
    /// The action is right, and the fleet holds it back.
    Held {
        action: ActionKind,
        reason: String,
        until: Duration,
    },
    /// Nothing is begun at present.
    Hold(String),
    /// Nothing is begun while nothing presses.
    LetBe(String),
    /// Nothing is left to do here.
    HandOver(String),
    /// A person's, unless the breaker lets an attempt through before.
    Broken { reason: String, until: Duration },
}

/// What a decision rests on.
#[derive(Debug)]
pub(super) struct Circumstances<'a> {
    pub(super) seen: &'a Observed,
    pub(super) ledger: &'a Ledger,
    pub(super) node: NodeBudget,
    /// The stop switch is on.
    pub(super) halted: bool,
    /// Executors that failed last time.
    pub(super) breakers: &'a Breakers,
    /// Classes of actions that are only recommended for this service, since one of them harmed it.
    pub(super) demoted: &'a [Demotion],
    /// Restarts within the window that were verified as healed for this class of trouble.
    pub(super) healed_before: u32,
    /// What is known of the fleet, and since when it holds this incident.
    pub(super) fleet: FleetFacts,
    /// What came of earlier decisions.
    pub(super) evidence: &'a [Evidence],
    /// A person approved the action for this incident.
    pub(super) approved: bool,
    pub(super) now: Duration,
}

/// A decision with everything that was considered.
#[derive(Debug)]
pub(super) struct Decided {
    pub(super) decision: Decision,
    pub(super) alternatives: Vec<Alternative>,
    /// What the policy was asked and said, in this order; the last one is of what is done. Empty when there was no action to ask about.
    pub(super) ruled: Vec<(Facts, Ruling)>,
}

/// Decides, and says of every action why or why not.
pub(super) fn decide(incident: &Incident, diagnosis: &Diagnosis, with: &Circumstances<'_>) -> Decided {
    let class = diagnosis.class;
    let policy = &with.seen.policy;
    let whole = ladder(class, with.seen);
    let mut alternatives: Vec<Alternative> = ActionKind::ALL
        .into_iter()
        .filter(|action| !whole.contains(action) && told(*action, class))
        .map(|action| not(action, format!("is not on the ladder of {class}")))
        .collect();
    let rungs = listed(&whole, policy, &mut alternatives);
    let mut ruled = Vec::new();
    let decision = pick(incident, diagnosis, with, &rungs, &mut alternatives, &mut ruled);
    let nothing = match &decision {
        Decision::HandOver(reason)
        | Decision::Hold(reason)
        | Decision::LetBe(reason)
        | Decision::Held { reason, .. }
        | Decision::Broken { reason, .. } => Alternative {
            action: None,
            chosen: true,
            reason: reason.clone(),
        },
        Decision::Act(_) | Decision::Wait { .. } => Alternative {
            action: None,
            chosen: false,
            reason: "the symptom would stay".to_owned(),
        },
        Decision::Recommend(_) => Alternative {
            action: None,
            chosen: true,
            reason: "the policy asks for a person's approval".to_owned(),
        },
        Decision::WouldAct(_) => Alternative {
            action: None,
            chosen: true,
            reason: "autonomy is observe".to_owned(),
        },
    };
    alternatives.push(nothing);
    Decided {
        decision,
        alternatives,
        ruled,
    }
}

fn pick(
    incident: &Incident,
    diagnosis: &Diagnosis,
    with: &Circumstances<'_>,
    rungs: &[ActionKind],
    alternatives: &mut Vec<Alternative>,
    ruled: &mut Vec<(Facts, Ruling)>,
) -> Decision {
    let class = diagnosis.class;
    let policy = &with.seen.policy;
    let hand_over = |reason: String| Decision::HandOver(reason);
    if with.halted {
        return Decision::Hold("the stop switch is on".to_owned());
    }
    if class == FaultClass::DependencyDown {
        // Its own incident is the dependency's; when that one serves again, this one is looked at anew.
        let reason = format!("nothing is done while that lasts: {}", diagnosis.reason);
        alternatives.push(not(ActionKind::Restart, format!("{class} inhibits it")));
        return Decision::Hold(reason);
    }
    if policy.inhibit.contains(&class) && rungs.iter().all(|action| policy.inhibits(class, *action)) {
        alternatives.extend(distinct(rungs).map(|action| not(action, format!("{class} inhibits it"))));
        return hand_over(format!("{class} inhibits every action: {}", diagnosis.reason));
    }
    // A person may want it all the same, and is asked again with the plan.
    if class == FaultClass::Corruption && with.seen.answers() && !with.approved {
        let reason = "the service still answers, and restoring would lose what it wrote since the checkpoint";
        alternatives.push(not(ActionKind::RestoreAndStart, reason.to_owned()));
        return hand_over(format!("{}; {reason}", diagnosis.reason));
    }
    let of_sessions = matches!(class, FaultClass::ConnectionExhaustion | FaultClass::LockPileup);
    if of_sessions && rungs.is_empty() && !policy.session_actions {
        return hand_over(format!(
            "its sessions are not touched where [service.sessions] is not written, which only PostgreSQL takes: {}",
            diagnosis.reason
        ));
    }
    if class == FaultClass::LockPileup && rungs.is_empty() {
        return hand_over(format!("no action here may touch it: {}", diagnosis.reason));
    }
    let left = rungs_left(incident, rungs);
    if left.is_empty() {
        for action in distinct(rungs) {
            alternatives.push(not(
                action,
                "was tried in this incident and did not help".to_owned(),
            ));
        }
        let why = if rungs.is_empty() {
            "no action here would help"
        } else {
            "every allowed action was tried"
        };
        return hand_over(format!("{why}: {}", diagnosis.reason));
    }
    // A person may say so; a hook or bound that is configured for the class was meant for it.
    let may_renew = diagnosis.presses || with.approved;
    let (left, later): (Vec<_>, Vec<_>) = left
        .into_iter()
        .partition(|action| may_renew || !action.renews_process());
    alternatives.extend(
        later
            .into_iter()
            .map(|action| not(action, format!("nothing presses: {}", diagnosis.reason))),
    );
    if left.is_empty() {
        return Decision::LetBe(format!("nothing presses: {}", diagnosis.reason));
    }
    let mut broken: Option<(String, Duration)> = None;
    for action in left {
        let decision = rung(incident, diagnosis, with, action, alternatives, ruled);
        let Decision::Broken { reason, until } = decision else {
            return decision;
        };
        // What cannot do its part is passed over, as if it were not there.
        let (_, earliest) = broken.get_or_insert((reason, until));
        *earliest = until.min(*earliest);
    }
    broken.map_or_else(
        || hand_over(diagnosis.reason.clone()),
        |(reason, until)| Decision::Broken { reason, until },
    )
}

/// What is to become of one rung.
fn rung(
    incident: &Incident,
    diagnosis: &Diagnosis,
    with: &Circumstances<'_>,
    action: ActionKind,
    alternatives: &mut Vec<Alternative>,
    ruled: &mut Vec<(Facts, Ruling)>,
) -> Decision {
    let policy = &with.seen.policy;
    let hand_over = |reason: String| Decision::HandOver(reason);
    if action == ActionKind::TerminateBlocker && holds_it_next(incident, with.seen) {
        let reason = "the session whose statement was cancelled has let go, and who holds the lock next is not to blame";
        alternatives.push(not(action, reason.to_owned()));
        return hand_over(format!("{reason}: {}", diagnosis.reason));
    }
    let facts = with.facts(incident, diagnosis, action);
    let ruling = evaluate(policy, with.node, &facts);
    let mut chosen = |chosen: bool, reason: String| {
        alternatives.push(Alternative {
            action: Some(action),
            chosen,
            reason,
        });
    };
    let decision = match &ruling {
        Ruling::Halted => Decision::Hold("the stop switch is on".to_owned()),
        Ruling::Refuse {
            because: because @ Because::BreakerOpen { until_ms, .. },
        } => {
            let until = Duration::from_millis(*until_ms);
            let left = until.saturating_sub(with.now).as_secs_f64();
            let reason = format!("{because}; one attempt is let through in {left:.0} s");
            chosen(false, reason.clone());
            Decision::Broken {
                reason: format!("{action} is not done: {reason}"),
                until,
            }
        }
        Ruling::Refuse { because } => {
            let reason = match with.frees_in(because, &facts) {
                Some(left) => format!("{because}; another one is allowed in {}", in_words(left)),
                None => because.to_string(),
            };
            chosen(false, reason.clone());
            Decision::HandOver(format!("{action} is not done: {reason}"))
        }
        Ruling::Observe => {
            chosen(false, format!("would be done: {}", diagnosis.reason));
            Decision::WouldAct(action)
        }
        Ruling::Held { by, until_ms } => {
            let reason = by.to_string();
            chosen(false, reason.clone());
            Decision::Held {
                action,
                reason,
                until: Duration::from_millis(*until_ms),
            }
        }
        Ruling::HeldTooLong { by } => {
            chosen(
                false,
                format!("is recommended, since it was not done for so long: {by}"),
            );
            Decision::Recommend(action)
        }
        Ruling::NeedApproval => {
            chosen(false, format!("is recommended: {}", diagnosis.reason));
            Decision::Recommend(action)
        }
        Ruling::Wait { until_ms } => {
            let until = Duration::from_millis(*until_ms);
            let left = until.saturating_sub(with.now).as_secs_f64();
            chosen(
                true,
                format!("{}; it cools down for another {left:.1} s", diagnosis.reason),
            );
            Decision::Wait { action, until }
        }
        Ruling::Act => {
            chosen(true, diagnosis.reason.clone());
            Decision::Act(action)
        }
    };
    ruled.push((facts, ruling));
    decision
}

/// To the second, upwards.
fn in_words(span: Duration) -> String {
    humantime::format_duration(Duration::from_secs(span.as_secs() + 1)).to_string()
}

impl Circumstances<'_> {
    /// How long a spent budget stays spent.
    fn frees_in(&self, because: &Because, facts: &Facts) -> Option<Duration> {
        let (max, window_ms) = match because {
            Because::ActionSpent { max, window_ms }
            | Because::ServiceSpent { max, window_ms }
            | Because::NodeSpent { max, window_ms } => (*max, *window_ms),
            _ => return None,
        };
        let (service, action) = (facts.service.as_str(), facts.action);
        let counts = |charge: &Charge| match because {
            Because::NodeSpent { .. } => true,
            Because::ServiceSpent { .. } => charge.service == service,
            _ => charge.service == service && charge.action == action,
        };
        let window = Duration::from_millis(window_ms);
        Some(self.ledger.frees_in(self.now, window, max, counts))
    }

    fn facts(&self, incident: &Incident, diagnosis: &Diagnosis, action: ActionKind) -> Facts {
        let (of_service, of_node) =
            self.ledger
                .spent(&incident.service, &self.seen.policy, self.node, self.now);
        let named = incident.plan.is_some() || self.seen.policy.class_of(action) < RiskClass::R3;
        let covered = covers(incident.plan.as_ref(), diagnosis.class, action, self.seen);
        let approved = self.approved && named && covered;
        Facts {
            incident: incident.id.0,
            service: incident.service.clone(),
            action,
            class: diagnosis.class,
            certainty: thousandths(diagnosis.certainty),
            restart_helps: diagnosis.class.restart_helps(),
            risk: self.seen.risk.map(thousandths),
            answers: self.seen.answers(),
            actions_of_service: of_service,
            actions_of_node: of_node,
            charges: self.ledger.charges().to_vec(),
            healed_before: self.healed_before,
            demoted: self
                .demoted
                .iter()
                .any(|of| of.service == incident.service && of.covers(self.seen.policy.class_of(action))),
            halted: self.halted,
            approved,
            approved_by: if approved {
                incident.approved_by.clone()
            } else {
                BTreeSet::new()
            },
            evidence: self
                .evidence
                .iter()
                .find(|of| of.service == incident.service && of.action == action)
                .map_or_else(Counts::default, |of| of.counts),
            breaker: self.breakers.tripped(&incident.service, action),
            fleet: self.fleet_facts(incident, action, approved),
            now_ms: u64::try_from(self.now.as_millis()).unwrap_or(u64::MAX),
        }
    }
}

impl Circumstances<'_> {
    /// What a ruling on this action rests on beside the node itself; `None` where the policy has no budgets of the fleet.
    fn fleet_facts(&self, incident: &Incident, action: ActionKind, approved: bool) -> Option<FleetFacts> {
        let policy = &self.seen.policy;
        let budget = policy.fleet?;
        let end = self.fleet.held_since_ms.map(|since| held_until_ms(budget, since));
        let made = incident.plan.as_ref().map(|plan| plan.made.monotonic_ms);
        Some(FleetFacts {
            slot_until_ms: self.fleet.slot_until_ms.filter(|_| policy.is_shared(action)),
            waived: approved && end.is_some_and(|end| made.is_some_and(|made| made >= end)),
            ..self.fleet
        })
    }
}

/// Whether what was approved is this: the plan's action for the plan's class on the plan's session. What a person has, has no plan, and
/// their word is for whatever comes next, below R3: from there on nobody can have meant what they were not shown.
fn covers(plan: Option<&Plan>, class: FaultClass, action: ActionKind, seen: &Observed) -> bool {
    plan.is_none_or(|plan| {
        plan.action == action && plan.class == class && plan.session == seen.session_of(action)
    })
}

/// Whether the root of the pile-up is another session than the one whose statement was cancelled in this incident.
fn holds_it_next(incident: &Incident, seen: &Observed) -> bool {
    let cancelled = incident
        .actions
        .iter()
        .filter(|done| done.intent.action == ActionKind::CancelQuery && done.acted.is_some())
        .filter(|done| !matches!(done.outcome, Some(Outcome::Spared { .. })))
        .filter_map(|done| done.intent.session)
        .next_back();
    cancelled.is_some_and(|cancelled| seen.session_of(ActionKind::TerminateBlocker) != Some(cancelled))
}

/// So that the number that is written down is, when read again, the very one that was judged by.
fn thousandths(share: f64) -> f64 {
    (share * 1_000.0).round() / 1_000.0
}

/// Actions for a class, cheapest first. An action may stand on several rungs.
pub(super) fn ladder(class: FaultClass, seen: &Observed) -> Vec<ActionKind> {
    // What runs there is somebody else's.
    if seen.occupied {
        return Vec::new();
    }
    let policy = &seen.policy;
    let webhook = policy.webhook_for.contains(&class).then_some(ActionKind::Webhook);
    let hook = policy.hook_for.contains(&class).then_some(ActionKind::Hook);
    webhook
        .into_iter()
        .chain(hook)
        .chain(policy.configured_for(class).iter().copied())
        .chain(own_ladder(class, seen))
        .collect()
}

fn own_ladder(class: FaultClass, seen: &Observed) -> Vec<ActionKind> {
    match class {
        FaultClass::Crash => vec![ActionKind::Start; seen.policy.start_attempts as usize],
        FaultClass::ConnectionExhaustion | FaultClass::LockPileup if !seen.policy.session_actions => {
            Vec::new()
        }
        FaultClass::ConnectionExhaustion => vec![ActionKind::EndIdleSessions, ActionKind::Reload],
        FaultClass::LockPileup => match seen.sessions.piled() {
            Some(pile) if !pile.touchable => Vec::new(),
            // What runs no statement has none to cancel.
            Some(pile) if !pile.running => vec![ActionKind::TerminateBlocker],
            _ => vec![ActionKind::CancelQuery, ActionKind::TerminateBlocker],
        },
        FaultClass::Hang | FaultClass::MemoryLeak | FaultClass::CpuContention | FaultClass::FdExhaustion => {
            vec![ActionKind::Restart]
        }
        FaultClass::Corruption => vec![ActionKind::RestoreAndStart],
        FaultClass::DiskFull if seen.disk_full.is_some() && seen.relievable > 0 => {
            vec![ActionKind::RelieveSpace]
        }
        FaultClass::DiskFull
        | FaultClass::ReadOnlyFs
        | FaultClass::NetworkLoss
        | FaultClass::DiskSlow
        | FaultClass::CpuStarvation
        | FaultClass::Overload
        | FaultClass::DependencyDown
        | FaultClass::Unknown => Vec::new(),
    }
}

/// Actions of the other kind are left out of what people read: a service without sessions has none to cancel.
fn told(action: ActionKind, class: FaultClass) -> bool {
    match action {
        ActionKind::RelieveSpace => class == FaultClass::DiskFull,
        ActionKind::Hook
        | ActionKind::Webhook
        | ActionKind::ThrottleCpu
        | ActionKind::LimitMemory
        | ActionKind::Freeze
        | ActionKind::Drain
        | ActionKind::RestartUnit
        | ActionKind::ReloadUnit
        | ActionKind::ResetFailedUnit
        | ActionKind::RolloutRestart
        | ActionKind::ScaleUp
        | ActionKind::RolloutUndo => false,
        _ if action.renews_process() => true,
        _ => matches!(class, FaultClass::ConnectionExhaustion | FaultClass::LockPileup),
    }
}

/// Rungs that the policy lists, the others told as alternatives. Where it lists none of them they all stay, so that it says so itself.
fn listed(whole: &[ActionKind], policy: &HealPolicy, alternatives: &mut Vec<Alternative>) -> Vec<ActionKind> {
    let Some(rules) = &policy.rules else {
        return whole.to_vec();
    };
    let (listed, left): (Vec<ActionKind>, Vec<ActionKind>) =
        whole.iter().partition(|action| rules.contains_key(action));
    if listed.is_empty() {
        return whole.to_vec();
    }
    let why = "the policy does not list it for this service";
    alternatives.extend(distinct(&left).map(|action| not(action, why.to_owned())));
    listed
}

/// Rungs that this incident has not used up, in order. An action that never took place does not use one up. What became of a start is found
/// out by looking at the process; what became of anything else cannot be, so its durable intent uses up the rung.
fn rungs_left(incident: &Incident, rungs: &[ActionKind]) -> Vec<ActionKind> {
    let unused = |action: &ActionKind| {
        let allowed = rungs.iter().filter(|rung| *rung == action).count();
        let tried = incident
            .actions
            .iter()
            .filter(|done| done.intent.action == *action)
            .filter(|done| used_up(done) && !(done.before_retry && action.renews_process()))
            .count();
        tried < allowed
    };
    distinct(rungs).filter(unused).collect()
}

fn used_up(done: &ActionRecord) -> bool {
    match done.outcome {
        Some(Outcome::NotNeeded | Outcome::Spared { .. }) => false,
        Some(Outcome::Interrupted) => !done.intent.action.renews_process(),
        _ => true,
    }
}

fn distinct(rungs: &[ActionKind]) -> impl Iterator<Item = ActionKind> + '_ {
    rungs
        .iter()
        .enumerate()
        .filter(|(at, action)| !rungs[..*at].contains(action))
        .map(|(_, action)| *action)
}

fn not(action: ActionKind, reason: String) -> Alternative {
    Alternative {
        action: Some(action),
        chosen: false,
        reason,
    }
}
