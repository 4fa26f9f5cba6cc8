//! Fits on some units, judges the others, counts.
//!
//! Every row is judged by a model that saw no row of its unit. Within a fold the units come in order, as they would fail one
//! after the other: the adapted interval of a unit knows only what the units before it missed.

use rand::SeedableRng as _;
use rand::seq::SliceRandom as _;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::Serialize;
use theriac_model::risk::conformal::AdaptiveLevel;
use theriac_model::risk::exhaustion::Extrapolation;
use theriac_model::risk::predictor::{ALPHA, Judgement, Predictor};
use theriac_model::risk::{Abstain, LeadTime, Outcome, RiskError, TrainingSet};

use super::dataset::{Dataset, Floor, runs};
use super::floor::ridge_times;
use super::metric::{areas, brier, calibration_errors, mean};

/// Folds of a partition.
pub(super) const FOLDS: usize = 5;
/// γ of the adapted level, for each row of a unit that ended.
const ADAPTATION: f64 = 0.0005;

/// Figures of one partition of one data set.
#[derive(Debug, Clone, Serialize)]
pub struct Assessment {
    /// Ours, for each horizon.
    pub horizons: Vec<HorizonFigures>,
    /// The times.
    pub times: TimeFigures,
    /// Share of rows without a judgement.
    pub abstained: f64,
    /// The same for rows whose columns were shifted by one, which no model can know.
    pub abstained_foreign: f64,
    /// What the linear fallback of an edge reaches, where rows are of a resource.
    pub fallback: Option<Fallback>,
}

/// What the linear fallback reaches.
#[derive(Debug, Clone, Serialize)]
pub struct Fallback {
    /// For each horizon.
    pub horizons: Vec<HorizonFigures>,
    /// Its times.
    pub times: TimeFigures,
    /// Share of rows without a chance at the longest horizon.
    pub abstained: f64,
}

/// Chances within one horizon.
#[derive(Debug, Clone, Serialize)]
pub struct HorizonFigures {
    /// In the data's unit.
    pub horizon: f64,
    /// Share of the judged rows that failed within it.
    pub rate: f64,
    /// Areas under the ROC and the precision-recall curve.
    pub auc_roc: f64,
    /// See `auc_roc`.
    pub auc_pr: f64,
    /// The floor's on all rows; absent where the floor has no score.
    pub floor_auc_roc: Option<f64>,
    /// See `floor_auc_roc`.
    pub floor_auc_pr: Option<f64>,
    /// Expected calibration error, ten bins of equal width.
    pub ece: f64,
    /// The same with ten bins of equally many rows.
    pub ece_equal_mass: f64,
    /// Brier score.
    pub brier: f64,
}

/// Times to failure.
#[derive(Debug, Clone, Default, Serialize)]
pub struct TimeFigures {
    /// Root mean squared error of the expected time, cut off at the reach.
    pub rmse: f64,
    /// The floor's.
    pub floor_rmse: Option<f64>,
    /// Share of intervals that hold the true time.
    pub coverage: f64,
    /// The same with the level adapted as units end.
    pub coverage_adaptive: f64,
    /// Mean length of an interval, an open end cut off at the reach.
    pub width: f64,
    /// Share of judged rows with an interval: those with a failure in sight.
    pub in_sight: f64,
}

/// A row's judgement by a model that did not see its unit.
struct Judged {
    judgement: Result<Judgement, Abstain>,
    adapted: Option<LeadTime>,
    foreign: bool,
    floor_time: Option<f64>,
}

/// Deals the units of `set` into folds: unit number modulo folds for partition 0, as the floors have it, else at random.
pub(super) fn partition(set: &TrainingSet, partition: u64, seed: u64) -> impl Fn(u32) -> usize + use<> {
    let mut units = set.units().to_vec();
    units.sort_unstable();
    units.dedup();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(partition);
    let mut shuffled = units.clone();
    shuffled.shuffle(&mut rng);
    let fold_of: std::collections::BTreeMap<u32, usize> = shuffled
        .into_iter()
        .enumerate()
        .map(|(place, unit)| {
            let fold = if partition == 0 { unit as usize } else { place };
            (unit, fold % FOLDS)
        })
        .collect();
    move |unit| fold_of.get(&unit).copied().unwrap_or(0)
}

