//! The arithmetic mean.

use super::RuleError;
use super::method::{Method, Plan, Round};

/// The mean of all rows, summed in `f64` in row order as the weighted sum that it is. Best when everybody is honest; one hostile row moves it anywhere
/// within the norm bound, so f is recorded and not used.
///
/// Breakdown point 0. Cost n·d, one pass. Memory: one stripe of columns a thread. Under privacy noise and with sites that
/// differ: best, when all are honest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mean;

impl Method for Mean {
    fn needs_gram(&self) -> bool {
        false
    }
    fn check(&self, n: usize, _f: usize) -> Result<(), RuleError> {
        super::minority(n, 0)
    }
    fn plan(&self, round: Round<'_>) -> Result<Plan, RuleError> {
        let weights = vec![1.0 / round.n as f64; round.n];
        Ok(Plan::Weights {
            weights,
            scores: None,
        })
    }
}
