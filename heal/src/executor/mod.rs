//! The hands: bounded, recorded, without a shell.

pub mod cgroup;
pub mod clock;
pub(crate) mod group;
mod held;
pub mod hook;
#[cfg(feature = "kubernetes")]
pub mod kubernetes;
pub mod listening;
mod orphans;
mod output;
mod place;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod service;
pub mod space;
#[cfg(feature = "systemd")]
pub mod systemd;
pub mod unit;
pub mod webhook;
