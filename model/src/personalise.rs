//! Leaning on weights that were learnt elsewhere: how strongly, told by the last fifth of the host's own rows.
//!
//! ```text
//! W = argmin ‖X − A W‖² + λ‖W − W_prior‖²        every λ of LAMBDAS, fitted on the first four fifths
//! e_λ(t) = mean over channels of min(|x_t − a_t W|, 8)        on the last fifth, which no fit saw and which needs no labels
//! ```
//!
//! The usual λ stands unless another one is better there by more than chance; then that one is used, for a fit on all rows. A tail
//! of fewer than [`TAIL_ROWS_MIN`] rows chooses nothing: at 60 and 120 rows the choice cost .05 to .07 in VUS-PR on recorded
//! servers. The [gate](crate::gate) compares two models on the same tail, each at the λ that is chosen for it here.

use crate::LAG_COUNT;
use crate::arm::Path;
use crate::detector::ScaledRows;
use crate::forecaster::{Forecaster, ResidualNetwork};
use crate::ridge::{Lean, NormalEquations, Priors, Unsolvable};

/// Strengths that are tried beside the usual one; the last takes the prior almost as it is, and beside them stands a fit that leans
/// on nothing.
pub const LAMBDAS: [f64; 8] = [30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e6];

/// Fewest rows of a tail that λ is chosen on, so 300 rows in all.
pub const TAIL_ROWS_MIN: usize = 60;

/// Bound of one residual on the tail, in scaled units: an incident among the rows must not decide.
const RESIDUAL_MAX: f32 = 8.0;
/// Standard errors of a difference that are granted to chance.
pub(crate) const CHANCE: f64 = 2.0;

/// How a forecaster leans on its prior: λ of each path, own lags first; `None` = on nothing.
pub type Leaning = [Option<f64>; 2];

/// What the tail says about one prior.
#[derive(Debug)]
pub(crate) struct Chosen<'a> {
    /// What each path leans on; `None` = the usual λ.
    leans: [Option<Lean<'a>>; 2],
    /// Mean capped absolute residual of each row of the tail at those λ, fitted on the rows before it, summed over the paths.
    pub(crate) tail_errors: Vec<f64>,
    /// Of the rows before the tail.
    equations: NormalEquations,
}

/// First row of the tail, the last fifth.
fn tail_start(rows: usize) -> usize {
    rows - rows / 5
}

/// Fits the linear paths on `rows`, leaning on the prior as strongly as the tail asks for, and says how strongly that is.
///
/// # Errors
/// [`Unsolvable`] when a value was not finite.
pub(crate) fn fit(
    rows: &ScaledRows,
    priors: Priors<'_>,
    network: Option<ResidualNetwork>,
    paths: &[Path],
) -> Result<(Forecaster, Leaning), Unsolvable> {
    let split = tail_start(rows.rows());
    let (leans, mut equations, fitted) = if priors.is_some() && rows.rows() - split >= TAIL_ROWS_MIN {
        let chosen = choose(rows, priors, network.as_ref(), paths)?;
        (chosen.leans, chosen.equations, split)
    } else {
        ([None; 2], no_rows(rows.channels(), paths), 0)
    };
    for part in rows.with_lags(fitted..rows.rows()) {
        equations.add_rows(&rows.values, part);
    }
    let usual = Lean::on(priors, equations.usual_lambda());
    let leans = leans.map(|lean| lean.unwrap_or(usual));
    let (own, full) = (equations.solve_own(leans[0])?, equations.solve_full(leans[1])?);
    let forecaster = Forecaster::new(rows.channels(), own, full, network);
    Ok((forecaster, leans.map(Lean::lambda)))
}

