//! Row in, verdict out: one lane for each service, or one for the bare host.
//!
//! A lane gathers rows until its warm-up is full, then fits a detector off the async threads, and from then on scores
//! every row. It refits from time to time on its quiet rows. The federation's gate may put another detector in its
//! place at any time ([`LaneShared::replace`]).

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use theriac_heal::types::{Cause, CauseEvidence};
use theriac_model::causes::{CauseTracker, ChannelCause};
use theriac_model::detector::{Detector, DetectorError, FitOptions, Scored, Scorer};
use theriac_model::feature::FeatureSchema;
use theriac_model::global::{GlobalModel, OwnLagWeights};
use theriac_model::sample::Sample;
use theriac_model::series::Series;
use theriac_model::threshold::{AlarmState, Verdict};
use theriac_protocol::units::Timestamp;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::config::DetectionSettings;
use crate::history::History;
use crate::level::Levels;
use crate::state_dir::StateDir;
use crate::storage::StorageWatch;
use crate::update::system_time;

/// Rows that a new scorer is led through, so that it scores from its first row on.
const LEAD_IN_ROWS: usize = 60;
/// Normal rows after a restart of the service before its alarm counts as gone.
const CALM_ROWS: u32 = 5;
/// A resource channel of the service is to blame from this share of the largest contribution on.
const BLAME_SHARE: f32 = 0.5;
/// Least rises of a service's resources that count as trouble of the service: channel, in its unit, and as a share of
/// what is usual. A service that idles has spreads near nothing, so that one tick of its processor's clock (10 ms: 0.05
/// cores at an interval of 200 ms) is far outside them; what weighs nothing in an operator's eyes must not restart it.
/// Channels that no action follows from have none.
const MATERIAL: [(&str, f32, f32); 4] = [
    ("service_cpu", 0.25, 0.0),
    ("service_memory", 4.0 * 1024.0 * 1024.0, 0.05),
    ("service_threads", 4.0, 0.5),
    ("service_file_descriptors", 16.0, 0.5),
];
/// Smallest contribution that is named as a cause, in units of the channel's usual residual.
const CAUSE_MIN: f32 = 2.0;
/// Most causes named.
const CAUSES_MAX: usize = 5;
/// Contribution of a channel whose lasting shift just counts, and the bound of it: the scale of the model's own.
const SHIFT_WEIGHT: f32 = 10.0;
const SHIFT_WEIGHT_MAX: f32 = 50.0;

/// What lanes share with the federation and the page.
#[derive(Debug)]
pub struct LaneShared {
    /// The service's name, or `host`.
    pub name: String,
    /// What the columns mean.
    pub schema: FeatureSchema,
    /// How its detectors are fitted, by the configuration as it is now; a kept detector may have been fitted otherwise.
    pub fit: FitOptions,
    // Both locks are held for a copy at most, never across an await.
    history: Mutex<History>,
    model: Mutex<Model>,
}

#[derive(Debug, Default)]
struct Model {
    detector: Option<Arc<Detector>>,
    global: Option<Arc<GlobalModel>>,
}

impl LaneShared {
    /// A lane that has seen nothing, with rows `step` apart. It is made when the program starts: its blocks are counted from this moment, by the system's clock.
    pub fn new(
        name: &str,
        schema: FeatureSchema,
        rows_max: usize,
        settings: &DetectionSettings,
        step: Duration,
    ) -> Self {
        let fit = FitOptions {
            half_lives: settings.half_lives,
            prior: Some(OwnLagWeights::public_constant(schema.channels())),
            false_alarms_per_day: settings.false_alarms_per_day,
            arm: settings.arm.into(),
            ..FitOptions::new(step)
        };
        let history = Mutex::new(History::new(schema.channels(), rows_max, system_time().0));
        Self {
            name: name.to_owned(),
            schema,
            fit,
            history,
            model: Mutex::default(),
        }
    }

    /// The same, empty, as if it had been made at another time.
    #[must_use]
    pub fn started_at(mut self, started: Timestamp, rows_max: usize) -> Self {
        self.history = Mutex::new(History::new(self.schema.channels(), rows_max, started.0));
        self
    }

