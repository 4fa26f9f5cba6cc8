//! `theriac-lab campaign` as a process: what it leaves when it is killed in the middle of a fault.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Far above anything that a busy machine needs; only a test that fails waits for it.
const LIMIT: Duration = Duration::from_mins(3);

#[test]
fn a_fault_is_taken_back_when_the_injector_is_killed_in_the_middle_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let mut campaign = begin(&out, dir.path());
    let root = until("a folder is written down", || {
        let text = std::fs::read_to_string(out.join("undo.json")).ok()?;
        let record: serde_json::Value = serde_json::from_str(&text).ok()?;
        Some(PathBuf::from(record["root"].as_str()?))
    });
    // The threshold healer needs two looks for a stopped process, so the fault is there for seconds.
    until("the service is stopped", || {
        of(&root)
            .into_iter()
            .find(|process| process.stat().is_ok_and(|stat| stat.state == 'T'))
    });
    campaign.kill().unwrap();
    campaign.wait().unwrap();
    until(
        "every process of the campaign is gone, also the stopped one",
        || of(&root).is_empty().then_some(()),
    );
    until("folder, file systems and record are gone", || {
        let mounted = std::fs::read_to_string("/proc/self/mounts").ok()?;
        let left =
            root.exists() || out.join("undo.json").exists() || mounted.contains(&*root.to_string_lossy());
        (!left).then_some(())
    });
    assert!(
        out.join("plan.json").exists() && out.join("runs.jsonl").exists(),
        "what was measured stays"
    );
}

fn begin(out: &Path, temporary: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_theriac-lab"))
        .args([
            "campaign",
            "--faults",
            "hang",
            "--healers",
            "threshold",
            "--runs",
            "50",
            "--out",
        ])
        .arg(out)
        .env("TMPDIR", temporary)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Processes that name the folder.
fn of(root: &Path) -> Vec<procfs::process::Process> {
    let all = procfs::process::all_processes().unwrap().filter_map(Result::ok);
    all.filter(|process| {
        let words = process.cmdline().unwrap_or_default();
        words.iter().any(|word| Path::new(word).starts_with(root))
    })
    .collect()
}

/// Looks again and again until there is something.
fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(
            begun.elapsed() < LIMIT,
            "not within {} s: {what}",
            LIMIT.as_secs()
        );
        std::thread::yield_now();
    }
}
