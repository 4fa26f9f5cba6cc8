//! Payloads too large for a row, as files named by their SHA-256.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use theriac_protocol::units::Digest;

use super::StoreError;

/// A payload up to this size rides in its row: one synchronisation instead of three.
pub const ROW_BYTES_MAX: usize = 64 * 1024;
/// Blobs younger than this are never collected: their row may still be on its way.
pub const UNNAMED_AGE_MIN: Duration = Duration::from_hours(1);

/// The folder of blobs.
#[derive(Debug)]
pub struct BlobStore {
    folder: PathBuf,
    temporaries: AtomicU64,
}

impl BlobStore {
    /// Opens (and makes) the folder.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        crate::data_dir::make_private(folder).map_err(|error| StoreError::io("make", folder, &error))?;
        Ok(Self {
            folder: folder.to_owned(),
            temporaries: AtomicU64::new(0),
        })
    }

    /// Makes `bytes` durable under their digest: write, sync, rename, sync the folder. Blocks.
    ///
    /// # Errors
    /// [`StoreError::Full`] when the disk is full, [`StoreError::Io`] otherwise; no trace is left then.
    pub fn put(&self, digest: &Digest, bytes: &[u8]) -> Result<(), StoreError> {
        let number = self.temporaries.fetch_add(1, Ordering::Relaxed);
        let temporary = self
            .folder
            .join(format!("{}.{}.{number}.tmp", digest.short(), std::process::id()));
        // Written again even if it is there: that renews its age, so that the collector leaves it alone.
        let written = write_durably(&temporary, &self.path(digest), bytes);
        written.map_err(|error| {
            drop(fs::remove_file(&temporary));
            StoreError::io("write", &temporary, &error)
        })?;
        File::open(&self.folder)
            .and_then(|folder| folder.sync_all())
            .map_err(|error| StoreError::io("sync", &self.folder, &error))
    }

    /// Reads a blob and compares its digest. `row` names the row that asks, for the error. Blocks.
    ///
    /// # Errors
    /// [`StoreError::BlobMissing`], [`StoreError::BlobCorrupt`], [`StoreError::Io`].
    pub fn get(&self, digest: &Digest, row: &str) -> Result<Bytes, StoreError> {
        let path = self.path(digest);
        let bytes = fs::read(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => StoreError::BlobMissing {
                row: row.to_owned(),
                path: path.clone(),
            },
            _ => StoreError::io("read", &path, &error),
        })?;
        let found = Digest::of(&bytes);
        if found != *digest {
            return Err(StoreError::BlobCorrupt {
                row: row.to_owned(),
                path,
                expected: *digest,
                found,
            });
        }
        Ok(bytes.into())
    }

    /// Deletes what no row names and is older than [`UNNAMED_AGE_MIN`]. Gives the number of files deleted.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the folder cannot be read; a file that cannot be deleted is left for the next time.
    pub fn collect(&self, named: &BTreeSet<Digest>, now: SystemTime) -> Result<usize, StoreError> {
        let entries =
            fs::read_dir(&self.folder).map_err(|error| StoreError::io("list", &self.folder, &error))?;
        let mut deleted = 0;
        for entry in entries.flatten() {
            let name = entry.file_name();
            let digest: Option<Digest> = name.to_str().and_then(|name| name.parse().ok());
            if digest.is_some_and(|digest| named.contains(&digest)) {
                continue;
            }
            let age = entry
                .metadata()
                .and_then(|data| data.modified())
                .map(|then| now.duration_since(then));
            if matches!(age, Ok(Ok(age)) if age >= UNNAMED_AGE_MIN) && fs::remove_file(entry.path()).is_ok() {
                deleted += 1;
            }
        }
        Ok(deleted)
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.folder.join(digest.to_string())
    }
}

fn write_durably(temporary: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = crate::data_dir::create_private(temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, BlobStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = BlobStore::open(dir.path()).unwrap();
        (dir, store)
    }

    #[test]
    fn missing_and_altered_blobs_are_told_apart_and_name_the_row() {
        let (dir, store) = store();
        let digest = Digest::of(b"abc");
        let error = store.get(&digest, "upload 3/site-1").unwrap_err();
        assert!(
            matches!(&error, StoreError::BlobMissing { row, .. } if row == "upload 3/site-1"),
            "{error}"
        );
        store.put(&digest, b"abc").unwrap();
        assert_eq!(store.get(&digest, "").unwrap(), Bytes::from_static(b"abc"));
        fs::write(dir.path().join(digest.to_string()), b"abd").unwrap();
        let error = store.get(&digest, "upload 3/site-1").unwrap_err();
        assert!(matches!(error, StoreError::BlobCorrupt { found, .. } if found == Digest::of(b"abd")));
    }

    #[test]
    fn collects_only_old_blobs_that_no_row_names() {
        let (_dir, store) = store();
        let (named, unnamed) = (Digest::of(b"a"), Digest::of(b"b"));
        store.put(&named, b"a").unwrap();
        store.put(&unnamed, b"b").unwrap();
        let rows = BTreeSet::from([named]);
        assert_eq!(
            store.collect(&rows, SystemTime::now()).unwrap(),
            0,
            "a young blob went"
        );
        assert_eq!(
            store
                .collect(&rows, SystemTime::now() + 2 * UNNAMED_AGE_MIN)
                .unwrap(),
            1
        );
        assert!(store.get(&named, "").is_ok() && store.get(&unnamed, "").is_err());
    }
}
