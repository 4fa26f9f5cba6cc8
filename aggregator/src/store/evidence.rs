//! Records of decisions, what sites have earned by them, and what a round was combined with.

use std::collections::BTreeMap;

use rusqlite::{Connection, OptionalExtension as _};
use serde::{Deserialize, Serialize};
use theriac_audit::leaf::{AuditEvent, AuditRecord};
use theriac_audit::tree::leaf_hash;
use theriac_protocol::message::UpdateV1;
use theriac_protocol::units::{Digest, ModelVersion, NodeId, Round};

use super::blob::BlobStore;
use super::records::node_id;
use super::sums::{self, Dropped};
use super::{StoreError, Work, from_sql, history, late, models, records, to_sql};
use crate::accumulate::Accumulate;
use crate::average::SiteAverage;
use crate::evidence::law::{Finding, Verdict};
use crate::evidence::reputation::{Changes, QuarantineLimits, Reputation};
use crate::evidence::{Absent, Closing, Decision, Record, RoundAccount, StoredRow, conclude};
use crate::robust::RuleName;
use crate::server_optimizer::{OptimizerState, ServerOptimizer};

/// Name of the meta row with the hash of the last record.
const META_HEAD: &str = "decision_head";
/// Name of the meta row with the hash of the last record that was deleted.
const META_ANCHOR: &str = "decision_anchor";

/// What a round was combined with, besides its announced terms: enough to do it again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RoundPlan {
    /// The rule.
    pub rule: RuleName,
    /// Assumed number of hostile edges.
    pub byzantine: usize,
    /// When sites enter and leave quarantine.
    pub quarantine: QuarantineLimits,
    /// What made the model's step out of the combined values.
    pub optimizer: ServerOptimizer,
    /// [`crate::evidence::RULE_VERSION`] of the program that did it.
    pub rule_version: u32,
    /// Whether the centre added noise, which is drawn once and kept nowhere.
    #[serde(default)]
    pub central_noise: bool,
    /// Whether late updates of the round before are taken in.
    #[serde(default)]
    pub late_updates: bool,
    /// How much of a site's earlier updates the rule sees.
    #[serde(default)]
    pub site_average: SiteAverage,
    /// How much of a site's earlier releases of moments is added.
    #[serde(default)]
    pub accumulate: Accumulate,
}

/// Everything that a finished round leaves besides its model.
#[derive(Debug, Clone, PartialEq)]
pub struct Conclusion {
    /// What it was combined with.
    pub plan: RoundPlan,
    /// Its measured rows.
    pub account: RoundAccount,
    /// The optimiser's memory after the model, and that model's version.
    pub memory: Option<(ModelVersion, OptimizerState)>,
}

/// Records a published round: one record for each site that was in it, the reputations, the plan, and a leaf in the audit log.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Full`], [`StoreError::Corrupt`].
pub fn conclude_round(work: &Work<'_>, round: Round, conclusion: Conclusion) -> Result<Changes, StoreError> {
    let Conclusion {
        plan,
        account,
        memory,
    } = conclusion;
    let closing = Closing {
        round,
        rule: plan.rule.to_string(),
        byzantine: plan.byzantine,
        limits: plan.quarantine,
    };
    let mut absent = absent(work.connection(), round)?;
    // What a site sent late for the round before may count although it sent nothing for this one.
    absent.retain(|absent| account.rows.iter().all(|row| row.node != absent.node));
    for row in &account.rows {
        if let Some(stale) = &row.stale {
            late::carry(work, Round(stale.of_round), &row.node, round)?;
        }
    }
    let announce = history::announced(work.connection(), round)?;
    if plan.accumulate.is_on(announce.kind) && !plan.central_noise {
        // What a screen left out, or the quarantine, is in no later sum either, and nor is what no honest row can be, although it counted this once.
        let taken = account.rows.iter().filter(|row| {
            row.decision == Decision::Combined && Verdict::of(&row.findings) != Verdict::Inconsistent
        });
        for row in taken {
            let of = row.stale.map_or(round, |stale| Round(stale.of_round));
            sums::add(work, &row.node, of, row.stale.is_some(), &announce)?;
        }
        let is_none = |finding: &Finding| matches!(finding, Finding::NoSeries { .. });
        let own = account.rows.iter().filter(|row| row.findings.iter().any(is_none));
        let carried = account.carried.iter().filter(|site| site.finding.is_some());
        for node in own.map(|row| &row.node).chain(carried.map(|site| &site.node)) {
            sums::drop_site(work, node, Dropped::Vet)?;
        }
    }
    // A site that can take no part holds no place in the quarantine that another one may need.
    let mut present = active(work.connection())?;
    present.extend(account.rows.iter().map(|row| row.node.clone()));
    present.extend(absent.iter().map(|absent| absent.node.clone()));
    let mut counted = reputations(work.connection())?;
    counted.retain(|node, _| present.contains(node));
    let (found, changes) = conclude(&closing, account, absent, &mut counted);
    append(work, round, found, Some(&plan))?;
    for (node, reputation) in &counted {
        set_reputation(work, node, reputation)?;
        if reputation.is_quarantined() {
            sums::drop_site(work, node, Dropped::Quarantine)?;
        }
    }
    if let Some((version, state)) = memory {
        insert_memory(work, version, &state)?;
    }
    late::record_all(work, round)?;
    Ok(changes)
}

