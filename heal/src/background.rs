//! Work that stands back for the services of this host: it runs on time that nobody else wants.
//!
//! A low `nice` alone does not do that. A control group competes as one with its own weight, whatever the niceness inside it, and
//! even a thread of small weight keeps a processor until the next tick of the scheduler (4 ms at 250 Hz): a request that comes
//! meanwhile waits for that long. Where control groups can be made, the work therefore runs in an *idle* one (`cpu.idle`, Linux 5.15),
//! which any other thread that wakes up displaces at once. After `patience` it runs on with the weight of one service, so that a
//! host without a free moment gets its checkpoint too. Elsewhere there is only the niceness.

use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::Pid;
use tokio::sync::oneshot;

/// How far work stands back. Cheap to clone: all clones are one group.
#[derive(Debug, Clone)]
pub struct Background(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    nice: i32,
    patience: Option<Duration>,
    // Held for an assignment.
    group: Mutex<Option<Group>>,
}

impl Background {
    /// `nice` is 0 (does not stand back at all) to 19. `patience` is how long the work lives on idle time alone; `None` is for ever.
    pub fn new(nice: i32, patience: Option<Duration>) -> Self {
        Self(Arc::new(Inner {
            nice,
            patience,
            group: Mutex::new(None),
        }))
    }

    /// Runs `work` with the group there, which is removed afterwards. Within another `during` of the same it is that one's group.
    pub async fn during<T>(&self, work: impl Future<Output = T>) -> T {
        if self.0.nice == 0 || self.group().is_some() {
            return work.await;
        }
        *self.0.group.lock().unwrap_or_else(PoisonError::into_inner) = Group::make();
        let removed = Removed(self);
        let hurry = async {
            match self.0.patience {
                Some(patience) => tokio::time::sleep(patience).await,
                None => std::future::pending().await,
            }
            if let Some(group) = self.group() {
                tracing::debug!(patience = ?self.0.patience, "the work no longer waits for idle time");
                group.hurry();
            }
            std::future::pending::<()>().await;
        };
        let done = tokio::select! {
            done = work => done,
            () = hurry => unreachable!("it is pending for ever"),
        };
        removed.end().await;
        done
    }

    /// Makes a process stand back, and so all that it starts.
    pub(crate) fn put(&self, pid: Option<u32>) {
        let Some(pid) = pid else { return };
        if let Some(group) = self.group()
            && group.enter(pid).is_ok()
        {
            return;
        }
        lower(pid, self.0.nice);
    }

    /// Runs file work off the async threads, standing back. An error when it panicked.
    pub(crate) async fn unblock<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> std::io::Result<T> {
        let (send, receive) = oneshot::channel();
        let this = self.clone();
        // A thread of its own: one that was lowered may not be allowed to rise again.
        std::thread::Builder::new()
            .name("checkpoint".to_owned())
            .spawn(move || {
                this.put_this_thread();
                if send.send(work()).is_err() {
                    tracing::debug!("nobody waits for the copy any more");
                }
            })?;
        receive
            .await
            .map_err(|_panicked| std::io::Error::other("the copying thread ended"))
    }

    fn put_this_thread(&self) {
        let thread = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
        if let Some(group) = self.group()
            && group.enter_thread(thread).is_ok()
        {
            return;
        }
        lower(thread, self.0.nice);
    }

    /// Where a group inside ours can be made; `None` when there is none of ours.
    pub(crate) fn group(&self) -> Option<Group> {
        self.0
            .group
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// Removes the group when the work is over or is dropped.
struct Removed<'a>(&'a Background);

impl Removed<'_> {
    fn take(&self) -> Option<Group> {
        self.0
            .0
            .group
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// Waits for the removal, off the async threads.
    async fn end(self) {
        if let Some(group) = self.take()
            && let Err(error) = tokio::task::spawn_blocking(move || group.remove()).await
        {
            tracing::debug!(%error, "control group not removed");
        }
    }
}

impl Drop for Removed<'_> {
    fn drop(&mut self) {
        // Only where the work was dropped: nobody can wait here.
        if let Some(group) = self.take() {
            remove_later(group.dirs());
        }
    }
}

