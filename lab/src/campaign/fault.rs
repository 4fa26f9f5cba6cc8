//! The faults of a campaign: what is broken, for how long, and what would be wrong to do about it.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_heal::postgres::binaries::PgBinaries;

use super::{disk, loss};

/// What is healed. All are played at the same time, each by healers of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lane {
    /// The demo's HTTP service, which asks a second one before it takes a write.
    Http,
    /// A PostgreSQL server.
    Postgres,
    /// A Redis server.
    Redis,
}

impl Lane {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Http, Self::Postgres, Self::Redis];
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
    /// The device under the server's file system does 64 KiB a second, and is fast again by itself.
    SlowDisk,
    /// The Redis server is killed.
    RedisKill9,
    /// It is stopped.
    RedisHang,
    /// Two of five packets to and from it get lost, until the line is sound again by itself.
    PacketLoss,
}

impl Trouble {
    /// Every one.
    pub const ALL: [Self; 18] = [
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
        Self::SlowDisk,
        Self::RedisKill9,
        Self::RedisHang,
        Self::PacketLoss,
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
            Self::SlowDisk => "slow_disk",
            Self::RedisKill9 => "redis_kill9",
            Self::RedisHang => "redis_hang",
            Self::PacketLoss => "packet_loss",
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
            Self::SlowDisk => "slow disk, PostgreSQL",
            Self::RedisKill9 => "kill −9 of Redis",
            Self::RedisHang => "hang of Redis (SIGSTOP)",
            Self::PacketLoss => "packet loss, Redis",
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
            | Self::PgDiskFull
            | Self::SlowDisk => Lane::Postgres,
            Self::RedisKill9 | Self::RedisHang | Self::PacketLoss => Lane::Redis,
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
                | Self::SlowDisk
                | Self::PacketLoss
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
            Self::DependencyDown | Self::SlowDisk | Self::PacketLoss => Some(Duration::from_secs(8)),
            _ => None,
        }
    }

    /// Time from its beginning until it is taken back.
    pub fn limit(self) -> Duration {
        Duration::from_secs(match self {
            Self::Kill9 | Self::RedisKill9 | Self::ConnectionExhaustion => 20,
            Self::Hang | Self::PgHang | Self::RedisHang => 25,
            Self::PgKill9 => 30,
            Self::MemoryLeak => 40,
            Self::CpuHog | Self::LockPileup => 12,
            Self::DiskFull | Self::PgDiskFull => 18,
            Self::DiskCreep | Self::ConnectionCreep => 36,
            Self::Overload | Self::DependencyDown | Self::SlowDisk | Self::PacketLoss => 22,
        })
    }

    /// About how long a step of it takes with its pauses, for the plan; the slowest healer counts.
    pub(super) fn about(self) -> Duration {
        Duration::from_secs(match self {
            Self::Kill9 | Self::RedisKill9 | Self::PgKill9 => 13,
            Self::Hang | Self::RedisHang => 18,
            Self::MemoryLeak => 32,
            Self::CpuHog | Self::DependencyDown => 19,
            Self::SlowDisk | Self::PacketLoss => 16,
            Self::DiskFull => 25,
            Self::DiskCreep => 34,
            Self::Overload => 15,
            Self::ConnectionExhaustion | Self::LockPileup => 22,
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
        let others = match self {
            Self::SlowDisk => Some(&machine.slow_disk),
            Self::PacketLoss => Some(&machine.packet_loss),
            _ => None,
        };
        if self.lane() == Lane::Redis && machine.redis.is_none() {
            return Some("`redis-server` is not on PATH; it is a Debian package".to_owned());
        }
        if let Some(Err(why)) = others {
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
    /// The server's program.
    pub(super) redis: Option<PathBuf>,
    /// Whether a disk can be made slow, and why not.
    pub(super) slow_disk: Result<(), String>,
    /// Whether packets can be dropped, and why not.
    pub(super) packet_loss: Result<(), String>,
}

impl Machine {
    /// Looks.
    pub(super) fn here() -> Self {
        let root = rustix::process::geteuid().is_root();
        let switch = !root || is_on_path("setpriv");
        let postgres = PgBinaries::find_here().map_err(|error| error.to_string());
        let as_root = |possible: fn() -> Result<(), String>| {
            if root {
                possible()
            } else {
                Err("it needs root".to_owned())
            }
        };
        Self {
            redis: path_of("redis-server"),
            slow_disk: as_root(disk::is_possible),
            packet_loss: as_root(loss::is_possible),
            root: root && is_on_path("mount") && is_on_path("umount"),
            postgres: if switch {
                postgres
            } else {
                Err("`setpriv` is not on PATH, and PostgreSQL does not run as root".to_owned())
            },
        }
    }
}

pub(super) fn is_on_path(program: &str) -> bool {
    path_of(program).is_some()
}

/// Where a program is. Links are kept: Debian's `redis-server` goes by the name that it is called by.
pub(super) fn path_of(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}
