//! Directory checkpoints: copied, hashed, synced, renamed; the latest good one is found by its name.
//!
//! ```text
//! STORE/tmp-SEQUENCE/                  being copied: never a checkpoint
//! STORE/SEQUENCE-UNIXMS/{MANIFEST,tree/,PROOF.json}   complete; the proof where a shadow run is needed
//! STORE/SEQUENCE-UNIXMS/FETCHED        it was fetched from elsewhere
//! STORE/quarantine/SEQUENCE-UNIXMS/    found corrupt, kept for a person
//! STATE.restore-partial                being restored
//! STATE.restore-ready                  restored, about to be swapped with STATE
//! STATE.replaced-N                     what STATE was before a restore, kept for a person
//! ```
//!
//! One process writes to a store. A crash at any point leaves every complete checkpoint and either the old or the new state in place.

mod error;
mod restore;
mod tree;
mod verify;

use std::cmp::Reverse;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

pub use self::error::CheckpointError;
pub use self::restore::Restored;
use self::tree::copy_walked;
pub(super) use self::tree::{Within, or_exchanged, walk, walk_in, write_tree};
pub(super) use self::verify::verify_at;
use super::manifest::{Entry, Manifest};
use super::proof::REASON;
use super::remnant::{Size, remnant};
use super::which::Which;
use crate::folder::Folder;

/// How a store keeps its copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreLimits {
    /// Valid checkpoints kept; 1 to 1000. Older ones are removed after a newer one is complete.
    pub keep: usize,
    /// Replaced and quarantined directories kept for a person, each; a restore that would need more is refused.
    pub set_aside_max: usize,
    /// Bytes that must stay free on the file system after a copy. A restore heals, so it asks for 1 MiB at most.
    pub free_bytes_min: u64,
    /// Most files and folders in one state.
    pub entries_max: usize,
    /// Whether only a checkpoint with the proof of a shadow run may be restored.
    pub needs_proof: bool,
}

impl Default for StoreLimits {
    fn default() -> Self {
        Self {
            keep: 3,
            set_aside_max: 8,
            free_bytes_min: 16 << 20,
            entries_max: 100_000,
            needs_proof: false,
        }
    }
}

/// A complete checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Its number, from 1; later is greater, whatever the clock said.
    pub sequence: u64,
    /// When it was taken, milliseconds since the Unix epoch.
    pub unix_ms: u64,
    /// Files in it.
    pub files: u64,
    /// Their bytes together.
    pub bytes: u64,
    /// Its directory.
    pub path: PathBuf,
}

impl Checkpoint {
    fn size(&self) -> Size {
        Size {
            unix_ms: self.unix_ms,
            bytes: self.bytes,
        }
    }
}

/// A copy that is not yet a checkpoint.
#[derive(Debug)]
pub struct Staged {
    checkpoint: Checkpoint,
    tree: PathBuf,
    staging: PathBuf,
}

impl Staged {
    /// The copied state, to be checked before [`CheckpointStore::commit`].
    pub fn tree(&self) -> &Path {
        &self.tree
    }

    pub(super) fn dir(&self) -> &Path {
        &self.staging
    }

    /// What it will be called.
    pub(super) fn name(&self) -> String {
        name_of(self.checkpoint.sequence, self.checkpoint.unix_ms)
    }
}

/// The checkpoints of one service.
#[derive(Debug, Clone)]
pub struct CheckpointStore {
    dir: PathBuf,
    limits: StoreLimits,
}

impl CheckpointStore {
    /// Opens or makes a store (mode 0700).
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn open(dir: &Path, limits: StoreLimits) -> Result<Self, CheckpointError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(at(dir))?;
        let limits = StoreLimits {
            keep: limits.keep.max(1),
            ..limits
        };
        Ok(Self {
            dir: dir.to_owned(),
            limits,
        })
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Held while a checkpoint is removed or restored, so that none is removed under the hands that restore it. Other processes wait too.
    pub(super) fn guard(&self) -> Result<File, CheckpointError> {
        let dir = File::open(&self.dir).map_err(at(&self.dir))?;
        flock(&dir, FlockOperation::LockExclusive).map_err(|error| at(&self.dir)(error.into()))?;
        Ok(dir)
    }

    pub(super) fn limits(&self) -> StoreLimits {
        self.limits
    }

    /// Where what is refused goes, made when it is not there.
    pub(super) fn quarantine_dir(&self) -> Result<PathBuf, CheckpointError> {
        let dir = self.dir.join(QUARANTINE);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(at(&dir))?;
        Ok(dir)
    }

