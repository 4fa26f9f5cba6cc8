//! Rounds and their uploads.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension as _};
use theriac_audit::leaf::{AuditEvent, UpdateDecision};
use theriac_protocol::message::{AnnounceV1, DeclineReason, UpdateV1};
use theriac_protocol::refusal::{AbortReason, RefusalCode, RoundOutcome};
use theriac_protocol::round::{BaseModel, OpenRound};
use theriac_protocol::units::{Digest, ModelVersion, NodeId, Round};

use super::blob::BlobStore;
pub use super::history::{RoundDetail, RoundRow, UploadDetail, detail, list, outcomes};
use super::models::{self, ModelRow};
use super::records::{self, node_id};
use super::uploads::{self, Table};
use super::{StoreError, Work, evidence, from_sql, to_sql, wall_clock};
use crate::robust::{Row, RowEvidence, RuleName};

/// What a round runs under besides its announcement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoundRule {
    /// The rule.
    pub rule: RuleName,
    /// Assumed number of hostile edges.
    pub byzantine: usize,
    /// Fewest updates.
    pub quorum: usize,
}

/// Digest of everything that two rounds under the same terms have in common. A round that was open under other terms
/// is not resumed.
pub fn terms_digest(announce: &AnnounceV1, rule: RoundRule) -> Digest {
    let common = AnnounceV1 {
        round: Round(0),
        nonce: 0,
        base_version: ModelVersion(0),
        base_digest: Digest::default(),
        deadline_ms: 0,
        ..announce.clone()
    };
    let text = serde_json::to_string(&(common, rule.rule, rule.byzantine, rule.quorum)).unwrap_or_default();
    Digest::of(text.as_bytes())
}

/// Records a round as open. One that was left open, because a roll-over came while it was on its way here, ends in the same transaction.
///
/// # Errors
/// [`StoreError::Conflict`]: the number, or a higher one, was used; [`StoreError::Database`].
pub fn open(
    work: &Work<'_>,
    announce: &AnnounceV1,
    cohort: &[NodeId],
    rule: RoundRule,
) -> Result<(), StoreError> {
    let last = last_round(work.connection())?;
    if last >= announce.round {
        return Err(StoreError::Conflict(format!(
            "round {} cannot open: round {last} was there already",
            announce.round
        )));
    }
    let stale = unfinished(work.connection())?.map(|unfinished| unfinished.open.round);
    if let Some(stale) = stale {
        abort(work, stale, AbortReason::Operator)?;
    }
    let now = wall_clock();
    let digest = terms_digest(announce, rule);
    let terms = serde_json::to_string(announce).map_err(|error| StoreError::Conflict(error.to_string()))?;
    work.connection()
        .prepare_cached(
            "INSERT INTO round (round, state, nonce, base_version, base_digest, terms, terms_digest, rule, byzantine,
                 quorum, opened_unix_ms, deadline_unix_ms)
             VALUES (?1, 'open', ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
        )?
        .execute((
            to_sql(announce.round.0),
            announce.nonce.to_le_bytes(),
            to_sql(announce.base_version.0),
            announce.base_digest.0,
            terms,
            digest.0,
            rule.rule.to_string(),
            to_sql(rule.byzantine as u64),
            to_sql(rule.quorum as u64),
            to_sql(now.0),
            to_sql(now.0.saturating_add(announce.deadline_ms.into())),
        ))?;
    let mut member = work
        .connection()
        .prepare_cached("INSERT INTO cohort (round, node) VALUES (?1, ?2)")?;
    for node in cohort {
        member.execute((to_sql(announce.round.0), node.as_str()))?;
    }
    work.audit(AuditEvent::RoundOpened {
        round: announce.round,
        base_version: announce.base_version,
        base_digest: announce.base_digest,
        terms_digest: digest,
        rule: rule.rule.to_string(),
        quorum: u32::try_from(rule.quorum).unwrap_or(u32::MAX),
    })?;
    Ok(())
}

/// Notes that a node takes no part.
///
/// # Errors
/// [`StoreError::Database`].
pub fn decline(
    work: &Work<'_>,
    round: Round,
    node: &NodeId,
    reason: DeclineReason,
) -> Result<(), StoreError> {
    work.connection()
        .prepare_cached(
            "INSERT INTO cohort (round, node, declined) SELECT ?1, ?2, ?3 FROM round WHERE round = ?1 AND state = 'open'
             ON CONFLICT (round, node) DO UPDATE SET declined = ?3",
        )?
        .execute((to_sql(round.0), node.as_str(), decline_word(reason)))?;
    Ok(())
}

