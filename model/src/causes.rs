//! Which channels explain an incident, and the evidence for each.
//!
//! ```text
//! row → contributions (residuals in units of their usual size) ─┐
//!     → deviations (distance from the history's median)         ├→ CauseTracker → ranked ChannelCause
//! alarm → does the row belong to the incident                  ─┘
//! ```
//!
//! With `ρ_c` the root mean square of channel `c`'s contribution over the incident's rows and `δ_c` the mean of its distance
//! `|x'_c|` from the history's median, in robust spreads, a channel's strength is `ln(1 + ρ_c) + ln(1 + δ_c)`. Neither part
//! is enough: a forecaster soon follows a lasting shift, so its residuals fade while the fault goes on; the distance alone is led
//! by channels that drift without trouble. Logarithms, because one channel's residual can be hundreds of times another's.
//! The formula was chosen among several on the recorded segments that `theriac-lab causes` measures it on, so expect a
//! little less elsewhere; it has no constant that was fitted.

use std::fmt;
use std::ops::Range;

use crate::detector::{Detector, DetectorError, WARM_UP_ROWS};
use crate::feature::Transform;
use crate::series::Series;
use crate::threshold::{AlarmState, RAISE_WINDOW, Verdict};

/// A channel has left its usual range from this contribution, or from this many spreads of distance on. Both are beyond
/// what a normal distribution shows in a thousand rows.
const DEPARTED: f32 = 4.0;
/// … and is back after so many rows in a row within it.
const CALM_ROWS: u32 = 10;
/// Half the distance of the 5 % and 95 % quantiles, in spreads.
const HALF_RANGE: f32 = 1.645;

/// One channel's part in an incident.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ChannelCause {
    /// Its place in the feature profile.
    pub channel: usize,
    /// What the ranking goes by, ≥ 0; compared within one incident only.
    pub strength: f32,
    /// Its share of the squared residuals of all channels, 0 to 1.
    pub residual_share: f32,
    /// Root mean square of its residual in units of its usual one, 0 to 50.
    pub residual: f32,
    /// Mean distance from the history's median in robust spreads, which are the distance of the 5 % and 95 % quantiles over
    /// 3.29 (an interquartile range is 1.35 of them): −50 to 50, above 0 = higher than usual.
    pub change: f32,
    /// When it left its usual range, for the first time in this incident or before it without a break; `None` when it did
    /// not.
    pub since: Option<u64>,
}

/// Follows every row and ranks the channels of the present incident. Memory: 64 bytes a channel.
#[derive(Clone)]
pub struct CauseTracker {
    channels: Vec<Track>,
    rows: u64,
}

#[derive(Debug, Clone, Default)]
struct Track {
    energy: f64,
    distance: f64,
    change: f64,
    /// When it left its usual range, while it is out of it.
    departed: Option<u64>,
    /// The first such moment that reaches into the incident.
    since: Option<u64>,
    calm: u32,
}

impl CauseTracker {
    /// Before the first row.
    pub fn new(channels: usize) -> Self {
        Self {
            channels: vec![Track::default(); channels],
            rows: 0,
        }
    }

    /// Takes a row: `contributions` as in [`Scored`](crate::detector::Scored), `deviations` from
    /// [`Detector::deviations`]. `at` is any clock that does not go back: milliseconds, or the number of the row.
    /// `in_incident` says whether the row belongs to an incident; the first one that does not ends it.
    pub fn push(&mut self, at: u64, contributions: &[f32], deviations: &[f32], in_incident: bool) {
        if in_incident {
            self.rows += 1;
        } else {
            self.end_incident();
        }
        let rows = self.channels.iter_mut().zip(contributions).zip(deviations);
        for ((track, contribution), deviation) in rows {
            // A value that is missing speaks neither for nor against its channel.
            let known = |value: f32| if value.is_finite() { value } else { 0.0 };
            let (contribution, deviation) = (known(*contribution), known(*deviation));
            track.follow(at, contribution >= DEPARTED || deviation.abs() >= DEPARTED);
            if in_incident {
                track.since = track.since.or(track.departed);
                track.energy += f64::from(contribution).powi(2);
                track.distance += f64::from(deviation.abs());
                track.change += f64::from(deviation);
            }
        }
    }

    fn end_incident(&mut self) {
        if self.rows > 0 {
            self.rows = 0;
            for track in &mut self.channels {
                (track.energy, track.distance, track.change) = (0.0, 0.0, 0.0);
                track.since = None;
            }
        }
    }

