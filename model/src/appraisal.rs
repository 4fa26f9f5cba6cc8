//! A candidate against the model in force, on the rows of a site that its operators trust.
//!
//! The [gate](crate::gate) asks whether a model is worth having beside what one host has made of its own rows, which hides most of what is
//! wrong with a model once the host has rows enough. Here both models are tried alike, and first of all as they came.

use std::time::Duration;

use crate::arm::Path;
use crate::detector::{ScaledRows, local_scaler};
use crate::feature::FeatureSchema;
use crate::forecaster::{ResidualNetwork, forecast_full};
use crate::gate::{GATE_ROWS_MIN, own_as_is};
use crate::global::{GlobalModel, OwnLagWeights};
use crate::personalise::{CHANCE, choose, difference};
use crate::ridge::{Priors, Unsolvable};
use crate::series::Series;
use crate::window::lags_of;

/// How much worse a candidate may be than the model in force, in either residual, beyond chance.
pub const WORSE_MAX: f64 = 0.05;
/// How much worse than the public constant, in squared residual as it came, a candidate may be that is also worse than the model in force. It
/// keeps many small steps, each within [`WORSE_MAX`], from leading far away.
pub const ADRIFT_MAX: f64 = 1.2;
/// Bound of one residual, in scaled units: an incident among the rows must not decide.
const RESIDUAL_MAX: f32 = 8.0;

/// What rows say of a candidate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Appraised {
    /// Nothing: too few rows, another number of channels, or no fit with the model in force.
    CannotTell,
    /// It is not worse than the model in force by more than 5 % and chance.
    NotWorse(Ratios),
    /// It is.
    Worse(Ratios),
}

impl Appraised {
    /// The ratio that told most, in thousandths: saturating, 0 where nothing could be told.
    pub fn ratio_permille(&self) -> u32 {
        let ratio = match self {
            Self::CannotTell => 0.0,
            Self::NotWorse(ratios) => ratios.worst(),
            Self::Worse(ratios) => ratios.worst().max(ratios.against_constant),
        };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a cast of a float saturates"
        )]
        let permille = (ratio * 1_000.0).round() as u32;
        permille
    }
}

/// Residuals of the candidate over those of the model in force; 1 where both are 0, infinite where the candidate has no finite one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ratios {
    /// Capped squared residual of the linear weights as they came (own-lag or full, the worse), over all rows.
    pub as_it_came: f64,
    /// The candidate's against that of the public constant.
    pub against_constant: f64,
    /// Capped absolute residual on the last fifth, after a fit on the rows before it with either model as prior.
    pub in_use: f64,
}

impl Ratios {
    /// Of a candidate that cannot be used at all.
    pub const INFINITE: Self = Self {
        as_it_came: f64::INFINITY,
        against_constant: f64::INFINITY,
        in_use: f64::INFINITY,
    };

    /// The greater of the two that compare with the model in force.
    pub fn worst(&self) -> f64 {
        self.as_it_came.max(self.in_use)
    }
}

/// Tries `candidate` and the model in force, `current`, on a site's rows, oldest first, without rows of alarms or actions; `step` is the time between two
/// of them. Three tests must pass:
///
/// - as it came, no worse than `current` in capped squared residual by more than [`WORSE_MAX`] and two standard errors of the rows' differences;
/// - as it came, not both worse than `current` and more than [`ADRIFT_MAX`] times as bad as the public constant;
/// - in use, a fit with it as prior no worse on the last fifth than one with `current` by more than [`WORSE_MAX`] and two standard errors.
pub fn appraise(
    schema: &FeatureSchema,
    history: &Series,
    step: Duration,
    current: &GlobalModel,
    candidate: &GlobalModel,
) -> Appraised {
    let channels = schema.channels();
    let fits = |model: &GlobalModel| model.channels() == channels;
    if !fits(current) || !fits(candidate) || history.channels() != channels || history.rows() < GATE_ROWS_MIN
    {
        return Appraised::CannotTell;
    }
    let rows = ScaledRows::new(&local_scaler(schema, history, true), history, step);
    let (new, old) = (as_it_came(&rows, candidate), as_it_came(&rows, current));
    let constant = squared(&rows, |lags, out| {
        own_as_is(&OwnLagWeights::public_constant(channels), lags, out);
    });
    let Ok(before) = in_use(&rows, current) else {
        return Appraised::CannotTell;
    };
    let Ok(after) = in_use(&rows, candidate) else {
        return Appraised::Worse(Ratios::INFINITE);
    };
    let ratios = Ratios {
        as_it_came: ratio(&new, &old),
        against_constant: ratio(&new, &constant),
        in_use: ratio(&after, &before),
    };
    let adrift = ratios.against_constant > ADRIFT_MAX && ratios.as_it_came > 1.0;
    if adrift || is_worse(&new, &old) || is_worse(&after, &before) {
        Appraised::Worse(ratios)
    } else {
        Appraised::NotWorse(ratios)
    }
}

