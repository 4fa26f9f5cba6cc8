//! Steps on a few units drawn at random (DP-SGD), for larger models and many steps.
//!
//! **Mechanism.** Before each step every unit of the pool throws a secret coin of probability q ([`crate::poisson`]). The gradients of those that came are clipped
//! to C on the grid, added, noised with σC and divided by the **expected** number qn of units, never by the number that came, which
//! depends on who is in the data. A step to which nobody came is made all the same: noise over qn. **Guarantee.** T steps of the Poisson-subsampled
//! Gaussian; their curve is what the ledger has charged to every block of the reservation, drawn or not.

use theriac_protocol::message::UpdateKind;

use super::{DescentError, UnitSum};
use crate::accountant::{Rho, SamplingRate};
use crate::ledger::Reservation;
use crate::noise::{NoiseError, NoiseMechanism, release};
use crate::poisson::PoissonSampler;
use crate::policy::PrivacyUnit;

/// The sampled steps that one reservation pays for: those of its plan, with its rate, σ, C, and its blocks as the pool.
#[derive(Debug)]
pub struct SampledDescent {
    reservation: Reservation,
    /// qn: what every sum is divided by.
    expected: f64,
    sampler: PoissonSampler,
    made: u32,
}

impl SampledDescent {
    /// Spends a reservation of a weight change that names its blocks.
    ///
    /// # Errors
    /// [`DescentError::NoBlocks`] for a reservation that names none, or one of moments, [`DescentError::Unit`]; [`DescentError::Noise`] when there is no randomness.
    /// The charge stays.
    pub fn new(reservation: Reservation) -> Result<Self, DescentError> {
        let plan = reservation.plan();
        if plan.kind != UpdateKind::Delta || plan.blocks.is_empty() {
            return Err(DescentError::NoBlocks);
        }
        // Without windows one record can turn its block's whole gradient around, which is not what it was charged for.
        let windows = reservation.unit() == PrivacyUnit::Record && plan.windows.is_some();
        if reservation.unit() != PrivacyUnit::Block && !windows {
            return Err(DescentError::Unit {
                unit: reservation.unit(),
            });
        }
        // The ledger charged it, so it is one.
        let rate = SamplingRate::new(plan.sampling_rate).map_err(|_| DescentError::NoBlocks)?;
        Ok(Self {
            expected: rate.value() * plan.blocks.len() as f64,
            sampler: PoissonSampler::new(rate).map_err(NoiseError::from)?,
            reservation,
            made: 0,
        })
    }

    /// Steps that are left.
    pub fn left(&self) -> u32 {
        self.reservation.plan().steps - self.made
    }

    /// The next noisy mean gradient. `read` gets the ids of the blocks that were drawn, perhaps none, and gives at most one gradient for each.
    ///
    /// # Errors
    /// [`DescentError::Exhausted`] before anybody is drawn, [`DescentError::WrongShape`], [`DescentError::Noise`]. A step that failed
    /// counts as made.
    pub fn step(
        &mut self,
        mechanism: &dyn NoiseMechanism,
        read: impl FnOnce(&[u64]) -> Vec<Vec<f32>>,
    ) -> Result<Vec<f32>, DescentError> {
        self.step_each(mechanism, |drawn, sum| sum.add_all(&read(drawn)))
    }

