//! Copies of valid checkpoints in an object store elsewhere, sealed, from which alone a state can be restored.
//!
//! ```text
//! PREFIX/SERVICE/parts/NAME                     a part of a file, at most 4 MiB, sealed; stored once however many checkpoints have it
//! PREFIX/SERVICE/checkpoints/SEQUENCE-UNIXMS    sealed: the checkpoint's manifest, its proof, and which parts make up which file
//! ```
//!
//! The last object written makes a copy one: before it there are only parts that no copy names, and the next attempt finds
//! and skips them. So an upload that was cut short goes on where it ended. Whether a part is there is told by its name and size, unless a
//! drill has found damage: then every part is opened, and what does not open is sent anew. Fetching compares each file with the digest in the manifest,
//! which the shadow run had proved.

mod place;
mod seal;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use data_encoding::HEXLOWER;
use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, ObjectStoreExt as _, PutPayload};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

pub use self::place::check_url;
use self::place::open_store;
use self::seal::OVERHEAD;
pub use self::seal::OffsiteKey;
use super::manifest::{Kind, Manifest};
use super::proof::PROOF;
use super::remnant::{Size, remnant};
use super::store::{
    Checkpoint, CheckpointError, CheckpointStore, FETCHED, INCOMPLETE, MANIFEST, TREE, at, joined, name_of,
    needs_room, parse_name, sync_dir, verify_at, write_synced,
};
use super::unblock_behind;
use super::which::Which;
use crate::background::Background;

/// Why a copy could not be stored, fetched or listed. The local checkpoints stay as they are.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OffsiteError {
    /// The store does not do as asked.
    #[error("the off-site store {url} does not answer as it should: {source}")]
    Unreachable {
        /// Where.
        url: String,
        /// Its word.
        source: object_store::Error,
    },
    /// The address of the store is none.
    #[error("`{url}`: {what}")]
    Url {
        /// As written.
        url: String,
        /// What is wrong.
        what: String,
    },
    /// The key file cannot be used.
    #[error("key file {path}: {source}")]
    Key {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// An object was sealed with another key.
    #[error("{object} was sealed with key {sealed}, and ours is {ours}: name that key's file")]
    OtherKey {
        /// The object.
        object: String,
        /// Id of its key.
        sealed: String,
        /// Id of ours.
        ours: String,
    },
    /// An object is not what was stored.
    #[error("off-site object {object} {what}")]
    Damaged {
        /// The object.
        object: String,
        /// What is wrong.
        what: String,
    },
    /// A copy lacks an object.
    #[error("off-site object {object} is missing, so {file} cannot be restored")]
    Missing {
        /// The object.
        object: String,
        /// The file that it is a part of.
        file: String,
    },
    /// There is no such copy.
    #[error("{url} holds no copy of `{service}`{which}")]
    NoCopy {
        /// Where was looked.
        url: String,
        /// Whose.
        service: String,
        /// Its number, in words.
        which: String,
    },
    /// The local side.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

/// How often a failed request is made again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retry {
    /// Attempts, 1 to 10.
    pub attempts: u32,
    /// Wait after the first; doubled after each further one.
    pub wait: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            attempts: 4,
            wait: Duration::from_secs(1),
        }
    }
}

/// A complete copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copy {
    /// Number of the checkpoint.
    pub sequence: u64,
    /// When that was taken, milliseconds since the Unix epoch.
    pub unix_ms: u64,
}

/// What storing a copy took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stored {
    /// Parts sent.
    pub sent: u64,
    /// Their sealed bytes.
    pub sent_bytes: u64,
    /// Parts that were there already.
    pub there: u64,
}

/// The copies of one service.
#[derive(Debug, Clone)]
pub struct Offsite {
    store: Arc<dyn ObjectStore>,
    url: String,
    prefix: String,
    service: String,
    key: OffsiteKey,
    retry: Retry,
    background: Background,
}

/// Whether parts that the store lists are what was stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum There {
    /// A name and a size are enough.
    Believed,
    /// Each is fetched and opened; one that does not open is stored anew. For a store that was found damaged.
    Opened,
}

