//! A control group round the shadow, version 1 or 2, where they can be made.

use std::fs;
use std::path::{Path, PathBuf};

use super::ShadowSpec;

/// The groups; removed when this is dropped.
#[derive(Debug)]
pub(super) struct Limits {
    groups: Vec<PathBuf>,
    words: String,
}

impl Limits {
    /// Puts the process, and so all that it starts, into groups with the limits of `spec`. `None` where that cannot be done.
    pub(super) fn put(pid: Option<u32>, spec: &ShadowSpec) -> Option<Self> {
        let pid = pid?;
        let name = format!("theriac-shadow-{pid}");
        let root = Path::new("/sys/fs/cgroup");
        let quota = format!("{:.0}", spec.cpu_cores * PERIOD_US);
        let memory = spec.memory_bytes.to_string();
        let mut made = Self {
            groups: Vec::new(),
            words: String::new(),
        };
        if root.join("cgroup.controllers").is_file() {
            let cpu = format!("{quota} {PERIOD_US:.0}");
            let files = [("memory.max", memory.as_str()), ("cpu.max", cpu.as_str())];
            made.add("v2", &root.join(&name), &files, pid);
        } else {
            let period = format!("{PERIOD_US:.0}");
            made.add(
                "v1 memory",
                &root.join("memory").join(&name),
                &[("memory.limit_in_bytes", &memory)],
                pid,
            );
            let files = [
                ("cpu.cfs_period_us", period.as_str()),
                ("cpu.cfs_quota_us", &quota),
            ];
            made.add("v1 cpu", &root.join("cpu").join(&name), &files, pid);
        }
        (!made.groups.is_empty()).then_some(made)
    }

    pub(super) fn words(&self) -> String {
        format!("control groups: {}", self.words)
    }

    fn add(&mut self, kind: &str, dir: &Path, files: &[(&str, &str)], pid: u32) {
        let make = || {
            fs::create_dir(dir)?;
            for (file, value) in files {
                fs::write(dir.join(file), value)?;
            }
            fs::write(dir.join("cgroup.procs"), pid.to_string())
        };
        match make() {
            Ok(()) => {
                if !self.words.is_empty() {
                    self.words.push_str(", ");
                }
                self.words.push_str(kind);
                self.groups.push(dir.to_owned());
            }
            Err(error) => {
                tracing::debug!(group = %dir.display(), %error, "no control group");
                // Empty, or it was not made.
                drop(fs::remove_dir(dir));
            }
        }
    }
}

impl Drop for Limits {
    fn drop(&mut self) {
        for group in &self.groups {
            // The last process may be dying still: it leaves within milliseconds.
            for _attempt in 0..20 {
                if fs::remove_dir(group).is_ok() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        }
    }
}

const PERIOD_US: f64 = 100_000.0;
