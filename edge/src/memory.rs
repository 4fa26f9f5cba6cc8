//! Where a service's memory stands against the most that it can have, and whether it will have used that up soon.
//!
//! Lines through the last 19 s, 75 s and 5 min (or through as many samples, where those are rarer than twice a second or so). One counts where
//! its points rise together (Kendall's τ at least `TOGETHER`, so that a step to another level, or a saw tooth, is no rise), with its
//! slope (Theil–Sen) times τ², and at most `STRETCH` times as far ahead as it reaches back. The soonest end of the three is told.

use std::time::Duration;

use theriac_heal::incident::MemorySeen;
use theriac_model::risk::exhaustion::{Limit, Track};
use theriac_model::risk::{Horizon, RiskError};

/// What is further off than this does not matter yet: a restart takes seconds.
const SOON: Duration = Duration::from_mins(5);
/// So many samples at least, where they are rare.
const SAMPLES: u32 = 128;
/// As far ahead as lines are drawn at all.
const AHEAD_MAX: Duration = Duration::from_hours(24);
/// Parts of the longest window that lines are drawn through.
const PARTS: [f64; 3] = [1.0 / 16.0, 1.0 / 4.0, 1.0];
/// Pairs of points that rise less those that fall, as a share: four of five rise. A judgement.
const TOGETHER: f64 = 0.6;
/// A line is drawn at most so many times as far as its points reach back.
const STRETCH: f64 = 3.0;

/// One service's memory over time.
#[derive(Debug)]
pub struct MemoryCourse {
    limit: Option<Limit>,
    /// Memory of the host, in bytes; `None` where the system does not tell.
    host: Option<f64>,
    track: Track,
    ahead_s: f64,
    latest: Option<f64>,
}

impl MemoryCourse {
    /// Nothing seen yet. `limit` is in bytes; without one the host's memory is the limit, less what others use. `interval` is the time
    /// between samples.
    ///
    /// # Errors
    /// [`RiskError`] never, as long as horizons may be of 5 min to a day.
    pub fn new(limit: Option<Limit>, interval: Duration) -> Result<Self, RiskError> {
        let ahead = SOON.max(interval.saturating_mul(SAMPLES)).min(AHEAD_MAX);
        let host = procfs_total();
        Ok(Self {
            limit,
            host,
            track: Track::new(&[Horizon::new(ahead)?])?,
            ahead_s: ahead.as_secs_f64(),
            latest: None,
        })
    }

    /// Takes `bytes` in use at `now_s` seconds of a clock that never stands still; `host_used` is the share of the host's memory in use, 0 to
    /// 1. A value that is not finite is left out.
    pub fn push(&mut self, now_s: f64, bytes: f64, host_used: f64) {
        let share = match (self.limit, self.host) {
            (Some(limit), _) => limit.share(bytes),
            (None, Some(host)) => bytes / (bytes + (1.0 - host_used).max(0.0) * host),
            (None, None) => f64::NAN,
        };
        if share.is_finite() {
            self.track.push(now_s, share);
            self.latest = Some(share);
        }
    }

    /// The process is another one.
    pub fn restarted(&mut self) {
        self.track.restart();
        self.latest = None;
    }

    /// What is known now.
    pub fn seen(&self) -> MemorySeen {
        MemorySeen {
            share: self.latest,
            full_in: self.full_in(),
        }
    }

    fn full_in(&self) -> Option<Duration> {
        let course = self.track.course()?;
        let ends = PARTS.iter().filter_map(|part| {
            let window = part * self.ahead_s;
            let line = course.line(window)?;
            let slope = line.slope * line.rising * line.rising;
            let steady = line.rising >= TOGETHER && slope > 0.0;
            let left = (1.0 - line.level).max(0.0) / slope;
            (steady && left <= self.ahead_s.min(STRETCH * window)).then_some(left)
        });
        ends.min_by(f64::total_cmp).map(Duration::from_secs_f64)
    }
}

