//! Several noisy gradient steps for one charge (recipe B).
//!
//! **Mechanism.** In each of T steps every charged block's gradient is clipped to C on the grid, the sum gets noise of standard deviation `σ_T·C`, and
//! is divided by the number of charged blocks: full participation, q = 1. **Guarantee.** T releases with multiplier `σ_T` of the same blocks are
//! together exactly as private as one with `σ = σ_T/√T`, for every Rényi order, also when later gradients depend on earlier results
//! (composition of Gaussians). So one reservation with multiplier σ pays for T steps with `σ_T = σ√T`, and nothing else has to be
//! charged.
//!
//! Gradients come as vectors ([`UnitSum::add`]) or, many times quicker and as exactly clipped, as products of two factors ([`UnitSum::add_factors`]).
//!
//! The reservation is consumed here and its steps are counted: one more than was charged is refused, before anything is read. Where
//! the model goes with the noisy gradients (momentum, averages of iterates, step lengths) is post-processing.

mod sampled;

use std::num::NonZeroU32;

use theriac_protocol::message::UpdateKind;
use theriac_protocol::units::NoiseMultiplier;

use crate::accountant::Rho;
use crate::clip::GridSum;
use crate::factors::{FactoredSum, UnitFactors};
use crate::ledger::{ReleasePlan, Reservation};
use crate::noise::{NoiseError, NoiseMechanism, release};
use crate::policy::PrivacyUnit;

pub use self::sampled::SampledDescent;

/// Why a step was not made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DescentError {
    /// The charge covers no further step.
    #[error("all {steps} charged steps were made; reserve again for more")]
    Exhausted {
        /// The steps that were charged.
        steps: u32,
    },
    /// The reservation charges every block for one vector made of all data, so it names none.
    #[error("gradient steps read single blocks: reserve `moments` blocks for them")]
    NoBlocks,
    /// The reservation is for another unit than whole blocks, whose gradients these steps clip.
    #[error(
        "sampled steps clip the gradients of whole blocks, or of the windows of a record: `{unit}` without windows is neither"
    )]
    Unit {
        /// The reservation's unit.
        unit: PrivacyUnit,
    },
    /// The charge's noise is so weak or strong that no step has a multiplier.
    #[error("{steps} steps of the reserved noise have no multiplier that a float can hold")]
    NoMultiplier {
        /// The steps.
        steps: u32,
    },
    /// More gradients came than blocks were charged, or one of another length.
    #[error("{found} gradients of {values} values are charged at most, others came")]
    WrongShape {
        /// Charged blocks.
        found: usize,
        /// Values of each.
        values: usize,
    },
    /// No noise could be added.
    #[error(transparent)]
    Noise(#[from] NoiseError),
}

/// The noisy steps that one reservation pays for.
#[derive(Debug)]
pub struct NoisyDescent {
    reservation: Reservation,
    /// Of one step: σ√T.
    noise_multiplier: NoiseMultiplier,
    steps: u32,
    made: u32,
}

impl NoisyDescent {
    /// Spends a reservation on `steps` steps over its blocks.
    ///
    /// # Errors
    /// [`DescentError::NoBlocks`], [`DescentError::NoMultiplier`]; the charge stays.
    pub fn new(reservation: Reservation, steps: NonZeroU32) -> Result<Self, DescentError> {
        if reservation.plan().kind != UpdateKind::Moments || reservation.blocks().is_empty() {
            return Err(DescentError::NoBlocks);
        }
        let steps = steps.get();
        let sigma = reservation.plan().noise_multiplier.value() * f64::from(steps).sqrt();
        let noise_multiplier =
            NoiseMultiplier::new(sigma).map_err(|_| DescentError::NoMultiplier { steps })?;
        Ok(Self {
            reservation,
            noise_multiplier,
            steps,
            made: 0,
        })
    }

    /// Steps that are left.
    pub fn left(&self) -> u32 {
        self.steps - self.made
    }

    /// Noise multiplier of each step.
    pub fn noise_multiplier(&self) -> NoiseMultiplier {
        self.noise_multiplier
    }

