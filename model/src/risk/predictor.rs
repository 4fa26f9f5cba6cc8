//! The learnt head as a whole: hazard, calibration, interval and domain, fitted together and stored as one file.
//!
//! Everything that judges the hazard (calibration curves, interval scores) is made from predictions for units that the
//! predicting model was **not** fitted on: the units are dealt into folds, each fold is predicted by a model of the others,
//! and the model that ships is fitted on all of them.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::calibrate::Calibration;
use super::conformal::{ConformalTime, Held};
use super::domain::Domain;
use super::hazard::{HazardModel, RIDGE};
use super::{Abstain, Chance, LeadTime, RiskError, RiskVersion, TrainingSet};

/// Miscoverage of intervals.
pub const ALPHA: f64 = 0.1;
/// A time is given only where a failure within the model's reach is at least so likely.
pub const IN_SIGHT: f64 = 0.05;
/// Largest model file, in bytes.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// Format of the model file.
const FORMAT: u32 = 1;
/// Folds for what judges the hazard.
const FOLDS: usize = 5;
/// Units that have to fail, so that there are two folds with a failure.
const FAILED_UNITS_MIN: usize = 2;

/// What is fitted.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Names of the features, in order.
    pub features: Vec<String>,
    /// Bin edges, ascending from 0; the last one is the reach.
    pub edges: Vec<f64>,
    /// Horizons of the probabilities, ascending, within the edges.
    pub horizons: Vec<f64>,
    /// Ridge of every weight, [`RIDGE`] by default.
    pub ridge: f64,
    /// Every how many rows of a unit one is used: rows next to each other tell nearly the same.
    pub stride: usize,
}

impl Settings {
    /// With the usual ridge and every row.
    pub fn new(features: Vec<String>, edges: Vec<f64>, horizons: Vec<f64>) -> Self {
        Self {
            features,
            edges,
            horizons,
            ridge: RIDGE,
            stride: 1,
        }
    }
}

/// A fitted head.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Predictor {
    format: u32,
    features: Vec<String>,
    horizons: Vec<f64>,
    hazard: HazardModel,
    /// One for each horizon.
    calibrations: Vec<Calibration>,
    /// Missing where no training unit came in sight of a failure.
    time: Option<ConformalTime>,
    domain: Domain,
    /// Units it was fitted on, and how many of them failed.
    units: (usize, usize),
}

/// What the head says of a row.
#[derive(Debug, Clone, PartialEq)]
pub struct Judgement {
    /// One for each horizon, ascending with it.
    pub chances: Vec<Chance>,
    /// Mean time to failure, cut off at the reach.
    pub expected: f64,
    /// The interval; `None` while no failure is in sight.
    pub lead: Option<LeadTime>,
}

impl Predictor {
    /// Fits everything. No random number is drawn: same rows, same bits.
    ///
    /// # Errors
    /// [`RiskError::TooFewFailures`] unless at least two units fail within the reach; [`RiskError::Edges`],
    /// [`RiskError::Width`], [`RiskError::NoRows`].
    pub fn fit(settings: &Settings, all: &TrainingSet) -> Result<Self, RiskError> {
        check(settings, all)?;
        let set = all.thinned(settings.stride);
        let (fold_of, units) = deal(&set, settings.edges[settings.edges.len() - 1])?;
        let fit = |set: &TrainingSet| HazardModel::fit(set, &settings.edges, settings.ridge);
        let hazard = fit(&set)?;
        let mut pool = Pool::new(&settings.horizons);
        for fold in 0..FOLDS {
            let held = set.units_where(|unit| fold_of[&unit] == fold);
            if held.is_empty() {
                continue;
            }
            let model = fit(&set.units_where(|unit| fold_of[&unit] != fold))?;
            pool.add(&model, &held)?;
        }
        let predictor = Self {
            format: FORMAT,
            features: settings.features.clone(),
            horizons: settings.horizons.clone(),
            calibrations: pool.calibrations(units.0)?,
            time: pool.time(hazard.reach())?,
            // Of all rows, also those that were thinned out.
            domain: Domain::fit(all)?,
            hazard,
            units,
        };
        predictor.rounded()
    }

