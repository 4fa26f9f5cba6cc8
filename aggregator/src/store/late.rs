//! Updates that came after their round's end, and what of earlier rounds a site's row is made of.

use rusqlite::{Connection, OptionalExtension as _};
use theriac_protocol::message::{AnnounceV1, UpdateV1};
use theriac_protocol::units::{Digest, ModelVersion, NodeId, Round};

use super::blob::BlobStore;
use super::records::node_id;
use super::rounds::StoredUpload;
use super::uploads::{self, Table};
use super::{StoreError, Work, evidence, from_sql, history, models, to_sql};
use crate::average::{SiteAverage, Stale, staleness_weight};
use crate::evidence::StoredRow;
use crate::robust::{Row, RuleName};

/// Reason in the record of a late update that waits for the next round.
const KEPT: &str = "kept_for_next_round";

/// Stores an update that came after its round's end, with its verdict, and moves the site's ledger head on. The same bytes again, after a restart, are the
/// same update. A payload that does not fit a row is a durable blob already.
///
/// # Errors
/// [`StoreError::Conflict`]: other bytes are stored for this round and site. [`StoreError::Database`], [`StoreError::Full`].
pub fn insert(
    work: &Work<'_>,
    node: &NodeId,
    header: &UpdateV1,
    payload: &[u8],
    norm: f64,
    rule: RuleName,
) -> Result<StoredUpload, StoreError> {
    if let Some(stored) = super::rounds::stored_upload(work.connection(), header.round, node)? {
        return if stored.payload_digest == header.payload_digest {
            Ok(stored)
        } else {
            let why = format!("another update of {node} for round {} is stored", header.round);
            Err(StoreError::Conflict(why))
        };
    }
    let stored = uploads::insert(work, Table::Late, node, header, payload, norm, rule)?;
    evidence::record_late(work, header.round, header, node, Some(KEPT))?;
    Ok(stored)
}

/// Records the late updates of a round that came before its own records were written.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Corrupt`], [`StoreError::Full`].
pub(super) fn record_all(work: &Work<'_>, round: Round) -> Result<(), StoreError> {
    let early: Vec<(String, String)> = work
        .connection()
        .prepare_cached("SELECT node, header FROM late_upload WHERE round = ?1 ORDER BY node")?
        .query_map([to_sql(round.0)], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<Result<_, _>>()?;
    for (node, header) in early {
        let node = node_id(&node)?;
        let header = read_header(&header, &node)?;
        evidence::record_late(work, round, &header, &node, Some(KEPT))?;
    }
    Ok(())
}

fn read_header(text: &str, node: &NodeId) -> Result<UpdateV1, StoreError> {
    serde_json::from_str(text).map_err(|error| StoreError::Corrupt {
        row: format!("late upload of {node}"),
        reason: error.to_string(),
    })
}

/// Notes that a late update was taken into a later round.
///
/// # Errors
/// [`StoreError::Database`].
pub(super) fn carry(work: &Work<'_>, of: Round, node: &NodeId, into: Round) -> Result<(), StoreError> {
    work.connection()
        .prepare_cached("UPDATE late_upload SET carried_into = ?3 WHERE round = ?1 AND node = ?2")?
        .execute((to_sql(of.0), node.as_str(), to_sql(into.0)))?;
    Ok(())
}

/// Late updates of the round before `announce` that may be taken into it, by name: of sites that are active, have none of their own in it and were not refused in
/// it for what they sent, whose releases were not dropped since, on the same terms, and made for its base or for the one that this base came of. After a roll-back there are none.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Corrupt`], [`StoreError::NotFound`].
pub fn waiting(connection: &Connection, announce: &AnnounceV1) -> Result<Vec<StoredRow>, StoreError> {
    let Some(before) = announce.round.0.checked_sub(1).filter(|round| *round > 0) else {
        return Ok(Vec::new());
    };
    let Some(age) = age(connection, announce, Round(before))? else {
        return Ok(Vec::new());
    };
    select(
        connection,
        "round = ?1 AND carried_into IS NULL AND place <> 'gone'
             AND node NOT IN (SELECT node FROM upload WHERE round = ?2)
             AND node NOT IN (SELECT node FROM cohort WHERE round = ?2 AND refused IS NOT NULL)
             AND node IN (SELECT node FROM site WHERE state = 'active' AND kept_from <= ?1)",
        (to_sql(before), to_sql(announce.round.0)),
        announce,
        age,
    )
}

/// Late updates that were taken into the round of `announce`, by name.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Corrupt`], [`StoreError::NotFound`].
pub fn carried(connection: &Connection, announce: &AnnounceV1) -> Result<Vec<StoredRow>, StoreError> {
    let query = "SELECT round FROM late_upload WHERE carried_into = ?1 LIMIT 1";
    let of: Option<i64> = connection
        .prepare_cached(query)?
        .query_row([to_sql(announce.round.0)], |row| row.get(0))
        .optional()?;
    let Some(of) = of else { return Ok(Vec::new()) };
    let age = age(connection, announce, Round(from_sql(of)))?.unwrap_or(1);
    let into = to_sql(announce.round.0);
    select(
        connection,
        "round = ?1 AND carried_into = ?2",
        (of, into),
        announce,
        age,
    )
}

fn select(
    connection: &Connection,
    which: &str,
    parameters: (i64, i64),
    announce: &AnnounceV1,
    age: u32,
) -> Result<Vec<StoredRow>, StoreError> {
    let query = format!("SELECT node, header, round FROM late_upload WHERE {which} ORDER BY node");
    let mut statement = connection.prepare_cached(&query)?;
    let mut rows = statement.query(parameters)?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        let node = node_id(&row.get::<_, String>(0)?)?;
        let header = read_header(&row.get::<_, String>(1)?, &node)?;
        found.push(StoredRow {
            node,
            header,
            stale: Some(Stale {
                of_round: from_sql(row.get(2)?),
                age,
                weight: staleness_weight(announce.kind, age),
            }),
        });
    }
    Ok(found)
}

