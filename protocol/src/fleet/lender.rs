//! Who holds a slot, as the aggregator knows it.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{TTL_MAX, TTL_MIN, slots};
use crate::message::{
    LeaseGrantedV1, LeaseKind, LeaseRefusal, LeaseRefusedV1, LeaseReleaseV1, LeaseRequestV1,
};
use crate::units::{Moment, NodeId};

/// Time after which it is worth asking again, in milliseconds.
const RETRY_MS: u32 = 2_000;

/// Lends slots. A node holds at most one of each kind.
#[derive(Debug, Clone)]
pub struct Lender {
    ttl: Duration,
    /// Share of the nodes that may hold one, in hundredths; a request may ask for less.
    share: u8,
    /// Nothing is lent before.
    quiet_until: Moment,
    lent: BTreeMap<(LeaseKind, NodeId), Holder>,
    last: u64,
}

/// A slot that is lent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holder {
    /// The lease's number.
    pub lease: u64,
    /// The slot is free from then on.
    pub until: Moment,
}

impl Lender {
    /// A lender that starts now. An earlier one, of which nothing is known, may have lent for `longest`.
    ///
    /// Leases are numbered from a random `first`: an edge may give back one of an earlier lender, which is none of this one's.
    ///
    /// `ttl` is brought within [`TTL_MIN`] and [`TTL_MAX`], `share` within 1 and 100.
    pub fn new(now: Moment, ttl: Duration, share: u8, longest: Duration, first: u64) -> Self {
        let ttl = ttl.clamp(TTL_MIN, TTL_MAX);
        Self {
            ttl,
            share: share.clamp(1, 100),
            quiet_until: now.after(longest.max(ttl)),
            lent: BTreeMap::new(),
            last: first,
        }
    }

    /// Answers a request of `node`, of `nodes` that there are now. A node that has a slot gets the term anew.
    ///
    /// # Errors
    /// [`LeaseRefusedV1`], to be sent.
    pub fn request(
        &mut self,
        now: Moment,
        node: &NodeId,
        asked: &LeaseRequestV1,
        nodes: usize,
    ) -> Result<LeaseGrantedV1, LeaseRefusedV1> {
        self.expire(now);
        let (request, kind) = (asked.request, asked.kind);
        let refused = |reason, retry_after_ms| LeaseRefusedV1 {
            request,
            kind,
            reason,
            retry_after_ms,
        };
        if now < self.quiet_until {
            let left = self.quiet_until.since(now).as_millis();
            let left = u32::try_from(left).unwrap_or(u32::MAX).max(RETRY_MS);
            return Err(refused(LeaseRefusal::Young, left));
        }
        if u128::from(asked.need_ms) >= super::counted(self.ttl).as_millis() {
            return Err(refused(LeaseRefusal::TooShort, 30 * RETRY_MS));
        }
        let others = self.holders(kind).filter(|(holder, _)| *holder != node).count();
        if others >= self.slots(nodes, asked.share) {
            return Err(refused(LeaseRefusal::Taken, RETRY_MS));
        }
        self.last = self.last.wrapping_add(1);
        let holder = Holder {
            lease: self.last,
            until: now.after(self.ttl),
        };
        self.lent.insert((kind, node.clone()), holder);
        Ok(LeaseGrantedV1 {
            request,
            kind,
            lease: holder.lease,
            ttl_ms: u32::try_from(self.ttl.as_millis()).unwrap_or(u32::MAX),
        })
    }

    /// A node has let go; whether there was such a lease. An older number than that of its present lease frees nothing.
    pub fn release(&mut self, now: Moment, node: &NodeId, said: LeaseReleaseV1) -> bool {
        self.expire(now);
        let key = (said.kind, node.clone());
        let present = self
            .lent
            .get(&key)
            .is_some_and(|holder| holder.lease == said.lease);
        if present {
            self.lent.remove(&key);
        }
        present
    }

    /// Frees what is over; whether anything was.
    pub fn expire(&mut self, now: Moment) -> bool {
        let before = self.lent.len();
        self.lent.retain(|_, holder| holder.until > now);
        self.lent.len() < before
    }

    /// When the next slot becomes free by itself.
    pub fn poll_timeout(&self) -> Option<Moment> {
        self.lent.values().map(|holder| holder.until).min()
    }

