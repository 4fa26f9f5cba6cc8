//! The durable state: a snapshot and the log after it, synced before a write is acknowledged.
//!
//! `STATE/snapshot-N` holds the table after write N, `STATE/log-N` the writes after it. A crash at any point leaves a state that
//! [`State::open`] reads whole: only bytes that were never acknowledged are cut off.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::record::{Next, Record, Table, decode_snapshot, encode_snapshot};

/// The log is folded into a new snapshot past this size.
const LOG_BYTES_MAX: u64 = 4 << 20;

/// Why a state could not be opened or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// It is not what was written. Nothing was changed.
    #[error("the state in {path} is corrupt: {what}. Restore a checkpoint of it, or name an empty directory")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Another process serves it.
    #[error("{path} is in use by another process: stop that one first, or name another directory")]
    InUse {
        /// The state directory.
        path: PathBuf,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
}

/// A state directory in use.
#[derive(Debug)]
pub(super) struct State {
    dir: PathBuf,
    /// Held while the process lives.
    _lock: File,
    log: File,
    log_bytes: u64,
    sequence: u64,
}

/// What a state directory holds.
#[derive(Debug, Default)]
pub(super) struct Contents {
    pub(super) table: Table,
    /// The last write.
    pub(super) sequence: u64,
    /// The write after which the log begins.
    base: u64,
    /// Length of the log without a torn end.
    log_bytes: u64,
    /// Bytes of a write that was never acknowledged.
    pub(super) torn_bytes: u64,
}

impl State {
    /// Opens or makes a state directory, cuts off a torn end, and removes files that a newer snapshot replaced.
    ///
    /// # Errors
    /// [`StateError`].
    pub(super) fn open(dir: &Path) -> Result<(Self, Table), StateError> {
        fs::create_dir_all(dir).map_err(at(dir))?;
        let lock = open_write(&dir.join("lock"))?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(StateError::InUse { path: dir.to_owned() });
        }
        let contents = read(dir)?;
        let path = dir.join(format!("log-{}", contents.base));
        let log = open_write(&path)?;
        if contents.torn_bytes > 0 {
            tracing::warn!(
                bytes = contents.torn_bytes,
                "cut off a write that was never acknowledged"
            );
        }
        log.set_len(contents.log_bytes)
            .and_then(|()| log.sync_all())
            .map_err(at(&path))?;
        sync_dir(dir)?;
        let state = Self {
            dir: dir.to_owned(),
            _lock: lock,
            log,
            log_bytes: contents.log_bytes,
            sequence: contents.sequence,
        };
        state.remove_replaced(contents.base)?;
        Ok((state, contents.table))
    }

    /// Appends writes and syncs them. All are durable when this returns, or none is and the log is as it was.
    ///
    /// # Errors
    /// [`StateError::Io`], for instance on a full disk.
    pub(super) fn append(&mut self, writes: &[(String, Vec<u8>)]) -> Result<(), StateError> {
        let mut bytes = Vec::new();
        for (sequence, (key, value)) in (self.sequence + 1..).zip(writes) {
            Record {
                sequence,
                key: key.clone(),
                value: value.clone(),
            }
            .encode(&mut bytes);
        }
        let path = || self.dir.clone();
        let mut log = &self.log;
        let written = io::Seek::seek(&mut log, io::SeekFrom::Start(self.log_bytes))
            .and_then(|_| log.write_all(&bytes))
            .and_then(|()| log.sync_data());
        if let Err(source) = written {
            // What was written of it must not stand before later writes.
            self.log
                .set_len(self.log_bytes)
                .map_err(|source| StateError::Io { path: path(), source })?;
            return Err(StateError::Io { path: path(), source });
        }
        self.log_bytes += bytes.len() as u64;
        self.sequence += writes.len() as u64;
        Ok(())
    }

    /// Folds a long log into a new snapshot. `table` is the state after every write so far.
    ///
    /// # Errors
    /// [`StateError::Io`]; then the old snapshot and log go on.
    pub(super) fn fold(&mut self, table: &Table) -> Result<(), StateError> {
        if self.log_bytes < LOG_BYTES_MAX {
            return Ok(());
        }
        let beside = self.dir.join("snapshot.new");
        let snapshot = self.dir.join(format!("snapshot-{}", self.sequence));
        let mut file = File::create(&beside).map_err(at(&beside))?;
        file.write_all(&encode_snapshot(self.sequence, table))
            .and_then(|()| file.sync_all())
            .map_err(at(&beside))?;
        let path = self.dir.join(format!("log-{}", self.sequence));
        let log = open_write(&path)?;
        log.set_len(0).and_then(|()| log.sync_all()).map_err(at(&path))?;
        fs::rename(&beside, &snapshot).map_err(at(&snapshot))?;
        sync_dir(&self.dir)?;
        self.log = log;
        self.log_bytes = 0;
        self.remove_replaced(self.sequence)
    }

    /// Removes snapshots and logs that the snapshot of `base` holds.
    fn remove_replaced(&self, base: u64) -> Result<(), StateError> {
        for (name, number) in numbered(&self.dir, "snapshot-")?
            .into_iter()
            .chain(numbered(&self.dir, "log-")?)
        {
            if number < base {
                fs::remove_file(&name).map_err(at(&name))?;
            }
        }
        Ok(())
    }
}

