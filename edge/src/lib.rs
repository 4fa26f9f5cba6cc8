//! One host: it measures, finds trouble, heals what its policy allows, and learns together with others.
//!
//! ```text
//! detect   sample → detect (history, Detector, AlarmState) → respond                every interval
//! heal     probe, exit, anomaly → respond (IncidentMachine) → service (hands) → verified by the probe
//! learn    client (Participant) → update: reserve → local → clip → noise → compress → outbox → sent
//! ```
//!
//! Start at [`config::EdgeConfig`] and [`run`]. Nothing measured leaves the process but through `update`; the page on
//! loopback, logs and incidents carry scores and channel names, never samples. The aggregator is optional: without it,
//! or with a hostile one, detection and healing go on as before.

mod bounds;
pub mod checkpoints;
pub mod client;
pub mod commands;
pub mod config;
pub mod detect;
pub mod fleet;
pub mod global_store;
pub mod healing_policy;
pub mod history;
pub mod http;
mod level;
mod logs;
pub mod memory;
pub mod metrics;
mod network;
pub mod offsite;
pub mod postgres;
pub mod pressure;
pub mod probe;
pub mod proxy;
mod reinstate;
pub mod respond;
pub mod risk;
mod room;
mod run;
pub mod sample;
mod scrub;
pub mod service;
mod sockets;
pub mod state_dir;
pub mod status;
pub mod storage;
pub mod store;
pub mod supervise;
pub mod suspects;
pub mod update;
mod warnings;
pub mod watch;

pub use run::{EdgeError, run};

use std::sync::Arc;

use theriac_protocol::units::Round;

/// Name under which the host itself appears beside the services.
pub const HOST: &str = "host";

/// What a hostile edge makes of an update: a function of round and *noised* values. It exists for the lab; the
/// `theriac-edge` binary cannot reach it, and it never sees anything that was not already protected.
pub type Tamper = Arc<dyn Fn(Round, Vec<f32>) -> Vec<f32> + Send + Sync>;