    /// The rows.
    pub fn history(&self) -> MutexGuard<'_, History> {
        // A row is pushed whole or not at all, so a poisoned lock still guards a sound ring.
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The detector in use.
    pub fn detector(&self) -> Option<Arc<Detector>> {
        self.model().detector.clone()
    }

    /// Puts a detector in use; the lane takes it up at its next row.
    pub fn replace(&self, detector: Arc<Detector>) {
        self.model().detector = Some(detector);
    }

    /// The accepted global model, which later refits lean on.
    pub fn global(&self) -> Option<Arc<GlobalModel>> {
        self.model().global.clone()
    }

    /// Makes later refits lean on `global`.
    pub fn set_global(&self, global: Arc<GlobalModel>) {
        self.model().global = Some(global);
    }

    fn model(&self) -> MutexGuard<'_, Model> {
        self.model.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What became of a row.
#[derive(Debug, Clone, PartialEq)]
pub struct RowVerdict {
    /// Its score; NaN while there is none.
    pub score: f32,
    /// The alarm's level then; NaN while there is none.
    pub threshold: f32,
    /// What that means.
    pub signal: Signal,
}

/// What a row means for the incident machine.
#[derive(Debug, Clone, PartialEq)]
pub enum Signal {
    /// Nothing.
    Quiet,
    /// The alarm is on (told again for each row).
    Anomaly {
        /// Whether it began with this row.
        raised: bool,
        /// Whose trouble it is.
        blame: Blame,
        /// Leading channels, greatest first.
        causes: Vec<Cause>,
    },
    /// The alarm is over.
    Cleared,
}

/// Whose trouble an anomaly is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blame {
    /// The service's own channels lead.
    Service,
    /// The host as a whole; nothing that restarting a service would mend.
    Host,
}

/// One lane: its rows, its detector and its alarm.
#[derive(Debug)]
pub struct Lane {
    shared: Arc<LaneShared>,
    settings: DetectionSettings,
    step: Duration,
    running: Option<Running>,
    levels: Option<Levels>,
    fit: Option<Fit>,
    fitted: Option<Instant>,
    alarm_open: bool,
    calm: u32,
}

/// A fit under way.
#[derive(Debug)]
struct Fit {
    /// What it leans on.
    global: Option<Arc<GlobalModel>>,
    result: JoinHandle<Result<Arc<Detector>, DetectorError>>,
}

#[derive(Debug)]
struct Running {
    detector: Arc<Detector>,
    scorer: Scorer,
    alarm: AlarmState,
    causes: CauseTracker,
    /// The latest row in robust spreads from the history's median.
    deviations: Vec<f32>,
    /// Whether a person was asked about the alarm that is on.
    asked_new_normal: bool,
}

/// How a fit ended.
#[derive(Debug)]
pub enum FitEvent {
    /// A detector is in use.
    Fitted(Arc<Detector>),
    /// There is none, and why; the former one stays.
    Failed(String),
}

impl Lane {
    /// A lane over `shared`, whose rows are `step` apart.
    pub fn new(shared: Arc<LaneShared>, settings: DetectionSettings, step: Duration) -> Self {
        Self {
            shared,
            settings,
            step,
            running: None,
            levels: None,
            fit: None,
            fitted: None,
            alarm_open: false,
            calm: 0,
        }
    }

    /// What it shares.
    pub fn shared(&self) -> &Arc<LaneShared> {
        &self.shared
    }

