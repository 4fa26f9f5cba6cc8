//! Where a rule reads its rows from.

use std::ops::{Add, Mul, Sub};

use bytes::Bytes;
use pulp::Simd;
use theriac_protocol::compress::payload_len;
use theriac_protocol::message::Encoding;

use super::mix::{self, TILE};
use super::network::{self, Op};
use super::placed::PlacedRow;
use super::tiles::LANES;
use super::{RuleError, kernel};

/// A number that rules work on: `f32` on the network, `f64` at the command line as well.
pub trait Scalar:
    Copy
    + Default
    + PartialOrd
    + Send
    + Sync
    + Into<f64>
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + std::fmt::Debug
    + 'static
{
    /// Largest magnitude whose squares, summed over any number of columns, are finite in `f64`.
    const SQUARE_MAX: f64;
    /// Rounds a sum back.
    fn round_from(value: f64) -> Self;
    /// A total order; all values are finite, so only the two zeros are told apart.
    fn order(&self, other: &Self) -> std::cmp::Ordering;
    /// Scales a block of a row by a power of two where its squares would not fit; what one unit then stands for.
    fn bring_in_range(row: &mut [Self]) -> f64;
    /// Runs the comparators of a sorting network on a tile of columns.
    #[doc(hidden)]
    fn sort<S: Simd>(simd: S, ops: &[Op], tile: &mut [[Self; LANES]]);
    /// `start` less the rows `minus` and plus the rows `plus` of a tile, one after another.
    #[doc(hidden)]
    fn sum_rows<S: Simd>(
        simd: S,
        start: &[Self; TILE],
        minus: &[u32],
        plus: &[u32],
        tile: &[[Self; TILE]],
    ) -> [Self; TILE];
    /// Sum of squares, roughly: it only decides which rows the centre of a block is made of.
    fn square_sum(row: &[Self]) -> f64;
    /// Calls `take(i, j, sum)` with the inner products of rows `i ≥ j` of `[rows][1024]` values.
    fn inner_products<S: Simd>(simd: S, values: &[Self], take: &mut impl FnMut(usize, usize, f64));
}

impl Scalar for f32 {
    const SQUARE_MAX: f64 = f64::INFINITY;

    #[expect(
        clippy::cast_possible_truncation,
        reason = "this is the one rounding of a sum"
    )]
    #[inline(always)]
    fn round_from(value: f64) -> Self {
        value as Self
    }
    fn order(&self, other: &Self) -> std::cmp::Ordering {
        self.total_cmp(other)
    }
    #[inline(always)]
    fn bring_in_range(row: &mut [Self]) -> f64 {
        kernel::bring_in_range_f32(row)
    }
    #[inline(always)]
    fn sort<S: Simd>(simd: S, ops: &[Op], tile: &mut [[Self; LANES]]) {
        network::sort_f32(simd, ops, tile);
    }
    #[inline(always)]
    fn sum_rows<S: Simd>(
        simd: S,
        start: &[Self; TILE],
        minus: &[u32],
        plus: &[u32],
        tile: &[[Self; TILE]],
    ) -> [Self; TILE] {
        mix::sum_rows_f32(simd, start, minus, plus, tile)
    }
    #[inline(always)]
    fn square_sum(row: &[Self]) -> f64 {
        kernel::square_sum_f32(row)
    }
    #[inline(always)]
    fn inner_products<S: Simd>(simd: S, values: &[Self], take: &mut impl FnMut(usize, usize, f64)) {
        kernel::inner_products_f32(simd, values, take);
    }
}

impl Scalar for f64 {
    const SQUARE_MAX: f64 = 1e153;

    #[inline(always)]
    fn round_from(value: f64) -> Self {
        value
    }
    fn order(&self, other: &Self) -> std::cmp::Ordering {
        self.total_cmp(other)
    }
    #[inline(always)]
    fn bring_in_range(_row: &mut [Self]) -> f64 {
        1.0
    }
    #[inline(always)]
    fn sort<S: Simd>(simd: S, ops: &[Op], tile: &mut [[Self; LANES]]) {
        network::sort_f64(simd, ops, tile);
    }
    #[inline(always)]
    fn sum_rows<S: Simd>(
        simd: S,
        start: &[Self; TILE],
        minus: &[u32],
        plus: &[u32],
        tile: &[[Self; TILE]],
    ) -> [Self; TILE] {
        mix::sum_rows_f64(simd, start, minus, plus, tile)
    }
    #[inline(always)]
    fn square_sum(row: &[Self]) -> f64 {
        row.iter().map(|value| value * value).sum()
    }
    #[inline(always)]
    fn inner_products<S: Simd>(_simd: S, values: &[Self], take: &mut impl FnMut(usize, usize, f64)) {
        kernel::inner_products_f64(values, take);
    }
}

