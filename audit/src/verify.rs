//! An exported log, and its check offline with the public key alone.
//!
//! ```text
//! {"theriac_audit_log":1,"key":"ORIGIN+KEYID+BASE64"}
//! one record a line …
//! {"checkpoint":"…"}      after the last record; also between records, which narrows down where damage lies
//! ```
//!
//! A changed, dropped, added or moved line gives another root than the signed one. What no file can show by itself is that it is an
//! *older* state of the log, cut off behind an older checkpoint: hand over the heads that you know for that.

use std::io::{self, BufRead, Read as _};

use serde::{Deserialize, Serialize};
use theriac_protocol::units::Digest;

use crate::checkpoint::{CheckpointError, LogPublicKey, SignedHead};
use crate::leaf::{AuditRecord, LeafError};
use crate::tree::{MerkleTree, leaf_hash};

/// Why an exported log is not what the key signed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// It cannot be read.
    #[error("cannot read the log: {0}")]
    Read(#[from] io::Error),
    /// The first line is missing or of another format.
    #[error("this is no exported audit log: its first line must be {{\"theriac_audit_log\":1,…}}")]
    Format,
    /// It is another log's.
    #[error("the log says it is of key `{found}`, expected `{expected}`")]
    OtherLog {
        /// The key to check with.
        expected: String,
        /// The key in the file.
        found: String,
    },
    /// A line is no record.
    #[error("line {line}: {source}")]
    Record {
        /// Which line, from 1.
        line: u64,
        /// What is wrong.
        source: LeafError,
    },
    /// A line is longer than any record.
    #[error("line {line} is longer than {LINE_BYTES_MAX} bytes")]
    LongLine {
        /// Which line, from 1.
        line: u64,
    },
    /// A checkpoint is not signed by the key.
    #[error("line {line}: {source}")]
    Checkpoint {
        /// Which line, from 1.
        line: u64,
        /// What is wrong.
        source: CheckpointError,
    },
    /// A checkpoint counts other records than there are: some were dropped or added.
    #[error("line {line}: the signed head counts {expected} records, the file holds {found} up to here")]
    Size {
        /// Which line, from 1.
        line: u64,
        /// Records by the head.
        expected: u64,
        /// Records in the file.
        found: u64,
    },
    /// The records are not the signed ones: some were changed or moved.
    #[error(
        "line {line}: the records have root {found}, the signed head says {expected}; the change lies between \
         record {good} and record {bad}"
    )]
    Root {
        /// Which line, from 1.
        line: u64,
        /// Signed root.
        expected: Digest,
        /// Root of the file's records.
        found: Digest,
        /// Records up to here are as signed.
        good: u64,
        /// Records in the file up to this checkpoint.
        bad: u64,
    },
    /// Records stand behind the last checkpoint.
    #[error("{unsigned} records follow the last checkpoint and are signed by nobody")]
    Unsigned {
        /// How many.
        unsigned: u64,
    },
    /// A head that somebody saw earlier is not of this log: it was cut back or forked.
    #[error(
        "the log does not extend a head of {size} records that was signed earlier: it was cut back or forked"
    )]
    Rollback {
        /// Records of that head.
        size: u64,
    },
}

/// What an exported log turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedLog {
    /// Number of records, all of them signed.
    pub size: u64,
    /// Root of their tree.
    pub root: Digest,
    /// Checkpoints in the file, all of them right.
    pub checkpoints: u64,
}

/// First line of an exported log.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    theriac_audit_log: u32,
    key: String,
}

/// A checkpoint's line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CheckpointLine {
    checkpoint: String,
}

/// First line of an export, without newline.
pub fn header_line(key: &LogPublicKey) -> String {
    to_json(&Header {
        theriac_audit_log: VERSION,
        key: key.to_string(),
    })
}

/// A checkpoint's line in an export, without newline.
pub fn checkpoint_line(head: &SignedHead) -> String {
    to_json(&CheckpointLine {
        checkpoint: head.note().to_owned(),
    })
}

/// A whole export: header, records (see [`AuditRecord::to_line`]), checkpoint.
pub fn export<'a>(
    key: &LogPublicKey,
    records: impl IntoIterator<Item = &'a str>,
    head: &SignedHead,
) -> String {
    let mut file = header_line(key);
    for line in records {
        file.push('\n');
        file.push_str(line);
    }
    file + "\n" + &checkpoint_line(head) + "\n"
}

