//! Bounds on groups of processes: on trees of files that look like the kernel's, and on the kernel itself where it lets us.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails, and one that leaves something out names it"
)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use theriac_heal::executor::cgroup::{
    Bound, CgroupError, CgroupHands, Change, Controller, Gate, GroupName, Hierarchies, UNDO_AGAIN, Version,
};
use theriac_heal::executor::clock;
use theriac_heal::types::{ActionKind, Now};

const MINUTE: Duration = Duration::from_mins(1);

fn group(name: &str) -> GroupName {
    GroupName::try_from(name.to_owned()).unwrap()
}

fn hands(at: Hierarchies, name: &str, record: &Path) -> CgroupHands {
    let bound = |change| Bound {
        group: group(name),
        change,
        lasts: MINUTE,
    };
    CgroupHands {
        at,
        place: Some(group(name)),
        bounds: BTreeMap::from([
            (ActionKind::ThrottleCpu, bound(Change::CpuPercent(20))),
            (
                ActionKind::LimitMemory,
                bound(Change::MemoryBytes((32 << 20) + 5)),
            ),
            (ActionKind::Freeze, bound(Change::Freeze)),
        ]),
        record: record.to_owned(),
        gate: Gate::default(),
    }
}

fn at(seconds: u64) -> Now {
    Now {
        monotonic: Duration::from_secs(seconds),
        unix_ms: 0,
    }
}

/// Files as the kernel has them in a new group.
const V1: &[(&str, &str)] = &[
    ("cpu.cfs_period_us", "50000\n"),
    ("cpu.cfs_quota_us", "-1\n"),
    ("memory.limit_in_bytes", "9223372036854771712\n"),
    ("freezer.state", "THAWED\n"),
    ("cgroup.procs", "1\n2\n"),
];
const V2: &[(&str, &str)] = &[
    ("cpu.max", "max 100000\n"),
    ("memory.max", "max\n"),
    ("cgroup.freeze", "0\n"),
    ("cgroup.procs", ""),
];

fn fake(root: &Path, version: Version) -> Hierarchies {
    let files = if version == Version::V1 { V1 } else { V2 };
    fs::create_dir_all(root.join("batch/jobs")).unwrap();
    for (name, text) in files {
        fs::write(root.join("batch").join(name), text).unwrap();
    }
    let all = [Controller::Cpu, Controller::Memory, Controller::Freezer];
    all.into_iter().fold(Hierarchies::default(), |found, controller| {
        found.with(controller, version, root.to_owned())
    })
}

#[test]
fn every_bound_is_written_as_its_version_has_it_and_what_stood_there_comes_back() {
    let v1 = [
        ("cpu.cfs_quota_us", "10000", "-1"),
        ("memory.limit_in_bytes", "33554432", "9223372036854771712"),
        ("freezer.state", "FROZEN", "THAWED"),
    ];
    let v2 = [
        ("cpu.max", "20000 100000", "max 100000"),
        ("memory.max", "33554432", "max"),
        ("cgroup.freeze", "1", "0"),
    ];
    for (version, files) in [(Version::V1, v1), (Version::V2, v2)] {
        let dir = tempfile::tempdir().unwrap();
        let hands = hands(fake(dir.path(), version), "batch", &dir.path().join("record"));
        let read = |name: &str| {
            let text = fs::read_to_string(dir.path().join("batch").join(name)).unwrap();
            text.trim().to_owned()
        };
        let actions = [
            ActionKind::ThrottleCpu,
            ActionKind::LimitMemory,
            ActionKind::Freeze,
        ];
        for (intent, (action, (file, set, _))) in (1..).zip(actions.into_iter().zip(files)) {
            let told = hands.act(action, intent, at(100), "boot").unwrap();
            assert_eq!(read(file), set, "{told}");
        }
        assert_eq!(hands.next_due().unwrap(), Some(Duration::from_secs(160)));
        // Of one intent alone, as after an action without effect.
        hands.undo(Some(1)).unwrap();
        assert_eq!(
            (read(files[0].0), read(files[1].0)),
            (files[0].2.to_owned(), files[1].1.to_owned())
        );
        assert!(hands.undo_due(at(159), "boot").unwrap().is_empty());
        assert_eq!(hands.undo_due(at(160), "boot").unwrap().len(), 2);
        for (file, _, before) in files {
            assert_eq!(read(file), before);
        }
        assert_eq!(hands.next_due().unwrap(), None);
    }
}

