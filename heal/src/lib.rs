//! The closed loop on one host: a pure core that decides, and hands that carry it out.
//!
//! ```text
//! observe → detect → diagnose → decide → intent (durable) → act → verify → healed, next rung, or a person
//! ```
//!
//! [`incident::IncidentMachine`] is the core. It reads no clock and touches neither process nor file: the caller feeds it what was
//! seen and does what it asks for. [`policy`] says what it may ask for, [`budget`] how often. [`executor`] holds the hands: a
//! supervised child in its own process group, and the order of state check, restore and start. [`checkpoint`] keeps copies of a
//! service's state that are known to be good.
//!
//! What this crate refuses to know: how anomalies are found (it takes a score and the names of channels), and how anything travels
//! over a network. It deletes nothing that belongs to a service: a replaced state and a corrupt checkpoint are set aside.
//!
//! A caller's loop, for each service:
//!
//! 1. At start: [`executor::service::ServiceHands::boot`]; answer each [`incident::Output::Reconcile`] with
//!    [`executor::service::ServiceHands::reconcile`]; feed [`incident::Input::Started`], or [`incident::Input::Exited`] when it
//!    does not run.
//! 2. Feed probes, process states, exits and anomalies; drain [`incident::IncidentMachine::poll_output`] after each.
//! 3. On [`incident::Output::RecordIntent`]: store the intent and [`incident::IncidentMachine::export`] in one transaction, then
//!    feed [`incident::Input::IntentDurable`].
//! 4. On [`incident::Output::Execute`]: [`executor::service::ServiceHands::execute`], then feed [`incident::Input::Executed`].

pub mod background;
mod bounded;
pub mod breaker;
pub mod budget;
pub mod checkpoint;
pub mod evidence;
pub mod executor;
mod folder;
pub mod incident;
pub mod policy;
pub mod postgres;
pub mod standing;
pub mod types;
