//! Releases of moments that the robust pipeline has taken in, each once: what [`crate::accumulate`] makes a site's mean of.
//!
//! A row of `kept_release` names an upload and the round that took it in; the values stay where the upload is, and
//! [`forget_payloads`](super::rounds::forget_payloads) leaves them there while the row is. A row is written by the transaction that publishes the model which it is in, so
//! a crash leaves both or neither. Nothing is taken out of the table when a site falls out of favour: the row says from which round on it counts no more,
//! so that rounds before can still be done again.

use std::collections::BTreeSet;

use rusqlite::{Connection, OptionalExtension as _};
use theriac_audit::leaf::AuditEvent;
use theriac_protocol::message::AnnounceV1;
use theriac_protocol::units::{Digest, ModelVersion, NodeId, Round};

use super::blob::BlobStore;
use super::records::node_id;
use super::uploads::{self, Table};
use super::{StoreError, Work, from_sql, history, models, rounds, to_sql};
use crate::accumulate::{Accumulate, Behind, sum_terms};
use crate::robust::Row;

/// Why a site's releases count no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// It entered quarantine: what it sent before is as doubtful as what it was found with.
    Quarantine,
    /// Its key was revoked.
    Revoked,
    /// It enrolled anew with another key: another disk, and perhaps another host.
    NewKey,
    /// The model that they were in was taken back.
    RolledBack,
    /// An operator said so.
    Operator,
    /// Together they are no moments of a series.
    Vet,
}

impl Dropped {
    /// The word in the store.
    pub fn word(self) -> &'static str {
        match self {
            Self::Quarantine => "quarantine",
            Self::Revoked => "revoked",
            Self::NewKey => "new_key",
            Self::RolledBack => "rolled_back",
            Self::Operator => "operator",
            Self::Vet => "vet",
        }
    }

    /// Whether it can come while a round is open that holds a release of the site, which is doubtful as well. The others come with the end of a round.
    fn reaches_open_round(self) -> bool {
        matches!(self, Self::Revoked | Self::NewKey | Self::Operator)
    }
}

/// What the current window holds of a site.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SiteSum {
    /// In all.
    pub behind: Behind,
    /// The round that took in the oldest; 0 for none.
    pub since: u64,
}

/// Takes a release in. One that is there already, under whatever round, is not taken in again, and neither is one that was made before the site's releases were
/// dropped.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::NotFound`].
pub(super) fn add(
    work: &Work<'_>,
    node: &NodeId,
    of: Round,
    late: bool,
    into: &AnnounceV1,
) -> Result<(), StoreError> {
    let made_for = history::announced(work.connection(), of)?;
    let table = if late { "late_upload" } else { "upload" };
    work.connection()
        .prepare_cached(&format!(
            "INSERT OR IGNORE INTO kept_release (node, round, late, into_round, terms_digest, payload_digest, blocks_min, blocks_max, opened_unix_ms)
             SELECT upload.node, upload.round, ?3, ?4, ?5, payload_digest, ?6, ?7, opened_unix_ms
             FROM {table} AS upload JOIN round ON round.round = ?4 JOIN site ON site.node = upload.node
             WHERE upload.round = ?1 AND upload.node = ?2 AND site.kept_from <= ?1"
        ))?
        .execute((
            to_sql(of.0),
            node.as_str(),
            late,
            to_sql(into.round.0),
            sum_terms(into).0,
            made_for.blocks_min,
            made_for.blocks_max,
        ))?;
    Ok(())
}

/// Which releases count in a round beside those that came for it.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    terms: Digest,
    round: Round,
    /// When rounds whose releases count opened at the earliest.
    from_unix_ms: i64,
    keep: u32,
}