    /// What is to be expected of a row `[feature]`, intervals at miscoverage `alpha` ([`ALPHA`] unless adapted).
    ///
    /// # Errors
    /// [`Abstain::Missing`] and [`Abstain::OutOfDomain`].
    pub fn judge(&self, row: &[f64], alpha: f64) -> Result<Judgement, Abstain> {
        self.domain.check(row)?;
        let outlook = self.hazard.outlook(row).map_err(|_| Abstain::Missing)?;
        let mut chances: Vec<Chance> = Vec::with_capacity(self.horizons.len());
        for (horizon, calibration) in self.horizons.iter().zip(&self.calibrations) {
            let chance = calibration.apply(outlook.probability(*horizon));
            // Each horizon has a curve of its own, and a longer one must not be safer.
            let chance = chances.last().map_or(chance, |before| {
                Chance::new(
                    chance.probability.max(before.probability),
                    chance.low.max(before.low),
                    chance.high.max(before.high),
                )
            });
            chances.push(chance);
        }
        let (expected, deviation) = outlook.time();
        let in_sight = outlook.probability(self.hazard.reach()) >= IN_SIGHT;
        let lead = self
            .time
            .as_ref()
            .filter(|_| in_sight)
            .map(|time| time.interval(expected, deviation, alpha));
        Ok(Judgement {
            chances,
            expected,
            lead,
        })
    }

    /// Horizons of the probabilities.
    pub fn horizons(&self) -> &[f64] {
        &self.horizons
    }

    /// How far times reach.
    pub fn reach(&self) -> f64 {
        self.hazard.reach()
    }

    /// Names of the features, in order.
    pub fn features(&self) -> &[String] {
        &self.features
    }

    /// What its risks are signed with: a digest of everything in it.
    pub fn version(&self) -> RiskVersion {
        let text = serde_json::to_vec(self).unwrap_or_default();
        RiskVersion::hazard(&Sha256::digest(text).into())
    }

    /// Writes it as JSON.
    ///
    /// # Errors
    /// What the system says.
    pub fn save(&self, path: &Path) -> std::io::Result<()> {
        std::fs::write(path, serde_json::to_vec_pretty(self)?)
    }

    /// Reads it. Nothing in the file is trusted: shapes, ranges and order are checked.
    ///
    /// # Errors
    /// [`RiskError::Stored`] says what is wrong.
    pub fn load(path: &Path) -> Result<Self, RiskError> {
        let stored = |reason: String| RiskError::Stored {
            reason: format!("{}: {reason}", path.display()),
        };
        let length = std::fs::metadata(path)
            .map_err(|error| stored(error.to_string()))?
            .len();
        if length > FILE_BYTES_MAX {
            return Err(stored(format!(
                "{length} bytes, at most {FILE_BYTES_MAX} are read"
            )));
        }
        let text = std::fs::read(path).map_err(|error| stored(error.to_string()))?;
        let predictor: Self = serde_json::from_slice(&text).map_err(|error| stored(error.to_string()))?;
        if predictor.is_whole() {
            Ok(predictor)
        } else {
            Err(stored(
                "its parts do not fit together, or it is of another version".to_owned(),
            ))
        }
    }

    /// With every number cut to what a JSON reader gives back to the bit, so that a model that was stored judges and signs as the
    /// one that was fitted.
    fn rounded(self) -> Result<Self, RiskError> {
        let mut value = serde_json::to_value(&self).map_err(|_| RiskError::NotFinite)?;
        round(&mut value);
        serde_json::from_value(value).map_err(|_| RiskError::NotFinite)
    }

    fn is_whole(&self) -> bool {
        let width = self.features.len();
        self.format == FORMAT
            && self.hazard.is_whole()
            && self.domain.is_whole()
            && self.hazard.width() == width
            && self.domain.width() == width
            && horizons_fit(&self.horizons, self.hazard.reach())
            && self.calibrations.len() == self.horizons.len()
            && self.calibrations.iter().all(Calibration::is_whole)
            && self.time.as_ref().is_none_or(ConformalTime::is_whole)
    }
}

/// Nine digits, and nothing below 1e-12: readers that are not exact to the last bit are exact on those.
fn round(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Number(number) if number.is_f64() => {
            let exact = number.as_f64().unwrap_or_default();
            let cut = if exact.abs() < 1e-12 {
                0.0
            } else {
                format!("{exact:.8e}").parse().unwrap_or(exact)
            };
            *value = cut.into();
        }
        serde_json::Value::Array(values) => values.iter_mut().for_each(round),
        serde_json::Value::Object(fields) => fields.values_mut().for_each(round),
        _ => {}
    }
}

fn check(settings: &Settings, set: &TrainingSet) -> Result<(), RiskError> {
    if set.is_empty() {
        return Err(RiskError::NoRows);
    }
    if settings.features.len() != set.width() {
        return Err(RiskError::Width {
            expected: settings.features.len(),
            found: set.width(),
        });
    }
    let reach = settings.edges.last().copied().unwrap_or(0.0);
    if horizons_fit(&settings.horizons, reach) {
        Ok(())
    } else {
        Err(RiskError::Edges)
    }
}

