//! `[detection]`: when a measurement counts as an anomaly.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_command::settings;
use theriac_model::arm::Arm;

use super::{ConfigError, SamplingSettings, count, durations, span, wrong};

/// `[detection]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct DetectionSettings {
    /// Samples gathered before the first model is fitted, 60 to 100 000 and at most `sampling.history_rows`; default 300.
    /// Fewer give early but nervous detection; more leave the host unwatched for longer (probes and exits always act).
    pub warm_up_rows: usize,
    /// The two half-lives of the score's memory, in time and not in rows. Default `["3s", "12s"]`; each 1 ms to 1 h, the
    /// second longer. Short ones react to blips, long ones find slow faults late.
    #[serde(with = "durations::pair")]
    pub half_lives: [Duration; 2],
    /// Time between refits on the recent history without its alarms. Default `1h`, range 10 s to 7 days. Too short
    /// learns a slow fault as normal; too long misses changes in load.
    #[serde(with = "settings::duration")]
    pub refit: Duration,
    /// Most samples used for one fit, 60 to 100 000, default 7 200. More cost memory while fitting.
    pub fit_rows: usize,
    /// False alarms per day that the threshold aims at, 0.01 to 1 000, default 1. Fewer miss small faults.
    pub false_alarms_per_day: f64,
    /// The alarm threshold as a multiple of the calibrated one, 0.5 to 20, default 1. Raise it where the warm-up is too
    /// short to show a normal day; lower finds more and alarms more.
    pub threshold_factor: f32,
    /// Which detector: `own-full` (default) forecasts each channel from its own lags and from all lags; `own` from its own alone, a thirtieth of the
    /// weights and as good on recorded servers: for a host with little memory.
    pub arm: DetectorArm,
}

impl Default for DetectionSettings {
    fn default() -> Self {
        Self {
            warm_up_rows: 300,
            half_lives: [Duration::from_secs(3), Duration::from_secs(12)],
            refit: Duration::from_hours(1),
            fit_rows: 7_200,
            false_alarms_per_day: 1.0,
            threshold_factor: 1.0,
            arm: DetectorArm::default(),
        }
    }
}

/// The detectors that an edge offers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum DetectorArm {
    /// Own lags and all lags.
    #[default]
    OwnFull,
    /// Own lags alone.
    Own,
}

impl From<DetectorArm> for Arm {
    fn from(arm: DetectorArm) -> Self {
        match arm {
            DetectorArm::OwnFull => Self::OwnFull,
            DetectorArm::Own => Self::Own,
        }
    }
}

pub(super) fn check(detection: &DetectionSettings, sampling: &SamplingSettings) -> Result<(), ConfigError> {
    count(
        "detection.warm_up_rows",
        detection.warm_up_rows,
        60,
        100_000.min(sampling.history_rows),
    )?;
    count("detection.fit_rows", detection.fit_rows, 60, 100_000)?;
    for half_life in detection.half_lives {
        span(
            "detection.half_lives",
            half_life,
            Duration::from_millis(1),
            Duration::from_hours(1),
        )?;
    }
    if detection.half_lives[0] >= detection.half_lives[1] {
        return Err(wrong(
            "detection.half_lives",
            "the second must be longer than the first",
        ));
    }
    span(
        "detection.refit",
        detection.refit,
        Duration::from_secs(10),
        Duration::from_hours(168),
    )?;
    let alarms = detection.false_alarms_per_day;
    if !(0.01..=1_000.0).contains(&alarms) {
        return Err(wrong(
            "detection.false_alarms_per_day",
            format!("{alarms} is outside 0.01 to 1000"),
        ));
    }
    let factor = detection.threshold_factor;
    if !(0.5..=20.0).contains(&factor) {
        return Err(wrong(
            "detection.threshold_factor",
            format!("{factor} is outside 0.5 to 20"),
        ));
    }
    Ok(())
}
