//! What a promise costs before anybody makes it: noise, sampling rate, steps, and whether anything can be learnt.
//!
//! All of it follows from public numbers. A plan answers: with this many blocks and this (ε, δ) for each, how strong must the noise be, and how
//! does it compare with what a step can say? One step's sum has noise of L2 norm σ√d·C, d values, and B expected units of norm at most C
//! each; so `σ√d / B` is the noise of a step in multiples of the longest mean gradient. **About 1 or less trains, above 5 does not** (measured
//! on recorded servers; between them it depends on how much the units agree).

use serde::Serialize;
use theriac_protocol::units::{Delta, Epsilon};

use crate::accountant::{SamplingRate, calibrated_noise_multiplier};
use crate::ledger::loss::Loss;

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// There is nothing to learn from.
    #[error("not one whole block fits into the time: plan for more days, or for shorter blocks")]
    NoBlocks,
    /// There is no step, or no value.
    #[error("a job has at least one step and one value")]
    Empty,
    /// More units would come to a step than there are.
    #[error("{batch} units a step are more than the {blocks} there are")]
    BatchTooLarge {
        /// Expected units of a step.
        batch: u64,
        /// Units at hand.
        blocks: u64,
    },
    /// Not even one part of the job fits.
    #[error(
        "the budget is smaller than one step: no noise brings {steps} steps within epsilon {epsilon} at delta {delta:e}; \
         allow more, or fewer steps"
    )]
    BudgetTooSmall {
        /// The steps.
        steps: u64,
        /// The limit.
        epsilon: f64,
        /// Its δ.
        delta: f64,
    },
}

/// The promise, and what there is to keep it with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Goal {
    /// Largest ε of any unit.
    pub epsilon: Epsilon,
    /// At this δ.
    pub delta: Delta,
    /// Blocks that are there to be read.
    pub blocks: u64,
    /// How far one protected unit moves a sum, in multiples of C; see [`PrivacyUnit::sensitivity`](crate::policy::PrivacyUnit::sensitivity) and
    /// [`BlockWindows::sensitivity`](crate::windows::BlockWindows::sensitivity).
    pub sensitivity: f64,
    /// Least noise multiplier that the policy allows.
    pub noise_multiplier_min: f64,
}

/// What is to be released.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Its name.
    pub name: &'static str,
    /// Number of values of one release.
    pub values: u64,
    /// Releases that read the same blocks.
    pub steps: u64,
    /// Expected blocks of a step; `None`: all of them.
    pub batch: Option<u64>,
}

/// Whether it can be expected to learn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The noise of a step is no longer than what it says.
    Trains,
    /// It may, if the units agree.
    Doubtful,
    /// The noise drowns it.
    Hopeless,
}

/// A job that keeps the promise.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// The candidate's name.
    pub name: &'static str,
    /// Noise multiplier σ: standard deviation over C, on the sum.
    pub noise_multiplier: f64,
    /// Probability with which each block enters a step.
    pub sampling_rate: f64,
    /// Steps.
    pub steps: u64,
    /// Expected blocks of a step.
    pub batch: f64,
    /// Values of a release.
    pub values: u64,
    /// ε that the ledger will show after it.
    pub epsilon_rdp: f64,
    /// ε by the tighter second figure.
    pub epsilon_pld: f64,
    /// σ√d/B.
    pub noise_to_clip: f64,
    /// What that means.
    pub verdict: Verdict,
}

impl Plan {
    /// σ with three decimals, rounded up: the least of them that a ledger takes.
    pub fn noise_multiplier_shown(&self) -> f64 {
        (self.noise_multiplier * 1e3).ceil() / 1e3
    }

    /// So many releases like this one, of other blocks each, added where they are combined: the noise of a sum grows with the root of their number and the signal with the number.
    #[must_use]
    pub fn added(&self, releases: u64) -> Self {
        let noise_to_clip = self.noise_to_clip / (releases.max(1) as f64).sqrt();
        Self {
            noise_to_clip,
            verdict: Verdict::of(noise_to_clip),
            ..self.clone()
        }
    }

    /// The fewest releases like this one whose sum trains.
    pub fn releases_until_it_trains(&self) -> u64 {
        let releases = (self.noise_to_clip / TRAINS_TO).powi(2).ceil().max(1.0);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "at least 1; beyond the range it is the largest number"
        )]
        let releases = releases as u64;
        releases
    }
}

