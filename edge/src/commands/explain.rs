//! The alarms of a recording with their causes, for people and for programs.

use serde::Serialize;
use theriac_command::output::table;
use theriac_model::causes::{ChannelCause, Explained, ExplainedAlarm};
use theriac_model::detector::Detector;

use super::picture::Clock;

/// Most causes told of one alarm.
const CAUSES_MAX: usize = 5;
/// Most alarms told to people; programs get all.
const ALARMS_MAX: usize = 10;
/// Causes below this share of the strongest one's strength are not told.
const STRENGTH_SHARE_MIN: f32 = 0.3;

/// One alarm.
#[derive(Debug, Serialize)]
pub(super) struct AlarmView {
    /// First row, from 0: the first whose score reached the threshold.
    row: usize,
    rows: usize,
    /// Where the recording has times.
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    until: Option<String>,
    score: f32,
    threshold: f32,
    causes: Vec<CauseView>,
}

/// One channel's part in it.
#[derive(Debug, Serialize)]
struct CauseView {
    channel: String,
    /// What the ranking goes by.
    strength: f32,
    /// Share of the squared residuals of all channels, 0 to 1.
    residual_share: f32,
    /// Residual in units of the usual one.
    residual: f32,
    /// Mean distance from the history's median in robust spreads, above 0 = higher.
    change: f32,
    /// The row with which it left its usual range; none when it did not.
    since_row: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    since: Option<String>,
}

/// Every alarm, in order.
pub(super) fn alarms(detector: &Detector, explained: &Explained, clock: &Clock) -> Vec<AlarmView> {
    let view = |alarm: &ExplainedAlarm| {
        let last = alarm.rows.end.saturating_sub(1);
        AlarmView {
            row: alarm.rows.start,
            rows: alarm.rows.len(),
            from: clock.rfc3339(alarm.rows.start),
            until: clock.rfc3339(last),
            score: alarm.score,
            threshold: explained.levels[alarm.rows.start],
            causes: leading(&alarm.causes)
                .map(|cause| cause_view(detector, cause, clock))
                .collect(),
        }
    };
    explained.alarms.iter().map(view).collect()
}

/// The highest alarms in words, in the order of time.
pub(super) fn words(detector: &Detector, explained: &Explained, clock: &Clock) -> String {
    let mut highest: Vec<(usize, &ExplainedAlarm)> = explained.alarms.iter().enumerate().collect();
    highest.sort_by(|a, b| b.1.score.total_cmp(&a.1.score));
    highest.truncate(ALARMS_MAX);
    highest.sort_by_key(|(number, _)| *number);
    let mut parts: Vec<String> = highest
        .iter()
        .map(|(number, alarm)| {
            let heading = format!(
                "alarm {}: {}, {}, score up to {:.1} (threshold {:.1})",
                number + 1,
                clock.words(alarm.rows.start),
                clock.duration(alarm.rows.start, alarm.rows.end),
                alarm.score,
                explained.levels[alarm.rows.start],
            );
            let rows: Vec<Vec<String>> = leading(&alarm.causes)
                .map(|cause| cause_row(detector, cause, clock))
                .collect();
            let header = ["channel", "of residual", "against usual", "since"];
            format!("{heading}\n{}", table(&header, &rows))
        })
        .collect();
    let left = explained.alarms.len() - highest.len();
    if left > 0 {
        parts.push(format!("and {left} lower alarms: --format json tells all"));
    }
    if parts.is_empty() {
        parts.push("no alarm".to_owned());
    }
    parts.join("\n\n")
}

/// The causes that are worth telling.
pub(super) fn leading(causes: &[ChannelCause]) -> impl Iterator<Item = &ChannelCause> {
    let least = causes
        .first()
        .map_or(0.0, |cause| STRENGTH_SHARE_MIN * cause.strength);
    causes
        .iter()
        .take(CAUSES_MAX)
        .filter(move |cause| cause.strength >= least)
}

/// A share of many channels' residuals is often below one per cent, which is not none.
pub(super) fn percent(share: f32) -> String {
    let digits = usize::from(share < 0.01);
    format!("{:.digits$} %", 100.0 * share)
}

/// What the detector was fitted on and how strongly it leans on what others learnt.
pub(super) fn model_words(detector: &Detector) -> String {
    let provenance = detector.provenance();
    let prior = if provenance.model_version > 0 {
        format!(
            "model {} of round {} ({}, {} sites)",
            provenance.model_version, provenance.round, provenance.rule, provenance.training_sites
        )
    } else {
        "the public constant".to_owned()
    };
    let strength = |lambda: Option<f64>| {
        lambda.map_or_else(|| "not at all".to_owned(), |lambda| format!("lambda {lambda:.0}"))
    };
    let leans = match detector.leaning() {
        [None, None] => "it leans on no other weights".to_owned(),
        [own, full] => format!(
            "it leans on {prior}: own lags {}, all lags {}",
            strength(own),
            strength(full)
        ),
    };
    format!("detector: fitted on {} rows; {leans}", detector.rows())
}

fn cause_view(detector: &Detector, cause: &ChannelCause, clock: &Clock) -> CauseView {
    let since_row = cause.since.and_then(|row| usize::try_from(row).ok());
    CauseView {
        channel: name(detector, cause),
        strength: cause.strength,
        residual_share: cause.residual_share,
        residual: cause.residual,
        change: cause.change,
        since_row,
        since: since_row.and_then(|row| clock.rfc3339(row)),
    }
}

fn cause_row(detector: &Detector, cause: &ChannelCause, clock: &Clock) -> Vec<String> {
    let way = if cause.change >= 0.0 { "above" } else { "below" };
    let since = cause.since.and_then(|row| usize::try_from(row).ok());
    vec![
        name(detector, cause),
        percent(cause.residual_share),
        format!("{:.1} spreads {way}", cause.change.abs()),
        since.map_or("-".to_owned(), |row| clock.words(row)),
    ]
}

fn name(detector: &Detector, cause: &ChannelCause) -> String {
    let feature = detector.schema().features.get(cause.channel);
    feature.map_or_else(
        || format!("channel {}", cause.channel),
        |feature| feature.name.clone(),
    )
}
