//! What one healer looks after: a service with its folder, its file system and its addresses. Each healer has one of every lane.

use std::ffi::OsString;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use theriac_edge::probe::{Probe, ProbeUrl, RedisProbe};
use theriac_heal::checkpoint::redis::Address;
use theriac_heal::postgres::binaries::PgBinaries;
use theriac_heal::postgres::owner::Owner;
use theriac_heal::postgres::session::Target;

use super::Healer;
use super::fault::{Lane, Machine};
use super::{disk, redis};
use crate::fleet::free_addresses;

/// Size of the file systems in memory, where there are any.
const HTTP_DISK: u64 = 128 << 20;
const POSTGRES_DISK: u64 = 384 << 20;
const REDIS_DISK: u64 = 64 << 20;
/// Memory at which the HTTP service is refused more.
pub(super) const MEMORY_MAX_MIB: u64 = 256;
/// Slots of the server, and those that it keeps back.
pub(super) const SLOTS: usize = 60;

/// A service that is looked after.
#[derive(Debug, Clone)]
pub(super) struct Ward {
    pub(super) lane: Lane,
    /// Everything of it lies in here.
    pub(super) dir: PathBuf,
    /// Its file system.
    pub(super) disk: PathBuf,
    /// The lab itself.
    pub(super) program: PathBuf,
    /// Page of the edge that looks after it.
    pub(super) page: SocketAddr,
    /// Where the HTTP service or the Redis server serves, and where the first takes faults.
    pub(super) service: SocketAddr,
    pub(super) control: SocketAddr,
    /// Where the one that it asks serves.
    pub(super) upstream: SocketAddr,
    /// Where its edge's proxy stands before the HTTP service, where it has one.
    pub(super) front: Option<SocketAddr>,
    /// The server's.
    pub(super) postgres: Option<Postgres>,
    /// The Redis server's program.
    pub(super) redis: PathBuf,
}

/// A server's programs, account and socket.
#[derive(Debug, Clone)]
pub(super) struct Postgres {
    pub(super) binaries: PgBinaries,
    pub(super) owner: Owner,
    /// As its superuser.
    pub(super) target: Target,
}

