//! Which files some process holds open, or mapped, for writing: what it wrote after such a file lost its name would be gone.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// Device and inode.
pub(super) type FileId = (u64, u64);

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// Those of the wanted files that are held.
    pub(super) files: BTreeSet<FileId>,
    /// Processes that could not be looked into.
    pub(super) unseen: u64,
}

/// Looks through every process. Takes time in the order of 10 µs a descriptor.
///
/// # Errors
/// When `/proc` cannot be read.
pub(super) fn held_for_writing(wanted: &BTreeSet<FileId>) -> io::Result<Held> {
    let mut held = Held::default();
    if wanted.is_empty() {
        return Ok(held);
    }
    for entry in std::fs::read_dir("/proc")? {
        let Ok(entry) = entry else { continue };
        let is_process = entry
            .file_name()
            .as_encoded_bytes()
            .iter()
            .all(u8::is_ascii_digit);
        if is_process && let Err(error) = look_into(&entry.path(), wanted, &mut held.files) {
            // One that has ended meanwhile holds nothing.
            let ended = error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(ESRCH);
            held.unseen += u64::from(!ended);
        }
    }
    Ok(held)
}

fn look_into(process: &Path, wanted: &BTreeSet<FileId>, files: &mut BTreeSet<FileId>) -> io::Result<()> {
    for entry in std::fs::read_dir(process.join("fd"))? {
        let name = entry?.file_name();
        // A descriptor may be closed at any time.
        let Ok(info) = std::fs::read_to_string(process.join("fdinfo").join(&name)) else {
            continue;
        };
        let field = |key: &str| {
            info.lines()
                .find_map(|line| line.strip_prefix(key))
                .map(str::trim)
        };
        let flags = field("flags:").and_then(|flags| u32::from_str_radix(flags, 8).ok());
        if flags.is_some_and(|flags| flags & ACCESS == 0) {
            continue;
        }
        // Linux 5.14 and later tell it here, without a question to the file's own file system.
        let inode: Option<u64> = field("ino:").and_then(|inode| inode.parse().ok());
        if inode.is_some_and(|inode| !wanted.iter().any(|(_, wanted)| *wanted == inode)) {
            continue;
        }
        if let Ok(found) = std::fs::metadata(process.join("fd").join(&name)) {
            files.extend(wanted.get(&(found.dev(), found.ino())));
        }
    }
    for line in std::fs::read_to_string(process.join("maps"))?.lines() {
        files.extend(mapped(line).and_then(|id| wanted.get(&id)));
    }
    Ok(())
}

/// The file of one line of `maps`, if it is shared and may be written.
fn mapped(line: &str) -> Option<FileId> {
    let mut fields = line.split_ascii_whitespace();
    let permissions = fields.nth(1)?.as_bytes();
    if permissions.get(1) != Some(&b'w') || permissions.get(3) != Some(&b's') {
        return None;
    }
    let (major, minor) = fields.nth(1)?.split_once(':')?;
    let number = |text| u32::from_str_radix(text, 16).ok();
    let device = rustix::fs::makedev(number(major)?, number(minor)?);
    Some((device, fields.next()?.parse().ok()?))
}

/// `O_WRONLY | O_RDWR`
const ACCESS: u32 = 3;
const ESRCH: i32 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_open_for_writing_is_found_and_one_that_is_read_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let id = |name: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, b"x").unwrap();
            let found = std::fs::metadata(&path).unwrap();
            (path, (found.dev(), found.ino()))
        };
        let ((written, written_id), (read, read_id), (_, idle_id)) = (id("written"), id("read"), id("idle"));
        let writer = std::fs::File::options().append(true).open(written).unwrap();
        let reader = std::fs::File::open(read).unwrap();
        let wanted = BTreeSet::from([written_id, read_id, idle_id]);
        let held = held_for_writing(&wanted).unwrap();
        assert_eq!(held.files, BTreeSet::from([written_id]));
        drop((writer, reader));
        assert!(held_for_writing(&wanted).unwrap().files.is_empty());
    }

    #[test]
    fn only_a_shared_mapping_that_may_be_written_counts() {
        let line = |permissions: &str| format!("7f0-7f1 {permissions} 00000000 fe:01 4242   /var/cache/a b");
        assert_eq!(mapped(&line("rw-s")), Some((rustix::fs::makedev(0xfe, 1), 4242)));
        assert!(mapped(&line("rw-p")).is_none() && mapped(&line("r--s")).is_none());
        assert!(mapped("nonsense").is_none());
    }
}
