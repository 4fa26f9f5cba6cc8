//! Columns in order. Up to [`NETWORK_ROWS_MAX`] rows by a network that works on [`LANES`] columns at once in vector minima and
//! maxima, several times faster than sorting column by column.
//!
//! Stores to the nearest cache are what limits such a network, not comparisons: so rows go through in groups of eight or
//! four that stay in registers for two or three levels (Batcher's bitonic merge in its ascending form, Knuth, The Art of
//! Computer Programming, volume 3, section 5.3.4, exercise on merges that begin with a flip; groups of eight are sorted by the best known
//! network, 19 comparators, ibid. figure 51). That is more comparators than in Batcher's merge exchange and half the time.

use pulp::{Arch, Simd, WithSimd};

use super::rows::Scalar;
use super::tiles::LANES;

/// Largest number of rows for a network; above it, sorting each column is faster.
const NETWORK_ROWS_MAX: usize = 1024;

/// What a rule reads of the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// Every rank where it belongs.
    All,
    /// Ranks `first` and `last` where they belong, those between them somewhere between them.
    Between {
        /// Lowest rank that counts, from 0.
        first: usize,
        /// Highest.
        last: usize,
    },
}

/// Puts the values of some ranks where they belong.
#[derive(Debug)]
pub(super) enum Sorter {
    /// Which comparators run depends on the number of rows and the need alone, never on the values.
    Network(Vec<Op>),
    /// One column after another.
    Columns(Need),
}

impl Sorter {
    /// For `rows` rows.
    pub(super) fn new(rows: usize, need: Need) -> Self {
        if rows <= NETWORK_ROWS_MAX {
            Self::Network(pruned(merge_sort(rows), rows, need))
        } else {
            Self::Columns(need)
        }
    }

    /// Sorts every column ascending as far as needed; `columns` is room for a tile.
    pub(super) fn sort<T: Scalar>(&self, tile: &mut [[T; LANES]], columns: &mut Vec<T>) {
        match self {
            Self::Network(ops) => Arch::new().dispatch(Run { ops, tile }),
            Self::Columns(need) => order_columns(tile, columns, *need),
        }
    }
}

/// Comparators on a few rows, the least value to the lowest row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// One comparator.
    Pair([u16; 2]),
    /// Outer against outer, inner against inner, then neighbours: two levels.
    Flip4([u16; 4]),
    /// Half distance, then neighbours.
    Halve4([u16; 4]),
    /// Outer against outer, then halves, then neighbours: three levels.
    Flip8([u16; 8]),
    /// Half distance, quarter distance, neighbours.
    Halve8([u16; 8]),
    /// Any order to ascending.
    Sort8([u16; 8]),
}

const PAIR: &[(usize, usize)] = &[(0, 1)];
const FLIP_4: &[(usize, usize)] = &[(0, 3), (1, 2), (0, 1), (2, 3)];
const HALVE_4: &[(usize, usize)] = &[(0, 2), (1, 3), (0, 1), (2, 3)];
const HALVE_8: &[(usize, usize)] = &[
    (0, 4),
    (1, 5),
    (2, 6),
    (3, 7),
    (0, 2),
    (1, 3),
    (4, 6),
    (5, 7),
    (0, 1),
    (2, 3),
    (4, 5),
    (6, 7),
];
const FLIP_8: &[(usize, usize)] = &[
    (0, 7),
    (1, 6),
    (2, 5),
    (3, 4),
    (0, 2),
    (1, 3),
    (4, 6),
    (5, 7),
    (0, 1),
    (2, 3),
    (4, 5),
    (6, 7),
];
const SORT_8: &[(usize, usize)] = &[
    (0, 1),
    (2, 3),
    (4, 5),
    (6, 7),
    (0, 2),
    (1, 3),
    (4, 6),
    (5, 7),
    (1, 2),
    (5, 6),
    (0, 4),
    (3, 7),
    (1, 5),
    (2, 6),
    (1, 4),
    (3, 6),
    (2, 4),
    (3, 5),
    (3, 4),
];

