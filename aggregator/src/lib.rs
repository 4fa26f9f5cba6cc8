//! The fleet: rounds over QUIC with many edges, none of them trusted.
//!
//! ```text
//! accept → authenticate → admit → validate → collect (RoundMachine) → rule → publish → record
//! ```
//!
//! One module a step, in that order: [`accept`] takes connections, [`authenticate`] turns a certificate into an enrolled
//! site, [`admit`] holds quotas and the ledger rule, [`validate`] makes a [`validate::ValidatedUpdate`] out of bytes, [`driver`]
//! owns the [`RoundMachine`](theriac_protocol::round::RoundMachine) and carries out what it asks for, [`robust`] combines,
//! [`publish`] makes the next model, [`evidence`] explains what was decided about everybody, [`combine`] puts these together and
//! [`replay`] does a past round again, [`store`] keeps everything, [`audit`] makes it provable. [`enrol`] is the separate
//! door for new edges, [`http`] the page on loopback.
//!
//! What it refuses to know: no sample, no feature value, no local model ever reaches this crate; an update is clipped
//! and noised before it leaves its site, and no type here could hold more.
//!
//! Start at [`init()`] (a data directory with authorities, identity and configuration), [`config::load`] and [`serve()`].

pub mod accept;
pub mod accumulate;
pub mod admit;
pub mod audit;
pub mod authenticate;
pub mod average;
pub mod central;
pub mod combine;
pub mod commands;
pub mod config;
pub mod copies;
pub mod data_dir;
pub mod driver;
pub mod enrol;
pub mod evidence;
pub mod fleet;
pub mod floor;
pub mod http;
pub mod init;
pub mod layout;
pub mod metrics;
pub mod models;
pub mod npy;
mod page;
pub mod publish;
pub mod replay;
pub mod robust;
pub mod serve;
pub mod server_optimizer;
pub mod spill;
pub mod status;
pub mod store;
pub mod validate;
pub mod validation;
pub mod vet;

pub use init::{InitOptions, Initialised, enrol_directly, init};
pub use serve::{Addresses, Running, serve};
