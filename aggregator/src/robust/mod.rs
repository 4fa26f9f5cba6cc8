//! Rules that combine the updates of a round, blocked by coordinate and parallel over blocks.
//!
//! A rule is pure: rows in a fixed order (by `NodeId`), no clock, no entropy. Work is cut into chunks of [`CHUNK`]
//! coordinates whatever the number of threads, each chunk's sums run in a fixed order in `f64`, and chunk results are
//! joined in order: the same rows give the same bits on any core count.
//!
//! Rows are read tile by tile straight from stored payloads ([`PayloadRows`]), so no second copy of a round exists in
//! `f32`. Working memory is one tile of [`LANES`] × n values a thread.
//!
//! Start at [`rule`] (a name and f to a [`Rule`]) and [`Rule::combine`]. A rule never sees an unvalidated row: the values
//! are finite ([`crate::validate`]).

pub mod mean;
pub mod median;
mod network;
pub mod rows;
mod tiles;
pub mod trimmed_mean;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use rows::{MatrixRows, PayloadRows, Row, Rows, Scalar};
pub use tiles::{CHUNK, LANES};

/// Why rows cannot be combined.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RuleError {
    /// No rule of this name.
    #[error("`{0}` is no rule: use mean, median or trimmed_mean")]
    UnknownRule(String),
    /// No row.
    #[error("no updates to combine: at least one is needed")]
    NoRows,
    /// Rows without values.
    #[error("updates without values: at least one coordinate is needed")]
    NoColumns,
    /// Half the rows or more are assumed to be hostile.
    #[error("{f} hostile of {n} updates is no minority: at least {} updates are needed", 2 * f + 1)]
    TooManyByzantine {
        /// Assumed number of hostile rows.
        f: usize,
        /// Number of rows.
        n: usize,
    },
    /// A row has another length.
    #[error("update {row} has {found} values, the first one has {expected}: all must be equally long")]
    Ragged {
        /// Which row, from 0.
        row: usize,
        /// Length of the first row.
        expected: usize,
        /// Its length.
        found: usize,
    },
}

/// The rules by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RuleName {
    /// Arithmetic mean: best when all are honest, withstands nobody.
    Mean,
    /// Coordinate-wise median.
    Median,
    /// Coordinate-wise mean without the f lowest and the f highest values.
    TrimmedMean,
}

impl RuleName {
    /// How many of the `byzantine` hostile edges of the configuration the rule withstands: a mean withstands none.
    pub fn withstands(self, byzantine: usize) -> usize {
        match self {
            Self::Mean => 0,
            Self::Median | Self::TrimmedMean => byzantine,
        }
    }

    /// Every rule.
    pub const ALL: [Self; 3] = [Self::Mean, Self::Median, Self::TrimmedMean];

    /// The name as it is written in files and records.
    pub fn word(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::Median => "median",
            Self::TrimmedMean => "trimmed_mean",
        }
    }
}

impl fmt::Display for RuleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl FromStr for RuleName {
    type Err = RuleError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|rule| rule.word() == s)
            .ok_or_else(|| RuleError::UnknownRule(s.to_owned()))
    }
}

/// What a rule makes of a round.
#[derive(Debug, Clone, PartialEq)]
pub struct Combined<T> {
    /// The combined values, `[d]`.
    pub values: Vec<T>,
    /// One for each row, in order: why it counted as it did.
    pub evidence: Vec<RowEvidence>,
}

/// What a round's record keeps about one row; enough to explain the rule's view of it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RowEvidence {
    /// Euclidean norm of the row.
    pub norm: f64,
    /// Euclidean distance from the row to the combined values.
    pub distance: f64,
    /// Share of coordinates, 0 to 1, in which the row lay outside the values that the rule kept.
    pub trimmed_share: f64,
}

/// A robust rule over `n` rows of `d` values.
pub trait Rule: Send + Sync + fmt::Debug {
    /// The rule's name in records.
    fn name(&self) -> RuleName;

    /// Assumed number f of hostile rows.
    fn byzantine(&self) -> usize;

    /// Whether `n` rows are enough.
    ///
    /// # Errors
    /// [`RuleError::NoRows`], [`RuleError::TooManyByzantine`].
    fn check(&self, n: usize) -> Result<(), RuleError>;

    /// Combines rows of `f32`; sums are `f64`, rounded once at the end.
    ///
    /// # Errors
    /// Those of [`Rule::check`], and [`RuleError::NoColumns`].
    fn combine(&self, rows: &dyn Rows<f32>) -> Result<Combined<f32>, RuleError>;

    /// The same over `f64`, for the command line.
    ///
    /// # Errors
    /// As [`Rule::combine`].
    fn combine_f64(&self, rows: &dyn Rows<f64>) -> Result<Combined<f64>, RuleError>;
}

/// The rule called `name` that assumes `byzantine` hostile rows.
pub fn rule(name: RuleName, byzantine: usize) -> Box<dyn Rule> {
    match name {
        RuleName::Mean => Box::new(mean::Mean::new(byzantine)),
        RuleName::Median => Box::new(median::Median::new(byzantine)),
        RuleName::TrimmedMean => Box::new(trimmed_mean::TrimmedMean::new(byzantine)),
    }
}

/// The common check: some row, and hostile ones in the minority.
fn minority(n: usize, f: usize) -> Result<(), RuleError> {
    if n == 0 {
        Err(RuleError::NoRows)
    } else if f.saturating_mul(2) >= n {
        Err(RuleError::TooManyByzantine { f, n })
    } else {
        Ok(())
    }
}
