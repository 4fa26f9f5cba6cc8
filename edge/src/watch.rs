//! The sample loop: every interval one row for each lane, scored, and told to the incident machine.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use theriac_heal::incident::Input;
use theriac_model::detector::Detector;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use crate::HOST;
use crate::config::{DetectionSettings, SamplingSettings};
use crate::detect::{Blame, FitEvent, Lane, LaneShared, RowVerdict, Signal, keep_detector};
use crate::metrics::{Metrics, kind, service as label};
use crate::sample::{HostSampler, ProbeWindow, ServiceSampler, row};
use crate::service::ServiceShared;
use crate::state_dir::StateDir;
use crate::status::{Board, Phase};
use crate::storage::StorageWatch;
use crate::supervise::Shutdown;

/// What the loop works with.
#[derive(Debug, Clone)]
pub struct Watch {
    /// Checked `[sampling]`.
    pub sampling: SamplingSettings,
    /// Checked `[detection]`.
    pub detection: DetectionSettings,
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
}

/// One lane in the hands of the loop.
struct Row {
    lane: Lane,
    service: Option<Arc<ServiceShared>>,
    sampler: ServiceSampler,
    pid: Option<u32>,
    blames_host: bool,
    latest: Option<RowVerdict>,
}

/// Samples until the signal to stop.
///
/// # Errors
/// Never; the signature is the one of a task.
pub async fn run(watch: Watch, mut shutdown: Shutdown) -> Result<(), std::convert::Infallible> {
    let interval = watch.sampling.interval;
    let space: PathBuf = watch
        .sampling
        .disk
        .clone()
        .unwrap_or_else(|| watch.dir.root().to_owned());
    let mut host = HostSampler::new(&space, watch.sampling.interfaces.clone());
    let mut rows: Vec<Row> = watch
        .lanes
        .iter()
        .map(|(shared, service)| Row {
            lane: Lane::new(Arc::clone(shared), watch.detection.clone(), interval),
            service: service.clone(),
            sampler: ServiceSampler::default(),
            pid: None,
            blames_host: false,
            latest: None,
        })
        .collect();
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut before = Instant::now();
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
        let reading = host.read(elapsed);
        let at_ms = unix_ms();
        for row in &mut rows {
            watch.one(row, at_ms, &reading, elapsed).await;
        }
        watch.show(&rows);
        watch.metrics.sample_seconds.inc_by(begun.elapsed().as_secs_f64());
    }
}

impl Watch {
    async fn one(&self, state: &mut Row, at_ms: u64, host: &crate::sample::HostReading, elapsed: Duration) {
        let pid = state.service.as_ref().and_then(|service| service.pid());
        if state.pid.is_some() && pid.is_some() && pid != state.pid {
            state.lane.restarted();
        }
        state.pid = pid.or(state.pid);
        let reading = state.sampler.read(pid, elapsed);
        let probes = state
            .service
            .as_ref()
            .map_or_else(ProbeWindow::default, |service| service.take_probes());
        let sample = row(
            &state.lane.shared().schema,
            at_ms,
            host,
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
        let verdict = state.lane.push(sample, disturbed);
        self.tell(state, &verdict);
        state.latest = Some(verdict);
        match state.lane.tend().await {
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
    }

    fn tell(&self, state: &mut Row, verdict: &RowVerdict) {
        let name = state.lane.shared().name.clone();
        match &verdict.signal {
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
                    Blame::Service => name,
                    Blame::Host => {
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
                if std::mem::take(&mut state.blames_host) && name != HOST {
                    self.send(Input::AnomalyCleared {
                        service: HOST.to_owned(),
                    });
                }
                self.send(Input::AnomalyCleared { service: name });
            }
        }
    }

    /// Never waits: the loop must not stand still because healing is busy. What is lost is told again with the next row.
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
        let gathered = rows
            .iter()
            .map(|row| row.lane.shared().history().len())
            .min()
            .unwrap_or(0);
        self.board.update(|status| {
            status.phase = if watching {
                Phase::Watching
            } else {
                Phase::WarmingUp
            };
            status.rows = gathered as u64;
            status.score = worst.map(|worst| worst.0);
            status.threshold = worst.map(|worst| worst.1);
            status.alarm = alarm;
        });
        self.board.tick();
    }
}

fn unix_ms() -> u64 {
    // A wall clock before 1970 counts as 1970: blocks then never end, and nothing is released.
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
