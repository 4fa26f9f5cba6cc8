//! The sum of clipped units in fine steps.

use super::product::{MultiplyAdd, Pairs, Portable, TILE, TILE_OUTPUTS, dot_inputs};
use super::quantise::{self, dot_errors};
use super::{BLOCK_ROWS, ERROR_LOG2, INPUT_LOG2, TRIES, UnitFactors};
use crate::grid::Grid;

/// Most units of one sum: 2²⁵ of them with values of 2³⁷ each stay below 2⁶³.
const UNITS_MAX: usize = 1 << 25;

/// Share that a unit which is too long loses beyond what is needed, at the first try; four times as much at each further one.
const MARGIN: f64 = 1.0 / 262_144.0;

/// What follows from the coarse grid, the bound of one unit and the number of values: public numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct FactorGrid {
    /// Steps of quantised errors in 1, f = 1.
    pub(super) errors_per_one: f64,
    /// Fine steps in a coarse one, log2.
    pub(super) shift: u32,
    /// Largest norm of one unit in fine steps.
    pub(super) norm_max: i64,
}

impl FactorGrid {
    /// `None` where the coarse grid leaves no room.
    pub(super) fn new(grid: Grid, unit_norm_max: i64, values: usize) -> Option<Self> {
        let rounding = i64::try_from(ceil_sqrt(values)).ok()?;
        if unit_norm_max <= rounding.checked_mul(2)? || !grid.step().is_normal() {
            return None;
        }
        // A unit with an input of 1 and this bound has errors of up to 2²³ steps, each 2^−`fall` coarse ones.
        let bits = i64::BITS - unit_norm_max.leading_zeros();
        let shift = (INPUT_LOG2 + ERROR_LOG2).checked_sub(bits)?;
        let fall = f64::from(ERROR_LOG2) - f64::from(bits);
        let errors_per_one = fall.exp2() / grid.step();
        errors_per_one.is_finite().then_some(Self {
            errors_per_one,
            shift,
            norm_max: (unit_norm_max - rounding) << shift,
        })
    }

    fn norm_square_max(self) -> u128 {
        u128::from(self.norm_max.unsigned_abs()).pow(2)
    }
}

/// ⌈√n⌉.
fn ceil_sqrt(n: usize) -> usize {
    let floor = n.isqrt();
    if floor * floor == n { floor } else { floor + 1 }
}

/// A sum of units on the fine grid. Its values are private.
pub(crate) struct FactoredSum {
    grid: FactorGrid,
    /// Fine steps.
    sum: Vec<i64>,
}

impl FactoredSum {
    /// The empty sum of `values` numbers, to which at most `units` units come, each at most `unit_norm_max` steps of `grid` long; `None` where units must be
    /// clipped one at a time.
    pub(crate) fn new(grid: Grid, unit_norm_max: i64, values: usize, units: usize) -> Option<Self> {
        (units <= UNITS_MAX).then_some(Self {
            grid: FactorGrid::new(grid, unit_norm_max, values)?,
            sum: vec![0; values],
        })
    }

    /// Clips each unit and adds it. The caller has checked that they have as many values.
    pub(crate) fn add(&mut self, units: &UnitFactors<'_>) {
        debug_assert_eq!(units.values, self.sum.len(), "UnitSum checks the length");
        #[cfg(target_arch = "x86_64")]
        if let Some(machine) = pulp::x86::V3::try_new() {
            let job = Job { sum: self, units };
            return pulp::Simd::vectorize(machine, OnVectors { job, machine });
        }
        Job { sum: self, units }.run(Portable);
    }

    /// The same on any machine.
    #[cfg(test)]
    pub(super) fn add_portably(&mut self, units: &UnitFactors<'_>) {
        Job { sum: self, units }.run(Portable);
    }

    /// The sum, each value rounded to coarse steps.
    pub(crate) fn rounded(&self) -> impl Iterator<Item = i64> {
        let shift = self.grid.shift;
        let half = (1_i64 << shift) >> 1;
        self.sum.iter().map(move |fine| (fine + half) >> shift)
    }

    #[cfg(test)]
    pub(super) fn fine(&self) -> &[i64] {
        &self.sum
    }

    #[cfg(test)]
    pub(super) fn grid(&self) -> FactorGrid {
        self.grid
    }
}

impl std::fmt::Debug for FactoredSum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FactoredSum")
            .field("grid", &self.grid)
            .finish_non_exhaustive()
    }
}

#[cfg(target_arch = "x86_64")]
struct OnVectors<'a, 'b> {
    job: Job<'a, 'b>,
    machine: pulp::x86::V3,
}

#[cfg(target_arch = "x86_64")]
impl pulp::WithSimd for OnVectors<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        self.job.run(self.machine);
    }
}

