//! The fitted detector of one host: fit on history, score rows one by one or all at once.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::feature::FeatureSchema;
use crate::forecaster::{Forecaster, ResidualNetwork};
use crate::global::{GlobalModel, OwnLagWeights};
use crate::moments::LEVEL_MAX;
use crate::normalise::{Normaliser, narrow};
use crate::ridge::{NormalEquations, Unsolvable, coldness};
use crate::sample::Sample;
use crate::score::{HALF_LIVES, Head, HeadState};
use crate::series::{Series, SeriesError};
use crate::threshold::Threshold;
use crate::window::{Hold, LagRing, lags_of};
use crate::{LAG_COUNT, LAG_MAX};

pub use crate::model_file::{FORMAT_VERSION, ModelFileError};

/// Fewest rows that a detector can be fitted on.
pub const ROWS_MIN: usize = 2 * LAG_MAX;

/// Rows that a [`Scorer`] needs before its first score: ten for the lags, and twelve more because the exponential means begin
/// with a single row and would raise an alarm at nothing.
pub const WARM_UP_ROWS: usize = LAG_MAX + 12;

/// By how much the scale's floors are larger at a cold start.
const COLD_FLOOR: f64 = 0.5;

/// What part of a channel's level elsewhere its unit of residuals is at least, at a cold start: a channel that happens to rest
/// during the first hour is not quiet. Between a tenth and a fifth the result is flat.
const COLD_LEVEL: f64 = 0.15;

/// Bound of one channel's contribution.
const CONTRIBUTION_MAX: f32 = 50.0;

/// Why no detector was made, or why it does not score.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DetectorError {
    /// The feature profile has no channel.
    #[error("the feature profile `{0}` has no channel")]
    NoChannels(String),
    /// Another number of channels than the profile's.
    #[error(transparent)]
    Channels(#[from] SeriesError),
    /// The history is too short.
    #[error("{found} rows are too few to fit on: wait for at least {needed}")]
    TooFewRows {
        /// Fewest rows.
        needed: usize,
        /// Rows given.
        found: usize,
    },
    /// The fit failed.
    #[error(transparent)]
    Unsolvable(#[from] Unsolvable),
    /// A prior or global model for another number of channels.
    #[error("the global model has {found} channels, this profile has {expected}")]
    PriorChannels {
        /// Channels of the profile.
        expected: usize,
        /// Channels of the prior.
        found: usize,
    },
}

/// How to fit.
#[derive(Debug, Clone, PartialEq)]
pub struct FitOptions {
    /// Time between rows, above 0.
    pub step: Duration,
    /// Half-lives of the score's smoothing in wall time; shorter than one step counts as one. Shorter finds brief
    /// trouble and forgets it, longer ignores spikes and is late.
    pub half_lives: [Duration; HALF_LIVES],
    /// Own-lag weights to lean on, learnt elsewhere or the public constant
    /// ([`OwnLagWeights::public_constant`]): right whenever the history may be short, since their weight fades as it
    /// grows. `None` = ridge towards zero, which needs days of rows.
    pub prior: Option<OwnLagWeights>,
    /// False alarms per day that the threshold aims at. Lower is quieter and later.
    pub false_alarms_per_day: f64,
}

impl FitOptions {
    /// For rows `step` apart: half-lives of 3 and 12 steps, no prior, one false alarm a day.
    pub fn new(step: Duration) -> Self {
        Self {
            step,
            half_lives: [step * 3, step * 12],
            prior: None,
            false_alarms_per_day: 1.0,
        }
    }

    /// The half-lives in rows, at least one.
    pub(crate) fn half_lives_rows(&self) -> [f64; HALF_LIVES] {
        let step = self.step.as_secs_f64().max(1e-3);
        self.half_lives
            .map(|half_life| (half_life.as_secs_f64() / step).max(1.0))
    }
}

/// Where a detector comes from; part of the model card. It holds nothing about the host's rows but their number.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Provenance {
    /// Version of the global model in it, 0 for none.
    pub model_version: u64,
    /// Round that made that model.
    pub round: u64,
    /// Rule that combined it; empty for none.
    pub rule: String,
    /// ε spent by this site when the file was written.
    pub epsilon: Option<f64>,
    /// δ of that ε.
    pub delta: Option<f64>,
    /// Sites that contributed to the global model.
    pub training_sites: u64,
}

