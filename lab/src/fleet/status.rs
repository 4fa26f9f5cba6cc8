//! The aggregator's pages, as far as the lab reads them. Those of an edge are [`theriac_edge::status`].

use std::collections::BTreeMap;

use serde::Deserialize;

/// `/status` of the aggregator.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct AggregatorStatus {
    /// Sites that are connected.
    pub connected: Vec<String>,
    /// Latest published model.
    pub model_version: u64,
    /// Rounds that published.
    pub rounds_published: u64,
    /// Rounds that were aborted.
    pub rounds_aborted: u64,
    /// Bytes received.
    pub bytes_up: u64,
    /// Bytes sent.
    pub bytes_down: u64,
    /// Every enrolled site.
    pub sites: Vec<SiteStatus>,
}

/// One site, as the aggregator sees it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct SiteStatus {
    /// Name.
    pub name: String,
    /// Updates taken.
    pub accepted: u64,
    /// Updates refused.
    pub refused: u64,
    /// Refusals by reason.
    pub refusals: BTreeMap<String, u64>,
    /// Rounds that the site declined, by reason.
    pub declines: BTreeMap<String, u64>,
}

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
