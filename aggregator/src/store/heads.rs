//! Signed heads of the audit log, kept as they were at the ends of rounds, and the log held against them.
//!
//! Whoever can write the database can write it anew; without the log's key, which is not in it, not so that an old head still fits. Against somebody who has the key
//! too only a head that is kept elsewhere helps (`audit export`, an edge's Welcome).

use std::collections::BTreeSet;

use rusqlite::{Connection, OptionalExtension as _};
use theriac_audit::checkpoint::{LogPublicKey, SignedHead};
use theriac_audit::leaf::{AuditEvent, AuditRecord};
use theriac_audit::tree::{MerkleTree, leaf_hash, verify_inclusion};
use theriac_protocol::units::{Digest, Round};

use super::{StoreError, Work, from_sql, to_sql};

/// Keeps a head, and no more than `kept` of them, the newest.
///
/// # Errors
/// [`StoreError::Database`].
pub fn keep(work: &Work<'_>, head: &SignedHead, kept: u64) -> Result<(), StoreError> {
    if head.size() == 0 {
        return Ok(());
    }
    work.connection()
        .prepare_cached("INSERT OR IGNORE INTO audit_head (size, root, note) VALUES (?1, ?2, ?3)")?
        .execute((to_sql(head.size()), head.root().0, head.note()))?;
    work.connection()
        .prepare_cached(
            "DELETE FROM audit_head WHERE size <= (SELECT size FROM audit_head ORDER BY size DESC LIMIT 1 OFFSET ?1)",
        )?
        .execute([to_sql(kept)])?;
    Ok(())
}

/// Where the log is not what was signed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TreeError {
    /// A leaf has other bytes than its hash says.
    #[error(
        "leaf {index} of the audit log was changed: its bytes do not have the hash that was written with it"
    )]
    Leaf {
        /// Its place.
        index: u64,
    },
    /// Leaves were removed.
    #[error(
        "the audit log ends with {found} leaves, leaf {found} is missing: a signed head says that there were {signed}"
    )]
    Shortened {
        /// Leaves there are, without a gap.
        found: u64,
        /// Leaves there were.
        signed: u64,
    },
    /// The leaves do not give the root of a head.
    #[error(
        "the audit log's first {size} leaves give root {found}, the head signed at the end of a round says {signed}: one of leaves {after} to {size} was changed together with its hash"
    )]
    Root {
        /// Leaves under the head.
        size: u64,
        /// Leaves under the newest older head that still fits.
        after: u64,
        /// Its root.
        signed: Digest,
        /// What the leaves give.
        found: Digest,
    },
    /// A head is not what the log's key signed.
    #[error("the head of {size} leaves that is stored was changed, or another key signed it")]
    Head {
        /// Leaves it speaks of.
        size: u64,
    },
    /// The log does not say what the round's rows say.
    #[error("the audit log has no leaf that says of round {round} {what}")]
    Missing {
        /// The round.
        round: u64,
        /// What should be there.
        what: String,
    },
    /// A record that the log names is not there.
    #[error(
        "leaf {index} of the audit log names a record of round {round} that is not in the chain: it was removed or changed"
    )]
    Record {
        /// The round.
        round: u64,
        /// The leaf.
        index: u64,
    },
    /// A leaf of the round is not in the tree under a head.
    #[error("leaf {index}, of round {round}, is not in the tree of {size} leaves whose head was signed")]
    Outside {
        /// The round.
        round: u64,
        /// The leaf.
        index: u64,
        /// The head.
        size: u64,
    },
}

/// What was found about a round's leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checked {
    /// Leaves of the whole log that were read.
    pub leaves: u64,
    /// Leaves of the round's end: its end, its records, its model.
    pub of_round: usize,
    /// Size under the oldest stored head that covers them all; `None`: none is stored yet.
    pub head: Option<u64>,
}

/// Reads the whole log, holds every leaf to its hash and the tree to the stored heads, and proves that the leaves of `round` that end it are in the tree under the first
/// head after it. Each leaf that names a record of the round, also one that came late, must have that record, unless its part of the chain was deleted after its time.
/// `model`: the digest that the round's released model has on record; `recorded`: whether records of the round are kept, or were. Memory: 64 bytes a leaf. A round may end meanwhile: the heads are read first, so that none speaks of leaves that are read no more.
///
/// # Errors
/// [`StoreError::Database`]; inside, the first thing that does not fit.
pub fn check(
    connection: &Connection,
    key: &LogPublicKey,
    round: Round,
    model: Option<Digest>,
    recorded: bool,
) -> Result<Result<Checked, TreeError>, StoreError> {
    let heads = match heads(connection, key)? {
        Ok(heads) => heads,
        Err(error) => return Ok(Err(error)),
    };
    let mut tree = MerkleTree::new();
    let oldest = "SELECT round FROM decision ORDER BY seq LIMIT 1";
    let oldest: Option<i64> = connection.query_row(oldest, [], |row| row.get(0)).optional()?;
    let mut ends = Ends {
        oldest: oldest.map(|round| Round(from_sql(round))),
        ..Ends::default()
    };
    let mut statement = connection.prepare_cached("SELECT idx, hash, line FROM audit_leaf ORDER BY idx")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let (index, hash, line) = (
            from_sql(row.get(0)?),
            Digest(row.get(1)?),
            row.get::<_, String>(2)?,
        );
        if index != tree.size() {
            break;
        }
        if leaf_hash(line.as_bytes()) != hash {
            return Ok(Err(TreeError::Leaf { index }));
        }
        tree.append(hash);
        ends.note(index, hash, &line, round, model);
    }
    if let Some((signed, _)) = heads.last().filter(|(size, _)| *size > tree.size()) {
        return Ok(Err(TreeError::Shortened {
            found: tree.size(),
            signed: *signed,
        }));
    }
    // Once one root is another, so are all after it.
    let wrong = heads.partition_point(|(size, root)| tree.root_at(*size) == Some(*root));
    if let Some((size, signed)) = heads.get(wrong) {
        let after = wrong.checked_sub(1).map_or(0, |before| heads[before].0);
        return Ok(Err(TreeError::Root {
            size: *size,
            after,
            signed: *signed,
            found: tree.root_at(*size).unwrap_or_default(),
        }));
    }
    let found = match ends.complete(round, model, recorded) {
        Ok(found) => found,
        Err(error) => return Ok(Err(error)),
    };
    if let Some(index) = ends.without_its_record(connection, round)? {
        return Ok(Err(TreeError::Record {
            round: round.0,
            index,
        }));
    }
    let last = found.iter().map(|(index, _)| *index).max().unwrap_or(0);
    let head = heads.iter().find(|(size, _)| *size > last);
    if let Some((size, root)) = head {
        let outside = found.iter().find(|(index, leaf)| {
            let proof = tree.inclusion(*index, *size).unwrap_or_default();
            !verify_inclusion(*leaf, *index, *size, *root, &proof)
        });
        if let Some((index, _)) = outside {
            return Ok(Err(TreeError::Outside {
                round: round.0,
                index: *index,
                size: *size,
            }));
        }
    }
    Ok(Ok(Checked {
        leaves: tree.size(),
        of_round: found.len(),
        head: head.map(|(size, _)| *size),
    }))
}

