//! A PostgreSQL server's lock file, and the processes that our server left behind.
//!
//! Each process of a server but the first leaves the group for a session of its own and overwrites its environment, so neither tells whose it
//! is. The lock file does: a server that runs on a data directory has written its process id there, and nobody else's can until it is gone.

use std::ffi::OsStr;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use tokio::time::{Instant, sleep};

use super::group::{Group, Member};

/// The server that runs on a data directory by its lock file; `None` when the one it names does not live, or does not work there.
pub(super) fn server_of(dir: &Path) -> Option<Member> {
    let real = dir.canonicalize().ok()?;
    Member::read(named(dir)?).filter(|member| !member.is_dead() && member.works_in(&real))
}

/// What is left on `dir` of the server that led `ours` and is dead, all of it by every sign: the lock file still names that server, so no other
/// has run there since; a process of that program works there, has put on the title of a server's child, is younger than the server that it was
/// of, and is nobody's child there any more.
fn left_of(ours: Group, dir: &Path, program: Option<&OsStr>) -> Vec<Member> {
    let was_ours = named(dir).is_some_and(|pid| pid.cast_signed() == ours.id) && server_of(dir).is_none();
    if !was_ours || ours.leader_start == 0 {
        return Vec::new();
    }
    let there = Member::working_in(dir, program);
    let is_left = |member: &&Member| {
        let has_parent = there.iter().any(|other| other.pid.cast_signed() == member.parent);
        member.start_ticks >= ours.leader_start && !has_parent && is_child(member)
    };
    there.iter().filter(is_left).copied().collect()
}

/// KILLs them until none is left. How many there were at first, or who is still there.
pub(super) async fn clear(
    ours: Group,
    dir: &Path,
    program: Option<&OsStr>,
    deadline: Instant,
) -> Result<usize, Vec<u32>> {
    let mut found = 0;
    loop {
        let left = left_of(ours, dir, program);
        found = found.max(left.len());
        if left.is_empty() {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            return Err(left.iter().map(|member| member.pid).collect());
        }
        for member in left {
            member.signal(Signal::KILL, is_child);
        }
        sleep(POLL_EVERY).await;
    }
}

/// The process id in the lock file. A server without a postmaster writes it negated.
fn named(dir: &Path) -> Option<u32> {
    let text = std::fs::read_to_string(dir.join(LOCK_FILE)).ok()?;
    let pid: i32 = text.lines().next()?.trim().parse().ok()?;
    Some(pid.unsigned_abs())
}

/// A child of a postmaster shows what it does in place of its arguments; the postmaster itself goes on showing these.
fn is_child(member: &Member) -> bool {
    std::fs::read(format!("/proc/{}/cmdline", member.pid)).is_ok_and(|title| title.starts_with(TITLE))
}

/// See <https://www.postgresql.org/docs/current/storage-file-layout.html>.
const LOCK_FILE: &str = "postmaster.pid";
const TITLE: &[u8] = b"postgres: ";
const POLL_EVERY: Duration = Duration::from_millis(5);
