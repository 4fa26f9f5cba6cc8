//! The fleet's floor: the weakest guarantee whose updates are taken.
//!
//! A site's privacy does not hang on the aggregator: each site promises and keeps it by itself. The floor is about the fleet's own word, "no
//! model of ours was made from updates that promise less than this", so it is held to what each site has **declared**.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_command::settings;
use theriac_protocol::message::{GuaranteeUnit, GuaranteeV1};

/// `[privacy_floor]`: every key is optional, and without any nothing is asked.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct FloorSettings {
    /// `"record"` takes both units, `"block"` only blocks, which hide more. Default none.
    pub unit: Option<FloorUnit>,
    /// Shortest block of a site with the unit `block`, 1 s to 31 days, such as `"1h"`. Default none.
    #[serde(with = "settings::optional_duration", skip_serializing_if = "Option::is_none")]
    pub block_min: Option<Duration>,
    /// Largest ε of one period, above 0 to 100. Default none. Too low: sites are turned away.
    pub epsilon_max: Option<f64>,
    /// Largest δ, above 0 to 0.001. Default none.
    pub delta_max: Option<f64>,
    /// Shortest time over which a site's ε holds: `"month"`, `"quarter"`, `"year"` or `"rolling"`, which is for ever. Default none: ε = 4 a month
    /// passes for ε = 4, though a block that is read again loses that every month.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub period_min: Option<FloorPeriod>,
    /// Least noise multiplier that a site's policy may accept, above 0 to 10 000. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub noise_multiplier_min: Option<f64>,
    /// Whether somebody must have signed the site's policy. Default `false`. An edge signs its first policy with a key of its own: to ask for an
    /// officer's, name the keys in `signers`.
    pub signed: bool,
    /// Public keys, `thpk1_…`, one of which must have signed the site's policy. Default none: any key will do.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub signers: Vec<String>,
    /// Whether a site that enrols again with another key, which begins a new ledger at zero, is kept out until an operator allows that. Default `false`: it is taken, and
    /// what it had spent before is shown beside it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub ledger_continuity: bool,
}

/// See [`FloorSettings::period_min`]; a longer one is stricter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FloorPeriod {
    /// A calendar month.
    Month,
    /// Three of them.
    Quarter,
    /// A calendar year.
    Year,
    /// For ever.
    Rolling,
}

impl FloorPeriod {
    /// Its word in a policy.
    pub fn word(self) -> &'static str {
        match self {
            Self::Month => "month",
            Self::Quarter => "quarter",
            Self::Year => "year",
            Self::Rolling => "rolling",
        }
    }

    fn declared(word: &str) -> Option<Self> {
        let all = [Self::Month, Self::Quarter, Self::Year, Self::Rolling];
        all.into_iter().find(|period| period.word() == word)
    }
}

/// See [`FloorSettings::unit`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FloorUnit {
    /// At least one sample is hidden.
    Record,
    /// A whole block of time is hidden.
    Block,
}

/// Why a site's updates are not taken.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum FloorError {
    /// It has not said what it guarantees.
    #[error("the site has declared no guarantee: its edge is older than the fleet's privacy floor")]
    Undeclared,
    /// It hides less than a block.
    #[error("the site hides a record, the fleet's floor is a block")]
    Unit,
    /// Its blocks are too short.
    #[error("the site's blocks last {found_ms} ms, the fleet's floor is {expected_ms} ms")]
    Block {
        /// The floor.
        expected_ms: u128,
        /// The site's.
        found_ms: u64,
    },
    /// Its ε or δ is too large.
    #[error("the site's {what} is {found}, the fleet's floor allows {expected}")]
    Weak {
        /// Which.
        what: &'static str,
        /// The floor.
        expected: f64,
        /// The site's.
        found: f64,
    },
    /// Its ε holds for too short a time.
    #[error("the site's epsilon holds for a period of `{found}`, the fleet's floor is `{}`", expected.word())]
    Period {
        /// The floor.
        expected: FloorPeriod,
        /// The site's.
        found: String,
    },
    /// Its policy accepts too little noise.
    #[error("the site accepts a noise multiplier of {found}, the fleet's floor is {expected}")]
    Noise {
        /// The floor.
        expected: f64,
        /// The site's.
        found: f64,
    },
    /// None of the fleet's officers signed its policy.
    #[error("the site's policy is signed by {found}, which is none of the keys that the fleet's floor names")]
    OtherSigner {
        /// Who signed.
        found: String,
    },
    /// Nobody signed its policy.
    #[error("the site's policy is signed by nobody, the fleet's floor wants a signature")]
    Unsigned,
}

impl FloorSettings {
    /// Whether anything is asked of what a site declares.
    pub fn is_set(&self) -> bool {
        let declared = Self {
            ledger_continuity: false,
            ..self.clone()
        };
        declared != Self::default()
    }

