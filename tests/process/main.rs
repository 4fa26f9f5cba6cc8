//! The programs as processes: their rounds, kill −9 of each at bad moments, and bad input of every kind that an operator can give.
//!
//! Every process is `theriac-process`, which calls the entry points of the three programs. All of it runs on loopback in
//! temporary directories.

// A test target is all test; saying so per module tells clippy.
#[cfg(test)]
mod bad_identity;
#[cfg(test)]
mod bad_start;
#[cfg(test)]
mod braked_fleet;
#[cfg(test)]
mod central_noise;
#[cfg(test)]
mod child;
#[cfg(test)]
mod fleet;
#[cfg(test)]
mod full_disk;
#[cfg(test)]
mod joining;
#[cfg(test)]
mod killed_aggregator;
#[cfg(test)]
mod killed_edge;
#[cfg(test)]
mod killed_healer;
#[cfg(test)]
mod metrics_files;
#[cfg(test)]
mod page;
#[cfg(test)]
mod played;
mod quarantine;
#[cfg(test)]
mod restored_edge;
#[cfg(test)]
mod rounds;
#[cfg(test)]
mod site;
