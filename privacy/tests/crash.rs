//! Kill −9 at every point of a training job: what is on record is never less than what was released.
//!
//! The job runs in a process of its own (this program again, with `THERIAC_CRASH_JOB` set), says each step on its standard output, and is killed:
//! after a chosen step, or at a random moment. Then the ledger is read and held to what was seen. `THERIAC_CRASH_RUNS=500` makes the
//! full number of runs; without it a smaller number keeps the test short.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on fails"
)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use theriac_privacy::ledger::{Ledger, ReleasePlan, ReservationId, Reserved, Spent};
use theriac_privacy::noise::ExactGaussian;
use theriac_privacy::policy::Policy;
use theriac_privacy::update::LocalUpdate;
use theriac_protocol::message::UpdateKind;
use theriac_protocol::units::{Digest, L2Norm, NodeId, NoiseMultiplier, Round, Timestamp};

const JOB: &str = "THERIAC_CRASH_JOB";
/// The job's steps, in order, for each round.
const STEPS: [&str; 6] = ["open", "reserve", "read", "store", "mark", "send"];
const ROUNDS_PER_JOB: u64 = 3;

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

/// The job itself. As a test it does nothing; `kill_at_every_point…` starts it.
#[test]
fn the_job_that_is_killed() {
    let Some(dir) = std::env::var_os(JOB) else { return };
    let dir = PathBuf::from(dir);
    let first: u64 = std::env::var("THERIAC_CRASH_ROUND").unwrap().parse().unwrap();
    let mut ledger = Ledger::open(&ledger_path(&dir), &node(), policy(), Timestamp(1)).unwrap();
    say("open", first, None);
    for round in first..first + ROUNDS_PER_JOB {
        take_part(&dir, &mut ledger, round);
    }
    say("done", first, None);
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
    say("reserve", round, None);
    let layout = Digest::of(b"layout");
    let local = LocalUpdate::moments(reservation, layout, |blocks| {
        say("read", round, None);
        blocks.iter().map(|_| vec![0.1; 8]).collect()
    });
    let noisy = local.unwrap().clip().noise(&ExactGaussian).unwrap();
    let bytes = noisy.compress(|| 0.5).payload().to_vec();
    let (beside, place) = (dir.join("outbox.new"), outbox_path(dir, round));
    let mut file = fs::File::create(&beside).unwrap();
    file.write_all(&bytes).unwrap();
    file.sync_all().unwrap();
    fs::rename(&beside, &place).unwrap();
    fs::File::open(dir).unwrap().sync_all().unwrap();
    say("store", round, Some(&bytes));
    send_stored(ledger, id, &bytes);
}

fn send_stored(ledger: &mut Ledger, id: ReservationId, bytes: &[u8]) {
    ledger.mark_released(id, Digest::of(bytes), Timestamp(3)).unwrap();
    say("mark", id.round.0, None);
    say("send", id.round.0, Some(bytes));
}

/// One line, written at once: what the outside world has seen even if the process dies right after.
fn say(step: &str, round: u64, bytes: Option<&[u8]>) {
    let digest = bytes
        .map(|bytes| Digest::of(bytes).to_string())
        .unwrap_or_default();
    let line = format!("\nstep {step} {round} {digest}\n");
    std::io::stdout().write_all(line.as_bytes()).unwrap();
    std::io::stdout().flush().unwrap();
}

/// When the job is killed.
#[derive(Debug, Clone, Copy)]
enum Kill {
    /// As soon as so many steps were said.
    AfterSteps(usize),
    /// So long after its start.
    After(Duration),
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
    let runs: usize = std::env::var("THERIAC_CRASH_RUNS").map_or(40, |runs| runs.parse().unwrap());
    let seed = 0x5eed_1ed9;
    eprintln!("seed {seed}, {runs} runs");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let (mut seen, mut most) = (Seen::default(), None::<Spent>);
    seen.next = 1;
    let every_point = STEPS.len() * usize::try_from(ROUNDS_PER_JOB).unwrap();
    for run in 0..runs {
        let kill = if run % 2 == 0 {
            Kill::AfterSteps(1 + (run / 2) % every_point)
        } else {
            Kill::After(Duration::from_micros(rng.random_range(500..40_000)))
        };
        let lines = killed_job(dir.path(), seen.next, kill);
        note(&mut seen, &lines);
        most = Some(judge(dir.path(), &seen, most, run, kill));
    }
    // The last job is left alone and finishes.
    let lines = killed_job(dir.path(), seen.next, Kill::AfterSteps(usize::MAX));
    assert!(
        lines.iter().any(|line| line.starts_with("step done")),
        "{lines:?}"
    );
    note(&mut seen, &lines);
    judge(dir.path(), &seen, most, runs, Kill::AfterSteps(usize::MAX));
    eprintln!(
        "{} rounds were read, {} sent",
        seen.read.len(),
        seen.read.values().flatten().count()
    );
}

/// Starts the job, kills it, and gives every line that it wrote before.
fn killed_job(dir: &Path, round: u64, kill: Kill) -> Vec<String> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "the_job_that_is_killed",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(JOB, dir)
        .env("THERIAC_CRASH_ROUND", round.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let lines = match kill {
        Kill::AfterSteps(steps) => {
            let mut lines = Vec::new();
            while lines.len() < steps {
                let mut line = String::new();
                if out.read_line(&mut line).unwrap() == 0 {
                    break;
                }
                lines.extend(step(&line));
            }
            end(&mut child);
            lines
        }
        Kill::After(after) => {
            std::thread::sleep(after);
            end(&mut child);
            Vec::new()
        }
    };
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    lines.into_iter().chain(rest.lines().filter_map(step)).collect()
}

fn step(line: &str) -> Option<String> {
    // A line that was cut in the middle by the kill says nothing.
    let line = line.trim_end();
    line.starts_with("step ").then(|| line.to_owned())
}

fn end(child: &mut Child) {
    // SIGKILL. It may have ended by itself.
    drop(child.kill());
    child.wait().unwrap();
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
fn judge(dir: &Path, seen: &Seen, most: Option<Spent>, run: usize, kill: Kill) -> Spent {
    let what = format!("run {run}, {kill:?}");
    let ledger = Ledger::open(&ledger_path(dir), &node(), policy(), Timestamp(1))
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
