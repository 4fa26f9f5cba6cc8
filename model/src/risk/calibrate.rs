//! Probabilities that mean what they say: isotonic regression, with Venn–Abers bounds.
//!
//! The calibrated probability is the mean of two curves: the isotonic regression of outcomes on raw probabilities by pooling
//! adjacent violators (Barlow et al., 1972), read between the centres of its blocks, and a logistic curve in the raw log-odds (Platt,
//! 1999). The first follows any monotone distortion but is made of steps where failures are few; the second keeps the order of
//! rows within a step. The bounds are those of the inductive Venn–Abers predictor (Vovk and Petej,
//! 2014): the isotonic fits in which the row in question itself failed, or did not. Rows of one unit tell
//! nearly the same, so for the bounds all rows together weigh as much as there are units.

use nalgebra::DMatrix;
use serde::{Deserialize, Serialize};

use super::{Chance, RiskError, logistic};

/// Most points of the curve.
const POINTS_MAX: usize = 200;
/// Raw probabilities are cut off here, so that their log-odds are finite.
const RAW_MIN: f64 = 1e-9;
/// Ridge of the logistic curve.
const RIDGE: f64 = 1.0;

/// A curve from raw to calibrated probability.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// Centres of the blocks, ascending, with their rates.
    curve: Vec<(f64, f64)>,
    /// Slope, at least 0, and constant of the logistic curve.
    logistic: (f64, f64),
    /// Raw probabilities, ascending, with the lower and the upper bound.
    bounds: Vec<(f64, f64, f64)>,
}

/// Rows whose raw probabilities are close: mean raw probability, weight, weight of those that failed.
#[derive(Debug, Clone, Copy)]
struct Group {
    raw: f64,
    weight: f64,
    failed: f64,
}

impl Calibration {
    /// From raw probabilities of rows that the model was not fitted on, each with what came, of `units` units together.
    ///
    /// With one class only the curve is flat at `(k + ½)/(n + 1)`.
    ///
    /// # Errors
    /// [`RiskError::NoRows`]; [`RiskError::NotFinite`].
    pub fn fit(mut rows: Vec<(f64, bool)>, units: usize) -> Result<Self, RiskError> {
        if rows.is_empty() {
            return Err(RiskError::NoRows);
        }
        if rows.iter().any(|(raw, _)| !raw.is_finite()) {
            return Err(RiskError::NotFinite);
        }
        rows.sort_by(|a, b| a.0.total_cmp(&b.0));
        let groups = group(&rows);
        let failed = rows.iter().filter(|row| row.1).count();
        let curve = if failed == 0 || failed == rows.len() {
            vec![(0.0, (failed as f64 + 0.5) / (rows.len() as f64 + 1.0))]
        } else {
            let blocks = pool(groups.iter().copied());
            blocks.iter().map(|block| (block.raw, block.rate())).collect()
        };
        let logistic = logistic_curve(&rows)?;
        let share = (units.max(1) as f64 / rows.len() as f64).min(1.0);
        let bounds = (0..groups.len()).map(|at| {
            let with = |failed: f64| bound(&groups, share, at, failed);
            (groups[at].raw, with(0.0), with(1.0))
        });
        let bounds = bounds.collect();
        Ok(Self {
            curve,
            logistic,
            bounds,
        })
    }

    /// The calibrated chance of a raw probability.
    pub fn apply(&self, raw: f64) -> Chance {
        let smooth = 1.0 / (1.0 + (-self.logistic.0 * log_odds(raw) - self.logistic.1).exp());
        let probability = f64::midpoint(between(&self.curve, raw), smooth);
        let side = |pick: fn(&(f64, f64, f64)) -> f64| {
            let points: Vec<(f64, f64)> = self.bounds.iter().map(|bound| (bound.0, pick(bound))).collect();
            between(&points, raw)
        };
        Chance::new(probability, side(|bound| bound.1), side(|bound| bound.2))
    }

    /// Whether a stored curve is one.
    pub(super) fn is_whole(&self) -> bool {
        let unit = |value: f64| (0.0..=1.0).contains(&value);
        !self.curve.is_empty()
            && self.logistic.0 >= 0.0
            && self.logistic.0.is_finite()
            && self.logistic.1.is_finite()
            && !self.bounds.is_empty()
            && self
                .curve
                .iter()
                .all(|(raw, rate)| raw.is_finite() && unit(*rate))
            && self
                .bounds
                .iter()
                .all(|(raw, low, high)| raw.is_finite() && unit(*low) && unit(*high))
    }
}

fn log_odds(raw: f64) -> f64 {
    let raw = raw.clamp(RAW_MIN, 1.0 - RAW_MIN);
    (raw / (1.0 - raw)).ln()
}

fn logistic_curve(rows: &[(f64, bool)]) -> Result<(f64, f64), RiskError> {
    let design = DMatrix::from_fn(rows.len(), 2, |row, column| {
        if column == 0 { log_odds(rows[row].0) } else { 1.0 }
    });
    let labels: Vec<bool> = rows.iter().map(|row| row.1).collect();
    let weights = logistic::fit(&design, &labels, RIDGE)?;
    // A falling curve would turn the model upside down.
    Ok((weights[0].max(0.0), weights[1]))
}

impl Group {
    fn rate(self) -> f64 {
        self.failed / self.weight
    }

    fn join(self, other: Self) -> Self {
        let weight = self.weight + other.weight;
        Self {
            raw: (self.raw * self.weight + other.raw * other.weight) / weight,
            weight,
            failed: self.failed + other.failed,
        }
    }
}