/// Judges every row of `data` out of fold.
pub(super) fn assess(
    data: &Dataset,
    fold_of: &(impl Fn(u32) -> usize + Sync),
    done: &(impl Fn() + Sync),
) -> Result<Assessment, RiskError> {
    let folds: Vec<Vec<Judged>> = (0..FOLDS)
        .into_par_iter()
        .map(|fold| {
            let judged = judge_fold(data, fold_of, fold);
            done();
            judged
        })
        .collect::<Result<_, _>>()?;
    // Back into the order of the rows.
    let mut folds: Vec<_> = folds.into_iter().map(Vec::into_iter).collect();
    let judged: Vec<Judged> = data
        .set
        .units()
        .iter()
        .filter_map(|unit| folds[fold_of(*unit)].next())
        .collect();
    Ok(figures(data, &judged))
}

fn judge_fold(
    data: &Dataset,
    fold_of: &impl Fn(u32) -> usize,
    fold: usize,
) -> Result<Vec<Judged>, RiskError> {
    let train = data.set.units_where(|unit| fold_of(unit) != fold);
    let test = data.set.units_where(|unit| fold_of(unit) == fold);
    let predictor = Predictor::fit(&data.settings, &train)?;
    let floor_times = match &data.floor {
        Floor::RidgeTimes(rows) => {
            let (train, test) = (
                rows.units_where(|unit| fold_of(unit) != fold),
                rows.units_where(|unit| fold_of(unit) == fold),
            );
            Some(ridge_times(&train, &test, predictor.reach()))
        }
        Floor::Scores(_) => None,
    };
    let rows: Vec<&[f64]> = test.rows().collect();
    let mut level = AdaptiveLevel::new(ALPHA, ADAPTATION);
    let mut judged = Vec::with_capacity(test.len());
    for (_, first, end) in runs(test.units()) {
        let mut missed = Vec::new();
        for row in first..end {
            let judgement = predictor.judge(rows[row], ALPHA);
            let adapted = predictor
                .judge(rows[row], level.alpha())
                .ok()
                .and_then(|adapted| adapted.lead);
            let outcome = test.outcomes()[row];
            if let Some(lead) = adapted.filter(|_| outcome.known_at(predictor.reach())) {
                missed.push(f64::from(u8::from(!lead.covers(outcome.time()))));
            }
            let mut foreign = rows[row].to_vec();
            foreign.rotate_left(1);
            judged.push(Judged {
                judgement,
                adapted,
                foreign: predictor.judge(&foreign, ALPHA).is_err(),
                floor_time: floor_times.as_ref().map(|times| times[row]),
            });
        }
        // Only now: while a unit lives nobody knows.
        for missed in missed {
            level.observe(missed);
        }
    }
    Ok(judged)
}

fn figures(data: &Dataset, judged: &[Judged]) -> Assessment {
    let reach = data.settings.edges.last().copied().unwrap_or(0.0);
    let outcomes = data.set.outcomes();
    let horizons = data.settings.horizons.iter().enumerate().map(|(at, horizon)| {
        let ours = judged
            .iter()
            .map(|row| row.judgement.as_ref().ok().map(|j| j.chances[at].probability));
        let floor = match &data.floor {
            Floor::Scores(scores) => Some(&scores[at]),
            Floor::RidgeTimes(_) => None,
        };
        horizon_figures(*horizon, ours, outcomes, floor)
    });
    let horizons = horizons.collect();
    let leads = |pick: fn(&Judged) -> Option<LeadTime>| judged.iter().map(pick);
    let fixed = leads(|row| row.judgement.as_ref().ok()?.lead);
    let expected = judged
        .iter()
        .map(|row| row.judgement.as_ref().ok().map(|judgement| judgement.expected));
    let mut times = time_figures(expected, fixed, outcomes, reach);
    times.coverage_adaptive = coverage(leads(|row| row.adapted), outcomes, reach);
    if matches!(data.floor, Floor::RidgeTimes(_)) {
        let errors = judged
            .iter()
            .zip(outcomes)
            .filter_map(|(row, outcome)| Some((row.floor_time? - outcome.time().min(reach)).powi(2)));
        times.floor_rmse = Some(mean(errors).sqrt());
    }
    Assessment {
        horizons,
        times,
        abstained: share(judged.iter().map(|row| row.judgement.is_err())),
        abstained_foreign: share(judged.iter().map(|row| row.foreign)),
        fallback: data
            .fallback
            .as_ref()
            .map(|rows| fallback_figures(data, rows, reach)),
    }
}