/// What the weights are learnt from, beside the prior.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Learning {
    OwnRows,
    Nothing,
}

/// A fitted detector: local scaler, two forecasters, a head for each, and the alarm level. About 35 kB at 38
/// channels. Immutable while it scores; a [`Scorer`] holds the moving state.
#[derive(Debug, Clone, PartialEq)]
pub struct Detector {
    pub(crate) schema: FeatureSchema,
    pub(crate) options: FitOptions,
    pub(crate) normaliser: Normaliser,
    pub(crate) forecaster: Forecaster,
    /// Own lags, then all lags.
    pub(crate) heads: [Head; 2],
    pub(crate) threshold: Threshold,
    pub(crate) rows: u64,
    pub(crate) provenance: Provenance,
}

impl Detector {
    /// Fits everything on `series`, which is expected to be mostly normal. Memory: about three copies of the series.
    ///
    /// # Errors
    /// [`DetectorError::Channels`] when the series does not match the schema; [`DetectorError::TooFewRows`] below
    /// [`ROWS_MIN`]; [`DetectorError::NoChannels`]; [`DetectorError::PriorChannels`].
    pub fn fit(schema: &FeatureSchema, series: &Series, options: &FitOptions) -> Result<Self, DetectorError> {
        Self::fit_with(schema, series, options, None, Learning::OwnRows)
    }

    /// As [`fit`](Self::fit), but the weights are the prior's as they are: nothing is learnt of them, only scaler, head and
    /// threshold. What a lone host has before it learns; a baseline.
    ///
    /// # Errors
    /// As [`fit`](Self::fit).
    pub fn fit_as_is(
        schema: &FeatureSchema,
        series: &Series,
        options: &FitOptions,
    ) -> Result<Self, DetectorError> {
        Self::fit_with(schema, series, options, None, Learning::Nothing)
    }

    /// Fits anew on `series`, with the global model's own-lag weights as prior and its network. Options and
    /// provenance stay.
    ///
    /// # Errors
    /// As [`fit`](Self::fit).
    pub fn refit_with_global(&self, series: &Series, global: &GlobalModel) -> Result<Self, DetectorError> {
        let options = FitOptions {
            prior: Some(global.own_lag()),
            ..self.options.clone()
        };
        let network = ResidualNetwork::new(global.channels(), global.network());
        let fitted = Self::fit_with(&self.schema, series, &options, network, Learning::OwnRows)?;
        Ok(Self {
            provenance: self.provenance.clone(),
            ..fitted
        })
    }

    fn fit_with(
        schema: &FeatureSchema,
        series: &Series,
        options: &FitOptions,
        network: Option<ResidualNetwork>,
        learning: Learning,
    ) -> Result<Self, DetectorError> {
        check_channels(schema, series, options.prior.as_ref())?;
        if series.rows() < ROWS_MIN {
            return Err(DetectorError::TooFewRows {
                needed: ROWS_MIN,
                found: series.rows(),
            });
        }
        let normaliser = local_scaler(schema, series, options.prior.is_some());
        let scaled = ScaledRows::new(&normaliser, series);
        let mut equations = NormalEquations::new(schema.channels());
        if learning == Learning::OwnRows {
            equations.add_rows(&scaled.values, 0..scaled.rows());
        }
        let forecaster = forecaster(&equations, options.prior.as_ref(), network)?;

        let half_lives = options.half_lives_rows();
        let floors = level_floors(schema, &normaliser, options.prior.as_ref(), series.rows() as u64);
        let mut residuals = vec![0.0; scaled.values.len()];
        scaled.residuals(&forecaster, Path::Own, &mut residuals);
        let (own, mut scores) = Head::fit(&residuals, schema.channels(), half_lives, &floors);
        scaled.residuals(&forecaster, Path::Full, &mut residuals);
        let (full, full_scores) = Head::fit(&residuals, schema.channels(), half_lives, &floors);
        scores
            .iter_mut()
            .zip(full_scores)
            .for_each(|(score, other)| *score += other);
        let threshold = Threshold::calibrate(&scores, options.step, options.false_alarms_per_day);
        Ok(Self {
            schema: schema.clone(),
            options: options.clone(),
            normaliser,
            forecaster,
            heads: [own, full],
            threshold,
            rows: series.rows() as u64,
            provenance: Provenance::default(),
        })
    }

