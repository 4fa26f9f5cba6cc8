//! Opening a ledger: lock, read, check, repair a torn tail, note a changed policy.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use theriac_protocol::units::{Digest, NodeId, Timestamp};

use super::chain::{self, Chain, Damage, Storage};
use super::record::{Genesis, Record};
use super::state::PolicySeen;
use super::{KnownHead, Ledger, LedgerError, Opening, Owner, State};
use crate::policy::Policy;
use crate::report::Status;

impl Ledger {
    /// Opens the ledger of `node`, or begins one, and locks it against other processes until it is dropped.
    ///
    /// The file is made with mode 0600 and its directory entry is synced. A new or changed policy is recorded. See
    /// [`Ledger::opening`] for what was found.
    ///
    /// # Errors
    /// [`LedgerError`]; nothing may be trained then.
    pub fn open(path: &Path, node: &NodeId, policy: Policy, now: Timestamp) -> Result<Self, LedgerError> {
        Self::open_known(path, node, policy, None, now)
    }

    /// Like [`Ledger::open`], but `known` was noted elsewhere when the ledger was last written: then none is begun, and one
    /// that does not hold that head is left as it is.
    ///
    /// # Errors
    /// [`LedgerError::Lost`], [`LedgerError::WentBackwards`], and those of [`Ledger::open`].
    pub fn open_known(
        path: &Path,
        node: &NodeId,
        policy: Policy,
        known: Option<&KnownHead>,
        now: Timestamp,
    ) -> Result<Self, LedgerError> {
        if policy.site() != node {
            return Err(LedgerError::OtherSite {
                expected: node.clone(),
                found: policy.site().clone(),
            });
        }
        let lock = lock(path)?;
        let created = !path.try_exists().map_err(io_error(path, "look for"))?;
        if created {
            if let Some(known) = known {
                return Err(lost(path, known));
            }
            create(path, &genesis(node, &policy, now)).map_err(io_error(path, "create"))?;
        }
        let bytes = read_file(path)?;
        if known.is_some() {
            let (_, read) = replay(path, &bytes)?;
            check_known(path, &read.heads, known)?;
        }
        let file = OpenOptions::new()
            .append(true)
            .open(path)
            .map_err(io_error(path, "open"))?;
        let mut ledger = Self::take_over(path, node, policy, Box::new(file), &bytes, now)?;
        ledger.opening.created = created;
        ledger.lock = Some(lock);
        Ok(ledger)
    }

    /// Reads a ledger without locking or repairing it, so also while an edge uses it.
    ///
    /// # Errors
    /// [`LedgerError`], as for [`Ledger::open`].
    pub fn inspect(path: &Path, policy: Policy) -> Result<Status, LedgerError> {
        Self::inspect_known(path, policy, None)
    }

    /// Like [`Ledger::inspect`], held to what is known of it as in [`Ledger::open_known`].
    ///
    /// # Errors
    /// [`LedgerError`], as for [`Ledger::open_known`].
    pub fn inspect_known(
        path: &Path,
        policy: Policy,
        known: Option<&KnownHead>,
    ) -> Result<Status, LedgerError> {
        if let Some(known) = known
            && !path.try_exists().map_err(io_error(path, "look for"))?
        {
            return Err(lost(path, known));
        }
        let bytes = read_file(path)?;
        let (state, read) = replay(path, &bytes)?;
        check_known(path, &read.heads, known)?;
        check_owner(path, policy.site(), &policy, &state)?;
        check_policy(&policy, &state)?;
        let spent = state.spent(&policy, &read.heads);
        Ok(Status::new(&state, &policy, spent))
    }

    /// Continues the chain that `storage` holds, whose content is `bytes`.
    pub(super) fn take_over(
        path: &Path,
        node: &NodeId,
        policy: Policy,
        mut storage: Box<dyn Storage>,
        bytes: &[u8],
        now: Timestamp,
    ) -> Result<Self, LedgerError> {
        let (state, read) = replay(path, bytes)?;
        check_owner(path, node, &policy, &state)?;
        check_policy(&policy, &state)?;
        if read.torn > 0 {
            storage
                .truncate(read.length)
                .and_then(|()| storage.sync())
                .map_err(io_error(path, "repair"))?;
        } else {
            // What was read may be in memory only: a process that was killed before its sync leaves bytes that a power failure takes back. Nothing is made
            // of them, or told of, before they are durable.
            storage.sync().map_err(io_error(path, "sync"))?;
        }
        let mut ledger = Self {
            path: path.to_owned(),
            chain: Chain::new(storage, read.length, read.heads),
            state,
            opening: Opening {
                created: false,
                torn_bytes: read.torn,
            },
            policy,
            lock: None,
        };
        if ledger.state.policy != PolicySeen::of(&ledger.policy) {
            ledger.append(&Record::policy(&ledger.policy, now))?;
        }
        Ok(ledger)
    }
}

/// What is left of a file's bytes once they are counted.
pub(super) struct Replayed {
    pub(super) heads: Vec<Digest>,
    length: u64,
    torn: u64,
}

