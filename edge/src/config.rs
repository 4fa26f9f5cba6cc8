//! `edge.toml`: everything optional, every key documented, unknown keys refused.
//!
//! [`EdgeSettings`] is what the file says; [`EdgeConfig`] is what the program runs on. The only way from one to the
//! other is [`EdgeConfig::check`], so running code never meets a value out of range. `check-config` and `run` share
//! [`EdgeConfig::load`].

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_command::settings::{self, SettingsError};
use theriac_heal::policy::{HealingSection, NodeBudget};
use theriac_protocol::units::NodeId;

pub use self::calls::{HookSettings, WebhookSettings};
pub use self::cgroup::CgroupSettings;
pub use self::detection::{DetectionSettings, DetectorArm};
pub(crate) use self::federation::host_and_port;
pub use self::federation::{FederationSettings, NoiseBackend};
pub use self::kubernetes::KubernetesSettings;
pub use self::policy::HealingPolicySettings;
pub use self::probe::{ProbeConfig, ProbeSettings};
pub use self::proxy::ProxySettings;
pub use self::risk::{RiskConfig, RiskSettings};
pub use self::sampling::SamplingSettings;
pub(crate) use self::service::stops_too_slowly;
pub use self::service::{LimitSettings, ServiceConfig, ServiceSettings};
pub use self::space::SpaceSettings;
pub use self::state::StateSettings;
pub use self::systemd::SystemdSettings;
use crate::offsite::OffsiteSettings;

mod calls;
mod cgroup;
mod detection;
mod durations;
mod federation;
mod kubernetes;
mod policy;
mod probe;
mod proxy;
mod risk;
mod sampling;
mod service;
mod space;
mod state;
mod systemd;
mod targets;

/// Prefix of environment variables that override the file: `THERIAC__SECTION__KEY`.
pub const ENVIRONMENT_PREFIX: &str = "THERIAC";

/// Why there is no configuration to run on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file or the environment does not load.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// A value is out of range or two values do not fit together.
    #[error("{key}: {reason}")]
    Value {
        /// The key, with its section.
        key: String,
        /// The value, the range, and what to do.
        reason: String,
    },
}

/// What `edge.toml` may say. Durations are text such as `"500ms"`, `"1s"`, `"2m"`.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct EdgeSettings {
    /// Name of this site, 1 to 63 characters of `a-z`, `0-9` and `-`. Default: the name given at `join`, else the host's
    /// name. Once joined it must be the enrolled name.
    pub node: Option<String>,
    /// Directory for everything the edge keeps, made with mode 0700. Default: `$STATE_DIRECTORY`, else
    /// `$XDG_STATE_HOME/theriac-edge`, else `~/.local/state/theriac-edge`, else `./theriac-edge-state`. On a volume that
    /// fills up, training stops (detection does not).
    pub state_dir: Option<PathBuf>,
    /// How often and how much is measured.
    pub sampling: SamplingSettings,
    /// When a measurement counts as an anomaly.
    pub detection: DetectionSettings,
    /// How far ahead failures are looked for.
    pub risk: RiskSettings,
    /// Learning together with other sites.
    pub federation: FederationSettings,
    /// The page on loopback.
    pub http: HttpSettings,
    /// What may be done to a sick service and how often; `[service.healing]` overrides it for one service. The keys are
    /// those of [`theriac_heal::policy::HealPolicy`]. By default actions are recommended, not taken: `autonomy = "act"`
    /// lets the edge act.
    pub healing: HealingSection,
    /// The budget of actions over all services.
    pub healing_budget: NodeBudget,
    /// A signed policy of healing.
    pub healing_policy: HealingPolicySettings,
    /// Where copies of valid checkpoints go, away from this host. Default: nowhere.
    pub offsite: Option<OffsiteSettings>,
    /// Services that this edge starts, watches and restarts: one `[[service]]` table each, at most 16.
    pub service: Vec<ServiceSettings>,
}

