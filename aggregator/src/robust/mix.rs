//! What a pre-aggregation comes down to: new rows that are scaled old ones, or means of some of them.

use pulp::{Arch, Simd, WithSimd};

use super::rows::Scalar;

/// New rows from old ones, the same for every coordinate.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Mix {
    /// Row i times factor i.
    Scale(Vec<f64>),
    /// Means of listed rows.
    Means(Means),
}

/// One mean for each list of old rows.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Means {
    /// Old rows of each new one, ascending.
    lists: Vec<Vec<u32>>,
    /// How many old rows there are.
    inputs: usize,
    /// Where lists overlap much: the rows most of them share, and what each list lacks and adds.
    shared: Option<Shared>,
}

#[derive(Debug, Clone, PartialEq)]
struct Shared {
    core: Vec<u32>,
    /// `(missing, added)` of each list.
    changes: Vec<(Vec<u32>, Vec<u32>)>,
    share: f64,
}

impl Mix {
    /// One mean for each list; rows are numbered below `inputs` and `u32::MAX`.
    pub(super) fn means(lists: Vec<Vec<usize>>, inputs: usize) -> Self {
        let lists: Vec<Vec<u32>> = lists
            .into_iter()
            .map(|list| {
                let mut list: Vec<u32> = list
                    .into_iter()
                    .filter_map(|row| u32::try_from(row).ok())
                    .collect();
                list.sort_unstable();
                list
            })
            .collect();
        let shared = Shared::of(&lists, inputs);
        Self::Means(Means {
            lists,
            inputs,
            shared,
        })
    }

    /// How many rows come out.
    pub(super) fn outputs(&self) -> usize {
        match self {
            Self::Scale(factors) => factors.len(),
            Self::Means(means) => means.lists.len(),
        }
    }

    /// Weight of each old row when new rows have `weights`.
    pub(super) fn pull_back(&self, weights: &[f64]) -> Vec<f64> {
        match self {
            Self::Scale(factors) => factors
                .iter()
                .zip(weights)
                .map(|(factor, weight)| factor * weight)
                .collect(),
            Self::Means(means) => {
                let mut old = vec![0.0; means.inputs];
                for (list, weight) in means.lists.iter().zip(weights) {
                    let share = weight / list.len() as f64;
                    for row in list {
                        old[*row as usize] += share;
                    }
                }
                old
            }
        }
    }

    /// The new row that speaks for each old one: its own place, or the first that it is part of; `None` where it is in none.
    pub(super) fn homes(&self) -> Vec<Option<usize>> {
        match self {
            Self::Scale(factors) => (0..factors.len()).map(Some).collect(),
            // Where every new row is made of its own old one first of all, as in nearest-neighbour mixing.
            Self::Means(means)
                if means.lists.len() == means.inputs
                    && (0_u32..).zip(&means.lists).all(|(row, list)| list.contains(&row)) =>
            {
                (0..means.inputs).map(Some).collect()
            }
            Self::Means(means) => {
                let mut homes = vec![None; means.inputs];
                for (new, list) in means.lists.iter().enumerate().rev() {
                    for row in list {
                        homes[*row as usize] = Some(new);
                    }
                }
                homes
            }
        }
    }

    /// New values of a block: `old` is `[inputs][stride]`, `new` `[outputs][stride]`.
    pub(super) fn apply<T: Scalar>(&self, old: &[T], new: &mut [T], stride: usize) {
        Arch::new().dispatch(Apply {
            mix: self,
            old,
            new,
            stride,
        });
    }

    /// The same linear map on a matrix `[points][width]` of `f64` whose last point is the origin, which stays as it is.
    pub(super) fn map_points(&self, old: &[f64], width: usize) -> Vec<f64> {
        let inputs = old.len() / width - 1;
        let origin = &old[inputs * width..];
        let mut new = vec![0.0; (self.outputs() + 1) * width];
        match self {
            Self::Scale(factors) => {
                for ((new, old), factor) in new.chunks_mut(width).zip(old.chunks(width)).zip(factors) {
                    for ((new, old), origin) in new.iter_mut().zip(old).zip(origin) {
                        *new = factor * old + (1.0 - factor) * origin;
                    }
                }
            }
            Self::Means(means) => {
                for (new, list) in new.chunks_mut(width).zip(&means.lists) {
                    let share = 1.0 / list.len() as f64;
                    for row in list {
                        let old = &old[*row as usize * width..][..width];
                        new.iter_mut().zip(old).for_each(|(new, old)| *new += share * old);
                    }
                }
            }
        }
        let at = self.outputs() * width;
        new[at..].copy_from_slice(origin);
        new
    }
}

