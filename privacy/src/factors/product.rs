//! `Σ ĝ âᵀ` over up to 64 rows in whole numbers: 32-bit sums of 16-bit products, then 64 bits.

use super::{DIGIT_LOG2, RANGE_LOG2_MAX};

/// Inputs of one tile.
pub(super) const TILE: usize = 16;
/// Outputs of one tile.
pub(super) const TILE_OUTPUTS: usize = 2;
/// Sums of one vector.
const LANES: usize = 8;

const _: () = assert!(
    31 + DIGIT_LOG2 + RANGE_LOG2_MAX + 1 < 63,
    "a block's sum fits into 64 bits"
);

/// Eight 32-bit sums and how a machine adds products of pairs to them.
pub(super) trait MultiplyAdd: Copy {
    /// Eight sums.
    type Sums: Copy;

    /// Zeros.
    fn zero(self) -> Self::Sums;

    /// Each word of `x` is a pair of 16-bit numbers, as is `y`: sums plus first by first plus second by second.
    fn add(self, sums: Self::Sums, x: [u32; LANES], y: u32) -> Self::Sums;

    /// The sums and the products of `x` and `y`, each two of which go into one sum.
    fn add_products(self, sums: Self::Sums, x: [i16; TILE], y: [i16; TILE]) -> Self::Sums;

    /// The sums.
    fn read(self, sums: Self::Sums) -> [i32; LANES];
}

/// Any machine.
#[derive(Debug, Clone, Copy)]
pub(super) struct Portable;

impl MultiplyAdd for Portable {
    type Sums = [i32; LANES];

    #[inline(always)]
    fn zero(self) -> Self::Sums {
        [0; LANES]
    }

    #[inline(always)]
    fn add(self, sums: Self::Sums, x: [u32; LANES], y: u32) -> Self::Sums {
        let (first, second) = (low(y), high(y));
        std::array::from_fn(|lane| sums[lane] + low(x[lane]) * first + high(x[lane]) * second)
    }

    #[inline(always)]
    fn add_products(self, sums: Self::Sums, x: [i16; TILE], y: [i16; TILE]) -> Self::Sums {
        let product = |place: usize| i32::from(x[place]) * i32::from(y[place]);
        std::array::from_fn(|lane| sums[lane] + product(2 * lane) + product(2 * lane + 1))
    }

    #[inline(always)]
    fn read(self, sums: Self::Sums) -> [i32; LANES] {
        sums
    }
}

#[cfg(target_arch = "x86_64")]
impl MultiplyAdd for pulp::x86::V3 {
    type Sums = pulp::u32x8;

    #[inline(always)]
    fn zero(self) -> Self::Sums {
        pulp::cast([0_u32; LANES])
    }

    #[inline(always)]
    fn add(self, sums: Self::Sums, x: [u32; LANES], y: u32) -> Self::Sums {
        let y = pulp::cast(self.splat_i32x8(y.cast_signed()));
        let products = self.multiply_wrapping_add_adjacent_i16x16(pulp::cast(x), y);
        pulp::Simd::add_u32s(self, sums, pulp::cast(products))
    }

    #[inline(always)]
    fn add_products(self, sums: Self::Sums, x: [i16; TILE], y: [i16; TILE]) -> Self::Sums {
        let products = self.multiply_wrapping_add_adjacent_i16x16(pulp::cast(x), pulp::cast(y));
        pulp::Simd::add_u32s(self, sums, pulp::cast(products))
    }

    #[inline(always)]
    fn read(self, sums: Self::Sums) -> [i32; LANES] {
        pulp::cast(sums)
    }
}

#[inline(always)]
fn low(word: u32) -> i32 {
    (word << 16).cast_signed() >> 16
}

#[inline(always)]
fn high(word: u32) -> i32 {
    word.cast_signed() >> 16
}