    /// Copies `state` and makes it the newest checkpoint.
    ///
    /// # Errors
    /// [`CheckpointError`].
    pub fn take(&self, state: &Path, unix_ms: u64) -> Result<Checkpoint, CheckpointError> {
        let staged = self.stage(state, unix_ms)?;
        self.commit(staged)
    }

    /// Copies `state`, invisible until [`Self::commit`]. Copies that were never completed are removed first. Sockets, pipes and
    /// devices are left out. A file may grow meanwhile; when one vanishes the copy begins again, up to three times.
    ///
    /// # Errors
    /// [`CheckpointError`].
    pub fn stage(&self, state: &Path, unix_ms: u64) -> Result<Staged, CheckpointError> {
        let from = Folder::open_named(state).map_err(at(state))?;
        self.stage_from(&from, unix_ms)
    }

    /// The same of a directory that is open.
    pub(super) fn stage_from(&self, from: &Folder, unix_ms: u64) -> Result<Staged, CheckpointError> {
        self.remove_incomplete()?;
        let state = from.path();
        let entries = walk_in(from, self.limits.entries_max)?;
        let bytes: u64 = entries
            .iter()
            .map(|(_, metadata)| if metadata.is_file() { metadata.len() } else { 0 })
            .sum();
        needs_room(&self.dir, bytes, self.limits.free_bytes_min)?;
        let sequence = self.last_sequence()? + 1;
        let path = self.dir.join(format!("{INCOMPLETE}{sequence:012}"));
        let mut attempt = 1;
        let entries = loop {
            match self.copy_tree(from, &path) {
                Ok(entries) => break entries,
                Err(CheckpointError::Io { source, .. })
                    if source.kind() == io::ErrorKind::NotFound
                        && state.exists()
                        && attempt < ATTEMPTS_MAX =>
                {
                    fs::remove_dir_all(&path).map_err(at(&path))?;
                    attempt += 1;
                }
                Err(CheckpointError::Io {
                    path: missing,
                    source,
                }) if source.kind() == io::ErrorKind::NotFound && state.exists() => {
                    self.remove_incomplete()?;
                    return Err(CheckpointError::Changing {
                        path: missing,
                        attempts: attempt,
                    });
                }
                Err(error) => {
                    // Room is most needed exactly now; the first error is the one to tell.
                    if let Err(second) = self.remove_incomplete() {
                        tracing::warn!(error = %second, "incomplete checkpoint not removed");
                    }
                    return Err(error);
                }
            }
        };
        let manifest = Manifest {
            sequence,
            unix_ms,
            entries,
        };
        write_synced(
            &path.join(MANIFEST),
            &manifest.encode().map_err(at(&path))?,
            bytes,
        )?;
        sync_dir(&path)?;
        let checkpoint = Checkpoint {
            sequence,
            unix_ms,
            files: manifest.files(),
            bytes: manifest.bytes(),
            path: self.dir.join(name_of(sequence, unix_ms)),
        };
        Ok(Staged {
            checkpoint,
            tree: path.join(TREE),
            staging: path,
        })
    }

    /// Makes a staged copy the newest checkpoint. It is read back, and only when it proves good the oldest beyond the number kept are
    /// removed; what cannot be restored is none of that number. The last one from before the state lost nine tenths is kept as well, for a week.
    ///
    /// # Errors
    /// [`CheckpointError::Io`]; [`CheckpointError::Corrupt`] when it cannot be read back as it was written.
    pub fn commit(&self, staged: Staged) -> Result<Checkpoint, CheckpointError> {
        let checkpoint = staged.checkpoint;
        // Read back before it is visible: the check of a service may have touched the copy.
        verify_at(&staged.staging)?;
        let _guard = self.guard()?;
        fs::rename(&staged.staging, &checkpoint.path).map_err(at(&checkpoint.path))?;
        sync_dir(&self.dir)?;
        let kept = self.list()?;
        let lost = remnant(kept.iter().map(Checkpoint::size));
        let mut good = 0;
        for (at, old) in kept.into_iter().enumerate() {
            if good < self.limits.keep {
                good += usize::from(self.may_be_restored(&old));
                continue;
            }
            if lost == Some(at) {
                let (path, before, now) = (old.path.display(), old.bytes, checkpoint.bytes);
                tracing::warn!(%path, before, now, "the state lost nine tenths: its last copy from before that is kept as well");
                continue;
            }
            let doomed = self.dir.join(format!("{INCOMPLETE}{:012}", old.sequence));
            if let Err(error) = fs::rename(&old.path, &doomed).and_then(|()| fs::remove_dir_all(&doomed)) {
                // The new checkpoint stands all the same.
                tracing::warn!(checkpoint = %old.path.display(), %error, "old checkpoint not removed");
            }
        }
        Ok(checkpoint)
    }

