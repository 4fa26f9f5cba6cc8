//! What is recorded. A record is one line of JSON, and the line's bytes are the leaf: no second encoding can differ.
//!
//! Records hold names, numbers, digests and one-word reasons, never a sample, an update's values or a host name.

use serde::{Deserialize, Serialize};
use theriac_protocol::message::GateVerdict;
use theriac_protocol::refusal::{RefusalCode, RoundOutcome};
use theriac_protocol::units::{Digest, ModelVersion, NodeId, Round, Timestamp};

/// One fact and when the aggregator's wall clock saw it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AuditRecord {
    /// Wall clock of the aggregator. Order comes from the position in the log, never from this.
    pub at: Timestamp,
    /// What happened.
    #[serde(flatten)]
    pub event: AuditEvent,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum AuditEvent {
    /// A site got its certificate.
    SiteEnrolled {
        /// The site.
        node: NodeId,
        /// SHA-256 of its public key.
        #[serde(with = "hex")]
        key_fingerprint: Digest,
    },
    /// An operator changed a site's standing.
    SiteState {
        /// The site.
        node: NodeId,
        /// What it is now.
        state: SiteStanding,
        /// Why, in the operator's words.
        reason: String,
    },
    /// A round began.
    RoundOpened {
        /// The round.
        round: Round,
        /// Model it builds on.
        base_version: ModelVersion,
        /// Digest of that model.
        #[serde(with = "hex")]
        base_digest: Digest,
        /// Digest of the announced terms: kind, layout, clipping, noise, blocks.
        #[serde(with = "hex")]
        terms_digest: Digest,
        /// Rule that will combine the updates, with its parameters.
        rule: String,
        /// Fewest updates for a model.
        quorum: u32,
    },
    /// An update was taken, turned away or left out.
    UpdateVerdict {
        /// The round.
        round: Round,
        /// Who sent it.
        node: NodeId,
        /// What was decided.
        verdict: UpdateDecision,
        /// Why, unless it was accepted.
        #[serde(with = "word")]
        reason: Option<RefusalCode>,
        /// SHA-256 of the payload.
        #[serde(with = "hex")]
        payload_digest: Digest,
        /// The check or rule that decided, with its parameters.
        rule: String,
        /// Head of the sender's privacy ledger.
        #[serde(with = "hex")]
        ledger_head: Digest,
    },
    /// A round ended.
    RoundClosed {
        /// The round.
        round: Round,
        /// How.
        outcome: RoundOutcome,
        /// Updates in it.
        members: u32,
    },
    /// A model was published.
    ModelReleased {
        /// Its version.
        version: ModelVersion,
        /// The round that made it.
        round: Round,
        /// SHA-256 of its payload.
        #[serde(with = "hex")]
        digest: Digest,
        /// Rule that combined the updates, with its parameters.
        rule: String,
        /// Sender and payload digest of every update in it, in the order in which they were combined.
        #[serde(with = "members")]
        members: Vec<(NodeId, Digest)>,
    },
    /// A round's decisions about every site are on record.
    DecisionsRecorded {
        /// The round.
        round: Round,
        /// How many.
        records: u32,
        /// Hash of the last of them; each record holds the hash of the one before it.
        #[serde(with = "hex")]
        head: Digest,
    },
    /// Sites of the platform team's own tried a model before its publication.
    CandidateValidated {
        /// The round.
        round: Round,
        /// SHA-256 of the model's payload.
        #[serde(with = "hex")]
        digest: Digest,
        /// Whether it was published after that.
        published: bool,
        /// One word: `passed`, `worse`, `unvalidated` or `held`.
        decision: String,
        /// What each of them said.
        answers: Vec<ValidatorAnswer>,
    },
    /// A site's gate judged a model.
    ModelGate {
        /// The model.
        version: ModelVersion,
        /// The site.
        node: NodeId,
        /// What it decided.
        verdict: GateVerdict,
    },
    /// The aggregator started with another configuration.
    ConfigChanged {
        /// SHA-256 of the configuration.
        #[serde(with = "hex")]
        config_digest: Digest,
    },
}

