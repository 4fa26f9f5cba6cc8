//! `edge.toml`: everything optional, every key documented, unknown keys refused.
//!
//! [`EdgeSettings`] is what the file says; [`EdgeConfig`] is what the program runs on. The only way from one to the
//! other is [`EdgeConfig::check`], so running code never meets a value out of range. `check-config` and `run` share
//! [`EdgeConfig::load`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_command::settings::{self, SettingsError};
use theriac_heal::executor::webhook::{self, WebhookUrl};
use theriac_heal::policy::{HealPolicy, HealingSection, NodeBudget};
use theriac_heal::types::{ActionKind, FaultClass};
use theriac_model::arm::Arm;
use theriac_model::risk::Horizon;
use theriac_model::risk::exhaustion::{HORIZON_RATIO_MAX, Limit};
use theriac_privacy::policy::signed::PolicyPublicKey;
use theriac_protocol::units::NodeId;

pub use self::cgroup::CgroupSettings;
pub use self::kubernetes::KubernetesSettings;
pub use self::proxy::ProxySettings;
pub use self::systemd::SystemdSettings;
use crate::offsite::OffsiteSettings;
use crate::postgres::{CheckpointSettings, SessionSettings};
use crate::probe::Probe;

mod cgroup;
mod kubernetes;
mod proxy;
mod systemd;
mod targets;

/// A horizon holds at least so many samples: a line needs six points, and the last of them is still being gathered.
const HORIZON_SAMPLES_MIN: u32 = 8;

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

/// `[detection]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct DetectionSettings {
    /// Samples gathered before the first model is fitted, 60 to 100 000 and at most `sampling.history_rows`; default 300.
    /// Fewer give early but nervous detection; more leave the host unwatched for longer (probes and exits always act).
    pub warm_up_rows: usize,
    /// The two half-lives of the score's memory, in time and not in rows. Default `["3s", "12s"]`; each 1 ms to 1 h, the
    /// second longer. Short ones react to blips, long ones find slow faults late.
    #[serde(with = "duration_pair")]
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

/// `[risk]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct RiskSettings {
    /// Horizons of the failure risk, 1 to 8, ascending, each 1 s to 24 h; default `["1m", "5m", "15m"]`. What a resource did
    /// for as long as the longest one is remembered. Short ones leave no time to act; long ones are guesses.
    #[serde(with = "duration_list")]
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

/// `[service.limits]`
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitSettings {
    /// Resident memory, in bytes, at which the service fails or is ended, above 0. Default: not known; then the host's
    /// memory is what runs out. Too low foretells failures that do not come; too high foretells none.
    pub memory_bytes: Option<u64>,
}

/// `[federation]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct FederationSettings {
    /// Whether a joined edge takes part. Default `true`; without `theriac-edge join` it is off in any case.
    pub enabled: bool,
    /// `HOST:PORT` of the aggregator. Default: what `join` was told.
    pub aggregator: Option<String>,
    /// Policy of the privacy budget, owned by compliance. Default: `privacy.toml` in the state directory; the first
    /// federated run writes one there when it is missing (ε = 4, δ = 1e-6, blocks of one hour) and signs it. Its `block` must be the
    /// announced rows of a block times `sampling.interval`, else the edge declines every round.
    pub privacy_policy: Option<PathBuf>,
    /// Public key of whoever answers for privacy (`thpk1_…`, printed by `privacy keygen`): only a policy with that signature is taken. Default:
    /// this edge's own key, `keys/policy.key`, with which it signs the first policy it writes; then nobody else vouches for it.
    pub policy_key: Option<PolicyPublicKey>,
    /// Takes published models but sends nothing. Default `false`.
    pub receive_only: bool,
    /// Says to the aggregator, when asked, whether a model that is not published yet forecasts this host's rows worse than the one in force. Default `false`. Only
    /// for an edge of those who run the aggregator: the answers depend on its rows, they are charged to no budget, and no guarantee covers them. They are
    /// asked for only where the aggregator's `rounds.validators` names this edge.
    pub validator: bool,
    /// First wait before a new attempt to connect, default `1s`, 50 ms to 1 min. Each attempt waits a random time that
    /// doubles up to `retry_max`. Too short floods a recovering aggregator.
    #[serde(with = "settings::duration")]
    pub retry_base: Duration,
    /// Longest wait between attempts, default `60s`, `retry_base` to 1 h. Too long stays away after a repair.
    #[serde(with = "settings::duration")]
    pub retry_max: Duration,
    /// Local gradient steps of a `delta` round, 1 to 1 000, default 20. More drift away from the shared model.
    pub local_steps: usize,
    /// Who draws the noise of a release, `"exact"` (default, 15 ns a value) or `"opendp"` (4 µs a value); the same distribution.
    pub noise: NoiseBackend,
}

/// Who draws the noise of a release. Both draw the same discrete Gaussian from the operating system's randomness.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum NoiseBackend {
    /// The exact sampler of `theriac-privacy`.
    #[default]
    Exact,
    /// `OpenDP`, a library with published proofs.
    OpenDp,
}

