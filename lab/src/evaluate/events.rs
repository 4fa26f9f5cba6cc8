//! Measures of one prediction: runs of alarms against runs of labels.

use serde::Serialize;

/// Consecutive samples, both ends inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) start: usize,
    pub(super) end: usize,
}

impl Run {
    pub(super) fn greatest(self, scores: &[f64]) -> f64 {
        scores[self.start..=self.end]
            .iter()
            .copied()
            .fold(f64::NEG_INFINITY, f64::max)
    }

    fn samples(self) -> f64 {
        (self.end - self.start + 1) as f64
    }

    fn overlap(self, other: Self) -> f64 {
        (self.end.min(other.end) + 1).saturating_sub(self.start.max(other.start)) as f64
    }
}

/// Runs of `true`; those with at most `gap` samples between them are one.
pub(super) fn runs(mask: &[bool], gap: usize) -> Vec<Run> {
    let mut found: Vec<Run> = Vec::new();
    for (at, _) in mask.iter().enumerate().filter(|(_, set)| **set) {
        match found.last_mut() {
            Some(run) if at - run.end - 1 <= gap => run.end = at,
            _ => found.push(Run { start: at, end: at }),
        }
    }
    found
}

/// What alarms are worth to an operator.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct AlarmQuality {
    /// Alarms that touch no labelled sample, per day of samples without label.
    pub(super) fa_per_day: f64,
    /// Share of the events with an alarm inside.
    pub(super) event_recall: f64,
    /// Mean time from the start of an event to its first alarm, in seconds, over those that have one; NaN for none.
    pub(super) delay_s: f64,
    /// Per-sample F1.
    pub(super) f1: f64,
}

impl AlarmQuality {
    /// Of a prediction that never raises an alarm.
    pub(super) const SILENT: Self = Self {
        fa_per_day: 0.0,
        event_recall: 0.0,
        delay_s: f64::NAN,
        f1: 0.0,
    };
}

/// Judges a prediction; alarms with at most `merge_gap` samples between them are one. `events` are the runs of
/// `labelled`, at least one; `step_s` is the time between samples.
pub(super) fn alarm_quality(
    events: &[Run],
    labelled: &[bool],
    predicted: &[bool],
    step_s: f64,
    merge_gap: usize,
) -> AlarmQuality {
    let count = |mask: &[bool]| mask.iter().filter(|set| **set).count() as f64;
    let wrong = runs(predicted, merge_gap)
        .iter()
        .filter(|alarm| !labelled[alarm.start..=alarm.end].contains(&true))
        .count() as f64;
    let delays: Vec<f64> = events
        .iter()
        .filter_map(|event| predicted[event.start..=event.end].iter().position(|set| *set))
        .map(|samples| samples as f64 * step_s)
        .collect();
    let both = predicted.iter().zip(labelled).filter(|(a, b)| **a && **b).count() as f64;
    let positives = count(labelled);
    let precision = both / count(predicted).max(1.0);
    let recall = both / positives.max(1.0);
    let quiet_days = (labelled.len() as f64 - positives) * step_s / SECONDS_PER_DAY;
    AlarmQuality {
        fa_per_day: wrong / quiet_days,
        event_recall: delays.len() as f64 / events.len() as f64,
        delay_s: if delays.is_empty() {
            f64::NAN
        } else {
            delays.iter().sum::<f64>() / delays.len() as f64
        },
        f1: harmonic_mean(precision, recall),
    }
}

/// Range-based F1: Tatbul et al., "Precision and Recall for Time Series", `NeurIPS` 2018, flat bias, no existence bonus,
/// reciprocal cardinality.
pub(super) fn range_f1(events: &[Run], predicted: &[bool]) -> f64 {
    let alarms = runs(predicted, 0);
    if alarms.is_empty() {
        return 0.0;
    }
    let side = |of: &[Run], by: &[Run]| {
        let covered = of.iter().map(|run| {
            let first = by.partition_point(|other| other.end < run.start);
            let behind = by.partition_point(|other| other.start <= run.end);
            if behind <= first {
                return 0.0;
            }
            let overlap: f64 = by[first..behind].iter().map(|other| run.overlap(*other)).sum();
            overlap / run.samples() / (behind - first) as f64
        });
        covered.sum::<f64>() / of.len() as f64
    };
    harmonic_mean(side(&alarms, events), side(events, &alarms))
}

/// Affiliation F1: Huet et al., "Local Evaluation of Time Series Anomaly Detection Algorithms", KDD 2022, on the grid of
/// samples. Each event owns the samples nearest to it; a distance counts as the chance that a random point of that
/// zone does no better. Random scores reach about .7: never evidence.
#[derive(Debug)]
pub(super) struct Affiliation {
    zones: Vec<Zone>,
}

#[derive(Debug)]
struct Zone {
    event: Run,
    start: usize,
    /// First sample behind it.
    behind: usize,
    /// Distances of all its samples from the event, ascending.
    distances: Vec<usize>,
}

