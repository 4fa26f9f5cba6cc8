//! A supervised child in its own process group: started once, ended wholly, never lost sight of.
//!
//! The child outlives us on purpose: a service must not go down because its healer did. A record file and a variable in the
//! child's environment let a later run of ours find it again ([`Supervisor::take_over`]). Signals go through process file
//! descriptors after the identity was checked, so a reused process id is never hit. A process that leaves the group by
//! `setsid` or `setpgid` is out of reach.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::future::pending;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};
use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::group::{Group, Member};
use super::{listening, orphans, output};
use crate::incident::ProcessState;
use crate::postgres::owner::Owner;

/// What to run and how to stop it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceSpec {
    /// Its name, for records.
    pub name: String,
    /// Program and arguments; no shell takes part. The program should be an absolute path.
    pub argv: Vec<String>,
    /// Variables added to the inherited environment, from which the healer's own are taken out.
    pub env: BTreeMap<String, String>,
    /// Working directory; `None` inherits.
    pub cwd: Option<PathBuf>,
    /// Where its standard output and error go.
    pub output: OutputTo,
    /// Time from TERM to KILL.
    pub stop_grace: Duration,
    /// Time from KILL until every process of the group must be gone.
    pub kill_wait: Duration,
    /// Least time between two starts.
    pub start_spacing: Duration,
    /// The account to run it as; `None` is ours.
    pub run_as: Option<Owner>,
    /// The polite signal.
    pub polite: Polite,
    /// The data directory of a PostgreSQL server. Its processes leave the group, and the next start fails beside them: those of our own dead
    /// server are killed before it. While a server that we did not start runs there, nothing is started and nothing is ended.
    pub works_in: Option<PathBuf>,
    /// The port of this host that it answers on, so that [`Supervisor::strangers`] can tell who had it before.
    pub listens_on: Option<u16>,
}

/// How a service is asked to end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Polite {
    /// SIGTERM.
    #[default]
    Terminate,
    /// SIGINT: PostgreSQL's fast shutdown. At SIGTERM it would wait until its last client has gone.
    Interrupt,
}

impl ServiceSpec {
    /// A specification with the defaults: output discarded, 5 s grace, 10 s to be gone, starts 200 ms apart.
    pub fn new(name: impl Into<String>, argv: Vec<String>) -> Self {
        Self {
            name: name.into(),
            argv,
            env: BTreeMap::new(),
            cwd: None,
            output: OutputTo::Null,
            stop_grace: Duration::from_secs(5),
            kill_wait: Duration::from_secs(10),
            start_spacing: Duration::from_millis(200),
            run_as: None,
            polite: Polite::Terminate,
            works_in: None,
            listens_on: None,
        }
    }
}

/// Where a child's standard output and error go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutputTo {
    /// Nowhere.
    Null,
    /// Where ours goes.
    Inherit,
    /// Appended to a file; past `bytes_max` the content moves to `PATH.old` and the file begins anew.
    File {
        /// The file.
        path: PathBuf,
        /// Its bound in bytes.
        bytes_max: u64,
    },
}

/// How a service ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServiceExit {
    /// It returned.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
    /// It was adopted from an earlier run of ours, so its status went elsewhere.
    Unknown,
}

/// What was found of an earlier run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leftover {
    /// Nothing.
    None,
    /// The earlier child still runs and is supervised again.
    Adopted {
        /// Its process.
        pid: u32,
    },
    /// The earlier child was gone; so many processes of its group were ended.
    Cleared {
        /// How many.
        processes: usize,
    },
}

/// How a stop went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stopped {
    /// How the main process ended; `None` when it was not running.
    pub exit: Option<ServiceExit>,
    /// Whether KILL was needed.
    pub killed: bool,
    /// How long it took until the group was gone.
    pub took: Duration,
}