/// How many models the base of round `of` is behind that of `announce`: 0 or 1; `None`: their terms differ, or the model between them is not that round's.
fn age(connection: &Connection, announce: &AnnounceV1, of: Round) -> Result<Option<u32>, StoreError> {
    let before = match history::announced(connection, of) {
        Ok(before) => before,
        Err(StoreError::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    if !same_terms(&before, announce) {
        return Ok(None);
    }
    if before.base_version == announce.base_version {
        return Ok(Some(0));
    }
    let base = models::model(connection, announce.base_version)?;
    Ok((base.round == of && base.rolled_back_to.is_none()).then_some(1))
}

/// Whether updates for one can stand beside updates for the other.
fn same_terms(one: &AnnounceV1, other: &AnnounceV1) -> bool {
    let common = |announce: &AnnounceV1| AnnounceV1 {
        round: Round(0),
        nonce: 0,
        base_version: ModelVersion(0),
        base_digest: Digest::default(),
        deadline_ms: 0,
        ..announce.clone()
    };
    common(one) == common(other)
}

/// The rounds before `announce` whose updates stand in a site's mean, newest first, with their ages: those whose models led to this base, one after another,
/// on the same terms. A roll-back ends them: what led to a model that was taken back does not come again.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Corrupt`], [`StoreError::NotFound`].
pub fn lineage(
    connection: &Connection,
    announce: &AnnounceV1,
    average: SiteAverage,
) -> Result<Vec<(Round, u64)>, StoreError> {
    let mut found = Vec::new();
    let mut at = announce.clone();
    loop {
        let base = models::model(connection, at.base_version)?;
        if base.round.0 == 0 || base.rolled_back_to.is_some() {
            return Ok(found);
        }
        let age = announce.round.0.saturating_sub(base.round.0);
        let before = history::announced(connection, base.round)?;
        if age >= average.rounds() || !same_terms(&before, announce) {
            return Ok(found);
        }
        found.push((base.round, age));
        at = before;
    }
}

/// The update with which a site counted in a round, and what it was multiplied by; `None` when it did not count, or when the payload was deleted after its time.
/// Blocks for a blob.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Corrupt`], [`StoreError::BlobMissing`], [`StoreError::BlobCorrupt`].
pub fn counted(
    connection: &Connection,
    blobs: &BlobStore,
    round: Round,
    node: &NodeId,
) -> Result<Option<(Row, f64)>, StoreError> {
    let counts = "SELECT record FROM decision WHERE round = ?1 AND node = ?2 AND decision = 'combined'";
    let record: Option<String> = connection
        .prepare_cached(counts)?
        .query_row((to_sql(round.0), node.as_str()), |row| row.get(0))
        .optional()?;
    let Some(record) = record else { return Ok(None) };
    let record: crate::evidence::Record =
        serde_json::from_str(&record).map_err(|error| StoreError::Corrupt {
            row: format!("the record of {node} in round {round}"),
            reason: error.to_string(),
        })?;
    let row = match record.stale {
        Some(stale) => row(connection, blobs, Round(stale.of_round), node),
        None => super::rounds::upload_row(connection, blobs, round, node),
    };
    match row {
        Ok(row) => Ok(Some((row, record.stale.map_or(1.0, |stale| stale.weight)))),
        Err(StoreError::Gone { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A late update as a rule reads it. Blocks for a blob.
///
/// # Errors
/// As [`upload_row`](super::rounds::upload_row).
pub fn row(
    connection: &Connection,
    blobs: &BlobStore,
    round: Round,
    node: &NodeId,
) -> Result<Row, StoreError> {
    uploads::row(connection, blobs, Table::Late, round, node)
}
