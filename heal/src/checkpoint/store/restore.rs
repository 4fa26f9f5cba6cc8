//! Putting a checkpoint in the place of a state, so that a crash leaves one or the other.

use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};
use std::{fmt, fs};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::tree::write_tree;
use super::verify::verify_at;
use super::{Checkpoint, CheckpointError, CheckpointStore, at, names, needs_room, parent, sync_dir};
use crate::checkpoint::durable::Durability;
use crate::checkpoint::which::Which;

/// What a restore did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// The checkpoint that now is the state.
    pub checkpoint: Checkpoint,
    /// Where the replaced state is kept; `None` when there was none.
    pub replaced: Option<PathBuf>,
    /// Checkpoints that turned out to be corrupt on the way and were set aside.
    pub quarantined: Vec<PathBuf>,
    /// What the first one that could not be read is called and why, in words. It stays where it is: an error of the disk says nothing of it.
    pub unread: Option<String>,
}

impl fmt::Display for Restored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let taken = UNIX_EPOCH + Duration::from_millis(self.checkpoint.unix_ms);
        write!(
            f,
            "checkpoint {} of {} is in place",
            self.checkpoint.sequence,
            humantime::format_rfc3339_seconds(taken)
        )?;
        if let Some(replaced) = &self.replaced {
            write!(f, ", what it replaced is kept in {}", replaced.display())?;
        }
        for path in &self.quarantined {
            write!(
                f,
                ", a newer one was damaged and is set aside in {}",
                path.display()
            )?;
        }
        if let Some(words) = &self.unread {
            write!(f, ", a newer one could not be read and stays: {words}")?;
        }
        Ok(())
    }
}

impl CheckpointStore {
    /// Puts the newest valid checkpoint in the place of `state`; corrupt ones met on the way are set aside, and those that cannot be read are passed
    /// over. The service must be stopped.
    ///
    /// # Errors
    /// [`CheckpointError`]; then `state` is as it was.
    pub fn restore(&self, state: &Path) -> Result<Restored, CheckpointError> {
        let _guard = self.guard()?;
        let candidates = self.list()?;
        let mut quarantined = Vec::new();
        let mut refused = 0;
        let mut unread = None;
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
                        unread,
                    });
                }
                // An error of where it is written is one for every checkpoint.
                Err(CheckpointError::Io { path, source }) if path.starts_with(&checkpoint.path) => {
                    refused += 1;
                    tracing::warn!(path = %path.display(), error = %source, "checkpoint cannot be read, the one before it is tried");
                    unread.get_or_insert_with(|| format!("{}: {source}", path.display()));
                }
                Err(CheckpointError::Corrupt { what, .. }) => {
                    refused += 1;
                    tracing::warn!(checkpoint = %checkpoint.path.display(), what, "corrupt checkpoint set aside");
                    quarantined.extend(self.set_aside_for(&checkpoint, &what)?);
                }
                Err(error) => return Err(error),
            }
        }
        Err(CheckpointError::NoneValid {
            path: self.dir.clone(),
            refused,
            unread,
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
            unread: None,
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

const PARTIAL: &str = ".restore-partial";
const READY: &str = ".restore-ready";
const REPLACED: &str = ".replaced-";
/// Most bytes that must stay free after a restore: what the service needs to begin with.
const RESTORE_FREE_BYTES: u64 = 1 << 20;
