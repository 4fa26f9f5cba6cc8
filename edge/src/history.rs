//! The last rows of one lane, bounded, in memory only.

use std::collections::VecDeque;
use std::ops::Range;

use theriac_model::sample::Sample;
use theriac_model::series::Series;
use theriac_privacy::windows::BlockWindows;

/// Share of a block's rows that must be there for the block to count as complete.
const COMPLETE_SHARE: f64 = 0.9;

/// A ring of rows. It is never written anywhere: after a restart it begins empty.
#[derive(Debug)]
pub struct History {
    channels: usize,
    rows_max: usize,
    rows: VecDeque<(Sample, bool)>,
    quiet: usize,
    /// When the program was started, by its clock.
    started_ms: u64,
}

impl History {
    /// Room for `rows_max` rows of `channels` values. `started_ms` is the time of the program's start, in milliseconds of Unix time: from there on blocks are
    /// named, whenever the first row comes.
    pub fn new(channels: usize, rows_max: usize, started_ms: u64) -> Self {
        Self {
            channels,
            rows_max: rows_max.max(1),
            rows: VecDeque::new(),
            quiet: 0,
            started_ms,
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

    /// Ids (Unix time over `span_ms`) of the blocks that a round may name at `now_ms`, oldest first: those that are over, and that this memory spans
    /// from beginning to end, **whether or not anything of them is there**. Rows are `step_ms` apart. The block in which the program was started is named when no
    /// more than a tenth of it had passed by then.
    ///
    /// It follows from the clock, the time of the program's start and the memory's size alone. No row has a say in it, not even the first one: else one sample
    /// or one block more would make another block appear or disappear, and would change more than its own share of the sum.
    pub fn spanned_blocks(&self, now_ms: u64, span_ms: u64, step_ms: u64) -> Range<u64> {
        let (span, step) = (span_ms.max(1), step_ms.max(1));
        // A row of a block's last moment may still be on its way here.
        let over = now_ms.saturating_sub(step) / span;
        let late = self.started_ms % span > span / 10;
        let begun = self.started_ms / span + u64::from(late);
        // Rows come at most one a step, so what is younger than this is held. Two steps for a clock that is being corrected.
        let held_ms = step.saturating_mul((self.rows_max as u64).saturating_sub(2));
        let held = now_ms.saturating_sub(held_ms).div_ceil(span);
        let begin = begun.max(held).min(over);
        begin..over
    }

    /// The rows of one block, at most `block_rows`; `None` unless nine in ten of them are there.
    pub fn complete_block(&self, id: u64, span_ms: u64, block_rows: u32) -> Option<Series> {
        let series = self.block(id, span_ms, block_rows);
        let needed = (f64::from(block_rows) * COMPLETE_SHARE).ceil();
        (series.rows() as f64 >= needed).then_some(series)
    }

    /// The windows of one block in which every sample is there, oldest first; `span_ms` is the block's length.
    ///
    /// A window is the time from its first sample's turn to the turn after its last one, counted from the block's beginning. It is whole when exactly as many
    /// samples were taken in it as it has turns, and something was measured in each. So a sample that is there or not makes the windows that its time lies
    /// in appear or disappear, and no other window knows of it.
    pub fn windows(&self, id: u64, span_ms: u64, windows: BlockWindows) -> Vec<Series> {
        let span = u128::from(span_ms.max(1));
        let mut inside: Vec<&Sample> = self
            .rows
            .iter()
            .map(|(sample, _)| sample)
            .filter(|sample| u128::from(sample.at_ms) / span == u128::from(id))
            .collect();
        // In order already, unless the clock was set back.
        inside.sort_by_key(|sample| sample.at_ms);
        let turn = |row: u32| {
            let after = u128::from(row) * span / u128::from(windows.rows());
            u128::from(id) * span + after
        };
        let before = |end: u128| inside.partition_point(|sample| u128::from(sample.at_ms) < end);
        let whole = |first: u32| {
            let rows = &inside[before(turn(first))..before(turn(first + windows.window()))];
            let measured = |sample: &&Sample| sample.values.iter().any(|value| value.is_finite());
            let there = rows.len() == windows.window() as usize && rows.iter().all(measured);
            there.then(|| self.series(rows.iter().copied()))
        };
        (0..windows.count())
            .filter_map(|window| whole(window * windows.stride()))
            .collect()
    }

    /// The rows of one block, at most `block_rows`.
    fn block(&self, id: u64, span_ms: u64, block_rows: u32) -> Series {
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
    use theriac_privacy::windows::RecordWindows;

    use super::*;

    fn history(rows: u16) -> History {
        let mut history = History::new(1, 1000, 10_000);
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
        let mut history = History::new(1, 3, 0);
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
    fn a_clock_that_was_set_back_makes_no_second_block() {
        let mut history = history(15);
        let rows = |history: &History| history.complete_block(10, 1000, 20).map(|series| series.rows());
        assert_eq!(rows(&history), None);
        // Block 10 again.
        for at_ms in (10_050..11_000).step_by(100) {
            history.push(sample(at_ms, 0.0), true);
        }
        assert_eq!(rows(&history), Some(20));
        assert_eq!(history.spanned_blocks(11_600, 1000, 100), 10..11);
    }

    fn sample(at_ms: u64, value: f32) -> Sample {
        Sample {
            at_ms,
            values: vec![value],
        }
    }

    #[test]
    fn blocks_that_are_over_are_named_whether_or_not_they_are_there() {
        // Rows from 10.0 s to 13.4 s, ten to a second.
        let mut history = history(35);
        assert_eq!(history.spanned_blocks(13_450, 1000, 100), 10..13);
        assert_eq!(
            history.spanned_blocks(14_050, 1000, 100),
            10..13,
            "the last row may be on its way"
        );
        assert_eq!(history.spanned_blocks(14_100, 1000, 100), 10..14);
        assert_eq!(
            history.spanned_blocks(13_450, 700, 100),
            15..19,
            "block 14 began before the program"
        );
        assert!(
            history.spanned_blocks(9_000, 1000, 100).is_empty(),
            "a clock that was set back"
        );
        history.push(sample(16_000, 0.0), true);
        assert_eq!(history.spanned_blocks(16_200, 1000, 100), 10..16);
        let rows = |id| history.complete_block(id, 1000, 10).map(|series| series.rows());
        assert_eq!([12, 13, 14, 15].map(rows), [Some(10), None, None, None]);
        assert_eq!(
            history.complete_block(12, 1000, 12),
            None,
            "ten rows are no block of twelve"
        );
        let first = history.complete_block(11, 1000, 10).unwrap();
        assert_eq!(first.values()[0].to_bits(), 10.0_f32.to_bits());
    }

    /// One row more or less, the first one above all, names no other block: neither one that began before it nor one that is left without any row.
    #[test]
    fn no_row_has_a_say_in_which_blocks_are_named() {
        let named = |started_ms: u64, times: &[u64]| {
            let mut history = History::new(1, 1000, started_ms);
            for at_ms in times {
                history.push(sample(*at_ms, 0.0), true);
            }
            history.spanned_blocks(13_200, 1000, 100)
        };
        // On either side of a tenth of block 10.
        for (started_ms, expected) in [
            (10_050, 10..13),
            (10_100, 10..13),
            (10_101, 11..13),
            (10_999, 11..13),
        ] {
            for times in [
                &[][..],
                &[10_095, 10_195],
                &[10_195],
                &[11_150],
                &[9_000],
                &[12_999],
            ] {
                assert_eq!(named(started_ms, times), expected, "{started_ms}, {times:?}");
            }
        }
    }

    /// What had to make room is not named: how much is held must not decide which blocks a round reads.
    #[test]
    fn blocks_older_than_the_memory_are_not_named() {
        let mut history = History::new(1, 32, 10_000);
        for row in 0..100 {
            history.push(sample(10_000 + row * 100, 0.0), true);
        }
        // Thirty turns back from 20.0 s.
        assert_eq!(history.spanned_blocks(20_000, 1000, 100), 17..19);
        assert_eq!(history.spanned_blocks(20_900, 1000, 100), 18..20);
        assert!(history.complete_block(17, 1000, 10).is_some());
    }

    #[test]
    fn a_window_is_whole_or_is_not_there() {
        let windows = RecordWindows::new(12, 12).unwrap().in_block(30).unwrap();
        let whole = |history: &History| {
            let found = history.windows(1, 3_000, windows);
            found
                .iter()
                .map(|series| (series.rows(), series.values()[0]))
                .collect::<Vec<_>>()
        };
        let of = |times: &mut dyn Iterator<Item = u64>| {
            let mut history = History::new(1, 100, 0);
            for at_ms in times {
                history.push(sample(at_ms, at_ms as f32), true);
            }
            history
        };
        let all = || (0..90_u64).map(|turn| turn * 100 + 7);
        assert_eq!(whole(&of(&mut all())), [(12, 3_007.0), (12, 4_207.0)]);
        let without = |gone: u64| of(&mut all().filter(move |at_ms| *at_ms != gone));
        assert_eq!(whole(&without(3_107)), [(12, 4_207.0)]);
        assert_eq!(whole(&without(5_307)), [(12, 3_007.0)]);
        assert_eq!(whole(&without(5_407)).len(), 2, "it lies in no window");
        assert_eq!(
            whole(&of(&mut all().chain([3_150]))),
            [(12, 4_207.0)],
            "one too many"
        );
        let mut nothing = without(3_107);
        nothing.push(sample(3_107, f32::NAN), true);
        assert_eq!(whole(&nothing), [(12, 4_207.0)], "nothing was measured there");
    }
}
