//! Measures of a ranking: how well larger scores mean labelled samples, over all thresholds.

use super::events::{Run, runs};

/// Slices of the range-aware surface, each at the score of a rank.
const SLICES: usize = 250;

/// Scores of one machine against its labels, both `[time]`, with what every measure needs of them.
#[derive(Debug, Clone)]
pub(super) struct Ranking {
    /// Whether a sample is labelled.
    pub(super) labelled: Vec<bool>,
    /// Runs of labelled samples.
    pub(super) events: Vec<Run>,
    /// Finite scores, larger = more anomalous.
    pub(super) scores: Vec<f64>,
    /// Sample numbers, greatest score first, ties in time order.
    order: Vec<usize>,
}

/// Areas and the best F1 over all thresholds, per point. NaN where one of the classes is missing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct PointCurves {
    pub(super) auc_roc: f64,
    /// Average precision.
    pub(super) auc_pr: f64,
    pub(super) best_f1: f64,
}

impl Ranking {
    /// Takes labels and as many scores. NaN and −∞ become the least finite score, +∞ the greatest.
    pub(super) fn new(labelled: Vec<bool>, scores: Vec<f64>) -> Self {
        let scores = finite(scores);
        let order = descending(&scores);
        Self {
            events: runs(&labelled, 0),
            labelled,
            scores,
            order,
        }
    }

    /// The scores in ascending order.
    pub(super) fn ascending(&self) -> Vec<f64> {
        self.order.iter().rev().map(|at| self.scores[*at]).collect()
    }

    /// Per-point areas under the ROC and the precision-recall curve.
    pub(super) fn points(&self) -> PointCurves {
        point_curves(&self.labelled, &self.scores, &self.order)
    }

    /// The best F1 after every event was given its greatest score. Random scores reach about .8: never evidence.
    pub(super) fn point_adjusted_f1(&self) -> f64 {
        let mut adjusted = self.scores.clone();
        for event in &self.events {
            let greatest = event.greatest(&self.scores);
            adjusted[event.start..=event.end].fill(greatest);
        }
        let order = descending(&adjusted);
        point_curves(&self.labelled, &adjusted, &order).best_f1
    }

    /// Volumes under the range-aware ROC and precision-recall surfaces over buffers of 0 to `window` samples: Paparrizos et
    /// al., "Volume Under the Surface", VLDB 2022. Every event has shoulders of half the buffer, weight
    /// `√(1 − distance/buffer)`; recall is weighted with the share of events that are touched. NaN where one of the
    /// classes is missing.
    pub(super) fn volumes(&self, window: usize) -> (f64, f64) {
        if self.events.is_empty() || self.labelled.iter().all(|labelled| *labelled) {
            return (f64::NAN, f64::NAN);
        }
        let surface = Surface::new(self);
        let (mut roc, mut pr) = (0.0, 0.0);
        for buffer in 0..=window {
            let (area_roc, area_pr) = surface.areas(buffer);
            roc += area_roc;
            pr += area_pr;
        }
        let buffers = (window + 1) as f64;
        (roc / buffers, pr / buffers)
    }
}

/// What does not change from buffer to buffer.
struct Surface<'a> {
    ranking: &'a Ranking,
    /// Score of each slice, descending.
    thresholds: Vec<f64>,
    /// Samples whose score reaches each slice.
    predicted: Vec<usize>,
    /// Labelled ones among them.
    hits: Vec<f64>,
    /// Samples to the next labelled sample and from the last one; the number of samples where there is none.
    distances: [Vec<usize>; 2],
}

impl<'a> Surface<'a> {
    fn new(ranking: &'a Ranking) -> Self {
        let Ranking {
            labelled,
            scores,
            order,
            ..
        } = ranking;
        let ranked: Vec<f64> = order.iter().map(|at| scores[*at]).collect();
        let thresholds: Vec<f64> = slice_ranks(scores.len()).map(|rank| ranked[rank]).collect();
        let predicted: Vec<usize> = thresholds
            .iter()
            .map(|threshold| ranked.partition_point(|score| score >= threshold))
            .collect();
        let weights = order.iter().map(|at| f64::from(u8::from(labelled[*at])));
        let hits = sums_at(weights, &predicted);
        Self {
            thresholds,
            hits,
            predicted,
            distances: distances(labelled),
            ranking,
        }
    }

    fn areas(&self, buffer: usize) -> (f64, f64) {
        let Ranking { labelled, order, .. } = self.ranking;
        let samples = labelled.len() as f64;
        let positives = labelled.iter().filter(|labelled| **labelled).count() as f64;
        let shoulder = self.shoulders(buffer);
        let beside = sums_at(order.iter().map(|at| shoulder[*at]), &self.predicted);
        let touched = self.touched(buffer / 2);
        let (mut roc, mut pr) = (0.0, 0.0);
        let (mut last_recall, mut last_fall_out) = (0.0, 0.0);
        for slice in 0..self.thresholds.len() {
            let found = self.hits[slice] + beside[slice];
            let predicted = self.predicted[slice] as f64;
            let weight = f64::midpoint(positives, positives + beside[slice]);
            let recall = (found / weight).min(1.0) * touched[slice];
            let fall_out = (predicted - found) / (samples - weight);
            roc += (fall_out - last_fall_out) * (recall + last_recall) / 2.0;
            pr += (recall - last_recall) * (found / predicted);
            (last_recall, last_fall_out) = (recall, fall_out);
        }
        roc += (1.0 - last_fall_out) * (1.0 + last_recall) / 2.0;
        (roc, pr)
    }