    /// Takes a row. `disturbed` says that an incident of the service is open: such rows are no example of normal.
    pub fn push(&mut self, sample: Sample, disturbed: bool) -> RowVerdict {
        self.take_up_detector();
        // A detector of the last run comes without levels: they are found as soon as there are rows.
        if self.levels.is_none()
            && self.running.is_some()
            && self.shared.history().quiet_len() >= self.settings.warm_up_rows
        {
            self.levels = self.fit_levels();
        }
        let Some(running) = &mut self.running else {
            self.shared.history().push(sample, !disturbed);
            return RowVerdict {
                score: f32::NAN,
                threshold: f32::NAN,
                signal: Signal::Quiet,
            };
        };
        let Scored {
            score,
            mut contributions,
        } = running.scorer.push(&sample);
        let factor = self.settings.threshold_factor;
        // A lasting shift is as bad as a score that many times the threshold.
        let shift = self
            .levels
            .as_mut()
            .map_or(0.0, |levels| shift(levels, &sample, &mut contributions));
        let score = if shift >= 1.0 || !score.is_nan() {
            score.max(shift * running.alarm.level() * factor)
        } else {
            score
        };
        let reached = score / factor >= running.alarm.level();
        let verdict = running.alarm.push(score / factor);
        running
            .detector
            .deviations(&sample.values, &mut running.deviations);
        running.causes.push(
            sample.at_ms,
            &contributions,
            &running.deviations,
            reached || verdict.alarmed(),
        );
        let threshold = running.alarm.level() * factor;
        if running.alarm.new_normal() && !running.asked_new_normal {
            running.asked_new_normal = true;
            let lane = &self.shared.name;
            tracing::warn!(
                lane,
                hint = "if this is how it should be, say so: theriac-edge incidents accept ID",
                "an alarm has lasted for 24 hours: a new normal?"
            );
        }
        running.asked_new_normal &= verdict.alarmed();
        let signal = if verdict.alarmed() {
            self.alarm_open = true;
            self.calm = 0;
            let ranked = running.causes.ranked();
            let (blame, causes) = blame(&self.shared, &sample, &contributions, &ranked);
            Signal::Anomaly {
                raised: verdict == Verdict::Raised,
                blame,
                causes,
            }
        } else {
            self.calm = if score.is_nan() {
                0
            } else {
                self.calm.saturating_add(1)
            };
            if self.alarm_open && (verdict == Verdict::Cleared || self.calm >= CALM_ROWS) {
                self.alarm_open = false;
                Signal::Cleared
            } else {
                Signal::Quiet
            }
        };
        self.shared.history().push(sample, !disturbed && !self.alarm_open);
        RowVerdict {
            score,
            threshold,
            signal,
        }
    }

    /// The service has a new process: what the old one did says nothing about it. Scoring begins anew; the alarm is told
    /// as over only after some normal rows.
    pub fn restarted(&mut self) {
        if let Some(running) = &mut self.running {
            running.scorer = Scorer::new(Arc::clone(&running.detector));
            running.causes = CauseTracker::new(running.deviations.len());
            running.alarm = AlarmState::new(running.detector.threshold())
                .with_step(self.step)
                .succeed(&running.alarm);
            self.calm = 0;
        }
        if let Some(levels) = &mut self.levels {
            levels.restarted();
        }
    }

    /// Begins a fit when one is due, and hands over the result of one that has ended. Call once a row.
    pub async fn tend(&mut self) -> Option<FitEvent> {
        if let Some(fit) = &mut self.fit {
            if !fit.result.is_finished() {
                return None;
            }
            let ended = (&mut fit.result).await;
            let leant_on = self.fit.take().and_then(|fit| fit.global);
            return match ended {
                Ok(Ok(detector)) => self.fitted(detector, leant_on.as_ref()),
                Ok(Err(error)) => Some(FitEvent::Failed(error.to_string())),
                Err(join) => Some(FitEvent::Failed(join.to_string())),
            };
        }
        if self.fit_due() {
            self.fitted = Some(Instant::now());
            let shared = Arc::clone(&self.shared);
            let (global, rows) = (self.shared.global(), self.fit_rows());
            let lean_on = global.clone();
            let result = tokio::task::spawn_blocking(move || fit(&shared, lean_on.as_deref(), rows));
            self.fit = Some(Fit { global, result });
        }
        None
    }

    /// Puts a fitted detector in use, unless the gate has accepted a newer model meanwhile: then a new fit is due.
    fn fitted(&mut self, detector: Arc<Detector>, leant_on: Option<&Arc<GlobalModel>>) -> Option<FitEvent> {
        let global = self.shared.global();
        let same = match (&global, leant_on) {
            (Some(now), Some(then)) => Arc::ptr_eq(now, then),
            (now, then) => now.is_none() && then.is_none(),
        };
        if !same {
            self.fitted = None;
            return None;
        }
        self.shared.replace(Arc::clone(&detector));
        self.levels = self.fit_levels();
        Some(FitEvent::Fitted(detector))
    }

