//! Seeded simulation of rounds: the two state machines in a world of lost, late, doubled and overtaking messages,
//! partitions, full disks and crashes, with an oracle after every step, and then a calm world in which the rounds
//! **must** go on.
//!
//! What counts as a failure: any rule of [`oracle`] broken at any step; no round with every edge in it within the
//! patience of the calm phase; a machine that does not stop when told to. What does not: an aborted round, a
//! refused update, a decline, an edge that missed a round. What stays random: nothing. A failure prints the seed
//! and the shortest list of operations that was found, as a literal for [`regressions`].
//!
//! `THERIAC_SIMULATION_SEEDS=100000 cargo test --release -p theriac-tests --test simulation` runs more seeds, and
//! `THERIAC_SIMULATION_FIRST=7 THERIAC_SIMULATION_SEEDS=1` exactly one.
//!
//! | escaped bug | found by | reproduced by |
//! |---|---|---|
//! | none so far | | |

#[cfg(test)]
mod op;
#[cfg(test)]
mod oracle;
#[cfg(test)]
mod regressions;

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread;

    use crate::op::{Scenario, Tally};

    /// Seeds of a default run.
    const SEEDS: u64 = 1500;

    #[test]
    fn rounds_keep_every_promise_in_any_weather_and_go_on_when_it_clears() {
        let first = number("THERIAC_SIMULATION_FIRST", 0);
        let last = first + number("THERIAC_SIMULATION_SEEDS", SEEDS);
        let next = AtomicU64::new(first);
        let work = || {
            let mut tally = Tally::default();
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= last {
                    return Ok(tally);
                }
                let scenario = Scenario::from_seed(seed);
                match scenario.run() {
                    Ok(run) => tally.add(&run),
                    Err(_) => return Err(scenario.shrink()),
                }
            }
        };
        let workers = thread::available_parallelism().map_or(1, usize::from);
        let results: Vec<_> = thread::scope(|scope| {
            let handles: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
            handles.into_iter().map(|handle| handle.join().unwrap()).collect()
        });
        let mut tally = Tally::default();
        for result in results {
            match result {
                Ok(part) => tally.add(&part),
                Err(failure) => panic!("{failure}"),
            }
        }
        println!("{} seeds: {tally:?}", last - first);
        if last - first >= SEEDS {
            // A simulation that meets no trouble proves nothing.
            tally.assert_varied(last - first);
        }
    }

    #[test]
    fn same_scenario_gives_the_same_story() {
        for seed in 0..5 {
            let scenario = Scenario::from_seed(seed);
            assert_eq!(scenario.run().unwrap(), scenario.run().unwrap());
        }
    }

    fn number(name: &str, default: u64) -> u64 {
        std::env::var(name).map_or(default, |value| value.parse().unwrap())
    }
}
