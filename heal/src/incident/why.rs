//! An incident in plain words.

use std::fmt::Write as _;
use std::time::{Duration, UNIX_EPOCH};

use crate::types::{ActionKind, Cause, CauseEvidence, Incident, IncidentState, Outcome, Verdict, When};

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
        Ok(())
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
        Some(Outcome::Relieved { detail }) => format!("done: {detail}"),
        Some(Outcome::Fruitless { detail }) => format!("came to nothing: {detail}"),
        Some(Outcome::StateCorrupt { detail, .. }) => format!("not done, the state is corrupt: {detail}"),
        Some(Outcome::Failed { detail, .. }) => format!("failed: {detail}"),
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
