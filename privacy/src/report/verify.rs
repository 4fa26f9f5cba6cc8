//! `privacy verify`: every figure of a report, recomputed from its records alone, offline.
//!
//! A record that was changed, removed, reordered or added breaks the chain of heads, or, where somebody computed all heads anew, no longer
//! fits what the aggregator has counter-signed. Records after the last counter-signature can only be held to a head that the verifier
//! knows from elsewhere ([`Trust::known`]).

use std::collections::BTreeSet;
use std::fmt;

use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use theriac_protocol::units::{Digest, NodeId};

use super::document::{ASSUMPTIONS, Document, FORMAT, block_runs};
use super::{Status, json};
use crate::ledger::loss::ORDERS;
use crate::ledger::{KnownHead, Owner, PolicyNote, ReadRecord, Replayed, Seal, State, replay_exported};
use crate::policy::Policy;
use crate::policy::signed::{PolicyPublicKey, PolicySignature, SignatureError};

/// What the verifier believes beforehand.
pub struct Trust<'a> {
    /// Who may sign policies; without it a signature is only held to the key that it names.
    pub policy_key: Option<PolicyPublicKey>,
    /// The edge's own key, which must have signed the report; without it a signature is only held to the key that it names.
    pub edge_key: Option<PolicyPublicKey>,
    /// A position that the ledger is known to have reached, such as from `theriac-aggregator sites list`.
    pub known: Option<KnownHead>,
    /// Judges a counter-signature of this node.
    pub seals: &'a dyn Fn(&Seal, &NodeId) -> SealCheck,
}

impl fmt::Debug for Trust<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trust")
            .field("policy_key", &self.policy_key)
            .field("edge_key", &self.edge_key)
            .field("known", &self.known)
            .finish_non_exhaustive()
    }
}

/// What became of a counter-signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SealCheck {
    /// Signed with the key that the verifier trusts.
    Trusted,
    /// Signed with the key that the record itself names; the verifier trusts none.
    Consistent,
    /// Not signed with that key.
    Wrong,
}

/// What holds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verified {
    /// The node.
    pub node: NodeId,
    /// Records in the chain.
    pub records: u64,
    /// Charges among them.
    pub releases: u64,
    /// Charges of the first format, under a policy whose text no record holds: they follow from their own terms and are counted, but what allowed them is not known.
    pub releases_unheld: u64,
    /// Records up to the last counter-signature that is signed with a trusted key, or a consistent one.
    pub sealed_records: u64,
    /// Whether the key of the counter-signatures is one that the verifier trusts.
    pub seals_trusted: bool,
    /// Who signed the policy; absent: nobody.
    pub policy_signer: Option<String>,
    /// Whether that is the key that the verifier trusts.
    pub policy_trusted: bool,
    /// Whose signature the report carries; absent: nobody's, and who made it when is nobody's word.
    pub report_signer: Option<String>,
    /// Whether that is the key that the verifier trusts.
    pub report_trusted: bool,
    /// ε of the most charged unit in the current period.
    pub epsilon: f64,
    /// The same from privacy loss distributions.
    pub epsilon_pld: f64,
    /// ε of the most charged unit over all time.
    pub epsilon_unit_lifetime: f64,
    /// The policy's limit on one period.
    pub epsilon_limit: f64,
    /// δ.
    pub delta: f64,
}

/// Why a report is not true.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// It is no report.
    #[error("this is no privacy report: {0}")]
    Format(String),
    /// The chain of records is broken.
    #[error("record {index} was changed, removed, added or moved: {what}")]
    Record {
        /// Which, from 0.
        index: usize,
        /// What is wrong.
        what: String,
    },
    /// A policy is not the one that was signed.
    #[error("record {index}, the policy: {what}")]
    Policy {
        /// Which record.
        index: usize,
        /// What is wrong.
        what: String,
    },
    /// The report was changed after it was written.
    #[error("the report was changed after it was written: {0}")]
    Altered(String),
    /// A figure does not follow from the records.
    #[error("`{figure}` is reported as {reported}, the records give {recomputed}")]
    Figure {
        /// Its name.
        figure: String,
        /// What the report says.
        reported: String,
        /// What follows.
        recomputed: String,
    },
    /// A counter-signature is wrong.
    #[error("record {index}, the aggregator's counter-signature of {records} records: {what}")]
    Seal {
        /// Which record.
        index: usize,
        /// What it covers.
        records: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// The records do not reach what is known of them.
    #[error("{records} records ending in {head} are known, this report holds {found} and not that one")]
    Behind {
        /// Records that are known.
        records: u64,
        /// Head of the last.
        head: Digest,
        /// Records in the report.
        found: usize,
    },
}