/// Removes groups, inner ones first, which may hold something that is dying still. Whatever stays is removed before the next work.
pub(crate) fn remove_groups(dirs: &[PathBuf]) {
    for _attempt in 0..20 {
        if removed(dirs) {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    tracing::debug!(groups = ?dirs, "control groups not removed yet");
    LEFT.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(dirs.to_vec());
}

/// The same without a wait for it.
pub(crate) fn remove_later(dirs: Vec<PathBuf>) {
    if removed(&dirs) {
        return;
    }
    let later = dirs.clone();
    let spawned = std::thread::Builder::new()
        .name("control groups".to_owned())
        .spawn(move || remove_groups(&later));
    if spawned.is_err() {
        LEFT.lock().unwrap_or_else(PoisonError::into_inner).push(dirs);
    }
}

/// Whether none of them is there any more.
fn removed(dirs: &[PathBuf]) -> bool {
    for dir in dirs {
        drop(fs::remove_dir(dir));
    }
    dirs.iter().all(|dir| !dir.exists())
}

/// A control group whose processes run when nobody else wants to.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    /// Its weight counts here.
    top: PathBuf,
    /// Processes enter here: version 2 has none beside inner groups.
    leaf: PathBuf,
    version: Version,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    One,
    Two,
}

impl Group {
    fn make() -> Option<Self> {
        let root = Path::new("/sys/fs/cgroup");
        let (root, version) = if root.join("cgroup.controllers").is_file() {
            (root.to_owned(), Version::Two)
        } else {
            (root.join("cpu"), Version::One)
        };
        remove_left(&root);
        LEFT.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|dirs| !removed(dirs));
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let top = root.join(format!("{PREFIX}{}-{number}", std::process::id()));
        let made = Self::make_at(top.clone(), version);
        if let Err(error) = &made {
            tracing::debug!(group = %top.display(), %error, "no idle control group");
            // Empty, or it was not made.
            drop(fs::remove_dir(top.join(LEAF)));
            drop(fs::remove_dir(&top));
        }
        made.ok()
    }

    fn make_at(top: PathBuf, version: Version) -> std::io::Result<Self> {
        fs::create_dir(&top)?;
        let leaf = match version {
            Version::One => top.clone(),
            Version::Two => {
                fs::write(top.join("cgroup.subtree_control"), "+cpu +memory")?;
                let leaf = top.join(LEAF);
                fs::create_dir(&leaf)?;
                leaf
            }
        };
        // Older kernels have no idle groups: then the least weight.
        if fs::write(top.join("cpu.idle"), "1").is_err() {
            let (file, least) = match version {
                Version::One => ("cpu.shares", "2"),
                Version::Two => ("cpu.weight", "1"),
            };
            fs::write(top.join(file), least)?;
        }
        Ok(Self { top, leaf, version })
    }

    /// Runs on with the weight of one service.
    fn hurry(&self) {
        let (file, usual) = match self.version {
            Version::One => ("cpu.shares", "1024"),
            Version::Two => ("cpu.weight", "100"),
        };
        // In this order: an idle group's weight cannot be set. Where there is no `cpu.idle` the first fails.
        let idle = fs::write(self.top.join("cpu.idle"), "0");
        if let Err(error) = fs::write(self.top.join(file), usual) {
            tracing::debug!(%error, ?idle, "the group stays idle");
        }
    }

    fn enter(&self, pid: u32) -> std::io::Result<()> {
        fs::write(self.leaf.join("cgroup.procs"), pid.to_string())
    }

    /// Version 2 takes whole processes only.
    fn enter_thread(&self, thread: u32) -> std::io::Result<()> {
        match self.version {
            Version::One => fs::write(self.leaf.join("tasks"), thread.to_string()),
            Version::Two => Err(std::io::Error::from(std::io::ErrorKind::Unsupported)),
        }
    }

    /// Where a group inside it is made.
    pub(crate) fn inside(&self, name: &str) -> PathBuf {
        self.top.join(name)
    }

    fn remove(&self) {
        remove_groups(&self.dirs());
    }

    /// Innermost first. Version 1 has no leaf of its own.
    fn dirs(&self) -> Vec<PathBuf> {
        vec![self.top.join(LEAF), self.top.clone()]
    }
}

/// Removes empty groups of processes that are no more.
fn remove_left(root: &Path) {
    let Ok(entries) = fs::read_dir(root) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|name| name.strip_prefix(PREFIX)?.split('-').next()?.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            drop(fs::remove_dir(entry.path().join(LEAF)));
            // Fails while something runs in it.
            drop(fs::remove_dir(entry.path()));
        }
    }
}

