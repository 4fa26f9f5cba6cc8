//! The signed policy of healing: read, its signatures counted, laid over what `edge.toml` says. And the log of rulings under it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use theriac_command::settings::{self, SettingsError};
use theriac_heal::policy::evaluate::{self, RulingRecord};
use theriac_heal::policy::file::{FileError, PolicyFile};
use theriac_heal::policy::{HealPolicy, NodeBudget};
use theriac_heal::standing::Reinstated;
use theriac_heal::types::ActionKind;
use theriac_privacy::policy::signed::{
    PolicyPublicKey, PolicySignature, SignatureError, Subject, signature_path,
};

use crate::config::{EdgeConfig, HealingPolicySettings};
use crate::state_dir::{StateDir, write_durably};

/// Largest log of rulings, in bytes; an older one of the same size is kept.
const RULINGS_BYTES_MAX: u64 = 16 << 20;

/// Why a policy of healing is refused. Nothing runs without the one that was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HealingPolicyError {
    /// A file cannot be read or written.
    #[error("cannot use {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// It is not signed by enough people.
    #[error(
        "{path} has {found} of {need} signatures that count; have it read and signed: theriac-edge policy sign {path} --key FILE --config FILE"
    )]
    Unsigned {
        /// The policy.
        path: PathBuf,
        /// Signatures that count.
        found: usize,
        /// Signatures needed.
        need: usize,
    },
    /// A signature of a pinned key does not fit, or the file of signatures is broken.
    #[error("{path}: {source}; have it read and signed anew")]
    Signature {
        /// The policy.
        path: PathBuf,
        /// What is wrong.
        source: SignatureError,
    },
    /// It is not TOML of this form.
    #[error("{0}")]
    Form(SettingsError),
    /// An action asks for more people than there are keys.
    #[error(
        "{path}: service `{service}`, action `{action}` asks for {need} approvals, and healing_policy.keys names {keys}"
    )]
    Approvals {
        /// The policy.
        path: PathBuf,
        /// The service.
        service: String,
        /// The action.
        action: ActionKind,
        /// People it asks for.
        need: u32,
        /// Keys that there are.
        keys: usize,
    },
    /// It cannot hold here.
    #[error("{path}: {source}")]
    File {
        /// The policy.
        path: PathBuf,
        /// What is wrong.
        source: Box<FileError>,
    },
    /// A newer one held before.
    #[error("{path} is version {found}, but version {known} held here before: install the newer file")]
    Stale {
        /// The policy.
        path: PathBuf,
        /// Its version.
        found: u64,
        /// The version known.
        known: u64,
    },
}

/// A policy that holds.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// Its file.
    pub path: PathBuf,
    /// Its version.
    pub version: u64,
    /// Who signed, of those whose signature counts.
    pub signers: Vec<PolicyPublicKey>,
}

/// Reads the policy that the configuration names, checks its signatures, and lays it over the services' policies. `None` where none
/// is named.
///
/// # Errors
/// [`HealingPolicyError`]
pub fn apply(config: &mut EdgeConfig) -> Result<Option<Loaded>, HealingPolicyError> {
    let Some(path) = config.healing_policy.file.clone() else {
        return Ok(None);
    };
    let text = read(&path)?;
    let signers = signers(&path, &text, &config.healing_policy)?;
    let file = parse(&path, &text)?;
    let mut policies: BTreeMap<String, HealPolicy> = config
        .services
        .iter()
        .map(|service| (service.name.to_string(), service.healing.clone()))
        .collect();
    config.healing_budget = lay(&path, &file, &mut policies, config.healing_budget)?;
    let keys = config.healing_policy.keys.len();
    for (service, policy) in &policies {
        for action in policy.rules.iter().flat_map(BTreeMap::keys) {
            let asked = policy.approvals(*action);
            if asked.signed && asked.need as usize > keys {
                return Err(HealingPolicyError::Approvals {
                    path,
                    service: service.clone(),
                    action: *action,
                    need: asked.need,
                    keys,
                });
            }
        }
    }
    for service in &mut config.services {
        if let Some(policy) = policies.remove(service.name.as_str()) {
            service.healing = policy;
        }
    }
    Ok(Some(Loaded {
        path,
        version: file.version,
        signers,
    }))
}

/// Refuses a version that is older than what held before. The version that is known, 0 where none is.
///
/// # Errors
/// [`HealingPolicyError::Stale`]
pub fn check_version(loaded: &Loaded, dir: &StateDir) -> Result<u64, HealingPolicyError> {
    let known = std::fs::read_to_string(dir.healing_version())
        .ok()
        .and_then(|text| text.trim().parse::<u64>().ok())
        .unwrap_or(0);
    if loaded.version < known {
        return Err(HealingPolicyError::Stale {
            path: loaded.path.clone(),
            found: loaded.version,
            known,
        });
    }
    Ok(known)
}

