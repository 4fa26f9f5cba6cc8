//! The same real faults, on the same schedule, to services under load that different healers look after; measured from outside.
//!
//! Every healer has an HTTP service, a PostgreSQL and a Redis server of its own. All of them are given the same fault at the same moment, so that
//! whatever else the machine does is done to all; faults that take the machine come to one after the other. What a healer says of itself is
//! used for when it noticed and acted; everything else is what the load saw.

mod arena;
mod cost;
mod disk;
mod fault;
mod inject;
mod keeper;
mod load;
mod loss;
mod plan;
mod redis;
mod report;
mod score;
mod settings;
mod table;
mod undo;
mod ward;
mod writes;

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tokio::sync::{RwLock, watch};
use tokio::task::JoinSet;

pub use self::cost::ProxyCost;
pub use self::fault::{Lane, NameError, Trouble};
pub use self::plan::{Plan, Step};
pub use self::score::{Bar, ResultRow, RunLog, bars, caveats, rows, shortfalls};
pub use self::table::{markdown, results};
pub use self::undo::watch as watch_over;

use self::arena::Arena;
use self::fault::Machine;
use self::keeper::Keeper;
use self::undo::Warden;
use self::ward::Ward;
use crate::demo::DemoError;
use crate::demo::stage::unix_ms;
use crate::demo::{machine, rfc3339};
use crate::fleet::interruption;
use crate::fleet::process::Processes;

/// What heals in a campaign.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Healer {
    /// An edge, and its proxy before the HTTP service.
    Theriac,
    /// The same without the proxy: clients come straight to the service, as under everybody who has none.
    TheriacDirect,
    /// An edge that foresees nothing: no model of what is normal, no memory limit, slots short only when there are none, a disk full only when
    /// nothing is left.
    WithoutPrediction,
    /// An edge that is given nothing to look into: it sees whether the process lives and answers.
    WithoutDiagnosis,
    /// A probe every 2 s; two failures in a row and the service is restarted. It knows nothing else.
    Threshold,
    /// Monit, a process of its own, with the same numbers.
    Monit,
}

impl Healer {
    /// Every one.
    pub const ALL: [Self; 6] = [
        Self::Theriac,
        Self::TheriacDirect,
        Self::WithoutPrediction,
        Self::WithoutDiagnosis,
        Self::Threshold,
        Self::Monit,
    ];

    /// Its name on the command line and in summaries.
    pub fn name(self) -> &'static str {
        match self {
            Self::Theriac => "theriac",
            Self::TheriacDirect => "theriac_direct",
            Self::WithoutPrediction => "without_prediction",
            Self::WithoutDiagnosis => "without_diagnosis",
            Self::Threshold => "threshold",
            Self::Monit => "monit",
        }
    }

    fn is_edge(self) -> bool {
        !matches!(self, Self::Threshold | Self::Monit)
    }

    /// It has a proxy before a service that speaks HTTP.
    fn has_proxy(self) -> bool {
        self.is_edge() && self != Self::TheriacDirect
    }

    /// It has a model of what is normal, and knows what a service must not use up.
    fn foresees(self) -> bool {
        matches!(self, Self::Theriac | Self::TheriacDirect)
    }

    /// It runs the service that the HTTP service asks, too.
    fn knows_upstream(self) -> bool {
        self.is_edge() && self != Self::WithoutDiagnosis
    }
}

impl FromStr for Healer {
    type Err = NameError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|healer| healer.name() == name)
            .ok_or_else(|| NameError {
                what: "healer",
                got: name.to_owned(),
                known: Self::ALL.map(Self::name).join(", "),
            })
    }
}

/// How the campaign is to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// What is asked for.
    pub plan: Plan,
    /// Where `report.html`, `summary.json`, `table.md`, `runs.jsonl` and `logs/` go.
    pub out: PathBuf,
    /// Go on with the runs that are there already, where the plan is the same.
    pub resume: bool,
}

