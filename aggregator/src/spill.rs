//! How much of a round's rows is in memory while it is combined, and the file for the rest.
//!
//! Rows are written as they are read from the store, one after another, and each is in memory by itself for that long. The file has lost its name before its first
//! byte is written, so nothing of it is left after a crash; what a crash between the two leaves is empty, and goes at the next start ([`sweep`]). A round that a
//! crash ends is combined anew. The file is synchronised once, when all rows are in it: not to last, but because a write that fails after it was taken is told there and
//! nowhere else.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use theriac_protocol::units::Round;

use crate::config::CheckedConfig;
use crate::data_dir::{DataDir, make_private};
use crate::robust::{PlacedRow, Row, RowFile};
use crate::store::StoreError;

/// End of the names of our files.
const SUFFIX: &str = ".rows";

/// Where the rows of a round are while it is combined. The bits that come of it do not depend on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoundMemory {
    bytes: u64,
    folder: PathBuf,
    /// Where the file is made when `folder` is not there or takes none; `None`: then `folder` is made.
    elsewhere: Option<PathBuf>,
}

impl RoundMemory {
    /// At most `bytes` of payloads in memory, the rest in a file in `folder`, which is made when there is need of it.
    pub fn new(bytes: u64, folder: impl Into<PathBuf>) -> Self {
        Self {
            bytes,
            folder: folder.into(),
            elsewhere: None,
        }
    }

    /// As this configuration says, for the server.
    pub fn of(config: &CheckedConfig) -> Self {
        let folder = DataDir::new(&config.data_dir).spill();
        Self::new(config.limits.round_memory_bytes, folder)
    }

    /// As this configuration says, for a command beside the server, perhaps of another user or on a copy that must stay as it is: it makes no folder in the data directory, and takes the
    /// system's for temporary files where `spill/` is not there or takes no file.
    pub fn beside_the_server(config: &CheckedConfig) -> Self {
        Self {
            elsewhere: Some(std::env::temp_dir()),
            ..Self::of(config)
        }
    }

    /// All in memory.
    pub fn unbounded() -> Self {
        Self::new(u64::MAX, PathBuf::new())
    }

    /// Takes the rows of `round`.
    pub(crate) fn keeper(&self, round: Round) -> Keeper<'_> {
        Keeper {
            memory: self,
            folder: &self.folder,
            round,
            left: self.bytes,
            file: None,
        }
    }
}

/// Takes rows one after another.
#[derive(Debug)]
pub(crate) struct Keeper<'a> {
    memory: &'a RoundMemory,
    /// Where the file is, or would be.
    folder: &'a Path,
    round: Round,
    left: u64,
    file: Option<Arc<RowFile>>,
}

impl Keeper<'_> {
    /// In memory while there is room, else behind the others in the file.
    ///
    /// # Errors
    /// [`StoreError::Full`], [`StoreError::Io`].
    pub(crate) fn keep(&mut self, row: Row) -> Result<PlacedRow, StoreError> {
        let bytes = row.payload.len() as u64;
        if let Some(left) = self.left.checked_sub(bytes) {
            self.left = left;
            return Ok(PlacedRow::Memory(row));
        }
        let file = if let Some(file) = &self.file {
            file
        } else {
            let made = self.create()?;
            self.file.insert(made)
        };
        let placed = file.push(&row);
        placed.map(PlacedRow::File).map_err(|error| self.refused(&error))
    }

    /// The file, where there is one, with all of it on the disk.
    ///
    /// # Errors
    /// [`StoreError::Full`], [`StoreError::Io`]: what was written is not all there.
    pub(crate) fn into_file(self) -> Result<Option<Arc<RowFile>>, StoreError> {
        let Some(file) = &self.file else {
            return Ok(None);
        };
        file.sync().map_err(|error| self.refused(&error))?;
        tracing::info!(
            round = self.round.0,
            bytes = file.bytes(),
            "rows of the round beyond limits.round_memory_bytes lie in a file while it is combined"
        );
        Ok(self.file)
    }

    fn refused(&self, error: &io::Error) -> StoreError {
        StoreError::io("write rows of a round in", self.folder, error)
    }

    fn create(&mut self) -> Result<Arc<RowFile>, StoreError> {
        let Some(elsewhere) = &self.memory.elsewhere else {
            let made = make_private(self.folder).and_then(|()| create(self.folder, self.round));
            return made.map_err(|error| self.refused(&error));
        };
        let made = create(self.folder, self.round).or_else(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                self.folder = elsewhere;
                create(elsewhere, self.round)
            }
            _ => Err(error),
        });
        made.map_err(|error| self.refused(&error))
    }
}

/// Makes `folder` and sees that rows can be put there, before a round needs it. A full disk is no reason to say that they cannot.
///
/// # Errors
/// What the file system says.
pub fn prepare(folder: &Path) -> io::Result<()> {
    match make_private(folder).and_then(|()| create(folder, Round(0))) {
        Ok(_) => Ok(()),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            ) =>
        {
            tracing::warn!(%error, folder = %folder.display(), "no room for rows of a round");
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// A file without a name.
fn create(folder: &Path, round: Round) -> io::Result<Arc<RowFile>> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let path = folder.join(format!("{round}.{}.{number}{SUFFIX}", std::process::id()));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)?;
    match fs::remove_file(&path) {
        // A server that starts beside a replay may have been first.
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(Arc::new(RowFile::new(file))),
    }
}

