//! `[federation]`: learning together with other sites.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_command::settings;
use theriac_privacy::policy::signed::PolicyPublicKey;

use super::{ConfigError, count, span, wrong};

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

pub(super) fn check(federation: &FederationSettings) -> Result<(), ConfigError> {
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

#[cfg(test)]
mod tests {
    use super::*;

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
