use proptest::prelude::*;
use theriac_protocol::units::{L2Norm, NoiseMultiplier};

use super::product::{MultiplyAdd, Pairs, Portable};
use super::sum::FactorGrid;
use super::*;
use crate::clip::GridSum;
use crate::grid::Grid;

/// Widths of the test's network, in the shape of the shipped one: inputs → hidden, hidden → outputs, and a linear path beside them.
const INPUTS: usize = 21;
const HIDDEN: usize = 5;
const OUTPUTS: usize = 3;
const VALUES: usize = HIDDEN * INPUTS + HIDDEN + OUTPUTS * HIDDEN + OUTPUTS + OUTPUTS * INPUTS;

/// What one pass leaves: inputs and hidden activations, errors of both layers, all `[rows, width]`.
#[derive(Debug, Clone, Default)]
struct Pass {
    inputs: Vec<f32>,
    hidden: Vec<f32>,
    hidden_errors: Vec<f32>,
    errors: Vec<f32>,
    units: usize,
    rows: usize,
}

impl Pass {
    /// Numbers that are the same in every run.
    fn numbered(units: usize, rows: usize, seed: u64, scale: f32) -> Self {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut draw = |count: usize, scale: f32| -> Vec<f32> {
            let mut next = || {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / 8_388_608.0 - 1.0
            };
            (0..count).map(|_| next() * scale).collect()
        };
        let all = units * rows;
        Self {
            inputs: draw(all * INPUTS, 3.0),
            hidden: draw(all * HIDDEN, 1.0),
            hidden_errors: draw(all * HIDDEN, scale),
            errors: draw(all * OUTPUTS, scale),
            units,
            rows,
        }
    }

    fn factors(&self) -> UnitFactors<'_> {
        let layer = |inputs, errors, bias, range_log2| LayerFactors {
            inputs,
            errors,
            bias,
            range_log2,
        };
        let layers = [
            layer(&self.inputs, &self.hidden_errors, true, 3),
            layer(&self.hidden, &self.errors, true, 0),
            layer(&self.inputs, &self.errors, false, 3),
        ];
        UnitFactors::new(&layers, self.units, self.rows).unwrap()
    }

    /// Some of the units.
    fn only(&self, units: impl Iterator<Item = usize>) -> Self {
        let mut some = Self {
            rows: self.rows,
            ..Self::default()
        };
        let part = |values: &[f32], unit: usize, width: usize| {
            let width = width * self.rows;
            values[unit * width..][..width].to_vec()
        };
        for unit in units {
            some.inputs.extend(part(&self.inputs, unit, INPUTS));
            some.hidden.extend(part(&self.hidden, unit, HIDDEN));
            some.hidden_errors.extend(part(&self.hidden_errors, unit, HIDDEN));
            some.errors.extend(part(&self.errors, unit, OUTPUTS));
            some.units += 1;
        }
        some
    }

    fn all_finite(&self) -> bool {
        let all = [&self.inputs, &self.hidden, &self.hidden_errors, &self.errors];
        all.iter().all(|values| values.iter().all(|x| x.is_finite()))
    }
}

fn grid(clip_norm: f64, noise: f64) -> Grid {
    Grid::new(
        L2Norm::new(clip_norm).unwrap(),
        NoiseMultiplier::new(noise).unwrap(),
    )
}

fn empty(grid: Grid, parts: i64) -> FactoredSum {
    FactoredSum::new(grid, grid.norm_max() / parts, VALUES, 1000).unwrap()
}

fn sum_of(grid: Grid, parts: i64, pass: &Pass) -> FactoredSum {
    let mut sum = empty(grid, parts);
    sum.add(&pass.factors());
    sum
}

fn square(values: impl Iterator<Item = i64>) -> u128 {
    values.map(|x| u128::from(x.unsigned_abs()).pow(2)).sum()
}

/// Any float, and often one of a size that happens.
fn float() -> impl Strategy<Value = f32> {
    prop_oneof![6 => -9.0_f32..9.0, 2 => -1e-3_f32..1e-3, 1 => -1e9_f32..1e9, 1 => prop_oneof![
        20 => Just(0.0), 1 => prop::num::f32::ANY, 5 => Just(f32::MAX), 5 => Just(f32::MIN_POSITIVE)]]
}

