//! Copies of a service's state that are known to be good.

mod manifest;
pub mod state_check;
pub mod store;
