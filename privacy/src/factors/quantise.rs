//! Factors to whole numbers, and their inner products. Everything is written as plain loops over rows that a compiler turns into vector instructions.

use super::{DIGIT_LOG2, ERROR_MAX, INPUT_LOG2, INPUT_MAX};

/// 1.5 · 2²³: what is added to it is rounded to a whole number, to even on ties.
const ROUND_32: f32 = 12_582_912.0;
/// 1.5 · 2⁵².
const ROUND_64: f64 = 6_755_399_441_055_744.0;
/// Bits of an infinity: those of finite magnitudes are lower, those of what is not a number higher.
const INFINITE: u32 = 0x7f80_0000;

/// The largest bits of a magnitude in a row.
#[inline(always)]
pub(super) fn largest_bits(row: &[f32]) -> u32 {
    row.iter()
        .map(|x| x.to_bits() & (u32::MAX >> 1))
        .fold(0, u32::max)
}

/// Whether bits of a magnitude are those of a finite number.
#[inline(always)]
pub(super) fn finite(bits: u32) -> bool {
    bits < INFINITE
}

/// Inputs in steps of `2^range_log2 / 2¹⁴`, cut at the range. What is not a number becomes some number: whoever holds it counts as zero.
#[inline(always)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the low bits hold the whole number"
)]
pub(super) fn inputs(row: &[f32], range_log2: u32, steps: &mut [i16]) {
    let scale = ((1_u32 << INPUT_LOG2) as f32) / ((1_u32 << range_log2) as f32);
    let most = f32::from(INPUT_MAX);
    for (step, x) in steps.iter_mut().zip(row) {
        let x = x * scale;
        let x = if x > -most { x } else { -most };
        let x = if x < most { x } else { most };
        *step = (x + ROUND_32).to_bits() as i16;
    }
}

/// The factor of errors in steps of `1/per_unit`, so low that none is beyond [`ERROR_MAX`].
#[inline(always)]
pub(super) fn factor(per_unit: f64, largest_bits: u32) -> f64 {
    per_unit.min(f64::from(ERROR_MAX) / f64::from(f32::from_bits(largest_bits)))
}

/// Errors times `factor`, to nearest.
#[inline(always)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the low bits hold the whole number"
)]
pub(super) fn errors(row: &[f32], factor: f64, steps: &mut [i32]) {
    let most = f64::from(ERROR_MAX);
    for (step, x) in steps.iter_mut().zip(row) {
        let x = f64::from(*x) * factor;
        let x = if x > -most { x } else { -most };
        let x = if x < most { x } else { most };
        *step = (x + ROUND_64).to_bits() as i32;
    }
}

/// The digits of two errors, packed for a multiply-add: low digits, high digits.
#[inline(always)]
pub(super) fn digits(first: i32, second: i32) -> [u32; 2] {
    let half = 1 << (DIGIT_LOG2 - 1);
    let low = |x: i32| ((x + half) & ((1 << DIGIT_LOG2) - 1)) - half;
    let high = |x: i32| (x - low(x)) >> DIGIT_LOG2;
    [pair(low(first), low(second)), pair(high(first), high(second))]
}

/// Two numbers of 16 bits in a word.
#[inline(always)]
fn pair(first: i32, second: i32) -> u32 {
    (first.cast_unsigned() & 0xffff) | second.cast_unsigned() << 16
}

/// Two rows of inputs, number by number in one word.
#[inline(always)]
pub(super) fn interleave(first: &[i16], second: &[i16], words: &mut [u32]) {
    for ((word, a), b) in words.iter_mut().zip(first).zip(second) {
        *word = u32::from(a.cast_unsigned()) | u32::from(b.cast_unsigned()) << 16;
    }
}

/// Inner product of two rows of errors.
#[inline(always)]
pub(super) fn dot_errors(one: &[i32], other: &[i32]) -> i64 {
    one.iter()
        .zip(other)
        .map(|(a, b)| i64::from(*a) * i64::from(*b))
        .sum()
}
