//! Directory checkpoints: copied, hashed, synced, renamed; the latest good one is found by its name.
//!
//! ```text
//! STORE/tmp-SEQUENCE/                  being copied: never a checkpoint
//! STORE/SEQUENCE-UNIXMS/{MANIFEST,tree/,PROOF.json}   complete; the proof where a shadow run is needed
//! STORE/quarantine/SEQUENCE-UNIXMS/    found corrupt, kept for a person
//! STATE.restore-partial                being restored
//! STATE.restore-ready                  restored, about to be swapped with STATE
//! STATE.replaced-N                     what STATE was before a restore, kept for a person
//! ```
//!
//! One process writes to a store. A crash at any point leaves every complete checkpoint and either the old or the new state in place.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};

use super::durable::Durability;
use super::manifest::{Entry, Kind, Manifest, copy_digest};
use super::proof::REASON;
use super::which::Which;
use crate::background::Background;

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

/// What a restore did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// The checkpoint that now is the state.
    pub checkpoint: Checkpoint,
    /// Where the replaced state is kept; `None` when there was none.
    pub replaced: Option<PathBuf>,
    /// Checkpoints that turned out to be corrupt on the way and were set aside.
    pub quarantined: Vec<PathBuf>,
}

/// Why a checkpoint could not be taken, verified or restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// Too little room. Nothing was changed.
    #[error("{path}: {needed} bytes are needed and {free} are free: make room, then try again")]
    DiskFull {
        /// Where.
        path: PathBuf,
        /// Bytes needed, with those that must stay free.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// The checkpoint is not what its manifest says.
    #[error("checkpoint {path} is corrupt: {what}")]
    Corrupt {
        /// The checkpoint.
        path: PathBuf,
        /// What differs: expected and found.
        what: String,
    },
    /// There is no valid checkpoint.
    #[error("{path} holds no valid checkpoint ({refused} were refused)")]
    NoneValid {
        /// The store.
        path: PathBuf,
        /// How many were refused.
        refused: usize,
    },
    /// None has the number that was named.
    #[error("{place} holds no valid checkpoint {named}; valid are: {}", if names.is_empty() { "none".to_owned() } else { names.join(", ") })]
    NoSuch {
        /// The store.
        place: String,
        /// What was named.
        named: Which,
        /// Those that are there.
        names: Vec<String>,
    },
    /// Two have the number that was named.
    #[error("{place} holds more than one checkpoint of number {sequence}: name one of {}", names.join(", "))]
    SeveralOfNumber {
        /// The store.
        place: String,
        /// The number.
        sequence: u64,
        /// Their numbers and times, which tell them apart.
        names: Vec<String>,
    },
    /// The copy did not pass the service's own check.
    #[error("the copy of {path} did not pass the state check: {detail}")]
    NotGood {
        /// The state.
        path: PathBuf,
        /// What the check said.
        detail: String,
    },
    /// The copy is bad; it was set aside, or it lies where it was found.
    #[error("the copy in {path} is not valid: {reason}")]
    Invalid {
        /// Where it is.
        path: PathBuf,
        /// Which check refused it, and why.
        reason: String,
    },
    /// Whether the copy is good could not be found out, so it was not kept.
    #[error("a copy for {path} could not be proved: {detail}")]
    Unproven {
        /// The store or the checkpoint.
        path: PathBuf,
        /// Which check could not be made, and why.
        detail: String,
    },
    /// The server or one of its programs did not do as asked.
    #[error(transparent)]
    Postgres(Box<crate::postgres::PostgresError>),
    /// The Redis server did not do as asked.
    #[error(transparent)]
    Redis(Box<super::redis::RedisError>),
    /// The state kept changing while it was copied.
    #[error("{path} kept changing while it was copied ({attempts} attempts)")]
    Changing {
        /// What vanished or changed.
        path: PathBuf,
        /// How often it was tried.
        attempts: u32,
    },
    /// Too many directories are set aside.
    #[error(
        "{found} directories are set aside beside {path}, {max} are allowed: look at them and move them away"
    )]
    TooManySetAside {
        /// The state or the store.
        path: PathBuf,
        /// How many there are.
        found: usize,
        /// How many are allowed.
        max: usize,
    },
    /// The state has more entries than allowed.
    #[error(
        "{path} has more than {max} files and folders: raise the limit or name a smaller state directory"
    )]
    TooManyEntries {
        /// The state.
        path: PathBuf,
        /// The limit.
        max: usize,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
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
        self.remove_incomplete()?;
        let entries = walk(state, self.limits.entries_max)?;
        let bytes: u64 = entries
            .iter()
            .map(|(_, metadata)| if metadata.is_file() { metadata.len() } else { 0 })
            .sum();
        needs_room(&self.dir, bytes, self.limits.free_bytes_min)?;
        let sequence = self.last_sequence()? + 1;
        let path = self.dir.join(format!("{INCOMPLETE}{sequence:012}"));
        let mut attempt = 1;
        let entries = loop {
            match self.copy_tree(state, &path) {
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
    /// removed.
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
        for old in self.list()?.into_iter().skip(self.limits.keep) {
            let doomed = self.dir.join(format!("{INCOMPLETE}{:012}", old.sequence));
            if let Err(error) = fs::rename(&old.path, &doomed).and_then(|()| fs::remove_dir_all(&doomed)) {
                // The new checkpoint stands all the same.
                tracing::warn!(checkpoint = %old.path.display(), %error, "old checkpoint not removed");
            }
        }
        Ok(checkpoint)
    }

    /// Throws a staged copy away.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn discard(&self, staged: Staged) -> Result<(), CheckpointError> {
        fs::remove_dir_all(&staged.staging).map_err(at(&staged.staging))
    }

    /// Complete checkpoints, newest first, not verified. A checkpoint whose manifest cannot be read counts zero files.
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
        found.sort_by_key(|checkpoint| std::cmp::Reverse((checkpoint.sequence, checkpoint.unix_ms)));
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

    /// Reads one checkpoint whole, standing back for the host's services, and sets it aside when it is not as it was taken. What differs then; `None` when it
    /// is as it was, and when it is not there any more. Its proof is for a restore to look at.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] when it cannot be read, which says nothing of it; [`CheckpointError::TooManySetAside`] when it is damaged and has to stay.
    pub async fn scrub(
        self: &Arc<Self>,
        checkpoint: &Checkpoint,
        background: &Background,
    ) -> Result<Option<String>, CheckpointError> {
        let (store, checkpoint) = (Arc::clone(self), checkpoint.clone());
        let read = super::unblock_behind(background, move || store.scrub_now(&checkpoint));
        background.during(read).await
    }

    fn scrub_now(&self, checkpoint: &Checkpoint) -> Result<Option<String>, CheckpointError> {
        let looked = verify_at(&checkpoint.path);
        // A restore or a newer one may be at it: whoever comes first has it.
        let _guard = self.guard()?;
        if !checkpoint.path.exists() {
            return Ok(None);
        }
        let what = match looked {
            Ok(_) => return Ok(None),
            Err(CheckpointError::Corrupt { what, .. }) => what,
            Err(error) => return Err(error),
        };
        if let Some(to) = self.quarantine(checkpoint)? {
            // It is set aside with or without its reason.
            let reason = to.join(REASON);
            if let Err(error) = write_synced(&reason, what.as_bytes(), 0) {
                tracing::warn!(path = %reason.display(), %error, "no reason was left beside a damaged checkpoint");
            }
        } else {
            let path = self.quarantine_dir()?;
            return Err(CheckpointError::TooManySetAside {
                found: names(&path)?.len(),
                path,
                max: self.limits.set_aside_max,
            });
        }
        Ok(Some(what))
    }

    /// Puts the newest valid checkpoint in the place of `state`; corrupt ones met on the way are set aside. The service must be
    /// stopped.
    ///
    /// # Errors
    /// [`CheckpointError`]; then `state` is as it was.
    pub fn restore(&self, state: &Path) -> Result<Restored, CheckpointError> {
        let _guard = self.guard()?;
        let candidates = self.list()?;
        let mut quarantined = Vec::new();
        let mut refused = 0;
        for checkpoint in candidates {
            if self.refuse_unproved(&checkpoint).is_err() {
                refused += 1;
                continue;
            }
            match self.restore_one(&checkpoint, state) {
                Ok(replaced) => {
                    return Ok(Restored {
                        checkpoint,
                        replaced,
                        quarantined,
                    });
                }
                Err(CheckpointError::Corrupt { what, .. }) => {
                    refused += 1;
                    tracing::warn!(checkpoint = %checkpoint.path.display(), what, "corrupt checkpoint set aside");
                    quarantined.extend(self.quarantine(&checkpoint)?);
                }
                Err(error) => return Err(error),
            }
        }
        Err(CheckpointError::NoneValid {
            path: self.dir.clone(),
            refused,
        })
    }

    /// The same with one named checkpoint; it is refused, not set aside, when it is corrupt.
    ///
    /// # Errors
    /// [`CheckpointError`]; then `state` is as it was.
    pub fn restore_sequence(
        &self,
        which: impl Into<Which>,
        state: &Path,
    ) -> Result<Restored, CheckpointError> {
        let _guard = self.guard()?;
        let checkpoint = self.named(which.into())?;
        self.refuse_unproved(&checkpoint)?;
        let replaced = self.restore_one(&checkpoint, state)?;
        Ok(Restored {
            checkpoint,
            replaced,
            quarantined: Vec::new(),
        })
    }

    /// Ends a restore that a crash interrupted: when `state` is missing and its successor is complete, that takes its place; what
    /// else was left is set aside or, if incomplete, removed. Call before a start.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn finish_interrupted(&self, state: &Path) -> Result<(), CheckpointError> {
        let (partial, ready) = (beside(state, PARTIAL), beside(state, READY));
        if partial.symlink_metadata().is_ok() {
            fs::remove_dir_all(&partial).map_err(at(&partial))?;
        }
        if ready.symlink_metadata().is_ok() {
            let to = if state.symlink_metadata().is_ok() {
                next_replaced(state)?
            } else {
                state.to_owned()
            };
            fs::rename(&ready, &to).map_err(at(&to))?;
            sync_dir(parent(state))?;
        }
        Ok(())
    }

    fn restore_one(&self, checkpoint: &Checkpoint, state: &Path) -> Result<Option<PathBuf>, CheckpointError> {
        self.finish_interrupted(state)?;
        let aside = replaced(state)?.len();
        if aside >= self.limits.set_aside_max {
            let max = self.limits.set_aside_max;
            return Err(CheckpointError::TooManySetAside {
                path: state.to_owned(),
                found: aside,
                max,
            });
        }
        let manifest = verify_at(&checkpoint.path)?;
        let left = self.limits.free_bytes_min.min(RESTORE_FREE_BYTES);
        needs_room(parent(state), manifest.bytes(), left)?;
        let (partial, ready) = (beside(state, PARTIAL), beside(state, READY));
        let written = write_tree(
            &checkpoint.path,
            &manifest,
            &partial,
            Durability::at_once(manifest.entries.len()),
        );
        if written.is_err()
            && let Err(error) = fs::remove_dir_all(&partial)
        {
            tracing::warn!(path = %partial.display(), %error, "incomplete restore not removed");
        }
        written?;
        fs::rename(&partial, &ready).map_err(at(&ready))?;
        sync_dir(parent(state))?;
        swap(&ready, state)
    }

    /// Where it went; `None` when there are too many already and it stays where it is.
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

    fn copy_tree(&self, state: &Path, to: &Path) -> Result<Vec<Entry>, CheckpointError> {
        DirBuilder::new().mode(0o700).create(to).map_err(at(to))?;
        let tree = to.join(TREE);
        let mut entries = Vec::new();
        let mut folders = Vec::new();
        let walked = walk(state, self.limits.entries_max)?;
        let mut sync = Durability::paced();
        for (path, metadata) in walked {
            let (source, copy) = (joined(state, &path), joined(&tree, &path));
            let kind = if metadata.is_dir() {
                DirBuilder::new().mode(0o700).create(&copy).map_err(at(&copy))?;
                folders.push((copy, metadata.mode()));
                Kind::Folder
            } else if metadata.is_symlink() {
                let target = fs::read_link(&source).map_err(at(&source))?;
                std::os::unix::fs::symlink(&target, &copy).map_err(at(&copy))?;
                Kind::Link { target }
            } else {
                copy_file(&source, &copy, metadata.mode(), &mut sync)?
            };
            entries.push(Entry::new(path, kind, &metadata));
        }
        seal(&folders, &mut sync)?;
        sync.end(&tree).map_err(|error| full_or(&tree, error))?;
        Ok(entries)
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

/// Every entry under `dir`, itself first with an empty path; a folder comes before its content, names in order.
pub(super) fn walk(dir: &Path, max: usize) -> Result<Vec<(PathBuf, fs::Metadata)>, CheckpointError> {
    let mut found = vec![(PathBuf::new(), fs::metadata(dir).map_err(at(dir))?)];
    let mut at_entry = 0;
    while at_entry < found.len() {
        let (path, metadata) = found[at_entry].clone();
        at_entry += 1;
        if !metadata.is_dir() {
            continue;
        }
        let folder = joined(dir, &path);
        let mut inside: Vec<PathBuf> = Vec::new();
        for entry in fs::read_dir(&folder).map_err(at(&folder))? {
            inside.push(path.join(entry.map_err(at(&folder))?.file_name()));
        }
        inside.sort();
        for path in inside {
            let full = dir.join(&path);
            let metadata = full.symlink_metadata().map_err(at(&full))?;
            if path.to_str().is_none() {
                let source = io::Error::new(io::ErrorKind::InvalidInput, "the name is not UTF-8");
                return Err(CheckpointError::Io { path: full, source });
            }
            if metadata.is_dir() || metadata.is_file() || metadata.is_symlink() {
                found.push((path, metadata));
            }
            if found.len() > max {
                return Err(CheckpointError::TooManyEntries {
                    path: dir.to_owned(),
                    max,
                });
            }
        }
    }
    Ok(found)
}

fn copy_file(from: &Path, to: &Path, mode: u32, sync: &mut Durability) -> Result<Kind, CheckpointError> {
    let mut source = File::open(from).map_err(at(from))?;
    let mut copy = create(to, mode)?;
    let copied = sync.copy(&mut source, &mut copy);
    let (bytes, sha256) = copied.map_err(|error| full_or(to, error))?;
    Ok(Kind::File { bytes, sha256 })
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

/// Syncs folders where that is done one by one, innermost first, and gives them their permissions.
fn seal(folders: &[(PathBuf, u32)], sync: &mut Durability) -> Result<(), CheckpointError> {
    for (folder, mode) in folders.iter().rev() {
        sync.folder(folder).map_err(at(folder))?;
        fs::set_permissions(folder, fs::Permissions::from_mode(mode & 0o7777)).map_err(at(folder))?;
    }
    Ok(())
}

/// Writes the checkpoint at `from` to `to`, comparing each digest once more on the way.
pub(super) fn write_tree(
    from: &Path,
    manifest: &Manifest,
    to: &Path,
    mut sync: Durability,
) -> Result<(), CheckpointError> {
    let tree = from.join(TREE);
    let mut folders = Vec::new();
    for entry in &manifest.entries {
        let (source, path) = (joined(&tree, &entry.path), joined(to, &entry.path));
        match &entry.kind {
            Kind::Folder => {
                DirBuilder::new()
                    .mode(0o700)
                    .create(&path)
                    .map_err(|error| full_or(&path, error))?;
                folders.push((path.clone(), entry.mode));
            }
            Kind::Link { target } => {
                std::os::unix::fs::symlink(target, &path).map_err(|error| full_or(&path, error))?;
            }
            Kind::File { .. } => {
                let found = copy_file(&source, &path, entry.mode, &mut sync)?;
                differs(from, entry, &found)?;
            }
        }
        let made = path.symlink_metadata().map_err(at(&path))?;
        if (made.uid(), made.gid()) != (entry.uid, entry.gid) {
            std::os::unix::fs::lchown(&path, Some(entry.uid), Some(entry.gid)).map_err(at(&path))?;
        }
    }
    seal(&folders, &mut sync)?;
    sync.end(to).map_err(|error| full_or(to, error))
}

/// Reads a checkpoint whole: the manifest, every byte of every file, and that nothing is missing or extra.
pub(super) fn verify_at(path: &Path) -> Result<Manifest, CheckpointError> {
    let corrupt = |what: String| CheckpointError::Corrupt {
        path: path.to_owned(),
        what,
    };
    let manifest = read_manifest(path)?;
    let tree = path.join(TREE);
    let expected: BTreeSet<&PathBuf> = manifest.entries.iter().map(|entry| &entry.path).collect();
    let walked = walk(&tree, manifest.entries.len()).map_err(|error| match error {
        CheckpointError::TooManyEntries { .. } => corrupt("it holds more than its manifest names".to_owned()),
        CheckpointError::Io {
            path: missing,
            source,
        } if source.kind() == io::ErrorKind::NotFound => corrupt(format!("{} is missing", missing.display())),
        other => other,
    })?;
    let walked: BTreeMap<PathBuf, fs::Metadata> = walked.into_iter().collect();
    if let Some(extra) = walked.keys().find(|found| !expected.contains(found)) {
        return Err(corrupt(format!("{} is not in its manifest", extra.display())));
    }
    for entry in &manifest.entries {
        let full = joined(&tree, &entry.path);
        let Some(metadata) = walked.get(&entry.path) else {
            return Err(corrupt(format!("{} is missing", full.display())));
        };
        let found = if metadata.is_dir() {
            Kind::Folder
        } else if metadata.is_symlink() {
            Kind::Link {
                target: fs::read_link(&full).map_err(at(&full))?,
            }
        } else {
            let mut file = File::open(&full).map_err(at(&full))?;
            let (bytes, sha256) = copy_digest(&mut file, &mut io::sink()).map_err(at(&full))?;
            Kind::File { bytes, sha256 }
        };
        differs(path, entry, &found)?;
    }
    Ok(manifest)
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

fn differs(checkpoint: &Path, entry: &Entry, found: &Kind) -> Result<(), CheckpointError> {
    if entry.kind == *found {
        return Ok(());
    }
    let what = format!("{}: expected {}, found {found}", entry.path.display(), entry.kind);
    Err(CheckpointError::Corrupt {
        path: checkpoint.to_owned(),
        what,
    })
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

/// Puts `ready` in the place of `state`, in one step where the file system can. Where the former state went.
fn swap(ready: &Path, state: &Path) -> Result<Option<PathBuf>, CheckpointError> {
    let folder = parent(state);
    if state.symlink_metadata().is_err() {
        fs::rename(ready, state).map_err(at(state))?;
        sync_dir(folder)?;
        return Ok(None);
    }
    let aside = next_replaced(state)?;
    if renameat_with(CWD, ready, CWD, state, RenameFlags::EXCHANGE).is_ok() {
        sync_dir(folder)?;
        fs::rename(ready, &aside).map_err(at(&aside))?;
    } else {
        // In two steps; `finish_interrupted` takes the second one after a crash.
        fs::rename(state, &aside).map_err(at(&aside))?;
        fs::rename(ready, state).map_err(at(state))?;
    }
    sync_dir(folder)?;
    Ok(Some(aside))
}

/// Former states beside `state`, with their numbers.
fn replaced(state: &Path) -> Result<Vec<u64>, CheckpointError> {
    let prefix = beside(state, REPLACED);
    let Some(prefix) = prefix.file_name().and_then(|name| name.to_str()) else {
        return Ok(Vec::new());
    };
    let found = names(parent(state))?;
    Ok(found
        .iter()
        .filter_map(|name| name.strip_prefix(prefix)?.parse().ok())
        .collect())
}

fn next_replaced(state: &Path) -> Result<PathBuf, CheckpointError> {
    let last = replaced(state)?.into_iter().max().unwrap_or(0);
    Ok(beside(state, &format!("{REPLACED}{}", last + 1)))
}

fn beside(state: &Path, suffix: &str) -> PathBuf {
    let mut name = state.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    state.with_file_name(name)
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
pub(super) const INCOMPLETE: &str = "tmp-";
const PARTIAL: &str = ".restore-partial";
const READY: &str = ".restore-ready";
const REPLACED: &str = ".replaced-";
const ATTEMPTS_MAX: u32 = 3;
/// Most bytes that must stay free after a restore: what the service needs to begin with.
const RESTORE_FREE_BYTES: u64 = 1 << 20;