impl Window {
    /// Of the round of `announce`. Its age is counted between the openings of rounds, which are on record, so that it is the same at any time.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub fn of(
        connection: &Connection,
        announce: &AnnounceV1,
        accumulate: Accumulate,
    ) -> Result<Self, StoreError> {
        let opened: i64 = connection
            .prepare_cached("SELECT opened_unix_ms FROM round WHERE round = ?1")?
            .query_row([to_sql(announce.round.0)], |row| row.get(0))?;
        Ok(Self {
            terms: sum_terms(announce),
            round: announce.round,
            from_unix_ms: opened.saturating_sub(to_sql(accumulate.age_ms)),
            keep: accumulate.keep,
        })
    }

    /// Most releases of a site in the round.
    pub fn keep(&self) -> u32 {
        self.keep
    }
}

/// What makes a release count in a window.
const IN_WINDOW: &str = "terms_digest = ?1 AND into_round < ?2 AND opened_unix_ms >= ?3 AND (dropped_round IS NULL OR dropped_round > ?2)";

/// All releases in a window with their values. They come in the order of the table, backwards: nothing is sorted, so a payload is in memory while it is looked at. A
/// site's release for a round is taken in by it or by the next one, so from the newest round to the oldest is also the order in which they were taken in. The signs
/// before columns keep the index on them, whose order is another one, out of the plan.
const ALL_IN_WINDOW: &str = "SELECT kept.node, kept.round, kept.late, kept.payload_digest, kept.blocks_min, kept.blocks_max,
         coalesce(upload.scale, late_upload.scale), coalesce(upload.place, late_upload.place), coalesce(upload.payload, late_upload.payload)
     FROM kept_release AS kept
         LEFT JOIN upload ON kept.late = 0 AND upload.round = kept.round AND upload.node = kept.node
         LEFT JOIN late_upload ON kept.late = 1 AND late_upload.round = kept.round AND late_upload.node = kept.node
     WHERE +kept.terms_digest = ?1 AND +kept.into_round < ?2 AND kept.opened_unix_ms >= ?3
         AND (kept.dropped_round IS NULL OR kept.dropped_round > ?2)
     ORDER BY kept.node DESC, kept.round DESC";

/// One release in a window, before anything of it but its site is read.
#[derive(Debug)]
pub struct Release<'a> {
    row: &'a rusqlite::Row<'a>,
    blobs: &'a BlobStore,
}

impl Release<'_> {
    /// Whose it is.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub fn node(&self) -> Result<&str, StoreError> {
        let text = self.row.get_ref(0)?.as_str();
        Ok(text.map_err(rusqlite::Error::from)?)
    }

    /// SHA-256 of its payload.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub fn digest(&self) -> Result<Digest, StoreError> {
        Ok(Digest(self.row.get(3)?))
    }

    /// Its part of a mean.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub fn behind(&self) -> Result<Behind, StoreError> {
        Ok(Behind::one(self.row.get(4)?, self.row.get(5)?))
    }

    /// Its values. Blocks for a blob.
    ///
    /// # Errors
    /// As [`upload_row`](super::rounds::upload_row).
    pub fn row(&self) -> Result<Row, StoreError> {
        let table = if self.row.get(2)? {
            Table::Late
        } else {
            Table::InTime
        };
        let name = || Ok::<_, StoreError>(format!("{}/{}", self.row.get::<_, i64>(1)?, self.node()?));
        let Some(place) = self.row.get::<_, Option<String>>(7)? else {
            return Err(StoreError::NotFound {
                what: table.what(),
                name: name()?,
            });
        };
        Ok(Row {
            encoding: uploads::encoding(self.row.get(6)?),
            payload: models::payload(
                self.blobs,
                (place, self.row.get(8)?, self.row.get(3)?),
                format!("{} {}", table.what(), name()?),
            )?,
        })
    }
}

