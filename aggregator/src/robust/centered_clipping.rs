//! Centered clipping (Karimireddy, He and Jaggi 2021, algorithm 2), in Gram space.

use super::RuleError;
use super::method::{Method, Plan, Round};

/// v ← v + mean((x − v)·min(1, τ/‖x − v‖)), from zero. A row drags the result by at most τ/n a pass.
///
/// Breakdown point below 1/2 with a centre near the honest mean; from zero it is only as good as τ. Cost n²·d/2 for the
/// distances, n² a pass, one pass over the rows for the result. Memory n² numbers. Under privacy noise and with sites that
/// differ: good, but broken by attacks that know the history (Gorbunov et al., arXiv 2208.09894).
#[derive(Debug, Clone, Copy)]
pub(super) struct CenteredClipping {
    pub(super) tau: f64,
    pub(super) passes: u32,
    /// One call, or a second that starts where the first ended.
    pub(super) calls: u32,
}

impl Method for CenteredClipping {
    fn plan(&self, round: Round<'_>) -> Result<Plan, RuleError> {
        let n = round.n as f64;
        let mut weights = vec![0.0; round.n];
        for _ in 0..self.passes.saturating_mul(self.calls) {
            let distances = round.gram.distances_to(&weights);
            let shares: Vec<f64> = distances
                .iter()
                .map(|squared| {
                    if *squared > self.tau * self.tau {
                        self.tau / squared.sqrt()
                    } else {
                        1.0
                    }
                })
                .collect();
            let rest = 1.0 - shares.iter().sum::<f64>() / n;
            for (weight, share) in weights.iter_mut().zip(shares) {
                *weight = *weight * rest + share / n;
            }
        }
        Ok(Plan::Weights {
            scores: Some(weights.clone()),
            weights,
        })
    }
}
