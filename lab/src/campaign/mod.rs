//! The same fault again and again on one edge with one service, measured from outside: medians instead of anecdotes.

mod report;
mod rival;

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::demo::DemoError;
use crate::demo::record::{FaultRecord, median};
use crate::demo::report::markup::{maybe_seconds, seconds};
use crate::demo::stage::{Member, Stage, unix_ms};
use crate::demo::trial::{self, Course};
use crate::demo::view::View;
use crate::demo::{machine, rfc3339};
use crate::fleet::fault::Fault;
use crate::fleet::place::{EdgeTerms, Site};
use crate::fleet::process::{Processes, end_leftovers};
use crate::fleet::{free_addresses, interruption};
use crate::traffic::{Traffic, TrafficReport};

/// What heals in a campaign.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Healer {
    /// An edge.
    Theriac,
    /// A probe every 2 s; two failures in a row and the service is restarted. It knows nothing else.
    Threshold,
    /// Monit, a process of its own, with the same numbers.
    Monit,
}

impl Healer {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Theriac, Self::Threshold, Self::Monit];

    /// Its name on the command line and in summaries.
    pub fn name(self) -> &'static str {
        match self {
            Self::Theriac => "theriac",
            Self::Threshold => "threshold",
            Self::Monit => "monit",
        }
    }
}

/// Why a name on the command line is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// A healer that this build does not have.
    #[error("the healer `{got}` is not part of this build: it has {known}")]
    Healer {
        /// What was asked for.
        got: String,
        /// What there is.
        known: String,
    },
    /// A fault that this build does not have.
    #[error("the fault `{got}` is not part of this build: it has {known}")]
    Fault {
        /// What was asked for.
        got: String,
        /// What there is.
        known: String,
    },
}

impl FromStr for Healer {
    type Err = NameError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|healer| healer.name() == name)
            .ok_or_else(|| NameError::Healer {
                got: name.to_owned(),
                known: Self::ALL.map(Self::name).join(", "),
            })
    }
}

impl FromStr for Fault {
    type Err = NameError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|fault| fault.name() == name)
            .ok_or_else(|| NameError::Fault {
                got: name.to_owned(),
                known: Self::ALL.map(Self::name).join(", "),
            })
    }
}

/// How the campaign is to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Which faults.
    pub faults: Vec<Fault>,
    /// Who heals.
    pub healers: Vec<Healer>,
    /// How often each.
    pub runs: u32,
    /// Where `report.html`, `summary.json` and `logs/` go.
    pub out: PathBuf,
    /// No live view even on a terminal.
    pub plain: bool,
}

/// `summary.json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// One row a fault and healer.
    pub results: Vec<ResultRow>,
    /// Faults that were left out.
    pub skipped: Vec<Skipped>,
    /// When it began, RFC 3339.
    pub started: String,
    /// The machine in one line.
    pub machine: String,
}

/// Medians over the runs of one fault under one healer; nothing where nothing was detected or healed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ResultRow {
    /// The fault.
    pub fault: &'static str,
    /// The healer.
    pub healer: &'static str,
    /// Number of runs.
    pub runs: usize,
    /// Seconds from injection to detection.
    pub detect_s: Option<f64>,
    /// Seconds from injection to verified healing; what only an edge says of itself.
    pub heal_s: Option<f64>,
    /// Seconds from injection until the last request failed, as the load generator saw it: the same for every healer.
    pub down_s: Option<f64>,
    /// Requests that failed in the fault's window.
    pub failed_requests: Option<f64>,
    /// Acknowledged writes that could not be read back, over all runs: an upper bound of the median.
    pub lost_transactions: Option<f64>,
    /// Actions taken.
    pub actions: Option<f64>,
    /// Actions after which the service was worse than before.
    pub harmful_actions: Option<f64>,
    /// Runs that were healed: by the edge's verdict, or for other healers by 3 s without a failed request within a minute.
    pub healed_runs: usize,
    /// Every run's seconds to verified healing, in order.
    pub each_heal_s: Vec<Option<f64>>,
    /// Every run's seconds until the last request failed, in order.
    pub each_down_s: Vec<Option<f64>>,
}

/// A fault that was left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// The fault.
    pub fault: String,
    /// Why.
    pub reason: String,
}