#[test]
fn a_later_run_undoes_what_an_earlier_one_left_and_repeats_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let record = dir.path().join("record");
    let quota = dir.path().join("batch/cpu.cfs_quota_us");
    let first = hands(fake(dir.path(), Version::V1), "batch", &record);
    first.act(ActionKind::ThrottleCpu, 1, at(100), "boot").unwrap();
    // It died between record and effect: nothing is to be undone, and the record goes.
    fs::write(&quota, "-1\n").unwrap();
    let later = hands(first.at.clone(), "batch", &record);
    let told = later.undo_due(at(200), "boot").unwrap();
    assert!(told[0].contains("as before"), "{told:?}");
    // It died after the effect; meanwhile the host was booted again and the clock began anew.
    first.act(ActionKind::ThrottleCpu, 2, at(100), "boot").unwrap();
    assert_eq!(later.undo_due(at(1), "another boot").unwrap().len(), 1);
    assert_eq!(fs::read_to_string(&quota).unwrap(), "-1");
    assert!(later.undo_due(at(500), "boot").unwrap().is_empty());
}

#[test]
fn a_second_time_lasts_longer_and_the_first_value_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let hands = hands(fake(dir.path(), Version::V2), "batch", &dir.path().join("record"));
    hands.act(ActionKind::Freeze, 1, at(100), "boot").unwrap();
    hands.act(ActionKind::Freeze, 2, at(130), "boot").unwrap();
    assert!(hands.undo_due(at(189), "boot").unwrap().is_empty());
    hands.undo_due(at(190), "boot").unwrap();
    assert_eq!(
        fs::read_to_string(dir.path().join("batch/cgroup.freeze")).unwrap(),
        "0"
    );
}

#[test]
fn what_somebody_else_wrote_since_is_left_and_what_cannot_be_undone_stays_known() {
    let dir = tempfile::tempdir().unwrap();
    let hands = hands(fake(dir.path(), Version::V1), "batch", &dir.path().join("record"));
    let limit = dir.path().join("batch/memory.limit_in_bytes");
    hands.act(ActionKind::LimitMemory, 1, at(0), "boot").unwrap();
    fs::write(&limit, "1048576").unwrap();
    let told = hands.undo(None).unwrap();
    assert!(told[0].contains("somebody else"), "{told:?}");
    assert_eq!(fs::read_to_string(&limit).unwrap(), "1048576");
    // A file that cannot be read: a directory in its place.
    hands.act(ActionKind::LimitMemory, 2, at(0), "boot").unwrap();
    fs::remove_file(&limit).unwrap();
    fs::create_dir(&limit).unwrap();
    assert!(matches!(hands.undo(None), Err(CgroupError::Io { .. })));
    assert!(hands.next_due().unwrap().is_some(), "it was forgotten");
    fs::remove_dir(&limit).unwrap();
    assert!(hands.undo(None).unwrap()[0].contains("is gone"));
}

#[test]
fn a_value_that_the_kernel_did_not_take_is_put_back_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let (root, record) = (dir.path().join("cgroup"), dir.path().join("undo.json"));
    let hierarchies = fake(&root, Version::V2);
    let hands = hands(hierarchies, "batch", &record);
    let file = root.join("batch/cpu.max");
    fs::remove_file(&file).unwrap();
    // It takes everything and holds nothing of it.
    std::os::unix::fs::symlink("/dev/null", &file).unwrap();
    let refused = hands.act(ActionKind::ThrottleCpu, 1, at(0), "boot").unwrap_err();
    assert!(matches!(refused, CgroupError::NotTaken { .. }), "{refused}");
    assert_eq!(
        hands.undo(None).unwrap(),
        Vec::<String>::new(),
        "nothing is left to undo"
    );
}

#[test]
fn of_two_hands_at_once_neither_loses_what_the_other_has_to_undo() {
    let dir = tempfile::tempdir().unwrap();
    let hands = hands(fake(dir.path(), Version::V2), "batch", &dir.path().join("record"));
    let freeze = dir.path().join("batch/cgroup.freeze");
    for round in 0..40 {
        // One bound falls due while another action begins.
        hands
            .act(ActionKind::ThrottleCpu, 2 * round, at(0), "boot")
            .unwrap();
        let begin = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            let due = scope.spawn(|| {
                begin.wait();
                hands.undo_due(at(60), "boot")
            });
            begin.wait();
            hands
                .clone()
                .act(ActionKind::Freeze, 2 * round + 1, at(100), "boot")
                .unwrap();
            due.join().unwrap().unwrap();
        });
        assert_eq!(fs::read_to_string(&freeze).unwrap(), "1");
        assert_eq!(hands.undo_due(at(160), "boot").unwrap().len(), 1, "round {round}");
        assert_eq!(fs::read_to_string(&freeze).unwrap(), "0", "round {round}");
        assert_eq!(hands.next_due().unwrap(), None);
    }
}