/// Recomputes a report from its records.
///
/// # Errors
/// [`VerifyError`], the first thing that is not as it says.
pub fn verify(text: &str, trust: &Trust<'_>) -> Result<Verified, VerifyError> {
    let report: Document =
        serde_json::from_str(text).map_err(|error| VerifyError::Format(error.to_string()))?;
    if report.format != FORMAT {
        return Err(VerifyError::Format(format!(
            "it calls itself `{}`",
            report.format
        )));
    }
    // A name that is there twice would be read as the last one here, and perhaps as the first one elsewhere.
    let _: NamesOnce = serde_json::from_str(text).map_err(|error| VerifyError::Format(error.to_string()))?;
    let report_signer = check_whole(&report, trust)?;
    let replayed = replay_exported(report.ledger_version, &report.records)
        .map_err(|(index, what)| VerifyError::Record { index, what })?;
    let state = &replayed.state;
    let node = state.owner.as_ref().map(|owner| owner.node.clone());
    let node = node.ok_or_else(|| VerifyError::Format("it holds no records".to_owned()))?;
    let policy = check_policies(&replayed, trust)?;
    let (sealed_records, seals_trusted) = check_seals(&replayed.records, &replayed.heads, &node, trust)?;
    check_known(&replayed.heads, trust)?;
    let spent = state.spent(&policy, &replayed.heads);
    let status = Status::new(state, &policy, spent);
    check_figures(&report, state, &policy, &status)?;
    Ok(Verified {
        node,
        records: spent.records,
        releases: spent.releases,
        releases_unheld: replayed.unheld,
        sealed_records,
        seals_trusted,
        policy_signer: policy.signature().map(|by| by.key.to_string()),
        policy_trusted: trust.policy_key.is_some(),
        report_signer,
        report_trusted: trust.edge_key.is_some(),
        epsilon: spent.epsilon,
        epsilon_pld: status.epsilon_spent_pld,
        epsilon_unit_lifetime: spent.epsilon_unit_lifetime,
        epsilon_limit: spent.epsilon_limit.value(),
        delta: spent.delta.value(),
    })
}

/// Reads a report for nothing but whether a name of its statement is there twice.
#[derive(Deserialize)]
struct NamesOnce {
    #[expect(dead_code, reason = "only read, to be held to its names")]
    statement: Names,
}

struct Names;

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Once;
        impl<'de> Visitor<'de> for Once {
            type Value = Names;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with every name once")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Names, A::Error> {
                let mut names = BTreeSet::new();
                while let Some((name, IgnoredAny)) = map.next_entry::<String, IgnoredAny>()? {
                    if let Some(twice) = names.replace(name) {
                        return Err(serde::de::Error::custom(format!("`{twice}` is there twice")));
                    }
                }
                Ok(Names)
            }
        }
        deserializer.deserialize_map(Once)
    }
}

/// Whether the report is whole, and who signed it.
fn check_whole(report: &Document, trust: &Trust<'_>) -> Result<Option<String>, VerifyError> {
    let digest = report.digest_as_read();
    if digest.to_string() != report.digest {
        return Err(VerifyError::Altered(format!(
            "its digest is {digest}, it says {}",
            report.digest
        )));
    }
    let altered = |error: SignatureError| VerifyError::Altered(error.to_string());
    let signature = report
        .signature
        .as_deref()
        .map(PolicySignature::from_line)
        .transpose();
    let Some(signature) = signature.map_err(altered)? else {
        return match trust.edge_key {
            Some(key) => Err(VerifyError::Altered(format!(
                "it is not signed, {key} was to have signed it"
            ))),
            None => Ok(None),
        };
    };
    if let Some(expected) = trust.edge_key.filter(|expected| *expected != signature.key) {
        let found = signature.key;
        return Err(altered(SignatureError::OtherKey { expected, found }));
    }
    signature.verify_report(&digest).map_err(altered)?;
    Ok(Some(signature.key.to_string()))
}

/// Every policy that was ever in force and has a text: it has the hash that charges name, and its signature holds. Gives the last.
fn check_policies(replayed: &Replayed, trust: &Trust<'_>) -> Result<Policy, VerifyError> {
    let mut last: Option<Policy> = None;
    for (index, record) in replayed.records.iter().enumerate() {
        let wrong = |what: String| VerifyError::Policy { index, what };
        match record {
            ReadRecord::Policy(note) => {
                // Old builds did not write the text down; a newer record follows as soon as the edge has been started once.
                let Some(text) = &note.text else { continue };
                let policy = Policy::parse_any(text).map_err(|error| wrong(error.to_string()))?;
                check_note(note, &policy, replayed.state.owner.as_ref()).map_err(wrong)?;
                let signature = note
                    .signature
                    .as_deref()
                    .map(str::parse::<PolicySignature>)
                    .transpose();
                let signature = signature.map_err(|error| wrong(error.to_string()))?;
                last = Some(match (signature, trust.policy_key) {
                    (Some(signature), trusted) => {
                        let key = trusted.unwrap_or(signature.key);
                        signature
                            .verify(text, key)
                            .map_err(|error| wrong(error.to_string()))?;
                        policy.with_signature(signature)
                    }
                    (None, Some(_)) => return Err(wrong("nobody has signed it".to_owned())),
                    (None, None) => policy,
                });
            }
            ReadRecord::Sealed(_) | ReadRecord::Other => {}
        }
    }
    last.ok_or_else(|| {
        VerifyError::Format("no record holds a policy's text; start the edge once with this build".to_owned())
    })
}

