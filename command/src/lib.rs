//! What the three programs share at their command line.
//!
//! - [`settings`]: a TOML file, then the environment, into one checked structure; an unknown key is refused with a suggestion.
//! - [`problem`]: what went wrong, with a stable code, what to do next, and the exit code.
//! - [`output`]: results for people or as JSON, through one writer.
//! - [`progress`]: a bar on standard error for long work.
//! - [`telemetry`]: logs on standard error, for people on a terminal and as JSON elsewhere.

pub mod output;
pub mod problem;
pub mod progress;
pub mod settings;
pub mod telemetry;