    /// The next noisy mean gradient. `read` gets the charged blocks' ids and gives one gradient for each that holds data; one with a value that
    /// is not finite counts as zero. The sum is divided by the number of **charged** blocks.
    ///
    /// # Errors
    /// [`DescentError::Exhausted`] before `read` is called; [`DescentError::WrongShape`] and [`DescentError::Noise`] after. A step that
    /// failed counts as made.
    pub fn step(
        &mut self,
        mechanism: &dyn NoiseMechanism,
        read: impl FnOnce(&[u64]) -> Vec<Vec<f32>>,
    ) -> Result<Vec<f32>, DescentError> {
        self.step_each(mechanism, |blocks, sum| sum.add_all(&read(blocks)))
    }

    /// The same for models whose gradients do not all fit into memory: `read` gives one after the other to the sum. It may stop early; what is missing
    /// counts as zero.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn step_each(
        &mut self,
        mechanism: &dyn NoiseMechanism,
        read: impl FnOnce(&[u64], &mut UnitSum),
    ) -> Result<Vec<f32>, DescentError> {
        if self.left() == 0 {
            return Err(DescentError::Exhausted { steps: self.steps });
        }
        self.made += 1;
        let plan = self.reservation.plan();
        let blocks = plan.blocks.len();
        let mut sum = UnitSum::new(plan, blocks, self.noise_multiplier);
        read(&plan.blocks, &mut sum);
        let sum = sum.finish(blocks)?;
        // What one step may cost: the T-th part of the charge.
        let share = Rho::new(self.reservation.rho().value() / f64::from(self.steps));
        let noisy = release(mechanism, &sum, self.reservation.sensitivity(), share)?;
        #[expect(
            clippy::cast_possible_truncation,
            reason = "rounding noised values costs nothing"
        )]
        let mean = noisy.into_iter().map(|x| (x / blocks as f64) as f32).collect();
        Ok(mean)
    }
}

/// The gradients of one step, clipped and added one after the other ([`add`](Self::add)): only one is in memory at a time, however many units and however many values
/// there are. Or all at once, as factors ([`add_factors`](Self::add_factors)): none is ever formed.
#[derive(Debug)]
pub struct UnitSum {
    sum: GridSum,
    /// Units that came as factors; rounded to the grid of `sum` once, at the end.
    factored: Option<FactoredSum>,
    /// Units of the whole plan, drawn in this step or not: how units are added must not follow from how many were drawn.
    charged: usize,
    left: usize,
    refused: bool,
}

impl UnitSum {
    /// Of a step that reads so many of the plan's blocks.
    fn new(plan: &ReleasePlan, blocks: usize, noise: NoiseMultiplier) -> Self {
        let parts = plan.vectors_per_block();
        let units = |blocks: usize| blocks.saturating_mul(usize::try_from(parts).unwrap_or(usize::MAX));
        Self {
            sum: GridSum::of_parts(plan.values as usize, plan.clip_norm, noise, parts),
            factored: None,
            charged: units(plan.blocks.len()),
            left: units(blocks),
            refused: false,
        }
    }

    /// Adds the next unit's gradient; one with a value that is not finite counts as zero. One more than was charged, or one of another length, adds
    /// nothing and ends the step with [`DescentError::WrongShape`].
    pub fn add(&mut self, gradient: &[f32]) {
        if self.left == 0 || gradient.len() != self.sum.len() {
            self.refused = true;
            return;
        }
        self.left -= 1;
        self.sum.add(gradient);
    }

    /// Adds the next units, whose gradients are products of two factors ([`crate::factors`]): as exactly clipped, at the cost of one matrix product for all of them.
    /// More units than were charged, or gradients of another length, add nothing and end the step with [`DescentError::WrongShape`].
    pub fn add_factors(&mut self, units: &UnitFactors<'_>) {
        if units.units() == 0 {
            return;
        }
        if units.units() > self.left || units.values() != self.sum.len() {
            self.refused = true;
            return;
        }
        if self.factored.is_none() {
            let (grid, norm_max) = (self.sum.grid(), self.sum.unit_norm_max());
            self.factored = FactoredSum::new(grid, norm_max, self.sum.len(), self.charged);
        }
        self.left -= units.units();
        match &mut self.factored {
            Some(sum) => sum.add(units),
            None => (0..units.units()).for_each(|unit| self.sum.add(&units.gradient(unit))),
        }
    }

