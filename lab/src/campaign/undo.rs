//! What a campaign left behind is taken back, also when the campaign itself was killed with -9.
//!
//! Every file, socket and process of a campaign lies in, or names, one folder of its own. A record of that folder is on disk before
//! anything is made in it. A second process, the *warden*, holds one end of a pipe: when the other end closes and the record is
//! still there, it drops no more packets, lets a device that was slowed be fast again (a process that waits for it could not end before), ends
//! every process of that folder (Monit and stopped ones too), unmounts what is mounted in it and removes it. What of that fails keeps none of the
//! rest from being tried.
//! Where the warden was killed as well, the next campaign with the same output directory does the same first.

use std::io::{self, Read as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

/// What every campaign's folder is called, with something random after it. Nothing else is ever taken back.
pub(super) const FOLDER: &str = "theriac-campaign-";

/// Looks, 50 ms apart, at servers that were asked to end at once.
const SERVER_LOOKS: u32 = 60;

/// What is to be taken back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct UndoRecord {
    /// The folder; absolute.
    pub(super) root: PathBuf,
}

impl UndoRecord {
    /// Writes it durably.
    fn write(&self, at: &Path) -> io::Result<()> {
        let partial = at.with_extension("partial");
        let file = std::fs::File::create(&partial)?;
        serde_json::to_writer(&file, self)?;
        file.sync_all()?;
        std::fs::rename(&partial, at)
    }
}

/// Takes back what the record at `at` names, and removes the record. Nothing when there is none.
///
/// # Errors
/// When the record cannot be read or names something else than a campaign's folder, a process does not end, or a folder stays.
pub(super) fn take_back(at: &Path) -> io::Result<bool> {
    let text = match std::fs::read_to_string(at) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        text => text?,
    };
    let UndoRecord { root } = serde_json::from_str(&text)?;
    let is_ours = root.is_absolute()
        && root
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(FOLDER.as_bytes()));
    if !is_ours {
        return Err(io::Error::other(format!(
            "{} names no folder of a campaign; nothing was done",
            at.display()
        )));
    }
    // What outlasts the campaign and hits others comes first.
    each([
        &|| super::loss::undo_all(&root),
        &|| make_fast(&root),
        &|| end_all(&root),
        &|| unmount_all(&root),
    ])?;
    match std::fs::remove_dir_all(&root) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // The warden of one that was killed may have been at it at the same time.
    match std::fs::remove_file(at) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(true),
    }
}

/// Takes every step, whatever becomes of the others.
///
/// # Errors
/// The first one.
fn each<const N: usize>(steps: [&dyn Fn() -> io::Result<()>; N]) -> io::Result<()> {
    steps.iter().map(|step| step()).fold(Ok(()), io::Result::and)
}

/// Ends every process that names `root` among its words or works in it, until none is left. Servers are asked first, and given a moment: one
/// that is killed outright leaves its shared memory behind, which belongs to no folder.
pub(super) fn end_all(root: &Path) -> io::Result<()> {
    // Whoever would start one anew goes first.
    let servers = || of(root, is_postmaster);
    if !servers()?.is_empty() {
        let others = |process: &procfs::process::Process| !is_of_postgres(process);
        signal(&of(root, others)?, Signal::KILL);
    }
    for _ in 0..SERVER_LOOKS {
        let found = servers()?;
        if found.is_empty() {
            break;
        }
        // A stopped one does not hear the other.
        signal(&found, Signal::CONT);
        signal(&found, Signal::QUIT);
        std::thread::sleep(Duration::from_millis(50));
    }
    kill_all(root)
}

fn signal(pids: &[Pid], signal: Signal) {
    for pid in pids {
        // An error means that it is gone.
        kill_process(*pid, signal).ok();
    }
}

fn of(root: &Path, wanted: impl Fn(&procfs::process::Process) -> bool) -> io::Result<Vec<Pid>> {
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    Ok(procfs::process::all_processes()
        .map_err(io::Error::other)?
        .filter_map(Result::ok)
        .filter(|process| process.pid() != own && belongs(process, root) && wanted(process))
        .filter_map(|process| Pid::from_raw(process.pid()))
        .collect())
}

/// A server's main process: its children call themselves something else.
fn is_postmaster(process: &procfs::process::Process) -> bool {
    is_of_postgres(process)
        && process
            .cmdline()
            .is_ok_and(|words| words.iter().any(|word| word == "-D"))
}

fn is_of_postgres(process: &procfs::process::Process) -> bool {
    process.stat().is_ok_and(|stat| stat.comm == "postgres")
}

fn kill_all(root: &Path) -> io::Result<()> {
    for _ in 0..200 {
        let found = of(root, |_| true)?;
        if found.is_empty() {
            return Ok(());
        }
        signal(&found, Signal::KILL);
        std::thread::sleep(Duration::from_millis(25));
    }
    Err(io::Error::other(format!(
        "processes of {} do not end",
        root.display()
    )))
}

