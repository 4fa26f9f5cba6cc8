//! Trees of files: walked, copied and written without following a link.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use super::verify::differs;
use super::{CheckpointError, TREE, at, full_or, joined};
use crate::checkpoint::durable::Durability;
use crate::checkpoint::manifest::{Entry, Kind, Manifest};
use crate::folder::Folder;

/// Copies what was found. Whose it is and what may be done with it is read from what is opened: by now another may have its name.
pub(in crate::checkpoint) fn copy_walked(
    from: &Folder,
    walked: Vec<(PathBuf, fs::Metadata)>,
    to: &Path,
) -> Result<Vec<Entry>, CheckpointError> {
    let tree = make_top(to)?;
    let mut entries = Vec::new();
    let mut folders = Vec::new();
    let mut sync = Durability::paced();
    let mut within = Within::of(from)?;
    for (path, seen) in walked {
        let full = from.path_of(&path);
        let Some(name) = path.file_name() else {
            let metadata = from.metadata().map_err(at(&full))?;
            folders.push(Made::new(&path, &metadata));
            entries.push(Entry::new(path, Kind::Folder, &metadata));
            continue;
        };
        let parent = within.parent(&path)?;
        let mut metadata = parent.look(name).map_err(at(&full))?;
        if metadata.file_type() != seen.file_type() {
            return Err(exchanged(&full));
        }
        let kind = if metadata.is_dir() {
            tree.make(&path).map_err(|error| full_or(&full, error))?;
            folders.push(Made::new(&path, &metadata));
            Kind::Folder
        } else if metadata.is_symlink() {
            let target = parent.read_link(name).map_err(at(&full))?;
            tree.link(&target, &path).map_err(|error| full_or(&full, error))?;
            Kind::Link { target }
        } else {
            let mut source = parent.file(name).map_err(or_exchanged(&full))?;
            metadata = source.metadata().map_err(at(&full))?;
            let (kind, copy) = copy_file(&mut source, &tree, &path, &mut sync)?;
            copy.set_permissions(fs::Permissions::from_mode(metadata.mode() & 0o7777))
                .map_err(at(&full))?;
            kind
        };
        entries.push(Entry::new(path, kind, &metadata));
    }
    seal(&tree, &folders, &mut sync)?;
    sync.end(&tree).map_err(|error| full_or(to, error))?;
    Ok(entries)
}

/// The directory that the entries of a walk lie in, which follow each other by directory.
pub(in crate::checkpoint) struct Within<'a> {
    top: &'a Folder,
    below: PathBuf,
    folder: Folder,
}

impl<'a> Within<'a> {
    pub(in crate::checkpoint) fn of(top: &'a Folder) -> Result<Self, CheckpointError> {
        let below = PathBuf::new();
        let folder = top.enter(&below).map_err(at(top.path()))?;
        Ok(Self { top, below, folder })
    }

    pub(in crate::checkpoint) fn parent(&mut self, path: &Path) -> Result<&Folder, CheckpointError> {
        let below = path.parent().unwrap_or(Path::new(""));
        if below != self.below {
            self.folder = self
                .top
                .enter(below)
                .map_err(or_exchanged(&self.top.path_of(below)))?;
            below.clone_into(&mut self.below);
        }
        Ok(&self.folder)
    }
}

/// What changes while it is copied is copied anew, as what vanishes is.
pub(in crate::checkpoint) fn exchanged(path: &Path) -> CheckpointError {
    let words = "it was exchanged for something else while it was read";
    at(path)(io::Error::new(io::ErrorKind::NotFound, words))
}

/// A link or a file where there was a directory, or a link where there was a file.
pub(in crate::checkpoint) fn or_exchanged(path: &Path) -> impl FnOnce(io::Error) -> CheckpointError + use<> {
    let path = path.to_owned();
    move |error| match rustix::io::Errno::from_io_error(&error) {
        Some(rustix::io::Errno::LOOP | rustix::io::Errno::NOTDIR) => exchanged(&path),
        _ => at(&path)(error),
    }
}

/// Every entry under `dir`, itself first with an empty path; a folder comes before its content, names in order.
pub(in crate::checkpoint) fn walk(
    dir: &Path,
    max: usize,
) -> Result<Vec<(PathBuf, fs::Metadata)>, CheckpointError> {
    walk_in(&Folder::open_named(dir).map_err(at(dir))?, max)
}

/// The same of a directory that is open.
pub(in crate::checkpoint) fn walk_in(
    top: &Folder,
    max: usize,
) -> Result<Vec<(PathBuf, fs::Metadata)>, CheckpointError> {
    let mut found = vec![(PathBuf::new(), top.metadata().map_err(at(top.path()))?)];
    let mut at_entry = 0;
    while at_entry < found.len() {
        let (path, metadata) = found[at_entry].clone();
        at_entry += 1;
        if !metadata.is_dir() {
            continue;
        }
        let full = top.path_of(&path);
        let folder = top.enter(&path).map_err(or_exchanged(&full))?;
        for name in folder.names().map_err(at(&full))? {
            let (path, full) = (path.join(&name), full.join(&name));
            let metadata = folder.look(&name).map_err(at(&full))?;
            if path.to_str().is_none() {
                let source = io::Error::new(io::ErrorKind::InvalidInput, "the name is not UTF-8");
                return Err(CheckpointError::Io { path: full, source });
            }
            if metadata.is_dir() || metadata.is_file() || metadata.is_symlink() {
                found.push((path, metadata));
            }
            if found.len() > max {
                return Err(CheckpointError::TooManyEntries {
                    path: top.path().to_owned(),
                    max,
                });
            }
        }
    }
    Ok(found)
}

