//! Cumulative probabilities of a half discrete Gaussian, in 127-bit whole numbers.
//!
//! Weights are `w_y = exp(−y²/2s²)` for y ≥ 0 and a power of two s. They follow from `r = exp(−1/2s²)` by `w_{y+1} = w_y · r^{2y+1}`, in
//! fixed point with 250 bits after the point; about a thousand products lose some ten of those.

use std::array::from_fn;

/// Where y lies when a uniform 127-bit number is drawn: the first y whose entry is above the number.
#[derive(Debug)]
pub(super) struct CumulativeTable {
    entries: Vec<u128>,
    /// For each value of the top [`GUIDE_BITS`] bits, the first y that is possible.
    guide: Vec<u16>,
}

impl CumulativeTable {
    /// For standard deviation s = 2^`deviation_log2`, cut off at 13 s: what lies beyond has mass 1.2e-38.
    pub(super) fn new(deviation_log2: u32) -> Self {
        let weights = weights(deviation_log2);
        let mut sums = Vec::with_capacity(weights.len());
        let mut sum = Fixed::ZERO;
        for weight in weights {
            sum = sum.plus(weight.shifted_right(HEADROOM));
            sums.push(sum);
        }
        let entries: Vec<u128> = sums.iter().map(|part| part.share_of(sum)).collect();
        let guide = (0..1_u128 << GUIDE_BITS)
            .map(|top| first_above(&entries, top << (127 - GUIDE_BITS)))
            .collect();
        Self { entries, guide }
    }

    /// The y of the 127-bit number `high`·2⁶⁴ + `low` (`high` has 63 bits). `low` is asked for only where it decides, which
    /// happens about once in 2⁵⁴ draws.
    pub(super) fn find(&self, high: u64, mut low: impl FnMut() -> u64) -> u64 {
        let top = usize::try_from(high >> (63 - GUIDE_BITS)).unwrap_or(0);
        let mut y = usize::from(self.guide[top]);
        let mut drawn_low = None;
        loop {
            let entry = self.entries[y];
            #[expect(clippy::cast_possible_truncation, reason = "the two halves of an entry")]
            let (entry_high, entry_low) = ((entry >> 64) as u64, entry as u64);
            let below = match high.cmp(&entry_high) {
                std::cmp::Ordering::Less => true,
                std::cmp::Ordering::Greater => false,
                std::cmp::Ordering::Equal => *drawn_low.get_or_insert_with(&mut low) < entry_low,
            };
            if below {
                return y as u64;
            }
            y += 1;
        }
    }
}

fn first_above(entries: &[u128], number: u128) -> u16 {
    let y = entries.partition_point(|entry| *entry <= number);
    u16::try_from(y).unwrap_or(u16::MAX)
}

fn weights(deviation_log2: u32) -> Vec<Fixed> {
    // exp(−2^−e), e = 2·log2 s + 1, by its series; each term is the last one times 2^−e / n.
    let exponent = 2 * deviation_log2 + 1;
    let (mut ratio, mut term) = (Fixed::ONE, Fixed::ONE);
    for n in 1.. {
        term = term.shifted_right(exponent).divided_by(n);
        if term == Fixed::ZERO {
            break;
        }
        ratio = if n % 2 == 1 {
            ratio.minus(term)
        } else {
            ratio.plus(term)
        };
    }
    let square = ratio.times(ratio);
    let (mut weight, mut step) = (Fixed::ONE, ratio);
    let mut weights = vec![weight];
    for _ in 0..13 << deviation_log2 {
        weight = weight.times(step);
        step = step.times(square);
        weights.push(weight);
    }
    weights
}

/// A number in [0, 64): 256 bits, of which [`FRACTION_BITS`] lie after the point; limbs from the lowest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fixed([u64; 4]);

impl Fixed {
    const ZERO: Self = Self([0; 4]);
    const ONE: Self = Self([0, 0, 0, 1 << (FRACTION_BITS - 192)]);

    fn plus(self, other: Self) -> Self {
        let mut carry = 0_u128;
        Self(from_fn(|i| {
            let sum = u128::from(self.0[i]) + u128::from(other.0[i]) + carry;
            carry = sum >> 64;
            low(sum)
        }))
    }

    fn minus(self, other: Self) -> Self {
        let mut borrow = false;
        Self(from_fn(|i| {
            let (first, under) = self.0[i].overflowing_sub(other.0[i]);
            let (second, again) = first.overflowing_sub(u64::from(borrow));
            borrow = under || again;
            second
        }))
    }