/// The word for a reason to decline.
pub fn decline_word(reason: DeclineReason) -> &'static str {
    match reason {
        DeclineReason::BudgetSpent => "budget_spent",
        DeclineReason::TermsTooWeak => "terms_too_weak",
        DeclineReason::TooFewBlocks => "too_few_blocks",
        DeclineReason::UnknownLayout => "unknown_layout",
        DeclineReason::StorageUnavailable => "storage_unavailable",
        DeclineReason::ReceiveOnly => "receive_only",
    }
}

/// What a receipt is signed over, from the committed row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredUpload {
    /// Digest of the payload.
    pub payload_digest: Digest,
    /// Position of the verdict in the audit log.
    pub leaf_index: u64,
    /// The ledger head that is counter-signed.
    pub ledger_head: Digest,
}

/// Stores an update with its verdict and moves the site's ledger head on. A payload that does not fit a row is a
/// durable blob already.
///
/// # Errors
/// [`StoreError::Database`]: one update per round and site. [`StoreError::Full`].
pub fn insert_upload(
    work: &Work<'_>,
    node: &NodeId,
    header: &UpdateV1,
    payload: &[u8],
    norm: f64,
    rule: RuleName,
) -> Result<StoredUpload, StoreError> {
    uploads::insert(work, Table::InTime, node, header, payload, norm, rule)
}

/// Audits and counts a refused update; `detail`: what was found in it, beside what was expected. One that is refused for good marks its sender in the round, while that is open.
///
/// # Errors
/// [`StoreError::Database`].
pub fn refuse_upload(
    work: &Work<'_>,
    node: &NodeId,
    header: &UpdateV1,
    code: RefusalCode,
    rule: RuleName,
    detail: Option<&str>,
) -> Result<(), StoreError> {
    work.audit(AuditEvent::UpdateVerdict {
        round: header.round,
        node: node.clone(),
        verdict: UpdateDecision::Refused,
        reason: Some(code),
        payload_digest: header.payload_digest,
        rule: rule.to_string(),
        ledger_head: header.privacy.ledger_head,
    })?;
    work.connection()
        .prepare_cached("UPDATE round SET refused = refused + 1 WHERE round = ?1")?
        .execute([to_sql(header.round.0)])?;
    if !code.retryable() {
        work.connection()
            .prepare_cached(
                "INSERT INTO cohort (round, node, refused, refused_detail) SELECT ?1, ?2, ?3, ?4 FROM round
                     WHERE round = ?1 AND state = 'open'
                 ON CONFLICT (round, node) DO UPDATE SET refused = ?3, refused_detail = ?4",
            )?
            .execute((to_sql(header.round.0), node.as_str(), code.word(), detail))?;
    }
    if code == RefusalCode::RoundClosed {
        evidence::record_late(work, header.round, header, node, None)?;
    }
    records::count_refusal(work, node, code)
}

/// Nodes whose update was refused for good while the round was open, and that have none stored, with the refusal's word.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Corrupt`].
pub fn refused(connection: &Connection, round: Round) -> Result<BTreeMap<NodeId, String>, StoreError> {
    let mut statement = connection.prepare_cached(
        "SELECT node, refused FROM cohort WHERE round = ?1 AND refused IS NOT NULL
             AND node NOT IN (SELECT node FROM upload WHERE round = ?1)",
    )?;
    let mut rows = statement.query([to_sql(round.0)])?;
    let mut nodes = BTreeMap::new();
    while let Some(row) = rows.next()? {
        nodes.insert(node_id(&row.get::<_, String>(0)?)?, row.get(1)?);
    }
    Ok(nodes)
}

/// What is known of a stored update, for its receipt.
///
/// # Errors
/// [`StoreError::Database`].
pub fn stored_upload(
    connection: &Connection,
    round: Round,
    node: &NodeId,
) -> Result<Option<StoredUpload>, StoreError> {
    let row = connection
        .prepare_cached(
            "SELECT payload_digest, leaf_index, ledger_head FROM upload WHERE round = ?1 AND node = ?2
             UNION ALL
             SELECT payload_digest, leaf_index, ledger_head FROM late_upload WHERE round = ?1 AND node = ?2",
        )?
        .query_row((to_sql(round.0), node.as_str()), |row| {
            Ok(StoredUpload {
                payload_digest: Digest(row.get(0)?),
                leaf_index: from_sql(row.get(1)?),
                ledger_head: Digest(row.get(2)?),
            })
        })
        .optional()?;
    Ok(row)
}

