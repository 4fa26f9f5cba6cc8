//! The hands: bounded, recorded, without a shell.

pub mod clock;
mod group;
mod held;
pub mod hook;
mod output;
mod place;
pub mod postgres;
pub mod process;
pub mod service;
pub mod space;
pub mod webhook;
