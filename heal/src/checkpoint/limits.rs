//! A control group round the shadow, version 1 or 2, where they can be made.

use std::fs;
use std::path::{Path, PathBuf};

use crate::background::{Background, remove_later};

/// The groups; removed when this is dropped.
#[derive(Debug)]
pub(super) struct Limits {
    groups: Vec<PathBuf>,
    words: String,
}

impl Limits {
    /// Puts the process, and so all that it starts, into groups with these limits; the processor's is one inside that of
    /// the background, so that the shadow stands back as the rest does. `None` where that cannot be done.
    pub(super) fn put(
        pid: Option<u32>,
        memory_bytes: u64,
        cpu_cores: f64,
        background: &Background,
    ) -> Option<Self> {
        let pid = pid?;
        let name = format!("theriac-shadow-{pid}");
        let background = background.group();
        let root = Path::new("/sys/fs/cgroup");
        let quota = format!("{:.0}", cpu_cores * PERIOD_US);
        let memory = memory_bytes.to_string();
        let mut made = Self {
            groups: Vec::new(),
            words: String::new(),
        };
        if root.join("cgroup.controllers").is_file() {
            let cpu = format!("{quota} {PERIOD_US:.0}");
            let files = [("memory.max", memory.as_str()), ("cpu.max", cpu.as_str())];
            let dir = background
                .as_ref()
                .map_or_else(|| root.join(&name), |group| group.inside(&name));
            made.add("v2", &dir, &files, pid);
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
            let dir = background
                .as_ref()
                .map_or_else(|| root.join("cpu").join(&name), |group| group.inside(&name));
            made.add("v1 cpu", &dir, &files, pid);
            if background.is_some() {
                made.words.push_str(", on idle time");
            }
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
        // The last process may be dying still, and this may be an async thread.
        remove_later(std::mem::take(&mut self.groups));
    }
}

const PERIOD_US: f64 = 100_000.0;
