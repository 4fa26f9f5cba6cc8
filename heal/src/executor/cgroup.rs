//! Control groups, version 1 and 2: bounds on a listed group of processes, and its freezing, taken back by themselves.
//!
//! | | `throttle_cpu` | `limit_memory` | `freeze` |
//! |---|---|---|---|
//! | precondition | the group is listed in the configuration, exists, and does not hold this process; the policy allows it (R2) | the same | the same |
//! | effect | v1 `cpu.cfs_quota_us`, v2 `cpu.max` | v1 `memory.limit_in_bytes`, v2 `memory.max`: beyond it the kernel reclaims, then kills within the group | v1 `freezer.state`, v2 `cgroup.freeze` |
//! | undo | what stood there before, after [`Bound::lasts`], at once when verification finds no effect or harm, and at our end | the same | thawed, the same |
//! | verified by | the service that suffered, as after any other action; the file is read back | the same | the same |
//!
//! What is to be undone is on disk before anything is changed, so a later run of ours undoes it ([`CgroupHands::undo_due`]). While nobody
//! runs, a bound stays: the kernel has no clock for it. A value that somebody else has written since is left alone.
//! Sources: kernel documentation, `cgroup-v1/{cpu,memory,freezer-subsystem}` and `cgroup-v2`.

mod host;

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::host::{Controller, Hierarchies, Version};
use crate::types::{ActionKind, Now};

/// The name of a group below each controller's root: parts of letters, digits, `.`, `_`, `-`, `@`, `:`, joined by `/`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GroupName(String);

/// One change that may be made, and for how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bound {
    /// Of which group.
    pub group: GroupName,
    /// Which.
    pub change: Change,
    /// For how long.
    pub lasts: Duration,
}

/// See [`Bound`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Per cent of one processor, at least 1.
    CpuPercent(u32),
    /// Bytes, rounded down to whole pages of 4 KiB.
    MemoryBytes(u64),
    /// Not at all.
    Freeze,
}

/// The hands on the groups of one service's configuration.
#[derive(Debug, Clone)]
pub struct CgroupHands {
    /// Where controllers are.
    pub at: Hierarchies,
    /// The group in which the service's own processes are put; made where it is missing.
    pub place: Option<GroupName>,
    /// What may be done, by action.
    pub bounds: BTreeMap<ActionKind, Bound>,
    /// What is to be undone.
    pub record: PathBuf,
    /// Shared by all clones, so that no two of them change the record at once.
    pub gate: Gate,
}

/// One change of the record at a time; none is begun once it is closed.
#[derive(Debug, Clone, Default)]
pub struct Gate(Arc<Mutex<bool>>);

impl Gate {
    /// Whether it is closed; held over reading, changing and writing.
    fn lock(&self) -> MutexGuard<'_, bool> {
        // A flag is whole whatever happened to its last holder.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a group was not changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CgroupError {
    /// The host does not have it, or it is not mounted.
    #[error("there is no {0} controller on this host")]
    NoController(Controller),
    /// Nothing is listed for the action.
    #[error("no group is listed for {0}")]
    NotListed(ActionKind),
    /// The group is not there.
    #[error("there is no group {}", .0.display())]
    NoGroup(PathBuf),
    /// It holds this very process.
    #[error("the group {0} holds the healer itself")]
    Own(GroupName),
    /// The kernel did not take the value.
    #[error("{} holds {found:?} after {wanted:?} was written", path.display())]
    NotTaken {
        /// The file.
        path: PathBuf,
        /// What was written.
        wanted: String,
        /// What it holds.
        found: String,
    },
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// The record of what is to be undone cannot be read: nothing new is begun before a person looked.
    #[error("{} is damaged: {reason}; undo by hand what it names, then remove it", path.display())]
    Damaged {
        /// The record.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// All bounds were taken back for good.
    #[error("this run of ours is ending: nothing new is bounded")]
    Closed,
    /// No name of a group.
    #[error("`{0}` is no name of a group: letters, digits, . _ - @ : in parts joined by /")]
    Name(String),
}

/// One change that is in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Undo {
    intent: u64,
    path: PathBuf,
    before: String,
    wanted: String,
    until_ms: u64,
    clock_id: String,
}

impl Change {
    fn controller(self) -> Controller {
        match self {
            Self::CpuPercent(_) => Controller::Cpu,
            Self::MemoryBytes(_) => Controller::Memory,
            Self::Freeze => Controller::Freezer,
        }
    }

