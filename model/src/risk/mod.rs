//! How likely is it to fail soon, and when: failure risk with what is known of its error.
//!
//! ```text
//! learnt     features → hazard of each bin → probability for each horizon → isotonic calibration ┐
//!                                          → time to failure → conformal interval                ├→ Risk
//! day one    level of a resource → robust slope → own forecast errors → chance of the limit      ┘
//! ```
//!
//! [`predictor::Predictor`] is the learnt head: fitted on units whose fate is known, calibrated on predictions for units
//! that it was not fitted on. [`exhaustion::Track`] needs no training at all: it draws the line of a resource towards its limit and
//! learns from how far off its own former lines were. Both **abstain** rather than guess: without a limit, with too few
//! rows, with a value that is missing or outside of what the training rows showed.
//!
//! Nothing here reads a clock or draws a random number. Times are seconds where a [`Horizon`] is meant, else the
//! unit of the data (days, cycles).

pub mod calibrate;
pub mod conformal;
pub mod domain;
pub mod exhaustion;
pub mod hazard;
mod logistic;
pub mod predictor;
pub mod training;
pub mod trend;

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use training::{Outcome, TrainingSet};

/// Why no risk model was made or read.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RiskError {
    /// There is nothing to fit on.
    #[error("no rows to fit a risk model on")]
    NoRows,
    /// A row has another number of features.
    #[error("a row of {found} features where {expected} are expected")]
    Width {
        /// What the model has.
        expected: usize,
        /// What the row has.
        found: usize,
    },
    /// A value is NaN or infinite.
    #[error("a value is not finite: leave rows with missing values out")]
    NotFinite,
    /// An outcome lies before its row.
    #[error(
        "a failure {time} after its row: the time has to be finite and at least 0; did the clock run backwards?"
    )]
    NegativeTime {
        /// The time.
        time: f64,
    },
    /// Bin edges or horizons that are none.
    #[error("bin edges have to begin at 0 and ascend; horizons ascend within them")]
    Edges,
    /// Nothing failed, so there is nothing to learn.
    #[error(
        "no row fails before {before}: without failures there is no hazard to learn; the linear extrapolation needs none"
    )]
    NoFailures {
        /// The last bin edge.
        before: f64,
    },
    /// Too few units failed to judge a model on units that it was not fitted on.
    #[error("{found} units fail and {needed} are needed to calibrate on units that were not fitted on")]
    TooFewFailures {
        /// Units that fail.
        found: usize,
        /// Units needed.
        needed: usize,
    },
    /// A horizon out of range.
    #[error("a horizon of {seconds} s is outside 1 s to 24 h")]
    Horizon {
        /// The horizon.
        seconds: f64,
    },
    /// A limit of nothing.
    #[error("a limit of {limit}: it has to be finite and above 0; leave an unknown limit out")]
    Limit {
        /// The limit.
        limit: f64,
    },
    /// A stored model cannot be used.
    #[error("no risk model that can be used: {reason}; make one with `theriac-lab risk`")]
    Stored {
        /// What is wrong.
        reason: String,
    },
}

/// How far a probability looks ahead: 1 s to 24 h.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Horizon(Duration);

impl Horizon {
    /// One, five and fifteen minutes.
    pub const DEFAULT: [Self; 3] = [
        Self(Duration::from_mins(1)),
        Self(Duration::from_mins(5)),
        Self(Duration::from_mins(15)),
    ];

    /// A horizon.
    ///
    /// # Errors
    /// [`RiskError::Horizon`] outside of 1 s to 24 h.
    pub fn new(ahead: Duration) -> Result<Self, RiskError> {
        if (Duration::from_secs(1)..=Duration::from_hours(24)).contains(&ahead) {
            Ok(Self(ahead))
        } else {
            Err(RiskError::Horizon {
                seconds: ahead.as_secs_f64(),
            })
        }
    }

    /// As a duration.
    pub fn ahead(self) -> Duration {
        self.0
    }

    /// In seconds.
    pub fn seconds(self) -> f64 {
        self.0.as_secs_f64()
    }
}

impl fmt::Display for Horizon {
    /// `15m`, `90s`: whole minutes as such.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        if self.0.subsec_nanos() == 0 && seconds.is_multiple_of(60) {
            write!(f, "{}m", seconds / 60)
        } else {
            write!(f, "{}s", self.0.as_secs_f64())
        }
    }
}

/// Why no number is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Abstain {
    /// No limit of any watched resource is known.
    NoLimit,
    /// Too few rows so far.
    TooShort,
    /// A value that is needed could not be read.
    Missing,
    /// A feature is outside of what the training rows showed.
    OutOfDomain,
}

