//! Krum and Multi-Krum (Blanchard et al. 2017): rows by how near their nearest neighbours are.

use super::RuleError;
use super::gram::Gram;
use super::method::{Method, Plan, Round, smallest};
use super::options::range;

/// How many neighbours a score counts, and what it does with their squared distances.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Neighbours {
    /// The mean over n − f − 1 others: `ByzFL`'s, and ours.
    Mean,
    /// The sum over n − f − 2 others: the paper's and Flower's.
    Sum,
}

/// The row, or the mean of the rows, with the lowest scores; the lower index first where they are equal.
///
/// Breakdown point (n − 3)/2n. Cost n²·d/2 for the distances, one pass for the result. Memory n² numbers. Krum keeps one row:
/// bad where sites differ, refused where rows carry privacy noise (it would publish one site's whole noise). Multi-Krum:
/// fair where sites differ, usable under noise.
#[derive(Debug, Clone, Copy)]
pub(super) struct Krum {
    pub(super) neighbours: Neighbours,
    /// How many of the best rows; `None`: n − f.
    pub(super) keep: Option<usize>,
}

impl Method for Krum {
    fn check(&self, n: usize, f: usize) -> Result<(), RuleError> {
        super::minority(n, f)?;
        // With fewer, f rows that are equal have only each other for neighbours (Blanchard et al. 2017, proposition 1).
        let needed = f.saturating_mul(2).saturating_add(3);
        if self.neighbours == Neighbours::Sum && n < needed {
            let (rule, condition) = ("krum_flower", "n ≥ 2f + 3");
            return Err(RuleError::TooFewRows {
                rule,
                condition,
                needed,
                f,
                n,
            });
        }
        match self.keep {
            Some(keep) if keep > n => Err(range("keep", keep, "at most the number of updates")),
            _ => Ok(()),
        }
    }

    fn plan(&self, round: Round<'_>) -> Result<Plan, RuleError> {
        let Round { n, f, gram } = round;
        let scores = scores(gram, f, self.neighbours);
        let chosen = smallest(&scores, self.keep.unwrap_or(n - f));
        Ok(Plan::mean_of(&chosen, n, Some(scores)))
    }
}

fn scores(gram: &Gram, f: usize, neighbours: Neighbours) -> Vec<f64> {
    let n = gram.count();
    let count = n - f - if neighbours == Neighbours::Mean { 1 } else { 2 };
    let score = |row: usize| {
        let mut others: Vec<f64> = (0..n)
            .filter(|other| *other != row)
            .map(|other| gram.distance_squared(row, other))
            .collect();
        others.sort_unstable_by(f64::total_cmp);
        let sum: f64 = others.iter().take(count).sum();
        if neighbours == Neighbours::Mean {
            sum / count.max(1) as f64
        } else {
            sum
        }
    };
    (0..n).map(score).collect()
}