    fn fit_rows(&self) -> usize {
        self.settings.fit_rows.max(self.settings.warm_up_rows)
    }

    fn fit_levels(&self) -> Option<Levels> {
        let half_life_rows = self.settings.half_lives[0].as_secs_f32() / self.step.as_secs_f32();
        let quiet = self.shared.history().quiet(self.fit_rows());
        Levels::fit(&self.shared.schema, &quiet, half_life_rows)
    }

    /// Whether a detector scores the rows.
    pub fn watching(&self) -> bool {
        self.running.is_some()
    }

    fn fit_due(&self) -> bool {
        if self.alarm_open {
            return false;
        }
        let wait = if self.shared.detector().is_some() {
            self.settings.refit
        } else {
            self.step * 10
        };
        // A detector that was loaded from disk is refitted after the usual time, not at once.
        let waited = self.fitted.is_none_or(|fitted| fitted.elapsed() >= wait);
        waited && self.shared.history().quiet_len() >= self.settings.warm_up_rows
    }

    fn take_up_detector(&mut self) {
        let Some(detector) = self.shared.detector() else {
            return;
        };
        if self
            .running
            .as_ref()
            .is_some_and(|running| Arc::ptr_eq(&running.detector, &detector))
        {
            return;
        }
        let mut scorer = Scorer::new(Arc::clone(&detector));
        let tail = self.shared.history().tail(LEAD_IN_ROWS);
        for row in tail.iter_rows() {
            scorer.push(&Sample {
                at_ms: 0,
                values: row.to_vec(),
            });
        }
        let channels = detector.schema().channels();
        let mut alarm = AlarmState::new(detector.threshold()).with_step(self.step);
        if let Some(former) = &self.running {
            alarm = alarm.succeed(&former.alarm);
        }
        let as_configured = same_settings(detector.options(), &self.shared.fit);
        self.running = Some(Running {
            detector,
            scorer,
            alarm,
            causes: CauseTracker::new(channels),
            deviations: vec![0.0; channels],
            asked_new_normal: false,
        });
        // One that was fitted by other settings is used as it is and replaced as soon as there are rows.
        if as_configured {
            self.fitted.get_or_insert_with(Instant::now);
        }
    }
}

/// Whether a detector was fitted as the configuration says now, priors aside.
fn same_settings(fitted: &FitOptions, configured: &FitOptions) -> bool {
    fitted.half_lives == configured.half_lives
        && fitted.arm == configured.arm
        && fitted.false_alarms_per_day.to_bits() == configured.false_alarms_per_day.to_bits()
}

fn fit(
    shared: &LaneShared,
    global: Option<&GlobalModel>,
    rows: usize,
) -> Result<Arc<Detector>, DetectorError> {
    let series: Series = shared.history().quiet(rows);
    let former = shared.detector();
    let fitted = match (&former, global) {
        (Some(former), Some(global)) => former.refit_with_global(&series, global, &shared.fit)?,
        // It leans on a model that this run does not hold, since a later one was published and did not pass: it goes on doing so.
        (Some(former), None) if former.provenance().model_version > 0 => {
            former.refit(&series, &shared.fit)?
        }
        _ => Detector::fit(&shared.schema, &series, &shared.fit)?,
    };
    Ok(Arc::new(fitted))
}

/// The largest shift of any watched channel. Shifted channels lead the causes.
fn shift(levels: &mut Levels, sample: &Sample, contributions: &mut [f32]) -> f32 {
    let mut most = 0.0_f32;
    for (channel, ratio) in levels.push(sample) {
        most = most.max(ratio);
        if ratio >= 1.0 {
            contributions[channel] = contributions[channel].max((SHIFT_WEIGHT * ratio).min(SHIFT_WEIGHT_MAX));
        }
    }
    most
}

/// Where a lane's detector is kept.
pub fn detector_name(lane: &str) -> String {
    format!("detector-{lane}")
}

/// Where the second copy of it is kept, written first: a crash while one is written leaves the other whole.
fn backup_name(lane: &str) -> String {
    format!("backup-{lane}")
}

