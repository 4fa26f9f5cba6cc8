//! What a checkpoint holds, entry by entry, with a digest over the list itself.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// The list of a checkpoint's entries. Folders come before what is in them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    pub(super) sequence: u64,
    pub(super) unix_ms: u64,
    pub(super) entries: Vec<Entry>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Entry {
    /// Relative to the state directory; empty for the directory itself.
    pub(super) path: PathBuf,
    pub(super) kind: Kind,
    /// Permission bits.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Kind {
    Folder,
    File {
        bytes: u64,
        /// SHA-256, lower-case hexadecimal.
        sha256: String,
    },
    /// A symbolic link. It is copied as it is and never followed.
    Link {
        target: PathBuf,
    },
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder => f.write_str("a folder"),
            Self::File { bytes, sha256 } => write!(f, "a file of {bytes} bytes with the SHA-256 {sha256}"),
            Self::Link { target } => write!(f, "a link to {}", target.display()),
        }
    }
}

impl Manifest {
    pub(super) fn files(&self) -> u64 {
        self.entries
            .iter()
            .filter(|entry| matches!(entry.kind, Kind::File { .. }))
            .count() as u64
    }

    pub(super) fn bytes(&self) -> u64 {
        self.entries
            .iter()
            .map(|entry| {
                if let Kind::File { bytes, .. } = entry.kind {
                    bytes
                } else {
                    0
                }
            })
            .sum()
    }

    /// First line: format and digest of the rest.
    pub(super) fn encode(&self) -> io::Result<Vec<u8>> {
        let body = serde_json::to_vec(self)?;
        let mut bytes = format!("{FORMAT}{}\n", HEXLOWER.encode(&Sha256::digest(&body))).into_bytes();
        bytes.extend_from_slice(&body);
        Ok(bytes)
    }

    /// What is wrong with it, in words, when it is not what was written.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let wrong = || "its manifest is cut or of another format".to_owned();
        let rest = bytes.strip_prefix(FORMAT.as_bytes()).ok_or_else(wrong)?;
        let (digest, body) = rest.split_at_checked(64).ok_or_else(wrong)?;
        let body = body.strip_prefix(b"\n").ok_or_else(wrong)?;
        let found = HEXLOWER.encode(&Sha256::digest(body));
        if found.as_bytes() != digest {
            return Err(format!(
                "its manifest has digest {found}, expected {}",
                String::from_utf8_lossy(digest)
            ));
        }
        let manifest: Self =
            serde_json::from_slice(body).map_err(|error| format!("its manifest: {error}"))?;
        match manifest.entries.iter().find(|entry| !is_inside(&entry.path)) {
            Some(entry) => Err(format!(
                "its manifest names {}, which lies outside",
                entry.path.display()
            )),
            None => Ok(manifest),
        }
    }
}

impl Entry {
    /// Owner and permission bits of `metadata`.
    pub(super) fn new(path: PathBuf, kind: Kind, metadata: &std::fs::Metadata) -> Self {
        Self {
            path,
            kind,
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
        }
    }
}

/// Copies a stream and digests it on the way. Bytes and digest.
pub(super) fn copy_digest(from: &mut File, to: &mut impl Write) -> io::Result<(u64, String)> {
    let mut digest = Sha256::new();
    let mut block = vec![0_u8; 256 << 10];
    let mut bytes = 0;
    loop {
        let read = match from.read(&mut block) {
            Ok(0) => return Ok((bytes, HEXLOWER.encode(&digest.finalize()))),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        digest.update(&block[..read]);
        to.write_all(&block[..read])?;
        bytes += read as u64;
    }
}

fn is_inside(path: &Path) -> bool {
    path.components().all(|part| matches!(part, Component::Normal(_)))
}

const FORMAT: &str = "theriac-checkpoint 1 ";

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(path: &str) -> Manifest {
        let kind = Kind::File {
            bytes: 3,
            sha256: "ab".repeat(32),
        };
        let entry = Entry {
            path: path.into(),
            kind,
            mode: 0o600,
            uid: 0,
            gid: 0,
        };
        Manifest {
            sequence: 1,
            unix_ms: 2,
            entries: vec![entry],
        }
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let bytes = manifest("a/b").encode().unwrap();
        assert_eq!(Manifest::decode(&bytes), Ok(manifest("a/b")));
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut other = bytes.clone();
                other[at] ^= 1 << bit;
                assert!(Manifest::decode(&other).is_err(), "bit {bit} of byte {at}");
            }
            assert!(Manifest::decode(&bytes[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn paths_cannot_lead_outside() {
        for path in ["../a", "/a", "a/../../b", "./a"] {
            // `./a` is harmless, yet not what we write.
            let inside = is_inside(Path::new(path));
            assert!(!inside, "{path}");
            assert!(
                Manifest::decode(&manifest(path).encode().unwrap()).is_err(),
                "{path}"
            );
        }
    }
}
