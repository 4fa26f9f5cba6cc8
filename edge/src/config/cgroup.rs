//! `[service.cgroup]`: groups of processes that may be bounded for a service's sake.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_command::settings;
use theriac_heal::executor::cgroup::{Bound, CgroupHands, Change, Gate, GroupName, Hierarchies};
use theriac_heal::types::{ActionKind, FaultClass};

use super::targets::digest;
use super::{ServiceConfig, wrong};
use crate::config::ConfigError;

/// `[service.cgroup]`. Names of groups are below the controllers' roots (`/sys/fs/cgroup/cpu`, or `/sys/fs/cgroup`).
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct CgroupSettings {
    /// The group in which this service's processes are put when it starts, made where it is missing. Default: they stay where the edge is.
    pub place: Option<GroupName>,
    /// Processor time of one group, such as a batch job's.
    pub throttle_cpu: Option<ThrottleSettings>,
    /// Memory of one group.
    pub limit_memory: Option<MemorySettings>,
    /// A group that is stopped for a while, with those below it. Never one that holds this service or another of the file.
    pub freeze: Option<FreezeSettings>,
}

/// `[service.cgroup] throttle_cpu`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ThrottleSettings {
    /// Which group.
    pub group: GroupName,
    /// Classes of this service's trouble for which it is done. `dependency_down` cannot be one.
    #[serde(rename = "for")]
    pub classes: BTreeSet<FaultClass>,
    /// Per cent of one processor, 1 to 6 400. Too low starves the group, which may hold a lock that others wait for.
    pub percent: u32,
    /// For how long, 1 s to 24 h, default `2m`.
    #[serde(default = "lasts", with = "settings::duration")]
    pub lasts: Duration,
}

/// `[service.cgroup] limit_memory`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MemorySettings {
    /// Which group.
    pub group: GroupName,
    /// As above.
    #[serde(rename = "for")]
    pub classes: BTreeSet<FaultClass>,
    /// Bytes, at least 1 MiB. Below what the group has and the kernel cannot reclaim, version 1 refuses it and version 2 kills in the group.
    pub bytes: u64,
    /// For how long, 1 s to 24 h, default `2m`.
    #[serde(default = "lasts", with = "settings::duration")]
    pub lasts: Duration,
}

/// `[service.cgroup] freeze`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FreezeSettings {
    /// Which group.
    pub group: GroupName,
    /// As above.
    #[serde(rename = "for")]
    pub classes: BTreeSet<FaultClass>,
    /// For how long, 1 s to 24 h, default `2m`.
    #[serde(default = "lasts", with = "settings::duration")]
    pub lasts: Duration,
}

/// One action as the file has it.
struct Listed<'a> {
    key: &'static str,
    action: ActionKind,
    group: &'a GroupName,
    classes: &'a BTreeSet<FaultClass>,
    change: Change,
    lasts: Duration,
}

impl CgroupSettings {
    fn listed(&self) -> Vec<Listed<'_>> {
        let throttle = self.throttle_cpu.as_ref().map(|of| Listed {
            key: "cgroup.throttle_cpu",
            action: ActionKind::ThrottleCpu,
            group: &of.group,
            classes: &of.classes,
            change: Change::CpuPercent(of.percent),
            lasts: of.lasts,
        });
        let memory = self.limit_memory.as_ref().map(|of| Listed {
            key: "cgroup.limit_memory",
            action: ActionKind::LimitMemory,
            group: &of.group,
            classes: &of.classes,
            change: Change::MemoryBytes(of.bytes),
            lasts: of.lasts,
        });
        let freeze = self.freeze.as_ref().map(|of| Listed {
            key: "cgroup.freeze",
            action: ActionKind::Freeze,
            group: &of.group,
            classes: &of.classes,
            change: Change::Freeze,
            lasts: of.lasts,
        });
        [throttle, memory, freeze].into_iter().flatten().collect()
    }

    pub(super) fn wrong(&self) -> Option<(&'static str, String)> {
        let day = Duration::from_hours(24);
        for listed in self.listed() {
            if listed.classes.is_empty() || listed.classes.contains(&FaultClass::DependencyDown) {
                let words = "`for` names no class, or dependency_down, which is the dependency's own trouble";
                return Some((listed.key, words.to_owned()));
            }
            if !(Duration::from_secs(1)..=day).contains(&listed.lasts) {
                return Some((listed.key, "`lasts` is outside 1s to 24h".to_owned()));
            }
            let range = match listed.change {
                Change::CpuPercent(percent) if !(1..=6_400).contains(&percent) => {
                    "`percent` is outside 1 to 6400"
                }
                Change::MemoryBytes(bytes) if bytes < 1 << 20 => "`bytes` is below 1048576",
                Change::Freeze if self.place.as_ref().is_some_and(|own| listed.group.holds(own)) => {
                    "`group` is the service's own, or one above it: a frozen service does not answer"
                }
                _ => continue,
            };
            return Some((listed.key, range.to_owned()));
        }
        None
    }

    /// The actions with the classes for which each is configured, cheapest first.
    pub(super) fn configured(&self) -> Vec<(ActionKind, BTreeSet<FaultClass>)> {
        self.listed()
            .iter()
            .map(|listed| (listed.action, listed.classes.clone()))
            .collect()
    }

    /// What each action is done to and how, for [`super::targets`].
    pub(super) fn targets(&self) -> Vec<(ActionKind, Option<String>)> {
        let listed = self.listed();
        let targets = listed.iter().map(|listed| {
            let number = match listed.change {
                Change::CpuPercent(percent) => u64::from(percent),
                Change::MemoryBytes(bytes) => bytes,
                Change::Freeze => 0,
            };
            (listed.action, digest(&(listed.group, number, listed.lasts)))
        });
        targets.collect()
    }

    /// The hands, with what they are to undo at `record`.
    pub(crate) fn hands(&self, at: Hierarchies, record: PathBuf) -> CgroupHands {
        let bounds = self.listed().into_iter().map(|listed| {
            let bound = Bound {
                group: listed.group.clone(),
                change: listed.change,
                lasts: listed.lasts,
            };
            (listed.action, bound)
        });
        CgroupHands {
            at,
            place: self.place.clone(),
            bounds: bounds.collect(),
            record,
            gate: Gate::default(),
        }
    }
}

