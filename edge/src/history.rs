//! The last rows of one lane, bounded, in memory only.

use std::collections::VecDeque;

use theriac_model::sample::Sample;
use theriac_model::series::Series;

/// Share of a block's rows that must be there for the block to count as complete.
const COMPLETE_SHARE: f64 = 0.9;

/// A ring of rows. It is never written anywhere: after a restart it begins empty.
#[derive(Debug)]
pub struct History {
    channels: usize,
    rows_max: usize,
    rows: VecDeque<(Sample, bool)>,
    quiet: usize,
}

impl History {
    /// Room for `rows_max` rows of `channels` values.
    pub fn new(channels: usize, rows_max: usize) -> Self {
        Self {
            channels,
            rows_max: rows_max.max(1),
            rows: VecDeque::new(),
            quiet: 0,
        }
    }

    /// Takes a row; the oldest makes room. `quiet` is false for rows during an alarm or an incident, which no fit may
    /// learn as normal. A row of another width is dropped.
    pub fn push(&mut self, sample: Sample, quiet: bool) {
        if sample.values.len() != self.channels {
            return;
        }
        if self.rows.len() == self.rows_max {
            self.quiet -= usize::from(self.rows.pop_front().is_some_and(|(_, quiet)| quiet));
        }
        self.quiet += usize::from(quiet);
        self.rows.push_back((sample, quiet));
    }

    /// Rows held.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether it holds no row.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Rows held outside alarms and incidents.
    pub fn quiet_len(&self) -> usize {
        self.quiet
    }

    /// The last `rows` quiet rows, oldest first: what a detector is fitted on and the gate judges by.
    pub fn quiet(&self, rows: usize) -> Series {
        let skip = self.quiet_len().saturating_sub(rows);
        self.series(
            self.rows
                .iter()
                .filter(|(_, quiet)| *quiet)
                .skip(skip)
                .map(|(sample, _)| sample),
        )
    }

    /// The last `rows` rows, oldest first.
    pub fn tail(&self, rows: usize) -> Series {
        self.series(
            self.rows
                .iter()
                .skip(self.rows.len().saturating_sub(rows))
                .map(|(sample, _)| sample),
        )
    }

    /// Ids (Unix time over `span_ms`) of the blocks that are over and whose rows are there, oldest first.
    ///
    /// Alarms play no part: which blocks are released must not depend on what other blocks hold, or one block's
    /// presence would change more than its own share of the sum.
    pub fn complete_blocks(&self, span_ms: u64, block_rows: u32) -> Vec<u64> {
        let Some((newest, _)) = self.rows.back() else {
            return Vec::new();
        };
        let current = newest.at_ms / span_ms.max(1);
        let needed = (f64::from(block_rows) * COMPLETE_SHARE).ceil();
        let mut counts: Vec<(u64, u32)> = Vec::new();
        for (sample, _) in &self.rows {
            let id = sample.at_ms / span_ms.max(1);
            match counts.last_mut() {
                Some((latest, count)) if *latest == id => *count += 1,
                _ => counts.push((id, 1)),
            }
        }
        // Rows come in order, so there is one run for each block, unless the clock was set back.
        counts.sort_unstable();
        counts.dedup_by(|next, kept| {
            let same = next.0 == kept.0;
            if same {
                kept.1 += next.1;
            }
            same
        });
        let whole = counts
            .into_iter()
            .filter(|(id, count)| *id < current && f64::from(*count) >= needed);
        whole.map(|(id, _)| id).collect()
    }

    /// The rows of one block, at most `block_rows`.
    pub fn block(&self, id: u64, span_ms: u64, block_rows: u32) -> Series {
        let inside = self
            .rows
            .iter()
            .filter(|(sample, _)| sample.at_ms / span_ms.max(1) == id);
        self.series(inside.take(block_rows as usize).map(|(sample, _)| sample))
    }

    fn series<'a>(&self, rows: impl Iterator<Item = &'a Sample>) -> Series {
        // Rows of another width were never taken in.
        Series::from_samples(self.channels, rows).unwrap_or_else(|_| Series::empty(self.channels))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(rows: u16) -> History {
        let mut history = History::new(1, 1000);
        for row in 0..rows {
            history.push(
                Sample {
                    at_ms: 10_000 + u64::from(row) * 100,
                    values: vec![f32::from(row)],
                },
                row % 10 != 3,
            );
        }
        history
    }

    #[test]
    fn oldest_rows_make_room_and_foreign_rows_are_dropped() {
        let mut history = History::new(1, 3);
        for value in 0..5_u8 {
            history.push(
                Sample {
                    at_ms: u64::from(value),
                    values: vec![f32::from(value)],
                },
                true,
            );
        }
        history.push(
            Sample {
                at_ms: 9,
                values: vec![0.0, 0.0],
            },
            true,
        );
        assert_eq!(history.tail(10).values(), [2.0, 3.0, 4.0]);
        assert_eq!(history.len(), 3);
    }

    #[test]
    fn rows_of_alarms_are_left_out_of_fits() {
        let history = history(20);
        assert_eq!(history.quiet_len(), 18);
        assert_eq!(history.quiet(100).rows(), 18);
        assert!(
            history
                .quiet(100)
                .values()
                .iter()
                .all(|value| (*value - 3.0).abs() > 0.1 && (*value - 13.0).abs() > 0.1)
        );
        assert_eq!(history.quiet(2).values(), [18.0, 19.0]);
    }

    #[test]
    fn a_clock_that_was_set_back_counts_a_block_once() {
        let mut history = history(15);
        // Half of block 10 again, then on to block 12.
        for at_ms in (10_050..11_000).step_by(100).chain([12_000]) {
            history.push(
                Sample {
                    at_ms,
                    values: vec![0.0],
                },
                true,
            );
        }
        assert_eq!(history.complete_blocks(1000, 20), [10]);
        assert_eq!(history.complete_blocks(1000, 10), [10]);
    }

    #[test]
    fn blocks_are_aligned_complete_and_over() {
        // Rows from 10.0 s to 13.4 s, ten to a second: blocks 10, 11, 12 are over, 13 is not.
        let history = history(35);
        assert_eq!(history.complete_blocks(1000, 10), [10, 11, 12]);
        assert_eq!(
            history.block(11, 1000, 10).values()[0].to_bits(),
            10.0_f32.to_bits()
        );
        assert_eq!(history.block(11, 1000, 4).rows(), 4);
        assert_eq!(
            history.complete_blocks(1000, 12),
            Vec::<u64>::new(),
            "ten rows are no block of twelve"
        );
        assert_eq!(
            history.complete_blocks(700, 7),
            [15, 16, 17, 18],
            "block 14 began before the first row"
        );
    }
}
