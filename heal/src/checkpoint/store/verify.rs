//! Reading a checkpoint whole, when it is taken, restored or asked for, and from time to time.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::tree::walk;
use super::{Checkpoint, CheckpointError, CheckpointStore, TREE, at, joined, names, read_manifest};
use crate::background::Background;
use crate::checkpoint::manifest::{Entry, Kind, Manifest, copy_digest};
use crate::checkpoint::unblock_behind;

/// Reads a checkpoint whole: the manifest, every byte of every file, and that nothing is missing or extra.
pub(in crate::checkpoint) fn verify_at(path: &Path) -> Result<Manifest, CheckpointError> {
    verify_by(path, |file| copy_digest(file, &mut io::sink()))
}

/// The same with files read by `digest`: length and SHA-256.
pub(in crate::checkpoint) fn verify_by(
    path: &Path,
    mut digest: impl FnMut(&mut File) -> io::Result<(u64, String)>,
) -> Result<Manifest, CheckpointError> {
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
        } if matches!(
            source.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
        ) =>
        {
            corrupt(format!("{} is missing", missing.display()))
        }
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
            let (bytes, sha256) = digest(&mut file).map_err(at(&full))?;
            Kind::File { bytes, sha256 }
        };
        differs(path, entry, &found)?;
    }
    Ok(manifest)
}

impl CheckpointStore {
    /// Reads one checkpoint whole, standing back for the host's services, and sets it aside when it is not as it was taken. What differs then; `None` when it
    /// is as it was, and when it is not there any more. Its proof is for a restore to look at. `pause` is called before every 256 KiB and returns when
    /// it may go on. What was read does not stay in the system's cache, where the service's own pages are wanted.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] when it cannot be read, which says nothing of it; [`CheckpointError::TooManySetAside`] when it is damaged and has to stay.
    pub async fn scrub(
        self: &Arc<Self>,
        checkpoint: &Checkpoint,
        background: &Background,
        pause: impl FnMut() + Send + 'static,
    ) -> Result<Option<String>, CheckpointError> {
        let (store, checkpoint) = (Arc::clone(self), checkpoint.clone());
        let read = unblock_behind(background, move || store.scrub_now(&checkpoint, pause));
        background.during(read).await
    }

    fn scrub_now(
        &self,
        checkpoint: &Checkpoint,
        pause: impl FnMut(),
    ) -> Result<Option<String>, CheckpointError> {
        let mut nowhere = Pausing(pause);
        let looked = verify_by(&checkpoint.path, |file| {
            let digested = copy_digest(file, &mut nowhere)?;
            if let Err(error) = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed) {
                // A hint: where it is not taken nothing is lost.
                tracing::debug!(%error, "what was read stays in the cache");
            }
            Ok(digested)
        });
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
        if self.set_aside_for(checkpoint, &what)?.is_none() {
            let path = self.quarantine_dir()?;
            return Err(CheckpointError::TooManySetAside {
                found: names(&path)?.len(),
                path,
                max: self.limits.set_aside_max,
            });
        }
        Ok(Some(what))
    }
}

/// Where nothing is kept, and before each block it may have to be waited.
struct Pausing<F>(F);

impl<F: FnMut()> io::Write for Pausing<F> {
    fn write(&mut self, block: &[u8]) -> io::Result<usize> {
        (self.0)();
        Ok(block.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(super) fn differs(checkpoint: &Path, entry: &Entry, found: &Kind) -> Result<(), CheckpointError> {
    if entry.kind == *found {
        return Ok(());
    }
    let what = format!("{}: expected {}, found {found}", entry.path.display(), entry.kind);
    Err(CheckpointError::Corrupt {
        path: checkpoint.to_owned(),
        what,
    })
}
