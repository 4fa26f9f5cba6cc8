//! `[service.probe]`: how a service is asked whether it is well.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_command::settings;

use super::{ConfigError, span, wrong};
use crate::probe::Probe;

/// `[service.probe]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ProbeSettings {
    /// `http://HOST:PORT/PATH`; any 2xx answer is well. Plain HTTP only: a probe stays on the host. Or
    /// `postgresql://ROLE@/SOCKET_DIR:PORT/DATABASE`, asked `select 1`; an ordinary role sees full connections too. Or
    /// `redis://HOST:PORT` or `redis:///SOCKET`, asked `PING`.
    pub url: String,
    /// File with the password of a Redis server, read anew at each probe. Default none.
    #[serde(default)]
    pub password_file: Option<PathBuf>,
    /// Longest time for which a Redis server may say that it loads its data (`LOADING`); until then it is starting, after that such an
    /// answer is a failed probe. Default `10m`, range 0 to 24 h. Too short restarts a server that has much to read, which begins anew then.
    #[serde(default = "default_loading_max", with = "settings::duration")]
    pub loading_max: Duration,
    /// Time between probes. Default `500ms`, range 50 ms to 60 s. The time to find a hang is about
    /// `failures × (interval + timeout)`.
    #[serde(default = "default_probe_interval", with = "settings::duration")]
    pub interval: Duration,
    /// Longest wait for an answer. Default `1s`, range 10 ms to 60 s. Too short restarts a busy service.
    #[serde(default = "default_probe_timeout", with = "settings::duration")]
    pub timeout: Duration,
    /// Longest time from the start of a process to its first good answer. Default `10s`, range 0 to 10 min; failed probes
    /// count only after it. Too short restarts a service that is still starting; too long finds one late that never does.
    #[serde(default = "default_start_grace", with = "settings::duration")]
    pub start_grace: Duration,
}

/// A checked probe.
#[derive(Debug, Clone)]
pub struct ProbeConfig {
    /// Where to ask.
    pub url: Probe,
    /// Time between probes.
    pub interval: Duration,
    /// Longest wait.
    pub timeout: Duration,
    /// Longest time from start to first good answer.
    pub start_grace: Duration,
    /// Longest time for which it may say that it loads its data.
    pub loading_max: Duration,
}

impl ProbeSettings {
    /// `key` names a field of the service.
    pub(super) fn checked(&self, key: &dyn Fn(&str) -> String) -> Result<ProbeConfig, ConfigError> {
        span(
            &key("probe.interval"),
            self.interval,
            Duration::from_millis(50),
            Duration::from_mins(1),
        )?;
        span(
            &key("probe.timeout"),
            self.timeout,
            Duration::from_millis(10),
            Duration::from_mins(1),
        )?;
        span(
            &key("probe.start_grace"),
            self.start_grace,
            Duration::ZERO,
            Duration::from_mins(10),
        )?;
        span(
            &key("probe.loading_max"),
            self.loading_max,
            Duration::ZERO,
            Duration::from_hours(24),
        )?;
        let mut url = self.url.parse().map_err(|error| wrong(key("probe.url"), error))?;
        match (&mut url, &self.password_file) {
            (Probe::Redis(server), file) => server.password_file.clone_from(file),
            (_, Some(_)) => {
                let words = "is for a Redis server: the probe goes elsewhere";
                return Err(wrong(key("probe.password_file"), words));
            }
            (_, None) => {}
        }
        Ok(ProbeConfig {
            url,
            loading_max: self.loading_max,
            interval: self.interval,
            timeout: self.timeout,
            start_grace: self.start_grace,
        })
    }
}

fn default_loading_max() -> Duration {
    Duration::from_mins(10)
}

fn default_probe_interval() -> Duration {
    Duration::from_millis(500)
}

fn default_probe_timeout() -> Duration {
    Duration::from_secs(1)
}

fn default_start_grace() -> Duration {
    Duration::from_secs(10)
}
