//! Kill −9 at every durable step of a training job: what is on record is never less than what was released.
//!
//! The job runs in a process of its own (this program again, with `THERIAC_CRASH_JOB` set), says each step on its standard output, and stops for good at
//! the chosen one, counted over all steps of the ledger and of the job itself (`theriac_privacy::failpoint`): half a record written, written and not
//! synced, and so on. There it is killed. Then the ledger is read and held to what was seen. Which step it is follows from a seed, and every step
//! comes before any comes twice. `THERIAC_CRASH_RUNS=500` makes the full number of runs; without it a smaller number keeps the test short.
//! `THERIAC_CRASH_SEED` takes another order.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on fails"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rand::SeedableRng as _;
use rand::seq::SliceRandom as _;
use rand_chacha::ChaCha8Rng;
use theriac_privacy::failpoint;
use theriac_privacy::ledger::{Ledger, ReleasePlan, ReservationId, Reserved, Spent};
use theriac_privacy::noise::ExactGaussian;
use theriac_privacy::policy::Policy;
use theriac_privacy::update::LocalUpdate;
use theriac_protocol::message::UpdateKind;
use theriac_protocol::units::{Digest, L2Norm, NodeId, NoiseMultiplier, Round, Timestamp};

const JOB: &str = "THERIAC_CRASH_JOB";
/// Number of the step at which the job stops for good.
const STOP_AT: &str = "THERIAC_CRASH_STOP_AT";
const ROUNDS_PER_JOB: u64 = 3;
/// Jobs in a row on one ledger; then a new one is begun, so that its beginning is a place to die at, too.
const JOBS_PER_LEDGER: usize = 8;

fn policy() -> Policy {
    Policy::parse("site = \"site-a\"\nepsilon = 8\nnoise_multiplier_min = 0.7\n").unwrap()
}

fn node() -> NodeId {
    NodeId::new("site-a").unwrap()
}

fn plan(round: u64) -> ReleasePlan {
    ReleasePlan {
        round: Round(round),
        nonce: round,
        kind: UpdateKind::Moments,
        values: 8,
        block_span: Duration::from_hours(1),
        blocks: vec![2 * round, 2 * round + 1],
        windows: None,
        sampling_rate: 1.0,
        steps: 1,
        clip_norm: L2Norm::new(1.0).unwrap(),
        noise_multiplier: NoiseMultiplier::new(1.5).unwrap(),
    }
}

fn ledger_path(dir: &Path) -> PathBuf {
    dir.join("ledger.log")
}

fn outbox_path(dir: &Path, round: u64) -> PathBuf {
    dir.join(format!("outbox-{round}"))
}

static STEPS: AtomicUsize = AtomicUsize::new(0);
static STOP: AtomicUsize = AtomicUsize::new(usize::MAX);

/// Counts a step; at the chosen one it says so and waits to be killed.
fn step(name: &'static str) {
    let number = STEPS.fetch_add(1, Ordering::Relaxed) + 1;
    if number == STOP.load(Ordering::Relaxed) {
        line(&format!("stop {name}"));
        // Nobody writes to our standard input: only the kill ends this.
        let _ended = std::io::stdin().read(&mut [0]);
    }
}

/// The job itself. As a test it does nothing; `kill_at_every_point…` starts it.
#[test]
fn the_job_that_is_killed() {
    let Some(dir) = std::env::var_os(JOB) else { return };
    let dir = PathBuf::from(dir);
    let number = |name: &str| std::env::var(name).unwrap().parse::<u64>().unwrap();
    STOP.store(usize::try_from(number(STOP_AT)).unwrap(), Ordering::Relaxed);
    failpoint::install(step);
    let first = number("THERIAC_CRASH_ROUND");
    let mut ledger = Ledger::open(&ledger_path(&dir), &node(), policy(), Timestamp(1)).unwrap();
    step("open");
    for round in first..first + ROUNDS_PER_JOB {
        take_part(&dir, &mut ledger, round);
    }
    line(&format!("done {}", STEPS.load(Ordering::Relaxed)));
}