/// Keeps a detector for the next run, off the async threads; not on a disk that cannot be written.
pub(crate) fn keep_detector(dir: &StateDir, lane: &str, storage: &StorageWatch, detector: Arc<Detector>) {
    if !storage.is_ok() {
        return;
    }
    let (dir, storage) = (dir.model(), storage.clone());
    let names = [backup_name(lane), detector_name(lane)];
    tokio::task::spawn_blocking(move || {
        for name in names {
            if let Err(error) = detector.save(&dir, &name) {
                return storage.failed_io("keep a model", &error, false);
            }
        }
    });
}

/// Loads the detector of an earlier run, if there is a sound one of the same profile.
pub fn load_detector(dir: &Path, shared: &LaneShared) -> Option<Arc<Detector>> {
    [detector_name(&shared.name), backup_name(&shared.name)]
        .into_iter()
        .filter(|name| dir.join(format!("{name}.json")).exists())
        .find_map(|name| load_one(dir, &name, shared))
}

fn load_one(dir: &Path, name: &str, shared: &LaneShared) -> Option<Arc<Detector>> {
    match Detector::load(dir, name) {
        // Rows of another pace are all gaps to it, and its lags mean other times.
        Ok(detector) if detector.options().step != shared.fit.step => {
            let (found, now) = (detector.options().step, shared.fit.step);
            tracing::warn!(
                name,
                ?found,
                ?now,
                "the kept model is for rows of another interval and is not used: a new one is fitted after the warm-up"
            );
            None
        }
        Ok(detector) if detector.schema().digest() == shared.schema.digest() => Some(Arc::new(detector)),
        Ok(detector) => {
            let found = &detector.schema().name;
            tracing::warn!(
                name,
                found,
                "the kept model is for another feature profile and is not used"
            );
            None
        }
        Err(error) => {
            tracing::warn!(name, %error, "the kept model cannot be read and is not used");
            None
        }
    }
}

/// Whose trouble it is and which channels say so.
///
/// A hog or leak of the service moves the host's channels too, often more strongly; so a *resource* channel of the
/// service leads as soon as it has half the weight of the largest. Probe latency is a symptom that a busy host causes
/// as well: it leads only when nothing else does. A resource that rose by less than [`MATERIAL`] neither leads nor is
/// told as risen, so that no action follows from it.
///
/// Which causes are named goes by the whole incident (`ranked`), their order by this row, since that is what decisions
/// go by.
fn blame(
    shared: &LaneShared,
    sample: &Sample,
    contributions: &[f32],
    ranked: &[ChannelCause],
) -> (Blame, Vec<Cause>) {
    let features = &shared.schema.features;
    let weight = |wanted: &dyn Fn(&str) -> bool| {
        features
            .iter()
            .zip(contributions)
            .filter(|(feature, _)| wanted(&feature.name))
            .fold(0.0_f32, |most, (_, weight)| most.max(*weight))
    };
    let symptom = |name: &str| name.starts_with("service_probe");
    let own = |name: &str| name.starts_with("service_");
    let usual = usual_values(shared);
    let rise = |name: &str| {
        let channel = shared.schema.position(name)?;
        rising(name, sample.values[channel], *usual.get(channel)?)
    };
    let resources = weight(&|name| own(name) && !symptom(name) && rise(name) != Some(Rise::Slight));
    let symptoms = weight(&symptom);
    let host = weight(&|name| !own(name));
    let blame =
        if resources >= (BLAME_SHARE * host.max(symptoms)).max(CAUSE_MIN) || symptoms > host.max(CAUSE_MIN) {
            Blame::Service
        } else {
            Blame::Host
        };
    let mut causes: Vec<Cause> = features
        .iter()
        .zip(contributions)
        .enumerate()
        .filter(|(_, (feature, weight))| {
            **weight >= CAUSE_MIN && (blame == Blame::Host || own(&feature.name))
        })
        .map(|(channel, (feature, weight))| Cause {
            channel: feature.name.clone(),
            contribution: *weight,
            rising: match rise(&feature.name) {
                Some(Rise::Material) => Some(true),
                Some(Rise::Fall) => Some(false),
                Some(Rise::Slight) | None => None,
            },
            evidence: ranked.iter().find(|cause| cause.channel == channel).map(evidence),
        })
        .collect();
    let strength = |cause: &Cause| cause.evidence.map_or(0.0, |evidence| evidence.strength);
    causes.sort_by(|a, b| strength(b).total_cmp(&strength(a)));
    causes.truncate(CAUSES_MAX);
    causes.sort_by(|a, b| {
        b.contribution
            .total_cmp(&a.contribution)
            .then_with(|| a.channel.cmp(&b.channel))
    });
    (blame, causes)
}