#[test]
fn nothing_is_bounded_after_all_was_taken_back_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let hands = hands(fake(dir.path(), Version::V2), "batch", &dir.path().join("record"));
    let late = hands.clone();
    hands.act(ActionKind::ThrottleCpu, 1, at(0), "boot").unwrap();
    assert_eq!(hands.close().unwrap().len(), 1);
    assert!(matches!(
        late.act(ActionKind::Freeze, 2, at(0), "boot"),
        Err(CgroupError::Closed)
    ));
    assert_eq!(
        fs::read_to_string(dir.path().join("batch/cgroup.freeze")).unwrap(),
        "0\n"
    );
}

#[test]
fn a_record_that_cannot_be_read_now_is_looked_at_again() {
    let dir = tempfile::tempdir().unwrap();
    let record = dir.path().join("record");
    let hands = hands(fake(dir.path(), Version::V2), "batch", &record);
    assert_eq!(hands.undo_due_then(at(0), "boot").1, None);
    hands.act(ActionKind::Freeze, 1, at(0), "boot").unwrap();
    let due = MINUTE;
    assert_eq!(hands.undo_due_then(at(1), "boot").1, Some(due));
    // Reading a directory fails, whoever asks.
    let aside = dir.path().join("aside");
    fs::rename(&record, &aside).unwrap();
    fs::create_dir(&record).unwrap();
    let (done, next) = hands.undo_due_then(at(70), "boot");
    assert!(matches!(done, Err(CgroupError::Io { .. })), "{done:?}");
    assert_eq!(next, Some(Duration::from_secs(70) + UNDO_AGAIN));
    fs::remove_dir(&record).unwrap();
    fs::rename(&aside, &record).unwrap();
    let (done, next) = hands.undo_due_then(at(80), "boot");
    assert_eq!((done.unwrap().len(), next), (1, None));
}

#[test]
fn what_is_not_listed_not_there_or_holds_ourselves_is_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    let record = dir.path().join("record");
    let tree = fake(dir.path(), Version::V1);
    let mut without = hands(tree.clone(), "batch", &record);
    without.bounds.clear();
    let act = |hands: &CgroupHands| hands.act(ActionKind::Freeze, 1, at(0), "boot");
    assert!(matches!(act(&without), Err(CgroupError::NotListed(_))));
    let missing = hands(tree.clone(), "other", &record);
    assert!(matches!(act(&missing), Err(CgroupError::NoGroup(_))));
    let bare = hands(Hierarchies::default(), "batch", &record);
    assert!(matches!(
        act(&bare),
        Err(CgroupError::NoController(Controller::Freezer))
    ));
    // Below it counts too: a frozen parent freezes its children.
    let own = std::process::id().to_string();
    fs::write(dir.path().join("batch/jobs/cgroup.procs"), own).unwrap();
    let hands = hands(tree, "batch", &record);
    assert!(matches!(act(&hands), Err(CgroupError::Own(_))));
    fs::write(dir.path().join("batch/jobs/cgroup.procs"), "").unwrap();
    fs::write(&record, "not json").unwrap();
    assert!(matches!(act(&hands), Err(CgroupError::Damaged { .. })));
    assert_eq!(
        fs::read_to_string(dir.path().join("batch/freezer.state")).unwrap(),
        "THAWED\n"
    );
}

/// A group of this test's own, made in the kernel's trees; gone with it.
struct Real {
    hands: CgroupHands,
    dirs: Vec<PathBuf>,
    children: Vec<Child>,
    _record: tempfile::TempDir,
}

