//! Privacy ledgers that a site's name had before its present one.
//!
//! A ledger belongs to a key: who enrols under a known name with another key begins a new one, at zero. That may be a host that was set up anew, and then what its people have
//! lost is the sum over both ledgers; so the earlier one is remembered, with its head and with what the site said that it had spent.

use std::collections::BTreeMap;

use rusqlite::{Connection, OptionalExtension as _};
use theriac_audit::leaf::{AuditEvent, SiteStanding};
use theriac_protocol::units::{Digest, NodeId, Timestamp};

use super::records::{self, LedgerHead};
use super::{StoreError, Work, from_sql, sums, to_sql, wall_clock};

/// A ledger that ended when another key was enrolled.
#[derive(Debug, Clone, PartialEq)]
pub struct FormerLedger {
    /// When its key was enrolled.
    pub began: Timestamp,
    /// When another key took its place.
    pub ended: Timestamp,
    /// Where it stood, as it was counter-signed last.
    pub head: LedgerHead,
    /// ε that the site said it had spent.
    pub epsilon: Option<f64>,
    /// δ of it.
    pub delta: Option<f64>,
}

/// Another key is enrolled for `node`, if it is known with a key: what its ledger held is remembered. `allowed`: an operator takes the new one.
///
/// # Errors
/// [`StoreError::Database`].
pub(super) fn end(
    work: &Work<'_>,
    node: &NodeId,
    key_fingerprint: &[u8; 32],
    allowed: bool,
) -> Result<(), StoreError> {
    let known = "SELECT key_fingerprint FROM site WHERE node = ?1";
    let known: Option<[u8; 32]> = work
        .connection()
        .query_row(known, [node.as_str()], |row| row.get(0))
        .optional()?;
    if known.is_none_or(|known| known == *key_fingerprint) {
        return Ok(());
    }
    sums::drop_site(work, node, sums::Dropped::NewKey)?;
    let kept = work.connection().execute(
        "INSERT INTO former_ledger (node, key_fingerprint, began_unix_ms, ended_unix_ms, ledger_head, ledger_records, epsilon, delta)
         SELECT node, key_fingerprint, enrolled_unix_ms, ?2, ledger_head, ledger_records, epsilon, delta FROM site
         WHERE node = ?1 AND ledger_records > 0",
        (node.as_str(), to_sql(wall_clock().0)),
    )?;
    // A name that had spent something before needs leave once, however many keys without any record lie between.
    if kept > 0 || allowed {
        set_allowed(work, node, allowed)?;
    }
    Ok(())
}

fn set_allowed(work: &Work<'_>, node: &NodeId, allowed: bool) -> Result<(), StoreError> {
    work.connection().execute(
        "UPDATE site SET ledger_allowed = ?2 WHERE node = ?1",
        (node.as_str(), allowed),
    )?;
    Ok(())
}

/// An operator takes the ledger that a site has begun after another one.
///
/// # Errors
/// [`StoreError::NotFound`]; [`StoreError::Conflict`] when there is nothing to allow.
pub fn allow(work: &Work<'_>, node: &NodeId, reason: &str) -> Result<(), StoreError> {
    let registry = records::registry(work.connection())?;
    let site = registry.get(node).ok_or_else(|| StoreError::NotFound {
        what: "site",
        name: node.to_string(),
    })?;
    if !site.ledger_unallowed {
        let why = format!("{node} has begun no ledger after another one that is not allowed already");
        return Err(StoreError::Conflict(why));
    }
    set_allowed(work, node, true)?;
    let state: SiteStanding = site.state;
    work.audit(AuditEvent::SiteState {
        node: node.clone(),
        state,
        reason: format!("its new ledger is allowed: {reason}"),
    })?;
    Ok(())
}

/// The ledger of a site that another key would end: where it stands and the ε that it has spent; `None` for a new name or one that has spent nothing.
///
/// # Errors
/// [`StoreError::Database`].
pub fn present(
    connection: &Connection,
    node: &NodeId,
) -> Result<Option<(LedgerHead, Option<f64>)>, StoreError> {
    let row = "SELECT ledger_head, ledger_records, epsilon FROM site WHERE node = ?1 AND ledger_records > 0";
    let row = connection
        .query_row(row, [node.as_str()], |row| {
            let head = LedgerHead {
                head: Digest(row.get(0)?),
                records: from_sql(row.get(1)?),
            };
            Ok((head, row.get(2)?))
        })
        .optional()?;
    Ok(row)
}

/// All former ledgers by name, oldest first.
///
/// # Errors
/// [`StoreError::Database`].
pub fn all(connection: &Connection) -> Result<BTreeMap<String, Vec<FormerLedger>>, StoreError> {
    let mut statement = connection.prepare_cached(
        "SELECT node, began_unix_ms, ended_unix_ms, ledger_head, ledger_records, epsilon, delta FROM former_ledger
             ORDER BY node, ended_unix_ms, rowid",
    )?;
    let mut rows = statement.query([])?;
    let mut found: BTreeMap<String, Vec<FormerLedger>> = BTreeMap::new();
    while let Some(row) = rows.next()? {
        found.entry(row.get(0)?).or_default().push(FormerLedger {
            began: Timestamp(from_sql(row.get(1)?)),
            ended: Timestamp(from_sql(row.get(2)?)),
            head: LedgerHead {
                head: Digest(row.get(3)?),
                records: from_sql(row.get(4)?),
            },
            epsilon: row.get(5)?,
            delta: row.get(6)?,
        });
    }
    Ok(found)
}