impl Ward {
    /// Makes folder, file system and, for a server, its data.
    pub(super) fn make(
        root: &Path,
        lane: Lane,
        healer: Healer,
        program: &Path,
        machine: &Machine,
    ) -> io::Result<Self> {
        // The name of a Unix socket has to fit into 108 bytes.
        let short = match lane {
            Lane::Http => "http",
            Lane::Postgres => "pg",
            Lane::Redis => "redis",
        };
        let name = format!("{short}-{}", healer.name());
        let dir = root.join(name);
        std::fs::create_dir(&dir)?;
        // The server's account has to come through.
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o755))?;
        let disk = dir.join("disk");
        std::fs::create_dir(&disk)?;
        match lane {
            _ if !machine.root => {}
            Lane::Http => disk::mount_memory(&disk, HTTP_DISK)?,
            Lane::Redis => disk::mount_memory(&disk, REDIS_DISK)?,
            // Alike for all of its faults.
            Lane::Postgres if machine.slow_disk.is_ok() => {
                disk::mount_loop(&dir.join("below"), &disk, POSTGRES_DISK)?;
            }
            Lane::Postgres => disk::mount_memory(&disk, POSTGRES_DISK)?,
        }
        let addresses = free_addresses(5)?;
        let mut ward = Self {
            lane,
            disk,
            program: program.to_owned(),
            page: addresses[0],
            service: addresses[1],
            control: addresses[2],
            upstream: addresses[3],
            front: (lane == Lane::Http && healer.has_proxy()).then_some(addresses[4]),
            postgres: None,
            redis: machine.redis.clone().unwrap_or_default(),
            dir,
        };
        std::fs::create_dir(ward.cache())?;
        std::fs::create_dir(ward.quarantine())?;
        match lane {
            Lane::Http => {
                std::fs::create_dir(ward.state())?;
                std::fs::create_dir(ward.upstream_state())?;
            }
            Lane::Redis => std::fs::create_dir(ward.state())?,
            Lane::Postgres => {
                let binaries = machine.postgres.clone().map_err(io::Error::other)?;
                ward.postgres = Some(make_server(&ward, binaries)?);
            }
        }
        Ok(ward)
    }

    /// The campaign's folder.
    pub(super) fn root(&self) -> &Path {
        self.dir.parent().unwrap_or(&self.dir)
    }

    /// Where clients connect, where they do over TCP.
    pub(super) fn address(&self) -> SocketAddr {
        self.front.unwrap_or(self.service)
    }

    /// Where the Redis server writes its number down.
    pub(super) fn pid_file(&self) -> PathBuf {
        self.dir.join("redis.pid")
    }

    /// The service's state directory: also what tells its process from any other.
    pub(super) fn state(&self) -> PathBuf {
        self.disk.join("state")
    }

    /// The state of the service that it asks.
    pub(super) fn upstream_state(&self) -> PathBuf {
        self.dir.join("upstream")
    }

    /// Files that can be made again, on the service's file system.
    pub(super) fn cache(&self) -> PathBuf {
        self.disk.join("cache")
    }

    /// Where they may be moved to.
    pub(super) fn quarantine(&self) -> PathBuf {
        self.dir.join("quarantine")
    }

    /// Its words. An `attached` one ends with whoever started it.
    pub(super) fn argv(&self, attached: bool) -> Vec<String> {
        if let Some(server) = &self.postgres {
            return vec![
                text(&server.binaries.tool("postgres")),
                "-D".to_owned(),
                text(&self.state()),
            ];
        }
        if self.lane == Lane::Redis {
            return redis::argv(&self.redis, self.service, &self.state(), &self.pid_file());
        }
        let command = if attached { "__service" } else { "service" };
        [
            text(&self.program),
            command.to_owned(),
            "--listen".to_owned(),
            self.service.to_string(),
            "--control".to_owned(),
            self.control.to_string(),
            "--state".to_owned(),
            text(&self.state()),
            "--upstream".to_owned(),
            self.upstream.to_string(),
            "--memory-max-mib".to_owned(),
            MEMORY_MAX_MIB.to_string(),
        ]
        .to_vec()
    }

    /// The same, become the account that it runs as.
    pub(super) fn argv_as_owner(&self) -> Vec<String> {
        let argv = self.argv(true);
        match self.postgres.as_ref().map(|server| server.owner) {
            Some(owner) if owner.is_other() => [
                "setpriv".to_owned(),
                format!("--reuid={}", owner.uid),
                format!("--regid={}", owner.gid),
                "--clear-groups".to_owned(),
                "--".to_owned(),
            ]
            .into_iter()
            .chain(argv)
            .collect(),
            _ => argv,
        }
    }

    /// Words of the service that it asks.
    pub(super) fn upstream_argv(&self) -> Vec<String> {
        [
            text(&self.program),
            "__service".to_owned(),
            "--listen".to_owned(),
            self.upstream.to_string(),
            "--state".to_owned(),
            text(&self.upstream_state()),
        ]
        .to_vec()
    }

    /// What a healer asks.
    pub(super) fn probe(&self) -> Probe {
        match self.app() {
            Some(target) => Probe::Postgres(target),
            None if self.lane == Lane::Redis => Probe::Redis(RedisProbe {
                address: Address::Tcp(self.service.to_string()),
                password_file: None,
            }),
            None => Probe::Http(ProbeUrl::new(self.service, "/healthz")),
        }
    }

    /// The same as it is written in a configuration.
    pub(super) fn probe_url(&self) -> String {
        match self.app() {
            Some(target) => format!(
                "postgresql://{}@{}:{}/{}",
                target.user,
                target.socket_dir.display(),
                target.port,
                target.database
            ),
            None if self.lane == Lane::Redis => format!("redis://{}", self.service),
            None => format!("http://{}/healthz", self.service),
        }
    }

    /// The server as an ordinary client sees it.
    pub(super) fn app(&self) -> Option<Target> {
        self.postgres.as_ref().map(|server| Target {
            user: "app".to_owned(),
            ..server.target.clone()
        })
    }

    /// The main process of the service, as found from outside. Its number alone is not believed.
    pub(super) fn pid(&self) -> Option<u32> {
        match self.lane {
            Lane::Http => process_of(&self.program, &self.state()),
            Lane::Postgres | Lane::Redis => {
                let file = match self.lane {
                    Lane::Redis => self.pid_file(),
                    _ => self.state().join("postmaster.pid"),
                };
                let written = std::fs::read_to_string(file).ok()?;
                let pid = written.lines().next()?.trim().parse().ok()?;
                self.is_its(pid).then_some(pid)
            }
        }
    }

    /// The process of the service that it asks.
    pub(super) fn upstream_pid(&self) -> Option<u32> {
        process_of(&self.program, &self.upstream_state())
    }

    /// Whether that process is still the service's.
    pub(super) fn is_its(&self, pid: u32) -> bool {
        names(pid, &self.state())
    }
}

/// Whether a process has `path` among its words.
pub(super) fn names(pid: u32, path: &Path) -> bool {
    i32::try_from(pid)
        .ok()
        .and_then(|pid| procfs::process::Process::new(pid).ok())
        .and_then(|process| process.cmdline().ok())
        .is_some_and(|words| words.iter().any(|word| Path::new(word) == path))
}

