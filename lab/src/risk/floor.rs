//! The floors: what a published or obvious method reaches on the same rows.

use nalgebra::{DMatrix, DVector};
use theriac_model::risk::{Outcome, TrainingSet};

/// Ridge regression of the capped time to failure on features and their squares, standardised on the training rows: the floor
/// for engines. Returns a prediction for each row of `test`, between 0 and `cap`.
pub(super) fn ridge_times(train: &TrainingSet, test: &TrainingSet, cap: f64) -> Vec<f64> {
    let (mean, deviation) = moments(train);
    let design = |set: &TrainingSet| {
        let rows: Vec<f64> = set
            .rows()
            .flat_map(|row| {
                let scaled: Vec<f64> = row
                    .iter()
                    .zip(mean.iter().zip(&deviation))
                    .map(|(value, (mean, deviation))| (value - mean) / deviation)
                    .collect();
                let squares: Vec<f64> = scaled.iter().map(|value| value * value).collect();
                scaled.into_iter().chain(squares).chain(std::iter::once(1.0))
            })
            .collect();
        DMatrix::from_row_slice(set.len(), 2 * set.width() + 1, &rows)
    };
    let a = design(train);
    let capped = |outcome: &Outcome| outcome.time().min(cap);
    let target = DVector::from_iterator(train.len(), train.outcomes().iter().map(capped));
    let mut gram = a.tr_mul(&a);
    for i in 0..gram.nrows() {
        gram[(i, i)] += 1.0;
    }
    let Some(factor) = gram.cholesky() else {
        return vec![f64::NAN; test.len()];
    };
    let weights = factor.solve(&a.tr_mul(&target));
    (design(test) * weights)
        .iter()
        .map(|time| time.clamp(0.0, cap))
        .collect()
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