/// One run.
#[derive(Debug, Clone, PartialEq)]
struct Run {
    record: FaultRecord,
    down_s: Option<f64>,
    actions: u64,
    harmful: u64,
}

/// Requests a second against the service.
const REQUESTS_PER_S: f64 = 40.0;
/// Time without a failed request after which a fault is over.
const QUIET: Duration = Duration::from_secs(3);
/// Time that a healer may take for one fault.
const HEAL_LIMIT: Duration = Duration::from_mins(1);
/// Samples before the first model.
const WARM_UP_ROWS: usize = 120;
/// Name of the site.
const SITE: &str = "amber";

/// Runs the campaign and leaves `report.html` and `summary.json`.
///
/// # Errors
/// [`DemoError`] when it could not go on; every process is stopped then.
pub async fn run(options: &Options) -> Result<Summary, DemoError> {
    let file = |what: &str| {
        let what = what.to_owned();
        move |error| DemoError::File(what, error)
    };
    std::fs::create_dir_all(&options.out).map_err(file("cannot make the output directory"))?;
    let out = std::fs::canonicalize(&options.out).map_err(file("cannot find the output directory"))?;
    let state = tempfile::Builder::new().prefix("theriac-campaign-").tempdir();
    let state = state.map_err(file("no room for state"))?;
    let root = std::fs::canonicalize(state.path()).map_err(file("no room for state"))?;
    let processes = Processes::new(&out.join("logs")).map_err(file("cannot make the log directory"))?;
    let free = free_addresses(3).map_err(file("no free ports"))?;
    let site = Site::new(&root, SITE, [free[0], free[1], free[2]]);
    let planned_s = 35.0 + options.faults.len() as f64 * f64::from(options.runs) * 8.0;
    let (mut results, mut skipped) = (Vec::new(), Vec::new());
    let program = processes.program().to_owned();
    let interrupted = interruption();
    if options.healers.contains(&Healer::Theriac) {
        let view = View::open(options.plain, 1);
        let sites = vec![(site.clone(), false)];
        let mut stage = Stage::new(processes, view, None, sites, planned_s, interrupted.clone());
        let played = play(&mut stage, &site, options).await;
        let (_, mut processes, _) = stage.end();
        processes.stop_all(Duration::from_secs(8));
        end_leftovers(&program, &site.service_state());
        results.extend(played?);
    }
    for healer in options
        .healers
        .iter()
        .copied()
        .filter(|healer| *healer != Healer::Theriac)
    {
        let free = free_addresses(3).map_err(file("no free ports"))?;
        let site = Site::new(&root, healer.name(), [free[0], free[1], free[2]]);
        let place = rival::Place {
            program: &program,
            site: &site,
            logs: &out.join("logs"),
        };
        let played = rival::play(healer, &place, options, interrupted.clone()).await;
        end_leftovers(&program, &site.service_state());
        match played? {
            Ok(rows) => results.extend(rows),
            Err(left_out) => skipped.push(left_out),
        }
    }
    let summary = Summary {
        results,
        skipped,
        started: rfc3339(std::time::SystemTime::now()),
        machine: machine(),
    };
    write(&out, &summary).map_err(file("cannot write the results"))?;
    Ok(summary)
}

async fn play(stage: &mut Stage, site: &Site, options: &Options) -> Result<Vec<ResultRow>, DemoError> {
    let file = |error| DemoError::File("cannot write a configuration".to_owned(), error);
    let program = stage.processes.program().to_owned();
    let terms = EdgeTerms {
        warm_up_rows: WARM_UP_ROWS,
        false_alarms_per_day: 1.0,
        cooldown: Duration::from_secs(1),
        actions_max: 1_000,
    };
    site.write(&program, terms).map_err(file)?;
    let config = site.config().to_string_lossy().into_owned();
    stage
        .processes
        .start(SITE, ["__edge", "run", "--config", &config])?;
    let steady = |stage: &Stage| stage.cast.iter().all(Member::is_steady);
    if !stage.until("starting", Duration::from_secs(30), steady).await? {
        return Err(DemoError::Unexpected(
            "the service was not healthy within 30 s".to_owned(),
        ));
    }
    stage.cast[0].traffic = Some(Traffic::start(site.service, REQUESTS_PER_S, 0));
    let learnt = |stage: &Stage| stage.cast.iter().all(Member::is_watching);
    let limit = Duration::from_secs(90);
    if !stage.until("learning what is normal", limit, learnt).await? {
        return Err(DemoError::Unexpected(
            "the edge had not learnt what is normal within 90 s".to_owned(),
        ));
    }
    let mut results = Vec::new();
    for fault in &options.faults {
        let mut runs = Vec::new();
        for number in 1..=options.runs {
            runs.extend(once(stage, *fault, number).await?);
        }
        let lost_transactions = change_traffic(stage, site, results.len() as u64 + 1).await;
        results.push(row(*fault, Healer::Theriac, &runs, lost_transactions));
    }
    Ok(results)
}

