//! What real metrics do to a detector, one claim for each: `docs/detection.md`, "Bad input", says the same in words.

#![expect(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

use std::sync::Arc;
use std::time::Duration;

use theriac_model::arm::Arm;
use theriac_model::detector::{Detector, DetectorError, FitOptions, Scorer, WARM_UP_ROWS};
use theriac_model::feature::FeatureSchema;
use theriac_model::ridge::FULL_CHANNELS_MAX;
use theriac_model::sample::Sample;
use theriac_model::series::Series;
use theriac_model::threshold::{AlarmState, Verdict};

const STEP: Duration = Duration::from_mins(1);
const CHANNELS: usize = 6;

/// Uniform numbers from 0 to 1 (numerical recipes' generator).
fn noise(seed: u32) -> impl FnMut() -> f32 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 16_777_216.0
    }
}

/// Channels that remember: `x_t = 0.8 x_{t−1} + 0.2 u`.
fn calm(rows: usize, channels: usize, seed: u32) -> Vec<f32> {
    let mut next = noise(seed);
    let mut values = vec![0.5; channels];
    for t in 1..rows {
        for c in 0..channels {
            values.push(0.8 * values[(t - 1) * channels + c] + 0.2 * next());
        }
    }
    values
}

fn series(channels: usize, values: Vec<f32>) -> Series {
    Series::new(channels, values).unwrap()
}

fn fit(channels: usize, values: Vec<f32>) -> Detector {
    let schema = FeatureSchema::recorded("t", channels);
    // One false alarm in fifty days: what is asked here is whether the flaw raises one, not whether noise does.
    let options = FitOptions {
        false_alarms_per_day: 0.02,
        ..FitOptions::new(STEP)
    };
    Detector::fit(&schema, &series(channels, values), &options).unwrap()
}

fn detector() -> Detector {
    fit(CHANNELS, calm(5000, CHANNELS, 1))
}

/// Rows at which an alarm begins, with the times `at_ms` of the rows, and whether one is on at the end.
fn raised_at(detector: Detector, values: &[f32], at_ms: impl Fn(usize) -> u64) -> (Vec<usize>, bool) {
    let channels = detector.schema().channels();
    let mut alarm = AlarmState::new(detector.threshold()).with_step(STEP);
    let mut scorer = Scorer::new(Arc::new(detector));
    let mut raised = Vec::new();
    for (t, row) in values.chunks_exact(channels).enumerate() {
        let scored = scorer.push(&Sample {
            at_ms: at_ms(t),
            values: row.to_vec(),
        });
        if alarm.push(scored.score) == Verdict::Raised {
            raised.push(t);
        }
    }
    (raised, alarm.active())
}

fn every_minute(t: usize) -> u64 {
    1_000_000 + 60_000 * t as u64
}

/// Overwrites one channel in some rows.
fn set(values: &mut [f32], channel: usize, rows: std::ops::Range<usize>, value: impl Fn(usize) -> f32) {
    for t in rows {
        values[t * CHANNELS + channel] = value(t);
    }
}

#[test]
fn constant_channel_is_quiet_until_it_moves() {
    let mut train = calm(5000, CHANNELS, 1);
    set(&mut train, 2, 0..5000, |_| 0.3);
    let mut test = calm(1000, CHANNELS, 2);
    set(&mut test, 2, 0..1000, |_| 0.3);
    let (raised, _) = raised_at(fit(CHANNELS, train.clone()), &test, every_minute);
    assert_eq!(raised, [0; 0], "nothing happened");
    set(&mut test, 2, 600..1000, |_| 0.6);
    let (raised, _) = raised_at(fit(CHANNELS, train), &test, every_minute);
    assert_eq!(raised.len(), 1, "{raised:?}");
    assert!((600..605).contains(&raised[0]));
}

