//! The ledger's file: an append-only chain of records, each sealed with a hash of itself and of all before it.
//!
//! ```text
//! file    "THRCLEDG"  version u32 LE = 2  record*
//! record  length u32 LE   !length u32 LE   body (length bytes)   head (32 bytes)
//! head    SHA-256("theriac ledger v1\n" ‖ head of the record before ‖ length ‖ body); before the first record stands the SHA-256 of
//!         the file's header (version 1: zeros)
//! ```
//!
//! Version 2 says that the file may hold charges by Rényi order. A file of version 1 is read and continued as it is: its
//! header is never rewritten.
//!
//! The inverted length tells a record that was cut short by a crash, which is the only damage that is repaired, from a
//! length that was changed. A missing tail of whole records cannot be seen here: the aggregator, which keeps the head
//! and the count, sees it.

use std::fmt;
use std::fs::File;
use std::io::{self, Write as _};

use sha2::{Digest as _, Sha256};
use theriac_protocol::units::Digest;

/// Where the chain's bytes are kept.
pub(crate) trait Storage: fmt::Debug + Send {
    /// Appends all of `bytes`; on an error any prefix of them may have been written.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Returns once everything appended is durable.
    fn sync(&mut self) -> io::Result<()>;
    /// Cuts back to `length` bytes.
    fn truncate(&mut self, length: u64) -> io::Result<()>;
}

impl Storage for File {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        #[cfg(feature = "failpoints")]
        if crate::failpoint::is_installed() {
            let (first, second) = bytes.split_at(bytes.len() / 2);
            reached("before the append");
            self.write_all(first)?;
            reached("half an append");
            self.write_all(second)?;
            reached("appended");
            return Ok(());
        }
        self.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()?;
        reached("synced");
        Ok(())
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.set_len(length)?;
        reached("cut");
        Ok(())
    }
}

/// A durable step was made; see [`crate::failpoint`].
#[cfg(feature = "failpoints")]
pub(super) use crate::failpoint::reached;

/// Nothing: no test can stop a shipped program here.
#[cfg(not(feature = "failpoints"))]
pub(super) fn reached(_step: &'static str) {}

/// Damage that is not repaired.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Damage {
    /// Where in the file.
    pub(crate) offset: u64,
    /// What is wrong.
    pub(crate) what: &'static str,
}

/// A chain as it was read.
#[derive(Debug)]
pub(crate) struct Read<'a> {
    /// Of the file's format.
    pub(crate) version: u32,
    /// Body and head of each record, and the offset where it begins.
    pub(crate) records: Vec<(u64, &'a [u8], Digest)>,
    /// Bytes up to the end of the last complete record.
    pub(crate) length: u64,
    /// Bytes of an incomplete last record.
    pub(crate) torn: u64,
}

/// Bytes before the first record.
pub(crate) fn file_header() -> Vec<u8> {
    header(VERSION)
}

fn header(version: u32) -> Vec<u8> {
    [MAGIC, &version.to_le_bytes()].concat()
}

/// What stands in the place of a head before the first record.
pub(crate) fn origin(version: u32) -> Option<Digest> {
    match version {
        1 => Some(Digest::default()),
        VERSION => Some(Digest::of(&header(version))),
        _ => None,
    }
}

/// Reads and checks a whole file.
pub(crate) fn read(file: &[u8]) -> Result<Read<'_>, Damage> {
    let damage = |offset: usize, what| Damage {
        offset: offset as u64,
        what,
    };
    let Some(rest) = file.strip_prefix(MAGIC) else {
        return Err(damage(0, "this is no ledger: it does not begin with THRCLEDG"));
    };
    let version = rest
        .first_chunk::<4>()
        .map(|version| u32::from_le_bytes(*version));
    let Some((version, mut head)) = version.and_then(|version| Some((version, origin(version)?))) else {
        return Err(damage(
            MAGIC.len(),
            "this build knows only versions 1 and 2 of the ledger's format",
        ));
    };
    let mut records = Vec::new();
    let mut offset = MAGIC.len() + 4;
    let torn = loop {
        let rest = &file[offset..];
        let Some((prefix, after)) = rest.split_first_chunk::<8>() else {
            break rest.len();
        };
        let [l0, l1, l2, l3, n0, n1, n2, n3] = *prefix;
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        if length != !u32::from_le_bytes([n0, n1, n2, n3]) || length > RECORD_BYTES_MAX {
            return Err(damage(offset, "a record's length is damaged"));
        }
        let Some((body, after)) = after.split_at_checked(length as usize) else {
            break rest.len();
        };
        let Some((found, _)) = after.split_first_chunk::<32>() else {
            break rest.len();
        };
        head = seal(head, body);
        if head != Digest(*found) {
            return Err(damage(
                offset,
                "a record was changed, removed, added or moved: its hash does not fit",
            ));
        }
        records.push((offset as u64, body, head));
        offset += prefix.len() + body.len() + found.len();
    };
    Ok(Read {
        version,
        records,
        length: offset as u64,
        torn: torn as u64,
    })
}

/// The end of a chain, ready to append to.
#[derive(Debug)]
pub(crate) struct Chain {
    storage: Box<dyn Storage>,
    length: u64,
    heads: Vec<Digest>,
    /// After a failed sync or a failed repair nobody knows what is on the disk.
    broken: bool,
}

impl Chain {
    /// Takes over `storage`, whose first `length` bytes hold records with these heads.
    pub(crate) fn new(storage: Box<dyn Storage>, length: u64, heads: Vec<Digest>) -> Self {
        Self {
            storage,
            length,
            heads,
            broken: false,
        }
    }

