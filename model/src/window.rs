//! The last rows, as the forecasters see them, and what stands in for a missing value.

use crate::{LAG_COUNT, LAG_MAX, LAGS};

/// A channel may be missing this many rows in a row before it stops counting in the score.
pub const HOLD_ROWS_MAX: u32 = 10;

/// The last [`LAG_MAX`] scaled rows. A fixed amount of memory: 10 rows.
#[derive(Debug, Clone)]
pub struct LagRing {
    channels: usize,
    rows: Vec<f32>,
    next: usize,
    filled: usize,
}

impl LagRing {
    /// An empty ring.
    pub fn new(channels: usize) -> Self {
        Self {
            channels,
            rows: vec![0.0; LAG_MAX * channels],
            next: 0,
            filled: 0,
        }
    }

    /// Takes the newest row in place of the oldest. `row` has one value per channel, none of them NaN.
    pub fn push(&mut self, row: &[f32]) {
        self.rows[self.next * self.channels..][..self.channels].copy_from_slice(row);
        self.next = (self.next + 1) % LAG_MAX;
        self.filled = (self.filled + 1).min(LAG_MAX);
    }

    /// Whether every lag is known.
    pub fn is_full(&self) -> bool {
        self.filled == LAG_MAX
    }

    /// Writes `[x_{t−1}, x_{t−2}, x_{t−3}, x_{t−5}, x_{t−10}]`, each of all channels, for the row that comes next.
    pub fn lags(&self, out: &mut [f32]) {
        for (lag, out) in LAGS.iter().zip(out.chunks_exact_mut(self.channels.max(1))) {
            let slot = (self.next + LAG_MAX - lag) % LAG_MAX;
            out.copy_from_slice(&self.rows[slot * self.channels..][..self.channels]);
        }
    }
}

/// Writes the lags of row `row` out of whole scaled rows `[time, channel]`; the same form as [`LagRing::lags`].
///
/// # Panics
/// When `row` is below [`LAG_MAX`].
pub fn lags_of(rows: &[f32], channels: usize, row: usize, out: &mut [f32]) {
    debug_assert_eq!(out.len(), channels * LAG_COUNT);
    for (lag, out) in LAGS.iter().zip(out.chunks_exact_mut(channels.max(1))) {
        out.copy_from_slice(&rows[(row - lag) * channels..][..channels]);
    }
}

/// Stands in for missing values: the last value of the channel is held, and counted. A channel that was missing
/// for more than [`HOLD_ROWS_MAX`] rows, or from the beginning, is *muted*: it adds nothing to the score until it
/// has been there for all lags again.
#[derive(Debug, Clone)]
pub struct Hold {
    last: Vec<f32>,
    seen: Vec<bool>,
    run: Vec<u32>,
    mute: Vec<u32>,
    held: u64,
}

impl Hold {
    /// No row yet; what is missing now counts as the channel's location, 0.
    pub fn new(channels: usize) -> Self {
        Self {
            last: vec![0.0; channels],
            seen: vec![false; channels],
            run: vec![0; channels],
            mute: vec![0; channels],
            held: 0,
        }
    }

    /// Replaces every NaN of a scaled row by the channel's last value.
    pub fn fill(&mut self, row: &mut [f32]) {
        for (channel, value) in row.iter_mut().enumerate().take(self.last.len()) {
            if value.is_nan() {
                self.held += 1;
                self.run[channel] = self.run[channel].saturating_add(1);
                if !self.seen[channel] || self.run[channel] > HOLD_ROWS_MAX {
                    self.mute[channel] = MUTE_ROWS;
                }
                *value = self.last[channel];
            } else {
                self.seen[channel] = true;
                self.run[channel] = 0;
                self.mute[channel] = self.mute[channel].saturating_sub(1);
                self.last[channel] = *value;
            }
        }
    }

    /// Rows are missing in time: every channel is muted until all lags are known again.
    pub fn mute_all(&mut self) {
        self.mute.fill(MUTE_ROWS);
    }

    /// Whether the channel adds nothing now.
    pub fn muted(&self, channel: usize) -> bool {
        self.mute[channel] > 0
    }

    /// Number of values that were held so far.
    pub fn held(&self) -> u64 {
        self.held
    }
}

/// Rows that must be there before a muted channel counts again: all lags and the row itself.
const MUTE_ROWS: u32 = 11;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ring_and_whole_rows_give_the_same_lags() {
        let rows: Vec<f32> = (0..60_u8).map(f32::from).collect();
        let mut ring = LagRing::new(2);
        for t in 0..30 {
            if t >= LAG_MAX {
                assert!(ring.is_full());
                let (mut a, mut b) = ([0.0; 10], [0.0; 10]);
                ring.lags(&mut a);
                lags_of(&rows, 2, t, &mut b);
                assert_eq!(a.map(f32::to_bits), b.map(f32::to_bits));
                assert_eq!((a[0], a[9]), (rows[2 * (t - 1)], rows[2 * (t - 10) + 1]));
            } else {
                assert!(!ring.is_full());
            }
            ring.push(&rows[2 * t..2 * t + 2]);
        }
    }

    #[test]
    fn short_absence_is_held_and_counted() {
        let mut hold = Hold::new(1);
        hold.fill(&mut [3.0]);
        for _ in 0..HOLD_ROWS_MAX {
            let mut row = [f32::NAN];
            hold.fill(&mut row);
            assert_eq!((row[0], hold.muted(0)), (3.0, false));
        }
        assert_eq!(hold.held(), u64::from(HOLD_ROWS_MAX));
    }

    #[test]
    fn long_absence_mutes_until_all_lags_are_known_again() {
        let mut hold = Hold::new(1);
        hold.fill(&mut [3.0]);
        for _ in 0..=HOLD_ROWS_MAX {
            hold.fill(&mut [f32::NAN]);
        }
        for _ in 0..LAG_MAX {
            assert!(hold.muted(0));
            hold.fill(&mut [4.0]);
        }
        assert!(hold.muted(0));
        hold.fill(&mut [4.0]);
        assert!(!hold.muted(0));
    }

    #[test]
    fn channel_missing_from_the_beginning_is_muted_at_once() {
        let mut hold = Hold::new(2);
        let mut row = [f32::NAN, 1.0];
        hold.fill(&mut row);
        assert_eq!(row.map(f32::to_bits), [0.0_f32, 1.0].map(f32::to_bits));
        assert!(hold.muted(0) && !hold.muted(1));
    }
}
