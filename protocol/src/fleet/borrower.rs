//! The slot of one kind that an edge has, or wants.

use std::time::Duration;

use super::counted;
use crate::message::{
    LeaseGrantedV1, LeaseKind, LeaseRefusal, LeaseRefusedV1, LeaseReleaseV1, LeaseRequestV1, ToAggregator,
};

/// An answer that has not come after so long is not waited for: the request is sent anew.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time that an aggregator may ask to be left alone for.
const RETRY_MAX: Duration = Duration::from_mins(1);
/// Least time between a request that was answered with a slot and the next one.
const RENEW_AFTER: Duration = Duration::from_secs(1);
/// Requests whose answer may still come; an older one's grant is not taken.
const PENDING_MAX: usize = 8;
/// What is needed is told in whole steps of this, rounded up: how long an action may take at a node is its own affair.
const NEED_STEP: Duration = Duration::from_secs(10);

/// A slot that this edge holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Its number.
    pub lease: u64,
    /// Let go of by then, on the clock that was handed in.
    pub until: Duration,
}

/// Asks for a slot while it is wanted, and gives it back. Times are of one clock of the host that runs on while the host is suspended
/// (`CLOCK_BOOTTIME`).
#[derive(Debug, Clone)]
pub struct Borrower {
    kind: LeaseKind,
    share: u8,
    /// What is wanted has to last so long; zero: what there is, is kept while it lasts.
    wanted: Option<Duration>,
    /// Requests of this session, with the moment before each was sent.
    pending: Vec<(u64, Duration)>,
    lease: Option<Lease>,
    /// A lease to give back.
    returned: Option<u64>,
    /// No request before this.
    not_before: Duration,
    refusal: Option<LeaseRefusal>,
}

impl Borrower {
    /// Wants nothing yet. `share` is that of the policy, in hundredths.
    pub fn new(kind: LeaseKind, share: u8) -> Self {
        Self {
            kind,
            share,
            wanted: None,
            pending: Vec::new(),
            lease: None,
            returned: None,
            not_before: Duration::ZERO,
            refusal: None,
        }
    }

    /// Says what is wanted from now on: a slot that still lasts so long, only to keep the one there is (zero), or none. Whoever wanted one has
    /// stopped to count on it before it says `None`.
    pub fn want(&mut self, wanted: Option<Duration>) {
        self.wanted = wanted;
        if wanted.is_none() {
            self.refusal = None;
            self.not_before = Duration::ZERO;
            // A slot that is given back stands for every one that was asked for before: none of those is taken after that.
            self.pending.clear();
            if let Some(lease) = self.lease.take() {
                self.returned = Some(lease.lease);
            }
        }
    }

    /// The next thing to say, until `None`. `now` is read before it is sent; `number` gives a random one.
    pub fn poll(&mut self, now: Duration, number: impl FnOnce() -> u64) -> Option<ToAggregator> {
        if self.lease.is_some_and(|lease| lease.until <= now) {
            self.lease = None;
        }
        if let Some(lease) = self.returned.take() {
            let kind = self.kind;
            return Some(ToAggregator::LeaseRelease(LeaseReleaseV1 { kind, lease }));
        }
        let need = self.wanted.filter(|need| !need.is_zero())?;
        if self
            .lease
            .is_some_and(|lease| lease.until.saturating_sub(now) >= need)
            || now < self.not_before
        {
            return None;
        }
        let request = number();
        self.pending.push((request, now));
        if self.pending.len() > PENDING_MAX {
            self.pending.remove(0);
        }
        self.not_before = now.saturating_add(ANSWER_TIMEOUT);
        Some(ToAggregator::LeaseRequest(LeaseRequestV1 {
            request,
            kind: self.kind,
            share: self.share,
            need_ms: in_steps(need),
        }))
    }

    /// A slot was lent. An answer to a request of another session, or from before the slot was last not wanted, is not taken; it is given back
    /// while none is wanted. Never otherwise: the aggregator knows one lease of each node, and that may stand for the one that is held.
    pub fn granted(&mut self, granted: &LeaseGrantedV1) {
        if granted.kind != self.kind {
            return;
        }
        let known = self
            .pending
            .iter()
            .position(|(request, _)| *request == granted.request);
        let Some((_, sent)) = known.map(|at| self.pending.remove(at)) else {
            if self.wanted.is_none() {
                self.returned = Some(granted.lease);
            }
            return;
        };
        let ttl = Duration::from_millis(granted.ttl_ms.into());
        let lease = Lease {
            lease: granted.lease,
            until: sent.saturating_add(counted(ttl)),
        };
        self.refusal = None;
        self.not_before = sent.saturating_add(RENEW_AFTER);
        if self.lease.is_none_or(|present| present.until < lease.until) {
            self.lease = Some(lease);
        }
    }

    /// No slot was lent.
    pub fn refused(&mut self, now: Duration, refused: &LeaseRefusedV1) {
        let before = self.pending.len();
        self.pending.retain(|(request, _)| *request != refused.request);
        if self.pending.len() < before {
            self.refusal = Some(refused.reason);
            let retry = Duration::from_millis(refused.retry_after_ms.into());
            self.not_before = now.saturating_add(retry.clamp(Duration::from_secs(1), RETRY_MAX));
        }
    }

