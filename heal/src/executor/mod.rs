//! The hands: bounded, recorded, without a shell.

pub mod clock;
mod group;
mod output;
pub mod postgres;
pub mod process;
pub mod service;