impl Options {
    /// The slice for every change: plain faults and those that forbid a restart, once each, about three minutes.
    pub fn slice(out: PathBuf, healers: Vec<Healer>, seed: u64) -> Self {
        let faults = vec![
            Trouble::Kill9,
            Trouble::Hang,
            Trouble::DiskFull,
            Trouble::Overload,
            Trouble::DependencyDown,
            Trouble::PgKill9,
            Trouble::PgHang,
            Trouble::ConnectionExhaustion,
            Trouble::LockPileup,
        ];
        Self {
            plan: Plan {
                faults,
                healers,
                runs: 1,
                seed,
            },
            out,
            resume: false,
        }
    }
}

/// `summary.json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// One row a fault and healer.
    pub results: Vec<ResultRow>,
    /// What the campaign as a whole speaks for.
    pub bars: Vec<Bar>,
    /// What a short campaign fails for.
    pub shortfalls: Vec<String>,
    /// Faults and healers that were left out.
    pub skipped: Vec<Skipped>,
    /// What the proxy adds to a request, measured before the first fault; nothing where no healer has one.
    pub proxy_cost: Option<ProxyCost>,
    /// What was asked for.
    pub plan: Plan,
    /// Actions for which there was no fault: the healer and their number.
    pub unprovoked: std::collections::BTreeMap<&'static str, u64>,
    /// What a reader has to know of the runs beside their figures.
    pub caveats: Vec<String>,
    /// It was ended before its end; what had been measured is here.
    pub interrupted: bool,
    /// When it began, RFC 3339.
    pub started: String,
    /// How long it took.
    pub seconds: f64,
    /// The machine in one line.
    pub machine: String,
}

/// A fault or healer that was left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// Which.
    pub fault: String,
    /// Why.
    pub reason: String,
}

/// Time for edges and services to end in order.
const STOP_GRACE: Duration = Duration::from_secs(8);

/// Runs the campaign and leaves its files. Ctrl-C ends it: everything is taken back and what was measured is written.
///
/// # Errors
/// [`DemoError`] when it could not go on; everything is taken back then.
pub async fn run(options: &Options) -> Result<Summary, DemoError> {
    std::fs::create_dir_all(&options.out).map_err(file("cannot make the output directory"))?;
    let out = std::fs::canonicalize(&options.out).map_err(file("cannot find the output directory"))?;
    // A second one with the same directory would take the first one's services for left over.
    let held = std::fs::File::create(out.join("lock")).map_err(file("cannot make the lock"))?;
    if held.try_lock().is_err() {
        let out = out.display();
        return Err(DemoError::Unexpected(format!(
            "another campaign writes into {out}"
        )));
    }
    let record = out.join("undo.json");
    if undo::take_back(&record).map_err(file("cannot take back what an earlier campaign left"))? {
        say("took back what an earlier campaign left behind");
    }
    let begun = Instant::now();
    let started = rfc3339(std::time::SystemTime::now());
    let here = Machine::here();
    let (plan, skipped) = possible(&options.plan, &here);
    let journal = Journal::open(&out, &plan, options.resume)?;
    tell_plan(&plan, &skipped);
    if plan.faults.is_empty() || plan.healers.is_empty() {
        return Err(DemoError::Unexpected(
            "nothing is left to be run: choose other faults or healers".to_owned(),
        ));
    }
    let interrupted = interruption();
    let played = if journal.is_whole(&plan) {
        say("every run is there already");
        Ok(())
    } else {
        play(&plan, &out, &record, &here, &journal, interrupted).await
    };
    let runs = journal.runs();
    let mut unprovoked = std::collections::BTreeMap::new();
    for run in &runs {
        *unprovoked.entry(run.healer.name()).or_default() += run.unprovoked;
    }
    let summary = Summary {
        results: rows(&runs),
        bars: bars(&runs),
        shortfalls: shortfalls(&runs),
        skipped,
        proxy_cost: journal.proxy_cost(),
        plan,
        unprovoked,
        caveats: caveats(&runs),
        interrupted: matches!(played, Err(DemoError::Interrupted)),
        started,
        seconds: begun.elapsed().as_secs_f64(),
        machine: machine(),
    };
    write(&out, &summary, &runs).map_err(file("cannot write the results"))?;
    match played {
        Ok(()) => Ok(summary),
        Err(DemoError::Interrupted) if !runs.is_empty() => Ok(summary),
        Err(error) => Err(error),
    }
}