    /// The score of every row. A [`Scorer`] that begins with the first row gives the same numbers once it is warm; here the
    /// first ten rows, which have no forecast, get the score of the eleventh. With ten rows or fewer every score is NaN.
    ///
    /// # Errors
    /// [`DetectorError::Channels`] when the series has other channels.
    pub fn score_series(&self, series: &Series) -> Result<Vec<f32>, DetectorError> {
        self.replay(series, |_| ())
    }

    /// The score of every row, as [`score_series`](Self::score_series) gives it, and the contributions
    /// `[time, channel]` as in [`Scored`]; 0 for the first ten rows.
    ///
    /// # Errors
    /// [`DetectorError::Channels`] when the series has other channels.
    pub fn explain_series(&self, series: &Series) -> Result<(Vec<f32>, Vec<f32>), DetectorError> {
        let mut contributions = Vec::with_capacity(series.values().len());
        let scores = self.replay(series, |row| contributions.extend_from_slice(row))?;
        Ok((scores, contributions))
    }

    fn replay(&self, series: &Series, mut each: impl FnMut(&[f32])) -> Result<Vec<f32>, DetectorError> {
        check_channels(&self.schema, series, None)?;
        let mut state = ScoringState::new(self.schema.channels());
        let mut scores = Vec::with_capacity(series.rows());
        for row in series.iter_rows() {
            scores.push(state.push(self, row));
            each(&state.contributions);
        }
        let first = scores.get(LAG_MAX).copied().unwrap_or(f32::NAN);
        scores.iter_mut().take(LAG_MAX).for_each(|score| *score = first);
        Ok(scores)
    }

    /// The alarm level found at the fit.
    pub fn threshold(&self) -> Threshold {
        self.threshold
    }

    /// The feature profile.
    pub fn schema(&self) -> &FeatureSchema {
        &self.schema
    }

    /// How it was fitted.
    pub fn options(&self) -> &FitOptions {
        &self.options
    }

    /// Rows it was fitted on.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Where it comes from.
    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }

    /// Says where it comes from; the next saved card holds it.
    pub fn set_provenance(&mut self, provenance: Provenance) {
        self.provenance = provenance;
    }
}

/// The score of one row.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// Anomaly score, ≥ 0, larger = more anomalous; 2 is about the top per cent of the history. NaN during
    /// the first [`WARM_UP_ROWS`].
    pub score: f32,
    /// What each channel adds now, 0 to 50, in the order of the profile: the mean over both forecasters of its
    /// residual in units of its own usual residual.
    pub contributions: Vec<f32>,
}

/// Scores one row at a time, in fixed memory.
#[derive(Debug, Clone)]
pub struct Scorer {
    detector: Arc<Detector>,
    state: ScoringState,
    rows: usize,
}

impl Scorer {
    /// Starts with an empty ring: [`WARM_UP_ROWS`] rows without a score. Lead it through the last rows that are
    /// known and it is warm at once.
    pub fn new(detector: Arc<Detector>) -> Self {
        let state = ScoringState::new(detector.schema.channels());
        Self {
            detector,
            state,
            rows: 0,
        }
    }

    /// Takes the next row. Missing values (NaN, or a row that is too short) are held and counted; values beyond the
    /// profile's channels are not looked at.
    pub fn push(&mut self, sample: &Sample) -> Scored {
        let warm = self.warm_up_rows() == 0;
        self.rows = self.rows.saturating_add(1);
        let score = self.state.push(&self.detector, &sample.values);
        let contributions = self.state.contributions.clone();
        Scored {
            score: if warm { score } else { f32::NAN },
            contributions,
        }
    }

    /// The detector in use.
    pub fn detector(&self) -> &Arc<Detector> {
        &self.detector
    }

    /// Values that were missing so far.
    pub fn missing(&self) -> u64 {
        self.state.hold.held()
    }

    /// Rows still needed before the first score.
    pub fn warm_up_rows(&self) -> usize {
        WARM_UP_ROWS.saturating_sub(self.rows)
    }
}

/// What moves while a detector scores.
#[derive(Debug, Clone)]
struct ScoringState {
    hold: Hold,
    ring: LagRing,
    heads: [HeadState; 2],
    row: Vec<f32>,
    lags: Vec<f32>,
    residuals: Vec<f32>,
    z: Vec<f32>,
    contributions: Vec<f32>,
}

