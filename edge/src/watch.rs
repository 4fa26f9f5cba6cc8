//! The sample loop: every interval one row for each lane, scored, and told to the incident machine.
//!
//! An alarm that lasts half an hour while the service answers and nothing else is wrong is taken for a new normal: the
//! alarm is told as over, the next rows are gathered unscored, and a new model is fitted on them. A model of a short
//! history is doubted sooner, as long as no resource of the service rose by what counts. A person who says so
//! (`incidents accept`) has the same done at once.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use theriac_heal::incident::Input;
use theriac_model::detector::Detector;
use theriac_model::risk::{Risk, RiskError};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use crate::HOST;
use crate::config::{DetectionSettings, SamplingSettings};
use crate::detect::{Blame, FitEvent, Lane, LaneShared, RowVerdict, Signal, keep_detector};
use crate::memory::MemoryCourse;
use crate::metrics::{Metrics, at_horizon, kind, service as label};
use crate::respond::NewNormals;
use crate::risk::{HostRisk, RiskModel, ServiceRisk};
use crate::sample::{HostSampler, ProbeWindow, ServiceReading, ServiceSampler, row};
use crate::service::ServiceShared;
use crate::state_dir::StateDir;
use crate::status::{Board, Phase};
use crate::storage::StorageWatch;
use crate::supervise::Shutdown;

/// Time that an alarm must have lasted, with a sound service, to be taken for a new normal. Long enough for a person
/// who was told of the incident to look; short enough that the models do not grow old behind it.
const NEW_NORMAL_AFTER: Duration = Duration::from_mins(30);
/// The same for an alarm that no risen resource of the service confirms, by a model that saw little: this many times the
/// history it was fitted on, but at least [`YOUNG_MODEL_AFTER_MIN`]. An alarm so much longer than all that the model
/// knows says more about the model, and its rows would never be learnt.
const YOUNG_MODEL_TIMES: u32 = 10;
const YOUNG_MODEL_AFTER_MIN: Duration = Duration::from_mins(5);

/// What the loop works with.
#[derive(Debug, Clone)]
pub struct Watch {
    /// Checked `[sampling]`.
    pub sampling: SamplingSettings,
    /// Checked `[detection]`.
    pub detection: DetectionSettings,
    /// Judges how likely failures are.
    pub risk: RiskModel,
    /// One lane for each service, or one for the bare host.
    pub lanes: Vec<(Arc<LaneShared>, Option<Arc<ServiceShared>>)>,
    /// Where detectors are kept.
    pub dir: StateDir,
    /// To the incident machine.
    pub events: mpsc::Sender<Input>,
    /// Told of failed writes.
    pub storage: StorageWatch,
    /// The page's picture.
    pub board: Board,
    /// The counters.
    pub metrics: Arc<Metrics>,
    /// Whose level a person took for normal.
    pub new_normals: NewNormals,
}

/// One lane in the hands of the loop.
struct Row {
    lane: Lane,
    service: Option<Arc<ServiceShared>>,
    sampler: ServiceSampler,
    pid: Option<u32>,
    blames_host: bool,
    untold: Untold,
    normal: NewNormal,
    latest: Option<RowVerdict>,
    risk: Option<ServiceRisk>,
    memory: Option<MemoryCourse>,
}

impl Row {
    /// Rows gathered for the model to come, and of how many: the usual warm-up's, or those of a new normal from when it was taken for one.
    fn gathered(&self, warm_up_rows: usize) -> (usize, usize) {
        match self.normal.learning {
            Some(left) => (self.normal.wanted.saturating_sub(left), self.normal.wanted),
            None => (self.lane.shared().history().len(), warm_up_rows),
        }
    }
}

/// What one tick saw of the host, with the time since the last one and since the start.
struct Tick {
    at_ms: u64,
    now_s: f64,
    elapsed: Duration,
    host: crate::sample::HostReading,
}

