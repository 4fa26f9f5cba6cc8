//! The coordinate-wise trimmed mean (Yin et al. 2018, definition 2, with a count instead of a fraction).

use super::rows::{Rows, Scalar};
use super::tiles::{self, Column, LANES};
use super::{Combined, Rule, RuleError, RuleName};

/// Per coordinate, the mean of what is left without exactly f lowest and exactly f highest values, summed in ascending
/// order in `f64`. With at most f hostile rows each coordinate stays between the honest minimum and maximum.
#[derive(Debug, Clone, Copy)]
pub struct TrimmedMean {
    byzantine: usize,
}

impl TrimmedMean {
    /// Drops `byzantine` values on each side.
    pub fn new(byzantine: usize) -> Self {
        Self { byzantine }
    }
}

impl Rule for TrimmedMean {
    fn name(&self) -> RuleName {
        RuleName::TrimmedMean
    }
    fn byzantine(&self) -> usize {
        self.byzantine
    }
    fn check(&self, n: usize) -> Result<(), RuleError> {
        super::minority(n, self.byzantine)
    }
    fn combine(&self, rows: &dyn Rows<f32>) -> Result<Combined<f32>, RuleError> {
        self.check(rows.count())?;
        tiles::combine(self, rows)
    }
    fn combine_f64(&self, rows: &dyn Rows<f64>) -> Result<Combined<f64>, RuleError> {
        self.check(rows.count())?;
        tiles::combine(self, rows)
    }
}

impl Column for TrimmedMean {
    const SORTED: bool = true;

    fn kept(&self, n: usize) -> std::ops::RangeInclusive<usize> {
        self.byzantine..=n - self.byzantine - 1
    }

    fn combine<T: Scalar>(&self, tile: &[[T; LANES]]) -> [f64; LANES] {
        tiles::mean_of_rows(&tile[self.kept(tile.len())])
    }
}
