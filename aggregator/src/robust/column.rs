//! How a rule of coordinates makes one value of a column.

use pulp::{Arch, Simd, WithSimd};

use super::network::Need;
use super::rows::Scalar;
use super::tiles::LANES;

/// One value from the n values of a coordinate, which come in the order that [`Column::need`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Column {
    /// The mean of ranks `first..=last`, from 0.
    Ranks {
        /// Lowest rank that counts.
        first: usize,
        /// Highest rank that counts.
        last: usize,
    },
    /// The mean of the `keep` values nearest to the median.
    Nearest {
        /// At least one, at most n.
        keep: usize,
    },
}

/// What one tile gives: the values, and the lowest and highest value that counted in each column.
pub(super) type Combination<T> = ([f64; LANES], [[T; LANES]; 2]);

impl Column {
    /// What it reads of the order.
    pub(super) fn need(self) -> Need {
        match self {
            Self::Ranks { first, last } => Need::Between { first, last },
            Self::Nearest { .. } => Need::All,
        }
    }

    /// The values of one tile of columns, `[n][LANES]`.
    pub(super) fn combine<T: Scalar>(self, tile: &[[T; LANES]]) -> Combination<T> {
        Arch::new().dispatch(Combine { column: self, tile })
    }
}

struct Combine<'a, T> {
    column: Column,
    tile: &'a [[T; LANES]],
}

impl<T: Scalar> WithSimd for Combine<'_, T> {
    type Output = Combination<T>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) -> Combination<T> {
        let tile = self.tile;
        match self.column {
            Column::Ranks { first, last } => (mean_of_rows(&tile[first..=last]), [tile[first], tile[last]]),
            Column::Nearest { keep } => nearest(tile, keep),
        }
    }
}

/// The mean of every column, summed in the order of the rows.
#[inline(always)]
fn mean_of_rows<T: Scalar>(rows: &[[T; LANES]]) -> [f64; LANES] {
    let mut sums = [0.0_f64; LANES];
    for lanes in rows {
        for (sum, &value) in sums.iter_mut().zip(lanes) {
            *sum += value.into();
        }
    }
    sums.map(|sum| sum / rows.len() as f64)
}

/// In ascending order the `keep` nearest to the median stand side by side. The window moves up by one as long as the value
/// that leaves it is farther away than the one that enters.
#[inline(always)]
fn nearest<T: Scalar>(tile: &[[T; LANES]], keep: usize) -> Combination<T> {
    let n = tile.len();
    let half = T::round_from(0.5);
    let (below, above) = (&tile[(n - 1) / 2], &tile[n / 2]);
    let mut median = *below;
    for (median, (below, above)) in median.iter_mut().zip(below.iter().zip(above)) {
        *median = if below < above {
            *below * half + *above * half
        } else {
            *below
        };
    }
    let mut firsts = [0_u32; LANES];
    for (leaving, entering) in tile.iter().zip(&tile[keep..]) {
        for lane in 0..LANES {
            let moves = median[lane] - leaving[lane] > entering[lane] - median[lane];
            firsts[lane] += u32::from(moves);
        }
    }
    let mut sums = [0.0_f64; LANES];
    let mut bounds = [*below, *above];
    let keep_rows = u32::try_from(keep).unwrap_or(u32::MAX);
    for (rank, lanes) in (0_u32..).zip(tile) {
        for lane in 0..LANES {
            let inside = rank >= firsts[lane] && rank - firsts[lane] < keep_rows;
            let value: f64 = lanes[lane].into();
            sums[lane] += if inside { value } else { 0.0 };
            bounds[0][lane] = if rank == firsts[lane] {
                lanes[lane]
            } else {
                bounds[0][lane]
            };
            bounds[1][lane] = if inside { lanes[lane] } else { bounds[1][lane] };
        }
    }
    (sums.map(|sum| sum / keep as f64), bounds)
}