    /// Adds each of them.
    fn add_all(&mut self, gradients: &[Vec<f32>]) {
        for gradient in gradients {
            self.add(gradient);
        }
    }

    fn finish(mut self, units: usize) -> Result<GridSum, DescentError> {
        if self.refused {
            return Err(DescentError::WrongShape {
                found: units,
                values: self.sum.len(),
            });
        }
        if let Some(factored) = self.factored {
            self.sum.add_clipped(factored.rounded());
        }
        Ok(self.sum)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use theriac_protocol::units::{L2Norm, Round, Timestamp};

    use super::*;
    use crate::factors::LayerFactors;
    use crate::ledger::{Ledger, Reserved};
    use crate::noise::{ExactGaussian, FixedNoise};
    use crate::policy::Policy;

    fn reservation(folder: &std::path::Path, kind: UpdateKind, blocks: u64) -> Reservation {
        let text = "site = \"site-a\"\nepsilon = 4\nmechanisms = [\"moments\", \"delta\"]";
        let policy = Policy::parse(text).unwrap();
        let node = policy.site().clone();
        let mut ledger = Ledger::open(&folder.join("ledger.log"), &node, policy, Timestamp(0)).unwrap();
        let plan = ReleasePlan {
            round: Round(1),
            nonce: 1,
            kind,
            values: 3,
            block_span: Duration::from_hours(1),
            blocks: (0..blocks).collect(),
            windows: None,
            sampling_rate: 1.0,
            steps: 1,
            clip_norm: L2Norm::new(2.0).unwrap(),
            noise_multiplier: NoiseMultiplier::new(3.0).unwrap(),
        };
        match ledger.reserve(plan, Timestamp(0)).unwrap() {
            Reserved::Fresh(reservation) => reservation,
            Reserved::AlreadyCharged { .. } => panic!("charged before"),
        }
    }

    fn steps(count: u32) -> NonZeroU32 {
        NonZeroU32::new(count).unwrap()
    }

    #[test]
    fn a_step_is_the_clipped_sum_and_its_noise_over_the_charged_blocks() {
        let folder = tempfile::tempdir().unwrap();
        let mut descent =
            NoisyDescent::new(reservation(folder.path(), UpdateKind::Moments, 4), steps(16)).unwrap();
        assert!(
            (descent.noise_multiplier().value() - 12.0).abs() < 1e-12,
            "3 · √16"
        );
        // (0, 30, 40) becomes (0, 1.2, 1.6); three of four blocks hold data; one deviation is 24.
        let read = |_: &[u64]| {
            vec![
                vec![1.0, 0.0, 0.0],
                vec![0.0, 30.0, 40.0],
                vec![f32::NAN, 0.0, 0.0],
            ]
        };
        let mean = descent.step(&FixedNoise(1.0), read).unwrap();
        for (found, expected) in mean.iter().zip([25.0 / 4.0, 25.2 / 4.0, 25.6 / 4.0]) {
            assert!((found - expected).abs() < 1e-4, "{mean:?}");
        }
        assert_eq!(descent.left(), 15);
    }

    /// Section 12 of the privacy design: the variance of the mean is (σC/B)².
    #[test]
    fn the_noise_of_the_mean_has_the_deviation_that_was_charged() {
        let folder = tempfile::tempdir().unwrap();
        let mut descent =
            NoisyDescent::new(reservation(folder.path(), UpdateKind::Moments, 5), steps(2000)).unwrap();
        let deviation = descent.noise_multiplier().value() * 2.0 / 5.0;
        let mut squares = 0.0;
        while descent.left() > 0 {
            let mean = descent.step(&ExactGaussian, |_| vec![]).unwrap();
            squares += mean.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
        }
        // 6 000 draws: the sample deviation is within 6 % beyond 1 − 1e-10.
        let found = (squares / 6000.0).sqrt();
        assert!(
            (found / deviation - 1.0).abs() < 0.06,
            "{found}, expected {deviation}"
        );
    }

    #[test]
    fn no_step_is_made_or_read_beyond_the_charge() {
        let folder = tempfile::tempdir().unwrap();
        let mut descent =
            NoisyDescent::new(reservation(folder.path(), UpdateKind::Moments, 2), steps(2)).unwrap();
        assert!(descent.step(&ExactGaussian, |_| vec![]).is_ok());
        let long = descent.step(&ExactGaussian, |_| vec![vec![0.0; 4]]);
        assert!(matches!(long, Err(DescentError::WrongShape { .. })), "{long:?}");
        let more = descent.step(&ExactGaussian, |_| panic!("data were read without a charge"));
        assert!(
            matches!(more, Err(DescentError::Exhausted { steps: 2 })),
            "{more:?}"
        );
    }

    #[test]
    fn a_charge_of_all_data_pays_for_no_steps() {
        let folder = tempfile::tempdir().unwrap();
        let refused = NoisyDescent::new(reservation(folder.path(), UpdateKind::Delta, 0), steps(2));
        assert!(matches!(refused, Err(DescentError::NoBlocks)), "{refused:?}");
    }

    /// Two inputs and a bias, one output: three values.
    fn layer<'a>(inputs: &'a [f32], errors: &'a [f32]) -> [LayerFactors<'a>; 1] {
        [LayerFactors {
            inputs,
            errors,
            bias: true,
            range_log2: 3,
        }]
    }

