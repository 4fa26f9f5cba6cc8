//! Whether the federation may be joined in at all: policy, ledger, and what `edge.db` knows of the ledger.
//!
//! Every refusal leaves detection and healing alone: `run` goes on without the federation, and `status`, `doctor` and
//! `privacy status` tell why.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rand::RngCore as _;
use theriac_command::problem::Problem;
use theriac_privacy::ledger::{KnownHead, Ledger, LedgerError};
use theriac_privacy::policy::signed::{PolicyKey, PolicyPublicKey, signature_path};
use theriac_privacy::policy::{Policy, PolicyError};
use theriac_privacy::report::Status;
use theriac_protocol::units::{NodeId, Timestamp};

use crate::config::EdgeConfig;
use crate::state_dir::{StateDir, write_durably};

/// Length of one block in the first privacy policy.
const BLOCK: Duration = Duration::from_hours(1);
/// A block of fewer samples has no row whose lags lie inside it.
const BLOCK_ROWS_MIN: u32 = 11;

/// Why federation stays off.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Barred {
    /// The policy is gone, and a default one might be weaker than what the ledger was charged under.
    #[error(
        "{path} is missing, but this edge has a privacy ledger: no default policy is written over it; put the file back"
    )]
    PolicyMissing {
        /// The file.
        path: PathBuf,
    },
    /// A key is pinned, and its owner has given no policy yet.
    #[error(
        "{path} is missing, and federation.policy_key says that somebody else signs it: put the signed policy there"
    )]
    PolicyAwaited {
        /// The file.
        path: PathBuf,
    },
    /// Blocks of the policy do not hold whole samples.
    #[error(
        "{path}: `block` is {}, which does not hold 11 or more whole samples of `sampling.interval` {}",
        humantime::format_duration(*.block), humantime::format_duration(*.interval)
    )]
    BlockMisfit {
        /// The policy.
        path: PathBuf,
        /// Its block.
        block: Duration,
        /// Time between two samples.
        interval: Duration,
    },
    /// The policy cannot be used.
    #[error("{source}")]
    Policy {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: PolicyError,
    },
    /// This edge's own key cannot be read or made.
    #[error("this edge's own policy key {path}: {reason}")]
    OwnKey {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The first policy cannot be written.
    #[error("cannot write the first privacy policy {path}: {source}")]
    FirstPolicy {
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// The ledger is lost, older than it was, damaged, another node's, or cannot be read.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

impl Barred {
    /// The code under which `docs/errors.md` explains it.
    pub fn code(&self) -> &'static str {
        match self {
            Self::PolicyMissing { .. }
            | Self::PolicyAwaited { .. }
            | Self::BlockMisfit { .. }
            | Self::Policy { .. }
            | Self::OwnKey { .. }
            | Self::FirstPolicy { .. }
            | Self::Ledger(LedgerError::PolicyOlder { .. } | LedgerError::PolicyUnversioned { .. }) => {
                "TH-E0307"
            }
            Self::Ledger(_) => "TH-E0309",
        }
    }

    /// What a person does about it.
    pub fn fix(&self) -> &'static str {
        match self {
            Self::PolicyAwaited { .. }
            | Self::Ledger(LedgerError::PolicyOlder { .. } | LedgerError::PolicyUnversioned { .. }) => {
                "detection and healing go on meanwhile"
            }
            Self::BlockMisfit { .. } => "choose a block that is a multiple of the interval, such as 1h",
            Self::PolicyMissing { .. } => "restore the policy; deleting the ledger does not help",
            Self::OwnKey { .. } => "restore the key, or pin an officer's with federation.policy_key",
            Self::Policy { .. } | Self::FirstPolicy { .. } => {
                "correct the policy, or set federation.enabled = false to run without the federation"
            }
            Self::Ledger(LedgerError::Lost { .. } | LedgerError::WentBackwards { .. }) => {
                "restore the newest ledger.log; without it this site must be enrolled anew, under another name and with \
                 another state_dir"
            }
            Self::Ledger(_) => "keep the file as evidence; nothing is sent meanwhile",
        }
    }
}

impl From<Barred> for Problem {
    fn from(barred: Barred) -> Self {
        let (code, fix) = (barred.code(), barred.fix());
        match barred {
            Barred::Ledger(_) if code == "TH-E0309" => Self::failed(code, barred),
            _ => Self::config(code, barred),
        }
        .hint(fix)
    }
}

