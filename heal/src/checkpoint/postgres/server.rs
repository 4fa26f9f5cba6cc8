//! The second server: kept from the primary, small, and gone afterwards.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Child;
use tokio::time::sleep;

use super::PostgresSource;
use crate::checkpoint::apart::{SocketDir, spawn_apart};
use crate::checkpoint::limits::Limits;
use crate::checkpoint::verdict::{Check, Finding, ShadowRun};
use crate::checkpoint::work::{self, Log};
use crate::executor::process::clear_directory;
use crate::folder::Folder;
use crate::postgres::owner::Owner;
use crate::postgres::session::{Session, Target};
use crate::postgres::tool::{Tool, command};
use crate::postgres::{PostgresError, at};

/// A running shadow. Dropped, it is killed.
#[derive(Debug)]
pub(super) struct Shadow {
    pub(super) target: Target,
    pub(super) owner: Owner,
    /// Whether nothing outside can be reached from it.
    pub(super) apart: bool,
    child: Child,
    data: PathBuf,
    log: Log,
    checksums: bool,
    // Removed with it.
    _socket_dir: SocketDir,
    _group: Option<Limits>,
}

impl Shadow {
    /// Prepares the work directory, starts the server and waits until recovery is over. `None` when the run is over already; why is
    /// among its checks.
    pub(super) async fn start(
        source: &PostgresSource,
        owner: Owner,
        superuser: &str,
        run: &mut ShadowRun,
    ) -> Option<Self> {
        let begun = Instant::now();
        let opened = work::open(&source.work_dir)
            .and_then(|work| work.enter(Path::new(work::DATA)).map(|data| (work, data)));
        let (work, data) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                let words = format!("{}: {error}", source.data().display());
                run.push(Check::new("version", Finding::Unknown(words)), begun);
                return None;
            }
        };
        let control = match version_and_control(source, owner, &data).await {
            Ok(control) => {
                run.push(Check::new("version", Finding::Pass), begun);
                control
            }
            Err(finding) => {
                run.push(Check::new("version", finding), begun);
                return None;
            }
        };
        let begun = Instant::now();
        match Self::launch(source, owner, superuser, (&work, &data), &control, run).await {
            Ok(mut shadow) => {
                let finding = shadow.recovered(begun, source.shadow.timeout).await;
                let passed = finding == Finding::Pass;
                run.push(Check::new("recovery", finding), begun);
                if passed {
                    return Some(shadow);
                }
                shadow.end(Signal::QUIT).await;
            }
            Err(error) => run.push(Check::new("recovery", Finding::Unknown(error.to_string())), begun),
        }
        None
    }

    async fn launch(
        source: &PostgresSource,
        owner: Owner,
        superuser: &str,
        (work, data): (&Folder, &Folder),
        control: &Control,
        run: &mut ShadowRun,
    ) -> Result<Self, PostgresError> {
        cut_off(data, owner)?;
        let socket_dir = SocketDir::make(work, owner, SOCKET_DIR_MAX)?;
        let conf = configure(source, work, owner, control, socket_dir.path())?;
        let (log, [out, err]) = Log::make(work).map_err(at(work.path()))?;
        let data = data.path();
        let program = source.binaries.tool("postgres");
        let mut start = command(&program, Some(owner));
        start
            .arg("-D")
            .arg(data)
            .arg("-c")
            .arg(format!("config_file={}", conf.display()))
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err);
        let (spawned, isolation) = spawn_apart(start, Some(source.target.socket())).await;
        let child = spawned.map_err(|error| PostgresError::Spawn {
            program,
            source: error,
        })?;
        source.background.put(child.id());
        let group = Limits::put(
            child.id(),
            source.shadow.memory_bytes,
            source.shadow.cpu_cores,
            &source.background,
        );
        run.isolation = isolation.words;
        run.limits = group.as_ref().map_or_else(
            || "the server's settings and its priority".to_owned(),
            Limits::words,
        );
        let target = Target {
            socket_dir: socket_dir.path().to_owned(),
            port: PORT,
            user: superuser.to_owned(),
            database: source.target.database.clone(),
        };
        Ok(Self {
            target,
            owner,
            apart: isolation.apart,
            child,
            data: data.to_owned(),
            log,
            checksums: control.checksums,
            _socket_dir: socket_dir,
            _group: group,
        })
    }

    /// Waits until the server lets sessions in.
    async fn recovered(&mut self, begun: Instant, limit: Duration) -> Finding {
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                return self.did_not_start(&status.to_string());
            }
            let asked = Session::open(&self.target, Some(self.owner), ASK_MAX).await;
            let detail = match asked {
                Ok(_session) => return Finding::Pass,
                // Starting up, or shutting down: the exit above tells which. Without code: the socket is not there yet.
                Err(PostgresError::Connect { code, detail, .. })
                    if code.as_deref().is_none_or(|code| code == "57P03") =>
                {
                    detail
                }
                Err(PostgresError::Connect {
                    code: Some(code),
                    detail,
                    ..
                }) if !code.starts_with("XX") && !code.starts_with("57") => {
                    return Finding::Unknown(format!("no session with the shadow: {detail}"));
                }
                // Recovery is over and the first session meets something broken.
                Err(PostgresError::Connect { detail, .. }) => return Finding::Invalid(detail),
                Err(error) => error.to_string(),
            };
            if begun.elapsed() >= limit {
                return Finding::Unknown(format!("not up after {limit:?}: {detail}"));
            }
            sleep(ASK_EVERY).await;
        }
    }

    fn did_not_start(&self, status: &str) -> Finding {
        let log = self.log.text();
        let said: Vec<&str> = log
            .lines()
            .filter(|line| {
                ["FATAL", "PANIC", "ERROR"]
                    .iter()
                    .any(|level| line.contains(level))
            })
            .collect();
        let start = said.len().saturating_sub(4);
        let words = format!("the server ended with {status}: {}", said[start..].join(" | "));
        // What this host lacks says nothing of the copy.
        if HOST_LACKS.iter().any(|lack| log.contains(lack)) {
            Finding::Unknown(words)
        } else {
            Finding::Invalid(words)
        }
    }

    /// What the server last said of a crash.
    pub(super) fn log_tail(&self) -> String {
        let log = self.log.text();
        let lines: Vec<&str> = log
            .lines()
            .filter(|line| line.contains("PANIC") || line.contains("terminated by signal"))
            .collect();
        lines.last().map_or_else(String::new, |line| (*line).to_owned())
    }

    /// Ends it politely and, where the cluster has page checksums, reads every page of every file once more.
    pub(super) async fn stop(mut self, source: &PostgresSource, run: &mut ShadowRun) {
        let begun = Instant::now();
        let polite = self.checksums && run.finding() == Finding::Pass;
        let signal = if polite { Signal::INT } else { Signal::QUIT };
        let clean = self.end(signal).await;
        if !polite {
            return;
        }
        let tool = Tool {
            program: source.binaries.tool("pg_checksums"),
            arguments: vec!["--check".into(), "--pgdata".into(), (&self.data).into()],
            owner: Some(self.owner),
            background: Some(source.background.clone()),
            timeout: source.shadow.timeout,
        };
        let finding = match (clean, tool.run().await) {
            (true, Ok(ended)) if ended.code == Some(0) => Finding::Pass,
            (true, Ok(ended)) => Finding::Invalid(ended.said),
            (false, _) => Finding::Unknown("the shadow did not stop in time".to_owned()),
            (true, Err(error)) => Finding::Unknown(error.to_string()),
        };
        run.push(Check::new("page checksums", finding), begun);
    }

    /// Signals the server and waits; kills what is left. Whether it ended by itself.
    async fn end(&mut self, signal: Signal) -> bool {
        if let Some(pid) = self.child.id().and_then(|id| Pid::from_raw(id.cast_signed()))
            // Not reaped yet, so the number still means it.
            && let Err(error) = kill_process(pid, signal)
        {
            tracing::debug!(%error, "shadow not signalled");
        }
        let ended = tokio::time::timeout(STOP_MAX, self.child.wait()).await.is_ok();
        if !ended && let Err(error) = self.child.kill().await {
            tracing::warn!(%error, "shadow not killed");
        }
        clear_directory(&self.data, None, STOP_MAX).await;
        ended
    }
}