    /// The file and what is written there.
    fn file(self, version: Version) -> (&'static str, String) {
        match (self, version) {
            (Self::CpuPercent(percent), Version::V1) => {
                ("cpu.cfs_quota_us", (percent * PERCENT_US).to_string())
            }
            (Self::CpuPercent(percent), Version::V2) => (
                "cpu.max",
                format!("{} {}", percent * PERCENT_US, 100 * PERCENT_US),
            ),
            (Self::MemoryBytes(bytes), Version::V1) => ("memory.limit_in_bytes", whole(bytes)),
            (Self::MemoryBytes(bytes), Version::V2) => ("memory.max", whole(bytes)),
            (Self::Freeze, Version::V1) => ("freezer.state", "FROZEN".to_owned()),
            (Self::Freeze, Version::V2) => ("cgroup.freeze", "1".to_owned()),
        }
    }
}

fn whole(bytes: u64) -> String {
    let page = rustix::param::page_size() as u64;
    (bytes / page * page).to_string()
}

impl TryFrom<String> for GroupName {
    type Error = CgroupError;

    fn try_from(name: String) -> Result<Self, CgroupError> {
        let good = |part: &str| {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-@:".contains(&byte);
            !part.is_empty() && part != "." && part != ".." && part.bytes().all(plain)
        };
        if name.len() <= NAME_BYTES_MAX && name.split('/').all(good) {
            Ok(Self(name))
        } else {
            Err(CgroupError::Name(name))
        }
    }
}

impl GroupName {
    /// Whether it is the other, or one above it: what is done to a group is done to those below.
    pub fn holds(&self, other: &Self) -> bool {
        let rest = other.0.strip_prefix(&self.0);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }
}

impl From<GroupName> for String {
    fn from(name: GroupName) -> Self {
        name.0
    }
}

impl fmt::Display for GroupName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl CgroupHands {
    /// Puts a process, and what it starts from now on, into the service's group, under every controller that is there.
    ///
    /// # Errors
    /// [`CgroupError`] of the first controller that refuses; the others are tried too.
    pub fn place(&self, pid: u32) -> Result<(), CgroupError> {
        let Some(group) = &self.place else { return Ok(()) };
        let mut result = Ok(());
        let mut done: Vec<PathBuf> = Vec::new();
        for (version, root) in self.at.0.values() {
            let dir = root.join(&group.0);
            if done.contains(&dir) {
                continue;
            }
            let put = make(root, group, *version).and_then(|()| write(&dir.join(PROCS), &pid.to_string()));
            result = result.and(put);
            done.push(dir);
        }
        result
    }

    /// Carries an action out: what is to be undone is durable before. What was done, in words.
    ///
    /// # Errors
    /// [`CgroupError`].
    pub fn act(
        &self,
        action: ActionKind,
        intent: u64,
        now: Now,
        clock_id: &str,
    ) -> Result<String, CgroupError> {
        let closed = self.gate.lock();
        if *closed {
            return Err(CgroupError::Closed);
        }
        let bound = self.bounds.get(&action).ok_or(CgroupError::NotListed(action))?;
        let controller = bound.change.controller();
        let (version, root) = self
            .at
            .of(controller)
            .ok_or(CgroupError::NoController(controller))?;
        let dir = root.join(&bound.group.0);
        if !dir.is_dir() {
            return Err(CgroupError::NoGroup(dir));
        }
        if holds(&dir, std::process::id()) {
            return Err(CgroupError::Own(bound.group.clone()));
        }
        let (file, mut wanted) = bound.change.file(version);
        if let (Version::V1, Change::CpuPercent(percent)) = (version, bound.change) {
            // The quota is a share of the period, which somebody may have set otherwise.
            let period = read(&dir.join("cpu.cfs_period_us"))?;
            let period: u64 = period.parse().unwrap_or(u64::from(100 * PERCENT_US));
            wanted = (period * u64::from(percent) / 100).max(QUOTA_MIN_US).to_string();
        }
        let path = dir.join(file);
        let found = read(&path)?;
        let mut record = self.read_record()?;
        let known = record.iter().find(|undo| undo.path == path);
        // A second time only lasts longer: what stood there before stays known.
        let before = known.map_or_else(|| found.clone(), |undo| undo.before.clone());
        record.retain(|undo| undo.path != path);
        record.push(Undo {
            intent,
            path: path.clone(),
            before,
            wanted: wanted.clone(),
            until_ms: now.when().monotonic_ms.saturating_add(millis(bound.lasts)),
            clock_id: clock_id.to_owned(),
        });
        self.write_record(&record)?;
        write(&path, &wanted)?;
        let found = settled(&path, &wanted)?;
        if !same(&found, &wanted) {
            // What the kernel made of it would not be known for ours when its time is over.
            self.give_up(&path, &mut record)?;
            return Err(CgroupError::NotTaken { path, wanted, found });
        }
        drop(closed);
        Ok(format!(
            "{} of {} is {found} for {:?}",
            file, bound.group, bound.lasts
        ))
    }