/// Records a round that gave no model: who sent, who did not. It counts for and against nobody.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Full`].
pub(super) fn record_aborted(work: &Work<'_>, round: Round) -> Result<(), StoreError> {
    let row = "SELECT rule, byzantine FROM round WHERE round = ?1";
    let row: Option<(String, i64)> = work
        .connection()
        .query_row(row, [to_sql(round.0)], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let Some((rule, byzantine)) = row else {
        return Ok(());
    };
    let reputations = reputations(work.connection())?;
    let absent = absent(work.connection(), round)?;
    let blank = |node: &NodeId| {
        let standing = reputations.get(node).copied().unwrap_or_default();
        Record {
            rule: rule.clone(),
            byzantine: from_sql(byzantine),
            ..Record::blank(round, node, Decision::NotCombined, standing)
        }
    };
    let mut found: Vec<Record> = absent
        .into_iter()
        .map(|absent| Record {
            decision: absent.decision,
            reason: absent.reason,
            ..blank(&absent.node)
        })
        .collect();
    for StoredRow { node, header, .. } in stored_rows(work.connection(), round)? {
        found.push(Record {
            payload_digest: Some(header.payload_digest.to_string()),
            ..blank(&node)
        });
    }
    found.sort_by(|one, other| one.site.cmp(&other.site));
    append(work, round, found, None)?;
    late::record_all(work, round)
}

/// Notes that a site which was silent in a round, or declined it, has sent its update after the end; once, and not before the round's own records are there.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Full`].
pub(super) fn record_late(
    work: &Work<'_>,
    round: Round,
    header: &UpdateV1,
    node: &NodeId,
    reason: Option<&str>,
) -> Result<(), StoreError> {
    let silent = "SELECT count(*) FROM decision WHERE round = ?1 AND node = ?2 AND decision IN ('silent', 'declined')
                      AND NOT EXISTS (SELECT 1 FROM decision WHERE round = ?1 AND node = ?2 AND decision = 'late')";
    let silent: i64 = work
        .connection()
        .query_row(silent, (to_sql(round.0), node.as_str()), |row| row.get(0))?;
    if silent == 0 {
        return Ok(());
    }
    let standing = reputations(work.connection())?
        .get(node)
        .copied()
        .unwrap_or_default();
    let record = Record {
        payload_digest: Some(header.payload_digest.to_string()),
        reason: reason.map(str::to_owned),
        ..Record::blank(round, node, Decision::Late, standing)
    };
    let (_, _, head) = chain(work, vec![record])?;
    let records = 1;
    work.audit(AuditEvent::DecisionsRecorded { round, records, head })?;
    Ok(())
}

fn append(
    work: &Work<'_>,
    round: Round,
    found: Vec<Record>,
    plan: Option<&RoundPlan>,
) -> Result<(), StoreError> {
    let count = u32::try_from(found.len()).unwrap_or(u32::MAX);
    let (first, last, head) = chain(work, found)?;
    let leaf = work.audit(AuditEvent::DecisionsRecorded {
        round,
        records: count,
        head,
    })?;
    let Some(plan) = plan else {
        return Ok(());
    };
    let text = serde_json::to_string(plan).map_err(|error| StoreError::Conflict(error.to_string()))?;
    work.connection()
        .prepare_cached(
            "INSERT INTO round_plan (round, plan, first_seq, last_seq, leaf_index) VALUES (?1, ?2, ?3, ?4, ?5)",
        )?
        .execute((to_sql(round.0), text, first, last, to_sql(leaf)))?;
    Ok(())
}

/// Appends records to the chain; the first and last place, and the hash of the last record.
fn chain(work: &Work<'_>, found: Vec<Record>) -> Result<(i64, i64, Digest), StoreError> {
    let connection = work.connection();
    let mut head = hash_of(connection, META_HEAD)?;
    let last = "SELECT coalesce(max(seq), 0) FROM decision";
    let mut seq: i64 = connection.query_row(last, [], |row| row.get(0))?;
    let first = seq + 1;
    let mut insert = connection.prepare_cached(
        "INSERT INTO decision (seq, round, node, decision, record, hash) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
    )?;
    for mut record in found {
        seq += 1;
        record.previous = head.to_string();
        let line = record
            .to_line()
            .map_err(|error| StoreError::Conflict(error.to_string()))?;
        head = Record::hash(&line);
        insert.execute((
            seq,
            to_sql(record.round),
            &record.site,
            record.decision.word(),
            line,
            head.0,
        ))?;
    }
    records::set_meta(work, META_HEAD, &head.0)?;
    Ok((first, seq, head))
}

fn hash_of(connection: &Connection, name: &str) -> Result<Digest, StoreError> {
    match records::meta(connection, name) {
        Ok(bytes) => bytes.try_into().map(Digest).map_err(|_| StoreError::Corrupt {
            row: format!("meta {name}"),
            reason: "it has not 32 bytes".into(),
        }),
        Err(StoreError::NotFound { .. }) => Ok(Digest::default()),
        Err(error) => Err(error),
    }
}

fn active(connection: &Connection) -> Result<std::collections::BTreeSet<NodeId>, StoreError> {
    let mut statement = connection.prepare_cached("SELECT node FROM site WHERE state = 'active'")?;
    let names = statement.query_map([], |row| row.get::<_, String>(0))?;
    names.map(|name| node_id(&name?)).collect()
}

/// Sites of a round without a stored update, by name.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Corrupt`].
pub fn absent(connection: &Connection, round: Round) -> Result<Vec<Absent>, StoreError> {
    let mut statement = connection.prepare_cached(
        "SELECT node, declined, refused, refused_detail FROM cohort WHERE round = ?1
             AND node NOT IN (SELECT node FROM upload WHERE round = ?1) ORDER BY node",
    )?;
    let mut rows = statement.query([to_sql(round.0)])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        let (declined, refused): (Option<String>, Option<String>) = (row.get(1)?, row.get(2)?);
        let decision = match (&refused, &declined) {
            (Some(_), _) => Decision::Refused,
            (None, Some(_)) => Decision::Declined,
            (None, None) => Decision::Silent,
        };
        found.push(Absent {
            node: node_id(&row.get::<_, String>(0)?)?,
            decision,
            reason: refused.or(declined),
            detail: row.get(3)?,
        });
    }
    Ok(found)
}