/// Why a process could not be started or stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// The argument vector is empty.
    #[error("service {service}: argv is empty; name a program")]
    NoProgram {
        /// The service.
        service: String,
    },
    /// It runs already.
    #[error("service {service} already runs as process {pid}; stop it first")]
    Running {
        /// The service.
        service: String,
        /// Its process.
        pid: u32,
    },
    /// Another server has its data directory.
    #[error(
        "another server, process {pid}, which this edge did not start, runs on {}; nothing is started while it does: stop it, or leave the service to it",
        dir.display()
    )]
    Occupied {
        /// The service.
        service: String,
        /// That server.
        pid: u32,
        /// The data directory.
        dir: PathBuf,
    },
    /// Processes of the group did not go away.
    #[error(
        "service {service}: processes {pids:?} are still there {waited:?} after KILL; look at them (state D waits for the disk)"
    )]
    NotGone {
        /// The service.
        service: String,
        /// The processes.
        pids: Vec<u32>,
        /// How long was waited.
        waited: Duration,
    },
    /// The program could not be run.
    #[error("service {service}: cannot run {program}: {source}")]
    Spawn {
        /// The service.
        service: String,
        /// The program.
        program: String,
        /// The system's word.
        source: std::io::Error,
    },
    /// A file of the supervisor could not be read or written.
    #[error("service {service}: {path}: {source}")]
    Io {
        /// The service.
        service: String,
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
}

/// Runs one service. One task owns it; everything in it is bounded.
#[derive(Debug)]
pub struct Supervisor {
    spec: ServiceSpec,
    record: PathBuf,
    running: Option<Running>,
    /// The group of the last child, until it is known to be gone.
    group: Option<Group>,
    /// The server of that group on its data directory, as its lock file named it, with the name of its program: another process than the
    /// leader where a wrapper runs it.
    server: Option<(Member, Option<OsString>)>,
    started_for: Option<u64>,
    starts: u64,
    last_start: Option<Instant>,
    /// Sockets that listened on its port before the last start.
    strangers: BTreeSet<u64>,
}

/// The child that runs now.
#[derive(Debug)]
struct Running {
    pid: u32,
    end: End,
}

/// How we learn of its end.
#[derive(Debug)]
enum End {
    /// It is our child.
    Child(Child),
    /// An earlier run of ours started it; a thread waits on its process file descriptor.
    Watched(oneshot::Receiver<()>),
}

/// The record file: what a later run of ours has to know.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    pid: u32,
    /// Start of the process, clock ticks since boot.
    start_ticks: u64,
    session: i32,
    boot: String,
    /// The intent that it was started for.
    intent: Option<u64>,
}

impl Record {
    /// Nothing of ours is process 0 or 1: group 0 is the kernel's, and who else is in no group that can be seen from here.
    fn read(path: &Path) -> Option<Self> {
        let record: Self = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
        (record.pid > 1).then_some(record)
    }

    fn is_of(&self, member: &Member) -> bool {
        member.is_leader() && member.start_ticks == self.start_ticks && member.session == self.session
    }
}

impl Supervisor {
    /// A supervisor of a service that does not run. `record` is the file that names the running child to a later run of ours; its
    /// folder must exist and no other service may use it.
    pub fn new(spec: ServiceSpec, record: PathBuf) -> Self {
        // Relative to a working directory that may change it would not serve as the child's mark.
        let record = std::path::absolute(&record).unwrap_or(record);
        Self {
            spec,
            record,
            running: None,
            group: None,
            server: None,
            started_for: None,
            starts: 0,
            last_start: None,
            strangers: BTreeSet::new(),
        }
    }