fn evidence(cause: &ChannelCause) -> CauseEvidence {
    CauseEvidence {
        strength: cause.strength,
        residual_share: cause.residual_share,
        change: cause.change,
        since_unix_ms: cause.since,
    }
}

/// Medians of the latest quiet rows.
fn usual_values(shared: &LaneShared) -> Vec<f32> {
    let series = shared.history().quiet(120);
    (0..series.channels())
        .map(|channel| {
            let mut column: Vec<f32> = series
                .iter_rows()
                .map(|row| row[channel])
                .filter(|v| v.is_finite())
                .collect();
            column.sort_by(f32::total_cmp);
            column.get(column.len() / 2).copied().unwrap_or(f32::NAN)
        })
        .collect()
}

/// Where a channel stands against what is usual.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rise {
    /// Above it, and by enough to matter.
    Material,
    /// Above it by less than [`MATERIAL`].
    Slight,
    /// Not above it.
    Fall,
}

fn rising(name: &str, value: f32, usual: f32) -> Option<Rise> {
    if !value.is_finite() || !usual.is_finite() {
        return None;
    }
    if value <= usual {
        return Some(Rise::Fall);
    }
    let least = MATERIAL
        .iter()
        .find(|(channel, ..)| *channel == name)
        .map_or(0.0, |(_, least, share)| least.max(share * usual));
    Some(if value - usual >= least {
        Rise::Material
    } else {
        Rise::Slight
    })
}

#[cfg(test)]
mod tests {
    use theriac_model::detector::WARM_UP_ROWS;

    use super::*;

    const STEP: Duration = Duration::from_secs(1);

    /// A calm host with a little seeded flicker.
    fn sample(shared: &LaneShared, row: u32, edit: impl FnOnce(&mut dyn FnMut(&str, f32))) -> Sample {
        let mut noise = u64::from(row).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut flicker = || {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            (noise >> 40) as f32 / (1_u32 << 24) as f32
        };
        let mut values: Vec<f32> = shared
            .schema
            .features
            .iter()
            .map(|feature| match feature.name.as_str() {
                "service_memory" => 50e6 * (1.0 + 0.01 * flicker()),
                "service_probe_latency" => 2.0 + flicker(),
                "service_threads" => 4.0,
                "service_file_descriptors" => 20.0,
                "host_swap_used" | "service_probe_errors" => 0.0,
                name if name.contains("disk") || name.contains("network") => 1000.0 * (1.0 + flicker()),
                _ => 0.2 + 0.05 * flicker(),
            })
            .collect();
        edit(&mut |name, value| values[shared.schema.position(name).unwrap()] = value);
        Sample {
            at_ms: u64::from(row) * 1000,
            values,
        }
    }

    fn settings() -> DetectionSettings {
        DetectionSettings {
            warm_up_rows: 120,
            threshold_factor: 2.0,
            ..DetectionSettings::default()
        }
    }

    fn lane() -> Lane {
        let shared = Arc::new(LaneShared::new(
            "kv",
            FeatureSchema::host_service_v1(),
            2000,
            &settings(),
            STEP,
        ));
        Lane::new(shared, settings(), STEP)
    }

    async fn warm(rows: u32) -> Lane {
        let mut lane = lane();
        for row in 0..rows {
            let sample = sample(lane.shared(), row, |_| {});
            lane.push(sample, false);
        }
        fit(&mut lane).await;
        lane
    }

    async fn fit(lane: &mut Lane) {
        let deadline = Instant::now() + Duration::from_mins(1);
        loop {
            match lane.tend().await {
                Some(FitEvent::Fitted(_)) => return,
                Some(FitEvent::Failed(reason)) => panic!("{reason}"),
                None => tokio::task::yield_now().await,
            }
            assert!(Instant::now() < deadline, "no fit within 20 s");
        }
    }