/// Makes the top of a tree that is written, which nobody but us may enter until it is whole.
pub(in crate::checkpoint) fn make_top(to: &Path) -> Result<Folder, CheckpointError> {
    DirBuilder::new()
        .mode(0o700)
        .create(to)
        .map_err(|error| full_or(to, error))?;
    let top = Folder::open(to).map_err(at(to))?;
    if !top.is_ours().map_err(at(to))? {
        return Err(exchanged(to));
    }
    Ok(top)
}

pub(in crate::checkpoint) fn copy_file(
    source: &mut File,
    to: &Folder,
    below: &Path,
    sync: &mut Durability,
) -> Result<(Kind, File), CheckpointError> {
    let full = to.path_of(below);
    let mut copy = to.create(below).map_err(|error| full_or(&full, error))?;
    let (bytes, sha256) = sync
        .copy(source, &mut copy)
        .map_err(|error| full_or(&full, error))?;
    Ok((Kind::File { bytes, sha256 }, copy))
}

/// A folder that was made, and what it is to be in the end.
pub(in crate::checkpoint) struct Made {
    below: PathBuf,
    mode: u32,
    /// User and group, where it is not to stay ours.
    owner: Option<(u32, u32)>,
}

impl Made {
    fn new(below: &Path, metadata: &fs::Metadata) -> Self {
        Self {
            below: below.to_owned(),
            mode: metadata.mode(),
            owner: None,
        }
    }
}

/// Gives folders away and syncs them where that is done one by one, innermost first: whom they are given to can enter none of them before all of it is
/// done, since the top comes last.
pub(in crate::checkpoint) fn seal(
    top: &Folder,
    folders: &[Made],
    sync: &mut Durability,
) -> Result<(), CheckpointError> {
    for made in folders.iter().rev() {
        let full = top.path_of(&made.below);
        let folder = top.enter(&made.below).map_err(at(&full))?;
        if let Some((uid, gid)) = made.owner {
            give(&folder, Path::new(""), uid, gid).map_err(at(&full))?;
        }
        folder.set_mode(made.mode).map_err(at(&full))?;
        sync.folder(&folder).map_err(at(&full))?;
    }
    Ok(())
}

/// Nothing to do when it is that account's already: who is not root may give nothing away.
pub(in crate::checkpoint) fn give(folder: &Folder, below: &Path, uid: u32, gid: u32) -> io::Result<()> {
    let found = if below.as_os_str().is_empty() {
        folder.metadata()?
    } else {
        folder.look(below.as_os_str())?
    };
    if (found.uid(), found.gid()) == (uid, gid) {
        return Ok(());
    }
    folder.give(below, uid, gid)
}

/// Writes the checkpoint at `from` to `to`, comparing each digest once more on the way. Whoever is given it can enter it when it is whole.
pub(in crate::checkpoint) fn write_tree(
    from: &Path,
    manifest: &Manifest,
    to: &Path,
    mut sync: Durability,
) -> Result<(), CheckpointError> {
    let tree = from.join(TREE);
    let top = make_top(to)?;
    let mut folders = Vec::new();
    for entry in &manifest.entries {
        let (source, full) = (joined(&tree, &entry.path), top.path_of(&entry.path));
        match &entry.kind {
            Kind::Folder => {
                if !entry.path.as_os_str().is_empty() {
                    top.make(&entry.path).map_err(|error| full_or(&full, error))?;
                }
                folders.push(Made {
                    below: entry.path.clone(),
                    mode: entry.mode,
                    owner: Some((entry.uid, entry.gid)),
                });
            }
            Kind::Link { target } => {
                top.link(target, &entry.path)
                    .map_err(|error| full_or(&full, error))?;
                give(&top, &entry.path, entry.uid, entry.gid).map_err(at(&full))?;
            }
            Kind::File { .. } => {
                let mut source = File::open(&source).map_err(at(&source))?;
                let (found, copy) = copy_file(&mut source, &top, &entry.path, &mut sync)?;
                differs(from, entry, &found)?;
                // In this order: a change of owner takes `setuid` away.
                give(&top, &entry.path, entry.uid, entry.gid).map_err(at(&full))?;
                copy.set_permissions(fs::Permissions::from_mode(entry.mode & 0o7777))
                    .map_err(at(&full))?;
            }
        }
    }
    seal(&top, &folders, &mut sync)?;
    sync.end(&top).map_err(|error| full_or(to, error))
}
