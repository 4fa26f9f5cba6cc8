//! A breaker round every executor and target: an action whose executor keeps failing on a service is not asked for again and again.
//!
//! ```text
//! closed ──3 failures in a row──▶ open ──5 min──▶ half-open ──a success──▶ closed
//!                                  ▲                  │
//!                                  └───a failure──────┘
//! ```
//!
//! After Nygard, *Release It!* (2007), "Circuit Breaker". A failure is one of the executor itself: it could not do its part, or did not report in
//! time. An action that was done and did not help, or came too late, is none; verification judges that. Failures further apart than
//! [`FORGOTTEN_AFTER`] are no row. While half-open one attempt is let through: one action at a time is under way for a service, and the attempt
//! opens the breaker again until it succeeds.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::types::{ActionKind, Now};

/// Failures in a row after which a breaker is open.
pub const FAILURES_MAX: u32 = 3;
/// Time from the latest failure or attempt until one more is let through.
pub const OPEN_FOR: Duration = Duration::from_mins(5);
/// While a breaker is closed, a failure so long after the one before begins a new row.
pub const FORGOTTEN_AFTER: Duration = Duration::from_hours(1);

/// One executor on one service that failed and has not succeeded since.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Breaker {
    /// The service.
    pub service: String,
    /// What failed.
    pub action: ActionKind,
    /// Failures in a row.
    pub failures: u32,
    /// The latest failure or attempt, milliseconds on the monotonic clock, rounded up.
    pub at_ms: u64,
    /// When the row of failures began, milliseconds since the Unix epoch: tells one row from another. 0 in rows that an earlier build began.
    #[serde(default)]
    pub since_unix_ms: u64,
}

/// An open breaker, as a ruling knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tripped {
    /// Failures in a row.
    pub failures: u32,
    /// Nothing is let through before this moment of the monotonic clock, in milliseconds.
    pub until_ms: u64,
}

/// Every executor that failed last time. Bounded by the number of services and actions.
#[derive(Debug, Clone, Default)]
pub(crate) struct Breakers(Vec<Breaker>);

impl Breaker {
    /// Since when it lets one attempt through, or will; `None` while it is closed.
    pub fn tripped(&self) -> Option<Tripped> {
        (self.failures >= FAILURES_MAX).then(|| Tripped {
            failures: self.failures,
            until_ms: self.at_ms.saturating_add(millis(OPEN_FOR)),
        })
    }
}

impl Breakers {
    /// Those of an earlier run. On another clock nothing is known of their age, so they count as failed now.
    pub(crate) fn restore(breakers: Vec<Breaker>, same_clock: bool, now: Duration) -> Self {
        let now_ms = millis(now);
        let aged = breakers.into_iter().map(|breaker| Breaker {
            at_ms: if same_clock {
                breaker.at_ms.min(now_ms)
            } else {
                now_ms
            },
            ..breaker
        });
        Self(aged.collect())
    }

    pub(crate) fn all(&self) -> &[Breaker] {
        &self.0
    }

    pub(crate) fn tripped(&self, service: &str, action: ActionKind) -> Option<Tripped> {
        self.0
            .iter()
            .find(|of| of.service == service && of.action == action)
            .and_then(Breaker::tripped)
    }

    /// Those of services that are configured no more are forgotten.
    pub(crate) fn retain(&mut self, is_known: impl Fn(&str) -> bool) {
        self.0.retain(|of| is_known(&of.service));
    }

    /// When the first of a service's open breakers lets an attempt through.
    pub(crate) fn earliest(&self, service: &str) -> Option<Duration> {
        let of = self.0.iter().filter(|of| of.service == service);
        of.filter_map(Breaker::tripped)
            .map(|tripped| Duration::from_millis(tripped.until_ms))
            .min()
    }