/// A group, with those below it, is bounded in one way for one service alone: else one's bound would end with the other's. And nobody's
/// process is frozen that another section supervises: it would be found hung.
pub(super) fn check_all(services: &[ServiceConfig]) -> Result<(), ConfigError> {
    let mut seen: Vec<(ActionKind, &GroupName, &str)> = Vec::new();
    for service in services {
        let Some(cgroup) = &service.cgroup else { continue };
        let own = service.name.as_str();
        for listed in cgroup.listed() {
            let refused = |words| Err(wrong(format!("service `{own}`, {}", listed.key), words));
            let group = listed.group;
            for (action, other, by) in &seen {
                if *action == listed.action && *by != own && (group.holds(other) || other.holds(group)) {
                    return refused(format!("`{group}` is bounded so for `{by}` already"));
                }
            }
            for other in services.iter().filter(|_| listed.change == Change::Freeze) {
                let place = other.cgroup.as_ref().and_then(|cgroup| cgroup.place.as_ref());
                if place.is_some_and(|place| group.holds(place)) {
                    return refused(format!("`{group}` holds the service `{}`", other.name));
                }
            }
            seen.push((listed.action, group, own));
        }
    }
    Ok(())
}

fn lasts() -> Duration {
    Duration::from_mins(2)
}

#[cfg(test)]
mod tests {
    use super::super::tests::check_text;
    use super::*;

    fn text(name: &str, more: &str) -> String {
        format!(
            "[[service]]\nname = '{name}'\nargv = ['true']\n[service.cgroup]\nplace = 'theriac/{name}'\n{more}\n"
        )
    }

    const FREEZE: &str = "freeze = { group = 'batch', for = ['disk_slow', 'overload'], lasts = '30s' }";
    const THROTTLE: &str = "throttle_cpu = { group = 'batch', for = ['disk_slow'], percent = 20 }";

    #[test]
    fn what_is_listed_becomes_rungs_the_gentlest_first() {
        let config = check_text(&text("kv", &format!("{FREEZE}\n{THROTTLE}"))).unwrap();
        let healing = &config.services[0].healing;
        let rungs = healing.configured_for(FaultClass::DiskSlow);
        assert_eq!(rungs, [ActionKind::ThrottleCpu, ActionKind::Freeze]);
        assert_eq!(healing.configured_for(FaultClass::Overload), [ActionKind::Freeze]);
    }

    #[test]
    fn what_could_harm_is_refused_by_name() {
        for (more, named) in [
            (
                "freeze = { group = 'theriac/kv', for = ['hang'] }",
                "cgroup.freeze",
            ),
            ("freeze = { group = 'theriac', for = ['hang'] }", "one above it"),
            (
                "freeze = { group = '../batch', for = ['hang'] }",
                "no name of a group",
            ),
            ("freeze = { group = 'batch', for = [] }", "cgroup.freeze"),
            (
                "freeze = { group = 'batch', for = ['dependency_down'] }",
                "cgroup.freeze",
            ),
            (
                "throttle_cpu = { group = 'batch', for = ['hang'], percent = 0 }",
                "cgroup.throttle_cpu",
            ),
            (
                "limit_memory = { group = 'batch', for = ['hang'], bytes = 5 }",
                "cgroup.limit_memory",
            ),
            (
                "freeze = { group = 'batch', for = ['hang'], lasts = '2days' }",
                "cgroup.freeze",
            ),
        ] {
            let error = check_text(&text("kv", more)).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
        let twice = text("kv", FREEZE) + &text("web", FREEZE);
        assert!(
            check_text(&twice)
                .unwrap_err()
                .to_string()
                .contains("for `kv` already")
        );
        let below = text("kv", FREEZE) + &text("web", &FREEZE.replace("'batch'", "'batch/jobs'"));
        let error = check_text(&below).unwrap_err().to_string();
        assert!(error.contains("for `kv` already"), "{error}");
        let neighbour = text("kv", &FREEZE.replace("'batch'", "'theriac/web'")) + &text("web", "");
        let error = check_text(&neighbour).unwrap_err().to_string();
        assert!(error.contains("holds the service `web`"), "{error}");
    }
}
