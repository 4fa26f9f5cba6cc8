//! The mean around the median (Xie, Koyejo and Gupta 2018, "Generalized Byzantine-tolerant SGD", definition 8).

use super::RuleError;
use super::column::Column;
use super::method::{Method, Plan, Round};

/// Per coordinate, the mean of the n − f values nearest to the median.
///
/// Breakdown point 1/2. Cost n·d·log²n comparisons in a network, one pass. Memory: one stripe of columns a thread. Under
/// privacy noise: as the median. Sites that differ: poor to fair.
#[derive(Debug, Clone, Copy)]
pub(super) struct Meamed;

impl Method for Meamed {
    fn needs_gram(&self) -> bool {
        false
    }
    fn plan(&self, round: Round<'_>) -> Result<Plan, RuleError> {
        let keep = round.n - round.f;
        Ok(Plan::Columns {
            of: None,
            column: Column::Nearest { keep },
        })
    }
}
