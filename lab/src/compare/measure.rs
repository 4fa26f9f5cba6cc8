//! What scores and alarms are worth, given labels.

use std::time::Duration;

use serde::Serialize;

/// Runs of alarmed rows with no more than so many quiet rows between them are one alarm.
const MERGE_GAP_ROWS: usize = 5;
const DAY_SECONDS: f64 = 86_400.0;

/// What alarms came to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Alarms {
    /// Alarms that touch no labelled row, per day without label.
    pub false_alarms_per_day: f64,
    /// Share of events that an alarm touches; `None` without events.
    pub event_recall: Option<f64>,
    /// Events.
    pub events: usize,
    /// Alarms, true and false.
    pub alarms: usize,
}

/// Counts alarms against labels, one for each row `step` apart. A false alarm is a run of alarmed rows, gaps of up to five
/// rows joined, that touches no labelled row.
pub fn alarms(labels: &[bool], alarmed: &[bool], step: Duration) -> Alarms {
    let events = runs(labels, 0);
    let raised = runs(alarmed, MERGE_GAP_ROWS);
    let wrong = raised
        .iter()
        .filter(|(start, end)| !labels[*start..*end].contains(&true))
        .count();
    let caught = events
        .iter()
        .filter(|(start, end)| alarmed[*start..*end].contains(&true))
        .count();
    let quiet = labels.iter().filter(|label| !**label).count();
    let days = quiet as f64 * step.as_secs_f64() / DAY_SECONDS;
    Alarms {
        false_alarms_per_day: if days > 0.0 { wrong as f64 / days } else { 0.0 },
        event_recall: (!events.is_empty()).then(|| caught as f64 / events.len() as f64),
        events: events.len(),
        alarms: raised.len(),
    }
}

/// Start and end (exclusive) of every run of true, runs with at most `gap` rows between them joined.
fn runs(flags: &[bool], gap: usize) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for row in (0..flags.len()).filter(|row| flags[*row]) {
        match runs.last_mut() {
            Some((_, end)) if row - *end <= gap => *end = row + 1,
            _ => runs.push((row, row + 1)),
        }
    }
    runs
}

/// Average precision: `Σ (recall step) · precision` over the scores from the highest down, equal scores taken together. NaN counts
/// as the lowest. `None` when no row or every row is labelled.
pub fn average_precision(labels: &[bool], scores: &[f32]) -> Option<f64> {
    let positives = labels.iter().filter(|label| **label).count();
    if positives == 0 || positives == labels.len() {
        return None;
    }
    let mut order: Vec<(f32, bool)> = scores
        .iter()
        .map(|score| if score.is_nan() { f32::NEG_INFINITY } else { *score })
        .zip(labels.iter().copied())
        .collect();
    order.sort_by(|a, b| b.0.total_cmp(&a.0));
    let (mut hits, mut seen, mut sum) = (0.0, 0.0, 0.0);
    for group in order.chunk_by(|a, b| a.0.total_cmp(&b.0).is_eq()) {
        let new = group.iter().filter(|(_, label)| *label).count() as f64;
        hits += new;
        seen += group.len() as f64;
        sum += new * hits / seen;
    }
    Some(sum / positives as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(text: &str) -> Vec<bool> {
        text.chars().map(|c| c == 'x').collect()
    }

    #[test]
    fn false_alarms_are_runs_that_touch_no_label() {
        //                 event          event
        let labels = flags("......xxx.....................xx");
        let alarmed = flags("..x.......x.............x......x");
        // The first two runs are seven rows apart; neither touches a label, nor does the third.
        let found = alarms(&labels, &alarmed, Duration::from_hours(1));
        assert_eq!(
            (found.alarms, found.events, found.event_recall),
            (4, 2, Some(0.5))
        );
        assert!((found.false_alarms_per_day - 3.0 * 24.0 / 27.0).abs() < 1e-12);
        let joined = alarms(
            &labels,
            &flags("..x....x........................"),
            Duration::from_hours(1),
        );
        assert_eq!((joined.alarms, joined.event_recall), (1, Some(0.5)));
        assert!(joined.false_alarms_per_day.abs() < 1e-12);
        assert_eq!(
            alarms(&[false], &[true], Duration::from_hours(1)).event_recall,
            None
        );
    }

    /// Computed with scikit-learn 1.9.1 (`average_precision_score`).
    #[test]
    fn average_precision_is_that_of_scikit_learn() {
        let labels = [false, true, false, true, true, false];
        let scores = [0.1, 0.4, 0.35, 0.8, 0.35, 0.7];
        let found = average_precision(&labels, &scores).unwrap();
        assert!((found - EXPECTED).abs() < 1e-12, "{found}");
        let nan = average_precision(&[true, false], &[f32::NAN, 1.0]).unwrap();
        assert!((nan - 0.5).abs() < 1e-12);
        assert_eq!(average_precision(&[true], &[1.0]), None);
    }

    const EXPECTED: f64 = 0.755_555_555_555_555_5;
}
