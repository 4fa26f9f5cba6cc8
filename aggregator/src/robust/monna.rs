//! `MoNNA` (Farhadkhani et al. 2023): a trusted row and those nearest to it.

use super::RuleError;
use super::method::{Method, Plan, Round};
use super::options::range;

/// The mean of the n − f rows nearest to a reference row, itself included.
///
/// Breakdown point below 1/2 when the reference is honest, none when it is not: name a site that the aggregator's owner runs.
/// Cost n²·d/2 for the distances, one pass for the result. Memory n² numbers. Under privacy noise: usable. Sites that differ:
/// fair, drawn to the reference.
#[derive(Debug, Clone, Copy)]
pub(super) struct Monna {
    pub(super) reference: usize,
}

impl Method for Monna {
    fn check(&self, n: usize, f: usize) -> Result<(), RuleError> {
        super::minority(n, f)?;
        if self.reference >= n {
            return Err(range(
                "reference",
                self.reference,
                "below the number of updates, the first one is 0",
            ));
        }
        Ok(())
    }

    fn plan(&self, round: Round<'_>) -> Result<Plan, RuleError> {
        let mut near = round.gram.nearest(self.reference);
        near.truncate(round.n - round.f);
        Ok(Plan::mean_of(&near, round.n, None))
    }
}
