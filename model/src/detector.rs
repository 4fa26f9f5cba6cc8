//! The fitted detector of one host: fit on history, score rows one by one or all at once.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::arm::Arm;
use crate::feature::FeatureSchema;
use crate::forecaster::{Forecaster, ResidualNetwork};
use crate::global::{GlobalModel, OwnLagWeights};
use crate::linear::FullWeights;
use crate::moments::LEVEL_MAX;
use crate::normalise::{Normaliser, narrow};
use crate::personalise::{self, Leaning};
use crate::ridge::{Lean, NormalEquations, Priors, Unsolvable, coldness};
use crate::sample::Sample;
use crate::score::{HALF_LIVES, Head, HeadState};
use crate::series::{Series, SeriesError};
use crate::threshold::Threshold;
use crate::train::{self, TrainError};
use crate::window::{HOLD_ROWS_MAX, Hold, LagRing, lags_of};
use crate::{LAG_COUNT, LAG_MAX};

pub(crate) use crate::arm::Path;
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

/// The half-lives are not below these rows: a smoothing shorter than a row is none, and two equal ones are one.
const HALF_LIFE_ROWS_MIN: [f64; HALF_LIVES] = [1.0, 3.0];

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
    /// Nearly every row lies behind a gap.
    #[error(
        "of {rows} rows only {usable} follow ten others without a gap of more than eleven steps, at least {needed} must: the step is wrong, or the recording is all gaps"
    )]
    Gaps {
        /// Rows given.
        rows: usize,
        /// Rows with all lags.
        usable: usize,
        /// Fewest of those.
        needed: usize,
    },
    /// The fit failed.
    #[error(transparent)]
    Unsolvable(#[from] Unsolvable),
    /// The residual network could not be fitted.
    #[error("the residual network: {0}")]
    Network(#[source] Box<TrainError>),
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
    /// Half-lives of the score's smoothing in wall time; the first counts as at least one row, the second as at least
    /// three. Shorter finds brief trouble and forgets it, longer ignores spikes and is late.
    pub half_lives: [Duration; HALF_LIVES],
    /// Own-lag weights to lean on, learnt elsewhere or the public constant
    /// ([`OwnLagWeights::public_constant`]): right whenever the history may be short, since their weight fades as it
    /// grows. `None` = ridge towards zero, which needs days of rows.
    pub prior: Option<OwnLagWeights>,
    /// Weights on all lags to lean on in the second forecaster, learnt elsewhere; `None` = own-lag ones (`prior`), other lags towards zero.
    pub full_prior: Option<FullWeights>,
    /// False alarms per day that the threshold aims at. Lower is quieter and later.
    pub false_alarms_per_day: f64,
    /// Which detector.
    pub arm: Arm,
    /// Fits the residual network on the history too; `None` = it stays silent, which is the default because it did not
    /// beat the linear forecasts on recorded servers.
    pub network: Option<NetworkOptions>,
}

/// How the residual network is fitted on a local history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetworkOptions {
    /// Gradient steps of 256 rows.
    pub steps: usize,
    /// Draws the initial weights and the rows of each step.
    pub seed: u64,
}

impl FitOptions {
    /// For rows `step` apart: [`default_half_lives`], no prior, one false alarm a day, the default arm.
    pub fn new(step: Duration) -> Self {
        Self {
            step,
            half_lives: default_half_lives(step),
            prior: None,
            full_prior: None,
            false_alarms_per_day: 1.0,
            arm: Arm::default(),
            network: None,
        }
    }

    /// What both forecasters lean on.
    pub(crate) fn priors(&self) -> Priors<'_> {
        Priors {
            own: self.prior.as_ref(),
            full: self.full_prior.as_ref(),
        }
    }

    /// The half-lives in rows: the first at least [`HALF_LIFE_ROWS_MIN`], and so on.
    pub(crate) fn half_lives_rows(&self) -> [f64; HALF_LIVES] {
        let step = self.step.as_secs_f64().max(1e-3);
        let rows = |index: usize| {
            let half_life: Duration = self.half_lives[index];
            (half_life.as_secs_f64() / step).max(HALF_LIFE_ROWS_MIN[index])
        };
        self.arm.half_lives([rows(0), rows(1)])
    }
}

/// Half-lives in wall time for rows `step` apart. Metrics that come every ten seconds or more are watched for faults that last minutes:
/// 3 and 12 minutes. Faster ones are sampled because somebody wants to act within seconds: 3 and 12 seconds.
pub fn default_half_lives(step: Duration) -> [Duration; HALF_LIVES] {
    if step >= Duration::from_secs(10) {
        [Duration::from_mins(3), Duration::from_mins(12)]
    } else {
        [Duration::from_secs(3), Duration::from_secs(12)]
    }
}

