use super::*;

fn hands(root: &Path, listed: &[&str]) -> SpaceHands {
    SpaceHands {
        on: root.join("data/kv"),
        listed: listed.iter().map(|name| root.join(name)).collect(),
        protected: vec![root.join("edge"), root.join("not-there")],
        quarantine: root.join("quarantine"),
        min_age: Duration::ZERO,
        free_bytes_min: 0,
    }
}

/// `/data/kv` is the state, `/edge` the edge's, `/links` leads to both; each file has one byte.
fn tree() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for dir in [
        "data/kv/cache",
        "data/kv/log",
        "data/cache",
        "edge/checkpoints",
        "links",
    ] {
        std::fs::create_dir_all(root.path().join(dir)).unwrap();
        if dir != "links" {
            std::fs::write(root.path().join(dir).join("file"), b"x").unwrap();
        }
    }
    for (to, name) in [
        ("data/kv", "links/kv"),
        ("edge", "links/edge"),
        ("data", "links/data"),
    ] {
        std::os::unix::fs::symlink(root.path().join(to), root.path().join(name)).unwrap();
    }
    root
}

#[test]
fn no_name_leads_to_a_state_or_to_what_the_edge_keeps() {
    let root = tree();
    for bad in [
        "links/kv/cache",
        "links/data/kv/cache",
        "links/edge/checkpoints",
        "data/kv",
        "data/kv/cache",
        "data",
        "edge",
        "links/edge/",
    ] {
        let error = hands(root.path(), &[bad]).relievable().unwrap_err().to_string();
        assert!(error.contains("nothing is moved"), "{bad}: {error}");
        let error = hands(root.path(), &["data/cache", bad]).relieve(1).unwrap_err();
        assert!(error.to_string().contains("nothing is moved"), "{bad}: {error}");
    }
    for (good, bytes) in [("links/data/cache", 1), ("links", 0), ("gone", 0)] {
        assert_eq!(hands(root.path(), &[good]).relievable().unwrap(), bytes, "{good}");
    }
    // A state that is a link itself.
    let mut linked = hands(root.path(), &["data/kv/cache"]);
    linked.on = root.path().join("links/kv");
    assert!(linked.relievable().is_err());
}

#[test]
fn the_newest_file_of_a_servers_log_stays() {
    let root = tree();
    let hands = hands(root.path(), &["data/kv/log"]);
    assert_eq!(hands.relievable().unwrap(), 0, "the one that is written");
    std::fs::write(root.path().join("data/kv/log/old"), b"old").unwrap();
    File::options()
        .append(true)
        .open(root.path().join("data/kv/log/old"))
        .unwrap()
        .set_modified(SystemTime::UNIX_EPOCH)
        .unwrap();
    let found = hands.candidates(&mut hands.grounds().unwrap());
    let names: Vec<&Path> = found.iter().map(|found| found.path.as_path()).collect();
    assert_eq!(names, [Path::new("old")]);
}

#[test]
fn a_thousand_directories_take_no_descriptor_each() {
    let root = tree();
    for number in 0..1_100 {
        let dir = root.path().join(format!("data/cache/{number}"));
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("file"), b"x").unwrap();
    }
    let hands = hands(root.path(), &["data/cache"]);
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = open();
    let mut grounds = hands.grounds().unwrap();
    let found = hands.candidates(&mut grounds);
    assert_eq!(found.len(), FILES_MAX);
    // Other tests have some meanwhile.
    assert!(open() < before + 500, "{} then {}", before, open());
    assert_eq!(hands.relievable().unwrap(), 1_101);
    let (parent, name) = grounds.reopen(&found[700]).unwrap().unwrap();
    assert!(statat(&parent, &name, AtFlags::empty()).is_ok());
}

#[test]
fn a_file_that_was_written_to_after_its_copy_was_written_down_stays_and_the_list_says_so() {
    let root = tempfile::tempdir().unwrap();
    let (from, to) = (root.path().join("a"), root.path().join("000000"));
    let parent = rustix::fs::open(root.path(), DIRECTORY, Mode::empty()).unwrap();
    std::fs::write(&from, b"first").unwrap();
    let carry = |late: &[u8], to: &Path| {
        let mut source = File::open(&from).unwrap();
        let seen = source.metadata().unwrap();
        let copy = File::create(to).unwrap();
        copy_and_let_go(&mut source, &seen, copy, (&from, to, root.path()), || {
            let mut writer = File::options().append(true).open(&from).unwrap();
            writer.write_all(late).unwrap();
            unlink_unchanged(&parent, OsStr::new("a"), &seen)
        })
    };
    assert_eq!(carry(b", late", &to).unwrap(), Carried::Changed);
    assert_eq!(std::fs::read(&from).unwrap(), b"first, late");
    let list = std::fs::read_to_string(root.path().join("moved.jsonl")).unwrap();
    let last = list.lines().last().unwrap();
    assert!(
        list.lines().count() == 2 && last.contains("\"kept\":true"),
        "{list}"
    );
    assert_eq!(carry(b"", &root.path().join("000001")).unwrap(), Carried::Moved);
    assert!(!from.exists());
}

#[test]
fn a_name_that_has_come_to_mean_a_pipe_or_nothing_is_left() {
    let root = tree();
    let hands = hands(root.path(), &["data/cache"]);
    let mut grounds = hands.grounds().unwrap();
    let found = hands.candidates(&mut grounds);
    let (path, to) = (root.path().join("data/cache/file"), root.path().join("000000"));
    std::fs::remove_file(&path).unwrap();
    let gone = grounds.carry(&found[0], &to, root.path()).unwrap_err();
    assert_eq!(gone.kind(), io::ErrorKind::NotFound);
    // Opening it to read would wait for a writer.
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, mode, 0).unwrap();
    assert_eq!(
        grounds.carry(&found[0], &to, root.path()).unwrap(),
        Carried::Changed
    );
    assert!(!to.exists());
}
