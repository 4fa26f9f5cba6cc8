//! What every rule promises, over random rows: order, offset and scale of the rows, copies, a hostile minority, threads.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failed helper is a failed test"
)]

use proptest::prelude::*;
use theriac_aggregator::robust::{
    Base, CHUNK, Combined, Composed, MatrixRows, Options, Rule as _, RuleError, RuleName, Scalar,
};

/// Rules without a length of their own: they move and grow with the rows.
const EQUIVARIANT: &[&str] = &[
    "mean",
    "median",
    "trimmed_mean",
    "meamed",
    "krum",
    "multi_krum",
    "krum_flower",
    "multi_krum_flower",
    "geometric_median_converged",
    "mda",
    "caf",
    "bulyan",
    "nnm+trimmed_mean",
    "nnm+krum",
    "nnm+caf",
    "dedup+nnm+trimmed_mean",
    "dedup+caf",
];
/// Rules that choose rows or sets of rows by a score. Nearest neighbours of each other have the same score, and sets share the pair that is farthest apart,
/// so ties are usual; the first row or set wins, and rounding or another order chooses another.
const CHOOSING: &[&str] = &[
    "krum",
    "multi_krum",
    "krum_flower",
    "multi_krum_flower",
    "mda",
    "bulyan",
    "nnm+krum",
];
/// Rules that look at the zero point, or have a length of their own.
const ANCHORED: &[&str] = &[
    "geometric_median",
    "centered_clipping",
    "centered_clipping_two_calls",
    "arc+nnm+trimmed_mean",
    "clipping+mean",
];
/// Rules that treat the first row as special.
const ORDERED: &[&str] = &["monna", "bucketing_identity+median", "bucketing+trimmed_mean"];

fn options(name: RuleName) -> Options {
    let clips = matches!(
        name.base(),
        Some(Base::CenteredClipping | Base::CenteredClippingTwoCalls)
    );
    Options {
        tau: clips.then_some(0.7),
        clip: name.to_string().starts_with("clipping").then_some(1.5),
        ..Options::default()
    }
}

fn compose(name: &str, f: usize) -> Composed {
    let name: RuleName = name.parse().unwrap();
    Composed::new(name, f, &options(name)).unwrap()
}

fn combine<T: Scalar>(name: &str, f: usize, rows: &[Vec<T>]) -> Combined<T> {
    let combined = compose(name, f).explained(&MatrixRows::from_rows(rows).unwrap());
    combined.unwrap_or_else(|error| panic!("{name}, {} rows, f {f}: {error}", rows.len()))
}

/// Whether the rule takes so many rows; Bulyan takes fewer hostile ones than the rest.
fn takes(name: &str, n: usize, f: usize) -> bool {
    compose(name, f).check(n).is_ok()
}

fn close(name: &str, got: &[f64], want: &[f64], scale: f64) -> Result<(), TestCaseError> {
    for (got, want) in got.iter().zip(want) {
        let tolerance = 1e-6 * scale;
        prop_assert!(
            (got - want).abs() <= tolerance,
            "{}: {} is not {}",
            name,
            got,
            want
        );
    }
    Ok(())
}

/// 7 to 15 rows of 2 to 19 values, and f of up to 3. In one dimension medians are whole intervals, and clipped rows are equal.
fn rounds() -> impl Strategy<Value = (Vec<Vec<f64>>, usize)> {
    (7_usize..16, 2_usize..20).prop_flat_map(|(n, d)| {
        let rows = prop::collection::vec(prop::collection::vec(-2.0_f64..2.0, d), n);
        (rows, 0..4_usize.min(n.div_ceil(2)))
    })
}

/// The mean withstands nobody. Neither does the screen for near-copies by itself: it takes honest rows that are nearly equal
/// for colluders, and lowers f for them.
fn bounded(name: &str) -> bool {
    name != "mean" && !name.starts_with("dedup")
}