/// Reads a state directory and changes nothing in it. It may be in use.
///
/// # Errors
/// [`StateError`].
pub(super) fn read(dir: &Path) -> Result<Contents, StateError> {
    let mut attempt = 1;
    loop {
        match read_once(dir) {
            // A snapshot was folded while we looked.
            Err(StateError::Io { source, .. })
                if source.kind() == io::ErrorKind::NotFound && dir.exists() && attempt < 3 =>
            {
                attempt += 1;
            }
            result => return result,
        }
    }
}

fn read_once(dir: &Path) -> Result<Contents, StateError> {
    let mut contents = Contents::default();
    if let Some((path, number)) = numbered(dir, "snapshot-")?
        .into_iter()
        .max_by_key(|(_, number)| *number)
    {
        let corrupt = |what: String| StateError::Corrupt {
            path: path.clone(),
            what,
        };
        let (sequence, table) = decode_snapshot(&fs::read(&path).map_err(at(&path))?).map_err(corrupt)?;
        if sequence != number {
            return Err(corrupt(format!(
                "it is the snapshot after write {sequence}, expected {number}"
            )));
        }
        contents = Contents {
            table,
            sequence,
            base: sequence,
            ..contents
        };
    }
    let logs = numbered(dir, "log-")?;
    if let Some((path, number)) = logs.iter().find(|(_, number)| *number > contents.base) {
        // A log is made just before its snapshot, and is empty then.
        if fs::metadata(path).map_err(at(path))?.len() > 0 {
            let what = format!("it goes on after write {number}, but the snapshot of that write is missing");
            return Err(StateError::Corrupt {
                path: path.clone(),
                what,
            });
        }
    }
    let Some((path, _)) = logs.into_iter().find(|(_, number)| *number == contents.base) else {
        if contents.base > 0 {
            let path = dir.join(format!("log-{}", contents.base));
            return Err(StateError::Corrupt {
                path,
                what: "the log after the snapshot is missing".to_owned(),
            });
        }
        return Ok(contents);
    };
    let log = fs::read(&path).map_err(at(&path))?;
    let mut offset = 0;
    loop {
        match Record::decode(&log, offset, contents.sequence + 1) {
            Next::Record(record, next) => {
                contents.sequence = record.sequence;
                contents.table.insert(record.key, record.value);
                offset = next;
            }
            Next::End | Next::Torn => break,
            Next::Corrupt(what) => return Err(StateError::Corrupt { path, what }),
        }
    }
    contents.log_bytes = offset as u64;
    contents.torn_bytes = (log.len() - offset) as u64;
    Ok(contents)
}

/// Files `PREFIX<number>` with their numbers.
fn numbered(dir: &Path, prefix: &str) -> Result<Vec<(PathBuf, u64)>, StateError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(at(dir))? {
        let path = entry.map_err(at(dir))?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        if let Some(number) = name.and_then(|name| name.strip_prefix(prefix)?.parse().ok()) {
            found.push((path, number));
        }
    }
    found.sort();
    Ok(found)
}

fn open_write(path: &Path) -> Result<File, StateError> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(path)
        .map_err(at(path))
}

