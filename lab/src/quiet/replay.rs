//! One recording through lane and machine.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use theriac_edge::config::DetectionSettings;
use theriac_edge::detect::{Lane, LaneShared, Signal};
use theriac_edge::memory::MemoryCourse;
use theriac_heal::incident::{HealConfig, IncidentMachine, Input, Output, PressureSeen};
use theriac_heal::policy::{Autonomy, HealPolicy, NodeBudget};
use theriac_heal::types::{Cause, FaultClass, Incident, IncidentState, Now, Outcome};
use theriac_model::detector::{Detector, DetectorError, default_half_lives};
use theriac_model::feature::FeatureSchema;
use theriac_model::risk::exhaustion::Limit;
use theriac_model::sample::Sample;
use theriac_model::series::Series;

use super::Args;

/// What came of one recording.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Machine {
    /// Its name.
    pub name: String,
    /// Days of rows that were scored.
    pub days: f64,
    /// Alarms that began.
    pub alarms: u64,
    /// Incidents that were opened.
    pub incidents: u64,
    /// Restarts for what looked like a leak.
    pub restarts_for_memory: u64,
    /// Restarts for what looked like a loop.
    pub restarts_for_cpu: u64,
    /// Incidents that were handed to a person.
    pub handed_over: u64,
    /// Levels that were taken for a new normal.
    pub new_normals: u64,
}

impl Machine {
    /// Everything that was done.
    pub fn actions(&self) -> u64 {
        self.restarts_for_memory + self.restarts_for_cpu
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.days += other.days;
        self.alarms += other.alarms;
        self.incidents += other.incidents;
        self.restarts_for_memory += other.restarts_for_memory;
        self.restarts_for_cpu += other.restarts_for_cpu;
        self.handed_over += other.handed_over;
        self.new_normals += other.new_normals;
    }
}

/// Replays a recording; with no model until enough rows are there.
pub(super) fn replay(
    name: &str,
    series: &Series,
    schema: FeatureSchema,
    args: &Args,
) -> Result<Machine, DetectorError> {
    let settings = DetectionSettings {
        half_lives: default_half_lives(args.step),
        ..DetectionSettings::default()
    };
    let mut courses = BTreeMap::new();
    for (channel, feature) in schema.features.iter().enumerate() {
        if feature.name.starts_with("service_memory")
            && let Ok(limit) = Limit::new(args.limit)
            && let Ok(course) = MemoryCourse::new(Some(limit), args.step)
        {
            courses.insert(feature.name.clone(), (channel, course));
        }
    }
    let mut watched = Watched::new(name, schema, settings, args, series.rows());
    watched.courses = courses;
    for (row, values) in series.iter_rows().enumerate() {
        watched.row(row, values.to_vec(), args.refit_rows as usize)?;
    }
    Ok(watched.found)
}

/// One service that is always well.
struct Watched {
    lane: Lane,
    shared: Arc<LaneShared>,
    settings: DetectionSettings,
    step: Duration,
    machine: IncidentMachine,
    now: Duration,
    /// Rows since the last fit.
    since_fit: usize,
    /// Rows of the alarm that is on.
    alarmed_rows: usize,
    /// Rows to gather until the level counts as learnt.
    learning: Option<usize>,
    /// Where each channel of its memory stands, by name.
    courses: BTreeMap<String, (usize, MemoryCourse)>,
    /// What shows that every processor is used.
    processors: f64,
    /// Whether its answers take longer the more of them it uses.
    queueing: bool,
    /// How long an answer takes.
    took: Duration,
    found: Machine,
}

