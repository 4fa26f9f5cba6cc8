//! How the tests judge a sampler of the discrete Gaussian: χ² against the exact probabilities, and moments.

/// Draws of each test.
pub(super) const DRAWS: usize = 2_000_000;

/// Compares the counts of about 66 cells with their exact probabilities, and those of the lowest bits with evenness.
pub(super) fn chi_squared(draws: &[i64], deviation: f64) {
    let width = whole((deviation / 8.0).round().max(1.0));
    let reach = whole((4.0 * deviation / width as f64).ceil());
    // Cells of `width` numbers around 0, and one for each tail.
    let cell = |x: i64| (x + width / 2).div_euclid(width).clamp(-reach, reach);
    let mut counts = vec![0_u64; usize::try_from(2 * reach + 1).unwrap()];
    for x in draws {
        counts[usize::try_from(cell(*x) + reach).unwrap()] += 1;
    }
    let bounds = |index: i64| {
        let low = index * width - width / 2;
        (low, low + width - 1)
    };
    let expected: Vec<f64> = (-reach..=reach)
        .map(|index| {
            let (low, high) = bounds(index);
            let mass = match index {
                i if i == -reach => mass(i64::MIN, high, deviation),
                i if i == reach => mass(low, i64::MAX, deviation),
                _ => mass(low, high, deviation),
            };
            mass * draws.len() as f64
        })
        .collect();
    judge(&counts, &expected, "values");
    if deviation >= 1000.0 {
        let mut low = [0_u64; 64];
        for x in draws {
            low[usize::try_from(x.rem_euclid(64)).unwrap()] += 1;
        }
        judge(&low, &[draws.len() as f64 / 64.0; 64], "lowest bits");
    }
}

#[expect(clippy::cast_possible_truncation, reason = "whole numbers far below 2^53")]
fn whole(value: f64) -> i64 {
    value as i64
}

/// Fails beyond five standard deviations of χ², and a little more for its skew: once in 10⁶ right samplers.
fn judge(counts: &[u64], expected: &[f64], what: &str) {
    let freedom = counts.len() as f64 - 1.0;
    let square: f64 = counts
        .iter()
        .zip(expected)
        .map(|(n, e)| (*n as f64 - e).powi(2) / e)
        .sum();
    assert!(
        square < freedom + 5.0 * (2.0 * freedom).sqrt() + 10.0,
        "{what}: χ² {square:.1} with {freedom} degrees of freedom"
    );
}

/// Exact probability of `low..=high`; an end at the limit of `i64` is open.
fn mass(low: i64, high: i64, deviation: f64) -> f64 {
    if deviation < 1000.0 {
        let reach = whole(40.0 * deviation);
        let weight = |x: i64| (-(x as f64).powi(2) / (2.0 * deviation * deviation)).exp();
        let sum = |from: i64, to: i64| (from..=to).map(weight).sum::<f64>();
        return sum(low.max(-reach), high.min(reach)) / sum(-reach, reach);
    }
    // Poisson summation: sums of the discrete weights are the integral's to beyond 200 digits; cells end between whole numbers.
    let tail = |x: f64| 0.5 * libm::erfc(x / deviation / std::f64::consts::SQRT_2);
    let below = if low == i64::MIN {
        1.0
    } else {
        tail(low as f64 - 0.5)
    };
    let above = if high == i64::MAX {
        0.0
    } else {
        tail(high as f64 + 0.5)
    };
    below - above
}

/// Mean, standard deviation and kurtosis.
pub(super) struct Moments {
    count: f64,
    mean: f64,
    deviation: f64,
    kurtosis: f64,
}

impl Moments {
    pub(super) fn of(draws: &[i64]) -> Self {
        let count = draws.len() as f64;
        let mean = draws.iter().map(|x| *x as f64).sum::<f64>() / count;
        let central = |power: i32| draws.iter().map(|x| (*x as f64 - mean).powi(power)).sum::<f64>() / count;
        let variance = central(2);
        Self {
            count,
            mean,
            deviation: variance.sqrt(),
            kurtosis: central(4) / variance / variance,
        }
    }

    /// Six standard errors of each.
    pub(super) fn check(&self, deviation: f64) {
        let near = |found: f64, expected: f64, error: f64, what: &str| {
            assert!(
                (found - expected).abs() < 6.0 * error,
                "{what} {found}, expected {expected}"
            );
        };
        near(self.mean, 0.0, deviation / self.count.sqrt(), "mean");
        near(
            self.deviation,
            deviation,
            deviation / (2.0 * self.count).sqrt(),
            "deviation",
        );
        near(self.kurtosis, 3.0, (24.0 / self.count).sqrt(), "kurtosis");
    }
}
