//! What holds in a configuration and its policy, and is yet not as it was meant: told by `check-config`, by `policy check` and at the
//! start of `run`.

use theriac_heal::types::ActionKind;

use crate::config::{ServiceConfig, stops_too_slowly};
use crate::room::asks_too_much;

/// Warnings about one service, in words.
pub(crate) fn of_service(service: &ServiceConfig) -> Vec<String> {
    let settings = [asks_too_much(service), stops_too_slowly(service)];
    settings
        .into_iter()
        .flatten()
        .chain(without_hands(service))
        .chain(without_rule(service))
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

/// Actions that are configured of their own, and that the policy file does not list.
fn without_rule(service: &ServiceConfig) -> Option<String> {
    let rules = service.healing.rules.as_ref()?;
    let unlisted: Vec<&str> = ActionKind::ALL
        .into_iter()
        .filter(|action| is_configured_apart(*action) && has_hands(service, *action))
        .filter(|action| !rules.contains_key(action))
        .map(ActionKind::as_str)
        .collect();
    (!unlisted.is_empty()).then(|| {
        format!(
            "{}: configured, and not listed by the policy, so it is never done: {}",
            service.name,
            unlisted.join(", ")
        )
    })
}

fn has_hands(service: &ServiceConfig, action: ActionKind) -> bool {
    match action {
        ActionKind::Start | ActionKind::Restart => true,
        ActionKind::RestoreAndStart => service.state.is_some(),
        ActionKind::CancelQuery
        | ActionKind::TerminateBlocker
        | ActionKind::EndIdleSessions
        | ActionKind::Reload => service.healing.session_actions,
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

/// Whether somebody wrote a section for it, which says that it is wanted. A server's sessions are looked at by the same section that allows
/// to act on them, and a state is restored from by hand as well.
fn is_configured_apart(action: ActionKind) -> bool {
    !matches!(section(action), "argv" | "[service.state]" | "[service.sessions]")
}

/// Where the configuration of an action is.
fn section(action: ActionKind) -> &'static str {
    match action {
        ActionKind::Start | ActionKind::Restart => "argv",
        ActionKind::RestoreAndStart => "[service.state]",
        ActionKind::CancelQuery
        | ActionKind::TerminateBlocker
        | ActionKind::EndIdleSessions
        | ActionKind::Reload => "[service.sessions]",
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
        _ => "a section of its own",
    }
}
