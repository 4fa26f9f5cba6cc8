//! A detector as `NAME.safetensors` beside its card `NAME.json`.
//!
//! The card is also kept inside the tensor file (metadata key `theriac`), and that copy is the one that is read:
//! one rename replaces a model whole, and a crash cannot pair a card with other tensors. The tensors' SHA-256 in the
//! card finds a file that was cut short or changed.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use safetensors::tensor::{Dtype, SafeTensorError, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::LAG_COUNT;
use crate::arm::{self, Arm};
use crate::detector::{Detector, FitOptions, Provenance};
use crate::feature::FeatureSchema;
use crate::forecaster::{Forecaster, ResidualNetwork};
use crate::global::{GlobalModel, OwnLagWeights, delta_layout, model_layout};
use crate::linear::FullWeights;
use crate::normalise::Normaliser;
use crate::personalise::Leaning;
use crate::ridge::FULL_CHANNELS_MAX;
use crate::score::{HALF_LIVES, Head};
use crate::threshold::Threshold;

/// Version of the file format that this build writes, and the only one it reads.
pub const FORMAT_VERSION: u32 = 1;

/// Largest model file that is read, in bytes: far above what 1 000 channels need.
const FILE_BYTES_MAX: u64 = 256 << 20;

const METADATA_KEY: &str = "theriac";

/// Why a model file was not written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelFileError {
    /// The disk said no.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Larger than any model is.
    #[error("{path} has {found} bytes, more than the {limit} of the largest model: it is another file")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        found: u64,
        /// The limit.
        limit: u64,
    },
    /// Cut short or not a safetensors file.
    #[error(
        "{path} is cut short or no safetensors file ({source}): restore it from a checkpoint or train again"
    )]
    NotSafetensors {
        /// The file.
        path: PathBuf,
        /// What the reader said.
        source: SafeTensorError,
    },
    /// A safetensors file without our card.
    #[error("{path} holds no Theriac model card ({reason}): it was written by another program")]
    NoCard {
        /// The file.
        path: PathBuf,
        /// What is missing or wrong.
        reason: String,
    },
    /// What sites exchange, from which a detector has yet to be fitted.
    #[error(
        "{path} holds the global model of a federation, which is no detector: name the file that `theriac-edge train` wrote"
    )]
    Global {
        /// The file.
        path: PathBuf,
    },
    /// Written by another version of the program.
    #[error(
        "{path} has format version {found}, this build reads {expected}: use the build that wrote it, or train again"
    )]
    FormatVersion {
        /// The file.
        path: PathBuf,
        /// The version this build reads.
        expected: u32,
        /// The file's version.
        found: u64,
    },
    /// The tensors are not the ones the card was written for.
    #[error(
        "{path} is damaged: its tensors have SHA-256 {found}, its card says {expected}; restore it from a checkpoint"
    )]
    Digest {
        /// The file.
        path: PathBuf,
        /// What the card says.
        expected: String,
        /// What was computed.
        found: String,
    },
    /// A tensor is missing or has another shape or type.
    #[error("{path} has another layout: tensor `{tensor}` should be {expected}, found {found}; train again")]
    Layout {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Type and shape that the card's profile asks for.
        expected: String,
        /// Type and shape that were found.
        found: String,
    },
    /// A tensor holds a value that no fit makes.
    #[error("{path} is damaged: tensor `{tensor}` holds a value that is not finite or not in its range")]
    Value {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
}

/// What people and other programs read about a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Card {
    format_version: u32,
    /// SHA-256 of the federation's parameter layout for this number of channels.
    layout_digest: String,
    profile_digest: String,
    profile: FeatureSchema,
    #[serde(flatten)]
    provenance: Provenance,
    /// Rows that it was fitted on.
    rows: u64,
    step_seconds: f64,
    half_lives_seconds: [f64; HALF_LIVES],
    false_alarms_per_day: f64,
    /// Files that were written before there were several have none.
    #[serde(default)]
    arm: Arm,
    /// How strongly each path leans on the prior; files that were written before it was chosen have none.
    #[serde(default)]
    prior_lambda: Leaning,
    /// SHA-256 over name, type, shape and bytes of all tensors in the order of their names.
    tensors_sha256: String,
}

/// The card of a [`GlobalModel`].
#[derive(Debug, Clone, PartialEq, Serialize)]
struct GlobalCard {
    format_version: u32,
    layout_digest: String,
    profile_digest: String,
    profile: FeatureSchema,
    #[serde(flatten)]
    provenance: Provenance,
    tensors_sha256: String,
}