/// Inner product of two rows of inputs, padded to whole [`TILE`]s.
#[inline(always)]
pub(super) fn dot_inputs<M: MultiplyAdd>(machine: M, one: &[i16], other: &[i16]) -> i64 {
    let mut total = [0_i64; LANES];
    // Eight products below 2²⁸ for each sum: below 2³¹.
    for (one, other) in one.chunks(4 * TILE).zip(other.chunks(4 * TILE)) {
        let mut sums = machine.zero();
        for (x, y) in one.chunks_exact(TILE).zip(other.chunks_exact(TILE)) {
            sums = machine.add_products(
                sums,
                std::array::from_fn(|place| x[place]),
                std::array::from_fn(|place| y[place]),
            );
        }
        let sums = machine.read(sums);
        for (total, sum) in total.iter_mut().zip(sums) {
            *total += i64::from(sum);
        }
    }
    total.into_iter().sum()
}

/// One layer's factors of one block of rows, two rows in a word.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pairs<'a> {
    /// `[pairs, padded]`, padded to whole [`TILE`]s.
    pub(super) inputs: &'a [u32],
    /// `[pairs, padded, 2 digits]`, padded to whole [`TILE_OUTPUTS`].
    pub(super) errors: &'a [u32],
    /// Inputs that count.
    pub(super) input_width: usize,
    /// Outputs that count.
    pub(super) output_width: usize,
    /// What the products are shifted by.
    pub(super) shift: u32,
}

impl Pairs<'_> {
    /// Adds the products to `sum`, `[out, in]`. At most [`super::BLOCK_ROWS`] rows.
    #[inline(always)]
    pub(super) fn add_to<M: MultiplyAdd>(self, machine: M, sum: &mut [i64]) {
        let padded = self.input_width.next_multiple_of(TILE);
        let padded_errors = 2 * self.output_width.next_multiple_of(TILE_OUTPUTS);
        for input in (0..self.input_width).step_by(TILE) {
            let counted = TILE.min(self.input_width - input);
            for output in (0..self.output_width).step_by(TILE_OUTPUTS) {
                let mut sums = [[machine.zero(); 2]; 2 * TILE_OUTPUTS];
                let inputs = self.inputs.chunks_exact(padded);
                for (x, y) in inputs.zip(self.errors.chunks_exact(padded_errors)) {
                    let (left, right) = halves(&x[input..][..TILE]);
                    let y = &y[2 * output..][..2 * TILE_OUTPUTS];
                    for (sums, y) in sums.iter_mut().zip(y) {
                        sums[0] = machine.add(sums[0], left, *y);
                        sums[1] = machine.add(sums[1], right, *y);
                    }
                }
                for (offset, digits) in sums.chunks_exact(2).enumerate() {
                    if output + offset < self.output_width {
                        let start = (output + offset) * self.input_width + input;
                        let (left, right) = sum[start..][..counted].split_at_mut(counted.min(LANES));
                        let [low, high] =
                            [digits[0], digits[1]].map(|sums| sums.map(|sums| machine.read(sums)));
                        add_digits(low[0], high[0], self.shift, left);
                        add_digits(low[1], high[1], self.shift, right);
                    }
                }
            }
        }
    }
}

/// Sums of low and high digits of eight inputs, put together and added.
#[inline(always)]
fn add_digits(low: [i32; LANES], high: [i32; LANES], shift: u32, target: &mut [i64]) {
    // The length is known where a tile is full, so that this is a few vector instructions; as a closure over iterators it is not.
    if let Ok(target) = <&mut [i64; LANES]>::try_from(&mut *target) {
        for lane in 0..LANES {
            target[lane] = target[lane].wrapping_add(product(low[lane], high[lane]) << shift);
        }
    } else {
        for ((total, low), high) in target.iter_mut().zip(low).zip(high) {
            *total = total.wrapping_add(product(low, high) << shift);
        }
    }
}

/// Sums of other units may be near the end of 64 bits on the way; the total is not.
#[inline(always)]
fn product(low: i32, high: i32) -> i64 {
    (i64::from(high) << DIGIT_LOG2) + i64::from(low)
}

#[inline(always)]
fn halves(words: &[u32]) -> ([u32; LANES], [u32; LANES]) {
    (
        std::array::from_fn(|lane| words[lane]),
        std::array::from_fn(|lane| words[lane + LANES]),
    )
}
