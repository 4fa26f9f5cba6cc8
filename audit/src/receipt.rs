//! What an edge holds about its update: the aggregator's signature that it is stored, and where in the log.

use theriac_protocol::message::ReceiptV1;
use theriac_protocol::units::{Digest, NodeId, Round};

use crate::checkpoint::{LogKey, LogPublicKey};

/// What a receipt says and signs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiptBody {
    /// The round.
    pub round: Round,
    /// Who sent the update.
    pub node: NodeId,
    /// SHA-256 of the stored payload.
    pub payload_digest: Digest,
    /// Position of the verdict in the audit log.
    pub leaf_index: u64,
    /// Head of the edge's privacy ledger, counter-signed by this.
    pub ledger_head: Digest,
}

impl ReceiptBody {
    /// The bytes that are signed. They begin with a zero byte, which no signed note holds, and every field has a fixed length
    /// or a length before it, so no other statement has the same bytes.
    pub fn signing_bytes(&self) -> Vec<u8> {
        let node = self.node.as_str().as_bytes();
        #[expect(clippy::cast_possible_truncation, reason = "a node id has at most 63 bytes")]
        let node_length = [node.len() as u8];
        [
            b"\0theriac receipt v1\n".as_slice(),
            &self.round.0.to_be_bytes(),
            &node_length,
            node,
            &self.payload_digest.0,
            &self.leaf_index.to_be_bytes(),
            &self.ledger_head.0,
        ]
        .concat()
    }

    /// The signed receipt. The same body always gives the same bytes.
    pub fn sign(&self, key: &LogKey) -> ReceiptV1 {
        ReceiptV1 {
            round: self.round,
            payload_digest: self.payload_digest,
            leaf_index: self.leaf_index,
            ledger_head: self.ledger_head,
            signature: key.sign(&self.signing_bytes()).to_vec(),
        }
    }
}

/// Whether `receipt` is signed by the log for an update of `node`.
#[must_use]
pub fn verify_receipt(receipt: &ReceiptV1, node: &NodeId, key: &LogPublicKey) -> bool {
    let body = ReceiptBody {
        round: receipt.round,
        node: node.clone(),
        payload_digest: receipt.payload_digest,
        leaf_index: receipt.leaf_index,
        ledger_head: receipt.ledger_head,
    };
    key.verifies(&body.signing_bytes(), &receipt.signature)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> LogKey {
        LogKey::from_seed("theriac/test", &[7; 32]).unwrap()
    }

    fn body() -> ReceiptBody {
        ReceiptBody {
            round: Round(9),
            node: NodeId::new("site-a").unwrap(),
            payload_digest: Digest([1; 32]),
            leaf_index: 77,
            ledger_head: Digest([2; 32]),
        }
    }

    #[test]
    fn a_receipt_holds_for_exactly_what_it_says() {
        let (receipt, key) = (body().sign(&key()), key().public());
        let node = body().node;
        assert!(verify_receipt(&receipt, &node, &key));
        assert!(!verify_receipt(&receipt, &NodeId::new("site-b").unwrap(), &key));
        let changed = [
            ReceiptV1 {
                round: Round(10),
                ..receipt.clone()
            },
            ReceiptV1 {
                payload_digest: Digest([3; 32]),
                ..receipt.clone()
            },
            ReceiptV1 {
                leaf_index: 78,
                ..receipt.clone()
            },
            ReceiptV1 {
                ledger_head: Digest([3; 32]),
                ..receipt.clone()
            },
            ReceiptV1 {
                signature: vec![0; 64],
                ..receipt.clone()
            },
            ReceiptV1 {
                signature: vec![],
                ..receipt.clone()
            },
        ];
        for changed in changed {
            assert!(!verify_receipt(&changed, &node, &key), "{changed:?}");
        }
        let other = LogKey::from_seed("theriac/test", &[8; 32]).unwrap().public();
        assert!(!verify_receipt(&receipt, &node, &other));
    }

    #[test]
    fn a_repeated_receipt_is_the_same_bytes() {
        assert_eq!(body().sign(&key()), body().sign(&key()));
    }
}
