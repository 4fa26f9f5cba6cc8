//! Inputs for the benchmarks, the same in every run.
//!
//! `cargo bench -p theriac-benches` measures; `cargo bench -p theriac-benches -- --test` runs each once. Measurements of
//! the fleet (rounds, memory, bytes) are `theriac-lab load`.

use theriac_model::feature::FeatureSchema;
use theriac_model::series::{Series, SeriesError};

/// A generator of numbers in [0, 1): `SplitMix64` (Steele, Lea and Flood 2014), so that no benchmark depends on a library's
/// choice of generator.
#[derive(Debug, Clone)]
pub struct Numbers(u64);

impl Numbers {
    /// The same seed gives the same numbers.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn draw(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        f32::from(u16::try_from((z ^ (z >> 31)) >> 48).unwrap_or(0)) / 65_536.0
    }

    /// Several numbers between -1 and 1.
    pub fn signed(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.draw() * 2.0 - 1.0).collect()
    }
}

/// The profile of an edge, and `rows` rows of a calm host under a daily rhythm.
///
/// # Errors
/// [`SeriesError`] never happens for rows as long as the profile.
pub fn calm_host(rows: usize) -> Result<(FeatureSchema, Series), SeriesError> {
    let schema = FeatureSchema::host_service_v1();
    let channels = schema.channels();
    let mut numbers = Numbers::new(1);
    let mut values = Vec::with_capacity(rows * channels);
    for row in 0..rows {
        for channel in 0..channels {
            let phase = (row as f32) / 60.0 + channel as f32;
            values.push(5.0 + 2.0 * phase.sin() + 0.3 * (numbers.draw() - 0.5));
        }
    }
    Series::new(channels, values).map(|series| (schema, series))
}

/// A profile of recorded channels in 0..1, and rows of noise that remembers.
///
/// # Errors
/// [`SeriesError`] never happens for rows as long as the profile.
pub fn recorded_host(rows: usize, channels: usize) -> Result<(FeatureSchema, Series), SeriesError> {
    let mut numbers = Numbers::new(2);
    let mut levels = vec![0.5_f32; channels];
    let mut values = Vec::with_capacity(rows * channels);
    for _ in 0..rows {
        for level in &mut levels {
            *level = 0.8 * *level + 0.2 * numbers.draw();
            values.push(*level);
        }
    }
    let schema = FeatureSchema::recorded("recorded", channels);
    Series::new(channels, values).map(|series| (schema, series))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_are_the_same_every_time() {
        assert_eq!(
            calm_host(50).unwrap().1.values(),
            calm_host(50).unwrap().1.values()
        );
        assert_ne!(Numbers::new(1).signed(8), Numbers::new(2).signed(8));
    }
}
