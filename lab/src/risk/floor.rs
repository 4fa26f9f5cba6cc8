//! The floors: what a published or obvious method reaches on the same rows.

use theriac_model::risk::TrainingSet;

/// Ridge regression of the capped time to failure on features and their squares, standardised on the training rows: the floor
/// for engines. Returns a prediction for each row of `test`, between 0 and `cap`.
pub(super) fn ridge_times(train: &TrainingSet, test: &TrainingSet, cap: f64) -> Vec<f64> {
    let (mean, deviation) = moments(train);
    let design = |row: &[f64]| -> Vec<f64> {
        let scaled: Vec<f64> = row
            .iter()
            .zip(mean.iter().zip(&deviation))
            .map(|(value, (mean, deviation))| (value - mean) / deviation)
            .collect();
        let squares: Vec<f64> = scaled.iter().map(|value| value * value).collect();
        scaled
            .into_iter()
            .chain(squares)
            .chain(std::iter::once(1.0))
            .collect()
    };
    let size = 2 * train.width() + 1;
    let mut gram = vec![vec![0.0; size]; size];
    let mut cross = vec![0.0; size];
    for (row, outcome) in train.rows().zip(train.outcomes()) {
        let a = design(row);
        let target = outcome.time().min(cap);
        for (i, value) in a.iter().enumerate() {
            cross[i] += value * target;
            for (sum, other) in gram[i].iter_mut().zip(&a) {
                *sum += value * other;
            }
        }
    }
    for (i, row) in gram.iter_mut().enumerate() {
        row[i] += 1.0;
    }
    let weights = solve(gram, cross);
    test.rows()
        .map(|row| {
            let time: f64 = design(row).iter().zip(&weights).map(|(a, w)| a * w).sum();
            time.clamp(0.0, cap)
        })
        .collect()
}

/// Gaussian elimination without pivots: the matrix is positive definite.
fn solve(mut matrix: Vec<Vec<f64>>, mut right: Vec<f64>) -> Vec<f64> {
    let size = right.len();
    for pivot in 0..size {
        let (above, below) = matrix.split_at_mut(pivot + 1);
        for (row, offset) in below.iter_mut().zip(pivot + 1..) {
            let factor = row[pivot] / above[pivot][pivot];
            for (value, top) in row.iter_mut().zip(&above[pivot]) {
                *value -= factor * top;
            }
            right[offset] -= factor * right[pivot];
        }
    }
    for pivot in (0..size).rev() {
        let known: f64 = (pivot + 1..size).map(|i| matrix[pivot][i] * right[i]).sum();
        right[pivot] = (right[pivot] - known) / matrix[pivot][pivot];
    }
    right
}

fn moments(set: &TrainingSet) -> (Vec<f64>, Vec<f64>) {
    let count = set.len() as f64;
    let mut mean = vec![0.0; set.width()];
    for row in set.rows() {
        mean.iter_mut()
            .zip(row)
            .for_each(|(sum, value)| *sum += value / count);
    }
    let mut variance = vec![0.0; set.width()];
    for row in set.rows() {
        for ((sum, value), mean) in variance.iter_mut().zip(row).zip(&mean) {
            *sum += (value - mean) * (value - mean) / count;
        }
    }
    (mean, variance.into_iter().map(|v| v.sqrt().max(1e-9)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_positive_definite_system_is_solved() {
        let matrix = vec![vec![4.0, 1.0, 0.5], vec![1.0, 3.0, 0.2], vec![0.5, 0.2, 2.0]];
        let x = [1.0, -2.0, 3.0];
        let right = matrix
            .iter()
            .map(|row| row.iter().zip(x).map(|(a, x)| a * x).sum())
            .collect();
        for (got, want) in solve(matrix, right).iter().zip(x) {
            assert!((got - want).abs() < 1e-12);
        }
    }
}