    /// Those of [`Self::list`] that a restore would try: the manifest is whole and, where it is needed, the proof is there.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn restorable(&self) -> Result<Vec<Checkpoint>, CheckpointError> {
        let mut found = self.list()?;
        found.retain(|checkpoint| self.may_be_restored(checkpoint));
        Ok(found)
    }

    fn may_be_restored(&self, checkpoint: &Checkpoint) -> bool {
        read_manifest(&checkpoint.path).is_ok() && self.refuse_unproved(checkpoint).is_ok()
    }

    /// Throws a staged copy away.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn discard(&self, staged: Staged) -> Result<(), CheckpointError> {
        fs::remove_dir_all(&staged.staging).map_err(at(&staged.staging))
    }

    /// Complete checkpoints, newest first, those that were fetched from elsewhere after all that were taken here: their numbers are another store's.
    /// They are not verified; one whose manifest cannot be read counts zero files.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn list(&self) -> Result<Vec<Checkpoint>, CheckpointError> {
        let mut found = Vec::new();
        for name in names(&self.dir)? {
            let Some((sequence, unix_ms)) = parse_name(&name) else {
                continue;
            };
            let path = self.dir.join(&name);
            let manifest = read_manifest(&path).ok();
            let files = manifest.as_ref().map_or(0, Manifest::files);
            let bytes = manifest.as_ref().map_or(0, Manifest::bytes);
            found.push(Checkpoint {
                sequence,
                unix_ms,
                files,
                bytes,
                path,
            });
        }
        found.sort_by_cached_key(|checkpoint| {
            let fetched = checkpoint.path.join(FETCHED).exists();
            (fetched, Reverse((checkpoint.sequence, checkpoint.unix_ms)))
        });
        Ok(found)
    }

    /// Reads every byte of a checkpoint and compares it with the manifest.
    ///
    /// # Errors
    /// [`CheckpointError::Corrupt`], [`CheckpointError::NoSuch`] when there is none of that number,
    /// [`CheckpointError::SeveralOfNumber`] when the number alone does not tell.
    pub fn verify(&self, which: impl Into<Which>) -> Result<Checkpoint, CheckpointError> {
        let checkpoint = self.named(which.into())?;
        let manifest = verify_at(&checkpoint.path)?;
        Ok(Checkpoint {
            files: manifest.files(),
            bytes: manifest.bytes(),
            ..checkpoint
        })
    }

    /// Sets one aside that is damaged, with what is wrong beside it. Where it went; `None` when there are too many already and it stays where it is.
    fn set_aside_for(&self, checkpoint: &Checkpoint, what: &str) -> Result<Option<PathBuf>, CheckpointError> {
        let to = self.quarantine(checkpoint)?;
        if let Some(to) = &to {
            // It is set aside with or without its reason.
            let reason = to.join(REASON);
            if let Err(error) = write_synced(&reason, what.as_bytes(), 0) {
                tracing::warn!(path = %reason.display(), %error, "no reason was left beside a damaged checkpoint");
            }
        }
        Ok(to)
    }

    fn quarantine(&self, checkpoint: &Checkpoint) -> Result<Option<PathBuf>, CheckpointError> {
        let dir = self.quarantine_dir()?;
        if names(&dir)?.len() >= self.limits.set_aside_max {
            return Ok(None);
        }
        let to = dir.join(name_of(checkpoint.sequence, checkpoint.unix_ms));
        fs::rename(&checkpoint.path, &to).map_err(at(&to))?;
        sync_dir(&dir)?;
        sync_dir(&self.dir)?;
        Ok(Some(to))
    }

    fn named(&self, which: Which) -> Result<Checkpoint, CheckpointError> {
        let list = self.list()?;
        let only = which
            .only(list.iter().map(|found| (found.sequence, found.unix_ms)))
            .map_err(|names| CheckpointError::SeveralOfNumber {
                place: self.dir.display().to_string(),
                sequence: which.sequence,
                names,
            })?;
        let names = list.iter().map(|found| found.sequence.to_string()).collect();
        list.into_iter()
            .find(|found| only == Some((found.sequence, found.unix_ms)))
            .ok_or_else(|| CheckpointError::NoSuch {
                place: self.dir.display().to_string(),
                named: which,
                names,
            })
    }

    fn last_sequence(&self) -> Result<u64, CheckpointError> {
        let mut last = 0;
        for dir in [self.dir.clone(), self.dir.join(QUARANTINE)] {
            if dir.exists() {
                let known = names(&dir)?;
                last = known
                    .iter()
                    .filter_map(|name| parse_name(name))
                    .map(|(n, _)| n)
                    .fold(last, u64::max);
            }
        }
        Ok(last)
    }

    fn remove_incomplete(&self) -> Result<(), CheckpointError> {
        for name in names(&self.dir)? {
            if name.starts_with(INCOMPLETE) {
                let path = self.dir.join(name);
                fs::remove_dir_all(&path).map_err(at(&path))?;
            }
        }
        Ok(())
    }

    fn copy_tree(&self, from: &Folder, to: &Path) -> Result<Vec<Entry>, CheckpointError> {
        DirBuilder::new().mode(0o700).create(to).map_err(at(to))?;
        let walked = walk_in(from, self.limits.entries_max)?;
        copy_walked(from, walked, &to.join(TREE))
    }
}

