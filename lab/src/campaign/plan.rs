//! The schedule: the same for every healer, drawn from the seed alone.

use std::time::Duration;

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::Healer;
use super::fault::{Lane, Trouble};

/// One fault, brought to every healer that takes part in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// From 1, unique in its lane.
    pub number: u32,
    /// What is broken.
    pub fault: Trouble,
    /// Which time this fault comes, from 1.
    pub run: u32,
    /// Pause before it, milliseconds, so that it does not always come at the same moment between two looks of a healer.
    pub pause_ms: u64,
}

/// What was asked for, as it is written beside the runs: a campaign is only taken up again where it is the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Which faults.
    pub faults: Vec<Trouble>,
    /// Who heals.
    pub healers: Vec<Healer>,
    /// How often each fault comes.
    pub runs: u32,
    /// Gives order and pauses.
    pub seed: u64,
}

impl Plan {
    /// The steps of one lane: run after run, each with every fault of the lane in an order of its own.
    pub fn steps(&self, lane: Lane) -> Vec<Step> {
        let mut random = ChaCha8Rng::seed_from_u64(self.seed ^ lane as u64);
        let mut steps = Vec::new();
        for run in 1..=self.runs {
            let mut faults: Vec<Trouble> = self
                .faults
                .iter()
                .copied()
                .filter(|fault| fault.lane() == lane)
                .collect();
            for at in (1..faults.len()).rev() {
                faults.swap(at, random.random_range(0..=at));
            }
            for fault in faults {
                steps.push(Step {
                    number: u32::try_from(steps.len()).unwrap_or(u32::MAX) + 1,
                    fault,
                    run,
                    pause_ms: random.random_range(1_500..3_500),
                });
            }
        }
        steps
    }

    /// Healers that take part in a fault: the ablations only where what they lack could matter, the one without a proxy where a service that
    /// has one is restarted.
    pub fn takes_part(&self, healer: Healer, fault: Trouble) -> bool {
        self.healers.contains(&healer)
            && match healer {
                Healer::Theriac | Healer::Threshold | Healer::Monit => true,
                Healer::TheriacDirect => {
                    matches!(fault, Trouble::Kill9 | Trouble::Hang | Trouble::MemoryLeak)
                }
                Healer::WithoutPrediction => fault.is_gradual(),
                Healer::WithoutDiagnosis => fault.forbids_restart() && !fault.is_gradual(),
            }
    }

    /// About how long it takes. All lanes go on at once, but where a fault takes the machine, for one healer after the other.
    pub fn about(&self) -> Duration {
        let of = |lane| -> Duration {
            let steps = self.steps(lane);
            let shared = steps.iter().filter(|step| !step.fault.takes_the_machine());
            shared.map(|step| step.fault.about()).sum()
        };
        let alone: Duration = self
            .faults
            .iter()
            .filter(|fault| fault.takes_the_machine())
            .map(|fault| {
                let healers = self
                    .healers
                    .iter()
                    .filter(|healer| self.takes_part(**healer, *fault));
                fault.about() * u32::try_from(healers.count()).unwrap_or(0) * self.runs
            })
            .sum();
        let longest = Lane::ALL.into_iter().map(of).max().unwrap_or_default();
        SETTING_UP + longest + alone
    }
}

/// Servers, services and healers started, and the edges' learning of what is normal.
const SETTING_UP: Duration = Duration::from_mins(1);

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(seed: u64) -> Plan {
        Plan {
            faults: Trouble::ALL.to_vec(),
            healers: Healer::ALL.to_vec(),
            runs: 5,
            seed,
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_schedule_and_another_one_another() {
        for lane in Lane::ALL {
            assert_eq!(plan(7).steps(lane), plan(7).steps(lane), "seed 7");
            assert_ne!(plan(7).steps(lane), plan(8).steps(lane), "seeds 7 and 8");
        }
    }

    #[test]
    fn every_fault_comes_once_in_every_run_and_the_order_changes() {
        let steps = plan(7).steps(Lane::Http);
        let of_lane = Trouble::ALL
            .iter()
            .filter(|fault| fault.lane() == Lane::Http)
            .count();
        assert_eq!(steps.len(), 5 * of_lane);
        let order = |run| -> Vec<Trouble> {
            steps
                .iter()
                .filter(|step| step.run == run)
                .map(|step| step.fault)
                .collect()
        };
        for run in 1..=5 {
            let mut sorted = order(run);
            sorted.sort_unstable();
            sorted.dedup();
            assert_eq!(sorted.len(), of_lane, "run {run}");
        }
        assert!((2..=5).any(|run| order(run) != order(1)), "seed 7");
        assert!(steps.iter().all(|step| step.fault.lane() == Lane::Http));
    }

    #[test]
    fn a_schedule_does_not_depend_on_who_heals() {
        let alone = Plan {
            healers: vec![Healer::Theriac],
            ..plan(7)
        };
        assert_eq!(alone.steps(Lane::Postgres), plan(7).steps(Lane::Postgres));
        assert!(
            alone.about() < plan(7).about(),
            "what takes the machine is done one by one"
        );
    }
}