/// A stored update as a rule reads it. Blocks for a blob.
///
/// # Errors
/// [`StoreError::NotFound`], [`StoreError::BlobMissing`], [`StoreError::BlobCorrupt`], [`StoreError::Gone`].
pub fn upload_row(
    connection: &Connection,
    blobs: &BlobStore,
    round: Round,
    node: &NodeId,
) -> Result<Row, StoreError> {
    uploads::row(connection, blobs, Table::InTime, round, node)
}

/// Ends a round with a model: model, evidence, round and audit leaves in this one transaction. The model's blob, when it
/// has one, is durable already.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Full`].
pub fn publish(
    work: &Work<'_>,
    model: &ModelRow,
    payload: &[u8],
    members: &[(NodeId, Digest)],
    evidence: &[RowEvidence],
) -> Result<(), StoreError> {
    let open = "SELECT count(*) FROM round WHERE round = ?1 AND state = 'open'";
    let open: i64 = work
        .connection()
        .query_row(open, [to_sql(model.round.0)], |row| row.get(0))?;
    if open != 1 {
        return Err(StoreError::Conflict(format!(
            "round {} is not open any more",
            model.round
        )));
    }
    models::insert_model(work, model, payload)?;
    let mut update = work.connection().prepare_cached(
        "UPDATE upload SET distance = ?3, trimmed_share = ?4 WHERE round = ?1 AND node = ?2",
    )?;
    for ((node, _), row) in members.iter().zip(evidence) {
        update.execute((
            to_sql(model.round.0),
            node.as_str(),
            row.distance,
            row.trimmed_share,
        ))?;
    }
    work.connection().execute(
        "UPDATE round SET state = 'published', closed_unix_ms = ?2, model_version = ?3 WHERE round = ?1",
        (
            to_sql(model.round.0),
            to_sql(wall_clock().0),
            to_sql(model.version.0),
        ),
    )?;
    work.audit(AuditEvent::ModelReleased {
        version: model.version,
        round: model.round,
        digest: model.digest,
        rule: model.rule.clone(),
        members: members.to_vec(),
    })?;
    work.audit(AuditEvent::RoundClosed {
        round: model.round,
        outcome: RoundOutcome::Published(model.version),
        members: u32::try_from(members.len()).unwrap_or(u32::MAX),
    })?;
    Ok(())
}

/// Ends a round without a model.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Full`].
pub fn abort(work: &Work<'_>, round: Round, reason: AbortReason) -> Result<(), StoreError> {
    abort_as(work, round, reason, abort_word(reason))
}

/// As [`abort`], with a finer `word` for the round's row than the wire has a reason for.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Full`].
pub fn abort_as(work: &Work<'_>, round: Round, reason: AbortReason, word: &str) -> Result<(), StoreError> {
    let ended = work.connection().execute(
        "UPDATE round SET state = 'aborted', closed_unix_ms = ?2, abort_reason = ?3 WHERE round = ?1 AND state = 'open'",
        (to_sql(round.0), to_sql(wall_clock().0), word),
    )?;
    let stored = "SELECT count(*) FROM upload WHERE round = ?1";
    let members = work
        .connection()
        .query_row(stored, [to_sql(round.0)], |row| row.get(0))?;
    work.audit(AuditEvent::RoundClosed {
        round,
        outcome: RoundOutcome::Aborted(reason),
        members,
    })?;
    // One that had ended before has its records.
    if ended == 1 {
        evidence::record_aborted(work, round)?;
    }
    Ok(())
}

/// The word for a reason to end without a model.
pub fn abort_word(reason: AbortReason) -> &'static str {
    match reason {
        AbortReason::QuorumMissed => "quorum_missed",
        AbortReason::AggregationFailed => "aggregation_failed",
        AbortReason::Operator => "operator",
    }
}

/// Deletes payloads of rounds (and models of rounds) at or before `last`; rows and their digests stay, and so do the models that later rounds
/// build on, and releases that count in later rounds as well: those rounds can be done again.
///
/// # Errors
/// [`StoreError::Database`].
pub fn forget_payloads(work: &Work<'_>, last: Round) -> Result<(), StoreError> {
    let last = to_sql(last.0);
    work.connection().execute(
        "UPDATE upload SET place = 'gone', payload = NULL WHERE round <= ?1 AND place <> 'gone'
             AND NOT EXISTS (SELECT 1 FROM kept_release AS kept WHERE kept.node = upload.node AND kept.round = upload.round)",
        [last],
    )?;
    work.connection().execute(
        "UPDATE late_upload SET place = 'gone', payload = NULL WHERE round <= ?1 AND place <> 'gone'
             AND NOT EXISTS (SELECT 1 FROM kept_release AS kept WHERE kept.node = late_upload.node AND kept.round = late_upload.round)",
        [last],
    )?;
    work.connection().execute(
        "UPDATE model SET place = 'gone', payload = NULL WHERE round BETWEEN 1 AND ?1 AND place <> 'gone'
             AND version < (SELECT max(version) FROM model)
             AND version NOT IN (SELECT base_version FROM round WHERE state = 'open' OR round > ?1)",
        [last],
    )?;
    work.connection().execute(
        "UPDATE optimizer_state SET place = 'gone', payload = NULL WHERE place <> 'gone'
             AND version IN (SELECT version FROM model WHERE place = 'gone')",
        [],
    )?;
    Ok(())
}

