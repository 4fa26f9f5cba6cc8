//! Rules by name: pre-aggregations and one rule, joined by `+`, as in `nnm+trimmed_mean`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::RuleError;
use super::gram::GRAM_ROWS_MAX;

/// Most pre-aggregations before a rule.
pub const STAGES_MAX: usize = 4;

/// What turns rows into one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Base {
    /// [`super::mean`]
    Mean,
    /// [`super::median`]
    Median,
    /// [`super::trimmed_mean`]
    TrimmedMean,
    /// [`super::meamed`]
    Meamed,
    /// [`super::krum`], the mean of squares to n − f − 1 neighbours.
    Krum,
    /// [`super::krum`], the mean of the n − f best.
    MultiKrum,
    /// [`super::krum`] with Flower's n − f − 2 neighbours.
    KrumFlower,
    /// [`super::krum`] with Flower's neighbours, the mean of the `keep` best.
    MultiKrumFlower,
    /// [`super::geometric_median`], T steps from zero.
    GeometricMedian,
    /// [`super::geometric_median`], until it stands still.
    GeometricMedianConverged,
    /// [`super::centered_clipping`] from zero.
    CenteredClipping,
    /// [`super::centered_clipping`] from where a first call ended.
    CenteredClippingTwoCalls,
    /// [`super::mda`]
    Mda,
    /// [`super::monna`]
    Monna,
    /// [`super::caf`]
    Caf,
    /// [`super::bulyan`], Flower's.
    Bulyan,
}

impl Base {
    /// Every rule.
    pub const ALL: [Self; 16] = [
        Self::Mean,
        Self::Median,
        Self::TrimmedMean,
        Self::Meamed,
        Self::Krum,
        Self::MultiKrum,
        Self::KrumFlower,
        Self::MultiKrumFlower,
        Self::GeometricMedian,
        Self::GeometricMedianConverged,
        Self::CenteredClipping,
        Self::CenteredClippingTwoCalls,
        Self::Mda,
        Self::Monna,
        Self::Caf,
        Self::Bulyan,
    ];

    /// The name in files and records.
    pub fn word(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::Median => "median",
            Self::TrimmedMean => "trimmed_mean",
            Self::Meamed => "meamed",
            Self::Krum => "krum",
            Self::MultiKrum => "multi_krum",
            Self::KrumFlower => "krum_flower",
            Self::MultiKrumFlower => "multi_krum_flower",
            Self::GeometricMedian => "geometric_median",
            Self::GeometricMedianConverged => "geometric_median_converged",
            Self::CenteredClipping => "centered_clipping",
            Self::CenteredClippingTwoCalls => "centered_clipping_two_calls",
            Self::Mda => "mda",
            Self::Monna => "monna",
            Self::Caf => "caf",
            Self::Bulyan => "bulyan_flower",
        }
    }
}

/// What turns rows into other rows, before a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Before {
    /// [`super::nnm`]
    Nnm,
    /// [`super::clipping`]
    Clipping,
    /// [`super::arc`]
    Arc,
    /// [`super::bucketing`] after a seeded permutation.
    Bucketing,
    /// [`super::bucketing`] of consecutive rows.
    BucketingIdentity,
    /// [`super::dedup`]
    Dedup,
}

impl Before {
    /// Every pre-aggregation.
    pub const ALL: [Self; 6] = [
        Self::Nnm,
        Self::Clipping,
        Self::Arc,
        Self::Bucketing,
        Self::BucketingIdentity,
        Self::Dedup,
    ];

    /// The name in files and records.
    pub fn word(self) -> &'static str {
        match self {
            Self::Nnm => "nnm",
            Self::Clipping => "clipping",
            Self::Arc => "arc",
            Self::Bucketing => "bucketing",
            Self::BucketingIdentity => "bucketing_identity",
            Self::Dedup => "dedup",
        }
    }
}

/// A rule with what runs before it. Without a rule (`nnm` alone) it only turns rows into rows: for the command line, no
/// round can end with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RuleName {
    before: [Option<Before>; STAGES_MAX],
    base: Option<Base>,
}

impl RuleName {
    /// Arithmetic mean: best when all are honest, withstands nobody.
    pub const MEAN: Self = Self::of(Base::Mean);
    /// Coordinate-wise median.
    pub const MEDIAN: Self = Self::of(Base::Median);
    /// Coordinate-wise mean without the f lowest and the f highest values.
    pub const TRIMMED_MEAN: Self = Self::of(Base::TrimmedMean);
    /// Weight is taken along the direction of largest spread: what is shipped, for updates under noise.
    pub const CAF: Self = Self::of(Base::Caf);

    /// `base` with nothing before it.
    pub const fn of(base: Base) -> Self {
        Self {
            before: [None; STAGES_MAX],
            base: Some(base),
        }
    }

