//! When to try again.

use std::time::Duration;

/// Exponential waiting with *full jitter*: a uniform share of `min(cap, base · 2^attempt)`, so that a fleet that lost
/// its aggregator at one moment does not return at one moment.
///
/// Randomness comes from the caller. Reset it after a Welcome, not after a handshake.
#[derive(Debug, Clone)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    attempt: u32,
}

impl Backoff {
    /// Begins at `base` (the longest first wait) and never waits longer than `cap`.
    pub fn new(base: Duration, cap: Duration) -> Self {
        Self {
            base,
            cap,
            attempt: 0,
        }
    }

    /// The next wait. `uniform` is a random number in [0, 1); anything else is taken as the nearest bound.
    pub fn next(&mut self, uniform: f64) -> Duration {
        let doubled = self
            .base
            .saturating_mul(2_u32.saturating_pow(self.attempt.min(31)));
        self.attempt = self.attempt.saturating_add(1);
        let share = if uniform.is_finite() {
            uniform.clamp(0.0, 1.0)
        } else {
            0.5
        };
        doubled.min(self.cap).mul_f64(share)
    }

    /// The next wait when the peer named a shortest one: that, plus the jitter.
    pub fn next_after(&mut self, at_least: Duration, uniform: f64) -> Duration {
        at_least.saturating_add(self.next(uniform))
    }

    /// Begins anew.
    pub fn reset(&mut self) {
        self.attempt = 0;
    }
}

impl Default for Backoff {
    /// From 2 seconds to 60.
    fn default() -> Self {
        Self::new(Duration::from_secs(2), Duration::from_mins(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(value: u64) -> Duration {
        Duration::from_secs(value)
    }

    #[test]
    fn doubles_up_to_the_cap() {
        let mut backoff = Backoff::new(seconds(1), seconds(10));
        let waits: Vec<_> = (0..6).map(|_| backoff.next(1.0)).collect();
        assert_eq!(waits, [1, 2, 4, 8, 10, 10].map(seconds));
        for _ in 0..100 {
            assert_eq!(backoff.next(1.0), seconds(10));
        }
        backoff.reset();
        assert_eq!(backoff.next(1.0), seconds(1));
    }

    #[test]
    fn jitter_spreads_over_the_whole_range() {
        let mut backoff = Backoff::new(seconds(8), seconds(8));
        assert_eq!(backoff.next(0.0), Duration::ZERO);
        assert_eq!(backoff.next(0.25), seconds(2));
        assert_eq!(backoff.next(f64::NAN), seconds(4));
        assert_eq!(backoff.next(7.0), seconds(8));
    }

    #[test]
    fn never_before_the_peer_said() {
        let mut backoff = Backoff::new(seconds(1), seconds(10));
        assert_eq!(backoff.next_after(seconds(30), 0.0), seconds(30));
        assert_eq!(backoff.next_after(seconds(30), 0.5), seconds(31));
    }
}
