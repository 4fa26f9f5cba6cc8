//! A ledger as a report carries it: out of the file, and back for the verifier.

use std::collections::BTreeMap;
use std::path::Path;

use theriac_protocol::message::UpdateKind;
use theriac_protocol::units::{Digest, Timestamp};

use super::chain;
use super::open::{check_known, check_owner, check_policy, read_file, replay};
use super::record::{Charge, PolicyNote, Record, Seal};
use super::state::PolicySeen;
use super::{KnownHead, Ledger, LedgerError, State};
use crate::policy::Policy;
use crate::report::{Document, ExportedRecord, Status};
use crate::windows::BlockWindows;

impl Ledger {
    /// The sum of a ledger's records, read without locking it, for the policy that is in force.
    pub(crate) fn read(path: &Path, policy: &Policy) -> Result<State, LedgerError> {
        let (state, _) = replay(path, &read_file(path)?)?;
        check_owner(path, policy.site(), policy, &state)?;
        check_policy(policy, &state)?;
        Ok(state)
    }

    /// Every charge of a ledger, read without locking it.
    pub(crate) fn read_charges(path: &Path) -> Result<Vec<Charge>, LedgerError> {
        let bytes = read_file(path)?;
        replay(path, &bytes)?;
        let chain =
            chain::read(&bytes).map_err(|damage| LedgerError::damaged(path, damage.offset, damage.what))?;
        let charge = |(_, body, _): &(u64, &[u8], Digest)| match serde_json::from_slice(body) {
            Ok(Record::Charge(charge)) => Some(*charge),
            _ => None,
        };
        Ok(chain.records.iter().filter_map(charge).collect())
    }

    /// The report on a ledger, made without locking it, so also while an edge uses it. `policy` is the one in force.
    ///
    /// # Errors
    /// [`LedgerError`], as for [`Ledger::open_known`]; [`LedgerError::PolicyNotInForce`] when the edge has not seen this policy yet.
    pub fn report(
        path: &Path,
        policy: &Policy,
        known: Option<&KnownHead>,
        now: Timestamp,
    ) -> Result<Document, LedgerError> {
        let bytes = read_file(path)?;
        let (state, read) = replay(path, &bytes)?;
        check_known(path, &read.heads, known)?;
        check_owner(path, policy.site(), policy, &state)?;
        check_policy(policy, &state)?;
        if state.policy != PolicySeen::of(policy) {
            return Err(LedgerError::PolicyNotInForce {
                version: policy.version(),
            });
        }
        let spent = state.spent(policy, &read.heads);
        let statement = serde_json::to_value(Status::new(&state, policy, spent)).unwrap_or_default();
        let blocks = crate::report::block_runs(&state, policy);
        // It was read a moment ago, so it can be read again.
        let chain =
            chain::read(&bytes).map_err(|damage| LedgerError::damaged(path, damage.offset, damage.what))?;
        let record = |(_, body, head): &(u64, &[u8], Digest)| ExportedRecord {
            body: String::from_utf8_lossy(body).into_owned(),
            head: head.to_string(),
        };
        let records = chain.records.iter().map(record).collect();
        Ok(Document::new(statement, blocks, chain.version, records, now))
    }
}

/// The terms of one charge, as the table of mechanisms shows them.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ChargedTerms {
    pub(crate) kind: UpdateKind,
    pub(crate) values: u32,
    pub(crate) clip_norm: f64,
    pub(crate) noise_multiplier: f64,
    pub(crate) sampling_rate: f64,
    pub(crate) steps: u32,
    pub(crate) sensitivity: f64,
    pub(crate) windows: Option<BlockWindows>,
    /// First and last id of each run of blocks; empty: every block.
    pub(crate) blocks: Vec<(u64, u64)>,
}

