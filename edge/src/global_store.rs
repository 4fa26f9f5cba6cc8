//! The published model that this edge holds, on disk: raw values beside a small header with their digest.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use theriac_model::global::{GlobalError, GlobalModel};
use theriac_protocol::message::ModelV1;
use theriac_protocol::units::{Digest, ModelVersion};

use crate::state_dir::write_durably;

const HEADER: &str = "global.json";
const VALUES: &str = "global.f32";

/// What is known of the held model besides its values.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Held {
    /// Its version.
    pub version: ModelVersion,
    /// The round that made it.
    pub round: u64,
    /// SHA-256 of the values, hexadecimal.
    pub digest: String,
    /// Rule that combined the updates.
    pub rule: String,
    /// Updates in it.
    pub contributors: u32,
}

impl Held {
    /// The header as it came.
    pub fn of(header: &ModelV1) -> Self {
        Self {
            version: header.version,
            round: header.round.0,
            digest: header.payload_digest.to_string(),
            rule: header.rule.clone(),
            contributors: header.contributors,
        }
    }
}

/// Values of a payload of little-endian `f32`, as a model for `channels` channels.
///
/// # Errors
/// [`GlobalError`] for another length or a value that is not finite.
pub fn model_of(channels: usize, payload: &[u8]) -> Result<GlobalModel, GlobalError> {
    // A payload that is no whole number of values has one value too few and is refused for its length.
    let values = payload
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    GlobalModel::from_values(channels, values)
}

/// Keeps a model: values first, then the header that names their digest, so that a crash leaves a pair that does not
/// match at worst, which [`load`] refuses.
///
/// # Errors
/// The error of the file system.
pub fn save(dir: &Path, held: &Held, payload: &[u8]) -> std::io::Result<()> {
    write_durably(&dir.join(VALUES), payload)?;
    write_durably(&dir.join(HEADER), &serde_json::to_vec_pretty(held)?)
}

/// The held model, or `None` when there is none or its parts do not match: it is then fetched again.
pub fn load(dir: &Path, channels: usize) -> Option<(Held, Digest, GlobalModel)> {
    let header: PathBuf = dir.join(HEADER);
    let held: Held = serde_json::from_slice(&std::fs::read(header).ok()?).ok()?;
    let payload = std::fs::read(dir.join(VALUES)).ok()?;
    let digest = Digest::of(&payload);
    if digest.to_string() != held.digest {
        tracing::warn!(
            version = held.version.0,
            "the kept global model is damaged and will be fetched again"
        );
        return None;
    }
    let model = model_of(channels, &payload).ok()?;
    Some((held, digest, model))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_survives_and_a_damaged_one_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        assert!(load(dir.path(), 2).is_none());
        let model = GlobalModel::initial(2, 3);
        let payload: Vec<u8> = model
            .values()
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        let held = Held {
            version: ModelVersion(4),
            round: 9,
            digest: Digest::of(&payload).to_string(),
            rule: "mean".into(),
            contributors: 3,
        };
        save(dir.path(), &held, &payload).unwrap();
        let (found, digest, back) = load(dir.path(), 2).unwrap();
        assert_eq!((found, digest, back), (held.clone(), Digest::of(&payload), model));
        assert!(
            load(dir.path(), 3).is_none(),
            "a model of another width was taken"
        );
        std::fs::write(dir.path().join(VALUES), &payload[4..]).unwrap();
        assert!(load(dir.path(), 2).is_none());
    }

    #[test]
    fn payloads_of_the_wrong_form_are_refused() {
        assert!(matches!(model_of(2, &[0; 7]), Err(GlobalError::Length { .. })));
        let model = GlobalModel::initial(2, 3);
        let mut payload: Vec<u8> = model
            .values()
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        payload[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        assert!(matches!(
            model_of(2, &payload),
            Err(GlobalError::NonFinite { .. })
        ));
    }
}
