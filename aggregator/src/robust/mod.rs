//! Rules that combine the updates of a round, blocked by coordinate and parallel over blocks.
//!
//! A rule is pure: rows in a fixed order (by `NodeId`), no clock, no entropy; a permutation comes from a seed in the record. Work
//! is cut into chunks of columns whatever the number of threads, each chunk's sums run in a fixed order, and chunk results are
//! joined in order: the same rows give the same bits on any core count.
//!
//! There are two kinds. **Rules of coordinates** ([`mean`], [`median`], [`trimmed_mean`], [`meamed`]) pass over memory once and
//! sort columns in vector lanes ([`network`]). **Rules of distances** (all others) never touch a row to decide: they see the
//! inner products of all pairs ([`gram`], one pass), work on n × n numbers, and give one weight a row; a second pass adds up. A
//! **pre-aggregation** is a linear map of rows ([`mix`]): it changes inner products and weights, or is applied to a stripe of
//! columns in cache. Mixed rows never exist as a whole.
//!
//! Rows are read stripe by stripe straight from stored payloads ([`PayloadRows`]), so no second copy of a round exists in
//! `f32`; a payload may lie in memory or in a file ([`PlacedRow`]), and the bits are the same.
//!
//! Start at [`rule`] (a name and f to a [`Rule`]) and [`Rule::combine`]. A rule never sees an unvalidated row: the values
//! are finite ([`crate::validate`]).
#![allow(
    clippy::inline_always,
    reason = "what runs under a vector instruction set must be inlined into the function that turns it on"
)]
#![allow(
    rustdoc::private_intra_doc_links,
    reason = "the files beside this one are its table of contents"
)]

mod arc;
mod bucketing;
mod bulyan;
mod caf;
mod centered_clipping;
mod clipping;
mod column;
mod compose;
mod cover;
mod dedup;
mod eigen;
mod error;
mod geometric_median;
mod gram;
mod kernel;
mod krum;
mod mda;
mod meamed;
mod mean;
mod median;
mod method;
mod mix;
mod monna;
mod name;
mod network;
mod nnm;
mod options;
mod placed;
mod rows;
mod spill;
mod tiles;
mod trimmed_mean;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use compose::{Composed, MixedRows};
pub(crate) use cover::{Cover, cover};
pub use error::RuleError;
pub use gram::{Distances, GRAM_ROWS_MAX, distances_squared};
pub use name::{Base, Before, RuleName, STAGES_MAX};
pub use options::Options;
pub use placed::{FileRow, PlacedRow, RowFile};
pub use rows::{MatrixRows, PayloadRows, Row, Rows, Scalar};
pub use spill::{FileRows, SpillError, Width};
pub use tiles::{CHUNK, LANES};

/// What a rule makes of a round.
#[derive(Debug, Clone, PartialEq)]
pub struct Combined<T> {
    /// The combined values, `[d]`.
    pub values: Vec<T>,
    /// One for each row, in order: why it counted as it did.
    pub evidence: Vec<RowEvidence>,
    /// The rule's own score of each row that reached it, where it has one: Krum's distance, or the weight.
    pub scores: Option<Vec<f64>>,
    /// The seeded permutation that bucketing drew: row `permutation[i]` came i-th.
    pub permutation: Option<Vec<usize>>,
}

/// How much is worked out besides the values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Detail {
    Values,
    Evidence,
}

/// What a round's record keeps about one row; enough to explain the rule's view of it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RowEvidence {
    /// Euclidean norm of the row.
    pub norm: f64,
    /// Euclidean distance from the row to the combined values.
    pub distance: f64,
    /// Share of coordinates, 0 to 1, in which the row (or, behind a pre-aggregation, the row that speaks for it) lay outside
    /// the values that the rule kept; 1 for a row without weight.
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
    /// [`RuleError::NoRows`], [`RuleError::TooManyByzantine`], and the rule's own condition on n and f.
    fn check(&self, n: usize) -> Result<(), RuleError>;

    /// Combines rows of `f32`; weighted sums and means of kept values are `f64`, rounded once at the end.
    ///
    /// # Errors
    /// Those of [`Rule::check`], [`RuleError::NoColumns`], [`RuleError::TooManyPairs`], [`RuleError::NonFinite`].
    fn combine(&self, rows: &dyn Rows<f32>) -> Result<Combined<f32>, RuleError>;

    /// The same over `f64`, for the command line.
    ///
    /// # Errors
    /// As [`Rule::combine`], and [`RuleError::TooLarge`].
    fn combine_f64(&self, rows: &dyn Rows<f64>) -> Result<Combined<f64>, RuleError>;
}

/// The rule called `name` that assumes `byzantine` hostile rows.
///
/// # Errors
/// [`Options::check`].
pub fn rule(name: RuleName, byzantine: usize, options: &Options) -> Result<Box<dyn Rule>, RuleError> {
    Ok(Box::new(Composed::new(name, byzantine, options)?))
}

/// The common check: some row, and hostile ones in the minority.
pub(crate) fn minority(n: usize, f: usize) -> Result<(), RuleError> {
    if n == 0 {
        Err(RuleError::NoRows)
    } else if f.saturating_mul(2) >= n {
        Err(RuleError::TooManyByzantine { f, n })
    } else {
        Ok(())
    }
}