fn pass() -> impl Strategy<Value = Pass> {
    (1_usize..6, 1_usize..5).prop_flat_map(|(units, rows)| {
        let of = |width: usize| prop::collection::vec(float(), units * rows * width);
        (of(INPUTS), of(HIDDEN), of(HIDDEN), of(OUTPUTS)).prop_map(
            move |(inputs, hidden, hidden_errors, errors)| Pass {
                inputs,
                hidden,
                hidden_errors,
                errors,
                units,
                rows,
            },
        )
    })
}

fn noise() -> impl Strategy<Value = f64> {
    prop_oneof![1e-3..0.1, 0.5..10.0, 10.0..200.0_f64]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// What one unit adds is at most K − ⌈√d⌉ long, summed over its values themselves; a unit with a value that is not finite adds nothing.
    #[test]
    fn no_unit_is_longer_than_the_bound(pass in pass(), sigma in noise(), clip in prop_oneof![1e-9..1e-6, 0.01..10.0, 1e3..1e12_f64], parts in 1_i64..4) {
        let grid = grid(clip, sigma);
        for unit in 0..pass.units {
            let alone = pass.only(std::iter::once(unit));
            let sum = sum_of(grid, parts, &alone);
            let rounding = 14; // ⌈√191⌉
            let most = (grid.norm_max() / parts - rounding) << sum.grid().shift;
            prop_assert_eq!(sum.grid().norm_max, most);
            prop_assert!(square(sum.fine().iter().copied()) <= u128::from(most.unsigned_abs()).pow(2));
            if !alone.all_finite() {
                prop_assert!(sum.fine().iter().all(|x| *x == 0));
            }
        }
    }

    /// With and without any unit, what is noised differs by at most K steps.
    #[test]
    fn a_unit_more_or_less_moves_the_rounded_sum_by_at_most_the_bound(pass in pass(), sigma in noise(), parts in 1_i64..4) {
        let grid = grid(1.0, sigma);
        let all: Vec<i64> = sum_of(grid, parts, &pass).rounded().collect();
        let most = u128::from((grid.norm_max() / parts).unsigned_abs());
        for left_out in 0..pass.units {
            let others = pass.only((0..pass.units).filter(|unit| *unit != left_out));
            let without: Vec<i64> = if others.units == 0 { vec![0; VALUES] } else { sum_of(grid, parts, &others).rounded().collect() };
            let moved = square(all.iter().zip(&without).map(|(a, b)| a - b));
            prop_assert!(moved <= most.pow(2));
        }
    }

    /// The sum is that of the units alone, bit for bit: in any order, in any groups, on any machine.
    #[test]
    fn the_sum_does_not_depend_on_order_groups_or_machine(pass in pass(), sigma in noise()) {
        let grid = grid(1.0, sigma);
        let together = sum_of(grid, 1, &pass);
        let mut one_by_one = empty(grid, 1);
        for unit in (0..pass.units).rev() {
            one_by_one.add(&pass.only(std::iter::once(unit)).factors());
        }
        let mut portable = empty(grid, 1);
        portable.add_portably(&pass.factors());
        prop_assert_eq!(together.fine(), one_by_one.fine());
        prop_assert_eq!(together.fine(), portable.fine());
    }
}

/// Other units can stand so that every value of one unit more is rounded the wrong way: the bound is held by the part that was kept for it, and by nothing else.
#[test]
fn the_worst_rounding_stays_within_the_bound() {
    let grid = grid(1.0, 20.0);
    let unit = Pass {
        inputs: vec![1.0; INPUTS],
        hidden: vec![0.3; HIDDEN],
        hidden_errors: vec![5.0; HIDDEN],
        errors: vec![5.0; OUTPUTS],
        units: 1,
        rows: 1,
    };
    let alone = sum_of(grid, 1, &unit);
    let shift = alone.grid().shift;
    let half = (1_i64 << shift) >> 1;
    let rounded_up = |fine: i64| {
        // Others whose sum plus this is a whole step, and without it just below one half.
        let others = (-fine).rem_euclid(1 << shift) - half;
        ((others + fine + half) >> shift) - ((others + half) >> shift)
    };
    let moved = square(alone.fine().iter().map(|fine| rounded_up(*fine)));
    let most = u128::from(grid.norm_max().unsigned_abs());
    assert!(moved <= most.pow(2), "{moved}, at most {}", most.pow(2));
    let kept = most - 14;
    assert!(
        moved > kept.pow(2),
        "the worst case is not the worst: {moved}, {}",
        kept.pow(2)
    );
}

