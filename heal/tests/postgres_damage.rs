//! Seeded damage against whole copies, many times over: every damaged copy is refused, every good one is kept.
//!
//! `THERIAC_CHECKPOINT_TRIALS=200` makes the long run whose figures docs/checkpoints.md states (200 damaged, 200 good, and 200 more
//! damaged ones whose manifest was made to agree); `THERIAC_SEED` repeats one.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails, and the long run tells its figures"
)]

mod support;

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use support::{Cluster, forge_manifest};
use theriac_heal::checkpoint::store::CheckpointError;

const KINDS: [&str; 5] = [
    "page flip",
    "truncation",
    "missing WAL",
    "wrong version",
    "imbalance",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_copies_are_refused_and_good_ones_are_not() {
    let trials: usize = number("THERIAC_CHECKPOINT_TRIALS").unwrap_or(6);
    let good = number("THERIAC_CHECKPOINT_TRIALS").unwrap_or(2);
    let past = number("THERIAC_CHECKPOINT_TRIALS").unwrap_or(0);
    let seed: u64 = number("THERIAC_SEED").unwrap_or_else(|| {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap();
        u64::from(now.subsec_nanos())
    });
    println!("seed {seed}");
    let mut random = Random(seed);
    let cluster = Cluster::start(true, &[]);
    let balances = cluster.fill(1);
    let source = cluster.source(vec![balances]);
    let mut refused: BTreeMap<(&str, String), usize> = BTreeMap::new();
    let mut missed = Vec::new();
    for trial in 0..trials + past {
        let forged = trial >= trials;
        let kind = KINDS[trial % if forged { 4 } else { 5 }];
        let store = cluster.store_named(&format!("store-{trial}"), 1);
        let undo = (kind == "imbalance").then(|| imbalance(&cluster, &mut random));
        let taken = source.receive(&store).await.unwrap();
        let what = match kind {
            "page flip" => flip(&taken.data, &mut random),
            "truncation" => truncate(&taken.data, &mut random),
            "missing WAL" => remove_wal(&taken.data),
            "wrong version" => wrong_version(&taken.data, &mut random),
            _ => "a balance of the primary".to_owned(),
        };
        if forged {
            forge_manifest(&taken.data);
        }
        let label = if forged {
            "past the manifest"
        } else {
            "whole check"
        };
        match source.prove(&store, taken, 1).await {
            Err(CheckpointError::Invalid { reason, .. }) => {
                let by = reason.split(':').next().unwrap_or_default().to_owned();
                *refused.entry((label, format!("{kind}, by {by}"))).or_default() += 1;
                assert!(store.list().unwrap().is_empty());
            }
            Err(CheckpointError::Unproven { detail, .. }) => {
                *refused
                    .entry((label, format!("{kind}, not proved: {detail:.60}")))
                    .or_default() += 1;
            }
            Err(other) => panic!("trial {trial}, {kind}, {what}, seed {seed}: {other}"),
            Ok(_) if forged => {
                *refused
                    .entry((label, format!("{kind}: NOT refused")))
                    .or_default() += 1;
                println!("trial {trial}: passed with {kind} of {what}");
            }
            Ok(_) => missed.push(format!("trial {trial}: {kind} of {what}")),
        }
        if let Some(undo) = undo {
            cluster.psql(&undo);
        }
        fs::remove_dir_all(store.dir()).unwrap();
    }
    assert!(missed.is_empty(), "seed {seed}: not refused: {missed:?}");
    let mut load = cluster.pgbench(&["-c", "2", "-T", "100000"]);
    let store = cluster.store_named("good", 1);
    for trial in 0..good {
        let kept = source.take(&store, u64::try_from(trial).unwrap()).await;
        assert!(kept.is_ok(), "good trial {trial}, seed {seed}: {kept:?}");
    }
    load.kill().unwrap();
    load.wait().unwrap();
    println!("{trials} damaged and refused, {good} good and kept");
    for ((label, what), count) in refused {
        println!("{label}: {count} {what}");
    }
}

/// One bit of one file of a relation.
fn flip(data: &Path, random: &mut Random) -> String {
    let path = random.relation(data, 8192);
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let at = random.below(file.metadata().unwrap().len());
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    let flipped = byte[0] ^ (1 << random.below(8));
    file.write_all_at(&[flipped], at).unwrap();
    format!("byte {at} of {}", path.display())
}

fn truncate(data: &Path, random: &mut Random) -> String {
    let path = random.relation(data, 8192);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    let to = random.below(file.metadata().unwrap().len());
    file.set_len(to).unwrap();
    format!("{} to {to}", path.display())
}

fn remove_wal(data: &Path) -> String {
    for entry in fs::read_dir(data.join("pg_wal")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::remove_file(path).unwrap();
        }
    }
    "all".to_owned()
}

fn wrong_version(data: &Path, random: &mut Random) -> String {
    let other = random.below(14) + 1;
    fs::write(data.join("PG_VERSION"), format!("{other}\n")).unwrap();
    format!("{other}")
}

/// Changes one account; the statement that takes it back.
fn imbalance(cluster: &Cluster, random: &mut Random) -> String {
    let (account, amount) = (random.below(100_000) + 1, random.below(5_000) + 1);
    cluster.psql(&format!(
        "update pgbench_accounts set abalance = abalance + {amount} where aid = {account}"
    ));
    format!("update pgbench_accounts set abalance = abalance - {amount} where aid = {account}")
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % bound
    }

    /// A file of a relation of at least `least` bytes.
    fn relation(&mut self, data: &Path, least: u64) -> PathBuf {
        let mut files: Vec<PathBuf> = Vec::new();
        for database in fs::read_dir(data.join("base")).unwrap() {
            for file in fs::read_dir(database.unwrap().path()).unwrap() {
                let file = file.unwrap();
                let named = file
                    .file_name()
                    .to_string_lossy()
                    .starts_with(|letter: char| letter.is_ascii_digit());
                if named && file.metadata().unwrap().len() >= least {
                    files.push(file.path());
                }
            }
        }
        files.sort();
        files.swap_remove(usize::try_from(self.below(files.len() as u64)).unwrap())
    }
}

fn number<T: std::str::FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok()?.parse().ok()
}