/// Bytes free for us on the file system of `path`.
///
/// # Errors
/// [`CheckpointError::Io`].
pub fn free_bytes(path: &Path) -> Result<u64, CheckpointError> {
    let found = rustix::fs::statvfs(path).map_err(|error| at(path)(error.into()))?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

fn create(path: &Path, mode: u32) -> Result<File, CheckpointError> {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|e| full_or(path, e))?;
    file.set_permissions(fs::Permissions::from_mode(mode & 0o7777))
        .map_err(at(path))?;
    Ok(file)
}

/// Whether `bytes` can be written to the file system of `path` so that `left` bytes stay free.
pub(super) fn needs_room(path: &Path, bytes: u64, left: u64) -> Result<(), CheckpointError> {
    let free = free_bytes(path)?;
    let needed = bytes.saturating_add(left);
    if free < needed {
        return Err(CheckpointError::DiskFull {
            path: path.to_owned(),
            needed,
            free,
        });
    }
    Ok(())
}

pub(super) fn read_manifest(path: &Path) -> Result<Manifest, CheckpointError> {
    let corrupt = |what: String| CheckpointError::Corrupt {
        path: path.to_owned(),
        what,
    };
    let file = path.join(MANIFEST);
    match fs::read(&file) {
        Ok(bytes) => Manifest::decode(&bytes).map_err(corrupt),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(corrupt("it has no manifest".to_owned()))
        }
        Err(error) => Err(at(&file)(error)),
    }
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// `dir` itself for an empty path: joining that would leave a slash at the end, which follows a link.
pub(super) fn joined(dir: &Path, path: &Path) -> PathBuf {
    if path.as_os_str().is_empty() {
        dir.to_owned()
    } else {
        dir.join(path)
    }
}

pub(super) fn names(dir: &Path) -> Result<Vec<String>, CheckpointError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(at(dir))? {
        // A name that is not UTF-8 is none of ours.
        found.extend(entry.map_err(at(dir))?.file_name().into_string().ok());
    }
    found.sort();
    Ok(found)
}

pub(super) fn name_of(sequence: u64, unix_ms: u64) -> String {
    format!("{sequence:012}-{unix_ms}")
}

pub(super) fn parse_name(name: &str) -> Option<(u64, u64)> {
    let (sequence, unix_ms) = name.split_once('-')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    (sequence.len() >= 12 && digits(sequence) && digits(unix_ms)).then_some(())?;
    Some((sequence.parse().ok()?, unix_ms.parse().ok()?))
}

pub(super) fn write_synced(path: &Path, bytes: &[u8], needed: u64) -> Result<(), CheckpointError> {
    use std::io::Write as _;
    let mut file = create(path, 0o600)?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(|error| match full_or(path, error) {
            CheckpointError::DiskFull { path, free, .. } => CheckpointError::DiskFull { path, needed, free },
            other => other,
        })
}

pub(super) fn sync_dir(path: &Path) -> Result<(), CheckpointError> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(at(path))
}

pub(super) fn at(path: &Path) -> impl FnOnce(io::Error) -> CheckpointError + use<> {
    let path = path.to_owned();
    move |source| full_or(&path, source)
}

/// A full disk or an exhausted quota has its own error, because the caller can do something about it.
fn full_or(path: &Path, source: io::Error) -> CheckpointError {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            let free = rustix::fs::statvfs(parent(path)).map_or(0, |found| found.f_bavail * found.f_frsize);
            CheckpointError::DiskFull {
                path: path.to_owned(),
                needed: free.saturating_add(1),
                free,
            }
        }
        _ => CheckpointError::Io {
            path: path.to_owned(),
            source,
        },
    }
}

pub(super) const MANIFEST: &str = "MANIFEST";
pub(super) const TREE: &str = "tree";
pub(super) const QUARANTINE: &str = "quarantine";
/// Beside the tree of a copy that was fetched.
pub(super) const FETCHED: &str = "FETCHED";
pub(super) const INCOMPLETE: &str = "tmp-";
const ATTEMPTS_MAX: u32 = 3;
