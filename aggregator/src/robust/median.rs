//! The coordinate-wise median.

use super::rows::{Rows, Scalar};
use super::tiles::{self, Column, LANES};
use super::{Combined, Rule, RuleError, RuleName};

/// The median of every coordinate; for an even number of rows the midpoint of the two middle values.
#[derive(Debug, Clone, Copy)]
pub struct Median {
    byzantine: usize,
}

impl Median {
    /// The median; `byzantine` only decides how many rows are needed.
    pub fn new(byzantine: usize) -> Self {
        Self { byzantine }
    }
}

impl Rule for Median {
    fn name(&self) -> RuleName {
        RuleName::Median
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

impl Column for Median {
    const SORTED: bool = true;

    fn kept(&self, n: usize) -> std::ops::RangeInclusive<usize> {
        (n - 1) / 2..=n / 2
    }

    fn combine<T: Scalar>(&self, tile: &[[T; LANES]]) -> [f64; LANES] {
        tiles::mean_of_rows(&tile[self.kept(tile.len())])
    }
}
