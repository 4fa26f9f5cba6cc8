//! `[service.proxy]`: what stands before a service.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_command::settings;
use theriac_heal::executor::proxy::{Mode, ProxySpec};
use theriac_heal::types::FaultClass;

use super::targets::digest;
use super::{ServiceConfig, wrong};
use crate::config::ConfigError;

/// `[service.proxy]`: clients connect to `listen`, and the edge passes on to the service. While the edge is down nobody answers there.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ProxySettings {
    /// Address for clients. Port 0 takes a free one, which `/status` shows.
    pub listen: SocketAddr,
    /// Address of the service. Its probe goes there directly, never through the proxy.
    pub upstream: SocketAddr,
    /// What is passed on. Default `http`: requests. `tcp`: connections, for everything else (upgrades, TLS, databases).
    #[serde(default)]
    pub mode: ProxyMode,
    /// Most clients' connections at once, 1 to 10 000, default 256; one more is told to come later. Each may hold 128 KiB.
    #[serde(default = "connections_max")]
    pub connections_max: usize,
    /// Longest time to connect. Default `1s`, 10 ms to 1 min. Too short fails a busy service.
    #[serde(default = "second", with = "settings::duration")]
    pub connect_timeout: Duration,
    /// Longest time for a request's body to arrive, and from its end to the head of the answer. Default `30s`, 10 ms to 1 h. Too short cuts
    /// off honest work; too long lets a hung service keep its clients.
    #[serde(default = "response_timeout", with = "settings::duration")]
    pub response_timeout: Duration,
    /// Longest time for a request's head, and between two requests of a connection. Default `10s`, 10 ms to 10 min.
    #[serde(default = "ten_seconds", with = "settings::duration")]
    pub header_timeout: Duration,
    /// Longest silence of either end. Default `2m`, longer than `response_timeout`, up to 24 h.
    #[serde(default = "idle_timeout", with = "settings::duration")]
    pub idle_timeout: Duration,
    /// Longest time that a request waits while the service restarts, however often it does. Default `5s`, 0 s to 1 min: 0 s holds nobody. Too long: clients give up
    /// first and ask again.
    #[serde(default = "hold", with = "settings::duration")]
    pub hold: Duration,
    /// Failures in a row after which the service is not asked. Default 5, 1 to 1 000. A failed probe counts as one.
    #[serde(default = "failures")]
    pub failures: u32,
    /// For how long it is not, before one request finds out. Default `2s`, 10 ms to 10 min. A probe that is answered well ends it.
    #[serde(default = "open_for", with = "settings::duration")]
    pub open_for: Duration,
    /// Retries in per cent of requests, 0 to 10, default 10: `GET` and `HEAD` once more, and whatever was refused before anything was sent.
    #[serde(default = "retry_percent")]
    pub retry_percent: u32,
    /// Classes for which the service is drained. Default none. `dependency_down` cannot be one.
    #[serde(default)]
    pub drain_on: BTreeSet<FaultClass>,
    /// Longest time that a drain waits for what is in hand. Default `10s`, 0 s to 10 min, below `healing.action_timeout`.
    #[serde(default = "ten_seconds", with = "settings::duration")]
    pub drain_timeout: Duration,
    /// How long new requests are turned away after that. Default `10s`, 100 ms to 1 h.
    #[serde(default = "ten_seconds", with = "settings::duration")]
    pub drain_lasts: Duration,
}

/// See [`ProxySettings::mode`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ProxyMode {
    /// HTTP/1.
    #[default]
    Http,
    /// Anything.
    Tcp,
}

impl ProxySettings {
    /// One with the defaults for everything else: requests, held for 5 s while the service restarts.
    pub fn between(listen: SocketAddr, upstream: SocketAddr) -> Self {
        Self {
            listen,
            upstream,
            mode: ProxyMode::Http,
            connections_max: connections_max(),
            connect_timeout: second(),
            response_timeout: response_timeout(),
            header_timeout: ten_seconds(),
            idle_timeout: idle_timeout(),
            hold: hold(),
            failures: failures(),
            open_for: open_for(),
            retry_percent: retry_percent(),
            drain_on: BTreeSet::new(),
            drain_timeout: ten_seconds(),
            drain_lasts: ten_seconds(),
        }
    }

    /// What is wrong: the key and why.
    pub(super) fn wrong(&self, action_timeout: Duration) -> Option<(&'static str, String)> {
        let (ms, s, minute) = (Duration::from_millis, Duration::from_secs, Duration::from_mins(1));
        let spans = [
            ("proxy.connect_timeout", self.connect_timeout, ms(10), minute),
            (
                "proxy.response_timeout",
                self.response_timeout,
                ms(10),
                60 * minute,
            ),
            ("proxy.header_timeout", self.header_timeout, ms(10), 10 * minute),
            ("proxy.idle_timeout", self.idle_timeout, ms(10), 1_440 * minute),
            ("proxy.hold", self.hold, s(0), minute),
            ("proxy.open_for", self.open_for, ms(10), 10 * minute),
            ("proxy.drain_timeout", self.drain_timeout, s(0), 10 * minute),
            ("proxy.drain_lasts", self.drain_lasts, ms(100), 60 * minute),
        ];
        let text = humantime::format_duration;
        for (key, got, low, high) in spans {
            if !(low..=high).contains(&got) {
                return Some((
                    key,
                    format!("{} is outside {} to {}", text(got), text(low), text(high)),
                ));
            }
        }
        if self.idle_timeout <= self.response_timeout {
            let words = "is not longer than response_timeout: a client that waits would be cut off";
            return Some(("proxy.idle_timeout", words.to_owned()));
        }
        if self.drain_timeout >= action_timeout {
            let words = format!(
                "{} is not below healing.action_timeout ({})",
                text(self.drain_timeout),
                text(action_timeout)
            );
            return Some(("proxy.drain_timeout", words));
        }
        if !(1..=10_000).contains(&self.connections_max) {
            return Some(("proxy.connections_max", "is outside 1 to 10000".to_owned()));
        }
        if !(1..=1_000).contains(&self.failures) {
            return Some(("proxy.failures", "is outside 1 to 1000".to_owned()));
        }
        if self.retry_percent > 10 {
            return Some(("proxy.retry_percent", "is outside 0 to 10".to_owned()));
        }
        if self.upstream.port() == 0 || self.upstream == self.listen {
            let words = "is no address of the service: it needs a port, and another than listen";
            return Some(("proxy.upstream", words.to_owned()));
        }
        let never = self.drain_on.contains(&FaultClass::DependencyDown);
        never.then(|| {
            let words = "dependency_down is the dependency's own trouble";
            ("proxy.drain_on", words.to_owned())
        })
    }