impl Default for FederationSettings {
    fn default() -> Self {
        Self {
            enabled: true,
            aggregator: None,
            privacy_policy: None,
            policy_key: None,
            receive_only: false,
            validator: false,
            retry_base: Duration::from_secs(1),
            retry_max: Duration::from_mins(1),
            local_steps: 20,
            noise: NoiseBackend::Exact,
        }
    }
}

/// `[healing_policy]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct HealingPolicySettings {
    /// A signed policy of what may be done to which service (docs/healing.md). Default: none; `[healing]` alone holds then. A
    /// relative path is one from the edge's working directory.
    pub file: Option<PathBuf>,
    /// Public keys (`thpk1_…`) whose signatures count. Default: none. Needed with `file`.
    pub keys: Vec<PolicyPublicKey>,
    /// So many different ones of `keys` must have signed, 1 to their number. Default 1.
    pub need: usize,
}

impl HealingPolicySettings {
    /// So many people have to sign before what stands against a service is lifted: as many as a policy, where there are keys; else 0, for the
    /// word of somebody at the host.
    pub fn lifted_by(&self) -> u32 {
        if self.keys.is_empty() {
            0
        } else {
            u32::try_from(self.need.max(1)).unwrap_or(u32::MAX)
        }
    }
}

impl Default for HealingPolicySettings {
    fn default() -> Self {
        Self {
            file: None,
            keys: Vec::new(),
            need: 1,
        }
    }
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

/// `[[service]]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceSettings {
    /// Name in incidents and metrics, same form as `node`, unique.
    pub name: String,
    /// Program and arguments; no shell. The program is an absolute path or is found on `PATH`.
    pub argv: Vec<String>,
    /// Environment, added to `PATH` and `HOME`; nothing else is handed on. Default empty.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Working directory. Default: the edge's own.
    pub cwd: Option<PathBuf>,
    /// Time between the polite stop (SIGTERM) and the hard one (SIGKILL). Default `2s`, range 0 to 10 min. A hung service
    /// costs all of it; too short cuts off a service that is saving its state.
    #[serde(default = "default_stop_grace", with = "settings::duration")]
    pub stop_grace: Duration,
    /// Leaves the service running when the edge ends; the next run takes it over. Default `false`: it is stopped.
    #[serde(default)]
    pub keep_running: bool,
    /// File that standard output and error are appended to, at most 16 MiB and one older file. Default: discarded.
    pub output: Option<PathBuf>,
    /// How the service is asked whether it is well. Without it only exits, stops and anomalies are seen.
    pub probe: Option<ProbeSettings>,
    /// The service's durable state: checked before each start, checkpointed, restored when corrupt. Optional.
    pub state: Option<StateSettings>,
    /// How that state becomes a checkpoint. Default: the directory is copied.
    pub checkpoint: Option<CheckpointSettings>,
    /// A program that is run for some classes of trouble, before anything else is done. Optional.
    pub hook: Option<HookSettings>,
    /// Who else is told of some classes of trouble, before that. Optional.
    pub webhook: Option<WebhookSettings>,
    /// What may be moved away when its disk is full. Optional.
    pub space: Option<SpaceSettings>,
    /// When the sessions of a PostgreSQL server are in trouble, and which may be touched. Without
    /// it they are looked at, and a person is told: none is touched.
    pub sessions: Option<SessionSettings>,
    /// What clients connect to instead of the service itself. Optional.
    pub proxy: Option<ProxySettings>,
    /// Groups of processes that may be bounded for its sake. Optional.
    pub cgroup: Option<CgroupSettings>,
    /// A unit that systemd runs for it. Optional.
    pub systemd: Option<SystemdSettings>,
    /// A deployment of Kubernetes beside it. Optional.
    pub kubernetes: Option<KubernetesSettings>,
    /// Names of the supervised services that this one calls. Default none. While one of them is down this one is not restarted for
    /// not answering, and `incidents why` says which to look at first. A missing name hides a cause, a wrong one blames a bystander.
    #[serde(default)]
    pub depends_on: Vec<String>,
    /// What the service must not use up; its failure risk is judged by it.
    #[serde(default)]
    pub limits: LimitSettings,
    /// What may be done to this service, where it differs from `[healing]`.
    #[serde(default)]
    pub healing: HealingSection,
}

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
    /// Valid checkpoints kept, 1 to 100, default 2.
    #[serde(default = "default_keep")]
    pub keep: usize,
    /// With fewer bytes free its file system counts as full. Default: 16 MiB, or a fiftieth of it where that is less; of more than an eighth of it an eighth counts. 0: only when not a block
    /// is left, for a volume that is meant to be nearly full all the time; nothing is done then before writes fail. Room is made until twice as
    /// much is free, of the greater of this and the default.
    #[serde(default)]
    pub free_bytes_min: Option<u64>,
}