impl Shared {
    /// `None` where adding up each list is no slower. A row is in the core when most lists have it: with hostile rows in the
    /// minority an honest one has it too, so nothing is added and taken away again that is far from an honest row.
    fn of(lists: &[Vec<u32>], inputs: usize) -> Option<Self> {
        let length = lists.first()?.len();
        if lists.iter().any(|list| list.len() != length) {
            return None;
        }
        let mut counts = vec![0_usize; inputs];
        lists.iter().flatten().for_each(|row| counts[*row as usize] += 1);
        let is_core: Vec<bool> = counts.iter().map(|count| count * 2 > lists.len()).collect();
        let core: Vec<u32> = (0_u32..)
            .zip(&is_core)
            .filter(|(_, core)| **core)
            .map(|(row, _)| row)
            .collect();
        let changes: Vec<(Vec<u32>, Vec<u32>)> = lists
            .iter()
            .map(|list| {
                let missing = core
                    .iter()
                    .copied()
                    .filter(|row| list.binary_search(row).is_err());
                let added = list.iter().copied().filter(|row| !is_core[*row as usize]);
                (missing.collect(), added.collect())
            })
            .collect();
        let cost: usize = changes
            .iter()
            .map(|(missing, added)| missing.len() + added.len() + 1)
            .sum();
        let plain = lists.len() * length;
        (core.len() + cost < plain).then_some(Self {
            core,
            changes,
            share: 1.0 / length as f64,
        })
    }
}

/// Columns that are mixed at a time: a tile of a hundred rows stays in the nearest cache, and the sums of a row in registers.
pub(super) const TILE: usize = 64;

struct Apply<'a, T> {
    mix: &'a Mix,
    old: &'a [T],
    new: &'a mut [T],
    stride: usize,
}

impl<T: Scalar> WithSimd for Apply<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            mix,
            old,
            new,
            stride,
        } = self;
        match mix {
            Mix::Scale(factors) => {
                for ((new, old), factor) in new.chunks_mut(stride).zip(old.chunks(stride)).zip(factors) {
                    let factor = T::round_from(*factor);
                    new.iter_mut()
                        .zip(old)
                        .for_each(|(new, old)| *new = *old * factor);
                }
            }
            Mix::Means(means) => {
                let mut tile = vec![[T::default(); TILE]; means.inputs];
                let mut start = 0;
                while start < stride {
                    let width = TILE.min(stride - start);
                    for (tile, old) in tile.iter_mut().zip(old.chunks(stride)) {
                        copy(&mut tile[..width], &old[start..start + width]);
                    }
                    means.apply_tile(simd, &mut tile, |row, sums| {
                        copy(&mut new[row * stride + start..][..width], &sums[..width]);
                    });
                    start += width;
                }
            }
        }
    }
}

impl Means {
    #[inline(always)]
    fn apply_tile<S: Simd, T: Scalar>(
        &self,
        simd: S,
        tile: &mut [[T; TILE]],
        mut give: impl FnMut(usize, &[T; TILE]),
    ) {
        let Some(shared) = &self.shared else {
            for (row, list) in self.lists.iter().enumerate() {
                if let [only] = list[..] {
                    give(row, &tile[only as usize]);
                    continue;
                }
                let share = T::round_from(1.0 / list.len() as f64);
                let mut sums = [T::default(); TILE];
                for other in list {
                    let lanes = &tile[*other as usize];
                    sums.iter_mut()
                        .zip(lanes)
                        .for_each(|(sum, value)| *sum = *sum + *value * share);
                }
                give(row, &sums);
            }
            return;
        };
        // Shares first: a sum of shares of finite values does not overflow.
        let share = T::round_from(shared.share);
        for lanes in &mut *tile {
            for value in lanes {
                *value = *value * share;
            }
        }
        let core = T::sum_rows(simd, &[T::default(); TILE], &[], &shared.core, tile);
        for (row, (missing, added)) in shared.changes.iter().enumerate() {
            give(row, &T::sum_rows(simd, &core, missing, added, tile));
        }
    }
}

/// A copy whose length is known to the compiler for all tiles but the last: no call for each row.
#[inline(always)]
fn copy<T: Scalar>(to: &mut [T], from: &[T]) {
    match (<&mut [T; TILE]>::try_from(&mut *to), <&[T; TILE]>::try_from(from)) {
        (Ok(to), Ok(from)) => *to = *from,
        _ => to.copy_from_slice(from),
    }
}

