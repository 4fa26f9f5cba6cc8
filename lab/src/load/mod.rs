//! The aggregator alone under load: it runs as a process of its own, as in production; the edges are light tasks in
//! this process, over real TLS and QUIC.

mod edge;
pub mod usage;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use theriac_aggregator::InitOptions;
use theriac_aggregator::config::{ModelSettings, RoundKind, RoundSettings, Settings};
use theriac_aggregator::layout::{LayoutError, ModelSpec};
use theriac_aggregator::robust::RuleName;
use theriac_certs::trust::TrustError;
use theriac_certs::{Authority, AuthorityError, Identity};
use theriac_protocol::units::{NodeId, UnitError};
use theriac_transport::{ConnectError, Endpoint, EndpointError, Limits, SessionError, bind_client};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use self::edge::{LightEdge, Prepared, Told};
use self::usage::Usage;
use crate::demo::record::median;
use crate::fleet::free_addresses;
use crate::fleet::place::Centre;
use crate::fleet::process::{ProcessError, Processes};

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Number of edges.
    pub edges: usize,
    /// Number of values in the model and in an update.
    pub dimension: u32,
    /// Number of rounds.
    pub rounds: u64,
    /// Instead of rounds: stay connected for this long.
    pub idle: Option<Duration>,
}

/// What was measured. The first fields are a contract.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measurement {
    /// Number of edges.
    pub edges: usize,
    /// Number of values.
    pub dimension: u32,
    /// Rounds that published.
    pub rounds: u64,
    /// From one announcement to the next, pause zero: everything that a round is made of, but training.
    pub round_seconds: RoundSeconds,
    /// Largest resident set of the aggregator.
    pub aggregator_peak_rss_bytes: u64,
    /// Processor time of the aggregator from the first connection to the end.
    pub aggregator_cpu_seconds: f64,
    /// Frame bytes from one edge in one round, on average.
    pub bytes_up_per_edge_round: f64,
    /// Frame bytes to one edge in one round, on average, the model included.
    pub bytes_down_per_edge_round: f64,
    /// Handshakes up to Welcome a second, all edges arriving at once.
    pub handshakes_per_second: f64,
    /// Resident set of the aggregator at the end.
    pub aggregator_rss_bytes: u64,
    /// Rounds that published nothing.
    pub rounds_aborted: u64,
    /// How long the edges stayed connected without rounds, seconds.
    pub idle_seconds: Option<f64>,
}

/// Durations of rounds, in seconds; nothing without at least two rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RoundSeconds {
    /// Half of the rounds were shorter.
    pub median: Option<f64>,
    /// All but one in a hundred were shorter.
    pub p99: Option<f64>,
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

/// Handshakes under way at one time.
const HANDSHAKES_MAX: usize = 64;
/// Edges that share a socket.
const EDGES_PER_SOCKET: usize = 128;
/// Different updates in memory; edges beyond share them.
const UPDATES_MAX: usize = 16;

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

/// The aggregator's process and what edges need to reach it.
struct Fleet {
    at: SocketAddr,
    aggregator: rustix::process::Pid,
    authority: Arc<Vec<u8>>,
    identities: Vec<Identity>,
    spec: ModelSpec,
    endpoints: Vec<Endpoint>,
}

impl Fleet {
    async fn prepare(options: &Options, root: &Path, processes: &mut Processes) -> Result<Self, LoadError> {
        let free = free_addresses(3).map_err(|error| LoadError::System("no free ports", error))?;
        let centre = Centre::new(root, [free[0], free[1], free[2]]);
        let identities = enrol(&centre, options)?;
        let configuration = centre.config().to_string_lossy().into_owned();
        let aggregator = processes.start(
            "aggregator",
            ["__aggregator", "serve", "--config", &configuration],
        )?;
        wait_until_open(&centre, processes).await?;
        let authority = Authority::load(&centre.dir.join("authority/aggregators"))?
            .certificate_der()
            .to_vec();
        let sockets = options.edges.div_ceil(EDGES_PER_SOCKET);
        let endpoints: Result<Vec<Endpoint>, _> =
            (0..sockets).map(|_| bind_client(&Limits::default())).collect();
        Ok(Self {
            at: centre.listen,
            aggregator,
            authority: Arc::new(authority),
            identities,
            spec: ModelSpec::raw(options.dimension)?,
            endpoints: endpoints?,
        })
    }

    fn usage(&self) -> Result<Usage, LoadError> {
        Ok(usage::of(self.aggregator)?)
    }