fn belongs(process: &procfs::process::Process, root: &Path) -> bool {
    // A zombie has neither words nor a directory, and nothing left to end.
    let named = process.cmdline().is_ok_and(|words| {
        words
            .iter()
            .any(|word| word.split('=').any(|part| Path::new(part).starts_with(root)))
    });
    named || process.cwd().is_ok_and(|dir| dir.starts_with(root))
}

/// Device and directory of what is mounted below `root`, the latest first.
fn mounted(root: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let mounted = std::fs::read_to_string("/proc/self/mounts")?;
    let mut inside: Vec<_> = mounted
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            Some((fields.next()?.to_owned(), PathBuf::from(fields.next()?)))
        })
        .filter(|(_, path)| path.starts_with(root))
        .collect();
    inside.reverse();
    Ok(inside)
}

/// Takes the limit from every device that is mounted below `root`.
fn make_fast(root: &Path) -> io::Result<()> {
    if super::disk::is_possible().is_err() {
        return Ok(());
    }
    mounted(root)?
        .iter()
        .filter(|(device, _)| device.starts_with("/dev/loop"))
        .map(|(_, path)| super::disk::slow(path, false))
        .fold(Ok(()), io::Result::and)
}

/// Unmounts what is mounted below `root`, the latest first. A device that was made slow is fast again before that.
pub(super) fn unmount_all(root: &Path) -> io::Result<()> {
    let fast = make_fast(root);
    let unmount = |path: &Path| {
        let done = |words: &[&str]| {
            let status = Command::new("umount").args(words).arg(path).status()?;
            Ok::<_, io::Error>(status.success())
        };
        if done(&[])? || done(&["-l"])? {
            return Ok(());
        }
        Err(io::Error::other(format!("{} stays mounted", path.display())))
    };
    mounted(root)?
        .iter()
        .map(|(_, path)| unmount(path))
        .fold(fast, io::Result::and)
}

/// The process that takes back when this one cannot.
#[derive(Debug)]
pub(super) struct Warden {
    child: Child,
    record: PathBuf,
}

impl Warden {
    /// Writes the record, then starts the warden: a copy of `program` in a process group of its own, so that Ctrl-C leaves it.
    pub(super) fn start(program: &Path, root: &Path, record: &Path) -> io::Result<Self> {
        let of = UndoRecord {
            root: root.to_owned(),
        };
        of.write(record)?;
        let child = Command::new(program)
            .arg("__warden")
            .arg(record)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        Ok(Self {
            child,
            record: record.to_owned(),
        })
    }

    /// Takes everything back here, and lets the warden go.
    pub(super) fn end(mut self) -> io::Result<()> {
        let taken_back = take_back(&self.record);
        drop(self.child.stdin.take());
        self.child.wait()?;
        taken_back.map(|_| ())
    }
}