impl Abstain {
    /// The word in JSON and logs.
    pub fn word(self) -> &'static str {
        match self {
            Self::NoLimit => "no_limit",
            Self::TooShort => "too_short",
            Self::Missing => "missing",
            Self::OutOfDomain => "out_of_domain",
        }
    }
}

impl fmt::Display for Abstain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// Which model gave a risk: `linear-1`, or `hazard-1-` and eight digits of the model file's digest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RiskVersion(String);

impl RiskVersion {
    /// The linear extrapolation.
    pub fn linear() -> Self {
        Self("linear-1".to_owned())
    }

    fn hazard(digest: &[u8; 32]) -> Self {
        let digits = data_encoding::HEXLOWER.encode(&digest[..4]);
        Self(format!("hazard-1-{digits}"))
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RiskVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A probability with what is known of its error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Chance {
    /// 0 to 1.
    pub probability: f64,
    /// Lower bound, at most `probability`.
    pub low: f64,
    /// Upper bound, at least `probability`.
    pub high: f64,
}

impl Chance {
    /// Puts three numbers into their range and order; NaN counts as unknown, 0 to 1.
    pub fn new(probability: f64, low: f64, high: f64) -> Self {
        let unit = |value: f64, unknown: f64| {
            if value.is_nan() {
                unknown
            } else {
                value.clamp(0.0, 1.0)
            }
        };
        let probability = unit(probability, 0.5);
        Self {
            probability,
            low: unit(low, 0.0).min(probability),
            high: unit(high, 1.0).max(probability),
        }
    }

    /// The constant hazard per unit of time that gives these chances within `ahead`: `−ln(1 − p)/h`, in the order low,
    /// point, high. A certain failure counts as 1 − 10⁻⁹.
    pub fn hazards(self, ahead: f64) -> [f64; 3] {
        [self.low, self.probability, self.high].map(|p| -(-p.min(1.0 - 1e-9)).ln_1p() / ahead)
    }
}

/// When it will fail: an interval of time from now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LeadTime {
    /// The earliest time, at least 0.
    pub low: f64,
    /// The expected time.
    pub expected: f64,
    /// The latest time; `None` where the interval is open: it may not fail within the model's reach at all.
    pub high: Option<f64>,
}

impl LeadTime {
    /// Whether `time` lies in the interval.
    pub fn covers(&self, time: f64) -> bool {
        time >= self.low && self.high.is_none_or(|high| time <= high)
    }
}

/// The risk that a service fails within a horizon. This is what the scheduler of checkpoints reads.
#[derive(Debug, Clone, PartialEq)]
pub struct Risk {
    /// How far it looks ahead.
    pub horizon: Horizon,
    /// The chance of failing within the horizon, or why none is given.
    pub chance: Result<Chance, Abstain>,
    /// When it fails, in seconds from now, 90 % interval; `None` while no failure is in sight.
    pub lead: Option<LeadTime>,
    /// What runs out; `None` when nothing is known.
    pub resource: Option<&'static str>,
    /// The model.
    pub model: RiskVersion,
}

impl Risk {
    /// Hazard per second, low, point and high; `None` when the model abstains.
    pub fn hazards_per_s(&self) -> Option<[f64; 3]> {
        let chance = self.chance.ok()?;
        Some(chance.hazards(self.horizon.seconds()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn horizons_have_a_range_and_a_short_text() {
        assert_eq!(Horizon::DEFAULT.map(|h| h.to_string()), ["1m", "5m", "15m"]);
        assert_eq!(Horizon::new(Duration::from_secs(90)).unwrap().to_string(), "90s");
        for bad in [
            Duration::ZERO,
            Duration::from_millis(999),
            Duration::from_hours(25),
        ] {
            assert!(matches!(Horizon::new(bad), Err(RiskError::Horizon { .. })));
        }
    }

    #[test]
    fn chances_are_put_in_order_and_unknown_ones_are_wide() {
        let chance = Chance::new(0.4, 0.5, 0.3);
        assert!(chance.low <= chance.probability && chance.probability <= chance.high);
        let unknown = Chance::new(f64::NAN, f64::NAN, f64::NAN);
        assert_eq!(
            (unknown.low.to_bits(), unknown.high.to_bits()),
            (0.0_f64.to_bits(), 1.0_f64.to_bits())
        );
    }

    #[test]
    fn hazards_give_their_chances_back() {
        let chance = Chance::new(0.3, 0.1, 1.0);
        let [low, point, high] = chance.hazards(60.0);
        assert!((1.0 - (-60.0 * point).exp() - 0.3).abs() < 1e-12);
        assert!((1.0 - (-60.0 * low).exp() - 0.1).abs() < 1e-12);
        assert!(high.is_finite() && high > point);
    }
}