/// Leaves that end a round.
#[derive(Debug, Default)]
struct Ends {
    closed: Option<(u64, Digest)>,
    records: Option<(u64, Digest)>,
    released: Option<(u64, Digest)>,
    validated: Option<(u64, Digest)>,
    /// Every leaf that speaks of records of the round, and the hash of the last of those.
    named: Vec<(u64, Digest)>,
    /// Round of the oldest record that is kept. Records are deleted from the beginning of the chain, whole rounds of them, so its first one is the first of its round.
    oldest: Option<Round>,
    /// The leaf of that round's records: from it on all records that the log names are kept.
    kept_from: Option<u64>,
}

impl Ends {
    fn note(&mut self, index: u64, hash: Digest, line: &str, of: Round, model: Option<Digest>) {
        // Parsing every line of a long log takes seconds; most are updates.
        let ends = [
            "round_closed",
            "decisions_recorded",
            "model_released",
            "candidate_validated",
        ];
        if !ends.iter().any(|event| line.contains(event)) {
            return;
        }
        let Ok(record) = AuditRecord::parse(line) else {
            return;
        };
        let place = match record.event {
            AuditEvent::RoundClosed { round, .. } if round == of => &mut self.closed,
            AuditEvent::DecisionsRecorded { round, records, head } => {
                if self.oldest == Some(round) {
                    self.kept_from.get_or_insert(index);
                }
                if round != of {
                    return;
                }
                // Of no records the hash is that of an earlier round's.
                if records > 0 {
                    self.named.push((index, head));
                }
                &mut self.records
            }
            AuditEvent::ModelReleased { round, digest, .. } if round == of && Some(digest) == model => {
                &mut self.released
            }
            AuditEvent::CandidateValidated { round, .. } if round == of => &mut self.validated,
            _ => return,
        };
        // A roll-back releases the same bytes again, later.
        place.get_or_insert((index, hash));
    }

    /// The first leaf that names a record of the round which is kept no more, and should be.
    fn without_its_record(&self, connection: &Connection, of: Round) -> Result<Option<u64>, StoreError> {
        let Some(from) = self.kept_from else {
            return Ok(None);
        };
        let mut statement = connection.prepare_cached("SELECT hash FROM decision WHERE round = ?1")?;
        let hashes = statement.query_map([to_sql(of.0)], |row| row.get(0))?;
        let there: BTreeSet<[u8; 32]> = hashes.collect::<Result<_, _>>()?;
        let mut named = self.named.iter();
        let gone = named.find(|(index, head)| *index >= from && !there.contains(&head.0));
        Ok(gone.map(|(index, _)| *index))
    }

    fn complete(
        &self,
        round: Round,
        model: Option<Digest>,
        recorded: bool,
    ) -> Result<Vec<(u64, Digest)>, TreeError> {
        let missing = |what: String| TreeError::Missing { round: round.0, what };
        let mut found = vec![self.closed.ok_or_else(|| missing("that it ended".into()))?];
        if recorded && self.records.is_none() {
            return Err(missing("what its records are".into()));
        }
        found.extend(self.records);
        if let Some(digest) = model {
            let what = || missing(format!("that it released model {digest}"));
            found.push(self.released.ok_or_else(what)?);
        }
        found.extend(self.validated);
        Ok(found)
    }
}

type Heads = Vec<(u64, Digest)>;

/// Size and root of the stored heads, by size, each held to its signature.
fn heads(connection: &Connection, key: &LogPublicKey) -> Result<Result<Heads, TreeError>, StoreError> {
    let mut statement = connection.prepare_cached("SELECT size, root, note FROM audit_head ORDER BY size")?;
    let mut rows = statement.query([])?;
    let mut heads = Vec::new();
    while let Some(row) = rows.next()? {
        let (size, root) = (from_sql(row.get(0)?), Digest(row.get(1)?));
        let signed = SignedHead::parse(&row.get::<_, String>(2)?, key);
        if !signed.is_ok_and(|head| head.size() == size && head.root() == root) {
            return Ok(Err(TreeError::Head { size }));
        }
        heads.push((size, root));
    }
    Ok(Ok(heads))
}
