//! Sites, and what the registry says of them.

use std::collections::BTreeMap;

use rusqlite::{Connection, OptionalExtension as _};
use theriac_audit::leaf::{AuditEvent, SiteStanding};
use theriac_protocol::message::{GateVerdict, GuaranteeV1, PrivacyClaimV1};
use theriac_protocol::refusal::RefusalCode;
use theriac_protocol::units::{Digest, ModelVersion, NodeId, Timestamp};

use super::ledgers::{self, FormerLedger};
pub use super::models::{ModelRow, current_model, model, model_payload, roll_back};
use super::{StoreError, Work, from_sql, sums, to_sql, wall_clock, word};

/// Name of the meta row that holds the federation's name.
pub const META_FEDERATION: &str = "federation";
/// Name of the meta row that holds the 32 bytes from which nonces are made.
pub const META_NONCE_SEED: &str = "nonce_seed";

/// Beginning of the meta rows that hold what sites declared; the site's name follows.
const META_GUARANTEE: &str = "guarantee/";

/// Reads a meta row.
///
/// # Errors
/// [`StoreError::NotFound`], [`StoreError::Database`].
pub fn meta(connection: &Connection, key: &str) -> Result<Vec<u8>, StoreError> {
    connection
        .query_row("SELECT value FROM meta WHERE key = ?1", [key], |row| row.get(0))
        .optional()?
        .ok_or_else(|| StoreError::NotFound {
            what: "meta row",
            name: key.to_owned(),
        })
}

/// Writes a meta row.
///
/// # Errors
/// [`StoreError::Database`].
pub fn set_meta(work: &Work<'_>, key: &str, value: &[u8]) -> Result<(), StoreError> {
    work.connection().execute(
        "INSERT OR REPLACE INTO meta (key, value) VALUES (?1, ?2)",
        (key, value),
    )?;
    Ok(())
}

/// A counter-signed position of an edge's privacy ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LedgerHead {
    /// Head of the hash chain.
    pub head: Digest,
    /// Number of records.
    pub records: u64,
}

/// What the registry says of a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SiteEntry {
    /// Whether it may speak.
    pub state: SiteStanding,
    /// SHA-256 of the one public key it may use.
    pub key_fingerprint: [u8; 32],
    /// The ledger head that was counter-signed last.
    pub ledger: LedgerHead,
    /// Whether its present key began a new ledger after another one, which no operator has allowed so far.
    pub ledger_unallowed: bool,
}

/// The registry, ordered by name.
pub type Registry = BTreeMap<NodeId, SiteEntry>;

/// Reads the registry.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Corrupt`].
pub fn registry(connection: &Connection) -> Result<Registry, StoreError> {
    let mut statement = connection.prepare_cached(
        "SELECT node, state, key_fingerprint, ledger_head, ledger_records, ledger_allowed FROM site",
    )?;
    let rows = statement.query_map([], |row| {
        let entry = (
            row.get::<_, String>(1)?,
            row.get(2)?,
            row.get(3)?,
            row.get::<_, i64>(4)?,
            row.get::<_, bool>(5)?,
        );
        Ok((row.get::<_, String>(0)?, entry))
    })?;
    rows.map(|row| {
        let (node, (state, key_fingerprint, head, records, allowed)) = row?;
        let ledger = LedgerHead {
            head: Digest(head),
            records: from_sql(records),
        };
        Ok((
            node_id(&node)?,
            SiteEntry {
                state: standing(&node, &state)?,
                key_fingerprint,
                ledger,
                ledger_unallowed: !allowed,
            },
        ))
    })
    .collect()
}