/// Samples until the signal to stop.
///
/// # Errors
/// [`RiskError::Edges`] for horizons that do not ascend, which the configuration rules out.
pub async fn run(watch: Watch, mut shutdown: Shutdown) -> Result<(), RiskError> {
    let interval = watch.sampling.interval;
    let space: PathBuf = watch
        .sampling
        .disk
        .clone()
        .unwrap_or_else(|| watch.dir.root().to_owned());
    let mut host = HostSampler::new(&space, watch.sampling.interfaces.clone());
    let mut host_risk = HostRisk::new(&watch.risk)?;
    let mut rows = watch.rows()?;
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let started = Instant::now();
    let mut before = started;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shutdown.wait() => return Ok(()),
        }
        let begun = Instant::now();
        let elapsed = begun.duration_since(before);
        before = begun;
        if elapsed > interval * 2 {
            watch.metrics.samples_late.inc();
        }
        let tick = Tick {
            at_ms: unix_ms(),
            now_s: begun.duration_since(started).as_secs_f64(),
            elapsed,
            host: host.read(elapsed),
        };
        let (host_memory, risks) = host_risk.tick(tick.now_s, &tick.host, host.disk_used());
        watch.show_risk(HOST, &risks);
        watch
            .board
            .update(|status| status.risk = risks.iter().map(Into::into).collect());
        let accepted = watch.new_normals.take();
        for row in &mut rows {
            watch.accept_new_normal(row, &accepted);
            let reading = watch.one(row, &tick).await;
            if let (Some(risk), Some(service)) = (&mut row.risk, &row.service) {
                let risks = risk.tick(tick.now_s, reading.as_ref(), &host_memory);
                watch.show_risk(&service.name, &risks);
                service.note_risks(risks);
            }
        }
        watch.show(&rows);
        watch.metrics.sample_seconds.inc_by(begun.elapsed().as_secs_f64());
    }
}

impl Watch {
    fn rows(&self) -> Result<Vec<Row>, RiskError> {
        let row = |(shared, service): &(Arc<LaneShared>, Option<Arc<ServiceShared>>)| {
            let risk = service
                .as_ref()
                .map(|service| ServiceRisk::new(&self.risk, &service.config));
            Ok(Row {
                lane: Lane::new(Arc::clone(shared), self.detection.clone(), self.sampling.interval),
                service: service.clone(),
                sampler: ServiceSampler::default(),
                pid: None,
                blames_host: false,
                untold: Untold::default(),
                normal: NewNormal::default(),
                latest: None,
                risk: risk.transpose()?,
                memory: service
                    .as_ref()
                    .map(|service| MemoryCourse::new(service.config.memory_limit, self.sampling.interval))
                    .transpose()?,
            })
        };
        self.lanes.iter().map(row).collect()
    }

    async fn one(&self, state: &mut Row, tick: &Tick) -> Option<ServiceReading> {
        let pid = state.service.as_ref().and_then(|service| service.pid());
        if state.pid.is_some() && pid.is_some() && pid != state.pid {
            state.lane.restarted();
            if let Some(risk) = &mut state.risk {
                risk.restarted();
            }
            if let Some(memory) = &mut state.memory {
                memory.restarted();
            }
        }
        state.pid = pid.or(state.pid);
        let reading = state.sampler.read(pid, tick.elapsed);
        if let (Some(memory), Some(reading)) = (&mut state.memory, &reading) {
            memory.push(tick.now_s, reading.memory_bytes, tick.host.memory_used);
        }
        let probes = state
            .service
            .as_ref()
            .map_or_else(ProbeWindow::default, |service| service.take_probes());
        let sample = row(
            &state.lane.shared().schema,
            tick.at_ms,
            &tick.host,
            reading.as_ref(),
            &probes,
        );
        self.metrics.samples.inc();
        if state.service.is_some() {
            let missing = sample.values.iter().filter(|value| !value.is_finite()).count();
            self.metrics.values_missing.inc_by(missing as u64);
        }
        let disturbed = state
            .service
            .as_ref()
            .is_some_and(|service| service.disturbed.load(Ordering::Relaxed) || service.pid().is_none());
        let sound = state.service.as_ref().is_none_or(|service| service.is_sound());
        let verdict = if state.normal.learning.is_some() {
            state.lane.shared().history().push(sample, sound);
            RowVerdict {
                score: f32::NAN,
                threshold: f32::NAN,
                signal: Signal::Quiet,
            }
        } else {
            state.lane.push(sample, disturbed)
        };
        self.tell(state, &verdict);
        self.watch_for_new_normal(state, &verdict.signal, sound);
        state.untold.send(&self.events, &state.lane.shared().name);
        state.latest = Some(verdict);
        if state.normal.learning.is_some_and(|rows_left| rows_left > 0) {
            return reading;
        }
        let event = state.lane.tend().await;
        if event.is_some() {
            state.normal.learning = None;
        }
        match event {
            Some(FitEvent::Fitted(detector)) => self.fitted(state.lane.shared(), detector),
            Some(FitEvent::Failed(reason)) => {
                self.metrics.fits.get_or_create(&kind("failed")).inc();
                tracing::warn!(
                    lane = state.lane.shared().name,
                    reason,
                    "no model could be fitted"
                );
            }
            None => {}
        }
        reading
    }

