//! The exact ε of full-batch Gaussian releases, without any discretisation.
//!
//! Releases with noise-to-sensitivity ratios r₁, r₂, … of the same unit are together one Gaussian release with
//! `μ = √(Σ 1/rᵢ²)`, and `δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ)` (Balle and Wang 2018, theorem 8; Dong, Roth and Su 2022, corollary 3.3).

use super::normal::{ln_density, mills, upper_tail};

/// The least ε ≥ 0 with δ(ε) ≤ `delta` for Gaussian releases of total `mu`; infinite when `mu` is.
pub(super) fn epsilon(mu: f64, delta: f64) -> f64 {
    if !mu.is_finite() {
        return f64::INFINITY;
    }
    let ln_delta = delta.ln();
    let fits = |epsilon: f64| ln_delta_of(mu, epsilon) <= ln_delta;
    if mu <= 0.0 || fits(0.0) {
        return 0.0;
    }
    // The tail bound of the privacy loss, N(μ²/2, μ²), is an upper end.
    let (mut low, mut high) = (0.0, mu * mu / 2.0 + mu * (-2.0 * ln_delta).sqrt());
    if !high.is_finite() {
        return f64::INFINITY;
    }
    while high - low > 1e-13 * high {
        let middle = f64::midpoint(low, high);
        if middle <= low || middle >= high {
            break;
        }
        if fits(middle) { high = middle } else { low = middle }
    }
    high
}

/// ln δ(ε).
fn ln_delta_of(mu: f64, epsilon: f64) -> f64 {
    let (near, far) = (epsilon / mu - mu / 2.0, epsilon / mu + mu / 2.0);
    // e^ε φ(far) = φ(near), so that neither overflows.
    if near < 5.0 {
        (upper_tail(near) - ln_density(near).exp() * mills(far)).ln()
    } else {
        ln_density(near) + (mills(near) - mills(far)).ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_release_is_the_published_value() {
        // dp-accounting 0.6.0, σ 0.5, δ 1e-5, one release.
        assert!((epsilon(2.0, 1e-5) / 9.997_256_146_434_303 - 1.0).abs() < 1e-10);
        // σ 0.5, 10 000 releases, δ 1e-6: far beyond what e^ε can hold.
        assert!((epsilon(200.0, 1e-6) / 20_949.696_568_160_947 - 1.0).abs() < 1e-10);
    }

    #[test]
    fn nothing_costs_nothing_and_no_noise_costs_everything() {
        assert!(epsilon(0.0, 1e-6) == 0.0 && epsilon(1e-9, 1e-6) == 0.0);
        assert!(epsilon(f64::INFINITY, 1e-6).is_infinite());
        assert!(epsilon(1e200, 1e-6).is_infinite());
        for mu in [1e-5, 1e-3, 1.0, 1e3, 1e9] {
            for delta in [f64::MIN_POSITIVE, 1e-300, 1e-6, 0.999] {
                assert!(epsilon(mu, delta) >= 0.0, "{mu} {delta}");
            }
        }
    }
}