    fn times(self, other: Self) -> Self {
        let mut product = [0_u64; 8];
        for (i, a) in self.0.iter().enumerate() {
            let mut carry = 0_u128;
            for (j, b) in other.0.iter().enumerate() {
                let sum = u128::from(*a) * u128::from(*b) + u128::from(product[i + j]) + carry;
                product[i + j] = low(sum);
                carry = sum >> 64;
            }
            product[i + 4] = low(carry);
        }
        // Shift by the fraction's 250 bits = 3 limbs and 58 bits.
        let shift = FRACTION_BITS % 64;
        Self(from_fn(|i| {
            product[i + 3] >> shift | product[i + 4] << (64 - shift)
        }))
    }

    fn shifted_right(self, bits: u32) -> Self {
        let (limbs, bits) = ((bits / 64) as usize, bits % 64);
        let limb = |i: usize| self.0.get(i).copied().unwrap_or(0);
        Self(from_fn(|i| {
            let (here, above) = (limb(i + limbs), limb(i + limbs + 1));
            if bits == 0 {
                here
            } else {
                here >> bits | above << (64 - bits)
            }
        }))
    }

    fn divided_by(self, divisor: u64) -> Self {
        let mut quotient = [0; 4];
        let mut rest = 0_u128;
        for i in (0..4).rev() {
            let part = rest << 64 | u128::from(self.0[i]);
            quotient[i] = low(part / u128::from(divisor));
            rest = part % u128::from(divisor);
        }
        Self(quotient)
    }

    /// ⌊2¹²⁷ · self / whole⌋ by long division, for 0 < self ≤ whole < 2⁵.
    fn share_of(self, whole: Self) -> u128 {
        let (mut quotient, mut rest) = (0_u128, self);
        for position in 0..128 {
            quotient <<= 1;
            if rest.at_least(whole) {
                rest = rest.minus(whole);
                quotient |= 1;
            }
            if position < 127 {
                rest = rest.plus(rest);
            }
        }
        quotient
    }

    fn at_least(self, other: Self) -> bool {
        self.0.iter().rev().ge(other.0.iter().rev())
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is what is wanted")]
fn low(value: u128) -> u64 {
    value as u64
}

/// Bits after the point.
const FRACTION_BITS: u32 = 250;
/// Sums are kept this many bits lower, so that they cannot overflow.
const HEADROOM: u32 = 6;
/// Bits that the guide looks at.
const GUIDE_BITS: u32 = 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_the_cumulative_probabilities() {
        for log2 in [0_u32, 1, 3, 5] {
            let s = f64::from(1 << log2);
            let table = CumulativeTable::new(log2);
            let weight = |y: usize| (-((y * y) as f64) / (2.0 * s * s)).exp();
            let total: f64 = (0..=13 << log2).map(weight).sum();
            assert_eq!(table.entries.len(), (13 << log2) + 1);
            assert_eq!(*table.entries.last().unwrap(), 1 << 127, "the last entry is one");
            let mut sum = 0.0;
            for (y, entry) in table.entries.iter().enumerate() {
                sum += weight(y);
                let found = *entry as f64 / 127.0_f64.exp2();
                assert!((found - sum / total).abs() < 1e-14, "s {s}, y {y}: {found}");
            }
        }
    }

    /// The far tail, where differences of f64 sums would show nothing: ratios of neighbours, down to 2⁻¹⁰⁰.
    #[test]
    fn the_tail_keeps_its_digits() {
        let table = CumulativeTable::new(5);
        let mass = |y: usize| (table.entries[y] - table.entries[y - 1]) as f64;
        for y in [40_usize, 100, 200, 300] {
            let ratio = mass(y + 1) / mass(y);
            let exact = (-((2 * y + 1) as f64) / 2048.0).exp();
            assert!((ratio / exact - 1.0).abs() < 1e-9, "y {y}: {ratio} {exact}");
        }
    }

    #[test]
    fn the_search_agrees_with_the_definition_on_and_beside_every_edge() {
        let table = CumulativeTable::new(3);
        for entry in &table.entries {
            for number in [entry.wrapping_sub(1), *entry, entry + 1] {
                if number >= 1 << 127 {
                    continue;
                }
                let expected = table.entries.iter().position(|e| number < *e).unwrap() as u64;
                assert_eq!(table.find((number >> 64) as u64, || low(number)), expected);
            }
        }
    }
}
