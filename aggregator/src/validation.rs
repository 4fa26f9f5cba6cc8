//! The gate between a combined model and its publication: sites of the platform team's own try it on their rows.
//!
//! No rule over updates finds anomalies that were taught as normal: such updates are as honest ones are. Rows that somebody vouches for do.
//! With `rounds.validators` set, a candidate goes to those sites before anybody else hears of it, and each answers whether it forecasts its rows worse than the
//! model in force ([`theriac_model::appraisal`]).
//!
//! [`Panel`] is the wait for their answers, without I/O or clock; [`decide`] is what the answers mean, and all that `rounds replay` needs to come to the same end.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_protocol::message::{Appraisal, AppraisalV1};
use theriac_protocol::units::{Digest, ModelVersion, Moment, NodeId, Round};

use crate::accumulate::Behind;

/// Most validators of a federation.
pub const VALIDATORS_MAX: usize = 16;

/// What becomes of a candidate that no validator could tell anything about in time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Missing {
    /// It is published: an outage of the validators costs protection.
    Publish,
    /// It is not: an outage of the validators costs rounds.
    #[default]
    Hold,
}

/// Who is asked, and for how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValidationTerms {
    /// The validators, 1 to [`VALIDATORS_MAX`], by name.
    pub validators: Vec<NodeId>,
    /// Time for all of them to answer, from when the candidate is there.
    pub timeout: Duration,
    /// Without a word that tells anything.
    pub missing: Missing,
}

/// What a validator said, as it is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Opinion {
    /// No worse than the model in force.
    NotWorse,
    /// Worse.
    Worse,
    /// It could not tell.
    CannotTell,
    /// Nothing in time.
    Silent,
}

impl Opinion {
    /// The stable word of records and of the audit log.
    pub fn word(self) -> &'static str {
        match self {
            Self::NotWorse => "not_worse",
            Self::Worse => "worse",
            Self::CannotTell => "cannot_tell",
            Self::Silent => "silent",
        }
    }
}

impl From<Appraisal> for Opinion {
    fn from(appraisal: Appraisal) -> Self {
        match appraisal {
            Appraisal::NotWorse => Self::NotWorse,
            Appraisal::Worse => Self::Worse,
            Appraisal::CannotTell => Self::CannotTell,
        }
    }
}

/// One validator's part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Who.
    pub site: NodeId,
    /// What it said.
    pub opinion: Opinion,
    /// Residual with the candidate over that with the model in force, in thousandths; 0 where it said nothing of it.
    pub ratio_permille: u32,
}

/// What becomes of the candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// At least one validator finds it no worse, and none worse.
    Passed,
    /// A validator finds it worse.
    Worse,
    /// None could tell, and it is published all the same.
    Unvalidated,
    /// None could tell, and so it is not published.
    Held,
}

impl Decision {
    /// Whether the candidate becomes the model in force.
    pub fn publishes(self) -> bool {
        matches!(self, Self::Passed | Self::Unvalidated)
    }

    /// The stable word of records, metrics and the audit log.
    pub fn word(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Worse => "worse",
            Self::Unvalidated => "unvalidated",
            Self::Held => "held",
        }
    }

    /// The reason of a round that ends without a model by it.
    pub fn abort_word(self) -> &'static str {
        match self {
            Self::Held => "validation_missing",
            Self::Passed | Self::Worse | Self::Unvalidated => "validation_worse",
        }
    }
}

/// What answers mean. One `worse` is enough: validators are few, trusted, and each may be the only one with rows of a kind.
pub fn decide<'a>(answers: impl IntoIterator<Item = &'a Answer>, missing: Missing) -> Decision {
    let mut decision = match missing {
        Missing::Publish => Decision::Unvalidated,
        Missing::Hold => Decision::Held,
    };
    for answer in answers {
        match answer.opinion {
            Opinion::Worse => return Decision::Worse,
            Opinion::NotWorse => decision = Decision::Passed,
            Opinion::CannotTell | Opinion::Silent => {}
        }
    }
    decision
}

/// What was in a row of the candidate that held earlier releases.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tried {
    /// Whose row.
    pub site: NodeId,
    /// Whether the site sent nothing for the round.
    pub carried: bool,
    /// What was in it.
    pub behind: Behind,
}

