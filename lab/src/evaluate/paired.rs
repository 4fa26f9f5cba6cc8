//! Two folders of scores, compared machine by machine.

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::measure::quantile;

/// Bootstrap samples.
const RESAMPLES: usize = 10_000;

/// The difference of one measure, first folder less second, over the machines that have both.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PairedDifference {
    /// The measure.
    pub measure: &'static str,
    /// Machines compared.
    pub machines: usize,
    /// Mean difference.
    pub mean: f64,
    /// Bounds of the 90 % percentile bootstrap of that mean, machines drawn with replacement.
    pub low: f64,
    /// See `low`.
    pub high: f64,
    /// Machines on which the first is larger.
    pub wins: usize,
    /// Machines on which it is smaller.
    pub losses: usize,
    /// The machine that loses most (or gains least) and its difference.
    pub worst: (String, f64),
}

/// Compares named values; pairs with a NaN are left out. `None` when no pair is left.
pub(super) fn compare(
    measure: &'static str,
    pairs: impl Iterator<Item = (String, f64, f64)>,
    seed: u64,
) -> Option<PairedDifference> {
    let differences: Vec<(String, f64)> = pairs
        .map(|(name, ours, theirs)| (name, ours - theirs))
        .filter(|(_, difference)| !difference.is_nan())
        .collect();
    let worst = differences.iter().min_by(|a, b| a.1.total_cmp(&b.1))?.clone();
    let values: Vec<f64> = differences.iter().map(|(_, difference)| *difference).collect();
    let (low, high) = bootstrap(&values, seed);
    Some(PairedDifference {
        measure,
        machines: values.len(),
        mean: mean(&values),
        low,
        high,
        wins: values.iter().filter(|difference| **difference > 0.0).count(),
        losses: values.iter().filter(|difference| **difference < 0.0).count(),
        worst,
    })
}

fn bootstrap(values: &[f64], seed: u64) -> (f64, f64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut means: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let sum: f64 = (0..values.len())
                .map(|_| values[random.random_range(0..values.len())])
                .sum();
            sum / values.len() as f64
        })
        .collect();
    means.sort_by(f64::total_cmp);
    (quantile(&means, 0.05), quantile(&means, 0.95))
}

/// 0 for none.
fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(differences: &[f64]) -> impl Iterator<Item = (String, f64, f64)> {
        differences
            .iter()
            .enumerate()
            .map(|(i, d)| (format!("m{i}"), 0.5 + d, 0.5))
    }

    #[test]
    fn counts_wins_and_names_the_worst() {
        let found = compare("vus_pr", pairs(&[0.5, 0.25, -0.25, 0.0, f64::NAN]), 1).unwrap();
        assert_eq!((found.machines, found.wins, found.losses), (4, 2, 1));
        assert_eq!(found.worst, ("m2".to_owned(), -0.25));
        assert!((found.mean - 0.125).abs() < 1e-12);
        assert!(compare("vus_pr", pairs(&[f64::NAN]), 1).is_none());
    }

    #[test]
    fn interval_holds_the_mean_repeats_with_its_seed_and_is_as_wide_as_theory_says() {
        let differences: Vec<f64> = (0..200).map(|i| f64::from(i % 2)).collect();
        let found = compare("auc_pr", pairs(&differences), 7).unwrap();
        // Normal approximation: 0.5 ± 1.645 · 0.5/√200.
        assert!((found.low - 0.4418).abs() < 0.006, "{found:?}");
        assert!((found.high - 0.5582).abs() < 0.006, "{found:?}");
        assert_eq!(compare("auc_pr", pairs(&differences), 7).unwrap(), found);
    }
}
