//! `[risk]`: how far ahead failures are looked for.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_model::risk::Horizon;
use theriac_model::risk::exhaustion::HORIZON_RATIO_MAX;

use super::{ConfigError, count, durations, wrong};

/// A horizon holds at least so many samples: a line needs six points, and the last of them is still being gathered.
const HORIZON_SAMPLES_MIN: u32 = 8;

/// `[risk]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct RiskSettings {
    /// Horizons of the failure risk, 1 to 8, ascending, each 1 s to 24 h; default `["1m", "5m", "15m"]`. What a resource did
    /// for as long as the longest one is remembered. Short ones leave no time to act; long ones are guesses.
    #[serde(with = "durations::list")]
    pub horizons: Vec<Duration>,
    /// A fitted risk model (`theriac-lab risk` leaves one). Default: none, resources are extrapolated linearly towards
    /// their limits. One whose horizons are others is refused, and the linear extrapolation stays.
    pub model: Option<PathBuf>,
}

impl Default for RiskSettings {
    fn default() -> Self {
        Self {
            horizons: Horizon::DEFAULT.map(Horizon::ahead).to_vec(),
            model: None,
        }
    }
}

/// A checked `[risk]`.
#[derive(Debug, Clone)]
pub struct RiskConfig {
    /// Ascending.
    pub horizons: Vec<Horizon>,
    /// Where the fitted model is.
    pub model: Option<PathBuf>,
}

pub(super) fn check(mut risk: RiskSettings, interval: Duration) -> Result<RiskConfig, ConfigError> {
    count("risk.horizons", risk.horizons.len(), 1, 8)?;
    if !risk.horizons.windows(2).all(|pair| pair[0] < pair[1]) {
        return Err(wrong("risk.horizons", "each must be longer than the one before"));
    }
    for horizon in &risk.horizons {
        Horizon::new(*horizon).map_err(|error| wrong("risk.horizons", error))?;
    }
    let shortest = interval.saturating_mul(HORIZON_SAMPLES_MIN);
    if risk.horizons == RiskSettings::default().horizons {
        // Nobody chose them: those that this interval leaves too few samples for are left out.
        risk.horizons.retain(|horizon| *horizon >= shortest);
    }
    if let Some(short) = risk.horizons.iter().find(|horizon| **horizon < shortest) {
        let text = humantime::format_duration;
        return Err(wrong(
            "risk.horizons",
            format!(
                "{} is less than {HORIZON_SAMPLES_MIN} times sampling.interval ({}): no line can be drawn through so few samples",
                text(*short),
                text(interval)
            ),
        ));
    }
    if let [first, .., last] = risk.horizons[..]
        && last > first.saturating_mul(HORIZON_RATIO_MAX)
    {
        return Err(wrong(
            "risk.horizons",
            format!("the longest may be at most {HORIZON_RATIO_MAX} times the shortest"),
        ));
    }
    let horizons = risk
        .horizons
        .into_iter()
        .map(|horizon| Horizon::new(horizon).map_err(|error| wrong("risk.horizons", error)))
        .collect::<Result<_, _>>()?;
    Ok(RiskConfig {
        horizons,
        model: risk.model,
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::check_text;

    #[test]
    fn horizons_hold_samples_enough_for_a_line() {
        let horizons = |text: &str| {
            check_text(text).map(|config| {
                let seconds = config.risk.horizons.iter().map(|horizon| horizon.seconds());
                seconds.collect::<Vec<_>>()
            })
        };
        assert_eq!(horizons("").unwrap(), [60.0, 300.0, 900.0]);
        // Of those that nobody chose, the ones that are too short are left out; chosen ones are refused.
        assert_eq!(
            horizons("[sampling]\ninterval = '15s'\n").unwrap(),
            [300.0, 900.0]
        );
        assert_eq!(horizons("[sampling]\ninterval = '1m'\n").unwrap(), [900.0]);
        let error = horizons("[sampling]\ninterval = '15s'\n[risk]\nhorizons = ['1m', '15m']\n").unwrap_err();
        assert!(
            error.to_string().contains("8 times sampling.interval (15s)"),
            "{error}"
        );
        let error = horizons("[risk]\nhorizons = ['10s', '2h']\n").unwrap_err();
        assert!(error.to_string().contains("360 times the shortest"), "{error}");
    }
}
