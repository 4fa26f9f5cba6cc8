//! Enrolment tokens: kept as hashes, spent by the transaction that records the certificate.

use std::time::Duration;

use rusqlite::OptionalExtension as _;
use theriac_certs::JoinToken;
use theriac_protocol::message::JoinRefusal;
use theriac_protocol::units::{NodeId, Timestamp};

use super::records::{self, node_id};
use super::{StoreError, Work, from_sql, to_sql, wall_clock};

/// How long a token is good for, unless told otherwise.
pub const LIFETIME: Duration = Duration::from_hours(1);

/// Keeps a token for one site. `new_ledger`: if the site has a ledger under another key, the new one is taken in its place.
///
/// # Errors
/// [`StoreError::Database`].
pub fn create(
    work: &Work<'_>,
    token: &JoinToken,
    node: &NodeId,
    lifetime: Duration,
    new_ledger: bool,
) -> Result<Timestamp, StoreError> {
    let now = wall_clock();
    let lifetime_ms = u64::try_from(lifetime.as_millis()).unwrap_or(u64::MAX);
    let expires = Timestamp(now.0.saturating_add(lifetime_ms));
    work.connection().execute(
        "INSERT INTO token (id, secret_hash, node, created_unix_ms, expires_unix_ms, new_ledger) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        (token.id, token.secret_hash(), node.as_str(), to_sql(now.0), to_sql(expires.0), new_ledger),
    )?;
    Ok(expires)
}

/// What a request with a token may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Redemption {
    /// Nothing.
    Refused(JoinRefusal),
    /// The same token with the same key, within its hour: the certificate it got.
    Repeated {
        /// The site.
        node: NodeId,
        /// Its certificate, DER.
        certificate: Vec<u8>,
    },
    /// A certificate may be issued for this site.
    Fresh {
        /// The site.
        node: NodeId,
    },
}

/// Looks a token up. The secret is compared in constant time; an unknown id and a wrong secret look the same.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Corrupt`].
pub fn look_up(
    work: &Work<'_>,
    id: &[u8; 8],
    secret: &[u8; 16],
    key_fingerprint: &[u8; 32],
) -> Result<Redemption, StoreError> {
    type Row = ([u8; 32], String, i64, Option<[u8; 32]>, Option<Vec<u8>>);
    let row: Option<Row> = work
        .connection()
        .query_row(
            "SELECT secret_hash, node, expires_unix_ms, key_fingerprint, certificate FROM token WHERE id = ?1",
            [id],
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?)),
        )
        .optional()?;
    let Some((hash, node, expires, spent_by, certificate)) = row else {
        return Ok(Redemption::Refused(JoinRefusal::UnknownToken));
    };
    if !theriac_certs::secret_matches(id, secret, &hash) {
        return Ok(Redemption::Refused(JoinRefusal::UnknownToken));
    }
    if spent_by.is_some_and(|key| key != *key_fingerprint) {
        return Ok(Redemption::Refused(JoinRefusal::Spent));
    }
    if wall_clock().0 >= from_sql(expires) {
        return Ok(Redemption::Refused(JoinRefusal::Expired));
    }
    if records::is_revoked(work.connection(), key_fingerprint)? {
        return Ok(Redemption::Refused(JoinRefusal::RevokedKey));
    }
    let node = node_id(&node)?;
    Ok(match certificate {
        Some(certificate) => Redemption::Repeated { node, certificate },
        None => Redemption::Fresh { node },
    })
}

/// A certificate that was just issued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// The certificate, DER.
    pub certificate: Vec<u8>,
    /// SHA-256 of it.
    pub fingerprint: [u8; 32],
    /// SHA-256 of its public key.
    pub key_fingerprint: [u8; 32],
    /// When it ends.
    pub not_after: Timestamp,
}

/// Spends a token for a certificate and enrols the site, in this one transaction.
///
/// # Errors
/// [`StoreError::Conflict`] when the token was spent in the meantime, [`StoreError::Database`].
pub fn spend(work: &Work<'_>, id: &[u8; 8], node: &NodeId, issued: &Issued) -> Result<(), StoreError> {
    let spent = work.connection().execute(
        "UPDATE token SET spent_unix_ms = ?2, key_fingerprint = ?3, certificate = ?4
         WHERE id = ?1 AND spent_unix_ms IS NULL",
        (
            id,
            to_sql(wall_clock().0),
            issued.key_fingerprint,
            &issued.certificate,
        ),
    )?;
    if spent != 1 {
        return Err(StoreError::Conflict("the token was used in the meantime".into()));
    }
    let allowed = "SELECT new_ledger FROM token WHERE id = ?1";
    let allowed: bool = work.connection().query_row(allowed, [id], |row| row.get(0))?;
    records::enrol(
        work,
        node,
        issued.key_fingerprint,
        issued.fingerprint,
        issued.not_after,
        allowed,
    )
}
