//! A child's output file. The child writes to it directly, not through us, so that it can go on when we end.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Opens the file for appending, readable by its owner only.
pub(super) fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

/// Once the file is past its bound, its content moves to `PATH.old` (replacing what was there) and the file begins anew. Both the
/// child and we append, so cutting the file under the child is safe; what it writes between copy and cut is lost.
pub(super) fn keep_bound(path: &Path, bytes_max: u64) -> io::Result<()> {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.len() > bytes_max => {}
        Ok(_) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    }
    std::fs::copy(path, old(path))?;
    OpenOptions::new().write(true).open(path)?.set_len(0)
}

fn old(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".old");
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_file_past_its_bound_begins_anew_and_its_content_is_kept_beside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.log");
        let mut file = open(&path).unwrap();
        file.write_all(b"12345").unwrap();
        keep_bound(&path, 5).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"12345");
        file.write_all(b"6").unwrap();
        keep_bound(&path, 5).unwrap();
        file.write_all(b"7").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"7");
        assert_eq!(std::fs::read(old(&path)).unwrap(), b"123456");
    }
}