impl ScoringState {
    fn new(channels: usize) -> Self {
        Self {
            hold: Hold::new(channels),
            ring: LagRing::new(channels),
            heads: [HeadState::new(channels), HeadState::new(channels)],
            row: vec![0.0; channels],
            lags: vec![0.0; channels * LAG_COUNT],
            residuals: vec![0.0; channels],
            z: vec![0.0; channels],
            contributions: vec![0.0; channels],
        }
    }

    fn push(&mut self, detector: &Detector, raw: &[f32]) -> f32 {
        detector.normaliser.apply(raw, &mut self.row);
        self.hold.fill(&mut self.row);
        let mut score = f32::NAN;
        if self.ring.is_full() {
            self.ring.lags(&mut self.lags);
            self.contributions.fill(0.0);
            let mut sum = 0.0;
            for (path, (head, state)) in [Path::Own, Path::Full]
                .into_iter()
                .zip(detector.heads.iter().zip(&mut self.heads))
            {
                path.forecast(&detector.forecaster, &self.lags, &mut self.residuals);
                for (channel, (residual, value)) in self.residuals.iter_mut().zip(&self.row).enumerate() {
                    let counts = detector.normaliser.seen[channel] && !self.hold.muted(channel);
                    *residual = if counts {
                        (value - *residual).abs()
                    } else {
                        f32::NAN
                    };
                }
                sum += head.push(state, &self.residuals, &mut self.z);
                for (contribution, z) in self.contributions.iter_mut().zip(&self.z) {
                    *contribution += 0.5 * z.min(CONTRIBUTION_MAX);
                }
            }
            score = narrow(sum);
        }
        self.ring.push(&self.row);
        score
    }
}

/// Which of the two forecasts.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Path {
    Own,
    Full,
}

impl Path {
    fn forecast(self, forecaster: &Forecaster, lags: &[f32], out: &mut [f32]) {
        match self {
            Self::Own => forecaster.own(lags, out),
            Self::Full => forecaster.full(lags, out),
        }
    }
}

/// A whole series, scaled, with missing values held: what fits and the gate work on.
pub(crate) struct ScaledRows {
    channels: usize,
    pub(crate) values: Vec<f32>,
    /// Whether a value counts; empty when all do.
    silent: Vec<bool>,
}

impl ScaledRows {
    pub(crate) fn new(normaliser: &Normaliser, series: &Series) -> Self {
        let channels = normaliser.channels();
        let mut hold = Hold::new(channels);
        let mut values = vec![0.0; series.rows() * channels];
        let mut silent = Vec::new();
        for (index, (raw, row)) in series
            .iter_rows()
            .zip(values.chunks_exact_mut(channels.max(1)))
            .enumerate()
        {
            normaliser.apply(raw, row);
            hold.fill(row);
            for channel in 0..channels {
                if hold.muted(channel) || !normaliser.seen[channel] {
                    silent.resize(series.rows() * channels, false);
                    silent[index * channels + channel] = true;
                }
            }
        }
        Self {
            channels,
            values,
            silent,
        }
    }

    pub(crate) fn rows(&self) -> usize {
        self.values.len() / self.channels.max(1)
    }

    /// Writes `|x − x̂|`, `[time, channel]`, NaN where a channel does not count; the first ten rows repeat the
    /// eleventh.
    pub(crate) fn residuals(&self, forecaster: &Forecaster, path: Path, out: &mut [f32]) {
        let channels = self.channels;
        let mut lags = vec![0.0; channels * LAG_COUNT];
        for row in LAG_MAX..self.rows() {
            lags_of(&self.values, channels, row, &mut lags);
            let here = row * channels..(row + 1) * channels;
            let out = &mut out[here.clone()];
            path.forecast(forecaster, &lags, out);
            for (index, (out, value)) in out.iter_mut().zip(&self.values[here.clone()]).enumerate() {
                let silent = self.silent.get(here.start + index).copied().unwrap_or(false);
                *out = if silent { f32::NAN } else { (value - *out).abs() };
            }
        }
        let (start, rest) = out.split_at_mut(LAG_MAX * channels);
        start
            .chunks_exact_mut(channels.max(1))
            .for_each(|row| row.copy_from_slice(&rest[..channels]));
    }
}

