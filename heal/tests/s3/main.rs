//! Copies in an S3-compatible store, against a server that checks every signature, pages its lists and refuses as S3 does.

#![cfg(feature = "s3")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod bucket;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;
use theriac_heal::checkpoint::offsite::{Copy, Offsite, OffsiteError, OffsiteKey, Retry, check_url};
use theriac_heal::checkpoint::store::{Checkpoint, CheckpointStore, StoreLimits};

use self::bucket::{Mood, SECRET, Shared};

const MARK: &[u8] = b"a line that must not be read off-site";
const RETRY: Retry = Retry {
    attempts: 3,
    wait: Duration::ZERO,
};

struct Place {
    dir: TempDir,
    bucket: Shared,
}

impl Place {
    async fn new() -> Self {
        let place = Self {
            dir: tempfile::tempdir().unwrap(),
            bucket: bucket::serve().await,
        };
        fs::create_dir(place.state()).unwrap();
        for name in ["a", "b", "c", "d"] {
            fs::write(place.state().join(name), format!("file {name}")).unwrap();
        }
        fs::write(place.state().join("mark"), MARK).unwrap();
        OffsiteKey::create(&place.dir.path().join("key")).unwrap();
        place
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn copies(&self, secret: &str) -> Offsite {
        let key = OffsiteKey::load(&self.dir.path().join("key")).unwrap();
        let variables = bucket::variables(&self.bucket, secret);
        Offsite::open_with(&bucket::url(), "host/kv", key, RETRY, variables).unwrap()
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

    fn feels(&self, mood: Mood) {
        self.bucket.lock().unwrap().mood = mood;
    }

    fn keys(&self) -> Vec<String> {
        self.bucket.lock().unwrap().objects.keys().cloned().collect()
    }

    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.bucket.lock().unwrap().calls)
    }
}

fn unreachable(answer: Result<impl std::fmt::Debug, OffsiteError>) -> String {
    let error = answer.unwrap_err();
    assert!(matches!(&error, OffsiteError::Unreachable { .. }), "{error}");
    error.to_string()
}

#[tokio::test]
async fn a_state_comes_back_from_the_bucket_alone_over_pages_of_a_list_and_nothing_in_it_is_readable() {
    let place = Place::new().await;
    let stored = place.copies(SECRET).push(&place.take(1), 3).await.unwrap();
    assert_eq!((stored.sent, stored.there), (5, 0));
    let parts = "site a/backups/host/kv/parts/";
    assert_eq!(
        place.keys().iter().filter(|key| key.starts_with(parts)).count(),
        5
    );
    assert_eq!(
        place.keys()[0],
        "site a/backups/host/kv/checkpoints/000000000001-1"
    );
    for object in place.bucket.lock().unwrap().objects.values() {
        assert!(object.starts_with(b"theriac-sealed 1\n"));
        assert!(!object.windows(MARK.len()).any(|window| window == MARK));
    }
    fs::remove_dir_all(place.dir.path().join("checkpoints")).unwrap();
    fs::remove_dir_all(place.state()).unwrap();
    let empty = place.store("fetched");
    place.copies(SECRET).fetch(None, &empty).await.unwrap();
    empty.restore_sequence(1, &place.state()).unwrap();
    assert_eq!(fs::read(place.state().join("mark")).unwrap(), MARK);
    assert_eq!(fs::read(place.state().join("d")).unwrap(), b"file d");
}

#[tokio::test]
async fn what_is_there_is_not_sent_again_and_copies_beyond_the_newest_go_with_their_parts() {
    let place = Place::new().await;
    for unix_ms in 1..=3 {
        fs::write(place.state().join("mark"), format!("state {unix_ms}")).unwrap();
        let stored = place.copies(SECRET).push(&place.take(unix_ms), 2).await.unwrap();
        assert_eq!(
            (stored.sent, stored.there),
            if unix_ms == 1 { (5, 0) } else { (1, 4) }
        );
    }
    let copies = place.copies(SECRET).list().await.unwrap();
    let copy = |unix_ms| Copy {
        sequence: unix_ms,
        unix_ms,
    };
    assert_eq!(copies, [copy(3), copy(2)]);
    assert_eq!(
        place.keys().len(),
        2 + 4 + 2,
        "two sheets, what both have, what each has"
    );
    let calls = place.calls();
    assert!(calls.iter().any(|call| call == "POST delete"), "{calls:?}");
}

