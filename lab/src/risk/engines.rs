//! C-MAPSS, set FD001: a hundred turbofans that run until they fail; a row is a cycle.

use std::path::Path;

use theriac_model::risk::predictor::Settings;
use theriac_model::risk::{Outcome, TrainingSet};

use super::dataset::{DataError, Dataset, Floor, Table, mean_of_last, runs, whole};

const COLUMNS: usize = 26;
/// The first sensor's column; before it are unit, cycle and three settings.
const FIRST_SENSOR: usize = 5;
/// Cycles left are cut off here, as the floor has it.
const CAP: f64 = 125.0;
const EDGES: [f64; 13] = [
    0.0, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 75.0, 90.0, 105.0, CAP,
];
const HORIZONS: [f64; 3] = [10.0, 30.0, 60.0];
/// Rows of the means, of the slope, and of what counts as a unit's own start.
const MEAN: usize = 10;
const SLOPE: usize = 30;
const START: usize = 20;
/// Fewest rows of a slope.
const SLOPE_MIN: usize = 5;
/// One row in three is fitted on: neighbours share most of their windows.
const STRIDE: usize = 3;

/// Reads `cmapss/train_FD001.npy.gz` under `data`.
pub(super) fn load(data: &Path) -> Result<Dataset, DataError> {
    let path = data.join("cmapss/train_FD001.npy.gz");
    let table = Table::read(&path, COLUMNS, "[row, 26]: unit, cycle, 3 settings, 21 sensors")?;
    let rows: Vec<&[f32]> = table.rows().collect();
    let units: Vec<u32> = rows.iter().map(|row| whole(row[0])).collect();
    let sensors: Vec<usize> = (FIRST_SENSOR..COLUMNS)
        .filter(|column| varies(&rows, *column))
        .collect();
    let names = ["mean", "slope", "since_start"];
    let features = sensors
        .iter()
        .flat_map(|sensor| names.map(|name| format!("sensor_{}_{name}", sensor + 1 - FIRST_SENSOR)));
    let mut settings = Settings::new(features.collect(), EDGES.to_vec(), HORIZONS.to_vec());
    settings.stride = STRIDE;
    let mut set = TrainingSet::new(settings.features.len())?;
    let mut floor = TrainingSet::new(sensors.len())?;
    for (unit, first, end) in runs(&units) {
        let columns: Vec<Column> = sensors
            .iter()
            .map(|sensor| Column::new(&rows[first..end], *sensor))
            .collect();
        for row in 0..end - first {
            if row > 0 && rows[first + row][1] <= rows[first + row - 1][1] {
                let (path, row) = (path.clone(), first + row);
                return Err(DataError::Order { path, row, unit });
            }
            // Every engine runs until it fails: its last row is the last cycle.
            let outcome = Outcome::failed((end - first - 1 - row) as f64)?;
            let values: Vec<f64> = columns.iter().flat_map(|column| column.features(row)).collect();
            set.push(unit, &values, outcome)?;
            let means: Vec<f64> = columns.iter().map(|column| column.mean(row, MEAN)).collect();
            floor.push(unit, &means, outcome)?;
        }
    }
    Ok(Dataset {
        name: "cmapss",
        time_unit: "cycles",
        unit_word: "engines",
        settings,
        set,
        floor: Floor::RidgeTimes(floor),
        fallback: None,
    })
}

/// One sensor of one engine, as sums up to each row.
struct Column {
    sums: Vec<f64>,
    moments: Vec<f64>,
}

impl Column {
    fn new(rows: &[&[f32]], sensor: usize) -> Self {
        let (mut sums, mut moments) = (vec![0.0], vec![0.0]);
        for (at, row) in rows.iter().enumerate() {
            let value = f64::from(row[sensor]);
            sums.push(sums[at] + value);
            moments.push(moments[at] + value * at as f64);
        }
        Self { sums, moments }
    }

    /// From this row and the ones before only.
    fn features(&self, row: usize) -> [f64; 3] {
        let mean = self.mean(row, MEAN);
        let start = self.sums[(row + 1).min(START)] / (row + 1).min(START) as f64;
        [mean, self.slope(row), mean - start]
    }

    fn mean(&self, row: usize, window: usize) -> f64 {
        mean_of_last(&self.sums, 0, row, window)
    }

    /// Growth over the window by least squares, shrunk while the window is not full.
    fn slope(&self, row: usize) -> f64 {
        let start = (row + 1).saturating_sub(SLOPE);
        let count = row + 1 - start;
        if count < SLOPE_MIN {
            return 0.0;
        }
        let n = count as f64;
        let middle = f64::midpoint(row as f64, start as f64);
        let spread = n * (n * n - 1.0) / 12.0;
        let together =
            (self.moments[row + 1] - self.moments[start]) - middle * (self.sums[row + 1] - self.sums[start]);
        together / spread * n
    }
}

fn varies(rows: &[&[f32]], column: usize) -> bool {
    let count = rows.len() as f64;
    let value = |row: &&[f32]| f64::from(row[column]);
    let mean = rows.iter().map(value).sum::<f64>() / count;
    let variance = rows.iter().map(|row| (value(row) - mean).powi(2)).sum::<f64>() / count;
    variance.sqrt() > 1e-6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_of_a_row_do_not_see_later_rows() {
        let values: Vec<[f32; 1]> = (0..60_u8).map(|i| [f32::from(i % 7)]).collect();
        let mut changed = values.clone();
        changed[40..].iter_mut().for_each(|row| row[0] = 1e6);
        let column = |rows: &[[f32; 1]]| {
            let rows: Vec<&[f32]> = rows.iter().map(<[f32; 1]>::as_slice).collect();
            Column::new(&rows, 0)
        };
        let (a, b) = (column(&values), column(&changed));
        for row in 0..40 {
            assert_eq!(
                a.features(row).map(f64::to_bits),
                b.features(row).map(f64::to_bits)
            );
        }
    }

    #[test]
    fn slope_of_a_line_is_its_growth_over_the_window() {
        let values: Vec<[f32; 1]> = (0..60_u8).map(|i| [2.0 * f32::from(i)]).collect();
        let rows: Vec<&[f32]> = values.iter().map(<[f32; 1]>::as_slice).collect();
        let column = Column::new(&rows, 0);
        assert!((column.slope(50) - 60.0).abs() < 1e-6);
        assert!((column.slope(9) - 20.0).abs() < 1e-6 && column.slope(2).abs() < 1e-12);
    }
}