fn diameter(rows: &[Vec<f64>]) -> f64 {
    let distance = |a: &[f64], b: &[f64]| {
        a.iter()
            .zip(b)
            .map(|(a, b)| (a - b) * (a - b))
            .sum::<f64>()
            .sqrt()
    };
    let all = rows.iter().flat_map(|a| rows.iter().map(move |b| distance(a, b)));
    all.fold(0.0, f64::max)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn order_of_rows_does_not_matter((rows, f) in rounds(), seed in any::<u64>()) {
        let mut shuffled = rows.clone();
        for i in (1..rows.len()).rev() {
            shuffled.swap(i, usize::try_from(seed.wrapping_mul(i as u64 + 7) % (i as u64 + 1)).unwrap());
        }
        for name in EQUIVARIANT.iter().chain(ANCHORED).filter(|name| takes(name, rows.len(), f)) {
            // The screen keeps the first of near-copies, whichever came first.
            if !name.starts_with("dedup") && !CHOOSING.contains(name) {
                close(name, &combine(name, f, &shuffled).values, &combine(name, f, &rows).values, 1.0)?;
            }
        }
    }

    #[test]
    fn results_move_and_grow_with_the_rows((rows, f) in rounds(), shift in -50.0_f64..50.0, factor in 0.01_f64..100.0) {
        let changed: Vec<Vec<f64>> =
            rows.iter().map(|row| row.iter().map(|v| (v + shift) * factor).collect()).collect();
        for name in EQUIVARIANT.iter().filter(|name| takes(name, rows.len(), f) && !CHOOSING.contains(*name)) {
            let moved: Vec<f64> = combine(name, f, &rows).values.iter().map(|v| (v + shift) * factor).collect();
            close(name, &combine(name, f, &changed).values, &moved, factor)?;
        }
    }

    #[test]
    fn copies_of_one_row_come_back(row in prop::collection::vec(-100.0_f64..100.0, 1..30), n in 7_usize..20) {
        let rows = vec![row.clone(); n];
        let f = (n - 1) / 2;
        // Clipped to a length, a row is no longer the same.
        let exact = EQUIVARIANT.iter().chain(ORDERED).chain(&["geometric_median", "arc+nnm+trimmed_mean"]);
        for name in exact {
            let f = (0..=f).rev().find(|f| takes(name, n, *f)).unwrap();
            close(name, &combine(name, f, &rows).values, &row, 100.0)?;
        }
    }

    #[test]
    fn a_hostile_minority_has_bounded_effect((rows, f) in rounds(), hostile in prop::collection::vec(prop_oneof![
        Just(f64::from(f32::MAX)), Just(-1e30), Just(1e30), Just(0.0), Just(1e-40), -10.0_f64..10.0
    ], 1..40)) {
        let honest = &rows[f..];
        let mut all: Vec<Vec<f64>> =
            (0..f).map(|i| (0..rows[0].len()).map(|k| hostile[(i * 3 + k) % hostile.len()]).collect()).collect();
        all.extend_from_slice(honest);
        let reach = 10.0 * diameter(honest) + 1e-9;
        let mean: Vec<f64> =
            (0..rows[0].len()).map(|k| honest.iter().map(|row| row[k]).sum::<f64>() / honest.len() as f64).collect();
        // Rules that start at zero bound what a row drags, not how far they are.
        for name in EQUIVARIANT.iter().chain(&["arc+nnm+trimmed_mean"]).filter(|name| bounded(name) && takes(name, all.len(), f)) {
            let off: f64 =
                combine(name, f, &all).values.iter().zip(&mean).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt();
            prop_assert!(off <= reach, "{} is {} off, honest rows reach {}", name, off, reach);
        }
    }

    #[test]
    fn huge_f32_rows_end_and_stay_out(honest in prop::collection::vec(prop::collection::vec(-2.0_f32..2.0, 8), 8..12), size in prop_oneof![
        Just(f32::MAX), Just(1e30_f32), Just(1e20), Just(f32::MIN_POSITIVE / 2.0)
    ]) {
        let f = 2;
        let mut all = honest;
        all.push(vec![size; 8]);
        all.push((0..8).map(|k| if k % 2 == 0 { size } else { -size }).collect());
        for name in EQUIVARIANT.iter().filter(|name| bounded(name) && takes(name, all.len(), f)) {
            let values = combine(name, f, &all).values;
            prop_assert!(values.iter().all(|v| v.abs() <= 4.0), "{}: {:?}", name, values);
        }
    }
}