/// Nothing ever moved: there is no residual to measure by, so a floor's change is the measure.
#[test]
fn history_of_constants_has_a_threshold_and_alarms_at_a_floor_but_not_at_rounding() {
    let constant = |rows: usize| vec![0.5; rows * CHANNELS];
    let detector = fit(CHANNELS, constant(5000));
    assert_eq!(detector.threshold().level().to_bits(), 1.0_f32.to_bits());
    let jitter: Vec<f32> = constant(1000)
        .iter()
        .enumerate()
        .map(|(i, v)| v + [0.0, 1e-6, -1e-6][i % 3])
        .collect();
    for quiet in [constant(1000), jitter] {
        let scores = detector.score_series(&series(CHANNELS, quiet.clone())).unwrap();
        assert!(scores.iter().all(|s| *s < 0.05), "{scores:?}");
        let (raised, _) = raised_at(detector.clone(), &quiet, every_minute);
        assert_eq!(raised, [0; 0]);
    }
    // The floor of a recorded channel is 0.02.
    let mut moved = constant(1000);
    set(&mut moved, 2, 600..1000, |_| 0.52);
    let (raised, _) = raised_at(detector.clone(), &moved, every_minute);
    assert_eq!(raised.len(), 1, "{raised:?}");
    assert!((600..605).contains(&raised[0]));
    let highest = detector.score_series(&series(CHANNELS, moved)).unwrap();
    assert!(highest.iter().all(|s| *s < 100.0), "a score that people can read");
}

#[test]
fn channel_that_vanishes_and_comes_back_raises_nothing() {
    let mut test = calm(1000, CHANNELS, 2);
    set(&mut test, 1, 300..600, |_| f32::NAN);
    let (raised, _) = raised_at(detector(), &test, every_minute);
    assert_eq!(raised, [0; 0]);
}

#[test]
fn channel_that_appears_after_the_fit_is_not_looked_at() {
    let mut train = calm(5000, CHANNELS, 1);
    set(&mut train, 4, 0..5000, |_| f32::NAN);
    let mut test = calm(1000, CHANNELS, 2);
    set(&mut test, 4, 0..500, |_| f32::NAN);
    set(&mut test, 4, 500..1000, |t| (t % 7) as f32);
    let (raised, _) = raised_at(fit(CHANNELS, train), &test, every_minute);
    assert_eq!(raised, [0; 0], "a channel without history says nothing");
}

/// Collectors turn counters into rates and a reset into a missing value; a raw counter in a file is what this is about.
#[test]
fn counter_that_resets_is_one_alarm_at_most_and_passes() {
    let counter = |t: usize| (t % 400) as f32 / 400.0;
    let mut train = calm(5000, CHANNELS, 1);
    set(&mut train, 0, 0..5000, counter);
    let mut test = calm(1000, CHANNELS, 2);
    set(&mut test, 0, 0..1000, counter);
    let (raised, on) = raised_at(fit(CHANNELS, train), &test, every_minute);
    assert!(raised.len() <= 2, "two resets, alarms at {raised:?}");
    assert!(!on, "still on 200 rows after the last reset");
}

#[test]
fn clock_that_jumps_either_way_raises_nothing() {
    let test = calm(1000, CHANNELS, 2);
    for jump in [-3_600_000_i64, 3_600_000, 86_400_000 * 400] {
        let at = |t: usize| {
            let at = every_minute(t) + 86_400_000;
            if t < 500 {
                at
            } else {
                at.saturating_add_signed(jump)
            }
        };
        let (raised, _) = raised_at(detector(), &test, at);
        assert_eq!(raised, [0; 0], "jump of {jump} ms");
    }
    let (raised, _) = raised_at(detector(), &test, |_| 7);
    assert_eq!(raised, [0; 0], "a clock that stands still");
}

