//! What happened, provable later.
//!
//! Each fact is an [`leaf::AuditRecord`], written as one line of JSON. The lines are the leaves of an RFC 6962 Merkle tree
//! ([`tree`]); its head is signed as a C2SP checkpoint ([`checkpoint`]); an edge holds a signed [`receipt`] for each of its
//! updates and a signed [`seal`] on its privacy ledger. An exported log is checked offline with the public key alone ([`verify`]).
//!
//! Nothing here does I/O, reads a clock or draws entropy: hashes, times and keys come from the caller.

pub mod checkpoint;
pub mod leaf;
pub mod receipt;
pub mod seal;
pub mod tree;
pub mod verify;
