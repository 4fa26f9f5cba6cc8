//! What the demo will do and when, from how long it may take.

use std::time::Duration;

use theriac_aggregator::config::{ModelSettings, RoundSettings};

use crate::fleet::fault::Fault;
use crate::fleet::place::{EdgeTerms, SAMPLING};

/// Names of the honest sites; the fault of the same position hits their service.
pub(super) const HONEST: [&str; 4] = ["amber", "birch", "cedar", "dune"];
/// Name of the hostile site.
pub(super) const HOSTILE: &str = "ember";
/// The honest site with the small budget.
pub(super) const FRUGAL: &str = "birch";
/// Releases that its policy allows.
pub(super) const FRUGAL_RELEASES: u64 = 4;
/// Faults in the order in which they come, and the position of the site that suffers.
pub(super) const FAULTS: [(Fault, usize); 4] = [
    (Fault::Kill9, 0),
    (Fault::Hang, 1),
    (Fault::MemoryLeak, 2),
    (Fault::CpuHog, 3),
];

/// Shortest and longest demo, in seconds.
pub const SECONDS_MIN: u64 = 55;
/// See [`SECONDS_MIN`].
pub const SECONDS_MAX: u64 = 180;
/// Length without any option.
pub const SECONDS_DEFAULT: u64 = 110;
/// Length of `--quick`.
pub const SECONDS_QUICK: u64 = 65;

/// Samples in one block, the privacy unit: four seconds.
const BLOCK_ROWS: u32 = 16;

/// Times of a demo.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Plan {
    /// About how long it takes.
    pub(super) seconds: f64,
    /// Samples before the first model.
    pub(super) warm_up_rows: usize,
    /// Time from one fault to the next, unless healing takes longer.
    pub(super) spacing: Duration,
    /// Longest time that an edge may take to heal a fault.
    pub(super) heal_limit: Duration,
    /// Calm at the end.
    pub(super) calm: Duration,
}

impl Plan {
    /// Divides `seconds` (brought into its range) between learning, faults and calm.
    pub(super) fn new(seconds: u64) -> Self {
        let seconds = seconds.clamp(SECONDS_MIN, SECONDS_MAX) as f64;
        let learning = (seconds * 0.3).clamp(18.0, 45.0);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a few hundred samples at most"
        )]
        let warm_up_rows = (learning / SAMPLING.as_secs_f64()) as usize;
        let faults = FAULTS.len() as f64;
        Self {
            seconds,
            warm_up_rows,
            spacing: Duration::from_secs_f64(((seconds - learning - 14.0) / faults).max(2.0)),
            heal_limit: Duration::from_secs(40),
            calm: Duration::from_secs_f64((seconds * 0.05).clamp(2.0, 6.0)),
        }
    }

    /// What every edge of the demo is told.
    pub(super) fn edge_terms(self) -> EdgeTerms {
        EdgeTerms {
            warm_up_rows: self.warm_up_rows,
            // One a day cannot be told from a warm-up of half a minute. An alarm alone changes nothing.
            false_alarms_per_day: 40.0,
            cooldown: Duration::from_secs(3),
            actions_max: 40,
        }
    }

    /// The rounds: short blocks, a round every few seconds. The deadline is what a round waits for the hostile edge,
    /// whose updates are refused.
    pub(super) fn rounds() -> RoundSettings {
        RoundSettings {
            quorum: 3,
            deadline: Duration::from_millis(1_500),
            pause: Duration::from_millis(2_700),
            clip_norm: Some(
                theriac_model::moments::BLOCK_CLIP_NORM * f64::from(BLOCK_ROWS)
                    / theriac_model::moments::BLOCK_ROWS as f64,
            ),
            block_rows: BLOCK_ROWS,
            blocks_min: 1,
            blocks_max: 15,
            ..RoundSettings::default()
        }
    }

    /// What is learnt.
    pub(super) fn model() -> ModelSettings {
        ModelSettings::default()
    }

    /// Length of one block in time.
    pub(super) fn block() -> Duration {
        SAMPLING * BLOCK_ROWS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_leaves_time_for_learning_and_for_each_fault() {
        for seconds in [
            1,
            SECONDS_MIN,
            SECONDS_QUICK,
            SECONDS_DEFAULT,
            SECONDS_MAX,
            10_000,
        ] {
            let plan = Plan::new(seconds);
            assert!((60..=200).contains(&plan.warm_up_rows), "{plan:?}");
            let faults = plan.spacing.as_secs_f64() * FAULTS.len() as f64;
            let learning = plan.warm_up_rows as f64 * SAMPLING.as_secs_f64();
            assert!(
                learning + faults + plan.calm.as_secs_f64() < plan.seconds,
                "{plan:?}"
            );
        }
    }

    #[test]
    fn every_fault_hits_a_site_of_its_own_and_the_aggregator_withstands_the_liar() {
        let sites: std::collections::BTreeSet<usize> = FAULTS.iter().map(|(_, site)| *site).collect();
        assert_eq!(sites.len(), FAULTS.len());
        assert!(sites.iter().all(|site| *site < HONEST.len()) && HONEST.contains(&FRUGAL));
        let rounds = Plan::rounds();
        assert!(rounds.byzantine * 2 < rounds.quorum && rounds.quorum < HONEST.len());
    }
}
