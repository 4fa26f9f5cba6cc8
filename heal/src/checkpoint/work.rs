//! The directory in which a copy is received and proved: ours alone, and gone afterwards.

use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::store::{CheckpointError, CheckpointStore, at, needs_room};
use super::unblock;
use crate::executor::process::clear_directory;
use crate::postgres::owner::Owner;

/// Makes it (mode 0700) with our mark, for `owner`.
pub(super) fn make(work_dir: &Path, owner: Owner) -> Result<(), CheckpointError> {
    fs::DirBuilder::new()
        .mode(0o700)
        .create(work_dir)
        .map_err(at(work_dir))?;
    let mark = work_dir.join(MARK);
    fs::write(&mark, b"a checkpoint is being proved here\n").map_err(at(&mark))?;
    owner.take(&mark)?;
    owner.take(work_dir)?;
    Ok(())
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
    clear_directory(&data(work_dir), None, CLEAR_WAIT).await;
    let work = work_dir.to_owned();
    unblock(move || fs::remove_dir_all(&work).map_err(at(&work))).await
}

/// Where the copy is.
pub(super) fn data(work_dir: &Path) -> PathBuf {
    work_dir.join("data")
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

/// Says that a work directory is ours and may be removed.
const MARK: &str = "THERIAC-WORK";
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
