//! `[service.systemd]`: a unit that systemd runs for, or beside, a service. Needs a build with the feature `systemd`.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_command::settings;
use theriac_heal::executor::unit::UnitName;
use theriac_heal::types::{ActionKind, FaultClass};

use super::targets::digest;

/// `[service.systemd]`. At least one of the three lists names a class.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SystemdSettings {
    /// Its full name, such as `cache.service`. The only one that is ever touched for this service.
    pub unit: UnitName,
    /// Classes for which its failed state is reset, so that a later start is not refused by its start limit. That alone starts nothing. Default
    /// none.
    #[serde(default)]
    pub reset_failed_on: BTreeSet<FaultClass>,
    /// Classes for which it is reloaded. Default none.
    #[serde(default)]
    pub reload_on: BTreeSet<FaultClass>,
    /// Classes for which it is restarted. Default none.
    #[serde(default)]
    pub restart_on: BTreeSet<FaultClass>,
    /// Address of the bus. Default: the system's.
    pub bus: Option<String>,
    /// Longest time for one job. Default `30s`, 100 ms to 30 min, below `healing.action_timeout`.
    #[serde(default = "half_a_minute", with = "settings::duration")]
    pub timeout: Duration,
}

impl SystemdSettings {
    pub(super) fn wrong(&self, action_timeout: Duration) -> Option<(&'static str, String)> {
        if !cfg!(feature = "systemd") {
            let words = "this build has no systemd: build theriac-edge with --features systemd";
            return Some(("systemd", words.to_owned()));
        }
        let classes: BTreeSet<&FaultClass> = [&self.reset_failed_on, &self.reload_on, &self.restart_on]
            .into_iter()
            .flatten()
            .collect();
        if classes.is_empty() || classes.contains(&FaultClass::DependencyDown) {
            let words = "name a class in reset_failed_on, reload_on or restart_on, and never dependency_down";
            return Some(("systemd", words.to_owned()));
        }
        let range = Duration::from_millis(100)..=Duration::from_mins(30);
        (!range.contains(&self.timeout) || self.timeout >= action_timeout).then(|| {
            let words = "is outside 100ms to 30m, or not below healing.action_timeout";
            ("systemd.timeout", words.to_owned())
        })
    }

    /// The actions with the classes for which each is configured, the gentlest first.
    pub(super) fn configured(&self) -> Vec<(ActionKind, BTreeSet<FaultClass>)> {
        vec![
            (ActionKind::ResetFailedUnit, self.reset_failed_on.clone()),
            (ActionKind::ReloadUnit, self.reload_on.clone()),
            (ActionKind::RestartUnit, self.restart_on.clone()),
        ]
    }

    /// What each action is done to, for [`super::targets`].
    pub(super) fn targets(&self) -> Vec<(ActionKind, Option<String>)> {
        let of = digest(&(&self.unit, &self.bus));
        let listed = self
            .configured()
            .into_iter()
            .filter(|(_, classes)| !classes.is_empty());
        listed.map(|(action, _)| (action, of.clone())).collect()
    }

    /// The hands.
    #[cfg(feature = "systemd")]
    pub(crate) fn hands(&self) -> theriac_heal::executor::systemd::SystemdHands {
        use theriac_heal::executor::systemd::{Bus, SystemdHands};
        SystemdHands {
            bus: self.bus.clone().map_or(Bus::System, Bus::Address),
            unit: self.unit.clone(),
            timeout: self.timeout,
        }
    }
}

fn half_a_minute() -> Duration {
    Duration::from_secs(30)
}

#[cfg(test)]
mod tests {
    use super::super::tests::check_text;
    use super::*;

    fn text(more: &str) -> String {
        format!(
            "[[service]]\nname = 'kv'\nargv = ['true']\n[service.systemd]\nunit = 'cache.service'\n{more}\n"
        )
    }

    #[test]
    fn a_unit_is_touched_for_named_classes_by_builds_that_can() {
        let config = check_text(&text("restart_on = ['hang']\nreload_on = ['hang']"));
        if cfg!(feature = "systemd") {
            let rungs = [ActionKind::ReloadUnit, ActionKind::RestartUnit];
            assert_eq!(
                config.unwrap().services[0]
                    .healing
                    .configured_for(FaultClass::Hang),
                rungs
            );
            for bad in [
                "",
                "restart_on = ['dependency_down']",
                "restart_on = ['hang']\ntimeout = '1h'",
            ] {
                assert!(check_text(&text(bad)).is_err(), "{bad}");
            }
        } else {
            let error = config.unwrap_err().to_string();
            assert!(error.contains("--features systemd"), "{error}");
        }
        let escaped = text("restart_on = ['hang']").replace("cache.service", "a/b.service");
        assert!(
            check_text(&escaped)
                .unwrap_err()
                .to_string()
                .contains("no name of a unit")
        );
    }
}