fn file(what: &str) -> impl FnOnce(std::io::Error) -> DemoError {
    let what = what.to_owned();
    move |error| DemoError::File(what, error)
}

/// What of the plan this machine can do, and why not the rest.
fn possible(asked: &Plan, here: &Machine) -> (Plan, Vec<Skipped>) {
    let mut skipped = Vec::new();
    let mut plan = asked.clone();
    plan.faults.retain(|fault| match fault.missing(here) {
        Some(reason) => {
            skipped.push(Skipped {
                fault: fault.name().to_owned(),
                reason,
            });
            false
        }
        None => true,
    });
    plan.healers.retain(|healer| {
        let missing = *healer == Healer::Monit && !fault::is_on_path("monit");
        if missing {
            skipped.push(Skipped {
                fault: healer.name().to_owned(),
                reason: "the program `monit` is not on PATH; it is a Debian package".to_owned(),
            });
        }
        !missing
    });
    (plan, skipped)
}

fn tell_plan(plan: &Plan, skipped: &[Skipped]) {
    say(&format!(
        "{} faults × {} runs to {}: about {:.0} min; seed {}",
        plan.faults.len(),
        plan.runs,
        plan.healers
            .iter()
            .map(|healer| healer.name())
            .collect::<Vec<_>>()
            .join(", "),
        (plan.about().as_secs_f64() / 60.0).ceil(),
        plan.seed
    ));
    say(
        "ramps of gradual faults are compressed into about 20 s; an hour's leak differs in more than its pace",
    );
    for left_out in skipped {
        say(&format!("left out: {}: {}", left_out.fault, left_out.reason));
    }
}

/// Progress, for whoever looks; results go elsewhere.
fn say(text: &str) {
    // Nobody has to be there to read it.
    writeln!(std::io::stderr(), "{text}").ok();
}

/// Makes everything, plays all lanes, and takes everything back, whatever happened.
async fn play(
    plan: &Plan,
    out: &Path,
    record: &Path,
    here: &Machine,
    journal: &Arc<Journal>,
    mut interrupted: watch::Receiver<bool>,
) -> Result<(), DemoError> {
    let mut processes = Processes::new(&out.join("logs")).map_err(file("cannot make the log directory"))?;
    // Named before it is made, and written down before anything is made in it.
    let unique: u64 = rand::random();
    let root = std::env::temp_dir().join(format!("{}{unique:016x}", undo::FOLDER));
    let warden =
        Warden::start(processes.program(), &root, record).map_err(file("cannot start the warden"))?;
    let set_up = async {
        std::fs::create_dir(&root)?;
        std::fs::set_permissions(&root, std::fs::Permissions::from_mode(0o755))?;
        arenas(plan, &root, here, &mut processes).await
    };
    let played = match set_up.await.map_err(file("cannot set up the services")) {
        Ok(arenas) => {
            let mut lanes = lanes(plan, arenas, journal);
            let ended = tokio::select! {
                ended = join(&mut lanes) => ended,
                _ = interrupted.wait_for(|interrupted| *interrupted) => Err(DemoError::Interrupted),
                ended = first_end(&mut processes) => Err(ended),
            };
            lanes.shutdown().await;
            ended
        }
        Err(error) => Err(error),
    };
    let taken_back = tokio::task::spawn_blocking(move || {
        processes.stop_all(STOP_GRACE);
        keep_logs(&root, &processes.log("x"));
        warden.end()
    })
    .await
    .map_err(|error| DemoError::Unexpected(error.to_string()))?;
    taken_back.map_err(file("cannot take everything back"))?;
    played
}