/// Notes the version that holds, and refuses one that is older than what held before.
///
/// # Errors
/// [`HealingPolicyError::Stale`], [`HealingPolicyError::Read`] when the note cannot be written.
pub fn note_version(loaded: &Loaded, dir: &StateDir) -> Result<(), HealingPolicyError> {
    let known = check_version(loaded, dir)?;
    if loaded.version > known {
        let note = dir.healing_version();
        write_durably(&note, format!("{}\n", loaded.version).as_bytes())
            .map_err(|source| HealingPolicyError::Read { path: note, source })?;
    }
    Ok(())
}

pub(crate) fn read(path: &Path) -> Result<String, HealingPolicyError> {
    std::fs::read_to_string(path).map_err(|source| HealingPolicyError::Read {
        path: path.to_owned(),
        source,
    })
}

/// The file's form, whoever wrote it.
pub(crate) fn parse(path: &Path, text: &str) -> Result<PolicyFile, HealingPolicyError> {
    settings::parse_text(text, path).map_err(HealingPolicyError::Form)
}

pub(crate) fn lay(
    path: &Path,
    file: &PolicyFile,
    services: &mut BTreeMap<String, HealPolicy>,
    node: NodeBudget,
) -> Result<NodeBudget, HealingPolicyError> {
    file.over(services, node)
        .map_err(|source| HealingPolicyError::File {
            path: path.to_owned(),
            source: Box::new(source),
        })
}

/// Signatures beside a policy, in their order; none where there is no file of them.
pub(crate) fn signatures(path: &Path) -> Result<Vec<PolicySignature>, HealingPolicyError> {
    let beside = signature_path(path);
    let text = match std::fs::read_to_string(&beside) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(HealingPolicyError::Read { path: beside, source }),
    };
    let lines: Vec<&str> = text.lines().collect();
    lines
        .chunks(SIGNATURE_LINES)
        .map(|lines| lines.join("\n").parse::<PolicySignature>())
        .collect::<Result<_, _>>()
        .map_err(|source| HealingPolicyError::Signature {
            path: path.to_owned(),
            source,
        })
}

/// Different pinned keys that signed exactly this text; as many as are needed, or an error.
fn signers(
    path: &Path,
    text: &str,
    settings: &HealingPolicySettings,
) -> Result<Vec<PolicyPublicKey>, HealingPolicyError> {
    let mut counted = BTreeSet::new();
    let mut signers = Vec::new();
    for signature in signatures(path)? {
        // A key that nobody pinned says nothing, for or against.
        if !settings.keys.contains(&signature.key) {
            continue;
        }
        signature
            .verify_text(Subject::Healing, text, signature.key)
            .map_err(|source| HealingPolicyError::Signature {
                path: path.to_owned(),
                source,
            })?;
        if counted.insert(signature.key.to_string()) {
            signers.push(signature.key);
        }
    }
    if signers.len() < settings.need {
        return Err(HealingPolicyError::Unsigned {
            path: path.to_owned(),
            found: signers.len(),
            need: settings.need,
        });
    }
    Ok(signers)
}

/// Lines of one signature.
const SIGNATURE_LINES: usize = 3;

/// Where rulings are written down: JSON lines, newest last. A ruling that cannot be written stops nothing; the intent that follows
/// from it is durable or is not carried out.
#[derive(Debug, Clone)]
pub struct Rulings {
    path: PathBuf,
    bytes_max: u64,
}

impl Rulings {
    /// The log of this state directory.
    pub fn of(dir: &StateDir) -> Self {
        Self {
            path: dir.rulings(),
            bytes_max: RULINGS_BYTES_MAX,
        }
    }

    /// Appends one ruling, with the digest of the line before it, so that a line which is taken out or changed later is noticed. A line that
    /// a crash cut short is no ruling and is cut off first.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn append(&self, record: &RulingRecord) -> std::io::Result<()> {
        self.add(|previous| {
            serde_json::to_vec(&RulingRecord {
                previous,
                ..record.clone()
            })
        })
    }

    /// Appends that a person lifted what stood against a service, in the same chain.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub fn append_reinstated(&self, record: &Reinstated) -> std::io::Result<()> {
        self.add(|previous| {
            serde_json::to_vec(&Reinstated {
                previous,
                ..record.clone()
            })
        })
    }

    fn add(&self, line: impl FnOnce(String) -> serde_json::Result<Vec<u8>>) -> std::io::Result<()> {
        let mut file = self.open()?;
        let size = cut_torn(&mut file)?;
        let last = match last_line(&mut file, size)? {
            Some(line) => Some(line),
            // It begins anew, and the chain goes on.
            None => match std::fs::File::open(self.older()) {
                Ok(mut older) => {
                    let size = older.metadata()?.len();
                    last_line(&mut older, size)?
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
                Err(error) => return Err(error),
            },
        };
        let mut line = line(last.as_deref().map(evaluate::line_digest).unwrap_or_default())?;
        line.push(b'\n');
        if size > 0 && size + line.len() as u64 > self.bytes_max {
            std::fs::rename(&self.path, self.older())?;
            file = self.open()?;
        }
        file.write_all(&line)
    }

    fn open(&self) -> std::io::Result<std::fs::File> {
        std::fs::OpenOptions::new()
            .create(true)
            .read(true)
            .append(true)
            .mode(0o600)
            .open(&self.path)
    }

    fn older(&self) -> PathBuf {
        older(&self.path)
    }
}