impl Detector {
    /// Writes `NAME.safetensors` and `NAME.json` into `dir`, which must exist. Each file is whole or not there:
    /// written beside its place, synced, renamed; the directory is synced last.
    ///
    /// # Errors
    /// [`ModelFileError::Io`] naming the file, for instance when the disk is full; the former model is then intact.
    pub fn save(&self, dir: &Path, name: &str) -> Result<(), ModelFileError> {
        let tensors = self.tensors();
        write(dir, name, &tensors, &self.card(digest(&tensors)))
    }

    /// Reads `NAME.safetensors` from `dir` and checks everything in it.
    ///
    /// # Errors
    /// Every variant of [`ModelFileError`]; none leaves a half-read model behind.
    pub fn load(dir: &Path, name: &str) -> Result<Self, ModelFileError> {
        let path = dir.join(format!("{name}.safetensors"));
        let size = fs::metadata(&path)
            .map_err(|source| io("read", &path, source))?
            .len();
        if size > FILE_BYTES_MAX {
            return Err(ModelFileError::TooLarge {
                path,
                found: size,
                limit: FILE_BYTES_MAX,
            });
        }
        let bytes = fs::read(&path).map_err(|source| io("read", &path, source))?;
        let not_ours = |source| ModelFileError::NotSafetensors {
            path: path.clone(),
            source,
        };
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(not_ours)?;
        let card = metadata.metadata().as_ref().and_then(|map| map.get(METADATA_KEY));
        let card = read_card(&path, card.map(String::as_str))?;
        let file = SafeTensors::deserialize(&bytes).map_err(not_ours)?;
        let tensors: BTreeMap<String, Tensor> = file
            .iter()
            .map(|(name, view)| {
                let tensor = Tensor {
                    dtype: view.dtype(),
                    shape: view.shape().to_vec(),
                    bytes: view.data().to_vec(),
                };
                (name.to_owned(), tensor)
            })
            .collect();
        let found = digest(&tensors);
        if found != card.tensors_sha256 {
            return Err(ModelFileError::Digest {
                path,
                expected: card.tensors_sha256,
                found,
            });
        }
        Reader {
            path: &path,
            tensors: &tensors,
        }
        .detector(card)
    }

    fn card(&self, tensors_sha256: String) -> Card {
        Card {
            format_version: FORMAT_VERSION,
            layout_digest: hex(model_layout(self.schema.channels()).digest()),
            profile_digest: hex(self.schema.digest()),
            profile: self.schema.clone(),
            provenance: self.provenance.clone(),
            rows: self.rows,
            step_seconds: self.options.step.as_secs_f64(),
            half_lives_seconds: self.options.half_lives.map(|h| h.as_secs_f64()),
            false_alarms_per_day: self.options.false_alarms_per_day,
            arm: self.options.arm,
            prior_lambda: self.leaning,
            tensors_sha256,
        }
    }

    fn tensors(&self) -> BTreeMap<String, Tensor> {
        let channels = self.schema.channels();
        let seen: Vec<f32> = self
            .normaliser
            .seen
            .iter()
            .map(|seen| f32::from(u8::from(*seen)))
            .collect();
        let Threshold {
            level,
            start,
            decay,
            growth,
        } = self.threshold;
        let mut tensors = BTreeMap::from([
            (
                "forecast.own.weight".to_owned(),
                Tensor::f32(&[channels, LAG_COUNT + 1], &self.forecaster.own),
            ),
            (
                "normaliser.location".to_owned(),
                Tensor::f32(&[channels], &self.normaliser.location),
            ),
            (
                "normaliser.scale".to_owned(),
                Tensor::f32(&[channels], &self.normaliser.scale),
            ),
            ("normaliser.seen".to_owned(), Tensor::f32(&[channels], &seen)),
            (
                "threshold.state".to_owned(),
                Tensor::f64(&[4], &[level, start, decay, growth]),
            ),
        ]);
        if !self.forecaster.full.is_empty() {
            let full = Tensor::f32(&[channels * LAG_COUNT + 1, channels], &self.forecaster.full);
            tensors.insert(FULL.to_owned(), full);
        }
        for (path, head) in PATHS.iter().zip(&self.heads) {
            let level = [head.level[0], head.level[1], head.overall];
            tensors.insert(format!("head.{path}.base"), Tensor::f32(&[channels], &head.base));
            tensors.insert(format!("head.{path}.level"), Tensor::f64(&[3], &level));
        }
        if let Some(network) = &self.forecaster.network {
            tensors.insert(
                NETWORK.to_owned(),
                Tensor::f32(&[network.values().len()], network.values()),
            );
        }
        if let Some(prior) = &self.options.prior {
            tensors.insert(
                PRIOR.to_owned(),
                Tensor::f32(&[channels, LAG_COUNT], prior.values()),
            );
            tensors.insert(PRIOR_LEVEL.to_owned(), Tensor::f32(&[channels], prior.levels()));
        }
        if let Some(prior) = &self.options.full_prior {
            let shape = [channels * LAG_COUNT + 1, channels];
            tensors.insert(PRIOR_FULL.to_owned(), Tensor::f32(&shape, prior.values()));
        }
        tensors
    }
}

