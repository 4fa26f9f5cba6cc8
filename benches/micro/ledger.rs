//! The privacy ledger: one durable charge, reading a year's file, and the figure of many blocks.

use std::error::Error;
use std::fs::File;
use std::hint::black_box;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use criterion::Criterion;
use rustix::time::{ClockId, clock_gettime};
use theriac_privacy::ledger::loss::Loss;
use theriac_privacy::ledger::{Ledger, ReleasePlan, Reserved};
use theriac_privacy::policy::Policy;
use theriac_privacy::report::{SealCheck, Trust, verify};
use theriac_protocol::message::UpdateKind;
use theriac_protocol::units::{Delta, Digest, L2Norm, NoiseMultiplier, Round, Timestamp};

/// A year of hourly releases, each a charge and its release, is 17 520 records.
const RECORDS: u64 = 10_000;
const BLOCKS: u64 = 1_000;
/// Charges and plain appends that take turns.
const TURNS: u64 = 300;

fn main() -> Result<(), Box<dyn Error>> {
    // Where the state directory would be: a memory file system says nothing about a disk.
    let folder = tempfile::tempdir_in(std::env::var_os("THERIAC_BENCH_DIR").unwrap_or_else(|| ".".into()))?;
    let policy = Policy::parse("site = \"site-a\"\nepsilon = 100.0\nblock_releases_max = 1000\n")?;
    let mut criterion = Criterion::default().configure_from_args().sample_size(50);

    let path = folder.path().join("append.log");
    let mut ledger = Ledger::open(&path, policy.site(), policy.clone(), Timestamp(1))?;
    let mut round = 0;
    criterion.bench_function("ledger/reserve_and_sync", |bencher| {
        bencher.iter(|| {
            round += 1;
            black_box(ledger.reserve(plan(round, vec![round], 2.0), Timestamp(round))).is_ok()
        });
    });
    drop(ledger);

    beside_the_disk(folder.path(), &policy)?;
    other_ways(folder.path())?;
    accountant()?;

    let path = year(folder.path(), &policy)?;
    let bytes = std::fs::metadata(&path)?.len();
    eprintln!("{RECORDS} records are {bytes} bytes");
    criterion.bench_function("ledger/open_10k_records", |bencher| {
        bencher.iter(|| Ledger::open(&path, policy.site(), policy.clone(), Timestamp(1)).is_ok());
    });
    let report = Ledger::report(&path, &policy, None, Timestamp(1))?;
    let text = serde_json::to_string(&report)?;
    let seals = |_: &_, _: &_| SealCheck::Wrong;
    let trust = Trust {
        policy_key: None,
        edge_key: None,
        known: None,
        seals: &seals,
    };
    criterion.bench_function("report/verify_10k_records", |bencher| {
        bencher.iter(|| verify(black_box(&text), &trust).is_ok());
    });

    let path = folder.path().join("blocks.log");
    let mut ledger = Ledger::open(&path, policy.site(), policy.clone(), Timestamp(1))?;
    for block in 0..BLOCKS {
        // Every block its own loss: nothing can be joined.
        let sigma = 2.0 + block as f64 / 1e3;
        let _reserved = ledger.reserve(plan(block + 1, vec![block], sigma), Timestamp(1))?;
    }
    criterion.bench_function("ledger/epsilon_of_1k_blocks", |bencher| {
        bencher.iter(|| black_box(&ledger).spent().epsilon);
    });
    criterion.final_summary();
    Ok(())
}

/// A charge beside what the disk itself asks for: as many bytes appended to a plain file and synced, taking turns. Medians of wall time, and of the CPU time of a
/// charge, which is what the ledger adds.
fn beside_the_disk(folder: &Path, policy: &Policy) -> Result<(), Box<dyn Error>> {
    let path = folder.join("turns.log");
    let mut ledger = Ledger::open(&path, policy.site(), policy.clone(), Timestamp(1))?;
    let mut plain = File::create(folder.join("plain"))?;
    let (mut charges, mut bare, mut cpu) = (Vec::new(), Vec::new(), Vec::new());
    let mut length = std::fs::metadata(&path)?.len();
    for round in 1..=TURNS {
        let (begun, begun_cpu) = (Instant::now(), cpu_time());
        let reserved = ledger.reserve(plan(round, vec![round], 2.0), Timestamp(round))?;
        charges.push(begun.elapsed());
        cpu.push(cpu_time().saturating_sub(begun_cpu));
        drop(reserved);
        let longer = std::fs::metadata(&path)?.len();
        let bytes = vec![7_u8; usize::try_from(longer - length)?];
        length = longer;
        let begun = Instant::now();
        plain.write_all(&bytes)?;
        plain.sync_data()?;
        bare.push(begun.elapsed());
    }
    let median = |times: &mut Vec<Duration>| {
        times.sort_unstable();
        times[times.len() / 2].as_secs_f64() * 1e3
    };
    let (charge, bare, cpu) = (median(&mut charges), median(&mut bare), median(&mut cpu));
    eprintln!(
        "a charge takes {charge:.3} ms, the same bytes appended and synced {bare:.3} ms ({:.2} times); {cpu:.3} ms of it are CPU time",
        charge / bare
    );
    Ok(())
}