struct Job<'a, 'b> {
    sum: &'a mut FactoredSum,
    units: &'a UnitFactors<'b>,
}

impl Job<'_, '_> {
    /// Group after group of whole units, so that what is quantised stays near the processor.
    #[inline(always)]
    fn run<M: MultiplyAdd>(self, machine: M) {
        let units = self.units;
        if units.rows == 0 {
            return;
        }
        let group = (BLOCK_ROWS / units.rows).max(1);
        let mut scratch = Scratch::new(units, group.min(units.units));
        for first in (0..units.units).step_by(group) {
            let count = group.min(units.units - first);
            scratch.quantise_inputs(machine, units, first, count);
            for unit in 0..count {
                scratch.quantise_errors(units, self.sum.grid, first, unit);
            }
            scratch.add_products(machine, units, count, &mut self.sum.sum);
        }
    }
}

/// One group's whole numbers.
struct Scratch {
    inputs: Vec<InputSteps>,
    errors: Vec<ErrorSteps>,
    /// Whether all inputs of a unit are finite.
    finite: Vec<bool>,
    /// For each layer, `[unit, rows, rows]`: `r²(â_i·â_j)` and the bias's 2²⁸.
    gram: Vec<Vec<i64>>,
}

struct InputSteps {
    padded: usize,
    /// `[rows, padded]`, rows padded to an even number.
    flat: Vec<i16>,
    /// `[pairs, padded]`.
    pairs: Vec<u32>,
}

struct ErrorSteps {
    padded: usize,
    /// `[rows, out]`, rows padded to an even number.
    flat: Vec<i32>,
    /// `[pairs, padded, 2 digits]`.
    pairs: Vec<u32>,
}

impl Scratch {
    fn new(units: &UnitFactors<'_>, group: usize) -> Self {
        let pairs = (group * units.rows).div_ceil(2);
        let inputs = units.inputs.iter().map(|rows| {
            let padded = rows.width.next_multiple_of(TILE);
            InputSteps {
                padded,
                flat: vec![0; 2 * pairs * padded],
                pairs: vec![0; pairs * padded],
            }
        });
        let errors = units.errors.iter().map(|rows| {
            let padded = rows.width.next_multiple_of(TILE_OUTPUTS);
            ErrorSteps {
                padded,
                flat: vec![0; 2 * pairs * rows.width],
                pairs: vec![0; pairs * padded * 2],
            }
        });
        Self {
            inputs: inputs.collect(),
            errors: errors.collect(),
            finite: vec![true; group],
            gram: vec![vec![0; group * units.rows * units.rows]; units.layers.len()],
        }
    }

    #[inline(always)]
    fn quantise_inputs<M: MultiplyAdd>(
        &mut self,
        machine: M,
        units: &UnitFactors<'_>,
        first: usize,
        count: usize,
    ) {
        let rows = units.rows;
        self.finite.fill(true);
        for (steps, source) in self.inputs.iter_mut().zip(&units.inputs) {
            let padded = steps.padded;
            if padded == 0 {
                continue;
            }
            for row in 0..count * rows {
                let values = source.row(first * rows + row);
                self.finite[row / rows] &= quantise::finite(quantise::largest_bits(values));
                let target = &mut steps.flat[row * padded..][..source.width];
                quantise::inputs(values, source.range_log2.into(), target);
            }
            // A row without a partner: what was there belongs to an earlier group.
            steps.flat[count * rows * padded..].fill(0);
            let pairs = steps.pairs.chunks_exact_mut(padded);
            for (words, two) in pairs.zip(steps.flat.chunks_exact(2 * padded)) {
                let (one, other) = two.split_at(padded);
                quantise::interleave(one, other, words);
            }
        }
        (0..units.inputs.len()).for_each(|place| self.gram_of(machine, units, place, count));
    }

    /// Inner products of the rows of each unit, for every layer with these inputs.
    #[inline(always)]
    fn gram_of<M: MultiplyAdd>(&mut self, machine: M, units: &UnitFactors<'_>, place: usize, count: usize) {
        let (rows, steps) = (units.rows, &self.inputs[place]);
        let row = |row: usize| &steps.flat[row * steps.padded..][..steps.padded];
        for unit in 0..count {
            for i in 0..rows {
                for j in 0..=i {
                    let product = dot_inputs(machine, row(unit * rows + i), row(unit * rows + j));
                    for (gram, layer) in self.gram.iter_mut().zip(&units.layers) {
                        if layer.inputs == place {
                            let constant = i64::from(layer.bias) << (2 * INPUT_LOG2);
                            gram[(unit * rows + i) * rows + j] =
                                (product << (2 * layer.range_log2)) + constant;
                        }
                    }
                }
            }
        }
    }