impl Op {
    fn rows(&self) -> &[u16] {
        match self {
            Self::Pair(rows) => rows,
            Self::Flip4(rows) | Self::Halve4(rows) => rows,
            Self::Flip8(rows) | Self::Halve8(rows) | Self::Sort8(rows) => rows,
        }
    }

    /// Its comparators in order, as rows.
    fn comparators(&self) -> impl DoubleEndedIterator<Item = [u16; 2]> + '_ {
        let pattern = match self {
            Self::Pair(_) => PAIR,
            Self::Flip4(_) => FLIP_4,
            Self::Halve4(_) => HALVE_4,
            Self::Flip8(_) => FLIP_8,
            Self::Halve8(_) => HALVE_8,
            Self::Sort8(_) => SORT_8,
        };
        pattern
            .iter()
            .map(move |(low, high)| [self.rows()[*low], self.rows()[*high]])
    }
}

/// A network for `rows` rows: one for the next power of two whose last rows are infinite, without what touches those.
fn merge_sort(rows: usize) -> Vec<Op> {
    let size = rows.next_power_of_two().max(8);
    let mut ops: Vec<Op> = (0..size)
        .step_by(8)
        .map(|base| Op::Sort8(every(base, 1)))
        .collect();
    let mut merged = 16;
    while merged <= size {
        for base in (0..size).step_by(merged) {
            merge(base, merged, &mut ops);
        }
        merged *= 2;
    }
    let inside = |row: &u16| usize::from(*row) < rows;
    let keep = |op: Op| -> Vec<Op> {
        if op.rows().iter().all(inside) {
            return vec![op];
        }
        op.comparators()
            .filter(|pair| pair.iter().all(inside))
            .map(Op::Pair)
            .collect()
    };
    ops.into_iter().flat_map(keep).collect()
}

/// Merges the two sorted halves of `base..base + size`, size 16 or more.
fn merge(base: usize, size: usize, ops: &mut Vec<Op>) {
    let mirrored = |row: usize| 2 * base + size - 1 - row;
    // The levels above the groups of eight side by side: the flip, then distances size/4 down to 8.
    let mut distance = match size.ilog2() {
        4 => {
            ops.extend((base..base + 8).map(|row| Op::Pair(rows([row, mirrored(row)]))));
            4
        }
        5 | 7 => {
            let step = size / 4;
            ops.extend(
                (base..base + step)
                    .map(|row| Op::Flip4(rows([row, row + step, mirrored(row + step), mirrored(row)]))),
            );
            step / 2
        }
        _ => {
            let step = size / 8;
            ops.extend((base..base + step).map(|row| {
                let low: [usize; 4] = std::array::from_fn(|k| row + k * step);
                let [a, b, c, d] = low;
                Op::Flip8(rows([
                    a,
                    b,
                    c,
                    d,
                    mirrored(d),
                    mirrored(c),
                    mirrored(b),
                    mirrored(a),
                ]))
            }));
            step / 2
        }
    };
    while distance >= 8 {
        // Two levels at a time, three where that leaves none alone.
        let (levels, step) = match distance {
            8 => (1, 8),
            32 => (3, 8),
            _ => (2, distance / 2),
        };
        for block in (base..base + size).step_by(step << levels) {
            ops.extend((block..block + step).map(|row| match levels {
                1 => Op::Pair(rows([row, row + step])),
                2 => Op::Halve4(every(row, step)),
                _ => Op::Halve8(every(row, step)),
            }));
        }
        distance = step / 2;
    }
    ops.extend(
        (base..base + size)
            .step_by(8)
            .map(|row| Op::Halve8(every(row, 1))),
    );
}

fn every<const N: usize>(from: usize, step: usize) -> [u16; N] {
    rows(std::array::from_fn(|k| from + k * step))
}

fn rows<const N: usize>(rows: [usize; N]) -> [u16; N] {
    rows.map(|row| u16::try_from(row).unwrap_or(u16::MAX))
}