    /// Weight of every sample that is not labelled itself, 0 to 1.
    fn shoulders(&self, buffer: usize) -> Vec<f64> {
        let labelled = &self.ranking.labelled;
        let mut weights = vec![0.0_f64; labelled.len()];
        let half = buffer / 2;
        if half == 0 {
            return weights;
        }
        for distances in &self.distances {
            for ((weight, distance), labelled) in weights.iter_mut().zip(distances).zip(labelled) {
                if !labelled && *distance <= half {
                    *weight += (1.0 - *distance as f64 / buffer as f64).sqrt();
                }
            }
        }
        for weight in &mut weights {
            *weight = weight.min(1.0);
        }
        weights
    }

    /// Share of the events, widened by `half` on both sides and joined where they then meet, that each slice touches.
    fn touched(&self, half: usize) -> Vec<f64> {
        let last = self.ranking.labelled.len() - 1;
        let mut wide: Vec<Run> = Vec::new();
        for event in &self.ranking.events {
            let start = event.start.saturating_sub(half);
            let end = (event.end + half).min(last);
            match wide.last_mut() {
                Some(before) if start <= before.end => before.end = end,
                _ => wide.push(Run { start, end }),
            }
        }
        let tops: Vec<f64> = wide
            .iter()
            .map(|run| run.greatest(&self.ranking.scores))
            .collect();
        self.thresholds
            .iter()
            .map(|threshold| tops.iter().filter(|top| *top >= threshold).count() as f64 / tops.len() as f64)
            .collect()
    }
}

fn point_curves(labelled: &[bool], scores: &[f64], order: &[usize]) -> PointCurves {
    let positives = labelled.iter().filter(|labelled| **labelled).count() as f64;
    let negatives = labelled.len() as f64 - positives;
    if positives == 0.0 || negatives == 0.0 {
        return PointCurves {
            auc_roc: f64::NAN,
            auc_pr: f64::NAN,
            best_f1: f64::NAN,
        };
    }
    let (mut auc_roc, mut auc_pr, mut best_f1) = (0.0, 0.0, 0.0_f64);
    let (mut found, mut last_found, mut last_false) = (0.0, 0.0, 0.0);
    for (rank, at) in order.iter().enumerate() {
        found += f64::from(u8::from(labelled[*at]));
        // One threshold takes all samples of the same score.
        #[expect(clippy::float_cmp, reason = "only equal scores are one threshold")]
        let goes_on = order
            .get(rank + 1)
            .is_some_and(|next| scores[*next] == scores[*at]);
        if goes_on {
            continue;
        }
        let taken = (rank + 1) as f64;
        let wrong = taken - found;
        auc_roc += (wrong - last_false) / negatives * (found + last_found) / positives / 2.0;
        auc_pr += (found - last_found) / positives * (found / taken);
        best_f1 = best_f1.max(2.0 * found / (taken + positives));
        (last_found, last_false) = (found, wrong);
    }
    PointCurves {
        auc_roc,
        auc_pr,
        best_f1,
    }
}

/// Ranks of the slices: `SLICES` steps from the first sample to the last.
fn slice_ranks(samples: usize) -> impl Iterator<Item = usize> {
    let step = (samples - 1) as f64 / (SLICES - 1) as f64;
    (0..SLICES).map(move |slice| {
        if slice == SLICES - 1 {
            samples - 1
        } else {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a rank below the number of samples, rounded down on purpose"
            )]
            let rank = (slice as f64 * step) as usize;
            rank
        }
    })
}

/// Sums of the first `counts[i]` values.
fn sums_at(values: impl Iterator<Item = f64>, counts: &[usize]) -> Vec<f64> {
    let sums: Vec<f64> = std::iter::once(0.0)
        .chain(values.scan(0.0, |sum, value| {
            *sum += value;
            Some(*sum)
        }))
        .collect();
    counts.iter().map(|count| sums[*count]).collect()
}

fn distances(labelled: &[bool]) -> [Vec<usize>; 2] {
    let samples = labelled.len();
    let walk = |positions: &mut dyn Iterator<Item = usize>| {
        let mut distances = vec![samples; samples];
        let mut last: Option<usize> = None;
        for at in positions {
            if labelled[at] {
                last = Some(at);
            }
            if let Some(last) = last {
                distances[at] = last.abs_diff(at);
            }
        }
        distances
    };
    [walk(&mut (0..samples).rev()), walk(&mut (0..samples))]
}

pub(super) fn finite(mut scores: Vec<f64>) -> Vec<f64> {
    let good = || scores.iter().copied().filter(|score| score.is_finite());
    let least = good().reduce(f64::min).unwrap_or(0.0);
    let greatest = good().reduce(f64::max).unwrap_or(0.0);
    for score in &mut scores {
        if !score.is_finite() {
            *score = if *score == f64::INFINITY { greatest } else { least };
        }
    }
    scores
}

fn descending(scores: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    // Stable, and −0 equals 0; finite scores always compare.
    order.sort_by(|a, b| {
        scores[*b]
            .partial_cmp(&scores[*a])
            .unwrap_or(std::cmp::Ordering::Equal)
    });
    order
}