    /// Looks for a child of an earlier run: adopts it when it still runs, else ends what is left of its group. What has no proof of being
    /// that run's is left alone.
    ///
    /// # Errors
    /// [`ProcessError::NotGone`] and [`ProcessError::Io`].
    pub async fn take_over(&mut self) -> Result<Leftover, ProcessError> {
        if let Some(running) = &self.running {
            return Ok(Leftover::Adopted { pid: running.pid });
        }
        let record = self.read_record();
        let marked = Member::marked(&self.mark());
        let recorded = record
            .as_ref()
            .filter(|record| record.boot == super::clock::clock_id());
        let of_record = recorded
            .and_then(|record| Member::read(record.pid).filter(|member| record.is_of(member)))
            .filter(|member| !member.is_dead());
        let leader = of_record.or_else(|| self.unrecorded(&marked, recorded.is_some()));
        if let Some(leader) = leader {
            let end = watch(leader.pid).map_err(|source| self.io(format!("/proc/{}", leader.pid), source))?;
            // With the descriptor open the process id cannot come to mean another process.
            if Member::read(leader.pid)
                .is_some_and(|again| again.start_ticks == leader.start_ticks && !again.is_dead())
            {
                self.group = Some(Group {
                    id: leader.group,
                    session: leader.session,
                    leader_start: leader.start_ticks,
                });
                self.started_for = of_record.and_then(|_| recorded?.intent);
                self.running = Some(Running {
                    pid: leader.pid,
                    end: End::Watched(end),
                });
                return Ok(Leftover::Adopted { pid: leader.pid });
            }
        }
        // The recorded one first: what is left of its server is known by the record alone, which stays until all are gone.
        let of_record = recorded.map(|record| Group {
            id: record.pid.cast_signed(),
            session: record.session,
            leader_start: record.start_ticks,
        });
        self.group = of_record;
        let processes = self.end_group().await? + self.end_marked().await?;
        self.forget_record();
        Ok(if processes == 0 {
            Leftover::None
        } else {
            Leftover::Cleared { processes }
        })
    }

    /// The service where no record names it: one of the processes with its mark that runs its program, the oldest. A wrapper may have become another
    /// program; then, where there is no record at all, one that leads a group in a session that is not its own. The mark is inherited by all
    /// that the service ever started, so it alone proves nothing: a helper that left for a session of its own is none of ours.
    fn unrecorded(&self, marked: &[Member], recorded: bool) -> Option<Member> {
        let mut leaders: Vec<&Member> = marked
            .iter()
            .filter(|member| member.is_leader() && !member.is_dead())
            .collect();
        leaders.sort_by_key(|member| member.start_ticks);
        let runs = leaders.iter().find(|member| member.runs(&self.spec.argv));
        let became = || leaders.iter().find(|member| !member.leads_session());
        let found = runs.or_else(|| if recorded { None } else { became() })?;
        let service = &self.spec.name;
        tracing::warn!(%service, pid = found.pid, "no record names it: taken for the service by its mark and its program");
        Some(**found)
    }

    /// KILLs what has the service's mark and is left of a group whose leader is gone. How many there were.
    async fn end_marked(&self) -> Result<usize, ProcessError> {
        let left = || {
            let is_left = |member: &Member| !member.is_dead() && member.is_orphaned();
            let mut marked = Member::marked(&self.mark());
            marked.retain(is_left);
            marked
        };
        let deadline = Instant::now() + self.spec.kill_wait;
        let mut found = BTreeSet::new();
        loop {
            let members = left();
            if members.is_empty() {
                return Ok(found.len());
            }
            if Instant::now() >= deadline {
                return Err(self.not_gone(members.iter().map(|member| member.pid).collect()));
            }
            for member in members {
                member.signal(Signal::KILL, Member::is_orphaned);
                found.insert(member.pid);
            }
            sleep(POLL_EVERY).await;
        }
    }

    /// Starts the service; ends what is left of the former group first and waits for the spacing between starts. Its process id.
    ///
    /// # Errors
    /// [`ProcessError`].
    pub async fn start(&mut self) -> Result<u32, ProcessError> {
        self.start_for(None).await
    }

