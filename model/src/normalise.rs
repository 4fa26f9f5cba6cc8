//! From raw values to units of their own spread, robustly.

use std::fmt;

use crate::feature::{FeatureSchema, Transform};
use crate::series::Series;

/// Bound of locally scaled values.
pub const CLIP: f32 = 50.0;

/// Bound of publicly scaled values.
pub const PUBLIC_CLIP: f32 = 8.0;

/// Distance of the 5 % and 95 % quantiles of a normal distribution, in standard deviations.
const SPREAD: f64 = 3.29;

/// Scales every channel: `x' = clip((transform(x) − location) / scale, ±clip)`.
///
/// The local one, from [`fit`](Self::fit), is made of this host's own rows: it has no `Serialize` and its `Debug`
/// shows no number. It lies in the host's own model file and in no message.
#[derive(Clone, PartialEq)]
pub struct Normaliser {
    transforms: Vec<Transform>,
    pub(crate) location: Vec<f32>,
    pub(crate) scale: Vec<f32>,
    /// Channels that had at least one value when it was fitted; the others never count in a score.
    pub(crate) seen: Vec<bool>,
    clip: f32,
}

impl Normaliser {
    /// The local scaler: location = median, scale = max((q.95 − q.05) / 3.29, 0.25 · std, floor), per channel over
    /// the values that are there; bound ±50. A channel without any value gets its public location and its floor.
    /// Quantiles interpolate linearly, std is that of the population, all in `f64`.
    ///
    /// `floor_factor` multiplies every feature's floor: a few rows understate how far a channel moves in a week, and
    /// on recorded servers the floor mattered more than the learner.
    ///
    /// # Panics
    /// When the series has other channels than the schema; [`Detector::fit`](crate::detector::Detector::fit)
    /// checks it before.
    pub fn fit(schema: &FeatureSchema, series: &Series, floor_factor: f32) -> Self {
        assert_eq!(
            schema.channels(),
            series.channels(),
            "series and schema have the same channels"
        );
        let mut fitted = Self::public(schema);
        fitted.clip = CLIP;
        let mut column = Vec::with_capacity(series.rows());
        for (channel, feature) in schema.features.iter().enumerate() {
            column.clear();
            let values = series
                .iter_rows()
                .map(|row| feature.transform.apply(row[channel]));
            column.extend(values.filter(|v| v.is_finite()));
            let floor = feature.floor * floor_factor;
            fitted.seen[channel] = !column.is_empty();
            if column.is_empty() {
                fitted.scale[channel] = floor;
                continue;
            }
            let spread = (quantile(&mut column, 0.95) - quantile(&mut column, 0.05)) / SPREAD;
            let scale = spread
                .max(0.25 * standard_deviation(&column))
                .max(f64::from(floor));
            fitted.location[channel] = narrow(quantile(&mut column, 0.5));
            fitted.scale[channel] = narrow(scale);
        }
        fitted
    }

    /// The public scaler: the schema's constants; bound ±8. It depends on no data.
    pub fn public(schema: &FeatureSchema) -> Self {
        Self {
            transforms: schema.features.iter().map(|f| f.transform).collect(),
            location: schema.features.iter().map(|f| f.location).collect(),
            scale: schema.features.iter().map(|f| f.scale).collect(),
            seen: vec![true; schema.channels()],
            clip: PUBLIC_CLIP,
        }
    }

    /// A local scaler read back from a model file.
    pub(crate) fn from_parts(
        schema: &FeatureSchema,
        location: Vec<f32>,
        scale: Vec<f32>,
        seen: Vec<bool>,
    ) -> Self {
        Self {
            location,
            scale,
            seen,
            clip: CLIP,
            ..Self::public(schema)
        }
    }

    /// The same with another bound of scaled values.
    pub(crate) fn with_clip(self, clip: f32) -> Self {
        Self { clip, ..self }
    }

    /// Number of channels.
    pub fn channels(&self) -> usize {
        self.scale.len()
    }

    /// Scales one row into `out`. A value that is missing (NaN or infinite, or beyond the end of `raw`) becomes NaN.
    pub fn apply(&self, raw: &[f32], out: &mut [f32]) {
        for (channel, out) in out.iter_mut().enumerate().take(self.channels()) {
            let value = raw
                .get(channel)
                .map_or(f32::NAN, |v| self.transforms[channel].apply(*v));
            *out = if value.is_finite() {
                ((value - self.location[channel]) / self.scale[channel]).clamp(-self.clip, self.clip)
            } else {
                f32::NAN
            };
        }
    }
}

