//! A small HTTP key-value service with durable state, to be supervised, broken and healed.
//!
//! A write is acknowledged once it is synced to disk. On corrupt state the service does not start (exit code 3), because a service
//! that starts on it would serve wrong answers. Real faults of its own process can be switched on at a separate address.

mod fault;
mod http;
mod record;
mod state;
mod store;

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

pub use self::state::StateError;
use self::store::Store;

/// Arguments of `theriac-lab service`.
#[derive(Debug, Clone, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Args {
    /// A command other than serving.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Address to serve on; port 0 takes a free one.
    #[arg(long, required = true)]
    pub listen: Option<SocketAddr>,
    /// State directory; made when it is missing.
    #[arg(long, required = true)]
    pub state: Option<PathBuf>,
    /// Address for fault commands. Anybody who can reach it can make the service leak and spin: keep it on loopback.
    #[arg(long)]
    pub control: Option<SocketAddr>,
    /// Another service that is asked before each write is taken: while its `/healthz` does not answer, neither does this one's, and
    /// only reads are served.
    #[arg(long)]
    pub upstream: Option<SocketAddr>,
    /// Memory for data that the process is refused more than, in MiB; it dies then. Default: no limit of its own.
    #[arg(long, value_parser = clap::value_parser!(u64).range(32..=1 << 20))]
    pub memory_max_mib: Option<u64>,
}

/// Commands other than serving.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum Command {
    /// Checks a state directory and changes nothing: exit code 0 good, 1 corrupt.
    #[command(after_help = "Example: theriac-lab service check --state kv")]
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
    /// The state cannot be served.
    #[error(transparent)]
    State(#[from] StateError),
    /// `check` found the state corrupt.
    #[error("{0}")]
    CheckFailed(StateError),
    /// An address cannot be served on.
    #[error("cannot listen on {addr}: {source}")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// The system's word.
        source: std::io::Error,
    },
    /// An argument is missing.
    #[error("--{0} is missing")]
    Missing(&'static str),
    /// The system refused something else.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

impl ServiceError {
    /// What to do next.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::CheckFailed(StateError::Corrupt { .. }) | Self::State(StateError::Corrupt { .. }) => {
                "restore a checkpoint of the state directory; nothing in it was changed"
            }
            Self::CheckFailed(StateError::InUse { .. }) | Self::State(StateError::InUse { .. }) => {
                "stop the process that serves it, or name another --state"
            }
            Self::CheckFailed(StateError::Io { .. }) | Self::State(StateError::Io { .. }) | Self::Io(_) => {
                "check that the directory belongs to this user and has room, then start it again"
            }
            Self::Listen { .. } => "choose a free port, or 0 for any",
            Self::Missing(_) => "`theriac-lab service --help` shows an example",
        }
    }

    /// 3 for corrupt state, 1 for a failed check, 2 for a missing argument, 75 for everything that may pass. A check that could not
    /// read the state is no verdict on it, so it is not 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::CheckFailed(StateError::Corrupt { .. }) => 1,
            Self::State(StateError::Corrupt { .. }) => 3,
            Self::Missing(_) => 2,
            Self::CheckFailed(_) | Self::State(_) | Self::Listen { .. } | Self::Io(_) => 75,
        }
    }
}

/// Runs the service until TERM or INT, or one of its other commands. Announces its address on standard output.
///
/// # Errors
/// [`ServiceError`].
pub async fn run(args: Args) -> Result<(), ServiceError> {
    if let Some(Command::Check { state }) = args.command {
        return check(&state);
    }
    let dir = args.state.ok_or(ServiceError::Missing("state"))?;
    let listen = args.listen.ok_or(ServiceError::Missing("listen"))?;
    if let Some(mib) = args.memory_max_mib {
        limit_memory(mib)?;
    }
    let mut term = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (store, writer) = Store::open(&dir)?;
    let listener = bind(listen).await?;
    let addr = listener.local_addr()?;
    let (stop, stopped) = watch::channel(());
    let mut servers = vec![tokio::spawn(serve(
        listener,
        http::routes(http::Asked::new(store.clone(), args.upstream)),
        stopped.clone(),
    ))];
    let mut control_addr = None;
    if let Some(control) = args.control {
        let listener = bind(control).await?;
        control_addr = Some(listener.local_addr()?);
        servers.push(tokio::spawn(serve(
            listener,
            http::control_routes(fault::Faults::default()),
            stopped,
        )));
    }
    announce(addr, control_addr)?;
    tracing::info!(%addr, keys = store.stats().keys, "serving");
    tokio::select! {
        _ = term.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping");
    drop(stop);
    drop(store);
    for server in servers {
        server.await.map_err(std::io::Error::other)??;
    }
    // The last handle is gone: the writer ends after what was acknowledged.
    tokio::task::spawn_blocking(move || writer.join())
        .await
        .map_err(std::io::Error::other)?
        .ok();
    Ok(())
}

/// Refuses this process more memory for data than so many MiB: an allocation beyond it ends the process, as one would where the
/// host's is used up, but takes nobody else along.
fn limit_memory(mib: u64) -> std::io::Result<()> {
    let bytes = mib << 20;
    let limit = rustix::process::Rlimit {
        current: Some(bytes),
        maximum: Some(bytes),
    };
    Ok(rustix::process::setrlimit(
        rustix::process::Resource::Data,
        limit,
    )?)
}

fn check(dir: &std::path::Path) -> Result<(), ServiceError> {
    let contents = state::read(dir).map_err(ServiceError::CheckFailed)?;
    let mut out = std::io::stdout();
    write!(
        out,
        "good: {} keys after write {}",
        contents.table.len(),
        contents.sequence
    )?;
    if contents.torn_bytes > 0 {
        write!(
            out,
            ", {} bytes of a write that was never acknowledged",
            contents.torn_bytes
        )?;
    }
    writeln!(out)?;
    Ok(())
}

async fn bind(addr: SocketAddr) -> Result<TcpListener, ServiceError> {
    TcpListener::bind(addr)
        .await
        .map_err(|source| ServiceError::Listen { addr, source })
}

/// Ends when the sender of `stopped` is dropped. Connections that stay open longer than the grace are cut.
async fn serve(
    listener: TcpListener,
    routes: axum::Router,
    mut stopped: watch::Receiver<()>,
) -> std::io::Result<()> {
    let mut grace = stopped.clone();
    let server = axum::serve(listener, routes)
        .with_graceful_shutdown(async move { while stopped.changed().await.is_ok() {} });
    tokio::select! {
        ended = server => ended,
        () = async {
            while grace.changed().await.is_ok() {}
            tokio::time::sleep(STOP_GRACE).await;
        } => Ok(()),
    }
}

fn announce(addr: SocketAddr, control: Option<SocketAddr>) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    match control {
        Some(control) => writeln!(out, "listening on {addr}, control on {control}")?,
        None => writeln!(out, "listening on {addr}")?,
    }
    out.flush()
}

const STOP_GRACE: std::time::Duration = std::time::Duration::from_millis(500);

#[cfg(test)]
mod tests;
