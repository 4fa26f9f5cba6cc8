//! Room on a full file system: regular files below listed directories, old enough, are moved to a quarantine on **another** file system:
//! copied, synced, read back, compared, written down, and only then unlinked.
//!
//! | | |
//! |---|---|
//! | precondition | the file system has less room than asked for; the quarantine lies on another one and has room |
//! | effect | listed files lie in the quarantine, with `moved.jsonl` saying from where, with which SHA-256, mode and owner |
//! | undo | copy them back by that list |
//! | verified by | the free bytes of the file system |
//!
//! Nothing of a state directory, and nothing of the edge's own, is moved, whatever name leads there: a listed directory that overlaps with one,
//! through symbolic links or bind mounts, is refused (but `log` and `pg_log` in the service's own state, the newest file excepted).
//! Below a listed directory no symbolic link is followed, so that whoever can write there cannot lead a healer that is root elsewhere.
//! Left are files with a second name (unlinking one would free nothing), on another file system, changed meanwhile, or open for writing
//! in a process that can be looked into: what it wrote afterwards would be lost. One that somebody reads is moved, and its room is free
//! when that one closes it; what was freed is measured, not computed.

use std::collections::{BTreeSet, BinaryHeap};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{DirBuilder, File, Metadata};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use data_encoding::HEXLOWER;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, fstat, openat, statat, unlinkat};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::held::{FileId, held_for_writing};
use super::place::{Mounts, Place};
use crate::folder::DIRECTORY;

/// What may be moved, and where to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpaceHands {
    /// The service's state directory, on the file system that is to get room.
    pub on: PathBuf,
    /// Directories whose files can be made again.
    pub listed: Vec<PathBuf>,
    /// Directories of which nothing is moved: other services' states, the edge's own. `on` always is one.
    pub protected: Vec<PathBuf>,
    /// Where they go, on another file system.
    pub quarantine: PathBuf,
    /// Least time since a file was written.
    pub min_age: Duration,
    /// Where more is to stay free than [`room_needed`] says, in bytes; else 0. See [`room_asked`].
    pub free_bytes_min: u64,
}

/// What was moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// Files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes free before and afterwards.
    pub free: (u64, u64),
    /// Whether that is enough.
    pub relieved: bool,
    /// Why it ended before there was enough.
    pub ended: Option<String>,
    /// Where they lie, with `moved.jsonl`.
    pub to: PathBuf,
    /// Files that were left because some process holds them open for writing.
    pub open: u64,
    /// Processes that could not be looked into: what they hold open is not known.
    pub unseen: u64,
    /// The first file or directory that could not be read or moved, and why. The others were gone on with.
    pub trouble: Option<String>,
}

impl fmt::Display for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (before, after) = self.free;
        write!(
            f,
            "{} files of {} bytes were moved to quarantine; {before} bytes were free, {after} are",
            self.files, self.bytes
        )?;
        if self.files > 0 {
            write!(f, "; they lie in {}", self.to.display())?;
        }
        if self.open > 0 {
            write!(f, "; {} are open for writing and stay", self.open)?;
        }
        if self.unseen > 0 {
            write!(
                f,
                "; {} processes could not be looked into for open files",
                self.unseen
            )?;
        }
        for words in self.ended.iter().chain(&self.trouble) {
            write!(f, "; {words}")?;
        }
        Ok(())
    }
}

/// Below so many free bytes a file system of `size` bytes counts as full: 16 MiB, or a fiftieth where that is less.
pub fn room_needed(size: u64) -> u64 {
    ROOM_MIN.min(size / 50)
}

/// What of `asked` bytes can stay free of a file system of `size` bytes: an eighth of it at most. Twice as much has to be free before it does not count
/// as full any more, and room is made for four times as much: one that is in use would else count as full for ever.
pub fn room_asked(asked: u64, size: u64) -> u64 {
    asked.min(size / 8)
}

