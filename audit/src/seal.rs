//! The counter-signature on how far an edge's privacy ledger has come.
//!
//! The edge keeps it in the ledger itself. A ledger that lacks what was signed was lost or restored from an old copy, and an auditor with the
//! log's public key alone can hold an exported ledger to it.

use theriac_protocol::message::LedgerSealV1;
use theriac_protocol::units::{Digest, NodeId, Timestamp};

use crate::checkpoint::{LogKey, LogPublicKey};

/// What a seal says and signs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealBody {
    /// Whose ledger it is.
    pub node: NodeId,
    /// Records of the ledger; 0: nothing is on record.
    pub records: u64,
    /// Head of the last of them.
    pub head: Digest,
    /// When it was signed.
    pub signed: Timestamp,
}

impl SealBody {
    /// The bytes that are signed; see [`crate::receipt::ReceiptBody::signing_bytes`] for why no other statement has them.
    pub fn signing_bytes(&self) -> Vec<u8> {
        let node = self.node.as_str().as_bytes();
        #[expect(clippy::cast_possible_truncation, reason = "a node id has at most 63 bytes")]
        let node_length = [node.len() as u8];
        [
            b"\0theriac ledger seal v1\n".as_slice(),
            &node_length,
            node,
            &self.records.to_be_bytes(),
            &self.head.0,
            &self.signed.0.to_be_bytes(),
        ]
        .concat()
    }

    /// The signed seal.
    pub fn sign(&self, key: &LogKey) -> LedgerSealV1 {
        LedgerSealV1 {
            records: self.records,
            head: self.head,
            signed: self.signed,
            key: key.public().to_string(),
            signature: key.sign(&self.signing_bytes()).to_vec(),
        }
    }
}

/// Whether `seal` is signed with `key` for the ledger of `node`. The key that the seal names is not looked at.
#[must_use]
pub fn verify_seal(seal: &LedgerSealV1, node: &NodeId, key: &LogPublicKey) -> bool {
    let body = SealBody {
        node: node.clone(),
        records: seal.records,
        head: seal.head,
        signed: seal.signed,
    };
    key.verifies(&body.signing_bytes(), &seal.signature)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seal_holds_for_exactly_what_it_says() {
        let key = LogKey::from_seed("theriac/test", &[7; 32]).unwrap();
        let body = SealBody {
            node: NodeId::new("site-a").unwrap(),
            records: 12,
            head: Digest([2; 32]),
            signed: Timestamp(99),
        };
        let seal = body.sign(&key);
        let named: LogPublicKey = seal.key.parse().unwrap();
        assert!(verify_seal(&seal, &body.node, &key.public()) && verify_seal(&seal, &body.node, &named));
        assert!(!verify_seal(&seal, &NodeId::new("site-b").unwrap(), &named));
        let changed = [
            LedgerSealV1 {
                records: 11,
                ..seal.clone()
            },
            LedgerSealV1 {
                head: Digest([3; 32]),
                ..seal.clone()
            },
            LedgerSealV1 {
                signed: Timestamp(98),
                ..seal.clone()
            },
            LedgerSealV1 {
                signature: vec![0; 64],
                ..seal.clone()
            },
        ];
        for changed in changed {
            assert!(!verify_seal(&changed, &body.node, &named), "{changed:?}");
        }
        let other = LogKey::from_seed("theriac/test", &[8; 32]).unwrap().public();
        assert!(!verify_seal(&seal, &body.node, &other));
    }
}