    /// Rows of the present incident.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Every channel, strongest first, ties in the order of the profile; empty when there is no incident.
    pub fn ranked(&self) -> Vec<ChannelCause> {
        if self.rows == 0 {
            return Vec::new();
        }
        let rows = self.rows as f64;
        let total: f64 = self.channels.iter().map(|track| track.energy).sum();
        let cause = |(channel, track): (usize, &Track)| {
            let residual = (track.energy / rows).sqrt();
            let strength = residual.ln_1p() + (track.distance / rows).ln_1p();
            let share = if total > 0.0 { track.energy / total } else { 0.0 };
            #[expect(
                clippy::cast_possible_truncation,
                reason = "all lie within −50 and 50, or 0 and 1; precision is not needed"
            )]
            let narrow = |value: f64| value as f32;
            ChannelCause {
                channel,
                strength: narrow(strength),
                residual_share: narrow(share),
                residual: narrow(residual),
                change: narrow(track.change / rows),
                since: track.since,
            }
        };
        let mut causes: Vec<ChannelCause> = self.channels.iter().enumerate().map(cause).collect();
        // Stable: ties stay in the order of the profile.
        causes.sort_by(|a, b| b.strength.total_cmp(&a.strength));
        causes
    }
}

impl Track {
    fn follow(&mut self, at: u64, out_of_range: bool) {
        if out_of_range {
            self.departed.get_or_insert(at);
            self.calm = 0;
        } else {
            self.calm = self.calm.saturating_add(1);
            if self.calm >= CALM_ROWS {
                self.departed = None;
            }
        }
    }
}

impl fmt::Debug for CauseTracker {
    /// Prints no value: distances are made of raw data.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CauseTracker")
            .field("channels", &self.channels.len())
            .field("rows", &self.rows)
            .finish_non_exhaustive()
    }
}

/// An alarm of a recording with its causes.
#[derive(Debug, Clone, PartialEq)]
pub struct ExplainedAlarm {
    /// Its rows.
    pub rows: Range<usize>,
    /// Highest score within.
    pub score: f32,
    /// Every channel, strongest first; `since` is a row.
    pub causes: Vec<ChannelCause>,
}

/// Everything that a recording's rows say to one detector.
#[derive(Debug, Clone, PartialEq)]
pub struct Explained {
    /// Score of each row, as [`Detector::score_series`].
    pub scores: Vec<f32>,
    /// Contributions `[time, channel]`, as [`Detector::explain_series`].
    pub contributions: Vec<f32>,
    /// The alarm level at each row.
    pub levels: Vec<f32>,
    /// The alarms, in order. The last may end with the recording.
    pub alarms: Vec<ExplainedAlarm>,
}

impl Detector {
    /// Distance of each value of a raw row from the history's median, in robust spreads, −50 to 50; NaN where the value
    /// is missing.
    pub fn deviations(&self, raw: &[f32], out: &mut [f32]) {
        self.normaliser.apply(raw, out);
    }

    /// The middle nine tenths of a channel's history, about, in raw units: median ± 1.645 robust spreads.
    ///
    /// # Panics
    /// When there is no such channel.
    pub fn usual_range(&self, channel: usize) -> Range<f32> {
        let (middle, spread) = (self.normaliser.location[channel], self.normaliser.scale[channel]);
        let transform = self.schema().features[channel].transform;
        let raw = |value: f32| match transform {
            Transform::Linear => value,
            Transform::Log1p => value.max(0.0).exp_m1(),
        };
        raw(middle - HALF_RANGE * spread)..raw(middle + HALF_RANGE * spread)
    }

    /// Scores a recording, raises its alarms as a running edge would, and ranks the channels of each.
    ///
    /// # Errors
    /// [`DetectorError::Channels`] when the series has other channels.
    pub fn explain_alarms(&self, series: &Series) -> Result<Explained, DetectorError> {
        let (scores, contributions) = self.explain_series(series)?;
        let (levels, rows) = self.alarm_rows(&scores);
        let causes = self.rank_rows(series, &contributions, &rows);
        let alarms = rows
            .into_iter()
            .zip(causes)
            .map(|(rows, causes)| ExplainedAlarm {
                score: scores[rows.clone()].iter().copied().fold(f32::MIN, f32::max),
                rows,
                causes,
            })
            .collect();
        Ok(Explained {
            scores,
            contributions,
            levels,
            alarms,
        })
    }

