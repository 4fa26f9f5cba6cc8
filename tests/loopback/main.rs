//! Real QUIC, real certificates, one process: every way in that must stay shut, and what goes over an open one.

// A test target is all test; saying so per module tells clippy.
#[cfg(test)]
mod admission;
#[cfg(test)]
mod door;
#[cfg(test)]
mod fleet;
#[cfg(test)]
mod frames;
#[cfg(test)]
mod join;