fn horizons_fit(horizons: &[f64], reach: f64) -> bool {
    let ascending = horizons.windows(2).all(|pair| pair[0] < pair[1]);
    !horizons.is_empty() && ascending && horizons.iter().all(|h| *h > 0.0 && *h <= reach)
}

/// The fold of each unit, and how many units there are and how many fail.
type Dealt = (BTreeMap<u32, usize>, (usize, usize));

/// Deals the units into folds, those that fail apart from the others, so that every fold has its share of both. Also
/// tells how many units there are and how many fail before `reach`.
fn deal(set: &TrainingSet, reach: f64) -> Result<Dealt, RiskError> {
    let mut fails: BTreeMap<u32, bool> = BTreeMap::new();
    for (unit, outcome) in set.units().iter().zip(set.outcomes()) {
        *fails.entry(*unit).or_default() |= outcome.fails_before(reach);
    }
    let failed = fails.values().filter(|failed| **failed).count();
    if failed < FAILED_UNITS_MIN {
        return Err(RiskError::TooFewFailures {
            found: failed,
            needed: FAILED_UNITS_MIN,
        });
    }
    let mut next = [0_usize; 2];
    let fold_of = fails.iter().map(|(unit, failed)| {
        let place = &mut next[usize::from(*failed)];
        *place += 1;
        (*unit, (*place - 1) % FOLDS)
    });
    Ok((fold_of.collect(), (fails.len(), failed)))
}

/// Predictions for rows that the predicting model was not fitted on.
struct Pool<'a> {
    horizons: &'a [f64],
    chances: Vec<Vec<(f64, bool)>>,
    held: Vec<Held>,
}

impl<'a> Pool<'a> {
    fn new(horizons: &'a [f64]) -> Self {
        Self {
            horizons,
            chances: vec![Vec::new(); horizons.len()],
            held: Vec::new(),
        }
    }

    fn add(&mut self, model: &HazardModel, set: &TrainingSet) -> Result<(), RiskError> {
        let reach = model.reach();
        for (row, outcome) in set.rows().zip(set.outcomes()) {
            let outlook = model.outlook(row)?;
            for (horizon, chances) in self.horizons.iter().zip(&mut self.chances) {
                if outcome.known_at(*horizon) {
                    chances.push((outlook.probability(*horizon), outcome.fails_before(*horizon)));
                }
            }
            if outcome.known_at(reach) && outlook.probability(reach) >= IN_SIGHT {
                let (expected, deviation) = outlook.time();
                self.held.push(Held {
                    expected,
                    deviation,
                    time: outcome.time(),
                });
            }
        }
        Ok(())
    }

    fn calibrations(&mut self, units: usize) -> Result<Vec<Calibration>, RiskError> {
        let chances = std::mem::take(&mut self.chances).into_iter();
        chances.map(|rows| Calibration::fit(rows, units)).collect()
    }

    fn time(&self, reach: f64) -> Result<Option<ConformalTime>, RiskError> {
        if self.held.is_empty() {
            return Ok(None);
        }
        ConformalTime::fit(&self.held, reach).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, SeedableRng as _};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::risk::Outcome;

    fn settings() -> Settings {
        let names = ["wear", "noise"].map(str::to_owned).to_vec();
        Settings::new(names, vec![0.0, 5.0, 10.0, 20.0, 40.0], vec![5.0, 20.0])
    }

    /// Units that wear out at their own pace and fail at random around full wear; every third is lost before.
    fn worn(seed: u64, units: u32) -> TrainingSet {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut set = TrainingSet::new(2).unwrap();
        for unit in 0..units {
            let life = rng.random_range(40.0..90.0_f64);
            let lost = (unit % 3 == 0).then_some(life * 0.8);
            let mut age = 0.0;
            while age < lost.unwrap_or(life) {
                let row = [
                    age / life + rng.random_range(-0.1..0.1),
                    rng.random_range(0.0..1.0),
                ];
                let outcome = match lost {
                    Some(end) => Outcome::censored(end - age),
                    None => Outcome::failed(life - age),
                };
                set.push(unit, &row, outcome.unwrap()).unwrap();
                age += 1.0;
            }
        }
        set
    }