    /// The session has ended: no answer comes any more. What is held is held.
    pub fn disconnected(&mut self) {
        self.pending.clear();
        self.returned = None;
        self.not_before = Duration::ZERO;
    }

    /// The slot that is held now.
    pub fn lease(&self, now: Duration) -> Option<Lease> {
        self.lease.filter(|lease| lease.until > now)
    }

    /// Why the last request was refused, while a slot is wanted.
    pub fn refusal(&self) -> Option<LeaseRefusal> {
        self.refusal
    }

    /// When [`Self::poll`] may have something to say next.
    pub fn poll_timeout(&self) -> Option<Duration> {
        self.wanted
            .filter(|need| !need.is_zero())
            .map(|_| self.not_before)
    }
}

fn in_steps(need: Duration) -> u32 {
    let steps = need.as_millis().div_ceil(NEED_STEP.as_millis());
    u32::try_from(steps * NEED_STEP.as_millis()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEED: Duration = Duration::from_secs(10);

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn granted(request: u64, lease: u64, ttl_ms: u32) -> LeaseGrantedV1 {
        LeaseGrantedV1 {
            request,
            kind: LeaseKind::Action,
            lease,
            ttl_ms,
        }
    }

    fn wanting() -> Borrower {
        let mut borrower = Borrower::new(LeaseKind::Action, 20);
        borrower.want(Some(NEED));
        borrower
    }

    fn request(borrower: &mut Borrower, now: Duration, number: u64) -> Option<u64> {
        match borrower.poll(now, || number)? {
            ToAggregator::LeaseRequest(asked) => Some(asked.request),
            _ => None,
        }
    }

    #[test]
    fn a_lease_is_counted_from_its_own_request_and_less_than_its_term() {
        let mut borrower = wanting();
        assert_eq!(request(&mut borrower, at(100), 1), Some(1));
        assert_eq!(
            request(&mut borrower, at(101), 2),
            None,
            "asked twice within the time for an answer"
        );
        assert_eq!(request(&mut borrower, at(106), 2), Some(2));
        borrower.granted(&granted(1, 7, 60_000));
        let lease = borrower.lease(at(106)).unwrap();
        assert_eq!(lease.until, at(148));
        borrower.granted(&granted(9, 8, 60_000));
        assert_eq!(
            borrower.lease(at(106)).unwrap().lease,
            7,
            "an answer to no request was taken"
        );
        assert_eq!(borrower.lease(at(160)), None);
    }

    #[test]
    fn what_is_not_wanted_any_more_is_given_back_also_when_it_comes_late() {
        let mut borrower = wanting();
        let asked = request(&mut borrower, at(1), 1).unwrap();
        borrower.want(None);
        borrower.granted(&granted(asked, 7, 60_000));
        assert_eq!(borrower.lease(at(2)), None);
        let said = borrower.poll(at(2), || 9);
        let released = LeaseReleaseV1 {
            kind: LeaseKind::Action,
            lease: 7,
        };
        assert_eq!(said, Some(ToAggregator::LeaseRelease(released)));
        assert_eq!(borrower.poll(at(60), || 9), None);
    }

    #[test]
    fn a_session_that_ended_answers_nothing_and_takes_no_lease_away() {
        let mut borrower = wanting();
        let asked = request(&mut borrower, at(1), 1).unwrap();
        borrower.granted(&granted(asked, 7, 20_000));
        borrower.want(Some(at(19)));
        let asked = request(&mut borrower, at(5), 2).unwrap();
        borrower.disconnected();
        borrower.granted(&granted(asked, 8, 60_000));
        assert_eq!(borrower.lease(at(5)).unwrap().lease, 7);
    }

    #[test]
    fn a_lease_that_lasts_long_enough_is_asked_for_once_and_one_that_does_not_again() {
        let mut borrower = wanting();
        let asked = request(&mut borrower, at(1), 1).unwrap();
        borrower.granted(&granted(asked, 7, 60_000));
        assert_eq!(request(&mut borrower, at(39), 2), None);
        assert_eq!(request(&mut borrower, at(40), 2), Some(2));
        borrower.want(Some(Duration::ZERO));
        assert_eq!(request(&mut borrower, at(90), 3), None, "kept, not renewed");
    }

    #[test]
    fn what_is_needed_is_told_in_steps_of_ten_seconds_rounded_up() {
        for (ms, told) in [
            (1, 10_000),
            (10_000, 10_000),
            (10_001, 20_000),
            (154_321, 160_000),
        ] {
            assert_eq!(in_steps(Duration::from_millis(ms)), told);
        }
        assert_eq!(in_steps(Duration::MAX), u32::MAX);
    }

    #[test]
    fn a_refusal_is_heeded_for_a_minute_at_most() {
        let mut borrower = wanting();
        let asked = request(&mut borrower, at(1), 1).unwrap();
        let refused = LeaseRefusedV1 {
            request: asked,
            kind: LeaseKind::Action,
            reason: LeaseRefusal::Taken,
            retry_after_ms: u32::MAX,
        };
        borrower.refused(at(2), &refused);
        assert_eq!(borrower.refusal(), Some(LeaseRefusal::Taken));
        assert_eq!(request(&mut borrower, at(61), 2), None);
        assert_eq!(request(&mut borrower, at(62), 2), Some(2));
    }
}
