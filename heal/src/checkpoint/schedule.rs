//! When to take a checkpoint: Young/Daly's interval, bent by the failure risk. Pure: it reads no clock and touches no file.
//!
//! With `C` the measured cost of a checkpoint, `M` the mean time between failures, `h(t)` the hazard and `w(t)` the work that would be
//! lost, a checkpoint is due when `∫ h·w dt` reaches `C`. A constant hazard `1/M` gives Young's interval back, `T = √(2·C·M)` (Young 1974;
//! Daly 2006, equation 7 to first order). On top of it:
//!
//! - A predictor that foretold the share `r` of the latest failures leaves `(1 − r)/M` for the time in which it is silent, so
//!   `T = √(2·C·M/(1 − r))`. `r` is the *lower* end of what was measured, and 0 before five failures ([`super::trust`]).
//! - A claimed hazard counts as much as its like came true, and runs the integral faster.
//! - On a high risk a checkpoint is taken at once, when `P·w > C` and the failure is expected later than `C` from now.
//! - A predictor that has cost more than Young/Daly would have is not heard for a while ([`super::account`]).
//! - Not when the copy itself would finish the host: a disk that is nearly full or about to be, or one that is saturated.

mod verdict;

use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_model::risk::Risk;

pub use self::verdict::{Refusal, Room, Verdict, Why};
use super::account::Account;
use super::trust::{Trust, Warning};

/// The bounds of a schedule.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Least work between two checkpoints, at most `max_gap`. Too short: a wrong predictor floods the disk.
    pub min_gap: Duration,
    /// Most work between two checkpoints, above zero. The most work that is lost, whatever was learnt.
    pub max_gap: Duration,
    /// Most time spent on checkpoints while no failure is foretold, in per cent of all time, above 0 to 100.
    pub budget_pct: f64,
    /// Mean time between failures before anything was seen, above zero; it counts as one failure.
    pub expected_mtbf: Duration,
    /// What a checkpoint costs before the first was taken, above zero.
    pub expected_cost: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            min_gap: Duration::from_mins(1),
            max_gap: Duration::from_mins(30),
            budget_pct: 5.0,
            expected_mtbf: Duration::from_hours(24),
            expected_cost: Duration::from_secs(1),
        }
    }
}

/// Limits that make no schedule.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum LimitsError {
    /// The gaps cross, or the longest is nothing.
    #[error(
        "the shortest gap between checkpoints is {min_gap:?} and the longest {max_gap:?}: the longest must be the longer one and above 0s"
    )]
    Gaps {
        /// The shortest.
        min_gap: Duration,
        /// The longest.
        max_gap: Duration,
    },
    /// The share of time is none.
    #[error("a budget of {found} % of the time for checkpoints: it has to be above 0 and at most 100")]
    Budget {
        /// What was given.
        found: f64,
    },
    /// An expected time of nothing.
    #[error("{what} is expected to be 0s: it has to be above")]
    Nothing {
        /// Which.
        what: &'static str,
    },
}

/// What was learnt of one service; keep it across restarts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Learned {
    /// Measured cost of a checkpoint, in seconds, an exponential mean; `None` before the first.
    pub cost_s: Option<f64>,
    /// Seconds worked, and failures, both fading with each failure; the prior counts as one failure.
    pub worked_s: f64,
    /// See `worked_s`.
    pub failures: f64,
    /// How the predictor did.
    pub trust: Trust,
    /// How the schedule did.
    pub account: Account,
}

/// The schedule of one service's checkpoints. Times are those of one monotonic clock; one that runs backwards stands still.
#[derive(Debug, Clone)]
pub struct Schedule {
    limits: Limits,
    learned: Learned,
    /// The last moment that was accounted for.
    at: Duration,
    running: bool,
    /// Seconds of work since the last checkpoint; `None`: there is no checkpoint.
    unprotected_s: f64,
    any: bool,
    /// `∫ h·w dt` since the last checkpoint, in seconds.
    expected_loss_s: f64,
    claim: Claim,
    warning: Option<OpenWarning>,
    attempts: u32,
    retry_at: Duration,
}

/// What the predictor says now.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Claim {
    /// It does not abstain.
    speaks: bool,
    /// Per second, uncalibrated.
    hazard: f64,
    /// The horizon that an urgent checkpoint is judged by, in seconds.
    horizon_s: f64,
    /// Expected time to the failure, in seconds.
    lead_s: Option<f64>,
    resource: Option<&'static str>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct OpenWarning {
    since: Duration,
    claimed: f64,
    /// The urgent checkpoint of this warning was taken.
    answered: bool,
    /// A warning that outlives this is a false one, and the next begins.
    longest_s: f64,
}

