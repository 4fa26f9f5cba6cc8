//! The loss of every block, run-length coded: neighbouring blocks with the same charge are one entry, so years of hourly
//! blocks take little memory.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use super::loss::Loss;

/// What one block was charged.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Charge {
    /// Sum of the releases that read the block.
    pub(crate) loss: Loss,
    /// How many they are.
    pub(crate) releases: u32,
}

impl Charge {
    fn none() -> Self {
        Self {
            loss: Loss::none(),
            releases: 0,
        }
    }

    fn first(loss: &Loss) -> Self {
        Self {
            loss: loss.clone(),
            releases: 1,
        }
    }
}

/// A charge that holds up to and including block `last`.
#[derive(Debug, Clone)]
struct Run {
    last: u64,
    charge: Charge,
}

/// Charges by block id. Runs are keyed by their first block, do not overlap and hold at least one release.
#[derive(Debug, Clone, Default)]
pub(crate) struct BlockCharges {
    runs: BTreeMap<u64, Run>,
}

impl BlockCharges {
    /// What `block` was charged.
    pub(crate) fn of(&self, block: u64) -> Charge {
        match self.runs.range(..=block).next_back() {
            Some((_, run)) if run.last >= block => run.charge.clone(),
            _ => Charge::none(),
        }
    }

    /// Adds one release of `loss` to all `blocks`.
    pub(crate) fn add(&mut self, blocks: RangeInclusive<u64>, loss: &Loss) {
        let (first, last) = (*blocks.start(), *blocks.end());
        if first > last {
            return;
        }
        self.split_before(first);
        if let Some(after) = last.checked_add(1) {
            self.split_before(after);
        }
        let mut next = Some(first);
        let inside: Vec<(u64, Run)> = self
            .runs
            .range(first..=last)
            .map(|(start, run)| (*start, run.clone()))
            .collect();
        let mut changed: Vec<(u64, Run)> = Vec::with_capacity(2 * inside.len() + 1);
        for (start, run) in inside {
            if let Some(gap) = next.filter(|next| *next < start) {
                changed.push((
                    gap,
                    Run {
                        last: start - 1,
                        charge: Charge::first(loss),
                    },
                ));
            }
            let releases = run.charge.releases.saturating_add(1);
            changed.push((
                start,
                Run {
                    last: run.last,
                    charge: Charge {
                        loss: run.charge.loss.plus(loss),
                        releases,
                    },
                },
            ));
            next = run.last.checked_add(1);
        }
        if let Some(gap) = next.filter(|next| *next <= last) {
            changed.push((
                gap,
                Run {
                    last,
                    charge: Charge::first(loss),
                },
            ));
        }
        self.runs.extend(changed);
        self.join(first, last);
    }

    /// The different losses that blocks have; one for each run.
    pub(crate) fn losses(&self) -> impl Iterator<Item = &Loss> {
        self.runs.values().map(|run| &run.charge.loss)
    }

    /// The different losses that the given blocks have, uncharged ones included.
    pub(crate) fn losses_in(&self, blocks: RangeInclusive<u64>) -> Vec<Loss> {
        let (first, last) = (*blocks.start(), *blocks.end());
        let mut losses = vec![self.of(first).loss];
        let mut covered = match self.runs.range(..=first).next_back() {
            Some((_, run)) if run.last >= first => Some(run.last),
            _ => first.checked_sub(1),
        };
        let mut gaps = false;
        for (start, run) in self.runs.range(first..=last) {
            gaps |= covered.map_or(*start > 0, |covered| *start > covered.saturating_add(1));
            losses.push(run.charge.loss.clone());
            covered = Some(run.last);
        }
        if gaps || covered.is_none_or(|covered| covered < last) {
            losses.push(Loss::none());
        }
        losses
    }

    /// The first of these blocks that was read most often, and how often.
    pub(crate) fn most_releases(&self, blocks: RangeInclusive<u64>) -> (u64, u32) {
        let first = (*blocks.start(), self.of(*blocks.start()).releases);
        let inside = self
            .runs
            .range(blocks)
            .map(|(start, run)| (*start, run.charge.releases));
        inside.fold(first, |most, next| if next.1 > most.1 { next } else { most })
    }

    /// Runs of blocks with the same charge, ascending.
    pub(crate) fn runs(&self) -> impl Iterator<Item = (RangeInclusive<u64>, &Charge)> {
        self.runs
            .iter()
            .map(|(first, run)| (*first..=run.last, &run.charge))
    }

    /// Number of blocks that were charged at all.
    pub(crate) fn count(&self) -> u64 {
        self.runs.iter().fold(0, |sum, (start, run)| {
            sum.saturating_add((run.last - start).saturating_add(1))
        })
    }