/// Stored updates of a round with their headers, by name.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Corrupt`].
pub fn stored_rows(connection: &Connection, round: Round) -> Result<Vec<StoredRow>, StoreError> {
    let mut statement =
        connection.prepare_cached("SELECT node, header FROM upload WHERE round = ?1 ORDER BY node")?;
    let mut rows = statement.query([to_sql(round.0)])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        let node = node_id(&row.get::<_, String>(0)?)?;
        let header =
            serde_json::from_str(&row.get::<_, String>(1)?).map_err(|error| StoreError::Corrupt {
                row: format!("upload {round}/{node}"),
                reason: error.to_string(),
            })?;
        found.push(StoredRow {
            node,
            header,
            stale: None,
        });
    }
    Ok(found)
}

/// What every site has earned.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Corrupt`].
pub fn reputations(connection: &Connection) -> Result<BTreeMap<NodeId, Reputation>, StoreError> {
    let mut statement = connection.prepare_cached("SELECT node, reputation FROM reputation")?;
    let rows = statement.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))?;
    rows.map(|row| {
        let (node, text) = row?;
        let reputation = serde_json::from_str(&text).map_err(|error| StoreError::Corrupt {
            row: format!("reputation of {node}"),
            reason: error.to_string(),
        })?;
        Ok((node_id(&node)?, reputation))
    })
    .collect()
}