    /// Who has a slot of this kind, by name.
    pub fn holders(&self, kind: LeaseKind) -> impl Iterator<Item = (&NodeId, Holder)> {
        let of = self.lent.iter().filter(move |((of, _), _)| *of == kind);
        of.map(|((_, node), holder)| (node, *holder))
    }

    /// Slots of one kind for so many nodes, of which the requester's own policy allows `share` hundredths.
    pub fn slots(&self, nodes: usize, share: u8) -> usize {
        slots(nodes, self.share.min(share.clamp(1, 100)))
    }

    /// Nothing is lent before.
    pub fn quiet_until(&self) -> Moment {
        self.quiet_until
    }

    /// The term.
    pub fn ttl(&self) -> Duration {
        self.ttl
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_mins(1);

    fn at(seconds: u64) -> Moment {
        Moment(Duration::from_secs(seconds))
    }

    fn node(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    fn asks(request: u64, share: u8) -> LeaseRequestV1 {
        LeaseRequestV1 {
            request,
            kind: LeaseKind::Action,
            share,
            need_ms: 10_000,
        }
    }

    #[test]
    fn lends_nothing_after_its_start_until_every_former_lease_is_over() {
        let mut lender = Lender::new(at(100), TTL, 20, Duration::from_mins(5), 0);
        let refused = lender.request(at(399), &node("a"), &asks(1, 20), 9).unwrap_err();
        assert_eq!((refused.reason, refused.request), (LeaseRefusal::Young, 1));
        assert!(lender.request(at(400), &node("a"), &asks(2, 20), 9).is_ok());
    }

    #[test]
    fn the_smaller_share_counts_and_each_node_has_one_slot_of_each_kind() {
        let mut lender = Lender::new(at(0), TTL, 30, Duration::ZERO, 0);
        let nodes = 10;
        assert!(lender.request(at(60), &node("a"), &asks(1, 10), nodes).is_ok());
        let refused = lender
            .request(at(60), &node("b"), &asks(2, 10), nodes)
            .unwrap_err();
        assert_eq!(refused.reason, LeaseRefusal::Taken);
        // Its own again, and the other kind, are no second slot.
        assert!(lender.request(at(61), &node("a"), &asks(3, 10), nodes).is_ok());
        let checkpoint = LeaseRequestV1 {
            kind: LeaseKind::Checkpoint,
            ..asks(4, 10)
        };
        assert!(lender.request(at(61), &node("b"), &checkpoint, nodes).is_ok());
        for name in ["b", "c"] {
            assert!(lender.request(at(62), &node(name), &asks(5, 100), nodes).is_ok());
        }
        assert!(lender.request(at(62), &node("d"), &asks(6, 100), nodes).is_err());
        assert_eq!(lender.holders(LeaseKind::Action).count(), 3);
    }

    #[test]
    fn only_the_present_lease_is_given_back_and_an_expired_one_is_free() {
        let mut lender = Lender::new(at(0), TTL, 1, Duration::ZERO, 0);
        let first = lender.request(at(60), &node("a"), &asks(1, 1), 9).unwrap();
        let second = lender.request(at(61), &node("a"), &asks(2, 1), 9).unwrap();
        let release = |lease| LeaseReleaseV1 {
            kind: LeaseKind::Action,
            lease,
        };
        assert!(!lender.release(at(62), &node("a"), release(first.lease)));
        assert!(!lender.release(at(62), &node("b"), release(second.lease)));
        assert!(lender.request(at(120), &node("b"), &asks(3, 1), 9).is_err());
        assert_eq!(lender.poll_timeout(), Some(at(121)));
        let third = lender.request(at(121), &node("b"), &asks(4, 1), 9).unwrap();
        assert!(lender.release(at(122), &node("b"), release(third.lease)));
        assert_eq!(lender.poll_timeout(), None);
    }

    #[test]
    fn what_needs_longer_than_a_lease_lasts_is_told_so() {
        let mut lender = Lender::new(at(0), TTL, 20, Duration::ZERO, 0);
        let long = LeaseRequestV1 {
            need_ms: 60_000,
            ..asks(1, 20)
        };
        let refused = lender.request(at(60), &node("a"), &long, 9).unwrap_err();
        assert_eq!(refused.reason, LeaseRefusal::TooShort);
    }
}
