//! The aggregator's `/rounds`, as far as the lab reads it. Its `/status` is [`theriac_aggregator::status`], the pages of an
//! edge are [`theriac_edge::status`].

use serde::Deserialize;

/// One row of `/rounds` of the aggregator.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct RoundRow {
    /// Its number.
    pub round: u64,
    /// When it opened, milliseconds since the Unix epoch.
    pub opened_unix_ms: Option<u64>,
    /// When it ended; nothing while it is open.
    pub ended_unix_ms: Option<u64>,
    /// The version that it published.
    pub published: Option<u64>,
    /// Updates taken.
    pub accepted: u64,
    /// Updates refused.
    pub refused: u64,
    /// Edges that declined.
    pub declined: u64,
}