/// Gives `take` every release in the window by one query: those of a site one after another, the newest first.
///
/// # Errors
/// [`StoreError::Database`], and those of `take`.
pub fn each(
    connection: &Connection,
    blobs: &BlobStore,
    window: &Window,
    mut take: impl FnMut(&Release<'_>) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let mut statement = connection.prepare_cached(ALL_IN_WINDOW)?;
    let window = (window.terms.0, to_sql(window.round.0), window.from_unix_ms);
    let mut rows = statement.query(window)?;
    while let Some(row) = rows.next()? {
        take(&Release { row, blobs })?;
    }
    Ok(())
}

/// Sites that may count in the round by their earlier releases alone: active, with a release in the window, without an update of their own in the round, and
/// with none that was refused in it for what it held.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Corrupt`].
pub fn carried(connection: &Connection, window: &Window) -> Result<BTreeSet<NodeId>, StoreError> {
    let mut statement = connection.prepare_cached(&format!(
        "SELECT DISTINCT node FROM kept_release WHERE {IN_WINDOW}
             AND node NOT IN (SELECT node FROM upload WHERE round = ?2)
             AND node NOT IN (SELECT node FROM cohort WHERE round = ?2 AND refused IS NOT NULL)
             AND node IN (SELECT node FROM site WHERE state = 'active')"
    ))?;
    let window = (window.terms.0, to_sql(window.round.0), window.from_unix_ms);
    let rows = statement.query_map(window, |row| row.get::<_, String>(0))?;
    rows.map(|name| node_id(&name?)).collect()
}

/// From the next round on the releases of a site count no more; how many those were. What it sent for a round that is open now, or sends late for one before, is in no
/// later mean either.
///
/// # Errors
/// [`StoreError::Database`].
pub fn drop_site(work: &Work<'_>, node: &NodeId, why: Dropped) -> Result<u64, StoreError> {
    let from = rounds::last_round(work.connection())?.0 + 1;
    let dropped = work
        .connection()
        .prepare_cached(
            "UPDATE kept_release SET dropped_round = ?2, dropped_for = ?3 WHERE node = ?1 AND dropped_round IS NULL",
        )?
        .execute((node.as_str(), to_sql(from), why.word()))?;
    if why.reaches_open_round() {
        work.connection()
            .prepare_cached("UPDATE site SET kept_from = ?2 WHERE node = ?1")?
            .execute((node.as_str(), to_sql(from)))?;
    }
    Ok(dropped as u64)
}

/// As [`drop_site`], by an operator, who must name a site that there is; on record in the audit log as a change of the site's state would be.
///
/// # Errors
/// [`StoreError::NotFound`], [`StoreError::Database`], [`StoreError::Full`].
pub fn forget_site(work: &Work<'_>, node: &NodeId, reason: &str) -> Result<u64, StoreError> {
    let state: Option<theriac_audit::leaf::SiteStanding> = super::records::registry(work.connection())?
        .get(node)
        .map(|entry| entry.state);
    let state = state.ok_or_else(|| StoreError::NotFound {
        what: "site",
        name: node.to_string(),
    })?;
    let dropped = drop_site(work, node, Dropped::Operator)?;
    work.audit(AuditEvent::SiteState {
        node: node.clone(),
        state,
        reason: format!("{dropped} earlier releases count no more: {reason}"),
    })?;
    Ok(dropped)
}

/// After a roll-back: what was taken in after the model that is in force again counts no more.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::NotFound`].
pub(super) fn roll_back(work: &Work<'_>, to: ModelVersion) -> Result<(), StoreError> {
    let mut model = models::model(work.connection(), to)?;
    // A model that repeats another one was made by the other one's round.
    while let Some(repeated) = model.rolled_back_to {
        model = models::model(work.connection(), repeated)?;
    }
    let from = rounds::last_round(work.connection())?.0 + 1;
    work.connection().execute(
        "UPDATE kept_release SET dropped_round = ?2, dropped_for = ?3 WHERE into_round > ?1 AND dropped_round IS NULL",
        (to_sql(model.round.0), to_sql(from), Dropped::RolledBack.word()),
    )?;
    Ok(())
}

/// Deletes rows that count in no round after `last`, the newest one whose payloads are not kept, under the terms and the window in force.
///
/// # Errors
/// [`StoreError::Database`].
pub fn prune(
    work: &Work<'_>,
    last: Round,
    announce: &AnnounceV1,
    window: Accumulate,
) -> Result<(), StoreError> {
    let connection = work.connection();
    let next = "SELECT min(opened_unix_ms) FROM round WHERE round > ?1";
    let opened: Option<i64> = connection.query_row(next, [to_sql(last.0)], |row| row.get(0))?;
    let oldest = opened.map_or(0, |opened| opened.saturating_sub(to_sql(window.age_ms)));
    connection.execute(
        "DELETE FROM kept_release WHERE into_round <= ?1
             AND (dropped_round <= ?1 + 1 OR opened_unix_ms < ?2 OR terms_digest <> ?3)",
        (to_sql(last.0), oldest, sum_terms(announce).0),
    )?;
    connection.execute(
        "DELETE FROM kept_release WHERE (node, round) IN (
             SELECT node, round FROM (
                 SELECT node, round, row_number() OVER (PARTITION BY node ORDER BY into_round DESC, round DESC) AS place
                 FROM kept_release WHERE into_round <= ?1 AND dropped_round IS NULL)
             WHERE place > ?2)",
        (to_sql(last.0), window.keep),
    )?;
    Ok(())
}