/// What a validator said of a candidate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValidatorAnswer {
    /// Who.
    pub node: NodeId,
    /// One word: `not_worse`, `worse`, `cannot_tell` or `silent`.
    pub opinion: String,
    /// Residual with the candidate over that with the model in force, in thousandths; 0 where nothing was said of it.
    pub ratio_permille: u32,
}

/// A site's standing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SiteStanding {
    /// Takes part.
    Active,
    /// May come back.
    Suspended,
    /// Never again with this key.
    Revoked,
}

/// What was decided about an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UpdateDecision {
    /// Stored for the round.
    Accepted,
    /// Turned away.
    Refused,
    /// Stored, and left out by a screen or a rule.
    Excluded,
}

/// Why a line is no record.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LeafError {
    /// It does not parse.
    #[error("this is no audit record: {0}")]
    Parse(#[from] serde_json::Error),
    /// It parses, but it is not the form in which this record is written.
    #[error("the record is not in its canonical form; this form is `{canonical}`")]
    NotCanonical {
        /// The form in which it is written.
        canonical: String,
    },
}

impl AuditRecord {
    /// The record as one line without a newline. These bytes are the leaf.
    ///
    /// # Panics
    /// Never: names, numbers and digests always have a JSON form.
    pub fn to_line(&self) -> String {
        #[expect(
            clippy::expect_used,
            reason = "a record of names, numbers and digests always has a JSON form"
        )]
        let line = serde_json::to_string(self).expect("a record has a JSON form");
        line
    }

    /// Hash of the record as a leaf.
    ///
    /// # Panics
    /// Never, as [`AuditRecord::to_line`].
    pub fn leaf_hash(&self) -> Digest {
        crate::tree::leaf_hash(self.to_line().as_bytes())
    }

    /// Reads a line.
    ///
    /// # Errors
    /// [`LeafError`]: also when a field is unknown, repeated or written in another way than [`AuditRecord::to_line`] does.
    pub fn parse(line: &str) -> Result<Self, LeafError> {
        let record: Self = serde_json::from_str(line)?;
        let canonical = record.to_line();
        if canonical == line {
            Ok(record)
        } else {
            Err(LeafError::NotCanonical { canonical })
        }
    }
}

/// A digest as 64 hexadecimal digits.
mod hex {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};
    use theriac_protocol::units::Digest;

    pub(super) fn serialize<S: Serializer>(digest: &Digest, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(digest)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(D::Error::custom)
    }
}

/// Pairs of node id and digest in hexadecimal digits.
mod members {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use theriac_protocol::units::{Digest, NodeId};

