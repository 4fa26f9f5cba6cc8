//! Checkpoints of SQLite databases that are in use, each read whole before it counts.
//!
//! ```text
//! taken     each database by SQLite's online backup, every other file as it is → WORK/data
//! hashed    WORK/data is read once: each byte is digested and written to the store on the way
//! shadowed  the stored copy is opened `immutable`: no byte of it can change, no lock is taken, no companion file is made
//! valid     it is read once more, equals its digests, and is renamed into place with the proof beside it
//! ```
//!
//! A database with a write-ahead log is copied as of one moment: its writers never wait for a reader. Any other is copied so many pages
//! at a time, its lock let go in between, so that no writer waits longer than those take; each commit in between begins the copy anew, and
//! one that never ends says so. The files `-wal`, `-shm` and `-journal` belong to the running service and are left out: the copy holds
//! every committed transaction without them.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use rusqlite::backup::{Backup, StepResult};
use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::proof::{self, Validated};
use super::store::{
    CheckpointError, CheckpointStore, Staged, TREE, Within, at, joined, or_exchanged, walk, walk_in,
};
use super::verdict::{Check, Finding, ShadowKind, ShadowRun, State};
use super::which::Which;
use super::{unblock_behind, work};
use crate::background::Background;
use crate::folder::Folder;
use crate::postgres::owner::Owner;

/// A directory with SQLite databases whose checkpoints are taken, and how.
#[derive(Debug, Clone)]
pub struct SqliteSource {
    /// The state directory.
    pub dir: PathBuf,
    /// Where the copy is received; removed afterwards. Its parent must exist.
    pub work_dir: PathBuf,
    /// Most time for the copy, and again for its proof.
    pub timeout: Duration,
    /// Bytes that must stay free beside the copies.
    pub free_bytes_min: u64,
    /// How far all of it stands back for the host's services.
    pub background: Background,
    /// Whether a row that refers to none makes a copy invalid.
    pub foreign_keys: bool,
    /// SQL files of one query each, asked of the first database by name: true in the first column of every row, and at least one.
    pub invariants: Vec<PathBuf>,
}

impl SqliteSource {
    /// Takes, hashes, reads and keeps a checkpoint.
    ///
    /// # Errors
    /// [`CheckpointError::DiskFull`] before anything is written; [`CheckpointError::Changing`] when a database without write-ahead log
    /// never stood still; [`CheckpointError::Invalid`] when the copy is bad, which then is in quarantine;
    /// [`CheckpointError::Unproven`] when it could not be judged; others as for a directory.
    pub async fn take(&self, store: &CheckpointStore, unix_ms: u64) -> Result<Validated, CheckpointError> {
        Box::pin(self.background.during(self.take_behind(store, unix_ms))).await
    }

    async fn take_behind(&self, store: &CheckpointStore, unix_ms: u64) -> Result<Validated, CheckpointError> {
        store.refuse_full_quarantine()?;
        work::clear(&self.work_dir).await?;
        let mut run = ShadowRun::of(ShadowKind::Sqlite);
        let (this, to) = (self.clone(), store.clone());
        let staged = unblock_behind(&self.background, move || {
            let begun = Instant::now();
            again_when_vanished(&this.dir, &this.work_dir, || this.copy(&to))?;
            let took = begun.elapsed();
            let begun = Instant::now();
            let staged = to.stage(&work::data(&this.work_dir), unix_ms)?;
            Ok((staged, took, begun.elapsed()))
        })
        .await;
        let cleared = work::clear(&self.work_dir).await;
        let (staged, copied, hashed) = staged?;
        run.reached(State::Taken, copied);
        run.reached(State::Hashed, hashed);
        let (run, staged) = self.shadow_staged(run, staged).await?;
        cleared?;
        proof::settle(store, staged, run, unix_ms, &self.background).await
    }

    async fn shadow_staged(
        &self,
        mut run: ShadowRun,
        staged: Staged,
    ) -> Result<(ShadowRun, Staged), CheckpointError> {
        let this = self.clone();
        unblock_behind(&self.background, move || {
            this.shadow(staged.tree(), &mut run);
            Ok((run, staged))
        })
        .await
    }

    /// Proves a stored checkpoint again. It is only read.
    ///
    /// # Errors
    /// [`CheckpointError::Corrupt`], [`CheckpointError::Invalid`], [`CheckpointError::Unproven`] and others.
    pub async fn verify(
        &self,
        store: &CheckpointStore,
        which: impl Into<Which>,
    ) -> Result<ShadowRun, CheckpointError> {
        let (this, from, which) = (self.clone(), store.clone(), which.into());
        let judged = unblock_behind(&self.background, move || {
            let found = from.verify(which)?;
            let mut run = ShadowRun::of(ShadowKind::Sqlite);
            this.shadow(&found.path.join(TREE), &mut run);
            Ok((run, found.path))
        });
        let (run, path) = Box::pin(self.background.during(judged)).await?;
        proof::judged(run, path)
    }