/// Where the policy is.
pub fn policy_path(config: &EdgeConfig, dir: &StateDir) -> PathBuf {
    config
        .federation
        .privacy_policy
        .clone()
        .unwrap_or_else(|| dir.privacy_policy())
}

/// Loads the policy. It is written only where neither it nor a ledger ever was: else a lost policy would be replaced by a
/// weaker one.
///
/// # Errors
/// [`Barred`], and nothing is written.
pub fn policy(
    config: &EdgeConfig,
    dir: &StateDir,
    node: &NodeId,
    known: Option<&KnownHead>,
) -> Result<Policy, Barred> {
    let path = policy_path(config, dir);
    if config.federation.privacy_policy.is_none() && !path.exists() {
        if known.is_some() || dir.ledger().exists() {
            return Err(Barred::PolicyMissing { path });
        }
        write_first_policy(config, dir, &path, node)?;
    }
    load(config, dir, path)
}

/// Opens the ledger and holds it to what is known of it.
///
/// # Errors
/// [`Barred`]; then nothing may be trained or sent.
pub fn ledger(
    config: &EdgeConfig,
    dir: &StateDir,
    node: &NodeId,
    known: Option<&KnownHead>,
    now: Timestamp,
) -> Result<Ledger, Barred> {
    let policy = policy(config, dir, node, known)?;
    Ok(Ledger::open_known(&dir.ledger(), node, policy, known, now)?)
}

/// Looks at policy and ledger and writes nothing, also beside a running edge. `None`: nothing was ever charged.
///
/// # Errors
/// [`Barred`], as for [`ledger`].
pub fn inspect(
    config: &EdgeConfig,
    dir: &StateDir,
    known: Option<&KnownHead>,
) -> Result<Option<Status>, Barred> {
    let path = dir.ledger();
    if !path.exists() {
        return match known {
            None => Ok(None),
            Some(known) => Err(Barred::Ledger(LedgerError::Lost {
                path,
                records: known.records,
            })),
        };
    }
    let found = policy_path(config, dir);
    if config.federation.privacy_policy.is_none() && !found.exists() {
        return Err(Barred::PolicyMissing { path: found });
    }
    Ok(Some(Ledger::inspect_known(
        &path,
        load(config, dir, found)?,
        known,
    )?))
}

/// The policy as far as there is one: what `check-config` looks at.
///
/// # Errors
/// [`Barred::Policy`]
pub fn existing_policy(config: &EdgeConfig, dir: &StateDir) -> Result<Option<Policy>, Barred> {
    let path = policy_path(config, dir);
    if config.federation.privacy_policy.is_none() && !path.exists() {
        return Ok(None);
    }
    load(config, dir, path).map(Some)
}

/// Whose signature counts: the key that is pinned, else this edge's own. `None`: neither is there.
///
/// # Errors
/// [`Barred::OwnKey`]
pub fn trusted_key(config: &EdgeConfig, dir: &StateDir) -> Result<Option<PolicyPublicKey>, Barred> {
    match config.federation.policy_key {
        Some(pinned) => Ok(Some(pinned)),
        None => Ok(own_key(dir)?.map(|key| key.public())),
    }
}

/// This edge's own key, if it ever made one.
///
/// # Errors
/// [`Barred::OwnKey`]
pub fn own_key(dir: &StateDir) -> Result<Option<PolicyKey>, Barred> {
    read_key(dir.policy_key())
}

/// This edge's own key; made where there is none.
///
/// # Errors
/// [`Barred::OwnKey`]
pub fn own_key_or_new(dir: &StateDir) -> Result<PolicyKey, Barred> {
    match own_key(dir)? {
        Some(key) => Ok(key),
        None => make_key(dir.policy_key()),
    }
}

/// The key that this edge signs its reports with: its own, or, where an officer's signs the policies, one for reports alone, made where there is none.
///
/// # Errors
/// [`Barred::OwnKey`]
pub fn report_key(dir: &StateDir) -> Result<PolicyKey, Barred> {
    match (own_key(dir)?, read_key(dir.report_key())?) {
        (Some(key), _) | (None, Some(key)) => Ok(key),
        (None, None) => make_key(dir.report_key()),
    }
}

