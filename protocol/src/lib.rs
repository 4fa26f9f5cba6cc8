//! Words and turns of the exchange.
pub mod message;
pub mod refusal;
pub mod units;