/// Values that differ in every column and row; several chunks and a ragged end.
fn large<T: Scalar>(n: usize, d: usize) -> MatrixRows<T> {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        T::round_from(f64::from(state >> 8) / 1e6 - 8.0)
    };
    MatrixRows::new((0..n * d).map(|_| next()).collect(), n, d).unwrap()
}

fn same_bits_on_any_number_of_threads<T: Scalar>() {
    let rows = large::<T>(23, 3 * CHUNK + 21);
    for name in EQUIVARIANT.iter().chain(ANCHORED).chain(ORDERED) {
        let f = if name.starts_with("bucketing") { 2 } else { 4 };
        let rule = compose(name, f);
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| rule.explained(&rows)).unwrap()
        };
        let one = on(1);
        for threads in [2, 4] {
            let more = on(threads);
            let bits = |values: &[T]| {
                values
                    .iter()
                    .map(|v| Into::<f64>::into(*v).to_bits())
                    .collect::<Vec<_>>()
            };
            assert_eq!(bits(&one.values), bits(&more.values), "{name}, {threads} threads");
            assert_eq!(one.evidence, more.evidence, "{name}, {threads} threads");
            assert_eq!(one.scores, more.scores, "{name}, {threads} threads");
        }
    }
}

#[test]
fn one_two_and_four_threads_give_the_same_bits() {
    same_bits_on_any_number_of_threads::<f32>();
    same_bits_on_any_number_of_threads::<f64>();
}

#[test]
fn values_alone_are_the_explained_ones() {
    let rows = large::<f32>(19, 700);
    for name in EQUIVARIANT {
        let rule = compose(name, 3);
        let (short, long) = (rule.values(&rows).unwrap(), rule.explained(&rows).unwrap());
        assert_eq!(short.values, long.values, "{name}");
        assert!(short.evidence.is_empty());
        assert_eq!(long.evidence.len(), 19);
    }
}

/// The rules of distances by the definition, without inner products.
#[test]
fn gram_space_gives_what_distances_give() {
    let d = 300;
    let rows: Vec<Vec<f64>> = (0..11)
        .map(|i| {
            (0..d)
                .map(|k| ((i * 17 + k) as f64 * 0.7).sin() + if i < 3 { 2.0 } else { 0.0 })
                .collect()
        })
        .collect();
    let squared = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>();
    let f = 3;
    let near = |i: usize| {
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_by(|a, b| squared(&rows[i], &rows[*a]).total_cmp(&squared(&rows[i], &rows[*b])));
        order
    };
    let mean_of = |list: &[usize]| -> Vec<f64> {
        (0..d)
            .map(|k| list.iter().map(|i| rows[*i][k]).sum::<f64>() / list.len() as f64)
            .collect()
    };
    let mixed = Composed::new("nnm".parse().unwrap(), f, &Options::default())
        .unwrap()
        .mixed(&MatrixRows::from_rows(&rows).unwrap())
        .unwrap();
    for (i, row) in mixed.values.chunks(d).enumerate() {
        for (got, want) in row.iter().zip(mean_of(&near(i)[..rows.len() - f])) {
            assert!((got - want).abs() < 1e-12, "row {i}: {got} is not {want}");
        }
    }
    let mut z = vec![0.0; d];
    for _ in 0..400 {
        let weights: Vec<f64> = rows.iter().map(|row| 1.0 / squared(row, &z).sqrt()).collect();
        let total: f64 = weights.iter().sum();
        z = (0..d)
            .map(|k| rows.iter().zip(&weights).map(|(row, w)| row[k] * w).sum::<f64>() / total)
            .collect();
    }
    for (got, want) in combine("geometric_median_converged", f, &rows)
        .values
        .iter()
        .zip(&z)
    {
        assert!((got - want).abs() < 1e-9, "{got} is not {want}");
    }
}