    /// Connects every edge, many at a time; gives them with the handshakes a second.
    async fn connect(&self, options: &Options) -> Result<(Vec<LightEdge>, f64), LoadError> {
        let updates: Vec<Prepared> = (1..)
            .take(options.edges.min(UPDATES_MAX))
            .map(|seed| {
                Prepared::new(
                    if options.idle.is_some() {
                        1
                    } else {
                        options.dimension
                    },
                    seed,
                )
            })
            .collect();
        let gate = Arc::new(Semaphore::new(HANDSHAKES_MAX));
        let mut connecting = JoinSet::new();
        let began = Instant::now();
        for (index, identity) in self.identities.iter().cloned().enumerate() {
            let (endpoint, at) = (self.endpoints[index % self.endpoints.len()].clone(), self.at);
            let (authority, spec) = (Arc::clone(&self.authority), self.spec.clone());
            let (gate, update) = (Arc::clone(&gate), updates[index % updates.len()].clone());
            connecting.spawn(async move {
                let _permit = gate.acquire().await;
                LightEdge::connect(index, &endpoint, at, &identity, &authority, &spec, update).await
            });
        }
        let mut edges = Vec::with_capacity(options.edges);
        while let Some(edge) = connecting.join_next().await {
            edges.push(edge.map_err(|error| LoadError::Prepare(error.to_string()))??);
        }
        Ok((edges, options.edges as f64 / began.elapsed().as_secs_f64()))
    }
}

/// Makes a data directory in which every edge is already enrolled.
fn enrol(centre: &Centre, options: &Options) -> Result<Vec<Identity>, LoadError> {
    let prepare = |error: &dyn std::fmt::Display| LoadError::Prepare(error.to_string());
    let mut init = InitOptions::new(&centre.dir, "load");
    init.site = None;
    init.settings = Settings {
        rounds: terms(options),
        model: model(options),
        ..init.settings
    };
    theriac_aggregator::init(init).map_err(|error| prepare(&error))?;
    centre
        .configure("load", terms(options), model(options))
        .map_err(|error| LoadError::System("cannot write the configuration", error))?;
    let nodes: Result<Vec<NodeId>, _> = (0..options.edges)
        .map(|index| NodeId::new(format!("edge-{index}")))
        .collect();
    theriac_aggregator::enrol_directly(&centre.dir, &nodes?).map_err(|error| prepare(&error))
}

/// Rounds without a pause that wait for every edge; none at all when the edges only stay connected.
fn terms(options: &Options) -> RoundSettings {
    let idle = options.idle.is_some();
    RoundSettings {
        kind: RoundKind::Delta,
        quorum: options.edges + usize::from(idle),
        deadline: Duration::from_mins(1),
        pause: Duration::ZERO,
        rounds_max: (!idle).then_some(options.rounds),
        clip_norm: 1.0,
        noise_multiplier: 1.0,
        rule: if options.edges >= 3 {
            RuleName::TrimmedMean
        } else {
            RuleName::Mean
        },
        byzantine: usize::from(options.edges >= 3),
        ..RoundSettings::default()
    }
}

fn model(options: &Options) -> ModelSettings {
    ModelSettings {
        dimension: Some(options.dimension),
        ..ModelSettings::default()
    }
}

