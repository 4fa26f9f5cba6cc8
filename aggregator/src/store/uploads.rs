//! Accepted updates: those that came in time, and those that came after their round's end. Two tables with the same columns.

use rusqlite::{Connection, OptionalExtension as _, ToSql};
use theriac_audit::leaf::{AuditEvent, UpdateDecision};
use theriac_protocol::message::{Encoding, UpdateV1};
use theriac_protocol::units::{NodeId, Round};

use super::blob::BlobStore;
use super::rounds::StoredUpload;
use super::{StoreError, Work, models, records, to_sql, wall_clock};
use crate::robust::{Row, RuleName};

/// Where an accepted update lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Table {
    /// It came for the round that was open.
    InTime,
    /// It came after its round's end.
    Late,
}

impl Table {
    fn name(self) -> &'static str {
        match self {
            Self::InTime => "upload",
            Self::Late => "late_upload",
        }
    }

    /// In words, for errors.
    pub(super) fn what(self) -> &'static str {
        match self {
            Self::InTime => "upload",
            Self::Late => "late upload",
        }
    }
}

/// How a payload is written whose row has this `scale`.
pub(super) fn encoding(scale: Option<f64>) -> Encoding {
    #[expect(clippy::cast_possible_truncation, reason = "it was written from an f32")]
    scale.map_or(Encoding::F32, |scale| Encoding::Int8 { scale: scale as f32 })
}

/// Stores an update with its verdict and moves the site's ledger head on. A payload that does not fit a row is a durable blob already.
///
/// # Errors
/// [`StoreError::Database`]: one update per round and site. [`StoreError::Full`].
pub(super) fn insert(
    work: &Work<'_>,
    table: Table,
    node: &NodeId,
    header: &UpdateV1,
    payload: &[u8],
    norm: f64,
    rule: RuleName,
) -> Result<StoredUpload, StoreError> {
    let leaf_index = work.audit(AuditEvent::UpdateVerdict {
        round: header.round,
        node: node.clone(),
        verdict: UpdateDecision::Accepted,
        reason: None,
        payload_digest: header.payload_digest,
        rule: rule.to_string(),
        ledger_head: header.privacy.ledger_head,
    })?;
    let in_row = models::fits_row(payload.len());
    // JSON may lose the last bit of a float, and the scale must come back exactly: it has its own column.
    let scale = match header.encoding {
        Encoding::F32 => None,
        Encoding::Int8 { scale } => Some(f64::from(scale)),
    };
    let text = serde_json::to_string(header).map_err(|error| StoreError::Conflict(error.to_string()))?;
    let (round, now, bytes) = (
        to_sql(header.round.0),
        to_sql(wall_clock().0),
        to_sql(payload.len() as u64),
    );
    let (leaf, place) = (to_sql(leaf_index), if in_row { "row" } else { "blob" });
    let (name, stored) = (node.as_str(), in_row.then_some(payload));
    let mut values: Vec<&dyn ToSql> = vec![
        &round,
        &name,
        &header.payload_digest.0,
        &scale,
        &text,
        &header.privacy.ledger_head.0,
        &leaf,
        &now,
        &norm,
        &place,
        &stored,
    ];
    let mut columns = "round, node, payload_digest, scale, header, ledger_head, leaf_index, stored_unix_ms, norm, place, payload".to_owned();
    let mut places = "?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11".to_owned();
    if table == Table::InTime {
        values.push(&bytes);
        columns.push_str(", bytes");
        places.push_str(", ?12");
    }
    let query = format!("INSERT INTO {} ({columns}) VALUES ({places})", table.name());
    work.connection().prepare_cached(&query)?.execute(&values[..])?;
    records::advance_ledger(work, node, &header.privacy)?;
    Ok(StoredUpload {
        payload_digest: header.payload_digest,
        leaf_index,
        ledger_head: header.privacy.ledger_head,
    })
}

/// A stored update as a rule reads it. Blocks for a blob.
///
/// # Errors
/// [`StoreError::NotFound`], [`StoreError::BlobMissing`], [`StoreError::BlobCorrupt`], [`StoreError::Gone`].
pub(super) fn row(
    connection: &Connection,
    blobs: &BlobStore,
    table: Table,
    round: Round,
    node: &NodeId,
) -> Result<Row, StoreError> {
    let query = format!(
        "SELECT scale, place, payload, payload_digest FROM {} WHERE round = ?1 AND node = ?2",
        table.name()
    );
    let row = connection
        .prepare_cached(&query)?
        .query_row((to_sql(round.0), node.as_str()), |row| {
            Ok((row.get(0)?, (row.get(1)?, row.get(2)?, row.get(3)?)))
        })
        .optional()?;
    let what = table.what();
    let (scale, place) = row.ok_or_else(|| StoreError::NotFound {
        what,
        name: format!("{round}/{node}"),
    })?;
    Ok(Row {
        encoding: encoding(scale),
        payload: models::payload(blobs, place, format!("{what} {round}/{node}"))?,
    })
}
