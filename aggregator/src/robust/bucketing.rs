//! Bucketing (Karimireddy, He and Jaggi 2022, algorithm 1): means of s rows each, after a permutation.

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{RngCore as _, SeedableRng as _};

use super::RuleError;
use super::method::{Mixed, Round, Stage};
use super::mix::Mix;

/// Means of `size` rows; the last bucket may be short. One hostile row spoils its bucket, so f stays and n shrinks by `size`:
/// s·f < n/2 is needed, which two of a bucket do not leave at 30 % hostile.
///
/// Cost n·d. Memory: one stripe of columns a thread. Under privacy noise and with sites that differ: good.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bucketing {
    pub(super) size: usize,
    /// Seed of the permutation; `None`: rows in their order.
    pub(super) seed: Option<u64>,
}

impl Stage for Bucketing {
    fn needs_gram(&self) -> bool {
        false
    }
    fn rows_after(&self, n: usize) -> usize {
        n.div_ceil(self.size)
    }
    fn check(&self, n: usize, f: usize) -> Result<(), RuleError> {
        super::minority(n, f)?;
        let buckets = self.rows_after(n);
        if f.saturating_mul(2) >= buckets {
            return Err(RuleError::BucketsTooLarge {
                size: self.size,
                buckets,
                f,
                n,
            });
        }
        Ok(())
    }
    fn mix(&self, round: Round<'_>) -> Mixed {
        let order = match self.seed {
            Some(seed) => permutation(round.n, seed),
            None => (0..round.n).collect(),
        };
        let buckets = order.chunks(self.size).map(<[usize]>::to_vec).collect();
        Mixed {
            mix: Mix::means(buckets, round.n),
            f: round.f,
            permutation: self.seed.map(|_| order),
        }
    }
}

/// Fisher and Yates' shuffle over `ChaCha20`; part of the record's format, so it never changes.
fn permutation(n: usize, seed: u64) -> Vec<usize> {
    let mut random = ChaCha20Rng::seed_from_u64(seed);
    let mut order: Vec<usize> = (0..n).collect();
    for last in (1..n).rev() {
        let choices = last as u64 + 1;
        // Draws above the last whole multiple would favour the first places.
        let limit = u64::MAX - u64::MAX % choices;
        let draw = std::iter::repeat_with(|| random.next_u64()).find(|draw| *draw < limit);
        order.swap(last, usize::try_from(draw.unwrap_or(0) % choices).unwrap_or(0));
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_one_permutation_for_ever() {
        let order = permutation(12, 7);
        assert_eq!(order, permutation(12, 7));
        assert_ne!(order, permutation(12, 8));
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..12));
        // Written down: rounds on record are replayed with it.
        assert_eq!(order, RECORDED);
    }

    const RECORDED: [usize; 12] = [4, 8, 3, 7, 5, 1, 0, 11, 6, 10, 2, 9];
}
