//! An incident in plain words.

use std::fmt::Write as _;
use std::time::{Duration, UNIX_EPOCH};

use serde::Serialize;

use crate::policy::evaluate::CERTAIN;
use crate::types::{
    ActionKind, ActionRecord, Alternative, Cause, CauseEvidence, Evidence, FaultClass, Hypothesis, Incident,
    IncidentState, Outcome, RestartHelps, Verdict, When,
};

/// What [`Incident::why`] says, in fields.
#[derive(Debug, Clone, Serialize)]
pub struct Explained<'a> {
    /// Its number.
    pub id: u64,
    /// Whose.
    pub service: &'a str,
    /// What it is taken for.
    pub class: FaultClass,
    /// Where it stands.
    pub state: IncidentState,
    /// Whether a restart can help against that.
    pub restart_helps: RestartHelps,
    /// First sign, milliseconds since the Unix epoch.
    pub opened_unix_ms: u64,
    /// When it was confirmed.
    pub detected_unix_ms: u64,
    /// What its signs speak for, the one that it is taken for first; probabilities 0 to 1.
    pub hypotheses: &'a [Hypothesis],
    /// What was seen.
    pub evidence: &'a [Evidence],
    /// Leading causes, the strongest first.
    pub causes: Vec<&'a Cause>,
    /// What was considered last.
    pub considered: Vec<Considered>,
    /// What was done.
    pub actions: Vec<Effect>,
    /// What verification found.
    pub verdict: Option<Verdict>,
    /// Why a person has to look.
    pub handed_over: Option<&'a str>,
    /// What a person can do now, in words.
    pub next: Option<String>,
}

/// An alternative, with how probable its choice was: rules choose, so 1 or 0.
#[derive(Debug, Clone, Serialize)]
pub struct Considered {
    /// `None` is to do nothing.
    pub action: Option<ActionKind>,
    /// Whether it was chosen.
    pub chosen: bool,
    /// Probability with which it was chosen, 0 to 1.
    pub propensity: f64,
    /// Why, or why not.
    pub reason: String,
}

/// One action, what was expected of it and what came of it.
#[derive(Debug, Clone, Serialize)]
pub struct Effect {
    /// Number of its intent.
    pub intent: u64,
    /// Which.
    pub action: ActionKind,
    /// Why.
    pub reason: String,
    /// When it began, or was decided where it has not.
    pub unix_ms: u64,
    /// What it was done for.
    pub expected: &'static str,
    /// What the hands did and saw.
    pub actual: String,
    /// What verification found.
    pub verdict: Option<Verdict>,
}

impl Incident {
    /// Tells what happened, what was considered, what was done and what came of it, in lines for a terminal. Times are seconds
    /// after the first sign.
    pub fn why(&self) -> String {
        let mut text = String::new();
        if self.tell(&mut text).is_err() {
            // Writing to a string does not fail; if it did, what was written so far is the answer.
            text.push('\n');
        }
        text
    }