    /// Finds the factor of one unit of the group and leaves its errors in whole numbers, all zero where it counts as zero.
    #[inline(always)]
    fn quantise_errors(&mut self, units: &UnitFactors<'_>, grid: FactorGrid, first: usize, unit: usize) {
        let rows = units.rows;
        let largest = units
            .errors
            .iter()
            .map(|errors| quantise::largest_bits(errors.of_unit(first + unit, rows)));
        let largest = largest.fold(0, u32::max);
        if self.finite[unit] && quantise::finite(largest) {
            let mut factor = quantise::factor(grid.errors_per_one, largest);
            let mut margin = MARGIN;
            for _ in 0..=TRIES {
                for (steps, errors) in self.errors.iter_mut().zip(&units.errors) {
                    let width = rows * errors.width;
                    let target = &mut steps.flat[unit * width..][..width];
                    quantise::errors(errors.of_unit(first + unit, rows), factor, target);
                }
                let square = self.norm_square(units, unit);
                if square <= grid.norm_square_max() {
                    return;
                }
                factor *= grid.norm_max as f64 / (square as f64).sqrt() * (1.0 - margin);
                margin *= 4.0;
            }
        }
        for (steps, errors) in self.errors.iter_mut().zip(&units.errors) {
            let width = rows * errors.width;
            steps.flat[unit * width..][..width].fill(0);
        }
    }

    /// Squared norm of what the unit would add, in fine steps. No overflow: [`UnitFactors::new`] has bounded all terms.
    #[inline(always)]
    fn norm_square(&self, units: &UnitFactors<'_>, unit: usize) -> u128 {
        let rows = units.rows;
        let mut square = 0_i128;
        for (place, (steps, source)) in self.errors.iter().zip(&units.errors).enumerate() {
            let row = |row: usize| &steps.flat[(unit * rows + row) * source.width..][..source.width];
            for i in 0..rows {
                for j in 0..=i {
                    let product = i128::from(dot_errors(row(i), row(j)));
                    let twice = if i == j { 1 } else { 2 };
                    for (gram, layer) in self.gram.iter().zip(&units.layers) {
                        if layer.errors == place {
                            let inputs = gram[(unit * rows + i) * rows + j];
                            square += twice * product * i128::from(inputs);
                        }
                    }
                }
            }
        }
        // It is a norm: what is below zero would be a wrong sum, and must not pass.
        u128::try_from(square).unwrap_or(u128::MAX)
    }

    #[inline(always)]
    fn add_products<M: MultiplyAdd>(
        &mut self,
        machine: M,
        units: &UnitFactors<'_>,
        count: usize,
        sum: &mut [i64],
    ) {
        let rows = count * units.rows;
        for (steps, source) in self.errors.iter_mut().zip(&units.errors) {
            if source.width > 0 {
                steps.flat[rows * source.width..].fill(0);
                steps.pack(source.width);
            }
        }
        let mut rest = sum;
        for layer in &units.layers {
            let (inputs, errors) = (&self.inputs[layer.inputs], &self.errors[layer.errors]);
            let (input_width, output_width) =
                (units.inputs[layer.inputs].width, units.errors[layer.errors].width);
            let (weights, others) = rest.split_at_mut(input_width * output_width);
            rest = others;
            if !weights.is_empty() {
                let blocks = inputs.pairs[..rows.div_ceil(2) * inputs.padded]
                    .chunks(BLOCK_ROWS / 2 * inputs.padded)
                    .zip(errors.pairs.chunks(BLOCK_ROWS / 2 * errors.padded * 2));
                for (inputs, errors) in blocks {
                    let pairs = Pairs {
                        inputs,
                        errors,
                        input_width,
                        output_width,
                        shift: layer.range_log2,
                    };
                    pairs.add_to(machine, weights);
                }
            }
            if layer.bias && output_width > 0 {
                let (bias, others) = rest.split_at_mut(output_width);
                rest = others;
                for row in errors.flat[..rows * output_width].chunks_exact(output_width) {
                    for (total, g) in bias.iter_mut().zip(row) {
                        *total = total.wrapping_add(i64::from(*g) << INPUT_LOG2);
                    }
                }
            }
        }
    }
}

impl ErrorSteps {
    /// Two rows in a word, digit by digit.
    #[inline(always)]
    fn pack(&mut self, width: usize) {
        let pairs = self.pairs.chunks_exact_mut(2 * self.padded);
        for (words, two) in pairs.zip(self.flat.chunks_exact(2 * width)) {
            let (one, other) = two.split_at(width);
            for ((words, first), second) in words.chunks_exact_mut(2).zip(one).zip(other) {
                words.copy_from_slice(&quantise::digits(*first, *second));
            }
        }
    }
}