/// One line of `moved.jsonl`.
#[derive(Debug, Serialize)]
struct Moved<'a> {
    from: &'a Path,
    to: &'a Path,
    bytes: u64,
    sha256: String,
    mode: u32,
    uid: u32,
    gid: u32,
    /// The file stayed where it was after all: this line takes the one before it back.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    kept: bool,
}

/// A file that may go. Ordered by age, the oldest first. No descriptor is kept open for it: there may be a thousand.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    modified: SystemTime,
    /// From the root.
    path: PathBuf,
    /// Which of the listed directories.
    root: usize,
    bytes: u64,
    id: FileId,
}

/// What became of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Carried {
    Moved,
    /// Some process holds it open for writing.
    Open,
    /// It is not what was seen any more, or cannot go.
    Changed,
}

/// A listed directory, open.
#[derive(Debug)]
struct Root {
    dir: OwnedFd,
    path: PathBuf,
    /// A server's own log: its newest file is the one that it writes.
    log: bool,
}

/// Where files may be taken from.
#[derive(Debug)]
struct Grounds {
    roots: Vec<Root>,
    /// Never entered.
    forbidden: BTreeSet<FileId>,
    device: u64,
    trouble: Option<String>,
}

impl SpaceHands {
    /// Bytes that could be moved away now, at most: files that are open for writing are not known here.
    ///
    /// # Errors
    /// When a listed directory overlaps with one of which nothing may be moved, or that cannot be told.
    pub fn relievable(&self) -> io::Result<u64> {
        let mut sum = 0_u64;
        self.walk(&self.grounds()?, &mut |found| {
            sum = sum.saturating_add(found.bytes);
        });
        Ok(sum)
    }