    /// What a drain is done to and how, for [`super::targets`].
    pub(super) fn target(&self) -> Option<String> {
        let of = (self.upstream, self.drain_timeout, self.drain_lasts);
        (!self.drain_on.is_empty()).then(|| digest(&of))?
    }

    /// As the proxy takes it.
    pub(crate) fn spec(&self) -> ProxySpec {
        ProxySpec {
            mode: match self.mode {
                ProxyMode::Http => Mode::Http,
                ProxyMode::Tcp => Mode::Tcp,
            },
            upstream: self.upstream,
            connections_max: self.connections_max,
            connect_timeout: self.connect_timeout,
            response_timeout: self.response_timeout,
            header_timeout: self.header_timeout,
            idle_timeout: self.idle_timeout,
            hold: self.hold,
            drain_timeout: self.drain_timeout,
            drain_for: self.drain_lasts,
            failures_max: self.failures,
            open_for: self.open_for,
            retry_percent: self.retry_percent,
        }
    }
}

/// No two proxies want one address, and none passes on to another.
pub(super) fn check_all(services: &[ServiceConfig]) -> Result<(), ConfigError> {
    for (at, service) in services.iter().enumerate() {
        let Some(proxy) = &service.proxy else { continue };
        let key = |field: &str| format!("service `{}`, proxy.{field}", service.name);
        let others = services.iter().enumerate().filter(|(other, _)| *other != at);
        for (other, settings) in others.filter_map(|(_, other)| Some((other, other.proxy.as_ref()?))) {
            if proxy.listen.port() != 0 && proxy.listen == settings.listen {
                let words = format!("{} is that of `{}` too", proxy.listen, other.name);
                return Err(wrong(key("listen"), words));
            }
            if proxy.upstream == settings.listen {
                let words = format!("{} is the proxy of `{}`, no service", proxy.upstream, other.name);
                return Err(wrong(key("upstream"), words));
            }
        }
    }
    Ok(())
}

fn connections_max() -> usize {
    256
}

fn second() -> Duration {
    Duration::from_secs(1)
}

fn response_timeout() -> Duration {
    Duration::from_secs(30)
}

fn ten_seconds() -> Duration {
    Duration::from_secs(10)
}

fn idle_timeout() -> Duration {
    Duration::from_mins(2)
}

fn hold() -> Duration {
    Duration::from_secs(5)
}

fn failures() -> u32 {
    5
}

fn open_for() -> Duration {
    Duration::from_secs(2)
}

fn retry_percent() -> u32 {
    10
}

#[cfg(test)]
mod tests {
    use theriac_heal::types::ActionKind;

    use super::super::tests::check_text;
    use super::*;

    const SERVICE: &str = "[[service]]\nname = 'kv'\nargv = ['true']\n[service.proxy]\n\
        listen = '127.0.0.1:8080'\nupstream = '127.0.0.1:8081'\n";

    #[test]
    fn a_proxy_needs_two_addresses_and_drains_for_the_classes_that_are_named() {
        let config = check_text(&format!("{SERVICE}drain_on = ['overload']\n")).unwrap();
        let service = &config.services[0];
        assert_eq!(service.proxy.as_ref().unwrap().spec().retry_percent, 10);
        assert_eq!(
            service.healing.configured_for(FaultClass::Overload),
            [ActionKind::Drain]
        );
        assert!(!service.healing.inhibits(FaultClass::Overload, ActionKind::Drain));
        assert!(
            service
                .healing
                .inhibits(FaultClass::Overload, ActionKind::Restart)
        );
    }

    #[test]
    fn what_makes_no_proxy_is_refused_by_name() {
        for (more, named) in [
            ("retry_percent = 11", "proxy.retry_percent"),
            ("idle_timeout = '30s'", "proxy.idle_timeout"),
            ("hold = '2m'", "proxy.hold"),
            ("drain_timeout = '2m'", "proxy.drain_timeout"),
            ("failures = 0", "proxy.failures"),
            ("connections_max = 0", "proxy.connections_max"),
            ("drain_on = ['dependency_down']", "proxy.drain_on"),
            ("mode = 'udp'", "mode"),
        ] {
            let error = check_text(&format!("{SERVICE}{more}\n")).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
        let same = SERVICE.replace("8081", "8080");
        assert!(
            check_text(&same)
                .unwrap_err()
                .to_string()
                .contains("proxy.upstream")
        );
        let twice = format!("{SERVICE}{}", SERVICE.replace("'kv'", "'web'"));
        assert!(
            check_text(&twice)
                .unwrap_err()
                .to_string()
                .contains("proxy.listen")
        );
    }
}
