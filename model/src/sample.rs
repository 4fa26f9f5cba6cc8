//! One row of metrics.

use std::fmt;

/// One row of raw metrics at one moment, in the order of a [`FeatureSchema`](crate::feature::FeatureSchema).
///
/// It has no `Serialize` and its `Debug` shows no value: raw data stay on the host.
#[derive(Clone, PartialEq)]
pub struct Sample {
    /// Wall-clock time of the measurement, in milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// One value per channel; NaN where the metric could not be read.
    pub values: Vec<f32>,
}

impl fmt::Debug for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sample")
            .field("at_ms", &self.at_ms)
            .field("channels", &self.values.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_no_value() {
        let sample = Sample {
            at_ms: 7,
            values: vec![1234.5, 0.25],
        };
        let text = format!("{sample:?}");
        assert!(!text.contains("1234") && !text.contains("0.25") && text.contains("channels: 2"));
    }
}