    fn tell(&self, text: &mut String) -> std::fmt::Result {
        writeln!(
            text,
            "Incident {}: {} of {}, {}.",
            self.id,
            self.class,
            self.service,
            self.summary()
        )?;
        let opened = UNIX_EPOCH + Duration::from_millis(self.opened.unix_ms);
        writeln!(
            text,
            "First sign at {}.",
            humantime::format_rfc3339_millis(opened)
        )?;
        writeln!(text, "\nSeen:")?;
        for evidence in &self.evidence {
            writeln!(text, "  {:>9}  {}", self.after(evidence.at), evidence.words)?;
        }
        if self.evidence_dropped > 0 {
            writeln!(text, "             and {} more", self.evidence_dropped)?;
        }
        writeln!(
            text,
            "  {:>9}  confirmed: this is the moment of detection",
            self.after(self.detected)
        )?;
        if let (Some(score), Some(threshold)) = (self.score, self.threshold) {
            writeln!(
                text,
                "\nHighest anomaly score {score:.2}, threshold {threshold:.2}."
            )?;
        }
        if !self.causes.is_empty() {
            writeln!(text, "Leading causes:")?;
            for cause in self.ranked_causes() {
                let way = match cause.rising {
                    Some(true) => ", higher than expected",
                    Some(false) => ", lower than expected",
                    None => "",
                };
                writeln!(text, "  {:<28} {:.2}{way}", cause.channel, cause.contribution)?;
                if let Some(evidence) = &cause.evidence {
                    writeln!(text, "  {:<28} {}", "", self.evidence_words(evidence))?;
                }
            }
        }
        if let Some((taken, others)) = self.hypotheses.split_first() {
            writeln!(
                text,
                "\nTaken for {} (probability {:.2}): {}.",
                taken.class, taken.certainty, taken.reason
            )?;
            for other in others {
                writeln!(
                    text,
                    "Its signs also speak for {} ({:.2}): {}.",
                    other.class, other.certainty, other.reason
                )?;
            }
        }
        writeln!(text, "\nRestart helps: {}.", self.class.restart_helps().as_str())?;
        writeln!(
            text,
            "\nConsidered last (rules choose, so what is chosen had propensity 1):"
        )?;
        for alternative in &self.alternatives {
            let name = alternative.action.map_or("nothing", ActionKind::as_str);
            let mark = if alternative.chosen { "*" } else { " " };
            writeln!(text, "  {mark} {name:<18} {}", alternative.reason)?;
        }
        if !self.actions.is_empty() {
            writeln!(text, "\nDone:")?;
        }
        for action in &self.actions {
            let at = action.acted.unwrap_or(action.intent.decided);
            write!(
                text,
                "  {:>9}  {} ({})",
                self.after(at),
                action.intent.action,
                action.intent.reason
            )?;
            write!(text, "; {}", outcome_words(action.outcome.as_ref()))?;
            match action.verdict {
                Some(Verdict::Healed) => writeln!(text, "; verified: healed")?,
                Some(Verdict::NoEffect) => writeln!(text, "; no effect")?,
                Some(Verdict::Harm) => writeln!(text, "; it did harm")?,
                Some(Verdict::Unknown) => writeln!(text, "; nothing could be observed")?,
                None => writeln!(text)?,
            }
            writeln!(text, "             expected: {}", expected(action.intent.action))?;
        }
        if let Some(would) = &self.would {
            writeln!(
                text,
                "\nAutonomy is observe: {} would have been done at {}{}.",
                would.action,
                self.after(would.at),
                if would.renewed {
                    "; since then the service has another process, by other hands"
                } else {
                    ""
                }
            )?;
        }
        if let Some(reason) = &self.handed_over {
            writeln!(text, "\nA person has to look: {reason}.")?;
        }
        if let Some(next) = self.next() {
            writeln!(text, "\n{next}")?;
        }
        Ok(())
    }