impl GlobalModel {
    /// Writes the model that crosses sites as `NAME.safetensors` and `NAME.json`, in the same way as [`Detector::save`]: its
    /// tensors under the names of its layout, and a card with profile, layout digest and provenance. It holds nothing
    /// of any one site; theriac programs exchange it as a message, so this form is for people and other programs.
    ///
    /// # Errors
    /// [`ModelFileError::Io`] naming the file.
    pub fn save(
        &self,
        dir: &Path,
        name: &str,
        profile: &FeatureSchema,
        provenance: &Provenance,
    ) -> Result<(), ModelFileError> {
        let tensor = |(name, shape, range): (&str, &[usize], std::ops::Range<usize>)| {
            (name.to_owned(), Tensor::f32(shape, &self.values()[range]))
        };
        let tensors: BTreeMap<String, Tensor> = self.layout().iter().map(tensor).collect();
        let card = GlobalCard {
            format_version: FORMAT_VERSION,
            layout_digest: hex(self.layout().digest()),
            profile_digest: hex(profile.digest()),
            profile: profile.clone(),
            provenance: provenance.clone(),
            tensors_sha256: digest(&tensors),
        };
        write(dir, name, &tensors, &card)
    }
}

const PATHS: [&str; 2] = ["own", "full"];
const FULL: &str = "forecast.full.weight";
const NETWORK: &str = "network.values";
const PRIOR: &str = "prior.own_lag.weight";
const PRIOR_LEVEL: &str = "prior.own_lag.level";
const PRIOR_FULL: &str = "prior.full.weight";

fn read_card(path: &Path, text: Option<&str>) -> Result<Card, ModelFileError> {
    let no_card = |reason: String| ModelFileError::NoCard {
        path: path.to_owned(),
        reason,
    };
    let text = text.ok_or_else(|| no_card(format!("no metadata `{METADATA_KEY}`")))?;
    let value: serde_json::Value = serde_json::from_str(text).map_err(|e| no_card(e.to_string()))?;
    // A detector's card has the time between its rows besides; see `Card` and `GlobalCard`.
    if value.get("layout_digest").is_some() && value.get("step_seconds").is_none() {
        return Err(ModelFileError::Global {
            path: path.to_owned(),
        });
    }
    let version = value["format_version"]
        .as_u64()
        .ok_or_else(|| no_card("no format_version".to_owned()))?;
    if version != u64::from(FORMAT_VERSION) {
        return Err(ModelFileError::FormatVersion {
            path: path.to_owned(),
            expected: FORMAT_VERSION,
            found: version,
        });
    }
    serde_json::from_value(value).map_err(|e| no_card(e.to_string()))
}

/// Takes tensors out of a file by name, checking each.
struct Reader<'a> {
    path: &'a Path,
    tensors: &'a BTreeMap<String, Tensor>,
}