    /// The alarm level before each row, and the rows of each alarm, as a running edge would raise them that begins with the first of `scores`
    /// ([`score_series`](Self::score_series)): its first [`WARM_UP_ROWS`] raise nothing and move nothing. An alarm is
    /// confirmed a few rows late; its rows begin with the first of those that confirmed it.
    pub fn alarm_rows(&self, scores: &[f32]) -> (Vec<f32>, Vec<Range<usize>>) {
        let mut alarm = AlarmState::new(self.threshold());
        let mut levels = Vec::with_capacity(scores.len());
        let mut rows: Vec<Range<usize>> = Vec::new();
        // The rows that reached the level without an alarm, as far back as they can confirm one.
        let mut suspicious: Vec<usize> = Vec::new();
        for (row, score) in scores.iter().enumerate() {
            let level = alarm.level();
            levels.push(level);
            if row < WARM_UP_ROWS {
                continue;
            }
            let was_active = alarm.active();
            suspicious.retain(|earlier| row - earlier < RAISE_WINDOW as usize);
            if *score >= level && !was_active {
                suspicious.push(row);
            }
            match alarm.push(*score) {
                Verdict::Raised => {
                    rows.push(suspicious.first().copied().unwrap_or(row)..row + 1);
                    suspicious.clear();
                }
                Verdict::Ongoing => {
                    if let Some(open) = rows.last_mut() {
                        open.end = row + 1;
                    }
                }
                Verdict::Cleared | Verdict::Normal => {}
            }
        }
        (levels, rows)
    }

