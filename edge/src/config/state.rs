//! `[service.state]`: the durable state of a service.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_command::settings;

use super::{ConfigError, ServiceConfig, count, span, wrong};

/// `[service.state]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct StateSettings {
    /// The service's state directory.
    pub dir: PathBuf,
    /// A command that ends with 0 when the state is sound; `{state}` in an argument stands for the directory, so that a
    /// checkpoint's copy can be checked too. Run before each start. Default: none, every state is taken for good.
    #[serde(default)]
    pub check: Vec<String>,
    /// Longest time that the check may take, default `10s`, range 10 ms to 10 min. A check that takes longer says nothing.
    #[serde(default = "default_check_timeout", with = "settings::duration")]
    pub check_timeout: Duration,
    /// Longest time between checkpoints. Default `5m`, range 1 s to 7 days. They come sooner where a failure is likely or has
    /// become so. Too long loses more work; too short keeps the schedule from saving disk traffic.
    #[serde(default = "default_checkpoint_interval", with = "settings::duration")]
    pub interval: Duration,
    /// Shortest time between checkpoints, however near a failure seems. Default `1m`, range 1 s to 7 days; where `interval` is
    /// shorter, that counts. Too short lets a wrong predictor flood the disk; too long comes too late before a failure.
    #[serde(default = "default_min_gap", with = "settings::duration")]
    pub min_gap: Duration,
    /// Most time spent on checkpoints while no failure is foretold, in per cent. Default 5, above 0 to 100.
    #[serde(default = "default_budget_pct")]
    pub budget_pct: f64,
    /// Mean time between failures before the edge has seen any. Default `1day`, range 1 min to 1 year. It counts as one failure,
    /// so it is soon outweighed. Too long takes the first checkpoints rarely.
    #[serde(default = "default_mtbf", with = "settings::duration")]
    pub expected_mtbf: Duration,
    /// How often every byte of the kept checkpoints is read again, so that one that was damaged since does not count. Default `1day`, range 1 s to
    /// 1 year. Too long finds it out when it is needed; too short reads all the time.
    #[serde(default = "default_verify_every", with = "settings::duration")]
    pub verify_every: Duration,
    /// Valid checkpoints kept, 1 to 100, default 2. For a week after the state lost nine tenths of its bytes one more is.
    #[serde(default = "default_keep")]
    pub keep: usize,
    /// With fewer bytes free its file system counts as full. Default: 16 MiB, or a fiftieth of it where that is less; of more than an eighth of it an eighth counts. 0: only when not a block
    /// is left, for a volume that is meant to be nearly full all the time; nothing is done then before writes fail. Room is made until twice as
    /// much is free, of the greater of this and the default.
    #[serde(default)]
    pub free_bytes_min: Option<u64>,
}

impl StateSettings {
    /// `key` names a field of the service.
    pub(super) fn check_values(&self, key: &dyn Fn(&str) -> String) -> Result<(), ConfigError> {
        if self.dir.as_os_str().is_empty() {
            return Err(wrong(key("state.dir"), "is empty: name the directory"));
        }
        span(
            &key("state.interval"),
            self.interval,
            Duration::from_secs(1),
            Duration::from_hours(168),
        )?;
        span(
            &key("state.min_gap"),
            self.min_gap,
            Duration::from_secs(1),
            Duration::from_hours(168),
        )?;
        span(
            &key("state.expected_mtbf"),
            self.expected_mtbf,
            Duration::from_mins(1),
            Duration::from_hours(8_766),
        )?;
        span(
            &key("state.verify_every"),
            self.verify_every,
            Duration::from_secs(1),
            Duration::from_hours(8_766),
        )?;
        if !(self.budget_pct > 0.0 && self.budget_pct <= 100.0) {
            let got = self.budget_pct;
            return Err(wrong(
                key("state.budget_pct"),
                format!("{got} is outside above 0 to 100"),
            ));
        }
        span(
            &key("state.check_timeout"),
            self.check_timeout,
            Duration::from_millis(10),
            Duration::from_mins(10),
        )?;
        count(&key("state.keep"), self.keep, 1, 100)
    }
}

/// Each state is one service's, and what the edge keeps is in none: a restore swaps the directory, whoever else uses it. By name alone.
pub(super) fn check_apart(services: &[ServiceConfig], state_dir: &Path) -> Result<(), ConfigError> {
    let full = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let edge = full(state_dir);
    let states: Vec<(&str, PathBuf)> = services
        .iter()
        .filter_map(|service| Some((service.name.as_str(), full(&service.state.as_ref()?.dir))))
        .collect();
    for (at, (name, dir)) in states.iter().enumerate() {
        let key = format!("service `{name}`, state.dir");
        if edge.starts_with(dir) {
            let words = format!(
                "holds the edge's state_dir, {}: no checkpoint may hold the checkpoints",
                edge.display()
            );
            return Err(wrong(key, words));
        }
        let overlaps = |(_, other): &&(&str, PathBuf)| dir.starts_with(other) || other.starts_with(dir);
        if let Some((other, _)) = states[..at].iter().find(overlaps) {
            let words = format!(
                "{} overlaps with that of `{other}`: a state is one service's",
                dir.display()
            );
            return Err(wrong(key, words));
        }
    }
    Ok(())
}

fn default_check_timeout() -> Duration {
    Duration::from_secs(10)
}

fn default_checkpoint_interval() -> Duration {
    Duration::from_mins(5)
}

fn default_min_gap() -> Duration {
    Duration::from_mins(1)
}

fn default_budget_pct() -> f64 {
    5.0
}

fn default_mtbf() -> Duration {
    Duration::from_hours(24)
}

fn default_verify_every() -> Duration {
    Duration::from_hours(24)
}

fn default_keep() -> usize {
    2
}

#[cfg(test)]
mod tests {
    use super::super::{EdgeConfig, EdgeSettings};

    #[test]
    fn a_state_is_one_services_and_holds_nothing_of_the_edges() {
        let load = |kv: &str, db: &str| {
            let text = format!(
                "state_dir = '/var/lib/edge'\n\
                 [[service]]\nname = 'kv'\nargv = ['true']\nstate = {{ dir = '{kv}' }}\n\
                 [[service]]\nname = 'db'\nargv = ['true']\nstate = {{ dir = '{db}' }}\n"
            );
            let settings: EdgeSettings = toml::from_str(&text).map_err(|error| error.to_string())?;
            EdgeConfig::check(settings, &|_| None).map_err(|error| error.to_string())
        };
        assert!(load("/data/kv", "/data/kv-2").is_ok());
        for (kv, db, words) in [
            ("/data", "/data", "`db`, state.dir"),
            ("/data", "/data/db", "overlaps with that of `kv`"),
            ("/data/kv/deep", "/data/kv", "overlaps with that of `kv`"),
            ("/var", "/data", "`kv`, state.dir"),
            ("/data", "/var/lib/edge", "holds the edge's state_dir"),
        ] {
            let error = load(kv, db).unwrap_err();
            assert!(error.contains(words), "{kv} {db}: {error}");
        }
    }
}
