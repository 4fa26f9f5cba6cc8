//! The coordinate-wise trimmed mean (Yin et al. 2018, definition 2, with a count instead of a fraction).

use super::RuleError;
use super::column::Column;
use super::method::{Method, Plan, Round};

/// Per coordinate, the mean of what is left without exactly f lowest and exactly f highest values, summed in `f64`
/// in the order in which the selection leaves them, which depends on the values and their order in the column alone. With at most f hostile rows each coordinate stays between the honest minimum and maximum.
///
/// Breakdown point 1/2. Cost n·d·log²n comparisons in a network, one pass. Memory: one stripe of columns a thread. Under
/// privacy noise: attacks hide in the noise of each coordinate. Sites that differ: fair; good after `nnm`.
#[derive(Debug, Clone, Copy)]
pub(super) struct TrimmedMean;

impl Method for TrimmedMean {
    fn needs_gram(&self) -> bool {
        false
    }
    fn plan(&self, round: Round<'_>) -> Result<Plan, RuleError> {
        let (first, last) = (round.f, round.n - round.f - 1);
        Ok(Plan::Columns {
            of: None,
            column: Column::Ranks { first, last },
        })
    }
}
