//! Comma-separated tables: a header, time in the first column.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::Path;

use csv::StringRecord;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{ReadError, Recording};
use crate::series::Series;

/// 100 000 000 000 seconds, the year 5138: more is a time in milliseconds, which would make a minute a day.
const TIME_MAX_MS: u64 = 100_000_000_000_000;

/// Reads a table. Rows must be in the order of time; equal times are taken.
pub(super) fn read_csv(path: &Path, file: impl Read) -> Result<Recording, ReadError> {
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(file);
    let header = reader.headers().map_err(|e| wrong(path, &e))?.clone();
    let names = names(path, &header)?;
    let (mut values, mut times) = (Vec::new(), Vec::new());
    let mut record = StringRecord::new();
    while reader.read_record(&mut record).map_err(|e| wrong(path, &e))? {
        let line = record.position().map_or(0, csv::Position::line);
        let refuse = |reason: String| ReadError::Line {
            path: path.to_owned(),
            line,
            reason,
        };
        let mut cells = record.iter();
        let time = cells.next().and_then(time_ms).ok_or_else(|| {
            refuse("the time is neither RFC 3339 (2024-01-31T12:00:00Z) nor Unix seconds".to_owned())
        })?;
        if time > TIME_MAX_MS {
            return Err(refuse(
                "the time lies beyond the year 5000: Unix seconds are expected, not milliseconds".to_owned(),
            ));
        }
        if times.last().is_some_and(|last| *last > time) {
            return Err(refuse("the time goes back: sort the rows by time".to_owned()));
        }
        times.push(time);
        for (cell, name) in cells.zip(&names) {
            let value = value(cell).ok_or_else(|| {
                refuse(format!(
                    "column `{name}` is no number: leave a missing value empty"
                ))
            })?;
            values.push(value);
        }
    }
    let series = Series::new(names.len(), values)?.with_times(times)?;
    Ok(Recording::new(series, Some(names)))
}

fn names(path: &Path, header: &StringRecord) -> Result<Vec<String>, ReadError> {
    let refuse = |reason: String| ReadError::Header {
        path: path.to_owned(),
        reason,
    };
    if header.is_empty() {
        return Err(refuse(
            "the header line is missing: time, then one name per metric".to_owned(),
        ));
    }
    let names: Vec<String> = header.iter().skip(1).map(str::to_owned).collect();
    if names.is_empty() {
        return Err(refuse("the header names no column besides the time".to_owned()));
    }
    if header.iter().skip(1).all(|cell| cell.parse::<f64>().is_ok()) {
        return Err(refuse(
            "the first line names its columns by numbers alone, so the header is missing: time, then one name per metric"
                .to_owned(),
        ));
    }
    let mut seen = BTreeSet::new();
    match names.iter().find(|name| !seen.insert(name.as_str())) {
        Some(name) => Err(refuse(format!("the header names `{name}` twice"))),
        None => Ok(names),
    }
}

/// Milliseconds since the Unix epoch.
fn time_ms(cell: &str) -> Option<u64> {
    if let Ok(seconds) = cell.parse::<f64>() {
        let ms = (seconds * 1000.0).round();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "the range was checked"
        )]
        return (0.0..=9e15).contains(&ms).then_some(ms as u64);
    }
    let at = OffsetDateTime::parse(cell, &Rfc3339).ok()?;
    u64::try_from(at.unix_timestamp_nanos() / 1_000_000).ok()
}

/// A number; NaN for a missing value; `None` for anything else.
fn value(cell: &str) -> Option<f32> {
    if cell.is_empty() {
        return Some(f32::NAN);
    }
    let value: f32 = cell.parse().ok()?;
    Some(if value.is_finite() { value } else { f32::NAN })
}

/// The csv crate's own error names line and lengths but also quotes no cell.
fn wrong(path: &Path, error: &csv::Error) -> ReadError {
    let line = error.position().map_or(0, csv::Position::line);
    let reason = match error.kind() {
        csv::ErrorKind::UnequalLengths {
            expected_len, len, ..
        } => {
            format!("{len} cells, the header has {expected_len}")
        }
        csv::ErrorKind::Utf8 { .. } => "not UTF-8 text".to_owned(),
        csv::ErrorKind::Io(source) => format!("cannot be read: {source}"),
        _ => "cannot be read as a table".to_owned(),
    };
    ReadError::Line {
        path: path.to_owned(),
        line,
        reason,
    }
}
