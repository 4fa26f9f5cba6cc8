//! What a measurement says, and how rounds are timed.

use std::time::Instant;

use serde::Serialize;

use super::edge::Told;
use crate::demo::record::median;

/// What was measured. The first fields are a contract.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measurement {
    /// Number of edges.
    pub edges: usize,
    /// Number of values.
    pub dimension: u32,
    /// Rounds that published.
    pub rounds: u64,
    /// From one announcement to the next, pause zero: everything that a round is made of, but training.
    pub round_seconds: RoundSeconds,
    /// Largest resident set of the aggregator.
    pub aggregator_peak_rss_bytes: u64,
    /// Processor time of the aggregator from the first connection to the end.
    pub aggregator_cpu_seconds: f64,
    /// Frame bytes from one edge in one round, on average.
    pub bytes_up_per_edge_round: f64,
    /// Frame bytes to one edge in one round, on average, the model included.
    pub bytes_down_per_edge_round: f64,
    /// Handshakes up to Welcome a second, all edges arriving at once.
    pub handshakes_per_second: f64,
    /// Resident set of the aggregator at the end.
    pub aggregator_rss_bytes: u64,
    /// Rounds that published nothing.
    pub rounds_aborted: u64,
    /// How long the edges stayed connected without rounds, seconds.
    pub idle_seconds: Option<f64>,
}

/// Durations of rounds, in seconds; nothing without at least two rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RoundSeconds {
    /// Half of the rounds were shorter.
    pub median: Option<f64>,
    /// All but one in a hundred were shorter.
    pub p99: Option<f64>,
}

/// The rounds as the first edge sees them.
#[derive(Debug, Default)]
pub(super) struct Course {
    pub(super) published: u64,
    pub(super) aborted: u64,
    announced: Vec<Instant>,
    last_closed: Option<Instant>,
}

impl Course {
    pub(super) fn take(&mut self, told: &Told) {
        match told {
            Told::Announced { edge: 0, at } => self.announced.push(*at),
            Told::Closed {
                edge: 0,
                at,
                published,
            } => {
                self.last_closed = Some(*at);
                if *published {
                    self.published += 1;
                } else {
                    self.aborted += 1;
                }
            }
            Told::Announced { .. } | Told::Closed { .. } | Told::Lost { .. } => {}
        }
    }

    pub(super) fn ended(&self) -> u64 {
        self.published + self.aborted
    }

    /// From announcement to announcement; the last round to its close.
    pub(super) fn seconds(&self) -> RoundSeconds {
        let mut moments = self.announced.clone();
        moments.extend(self.last_closed);
        let mut seconds: Vec<f64> = moments
            .windows(2)
            .map(|pair| pair[1].duration_since(pair[0]).as_secs_f64())
            .collect();
        seconds.sort_by(f64::total_cmp);
        RoundSeconds {
            p99: percentile(&seconds, 0.99),
            median: median(seconds),
        }
    }
}

/// The nearest-rank percentile of sorted values.
fn percentile(sorted: &[f64], share: f64) -> Option<f64> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a rank between 1 and the length"
    )]
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

/// A measurement of nothing.
pub(super) fn empty(edges: usize, dimension: u32) -> Measurement {
    Measurement {
        edges,
        dimension,
        rounds: 0,
        round_seconds: RoundSeconds {
            median: None,
            p99: None,
        },
        aggregator_peak_rss_bytes: 0,
        aggregator_cpu_seconds: 0.0,
        bytes_up_per_edge_round: 0.0,
        bytes_down_per_edge_round: 0.0,
        handshakes_per_second: 0.0,
        aggregator_rss_bytes: 0,
        rounds_aborted: 0,
        idle_seconds: None,
    }
}

/// The measurement for people.
pub fn results(measurement: &Measurement) -> String {
    let mebibytes = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let milliseconds =
        |seconds: Option<f64>| seconds.map_or("-".to_owned(), |s| format!("{:.1} ms", s * 1e3));
    let rows = [
        ("edges", measurement.edges.to_string()),
        ("values in an update", measurement.dimension.to_string()),
        (
            "rounds published, aborted",
            format!("{}, {}", measurement.rounds, measurement.rounds_aborted),
        ),
        ("round, median", milliseconds(measurement.round_seconds.median)),
        (
            "round, 99th percentile",
            milliseconds(measurement.round_seconds.p99),
        ),
        (
            "aggregator, peak memory",
            mebibytes(measurement.aggregator_peak_rss_bytes),
        ),
        (
            "aggregator, memory at the end",
            mebibytes(measurement.aggregator_rss_bytes),
        ),
        (
            "aggregator, processor time",
            format!("{:.2} s", measurement.aggregator_cpu_seconds),
        ),
        (
            "bytes up, edge and round",
            format!("{:.0}", measurement.bytes_up_per_edge_round),
        ),
        (
            "bytes down, edge and round",
            format!("{:.0}", measurement.bytes_down_per_edge_round),
        ),
        (
            "handshakes a second",
            format!("{:.0}", measurement.handshakes_per_second),
        ),
    ];
    let rows: Vec<Vec<String>> = rows
        .into_iter()
        .map(|(what, value)| vec![what.to_owned(), value])
        .collect();
    theriac_command::output::table(&["Measured", "Value"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn rounds_are_timed_from_announcement_to_announcement() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut course = Course::default();
        for ms in [0, 10, 30] {
            course.take(&Told::Announced { edge: 0, at: at(ms) });
            course.take(&Told::Announced {
                edge: 1,
                at: at(ms + 1),
            });
            course.take(&Told::Closed {
                edge: 0,
                at: at(ms + 8),
                published: ms != 10,
            });
        }
        assert_eq!((course.published, course.aborted), (2, 1));
        let seconds = course.seconds();
        assert!((seconds.median.unwrap() - 0.010).abs() < 1e-9, "{seconds:?}");
        assert!((seconds.p99.unwrap() - 0.020).abs() < 1e-9, "{seconds:?}");
    }

    #[test]
    fn the_percentile_is_one_of_the_values() {
        assert_eq!(percentile(&[], 0.99), None);
        assert_eq!(percentile(&[3.0], 0.99), Some(3.0));
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(percentile(&hundred, 0.99), Some(99.0));
    }

    #[test]
    fn the_measurement_has_the_fields_that_scripts_rely_on() {
        let json = serde_json::to_value(empty(10, 100)).unwrap();
        for field in [
            "edges",
            "dimension",
            "rounds",
            "aggregator_peak_rss_bytes",
            "aggregator_cpu_seconds",
            "bytes_up_per_edge_round",
            "bytes_down_per_edge_round",
            "handshakes_per_second",
        ] {
            assert!(!json[field].is_null(), "{field} is missing");
        }
        let rounds = json["round_seconds"].as_object().unwrap();
        assert!(rounds.contains_key("median") && rounds.contains_key("p99"));
    }
}
