//! Bulyan (El Mhamdi, Guerraoui and Rouault 2018), as Flower does it.

use super::RuleError;
use super::column::Column;
use super::gram::Gram;
use super::method::{Method, Plan, Round};

/// θ = n − 2f times the best row by Krum over the rows that are left, then per coordinate the mean of the θ − 2f chosen
/// values nearest to their median.
///
/// Needs n ≥ 4f + 3: breakdown point 1/4. Cost n²·d/2 for the distances once, then n² a choice instead of n²·d. Memory n²
/// numbers. Under privacy noise: usable. Sites that differ: fair.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bulyan;

impl Method for Bulyan {
    fn check(&self, n: usize, f: usize) -> Result<(), RuleError> {
        super::minority(n, f)?;
        let needed = f.saturating_mul(4).saturating_add(3);
        if n < needed {
            let (rule, condition) = ("bulyan", "n ≥ 4f + 3");
            return Err(RuleError::TooFewRows {
                rule,
                condition,
                needed,
                f,
                n,
            });
        }
        Ok(())
    }

    fn plan(&self, round: Round<'_>) -> Result<Plan, RuleError> {
        let Round { n, f, gram } = round;
        let selected = selections(gram, n - 2 * f, f);
        let keep = n - 4 * f;
        Ok(Plan::Columns {
            of: Some(selected),
            column: Column::Nearest { keep },
        })
    }
}

fn selections(gram: &Gram, count: usize, f: usize) -> Vec<usize> {
    let n = gram.count();
    // Each row's others from near to far; rows that were chosen are skipped.
    let others: Vec<Vec<(f64, usize)>> = (0..n)
        .map(|row| {
            let order = gram.nearest(row).into_iter().filter(|other| *other != row);
            order
                .map(|other| (gram.distance_squared(row, other), other))
                .collect()
        })
        .collect();
    let mut left = vec![true; n];
    let mut chosen = Vec::with_capacity(count);
    for taken in 0..count {
        // At least one, as Flower has it where few rows are left.
        let neighbours = (n - taken).saturating_sub(f + 2).max(1);
        let score = |row: usize| -> f64 {
            let near = others[row].iter().filter(|(_, other)| left[*other]);
            near.take(neighbours).map(|(distance, _)| distance).sum()
        };
        let mut best: Option<(f64, usize)> = None;
        for row in (0..n).filter(|row| left[*row]) {
            let score = score(row);
            if best.is_none_or(|(lowest, _)| score < lowest) {
                best = Some((score, row));
            }
        }
        let Some((_, row)) = best else { break };
        left[row] = false;
        chosen.push(row);
    }
    chosen
}