    /// The same, and remembers the intent that it was done for beyond our own end: see [`Self::started_for`].
    ///
    /// # Errors
    /// [`ProcessError`].
    pub async fn start_for(&mut self, intent: Option<u64>) -> Result<u32, ProcessError> {
        if let Some(running) = &self.running {
            return Err(ProcessError::Running {
                service: self.spec.name.clone(),
                pid: running.pid,
            });
        }
        let Some((program, arguments)) = self.spec.argv.split_first() else {
            return Err(ProcessError::NoProgram {
                service: self.spec.name.clone(),
            });
        };
        let (program, arguments) = (program.clone(), arguments.to_vec());
        self.free_for_a_start()?;
        self.clear_group().await?;
        if let Some(last) = self.last_start {
            sleep_until(last + self.spec.start_spacing).await;
        }
        self.strangers = self
            .spec
            .listens_on
            .map_or_else(BTreeSet::new, listening::listening);
        let (stdout, stderr) = self.outputs()?;
        let mut command = Command::new(&program);
        for (name, _) in std::env::vars_os().filter(|(name, _)| is_ours(name)) {
            command.env_remove(name);
        }
        command
            .args(&arguments)
            .envs(&self.spec.env)
            .env(MARK, self.record.as_os_str())
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr)
            .process_group(0)
            .kill_on_drop(false);
        if let Some(cwd) = &self.spec.cwd {
            command.current_dir(cwd);
        }
        if let Some(owner) = self.spec.run_as.filter(|owner| owner.is_other()) {
            command.gid(owner.gid).uid(owner.uid);
        }
        self.last_start = Some(Instant::now());
        let child = command.spawn().map_err(|source| ProcessError::Spawn {
            service: self.spec.name.clone(),
            program: program.clone(),
            source,
        })?;
        let pid = child.id().unwrap_or_default();
        // The child is not reaped before we wait for it, so its id still means it.
        let member = Member::read(pid);
        let session = member.map_or(0, |member| member.session);
        self.running = Some(Running {
            pid,
            end: End::Child(child),
        });
        self.group = Some(Group {
            id: pid.cast_signed(),
            session,
            leader_start: member.map_or(0, |member| member.start_ticks),
        });
        self.started_for = intent;
        self.starts += 1;
        let record = Record {
            pid,
            start_ticks: member.map_or(0, |member| member.start_ticks),
            session,
            boot: super::clock::clock_id(),
            intent,
        };
        if let Err(error) = self.write_record(&record) {
            // The mark in the environment still finds the child; only the intent would be forgotten.
            tracing::warn!(service = %self.spec.name, %error, "record of the running process not written");
        }
        Ok(pid)
    }

    /// Waits until the service ends; for ever when it does not run. Safe to cancel. Meanwhile keeps the output file within its bound.
    pub async fn exited(&mut self) -> ServiceExit {
        loop {
            self.note_server();
            let Some(running) = &mut self.running else {
                pending().await
            };
            let ended = async {
                match &mut running.end {
                    End::Child(child) => child.wait().await.map_or(ServiceExit::Unknown, ServiceExit::from),
                    End::Watched(end) => {
                        // An error means that the watching thread is gone, which it is only after the end.
                        drop(end.await);
                        ServiceExit::Unknown
                    }
                }
            };
            tokio::select! {
                exit = ended => {
                    self.running = None;
                    return exit;
                }
                () = sleep(OUTPUT_CHECK_EVERY) => {}
            }
            if let OutputTo::File { path, bytes_max } = &self.spec.output
                && let Err(error) = output::keep_bound(path, *bytes_max)
            {
                tracing::warn!(service = %self.spec.name, path = %path.display(), %error, "output file not bounded");
            }
        }
    }

    /// TERM to the group, after the grace KILL, then waits until the child is reaped and its group is gone. A stopped process
    /// (state `T`) gets KILL at once, because TERM would wait for it to continue. Also ends what a dead child left behind.
    ///
    /// # Errors
    /// [`ProcessError::NotGone`].
    pub async fn stop(&mut self) -> Result<Stopped, ProcessError> {
        let begun = Instant::now();
        let mut exit = None;
        let mut killed = false;
        if let (Some(running), Some(group)) = (&self.running, self.group) {
            if process_state(running.pid) != Some(ProcessState::Stopped) {
                group.signal(match self.spec.polite {
                    Polite::Terminate => Signal::TERM,
                    Polite::Interrupt => Signal::INT,
                });
                let deadline = begun + self.spec.stop_grace;
                exit = timeout_at(deadline, self.exited()).await.ok();
                // The rest of the group was asked as well and has the rest of the grace.
                while exit.is_some() && !group.members().is_empty() && Instant::now() < deadline {
                    sleep(POLL_EVERY).await;
                }
            }
            killed = self.running.is_some() || !group.members().is_empty();
        }
        let survivors = self.clear_group().await?;
        if self.running.is_some() {
            let deadline = Instant::now() + self.spec.kill_wait;
            exit = timeout_at(deadline, self.exited()).await.ok();
            if let Some(running) = &self.running {
                return Err(self.not_gone(vec![running.pid]));
            }
            // The group is known until its orphans are gone too: the next start waits for them.
            self.clear_group().await?;
        }
        self.forget_record();
        Ok(Stopped {
            exit,
            killed: killed || survivors > 0,
            took: begun.elapsed(),
        })
    }

    /// The running process.
    pub fn pid(&self) -> Option<u32> {
        self.running.as_ref().map(|running| running.pid)
    }

    /// The intent that the running (or last) process was started for.
    pub fn started_for(&self) -> Option<u64> {
        self.started_for
    }

    /// How often it was started by this supervisor.
    pub fn starts(&self) -> u64 {
        self.starts
    }

    /// Sockets that listened on its port when it was last started by us, see [`listening::listening`]: they are not its own.
    pub fn strangers(&self) -> &BTreeSet<u64> {
        &self.strangers
    }

    /// Whether the service may be started: no server that we did not start has its data directory.
    ///
    /// # Errors
    /// [`ProcessError::Occupied`].
    pub fn free_for_a_start(&self) -> Result<(), ProcessError> {
        let Some(dir) = &self.spec.works_in else {
            return Ok(());
        };
        let ours = |server: &Member| {
            let of_group = self.group.is_some_and(|group| group.holds(server));
            of_group || self.pid() == Some(server.pid)
        };
        match orphans::server_of(dir).filter(|server| !ours(server)) {
            None => Ok(()),
            Some(server) => Err(ProcessError::Occupied {
                service: self.spec.name.clone(),
                pid: server.pid,
                dir: dir.clone(),
            }),
        }
    }

    /// The specification.
    pub fn spec(&self) -> &ServiceSpec {
        &self.spec
    }

    /// KILLs the group until nobody is left, and forgets it. How many processes were there.
    async fn clear_group(&mut self) -> Result<usize, ProcessError> {
        let was_there = self.group.is_some();
        let found = self.end_group().await?;
        if was_there && self.group.is_none() {
            self.forget_record();
        }
        Ok(found)
    }

    /// The same, and keeps the record.
    async fn end_group(&mut self) -> Result<usize, ProcessError> {
        let Some(group) = self.group else { return Ok(0) };
        self.note_server();
        let found = group.members().len();
        let deadline = Instant::now() + self.spec.kill_wait;
        loop {
            // Again each time: a process may have been forked since.
            group.signal(Signal::KILL);
            let left = group.members();
            if left.is_empty() {
                break;
            }
            if Instant::now() >= deadline {
                return Err(self.not_gone(left.iter().map(|member| member.pid).collect()));
            }
            sleep(POLL_EVERY).await;
        }
        if self.running.is_some() {
            return Ok(found);
        }
        let orphans = self.clear_orphans(group, deadline).await?;
        // A server refuses to start while the number in its lock file is a process's, also a dead one's that nobody has waited for yet.
        while self.server.as_ref().is_some_and(|(server, _)| server.is_there()) && Instant::now() < deadline {
            sleep(POLL_EVERY).await;
        }
        (self.group, self.server) = (None, None);
        Ok(found + orphans)
    }

    /// Remembers which process of the group is the server, while that can be seen.
    fn note_server(&mut self) {
        if let (Some(dir), Some(group)) = (&self.spec.works_in, self.group)
            && let Some(server) = orphans::server_of(dir).filter(|server| group.holds(server))
        {
            let exe = std::fs::read_link(format!("/proc/{}/exe", server.pid));
            let program = exe.ok().and_then(|exe| exe.file_name().map(OsStr::to_owned));
            self.server = Some((server, program));
        }
    }

    /// KILLs what our dead server left on its data directory, see [`orphans`].
    async fn clear_orphans(&self, ours: Group, deadline: Instant) -> Result<usize, ProcessError> {
        let Some(dir) = self.spec.works_in.as_deref() else {
            return Ok(0);
        };
        let program = self
            .spec
            .argv
            .first()
            .and_then(|program| Path::new(program).file_name());
        // Of a wrapper neither the number nor the name is the server's.
        let (ours, program) = match &self.server {
            Some((server, runs)) if server.pid.cast_signed() != ours.id => (
                Group {
                    id: server.pid.cast_signed(),
                    session: server.session,
                    leader_start: server.start_ticks,
                },
                runs.as_deref(),
            ),
            _ => (ours, program),
        };
        orphans::clear(ours, dir, program, deadline)
            .await
            .map_err(|left| self.not_gone(left))
    }

    fn not_gone(&self, pids: Vec<u32>) -> ProcessError {
        ProcessError::NotGone {
            service: self.spec.name.clone(),
            pids,
            waited: self.spec.kill_wait,
        }
    }

    fn outputs(&self) -> Result<(Stdio, Stdio), ProcessError> {
        Ok(match &self.spec.output {
            OutputTo::Null => (Stdio::null(), Stdio::null()),
            OutputTo::Inherit => (Stdio::inherit(), Stdio::inherit()),
            OutputTo::File { path, bytes_max } => {
                let open = || {
                    output::keep_bound(path, *bytes_max)?;
                    let file = output::open(path)?;
                    Ok((Stdio::from(file.try_clone()?), Stdio::from(file)))
                };
                open().map_err(|source| self.io(path.clone(), source))?
            }
        })
    }

    fn mark(&self) -> Vec<u8> {
        let mut mark = format!("{MARK}=").into_bytes();
        mark.extend_from_slice(self.record.as_os_str().as_encoded_bytes());
        mark
    }

    /// A record that is absent or unreadable is no error: the mark in the environment finds the child as well.
    fn read_record(&self) -> Option<Record> {
        Record::read(&self.record)
    }

    /// What it named is gone, and its number may come to mean another's process.
    fn forget_record(&self) {
        if let Err(error) = std::fs::remove_file(&self.record)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(service = %self.spec.name, %error, "record of a process that is gone not removed");
        }
    }

    fn write_record(&self, record: &Record) -> Result<(), ProcessError> {
        let write = || {
            let beside = self.record.with_extension("new");
            std::fs::write(&beside, serde_json::to_vec(record)?)?;
            std::fs::rename(&beside, &self.record)
        };
        write().map_err(|source: io::Error| self.io(self.record.clone(), source))
    }

    fn io(&self, path: impl AsRef<Path>, source: io::Error) -> ProcessError {
        ProcessError::Io {
            service: self.spec.name.clone(),
            path: path.as_ref().to_owned(),
            source,
        }
    }
}

