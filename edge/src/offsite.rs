//! `[offsite]`: sealed copies of valid checkpoints in a store away from this host.
//!
//! The newest valid checkpoint is copied after it was proved, beside everything else the edge does. A store that cannot be reached
//! costs nothing but the copy: the local checkpoint stays valid and the copy is tried again later.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_heal::background::Background;
use theriac_heal::checkpoint::offsite::{Copy, Offsite, OffsiteError, OffsiteKey, Retry, check_url};
use theriac_heal::checkpoint::store::{Checkpoint, CheckpointError, CheckpointStore};
use theriac_heal::checkpoint::which::Which;
use theriac_heal::executor::clock;
use tokio::sync::Notify;

use crate::metrics::{kind as kind_of, service as label};
use crate::postgres::{needs_proof, standing_back};
use crate::service::ServiceContext;
use crate::state_dir::{StateDir, write_durably};

/// `[offsite]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct OffsiteSettings {
    /// `file:///DIRECTORY`, which must exist, such as a mounted disk of another machine; in a build with the feature `s3` also
    /// `s3://BUCKET/PREFIX`, with credentials, region and endpoint from the environment (`AWS_…`).
    pub url: String,
    /// File with the key that seals, mode 0600, made by `theriac-edge checkpoints key`. Without it no copy can be restored: keep one
    /// elsewhere.
    pub key_file: PathBuf,
    /// This host's name in the store, 1 to 63 characters of `a-z`, `0-9` and `-`. Default: the host's. Two hosts of one name would
    /// remove each other's copies.
    pub name: Option<String>,
    /// Copies kept for each service, 1 to 1000, default 3. Older ones are removed after a newer one is complete.
    #[serde(default = "default_keep")]
    pub keep: usize,
}

fn default_keep() -> usize {
    3
}

impl OffsiteSettings {
    /// The first value out of range: its key and what is wrong.
    pub(crate) fn wrong(&self) -> Option<(&'static str, String)> {
        if let Err(error) = check_url(&self.url) {
            return Some(("offsite.url", error.to_string()));
        }
        if !(1..=1_000).contains(&self.keep) {
            return Some(("offsite.keep", format!("{} is outside 1 to 1000", self.keep)));
        }
        let named = |name: &String| {
            (1..=63).contains(&name.len())
                && name
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        };
        match &self.name {
            Some(name) if !named(name) => {
                let words = format!("`{name}` is not 1 to 63 characters of a-z, 0-9 and -");
                Some(("offsite.name", words))
            }
            _ => None,
        }
    }

    /// The copies of one service.
    ///
    /// # Errors
    /// [`OffsiteError`] for a key that cannot be used and a store that is not there.
    pub fn open(&self, service: &str) -> Result<Offsite, OffsiteError> {
        let key = OffsiteKey::load(&self.key_file)?;
        let name = self.name.clone().unwrap_or_else(host_name);
        Offsite::open(&self.url, &format!("{name}/{service}"), key, Retry::default())
    }
}

/// The host's name, with what a name in the store cannot hold replaced.
fn host_name() -> String {
    let name = sysinfo::System::host_name().unwrap_or_default().to_lowercase();
    let kept: String = name
        .chars()
        .take(63)
        .map(|letter| match letter {
            'a'..='z' | '0'..='9' => letter,
            _ => '-',
        })
        .collect();
    if kept.is_empty() { "host".to_owned() } else { kept }
}

/// What is known of a service's copies without asking the store.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct OffsiteRecord {
    /// Complete copies at the last contact, the newest first.
    pub copies: Vec<Copy>,
    /// Why the last attempt failed; `None` after one that did not.
    pub failure: Option<String>,
    /// The last restore drill.
    pub drill: Option<DrillVerdict>,
    /// A drill found damage, and since then no copy was stored with every part opened.
    pub suspect: bool,
}

/// What came of a restore drill from the copy alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DrillVerdict {
    /// Number of the checkpoint.
    pub sequence: u64,
    /// When the drill ended, milliseconds since the Unix epoch.
    pub unix_ms: u64,
    /// Whether the copy was whole and passed its proof.
    pub good: bool,
    /// Why not; empty when it was.
    pub detail: String,
}