impl Schedule {
    /// A schedule that has learnt nothing, of a service that does not run yet.
    ///
    /// # Errors
    /// [`LimitsError`]
    pub fn new(limits: Limits) -> Result<Self, LimitsError> {
        Self::restore(
            limits,
            Learned {
                cost_s: None,
                worked_s: limits.expected_mtbf.as_secs_f64(),
                failures: 1.0,
                trust: Trust::default(),
                account: Account::default(),
            },
        )
    }

    /// A schedule that goes on with what was learnt before. Numbers that are none are left out.
    ///
    /// # Errors
    /// [`LimitsError`]
    pub fn restore(limits: Limits, learned: Learned) -> Result<Self, LimitsError> {
        let nothing = |what| Err(LimitsError::Nothing { what });
        if limits.max_gap.is_zero() || limits.min_gap > limits.max_gap {
            let Limits { min_gap, max_gap, .. } = limits;
            return Err(LimitsError::Gaps { min_gap, max_gap });
        }
        if !(limits.budget_pct > 0.0 && limits.budget_pct <= 100.0) {
            return Err(LimitsError::Budget {
                found: limits.budget_pct,
            });
        }
        if limits.expected_mtbf.is_zero() {
            return nothing("the time between failures");
        }
        if limits.expected_cost.is_zero() {
            return nothing("the cost of a checkpoint");
        }
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let rate_known = positive(learned.worked_s) && positive(learned.failures);
        let (worked_s, failures) = if rate_known {
            (learned.worked_s, learned.failures)
        } else {
            (limits.expected_mtbf.as_secs_f64(), 1.0)
        };
        Ok(Self {
            limits,
            learned: Learned {
                cost_s: learned.cost_s.filter(|cost| positive(*cost)),
                worked_s,
                failures,
                trust: learned.trust.checked(),
                account: learned.account.checked(),
            },
            at: Duration::ZERO,
            running: false,
            unprotected_s: 0.0,
            any: false,
            expected_loss_s: 0.0,
            claim: Claim::default(),
            warning: None,
            attempts: 0,
            retry_at: Duration::ZERO,
        })
    }

    /// What was learnt.
    pub fn learned(&self) -> &Learned {
        &self.learned
    }

    /// A checkpoint from before is there, `age` old in work.
    pub fn found(&mut self, age: Duration) {
        self.any = true;
        self.unprotected_s = age.as_secs_f64();
    }

    /// The newest one turned out to be damaged: another is due as if there were none.
    pub fn lost(&mut self) {
        self.any = false;
    }

    /// The service works, from `now` on.
    pub fn runs(&mut self, now: Duration) {
        self.advance(now);
        self.running = true;
    }

    /// The service stands still without having failed, from `now` on: nothing is lost meanwhile.
    pub fn pauses(&mut self, now: Duration) {
        self.advance(now);
        self.running = false;
    }

    /// Takes the risk as of `now`, one for each horizon, ascending, as the edge has it with each sample.
    pub fn hear(&mut self, now: Duration, risks: &[Risk]) {
        self.advance(now);
        self.claim = Claim::of(risks, self.cost_s());
        let warns = self.claim.speaks && self.claim.hazard >= ELEVATED / self.mtbf_s();
        match (&mut self.warning, warns) {
            (Some(open), true) if self.at.saturating_sub(open.since).as_secs_f64() < open.longest_s => {}
            (Some(_), still) => {
                self.end_warning(false);
                if still {
                    self.begin_warning(risks);
                }
            }
            (None, true) => self.begin_warning(risks),
            (None, false) => {}
        }
    }

    /// The service failed at `now`: what it did since the last checkpoint is lost.
    pub fn failed(&mut self, now: Duration) {
        self.advance(now);
        if !self.running {
            return;
        }
        let cost = Duration::from_secs_f64(self.cost_s());
        let foretold = self
            .warning
            .is_some_and(|warning| self.at.saturating_sub(warning.since) >= cost);
        self.learned.trust.failed(foretold);
        self.end_warning(true);
        self.learned
            .account
            .failed(self.unprotected_s, self.young_daly_s());
        self.learned.worked_s *= 1.0 - FADING;
        self.learned.failures = self.learned.failures * (1.0 - FADING) + 1.0;
        self.running = false;
        self.unprotected_s = 0.0;
        self.expected_loss_s = 0.0;
    }

    /// A checkpoint that was begun `spent` ago is complete at `now`. `copied_live`: the service worked on meanwhile, and that work is
    /// not in the copy; else it stood still for that time.
    pub fn took(&mut self, now: Duration, spent: Duration, copied_live: bool) {
        let before = self.unprotected_s;
        self.advance(now);
        let spent_s = spent.as_secs_f64();
        self.learn_cost(spent_s);
        self.any = true;
        self.unprotected_s = if copied_live {
            spent_s.min(self.unprotected_s)
        } else {
            self.learned.account.stood_still(self.unprotected_s - before);
            0.0
        };
        self.expected_loss_s = 0.0;
        self.attempts = 0;
        self.retry_at = Duration::ZERO;
        if let Some(warning) = &mut self.warning {
            warning.answered = true;
        }
    }