/// The processes that work in a directory.
pub fn working_in(dir: &Path) -> Vec<u32> {
    Member::working_in(dir, None)
        .iter()
        .map(|member| member.pid)
        .collect()
}

/// The running process that a supervisor's record file names; `None` when there is none any more.
pub fn recorded_process(record: &Path) -> Option<u32> {
    let record = Record::read(record)?;
    let member = Member::read(record.pid)?;
    (record.boot == super::clock::clock_id() && record.is_of(&member) && !member.is_dead())
        .then_some(record.pid)
}

/// KILLs every process that works in `dir`, which is a copy of ours that nobody else knows of, (and runs `program`), until none is left or
/// `wait` is over. How many there were at first.
pub(crate) async fn clear_directory(dir: &Path, program: Option<&OsStr>, wait: Duration) -> usize {
    match clear_directory_until(dir, program, Instant::now() + wait).await {
        Ok(found) => found,
        Err(left) => {
            tracing::warn!(dir = %dir.display(), pids = ?left, "processes are still there after KILL");
            left.len()
        }
    }
}

/// How many there were at first, or who is still there.
async fn clear_directory_until(
    dir: &Path,
    program: Option<&OsStr>,
    deadline: Instant,
) -> Result<usize, Vec<u32>> {
    let mut found = 0;
    loop {
        let left = Member::working_in(dir, program);
        found = found.max(left.len());
        if left.is_empty() {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            return Err(left.iter().map(|member| member.pid).collect());
        }
        for member in left {
            member.signal(Signal::KILL, |_| true);
        }
        sleep(POLL_EVERY).await;
    }
}

