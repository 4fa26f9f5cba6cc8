//! The aggregator alone under load: it runs as a process of its own, as in production; the edges are light tasks in
//! this process, over real TLS and QUIC.

mod edge;
mod fleet;
mod measurement;
pub mod usage;

use std::path::PathBuf;
use std::time::Duration;

use theriac_aggregator::layout::LayoutError;
use theriac_certs::AuthorityError;
use theriac_certs::trust::TrustError;
use theriac_protocol::units::UnitError;
use theriac_transport::{ConnectError, EndpointError, SessionError};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use self::edge::{LightEdge, Told};
use self::fleet::Fleet;
use self::measurement::{Course, empty};
pub use self::measurement::{Measurement, RoundSeconds, results};
use crate::fleet::process::{ProcessError, Processes};

/// What is measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Number of edges.
    pub edges: usize,
    /// Number of values in the model and in an update.
    pub dimension: u32,
    /// Number of rounds.
    pub rounds: u64,
    /// Instead of rounds: stay connected for this long.
    pub idle: Option<Duration>,
    /// The `theriac-aggregator` to measure; without, the one inside this program, whose file is larger and so are
    /// its resident pages.
    pub aggregator: Option<PathBuf>,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// A number is out of range.
    #[error("{0}")]
    Options(String),
    /// A file or an address is not to be had.
    #[error("{0}: {1}")]
    System(&'static str, std::io::Error),
    /// The aggregator could not be prepared.
    #[error("cannot prepare the aggregator: {0}")]
    Prepare(String),
    /// The aggregator did not start or ended.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// Certificates.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// TLS.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// A socket.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// An edge was not admitted.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// An edge lost its connection.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// A unit out of range.
    #[error(transparent)]
    Unit(#[from] UnitError),
    /// The dimension.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// `/proc` says nothing.
    #[error("cannot read what the aggregator uses: {0}")]
    Usage(#[from] procfs::ProcError),
    /// The rounds did not come to their end.
    #[error("edge {edge}: {why}")]
    Lost {
        /// Which edge.
        edge: usize,
        /// What happened.
        why: String,
    },
    /// Too slow.
    #[error("{done} of {rounds} rounds ended within {} s", limit.as_secs())]
    Slow {
        /// Rounds that ended.
        done: u64,
        /// Rounds asked for.
        rounds: u64,
        /// The time they had.
        limit: Duration,
    },
}

/// Measures.
///
/// # Errors
/// [`LoadError`]; the aggregator's process is stopped in any case.
pub async fn run(options: Options) -> Result<Measurement, LoadError> {
    check(&options)?;
    let state = tempfile::Builder::new().prefix("theriac-load-").tempdir();
    let state = state.map_err(|error| LoadError::System("no room for state", error))?;
    let mut processes = Processes::new(&state.path().join("logs"))
        .map_err(|error| LoadError::System("cannot make the log directory", error))?;
    let mut fleet = Fleet::prepare(&options, state.path(), &mut processes).await?;
    let before = fleet.usage()?;
    let (edges, handshakes_per_second) = fleet.connect(&options).await?;
    let mut measurement = match options.idle {
        Some(idle) => stay(edges, idle, &fleet).await?,
        None => rounds(edges, &options).await?,
    };
    processes.check()?;
    let after = fleet.usage()?;
    measurement.aggregator_peak_rss_bytes = after.peak_rss_bytes;
    measurement.aggregator_rss_bytes = measurement.aggregator_rss_bytes.max(after.rss_bytes);
    measurement.aggregator_cpu_seconds = after.cpu_seconds - before.cpu_seconds;
    measurement.handshakes_per_second = handshakes_per_second;
    fleet.endpoints.clear();
    Ok(measurement)
}

fn check(options: &Options) -> Result<(), LoadError> {
    let wrong = |what: &str| Err(LoadError::Options(what.to_owned()));
    match options {
        Options {
            edges: 0 | 20_001.., ..
        } => wrong("--edges must be 1 to 20000"),
        Options {
            idle: None,
            rounds: 0 | 1_000_001..,
            ..
        } => wrong("--rounds must be 1 to 1000000"),
        Options { idle: Some(idle), .. } if idle.as_secs() > 3_600 => {
            wrong("--idle must be at most 3600 seconds")
        }
        _ => Ok(()),
    }
}

/// Lets every edge stay connected for `idle`.
async fn stay(edges: Vec<LightEdge>, idle: Duration, fleet: &Fleet) -> Result<Measurement, LoadError> {
    let count = edges.len();
    let (workers, mut told, stop) = set_to_work(edges);
    let lost = tokio::time::timeout(idle, async {
        loop {
            if let Some(Told::Lost { edge, why }) = told.recv().await {
                return LoadError::Lost { edge, why };
            }
        }
    });
    if let Ok(lost) = lost.await {
        return Err(lost);
    }
    let rss = fleet.usage()?.rss_bytes;
    stop.send_replace(true);
    workers.join_all().await;
    Ok(Measurement {
        idle_seconds: Some(idle.as_secs_f64()),
        aggregator_rss_bytes: rss,
        ..empty(count, fleet.spec.values())
    })
}

/// Runs the rounds.
async fn rounds(edges: Vec<LightEdge>, options: &Options) -> Result<Measurement, LoadError> {
    let count = edges.len();
    let (workers, mut told, stop) = set_to_work(edges);
    let limit =
        Duration::from_mins(1) + Duration::from_secs(20) * u32::try_from(options.rounds).unwrap_or(u32::MAX);
    let mut course = Course::default();
    let follow = async {
        while course.ended() < options.rounds {
            match told.recv().await {
                Some(Told::Lost { edge, why }) => return Err(LoadError::Lost { edge, why }),
                Some(told) => course.take(&told),
                None => {
                    return Err(LoadError::Lost {
                        edge: 0,
                        why: "every edge has gone".to_owned(),
                    });
                }
            }
        }
        Ok(())
    };
    let followed = tokio::time::timeout(limit, follow).await;
    followed.map_err(|_| LoadError::Slow {
        done: course.ended(),
        rounds: options.rounds,
        limit,
    })??;
    stop.send_replace(true);
    // Edges that have not read the last words yet still end in order.
    drop(told);
    let bytes = workers.join_all().await;
    let edge_rounds = (count as u64 * course.ended()).max(1) as f64;
    let (up, down) = bytes.iter().fold((0, 0), |(up, down), (sent, received)| {
        (up + sent, down + received)
    });
    Ok(Measurement {
        rounds: course.published,
        rounds_aborted: course.aborted,
        round_seconds: course.seconds(),
        bytes_up_per_edge_round: (up as f64 / edge_rounds).round(),
        bytes_down_per_edge_round: (down as f64 / edge_rounds).round(),
        ..empty(count, options.dimension)
    })
}

type Workers = JoinSet<(u64, u64)>;

fn set_to_work(edges: Vec<LightEdge>) -> (Workers, mpsc::Receiver<Told>, watch::Sender<bool>) {
    let (tell, told) = mpsc::channel(4_096);
    let (stop, stopped) = watch::channel(false);
    let mut workers = JoinSet::new();
    for edge in edges {
        workers.spawn(edge.work(tell.clone(), stopped.clone()));
    }
    (workers, told, stop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silly_numbers_are_refused_before_anything_is_started() {
        let options = Options {
            edges: 10,
            dimension: 10,
            rounds: 10,
            idle: None,
            aggregator: None,
        };
        assert!(check(&options).is_ok());
        assert!(
            check(&Options {
                edges: 0,
                ..options.clone()
            })
            .is_err()
        );
        assert!(
            check(&Options {
                rounds: 0,
                ..options.clone()
            })
            .is_err()
        );
        assert!(
            check(&Options {
                rounds: 0,
                idle: Some(Duration::from_secs(1)),
                ..options
            })
            .is_ok()
        );
    }
}
