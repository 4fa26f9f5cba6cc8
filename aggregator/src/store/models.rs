//! Published models.

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension as _, Row};
use theriac_audit::leaf::AuditEvent;
use theriac_protocol::units::{Digest, ModelVersion, Round, Timestamp};

use super::blob::{BlobStore, ROW_BYTES_MAX};
use super::{StoreError, Work, from_sql, to_sql, wall_clock};

/// A published model without its values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelRow {
    /// Its version.
    pub version: ModelVersion,
    /// The round that made it; 0 for the initial model and for roll-backs.
    pub round: Round,
    /// Digest of its layout.
    pub layout_digest: Digest,
    /// Number of values.
    pub values: u32,
    /// Digest of its payload.
    pub digest: Digest,
    /// The rule that made it.
    pub rule: String,
    /// Number of updates in it.
    pub contributors: u32,
    /// The version that it repeats.
    pub rolled_back_to: Option<ModelVersion>,
    /// When it was released.
    pub released: Timestamp,
}

const MODEL_COLUMNS: &str =
    "version, round, layout_digest, count, digest, rule, contributors, rolled_back_to, released_unix_ms";

fn model_row(row: &Row<'_>) -> rusqlite::Result<ModelRow> {
    Ok(ModelRow {
        version: ModelVersion(from_sql(row.get(0)?)),
        round: Round(from_sql(row.get(1)?)),
        layout_digest: Digest(row.get(2)?),
        values: row.get(3)?,
        digest: Digest(row.get(4)?),
        rule: row.get(5)?,
        contributors: row.get(6)?,
        rolled_back_to: row
            .get::<_, Option<i64>>(7)?
            .map(|version| ModelVersion(from_sql(version))),
        released: Timestamp(from_sql(row.get(8)?)),
    })
}

/// All models, newest first.
///
/// # Errors
/// [`StoreError::Database`].
pub fn models(connection: &Connection, limit: u32) -> Result<Vec<ModelRow>, StoreError> {
    let query = format!("SELECT {MODEL_COLUMNS} FROM model ORDER BY version DESC LIMIT ?1");
    let mut statement = connection.prepare_cached(&query)?;
    let rows = statement.query_map([limit], model_row)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// One model.
///
/// # Errors
/// [`StoreError::NotFound`], [`StoreError::Database`].
pub fn model(connection: &Connection, version: ModelVersion) -> Result<ModelRow, StoreError> {
    let query = format!("SELECT {MODEL_COLUMNS} FROM model WHERE version = ?1");
    connection
        .prepare_cached(&query)?
        .query_row([to_sql(version.0)], model_row)
        .optional()?
        .ok_or_else(|| StoreError::NotFound {
            what: "model version",
            name: version.to_string(),
        })
}

/// The model in force.
///
/// # Errors
/// [`StoreError::NotFound`] when the store has none: it was not initialised.
pub fn current_model(connection: &Connection) -> Result<ModelRow, StoreError> {
    models(connection, 1)?.pop().ok_or_else(|| StoreError::NotFound {
        what: "model version",
        name: "0".to_owned(),
    })
}

/// A model's values as they are sent. Blocks for a blob.
///
/// # Errors
/// [`StoreError::Gone`], [`StoreError::BlobMissing`], [`StoreError::BlobCorrupt`], [`StoreError::NotFound`].
pub fn model_payload(
    connection: &Connection,
    blobs: &BlobStore,
    version: ModelVersion,
) -> Result<Bytes, StoreError> {
    let name = format!("model {version}");
    let row = connection
        .query_row(
            "SELECT place, payload, digest FROM model WHERE version = ?1",
            [to_sql(version.0)],
            |row| {
                Ok((
                    row.get::<_, String>(0)?,
                    row.get::<_, Option<Vec<u8>>>(1)?,
                    row.get::<_, [u8; 32]>(2)?,
                ))
            },
        )
        .optional()?
        .ok_or_else(|| StoreError::NotFound {
            what: "model version",
            name: version.to_string(),
        })?;
    payload(blobs, row, name)
}

/// The bytes of a row, wherever they are.
pub(super) fn payload(
    blobs: &BlobStore,
    (place, payload, digest): (String, Option<Vec<u8>>, [u8; 32]),
    row: String,
) -> Result<Bytes, StoreError> {
    let expected = Digest(digest);
    match (place.as_str(), payload) {
        ("row", Some(bytes)) => {
            let found = Digest::of(&bytes);
            if found == expected {
                Ok(bytes.into())
            } else {
                Err(StoreError::Corrupt {
                    row,
                    reason: format!("its payload has SHA-256 {found}, not {expected}"),
                })
            }
        }
        ("blob", _) => blobs.get(&expected, &row),
        _ => Err(StoreError::Gone { row }),
    }
}

/// Where a payload of so many bytes goes.
pub(crate) fn fits_row(bytes: usize) -> bool {
    bytes <= ROW_BYTES_MAX
}

/// Puts a model into the store. Its blob, when it has one, is durable already.
///
/// # Errors
/// [`StoreError::Database`]: a version is never written twice.
pub fn insert_model(work: &Work<'_>, model: &ModelRow, payload: &[u8]) -> Result<(), StoreError> {
    let in_row = fits_row(payload.len());
    work.connection()
        .prepare_cached(
            "INSERT INTO model (version, round, layout_digest, count, digest, rule, contributors, rolled_back_to,
                 released_unix_ms, place, payload) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
        )?
        .execute((
            to_sql(model.version.0),
            to_sql(model.round.0),
            model.layout_digest.0,
            model.values,
            model.digest.0,
            &model.rule,
            model.contributors,
            model.rolled_back_to.map(|version| to_sql(version.0)),
            to_sql(model.released.0),
            if in_row { "row" } else { "blob" },
            in_row.then_some(payload),
        ))?;
    Ok(())
}

/// Releases an old model again, under a new version: versions only rise, so that no edge takes it for a replay. What later rounds took in of sites' moments
/// counts no more.
///
/// # Errors
/// [`StoreError::NotFound`], [`StoreError::Gone`]; [`StoreError::Conflict`] when it is in force already.
pub fn roll_back(work: &Work<'_>, blobs: &BlobStore, to: ModelVersion) -> Result<ModelRow, StoreError> {
    let current = current_model(work.connection())?;
    let old = model(work.connection(), to)?;
    if old.digest == current.digest {
        return Err(StoreError::Conflict(format!(
            "version {to} is in force already, as version {}",
            current.version
        )));
    }
    let payload = model_payload(work.connection(), blobs, to)?;
    let next = ModelRow {
        version: current.version.next(),
        round: Round(0),
        rule: format!("rollback to {to}"),
        rolled_back_to: Some(to),
        released: wall_clock(),
        ..old
    };
    super::sums::roll_back(work, to)?;
    insert_model(work, &next, &payload)?;
    work.audit(AuditEvent::ModelReleased {
        version: next.version,
        round: next.round,
        digest: next.digest,
        rule: next.rule.clone(),
        members: Vec::new(),
    })?;
    Ok(next)
}