impl fmt::Debug for Normaliser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Normaliser")
            .field("channels", &self.channels())
            .finish_non_exhaustive()
    }
}

/// The `q` quantile (0 to 1), interpolated linearly at position `q·(n − 1)`; 0 for no values. Reorders `values`.
pub(crate) fn quantile(values: &mut [f32], q: f64) -> f64 {
    let Some(last) = values.len().checked_sub(1) else {
        return 0.0;
    };
    let position = q.clamp(0.0, 1.0) * last as f64;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "0 ≤ position ≤ len − 1"
    )]
    let index = position.floor() as usize;
    let (_, low, above) = values.select_nth_unstable_by(index, f32::total_cmp);
    let low = f64::from(*low);
    let high = above
        .iter()
        .copied()
        .min_by(f32::total_cmp)
        .map_or(low, f64::from);
    low + (position - index as f64) * (high - low)
}

fn standard_deviation(values: &[f32]) -> f64 {
    let count = values.len().max(1) as f64;
    let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / count;
    (values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / count).sqrt()
}

/// To `f32`, kept finite.
pub(crate) fn narrow(value: f64) -> f32 {
    #[expect(clippy::cast_possible_truncation, reason = "clamped to the range of f32")]
    let value = value.clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32;
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fit(values: Vec<f32>) -> Normaliser {
        Normaliser::fit(
            &FeatureSchema::recorded("t", 1),
            &Series::new(1, values).unwrap(),
            1.0,
        )
    }

    /// Computed with `numpy.quantile` and `numpy.std` (2.x, default "linear" method).
    #[test]
    fn quantiles_and_scale_are_those_of_numpy() {
        let values = [0.1, 0.9, 0.4, 0.35, 0.2, 0.7, 0.55];
        for (q, expected) in [
            (0.05, 0.13),
            (0.5, 0.4),
            (0.75, 0.625),
            (0.95, 0.84),
            (0.0, 0.1),
            (1.0, 0.9),
        ] {
            assert!(
                (quantile(&mut values.to_vec(), q) - expected).abs() < 1e-7,
                "q = {q}"
            );
        }
        let fitted = fit(values.to_vec());
        assert!((fitted.location[0] - 0.4).abs() < 1e-7);
        assert!((fitted.scale[0] - 0.71 / 3.29).abs() < 1e-6);
    }

    #[test]
    fn constant_channel_gets_the_floor() {
        let fitted = fit(vec![0.5; 100]);
        assert_eq!((fitted.location[0], fitted.scale[0]), (0.5, 0.02));
    }

    #[test]
    fn channel_without_values_is_marked_and_scaled_by_public_constants() {
        let fitted = fit(vec![f32::NAN; 9]);
        assert_eq!(
            (fitted.seen[0], fitted.location[0], fitted.scale[0]),
            (false, 0.0, 0.02)
        );
        let none = fit(Vec::new());
        assert!(!none.seen[0]);
    }

    #[test]
    fn huge_and_missing_values_stay_bounded() {
        let fitted = fit(vec![0.1, 0.2, f32::MAX, f32::MIN, f32::INFINITY, f32::NAN]);
        let mut out = [0.0; 1];
        for value in [f32::MAX, f32::MIN, 0.0, 1e30] {
            fitted.apply(&[value], &mut out);
            assert!(out[0].abs() <= CLIP, "{value} became {}", out[0]);
        }
        for missing in [&[f32::NAN][..], &[f32::INFINITY], &[]] {
            fitted.apply(missing, &mut out);
            assert!(out[0].is_nan());
        }
    }

    proptest! {
        #[test]
        fn scaled_values_are_bounded_and_keep_their_order(
            mut values in prop::collection::vec(-1e6_f32..1e6, 1..200),
        ) {
            let fitted = fit(values.clone());
            values.sort_unstable_by(f32::total_cmp);
            let mut previous = -CLIP;
            for value in values {
                let mut out = [0.0];
                fitted.apply(&[value], &mut out);
                prop_assert!(out[0].abs() <= CLIP && out[0] >= previous);
                previous = out[0];
            }
        }

        #[test]
        fn scale_does_not_depend_on_order_or_shift(
            values in prop::collection::vec(0.0_f32..1.0, 2..100), shift in 0.0_f32..1.0,
        ) {
            let one = fit(values.clone());
            let two = fit(values.iter().rev().map(|v| v + shift).collect());
            prop_assert!((one.scale[0] - two.scale[0]).abs() < 1e-5);
            prop_assert!((one.location[0] + shift - two.location[0]).abs() < 1e-5);
        }
    }
}
