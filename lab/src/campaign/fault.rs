//! The faults of a campaign: what is broken, for how long, and what would be wrong to do about it.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_heal::postgres::binaries::PgBinaries;

/// What is healed. The two are played at the same time, each by healers of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lane {
    /// The demo's HTTP service, which asks a second one before it takes a write.
    Http,
    /// A PostgreSQL server.
    Postgres,
}

/// A real fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trouble {
    /// The service's process is killed.
    Kill9,
    /// It is stopped: it lives, but answers nobody.
    Hang,
    /// It keeps more and more memory until it is refused any and dies.
    MemoryLeak,
    /// It burns processor time in four threads.
    CpuHog,
    /// Files that can be made again fill its file system at once.
    DiskFull,
    /// They fill it bit by bit.
    DiskCreep,
    /// A crowd of clients asks for costly things, and goes away again.
    Overload,
    /// The service that it asks is stopped, and comes back by itself.
    DependencyDown,
    /// The postmaster is killed.
    PgKill9,
    /// The postmaster is stopped.
    PgHang,
    /// Idle sessions take every slot at once.
    ConnectionExhaustion,
    /// They take them one by one.
    ConnectionCreep,
    /// A session that is idle in its transaction holds the row that every write needs.
    LockPileup,
    /// Files that can be made again fill the server's file system at once.
    PgDiskFull,
}

impl Trouble {
    /// Every one.
    pub const ALL: [Self; 14] = [
        Self::Kill9,
        Self::Hang,
        Self::MemoryLeak,
        Self::CpuHog,
        Self::DiskFull,
        Self::DiskCreep,
        Self::Overload,
        Self::DependencyDown,
        Self::PgKill9,
        Self::PgHang,
        Self::ConnectionExhaustion,
        Self::ConnectionCreep,
        Self::LockPileup,
        Self::PgDiskFull,
    ];

