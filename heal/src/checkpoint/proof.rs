//! The proof beside a checkpoint: which run judged exactly these bytes. And where refused copies go.

use std::fs;
use std::path::{Path, PathBuf};

use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::durable::Durability;
use super::store::{
    Checkpoint, CheckpointError, CheckpointStore, MANIFEST, QUARANTINE, Staged, at, names, sync_dir,
    verify_at, write_synced, write_tree,
};
use super::verdict::{Finding, ShadowRun};
use super::which::Which;
use super::{unblock, unblock_behind};
use crate::background::Background;

/// A passed run, bound to the bytes by the digest of their manifest, which names the digest of every file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Proof {
    /// SHA-256 of the manifest file, lower-case hexadecimal.
    pub manifest_sha256: String,
    /// When the run ended, milliseconds since the Unix epoch.
    pub unix_ms: u64,
    /// What it showed.
    pub run: ShadowRun,
}

/// A valid checkpoint and how it came to be.
#[derive(Debug)]
pub struct Validated {
    /// It.
    pub checkpoint: Checkpoint,
    /// Its proof.
    pub proof: Proof,
}

/// What becomes of a staged copy after its run: the newest checkpoint, quarantine, or nothing.
pub(super) async fn settle(
    store: &CheckpointStore,
    staged: Staged,
    run: ShadowRun,
    unix_ms: u64,
    background: &Background,
) -> Result<Validated, CheckpointError> {
    let store = store.clone();
    match run.complete() {
        Finding::Pass => {
            unblock_behind(background, move || {
                let proof = store.prove(&staged, run, unix_ms)?;
                let checkpoint = store.commit(staged)?;
                Ok(Validated { checkpoint, proof })
            })
            .await
        }
        Finding::Invalid(reason) => {
            let why = reason.clone();
            let path = unblock(move || store.set_aside(staged, &why)).await?;
            Err(CheckpointError::Invalid { path, reason })
        }
        Finding::Unknown(detail) => {
            let path = store.dir().to_owned();
            unblock(move || store.discard(staged)).await?;
            Err(CheckpointError::Unproven { path, detail })
        }
    }
}

/// What a run says of a stored copy, which stays where it is.
pub(super) fn judged(run: ShadowRun, path: PathBuf) -> Result<ShadowRun, CheckpointError> {
    match run.complete() {
        Finding::Pass => Ok(run),
        Finding::Invalid(reason) => Err(CheckpointError::Invalid { path, reason }),
        Finding::Unknown(detail) => Err(CheckpointError::Unproven { path, detail }),
    }
}

/// A copy that was set aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetAside {
    /// Where it is.
    pub path: PathBuf,
    /// Why; empty where that was not written.
    pub reason: String,
}

impl CheckpointStore {
    /// Writes the proof of a passed run beside a staged copy.
    ///
    /// # Errors
    /// [`CheckpointError::Unproven`] for a run that is no full pass; [`CheckpointError::Io`].
    pub fn prove(&self, staged: &Staged, run: ShadowRun, unix_ms: u64) -> Result<Proof, CheckpointError> {
        if let Finding::Invalid(detail) | Finding::Unknown(detail) = run.complete() {
            return Err(CheckpointError::Unproven {
                path: self.dir().to_owned(),
                detail,
            });
        }
        let dir = staged.dir();
        let proof = Proof {
            manifest_sha256: manifest_digest(dir)?,
            unix_ms,
            run,
        };
        let path = dir.join(PROOF);
        let bytes = serde_json::to_vec_pretty(&proof).map_err(|error| at(&path)(error.into()))?;
        write_synced(&path, &bytes, 0)?;
        sync_dir(dir)?;
        Ok(proof)
    }

    /// The proof of a checkpoint; `None` when there is none for exactly its manifest.
    pub fn proof(&self, checkpoint: &Checkpoint) -> Option<Proof> {
        let bytes = fs::read(checkpoint.path.join(PROOF)).ok()?;
        let proof: Proof = serde_json::from_slice(&bytes).ok()?;
        (manifest_digest(&checkpoint.path).ok()? == proof.manifest_sha256).then_some(proof)
    }

    /// Refuses a checkpoint without proof where one is needed.
    pub(super) fn refuse_unproved(&self, checkpoint: &Checkpoint) -> Result<(), CheckpointError> {
        if self.limits().needs_proof && self.proof(checkpoint).is_none() {
            return Err(CheckpointError::Unproven {
                path: checkpoint.path.clone(),
                detail: "no shadow run has passed on exactly these bytes".to_owned(),
            });
        }
        Ok(())
    }

    /// Moves a staged copy to quarantine, with the reason beside it. Where.
    ///
    /// # Errors
    /// [`CheckpointError::TooManySetAside`], [`CheckpointError::Io`].
    pub fn set_aside(&self, staged: Staged, reason: &str) -> Result<PathBuf, CheckpointError> {
        self.refuse_full_quarantine()?;
        let dir = self.quarantine_dir()?;
        let from = staged.dir().to_owned();
        write_synced(&from.join(REASON), reason.as_bytes(), 0)?;
        let to = dir.join(staged.name());
        fs::rename(&from, &to).map_err(at(&to))?;
        sync_dir(&dir)?;
        sync_dir(self.dir())?;
        Ok(to)
    }

    /// What is set aside, oldest first.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn set_aside_copies(&self) -> Result<Vec<SetAside>, CheckpointError> {
        let dir = self.dir().join(QUARANTINE);
        if !dir.exists() {
            return Ok(Vec::new());
        }
        Ok(names(&dir)?
            .into_iter()
            .map(|name| {
                let path = dir.join(name);
                let reason = fs::read_to_string(path.join(REASON)).unwrap_or_default();
                SetAside { path, reason }
            })
            .collect())
    }

    /// Refuses when there is no place for one more: nothing is ever removed from quarantine, so a person must look.
    ///
    /// # Errors
    /// [`CheckpointError::TooManySetAside`], [`CheckpointError::Io`].
    pub fn refuse_full_quarantine(&self) -> Result<(), CheckpointError> {
        let (found, max) = (self.set_aside_copies()?.len(), self.limits().set_aside_max);
        if found >= max {
            return Err(CheckpointError::TooManySetAside {
                path: self.dir().join(QUARANTINE),
                found,
                max,
            });
        }
        Ok(())
    }

    /// Writes a checkpoint's tree to `to`, which must not exist; every byte is compared with its digest on the way. It is not synced.
    ///
    /// # Errors
    /// [`CheckpointError`].
    pub fn export(&self, which: impl Into<Which>, to: &Path) -> Result<(), CheckpointError> {
        let checkpoint = self.verify(which)?;
        let manifest = verify_at(&checkpoint.path)?;
        write_tree(&checkpoint.path, &manifest, to, Durability::not())
    }
}

fn manifest_digest(dir: &Path) -> Result<String, CheckpointError> {
    let path = dir.join(MANIFEST);
    let bytes = fs::read(&path).map_err(at(&path))?;
    Ok(HEXLOWER.encode(&Sha256::digest(bytes)))
}

pub(super) const PROOF: &str = "PROOF.json";
pub(super) const REASON: &str = "REASON";
