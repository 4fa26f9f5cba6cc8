//! Federated training on recorded metrics, in one process.
//!
//! Every recorded machine is a site. Sites and centre are the programs' own parts: the participant and round machines, the
//! codec, the ledger and the chain from local update to compressed bytes, validation and robust rule, solve and gate. Only the
//! sockets are missing: messages are encoded, carried in memory and decoded again, and time moves only when
//! nothing is left to do.
//!
//! Read [`args`] (what can be asked), [`data`] (the sites), [`member`] (a site in a federation), [`center`] (the aggregator),
//! [`federation`] (both, until the last round is over), [`run`](mod@run) (the experiment) and [`summary`] (what it leaves behind).
//!
//! Beside it lies the seeded world of faults, [`world`] with its [`link`]s and [`disk`]s, in which nothing is learnt and
//! everything is dropped, delayed, repeated and crashed.

pub mod args;
pub mod center;
pub mod data;
pub mod disk;
pub mod federation;
mod hostile;
pub mod link;
pub mod member;
mod quarantine;
pub mod run;
pub mod summary;
pub mod validator;
mod words;
pub mod world;

#[cfg(test)]
mod tests;

pub use args::Args;
pub use run::{SimulateError, Simulated, run};