impl Watched {
    fn new(name: &str, schema: FeatureSchema, settings: DetectionSettings, args: &Args, rows: usize) -> Self {
        let step = args.step;
        let rows_max = rows.max(1).min(10 * settings.fit_rows);
        let shared = Arc::new(LaneShared::new(SERVICE, schema, rows_max, &settings, step));
        let policy = HealPolicy {
            autonomy: Autonomy::Act,
            anomaly_lasting: args.lasting,
            ..HealPolicy::default()
        };
        let machine = IncidentMachine::new(HealConfig {
            services: BTreeMap::from([(SERVICE.to_owned(), policy)]),
            node: NodeBudget::default(),
            depends_on: BTreeMap::new(),
            clock_id: "recorded".to_owned(),
        });
        let mut watched = Self {
            lane: Lane::new(Arc::clone(&shared), settings.clone(), step),
            shared,
            settings,
            step,
            machine,
            now: step,
            since_fit: 0,
            alarmed_rows: 0,
            learning: None,
            courses: BTreeMap::new(),
            processors: args.processors,
            queueing: args.queueing,
            took: ANSWER,
            found: Machine {
                name: name.to_owned(),
                ..Machine::default()
            },
        };
        watched.tell(Input::Started {
            service: SERVICE.to_owned(),
            pid: 1,
        });
        watched
    }

    fn row(&mut self, row: usize, values: Vec<f32>, refit_rows: usize) -> Result<(), DetectorError> {
        let at = self.step * u32::try_from(row + 1).unwrap_or(u32::MAX);
        self.pass_until(at);
        let at_ms = u64::try_from(at.as_millis()).unwrap_or(u64::MAX);
        for (channel, course) in self.courses.values_mut() {
            course.push(at.as_secs_f64(), f64::from(values[*channel]), f64::NAN);
        }
        let uses_cpu = self.cpu(&values);
        if let Some(uses) = uses_cpu.filter(|_| self.queueing) {
            self.took = ANSWER.div_f64(1.0 - uses.clamp(0.0, BUSIEST));
        }
        let sample = Sample { at_ms, values };
        if let Some(left) = &mut self.learning {
            self.shared.history().push(sample, true);
            *left = left.saturating_sub(1);
            if *left == 0 {
                self.learning = None;
                self.fit()?;
            }
            return Ok(());
        }
        let disturbed = self.machine.open_incidents().next().is_some();
        let verdict = self.lane.push(sample, disturbed);
        if verdict.score.is_finite() {
            self.found.days += self.step.as_secs_f64() / 86_400.0;
        }
        self.since_fit += 1;
        let service = SERVICE.to_owned();
        match verdict.signal {
            Signal::Quiet if verdict.score.is_finite() && disturbed => self.tell(Input::Calm { service }),
            Signal::Quiet => {}
            Signal::Cleared => {
                self.alarmed_rows = 0;
                self.tell(Input::AnomalyCleared { service });
            }
            Signal::Anomaly {
                raised,
                blame: theriac_edge::detect::Blame::Service,
                causes,
            } => {
                self.alarm(raised);
                self.tell_resources(&causes, uses_cpu);
                self.tell(Input::Anomaly {
                    service,
                    score: verdict.score,
                    threshold: verdict.threshold,
                    causes,
                });
            }
            // Another's trouble: nothing is done to the service for it.
            Signal::Anomaly { raised, .. } => self.alarm(raised),
        }
        if self.step * u32::try_from(self.alarmed_rows).unwrap_or(u32::MAX) >= NEW_NORMAL_AFTER {
            self.take_for_normal();
        } else {
            let known = self.shared.history().quiet_len();
            let due = if self.shared.detector().is_some() {
                self.since_fit >= refit_rows
            } else {
                known >= self.settings.warm_up_rows
            };
            if due && self.alarmed_rows == 0 {
                self.fit()?;
            }
        }
        Ok(())
    }

    /// The most that a channel of its processor time shows.
    fn cpu(&self, values: &[f32]) -> Option<f64> {
        let features = self.shared.schema.features.iter().zip(values);
        features
            .filter(|(feature, _)| feature.name.starts_with("service_cpu"))
            .map(|(_, value)| f64::from(*value) / self.processors)
            .max_by(f64::total_cmp)
    }

