//! What is known of one service: the latest observations, in words and as latched symptoms.

use std::collections::VecDeque;
use std::time::Duration;

use super::diagnose::{Family, family_of, loses};
use super::latency::Latency;
use super::sessions::Sessions;
use super::{Input, MemorySeen, PressureSeen, ProcessState};
use crate::policy::HealPolicy;
use crate::types::{ActionKind, Cause, Evidence, FaultClass, Incident, Now, SessionId};

/// Observations of one service. Everything in it is bounded.
#[derive(Debug, Clone)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is one latch with its own rule"
)]
pub(super) struct Observed {
    pub(super) policy: HealPolicy,
    /// How the process ended, until it runs again.
    pub(super) exit: Option<String>,
    /// A server that was not started here has its data: nothing is done until a person says that it is gone.
    pub(super) occupied: bool,
    /// Its process was started and has not yet answered often enough to count as up.
    pub(super) fresh: bool,
    /// The latest probes, oldest first; at most `probe_window`.
    pub(super) probes: VecDeque<bool>,
    /// Whether a probe was ever seen.
    pub(super) probed: bool,
    /// Whether anything was seen that tells if the service runs.
    pub(super) known: bool,
    /// The anomaly alarm cleared since the process was started, and was not raised again.
    pub(super) anomaly_cleared: bool,
    /// Normal rows in a row after the time for settling.
    pub(super) calm_rows: u32,
    /// Good probes in a row.
    pub(super) ok_run: u32,
    /// The service answered often enough to count as up since its process was started.
    pub(super) served: bool,
    /// Bad probes in a row.
    pub(super) bad_run: u32,
    /// When the first and the latest of these were told.
    bad_span: Option<(Duration, Duration)>,
    /// Latched by [`super::detect`].
    pub(super) unresponsive: bool,
    pub(super) stopped_run: u32,
    pub(super) stopped: bool,
    /// Rows of this alarm, after the time for settling, whose score reached the threshold.
    pub(super) anomaly_run: u32,
    /// The first and the latest of them.
    pub(super) anomaly_span: Option<(Duration, Duration)>,
    /// What led the latest rows of this alarm, oldest first; at most [`LEADERS_MAX`].
    pub(super) leaders: VecDeque<Option<Family>>,
    /// The latest anomaly, also while settling, until the alarm clears.
    pub(super) anomaly: Option<Anomaly>,
    pub(super) anomalous: bool,
    /// Where its memory stands, while the alarm is on.
    pub(super) memory: MemorySeen,
    pub(super) corrupt: Option<String>,
    pub(super) disk_full: Option<u64>,
    /// The file system of its state could be written and cannot any more.
    pub(super) read_only: bool,
    /// Bytes that could be moved away there.
    pub(super) relievable: u64,
    /// What keeps its threads from running, at the latest look.
    pub(super) pressure: PressureSeen,
    /// When that was.
    pub(super) pressure_at: Option<Duration>,
    /// When its clients were last counted.
    pub(super) counted_at: Option<Duration>,
    /// Whether that was after a probe failed, of those in [`Self::probes`]: what its threads were at before says nothing of why it does not answer.
    pub(super) looked_amid: bool,
    /// Since its probes began to fail one was answered well: it works, though not always in time.
    pub(super) answers_between: bool,
    /// What the latest burst of errors in its output speaks for, until it answers again, a disk has room again, or a minute has passed.
    pub(super) log_hint: Option<LogHint>,
    /// Its own words in the latest probe that it answered with a refusal; until one fails otherwise, or it answers again.
    pub(super) refusal: Option<String>,
    /// The refusal that belongs to the probe which is told next.
    refusal_next: Option<String>,
    /// How long its good probes take, against what is usual.
    pub(super) latency: Latency,
    /// A service that this one calls and that does not serve.
    pub(super) dependency_down: Option<String>,
    /// What is known of its sessions; nothing where nobody looks at them.
    pub(super) sessions: Sessions,
    /// The chance of failing within the shortest horizon.
    pub(super) risk: Option<f64>,
    /// Anomalies before this moment open nothing.
    pub(super) settle_until: Duration,
    /// Signs that are not yet cleared, oldest first; at most [`SIGNS_MAX`].
    pub(super) signs: Vec<Evidence>,
}

/// What a burst of errors speaks for.
#[derive(Debug, Clone)]
pub(super) struct LogHint {
    pub(super) class: FaultClass,
    /// The line, with everything that varies taken out.
    pub(super) template: String,
    /// When it was seen.
    at: Duration,
}