/// `[http]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct HttpSettings {
    /// Address of `/healthz`, `/readyz`, `/metrics`, `/status`, `/incidents`. Default `127.0.0.1:9466`; port 0 takes a free
    /// one and writes it to `http.addr` in the state directory. Only loopback addresses are taken.
    pub listen: SocketAddr,
}

impl Default for HttpSettings {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 9466)),
        }
    }
}

/// A checked configuration.
#[derive(Debug, Clone)]
pub struct EdgeConfig {
    /// The configured name, if any; `join`'s name and the host's name come after it.
    pub node: Option<NodeId>,
    /// Where state is kept, and whether the place was chosen by default.
    pub state_dir: StateDirChoice,
    /// Checked `[sampling]`.
    pub sampling: SamplingSettings,
    /// Checked `[detection]`.
    pub detection: DetectionSettings,
    /// Checked `[risk]`.
    pub risk: RiskConfig,
    /// Checked `[federation]`.
    pub federation: FederationSettings,
    /// Checked `[http]`.
    pub http: HttpSettings,
    /// Checked `[healing_budget]`.
    pub healing_budget: NodeBudget,
    /// Checked `[healing_policy]`.
    pub healing_policy: HealingPolicySettings,
    /// Checked `[offsite]`.
    pub offsite: Option<OffsiteSettings>,
    /// Checked services.
    pub services: Vec<ServiceConfig>,
}

/// The state directory and how it was chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateDirChoice {
    /// The directory.
    pub path: PathBuf,
    /// Whether no one named it.
    pub by_default: bool,
}

impl EdgeConfig {
    /// Loads and checks the configuration: defaults, then `file`, then the environment.
    ///
    /// # Errors
    /// [`ConfigError`] names the key, the value and what to do.
    pub fn load(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ConfigError> {
        let environment: BTreeMap<String, String> = environment.into_iter().collect();
        let settings: EdgeSettings = settings::load(file, ENVIRONMENT_PREFIX, environment.clone())?;
        Self::check(settings, &|name| environment.get(name).cloned())
    }

    /// Checks ranges and how values fit together. `variable` looks up an environment variable (for the default state
    /// directory).
    ///
    /// # Errors
    /// [`ConfigError::Value`] for the first value that is out of range.
    pub fn check(
        settings: EdgeSettings,
        variable: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, ConfigError> {
        let node = settings
            .node
            .map(|name| name.parse::<NodeId>().map_err(|error| wrong("node", error)))
            .transpose()?;
        let state_dir = match settings.state_dir {
            Some(path) if path.as_os_str().is_empty() => {
                return Err(wrong("state_dir", "is empty: name a directory"));
            }
            Some(path) => StateDirChoice {
                path,
                by_default: false,
            },
            None => StateDirChoice {
                path: default_state_dir(variable),
                by_default: true,
            },
        };
        sampling::check(&settings.sampling)?;
        detection::check(&settings.detection, &settings.sampling)?;
        let risk = risk::check(settings.risk, settings.sampling.interval)?;
        federation::check(&settings.federation)?;
        if !settings.http.listen.ip().is_loopback() {
            let got = settings.http.listen;
            return Err(wrong(
                "http.listen",
                format!("{got} is no loopback address: use 127.0.0.1 or [::1]"),
            ));
        }
        // Also without a service: a wrong policy must not wait for the first one.
        settings
            .healing
            .check()
            .map_err(|error| wrong("healing", error))?;
        let healing_budget = settings
            .healing_budget
            .check()
            .map_err(|error| wrong("healing_budget", error))?;
        if let Some((key, reason)) = settings.offsite.as_ref().and_then(OffsiteSettings::wrong) {
            return Err(wrong(key, reason));
        }
        let services = service::check_all(settings.service, &settings.healing)?;
        state::check_apart(&services, &state_dir.path)?;
        space::check_all(&services, &state_dir.path)?;
        Ok(Self {
            node,
            state_dir,
            sampling: settings.sampling,
            detection: settings.detection,
            risk,
            federation: settings.federation,
            http: settings.http,
            healing_budget,
            healing_policy: policy::check(settings.healing_policy)?,
            offsite: settings.offsite,
            services,
        })
    }
}

impl Default for EdgeConfig {
    /// What `theriac-edge run` without a file runs on.
    #[expect(
        clippy::expect_used,
        reason = "the defaults satisfy the checks: a test holds it"
    )]
    fn default() -> Self {
        Self::check(EdgeSettings::default(), &|name| std::env::var(name).ok())
            .expect("the defaults are in range")
    }
}

