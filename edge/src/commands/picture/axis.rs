//! Axes whose ticks stand at round values: times of day, powers of ten, 1-2-5 steps.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use time::OffsetDateTime;

const DAY: i64 = 86_400;
/// Steps between time ticks, in seconds.
const TIME_STEPS: [i64; 17] = [
    1,
    5,
    15,
    30,
    60,
    300,
    900,
    1_800,
    3_600,
    3 * 3_600,
    6 * 3_600,
    12 * 3_600,
    DAY,
    2 * DAY,
    7 * DAY,
    14 * DAY,
    30 * DAY,
];

const MONTHS: [&str; 12] = [
    "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
];

/// What an axis' numbers mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meaning {
    /// Unix seconds, shown in UTC.
    Utc { step: i64 },
    /// Seconds since the first row.
    Elapsed { step: i64 },
    /// Powers of ten.
    Decades,
    /// Plain values.
    Plain,
}

/// One axis: its range, where its ticks stand, and how they are written.
#[derive(Debug, Clone)]
pub(super) struct Axis {
    range: Range<f64>,
    ticks: Vec<f64>,
    meaning: Meaning,
}

impl Axis {
    /// Times in seconds, at most `ticks_max` ticks; `utc` says whether they are Unix time or since the first row.
    pub(super) fn time(range: Range<f64>, ticks_max: usize, utc: bool) -> Self {
        let range = wide(range);
        let fits = |step: &&i64| (range.end - range.start) / **step as f64 <= ticks_max as f64;
        let step = TIME_STEPS.iter().find(fits).copied();
        // Beyond years: as many times thirty days as needed.
        let step = step.unwrap_or_else(|| {
            let most = TIME_STEPS[TIME_STEPS.len() - 1];
            most * whole((range.end - range.start) / (most as f64 * ticks_max as f64)).max(1)
        });
        let meaning = if utc {
            Meaning::Utc { step }
        } else {
            Meaning::Elapsed { step }
        };
        Self {
            ticks: multiples(&range, step as f64),
            range,
            meaning,
        }
    }

    /// Values, at most `ticks_max` ticks, with a little room at both ends.
    pub(super) fn plain(range: Range<f64>, ticks_max: usize) -> Self {
        let range = wide(range);
        let room = 0.06 * (range.end - range.start);
        let range = range.start - room..range.end + room;
        Self {
            ticks: multiples(&range, round_step((range.end - range.start) / ticks_max as f64)),
            range,
            meaning: Meaning::Plain,
        }
    }

    /// Logarithms of values, ticks at powers of ten, over less than two of them also at 2 and 5. `range` is in decimal logarithms.
    pub(super) fn decades(range: Range<f64>) -> Self {
        let range = wide(range);
        let decades = range.end - range.start;
        let ticks = if decades < 2.0 {
            let whole = range.start.floor()..range.end.ceil();
            let powers = multiples(&whole, 1.0).into_iter();
            let ticks = powers.flat_map(|power| [1.0_f64, 2.0, 5.0].map(|factor| power + factor.log10()));
            ticks.filter(|tick| range.contains(tick)).collect()
        } else {
            multiples(&range, round_step(decades / 6.0).ceil().max(1.0))
        };
        Self {
            ticks,
            range,
            meaning: Meaning::Decades,
        }
    }

    /// The range that is shown.
    #[cfg(test)]
    fn shown(&self) -> Range<f64> {
        self.range.clone()
    }

    /// What stands at a tick.
    fn label(&self, value: f64) -> String {
        match self.meaning {
            Meaning::Utc { step } => utc_label(value, step),
            Meaning::Elapsed { step } => elapsed_label(value, step),
            Meaning::Decades => number(10_f64.powf(value)),
            Meaning::Plain => number(value),
        }
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let share = (value - self.range.start) / (self.range.end - self.range.start);
        #[expect(clippy::cast_possible_truncation, reason = "a pixel")]
        let pixels = (share.clamp(0.0, 1.0) * f64::from(limit.1 - limit.0)).round() as i32;
        limit.0 + pixels
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        // No lines between the ticks.
        if hint.weight().allow_light_points() {
            return Vec::new();
        }
        self.ticks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        self.label(*value)
    }
}

/// A range with a length above 0.
fn wide(range: Range<f64>) -> Range<f64> {
    if range.end > range.start {
        return range;
    }
    let room = (0.1 * range.start.abs()).max(0.5);
    range.start - room..range.start + room
}

fn multiples(range: &Range<f64>, step: f64) -> Vec<f64> {
    let first = (range.start / step).ceil();
    let last = (range.end / step + 1e-9).floor();
    (0..=whole(last - first).clamp(-1, 100))
        .map(|index| (first + index as f64) * step)
        .collect()
}

