//! Made lives of services: one resource each, as a share of its limit, seeded. Leaks of several shapes, and things that
//! look like leaks and are none.

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use theriac_model::risk::exhaustion::{Extrapolation, Track};
use theriac_model::risk::predictor::Settings;
use theriac_model::risk::{Abstain, Horizon, Outcome, RiskError, TrainingSet, trend};

use super::dataset::{DataError, Dataset, Floor};

/// Longest life, in seconds.
const LIFE_S: f64 = 7_200.0;
/// Between two samples, in seconds. An edge samples more often and averages over as long.
const STEP_S: f64 = 5.0;
/// Between two rows that are judged, in samples.
const ROW_EVERY: usize = 6;
/// Window of the plain line that is the floor, in seconds.
const FLOOR_WINDOW_S: f64 = 300.0;
const EDGES: [f64; 9] = [0.0, 30.0, 60.0, 120.0, 300.0, 600.0, 900.0, 1_300.0, 1_800.0];
/// One row in four is fitted on.
const STRIDE: usize = 4;

/// How a resource goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// Load and noise only.
    Quiet,
    /// Grows and levels off below the limit: a cache that fills.
    Plateau,
    /// Grows and is collected, again and again, never to the limit.
    Sawtooth,
    /// A steady leak, from some time on.
    Leak,
    /// A leak that gets faster.
    Accelerating,
    /// Steps at random times: descriptors, log rotation.
    Staircase,
    /// A leak that ends before the limit.
    Ended,
    /// A collected resource whose floor rises.
    LeakySawtooth,
    /// Jumps to the limit without a sign: nobody can know.
    Sudden,
}

/// Shapes by how often they come, in percent.
const SHARES: [(Shape, u32); 9] = [
    (Shape::Quiet, 22),
    (Shape::Plateau, 11),
    (Shape::Sawtooth, 11),
    (Shape::Leak, 20),
    (Shape::Accelerating, 9),
    (Shape::Staircase, 9),
    (Shape::Ended, 9),
    (Shape::LeakySawtooth, 7),
    (Shape::Sudden, 2),
];

/// Makes `lives` of them. The same seed gives the same lives.
pub(super) fn make(seed: u64, lives: u32) -> Result<Dataset, DataError> {
    let horizons = Horizon::DEFAULT.map(Horizon::seconds);
    let mut settings = Settings::new(trend::names(), EDGES.to_vec(), horizons.to_vec());
    settings.stride = STRIDE;
    let judged: Vec<Vec<Row>> = (0..lives)
        .into_par_iter()
        .map(|life| judge(&shares(seed, life)))
        .collect::<Result<_, _>>()?;
    let mut set = TrainingSet::new(settings.features.len())?;
    let mut floor = Vec::new();
    let mut fallback = Vec::new();
    for (life, rows) in (0..lives).zip(judged) {
        for row in rows {
            set.push(life, &row.features, row.outcome)?;
            floor.push(row.floor);
            fallback.push(row.fallback);
        }
    }
    Ok(Dataset {
        name: "ramps",
        time_unit: "s",
        unit_word: "lives",
        settings,
        set,
        floor: Floor::Scores(vec![floor; horizons.len()]),
        fallback: Some(fallback),
    })
}

/// Shares of the limit in use, one for each [`STEP_S`]; the first one at or over 1 is the last.
pub(super) fn shares(seed: u64, life: u32) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(u64::from(life));
    let course = Course::draw(&mut rng);
    let mut noise = 0.0;
    let mut shares = Vec::new();
    let mut at_s = 0.0;
    while at_s < LIFE_S {
        // Correlated over about half a minute, as load is.
        noise = 0.8 * noise + course.noise * gaussian(&mut rng);
        let share = (course.at(at_s) + noise).max(0.0);
        shares.push(share);
        if share >= 1.0 {
            break;
        }
        at_s += STEP_S;
    }
    shares
}

struct Course {
    shape: Shape,
    base: f64,
    noise: f64,
    load: f64,
    load_period_s: f64,
    start_s: f64,
    /// How high it rises before it stops, where it does.
    height: f64,
    /// Time to fill what is left, to level off, or between two collections.
    time_s: f64,
    /// Times of the steps of a staircase.
    steps_s: Vec<f64>,
}

impl Course {
    fn draw(rng: &mut ChaCha8Rng) -> Self {
        let mut left = rng.random_range(0..100);
        let shape = SHARES.iter().find(|(_, share)| {
            let here = left < *share;
            left = left.saturating_sub(*share);
            here
        });
        let shape = shape.map_or(Shape::Quiet, |(shape, _)| *shape);
        let base = rng.random_range(0.1..0.7);
        let load = rng.random_range(0.0..0.06);
        let start_s = rng.random_range(0.0..3_600.0);
        // Three minutes to two hours, evenly over orders of magnitude.
        let time_s = 180.0 * 40.0_f64.powf(rng.random_range(0.0..1.0));
        let mut steps_s: Vec<f64> = (0..rng.random_range(4..30_u32))
            .map(|_| start_s + time_s * rng.random_range(0.0..1.3))
            .collect();
        steps_s.sort_by(f64::total_cmp);
        Self {
            shape,
            base,
            noise: 0.001 * 15.0_f64.powf(rng.random_range(0.0..1.0)),
            load,
            load_period_s: rng.random_range(600.0..4_000.0),
            start_s,
            height: (0.92 - base - load) * rng.random_range(0.3..1.0),
            time_s,
            steps_s,
        }
    }

