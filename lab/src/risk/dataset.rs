//! Recorded or made rows with what became of them, and the floor to beat.

use std::path::{Path, PathBuf};

use theriac_model::io::{ReadError, read_npy};
use theriac_model::risk::exhaustion::Extrapolation;
use theriac_model::risk::predictor::Settings;
use theriac_model::risk::{Abstain, RiskError, TrainingSet};

/// Why there is nothing to judge.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A file cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// An array is not what its name promises.
    #[error("{path} has shape {found:?}, expected {expected}")]
    Shape {
        /// The file.
        path: PathBuf,
        /// Its shape.
        found: Vec<usize>,
        /// What it should be.
        expected: &'static str,
    },
    /// Rows that belong together are not in order of time.
    #[error("{path}, row {row}: unit {unit} goes back in time")]
    Order {
        /// The file.
        path: PathBuf,
        /// The row.
        row: usize,
        /// Its unit.
        unit: u32,
    },
    /// Rows that no model can be fitted on.
    #[error(transparent)]
    Risk(#[from] RiskError),
}

/// What is judged.
#[derive(Debug)]
pub(super) struct Dataset {
    pub(super) name: &'static str,
    /// Unit of its times.
    pub(super) time_unit: &'static str,
    /// What is one in it: an engine, a drive, a life of a service.
    pub(super) unit_word: &'static str,
    pub(super) settings: Settings,
    pub(super) set: TrainingSet,
    pub(super) floor: Floor,
    /// What the linear fallback of an edge says of each row, where the rows are of a resource.
    pub(super) fallback: Option<Vec<Result<Extrapolation, Abstain>>>,
}

/// What has to be beaten.
#[derive(Debug)]
pub(super) enum Floor {
    /// A score without training, `[horizon][row]`, greater is riskier.
    Scores(Vec<Vec<f64>>),
    /// Ridge regression of the capped time on these rows, one for each row of the set.
    RidgeTimes(TrainingSet),
}

/// A two-dimensional array as rows.
pub(super) struct Table {
    width: usize,
    values: Vec<f32>,
}

impl Table {
    /// Reads `path`, which must have `width` columns.
    pub(super) fn read(path: &Path, width: usize, expected: &'static str) -> Result<Self, DataError> {
        let array = read_npy(path)?;
        if array.shape.len() != 2 || array.shape[1] != width || array.shape[0] == 0 {
            return Err(DataError::Shape {
                path: path.to_owned(),
                found: array.shape,
                expected,
            });
        }
        Ok(Self {
            width,
            values: array.values,
        })
    }

    pub(super) fn rows(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        self.values.chunks_exact(self.width)
    }
}

/// A whole number of a file, 0 when it is none.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "unit numbers are small whole numbers; a wrong one saturates"
)]
pub(super) fn whole(value: f32) -> u32 {
    value as u32
}

/// Rows of each unit, in the order of the file: `(unit, first row, end)`. A unit has to stand in one piece.
pub(super) fn runs(units: &[u32]) -> Vec<(u32, usize, usize)> {
    let mut runs: Vec<(u32, usize, usize)> = Vec::new();
    for (row, unit) in units.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if run.0 == *unit => run.2 = row + 1,
            _ => runs.push((*unit, row, row + 1)),
        }
    }
    runs
}

/// Mean of the last `window` rows up to `row`, not before `first`, of one column of cumulated sums.
pub(super) fn mean_of_last(sums: &[f64], first: usize, row: usize, window: usize) -> f64 {
    let start = first.max((row + 1).saturating_sub(window));
    (sums[row + 1] - sums[start]) / (row + 1 - start) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_array_of_another_shape_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.npy");
        theriac_model::io::write_npy_f32(&path, &[2, 3], &[0.0; 6]).unwrap();
        assert!(Table::read(&path, 3, "[2, 3]").is_ok());
        assert!(matches!(
            Table::read(&path, 4, "[row, 4]"),
            Err(DataError::Shape { .. })
        ));
        assert!(matches!(
            Table::read(&dir.path().join("b.npy"), 4, ""),
            Err(DataError::Read(_))
        ));
    }

    #[test]
    fn windows_end_at_their_row_and_begin_with_the_unit() {
        let sums: Vec<f64> = [0.0, 1.0, 3.0, 6.0, 10.0].to_vec();
        assert!((mean_of_last(&sums, 0, 3, 2) - 3.5).abs() < 1e-12);
        assert!((mean_of_last(&sums, 2, 3, 10) - 3.5).abs() < 1e-12);
        assert_eq!(runs(&[4, 4, 7]), [(4, 0, 2), (7, 2, 3)]);
    }
}