/// Where a detector comes from; part of the model card. It holds nothing about the host's rows but their number.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Provenance {
    /// Version of the global model in it, 0 for none.
    pub model_version: u64,
    /// SHA-256 of that model's values, hexadecimal; empty for none.
    pub model_digest: String,
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
    pub(crate) leaning: Leaning,
    pub(crate) provenance: Provenance,
}

impl Detector {
    /// Fits everything on `series`, which is expected to be mostly normal. Memory: about three copies of the series.
    ///
    /// # Errors
    /// [`DetectorError::Channels`] when the series does not match the schema; [`DetectorError::TooFewRows`] below
    /// [`ROWS_MIN`]; [`DetectorError::Gaps`]; [`DetectorError::NoChannels`]; [`DetectorError::PriorChannels`].
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

    /// Fits anew on `series` as `options` say, but with the global model's weights (own-lag and, where there are some, full ones) as prior and its
    /// network. Profile and provenance stay.
    ///
    /// # Errors
    /// As [`fit`](Self::fit).
    pub fn refit_with_global(
        &self,
        series: &Series,
        global: &GlobalModel,
        options: &FitOptions,
    ) -> Result<Self, DetectorError> {
        let options = FitOptions {
            prior: Some(global.own_lag()),
            full_prior: global.linear(),
            ..options.clone()
        };
        let network = ResidualNetwork::new(global.channels(), global.network());
        let fitted = Self::fit_with(&self.schema, series, &options, network, Learning::OwnRows)?;
        Ok(Self {
            provenance: self.provenance.clone(),
            ..fitted
        })
    }