    /// Chances into the metrics and onto the page; a horizon without one has no series.
    fn show_risk(&self, name: &str, risks: &[Risk]) {
        for risk in risks {
            let labels = at_horizon(name, risk.horizon.to_string());
            if let Ok(chance) = risk.chance {
                self.metrics
                    .failure_risk
                    .get_or_create(&labels)
                    .set(chance.probability);
            } else {
                self.metrics.failure_risk.remove(&labels);
            }
        }
        if name != HOST {
            self.board
                .update_service(name, |line| line.risk = risks.iter().map(Into::into).collect());
        }
    }

    /// Begins to gather rows for a new model when the alarm has lasted long enough.
    fn watch_for_new_normal(&self, state: &mut Row, signal: &Signal, sound: bool) {
        let fitted_on = state
            .lane
            .shared()
            .detector()
            .map_or(0, |detector| detector.rows());
        let patience = Patience::new(self.sampling.interval, fitted_on);
        let rows = self.rows_of_new_normal(state);
        if state.normal.row(signal, sound, patience, rows) {
            self.begin_new_normal(state, rows, "the alarm lasts and the service is well");
        }
    }

    /// Does the same at once where a person said so.
    fn accept_new_normal(&self, state: &mut Row, accepted: &BTreeSet<String>) {
        let named = accepted.contains(&state.lane.shared().name);
        let host = accepted.contains(HOST) && state.blames_host;
        if named || host {
            let rows = self.rows_of_new_normal(state);
            state.normal.accept(rows);
            self.begin_new_normal(state, rows, "a person said so");
        }
    }

    /// At least half of what the fit looks at is then new.
    fn rows_of_new_normal(&self, state: &Row) -> usize {
        let known = state.lane.shared().history().quiet_len();
        self.detection
            .warm_up_rows
            .max(known.min(self.detection.fit_rows / 2))
    }

    fn begin_new_normal(&self, state: &mut Row, rows: usize, why: &str) {
        let shared = Arc::clone(state.lane.shared());
        tracing::warn!(
            lane = shared.name,
            rows,
            why,
            "taken for a new normal, gathering rows for a new model"
        );
        state.lane = Lane::new(shared, self.detection.clone(), self.sampling.interval);
        state.untold.service = true;
        state.untold.host |= std::mem::take(&mut state.blames_host);
    }

    fn tell(&self, state: &mut Row, verdict: &RowVerdict) {
        let name = state.lane.shared().name.clone();
        match &verdict.signal {
            // An open incident waits for word that the service is normal again.
            Signal::Quiet if verdict.score.is_finite() => {
                let waits = |service: &Arc<ServiceShared>| service.disturbed.load(Ordering::Relaxed);
                if state.service.as_ref().is_some_and(waits) {
                    self.send(Input::Calm { service: name });
                }
            }
            Signal::Quiet => {}
            Signal::Anomaly {
                raised,
                blame,
                causes,
            } => {
                if *raised {
                    self.metrics.alarms.get_or_create(&label(&name)).inc();
                    let leading = causes.first().map_or("none", |cause| cause.channel.as_str());
                    tracing::info!(
                        lane = name,
                        score = verdict.score,
                        threshold = verdict.threshold,
                        leading,
                        "alarm"
                    );
                }
                let service = match blame {
                    Blame::Service => {
                        state.untold.service = false;
                        if let Some(memory) = &state.memory {
                            self.send(Input::Memory {
                                service: name.clone(),
                                seen: memory.seen(),
                            });
                        }
                        name
                    }
                    Blame::Host => {
                        state.untold.host = false;
                        state.blames_host = true;
                        HOST.to_owned()
                    }
                };
                let (score, threshold) = (verdict.score, verdict.threshold);
                self.send(Input::Anomaly {
                    service,
                    score,
                    threshold,
                    causes: causes.clone(),
                });
            }
            Signal::Cleared => {
                state.untold.host |= std::mem::take(&mut state.blames_host) && name != HOST;
                state.untold.service = true;
            }
        }
    }

