//! Checkpoints of a running PostgreSQL server, each proved by a shadow run before it counts.
//!
//! ```text
//! taken     pg_basebackup with its WAL → WORK/data, as the data directory's owner
//! hashed    WORK/data is read once: each byte is digested and written to the store on the way; then pg_verifybackup holds the
//!           stored copy against the list that the server itself had made
//! shadowed  a second server runs on WORK/data: recovery, structure, full read, simulated requests, invariants
//! valid     the stored copy is read once more, equals its digests, and is renamed into place with the proof beside it
//! invalid   the stored copy moves to quarantine with the reason beside it
//! ```
//!
//! The shadow changes the bytes that it runs on (recovery alone does), so it never runs on those that are kept: it runs on the copy
//! that they were read from, and the digests say that both were the same when it began. Where the healer is root the store is out
//! of the shadow's reach altogether, since it belongs to another account. No byte is copied twice for it.
//!
//! What cannot be judged (a program is missing, the time is over, no memory) is neither valid nor invalid: the copy is thrown away
//! and the next attempt makes another.

mod backup;
mod checks;
mod limits;
mod server;
pub mod verdict;
pub mod workload;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use self::server::Shadow;
use self::verdict::{Check, Finding, ShadowRun, State};
use self::workload::{Criteria, Template};
use super::proof::Proof;
use super::store::{Checkpoint, CheckpointError, CheckpointStore, Staged};
use super::unblock;
use crate::executor::process::clear_directory;
use crate::postgres::PostgresError;
use crate::postgres::binaries::PgBinaries;
use crate::postgres::owner::Owner;
use crate::postgres::session::Target;
use crate::postgres::tool::Tool;

/// A server whose checkpoints are taken, and how.
#[derive(Debug, Clone)]
pub struct PostgresSource {
    /// The programs; their major version must be the server's.
    pub binaries: PgBinaries,
    /// The server's data directory.
    pub data_dir: PathBuf,
    /// Where the backup is received and the shadow runs; removed afterwards. Its parent must exist and its owner must be able to
    /// reach it.
    pub work_dir: PathBuf,
    /// How the server is reached. The role needs `REPLICATION` and, for the shadow, must be a superuser.
    pub target: Target,
    /// Most KiB a second that the backup may read; `None` is as fast as it goes.
    pub max_rate_kib: Option<u32>,
    /// Most time for the backup.
    pub backup_timeout: Duration,
    /// 0 to 19: how far backup and shadow stand back for the service.
    pub nice: i32,
    /// Bytes that must stay free beside the copies.
    pub free_bytes_min: u64,
    /// How the copy is proved.
    pub shadow: ShadowSpec,
}

/// How a copy is proved.
#[derive(Debug, Clone)]
pub struct ShadowSpec {
    /// Most time for the whole run.
    pub timeout: Duration,
    /// Memory limit in bytes, where control groups are there; else the server's settings alone keep it small.
    pub memory_bytes: u64,
    /// Processor limit in cores, likewise.
    pub cpu_cores: f64,
    /// `shared_preload_libraries` that recovery needs, such as a library with its own WAL records. Empty for most.
    pub preload: String,
    /// SQL files of one query each: true in the first column of every row, and at least one row.
    pub invariants: Vec<PathBuf>,
    /// Statements to send beside those sampled from the server's statistics.
    pub templates: Vec<Template>,
    /// Whether statement shapes are sampled from `pg_stat_statements` where it is there.
    pub sample_statements: bool,
    /// Requests to send, 0 to 100 000.
    pub requests: u32,
    /// What the answers must satisfy.
    pub criteria: Criteria,
}

impl Default for ShadowSpec {
    fn default() -> Self {
        Self {
            timeout: Duration::from_mins(10),
            memory_bytes: 512 << 20,
            cpu_cores: 1.0,
            preload: String::new(),
            invariants: Vec::new(),
            templates: Vec::new(),
            sample_statements: true,
            requests: 200,
            criteria: Criteria::default(),
        }
    }
}

/// A backup in the work directory, not yet hashed.
#[derive(Debug)]
pub struct Taken {
    /// The received data directory.
    pub data: PathBuf,
    shapes: Vec<Template>,
    superuser: String,
    took: Duration,
}

/// A valid checkpoint and how it came to be.
#[derive(Debug)]
pub struct Validated {
    /// It.
    pub checkpoint: Checkpoint,
    /// Its proof.
    pub proof: Proof,
}

