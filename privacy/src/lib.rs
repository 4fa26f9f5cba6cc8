//! What leaves a node, and what it costs.
//!
//! One path leads from data to bytes, and every step takes the former step's type by value:
//!
//! ```text
//! ReleasePlan --Ledger::reserve (durable charge)--> Reservation
//! Reservation + closure that reads data --> LocalUpdate --clip--> ClippedUpdate --noise--> NoisyUpdate
//!                                                                 --compress--> CompressedUpdate --> message
//! ```
//!
//! A [`ledger::Reservation`] comes only from [`ledger::Ledger::reserve`], after the charge is on disk, and it is spent by the
//! first step. So data cannot be read uncharged, nor noised twice for one charge. The values inside the
//! stages are private until noise is on them.
//!
//! The guarantee, with unit, adjacency, sensitivity and mechanism, is stated in [`policy`], [`clip`], [`noise`] and
//! [`accountant`], each beside the code that must keep it.
//!
//! This crate knows neither sockets nor models: it sees flat vectors, or products of two factors that stand for them ([`factors`]). It is the only one that names OpenDP.

pub mod accountant;
pub mod central;
pub mod clip;
pub mod descent;
pub mod factors;
#[cfg(feature = "failpoints")]
pub mod failpoint;
mod grid;
pub mod ledger;
pub mod noise;
pub mod planner;
pub mod poisson;
pub mod policy;
pub mod report;
pub mod update;
pub mod windows;