    fn at(&self, at_s: f64) -> f64 {
        let load = self.load * (at_s / self.load_period_s * std::f64::consts::TAU).sin();
        self.base + load + self.grown((at_s - self.start_s).max(0.0), at_s)
    }

    fn grown(&self, since_s: f64, at_s: f64) -> f64 {
        let room = 1.0 - self.base;
        let leak = room * since_s / self.time_s;
        match self.shape {
            Shape::Quiet => 0.0,
            Shape::Plateau => self.height * -(-3.0 * since_s / self.time_s).exp_m1(),
            Shape::Sawtooth => self.height * (at_s / (self.time_s / 4.0)).fract(),
            Shape::Leak => leak,
            Shape::Accelerating => room * (since_s / self.time_s).powi(2),
            Shape::Staircase => {
                let taken = self.steps_s.partition_point(|step| *step <= at_s);
                room * 1.1 * taken as f64 / self.steps_s.len() as f64
            }
            Shape::Ended => leak.min(self.height),
            Shape::LeakySawtooth => {
                leak + (self.height * 0.4).max(0.0) * (at_s / (self.time_s / 8.0)).fract()
            }
            Shape::Sudden => room * 1.2 * f64::from(u8::from(since_s > self.time_s / 2.0)),
        }
    }
}

/// A row of a life as the models see it.
struct Row {
    features: Vec<f64>,
    outcome: Outcome,
    floor: f64,
    fallback: Result<Extrapolation, Abstain>,
}

fn judge(shares: &[f64]) -> Result<Vec<Row>, RiskError> {
    let mut track = Track::new(&Horizon::DEFAULT)?;
    let end_s = (shares.len() - 1) as f64 * STEP_S;
    let failed = shares.last().is_some_and(|share| *share >= 1.0);
    let mut rows = Vec::new();
    for (sample, share) in shares.iter().enumerate() {
        let at_s = sample as f64 * STEP_S;
        track.push(at_s, *share);
        if !sample.is_multiple_of(ROW_EVERY) || *share >= 1.0 {
            continue;
        }
        let Some(course) = track.course() else { continue };
        let Ok(features) = trend::features(&course) else {
            continue;
        };
        let left = end_s - at_s;
        let outcome = if failed {
            Outcome::failed(left)?
        } else {
            Outcome::censored(left)?
        };
        rows.push(Row {
            features,
            outcome,
            floor: plain_line(&shares[..=sample]),
            fallback: track.extrapolate(),
        });
    }
    Ok(rows)
}

/// The obvious method: least squares through the last five minutes; the nearer the limit on it, the greater the score.
/// The score is the inverse of the time to the limit per second, 0 where nothing grows.
fn plain_line(shares: &[f64]) -> f64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "sixty samples"
    )]
    let window = (FLOOR_WINDOW_S / STEP_S) as usize;
    let points = &shares[shares.len().saturating_sub(window)..];
    let n = points.len() as f64;
    let middle = (n - 1.0) / 2.0;
    let mean = points.iter().sum::<f64>() / n;
    let (mut together, mut spread) = (0.0, 0.0);
    for (at, share) in points.iter().enumerate() {
        together += (at as f64 - middle) * (share - mean);
        spread += (at as f64 - middle).powi(2);
    }
    let slope = if spread > 0.0 {
        together / spread / STEP_S
    } else {
        0.0
    };
    let now = mean + slope * middle * STEP_S;
    slope.max(0.0) / (1.0 - now).max(1e-6)
}

/// Box and Muller.
fn gaussian(rng: &mut ChaCha8Rng) -> f64 {
    let (u, v): (f64, f64) = (rng.random_range(f64::MIN_POSITIVE..1.0), rng.random());
    (-2.0 * u.ln()).sqrt() * (v * std::f64::consts::TAU).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_lives_and_another_others() {
        let bits = |seed, life| -> Vec<u64> { shares(seed, life).into_iter().map(f64::to_bits).collect() };
        assert_eq!(bits(1, 3), bits(1, 3));
        assert_ne!(bits(1, 3), bits(2, 3));
        assert_ne!(bits(1, 3), bits(1, 4));
    }

    #[test]
    fn some_lives_end_at_the_limit_and_some_do_not() {
        let failed = (0..100)
            .filter(|life| shares(5, *life).last().is_some_and(|share| *share >= 1.0))
            .count();
        assert!((20..70).contains(&failed), "{failed} of 100");
    }

    #[test]
    fn a_plain_line_tells_the_time_of_a_straight_ramp() {
        let ramp: Vec<f64> = (0..100).map(|i| 0.2 + 0.005 * f64::from(i)).collect();
        // 0.305 are left at 0.001 a second.
        assert!((1.0 / plain_line(&ramp) - 305.0).abs() < 1.0);
        assert!(plain_line(&[0.5; 80]).abs() < 1e-12);
    }
}