    #[derive(Serialize, Deserialize)]
    struct Member(NodeId, #[serde(with = "super::hex")] Digest);

    pub(super) fn serialize<S: Serializer>(
        members: &[(NodeId, Digest)],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(members.iter().map(|(node, digest)| Member(node.clone(), *digest)))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<(NodeId, Digest)>, D::Error> {
        let members = Vec::<Member>::deserialize(deserializer)?;
        Ok(members
            .into_iter()
            .map(|Member(node, digest)| (node, digest))
            .collect())
    }
}

/// A refusal's code as its stable word.
mod word {
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer, de::Error as _};
    use theriac_protocol::refusal::RefusalCode;

    #[expect(
        clippy::ref_option,
        clippy::trivially_copy_pass_by_ref,
        reason = "serde hands the field by reference"
    )]
    pub(super) fn serialize<S: Serializer>(
        code: &Option<RefusalCode>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        code.map(RefusalCode::word).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<RefusalCode>, D::Error> {
        let Some(word) = Option::<String>::deserialize(deserializer)? else {
            return Ok(None);
        };
        let code = RefusalCode::ALL.into_iter().find(|code| code.word() == word);
        code.map(Some)
            .ok_or_else(|| D::Error::custom(format!("`{word}` is no refusal")))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use theriac_protocol::refusal::AbortReason;

    use super::*;

    /// One record of each kind.
    pub(crate) fn records() -> Vec<AuditRecord> {
        let node = || NodeId::new("site-a").unwrap();
        let digest = |byte| Digest([byte; 32]);
        let verdict = |verdict, reason| AuditEvent::UpdateVerdict {
            round: Round(1),
            node: node(),
            verdict,
            reason,
            payload_digest: digest(5),
            rule: "norm".to_owned(),
            ledger_head: digest(6),
        };
        let events = [
            AuditEvent::SiteEnrolled {
                node: node(),
                key_fingerprint: digest(1),
            },
            AuditEvent::SiteState {
                node: node(),
                state: SiteStanding::Suspended,
                reason: "\"odd\"\n".to_owned(),
            },
            AuditEvent::RoundOpened {
                round: Round(1),
                base_version: ModelVersion(0),
                base_digest: digest(2),
                terms_digest: digest(3),
                rule: "trimmed_mean(1)".to_owned(),
                quorum: 3,
            },
            verdict(UpdateDecision::Accepted, None),
            verdict(UpdateDecision::Refused, Some(RefusalCode::NormExceeded)),
            AuditEvent::RoundClosed {
                round: Round(1),
                outcome: RoundOutcome::Aborted(AbortReason::QuorumMissed),
                members: 0,
            },
            AuditEvent::ModelReleased {
                version: ModelVersion(1),
                round: Round(2),
                digest: digest(4),
                rule: "mean".to_owned(),
                members: vec![(node(), digest(5))],
            },
            AuditEvent::ModelGate {
                version: ModelVersion(1),
                node: node(),
                verdict: GateVerdict::Accepted,
            },
            AuditEvent::CandidateValidated {
                round: Round(3),
                digest: digest(8),
                published: false,
                decision: "worse".to_owned(),
                answers: vec![ValidatorAnswer {
                    node: node(),
                    opinion: "worse".to_owned(),
                    ratio_permille: 1_234,
                }],
            },
            AuditEvent::ConfigChanged {
                config_digest: digest(7),
            },
        ];
        events
            .into_iter()
            .zip(1..)
            .map(|(event, at)| AuditRecord {
                at: Timestamp(at),
                event,
            })
            .collect()
    }

    #[test]
    fn every_record_survives_its_line_and_the_line_is_one() {
        for record in records() {
            let line = record.to_line();
            assert!(!line.contains('\n'), "{line}");
            assert_eq!(AuditRecord::parse(&line).unwrap(), record);
        }
    }

    #[test]
    fn the_form_is_the_documented_one() {
        let lines: Vec<String> = records().iter().map(AuditRecord::to_line).collect();
        let refused = lines.iter().find(|line| line.contains("refused")).unwrap();
        let zeros = |digit: &str| digit.repeat(32);
        let expected = format!(
            "{{\"at\":5,\"event\":\"update_verdict\",\"round\":1,\"node\":\"site-a\",\"verdict\":\"refused\",\
             \"reason\":\"norm_exceeded\",\"payload_digest\":\"{}\",\"rule\":\"norm\",\"ledger_head\":\"{}\"}}",
            zeros("05"),
            zeros("06")
        );
        assert_eq!(*refused, expected);
    }

    #[test]
    fn other_spellings_of_the_same_record_are_refused() {
        let line = records()[0].to_line();
        for other in [
            line.replace("\"at\":1", "\"at\": 1"),
            line.replace("{\"at\":1,", "{\"at\":1,\"more\":2,"),
            line.replace("0101", "01 01"),
            format!("{line} "),
            line.replace("site_enrolled", "site_unknown"),
            String::new(),
        ] {
            assert!(AuditRecord::parse(&other).is_err(), "`{other}` was taken");
        }
    }
}