    fn copy(&self, store: &CheckpointStore) -> Result<(), CheckpointError> {
        let state = Folder::open_named(&self.dir).map_err(at(&self.dir))?;
        let entries = walk_in(&state, store.limits().entries_max)?;
        let bytes = entries
            .iter()
            .filter(|(_, metadata)| metadata.is_file())
            .map(|(_, metadata)| metadata.len())
            .sum();
        work::refuse_full_disk(&self.work_dir, store, bytes, self.free_bytes_min)?;
        let _work = work::make(&self.work_dir, ours())?;
        let to = work::data(&self.work_dir);
        let deadline = Instant::now() + self.timeout;
        let mut folders = Vec::new();
        let mut found = 0;
        let mut within = Within::of(&state)?;
        for (path, mut metadata) in entries {
            let (from, copy) = (joined(&self.dir, &path), joined(&to, &path));
            if metadata.is_dir() {
                fs::DirBuilder::new()
                    .mode(0o700)
                    .create(&copy)
                    .map_err(at(&copy))?;
                folders.push((copy, metadata));
                continue;
            }
            if metadata.is_symlink() {
                let target = fs::read_link(&from).map_err(at(&from))?;
                std::os::unix::fs::symlink(target, &copy).map_err(at(&copy))?;
            } else if is_companion(&from) {
                continue;
            } else if is_database(&from) {
                backup(&from, &copy, deadline)?;
                found += 1;
            } else {
                let name = path.file_name().unwrap_or_default();
                let mut source = within.parent(&path)?.file(name).map_err(or_exchanged(&from))?;
                // Of what is read: by now another may have the name.
                metadata = source.metadata().map_err(at(&from))?;
                let mut copied = File::create_new(&copy).map_err(at(&copy))?;
                std::io::copy(&mut source, &mut copied).map_err(at(&from))?;
            }
            own(&copy, &metadata)?;
        }
        // Last: a folder that may not be written takes no file.
        for (folder, metadata) in folders.iter().rev() {
            own(folder, metadata)?;
        }
        if found == 0 {
            return Err(CheckpointError::Unproven {
                path: self.dir.clone(),
                detail: "no SQLite database is in it".to_owned(),
            });
        }
        Ok(())
    }

    /// Reads every database of a tree; nothing in it is written.
    fn shadow(&self, tree: &Path, run: &mut ShadowRun) {
        let begun = Instant::now();
        "opened immutable: no lock, no companion file, no write".clone_into(&mut run.isolation);
        "its priority".clone_into(&mut run.limits);
        self.check(tree, run, begun + self.timeout);
        run.reached(State::Shadowed, begun.elapsed());
    }