/// What each site had earned by the newest record of it before those of `round`; sites without an older record are not in it.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Corrupt`].
pub fn earned_before(
    connection: &Connection,
    round: Round,
) -> Result<BTreeMap<NodeId, Reputation>, StoreError> {
    let query = "SELECT record FROM decision WHERE seq IN (
                     SELECT max(seq) FROM decision
                     WHERE seq < (SELECT first_seq FROM round_plan WHERE round = ?1) GROUP BY node)";
    let records = read(connection, query, [to_sql(round.0)])?;
    records
        .into_iter()
        .map(|record| Ok((node_id(&record.site)?, record.after)))
        .collect()
}

fn set_reputation(work: &Work<'_>, node: &NodeId, reputation: &Reputation) -> Result<(), StoreError> {
    let text = serde_json::to_string(reputation).map_err(|error| StoreError::Conflict(error.to_string()))?;
    work.connection()
        .prepare_cached(
            "INSERT INTO reputation (node, reputation) VALUES (?1, ?2)
             ON CONFLICT (node) DO UPDATE SET reputation = ?2",
        )?
        .execute((node.as_str(), text))?;
    Ok(())
}

/// The records of one round, as they were written.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Corrupt`].
pub fn of_round(connection: &Connection, round: Round) -> Result<Vec<Record>, StoreError> {
    let query = "SELECT record FROM decision WHERE round = ?1 ORDER BY node, seq";
    read(connection, query, (to_sql(round.0),))
}

/// Sites that counted in a round by their earlier releases alone.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Corrupt`].
pub fn carried(
    connection: &Connection,
    round: Round,
) -> Result<std::collections::BTreeSet<NodeId>, StoreError> {
    let query = "SELECT node FROM decision WHERE round = ?1 AND decision = 'carried'";
    let mut statement = connection.prepare_cached(query)?;
    let names = statement.query_map([to_sql(round.0)], |row| row.get::<_, String>(0))?;
    names.map(|name| node_id(&name?)).collect()
}

/// The newest records of one site, newest first.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Corrupt`].
pub fn of_site(connection: &Connection, node: &NodeId, limit: u32) -> Result<Vec<Record>, StoreError> {
    let query = "SELECT record FROM decision WHERE node = ?1 ORDER BY seq DESC LIMIT ?2";
    read(connection, query, (node.as_str(), limit))
}

fn read(
    connection: &Connection,
    query: &str,
    parameters: impl rusqlite::Params,
) -> Result<Vec<Record>, StoreError> {
    let mut statement = connection.prepare_cached(query)?;
    let lines = statement.query_map(parameters, |row| row.get::<_, String>(0))?;
    lines
        .map(|line| {
            serde_json::from_str(&line?).map_err(|error| StoreError::Corrupt {
                row: "a record of a decision".into(),
                reason: error.to_string(),
            })
        })
        .collect()
}