/// Of each row, for the linear part that does worse on the whole.
fn as_it_came(rows: &ScaledRows, model: &GlobalModel) -> Vec<f64> {
    let own = squared(rows, |lags, out| own_as_is(&model.own_lag(), lags, out));
    let Some(full) = model.linear() else {
        return own;
    };
    let channels = rows.channels();
    let full = squared(rows, |lags, out| {
        forecast_full(full.values(), channels, lags, out);
    });
    if mean(&full) > mean(&own) { full } else { own }
}

/// Mean over the channels of the capped squared residual of each row whose lags are known.
fn squared(rows: &ScaledRows, forecast: impl Fn(&[f32], &mut [f32])) -> Vec<f64> {
    let channels = rows.channels();
    let (mut lags, mut forecasts) = (vec![0.0; channels * crate::LAG_COUNT], vec![0.0; channels]);
    let mut errors = Vec::with_capacity(rows.rows());
    for row in rows.with_lags(0..rows.rows()).flatten() {
        lags_of(&rows.values, channels, row, &mut lags);
        forecast(&lags, &mut forecasts);
        let residuals = rows.values[row * channels..].iter().zip(&forecasts);
        let sum: f64 = residuals
            .map(|(value, forecast)| f64::from((value - forecast).abs().min(RESIDUAL_MAX)).powi(2))
            .sum();
        errors.push(sum / channels.max(1) as f64);
    }
    errors
}

/// Of each row of the tail.
fn in_use(rows: &ScaledRows, model: &GlobalModel) -> Result<Vec<f64>, Unsolvable> {
    let (own, full) = (model.own_lag(), model.linear());
    let priors = Priors {
        own: Some(&own),
        full: full.as_ref(),
    };
    let network = ResidualNetwork::new(model.channels(), model.network());
    choose(rows, priors, network.as_ref(), &[Path::Own, Path::Full]).map(|chosen| chosen.tail_errors)
}

fn is_worse(new: &[f64], old: &[f64]) -> bool {
    let (more, standard_error) = difference(new, old);
    more - CHANCE * standard_error > WORSE_MAX * mean(old)
}

fn ratio(new: &[f64], old: &[f64]) -> f64 {
    let (new, old) = (mean(new), mean(old));
    if old > 0.0 {
        new / old
    } else if new > 0.0 {
        f64::INFINITY
    } else {
        1.0
    }
}

fn mean(errors: &[f64]) -> f64 {
    errors.iter().sum::<f64>() / errors.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_mins(1);

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

    fn schema() -> FeatureSchema {
        FeatureSchema::recorded("t", 2)
    }

    fn model(weights: [f32; 5]) -> GlobalModel {
        let own = OwnLagWeights::new(2, weights.repeat(2)).unwrap();
        GlobalModel::initial(2, 1).with_own_lag(&own).unwrap()
    }

    #[test]
    fn a_better_model_and_the_same_model_are_not_worse() {
        let (rows, honest) = (history(400), model([0.8, 0.1, 0.0, 0.0, 0.0]));
        let of = |candidate: &GlobalModel| appraise(&schema(), &rows, STEP, &honest, candidate);
        let Appraised::NotWorse(ratios) = of(&honest) else {
            panic!("the same model is worse than itself")
        };
        assert!((ratios.worst() - 1.0).abs() < 1e-12);
        assert!(matches!(
            of(&model([0.85, 0.05, 0.0, 0.0, 0.0])),
            Appraised::NotWorse(_)
        ));
    }

    #[test]
    fn a_model_that_a_long_history_would_hide_is_worse_as_it_came() {
        let (rows, honest) = (history(2_000), model([0.8, 0.1, 0.0, 0.0, 0.0]));
        let Appraised::Worse(ratios) = appraise(&schema(), &rows, STEP, &honest, &model([0.2; 5])) else {
            panic!("it passed")
        };
        assert!(ratios.as_it_came > 1.05 && ratios.in_use < 1.05, "{ratios:?}");
    }

    #[test]
    fn huge_weights_are_worse_and_too_few_rows_tell_nothing() {
        let honest = model([0.8, 0.1, 0.0, 0.0, 0.0]);
        let broken = model([1e30; 5]);
        let (few, many) = (history(GATE_ROWS_MIN - 1), history(400));
        let of = |rows, current, candidate| appraise(&schema(), rows, STEP, current, candidate);
        assert!(matches!(of(&many, &honest, &broken), Appraised::Worse(_)));
        assert_eq!(of(&few, &honest, &honest), Appraised::CannotTell);
        assert_eq!(
            of(&many, &GlobalModel::initial(3, 1), &honest),
            Appraised::CannotTell
        );
    }

    #[test]
    fn small_steps_do_not_lead_far_from_the_public_constant() {
        let rows = history(2_000);
        let drift = |step: u32| model([0.8 - 0.02 * step as f32, 0.1, 0.0, 0.0, 0.0]);
        let mut current = drift(0);
        let mut taken = 0;
        for step in 1..40 {
            match appraise(&schema(), &rows, STEP, &current, &drift(step)) {
                Appraised::NotWorse(ratios) => {
                    assert!(ratios.against_constant <= ADRIFT_MAX, "step {step}: {ratios:?}");
                    (current, taken) = (drift(step), step);
                }
                Appraised::Worse(_) | Appraised::CannotTell => {}
            }
        }
        assert!(taken < 30, "all of {taken} steps were taken");
    }
}