/// The latest anomalous verdict.
#[derive(Debug, Clone)]
pub(super) struct Anomaly {
    pub(super) score: f32,
    pub(super) threshold: f32,
    /// Greatest first; at most [`Incident::CAUSES_MAX`].
    pub(super) causes: Vec<Cause>,
}

impl Observed {
    pub(super) fn new(policy: HealPolicy) -> Self {
        Self {
            policy,
            exit: None,
            occupied: false,
            fresh: false,
            probes: VecDeque::new(),
            probed: false,
            known: false,
            anomaly_cleared: false,
            calm_rows: 0,
            ok_run: 0,
            served: false,
            bad_run: 0,
            bad_span: None,
            unresponsive: false,
            stopped_run: 0,
            stopped: false,
            anomaly_run: 0,
            anomaly_span: None,
            leaders: VecDeque::new(),
            anomaly: None,
            anomalous: false,
            memory: MemorySeen::default(),
            corrupt: None,
            disk_full: None,
            read_only: false,
            relievable: 0,
            pressure: PressureSeen::default(),
            pressure_at: None,
            counted_at: None,
            looked_amid: false,
            answers_between: false,
            log_hint: None,
            refusal: None,
            refusal_next: None,
            latency: Latency::default(),
            dependency_down: None,
            sessions: Sessions::default(),
            risk: None,
            settle_until: Duration::ZERO,
            signs: Vec::new(),
        }
    }

    /// Takes one observation. Its words, when it is worth keeping in an incident.
    pub(super) fn take(&mut self, now: Now, input: &Input) -> Option<String> {
        // Clients can have a line written: it may hold back a restart for a while, not for good.
        if self
            .log_hint
            .as_ref()
            .is_some_and(|hint| now.monotonic.saturating_sub(hint.at) > HINT_LASTS)
        {
            self.log_hint = None;
        }
        let words = match input {
            Input::Probe {
                ok, latency, detail, ..
            } => {
                let since = self.bad_span.map_or(now.monotonic, |(since, _)| since);
                self.bad_span = (!ok).then_some((since, now.monotonic));
                self.probe(*ok, *latency, detail)
            }
            Input::Started { pid, .. } => {
                self.renew(now);
                return Some(format!("process {pid} runs"));
            }
            Input::Exited { status, .. } => {
                self.known = true;
                self.ok_run = 0;
                self.exit = Some(brief(status));
                self.occupied = false;
                // What a check said while the process wrote is old now: every start checks the state again.
                self.corrupt = None;
                self.stopped_run = 0;
                self.stopped = false;
                self.sessions = Sessions::default();
                Some(format!("the process ended: {}", brief(status)))
            }
            Input::Occupied { detail, .. } => {
                self.known = true;
                self.ok_run = 0;
                let new = !std::mem::replace(&mut self.occupied, true);
                self.exit = Some(brief(detail));
                new.then(|| brief(detail))
            }
            Input::Process { state, .. } => self.process(*state),
            Input::Anomaly {
                score,
                threshold,
                causes,
                ..
            } => self.anomaly(now, *score, *threshold, causes),
            Input::AnomalyCleared { .. } => {
                let was = self.anomalous;
                self.forget_alarm();
                self.anomaly_cleared = true;
                return was.then(|| "the anomaly alarm cleared".to_owned());
            }
            Input::Calm { .. } => {
                if now.monotonic >= self.settle_until {
                    self.calm_rows = self.calm_rows.saturating_add(1);
                }
                return None;
            }
            Input::StateCorrupt { detail, .. } => {
                self.corrupt = Some(brief(detail));
                Some(format!("the state check failed: {}", brief(detail)))
            }
            Input::StateGood { .. } => {
                return self
                    .corrupt
                    .take()
                    .map(|_| "the state passes its check again".to_owned());
            }
            Input::Risk { probability, .. } => {
                self.risk = probability.filter(|p| (0.0..=1.0).contains(p));
                return None;
            }
            Input::DiskFull { free_bytes, .. } => {
                let new = self.disk_full.replace(*free_bytes).is_none();
                new.then(|| format!("the file system is full: {free_bytes} bytes are left"))
            }
            Input::ReadOnly { on, .. } => {
                let changed = self.read_only != *on;
                self.read_only = *on;
                if !on {
                    if changed {
                        self.ask_anew();
                    }
                    return changed.then(|| "the file system can be written again".to_owned());
                }
                changed.then(|| "the file system of its state cannot be written any more".to_owned())
            }
            Input::Relievable { bytes, .. } => {
                self.relievable = *bytes;
                return None;
            }
            Input::Pressure { seen, .. } => {
                if loses(&self.pressure).is_some() && loses(seen).is_none() {
                    // What it did not answer while packets got lost says nothing of it.
                    self.ask_anew();
                }
                self.pressure = *seen;
                self.pressure_at = Some(now.monotonic);
                if !seen.crowd_is_old {
                    self.counted_at = Some(now.monotonic);
                }
                self.looked_amid = self.probes.contains(&false);
                return None;
            }
            Input::Memory { seen, .. } => {
                self.memory = *seen;
                return None;
            }
            Input::LogErrors {
                lines,
                template,
                hint,
                ..
            } => {
                let template = brief(template);
                if let Some(class) = hint {
                    self.log_hint = Some(LogHint {
                        class: *class,
                        template: template.clone(),
                        at: now.monotonic,
                    });
                }
                Some(format!(
                    "its output tells of {lines} errors, most often: {template}"
                ))
            }
            Input::Sessions { seen, .. } => self.sessions.look(*seen),
            Input::SessionsUnseen { detail, .. } => {
                self.sessions.unseen(brief(detail));
                return None;
            }
            Input::SessionsRefused { detail, .. } => self.sessions.refused(brief(detail)),
            Input::Refused { detail, .. } => {
                self.refusal_next = Some(brief(detail));
                return None;
            }
            Input::DiskRelieved { .. } => {
                self.log_hint = None;
                self.disk_full.take()?;
                self.ask_anew();
                return Some("the file system has room again".to_owned());
            }
            _ => return None,
        };
        if let Some(words) = &words
            && self.signs.len() < SIGNS_MAX
        {
            self.signs.push(Evidence {
                at: now.when(),
                words: words.clone(),
            });
        }
        words
    }

