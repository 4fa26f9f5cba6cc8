//! The codec from outside: every message there and back, its bytes against the golden files, and hostile bytes.

#[cfg(test)]
mod golden;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod round_trip;
#[cfg(test)]
mod samples;