/// The local scaler; with a prior, floors are larger while the start is cold.
pub(crate) fn local_scaler(schema: &FeatureSchema, series: &Series, prior: bool) -> Normaliser {
    let factor = if prior {
        1.0 + COLD_FLOOR * coldness(series.rows() as u64)
    } else {
        1.0
    };
    Normaliser::fit(schema, series, narrow(factor))
}

/// What the unit of each channel's residuals is at least, in locally scaled units: a share of its level elsewhere, which fades as
/// the history grows. Empty without a prior.
fn level_floors(
    schema: &FeatureSchema,
    normaliser: &Normaliser,
    prior: Option<&OwnLagWeights>,
    rows: u64,
) -> Vec<f32> {
    let share = narrow(COLD_LEVEL * coldness(rows));
    let levels = prior.map(OwnLagWeights::levels).unwrap_or_default();
    let scales = schema.features.iter().zip(&normaliser.scale);
    levels
        .iter()
        .zip(scales)
        .map(|(level, (feature, scale))| share * level.clamp(0.0, LEVEL_MAX) * feature.scale / scale)
        .collect()
}

/// Solves for both paths.
pub(crate) fn forecaster(
    equations: &NormalEquations,
    prior: Option<&OwnLagWeights>,
    network: Option<ResidualNetwork>,
) -> Result<Forecaster, Unsolvable> {
    Ok(Forecaster::new(
        equations.channels(),
        equations.solve_own(prior)?,
        equations.solve_full(prior)?,
        network,
    ))
}

