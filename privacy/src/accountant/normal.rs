//! The normal distribution, with its tails' digits kept.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

/// Probability that a standard normal exceeds `x`.
pub(super) fn upper_tail(x: f64) -> f64 {
    0.5 * libm::erfc(x * FRAC_1_SQRT_2)
}

/// Probability that a standard normal lies between `low` and `high`, from the tail that is nearer.
pub(super) fn between(low: f64, high: f64) -> f64 {
    let mass = if low > 0.0 {
        upper_tail(low) - upper_tail(high)
    } else if high < 0.0 {
        upper_tail(-high) - upper_tail(-low)
    } else {
        1.0 - upper_tail(-low) - upper_tail(high)
    };
    mass.max(0.0)
}

/// ln of the standard normal density.
pub(super) fn ln_density(x: f64) -> f64 {
    -0.5 * x * x - 0.5 * (2.0 * PI).ln()
}

/// Mills' ratio: upper tail over density, for any x that is not far below 0.
pub(super) fn mills(x: f64) -> f64 {
    if x < 5.0 {
        return upper_tail(x) / ln_density(x).exp();
    }
    // Laplace's continued fraction 1/(x + 1/(x + 2/(x + …))), from its inside; 60 levels give every digit from x = 5 on.
    let inner = (1..=60)
        .rev()
        .fold(x, |below, level| x + f64::from(level) / below);
    1.0 / inner
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of scipy.stats.norm.sf, and of its sf / pdf.
    #[test]
    fn tails_and_ratio_have_the_published_values() {
        for (x, tail) in [
            (0.0, 0.5),
            (1.0, 0.158_655_253_931_457_07),
            (-1.0, 0.841_344_746_068_542_9),
            (5.0, 2.866_515_718_791_933e-7),
            (10.0, 7.619_853_024_160_47e-24),
        ] {
            assert!(
                (upper_tail(x) / tail - 1.0).abs() < 1e-13,
                "{x}: {}",
                upper_tail(x)
            );
        }
        for x in [4.9, 5.1, 10.0, 30.0] {
            let direct = upper_tail(x) / ln_density(x).exp();
            assert!((mills(x) / direct - 1.0).abs() < 1e-12, "{x}");
        }
        assert!((mills(1e6) * 1e6 - 1.0).abs() < 1e-11);
    }

    #[test]
    fn intervals_add_up() {
        for (low, middle, high) in [(-3.0, -1.0, 2.0), (1.0, 2.0, 9.0), (-9.0, -8.0, -7.0)] {
            let (whole, parts) = (between(low, high), between(low, middle) + between(middle, high));
            assert!((parts / whole - 1.0).abs() < 1e-13);
        }
        assert!((between(f64::NEG_INFINITY, f64::INFINITY) - 1.0).abs() < 1e-15);
    }
}
