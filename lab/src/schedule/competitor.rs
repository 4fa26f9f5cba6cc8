//! The schedules that are compared, each over one life of the service.

use std::time::Duration;

use theriac_heal::checkpoint::schedule::{Limits, LimitsError, Room, Schedule, Verdict};
use theriac_model::risk::{Abstain, Chance, Horizon, LeadTime, Risk, RiskVersion};

use super::foresight::{LEAD_S, Life};

/// Waste in seconds when a checkpoint ends every `period_s`: checkpoints, and all since the end of the last one.
pub(super) fn fixed(length_s: f64, period_s: f64, cost_s: f64) -> f64 {
    let taken = (length_s / period_s).floor();
    taken * cost_s + (length_s - taken * period_s)
}

/// The schedule of the edge. It begins with its defaults for what it has to learn.
pub(super) struct Ours {
    schedule: Schedule,
    /// Virtual time at which the present life began.
    from_s: f64,
}

impl Ours {
    pub(super) fn new() -> Result<Self, LimitsError> {
        let mut schedule = Schedule::new(Limits {
            min_gap: Duration::from_secs(5),
            max_gap: Duration::from_hours(24),
            // The others have no budget either.
            budget_pct: 100.0,
            ..Limits::default()
        })?;
        schedule.found(Duration::ZERO);
        Ok(Self {
            schedule,
            from_s: 0.0,
        })
    }

    /// Waste in seconds over one life.
    pub(super) fn live(&mut self, life: &Life) -> f64 {
        let from_s = self.from_s;
        let when = |at: f64| Duration::from_secs_f64(from_s + at);
        let (mut at, mut protected_at, mut spent) = (0.0, 0.0, 0.0);
        self.schedule.runs(when(0.0));
        loop {
            self.schedule.hear(when(at), &risks(life, at));
            let due = match self.schedule.decide(when(at), &AMPLE) {
                Verdict::Take(_) => {
                    let done = at + life.cost_s;
                    if done >= life.length_s {
                        break;
                    }
                    let cost = Duration::from_secs_f64(life.cost_s);
                    self.schedule.took(when(done), cost, false);
                    spent += life.cost_s;
                    (at, protected_at) = (done, done);
                    continue;
                }
                Verdict::Wait { until } => until.as_secs_f64() - from_s,
                Verdict::Skip(_) => f64::INFINITY,
            };
            // At least a millisecond on: what is due is due a rounding error later.
            let next = life.next_word(at).min(due.max(at + 1e-3));
            if next >= life.length_s {
                break;
            }
            at = next;
        }
        self.schedule.failed(when(life.length_s));
        self.from_s += life.length_s;
        spent + life.length_s - protected_at
    }
}

/// What the predictor says. Leads are spread evenly, so a share of the claim falls within the minute.
fn risks(life: &Life, at: f64) -> Vec<Risk> {
    let claim = life.claim_at(at);
    Horizon::DEFAULT
        .iter()
        .map(|horizon| {
            let within = (horizon.seconds() - LEAD_S.start) / (LEAD_S.end - LEAD_S.start);
            let chance = (claim * within.min(1.0)).max(1e-9);
            Risk {
                horizon: *horizon,
                chance: if life.predicted {
                    Ok(Chance::new(chance, chance, chance))
                } else {
                    Err(Abstain::NoLimit)
                },
                lead: (claim > 0.0).then_some(LeadTime {
                    low: LEAD_S.start,
                    expected: f64::midpoint(LEAD_S.start, LEAD_S.end),
                    high: Some(LEAD_S.end),
                }),
                resource: (claim > 0.0).then_some("memory"),
                model: RiskVersion::linear(),
            }
        })
        .collect()
}

const AMPLE: Room = Room {
    free_bytes: u64::MAX,
    needed_bytes: 0,
    reserve_bytes: 0,
    io_full: None,
};