    /// The same in fields.
    pub fn explained(&self) -> Explained<'_> {
        let considered = |alternative: &Alternative| Considered {
            action: alternative.action,
            chosen: alternative.chosen,
            propensity: if alternative.chosen { CERTAIN } else { 0.0 },
            reason: alternative.reason.clone(),
        };
        let done = |record: &ActionRecord| Effect {
            intent: record.intent.id.0,
            action: record.intent.action,
            reason: record.intent.reason.clone(),
            unix_ms: record.acted.unwrap_or(record.intent.decided).unix_ms,
            expected: expected(record.intent.action),
            actual: outcome_words(record.outcome.as_ref()),
            verdict: record.verdict,
        };
        Explained {
            id: self.id.0,
            service: &self.service,
            class: self.class,
            state: self.state,
            restart_helps: self.class.restart_helps(),
            opened_unix_ms: self.opened.unix_ms,
            detected_unix_ms: self.detected.unix_ms,
            hypotheses: &self.hypotheses,
            evidence: &self.evidence,
            causes: self.ranked_causes(),
            considered: self.alternatives.iter().map(considered).collect(),
            actions: self.actions.iter().map(done).collect(),
            verdict: self.verdict,
            handed_over: self.handed_over.as_deref(),
            next: self.next(),
        }
    }

    /// What a person can do now, in words.
    fn next(&self) -> Option<String> {
        let id = self.id;
        match self.state {
            IncidentState::AwaitingApproval => Some(format!(
                "`theriac-edge actions approve {id}` has it done, `theriac-edge actions deny {id}` has it not done."
            )),
            IncidentState::HandedToHuman if self.in_flight().is_none() => Some(format!(
                "When what stood in the way is mended, `theriac-edge actions approve {id}` has the next action tried."
            )),
            _ => None,
        }
    }

    /// The causes as people read them: by what speaks for each over the whole incident, where that is known.
    pub fn ranked_causes(&self) -> Vec<&Cause> {
        let strength = |cause: &Cause| cause.evidence.map_or(0.0, |evidence| evidence.strength);
        let mut causes: Vec<&Cause> = self.causes.iter().collect();
        // Stable: without evidence the order stays that of the contributions.
        causes.sort_by(|a, b| strength(b).total_cmp(&strength(a)));
        causes
    }

    fn evidence_words(&self, evidence: &CauseEvidence) -> String {
        let way = if evidence.change < 0.0 { "below" } else { "above" };
        let words = format!(
            "{:.0} % of the residual, {:.1} spreads {way} its median",
            100.0 * evidence.residual_share,
            evidence.change.abs()
        );
        if let Some(since) = evidence.since_unix_ms {
            let seconds = |from: u64, to: u64| Duration::from_millis(to.saturating_sub(from)).as_secs_f64();
            let opened = self.opened.unix_ms;
            let (passed, way) = if since <= opened {
                (seconds(since, opened), "before")
            } else {
                (seconds(opened, since), "after")
            };
            return format!("{words}, since {passed:.1} s {way} the first sign");
        }
        words
    }

    fn summary(&self) -> String {
        let end = |what: &str, at: Option<When>| {
            at.map_or(what.to_owned(), |at| format!("{what} after {}", self.after(at)))
        };
        match self.state {
            IncidentState::Healed => end("healed", self.healed),
            IncidentState::Recovered => end("recovered", self.closed),
            IncidentState::Open => "open".to_owned(),
            IncidentState::AwaitingApproval => "an action waits for approval".to_owned(),
            IncidentState::CoolingDown => "an action waits for its cool-down".to_owned(),
            IncidentState::Held => self.held().unwrap_or("held by the fleet").to_owned(),
            IncidentState::Acting => "an action is under way".to_owned(),
            IncidentState::Verifying => "the action is being verified".to_owned(),
            IncidentState::HandedToHuman => "handed to a person".to_owned(),
        }
    }

    /// What the fleet holds it back for, in words, while it does.
    pub fn held(&self) -> Option<&str> {
        let nothing = self
            .alternatives
            .iter()
            .rfind(|considered| considered.action.is_none());
        nothing
            .filter(|_| self.state == IncidentState::Held)
            .map(|considered| considered.reason.as_str())
    }

    fn after(&self, at: When) -> String {
        let before = self.opened.since(at);
        if before.is_zero() {
            format!("{:.2} s", at.since(self.opened).as_secs_f64())
        } else {
            format!("-{:.2} s", before.as_secs_f64())
        }
    }
}

/// What an action is done for: verification asks whether it came true.
fn expected(action: ActionKind) -> &'static str {
    match action {
        ActionKind::Start | ActionKind::Restart => "the service answers and the symptom is gone",
        ActionKind::RestoreAndStart => "the state passes its check and the service answers",
        ActionKind::CancelQuery | ActionKind::TerminateBlocker => {
            "nobody waits for that session any more, and the service answers; its open transaction is lost"
        }
        ActionKind::EndIdleSessions => "enough slots are free, and an ordinary client is let in",
        ActionKind::Webhook | ActionKind::Hook => "what was called does its part, and the symptom is gone",
        ActionKind::RelieveSpace => "the file system has room again, and the service answers as before",
        ActionKind::ThrottleCpu | ActionKind::LimitMemory | ActionKind::Freeze => {
            "the service has what the listed group took from it, and the symptom is gone"
        }
        ActionKind::RestartUnit | ActionKind::ReloadUnit | ActionKind::ResetFailedUnit => {
            "the unit is active, and the symptom is gone"
        }
        ActionKind::RolloutRestart | ActionKind::ScaleUp | ActionKind::RolloutUndo => {
            "the deployment is as it was asked to be, and the symptom is gone"
        }
        ActionKind::Drain => "what it had in hand ends, and the symptom is gone",
        ActionKind::Reload => "the server runs on the settings as they are written, and the symptom is gone",
    }
}