/// At most [`POINTS_MAX`] groups of about as many rows each; equal raw probabilities stay together.
fn group(sorted: &[(f64, bool)]) -> Vec<Group> {
    let size = sorted.len().div_ceil(POINTS_MAX);
    let mut groups: Vec<Group> = Vec::new();
    let mut last = f64::NAN;
    for (raw, failed) in sorted {
        let row = Group {
            raw: *raw,
            weight: 1.0,
            failed: f64::from(u8::from(*failed)),
        };
        match groups.last_mut() {
            Some(open) if open.weight < size as f64 || raw.total_cmp(&last).is_eq() => *open = open.join(row),
            _ => groups.push(row),
        }
        last = *raw;
    }
    groups
}

/// Pools adjacent violators: blocks of ascending rate.
fn pool(groups: impl Iterator<Item = Group>) -> Vec<Group> {
    let mut blocks: Vec<Group> = Vec::new();
    for group in groups {
        let mut block = group;
        while let Some(before) = blocks.last()
            && before.rate() >= block.rate()
        {
            block = before.join(block);
            blocks.pop();
        }
        blocks.push(block);
    }
    blocks
}

/// The isotonic rate at group `at` when one more row stands there that failed or did not.
fn bound(groups: &[Group], share: f64, at: usize, failed: f64) -> f64 {
    let raw = groups[at].raw;
    let blocks = pool(groups.iter().enumerate().map(|(i, group)| {
        let extra = f64::from(u8::from(i == at));
        Group {
            raw: group.raw,
            weight: group.weight * share + extra,
            failed: group.failed * share + extra * failed,
        }
    }));
    // Blocks are told apart by how much weight lies before their end.
    let before: f64 = groups[..at].iter().map(|group| group.weight * share).sum();
    let mut sum = 0.0;
    for block in &blocks {
        sum += block.weight;
        if sum > before + 0.5 {
            return block.rate();
        }
    }
    blocks.last().map_or(raw, |block| block.rate())
}

/// Linear between points, constant outside of them.
fn between(points: &[(f64, f64)], at: f64) -> f64 {
    let next = points.partition_point(|point| point.0 < at);
    match (
        next.checked_sub(1).and_then(|before| points.get(before)),
        points.get(next),
    ) {
        (None, Some(first)) => first.1,
        (Some(last), None) => last.1,
        (Some(a), Some(b)) if b.0 > a.0 => a.1 + (b.1 - a.1) * (at - a.0) / (b.0 - a.0),
        (Some(a), Some(_)) => a.1,
        (None, None) => f64::NAN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// scikit-learn 1.9.1, `IsotonicRegression().fit_transform(range(8), [0, 1, 0, 0, 1, 0, 1, 1])`.
    #[test]
    fn pooling_agrees_with_a_reference_implementation() {
        let labels = [0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0];
        let groups = labels.iter().zip(0_u8..).map(|(failed, raw)| Group {
            raw: f64::from(raw),
            weight: 1.0,
            failed: *failed,
        });
        let rates: Vec<(f64, f64)> = pool(groups).iter().map(|b| (b.rate(), b.weight)).collect();
        let expected = [(0.0, 1.0), (1.0 / 3.0, 3.0), (0.5, 2.0), (1.0, 2.0)];
        assert_eq!(rates.len(), expected.len());
        for (got, want) in rates.iter().zip(expected) {
            assert!((got.0 - want.0).abs() < 1e-12 && (got.1 - want.1).abs() < 1e-12);
        }
    }

    #[test]
    fn a_model_that_is_twice_too_sure_is_put_right() {
        // Of rows at raw p, p/2 fail.
        let mut rows = Vec::new();
        for step in 0..50_u32 {
            let raw = f64::from(step) / 50.0;
            for i in 0..100_u32 {
                rows.push((raw, f64::from(i) < 100.0 * raw / 2.0));
            }
        }
        let calibration = Calibration::fit(rows, 5000).unwrap();
        for raw in [0.1, 0.5, 0.9] {
            let chance = calibration.apply(raw);
            assert!((chance.probability - raw / 2.0).abs() < 0.05, "{raw}: {chance:?}");
            assert!(chance.low <= chance.probability && chance.probability <= chance.high);
        }
    }

    #[test]
    fn rows_of_one_block_keep_their_order() {
        let rows = (0..100)
            .map(|i| (f64::from(i) / 100.0, i % 2 == 0 || i > 90))
            .collect();
        let calibration = Calibration::fit(rows, 100).unwrap();
        assert!(calibration.apply(0.3).probability < calibration.apply(0.6).probability);
    }

    #[test]
    fn fewer_units_give_wider_bounds() {
        let rows: Vec<(f64, bool)> = (0..1000).map(|i| (f64::from(i) / 1000.0, i % 3 == 0)).collect();
        let width = |units| {
            let chance = Calibration::fit(rows.clone(), units).unwrap().apply(0.5);
            chance.high - chance.low
        };
        assert!(width(10) > 3.0 * width(1000), "{} {}", width(10), width(1000));
    }

    #[test]
    fn one_class_gives_a_flat_curve_and_no_rows_an_error() {
        let calibration = Calibration::fit(vec![(0.2, false), (0.9, false)], 2).unwrap();
        assert!(calibration.apply(0.9).probability < 0.2);
        assert!(calibration.apply(0.9).high > calibration.apply(0.9).probability);
        assert!(matches!(Calibration::fit(Vec::new(), 0), Err(RiskError::NoRows)));
        assert!(matches!(
            Calibration::fit(vec![(f64::NAN, true)], 1),
            Err(RiskError::NotFinite)
        ));
    }
}