/// The smallest of 1, 2, 5 times a power of ten that is not below `least`.
fn round_step(least: f64) -> f64 {
    let power = 10_f64.powf(least.max(1e-12).log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|factor| factor * power)
        .find(|step| *step >= least * (1.0 - 1e-9))
        .unwrap_or(10.0 * power)
}

fn utc_label(seconds: f64, step: i64) -> String {
    let Ok(at) = OffsetDateTime::from_unix_timestamp(whole(seconds)) else {
        return String::new();
    };
    let midnight = whole(seconds).rem_euclid(DAY) == 0;
    if step >= DAY || midnight {
        let month = MONTHS[usize::from(u8::from(at.month())) - 1];
        format!("{} {month}", at.day())
    } else if step >= 60 {
        format!("{:02}:{:02}", at.hour(), at.minute())
    } else {
        format!("{:02}:{:02}:{:02}", at.hour(), at.minute(), at.second())
    }
}

fn elapsed_label(seconds: f64, step: i64) -> String {
    let (unit, name) = match step {
        DAY.. => (DAY, "d"),
        3_600.. => (3_600, "h"),
        60.. => (60, "min"),
        _ => (1, "s"),
    };
    format!("{} {name}", whole(seconds) / unit)
}

/// Three significant digits with a unit prefix: `0.25`, `1.5 k`, `32 M`.
pub(super) fn number(value: f64) -> String {
    let (scaled, prefix) = match value.abs() {
        size if size >= 1e12 => (value / 1e12, " T"),
        size if size >= 1e9 => (value / 1e9, " G"),
        size if size >= 1e6 => (value / 1e6, " M"),
        size if size >= 1e4 => (value / 1e3, " k"),
        _ => (value, ""),
    };
    let digits = match scaled.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if (1e-9..0.1).contains(&size) => 4,
        _ => 2,
    };
    let text = format!("{scaled:.digits$}");
    let text = if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.')
    } else {
        &text
    };
    let text = if text == "-0" { "0" } else { text };
    format!("{text}{prefix}")
}

fn whole(value: f64) -> i64 {
    #[expect(clippy::cast_possible_truncation, reason = "times and counts; saturates")]
    let whole = value.round() as i64;
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis) -> Vec<String> {
        axis.ticks.iter().map(|tick| axis.label(*tick)).collect()
    }

    #[test]
    fn time_ticks_stand_at_round_times_and_name_the_day_at_midnight() {
        // 2024-01-31 20:10 to 2024-02-01 05:00.
        let axis = Axis::time(1_706_731_800.0..1_706_763_600.0, 5, true);
        assert_eq!(labels(&axis), ["21:00", "1 Feb", "03:00"]);
        let month = Axis::time(1_704_067_200.0..1_706_659_200.0, 6, true);
        assert_eq!(labels(&month), ["4 Jan", "11 Jan", "18 Jan", "25 Jan"]);
        let since = Axis::time(0.0..100_000.0, 6, false);
        assert_eq!(labels(&since), ["0 h", "6 h", "12 h", "18 h", "24 h"]);
    }

    #[test]
    fn value_ticks_are_few_and_short() {
        let axis = Axis::plain(0.0..1.0, 3);
        assert_eq!(labels(&axis), ["0", "0.5", "1"]);
        let bytes = Axis::plain(0.0..9e9, 3);
        assert_eq!(labels(&bytes), ["0", "5 G"]);
        let decades = Axis::decades(-0.5..2.2);
        assert_eq!(labels(&decades), ["1", "10", "100"]);
        assert_eq!(labels(&Axis::decades(-0.4..0.8)), ["0.5", "1", "2", "5"]);
    }

    #[test]
    fn an_axis_of_one_value_has_a_length() {
        for axis in [
            Axis::plain(3.0..3.0, 3),
            Axis::time(5.0..5.0, 5, true),
            Axis::decades(0.0..0.0),
        ] {
            let shown = axis.shown();
            assert!(shown.end > shown.start);
            assert!(axis.ticks.len() <= 6, "{:?}", axis.ticks);
        }
        // A span beyond all steps still ends.
        assert!(Axis::time(0.0..1e12, 5, true).ticks.len() <= 7);
    }

    #[test]
    fn numbers_are_written_short() {
        for (value, text) in [
            (0.0, "0"),
            (-0.0, "0"),
            (0.25, "0.25"),
            (1234.0, "1234"),
            (15_300.0, "15.3 k"),
            (-2e9, "-2 G"),
            (0.001, "0.001"),
        ] {
            assert_eq!(number(value), text);
        }
    }
}