/// What is sealed into a checkpoint's own object.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sheet {
    format: u32,
    service: String,
    /// The manifest file, whole.
    manifest: String,
    /// The proof file, whole, where there is one.
    proof: Option<String>,
    /// SHA-256 of each file → SHA-256 of its parts, in order.
    parts: BTreeMap<String, Vec<String>>,
}

impl Offsite {
    /// `url` is `file:///DIRECTORY`, which must exist (a disk that is not mounted must not be taken for an empty one), or
    /// `s3://BUCKET/PREFIX` in a build with the feature `s3`, whose credentials, region and endpoint come from the environment (`AWS_…`).
    ///
    /// # Errors
    /// [`OffsiteError::Url`], [`OffsiteError::Unreachable`].
    pub fn open(url: &str, service: &str, key: OffsiteKey, retry: Retry) -> Result<Self, OffsiteError> {
        // What is not UTF-8 is no setting of a store.
        let variables = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        Self::open_with(url, service, key, retry, variables)
    }

    /// The same with `variables` (name, value) in the place of the environment.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_with(
        url: &str,
        service: &str,
        key: OffsiteKey,
        retry: Retry,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, OffsiteError> {
        let (store, prefix) = open_store(url, variables)?;
        Ok(Self::over(store, url, &prefix, service, key, retry))
    }

    /// The same over a store that is open.
    pub fn over(
        store: Arc<dyn ObjectStore>,
        url: &str,
        prefix: &str,
        service: &str,
        key: OffsiteKey,
        retry: Retry,
    ) -> Self {
        Self {
            store,
            url: url.to_owned(),
            prefix: prefix.to_owned(),
            service: service.to_owned(),
            key,
            retry,
            background: Background::new(0, None),
        }
    }

    /// How far reading, sealing and writing stand back for the host's services.
    #[must_use]
    pub fn behind(mut self, background: Background) -> Self {
        self.background = background;
        self
    }

    /// Complete copies, the newest first.
    ///
    /// # Errors
    /// [`OffsiteError::Unreachable`].
    pub async fn list(&self) -> Result<Vec<Copy>, OffsiteError> {
        let mut found: Vec<Copy> = self
            .names("checkpoints")
            .await?
            .keys()
            .filter_map(|name| {
                let (sequence, unix_ms) = parse_name(name)?;
                Some(Copy { sequence, unix_ms })
            })
            .collect();
        // Numbers begin anew on a host that lost its store, so the time counts first.
        found.sort_by_key(|copy| std::cmp::Reverse((copy.unix_ms, copy.sequence)));
        Ok(found)
    }

    /// Stores a copy of a valid checkpoint, then removes copies beyond the newest `keep` and parts that no copy has any more. Each
    /// file is compared with the manifest as it is read.
    ///
    /// # Errors
    /// [`OffsiteError::Checkpoint`] when the local checkpoint is not what its manifest says, or is gone; [`OffsiteError::Unreachable`]
    /// after the retries; then the next call goes on where this one ended.
    pub async fn push(&self, checkpoint: &Checkpoint, keep: usize) -> Result<Stored, OffsiteError> {
        let sent = self.send(checkpoint, keep, There::Believed);
        Box::pin(self.background.during(sent)).await
    }

