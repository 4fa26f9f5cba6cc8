//! How a copied tree is made durable, and at what pace.
//!
//! A service that syncs its own writes waits behind whatever else is written to the same file system at that moment: a backup of 170 MB that is
//! synced as one kept every commit of a PostgreSQL server on the same disk waiting for a fifth of a second. So a checkpoint is written out in pieces that take
//! milliseconds, with as long a pause after each as it took.

use std::fs::File;
use std::io::{self, Write};
use std::thread;
use std::time::{Duration, Instant};

use super::manifest::copy_digest;
use crate::folder::Folder;

/// How the files and folders of one copied tree get to the disk.
#[derive(Debug)]
pub(super) struct Durability {
    way: Way,
    /// Of the syncs of files and folders, where they are paced.
    synced: u32,
    spent: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Not at all: it is thrown away.
    Not,
    /// One by one, as fast as it goes.
    Each,
    /// One by one, in pieces, with pauses.
    Paced,
    /// Once, with all that the file system has to write. Where a journal commit takes long, one for each of a thousand files costs many times that.
    Whole,
}

impl Durability {
    /// For a tree that is thrown away.
    pub(super) fn not() -> Self {
        Self::of(Way::Not)
    }

    /// For a tree of `entries` that somebody waits for.
    pub(super) fn at_once(entries: usize) -> Self {
        Self::of(if entries > SYNC_EACH_MAX {
            Way::Whole
        } else {
            Way::Each
        })
    }

    /// For a tree beside a service that uses the same disk.
    pub(super) fn paced() -> Self {
        Self::of(Way::Paced)
    }

    fn of(way: Way) -> Self {
        Self {
            way,
            synced: 0,
            spent: Duration::ZERO,
        }
    }

    /// Copies one file. Bytes and SHA-256 of what was read.
    pub(super) fn copy(&mut self, from: &mut File, to: &mut File) -> io::Result<(u64, String)> {
        match self.way {
            Way::Not | Way::Whole => copy_digest(from, to),
            Way::Each => {
                let copied = copy_digest(from, to)?;
                to.sync_all()?;
                Ok(copied)
            }
            Way::Paced => {
                let copied = copy_digest(
                    from,
                    &mut Pieces {
                        file: to,
                        unsynced: 0,
                    },
                )?;
                self.timed(|| to.sync_all())?;
                Ok(copied)
            }
        }
    }

    /// Syncs a folder.
    pub(super) fn folder(&mut self, folder: &Folder) -> io::Result<()> {
        let sync = || folder.sync();
        match self.way {
            Way::Not | Way::Whole => Ok(()),
            Way::Each => sync(),
            Way::Paced => self.timed(sync),
        }
    }

    /// What is left to do when all of `tree` is written.
    pub(super) fn end(&self, tree: &Folder) -> io::Result<()> {
        if self.way == Way::Whole {
            tree.sync_file_system()?;
        }
        Ok(())
    }

    fn timed(&mut self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.spent += rested(sync)?;
        self.synced += 1;
        if self.synced >= PACED_TRIED && self.spent > SYNC_SLOW * self.synced || self.spent > PACED_MAX {
            self.way = Way::Whole;
        }
        Ok(())
    }
}

/// A file that is written out each time that a piece has come together.
struct Pieces<'a> {
    file: &'a mut File,
    unsynced: usize,
}

impl Write for Pieces<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.unsynced += written;
        if self.unsynced >= PIECE {
            rested(|| self.file.sync_data())?;
            self.unsynced = 0;
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// How long `sync` took; as long a rest follows it.
fn rested(sync: impl FnOnce() -> io::Result<()>) -> io::Result<Duration> {
    let begun = Instant::now();
    sync()?;
    let took = begun.elapsed();
    thread::sleep(took.min(REST_MAX));
    Ok(took)
}

/// Bytes that are written out at once.
const PIECE: usize = 2 << 20;
/// Longest rest after one sync.
const REST_MAX: Duration = Duration::from_millis(50);
/// Entries up to which each is synced by itself where somebody waits.
const SYNC_EACH_MAX: usize = 64;
/// Syncs after which it is asked whether they are too slow to go on one by one.
const PACED_TRIED: u32 = 64;
/// Mean time of one from which on the rest is synced as one.
const SYNC_SLOW: Duration = Duration::from_millis(5);
/// Time for all of them, of which as much again is rested, after which the rest is synced as one: a restore may wait for the copy.
const PACED_MAX: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn every_way_copies_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        let bytes: Vec<u8> = (0..=250).cycle().take(3 * PIECE + 17).collect();
        std::fs::write(&from, &bytes).unwrap();
        let mut digests = Vec::new();
        for (name, mut way) in [
            ("not", Durability::not()),
            ("each", Durability::at_once(1)),
            ("whole", Durability::at_once(1_000)),
            ("paced", Durability::paced()),
        ] {
            let to = dir.path().join(name);
            let (count, digest) = way
                .copy(&mut File::open(&from).unwrap(), &mut File::create(&to).unwrap())
                .unwrap();
            let folder = Folder::open(dir.path()).unwrap();
            way.folder(&folder).unwrap();
            way.end(&folder).unwrap();
            let mut copied = Vec::new();
            File::open(&to).unwrap().read_to_end(&mut copied).unwrap();
            assert!(copied == bytes && count == bytes.len() as u64, "{name}");
            digests.push(digest);
        }
        digests.dedup();
        assert_eq!(digests.len(), 1);
    }

    #[test]
    fn a_paced_copy_never_leaves_more_than_a_piece_unsynced() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = File::create(dir.path().join("f")).unwrap();
        let mut pieces = Pieces {
            file: &mut file,
            unsynced: 0,
        };
        let block = vec![7; 256 << 10];
        for _ in 0..40 {
            pieces.write_all(&block).unwrap();
            assert!(pieces.unsynced < PIECE);
        }
    }

    #[test]
    fn slow_syncs_are_given_up_for_one_at_the_end() {
        let mut fast = Durability::paced();
        let mut slow = Durability::paced();
        for _ in 0..PACED_TRIED {
            fast.timed(|| Ok(())).unwrap();
            slow.spent += 2 * SYNC_SLOW;
            slow.timed(|| Ok(())).unwrap();
        }
        assert_eq!((fast.way, slow.way), (Way::Paced, Way::Whole));
        // Each of them fast, and far too many.
        let mut many = Durability::paced();
        many.synced = 100_000;
        many.spent = PACED_MAX + Duration::from_nanos(1);
        many.timed(|| Ok(())).unwrap();
        assert_eq!(many.way, Way::Whole);
    }
}