/// The length of a charge's record.
const RECORD_BYTES: usize = 1_050;

/// Other ways to make as many bytes durable, taking turns: appended; written over zeros that were synced before; over space that was set aside; appended
/// through a file that syncs with every write; both at once.
fn other_ways(folder: &Path) -> Result<(), Box<dyn Error>> {
    use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, open};
    let room = RECORD_BYTES as u64 * (TURNS + 1);
    let mut appended = File::create(folder.join("appended"))?;
    let mut zeros = File::create(folder.join("zeros"))?;
    zeros.write_all(&vec![0; usize::try_from(room)?])?;
    zeros.sync_all()?;
    let mut zeros = File::options().write(true).open(folder.join("zeros"))?;
    let mut aside = File::create(folder.join("aside"))?;
    fallocate(&aside, FallocateFlags::empty(), 0, room)?;
    aside.sync_all()?;
    let synced = |name: &str| -> Result<File, Box<dyn Error>> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::DSYNC;
        Ok(File::from(open(
            folder.join(name),
            flags,
            Mode::RUSR | Mode::WUSR,
        )?))
    };
    let mut dsync = synced("dsync")?;
    std::fs::write(folder.join("both"), vec![0; usize::try_from(room)?])?;
    File::open(folder.join("both"))?.sync_all()?;
    let mut both = synced("both")?;
    let bytes = vec![7_u8; RECORD_BYTES];
    let mut times: [Vec<Duration>; 5] = Default::default();
    for _ in 0..TURNS {
        let mut timed = |way: usize, file: &mut File, sync: bool| -> std::io::Result<()> {
            let begun = Instant::now();
            file.write_all(&bytes)?;
            if sync {
                file.sync_data()?;
            }
            times[way].push(begun.elapsed());
            Ok(())
        };
        timed(0, &mut appended, true)?;
        timed(1, &mut zeros, true)?;
        timed(2, &mut aside, true)?;
        timed(3, &mut dsync, false)?;
        timed(4, &mut both, false)?;
    }
    let names = [
        "appended and fdatasync",
        "over zeros and fdatasync",
        "over space set aside and fdatasync",
        "appended with O_DSYNC",
        "over zeros with O_DSYNC",
    ];
    for (name, mut times) in names.into_iter().zip(times) {
        times.sort_unstable();
        let at = |share: usize| times[times.len() * share / 100].as_secs_f64() * 1e3;
        eprintln!("{name}: median {:.3} ms, p95 {:.3} ms", at(50), at(95));
    }
    Ok(())
}

/// As many figures as the reference has rows: 17 noise multipliers, 6 sampling rates, 3 numbers of steps.
fn accountant() -> Result<(), Box<dyn Error>> {
    let delta = Delta::new(1e-6)?;
    let begun = Instant::now();
    let mut rows = 0;
    for sigma in 0..17 {
        for rate in [1e-3, 3e-3, 0.01, 0.03, 0.1, 1.0] {
            for steps in [1, 100, 10_000] {
                let loss = Loss::gaussian(1.0, 0.5 + f64::from(sigma) * 0.5, rate, steps);
                rows += usize::from(black_box(loss.epsilon(delta).epsilon) >= 0.0);
            }
        }
    }
    eprintln!("{rows} RDP figures take {:.3} s", begun.elapsed().as_secs_f64());
    Ok(())
}

fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

/// A ledger of [`RECORDS`] records: charges of one block each, and their releases.
fn year(folder: &Path, policy: &Policy) -> Result<PathBuf, Box<dyn Error>> {
    let path = folder.join("year.log");
    let mut ledger = Ledger::open(&path, policy.site(), policy.clone(), Timestamp(1))?;
    let mut round = 0;
    while ledger.spent().records + 2 <= RECORDS {
        round += 1;
        let reserved = ledger.reserve(plan(round, vec![round], 2.0), Timestamp(round))?;
        if let Reserved::Fresh(reservation) = reserved {
            ledger.mark_released(
                reservation.id(),
                Digest::of(&round.to_le_bytes()),
                Timestamp(round),
            )?;
        }
    }
    Ok(path)
}

fn plan(round: u64, blocks: Vec<u64>, sigma: f64) -> ReleasePlan {
    #[expect(clippy::expect_used, reason = "constants in range")]
    let (clip_norm, noise_multiplier) = (
        L2Norm::new(588.0).expect("above 0"),
        NoiseMultiplier::new(sigma).expect("above 0"),
    );
    ReleasePlan {
        round: Round(round),
        nonce: round,
        kind: UpdateKind::Moments,
        values: 320,
        block_span: Duration::from_hours(1),
        blocks,
        windows: None,
        sampling_rate: 1.0,
        steps: 1,
        clip_norm,
        noise_multiplier,
    }
}
