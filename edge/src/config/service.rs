//! `[[service]]`: a supervised service, and how its parts fit together and with the others.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_command::settings;
use theriac_heal::policy::{HealPolicy, HealingSection};
use theriac_heal::types::{ActionKind, FaultClass};
use theriac_model::risk::exhaustion::Limit;
use theriac_protocol::units::NodeId;

use super::{
    CgroupSettings, ConfigError, HookSettings, KubernetesSettings, ProbeConfig, ProbeSettings, ProxySettings,
    SpaceSettings, StateSettings, SystemdSettings, WebhookSettings, calls, cgroup, count, proxy, span,
    targets, wrong,
};
use crate::postgres::{CheckpointSettings, SessionSettings};

/// `[[service]]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceSettings {
    /// Name in incidents and metrics, same form as `node`, unique.
    pub name: String,
    /// Program and arguments; no shell. The program is an absolute path or is found on `PATH`.
    pub argv: Vec<String>,
    /// Environment, added to the edge's own without what is for the edge alone (`AWS_…`, `THERIAC_…`, and the variables of `sd_notify`, `sd_watchdog_enabled` and `sd_listen_fds`).
    /// Default empty.
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

/// `[service.limits]`
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitSettings {
    /// Resident memory, in bytes, at which the service fails or is ended, above 0. Default: not known; then the host's
    /// memory is what runs out. Too low foretells failures that do not come; too high foretells none.
    pub memory_bytes: Option<u64>,
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

pub(super) fn check_all(
    settings: Vec<ServiceSettings>,
    healing: &HealingSection,
) -> Result<Vec<ServiceConfig>, ConfigError> {
    count("service", settings.len(), 0, 16)?;
    let mut services: Vec<ServiceConfig> = Vec::new();
    for service in settings {
        let service = check(service, healing)?;
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

fn check(service: ServiceSettings, above: &HealingSection) -> Result<ServiceConfig, ConfigError> {
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
        .map(|probe| probe.checked(&key))
        .transpose()?;
    if let Some(state) = &service.state {
        state.check_values(&key)?;
    }
    if let Some(checkpoint) = &service.checkpoint
        && let Some((field, reason)) = checkpoint.wrong(service.state.as_ref())
    {
        return Err(wrong(key(field), reason));
    }
    if let Some((field, reason)) = calls::wrong(service.hook.as_ref(), service.webhook.as_ref()) {
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
    if let Some((field, reason)) = calls::wrong_times(
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

/// In words, where stopping, and the state check before and after it, may not fit into the time of an action: a person is called then while it
/// goes on.
pub(crate) fn stops_too_slowly(service: &ServiceConfig) -> Option<String> {
    let longest = service.healing.action_timeout;
    let check = service
        .state
        .as_ref()
        .filter(|state| !state.check.is_empty())
        .map_or(Duration::ZERO, |state| 2 * state.check_timeout);
    let needed = service.stop_grace + check;
    (needed >= longest).then(|| {
        format!(
            "{}: a restart may take {} (stop_grace and twice state.check_timeout), which is not below healing.action_timeout ({})",
            service.name,
            humantime::format_duration(needed),
            humantime::format_duration(longest)
        )
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

fn default_stop_grace() -> Duration {
    Duration::from_secs(2)
}
