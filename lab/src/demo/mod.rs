//! The main job on this machine: one aggregator and five edges as processes of their own, with certificates issued a
//! moment ago, real services under real load, real faults, and one edge that lies. It ends by itself.
//!
//! [`run`] reads as the demo goes: set up, learn, harm and heal, finish. [`record::Record`] is what was seen.

mod plan;
pub mod record;
pub mod report;
mod results;
pub(crate) mod stage;
mod summary;
pub(crate) mod trial;
pub(crate) mod view;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use self::plan::{FAULTS, FRUGAL, FRUGAL_RELEASES, HONEST, HOSTILE, Plan};
pub use self::plan::{SECONDS_DEFAULT, SECONDS_MAX, SECONDS_MIN, SECONDS_QUICK};
use self::record::Record;
use self::report::markup::counted;
pub use self::results::results;
pub use self::stage::DemoError;
use self::stage::{Member, Stage};
pub use self::summary::Summary;
use self::view::View;
use crate::attack::Attack;
use crate::fleet::place::{Centre, Site};
use crate::fleet::process::{Processes, end_leftovers};
use crate::fleet::{free_addresses, interruption};
use crate::traffic::Traffic;

/// How the demo is to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Where `report.html`, `summary.json` and `logs/` go.
    pub out: PathBuf,
    /// About how long it takes, brought into [`SECONDS_MIN`] to [`SECONDS_MAX`].
    pub seconds: u64,
    /// No live view even on a terminal.
    pub plain: bool,
    /// Keeps the processes' state directories.
    pub keep: bool,
}

/// What is left when the demo is over.
#[derive(Debug)]
pub struct Outcome {
    /// Everything seen.
    pub record: Record,
    /// The report.
    pub report: PathBuf,
    /// The state directories, where they were kept.
    pub state: Option<PathBuf>,
}

/// Runs the demo. It succeeded when [`Record::shortfalls`] is empty; the report is written in any case.
///
/// # Errors
/// [`DemoError`] when it could not go on: then every process is stopped and nothing is reported.
pub async fn run(options: &Options) -> Result<Outcome, DemoError> {
    let plan = Plan::new(options.seconds);
    let file = |what: &str| {
        let what = what.to_owned();
        move |error| DemoError::File(what, error)
    };
    std::fs::create_dir_all(&options.out).map_err(file("cannot make the output directory"))?;
    let out = std::fs::canonicalize(&options.out).map_err(file("cannot find the output directory"))?;
    let mut state = tempfile::Builder::new()
        .prefix("theriac-demo-")
        .tempdir()
        .map_err(file("no room for state"))?;
    state.disable_cleanup(options.keep);
    let root = std::fs::canonicalize(state.path()).map_err(file("no room for state"))?;
    let processes = Processes::new(&out.join("logs")).map_err(file("cannot make the log directory"))?;
    let (centre, sites) = places(&root).map_err(file("no free ports"))?;
    let view = View::open(options.plain, sites.len());
    let mut stage = Stage::new(
        processes,
        view,
        Some(centre.clone()),
        sites,
        plan.seconds,
        interruption(),
    );
    for edge in &mut stage.record.edges {
        edge.releases_max = releases_max(&edge.name);
    }
    stage.record.started = rfc3339(std::time::SystemTime::now());
    stage.record.machine = machine();
    ATTACK.description().clone_into(&mut stage.record.attack);
    stage.record.rule = Plan::rounds().rule.to_string();

    let played = play(&mut stage, &centre, plan).await;
    stage.say("stopping every process");
    let (mut record, mut processes, cast) = stage.end();
    let interrupted = matches!(played, Err(DemoError::Interrupted));
    finish(&mut record, &mut processes, cast, interrupted).await;
    played?;

    let report = out.join("report.html");
    std::fs::write(&report, report::render(&record)).map_err(file("cannot write report.html"))?;
    let summary = serde_json::to_string_pretty(&record.summary())
        .map_err(|error| file("cannot write summary.json")(error.into()))?;
    std::fs::write(out.join("summary.json"), summary + "\n").map_err(file("cannot write summary.json"))?;
    let kept = options.keep.then(|| state.path().to_owned());
    Ok(Outcome {
        record,
        report,
        state: kept,
    })
}

