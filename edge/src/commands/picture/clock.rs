//! When the rows of a recording were measured, as far as it says.

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Time of each row.
#[derive(Debug, Clone)]
pub(crate) struct Clock {
    times_ms: Option<Vec<u64>>,
    step_s: f64,
}

impl Clock {
    /// The recording's own times, else rows `step_s` seconds apart.
    pub(crate) fn new(times_ms: Option<&[u64]>, step_s: f64) -> Self {
        Self {
            times_ms: times_ms.map(<[u64]>::to_vec),
            step_s,
        }
    }

    /// Whether [`seconds`](Self::seconds) are Unix time.
    pub(crate) fn is_utc(&self) -> bool {
        self.times_ms.is_some()
    }

    /// Unix seconds of a row, or seconds since the first one. The row behind the last is one step later.
    pub(crate) fn seconds(&self, row: usize) -> f64 {
        match &self.times_ms {
            Some(times) => times.get(row).or(times.last()).map_or(0.0, |ms| *ms as f64 / 1e3),
            None => row as f64 * self.step_s,
        }
    }

    /// Time of a row for programs: RFC 3339, where the recording has times.
    pub(crate) fn rfc3339(&self, row: usize) -> Option<String> {
        let ms = *self.times_ms.as_ref()?.get(row)?;
        let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000).ok()?;
        at.format(&Rfc3339).ok()
    }

    /// Time of a row for people: `2024-01-31 14:05`, else the number of the row.
    pub(crate) fn words(&self, row: usize) -> String {
        let seconds = self
            .times_ms
            .as_ref()
            .and_then(|times| times.get(row))
            .map(|ms| ms / 1_000);
        let at = seconds.and_then(|s| OffsetDateTime::from_unix_timestamp(i64::try_from(s).ok()?).ok());
        let Some(at) = at else {
            return format!("row {row}");
        };
        let minutes = format!("{} {:02}:{:02}", at.date(), at.hour(), at.minute());
        if self.step_s < 60.0 {
            format!("{minutes}:{:02}", at.second())
        } else {
            minutes
        }
    }

    /// Length of some rows in words: `42 min`.
    pub(crate) fn duration(&self, from: usize, to: usize) -> String {
        let seconds = (self.seconds(to) - self.seconds(from)).max(self.step_s);
        match seconds {
            s if s >= 2.0 * 86_400.0 => format!("{:.1} days", s / 86_400.0),
            s if s >= 2.0 * 3_600.0 => format!("{:.1} h", s / 3_600.0),
            s if s >= 120.0 => format!("{:.0} min", s / 60.0),
            s => format!("{s:.0} s"),
        }
    }

    /// The whole recording in words.
    pub(crate) fn span(&self, rows: usize) -> String {
        let Some(last) = rows.checked_sub(1) else {
            return "no rows".to_owned();
        };
        if self.is_utc() {
            format!("{} to {} UTC", self.words(0), self.words(last))
        } else {
            format!("{} from the first row", self.duration(0, rows))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_times_or_numbers() {
        let known = Clock::new(Some(&[1_706_710_000_000, 1_706_710_060_000]), 60.0);
        assert_eq!(known.words(1), "2024-01-31 14:07");
        assert_eq!(known.rfc3339(1).unwrap(), "2024-01-31T14:07:40Z");
        assert_eq!(known.span(2), "2024-01-31 14:06 to 2024-01-31 14:07 UTC");
        let unknown = Clock::new(None, 60.0);
        assert_eq!((unknown.words(7), unknown.rfc3339(7)), ("row 7".to_owned(), None));
        assert_eq!(unknown.span(43_200), "30.0 days from the first row");
        assert_eq!(unknown.duration(0, 42), "42 min");
        assert_eq!(Clock::new(Some(&[]), 1.0).span(0), "no rows");
    }
}
