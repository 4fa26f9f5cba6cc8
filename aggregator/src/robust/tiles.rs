//! The one loop over coordinates that every coordinate-wise rule shares.

use rayon::prelude::*;

use super::network::SortingNetwork;
use super::rows::{Rows, Scalar};
use super::{Combined, RowEvidence, RuleError};

/// Coordinates of one unit of parallel work. Fixed, so that results do not depend on the number of threads.
pub const CHUNK: usize = 4096;
/// Coordinates of one tile: as many columns are sorted side by side, one in each vector lane.
pub const LANES: usize = 16;

/// How a coordinate-wise rule makes one value of a column.
pub(super) trait Column: Sync {
    /// Whether columns are handed over in ascending order (else in row order).
    const SORTED: bool;
    /// Which ranks of `n` the rule keeps; values outside count as trimmed.
    fn kept(&self, n: usize) -> std::ops::RangeInclusive<usize>;
    /// The combined values of one tile of columns `[n][LANES]`.
    fn combine<T: Scalar>(&self, tile: &[[T; LANES]]) -> [f64; LANES];
}

/// Sums over one chunk of columns for one row.
#[derive(Debug, Clone, Copy, Default)]
struct Partial {
    norm_squared: f64,
    distance_squared: f64,
    trimmed: u64,
}

/// Applies `rule` to every column.
pub(super) fn combine<T: Scalar, C: Column>(rule: &C, rows: &dyn Rows<T>) -> Result<Combined<T>, RuleError> {
    let (n, d) = (rows.count(), rows.dimension());
    if n == 0 {
        return Err(RuleError::NoRows);
    }
    if d == 0 {
        return Err(RuleError::NoColumns);
    }
    let network = if C::SORTED {
        SortingNetwork::for_rows(n)
    } else {
        None
    };
    let mut values = vec![T::default(); d];
    let partials: Vec<Vec<Partial>> = values
        .par_chunks_mut(CHUNK)
        .enumerate()
        .map(|(chunk, out)| combine_chunk(rule, rows, network.as_ref(), chunk * CHUNK, out))
        .collect();
    Ok(Combined {
        values,
        evidence: join(&partials, n, d),
    })
}

fn combine_chunk<T: Scalar, C: Column>(
    rule: &C,
    rows: &dyn Rows<T>,
    network: Option<&SortingNetwork>,
    start: usize,
    out: &mut [T],
) -> Vec<Partial> {
    let n = rows.count();
    let kept = rule.kept(n);
    let mut partials = vec![Partial::default(); n];
    let mut tile = vec![[T::default(); LANES]; n];
    let mut sorted = tile.clone();
    let mut column = Vec::with_capacity(n);
    for (step, out) in out.chunks_mut(LANES).enumerate() {
        for (row, lanes) in tile.iter_mut().enumerate() {
            // The last tile may be narrower; its unused lanes stay as they are and are never read.
            rows.read(row, start + step * LANES, &mut lanes[..out.len()]);
        }
        let mut bounds = None;
        let combined = if C::SORTED {
            sorted.copy_from_slice(&tile);
            match network {
                Some(network) => network.sort(&mut sorted),
                None => sort_columns(&mut sorted, &mut column),
            }
            bounds = Some((sorted[*kept.start()], sorted[*kept.end()]));
            rule.combine(&sorted)
        } else {
            rule.combine(&tile)
        };
        for (value, sum) in out.iter_mut().zip(combined) {
            // Adding zero turns -0 into +0, so that equal rows in another order give equal bits.
            *value = T::round_from(sum + 0.0);
        }
        for (partial, lanes) in partials.iter_mut().zip(&tile) {
            observe(partial, &lanes[..out.len()], out, bounds.as_ref());
        }
    }
    partials
}

fn observe<T: Scalar>(
    partial: &mut Partial,
    lanes: &[T],
    out: &[T],
    bounds: Option<&([T; LANES], [T; LANES])>,
) {
    for (&value, &combined) in lanes.iter().zip(out) {
        let (value, combined): (f64, f64) = (value.into(), combined.into());
        partial.norm_squared += value * value;
        partial.distance_squared += (value - combined) * (value - combined);
    }
    if let Some((low, high)) = bounds {
        let outside = lanes
            .iter()
            .zip(low.iter().zip(high))
            .filter(|(value, (low, high))| value < low || value > high);
        partial.trimmed += outside.count() as u64;
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

/// For rounds too large for a network: one column after another.
fn sort_columns<T: Scalar>(tile: &mut [[T; LANES]], column: &mut Vec<T>) {
    for lane in 0..LANES {
        column.clear();
        column.extend(tile.iter().map(|lanes| lanes[lane]));
        column.sort_unstable_by(Scalar::order);
        tile.iter_mut()
            .zip(&*column)
            .for_each(|(lanes, value)| lanes[lane] = *value);
    }
}

/// The mean of every column, summed in the order of the rows.
pub(super) fn mean_of_rows<T: Scalar>(rows: &[[T; LANES]]) -> [f64; LANES] {
    let mut sums = [0.0_f64; LANES];
    for lanes in rows {
        for (sum, &value) in sums.iter_mut().zip(lanes) {
            *sum += value.into();
        }
    }
    sums.map(|sum| sum / rows.len() as f64)
}