    /// An attempt that took `spent` came to nothing. The next ones are spaced, twice as far each time up to the longest gap.
    pub fn came_to_nothing(&mut self, now: Duration, spent: Duration) {
        self.advance(now);
        self.learned.account.paid(spent.as_secs_f64());
        let first = self.limits.min_gap.max(FIRST_RETRY).min(self.limits.max_gap);
        let wait = first
            .saturating_mul(1 << self.attempts.min(10))
            .min(self.limits.max_gap);
        self.attempts = self.attempts.saturating_add(1);
        self.retry_at = self.at.saturating_add(wait);
    }

    /// What to do at `now`.
    #[must_use]
    pub fn decide(&mut self, now: Duration, room: &Room) -> Verdict {
        self.advance(now);
        let Some(why) = self.why() else {
            return Verdict::Wait { until: self.due_at() };
        };
        match self.refusal(why, room) {
            Some(refusal) => Verdict::Skip(refusal),
            None => Verdict::Take(why),
        }
    }

    /// Measured cost of a checkpoint, in seconds.
    pub fn cost_s(&self) -> f64 {
        self.learned
            .cost_s
            .unwrap_or(self.limits.expected_cost.as_secs_f64())
    }

    /// Mean time between failures, in seconds.
    pub fn mtbf_s(&self) -> f64 {
        self.learned.worked_s / self.learned.failures
    }

    /// Young/Daly's interval without any predictor, in seconds, within the limits.
    pub fn young_daly_s(&self) -> f64 {
        let Limits { min_gap, max_gap, .. } = self.limits;
        (2.0 * self.cost_s() * self.mtbf_s())
            .sqrt()
            .clamp(min_gap.as_secs_f64(), max_gap.as_secs_f64())
    }

    /// Seconds of work that would be lost now.
    pub fn unprotected_s(&self) -> f64 {
        self.unprotected_s
    }

    /// When a checkpoint is due if the risk stays as it is.
    fn due_at(&self) -> Duration {
        if !self.running {
            return Duration::MAX;
        }
        let (w, h) = (self.unprotected_s, self.hazard());
        let left = (self.cost_s() - self.expected_loss_s).max(0.0);
        // w·t + t²/2 = left/h
        let integral = (w * w + 2.0 * left / h).sqrt() - w;
        let latest = (self.limits.max_gap.as_secs_f64() - w).max(0.0);
        let wait = integral.max(self.shortest_s() - w).min(latest);
        let wait = Duration::try_from_secs_f64(wait).unwrap_or(self.limits.max_gap);
        self.at.saturating_add(wait)
    }

    fn why(&self) -> Option<Why> {
        if !self.running {
            return None;
        }
        let w = self.unprotected_s;
        if !self.any {
            return Some(Why::First);
        }
        if w >= self.limits.max_gap.as_secs_f64() {
            return Some(Why::LongestGap);
        }
        if w >= self.limits.min_gap.as_secs_f64()
            && let Some(urgent) = self.urgent()
        {
            return Some(urgent);
        }
        // A microsecond of rounding must not make a due checkpoint wait another turn.
        let due = self.expected_loss_s >= self.cost_s() * (1.0 - 1e-9) && w >= self.shortest_s() - 1e-6;
        due.then_some(Why::Due)
    }

    fn urgent(&self) -> Option<Why> {
        self.warning.filter(|warning| !warning.answered)?;
        if self.learned.account.is_muted() {
            return None;
        }
        let hazard = self.claim.hazard * self.learned.trust.calibration();
        let probability = -(-hazard * self.claim.horizon_s).exp_m1();
        let cost = self.cost_s();
        let in_time = self.claim.lead_s.is_none_or(|lead| lead > cost);
        (probability * self.unprotected_s > cost && in_time).then_some(Why::Risk {
            probability,
            resource: self.claim.resource,
        })
    }

    fn refusal(&self, why: Why, room: &Room) -> Option<Refusal> {
        let wanted_bytes = room.needed_bytes.saturating_add(room.reserve_bytes);
        if room.free_bytes < wanted_bytes {
            return Some(Refusal::DiskNearlyFull {
                free_bytes: room.free_bytes,
                wanted_bytes,
            });
        }
        let disk_foretold = self.warning.is_some() && self.claim.resource == Some("disk");
        if disk_foretold && room.needed_bytes > room.free_bytes / DISK_SHARE {
            return Some(Refusal::WouldFillTheDisk);
        }
        if self.at < self.retry_at {
            return Some(Refusal::BackingOff { until: self.retry_at });
        }
        let overdue = self.unprotected_s >= 2.0 * self.limits.max_gap.as_secs_f64();
        match room.io_full {
            // One that waits for ever is worse than a slow one.
            Some(io_full) if io_full >= SATURATED && !overdue && !matches!(why, Why::Risk { .. }) => {
                Some(Refusal::Saturated { io_full })
            }
            _ => None,
        }
    }