impl OffsiteRecord {
    /// The record of a service; an empty one where there is none.
    pub fn read(dir: &StateDir, service: &str) -> Self {
        let path = dir.offsite(service);
        let Ok(bytes) = std::fs::read(&path) else {
            return Self::default();
        };
        serde_json::from_slice(&bytes).unwrap_or_else(|error| {
            tracing::warn!(path = %path.display(), %error, "what went off-site cannot be read: beginning anew");
            Self::default()
        })
    }

    /// Whether a checkpoint has a complete copy.
    pub fn holds(&self, checkpoint: &Checkpoint) -> bool {
        has(&self.copies, checkpoint)
    }

    /// Changes a service's record on disk. An edge and a drill beside it wait for each other.
    pub(crate) fn change(
        dir: &StateDir,
        service: &str,
        change: impl FnOnce(&mut Self),
    ) -> std::io::Result<Self> {
        let lock = std::fs::File::open(dir.checkpoints())?;
        lock.lock()?;
        let mut record = Self::read(dir, service);
        change(&mut record);
        write_durably(&dir.offsite(service), &serde_json::to_vec(&record)?)?;
        Ok(record)
    }
}

fn has(copies: &[Copy], checkpoint: &Checkpoint) -> bool {
    copies
        .iter()
        .any(|copy| (copy.sequence, copy.unix_ms) == (checkpoint.sequence, checkpoint.unix_ms))
}

/// What came of an attempt to copy.
struct Pushed {
    /// Copies there are now.
    copies: Vec<Copy>,
    /// Whether one was stored; otherwise it was there.
    stored: bool,
    /// Whether each part was opened.
    repaired: bool,
    /// The last drill before it.
    drill: Option<DrillVerdict>,
}

/// Copies each new checkpoint of one service.
pub(crate) struct Pusher {
    settings: OffsiteSettings,
    context: ServiceContext,
    checkpoints: Arc<CheckpointStore>,
    new_one: Arc<Notify>,
    background: Background,
    pause: Duration,
}

impl Pusher {
    pub(crate) fn new(
        settings: OffsiteSettings,
        context: ServiceContext,
        checkpoints: Arc<CheckpointStore>,
        new_one: Arc<Notify>,
    ) -> Self {
        let background = standing_back(&context.shared.config);
        Self {
            settings,
            context,
            checkpoints,
            new_one,
            background,
            pause: PAUSE_MIN,
        }
    }

    /// Copies at the start, after each new checkpoint, after a failure when the pause is over, and looks from time to time whether the
    /// copy is still there; for ever.
    pub(crate) async fn run(mut self) {
        loop {
            let wait = if self.push().await {
                self.pause = PAUSE_MIN;
                LOOK_EVERY
            } else {
                let pause = self.pause;
                self.pause = (pause * 2).min(PAUSE_MAX);
                pause
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.new_one.notified() => {}
            }
        }
    }

    /// Copies the newest valid checkpoint unless the store has a copy of it that no drill found damaged. Whether nothing is left to do.
    pub(crate) async fn push(&self) -> bool {
        let service = self.context.shared.name.clone();
        let outcome = self.push_newest(&service).await;
        let (word, failure) = match &outcome {
            Ok(None) => return true,
            Ok(Some(pushed)) if pushed.stored => ("stored", None),
            Ok(Some(_)) => ("there", None),
            Err(error) => ("failed", Some(error.to_string())),
        };
        if word != "there" {
            self.context.metrics.offsite.get_or_create(&kind_of(word)).inc();
        }
        if let Some(error) = &failure {
            tracing::warn!(service, error, retry = ?self.pause, "no off-site copy this time; the local checkpoint stays valid");
        }
        let kept = OffsiteRecord::change(&self.context.dir, &service, |record| {
            record.failure = failure;
            if let Ok(Some(pushed)) = &outcome {
                record.copies.clone_from(&pushed.copies);
                // What a drill found meanwhile stands.
                record.suspect &= !pushed.repaired || record.drill != pushed.drill;
            }
        });
        match kept {
            Ok(record) => {
                let copies = i64::try_from(record.copies.len()).unwrap_or(i64::MAX);
                self.context
                    .metrics
                    .offsite_copies
                    .get_or_create(&label(&service))
                    .set(copies);
            }
            Err(error) => tracing::warn!(service, %error, "cannot note what went off-site"),
        }
        outcome.is_ok()
    }