impl Reader<'_> {
    fn detector(&self, card: Card) -> Result<Detector, ModelFileError> {
        let channels = card.profile.channels();
        let options = self.options(&card, channels)?;
        let positive = |name: &str, values: Vec<f32>| self.check(name, values, |v| *v > 0.0);
        let normaliser = Normaliser::from_parts(
            &card.profile,
            self.f32("normaliser.location", &[channels])?,
            positive("normaliser.scale", self.f32("normaliser.scale", &[channels])?)?,
            self.f32("normaliser.seen", &[channels])?
                .into_iter()
                .map(|seen| seen > 0.0)
                .collect(),
        )
        .with_clip(options.arm.clip());
        let network = if self.tensors.contains_key(NETWORK) {
            ResidualNetwork::new(channels, self.f32(NETWORK, &[delta_layout(channels).len()])?)
        } else {
            None
        };
        let forecaster = Forecaster::new(
            channels,
            self.f32("forecast.own.weight", &[channels, LAG_COUNT + 1])?,
            if channels > FULL_CHANNELS_MAX || !options.arm.paths().contains(&arm::Path::Full) {
                Vec::new()
            } else {
                self.f32(FULL, &[channels * LAG_COUNT + 1, channels])?
            },
            network,
        );
        let head = |path: &str| {
            let name = format!("head.{path}.base");
            let base = positive(&name, self.f32(&name, &[channels])?)?;
            let [first, second, overall] = self.f64(&format!("head.{path}.level"))?;
            Ok::<_, ModelFileError>(Head::from_parts(
                base,
                [first, second],
                overall,
                options.half_lives_rows(),
            ))
        };
        let mut heads = [head(PATHS[0])?, head(PATHS[1])?];
        for path in [arm::Path::Own, arm::Path::Full] {
            if !options.arm.paths().contains(&path) {
                heads[path.index()] = Head::unused(channels);
            }
        }
        let [level, start, decay, growth] = self.f64("threshold.state")?;
        Ok(Detector {
            schema: card.profile,
            options,
            normaliser,
            forecaster,
            heads,
            threshold: Threshold {
                level,
                start,
                decay,
                growth,
            },
            rows: card.rows,
            leaning: card.prior_lambda,
            provenance: card.provenance,
        })
    }

    fn options(&self, card: &Card, channels: usize) -> Result<FitOptions, ModelFileError> {
        let duration = |seconds: f64| {
            Duration::try_from_secs_f64(seconds).map_err(|e| ModelFileError::NoCard {
                path: self.path.to_owned(),
                reason: format!("{seconds} seconds: {e}"),
            })
        };
        let prior = if self.tensors.contains_key(PRIOR) {
            // Files of before levels were learnt have none.
            let levels = if self.tensors.contains_key(PRIOR_LEVEL) {
                self.f32(PRIOR_LEVEL, &[channels])?
            } else {
                vec![0.0; channels]
            };
            let weights = OwnLagWeights::new(channels, self.f32(PRIOR, &[channels, LAG_COUNT])?);
            weights.and_then(|own| own.with_levels(levels)).ok()
        } else {
            None
        };
        // Only models that rounds of gradients made have them.
        let full_prior = if self.tensors.contains_key(PRIOR_FULL) {
            let weights = self.f32(PRIOR_FULL, &[channels * LAG_COUNT + 1, channels])?;
            FullWeights::new(channels, weights).ok()
        } else {
            None
        };
        Ok(FitOptions {
            step: duration(card.step_seconds)?,
            half_lives: [
                duration(card.half_lives_seconds[0])?,
                duration(card.half_lives_seconds[1])?,
            ],
            prior,
            full_prior,
            false_alarms_per_day: card.false_alarms_per_day,
            arm: card.arm,
            // How the network came about is not kept; its weights are.
            network: None,
        })
    }

    fn f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ModelFileError> {
        let bytes = self.tensor(name, Dtype::F32, shape)?;
        let values = bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect();
        self.check(name, values, |v| v.is_finite())
    }

    /// A short tensor of positive `f64` values.
    fn f64<const N: usize>(&self, name: &str) -> Result<[f64; N], ModelFileError> {
        let bytes = self.tensor(name, Dtype::F64, &[N])?;
        let values: Vec<f64> = bytes
            .as_chunks::<8>()
            .0
            .iter()
            .map(|b| f64::from_le_bytes(*b))
            .collect();
        let values = self.check(name, values, |v| v.is_finite() && *v > 0.0)?;
        values.try_into().map_err(|_| self.value_error(name))
    }

    fn tensor(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<&[u8], ModelFileError> {
        let found = self.tensors.get(name);
        match found {
            Some(tensor) if tensor.dtype == dtype && tensor.shape == shape => Ok(&tensor.bytes),
            _ => Err(ModelFileError::Layout {
                path: self.path.to_owned(),
                tensor: name.to_owned(),
                expected: format!("{dtype:?} {shape:?}"),
                found: found.map_or_else(|| "none".to_owned(), |t| format!("{:?} {:?}", t.dtype, t.shape)),
            }),
        }
    }

    fn check<T>(
        &self,
        name: &str,
        values: Vec<T>,
        good: impl Fn(&T) -> bool,
    ) -> Result<Vec<T>, ModelFileError> {
        if values.iter().all(good) {
            Ok(values)
        } else {
            Err(self.value_error(name))
        }
    }

    fn value_error(&self, name: &str) -> ModelFileError {
        ModelFileError::Value {
            path: self.path.to_owned(),
            tensor: name.to_owned(),
        }
    }
}

struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Tensor {
    fn f32(shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self {
            dtype: Dtype::F32,
            shape: shape.to_vec(),
            bytes,
        }
    }

    fn f64(shape: &[usize], values: &[f64]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self {
            dtype: Dtype::F64,
            shape: shape.to_vec(),
            bytes,
        }
    }
}

fn digest(tensors: &BTreeMap<String, Tensor>) -> String {
    let mut hash = Sha256::new();
    for (name, tensor) in tensors {
        hash.update(format!("{name}\t{:?}\t{:?}\n", tensor.dtype, tensor.shape));
        hash.update(&tensor.bytes);
    }
    hex(hash.finalize().into())
}

fn hex(digest: [u8; 32]) -> String {
    data_encoding::HEXLOWER.encode(&digest)
}

/// Writes tensors with their card inside, then the card beside them, then syncs the directory.
fn write(
    dir: &Path,
    name: &str,
    tensors: &BTreeMap<String, Tensor>,
    card: &impl Serialize,
) -> Result<(), ModelFileError> {
    let (path, card_path) = (
        dir.join(format!("{name}.safetensors")),
        dir.join(format!("{name}.json")),
    );
    let card = serde_json::to_string_pretty(card)
        .map_err(|error| io("write", &card_path, std::io::Error::other(error)))?;
    let not_ours = |source| ModelFileError::NotSafetensors {
        path: path.clone(),
        source,
    };
    let views = tensors.iter().map(|(name, tensor)| {
        TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).map(|view| (name.as_str(), view))
    });
    let views: Vec<_> = views.collect::<Result<_, _>>().map_err(not_ours)?;
    let metadata = HashMap::from([(METADATA_KEY.to_owned(), card.clone())]);
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(not_ours)?;
    replace(&path, &bytes)?;
    replace(&card_path, card.as_bytes())?;
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|source| io("sync", dir, source))
}

fn replace(path: &Path, bytes: &[u8]) -> Result<(), ModelFileError> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".tmp");
    let beside = PathBuf::from(beside);
    let mut file = File::create(&beside).map_err(|source| io("create", &beside, source))?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(|source| io("write", &beside, source))?;
    fs::rename(&beside, path).map_err(|source| io("replace", path, source))
}

