//! Choosing a detector for one site without labels, by faults injected into the tail of its history.
//!
//! The candidates are fitted on the first four fifths of the train part. Into the last fifth come faults of six kinds, a new one about every 250
//! rows; the candidate that ranks their rows best is taken. On recorded servers this chooses badly (`docs/experiments.md`): injected faults are
//! sudden and large next to real ones, and every candidate finds them. It is here so that anybody can measure that on another fleet.

use rand::seq::index::sample;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha20Rng;
use theriac_model::arm::Arm;
use theriac_model::detector::{Detector, DetectorError, FitOptions};
use theriac_model::feature::FeatureSchema;
use theriac_model::series::Series;

use super::data::Recording;
use super::measure::average_precision;

/// Among these is chosen; the first where none is better.
pub const CANDIDATES: [Arm; 3] = [Arm::OwnFull, Arm::Own, Arm::Full];

/// Draws of faults.
const DRAWS: u64 = 3;
/// Rows from the start of one fault to the next, about.
const ROWS_A_FAULT: usize = 250;
/// Rows before the first fault.
const LEAD_ROWS: usize = 60;
/// A fault lasts so many rows.
const FAULT_ROWS: std::ops::Range<usize> = 10..90;
/// A channel's deviation is at least this, in units of values scaled to 0..1.
const DEVIATION_MIN: f32 = 0.02;

/// What is injected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    LevelShift,
    SpikeBurst,
    Freeze,
    ChannelDrop,
    SlowDrift,
    /// The channels' own rows in another order: each is as usual, together they are not.
    CorrelationBreak,
}

const KINDS: [Kind; 6] = [
    Kind::LevelShift,
    Kind::SpikeBurst,
    Kind::Freeze,
    Kind::ChannelDrop,
    Kind::SlowDrift,
    Kind::CorrelationBreak,
];

/// The candidate that finds injected faults best on this recording's train part. Labels are not looked at.
///
/// # Errors
/// [`DetectorError`] when a candidate cannot be fitted.
pub fn choose(recording: &Recording) -> Result<Arm, DetectorError> {
    let train = &recording.train;
    let cut = train.rows() - train.rows() / 5;
    let (fitted, tail) = (train.slice(0..cut), train.slice(cut..train.rows()));
    let schema = FeatureSchema::recorded("recorded-v1", train.channels());
    let deviations = deviations(&fitted);
    let mut best: Option<(Arm, f64)> = None;
    for arm in CANDIDATES {
        let options = FitOptions {
            arm,
            ..FitOptions::new(recording.step)
        };
        let detector = Detector::fit(&schema, &fitted, &options)?;
        let mut found = 0.0;
        for seed in 0..DRAWS {
            let (rows, labels) = inject(&tail, &deviations, seed)?;
            found += average_precision(&labels, &detector.score_series(&rows)?).unwrap_or(0.0);
        }
        if best.is_none_or(|(_, other)| found > other) {
            best = Some((arm, found));
        }
    }
    Ok(best.map_or(CANDIDATES[0], |(arm, _)| arm))
}

/// The rows with faults, and which rows have one.
fn inject(tail: &Series, deviations: &[f32], seed: u64) -> Result<(Series, Vec<bool>), DetectorError> {
    let channels = tail.channels();
    let mut rng = ChaCha20Rng::seed_from_u64(seed);
    let mut values = tail.values().to_vec();
    let mut labels = vec![false; tail.rows()];
    let starts = (LEAD_ROWS..tail.rows().saturating_sub(FAULT_ROWS.end)).step_by(ROWS_A_FAULT);
    for (start, kind) in starts.zip(KINDS.into_iter().cycle()) {
        let length = rng.random_range(FAULT_ROWS);
        let touched = rng.random_range(1..=(channels / 3).max(1));
        let shuffled = sample(&mut rng, length, length);
        for channel in sample(&mut rng, channels, touched) {
            let sign = if rng.random() { 1.0 } else { -1.0 };
            let size = sign * rng.random_range(1.5..5.0) * deviations[channel];
            for (row, from) in (0..length).zip(shuffled.iter()) {
                let at = |row: usize| (start + row) * channels + channel;
                let before = tail.values()[at(row)];
                values[at(row)] = match kind {
                    Kind::LevelShift => before + size,
                    Kind::SpikeBurst if rng.random_bool(0.3) => before + 1.5 * size,
                    Kind::SpikeBurst => before,
                    Kind::Freeze => tail.values()[(start - 1) * channels + channel],
                    Kind::ChannelDrop => 0.0,
                    Kind::SlowDrift => before + 1.5 * size * row as f32 / length as f32,
                    Kind::CorrelationBreak => tail.values()[at(from)],
                };
            }
        }
        labels[start..start + length].fill(true);
    }
    Ok((Series::new(channels, values)?, labels))
}

fn deviations(series: &Series) -> Vec<f32> {
    let rows = series.rows().max(1) as f32;
    (0..series.channels())
        .map(|channel| {
            let column = || series.iter_rows().map(|row| row[channel]);
            let mean = column().sum::<f32>() / rows;
            let variance = column().map(|v| (v - mean).powi(2)).sum::<f32>() / rows;
            variance.sqrt().max(DEVIATION_MIN)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn rows(count: usize) -> Series {
        let mut rng = ChaCha20Rng::seed_from_u64(3);
        let values = (0..count * 4).map(|_| rng.random_range(0.0..1.0)).collect();
        Series::new(4, values).unwrap()
    }

    #[test]
    fn faults_lie_where_the_labels_say_and_repeat_with_the_seed() {
        let tail = rows(2000);
        let (faulty, labels) = inject(&tail, &[0.3; 4], 7).unwrap();
        let starts = labels.windows(2).filter(|pair| !pair[0] && pair[1]).count();
        assert_eq!(starts, 8, "one each 250 rows");
        for (row, label) in labels.iter().enumerate() {
            assert!(*label || faulty.row(row) == tail.row(row), "row {row}");
        }
        assert_eq!(inject(&tail, &[0.3; 4], 7).unwrap().0, faulty);
        assert_ne!(inject(&tail, &[0.3; 4], 8).unwrap().0, faulty);
        let (short, labels) = inject(&rows(20), &[0.3; 4], 7).unwrap();
        assert!(
            short == rows(20) && !labels.contains(&true),
            "no room for a fault"
        );
    }

    #[test]
    fn some_candidate_is_chosen_whatever_the_labels() {
        let recording = |label| Recording {
            name: "a".to_owned(),
            step: Duration::from_mins(1),
            train: rows(3000),
            test: rows(10),
            labels: vec![label; 10],
        };
        let chosen = choose(&recording(true)).unwrap();
        assert!(CANDIDATES.contains(&chosen));
        assert_eq!(choose(&recording(false)).unwrap(), chosen);
    }
}
