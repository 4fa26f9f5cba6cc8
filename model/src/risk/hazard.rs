//! Discrete-time logistic hazard: the chance of failing in each bin of the time ahead, given survival up to it.
//!
//! The future is cut into bins `[e_0 = 0, e_1), [e_1, e_2), …`. In bin `j` a row that is still alive fails with
//! `q_j = σ(w_j · x)`; its cumulated hazard is `Λ_j = −ln(1 − q_j)`, spread evenly over the bin, so that
//! `p_h = 1 − exp(−Σ Λ)` for every horizon `h` up to the last edge. Rows that were lost before the end of a bin
//! (censored) take no part in it: Singer and Willett, *It's about time* (1993); Gensheimer and Narasimhan,
//! *A scalable discrete-time survival model* (2019), with weights of each bin's own.

use nalgebra::DMatrix;
use serde::{Deserialize, Serialize};

use super::{Outcome, RiskError, TrainingSet, logistic};

/// Ridge of every weight, in rows: a weight of one standard deviation costs as much as five rows.
pub const RIDGE: f64 = 10.0;

/// Scaled features are cut off here, in standard deviations of the training rows.
const CLIP: f64 = 8.0;

/// Fitted hazards. Holds means, deviations and weights, no row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HazardModel {
    /// Bin edges in the data's unit of time, ascending from 0.
    edges: Vec<f64>,
    /// Mean of each feature.
    mean: Vec<f64>,
    /// Standard deviation of each feature; 0 for a constant one, which is then without effect.
    deviation: Vec<f64>,
    /// `[bin][feature + 1]`, the constant last.
    weights: Vec<Vec<f64>>,
}

/// The time ahead of one row: cumulated hazard at every edge.
#[derive(Debug, Clone, PartialEq)]
pub struct Outlook<'a> {
    edges: &'a [f64],
    /// `[edge]`, 0 at edge 0.
    cumulated: Vec<f64>,
}

impl HazardModel {
    /// Fits one logistic regression for each bin.
    ///
    /// # Errors
    /// [`RiskError::Edges`] unless `edges` begin at 0 and ascend; [`RiskError::NoFailures`] when no row fails before the
    /// last edge (then there is nothing to learn: use the linear extrapolation); [`RiskError::NotFinite`].
    pub fn fit(set: &TrainingSet, edges: &[f64], ridge: f64) -> Result<Self, RiskError> {
        check_edges(edges)?;
        let last = edges[edges.len() - 1];
        if !set.outcomes().iter().any(|outcome| outcome.fails_before(last)) {
            return Err(RiskError::NoFailures { before: last });
        }
        let (mean, deviation) = moments(set);
        let mut model = Self {
            edges: edges.to_vec(),
            mean,
            deviation,
            weights: Vec::new(),
        };
        let scaled: Vec<Vec<f64>> = set.rows().map(|row| model.scale(row)).collect();
        for bin in edges.windows(2) {
            model
                .weights
                .push(fit_bin(&scaled, set.outcomes(), bin[0], bin[1], ridge)?);
        }
        Ok(model)
    }

    /// What lies ahead of a row `[feature]`.
    ///
    /// # Errors
    /// [`RiskError::Width`] when the row has another number of features, [`RiskError::NotFinite`] when one is not finite.
    pub fn outlook(&self, row: &[f64]) -> Result<Outlook<'_>, RiskError> {
        if row.len() != self.width() {
            return Err(RiskError::Width {
                expected: self.width(),
                found: row.len(),
            });
        }
        if row.iter().any(|value| !value.is_finite()) {
            return Err(RiskError::NotFinite);
        }
        let scaled = self.scale(row);
        let mut sum = 0.0;
        let mut cumulated = vec![0.0];
        for weights in &self.weights {
            let score: f64 = scaled.iter().zip(weights).map(|(x, w)| x * w).sum();
            // −ln(1 − σ(z)) = ln(1 + e^z)
            sum += logistic::softplus(score);
            cumulated.push(sum);
        }
        Ok(Outlook {
            edges: &self.edges,
            cumulated,
        })
    }

    /// Number of features.
    pub fn width(&self) -> usize {
        self.mean.len()
    }

    /// The last edge: how far the model looks.
    pub fn reach(&self) -> f64 {
        self.edges.last().copied().unwrap_or(0.0)
    }

    /// `[feature + 1]`, the last one 1.
    fn scale(&self, row: &[f64]) -> Vec<f64> {
        let scaled =
            row.iter()
                .zip(self.mean.iter().zip(&self.deviation))
                .map(|(value, (mean, deviation))| {
                    if *deviation > 0.0 {
                        ((value - mean) / deviation).clamp(-CLIP, CLIP)
                    } else {
                        0.0
                    }
                });
        scaled.chain(std::iter::once(1.0)).collect()
    }

    /// Whether a stored model is one: shapes agree, numbers are finite.
    pub(super) fn is_whole(&self) -> bool {
        let width = self.mean.len();
        let numbers = self
            .mean
            .iter()
            .chain(&self.deviation)
            .chain(self.weights.iter().flatten());
        check_edges(&self.edges).is_ok()
            && self.deviation.len() == width
            && self.weights.len() + 1 == self.edges.len()
            && self.weights.iter().all(|bin| bin.len() == width + 1)
            && numbers.into_iter().all(|value| value.is_finite())
    }
}