/// A complete `edge.toml` with every key at its default or at a typical value.
pub fn example() -> &'static str {
    include_str!("../edge.example.toml")
}

fn default_state_dir(variable: &dyn Fn(&str) -> Option<String>) -> PathBuf {
    let set = |name: &str| {
        variable(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    // systemd lists several directories separated by colons; the first is ours.
    if let Some(listed) = set("STATE_DIRECTORY") {
        let listed = listed.to_string_lossy().into_owned();
        return PathBuf::from(listed.split(':').next().unwrap_or_default());
    }
    set("XDG_STATE_HOME")
        .or_else(|| set("HOME").map(|home| home.join(".local/state")))
        .map_or_else(
            || PathBuf::from("theriac-edge-state"),
            |base| base.join("theriac-edge"),
        )
}

fn wrong(key: impl Into<String>, reason: impl std::fmt::Display) -> ConfigError {
    ConfigError::Value {
        key: key.into(),
        reason: reason.to_string(),
    }
}

fn span(key: &str, got: Duration, low: Duration, high: Duration) -> Result<(), ConfigError> {
    if (low..=high).contains(&got) {
        return Ok(());
    }
    let text = humantime::format_duration;
    Err(wrong(
        key,
        format!("{} is outside {} to {}", text(got), text(low), text(high)),
    ))
}

fn count(key: &str, got: usize, low: usize, high: usize) -> Result<(), ConfigError> {
    if (low..=high).contains(&got) {
        Ok(())
    } else {
        Err(wrong(key, format!("{got} is outside {low} to {high}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn check_text(text: &str) -> Result<EdgeConfig, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("edge.toml");
        std::fs::write(&path, text).unwrap();
        EdgeConfig::load(Some(&path), [])
    }

    #[test]
    fn no_file_at_all_is_a_configuration() {
        let config = EdgeConfig::load(None, [("HOME".to_owned(), "/home/a".to_owned())]).unwrap();
        assert_eq!(
            config.state_dir.path,
            Path::new("/home/a/.local/state/theriac-edge")
        );
        assert!(config.state_dir.by_default && config.services.is_empty() && config.node.is_none());
        let bare = EdgeConfig::load(None, []).unwrap();
        assert_eq!(bare.state_dir.path, Path::new("theriac-edge-state"));
    }

    #[test]
    fn example_is_a_valid_configuration_that_names_every_section() {
        let config = check_text(example()).unwrap();
        assert_eq!(config.services.len(), 1);
        assert!(config.services[0].probe.is_some() && config.services[0].state.is_some());
        for section in [
            "[sampling]",
            "[detection]",
            "[risk]",
            "[federation]",
            "[http]",
            "[healing]",
            "[healing_budget]",
            "[[service]]",
        ] {
            assert!(example().contains(section), "{section} is missing");
        }
    }

    #[test]
    fn example_shows_the_defaults() {
        let table: toml::Table = example().parse().unwrap();
        let defaults = toml::Table::try_from(EdgeSettings::default()).unwrap();
        for section in [
            "sampling",
            "detection",
            "risk",
            "federation",
            "http",
            "healing_budget",
        ] {
            let shown = table[section].as_table().unwrap();
            for (key, value) in defaults[section].as_table().unwrap() {
                assert_eq!(shown.get(key), Some(value), "{section}.{key}");
            }
        }
    }

    #[test]
    fn wrong_values_are_refused_with_key_and_value() {
        let cases = [
            ("node = 'Site 1'", "Site 1"),
            ("[sampling]\ninterval = '1ms'", "1ms"),
            ("[sampling]\nhistory_rows = 5", "600"),
            ("[detection]\nwarm_up_rows = 20000", "14400"),
            ("[detection]\nhalf_lives = ['12s', '3s']", "second"),
            ("[detection]\nthreshold_factor = nan", "NaN"),
            ("[risk]\nhorizons = []", "risk.horizons"),
            ("[risk]\nhorizons = ['5m', '1m']", "longer"),
            ("[risk]\nhorizons = ['100ms']", "24 h"),
            (
                "[[service]]\nname = 'a'\nargv = ['x']\nlimits.memory_bytes = 0",
                "above 0",
            ),
            ("[federation]\naggregator = 'nowhere'", "nowhere"),
            ("[federation]\nretry_base = '10s'\nretry_max = '1s'", "1s"),
            ("[http]\nlisten = '0.0.0.0:80'", "0.0.0.0:80"),
            ("[[service]]\nname = 'a'\nargv = []", "argv"),
            ("[[service]]\nname = 'host'\nargv = ['x']", "host"),
            ("[healing]\nprobe_failures = 0", "probe_failures"),
            (
                "[[service]]\nname = 'a'\nargv = ['x']\nhealing.max_actions = 0",
                "max_actions",
            ),
            ("[healing_budget]\nmax_actions = 0", "max_actions"),
            (
                "[[service]]\nname = 'a'\nargv = ['x']\n[[service]]\nname = 'a'\nargv = ['x']",
                "twice",
            ),
            (
                "[[service]]\nname = 'a'\nargv = ['x']\nprobe.url = 'http://a/'\nprobe.password_file = '/p'",
                "probe.password_file",
            ),
            (
                "[[service]]\nname = 'a'\nargv = ['x']\nprobe.url = 'redis://a:1'\nprobe.loading_max = '25h'",
                "probe.loading_max",
            ),
            (
                "[[service]]\nname = 'a'\nargv = ['x']\nprobe.url = 'https://a/'",
                "https",
            ),
            (
                "[[service]]\nname = 'a'\nargv = ['x']\nstate = { dir = 'd', keep = 0 }",
                "keep",
            ),
            (
                "[[service]]\nname = 'a'\nargv = ['x']\nstate = { dir = 'd', budget_pct = 0.0 }",
                "budget_pct",
            ),
            (
                "[[service]]\nname = 'a'\nargv = ['x']\nstate = { dir = 'd', min_gap = '1ms' }",
                "min_gap",
            ),
            (
                "[[service]]\nname = 'a'\nargv = ['x']\ndepends_on = ['db']",
                "`db` is no other [[service]]",
            ),
            (
                "[[service]]\nname = 'a'\nargv = ['x']\ndepends_on = ['a']",
                "service `a`, depends_on",
            ),
        ];
        for (text, expected) in cases {
            let error = check_text(text).expect_err(text).to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn misspelt_key_names_the_right_one() {
        let ConfigError::Settings(error) = check_text("[detection]\nwarmup_rows = 100").unwrap_err() else {
            panic!("not a settings error");
        };
        assert_eq!(error.hint(), "did you mean `warm_up_rows`?");
    }

    #[test]
    fn environment_overrides_the_file() {
        let set = [("THERIAC__SAMPLING__INTERVAL".to_owned(), "250ms".to_owned())];
        let config = EdgeConfig::load(None, set).unwrap();
        assert_eq!(config.sampling.interval, Duration::from_millis(250));
    }
}