/// One run: a steady service, a moment of calm, the fault. Nothing when it could not be injected.
async fn once(stage: &mut Stage, fault: Fault, number: u32) -> Result<Option<Run>, DemoError> {
    let doing = format!("{}, run {number}", fault.title());
    let steady = |stage: &Stage| stage.cast.iter().all(Member::is_steady);
    stage.until(&doing, HEAL_LIMIT, steady).await?;
    // Not always at the same moment between two probes: run k of a fault comes k/7 of a second later.
    let calm = Duration::from_secs(2) + Duration::from_secs(1) * (number % 7) / 7;
    let begins = Instant::now() + calm;
    stage
        .until(&doing, calm * 2, |_| Instant::now() >= begins)
        .await?;
    let course = trial::run(stage, 0, fault, HEAL_LIMIT).await?;
    // So that failures that belong to this fault are all in.
    let settled = Instant::now() + QUIET;
    stage
        .until(&doing, QUIET * 2, |_| Instant::now() >= settled)
        .await?;
    let since_began = Duration::try_from_secs_f64(stage.now_s()).unwrap_or_default();
    let began_ms = unix_ms().saturating_sub(u64::try_from(since_began.as_millis()).unwrap_or(0));
    let measured = course.zip(stage.record.faults.last().cloned());
    Ok(measured.map(|(Course { actions, harmful, .. }, record)| {
        let after = Duration::try_from_secs_f64(record.injected_s).unwrap_or_default();
        let injected_ms = began_ms + u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
        let traffic = stage.cast[0].traffic.as_ref();
        Run {
            down_s: traffic.map(|traffic| down_s(&traffic.snapshot(), injected_ms)),
            record,
            actions,
            harmful,
        }
    }))
}

/// Seconds from an injection until the last request failed, by when it was due; 0 when none did.
fn down_s(seen: &TrafficReport, injected_ms: u64) -> f64 {
    let of_it = seen
        .failures
        .iter()
        .filter(|failure| failure.unix_ms >= injected_ms);
    let last = of_it.map(|failure| failure.unix_ms).max();
    last.map_or(0.0, |last| (last - injected_ms) as f64 / 1e3)
}

/// Ends the load, gives the number of acknowledged writes that it could not read back, and begins another. The former has
/// to end first: both write to the same keys.
async fn change_traffic(stage: &mut Stage, site: &Site, seed: u64) -> u64 {
    let lost = match stage.cast[0].traffic.take() {
        Some(former) => former.stop().await.lost_writes,
        None => 0,
    };
    stage.cast[0].traffic = Some(Traffic::start(site.service, REQUESTS_PER_S, seed));
    lost
}

fn row(fault: Fault, healer: Healer, runs: &[Run], lost_transactions: u64) -> ResultRow {
    let of = |pick: &dyn Fn(&Run) -> Option<f64>| median(runs.iter().filter_map(pick).collect());
    ResultRow {
        fault: fault.name(),
        healer: healer.name(),
        runs: runs.len(),
        detect_s: of(&|run| run.record.detected_s),
        heal_s: of(&|run| run.record.healed_s),
        down_s: of(&|run| run.down_s),
        failed_requests: of(&|run| Some(run.record.failed_requests as f64)),
        lost_transactions: (!runs.is_empty()).then_some(lost_transactions as f64),
        actions: of(&|run| Some(run.actions as f64)),
        harmful_actions: of(&|run| Some(run.harmful as f64)),
        healed_runs: runs
            .iter()
            .filter(|run| match healer {
                Healer::Theriac => run.record.is_healed(),
                // What it verified, if anything, it does not say: the load generator's view stands for it.
                Healer::Threshold | Healer::Monit => run.down_s.is_some(),
            })
            .count(),
        each_heal_s: runs.iter().map(|run| run.record.healed_s).collect(),
        each_down_s: runs.iter().map(|run| run.down_s).collect(),
    }
}