fn outcome_words(outcome: Option<&Outcome>) -> String {
    match outcome {
        None => "under way".to_owned(),
        Some(Outcome::Done) => "done".to_owned(),
        Some(Outcome::Restored { detail } | Outcome::Relieved { detail }) => format!("done: {detail}"),
        Some(Outcome::Fruitless { detail }) => format!("came to nothing: {detail}"),
        Some(Outcome::StateCorrupt { detail, .. }) => format!("not done, the state is corrupt: {detail}"),
        Some(Outcome::Failed { detail, .. }) => format!("failed: {detail}"),
        Some(Outcome::Spared { detail }) => format!("touched nobody: {detail}"),
        Some(Outcome::NotNeeded) => "called off before it began".to_owned(),
        Some(Outcome::Interrupted) => "interrupted by a restart of the node".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{FaultClass, IncidentId};

    fn cause(channel: &str, contribution: f32, evidence: Option<CauseEvidence>) -> Cause {
        Cause {
            channel: channel.to_owned(),
            contribution,
            rising: Some(true),
            evidence,
        }
    }

    fn incident(causes: Vec<Cause>) -> Incident {
        let opened = When {
            monotonic_ms: 1_000,
            unix_ms: 50_000,
        };
        Incident {
            id: IncidentId(1),
            service: "kv".to_owned(),
            class: FaultClass::MemoryLeak,
            state: IncidentState::Open,
            opened,
            detected: opened,
            acted: None,
            healed: None,
            closed: None,
            score: Some(9.0),
            threshold: Some(3.0),
            evidence: Vec::new(),
            evidence_dropped: 0,
            causes,
            hypotheses: Vec::new(),
            alternatives: Vec::new(),
            would: None,
            plan: None,
            approved_by: std::collections::BTreeSet::new(),
            actions: Vec::new(),
            verdict: None,
            handed_over: None,
        }
    }

    #[test]
    fn causes_are_told_by_the_strength_of_their_evidence_with_share_change_and_since() {
        let evidence = |strength, change, since_unix_ms| {
            Some(CauseEvidence {
                strength,
                residual_share: 0.4,
                change,
                since_unix_ms,
            })
        };
        let told = incident(vec![
            cause("service_threads", 9.0, evidence(1.0, -2.0, Some(51_500))),
            cause("service_memory", 5.0, evidence(3.0, 6.12, Some(45_800))),
            cause("service_cpu", 4.0, evidence(0.5, 0.1, None)),
        ])
        .why();
        let at = |words: &str| {
            told.find(words)
                .unwrap_or_else(|| panic!("{words} is missing:\n{told}"))
        };
        assert!(at("service_memory") < at("service_threads"), "{told}");
        at("40 % of the residual, 6.1 spreads above its median, since 4.2 s before the first sign\n");
        at("40 % of the residual, 2.0 spreads below its median, since 1.5 s after the first sign\n");
        at("0.1 spreads above its median\n");
    }

    #[test]
    fn without_evidence_the_contributions_keep_their_order() {
        let told = incident(vec![cause("b", 9.0, None), cause("a", 5.0, None)]);
        let names: Vec<&str> = told
            .ranked_causes()
            .iter()
            .map(|cause| cause.channel.as_str())
            .collect();
        assert_eq!(names, ["b", "a"]);
    }
}