    /// Puts back what stood at `path` before, and forgets it.
    fn give_up(&self, path: &Path, record: &mut Vec<Undo>) -> Result<(), CgroupError> {
        let (given_up, left): (Vec<Undo>, Vec<Undo>) = std::mem::take(record)
            .into_iter()
            .partition(|undo| undo.path == path);
        for undo in given_up {
            write(path, &undo.before)?;
        }
        *record = left;
        self.write_record(record)
    }

    /// Undoes what one intent did; `None` undoes everything. What was undone, in words.
    ///
    /// # Errors
    /// [`CgroupError`]: the rest is undone, and what was not stays recorded.
    pub fn undo(&self, intent: Option<u64>) -> Result<Vec<String>, CgroupError> {
        let _gate = self.gate.lock();
        self.undo_where(|undo| intent.is_none_or(|intent| undo.intent == intent))
    }

    /// Undoes everything, and lets none of the clones begin anything new: one that waits to act is refused.
    ///
    /// # Errors
    /// See [`Self::undo`].
    pub fn close(&self) -> Result<Vec<String>, CgroupError> {
        let mut closed = self.gate.lock();
        *closed = true;
        self.undo_where(|_| true)
    }

    /// Undoes what has lasted long enough, or is of another boot. What was undone, in words.
    ///
    /// # Errors
    /// See [`Self::undo`].
    pub fn undo_due(&self, now: Now, clock_id: &str) -> Result<Vec<String>, CgroupError> {
        let now_ms = now.when().monotonic_ms;
        let _gate = self.gate.lock();
        self.undo_where(|undo| undo.until_ms <= now_ms || undo.clock_id != clock_id)
    }

    /// When something is to be undone next, on the monotonic clock; `None` when nothing is in force.
    ///
    /// # Errors
    /// [`CgroupError::Damaged`] and [`CgroupError::Io`].
    pub fn next_due(&self) -> Result<Option<Duration>, CgroupError> {
        let _gate = self.gate.lock();
        let record = self.read_record()?;
        Ok(record
            .iter()
            .map(|undo| Duration::from_millis(undo.until_ms))
            .min())
    }

    /// Undoes what is due, see [`Self::undo_due`], and says when to do so next, on the monotonic clock; `None` when nothing is in force.
    /// What could not be undone, or not even be read, is tried again after [`UNDO_AGAIN`].
    pub fn undo_due_then(
        &self,
        now: Now,
        clock_id: &str,
    ) -> (Result<Vec<String>, CgroupError>, Option<Duration>) {
        let done = self.undo_due(now, clock_id);
        let again = now.monotonic + UNDO_AGAIN;
        let next = match (&done, self.next_due()) {
            (Ok(_), Ok(next)) => next,
            (Err(_), Ok(next)) => next.map(|next| next.max(again)),
            (_, Err(_)) => Some(again),
        };
        (done, next)
    }

    /// The gate is held.
    fn undo_where(&self, due: impl Fn(&Undo) -> bool) -> Result<Vec<String>, CgroupError> {
        let record = self.read_record()?;
        let (now, mut later): (Vec<Undo>, Vec<Undo>) = record.into_iter().partition(due);
        if now.is_empty() {
            return Ok(Vec::new());
        }
        let (mut told, mut failed) = (Vec::new(), None);
        for undo in now {
            match undo.take_back() {
                Ok(words) => told.push(words),
                Err(error) => {
                    failed = failed.or(Some(error));
                    later.push(undo);
                }
            }
        }
        self.write_record(&later)?;
        failed.map_or(Ok(told), Err)
    }

    fn read_record(&self) -> Result<Vec<Undo>, CgroupError> {
        let text = match std::fs::read(&self.record) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => {
                let path = self.record.clone();
                return Err(CgroupError::Io { path, source });
            }
        };
        serde_json::from_slice(&text).map_err(|error| CgroupError::Damaged {
            path: self.record.clone(),
            reason: error.to_string(),
        })
    }

    /// Written beside, synced, renamed, the directory synced.
    fn write_record(&self, record: &[Undo]) -> Result<(), CgroupError> {
        let beside = self.record.with_extension("new");
        let written = || {
            let mut file = std::fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&beside)?;
            file.write_all(&serde_json::to_vec(record)?)?;
            file.sync_all()?;
            std::fs::rename(&beside, &self.record)?;
            let parent = self.record.parent().unwrap_or(Path::new("/"));
            std::fs::File::open(parent)?.sync_all()
        };
        written().map_err(|source| CgroupError::Io {
            path: self.record.clone(),
            source,
        })
    }
}

