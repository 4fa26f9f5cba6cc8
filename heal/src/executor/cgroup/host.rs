//! Where the controllers of a host are.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Where the controllers of this host are.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Hierarchies(pub(super) BTreeMap<Controller, (Version, PathBuf)>);

/// What can be bounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Controller {
    /// Processor time.
    Cpu,
    /// Memory.
    Memory,
    /// Whether its processes run at all.
    Freezer,
}

/// The kernel's two interfaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// One tree for each controller.
    V1,
    /// One tree.
    V2,
}

impl Hierarchies {
    /// What is mounted.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn read() -> io::Result<Self> {
        Ok(Self::parse(&std::fs::read_to_string("/proc/mounts")?))
    }

    /// From lines of `/proc/mounts`. A controller is in one tree only: where version 1 has it, version 2 has not.
    fn parse(mounts: &str) -> Self {
        let mut found = BTreeMap::new();
        let mut unified = None;
        for line in mounts.lines() {
            let mut fields = line.split(' ').skip(1);
            let (Some(at), Some(kind), Some(options)) = (fields.next(), fields.next(), fields.next()) else {
                continue;
            };
            let at = PathBuf::from(at.replace("\\040", " "));
            match kind {
                "cgroup" => {
                    for controller in Controller::ALL {
                        if options.split(',').any(|option| option == controller.word()) {
                            found
                                .entry(controller)
                                .or_insert_with(|| (Version::V1, at.clone()));
                        }
                    }
                }
                "cgroup2" => unified = unified.or(Some(at)),
                _ => {}
            }
        }
        if let Some(at) = unified {
            let listed = std::fs::read_to_string(at.join("cgroup.controllers")).unwrap_or_default();
            for controller in Controller::ALL {
                // Freezing is part of version 2 itself.
                let there = controller == Controller::Freezer
                    || listed.split_whitespace().any(|word| word == controller.word());
                if there {
                    found
                        .entry(controller)
                        .or_insert_with(|| (Version::V2, at.clone()));
                }
            }
        }
        Self(found)
    }

    /// The same with one controller elsewhere, for a tree of one's own.
    #[must_use]
    pub fn with(mut self, controller: Controller, version: Version, root: PathBuf) -> Self {
        self.0.insert(controller, (version, root));
        self
    }

    /// Where a controller is.
    pub fn of(&self, controller: Controller) -> Option<(Version, &Path)> {
        self.0
            .get(&controller)
            .map(|(version, root)| (*version, root.as_path()))
    }
}

impl Controller {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Cpu, Self::Memory, Self::Freezer];

    fn word(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Freezer => "freezer",
        }
    }
}

impl fmt::Display for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controllers_are_found_where_they_are_mounted() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
             cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0\n\
             cgroup /sys/fs/cgroup/cpuset cgroup rw,cpuset 0 0\n\
             cgroup2 /nowhere/unified cgroup2 rw 0 0\n";
        let found = Hierarchies::parse(mounts);
        assert_eq!(
            found.of(Controller::Cpu),
            Some((Version::V1, Path::new("/sys/fs/cgroup/cpu,cpuacct")))
        );
        assert_eq!(
            found.of(Controller::Freezer),
            Some((Version::V2, Path::new("/nowhere/unified")))
        );
        assert_eq!(found.of(Controller::Memory), None);
    }
}
