//! A program run to its end, with bounds on its time, on what is kept of its output, and on what it leaves behind.

use std::io;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;
use tokio::time::timeout;

use crate::executor::group::{Group, Member};

/// How far a program may go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    /// Longest time to its exit; then its whole process group is killed.
    pub(crate) time: Duration,
    /// Most bytes that are kept of its output, and of its errors.
    pub(crate) output_bytes: usize,
    /// Longest time that output is waited for after the exit: what it left running may keep the pipes open for as long as it likes.
    pub(crate) drain: Duration,
    /// What becomes of that.
    pub(crate) left: Left,
}

/// What becomes of what a program that has exited left running in its process group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Left {
    /// It goes on.
    Alone,
    /// It is killed.
    Killed,
}

/// How it ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) status: ExitStatus,
    /// What it said, cut.
    pub(crate) out: Vec<u8>,
    /// Its errors, cut.
    pub(crate) err: Vec<u8>,
}

/// Why it did not come to its end.
#[derive(Debug)]
pub(crate) enum NotRun {
    /// It could not be run or was lost.
    Failed(io::Error),
    /// It took too long and was killed with everything in its group.
    Late,
}

/// Runs it, in a process group of its own and without input. It is killed with its group when it takes too long, and when this future is dropped.
/// `begun` is told its number.
pub(crate) async fn run(
    mut command: Command,
    bounds: Bounds,
    begun: impl FnOnce(Option<u32>),
) -> Result<Ran, NotRun> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(NotRun::Failed)?;
    let pid = child.id();
    begun(pid);
    // Also when nobody waits any more, as when the edge is told to stop: what it started would go on unseen. Dropped before the child, so
    // its number is still its own then.
    let mut guard = KillGroup(pid.and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw));
    let leader = pid.and_then(Member::read);
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = {
        let max = bounds.output_bytes;
        let reading = async { tokio::join!(capped(stdout, max, &mut out), capped(stderr, max, &mut err)) };
        tokio::pin!(reading);
        let mut read = false;
        let exited = async {
            loop {
                tokio::select! {
                    status = child.wait() => return status,
                    _ = &mut reading, if !read => read = true,
                }
            }
        };
        let status = timeout(bounds.time, exited).await;
        if status.is_ok() {
            // It is reaped: the number may be another's soon.
            let group = guard.0.take();
            if bounds.left == Left::Killed {
                kill_left(group, leader);
            }
            if !read {
                drop(timeout(bounds.drain, reading).await);
            }
        }
        status
    };
    let Ok(status) = status else {
        // Not reaped yet, so the number is still its own. What it started in its group goes with it; what left the group is not ours to
        // find.
        guard.kill();
        drop(child.wait().await);
        return Err(NotRun::Late);
    };
    let status = status.map_err(NotRun::Failed)?;
    Ok(Ran { status, out, err })
}

/// Kills what is left of the group of a leader that is gone.
fn kill_left(group: Option<Pid>, leader: Option<Member>) {
    let (Some(group), Some(leader)) = (group, leader) else {
        return;
    };
    // Asked first, since it is nearly always empty and to look through all processes takes time.
    if test_kill_process_group(group).is_ok() {
        let left = Group {
            id: leader.group,
            session: leader.session,
            leader_start: leader.start_ticks,
        };
        left.signal(Signal::KILL);
    }
}

/// The process group of a program that is not reaped.
struct KillGroup(Option<Pid>);

impl KillGroup {
    fn kill(&mut self) {
        if let Some(Err(error)) = self.0.take().map(|group| kill_process_group(group, Signal::KILL)) {
            tracing::warn!(%error, "a program's processes could not be killed");
        }
    }
}

impl Drop for KillGroup {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Reads to the end, so that the program is never blocked, and keeps the first `max` bytes.
async fn capped(pipe: Option<impl AsyncRead + Unpin>, max: usize, kept: &mut Vec<u8>) {
    let Some(mut pipe) = pipe else { return };
    let mut block = [0_u8; 1024];
    while let Ok(read @ 1..) = pipe.read(&mut block).await {
        let room = max.saturating_sub(kept.len());
        kept.extend_from_slice(&block[..read.min(room)]);
    }
}