    #[tokio::test]
    async fn nothing_is_scored_before_the_warm_up_and_everything_after() {
        let mut lane = lane();
        for row in 0..119 {
            let sample = sample(lane.shared(), row, |_| {});
            assert!(lane.push(sample, false).score.is_nan());
            assert!(lane.tend().await.is_none());
        }
        assert!(lane.fit.is_none() && !lane.watching());
        let mut lane = warm(120).await;
        let next = sample(lane.shared(), 120, |_| {});
        let verdict = lane.push(next, false);
        assert!(lane.watching() && verdict.score.is_finite() && verdict.threshold > 0.0);
        assert_eq!(verdict.signal, Signal::Quiet);
    }

    #[tokio::test]
    async fn a_leak_is_blamed_on_the_service_and_names_memory() {
        let mut lane = warm(400).await;
        let mut found = None;
        for row in 400..430_u32 {
            let leaked = 50e6 + 5e6 * (row - 399) as f32;
            let next = sample(lane.shared(), row, |set| set("service_memory", leaked));
            if let Signal::Anomaly { blame, causes, .. } = lane.push(next, false).signal {
                found = Some((row, blame, causes));
                break;
            }
        }
        let (row, blame, causes) = found.expect("the leak was not found within 30 rows");
        assert!(row < 425, "found at row {row}");
        assert_eq!(blame, Blame::Service);
        assert_eq!(
            (causes[0].channel.as_str(), causes[0].rising),
            ("service_memory", Some(true))
        );
        assert!(causes.iter().all(|cause| cause.channel.starts_with("service_")));
        let evidence = causes[0].evidence.unwrap();
        assert!(evidence.change > 1.0 && evidence.strength > 1.0, "{evidence:?}");
        assert!((0.0..=1.0).contains(&evidence.residual_share));
    }

    #[tokio::test]
    async fn a_hog_moves_the_host_too_and_is_still_blamed_on_the_service() {
        let mut lane = warm(400).await;
        let mut blamed = None;
        for row in 400..420 {
            let next = sample(lane.shared(), row, |set| {
                set("service_cpu", 1.0);
                set("host_cpu_used", 0.95);
                set("host_load_per_core", 0.9);
            });
            if let Signal::Anomaly { blame, causes, .. } = lane.push(next, false).signal {
                blamed = Some((blame, causes[0].channel.clone()));
                break;
            }
        }
        assert_eq!(blamed, Some((Blame::Service, "service_cpu".to_owned())));
    }

    #[tokio::test]
    async fn a_busy_host_is_not_blamed_on_the_service() {
        let mut lane = warm(400).await;
        let mut blamed = None;
        for row in 400..420 {
            let next = sample(lane.shared(), row, |set| {
                set("host_cpu_used", 0.98);
                set("host_load_per_core", 2.0);
                set("service_probe_latency", 6.0);
            });
            if let Signal::Anomaly { blame, .. } = lane.push(next, false).signal {
                blamed = Some(blame);
                break;
            }
        }
        assert_eq!(blamed, Some(Blame::Host));
    }

    #[tokio::test]
    async fn an_idle_service_is_not_to_blame_for_a_tick_of_its_clock_nor_for_little_memory() {
        let mut lane = lane();
        let idle = |shared: &Arc<LaneShared>, row: u32, cpu: f32, memory: f32| {
            sample(shared, row, |set| {
                set("service_cpu", cpu);
                set("service_memory", memory);
            })
        };
        for row in 0..200 {
            let next = idle(lane.shared(), row, 0.0, 5e6);
            lane.push(next, false);
        }
        fit(&mut lane).await;
        // One tick of 10 ms in 200 ms, and three pages of memory.
        let mut alarms = 0;
        for row in 200..260 {
            let next = idle(lane.shared(), row, 0.05, 5e6 + 12_288.0);
            if let Signal::Anomaly { blame, causes, .. } = lane.push(next, false).signal {
                alarms += 1;
                assert_eq!(blame, Blame::Host, "row {row}: {causes:?}");
                assert!(
                    causes
                        .iter()
                        .all(|cause| !cause.channel.starts_with("service_") || cause.rising != Some(true)),
                    "row {row}: {causes:?}"
                );
            }
        }
        assert!(
            alarms > 0,
            "nothing was unusual to the detector, so this shows nothing"
        );
    }