/// Enrols a site, or gives an enrolled one a new key. A suspended site stays suspended; a revoked one becomes active,
/// because revocation is of a key and a new token was the operator's decision. A new key begins a new ledger: the one before is remembered with what the site had
/// spent in it, its releases count no more, and whether the new one may count under `[privacy_floor] ledger_continuity` is `new_ledger`, the operator's word.
///
/// # Errors
/// [`StoreError::Conflict`] for a key that was revoked, [`StoreError::Database`].
pub fn enrol(
    work: &Work<'_>,
    node: &NodeId,
    key_fingerprint: [u8; 32],
    certificate_fingerprint: [u8; 32],
    not_after: Timestamp,
    new_ledger: bool,
) -> Result<(), StoreError> {
    if is_revoked(work.connection(), &key_fingerprint)? {
        return Err(StoreError::Conflict(format!(
            "this key was revoked, which is for ever: {node} must make a new one"
        )));
    }
    ledgers::end(work, node, &key_fingerprint, new_ledger)?;
    work.connection().execute(
        "INSERT INTO site (node, state, key_fingerprint, enrolled_unix_ms, ledger_head, ledger_records)
         VALUES (?1, 'active', ?2, ?3, zeroblob(32), 0)
         ON CONFLICT (node) DO UPDATE SET key_fingerprint = ?2, enrolled_unix_ms = ?3,
             ledger_head = CASE key_fingerprint WHEN ?2 THEN ledger_head ELSE zeroblob(32) END,
             ledger_records = CASE key_fingerprint WHEN ?2 THEN ledger_records ELSE 0 END,
             epsilon = CASE key_fingerprint WHEN ?2 THEN epsilon END,
             delta = CASE key_fingerprint WHEN ?2 THEN delta END,
             state = CASE state WHEN 'revoked' THEN 'active' ELSE state END",
        (node.as_str(), key_fingerprint, to_sql(wall_clock().0)),
    )?;
    work.connection().execute(
        "INSERT OR IGNORE INTO certificate (fingerprint, node, key_fingerprint, not_after_unix_ms)
         VALUES (?1, ?2, ?3, ?4)",
        (
            certificate_fingerprint,
            node.as_str(),
            key_fingerprint,
            to_sql(not_after.0),
        ),
    )?;
    work.audit(AuditEvent::SiteEnrolled {
        node: node.clone(),
        key_fingerprint: Digest(key_fingerprint),
    })?;
    Ok(())
}

/// Whether a public key was revoked, at whichever site.
///
/// # Errors
/// [`StoreError::Database`].
pub fn is_revoked(connection: &Connection, key_fingerprint: &[u8; 32]) -> Result<bool, StoreError> {
    let revoked = "SELECT EXISTS (SELECT 1 FROM revoked_key WHERE fingerprint = ?1)";
    Ok(connection.query_row(revoked, [key_fingerprint], |row| row.get(0))?)
}

/// Changes what the registry says of a site; a running server notices within a second.
///
/// # Errors
/// [`StoreError::NotFound`]; [`StoreError::Conflict`] when a revoked site would be resumed with its revoked key.
pub fn set_standing(
    work: &Work<'_>,
    node: &NodeId,
    state: SiteStanding,
    reason: &str,
) -> Result<(), StoreError> {
    let now = "SELECT state FROM site WHERE node = ?1";
    let before: Option<String> = work
        .connection()
        .query_row(now, [node.as_str()], |row| row.get(0))
        .optional()?;
    let before = before.ok_or_else(|| StoreError::NotFound {
        what: "site",
        name: node.to_string(),
    })?;
    if before == word(SiteStanding::Revoked) && state != SiteStanding::Revoked {
        return Err(StoreError::Conflict(format!(
            "{node}'s key was revoked, which is for ever: enrol it again with `token create --site {node}`"
        )));
    }
    if state == SiteStanding::Revoked {
        // A token that is still about would be a way back in.
        let tokens = "DELETE FROM token WHERE node = ?1 AND spent_unix_ms IS NULL";
        work.connection().execute(tokens, [node.as_str()])?;
        work.connection().execute(
            "INSERT OR IGNORE INTO revoked_key (fingerprint, node) SELECT key_fingerprint, node FROM site WHERE node = ?1",
            [node.as_str()],
        )?;
    }
    if before == word(state) {
        return Ok(());
    }
    if state == SiteStanding::Revoked {
        sums::drop_site(work, node, sums::Dropped::Revoked)?;
    }
    work.connection().execute(
        "UPDATE site SET state = ?2 WHERE node = ?1",
        (node.as_str(), word(state)),
    )?;
    work.audit(AuditEvent::SiteState {
        node: node.clone(),
        state,
        reason: reason.to_owned(),
    })?;
    Ok(())
}