fn io(what: &'static str, path: impl Into<PathBuf>, source: std::io::Error) -> ModelFileError {
    ModelFileError::Io {
        what,
        path: path.into(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::series::Series;

    fn rows(count: usize) -> Series {
        let mut state = 8_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 16_777_216.0
        };
        Series::new(3, (0..count * 3).map(|_| next()).collect()).unwrap()
    }

    /// A detector with every optional part.
    fn detector() -> Detector {
        let options = FitOptions::new(Duration::from_mins(1));
        let local = Detector::fit(&FeatureSchema::recorded("t", 3), &rows(200), &options).unwrap();
        let global = GlobalModel::initial(3, 1);
        let delta = vec![0.01; delta_layout(3).len()];
        let mut detector = local
            .refit_with_global(&rows(200), &global.with_delta(&delta).unwrap(), &options)
            .unwrap();
        let provenance = Provenance {
            model_version: 3,
            rule: "median".to_owned(),
            epsilon: Some(1.5),
            ..Provenance::default()
        };
        detector.set_provenance(provenance);
        detector
    }

    fn saved() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        detector().save(dir.path(), "m").unwrap();
        let path = dir.path().join("m.safetensors");
        (dir, path)
    }

    fn load(dir: &tempfile::TempDir) -> Result<Detector, ModelFileError> {
        Detector::load(dir.path(), "m")
    }

    /// Changes a card in place to one of the same length.
    fn edit(path: &Path, from: &str, to: &str) {
        let bytes = fs::read(path).unwrap();
        let at = bytes
            .windows(from.len())
            .position(|w| w == from.as_bytes())
            .unwrap();
        let mut edited = bytes;
        edited[at..at + from.len()].copy_from_slice(to.as_bytes());
        fs::write(path, edited).unwrap();
    }

    #[test]
    fn what_is_saved_is_loaded_and_scores_the_same_bits() {
        let (dir, _) = saved();
        let (before, after) = (detector(), load(&dir).unwrap());
        assert_eq!(before, after);
        let score = |d: &Detector| d.score_series(&rows(50)).unwrap();
        assert!(
            score(&before)
                .iter()
                .zip(score(&after))
                .all(|(a, b)| a.to_bits() == b.to_bits())
        );
    }

    #[test]
    fn card_says_what_people_ask_for() {
        let (dir, _) = saved();
        let card: serde_json::Value =
            serde_json::from_slice(&fs::read(dir.path().join("m.json")).unwrap()).unwrap();
        for field in [
            "format_version",
            "layout_digest",
            "profile",
            "model_version",
            "round",
            "rule",
            "epsilon",
            "training_sites",
        ] {
            assert!(card.get(field).is_some(), "{field} is missing");
        }
        assert_eq!((&card["rule"], &card["rows"]), (&"median".into(), &200.into()));
    }

    #[test]
    fn global_model_is_written_under_the_names_of_its_layout() {
        let dir = tempfile::tempdir().unwrap();
        let global = GlobalModel::initial(3, 1);
        global
            .save(
                dir.path(),
                "g",
                &FeatureSchema::recorded("t", 3),
                &Provenance::default(),
            )
            .unwrap();
        let bytes = fs::read(dir.path().join("g.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.tensor("own_lag.weight").unwrap().shape(), [3, 5]);
        assert_eq!(file.tensor("own_lag.level").unwrap().shape(), [3]);
        assert_eq!(file.len(), 6);
        assert!(matches!(
            Detector::load(dir.path(), "g"),
            Err(ModelFileError::Global { .. })
        ));
    }

    #[test]
    fn every_truncation_is_refused() {
        let (dir, path) = saved();
        let whole = fs::read(&path).unwrap();
        for keep in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
            fs::write(&path, &whole[..keep]).unwrap();
            assert!(
                matches!(load(&dir), Err(ModelFileError::NotSafetensors { .. })),
                "{keep} bytes were taken"
            );
        }
    }

    #[test]
    fn changed_tensor_is_refused() {
        let (dir, path) = saved();
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(matches!(load(&dir), Err(ModelFileError::Digest { .. })));
    }

    #[test]
    fn other_format_version_is_named() {
        let (dir, path) = saved();
        edit(&path, r#"format_version\": 1"#, r#"format_version\": 9"#);
        let error = load(&dir).unwrap_err();
        assert!(
            matches!(
                error,
                ModelFileError::FormatVersion {
                    expected: 1,
                    found: 9,
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn tensors_of_another_layout_are_refused() {
        let (dir, path) = saved();
        let bytes = fs::read(&path).unwrap();
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let card = metadata.metadata().as_ref().unwrap()[METADATA_KEY].clone();
        let mut tensors = detector().tensors();
        tensors.insert("normaliser.scale".to_owned(), Tensor::f32(&[2], &[1.0, 1.0]));
        let card = card.replace(&digest(&detector().tensors()), &digest(&tensors));
        let views: Vec<_> = tensors
            .iter()
            .map(|(name, t)| {
                (
                    name.as_str(),
                    TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap(),
                )
            })
            .collect();
        let metadata = HashMap::from([(METADATA_KEY.to_owned(), card)]);
        fs::write(&path, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
        let error = load(&dir).unwrap_err();
        assert!(
            matches!(&error, ModelFileError::Layout { tensor, .. } if tensor == "normaliser.scale"),
            "{error}"
        );
    }

    #[test]
    fn foreign_safetensors_file_is_named() {
        let (dir, path) = saved();
        let bytes = 1.0_f32.to_le_bytes();
        let view = TensorView::new(Dtype::F32, vec![1], &bytes).unwrap();
        fs::write(&path, safetensors::serialize([("a", view)], None).unwrap()).unwrap();
        assert!(matches!(load(&dir), Err(ModelFileError::NoCard { .. })));
        fs::remove_file(&path).unwrap();
        assert!(matches!(load(&dir), Err(ModelFileError::Io { what: "read", .. })));
    }

    #[test]
    fn failed_save_leaves_the_former_model() {
        let (dir, path) = saved();
        let before = fs::read(&path).unwrap();
        // A directory in the place of the temporary file: creating it fails.
        fs::create_dir(dir.path().join("m.safetensors.tmp")).unwrap();
        assert!(matches!(
            detector().save(dir.path(), "m"),
            Err(ModelFileError::Io { what: "create", .. })
        ));
        assert_eq!(fs::read(&path).unwrap(), before);
        assert!(load(&dir).is_ok());
    }
}
