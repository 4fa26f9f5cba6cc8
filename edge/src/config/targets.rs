//! Digests of what people configured an action to be: a record of what another one did says nothing of this one.

use std::collections::BTreeMap;

use serde::Serialize;
use theriac_heal::policy::evaluate::line_digest;
use theriac_heal::types::ActionKind;

use super::ServiceSettings;

/// By action, for what is configured: a hook's program and environment, a webhook's address, a bound's group, value and time, a drain's
/// upstream and times, a unit and its bus, a deployment and its server. Not for which classes: that says when, not what.
pub(super) fn digests(service: &ServiceSettings) -> BTreeMap<ActionKind, String> {
    let hook = service.hook.as_ref().map(|hook| (&hook.argv, &hook.env));
    let webhook = service.webhook.as_ref().map(|webhook| &webhook.url);
    let calls = [
        (ActionKind::Hook, hook.and_then(|hook| digest(&hook))),
        (ActionKind::Webhook, webhook.and_then(digest)),
        (
            ActionKind::Drain,
            service.proxy.as_ref().and_then(super::ProxySettings::target),
        ),
    ];
    let bounds = service.cgroup.as_ref().map(super::CgroupSettings::targets);
    let units = service.systemd.as_ref().map(super::SystemdSettings::targets);
    let pods = service
        .kubernetes
        .as_ref()
        .map(super::KubernetesSettings::targets);
    let others = [bounds, units, pods].into_iter().flatten().flatten();
    calls
        .into_iter()
        .chain(others)
        .filter_map(|(action, digest)| Some((action, digest?)))
        .collect()
}

/// Of the JSON of it.
pub(super) fn digest(what: &(impl Serialize + ?Sized)) -> Option<String> {
    // Strings, numbers and lists always serialise.
    Some(line_digest(&serde_json::to_vec(what).ok()?))
}

#[cfg(test)]
mod tests {
    use theriac_heal::policy::NodeBudget;
    use theriac_heal::policy::evaluate;

    use super::super::tests::check_text;
    use super::*;

    const TEXT: &str = "name = 'kv'\nargv = ['true']\n\
        [proxy]\nlisten = '127.0.0.1:8080'\nupstream = '127.0.0.1:8081'\ndrain_on = ['overload']\n\
        [cgroup.throttle_cpu]\ngroup = 'batch'\nfor = ['hang']\npercent = 20\n\
        [cgroup.limit_memory]\ngroup = 'batch'\nfor = ['hang']\nbytes = 67108864\n\
        [cgroup.freeze]\ngroup = 'batch'\nfor = ['hang']\n\
        [systemd]\nunit = 'cache.service'\nreload_on = ['hang']\nrestart_on = ['hang']\n\
        [kubernetes]\nnamespace = 'shop'\ndeployment = 'web'\nscale_up_on = ['overload']\nundo_on = ['hang']\nreplicas_max = 5\n";

    fn of(text: &str) -> BTreeMap<ActionKind, String> {
        digests(&toml::from_str(text).unwrap())
    }

    #[test]
    fn another_target_is_another_digest_and_another_occasion_is_not() {
        let before = of(TEXT);
        let units = vec![ActionKind::RestartUnit, ActionKind::ReloadUnit];
        let pods = vec![ActionKind::ScaleUp, ActionKind::RolloutUndo];
        for (was, is, changed) in [
            (":8081", ":8082", vec![ActionKind::Drain]),
            ("percent = 20", "percent = 30", vec![ActionKind::ThrottleCpu]),
            ("67108864", "1048576", vec![ActionKind::LimitMemory]),
            (
                "freeze]\ngroup = 'batch'",
                "freeze]\ngroup = 'others'",
                vec![ActionKind::Freeze],
            ),
            ("cache.service", "postgresql.service", units),
            ("'web'", "'db'", pods.clone()),
            ("'shop'", "'other'", pods),
            (
                "replicas_max = 5",
                "replicas_max = 500",
                vec![ActionKind::ScaleUp],
            ),
            ("for = ['hang']", "for = ['overload']", Vec::new()),
        ] {
            assert!(TEXT.contains(was), "{was}");
            let mut found: Vec<ActionKind> = Vec::new();
            let after = of(&TEXT.replace(was, is));
            assert!(before.keys().eq(after.keys()), "{was}");
            found.extend(before.keys().filter(|action| before[action] != after[action]));
            let mut changed = changed;
            changed.sort_unstable();
            assert_eq!(found, changed, "{was}");
        }
    }

    #[test]
    fn the_digest_of_the_policies_tells_one_target_from_another() {
        let policy = |group: &str| {
            let text = format!(
                "[[service]]\nname = 'kv'\nargv = ['true']\n[service.cgroup]\nfreeze = {{ group = '{group}', for = ['hang'] }}\n"
            );
            let config = check_text(&text).unwrap();
            let services: Vec<_> = config
                .services
                .iter()
                .map(|service| (service.name.to_string(), service.healing.clone()))
                .collect();
            let policies = services.iter().map(|(name, policy)| (name, policy));
            evaluate::digest(policies, NodeBudget::default())
        };
        assert_eq!(policy("batch"), policy("batch"));
        assert_ne!(policy("batch"), policy("others"));
    }
}
