//! Clipping of gradients that are still products of two factors: as exact as [`crate::clip`], without forming one gradient for each unit.
//!
//! In a dense layer a unit's gradient is `Σ_i g_i a_iᵀ` over its rows, a the layer's input and g the loss's gradient at its output. Here the **factors**
//! are cut to whole numbers, and what a unit adds is *defined* as the product of those:
//!
//! ```text
//! â = round(a · 2¹⁴/r), |â| < 2¹⁴      r: the layer's public range, a power of two; an input beyond it counts as its edge
//! ĝ = round(g · f/s),   |ĝ| < 2²³      s: public, a power of two times the grid's step; f ≤ 1: the unit's own factor
//! unit adds  x = Σ_i ĝ_i â_iᵀ  (weights),  Σ_i 2¹⁴/r · ĝ_i  (bias: an input of 1),   whole numbers in steps s·r/2¹⁴
//! its norm   |x|² = Σ_layers r² Σ_ij (â_i·â_j + 2²⁸/r²)(ĝ_i·ĝ_j)                      the Gram form, in 128-bit whole numbers
//! ```
//!
//! **Sensitivity.** With d values and the grid's bound of K steps for one unit ([`crate::clip`]; ⌊K/n⌋ for one of n windows), a unit counts only if
//! `|x| ≤ K − ⌈√d⌉` exactly, compared in 128-bit integers on the fine grid, whose step is 2⁻ᵗ of the coarse one. If it is longer, f is lowered and the unit quantised anew, at most
//! [`TRIES`] times; after those, or with a value that is not finite, the unit counts as zero. All units are added in whole numbers, so the sum S does not depend on any
//! order. At the end every value is rounded once to the coarse grid, `R(S) = ⌊S/2ᵗ + ½⌋`. For a unit x more or less each value of `R(S + x) − R(S)` is less than 1 away from that of `x/2ᵗ`,
//! so `|R(S + x) − R(S)| ≤ |x|/2ᵗ + √d ≤ K`: the claim that the ledger charges, and the noise is that of every other release. The same holds for m windows: `m(K/n − √d) + √d ≤ mK/n`.
//!
//! **What a unit may depend on.** The factors of one unit must follow from that unit and from public weights, bit by bit. Rows in one batch may not touch one another: no layer that mixes examples, and a matrix
//! product whose sums run in the same order for each row, whatever stands beside it (`theriac-model` tests that of its networks).
//!
//! **Exact products.** ĝ is cut into two digits of 12 bits; 64 rows of 14 bits times 11 bits stay below 2³¹, so products are summed in 32 bits by the machine's
//! `i16` multiply-add, and the block's sums go to 64 bits. One value of a unit is at most 2³⁷ fine steps, and 2²⁵ units are allowed: 2⁶². Where the grid is too coarse for
//! this (K ≤ 2⌈√d⌉), or there are more units, each gradient is formed and clipped on its own instead ([`crate::clip`]).
//!
//! **Error.** A value of â is off by r/2¹⁵ at most, one of ĝ by 2⁻²² of the clipping norm (both rounded to nearest: no bias), the norm bound is ⌈√d⌉/K too low.
//!
//! Source of the factors and of the Gram form: Goodfellow, "Efficient per-example gradient computations" (2015); Li, Tramèr, Liang and Hashimoto,
//! "Large language models can be strong differentially private learners" (2022), section 4; Bu, Wang, Dai and Xie (2023). Whole numbers are ours.

#![expect(
    clippy::inline_always,
    reason = "what is not inlined into the dispatched function loses its vector instructions"
)]

mod product;
mod quantise;
mod sum;

#[cfg(test)]
mod tests;

pub(crate) use self::sum::FactoredSum;