    /// Whether a site with this guarantee may take part.
    ///
    /// # Errors
    /// [`FloorError`], the first thing that is too weak.
    pub fn check(&self, declared: Option<&GuaranteeV1>) -> Result<(), FloorError> {
        if !self.is_set() {
            return Ok(());
        }
        let declared = declared.ok_or(FloorError::Undeclared)?;
        if self.unit == Some(FloorUnit::Block) && declared.unit != GuaranteeUnit::Block {
            return Err(FloorError::Unit);
        }
        if let Some(least) = self.block_min
            && declared.unit == GuaranteeUnit::Block
            && u128::from(declared.block_ms) < least.as_millis()
        {
            return Err(FloorError::Block {
                expected_ms: least.as_millis(),
                found_ms: declared.block_ms,
            });
        }
        at_most("epsilon", self.epsilon_max, declared.epsilon.value())?;
        at_most("delta", self.delta_max, declared.delta.value())?;
        if let Some(expected) = self.period_min
            && FloorPeriod::declared(&declared.period).is_none_or(|period| period < expected)
        {
            let found = declared.period.clone();
            return Err(FloorError::Period { expected, found });
        }
        let found = declared.noise_multiplier_min.value();
        if let Some(expected) = self.noise_multiplier_min.filter(|expected| found < *expected) {
            return Err(FloorError::Noise { expected, found });
        }
        let signer = &declared.policy_signer;
        if signer.is_empty() && (self.signed || !self.signers.is_empty()) {
            return Err(FloorError::Unsigned);
        }
        // Digits of a key mean the same in either case.
        let known = |key: &String| key.eq_ignore_ascii_case(signer);
        if !self.signers.is_empty() && !self.signers.iter().any(known) {
            let found = signer.clone();
            return Err(FloorError::OtherSigner { found });
        }
        Ok(())
    }
}

fn at_most(what: &'static str, most: Option<f64>, found: f64) -> Result<(), FloorError> {
    match most {
        Some(expected) if found > expected => Err(FloorError::Weak {
            what,
            expected,
            found,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use theriac_protocol::units::{Delta, Digest, Epsilon, NoiseMultiplier};

    use super::*;

    fn declared() -> GuaranteeV1 {
        GuaranteeV1 {
            unit: GuaranteeUnit::Block,
            block_ms: 3_600_000,
            epsilon: Epsilon::new(4.0).unwrap(),
            delta: Delta::new(1e-6).unwrap(),
            period: "rolling".to_owned(),
            noise_multiplier_min: NoiseMultiplier::new(0.7).unwrap(),
            policy_version: 1,
            policy_hash: Digest([1; 32]),
            policy_signer: "thpk1_00".to_owned(),
        }
    }

    fn floor() -> FloorSettings {
        FloorSettings {
            unit: Some(FloorUnit::Block),
            block_min: Some(Duration::from_hours(1)),
            epsilon_max: Some(4.0),
            delta_max: Some(1e-6),
            period_min: Some(FloorPeriod::Year),
            noise_multiplier_min: Some(0.7),
            signed: true,
            signers: vec!["thpk1_11".to_owned(), "thpk1_00".to_owned()],
            ledger_continuity: false,
        }
    }

    #[test]
    fn what_meets_the_floor_is_taken_and_every_weaker_part_is_refused() {
        assert_eq!(floor().check(Some(&declared())), Ok(()));
        let weaker: [fn(&mut GuaranteeV1); 9] = [
            |g| g.unit = GuaranteeUnit::Record,
            |g| g.block_ms = 3_599_999,
            |g| g.epsilon = Epsilon::new(4.1).unwrap(),
            |g| g.delta = Delta::new(2e-6).unwrap(),
            |g| g.policy_signer.clear(),
            |g| g.policy_signer = "thpk1_22".to_owned(),
            |g| g.period = "quarter".to_owned(),
            |g| g.period = "aeon".to_owned(),
            |g| g.noise_multiplier_min = NoiseMultiplier::new(0.69).unwrap(),
        ];
        for (part, weaken) in weaker.into_iter().enumerate() {
            let mut guarantee = declared();
            weaken(&mut guarantee);
            assert!(floor().check(Some(&guarantee)).is_err(), "part {part}");
            assert_eq!(FloorSettings::default().check(Some(&guarantee)), Ok(()));
        }
    }

    #[test]
    fn a_signer_is_known_by_either_case_of_its_digits() {
        let floor = FloorSettings {
            signers: vec!["thpk1_AB".to_owned()],
            ..FloorSettings::default()
        };
        let by = |signer: &str| GuaranteeV1 {
            policy_signer: signer.to_owned(),
            ..declared()
        };
        assert_eq!(floor.check(Some(&by("thpk1_ab"))), Ok(()));
        assert!(floor.check(Some(&by("thpk1_ac"))).is_err());
    }

    #[test]
    fn a_site_that_declared_nothing_is_refused_only_where_there_is_a_floor() {
        assert_eq!(floor().check(None), Err(FloorError::Undeclared));
        assert_eq!(FloorSettings::default().check(None), Ok(()));
    }
}