/// The newest decision about every site: its word and its round.
///
/// # Errors
/// [`StoreError::Database`].
pub fn last_decisions(connection: &Connection) -> Result<BTreeMap<String, (String, u64)>, StoreError> {
    let mut statement = connection
        .prepare_cached("SELECT node, decision, round FROM decision WHERE seq IN (SELECT max(seq) FROM decision GROUP BY node)")?;
    let rows = statement.query_map([], |row| {
        let round = from_sql(row.get(2)?);
        Ok((row.get(0)?, (row.get(1)?, round)))
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Number of records.
///
/// # Errors
/// [`StoreError::Database`].
pub fn count(connection: &Connection) -> Result<u64, StoreError> {
    let count = connection.query_row("SELECT count(*) FROM decision", [], |row| row.get(0))?;
    Ok(from_sql(count))
}

/// What a round was combined with, and the records that it left: `None` for a round without any.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Corrupt`].
pub fn plan(connection: &Connection, round: Round) -> Result<Option<RoundPlan>, StoreError> {
    let text: Option<String> = connection
        .query_row(
            "SELECT plan FROM round_plan WHERE round = ?1",
            [to_sql(round.0)],
            |row| row.get(0),
        )
        .optional()?;
    text.map(|text| {
        serde_json::from_str(&text).map_err(|error| StoreError::Corrupt {
            row: format!("plan of round {round}"),
            reason: error.to_string(),
        })
    })
    .transpose()
}

/// Deletes the records of rounds at or before `last`; how many. What a site has earned stays, and so does the hash on which the rest builds.
///
/// # Errors
/// [`StoreError::Database`].
pub fn forget(work: &Work<'_>, last: Round) -> Result<u64, StoreError> {
    let connection = work.connection();
    // Records are in the order of their seq, and a late one may belong to an older round: only a beginning of the chain is deleted.
    let keep =
        "SELECT coalesce(min(seq), (SELECT max(seq) + 1 FROM decision)) FROM decision WHERE round > ?1";
    let keep: Option<i64> = connection.query_row(keep, [to_sql(last.0)], |row| row.get(0))?;
    let Some(keep) = keep else {
        return Ok(0);
    };
    let anchor: Option<[u8; 32]> = connection
        .query_row("SELECT hash FROM decision WHERE seq = ?1 - 1", [keep], |row| {
            row.get(0)
        })
        .optional()?;
    let Some(anchor) = anchor else {
        return Ok(0);
    };
    records::set_meta(work, META_ANCHOR, &anchor)?;
    let deleted = connection.execute("DELETE FROM decision WHERE seq < ?1", [keep])?;
    connection.execute("DELETE FROM round_plan WHERE first_seq < ?1", [keep])?;
    Ok(deleted as u64)
}

/// Where the chain of records is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChainError {
    /// A record has another hash than was written beside it.
    #[error(
        "record {seq} (round {round}, site {site}) was changed: its hash is not the one that was written with it"
    )]
    Changed {
        /// Place in the chain.
        seq: i64,
        /// Its round.
        round: u64,
        /// Its site.
        site: String,
    },
    /// A record does not continue the one before it.
    #[error(
        "record {seq} (round {round}, site {site}) does not continue the one before it: a record was removed, added or changed"
    )]
    Broken {
        /// Place in the chain.
        seq: i64,
        /// Its round.
        round: u64,
        /// Its site.
        site: String,
    },
    /// The chain ends elsewhere.
    #[error("the chain of records ends in another hash than the store's head: its end was removed")]
    Head,
    /// The audit log says otherwise.
    #[error(
        "the audit log holds another hash, or none, for the records of round {round}: the chain was written anew or cut loose"
    )]
    Audit {
        /// The round.
        round: u64,
    },
}

/// A leaf's line, its hash, and the hash of the last record that it speaks of.
type Anchor = (Option<String>, Option<[u8; 32]>, Option<[u8; 32]>);