    /// Head of every record, oldest first.
    pub(crate) fn heads(&self) -> &[Digest] {
        &self.heads
    }

    /// Head of the last record; all zero when there is none.
    pub(crate) fn head(&self) -> Digest {
        self.heads.last().copied().unwrap_or_default()
    }

    /// Whether an earlier failure forbids appending.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken
    }

    /// Forbids appending from here on.
    pub(crate) fn break_off(&mut self) {
        self.broken = true;
    }

    /// Appends a record and returns once it is durable. On an error nothing is appended.
    pub(crate) fn append(&mut self, body: &[u8]) -> io::Result<()> {
        let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
        if length > RECORD_BYTES_MAX {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                "the record is longer than 16 MiB",
            ));
        }
        let head = seal(self.head(), body);
        let record = encode(body, head);
        if let Err(error) = self.storage.append(&record) {
            let repaired = self
                .storage
                .truncate(self.length)
                .and_then(|()| self.storage.sync());
            self.broken = repaired.is_err();
            return Err(error);
        }
        if let Err(error) = self.storage.sync() {
            // The kernel may have dropped the pages: only reading the file again tells what is there.
            self.broken = true;
            return Err(error);
        }
        self.length += record.len() as u64;
        self.heads.push(head);
        Ok(())
    }
}

/// A record's bytes.
fn encode(body: &[u8], head: Digest) -> Vec<u8> {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the caller holds the body to RECORD_BYTES_MAX"
    )]
    let length = body.len() as u32;
    [&length.to_le_bytes(), &(!length).to_le_bytes(), body, &head.0].concat()
}

pub(crate) fn seal(before: Digest, body: &[u8]) -> Digest {
    let hash = Sha256::new()
        .chain_update(b"theriac ledger v1\n")
        .chain_update(before.0)
        .chain_update((body.len() as u64).to_le_bytes())
        .chain_update(body);
    Digest(hash.finalize().into())
}

/// A file holding these records; the head of each is computed.
pub(crate) fn file_of(bodies: &[Vec<u8>]) -> Vec<u8> {
    file_of_version(VERSION, bodies)
}

/// As [`file_of`], in an older format.
pub(crate) fn file_of_version(version: u32, bodies: &[Vec<u8>]) -> Vec<u8> {
    let mut file = header(version);
    let mut head = origin(version).unwrap_or_default();
    for body in bodies {
        head = seal(head, body);
        file.extend(encode(body, head));
    }
    file
}

const MAGIC: &[u8] = b"THRCLEDG";
pub(crate) const VERSION: u32 = 2;
/// A charge of the largest plan whose blocks are all apart stays below it.
const RECORD_BYTES_MAX: u32 = 16 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn bodies() -> Vec<Vec<u8>> {
        ["genesis", "a charge", "", "another charge, a longer one"]
            .map(|b| b.as_bytes().to_vec())
            .to_vec()
    }

    fn read_back(file: &[u8]) -> Result<Vec<Vec<u8>>, Damage> {
        read(file).map(|read| read.records.iter().map(|(_, body, _)| body.to_vec()).collect())
    }

    #[test]
    fn every_flipped_bit_is_found() {
        for version in [1, 2] {
            let file = file_of_version(version, &bodies());
            for bit in 0..file.len() * 8 {
                let mut damaged = file.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                assert!(
                    read(&damaged).is_err(),
                    "version {version}, bit {bit} was flipped unseen"
                );
            }
        }
    }

    #[test]
    fn the_version_cannot_be_changed() {
        for (from, to) in [(1_u8, 2), (2, 1)] {
            let mut file = file_of_version(from.into(), &bodies());
            file[MAGIC.len()] = to;
            assert!(read(&file).is_err(), "version {from} was read as {to}");
        }
    }

    #[test]
    fn a_cut_at_any_byte_keeps_exactly_the_complete_records() {
        let bodies = bodies();
        let file = file_of(&bodies);
        let mut complete = 0;
        for length in file_header().len()..=file.len() {
            while complete < bodies.len() && length >= file_of(&bodies[..=complete]).len() {
                complete += 1;
            }
            let cut = read(&file[..length]).unwrap();
            assert_eq!(cut.records.len(), complete, "cut at {length}");
            assert_eq!(cut.length + cut.torn, length as u64);
        }
        for length in 0..file_header().len() {
            assert!(
                read(&file[..length]).is_err(),
                "a header of {length} bytes was taken"
            );
        }
    }

    #[test]
    fn removed_reordered_and_repeated_records_are_found() {
        let bodies = bodies();
        let file = file_of(&bodies);
        let cuts: Vec<usize> = (0..=bodies.len()).map(|n| file_of(&bodies[..n]).len()).collect();
        let piece = |n: usize| &file[cuts[n]..cuts[n + 1]];
        let header = file_header();
        let orders: [&[usize]; 6] = [
            &[1, 2, 3],
            &[0, 2, 3],
            &[0, 1, 3],
            &[1, 0, 2, 3],
            &[0, 2, 1, 3],
            &[0, 0, 1, 2, 3],
        ];
        for order in orders {
            let mut other = header.clone();
            for n in order {
                other.extend(piece(*n));
            }
            assert!(read(&other).is_err(), "records {order:?} were taken");
        }
        assert_eq!(read_back(&file).unwrap(), bodies);
    }

    #[test]
    fn zeros_at_the_end_are_damage_and_not_a_torn_record() {
        let mut file = file_of(&bodies());
        file.extend([0; 64]);
        assert!(read(&file).is_err());
    }
}