/// Services' and Monit's own words, which lie in the folder that is removed.
fn keep_logs(root: &Path, like: &Path) {
    let Some(logs) = like.parent() else { return };
    let Ok(wards) = std::fs::read_dir(root) else {
        return;
    };
    for ward in wards.filter_map(Result::ok) {
        let name = ward.file_name().to_string_lossy().into_owned();
        for (inside, kept) in [
            ("service.log", format!("{name}-service.log")),
            ("monit/monit.log", format!("{name}-monit.log")),
        ] {
            // What was never written is not missed.
            std::fs::copy(ward.path().join(inside), logs.join(kept)).ok();
        }
    }
}

async fn arenas(
    plan: &Plan,
    root: &Path,
    here: &Machine,
    processes: &mut Processes,
) -> std::io::Result<Vec<Arena>> {
    let mut arenas = Vec::new();
    for lane in Lane::ALL {
        for healer in plan.healers.iter().copied() {
            let takes_part = |fault: &Trouble| fault.lane() == lane && plan.takes_part(healer, *fault);
            if !plan.faults.iter().any(takes_part) {
                continue;
            }
            let (root, program, here) = (root.to_owned(), processes.program().to_owned(), here.clone());
            let made = tokio::task::spawn_blocking(move || Ward::make(&root, lane, healer, &program, &here));
            let ward = made.await.map_err(std::io::Error::other)??;
            if lane == Lane::Http && !healer.knows_upstream() {
                // These know nothing of the service that theirs asks, so it is the lab's to run.
                let name = format!("upstream-{}", healer.name());
                processes
                    .start(&name, ward.upstream_argv().into_iter().skip(1))
                    .map_err(std::io::Error::other)?;
            }
            let keeper = Keeper::start(healer, &ward, processes)?;
            arenas.push(Arena::new(healer, ward, keeper));
        }
    }
    Ok(arenas)
}

/// All lanes at once; faults that take the machine hold the others up. Behind the gate is when the latest of those ended.
fn lanes(plan: &Plan, arenas: Vec<Arena>, journal: &Arc<Journal>) -> JoinSet<Result<(), DemoError>> {
    let gate = Arc::new(RwLock::new(0));
    let mut rest = arenas;
    let mut lanes = JoinSet::new();
    for lane in Lane::ALL {
        let (arenas, others): (Vec<Arena>, Vec<Arena>) =
            rest.into_iter().partition(|arena| arena.ward.lane == lane);
        rest = others;
        let (plan, gate, journal) = (plan.clone(), Arc::clone(&gate), Arc::clone(journal));
        lanes.spawn(async move { play_lane(lane, arenas, &plan, &gate, &journal).await });
    }
    lanes
}

async fn play_lane(
    lane: Lane,
    arenas: Vec<Arena>,
    plan: &Plan,
    gate: &RwLock<u64>,
    journal: &Journal,
) -> Result<(), DemoError> {
    let mut beginning = JoinSet::new();
    for mut arena in arenas {
        beginning.spawn(async move {
            let begun = arena.begin().await;
            (arena, begun)
        });
    }
    let mut arenas = Vec::new();
    while let Some(begun) = beginning.join_next().await {
        let (arena, begun) = begun.map_err(|error| DemoError::Unexpected(error.to_string()))?;
        begun.map_err(DemoError::Unexpected)?;
        arenas.push(arena);
    }
    arenas.sort_by_key(|arena| arena.healer);
    if let Some(front) = arenas
        .iter()
        .find_map(|arena| Some((arena.ward.front?, arena.ward.service)))
    {
        journal.costs(cost::measure(front.0, front.1).await);
    }
    for step in plan.steps(lane) {
        if journal.has(&step) {
            continue;
        }
        let seed = plan.seed.wrapping_mul(1_000).wrapping_add(u64::from(step.number));
        let (mut taking_part, left_out): (Vec<Arena>, Vec<Arena>) = arenas
            .into_iter()
            .partition(|arena| plan.takes_part(arena.healer, step.fault));
        let (mut back, logs) = if step.fault.takes_the_machine() {
            let mut latest_ms = gate.write().await;
            let (mut back, mut logs) = (Vec::new(), Vec::new());
            // The first has an undisturbed machine, and the others' services its fault: everybody's turn is drawn.
            shuffle(&mut taking_part, seed);
            for mut arena in taking_part {
                arena.forgive(*latest_ms);
                logs.push(arena.step(&step, seed).await);
                *latest_ms = unix_ms();
                back.push(arena);
            }
            logs.sort_by_key(|log| log.healer);
            (back, logs)
        } else {
            let latest_ms = gate.read().await;
            for arena in &mut taking_part {
                arena.forgive(*latest_ms);
            }
            together(taking_part, step, seed).await?
        };
        back.extend(left_out);
        back.sort_by_key(|arena| arena.healer);
        arenas = back;
        journal.take(plan, &step, logs)?;
    }
    Ok(())
}