    /// Never waits: the loop must not stand still because healing is busy. What is lost is told again with the next row,
    /// the end of an alarm by [`Untold`].
    fn send(&self, input: Input) {
        if self.events.try_send(input).is_err() {
            tracing::debug!("the incident machine is busy");
        }
    }

    fn fitted(&self, shared: &Arc<LaneShared>, detector: Arc<Detector>) {
        self.metrics.fits.get_or_create(&kind("fitted")).inc();
        tracing::info!(
            lane = shared.name,
            rows = detector.rows(),
            threshold = detector.threshold().level(),
            "model fitted"
        );
        keep_detector(&self.dir, &shared.name, &self.storage, detector);
    }

    fn show(&self, rows: &[Row]) {
        let mut worst: Option<(f32, f32)> = None;
        let mut alarm = false;
        for row in rows {
            let Some(verdict) = &row.latest else { continue };
            let known = verdict
                .score
                .is_finite()
                .then_some((verdict.score, verdict.threshold));
            let raised = matches!(verdict.signal, Signal::Anomaly { .. });
            alarm |= raised;
            if let Some((score, threshold)) = known {
                let name = label(&row.lane.shared().name);
                self.metrics.score.get_or_create(&name).set(f64::from(score));
                self.metrics
                    .threshold
                    .get_or_create(&name)
                    .set(f64::from(threshold));
                if worst.is_none_or(|(s, t)| score / threshold > s / t) {
                    worst = Some((score, threshold));
                }
            } else {
                // A blind lane has no score, which is not its last one.
                let name = label(&row.lane.shared().name);
                self.metrics.score.remove(&name);
                self.metrics.threshold.remove(&name);
            }
            if row.service.is_some() {
                self.board.update_service(&row.lane.shared().name, |line| {
                    line.score = known.map(|known| known.0);
                    line.threshold = known.map(|known| known.1);
                    line.alarm = raised;
                });
            }
        }
        let watching = rows.iter().all(|row| row.lane.watching());
        // Of the lane that lacks most.
        let warm_up_rows = self.detection.warm_up_rows;
        let lacks = |(gathered, wanted): &(usize, usize)| wanted.saturating_sub(*gathered);
        let gathered = rows
            .iter()
            .map(|row| row.gathered(warm_up_rows))
            .max_by(|a, b| lacks(a).cmp(&lacks(b)).then(b.0.cmp(&a.0)))
            .unwrap_or((0, warm_up_rows));
        self.board.update(|status| {
            status.phase = if watching {
                Phase::Watching
            } else {
                Phase::WarmingUp
            };
            status.rows = gathered.0 as u64;
            status.warm_up_rows = gathered.1 as u64;
            status.score = worst.map(|worst| worst.0);
            status.threshold = worst.map(|worst| worst.1);
            status.alarm = alarm;
        });
        self.board.tick();
    }
}

/// Ends of alarms that the incident machine has not been told yet, because its queue was full.
#[derive(Debug, Default)]
struct Untold {
    service: bool,
    host: bool,
}

impl Untold {
    fn send(&mut self, events: &mpsc::Sender<Input>, lane: &str) {
        for (untold, service) in [(&mut self.host, HOST), (&mut self.service, lane)] {
            if *untold {
                let service = service.to_owned();
                *untold = events.try_send(Input::AnomalyCleared { service }).is_err();
            }
        }
    }
}

/// Rows that an alarm may last before it is taken for a new normal.
#[derive(Debug, Clone, Copy)]
struct Patience {
    /// While a resource of the service has risen.
    risen: usize,
    /// Otherwise.
    otherwise: usize,
}

