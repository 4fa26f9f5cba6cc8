//! Logistic regression with a ridge, by iteratively reweighted least squares.
//!
//! Newton's method on the penalised log-likelihood (Nelder and Wedderburn, *Generalized linear models*, 1972), each step
//! halved until the objective does not rise: without that, bins with few failures run away.

use nalgebra::{Cholesky, DMatrix, DVector};

use super::RiskError;

/// Most Newton steps; about eight are usual.
const STEPS_MAX: usize = 40;
/// A step that improves the objective by less than this share of it is the last one.
const IMPROVEMENT_MIN: f64 = 1e-7;
/// Smallest step that is tried.
const STEP_MIN: f64 = 1e-4;
/// Ridge on the constant: only so much that a bin of one class has a finite solution.
const RIDGE_CONSTANT: f64 = 1e-3;
/// Least curvature of one row, so that rows that are fitted well leave the system solvable.
const CURVATURE_MIN: f64 = 1e-6;

/// Fits `P(y = 1) = σ(design · w)`: the last column of `design` `[row, feature + 1]` is the constant.
///
/// With one class only, every weight but the constant is 0 and the constant gives the rate `(k + ½)/(n + 1)`.
///
/// # Errors
/// [`RiskError::NotFinite`] when a value is not finite; [`RiskError::NoRows`] without a row.
pub(super) fn fit(design: &DMatrix<f64>, labels: &[bool], ridge: f64) -> Result<DVector<f64>, RiskError> {
    let (rows, width) = design.shape();
    if rows == 0 || width == 0 {
        return Err(RiskError::NoRows);
    }
    let positive = labels.iter().filter(|label| **label).count();
    let rate = (positive as f64 + 0.5) / (rows as f64 + 1.0);
    let mut weights = DVector::zeros(width);
    weights[width - 1] = (rate / (1.0 - rate)).ln();
    if positive == 0 || positive == rows {
        return Ok(weights);
    }
    let target = DVector::from_iterator(rows, labels.iter().map(|label| f64::from(u8::from(*label))));
    let mut penalty = DVector::from_element(width, ridge);
    penalty[width - 1] = RIDGE_CONSTANT;
    let problem = Problem {
        design,
        target,
        penalty,
    };
    let mut objective = problem.objective(&weights);
    for _ in 0..STEPS_MAX {
        let step = problem.newton_step(&weights).ok_or(RiskError::NotFinite)?;
        let (next, value) = problem.descend(&weights, &step, objective);
        weights = next;
        let improvement = objective - value;
        objective = value;
        if improvement < IMPROVEMENT_MIN * objective.abs() {
            break;
        }
    }
    if weights.iter().all(|weight| weight.is_finite()) {
        Ok(weights)
    } else {
        Err(RiskError::NotFinite)
    }
}

/// `ln(1 + e^z)` without overflow.
pub(super) fn softplus(z: f64) -> f64 {
    z.max(0.0) + (-z.abs()).exp().ln_1p()
}

fn sigmoid(z: f64) -> f64 {
    1.0 / (1.0 + (-z).exp())
}

struct Problem<'a> {
    design: &'a DMatrix<f64>,
    target: DVector<f64>,
    penalty: DVector<f64>,
}

impl Problem<'_> {
    fn objective(&self, weights: &DVector<f64>) -> f64 {
        let scores = self.design * weights;
        let loss: f64 = scores
            .iter()
            .zip(self.target.iter())
            .map(|(z, y)| softplus(*z) - y * z)
            .sum();
        loss + 0.5 * weights.component_mul(weights).dot(&self.penalty)
    }

    fn newton_step(&self, weights: &DVector<f64>) -> Option<DVector<f64>> {
        let chance = (self.design * weights).map(sigmoid);
        let gradient = self.design.tr_mul(&(&self.target - &chance)) - self.penalty.component_mul(weights);
        let root = chance.map(|p| (p * (1.0 - p)).max(CURVATURE_MIN).sqrt());
        let mut scaled = self.design.clone();
        for mut column in scaled.column_iter_mut() {
            column.component_mul_assign(&root);
        }
        let mut curvature = scaled.tr_mul(&scaled);
        for (i, penalty) in self.penalty.iter().enumerate() {
            curvature[(i, i)] += penalty;
        }
        Some(Cholesky::new(curvature)?.solve(&gradient))
    }

    fn descend(&self, from: &DVector<f64>, step: &DVector<f64>, before: f64) -> (DVector<f64>, f64) {
        let mut size = 1.0;
        while size >= STEP_MIN {
            let next = from + step * size;
            let value = self.objective(&next);
            if value <= before {
                return (next, value);
            }
            size /= 2.0;
        }
        (from.clone(), before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// scikit-learn 1.9.1, `LogisticRegression(C=0.5, tol=1e-12)` on the same rows, whose intercept has no ridge at all.
    #[test]
    fn weights_agree_with_a_reference_implementation() {
        let x = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0];
        let labels = [false, false, true, false, true, true];
        let design = DMatrix::from_fn(6, 2, |row, column| if column == 0 { x[row] } else { 1.0 });
        let weights = fit(&design, &labels, 2.0).unwrap();
        assert!((weights[0] - REFERENCE.0).abs() < 2e-3, "{weights}");
        assert!((weights[1] - REFERENCE.1).abs() < 6e-3, "{weights}");
    }

    #[test]
    fn separable_labels_stay_finite() {
        let design = DMatrix::from_fn(
            40,
            2,
            |row, column| if column == 0 { row as f64 - 20.0 } else { 1.0 },
        );
        let labels: Vec<bool> = (0..40).map(|row| row >= 20).collect();
        let weights = fit(&design, &labels, 1.0).unwrap();
        assert!(weights.iter().all(|weight| weight.is_finite()) && weights[0] > 0.0);
    }

    #[test]
    fn one_class_gives_the_rate_alone() {
        let design = DMatrix::from_fn(9, 2, |row, column| if column == 0 { row as f64 } else { 1.0 });
        let weights = fit(&design, &[false; 9], 1.0).unwrap();
        assert!(weights[0].abs() < 1e-12);
        assert!((sigmoid(weights[1]) - 0.05).abs() < 1e-12);
        let weights = fit(&design, &[true; 9], 1.0).unwrap();
        assert!((sigmoid(weights[1]) - 0.95).abs() < 1e-12);
    }

    #[test]
    fn values_that_are_not_finite_are_refused() {
        let design = DMatrix::from_fn(4, 2, |row, _| if row == 1 { f64::NAN } else { 1.0 });
        assert!(matches!(
            fit(&design, &[true, false, true, false], 1.0),
            Err(RiskError::NotFinite)
        ));
    }

    /// Coefficient and intercept.
    const REFERENCE: (f64, f64) = (0.600_985, -1.502_463);
}
