//! Channels of recorded servers: `HitRate@P`, the share of the `k` blamed channels of a segment that are among the first
//! `⌈k·P/100⌉` of the ranking (Su et al., `OmniAnomaly`, KDD 2019), averaged over all segments.

use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use theriac_command::output::table;
use theriac_model::causes::ChannelCause;
use theriac_model::detector::{Detector, FitOptions};
use theriac_model::feature::FeatureSchema;
use theriac_model::global::OwnLagWeights;
use theriac_model::io::read_series;

use super::{CausesError, names, read_json};

/// The result over all machines.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ChannelResult {
    /// Segments measured.
    pub segments: usize,
    /// HitRate@100.
    pub hit_rate_100: f64,
    /// HitRate@150.
    pub hit_rate_150: f64,
    /// What a random order gives: k/C, and ⌈1.5 k⌉/C.
    pub random_100: f64,
    /// See `random_100`.
    pub random_150: f64,
    /// Each machine.
    pub machines: Vec<MachineHits>,
}

/// The result of one machine.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MachineHits {
    /// Its name.
    pub machine: String,
    /// Its segments.
    pub segments: usize,
    /// HitRate@100.
    pub hit_rate_100: f64,
    /// HitRate@150.
    pub hit_rate_150: f64,
}

#[derive(Debug, Deserialize)]
struct Segment {
    from: usize,
    to: usize,
    dims: Vec<usize>,
}

/// Hits of one segment at 100 and 150 %, and what a random order would give.
struct Hits {
    found: [f64; 2],
    random: [f64; 2],
}

pub(super) fn measure(data: &Path, step: Duration) -> Result<ChannelResult, CausesError> {
    let machines = names(data, ".interpretation.json")?;
    if machines.is_empty() {
        return Err(CausesError::Nothing {
            path: data.to_owned(),
            wanted: "NAME.interpretation.json",
        });
    }
    let hits: Vec<Vec<Hits>> = machines
        .par_iter()
        .map(|machine| measure_machine(data, machine, step))
        .collect::<Result<_, _>>()?;
    let mean = |hits: &[&Hits], of: fn(&Hits) -> f64| {
        hits.iter().map(|hits| of(hits)).sum::<f64>() / hits.len().max(1) as f64
    };
    let all: Vec<&Hits> = hits.iter().flatten().collect();
    let each = machines.into_iter().zip(&hits).map(|(machine, hits)| {
        let hits: Vec<&Hits> = hits.iter().collect();
        MachineHits {
            machine,
            segments: hits.len(),
            hit_rate_100: mean(&hits, |hits| hits.found[0]),
            hit_rate_150: mean(&hits, |hits| hits.found[1]),
        }
    });
    Ok(ChannelResult {
        segments: all.len(),
        hit_rate_100: mean(&all, |hits| hits.found[0]),
        hit_rate_150: mean(&all, |hits| hits.found[1]),
        random_100: mean(&all, |hits| hits.random[0]),
        random_150: mean(&all, |hits| hits.random[1]),
        machines: each.collect(),
    })
}

fn measure_machine(data: &Path, machine: &str, step: Duration) -> Result<Vec<Hits>, CausesError> {
    let train = read_series(&data.join(format!("{machine}.train.npy.gz")))?;
    let test = read_series(&data.join(format!("{machine}.test.npy.gz")))?;
    let path = data.join(format!("{machine}.interpretation.json"));
    let mut segments: Vec<Segment> = read_json(&path)?;
    segments.retain(|segment| segment.from < test.rows() && !segment.dims.is_empty());
    segments.sort_by_key(|segment| segment.from);
    let wrong = |reason: String| CausesError::Contents {
        path: path.clone(),
        reason,
    };
    let channels = train.channels();
    if let Some(dim) = segments
        .iter()
        .flat_map(|segment| &segment.dims)
        .find(|dim| **dim >= channels)
    {
        return Err(wrong(format!("channel {dim} of {channels}, counted from 0")));
    }
    let failed = |source| CausesError::Detector {
        machine: machine.to_owned(),
        source,
    };
    let options = FitOptions {
        prior: Some(OwnLagWeights::public_constant(channels)),
        ..FitOptions::new(step)
    };
    let schema = FeatureSchema::recorded("recorded", channels);
    let detector = Detector::fit(&schema, &train, &options).map_err(failed)?;
    let (_, contributions) = detector.explain_series(&test).map_err(failed)?;
    let mut hit = Vec::with_capacity(segments.len());
    // Recorded segments may overlap, a pass over the rows cannot: those that do not fit wait for the next one.
    while !segments.is_empty() {
        let mut behind = 0;
        let (pass, waiting): (Vec<Segment>, Vec<Segment>) = segments.into_iter().partition(|segment| {
            let fits = segment.from >= behind;
            if fits {
                behind = segment.rows().end;
            }
            fits
        });
        let incidents: Vec<Range<usize>> = pass.iter().map(Segment::rows).collect();
        let ranked = detector.rank_rows(&test, &contributions, &incidents);
        hit.extend(
            pass.iter()
                .zip(&ranked)
                .map(|(segment, ranked)| hits(&segment.dims, ranked)),
        );
        segments = waiting;
    }
    Ok(hit)
}

impl Segment {
    fn rows(&self) -> Range<usize> {
        self.from..self.to.max(self.from) + 1
    }
}

fn hits(blamed: &[usize], ranked: &[ChannelCause]) -> Hits {
    let share = |percent: usize| {
        let first = (blamed.len() * percent).div_ceil(100).min(ranked.len());
        let found = ranked[..first]
            .iter()
            .filter(|cause| blamed.contains(&cause.channel));
        let random = first as f64 / ranked.len().max(1) as f64;
        (found.count() as f64 / blamed.len() as f64, random)
    };
    let (at_100, at_150) = (share(100), share(150));
    Hits {
        found: [at_100.0, at_150.0],
        random: [at_100.1, at_150.1],
    }
}

impl ChannelResult {
    pub(super) fn table(&self) -> String {
        let row = |name: &str, segments: usize, first: f64, second: f64| {
            vec![
                name.to_owned(),
                segments.to_string(),
                format!("{first:.3}"),
                format!("{second:.3}"),
            ]
        };
        let mut rows: Vec<_> = self
            .machines
            .iter()
            .map(|m| row(&m.machine, m.segments, m.hit_rate_100, m.hit_rate_150))
            .collect();
        rows.push(row(
            "ALL SEGMENTS",
            self.segments,
            self.hit_rate_100,
            self.hit_rate_150,
        ));
        rows.push(row(
            "random order",
            self.segments,
            self.random_100,
            self.random_150,
        ));
        table(&["machine", "segments", "HitRate@100", "HitRate@150"], &rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranking(order: &[usize]) -> Vec<ChannelCause> {
        let cause = |channel: &usize| ChannelCause {
            channel: *channel,
            strength: 0.0,
            residual_share: 0.0,
            residual: 0.0,
            change: 0.0,
            since: None,
        };
        order.iter().map(cause).collect()
    }

    #[test]
    fn counts_blamed_channels_among_the_first_of_the_ranking() {
        let found = hits(&[2, 5, 7], &ranking(&[2, 0, 1, 5, 7, 3, 4, 6]));
        // Among the first 3 one of 3; among the first ⌈4.5⌉ = 5 all.
        assert!((found.found[0] - 1.0 / 3.0).abs() < 1e-12 && (found.found[1] - 1.0).abs() < 1e-12);
        assert!((found.random[0] - 3.0 / 8.0).abs() < 1e-12 && (found.random[1] - 5.0 / 8.0).abs() < 1e-12);
    }
}
