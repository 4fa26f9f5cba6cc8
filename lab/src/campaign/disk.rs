//! File systems of the wards: in memory, or on a loop device in memory, which can be made slow.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Bytes a second of a slow disk, each way.
const SLOW: u64 = 64 << 10;
/// Where version 1 of the control groups has its throttle.
const CONTROLLER: &str = "/sys/fs/cgroup/blkio";

/// A file system in memory of so many bytes.
pub(super) fn mount_memory(at: &Path, bytes: u64) -> io::Result<()> {
    let options = format!("size={bytes},mode=0755");
    done(
        Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "theriac-campaign"])
            .arg(at),
        "cannot mount a file system in memory",
    )
}

/// An ext4 file system of so many bytes on a loop device, whose file lies in memory at `below`: it is as fast as memory until it is made slow.
pub(super) fn mount_loop(below: &Path, at: &Path, bytes: u64) -> io::Result<()> {
    std::fs::create_dir(below)?;
    mount_memory(below, bytes + (8 << 20))?;
    let image = below.join("image");
    std::fs::File::create(&image)?.set_len(bytes)?;
    let mut make = Command::new("mkfs.ext4");
    make.args([
        "-q",
        "-F",
        "-m",
        "0",
        "-O",
        "^resize_inode",
        "-E",
        "lazy_itable_init=0,lazy_journal_init=0",
    ])
    .arg(&image);
    done(&mut make, "cannot make a file system")?;
    // The device goes with the mount.
    done(
        Command::new("mount")
            .args(["-t", "ext4", "-o", "loop"])
            .arg(&image)
            .arg(at),
        "cannot mount a loop device",
    )
}

/// Whether a disk can be made slow here.
pub(super) fn is_possible() -> Result<(), String> {
    let missing = ["mkfs.ext4", "losetup"]
        .into_iter()
        .find(|program| !super::fault::is_on_path(program));
    if let Some(program) = missing {
        return Err(format!("`{program}` is not on PATH"));
    }
    if !Path::new("/dev/loop-control").exists() {
        return Err("there are no loop devices".to_owned());
    }
    match throttles() {
        Ok(files) if files.iter().all(|file| file.is_file()) => Ok(()),
        _ => {
            Err("version 1 of the blkio controller is not mounted: nothing would slow the device".to_owned())
        }
    }
}

/// Slows the device under a mounted file system, or takes that back. It is a limit on this process's own group, in which the services are too.
pub(super) fn slow(mounted: &Path, on: bool) -> io::Result<()> {
    let device = std::fs::metadata(mounted)?.dev();
    let rule = format!(
        "{}:{} {}",
        rustix::fs::major(device),
        rustix::fs::minor(device),
        if on { SLOW } else { 0 }
    );
    for file in throttles()? {
        std::fs::write(file, &rule)?;
    }
    Ok(())
}

/// The throttle's files, reading and writing, of the group in which this process is.
fn throttles() -> io::Result<[PathBuf; 2]> {
    let groups = std::fs::read_to_string("/proc/self/cgroup")?;
    let own = groups
        .lines()
        .find_map(|line| line.split_once(":blkio:"))
        .map(|(_, path)| path.trim_start_matches('/'))
        .ok_or_else(|| io::Error::other("this process is in no group of the blkio controller"))?;
    let group = Path::new(CONTROLLER).join(own);
    Ok(["read", "write"].map(|way| group.join(format!("blkio.throttle.{way}_bps_device"))))
}

fn done(command: &mut Command, what: &str) -> io::Result<()> {
    let out = command.output()?;
    if out.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&out.stderr);
    Err(io::Error::other(format!("{what}: {}", said.trim())))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::super::undo::unmount_all;
    use super::*;

    #[test]
    fn a_slow_disk_takes_its_time_and_a_campaign_that_is_taken_back_leaves_no_rule() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("left out: this account may mount nothing");
            return;
        }
        if let Err(why) = is_possible() {
            eprintln!("left out: {why}");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (below, at) = (dir.path().join("below"), dir.path().join("disk"));
        std::fs::create_dir(&at).unwrap();
        mount_loop(&below, &at, 32 << 20).unwrap();
        let device = std::fs::metadata(&at).unwrap().dev();
        let name = format!("{}:{} ", rustix::fs::major(device), rustix::fs::minor(device));
        let rules = || -> String {
            let read = |file: &PathBuf| std::fs::read_to_string(file).unwrap();
            throttles().unwrap().iter().map(read).collect()
        };
        slow(&at, true).unwrap();
        assert!(rules().contains(&format!("{name}{SLOW}")), "{}", rules());
        let begun = std::time::Instant::now();
        let mut file = std::fs::File::create(at.join("written")).unwrap();
        file.write_all(&vec![7; 128 << 10]).unwrap();
        file.sync_all().unwrap();
        drop(file);
        let took = begun.elapsed();
        unmount_all(dir.path()).unwrap();
        assert!(
            !rules().lines().any(|line| line.starts_with(&name)),
            "{}",
            rules()
        );
        // Two seconds' worth, of which the first is let through in parts.
        assert!(took.as_millis() >= 500, "128 KiB at 64 KiB/s in {took:?}");
    }
}
