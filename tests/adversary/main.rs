//! What hostile and broken peers send, judged by the code that judges it in production: codec, validation, round machine
//! and rule, in one process without a network.
//!
//! Every case asserts the exact refusal, and that the round ends with the honest updates and the very model that it
//! would have made without the attacker. `marker` is the test of the first promise: nothing measured leaves a node.

// A test target is all test; saying so per module tells clippy.
#[cfg(test)]
mod centre;
#[cfg(test)]
mod honest;
#[cfg(test)]
mod malformed;
#[cfg(test)]
mod marker;
#[cfg(test)]
mod poisoned;
#[cfg(test)]
mod record_unit;