/// The host's memory, in bytes.
fn procfs_total() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
    let kib: f64 = line.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(1_024.0 * kib)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: f64 = 1_048_576.0;

    fn course(limit_mib: f64, interval: Duration) -> MemoryCourse {
        MemoryCourse::new(Some(Limit::new(limit_mib * MIB).unwrap()), interval).unwrap()
    }

    /// Seconds from the beginning of a rise of `per_s` MiB/s from 40 MiB until it is told, and of what is left by then; 10 min of flicker
    /// come before. `None` when it is not told before the limit.
    fn told_after(per_s: f64, limit_mib: f64, interval: Duration) -> Option<(f64, f64)> {
        let mut course = course(limit_mib, interval);
        let step = interval.as_secs_f64();
        let begin = (600.0 / step).ceil();
        let mut row = 0.0;
        let mut noise = 7_u64;
        loop {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            let flicker = (noise % 1_000) as f64 / 1_000.0;
            let grown = (row - begin).max(0.0) * step * per_s;
            if 40.0 + grown >= limit_mib {
                return None;
            }
            course.push(row * step, (40.0 + grown + flicker) * MIB, f64::NAN);
            let full_in = course.seen().full_in;
            if row <= begin {
                assert_eq!(full_in, None, "nothing rises, row {row}");
            } else if full_in.is_some() {
                return Some(((row - begin) * step, (limit_mib - 40.0 - grown) / per_s));
            }
            row += 1.0;
        }
    }

    #[test]
    fn a_leak_is_told_well_before_the_limit_whatever_its_pace() {
        // MiB/s, limit in MiB, samples a second.
        for (per_s, limit, hertz, after_max, left_min) in [
            (12.0, 320.0, 4.0, 13.0, 8.0),
            (24.0, 1_024.0, 1.0, 20.0, 20.0),
            (1.0, 512.0, 1.0, 450.0, 20.0),
            (0.1, 512.0, 1.0, 4_700.0, 60.0),
        ] {
            let interval = Duration::from_secs_f64(1.0 / hertz);
            let (after, left) = told_after(per_s, limit, interval).unwrap();
            println!("{per_s} MiB/s to {limit} MiB: told after {after:.1} s, {left:.1} s before");
            assert!(
                after <= after_max && left >= left_min,
                "{per_s} MiB/s: {after} s after its begin, {left} s before its end"
            );
        }
    }

    #[test]
    fn a_step_to_another_level_a_saw_tooth_and_a_rise_that_ends_far_below_are_not_about_to_use_it_up() {
        let second = Duration::from_secs(1);
        let told = |of: &dyn Fn(f64) -> f64| {
            let mut course = course(1_024.0, second);
            let mut told = 0;
            for row in 0..2_000 {
                let row = f64::from(row);
                course.push(row, of(row) * MIB, f64::NAN);
                told += u32::from(row >= 1_020.0 && course.seen().full_in.is_some());
            }
            told
        };
        assert_eq!(told(&|row| if row < 1_000.0 { 100.0 } else { 400.0 }), 0);
        // Filled and collected every 40 s.
        assert_eq!(told(&|row| 100.0 + 2.0 * (row % 40.0)), 0);
        // A nightly job's growth, a hundredth of the room a minute.
        assert_eq!(told(&|row| 100.0 + 0.15 * (row - 1_000.0).max(0.0)), 0);
    }

    #[test]
    fn without_a_limit_the_room_that_the_host_has_left_is_the_limit() {
        let mut course = MemoryCourse::new(None, Duration::from_secs(1)).unwrap();
        let host = course.host.unwrap();
        course.push(1.0, 0.3 * host, 0.9);
        let share = course.seen().share.unwrap();
        assert!((share - 0.75).abs() < 1e-9, "{share}");
        course.push(2.0, f64::NAN, 0.9);
        assert_eq!(
            course.seen().share,
            Some(share),
            "what cannot be read is left out"
        );
        course.restarted();
        assert_eq!(course.seen(), MemorySeen::default());
    }
}