impl Outlook<'_> {
    /// `1 − exp(−Λ(h))`, 0 to 1. Past the last edge it stays what it is there.
    pub fn probability(&self, horizon: f64) -> f64 {
        -(-self.cumulated_hazard(horizon)).exp_m1()
    }

    /// Mean and standard deviation of the time to failure, cut off at the last edge.
    ///
    /// With constant hazard inside a bin of length `d`, `∫S = S_0 d (1 − e^−Λ)/Λ`; the second moment `2∫tS` is summed with
    /// `S` at the middle of the bin's mass, which is exact to third order in `Λ`.
    pub fn time(&self) -> (f64, f64) {
        let (mut mean, mut second) = (0.0, 0.0);
        for (bin, edge) in self.edges.windows(2).zip(self.cumulated.windows(2)) {
            let (length, hazard) = (bin[1] - bin[0], edge[1] - edge[0]);
            let share = if hazard > 1e-9 {
                -(-hazard).exp_m1() / hazard
            } else {
                1.0
            };
            let area = (-edge[0]).exp() * length * share;
            // Where the survivors' time of this bin lies, on average.
            let middle = if hazard > 1e-4 {
                length * (1.0 / hazard - 1.0 / hazard.exp_m1())
            } else {
                length * (0.5 - hazard / 12.0)
            };
            mean += area;
            second += 2.0 * area * (bin[0] + middle);
        }
        (mean, (second - mean * mean).max(0.0).sqrt())
    }

    fn cumulated_hazard(&self, horizon: f64) -> f64 {
        for (bin, edge) in self.edges.windows(2).zip(self.cumulated.windows(2)) {
            if horizon < bin[1] {
                let share = ((horizon - bin[0]) / (bin[1] - bin[0])).clamp(0.0, 1.0);
                return edge[0] + share * (edge[1] - edge[0]);
            }
        }
        self.cumulated.last().copied().unwrap_or(0.0)
    }
}

fn check_edges(edges: &[f64]) -> Result<(), RiskError> {
    let ascending = edges.windows(2).all(|pair| pair[0] < pair[1]);
    let finite = edges.iter().all(|edge| edge.is_finite());
    if edges.len() >= 2 && edges[0].abs() < f64::EPSILON && ascending && finite {
        Ok(())
    } else {
        Err(RiskError::Edges)
    }
}

/// Mean and population standard deviation of every feature.
fn moments(set: &TrainingSet) -> (Vec<f64>, Vec<f64>) {
    let count = set.outcomes().len() as f64;
    let mut mean = vec![0.0; set.width()];
    for row in set.rows() {
        mean.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
    }
    for sum in &mut mean {
        *sum /= count;
    }
    let mut square = vec![0.0; set.width()];
    for row in set.rows() {
        for ((sum, value), mean) in square.iter_mut().zip(row).zip(&mean) {
            *sum += (value - mean) * (value - mean);
        }
    }
    let deviation = square
        .iter()
        .zip(&mean)
        .map(|(sum, mean)| {
            let deviation = (sum / count).sqrt();
            // Rounding leaves a trace of deviation on a constant.
            if deviation > 1e-9 * mean.abs().max(1e-9) {
                deviation
            } else {
                0.0
            }
        })
        .collect();
    (mean, deviation)
}