impl Undo {
    fn take_back(&self) -> Result<String, CgroupError> {
        let path = self.path.display();
        let found = match read(&self.path) {
            Ok(found) => found,
            Err(CgroupError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(format!("{path} is gone, and with it what was set there"));
            }
            Err(error) => return Err(error),
        };
        if same(&found, &self.before) {
            return Ok(format!("{path} holds {found} as before"));
        }
        if !same(&found, &self.wanted) {
            return Ok(format!("{path} holds {found}, which somebody else wrote: left"));
        }
        write(&self.path, &self.before)?;
        let found = settled(&self.path, &self.before)?;
        if same(&found, &self.before) {
            Ok(format!("{path} holds {found} again"))
        } else {
            Err(CgroupError::NotTaken {
                path: self.path.clone(),
                wanted: self.before.clone(),
                found,
            })
        }
    }
}

/// `FREEZING` is on its way to `FROZEN`.
fn same(found: &str, wanted: &str) -> bool {
    found == wanted || (found == "FREEZING" && wanted == "FROZEN")
}

/// What a file holds, once it holds what was written or a few looks have passed.
fn settled(path: &Path, wanted: &str) -> Result<String, CgroupError> {
    let mut found = read(path)?;
    for _ in 0..LOOKS {
        if found == wanted {
            break;
        }
        std::thread::sleep(LOOK_PAUSE);
        found = read(path)?;
    }
    Ok(found)
}

/// Makes the group's directories, and in version 2 hands the controllers down to them.
fn make(root: &Path, group: &GroupName, version: Version) -> Result<(), CgroupError> {
    let mut dir = root.to_owned();
    for part in group.0.split('/') {
        if version == Version::V2 {
            for controller in [Controller::Cpu, Controller::Memory] {
                // One that this tree does not have is refused, and then has nothing to hand down.
                let word = format!("+{controller}");
                let _handed = std::fs::write(dir.join("cgroup.subtree_control"), word).is_ok();
            }
        }
        dir.push(part);
        if let Err(source) = std::fs::create_dir(&dir)
            && source.kind() != io::ErrorKind::AlreadyExists
        {
            return Err(CgroupError::Io { path: dir, source });
        }
    }
    Ok(())
}

/// Whether a process is in the group or in one below it.
fn holds(dir: &Path, pid: u32) -> bool {
    let listed = std::fs::read_to_string(dir.join(PROCS)).unwrap_or_default();
    if listed.lines().any(|line| line.trim() == pid.to_string()) {
        return true;
    }
    let below = std::fs::read_dir(dir).into_iter().flatten().flatten();
    below
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .any(|entry| holds(&entry.path(), pid))
}

fn read(path: &Path) -> Result<String, CgroupError> {
    std::fs::read_to_string(path)
        .map(|text| text.trim().to_owned())
        .map_err(|source| CgroupError::Io {
            path: path.to_owned(),
            source,
        })
}

fn write(path: &Path, text: &str) -> Result<(), CgroupError> {
    // Never made: a missing file is a controller that is not there.
    let open = std::fs::OpenOptions::new().write(true).truncate(true).open(path);
    open.and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(|source| CgroupError::Io {
            path: path.to_owned(),
            source,
        })
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// One per cent of the period of 100 ms, in microseconds.
const PERCENT_US: u32 = 1_000;
/// The kernel takes no less.
const QUOTA_MIN_US: u64 = 1_000;
const NAME_BYTES_MAX: usize = 200;
const PROCS: &str = "cgroup.procs";
/// Before what could not be taken back is tried again.
pub const UNDO_AGAIN: Duration = Duration::from_secs(10);
const LOOKS: u32 = 50;
const LOOK_PAUSE: Duration = Duration::from_millis(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_nowhere_else() {
        for bad in ["", "/a", "a/", "a//b", "..", "a/../b", "a b", "a\n", "."] {
            assert!(GroupName::try_from(bad.to_owned()).is_err(), "{bad:?}");
        }
        assert!(GroupName::try_from("system.slice/batch@1.service".to_owned()).is_ok());
    }

    #[test]
    fn a_group_holds_itself_and_what_is_below_it() {
        let group = |name: &str| GroupName::try_from(name.to_owned()).unwrap();
        assert!(group("a/b").holds(&group("a/b")) && group("a").holds(&group("a/b/c")));
        assert!(!group("a/b").holds(&group("a")) && !group("a").holds(&group("ab")));
    }
}
