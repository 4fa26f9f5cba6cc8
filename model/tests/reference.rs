//! The detector against a numpy program that computes the same formulae in `f64`.

#![expect(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use theriac_model::detector::{Detector, FitOptions, Scorer, WARM_UP_ROWS};
use theriac_model::feature::FeatureSchema;
use theriac_model::io::read_series;
use theriac_model::sample::Sample;
use theriac_model::series::Series;

const CHANNELS: usize = 7;

/// The same rows as the reference program makes: a linear congruential generator (numerical recipes' constants), its
/// upper 24 bits as a uniform `u`, and `x_{t,c} = ½ x_{t−1,c} + ¼ x_{t−1,c+1} + ¼ u`, all in `f32`, from ½.
fn rows(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut values: Vec<f32> = Vec::new();
    for t in 0..count {
        for c in 0..CHANNELS {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let u = (state >> 8) as f32 / 16_777_216.0;
            let before = |c: usize| {
                if t == 0 {
                    0.5
                } else {
                    values[(t - 1) * CHANNELS + c % CHANNELS]
                }
            };
            values.push(0.5 * before(c) + 0.25 * before(c + 1) + 0.25 * u);
        }
    }
    values
}

fn series(values: Vec<f32>) -> Series {
    Series::new(CHANNELS, values).unwrap()
}

/// 200 rows, channel 3 half a unit higher in rows 120 to 129.
fn disturbed() -> Vec<f32> {
    let mut values = rows(200, 2);
    (120..130).for_each(|t| values[t * CHANNELS + 3] += 0.5);
    values
}

fn detector() -> Detector {
    let schema = FeatureSchema::recorded("reference", CHANNELS);
    Detector::fit(
        &schema,
        &series(rows(600, 1)),
        &FitOptions::new(Duration::from_mins(1)),
    )
    .unwrap()
}

/// Computed by the reference implementation of the own-lag + full ridge detector (numpy 2, `f64`; normaliser, both ridges
/// with λ = 10, heads with half-lives 3 and 12 rows): fitted on 600 rows of seed 1, scores of the rows of `disturbed`.
#[test]
fn scores_are_those_of_the_reference_implementation() {
    let scores = detector().score_series(&series(disturbed())).unwrap();
    let expected = [
        (0, 2.921_362),
        (10, 2.921_362),
        (11, 2.781_117),
        (50, 1.534_124),
        (119, 1.636_914),
        (120, 2.483_562),
        (121, 2.531_276),
        (125, 3.566_098),
        (130, 4.297_977),
        (140, 2.361_180),
        (199, 1.564_862),
    ];
    for (row, expected) in expected {
        let found = f64::from(scores[row]);
        assert!(
            (found - expected).abs() < 2e-4 * expected.max(1.0),
            "row {row}: {found}, reference {expected}"
        );
    }
}

#[test]
fn streaming_gives_the_scores_of_the_batch() {
    let values = disturbed();
    let detector = Arc::new(detector());
    let batch = detector.score_series(&series(values.clone())).unwrap();
    let mut scorer = Scorer::new(Arc::clone(&detector));
    for (t, row) in values.chunks_exact(CHANNELS).enumerate() {
        let scored = scorer.push(&Sample {
            at_ms: t as u64,
            values: row.to_vec(),
        });
        assert_eq!(scored.score.is_nan(), t < WARM_UP_ROWS, "row {t}");
        if t >= WARM_UP_ROWS {
            assert!(
                (scored.score - batch[t]).abs() <= 1e-5 * batch[t].max(1.0),
                "row {t}"
            );
        }
    }
}

/// Whatever comes after a row, its score has the same bits.
#[test]
fn scores_do_not_look_ahead() {
    let detector = detector();
    let values = disturbed();
    let whole = detector.score_series(&series(values.clone())).unwrap();
    for cut in [11, 60, 125, 199] {
        let mut changed = values.clone();
        let noise = rows(200, 99);
        for (value, noise) in changed.iter_mut().zip(noise).skip(cut * CHANNELS) {
            *value = noise * 1000.0;
        }
        let scores = detector.score_series(&series(changed)).unwrap();
        assert!(
            (0..cut).all(|t| scores[t].to_bits() == whole[t].to_bits()),
            "a score before row {cut} moved"
        );
        assert_ne!(scores[199].to_bits(), whole[199].to_bits());
    }
}

#[test]
fn the_disturbed_channel_gets_the_blame_and_an_alarm() {
    let detector = Arc::new(detector());
    let mut scorer = Scorer::new(Arc::clone(&detector));
    let mut alarm = theriac_model::threshold::AlarmState::new(detector.threshold());
    let mut raised = Vec::new();
    for (t, row) in disturbed().chunks_exact(CHANNELS).enumerate() {
        let scored = scorer.push(&Sample {
            at_ms: 0,
            values: row.to_vec(),
        });
        if alarm.push(scored.score) == theriac_model::threshold::Verdict::Raised {
            raised.push(t);
        }
        if t == 120 {
            let top = scored.contributions.iter().copied().fold(0.0, f32::max);
            assert_eq!(
                scored.contributions[3].to_bits(),
                top.to_bits(),
                "{:?}",
                scored.contributions
            );
        }
    }
    assert_eq!(raised.len(), 1, "alarms at {raised:?}");
    assert!((120..125).contains(&raised[0]), "raised at {}", raised[0]);
}

/// The same program on one recorded server: fitted on the last 2 000 rows of its train part, scores of the first 2 000 rows of its
/// test part.
#[test]
fn scores_of_a_recorded_server_are_those_of_the_reference_implementation() {
    let data = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/data/smd"));
    let (train, test) = (
        data.join("machine-1-6.train.npy.gz"),
        data.join("machine-1-6.test.npy.gz"),
    );
    if !train.exists() {
        println!("left out: no recorded servers in {}", data.display());
        return;
    }
    let (train, test) = (
        read_series(&train).unwrap().tail(2000),
        read_series(&test).unwrap().slice(0..2000),
    );
    let schema = FeatureSchema::recorded("recorded", train.channels());
    let detector = Detector::fit(&schema, &train, &FitOptions::new(Duration::from_mins(1))).unwrap();
    let scores = detector.score_series(&test).unwrap();
    let expected = [
        (0, 0.4540),
        (500, 0.6436),
        (1000, 0.5179),
        (1500, 0.6923),
        (1999, 0.8279),
        (656, 4.6784),
    ];
    for (row, expected) in expected {
        let found = f64::from(scores[row]);
        assert!(
            (found - expected).abs() < 2e-3 * expected,
            "row {row}: {found}, reference {expected}"
        );
    }
}