/// The rows on either side of a gap have nothing to do with each other.
#[test]
fn gap_costs_ten_scores_and_raises_nothing() {
    let mut test = calm(1000, CHANNELS, 2);
    // The level moved while nobody looked, within what the history knows.
    for row in test.chunks_exact_mut(CHANNELS).skip(500).take(3) {
        for v in &mut *row {
            *v = (*v + 0.15).min(0.9);
        }
    }
    let detector = Arc::new(detector());
    let at = |t: usize| every_minute(t) + if t < 500 { 0 } else { 7_200_000 };
    let mut scorer = Scorer::new(Arc::clone(&detector));
    let mut without = Vec::new();
    for (t, row) in test.chunks_exact(CHANNELS).enumerate() {
        let scored = scorer.push(&Sample {
            at_ms: at(t),
            values: row.to_vec(),
        });
        if scored.score.is_nan() && t >= WARM_UP_ROWS {
            without.push(t);
        }
    }
    assert_eq!(without, (500..510).collect::<Vec<_>>());
    let (raised, _) = raised_at(Arc::unwrap_or_clone(detector), &test, at);
    assert_eq!(raised, [0; 0]);
}

#[test]
fn batch_and_stream_treat_a_gap_alike() {
    let test = calm(300, CHANNELS, 2);
    let times: Vec<u64> = (0..300)
        .map(|t| every_minute(t) + if t < 150 { 0 } else { 7_200_000 })
        .collect();
    let detector = Arc::new(detector());
    let batch = detector
        .score_series(&series(CHANNELS, test.clone()).with_times(times.clone()).unwrap())
        .unwrap();
    let mut scorer = Scorer::new(detector);
    for (t, row) in test.chunks_exact(CHANNELS).enumerate() {
        let scored = scorer.push(&Sample {
            at_ms: times[t],
            values: row.to_vec(),
        });
        if t >= WARM_UP_ROWS {
            assert_eq!(scored.score.is_nan(), batch[t].is_nan(), "row {t}");
            assert!(scored.score.is_nan() || (scored.score - batch[t]).abs() < 1e-4 * batch[t].max(1.0));
        }
    }
}

#[test]
fn flood_of_missing_values_is_blindness_and_not_calm() {
    let mut test = calm(1000, CHANNELS, 2);
    test[400 * CHANNELS..700 * CHANNELS].fill(f32::NAN);
    let detector = Arc::new(detector());
    let mut scorer = Scorer::new(Arc::clone(&detector));
    let scores: Vec<f32> = test
        .chunks_exact(CHANNELS)
        .map(|row| {
            let sample = Sample {
                at_ms: 0,
                values: row.to_vec(),
            };
            scorer.push(&sample).score
        })
        .collect();
    assert!(
        scores[400..410].iter().all(|s| s.is_finite()),
        "held for ten rows"
    );
    assert!(scores[411..700].iter().all(|s| s.is_nan()), "then blind");
    assert!(scores[711..].iter().all(|s| s.is_finite()), "then back");
    assert_eq!(scorer.missing(), 300 * CHANNELS as u64);
    let (raised, _) = raised_at(Arc::unwrap_or_clone(detector), &test, every_minute);
    assert_eq!(raised, [0; 0]);
}

#[test]
fn history_that_is_mostly_missing_still_fits() {
    let mut train = calm(5000, CHANNELS, 1);
    let mut next = noise(5);
    for v in &mut train {
        if next() < 0.6 {
            *v = f32::NAN;
        }
    }
    let scores = fit(CHANNELS, train)
        .score_series(&series(CHANNELS, calm(500, CHANNELS, 2)))
        .unwrap();
    assert!(scores.iter().all(|s| s.is_finite()));
}