fn fallback_figures(data: &Dataset, rows: &[Result<Extrapolation, Abstain>], reach: f64) -> Fallback {
    let outcomes = data.set.outcomes();
    let chance = |row: &Result<Extrapolation, Abstain>, at: usize| {
        let chance = row.as_ref().ok()?.chances[at].ok()?;
        Some(chance.probability)
    };
    let horizons = data.settings.horizons.iter().enumerate().map(|(at, horizon)| {
        let floor = match &data.floor {
            Floor::Scores(scores) => Some(&scores[at]),
            Floor::RidgeTimes(_) => None,
        };
        horizon_figures(*horizon, rows.iter().map(|row| chance(row, at)), outcomes, floor)
    });
    let lead =
        |row: &Result<Extrapolation, Abstain>| row.as_ref().ok()?.lead.filter(|lead| lead.expected < reach);
    let expected = rows.iter().map(|row| lead(row).map(|lead| lead.expected));
    let last = data.settings.horizons.len() - 1;
    Fallback {
        horizons: horizons.collect(),
        times: time_figures(expected, rows.iter().map(lead), outcomes, reach),
        abstained: share(rows.iter().map(|row| chance(row, last).is_none())),
    }
}

fn horizon_figures(
    horizon: f64,
    ours: impl Iterator<Item = Option<f64>>,
    outcomes: &[Outcome],
    floor: Option<&Vec<f64>>,
) -> HorizonFigures {
    // As the floors count: a unit that is lost without a failure did not fail.
    let rows: Vec<(f64, bool)> = ours
        .zip(outcomes)
        .filter_map(|(chance, outcome)| Some((chance?, outcome.fails_before(horizon))))
        .collect();
    let (auc_roc, auc_pr) = areas(&rows);
    let floor = floor.map(|scores| {
        let rows: Vec<(f64, bool)> = scores
            .iter()
            .zip(outcomes)
            .map(|(score, outcome)| (*score, outcome.fails_before(horizon)))
            .collect();
        areas(&rows)
    });
    let (ece, ece_equal_mass) = calibration_errors(&rows);
    HorizonFigures {
        horizon,
        rate: share(rows.iter().map(|row| row.1)),
        auc_roc,
        auc_pr,
        floor_auc_roc: floor.map(|areas| areas.0),
        floor_auc_pr: floor.map(|areas| areas.1),
        ece,
        ece_equal_mass,
        brier: brier(&rows),
    }
}

/// Rows whose fate within the reach is not known take no part.
fn time_figures(
    expected: impl Iterator<Item = Option<f64>>,
    leads: impl Iterator<Item = Option<LeadTime>> + Clone,
    outcomes: &[Outcome],
    reach: f64,
) -> TimeFigures {
    let errors = expected.zip(outcomes).filter_map(|(expected, outcome)| {
        let error = expected? - outcome.time().min(reach);
        outcome.known_at(reach).then_some(error * error)
    });
    let rmse = mean(errors).sqrt();
    let widths = leads
        .clone()
        .flatten()
        .map(|lead| (lead.high.unwrap_or(reach).min(reach) - lead.low).max(0.0));
    TimeFigures {
        rmse,
        floor_rmse: None,
        coverage: coverage(leads.clone(), outcomes, reach),
        coverage_adaptive: f64::NAN,
        width: mean(widths),
        in_sight: share(leads.map(|lead| lead.is_some())),
    }
}

fn coverage(leads: impl Iterator<Item = Option<LeadTime>>, outcomes: &[Outcome], reach: f64) -> f64 {
    let hits = leads.zip(outcomes).filter_map(|(lead, outcome)| {
        let lead = lead?;
        outcome.known_at(reach).then(|| lead.covers(outcome.time()))
    });
    share(hits)
}

fn share(flags: impl Iterator<Item = bool>) -> f64 {
    mean(flags.map(|flag| f64::from(u8::from(flag))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::risk::ramps;

    #[test]
    fn no_unit_is_on_both_sides_of_a_split_in_any_partition() {
        let data = ramps::make(1, 30).unwrap();
        for number in 0..3 {
            let fold_of = partition(&data.set, number, 9);
            for fold in 0..FOLDS {
                let train = data.set.units_where(|unit| fold_of(unit) != fold);
                let test = data.set.units_where(|unit| fold_of(unit) == fold);
                assert_eq!(train.len() + test.len(), data.set.len());
                assert!(test.units().iter().all(|unit| !train.units().contains(unit)));
            }
        }
    }

    #[test]
    fn made_ramps_are_foretold_better_than_by_a_plain_line() {
        let data = ramps::make(1, 120).unwrap();
        let fold_of = partition(&data.set, 1, 9);
        let figures = assess(&data, &fold_of, &|| {}).unwrap();
        for horizon in &figures.horizons {
            assert!(horizon.auc_pr > horizon.floor_auc_pr.unwrap(), "{horizon:?}");
            assert!(horizon.ece < 0.05, "{horizon:?}");
        }
        assert!(
            (0.8..=1.0).contains(&figures.times.coverage),
            "{:?}",
            figures.times
        );
        assert!(figures.abstained < 0.05 && figures.abstained_foreign > 0.5);
    }
}
