//! Whether the federation may be joined in at all: policy, ledger, and what `edge.db` knows of the ledger.
//!
//! Every refusal leaves detection and healing alone: `run` goes on without the federation, and `status`, `doctor` and
//! `privacy status` tell why.

use std::path::{Path, PathBuf};
use std::time::Duration;

use theriac_command::problem::Problem;
use theriac_privacy::ledger::{KnownHead, Ledger, LedgerError};
use theriac_privacy::policy::{Policy, PolicyError};
use theriac_privacy::report::Status;
use theriac_protocol::units::{NodeId, Timestamp};

use crate::config::EdgeConfig;
use crate::state_dir::{StateDir, write_durably};

/// Rows of one block that the first privacy policy is written for.
pub const BLOCK_ROWS: u32 = 60;

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
    /// The policy cannot be used.
    #[error("{path}: {source}")]
    Policy {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: PolicyError,
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
            Self::PolicyMissing { .. } | Self::Policy { .. } | Self::FirstPolicy { .. } => "TH-E0307",
            Self::Ledger(_) => "TH-E0309",
        }
    }

    /// What a person does about it.
    pub fn fix(&self) -> &'static str {
        match self {
            Self::PolicyMissing { .. } => "restore the policy; deleting the ledger does not help",
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
            Barred::Ledger(_) => Self::failed(code, barred),
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
        write_first_policy(&path, node, config.sampling.interval)?;
    }
    load(path)
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
    Ok(Some(Ledger::inspect_known(&path, load(found)?, known)?))
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
    load(path).map(Some)
}

fn load(path: PathBuf) -> Result<Policy, Barred> {
    Policy::load(&path).map_err(|source| Barred::Policy { path, source })
}

/// The policy of an edge to which compliance has given none: the documented default, as a file that can be seen.
fn write_first_policy(path: &Path, node: &NodeId, interval: Duration) -> Result<(), Barred> {
    let block = humantime::format_duration(interval * BLOCK_ROWS);
    let text = format!(
        "# Written by theriac-edge because there was none. It belongs to whoever answers for privacy: review it.\n\
         # docs/privacy.md explains every key. A block is {BLOCK_ROWS} samples of this edge.\n\
         site = \"{node}\"\nunit = \"block\"\nblock = \"{block}\"\nepsilon = 4.0\ndelta = 1e-6\n\
         noise_multiplier_min = 1.0\nmechanisms = [\"moments\"]\n"
    );
    tracing::warn!(path = %path.display(), "there is no privacy policy: wrote the default one, review it");
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
                values: 320,
                block_span: ledger.policy().block_span(),
                blocks: vec![round],
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
        assert_eq!(policy.block_span(), Duration::from_mins(1));
        let text = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/privacy.md"));
        for line in [
            "ε = 4",
            "δ = 1e-6",
            "`noise_multiplier_min = 1.0`",
            "60 samples",
            "one minute",
        ] {
            assert!(
                text.contains(line),
                "docs/privacy.md does not say `{line}` of the first policy"
            );
        }
    }
}