/// `n` rows of `d` finite values each.
pub trait Rows<T>: Sync {
    /// Number of rows, n.
    fn count(&self) -> usize;
    /// Number of values in each row, d.
    fn dimension(&self) -> usize;
    /// Copies values `start..start + out.len()` of one row.
    fn read(&self, row: usize, start: usize, out: &mut [T]);
    /// The same without a copy where the values are in memory as they are; else in `buffer`.
    fn piece<'a>(&'a self, row: usize, start: usize, buffer: &'a mut [T]) -> &'a [T] {
        self.read(row, start, buffer);
        buffer
    }
}

/// A stored update: its payload as it came.
#[derive(Debug, Clone)]
pub struct Row {
    /// How the payload is written.
    pub encoding: Encoding,
    /// The values' bytes.
    pub payload: Bytes,
}

/// Rows read straight from stored payloads, in memory or in a file.
#[derive(Debug)]
pub struct PayloadRows {
    rows: Vec<PlacedRow>,
    dimension: usize,
}

impl PayloadRows {
    /// Takes payloads of `dimension` values each.
    ///
    /// # Errors
    /// [`RuleError::Ragged`] when a payload has another length than its encoding says.
    pub fn new<R: Into<PlacedRow>>(rows: Vec<R>, dimension: u32) -> Result<Self, RuleError> {
        let expected = usize::try_from(dimension).unwrap_or(usize::MAX);
        let rows: Vec<PlacedRow> = rows.into_iter().map(Into::into).collect();
        for (row, placed) in rows.iter().enumerate() {
            let (encoding, found) = (placed.encoding(), placed.bytes());
            if payload_len(encoding, dimension) != Some(found) {
                let width = payload_len(encoding, 1).unwrap_or(1).max(1);
                return Err(RuleError::Ragged {
                    row,
                    expected,
                    found: found / width,
                });
            }
        }
        Ok(Self {
            rows,
            dimension: expected,
        })
    }
}

impl Rows<f32> for PayloadRows {
    fn count(&self) -> usize {
        self.rows.len()
    }
    fn dimension(&self) -> usize {
        self.dimension
    }
    fn read(&self, row: usize, start: usize, out: &mut [f32]) {
        self.rows[row].read(start, out);
    }
}

/// A matrix in memory, row after row.
#[derive(Debug, Clone, PartialEq)]
pub struct MatrixRows<T> {
    values: Vec<T>,
    dimension: usize,
    count: usize,
}

impl<T: Scalar> MatrixRows<T> {
    /// Takes `[n, d]` values.
    ///
    /// # Errors
    /// [`RuleError::Ragged`] when there are not `count × dimension`.
    pub fn new(values: Vec<T>, count: usize, dimension: usize) -> Result<Self, RuleError> {
        if count.checked_mul(dimension) == Some(values.len()) {
            Ok(Self {
                values,
                dimension,
                count,
            })
        } else {
            let found = values.len().checked_rem(dimension).unwrap_or_default();
            Err(RuleError::Ragged {
                row: values.len().checked_div(dimension).unwrap_or(0),
                expected: dimension,
                found,
            })
        }
    }

    /// Takes one vector a row.
    ///
    /// # Errors
    /// [`RuleError::Ragged`] when they differ in length.
    pub fn from_rows<R: AsRef<[T]>>(rows: &[R]) -> Result<Self, RuleError> {
        let dimension = rows.first().map_or(0, |row| row.as_ref().len());
        for (row, found) in rows.iter().map(|row| row.as_ref().len()).enumerate() {
            if found != dimension {
                return Err(RuleError::Ragged {
                    row,
                    expected: dimension,
                    found,
                });
            }
        }
        let values = rows.iter().flat_map(|row| row.as_ref().iter().copied()).collect();
        Ok(Self {
            values,
            dimension,
            count: rows.len(),
        })
    }
}

impl<T: Scalar> Rows<T> for MatrixRows<T> {
    fn count(&self) -> usize {
        self.count
    }
    fn dimension(&self) -> usize {
        self.dimension
    }
    fn read(&self, row: usize, start: usize, out: &mut [T]) {
        let at = row * self.dimension + start;
        out.copy_from_slice(&self.values[at..at + out.len()]);
    }
    fn piece<'a>(&'a self, row: usize, start: usize, buffer: &'a mut [T]) -> &'a [T] {
        &self.values[row * self.dimension + start..][..buffer.len()]
    }
}