fn write(out: &Path, summary: &Summary) -> std::io::Result<()> {
    std::fs::write(out.join("report.html"), report::render(summary))?;
    std::fs::write(
        out.join("summary.json"),
        serde_json::to_string_pretty(summary)? + "\n",
    )
}

/// The figures for people.
pub fn results(summary: &Summary) -> String {
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.0}"));
    let rows: Vec<Vec<String>> = summary
        .results
        .iter()
        .map(|row| {
            let worst = row.each_heal_s.iter().flatten().copied().fold(0.0, f64::max);
            // Only an edge says of itself when it noticed and when it had verified.
            let own = |told: String| {
                if row.healer == Healer::Theriac.name() {
                    told
                } else {
                    "-".to_owned()
                }
            };
            vec![
                row.fault.to_owned(),
                row.healer.to_owned(),
                format!("{} of {}", row.healed_runs, row.runs),
                own(maybe_seconds(row.detect_s)),
                own(maybe_seconds(row.heal_s)),
                own(seconds(worst)),
                maybe_seconds(row.down_s),
                number(row.failed_requests),
                number(row.lost_transactions),
                number(row.harmful_actions),
            ]
        })
        .collect();
    let header = [
        "Fault",
        "Healer",
        "Healed",
        "Detected",
        "Healthy",
        "Worst",
        "Requests failed for",
        "Failed requests",
        "Lost writes",
        "Harm",
    ];
    let mut told = theriac_command::output::table(&header, &rows);
    for left_out in &summary.skipped {
        told.push_str("\nleft out: ");
        told.push_str(&left_out.fault);
        told.push_str(": ");
        told.push_str(&left_out.reason);
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_of(healed_s: Option<f64>, failed_requests: u64) -> Run {
        let record = FaultRecord {
            detected_s: healed_s.map(|s| s / 2.0),
            healed_s,
            failed_requests,
            ..FaultRecord::default()
        };
        Run {
            record,
            down_s: healed_s,
            actions: 1,
            harmful: 0,
        }
    }

    #[test]
    fn medians_are_over_what_was_healed_and_null_where_nothing_was() {
        let runs = [run_of(Some(1.0), 10), run_of(None, 500), run_of(Some(2.0), 20)];
        let healed = row(Fault::Kill9, Healer::Theriac, &runs, 0);
        assert_eq!((healed.heal_s, healed.detect_s), (Some(1.5), Some(0.75)));
        assert_eq!(
            (healed.runs, healed.healed_runs, healed.failed_requests),
            (3, 2, Some(20.0))
        );
        let rival = row(Fault::Kill9, Healer::Monit, &runs, 0);
        assert_eq!(
            (rival.healed_runs, rival.down_s),
            (2, Some(1.5)),
            "by the load generator alone"
        );
        let json = serde_json::to_value(row(Fault::Hang, Healer::Theriac, &[run_of(None, 9)], 0)).unwrap();
        assert!(json["heal_s"].is_null() && json["detect_s"].is_null());
        for field in [
            "fault",
            "healer",
            "runs",
            "failed_requests",
            "lost_transactions",
            "actions",
            "harmful_actions",
        ] {
            assert!(!json[field].is_null(), "{field} is missing");
        }
    }

    #[test]
    fn other_healers_and_faults_are_refused_with_what_there_is() {
        assert_eq!("monit".parse::<Healer>().unwrap(), Healer::Monit);
        let other = "systemd".parse::<Healer>().unwrap_err().to_string();
        assert!(other.contains("theriac, threshold, monit"), "{other}");
        let disk = "disk_full".parse::<Fault>().unwrap_err().to_string();
        assert!(disk.contains("kill9, hang"), "{disk}");
    }
}