    #[test]
    fn unseen_units_are_ranked_calibrated_and_covered() {
        let seed = 3;
        let predictor = Predictor::fit(&settings(), &worn(seed, 90)).unwrap();
        let test = worn(seed + 1, 150);
        let (mut hits, mut leads, mut claimed, mut failed) = (0.0, 0.0, 0.0, 0.0);
        for (row, outcome) in test.rows().zip(test.outcomes()) {
            let Ok(judged) = predictor.judge(row, ALPHA) else {
                continue;
            };
            if outcome.known_at(20.0) {
                claimed += judged.chances[1].probability;
                failed += f64::from(u8::from(outcome.fails_before(20.0)));
            }
            if let Some(lead) = judged.lead.filter(|_| outcome.known_at(40.0)) {
                leads += 1.0;
                hits += f64::from(u8::from(lead.covers(outcome.time())));
            }
        }
        let covered = hits / leads;
        assert!(
            (0.85..=0.95).contains(&covered),
            "seed {seed}: {covered} of {leads}"
        );
        assert!(
            (claimed / failed - 1.0).abs() < 0.1,
            "seed {seed}: {claimed} {failed}"
        );
        let near = predictor.judge(&[1.0, 0.5], ALPHA).unwrap();
        let far = predictor.judge(&[0.2, 0.5], ALPHA).unwrap();
        assert!(near.chances[0].probability > 10.0 * far.chances[0].probability);
        assert!(near.chances[0].probability <= near.chances[1].probability);
        assert!(near.expected < far.expected);
    }

    #[test]
    fn what_the_training_rows_did_not_show_is_not_judged() {
        let predictor = Predictor::fit(&settings(), &worn(3, 30)).unwrap();
        assert_eq!(predictor.judge(&[5.0, 0.5], ALPHA), Err(Abstain::OutOfDomain));
        assert_eq!(predictor.judge(&[f64::NAN, 0.5], ALPHA), Err(Abstain::Missing));
    }

    #[test]
    fn the_same_rows_give_the_same_bits_and_a_file_gives_them_back() {
        let set = worn(4, 30);
        let predictor = Predictor::fit(&settings(), &set).unwrap();
        assert_eq!(
            predictor.version(),
            Predictor::fit(&settings(), &set).unwrap().version()
        );
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("risk.json");
        predictor.save(&path).unwrap();
        let read = Predictor::load(&path).unwrap();
        assert_eq!(read, predictor);
        assert_eq!(read.version(), predictor.version());
        assert!(read.version().as_str().starts_with("hazard-1-"));
    }

    #[test]
    fn a_damaged_or_foreign_file_is_refused() {
        let predictor = Predictor::fit(&settings(), &worn(4, 30)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("risk.json");
        let refused = |text: String| {
            std::fs::write(&path, text).unwrap();
            matches!(Predictor::load(&path), Err(RiskError::Stored { .. }))
        };
        let good = serde_json::to_value(&predictor).unwrap();
        let edits: [fn(&mut serde_json::Value); 5] = [
            |v| v["format"] = 2.into(),
            |v| v["features"] = serde_json::json!(["one"]),
            |v| v["horizons"] = serde_json::json!([20.0, 5.0]),
            |v| v["hazard"]["edges"] = serde_json::json!([0.0, 5.0]),
            |v| v["more"] = 1.into(),
        ];
        for edit in edits {
            let mut value = good.clone();
            edit(&mut value);
            assert!(refused(value.to_string()));
        }
        assert!(refused("{".to_owned()));
        assert!(!refused(good.to_string()), "the unchanged one is read");
        assert!(Predictor::load(&dir.path().join("none")).is_err());
    }

    #[test]
    fn no_failure_no_rows_and_horizons_beyond_the_reach_are_refused() {
        let mut set = TrainingSet::new(2).unwrap();
        assert!(matches!(
            Predictor::fit(&settings(), &set),
            Err(RiskError::NoRows)
        ));
        for unit in 0..9 {
            set.push(unit, &[0.0, 1.0], Outcome::censored(99.0).unwrap())
                .unwrap();
        }
        assert!(matches!(
            Predictor::fit(&settings(), &set),
            Err(RiskError::TooFewFailures { found: 0, .. })
        ));
        let mut far = settings();
        far.horizons = vec![50.0];
        assert!(matches!(Predictor::fit(&far, &worn(1, 9)), Err(RiskError::Edges)));
    }

    #[test]
    fn units_that_all_fail_and_constant_features_are_no_obstacle() {
        let mut set = TrainingSet::new(2).unwrap();
        for unit in 0..20_u32 {
            for age in 0..30_u32 {
                let outcome = Outcome::failed(f64::from(30 - age)).unwrap();
                set.push(unit, &[f64::from(age), 1.0], outcome).unwrap();
            }
        }
        let predictor = Predictor::fit(&settings(), &set).unwrap();
        let judged = predictor.judge(&[28.0, 1.0], ALPHA).unwrap();
        assert!(judged.chances[0].probability > 0.8, "{judged:?}");
    }
}
