//! How good probabilities and times are.

/// Bins of a calibration error.
const BINS: usize = 10;

/// Areas under the ROC and the precision-recall curve (average precision), scores that are equal taken together. NaN
/// with one class only.
pub(super) fn areas(rows: &[(f64, bool)]) -> (f64, f64) {
    let positive = rows.iter().filter(|row| row.1).count() as f64;
    let negative = rows.len() as f64 - positive;
    if positive < 1.0 || negative < 1.0 {
        return (f64::NAN, f64::NAN);
    }
    let mut sorted: Vec<&(f64, bool)> = rows.iter().collect();
    sorted.sort_by(|a, b| b.0.total_cmp(&a.0));
    let (mut hits, mut alarms, mut before) = (0.0, 0.0, (0.0, 0.0));
    let (mut roc, mut precision) = (0.0, 0.0);
    for (i, row) in sorted.iter().enumerate() {
        alarms += 1.0;
        hits += f64::from(u8::from(row.1));
        let last_of_its_score = sorted
            .get(i + 1)
            .is_none_or(|next| next.0.total_cmp(&row.0).is_ne());
        if last_of_its_score {
            let (recall, fall_out) = (hits / positive, (alarms - hits) / negative);
            roc += (fall_out - before.1) * f64::midpoint(recall, before.0);
            precision += (recall - before.0) * hits / alarms;
            before = (recall, fall_out);
        }
    }
    (roc, precision)
}

/// Expected calibration error of `(probability, came true)`: the mean distance between claimed and true share, over ten bins of
/// equal width and, second, over ten bins of equally many rows.
pub(super) fn calibration_errors(rows: &[(f64, bool)]) -> (f64, f64) {
    let mut sorted = rows.to_vec();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let by_width = sorted.chunk_by(|a, b| bin(a.0) == bin(b.0));
    let size = sorted.len().div_ceil(BINS).max(1);
    (
        distance(by_width, rows.len()),
        distance(sorted.chunks(size), rows.len()),
    )
}

/// Mean squared distance between probability and outcome.
pub(super) fn brier(rows: &[(f64, bool)]) -> f64 {
    mean(
        rows.iter()
            .map(|(p, came)| (p - f64::from(u8::from(*came))).powi(2)),
    )
}

/// Mean; NaN of none.
pub(super) fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
    sum / count
}

fn bin(probability: f64) -> usize {
    (1..BINS)
        .filter(|bin| probability >= *bin as f64 / BINS as f64)
        .count()
}

fn distance<'a>(bins: impl Iterator<Item = &'a [(f64, bool)]>, rows: usize) -> f64 {
    bins.map(|bin| {
        let claimed: f64 = bin.iter().map(|row| row.0).sum();
        let came = bin.iter().filter(|row| row.1).count() as f64;
        (claimed - came).abs() / rows as f64
    })
    .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// scikit-learn 1.9.1: `roc_auc_score` and `average_precision_score` on these rows.
    #[test]
    fn areas_agree_with_a_reference_implementation_also_with_ties() {
        let scores = [0.1, 0.4, 0.4, 0.8, 0.8, 0.9, 0.2];
        let labels = [false, false, true, true, false, true, false];
        let rows: Vec<(f64, bool)> = scores.into_iter().zip(labels).collect();
        let (roc, precision) = areas(&rows);
        assert!((roc - REFERENCE.0).abs() < 1e-9 && (precision - REFERENCE.1).abs() < 1e-9);
        assert!(areas(&[(0.1, true)]).0.is_nan());
    }

    #[test]
    fn calibration_error_is_the_distance_between_claim_and_truth() {
        let rows: Vec<(f64, bool)> = (0..100).map(|i| (0.25, i < 50)).collect();
        let (width, mass) = calibration_errors(&rows);
        assert!((width - 0.25).abs() < 1e-12 && mass >= 0.25 - 1e-12);
        assert!((brier(&rows) - (0.5 * 0.0625 + 0.5 * 0.5625)).abs() < 1e-12);
    }

    const REFERENCE: (f64, f64) = (0.833_333_333_333, 0.755_555_555_556);
}