impl Patience {
    /// For a model that was fitted on `rows` rows.
    fn new(interval: Duration, rows: u64) -> Self {
        let interval_ms = interval.as_millis().max(1);
        let in_rows = |time: Duration| usize::try_from(time.as_millis() / interval_ms).unwrap_or(usize::MAX);
        let known = interval.saturating_mul(u32::try_from(rows).unwrap_or(u32::MAX));
        let young = known
            .saturating_mul(YOUNG_MODEL_TIMES)
            .clamp(YOUNG_MODEL_AFTER_MIN, NEW_NORMAL_AFTER);
        Self {
            risen: in_rows(NEW_NORMAL_AFTER),
            otherwise: in_rows(young),
        }
    }
}

/// How long an alarm has lasted, and the rows that are being gathered for the model after it.
#[derive(Debug, Default)]
struct NewNormal {
    alarmed_rows: usize,
    /// Whether a resource of the service rose in any of them.
    risen: bool,
    /// Rows still to gather; at zero the fit is under way.
    learning: Option<usize>,
    /// Rows to gather in all.
    wanted: usize,
}

impl NewNormal {
    /// Takes what is there for normal: `rows` are gathered.
    fn accept(&mut self, rows: usize) {
        *self = Self {
            learning: Some(rows),
            wanted: rows,
            ..Self::default()
        };
    }

    /// Counts a row. True when the alarm has now lasted long enough with a sound service: `rows` are then gathered.
    fn row(&mut self, signal: &Signal, sound: bool, patience: Patience, rows: usize) -> bool {
        if let Some(left) = &mut self.learning {
            *left = left.saturating_sub(usize::from(sound));
            return false;
        }
        match signal {
            _ if !sound => (self.alarmed_rows, self.risen) = (0, false),
            Signal::Cleared => (self.alarmed_rows, self.risen) = (0, false),
            Signal::Anomaly { blame, causes, .. } => {
                self.alarmed_rows = self.alarmed_rows.saturating_add(1);
                self.risen |=
                    *blame == Blame::Service && causes.iter().any(|cause| cause.rising == Some(true));
            }
            Signal::Quiet => {}
        }
        let patience = if self.risen {
            patience.risen
        } else {
            patience.otherwise
        };
        if self.alarmed_rows < patience.max(1) {
            return false;
        }
        self.accept(rows);
        true
    }
}

