//! Why rows cannot be combined.

/// Why rows cannot be combined.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RuleError {
    /// No rule of this name.
    #[error(
        "`{0}` is no rule: use mean, median, trimmed_mean, meamed, krum, multi_krum, krum_flower, multi_krum_flower, \
         geometric_median, geometric_median_converged, centered_clipping, centered_clipping_two_calls, mda, monna, caf or \
         bulyan, with nnm+, clipping+, arc+, bucketing+, bucketing_identity+ or dedup+ before it"
    )]
    UnknownRule(String),
    /// Something after the rule.
    #[error("`{0}`: the rule comes last, pre-aggregations before it")]
    RuleNotLast(String),
    /// More pre-aggregations than fit.
    #[error("`{name}`: at most {limit} pre-aggregations before a rule")]
    TooManyStages {
        /// As written.
        name: String,
        /// Most of them.
        limit: usize,
    },
    /// A round cannot end with many rows.
    #[error("`{0}` turns rows into rows: add a rule, as in {0}+trimmed_mean")]
    NoRule(String),
    /// No row.
    #[error("no updates to combine: at least one is needed")]
    NoRows,
    /// Rows without values.
    #[error("updates without values: at least one coordinate is needed")]
    NoColumns,
    /// Half the rows or more are assumed to be hostile.
    #[error("{f} hostile of {n} updates is no minority: at least {} updates are needed", f.saturating_mul(2).saturating_add(1))]
    TooManyByzantine {
        /// Assumed number of hostile rows.
        f: usize,
        /// Number of rows.
        n: usize,
    },
    /// The rule's own condition on n and f.
    #[error("{rule} needs {condition}, hence {needed} updates to withstand {f}; there are {n}")]
    TooFewRows {
        /// The rule.
        rule: &'static str,
        /// Its condition.
        condition: &'static str,
        /// Rows that it takes.
        needed: usize,
        /// Assumed number of hostile rows.
        f: usize,
        /// Number of rows.
        n: usize,
    },
    /// Bucketing leaves no honest majority of buckets.
    #[error(
        "buckets of {size} from {n} updates are {buckets} buckets, and {f} hostile updates can spoil {f} of them, no minority: \
         smaller buckets (--bucket 1; a configuration's are of 2), more updates or fewer hostile ones"
    )]
    BucketsTooLarge {
        /// Rows in a bucket, s.
        size: usize,
        /// Buckets.
        buckets: usize,
        /// Assumed number of hostile rows.
        f: usize,
        /// Number of rows.
        n: usize,
    },
    /// The rule would publish one site's whole noise.
    #[error(
        "{0} keeps one update with all its privacy noise: use caf, multi_krum of several or nnm+trimmed_mean"
    )]
    UnfitForNoise(&'static str),
    /// Too many subsets to try.
    #[error(
        "mda would try the subsets of {n} updates without {f}: more than {limit}; use caf, which has the same guarantee"
    )]
    TooManySubsets {
        /// Number of rows.
        n: usize,
        /// Assumed number of hostile rows.
        f: usize,
        /// Most subsets.
        limit: u64,
    },
    /// Pairwise distances would take too much memory.
    #[error(
        "{n} updates are too many for pairwise distances, {limit} at most: use bucketing+ first, or a rule of coordinates"
    )]
    TooManyPairs {
        /// Number of rows.
        n: usize,
        /// Most rows.
        limit: usize,
    },
    /// An option that the rule needs.
    #[error("{rule} needs --{option}")]
    MissingOption {
        /// The rule.
        rule: &'static str,
        /// Without dashes.
        option: &'static str,
    },
    /// An option that no part of the rule takes.
    #[error("{rule} takes no --{option}: leave it out")]
    UnusedOption {
        /// The rule.
        rule: String,
        /// Without dashes.
        option: &'static str,
    },
    /// An option out of its range.
    #[error("--{option} {found}: {expected}")]
    OptionRange {
        /// Without dashes.
        option: &'static str,
        /// As given.
        found: String,
        /// Its range.
        expected: &'static str,
    },
    /// A value whose square does not fit.
    #[error("{}", too_large(*row, *limit))]
    TooLarge {
        /// Which row, from 0.
        row: usize,
        /// Largest magnitude; infinite where any value has a square that fits, and the differences of updates have none.
        limit: f64,
    },
    /// The result is no number, because updates are near the largest one.
    #[error(
        "value {index} of the result is not finite: updates near the largest number there is; bound their norm first"
    )]
    NonFinite {
        /// Which value.
        index: usize,
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

fn too_large(row: usize, limit: f64) -> String {
    if limit.is_finite() {
        format!(
            "update {row} has values above {limit:e}: their squares are too large to measure distances; leave it out"
        )
    } else {
        format!(
            "update {row} and others are so far apart, near the largest number there is, that their differences do not fit: bound their norm first"
        )
    }
}
