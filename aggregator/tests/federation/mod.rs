//! Federations for tests: one whose rounds are driven by hand, and a whole server that edges dial.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "each test takes a part; a failed helper is a failed test"
)]

pub(crate) mod centre;
pub(crate) mod hand;
pub(crate) mod series;

use theriac_protocol::message::{AnnounceV1, Encoding, PrivacyClaimV1, UpdateV1};
use theriac_protocol::units::{Delta, Digest, Epsilon, NodeId};

pub(crate) fn node(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

/// A ledger has as many records as the site has sent updates.
pub(crate) fn ledger_head(records: u64) -> Digest {
    if records == 0 {
        Digest::default()
    } else {
        Digest::of(&records.to_le_bytes())
    }
}

/// The header of an honest update of `f32` values, whose site has so many records in its ledger.
pub(crate) fn header(announce: &AnnounceV1, payload: &[u8], records: u64) -> UpdateV1 {
    UpdateV1 {
        round: announce.round,
        nonce: announce.nonce,
        kind: announce.kind,
        base_digest: announce.base_digest,
        layout_digest: announce.layout_digest,
        values: announce.values,
        encoding: Encoding::F32,
        payload_digest: Digest::of(payload),
        blocks_bound: announce.blocks_max,
        privacy: PrivacyClaimV1 {
            clip_norm: announce.clip_norm,
            noise_multiplier: announce.noise_multiplier,
            epsilon_spent: Epsilon::new(4.0).unwrap(),
            delta: Delta::new(1e-6).unwrap(),
            ledger_head: ledger_head(records),
            ledger_records: records,
        },
    }
}
