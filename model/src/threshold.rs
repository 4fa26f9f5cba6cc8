//! From scores to alarms: a level found without labels, hysteresis, and a slow correction while nothing is wrong.

use std::time::Duration;

use crate::normalise::{narrow, quantile};
use crate::score::unit_or_one;

const DAY_SECONDS: f64 = 86_400.0;
const HOUR_SECONDS: f64 = 3_600.0;
/// Hours of history that hourly maxima need to say more than single scores.
const HOURS_MIN: usize = 48;
/// Alarms counted by hourly maxima per alarm that is asked for: picked on recorded data.
const HOURLY_FACTOR: f64 = 1.5;
/// Rows more than an hour apart raise at most so large a share of alarms, however many are asked for: one a day of daily rows would be all.
const SLOW_ALPHA_MAX: f64 = 0.1;
/// Share of the history taken as its tail where the wanted quantile lies beyond the history.
const TAIL_SHARE: f64 = 0.1;
/// Step of the online rule.
const STEP_RATE: f64 = 0.1;
/// The level stays within these multiples of where it started.
const LEVEL_SHARE_MIN: f64 = 0.5;
const LEVEL_SHARE_MAX: f64 = 8.0;
/// An alarm begins when this many of the last [`RAISE_WINDOW`] scores reach the level …
const RAISE_COUNT: u32 = 2;
pub(crate) const RAISE_WINDOW: u32 = 3;
/// … and ends after this many scores in a row below [`CLEAR_SHARE`] of it.
const CLEAR_ROWS: u32 = 10;
const CLEAR_SHARE: f64 = 0.8;

/// An alarm that has lasted so long may be a new normal: a person decides.
const NEW_NORMAL_AFTER: Duration = Duration::from_hours(24);

/// What a score means for the alarm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// No alarm.
    Normal,
    /// An alarm begins with this row.
    Raised,
    /// The alarm goes on.
    Ongoing,
    /// The alarm ends with this row.
    Cleared,
}

impl Verdict {
    /// Whether the row belongs to an alarm.
    pub fn alarmed(self) -> bool {
        matches!(self, Self::Raised | Self::Ongoing)
    }
}

/// The alarm level and how it moves. It stays on the host: no `Serialize`.
///
/// *Start*, from the scores of the history alone: with 48 hours of rows or more, the `1 − α` quantile of the hourly
/// maxima (of the rows, where they are more than an hour apart), `α = 1.5 · budget / 24`; with fewer, the `1 − budget · step / day` quantile of the scores, and where that
/// lies beyond the history, an exponential tail fitted to the largest tenth (peaks over threshold with shape 0).
///
/// *Online*: every quiet row lowers it by `e^(−ηα/rows per hour)`, every ended alarm raises it by `e^(η(1 − α))`,
/// η = 0.1: in the long run one alarm for every `1/α` hours. It does not move during an alarm, so a long fault
/// teaches it nothing, and it stays within half and eight times its start. How far it has come goes on after a new fit
/// ([`AlarmState::succeed`]).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Threshold {
    /// Present level.
    pub(crate) level: f64,
    /// Level at the start.
    pub(crate) start: f64,
    /// Factor of a quiet row, a little below 1.
    pub(crate) decay: f64,
    /// Factor of an ended alarm, above 1.
    pub(crate) growth: f64,
}

impl Threshold {
    /// Finds the level for about `per_day` false alarms a day from the `scores` of a history of rows `step` apart
    /// (the order of time; NaN, where there was no score, is left out). Without scores, and for scores of 0 as those of a constant history, the level is 1, about the
    /// top per cent of the history.
    pub fn calibrate(scores: &[f64], step: Duration, per_day: f64) -> Self {
        let step = step.as_secs_f64().max(1e-3);
        // A number that is none must not become the level: the quietest that can be asked for takes its place.
        let per_day = if per_day.is_nan() { 0.0 } else { per_day };
        // Rows more than an hour apart are an "hour" each.
        let hours = (step / HOUR_SECONDS).max(1.0);
        let most = if hours > 1.0 { SLOW_ALPHA_MAX } else { 0.5 };
        let alpha = (HOURLY_FACTOR * per_day * hours / 24.0).clamp(1e-6, most);
        let rows_per_hour = (HOUR_SECONDS / step).max(1.0);
        let scores: Vec<f64> = scores.iter().copied().filter(|score| !score.is_nan()).collect();
        let start = unit_or_one(start_level(&scores, step, per_day, alpha, rows_per_hour));
        Self {
            level: start,
            start,
            decay: (-STEP_RATE * alpha / rows_per_hour).exp(),
            growth: (STEP_RATE * (1.0 - alpha)).exp(),
        }
    }