impl Goal {
    /// The least noise for a candidate, and what it leaves.
    ///
    /// # Errors
    /// [`PlanError`]
    pub fn plan(&self, candidate: &Candidate) -> Result<Plan, PlanError> {
        if self.blocks == 0 {
            return Err(PlanError::NoBlocks);
        }
        if candidate.steps == 0 || candidate.values == 0 || candidate.batch == Some(0) {
            return Err(PlanError::Empty);
        }
        let batch = candidate.batch.unwrap_or(self.blocks);
        let rate =
            SamplingRate::new(batch as f64 / self.blocks as f64).map_err(|_| PlanError::BatchTooLarge {
                batch,
                blocks: self.blocks,
            })?;
        let (sigma, loss) = self.noise(rate, candidate.steps)?;
        let noise_to_clip = sigma * (candidate.values as f64).sqrt() / batch as f64;
        Ok(Plan {
            name: candidate.name,
            noise_multiplier: sigma,
            sampling_rate: rate.value(),
            steps: candidate.steps,
            batch: batch as f64,
            values: candidate.values,
            epsilon_rdp: loss.epsilon(self.delta).epsilon,
            epsilon_pld: loss.epsilon_pld(self.delta),
            noise_to_clip,
            verdict: Verdict::of(noise_to_clip),
        })
    }

    /// Largest δ that is still a promise: a tenth of one over the number of blocks. A larger one would allow a mechanism that publishes a
    /// tenth of a block outright.
    pub fn delta_max(&self) -> f64 {
        0.1 / self.blocks as f64
    }

    fn noise(&self, rate: SamplingRate, steps: u64) -> Result<(f64, Loss), PlanError> {
        let too_small = || PlanError::BudgetTooSmall {
            steps,
            epsilon: self.epsilon.value(),
            delta: self.delta.value(),
        };
        let steps = u32::try_from(steps).map_err(|_| too_small())?;
        let sigma = calibrated_noise_multiplier(self.epsilon, self.delta, rate, steps, self.sensitivity)
            .filter(|sigma| sigma.value() <= SIGMA_MAX)
            .ok_or_else(too_small)?;
        let sigma = sigma.value().max(self.noise_multiplier_min);
        Ok((
            sigma,
            Loss::gaussian(self.sensitivity, sigma, rate.value(), steps),
        ))
    }
}

impl Verdict {
    /// By the noise of a step over C.
    pub fn of(noise_to_clip: f64) -> Self {
        if noise_to_clip <= TRAINS_TO {
            Self::Trains
        } else if noise_to_clip <= HOPELESS_FROM {
            Self::Doubtful
        } else {
            Self::Hopeless
        }
    }

    /// The expected effect, for people.
    pub fn words(self) -> &'static str {
        match self {
            Self::Trains => "trains: the noise of a step is no longer than the longest signal",
            Self::Doubtful => {
                "doubtful: trains only where the blocks agree; take fewer values or more blocks"
            }
            Self::Hopeless => "not recommended: the noise drowns what is learnt",
        }
    }
}

/// The plan to take: one that trains before one that may, and the least noise among equals. `None` when all are hopeless.
pub fn recommended(plans: &[Plan]) -> Option<&Plan> {
    let usable = plans.iter().filter(|plan| plan.verdict != Verdict::Hopeless);
    usable.min_by(|a, b| a.noise_to_clip.total_cmp(&b.noise_to_clip))
}

/// Beyond it a policy asks for no noise, and the orders that the ledger keeps say little: at the ε that would need it nothing is learnt.
const SIGMA_MAX: f64 = 10_000.0;
/// Noise over C up to which a job trains, and beyond which it does not.
const TRAINS_TO: f64 = 1.0;
const HOPELESS_FROM: f64 = 5.0;

#[cfg(test)]
mod tests {
    use super::*;

    fn goal(epsilon: f64, blocks: u64) -> Goal {
        Goal {
            epsilon: Epsilon::new(epsilon).unwrap(),
            delta: Delta::new(1e-6).unwrap(),
            blocks,
            sensitivity: 1.0,
            noise_multiplier_min: 0.7,
        }
    }

    fn candidate(values: u64, steps: u64, batch: Option<u64>) -> Candidate {
        Candidate {
            name: "steps",
            values,
            steps,
            batch,
        }
    }

    /// Rows of the privacy design: 90 days of hours, 64 a step, 700 steps.
    #[test]
    fn plans_are_those_of_the_published_table() {
        for (values, ratio) in [(51_212, 4.5), (7_258, 1.7), (1_870, 0.9)] {
            let plan = goal(4.0, 2160).plan(&candidate(values, 700, Some(64))).unwrap();
            assert!((plan.noise_multiplier - 1.28).abs() < 0.03, "{plan:?}");
            assert!((plan.noise_to_clip - ratio).abs() < 0.07 * ratio, "{plan:?}");
            assert!(plan.epsilon_rdp <= 4.0 && plan.epsilon_pld <= plan.epsilon_rdp);
        }
    }

