//! The audit log: leaves are rows of the store, the tree over them is kept in memory, heads and receipts are signed here.

use std::io::Read as _;
use std::path::Path;
use std::sync::{PoisonError, RwLock};

use data_encoding::HEXLOWER_PERMISSIVE;
use rand::RngCore as _;
use rusqlite::Connection;
use theriac_audit::checkpoint::{CheckpointError, LogKey, SignedHead};
use theriac_audit::receipt::ReceiptBody;
use theriac_audit::tree::MerkleTree;
use theriac_protocol::message::ReceiptV1;
use theriac_protocol::units::{Digest, NodeId, Round};

use crate::data_dir::{DataDirError, refuse_wider, replace_file};
use crate::store::rounds::StoredUpload;
use crate::store::{StoreError, from_sql, to_sql};

/// Why the log's key cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuditKeyError {
    /// The file is missing, or readable by others.
    #[error(transparent)]
    File(#[from] DataDirError),
    /// It does not hold 64 hexadecimal digits.
    #[error("{0} holds no audit key: 64 hexadecimal digits are needed")]
    Format(std::path::PathBuf),
    /// The federation's name makes no origin.
    #[error("no log can be named after this federation: {0}")]
    Origin(#[from] CheckpointError),
}

/// Signs heads and receipts.
#[derive(Debug)]
pub struct AuditKey {
    key: LogKey,
}

impl AuditKey {
    /// Makes a key and its file, mode 0600.
    ///
    /// # Errors
    /// [`AuditKeyError::File`].
    pub fn generate(path: &Path, federation: &str) -> Result<Self, AuditKeyError> {
        let mut seed = [0_u8; 32];
        rand::rng().fill_bytes(&mut seed);
        let text = HEXLOWER_PERMISSIVE.encode(&seed);
        replace_file(path, text.as_bytes()).map_err(|source| DataDirError::Io {
            what: "write",
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            key: LogKey::from_seed(&origin(federation), &seed)?,
        })
    }

    /// Loads the key.
    ///
    /// # Errors
    /// [`AuditKeyError`]; a file that others can read is refused.
    pub fn load(path: &Path, federation: &str) -> Result<Self, AuditKeyError> {
        refuse_wider(path, 0o600)?;
        let mut text = String::new();
        std::fs::File::open(path)
            .and_then(|mut file| file.read_to_string(&mut text))
            .map_err(|source| DataDirError::Io {
                what: "read",
                path: path.to_owned(),
                source,
            })?;
        let seed = HEXLOWER_PERMISSIVE
            .decode(text.trim().as_bytes())
            .ok()
            .and_then(|seed| seed.try_into().ok());
        let seed: [u8; 32] = seed.ok_or_else(|| AuditKeyError::Format(path.to_owned()))?;
        Ok(Self {
            key: LogKey::from_seed(&origin(federation), &seed)?,
        })
    }

    /// The log's private key.
    pub fn log_key(&self) -> &LogKey {
        &self.key
    }

    /// The receipt for a stored update.
    pub fn receipt(&self, round: Round, node: &NodeId, stored: &StoredUpload) -> ReceiptV1 {
        let body = ReceiptBody {
            round,
            node: node.clone(),
            payload_digest: stored.payload_digest,
            leaf_index: stored.leaf_index,
            ledger_head: stored.ledger_head,
        };
        body.sign(&self.key)
    }
}

/// Name of a federation's log.
pub fn origin(federation: &str) -> String {
    format!("theriac/{federation}")
}

/// The tree over all leaves that are on the disk. A leaf that could still be lost by a power failure is not in it, so no head
/// that anybody saw can be contradicted later.
#[derive(Debug)]
pub struct AuditLog {
    /// Held for as long as one append or one proof takes, never across an await.
    tree: RwLock<MerkleTree>,
}

impl AuditLog {
    /// Reads all leaves.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when an index is missing.
    pub fn load(connection: &Connection) -> Result<Self, StoreError> {
        let log = Self {
            tree: RwLock::new(MerkleTree::new()),
        };
        log.catch_up(connection)?;
        Ok(log)
    }

    /// Reads the leaves that were appended since.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when an index is missing.
    pub fn catch_up(&self, connection: &Connection) -> Result<(), StoreError> {
        let mut tree = self.tree.write().unwrap_or_else(PoisonError::into_inner);
        let mut statement =
            connection.prepare_cached("SELECT idx, hash FROM audit_leaf WHERE idx >= ?1 ORDER BY idx")?;
        let mut rows = statement.query([to_sql(tree.size())])?;
        while let Some(row) = rows.next()? {
            let (index, expected) = (from_sql(row.get(0)?), tree.size());
            if index != expected {
                let reason = format!("the log goes on with leaf {index}");
                return Err(StoreError::Corrupt {
                    row: format!("audit leaf {expected}"),
                    reason,
                });
            }
            tree.append(Digest(row.get(1)?));
        }
        Ok(())
    }

    /// Size and root.
    pub fn head(&self) -> (u64, Digest) {
        let tree = self.tree.read().unwrap_or_else(PoisonError::into_inner);
        (tree.size(), tree.root())
    }

    /// The head, and the proof that it extends the one an edge has seen. Without a proof the edge can judge the size alone:
    /// there is none for a size that this log never had.
    pub fn head_since(&self, seen: Option<u64>) -> ((u64, Digest), Vec<Digest>) {
        let tree = self.tree.read().unwrap_or_else(PoisonError::into_inner);
        let size = tree.size();
        let proof = seen
            .filter(|seen| (1..size).contains(seen))
            .and_then(|seen| tree.consistency(seen, size));
        ((size, tree.root()), proof.unwrap_or_default())
    }

    /// The signed head.
    pub fn signed_head(&self, key: &AuditKey) -> SignedHead {
        let (size, root) = self.head();
        key.key.sign_head(size, root)
    }
}

/// Every line of the log, in order.
///
/// # Errors
/// [`StoreError::Database`].
pub fn lines(connection: &Connection) -> Result<Vec<String>, StoreError> {
    let mut statement = connection.prepare("SELECT line FROM audit_leaf ORDER BY idx")?;
    let rows = statement.query_map([], |row| row.get(0))?;
    Ok(rows.collect::<Result<_, _>>()?)
}