    /// A process was started: what was seen of the former one says nothing about it.
    pub(super) fn renew(&mut self, now: Now) {
        self.known = true;
        self.anomaly_cleared = false;
        self.calm_rows = 0;
        self.exit = None;
        self.occupied = false;
        self.fresh = true;
        self.corrupt = None;
        self.probes.clear();
        self.ok_run = 0;
        self.served = false;
        (self.bad_run, self.bad_span) = (0, None);
        self.unresponsive = false;
        self.stopped_run = 0;
        self.stopped = false;
        self.sessions = Sessions::default();
        self.pressure = PressureSeen::default();
        (self.pressure_at, self.counted_at, self.looked_amid) = (None, None, false);
        self.answers_between = false;
        self.log_hint = None;
        (self.refusal, self.refusal_next) = (None, None);
        self.latency.renew();
        self.forget_alarm();
        self.signs.clear();
        self.settle_until = now.monotonic.saturating_add(self.policy.settle);
    }

    /// How long no probe was answered.
    pub(super) fn silent_for(&self) -> Duration {
        self.bad_span
            .map_or(Duration::ZERO, |(since, latest)| latest.saturating_sub(since))
    }

    /// The session that an action would touch now.
    pub(super) fn session_of(&self, action: ActionKind) -> Option<SessionId> {
        let touches = matches!(action, ActionKind::CancelQuery | ActionKind::TerminateBlocker);
        self.sessions.piled().filter(|_| touches).map(|pile| pile.id())
    }

    /// Whether the service serves at present: it answers probes, or, where it is not probed, its process runs.
    pub(super) fn answers(&self) -> bool {
        let up = if self.probed {
            self.ok_run >= 1 && !self.unresponsive
        } else {
            self.known && !self.stopped
        };
        self.exit.is_none() && up
    }

    /// Whether the detector finds the service normal since its start: the alarm ended, or some rows after settling were normal.
    pub(super) fn is_quiet(&self) -> bool {
        self.anomaly.is_none() && (self.anomaly_cleared || self.calm_rows >= CALM_ROWS)
    }

    fn forget_alarm(&mut self) {
        self.anomaly_run = 0;
        self.anomaly_span = None;
        self.leaders.clear();
        self.anomaly = None;
        self.anomalous = false;
        self.memory = MemorySeen::default();
    }

    /// What it did not answer while a service that it calls was down, the way to it lossy, or its disk full or read-only, says nothing of itself: it
    /// is asked anew.
    pub(super) fn ask_anew(&mut self) {
        self.unresponsive = false;
        self.probes.clear();
        (self.bad_run, self.bad_span) = (0, None);
        self.looked_amid = false;
    }