    #[test]
    fn a_hopeless_plan_is_not_recommended() {
        // A whole node as the unit: one block, every round.
        let alone = goal(4.0, 1).plan(&candidate(7_258, 90, None)).unwrap();
        assert_eq!(alone.verdict, Verdict::Hopeless, "{alone:?}");
        assert_eq!(recommended(std::slice::from_ref(&alone)), None);
        let moments = goal(4.0, 2160).plan(&candidate(760, 1, None)).unwrap();
        assert_eq!(recommended(&[alone, moments.clone()]), Some(&moments));
    }

    /// Three hour blocks in memory, sixteen channels: hopeless alone, and the centre adds.
    #[test]
    fn few_blocks_train_after_as_many_releases_as_the_plan_says() {
        let one = goal(4.0, 3).plan(&candidate(352, 1, None)).unwrap();
        assert_eq!(one.verdict, Verdict::Hopeless, "{one:?}");
        let needed = one.releases_until_it_trains();
        assert!((60..68).contains(&needed), "{needed}: (1.27 √352 / 3)²");
        assert_eq!(one.added(needed).verdict, Verdict::Trains);
        assert_eq!(one.added(needed - 1).verdict, Verdict::Doubtful);
        // As many blocks in one release have less noise: cutting a history costs the root of the number of parts.
        let whole = goal(4.0, 3 * needed).plan(&candidate(352, 1, None)).unwrap();
        let root = (needed as f64).sqrt();
        assert!((one.added(needed).noise_to_clip / whole.noise_to_clip - root).abs() < 1e-9);
        assert_eq!(whole.releases_until_it_trains(), 1);
    }

    #[test]
    fn the_policys_floor_and_the_unit_raise_the_noise() {
        let lax = goal(50.0, 2160).plan(&candidate(760, 1, None)).unwrap();
        assert!((lax.noise_multiplier - 0.7).abs() < 1e-12 && lax.epsilon_rdp < 50.0);
        let once = goal(4.0, 2160).plan(&candidate(760, 1, None)).unwrap();
        let record = Goal {
            sensitivity: 2.0,
            ..goal(4.0, 2160)
        };
        let twice = record.plan(&candidate(760, 1, None)).unwrap();
        assert!((twice.noise_multiplier / once.noise_multiplier - 2.0).abs() < 1e-5);
        assert!((twice.epsilon_rdp - once.epsilon_rdp).abs() < 1e-5, "{twice:?}");
    }

    /// What is planned is what the ledger takes, and what is printed too.
    #[test]
    fn a_ledger_takes_the_noise_that_was_planned_for_it() {
        for epsilon in [0.5, 1.0, 2.0, 4.0, 8.0, 10.0] {
            for (steps, batch) in [(1, None), (20, None), (90, None), (700, Some(64))] {
                let plan = goal(epsilon, 2160).plan(&candidate(760, steps, batch)).unwrap();
                let steps = u32::try_from(steps).unwrap();
                for sigma in [plan.noise_multiplier, plan.noise_multiplier_shown()] {
                    let charged = Loss::gaussian(1.0, sigma, plan.sampling_rate, steps);
                    let charged = charged.epsilon(Delta::new(1e-6).unwrap()).epsilon;
                    assert!(
                        charged <= epsilon,
                        "ε {epsilon}, {steps} steps, σ {sigma}: {charged}"
                    );
                }
                assert!(plan.noise_multiplier_shown() - plan.noise_multiplier <= 1e-3 + 1e-12);
            }
        }
    }

    #[test]
    fn what_cannot_be_planned_says_why() {
        assert_eq!(
            goal(4.0, 0).plan(&candidate(1, 1, None)),
            Err(PlanError::NoBlocks)
        );
        assert_eq!(goal(4.0, 10).plan(&candidate(1, 0, None)), Err(PlanError::Empty));
        assert_eq!(
            goal(4.0, 10).plan(&candidate(1, 1, Some(0))),
            Err(PlanError::Empty)
        );
        assert!(matches!(
            goal(4.0, 10).plan(&candidate(1, 1, Some(11))),
            Err(PlanError::BatchTooLarge {
                batch: 11,
                blocks: 10
            })
        ));
        let weak = goal(1e-3, 10).plan(&candidate(1, 1, None));
        assert!(matches!(weak, Err(PlanError::BudgetTooSmall { .. })), "{weak:?}");
        let little = goal(1e-9, 10).plan(&candidate(1, u64::MAX, None));
        assert!(
            matches!(little, Err(PlanError::BudgetTooSmall { .. })),
            "{little:?}"
        );
    }
}