    /// Moves files, the oldest first, until twice the room is free that a file system needs not to count as full, and again as much. A
    /// file that cannot be moved is left. `number` and the time name the directory in the quarantine.
    ///
    /// # Errors
    /// As [`Self::relievable`], and when the quarantine cannot be used or lies on the same file system.
    pub fn relieve(&self, number: u64) -> io::Result<Room> {
        let begun = Instant::now();
        let size = size(&self.on)?;
        let needed = room_needed(size).max(room_asked(self.free_bytes_min, size));
        let before = free(&self.on)?;
        let mut grounds = self.grounds()?;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.quarantine)?;
        if std::fs::metadata(&self.quarantine)?.dev() == grounds.device {
            return Err(io::Error::other(format!(
                "the quarantine {} lies on the file system that is full",
                self.quarantine.display()
            )));
        }
        // Numbers begin anew when the edge's store is lost.
        let dir = self
            .quarantine
            .join(format!("{number}-{}", super::clock::now().unix_ms));
        DirBuilder::new().mode(0o700).create(&dir)?;
        let candidates = self.candidates(&mut grounds);
        let held = held_for_writing(&candidates.iter().map(|found| found.id).collect())?;
        let mut room = Room {
            files: 0,
            bytes: 0,
            free: (before, before),
            relieved: before >= 2 * needed,
            ended: None,
            to: dir.clone(),
            open: 0,
            unseen: held.unseen,
            trouble: grounds.trouble.take(),
        };
        for (attempt, found) in candidates.iter().enumerate() {
            if free(&self.on)? >= 4 * needed {
                break;
            }
            if free(&self.quarantine)? < found.bytes.saturating_add(KEPT_FREE) {
                room.ended = Some("the quarantine has no room for more".to_owned());
                break;
            }
            if begun.elapsed() >= TIME_MAX {
                room.ended = Some(format!("{} s were over", TIME_MAX.as_secs()));
                break;
            }
            if held.files.contains(&found.id) {
                room.open += 1;
                continue;
            }
            match grounds.carry(found, &dir.join(format!("{attempt:06}")), &dir) {
                Ok(Carried::Moved) => {
                    room.files += 1;
                    room.bytes += found.bytes;
                }
                Ok(Carried::Open) => room.open += 1,
                Ok(Carried::Changed) => {}
                Err(error) => {
                    let path = grounds.roots[found.root].path.join(&found.path);
                    room.trouble
                        .get_or_insert_with(|| format!("{}: {error}", path.display()));
                }
            }
        }
        // Goes only when nothing lies in it.
        drop(std::fs::remove_dir(&dir));
        room.free.1 = free(&self.on)?;
        room.relieved = room.free.1 >= 2 * needed;
        if !room.relieved && room.ended.is_none() {
            room.ended = Some("nothing more is listed that may be moved".to_owned());
        }
        Ok(room)
    }

    /// Opens the listed directories; one that is not there holds nothing.
    fn grounds(&self) -> io::Result<Grounds> {
        let mounts = Mounts::read()?;
        let real = self.on.canonicalize()?;
        let device = std::fs::metadata(&real)?.dev();
        let state = mounts.place(&real);
        let mut grounds = Grounds {
            roots: Vec::new(),
            forbidden: BTreeSet::new(),
            device,
            trouble: None,
        };
        let mut protected: Vec<Place> = Vec::new();
        for dir in std::iter::once(&self.on).chain(&self.protected) {
            match dir.canonicalize() {
                Ok(real) => {
                    let found = std::fs::metadata(&real)?;
                    grounds.forbidden.insert((found.dev(), found.ino()));
                    protected.push(mounts.place(&real));
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        for listed in &self.listed {
            let dir = match rustix::fs::open(listed, DIRECTORY, Mode::empty()) {
                Ok(dir) => dir,
                Err(rustix::io::Errno::NOENT) => continue,
                Err(error) => {
                    let words = format!("{}: {error}", listed.display());
                    grounds.trouble.get_or_insert(words);
                    continue;
                }
            };
            // Of what was opened, so that no name can come to mean something else in between.
            let path = std::fs::read_link(format!("/proc/self/fd/{}", dir.as_raw_fd()))?;
            let place = mounts.place(&path);
            let log = ["log", "pg_log"].iter().any(|name| place.is_in(&state, name));
            let places = || std::iter::once(&place).chain(mounts.below(&path));
            let wrong = protected
                .iter()
                .find(|dir| !(log && **dir == state) && places().any(|place| place.overlaps(dir)));
            if let Some(wrong) = wrong {
                return Err(io::Error::other(format!(
                    "{} overlaps with {}, of which nothing is moved",
                    listed.display(),
                    wrong.path.display()
                )));
            }
            grounds.roots.push(Root { dir, path, log });
        }
        Ok(grounds)
    }

    /// Files that may go, the oldest first, at most [`FILES_MAX`].
    fn candidates(&self, grounds: &mut Grounds) -> Vec<Candidate> {
        let mut oldest: BinaryHeap<Candidate> = BinaryHeap::new();
        let trouble = self.walk(grounds, &mut |found| {
            oldest.push(found);
            if oldest.len() > FILES_MAX {
                oldest.pop();
            }
        });
        grounds.trouble = grounds.trouble.take().or(trouble);
        oldest.into_sorted_vec()
    }

    /// Hands on what may go. The first trouble.
    fn walk(&self, grounds: &Grounds, each: &mut dyn FnMut(Candidate)) -> Option<String> {
        let mut walk = Walk {
            grounds,
            min_age: self.min_age,
            now: SystemTime::now(),
            left: VISITED_MAX,
            trouble: None,
        };
        for (number, root) in grounds.roots.iter().enumerate() {
            let mut newest: Option<(SystemTime, Option<Candidate>)> = None;
            let mut pass = |modified, found: Option<Candidate>| {
                if !root.log {
                    if let Some(found) = found {
                        each(found);
                    }
                    return;
                }
                // The newest so far is held back.
                let goes = match &newest {
                    Some((latest, _)) if modified < *latest => found,
                    _ => newest.replace((modified, found)).and_then(|(_, found)| found),
                };
                if let Some(found) = goes {
                    each(found);
                }
            };
            walk.enter(&root.dir, number, Path::new(""), 0, &mut pass);
        }
        walk.trouble
    }
}

/// `let_go` is called when the copy is whole, on the disk and written down.
fn copy_and_let_go(
    source: &mut File,
    seen: &Metadata,
    mut copy: File,
    (from, to, dir): (&Path, &Path, &Path),
    let_go: impl FnOnce() -> io::Result<Carried>,
) -> io::Result<Carried> {
    let digest = through(source, |bytes| copy.write_all(bytes))?;
    copy.sync_all()?;
    let again = through(&mut File::open(to)?, |_| Ok(()))?;
    if digest != again
        || mark(&source.metadata()?) != mark(seen)
        || std::fs::metadata(to)?.len() != seen.len()
    {
        return Ok(Carried::Changed);
    }
    let mut line = Moved {
        from,
        to,
        bytes: seen.len(),
        sha256: HEXLOWER.encode(&digest),
        mode: seen.mode(),
        uid: seen.uid(),
        gid: seen.gid(),
        kept: false,
    };
    let mut list = File::options()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(dir.join("moved.jsonl"))?;
    list.write_all((serde_json::to_string(&line)? + "\n").as_bytes())?;
    list.sync_all()?;
    File::open(dir)?.sync_all()?;
    let gone = let_go();
    if !matches!(gone, Ok(Carried::Moved)) {
        line.kept = true;
        list.write_all((serde_json::to_string(&line)? + "\n").as_bytes())?;
        list.sync_all()?;
    }
    gone
}

/// Unlinks `name`, if it still means the very file that was seen and nobody has written to it since.
fn unlink_unchanged(parent: &OwnedFd, name: &OsStr, seen: &Metadata) -> io::Result<Carried> {
    let named = openat(
        parent,
        name,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    if mark(&File::from(named).metadata()?) != mark(seen) {
        return Ok(Carried::Changed);
    }
    unlinkat(parent, name, AtFlags::empty())?;
    Ok(Carried::Moved)
}

/// What differs once a file was written to, replaced, or given a second name.
fn mark(file: &Metadata) -> (FileId, u64, u64, [i64; 4]) {
    let times = [file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()];
    ((file.dev(), file.ino()), file.len(), file.nlink(), times)
}

impl Grounds {
    /// Copy, sync, read back, compare, write down, unlink. Its own copy of a file that stays is removed.
    fn carry(&self, found: &Candidate, to: &Path, dir: &Path) -> io::Result<Carried> {
        let Some((parent, name)) = self.reopen(found)? else {
            return Ok(Carried::Changed);
        };
        // Without waiting for the other end of a pipe that has come to bear the name.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let mut source = File::from(openat(&parent, &name, flags, Mode::empty())?);
        let seen = source.metadata()?;
        let same = (seen.dev(), seen.ino()) == found.id
            && seen.len() == found.bytes
            && written(seen.mtime()) == found.modified;
        if !seen.is_file() || seen.nlink() != 1 || seen.dev() != self.device || !same {
            return Ok(Carried::Changed);
        }
        let copy = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(to)?;
        let from = self.roots[found.root].path.join(&found.path);
        let carried = copy_and_let_go(&mut source, &seen, copy, (&from, to, dir), || {
            let held = held_for_writing(&BTreeSet::from([found.id]))?;
            if held.files.is_empty() {
                unlink_unchanged(&parent, &name, &seen)
            } else {
                Ok(Carried::Open)
            }
        });
        if !matches!(carried, Ok(Carried::Moved))
            && let Err(error) = std::fs::remove_file(to)
        {
            tracing::warn!(path = %to.display(), %error, "the copy of a file that stayed is left");
        }
        carried
    }

    /// The directory that a candidate lies in, component by component without following a link, and its name there.
    fn reopen(&self, found: &Candidate) -> io::Result<Option<(OwnedFd, OsString)>> {
        let mut dir = self.roots[found.root].dir.try_clone()?;
        let Some(name) = found.path.file_name() else {
            return Ok(None);
        };
        for part in found.path.parent().into_iter().flat_map(Path::components) {
            dir = openat(&dir, part.as_os_str(), DIRECTORY, Mode::empty())?;
            if !self.may_enter(&dir)? {
                return Ok(None);
            }
        }
        Ok(Some((dir, name.to_owned())))
    }

    fn may_enter(&self, dir: &OwnedFd) -> io::Result<bool> {
        let found = fstat(dir)?;
        Ok(found.st_dev == self.device && !self.forbidden.contains(&(found.st_dev, found.st_ino)))
    }
}

/// One look through the listed directories.
struct Walk<'a> {
    grounds: &'a Grounds,
    min_age: Duration,
    now: SystemTime,
    /// Entries that may still be looked at.
    left: u32,
    trouble: Option<String>,
}

impl Walk<'_> {
    /// Hands every regular file's time on, and the file itself where it may go.
    fn enter(
        &mut self,
        dir: &OwnedFd,
        root: usize,
        path: &Path,
        depth: u32,
        pass: &mut dyn FnMut(SystemTime, Option<Candidate>),
    ) {
        let entries = match self.grounds.may_enter(dir) {
            Ok(false) => return,
            Ok(true) => Dir::read_from(dir.as_fd()).map_err(io::Error::from),
            Err(error) => Err(error),
        };
        let entries = match entries {
            Ok(entries) => entries,
            Err(error) => return self.note(root, path, &error),
        };
        for entry in entries {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) => return self.note(root, path, &error.into()),
            };
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            if self.left == 0 {
                return;
            }
            self.left -= 1;
            let Ok(stat) = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            let path = path.join(OsStr::from_bytes(name.to_bytes()));
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory if depth < DEPTH_MAX => {
                    match openat(dir, name, DIRECTORY, Mode::empty()) {
                        Ok(below) => self.enter(&below, root, &path, depth + 1, pass),
                        Err(error) => self.note(root, &path, &error.into()),
                    }
                }
                FileType::RegularFile => {
                    let modified = written(stat.st_mtime);
                    let old = self
                        .now
                        .duration_since(modified)
                        .is_ok_and(|age| age >= self.min_age);
                    let bytes = u64::try_from(stat.st_size).unwrap_or(0);
                    let goes = old && bytes > 0 && stat.st_nlink == 1 && stat.st_dev == self.grounds.device;
                    let found = goes.then_some(Candidate {
                        modified,
                        path,
                        root,
                        bytes,
                        id: (stat.st_dev, stat.st_ino),
                    });
                    pass(modified, found);
                }
                _ => {}
            }
        }
    }

    fn note(&mut self, root: usize, path: &Path, error: &io::Error) {
        let path = self.grounds.roots[root].path.join(path);
        self.trouble
            .get_or_insert_with(|| format!("{}: {error}", path.display()));
    }
}

/// Whole seconds; before 1970 is 1970.
fn written(seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

fn through(file: &mut File, mut each: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<Vec<u8>> {
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 16]);
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(hash.finalize().to_vec());
        }
        hash.update(&buffer[..read]);
        each(&buffer[..read])?;
    }
}

fn size(path: &Path) -> io::Result<u64> {
    let space = rustix::fs::statvfs(path)?;
    Ok(space.f_blocks.saturating_mul(space.f_frsize))
}

fn free(path: &Path) -> io::Result<u64> {
    let space = rustix::fs::statvfs(path)?;
    Ok(space.f_bavail.saturating_mul(space.f_frsize))
}

const ROOM_MIN: u64 = 16 << 20;
/// Bytes that stay free in the quarantine.
const KEPT_FREE: u64 = 64 << 20;
/// Longest time for one relief; a file that is being copied then is finished.
const TIME_MAX: Duration = Duration::from_mins(1);
const FILES_MAX: usize = 1_000;
/// Entries looked at; of more, the oldest files among so many are taken.
const VISITED_MAX: u32 = 200_000;
const DEPTH_MAX: u32 = 8;

#[cfg(test)]
mod tests;