/// The file that a full log of rulings is renamed to; the one before that is given up.
pub fn older(log: &Path) -> PathBuf {
    log.with_extension("1.jsonl")
}

/// Cuts what follows the last whole line. The size that is left.
fn cut_torn(file: &mut std::fs::File) -> std::io::Result<u64> {
    let size = file.metadata()?.len();
    let mut end = size;
    let mut byte = [0];
    while end > 0 {
        file.seek(SeekFrom::Start(end - 1))?;
        file.read_exact(&mut byte)?;
        if byte == *b"\n" {
            break;
        }
        end -= 1;
    }
    if end < size {
        tracing::warn!(
            bytes = size - end,
            "the log of rulings ended in an incomplete line: cut it off"
        );
        file.set_len(end)?;
    }
    Ok(end)
}

/// The last whole line of a file that ends with one, without its end.
fn last_line(file: &mut std::fs::File, size: u64) -> std::io::Result<Option<Vec<u8>>> {
    let mut length = LINE_GUESS.min(size);
    while length > 0 {
        file.seek(SeekFrom::Start(size - length))?;
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        file.read_exact(&mut bytes)?;
        bytes.pop();
        let begin = bytes.iter().rposition(|byte| *byte == b'\n').map(|at| at + 1);
        if begin.is_some() || length == size {
            return Ok(Some(bytes.split_off(begin.unwrap_or(0))));
        }
        length = (length * 4).min(size);
    }
    Ok(None)
}

/// Where the last line is looked for first, in bytes from the end.
const LINE_GUESS: u64 = 8 << 10;

#[cfg(test)]
mod tests {
    use theriac_privacy::policy::signed::PolicyKey;

    use super::*;

    const POLICY: &str = "version = 3\n[autonomy]\ndefault = 'recommend'\n[[service]]\nname = 'kv'\naction = [\n  \
                          { id = 'start', class = 'R2', autonomy = 'act', cooldown = '30s', max = '3/1h' },\n  \
                          { id = 'restart', class = 'R2', autonomy = 'act', when = 'diag.class == \"hang\" and diag.p >= 0.8' },\n]\n";

    fn key(byte: u8) -> PolicyKey {
        PolicyKey::from_seed(&[byte; 32])
    }

    fn config(root: &Path, text: &str, keys: &[u8], need: usize, signed_by: &[u8]) -> EdgeConfig {
        let policy = root.join("healing.toml");
        std::fs::write(&policy, text).unwrap();
        let signatures: String = signed_by
            .iter()
            .map(|byte| key(*byte).sign_text(Subject::Healing, text).to_string())
            .collect();
        if !signed_by.is_empty() {
            std::fs::write(signature_path(&policy), signatures).unwrap();
        }
        let keys: Vec<String> = keys
            .iter()
            .map(|byte| format!("'{}'", key(*byte).public()))
            .collect();
        let edge = format!(
            "[healing_policy]\nfile = '{}'\nkeys = [{}]\nneed = {need}\n[[service]]\nname = 'kv'\nargv = ['true']\n\
             [[service]]\nname = 'db'\nargv = ['true']\nhealing = {{ autonomy = 'act' }}\n",
            policy.display(),
            keys.join(", ")
        );
        let file = root.join("edge.toml");
        std::fs::write(&file, edge).unwrap();
        EdgeConfig::load(Some(&file), []).unwrap()
    }

    #[test]
    fn a_policy_that_enough_people_signed_holds() {
        let root = tempfile::tempdir().unwrap();
        let mut config = config(root.path(), POLICY, &[1, 2, 3], 2, &[3, 9, 1]);
        let loaded = apply(&mut config).unwrap().unwrap();
        assert_eq!((loaded.version, loaded.signers.len()), (3, 2));
        let rules = config.services[0].healing.rules.as_ref().unwrap();
        assert_eq!(rules.len(), 2);
        // What the policy does not name is only watched, whatever edge.toml says.
        assert!(config.services[1].healing.rules.as_ref().unwrap().is_empty());
    }