/// Magnitudes of quantised inputs stay below 2 to this.
const INPUT_LOG2: u32 = 14;
/// Largest magnitude of a quantised input.
const INPUT_MAX: i16 = (1 << INPUT_LOG2) - 1;
/// Bits of one digit of a quantised error.
const DIGIT_LOG2: u32 = 12;
/// Largest magnitude of a quantised error: two digits of −2¹¹ to 2¹¹ − 1.
const ERROR_MAX: i32 = ((1 << (DIGIT_LOG2 - 1)) - 1) * ((1 << DIGIT_LOG2) + 1);
/// Errors of one unit are resolved to about this part of the norm bound.
const ERROR_LOG2: u32 = 23;
/// Rows whose products are summed in 32 bits: 64 · 16 383 · 2 048 < 2³¹.
const BLOCK_ROWS: usize = 64;
/// Largest log2 of a layer's range.
const RANGE_LOG2_MAX: u32 = 10;
/// How often a unit that is too long is shortened before it counts as zero.
pub const TRIES: u32 = 6;

/// Why factors are no gradients of units.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum FactorError {
    /// A layer's inputs or errors are not one row for each row of each unit.
    #[error("layer {layer} has {values} values, which are no whole rows of {rows}")]
    Rows {
        /// Its place.
        layer: usize,
        /// Values of its inputs or errors.
        values: usize,
        /// Rows that there must be.
        rows: usize,
    },
    /// A layer's range is beyond 2¹⁰.
    #[error("inputs of up to 2^{range_log2} have no whole numbers that are fine enough; scale them")]
    Range {
        /// Its log2.
        range_log2: u8,
    },
    /// Norms of units of so many rows and values do not fit into 128 bits.
    #[error("norms of units of {rows} rows in layers of this size do not fit into 128 bits")]
    TooLarge {
        /// Rows of one unit.
        rows: usize,
    },
}

/// One layer of one pass over all units.
#[derive(Debug, Clone, Copy)]
pub struct LayerFactors<'a> {
    /// Inputs `[rows, in]`. Layers with the same inputs should give the same slice: it is quantised once.
    pub inputs: &'a [f32],
    /// The loss's gradients at its output, before the activation, `[rows, out]`; the loss is a sum over rows. The same slice where they are the same.
    pub errors: &'a [f32],
    /// Whether the layer has a bias.
    pub bias: bool,
    /// log2 of the public range of the inputs: 3 for rows that are clipped to ±8, 0 behind tanh; at most 10. An input beyond it counts as its edge.
    pub range_log2: u8,
}

/// The gradients of units, each a run of rows, as factors. Flat order: weights `[out, in]` and bias of each layer.
#[derive(Debug)]
pub struct UnitFactors<'a> {
    /// Distinct inputs.
    inputs: Vec<Rows<'a>>,
    /// Distinct errors.
    errors: Vec<Rows<'a>>,
    layers: Vec<Layer>,
    units: usize,
    rows: usize,
    values: usize,
}

/// Some rows of one width.
#[derive(Debug, Clone, Copy)]
struct Rows<'a> {
    values: &'a [f32],
    width: usize,
    /// Of inputs; 0 for errors.
    range_log2: u8,
}

/// A layer, by the places of its factors.
#[derive(Debug, Clone, Copy)]
struct Layer {
    inputs: usize,
    errors: usize,
    bias: bool,
    range_log2: u32,
}