/// Sums of rows of a tile, in order, in vectors of one type that stay in registers.
macro_rules! sum_rows {
    ($name:ident, $wide:ident, $scalar:ty, $vector:ident, $lanes:ident, $cast:ident, $cast_mut:ident, $add:ident, $sub:ident) => {
        #[inline(always)]
        pub(super) fn $name<S: Simd>(
            simd: S,
            start: &[$scalar; TILE],
            minus: &[u32],
            plus: &[u32],
            tile: &[[$scalar; TILE]],
        ) -> [$scalar; TILE] {
            match TILE / S::$lanes {
                4 => $wide::<S, 4>(simd, start, minus, plus, tile),
                8 => $wide::<S, 8>(simd, start, minus, plus, tile),
                16 => $wide::<S, 16>(simd, start, minus, plus, tile),
                32 => $wide::<S, 32>(simd, start, minus, plus, tile),
                _ => $wide::<S, TILE>(simd, start, minus, plus, tile),
            }
        }

        #[inline(always)]
        fn $wide<S: Simd, const W: usize>(
            simd: S,
            start: &[$scalar; TILE],
            minus: &[u32],
            plus: &[u32],
            tile: &[[$scalar; TILE]],
        ) -> [$scalar; TILE] {
            let vectors = S::$cast(tile.as_flattened()).0;
            let start = &S::$cast(start).0[..W];
            let mut sums: [S::$vector; W] = std::array::from_fn(|k| start[k]);
            for row in minus {
                let lanes = &vectors[*row as usize * W..][..W];
                for k in 0..W {
                    sums[k] = simd.$sub(sums[k], lanes[k]);
                }
            }
            for row in plus {
                let lanes = &vectors[*row as usize * W..][..W];
                for k in 0..W {
                    sums[k] = simd.$add(sums[k], lanes[k]);
                }
            }
            let mut out = [0.0; TILE];
            let places = &mut S::$cast_mut(&mut out).0[..W];
            for k in 0..W {
                places[k] = sums[k];
            }
            out
        }
    };
}

sum_rows!(
    sum_rows_f32,
    wide_f32,
    f32,
    f32s,
    F32_LANES,
    as_simd_f32s,
    as_mut_simd_f32s,
    add_f32s,
    sub_f32s
);
sum_rows!(
    sum_rows_f64,
    wide_f64,
    f64,
    f64s,
    F64_LANES,
    as_simd_f64s,
    as_mut_simd_f64s,
    add_f64s,
    sub_f64s
);

#[cfg(test)]
mod tests {
    use super::*;

    /// Seven lists of five of seven rows, each with its own among them, and lists of different lengths: with a shared core and without.
    fn mixes() -> [Mix; 3] {
        let neighbours = (0..7)
            .map(|i: usize| (0..7).filter(|j| (i + 7 - j) % 7 < 5).collect())
            .collect();
        let buckets = vec![vec![3, 1, 0], vec![6, 2, 4], vec![5]];
        [
            Mix::means(neighbours, 7),
            Mix::means(buckets, 7),
            Mix::Scale(vec![1.0, 0.5, 2.0, 0.0, 1.0, 0.25, 3.0]),
        ]
    }

    fn dense(mix: &Mix) -> Vec<Vec<f64>> {
        (0..mix.outputs())
            .map(|row| {
                let mut weights = vec![0.0; mix.outputs()];
                weights[row] = 1.0;
                mix.pull_back(&weights)
            })
            .collect()
    }

    #[test]
    fn mixed_values_are_those_of_the_dense_matrix() {
        let stride = 75;
        let old: Vec<f64> = (0..7 * stride).map(|i| (i as f64 * 1.7).sin()).collect();
        for mix in mixes() {
            let mut new = vec![0.0; mix.outputs() * stride];
            mix.apply(&old, &mut new, stride);
            for (row, weights) in dense(&mix).iter().enumerate() {
                for column in 0..stride {
                    let expected: f64 = weights
                        .iter()
                        .enumerate()
                        .map(|(i, w)| w * old[i * stride + column])
                        .sum();
                    assert!((new[row * stride + column] - expected).abs() < 1e-12, "{mix:?}");
                }
            }
        }
    }

    #[test]
    fn neighbours_of_a_crowd_share_a_core_and_buckets_do_not() {
        let [Mix::Means(neighbours), Mix::Means(buckets), _] = mixes() else {
            panic!("means")
        };
        assert!(neighbours.shared.is_some());
        assert!(buckets.shared.is_none());
    }

    #[test]
    fn every_row_has_the_home_that_speaks_for_it() {
        let [neighbours, buckets, scale] = mixes();
        assert_eq!(neighbours.homes(), (0..7).map(Some).collect::<Vec<_>>());
        assert_eq!(scale.homes(), (0..7).map(Some).collect::<Vec<_>>());
        assert_eq!(buckets.homes(), [0, 0, 1, 0, 1, 2, 1].map(Some));
    }
}