/// The terms of every charge that the records hold, of both formats, in their order.
pub(crate) fn charged_terms(exported: &[ExportedRecord]) -> Vec<ChargedTerms> {
    let terms = |record: &ExportedRecord| match serde_json::from_str(&record.body) {
        Ok(Record::Charge(charge)) => Some(ChargedTerms {
            kind: charge.kind,
            values: charge.values,
            clip_norm: charge.clip_norm.value(),
            noise_multiplier: charge.noise_multiplier.value(),
            sampling_rate: charge.sampling_rate,
            steps: charge.steps,
            sensitivity: charge.sensitivity,
            windows: charge.windows,
            blocks: charge.blocks,
        }),
        Ok(Record::Reserve(charge)) => Some(ChargedTerms {
            kind: charge.kind,
            values: charge.values,
            clip_norm: charge.clip_norm.value(),
            noise_multiplier: charge.noise_multiplier.value(),
            sampling_rate: 1.0,
            steps: 1,
            sensitivity: charge.sensitivity,
            windows: None,
            blocks: charge.blocks,
        }),
        _ => None,
    };
    exported.iter().filter_map(terms).collect()
}

/// What the verifier looks at in a record, besides counting it.
pub(crate) enum ReadRecord {
    Policy(PolicyNote),
    Sealed(Seal),
    Other,
}

/// Exported records, checked and counted.
pub(crate) struct Replayed {
    pub(crate) state: State,
    pub(crate) heads: Vec<Digest>,
    pub(crate) records: Vec<ReadRecord>,
    /// Charges of the first format under a policy whose text no record holds: held to nothing but their own terms.
    pub(crate) unheld: u64,
}

/// The policies whose texts the records hold, wherever they stand, by the texts' own hashes. What does not parse is found where the records are looked at.
fn texts(exported: &[ExportedRecord]) -> BTreeMap<Digest, Policy> {
    let text = |record: &ExportedRecord| match serde_json::from_str(&record.body) {
        Ok(Record::Policy(note)) => note.text,
        _ => None,
    };
    let policies = exported.iter().filter_map(text);
    let policies = policies.filter_map(|text| Policy::parse_any(&text).ok());
    policies.map(|policy| (policy.hash(), policy)).collect()
}

/// Computes every head anew, holds every charge to the policy that was in force, and counts every record; the index of the first that does not fit, and why.
///
/// A policy's text may stand after the charges under it, since old builds did not write it down: so texts are collected first, and a charge is held to the text of its own
/// policy. Charges of the first format alone may be under a policy without any.
pub(crate) fn replay_exported(
    version: u32,
    exported: &[ExportedRecord],
) -> Result<Replayed, (usize, String)> {
    let mut head =
        chain::origin(version).ok_or((0, format!("version {version} of the ledger is not known")))?;
    let mut replayed = Replayed {
        state: State::default(),
        heads: Vec::with_capacity(exported.len()),
        records: Vec::with_capacity(exported.len()),
        unheld: 0,
    };
    let texts = texts(exported);
    let mut in_force: Option<Digest> = None;
    for (index, ExportedRecord { body, head: told }) in exported.iter().enumerate() {
        head = chain::seal(head, body.as_bytes());
        if head.to_string() != *told {
            return Err((index, format!("its head is {head}, the report says {told}")));
        }
        let wrong = |what: &str| (index, what.to_owned());
        let record = serde_json::from_str(body).map_err(|_| wrong("it does not parse"))?;
        let beyond = |error| (index, format!("it goes beyond the policy in force: {error}"));
        let under = |policy: &Digest| {
            if in_force == Some(*policy) {
                Ok(texts.get(policy))
            } else {
                Err(wrong("it was charged under another policy than the one in force"))
            }
        };
        match &record {
            Record::Policy(note) => in_force = Some(note.hash),
            Record::Charge(charge) => {
                // Texts are written down for as long as there are charges of this format.
                let policy = under(&charge.policy)?
                    .ok_or_else(|| wrong("it was charged under a policy whose text no record holds"))?;
                replayed.state.kept(policy, charge).map_err(beyond)?;
            }
            Record::Reserve(charged) => match under(&charged.policy)? {
                Some(policy) => replayed.state.kept_first(policy, charged).map_err(beyond)?,
                None => replayed.unheld += 1,
            },
            _ => {}
        }
        replayed.state.take(body.as_bytes()).map_err(wrong)?;
        replayed.heads.push(head);
        replayed.records.push(match record {
            Record::Policy(note) => ReadRecord::Policy(note),
            Record::Sealed(seal) => ReadRecord::Sealed(seal),
            Record::Genesis(_) | Record::Reserve(_) | Record::Charge(_) | Record::Released { .. } => {
                ReadRecord::Other
            }
        });
    }
    Ok(replayed)
}
