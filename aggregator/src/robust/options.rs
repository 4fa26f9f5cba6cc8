//! Parameters of rules beyond f, and who takes which.

use theriac_protocol::units::Digest;

use super::RuleError;
use super::name::{Base, Before, RuleName};

/// Parameters beyond f. `None`: the default of the rule that takes it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Options {
    /// Radius τ of centered clipping, above 0, in the updates' unit; no default, it depends on their scale.
    pub tau: Option<f64>,
    /// Passes L of centered clipping (default 1) or steps T of the geometric median (default 3); 1 to 1,000,000.
    pub iterations: Option<u32>,
    /// Smallest distance ν that the geometric median divides by, above 0; default 0.1, or 1e-9 for the converged one.
    pub nu: Option<f64>,
    /// How many of the best rows Multi-Krum keeps, 1 to n; default n − f.
    pub keep: Option<usize>,
    /// Largest norm that clipping leaves alone, above 0; no default.
    pub clip: Option<f64>,
    /// Rows in a bucket, at least 1; default 2.
    pub bucket: Option<usize>,
    /// The row that `MoNNA` trusts, from 0; default 0.
    pub reference: Option<usize>,
    /// Seed of the permutation before bucketing; default 0. It belongs in the round's record.
    pub seed: Option<u64>,
    /// Rows carry privacy noise: rules that would publish one row's whole noise are refused.
    pub private: bool,
}

impl Options {
    /// For a round on record: nothing but what the rule's permutation is drawn from, where it has one. The seed comes from the
    /// payloads' `digests` in the order of the rows: known to nobody before the last update is in, and to everybody afterwards.
    pub fn for_round<'a>(name: RuleName, digests: impl Iterator<Item = &'a Digest>, private: bool) -> Self {
        let seed = || {
            let all: Vec<u8> = digests.flat_map(|digest| digest.0).collect();
            let digest = Digest::of(&all).0;
            u64::from_le_bytes(digest.first_chunk().copied().unwrap_or_default())
        };
        Self {
            seed: name.before().any(|before| before == Before::Bucketing).then(seed),
            private,
            ..Self::default()
        }
    }

    /// Whether every option is in range, taken by some part of `name`, and none is missing.
    ///
    /// # Errors
    /// [`RuleError::MissingOption`], [`RuleError::UnusedOption`], [`RuleError::OptionRange`], [`RuleError::UnfitForNoise`].
    pub fn check(&self, name: RuleName) -> Result<(), RuleError> {
        let base = name.base();
        let has = |stage: Before| name.before().any(|before| before == stage);
        let clips = matches!(
            base,
            Some(Base::CenteredClipping | Base::CenteredClippingTwoCalls)
        );
        let smooth = matches!(base, Some(Base::GeometricMedian | Base::GeometricMedianConverged));
        let buckets = has(Before::Bucketing) || has(Before::BucketingIdentity);
        let multi = matches!(base, Some(Base::MultiKrum | Base::MultiKrumFlower));
        let taken = [
            ("tau", self.tau.is_some(), clips),
            ("iterations", self.iterations.is_some(), clips || smooth),
            ("nu", self.nu.is_some(), smooth),
            ("keep", self.keep.is_some(), multi),
            ("clip", self.clip.is_some(), has(Before::Clipping)),
            ("bucket", self.bucket.is_some(), buckets),
            ("reference", self.reference.is_some(), base == Some(Base::Monna)),
            ("seed", self.seed.is_some(), has(Before::Bucketing)),
        ];
        for (option, given, takes) in taken {
            if given && !takes {
                let rule = name.to_string();
                return Err(RuleError::UnusedOption { rule, option });
            }
        }
        if clips && self.tau.is_none() {
            let rule = base.map_or("", Base::word);
            return Err(RuleError::MissingOption { rule, option: "tau" });
        }
        if has(Before::Clipping) && self.clip.is_none() {
            let rule = Before::Clipping.word();
            return Err(RuleError::MissingOption { rule, option: "clip" });
        }
        positive("tau", self.tau)?;
        positive("nu", self.nu)?;
        positive("clip", self.clip)?;
        if let Some(iterations) = self.iterations.filter(|steps| !(1..=1_000_000).contains(steps)) {
            return Err(range("iterations", iterations, "between 1 and 1000000"));
        }
        for (option, found) in [("keep", self.keep), ("bucket", self.bucket)] {
            if found == Some(0) {
                return Err(range(option, 0, "at least 1"));
            }
        }
        match base {
            Some(base @ (Base::Krum | Base::KrumFlower)) if self.private && !has(Before::Nnm) => {
                Err(RuleError::UnfitForNoise(base.word()))
            }
            Some(base @ (Base::MultiKrum | Base::MultiKrumFlower))
                if self.private && self.keep == Some(1) && !has(Before::Nnm) =>
            {
                Err(RuleError::UnfitForNoise(base.word()))
            }
            _ => Ok(()),
        }
    }
}

