//! Intervals that hold what they promise: split conformal on the error of the time to failure.
//!
//! The score of a row is `|T − t̂| / (σ̂ + floor)`, with the time to failure `T`, its estimate `t̂` and the model's own
//! standard deviation `σ̂`. The interval is `t̂ ± q(σ̂ + floor)`, `q` the `⌈(n + 1)(1 − α)⌉`-th smallest score of rows that the
//! model was not fitted on (Papadopoulos et al., 2002; Lei et al., 2018). It covers `1 − α` of new rows that are like those; when they
//! are not, [`AdaptiveLevel`] moves α by what was missed (Gibbs and Candès, *Adaptive conformal inference under
//! distribution shift*, 2021, equation 2). The lab measures what that buys; an edge, which sees too few failures to move a level, keeps α.

use serde::{Deserialize, Serialize};

use super::{LeadTime, RiskError};

/// Part of the reach that is added to every standard deviation: a model is never surer than that.
const FLOOR_SHARE: f64 = 0.02;
/// Order statistics kept, so that a stored model holds no row.
const KEPT: usize = 400;

/// Quantiles of the scores.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConformalTime {
    /// Times are cut off here.
    reach: f64,
    /// Number of scores that the quantiles are of.
    rows: usize,
    /// The 0, 1/400, …, 1 quantiles, ascending.
    quantiles: Vec<f64>,
}

/// A row that the model was not fitted on: estimate, standard deviation and what came, the time cut off at the reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Held {
    /// `t̂`.
    pub expected: f64,
    /// `σ̂`.
    pub deviation: f64,
    /// `T`.
    pub time: f64,
}

impl ConformalTime {
    /// From rows that the model was not fitted on.
    ///
    /// # Errors
    /// [`RiskError::NoRows`]; [`RiskError::NotFinite`].
    pub fn fit(held: &[Held], reach: f64) -> Result<Self, RiskError> {
        let mut scores: Vec<f64> = held
            .iter()
            .map(|row| (row.time.min(reach) - row.expected).abs() / scale(row.deviation, reach))
            .collect();
        if scores.is_empty() {
            return Err(RiskError::NoRows);
        }
        if scores.iter().any(|score| !score.is_finite()) {
            return Err(RiskError::NotFinite);
        }
        scores.sort_by(f64::total_cmp);
        let last = scores.len() - 1;
        let quantiles = (0..=KEPT).map(|i| scores[(i * last).div_ceil(KEPT)]).collect();
        Ok(Self {
            reach,
            rows: scores.len(),
            quantiles,
        })
    }

    /// The interval at miscoverage `alpha`, 0 to 1.
    pub fn interval(&self, expected: f64, deviation: f64, alpha: f64) -> LeadTime {
        let half = self.quantile(alpha) * scale(deviation, self.reach);
        let high = expected + half;
        LeadTime {
            low: (expected - half).max(0.0),
            expected,
            high: (high < self.reach).then_some(high),
        }
    }

    fn quantile(&self, alpha: f64) -> f64 {
        let rank = ((self.rows as f64 + 1.0) * (1.0 - alpha)).ceil();
        if rank > self.rows as f64 {
            return f64::INFINITY;
        }
        let place = (rank - 1.0).max(0.0) / (self.rows as f64 - 1.0).max(1.0) * KEPT as f64;
        // Up to the next kept one: an interval may be a little too wide, never too narrow.
        let place = place.ceil();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "0 to 400: the rank is at most the number of rows"
        )]
        let place = place as usize;
        self.quantiles[place.min(self.quantiles.len() - 1)]
    }

    /// Whether a stored table is one.
    pub(super) fn is_whole(&self) -> bool {
        self.reach.is_finite()
            && self.reach > 0.0
            && self.rows > 0
            && self.quantiles.len() == KEPT + 1
            && self.quantiles.iter().all(|score| score.is_finite())
            && self.quantiles.windows(2).all(|pair| pair[0] <= pair[1])
    }
}

fn scale(deviation: f64, reach: f64) -> f64 {
    deviation + FLOOR_SHARE * reach
}

/// Miscoverage that follows what was really missed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdaptiveLevel {
    target: f64,
    step: f64,
    alpha: f64,
}