/// Leaves out, from the last comparator to the first, those whose outputs nobody tells apart: both below the ranks that
/// count, both above them, or both strictly between.
fn pruned(ops: Vec<Op>, rows: usize, need: Need) -> Vec<Op> {
    const ALONE: u8 = 3;
    let mut class: Vec<u8> = (0..rows)
        .map(|rank| match need {
            Need::All => ALONE,
            Need::Between { first, last } if rank == first || rank == last => ALONE,
            Need::Between { first, last } => u8::from(rank > first) + u8::from(rank > last),
        })
        .collect();
    let mut kept = Vec::new();
    for op in ops.into_iter().rev() {
        let all = op.comparators().count();
        let mut live = Vec::new();
        for pair in op.comparators().rev() {
            let [low, high] = pair.map(usize::from);
            if class[low] != class[high] || class[low] == ALONE {
                (class[low], class[high]) = (ALONE, ALONE);
                live.push(Op::Pair(pair));
            }
        }
        // A whole group costs about as much as a third of its comparators one by one; the rest of it does no harm.
        if live.len() * 3 > all {
            kept.push(op);
        } else {
            kept.extend(live);
        }
    }
    kept.reverse();
    kept
}

struct Run<'a, T> {
    ops: &'a [Op],
    tile: &'a mut [[T; LANES]],
}

impl<T: Scalar> WithSimd for Run<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        T::sort(simd, self.ops, self.tile);
    }
}

/// Loads rows to registers, runs comparators `low high` on them, and stores them: written out, so that they stay there.
macro_rules! exchange {
    ($vectors:ident, $rows:ident, $width:ident, $lane:ident, $simd:ident, $min:ident, $max:ident; $($low:literal $high:literal),+) => {{
        let at = $rows.map(|row| usize::from(row) * $width + $lane);
        let mut registers = at.map(|at| $vectors[at]);
        $({
            let (a, b) = (registers[$low], registers[$high]);
            registers[$low] = $simd.$min(a, b);
            registers[$high] = $simd.$max(a, b);
        })+
        for (at, register) in at.iter().zip(&registers) {
            $vectors[*at] = *register;
        }
    }};
}

/// The network on vectors of one type.
macro_rules! network {
    ($name:ident, $scalar:ty, $lanes:ident, $cast:ident, $min:ident, $max:ident) => {
        #[inline(always)]
        pub(super) fn $name<S: Simd>(simd: S, ops: &[Op], tile: &mut [[$scalar; LANES]]) {
            let width = LANES / S::$lanes;
            let v = S::$cast(tile.as_flattened_mut()).0;
            for op in ops {
                for lane in 0..width {
                    match op {
                        Op::Pair(rows) => exchange!(v, rows, width, lane, simd, $min, $max; 0 1),
                        Op::Flip4(rows) => {
                            exchange!(v, rows, width, lane, simd, $min, $max; 0 3, 1 2, 0 1, 2 3);
                        }
                        Op::Halve4(rows) => {
                            exchange!(v, rows, width, lane, simd, $min, $max; 0 2, 1 3, 0 1, 2 3);
                        }
                        Op::Flip8(rows) => exchange!(v, rows, width, lane, simd, $min, $max;
                            0 7, 1 6, 2 5, 3 4, 0 2, 1 3, 4 6, 5 7, 0 1, 2 3, 4 5, 6 7),
                        Op::Halve8(rows) => exchange!(v, rows, width, lane, simd, $min, $max;
                            0 4, 1 5, 2 6, 3 7, 0 2, 1 3, 4 6, 5 7, 0 1, 2 3, 4 5, 6 7),
                        Op::Sort8(rows) => exchange!(v, rows, width, lane, simd, $min, $max;
                            0 1, 2 3, 4 5, 6 7, 0 2, 1 3, 4 6, 5 7, 1 2, 5 6, 0 4, 3 7, 1 5, 2 6, 1 4, 3 6, 2 4, 3 5, 3 4),
                    }
                }
            }
        }
    };
}

network!(sort_f32, f32, F32_LANES, as_mut_simd_f32s, min_f32s, max_f32s);
network!(sort_f64, f64, F64_LANES, as_mut_simd_f64s, min_f64s, max_f64s);

