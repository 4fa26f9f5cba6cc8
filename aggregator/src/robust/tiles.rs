//! The passes over memory that all rules share: one that sorts columns or reads them as they are, one that weighs rows.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::column::Column;
use super::mix::Mix;
use super::network::Sorter;
use super::rows::{Rows, Scalar};
use super::{Detail, RowEvidence};

/// Coordinates of one unit of parallel work. Fixed, so that results do not depend on the number of threads.
pub const CHUNK: usize = 4096;
/// Coordinates of one tile: as many columns are sorted side by side, in vector lanes.
pub const LANES: usize = 64;
/// Coordinates that are read of one row at a time: few enough for all rows to stay in cache, enough to read memory in a stream.
const STRIPE: usize = 1024;

/// Rows and what is done to them before a rule sees them.
pub(super) struct Source<'a, T> {
    rows: &'a dyn Rows<T>,
    mixes: &'a [Mix],
}

impl<'a, T: Scalar> Source<'a, T> {
    pub(super) fn new(rows: &'a dyn Rows<T>, mixes: &'a [Mix]) -> Self {
        Self { rows, mixes }
    }

    /// Rows that come out.
    pub(super) fn outputs(&self) -> usize {
        self.mixes.last().map_or_else(|| self.rows.count(), Mix::outputs)
    }

    pub(super) fn columns(&self) -> usize {
        self.rows.dimension()
    }

    pub(super) fn reader(&self) -> Reader<'_, T> {
        Reader {
            source: self,
            raw: Vec::new(),
            spare: Vec::new(),
        }
    }
}

/// Reads stripes of columns; one for each thread, it keeps its buffers.
pub(super) struct Reader<'a, T> {
    source: &'a Source<'a, T>,
    raw: Vec<T>,
    spare: Vec<T>,
}

impl<T: Scalar> Reader<'_, T> {
    /// Columns `start..start + columns` of every row after all mixes, to `[outputs][stride]`.
    pub(super) fn read(&mut self, start: usize, columns: usize, out: &mut [T], stride: usize) {
        let Some((last, first)) = self.source.mixes.split_last() else {
            for (row, out) in out.chunks_mut(stride).take(self.source.rows.count()).enumerate() {
                self.source.rows.read(row, start, &mut out[..columns]);
            }
            return;
        };
        self.read_raw(start, columns);
        for mix in first {
            self.spare.resize(mix.outputs() * columns, T::default());
            mix.apply(&self.raw, &mut self.spare, columns);
            std::mem::swap(&mut self.raw, &mut self.spare);
        }
        self.spare.resize(last.outputs() * columns, T::default());
        last.apply(&self.raw, &mut self.spare, columns);
        for (out, row) in out.chunks_mut(stride).zip(self.spare.chunks(columns)) {
            out[..columns].copy_from_slice(row);
        }
    }

    fn read_raw(&mut self, start: usize, columns: usize) {
        self.raw.resize(self.source.rows.count() * columns, T::default());
        for (row, out) in self.raw.chunks_mut(columns).enumerate() {
            self.source.rows.read(row, start, out);
        }
    }
}

/// Sums over one chunk of columns for one row.
#[derive(Debug, Clone, Copy, Default)]
struct Partial {
    norm_squared: f64,
    distance_squared: f64,
    trimmed: u64,
}

/// Applies `column` to every column of the rows after `mixes`; evidence is about the rows before them.
pub(super) fn combine<T: Scalar>(
    rows: &dyn Rows<T>,
    mixes: &[Mix],
    column: Column,
    detail: Detail,
) -> (Vec<T>, Vec<RowEvidence>) {
    let source = Source::new(rows, mixes);
    let sorter = Sorter::new(source.outputs(), column.need());
    let homes = mixes
        .iter()
        .fold((0..rows.count()).map(Some).collect::<Vec<_>>(), |homes, mix| {
            let next = mix.homes();
            homes
                .into_iter()
                .map(|home| home.and_then(|home| next[home]))
                .collect()
        });
    let work = Work {
        source,
        column,
        sorter,
        homes,
        detail,
    };
    let mut values = vec![T::default(); rows.dimension()];
    let partials: Vec<Vec<Partial>> = values
        .par_chunks_mut(CHUNK)
        .enumerate()
        .map(|(chunk, out)| work.chunk(chunk * CHUNK, out))
        .collect();
    let evidence = match detail {
        Detail::Values => Vec::new(),
        Detail::Evidence => join(&partials, rows.count(), rows.dimension()),
    };
    (values, evidence)
}

struct Work<'a, T> {
    source: Source<'a, T>,
    column: Column,
    sorter: Sorter,
    /// For each row before the mixes, the row after them that speaks for it.
    homes: Vec<Option<usize>>,
    detail: Detail,
}