    fn probe(&mut self, ok: bool, latency: Duration, detail: &str) -> Option<String> {
        self.probed = true;
        self.known = true;
        let refusal = self.refusal_next.take();
        if !ok {
            self.refusal = refusal;
        }
        self.latency.probe(ok, latency, self.anomaly.is_none());
        self.probes.push_back(ok);
        while self.probes.len() > self.policy.probe_window as usize {
            self.probes.pop_front();
        }
        if ok {
            self.ok_run = self.ok_run.saturating_add(1);
            self.bad_run = 0;
            self.sessions.probed_well();
            self.answers_between = self.ok_run < self.policy.verify_probes && self.probes.contains(&false);
            if self.ok_run >= self.policy.verify_probes {
                self.served = true;
                self.fresh = false;
                self.log_hint = None;
                self.refusal = None;
                self.sessions.lets_in();
                if !self.anomalous
                    && !self.sessions.suspect()
                    && self.exit.is_none()
                    && self.anomaly.is_none()
                    && self.disk_full.is_none()
                    && !self.read_only
                    && self.corrupt.is_none()
                {
                    self.signs.clear();
                }
            }
            // Our process is gone, so another one has its address: that heals nothing, and a start will fail while it does.
            let stranger = self.exit.is_some() && self.ok_run == self.policy.verify_probes;
            return stranger.then(|| "its probe is answered by another process: ours has ended".to_owned());
        }
        self.ok_run = 0;
        self.bad_run = self.bad_run.saturating_add(1);
        self.sessions.probe_failed();
        let words = format!("probe failed after {} ms: {}", latency.as_millis(), brief(detail));
        (self.bad_run <= self.policy.probe_window).then_some(words)
    }

    fn process(&mut self, state: ProcessState) -> Option<String> {
        match state {
            ProcessState::Alive => {
                self.known = true;
                self.stopped_run = 0;
                self.stopped = false;
                None
            }
            ProcessState::Stopped => {
                self.stopped_run = self.stopped_run.saturating_add(1);
                (self.stopped_run == 1).then(|| "the process is stopped (state T)".to_owned())
            }
        }
    }

    fn anomaly(&mut self, now: Now, score: f32, threshold: f32, causes: &[Cause]) -> Option<String> {
        let new = self.anomaly.is_none();
        self.anomaly_cleared = false;
        self.calm_rows = 0;
        let mut causes: Vec<Cause> = causes
            .iter()
            .filter(|cause| cause.contribution.is_finite())
            .cloned()
            .collect();
        causes.sort_by(|a, b| {
            b.contribution
                .total_cmp(&a.contribution)
                .then_with(|| a.channel.cmp(&b.channel))
        });
        causes.truncate(Incident::CAUSES_MAX);
        // A row on which the alarm is only held, or one of a young process, is no evidence for an incident.
        if score >= threshold && now.monotonic >= self.settle_until {
            self.anomaly_run = self.anomaly_run.saturating_add(1);
            let since = self.anomaly_span.map_or(now.monotonic, |(since, _)| since);
            self.anomaly_span = Some((since, now.monotonic));
            self.leaders.push_back(causes.first().and_then(family_of));
            while self.leaders.len() > LEADERS_MAX {
                self.leaders.pop_front();
            }
        }
        let top = causes
            .first()
            .map_or("no single channel", |cause| cause.channel.as_str())
            .to_owned();
        self.anomaly = Some(Anomaly {
            score,
            threshold,
            causes,
        });
        new.then(|| {
            format!(
                "{ALARM_WORDS} {score:.2} at a threshold of {threshold:.2}, led by {}",
                brief(&top)
            )
        })
    }
}

/// Time for which a burst of errors in the output is heeded.
const HINT_LASTS: Duration = Duration::from_mins(1);
/// How a sign of the detector begins.
pub(super) const ALARM_WORDS: &str = "anomaly score";
/// Normal rows in a row after settling that prove the alarm gone.
const CALM_ROWS: u32 = 3;
/// Rows of an alarm that tell what leads it.
const LEADERS_MAX: usize = 8;
/// Most signs kept from before an incident is opened.
const SIGNS_MAX: usize = 8;

/// At most 200 characters of words from outside, on one line.
pub(super) fn brief(words: &str) -> String {
    words
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(200)
        .collect()
}