/// The process of `program` that has `path` among its words.
fn process_of(program: &Path, path: &Path) -> Option<u32> {
    let found = procfs::process::all_processes().ok()?.filter_map(Result::ok);
    let mut ours = found.filter(|process| {
        process.cmdline().is_ok_and(|words| {
            // A check of the state names it too.
            words.iter().any(|word| Path::new(word) == path) && words.iter().all(|word| word != "check")
        }) && process.exe().is_ok_and(|exe| exe == program)
    });
    u32::try_from(ours.next()?.pid()).ok()
}

/// A cluster with the tables of the load, on a Unix socket in the ward's folder.
fn make_server(ward: &Ward, binaries: PgBinaries) -> io::Result<Postgres> {
    let owner = account()?;
    let take = |path: &Path| owner.take(path).map_err(io::Error::other);
    take(&ward.disk)?;
    let socket_dir = ward.dir.join("s");
    std::fs::create_dir(&socket_dir)?;
    take(&socket_dir)?;
    let data = ward.state();
    let mut initdb = as_owner(owner, &binaries.tool("initdb"));
    initdb.args([
        "-N",
        "-A",
        "trust",
        "-U",
        "postgres",
        "-E",
        "UTF8",
        "--locale=C",
        "--wal-segsize=1",
        "-D",
    ]);
    finish(initdb.arg(&data).stdin(Stdio::null()), "initdb")?;
    let conf = data.join("postgresql.conf");
    let before = std::fs::read_to_string(&conf)?;
    let ours = format!(
        "listen_addresses = ''\nunix_socket_directories = '{}'\nport = 5432\nmax_connections = {SLOTS}\n\
         superuser_reserved_connections = 3\nshared_buffers = 16MB\nmin_wal_size = 8MB\nmax_wal_size = 48MB\n\
         log_line_prefix = ''\n",
        socket_dir.display()
    );
    std::fs::write(&conf, before + &ours)?;
    let mut single = as_owner(owner, &binaries.tool("postgres"));
    single.args(["--single", "-D"]).arg(&data).arg("postgres");
    let schema = ward.dir.join("schema.sql");
    std::fs::write(&schema, SCHEMA)?;
    finish(single.stdin(std::fs::File::open(&schema)?), "postgres --single")?;
    Ok(Postgres {
        binaries,
        owner,
        target: Target {
            socket_dir,
            port: 5432,
            user: "postgres".to_owned(),
            database: "postgres".to_owned(),
        },
    })
}

/// Each line is one statement.
const SCHEMA: &str = "create role app login\n\
    create table hot (id int primary key, n bigint)\n\
    insert into hot values (1, 0)\n\
    create table ledger (run bigint, n bigint, pad text)\n\
    grant all on hot, ledger to app\n";

/// This account, or `postgres` (else `nobody`) where this one is root, as whom no server runs.
fn account() -> io::Result<Owner> {
    use rustix::process::{getegid, geteuid};
    if !geteuid().is_root() {
        return Ok(Owner {
            uid: geteuid().as_raw(),
            gid: getegid().as_raw(),
        });
    }
    let accounts = std::fs::read_to_string("/etc/passwd")?;
    ["postgres", "nobody"]
        .into_iter()
        .find_map(|wanted| {
            let line = accounts
                .lines()
                .find(|line| line.split(':').next() == Some(wanted))?;
            let mut fields = line.split(':').skip(2).map(str::parse);
            Some(Owner {
                uid: fields.next()?.ok()?,
                gid: fields.next()?.ok()?,
            })
        })
        .ok_or_else(|| io::Error::other("no account `postgres` or `nobody` to run a server as"))
}

fn as_owner(owner: Owner, program: &Path) -> Command {
    use std::os::unix::process::CommandExt as _;
    let mut command = Command::new(program);
    if owner.is_other() {
        command.uid(owner.uid).gid(owner.gid);
    }
    command.current_dir("/").env_clear();
    command
}

fn finish(command: &mut Command, what: &str) -> io::Result<()> {
    let out = command.output()?;
    if out.status.success() {
        return Ok(());
    }
    let said: OsString = String::from_utf8_lossy(&out.stderr).into_owned().into();
    Err(io::Error::other(format!("{what} failed: {}", said.display())))
}

/// Bytes that are free on the file system at `path`, and all of them.
pub(super) fn room(path: &Path) -> io::Result<(u64, u64)> {
    let of = rustix::fs::statvfs(path)?;
    Ok((of.f_bavail * of.f_frsize, of.f_blocks * of.f_frsize))
}

/// Empties a folder; what cannot be removed stays.
pub(super) fn clear(dir: &Path) {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return;
    };
    for entry in entries.filter_map(Result::ok) {
        let path = entry.path();
        let removed = if entry
            .metadata()
            .is_ok_and(|found| found.mode() & 0o170_000 == 0o040_000)
        {
            std::fs::remove_dir_all(&path)
        } else {
            std::fs::remove_file(&path)
        };
        if let Err(error) = removed {
            tracing::debug!(%error, path = %path.display(), "stays");
        }
    }
}

pub(super) fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