/// By the definition, row by row and value by value.
fn by_definition(pass: &Pass, grid: FactorGrid) -> Vec<i64> {
    let quantised = |values: &[f32], scale: f64, most: f64| -> Vec<i64> {
        let whole = |x: &f32| (f64::from(*x) * scale).clamp(-most, most).round_ties_even();
        #[expect(clippy::cast_possible_truncation, reason = "whole numbers below 2^23")]
        values.iter().map(|x| whole(x) as i64).collect()
    };
    let inputs = quantised(&pass.inputs, 2048.0, 16_383.0);
    let hidden = quantised(&pass.hidden, 16_384.0, 16_383.0);
    let hidden_errors = quantised(&pass.hidden_errors, grid.errors_per_one, 8_386_559.0);
    let errors = quantised(&pass.errors, grid.errors_per_one, 8_386_559.0);
    let product = |g: &[i64], g_width: usize, a: &[i64], a_width: usize, shift: u32| {
        let mut sum = vec![0_i64; g_width * a_width];
        for (g, a) in g.chunks_exact(g_width).zip(a.chunks_exact(a_width)) {
            for (sum, (g, a)) in sum
                .iter_mut()
                .zip(g.iter().flat_map(|g| a.iter().map(move |a| (g, a))))
            {
                *sum += (g * a) << shift;
            }
        }
        sum
    };
    let bias = |g: &[i64], width: usize| product(g, width, &vec![16_384; g.len() / width], 1, 0);
    [
        product(&hidden_errors, HIDDEN, &inputs, INPUTS, 3),
        bias(&hidden_errors, HIDDEN),
        product(&errors, OUTPUTS, &hidden, HIDDEN, 0),
        bias(&errors, OUTPUTS),
        product(&errors, OUTPUTS, &inputs, INPUTS, 3),
    ]
    .concat()
}

#[test]
fn units_within_the_norm_are_the_products_of_their_whole_numbers() {
    let grid = grid(1000.0, 1.27);
    for (units, rows) in [
        (1, 1),
        (63, 1),
        (64, 1),
        (131, 1),
        (50, 3),
        (7, 16),
        (3, 67),
        (2, 150),
    ] {
        let pass = Pass::numbered(units, rows, 5, 0.1);
        let sum = sum_of(grid, 1, &pass);
        assert_eq!(
            sum.fine(),
            by_definition(&pass, sum.grid()),
            "{units} units of {rows} rows"
        );
    }
}

/// The definition in floats, one unit at a time, and half of the units clipped: the whole numbers are off by no more than their grid, once the part of the norm that is kept
/// for rounding is taken into account.
#[test]
fn clipped_sums_are_those_of_a_loop_of_floats() {
    for (rows, on_the_grid, most) in [
        (1, true, 1e-5),
        (8, true, 1e-5),
        (1, false, 1e-4),
        (8, false, 1e-4),
    ] {
        let mut pass = Pass::numbered(256, rows, 9, 0.3);
        if on_the_grid {
            pass.inputs
                .iter_mut()
                .for_each(|x| *x = (*x * 2048.0).round() / 2048.0);
            pass.hidden
                .iter_mut()
                .for_each(|x| *x = (*x * 8192.0).round() / 16_384.0);
        }
        let gradients: Vec<Vec<f64>> = (0..pass.units).map(|unit| in_double(&pass, unit)).collect();
        let length = |gradient: &Vec<f64>| gradient.iter().map(|x| x * x).sum::<f64>().sqrt();
        let mut norms: Vec<f64> = gradients.iter().map(length).collect();
        norms.sort_by(f64::total_cmp);
        let grid = grid(norms[128], 1.27);
        let sum = sum_of(grid, 1, &pass);
        let step = grid.step() / f64::from(sum.grid().shift).exp2();
        let bound = sum.grid().norm_max as f64 * step;
        let factors = pass.factors();
        let mut expected = vec![0.0; VALUES];
        for (unit, gradient) in gradients.iter().enumerate() {
            let single = factors.gradient(unit);
            let near = |(a, b): (&f64, &f32)| (a - f64::from(*b)).abs() < 1e-5 * (1.0 + a.abs());
            assert!(gradient.iter().zip(&single).all(near));
            let factor = bound / length(gradient).max(bound);
            expected
                .iter_mut()
                .zip(gradient)
                .for_each(|(sum, x)| *sum += factor * x);
        }
        let (mut gap, mut size) = (0.0, 0.0);
        for (fine, expected) in sum.fine().iter().zip(&expected) {
            gap += (*fine as f64 * step - expected).powi(2);
            size += expected.powi(2);
        }
        let off = (gap / size).sqrt();
        println!("{rows} rows, inputs on the grid: {on_the_grid}: off by {off:.1e}");
        assert!(
            off < most,
            "{rows} rows, inputs on the grid: {on_the_grid}: {off}"
        );
    }
}