/// What the hostile edge of the demo does.
const ATTACK: Attack = Attack::SIGN_FLIP;
/// Requests a second against each service.
const REQUESTS_PER_S: f64 = 40.0;
/// Time for a command such as `init` or `join`.
const COMMAND_LIMIT: Duration = Duration::from_mins(1);
/// Time that the processes have to end when asked.
const STOP_GRACE: Duration = Duration::from_secs(30);
/// Updates of honest edges that may come after the end of their round.
const LATE_MAX: u64 = 2;
/// Time that they have to open their pages and find one another.
const START_LIMIT: Duration = Duration::from_mins(1);
/// Name of the federation.
const FEDERATION: &str = "demo";

async fn play(stage: &mut Stage, centre: &Centre, plan: Plan) -> Result<(), DemoError> {
    set_up(stage, centre, plan).await?;
    let began = |stage: &Stage| {
        stage
            .cast
            .iter()
            .all(|member| member.is_connected() && member.is_steady())
    };
    if !stage
        .until("starting one aggregator and five edges", START_LIMIT, began)
        .await?
    {
        stage.fall_short("not every edge was connected with a healthy service within a minute".to_owned());
    }
    stage.say("every edge is connected; load on every service begins");
    for (seed, member) in (1..).zip(&mut stage.cast) {
        member.traffic = Some(Traffic::start(member.site.service, REQUESTS_PER_S, seed));
    }
    let learnt = |stage: &Stage| stage.cast.iter().all(Member::is_watching);
    let limit = Duration::from_secs_f64(plan.seconds * 0.3) + Duration::from_secs(30);
    if !stage.until("learning what is normal", limit, learnt).await? {
        stage.fall_short(format!(
            "not every edge had learnt what is normal within {} s",
            limit.as_secs()
        ));
    }
    for (fault, index) in FAULTS {
        let next = Instant::now() + plan.spacing;
        trial::run(stage, index, fault, plan.heal_limit).await?;
        let calm = |_: &Stage| Instant::now() >= next;
        stage.until("watching", plan.spacing, calm).await?;
    }
    let rounds = |stage: &Stage| {
        let refused = stage.record.refusals().1 > 0;
        let frugal = stage
            .record
            .edges
            .iter()
            .any(|edge| edge.budget_spent_s.is_some());
        stage.record.rounds_published() > 0 && refused && frugal
    };
    stage
        .until("waiting for rounds", Duration::from_secs(25), rounds)
        .await?;
    let end = Instant::now() + plan.calm;
    stage
        .until("a last look", plan.calm, |_| Instant::now() >= end)
        .await?;
    judge(stage);
    Ok(())
}