/// Checks the chain and adds up its records.
pub(super) fn replay(path: &Path, bytes: &[u8]) -> Result<(State, Replayed), LedgerError> {
    let damaged = |Damage { offset, what }| LedgerError::damaged(path, offset, what);
    let read = chain::read(bytes).map_err(damaged)?;
    let mut state = State::default();
    for (offset, body, _) in &read.records {
        state.take(body).map_err(|what| {
            damaged(Damage {
                offset: *offset,
                what,
            })
        })?;
    }
    let heads = read.records.iter().map(|(_, _, head)| *head).collect();
    Ok((
        state,
        Replayed {
            heads,
            length: read.length,
            torn: read.torn,
        },
    ))
}

fn lost(path: &Path, known: &KnownHead) -> LedgerError {
    LedgerError::Lost {
        path: path.to_owned(),
        records: known.records,
    }
}

/// Whether the chain holds what is known of it.
pub(super) fn check_known(
    path: &Path,
    heads: &[Digest],
    known: Option<&KnownHead>,
) -> Result<(), LedgerError> {
    let Some(known @ &KnownHead { head, records }) = known else {
        return Ok(());
    };
    if holds(heads, known) {
        return Ok(());
    }
    Err(LedgerError::WentBackwards {
        path: path.to_owned(),
        records,
        head,
        found: heads.len() as u64,
    })
}

/// Whether one of the heads stands where it is known to.
pub(super) fn holds(heads: &[Digest], known: &KnownHead) -> bool {
    let last = known
        .records
        .checked_sub(1)
        .and_then(|last| usize::try_from(last).ok());
    last.and_then(|last| heads.get(last)) == Some(&known.head)
}

/// Whether the policy is the one in force or comes after it.
pub(super) fn check_policy(policy: &Policy, state: &State) -> Result<(), LedgerError> {
    let (seen, found) = (state.policy, policy.version());
    if found < seen.version {
        let seen = seen.version;
        return Err(LedgerError::PolicyOlder { found, seen });
    }
    if found == seen.version && policy.hash() != seen.hash {
        return Err(LedgerError::PolicyUnversioned { version: found });
    }
    Ok(())
}

/// Whether the ledger is this node's and its unit is the policy's.
pub(super) fn check_owner(
    path: &Path,
    node: &NodeId,
    policy: &Policy,
    state: &State,
) -> Result<(), LedgerError> {
    let Some(Owner {
        node: found,
        unit,
        block_ms,
    }) = state.owner.clone()
    else {
        return Err(LedgerError::Damaged {
            path: path.to_owned(),
            offset: chain::file_header().len() as u64,
            what: "the first record is missing".to_owned(),
        });
    };
    if found != *node {
        return Err(LedgerError::OtherNode {
            path: path.to_owned(),
            expected: node.clone(),
            found,
        });
    }
    if (unit, block_ms) != (policy.unit(), block_ms_of(policy)) {
        return Err(LedgerError::UnitChanged {
            path: path.to_owned(),
            expected_unit: unit,
            expected_ms: block_ms,
            found_unit: policy.unit(),
            found_ms: block_ms_of(policy),
        });
    }
    Ok(())
}

/// The first record of a new ledger.
fn genesis(node: &NodeId, policy: &Policy, at: Timestamp) -> Record {
    Record::Genesis(Genesis {
        node: node.clone(),
        unit: policy.unit(),
        block_ms: block_ms_of(policy),
        at,
    })
}

/// Writes a new ledger beside its place, syncs it, and moves it there, so that a crash leaves all of it or nothing.
fn create(path: &Path, first: &Record) -> io::Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let beside = with_suffix(path, ".new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&beside)?;
    file.write_all(&chain::file_of(&[first.to_bytes()]))?;
    chain::reached("begun beside");
    file.sync_all()?;
    chain::reached("begun and synced");
    fs::rename(&beside, path)?;
    chain::reached("moved to its place");
    File::open(parent)?.sync_all()?;
    chain::reached("directory synced");
    Ok(())
}

/// Takes the lock beside the ledger. The kernel lets it go when the process ends, however it ends.
fn lock(path: &Path) -> Result<File, LedgerError> {
    let lock = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(with_suffix(path, ".lock"))
        .map_err(io_error(path, "lock"))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(LedgerError::InUse {
            path: path.to_owned(),
        }),
        Err(TryLockError::Error(source)) => Err(LedgerError::Io {
            path: path.to_owned(),
            action: "lock",
            source,
        }),
    }
}

/// All bytes of the ledger; refuses files that no node can have written.
pub(super) fn read_file(path: &Path) -> Result<Vec<u8>, LedgerError> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(io_error(path, "open"))?;
    file.take(FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(io_error(path, "read"))?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(LedgerError::Damaged {
            path: path.to_owned(),
            offset: FILE_BYTES_MAX,
            what: "the file is longer than 1 GiB".to_owned(),
        });
    }
    Ok(bytes)
}

fn io_error(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> LedgerError {
    let path = path.to_owned();
    move |source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => LedgerError::StorageFull { path },
        _ => LedgerError::Io { path, action, source },
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn block_ms_of(policy: &Policy) -> u64 {
    u64::try_from(policy.block_span().as_millis()).unwrap_or(u64::MAX)
}

/// A release of ten years, once a minute, stays below it.
const FILE_BYTES_MAX: u64 = 1 << 30;