fn sync_dir(dir: &Path) -> Result<(), StateError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(at(dir))
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> StateError + use<> {
    let path = path.to_owned();
    move |source| StateError::Io { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(n: u64) -> (String, Vec<u8>) {
        (
            format!("key-{}", n % 50),
            vec![u8::try_from(n % 251).unwrap(); 30_000],
        )
    }

    #[test]
    fn what_was_appended_is_read_again_also_across_folded_logs() {
        let dir = tempfile::tempdir().unwrap();
        let mut expected = Table::new();
        let mut folded = false;
        for round in 0..4 {
            let (mut state, mut table) = State::open(dir.path()).unwrap();
            assert_eq!(table, expected);
            for n in 0..60 {
                let (key, value) = write(round * 60 + n);
                state.append(&[(key.clone(), value.clone())]).unwrap();
                table.insert(key, value);
                state.fold(&table).unwrap();
            }
            expected = table;
            let names = numbered(dir.path(), "log-").unwrap();
            assert_eq!(names.len(), 1);
            folded |= names[0].1 > 0;
        }
        assert!(folded, "no log was long enough to be folded");
        assert_eq!(read(dir.path()).unwrap().sequence, 240);
    }

    #[test]
    fn a_torn_end_is_cut_off_and_the_next_write_stands_in_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let (mut state, _) = State::open(dir.path()).unwrap();
        state
            .append(&[("a".to_owned(), b"1".to_vec()), ("b".to_owned(), b"2".to_vec())])
            .unwrap();
        drop(state);
        let log = dir.path().join("log-0");
        let whole = fs::read(&log).unwrap();
        fs::write(&log, &whole[..whole.len() - 1]).unwrap();
        assert_eq!(read(dir.path()).unwrap().torn_bytes, (whole.len() / 2 - 1) as u64);
        let (mut state, table) = State::open(dir.path()).unwrap();
        assert_eq!(table.keys().collect::<Vec<_>>(), ["a"]);
        state.append(&[("c".to_owned(), b"3".to_vec())]).unwrap();
        drop(state);
        assert_eq!(
            State::open(dir.path()).unwrap().1.keys().collect::<Vec<_>>(),
            ["a", "c"]
        );
    }

    #[test]
    fn corrupt_state_is_refused_and_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let (mut state, _) = State::open(dir.path()).unwrap();
        state.append(&[("a".to_owned(), b"1".to_vec())]).unwrap();
        drop(state);
        let log = dir.path().join("log-0");
        let mut bytes = fs::read(&log).unwrap();
        bytes[30] ^= 1;
        fs::write(&log, &bytes).unwrap();
        assert!(matches!(State::open(dir.path()), Err(StateError::Corrupt { .. })));
        assert_eq!(fs::read(&log).unwrap(), bytes);
    }

    #[test]
    fn a_log_replaced_by_a_few_bytes_is_corrupt_and_not_an_empty_state() {
        let dir = tempfile::tempdir().unwrap();
        let (mut state, _) = State::open(dir.path()).unwrap();
        state.append(&[("a".to_owned(), b"1".to_vec())]).unwrap();
        drop(state);
        fs::write(dir.path().join("log-0"), b"fifteen bytes..").unwrap();
        assert!(matches!(read(dir.path()), Err(StateError::Corrupt { .. })));
        assert!(matches!(State::open(dir.path()), Err(StateError::Corrupt { .. })));
    }

    #[test]
    fn a_missing_snapshot_or_log_is_corruption() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("log-7"), "x").unwrap();
        assert!(
            matches!(read(dir.path()), Err(StateError::Corrupt { what, .. }) if what.contains("missing"))
        );
        fs::remove_file(dir.path().join("log-7")).unwrap();
        fs::write(dir.path().join("snapshot-7"), encode_snapshot(7, &Table::new())).unwrap();
        assert!(
            matches!(read(dir.path()), Err(StateError::Corrupt { what, .. }) if what.contains("missing"))
        );
    }

    #[test]
    fn a_crash_while_folding_leaves_the_old_state_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (mut state, _) = State::open(dir.path()).unwrap();
        state.append(&[("a".to_owned(), b"1".to_vec())]).unwrap();
        drop(state);
        // The new snapshot is not yet named, its log is already there.
        fs::write(dir.path().join("snapshot.new"), "half").unwrap();
        fs::write(dir.path().join("log-1"), "").unwrap();
        let (mut state, table) = State::open(dir.path()).unwrap();
        assert_eq!(table.len(), 1);
        state.append(&[("b".to_owned(), b"2".to_vec())]).unwrap();
        drop(state);
        assert_eq!(State::open(dir.path()).unwrap().1.len(), 2);
    }

    #[test]
    fn two_processes_cannot_serve_one_state() {
        let dir = tempfile::tempdir().unwrap();
        let (_held, _) = State::open(dir.path()).unwrap();
        assert!(matches!(State::open(dir.path()), Err(StateError::InUse { .. })));
    }
}