/// The record of a candidate's validation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Validation {
    /// The round.
    pub round: u64,
    /// SHA-256 of the candidate's payload, in hexadecimal digits.
    pub candidate: String,
    /// The model that it was held against.
    pub base_version: u64,
    /// In force when nobody could tell.
    pub missing: Missing,
    /// Time that the validators had, in milliseconds.
    pub timeout_ms: u64,
    /// One for each validator, by name.
    pub answers: Vec<Answer>,
    /// What came of it.
    pub decision: Decision,
    /// Sites whose updates the candidate was made of or screened from, by name.
    pub rows: Vec<NodeId>,
    /// Where earlier releases are added: what was in each row, also of sites that sent nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub behind: Vec<Tried>,
}

impl Validation {
    /// The decision once more, from the answers on record.
    pub fn decided_again(&self) -> Decision {
        decide(&self.answers, self.missing)
    }

    /// For people: one sentence.
    pub fn words(&self) -> String {
        let mut said = match self.decision {
            Decision::Passed => "published: no validator found it worse than".to_owned(),
            Decision::Worse => "not published: a validator found it worse on its own rows than".to_owned(),
            Decision::Unvalidated => {
                "published without a word of a validator (rounds.validation_missing = \"publish\"), against"
                    .to_owned()
            }
            Decision::Held => {
                "not published: no validator could tell (rounds.validation_missing = \"hold\"), against"
                    .to_owned()
            }
        };
        // Writing to a string cannot fail.
        let _written = write!(said, " model {}", self.base_version);
        for answer in &self.answers {
            let _written = match answer.opinion {
                Opinion::NotWorse | Opinion::Worse => write!(
                    said,
                    "; {} says {} ({:.3} times the residual)",
                    answer.site,
                    answer.opinion.word().replace('_', " "),
                    f64::from(answer.ratio_permille) / 1_000.0
                ),
                Opinion::CannotTell => write!(
                    said,
                    "; {} has too few rows, or another model, to tell",
                    answer.site
                ),
                Opinion::Silent => write!(
                    said,
                    "; {} did not answer within {} s",
                    answer.site,
                    self.timeout_ms / 1_000
                ),
            };
        }
        said
    }
}

/// A candidate that waits for its validators. No answer, repetition or absence moves its deadline; memory is one answer a validator.
#[derive(Debug)]
pub struct Panel {
    terms: ValidationTerms,
    round: Round,
    candidate: Digest,
    base: ModelVersion,
    rows: Vec<NodeId>,
    behind: Vec<Tried>,
    deadline: Moment,
    answers: BTreeMap<NodeId, (Opinion, u32)>,
}

impl Panel {
    /// The panel for one candidate, which is there at `now`; `rows`: sites whose updates went into it, by name.
    pub fn new(
        terms: ValidationTerms,
        round: Round,
        candidate: Digest,
        base: ModelVersion,
        rows: Vec<NodeId>,
        now: Moment,
    ) -> Self {
        Self {
            deadline: now.after(terms.timeout),
            terms,
            round,
            candidate,
            base,
            rows,
            behind: Vec::new(),
            answers: BTreeMap::new(),
        }
    }

    /// With earlier releases in the rows.
    #[must_use]
    pub fn of_releases(self, behind: Vec<Tried>) -> Self {
        Self { behind, ..self }
    }

    /// The round of the candidate.
    pub fn round(&self) -> Round {
        self.round
    }

    /// When it ends at the latest.
    pub fn timeout(&self) -> Moment {
        self.deadline
    }

    /// Whether this node's answer is waited for: it is a validator and has not answered. One that went and came back is asked again.
    pub fn waits_for(&self, node: &NodeId) -> bool {
        self.terms.validators.contains(node) && !self.answers.contains_key(node)
    }

    /// Takes an answer; false: of somebody else, of another candidate, or not the first one. The first counts.
    pub fn answer(&mut self, node: &NodeId, answer: &AppraisalV1) -> bool {
        let fits = answer.round == self.round && answer.payload_digest == self.candidate;
        if !fits || !self.waits_for(node) {
            return false;
        }
        self.answers
            .insert(node.clone(), (answer.appraisal.into(), answer.ratio_permille));
        true
    }

