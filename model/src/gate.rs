//! Accept a new global model, or keep the own one.
//!
//! Refusing costs nothing: the host goes on with what it has. So a model must earn its place on this host's own rows.

use crate::LAG_MAX;
use crate::detector::{Detector, Path, ScaledRows, forecaster, local_scaler};
use crate::forecaster::{Forecaster, ResidualNetwork};
use crate::global::{GlobalModel, OwnLagWeights};
use crate::ridge::{NormalEquations, Unsolvable};
use crate::series::Series;
use crate::window::lags_of;

/// Fewest rows to judge a model on: a fifth of them is the tail.
pub const GATE_ROWS_MIN: usize = 60;

/// How much worse, in mean absolute residual, a model may be on the tail. A model that ranks faults better need not forecast calm
/// rows better: at 2 % the gate kept honest models from 3 of 52 new sites.
const WORSE_MAX: f64 = 0.05;
/// Standard errors of that difference that are granted to chance: a fifth of 120 rows is 24.
const CHANCE: f64 = 2.0;
/// How much worse, in capped squared residual on all rows, a model may be as it came, against the public constant. Weights that lean on
/// the last row are up to 1.1 times as bad on a channel that is pure noise here and is none elsewhere.
const HARM_MAX: f64 = 1.2;
/// Bound of one residual in either mean, in scaled units: an incident among the rows must not decide.
const RESIDUAL_MAX: f32 = 8.0;

/// What the gate decided.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum GateOutcome {
    /// Use this detector: fitted on all rows with the global model as prior.
    Accepted(Box<Detector>),
    /// The model forecasts this host's own rows worse than what the host has.
    WorseOnTail,
    /// A value of the model, or of what came of it, is not finite.
    NonFinite,
    /// The model is for another number of channels.
    LayoutMismatch,
    /// There are too few rows to judge.
    TooFewRows,
}

/// Judges a global model on the host's own history, oldest row first, without rows of alarms or actions.
///
/// Two tests must pass. *As it came*, the own-lag part must not be worse than the public constant by more than 20 % in
/// capped squared residual over all rows: that floors the harm of a poisoned model however few rows there are.
/// *In use*, a fit on the first four fifths with the model as prior must not be worse on the last fifth than the
/// same fit with the current prior by more than 5 % in mean absolute residual; a difference within two standard errors of the
/// rows' differences is chance and counts for the model.
pub fn judge(current: &Detector, history: &Series, global: &GlobalModel) -> GateOutcome {
    let channels = current.schema().channels();
    if global.channels() != channels || history.channels() != channels {
        return GateOutcome::LayoutMismatch;
    }
    if global.values().iter().any(|v| !v.is_finite()) {
        return GateOutcome::NonFinite;
    }
    if history.rows() < GATE_ROWS_MIN {
        return GateOutcome::TooFewRows;
    }
    match passes(current, history, global) {
        Ok(true) => match current.refit_with_global(history, global) {
            Ok(detector) => GateOutcome::Accepted(Box::new(detector)),
            Err(_) => GateOutcome::NonFinite,
        },
        Ok(false) => GateOutcome::WorseOnTail,
        Err(Unsolvable { .. }) => GateOutcome::NonFinite,
    }
}

fn passes(current: &Detector, history: &Series, global: &GlobalModel) -> Result<bool, Unsolvable> {
    let channels = global.channels();
    let rows = ScaledRows::new(&local_scaler(current.schema(), history, true), history);
    let constant = OwnLagWeights::public_constant(channels);
    let own_lag = global.own_lag();
    if squared_as_is(&rows, channels, &own_lag) > HARM_MAX * squared_as_is(&rows, channels, &constant) {
        return Ok(false);
    }
    let split = rows.rows() - rows.rows() / 5;
    let mut equations = NormalEquations::new(channels);
    equations.add_rows(&rows.values, 0..split);
    let network = ResidualNetwork::new(channels, global.network());
    let candidate = forecaster(&equations, Some(&own_lag), network)?;
    let prior = current.options().prior.as_ref();
    let kept = forecaster(&equations, prior, current.forecaster.network.clone())?;
    let (candidate, kept) = (
        tail_errors(&rows, &candidate, split),
        tail_errors(&rows, &kept, split),
    );
    Ok(!worse(&candidate, &kept))
}

/// Whether the candidate's errors exceed the kept ones, row by row, by more than 2 % and chance.
fn worse(candidate: &[f64], kept: &[f64]) -> bool {
    let count = kept.len().max(1) as f64;
    let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / count;
    let differences = || {
        candidate
            .iter()
            .zip(kept)
            .map(|(candidate, kept)| candidate - kept)
    };
    let difference = mean(&mut differences());
    let variance = mean(&mut differences().map(|d| (d - difference).powi(2)));
    difference - CHANCE * (variance / count).sqrt() > WORSE_MAX * mean(&mut kept.iter().copied())
}

/// Mean capped absolute residual of each row from `split`, summed over both paths.
fn tail_errors(rows: &ScaledRows, forecaster: &Forecaster, split: usize) -> Vec<f64> {
    let channels = rows.values.len() / rows.rows().max(1);
    let mut residuals = vec![0.0; rows.values.len()];
    let mut errors = vec![0.0; rows.rows() - split];
    for path in [Path::Own, Path::Full] {
        rows.residuals(forecaster, path, &mut residuals);
        for (error, row) in errors
            .iter_mut()
            .zip(residuals[split * channels..].chunks_exact(channels))
        {
            let counted = row.iter().filter(|r| !r.is_nan());
            let (count, sum) = counted.fold((0.0, 0.0), |(n, sum), r| {
                (n + 1.0, sum + f64::from(r.min(RESIDUAL_MAX)))
            });
            *error += if count > 0.0 { sum / count } else { 0.0 };
        }
    }
    errors
}