/// Keeps what a site guarantees.
///
/// # Errors
/// [`StoreError::Database`].
pub fn declare(work: &Work<'_>, node: &NodeId, guarantee: &GuaranteeV1) -> Result<(), StoreError> {
    let said = serde_json::to_vec(guarantee).map_err(|error| StoreError::Corrupt {
        row: format!("guarantee of {node}"),
        reason: error.to_string(),
    })?;
    set_meta(work, &format!("{META_GUARANTEE}{node}"), &said)
}

/// What each site guarantees, as it declared last.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Corrupt`].
pub fn guarantees(connection: &Connection) -> Result<BTreeMap<NodeId, GuaranteeV1>, StoreError> {
    let mut statement = connection
        .prepare_cached("SELECT substr(key, length(?1) + 1), value FROM meta WHERE key LIKE ?1 || '%'")?;
    let rows = statement.query_map([META_GUARANTEE], |row| {
        Ok((row.get::<_, String>(0)?, row.get::<_, Vec<u8>>(1)?))
    })?;
    rows.map(|row| {
        let (node, said) = row?;
        let guarantee = serde_json::from_slice(&said).map_err(|error| StoreError::Corrupt {
            row: format!("guarantee of {node}"),
            reason: error.to_string(),
        })?;
        Ok((node_id(&node)?, guarantee))
    })
    .collect()
}

/// A site as it is listed.
#[derive(Debug, Clone, PartialEq)]
pub struct SiteRow {
    /// Its name.
    pub node: NodeId,
    /// What the registry says.
    pub state: SiteStanding,
    /// When it enrolled.
    pub enrolled: Timestamp,
    /// Updates stored.
    pub accepted: u64,
    /// Things refused, by reason.
    pub refusals: BTreeMap<String, u64>,
    /// Rounds declined, by reason.
    pub declines: BTreeMap<String, u64>,
    /// ε spent, as its last update claimed.
    pub epsilon: Option<f64>,
    /// δ of its policy, as its last update claimed.
    pub delta: Option<f64>,
    /// What its gate said last.
    pub last_verdict: Option<String>,
    /// The ledger head that was counter-signed last.
    pub ledger: LedgerHead,
    /// What it guarantees, as it declared last.
    pub guarantee: Option<GuaranteeV1>,
    /// Ledgers that the name had under earlier keys, oldest first.
    pub former_ledgers: Vec<FormerLedger>,
    /// Whether the present ledger was begun after another one, which no operator has allowed so far.
    pub ledger_unallowed: bool,
}

/// All sites, ordered by name.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Corrupt`].
pub fn sites(connection: &Connection) -> Result<Vec<SiteRow>, StoreError> {
    let mut refusals = counts(connection, "SELECT node, code, count FROM refusal")?;
    let mut declines = counts(
        connection,
        "SELECT node, declined, count(*) FROM cohort WHERE declined IS NOT NULL GROUP BY node, declined",
    )?;
    let mut guarantees = guarantees(connection)?;
    let mut former = ledgers::all(connection)?;
    let columns = "node, state, enrolled_unix_ms, accepted, epsilon, delta, last_verdict, ledger_head, ledger_records, ledger_allowed";
    let mut statement = connection.prepare_cached(&format!("SELECT {columns} FROM site ORDER BY node"))?;
    let mut rows = statement.query([])?;
    let mut sites = Vec::new();
    while let Some(row) = rows.next()? {
        let node: String = row.get(0)?;
        let state: String = row.get(1)?;
        sites.push(SiteRow {
            state: standing(&node, &state)?,
            enrolled: Timestamp(from_sql(row.get(2)?)),
            accepted: from_sql(row.get(3)?),
            refusals: refusals.remove(&node).unwrap_or_default(),
            declines: declines.remove(&node).unwrap_or_default(),
            epsilon: row.get(4)?,
            delta: row.get(5)?,
            last_verdict: row.get(6)?,
            ledger: LedgerHead {
                head: Digest(row.get(7)?),
                records: from_sql(row.get(8)?),
            },
            guarantee: guarantees.remove(&node_id(&node)?),
            former_ledgers: former.remove(&node).unwrap_or_default(),
            ledger_unallowed: !row.get::<_, bool>(9)?,
            node: node_id(&node)?,
        });
    }
    Ok(sites)
}