    /// Ranks the channels of each incident, given by its rows, in order and without overlap; ranges beyond the end are cut.
    /// `contributions` are those of [`explain_series`](Self::explain_series) for the same series.
    pub fn rank_rows(
        &self,
        series: &Series,
        contributions: &[f32],
        incidents: &[Range<usize>],
    ) -> Vec<Vec<ChannelCause>> {
        let channels = self.schema().channels();
        let mut tracker = CauseTracker::new(channels);
        let mut deviations = vec![0.0; channels];
        let mut ranked = vec![Vec::new(); incidents.len()];
        let mut next = 0;
        let rows = series
            .iter_rows()
            .zip(contributions.chunks_exact(channels.max(1)));
        for (row, (raw, contributions)) in rows.enumerate() {
            self.deviations(raw, &mut deviations);
            while incidents.get(next).is_some_and(|incident| incident.end <= row) {
                next += 1;
            }
            let inside = incidents
                .get(next)
                .is_some_and(|incident| incident.contains(&row));
            if inside && incidents[next].start == row {
                // The former incident may have ended with the row before.
                tracker.end_incident();
            }
            tracker.push(row as u64, contributions, &deviations, inside);
            if inside && (incidents[next].end == row + 1 || row + 1 == series.rows()) {
                ranked[next] = tracker.ranked();
            }
        }
        ranked
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::detector::FitOptions;
    use crate::feature::FeatureSchema;

    fn order(tracker: &CauseTracker) -> Vec<usize> {
        tracker.ranked().iter().map(|cause| cause.channel).collect()
    }

    #[test]
    fn ranks_by_residual_and_distance_together() {
        let mut tracker = CauseTracker::new(4);
        // Channel 0 surprises, 1 is far away, 2 is both, 3 is neither.
        tracker.push(0, &[9.0, 0.0, 6.0, 1.0], &[0.0, -9.0, 6.0, 0.5], true);
        assert_eq!(order(&tracker), [2, 0, 1, 3]);
        let causes = tracker.ranked();
        assert!((causes[0].strength - 2.0 * 7.0_f32.ln()).abs() < 1e-5);
        assert!((causes[0].residual_share - 36.0 / 118.0).abs() < 1e-5);
        assert!(
            (causes[2].change + 9.0).abs() < 1e-5,
            "the sign of a change is kept"
        );
    }

    #[test]
    fn one_incident_knows_nothing_of_the_one_before() {
        let mut tracker = CauseTracker::new(2);
        tracker.push(0, &[50.0, 0.0], &[50.0, 0.0], true);
        tracker.push(1, &[0.0, 0.0], &[0.0, 0.0], false);
        assert!(tracker.ranked().is_empty(), "no incident, no causes");
        tracker.push(2, &[0.0, 5.0], &[0.0, 5.0], true);
        assert_eq!((order(&tracker), tracker.rows()), (vec![1, 0], 1));
    }

    #[test]
    fn says_since_when_a_channel_is_out_of_its_range() {
        let mut tracker = CauseTracker::new(2);
        for at in 0..100 {
            let far = if (20..30).contains(&at) || at >= 50 {
                9.0
            } else {
                0.0
            };
            // Channel 1 flickers: never more than nine calm rows.
            let flicker = if at % 9 == 0 { 9.0 } else { 0.0 };
            tracker.push(at, &[0.0, flicker], &[far, 0.0], at >= 60);
        }
        let since = |channel| {
            tracker
                .ranked()
                .iter()
                .find(|c| c.channel == channel)
                .unwrap()
                .since
        };
        assert_eq!((since(0), since(1)), (Some(50), Some(0)));
        for at in 100..111 {
            tracker.push(at, &[0.0, 0.0], &[0.0, 0.0], at < 110);
        }
        tracker.push(111, &[0.0, 9.0], &[0.0, 0.0], true);
        let since = |channel| {
            tracker
                .ranked()
                .iter()
                .find(|c| c.channel == channel)
                .unwrap()
                .since
        };
        assert_eq!((since(0), since(1)), (None, Some(111)), "a new incident");
    }

    #[test]
    fn missing_values_and_short_rows_speak_for_no_channel() {
        let mut tracker = CauseTracker::new(3);
        tracker.push(0, &[f32::NAN, 2.0], &[f32::INFINITY, 2.0], true);
        let causes = tracker.ranked();
        assert_eq!(causes[0].channel, 1);
        assert!(causes.iter().all(|cause| cause.strength.is_finite()));
        assert_eq!(CauseTracker::new(0).ranked(), []);
    }

    /// Two channels that swing, the second lifted in rows 300 to 339.
    fn recorded() -> (Detector, Series) {
        let row = |t: u16, lift: f32| {
            let swing = (f32::from(t) * 0.7).sin() * 0.1;
            [0.4 + swing, 0.5 - swing + lift]
        };
        let rows = |lifted: Range<u16>| -> Vec<f32> {
            (0..500)
                .flat_map(|t| row(t, if lifted.contains(&t) { 0.8 } else { 0.0 }))
                .collect()
        };
        let schema = FeatureSchema::recorded("test", 2);
        let train = Series::new(2, rows(0..0)).unwrap();
        let detector = Detector::fit(&schema, &train, &FitOptions::new(Duration::from_mins(1))).unwrap();
        (detector, Series::new(2, rows(300..340)).unwrap())
    }

    #[test]
    fn an_alarm_of_a_recording_names_the_channel_that_was_changed() {
        let (detector, series) = recorded();
        let explained = detector.explain_alarms(&series).unwrap();
        let [alarm] = &explained.alarms[..] else {
            panic!("alarms: {:?}", explained.alarms);
        };
        assert_eq!(
            alarm.rows.start, 300,
            "the rows before it was confirmed belong to it"
        );
        assert!(alarm.rows.end >= 340);
        let first = alarm.causes[0];
        assert_eq!((first.channel, first.since), (1, Some(300)));
        assert!(first.change > 2.0 && first.residual_share > 0.5, "{first:?}");
        assert_eq!(explained.levels.len(), series.rows());
    }

    #[test]
    fn an_alarm_begins_with_the_first_row_that_confirmed_it_and_never_during_the_warm_up() {
        let (detector, _) = recorded();
        let level = detector.threshold().level();
        let mut scores = vec![0.0; 200];
        scores[3..9].fill(3.0 * level);
        for row in [100, 102, 103] {
            scores[row] = 3.0 * level;
        }
        scores[150] = f32::NAN;
        let (levels, rows) = detector.alarm_rows(&scores);
        assert_eq!(rows.len(), 1, "{rows:?}");
        assert_eq!(
            rows[0].start, 100,
            "reached, missed, reached: the first of the three"
        );
        assert_eq!(
            rows[0].end, 113,
            "ten low rows end it; the row that ends it is none of its own"
        );
        assert_eq!((levels.len(), levels[0]), (200, level));
        assert!(
            (levels[WARM_UP_ROWS] - level).abs() < 1e-6,
            "the warm-up moves nothing"
        );
    }

    #[test]
    fn given_rows_are_ranked_one_by_one_and_cut_at_the_end() {
        let (detector, series) = recorded();
        let (_, contributions) = detector.explain_series(&series).unwrap();
        let incidents = [100..110, 300..310, 490..9000, 9000..9001];
        let ranked = detector.rank_rows(&series, &contributions, &incidents);
        assert_eq!(ranked[1][0].channel, 1);
        assert!(ranked[0][0].strength < ranked[1][0].strength);
        assert_eq!((ranked[2].len(), ranked[3].len()), (2, 0));
    }
}