impl PostgresSource {
    /// Takes, hashes, shadows and keeps a checkpoint.
    ///
    /// # Errors
    /// [`CheckpointError::DiskFull`] before anything is written; [`CheckpointError::Invalid`] when the copy is bad, which then is in
    /// quarantine; [`CheckpointError::Unproven`] when it could not be judged; others as for a directory.
    pub async fn take(&self, store: &CheckpointStore, unix_ms: u64) -> Result<Validated, CheckpointError> {
        let taken = self.receive(store).await?;
        Box::pin(self.prove(store, taken, unix_ms)).await
    }

    /// The first half of [`Self::take`]: the backup alone.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub async fn receive(&self, store: &CheckpointStore) -> Result<Taken, CheckpointError> {
        store.refuse_full_quarantine()?;
        self.clear().await?;
        let owner = Owner::of(&self.data_dir)?;
        let plan = backup::plan(self, owner).await?;
        self.refuse_full_disk(store, plan.bytes)?;
        let begun = Instant::now();
        self.make_work_dir(owner)?;
        let received = backup::receive(self, owner, &self.data()).await;
        if let Err(error) = received {
            self.clear().await?;
            return Err(error.into());
        }
        Ok(Taken {
            data: self.data(),
            shapes: plan.shapes,
            superuser: plan.superuser,
            took: begun.elapsed(),
        })
    }

    /// The second half: hashed, shadowed, and valid or not.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub async fn prove(
        &self,
        store: &CheckpointStore,
        taken: Taken,
        unix_ms: u64,
    ) -> Result<Validated, CheckpointError> {
        let mut run = ShadowRun::default();
        run.reached(State::Taken, taken.took);
        let proved = Box::pin(self.hash_and_shadow(store, &taken, unix_ms, &mut run)).await;
        let cleared = self.clear().await;
        let staged = proved?;
        cleared?;
        match run.complete() {
            Finding::Pass => {
                let begun = Instant::now();
                let (store, kept) = (store.clone(), run.clone());
                let (checkpoint, proof) = unblock(move || {
                    let proof = store.prove(&staged, kept, unix_ms)?;
                    Ok((store.commit(staged)?, proof))
                })
                .await?;
                tracing::debug!(sequence = checkpoint.sequence, took = ?begun.elapsed(), "valid");
                Ok(Validated { checkpoint, proof })
            }
            Finding::Invalid(reason) => {
                let (store, why) = (store.clone(), reason.clone());
                let path = unblock(move || store.set_aside(staged, &why)).await?;
                Err(CheckpointError::Invalid { path, reason })
            }
            Finding::Unknown(detail) => {
                let (store, path) = (store.clone(), store.dir().to_owned());
                unblock(move || store.discard(staged)).await?;
                Err(CheckpointError::Unproven { path, detail })
            }
        }
    }

    /// Proves a stored checkpoint again: its bytes against its digests, then a shadow run on a copy of it. The server itself is not
    /// asked anything and may be down. The stored bytes stay as they are.
    ///
    /// # Errors
    /// [`CheckpointError::Corrupt`], [`CheckpointError::Invalid`], [`CheckpointError::Unproven`] and others.
    pub async fn verify(&self, store: &CheckpointStore, sequence: u64) -> Result<ShadowRun, CheckpointError> {
        self.clear().await?;
        let found = store.verify(sequence)?;
        let owner = Owner::of(&self.data_dir).or_else(|_gone| Owner::of(parent(&self.work_dir)))?;
        super::store::needs_room(parent(&self.work_dir), found.bytes, self.free_bytes_min)?;
        let begun = Instant::now();
        self.make_work_dir(owner)?;
        let (from, to) = (store.clone(), self.data());
        let copied = unblock(move || from.export(sequence, &to)).await;
        let mut run = ShadowRun::default();
        if copied.is_ok() {
            run.reached(State::Hashed, begun.elapsed());
            let superuser = self.target.user.clone();
            Box::pin(self.shadow(owner, &superuser, &self.shadow.templates, &mut run)).await;
        }
        let cleared = self.clear().await;
        copied?;
        cleared?;
        match run.complete() {
            Finding::Pass => Ok(run),
            Finding::Invalid(reason) => Err(CheckpointError::Invalid {
                path: found.path,
                reason,
            }),
            Finding::Unknown(detail) => Err(CheckpointError::Unproven {
                path: found.path,
                detail,
            }),
        }
    }

    /// Ends a shadow that an earlier run left behind and removes the work directory.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub async fn clear(&self) -> Result<(), CheckpointError> {
        if self.work_dir.symlink_metadata().is_err() {
            return Ok(());
        }
        // Only what carries our mark is removed: a mistyped work directory is not.
        if !self.work_dir.join(MARK).is_file() {
            let source = std::io::Error::new(
                std::io::ErrorKind::AlreadyExists,
                "is no work directory of ours: name one that does not exist",
            );
            return Err(CheckpointError::Io {
                path: self.work_dir.clone(),
                source,
            });
        }
        clear_directory(&self.data(), None, CLEAR_WAIT).await;
        let work = self.work_dir.clone();
        unblock(move || {
            std::fs::remove_dir_all(&work).map_err(|source| CheckpointError::Io { path: work, source })
        })
        .await
    }

    async fn hash_and_shadow(
        &self,
        store: &CheckpointStore,
        taken: &Taken,
        unix_ms: u64,
        run: &mut ShadowRun,
    ) -> Result<Staged, CheckpointError> {
        let begun = Instant::now();
        let (to, data) = (store.clone(), taken.data.clone());
        let staged = unblock(move || to.stage(&data, unix_ms)).await?;
        run.reached(State::Hashed, begun.elapsed());
        let mut shadowed = ShadowRun::default();
        let begun = Instant::now();
        // On two copies, so side by side.
        let (manifest, ()) = tokio::join!(
            async {
                let check = self.verify_manifest(staged.tree()).await;
                (check, begun.elapsed())
            },
            async {
                match Owner::of(&taken.data) {
                    Ok(owner) => {
                        let mut templates = taken.shapes.clone();
                        templates.extend(self.shadow.templates.iter().cloned());
                        Box::pin(self.shadow(owner, &taken.superuser, &templates, &mut shadowed)).await;
                    }
                    Err(error) => {
                        let finding = Finding::Unknown(error.to_string());
                        shadowed.push(Check::new("shadow", finding), begun);
                    }
                }
            }
        );
        run.join(manifest, shadowed);
        Ok(staged)
    }

    /// What the server sent against its own list of it: missing, extra, cut and changed files, and missing WAL.
    async fn verify_manifest(&self, tree: &Path) -> Check {
        let tool = Tool {
            program: self.binaries.tool("pg_verifybackup"),
            arguments: vec!["--exit-on-error".into(), "--quiet".into(), tree.into()],
            owner: None,
            nice: self.nice,
            timeout: self.shadow.timeout,
        };
        let finding = match tool.run().await {
            Ok(ended) if ended.code == Some(0) => Finding::Pass,
            Ok(ended) => Finding::Invalid(ended.said),
            Err(error) => Finding::Unknown(error.to_string()),
        };
        Check::new("manifest", finding)
    }

    /// Runs the shadow on the work directory and notes what it showed.
    async fn shadow(&self, owner: Owner, superuser: &str, templates: &[Template], run: &mut ShadowRun) {
        let begun = Instant::now();
        let limit = self.shadow.timeout;
        let shadowed = tokio::time::timeout(limit, async {
            let Some(shadow) = Shadow::start(self, owner, superuser, run).await else {
                return;
            };
            Box::pin(checks::all(self, &shadow, templates, run)).await;
            shadow.stop(self, run).await;
        });
        if shadowed.await.is_err() {
            let late = format!("the shadow run took longer than {limit:?}");
            run.push(Check::new("time", Finding::Unknown(late)), begun);
        }
        run.reached(State::Shadowed, begun.elapsed());
    }

    fn data(&self) -> PathBuf {
        self.work_dir.join("data")
    }

    fn make_work_dir(&self, owner: Owner) -> Result<(), CheckpointError> {
        use std::os::unix::fs::DirBuilderExt as _;
        let mut builder = std::fs::DirBuilder::new();
        builder.mode(0o700);
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| CheckpointError::Io { path, source }
        };
        builder.create(&self.work_dir).map_err(io(&self.work_dir))?;
        let mark = self.work_dir.join(MARK);
        std::fs::write(&mark, b"a checkpoint is being proved here\n").map_err(io(&mark))?;
        owner.take(&mark)?;
        owner.take(&self.work_dir)?;
        Ok(())
    }

    /// Two copies: the one that is kept and the one that the shadow runs on.
    fn refuse_full_disk(&self, store: &CheckpointStore, bytes: u64) -> Result<(), CheckpointError> {
        let work = parent(&self.work_dir);
        let device = |path: &Path| rustix::fs::stat(path).map(|found| found.st_dev).ok();
        if device(work) == device(store.dir()) {
            return super::store::needs_room(work, bytes.saturating_mul(2), self.free_bytes_min);
        }
        super::store::needs_room(work, bytes, self.free_bytes_min)?;
        super::store::needs_room(store.dir(), bytes, self.free_bytes_min)
    }
}

impl From<PostgresError> for CheckpointError {
    fn from(error: PostgresError) -> Self {
        Self::Postgres(Box::new(error))
    }
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Says that a work directory is ours and may be removed.
const MARK: &str = "THERIAC-WORK";
/// Longest wait until a killed shadow is gone.
const CLEAR_WAIT: Duration = Duration::from_secs(5);
