//! Who is let in: held back while the service restarts, turned away while it drains, counted while in hand.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};

/// The door of one proxy.
#[derive(Debug)]
pub(super) struct Door {
    sign: watch::Sender<Sign>,
    in_hand: watch::Sender<usize>,
}

/// What hangs at it. Both end by themselves, so that nothing is left when whoever hung them is gone.
#[derive(Debug, Clone, Copy, Default)]
struct Sign {
    hold_until: Option<Instant>,
    drain_until: Option<Instant>,
    /// For which intent it drains.
    drain_by: u64,
    /// A person's, until they take it back.
    ordered: bool,
}

/// One request or connection in hand, counted until it is dropped.
#[derive(Debug)]
pub(super) struct InHand(watch::Sender<usize>);

impl Drop for InHand {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// It is draining; whether that ends by itself within so long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Draining(pub(super) Option<Duration>);

impl Door {
    pub(super) fn new() -> Self {
        Self {
            sign: watch::Sender::new(Sign::default()),
            in_hand: watch::Sender::new(0),
        }
    }

    /// Waits while it is held, at most until `patience`, which its first wait sets: held anew, it does not wait anew.
    /// Counted before anything is sent upstream, so that whoever waits for the last one misses none.
    pub(super) async fn enter(
        &self,
        patience: &mut Option<Instant>,
        longest: Duration,
    ) -> Result<InHand, Draining> {
        let mut sign = self.sign.subscribe();
        loop {
            let now = Instant::now();
            // Counted first: a drain that begins right after the look would not see it otherwise.
            self.in_hand.send_modify(|count| *count += 1);
            let in_hand = InHand(self.in_hand.clone());
            let seen = *sign.borrow_and_update();
            if let Some(draining) = seen.draining(now) {
                return Err(draining);
            }
            let Some(until) = seen.hold_until.filter(|until| now < *until) else {
                return Ok(in_hand);
            };
            let until = until.min(*patience.get_or_insert(now + longest));
            if until <= now {
                return Ok(in_hand);
            }
            drop(in_hand);
            // Ended by a change or by its time: both are looked at above.
            drop(timeout_at(until, sign.changed()).await);
        }
    }

    pub(super) fn hold(&self, longest: Duration) {
        self.sign
            .send_modify(|sign| sign.hold_until = Some(Instant::now() + longest));
    }

    pub(super) fn release(&self) {
        self.sign.send_modify(|sign| sign.hold_until = None);
    }

    /// When it stops holding by itself; `None` while it holds nobody.
    pub(super) fn holds_until(&self) -> Option<Instant> {
        self.sign
            .borrow()
            .hold_until
            .filter(|until| Instant::now() < *until)
    }

    /// Waits until it holds, or for so long.
    pub(super) async fn held_within(&self, longest: Duration) {
        let mut sign = self.sign.subscribe();
        let held = sign.wait_for(|sign| sign.hold_until.is_some_and(|until| Instant::now() < until));
        drop(timeout(longest, held).await);
    }

    pub(super) fn drain(&self, lasts: Duration, by: u64) {
        self.sign.send_modify(|sign| {
            sign.drain_until = Some(Instant::now() + lasts);
            sign.drain_by = by;
        });
    }

    /// Of that intent alone.
    pub(super) fn undrain(&self, by: u64) {
        self.sign.send_if_modified(|sign| {
            let its = sign.drain_by == by;
            its && sign.drain_until.take().is_some()
        });
    }

    pub(super) fn order(&self, drained: bool) {
        self.sign
            .send_if_modified(|sign| std::mem::replace(&mut sign.ordered, drained) != drained);
    }

    pub(super) fn is_draining(&self) -> bool {
        self.sign.borrow().draining(Instant::now()).is_some()
    }

    pub(super) fn in_hand(&self) -> usize {
        *self.in_hand.borrow()
    }

    /// Waits until nothing is in hand, or for so long. How many still are.
    pub(super) async fn finished(&self, longest: Duration) -> usize {
        let mut in_hand = self.in_hand.subscribe();
        drop(timeout(longest, in_hand.wait_for(|count| *count == 0)).await);
        self.in_hand()
    }
}

impl Sign {
    fn draining(&self, now: Instant) -> Option<Draining> {
        if self.ordered {
            return Some(Draining(None));
        }
        let until = self.drain_until.filter(|until| now < *until)?;
        Some(Draining(Some(until - now)))
    }
}