#[tokio::test]
async fn a_busy_store_is_asked_as_often_as_the_policy_of_retries_says_and_no_more() {
    let place = Place::new().await;
    let taken = place.take(1);
    place.feels(Mood::Busy(2));
    place.copies(SECRET).push(&taken, 3).await.unwrap();
    place.calls();
    place.feels(Mood::Busy(u32::MAX));
    let told = unreachable(place.copies(SECRET).list().await);
    assert!(told.contains("SlowDown"), "{told}");
    assert_eq!(place.calls(), ["GET delimiter"; 3]);
}

#[tokio::test]
async fn a_store_that_does_not_answer_is_told_and_the_copy_goes_on_when_it_does() {
    let place = Place::new().await;
    let taken = place.take(1);
    place.feels(Mood::Silent);
    unreachable(place.copies(SECRET).push(&taken, 3).await);
    assert!(place.keys().is_empty());
    place.feels(Mood::Well);
    place.copies(SECRET).push(&taken, 3).await.unwrap();
    assert_eq!(place.copies(SECRET).list().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_wrong_secret_and_a_key_that_may_not_write_are_refused_in_the_stores_words() {
    let place = Place::new().await;
    let taken = place.take(1);
    let told = unreachable(place.copies("another secret").push(&taken, 3).await);
    assert!(told.contains("SignatureDoesNotMatch"), "{told}");
    assert!(!told.contains("another secret"), "{told}");
    place.feels(Mood::ReadOnly);
    let told = unreachable(place.copies(SECRET).push(&taken, 3).await);
    assert!(told.contains("AccessDenied"), "{told}");
    assert!(place.keys().is_empty());
}

#[tokio::test]
async fn a_bucket_that_is_gone_is_no_empty_one_and_takes_no_copy() {
    let place = Place::new().await;
    let taken = place.take(1);
    place.copies(SECRET).push(&taken, 3).await.unwrap();
    place.bucket.lock().unwrap().exists = false;
    for told in [
        unreachable(place.copies(SECRET).list().await),
        unreachable(place.copies(SECRET).push(&taken, 3).await),
        unreachable(place.copies(SECRET).fetch(None, &place.store("fetched")).await),
    ] {
        assert!(told.contains("NoSuchBucket"), "{told}");
    }
}

#[tokio::test]
async fn an_answer_cut_short_is_asked_for_again_and_a_damaged_or_lost_object_is_named() {
    let place = Place::new().await;
    place.copies(SECRET).push(&place.take(1), 3).await.unwrap();
    place.feels(Mood::CutsOnce);
    place
        .copies(SECRET)
        .fetch(None, &place.store("fetched"))
        .await
        .unwrap();
    assert_eq!(place.bucket.lock().unwrap().mood, Mood::Well, "it was cut");

    let part = place
        .keys()
        .into_iter()
        .find(|key| key.contains("/parts/"))
        .unwrap();
    let whole = place.bucket.lock().unwrap().objects[&part].clone();
    let cut = whole.slice(..whole.len() - 1);
    place.bucket.lock().unwrap().objects.insert(part.clone(), cut);
    let refused = place
        .copies(SECRET)
        .fetch(None, &place.store("cut"))
        .await
        .unwrap_err();
    assert!(
        matches!(&refused, OffsiteError::Damaged { object, .. } if part.ends_with(object)),
        "{refused}"
    );

    place.bucket.lock().unwrap().objects.remove(&part);
    let refused = place
        .copies(SECRET)
        .fetch(None, &place.store("lost"))
        .await
        .unwrap_err();
    assert!(
        matches!(&refused, OffsiteError::Missing { object, .. } if part.ends_with(object)),
        "{refused}"
    );
    // What was lost is sent again with the next copy.
    let stored = place.copies(SECRET).push(&place.take(2), 3).await.unwrap();
    assert_eq!((stored.sent, stored.there), (1, 4));
}

#[test]
fn an_address_without_a_bucket_is_refused() {
    for url in ["s3://", "s3:///prefix"] {
        let told = check_url(url).unwrap_err().to_string();
        assert!(told.contains("write s3://BUCKET/PREFIX"), "{told}");
    }
    check_url("s3://bucket").unwrap();
}