    fn check(&self, tree: &Path, run: &mut ShadowRun, deadline: Instant) {
        let begun = Instant::now();
        let databases = match databases(tree) {
            Ok(databases) => databases,
            Err(error) => {
                run.push(
                    Check::new("integrity", Finding::Unknown(error.to_string())),
                    begun,
                );
                return;
            }
        };
        let Some(first) = databases.first() else {
            let none = Finding::Invalid("no database is in the copy".to_owned());
            run.push(Check::new("integrity", none), begun);
            return;
        };
        let words = format!("{} databases", databases.len());
        let mut steps: Vec<(&str, Question<'_>)> = vec![("integrity", &integrity)];
        if self.foreign_keys {
            steps.push(("foreign keys", &foreign_keys));
        }
        steps.push(("full read", &full_read));
        for (name, step) in steps {
            let begun = Instant::now();
            let bad = databases
                .iter()
                .map(|path| asked(path, deadline, step))
                .find(|finding| *finding != Finding::Pass);
            let finding = bad.unwrap_or(Finding::Pass);
            let passed = finding == Finding::Pass;
            run.push(Check::new(name, finding).detail(words.clone()), begun);
            if !passed {
                return;
            }
        }
        let begun = Instant::now();
        let finding = asked(first, deadline, &|connection| self.invariants(connection));
        let words = format!("{} files", self.invariants.len());
        run.push(Check::new("invariants", finding).detail(words), begun);
    }

    fn invariants(&self, connection: &Connection) -> Judged {
        connection.pragma_update(None, "query_only", true)?;
        for path in &self.invariants {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let sql = match fs::read_to_string(path) {
                Ok(sql) => sql,
                Err(error) => return Ok(Finding::Unknown(format!("{}: {error}", path.display()))),
            };
            let mut statement = connection.prepare(&sql)?;
            let mut rows = statement.query([])?;
            let mut read = 0;
            while let Some(row) = rows.next()? {
                read += 1;
                if !row.get::<_, Option<bool>>(0)?.unwrap_or(false) {
                    return Ok(Finding::Invalid(format!("{name} does not hold in row {read}")));
                }
            }
            if read == 0 {
                return Ok(Finding::Invalid(format!("{name} gave no row")));
            }
        }
        Ok(Finding::Pass)
    }
}

type Question<'a> = &'a dyn Fn(&Connection) -> Judged;
type Judged = Result<Finding, rusqlite::Error>;

/// Every page, every index against its table (SQLite's `PRAGMA integrity_check`).
fn integrity(connection: &Connection) -> Judged {
    let mut statement = connection.prepare("pragma integrity_check(5)")?;
    let said: Vec<String> = statement
        .query_map([], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    Ok(match said.as_slice() {
        [only] if only == "ok" => Finding::Pass,
        _ => Finding::Invalid(said.join("; ")),
    })
}

fn foreign_keys(connection: &Connection) -> Judged {
    let mut statement = connection.prepare("pragma foreign_key_check")?;
    let mut rows = statement.query([])?;
    Ok(match rows.next()? {
        None => Finding::Pass,
        Some(row) => {
            let (table, parent): (String, String) = (row.get(0)?, row.get(2)?);
            Finding::Invalid(format!("a row of {table} refers to none of {parent}"))
        }
    })
}

/// Every column of every row of every table. Virtual tables, whose modules may not be here, are read as the tables that they rest on.
fn full_read(connection: &Connection) -> Judged {
    let mut statement =
        connection.prepare("select name from sqlite_schema where type = 'table' and rootpage > 0")?;
    let tables: Vec<String> = statement
        .query_map([], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    for table in tables {
        let query = format!("select * from \"{}\"", table.replace('"', "\"\""));
        let mut statement = connection.prepare(&query)?;
        let columns = statement.column_count();
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            for column in 0..columns {
                row.get_ref(column)?;
            }
        }
    }
    Ok(Finding::Pass)
}

/// Opens a database that nobody writes and asks it; interrupted at the deadline.
fn asked(path: &Path, deadline: Instant, question: Question<'_>) -> Finding {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI;
    let opened = Connection::open_with_flags(immutable(path), flags);
    let answer = opened.and_then(|connection| {
        let interrupt = connection.get_interrupt_handle();
        let (answered, wait) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let left = deadline.saturating_duration_since(Instant::now());
                if wait.recv_timeout(left) == Err(RecvTimeoutError::Timeout) {
                    interrupt.interrupt();
                }
            });
            let answer = question(&connection);
            drop(answered);
            answer
        })
    });
    match answer {
        Ok(Finding::Invalid(why)) => Finding::Invalid(format!("{name}: {why}")),
        Ok(other) => other,
        Err(error) => {
            let words = format!("{name}: {error}");
            match error.sqlite_error_code() {
                Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Finding::Invalid(words),
                _ => Finding::Unknown(words),
            }
        }
    }
}

/// The file as SQLite's URI of a database that cannot change.
fn immutable(path: &Path) -> String {
    let mut uri = "file:".to_owned();
    for byte in path.display().to_string().bytes() {
        if byte.is_ascii_alphanumeric() || b"/-_.~".contains(&byte) {
            uri.push(char::from(byte));
        } else {
            uri.extend(["%", &data_encoding::HEXUPPER.encode(&[byte])]);
        }
    }
    uri + "?immutable=1"
}

fn backup(from: &Path, to: &Path, deadline: Instant) -> Result<(), CheckpointError> {
    let failed = |error: rusqlite::Error| CheckpointError::Unproven {
        path: from.to_owned(),
        detail: format!("its copy failed: {error}"),
    };
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let source = Connection::open_with_flags(from, flags).map_err(failed)?;
    let left = deadline.saturating_duration_since(Instant::now());
    source.busy_timeout(BUSY_MAX.min(left)).map_err(failed)?;
    let mode: String = source
        .pragma_query_value(None, "journal_mode", |row| row.get(0))
        .map_err(failed)?;
    // Readers of a write-ahead log hold nobody up, so one moment is held for the whole copy; any other reader holds up whoever commits.
    let wal = mode == "wal";
    if wal {
        source
            .execute_batch("begin; select count(*) from sqlite_schema")
            .map_err(failed)?;
    }
    let mut copy = Connection::open(to).map_err(failed)?;
    // The copy is synced by the store.
    copy.pragma_update(None, "synchronous", "off").map_err(failed)?;
    {
        let backup = Backup::new(&source, &mut copy).map_err(failed)?;
        let mut attempts = 1;
        let mut left = i32::MAX;
        loop {
            match backup.step(PAGES_AT_ONCE).map_err(failed)? {
                StepResult::Done => break,
                _ if wal && Instant::now() >= deadline => {
                    return Err(CheckpointError::Unproven {
                        path: from.to_owned(),
                        detail: "its copy took longer than the timeout".to_owned(),
                    });
                }
                _ if Instant::now() >= deadline => {
                    return Err(CheckpointError::Changing {
                        path: from.to_owned(),
                        attempts,
                    });
                }
                _ => {}
            }
            let now = backup.progress().remaining;
            if now > left {
                attempts += 1;
            }
            left = now;
            if !wal {
                std::thread::sleep(PAUSE);
            }
        }
    }
    copy.close().map_err(|(_, error)| failed(error))
}

