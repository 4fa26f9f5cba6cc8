//! What the model and the updates look like: number of values and layout digests, from the configuration.

use theriac_model::feature::FeatureSchema;
use theriac_model::global::{
    GlobalModel, delta_layout, gradient_layout, linear_model_layout, model_layout, moments_layout,
};
use theriac_protocol::message::UpdateKind;
use theriac_protocol::units::Digest;

/// Largest dimension of a model of bare numbers: its payload fits a frame.
pub const DIMENSION_MAX: u32 = 16_000_000;

/// Why there is no such model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// No such feature profile.
    #[error("`{name}` is no feature profile of this build: use \"host-service-v1\"")]
    Profile {
        /// What was asked for.
        name: String,
    },
    /// A dimension out of range.
    #[error("{got} is outside 1 to {DIMENSION_MAX}")]
    Dimension {
        /// What was asked for.
        got: u32,
    },
    /// More values than a message can announce.
    #[error("a model of {got} values is larger than a message can announce")]
    TooLarge {
        /// Number of values.
        got: usize,
    },
}

/// The model that the federation learns.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    shape: Shape,
    layout_digest: Digest,
    values: u32,
}

#[derive(Debug, Clone, PartialEq)]
enum Shape {
    Profile { schema: FeatureSchema, seed: u64 },
    Raw { dimension: u32 },
}

/// Length and layout of what a round collects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UpdateLayout {
    /// Number of values.
    pub values: u32,
    /// Digest of their layout.
    pub digest: Digest,
}

/// Layout digest of a model or delta of `dimension` bare numbers: SHA-256 of `raw/D`.
pub fn raw_layout_digest(dimension: u32) -> Digest {
    Digest::of(format!("raw/{dimension}").as_bytes())
}

impl ModelSpec {
    /// The model of a feature profile; version 0 is computed from `seed`.
    ///
    /// # Errors
    /// [`LayoutError::Profile`] for a name that this build does not know.
    pub fn profile(name: &str, seed: u64) -> Result<Self, LayoutError> {
        let schema = FeatureSchema::host_service_v1();
        if name != schema.name {
            return Err(LayoutError::Profile {
                name: name.to_owned(),
            });
        }
        let layout = model_layout(schema.channels());
        Ok(Self {
            layout_digest: Digest(layout.digest()),
            values: announced(layout.len())?,
            shape: Shape::Profile { schema, seed },
        })
    }

    /// A model of `dimension` bare numbers that starts at zero, for load tests.
    ///
    /// # Errors
    /// [`LayoutError::Dimension`] outside 1 to [`DIMENSION_MAX`].
    pub fn raw(dimension: u32) -> Result<Self, LayoutError> {
        if (1..=DIMENSION_MAX).contains(&dimension) {
            let layout_digest = raw_layout_digest(dimension);
            Ok(Self {
                shape: Shape::Raw { dimension },
                layout_digest,
                values: dimension,
            })
        } else {
            Err(LayoutError::Dimension { got: dimension })
        }
    }

    /// Name of the feature profile that edges must have; `raw` for bare numbers.
    pub fn profile_name(&self) -> &str {
        match &self.shape {
            Shape::Profile { schema, .. } => &schema.name,
            Shape::Raw { .. } => "raw",
        }
    }

    /// Digest of that profile; for bare numbers the layout's digest.
    pub fn profile_digest(&self) -> Digest {
        match &self.shape {
            Shape::Profile { schema, .. } => Digest(schema.digest()),
            Shape::Raw { dimension } => raw_layout_digest(*dimension),
        }
    }

    /// Digest of the model's layout.
    pub fn layout_digest(&self) -> Digest {
        self.layout_digest
    }

    /// Number of values of the model.
    pub fn values(&self) -> u32 {
        self.values
    }

