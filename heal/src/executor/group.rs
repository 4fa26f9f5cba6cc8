//! Processes of one group, found in `/proc` and signalled through file descriptors.

use std::ffi::OsStr;
use std::path::Path;

use procfs::process::Process;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// A process group of ours. The session and the start of its leader tell it from a later group that got the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Group {
    pub(crate) id: i32,
    pub(crate) session: i32,
    /// Start of its leader, which was ours, in clock ticks since boot; 0 where that is not known.
    pub(crate) leader_start: u64,
}

/// One process as `/proc/PID/stat` shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) pid: u32,
    pub(crate) state: char,
    pub(crate) group: i32,
    pub(crate) session: i32,
    /// Clock ticks since boot.
    pub(crate) start_ticks: u64,
    pub(crate) parent: i32,
}

impl Group {
    /// Its processes that are not yet dead. A zombie is: only its parent can do something about it.
    pub(crate) fn members(self) -> Vec<Member> {
        if self.is_anothers() {
            return Vec::new();
        }
        Member::all()
            .filter(|member| self.has(member) && !member.is_dead())
            .collect()
    }

    /// Signals every process of the group. One that ends meanwhile is no error, and one that may not be signalled stays a member.
    pub(crate) fn signal(self, signal: Signal) {
        for member in self.members() {
            member.signal(signal, |again| self.has(again));
        }
    }

    /// Whether a process of now is of this group, and the group still ours.
    pub(crate) fn holds(self, member: &Member) -> bool {
        self.has(member) && !self.is_anothers()
    }

    fn has(self, member: &Member) -> bool {
        member.group == self.id && member.session == self.session && member.start_ticks >= self.leader_start
    }

    /// A number is given again only once nobody is left in the group: then whoever leads it now is not ours, and neither is the group.
    fn is_anothers(self) -> bool {
        let leads = u32::try_from(self.id).ok().and_then(Member::read);
        self.leader_start != 0 && leads.is_some_and(|member| member.start_ticks != self.leader_start)
    }
}

impl Member {
    pub(crate) fn read(pid: u32) -> Option<Self> {
        Self::of(&Process::new(pid.cast_signed()).ok()?)
    }

    /// Processes whose environment holds `mark` (`NAME=value`). Those of other users cannot be read and are left out.
    pub(crate) fn marked(mark: &[u8]) -> Vec<Self> {
        Self::all()
            .filter(|member| {
                std::fs::read(format!("/proc/{}/environ", member.pid))
                    .is_ok_and(|environment| environment.split(|byte| *byte == 0).any(|entry| entry == mark))
            })
            .collect()
    }

    /// Processes whose working directory is `dir` and, where it is given, whose program has that name. PostgreSQL's are found so:
    /// each of a server's processes leaves the group for a session of its own and overwrites its environment.
    pub(crate) fn working_in(dir: &Path, program: Option<&OsStr>) -> Vec<Self> {
        let Ok(dir) = dir.canonicalize() else {
            return Vec::new();
        };
        let is = |member: &Self| {
            let link = |name: &str| std::fs::read_link(format!("/proc/{}/{name}", member.pid)).ok();
            let runs = |wanted: &OsStr| {
                let exe = link("exe").and_then(|exe| exe.file_name().map(OsStr::to_owned));
                // A replaced program's name ends with ` (deleted)`.
                exe.is_some_and(|exe| {
                    exe == wanted
                        || exe
                            .as_encoded_bytes()
                            .starts_with(&[wanted.as_encoded_bytes(), b" "].concat())
                })
            };
            member.works_in(&dir) && program.is_none_or(runs)
        };
        Self::all()
            .filter(|member| !member.is_dead() && is(member))
            .collect()
    }

    /// Whether its working directory is this one, given without links.
    pub(crate) fn works_in(&self, dir: &Path) -> bool {
        std::fs::read_link(format!("/proc/{}/cwd", self.pid)).is_ok_and(|cwd| cwd == dir)
    }

    /// Signals this very process, if `still` holds for it once its number cannot be reused any more.
    pub(crate) fn signal(&self, signal: Signal, still: impl Fn(&Self) -> bool) {
        let Some(pid) = Pid::from_raw(self.pid.cast_signed()) else {
            return;
        };
        let Ok(fd) = pidfd_open(pid, PidfdFlags::empty()) else {
            return;
        };
        // With the descriptor open the number cannot be reused: now see that it still means the same process.
        let same =
            Self::read(self.pid).is_some_and(|again| again.start_ticks == self.start_ticks && still(&again));
        if same && let Err(error) = pidfd_send_signal(&fd, signal) {
            tracing::debug!(pid = self.pid, %error, "signal not sent");
        }
    }

    pub(crate) fn is_leader(&self) -> bool {
        self.group == self.pid.cast_signed()
    }

    pub(crate) fn leads_session(&self) -> bool {
        self.session == self.pid.cast_signed()
    }

    /// Whether nobody leads its group any more.
    pub(crate) fn is_orphaned(&self) -> bool {
        let leader = u32::try_from(self.group).ok().and_then(Self::read);
        leader.is_none_or(|leader| leader.is_dead() || leader.group != self.group)
    }

    /// Whether its command line ends in `argv`. Before that may stand the interpreter of a script, and the program may have been looked up.
    pub(crate) fn runs(&self, argv: &[String]) -> bool {
        let Ok(line) = std::fs::read(format!("/proc/{}/cmdline", self.pid)) else {
            return false;
        };
        let line = line.strip_suffix(b"\0").unwrap_or(&line);
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        let (Some((program, arguments)), Some(from)) =
            (argv.split_first(), words.len().checked_sub(argv.len()))
        else {
            return false;
        };
        let name = |path: &[u8]| path.rsplit(|byte| *byte == b'/').next().map(<[u8]>::to_vec);
        let same = words[from + 1..]
            .iter()
            .zip(arguments)
            .all(|(word, argument)| *word == argument.as_bytes());
        same && name(words[from]) == name(program.as_bytes())
    }

    /// Whether its number still means it, dead or not.
    pub(crate) fn is_there(&self) -> bool {
        Self::read(self.pid).is_some_and(|again| again.start_ticks == self.start_ticks)
    }

    pub(crate) fn is_dead(&self) -> bool {
        matches!(self.state, 'Z' | 'X' | 'x')
    }

    fn all() -> impl Iterator<Item = Self> {
        procfs::process::all_processes()
            .into_iter()
            .flatten()
            .filter_map(|process| Self::of(&process.ok()?))
    }

    fn of(process: &Process) -> Option<Self> {
        let stat = process.stat().ok()?;
        Some(Self {
            pid: u32::try_from(stat.pid).ok()?,
            state: stat.state,
            group: stat.pgrp,
            session: stat.session,
            start_ticks: stat.starttime,
            parent: stat.ppid,
        })
    }
}