impl<T: Scalar> Work<'_, T> {
    fn chunk(&self, start: usize, out: &mut [T]) -> Vec<Partial> {
        let n = self.source.outputs();
        let mut reader = self.source.reader();
        let mut stripe = vec![T::default(); n * STRIPE];
        let mut tile = vec![[T::default(); LANES]; n];
        let mut column = Vec::new();
        let mut partials = vec![Partial::default(); self.source.rows.count()];
        let mut bounds = Vec::new();
        for (step, out) in out.chunks_mut(STRIPE).enumerate() {
            let start = start + step * STRIPE;
            reader.read(start, out.len(), &mut stripe, STRIPE);
            bounds.clear();
            for (step, out) in out.chunks_mut(LANES).enumerate() {
                // The last tile may be narrower: what its other lanes give is never read.
                Arch::new().dispatch(Load {
                    stripe: &stripe,
                    step,
                    tile: &mut tile,
                });
                self.sorter.sort(&mut tile, &mut column);
                let (combined, range) = self.column.combine(&tile);
                for (value, sum) in out.iter_mut().zip(combined) {
                    // Adding zero turns -0 into +0, so that equal rows in another order give equal bits.
                    *value = T::round_from(sum + 0.0);
                }
                bounds.push(range);
            }
            if self.detail == Detail::Evidence {
                self.observe(&mut reader, &stripe, start, out, &bounds, &mut partials);
            }
        }
        partials
    }

    fn observe(
        &self,
        reader: &mut Reader<'_, T>,
        stripe: &[T],
        start: usize,
        out: &[T],
        bounds: &[[[T; LANES]; 2]],
        partials: &mut [Partial],
    ) {
        if !self.source.mixes.is_empty() {
            reader.read_raw(start, out.len());
        }
        let mixed = !self.source.mixes.is_empty();
        for (row, partial) in partials.iter_mut().enumerate() {
            let before = if mixed {
                &reader.raw[row * out.len()..]
            } else {
                &stripe[row * STRIPE..]
            };
            let home = self.homes[row].map(|home| &stripe[home * STRIPE..][..out.len()]);
            Arch::new().dispatch(Observe {
                values: &before[..out.len()],
                home,
                out,
                bounds,
                partial,
            });
        }
    }
}

struct Load<'a, T> {
    stripe: &'a [T],
    step: usize,
    tile: &'a mut [[T; LANES]],
}

impl<T: Scalar> WithSimd for Load<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        let pieces = self.stripe.as_chunks::<LANES>().0;
        for (lanes, row) in self.tile.iter_mut().zip(pieces.chunks_exact(STRIPE / LANES)) {
            *lanes = row[self.step];
        }
    }
}

struct Observe<'a, T> {
    values: &'a [T],
    home: Option<&'a [T]>,
    out: &'a [T],
    bounds: &'a [[[T; LANES]; 2]],
    partial: &'a mut Partial,
}

impl<T: Scalar> WithSimd for Observe<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        let Self {
            values,
            home,
            out,
            bounds,
            partial,
        } = self;
        let mut sums = [[0.0_f64; 8]; 2];
        let whole = values.len() / 8 * 8;
        for (values, out) in values.as_chunks::<8>().0.iter().zip(out.as_chunks::<8>().0) {
            for lane in 0..8 {
                let (value, combined): (f64, f64) = (values[lane].into(), out[lane].into());
                let difference = value - combined;
                sums[0][lane] += value * value;
                sums[1][lane] += difference * difference;
            }
        }
        for (value, combined) in values[whole..].iter().zip(&out[whole..]) {
            let (value, combined): (f64, f64) = ((*value).into(), (*combined).into());
            sums[0][0] += value * value;
            sums[1][0] += (value - combined) * (value - combined);
        }
        partial.norm_squared += sums[0].iter().sum::<f64>();
        partial.distance_squared += sums[1].iter().sum::<f64>();
        let Some(home) = home else {
            partial.trimmed += values.len() as u64;
            return;
        };
        for (home, [low, high]) in home.chunks(LANES).zip(bounds) {
            let mut outside = 0_u32;
            for (value, (low, high)) in home.iter().zip(low.iter().zip(high)) {
                outside += u32::from(value < low) + u32::from(value > high);
            }
            partial.trimmed += u64::from(outside);
        }
    }
}

/// Joins chunk results in chunk order.
fn join(partials: &[Vec<Partial>], n: usize, d: usize) -> Vec<RowEvidence> {
    let mut totals = vec![Partial::default(); n];
    for chunk in partials {
        for (total, part) in totals.iter_mut().zip(chunk) {
            total.norm_squared += part.norm_squared;
            total.distance_squared += part.distance_squared;
            total.trimmed += part.trimmed;
        }
    }
    let evidence = |total: Partial| RowEvidence {
        norm: total.norm_squared.sqrt(),
        distance: total.distance_squared.sqrt(),
        trimmed_share: total.trimmed as f64 / d as f64,
    };
    totals.into_iter().map(evidence).collect()
}

/// Rows that are added at a time: the sums are loaded and stored once for all of them.
const TOGETHER: usize = 8;
/// Most coordinates whose sums are held at a time: a row is read in stretches of many pages, and the `f64` sums stay in the cache of the core.
const WIDE: usize = 16 * STRIPE;

