//! The small traits behind which every rule and pre-aggregation stands.

use std::fmt;

use super::RuleError;
use super::column::Column;
use super::gram::Gram;
use super::mix::Mix;

/// What a rule knows about a round before it decides.
#[derive(Debug, Clone, Copy)]
pub(super) struct Round<'a> {
    /// Number of rows.
    pub(super) n: usize,
    /// Hostile ones among them, below n/2.
    pub(super) f: usize,
    /// Inner products; empty unless the rule said that it needs them.
    pub(super) gram: &'a Gram,
}

/// A rule: many rows to one.
pub(super) trait Method: Send + Sync + fmt::Debug {
    /// Whether it looks at distances.
    fn needs_gram(&self) -> bool {
        true
    }
    /// Whether `n` rows are enough to withstand `f`.
    fn check(&self, n: usize, f: usize) -> Result<(), RuleError> {
        super::minority(n, f)
    }
    /// How the rows are combined; called after `check`.
    fn plan(&self, round: Round<'_>) -> Result<Plan, RuleError>;
}

/// How rows are combined.
#[derive(Debug)]
pub(super) enum Plan {
    /// A weighted sum.
    Weights {
        /// One a row; what is missing to 1 is the origin's, that is nothing.
        weights: Vec<f64>,
        /// The rule's own score of each row, where it has one.
        scores: Option<Vec<f64>>,
    },
    /// Column by column.
    Columns {
        /// Rows that the columns are made of; all when `None`.
        of: Option<Vec<usize>>,
        /// What is made of each column.
        column: Column,
    },
}

impl Plan {
    /// The mean of some rows.
    pub(super) fn mean_of(chosen: &[usize], n: usize, scores: Option<Vec<f64>>) -> Self {
        let mut weights = vec![0.0; n];
        for row in chosen {
            weights[*row] = 1.0 / chosen.len() as f64;
        }
        Self::Weights { weights, scores }
    }
}

/// A pre-aggregation: rows to rows.
pub(super) trait Stage: Send + Sync + fmt::Debug {
    /// Whether it looks at distances.
    fn needs_gram(&self) -> bool {
        true
    }
    /// How many of `n` rows it leaves, as far as their number tells.
    fn rows_after(&self, n: usize) -> usize {
        n
    }
    /// Whether what it leaves can withstand `f` of `n` rows, when a rule follows.
    fn check(&self, n: usize, f: usize) -> Result<(), RuleError> {
        super::minority(n, f)
    }
    /// Whether it takes rows out by what they hold; what would leave too few for the rule is then not done.
    fn removes(&self) -> bool {
        false
    }
    /// The new rows.
    fn mix(&self, round: Round<'_>) -> Mixed;
}

/// What a pre-aggregation made.
#[derive(Debug)]
pub(super) struct Mixed {
    /// The new rows.
    pub(super) mix: Mix,
    /// Hostile ones among them.
    pub(super) f: usize,
    /// The permutation that it drew, for the record.
    pub(super) permutation: Option<Vec<usize>>,
}

impl Mixed {
    /// Rows that change without a hostile one less or more.
    pub(super) fn same_f(mix: Mix, round: Round<'_>) -> Self {
        Self {
            mix,
            f: round.f,
            permutation: None,
        }
    }
}

/// Indices of the smallest values, the lower index first where they are equal.
pub(super) fn smallest(values: &[f64], keep: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    order.truncate(keep);
    order
}
