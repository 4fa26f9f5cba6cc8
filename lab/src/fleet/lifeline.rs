//! No process of the lab outlives the one that started it, not even when that one is killed with -9.

use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, getpid, getppid, kill_process};

/// How often the parent is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Time for an orderly end before the hard one.
const GRACE: Duration = Duration::from_secs(5);

/// Ends this process in order (TERM to itself), and hard after five seconds, as soon as its parent is gone.
///
/// Linux can send a signal at the parent's death by itself, but means the parent's *thread*, and a runtime may end
/// the thread that started us. So a thread of ours looks, four times a second.
pub fn follow_parent() {
    let parent = getppid();
    let watch = move || {
        while getppid() == parent {
            thread::sleep(LOOK_EVERY);
        }
        end(getpid());
    };
    // Without the thread the process merely has no lifeline; it is still ended by its parent in every ordinary way.
    drop(thread::Builder::new().name("lifeline".to_owned()).spawn(watch));
}

fn end(own: Pid) {
    tracing::warn!("the process that started this one is gone; ending");
    if kill_process(own, Signal::TERM).is_ok() {
        thread::sleep(GRACE);
    }
    std::process::exit(75);
}