fn shuffle<T>(all: &mut [T], seed: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    for at in (1..all.len()).rev() {
        all.swap(at, random.random_range(0..=at));
    }
}

async fn together(arenas: Vec<Arena>, step: Step, seed: u64) -> Result<(Vec<Arena>, Vec<RunLog>), DemoError> {
    let mut steps = JoinSet::new();
    for mut arena in arenas {
        steps.spawn(async move {
            let log = arena.step(&step, seed).await;
            (arena, log)
        });
    }
    let (mut back, mut logs) = (Vec::new(), Vec::new());
    while let Some(done) = steps.join_next().await {
        let (arena, log) = done.map_err(|error| DemoError::Unexpected(error.to_string()))?;
        back.push(arena);
        logs.push(log);
    }
    logs.sort_by_key(|log| log.healer);
    Ok((back, logs))
}

async fn join(lanes: &mut JoinSet<Result<(), DemoError>>) -> Result<(), DemoError> {
    while let Some(ended) = lanes.join_next().await {
        ended.map_err(|error| DemoError::Unexpected(error.to_string()))??;
    }
    Ok(())
}

/// The first process that ends when none should.
async fn first_end(processes: &mut Processes) -> DemoError {
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        if let Err(error) = processes.check() {
            return error.into();
        }
    }
}

/// Everything that was measured, on disk as soon as it is.
#[derive(Debug)]
struct Journal {
    begun: Instant,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    file: std::fs::File,
    runs: Vec<RunLog>,
    done: Duration,
    proxy_cost: Option<ProxyCost>,
}

