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
mod server;
pub mod workload;

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use self::server::Shadow;
use self::workload::{Criteria, Template};
use super::proof::Validated;
use super::store::{CheckpointError, CheckpointStore, Staged, at};
use super::verdict::{Check, Finding, ShadowRun, State};
use super::which::Which;
use super::work::Work;
use super::{proof, unblock_behind, work};
use crate::background::Background;
use crate::folder::Folder;
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
    /// How far all of it stands back for the host's services.
    pub background: Background,
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
    /// Statements to send beside those sampled from the server's statistics. A copy to which one of them cannot be sent is not proved.
    pub templates: Vec<Template>,
    /// Whether statement shapes are sampled from `pg_stat_statements` where it is there. They are sent only to a shadow in namespaces of its own.
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
    work: Work,
    shapes: Vec<Template>,
    superuser: String,
    took: Duration,
}

impl PostgresSource {
    /// Takes, hashes, shadows and keeps a checkpoint.
    ///
    /// # Errors
    /// [`CheckpointError::DiskFull`] before anything is written; [`CheckpointError::Invalid`] when the copy is bad, which then is in
    /// quarantine; [`CheckpointError::Unproven`] when it could not be judged; others as for a directory.
    pub async fn take(&self, store: &CheckpointStore, unix_ms: u64) -> Result<Validated, CheckpointError> {
        let work = async {
            let taken = self.receive(store).await?;
            self.prove(store, taken, unix_ms).await
        };
        Box::pin(self.background.during(work)).await
    }

    /// The first half of [`Self::take`]: the backup alone.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub async fn receive(&self, store: &CheckpointStore) -> Result<Taken, CheckpointError> {
        Box::pin(self.background.during(self.receive_behind(store))).await
    }

    async fn receive_behind(&self, store: &CheckpointStore) -> Result<Taken, CheckpointError> {
        store.refuse_full_quarantine()?;
        self.clear().await?;
        let owner = Owner::of(&self.data_dir)?;
        let plan = backup::plan(self, owner).await?;
        work::refuse_full_disk(&self.work_dir, store, plan.bytes, self.free_bytes_min)?;
        let begun = Instant::now();
        let work = work::make(&self.work_dir, owner)?;
        self.make_data(&work, owner)?;
        let received = backup::receive(self, owner, &self.data()).await;
        if let Err(error) = received {
            work::end(work).await?;
            return Err(error.into());
        }
        Ok(Taken {
            work,
            data: self.data(),
            shapes: plan.shapes,
            superuser: plan.superuser,
            took: begun.elapsed(),
        })
    }

    /// Where the backup goes, as the server's own directory is: its account may make nothing beside it.
    fn make_data(&self, work: &Folder, owner: Owner) -> Result<(), CheckpointError> {
        let data = self.data();
        let original = std::fs::metadata(&self.data_dir).map_err(at(&self.data_dir))?;
        let made = work.make(work::DATA).map_err(at(&data))?;
        made.set_mode(original.mode() & 0o750).map_err(at(&data))?;
        owner.take_open(&made)?;
        Ok(())
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
        Box::pin(self.background.during(self.prove_behind(store, taken, unix_ms))).await
    }

    async fn prove_behind(
        &self,
        store: &CheckpointStore,
        taken: Taken,
        unix_ms: u64,
    ) -> Result<Validated, CheckpointError> {
        let mut run = ShadowRun::default();
        run.reached(State::Taken, taken.took);
        let proved = Box::pin(self.hash_and_shadow(store, &taken, unix_ms, &mut run)).await;
        let cleared = work::end(taken.work).await;
        let staged = proved?;
        cleared?;
        proof::settle(store, staged, run, unix_ms, &self.background).await
    }

    /// Proves a stored checkpoint again: its bytes against its digests, then a shadow run on a copy of it. The server itself is not
    /// asked anything and may be down. The stored bytes stay as they are.
    ///
    /// # Errors
    /// [`CheckpointError::Corrupt`], [`CheckpointError::Invalid`], [`CheckpointError::Unproven`] and others.
    pub async fn verify(
        &self,
        store: &CheckpointStore,
        which: impl Into<Which>,
    ) -> Result<ShadowRun, CheckpointError> {
        Box::pin(self.background.during(self.verify_behind(store, which.into()))).await
    }

    async fn verify_behind(
        &self,
        store: &CheckpointStore,
        which: Which,
    ) -> Result<ShadowRun, CheckpointError> {
        self.clear().await?;
        let found = store.verify(which)?;
        let owner = Owner::of(&self.data_dir).or_else(|_gone| Owner::of(work::parent(&self.work_dir)))?;
        super::store::needs_room(work::parent(&self.work_dir), found.bytes, self.free_bytes_min)?;
        let begun = Instant::now();
        let work = work::make(&self.work_dir, owner)?;
        let (from, to) = (store.clone(), self.data());
        let copied = unblock_behind(&self.background, move || from.export(which, &to)).await;
        let mut run = ShadowRun::default();
        if copied.is_ok() {
            run.reached(State::Hashed, begun.elapsed());
            let superuser = self.target.user.clone();
            Box::pin(self.shadow(owner, &superuser, &[], &mut run)).await;
        }
        let cleared = work::end(work).await;
        copied?;
        cleared?;
        proof::judged(run, found.path)
    }

    /// Ends a shadow that an earlier run left behind and removes the work directory.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub async fn clear(&self) -> Result<(), CheckpointError> {
        work::clear(&self.work_dir).await
    }

    async fn hash_and_shadow(
        &self,
        store: &CheckpointStore,
        taken: &Taken,
        unix_ms: u64,
        run: &mut ShadowRun,
    ) -> Result<Staged, CheckpointError> {
        let begun = Instant::now();
        let (to, from) = (
            store.clone(),
            work::open_data(&self.work_dir).map_err(at(&taken.data))?,
        );
        let staged = unblock_behind(&self.background, move || to.stage_from(&from, unix_ms)).await?;
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
                        Box::pin(self.shadow(owner, &taken.superuser, &taken.shapes, &mut shadowed)).await;
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
            background: Some(self.background.clone()),
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
    async fn shadow(&self, owner: Owner, superuser: &str, sampled: &[Template], run: &mut ShadowRun) {
        let begun = Instant::now();
        let limit = self.shadow.timeout;
        let shadowed = tokio::time::timeout(limit, async {
            let Some(shadow) = Shadow::start(self, owner, superuser, run).await else {
                return;
            };
            Box::pin(checks::all(self, &shadow, sampled, run)).await;
            shadow.stop(self, run).await;
        });
        if shadowed.await.is_err() {
            let late = format!("the shadow run took longer than {limit:?}");
            run.push(Check::new("time", Finding::Unknown(late)), begun);
        }
        run.reached(State::Shadowed, begun.elapsed());
    }

    fn data(&self) -> PathBuf {
        work::data(&self.work_dir)
    }
}

impl From<PostgresError> for CheckpointError {
    fn from(error: PostgresError) -> Self {
        match error {
            // A file is a file, whoever's it is.
            PostgresError::Io { path, source } => Self::Io { path, source },
            other => Self::Postgres(Box::new(other)),
        }
    }
}