/// A thread that says when a process that is not our child has ended. It lives as long as that process, or as we do.
fn watch(pid: u32) -> io::Result<oneshot::Receiver<()>> {
    let raw = Pid::from_raw(pid.cast_signed()).ok_or(io::ErrorKind::NotFound)?;
    let fd = pidfd_open(raw, PidfdFlags::empty())?;
    let (send, receive) = oneshot::channel();
    std::thread::Builder::new()
        .name(format!("watch-{pid}"))
        .spawn(move || {
            // Readable once the process has ended.
            while poll(&mut [PollFd::new(&fd, PollFlags::IN)], None) == Err(Errno::INTR) {}
            if send.send(()).is_err() {
                tracing::trace!(pid, "nobody waits for this process any more");
            }
        })?;
    Ok(receive)
}

impl From<std::process::ExitStatus> for ServiceExit {
    fn from(status: std::process::ExitStatus) -> Self {
        use std::os::unix::process::ExitStatusExt as _;
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Code(code),
            (None, Some(signal)) => Self::Signal(signal),
            (None, None) => Self::Unknown,
        }
    }
}

impl std::fmt::Display for ServiceExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "it ended with exit code {code}"),
            Self::Signal(signal) => write!(f, "it was killed by signal {signal}"),
            Self::Unknown => f.write_str("it ended; how is not known, because an earlier run had started it"),
        }
    }
}

