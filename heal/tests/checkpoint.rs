//! Checkpoints against a disk that holds what a crash left, what rot changed, and no room.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking and names what it left out"
)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use theriac_heal::background::Background;
use theriac_heal::checkpoint::state_check::StateCheck;
use theriac_heal::checkpoint::store::{CheckpointError, CheckpointStore, StoreLimits, free_bytes};
use theriac_heal::executor::service::ServiceState;

struct Place {
    dir: TempDir,
    limits: StoreLimits,
}

impl Place {
    fn new() -> Self {
        let place = Self {
            dir: tempfile::tempdir().unwrap(),
            limits: StoreLimits {
                free_bytes_min: 0,
                ..StoreLimits::default()
            },
        };
        let state = place.state();
        fs::create_dir_all(state.join("deep/er")).unwrap();
        fs::write(state.join("empty"), "").unwrap();
        fs::write(state.join("log"), vec![7_u8; 100_000]).unwrap();
        fs::write(state.join("deep/er/table"), "one").unwrap();
        fs::set_permissions(state.join("deep/er/table"), fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("deep/er/table", state.join("current")).unwrap();
        place
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn store(&self) -> CheckpointStore {
        CheckpointStore::open(&self.dir.path().join("checkpoints"), self.limits).unwrap()
    }

    fn write(&self, content: &str) {
        fs::write(self.state().join("deep/er/table"), content).unwrap();
    }

    fn read(&self) -> String {
        fs::read_to_string(self.state().join("deep/er/table")).unwrap()
    }

    fn names(&self) -> Vec<String> {
        names(self.dir.path())
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Every path under `dir` with what it is: mode, and content or link target.
fn content(dir: &Path) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut open = vec![dir.to_owned()];
    while let Some(path) = open.pop() {
        let metadata = path.symlink_metadata().unwrap();
        let bytes = if metadata.is_symlink() {
            fs::read_link(&path)
                .unwrap()
                .into_os_string()
                .into_encoded_bytes()
        } else if metadata.is_dir() {
            open.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            Vec::new()
        } else {
            fs::read(&path).unwrap()
        };
        found.insert(
            path.strip_prefix(dir).unwrap().to_owned(),
            (metadata.mode(), bytes),
        );
    }
    found
}

fn files(dir: &Path) -> Vec<PathBuf> {
    content(dir)
        .into_keys()
        .map(|path| dir.join(path))
        .filter(|p| p.symlink_metadata().unwrap().is_file())
        .collect()
}

#[test]
fn a_restored_state_equals_the_one_that_was_taken_and_the_replaced_one_is_kept() {
    let place = Place::new();
    let taken = content(&place.state());
    let checkpoint = place.store().take(&place.state(), 5).unwrap();
    assert_eq!(
        (
            checkpoint.sequence,
            checkpoint.unix_ms,
            checkpoint.files,
            checkpoint.bytes
        ),
        (1, 5, 3, 100_003)
    );
    place.write("broken");
    fs::remove_file(place.state().join("log")).unwrap();
    let broken = content(&place.state());
    let restored = place.store().restore(&place.state()).unwrap();
    assert_eq!(content(&place.state()), taken);
    assert_eq!(content(&restored.replaced.unwrap()), broken);
    assert_eq!(place.names(), ["checkpoints", "state", "state.replaced-1"]);
}

#[test]
fn a_missing_state_is_restored_too() {
    let place = Place::new();
    let taken = content(&place.state());
    place.store().take(&place.state(), 5).unwrap();
    fs::remove_dir_all(place.state()).unwrap();
    let restored = place.store().restore(&place.state()).unwrap();
    assert_eq!((restored.replaced, content(&place.state())), (None, taken));
}

#[test]
fn the_newest_is_found_by_its_number_whatever_the_clock_said_and_the_oldest_go() {
    let place = Place::new();
    for (round, unix_ms) in [900, 50, 700, 3].into_iter().enumerate() {
        place.write(&format!("round {round}"));
        place.store().take(&place.state(), unix_ms).unwrap();
    }
    let kept: Vec<u64> = place
        .store()
        .list()
        .unwrap()
        .iter()
        .map(|checkpoint| checkpoint.sequence)
        .collect();
    assert_eq!(kept, [4, 3, 2]);
    place.write("broken");
    place.store().restore(&place.state()).unwrap();
    assert_eq!(place.read(), "round 3");
}

#[test]
fn every_kind_of_damage_is_refused_set_aside_and_the_one_before_is_restored() {
    type Damage = (&'static str, fn(&Path));
    let damages: [Damage; 8] = [
        ("flipped bit", |path| {
            let mut bytes = fs::read(path.join("tree/log")).unwrap();
            bytes[54_321] ^= 4;
            fs::write(path.join("tree/log"), bytes).unwrap();
        }),
        ("cut file", |path| {
            fs::OpenOptions::new()
                .write(true)
                .open(path.join("tree/log"))
                .unwrap()
                .set_len(99_999)
                .unwrap();
        }),
        ("missing file", |path| {
            fs::remove_file(path.join("tree/empty")).unwrap();
        }),
        ("extra file", |path| {
            fs::write(path.join("tree/deep/extra"), "x").unwrap();
        }),
        ("file become a folder", |path| {
            fs::remove_file(path.join("tree/empty")).unwrap();
            fs::create_dir(path.join("tree/empty")).unwrap();
        }),
        ("other link", |path| {
            fs::remove_file(path.join("tree/current")).unwrap();
            std::os::unix::fs::symlink("/etc/passwd", path.join("tree/current")).unwrap();
        }),
        ("no manifest", |path| {
            fs::remove_file(path.join("MANIFEST")).unwrap();
        }),
        ("no tree", |path| fs::remove_dir_all(path.join("tree")).unwrap()),
    ];
    for (name, damage) in damages {
        let place = Place::new();
        place.write("good");
        place.store().take(&place.state(), 1).unwrap();
        place.write("better");
        let newest = place.store().take(&place.state(), 2).unwrap();
        damage(&newest.path);
        assert!(
            matches!(place.store().verify(2), Err(CheckpointError::Corrupt { .. })),
            "{name} was taken"
        );
        assert!(
            matches!(
                place.store().restore_sequence(2, &place.state()),
                Err(CheckpointError::Corrupt { .. })
            ),
            "{name} was restored"
        );
        assert_eq!(
            place.read(),
            "better",
            "{name}: a refused restore changed the state"
        );
        let restored = place.store().restore(&place.state()).unwrap();
        assert_eq!(
            (restored.checkpoint.sequence, place.read().as_str()),
            (1, "good"),
            "{name}"
        );
        assert_eq!(restored.quarantined.len(), 1, "{name}");
        assert!(
            restored.quarantined[0].exists(),
            "{name}: a corrupt checkpoint is kept for a person"
        );
        // The number of the one set aside is not given again.
        assert_eq!(
            place.store().take(&place.state(), 3).unwrap().sequence,
            3,
            "{name}"
        );
    }
}

#[test]
fn one_that_cannot_be_read_is_passed_over_and_stays() {
    let place = Place::new();
    place.write("good");
    place.store().take(&place.state(), 1).unwrap();
    let newest = place.store().take(&place.state(), 2).unwrap();
    // A read error, whoever reads.
    let manifest = newest.path.join("MANIFEST");
    fs::rename(&manifest, newest.path.join("away")).unwrap();
    fs::create_dir(&manifest).unwrap();
    place.write("broken");
    let restored = place.store().restore(&place.state()).unwrap();
    assert_eq!((restored.checkpoint.sequence, place.read().as_str()), (1, "good"));
    assert!(restored.quarantined.is_empty() && newest.path.exists());
    let words = restored.to_string();
    assert!(
        words.contains("could not be read") && words.contains("MANIFEST"),
        "{words}"
    );
    // With no other one the error is told.
    fs::remove_dir_all(&restored.checkpoint.path).unwrap();
    let none = place.store().restore(&place.state()).unwrap_err().to_string();
    assert!(
        none.contains("1 were refused") && none.contains("MANIFEST"),
        "{none}"
    );
    assert_eq!(place.read(), "good");
}

#[test]
fn a_place_that_takes_no_copy_is_no_fault_of_the_checkpoint() {
    let place = Place::new();
    place.write("one");
    place.store().take(&place.state(), 1).unwrap();
    place.write("two");
    place.store().take(&place.state(), 2).unwrap();
    // A file where the restore is written: neither of them is to blame.
    let nowhere = place.state().join("log/state");
    let error = place.store().restore(&nowhere).unwrap_err();
    assert!(matches!(&error, CheckpointError::Io { .. }), "{error}");
}

#[test]
fn only_what_can_be_restored_counts_as_kept() {
    let mut place = Place::new();
    place.limits.keep = 2;
    for (unix_ms, words) in (1..).zip(["one", "two"]) {
        place.write(words);
        place.store().take(&place.state(), unix_ms).unwrap();
    }
    let newest = place.store().list().unwrap().swap_remove(0);
    fs::remove_file(newest.path.join("MANIFEST")).unwrap();
    place.store().take(&place.state(), 3).unwrap();
    let listed = |store: &CheckpointStore| -> Vec<u64> {
        store.list().unwrap().iter().map(|found| found.sequence).collect()
    };
    assert_eq!(
        listed(&place.store()),
        [3, 2, 1],
        "one of two that count is left of before"
    );
    assert_eq!(place.store().restorable().unwrap().len(), 2);
    place.store().take(&place.state(), 4).unwrap();
    assert_eq!(listed(&place.store()), [4, 3]);
    // Where a proof is needed one without does not count either.
    place.limits.needs_proof = true;
    assert!(place.store().restorable().unwrap().is_empty());
}

#[tokio::test]
async fn what_was_damaged_since_it_was_taken_is_set_aside_when_it_is_read_again() {
    let place = Place::new();
    let store = std::sync::Arc::new(place.store());
    let background = Background::new(0, None);
    let taken: Vec<_> = ["one", "two", "three"]
        .iter()
        .zip(1..)
        .map(|(words, ms)| {
            place.write(words);
            store.take(&place.state(), ms).unwrap()
        })
        .collect();
    fs::remove_file(taken[1].path.join("tree/empty")).unwrap();
    let mut found = Vec::new();
    for checkpoint in &taken {
        found.push(store.scrub(checkpoint, &background, || {}).await.unwrap());
    }
    let what = found[1].clone().unwrap();
    assert!(what.contains("tree/empty is missing"), "{what}");
    assert_eq!((&found[0], &found[2]), (&None, &None));
    let left: Vec<u64> = store.list().unwrap().iter().map(|of| of.sequence).collect();
    assert_eq!(left, [3, 1]);
    assert_eq!(store.set_aside_copies().unwrap()[0].reason, what);
    // One that is gone is not damaged.
    assert_eq!(store.scrub(&taken[1], &background, || {}).await.unwrap(), None);
    // Where no more may be set aside it stays, and that is an error.
    let full = store.dir().join("quarantine");
    for number in 0..8 {
        fs::create_dir_all(full.join(format!("other-{number}"))).unwrap();
    }
    fs::remove_file(taken[0].path.join("MANIFEST")).unwrap();
    assert!(matches!(
        store.scrub(&taken[0], &background, || {}).await,
        Err(CheckpointError::TooManySetAside { found: 9, max: 8, .. })
    ));
    assert!(taken[0].path.exists());
}

#[test]
fn the_last_copy_from_before_a_state_lost_nearly_all_outlives_those_of_what_is_left() {
    let place = Place::new();

    let store = place.store();
    store.take(&place.state(), 1).unwrap();
    store.take(&place.state(), 2).unwrap();
    // Started on an empty disk, it made its files anew.
    fs::write(place.state().join("log"), "").unwrap();
    for ms in 3..=6 {
        store.take(&place.state(), ms).unwrap();
    }
    let numbers = |store: &CheckpointStore| -> Vec<u64> {
        store.list().unwrap().iter().map(|of| of.sequence).collect()
    };
    assert_eq!(numbers(&store), [6, 5, 4, 2], "three are kept, and one more");
    // A week later nobody wants it any more.
    store.take(&place.state(), 7 * 24 * 3_600_000 + 2).unwrap();
    assert_eq!(numbers(&store), [7, 6, 5]);
}

#[tokio::test]
async fn reading_again_waits_before_every_block_of_a_long_file() {
    let place = Place::new();
    fs::write(place.state().join("long"), vec![7_u8; 1 << 20]).unwrap();
    let store = std::sync::Arc::new(place.store());
    let taken = store.take(&place.state(), 1).unwrap();
    let asked = std::sync::Arc::new(AtomicUsize::new(0));
    let (count, long) = (std::sync::Arc::clone(&asked), taken.path.join("tree/long"));
    // Damaged while it waits at the last block: what is read is what lies there then.
    let pause = move || {
        if count.fetch_add(1, Ordering::Relaxed) == 0 {
            fs::write(&long, vec![8_u8; 1 << 20]).unwrap();
        }
    };
    let what = store
        .scrub(&taken, &Background::new(0, None), pause)
        .await
        .unwrap();
    assert!(what.is_some_and(|what| what.contains("long")));
    assert!(asked.load(Ordering::Relaxed) >= 4, "a block has 256 KiB");
}

#[test]
fn a_bit_flipped_anywhere_in_a_checkpoint_is_found() {
    let place = Place::new();
    fs::write(place.state().join("log"), "a short log").unwrap();
    let checkpoint = place.store().take(&place.state(), 1).unwrap();
    let mut tried = 0;
    for path in files(&checkpoint.path) {
        let bytes = fs::read(&path).unwrap();
        for at in 0..bytes.len() {
            let mut other = bytes.clone();
            other[at] ^= 1 << (at % 8);
            fs::write(&path, other).unwrap();
            assert!(
                place.store().verify(1).is_err(),
                "byte {at} of {}",
                path.display()
            );
            tried += 1;
        }
        fs::write(&path, bytes).unwrap();
    }
    assert!(tried >= 200, "{tried}");
    place.store().verify(1).unwrap();
}

#[test]
fn a_copy_cut_short_by_a_crash_is_never_a_checkpoint() {
    let place = Place::new();
    place.store().take(&place.state(), 1).unwrap();
    // As a crash leaves it: staged but not committed, and an older one half removed.
    let staged = place.store().stage(&place.state(), 2).unwrap();
    fs::remove_file(staged.tree().join("log")).unwrap();
    drop(staged);
    fs::create_dir_all(place.dir.path().join("checkpoints/tmp-000000000001/tree")).unwrap();
    let listed: Vec<u64> = place
        .store()
        .list()
        .unwrap()
        .iter()
        .map(|checkpoint| checkpoint.sequence)
        .collect();
    assert_eq!(listed, [1]);
    place.write("broken");
    assert_eq!(
        place.store().restore(&place.state()).unwrap().checkpoint.sequence,
        1
    );
    // The next one removes what is left of it.
    assert_eq!(place.store().take(&place.state(), 3).unwrap().sequence, 2);
    assert_eq!(
        names(&place.dir.path().join("checkpoints")),
        ["000000000001-1", "000000000002-3"]
    );
}

#[test]
fn a_restore_cut_short_at_any_step_loses_neither_state() {
    let place = Place::new();
    place.write("good");
    place.store().take(&place.state(), 1).unwrap();
    place.write("broken");
    let side = |suffix: &str| place.dir.path().join(format!("state.{suffix}"));
    let copy = |to: &Path| {
        fs::create_dir_all(to.join("deep/er")).unwrap();
        fs::write(to.join("deep/er/table"), "half").unwrap();
    };

    // While writing: the partial copy goes, the state stays.
    copy(&side("restore-partial"));
    place.store().finish_interrupted(&place.state()).unwrap();
    assert_eq!((place.read().as_str(), place.names().len()), ("broken", 2));

    // Ready, not yet swapped (or just swapped): both are kept.
    copy(&side("restore-ready"));
    place.store().finish_interrupted(&place.state()).unwrap();
    assert_eq!(place.read(), "broken");
    assert_eq!(
        fs::read_to_string(side("replaced-1").join("deep/er/table")).unwrap(),
        "half"
    );

    // Between the two steps of a file system that cannot swap: the state is missing and its successor ready.
    fs::rename(place.state(), side("replaced-2")).unwrap();
    copy(&side("restore-ready"));
    place.store().finish_interrupted(&place.state()).unwrap();
    assert_eq!(place.read(), "half");

    // And a restore after all of this still works.
    assert_eq!(
        place.store().restore(&place.state()).unwrap().replaced,
        Some(side("replaced-3"))
    );
    assert_eq!(place.read(), "good");
}

#[test]
fn what_was_set_aside_is_bounded_and_never_removed() {
    let mut place = Place::new();
    place.limits.set_aside_max = 2;
    place.store().take(&place.state(), 1).unwrap();
    for _ in 0..2 {
        place.write("broken");
        place.store().restore(&place.state()).unwrap();
    }
    place.write("broken again");
    let refused = place.store().restore(&place.state());
    assert!(
        matches!(
            refused,
            Err(CheckpointError::TooManySetAside { found: 2, max: 2, .. })
        ),
        "{refused:?}"
    );
    assert_eq!(place.read(), "broken again");
    assert_eq!(
        place.names(),
        ["checkpoints", "state", "state.replaced-1", "state.replaced-2"]
    );
}

#[test]
fn a_store_without_a_valid_checkpoint_says_so() {
    let place = Place::new();
    let none = place.store().restore(&place.state());
    assert!(matches!(none, Err(CheckpointError::NoneValid { refused: 0, .. })));
    let only = place.store().take(&place.state(), 1).unwrap();
    let other = place.store().verify(only.sequence + 6).unwrap_err().to_string();
    assert!(
        other.contains(&format!("valid are: {}", only.sequence)),
        "{other}"
    );
    fs::write(only.path.join("MANIFEST"), "theriac").unwrap();
    assert!(matches!(
        place.store().restore(&place.state()),
        Err(CheckpointError::NoneValid { refused: 1, .. })
    ));
    assert_eq!(place.read(), "one");
}

#[test]
fn an_old_checkpoint_is_only_removed_once_the_new_one_was_read_back() {
    let mut place = Place::new();
    place.limits.keep = 1;
    place.store().take(&place.state(), 1).unwrap();
    let staged = place.store().stage(&place.state(), 2).unwrap();
    fs::write(staged.tree().join("log"), "rot between writing and reading").unwrap();
    assert!(matches!(
        place.store().commit(staged),
        Err(CheckpointError::Corrupt { .. })
    ));
    assert_eq!(place.store().list().unwrap().len(), 1);
    place.store().verify(1).unwrap();
}

#[test]
fn too_little_room_and_too_many_files_are_refused_before_anything_is_copied() {
    let mut place = Place::new();
    place.limits.free_bytes_min = u64::MAX / 2;
    let full = place.store().take(&place.state(), 1);
    assert!(matches!(full, Err(CheckpointError::DiskFull { .. })), "{full:?}");
    place.limits = StoreLimits {
        free_bytes_min: 0,
        entries_max: 3,
        ..place.limits
    };
    let many = place.store().take(&place.state(), 1);
    assert!(
        matches!(many, Err(CheckpointError::TooManyEntries { max: 3, .. })),
        "{many:?}"
    );
    assert!(names(&place.dir.path().join("checkpoints")).is_empty());
}

#[test]
fn a_restore_goes_on_where_there_is_no_room_for_another_checkpoint() {
    let mut place = Place::new();
    place.store().take(&place.state(), 1).unwrap();
    // More than any disk has, so that no copy may be taken; a restore asks for what it writes and 1 MiB.
    place.limits.free_bytes_min = u64::MAX / 2;
    assert!(matches!(
        place.store().take(&place.state(), 2),
        Err(CheckpointError::DiskFull { .. })
    ));
    assert_eq!(
        place.store().restore(&place.state()).unwrap().checkpoint.sequence,
        1
    );
}

/// A file system of 1 MiB, where this process may mount one.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs"])
            .arg(dir.path())
            .output()
            .is_ok_and(|output| output.status.success());
        if !mounted {
            println!("left out: no tmpfs can be mounted here, so the full disk is not tested");
        }
        mounted.then_some(Self(dir))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = std::process::Command::new("umount").arg(self.0.path()).status();
        assert!(
            unmounted.is_ok_and(|status| status.success()),
            "the test's file system stayed mounted"
        );
    }
}

#[test]
fn a_disk_that_fills_up_while_copying_is_a_typed_error_and_leaves_no_partial_checkpoint() {
    let place = Place::new();
    let Some(disk) = SmallDisk::mount() else { return };
    let store = CheckpointStore::open(&disk.0.path().join("checkpoints"), place.limits).unwrap();
    store.take(&place.state(), 1).unwrap();
    // Small files take more room than their bytes, which is all that can be counted beforehand.
    for n in 0..300 {
        fs::write(place.state().join(format!("small-{n}")), "x").unwrap();
    }
    let full = store.take(&place.state(), 2);
    assert!(matches!(full, Err(CheckpointError::DiskFull { .. })), "{full:?}");
    assert_eq!(names(&disk.0.path().join("checkpoints")), ["000000000001-1"]);
    store.verify(1).unwrap();
}

#[test]
fn a_restore_onto_a_full_disk_changes_nothing() {
    let place = Place::new();
    let Some(disk) = SmallDisk::mount() else { return };
    let state = disk.0.path().join("state");
    fs::create_dir(&state).unwrap();
    fs::write(state.join("table"), vec![1_u8; 300 << 10]).unwrap();
    let store = place.store();
    store.take(&state, 1).unwrap();
    fs::write(disk.0.path().join("ballast"), vec![0_u8; 600 << 10]).unwrap();
    fs::write(state.join("table"), "broken").unwrap();
    let taken = free_bytes(disk.0.path()).unwrap();
    fs::write(
        disk.0.path().join("more"),
        vec![0_u8; usize::try_from(taken).unwrap() - (200 << 10)],
    )
    .unwrap();
    let full = store.restore(&state);
    assert!(matches!(full, Err(CheckpointError::DiskFull { .. })), "{full:?}");
    assert_eq!(fs::read_to_string(state.join("table")).unwrap(), "broken");
    assert_eq!(names(disk.0.path()), ["ballast", "more", "state"]);
}

#[tokio::test]
async fn a_copy_that_does_not_pass_the_services_check_is_not_kept() {
    let place = Place::new();
    let check = |script: &str| {
        StateCheck::new(
            ["/bin/sh", "-c", script, "check", "{state}"]
                .map(str::to_owned)
                .to_vec(),
        )
    };
    let state = |check| ServiceState {
        dir: place.state(),
        check: Some(check),
        checkpoints: place.store(),
    };
    let refused = state(check("echo torn; exit 1")).checkpoint(1).await;
    assert!(matches!(refused, Err(CheckpointError::NotGood { detail, .. }) if detail == "torn"));
    assert!(place.store().list().unwrap().is_empty());
    // The copy is what is checked, not the state.
    let copied = state(check(
        "case \"$1\" in */checkpoints/tmp-*/tree) ;; *) exit 1;; esac",
    ))
    .checkpoint(1)
    .await;
    assert_eq!(copied.unwrap().sequence, 1);
}

/// The tests above hold the directory still; here its account exchanges what it can while it is written as root.
#[test]
fn a_restore_is_led_nowhere_by_the_account_that_it_is_for() {
    use rustix::thread::{Gid, Uid, set_thread_groups, set_thread_res_gid, set_thread_res_uid};

    if !rustix::process::geteuid().is_root() {
        println!("left out: it takes root to write for another account");
        return;
    }
    let place = Place::new();
    let (state, victim) = (place.state(), place.dir.path().join("victim"));
    fs::remove_dir_all(&state).unwrap();
    fs::create_dir_all(state.join("base")).unwrap();
    for file in 0..1_000 {
        fs::write(state.join("base").join(file.to_string()), "x").unwrap();
    }
    for path in content(&state).into_keys().map(|path| state.join(path)) {
        std::os::unix::fs::lchown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    std::os::unix::fs::chown(place.dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    let outside = tempfile::tempdir().unwrap();
    fs::set_permissions(outside.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(outside.path().join("base")).unwrap();
    let store = CheckpointStore::open(&outside.path().join("checkpoints"), place.limits).unwrap();
    store.take(&state, 1).unwrap();
    let ended = AtomicBool::new(false);
    // What was being filled and was led elsewhere.
    let exchanged = AtomicU32::new(0);
    std::thread::scope(|scope| {
        let (dir, lead_to, over) = (place.dir.path(), outside.path(), &ended);
        let met = &exchanged;
        scope.spawn(move || {
            set_thread_groups(&[]).unwrap();
            let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
            set_thread_res_gid(gid, gid, gid).unwrap();
            set_thread_res_uid(uid, uid, uid).unwrap();
            let partial = dir.join("state.restore-partial");
            for round in 0_u64.. {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                // A folder that is being filled, which is not this account's until all is written; or the top itself, which lies in a directory
                // of its own.
                let base = partial.join("base");
                let (name, target) = if base.join("20").exists() {
                    (base, lead_to.join("base"))
                } else if round.is_multiple_of(512) {
                    (partial.clone(), lead_to.to_owned())
                } else {
                    continue;
                };
                let away = dir.join(format!("away-{round}"));
                if fs::rename(&name, &away).is_ok() {
                    let led = std::os::unix::fs::symlink(target, &name).is_ok();
                    let was_folder = fs::symlink_metadata(&away).is_ok_and(|away| away.is_dir());
                    met.fetch_add(u32::from(led && was_folder), Ordering::Relaxed);
                }
            }
        });
        let _over = Over(&ended);
        let begun = Instant::now();
        while met.load(Ordering::Relaxed) < 5 {
            assert!(
                begun.elapsed() < PATIENCE,
                "{met:?} exchanges of what was being filled"
            );
            // It may well come to nothing, with its directory gone.
            drop(store.restore(&state));
            for name in place.names() {
                if name.starts_with("state.re") {
                    let path = place.dir.path().join(name);
                    drop(fs::remove_dir_all(&path).or_else(|_link| fs::remove_file(&path)));
                }
            }
        }
    });
    assert_eq!(names(&outside.path().join("base")), Vec::<String>::new());
    assert_eq!(names(outside.path()), ["base", "checkpoints"]);
    let base = fs::metadata(outside.path().join("base")).unwrap();
    assert_eq!(base.uid(), 0, "nothing outside was given away");
    assert!(!victim.exists());
}

#[test]
fn a_file_exchanged_for_a_link_meanwhile_is_not_read_through_it() {
    let place = Place::new();
    let (state, secret) = (place.state(), place.dir.path().join("secret"));
    fs::write(&secret, "secret").unwrap();
    fs::create_dir(place.dir.path().join("folder")).unwrap();
    fs::write(place.dir.path().join("folder/name"), "secret").unwrap();
    for file in 0..40 {
        fs::write(state.join(format!("f{file}")), "x").unwrap();
    }
    fs::create_dir(state.join("zone")).unwrap();
    fs::write(state.join("zone/name"), "own").unwrap();
    let store = place.store();
    let checkpoints = place.dir.path().join("checkpoints");
    let ended = AtomicBool::new(false);
    // Copies under way in which either was a link when the other files were there and it was not yet.
    let met = AtomicU32::new(0);
    std::thread::scope(|scope| {
        let (state, dir, over) = (&state, place.dir.path(), &ended);
        let (checkpoints, met) = (&checkpoints, &met);
        let exchanging = scope.spawn(move || {
            while !over.load(Ordering::Relaxed) {
                std::os::unix::fs::symlink(dir.join("secret"), dir.join("link")).unwrap();
                fs::rename(dir.join("link"), state.join("z")).unwrap();
                fs::rename(state.join("zone"), dir.join("z-folder")).unwrap();
                std::os::unix::fs::symlink(dir.join("folder"), state.join("zone")).unwrap();
                look(checkpoints, met);
                fs::remove_file(state.join("zone")).unwrap();
                fs::rename(dir.join("z-folder"), state.join("zone")).unwrap();
                fs::write(dir.join("own"), "own").unwrap();
                fs::rename(dir.join("own"), state.join("z")).unwrap();
                look(checkpoints, met);
            }
        });
        let _over = Over(&ended);
        let begun = Instant::now();
        for unix_ms in 0.. {
            if unix_ms >= 20 && met.load(Ordering::Relaxed) >= 100 {
                break;
            }
            assert!(
                begun.elapsed() < PATIENCE && !exchanging.is_finished(),
                "{met:?} exchanges while copying"
            );
            // It mostly says that what it copies keeps changing.
            if let Ok(staged) = store.stage(state, unix_ms) {
                for file in files(staged.tree()) {
                    assert_ne!(
                        fs::read_to_string(&file).unwrap_or_default(),
                        "secret",
                        "{file:?}"
                    );
                }
                store.discard(staged).unwrap();
            }
        }
    });
    // Left alone it is copied.
    let staged = store.stage(&state, 1_000).unwrap();
    assert_eq!(
        fs::read_to_string(staged.tree().join("zone/name")).unwrap(),
        "own"
    );
}

/// Nothing that is not the state's is in a copy under way, whatever becomes of it.
fn look(checkpoints: &Path, met: &AtomicU32) {
    let copies = fs::read_dir(checkpoints).unwrap().flatten();
    for tree in copies.map(|copy| copy.path().join("tree")) {
        let there = |name: &str| tree.join(name).symlink_metadata().is_ok();
        met.fetch_add(u32::from(there("f0") && !there("z")), Ordering::Relaxed);
        for (top, file) in [("z", "z"), ("zone", "zone/name")] {
            let (top, file) = (tree.join(top), tree.join(file));
            // A link is copied as one, and is not read through here either.
            if top.symlink_metadata().is_ok_and(|found| !found.is_symlink()) {
                assert_ne!(
                    fs::read_to_string(&file).unwrap_or_default(),
                    "secret",
                    "{}",
                    file.display()
                );
            }
        }
    }
}

const PATIENCE: Duration = Duration::from_mins(2);

/// Ends the other thread, however this one ends.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

const NOBODY: u32 = 65_534;
