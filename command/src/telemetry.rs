//! Logs on standard error. Results never pass through here.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Human on a terminal, JSON lines elsewhere.
    Auto,
    /// For people.
    Human,
    /// One JSON object a line.
    Json,
}

/// Starts logging for this process. `filter` is in the syntax of `RUST_LOG`, which wins when set; a filter that
/// does not parse falls back to `info` and says so in the log. A second call changes nothing.
pub fn init(filter: &str, format: LogFormat) {
    let chosen = std::env::var("RUST_LOG").unwrap_or_else(|_| filter.to_owned());
    let parsed = EnvFilter::try_new(&chosen);
    let wrong = parsed.as_ref().err().map(ToString::to_string);
    let builder = tracing_subscriber::fmt()
        .with_env_filter(parsed.unwrap_or_else(|_| EnvFilter::new("info")))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let json = match format {
        LogFormat::Auto => !std::io::stderr().is_terminal(),
        LogFormat::Human => false,
        LogFormat::Json => true,
    };
    let installed = if json {
        builder.json().try_init()
    } else {
        builder.compact().try_init()
    };
    if let (Ok(()), Some(reason)) = (installed, wrong) {
        tracing::warn!(filter = chosen, reason, "log filter does not parse, using info");
    }
}