/// The state of a process, for [`crate::incident::Input::Process`]; `None` when it is gone.
pub fn process_state(pid: u32) -> Option<ProcessState> {
    let member = Member::read(pid)?;
    match member.state {
        'T' | 't' => Some(ProcessState::Stopped),
        _ if member.is_dead() => None,
        _ => Some(ProcessState::Alive),
    }
}

/// Whether a variable is for the healer itself and nothing for a service to know: credentials of the store of copies, its settings, the sockets and
/// the watchdog of the manager that started it.
fn is_ours(name: &OsStr) -> bool {
    const FAMILIES: [&[u8]; 2] = [b"AWS_", b"THERIAC_"];
    // sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3).
    const NAMES: [&str; 7] = [
        "NOTIFY_SOCKET",
        "WATCHDOG_PID",
        "WATCHDOG_USEC",
        "LISTEN_PID",
        "LISTEN_PIDFDID",
        "LISTEN_FDS",
        "LISTEN_FDNAMES",
    ];
    let bytes = name.as_encoded_bytes();
    FAMILIES.iter().any(|family| bytes.starts_with(family)) || NAMES.iter().any(|ours| name == *ours)
}

/// Variable in the child's environment that names its record file.
const MARK: &str = "THERIAC_SUPERVISED_BY";
const POLL_EVERY: Duration = Duration::from_millis(5);
const OUTPUT_CHECK_EVERY: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_process_0_or_1_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record.json");
        for (pid, read) in [(0_u32, false), (1, false), (2, true)] {
            let text = format!(r#"{{"pid":{pid},"start_ticks":0,"session":0,"boot":"here","intent":null}}"#);
            std::fs::write(&path, text).unwrap();
            assert_eq!(Record::read(&path).is_some(), read, "{pid}");
        }
    }
}