/// The warden's life: waits until the other end of its standard input is closed, then takes back what is still there.
///
/// # Errors
/// As for taking back; a record that is gone is no error.
pub fn watch(record: &Path) -> io::Result<()> {
    io::stdin().lock().read_to_end(&mut Vec::new())?;
    take_back(record).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_any_other_folder_is_refused_and_nothing_is_touched() {
        let dir = tempfile::tempdir().unwrap();
        let (root, record) = (dir.path().join("precious"), dir.path().join("undo.json"));
        std::fs::create_dir(&root).unwrap();
        UndoRecord { root: root.clone() }.write(&record).unwrap();
        let refused = take_back(&record).unwrap_err().to_string();
        assert!(refused.contains("nothing was done") && root.is_dir(), "{refused}");
    }

    #[test]
    fn a_step_that_fails_keeps_no_other_from_being_taken_and_the_first_error_is_told() {
        let taken = std::cell::Cell::new(0);
        let step = |number: u32, works: bool| {
            let taken = &taken;
            move || {
                taken.set(taken.get() * 10 + number);
                works
                    .then_some(())
                    .ok_or_else(|| io::Error::other(number.to_string()))
            }
        };
        let told = each([&step(1, true), &step(2, false), &step(3, true), &step(4, false)]);
        assert_eq!(
            (taken.get(), told.unwrap_err().to_string()),
            (1_234, "2".to_owned())
        );
    }

    #[test]
    fn a_process_that_waits_for_a_slow_disk_keeps_nothing_from_being_taken_back() {
        use super::super::disk;

        if !rustix::process::geteuid().is_root() {
            eprintln!("left out: this account may mount nothing");
            return;
        }
        if let Err(why) = disk::is_possible() {
            eprintln!("left out: {why}");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join(format!("{FOLDER}x"));
        let (below, at) = (root.join("below"), root.join("disk"));
        std::fs::create_dir_all(&at).unwrap();
        let record = dir.path().join("undo.json");
        UndoRecord { root: root.clone() }.write(&record).unwrap();
        disk::mount_loop(&below, &at, 32 << 20).unwrap();
        disk::slow(&at, true).unwrap();
        // A minute's worth, which is written in one go: KILL would wait for it.
        let written = at.join("written");
        let mut waiting = Command::new("dd")
            .args(["if=/dev/zero", "bs=4M", "count=1", "conv=fsync", "status=none"])
            .arg(format!("of={}", written.display()))
            .spawn()
            .unwrap();
        let waits = |pid: u32| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit_once(") ")
                .is_some_and(|(_, rest)| rest.starts_with('D'))
        };
        let begun = std::time::Instant::now();
        // For a while: a page of its program that is read is a moment in the same state.
        let mut since = begun;
        while since.elapsed() < Duration::from_millis(500) {
            if !waits(waiting.id()) {
                since = std::time::Instant::now();
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "it waits for no disk");
            assert!(waiting.try_wait().unwrap().is_none(), "the disk is not slow");
            std::thread::yield_now();
        }
        let took = std::time::Instant::now();
        assert!(take_back(&record).unwrap());
        assert!(took.elapsed() < Duration::from_secs(30), "{:?}", took.elapsed());
        assert!(!root.exists() && !record.exists());
        waiting.wait().unwrap();
    }

    #[test]
    fn a_stopped_server_is_ended_in_order_and_leaves_no_shared_memory() {
        use super::super::Healer;
        use super::super::fault::{Lane, Machine};
        use super::super::ward::Ward;

        let here = Machine {
            root: false,
            ..Machine::here()
        };
        if let Err(missing) = &here.postgres {
            eprintln!("left out: {missing}");
            return;
        }
        let dir = tempfile::Builder::new().prefix("tc").tempdir().unwrap();
        // The server's account has to come through.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(dir.path(), open).unwrap();
        let root = dir.path().join(format!("{FOLDER}x"));
        std::fs::create_dir(&root).unwrap();
        let ward = Ward::make(
            &root,
            Lane::Postgres,
            Healer::Threshold,
            Path::new("/bin/true"),
            &here,
        )
        .unwrap();
        let argv = ward.argv_as_owner();
        let mut server = Command::new(&argv[0])
            .args(&argv[1..])
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Line 7 of its pid file: key and number of the segment; line 8 says `ready` once it is.
        let pid_file = ward.state().join("postmaster.pid");
        let segment: u64 = loop {
            assert!(server.try_wait().unwrap().is_none(), "the server ended early");
            let text = std::fs::read_to_string(&pid_file).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            if lines.get(7).is_some_and(|line| line.starts_with("ready")) {
                break lines[6].split_ascii_whitespace().nth(1).unwrap().parse().unwrap();
            }
            std::thread::yield_now();
        };
        let there = || {
            let table = std::fs::read_to_string("/proc/sysvipc/shm").unwrap();
            table.lines().any(|line| {
                let number = line.split_ascii_whitespace().nth(1);
                number.and_then(|number| number.parse().ok()) == Some(segment)
            })
        };
        assert!(there(), "a segment is meant to be seen");
        kill_process(Pid::from_child(&server), Signal::STOP).unwrap();
        end_all(&root).unwrap();
        server.wait().unwrap();
        assert!(!there(), "segment {segment} stays");
    }

    #[test]
    fn a_stopped_process_of_the_folder_is_ended_and_the_folder_removed() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join(format!("{FOLDER}x"));
        std::fs::create_dir(&root).unwrap();
        let record = dir.path().join("undo.json");
        UndoRecord { root: root.clone() }.write(&record).unwrap();
        let mut by_directory = Command::new("sleep")
            .arg("600")
            .current_dir(&root)
            .spawn()
            .unwrap();
        let word = root.join("state");
        let mut by_word = Command::new("sh")
            .args(["-c", "read line"])
            .arg(&word)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut other = Command::new("sleep").arg("600").spawn().unwrap();
        kill_process(Pid::from_child(&by_directory), Signal::STOP).unwrap();
        assert!(take_back(&record).unwrap());
        assert!(!root.exists() && !record.exists());
        assert!(!by_directory.wait().unwrap().success());
        // Waiting closes its input, at which it would end by itself: so it is looked at first.
        let deadline = std::time::Instant::now() + Duration::from_mins(1);
        let by_word = loop {
            assert!(std::time::Instant::now() < deadline, "it lives on");
            if let Some(ended) = by_word.try_wait().unwrap() {
                break ended;
            }
        };
        assert!(!by_word.success());
        assert!(other.try_wait().unwrap().is_none(), "somebody else's process");
        other.kill().unwrap();
        other.wait().unwrap();
        assert!(!take_back(&record).unwrap(), "twice is no error");
    }
}
