//! What the ledger's records say. One record is one line of JSON, so that anyone can read and recompute it.

use serde::{Deserialize, Serialize};
use theriac_protocol::message::UpdateKind;
use theriac_protocol::units::{Delta, Digest, Epsilon, L2Norm, NodeId, NoiseMultiplier, Round, Timestamp};

use crate::accountant::Rho;
use crate::policy::{Policy, PrivacyUnit};

/// One entry of the ledger.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Record {
    /// The first record: whose ledger this is and what a block is. Both hold for ever.
    Genesis {
        node: NodeId,
        unit: PrivacyUnit,
        block_ms: u64,
        at: Timestamp,
    },
    /// The policy in force from here on.
    Policy {
        #[serde(with = "hex")]
        hash: Digest,
        epsilon: Epsilon,
        delta: Delta,
        at: Timestamp,
    },
    /// A charge. Written and synced before any data are read.
    Reserve(Charged),
    /// The noised bytes of a reservation exist and may have left. For the record only: it refunds nothing.
    Released {
        round: Round,
        nonce: u64,
        #[serde(with = "hex")]
        payload: Digest,
        at: Timestamp,
    },
}

/// The charge of one release.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Charged {
    pub(crate) round: Round,
    pub(crate) nonce: u64,
    pub(crate) kind: UpdateKind,
    pub(crate) values: u32,
    /// First and last id of each run of blocks; empty for [`UpdateKind::Delta`], which charges every block.
    pub(crate) blocks: Vec<(u64, u64)>,
    pub(crate) clip_norm: L2Norm,
    pub(crate) noise_multiplier: NoiseMultiplier,
    /// In multiples of the clipping norm.
    pub(crate) sensitivity: f64,
    pub(crate) rho: f64,
    #[serde(with = "hex")]
    pub(crate) policy: Digest,
    pub(crate) at: Timestamp,
}

impl Charged {
    /// Whether the written ρ is the one that sensitivity and noise give, and the runs ascend.
    pub(crate) fn is_consistent(&self) -> bool {
        let rho = Rho::gaussian(self.sensitivity, self.noise_multiplier).value();
        let ascends = self.blocks.iter().all(|(first, last)| first <= last)
            && self.blocks.windows(2).all(|pair| pair[0].1 < pair[1].0);
        (self.rho / rho - 1.0).abs() < 1e-9 && self.sensitivity > 0.0 && ascends
    }
}

impl Record {
    /// The policy as a record.
    pub(crate) fn policy(policy: &Policy, at: Timestamp) -> Self {
        Self::Policy {
            hash: policy.hash(),
            epsilon: policy.epsilon(),
            delta: policy.delta(),
            at,
        }
    }

    /// The record's bytes.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        #[expect(
            clippy::expect_used,
            reason = "structs of finite numbers, words and digests always have a JSON form"
        )]
        let bytes = serde_json::to_vec(self).expect("a record has a JSON form");
        bytes
    }
}

/// A digest as 64 hexadecimal digits.
mod hex {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};
    use theriac_protocol::units::Digest;

    pub(super) fn serialize<S: Serializer>(digest: &Digest, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(digest)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(D::Error::custom)
    }
}