    /// What is there afterwards; `None` when there is no checkpoint.
    async fn push_newest(&self, service: &str) -> Result<Option<Pushed>, OffsiteError> {
        let Some(newest) = self.newest()? else {
            return Ok(None);
        };
        let record = OffsiteRecord::read(&self.context.dir, service);
        let keep = self.settings.keep;
        // Anew each time: a disk that is mounted again, a key that was replaced.
        let offsite = self.settings.open(service)?.behind(self.background.clone());
        let mut pushed = Pushed {
            copies: Vec::new(),
            stored: true,
            repaired: record.suspect,
            drill: record.drill.clone(),
        };
        let stored = if record.suspect {
            offsite.repair(&newest, keep).await?
        } else {
            // The store is asked, not the record: it may have been emptied or replaced.
            pushed.copies = offsite.list().await?;
            if has(&pushed.copies, &newest) {
                pushed.stored = false;
                return Ok(Some(pushed));
            }
            offsite.push(&newest, keep).await?
        };
        tracing::info!(
            service,
            sequence = newest.sequence,
            sent = stored.sent,
            sent_bytes = stored.sent_bytes,
            there = stored.there,
            "checkpoint copied off-site"
        );
        pushed.copies = offsite.list().await?;
        Ok(Some(pushed))
    }

    fn newest(&self) -> Result<Option<Checkpoint>, CheckpointError> {
        let needs_proof = needs_proof(&self.context.shared.config);
        Ok(self
            .checkpoints
            .list()?
            .into_iter()
            .find(|found| !needs_proof || self.checkpoints.proof(found).is_some()))
    }
}

/// Fetches a copy, the newest without a number, into an empty place.
///
/// # Errors
/// [`OffsiteError`].
pub(crate) async fn fetch(
    settings: &OffsiteSettings,
    service: &str,
    which: Option<Which>,
    into: &Path,
) -> Result<(CheckpointStore, Checkpoint), OffsiteError> {
    let limits = theriac_heal::checkpoint::store::StoreLimits {
        free_bytes_min: crate::storage::FREE_MIN,
        ..theriac_heal::checkpoint::store::StoreLimits::default()
    };
    let store = CheckpointStore::open(into, limits)?;
    let fetched = settings.open(service)?.fetch(which, &store).await?;
    Ok((store, fetched))
}

/// Notes a drill's verdict, unless it could not come to one. After one that found the store's objects damaged or missing, the newest checkpoint is copied anew with every
/// part opened, so that those it shares with others are whole again.
pub(crate) fn note_drill(
    dir: &StateDir,
    service: &str,
    sequence: u64,
    outcome: Result<(), &OffsiteError>,
) -> std::io::Result<()> {
    let of_copies = |error: &OffsiteError| {
        use OffsiteError::{Checkpoint, Damaged, Missing, NoCopy};
        matches!(
            error,
            Damaged { .. } | Missing { .. } | NoCopy { .. } | Checkpoint(_)
        )
    };
    // Where the store is away, or the key, nothing was learnt of any copy: what the last drill found stands.
    if outcome.is_err_and(|error| !of_copies(error)) {
        return Ok(());
    }
    let damaged = matches!(
        outcome,
        Err(OffsiteError::Damaged { .. } | OffsiteError::Missing { .. })
    );
    let verdict = DrillVerdict {
        sequence,
        unix_ms: clock::now().unix_ms,
        good: outcome.is_ok(),
        detail: outcome.err().map_or_else(String::new, ToString::to_string),
    };
    OffsiteRecord::change(dir, service, |record| {
        record.drill = Some(verdict);
        record.suspect |= damaged;
    })
    .map(drop)
}

/// Pause after a first failure; doubled after each further one.
const PAUSE_MIN: Duration = Duration::from_mins(1);
const PAUSE_MAX: Duration = Duration::from_hours(1);
/// Time between two looks whether the newest copy is there, and whether a drill found damage. One listing each.
const LOOK_EVERY: Duration = Duration::from_hours(1);