fn positive(option: &'static str, value: Option<f64>) -> Result<(), RuleError> {
    match value {
        Some(value) if !(value.is_finite() && value > 0.0) => {
            Err(range(option, value, "a finite number above 0"))
        }
        _ => Ok(()),
    }
}

pub(super) fn range(option: &'static str, found: impl ToString, expected: &'static str) -> RuleError {
    RuleError::OptionRange {
        option,
        found: found.to_string(),
        expected,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_missing_superfluous_and_impossible_options() {
        let check = |name: &str, options: Options| options.check(name.parse().unwrap());
        let none = Options::default();
        let tau = |tau| Options {
            tau: Some(tau),
            ..none
        };
        assert_eq!(check("caf", none), Ok(()));
        assert_eq!(check("centered_clipping", tau(1.0)), Ok(()));
        let missing = check("centered_clipping", none);
        assert!(
            matches!(missing, Err(RuleError::MissingOption { option: "tau", .. })),
            "{missing:?}"
        );
        let missing = check("clipping+mean", none);
        assert!(
            matches!(missing, Err(RuleError::MissingOption { option: "clip", .. })),
            "{missing:?}"
        );
        let unused = check("median", tau(1.0));
        assert!(
            matches!(unused, Err(RuleError::UnusedOption { option: "tau", .. })),
            "{unused:?}"
        );
        for wrong in [f64::NAN, f64::INFINITY, 0.0, -1.0] {
            let found = check("centered_clipping", tau(wrong));
            assert!(
                matches!(found, Err(RuleError::OptionRange { option: "tau", .. })),
                "{found:?}"
            );
        }
        let bucket = Options {
            bucket: Some(0),
            ..none
        };
        assert!(matches!(
            check("bucketing+median", bucket),
            Err(RuleError::OptionRange { .. })
        ));
        let steps = Options {
            iterations: Some(0),
            ..none
        };
        assert!(matches!(
            check("geometric_median", steps),
            Err(RuleError::OptionRange { .. })
        ));
    }

    #[test]
    fn krum_is_refused_where_rows_carry_noise() {
        let private = Options {
            private: true,
            ..Options::default()
        };
        for name in ["krum", "krum_flower", "dedup+krum"] {
            let found = private.check(name.parse().unwrap());
            assert!(
                matches!(found, Err(RuleError::UnfitForNoise(_))),
                "{name}: {found:?}"
            );
        }
        let one = Options {
            keep: Some(1),
            ..private
        };
        for name in ["multi_krum", "multi_krum_flower"] {
            let found = one.check(name.parse().unwrap());
            assert!(
                matches!(found, Err(RuleError::UnfitForNoise(_))),
                "{name} of one is krum"
            );
        }
        // The rows that follow nearest-neighbour mixing are means of n − f rows, noise included.
        for name in ["multi_krum", "caf", "nnm+krum", "dedup+nnm+trimmed_mean"] {
            assert_eq!(private.check(name.parse().unwrap()), Ok(()), "{name}");
        }
    }
}
