//! Room on a full file system: files that are listed go to a quarantine on another one, whole and written down; nothing else is touched.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot go on fails, one that is left out says so"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use theriac_heal::executor::space::{SpaceHands, room_asked, room_needed};

/// A small file system in memory, unmounted when dropped.
struct Disk(PathBuf);

impl Disk {
    fn mount(path: PathBuf) -> Option<Self> {
        fs::create_dir(&path).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=8m,mode=0755", "tmpfs"])
            .arg(&path)
            .output();
        if mounted.is_ok_and(|mounted| mounted.status.success()) {
            return Some(Self(path));
        }
        None
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(&self.0).status());
    }
}

/// A disk without a byte of room, and what lies beside it.
struct Full {
    disk: Disk,
    outside: PathBuf,
    quarantine: PathBuf,
    // The last one, so that it goes after the disk in it.
    _root: tempfile::TempDir,
}

/// Nothing where none can be mounted; that `what` is left out is said.
fn full_disk(what: &str) -> Option<Full> {
    let root = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::mount(root.path().join("disk")) else {
        println!("left out: {what}, because no file system can be mounted here (root may)");
        return None;
    };
    let outside = root.path().join("outside");
    fill(&disk.0, &outside);
    Some(Full {
        disk,
        outside,
        quarantine: root.path().join("quarantine"),
        _root: root,
    })
}

fn hands(disk: &Path, quarantine: &Path) -> SpaceHands {
    SpaceHands {
        on: disk.join("kv"),
        listed: vec![disk.join("cache"), disk.join("not-there")],
        protected: Vec::new(),
        quarantine: quarantine.to_owned(),
        min_age: Duration::ZERO,
        free_bytes_min: 0,
    }
}

fn free(path: &Path) -> u64 {
    let space = rustix::fs::statvfs(path).unwrap();
    space.f_bavail * space.f_frsize
}

/// A cache of nine files of 256 KiB, a state, links, and then not a byte more.
fn fill(disk: &Path, outside: &Path) {
    fs::create_dir_all(disk.join("cache/below")).unwrap();
    fs::create_dir(disk.join("kv")).unwrap();
    fs::write(outside, b"somebody else's").unwrap();
    std::os::unix::fs::symlink(outside, disk.join("cache/link")).unwrap();
    std::os::unix::fs::symlink(outside.parent().unwrap(), disk.join("cache/dirlink")).unwrap();
    fs::write(disk.join("cache/twice"), vec![7; 4096]).unwrap();
    fs::hard_link(disk.join("cache/twice"), disk.join("second-name")).unwrap();
    for number in 0..9_u8 {
        let name = format!("cache/{}{number}", if number % 2 == 0 { "" } else { "below/" });
        let path = disk.join(name);
        fs::write(&path, vec![number; 256 << 10]).unwrap();
        let age = Duration::from_hours(100 - u64::from(number));
        let written = std::time::SystemTime::now() - age;
        fs::File::options()
            .append(true)
            .open(&path)
            .unwrap()
            .set_modified(written)
            .unwrap();
    }
    let rest = usize::try_from(free(disk)).unwrap();
    fs::write(disk.join("kv/state"), vec![1; rest - 8192]).unwrap();
}

#[test]
fn listed_files_go_oldest_first_until_there_is_room_and_every_one_is_whole_in_quarantine() {
    let Some(full) = full_disk("a full disk") else {
        return;
    };
    let (disk, outside, quarantine) = (&full.disk.0, &full.outside, &full.quarantine);
    let needed = room_needed(8 << 20);
    assert!(free(disk) < needed);
    let state = fs::read(disk.join("kv/state")).unwrap();
    let hands = hands(disk, quarantine);
    assert_eq!(
        hands.relievable().unwrap(),
        9 * (256 << 10),
        "no link, no second name"
    );
    let room = hands.relieve(7).unwrap();
    assert!(room.relieved && free(disk) >= 4 * needed, "{room}");
    assert!(room.files < 9, "no more than is needed: {room}");
    let list = fs::read_to_string(room.to.join("moved.jsonl")).unwrap();
    let moved: Vec<serde_json::Value> = list
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(moved.len() as u64, room.files);
    for (number, line) in moved.iter().enumerate() {
        let (from, to) = (line["from"].as_str().unwrap(), line["to"].as_str().unwrap());
        assert!(from.ends_with(&number.to_string()), "the oldest first: {list}");
        assert!(!Path::new(from).exists());
        assert_eq!(
            fs::read(to).unwrap(),
            vec![u8::try_from(number).unwrap(); 256 << 10]
        );
    }
    assert_eq!(fs::read(disk.join("kv/state")).unwrap(), state);
    assert_eq!(fs::read(outside).unwrap(), b"somebody else's");
    assert!(disk.join("cache/twice").exists() && disk.join("cache/link").is_symlink());
    assert!(room.to.starts_with(quarantine), "{}", room.to.display());
    // There is room now: nothing more is moved.
    let again = hands.relieve(8).unwrap();
    assert!(again.relieved && again.files == 0, "{again}");
    // More is asked for than the whole of it: half of it is what can be had, and not for ever more.
    let greedy = SpaceHands {
        free_bytes_min: u64::MAX,
        ..hands
    };
    let more = greedy.relieve(9).unwrap();
    assert!(more.files > 0 && more.relieved, "{more}");
    assert_eq!(room_asked(u64::MAX, 8 << 20), 1 << 20);
}