    #[test]
    fn steps_take_gradients_as_factors() {
        let folder = tempfile::tempdir().unwrap();
        let reservation = reservation(folder.path(), UpdateKind::Moments, 4);
        let mut descent = NoisyDescent::new(reservation, steps(16)).unwrap();
        // Gradients (4, 2, 2), cut to norm 2; (0, 0, 0.5); and one that is no number.
        let (inputs, errors) = ([2.0, 1.0, 0.0, 0.0, 1.0, 1.0], [2.0, 0.5, f32::NAN]);
        let mean = descent.step_each(&FixedNoise(0.0), |_, sum| {
            sum.add_factors(&UnitFactors::new(&layer(&inputs, &errors), 3, 1).unwrap());
            sum.add_factors(&UnitFactors::new(&layer(&[], &[]), 0, 1).unwrap());
        });
        let long = 2.0 / 6.0_f32.sqrt();
        let expected = [2.0 * long, long, long + 0.5].map(|x| x / 4.0);
        for (found, expected) in mean.unwrap().iter().zip(expected) {
            assert!((found - expected).abs() < 1e-4, "{found} {expected}");
        }
        // Five units where four were charged; a vector and four units.
        for vectors in [0, 1] {
            let (inputs, errors) = (vec![0.1; 2 * (5 - vectors)], vec![0.1; 5 - vectors]);
            let refused = descent.step_each(&FixedNoise(0.0), |_, sum| {
                (0..vectors).for_each(|_| sum.add(&[0.1; 3]));
                sum.add_factors(&UnitFactors::new(&layer(&inputs, &errors), 5 - vectors, 1).unwrap());
            });
            assert!(
                matches!(refused, Err(DescentError::WrongShape { .. })),
                "{refused:?}"
            );
        }
        let narrow = descent.step_each(&FixedNoise(0.0), |_, sum| {
            sum.add_factors(&UnitFactors::new(&layer(&[1.0], &[1.0]), 1, 1).unwrap());
        });
        assert!(
            matches!(narrow, Err(DescentError::WrongShape { .. })),
            "{narrow:?}"
        );
    }

    /// So much noise that a unit has no more than three steps: there is no room for rounding, and gradients are formed one at a time.
    #[test]
    fn where_the_grid_is_too_coarse_factors_are_multiplied_out() {
        let folder = tempfile::tempdir().unwrap();
        let reservation = reservation(folder.path(), UpdateKind::Moments, 2);
        let sigma = NoiseMultiplier::new(300_000.0).unwrap();
        let mut sum = UnitSum::new(reservation.plan(), 2, sigma);
        sum.add_factors(&UnitFactors::new(&layer(&[2.0, 1.0, 0.0, 0.0], &[2.0, 9.0]), 2, 1).unwrap());
        let mut expected = GridSum::new(3, L2Norm::new(2.0).unwrap(), sigma);
        expected.add(&[4.0, 2.0, 2.0]);
        expected.add(&[0.0, 0.0, 9.0]);
        assert_eq!(sum.finish(2).unwrap().steps(), expected.steps());
        assert!(expected.steps().iter().any(|x| *x != 0), "{:?}", expected.steps());
    }
}
