//! The exact discrete Gaussian, quickly.
//!
//! Standard deviation k·s for powers of two k and s. A draw is `x = k·y + z`: y from a table of the half discrete Gaussian of deviation s, z
//! uniform below k, taken with probability `exp(−z(z + 2ky)/2k²s²)`. Then x has probability proportional to
//! `exp(−x²/2k²s²)`, x ≥ 0. Zero is dropped half of the time and a fair sign is added (the split as in Ducas, Durmus, Lepoint and Lyubashevsky
//! 2013, section 6; the coins as in Canonne, Kamath and Steinke 2020, algorithm 1).
//!
//! All in whole numbers: no float decides anything. Exact up to the table's last bit (2⁻¹²⁷) and its cut at 13 s, which has mass
//! 1.2e-38 for each draw and belongs to δ. Not constant in time.

use std::sync::LazyLock;

use super::source::SecureSource;
use super::table::CumulativeTable;

/// A sampler of one standard deviation.
#[derive(Debug)]
pub(crate) struct SplitGaussian {
    table: CumulativeTable,
    /// log2 of k.
    multiple_log2: u32,
    /// log2 of 2k²s², what exponents are counted in.
    unit_log2: u32,
}

/// log2 of the standard deviation that every release has, in steps of the grid.
pub(crate) const DEVIATION_LOG2: u32 = 20;

/// The sampler of every release: s = 32, k = 2¹⁵.
pub(crate) static RELEASE: LazyLock<SplitGaussian> =
    LazyLock::new(|| SplitGaussian::new(5, DEVIATION_LOG2 - 5));

impl SplitGaussian {
    /// Standard deviation 2^`base_log2` · 2^`multiple_log2`.
    pub(crate) fn new(base_log2: u32, multiple_log2: u32) -> Self {
        let unit_log2 = 2 * (base_log2 + multiple_log2) + 1;
        debug_assert!(multiple_log2 + unit_log2 <= 64, "one word holds both draws");
        Self {
            table: CumulativeTable::new(base_log2),
            multiple_log2,
            unit_log2,
        }
    }

    /// One draw.
    #[inline]
    pub(crate) fn draw(&self, source: &mut SecureSource) -> i64 {
        loop {
            let word = source.bits();
            let (sign, high) = (word & 1, word >> 1);
            let y = self.table.find(high, || source.bits());
            let word = source.bits();
            let z = word & ((1 << self.multiple_log2) - 1);
            let ky = y << self.multiple_log2;
            let exponent = z * (z + 2 * ky);
            if !self.survives(exponent, word >> self.multiple_log2, source) {
                continue;
            }
            let x = ky + z;
            if x == 0 && sign == 1 {
                continue;
            }
            let x = x.cast_signed();
            return if sign == 1 { -x } else { x };
        }
    }

    /// True with probability exp(−`exponent` / 2^unit): how often in a row coins of probability γ/1, γ/2, γ/3, … come up is even.
    /// `first` holds fresh random bits for the first coin.
    #[inline]
    fn survives(&self, exponent: u64, first: u64, source: &mut SecureSource) -> bool {
        let mask = (1_u64 << self.unit_log2) - 1;
        debug_assert!(exponent <= mask, "γ is at most 1, see the test");
        if first & mask >= exponent {
            return true;
        }
        let mut rank = 2_u128;
        loop {
            // A coin of γ and one of 1/rank.
            if source.bits() & mask >= exponent || source.below(rank) != 0 {
                return rank % 2 == 1;
            }
            rank += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{DRAWS, Moments, chi_squared};
    use super::*;

    #[test]
    fn exponents_stay_below_one() {
        // The largest y is 13 s and z < k: γ < k²(1 + 26 s)/2k²s² = (1 + 26 s)/2s².
        // With k = 1, z is 0 and so is the exponent.
        for base_log2 in [4_u32, 5] {
            let s = f64::from(1 << base_log2);
            assert!((1.0 + 26.0 * s) / (2.0 * s * s) <= 1.0, "s {s}");
        }
    }

    #[test]
    fn draws_follow_the_exact_probabilities_at_small_deviations() {
        for (base, multiple) in [(1, 0), (4, 0), (4, 1), (5, 2)] {
            let sampler = SplitGaussian::new(base, multiple);
            let mut source = SecureSource::seeded(u64::from(base * 100 + multiple));
            let deviation = f64::from(1 << (base + multiple));
            let draws: Vec<i64> = (0..DRAWS).map(|_| sampler.draw(&mut source)).collect();
            chi_squared(&draws, deviation);
            Moments::of(&draws).check(deviation);
        }
    }

    #[test]
    fn draws_follow_the_exact_probabilities_at_the_grid_of_releases() {
        let mut source = SecureSource::seeded(20);
        let draws: Vec<i64> = (0..DRAWS).map(|_| RELEASE.draw(&mut source)).collect();
        chi_squared(&draws, 20.0_f64.exp2());
        Moments::of(&draws).check(20.0_f64.exp2());
    }
}
