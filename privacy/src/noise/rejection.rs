//! The reference sampler of the tests: the discrete Gaussian by rejection from the discrete Laplace (Canonne, Kamath and Steinke 2020,
//! algorithms 1 to 3), in 128-bit whole numbers. Written from the paper, sharing nothing with `split.rs` but the generator.

use super::source::SecureSource;

/// A draw with standard deviation `sigma`, a whole number up to 2²⁰.
pub(super) fn draw(sigma: u64, source: &mut SecureSource) -> i64 {
    let (sigma, scale) = (u128::from(sigma), u128::from(sigma) + 1);
    loop {
        let y = laplace(scale, source);
        // (|y| − σ²/t)² / 2σ² = (|y| t − σ²)² / 2σ²t².
        let gap = (u128::from(y.unsigned_abs()) * scale).abs_diff(sigma * sigma);
        if exp_coin(gap * gap, 2 * sigma * sigma * scale * scale, source) {
            return y;
        }
    }
}

fn laplace(scale: u128, source: &mut SecureSource) -> i64 {
    loop {
        let u = source.below(scale);
        if !exp_coin(u, scale, source) {
            continue;
        }
        let mut v = 0_u128;
        while exp_coin(1, 1, source) {
            v += 1;
        }
        let size = i64::try_from(u + scale * v).unwrap();
        let negative = source.below(2) == 1;
        if !(negative && size == 0) {
            return if negative { -size } else { size };
        }
    }
}

/// True with probability exp(−n/m).
fn exp_coin(mut n: u128, m: u128, source: &mut SecureSource) -> bool {
    while n > m {
        if !exp_coin(1, 1, source) {
            return false;
        }
        n -= m;
    }
    let mut rank = 1_u128;
    while source.below(m * rank) < n {
        rank += 1;
    }
    rank % 2 == 1
}

#[cfg(test)]
mod tests {
    use super::super::check::{DRAWS, Moments, chi_squared};
    use super::*;

    #[test]
    fn draws_follow_the_exact_probabilities() {
        for sigma in [3_u64, 16, 1 << 20] {
            let mut source = SecureSource::seeded(sigma);
            let draws: Vec<i64> = (0..DRAWS).map(|_| draw(sigma, &mut source)).collect();
            chi_squared(&draws, sigma as f64);
            Moments::of(&draws).check(sigma as f64);
        }
    }
}