    /// Runs of charged blocks, ascending, neighbours joined.
    pub(crate) fn ranges(&self) -> Vec<RangeInclusive<u64>> {
        let mut ranges: Vec<RangeInclusive<u64>> = Vec::new();
        for (start, run) in &self.runs {
            match ranges.last_mut() {
                Some(last) if last.end().checked_add(1) == Some(*start) => *last = *last.start()..=run.last,
                _ => ranges.push(*start..=run.last),
            }
        }
        ranges
    }

    /// Makes `block` the first of its run, if it lies inside one.
    fn split_before(&mut self, block: u64) {
        let Some((start, run)) = self.runs.range_mut(..block).next_back() else {
            return;
        };
        if run.last >= block {
            let rest = Run {
                last: run.last,
                charge: run.charge.clone(),
            };
            debug_assert!(*start < block, "the range ends before the block");
            run.last = block - 1;
            self.runs.insert(block, rest);
        }
    }

    /// Joins neighbouring runs of equal charge between the run before `first` and the run after `last`.
    fn join(&mut self, first: u64, last: u64) {
        let from = self
            .runs
            .range(..first)
            .next_back()
            .map_or(first, |(start, _)| *start);
        let to = last.saturating_add(1);
        let runs: Vec<(u64, Run)> = self
            .runs
            .range(from..=to)
            .map(|(start, run)| (*start, run.clone()))
            .collect();
        let mut kept: Option<(u64, Run)> = None;
        for (start, run) in runs {
            match &mut kept {
                Some((first, before))
                    if before.last.checked_add(1) == Some(start) && before.charge == run.charge =>
                {
                    before.last = run.last;
                    self.runs.remove(&start);
                    self.runs.insert(*first, before.clone());
                }
                _ => kept = Some((start, run)),
            }
        }
    }
}

/// The ids as runs of neighbours. `None` unless they are strictly ascending.
pub(crate) fn to_ranges(blocks: &[u64]) -> Option<Vec<(u64, u64)>> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for &block in blocks {
        match ranges.last_mut() {
            Some((_, last)) if *last >= block => return None,
            Some((_, last)) if last.checked_add(1) == Some(block) => *last = block,
            _ => ranges.push((block, block)),
        }
    }
    Some(ranges)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_one_entry_for_each_block(charges in prop::collection::vec((0_u64..60, 0_u64..20, 1_u8..4), 0..40)) {
            let mut runs = BlockCharges::default();
            let mut plain: BTreeMap<u64, (f64, u32)> = BTreeMap::new();
            for (first, length, rho) in charges {
                let rho = f64::from(rho);
                let touched = runs.losses_in(first..=first + length);
                for block in first..=first + length {
                    prop_assert!(touched.contains(&runs.of(block).loss), "block {}", block);
                }
                runs.add(first..=first + length, &Loss::zcdp(rho));
                for block in first..=first + length {
                    let entry = plain.entry(block).or_default();
                    *entry = (entry.0 + rho, entry.1 + 1);
                }
                let most = (first..=first + length).map(|block| runs.of(block).releases).max().unwrap_or(0);
                prop_assert_eq!(runs.most_releases(first..=first + length).1, most);
                for block in 0..90 {
                    let (rho, releases) = plain.get(&block).copied().unwrap_or_default();
                    let Charge { loss, releases: found } = runs.of(block);
                    let expected = Loss::zcdp(rho);
                    prop_assert_eq!((loss.curve(), found), (expected.curve(), releases));
                }
                prop_assert_eq!(runs.count(), plain.len() as u64);
                for (range, charge) in runs.runs() {
                    prop_assert_eq!(charge, &runs.of(*range.start()));
                    prop_assert_eq!(charge, &runs.of(*range.end()));
                }
                let listed: Vec<u64> = runs.ranges().into_iter().flatten().collect();
                prop_assert_eq!(listed, plain.keys().copied().collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn a_year_of_hours_charged_one_by_one_is_one_entry() {
        let mut charges = BlockCharges::default();
        for hour in 0..8760 {
            charges.add(hour..=hour, &Loss::zcdp(0.3));
        }
        assert_eq!((charges.runs.len(), charges.count()), (1, 8760));
    }

    #[test]
    fn the_last_block_of_all_is_no_exception() {
        let mut charges = BlockCharges::default();
        charges.add(u64::MAX..=u64::MAX, &Loss::zcdp(1.0));
        charges.add(u64::MAX - 1..=u64::MAX, &Loss::zcdp(1.0));
        assert_eq!(charges.of(u64::MAX).releases, 2);
        assert_eq!(charges.of(u64::MAX - 1).releases, 1);
    }

    #[test]
    fn ids_that_do_not_ascend_have_no_ranges() {
        assert_eq!(
            to_ranges(&[1, 2, 3, 7, 9, 10]),
            Some(vec![(1, 3), (7, 7), (9, 10)])
        );
        assert_eq!(to_ranges(&[]), Some(vec![]));
        assert!(to_ranges(&[1, 1]).is_none() && to_ranges(&[2, 1]).is_none());
    }
}