/// Removes what a crash has left in `folder`; how many files that were. A folder that is not there has none.
///
/// # Errors
/// What the file system says.
pub fn sweep(folder: &Path) -> io::Result<usize> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        entries => entries?,
    };
    let mut removed = 0;
    for entry in entries {
        let path = entry?.path();
        if path.to_string_lossy().ends_with(SUFFIX) {
            match fs::remove_file(path) {
                Ok(()) => removed += 1,
                // A replay has removed its own meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use theriac_protocol::message::Encoding;

    use super::*;

    fn row(bytes: usize) -> Row {
        Row {
            encoding: Encoding::F32,
            payload: vec![1; bytes].into(),
        }
    }

    #[test]
    fn what_fits_is_in_memory_and_the_rest_in_one_file_without_a_name() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("spill");
        let memory = RoundMemory::new(20, &folder);
        let mut keeper = memory.keeper(Round(7));
        let there = |keeper: &mut Keeper<'_>, bytes: usize| {
            matches!(keeper.keep(row(bytes)).unwrap(), PlacedRow::File(_))
        };
        let placed = [8, 16, 8, 8, 4].map(|bytes| there(&mut keeper, bytes));
        assert_eq!(placed, [false, true, false, true, false]);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0, "it has lost its name");
        assert_eq!(keeper.into_file().unwrap().unwrap().bytes(), 24);
        let all = RoundMemory::unbounded();
        let mut keeper = all.keeper(Round(7));
        assert!(!there(&mut keeper, 1_000) && keeper.into_file().unwrap().is_none());
    }

    /// Of a device that takes every write and cannot be synchronised.
    #[test]
    fn what_the_disk_does_not_have_in_the_end_is_an_error_before_any_row_is_read() {
        let memory = RoundMemory::new(0, "spill");
        let mut keeper = memory.keeper(Round(1));
        let device = fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .unwrap();
        keeper.file = Some(Arc::new(RowFile::new(device)));
        assert!(matches!(keeper.keep(row(4)).unwrap(), PlacedRow::File(_)));
        let error = keeper.into_file().unwrap_err();
        assert!(
            matches!(&error, StoreError::Io { path, .. } if path == Path::new("spill")),
            "{error}"
        );
    }

    #[test]
    fn beside_the_server_no_folder_is_made_and_the_file_is_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, elsewhere) = (dir.path().join("data/spill"), dir.path().join("tmp"));
        fs::create_dir(&elsewhere).unwrap();
        let memory = RoundMemory {
            elsewhere: Some(elsewhere.clone()),
            ..RoundMemory::new(0, &folder)
        };
        let mut keeper = memory.keeper(Round(1));
        assert!(matches!(keeper.keep(row(4)).unwrap(), PlacedRow::File(_)));
        assert!(matches!(keeper.keep(row(4)).unwrap(), PlacedRow::File(_)));
        assert_eq!(keeper.folder, elsewhere);
        assert_eq!(keeper.into_file().unwrap().unwrap().bytes(), 8);
        assert!(
            !dir.path().join("data").exists(),
            "the data directory is as it was"
        );
        assert_eq!(
            fs::read_dir(&elsewhere).unwrap().count(),
            0,
            "it has lost its name"
        );
        // Where there is a place it is taken.
        fs::create_dir_all(&folder).unwrap();
        let mut keeper = memory.keeper(Round(1));
        keeper.keep(row(4)).unwrap();
        assert_eq!(keeper.folder, folder);
    }

    #[test]
    fn the_folder_is_there_before_it_is_needed_or_it_is_said_that_it_cannot_be() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("spill");
        prepare(&folder).unwrap();
        prepare(&folder).unwrap();
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
        fs::remove_dir(&folder).unwrap();
        fs::write(&folder, b"in the way").unwrap();
        assert!(prepare(&folder).is_err());
    }

    #[test]
    fn left_overs_go_at_the_start_and_nothing_else_does() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(sweep(&dir.path().join("none")).unwrap(), 0);
        for name in ["3.17.0.rows", "3.17.1.rows", "notes.txt"] {
            fs::write(dir.path().join(name), b"x").unwrap();
        }
        assert_eq!(sweep(dir.path()).unwrap(), 2);
        assert!(dir.path().join("notes.txt").exists());
    }

    #[test]
    fn a_folder_that_cannot_be_is_an_error_with_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("spill");
        fs::write(&folder, b"").unwrap();
        let memory = RoundMemory::new(0, &folder);
        let error = memory.keeper(Round(1)).keep(row(4)).unwrap_err();
        assert!(
            matches!(&error, StoreError::Io { path, .. } if *path == folder),
            "{error}"
        );
    }
}
