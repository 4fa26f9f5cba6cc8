//! From a diagnosis to a decision. Doing nothing is always a candidate.

use std::time::Duration;

use super::diagnose::Diagnosis;
use super::observe::Observed;
use crate::budget::{Ledger, Refusal};
use crate::policy::{Autonomy, HealPolicy, NodeBudget};
use crate::types::{ActionKind, Alternative, FaultClass, Incident, Outcome};

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
    /// Nothing is begun at present.
    Hold(String),
    /// Nothing is left to do here.
    HandOver(String),
}

/// What a decision rests on.
#[derive(Debug)]
pub(super) struct Circumstances<'a> {
    pub(super) seen: &'a Observed,
    pub(super) ledger: &'a Ledger,
    pub(super) node: NodeBudget,
    /// The stop switch is on.
    pub(super) halted: bool,
    /// An earlier action harmed this service.
    pub(super) demoted: bool,
    /// Restarts within the window that were verified as healed for this class of trouble.
    pub(super) healed_before: u32,
    /// A person approved the action for this incident.
    pub(super) approved: bool,
    pub(super) now: Duration,
}

/// Decides, and says of every action why or why not.
pub(super) fn decide(
    incident: &Incident,
    diagnosis: &Diagnosis,
    with: &Circumstances<'_>,
) -> (Decision, Vec<Alternative>) {
    let class = diagnosis.class;
    let policy = &with.seen.policy;
    let rungs = ladder(class, policy);
    let mut alternatives: Vec<Alternative> = ActionKind::ALL
        .into_iter()
        .filter(|action| !rungs.contains(action))
        .map(|action| not(action, format!("is not on the ladder of {class}")))
        .collect();
    let decision = pick(incident, diagnosis, with, &rungs, &mut alternatives);
    let nothing = match &decision {
        Decision::HandOver(reason) | Decision::Hold(reason) => Alternative {
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
    (decision, alternatives)
}

fn pick(
    incident: &Incident,
    diagnosis: &Diagnosis,
    with: &Circumstances<'_>,
    rungs: &[ActionKind],
    alternatives: &mut Vec<Alternative>,
) -> Decision {
    let class = diagnosis.class;
    let policy = &with.seen.policy;
    let hand_over = |reason: String| Decision::HandOver(reason);
    if with.halted {
        return Decision::Hold("the stop switch is on".to_owned());
    }
    if policy.inhibit.contains(&class) {
        alternatives.extend(distinct(rungs).map(|action| not(action, format!("{class} inhibits it"))));
        return hand_over(format!("{class} inhibits every action: {}", diagnosis.reason));
    }
    if class == FaultClass::Corruption && with.seen.answers() {
        let reason = "the service still answers, and restoring would lose what it wrote since the checkpoint";
        alternatives.push(not(ActionKind::RestoreAndStart, reason.to_owned()));
        return hand_over(format!("{}; {reason}", diagnosis.reason));
    }
    let Some(action) = next_rung(incident, rungs) else {
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
    };
    if class.from_detector() && !with.approved && with.healed_before >= policy.anomaly_restarts {
        let reason = format!(
            "{class} came back after {} restarts within {} that seemed to heal it",
            with.healed_before,
            human(policy.window)
        );
        alternatives.push(not(action, reason.clone()));
        return hand_over(reason);
    }
    let mut chosen = |chosen: bool, reason: String| {
        alternatives.push(Alternative {
            action: Some(action),
            chosen,
            reason,
        });
    };
    let allowed = with
        .ledger
        .allows(&incident.service, action, policy, with.node, with.now);
    match &allowed {
        Err(Refusal::ServiceSpent { max, window }) => {
            let reason = format!("its budget of {max} actions in {} is spent", human(*window));
            chosen(false, reason.clone());
            return hand_over(format!("{action} is not done: {reason}"));
        }
        Err(Refusal::NodeSpent { max, window }) => {
            let reason = format!(
                "the node's budget of {max} actions in {} is spent",
                human(*window)
            );
            chosen(false, reason.clone());
            return hand_over(format!("{action} is not done: {reason}"));
        }
        Ok(()) | Err(Refusal::CoolingDown { .. }) => {}
    }
    match effective_autonomy(policy, action, with) {
        Autonomy::Observe => {
            chosen(false, format!("would be done: {}", diagnosis.reason));
            return Decision::WouldAct(action);
        }
        Autonomy::Recommend => {
            chosen(false, format!("is recommended: {}", diagnosis.reason));
            return Decision::Recommend(action);
        }
        Autonomy::Act => {}
    }
    if let Err(Refusal::CoolingDown { until }) = allowed {
        let left = until.saturating_sub(with.now).as_secs_f64();
        chosen(
            true,
            format!("{}; it cools down for another {left:.1} s", diagnosis.reason),
        );
        return Decision::Wait { action, until };
    }
    chosen(true, diagnosis.reason.clone());
    Decision::Act(action)
}

/// Actions for a class, cheapest first. An action may stand on several rungs.
pub(super) fn ladder(class: FaultClass, policy: &HealPolicy) -> Vec<ActionKind> {
    match class {
        FaultClass::Crash => vec![ActionKind::Start; policy.start_attempts as usize],
        FaultClass::Hang | FaultClass::MemoryLeak | FaultClass::CpuContention => vec![ActionKind::Restart],
        FaultClass::Corruption => vec![ActionKind::RestoreAndStart],
        FaultClass::DiskFull | FaultClass::Unknown => Vec::new(),
    }
}

/// The first rung that this incident has not used up. An action that never took place does not use one up.
fn next_rung(incident: &Incident, rungs: &[ActionKind]) -> Option<ActionKind> {
    distinct(rungs).find(|action| {
        let allowed = rungs.iter().filter(|rung| *rung == action).count();
        let tried = incident
            .actions
            .iter()
            .filter(|done| done.intent.action == *action)
            .filter(|done| !matches!(done.outcome, Some(Outcome::NotNeeded | Outcome::Interrupted)))
            .count();
        tried < allowed
    })
}

fn effective_autonomy(policy: &HealPolicy, action: ActionKind, with: &Circumstances<'_>) -> Autonomy {
    let written = match action {
        ActionKind::RestoreAndStart => policy.autonomy.min(policy.restore_autonomy),
        ActionKind::Start | ActionKind::Restart => policy.autonomy,
    };
    let lent = if with.demoted {
        written.min(Autonomy::Recommend)
    } else {
        written
    };
    if with.approved && written != Autonomy::Observe {
        Autonomy::Act
    } else {
        lent
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

fn human(span: Duration) -> String {
    humantime::format_duration(span).to_string()
}