fn read_key(path: PathBuf) -> Result<Option<PolicyKey>, Barred> {
    if !path.exists() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(&path).map_err(|error| error.to_string());
    let key = text.and_then(|text| PolicyKey::from_text(&text).map_err(|error| error.to_string()));
    key.map(Some).map_err(|reason| Barred::OwnKey { path, reason })
}

fn make_key(path: PathBuf) -> Result<PolicyKey, Barred> {
    let key = new_key();
    write_durably(&path, key.to_text().as_bytes()).map_err(|error| Barred::OwnKey {
        path,
        reason: error.to_string(),
    })?;
    Ok(key)
}

/// A key from the system's generator.
pub fn new_key() -> PolicyKey {
    let mut seed = [0; 32];
    rand::rng().fill_bytes(&mut seed);
    PolicyKey::from_seed(&seed)
}

/// Signs the text of the policy at `path`. The signature is durable when this returns.
///
/// # Errors
/// [`Barred::Policy`] when the text is no policy, [`Barred::FirstPolicy`] when the signature cannot be written.
pub fn sign(path: &Path, text: &str, key: &PolicyKey) -> Result<(), Barred> {
    let signature = key.sign(text).map_err(|source| Barred::Policy {
        path: path.to_owned(),
        source,
    })?;
    let beside = signature_path(path);
    write_durably(&beside, signature.to_string().as_bytes())
        .map_err(|source| Barred::FirstPolicy { path: beside, source })
}

fn load(config: &EdgeConfig, dir: &StateDir, path: PathBuf) -> Result<Policy, Barred> {
    let loaded = match trusted_key(config, dir)? {
        Some(key) => Policy::load_signed(&path, key),
        // Whatever is written there, nobody has signed it for us. Reading it first tells a missing file from an unsigned one.
        None => Policy::load(&path).and(Err(PolicyError::Unsigned { path: path.clone() })),
    };
    let loaded = loaded.map_err(|source| Barred::Policy {
        path: path.clone(),
        source,
    })?;
    let (block, interval) = (loaded.block_span(), config.sampling.interval);
    let whole = block.as_nanos().is_multiple_of(interval.as_nanos());
    if !whole || block < interval * BLOCK_ROWS_MIN {
        return Err(Barred::BlockMisfit {
            path,
            block,
            interval,
        });
    }
    let kept = interval.saturating_mul(u32::try_from(config.sampling.history_rows).unwrap_or(u32::MAX));
    if kept < block * 3 {
        tracing::warn!(
            history = ?kept,
            block = ?block,
            "the history is shorter than three blocks: rounds of moments will find too few; raise sampling.history_rows, \
             or have a shorter block signed"
        );
    }
    Ok(loaded)
}

