//! What the rules promise, over random rows and against recorded reference values.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a failed helper is a failed test"
)]

use proptest::prelude::*;
use theriac_aggregator::robust::{
    Combined, MatrixRows, Options, PayloadRows, Row, Rows as _, RuleError, RuleName, rule,
};
use theriac_protocol::compress::{encode_f32, encode_int8};
use theriac_protocol::message::Encoding;

fn combine(name: RuleName, f: usize, rows: &[Vec<f32>]) -> Combined<f32> {
    rule(name, f, &Options::default())
        .unwrap()
        .combine(&MatrixRows::from_rows(rows).unwrap())
        .unwrap()
}

fn plain(name: RuleName, f: usize) -> Box<dyn theriac_aggregator::robust::Rule> {
    rule(name, f, &Options::default()).unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// `n` rows of `d` values and an f below half of n.
fn rounds() -> impl Strategy<Value = (Vec<Vec<f32>>, usize)> {
    (1_usize..24, 1_usize..40).prop_flat_map(|(n, d)| {
        let rows = prop::collection::vec(prop::collection::vec(-1e3_f32..1e3, d), n);
        (rows, 0..n.div_ceil(2))
    })
}

proptest! {
    #[test]
    fn order_of_rows_does_not_matter((rows, f) in rounds(), seed in any::<u64>()) {
        let mut shuffled = rows.clone();
        let n = shuffled.len();
        for i in (1..n).rev() {
            shuffled.swap(i, usize::try_from(seed.wrapping_mul(i as u64 + 7) % (i as u64 + 1)).unwrap());
        }
        for name in [RuleName::MEDIAN, RuleName::TRIMMED_MEAN] {
            let (one, two) = (combine(name, f, &rows), combine(name, f, &shuffled));
            prop_assert_eq!(bits(&one.values), bits(&two.values), "{}", name);
        }
        // The mean sums in row order, in f64: equal up to the last bit of an f32.
        for (a, b) in combine(RuleName::MEAN, 0, &rows).values.iter().zip(combine(RuleName::MEAN, 0, &shuffled).values) {
            prop_assert!((a - b).abs() <= a.abs() * 2.0 * f32::EPSILON);
        }
    }

    #[test]
    fn moving_every_row_moves_the_result((rows, f) in rounds(), shift in -100_i16..100) {
        // Whole numbers, so that the shift itself is exact.
        let rows: Vec<Vec<f32>> = rows.iter().map(|row| row.iter().map(|v| v.round()).collect()).collect();
        let moved: Vec<Vec<f32>> =
            rows.iter().map(|row| row.iter().map(|v| v + f32::from(shift)).collect()).collect();
        for name in [RuleName::MEAN, RuleName::MEDIAN, RuleName::TRIMMED_MEAN] {
            for (a, b) in combine(name, f, &rows).values.iter().zip(combine(name, f, &moved).values) {
                prop_assert!((a + f32::from(shift) - b).abs() < 1e-3, "{}: {} {}", name, a, b);
            }
        }
    }

    #[test]
    fn hostile_minority_cannot_leave_the_honest_range((rows, f) in rounds(), hostile in prop::collection::vec(prop_oneof![
        Just(f32::MAX), Just(f32::MIN), Just(1e30_f32), Just(-1e30), Just(0.0), -1e6_f32..1e6
    ], 1..40)) {
        let honest = &rows[f..];
        let mut all = honest.to_vec();
        for row in 0..f {
            all.insert(row, (0..rows[0].len()).map(|i| hostile[(i + row) % hostile.len()]).collect());
        }
        for name in [RuleName::MEDIAN, RuleName::TRIMMED_MEAN] {
            for (column, value) in combine(name, f, &all).values.iter().enumerate() {
                let low = honest.iter().map(|row| row[column]).fold(f32::INFINITY, f32::min);
                let high = honest.iter().map(|row| row[column]).fold(f32::NEG_INFINITY, f32::max);
                prop_assert!((low..=high).contains(value), "{}: {} is outside {}..={}", name, value, low, high);
            }
        }
    }

    #[test]
    fn identical_rows_come_back((row, n) in (prop::collection::vec(-1e3_f32..1e3, 1..30), 1_usize..300)) {
        let rows = vec![row.clone(); n];
        for name in [RuleName::MEDIAN, RuleName::TRIMMED_MEAN] {
            let combined = combine(name, (n - 1) / 2, &rows);
            for (value, expected) in combined.values.iter().zip(&row) {
                prop_assert!((value - expected).abs() <= expected.abs() * f32::EPSILON);
            }
            prop_assert!(combined.evidence.iter().all(|row| row.trimmed_share == 0.0));
        }
    }
}

#[test]
fn one_thread_and_two_give_the_same_bits() {
    // Several chunks, the last one ragged; enough rows for the network, and too many for it.
    for (n, d) in [(31, 3 * theriac_aggregator::robust::CHUNK + 21), (300, 4_100)] {
        let mut state = 1_u32;
        let rows: Vec<Vec<f32>> = (0..n)
            .map(|_| {
                let mut next = || {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 8) as f32 / 1e6 - 8.0
                };
                (0..d).map(|_| next()).collect()
            })
            .collect();
        let rows = MatrixRows::from_rows(&rows).unwrap();
        for name in [RuleName::MEAN, RuleName::MEDIAN, RuleName::TRIMMED_MEAN] {
            let on = |threads| {
                let pool = rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .build()
                    .unwrap();
                pool.install(|| rule(name, 4, &Options::default()).unwrap().combine(&rows))
                    .unwrap()
            };
            let (one, two) = (on(1), on(2));
            assert_eq!(bits(&one.values), bits(&two.values), "{name}");
            assert_eq!(one.evidence, two.evidence, "{name}");
        }
    }
}