/// What the control file says.
#[derive(Debug)]
struct Control {
    checksums: bool,
    max_prepared: u32,
    max_locks: u32,
}

async fn version_and_control(
    source: &PostgresSource,
    owner: Owner,
    data: &Folder,
) -> Result<Control, Finding> {
    let mut found = String::new();
    data.file("PG_VERSION")
        .and_then(|file| file.take(VERSION_BYTES_MAX).read_to_string(&mut found))
        .map_err(|error| Finding::Invalid(format!("PG_VERSION cannot be read: {error}")))?;
    let (found, ours) = (found.trim(), source.binaries.major());
    if found.parse() != Ok(ours) {
        return Err(Finding::Invalid(format!(
            "the copy says version `{}`, the server's programs are {ours}",
            found.chars().take(16).collect::<String>()
        )));
    }
    let tool = Tool {
        program: source.binaries.tool("pg_controldata"),
        arguments: vec![data.path().into()],
        owner: Some(owner),
        background: None,
        timeout: Duration::from_secs(30),
    };
    let said = match tool.run().await {
        Ok(ended) if ended.code == Some(0) && !ended.said.contains("WARNING") => ended.said,
        Ok(ended) => {
            let line = ended.said.lines().next().unwrap_or_default();
            return Err(Finding::Invalid(format!("the control file is not good: {line}")));
        }
        Err(error) => return Err(Finding::Unknown(error.to_string())),
    };
    let value = |key: &str| {
        said.lines()
            .find_map(|line| line.strip_prefix(key)?.trim().parse::<u32>().ok())
    };
    Ok(Control {
        checksums: value("Data page checksum version:").unwrap_or(0) > 0,
        max_prepared: value("max_prepared_xacts setting:").unwrap_or(0),
        max_locks: value("max_locks_per_xact setting:").unwrap_or(64),
    })
}

