//! An incident in plain words.

use std::fmt::Write as _;
use std::time::{Duration, UNIX_EPOCH};

use crate::types::{Incident, IncidentState, Outcome, Verdict, When};

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
            for cause in &self.causes {
                let way = match cause.rising {
                    Some(true) => ", higher than expected",
                    Some(false) => ", lower than expected",
                    None => "",
                };
                writeln!(text, "  {:<28} {:.2}{way}", cause.channel, cause.contribution)?;
            }
        }
        writeln!(text, "\nConsidered last:")?;
        for alternative in &self.alternatives {
            let name = alternative
                .action
                .map_or("nothing", crate::types::ActionKind::as_str);
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
        }
        if let Some(reason) = &self.handed_over {
            writeln!(text, "\nA person has to look: {reason}.")?;
        }
        Ok(())
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
            IncidentState::Acting => "an action is under way".to_owned(),
            IncidentState::Verifying => "the action is being verified".to_owned(),
            IncidentState::HandedToHuman => "handed to a person".to_owned(),
        }
    }

    fn after(&self, at: When) -> String {
        format!("{:.2} s", at.since(self.opened).as_secs_f64())
    }
}

fn outcome_words(outcome: Option<&Outcome>) -> String {
    match outcome {
        None => "under way".to_owned(),
        Some(Outcome::Done) => "done".to_owned(),
        Some(Outcome::StateCorrupt { detail, .. }) => format!("not done, the state is corrupt: {detail}"),
        Some(Outcome::Failed { detail, .. }) => format!("failed: {detail}"),
        Some(Outcome::NotNeeded) => "called off before it began".to_owned(),
        Some(Outcome::Interrupted) => "interrupted by a restart of the node".to_owned(),
    }
}