/// `[service.hook]`: a program of the operator's own as an action.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct HookSettings {
    /// Classes for which it is run, before anything else is done. `dependency_down` cannot be one.
    #[serde(rename = "for")]
    pub classes: BTreeSet<FaultClass>,
    /// Program (an absolute path) and arguments; no shell.
    pub argv: Vec<String>,
    /// Its environment, beside `PATH` and `THERIAC_SERVICE`, `_INCIDENT`, `_INTENT`, `_REASON`. Default nothing.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Longest time; then it is killed with its process group. Default `30s`, 100 ms to 30 min; below `healing.action_timeout`.
    #[serde(default = "default_hook_timeout", with = "settings::duration")]
    pub timeout: Duration,
}

/// `[service.webhook]`: another system is told by a signed request.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct WebhookSettings {
    /// Classes of which it is told, before anything else is done. `dependency_down` cannot be one.
    #[serde(rename = "for")]
    pub classes: BTreeSet<FaultClass>,
    /// `http://HOST:PORT/PATH`.
    pub url: String,
    /// File with the secret that the receiver shares, at least 16 bytes, readable by this user only. Read at the start.
    pub secret_file: PathBuf,
    /// Longest time for one attempt. Default `5s`, 10 ms to 1 min.
    #[serde(default = "default_webhook_timeout", with = "settings::duration")]
    pub timeout: Duration,
    /// Most attempts, 1 to 10, default 3. With the pauses (0.5 s, doubling) they must end before `healing.action_timeout`.
    #[serde(default = "default_attempts")]
    pub attempts: u32,
}

fn default_hook_timeout() -> Duration {
    Duration::from_secs(30)
}

fn default_webhook_timeout() -> Duration {
    Duration::from_secs(5)
}

fn default_attempts() -> u32 {
    3
}

/// The first wrong value of the two: its key and what is wrong.
fn wrong_calls(
    hook: Option<&HookSettings>,
    webhook: Option<&WebhookSettings>,
) -> Option<(&'static str, String)> {
    let classes = |classes: &BTreeSet<FaultClass>| {
        if classes.is_empty() {
            Some("is empty: name the classes".to_owned())
        } else {
            let never = classes.contains(&FaultClass::DependencyDown);
            never.then(|| "dependency_down is the dependency's own trouble".to_owned())
        }
    };
    if let Some(hook) = hook {
        if let Some(words) = classes(&hook.classes) {
            return Some(("hook.for", words));
        }
        if !hook
            .argv
            .first()
            .is_some_and(|program| Path::new(program).is_absolute())
        {
            return Some((
                "hook.argv",
                "does not begin with the absolute path of a program".to_owned(),
            ));
        }
        if !(Duration::from_millis(100)..=Duration::from_mins(30)).contains(&hook.timeout) {
            return Some(("hook.timeout", "is outside 100ms to 30m".to_owned()));
        }
    }
    let webhook = webhook?;
    if let Some(words) = classes(&webhook.classes) {
        return Some(("webhook.for", words));
    }
    if let Err(error) = webhook.url.parse::<WebhookUrl>() {
        return Some(("webhook.url", error.to_string()));
    }
    if !(Duration::from_millis(10)..=Duration::from_mins(1)).contains(&webhook.timeout) {
        return Some(("webhook.timeout", "is outside 10ms to 1m".to_owned()));
    }
    (!(1..=10).contains(&webhook.attempts)).then(|| ("webhook.attempts", "is outside 1 to 10".to_owned()))
}

/// `[service.space]`: what makes room on the file system of `state.dir` when it is full.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SpaceSettings {
    /// Directories whose files can be made again: caches, rotated logs. Never in or above a service's state or the edge's `state_dir`,
    /// by whatever name, but for `log` and `pg_log` in this service's own.
    pub relieve: Vec<PathBuf>,
    /// Where they are moved to, on another file system; a directory for each service and action.
    pub quarantine: PathBuf,
    /// Files that were written less than this ago stay. Default `10m`, 0 s to 1 year.
    #[serde(default = "default_space_age", with = "settings::duration")]
    pub min_age: Duration,
}

impl SpaceSettings {
    fn wrong(&self, state: Option<&StateSettings>) -> Option<(&'static str, String)> {
        let Some(state) = state else {
            return Some((
                "space",
                "there is no [service.state]: its disk is the one that is watched".to_owned(),
            ));
        };
        if self.relieve.is_empty() {
            return Some(("space.relieve", "is empty: list a directory".to_owned()));
        }
        if self.min_age > Duration::from_hours(8_766) {
            return Some(("space.min_age", "is above 1 year".to_owned()));
        }
        // Of a server's data directory its log alone can be made again.
        let log = |path: &Path| path == state.dir.join("log") || path == state.dir.join("pg_log");
        let bad = self.relieve.iter().find(|path| {
            let inside = path.starts_with(&state.dir) && !log(path);
            let round = state.dir.starts_with(path) || self.quarantine.starts_with(path);
            !path.is_absolute() || inside || round || path.components().any(|part| part.as_os_str() == "..")
        });
        if let Some(bad) = bad {
            let words = format!(
                "{} is no absolute path apart from the state and the quarantine",
                bad.display()
            );
            return Some(("space.relieve", words));
        }
        (!self.quarantine.is_absolute() || self.quarantine.starts_with(&state.dir)).then(|| {
            (
                "space.quarantine",
                "is no absolute path apart from the state".to_owned(),
            )
        })
    }
}

