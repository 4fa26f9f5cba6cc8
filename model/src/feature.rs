//! What a row of metrics means: name, unit, transform and public scale of every channel, in order.

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// What is done to a raw value before anything else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transform {
    /// The value itself: ratios and other bounded quantities.
    Linear,
    /// `ln(1 + max(v, 0))`: counts, bytes and times, which span orders of magnitude.
    Log1p,
}

impl Transform {
    /// Applies the transform; NaN stays NaN.
    pub fn apply(self, value: f32) -> f32 {
        match self {
            Self::Linear => value,
            // `f32::max` would turn NaN into 0.
            Self::Log1p => {
                if value < 0.0 {
                    0.0
                } else {
                    value.ln_1p()
                }
            }
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Log1p => "log1p",
        }
    }
}

/// One channel.
///
/// `location` and `scale` are the **public scaler**: constants that everybody knows and that depend on no data.
/// What a federation learns is computed on values scaled by them, because a scaler made from the same rows
/// would void the privacy guarantee. The local scaler (median and quantile range) is another thing and
/// never leaves the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Feature {
    /// Name, unique within its schema, such as `service_cpu`.
    pub name: String,
    /// Unit of the raw value, such as `bytes/s`.
    pub unit: String,
    /// Applied to the raw value first.
    pub transform: Transform,
    /// Public location, in transformed units.
    pub location: f32,
    /// Public scale, in transformed units, above 0.
    pub scale: f32,
    /// Smallest local scale, in transformed units, above 0. Too small: a nearly constant channel alarms at every
    /// flicker. Too large: the channel is muted.
    pub floor: f32,
}

/// The channels of one kind of row, in order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeatureSchema {
    /// Name of the profile, at most 32 bytes.
    pub name: String,
    /// The channels.
    pub features: Vec<Feature>,
}

impl FeatureSchema {
    /// The profile of a host with one supervised service. Rows of `theriac-edge` have this order.
    pub fn host_service_v1() -> Self {
        use Transform::{Linear, Log1p};
        let features = [
            // name, unit, transform, public location, public scale, floor of the local scale
            ("host_cpu_used", "ratio", Linear, 0.3, 0.2, 0.02),
            ("host_load_per_core", "ratio", Linear, 0.5, 0.5, 0.05),
            ("host_memory_used", "ratio", Linear, 0.5, 0.2, 0.02),
            ("host_swap_used", "ratio", Linear, 0.1, 0.2, 0.02),
            ("host_disk_read", "bytes/s", Log1p, 6.0, 4.0, 0.4),
            ("host_disk_write", "bytes/s", Log1p, 8.0, 4.0, 0.4),
            ("host_network_receive", "bytes/s", Log1p, 8.0, 3.0, 0.4),
            ("host_network_send", "bytes/s", Log1p, 8.0, 3.0, 0.4),
            ("service_cpu", "cores", Linear, 0.3, 0.3, 0.02),
            ("service_memory", "bytes", Log1p, 17.0, 2.0, 0.05),
            ("service_threads", "count", Log1p, 2.5, 1.0, 0.1),
            ("service_file_descriptors", "count", Log1p, 3.5, 1.0, 0.1),
            ("service_disk_read", "bytes/s", Log1p, 3.0, 4.0, 0.4),
            ("service_disk_write", "bytes/s", Log1p, 6.0, 4.0, 0.4),
            ("service_probe_latency", "ms", Log1p, 1.5, 1.0, 0.2),
            ("service_probe_errors", "ratio", Linear, 0.0, 0.2, 0.05),
        ];
        let features = features
            .into_iter()
            .map(|(name, unit, transform, location, scale, floor)| Feature {
                name: name.to_owned(),
                unit: unit.to_owned(),
                transform,
                location,
                scale,
                floor,
            })
            .collect();
        Self {
            name: "host-service-v1".to_owned(),
            features,
        }
    }

    /// The profile of recorded metrics that are already scaled to about 0..1: `channels` channels called
    /// `channel-00`, `channel-01`, …, public location 0 and scale 0.2, floor 0.02.
    pub fn recorded(name: &str, channels: usize) -> Self {
        let features = (0..channels)
            .map(|channel| Feature {
                name: format!("channel-{channel:02}"),
                unit: "1".to_owned(),
                transform: Transform::Linear,
                location: 0.0,
                scale: 0.2,
                floor: 0.02,
            })
            .collect();
        Self {
            name: name.to_owned(),
            features,
        }
    }

    /// Number of channels.
    pub fn channels(&self) -> usize {
        self.features.len()
    }

    /// Position of the channel called `name`.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.features.iter().position(|feature| feature.name == name)
    }

    /// SHA-256 over everything that two sites must agree on, in a fixed text form (floats by their bits). Equal
    /// digests mean equal columns.
    pub fn digest(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(format!("theriac-features-v1\n{}\n", self.name));
        for f in &self.features {
            let (location, scale, floor) = (f.location.to_bits(), f.scale.to_bits(), f.floor.to_bits());
            let (name, unit, transform) = (&f.name, &f.unit, f.transform.word());
            hash.update(format!(
                "{name}\t{unit}\t{transform}\t{location:08x}\t{scale:08x}\t{floor:08x}\n"
            ));
        }
        hash.finalize().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn digest_is_stable_and_sees_every_field() {
        let schema = FeatureSchema::recorded("smd", 2);
        let golden = "391ebdb913e9b6b2be948f86d8c3d60439cd44c76bedcdad90d232e39f1ad94f";
        assert_eq!(data_encoding::HEXLOWER.encode(&schema.digest()), golden);
        let mut seen = BTreeSet::from([schema.digest()]);
        let edits: [fn(&mut FeatureSchema); 7] = [
            |s| s.name.push('x'),
            |s| s.features[1].name.push('x'),
            |s| s.features[1].unit.push('x'),
            |s| s.features[1].transform = Transform::Log1p,
            |s| s.features[1].location = 1.0,
            |s| s.features[1].scale = 1.0,
            |s| s.features[1].floor = 1.0,
        ];
        for edit in edits {
            let mut other = schema.clone();
            edit(&mut other);
            assert!(seen.insert(other.digest()), "an edit left the digest as it was");
        }
    }

    #[test]
    fn host_profile_is_well_formed() {
        let schema = FeatureSchema::host_service_v1();
        let names: BTreeSet<_> = schema.features.iter().map(|f| &f.name).collect();
        assert_eq!(names.len(), schema.channels(), "names repeat");
        assert!(
            schema
                .features
                .iter()
                .all(|f| f.scale > 0.0 && f.floor > 0.0 && f.location.is_finite())
        );
    }

    #[test]
    fn transform_keeps_missing_values_missing() {
        assert!(Transform::Log1p.apply(f32::NAN).is_nan() && Transform::Linear.apply(f32::NAN).is_nan());
        assert_eq!(Transform::Log1p.apply(-3.0).to_bits(), 0.0_f32.to_bits());
    }
}
