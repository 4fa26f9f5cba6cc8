//! Off-site copies: what is stored is sealed, whole, and enough by itself.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;
use theriac_heal::checkpoint::offsite::{Offsite, OffsiteError, OffsiteKey, Retry};
use theriac_heal::checkpoint::store::{Checkpoint, CheckpointError, CheckpointStore, StoreLimits};
use theriac_heal::checkpoint::which::Which;

const MARK: &[u8] = b"a line that must not be read off-site";
const RETRY: Retry = Retry {
    attempts: 2,
    wait: Duration::ZERO,
};

struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        fs::create_dir_all(place.state().join("deep")).unwrap();
        fs::create_dir(place.remote()).unwrap();
        // Longer than one part.
        let long: Vec<u8> = (0..9_000_000_u32).map(|at| (at / 7 % 251) as u8).collect();
        fs::write(place.state().join("long"), long).unwrap();
        fs::write(place.state().join("deep/mark"), MARK).unwrap();
        fs::write(place.state().join("empty"), "").unwrap();
        std::os::unix::fs::symlink("deep/mark", place.state().join("link")).unwrap();
        OffsiteKey::create(&place.dir.path().join("key")).unwrap();
        place
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn remote(&self) -> PathBuf {
        self.dir.path().join("remote")
    }

    fn url(&self) -> String {
        format!("file://{}", self.remote().display())
    }

    fn offsite(&self) -> Offsite {
        let key = OffsiteKey::load(&self.dir.path().join("key")).unwrap();
        Offsite::open(&self.url(), "host/kv", key, RETRY).unwrap()
    }

    fn store(&self, name: &str) -> CheckpointStore {
        let limits = StoreLimits {
            free_bytes_min: 0,
            ..StoreLimits::default()
        };
        CheckpointStore::open(&self.dir.path().join(name), limits).unwrap()
    }

    fn take(&self, unix_ms: u64) -> Checkpoint {
        self.store("checkpoints").take(&self.state(), unix_ms).unwrap()
    }

    fn objects(&self, folder: &str) -> Vec<PathBuf> {
        let mut found: Vec<PathBuf> = fs::read_dir(self.remote().join("host/kv").join(folder))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        found.sort();
        found
    }
}

/// A host that lost its store, and fetches a copy of the one before beside what it has taken since.
#[tokio::test]
async fn a_copy_that_was_fetched_does_not_come_before_what_was_taken_here() {
    let place = Place::new();
    for unix_ms in [10, 20, 30] {
        place.take(unix_ms);
    }
    let old = place.store("checkpoints");
    let newest = old.list().unwrap().swap_remove(0);
    place.offsite().push(&newest, 3).await.unwrap();
    let store = place.store("new");
    fs::write(place.state().join("empty"), "since").unwrap();
    store.take(&place.state(), 100).unwrap();
    let fetched = place.offsite().fetch(Some(3.into()), &store).await.unwrap();
    let listed = || -> Vec<(u64, u64)> {
        let list = store.list().unwrap();
        list.iter().map(|found| (found.sequence, found.unix_ms)).collect()
    };
    assert_eq!(listed(), [(1, 100), (3, 30)]);
    let restored = store.restore(&place.state()).unwrap();
    assert_eq!(restored.checkpoint.unix_ms, 100);
    // By its name it is restored, and no number is given twice.
    store.restore_sequence(fetched.sequence, &place.state()).unwrap();
    assert_eq!(fs::read(place.state().join("empty")).unwrap(), b"");
    for unix_ms in [200, 300] {
        store.take(&place.state(), unix_ms).unwrap();
    }
    assert_eq!(
        listed(),
        [(5, 300), (4, 200), (1, 100)],
        "the fetched one is the first to go"
    );
}

#[tokio::test]
async fn a_state_is_restored_from_its_copy_alone_and_the_store_shows_nothing_of_it() {
    let place = Place::new();
    let taken = place.take(1);
    fs::write(taken.path.join("PROOF.json"), "{}").unwrap();
    let stored = place.offsite().push(&taken, 3).await.unwrap();
    assert_eq!((stored.sent, stored.there), (4, 0), "three parts and one");
    for folder in ["parts", "checkpoints"] {
        for object in place.objects(folder) {
            let bytes = fs::read(&object).unwrap();
            assert!(bytes.starts_with(b"theriac-sealed 1\n"));
            for plain in [MARK, b"deep/mark".as_slice(), b"sha256".as_slice()] {
                assert!(!bytes.windows(plain.len()).any(|window| window == plain));
            }
        }
    }
    // Nothing local is left but the key.
    fs::remove_dir_all(place.dir.path().join("checkpoints")).unwrap();
    fs::remove_dir_all(place.state()).unwrap();
    let empty = place.store("fetched");
    let fetched = place.offsite().fetch(None, &empty).await.unwrap();
    assert_eq!(fs::read(fetched.path.join("PROOF.json")).unwrap(), b"{}");
    empty.restore_sequence(1, &place.state()).unwrap();
    assert_eq!(fs::read(place.state().join("link")).unwrap(), MARK);
    assert_eq!(fs::metadata(place.state().join("long")).unwrap().len(), 9_000_000);
    // Again: what is there is compared, not fetched.
    assert_eq!(
        place.offsite().fetch(Some(1.into()), &empty).await.unwrap().path,
        fetched.path
    );
}