/// Counts by node and word.
fn counts(
    connection: &Connection,
    query: &str,
) -> Result<BTreeMap<String, BTreeMap<String, u64>>, StoreError> {
    let mut counts: BTreeMap<String, BTreeMap<String, u64>> = BTreeMap::new();
    let mut statement = connection.prepare_cached(query)?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        counts
            .entry(row.get(0)?)
            .or_default()
            .insert(row.get(1)?, from_sql(row.get(2)?));
    }
    Ok(counts)
}

/// Counts something refused. Update refusals are audited by the caller.
///
/// # Errors
/// [`StoreError::Database`].
pub fn count_refusal(work: &Work<'_>, node: &NodeId, code: RefusalCode) -> Result<(), StoreError> {
    // A site that is not in the registry has no row to count on; its refusals are in the metrics.
    work.connection()
        .prepare_cached(
            "INSERT INTO refusal (node, code, count) SELECT node, ?2, 1 FROM site WHERE node = ?1
             ON CONFLICT (node, code) DO UPDATE SET count = count + 1",
        )?
        .execute((node.as_str(), code.word()))?;
    Ok(())
}

/// Notes what an edge's gate said of a model.
///
/// # Errors
/// [`StoreError::Database`].
pub fn record_verdict(
    work: &Work<'_>,
    node: &NodeId,
    version: ModelVersion,
    verdict: GateVerdict,
) -> Result<(), StoreError> {
    let text = gate_word(verdict);
    work.connection()
        .prepare_cached("UPDATE site SET last_verdict = ?2 WHERE node = ?1")?
        .execute((node.as_str(), text))?;
    work.audit(AuditEvent::ModelGate {
        version,
        node: node.clone(),
        verdict,
    })?;
    Ok(())
}

/// The word for a gate's verdict.
pub fn gate_word(verdict: GateVerdict) -> &'static str {
    match verdict {
        GateVerdict::Accepted => "accepted",
        GateVerdict::WorseOnTail => "worse_on_tail",
        GateVerdict::NonFinite => "non_finite",
        GateVerdict::LayoutMismatch => "layout_mismatch",
        GateVerdict::Stale => "stale",
        GateVerdict::TooFewRows => "too_few_rows",
    }
}

/// Moves a site's counter-signed ledger head on and notes what it claims to have spent.
///
/// # Errors
/// [`StoreError::Database`].
pub(super) fn advance_ledger(
    work: &Work<'_>,
    node: &NodeId,
    claim: &PrivacyClaimV1,
) -> Result<(), StoreError> {
    work.connection()
        .prepare_cached(
            "UPDATE site SET ledger_head = ?2, ledger_records = ?3, epsilon = ?4, delta = ?5, accepted = accepted + 1
             WHERE node = ?1",
        )?
        .execute((
            node.as_str(),
            claim.ledger_head.0,
            to_sql(claim.ledger_records),
            claim.epsilon_spent.value(),
            claim.delta.value(),
        ))?;
    Ok(())
}

pub(super) fn node_id(name: &str) -> Result<NodeId, StoreError> {
    NodeId::new(name).map_err(|error| StoreError::Corrupt {
        row: format!("site {name}"),
        reason: error.to_string(),
    })
}

fn standing(node: &str, state: &str) -> Result<SiteStanding, StoreError> {
    [
        SiteStanding::Active,
        SiteStanding::Suspended,
        SiteStanding::Revoked,
    ]
    .into_iter()
    .find(|standing| word(standing) == state)
    .ok_or_else(|| StoreError::Corrupt {
        row: format!("site {node}"),
        reason: format!("its state is `{state}`"),
    })
}