    /// What came of it, once nothing that may still come can change it: at the first `worse`, when all have answered, or at the deadline.
    pub fn conclude(&self, now: Moment) -> Option<Validation> {
        let worse = self
            .answers
            .values()
            .any(|(opinion, _)| *opinion == Opinion::Worse);
        let complete = self
            .terms
            .validators
            .iter()
            .all(|node| self.answers.contains_key(node));
        if !worse && !complete && now < self.deadline {
            return None;
        }
        let answers: Vec<Answer> = self
            .terms
            .validators
            .iter()
            .map(|site| {
                let (opinion, ratio_permille) =
                    self.answers.get(site).copied().unwrap_or((Opinion::Silent, 0));
                Answer {
                    site: site.clone(),
                    opinion,
                    ratio_permille,
                }
            })
            .collect();
        Some(Validation {
            round: self.round.0,
            candidate: self.candidate.to_string(),
            base_version: self.base.0,
            missing: self.terms.missing,
            timeout_ms: u64::try_from(self.terms.timeout.as_millis()).unwrap_or(u64::MAX),
            decision: decide(&answers, self.terms.missing),
            answers,
            rows: self.rows.clone(),
            behind: self.behind.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    fn panel(validators: &[&str], missing: Missing) -> Panel {
        let terms = ValidationTerms {
            validators: validators.iter().map(|name| node(name)).collect(),
            timeout: Duration::from_secs(30),
            missing,
        };
        Panel::new(
            terms,
            Round(7),
            Digest([9; 32]),
            ModelVersion(3),
            Vec::new(),
            Moment::default(),
        )
    }

    fn says(appraisal: Appraisal) -> AppraisalV1 {
        AppraisalV1 {
            round: Round(7),
            payload_digest: Digest([9; 32]),
            appraisal,
            ratio_permille: 1_234,
        }
    }

    fn after(seconds: u64) -> Moment {
        Moment::default().after(Duration::from_secs(seconds))
    }

    #[test]
    fn one_worse_ends_it_at_once_and_the_silent_ones_are_named() {
        let mut panel = panel(&["a", "b"], Missing::Publish);
        assert!(panel.answer(&node("b"), &says(Appraisal::Worse)));
        let ended = panel.conclude(after(1)).unwrap();
        assert_eq!(ended.decision, Decision::Worse);
        assert!(!ended.decision.publishes());
        assert_eq!(ended.answers[0].opinion, Opinion::Silent);
        assert!(
            ended.words().contains("b says worse (1.234 times the residual)"),
            "{}",
            ended.words()
        );
    }

    #[test]
    fn not_worse_waits_for_the_others_until_the_deadline() {
        let mut panel = panel(&["a", "b"], Missing::Hold);
        assert!(panel.answer(&node("a"), &says(Appraisal::NotWorse)));
        assert_eq!(panel.conclude(after(29)), None);
        assert_eq!(panel.conclude(after(30)).unwrap().decision, Decision::Passed);
        assert!(panel.answer(&node("b"), &says(Appraisal::CannotTell)));
        assert_eq!(panel.conclude(after(2)).unwrap().decision, Decision::Passed);
    }

    #[test]
    fn without_a_word_that_tells_anything_the_configuration_decides() {
        for (missing, decision) in [
            (Missing::Hold, Decision::Held),
            (Missing::Publish, Decision::Unvalidated),
        ] {
            let mut panel = panel(&["a"], missing);
            assert_eq!(
                panel.conclude(after(30)).unwrap().decision,
                decision,
                "nobody answered"
            );
            assert!(panel.answer(&node("a"), &says(Appraisal::CannotTell)));
            let ended = panel.conclude(after(1)).unwrap();
            assert_eq!(ended.decision, decision, "it could not tell");
            assert_eq!(ended.decided_again(), decision);
        }
    }

    #[test]
    fn answers_of_others_of_other_candidates_and_second_ones_count_nothing() {
        let mut panel = panel(&["a"], Missing::Hold);
        assert!(!panel.answer(&node("stranger"), &says(Appraisal::Worse)));
        let other = AppraisalV1 {
            payload_digest: Digest([8; 32]),
            ..says(Appraisal::Worse)
        };
        assert!(!panel.answer(&node("a"), &other));
        let earlier = AppraisalV1 {
            round: Round(6),
            ..says(Appraisal::Worse)
        };
        assert!(!panel.answer(&node("a"), &earlier));
        assert!(panel.answer(&node("a"), &says(Appraisal::NotWorse)));
        assert!(!panel.answer(&node("a"), &says(Appraisal::Worse)));
        assert_eq!(panel.conclude(after(1)).unwrap().decision, Decision::Passed);
    }
}