/// The policy of an edge to which compliance has given none: the documented default, as a file that can be seen, signed with this edge's own
/// key. Where a key is pinned, nobody but its owner can write the first policy.
fn write_first_policy(config: &EdgeConfig, dir: &StateDir, path: &Path, node: &NodeId) -> Result<(), Barred> {
    if config.federation.policy_key.is_some() {
        return Err(Barred::PolicyAwaited {
            path: path.to_owned(),
        });
    }
    let block = humantime::format_duration(BLOCK);
    let text = format!(
        "# Written by theriac-edge because there was none. It belongs to whoever answers for privacy: review it.\n\
         # docs/privacy.md explains every key. Signed with this edge's own key: sign again after a change, with a higher version.\n\
         version = 1\nsite = \"{node}\"\nunit = \"block\"\nblock = \"{block}\"\nepsilon = 4.0\ndelta = 1e-6\n\
         noise_multiplier_min = 1.0\nmechanisms = [\"moments\"]\n"
    );
    tracing::warn!(path = %path.display(), "there is no privacy policy: wrote the default one, review it");
    // The signature first: a crash in between leaves no policy, and the next start writes both again.
    sign(path, &text, &own_key_or_new(dir)?)?;
    write_durably(path, text.as_bytes()).map_err(|source| Barred::FirstPolicy {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use theriac_privacy::ledger::ReleasePlan;
    use theriac_protocol::message::UpdateKind;
    use theriac_protocol::units::{L2Norm, NoiseMultiplier, Round};

    use super::*;

    struct Place {
        dir: StateDir,
        config: EdgeConfig,
        node: NodeId,
        _root: tempfile::TempDir,
    }

    impl Place {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            Self {
                dir: StateDir::open(&root.path().join("s")).unwrap(),
                config: EdgeConfig::load(None, []).unwrap(),
                node: "site-a".parse().unwrap(),
                _root: root,
            }
        }

        fn open(&self, known: Option<&KnownHead>) -> Result<Ledger, Barred> {
            ledger(&self.config, &self.dir, &self.node, known, Timestamp(1))
        }

        fn charged(&self, round: u64) -> KnownHead {
            let mut ledger = self.open(None).unwrap();
            let plan = ReleasePlan {
                round: Round(round),
                nonce: 1,
                kind: UpdateKind::Moments,
                values: 352,
                block_span: ledger.policy().block_span(),
                blocks: vec![round],
                windows: None,
                sampling_rate: 1.0,
                steps: 1,
                clip_norm: L2Norm::new(1.0).unwrap(),
                noise_multiplier: NoiseMultiplier::new(2.0).unwrap(),
            };
            let _charged = ledger.reserve(plan, Timestamp(2)).unwrap();
            ledger.known_head()
        }
    }

    #[test]
    fn a_deleted_ledger_is_noticed_and_none_is_begun_in_its_place() {
        let place = Place::new();
        let known = place.charged(1);
        std::fs::remove_file(place.dir.ledger()).unwrap();
        let barred = place.open(Some(&known)).unwrap_err();
        assert!(
            matches!(&barred, Barred::Ledger(LedgerError::Lost { records, .. }) if *records == known.records),
            "{barred}"
        );
        assert_eq!(barred.code(), "TH-E0309");
        assert!(!place.dir.ledger().exists(), "a fresh ledger spent nothing");
        let seen = inspect(&place.config, &place.dir, Some(&known)).unwrap_err();
        assert_eq!(seen.to_string(), barred.to_string());
    }

    #[test]
    fn a_rolled_back_or_begun_anew_ledger_is_noticed_and_left_as_it_is() {
        let place = Place::new();
        place.charged(1);
        let old = std::fs::read(place.dir.ledger()).unwrap();
        let known = place.charged(2);
        assert!(place.open(Some(&known)).is_ok());
        let fresh = {
            std::fs::remove_file(place.dir.ledger()).unwrap();
            drop(place.open(None).unwrap());
            std::fs::read(place.dir.ledger()).unwrap()
        };
        for copy in [old, fresh] {
            std::fs::write(place.dir.ledger(), &copy).unwrap();
            let barred = place.open(Some(&known)).unwrap_err();
            assert!(
                matches!(&barred, Barred::Ledger(LedgerError::WentBackwards { records, .. }) if *records == known.records),
                "{barred}"
            );
            assert_eq!(
                std::fs::read(place.dir.ledger()).unwrap(),
                copy,
                "evidence was changed"
            );
            let seen = inspect(&place.config, &place.dir, Some(&known)).unwrap_err();
            assert_eq!(seen.to_string(), barred.to_string());
        }
    }

    #[test]
    fn a_lost_policy_is_not_replaced_where_a_ledger_is_or_was() {
        let place = Place::new();
        let known = place.charged(1);
        let path = place.dir.privacy_policy();
        std::fs::remove_file(&path).unwrap();
        for ledger_too in [false, true] {
            if ledger_too {
                std::fs::remove_file(place.dir.ledger()).unwrap();
            }
            let barred = place.open(Some(&known)).unwrap_err();
            assert!(
                matches!(&barred, Barred::PolicyMissing { path: missing } if *missing == path),
                "{barred}"
            );
            assert!(!path.exists());
        }
        assert!(
            place.open(None).is_ok(),
            "an edge without a history gets its first one"
        );
    }

    #[test]
    fn the_first_policy_is_the_documented_one() {
        let place = Place::new();
        let policy = policy(&place.config, &place.dir, &place.node, None).unwrap();
        assert_eq!(policy.block_span(), Duration::from_hours(1));
        assert_eq!(
            policy.signature().unwrap().key,
            own_key(&place.dir).unwrap().unwrap().public()
        );
        let text = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/privacy.md"));
        for line in ["ε = 4", "δ = 1e-6", "`noise_multiplier_min = 1.0`", "one hour"] {
            assert!(
                text.contains(line),
                "docs/privacy.md does not say `{line}` of the first policy"
            );
        }
    }
}