    /// The executor could not do its part. Whether the breaker opened by this.
    pub(crate) fn failed(&mut self, service: &str, action: ActionKind, now: Now) -> bool {
        let of = |known: &&mut Breaker| known.service == service && known.action == action;
        let at_ms = millis(now.monotonic);
        if let Some(known) = self.0.iter_mut().find(of) {
            let apart = Duration::from_millis(at_ms.saturating_sub(known.at_ms));
            if known.tripped().is_none() && apart > FORGOTTEN_AFTER {
                (known.failures, known.since_unix_ms) = (0, now.unix_ms);
            }
            known.failures = known.failures.saturating_add(1);
            known.at_ms = at_ms;
            return known.failures == FAILURES_MAX;
        }
        self.0.push(Breaker {
            service: service.to_owned(),
            action,
            failures: 1,
            at_ms,
            since_unix_ms: now.unix_ms,
        });
        false
    }

    /// An attempt begins: an open breaker lets no other one through for a while, whatever becomes of this one and of the node.
    pub(crate) fn attempted(&mut self, service: &str, action: ActionKind, now: Duration) {
        let of = |known: &&mut Breaker| known.service == service && known.action == action;
        if let Some(known) = self.0.iter_mut().find(of)
            && known.tripped().is_some()
        {
            known.at_ms = millis(now);
        }
    }

    /// The executor did its part.
    pub(crate) fn succeeded(&mut self, service: &str, action: ActionKind) {
        self.0
            .retain(|known| known.service != service || known.action != action);
    }

    /// A person mended what made it fail.
    pub(crate) fn close(&mut self, service: &str) {
        self.0.retain(|known| known.service != service);
    }
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn when(seconds: u64) -> Now {
        Now {
            monotonic: at(seconds),
            unix_ms: 1_000 * seconds,
        }
    }

    #[test]
    fn failures_far_apart_are_no_row_and_a_row_keeps_its_beginning_while_attempts_fail() {
        let mut breakers = Breakers::default();
        let hour = FORGOTTEN_AFTER.as_secs();
        for second in [1, 2, hour + 10, hour + 11] {
            assert!(!breakers.failed("a", ActionKind::Hook, when(second)));
        }
        assert!(breakers.failed("a", ActionKind::Hook, when(hour + 12)));
        // Open, it is not forgotten however long nobody asks.
        breakers.failed("a", ActionKind::Hook, when(9 * hour));
        let known = &breakers.all()[0];
        assert_eq!((known.failures, known.since_unix_ms), (4, 1_000 * (hour + 10)));
    }

    #[test]
    fn it_opens_at_the_third_failure_in_a_row_and_closes_at_one_success() {
        let mut breakers = Breakers::default();
        let hook = ActionKind::Hook;
        for (second, opened) in [(1, false), (2, false), (3, true), (4, false)] {
            assert_eq!(breakers.failed("a", hook, when(second)), opened);
        }
        let tripped = breakers.tripped("a", hook).unwrap();
        assert_eq!((tripped.failures, tripped.until_ms), (4, 304_000));
        assert_eq!(
            breakers.tripped("a", ActionKind::Start),
            None,
            "of this executor alone"
        );
        assert_eq!(breakers.tripped("b", hook), None, "on this target alone");
        breakers.succeeded("a", hook);
        assert!(breakers.all().is_empty());
        breakers.failed("a", hook, when(9));
        assert_eq!(breakers.tripped("a", hook), None, "counted anew");
    }

    #[test]
    fn an_attempt_keeps_others_out_and_another_clock_makes_it_no_older() {
        let mut breakers = Breakers::default();
        for second in 1..4 {
            breakers.failed("a", ActionKind::Hook, when(second));
        }
        breakers.attempted("a", ActionKind::Hook, at(400));
        let until = |breakers: &Breakers| breakers.tripped("a", ActionKind::Hook).unwrap().until_ms;
        assert_eq!(until(&breakers), 700_000);
        let kept = breakers.all().to_vec();
        assert_eq!(until(&Breakers::restore(kept.clone(), true, at(500))), 700_000);
        assert_eq!(
            until(&Breakers::restore(kept.clone(), true, at(5))),
            305_000,
            "not ahead of time"
        );
        assert_eq!(until(&Breakers::restore(kept, false, at(5))), 305_000);
    }
}
