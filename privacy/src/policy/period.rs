//! The time over which a budget holds.

use std::fmt;

use serde::{Deserialize, Serialize};
use theriac_protocol::units::Timestamp;

/// Over which time ε of a policy limits what a unit loses. A new period is a new limit, not a reset: what was lost before stays lost, and
/// every report says both figures.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Period {
    /// One period without end, for each block on its own: no block ever loses more than ε.
    #[default]
    Rolling,
    /// A calendar month of UTC.
    Month,
    /// A calendar quarter of UTC.
    Quarter,
    /// A calendar year of UTC.
    Year,
}

impl Period {
    /// Number of the period that `at` lies in; it never falls as time goes on. Always 0 for [`Period::Rolling`].
    pub fn index(self, at: Timestamp) -> u64 {
        let (year, month) = year_and_month(at.0 / MS_PER_DAY);
        match self {
            Self::Rolling => 0,
            Self::Month => year * 12 + month,
            Self::Quarter => year * 4 + month / 3,
            Self::Year => year,
        }
    }

    /// The period as people write it: `2026-11`, `2026-Q4`, `2026`, or `rolling`; before the first charge the kind alone.
    pub fn label(self, index: u64) -> String {
        if index == 0 {
            // No period has begun yet.
            return self.to_string();
        }
        match self {
            Self::Rolling => self.to_string(),
            Self::Month => format!("{}-{:02}", index / 12, index % 12 + 1),
            Self::Quarter => format!("{}-Q{}", index / 4, index % 4 + 1),
            Self::Year => index.to_string(),
        }
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rolling => "rolling",
            Self::Month => "month",
            Self::Quarter => "quarter",
            Self::Year => "year",
        })
    }
}

/// Year and month (0 to 11) of a day since 1970-01-01, in the proleptic Gregorian calendar (Hinnant, "chrono-compatible low-level date
/// algorithms", `civil_from_days`).
fn year_and_month(days: u64) -> (u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // Counted from March, so that the leap day is the last of the year.
    let from_march = (5 * day_of_year + 2) / 153;
    let month = (from_march + 2) % 12;
    let year = era * 400 + year_of_era + u64::from(month < 2);
    (year, month)
}

const MS_PER_DAY: u64 = 24 * 3_600 * 1_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_day_of_four_centuries_falls_into_its_month() {
        let leap =
            |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
        let mut day = 0;
        for year in 1970..2370 {
            for (month, mut length) in [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
                .into_iter()
                .enumerate()
            {
                length += u64::from(month == 1 && leap(year));
                for _ in 0..length {
                    assert_eq!(year_and_month(day), (year, month as u64), "day {day}");
                    day += 1;
                }
            }
        }
    }

    #[test]
    fn a_period_ends_with_its_last_millisecond() {
        // 2026-12-31T23:59:59.999Z and one millisecond later.
        let (last, first) = (Timestamp(1_798_761_599_999), Timestamp(1_798_761_600_000));
        for (period, before, after) in [
            (Period::Month, "2026-12", "2027-01"),
            (Period::Quarter, "2026-Q4", "2027-Q1"),
            (Period::Year, "2026", "2027"),
            (Period::Rolling, "rolling", "rolling"),
        ] {
            assert_eq!(period.label(period.index(last)), before);
            assert_eq!(period.label(period.index(first)), after);
        }
    }
}
