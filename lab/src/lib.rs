//! Everything that is an experiment: the demo, the simulator, attacks, load, and the referee that measures healing
//! from outside. Nothing in here runs on a production host.
//!
//! - [`demo`] runs the main job on this machine as separate processes, injects real faults, and ends by itself.
//! - [`campaign`] repeats single faults and reports medians.
//! - [`compare`] measures detectors against each other on labelled recordings.
//! - [`load`] measures the aggregator alone, with light edges that train nothing.
//! - [`simulate`] trains on recorded metrics, many sites in one process on virtual time.
//! - [`robustness`] measures rules against attacks.
//! - [`evaluate`] measures anomaly scores against labels, from files.
//! - [`causes`] measures how well root causes are found.
//! - [`quiet`] counts what the healer does to nodes that need nothing, on recorded normal metrics.
//! - [`schedule`] measures what a schedule of checkpoints wastes, on virtual time.
//! - [`attack`] holds what a hostile edge does to the values it sends; [`hostile`] is such an edge.

pub mod attack;
pub mod campaign;
pub mod causes;
pub mod compare;
pub mod demo;
pub mod evaluate;
pub mod fleet;
pub mod hostile;
pub mod load;
pub mod quiet;
pub mod risk;
pub mod robustness;
pub mod schedule;
pub mod service;
pub mod simulate;
pub mod traffic;
