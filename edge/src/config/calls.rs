//! `[service.hook]` and `[service.webhook]`: what is called for some classes of trouble, before anything else is done.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_command::settings;
use theriac_heal::executor::webhook::{self, WebhookUrl};
use theriac_heal::types::FaultClass;

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

/// The first wrong value of the two: its key and what is wrong.
pub(super) fn wrong(
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

/// An action that takes longer than `healing.action_timeout` would be handed to a person while it is still done.
pub(super) fn wrong_times(
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

fn default_hook_timeout() -> Duration {
    Duration::from_secs(30)
}

fn default_webhook_timeout() -> Duration {
    Duration::from_secs(5)
}

fn default_attempts() -> u32 {
    3
}

#[cfg(test)]
mod tests {
    use theriac_heal::types::{ActionKind, FaultClass};

    use super::super::{EdgeConfig, EdgeSettings};

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
}