/// Makes the authorities, enrols every edge through the real join flow, and starts the processes.
async fn set_up(stage: &mut Stage, centre: &Centre, plan: Plan) -> Result<(), DemoError> {
    let file = |error| DemoError::File("cannot write a configuration".to_owned(), error);
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let (directory, configuration) = (text(&centre.dir), text(&centre.config()));
    let init = [
        "__aggregator",
        "init",
        "--dir",
        &directory,
        "--federation",
        FEDERATION,
    ];
    stage.processes.run("aggregator-init", init, COMMAND_LIMIT)?;
    centre
        .configure(FEDERATION, Plan::rounds(), Plan::model())
        .map_err(file)?;
    stage.say("two authorities, an identity for the aggregator, and its store are made");
    stage.processes.start(
        "aggregator",
        ["__aggregator", "serve", "--config", &configuration],
    )?;
    let page = centre.page;
    let client = stage.client.clone();
    let deadline = Instant::now() + START_LIMIT;
    while client.json::<serde_json::Value>(page, "/status").await.is_err() {
        stage.processes.check()?;
        if Instant::now() > deadline {
            return Err(DemoError::Unexpected(
                "the aggregator did not open its page within a minute".to_owned(),
            ));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let program = stage.processes.program().to_owned();
    for index in 0..stage.cast.len() {
        let (site, hostile) = (stage.cast[index].site.clone(), stage.cast[index].hostile);
        site.write(&program, plan.edge_terms()).map_err(file)?;
        site.write_privacy(Plan::block(), releases_max(&site.name))
            .map_err(file)?;
        let create = [
            "__aggregator",
            "token",
            "create",
            "--config",
            &configuration,
            "--site",
            &site.name,
            "--format",
            "json",
        ];
        let token = stage
            .processes
            .run(&format!("{}-token", site.name), create, COMMAND_LIMIT)?;
        let token = read_token(&token)?;
        let (edge, join) = (text(&site.config()), centre.join.to_string());
        let join = [
            "__edge",
            "join",
            "--config",
            &edge,
            "--aggregator",
            &join,
            "--token",
            &token,
        ];
        stage
            .processes
            .run(&format!("{}-join", site.name), join, COMMAND_LIMIT)?;
        if hostile {
            let run = [
                "hostile-edge",
                "--follow-parent",
                "--config",
                &edge,
                "--attack",
                &ATTACK.name(),
            ];
            stage.processes.start(&site.name, run)?;
        } else {
            stage
                .processes
                .start(&site.name, ["__edge", "run", "--config", &edge])?;
        }
        stage.say(&format!("{} joined with its own key and runs", site.name));
    }
    Ok(())
}

/// Says what the demo should have shown and did not.
fn judge(stage: &mut Stage) {
    if stage.record.rounds_published() == 0 {
        stage.fall_short("no round published a model".to_owned());
    }
    let (honest, hostile) = stage.record.refusals();
    if hostile == 0 {
        stage.fall_short(format!("no update of the hostile edge {HOSTILE} was refused"));
    }
    // A busy machine may let one come too late; more of them are something else.
    let late = stage.record.honest_late();
    if honest > late || late > LATE_MAX {
        stage.fall_short(format!(
            "{} of honest edges were refused",
            counted(honest, "update")
        ));
    }
    if stage
        .record
        .edges
        .iter()
        .all(|edge| edge.budget_spent_s.is_none())
    {
        stage.fall_short(format!(
            "{FRUGAL} did not stop training although its budget is {FRUGAL_RELEASES} releases"
        ));
    }
}

/// Stops load and processes, and looks for anything left behind.
async fn finish(record: &mut Record, processes: &mut Processes, cast: Vec<Member>, interrupted: bool) {
    let program = processes.program().to_owned();
    let mut states = Vec::new();
    for member in cast {
        states.push(member.site.service_state());
        let Some(traffic) = member.traffic.filter(|_| !interrupted) else {
            continue;
        };
        let seen = traffic.stop().await;
        if seen.lost_writes > 0 {
            let lost = counted(seen.lost_writes, "acknowledged write");
            record.shortfalls.push(format!(
                "{} of the service of {} were lost",
                lost, member.site.name
            ));
        }
    }
    for name in processes.stop_all(STOP_GRACE) {
        record.shortfalls.push(format!(
            "{name} did not end within {} s when asked",
            STOP_GRACE.as_secs()
        ));
    }
    let left: usize = states.iter().map(|state| end_leftovers(&program, state)).sum();
    if left > 0 {
        record.shortfalls.push(format!(
            "{} outlived their edges and were stopped",
            counted(left as u64, "service")
        ));
    }
}

fn places(root: &Path) -> std::io::Result<(Centre, Vec<(Site, bool)>)> {
    let mut free = free_addresses(3 * (HONEST.len() + 2))?.into_iter();
    let mut three = || std::array::from_fn(|_| free.next().unwrap_or_else(|| ([127, 0, 0, 1], 0).into()));
    let centre = Centre::new(root, three());
    let names = HONEST.iter().map(|name| (*name, false)).chain([(HOSTILE, true)]);
    let sites = names
        .map(|(name, hostile)| (Site::new(root, name, three()), hostile))
        .collect();
    Ok((centre, sites))
}

/// The limit on releases in the policy of the site with the small budget.
fn releases_max(site: &str) -> Option<u64> {
    (site == FRUGAL).then_some(FRUGAL_RELEASES)
}

/// A token out of what `token create --format json` printed.
fn read_token(printed: &str) -> Result<String, DemoError> {
    let json: serde_json::Value = serde_json::from_str(printed).unwrap_or_default();
    let token = json.get("token").and_then(serde_json::Value::as_str);
    token
        .map(str::to_owned)
        .ok_or_else(|| DemoError::Unexpected("`token create` printed no token".to_owned()))
}

/// This machine in one line.
pub(crate) fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let memory = memory_gib()
        .map(|gib| format!(", {gib:.0} GiB"))
        .unwrap_or_default();
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let kernel = kernel
        .split(['-', '+'])
        .next()
        .unwrap_or_default()
        .trim()
        .to_owned();
    format!("{}{memory}, Linux {kernel}", counted(cores as u64, "core"))
}

fn memory_gib() -> Option<f64> {
    use procfs::Current as _;
    let memory = procfs::Meminfo::current().ok()?;
    Some(memory.mem_total as f64 / f64::from(1 << 30))
}

pub(crate) fn rfc3339(moment: std::time::SystemTime) -> String {
    humantime::format_rfc3339_seconds(moment).to_string()
}
