//! `[sampling]`: how often and how much is measured.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_command::settings;

use super::{ConfigError, count, span};

/// `[sampling]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplingSettings {
    /// Time between two samples. Default `1s`, range 100 ms to 60 s. Shorter costs CPU (about 0.2 % of a core at 1 Hz);
    /// longer finds faults later.
    #[serde(with = "settings::duration")]
    pub interval: Duration,
    /// Samples kept in memory for training, 600 to 200 000, default 14 400 (four hours at 1 s; 120 bytes each). Too few
    /// leave no complete blocks for a round; more cost memory.
    pub history_rows: usize,
    /// Network interfaces counted. Empty (the default) counts all but `lo`. A name that does not exist counts nothing.
    pub interfaces: Vec<String>,
    /// Directory whose file system is watched for space. Default: the state directory.
    pub disk: Option<PathBuf>,
}

impl Default for SamplingSettings {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(1),
            history_rows: 14_400,
            interfaces: Vec::new(),
            disk: None,
        }
    }
}

pub(super) fn check(sampling: &SamplingSettings) -> Result<(), ConfigError> {
    span(
        "sampling.interval",
        sampling.interval,
        Duration::from_millis(100),
        Duration::from_mins(1),
    )?;
    count("sampling.history_rows", sampling.history_rows, 600, 200_000)
}
