//! A ledger as a report carries it: out of the file, and back for the verifier.

use std::path::Path;

use theriac_protocol::units::{Digest, Timestamp};

use super::chain;
use super::open::{check_known, check_owner, check_policy, read_file, replay};
use super::record::{Charge, Record, Seal};
use super::state::PolicySeen;
use super::{KnownHead, Ledger, LedgerError, State};
use crate::policy::Policy;
use crate::report::{Document, ExportedRecord, Status};

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

/// What the verifier looks at in a record, besides counting it.
pub(crate) enum ReadRecord {
    Policy {
        hash: Digest,
        text: Option<String>,
        signature: Option<String>,
    },
    Charge {
        policy: Digest,
    },
    Sealed(Seal),
    Other,
}

/// Exported records, checked and counted.
pub(crate) struct Replayed {
    pub(crate) state: State,
    pub(crate) heads: Vec<Digest>,
    pub(crate) records: Vec<ReadRecord>,
}

/// Computes every head anew and counts every record; the index of the first that does not fit, and why.
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
    };
    for (index, ExportedRecord { body, head: told }) in exported.iter().enumerate() {
        head = chain::seal(head, body.as_bytes());
        if head.to_string() != *told {
            return Err((index, format!("its head is {head}, the report says {told}")));
        }
        let wrong = |what: &str| (index, what.to_owned());
        replayed.state.take(body.as_bytes()).map_err(wrong)?;
        replayed.heads.push(head);
        let record = serde_json::from_str(body).map_err(|_| wrong("it does not parse"))?;
        replayed.records.push(match record {
            Record::Policy(note) => ReadRecord::Policy {
                hash: note.hash,
                text: note.text,
                signature: note.signature,
            },
            Record::Reserve(charged) => ReadRecord::Charge {
                policy: charged.policy,
            },
            Record::Charge(charge) => ReadRecord::Charge {
                policy: charge.policy,
            },
            Record::Sealed(seal) => ReadRecord::Sealed(seal),
            Record::Genesis(_) | Record::Released { .. } => ReadRecord::Other,
        });
    }
    Ok(replayed)
}