fn check_channels(
    schema: &FeatureSchema,
    series: &Series,
    prior: Option<&OwnLagWeights>,
) -> Result<(), DetectorError> {
    let expected = schema.channels();
    if expected == 0 {
        return Err(DetectorError::NoChannels(schema.name.clone()));
    }
    if series.channels() != expected {
        return Err(SeriesError::Channels {
            expected,
            found: series.channels(),
        }
        .into());
    }
    match prior.map(OwnLagWeights::channels) {
        Some(found) if found != expected => Err(DetectorError::PriorChannels { expected, found }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schema(channels: usize) -> FeatureSchema {
        FeatureSchema::recorded("t", channels)
    }

    fn options() -> FitOptions {
        FitOptions::new(Duration::from_mins(1))
    }

    /// Two noisy channels.
    fn noisy(rows: usize) -> Vec<f32> {
        let mut state = 21_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 16_777_216.0
        };
        (0..rows * 2).map(|_| next()).collect()
    }

    fn fit(channels: usize, values: Vec<f32>) -> Detector {
        Detector::fit(
            &schema(channels),
            &Series::new(channels, values).unwrap(),
            &options(),
        )
        .unwrap()
    }

    fn scores(detector: &Detector, values: Vec<f32>) -> Vec<f32> {
        detector
            .score_series(&Series::new(detector.schema.channels(), values).unwrap())
            .unwrap()
    }

    #[test]
    fn refuses_what_cannot_be_fitted() {
        let fit = |channels, values: Vec<f32>| {
            Detector::fit(&schema(channels), &Series::new(2, values).unwrap(), &options()).unwrap_err()
        };
        assert!(matches!(
            fit(2, Vec::new()),
            DetectorError::TooFewRows {
                needed: ROWS_MIN,
                found: 0
            }
        ));
        assert!(matches!(
            fit(2, noisy(1)),
            DetectorError::TooFewRows { found: 1, .. }
        ));
        assert!(matches!(
            fit(3, noisy(50)),
            DetectorError::Channels(SeriesError::Channels {
                expected: 3,
                found: 2
            })
        ));
        assert!(matches!(fit(0, noisy(50)), DetectorError::NoChannels(_)));
        let prior = Some(OwnLagWeights::public_constant(5));
        let rows = Series::new(2, noisy(50)).unwrap();
        let error = Detector::fit(&schema(2), &rows, &FitOptions { prior, ..options() }).unwrap_err();
        assert!(matches!(
            error,
            DetectorError::PriorChannels {
                expected: 2,
                found: 5
            }
        ));
    }

    #[test]
    fn constant_channels_score_zero_and_a_change_is_seen() {
        let detector = fit(2, vec![0.5; 200]);
        let mut values = vec![0.5; 80];
        values[60..].fill(0.9);
        let scores = scores(&detector, values);
        assert!(scores[..30].iter().all(|s| *s < 0.01));
        assert!(
            scores[30] > 1.0 && scores.iter().all(|s| s.is_finite()),
            "{scores:?}"
        );
    }

    #[test]
    fn no_rows_and_few_rows_have_defined_scores() {
        let detector = fit(2, noisy(100));
        assert!(scores(&detector, Vec::new()).is_empty());
        assert!(scores(&detector, noisy(10)).iter().all(|s| s.is_nan()));
        let eleven = scores(&detector, noisy(11));
        assert!(
            eleven
                .iter()
                .all(|s| s.to_bits() == eleven[10].to_bits() && s.is_finite())
        );
    }

    #[test]
    fn huge_values_give_finite_scores() {
        let mut train = noisy(100);
        (train[7], train[90]) = (f32::MAX, f32::MIN);
        let detector = fit(2, train);
        let mut test = noisy(40);
        (test[50], test[53], test[61]) = (1e30, f32::MIN, f32::INFINITY);
        assert!(scores(&detector, test).iter().all(|s| s.is_finite()));
    }

    #[test]
    fn column_without_values_adds_nothing_then_or_later() {
        let mut train = noisy(200);
        train.iter_mut().skip(1).step_by(2).for_each(|v| *v = f32::NAN);
        let detector = fit(2, train);
        let test = noisy(60);
        let with = scores(&detector, test.clone());
        let mut without = test;
        without.iter_mut().skip(1).step_by(2).for_each(|v| *v = f32::NAN);
        let without = scores(&detector, without);
        // The full path still reads the channel's lags, so the two are close, not equal.
        assert!(
            with.iter().chain(&without).all(|s| s.is_finite() && *s < 20.0),
            "{with:?}"
        );
        let all_missing = fit(2, vec![f32::NAN; 100]);
        assert!(scores(&all_missing, noisy(40)).iter().all(|s| *s == 0.0));
    }

    #[test]
    fn long_absence_of_a_channel_raises_no_score() {
        let detector = fit(2, noisy(400));
        let mut test = noisy(200);
        test.iter_mut()
            .skip(101)
            .step_by(2)
            .take(50)
            .for_each(|v| *v = f32::NAN);
        let quiet = scores(&detector, noisy(200)).into_iter().fold(0.0, f32::max);
        assert!(scores(&detector, test).into_iter().fold(0.0, f32::max) <= 1.5 * quiet);
    }

    #[test]
    fn half_lives_are_wall_time_and_at_least_one_row() {
        let halves = [Duration::from_mins(3), Duration::from_mins(12)];
        let coarse = FitOptions {
            step: Duration::from_mins(5),
            half_lives: halves,
            ..options()
        };
        let close = |rows: [f64; 2], to: [f64; 2]| rows.iter().zip(to).all(|(a, b)| (a - b).abs() < 1e-9);
        assert!(close(coarse.half_lives_rows(), [1.0, 2.4]));
        assert!(close(options().half_lives_rows(), [3.0, 12.0]));
    }

    #[test]
    fn short_row_counts_as_missing_values() {
        let detector = Arc::new(fit(2, noisy(100)));
        let mut scorer = Scorer::new(detector);
        assert_eq!(scorer.warm_up_rows(), WARM_UP_ROWS);
        for row in noisy(30).chunks_exact(2) {
            scorer.push(&Sample {
                at_ms: 0,
                values: row.to_vec(),
            });
        }
        let scored = scorer.push(&Sample {
            at_ms: 0,
            values: vec![0.5],
        });
        assert!(scored.score.is_finite() && scored.contributions.len() == 2);
        assert_eq!((scorer.missing(), scorer.warm_up_rows()), (1, 0));
    }

    #[test]
    fn with_few_rows_the_prior_decides_and_fades_with_many() {
        let prior = OwnLagWeights::new(2, [0.9, 0.0, 0.0, 0.0, 0.0].repeat(2)).unwrap();
        let weight = |rows| {
            let series = Series::new(2, noisy(rows)).unwrap();
            let options = FitOptions {
                prior: Some(prior.clone()),
                ..options()
            };
            Detector::fit(&schema(2), &series, &options)
                .unwrap()
                .forecaster
                .own[0]
        };
        assert!(weight(40) > 0.8, "{}", weight(40));
        assert!(weight(20_000) < 0.05, "{}", weight(20_000));
    }
}