impl Real {
    /// `None`, with a word to whoever reads the output, where the kernel does not let us.
    #[expect(clippy::print_stdout, reason = "a test says what it leaves out")]
    fn new(controller: Controller) -> Option<Self> {
        let mounted = Hierarchies::read().unwrap();
        let Some((version, root)) = mounted.of(controller) else {
            println!("left out: no {controller} controller is mounted here");
            return None;
        };
        // Below the group in which we are, so that its own bounds still hold.
        let root = root.join(own_group(controller, version).trim_start_matches('/'));
        let name = format!("theriac-test-{}-{controller}", std::process::id());
        let dir = root.join(&name);
        if let Err(error) = fs::create_dir(&dir) {
            println!("left out: {} cannot be made: {error}", dir.display());
            return None;
        }
        let record = tempfile::tempdir().unwrap();
        let at = Hierarchies::default().with(controller, version, root);
        Some(Self {
            hands: hands(at, &name, &record.path().join("record")),
            dirs: vec![dir],
            children: Vec::new(),
            _record: record,
        })
    }

    fn run(&mut self, script: &str) -> u32 {
        let child = Command::new("/bin/sh").args(["-c", script]).spawn().unwrap();
        let pid = child.id();
        self.children.push(child);
        self.hands.place(pid).unwrap();
        pid
    }

    fn file(&self, name: &str) -> String {
        fs::read_to_string(self.dirs[0].join(name))
            .unwrap()
            .trim()
            .to_owned()
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        let _undone = self.hands.undo(None).is_ok();
        for child in &mut self.children {
            let _ended = child.kill().is_ok() && child.wait().is_ok();
        }
        let deadline = Instant::now() + MINUTE;
        for dir in &self.dirs {
            while fs::remove_dir(dir).is_err() && dir.exists() && Instant::now() < deadline {
                std::thread::yield_now();
            }
        }
    }
}

fn own_group(controller: Controller, version: Version) -> String {
    let text = fs::read_to_string("/proc/self/cgroup").unwrap();
    let wanted = match version {
        Version::V1 => controller.to_string(),
        Version::V2 => String::new(),
    };
    let found = text.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        controllers
            .split(',')
            .any(|word| word == wanted)
            .then(|| path.to_owned())
    });
    found.unwrap_or_default()
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + MINUTE;
    while !holds() {
        assert!(Instant::now() < deadline, "not {what}");
        std::thread::yield_now();
    }
}

fn state(pid: u32) -> char {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.chars().next().unwrap()
}

#[test]
fn a_busy_neighbour_is_throttled_by_the_kernel_and_let_go() {
    let Some(mut real) = Real::new(Controller::Cpu) else {
        return;
    };
    real.run("while :; do :; done");
    let now = clock::now();
    let told = real.hands.act(ActionKind::ThrottleCpu, 1, now, "boot").unwrap();
    println!("{told}");
    let throttled = || {
        let stat = real.file("cpu.stat");
        let line = stat.lines().find_map(|line| line.strip_prefix("nr_throttled "));
        line.unwrap().parse::<u64>().unwrap()
    };
    until("throttled", || throttled() > 2);
    real.hands.undo(Some(1)).unwrap();
    let bound = ["cpu.cfs_quota_us", "cpu.max"].map(|name| fs::read_to_string(real.dirs[0].join(name)));
    let bound = bound.into_iter().flatten().next().unwrap();
    assert!(bound.starts_with("-1") || bound.starts_with("max"), "{bound}");
}

#[test]
fn a_frozen_neighbour_stands_still_and_goes_on() {
    let Some(mut real) = Real::new(Controller::Freezer) else {
        return;
    };
    let pid = real.run("while :; do :; done");
    until("running", || state(pid) == 'R');
    let told = real
        .hands
        .act(ActionKind::Freeze, 1, clock::now(), "boot")
        .unwrap();
    println!("{told}");
    // Version 1 shows a frozen process as waiting, version 2 as sleeping.
    until("frozen", || matches!(state(pid), 'D' | 'S'));
    real.hands.undo(None).unwrap();
    until("thawed", || state(pid) == 'R');
}

#[test]
fn a_greedy_group_meets_its_bound_and_not_the_hosts() {
    let Some(real) = Real::new(Controller::Memory) else {
        return;
    };
    let told = real
        .hands
        .act(ActionKind::LimitMemory, 1, clock::now(), "boot")
        .unwrap();
    println!("{told}");
    // It reads a line first, so that it takes nothing before it is in its group.
    let mut child = Command::new("/bin/sh")
        .args(["-c", "read go; ulimit -v 1000000; exec tail /dev/zero"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    real.hands.place(child.id()).unwrap();
    drop(child.stdin.take());
    let ended = child.wait().unwrap();
    assert_eq!(ended.signal(), Some(9), "{ended:?}");
    let told = real.hands.undo(None).unwrap();
    println!("{told:?}");
}