/// Checks an exported log against the public key, and that it extends every head in `known`.
///
/// # Errors
/// [`VerifyError`] for the first thing that is wrong.
pub fn verify(
    mut log: impl BufRead,
    key: &LogPublicKey,
    known: &[SignedHead],
) -> Result<VerifiedLog, VerifyError> {
    let mut number = 1;
    let header = next_line(&mut log, number)?.ok_or(VerifyError::Format)?;
    let header: Header = serde_json::from_str(&header).map_err(|_| VerifyError::Format)?;
    if header.theriac_audit_log != VERSION {
        return Err(VerifyError::Format);
    }
    if header.key != key.to_string() {
        return Err(VerifyError::OtherLog {
            expected: key.to_string(),
            found: header.key,
        });
    }
    let mut tree = MerkleTree::new();
    let (mut signed, mut checkpoints) = (0, 0);
    loop {
        number += 1;
        let Some(line) = next_line(&mut log, number)? else {
            break;
        };
        if let Ok(CheckpointLine { checkpoint }) = serde_json::from_str(&line) {
            let head = SignedHead::parse(&checkpoint, key)
                .map_err(|source| VerifyError::Checkpoint { line: number, source })?;
            check_head(&tree, &head, number, signed)?;
            (signed, checkpoints) = (head.size(), checkpoints + 1);
        } else {
            AuditRecord::parse(&line).map_err(|source| VerifyError::Record { line: number, source })?;
            tree.append(leaf_hash(line.as_bytes()));
        }
    }
    if checkpoints == 0 || signed != tree.size() {
        return Err(VerifyError::Unsigned {
            unsigned: tree.size() - signed,
        });
    }
    match known
        .iter()
        .find(|head| tree.root_at(head.size()) != Some(head.root()))
    {
        Some(head) => Err(VerifyError::Rollback { size: head.size() }),
        None => Ok(VerifiedLog {
            size: tree.size(),
            root: tree.root(),
            checkpoints,
        }),
    }
}

/// Whether a signed head is that of the records so far.
fn check_head(tree: &MerkleTree, head: &SignedHead, line: u64, good: u64) -> Result<(), VerifyError> {
    if head.size() != tree.size() {
        return Err(VerifyError::Size {
            line,
            expected: head.size(),
            found: tree.size(),
        });
    }
    if head.root() != tree.root() {
        let (expected, found, bad) = (head.root(), tree.root(), tree.size());
        return Err(VerifyError::Root {
            line,
            expected,
            found,
            good,
            bad,
        });
    }
    Ok(())
}

/// The next line without its newline; `None` at the end.
fn next_line(log: &mut impl BufRead, line: u64) -> Result<Option<String>, VerifyError> {
    let mut text = String::new();
    log.by_ref().take(LINE_BYTES_MAX + 1).read_line(&mut text)?;
    if text.len() as u64 > LINE_BYTES_MAX {
        return Err(VerifyError::LongLine { line });
    }
    if text.is_empty() {
        return Ok(None);
    }
    if text.ends_with('\n') {
        text.pop();
    }
    Ok(Some(text))
}

fn to_json(line: &impl Serialize) -> String {
    #[expect(
        clippy::expect_used,
        reason = "structs of text and numbers always have a JSON form"
    )]
    let json = serde_json::to_string(line).expect("the line has a JSON form");
    json
}