fn in_double(pass: &Pass, unit: usize) -> Vec<f64> {
    let product = |g: &[f32], g_width: usize, a: &[f32], a_width: usize| {
        let mut sum = vec![0.0; g_width * a_width];
        for row in unit * pass.rows..(unit + 1) * pass.rows {
            for (i, g) in g[row * g_width..][..g_width].iter().enumerate() {
                for (j, a) in a[row * a_width..][..a_width].iter().enumerate() {
                    sum[i * a_width + j] += f64::from(*g) * f64::from(*a);
                }
            }
        }
        sum
    };
    let ones = vec![1.0; pass.units * pass.rows];
    [
        product(&pass.hidden_errors, HIDDEN, &pass.inputs, INPUTS),
        product(&pass.hidden_errors, HIDDEN, &ones, 1),
        product(&pass.errors, OUTPUTS, &pass.hidden, HIDDEN),
        product(&pass.errors, OUTPUTS, &ones, 1),
        product(&pass.errors, OUTPUTS, &pass.inputs, INPUTS),
    ]
    .concat()
}

#[test]
fn long_units_of_every_size_keep_the_norm_and_are_not_dropped() {
    let grid = grid(1.0, 1.27);
    for rows in [1, 5, 16] {
        for size in [1.0, 1e2, 1e6, 1e20, 1e36] {
            let pass = Pass::numbered(40, rows, 3, size);
            for unit in 0..pass.units {
                let sum = sum_of(grid, 1, &pass.only(std::iter::once(unit)));
                let norm = (square(sum.fine().iter().copied()) as f64).sqrt();
                let share = norm / sum.grid().norm_max as f64;
                assert!((0.9999..=1.0).contains(&share), "{rows} rows of {size}: {share}");
            }
        }
    }
}

/// Rows that cancel: the norm is a small rest of large terms, where a Gram form in floats is off by more than the norm itself.
#[test]
fn units_whose_rows_cancel_are_measured_exactly() {
    let grid = grid(1.0, 1.27);
    let mut pass = Pass::numbered(20, 2, 8, 1e4);
    for (row, values) in pass.inputs.chunks_exact_mut(2 * INPUTS).enumerate() {
        let (first, second) = values.split_at_mut(INPUTS);
        second.copy_from_slice(first);
        second[row % INPUTS] += 1.0 / 2048.0;
    }
    let hidden = pass.hidden.chunks_exact_mut(2 * HIDDEN);
    hidden.for_each(|two| two.copy_within(..HIDDEN, HIDDEN));
    for (values, width) in [(&mut pass.hidden_errors, HIDDEN), (&mut pass.errors, OUTPUTS)] {
        for two in values.chunks_exact_mut(2 * width) {
            let (first, second) = two.split_at_mut(width);
            second.iter_mut().zip(first).for_each(|(s, f)| *s = -*f);
        }
    }
    for unit in 0..pass.units {
        let sum = sum_of(grid, 1, &pass.only(std::iter::once(unit)));
        let found = square(sum.fine().iter().copied());
        assert!(found > 0 && found <= u128::from(sum.grid().norm_max.unsigned_abs()).pow(2));
    }
}

