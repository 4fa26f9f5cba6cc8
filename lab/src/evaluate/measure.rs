//! Everything that is measured of one machine.

use serde::ser::SerializeMap as _;
use serde::{Serialize, Serializer};

use super::curves::{PointCurves, Ranking, finite};
use super::events::{Affiliation, AlarmQuality, SECONDS_PER_DAY, alarm_quality, range_f1};

/// Thresholds tried for the best range and affiliation F1, and for the alarm budget: so many even quantiles and as many
/// more near the top.
const ORACLE_QUANTILES: usize = 40;
const BUDGET_QUANTILES: usize = 150;

/// What the measures depend on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Settings {
    /// Time between samples, in seconds, above 0.
    pub step_seconds: f64,
    /// Longest buffer of the range-aware surfaces, in samples.
    pub window: usize,
    /// False alarms per day and machine that `bud_*` and `op_*` aim at, above 0.
    pub budget: f64,
    /// Alarms with at most so many samples between them are one.
    pub merge_gap: usize,
}

/// The measures of one machine, named as in the table.
#[derive(Debug, Clone, PartialEq)]
pub struct Measures {
    pub(super) columns: Vec<(&'static str, f64)>,
}

impl Measures {
    /// One of them.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.columns
            .iter()
            .find(|(column, _)| *column == name)
            .map(|(_, value)| *value)
    }
}

impl Serialize for Measures {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.columns.len()))?;
        for (name, value) in &self.columns {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

/// What there is of one machine besides its labels.
#[derive(Debug, Clone, Default)]
pub(super) struct Given {
    pub(super) scores: Vec<f64>,
    /// Scores of the train part, at least one.
    pub(super) train: Option<Vec<f64>>,
    /// Alarms as the detector raised them.
    pub(super) alarms: Option<Vec<bool>>,
}

/// Measures one machine. `labelled` has at least one `true`, and as many samples as there are scores and alarms.
pub(super) fn measure(labelled: Vec<bool>, given: Given, settings: Settings) -> Measures {
    let ranking = Ranking::new(labelled, given.scores);
    let Ranking {
        labelled,
        events,
        scores,
        ..
    } = &ranking;
    let samples = labelled.len();
    let rate = labelled.iter().filter(|labelled| **labelled).count() as f64 / samples as f64;
    let PointCurves {
        auc_roc,
        auc_pr,
        best_f1,
    } = ranking.points();
    let (vus_roc, vus_pr) = ranking.volumes(settings.window);
    let mut columns = vec![
        ("anomalies", events.len() as f64),
        ("rate", rate),
        ("auc_roc", auc_roc),
        ("auc_pr", auc_pr),
        ("oracle_f1", best_f1),
        ("vus_roc", vus_roc),
        ("vus_pr", vus_pr),
    ];

    let ascending = ranking.ascending();
    let (mut best_range, mut best_affiliation) = (0.0_f64, 0.0_f64);
    let affiliation = Affiliation::new(events, samples);
    for threshold in thresholds(&ascending, ORACLE_QUANTILES) {
        let predicted = reaching(scores, threshold);
        best_range = best_range.max(range_f1(events, &predicted));
        best_affiliation = best_affiliation.max(affiliation.f1(&predicted));
    }
    columns.extend([
        ("oracle_range_f1", best_range),
        ("oracle_affil_f1", best_affiliation),
        ("MISLEADING_pa_f1", ranking.point_adjusted_f1()),
    ]);

    let judge = |predicted: &[bool]| {
        alarm_quality(
            events,
            labelled,
            predicted,
            settings.step_seconds,
            settings.merge_gap,
        )
    };
    columns.extend(named(
        "bud",
        within_budget(&ascending, scores, settings.budget, judge),
    ));
    if let Some(train) = given.train {
        let mut train = finite(train);
        train.sort_by(f64::total_cmp);
        let level = quantile(
            &train,
            1.0 - settings.budget * settings.step_seconds / SECONDS_PER_DAY,
        );
        let predicted: Vec<bool> = scores.iter().map(|score| *score > level).collect();
        columns.extend(named("op", judge(&predicted)));
    }
    if let Some(alarms) = given.alarms {
        columns.extend(named("alarm", judge(&alarms)));
        columns.push(("alarm_quiet_share", quiet_share(labelled, &alarms)));
    }
    Measures { columns }
}

/// The lowest threshold whose false alarms, and those of every higher one, stay within the budget.
fn within_budget(
    ascending: &[f64],
    scores: &[f64],
    budget: f64,
    judge: impl Fn(&[bool]) -> AlarmQuality,
) -> AlarmQuality {
    let mut best = AlarmQuality::SILENT;
    for threshold in thresholds(ascending, BUDGET_QUANTILES).into_iter().rev() {
        let quality = judge(&reaching(scores, threshold));
        if quality.fa_per_day > budget {
            break;
        }
        best = quality;
    }
    best
}

/// Share of the samples without label that an alarm covers: one alarm that never ends touches a label and counts as no
/// false one, and only this shows it.
fn quiet_share(labelled: &[bool], alarms: &[bool]) -> f64 {
    let quiet = labelled.iter().filter(|labelled| !**labelled).count() as f64;
    let covered = labelled
        .iter()
        .zip(alarms)
        .filter(|(labelled, alarm)| !**labelled && **alarm);
    covered.count() as f64 / quiet
}

fn named(prefix: &'static str, quality: AlarmQuality) -> [(&'static str, f64); 4] {
    let names = match prefix {
        "bud" => ["bud_fa_per_day", "bud_event_recall", "bud_delay_s", "bud_f1"],
        "op" => ["op_fa_per_day", "op_event_recall", "op_delay_s", "op_f1"],
        _ => [
            "alarm_fa_per_day",
            "alarm_event_recall",
            "alarm_delay_s",
            "alarm_f1",
        ],
    };
    let AlarmQuality {
        fa_per_day,
        event_recall,
        delay_s,
        f1,
    } = quality;
    let values = [fa_per_day, event_recall, delay_s, f1];
    std::array::from_fn(|index| (names[index], values[index]))
}