#[test]
fn network_and_plain_sort_agree() {
    let columns = 40;
    let row = |seed: u32| -> Vec<f32> {
        (0..columns)
            .map(|i: u32| (seed.wrapping_mul(2_654_435_761).wrapping_add(i * 977) >> 8) as f32)
            .collect()
    };
    let rows: Vec<Vec<f32>> = (0..257).map(row).collect();
    let combined = combine(RuleName::TRIMMED_MEAN, 60, &rows);
    for (column, value) in combined.values.iter().enumerate() {
        let mut values: Vec<f32> = rows.iter().map(|row| row[column]).collect();
        values.sort_by(f32::total_cmp);
        let kept = &values[60..257 - 60];
        let mean: f64 = kept.iter().map(|v| f64::from(*v)).sum::<f64>() / kept.len() as f64;
        assert!((f64::from(*value) - mean).abs() <= mean * 1e-6);
    }
}

#[test]
fn stored_payloads_and_plain_rows_give_the_same_bits() {
    let rows = [[1.0_f32, -2.0, 3.5], [0.5, 2.0, -3.0], [9.0, 9.0, 9.0]];
    let payloads = rows
        .iter()
        .map(|row| Row {
            encoding: Encoding::F32,
            payload: encode_f32(row).into(),
        })
        .collect();
    let payloads = PayloadRows::new(payloads, 3).unwrap();
    let combined = rule(RuleName::TRIMMED_MEAN, 1, &Options::default())
        .unwrap()
        .combine(&payloads)
        .unwrap();
    let plain: Vec<Vec<f32>> = rows.iter().map(|row| row.to_vec()).collect();
    assert_eq!(combined, combine(RuleName::TRIMMED_MEAN, 1, &plain));
    let (encoding, payload) = encode_int8(&rows[0], || 0.5);
    let int8 = PayloadRows::new(
        vec![Row {
            encoding,
            payload: payload.into(),
        }],
        3,
    )
    .unwrap();
    let mut read = [0.0; 3];
    int8.read(0, 0, &mut read);
    assert!(
        read.iter()
            .zip(rows[0])
            .all(|(got, sent)| (got - sent).abs() < 3.5 / 127.0)
    );
}

#[test]
fn evidence_names_the_row_that_was_cut_away() {
    let honest = vec![vec![1.0_f32; 100]; 4];
    let mut rows = honest;
    rows.push(vec![-50.0; 100]);
    let combined = combine(RuleName::TRIMMED_MEAN, 1, &rows);
    let liar = combined.evidence[4];
    assert!((liar.trimmed_share - 1.0).abs() < 1e-12 && (liar.norm - 500.0).abs() < 1e-9);
    assert!((liar.distance - 510.0).abs() < 1e-9, "{liar:?}");
    assert!(
        combined.evidence[..4]
            .iter()
            .all(|row| row.trimmed_share == 0.0 && row.distance == 0.0)
    );
}

#[test]
fn impossible_rounds_are_errors() {
    let empty = MatrixRows::<f32>::from_rows::<Vec<f32>>(&[]).unwrap();
    let narrow = MatrixRows::from_rows(&[Vec::<f32>::new()]).unwrap();
    let pair = MatrixRows::from_rows(&[[1.0_f32], [2.0]]).unwrap();
    for name in [RuleName::MEAN, RuleName::MEDIAN, RuleName::TRIMMED_MEAN] {
        assert_eq!(plain(name, 0).combine(&empty), Err(RuleError::NoRows), "{name}");
        assert_eq!(
            plain(name, 0).combine(&narrow),
            Err(RuleError::NoColumns),
            "{name}"
        );
    }
    for name in [RuleName::MEDIAN, RuleName::TRIMMED_MEAN] {
        assert_eq!(
            plain(name, 1).combine(&pair),
            Err(RuleError::TooManyByzantine { f: 1, n: 2 }),
            "{name}"
        );
        assert_eq!(
            plain(name, usize::MAX).combine(&pair).unwrap_err(),
            RuleError::TooManyByzantine { f: usize::MAX, n: 2 }
        );
    }
    let ragged = MatrixRows::from_rows(&[vec![1.0_f32], vec![1.0, 2.0]]);
    assert_eq!(
        ragged.unwrap_err(),
        RuleError::Ragged {
            row: 1,
            expected: 1,
            found: 2
        }
    );
    let short = Row {
        encoding: Encoding::F32,
        payload: vec![0; 7].into(),
    };
    assert!(matches!(
        PayloadRows::new(vec![short], 2),
        Err(RuleError::Ragged {
            row: 0,
            expected: 2,
            ..
        })
    ));
}
