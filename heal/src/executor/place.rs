//! Where a directory lies, whatever names lead there: symbolic links are resolved, and a bind mount is what it shows.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

/// Where a directory lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// Its name without links.
    pub(super) path: PathBuf,
    /// `MAJOR:MINOR` of its file system.
    device: String,
    /// Its name from that file system's own root.
    inside: PathBuf,
}

impl Place {
    /// Whether one holds the other, or both are the same.
    pub(super) fn overlaps(&self, other: &Self) -> bool {
        let either = |a: &Path, b: &Path| a.starts_with(b) || b.starts_with(a);
        either(&self.path, &other.path)
            || (self.device == other.device && either(&self.inside, &other.inside))
    }

    /// Whether it is `name` in `parent`.
    pub(super) fn is_in(&self, parent: &Self, name: &str) -> bool {
        self.device == parent.device && self.inside == parent.inside.join(name)
    }
}

/// What is mounted.
#[derive(Debug)]
pub(super) struct Mounts(Vec<Place>);

impl Mounts {
    /// # Errors
    /// When the kernel does not tell.
    pub(super) fn read() -> io::Result<Self> {
        Ok(Self::parse(&std::fs::read("/proc/self/mountinfo")?))
    }

    fn parse(text: &[u8]) -> Self {
        let line = |line: &[u8]| {
            let mut fields = line.split(|byte| *byte == b' ').skip(2);
            let device = String::from_utf8_lossy(fields.next()?).into_owned();
            let inside = unescaped(fields.next()?);
            let path = unescaped(fields.next()?);
            Some(Place { path, device, inside })
        };
        Self(text.split(|byte| *byte == b'\n').filter_map(line).collect())
    }

    /// Of a name without links.
    pub(super) fn place(&self, path: &Path) -> Place {
        let depth = |mount: &&Place| mount.path.components().count();
        // The last of several on one directory is the one that is seen.
        let holds = self.0.iter().filter(|mount| path.starts_with(&mount.path));
        let Some(mount) = holds.max_by_key(depth) else {
            return Place {
                path: path.to_owned(),
                device: String::new(),
                inside: path.to_owned(),
            };
        };
        let rest = path.strip_prefix(&mount.path).unwrap_or(path);
        Place {
            path: path.to_owned(),
            device: mount.device.clone(),
            inside: mount.inside.join(rest).components().collect(),
        }
    }

    /// What is mounted on directories below.
    pub(super) fn below(&self, path: &Path) -> impl Iterator<Item = &Place> {
        self.0
            .iter()
            .filter(move |mount| mount.path != path && mount.path.starts_with(path))
    }
}

/// `\040` is a blank, and so on.
fn unescaped(text: &[u8]) -> PathBuf {
    let (mut plain, mut rest) = (Vec::new(), text);
    while let Some((byte, after)) = rest.split_first() {
        let code = after.get(..3).and_then(|octal| std::str::from_utf8(octal).ok());
        match code.and_then(|octal| u8::from_str_radix(octal, 8).ok()) {
            Some(code) if *byte == b'\\' => {
                plain.push(code);
                rest = after.get(3..).unwrap_or_default();
            }
            _ => {
                plain.push(*byte);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bind_mount_is_what_it_shows_and_blanks_are_read() {
        let mounts = Mounts::parse(
            b"1 0 8:1 / / rw - ext4 /dev/a rw\n\
              2 1 8:2 / /data rw - ext4 /dev/b rw\n\
              3 1 8:2 /kv /srv/a\\040b rw - ext4 /dev/b rw\n",
        );
        let place = |path: &str| mounts.place(Path::new(path));
        let state = place("/data/kv");
        for (path, overlaps) in [
            ("/data/kv/wal", true),
            ("/data", true),
            ("/srv/a b/cache", true),
            ("/srv/a b", true),
            ("/data/cache", false),
            ("/data/kv2", false),
            ("/srv", false),
        ] {
            assert_eq!(place(path).overlaps(&state), overlaps, "{path}");
            assert_eq!(state.overlaps(&place(path)), overlaps, "{path}");
        }
        assert!(place("/srv/a b/log").is_in(&state, "log") && !place("/data/log").is_in(&state, "log"));
        let below: Vec<&Place> = mounts.below(Path::new("/srv")).collect();
        assert!(below.len() == 1 && below[0].overlaps(&state));
    }
}