fn reaching(scores: &[f64], threshold: f64) -> Vec<bool> {
    scores.iter().map(|score| *score >= threshold).collect()
}

/// Distinct scores at `count` even quantiles and at `count` more whose distance from the top grows from 10⁻⁴ to 0.3.
fn thresholds(ascending: &[f64], count: usize) -> Vec<f64> {
    let step = 1.0 / (count - 1) as f64;
    let even = (0..count).map(|index| {
        if index == count - 1 {
            1.0
        } else {
            index as f64 * step
        }
    });
    let (low, high) = (1e-4_f64, 0.3_f64);
    let ratio = (high.log10() - low.log10()) / (count - 1) as f64;
    let near_top = (0..count).map(|index| match index {
        0 => 1.0 - low,
        last if last == count - 1 => 1.0 - high,
        index => 1.0 - 10_f64.powf(index as f64 * ratio + low.log10()),
    });
    let mut levels: Vec<f64> = even.chain(near_top).map(|q| quantile(ascending, q)).collect();
    levels.sort_by(f64::total_cmp);
    levels.dedup();
    levels
}

/// Linear interpolation between order statistics, position `q·(n − 1)`, in the order of operations of `numpy.quantile`: a
/// threshold that differs in its last bit takes another sample. `ascending` holds at least one value.
pub(super) fn quantile(ascending: &[f64], q: f64) -> f64 {
    let last = ascending.len() - 1;
    let position = last as f64 * q;
    if position >= last as f64 {
        return ascending[last];
    }
    let below = position.floor().max(0.0);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and the last index"
    )]
    let index = below as usize;
    let (a, b, t) = (ascending[index], ascending[index + 1], position - below);
    if t >= 0.5 {
        b - (b - a) * (1.0 - t)
    } else {
        a + (b - a) * t
    }
}