/// Whether what a record says of a policy is what its text says, and the ledger is of the node, unit and block length that it promises.
fn check_note(note: &PolicyNote, policy: &Policy, owner: Option<&Owner>) -> Result<(), String> {
    let differs = |what: &str| Err(format!("its {what} is not the one of its text"));
    if policy.hash() != note.hash {
        return Err("its text has another hash".to_owned());
    }
    if note.epsilon.value().to_bits() != policy.epsilon().value().to_bits() {
        return differs("epsilon");
    }
    if note.delta.value().to_bits() != policy.delta().value().to_bits() {
        return differs("delta");
    }
    if note.version != policy.version() {
        return differs("version");
    }
    if note.period != policy.period() {
        return differs("period");
    }
    let Some(owner) = owner else {
        return Err("no record says whose ledger it is".to_owned());
    };
    if owner.node != *policy.site() {
        return Err(format!(
            "it is for {}, the ledger is of {}",
            policy.site(),
            owner.node
        ));
    }
    let block_ms = u64::try_from(policy.block_span().as_millis()).unwrap_or(u64::MAX);
    if (owner.unit, owner.block_ms) != (policy.unit(), block_ms) {
        return Err(format!(
            "it promises to hide a {} of {block_ms} ms, the ledger counts a {} of {} ms",
            policy.unit(),
            owner.unit,
            owner.block_ms
        ));
    }
    Ok(())
}

/// Records that are counter-signed, and whether with a trusted key.
fn check_seals(
    records: &[ReadRecord],
    heads: &[Digest],
    node: &NodeId,
    trust: &Trust<'_>,
) -> Result<(u64, bool), VerifyError> {
    let (mut sealed, mut trusted) = (0, false);
    for (index, record) in records.iter().enumerate() {
        let ReadRecord::Sealed(seal) = record else {
            continue;
        };
        let records = seal.records;
        let wrong = |what| VerifyError::Seal { index, records, what };
        let position = usize::try_from(records).unwrap_or(usize::MAX);
        if position == 0 || position > index || heads[position - 1] != seal.head {
            return Err(wrong("the records before it are not the ones that were signed"));
        }
        match (trust.seals)(seal, node) {
            SealCheck::Trusted => trusted = true,
            SealCheck::Consistent => {}
            SealCheck::Wrong => return Err(wrong("the signature does not hold")),
        }
        sealed = sealed.max(records);
    }
    Ok((sealed, trusted))
}

fn check_known(heads: &[Digest], trust: &Trust<'_>) -> Result<(), VerifyError> {
    let Some(KnownHead { head, records }) = trust.known else {
        return Ok(());
    };
    let last = records.checked_sub(1).and_then(|last| usize::try_from(last).ok());
    if records == 0 || last.and_then(|last| heads.get(last)) == Some(&head) {
        return Ok(());
    }
    Err(VerifyError::Behind {
        records,
        head,
        found: heads.len(),
    })
}

/// Compares as text, digit by digit: both sides are written by the same code.
fn check_figures(
    report: &Document,
    state: &State,
    policy: &Policy,
    status: &Status,
) -> Result<(), VerifyError> {
    let figure = |figure: &str, reported: &serde_json::Value, recomputed: &serde_json::Value| {
        let (reported, recomputed) = (reported.to_string(), recomputed.to_string());
        if reported == recomputed {
            return Ok(());
        }
        Err(VerifyError::Figure {
            figure: figure.to_owned(),
            reported,
            recomputed,
        })
    };
    let recomputed = json(status);
    let names = |value: &serde_json::Value| {
        value
            .as_object()
            .map(|object| object.keys().cloned().collect::<Vec<_>>())
    };
    if names(&report.statement) != names(&recomputed) {
        return Err(VerifyError::Format("its statement has other figures".to_owned()));
    }
    for name in names(&recomputed).unwrap_or_default() {
        figure(&name, &report.statement[&name], &recomputed[&name])?;
    }
    figure("blocks", &json(&report.blocks), &json(&block_runs(state, policy)))?;
    figure("orders", &json(&report.orders), &json(&ORDERS.to_vec()))?;
    figure("assumptions", &json(&report.assumptions), &json(&ASSUMPTIONS))
}
