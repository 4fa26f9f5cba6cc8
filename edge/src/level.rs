//! Lasting shifts of a service's own resources, which a forecaster follows and so forgets.
//!
//! A hog that keeps a core busy, or a leak that has become slow against what it has already taken, is predicted well by
//! its own past. What gives it away is its distance from the level of quiet times. Only the service's resource channels
//! are looked at, only upwards, and only a rise that is large for an operator *and* for this service counts.

use theriac_model::feature::{FeatureSchema, Transform};
use theriac_model::sample::Sample;
use theriac_model::series::Series;

/// Channels that are watched, and the least rise that counts, in transformed units: a quarter of a core; half as much
/// memory again; three times as many threads or file descriptors.
const WATCHED: [(&str, f32); 4] = [
    ("service_cpu", 0.25),
    ("service_memory", 0.405),
    ("service_threads", 1.1),
    ("service_file_descriptors", 1.1),
];
/// A rise counts from this many times the spread of quiet times on.
const SPREADS: f32 = 6.0;
/// … and from this many times the largest rise of quiet times on.
const PEAKS: f32 = 1.5;
/// Rows that a level is found from, at least.
const ROWS_MIN: usize = 30;

/// Levels of quiet times and where the service is now. It stays in memory.
#[derive(Debug, Clone)]
pub(crate) struct Levels {
    channels: Vec<Level>,
    /// Weight of a new row in the running mean, above 0 and at most 1.
    alpha: f32,
}

#[derive(Clone)]
struct Level {
    channel: usize,
    transform: Transform,
    usual: f32,
    limit: f32,
    /// The running mean; it begins at the usual level, so that the bustle of a start does not count.
    now: f32,
}

impl std::fmt::Debug for Level {
    /// Prints no value: levels are made of raw data.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Level")
            .field("channel", &self.channel)
            .finish_non_exhaustive()
    }
}

impl Levels {
    /// Finds the levels of quiet rows. `half_life_rows` is the memory of the running mean, in rows. `None` when there are
    /// too few rows.
    pub(crate) fn fit(schema: &FeatureSchema, quiet: &Series, half_life_rows: f32) -> Option<Self> {
        if quiet.rows() < ROWS_MIN || quiet.channels() != schema.channels() {
            return None;
        }
        let alpha = 1.0 - (-half_life_rows.max(1.0).recip()).exp2();
        let channels = WATCHED
            .iter()
            .filter_map(|(name, least)| {
                let channel = schema.position(name)?;
                level(schema.features[channel].transform, channel, quiet, alpha, *least)
            })
            .collect();
        Some(Self { channels, alpha })
    }

    /// Takes a row. How far each watched channel is above its level, in multiples of the rise that counts: 1 and
    /// more is an anomaly. By channel.
    pub(crate) fn push(&mut self, sample: &Sample) -> Vec<(usize, f32)> {
        let alpha = self.alpha;
        let take = |level: &mut Level| {
            let value = level.transform.apply(sample.values[level.channel]);
            if value.is_finite() {
                level.now += alpha * (value - level.now);
            }
            (level.channel, ((level.now - level.usual) / level.limit).max(0.0))
        };
        self.channels.iter_mut().map(take).collect()
    }

    /// The service has a new process.
    pub(crate) fn restarted(&mut self) {
        self.channels.iter_mut().for_each(|level| level.now = level.usual);
    }
}

fn level(transform: Transform, channel: usize, quiet: &Series, alpha: f32, least: f32) -> Option<Level> {
    let values: Vec<f32> = quiet
        .iter_rows()
        .map(|row| transform.apply(row[channel]))
        .filter(|value| value.is_finite())
        .collect();
    if values.len() < ROWS_MIN {
        return None;
    }
    let mut sorted = values.clone();
    sorted.sort_by(f32::total_cmp);
    let quantile = |share: f32| {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of a length is an index"
        )]
        let index = (share * (sorted.len() - 1) as f32).round() as usize;
        sorted[index.min(sorted.len() - 1)]
    };
    let usual = quantile(0.5);
    let spread = (quantile(0.95) - quantile(0.05)) / 3.29;
    let mut mean = values[0];
    let peak = values.iter().fold(0.0_f32, |peak, value| {
        mean += alpha * (value - mean);
        peak.max(mean - usual)
    });
    let limit = least.max(SPREADS * spread).max(PEAKS * peak);
    Some(Level {
        channel,
        transform,
        usual,
        limit,
        now: usual,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(cpu: impl Fn(u16) -> f32, memory: impl Fn(u16) -> f32, count: u16) -> Vec<Sample> {
        let schema = FeatureSchema::host_service_v1();
        let (at, of) = (
            schema.position("service_cpu").unwrap(),
            schema.position("service_memory").unwrap(),
        );
        (0..count)
            .map(|row| {
                let mut values = vec![0.0; schema.channels()];
                values[at] = cpu(row);
                values[of] = memory(row);
                Sample { at_ms: 0, values }
            })
            .collect()
    }

    fn levels(samples: &[Sample]) -> Levels {
        let schema = FeatureSchema::host_service_v1();
        let series = Series::from_samples(schema.channels(), samples).unwrap();
        Levels::fit(&schema, &series, 3.0).unwrap()
    }

    fn flicker(row: u16) -> f32 {
        0.01 * f32::from(row % 5)
    }

    fn worst(levels: &mut Levels, sample: &Sample) -> f32 {
        levels
            .push(sample)
            .into_iter()
            .fold(0.0, |most, (_, ratio)| most.max(ratio))
    }

    #[test]
    fn a_lasting_hog_counts_however_long_it_lasts() {
        let mut levels = levels(&rows(|row| 0.05 + flicker(row), |_| 20e6, 120));
        for (row, sample) in rows(|_| 0.9, |_| 20e6, 1000).iter().enumerate() {
            let found = worst(&mut levels, sample) >= 1.0;
            assert_eq!(found, row >= 1, "row {row}");
        }
    }

    #[test]
    fn a_leak_counts_from_half_as_much_again() {
        let mut levels = levels(&rows(flicker, |_| 20e6, 120));
        let leak = rows(flicker, |row| 20e6 + 1e6 * f32::from(row), 60);
        let found = leak.iter().position(|sample| worst(&mut levels, sample) >= 1.0);
        assert!((10..20).contains(&found.unwrap()), "{found:?}");
    }

    #[test]
    fn usual_peaks_falls_and_missing_values_do_not_count() {
        let busy = |row: u16| if row % 40 < 10 { 0.6 } else { 0.1 };
        let mut levels = levels(&rows(busy, |_| 20e6, 400));
        for sample in rows(busy, |_| 1e6, 400) {
            assert!(worst(&mut levels, &sample) < 1.0);
        }
        let gone = Sample {
            at_ms: 0,
            values: vec![f32::NAN; 16],
        };
        assert!(worst(&mut levels, &gone) < 1.0);
        levels.restarted();
        assert!(levels.push(&gone).iter().all(|(_, ratio)| *ratio < 1e-6));
    }

    #[test]
    fn too_few_rows_give_no_level_and_debug_prints_none() {
        let schema = FeatureSchema::host_service_v1();
        let few = Series::from_samples(16, &rows(flicker, |_| 1.0, 20)).unwrap();
        assert!(Levels::fit(&schema, &few, 3.0).is_none());
        let levels = levels(&rows(|_| 0.123_45, |_| 98_765.0, 60));
        let text = format!("{levels:?}");
        assert!(!text.contains("0.12") && !text.contains("98765"), "{text}");
    }
}