/// One round as an edge does it: charge, read, clip, noise, outbox, mark, send. What was charged before sends the stored bytes or nothing.
fn take_part(dir: &Path, ledger: &mut Ledger, round: u64) {
    let id = plan(round).id();
    let reservation = match ledger.reserve(plan(round), Timestamp(round)).unwrap() {
        Reserved::Fresh(reservation) => reservation,
        Reserved::AlreadyCharged { .. } => {
            if let Ok(stored) = fs::read(outbox_path(dir, round)) {
                send_stored(ledger, id, &stored);
            }
            return;
        }
    };
    step("reserved");
    let layout = Digest::of(b"layout");
    let local = LocalUpdate::moments(reservation, layout, |blocks| {
        say("read", round, None);
        step("read");
        blocks.iter().map(|_| vec![0.1; 8]).collect()
    });
    let noisy = local.unwrap().clip().noise(&ExactGaussian).unwrap();
    let bytes = noisy.compress(|| 0.5).payload().to_vec();
    let (beside, place) = (dir.join("outbox.new"), outbox_path(dir, round));
    let mut file = fs::File::create(&beside).unwrap();
    file.write_all(&bytes).unwrap();
    step("outbox written");
    file.sync_all().unwrap();
    step("outbox synced");
    fs::rename(&beside, &place).unwrap();
    step("outbox in its place");
    fs::File::open(dir).unwrap().sync_all().unwrap();
    step("outbox directory synced");
    send_stored(ledger, id, &bytes);
}

fn send_stored(ledger: &mut Ledger, id: ReservationId, bytes: &[u8]) {
    ledger.mark_released(id, Digest::of(bytes), Timestamp(3)).unwrap();
    step("marked");
    say("send", id.round.0, Some(bytes));
    step("sent");
}

fn say(what: &str, round: u64, bytes: Option<&[u8]>) {
    let digest = bytes
        .map(|bytes| Digest::of(bytes).to_string())
        .unwrap_or_default();
    line(&format!("step {what} {round} {digest}"));
}

/// One line, written at once: what the outside world has seen even if the process dies right after.
fn line(text: &str) {
    std::io::stdout()
        .write_all(format!("\n{text}\n").as_bytes())
        .unwrap();
    std::io::stdout().flush().unwrap();
}

#[derive(Debug, Default)]
struct Seen {
    /// Rounds whose data were read, and what was sent for them.
    read: BTreeMap<u64, Option<String>>,
    next: u64,
}

#[test]
fn kill_at_every_point_never_loses_a_charge_and_the_next_job_goes_on() {
    if std::env::var_os(JOB).is_some() {
        return;
    }
    let from = |name: &str, other: usize| std::env::var(name).map_or(other, |text| text.parse().unwrap());
    let runs = from("THERIAC_CRASH_RUNS", 40);
    let seed = from("THERIAC_CRASH_SEED", 0x5eed_1ed9) as u64;
    eprintln!("seed {seed}, {runs} kills");
    let whole = tempfile::tempdir().unwrap();
    let Job { done, .. } = job(whole.path(), 1, usize::MAX);
    let mut points: Vec<usize> = (1..=done.expect("nobody killed it")).collect();
    points.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    let (mut killed, mut finished, mut reached) = (0, 0, BTreeSet::new());
    let (mut read, mut sent) = (0, 0);
    let mut run = 0_usize;
    while killed < runs {
        let dir = tempfile::tempdir().unwrap();
        let (mut seen, mut most) = (Seen::default(), None::<Spent>);
        seen.next = 1;
        let mut torn = false;
        for _ in 0..JOBS_PER_LEDGER {
            // A job that finds half a record cuts it off first: every second time it dies right there.
            let repairs = torn && run.is_multiple_of(2);
            let point = if repairs { 1 } else { points[run % points.len()] };
            run += 1;
            let job = job(dir.path(), seen.next, point);
            torn = job.stopped.as_deref() == Some("half an append");
            match job.stopped {
                Some(name) => {
                    killed += 1;
                    reached.insert(name);
                }
                // On a ledger that is there a job has fewer steps.
                None => finished += 1,
            }
            note(&mut seen, &job.lines);
            let what = format!("run {run}, step {point}, seed {seed}");
            most = Some(judge(dir.path(), &seen, most, &what));
        }
        // The last job is left alone and finishes.
        let last = job(dir.path(), seen.next, usize::MAX);
        assert!(last.done.is_some(), "{:?}", last.lines);
        note(&mut seen, &last.lines);
        judge(
            dir.path(),
            &seen,
            most,
            &format!("the last job after run {run}, seed {seed}"),
        );
        read += seen.read.len();
        sent += seen.read.values().flatten().count();
    }
    // Every kind of step, once every step had its turn.
    if runs >= 4 * points.len() {
        for name in STEP_NAMES {
            assert!(
                reached.contains(name),
                "no job was killed at `{name}`: {reached:?}"
            );
        }
    }
    eprintln!(
        "{killed} jobs killed at {} kinds of {} steps, {finished} had ended before; {read} rounds were read, {sent} sent",
        reached.len(),
        points.len()
    );
}