fn default_space_age() -> Duration {
    Duration::from_mins(10)
}

fn default_stop_grace() -> Duration {
    Duration::from_secs(2)
}

fn default_probe_interval() -> Duration {
    Duration::from_millis(500)
}

fn default_loading_max() -> Duration {
    Duration::from_mins(10)
}

fn default_probe_timeout() -> Duration {
    Duration::from_secs(1)
}

fn default_check_timeout() -> Duration {
    Duration::from_secs(10)
}

fn default_start_grace() -> Duration {
    Duration::from_secs(10)
}

fn default_checkpoint_interval() -> Duration {
    Duration::from_mins(5)
}

fn default_verify_every() -> Duration {
    Duration::from_hours(24)
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

fn default_keep() -> usize {
    2
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

/// A checked service.
#[derive(Debug, Clone)]
pub struct ServiceConfig {
    /// Its name.
    pub name: NodeId,
    /// Program and arguments, at least the program.
    pub argv: Vec<String>,
    /// Environment.
    pub env: BTreeMap<String, String>,
    /// Working directory.
    pub cwd: Option<PathBuf>,
    /// Time between TERM and KILL.
    pub stop_grace: Duration,
    /// Whether it goes on when the edge ends.
    pub keep_running: bool,
    /// Where its output goes.
    pub output: Option<PathBuf>,
    /// What may be done to it.
    pub healing: HealPolicy,
    /// How it is probed.
    pub probe: Option<ProbeConfig>,
    /// Its durable state.
    pub state: Option<StateSettings>,
    /// How that becomes a checkpoint.
    pub checkpoint: Option<CheckpointSettings>,
    /// A program that is run for some classes of trouble.
    pub hook: Option<HookSettings>,
    /// Who else is told of some.
    pub webhook: Option<WebhookSettings>,
    /// What may be moved away when its disk is full.
    pub space: Option<SpaceSettings>,
    /// The other services' state directories, of which nothing is moved away for this one.
    pub other_states: Vec<PathBuf>,
    /// What its sessions may be touched for.
    pub sessions: Option<SessionSettings>,
    /// What stands before it.
    pub proxy: Option<ProxySettings>,
    /// Groups of processes that may be bounded for its sake.
    pub cgroup: Option<CgroupSettings>,
    /// A unit that systemd runs for it.
    pub systemd: Option<SystemdSettings>,
    /// A deployment of Kubernetes beside it.
    pub kubernetes: Option<KubernetesSettings>,
    /// Names of services that it calls, each one supervised here.
    pub depends_on: Vec<String>,
    /// Resident memory at which it fails, where that is known.
    pub memory_limit: Option<Limit>,
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
        check_sampling(&settings.sampling)?;
        check_detection(&settings.detection, &settings.sampling)?;
        let risk = check_risk(settings.risk, settings.sampling.interval)?;
        check_federation(&settings.federation)?;
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
        let services = check_services(settings.service, &settings.healing)?;
        check_space(&services, &state_dir.path)?;
        Ok(Self {
            node,
            state_dir,
            sampling: settings.sampling,
            detection: settings.detection,
            risk,
            federation: settings.federation,
            http: settings.http,
            healing_budget,
            healing_policy: check_policy(settings.healing_policy)?,
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

fn wrong(key: impl Into<String>, reason: impl std::fmt::Display) -> ConfigError {
    ConfigError::Value {
        key: key.into(),
        reason: reason.to_string(),
    }
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

fn check_sampling(sampling: &SamplingSettings) -> Result<(), ConfigError> {
    span(
        "sampling.interval",
        sampling.interval,
        Duration::from_millis(100),
        Duration::from_mins(1),
    )?;
    count("sampling.history_rows", sampling.history_rows, 600, 200_000)
}

fn check_detection(detection: &DetectionSettings, sampling: &SamplingSettings) -> Result<(), ConfigError> {
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

fn check_risk(mut risk: RiskSettings, interval: Duration) -> Result<RiskConfig, ConfigError> {
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

fn check_policy(policy: HealingPolicySettings) -> Result<HealingPolicySettings, ConfigError> {
    if policy.file.is_some() {
        if policy.keys.is_empty() {
            let text = "is empty: a policy file counts only with the signature of a key that is listed here";
            return Err(wrong("healing_policy.keys", text));
        }
        count("healing_policy.need", policy.need, 1, policy.keys.len())?;
    }
    for (at, key) in policy.keys.iter().enumerate() {
        if policy.keys[..at].contains(key) {
            return Err(wrong("healing_policy.keys", format!("{key} is there twice")));
        }
    }
    Ok(policy)
}

fn check_federation(federation: &FederationSettings) -> Result<(), ConfigError> {
    span(
        "federation.retry_base",
        federation.retry_base,
        Duration::from_millis(50),
        Duration::from_mins(1),
    )?;
    span(
        "federation.retry_max",
        federation.retry_max,
        federation.retry_base,
        Duration::from_hours(1),
    )?;
    count("federation.local_steps", federation.local_steps, 1, 1_000)?;
    match &federation.aggregator {
        Some(address) if host_and_port(address).is_none() => Err(wrong(
            "federation.aggregator",
            format!("`{address}` is not HOST:PORT, for example 10.0.0.5:9443"),
        )),
        _ => Ok(()),
    }
}

/// Splits `HOST:PORT`; an IPv6 address stands in brackets, which are taken off.
pub(crate) fn host_and_port(address: &str) -> Option<(String, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    let bare = host
        .strip_prefix('[')
        .map_or(Some(host), |rest| rest.strip_suffix(']'))?;
    if bare.is_empty() || (host == bare && host.contains(':')) {
        return None;
    }
    Some((bare.to_owned(), port.parse().ok().filter(|port| *port != 0)?))
}

fn check_services(
    settings: Vec<ServiceSettings>,
    healing: &HealingSection,
) -> Result<Vec<ServiceConfig>, ConfigError> {
    count("service", settings.len(), 0, 16)?;
    let mut services: Vec<ServiceConfig> = Vec::new();
    for service in settings {
        let service = check_service(service, healing)?;
        if services.iter().any(|other| other.name == service.name) {
            return Err(wrong("service.name", format!("`{}` is used twice", service.name)));
        }
        services.push(service);
    }
    check_dependencies(&services)?;
    proxy::check_all(&services)?;
    cgroup::check_all(&services)?;
    let states: Vec<Option<PathBuf>> = services
        .iter()
        .map(|service| service.state.as_ref().map(|state| state.dir.clone()))
        .collect();
    for (own, service) in services.iter_mut().enumerate() {
        let others = states.iter().enumerate().filter(|(other, _)| *other != own);
        service.other_states = others.filter_map(|(_, dir)| dir.clone()).collect();
    }
    Ok(services)
}

/// What may be moved away lies apart from every state and from what the edge keeps. By name alone: what links and mounts make of the
/// names is seen at the action ([`theriac_heal::executor::space`]).
fn check_space(services: &[ServiceConfig], state_dir: &Path) -> Result<(), ConfigError> {
    let full = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for service in services {
        let Some(space) = &service.space else { continue };
        let key = |field: &str| format!("service `{}`, space.{field}", service.name);
        let states = services
            .iter()
            .filter(|other| other.name != service.name)
            .filter_map(|other| {
                Some((
                    format!("state.dir of `{}`", other.name),
                    full(&other.state.as_ref()?.dir),
                ))
            });
        let states: Vec<(String, PathBuf)> = states.collect();
        let edge = ("the edge's state_dir".to_owned(), full(state_dir));
        for listed in &space.relieve {
            for (name, dir) in states.iter().chain([&edge]) {
                if listed.starts_with(dir) || dir.starts_with(listed) {
                    let words = format!(
                        "{} overlaps with {name}, {}: list directories whose files can be made again",
                        listed.display(),
                        dir.display()
                    );
                    return Err(wrong(key("relieve"), words));
                }
            }
        }
        if let Some((name, _)) = states.iter().find(|(_, dir)| space.quarantine.starts_with(dir)) {
            return Err(wrong(key("quarantine"), format!("lies in {name}")));
        }
    }
    Ok(())
}

/// An action that takes longer than `healing.action_timeout` would be handed to a person while it is still done.
fn check_call_times(
    hook: Option<&HookSettings>,
    webhook: Option<&WebhookSettings>,
    longest: Duration,
) -> Option<(&'static str, String)> {
    let text = humantime::format_duration;
    if let Some(hook) = hook
        && hook.timeout >= longest
    {
        let words = format!(
            "{} is not below healing.action_timeout ({})",
            text(hook.timeout),
            text(longest)
        );
        return Some(("hook.timeout", words));
    }
    let webhook = webhook?;
    let all = webhook::longest(webhook.timeout, webhook.attempts, crate::service::WEBHOOK_PAUSE);
    (all >= longest).then(|| {
        let words = format!(
            "all attempts and the pauses between them take up to {}, which is not below healing.action_timeout ({})",
            text(all),
            text(longest)
        );
        ("webhook.attempts", words)
    })
}

/// Circles are allowed: services may call each other.
fn check_dependencies(services: &[ServiceConfig]) -> Result<(), ConfigError> {
    for service in services {
        let own = service.name.as_str();
        for named in &service.depends_on {
            if named == own || !services.iter().any(|other| other.name.as_str() == named) {
                return Err(wrong(
                    format!("service `{own}`, depends_on"),
                    format!("`{named}` is no other [[service]] of this file: name supervised services only"),
                ));
            }
        }
    }
    Ok(())
}

fn check_service(service: ServiceSettings, above: &HealingSection) -> Result<ServiceConfig, ConfigError> {
    let key = |field: &str| format!("service `{}`, {field}", service.name);
    let name = service
        .name
        .parse::<NodeId>()
        .map_err(|error| wrong("service.name", error))?;
    if service.name == crate::HOST {
        return Err(wrong(
            "service.name",
            "`host` stands for the host itself: choose another name",
        ));
    }
    if service.argv.first().is_none_or(String::is_empty) {
        return Err(wrong(key("argv"), "is empty: name the program and its arguments"));
    }
    span(
        &key("stop_grace"),
        service.stop_grace,
        Duration::ZERO,
        Duration::from_mins(10),
    )?;
    let probe = service
        .probe
        .as_ref()
        .map(|probe| {
            span(
                &key("probe.interval"),
                probe.interval,
                Duration::from_millis(50),
                Duration::from_mins(1),
            )?;
            span(
                &key("probe.timeout"),
                probe.timeout,
                Duration::from_millis(10),
                Duration::from_mins(1),
            )?;
            span(
                &key("probe.start_grace"),
                probe.start_grace,
                Duration::ZERO,
                Duration::from_mins(10),
            )?;
            span(
                &key("probe.loading_max"),
                probe.loading_max,
                Duration::ZERO,
                Duration::from_hours(24),
            )?;
            let mut url = probe
                .url
                .parse()
                .map_err(|error| wrong(key("probe.url"), error))?;
            match (&mut url, &probe.password_file) {
                (Probe::Redis(server), file) => server.password_file.clone_from(file),
                (_, Some(_)) => {
                    let words = "is for a Redis server: the probe goes elsewhere";
                    return Err(wrong(key("probe.password_file"), words));
                }
                (_, None) => {}
            }
            Ok::<_, ConfigError>(ProbeConfig {
                url,
                loading_max: probe.loading_max,
                interval: probe.interval,
                timeout: probe.timeout,
                start_grace: probe.start_grace,
            })
        })
        .transpose()?;
    if let Some(state) = &service.state {
        if state.dir.as_os_str().is_empty() {
            return Err(wrong(key("state.dir"), "is empty: name the directory"));
        }
        span(
            &key("state.interval"),
            state.interval,
            Duration::from_secs(1),
            Duration::from_hours(168),
        )?;
        span(
            &key("state.min_gap"),
            state.min_gap,
            Duration::from_secs(1),
            Duration::from_hours(168),
        )?;
        span(
            &key("state.expected_mtbf"),
            state.expected_mtbf,
            Duration::from_mins(1),
            Duration::from_hours(8_766),
        )?;
        span(
            &key("state.verify_every"),
            state.verify_every,
            Duration::from_secs(1),
            Duration::from_hours(8_766),
        )?;
        if !(state.budget_pct > 0.0 && state.budget_pct <= 100.0) {
            let got = state.budget_pct;
            return Err(wrong(
                key("state.budget_pct"),
                format!("{got} is outside above 0 to 100"),
            ));
        }
        span(
            &key("state.check_timeout"),
            state.check_timeout,
            Duration::from_millis(10),
            Duration::from_mins(10),
        )?;
        count(&key("state.keep"), state.keep, 1, 100)?;
    }
    if let Some(checkpoint) = &service.checkpoint
        && let Some((field, reason)) = checkpoint.wrong(service.state.as_ref())
    {
        return Err(wrong(key(field), reason));
    }
    if let Some((field, reason)) = wrong_calls(service.hook.as_ref(), service.webhook.as_ref()) {
        return Err(wrong(key(field), reason));
    }
    if let Some(space) = &service.space
        && let Some((field, reason)) = space.wrong(service.state.as_ref())
    {
        return Err(wrong(key(field), reason));
    }
    if let Some(sessions) = &service.sessions
        && let Some((field, reason)) = sessions.wrong(service.checkpoint.as_ref())
    {
        return Err(wrong(key(field), reason));
    }
    let memory_limit = service
        .limits
        .memory_bytes
        .map(|bytes| Limit::new(bytes as f64).map_err(|error| wrong(key("limits.memory_bytes"), error)))
        .transpose()?;
    let mut healing = service
        .healing
        .over(above)
        .check()
        .map_err(|error| wrong(key("healing"), error))?;
    if let Some((field, reason)) = check_call_times(
        service.hook.as_ref(),
        service.webhook.as_ref(),
        healing.action_timeout,
    ) {
        return Err(wrong(key(field), reason));
    }
    healing.hook_for = service
        .hook
        .iter()
        .flat_map(|hook| hook.classes.clone())
        .collect();
    healing.webhook_for = service
        .webhook
        .iter()
        .flat_map(|webhook| webhook.classes.clone())
        .collect();
    healing.session_actions = service.sessions.is_some();
    healing.target_digests = targets::digests(&service);
    if let Some((field, reason)) = wrong_hands(&service, healing.action_timeout) {
        return Err(wrong(key(field), reason));
    }
    healing.configured = configured(&service);
    Ok(ServiceConfig {
        name,
        healing,
        argv: service.argv,
        env: service.env,
        cwd: service.cwd,
        stop_grace: service.stop_grace,
        keep_running: service.keep_running,
        output: service.output,
        probe,
        state: service.state,
        checkpoint: service.checkpoint,
        hook: service.hook,
        webhook: service.webhook,
        space: service.space,
        other_states: Vec::new(),
        sessions: service.sessions,
        proxy: service.proxy,
        cgroup: service.cgroup,
        systemd: service.systemd,
        kubernetes: service.kubernetes,
        depends_on: service.depends_on,
        memory_limit,
    })
}

fn wrong_hands(service: &ServiceSettings, action_timeout: Duration) -> Option<(&'static str, String)> {
    let proxy = service
        .proxy
        .as_ref()
        .and_then(|proxy| proxy.wrong(action_timeout));
    let (systemd, kubernetes) = (service.systemd.as_ref(), service.kubernetes.as_ref());
    proxy
        .or_else(|| service.cgroup.as_ref().and_then(CgroupSettings::wrong))
        .or_else(|| systemd.and_then(|systemd| systemd.wrong(action_timeout)))
        .or_else(|| kubernetes.and_then(|kubernetes| kubernetes.wrong(action_timeout)))
}

/// Actions that are configured for some classes, the gentlest first.
fn configured(service: &ServiceSettings) -> BTreeMap<FaultClass, Vec<ActionKind>> {
    let bounds = service.cgroup.as_ref().map(CgroupSettings::configured);
    let drain = service
        .proxy
        .as_ref()
        .map(|proxy| (ActionKind::Drain, proxy.drain_on.clone()));
    let units = service.systemd.as_ref().map(SystemdSettings::configured);
    let pods = service.kubernetes.as_ref().map(KubernetesSettings::configured);
    let mut rungs: BTreeMap<FaultClass, Vec<ActionKind>> = BTreeMap::new();
    let all = [bounds, units, pods].into_iter().flatten().flatten();
    for (action, classes) in all.chain(drain) {
        for class in classes {
            rungs.entry(class).or_default().push(action);
        }
    }
    rungs
}

/// `["3s", "12s"]`
mod duration_pair {
    use std::time::Duration;

    use serde::ser::SerializeTuple as _;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use theriac_command::settings;

    #[derive(Deserialize, Serialize)]
    struct Span(#[serde(with = "settings::duration")] Duration);

    pub(super) fn serialize<S: Serializer>(pair: &[Duration; 2], serializer: S) -> Result<S::Ok, S::Error> {
        let mut tuple = serializer.serialize_tuple(2)?;
        tuple.serialize_element(&Span(pair[0]))?;
        tuple.serialize_element(&Span(pair[1]))?;
        tuple.end()
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[Duration; 2], D::Error> {
        let [first, second] = <[Span; 2]>::deserialize(deserializer)?;
        Ok([first.0, second.0])
    }
}

/// `["1m", "5m"]`
mod duration_list {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use theriac_command::settings;

    #[derive(Deserialize, Serialize)]
    struct Span(#[serde(with = "settings::duration")] Duration);

    pub(super) fn serialize<S: Serializer>(list: &[Duration], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(list.iter().copied().map(Span))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Duration>, D::Error> {
        let list = Vec::<Span>::deserialize(deserializer)?;
        Ok(list.into_iter().map(|span| span.0).collect())
    }
}

/// A complete `edge.toml` with every key at its default or at a typical value.
pub fn example() -> &'static str {
    include_str!("../edge.example.toml")
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

    #[test]
    fn what_may_be_moved_away_lies_apart_from_the_state_and_the_quarantine() {
        let load = |space: &str| {
            let text = format!(
                "[[service]]\nname = 'kv'\nargv = ['true']\nstate = {{ dir = '/data/kv' }}\nspace = {{ {space} }}\n"
            );
            let settings: EdgeSettings = toml::from_str(&text).map_err(|error| error.to_string())?;
            EdgeConfig::check(settings, &|_| None).map_err(|error| error.to_string())
        };
        assert!(load("relieve = ['/data/cache', '/data/kv/log'], quarantine = '/spare/q'").is_ok());
        for (space, word) in [
            ("relieve = [], quarantine = '/q'", "space.relieve"),
            ("relieve = ['cache'], quarantine = '/q'", "space.relieve"),
            ("relieve = ['/data/kv/wal'], quarantine = '/q'", "space.relieve"),
            ("relieve = ['/data'], quarantine = '/q'", "space.relieve"),
            ("relieve = ['/a/../data/kv'], quarantine = '/q'", "space.relieve"),
            ("relieve = ['/q'], quarantine = '/q/below'", "space.relieve"),
            (
                "relieve = ['/data/cache'], quarantine = '/data/kv/q'",
                "space.quarantine",
            ),
            (
                "relieve = ['/data/cache'], quarantine = '/q', min_age = '9000h'",
                "space.min_age",
            ),
        ] {
            let error = load(space).unwrap_err();
            assert!(error.contains(word), "{space}: {error}");
        }
    }

    #[test]
    fn what_may_be_moved_away_lies_apart_from_other_states_and_from_what_the_edge_keeps() {
        let load = |space: &str| {
            let text = format!(
                "state_dir = '/var/lib/edge'\n\
                 [[service]]\nname = 'kv'\nargv = ['true']\nstate = {{ dir = '/data/kv' }}\nspace = {{ {space} }}\n\
                 [[service]]\nname = 'db'\nargv = ['true']\nstate = {{ dir = '/data/db' }}\n"
            );
            let settings: EdgeSettings = toml::from_str(&text).map_err(|error| error.to_string())?;
            EdgeConfig::check(settings, &|_| None).map_err(|error| error.to_string())
        };
        assert!(load("relieve = ['/var/cache', '/data/kv/log'], quarantine = '/spare'").is_ok());
        for (space, word) in [
            ("relieve = ['/var/lib/edge'], quarantine = '/q'", "state_dir"),
            (
                "relieve = ['/var/lib/edge/checkpoints'], quarantine = '/q'",
                "state_dir",
            ),
            ("relieve = ['/var'], quarantine = '/q'", "state_dir"),
            (
                "relieve = ['/var/cache', '/data/db/base'], quarantine = '/q'",
                "`db`",
            ),
            ("relieve = ['/data/db/log'], quarantine = '/q'", "`db`"),
            ("relieve = ['/var/cache'], quarantine = '/data/db/q'", "`db`"),
        ] {
            let error = load(space).unwrap_err();
            assert!(
                error.contains(word) && error.contains("space."),
                "{space}: {error}"
            );
        }
    }

    #[test]
    fn hooks_and_webhooks_end_before_the_action_is_given_up() {
        let load = |extra: &str| {
            let text = format!("[[service]]\nname = 'kv'\nargv = ['true']\n{extra}\n");
            let settings: EdgeSettings = toml::from_str(&text).map_err(|error| error.to_string())?;
            EdgeConfig::check(settings, &|_| None).map_err(|error| error.to_string())
        };
        let hook =
            |timeout: &str| format!("hook = {{ for = ['hang'], argv = ['/x'], timeout = '{timeout}' }}");
        let webhook = |timeout: &str, attempts: u32| {
            format!(
                "webhook = {{ for = ['hang'], url = 'http://a:1/', secret_file = '/s', timeout = '{timeout}', attempts = {attempts} }}"
            )
        };
        let short = "healing.action_timeout = '30s'\n";
        for good in [hook("100s"), webhook("20s", 3), format!("{short}{}", hook("29s"))] {
            load(&good).unwrap();
        }
        for (bad, word) in [
            (hook("2m"), "hook.timeout"),
            (format!("{short}{}", hook("30s")), "hook.timeout"),
            (webhook("1m", 2), "webhook.attempts"),
            // A second each, and 255 s of pauses.
            (webhook("1s", 10), "webhook.attempts"),
        ] {
            let error = load(&bad).unwrap_err();
            assert!(
                error.contains(word) && error.contains("action_timeout"),
                "{bad}: {error}"
            );
        }
    }

    #[test]
    fn hooks_name_their_classes_and_a_program_and_come_into_the_policy() {
        let load = |extra: &str| {
            let text = format!("[[service]]\nname = 'kv'\nargv = ['true']\n{extra}\n");
            let settings: EdgeSettings = toml::from_str(&text).map_err(|error| error.to_string())?;
            EdgeConfig::check(settings, &|_| None).map_err(|error| error.to_string())
        };
        let good = "hook = { for = ['hang', 'overload'], argv = ['/opt/x'] }\nwebhook = { for = ['unknown'], url = 'http://a:1/', secret_file = '/s' }";
        let policy = load(good).unwrap().services[0].healing.clone();
        assert!(policy.inhibits(FaultClass::Overload, ActionKind::Restart));
        assert!(!policy.inhibits(FaultClass::Overload, ActionKind::Hook));
        assert!(policy.webhook_for.contains(&FaultClass::Unknown));
        for (extra, word) in [
            ("hook = { for = [], argv = ['/x'] }", "hook.for"),
            ("hook = { for = ['dependency_down'], argv = ['/x'] }", "hook.for"),
            ("hook = { for = ['hang'], argv = ['x'] }", "hook.argv"),
            (
                "hook = { for = ['hang'], argv = ['/x'], timeout = '1h' }",
                "hook.timeout",
            ),
            ("hook = { for = ['hung'], argv = ['/x'] }", "hung"),
            (
                "webhook = { for = ['hang'], url = 'https://a/', secret_file = '/s' }",
                "webhook.url",
            ),
            (
                "webhook = { for = ['hang'], url = 'http://a:1/', secret_file = '/s', attempts = 0 }",
                "webhook.attempts",
            ),
        ] {
            let error = load(extra).unwrap_err();
            assert!(error.contains(word), "{extra}: {error}");
        }
    }

    #[test]
    fn addresses_are_split_or_refused() {
        assert_eq!(
            host_and_port("a.example:9443"),
            Some(("a.example".to_owned(), 9443))
        );
        assert_eq!(host_and_port("[::1]:9443"), Some(("::1".to_owned(), 9443)));
        for bad in ["", "a", "a:", ":1", "a:0", "::1:9443", "[::1:9443", "a:70000"] {
            assert_eq!(host_and_port(bad), None, "{bad}");
        }
    }
}