/// Checks every record against the one before it, the head, and what the audit log says of `round`.
///
/// # Errors
/// [`StoreError::Database`]; inside, the first place at which the chain is not as it was written.
pub fn check_chain(connection: &Connection, round: Round) -> Result<Result<u64, ChainError>, StoreError> {
    let mut previous = hash_of(connection, META_ANCHOR)?;
    let mut statement =
        connection.prepare_cached("SELECT seq, round, node, record, hash FROM decision ORDER BY seq")?;
    let mut rows = statement.query([])?;
    let mut count = 0;
    while let Some(row) = rows.next()? {
        let (seq, round, site) = (row.get(0)?, from_sql(row.get(1)?), row.get::<_, String>(2)?);
        let (line, written): (String, [u8; 32]) = (row.get(3)?, row.get(4)?);
        let found = Record::hash(&line);
        if found.0 != written {
            return Ok(Err(ChainError::Changed { seq, round, site }));
        }
        let record: Option<Record> = serde_json::from_str(&line).ok();
        let continues = record.is_some_and(|record| {
            record.previous == previous.to_string() && record.round == round && record.site == site
        });
        if !continues {
            return Ok(Err(ChainError::Broken { seq, round, site }));
        }
        previous = found;
        count += 1;
    }
    if previous != hash_of(connection, META_HEAD)? {
        return Ok(Err(ChainError::Head));
    }
    let anchored: Option<Anchor> = connection
        .query_row(
            "SELECT line, audit_leaf.hash, (SELECT hash FROM decision WHERE seq = last_seq) FROM round_plan
                 LEFT JOIN audit_leaf ON idx = leaf_index WHERE round = ?1",
            [to_sql(round.0)],
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
        )
        .optional()?;
    let recorded = "SELECT EXISTS (SELECT 1 FROM decision WHERE round = ?1 AND decision <> 'late')";
    let recorded: bool = connection.query_row(recorded, [to_sql(round.0)], |row| row.get(0))?;
    let published = "SELECT EXISTS (SELECT 1 FROM model WHERE round = ?1 AND rolled_back_to IS NULL)";
    let published: bool = connection.query_row(published, [to_sql(round.0)], |row| row.get(0))?;
    if anchored.is_none() && recorded && published {
        // Records of a published round are written, and deleted, together with its plan.
        return Ok(Err(ChainError::Audit { round: round.0 }));
    }
    if let Some(anchor) = anchored {
        // A plan without its leaf, without its last record, or with a leaf whose hash is another one, was cut loose.
        let agrees = match anchor {
            (Some(line), Some(hash), Some(last)) => {
                let event = AuditRecord::parse(&line).map(|record| record.event);
                let says = matches!(event, Ok(AuditEvent::DecisionsRecorded { round: of, head, .. }) if of == round && head.0 == last);
                says && leaf_hash(line.as_bytes()).0 == hash
            }
            _ => false,
        };
        if !agrees {
            return Ok(Err(ChainError::Audit { round: round.0 }));
        }
    }
    Ok(Ok(count))
}

fn insert_memory(work: &Work<'_>, version: ModelVersion, state: &OptimizerState) -> Result<(), StoreError> {
    let payload = state.to_bytes();
    let in_row = models::fits_row(payload.len());
    work.connection()
        .prepare_cached(
            "INSERT INTO optimizer_state (version, digest, place, payload) VALUES (?1, ?2, ?3, ?4)",
        )?
        .execute((
            to_sql(version.0),
            Digest::of(&payload).0,
            if in_row { "row" } else { "blob" },
            in_row.then_some(payload),
        ))?;
    Ok(())
}

/// The optimiser's memory after a model; `None` for a model that none made, such as the first one or one that was rolled back to: there it begins
/// anew. Blocks for a blob.
///
/// # Errors
/// [`StoreError::Gone`], [`StoreError::BlobMissing`], [`StoreError::BlobCorrupt`], [`StoreError::Corrupt`].
pub fn memory(
    connection: &Connection,
    blobs: &BlobStore,
    version: ModelVersion,
) -> Result<Option<OptimizerState>, StoreError> {
    let row = connection
        .prepare_cached("SELECT place, payload, digest FROM optimizer_state WHERE version = ?1")?
        .query_row([to_sql(version.0)], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?))
        })
        .optional()?;
    let name = format!("optimiser memory of model {version}");
    let Some(row) = row else {
        return Ok(None);
    };
    let bytes = models::payload(blobs, row, name.clone())?;
    OptimizerState::from_bytes(&bytes)
        .map(Some)
        .ok_or_else(|| StoreError::Corrupt {
            row: name,
            reason: "it is no memory of an optimiser".into(),
        })
}