/// Looks for the λ of each path that does best on the tail.
///
/// # Errors
/// [`Unsolvable`] when a value was not finite.
pub(crate) fn choose<'a>(
    rows: &ScaledRows,
    priors: Priors<'a>,
    network: Option<&ResidualNetwork>,
    paths: &[Path],
) -> Result<Chosen<'a>, Unsolvable> {
    let split = tail_start(rows.rows());
    let mut equations = no_rows(rows.channels(), paths);
    for part in rows.with_lags(0..split) {
        equations.add_rows(&rows.values, part);
    }
    let mut leans = [None; 2];
    let mut tail_errors = vec![0.0; rows.rows() - split];
    for path in paths {
        let candidate = |lean: Lean<'a>| -> Result<Candidate<'a>, Unsolvable> {
            let forecaster = solve(&equations, lean, network.cloned(), *path)?;
            Ok(Candidate {
                lean,
                errors: rows.errors_from(split, &forecaster, *path, RESIDUAL_MAX),
            })
        };
        let usual = candidate(Lean::on(priors, equations.usual_lambda()))?;
        let mut best = None;
        if priors.is_some() && rows.rows() - split >= TAIL_ROWS_MIN {
            let strengths = LAMBDAS.into_iter().map(|lambda| Lean::on(priors, lambda));
            for lean in std::iter::once(Lean::NOTHING).chain(strengths) {
                let next = candidate(lean)?;
                if best
                    .as_ref()
                    .is_none_or(|best: &Candidate<'_>| next.mean() < best.mean())
                {
                    best = Some(next);
                }
            }
        }
        let better = best.filter(|best| {
            let (gain, standard_error) = difference(&usual.errors, &best.errors);
            gain > CHANCE * standard_error
        });
        let errors = better.as_ref().map_or(&usual.errors, |better| &better.errors);
        tail_errors
            .iter_mut()
            .zip(errors)
            .for_each(|(sum, error)| *sum += error);
        leans[path.index()] = better.map(|better| better.lean);
    }
    Ok(Chosen {
        leans,
        tail_errors,
        equations,
    })
}

fn no_rows(channels: usize, paths: &[Path]) -> NormalEquations {
    if paths.contains(&Path::Full) {
        NormalEquations::new(channels)
    } else {
        NormalEquations::own_only(channels)
    }
}

/// What one λ gives on the tail.
struct Candidate<'a> {
    lean: Lean<'a>,
    errors: Vec<f64>,
}

impl Candidate<'_> {
    fn mean(&self) -> f64 {
        self.errors.iter().sum::<f64>() / self.errors.len().max(1) as f64
    }
}

/// Mean of the row by row differences `a − b`, and its standard error.
pub(crate) fn difference(a: &[f64], b: &[f64]) -> (f64, f64) {
    let count = a.len().max(1) as f64;
    let differences = || a.iter().zip(b).map(|(a, b)| a - b);
    let mean = differences().sum::<f64>() / count;
    let variance = differences().map(|d| (d - mean).powi(2)).sum::<f64>() / count;
    (mean, (variance / count).sqrt())
}