    /// The hazard that the integral runs on, per second.
    fn hazard(&self) -> f64 {
        let base = 1.0 / self.mtbf_s();
        if !self.claim.speaks || self.learned.account.is_muted() {
            return base;
        }
        let silent = base * (1.0 - self.learned.trust.recall_low().min(RECALL_MAX));
        if self.warning.is_some() {
            silent + self.claim.hazard * self.learned.trust.calibration()
        } else {
            silent
        }
    }

    /// Least work between checkpoints, in seconds: the shortest gap, and outside of a warning what the budget leaves.
    fn shortest_s(&self) -> f64 {
        if self.warning.is_some() && !self.learned.account.is_muted() {
            return self.limits.min_gap.as_secs_f64();
        }
        let by_budget = self.cost_s() * (100.0 / self.limits.budget_pct - 1.0);
        by_budget
            .max(self.limits.min_gap.as_secs_f64())
            .min(self.limits.max_gap.as_secs_f64())
    }

    fn advance(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.at).as_secs_f64();
        self.at = self.at.max(now);
        if !self.running || passed <= 0.0 {
            return;
        }
        self.expected_loss_s += self.hazard() * (self.unprotected_s * passed + passed * passed / 2.0);
        self.unprotected_s += passed;
        self.learned.worked_s += passed;
        let (interval, cost) = (self.young_daly_s(), self.cost_s());
        self.learned.account.worked(passed, interval, cost);
        if let Some(warning) = &mut self.warning {
            warning.claimed += self.claim.hazard * passed;
        }
    }

    fn learn_cost(&mut self, spent_s: f64) {
        let spent_s = spent_s.max(COST_MIN_S);
        self.learned.account.paid(spent_s);
        self.learned.cost_s = Some(match self.learned.cost_s {
            Some(cost) => cost + COST_WEIGHT * (spent_s - cost),
            None => spent_s,
        });
    }

    fn begin_warning(&mut self, risks: &[Risk]) {
        let longest = risks
            .iter()
            .map(|risk| risk.horizon.seconds())
            .fold(0.0, f64::max);
        self.warning = Some(OpenWarning {
            since: self.at,
            claimed: 0.0,
            answered: false,
            longest_s: longest,
        });
    }

    fn end_warning(&mut self, hit: bool) {
        if let Some(warning) = self.warning.take() {
            let claimed = warning.claimed;
            self.learned.trust.warned(Warning { claimed, hit });
        }
    }
}

impl Claim {
    /// What counts is the shortest horizon that speaks and is twice as long as a checkpoint takes: what fails in a quarter of an hour
    /// is not yet urgent, and a checkpoint that would not be done in time helps nobody.
    fn of(risks: &[Risk], cost_s: f64) -> Self {
        let known = || {
            risks
                .iter()
                .filter_map(|risk| Some((risk, risk.hazards_per_s()?[1])))
                .filter(|(_, hazard)| hazard.is_finite())
        };
        let long_enough = known().find(|(risk, _)| risk.horizon.seconds() >= 2.0 * cost_s);
        let Some((risk, hazard)) = long_enough.or_else(|| known().next_back()) else {
            return Self::default();
        };
        Self {
            speaks: true,
            hazard,
            horizon_s: risk.horizon.seconds(),
            lead_s: risk.lead.map(|lead| lead.expected),
            resource: risk.resource,
        }
    }
}

/// A claimed hazard so many times the usual one is a warning.
const ELEVATED: f64 = 2.0;
/// Weight of the latest cost.
const COST_WEIGHT: f64 = 0.2;
/// A copy that takes no time at all still costs a millisecond.
const COST_MIN_S: f64 = 1e-3;
/// What each failure fades the earlier ones by: about the latest 64 count.
const FADING: f64 = 1.0 / 64.0;
/// The interval is stretched at most √10 times.
const RECALL_MAX: f64 = 0.9;
/// Share of time in which everything waits for the disk, from which on it counts as saturated. A judgement.
pub const SATURATED: f64 = 0.4;
/// Where a full disk is foretold, a copy may take a hundredth of what is free.
const DISK_SHARE: u64 = 100;
/// Least wait after an attempt that came to nothing.
const FIRST_RETRY: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests;