    /// The same for models whose gradients do not all fit into memory: `read` gives one after the other to the sum.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn step_each(
        &mut self,
        mechanism: &dyn NoiseMechanism,
        read: impl FnOnce(&[u64], &mut UnitSum),
    ) -> Result<Vec<f32>, DescentError> {
        let plan = self.reservation.plan();
        if self.left() == 0 {
            return Err(DescentError::Exhausted { steps: plan.steps });
        }
        self.made += 1;
        let drawn = self.sampler.draw(plan.blocks.len());
        let drawn: Vec<u64> = drawn.into_iter().map(|index| plan.blocks[index]).collect();
        let noise = plan.noise_multiplier;
        let mut sum = UnitSum::new(plan, drawn.len(), noise);
        read(&drawn, &mut sum);
        let sum = sum.finish(drawn.len())?;
        let sensitivity = self.reservation.sensitivity();
        let noisy = release(mechanism, &sum, sensitivity, Rho::gaussian(sensitivity, noise))?;
        #[expect(
            clippy::cast_possible_truncation,
            reason = "rounding noised values costs nothing"
        )]
        let mean = noisy.into_iter().map(|x| (x / self.expected) as f32).collect();
        Ok(mean)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::Duration;

    use theriac_protocol::units::{L2Norm, NoiseMultiplier, Round, Timestamp};

    use super::*;
    use crate::ledger::{Ledger, ReleasePlan, Reserved};
    use crate::noise::{ExactGaussian, FixedNoise};
    use crate::policy::Policy;
    use crate::windows::RecordWindows;

    const POLICY: &str = "site = \"site-a\"\nepsilon = 100\nsteps_max = 10000\nnoise_multiplier_min = 0.5\n\
                          mechanisms = [\"moments\", \"delta\"]";

    fn reserved(
        unit: &str,
        kind: UpdateKind,
        sigma: f64,
        rate: f64,
        steps: u32,
        units: u64,
    ) -> (tempfile::TempDir, Reservation) {
        let folder = tempfile::tempdir().unwrap();
        let text = format!("unit = \"{unit}\"\n{POLICY}");
        let policy = Policy::parse(&text).unwrap();
        let node = policy.site().clone();
        let path = folder.path().join("ledger.log");
        let mut ledger = Ledger::open(&path, &node, policy, Timestamp(0)).unwrap();
        let plan = plan(1, kind, sigma, rate, steps, units);
        match ledger.reserve(plan, Timestamp(0)).unwrap() {
            Reserved::Fresh(reservation) => (folder, reservation),
            Reserved::AlreadyCharged { .. } => panic!("charged before"),
        }
    }

    fn plan(round: u64, kind: UpdateKind, sigma: f64, rate: f64, steps: u32, units: u64) -> ReleasePlan {
        ReleasePlan {
            round: Round(round),
            nonce: round,
            kind,
            values: 2,
            block_span: Duration::from_hours(1),
            blocks: (100..100 + units).collect(),
            windows: None,
            sampling_rate: rate,
            steps,
            clip_norm: L2Norm::new(1.0).unwrap(),
            noise_multiplier: NoiseMultiplier::new(sigma).unwrap(),
        }
    }

    fn descent(sigma: f64, rate: f64, steps: u32, units: u64) -> SampledDescent {
        let (_folder, reservation) = reserved("block", UpdateKind::Delta, sigma, rate, steps, units);
        SampledDescent::new(reservation).unwrap()
    }

    #[test]
    fn what_names_no_blocks_or_is_no_weight_change_pays_for_no_steps() {
        for (kind, units) in [(UpdateKind::Delta, 0), (UpdateKind::Moments, 3)] {
            let (_folder, reservation) = reserved("block", kind, 2.0, 1.0, 1, units);
            let refused = SampledDescent::new(reservation);
            assert!(matches!(refused, Err(DescentError::NoBlocks)), "{refused:?}");
        }
    }

    /// Where one record can turn its block's whole gradient around nothing is charged; where blocks are cut into windows, their part.
    #[test]
    fn a_record_is_hidden_by_sampled_steps_only_where_blocks_are_cut_into_windows() {
        let folder = tempfile::tempdir().unwrap();
        let text = format!("unit = \"record\"\nrecord_window = 20\nrecord_stride = 10\n{POLICY}");
        let policy = Policy::parse(&text).unwrap();
        let node = policy.site().clone();
        let windows = policy.record_windows().unwrap().in_block(60).unwrap();
        let mut ledger = Ledger::open(&folder.path().join("l"), &node, policy, Timestamp(0)).unwrap();
        let plan = |round, windows| ReleasePlan {
            windows,
            ..plan(round, UpdateKind::Delta, 1.0, 0.5, 40, 8)
        };
        assert!(ledger.reserve(plan(1, None), Timestamp(0)).is_err());
        let other = RecordWindows::new(30, 30).unwrap().in_block(60).unwrap();
        assert!(
            ledger.reserve(plan(1, Some(other)), Timestamp(0)).is_err(),
            "not the policy's"
        );
        let Reserved::Fresh(reservation) = ledger.reserve(plan(1, Some(windows)), Timestamp(0)).unwrap()
        else {
            panic!("charged before")
        };
        assert!((reservation.sensitivity() - 2.0 / 5.0).abs() < 1e-12);
        let mut descent = SampledDescent::new(reservation).unwrap();
        // Five windows a block, each of norm 1/5 at most; the longest mean has norm 1.
        while descent.left() > 0 {
            let came = Cell::new(0);
            let mean = descent.step_each(&FixedNoise(0.0), |drawn, sum| {
                came.set(drawn.len());
                for _ in 0..5 * drawn.len() {
                    sum.add(&[9.0, 0.0]);
                }
            });
            let expected = came.get() as f64 / 4.0;
            assert!((f64::from(mean.unwrap()[0]) - expected).abs() < 1e-5);
        }
    }

    /// Gradients come one after the other, so a model may have many values: none is kept.
    #[test]
    fn a_large_model_is_trained_with_one_gradient_in_memory() {
        const VALUES: usize = 200_000;
        let folder = tempfile::tempdir().unwrap();
        let policy = Policy::parse(POLICY).unwrap();
        let node = policy.site().clone();
        let mut ledger = Ledger::open(&folder.path().join("l"), &node, policy, Timestamp(0)).unwrap();
        let large = ReleasePlan {
            values: u32::try_from(VALUES).unwrap(),
            ..plan(1, UpdateKind::Delta, 1.0, 0.5, 2, 6)
        };
        let Reserved::Fresh(reservation) = ledger.reserve(large, Timestamp(0)).unwrap() else {
            panic!("charged before")
        };
        let mut descent = SampledDescent::new(reservation).unwrap();
        let mut gradient = vec![0.0_f32; VALUES];
        let mean = descent.step_each(&ExactGaussian, |drawn, sum| {
            for block in drawn {
                gradient.fill(*block as f32);
                sum.add(&gradient);
            }
        });
        let mean = mean.unwrap();
        // Noise of σC/qn = 1/3 on each value; the signal, of norm 1 for each unit, is far below it.
        let deviation = (mean.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / VALUES as f64).sqrt();
        assert!((deviation * 3.0 - 1.0).abs() < 0.02, "{deviation}");
        let short = descent.step_each(&ExactGaussian, |_, sum| sum.add(&[1.0]));
        assert!(matches!(short, Err(DescentError::WrongShape { .. })), "{short:?}");
    }

    #[test]
    fn sums_are_divided_by_the_expected_number_and_not_by_the_drawn_one() {
        let mut descent = descent(1.0, 0.25, 200, 40);
        let mut numbers = std::collections::BTreeSet::new();
        while descent.left() > 0 {
            let came = Cell::new(0);
            let read = |drawn: &[u64]| {
                assert!(drawn.iter().all(|block| (100..140).contains(block)), "{drawn:?}");
                came.set(drawn.len());
                drawn.iter().map(|_| vec![0.5, 0.0]).collect()
            };
            let mean = descent.step(&FixedNoise(0.0), read).unwrap();
            assert!(
                (f64::from(mean[0]) - 0.5 * came.get() as f64 / 10.0).abs() < 1e-5,
                "{mean:?}"
            );
            numbers.insert(came.get());
        }
        assert!(
            numbers.len() > 5,
            "the number that came hardly varies: {numbers:?}"
        );
    }

    #[test]
    fn a_step_to_which_nobody_came_is_noise_over_the_expected_number() {
        let mut descent = descent(2.0, 0.001, 3000, 100);
        let (mut empty, mut squares) = (0_u32, 0.0);
        while descent.left() > 0 {
            let nobody = Cell::new(false);
            let read = |drawn: &[u64]| {
                nobody.set(drawn.is_empty());
                vec![]
            };
            let mean = descent.step(&ExactGaussian, read).unwrap();
            if nobody.get() {
                empty += 1;
                squares += mean.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
            }
        }
        // e^{−0.1} of the steps; σC/qn = 20.
        assert!(empty > 2500, "{empty}");
        let found = (squares / f64::from(2 * empty)).sqrt();
        assert!((found / 20.0 - 1.0).abs() < 0.06, "{found}");
    }

    #[test]
    fn no_step_is_made_or_read_beyond_the_charge() {
        let mut descent = descent(1.0, 0.5, 1, 4);
        assert!(descent.step(&ExactGaussian, |_| vec![]).is_ok());
        let more = descent.step(&ExactGaussian, |_| panic!("units were read beyond the charge"));
        assert!(
            matches!(more, Err(DescentError::Exhausted { steps: 1 })),
            "{more:?}"
        );
    }
}
