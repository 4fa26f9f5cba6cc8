//! Screens: what is looked at in each update before a rule combines them, and what is remembered of a site between rounds.
//!
//! Pure units without clock, store or entropy. The screen for near-copies is a pre-aggregation ([`crate::robust::Before::Dedup`]),
//! since it needs the same distances as the rules behind it.

mod average;
mod noise_law;

pub use average::{DecayError, SiteAverages};
pub use noise_law::{NoiseLaw, NoiseLawError, NoiseVerdict};