/// A change that stays: one alarm for as long as it is there, a question after a day, and calm after a fit on the new rows.
#[test]
fn step_change_is_one_alarm_then_a_question_then_the_new_normal() {
    let detector = detector();
    let mut test = calm(4000, CHANNELS, 2);
    let shift = |values: &mut [f32], from: usize| {
        let moved = values.chunks_exact_mut(CHANNELS).skip(from);
        moved.for_each(|row| row[3] = row[3] * 3.0 + 1.0);
    };
    shift(&mut test, 500);
    let mut alarm = AlarmState::new(detector.threshold()).with_step(STEP);
    let mut scorer = Scorer::new(Arc::new(detector));
    let (mut raised, mut asked) = (Vec::new(), None);
    for (t, row) in test.chunks_exact(CHANNELS).enumerate() {
        let sample = Sample {
            at_ms: every_minute(t),
            values: row.to_vec(),
        };
        if alarm.push(scorer.push(&sample).score) == Verdict::Raised {
            raised.push(t);
        }
        if asked.is_none() && alarm.new_normal() {
            asked = Some(t);
        }
    }
    assert_eq!(raised.len(), 1, "{raised:?}");
    assert!((500..505).contains(&raised[0]));
    assert_eq!(asked, Some(raised[0] + 1440));

    let refitted = fit(CHANNELS, test[500 * CHANNELS..].to_vec());
    let mut later = calm(1000, CHANNELS, 3);
    shift(&mut later, 0);
    let (raised, _) = raised_at(refitted, &later, every_minute);
    assert_eq!(raised, [0; 0]);
}

#[test]
fn thousand_channels_fit_score_and_are_kept_on_own_lags() {
    const MANY: usize = 1000;
    const { assert!(MANY > FULL_CHANNELS_MAX) };
    let detector = fit(MANY, calm(300, MANY, 1));
    let mut test = calm(80, MANY, 2);
    for row in test.chunks_exact_mut(MANY).skip(60) {
        row[..300].iter_mut().for_each(|v| *v += 1.0);
    }
    let scores = detector.score_series(&series(MANY, test)).unwrap();
    let quiet = scores[20..60].iter().copied().fold(0.0, f32::max);
    assert!(scores[61] > 3.0 * quiet, "{} after {quiet}", scores[61]);
    let dir = tempfile::tempdir().unwrap();
    detector.save(dir.path(), "m").unwrap();
    assert_eq!(Detector::load(dir.path(), "m").unwrap(), detector);
    let bytes = std::fs::metadata(dir.path().join("m.safetensors")).unwrap().len();
    assert!(bytes < 400_000, "{bytes} bytes: no weights on all lags");
}

#[test]
fn one_row_is_too_few_to_fit_and_gets_no_score() {
    let schema = FeatureSchema::recorded("t", CHANNELS);
    for arm in Arm::ALL {
        let options = FitOptions {
            arm,
            ..FitOptions::new(STEP)
        };
        let one = series(CHANNELS, calm(1, CHANNELS, 1));
        let error = Detector::fit(&schema, &one, &options).unwrap_err();
        assert!(matches!(error, DetectorError::TooFewRows { found: 1, .. }));
    }
    let scores = detector()
        .score_series(&series(CHANNELS, calm(1, CHANNELS, 1)))
        .unwrap();
    assert!(scores.len() == 1 && scores[0].is_nan());
}

/// No arm looks ahead: whatever comes after a row, its score has the same bits.
#[test]
fn no_arm_looks_ahead() {
    let schema = FeatureSchema::recorded("t", CHANNELS);
    let train = series(CHANNELS, calm(1000, CHANNELS, 1));
    let test = calm(200, CHANNELS, 2);
    for arm in Arm::ALL {
        let options = FitOptions {
            arm,
            ..FitOptions::new(STEP)
        };
        let detector = Detector::fit(&schema, &train, &options).unwrap();
        let whole = detector.score_series(&series(CHANNELS, test.clone())).unwrap();
        for cut in [11, 100, 199] {
            let mut changed = test.clone();
            let mut next = noise(u32::try_from(cut).unwrap());
            changed[cut * CHANNELS..]
                .iter_mut()
                .for_each(|v| *v = 1000.0 * next());
            let scores = detector.score_series(&series(CHANNELS, changed)).unwrap();
            assert!(
                (0..cut).all(|t| scores[t].to_bits() == whole[t].to_bits()),
                "{arm}: a score before row {cut} moved"
            );
            assert_ne!(scores[199].to_bits(), whole[199].to_bits());
        }
    }
}