/// Where a job can stop.
const STEP_NAMES: [&str; 18] = [
    "cut",
    "begun beside",
    "begun and synced",
    "moved to its place",
    "directory synced",
    "before the append",
    "half an append",
    "appended",
    "synced",
    "open",
    "reserved",
    "read",
    "outbox written",
    "outbox synced",
    "outbox in its place",
    "outbox directory synced",
    "marked",
    "sent",
];

/// What became of a job.
struct Job {
    /// What the world has seen.
    lines: Vec<String>,
    /// The step that it was killed at.
    stopped: Option<String>,
    /// It ended by itself after so many steps.
    done: Option<usize>,
}

/// Starts the job, and kills it at the step of this number, should it come to it.
fn job(dir: &Path, round: u64, stop_at: usize) -> Job {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "the_job_that_is_killed",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(JOB, dir)
        .env("THERIAC_CRASH_ROUND", round.to_string())
        .env(STOP_AT, stop_at.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut job = Job {
        lines: Vec::new(),
        stopped: None,
        done: None,
    };
    // Held open: a closed standard input would wake the job up.
    let input = child.stdin.take();
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if let Some(name) = line.strip_prefix("stop ") {
            job.stopped = Some(name.to_owned());
            break;
        }
        job.done = line
            .strip_prefix("done ")
            .map(|steps| steps.parse().unwrap())
            .or(job.done);
        job.lines.extend(line.starts_with("step ").then_some(line));
    }
    // SIGKILL. It may have ended by itself.
    drop(child.kill());
    child.wait().unwrap();
    drop(input);
    assert!(
        job.stopped.is_some() || job.done.is_some(),
        "the job ended by a fault: {:?}",
        job.lines
    );
    job
}

fn note(seen: &mut Seen, lines: &[String]) {
    for line in lines {
        let mut words = line.split(' ').skip(1);
        let (Some(step), Some(round)) = (words.next(), words.next()) else {
            continue;
        };
        let Ok(round) = round.parse::<u64>() else { continue };
        match step {
            "read" => {
                let before = seen.read.insert(round, None);
                assert!(before.is_none(), "round {round}: data were read twice");
            }
            "send" => {
                let Some(digest) = words.next().filter(|digest| digest.len() == 64) else {
                    continue;
                };
                let sent = seen.read.get_mut(&round).expect("only what was read can be sent");
                assert!(
                    sent.as_deref().is_none_or(|before| before == digest),
                    "round {round}: other bytes were sent for the same charge"
                );
                *sent = Some(digest.to_owned());
                seen.next = seen.next.max(round + 1);
            }
            _ => {}
        }
    }
}

/// Reads the ledger after the crash and holds it to what was seen.
fn judge(dir: &Path, seen: &Seen, most: Option<Spent>, what: &str) -> Spent {
    // A copy, so that a torn record is still there for the next job.
    let place = tempfile::tempdir().unwrap();
    let copy = ledger_path(place.path());
    if ledger_path(dir).exists() {
        fs::copy(ledger_path(dir), &copy).unwrap();
    }
    let ledger = Ledger::open(&copy, &node(), policy(), Timestamp(1))
        .unwrap_or_else(|error| panic!("{what}: {error}"));
    let spent = ledger.spent();
    if let Some(most) = most {
        assert!(
            spent.releases >= most.releases && spent.records >= most.records,
            "{what}: it fell"
        );
        assert!(
            spent.epsilon_lifetime >= most.epsilon_lifetime,
            "{what}: the loss fell"
        );
    }
    for (round, sent) in &seen.read {
        let id = plan(*round).id();
        let charged = ledger.reservation(id);
        assert!(
            charged.is_some(),
            "{what}: round {round} was read and is not charged"
        );
        assert!(!ledger.is_chargeable(2 * round), "{what}: block of round {round}");
        if let Some(sent) = sent {
            let recorded = charged.flatten().map(|digest| digest.to_string());
            assert_eq!(recorded.as_ref(), Some(sent), "{what}: round {round}");
        }
    }
    assert!(
        spent.releases >= seen.read.len() as u64,
        "{what}: fewer charges than rounds read"
    );
    spent
}