    /// Digest of the layout that a model of so many values has: the plain one, or the one with a full linear part, which rounds of gradients
    /// make. `None`: no model of this federation has so many.
    pub fn layout_of(&self, values: usize) -> Option<Digest> {
        if u32::try_from(values) == Ok(self.values) {
            return Some(self.layout_digest);
        }
        let linear = linear_model_layout(self.channels()?);
        (linear.len() == values).then(|| Digest(linear.digest()))
    }

    /// Number of channels; `None` for bare numbers.
    pub fn channels(&self) -> Option<usize> {
        match &self.shape {
            Shape::Profile { schema, .. } => Some(schema.channels()),
            Shape::Raw { .. } => None,
        }
    }

    /// Names of the channels, in order; `None` for bare numbers.
    pub fn channel_names(&self) -> Option<Vec<String>> {
        match &self.shape {
            Shape::Profile { schema, .. } => Some(
                schema
                    .features
                    .iter()
                    .map(|feature| feature.name.clone())
                    .collect(),
            ),
            Shape::Raw { .. } => None,
        }
    }

    /// What an update of `kind` looks like.
    ///
    /// # Errors
    /// [`LayoutError::TooLarge`] when a message cannot announce so many values.
    pub fn update(&self, kind: UpdateKind) -> Result<UpdateLayout, LayoutError> {
        let layout = match (&self.shape, kind) {
            (Shape::Raw { dimension }, _) => {
                return Ok(UpdateLayout {
                    values: *dimension,
                    digest: raw_layout_digest(*dimension),
                });
            }
            (Shape::Profile { schema, .. }, UpdateKind::Moments) => moments_layout(schema.channels()),
            (Shape::Profile { schema, .. }, UpdateKind::Delta) => delta_layout(schema.channels()),
            (Shape::Profile { schema, .. }, UpdateKind::Gradient) => gradient_layout(schema.channels()),
        };
        Ok(UpdateLayout {
            values: announced(layout.len())?,
            digest: Digest(layout.digest()),
        })
    }

    /// The values of version 0, the same on every machine.
    pub fn initial(&self) -> Vec<f32> {
        match &self.shape {
            Shape::Profile { schema, seed } => {
                GlobalModel::initial(schema.channels(), *seed).values().to_vec()
            }
            Shape::Raw { dimension } => vec![0.0; usize::try_from(*dimension).unwrap_or(usize::MAX)],
        }
    }
}

fn announced(values: usize) -> Result<u32, LayoutError> {
    u32::try_from(values).map_err(|_| LayoutError::TooLarge { got: values })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profile_model_has_the_layouts_of_the_model_crate() {
        let spec = ModelSpec::profile("host-service-v1", 1).unwrap();
        let channels = spec.channels().unwrap();
        assert_eq!(spec.initial().len(), spec.values() as usize);
        let moments = spec.update(UpdateKind::Moments).unwrap();
        assert_eq!(moments.values as usize, 22 * channels);
        let delta = spec.update(UpdateKind::Delta).unwrap();
        assert_eq!(delta.values as usize + 6 * channels, spec.values() as usize);
        assert_ne!(moments.digest, delta.digest);
        let gradient = spec.update(UpdateKind::Gradient).unwrap();
        assert_eq!(gradient.values as usize, (5 * channels + 1) * channels);
        let linear = linear_model_layout(channels);
        assert_eq!(spec.layout_of(linear.len()), Some(Digest(linear.digest())));
        assert_eq!(spec.layout_of(spec.values() as usize), Some(spec.layout_digest()));
        assert_eq!(spec.layout_of(1), None);
    }

    #[test]
    fn refuses_unknown_profiles_and_silly_dimensions() {
        assert!(ModelSpec::profile("nope", 1).is_err());
        assert!(ModelSpec::raw(0).is_err() && ModelSpec::raw(DIMENSION_MAX + 1).is_err());
        assert_eq!(
            ModelSpec::raw(7)
                .unwrap()
                .update(UpdateKind::Delta)
                .unwrap()
                .digest,
            raw_layout_digest(7)
        );
    }
}
