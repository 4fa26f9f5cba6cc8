//! Clipping: the only thing that bounds what one unit can change.
//!
//! **Sensitivity.** Each unit's vector is scaled to L2 norm at most C, truncated towards zero onto a fixed public grid, and checked
//! in 128-bit integers: `Σ x² ≤ K²` with `K = ⌊2²⁰/σ⌋` (see `grid.rs`). The sum of the units is a sum of integers, so it is exact in any order.
//! Adding or removing one unit moves the sum by at most `K` steps, that is by at most C, with no rounding to argue about. A block that is cut into n
//! windows has each of them bounded by `⌊K/n⌋` steps instead, that is by at most C/n: see [`crate::windows`].
//!
//! A unit that holds a NaN or an infinity counts as zero, before its norm is taken: it can neither spoil the sum nor
//! end the round.

use theriac_protocol::units::{L2Norm, NoiseMultiplier};

use crate::grid::Grid;

/// A sum of clipped units on the grid. Its values are private: only noise makes them public.
pub struct GridSum {
    clip_norm: L2Norm,
    grid: Grid,
    /// Parts of a block: the bound of one vector is this part of C and of K.
    parts: u32,
    sum: Vec<i64>,
}

impl GridSum {
    /// The empty sum of `values` numbers.
    pub(crate) fn new(values: usize, clip_norm: L2Norm, noise_multiplier: NoiseMultiplier) -> Self {
        Self::of_parts(values, clip_norm, noise_multiplier, 1)
    }

    /// The same for vectors of which a block gives `parts`, at least 1.
    pub(crate) fn of_parts(
        values: usize,
        clip_norm: L2Norm,
        noise_multiplier: NoiseMultiplier,
        parts: u32,
    ) -> Self {
        Self {
            clip_norm,
            grid: Grid::new(clip_norm, noise_multiplier),
            parts: parts.max(1),
            sum: vec![0; values],
        }
    }

    /// Clips one unit and adds it.
    pub(crate) fn add(&mut self, unit: &[f32]) {
        debug_assert_eq!(
            unit.len(),
            self.sum.len(),
            "LocalUpdate checks every unit's length"
        );
        let bound = self.clip_norm.value() / f64::from(self.parts);
        let clipped = clip(unit, bound, self.unit_norm_max(), self.grid);
        for (total, x) in self.sum.iter_mut().zip(clipped) {
            *total += x;
        }
    }

    /// Adds a sum of units that were clipped elsewhere to [`Self::unit_norm_max`].
    pub(crate) fn add_clipped(&mut self, steps: impl Iterator<Item = i64>) {
        for (total, x) in self.sum.iter_mut().zip(steps) {
            *total += x;
        }
    }

    /// ⌊K/parts⌋: the largest norm of one vector, in steps.
    pub(crate) fn unit_norm_max(&self) -> i64 {
        self.grid.norm_max() / i64::from(self.parts)
    }

    /// Number of values.
    pub(crate) fn len(&self) -> usize {
        self.sum.len()
    }

    /// The sum in steps.
    pub(crate) fn steps(&self) -> &[i64] {
        &self.sum
    }

    /// The grid.
    pub(crate) fn grid(&self) -> Grid {
        self.grid
    }
}

impl std::fmt::Debug for GridSum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GridSum")
            .field("clip_norm", &self.clip_norm)
            .field("values", &self.len())
            .finish_non_exhaustive()
    }
}