    /// The same, but every part that the store lists is fetched and opened, and stored anew when it is not what was stored: for a store
    /// that was found damaged.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub async fn repair(&self, checkpoint: &Checkpoint, keep: usize) -> Result<Stored, OffsiteError> {
        let sent = self.send(checkpoint, keep, There::Opened);
        Box::pin(self.background.during(sent)).await
    }

    async fn send(&self, checkpoint: &Checkpoint, keep: usize, trust: There) -> Result<Stored, OffsiteError> {
        let path = &checkpoint.path;
        let read = |name: &str| {
            let file = path.join(name);
            fs::read_to_string(&file).map_err(at(&file))
        };
        let text = read(MANIFEST)?;
        let corrupt = |what: String| CheckpointError::Corrupt {
            path: path.clone(),
            what,
        };
        let manifest = Manifest::decode(text.as_bytes()).map_err(corrupt)?;
        let there = self.names("parts").await?;
        let mut stored = Stored::default();
        let mut parts = BTreeMap::new();
        for entry in &manifest.entries {
            let Kind::File { sha256, bytes } = &entry.kind else {
                continue;
            };
            if parts.contains_key(sha256) {
                continue;
            }
            let file = joined(&path.join(TREE), &entry.path);
            let listed = (&there, trust);
            let sent = self.push_file(&file, *bytes, sha256, listed, &mut stored).await?;
            parts.insert(sha256.clone(), sent);
        }
        let sheet = Sheet {
            format: FORMAT,
            service: self.service.clone(),
            manifest: text,
            proof: read(PROOF).ok(),
            parts,
        };
        let body = serde_json::to_vec(&sheet).map_err(|error| at(path)(error.into()))?;
        let name = name_of(checkpoint.sequence, checkpoint.unix_ms);
        self.put("checkpoints", &name, body).await?;
        let just = Copy {
            sequence: checkpoint.sequence,
            unix_ms: checkpoint.unix_ms,
        };
        self.remove_old(keep.max(1), &just).await?;
        Ok(stored)
    }

    async fn push_file(
        &self,
        path: &Path,
        bytes: u64,
        sha256: &str,
        (there, trust): (&BTreeMap<String, u64>, There),
        stored: &mut Stored,
    ) -> Result<Vec<String>, OffsiteError> {
        let mut file = File::open(path).map_err(at(path))?;
        let mut whole = Sha256::new();
        let mut parts = Vec::new();
        let mut read = 0;
        loop {
            // One part in memory, whatever the file's size.
            let from = path.to_owned();
            let part;
            let digest;
            (file, whole, part, digest) = self
                .apart(move || {
                    let mut part = Vec::new();
                    (&mut file)
                        .take(PART_BYTES)
                        .read_to_end(&mut part)
                        .map_err(at(&from))?;
                    whole.update(&part);
                    let digest = HEXLOWER.encode(&Sha256::digest(&part));
                    Ok((file, whole, part, digest))
                })
                .await?;
            if part.is_empty() {
                break;
            }
            read += part.len() as u64;
            let name = self.key.name(&digest);
            let listed = there.get(&name) == Some(&((part.len() + OVERHEAD) as u64));
            if listed && (trust == There::Believed || self.opens(&digest, path).await?) {
                stored.there += 1;
            } else {
                stored.sent_bytes += self.put("parts", &name, part).await?;
                stored.sent += 1;
            }
            parts.push(digest);
        }
        if read != bytes || HEXLOWER.encode(&whole.finalize()) != sha256 {
            let error = CheckpointError::Corrupt {
                path: path.to_owned(),
                what: "it is not what the manifest says, so it was not copied off-site".to_owned(),
            };
            return Err(error.into());
        }
        Ok(parts)
    }

    /// Whether a part that the store lists is what was stored.
    async fn opens(&self, digest: &str, file: &Path) -> Result<bool, OffsiteError> {
        match self.part(digest, file).await {
            Ok(_) => Ok(true),
            Err(error @ OffsiteError::Unreachable { .. }) => Err(error),
            Err(error) => {
                tracing::warn!(%error, "stored anew");
                Ok(false)
            }
        }
    }

    /// Fetches a copy, the newest by its time without a number, into `into`, where it becomes a checkpoint with its proof, after all that
    /// were taken there. One that is there already is compared with its digests instead.
    ///
    /// # Errors
    /// [`OffsiteError`], with [`CheckpointError::SeveralOfNumber`] when the number alone does not tell; then `into` is as it was.
    pub async fn fetch(
        &self,
        which: Option<Which>,
        into: &CheckpointStore,
    ) -> Result<Checkpoint, OffsiteError> {
        let fetched = self.fetch_behind(which, into);
        Box::pin(self.background.during(fetched)).await
    }

    async fn fetch_behind(
        &self,
        which: Option<Which>,
        into: &CheckpointStore,
    ) -> Result<Checkpoint, OffsiteError> {
        let copies = self.list().await?;
        let chosen = match which {
            None => copies.first().cloned(),
            Some(which) => which
                .only(copies.iter().map(|copy| (copy.sequence, copy.unix_ms)))
                .map_err(|names| CheckpointError::SeveralOfNumber {
                    place: self.url.clone(),
                    sequence: which.sequence,
                    names,
                })?
                .map(|(sequence, unix_ms)| Copy { sequence, unix_ms }),
        };
        let chosen = chosen.ok_or_else(|| OffsiteError::NoCopy {
            url: self.url.clone(),
            service: self.service.clone(),
            which: which.map_or_else(String::new, |which| format!(" with number {which}")),
        })?;
        let name = name_of(chosen.sequence, chosen.unix_ms);
        let sheet = self.sheet(&name).await?;
        let manifest = self.manifest(&sheet, &name)?;
        let path = into.dir().join(&name);
        let checkpoint = Checkpoint {
            sequence: chosen.sequence,
            unix_ms: chosen.unix_ms,
            files: manifest.files(),
            bytes: manifest.bytes(),
            path: path.clone(),
        };
        if path.symlink_metadata().is_ok() {
            let found = path.clone();
            unblock_behind(&self.background, move || verify_at(&found).map(drop)).await?;
            return Ok(checkpoint);
        }
        needs_room(into.dir(), manifest.bytes(), into.limits().free_bytes_min)?;
        let staging = into.dir().join(format!("{INCOMPLETE}{name}"));
        if staging.exists() {
            fs::remove_dir_all(&staging).map_err(at(&staging))?;
        }
        let written = self.write(&sheet, &manifest, &staging).await;
        if written.is_err()
            && staging.exists()
            && let Err(error) = fs::remove_dir_all(&staging)
        {
            tracing::warn!(path = %staging.display(), %error, "incomplete copy not removed");
        }
        written?;
        let store = into.clone();
        unblock_behind(&self.background, move || {
            verify_at(&staging)?;
            write_synced(&staging.join(FETCHED), b"", 0)?;
            let dir = File::open(&staging).map_err(at(&staging))?;
            rustix::fs::syncfs(&dir).map_err(|error| at(&staging)(error.into()))?;
            let _guard = store.guard()?;
            fs::rename(&staging, &path).map_err(at(&path))?;
            sync_dir(store.dir())
        })
        .await?;
        Ok(checkpoint)
    }

    async fn write(&self, sheet: &Sheet, manifest: &Manifest, staging: &Path) -> Result<(), OffsiteError> {
        let make = |path: &Path| DirBuilder::new().mode(0o700).create(path).map_err(at(path));
        make(staging)?;
        let tree = staging.join(TREE);
        for entry in &manifest.entries {
            let path = joined(&tree, &entry.path);
            match &entry.kind {
                Kind::Folder => make(&path)?,
                Kind::Link { target } => std::os::unix::fs::symlink(target, &path).map_err(at(&path))?,
                Kind::File { sha256, .. } => {
                    let parts = sheet.parts.get(sha256).ok_or_else(|| OffsiteError::Damaged {
                        object: entry.path.display().to_string(),
                        what: "is named by no part of the copy".to_owned(),
                    })?;
                    let mut file = File::options()
                        .write(true)
                        .create_new(true)
                        .mode(0o600)
                        .open(&path)
                        .map_err(at(&path))?;
                    let mut whole = Sha256::new();
                    for digest in parts {
                        let part = self.part(digest, &entry.path).await?;
                        let to = path.clone();
                        (file, whole) = self
                            .apart(move || {
                                whole.update(&part);
                                file.write_all(&part).map_err(at(&to))?;
                                Ok((file, whole))
                            })
                            .await?;
                    }
                    if HEXLOWER.encode(&whole.finalize()) != *sha256 {
                        return Err(OffsiteError::Damaged {
                            object: entry.path.display().to_string(),
                            what: "is not what the manifest says".to_owned(),
                        });
                    }
                }
            }
        }
        write_synced(&staging.join(MANIFEST), sheet.manifest.as_bytes(), 0)?;
        if let Some(proof) = &sheet.proof {
            write_synced(&staging.join(PROOF), proof.as_bytes(), 0)?;
        }
        Ok(())
    }

    async fn part(&self, digest: &str, file: &Path) -> Result<Vec<u8>, OffsiteError> {
        let name = self.key.name(digest);
        let sealed = self
            .get("parts", &name, PART_BYTES + OVERHEAD as u64)
            .await?
            .ok_or_else(|| OffsiteError::Missing {
                object: self.object("parts", &name).to_string(),
                file: file.display().to_string(),
            })?;
        let (key, digest) = (self.key.clone(), digest.to_owned());
        self.apart(move || {
            let part = key.open(&format!("parts/{name}"), &sealed)?;
            if HEXLOWER.encode(&Sha256::digest(&part)) != digest {
                return Err(OffsiteError::Damaged {
                    object: name,
                    what: "holds another part".to_owned(),
                });
            }
            Ok(part)
        })
        .await
    }

    async fn sheet(&self, name: &str) -> Result<Sheet, OffsiteError> {
        let object = self.object("checkpoints", name).to_string();
        let sealed = self
            .get("checkpoints", name, SHEET_BYTES_MAX)
            .await?
            .ok_or_else(|| OffsiteError::Missing {
                object: object.clone(),
                file: "the checkpoint".to_owned(),
            })?;
        let body = self.key.open(&format!("checkpoints/{name}"), &sealed)?;
        let sheet: Sheet = serde_json::from_slice(&body).map_err(|error| OffsiteError::Damaged {
            object: object.clone(),
            what: format!("holds no checkpoint: {error}"),
        })?;
        if (sheet.format, sheet.service.as_str()) != (FORMAT, self.service.as_str()) {
            return Err(OffsiteError::Damaged {
                object,
                what: format!("is format {} of service `{}`", sheet.format, sheet.service),
            });
        }
        Ok(sheet)
    }

    fn manifest(&self, sheet: &Sheet, name: &str) -> Result<Manifest, OffsiteError> {
        Manifest::decode(sheet.manifest.as_bytes()).map_err(|what| OffsiteError::Damaged {
            object: self.object("checkpoints", name).to_string(),
            what,
        })
    }

    /// Removes copies beyond the newest `keep`, then the parts that no copy has. `just` is the copy that was written a moment ago: the
    /// newest whatever the times say, so that those of a clock that was ahead are the first to go. Nothing is removed before all
    /// that stay were read. The last copy from before the state lost nine tenths stays as well, for a week. One that does not open is none of the `keep`; while one stays, all parts do.
    async fn remove_old(&self, keep: usize, just: &Copy) -> Result<(), OffsiteError> {
        let mut copies = self.list().await?;
        // Stable: within each group the newest by its time comes first.
        copies.sort_by_key(|copy| (copy != just, copy.unix_ms > just.unix_ms));
        let (mut kept, mut unread, mut old) = (0, 0, Vec::new());
        let mut used = BTreeSet::new();
        let mut sizes = Vec::new();
        for copy in copies {
            let name = name_of(copy.sequence, copy.unix_ms);
            // The last one from before the state lost nearly all stays, one of the `keep` or not.
            let lost = remnant(sizes.iter().copied());
            if kept >= keep && lost.is_some() {
                old.push(name);
                continue;
            }
            match self.sheet(&name).await {
                Ok(sheet) => {
                    let bytes = self
                        .manifest(&sheet, &name)
                        .map_or(0, |manifest| manifest.bytes());
                    let unix_ms = copy.unix_ms;
                    sizes.push(Size { unix_ms, bytes });
                    if kept >= keep && remnant(sizes.iter().copied()).is_none() {
                        sizes.pop();
                        old.push(name);
                        continue;
                    }
                    kept += 1;
                    used.extend(sheet.parts.values().flatten().map(|digest| self.key.name(digest)));
                }
                Err(error @ OffsiteError::Unreachable { .. }) => return Err(error),
                Err(_) if kept >= keep => old.push(name),
                Err(error) => {
                    unread += 1;
                    tracing::warn!(copy = name, %error, "a copy that does not open does not count");
                }
            }
        }
        if old.is_empty() {
            return Ok(());
        }
        for name in &old {
            self.delete("checkpoints", name).await?;
        }
        if unread > 0 {
            return Ok(());
        }
        for name in self.names("parts").await?.into_keys() {
            if !used.contains(&name) {
                self.delete("parts", &name).await?;
            }
        }
        Ok(())
    }

    /// Runs what takes processor time off the async threads, standing back.
    async fn apart<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, OffsiteError> + Send + 'static,
    ) -> Result<T, OffsiteError> {
        let ended = self.background.unblock(work).await;
        ended.unwrap_or_else(|source| Err(at(Path::new(&self.url))(source).into()))
    }

    fn object(&self, folder: &str, name: &str) -> ObjectPath {
        ObjectPath::from(format!("{}/{}/{folder}/{name}", self.prefix, self.service))
    }

    /// Names in a folder and their sizes.
    async fn names(&self, folder: &str) -> Result<BTreeMap<String, u64>, OffsiteError> {
        let prefix = ObjectPath::from(format!("{}/{}/{folder}", self.prefix, self.service));
        // A folder that nothing was put into yet is an empty list; `NotFound` is a bucket that is gone.
        let listed = self
            .persist(|| self.store.list_with_delimiter(Some(&prefix)))
            .await?;
        Ok(listed
            .objects
            .into_iter()
            .filter_map(|meta| Some((meta.location.filename()?.to_owned(), meta.size)))
            .collect())
    }

    /// Seals and stores. Sealed bytes.
    async fn put(&self, folder: &str, name: &str, body: Vec<u8>) -> Result<u64, OffsiteError> {
        let (key, bound) = (self.key.clone(), format!("{folder}/{name}"));
        let sealed = self.apart(move || key.seal(&bound, &body)).await?;
        let sealed = bytes::Bytes::from(sealed);
        let object = self.object(folder, name);
        let length = sealed.len() as u64;
        self.persist(|| self.store.put(&object, PutPayload::from(sealed.clone())))
            .await?;
        Ok(length)
    }

    /// `None` when it is not there. No more than `max` bytes are taken into memory, whatever lies there.
    async fn get(&self, folder: &str, name: &str, max: u64) -> Result<Option<bytes::Bytes>, OffsiteError> {
        let object = self.object(folder, name);
        let found = unless_gone(
            self.persist(|| async {
                let found = self.store.get(&object).await?;
                let bytes = found.meta.size;
                if bytes > max {
                    return Ok(Err(bytes));
                }
                found.bytes().await.map(Ok)
            })
            .await,
        )?;
        found.transpose().map_err(|bytes| OffsiteError::Damaged {
            object: object.to_string(),
            what: format!("has {bytes} bytes, and at most {max} were stored"),
        })
    }

    async fn delete(&self, folder: &str, name: &str) -> Result<(), OffsiteError> {
        let object = self.object(folder, name);
        unless_gone(self.persist(|| self.store.delete(&object)).await).map(drop)
    }

    /// Makes a request again while it fails; not one for what is not there, which no retry changes.
    async fn persist<T, F: Future<Output = object_store::Result<T>>>(
        &self,
        request: impl Fn() -> F,
    ) -> Result<T, OffsiteError> {
        let mut wait = self.retry.wait;
        let mut attempt = 1;
        loop {
            let source = match request().await {
                Ok(answer) => return Ok(answer),
                Err(source) => source,
            };
            if attempt >= self.retry.attempts || matches!(source, object_store::Error::NotFound { .. }) {
                let url = self.url.clone();
                return Err(OffsiteError::Unreachable { url, source });
            }
            tracing::debug!(error = %source, attempt, "off-site request failed");
            tokio::time::sleep(wait).await;
            wait *= 2;
            attempt += 1;
        }
    }
}

/// `None`: there is no such object.
fn unless_gone<T>(asked: Result<T, OffsiteError>) -> Result<Option<T>, OffsiteError> {
    match asked {
        Ok(answer) => Ok(Some(answer)),
        Err(OffsiteError::Unreachable {
            source: object_store::Error::NotFound { .. },
            ..
        }) => Ok(None),
        Err(error) => Err(error),
    }
}

const FORMAT: u32 = 1;
/// Largest part: what is held in memory at once, twice with its seal.
const PART_BYTES: u64 = 4 << 20;
/// Largest object of a checkpoint itself that is read: enough for a state of many terabytes.
const SHEET_BYTES_MAX: u64 = 1 << 30;
