//! The arithmetic mean.

use super::rows::{Rows, Scalar};
use super::tiles::{self, Column, LANES};
use super::{Combined, Rule, RuleError, RuleName};

/// The mean of all rows, summed in `f64` in row order. Best when everybody is honest; one hostile row moves it anywhere
/// within the norm bound, so f is recorded and not used.
#[derive(Debug, Clone, Copy)]
pub struct Mean {
    byzantine: usize,
}

impl Mean {
    /// The mean; `byzantine` is kept for the record only.
    pub fn new(byzantine: usize) -> Self {
        Self { byzantine }
    }
}

impl Rule for Mean {
    fn name(&self) -> RuleName {
        RuleName::Mean
    }
    fn byzantine(&self) -> usize {
        self.byzantine
    }
    fn check(&self, n: usize) -> Result<(), RuleError> {
        super::minority(n, 0)
    }
    fn combine(&self, rows: &dyn Rows<f32>) -> Result<Combined<f32>, RuleError> {
        tiles::combine(self, rows)
    }
    fn combine_f64(&self, rows: &dyn Rows<f64>) -> Result<Combined<f64>, RuleError> {
        tiles::combine(self, rows)
    }
}

impl Column for Mean {
    const SORTED: bool = false;

    fn kept(&self, n: usize) -> std::ops::RangeInclusive<usize> {
        0..=n.saturating_sub(1)
    }

    fn combine<T: Scalar>(&self, tile: &[[T; LANES]]) -> [f64; LANES] {
        tiles::mean_of_rows(tile)
    }
}
