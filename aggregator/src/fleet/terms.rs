//! `[fleet]`

use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_command::settings;
use theriac_protocol::fleet::{TTL_MAX, TTL_MIN};

use crate::config::{ConfigError, count, span};

/// `[fleet]`: counts of unhealthy nodes, told to those whose policies have budgets of the fleet, and slots lent to them.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct FleetSettings {
    /// Whether account is kept of the fleet, default `false`: then nothing is asked and told, and no slot is lent.
    pub enabled: bool,
    /// Most nodes that hold a slot of one kind at a time, in hundredths of those that tell how they are, 1 to 100, default 20; one always may. A node's
    /// own policy may ask for fewer. Too low: shared actions queue. Too high: a bad one is done everywhere.
    pub share: u8,
    /// Term of a slot, 1 s to 1 h, default `5m`. Four fifths of it have to be more than `healing.action_timeout` and 35 s, rounded up to ten: else no shared
    /// action of that edge ever begins. Too long: the slot of a host that died is missing for so long, and nothing is lent for so long after a start.
    #[serde(with = "settings::duration")]
    pub lease_ttl: Duration,
    /// A node that has told nothing for so long counts no more, 10 s to 10 min, default `30s`. Too short: nodes with a slow link come and go. Too
    /// long: those that are gone count.
    #[serde(with = "settings::duration")]
    pub state_age: Duration,
}

impl Default for FleetSettings {
    fn default() -> Self {
        Self {
            enabled: false,
            share: 20,
            lease_ttl: Duration::from_mins(5),
            state_age: Duration::from_secs(30),
        }
    }
}

/// Checked [`FleetSettings`] that are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FleetTerms {
    /// In hundredths.
    pub share: u8,
    /// Term of a slot.
    pub lease_ttl: Duration,
    /// A node that has told nothing for so long counts no more.
    pub state_age: Duration,
}

impl FleetSettings {
    /// Checks the ranges, also of what is off.
    ///
    /// # Errors
    /// [`ConfigError::Value`].
    pub fn check(&self) -> Result<FleetTerms, ConfigError> {
        count("fleet.share", self.share.into(), 1, 100)?;
        span("fleet.lease_ttl", self.lease_ttl, TTL_MIN, TTL_MAX)?;
        let (least, most) = (Duration::from_secs(10), Duration::from_mins(10));
        span("fleet.state_age", self.state_age, least, most)?;
        Ok(FleetTerms {
            share: self.share,
            lease_ttl: self.lease_ttl,
            state_age: self.state_age,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_off_by_default_and_refuses_what_is_out_of_range() {
        let read = |text: &str| toml::from_str::<FleetSettings>(text).unwrap();
        assert!(!read("").enabled && read("").check().is_ok());
        for bad in [
            "share = 0",
            "share = 101",
            "lease_ttl = '2h'",
            "lease_ttl = '500ms'",
            "state_age = '1s'",
        ] {
            assert!(read(bad).check().is_err(), "{bad} was taken");
        }
        assert!(toml::from_str::<FleetSettings>("shares = 3").is_err());
    }
}