    #[test]
    fn too_few_twice_the_same_or_none_is_not_enough() {
        for signed_by in [&[][..], &[1], &[1, 1], &[1, 9]] {
            let root = tempfile::tempdir().unwrap();
            let mut config = config(root.path(), POLICY, &[1, 2], 2, signed_by);
            let error = apply(&mut config).unwrap_err();
            assert!(
                matches!(error, HealingPolicyError::Unsigned { need: 2, .. }),
                "{error}"
            );
        }
    }

    #[test]
    fn one_changed_byte_ends_it() {
        let root = tempfile::tempdir().unwrap();
        let mut config = config(root.path(), POLICY, &[1], 1, &[1]);
        let path = root.path().join("healing.toml");
        std::fs::write(&path, POLICY.replace("3/1h", "9/1h")).unwrap();
        let error = apply(&mut config).unwrap_err().to_string();
        assert!(error.contains("altered after it was signed"), "{error}");
    }

    #[test]
    fn mistakes_are_named_with_the_nearest_right_word() {
        for (from, to, words) in [
            ("cooldown", "cooldwon", "did you mean `cooldown`?"),
            ("'start'", "'strat'", "did you mean `start`?"),
            ("name = 'kv'", "name = 'kw'", "did you mean `kv`?"),
            ("diag.class ==", "diag.clas ==", "did you mean `diag.class`?"),
            ("class = 'R2'", "class = 'R5'", "unknown variant `R5`"),
            ("class = 'R2'", "class = 'R1'", "it is R2, and R1 is less"),
            ("'3/1h'", "'3 per hour'", "such as \"3/1h\""),
            ("version = 3", "version = 0", "begins at 1"),
        ] {
            let root = tempfile::tempdir().unwrap();
            let text = POLICY.replacen(from, to, 1);
            let mut config = config(root.path(), &text, &[1], 1, &[1]);
            let error = apply(&mut config).unwrap_err();
            let said = match &error {
                HealingPolicyError::Form(form) => format!("{form} {}", form.hint()),
                other => other.to_string(),
            };
            assert!(said.contains(words), "{from} -> {to}: {said}");
        }
    }

    fn ruling(incident: u64) -> RulingRecord {
        let facts = format!(
            r#"{{"incident":{incident},"service":"kv","action":"restart","class":"hang","certainty":0.9,"restart_helps":"yes","risk":null,"answers":false,"actions_of_service":0,"actions_of_node":0,"charges":[],"healed_before":0,"demoted":false,"halted":false,"approved":false,"now_ms":1}}"#
        );
        RulingRecord {
            unix_ms: incident,
            policy: "d".to_owned(),
            facts: serde_json::from_str(&facts).unwrap(),
            ruling: evaluate::Ruling::NeedApproval,
            propensity: evaluate::CERTAIN,
            previous: String::new(),
        }
    }

    #[test]
    fn each_ruling_names_the_line_before_it_across_files_and_torn_lines() {
        let root = tempfile::tempdir().unwrap();
        let log = Rulings {
            path: root.path().join("rulings.jsonl"),
            bytes_max: 2_000,
        };
        for incident in 1..=20 {
            log.append(&ruling(incident)).unwrap();
            if incident == 7 {
                let mut file = log.open().unwrap();
                file.write_all(b"{\"unix_ms\": 9, half a li").unwrap();
            }
        }
        let older = std::fs::read_to_string(log.older()).unwrap();
        let newer = std::fs::read_to_string(&log.path).unwrap();
        let lines: Vec<&str> = older.lines().chain(newer.lines()).collect();
        assert!(newer.len() <= 2_000 && lines.len() >= 4);
        for pair in lines.windows(2) {
            let record: RulingRecord = serde_json::from_str(pair[1]).unwrap();
            assert_eq!(record.previous, evaluate::line_digest(pair[0].as_bytes()));
        }
    }

    #[test]
    fn more_approvals_than_keys_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let text = POLICY.replace("max = '3/1h'", "approvals = { need = 2 }");
        let mut few = config(root.path(), &text, &[1], 1, &[1]);
        let error = apply(&mut few).unwrap_err().to_string();
        assert!(
            error.contains("asks for 2 approvals") && error.contains("names 1"),
            "{error}"
        );
        let mut enough = config(root.path(), &text, &[1, 2], 1, &[1]);
        assert!(apply(&mut enough).is_ok());
    }

    #[test]
    fn an_older_version_than_the_last_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::open(&root.path().join("s")).unwrap();
        let loaded = |version| Loaded {
            path: "healing.toml".into(),
            version,
            signers: Vec::new(),
        };
        for version in [2, 3, 3] {
            note_version(&loaded(version), &dir).unwrap();
        }
        let error = note_version(&loaded(2), &dir).unwrap_err();
        assert!(matches!(
            error,
            HealingPolicyError::Stale {
                found: 2,
                known: 3,
                ..
            }
        ));
    }
}