fn unix_ms() -> u64 {
    // A wall clock before 1970 counts as 1970: blocks then never end, and nothing is released.
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use theriac_heal::types::Cause;

    use super::*;

    fn anomaly() -> Signal {
        Signal::Anomaly {
            raised: false,
            blame: Blame::Service,
            causes: Vec::new(),
        }
    }

    #[test]
    fn the_end_of_an_alarm_is_told_again_until_there_is_room_for_it() {
        let (events, mut received) = mpsc::channel(1);
        let service = || "kv".to_owned();
        events.try_send(Input::StateGood { service: service() }).unwrap();
        let mut untold = Untold {
            service: true,
            host: false,
        };
        untold.send(&events, "kv");
        assert!(untold.service, "the queue is full");
        received.try_recv().unwrap();
        untold.send(&events, "kv");
        assert!(!untold.service);
        assert_eq!(
            received.try_recv().unwrap(),
            Input::AnomalyCleared { service: service() }
        );
        untold.send(&events, "kv");
        assert!(received.try_recv().is_err(), "told once");
    }

    #[test]
    fn an_alarm_becomes_the_new_normal_only_when_it_lasts_and_the_service_is_sound_all_the_time() {
        const TEN: Patience = Patience {
            risen: 10,
            otherwise: 10,
        };
        let mut normal = NewNormal::default();
        for _ in 0..9 {
            assert!(!normal.row(&anomaly(), true, TEN, 3));
        }
        assert!(!normal.row(&anomaly(), false, TEN, 3), "it did not answer");
        for _ in 0..9 {
            assert!(!normal.row(&anomaly(), true, TEN, 3));
        }
        assert!(!normal.row(&Signal::Cleared, true, TEN, 3));
        for _ in 0..9 {
            assert!(!normal.row(&anomaly(), true, TEN, 3));
        }
        assert!(normal.row(&anomaly(), true, TEN, 3));
        for (sound, left) in [(true, 2), (false, 2), (true, 1), (true, 0), (true, 0)] {
            assert!(!normal.row(&Signal::Quiet, sound, TEN, 3));
            assert_eq!(
                normal.learning,
                Some(left),
                "rows of an unsound service do not count"
            );
        }
    }
    #[test]
    fn a_model_of_a_short_history_is_doubted_sooner_unless_a_resource_of_the_service_rose() {
        let young = Patience::new(Duration::from_millis(200), 100);
        assert_eq!((young.otherwise, young.risen), (1_500, 9_000), "5 and 30 minutes");
        let old = Patience::new(Duration::from_secs(1), 300);
        assert_eq!((old.otherwise, old.risen), (1_800, 1_800));

        let mut normal = NewNormal::default();
        let lasts = |normal: &mut NewNormal, signal: &Signal| {
            (1..=young.risen).find(|_| normal.row(signal, true, young, 100))
        };
        assert_eq!(lasts(&mut normal, &anomaly()), Some(1_500));
        let mut normal = NewNormal::default();
        let risen = Signal::Anomaly {
            raised: true,
            blame: Blame::Service,
            causes: vec![Cause {
                rising: Some(true),
                ..Cause::from(("service_memory".to_owned(), 9.0))
            }],
        };
        assert!(!normal.row(&risen, true, young, 100));
        assert_eq!(lasts(&mut normal, &anomaly()), Some(8_999));
    }

    fn stage(root: &std::path::Path) -> (Watch, mpsc::Receiver<Input>) {
        let dir = StateDir::open(&root.join("s")).unwrap();
        let config = crate::config::EdgeConfig::load(None, []).unwrap();
        let (board, metrics) = (Board::new("a", 60), Arc::new(Metrics::new()));
        let schema = theriac_model::feature::FeatureSchema::host_service_v1();
        let lanes = ["kv", "db"].map(|name| {
            (
                Arc::new(LaneShared::new(
                    name,
                    schema.clone(),
                    1000,
                    &config.detection,
                    config.sampling.interval,
                )),
                None,
            )
        });
        let (events, received) = mpsc::channel(16);
        let watch = Watch {
            sampling: config.sampling.clone(),
            detection: config.detection.clone(),
            risk: RiskModel::load(&config.risk).unwrap(),
            lanes: lanes.to_vec(),
            storage: StorageWatch::new(dir.clone(), board.clone(), Arc::clone(&metrics)),
            dir,
            events,
            board,
            metrics,
            new_normals: NewNormals::default(),
        };
        (watch, received)
    }

    #[test]
    fn a_new_normal_that_a_person_accepted_ends_the_alarm_and_gathers_rows_in_that_lane_alone() {
        let root = tempfile::tempdir().unwrap();
        let (watch, mut received) = stage(root.path());
        let mut rows = watch.rows().unwrap();
        rows[1].blames_host = true;
        let service = |name: &str| name.to_owned();
        watch.new_normals.accept("kv");
        let accepted = watch.new_normals.take();
        for row in &mut rows {
            watch.accept_new_normal(row, &accepted);
            row.untold.send(&watch.events, &row.lane.shared().name);
        }
        assert_eq!(rows[0].normal.learning, Some(watch.detection.warm_up_rows));
        assert_eq!(rows[1].normal.learning, None);
        let told = received.try_recv().unwrap();
        assert_eq!(
            told,
            Input::AnomalyCleared {
                service: service("kv")
            }
        );
        assert!(received.try_recv().is_err() && watch.new_normals.take().is_empty());

        // An incident of the host as a whole: every lane that blames it.
        watch.accept_new_normal(&mut rows[1], &BTreeSet::from([service(HOST)]));
        assert!(rows[1].normal.learning.is_some() && !rows[1].blames_host);
        rows[1].untold.send(&watch.events, "db");
        let told = received.try_recv().unwrap();
        assert_eq!(
            told,
            Input::AnomalyCleared {
                service: service(HOST)
            }
        );
    }
}