/// Number of releases that are kept, dropped ones that an earlier round may still need among them.
///
/// # Errors
/// [`StoreError::Database`].
pub fn count(connection: &Connection) -> Result<u64, StoreError> {
    let count = connection.query_row("SELECT count(*) FROM kept_release", [], |row| row.get(0))?;
    Ok(from_sql(count))
}

/// What counts of each site in the next round on the terms of the last one: releases that were not dropped, within `window`, by name.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Corrupt`].
pub fn standing(
    connection: &Connection,
    window: Accumulate,
) -> Result<std::collections::BTreeMap<NodeId, SiteSum>, StoreError> {
    let mut sums = std::collections::BTreeMap::new();
    let newest = "SELECT round, opened_unix_ms FROM round ORDER BY round DESC LIMIT 1";
    let newest: Option<(i64, i64)> = connection
        .query_row(newest, [], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let Some((round, opened)) = newest else {
        return Ok(sums);
    };
    let announce = history::announced(connection, Round(from_sql(round)))?;
    if !window.is_on(announce.kind) {
        return Ok(sums);
    }
    let mut statement = connection.prepare_cached(
        "SELECT node, count(*), sum(blocks_min), sum(blocks_max), min(into_round) FROM (
             SELECT *, row_number() OVER (PARTITION BY node ORDER BY into_round DESC, round DESC) AS place FROM kept_release
             WHERE terms_digest = ?1 AND opened_unix_ms >= ?2 AND dropped_round IS NULL)
         WHERE place <= ?3 GROUP BY node",
    )?;
    let from = opened.saturating_sub(to_sql(window.age_ms));
    let mut rows = statement.query((sum_terms(&announce).0, from, window.keep))?;
    while let Some(row) = rows.next()? {
        let number = |at| row.get::<_, i64>(at).map(from_sql);
        let behind = Behind {
            releases: number(1)?,
            blocks_min: number(2)?,
            blocks_max: number(3)?,
        };
        let since = number(4)?;
        sums.insert(node_id(&row.get::<_, String>(0)?)?, SiteSum { behind, since });
    }
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sort would hold every payload of the window at once.
    #[test]
    fn releases_are_read_in_the_order_of_their_table() {
        let dir = tempfile::tempdir().unwrap();
        let data = crate::data_dir::DataDir::new(dir.path().join("data"));
        crate::init::init(crate::init::InitOptions::new(data.root(), "demo")).unwrap();
        let database = super::super::Database::open(&data).unwrap();
        let mut statement = database
            .read()
            .prepare(&format!("EXPLAIN QUERY PLAN {ALL_IN_WINDOW}"))
            .unwrap();
        let steps: Vec<String> = statement
            .query_map(([0_u8; 32], 1, 1), |row| row.get(3))
            .unwrap()
            .collect::<Result<_, _>>()
            .unwrap();
        assert!(
            !steps.iter().any(|step| step.contains("TEMP B-TREE")),
            "{steps:?}"
        );
        let searched = |step: &String| step.starts_with("SEARCH") && step.contains("(round=? AND node=?)");
        assert_eq!(steps.iter().filter(|step| searched(step)).count(), 2, "{steps:?}");
    }
}
