//! What is valid in a configuration and its policy, and is probably not what was meant: told by `check-config`, by `policy check` and at the
//! start of `run`.

use theriac_heal::policy::Autonomy;
use theriac_heal::types::ActionKind;

use crate::config::{ServiceConfig, stops_too_slowly};
use crate::room::asks_too_much;

/// Warnings about one service, in words. May wait for its file system.
pub(crate) fn of_service(service: &ServiceConfig, joined: bool) -> Vec<String> {
    let settings = [asks_too_much(service), stops_too_slowly(service)];
    let settings = settings.into_iter().flatten();
    settings.chain(of_policy(service, joined)).collect()
}

/// Those that come of the policy file. Asks no file system.
pub(crate) fn of_policy(service: &ServiceConfig, joined: bool) -> Vec<String> {
    let shared = if joined { None } else { shared_alone(service) };
    [
        without_hands(service),
        without_rule(service),
        restores_alone(service),
        shared,
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Actions that the policy file lists, and for which this configuration has no means: their rung is never stepped on.
fn without_hands(service: &ServiceConfig) -> Option<String> {
    let rules = service.healing.rules.as_ref()?;
    let missing: Vec<String> = rules
        .keys()
        .filter(|action| !has_hands(service, **action))
        .map(|action| format!("{action} (needs {})", section(*action)))
        .collect();
    (!missing.is_empty()).then(|| {
        format!(
            "{}: the policy lists what this configuration has no means for, so it is never done: {}",
            service.name,
            missing.join(", ")
        )
    })
}

/// Actions that are configured of their own, and that the policy file does not list for a service of which it lists others. One for which it lists
/// none is meant to be watched.
fn without_rule(service: &ServiceConfig) -> Option<String> {
    let rules = service.healing.rules.as_ref().filter(|rules| !rules.is_empty())?;
    let unlisted: Vec<&str> = ActionKind::ALL
        .into_iter()
        .filter(|action| is_configured_apart(*action) && has_hands(service, *action))
        .filter(|action| !rules.contains_key(action))
        .map(ActionKind::as_str)
        .collect();
    (!unlisted.is_empty()).then(|| {
        format!(
            "{}: configured, and not listed by the policy, so the node never does it by itself: {}",
            service.name,
            unlisted.join(", ")
        )
    })
}

/// A restore that the configuration would let the node do by itself.
fn restores_alone(service: &ServiceConfig) -> Option<String> {
    let policy = &service.healing;
    let asked = policy.rules.is_some() && policy.restore_autonomy == Autonomy::Act;
    asked.then(|| {
        format!(
            "{}: `restore_autonomy = \"act\"` counts for nothing under a policy file: a person approves each restore",
            service.name
        )
    })
}

/// Actions that need a slot of a fleet, where this node is in none.
fn shared_alone(service: &ServiceConfig) -> Option<String> {
    let rules = service.healing.rules.as_ref()?;
    let shared: Vec<&str> = rules
        .iter()
        .filter(|(_, rule)| rule.shared)
        .map(|(action, _)| action.as_str())
        .collect();
    (!shared.is_empty()).then(|| {
        format!(
            "{}: `shared` actions need a slot of the fleet, and this node never joined one, so each is a person's: {}",
            service.name,
            shared.join(", ")
        )
    })
}

fn has_hands(service: &ServiceConfig, action: ActionKind) -> bool {
    match action {
        ActionKind::Start | ActionKind::Restart => true,
        ActionKind::RestoreAndStart => service.state.is_some(),
        _ if is_of_sessions(action) => service.healing.session_actions,
        ActionKind::Webhook => service.webhook.is_some(),
        ActionKind::Hook => service.hook.is_some(),
        ActionKind::RelieveSpace => service.space.is_some(),
        _ => service
            .healing
            .configured
            .values()
            .any(|actions| actions.contains(&action)),
    }
}

/// Whether somebody wrote a section for it alone, which says that it is wanted. The section of a server's sessions has them looked at as well, and a
/// state is also restored by hand.
fn is_configured_apart(action: ActionKind) -> bool {
    !action.renews_process() && !is_of_sessions(action)
}

fn is_of_sessions(action: ActionKind) -> bool {
    matches!(
        action,
        ActionKind::CancelQuery
            | ActionKind::TerminateBlocker
            | ActionKind::EndIdleSessions
            | ActionKind::Reload
    )
}

/// Where its means are configured, for people.
fn section(action: ActionKind) -> &'static str {
    match action {
        ActionKind::RestoreAndStart => "[service.state]",
        _ if is_of_sessions(action) => "[service.sessions], which only PostgreSQL takes",
        ActionKind::Webhook => "[service.webhook]",
        ActionKind::Hook => "[service.hook]",
        ActionKind::RelieveSpace => "[service.space]",
        ActionKind::ThrottleCpu => "[service.cgroup] throttle_cpu",
        ActionKind::LimitMemory => "[service.cgroup] limit_memory",
        ActionKind::Freeze => "[service.cgroup] freeze",
        ActionKind::Drain => "[service.proxy] drain_on",
        ActionKind::RestartUnit => "[service.systemd] restart_on",
        ActionKind::ReloadUnit => "[service.systemd] reload_on",
        ActionKind::ResetFailedUnit => "[service.systemd] reset_failed_on",
        ActionKind::RolloutRestart => "[service.kubernetes] restart_on",
        ActionKind::ScaleUp => "[service.kubernetes] scale_up_on",
        ActionKind::RolloutUndo => "[service.kubernetes] undo_on",
        _ => UNKNOWN,
    }
}

/// For an action that a newer library has.
const UNKNOWN: &str = "a section of its own";

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use theriac_heal::policy::{ActionRule, RiskClass};

    use super::*;
    use crate::service::ServiceContext;

    fn service(root: &Path, sections: &str) -> ServiceConfig {
        let (context, _) = ServiceContext::for_test(root, sections);
        context.shared.config.clone()
    }

    fn rule(shared: bool) -> ActionRule {
        ActionRule {
            class: RiskClass::R3,
            autonomy: Autonomy::Act,
            cooldown: None,
            max: None,
            inhibit: std::collections::BTreeSet::new(),
            when: None,
            approvals: None,
            evidence: false,
            shared,
        }
    }

    #[test]
    fn a_bare_service_has_hands_for_its_process_alone_and_of_all_else_it_is_said_where_they_are_configured() {
        let root = tempfile::tempdir().unwrap();
        let mut bare = service(root.path(), "");
        assert_eq!(of_policy(&bare, false), [""; 0], "without a policy file");
        bare.healing.rules = Some(ActionKind::ALL.map(|action| (action, rule(false))).into());
        let [said] = of_policy(&bare, true).try_into().unwrap();
        for action in ActionKind::ALL {
            let own = matches!(action, ActionKind::Start | ActionKind::Restart);
            assert_eq!(has_hands(&bare, action), own, "{action}");
            assert_eq!(
                said.contains(&format!(" {action} (needs [service.")),
                !own,
                "{said}"
            );
            assert!(own || section(action) != UNKNOWN, "{action}");
        }
    }

    #[test]
    fn what_is_configured_and_not_listed_is_told_unless_the_policy_lists_nothing_for_the_service() {
        let root = tempfile::tempdir().unwrap();
        let at = root.path().display();
        let sections = format!(
            "[service.state]\ndir = '{at}/d'\n[service.hook]\nargv = ['/bin/true']\nfor = ['hang']\n\
             [service.space]\nrelieve = ['{at}/cache']\nquarantine = '{at}/aside'\n\
             [service.cgroup]\nfreeze = {{ group = 'batch', for = ['overload'] }}\n"
        );
        let mut service = service(root.path(), &sections);
        let mut says = |rules: &[ActionKind]| {
            service.healing.rules = Some(rules.iter().map(|action| (*action, rule(false))).collect());
            of_policy(&service, true)
        };
        let [said] = says(&[ActionKind::Start]).try_into().unwrap();
        assert!(said.ends_with("by itself: hook, relieve_space, freeze"), "{said}");
        let listed = [ActionKind::Hook, ActionKind::RelieveSpace, ActionKind::Freeze];
        assert_eq!(says(&listed), [""; 0]);
        assert_eq!(says(&[]), [""; 0]);
    }

    #[test]
    fn a_restore_by_itself_is_told_to_count_for_nothing_under_a_policy_file() {
        let root = tempfile::tempdir().unwrap();
        let mut service = service(root.path(), "[service.healing]\nrestore_autonomy = 'act'\n");
        assert_eq!(of_policy(&service, true), [""; 0]);
        service.healing.rules = Some(BTreeMap::new());
        let [said] = of_policy(&service, true).try_into().unwrap();
        assert!(said.ends_with("a person approves each restore"), "{said}");
    }

    #[test]
    fn a_shared_action_of_a_node_in_no_fleet_is_told() {
        let root = tempfile::tempdir().unwrap();
        let mut service = service(root.path(), "");
        service.healing.rules = Some(BTreeMap::from([(ActionKind::Restart, rule(true))]));
        let [said] = of_policy(&service, false).try_into().unwrap();
        assert!(said.ends_with("each is a person's: restart"), "{said}");
        assert_eq!(of_policy(&service, true), [""; 0]);
    }
}