/// Every digest whose blob a row names.
///
/// # Errors
/// [`StoreError::Database`].
pub fn named_blobs(connection: &Connection) -> Result<BTreeSet<Digest>, StoreError> {
    let mut statement = connection.prepare_cached(
        "SELECT payload_digest FROM upload WHERE place = 'blob' UNION SELECT digest FROM model WHERE place = 'blob'
             UNION SELECT digest FROM optimizer_state WHERE place = 'blob'
             UNION SELECT payload_digest FROM late_upload WHERE place = 'blob'",
    )?;
    let rows = statement.query_map([], |row| Ok(Digest(row.get(0)?)))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The round that was open when the program ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Unfinished {
    /// What the machine resumes from.
    pub open: OpenRound,
    /// Its terms, see [`terms_digest`].
    pub terms_digest: Digest,
    /// What its stored updates are signed over.
    pub uploads: BTreeMap<NodeId, StoredUpload>,
}

/// Finds the open round.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Corrupt`].
pub fn unfinished(connection: &Connection) -> Result<Option<Unfinished>, StoreError> {
    type Columns = (i64, [u8; 8], i64, [u8; 32], [u8; 32], i64);
    let row: Option<Columns> = connection
        .query_row(
            "SELECT round, nonce, base_version, base_digest, terms_digest, deadline_unix_ms FROM round
             WHERE state = 'open'",
            [],
            |row| {
                Ok((
                    row.get(0)?,
                    row.get(1)?,
                    row.get(2)?,
                    row.get(3)?,
                    row.get(4)?,
                    row.get(5)?,
                ))
            },
        )
        .optional()?;
    let Some((number, nonce, version, base, terms, deadline)) = row else {
        return Ok(None);
    };
    let (mut cohort, mut declined, mut uploads) = (BTreeSet::new(), BTreeSet::new(), BTreeMap::new());
    let mut statement =
        connection.prepare("SELECT node, declined IS NOT NULL FROM cohort WHERE round = ?1")?;
    let mut rows = statement.query([number])?;
    while let Some(row) = rows.next()? {
        let node = node_id(&row.get::<_, String>(0)?)?;
        if row.get(1)? {
            declined.insert(node.clone());
        }
        cohort.insert(node);
    }
    let mut statement = connection
        .prepare("SELECT node, payload_digest, leaf_index, ledger_head FROM upload WHERE round = ?1")?;
    let mut rows = statement.query([number])?;
    while let Some(row) = rows.next()? {
        let stored = StoredUpload {
            payload_digest: Digest(row.get(1)?),
            leaf_index: from_sql(row.get(2)?),
            ledger_head: Digest(row.get(3)?),
        };
        uploads.insert(node_id(&row.get::<_, String>(0)?)?, stored);
    }
    let refused = refused(connection, Round(from_sql(number)))?;
    let open = OpenRound {
        round: Round(from_sql(number)),
        nonce: u64::from_le_bytes(nonce),
        base: BaseModel {
            version: ModelVersion(from_sql(version)),
            digest: Digest(base),
        },
        cohort,
        stored: uploads
            .iter()
            .map(|(node, upload)| (node.clone(), upload.payload_digest))
            .collect(),
        declined,
        faulty: refused
            .iter()
            .filter(|(_, code)| crate::evidence::tells(code))
            .map(|(node, _)| node.clone())
            .collect(),
        refused: refused.into_keys().collect(),
        remaining: Duration::from_millis(from_sql(deadline).saturating_sub(wall_clock().0)),
    };
    Ok(Some(Unfinished {
        open,
        terms_digest: Digest(terms),
        uploads,
    }))
}

/// The highest round number ever used; 0 for none.
///
/// # Errors
/// [`StoreError::Database`].
pub fn last_round(connection: &Connection) -> Result<Round, StoreError> {
    let last: Option<i64> = connection.query_row("SELECT max(round) FROM round", [], |row| row.get(0))?;
    Ok(Round(from_sql(last.unwrap_or(0))))
}
