//! Clipping: the only thing that bounds what one unit can change.
//!
//! **Sensitivity.** Each unit's vector is scaled to L2 norm at most C, truncated towards zero onto a fixed public grid, and checked
//! in integers: `Σ x² ≤ K²` with `K = ⌊C / step⌋`. The sum of the units is a sum of integers, so it is exact in any order. Adding or
//! removing one unit moves the sum by at most `K · step ≤ C`, with no rounding to argue about.
//!
//! A unit that holds a NaN or an infinity counts as zero, before its norm is taken: it can neither spoil the sum nor
//! end the round.

use theriac_protocol::units::L2Norm;

/// The public grid that values and noise live on; a power of two near C · 2⁻³⁴.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Grid {
    /// The step is 2 to this power.
    exponent: i32,
}

impl Grid {
    /// The grid for a clipping norm between 1e-9 and 1e12.
    pub(crate) fn for_norm(clip_norm: L2Norm) -> Self {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "log2 of a positive f64 lies within ±1100"
        )]
        let magnitude = clip_norm.value().log2().floor() as i32;
        Self {
            exponent: magnitude - STEPS_LOG2,
        }
    }

    /// The step's power of two.
    pub(crate) fn exponent(self) -> i32 {
        self.exponent
    }

    /// The step.
    pub(crate) fn step(self) -> f64 {
        f64::from(self.exponent).exp2()
    }
}

/// A sum of clipped units on the grid. Its values are private: only noise makes them public.
pub struct GridSum {
    clip_norm: L2Norm,
    grid: Grid,
    sum: Vec<i64>,
}

impl GridSum {
    /// The empty sum of `values` numbers.
    pub(crate) fn new(values: usize, clip_norm: L2Norm) -> Self {
        Self {
            clip_norm,
            grid: Grid::for_norm(clip_norm),
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
        for (total, x) in self.sum.iter_mut().zip(clip(unit, self.clip_norm, self.grid)) {
            *total += x;
        }
    }

    /// Number of values.
    pub(crate) fn len(&self) -> usize {
        self.sum.len()
    }

    /// The sum in floats, exactly: at most 2¹⁸ units of at most 2³⁵ steps fit into 53 bits.
    pub(crate) fn to_f64(&self) -> Vec<f64> {
        let step = self.grid.step();
        self.sum.iter().map(|x| *x as f64 * step).collect()
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

/// One unit, clipped, in steps of the grid. Its norm is taken in `f64`.
fn clip(unit: &[f32], clip_norm: L2Norm, grid: Grid) -> Vec<i64> {
    if unit.iter().any(|x| !x.is_finite()) {
        return vec![0; unit.len()];
    }
    let bound = clip_norm.value();
    let norm = unit.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let norm_max = (bound / grid.step()).floor();
    let mut factor = bound / norm.max(bound) / grid.step();
    loop {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "no coordinate exceeds the norm of 2^35 steps by more than rounding"
        )]
        let steps: Vec<i64> = unit.iter().map(|x| (f64::from(*x) * factor) as i64).collect();
        let squares: i128 = steps.iter().map(|x| i128::from(*x).pow(2)).sum();
        #[expect(
            clippy::cast_possible_truncation,
            reason = "norm_max is a whole number below 2^36"
        )]
        if squares <= (norm_max as i128).pow(2) {
            return steps;
        }
        // Rounding left it a hair too long; shrink until the integers agree.
        factor *= 1.0 - 1e-12;
    }
}

/// log2 of the steps in C, rounded down.
const STEPS_LOG2: i32 = 34;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn norm(value: f64) -> L2Norm {
        L2Norm::new(value).unwrap()
    }

    fn length(values: &[f64]) -> f64 {
        values.iter().map(|x| x * x).sum::<f64>().sqrt()
    }

    proptest! {
        /// Adding a unit moves the sum by at most C, whatever the unit, the sum and C.
        #[test]
        fn one_unit_moves_the_sum_by_at_most_the_clipping_norm(
            units in prop::collection::vec(prop::collection::vec(prop::num::f32::ANY, 7), 1..6),
            clip_norm in prop_oneof![1e-9..1e-6, 0.01..10.0, 1e3..1e12_f64],
        ) {
            let mut sum = GridSum::new(7, norm(clip_norm));
            for unit in &units {
                let before = sum.sum.clone();
                sum.add(unit);
                let moved: i128 = sum.sum.iter().zip(&before).map(|(a, b)| i128::from(a - b).pow(2)).sum();
                #[expect(clippy::cast_possible_truncation, reason = "a whole number below 2^36")]
                let most = (clip_norm / sum.grid.step()).floor() as i128;
                prop_assert!(moved <= most * most);
            }
        }

        #[test]
        fn a_unit_within_the_norm_is_kept_to_a_step(unit in prop::collection::vec(-0.3_f32..0.3, 9)) {
            let mut sum = GridSum::new(9, norm(1.0));
            sum.add(&unit);
            for (kept, x) in sum.to_f64().iter().zip(&unit) {
                prop_assert!((kept - f64::from(*x)).abs() <= sum.grid.step());
            }
        }

        #[test]
        fn a_longer_unit_keeps_its_direction_and_gets_the_norm(unit in prop::collection::vec(1.0_f32..1e6, 9)) {
            let mut sum = GridSum::new(9, norm(2.0));
            sum.add(&unit);
            let kept = sum.to_f64();
            prop_assert!((length(&kept) - 2.0).abs() < 1e-6);
            let scale = length(&unit.iter().map(|x| f64::from(*x)).collect::<Vec<_>>()) / 2.0;
            for (kept, x) in kept.iter().zip(&unit) {
                prop_assert!((kept * scale - f64::from(*x)).abs() <= 1e-8 * scale);
            }
        }
    }

    #[test]
    fn a_unit_that_is_not_finite_counts_as_zero_and_spoils_nothing() {
        let mut sum = GridSum::new(3, norm(1.0));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            sum.add(&[0.5, bad, 0.5]);
        }
        assert_eq!(sum.to_f64(), [0.0; 3]);
        sum.add(&[0.5, 0.0, -0.25]);
        assert_eq!(sum.to_f64(), [0.5, 0.0, -0.25]);
    }

    #[test]
    fn debug_output_holds_no_value() {
        let mut sum = GridSum::new(1, norm(1000.0));
        sum.add(&[777.0]);
        assert!(!format!("{sum:?}").contains("777"));
    }
}