    /// Its name on the command line and in summaries.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kill9 => "kill9",
            Self::Hang => "hang",
            Self::MemoryLeak => "memory_leak",
            Self::CpuHog => "cpu_hog",
            Self::DiskFull => "disk_full",
            Self::DiskCreep => "disk_creep",
            Self::Overload => "overload",
            Self::DependencyDown => "dependency_down",
            Self::PgKill9 => "pg_kill9",
            Self::PgHang => "pg_hang",
            Self::ConnectionExhaustion => "connection_exhaustion",
            Self::ConnectionCreep => "connection_creep",
            Self::LockPileup => "lock_pileup",
            Self::PgDiskFull => "pg_disk_full",
        }
    }

    /// What is done, for people.
    pub fn title(self) -> &'static str {
        match self {
            Self::Kill9 => "kill −9 of the HTTP service",
            Self::Hang => "hang of the HTTP service (SIGSTOP)",
            Self::MemoryLeak => "memory leak",
            Self::CpuHog => "CPU hog",
            Self::DiskFull => "disk full, HTTP service",
            Self::DiskCreep => "disk creep",
            Self::Overload => "overload",
            Self::DependencyDown => "dependency down",
            Self::PgKill9 => "kill −9 of PostgreSQL",
            Self::PgHang => "hang of PostgreSQL (SIGSTOP)",
            Self::ConnectionExhaustion => "connection exhaustion",
            Self::ConnectionCreep => "connection creep",
            Self::LockPileup => "lock pile-up",
            Self::PgDiskFull => "disk full, PostgreSQL",
        }
    }

    /// What it is done to.
    pub fn lane(self) -> Lane {
        match self {
            Self::Kill9
            | Self::Hang
            | Self::MemoryLeak
            | Self::CpuHog
            | Self::DiskFull
            | Self::DiskCreep
            | Self::Overload
            | Self::DependencyDown => Lane::Http,
            Self::PgKill9
            | Self::PgHang
            | Self::ConnectionExhaustion
            | Self::ConnectionCreep
            | Self::LockPileup
            | Self::PgDiskFull => Lane::Postgres,
        }
    }

    /// It comes bit by bit, so that there is something to prevent.
    pub fn is_gradual(self) -> bool {
        matches!(self, Self::MemoryLeak | Self::DiskCreep | Self::ConnectionCreep)
    }

    /// A restart cannot help and takes away what still works.
    pub fn forbids_restart(self) -> bool {
        matches!(
            self,
            Self::DiskFull
                | Self::DiskCreep
                | Self::PgDiskFull
                | Self::Overload
                | Self::DependencyDown
                | Self::ConnectionExhaustion
                | Self::ConnectionCreep
                | Self::LockPileup
        )
    }

    /// It takes the whole machine: one healer at a time, and nothing else meanwhile.
    pub fn takes_the_machine(self) -> bool {
        matches!(self, Self::CpuHog | Self::Overload)
    }

    /// It passes by itself after so long, and is nobody's to mend.
    pub fn lasts(self) -> Option<Duration> {
        match self {
            Self::Overload => Some(Duration::from_secs(6)),
            Self::DependencyDown => Some(Duration::from_secs(8)),
            _ => None,
        }
    }

    /// Time from its beginning until it is taken back.
    pub fn limit(self) -> Duration {
        Duration::from_secs(match self {
            Self::Kill9 | Self::ConnectionExhaustion => 20,
            Self::Hang | Self::PgHang => 25,
            Self::PgKill9 => 30,
            Self::MemoryLeak => 40,
            Self::CpuHog | Self::LockPileup => 12,
            Self::DiskFull | Self::PgDiskFull => 18,
            Self::DiskCreep | Self::ConnectionCreep => 36,
            Self::Overload | Self::DependencyDown => 22,
        })
    }

    /// About how long a step of it takes with its pauses, for the plan; the slowest healer counts.
    pub(super) fn about(self) -> Duration {
        Duration::from_secs(match self {
            Self::Kill9 => 13,
            Self::Hang => 18,
            Self::MemoryLeak => 32,
            Self::CpuHog | Self::DependencyDown => 19,
            Self::DiskFull => 25,
            Self::DiskCreep => 34,
            Self::Overload => 15,
            Self::PgKill9 | Self::ConnectionExhaustion | Self::LockPileup => 22,
            Self::PgDiskFull => 28,
            Self::PgHang => 24,
            Self::ConnectionCreep => 36,
        })
    }

    /// What the fault needs that this machine lacks; nothing when it can be injected.
    pub(super) fn missing(self, machine: &Machine) -> Option<String> {
        if self.lane() == Lane::Postgres
            && let Err(why) = &machine.postgres
        {
            return Some(why.clone());
        }
        let needs_disk = matches!(self, Self::DiskFull | Self::DiskCreep | Self::PgDiskFull);
        (needs_disk && !machine.root).then(|| {
            "a file system of its own needs root: this account may mount none, and the host's is not filled".to_owned()
        })
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that this build does not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the {what} `{got}` is not part of this build: it has {known}")]
pub struct NameError {
    /// `fault` or `healer`.
    pub what: &'static str,
    /// What was asked for.
    pub got: String,
    /// What there is.
    pub known: String,
}

impl FromStr for Trouble {
    type Err = NameError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|fault| fault.name() == name)
            .ok_or_else(|| NameError {
                what: "fault",
                got: name.to_owned(),
                known: Self::ALL.map(Self::name).join(", "),
            })
    }
}

/// What this machine offers.
#[derive(Debug, Clone)]
pub(super) struct Machine {
    pub(super) root: bool,
    pub(super) postgres: Result<PgBinaries, String>,
}

impl Machine {
    /// Looks.
    pub(super) fn here() -> Self {
        let root = rustix::process::geteuid().is_root();
        let switch = !root || is_on_path("setpriv");
        let postgres = PgBinaries::find_here().map_err(|error| error.to_string());
        Self {
            root: root && is_on_path("mount") && is_on_path("umount"),
            postgres: if switch {
                postgres
            } else {
                Err("`setpriv` is not on PATH, and PostgreSQL does not run as root".to_owned())
            },
        }
    }

    /// Faults of the catalogue that no build injects here, each with its reason.
    pub(super) fn never() -> Vec<(&'static str, String)> {
        let redis = if is_on_path("redis-server") {
            "an edge of this build has no probe for Redis, so nothing would verify a healing"
        } else {
            "`redis-server` is not on PATH, and an edge of this build has no probe for Redis"
        };
        let loss = if is_on_path("nft") {
            "this build drops no packets: every way to the services leads over loopback or a Unix socket"
        } else {
            "`nft` is not on PATH and every way to the services leads over loopback or a Unix socket"
        };
        let slow = if Path::new("/sys/fs/cgroup/blkio").is_dir() {
            "the states lie on file systems in memory, which no throttle slows; a loop device is not built"
        } else {
            "there is no blkio controller, and the states lie on file systems in memory"
        };
        vec![
            ("slow_disk", slow.to_owned()),
            ("packet_loss", loss.to_owned()),
            ("redis", redis.to_owned()),
        ]
    }
}

pub(super) fn is_on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}
