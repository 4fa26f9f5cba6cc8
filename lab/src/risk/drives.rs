//! Backblaze: 972 disk drives over forty days; a row is a drive's day with its raw SMART values.

use std::collections::BTreeMap;
use std::path::Path;

use theriac_model::risk::predictor::Settings;
use theriac_model::risk::{Outcome, TrainingSet};

use super::dataset::{DataError, Dataset, Floor, Table, runs, whole};

/// SMART attributes in the file, by column.
const ATTRIBUTES: [u16; 22] = [
    1, 3, 4, 5, 7, 9, 10, 12, 183, 184, 187, 188, 189, 190, 191, 192, 193, 194, 196, 197, 198, 199,
];
/// An attribute that fewer of the drive-days report is left out.
const REPORTED_MIN: f64 = 0.9;
/// Counters of bad sectors, which the floor sums: reallocated, pending.
const BAD_SECTORS: [u16; 2] = [5, 197];
/// Rows (days) that changes are told over.
const CHANGE: usize = 7;
/// "Within h days, the day of the failure included" is "before h + 1".
const HORIZONS: [f64; 3] = [2.0, 8.0, 15.0];
const EDGES: [f64; 6] = [0.0, 2.0, 4.0, 8.0, 11.0, 15.0];

/// Reads `backblaze/drive_day_fail.npy.gz` and `backblaze/smart_raw.npy.gz` under `data`.
pub(super) fn load(data: &Path) -> Result<Dataset, DataError> {
    let path = data.join("backblaze/drive_day_fail.npy.gz");
    let days = Table::read(&path, 3, "[row, 3]: drive, day, failed")?;
    let smart_path = data.join("backblaze/smart_raw.npy.gz");
    let smart = Table::read(&smart_path, ATTRIBUTES.len(), "[row, 22]")?;
    let days: Vec<&[f32]> = days.rows().collect();
    let values: Vec<&[f32]> = smart.rows().collect();
    if days.len() != values.len() {
        return Err(DataError::Shape {
            path: smart_path,
            found: vec![values.len(), ATTRIBUTES.len()],
            expected: "one row for each row of drive_day_fail",
        });
    }
    let order = in_order(&days);
    let units: Vec<u32> = order.iter().map(|row| whole(days[*row][0])).collect();
    let reported: Vec<usize> = (0..ATTRIBUTES.len())
        .filter(|column| share_reported(&values, *column) >= REPORTED_MIN)
        .collect();
    let settings = Settings::new(names(&reported), EDGES.to_vec(), HORIZONS.to_vec());
    let mut set = TrainingSet::new(settings.features.len())?;
    let mut floor = Vec::new();
    for (unit, first, end) in runs(&units) {
        let rows = &order[first..end];
        let last = days[rows[rows.len() - 1]];
        let levels: Vec<Vec<f64>> = rows.iter().map(|row| levels(values[*row], &reported)).collect();
        for (at, row) in rows.iter().enumerate() {
            let left = f64::from(last[1] - days[*row][1]);
            let outcome = if last[2] > 0.5 {
                Outcome::failed(left)
            } else {
                Outcome::censored(left)
            };
            let before = at.saturating_sub(CHANGE);
            set.push(unit, &features(&levels[at], &levels[before], &reported), outcome?)?;
            floor.push(bad_sectors(&levels[at], &reported));
        }
    }
    Ok(Dataset {
        name: "backblaze",
        time_unit: "days",
        unit_word: "drives",
        settings,
        set,
        floor: Floor::Scores(vec![floor; HORIZONS.len()]),
        fallback: None,
    })
}

/// Rows by drive and day.
fn in_order(days: &[&[f32]]) -> Vec<usize> {
    let keyed: BTreeMap<(u32, u32), usize> = days
        .iter()
        .enumerate()
        .map(|(row, values)| ((whole(values[0]), whole(values[1])), row))
        .collect();
    keyed.into_values().collect()
}

fn share_reported(values: &[&[f32]], column: usize) -> f64 {
    let reported = values.iter().filter(|row| row[column].is_finite()).count();
    reported as f64 / values.len() as f64
}

fn names(reported: &[usize]) -> Vec<String> {
    let name = |what: &str, column: &usize| format!("smart_{}_{what}", ATTRIBUTES[*column]);
    let levels = reported.iter().map(|column| name("level", column));
    let changes = reported.iter().map(|column| name("change", column));
    let some = reported.iter().filter(|column| is_bad_sectors(**column));
    let some = some.map(|column| name("above_zero", column));
    let sum = std::iter::once("bad_sectors".to_owned());
    levels.chain(changes).chain(some).chain(sum).collect()
}

/// `ln(1 + raw)` of the reported attributes; not reported counts as 0.
fn levels(raw: &[f32], reported: &[usize]) -> Vec<f64> {
    let level = |column: &usize| {
        let value = f64::from(raw[*column]);
        if value.is_finite() {
            value.max(0.0).ln_1p()
        } else {
            0.0
        }
    };
    reported.iter().map(level).collect()
}

/// Level, change in the last week, whether there is a bad sector at all, and the floor's score.
fn features(now: &[f64], before: &[f64], reported: &[usize]) -> Vec<f64> {
    let changes = now.iter().zip(before).map(|(now, before)| now - before);
    let some = now
        .iter()
        .zip(reported)
        .filter(|(_, column)| is_bad_sectors(**column))
        .map(|(level, _)| f64::from(u8::from(*level > 0.0)));
    now.iter()
        .copied()
        .chain(changes)
        .chain(some)
        .chain(std::iter::once(bad_sectors(now, reported)))
        .collect()
}

fn bad_sectors(levels: &[f64], reported: &[usize]) -> f64 {
    levels
        .iter()
        .zip(reported)
        .filter(|(_, column)| is_bad_sectors(**column))
        .map(|(level, _)| level)
        .sum()
}

fn is_bad_sectors(column: usize) -> bool {
    BAD_SECTORS.contains(&ATTRIBUTES[column])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_have_their_names_and_missing_values_are_zero() {
        let mut raw = [f32::NAN; 22];
        raw[3] = 7.0;
        let reported = [0, 3, 19];
        let levels = levels(&raw, &reported);
        assert!(levels[0].abs() < 1e-12 && (levels[1] - 8.0_f64.ln()).abs() < 1e-6);
        let row = features(&levels, &[0.0, 0.0, 0.0], &reported);
        assert_eq!(row.len(), names(&reported).len());
        assert!((row[row.len() - 1] - 8.0_f64.ln()).abs() < 1e-6);
    }

    #[test]
    fn rows_are_ordered_by_drive_and_day() {
        let rows: [[f32; 3]; 3] = [[1.0, 5.0, 0.0], [0.0, 9.0, 0.0], [1.0, 4.0, 0.0]];
        let rows: Vec<&[f32]> = rows.iter().map(<[f32; 3]>::as_slice).collect();
        assert_eq!(in_order(&rows), [1, 2, 0]);
    }
}