    #[test]
    fn the_least_rise_is_absolute_and_a_share_of_what_is_usual() {
        let mib = 1024.0 * 1024.0;
        for (name, value, usual, expected) in [
            ("service_cpu", 0.24, 0.0, Rise::Slight),
            ("service_cpu", 0.25, 0.0, Rise::Material),
            ("service_memory", 13.0 * mib, 10.0 * mib, Rise::Slight),
            ("service_memory", 14.5 * mib, 10.0 * mib, Rise::Material),
            ("service_memory", 1_040.0 * mib, 1_000.0 * mib, Rise::Slight),
            ("service_threads", 7.0, 4.0, Rise::Slight),
            ("service_threads", 8.0, 4.0, Rise::Material),
            ("service_file_descriptors", 30.0, 20.0, Rise::Slight),
            ("service_cpu", 0.1, 0.2, Rise::Fall),
            ("host_cpu_used", 0.21, 0.2, Rise::Material),
        ] {
            assert_eq!(
                rising(name, value, usual),
                Some(expected),
                "{name} {value} {usual}"
            );
        }
        assert_eq!(rising("service_cpu", f32::NAN, 0.0), None);
    }

    #[tokio::test]
    async fn alarm_rows_are_no_example_of_normal_and_a_restart_clears_only_after_calm() {
        let mut lane = warm(400).await;
        let before = lane.shared().history().quiet_len();
        for row in 400..420 {
            let next = sample(lane.shared(), row, |set| set("service_cpu", 1.0));
            lane.push(next, false);
        }
        let learnt = lane.shared().history().quiet_len() - before;
        assert!(learnt <= 3, "{learnt} rows of the hog count as normal");
        lane.restarted();
        let mut cleared = None;
        for row in 420..450 {
            let next = sample(lane.shared(), row, |_| {});
            if lane.push(next, false).signal == Signal::Cleared {
                cleared = Some(row);
                break;
            }
        }
        let first_scored = 420 + u32::try_from(WARM_UP_ROWS).unwrap();
        assert_eq!(
            cleared,
            Some(first_scored + CALM_ROWS - 1),
            "the new process's ring fills, then some normal rows"
        );
    }

    #[tokio::test]
    async fn calm_rows_raise_few_alarms() {
        let mut lane = warm(400).await;
        let mut raised = 0;
        for row in 400..1400 {
            let next = sample(lane.shared(), row, |_| {});
            raised += u32::from(matches!(
                lane.push(next, false).signal,
                Signal::Anomaly { raised: true, .. }
            ));
        }
        assert!(raised <= 1, "{raised} alarms in 1000 calm rows");
    }

    #[tokio::test]
    async fn a_kept_detector_scores_in_the_next_run_without_a_new_warm_up() {
        let dir = tempfile::tempdir().unwrap();
        let lane = warm(200).await;
        let detector = lane.shared().detector().unwrap();
        detector.save(dir.path(), &detector_name("kv")).unwrap();
        let shared = Arc::new(LaneShared::new(
            "kv",
            FeatureSchema::host_service_v1(),
            2000,
            &settings(),
            STEP,
        ));
        shared.replace(load_detector(dir.path(), &shared).unwrap());
        let mut lane = Lane::new(Arc::clone(&shared), settings(), STEP);
        for row in 0..30_u32 {
            let next = sample(&shared, row, |_| {});
            let verdict = lane.push(next, false);
            assert_eq!(
                verdict.score.is_finite(),
                row as usize >= WARM_UP_ROWS,
                "row {row}"
            );
        }
        let file = dir.path().join("detector-kv.safetensors");
        let bytes = std::fs::read(&file).unwrap();
        std::fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
        assert!(
            load_detector(dir.path(), &shared).is_none(),
            "a truncated model was taken"
        );
        detector.save(dir.path(), &backup_name("kv")).unwrap();
        assert!(
            load_detector(dir.path(), &shared).is_some(),
            "the second copy was not taken"
        );
    }
}
