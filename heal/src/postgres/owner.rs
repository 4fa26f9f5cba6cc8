//! The account that a data directory belongs to.

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::{PostgresError, at};
use crate::folder::Folder;

/// User and group of a data directory, and so of its server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// User id, not 0.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

impl Owner {
    /// The owner of `data_dir`, as whom we may act: it is us, or we are root.
    ///
    /// # Errors
    /// [`PostgresError::OwnedByRoot`], [`PostgresError::OtherUser`], [`PostgresError::Io`].
    pub fn of(data_dir: &Path) -> Result<Self, PostgresError> {
        let found = std::fs::metadata(data_dir).map_err(at(data_dir))?;
        let (wanted, ours) = (found.uid(), rustix::process::geteuid().as_raw());
        if wanted == 0 {
            return Err(PostgresError::OwnedByRoot {
                path: data_dir.to_owned(),
            });
        }
        if ours != 0 && ours != wanted {
            return Err(PostgresError::OtherUser {
                path: data_dir.to_owned(),
                wanted,
                ours,
            });
        }
        Ok(Self {
            uid: wanted,
            gid: found.gid(),
        })
    }

    /// Whether a process of ours has to be switched to this account.
    pub fn is_other(self) -> bool {
        rustix::process::geteuid().as_raw() != self.uid
    }

    /// Gives it a file of ours; nothing to do when it is ours already.
    ///
    /// # Errors
    /// [`PostgresError::Io`].
    pub fn take(self, path: &Path) -> Result<(), PostgresError> {
        if self.is_other() {
            std::os::unix::fs::lchown(path, Some(self.uid), Some(self.gid)).map_err(at(path))?;
        }
        Ok(())
    }

    /// The same with a directory that is open.
    pub(crate) fn take_open(self, folder: &Folder) -> Result<(), PostgresError> {
        if self.is_other() {
            folder
                .give(Path::new(""), self.uid, self.gid)
                .map_err(at(folder.path()))?;
        }
        Ok(())
    }

    /// The same with a file that is open, whatever bears its name by now.
    pub(crate) fn take_file(self, file: &File, path: &Path) -> Result<(), PostgresError> {
        if self.is_other() {
            std::os::unix::fs::fchown(file, Some(self.uid), Some(self.gid)).map_err(at(path))?;
        }
        Ok(())
    }

    /// The account's name in `/etc/passwd`, where there is one: the role that `peer` lets in.
    pub fn name(self) -> Option<String> {
        let accounts = std::fs::read_to_string("/etc/passwd").ok()?;
        accounts.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)?.parse() == Ok(self.uid)).then(|| name.to_owned())
        })
    }
}