    /// The present level: a score at or above it speaks for an alarm.
    pub fn level(&self) -> f32 {
        narrow(self.level)
    }

    fn quiet_row(&mut self) {
        self.level = (self.level * self.decay).max(self.start * LEVEL_SHARE_MIN);
    }

    fn alarm_ended(&mut self) {
        self.level = (self.level * self.growth).min(self.start * LEVEL_SHARE_MAX);
    }
}

/// Hysteresis over a [`Threshold`]: raise at 2 of 3 rows, clear after 10 rows below 0.8 of the level. So one cause is one
/// alarm, not one for every row.
///
/// The level is frozen while an alarm lasts. A step change that stays is therefore an alarm that stays: after 24 hours
/// [`new_normal`](Self::new_normal) asks whether it is the new normal. Nothing here decides that: the caller may, by
/// [`accept`](Self::accept) and a fit on the rows since. The edge asks a person, and decides by itself only for what its policy calls harmless
/// (`theriac-edge`, `watch`).
#[derive(Debug, Clone)]
pub struct AlarmState {
    threshold: Threshold,
    active: bool,
    /// The newest score's bit is the lowest: whether it reached the level.
    reached: u32,
    below: u32,
    /// Rows since the alarm began, those without a score too.
    rows: u64,
    /// Rows in 24 hours; `None` where the time between rows was not told.
    rows_frozen_max: Option<u64>,
}

impl AlarmState {
    /// Without alarm. It never asks about a new normal: see [`with_step`](Self::with_step).
    pub fn new(threshold: Threshold) -> Self {
        Self {
            threshold,
            active: false,
            reached: 0,
            below: 0,
            rows: 0,
            rows_frozen_max: None,
        }
    }

    /// Goes on where `former` was: the level stands as far from this one's start as it stood from the former's. What was learnt about how often
    /// alarms come would else be lost at every fit, as the rule moves by less than a per cent an hour.
    #[must_use]
    pub fn succeed(mut self, former: &Self) -> Self {
        let moved = (former.threshold.level / former.threshold.start).clamp(LEVEL_SHARE_MIN, LEVEL_SHARE_MAX);
        self.threshold.level = self.threshold.start * moved;
        self
    }

    /// The same for rows `step` apart, so that it knows how long an alarm lasts.
    #[must_use]
    pub fn with_step(self, step: Duration) -> Self {
        let rows = NEW_NORMAL_AFTER.as_millis() / step.as_millis().max(1);
        Self {
            rows_frozen_max: Some(u64::try_from(rows).unwrap_or(u64::MAX).max(1)),
            ..self
        }
    }

    /// Takes the next score. NaN (warming up) changes nothing.
    pub fn push(&mut self, score: f32) -> Verdict {
        self.rows = if self.active {
            self.rows.saturating_add(1)
        } else {
            0
        };
        if score.is_nan() {
            return if self.active {
                Verdict::Ongoing
            } else {
                Verdict::Normal
            };
        }
        let score = f64::from(score);
        let reached = score >= self.threshold.level;
        if self.active {
            self.below = if score < CLEAR_SHARE * self.threshold.level {
                self.below + 1
            } else {
                0
            };
            if self.below < CLEAR_ROWS {
                return Verdict::Ongoing;
            }
            (self.active, self.reached) = (false, 0);
            self.threshold.alarm_ended();
            return Verdict::Cleared;
        }
        self.reached = (self.reached << 1 | u32::from(reached)) & ((1 << RAISE_WINDOW) - 1);
        if self.reached.count_ones() >= RAISE_COUNT {
            (self.active, self.below) = (true, 0);
            return Verdict::Raised;
        }
        if !reached {
            self.threshold.quiet_row();
        }
        Verdict::Normal
    }

    /// Whether the alarm that is on has lasted for 24 hours, and a person should say whether this is the new normal.
    pub fn new_normal(&self) -> bool {
        self.active && self.rows_frozen_max.is_some_and(|max| self.rows >= max)
    }

    /// A person says that what the alarm is about is normal: the alarm ends as a false one does. Without a detector
    /// fitted on rows of the new normal it will come back.
    pub fn accept(&mut self) {
        if self.active {
            (self.active, self.reached, self.below) = (false, 0, 0);
            self.threshold.alarm_ended();
        }
    }

    /// Whether an alarm is on.
    pub fn active(&self) -> bool {
        self.active
    }

    /// The present level.
    pub fn level(&self) -> f32 {
        self.threshold.level()
    }

    /// The threshold as it stands.
    pub fn threshold(&self) -> Threshold {
        self.threshold
    }
}

