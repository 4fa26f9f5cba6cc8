//! How long a service takes to answer its probes, against what is usual: the one sign of trouble that its users have while it still answers.

use std::collections::VecDeque;
use std::time::Duration;

/// Times of the probes that were answered well. It survives a new process: what is usual stays usual.
#[derive(Debug, Clone, Default)]
pub(super) struct Latency {
    /// Milliseconds, a mean that forgets; of probes while the detector had no alarm.
    usual: f64,
    /// How many probes it is made of.
    known: u32,
    /// The latest, milliseconds, oldest first; at most [`LATEST`].
    latest: VecDeque<f64>,
}

impl Latency {
    /// Takes one probe. One that failed is a sign of its own and says nothing of how long an answer takes.
    pub(super) fn probe(&mut self, ok: bool, took: Duration, calm: bool) {
        if !ok {
            return;
        }
        let ms = 1e3 * took.as_secs_f64();
        if calm {
            self.known = self.known.saturating_add(1);
            let weight = f64::from(self.known.min(MEMORY)).recip();
            self.usual += weight * (ms - self.usual);
        }
        if self.latest.len() == LATEST {
            self.latest.pop_front();
        }
        self.latest.push_back(ms);
    }

    /// A new process runs: how long the former one took is past.
    pub(super) fn renew(&mut self) {
        self.latest.clear();
    }

    /// The median of the latest answers and what is usual, milliseconds, where the first is at least twice the second and a millisecond more.
    pub(super) fn risen(&self) -> Option<(f64, f64)> {
        if self.known < KNOWN_MIN || self.latest.len() < LATEST {
            return None;
        }
        let mut sorted: Vec<f64> = self.latest.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let now = sorted[sorted.len() / 2];
        (now >= TIMES * self.usual && now - self.usual >= MORE_MS).then_some((now, self.usual))
    }
}

/// Answers that tell how long one takes now.
const LATEST: usize = 5;
/// Answers over which the mean of what is usual forgets.
const MEMORY: u32 = 64;
/// Fewer say nothing of what is usual.
const KNOWN_MIN: u32 = 16;
/// So many times what is usual is a rise. A judgement.
const TIMES: f64 = 2.0;
/// … and by so much, since a few tenths of a millisecond are the kernel's. A judgement.
const MORE_MS: f64 = 1.0;

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(latency: &mut Latency, ms: u64, count: u32, calm: bool) {
        for _ in 0..count {
            latency.probe(true, Duration::from_millis(ms), calm);
        }
    }

    #[test]
    fn answers_that_take_twice_as_long_have_risen_and_one_slow_one_among_them_has_not() {
        let mut latency = Latency::default();
        answered(&mut latency, 4, 40, true);
        assert_eq!(latency.risen(), None);
        answered(&mut latency, 90, 2, false);
        assert_eq!(latency.risen(), None, "two of the latest five");
        answered(&mut latency, 7, 3, false);
        assert_eq!(latency.risen(), None, "not twice as long");
        answered(&mut latency, 9, 5, false);
        let (now, usual) = latency.risen().unwrap();
        assert!(
            (now - 9.0).abs() < 1e-9 && (usual - 4.0).abs() < 1e-9,
            "{now} {usual}"
        );
        latency.renew();
        assert_eq!(latency.risen(), None, "the new process has yet to answer");
    }

    #[test]
    fn tenths_of_a_millisecond_a_short_history_and_failed_probes_are_no_rise() {
        let mut fast = Latency::default();
        for _ in 0..40 {
            fast.probe(true, Duration::from_micros(300), true);
        }
        for _ in 0..5 {
            fast.probe(true, Duration::from_micros(1_200), false);
        }
        assert_eq!(fast.risen(), None);
        let mut young = Latency::default();
        answered(&mut young, 4, 8, true);
        answered(&mut young, 400, 5, false);
        assert_eq!(young.risen(), None);
        let mut failing = Latency::default();
        answered(&mut failing, 4, 40, true);
        for _ in 0..9 {
            failing.probe(false, Duration::from_secs(1), false);
        }
        assert_eq!(failing.risen(), None);
    }
}
