//! The unit of one record: windows of consecutive samples, and how many of them one sample takes part in.
//!
//! A block of R samples is cut into n = ⌊(R − W)/S⌋ + 1 windows of W samples, S apart, from its first sample on; none reaches over the block's edge. Each
//! window gives one vector, clipped to C/n, so that a block still adds at most C to the sum.
//!
//! **Sensitivity.** A sample lies in at most m = min(⌈W/S⌉, n) windows. A window counts only when every sample of it is there; so a sample
//! more or less makes at most m windows appear or disappear, and changes no other: the sum moves by at most m·⌊K/n⌋ grid steps, that is by at most
//! (m/n)·C. With S = W, the default, m = 1. Samples that are *replaced* by others move it by at most twice that.

use serde::{Deserialize, Serialize};

/// Samples of one window where the policy does not say otherwise.
pub const WINDOW_DEFAULT: u32 = 60;

/// Fewest samples that hold a lag of ten and its target.
pub const WINDOW_MIN: u32 = 11;

/// Most samples of a window, of the distance between two, and of a block: a day of seconds.
pub const WINDOW_MAX: u32 = 86_400;

/// Why there are no such windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WindowsError {
    /// It holds no target with its lags, or is endless.
    #[error("a window holds {WINDOW_MIN} to {WINDOW_MAX} samples, not {0}")]
    Window(u32),
    /// They would all be the same one, or lie days apart.
    #[error("windows are 1 to {WINDOW_MAX} samples apart, not {0}")]
    Stride(u32),
    /// Not one fits into a block.
    #[error("a block of {rows} samples holds no window of {window}")]
    Block {
        /// Samples of a block, at most [`WINDOW_MAX`].
        rows: u32,
        /// Samples of a window.
        window: u32,
    },
}

/// Windows of W samples, S apart, whatever the block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordWindows {
    window: u32,
    stride: u32,
}

impl RecordWindows {
    /// Windows of `window` samples, `stride` apart.
    ///
    /// # Errors
    /// [`WindowsError::Window`], [`WindowsError::Stride`]
    pub fn new(window: u32, stride: u32) -> Result<Self, WindowsError> {
        if !(WINDOW_MIN..=WINDOW_MAX).contains(&window) {
            return Err(WindowsError::Window(window));
        }
        if !(1..=WINDOW_MAX).contains(&stride) {
            return Err(WindowsError::Stride(stride));
        }
        Ok(Self { window, stride })
    }

    /// Those of a block of `rows` samples.
    ///
    /// # Errors
    /// [`WindowsError::Block`] when not one fits, or a block is longer than [`WINDOW_MAX`].
    pub fn in_block(self, rows: u32) -> Result<BlockWindows, WindowsError> {
        let Self { window, stride } = self;
        if rows < window || rows > WINDOW_MAX {
            return Err(WindowsError::Block { rows, window });
        }
        Ok(BlockWindows { rows, window, stride })
    }
}

/// The windows of one block, as a charge says them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawWindows")]
pub struct BlockWindows {
    rows: u32,
    window: u32,
    stride: u32,
}

impl BlockWindows {
    /// Samples of a window, W.
    pub fn window(self) -> u32 {
        self.window
    }

    /// Samples from the beginning of one to that of the next, S.
    pub fn stride(self) -> u32 {
        self.stride
    }

    /// Samples of a block, R.
    pub fn rows(self) -> u32 {
        self.rows
    }

    /// The same, whatever the block.
    pub fn of_any_block(self) -> RecordWindows {
        RecordWindows {
            window: self.window,
            stride: self.stride,
        }
    }

    /// Windows in a block, n, at least 1.
    pub fn count(self) -> u32 {
        (self.rows - self.window) / self.stride + 1
    }

    /// Most windows that one sample takes part in, m, at least 1 and at most n.
    pub fn multiplicity(self) -> u32 {
        self.window.div_ceil(self.stride).min(self.count())
    }

    /// What one sample more or less can move, in multiples of C: m/n, at most 1.
    pub fn sensitivity(self) -> f64 {
        f64::from(self.multiplicity()) / f64::from(self.count())
    }
}

/// As written; see [`BlockWindows`].
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawWindows {
    rows: u32,
    window: u32,
    stride: u32,
}

impl TryFrom<RawWindows> for BlockWindows {
    type Error = WindowsError;

    fn try_from(raw: RawWindows) -> Result<Self, WindowsError> {
        RecordWindows::new(raw.window, raw.stride)?.in_block(raw.rows)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_sample_lies_in_more_windows_than_is_stated(
            window in WINDOW_MIN..80, stride in 1_u32..100, more in 0_u32..200, at in 0_u32..280,
        ) {
            let rows = window + more;
            let windows = RecordWindows::new(window, stride).unwrap().in_block(rows).unwrap();
            let starts: Vec<u32> = (0..windows.count()).map(|k| k * stride).collect();
            prop_assert!(starts.iter().all(|start| start + window <= rows), "one reaches over the edge");
            prop_assert!(windows.count() * stride + window > rows, "one more would fit");
            let at = at % rows;
            let inside = starts.iter().filter(|start| (**start..**start + window).contains(&at)).count();
            prop_assert!(inside <= windows.multiplicity() as usize);
            prop_assert!(windows.sensitivity() <= 1.0);
        }
    }

    #[test]
    fn windows_side_by_side_hold_each_sample_once() {
        let windows = |window, stride, rows| {
            let windows = RecordWindows::new(window, stride)
                .unwrap()
                .in_block(rows)
                .unwrap();
            (windows.count(), windows.multiplicity())
        };
        assert_eq!(windows(60, 60, 3_600), (60, 1));
        assert_eq!(windows(60, 60, 60), (1, 1));
        assert_eq!(
            windows(11, 10, 60),
            (5, 2),
            "the target of one is the oldest lag of the next"
        );
        assert_eq!(windows(60, 1, 61), (2, 2), "there are no more than two");
        assert_eq!(windows(20, 30, 60), (2, 1));
    }

    #[test]
    fn what_holds_no_window_is_refused() {
        assert_eq!(RecordWindows::new(10, 10), Err(WindowsError::Window(10)));
        assert_eq!(RecordWindows::new(90_000, 1), Err(WindowsError::Window(90_000)));
        assert_eq!(RecordWindows::new(11, 0), Err(WindowsError::Stride(0)));
        let short = RecordWindows::new(60, 60).unwrap().in_block(59);
        assert_eq!(short, Err(WindowsError::Block { rows: 59, window: 60 }));
        for bad in [
            r#"{"rows":10,"window":11,"stride":1}"#,
            r#"{"rows":60,"window":60,"stride":0}"#,
            r#"{"rows":60,"window":60,"stride":60,"n":1}"#,
        ] {
            assert!(serde_json::from_str::<BlockWindows>(bad).is_err(), "{bad}");
        }
    }
}
