//! A directory held open, and what is in it reached from there. No symbolic link is followed on the way, so that whoever can write in it
//! cannot lead a healer that is root elsewhere.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata, Permissions};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Dir, FileType, FlockOperation, Mode, OFlags, flock, mkdirat, openat, readlinkat, statat,
    symlinkat, unlinkat,
};

/// A directory, and the name that it was opened by, which is for people: it may lead elsewhere by now.
#[derive(Debug)]
pub(crate) struct Folder {
    fd: OwnedFd,
    path: PathBuf,
}

impl Folder {
    /// Opens one whose own name may not be a link.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Self::of(rustix::fs::open(path, DIRECTORY, Mode::empty())?, path)
    }

    /// Opens one that may be named by a link, as a person may have made it.
    pub(crate) fn open_named(path: &Path) -> io::Result<Self> {
        let flags = DIRECTORY.difference(OFlags::NOFOLLOW);
        Self::of(rustix::fs::open(path, flags, Mode::empty())?, path)
    }

    #[expect(clippy::unnecessary_wraps, reason = "each caller returns it")]
    fn of(fd: OwnedFd, path: &Path) -> io::Result<Self> {
        let path = path.to_owned();
        Ok(Self { fd, path })
    }

    /// Opens a directory below, name by name.
    pub(crate) fn enter(&self, below: &Path) -> io::Result<Self> {
        let mut fd = self.fd.try_clone()?;
        for name in below.components() {
            fd = openat(&fd, name.as_os_str(), DIRECTORY, Mode::empty())?;
        }
        Self::of(fd, &self.path_of(below))
    }

    /// What it was opened as.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What `below` is called, for people.
    pub(crate) fn path_of(&self, below: impl AsRef<Path>) -> PathBuf {
        // Joining an empty path would leave a slash at the end.
        if below.as_ref().as_os_str().is_empty() {
            self.path.clone()
        } else {
            self.path.join(below)
        }
    }

    pub(crate) fn metadata(&self) -> io::Result<Metadata> {
        File::from(self.fd.try_clone()?).metadata()
    }

    /// Whether it belongs to us.
    pub(crate) fn is_ours(&self) -> io::Result<bool> {
        Ok(self.metadata()?.uid() == rustix::process::geteuid().as_raw())
    }

    /// What is called so in it, itself and not where it leads.
    pub(crate) fn look(&self, name: impl AsRef<OsStr>) -> io::Result<Metadata> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        File::from(openat(&self.fd, name.as_ref(), flags, Mode::empty())?).metadata()
    }

    /// Opens a regular file in it for reading.
    pub(crate) fn file(&self, name: impl AsRef<OsStr>) -> io::Result<File> {
        // Without waiting for the other end of a pipe that has come to bear the name.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = File::from(openat(&self.fd, name.as_ref(), flags, Mode::empty())?);
        if !file.metadata()?.is_file() {
            let words = "it is no regular file";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, words));
        }
        Ok(file)
    }

    /// Makes a file (mode 0600) where nothing is, for reading and appending or writing.
    pub(crate) fn create(&self, below: impl AsRef<Path>) -> io::Result<File> {
        let flags = OFlags::RDWR
            | OFlags::APPEND
            | OFlags::CREATE
            | OFlags::EXCL
            | OFlags::NOFOLLOW
            | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        Ok(File::from(openat(&self.fd, below.as_ref(), flags, mode)?))
    }

    /// Makes a directory (mode 0700) where nothing is.
    pub(crate) fn make(&self, below: impl AsRef<Path>) -> io::Result<Self> {
        let below = below.as_ref();
        mkdirat(&self.fd, below, Mode::RWXU)?;
        Self::of(
            openat(&self.fd, below, DIRECTORY, Mode::empty())?,
            &self.path_of(below),
        )
    }

    pub(crate) fn link(&self, target: &Path, below: &Path) -> io::Result<()> {
        Ok(symlinkat(target, &self.fd, below)?)
    }

    pub(crate) fn read_link(&self, name: &OsStr) -> io::Result<PathBuf> {
        let target = readlinkat(&self.fd, name, Vec::new())?;
        Ok(OsString::from_vec(target.into_bytes()).into())
    }

    /// The names in it, in order.
    pub(crate) fn names(&self) -> io::Result<Vec<OsString>> {
        let mut found = Vec::new();
        for entry in Dir::read_from(self.fd.as_fd())? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if !matches!(name, b"." | b"..") {
                found.push(OsStr::from_bytes(name).to_owned());
            }
        }
        found.sort();
        Ok(found)
    }

    /// Removes a file or a link; whether it was there.
    pub(crate) fn remove(&self, name: impl AsRef<OsStr>) -> io::Result<bool> {
        match unlinkat(&self.fd, name.as_ref(), AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::NOENT) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes all that is in it. Directories far below each other are an error: nobody who means well makes them.
    pub(crate) fn clear(&self) -> io::Result<()> {
        self.clear_below(DEPTH_MAX)
    }

    fn clear_below(&self, depth: u32) -> io::Result<()> {
        for name in self.names()? {
            let found = statat(&self.fd, &name, AtFlags::SYMLINK_NOFOLLOW)?;
            if FileType::from_raw_mode(found.st_mode) != FileType::Directory {
                self.remove(&name)?;
                continue;
            }
            let deeper = depth.checked_sub(1).ok_or(io::ErrorKind::InvalidInput)?;
            self.enter(Path::new(&name))?.clear_below(deeper)?;
            unlinkat(&self.fd, &name, AtFlags::REMOVEDIR)?;
        }
        Ok(())
    }

    /// Gives it or, with a name, what is below it to an account; a link itself and not where it leads.
    pub(crate) fn give(&self, below: &Path, uid: u32, gid: u32) -> io::Result<()> {
        if below.as_os_str().is_empty() {
            return std::os::unix::fs::fchown(&self.fd, Some(uid), Some(gid));
        }
        let (uid, gid) = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid));
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        Ok(rustix::fs::chownat(&self.fd, below, Some(uid), Some(gid), flags)?)
    }

    pub(crate) fn set_mode(&self, mode: u32) -> io::Result<()> {
        File::from(self.fd.try_clone()?).set_permissions(Permissions::from_mode(mode & 0o7777))
    }

    /// Locks it until it is unlocked or closed; `false` where somebody else has.
    pub(crate) fn lock(&self) -> io::Result<bool> {
        match flock(&self.fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    pub(crate) fn unlock(&self) -> io::Result<()> {
        Ok(flock(&self.fd, FlockOperation::Unlock)?)
    }

    /// Writes out all that its file system has to write.
    pub(crate) fn sync_file_system(&self) -> io::Result<()> {
        Ok(rustix::fs::syncfs(&self.fd)?)
    }

    pub(crate) fn sync(&self) -> io::Result<()> {
        File::from(self.fd.try_clone()?).sync_all()
    }
}

/// How a directory is opened.
pub(crate) const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);
const DEPTH_MAX: u32 = 16;

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn no_link_below_it_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("inside"), dir.path().join("outside"));
        fs::create_dir(&inside).unwrap();
        fs::create_dir_all(outside.join("deep")).unwrap();
        fs::write(outside.join("file"), "precious").unwrap();
        std::os::unix::fs::symlink(&outside, inside.join("folder")).unwrap();
        std::os::unix::fs::symlink(outside.join("file"), inside.join("name")).unwrap();
        let folder = Folder::open(&inside).unwrap();
        assert!(Folder::open(&inside.join("folder")).is_err());
        assert!(folder.enter(Path::new("folder")).is_err());
        assert!(folder.enter(Path::new("folder/deep")).is_err());
        assert!(folder.file("name").is_err() && folder.create("name").is_err());
        assert!(folder.look(OsStr::new("name")).unwrap().is_symlink());
        fs::create_dir_all(inside.join("a/b")).unwrap();
        fs::write(inside.join("a/b/c"), "").unwrap();
        folder.clear().unwrap();
        assert_eq!(folder.names().unwrap(), Vec::<OsString>::new());
        assert_eq!(fs::read_to_string(outside.join("file")).unwrap(), "precious");
        assert!(outside.join("deep").is_dir());
    }

    #[test]
    fn a_pipe_is_no_file_and_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            dir.path().join("pipe"),
            FileType::Fifo,
            Mode::RUSR,
            0,
        )
        .unwrap();
        assert!(Folder::open(dir.path()).unwrap().file("pipe").is_err());
    }
}