fn start_level(scores: &[f64], step: f64, per_day: f64, alpha: f64, rows_per_hour: f64) -> f64 {
    if scores.is_empty() {
        return 1.0;
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "1 ≤ rows per hour ≤ 3.6e6"
    )]
    let hour = rows_per_hour.round() as usize;
    let hours: Vec<f32> = scores
        .chunks_exact(hour)
        .map(|hour| narrow(hour.iter().copied().fold(f64::MIN, f64::max)))
        .collect();
    if hours.len() >= HOURS_MIN {
        return quantile(&mut hours.clone(), 1.0 - alpha);
    }
    let rate = (per_day * step / DAY_SECONDS).clamp(1e-9, 1.0);
    let mut scores: Vec<f32> = scores.iter().map(|s| narrow(*s)).collect();
    if rate * scores.len() as f64 >= 1.0 {
        return quantile(&mut scores, 1.0 - rate);
    }
    let tail_start = quantile(&mut scores, 1.0 - TAIL_SHARE);
    let excesses = scores
        .iter()
        .map(|s| f64::from(*s) - tail_start)
        .filter(|excess| *excess > 0.0);
    let (count, sum) = excesses.fold((0.0, 0.0), |(count, sum), excess| (count + 1.0, sum + excess));
    let largest = scores.iter().copied().fold(f32::MIN, f32::max);
    let mean_excess = if count > 0.0 { sum / count } else { 0.0 };
    (tail_start + mean_excess * (TAIL_SHARE / rate).ln()).max(f64::from(largest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(level: f64) -> Threshold {
        Threshold {
            level,
            start: level,
            decay: 0.999,
            growth: 1.1,
        }
    }

    /// A score from a fixed sequence, exponentially distributed.
    fn scores(count: usize) -> Vec<f64> {
        let mut state = 9_u32;
        let mut next = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            -((f64::from(state >> 8) + 0.5) / 16_777_216.0).ln()
        };
        (0..count).map(|_| next()).collect()
    }

    #[test]
    fn one_high_row_is_no_alarm_and_two_of_three_are() {
        let mut alarm = AlarmState::new(at(1.0));
        let verdicts: Vec<_> = [2.0, 0.0, 0.0, 2.0, 0.0, 2.0].map(|s| alarm.push(s)).to_vec();
        assert_eq!(verdicts[..5], [Verdict::Normal; 5]);
        assert_eq!(verdicts[5], Verdict::Raised);
    }

    #[test]
    fn alarm_clears_after_ten_low_rows_in_a_row() {
        let mut alarm = AlarmState::new(at(1.0));
        alarm.push(2.0);
        assert_eq!(alarm.push(2.0), Verdict::Raised);
        for _ in 0..9 {
            assert_eq!(alarm.push(0.1), Verdict::Ongoing);
        }
        assert_eq!(
            alarm.push(0.85),
            Verdict::Ongoing,
            "above 0.8 of the level: the count begins anew"
        );
        for _ in 0..9 {
            assert_eq!(alarm.push(0.1), Verdict::Ongoing);
        }
        assert_eq!(alarm.push(f32::NAN), Verdict::Ongoing);
        assert_eq!(alarm.push(0.1), Verdict::Cleared);
        assert_eq!(alarm.push(0.1), Verdict::Normal);
    }

    #[test]
    fn level_is_frozen_during_an_alarm_and_rises_at_its_end() {
        let mut alarm = AlarmState::new(at(1.0));
        alarm.push(0.0);
        let quiet = alarm.threshold().level;
        assert!(quiet < 1.0);
        alarm.push(2.0);
        alarm.push(2.0);
        for _ in 0..1000 {
            alarm.push(5.0);
        }
        assert!((alarm.threshold().level - quiet).abs() < 1e-12);
        for _ in 0..10 {
            alarm.push(0.0);
        }
        assert!(!alarm.active() && alarm.threshold().level > quiet);
    }

    #[test]
    fn change_that_stays_is_one_alarm_and_a_question_after_a_day() {
        let mut alarm = AlarmState::new(at(1.0)).with_step(Duration::from_mins(5));
        let level = |alarm: &AlarmState| alarm.threshold().level;
        let before = level(&alarm);
        let mut raised = 0;
        for row in 0..3 * 288 {
            raised += u32::from(alarm.push(5.0) == Verdict::Raised);
            assert_eq!(alarm.new_normal(), row > 288, "row {row}: 288 rows are a day");
        }
        assert_eq!(raised, 1);
        assert!(level(&alarm) <= before, "a long fault teaches nothing");
        alarm.accept();
        assert!(!alarm.active() && !alarm.new_normal() && level(&alarm) > before);
        assert_eq!(alarm.push(0.0), Verdict::Normal);
    }

    #[test]
    fn without_a_step_nothing_is_asked_and_missing_rows_count_as_time() {
        let mut alarm = AlarmState::new(at(1.0));
        (0..100_000).for_each(|_| _ = alarm.push(5.0));
        assert!(alarm.active() && !alarm.new_normal());
        let mut alarm = AlarmState::new(at(1.0)).with_step(Duration::from_hours(1));
        (0..2).for_each(|_| _ = alarm.push(5.0));
        (0..24).for_each(|_| _ = alarm.push(f32::NAN));
        assert!(alarm.new_normal());
        alarm.accept();
        alarm.accept();
        assert!(!alarm.active());
    }

    #[test]
    fn what_the_level_learnt_outlives_a_fit() {
        let mut alarm = AlarmState::new(at(1.0));
        (0..2).for_each(|_| _ = alarm.push(5.0));
        (0..10).for_each(|_| _ = alarm.push(0.0));
        let moved = alarm.threshold().level;
        assert!(moved > 1.05);
        let next = AlarmState::new(at(3.0)).succeed(&alarm);
        assert!((next.threshold().level - 3.0 * moved).abs() < 1e-12);
        assert!(!next.active() && (next.threshold().start - 3.0).abs() < 1e-12);
    }

    #[test]
    fn rows_of_a_day_are_counted_as_days_and_no_number_is_no_budget() {
        let history = scores(2_000);
        let day = Duration::from_hours(24);
        let level = |per_day| Threshold::calibrate(&history, day, per_day).level();
        let above = |level: f32| history.iter().filter(|s| **s >= f64::from(level)).count();
        // Asked for one alarm in thirty days of daily rows: 1.5 times that by the rule for hourly maxima. One a day would be every row.
        for (per_day, expected) in [(1.0 / 30.0, 0.05), (1.0, 0.1), (100.0, 0.1)] {
            let share = above(level(per_day)) as f64 / 2_000.0;
            assert!((share - expected).abs() < 0.01, "{per_day} a day: {share}");
        }
        assert!(level(f64::NAN).is_finite() && level(f64::NAN) >= level(0.1));
        assert!(level(f64::INFINITY).is_finite());
    }

    #[test]
    fn level_stays_within_its_bounds() {
        let mut alarm = AlarmState::new(at(1.0));
        (0..100_000).for_each(|_| _ = alarm.push(0.0));
        assert!((alarm.threshold().level - LEVEL_SHARE_MIN).abs() < 1e-9);
        for _ in 0..100 {
            (0..3).for_each(|_| _ = alarm.push(100.0));
            (0..10).for_each(|_| _ = alarm.push(0.0));
        }
        assert!(alarm.threshold().level <= LEVEL_SHARE_MAX);
    }

    #[test]
    fn short_history_reaches_beyond_its_largest_score() {
        let history = scores(120);
        let largest = history.iter().copied().fold(0.0, f64::max);
        let level = Threshold::calibrate(&history, Duration::from_secs(1), 1.0).start;
        // The true quantile of the unit exponential at 1 in 86 400 is ln 86 400 = 11.4.
        assert!(level > largest && (level - 11.4).abs() < 4.0, "level {level}");
    }

    #[test]
    fn longer_history_takes_the_quantile_it_can_see() {
        let history = scores(20_000);
        let minutes = Threshold::calibrate(&history[..2000], Duration::from_mins(1), 10.0).start;
        assert!(
            (minutes - (1440.0_f64 / 10.0).ln()).abs() < 0.8,
            "level {minutes}"
        );
        let hourly = Threshold::calibrate(&history, Duration::from_mins(1), 1.0).start;
        // Of 60 unit exponentials the largest stays below x with probability (1 − e^−x)^60 = 1 − 1.5/24.
        assert!((hourly - 6.83).abs() < 1.0, "level {hourly}");
    }

    #[test]
    fn no_history_and_constant_history_are_defined() {
        for history in [&[][..], &[0.0; 50], &[3.0]] {
            let level = Threshold::calibrate(history, Duration::from_secs(1), 1.0).level();
            assert!(level.is_finite() && level > 0.0);
        }
    }

    proptest! {
        #[test]
        fn alarms_begin_and_end_in_turn(scores in prop::collection::vec(0.0_f32..3.0, 0..500)) {
            let mut alarm = AlarmState::new(at(1.5));
            let mut open = false;
            for score in scores {
                match alarm.push(score) {
                    Verdict::Raised => { prop_assert!(!open); open = true; }
                    Verdict::Cleared => { prop_assert!(open); open = false; }
                    Verdict::Ongoing => prop_assert!(open),
                    Verdict::Normal => prop_assert!(!open),
                }
                prop_assert_eq!(alarm.active(), open);
            }
        }
    }
}