/// The weighted sum of the rows, `[d]`, in `f64` in row order; rows of weight 0 are not read. Each coordinate is summed on its own, so the bits do not depend on
/// how the coordinates are shared out.
pub(super) fn weighted_sum<T: Scalar>(rows: &dyn Rows<T>, weights: &[f64]) -> Vec<T> {
    let weighed: Vec<(usize, f64)> = weights
        .iter()
        .copied()
        .enumerate()
        .filter(|(_, weight)| *weight != 0.0)
        .collect();
    let mut values = vec![T::default(); rows.dimension()];
    // Four shares a thread even out what else the cores do.
    let share = rows.dimension().div_ceil(4 * rayon::current_num_threads());
    let width = share.next_multiple_of(STRIPE).clamp(STRIPE, WIDE);
    let scratch = || {
        let buffers: [Vec<T>; TOGETHER] = std::array::from_fn(|_| vec![T::default(); width]);
        (vec![0.0_f64; width], buffers)
    };
    let shares = values.par_chunks_mut(width).enumerate();
    shares.for_each_init(scratch, |(sums, buffers), (share, out)| {
        let (start, columns) = (share * width, out.len());
        let sums = &mut sums[..columns];
        sums.fill(0.0);
        let (groups, rest) = weighed.as_chunks::<TOGETHER>();
        for group in groups {
            let mut values: [&[T]; TOGETHER] = [&[]; TOGETHER];
            for ((place, (row, _)), buffer) in values.iter_mut().zip(group).zip(buffers.iter_mut()) {
                *place = rows.piece(*row, start, &mut buffer[..columns]);
            }
            Arch::new().dispatch(AddWeighted {
                sums: &mut *sums,
                values,
                weights: group.map(|(_, weight)| weight),
            });
        }
        for (row, weight) in rest {
            Arch::new().dispatch(AddOne {
                sums: &mut *sums,
                values: rows.piece(*row, start, &mut buffers[0][..columns]),
                weight: *weight,
            });
        }
        for (value, sum) in out.iter_mut().zip(sums) {
            *value = T::round_from(*sum + 0.0);
        }
    });
    values
}

struct AddWeighted<'a, T> {
    sums: &'a mut [f64],
    values: [&'a [T]; TOGETHER],
    weights: [f64; TOGETHER],
}

impl<T: Scalar> WithSimd for AddWeighted<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        let sums = self.sums;
        // Equal lengths, where the compiler can see them.
        let [ra, rb, rc, rd, re, rf, rg, rh] = self.values.map(|row| &row[..sums.len()]);
        let [wa, wb, wc, wd, we, wf, wg, wh] = self.weights;
        for (column, sum) in sums.iter_mut().enumerate() {
            // One after another in row order: the same bits for any number of rows at a time.
            let total = *sum + wa * ra[column].into();
            let total = total + wb * rb[column].into();
            let total = total + wc * rc[column].into();
            let total = total + wd * rd[column].into();
            let total = total + we * re[column].into();
            let total = total + wf * rf[column].into();
            let total = total + wg * rg[column].into();
            *sum = total + wh * rh[column].into();
        }
    }
}

struct AddOne<'a, T> {
    sums: &'a mut [f64],
    values: &'a [T],
    weight: f64,
}

impl<T: Scalar> WithSimd for AddOne<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        for (sum, value) in self.sums.iter_mut().zip(self.values) {
            *sum += self.weight * (*value).into();
        }
    }
}

/// Norm of each row and its distance to `values`.
pub(super) fn norms_and_distances<T: Scalar>(rows: &dyn Rows<T>, values: &[T]) -> Vec<(f64, f64)> {
    let partials: Vec<Vec<Partial>> = values
        .par_chunks(CHUNK)
        .enumerate()
        .map(|(chunk, out)| {
            let mut buffer = vec![T::default(); out.len()];
            let observe = |row| {
                let mut partial = Partial::default();
                rows.read(row, chunk * CHUNK, &mut buffer);
                Arch::new().dispatch(Observe {
                    values: &buffer,
                    home: Some(&[]),
                    out,
                    bounds: &[],
                    partial: &mut partial,
                });
                partial
            };
            (0..rows.count()).map(observe).collect()
        })
        .collect();
    let evidence = join(&partials, rows.count(), values.len());
    evidence.into_iter().map(|row| (row.norm, row.distance)).collect()
}

/// The rows after `mixes`, `[outputs][d]`.
pub(super) fn mixed_rows<T: Scalar>(rows: &dyn Rows<T>, mixes: &[Mix]) -> Vec<T> {
    let source = Source::new(rows, mixes);
    let d = rows.dimension();
    let mut values = vec![T::default(); source.outputs() * d];
    let mut reader = source.reader();
    let mut stripe = vec![T::default(); source.outputs() * STRIPE];
    for start in (0..d).step_by(STRIPE) {
        let columns = STRIPE.min(d - start);
        reader.read(start, columns, &mut stripe, STRIPE);
        for (out, row) in values.chunks_mut(d).zip(stripe.chunks(STRIPE)) {
            out[start..start + columns].copy_from_slice(&row[..columns]);
        }
    }
    values
}