/// Solves one path; the other costs nothing and is not looked at.
fn solve(
    equations: &NormalEquations,
    lean: Lean<'_>,
    network: Option<ResidualNetwork>,
    path: Path,
) -> Result<Forecaster, Unsolvable> {
    let full = match path {
        Path::Own => Vec::new(),
        Path::Full => equations.solve_full(lean)?,
    };
    // Where there are no weights on all lags the full path is the own one.
    let own = if full.is_empty() {
        equations.solve_own(lean)?
    } else {
        vec![0.0; equations.channels() * (LAG_COUNT + 1)]
    };
    Ok(Forecaster::new(equations.channels(), own, full, network))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::feature::FeatureSchema;
    use crate::global::OwnLagWeights;
    use crate::normalise::Normaliser;
    use crate::series::Series;

    /// Two channels, `x_t = w x_{t−1} + u`.
    fn process(rows: usize, weight: f32, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut values: Vec<f32> = vec![0.0, 0.0];
        for t in 2..rows * 2 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let shock = (state >> 8) as f32 / 16_777_216.0 - 0.5;
            values.push(weight * values[t - 2] + shock);
        }
        values
    }

    /// Scaled by public constants: 0..1 to 0..1 around 0.
    fn scaled(values: Vec<f32>) -> ScaledRows {
        let schema = FeatureSchema::recorded("t", 2);
        ScaledRows::new(
            &Normaliser::public(&schema),
            &Series::new(2, values).unwrap(),
            Duration::from_mins(1),
        )
    }

    fn prior(weights: [f32; 5]) -> OwnLagWeights {
        OwnLagWeights::new(2, weights.repeat(2)).unwrap()
    }

    const PATHS: [Path; 2] = [Path::Own, Path::Full];

    /// Another way for four fifths, then as elsewhere: what the site saw before the tail misleads.
    #[test]
    fn good_foreign_weights_are_leant_on_more_than_usual_where_the_tail_says_so() {
        let mut values = process(1600, -0.5, 3);
        values.extend(process(400, 0.9, 7));
        let rows = scaled(values);
        let good = prior([0.9, 0.0, 0.0, 0.0, 0.0]);
        let (_, leaning) = fit(&rows, Priors::own_lag(Some(&good)), None, &PATHS).unwrap();
        let mut equations = NormalEquations::own_only(2);
        equations.add_rows(&rows.values, 0..rows.rows());
        let usual = equations.usual_lambda();
        assert!(leaning[0].unwrap() > usual, "usual {usual}, {leaning:?}");
    }

    #[test]
    fn bad_foreign_weights_are_left_where_the_tail_says_so() {
        let rows = scaled(process(600, 0.9, 7));
        let bad = prior([-0.9, 0.0, 0.0, 0.0, 0.0]);
        let (forecaster, leaning) = fit(&rows, Priors::own_lag(Some(&bad)), None, &PATHS).unwrap();
        assert!(
            leaning[0].is_none_or(|lambda| lambda <= 30.0),
            "{leaning:?} of a usual 1000"
        );
        assert!((forecaster.own[0] - 0.9).abs() < 0.15, "{:?}", forecaster.own);
        let good = prior([0.9, 0.0, 0.0, 0.0, 0.0]);
        let (_, leaning) = fit(&rows, Priors::own_lag(Some(&good)), None, &PATHS).unwrap();
        assert_eq!(
            leaning[0],
            Some(1000.0),
            "nothing is better than the usual by more than chance"
        );
    }

    #[test]
    fn without_a_prior_there_is_nothing_to_choose() {
        let rows = scaled(process(600, 0.9, 7));
        let (forecaster, leaning) = fit(&rows, Priors::default(), None, &PATHS).unwrap();
        assert_eq!(leaning, [None, None]);
        let mut equations = NormalEquations::new(2);
        equations.add_rows(&rows.values, 0..rows.rows());
        assert_eq!(forecaster.own, equations.solve_own(Lean::NOTHING).unwrap());
        assert_eq!(forecaster.full, equations.solve_full(Lean::NOTHING).unwrap());
    }

    #[test]
    fn on_a_short_tail_the_usual_strength_stands() {
        for rows in [1, 4, 11, 20, 120, 299] {
            let (_, leaning) = fit(
                &scaled(process(rows, 0.5, 3)),
                Priors::own_lag(Some(&prior([0.19; 5]))),
                None,
                &PATHS,
            )
            .unwrap();
            assert!(
                leaning.iter().all(|lambda| *lambda == Some(1000.0)),
                "{rows} rows: {leaning:?}"
            );
        }
    }

    #[test]
    fn values_that_are_not_finite_are_an_error() {
        let mut rows = scaled(process(100, 0.5, 3));
        rows.values[60] = f32::NAN;
        assert!(fit(&rows, Priors::own_lag(Some(&prior([0.19; 5]))), None, &PATHS).is_err());
    }
}