    /// Fits anew on `series` as `options` say, leaning on what this detector leans on. Profile and provenance stay.
    ///
    /// # Errors
    /// As [`fit`](Self::fit).
    pub fn refit(&self, series: &Series, options: &FitOptions) -> Result<Self, DetectorError> {
        let options = FitOptions {
            prior: self.options.prior.clone(),
            full_prior: self.options.full_prior.clone(),
            ..options.clone()
        };
        let network = self.forecaster.network.clone();
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
        check_channels(schema, series, options.priors())?;
        if series.rows() < ROWS_MIN {
            return Err(DetectorError::TooFewRows {
                needed: ROWS_MIN,
                found: series.rows(),
            });
        }
        let arm = options.arm;
        let normaliser = arm_scaler(schema, series, options);
        let scaled = ScaledRows::new(&normaliser, series, options.step);
        let usable = scaled.with_lags(0..scaled.rows()).map(|part| part.len()).sum();
        if usable < ROWS_MIN - LAG_MAX {
            return Err(DetectorError::Gaps {
                rows: series.rows(),
                usable,
                needed: ROWS_MIN - LAG_MAX,
            });
        }
        let priors = options.priors();
        let (mut forecaster, leaning) = match learning {
            Learning::OwnRows => personalise::fit(&scaled, priors, network, arm.paths())?,
            Learning::Nothing => {
                let nothing = if arm.paths().contains(&Path::Full) {
                    NormalEquations::new(schema.channels())
                } else {
                    NormalEquations::own_only(schema.channels())
                };
                (forecaster(&nothing, priors, network)?, [None; 2])
            }
        };
        if let Some(own) = arm.fixed_own(schema.channels()) {
            forecaster.own = own;
        }
        if let Some(network) = options.network {
            train::fit_network(&mut forecaster, &scaled, network)
                .map_err(|error| DetectorError::Network(Box::new(error)))?;
        }

        let floors = level_floors(schema, &normaliser, options.prior.as_ref(), series.rows() as u64);
        let mut residuals = vec![0.0; scaled.values.len()];
        let mut scores = vec![0.0; scaled.rows()];
        let heads = [Path::Own, Path::Full].map(|path| {
            if !arm.paths().contains(&path) {
                return Head::unused(schema.channels());
            }
            scaled.residuals(&forecaster, path, &mut residuals);
            let half_lives = options.half_lives_rows();
            let quantile = arm.base_quantile();
            let (head, own) = Head::fit(&residuals, schema.channels(), half_lives, quantile, &floors);
            scores
                .iter_mut()
                .zip(own)
                .for_each(|(score, other)| *score += other);
            head
        });
        let threshold = Threshold::calibrate(&scores, options.step, options.false_alarms_per_day);
        Ok(Self {
            schema: schema.clone(),
            options: options.clone(),
            normaliser,
            forecaster,
            heads,
            threshold,
            rows: series.rows() as u64,
            leaning,
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
        check_channels(&self.schema, series, Priors::default())?;
        let mut state = ScoringState::new(self.schema.channels());
        let mut scores = Vec::with_capacity(series.rows());
        for (index, row) in series.iter_rows().enumerate() {
            if let Some(times) = series.times_ms() {
                state.pass_time(times[index], self.options.step);
            }
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

    /// How strongly its forecasts lean on the prior.
    pub fn leaning(&self) -> Leaning {
        self.leaning
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
    /// the first [`WARM_UP_ROWS`], and while no channel counts.
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
    /// profile's channels are not looked at. When more than [`HOLD_ROWS_MAX`] steps passed since the last row, what was before says
    /// nothing about this row: there is no score until all lags are known again. A clock that stands still or goes back is
    /// ignored, and so is the time 0, which stands for an unknown one.
    pub fn push(&mut self, sample: &Sample) -> Scored {
        let warm = self.warm_up_rows() == 0;
        self.rows = self.rows.saturating_add(1);
        self.state.pass_time(sample.at_ms, self.detector.options.step);
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
    /// Time of the last row, in milliseconds; 0 = unknown.
    at_ms: u64,
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
            at_ms: 0,
            heads: [HeadState::new(channels), HeadState::new(channels)],
            row: vec![0.0; channels],
            lags: vec![0.0; channels * LAG_COUNT],
            residuals: vec![0.0; channels],
            z: vec![0.0; channels],
            contributions: vec![0.0; channels],
        }
    }

    /// Tells the time of the row that comes next.
    fn pass_time(&mut self, at_ms: u64, step: Duration) {
        let before = std::mem::replace(&mut self.at_ms, at_ms);
        if is_gap(before, at_ms, step) {
            self.hold.mute_all();
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
            let paths = detector.options.arm.paths();
            let share = 1.0 / paths.len() as f32;
            for path in paths {
                let (head, state) = (&detector.heads[path.index()], &mut self.heads[path.index()]);
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
                    *contribution += share * z.min(CONTRIBUTION_MAX);
                }
            }
            // Without a single channel that counts the detector is blind, which is not calm.
            if self.residuals.iter().any(|residual| !residual.is_nan()) {
                score = narrow(sum);
            }
        }
        self.ring.push(&self.row);
        score
    }
}

/// Whether so much time lies between two rows that the first says nothing about the second. The time 0 stands for an unknown one.
fn is_gap(before_ms: u64, at_ms: u64, step: Duration) -> bool {
    let passed = Duration::from_millis(at_ms.saturating_sub(before_ms));
    before_ms > 0 && passed > step.saturating_mul(HOLD_ROWS_MAX + 1)
}

/// A whole series, scaled, with missing values held: what fits and the gate work on. Rows whose lags lie beyond a gap in time teach
/// nothing and are not judged: rows of a day-only recording, or those around an incident that was cut out.
pub(crate) struct ScaledRows {
    channels: usize,
    pub(crate) values: Vec<f32>,
    /// Whether a value counts; empty when all do.
    silent: Vec<bool>,
    /// First rows after a gap in time.
    breaks: Vec<usize>,
}

impl ScaledRows {
    pub(crate) fn new(normaliser: &Normaliser, series: &Series, step: Duration) -> Self {
        let channels = normaliser.channels();
        let mut hold = Hold::new(channels);
        let mut values = vec![0.0; series.rows() * channels];
        let mut silent = Vec::new();
        let mut breaks = Vec::new();
        for (index, (raw, row)) in series
            .iter_rows()
            .zip(values.chunks_exact_mut(channels.max(1)))
            .enumerate()
        {
            if let Some([before, at]) = series
                .times_ms()
                .and_then(|t| t.get(index.checked_sub(1)?..=index))
                && is_gap(*before, *at, step)
            {
                hold.mute_all();
                breaks.push(index);
            }
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
            breaks,
        }
    }

    /// The parts of `range` whose lags are all known and belong to the row.
    pub(crate) fn with_lags(&self, range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let starts = std::iter::once(0).chain(self.breaks.iter().copied());
        let ends = self.breaks.iter().copied().chain([self.rows()]);
        starts
            .zip(ends)
            .map(move |(start, end)| (start + LAG_MAX).max(range.start)..end.min(range.end))
            .filter(|part| !part.is_empty())
    }

    pub(crate) fn rows(&self) -> usize {
        self.values.len() / self.channels.max(1)
    }

    pub(crate) fn channels(&self) -> usize {
        self.channels
    }

    /// Mean over the channels that count of `min(|x − x̂|, bound)`, for every row from `start`; 0 where none counts or the row has
    /// no lags.
    pub(crate) fn errors_from(
        &self,
        start: usize,
        forecaster: &Forecaster,
        path: Path,
        bound: f32,
    ) -> Vec<f64> {
        let channels = self.channels;
        let (mut lags, mut forecast) = (vec![0.0; channels * LAG_COUNT], vec![0.0; channels]);
        let mut errors = vec![0.0; self.rows().saturating_sub(start)];
        for row in self.with_lags(start..self.rows()).flatten() {
            lags_of(&self.values, channels, row, &mut lags);
            path.forecast(forecaster, &lags, &mut forecast);
            let at = row * channels;
            let (mut count, mut sum) = (0.0, 0.0);
            for (channel, forecast) in forecast.iter().enumerate() {
                if !self.silent.get(at + channel).copied().unwrap_or(false) {
                    count += 1.0;
                    sum += f64::from((self.values[at + channel] - forecast).abs().min(bound));
                }
            }
            errors[row - start] = if count > 0.0 { sum / count } else { 0.0 };
        }
        errors
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
    Normaliser::fit(schema, series, narrow(floor_factor(series, prior)))
}

/// The same as the arm wants it.
fn arm_scaler(schema: &FeatureSchema, series: &Series, options: &FitOptions) -> Normaliser {
    let factor = options.arm.floor_factor() * floor_factor(series, options.prior.is_some());
    Normaliser::fit(schema, series, narrow(factor)).with_clip(options.arm.clip())
}

fn floor_factor(series: &Series, prior: bool) -> f64 {
    if prior {
        1.0 + COLD_FLOOR * coldness(series.rows() as u64)
    } else {
        1.0
    }
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

/// Solves for both paths with the usual λ.
pub(crate) fn forecaster(
    equations: &NormalEquations,
    priors: Priors<'_>,
    network: Option<ResidualNetwork>,
) -> Result<Forecaster, Unsolvable> {
    let lean = Lean::on(priors, equations.usual_lambda());
    Ok(Forecaster::new(
        equations.channels(),
        equations.solve_own(lean)?,
        equations.solve_full(lean)?,
        network,
    ))
}

fn check_channels(schema: &FeatureSchema, series: &Series, priors: Priors<'_>) -> Result<(), DetectorError> {
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
    let leant_on = priors.own.map(OwnLagWeights::channels);
    let leant_on = [leant_on, priors.full.map(FullWeights::channels)];
    match leant_on.into_iter().flatten().find(|found| *found != expected) {
        Some(found) => Err(DetectorError::PriorChannels { expected, found }),
        None => Ok(()),
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

    /// Rows of two days, ten hours apart, whose levels differ: the jump between them is none.
    #[test]
    fn a_gap_in_time_is_no_row_to_learn_from() {
        let half = noisy(600);
        let lifted: Vec<f32> = half.iter().map(|value| value + 5.0).collect();
        let values = [half, lifted].concat();
        let series = |gap_ms: u64| {
            let mut series = Series::empty(2);
            for (row, values) in values.chunks_exact(2).enumerate() {
                let at_ms = 60_000 * (row as u64 + 1) + if row >= 600 { gap_ms } else { 0 };
                let values = values.to_vec();
                series.push(&Sample { at_ms, values }).unwrap();
            }
            series
        };
        let normaliser = Normaliser::fit(&schema(2), &series(0), 1.0);
        let scaled = |gap_ms| ScaledRows::new(&normaliser, &series(gap_ms), Duration::from_mins(1));
        let apart = scaled(36_000_000);
        assert_eq!(apart.with_lags(0..1200).collect::<Vec<_>>(), [10..600, 610..1200]);
        assert!(apart.with_lags(590..605).eq(std::iter::once(590..600)));
        assert!(scaled(0).with_lags(0..1200).eq(std::iter::once(10..1200)));
        // All gaps: nothing to learn from, and no model that says it has learnt.
        let torn = {
            let mut series = Series::empty(2);
            for (row, values) in values.chunks_exact(2).enumerate() {
                let at_ms = 60_000 * (row as u64 + 1 + 30 * (row as u64 / 8));
                let values = values.to_vec();
                series.push(&Sample { at_ms, values }).unwrap();
            }
            series
        };
        assert!(matches!(
            Detector::fit(&schema(2), &torn, &options()),
            Err(DetectorError::Gaps { usable: 0, .. })
        ));
        let fitted = |gap_ms| Detector::fit(&schema(2), &series(gap_ms), &options()).unwrap();
        let (joined, parted) = (fitted(0), fitted(36_000_000));
        assert!(
            parted.threshold().level() < 0.5 * joined.threshold().level(),
            "the jump is in one and not in the other: {} and {}",
            parted.threshold().level(),
            joined.threshold().level()
        );
        // What is judged on the tail leaves the rows across a gap out as well.
        let forecaster = &parted.forecaster;
        let errors = apart.errors_from(595, forecaster, Path::Own, 8.0);
        assert!(errors[5..15].iter().all(|error| *error == 0.0) && errors[15] > 0.0);
    }

    /// The same calm rows, fitted with a gap after every thirtieth: what is usual is what the rows that count say.
    #[test]
    fn rows_behind_gaps_do_not_lower_what_is_usual() {
        let values = noisy(6_000);
        let fitted = |every: u64| {
            let mut series = Series::empty(2);
            for (row, values) in values.chunks_exact(2).enumerate() {
                let at_ms = 60_000 * (row as u64 + 1 + 60 * (row as u64 / every));
                let values = values.to_vec();
                series.push(&Sample { at_ms, values }).unwrap();
            }
            Detector::fit(&schema(2), &series, &options()).unwrap()
        };
        let above = |detector: &Detector| {
            let level = detector.threshold().level();
            let scores = scores(detector, noisy(12_000).split_off(12_000));
            scores.iter().filter(|score| **score >= level).count()
        };
        let (whole, torn) = (fitted(u64::MAX), fitted(30));
        let (whole, torn) = (above(&whole), above(&torn));
        assert!(
            torn <= 3 * whole.max(20),
            "{torn} rows above with gaps, {whole} without, of 6000"
        );
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
        assert!(
            scores(&all_missing, noisy(40)).iter().all(|s| s.is_nan()),
            "blind, not calm"
        );
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
        assert!(close(coarse.half_lives_rows(), [1.0, 3.0]));
        assert!(close(options().half_lives_rows(), [3.0, 12.0]));
        let every = |step| FitOptions::new(Duration::from_secs(step)).half_lives_rows();
        assert!(
            close(every(300), [1.0, 3.0]),
            "minutes, but at least 1 and 3 rows"
        );
        assert!(close(every(15), [12.0, 48.0]), "minutes");
        assert!(close(every(1), [3.0, 12.0]), "seconds");
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

    /// `x_t = 0.9 x_{t−1} + noise` on each of two channels, one shift of the first at the end.
    fn wandering(rows: usize) -> Vec<f32> {
        let noise = noisy(rows);
        let mut values: Vec<f32> = vec![0.5, 0.5];
        for t in 1..rows {
            for c in 0..2 {
                values.push(0.9 * values[2 * (t - 1) + c] + 0.1 * noise[2 * t + c]);
            }
        }
        values
    }

    #[test]
    fn every_arm_fits_finds_a_shift_and_survives_its_file() {
        let mut test = wandering(300);
        test.iter_mut().skip(400).step_by(2).for_each(|v| *v += 0.6);
        let test = Series::new(2, test).unwrap();
        for arm in Arm::ALL {
            let options = FitOptions { arm, ..options() };
            let train = Series::new(2, wandering(2000)).unwrap();
            let detector = Detector::fit(&schema(2), &train, &options).unwrap();
            let scores = detector.score_series(&test).unwrap();
            let quiet = scores[20..200].iter().copied().fold(0.0, f32::max);
            let shifted = scores[200..230].iter().copied().fold(0.0, f32::max);
            assert!(shifted > 1.5 * quiet, "{arm}: {shifted} after {quiet}");
            let dir = tempfile::tempdir().unwrap();
            detector.save(dir.path(), "m").unwrap();
            let loaded = Detector::load(dir.path(), "m").unwrap();
            assert_eq!(loaded, detector, "{arm}");
        }
    }

    #[test]
    fn trained_network_changes_only_the_full_path() {
        let train = Series::new(2, wandering(600)).unwrap();
        let fit = |arm, network| {
            let options = FitOptions {
                arm,
                network,
                ..options()
            };
            Detector::fit(&schema(2), &train, &options)
                .unwrap()
                .score_series(&train)
                .unwrap()
        };
        let network = Some(NetworkOptions { steps: 20, seed: 1 });
        assert_eq!(fit(Arm::Own, network), fit(Arm::Own, None));
        assert_ne!(fit(Arm::OwnFull, network), fit(Arm::OwnFull, None));
        assert_eq!(fit(Arm::OwnFull, network), fit(Arm::OwnFull, network));
    }
}
