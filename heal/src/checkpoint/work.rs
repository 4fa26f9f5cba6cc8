//! The directory in which a copy is received and proved: ours alone, and gone afterwards.
//!
//! Where the server has another account than we, what is given to it lies in here, and here itself it can exchange nothing: we open what we write by a
//! descriptor of this directory and never by way of a link.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::ops::Deref;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::store::{CheckpointError, CheckpointStore, at, needs_room};
use super::unblock;
use crate::executor::process::clear_directory;
use crate::folder::Folder;
use crate::postgres::owner::Owner;

/// One that is in use: locked, so that no other process removes it. Dropped, it is left to whoever comes next.
#[derive(Debug)]
pub(super) struct Work(Folder);

impl Deref for Work {
    type Target = Folder;

    fn deref(&self) -> &Folder {
        &self.0
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // Closing it is not enough: a child that is being started may hold a copy of the descriptor for a moment.
        if let Err(error) = self.0.unlock() {
            tracing::debug!(%error, "work directory not unlocked");
        }
    }
}

/// Locks it, if it still is what `work_dir` names.
fn lock(work_dir: &Path, folder: Folder) -> Result<Work, CheckpointError> {
    let (held, named) = (folder.metadata(), work_dir.symlink_metadata());
    let same =
        |held: &fs::Metadata, named: &fs::Metadata| (held.dev(), held.ino()) == (named.dev(), named.ino());
    // Not every file system can: then it is as it was without a lock.
    let taken = folder.lock().unwrap_or_else(|error| {
        tracing::debug!(path = %work_dir.display(), %error, "work directory not locked");
        true
    });
    if taken && held.is_ok_and(|held| named.is_ok_and(|named| same(&held, &named))) {
        return Ok(Work(folder));
    }
    let words = "a checkpoint is being proved here by another command: try again when that has ended";
    let source = io::Error::new(io::ErrorKind::ResourceBusy, words);
    Err(CheckpointError::Io {
        path: work_dir.to_owned(),
        source,
    })
}

/// Makes it with our mark; `owner` may pass through it to what is given to it.
pub(super) fn make(work_dir: &Path, owner: Owner) -> Result<Work, CheckpointError> {
    fs::DirBuilder::new()
        .mode(0o700)
        .create(work_dir)
        .map_err(at(work_dir))?;
    let work = lock(work_dir, open(work_dir).map_err(at(work_dir))?)?;
    let make = || {
        work.create(MARK)?
            .write_all(b"a checkpoint is being proved here\n")?;
        if owner.is_other() {
            work.give(Path::new(""), rustix::process::geteuid().as_raw(), owner.gid)?;
            work.set_mode(0o710)?;
        }
        Ok(())
    };
    make().map_err(at(work_dir))?;
    Ok(work)
}

/// Opens it, if it is the one that we made: who may write beside it can put another in its place.
pub(super) fn open(work_dir: &Path) -> io::Result<Folder> {
    let work = Folder::open(work_dir)?;
    if !work.is_ours()? {
        let words = "another account's directory is in the place of ours";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, words));
    }
    Ok(work)
}

/// Opens the copy in it.
pub(super) fn open_data(work_dir: &Path) -> io::Result<Folder> {
    open(work_dir)?.enter(Path::new(DATA))
}

/// What a shadow says, read from the very file that it writes to.
#[derive(Debug)]
pub(super) struct Log(File);

impl Log {
    /// And where its output and its errors go.
    pub(super) fn make(work: &Folder) -> io::Result<(Self, [File; 2])> {
        let file = work.create("log")?;
        let ends = [file.try_clone()?, file.try_clone()?];
        Ok((Self(file), ends))
    }

    /// The end of it.
    pub(super) fn text(&self) -> String {
        let length = self.0.metadata().map_or(0, |found| found.len());
        let from = length.saturating_sub(LOG_BYTES_MAX as u64);
        let mut bytes = vec![0; LOG_BYTES_MAX];
        let mut filled = 0;
        // By place: the server's own is the end.
        while let Ok(read @ 1..) = self.0.read_at(&mut bytes[filled..], from + filled as u64) {
            filled += read;
        }
        String::from_utf8_lossy(&bytes[..filled]).into_owned()
    }
}

/// Ends what an earlier run left working in its `data` and removes it.
pub(super) async fn clear(work_dir: &Path) -> Result<(), CheckpointError> {
    if work_dir.symlink_metadata().is_err() {
        return Ok(());
    }
    // Only what carries our mark is removed: a mistyped work directory is not.
    if !work_dir.join(MARK).is_file() {
        let source = std::io::Error::new(
            std::io::ErrorKind::AlreadyExists,
            "is no work directory of ours: name one that does not exist",
        );
        return Err(CheckpointError::Io {
            path: work_dir.to_owned(),
            source,
        });
    }
    end(lock(work_dir, Folder::open(work_dir).map_err(at(work_dir))?)?).await
}

/// The same with one that is in use by us.
pub(super) async fn end(work: Work) -> Result<(), CheckpointError> {
    // Whoever works in what a link leads to is none of it.
    if work.enter(Path::new(DATA)).is_ok() {
        clear_directory(&data(work.path()), None, CLEAR_WAIT).await;
    }
    unblock(move || fs::remove_dir_all(work.path()).map_err(at(work.path()))).await
}

/// Where the copy is.
pub(super) fn data(work_dir: &Path) -> PathBuf {
    work_dir.join(DATA)
}

/// Two copies: the one that is kept and the one that the shadow runs on.
pub(super) fn refuse_full_disk(
    work_dir: &Path,
    store: &CheckpointStore,
    bytes: u64,
    left: u64,
) -> Result<(), CheckpointError> {
    refuse_full_disks(&[parent(work_dir), store.dir()], bytes, left)
}

/// A copy of so many bytes in each directory; those on one file system must find room there together.
pub(super) fn refuse_full_disks(dirs: &[&Path], bytes: u64, left: u64) -> Result<(), CheckpointError> {
    let device = |path: &Path| rustix::fs::stat(path).map(|found| found.st_dev).ok();
    for dir in dirs {
        let copies = dirs.iter().filter(|other| device(other) == device(dir)).count();
        needs_room(dir, bytes.saturating_mul(copies as u64), left)?;
    }
    Ok(())
}

pub(super) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// What the copy is called.
pub(super) const DATA: &str = "data";
/// Says that a work directory is ours and may be removed.
const MARK: &str = "THERIAC-WORK";
/// Most of a shadow's log that is read.
const LOG_BYTES_MAX: usize = 4 << 20;
/// Longest wait until a killed shadow is gone.
const CLEAR_WAIT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::store::free_bytes;

    #[test]
    fn copies_on_one_disk_need_their_room_together() {
        let dir = tempfile::tempdir().unwrap();
        let here = dir.path();
        // Two of them take four fifths of what is free, and three more than there is.
        let bytes = free_bytes(here).unwrap() / 5 * 2;
        assert!(refuse_full_disks(&[here, here], bytes, 0).is_ok());
        assert!(matches!(
            refuse_full_disks(&[here, here, here], bytes, 0),
            Err(CheckpointError::DiskFull { .. })
        ));
    }
}