/// Lowers a process or a thread. Where that is refused it runs as everybody does.
fn lower(id: u32, nice: i32) {
    let Some(id) = Pid::from_raw(id.cast_signed()) else {
        return;
    };
    if nice > 0
        && let Err(error) = rustix::process::setpriority_process(Some(id), nice)
    {
        tracing::debug!(%error, "priority not lowered");
    }
}

static MADE: AtomicU64 = AtomicU64::new(0);
/// Groups of this process that something was dying in for longer than anybody waited.
static LEFT: Mutex<Vec<Vec<PathBuf>>> = Mutex::new(Vec::new());
const PREFIX: &str = "theriac-checkpoint-";
const LEAF: &str = "work";

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_group_lasts_as_long_as_the_work_and_takes_its_threads() {
        let background = Background::new(10, None);
        let inside = background
            .during(async {
                let inner = background.clone();
                let cgroups = background
                    .unblock(|| fs::read_to_string("/proc/thread-self/cgroup").unwrap_or_default())
                    .await
                    .unwrap();
                // One within the other is the same group.
                let same = inner.during(async { inner.group().map(|group| group.top) }).await;
                assert_eq!(same, background.group().map(|group| group.top));
                background.group().map(|group| (group, cgroups))
            })
            .await;
        assert!(background.group().is_none());
        let Some((group, cgroups)) = inside else {
            println!("no control group can be made here: only the niceness is left");
            return;
        };
        // Its threads report before they end, and a group with threads in it stays. What stays is removed with the next one.
        let deadline = std::time::Instant::now() + Duration::from_mins(1);
        while group.top.exists() {
            assert!(std::time::Instant::now() < deadline, "not removed");
            Group::make().unwrap().remove();
        }
        let name = group.top.file_name().unwrap().to_str().unwrap();
        assert!(
            group.version == Version::Two || cgroups.contains(name),
            "{cgroups}"
        );
    }

    #[tokio::test]
    async fn after_its_patience_the_work_takes_the_weight_of_one_service() {
        let background = Background::new(10, Some(Duration::ZERO));
        let idle = |group: &Group| fs::read_to_string(group.top.join("cpu.idle")).ok();
        if let Some(group) = Group::make() {
            let made = idle(&group);
            group.remove();
            assert!(made.is_none_or(|word| word.trim() == "1"));
        }
        background
            .during(async {
                let Some(group) = background.group().filter(|group| idle(group).is_some()) else {
                    println!("no idle control group can be made here, left out");
                    return;
                };
                // Its patience is over at once; the wait is for the timer alone.
                while idle(&group).is_some_and(|word| word.trim() != "0") {
                    tokio::task::yield_now().await;
                }
            })
            .await;
    }

    #[test]
    fn a_group_that_could_not_be_removed_goes_later() {
        let root = tempfile::tempdir().unwrap();
        let dirs = vec![root.path().join("top/leaf"), root.path().join("top")];
        fs::create_dir_all(dirs[0].join("busy")).unwrap();
        remove_groups(&dirs);
        assert!(dirs[0].exists(), "it is held");
        let listed = || LEFT.lock().unwrap().contains(&dirs);
        assert!(listed());
        fs::remove_dir(dirs[0].join("busy")).unwrap();
        // Whether or not a group can be made here.
        if let Some(group) = Group::make() {
            group.remove();
        }
        assert!(!dirs[1].exists() && !listed());
    }

    #[tokio::test]
    async fn a_group_of_work_that_was_dropped_goes_too() {
        let background = Background::new(10, None);
        let mut top = None;
        {
            let work = background.during(async {
                top = background.group().map(|group| group.top);
                std::future::pending::<()>().await;
            });
            tokio::select! {
                biased;
                () = work => unreachable!("it is pending for ever"),
                () = std::future::ready(()) => {}
            }
        }
        assert!(background.group().is_none());
        assert!(top.is_none_or(|top| !top.exists()), "nothing ran in it");
    }

    #[tokio::test]
    async fn who_does_not_stand_back_makes_no_group() {
        let background = Background::new(0, None);
        background
            .during(async { assert!(background.group().is_none()) })
            .await;
    }
}