    /// What runs first, in order.
    pub fn before(&self) -> impl Iterator<Item = Before> + '_ {
        self.before.iter().copied().flatten()
    }

    /// The rule at the end; `None` for a pre-aggregation alone.
    pub fn base(&self) -> Option<Base> {
        self.base
    }

    /// Most rows that it can combine: rules of pairs hold n² numbers, and buckets of two or more leave half as many rows to compare.
    pub fn rows_max(&self) -> usize {
        let buckets = |before: &Before| matches!(before, Before::Bucketing | Before::BucketingIdentity);
        let by_column = matches!(
            self.base,
            Some(Base::Mean | Base::Median | Base::TrimmedMean | Base::Meamed)
        );
        let bucketed = self.before().next().as_ref().is_some_and(buckets);
        match (
            by_column && self.before().all(|before| buckets(&before)),
            bucketed,
        ) {
            (true, _) => usize::MAX,
            (false, true) => 2 * GRAM_ROWS_MAX,
            (false, false) => GRAM_ROWS_MAX,
        }
    }

    /// How many of the `byzantine` hostile edges of the configuration the rule withstands: a mean withstands none.
    pub fn withstands(&self, byzantine: usize) -> usize {
        if self.base == Some(Base::Mean) {
            0
        } else {
            byzantine
        }
    }
}

impl From<Base> for RuleName {
    fn from(base: Base) -> Self {
        Self::of(base)
    }
}

impl fmt::Display for RuleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = self.before().map(Before::word).chain(self.base.map(Base::word));
        for (index, word) in words.enumerate() {
            if index > 0 {
                f.write_str("+")?;
            }
            f.write_str(word)?;
        }
        Ok(())
    }
}

impl From<RuleName> for String {
    fn from(name: RuleName) -> Self {
        name.to_string()
    }
}

impl TryFrom<String> for RuleName {
    type Error = RuleError;

    fn try_from(name: String) -> Result<Self, RuleError> {
        name.parse()
    }
}

impl FromStr for RuleName {
    type Err = RuleError;

    fn from_str(s: &str) -> Result<Self, RuleError> {
        let mut name = Self {
            before: [None; STAGES_MAX],
            base: None,
        };
        let mut stages = name.before.iter_mut();
        for word in s.split('+') {
            if name.base.is_some() {
                return Err(RuleError::RuleNotLast(s.to_owned()));
            }
            if let Some(before) = Before::ALL.into_iter().find(|before| before.word() == word) {
                let free = stages.next().ok_or_else(|| RuleError::TooManyStages {
                    name: s.to_owned(),
                    limit: STAGES_MAX,
                })?;
                *free = Some(before);
            } else {
                let base = Base::ALL.into_iter().find(|base| base.word() == word);
                // The paper's own name for the one variant that there is.
                let base = base.or((word == "bulyan").then_some(Base::Bulyan));
                name.base = Some(base.ok_or_else(|| RuleError::UnknownRule(word.to_owned()))?);
            }
        }
        Ok(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_as_they_were_written() {
        for name in [
            "mean",
            "nnm",
            "dedup+nnm+trimmed_mean",
            "arc+nnm+geometric_median_converged",
        ] {
            assert_eq!(name.parse::<RuleName>().unwrap().to_string(), name);
        }
        assert_eq!("bulyan".parse::<RuleName>().unwrap(), Base::Bulyan.into());
        for base in Base::ALL {
            assert_eq!(base.word().parse::<RuleName>().unwrap(), base.into());
        }
        for before in Before::ALL {
            assert_eq!(
                before.word().parse::<RuleName>().unwrap().before().next(),
                Some(before)
            );
        }
    }

    #[test]
    fn one_row_more_than_a_rule_can_combine_is_refused_by_it_and_no_rule_of_columns_refuses_any() {
        use crate::robust::{MatrixRows, Options, rule};
        let digest = theriac_protocol::units::Digest::default();
        for (name, limit) in [
            ("caf", Some(2_048)),
            ("multi_krum", Some(2_048)),
            ("nnm+trimmed_mean", Some(2_048)),
            ("bucketing+geometric_median_converged", Some(4_096)),
            ("trimmed_mean", None),
            ("bucketing+median", None),
            ("mean", None),
        ] {
            let name: RuleName = name.parse().unwrap();
            assert_eq!(name.rows_max(), limit.unwrap_or(usize::MAX), "{name}");
            let count = limit.map_or(2_049, |limit| limit + 1);
            let rows = MatrixRows::new(vec![1.0_f32; count], count, 1).unwrap();
            let options = Options::for_round(name, std::iter::once(&digest), true);
            let combined = rule(name, 1, &options).unwrap().combine(&rows);
            let refused = matches!(combined, Err(RuleError::TooManyPairs { .. }));
            assert_eq!(refused, limit.is_some(), "{name}: {combined:?}");
        }
    }

    #[test]
    fn refuses_what_is_no_chain() {
        let parse = str::parse::<RuleName>;
        assert_eq!(parse("sum"), Err(RuleError::UnknownRule("sum".into())));
        assert_eq!(parse(""), Err(RuleError::UnknownRule(String::new())));
        assert_eq!(parse("nnm+"), Err(RuleError::UnknownRule(String::new())));
        assert_eq!(parse("mean+nnm"), Err(RuleError::RuleNotLast("mean+nnm".into())));
        let long = "nnm+nnm+nnm+nnm+nnm+mean";
        assert_eq!(
            parse(long),
            Err(RuleError::TooManyStages {
                name: long.into(),
                limit: STAGES_MAX
            })
        );
    }
}