impl AdaptiveLevel {
    /// Aims at missing `target` of the outcomes, 0 to 1; `step` is γ, 0 to 1: too small follows slowly, too large
    /// swings.
    pub fn new(target: f64, step: f64) -> Self {
        let target = target.clamp(0.0, 1.0);
        Self {
            target,
            step: step.clamp(0.0, 1.0),
            alpha: target,
        }
    }

    /// The miscoverage to ask for now. Below 0 every interval is open, above 1 it is empty.
    pub fn alpha(&self) -> f64 {
        self.alpha.clamp(0.0, 1.0)
    }

    /// Told what share of one unit's intervals missed, 0 to 1. Something that is not a share is ignored.
    pub fn observe(&mut self, missed: f64) {
        if (0.0..=1.0).contains(&missed) {
            // Bounded, so that a long run to one side is not paid back for as long.
            self.alpha = (self.alpha + self.step * (self.target - missed)).clamp(-self.step, 1.0 + self.step);
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, SeedableRng as _};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    const REACH: f64 = 100.0;

    fn held(rng: &mut ChaCha8Rng, error: f64) -> Held {
        let time = rng.random_range(20.0..80.0);
        Held {
            expected: time + rng.random_range(-error..error),
            deviation: 5.0,
            time,
        }
    }

    fn coverage(table: &ConformalTime, rng: &mut ChaCha8Rng, error: f64) -> f64 {
        let hits = (0..4000).filter(|_| {
            let row = held(rng, error);
            table.interval(row.expected, row.deviation, 0.1).covers(row.time)
        });
        hits.count() as f64 / 4000.0
    }

    #[test]
    fn ninety_percent_intervals_cover_ninety_percent_of_rows_that_are_alike() {
        let seed = 7;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let rows: Vec<Held> = (0..4000).map(|_| held(&mut rng, 20.0)).collect();
        let table = ConformalTime::fit(&rows, REACH).unwrap();
        let covered = coverage(&table, &mut rng, 20.0);
        assert!((0.88..=0.92).contains(&covered), "seed {seed}: {covered}");
    }

    #[test]
    fn adaptive_level_regains_coverage_after_a_shift_that_breaks_the_fixed_one() {
        let seed = 8;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let rows: Vec<Held> = (0..4000).map(|_| held(&mut rng, 10.0)).collect();
        let table = ConformalTime::fit(&rows, REACH).unwrap();
        assert!(coverage(&table, &mut rng, 20.0) < 0.6, "the shift breaks nothing");
        let mut level = AdaptiveLevel::new(0.1, 0.02);
        let mut hits = 0;
        for round in 0..6000 {
            let row = held(&mut rng, 20.0);
            let covered = table
                .interval(row.expected, row.deviation, level.alpha())
                .covers(row.time);
            level.observe(f64::from(u8::from(!covered)));
            hits += u32::from(covered && round >= 1000);
        }
        let covered = f64::from(hits) / 5000.0;
        assert!((0.88..=0.92).contains(&covered), "seed {seed}: {covered}");
    }

    #[test]
    fn too_few_rows_for_the_level_give_an_open_interval() {
        let row = Held {
            expected: 50.0,
            deviation: 1.0,
            time: 50.0,
        };
        let table = ConformalTime::fit(&[row; 5], REACH).unwrap();
        let lead = table.interval(50.0, 1.0, 0.1);
        assert!(lead.low < f64::EPSILON && lead.high.is_none());
        assert!(matches!(ConformalTime::fit(&[], REACH), Err(RiskError::NoRows)));
    }

    #[test]
    fn a_time_beyond_the_reach_counts_as_the_reach() {
        let row = |time| Held {
            expected: 95.0,
            deviation: 1.0,
            time,
        };
        let table = ConformalTime::fit(&[row(1e9); 50], REACH).unwrap();
        let lead = table.interval(95.0, 1.0, 0.1);
        assert!(lead.covers(1e9) && !lead.covers(10.0));
    }

    #[test]
    fn what_is_no_share_does_not_move_the_level() {
        let mut level = AdaptiveLevel::new(0.1, 0.05);
        for bad in [f64::NAN, -1.0, 2.0, f64::INFINITY] {
            level.observe(bad);
        }
        assert!((level.alpha() - 0.1).abs() < 1e-12);
        for _ in 0..1000 {
            level.observe(1.0);
        }
        assert!(level.alpha() < f64::EPSILON);
    }
}