impl Affiliation {
    /// For `events` among so many samples.
    pub(super) fn new(events: &[Run], samples: usize) -> Self {
        let zones = events.iter().enumerate().map(|(index, event)| {
            let start = match index.checked_sub(1).map(|before| events[before]) {
                Some(before) => (before.end + event.start).div_ceil(2),
                None => 0,
            };
            let behind = events
                .get(index + 1)
                .map_or(samples, |next| (event.end + next.start).div_ceil(2));
            let mut distances: Vec<usize> = (start..behind).map(|at| distance(*event, at)).collect();
            distances.sort_unstable();
            Zone {
                event: *event,
                start,
                behind,
                distances,
            }
        });
        Self {
            zones: zones.collect(),
        }
    }

    /// Judges a prediction.
    pub(super) fn f1(&self, predicted: &[bool]) -> f64 {
        let (mut precision, mut with_alarm, mut recall) = (0.0, 0.0, 0.0);
        for zone in &self.zones {
            let alarms: Vec<usize> = (zone.start..zone.behind).filter(|at| predicted[*at]).collect();
            if !alarms.is_empty() {
                precision += zone.precision(&alarms);
                recall += zone.recall(&alarms, predicted.len());
                with_alarm += 1.0;
            }
        }
        let precision = if with_alarm > 0.0 {
            precision / with_alarm
        } else {
            0.0
        };
        harmonic_mean(precision, recall / self.zones.len() as f64)
    }
}

impl Zone {
    fn precision(&self, alarms: &[usize]) -> f64 {
        let sum: f64 = alarms
            .iter()
            .map(|at| match distance(self.event, *at) {
                0 => 1.0,
                far => {
                    let nearer = self.distances.partition_point(|distance| *distance < far);
                    1.0 - nearer as f64 / self.distances.len() as f64
                }
            })
            .sum();
        sum / alarms.len() as f64
    }

    fn recall(&self, alarms: &[usize], samples: usize) -> f64 {
        let Run { start, end } = self.event;
        let sum: f64 = (start..=end)
            .map(|at| {
                let next = alarms.partition_point(|alarm| *alarm < at);
                let after = alarms.get(next).map_or(samples, |alarm| alarm - at);
                let before = next.checked_sub(1).map_or(samples, |last| at - alarms[last]);
                let near = after.min(before);
                let within = near.saturating_sub(1);
                let closer = (at - self.start).min(within)
                    + (self.behind - 1 - at).min(within)
                    + usize::from(near > 0);
                1.0 - closer as f64 / (self.behind - self.start) as f64
            })
            .sum();
        sum / (end - start + 1) as f64
    }
}

fn distance(event: Run, at: usize) -> usize {
    event.start.saturating_sub(at).max(at.saturating_sub(event.end))
}

fn harmonic_mean(a: f64, b: f64) -> f64 {
    if a + b == 0.0 { 0.0 } else { 2.0 * a * b / (a + b) }
}

pub(super) const SECONDS_PER_DAY: f64 = 86_400.0;

#[cfg(test)]
mod tests {
    use super::*;

    fn mask(text: &str) -> Vec<bool> {
        text.chars().map(|c| c == '#').collect()
    }

    #[test]
    fn runs_nearer_than_the_gap_are_one() {
        let mask = mask("#..##...#");
        let spans = |gap| {
            runs(&mask, gap)
                .iter()
                .map(|r| (r.start, r.end))
                .collect::<Vec<_>>()
        };
        assert_eq!(spans(0), [(0, 0), (3, 4), (8, 8)]);
        assert_eq!(spans(2), [(0, 4), (8, 8)]);
        assert_eq!(spans(3), [(0, 8)]);
    }

    #[test]
    fn an_alarm_that_touches_a_label_is_not_false_however_long() {
        let labelled = mask("....##....");
        let quality =
            |predicted: &str| alarm_quality(&runs(&labelled, 0), &labelled, &mask(predicted), 8640.0, 0);
        let early = quality("..####....");
        assert!((early.fa_per_day, early.event_recall, early.delay_s) == (0.0, 1.0, 0.0));
        // Eight quiet samples of a tenth of a day.
        let wrong = quality("#....#...#");
        assert!((wrong.fa_per_day - 2.5).abs() < 1e-12, "{wrong:?}");
        assert!((wrong.delay_s - 8640.0).abs() < 1e-12);
        assert_eq!(quality("..........").event_recall.to_bits(), 0.0_f64.to_bits());
    }

    #[test]
    fn perfect_predictions_have_perfect_scores() {
        let labelled = mask("..##......###..");
        let events = runs(&labelled, 0);
        assert!((range_f1(&events, &labelled) - 1.0).abs() < 1e-12);
        assert!((Affiliation::new(&events, labelled.len()).f1(&labelled) - 1.0).abs() < 1e-12);
        assert!(range_f1(&events, &mask("...............")).abs() < 1e-12);
    }
}