impl<'a> UnitFactors<'a> {
    /// `units` units of `rows` rows each, one after the other; a shorter unit is filled up with rows whose errors are zero.
    ///
    /// # Errors
    /// [`FactorError`]
    pub fn new(layers: &[LayerFactors<'a>], units: usize, rows: usize) -> Result<Self, FactorError> {
        let mut factors = Self {
            inputs: Vec::new(),
            errors: Vec::new(),
            layers: Vec::with_capacity(layers.len()),
            units,
            rows,
            values: 0,
        };
        let all = units.saturating_mul(rows);
        let mut most = 0_u128;
        for (place, layer) in layers.iter().enumerate() {
            let width = |values: &[f32]| match values.len().checked_div(all) {
                Some(width) if width > 0 && width * all == values.len() => Ok(width),
                None if values.is_empty() => Ok(0),
                _ => Err(FactorError::Rows {
                    layer: place,
                    values: values.len(),
                    rows: all,
                }),
            };
            let range_log2 = layer.range_log2;
            if u32::from(range_log2) > RANGE_LOG2_MAX {
                return Err(FactorError::Range { range_log2 });
            }
            let (inputs, outputs) = (width(layer.inputs)?, width(layer.errors)?);
            most =
                norm_square_max(most, inputs, outputs, rows, layer).ok_or(FactorError::TooLarge { rows })?;
            factors.values += inputs * outputs + if layer.bias { outputs } else { 0 };
            factors.layers.push(Layer {
                inputs: distinct(&mut factors.inputs, layer.inputs, inputs, range_log2),
                errors: distinct(&mut factors.errors, layer.errors, outputs, 0),
                bias: layer.bias,
                range_log2: range_log2.into(),
            });
        }
        Ok(factors)
    }

    /// Number of units.
    pub fn units(&self) -> usize {
        self.units
    }

    /// Values of one gradient.
    pub fn values(&self) -> usize {
        self.values
    }

    /// One unit's gradient, multiplied out in single precision.
    pub(crate) fn gradient(&self, unit: usize) -> Vec<f32> {
        let mut flat = Vec::with_capacity(self.values);
        for layer in &self.layers {
            let (inputs, errors) = (self.inputs[layer.inputs], self.errors[layer.errors]);
            let start = flat.len();
            flat.resize(start + inputs.width * errors.width, 0.0);
            let mut bias = vec![0.0; errors.width];
            for row in unit * self.rows..(unit + 1) * self.rows {
                let (input, error) = (inputs.row(row), errors.row(row));
                let weights = flat[start..].chunks_exact_mut(inputs.width.max(1));
                for ((weights, bias), g) in weights.zip(&mut bias).zip(error) {
                    weights.iter_mut().zip(input).for_each(|(w, a)| *w += g * a);
                    *bias += g;
                }
            }
            if layer.bias {
                flat.extend(bias);
            }
        }
        flat
    }
}

impl<'a> Rows<'a> {
    fn row(self, row: usize) -> &'a [f32] {
        &self.values[row * self.width..][..self.width]
    }

    /// All rows of a unit of so many.
    #[inline(always)]
    fn of_unit(self, unit: usize, rows: usize) -> &'a [f32] {
        &self.values[unit * rows * self.width..][..rows * self.width]
    }
}

/// The place of these rows among those that are known; new ones are added.
fn distinct<'a>(known: &mut Vec<Rows<'a>>, values: &'a [f32], width: usize, range_log2: u8) -> usize {
    let same = |rows: &Rows<'_>| std::ptr::eq(rows.values, values) && rows.range_log2 == range_log2;
    known.iter().position(same).unwrap_or_else(|| {
        known.push(Rows {
            values,
            width,
            range_log2,
        });
        known.len() - 1
    })
}

/// `so_far`, and what the absolute terms of the Gram form of one more layer can come to; `None` beyond `i128`, or where a factor's part is beyond `i64`.
fn norm_square_max(
    so_far: u128,
    inputs: usize,
    outputs: usize,
    rows: usize,
    layer: &LayerFactors<'_>,
) -> Option<u128> {
    let input_square = u128::from(INPUT_MAX.unsigned_abs()).pow(2) << (2 * layer.range_log2);
    let constant = if layer.bias { 1_u128 << (2 * INPUT_LOG2) } else { 0 };
    let of_inputs = input_square.checked_mul(inputs as u128)?.checked_add(constant)?;
    let of_errors = u128::from(ERROR_MAX.unsigned_abs())
        .pow(2)
        .checked_mul(outputs as u128)?;
    let limit = i64::MAX.unsigned_abs().into();
    if of_inputs > limit || of_errors > limit {
        return None;
    }
    let terms = of_inputs
        .checked_mul(of_errors)?
        .checked_mul((rows as u128).checked_pow(2)?)?;
    let sum = so_far.checked_add(terms)?;
    (sum <= i128::MAX.unsigned_abs()).then_some(sum)
}