/// All rows of a block at both ends of what 16 bits and digits can hold.
#[test]
fn a_block_of_extreme_whole_numbers_fits_into_32_bits() {
    for (input, error) in [
        (INPUT_MAX, ERROR_MAX),
        (-INPUT_MAX, ERROR_MAX),
        (INPUT_MAX, -ERROR_MAX),
        (INPUT_MAX, -2048),
        (-INPUT_MAX, -2048),
        (INPUT_MAX, 2047),
    ] {
        let word = u32::from(input.cast_unsigned()) * 0x1_0001;
        let inputs = vec![word; BLOCK_ROWS / 2 * 32];
        let errors: Vec<u32> = (0..BLOCK_ROWS / 2 * 4)
            .flat_map(|_| quantise::digits(error, error))
            .collect();
        let pairs = Pairs {
            inputs: &inputs,
            errors: &errors,
            input_width: 19,
            output_width: 3,
            shift: 10,
        };
        let expected = vec![(64 * i64::from(input) * i64::from(error)) << 10; 57];
        let check = |sum: Vec<i64>| assert_eq!(sum, expected, "{input} {error}");
        check(products(Portable, pairs));
        #[cfg(target_arch = "x86_64")]
        if let Some(machine) = pulp::x86::V3::try_new() {
            check(products(machine, pairs));
        }
    }
}

fn products<M: MultiplyAdd>(machine: M, pairs: Pairs<'_>) -> Vec<i64> {
    let mut sum = vec![0; 57];
    pairs.add_to(machine, &mut sum);
    sum
}

#[test]
fn where_the_grid_leaves_no_room_there_is_no_sum_of_factors() {
    let new = |sigma: f64, parts: i64, values: usize, units: usize| {
        let grid = grid(1.0, sigma);
        FactoredSum::new(grid, grid.norm_max() / parts, values, units)
    };
    assert!(new(1.27, 1, 9090, 1 << 18).is_some());
    assert!(new(1.27, 3600, 9090, 10).is_some());
    assert!(new(10_000.0, 1, 9090, 10).is_none(), "K is 104, √d is 96");
    assert!(new(1e-9, 1, 9090, 10).is_none(), "K is 2⁴⁰");
    assert!(new(1.27, 1, 9090, (1 << 25) + 1).is_none(), "too many units");
}

#[test]
fn factors_of_other_shapes_are_refused() {
    let (inputs, errors) = (vec![0.0; 12], vec![0.0; 8]);
    let layer = |range_log2| LayerFactors {
        inputs: &inputs,
        errors: &errors,
        bias: true,
        range_log2,
    };
    let units = UnitFactors::new(&[layer(3)], 2, 2).unwrap();
    assert_eq!((units.units(), units.values()), (2, 3 * 2 + 2));
    let refused = |layer, units, rows| UnitFactors::new(&[layer], units, rows).unwrap_err();
    assert!(matches!(
        refused(layer(3), 5, 1),
        FactorError::Rows { layer: 0, .. }
    ));
    assert!(matches!(
        refused(layer(3), 0, 1),
        FactorError::Rows { layer: 0, .. }
    ));
    assert!(matches!(
        refused(layer(11), 4, 1),
        FactorError::Range { range_log2: 11 }
    ));
    let wide = vec![0.0; 1 << 17];
    let wide = LayerFactors {
        inputs: &wide,
        ..layer(10)
    };
    assert_eq!(refused(wide, 1, 1), FactorError::TooLarge { rows: 1 });
}

#[test]
fn debug_output_holds_no_value() {
    let sum = sum_of(grid(1.0, 1.0), 1, &Pass::numbered(3, 1, 1, 0.1));
    let text = format!("{sum:?}");
    assert!(
        sum.fine()
            .iter()
            .filter(|x| **x > 9999)
            .all(|x| !text.contains(&x.to_string())),
        "{text}"
    );
}

/// The way of single gradients, which stays for whatever comes as vectors, gives the same to the grid's errors.
#[test]
fn gradients_one_at_a_time_give_nearly_the_same() {
    let (clip, sigma) = (L2Norm::new(2.0).unwrap(), NoiseMultiplier::new(1.27).unwrap());
    let pass = Pass::numbered(100, 1, 4, 0.3);
    let (factors, mut slow) = (pass.factors(), GridSum::new(VALUES, clip, sigma));
    (0..100).for_each(|unit| slow.add(&factors.gradient(unit)));
    let quick = sum_of(slow.grid(), 1, &pass);
    let gap = square(quick.rounded().zip(slow.steps()).map(|(a, b)| a - b)) as f64;
    let size = square(slow.steps().iter().copied()) as f64;
    assert!((gap / size).sqrt() < 2e-4, "{}", (gap / size).sqrt());
}
