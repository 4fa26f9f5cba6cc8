//! How well causes are found: channels of recorded servers, services of a recorded shop.
//!
//! - [`channels`] ranks the channels of each labelled segment and counts those that the labels blame.
//! - [`services`] ranks the services of a call graph for each issue and looks for the one that was broken.

pub mod channels;
pub mod services;
mod shop;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use serde::Serialize;
use theriac_command::output::Format;
use theriac_model::detector::DetectorError;
use theriac_model::io::ReadError;

/// Arguments of `theriac-lab causes`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Recorded servers: `NAME.train.npy.gz`, `NAME.test.npy.gz` and `NAME.interpretation.json` (`[{from, to, dims}]`, rows of
    /// the test part and the channels to blame). A detector is fitted on each train part.
    #[arg(long, required_unless_present = "petshop")]
    pub data: Option<PathBuf>,
    /// A shop of services: `SYSTEM.graph.json`, `SYSTEM.noissue.*` and `SYSTEM.*.issue_N.*`.
    #[arg(long)]
    pub petshop: Option<PathBuf>,
    /// Time between rows of `--data` in seconds.
    #[arg(long, default_value_t = 60.0)]
    pub step_seconds: f64,
    /// `human` or `json`.
    #[arg(long, default_value = "human")]
    pub format: Format,
}

/// Why causes were not measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CausesError {
    /// An option makes no sense.
    #[error("--step-seconds {0} is out of range: 0.001 to 86400")]
    Step(f64),
    /// A folder cannot be listed, or a file of words cannot be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// An array cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A file of words is not what it should be.
    #[error("{path}: {reason}")]
    Contents {
        /// Which.
        path: PathBuf,
        /// What is wrong, with what is expected.
        reason: String,
    },
    /// No detector for a machine.
    #[error("{machine}: {source}")]
    Detector {
        /// The machine.
        machine: String,
        /// Why.
        source: DetectorError,
    },
    /// There is nothing to measure on.
    #[error("no {wanted} in {path}")]
    Nothing {
        /// Where.
        path: PathBuf,
        /// What was looked for.
        wanted: &'static str,
    },
}

/// What was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measured {
    /// On recorded servers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channels: Option<channels::ChannelResult>,
    /// On the shop.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub services: Option<services::ServiceResult>,
}

/// Measures what is asked for.
///
/// # Errors
/// [`CausesError`], whose text names the file.
pub fn run(args: &Args) -> Result<Measured, CausesError> {
    if !(0.001..=86_400.0).contains(&args.step_seconds) {
        return Err(CausesError::Step(args.step_seconds));
    }
    let step = std::time::Duration::from_secs_f64(args.step_seconds);
    Ok(Measured {
        channels: args
            .data
            .as_ref()
            .map(|data| channels::measure(data, step))
            .transpose()?,
        services: args
            .petshop
            .as_ref()
            .map(|shop| services::measure(shop))
            .transpose()?,
    })
}

impl Measured {
    /// Tables for people.
    pub fn table(&self) -> String {
        let channels = self.channels.as_ref().map(channels::ChannelResult::table);
        let services = self.services.as_ref().map(services::ServiceResult::table);
        channels
            .into_iter()
            .chain(services)
            .collect::<Vec<_>>()
            .join("\n\n")
    }
}

/// The sorted names of a folder's files that end so, without the ending.
fn names(folder: &std::path::Path, ending: &str) -> Result<Vec<String>, CausesError> {
    let refused = |source| CausesError::Io {
        path: folder.to_owned(),
        source,
    };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(refused)? {
        let name = entry.map_err(refused)?.file_name();
        if let Some(name) = name.to_string_lossy().strip_suffix(ending) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn read_json<T: serde::de::DeserializeOwned>(path: &std::path::Path) -> Result<T, CausesError> {
    let text = std::fs::read(path).map_err(|source| CausesError::Io {
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_slice(&text).map_err(|error| CausesError::Contents {
        path: path.to_owned(),
        reason: error.to_string(),
    })
}
