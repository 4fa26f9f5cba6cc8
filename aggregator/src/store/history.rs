//! Rounds as they are listed: what each decided, and about whom.

use std::collections::BTreeMap;

use rusqlite::{Connection, OptionalExtension as _};
use serde::Serialize;
use theriac_privacy::central::CentralRound;
use theriac_protocol::message::AnnounceV1;
use theriac_protocol::units::{Digest, Round};

use super::{StoreError, from_sql, to_sql};

/// Rounds by outcome: published, aborted.
///
/// # Errors
/// [`StoreError::Database`].
pub fn outcomes(connection: &Connection) -> Result<(u64, u64), StoreError> {
    let counts = "SELECT count(*) FILTER (WHERE state = 'published'), count(*) FILTER (WHERE state = 'aborted') FROM round";
    let (published, aborted) = connection.query_row(counts, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok((from_sql(published), from_sql(aborted)))
}

/// A round as it is listed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RoundRow {
    /// Its number.
    pub round: u64,
    /// `open`, `published` or `aborted`.
    pub state: String,
    /// Why it published nothing.
    pub abort_reason: Option<String>,
    /// The model it built on.
    pub base_version: u64,
    /// The version of the model it made.
    pub published: Option<u64>,
    /// The rule.
    pub rule: String,
    /// Assumed number of hostile edges.
    pub byzantine: u64,
    /// Fewest updates.
    pub quorum: u64,
    /// Updates stored.
    pub accepted: u64,
    /// Updates refused.
    pub refused: u64,
    /// Nodes that declined.
    pub declined: u64,
    /// When it opened.
    pub opened_unix_ms: u64,
    /// When it ended.
    pub ended_unix_ms: Option<u64>,
}

/// Rounds, newest first.
///
/// # Errors
/// [`StoreError::Database`].
pub fn list(connection: &Connection, limit: u32) -> Result<Vec<RoundRow>, StoreError> {
    select(connection, "ORDER BY round DESC LIMIT ?1", limit.into())
}

fn select(connection: &Connection, which: &str, parameter: i64) -> Result<Vec<RoundRow>, StoreError> {
    let mut statement = connection.prepare_cached(&format!(
        "SELECT round, state, abort_reason, base_version, model_version, rule, byzantine, quorum,
             (SELECT count(*) FROM upload WHERE upload.round = round.round),
             (SELECT count(*) FROM cohort WHERE cohort.round = round.round AND declined IS NOT NULL),
             opened_unix_ms, closed_unix_ms, refused FROM round {which}"
    ))?;
    let rows = statement.query_map([parameter], |row| {
        let number = |index| row.get::<_, i64>(index).map(from_sql);
        Ok(RoundRow {
            round: number(0)?,
            state: row.get(1)?,
            abort_reason: row.get(2)?,
            base_version: number(3)?,
            published: row.get::<_, Option<i64>>(4)?.map(from_sql),
            rule: row.get(5)?,
            byzantine: number(6)?,
            quorum: number(7)?,
            accepted: number(8)?,
            refused: number(12)?,
            declined: number(9)?,
            opened_unix_ms: number(10)?,
            ended_unix_ms: row.get::<_, Option<i64>>(11)?.map(from_sql),
        })
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// One round with the record of every node: enough to explain each decision.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RoundDetail {
    /// The round.
    #[serde(flatten)]
    pub round: RoundRow,
    /// Its terms as announced.
    pub terms: serde_json::Value,
    /// Stored updates by node.
    pub uploads: Vec<UploadDetail>,
    /// Nodes that declined, and why.
    pub declines: BTreeMap<String, String>,
    /// Nodes of which an update was refused for good, and why.
    pub refusals: BTreeMap<String, String>,
    /// Noise of the centre that was charged for it; absent: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub central_noise: Option<CentralRound>,
}

/// What the record holds of one update.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct UploadDetail {
    /// Who sent it.
    pub node: String,
    /// SHA-256 of the payload.
    pub payload_digest: String,
    /// Its size.
    pub bytes: u64,
    /// Euclidean norm.
    pub norm: f64,
    /// Distance from the combined values.
    pub distance: Option<f64>,
    /// Share of coordinates outside what the rule kept.
    pub trimmed_share: Option<f64>,
    /// Position of its verdict in the audit log.
    pub leaf_index: u64,
}

/// The terms of a round as they were announced.
///
/// # Errors
/// [`StoreError::NotFound`], [`StoreError::Corrupt`], [`StoreError::Database`].
pub fn announced(connection: &Connection, round: Round) -> Result<AnnounceV1, StoreError> {
    let query = "SELECT terms FROM round WHERE round = ?1";
    let text: Option<String> = connection
        .query_row(query, [to_sql(round.0)], |row| row.get(0))
        .optional()?;
    let text = text.ok_or_else(|| StoreError::NotFound {
        what: "round",
        name: round.to_string(),
    })?;
    serde_json::from_str(&text).map_err(|error| StoreError::Corrupt {
        row: format!("terms of round {round}"),
        reason: error.to_string(),
    })
}

/// One round.
///
/// # Errors
/// [`StoreError::NotFound`], [`StoreError::Database`].
pub fn detail(connection: &Connection, round: Round) -> Result<RoundDetail, StoreError> {
    let number = to_sql(round.0);
    let row = select(connection, "WHERE round = ?1", number)?
        .pop()
        .ok_or_else(|| StoreError::NotFound {
            what: "round",
            name: round.to_string(),
        })?;
    let terms: String =
        connection.query_row("SELECT terms FROM round WHERE round = ?1", [number], |row| {
            row.get(0)
        })?;
    let mut statement = connection.prepare_cached(
        "SELECT node, payload_digest, bytes, norm, distance, trimmed_share, leaf_index FROM upload WHERE round = ?1
         ORDER BY node",
    )?;
    let uploads = statement
        .query_map([number], |row| {
            Ok(UploadDetail {
                node: row.get(0)?,
                payload_digest: Digest(row.get(1)?).to_string(),
                bytes: from_sql(row.get(2)?),
                norm: row.get(3)?,
                distance: row.get(4)?,
                trimmed_share: row.get(5)?,
                leaf_index: from_sql(row.get(6)?),
            })
        })?
        .collect::<Result<_, _>>()?;
    let reasons = |query: &str| -> Result<BTreeMap<String, String>, StoreError> {
        let mut statement = connection.prepare_cached(query)?;
        let rows = statement.query_map([number], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(rows.collect::<Result<_, _>>()?)
    };
    Ok(RoundDetail {
        round: row,
        terms: serde_json::from_str(&terms).unwrap_or_default(),
        uploads,
        declines: reasons("SELECT node, declined FROM cohort WHERE round = ?1 AND declined IS NOT NULL")?,
        refusals: reasons("SELECT node, refused FROM cohort WHERE round = ?1 AND refused IS NOT NULL")?,
        central_noise: None,
    })
}