/// For rounds too large for a network. Where the ranks between two are read as a set, two selections do, in linear time.
/// Columns are laid out one after another first: a tile of thousands of rows does not fit in the nearest caches.
fn order_columns<T: Scalar>(tile: &mut [[T; LANES]], columns: &mut Vec<T>, need: Need) {
    let rows = tile.len();
    columns.resize(rows * LANES, T::default());
    for (row, lanes) in tile.iter().enumerate() {
        for (lane, value) in lanes.iter().enumerate() {
            columns[lane * rows + row] = *value;
        }
    }
    for column in columns.chunks_mut(rows) {
        match need {
            Need::All => column.sort_unstable_by(Scalar::order),
            Need::Between { first, last } => {
                let (_, _, above) = column.select_nth_unstable_by(first, Scalar::order);
                if last > first {
                    above.select_nth_unstable_by(last - first - 1, Scalar::order);
                }
            }
        }
    }
    for (row, lanes) in tile.iter_mut().enumerate() {
        for (lane, value) in lanes.iter_mut().enumerate() {
            *value = columns[lane * rows + row];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted<T: Scalar>(rows: usize, need: Need, value: impl Fn(usize, usize) -> T) -> Vec<[T; LANES]> {
        let mut tile: Vec<[T; LANES]> = (0..rows)
            .map(|row| std::array::from_fn(|lane| value(row, lane)))
            .collect();
        Sorter::new(rows, need).sort(&mut tile, &mut Vec::new());
        tile
    }

    /// A network that sorts every sequence of zeros and ones sorts everything (Knuth, theorem Z); random columns of many
    /// values are the affordable form of it above 16 rows.
    #[test]
    fn sorts_every_number_of_rows() {
        for rows in 1..=16_usize {
            for bits in (0..1_u32 << rows).step_by(LANES) {
                let tile = sorted(rows, Need::All, |row, lane| {
                    ((bits as usize + lane) >> row & 1) as f32
                });
                for lane in 0..LANES {
                    let ascending = tile.windows(2).all(|pair| pair[0][lane] <= pair[1][lane]);
                    assert!(ascending, "{rows} rows, {bits:b}");
                }
            }
        }
        let value = |row: usize, lane: usize| ((row * 7_919 + lane * 104_729) % 1_009) as f64;
        for rows in (17..=130).chain([255, 256, 257, 511, 513, 1023, 1024, 1025]) {
            let tile = sorted(rows, Need::All, value);
            for lane in 0..LANES {
                let mut expected: Vec<f64> = (0..rows).map(|row| value(row, lane)).collect();
                expected.sort_by(f64::total_cmp);
                assert!(tile.iter().map(|lanes| lanes[lane]).eq(expected), "{rows} rows");
            }
        }
    }

    /// The ranks at both ends are right and those between them are the right ones, whatever was left out for them.
    #[test]
    fn a_pruned_network_separates_the_ranks_that_count() {
        let value = |row: usize, lane: usize| ((row * 7_919 + lane * 104_729) % 100_003) as f32;
        for rows in [1, 2, 3, 7, 8, 9, 30, 31, 33, 64, 100, 128, 200, 600, 1500] {
            for first in [0, rows / 10, rows * 3 / 10, (rows - 1) / 2] {
                let last = rows - 1 - first;
                let tile = sorted(rows, Need::Between { first, last }, value);
                for lane in 0..LANES {
                    let mut expected: Vec<f32> = (0..rows).map(|row| value(row, lane)).collect();
                    expected.sort_by(f32::total_cmp);
                    let mut kept: Vec<f32> = tile[first..=last].iter().map(|lanes| lanes[lane]).collect();
                    let says = format!("{rows} rows, {first} to {last}");
                    assert_eq!(
                        (kept[0], kept[last - first]),
                        (expected[first], expected[last]),
                        "{says}"
                    );
                    kept.sort_by(f32::total_cmp);
                    assert_eq!(kept, expected[first..=last], "{says}");
                }
            }
        }
    }

    #[test]
    fn what_nobody_reads_is_left_out() {
        let comparators = |need| -> usize {
            pruned(merge_sort(100), 100, need)
                .iter()
                .map(|op| op.comparators().count())
                .sum()
        };
        let (all, trimmed) = (
            comparators(Need::All),
            comparators(Need::Between { first: 30, last: 69 }),
        );
        assert!(trimmed * 10 < all * 9, "{trimmed} of {all}");
    }
}