/// Sum of capped squared residuals of own-lag weights as they came, without intercept.
fn squared_as_is(rows: &ScaledRows, channels: usize, weights: &OwnLagWeights) -> f64 {
    let mut lags = vec![0.0; channels * crate::LAG_COUNT];
    let mut sum = 0.0;
    for row in LAG_MAX..rows.rows() {
        lags_of(&rows.values, channels, row, &mut lags);
        for channel in 0..channels {
            let own = weights.channel(channel).iter().enumerate();
            let forecast: f32 = own.map(|(lag, w)| w * lags[lag * channels + channel]).sum();
            let residual = (rows.values[row * channels + channel] - forecast)
                .abs()
                .min(RESIDUAL_MAX);
            sum += f64::from(residual).powi(2);
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::detector::FitOptions;
    use crate::feature::FeatureSchema;
    use std::time::Duration;

    /// Slow swings with shocks, two channels in 0..1.
    fn history(rows: usize) -> Series {
        let mut state = 5_u32;
        let mut level = [0.5_f32, 0.5];
        let mut values = Vec::new();
        for _ in 0..rows {
            for level in &mut level {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let shock = (state >> 8) as f32 / 16_777_216.0 - 0.5;
                *level = 0.5 + 0.9 * (*level - 0.5) + 0.1 * shock;
                values.push(*level);
            }
        }
        Series::new(2, values).unwrap()
    }

    fn own_lag(weights: [f32; 5]) -> OwnLagWeights {
        OwnLagWeights::new(2, weights.repeat(2)).unwrap()
    }

    fn local(history: &Series) -> Detector {
        let options = FitOptions {
            prior: Some(OwnLagWeights::public_constant(2)),
            ..FitOptions::new(Duration::from_mins(1))
        };
        Detector::fit(&FeatureSchema::recorded("t", 2), history, &options).unwrap()
    }

    #[test]
    fn honest_model_is_accepted_and_becomes_the_prior() {
        let rows = history(400);
        let current = local(&rows);
        let honest = own_lag([0.8, 0.1, 0.0, 0.0, 0.0]);
        let model = GlobalModel::initial(2, 1).with_own_lag(&honest).unwrap();
        let GateOutcome::Accepted(accepted) = judge(&current, &rows, &model) else {
            panic!("refused")
        };
        assert_eq!(accepted.options().prior, Some(model.own_lag()));
        assert_eq!(accepted.provenance(), current.provenance());
    }

    #[test]
    fn poisoned_models_are_refused_at_every_length() {
        for length in [60, 120, 400] {
            let rows = history(length);
            let current = local(&rows);
            for poison in [[-0.19; 5], [1.0; 5], [0.0, 0.0, 0.0, 0.0, -0.9], [1e30; 5]] {
                let model = GlobalModel::initial(2, 1).with_own_lag(&own_lag(poison)).unwrap();
                assert_eq!(
                    judge(&current, &rows, &model),
                    GateOutcome::WorseOnTail,
                    "{length} rows, {poison:?}"
                );
            }
        }
    }

    #[test]
    fn chance_is_told_from_harm() {
        let kept: Vec<f64> = (0..24).map(|i| 1.0 + f64::from(i % 5) / 10.0).collect();
        let shifted = |by: f64| kept.iter().map(|e| e + by).collect::<Vec<_>>();
        assert!(!worse(&shifted(0.0), &kept) && !worse(&shifted(0.05), &kept) && worse(&shifted(0.1), &kept));
        let noisy: Vec<f64> = kept
            .iter()
            .enumerate()
            .map(|(i, e)| e + [0.5, -0.4][i % 2])
            .collect();
        assert!(!worse(&noisy, &kept), "worse on average, but only by chance");
    }

    #[test]
    fn model_with_a_loud_network_is_refused() {
        let rows = history(200);
        let delta = vec![1.0; crate::global::delta_layout(2).len()];
        let model = GlobalModel::initial(2, 1).with_delta(&delta).unwrap();
        assert_eq!(judge(&local(&rows), &rows, &model), GateOutcome::WorseOnTail);
    }

    #[test]
    fn says_why_it_cannot_judge() {
        let rows = history(100);
        let current = local(&rows);
        assert_eq!(
            judge(&current, &rows, &GlobalModel::initial(3, 1)),
            GateOutcome::LayoutMismatch
        );
        assert_eq!(
            judge(&current, &rows.tail(20), &GlobalModel::initial(2, 1)),
            GateOutcome::TooFewRows
        );
    }

    #[test]
    fn history_of_constants_or_nothing_but_missing_values_is_judged() {
        for value in [0.5, f32::NAN] {
            let rows = Series::new(2, vec![value; 200]).unwrap();
            let outcome = judge(&local(&rows), &rows, &GlobalModel::initial(2, 1));
            assert!(matches!(outcome, GateOutcome::Accepted(_)), "{outcome:?}");
        }
    }
}
