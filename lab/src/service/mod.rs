//! A small HTTP key-value service with durable state, to be supervised, broken and healed.

use std::net::SocketAddr;
use std::path::PathBuf;

/// Arguments of `theriac-lab service`.
#[derive(Debug, Clone, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    /// A command other than serving.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Address to serve on.
    #[arg(long)]
    pub listen: Option<SocketAddr>,
    /// State directory.
    #[arg(long)]
    pub state: Option<PathBuf>,
    /// Address for fault commands.
    #[arg(long)]
    pub control: Option<SocketAddr>,
}

/// Commands other than serving.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum Command {
    /// Checks a state directory: exit code 0 good, 1 corrupt.
    Check {
        /// State directory.
        #[arg(long)]
        state: PathBuf,
    },
}

/// Why the service ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServiceError {
    /// Not yet.
    #[error("not yet")]
    NotYet,
}

impl ServiceError {
    /// The exit code: 3 for corrupt state, 1 for a failed check and everything else.
    pub fn exit_code(&self) -> u8 {
        1
    }
}

/// Runs the service until TERM or INT.
///
/// # Errors
/// [`ServiceError`].
pub async fn run(args: Args) -> Result<(), ServiceError> {
    unimplemented!("{args:?}")
}