const VERSION: u32 = 1;
/// A model with ten thousand members stays below it.
const LINE_BYTES_MAX: u64 = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::LogKey;
    use crate::leaf::tests::records;

    fn key() -> LogKey {
        LogKey::from_seed("theriac/test", &[7; 32]).unwrap()
    }

    fn lines() -> Vec<String> {
        (0..3)
            .flat_map(|_| records())
            .enumerate()
            .map(|(n, mut record)| {
                record.at.0 = n as u64;
                record.to_line()
            })
            .collect()
    }

    fn head(lines: &[String]) -> SignedHead {
        let tree = MerkleTree::from_leaves(lines.iter().map(|line| leaf_hash(line.as_bytes())));
        key().sign_head(tree.size(), tree.root())
    }

    fn exported(lines: &[String], head: &SignedHead) -> String {
        export(&key().public(), lines.iter().map(String::as_str), head)
    }

    fn check(log: &str) -> Result<VerifiedLog, VerifyError> {
        verify(log.as_bytes(), &key().public(), &[])
    }

    #[test]
    fn a_whole_log_verifies_with_the_public_key_alone() {
        let lines = lines();
        let verified = check(&exported(&lines, &head(&lines))).unwrap();
        assert_eq!(
            verified,
            VerifiedLog {
                size: lines.len() as u64,
                root: head(&lines).root(),
                checkpoints: 1
            }
        );
        assert_eq!(check(&exported(&[], &head(&[]))).unwrap().size, 0);
    }

    #[test]
    fn every_changed_dropped_added_or_moved_line_is_found() {
        let lines = lines();
        let head = head(&lines);
        for at in 0..lines.len() {
            let mut dropped = lines.clone();
            dropped.remove(at);
            assert!(
                matches!(check(&exported(&dropped, &head)), Err(VerifyError::Size { .. })),
                "line {at} dropped"
            );
            let mut added = lines.clone();
            added.insert(at, lines[at].clone());
            assert!(
                matches!(check(&exported(&added, &head)), Err(VerifyError::Size { .. })),
                "line {at} added"
            );
            let mut changed = lines.clone();
            changed[at] = changed[at].replacen("\"at\":", "\"at\":9", 1);
            let root = check(&exported(&changed, &head));
            assert!(
                matches!(root, Err(VerifyError::Root { .. })),
                "line {at} changed: {root:?}"
            );
            if at > 0 {
                let mut moved = lines.clone();
                moved.swap(at - 1, at);
                assert!(
                    matches!(check(&exported(&moved, &head)), Err(VerifyError::Root { .. })),
                    "line {at} moved"
                );
            }
        }
    }

    /// No byte of the file may change without notice; only the trailing newline carries nothing.
    #[test]
    fn every_changed_byte_is_found() {
        let lines = &lines()[..9];
        let log = exported(lines, &head(lines));
        for at in 0..log.len() - 1 {
            let mut bytes = log.clone().into_bytes();
            bytes[at] ^= 1;
            assert!(
                verify(bytes.as_slice(), &key().public(), &[]).is_err(),
                "byte {at} was changed unseen"
            );
            assert!(
                check(&String::from_utf8_lossy(&log.as_bytes()[..at])).is_err(),
                "a log cut at {at} was taken"
            );
        }
    }

    #[test]
    fn checkpoints_between_records_narrow_down_the_damage() {
        let lines = lines();
        let mut log = header_line(&key().public());
        for (n, line) in lines.iter().enumerate() {
            log = log + "\n" + line + "\n" + &checkpoint_line(&head(&lines[..=n]));
        }
        assert_eq!(check(&log).unwrap().checkpoints, lines.len() as u64);
        let damaged = log.replacen("\"at\":11,", "\"at\":12,", 1);
        assert!(matches!(
            check(&damaged),
            Err(VerifyError::Root {
                good: 11,
                bad: 12,
                ..
            })
        ));
    }

    #[test]
    fn an_older_state_and_a_fork_are_found_by_a_known_head() {
        let lines = lines();
        let (short, long) = (head(&lines[..5]), head(&lines));
        let older = exported(&lines[..5], &short);
        let with = |log: &str, known: &SignedHead| {
            verify(log.as_bytes(), &key().public(), std::slice::from_ref(known))
        };
        assert!(check(&older).is_ok());
        assert!(matches!(with(&older, &long), Err(VerifyError::Rollback { .. })));
        assert!(with(&exported(&lines, &long), &short).is_ok());
        let mut forked = lines.clone();
        forked.swap(0, 1);
        assert!(matches!(
            with(&exported(&forked, &head(&forked)), &short),
            Err(VerifyError::Rollback { size: 5 })
        ));
    }

    #[test]
    fn unsigned_records_other_keys_and_other_files_are_refused() {
        let lines = lines();
        let log = exported(&lines, &head(&lines));
        let unsigned = format!("{log}{}\n", lines[0]);
        assert!(matches!(
            check(&unsigned),
            Err(VerifyError::Unsigned { unsigned: 1 })
        ));
        let bare = header_line(&key().public()) + "\n" + &lines.join("\n");
        assert!(matches!(check(&bare), Err(VerifyError::Unsigned { .. })));
        assert!(matches!(check(""), Err(VerifyError::Format)));
        assert!(matches!(check(&lines[0]), Err(VerifyError::Format)));
        assert!(matches!(
            check(&log.replacen("log\":1", "log\":2", 1)),
            Err(VerifyError::Format)
        ));
        let other = LogKey::from_seed("theriac/test", &[8; 32]).unwrap().public();
        assert!(matches!(
            verify(log.as_bytes(), &other, &[]),
            Err(VerifyError::OtherLog { .. })
        ));
        // Somebody signs a forged log with a key of his own and writes our key's name into it.
        let forger = LogKey::from_seed("theriac/test", &[8; 32]).unwrap();
        let tree = MerkleTree::from_leaves(lines.iter().map(|line| leaf_hash(line.as_bytes())));
        let forged = exported(&lines, &forger.sign_head(tree.size(), tree.root()));
        assert!(matches!(check(&forged), Err(VerifyError::Checkpoint { .. })));
        let endless = format!("{}\n{}", header_line(&key().public()), "x".repeat(5 << 20));
        assert!(matches!(check(&endless), Err(VerifyError::LongLine { line: 2 })));
    }
}