/// One unit, clipped to `bound` and to `norm_max` steps, in steps of the grid. Its norm is taken in `f64`.
fn clip(unit: &[f32], bound: f64, norm_max: i64, grid: Grid) -> Vec<i64> {
    if norm_max == 0 || unit.iter().any(|x| !x.is_finite()) {
        return vec![0; unit.len()];
    }
    let norm = unit.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let norm_max = i128::from(norm_max);
    // C is 2²⁰/σ steps, of which K are whole.
    let mut factor = (bound / norm.max(bound) / grid.step()).min(norm_max as f64 / norm);
    loop {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "no coordinate exceeds the norm of 2^40 steps by more than rounding"
        )]
        let steps: Vec<i64> = unit.iter().map(|x| (f64::from(*x) * factor) as i64).collect();
        let squares: i128 = steps.iter().map(|x| i128::from(*x).pow(2)).sum();
        if squares <= norm_max.pow(2) {
            return steps;
        }
        // Rounding left it a hair too long; shrink until the integers agree.
        factor *= 1.0 - 1e-12;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn norm(value: f64) -> L2Norm {
        L2Norm::new(value).unwrap()
    }

    fn sigma(value: f64) -> NoiseMultiplier {
        NoiseMultiplier::new(value).unwrap()
    }

    fn length(values: &[f64]) -> f64 {
        values.iter().map(|x| x * x).sum::<f64>().sqrt()
    }

    /// The sum in the values' own unit.
    fn plain(sum: &GridSum) -> Vec<f64> {
        sum.sum.iter().map(|x| *x as f64 * sum.grid.step()).collect()
    }

    proptest! {
        /// Adding a unit moves the sum by at most K steps and by at most C, whatever the unit, the sum, C and σ.
        #[test]
        fn one_unit_moves_the_sum_by_at_most_the_clipping_norm(
            units in prop::collection::vec(prop::collection::vec(prop::num::f32::ANY, 7), 1..6),
            clip_norm in prop_oneof![1e-9..1e-6, 0.01..10.0, 1e3..1e12_f64],
            noise in prop_oneof![1e-7..1e-3, 0.1..10.0, 1e2..1e7_f64],
        ) {
            let mut sum = GridSum::new(7, norm(clip_norm), sigma(noise));
            let most = i128::from(sum.grid.norm_max());
            for unit in &units {
                let before = sum.sum.clone();
                sum.add(unit);
                let moved: i128 = sum.sum.iter().zip(&before).map(|(a, b)| i128::from(a - b).pow(2)).sum();
                prop_assert!(moved <= most * most);
                prop_assert!((moved as f64).sqrt() * sum.grid.step() <= clip_norm * (1.0 + 1e-12));
            }
        }

        /// A window more or less moves the sum by at most ⌊K/n⌋ steps; n of them stay within K.
        #[test]
        fn one_window_of_a_block_moves_the_sum_by_at_most_its_part_of_the_norm(
            units in prop::collection::vec(prop::collection::vec(prop::num::f32::ANY, 5), 1..6),
            parts in prop_oneof![1_u32..100, 1_000_000..u32::MAX],
            clip_norm in prop_oneof![1e-9..1e-6, 0.01..10.0, 1e3..1e12_f64],
            noise in prop_oneof![1e-7..1e-3, 0.1..10.0, 1e2..1e7_f64],
        ) {
            let mut sum = GridSum::of_parts(5, norm(clip_norm), sigma(noise), parts);
            let most = i128::from(sum.grid.norm_max()) / i128::from(parts);
            for unit in &units {
                let before = sum.sum.clone();
                sum.add(unit);
                let moved: i128 = sum.sum.iter().zip(&before).map(|(a, b)| i128::from(a - b).pow(2)).sum();
                prop_assert!(moved <= most * most);
            }
        }

        #[test]
        fn a_unit_within_the_norm_is_kept_to_a_step(unit in prop::collection::vec(-0.3_f32..0.3, 9)) {
            let mut sum = GridSum::new(9, norm(1.0), sigma(1.27));
            sum.add(&unit);
            for (kept, x) in plain(&sum).iter().zip(&unit) {
                prop_assert!((kept - f64::from(*x)).abs() <= sum.grid.step() * (1.0 + 1e-9));
            }
        }

        #[test]
        fn a_longer_unit_keeps_its_direction_and_gets_the_norm(unit in prop::collection::vec(1.0_f32..1e6, 9)) {
            let mut sum = GridSum::new(9, norm(2.0), sigma(1.27));
            sum.add(&unit);
            let kept = plain(&sum);
            prop_assert!((length(&kept) / 2.0 - 1.0).abs() < 1e-5);
            let scale = length(&unit.iter().map(|x| f64::from(*x)).collect::<Vec<_>>()) / 2.0;
            for (kept, x) in kept.iter().zip(&unit) {
                prop_assert!((kept - f64::from(*x) / scale).abs() <= 2.0 * sum.grid.step());
            }
        }
    }

    #[test]
    fn a_unit_that_is_not_finite_counts_as_zero_and_spoils_nothing() {
        let mut sum = GridSum::new(3, norm(1.0), sigma(1.0));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            sum.add(&[0.5, bad, 0.5]);
        }
        assert_eq!(plain(&sum), [0.0; 3]);
        sum.add(&[0.5, 0.0, -0.25]);
        assert_eq!(plain(&sum), [0.5, 0.0, -0.25]);
    }

    #[test]
    fn debug_output_holds_no_value() {
        let mut sum = GridSum::new(1, norm(1000.0), sigma(1.0));
        sum.add(&[777.0]);
        assert!(!format!("{sum:?}").contains("777"));
    }
}