#[test]
fn young_files_stay_and_a_quarantine_on_the_same_disk_is_refused() {
    let Some(full) = full_disk("a full disk") else {
        return;
    };
    let (disk, quarantine) = (&full.disk.0, &full.quarantine);
    let mut young = hands(disk, quarantine);
    young.min_age = Duration::from_hours(1_000);
    let room = young.relieve(1).unwrap();
    assert!(
        !room.relieved && room.files == 0 && room.to_string().contains("nothing more is listed"),
        "{room}"
    );
    fs::remove_file(disk.join("second-name")).unwrap();
    let same = hands(disk, &disk.join("quarantine")).relieve(1).unwrap_err();
    assert!(
        same.to_string().contains("lies on the file system that is full"),
        "{same}"
    );
    assert_eq!(
        fs::read_dir(disk.join("cache/below")).unwrap().count(),
        4,
        "nothing was moved"
    );
}

#[test]
fn a_file_that_is_open_for_writing_stays_and_the_others_go() {
    let Some(full) = full_disk("a full disk") else {
        return;
    };
    let (disk, quarantine) = (&full.disk.0, &full.quarantine);
    // The oldest is being written.
    let writer = fs::File::options()
        .append(true)
        .open(disk.join("cache/0"))
        .unwrap();
    let mut hands = hands(disk, quarantine);
    // One that cannot be listed: it is a link. The others are.
    hands.listed.insert(0, disk.join("cache/dirlink"));
    let room = hands.relieve(7).unwrap();
    assert!(room.relieved && room.open == 1, "{room}");
    assert!(room.trouble.as_ref().unwrap().contains("dirlink"), "{room}");
    assert!(room.to_string().contains("1 are open for writing"), "{room}");
    assert!(disk.join("cache/0").exists() && !disk.join("cache/below/1").exists());
    drop(writer);
    // The number alone does not name the directory: one from an earlier life of the edge is in nobody's way.
    fs::write(
        disk.join("kv/more"),
        vec![1; usize::try_from(free(disk)).unwrap() - 8192],
    )
    .unwrap();
    let again = hands.relieve(7).unwrap();
    assert!(again.files > 0 && again.to != room.to, "{again}");
    assert!(!disk.join("cache/0").exists());
}

#[test]
fn what_is_mounted_below_a_listed_directory_is_not_taken_for_a_part_of_it() {
    let Some(full) = full_disk("bind mounts") else {
        return;
    };
    let (disk, quarantine) = (&full.disk.0, &full.quarantine);
    let bind = |from: &str, to: &str| {
        let to = disk.join(to);
        fs::create_dir_all(&to).unwrap();
        let done = Command::new("mount")
            .arg("--bind")
            .arg(disk.join(from))
            .arg(&to)
            .status();
        assert!(done.unwrap().success());
        Disk(to)
    };
    let hands = hands(disk, quarantine);
    fs::remove_file(disk.join("kv/state")).unwrap();
    fs::create_dir(disk.join("kv/wal")).unwrap();
    assert!(hands.relievable().is_ok());
    for from in ["kv", "kv/wal"] {
        let mounted = bind(from, "cache/shown");
        let error = hands.relievable().unwrap_err().to_string();
        assert!(error.contains("nothing is moved"), "{from}: {error}");
        drop(mounted);
    }
    let mounted = bind("kv/wal", "elsewhere");
    let mut listed = hands.clone();
    listed.listed = vec![disk.join("elsewhere")];
    assert!(listed.relievable().is_err());
    drop(mounted);
}
