//! Updates that come after their round's end: kept apart, for the next round.

use std::collections::BTreeMap;

use super::{Context, Ignored, Offer, Output};
use crate::refusal::RefusalCode;
use crate::units::{Digest, NodeId, Round};

/// What is known of late updates. Bounded by the nodes that the driver admits: one update a node.
#[derive(Debug, Default)]
pub(super) struct Late {
    /// The round whose late updates are taken.
    open: Option<Ended>,
    /// On their way to the disk, of that round or of one before it.
    storing: BTreeMap<(Round, NodeId), Digest>,
    /// Durable, of that round.
    stored: BTreeMap<NodeId, Digest>,
}

/// A round that no longer collects, as it was announced.
#[derive(Debug, Clone, Copy)]
struct Ended {
    round: Round,
    nonce: u64,
    base_digest: Digest,
}

impl Late {
    /// Whether late updates of this round are taken.
    pub(super) fn takes(&self, round: Round) -> bool {
        self.open.is_some_and(|ended| ended.round == round)
    }
}

impl Context {
    /// A round stops collecting on the base in force: its late updates are taken from now on, those of the round before it no longer.
    pub(super) fn stops_collecting(&mut self, round: Round, nonce: u64) {
        if self.config.late_updates {
            let base_digest = self.base.digest;
            self.late.stored.clear();
            self.late.open = Some(Ended {
                round,
                nonce,
                base_digest,
            });
        }
    }

    /// An update for the round of [`Late::takes`] of a node that has none in it.
    pub(super) fn offer_late(&mut self, offer: Offer) {
        let Offer {
            node,
            round,
            nonce,
            base_digest,
            payload_digest,
        } = offer;
        let Some(ended) = self.late.open else {
            return self.refuse(node, round, RefusalCode::RoundClosed);
        };
        if let Some(first) = self.late.stored.get(&node) {
            if *first == payload_digest {
                self.repeat_receipt(node, round, payload_digest);
            } else {
                self.refuse(node, round, RefusalCode::Duplicate);
            }
        } else if let Some(first) = self.late.storing.get(&(round, node.clone())) {
            if *first == payload_digest {
                self.ignore(Ignored::RepeatedWhileStoring);
            } else {
                self.refuse(node, round, RefusalCode::Duplicate);
            }
        } else if nonce != ended.nonce {
            self.refuse(node, round, RefusalCode::WrongNonce);
        } else if base_digest != ended.base_digest {
            self.refuse(node, round, RefusalCode::WrongBase);
        } else {
            self.counters.updates_late += 1;
            self.late.storing.insert((round, node.clone()), payload_digest);
            self.output(Output::StoreLate {
                node,
                round,
                payload_digest,
            });
        }
    }

    /// Whether it was a late update that became durable; its node is told.
    pub(super) fn late_is_stored(&mut self, node: &NodeId, round: Round) -> bool {
        let Some(payload_digest) = self.late.storing.remove(&(round, node.clone())) else {
            return false;
        };
        if self.late.takes(round) {
            self.late.stored.insert(node.clone(), payload_digest);
        }
        self.output(Output::Receipt {
            node: node.clone(),
            round,
            payload_digest,
        });
        true
    }

    /// Whether it was a late update that could not be made durable; its node is told.
    pub(super) fn late_failed(&mut self, node: &NodeId, round: Round) -> bool {
        let failed = self.late.storing.remove(&(round, node.clone())).is_some();
        if failed {
            self.refuse(node.clone(), round, RefusalCode::StorageFull);
        }
        failed
    }
}