    fn tell_resources(&mut self, causes: &[Cause], uses_cpu: Option<f64>) {
        let leading = causes.iter().find_map(|cause| self.courses.get(&cause.channel));
        if let Some((_, course)) = leading {
            let (service, seen) = (SERVICE.to_owned(), course.seen());
            self.tell(Input::Memory { service, seen });
        }
        let seen = PressureSeen {
            uses_cpu,
            runs: uses_cpu,
            waits_for_cpu: uses_cpu.map(|uses| if uses >= 0.5 { 1.0 } else { 0.0 }),
            ..PressureSeen::default()
        };
        let service = SERVICE.to_owned();
        self.tell(Input::Pressure { service, seen });
    }

    fn alarm(&mut self, raised: bool) {
        self.found.alarms += u64::from(raised);
        self.alarmed_rows += 1;
    }

    /// As the edge does: the alarm is told as over, and a new model is made of at least half new rows.
    fn take_for_normal(&mut self) {
        self.found.new_normals += 1;
        self.alarmed_rows = 0;
        let known = self.shared.history().quiet_len();
        self.learning = Some(
            self.settings
                .warm_up_rows
                .max(known.min(self.settings.fit_rows / 2)),
        );
        self.tell(Input::AnomalyCleared {
            service: SERVICE.to_owned(),
        });
    }

    fn fit(&mut self) -> Result<(), DetectorError> {
        let rows = self.shared.history().quiet(self.settings.fit_rows);
        let detector = Detector::fit(&self.shared.schema, &rows, &self.shared.fit)?;
        self.shared.replace(Arc::new(detector));
        // With levels of its own.
        self.lane = Lane::new(Arc::clone(&self.shared), self.settings.clone(), self.step);
        self.since_fit = 0;
        Ok(())
    }

    /// Time goes on until the next row: the service answers every probe.
    fn pass_until(&mut self, at: Duration) {
        let every = self.step / (PROBES + 1);
        for probe in 1..=PROBES {
            let due = at.saturating_sub(self.step) + every * probe;
            self.time_out_until(due);
            self.now = self.now.max(due);
            self.tell(Input::Probe {
                service: SERVICE.to_owned(),
                ok: true,
                latency: self.took,
                detail: String::new(),
            });
        }
        self.time_out_until(at);
        self.now = self.now.max(at);
    }

    fn time_out_until(&mut self, at: Duration) {
        while let Some(due) = self.machine.poll_timeout().filter(|due| *due <= at) {
            self.now = self.now.max(due);
            let now = self.clock();
            self.machine.handle_timeout(now);
            self.drain();
        }
    }

    fn tell(&mut self, input: Input) {
        let now = self.clock();
        self.machine.handle(now, input);
        self.drain();
    }

    fn clock(&self) -> Now {
        Now {
            monotonic: self.now,
            unix_ms: u64::try_from(self.now.as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// Intents are durable at once and actions done at once.
    fn drain(&mut self) {
        while let Some(output) = self.machine.poll_output() {
            match output {
                Output::RecordIntent(intent) => {
                    let now = self.clock();
                    self.machine.handle(now, Input::IntentDurable { id: intent.id });
                }
                Output::Execute(intent) => {
                    if intent.class == FaultClass::CpuContention {
                        self.found.restarts_for_cpu += 1;
                    } else {
                        self.found.restarts_for_memory += 1;
                    }
                    self.lane.restarted();
                    for (_, course) in self.courses.values_mut() {
                        course.restarted();
                    }
                    self.alarmed_rows = 0;
                    let (now, id) = (self.clock(), intent.id);
                    let outcome = Outcome::Done;
                    self.machine.handle(now, Input::Executed { id, outcome });
                }
                Output::Opened(_) => self.found.incidents += 1,
                Output::Updated(Incident {
                    state: IncidentState::HandedToHuman,
                    closed: None,
                    ..
                }) => {
                    self.found.handed_over += 1;
                }
                _ => {}
            }
        }
    }
}

const SERVICE: &str = "service";
/// How long an answer of an idle service takes.
const ANSWER: Duration = Duration::from_millis(1);
/// Beyond this share of the processors a queue grows without end.
const BUSIEST: f64 = 0.99;
/// Probes between two rows.
const PROBES: u32 = 3;
/// As in a running edge.
const NEW_NORMAL_AFTER: Duration = Duration::from_mins(30);