async fn wait_until_open(centre: &Centre, processes: &mut Processes) -> Result<(), LoadError> {
    let client = crate::fleet::http::Client::new(Duration::from_secs(1));
    let deadline = Instant::now() + Duration::from_secs(30);
    while client
        .json::<serde_json::Value>(centre.page, "/status")
        .await
        .is_err()
    {
        processes.check()?;
        if Instant::now() > deadline {
            return Err(LoadError::Prepare("its page did not open within 30 s".to_owned()));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
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

/// The rounds as the first edge sees them.
#[derive(Debug, Default)]
struct Course {
    published: u64,
    aborted: u64,
    announced: Vec<Instant>,
    last_closed: Option<Instant>,
}

impl Course {
    fn take(&mut self, told: &Told) {
        match told {
            Told::Announced { edge: 0, at } => self.announced.push(*at),
            Told::Closed {
                edge: 0,
                at,
                published,
            } => {
                self.last_closed = Some(*at);
                if *published {
                    self.published += 1;
                } else {
                    self.aborted += 1;
                }
            }
            Told::Announced { .. } | Told::Closed { .. } | Told::Lost { .. } => {}
        }
    }

    fn ended(&self) -> u64 {
        self.published + self.aborted
    }

    /// From announcement to announcement; the last round to its close.
    fn seconds(&self) -> RoundSeconds {
        let mut moments = self.announced.clone();
        moments.extend(self.last_closed);
        let mut seconds: Vec<f64> = moments
            .windows(2)
            .map(|pair| pair[1].duration_since(pair[0]).as_secs_f64())
            .collect();
        seconds.sort_by(f64::total_cmp);
        RoundSeconds {
            p99: percentile(&seconds, 0.99),
            median: median(seconds),
        }
    }
}

/// The nearest-rank percentile of sorted values.
fn percentile(sorted: &[f64], share: f64) -> Option<f64> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a rank between 1 and the length"
    )]
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

fn empty(edges: usize, dimension: u32) -> Measurement {
    Measurement {
        edges,
        dimension,
        rounds: 0,
        round_seconds: RoundSeconds {
            median: None,
            p99: None,
        },
        aggregator_peak_rss_bytes: 0,
        aggregator_cpu_seconds: 0.0,
        bytes_up_per_edge_round: 0.0,
        bytes_down_per_edge_round: 0.0,
        handshakes_per_second: 0.0,
        aggregator_rss_bytes: 0,
        rounds_aborted: 0,
        idle_seconds: None,
    }
}

/// The measurement for people.
pub fn results(measurement: &Measurement) -> String {
    let mebibytes = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let milliseconds =
        |seconds: Option<f64>| seconds.map_or("-".to_owned(), |s| format!("{:.1} ms", s * 1e3));
    let rows = [
        ("edges", measurement.edges.to_string()),
        ("values in an update", measurement.dimension.to_string()),
        (
            "rounds published, aborted",
            format!("{}, {}", measurement.rounds, measurement.rounds_aborted),
        ),
        ("round, median", milliseconds(measurement.round_seconds.median)),
        (
            "round, 99th percentile",
            milliseconds(measurement.round_seconds.p99),
        ),
        (
            "aggregator, peak memory",
            mebibytes(measurement.aggregator_peak_rss_bytes),
        ),
        (
            "aggregator, memory at the end",
            mebibytes(measurement.aggregator_rss_bytes),
        ),
        (
            "aggregator, processor time",
            format!("{:.2} s", measurement.aggregator_cpu_seconds),
        ),
        (
            "bytes up, edge and round",
            format!("{:.0}", measurement.bytes_up_per_edge_round),
        ),
        (
            "bytes down, edge and round",
            format!("{:.0}", measurement.bytes_down_per_edge_round),
        ),
        (
            "handshakes a second",
            format!("{:.0}", measurement.handshakes_per_second),
        ),
    ];
    let rows: Vec<Vec<String>> = rows
        .into_iter()
        .map(|(what, value)| vec![what.to_owned(), value])
        .collect();
    theriac_command::output::table(&["Measured", "Value"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_timed_from_announcement_to_announcement() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut course = Course::default();
        for ms in [0, 10, 30] {
            course.take(&Told::Announced { edge: 0, at: at(ms) });
            course.take(&Told::Announced {
                edge: 1,
                at: at(ms + 1),
            });
            course.take(&Told::Closed {
                edge: 0,
                at: at(ms + 8),
                published: ms != 10,
            });
        }
        assert_eq!((course.published, course.aborted), (2, 1));
        let seconds = course.seconds();
        assert!((seconds.median.unwrap() - 0.010).abs() < 1e-9, "{seconds:?}");
        assert!((seconds.p99.unwrap() - 0.020).abs() < 1e-9, "{seconds:?}");
    }

    #[test]
    fn silly_numbers_are_refused_before_anything_is_started() {
        let options = Options {
            edges: 10,
            dimension: 10,
            rounds: 10,
            idle: None,
        };
        assert!(check(&options).is_ok());
        assert!(check(&Options { edges: 0, ..options }).is_err());
        assert!(check(&Options { rounds: 0, ..options }).is_err());
        assert!(
            check(&Options {
                rounds: 0,
                idle: Some(Duration::from_secs(1)),
                ..options
            })
            .is_ok()
        );
    }

    #[test]
    fn the_percentile_is_one_of_the_values() {
        assert_eq!(percentile(&[], 0.99), None);
        assert_eq!(percentile(&[3.0], 0.99), Some(3.0));
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(percentile(&hundred, 0.99), Some(99.0));
    }

    #[test]
    fn the_measurement_has_the_fields_that_scripts_rely_on() {
        let json = serde_json::to_value(empty(10, 100)).unwrap();
        for field in [
            "edges",
            "dimension",
            "rounds",
            "aggregator_peak_rss_bytes",
            "aggregator_cpu_seconds",
            "bytes_up_per_edge_round",
            "bytes_down_per_edge_round",
            "handshakes_per_second",
        ] {
            assert!(!json[field].is_null(), "{field} is missing");
        }
        let rounds = json["round_seconds"].as_object().unwrap();
        assert!(rounds.contains_key("median") && rounds.contains_key("p99"));
    }
}