impl Journal {
    fn open(out: &Path, plan: &Plan, resume: bool) -> Result<Arc<Self>, DemoError> {
        let (plan_path, path) = (out.join("plan.json"), out.join("runs.jsonl"));
        let text = serde_json::to_string(plan).map_err(|error| DemoError::Unexpected(error.to_string()))?;
        let mut runs = Vec::new();
        if resume {
            let before = std::fs::read_to_string(&plan_path).map_err(file("no campaign to go on with"))?;
            if before.trim() != text {
                return Err(DemoError::Unexpected(format!(
                    "{} holds another plan: repeat its options, or leave --resume out",
                    plan_path.display()
                )));
            }
            let lines = std::fs::read_to_string(&path).map_err(file("no runs to go on with"))?;
            runs = lines
                .lines()
                .filter_map(|line| serde_json::from_str(line).ok())
                .collect();
            drop_cut_off(&mut runs, plan);
        }
        std::fs::write(&plan_path, text + "\n").map_err(file("cannot write the plan"))?;
        // What was there stays until the new file is whole.
        let partial = path.with_extension("partial");
        let mut written = std::fs::File::create(&partial).map_err(file("cannot write the runs"))?;
        append(&mut written, &runs)?;
        std::fs::rename(&partial, &path).map_err(file("cannot write the runs"))?;
        Ok(Arc::new(Self {
            begun: Instant::now(),
            state: Mutex::new(State {
                file: written,
                runs,
                done: Duration::ZERO,
                proxy_cost: None,
            }),
        }))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn costs(&self, measured: Option<ProxyCost>) {
        self.state().proxy_cost = measured;
    }

    fn proxy_cost(&self) -> Option<ProxyCost> {
        self.state().proxy_cost
    }

    fn has(&self, step: &Step) -> bool {
        self.state()
            .runs
            .iter()
            .any(|run| (run.fault, run.number) == (step.fault, step.number))
    }

    fn is_whole(&self, plan: &Plan) -> bool {
        let steps = |lane| plan.steps(lane).into_iter();
        let mut all = Lane::ALL.into_iter().flat_map(steps);
        all.all(|step| self.has(&step))
    }

    fn runs(&self) -> Vec<RunLog> {
        self.state().runs.clone()
    }

    /// Writes a step down and says how it went.
    fn take(&self, plan: &Plan, step: &Step, logs: Vec<RunLog>) -> Result<(), DemoError> {
        let mut state = self.state();
        append(&mut state.file, &logs)?;
        state.done += step.fault.about();
        let steps = |lane| {
            plan.steps(lane)
                .iter()
                .map(|step| step.fault.about())
                .sum::<Duration>()
        };
        let all: Duration = Lane::ALL.into_iter().map(steps).sum();
        let share = state.done.as_secs_f64() / all.as_secs_f64().max(1.0);
        let elapsed = self.begun.elapsed().as_secs_f64();
        let left = if share > 0.1 {
            elapsed / share * (1.0 - share)
        } else {
            (plan.about().as_secs_f64() - elapsed).max(0.0)
        };
        let told: Vec<String> = logs.iter().map(tell).collect();
        say(&format!(
            "[{elapsed:5.0} s, about {:.0} min left] {}, run {} of {}: {}",
            (left / 60.0).ceil(),
            step.fault,
            step.run,
            plan.runs,
            told.join("; ")
        ));
        state.runs.extend(logs);
        Ok(())
    }
}

fn tell(log: &RunLog) -> String {
    let name = log.healer.name();
    if let Some(why) = &log.not_injected {
        return format!("{name} not brought ({why})");
    }
    let health = match log.health_s() {
        Some(health_s) => format!("{health_s:.1} s"),
        None => "not healed".to_owned(),
    };
    let restarts = match log.needless_restarts() {
        0 => String::new(),
        restarts => format!(", {restarts} needless restarts"),
    };
    format!("{name} {health}, {} failed{restarts}", log.failed_requests)
}

/// In one piece, so that a step is there or is not.
fn append(to: &mut std::fs::File, runs: &[RunLog]) -> Result<(), DemoError> {
    let mut lines = String::new();
    for run in runs {
        lines += &serde_json::to_string(run).map_err(|error| DemoError::Unexpected(error.to_string()))?;
        lines.push('\n');
    }
    to.write_all(lines.as_bytes())
        .map_err(file("cannot write the runs"))
}

/// A step of which not every healer's line is there was cut off, and comes again for all of them: they are only compared in the same one.
fn drop_cut_off(runs: &mut Vec<RunLog>, plan: &Plan) {
    let whole: std::collections::BTreeSet<(Trouble, u32)> = runs
        .iter()
        .map(|run| (run.fault, run.number))
        .filter(|(fault, number)| {
            let there = |healer: &Healer| {
                runs.iter()
                    .any(|run| (run.fault, run.number, run.healer) == (*fault, *number, *healer))
            };
            let mut meant = plan
                .healers
                .iter()
                .filter(|healer| plan.takes_part(**healer, *fault));
            meant.all(there)
        })
        .collect();
    runs.retain(|run| whole.contains(&(run.fault, run.number)));
}

fn write(out: &Path, summary: &Summary, runs: &[RunLog]) -> std::io::Result<()> {
    std::fs::write(out.join("report.html"), report::render(summary, runs))?;
    std::fs::write(out.join("table.md"), markdown(summary))?;
    std::fs::write(
        out.join("summary.json"),
        serde_json::to_string_pretty(summary)? + "\n",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_healers_and_faults_are_refused_with_what_there_is() {
        assert_eq!("monit".parse::<Healer>().unwrap(), Healer::Monit);
        let other = "systemd".parse::<Healer>().unwrap_err().to_string();
        assert!(
            other.contains("theriac, theriac_direct, without_prediction"),
            "{other}"
        );
        let fault = "earthquake".parse::<Trouble>().unwrap_err().to_string();
        assert!(fault.contains("kill9, hang"), "{fault}");
    }

    #[test]
    fn whose_turn_it_is_with_the_machine_comes_from_the_seed() {
        let order = |seed| {
            let mut healers = Healer::ALL;
            shuffle(&mut healers, seed);
            healers
        };
        let firsts: std::collections::BTreeSet<Healer> = (0..50).map(|seed| order(seed)[0]).collect();
        assert_eq!(
            firsts.len(),
            Healer::ALL.len(),
            "everybody is first at times: {firsts:?}"
        );
        assert_eq!(order(7), order(7));
    }

    #[tokio::test]
    async fn a_second_campaign_leaves_the_first_ones_directory_alone() {
        let out = tempfile::tempdir().unwrap();
        let held = std::fs::File::create(out.path().join("lock")).unwrap();
        held.lock().unwrap();
        std::fs::write(out.path().join("undo.json"), "{}").unwrap();
        let options = Options::slice(out.path().to_owned(), vec![Healer::Theriac], 1);
        let refused = run(&options).await.unwrap_err().to_string();
        assert!(refused.contains("another campaign writes into"), "{refused}");
        assert!(out.path().join("undo.json").exists());
    }

    #[test]
    fn a_machine_without_root_and_server_says_what_it_leaves_out() {
        let here = Machine {
            root: false,
            postgres: Err("no pg_ctl on PATH".to_owned()),
            redis: None,
            slow_disk: Err("it needs root".to_owned()),
            packet_loss: Err("it needs root".to_owned()),
        };
        let asked = Plan {
            faults: Trouble::ALL.to_vec(),
            healers: vec![Healer::Theriac],
            runs: 1,
            seed: 1,
        };
        let (plan, skipped) = possible(&asked, &here);
        assert!(plan.faults.contains(&Trouble::Kill9) && !plan.faults.contains(&Trouble::DiskFull));
        for fault in asked.faults.iter().filter(|fault| !plan.faults.contains(fault)) {
            let told = skipped.iter().find(|left_out| left_out.fault == fault.name());
            assert!(told.is_some_and(|told| !told.reason.is_empty()), "{fault}");
        }
    }

    #[test]
    fn a_campaign_goes_on_with_its_own_plan_and_with_no_other() {
        let out = tempfile::tempdir().unwrap();
        let plan = Plan {
            faults: vec![Trouble::Kill9, Trouble::Hang],
            healers: vec![Healer::Theriac],
            runs: 1,
            seed: 3,
        };
        let steps = plan.steps(Lane::Http);
        let log = RunLog {
            number: steps[0].number,
            fault: steps[0].fault,
            run: 1,
            ..RunLog::default()
        };
        let first = Journal::open(out.path(), &plan, false).unwrap();
        first.take(&plan, &steps[0], vec![log.clone()]).unwrap();
        // As when it is killed in the middle of a line.
        let path = out.path().join("runs.jsonl");
        let whole = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{whole}{{\"number\":2,")).unwrap();
        let again = Journal::open(out.path(), &plan, true).unwrap();
        assert_eq!(again.runs(), std::slice::from_ref(&log));
        assert!(again.has(&steps[0]) && !again.has(&steps[1]) && !again.is_whole(&plan));
        // With another healer a step is only there when both lines are.
        let both = Plan {
            healers: vec![Healer::Theriac, Healer::Monit],
            ..plan.clone()
        };
        let mut cut_off = vec![log.clone()];
        drop_cut_off(&mut cut_off, &both);
        assert!(cut_off.is_empty(), "its step comes again for both");
        let mut whole = vec![
            log.clone(),
            RunLog {
                healer: Healer::Monit,
                ..log.clone()
            },
        ];
        drop_cut_off(&mut whole, &both);
        assert_eq!(whole.len(), 2);
        let other = Plan {
            seed: 4,
            ..plan.clone()
        };
        let refused = Journal::open(out.path(), &other, true).unwrap_err().to_string();
        assert!(refused.contains("another plan"), "{refused}");
        assert!(Journal::open(out.path(), &plan, false).unwrap().runs().is_empty());
    }
}