#[tokio::test]
async fn an_upload_that_was_cut_short_goes_on_and_equal_parts_are_stored_once() {
    let place = Place::new();
    let taken = place.take(1);
    place.offsite().push(&taken, 3).await.unwrap();
    // As if it had ended before the last part and before the checkpoint's own object.
    fs::remove_file(&place.objects("checkpoints")[0]).unwrap();
    fs::remove_file(&place.objects("parts")[0]).unwrap();
    assert!(
        place.offsite().list().await.unwrap().is_empty(),
        "no copy without it"
    );
    assert!(matches!(
        place.offsite().fetch(None, &place.store("a")).await,
        Err(OffsiteError::NoCopy { .. })
    ));
    let stored = place.offsite().push(&taken, 3).await.unwrap();
    assert_eq!((stored.sent, stored.there), (1, 3));
    fs::write(place.state().join("deep/mark"), "other").unwrap();
    let stored = place.offsite().push(&place.take(2), 3).await.unwrap();
    assert_eq!((stored.sent, stored.there), (1, 3), "only what changed is sent");
}

#[tokio::test]
async fn the_newest_copies_are_kept_with_all_their_parts() {
    let place = Place::new();
    for unix_ms in 1..=4 {
        fs::write(place.state().join("deep/mark"), format!("state {unix_ms}")).unwrap();
        place.offsite().push(&place.take(unix_ms), 2).await.unwrap();
    }
    let copies = place.offsite().list().await.unwrap();
    let numbers: Vec<u64> = copies.iter().map(|copy| copy.sequence).collect();
    assert_eq!(numbers, [4, 3]);
    assert_eq!(
        place.objects("parts").len(),
        5,
        "three of the long file, two states"
    );
    for sequence in [3, 4] {
        let store = place.store(&format!("fetched-{sequence}"));
        place
            .offsite()
            .fetch(Some(sequence.into()), &store)
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn copies_of_a_clock_that_was_ahead_are_the_first_to_go() {
    let place = Place::new();
    let numbers = async || -> Vec<u64> {
        let copies = place.offsite().list().await.unwrap();
        copies.iter().map(|copy| copy.sequence).collect()
    };
    for (unix_ms, left) in [
        (4_000, vec![1]),
        (5_000, vec![2, 1]),
        // The clock was set right.
        (10, vec![2, 3]),
        (20, vec![4, 3]),
    ] {
        fs::write(place.state().join("deep/mark"), format!("state {unix_ms}")).unwrap();
        let taken = place.take(unix_ms);
        place.offsite().push(&taken, 2).await.unwrap();
        assert_eq!(numbers().await, left, "after {unix_ms}");
        let number = taken.sequence;
        let store = place.store(&format!("fetched-{number}"));
        place.offsite().fetch(Some(number.into()), &store).await.unwrap();
    }
}

#[tokio::test]
async fn a_copy_that_does_not_open_costs_no_copy_that_does() {
    let place = Place::new();
    let push = async |unix_ms: u64| {
        fs::write(place.state().join("deep/mark"), format!("state {unix_ms}")).unwrap();
        place.offsite().push(&place.take(unix_ms), 2).await.unwrap();
        place.objects("checkpoints").len()
    };
    push(1).await;
    push(2).await;
    fs::write(&place.objects("checkpoints")[1], "rubbish").unwrap();
    assert_eq!(push(3).await, 3, "the damaged one is none of the two");
    for number in [1, 3] {
        let store = place.store(&format!("fetched-{number}"));
        place.offsite().fetch(Some(number.into()), &store).await.unwrap();
    }
    assert_eq!(push(4).await, 2, "two newer ones are whole");
    assert_eq!(place.objects("parts").len(), 5, "and all else is gone");
}

#[tokio::test]
async fn a_part_that_rotted_is_believed_by_a_copy_and_stored_anew_by_a_repair() {
    let place = Place::new();
    let taken = place.take(1);
    place.offsite().push(&taken, 3).await.unwrap();
    let part = &place.objects("parts")[2];
    let mut bytes = fs::read(part).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(part, &bytes).unwrap();
    let fetch = async || place.offsite().fetch(None, &place.store("fetched")).await;
    let stored = place.offsite().push(&taken, 3).await.unwrap();
    assert_eq!((stored.sent, stored.there), (0, 4));
    assert!(matches!(fetch().await, Err(OffsiteError::Damaged { .. })));
    let stored = place.offsite().repair(&taken, 3).await.unwrap();
    assert_eq!((stored.sent, stored.there), (1, 3));
    fetch().await.unwrap();
}

#[tokio::test]
async fn of_two_copies_with_one_number_the_one_that_is_named_is_fetched_and_restored() {
    let place = Place::new();
    fs::write(place.state().join("deep/mark"), "old host").unwrap();
    place.offsite().push(&place.take(7), 3).await.unwrap();
    // A host that lost its store begins anew.
    fs::remove_dir_all(place.dir.path().join("checkpoints")).unwrap();
    fs::write(place.state().join("deep/mark"), "new host").unwrap();
    place.offsite().push(&place.take(9), 3).await.unwrap();
    let store = place.store("checkpoints");
    let refused = place.offsite().fetch(Some(1.into()), &store).await.unwrap_err();
    assert!(refused.to_string().contains("1-9, 1-7"), "{refused}");
    let old = Some("1-7".parse().unwrap());
    let fetched = place.offsite().fetch(old, &store).await.unwrap();
    assert_eq!((fetched.sequence, fetched.unix_ms), (1, 7));
    // Both are local now, and neither is taken for the other.
    let refused = store.restore_sequence(1, &place.state()).unwrap_err();
    assert!(
        matches!(refused, CheckpointError::SeveralOfNumber { sequence: 1, .. }),
        "{refused}"
    );
    for (unix_ms, words) in [(7, "old host"), (9, "new host")] {
        let which = Which {
            sequence: 1,
            unix_ms: Some(unix_ms),
        };
        store.restore_sequence(which, &place.state()).unwrap();
        let mark = fs::read_to_string(place.state().join("deep/mark")).unwrap();
        assert_eq!(mark, words);
    }
}

#[tokio::test]
async fn an_object_larger_than_any_that_was_stored_is_not_read() {
    let place = Place::new();
    place.offsite().push(&place.take(1), 3).await.unwrap();
    let part = &place.objects("parts")[0];
    let file = fs::File::options().write(true).open(part).unwrap();
    file.set_len(1 << 40).unwrap();
    let refused = place.offsite().fetch(None, &place.store("a")).await.unwrap_err();
    assert!(refused.to_string().contains("1099511627776 bytes"), "{refused}");
}

#[tokio::test]
async fn damaged_missing_and_foreign_objects_are_refused_and_leave_nothing_behind() {
    let place = Place::new();
    place.offsite().push(&place.take(1), 3).await.unwrap();
    let empty = place.store("fetched");
    for object in [place.objects("parts"), place.objects("checkpoints")].concat() {
        let whole = fs::read(&object).unwrap();
        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        for damaged in [&flipped, &whole[..whole.len() / 2], b"".as_slice()] {
            fs::write(&object, damaged).unwrap();
            let refused = place.offsite().fetch(Some(1.into()), &empty).await.unwrap_err();
            assert!(matches!(refused, OffsiteError::Damaged { .. }), "{refused}");
        }
        fs::write(&object, &whole).unwrap();
    }
    let parts = place.objects("parts");
    // One part under the name of another.
    let (one, other) = (fs::read(&parts[0]).unwrap(), fs::read(&parts[1]).unwrap());
    fs::write(&parts[0], &other).unwrap();
    assert!(place.offsite().fetch(Some(1.into()), &empty).await.is_err());
    fs::remove_file(&parts[0]).unwrap();
    assert!(matches!(
        place.offsite().fetch(Some(1.into()), &empty).await,
        Err(OffsiteError::Missing { .. })
    ));
    fs::write(&parts[0], &one).unwrap();
    let key = place.dir.path().join("other-key");
    let key = OffsiteKey::create(&key).unwrap();
    let foreign = Offsite::open(&place.url(), "host/kv", key, RETRY).unwrap();
    assert!(matches!(
        foreign.fetch(Some(1.into()), &empty).await,
        Err(OffsiteError::OtherKey { .. })
    ));
    assert!(names(empty.dir()).is_empty(), "{:?}", names(empty.dir()));
    place.offsite().fetch(Some(1.into()), &empty).await.unwrap();
}

#[tokio::test]
async fn a_store_that_is_not_there_is_told_and_a_rotten_checkpoint_is_not_copied() {
    let place = Place::new();
    let taken = place.take(1);
    let key = OffsiteKey::load(&place.dir.path().join("key")).unwrap();
    let nowhere = format!("file://{}/not-mounted", place.dir.path().display());
    let refused = Offsite::open(&nowhere, "host/kv", key.clone(), RETRY).unwrap_err();
    assert!(matches!(&refused, OffsiteError::Unreachable { .. }), "{refused}");
    assert!(!place.dir.path().join("not-mounted").exists());
    for url in ["ftp://a/b", "file://relative", "bucket", "s3://"] {
        assert!(matches!(
            Offsite::open(url, "host/kv", key.clone(), RETRY),
            Err(OffsiteError::Url { .. })
        ));
    }
    fs::write(taken.path.join("tree/deep/mark"), "rotten").unwrap();
    let refused = place.offsite().push(&taken, 3).await.unwrap_err();
    assert!(
        matches!(refused, OffsiteError::Checkpoint(CheckpointError::Corrupt { .. })),
        "{refused}"
    );
    assert!(place.offsite().list().await.unwrap().is_empty());
}

fn names(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect()
}