/// Copies, and does so anew when a file vanished meanwhile, as one does that is renamed; what was received by then is removed.
fn again_when_vanished(
    dir: &Path,
    work_dir: &Path,
    mut copy: impl FnMut() -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    for attempts in 1.. {
        match copy() {
            Err(CheckpointError::Io { path, source })
                if source.kind() == std::io::ErrorKind::NotFound && dir.exists() =>
            {
                if work_dir.symlink_metadata().is_ok() {
                    fs::remove_dir_all(work_dir).map_err(at(work_dir))?;
                }
                if attempts == ATTEMPTS_MAX {
                    return Err(CheckpointError::Changing { path, attempts });
                }
            }
            ended => return ended,
        }
    }
    Ok(())
}

/// Databases of a tree by name; companion files of running services are none.
fn databases(tree: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    let mut found: Vec<PathBuf> = walk(tree, usize::MAX)?
        .into_iter()
        .filter(|(_, metadata)| metadata.is_file())
        .map(|(path, _)| tree.join(path))
        .filter(|path| is_database(path))
        .collect();
    found.sort();
    Ok(found)
}

fn is_database(path: &Path) -> bool {
    let mut head = [0; MAGIC.len()];
    File::open(path)
        .and_then(|mut file| file.read_exact(&mut head))
        .is_ok()
        && head == *MAGIC
}

/// Whether it is the log, the index or the journal of a database beside it.
fn is_companion(path: &Path) -> bool {
    let name = path.to_string_lossy();
    ["-wal", "-shm", "-journal"].iter().any(|suffix| {
        name.strip_suffix(suffix)
            .is_some_and(|name| is_database(Path::new(name)))
    })
}

/// Owner and permission bits of the original.
fn own(path: &Path, original: &fs::Metadata) -> Result<(), CheckpointError> {
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::lchown(path, Some(original.uid()), Some(original.gid())).map_err(at(path))?;
    }
    if !original.is_symlink() {
        let mode = fs::Permissions::from_mode(original.mode() & 0o7777);
        fs::set_permissions(path, mode).map_err(at(path))?;
    }
    Ok(())
}

fn ours() -> Owner {
    Owner {
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
    }
}

/// The first bytes of every database (SQLite, "Database File Format", 1.3).
const MAGIC: &[u8; 16] = b"SQLite format 3\0";
/// Pages copied before the lock is let go: about a millisecond.
const PAGES_AT_ONCE: i32 = 256;
const PAUSE: Duration = Duration::from_millis(2);
/// How often a copy is begun while files vanish under it.
const ATTEMPTS_MAX: u32 = 3;
/// Longest wait for a lock that a writer holds.
const BUSY_MAX: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_under_which_a_file_vanished_is_made_anew_three_times_at_most() {
        let root = tempfile::tempdir().unwrap();
        let work = root.path().join("work");
        let vanished = || at(Path::new("x.tmp"))(std::io::ErrorKind::NotFound.into());
        for (vanishes, good) in [(0, true), (1, true), (2, true), (3, false)] {
            let mut made = 0;
            let ended = again_when_vanished(root.path(), &work, || {
                fs::create_dir(&work).unwrap();
                made += 1;
                if made <= vanishes { Err(vanished()) } else { Ok(()) }
            });
            assert_eq!((ended.is_ok(), work.exists()), (good, good), "{vanishes}");
            if let Err(error) = ended {
                assert!(matches!(error, CheckpointError::Changing { attempts: 3, .. }));
            } else {
                fs::remove_dir(&work).unwrap();
            }
        }
        // A state that is gone is no such thing.
        let gone = again_when_vanished(&root.path().join("gone"), &work, || Err(vanished()));
        assert!(matches!(gone, Err(CheckpointError::Io { .. })));
    }
}