fn fit_bin(
    scaled: &[Vec<f64>],
    outcomes: &[Outcome],
    start: f64,
    end: f64,
    ridge: f64,
) -> Result<Vec<f64>, RiskError> {
    let at_risk: Vec<usize> = (0..scaled.len())
        .filter(|row| {
            let outcome = outcomes[*row];
            outcome.time() >= start && outcome.known_at(end)
        })
        .collect();
    let width = scaled.first().map_or(0, Vec::len);
    if at_risk.is_empty() {
        // Nobody came so far: no hazard is claimed, and the reach of the training rows ends here.
        let mut weights = vec![0.0; width];
        weights[width - 1] = -30.0;
        return Ok(weights);
    }
    let design = DMatrix::from_fn(at_risk.len(), width, |row, column| scaled[at_risk[row]][column]);
    let labels: Vec<bool> = at_risk
        .iter()
        .map(|row| outcomes[*row].fails_before(end))
        .collect();
    Ok(logistic::fit(&design, &labels, ridge)?.iter().copied().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `n` rows whose time to failure is exactly `row` (feature 0), feature 1 constant.
    fn countdown(n: u32) -> TrainingSet {
        let mut set = TrainingSet::new(2).unwrap();
        for row in 0..n {
            let time = f64::from(row);
            set.push(row, &[time, 3.0], Outcome::failed(time).unwrap())
                .unwrap();
        }
        set
    }

    #[test]
    fn hazard_rises_towards_the_failure_and_a_constant_feature_has_no_effect() {
        let model = HazardModel::fit(&countdown(60), &[0.0, 5.0, 10.0, 20.0], 0.01).unwrap();
        let near = model.outlook(&[1.0, 3.0]).unwrap();
        let far = model.outlook(&[50.0, 3.0]).unwrap();
        assert!(near.probability(5.0) > 0.8 && far.probability(5.0) < 0.1);
        assert!(near.time().0 < 5.0 && far.time().0 > 19.0);
        let other_constant = model.outlook(&[1.0, 99.0]).unwrap();
        assert_eq!(near, other_constant);
    }

    #[test]
    fn probability_grows_with_the_horizon_and_stays_in_its_range() {
        let model = HazardModel::fit(&countdown(60), &[0.0, 5.0, 10.0, 20.0], 0.1).unwrap();
        for level in [0.0, 3.0, 17.0, 1e9] {
            let outlook = model.outlook(&[level, 3.0]).unwrap();
            let chances: Vec<f64> = (-1..40).map(|h| outlook.probability(f64::from(h))).collect();
            assert!(chances.windows(2).all(|pair| pair[0] <= pair[1]));
            assert!(chances.iter().all(|chance| (0.0..=1.0).contains(chance)));
        }
    }

    #[test]
    fn moments_of_a_constant_hazard_are_those_of_the_cut_exponential() {
        let edges: Vec<f64> = (0..=30).map(f64::from).collect();
        let rate = 0.1_f64;
        let outlook = Outlook {
            edges: &edges,
            cumulated: edges.iter().map(|edge| rate * edge).collect(),
        };
        let end = (-rate * 30.0).exp();
        let mean = (1.0 - end) / rate;
        let second = 2.0 / rate * (mean - 30.0 * end);
        let (got_mean, got_deviation) = outlook.time();
        assert!((got_mean - mean).abs() < 1e-9);
        assert!((got_deviation - (second - mean * mean).sqrt()).abs() < 1e-6);
    }

    #[test]
    fn rows_lost_before_the_end_of_a_bin_take_no_part_in_it() {
        let mut set = TrainingSet::new(1).unwrap();
        for unit in 0..20 {
            set.push(unit, &[0.0], Outcome::failed(1.0).unwrap()).unwrap();
            set.push(100 + unit, &[0.0], Outcome::censored(15.0).unwrap())
                .unwrap();
            set.push(200 + unit, &[0.0], Outcome::censored(0.5).unwrap())
                .unwrap();
        }
        let model = HazardModel::fit(&set, &[0.0, 10.0, 20.0], 1.0).unwrap();
        let outlook = model.outlook(&[0.0]).unwrap();
        assert!(
            (outlook.probability(10.0) - 0.5).abs() < 0.02,
            "twenty of forty known rows fail"
        );
        assert!(
            outlook.probability(20.0) < 0.55,
            "nobody is known to be alive or dead at 20"
        );
    }

    #[test]
    fn no_failure_and_wrong_edges_are_refused() {
        let mut set = TrainingSet::new(1).unwrap();
        set.push(1, &[0.0], Outcome::censored(50.0).unwrap()).unwrap();
        assert!(matches!(
            HazardModel::fit(&set, &[0.0, 1.0], 1.0),
            Err(RiskError::NoFailures { .. })
        ));
        for edges in [
            vec![],
            vec![0.0],
            vec![1.0, 2.0],
            vec![0.0, 2.0, 1.0],
            vec![0.0, f64::NAN],
        ] {
            assert!(matches!(
                HazardModel::fit(&countdown(9), &edges, 1.0),
                Err(RiskError::Edges)
            ));
        }
    }

    #[test]
    fn rows_of_another_width_or_with_missing_values_are_refused() {
        let model = HazardModel::fit(&countdown(30), &[0.0, 5.0, 20.0], 1.0).unwrap();
        assert!(matches!(model.outlook(&[1.0]), Err(RiskError::Width { .. })));
        assert!(matches!(
            model.outlook(&[f64::NAN, 1.0]),
            Err(RiskError::NotFinite)
        ));
    }
}