#[test]
fn evidence_says_whose_weight_was_taken() {
    let mut rows = vec![vec![1.0_f64, 1.0]; 6];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] += 0.1 * i as f64;
    }
    rows.push(vec![-50.0, 30.0]);
    for name in ["krum", "multi_krum", "caf", "dedup+trimmed_mean", "bulyan"] {
        let combined = combine(name, 1, &rows);
        let liar = combined.evidence[6];
        assert!((liar.trimmed_share - 1.0).abs() < 1e-12, "{name}: {liar:?}");
        assert!(liar.distance > 50.0 && liar.norm > 50.0, "{name}: {liar:?}");
    }
    let scores = combine("multi_krum", 1, &rows).scores.unwrap();
    assert!(scores[..6].iter().all(|score| *score < scores[6]), "{scores:?}");
}

#[test]
fn combinations_that_cannot_hold_are_refused_with_the_reason() {
    let check = |name: &str, n: usize, f: usize| compose(name, f).check(n);
    assert!(matches!(
        check("bulyan", 10, 2),
        Err(RuleError::TooFewRows { needed: 11, .. })
    ));
    assert!(matches!(
        check("mda", 30, 9),
        Err(RuleError::TooManySubsets { .. })
    ));
    // Two in a bucket at 30 % hostile: 3 of 5 buckets may be spoilt.
    assert_eq!(
        check("bucketing+trimmed_mean", 10, 3),
        Err(RuleError::BucketsTooLarge {
            size: 2,
            buckets: 5,
            f: 3,
            n: 10
        })
    );
    assert_eq!(check("bucketing+trimmed_mean", 10, 2), Ok(()));
    assert!(matches!(
        check("krum_flower", 3, 1),
        Err(RuleError::TooFewRows { needed: 5, .. })
    ));
    assert!(matches!(check("nnm", 10, 3), Err(RuleError::NoRule(_))));
    for name in EQUIVARIANT.iter().chain(ANCHORED).chain(ORDERED) {
        assert_eq!(check(name, 0, 0), Err(RuleError::NoRows), "{name}");
        if !["mean", "clipping+mean"].contains(name) {
            assert_eq!(
                check(name, 10, 5),
                Err(RuleError::TooManyByzantine { f: 5, n: 10 }),
                "{name}"
            );
            let huge = check(name, 10, usize::MAX);
            assert!(
                matches!(huge, Err(RuleError::TooManyByzantine { .. })),
                "{name}: {huge:?}"
            );
        }
    }
    let private = Options {
        private: true,
        ..Options::default()
    };
    let krum = Composed::new("krum".parse().unwrap(), 1, &private).unwrap_err();
    assert!(matches!(krum, RuleError::UnfitForNoise("krum")), "{krum}");
}

#[test]
fn one_row_alone_is_the_result() {
    let rows = vec![vec![1.5_f64, -2.0, 0.0]];
    for name in EQUIVARIANT
        .iter()
        .chain(&["monna"])
        .filter(|name| takes(name, 1, 0))
    {
        close(name, &combine(name, 0, &rows).values, &rows[0], 1.0).unwrap();
    }
}

#[test]
fn numbers_too_large_to_measure_are_an_error() {
    let rows = vec![vec![1e200_f64], vec![-1e200], vec![1.0]];
    let rows = MatrixRows::from_rows(&rows).unwrap();
    let found = compose("caf", 1).values(&rows).unwrap_err();
    assert!(matches!(found, RuleError::TooLarge { .. }), "{found}");
    assert_eq!(compose("median", 1).values(&rows).unwrap().values, [1.0]);
}

#[test]
fn a_bucketing_says_how_it_shuffled() {
    let rows = large::<f32>(10, 5);
    let name: RuleName = "bucketing+median".parse().unwrap();
    let with = |seed| {
        let options = Options {
            seed: Some(seed),
            ..Options::default()
        };
        Composed::new(name, 1, &options).unwrap().values(&rows).unwrap()
    };
    let (one, again, other) = (with(1), with(1), with(2));
    assert_eq!(one, again);
    assert_ne!(one.permutation, other.permutation);
    assert_eq!(one.permutation.unwrap().len(), 10);
    assert_eq!(
        combine("median", 1, &[vec![1.0_f32], vec![2.0], vec![3.0]]).permutation,
        None
    );
}
