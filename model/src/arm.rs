//! Which of several detectors: one pipeline, other constants.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::LAG_COUNT;
use crate::forecaster::Forecaster;
use crate::normalise::CLIP;
use crate::score::HALF_LIVES;

/// A way to score rows. The default is what ships; the others are kept so that a fleet can be compared against them
/// with the same command, and to be used where they are better (a small host: [`Arm::Own`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Arm {
    /// Own lags and all lags, summed; two half-lives.
    #[default]
    OwnFull,
    /// Own lags only: 228 instead of 7 486 weights at 38 channels.
    Own,
    /// All lags only.
    Full,
    /// All lags with the narrow scaler (±8, half the floor), units from the 99 % quantile and one half-life: the
    /// textbook form that the others are measured against.
    Reference,
    /// No forecast: distance from the median, scored as in [`Arm::Reference`].
    Level,
    /// The last row is the forecast, scored as in [`Arm::Reference`].
    Persistence,
}

impl Arm {
    /// Every arm, the default first.
    pub const ALL: [Self; 6] = [
        Self::OwnFull,
        Self::Own,
        Self::Full,
        Self::Reference,
        Self::Level,
        Self::Persistence,
    ];

    /// Its name, as [`FromStr`] takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::OwnFull => "own-full",
            Self::Own => "own",
            Self::Full => "full",
            Self::Reference => "reference",
            Self::Level => "level",
            Self::Persistence => "persistence",
        }
    }

    /// The forecasts that are scored and summed.
    pub(crate) fn paths(self) -> &'static [Path] {
        match self {
            Self::OwnFull => &[Path::Own, Path::Full],
            Self::Own | Self::Level | Self::Persistence => &[Path::Own],
            Self::Full | Self::Reference => &[Path::Full],
        }
    }

    fn classic(self) -> bool {
        match self {
            Self::OwnFull | Self::Own | Self::Full => false,
            Self::Reference | Self::Level | Self::Persistence => true,
        }
    }

    /// Bound of scaled values.
    pub(crate) fn clip(self) -> f32 {
        if self.classic() { 8.0 } else { CLIP }
    }

    /// Multiplies every floor of the local scale.
    pub(crate) fn floor_factor(self) -> f64 {
        if self.classic() { 0.5 } else { 1.0 }
    }

    /// Quantile of a channel's residuals on its own history that makes the unit of its residuals. A high quantile is
    /// inflated by a few spikes and mutes the channels that matter.
    pub(crate) fn base_quantile(self) -> f64 {
        if self.classic() { 0.99 } else { 0.75 }
    }

    /// Half-lives of the smoothing in rows: the classic heads know only the first.
    pub(crate) fn half_lives(self, rows: [f64; HALF_LIVES]) -> [f64; HALF_LIVES] {
        if self.classic() {
            [rows[0]; HALF_LIVES]
        } else {
            rows
        }
    }

    /// Own-lag weights `[channel, 5 lags + 1]` that are fixed instead of fitted.
    pub(crate) fn fixed_own(self, channels: usize) -> Option<Vec<f32>> {
        let first = match self {
            Self::OwnFull | Self::Own | Self::Full | Self::Reference => return None,
            Self::Level => 0.0,
            Self::Persistence => 1.0,
        };
        let mut weights = [0.0; LAG_COUNT + 1];
        weights[0] = first;
        Some(weights.repeat(channels))
    }
}

impl fmt::Display for Arm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that no arm has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no arm is called `{0}`; there are: {names}", names = Arm::ALL.map(Arm::name).join(", "))]
pub struct UnknownArm(String);

impl FromStr for Arm {
    type Err = UnknownArm;

    fn from_str(name: &str) -> Result<Self, UnknownArm> {
        Self::ALL
            .into_iter()
            .find(|arm| arm.name() == name)
            .ok_or_else(|| UnknownArm(name.to_owned()))
    }
}

/// Which of the two forecasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Path {
    Own,
    Full,
}

impl Path {
    /// Position of its head.
    pub(crate) fn index(self) -> usize {
        match self {
            Self::Own => 0,
            Self::Full => 1,
        }
    }

    pub(crate) fn forecast(self, forecaster: &Forecaster, lags: &[f32], out: &mut [f32]) {
        match self {
            Self::Own => forecaster.own(lags, out),
            Self::Full => forecaster.full(lags, out),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_their_arms_in_text_and_in_cards() {
        for arm in Arm::ALL {
            assert_eq!(arm.name().parse(), Ok(arm));
            assert_eq!(serde_json::to_value(arm).unwrap(), arm.name());
        }
        let error = "best".parse::<Arm>().unwrap_err().to_string();
        assert!(error.contains("`best`") && error.contains("own-full"), "{error}");
    }
}
