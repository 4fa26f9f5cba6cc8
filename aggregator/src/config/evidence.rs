//! `[quarantine]` and `[server_optimizer]`.

use serde::{Deserialize, Serialize};
use theriac_protocol::message::UpdateKind;

use super::{ConfigError, wrong};
use crate::evidence::reputation::QuarantineLimits;
use crate::server_optimizer::{OptimizerName, ServerOptimizer};

/// `[quarantine]`: sites whose rows are, round after round, such as no honest row is, are scored at weight 0 until they have earned their way back.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct QuarantineSettings {
    /// Whether it is in force, default `true`. Records are kept either way. Without it a persistent liar costs the rule one of its f in every round.
    pub enabled: bool,
    /// Trust below which a site enters, 0.05 to below `leave_at`, default 0.4. A new site has 0.8. Too low: a liar counts for longer. Too
    /// high: two bad rounds are enough even for a site of good name.
    pub enter_below: f64,
    /// Trust from which on it leaves, above `enter_below` to 0.78 (a site without any history has 0.8), default 0.7. Too low: it goes in and out. Too
    /// high: a site that was repaired stays out for longer.
    pub leave_at: f64,
}

impl Default for QuarantineSettings {
    fn default() -> Self {
        Self {
            enabled: true,
            enter_below: 0.4,
            leave_at: 0.7,
        }
    }
}

impl QuarantineSettings {
    pub(super) fn check(&self) -> Result<QuarantineLimits, ConfigError> {
        let Self {
            enabled,
            enter_below,
            leave_at,
        } = *self;
        if !(0.05..leave_at).contains(&enter_below) {
            return Err(wrong(
                "quarantine.enter_below",
                format!("{enter_below} is outside 0.05 to below leave_at, which is {leave_at}"),
            ));
        }
        if leave_at > 0.78 {
            return Err(wrong(
                "quarantine.leave_at",
                format!("{leave_at} is above 0.78: a site could not earn that back"),
            ));
        }
        Ok(QuarantineLimits {
            enabled,
            enter_below,
            leave_at,
        })
    }
}

/// `[server_optimizer]`: from the combined weight changes of a round to the model's step. Only with `rounds.kind = "delta"`.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerSettings {
    /// `"fedavg"` (default), `"fedavgm"`, `"fedadam"` or `"fedyogi"` (Reddi et al. 2021).
    pub name: OptimizerName,
    /// Server rate η, 0.000001 to 100, default 1. Too low: nothing is learnt. Too high: the model swings. `fedadam` and `fedyogi` take steps of about η
    /// whatever the size of the changes: begin at 0.01.
    pub rate: f64,
    /// β of `fedavgm`, β₁ of `fedadam` and `fedyogi`, 0 to below 1, default 0.9. Too high: a bad round stays for 1/(1 − β) rounds.
    pub momentum: f64,
    /// β₂, 0 to below 1, default 0.99. Too low: steps jump with the last round's size.
    pub second_momentum: f64,
    /// τ, 1e-12 to 1, default 0.001. Too low: changes that are only noise are scaled up. Too high: all steps shrink.
    pub adaptivity: f64,
}

impl Default for OptimizerSettings {
    fn default() -> Self {
        let ServerOptimizer {
            name,
            rate,
            momentum,
            second_momentum,
            adaptivity,
        } = ServerOptimizer::default();
        Self {
            name,
            rate,
            momentum,
            second_momentum,
            adaptivity,
        }
    }
}

impl OptimizerSettings {
    pub(super) fn check(&self, kind: UpdateKind) -> Result<ServerOptimizer, ConfigError> {
        let range = |key, got: f64, low: f64, high: f64| {
            if (low..=high).contains(&got) {
                Ok(())
            } else {
                Err(wrong(key, format!("{got} is outside {low} to {high}")))
            }
        };
        let below_one = |key, got: f64| {
            if (0.0..1.0).contains(&got) {
                Ok(())
            } else {
                Err(wrong(key, format!("{got} is outside 0 to below 1")))
            }
        };
        range("server_optimizer.rate", self.rate, 1e-6, 100.0)?;
        below_one("server_optimizer.momentum", self.momentum)?;
        below_one("server_optimizer.second_momentum", self.second_momentum)?;
        range("server_optimizer.adaptivity", self.adaptivity, 1e-12, 1.0)?;
        let optimizer = ServerOptimizer {
            name: self.name,
            rate: self.rate,
            momentum: self.momentum,
            second_momentum: self.second_momentum,
            adaptivity: self.adaptivity,
        };
        if kind == UpdateKind::Gradient && !optimizer.is_plain() {
            return Err(wrong(
                "server_optimizer.name",
                format!(
                    "{} with rate {} does not apply to rounds.kind = \"gradient\": those rounds step with a momentum of their own, which the model \
                     carries; leave the section out or use kind = \"delta\"",
                    self.name, self.rate
                ),
            ));
        }
        if kind == UpdateKind::Moments && !optimizer.is_plain() {
            return Err(wrong(
                "server_optimizer.name",
                format!(
                    "{} with rate {} does not apply to rounds.kind = \"moments\": the weights are solved anew from each round's moments, \
                     so there is no step to smooth, and scaled moments would no longer fit their noise; leave the section out or use kind = \"delta\"",
                    self.name, self.rate
                ),
            ));
        }
        Ok(optimizer)
    }
}