/// Takes out of the copy what could lead it to the primary: settings made by `ALTER SYSTEM` (connection strings, credentials, archive
/// and restore commands), the signs that make it a standby, and slots.
fn cut_off(data: &Folder, owner: Owner) -> Result<(), PostgresError> {
    for name in [
        "standby.signal",
        "recovery.signal",
        "postmaster.pid",
        "postmaster.opts",
    ] {
        data.remove(name).map_err(at(&data.path_of(name)))?;
    }
    // A file of our own in its place: what bears the name may be a link, or another file's second name.
    let auto = "postgresql.auto.conf";
    if data.remove(auto).map_err(at(&data.path_of(auto)))? {
        let file = data.create(auto).map_err(at(&data.path_of(auto)))?;
        owner.take_file(&file, &data.path_of(auto))?;
    }
    let slots = "pg_replslot";
    match data.enter(Path::new(slots)).and_then(|slots| slots.clear()) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        cleared => cleared.map_err(at(&data.path_of(slots))),
    }
}

/// Settings of the shadow's own: none of the primary's files is read.
fn configure(
    source: &PostgresSource,
    work: &Folder,
    owner: Owner,
    control: &Control,
    socket_dir: &Path,
) -> Result<PathBuf, PostgresError> {
    let made = work.make("conf").map_err(at(&work.path_of("conf")))?;
    let dir = made.path();
    let quoted = |text: &str| format!("'{}'", text.replace('\'', "''"));
    let path = |path: &Path| quoted(&path.display().to_string());
    let (hba, ident) = (dir.join(HBA), dir.join(IDENT));
    let own = [
        ("hba_file", path(&hba)),
        ("ident_file", path(&ident)),
        ("unix_socket_directories", path(socket_dir)),
        ("port", PORT.to_string()),
        ("shared_preload_libraries", quoted(&source.shadow.preload)),
        ("max_prepared_transactions", control.max_prepared.to_string()),
        ("max_locks_per_transaction", control.max_locks.to_string()),
    ]
    .map(|(key, value)| format!("{key} = {value}\n"));
    let conf = String::from(SETTINGS) + &own.concat();
    // The socket's folder lets in its owner and root alone.
    for (name, text) in [(MAIN, conf.as_str()), (HBA, "local all all trust\n"), (IDENT, "")] {
        let path = dir.join(name);
        let mut file = made.create(name).map_err(at(&path))?;
        file.write_all(text.as_bytes()).map_err(at(&path))?;
        owner.take_file(&file, &path)?;
    }
    // Last: until then nobody else can put anything into it.
    owner.take_open(&made)?;
    Ok(dir.join(MAIN))
}

const SETTINGS: &str = "\
listen_addresses = ''
unix_socket_permissions = 0700
max_connections = 16
shared_buffers = 64MB
work_mem = 8MB
maintenance_work_mem = 64MB
max_parallel_workers_per_gather = 0
max_parallel_maintenance_workers = 0
max_wal_senders = 0
max_replication_slots = 0
max_logical_replication_workers = 0
archive_mode = off
archive_command = ''
restore_command = ''
primary_conninfo = ''
primary_slot_name = ''
synchronous_standby_names = ''
ssl = off
autovacuum = off
fsync = off
full_page_writes = off
synchronous_commit = off
jit = off
logging_collector = off
log_destination = stderr
log_statement = none
log_min_error_statement = panic
session_preload_libraries = ''
local_preload_libraries = ''
zero_damaged_pages = off
ignore_checksum_failure = off
ignore_invalid_pages = off
restart_after_crash = off
";
const MAIN: &str = "postgresql.conf";
const HBA: &str = "pg_hba.conf";
const IDENT: &str = "pg_ident.conf";
/// Far more than the number in it.
const VERSION_BYTES_MAX: u64 = 64;
const PORT: u16 = 5432;
/// A socket's name has at most 107 bytes; ours adds `/.s.PGSQL.5432.lock`.
const SOCKET_DIR_MAX: usize = 85;
const ASK_EVERY: Duration = Duration::from_millis(20);
const ASK_MAX: Duration = Duration::from_mins(1);
const STOP_MAX: Duration = Duration::from_secs(30);
/// Words of the server's log that speak of this host and not of the copy.
const HOST_LACKS: [&str; 6] = [
    "could not map anonymous shared memory",
    "could not create shared memory segment",
    "No space left on device",
    "could not create lock file",
    "could not bind Unix",
    "could not access file \"",
];
