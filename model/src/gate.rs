//! Accept a new global model, or keep the own one.
//!
//! Refusing costs nothing: the host goes on with what it has. So a model must earn its place on this host's own rows.

use std::fmt;
use std::time::Duration;

use crate::detector::{Detector, FitOptions, Path, ScaledRows, local_scaler};
use crate::feature::FeatureSchema;
use crate::forecaster::{ResidualNetwork, forecast_full};
use crate::global::{GlobalModel, OwnLagWeights};
use crate::personalise::{CHANCE, choose, difference};
use crate::ridge::{Priors, Unsolvable};
use crate::series::Series;
use crate::window::lags_of;

/// Fewest rows to judge a model on: a fifth of them is the tail.
pub const GATE_ROWS_MIN: usize = 60;

/// How much worse, in mean absolute residual, a model may be on the tail. A model that ranks faults better need not forecast calm
/// rows better: at 2 % the gate kept honest models from 3 of 52 new sites.
const WORSE_MAX: f64 = 0.05;
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

/// What a model did on the host's own rows: the reason of a verdict.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evidence {
    /// Capped squared residual of the weights as they came (own-lag or full linear, the worse), over that of the public constant, all
    /// rows; 1 where both are 0.
    pub as_it_came: f64,
    /// On the tail; `None` when the model was refused as it came.
    pub tail: Option<Tail>,
}

/// What fits on the first four fifths did on the last one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tail {
    /// Rows of it.
    pub rows: usize,
    /// Mean absolute residual with the model as prior, in scaled units, summed over both paths, at the λ that is best there.
    pub with_model: f64,
    /// The same with what the host has.
    pub without: f64,
    /// Standard error of their difference, from the rows' differences.
    pub standard_error: f64,
}

impl Evidence {
    fn harmful(&self) -> bool {
        self.as_it_came > HARM_MAX
    }
}

impl Tail {
    /// Whether the model is worse by more than 5 % and chance.
    fn worse(&self) -> bool {
        self.with_model - self.without - CHANCE * self.standard_error > WORSE_MAX * self.without
    }
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "as it came {:.2} times the squared residual of the public constant (at most {HARM_MAX})",
            self.as_it_came
        )?;
        match &self.tail {
            Some(tail) => write!(
                f,
                "; mean residual {:.4} with it and {:.4} without on the last {} rows (may be {:.0} % and chance, here {:.4}, worse)",
                tail.with_model,
                tail.without,
                tail.rows,
                WORSE_MAX * 100.0,
                CHANCE * tail.standard_error,
            ),
            None => f.write_str(", so its tail was not looked at"),
        }
    }
}

/// What the gate decided, and by what.
#[derive(Debug, Clone, PartialEq)]
pub struct Judgement {
    /// The decision.
    pub outcome: GateOutcome,
    /// What was measured; `None` where nothing could be.
    pub evidence: Option<Evidence>,
}

impl From<GateOutcome> for Judgement {
    fn from(outcome: GateOutcome) -> Self {
        Self {
            outcome,
            evidence: None,
        }
    }
}

/// Judges a global model on the host's own history, oldest row first, without rows of alarms or actions.
///
/// Two tests must pass. *As it came*, neither the own-lag part nor the full linear model, where there is one, may be worse than the public constant by more than 20 % in
/// capped squared residual over all rows: that floors the harm of a poisoned model however few rows there are.
/// *In use*, a fit on the first four fifths with the model as prior must not be worse on the last fifth than the
/// same fit with the current prior by more than 5 % in mean absolute residual, each leaning as strongly as is best for it there
/// ([`personalise`](crate::personalise)); a difference within two standard errors of the rows' differences is chance and
/// counts for the model.
///
/// `options` say how an accepted model is fitted; their priors are not looked at.
pub fn judge(current: &Detector, history: &Series, global: &GlobalModel, options: &FitOptions) -> Judgement {
    let channels = current.schema().channels();
    if global.channels() != channels || history.channels() != channels {
        return GateOutcome::LayoutMismatch.into();
    }
    if global.values().iter().any(|v| !v.is_finite()) {
        return GateOutcome::NonFinite.into();
    }
    if history.rows() < GATE_ROWS_MIN {
        return GateOutcome::TooFewRows.into();
    }
    let Ok(evidence) = measure(current, history, global, options.step) else {
        return GateOutcome::NonFinite.into();
    };
    let outcome = if evidence.tail.is_none_or(|tail| tail.worse()) {
        GateOutcome::WorseOnTail
    } else {
        match current.refit_with_global(history, global, options) {
            Ok(detector) => GateOutcome::Accepted(Box::new(detector)),
            Err(_) => GateOutcome::NonFinite,
        }
    };
    Judgement {
        outcome,
        evidence: Some(evidence),
    }
}

fn measure(
    current: &Detector,
    history: &Series,
    global: &GlobalModel,
    step: Duration,
) -> Result<Evidence, Unsolvable> {
    let channels = global.channels();
    let rows = ScaledRows::new(&local_scaler(current.schema(), history, true), history, step);
    let own_lag = global.own_lag();
    let linear = global.linear();
    let of_own =
        |weights: &OwnLagWeights| squared_as_is(&rows, channels, |lags, out| own_as_is(weights, lags, out));
    let constant = of_own(&OwnLagWeights::public_constant(channels));
    let of_full = linear.as_ref().map(|full| {
        squared_as_is(&rows, channels, |lags, out| {
            forecast_full(full.values(), channels, lags, out);
        })
    });
    let as_came = of_own(&own_lag).max(of_full.unwrap_or(0.0));
    let evidence = Evidence {
        as_it_came: if constant > 0.0 {
            as_came / constant
        } else if as_came > 0.0 {
            f64::INFINITY
        } else {
            1.0
        },
        tail: None,
    };
    if evidence.harmful() {
        return Ok(evidence);
    }
    let errors = |priors, network: Option<&ResidualNetwork>| {
        choose(&rows, priors, network, &[Path::Own, Path::Full]).map(|chosen| chosen.tail_errors)
    };
    let network = ResidualNetwork::new(channels, global.network());
    let priors = Priors {
        own: Some(&own_lag),
        full: linear.as_ref(),
    };
    let with_model = errors(priors, network.as_ref())?;
    let without = errors(current.options().priors(), current.forecaster.network.as_ref())?;
    Ok(Evidence {
        tail: Some(tail(&with_model, &without)),
        ..evidence
    })
}

fn tail(with_model: &[f64], without: &[f64]) -> Tail {
    let mean = |errors: &[f64]| errors.iter().sum::<f64>() / errors.len().max(1) as f64;
    Tail {
        rows: without.len(),
        with_model: mean(with_model),
        without: mean(without),
        standard_error: difference(with_model, without).1,
    }
}

/// Rows that own-lag weights are tried on as they come: how well a global model forecasts a host, before anything is learnt of it.
pub struct Trial {
    rows: ScaledRows,
    channels: usize,
}

impl Trial {
    /// Tries on `rows`, scaled as a host does that knows the last `known` of them and has a prior. Rows follow each other without a gap.
    ///
    /// # Panics
    /// When the series has other channels than the schema.
    pub fn new(schema: &FeatureSchema, rows: &Series, known: usize) -> Self {
        Self {
            rows: ScaledRows::new(
                &local_scaler(schema, &rows.tail(known), true),
                rows,
                Duration::MAX,
            ),
            channels: schema.channels(),
        }
    }

    /// Sum of squared one-step residuals over all rows and channels, each residual capped at 8 local units.
    pub fn squared_error(&self, weights: &OwnLagWeights) -> f64 {
        squared_as_is(&self.rows, self.channels, |lags, out| {
            own_as_is(weights, lags, out);
        })
    }
}

impl std::fmt::Debug for Trial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // No number of the host's own scaler.
        f.debug_struct("Trial").finish_non_exhaustive()
    }
}

/// Sum of capped squared residuals of a forecast from all lags.
fn squared_as_is(rows: &ScaledRows, channels: usize, forecast: impl Fn(&[f32], &mut [f32])) -> f64 {
    let (mut lags, mut forecasts) = (vec![0.0; channels * crate::LAG_COUNT], vec![0.0; channels]);
    let mut sum = 0.0;
    for row in rows.with_lags(0..rows.rows()).flatten() {
        lags_of(&rows.values, channels, row, &mut lags);
        forecast(&lags, &mut forecasts);
        for (value, forecast) in rows.values[row * channels..].iter().zip(&forecasts) {
            let residual = (value - forecast).abs().min(RESIDUAL_MAX);
            sum += f64::from(residual).powi(2);
        }
    }
    sum
}

/// Own-lag weights as they came, without intercept.
pub(crate) fn own_as_is(weights: &OwnLagWeights, lags: &[f32], out: &mut [f32]) {
    let channels = weights.channels();
    for (channel, out) in out.iter_mut().enumerate() {
        let own = weights.channel(channel).iter().enumerate();
        *out = own.map(|(lag, w)| w * lags[lag * channels + channel]).sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let GateOutcome::Accepted(accepted) = judge(&current, &rows, &model, current.options()).outcome
        else {
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
                    judge(&current, &rows, &model, current.options()).outcome,
                    GateOutcome::WorseOnTail,
                    "{length} rows, {poison:?}"
                );
            }
        }
    }

    #[test]
    fn an_accepted_model_is_fitted_as_the_options_say_now() {
        let rows = history(400);
        let current = local(&rows);
        let options = FitOptions {
            false_alarms_per_day: 20.0,
            half_lives: [Duration::from_mins(1), Duration::from_mins(4)],
            ..current.options().clone()
        };
        let GateOutcome::Accepted(accepted) =
            judge(&current, &rows, &GlobalModel::initial(2, 1), &options).outcome
        else {
            panic!("refused")
        };
        let fitted = accepted.options();
        assert_eq!(fitted.half_lives, options.half_lives);
        assert!((fitted.false_alarms_per_day - 20.0).abs() < 1e-12);
    }

    #[test]
    fn chance_is_told_from_harm() {
        let kept: Vec<f64> = (0..24).map(|i| 1.0 + f64::from(i % 5) / 10.0).collect();
        let shifted = |by: f64| kept.iter().map(|e| e + by).collect::<Vec<_>>();
        let worse = |errors: &[f64]| tail(errors, &kept).worse();
        assert!(!worse(&shifted(0.0)) && !worse(&shifted(0.05)) && worse(&shifted(0.1)));
        let noisy: Vec<f64> = kept
            .iter()
            .enumerate()
            .map(|(i, e)| e + [0.5, -0.4][i % 2])
            .collect();
        assert!(!worse(&noisy), "worse on average, but only by chance");
    }

    #[test]
    fn model_with_a_loud_network_is_refused() {
        let rows = history(200);
        let delta = vec![1.0; crate::global::delta_layout(2).len()];
        let model = GlobalModel::initial(2, 1).with_delta(&delta).unwrap();
        let current = local(&rows);
        let judged = judge(&current, &rows, &model, current.options());
        assert_eq!(judged.outcome, GateOutcome::WorseOnTail);
        let evidence = judged.evidence.unwrap();
        let tail = evidence.tail.unwrap();
        assert!(tail.rows == 40 && tail.with_model > tail.without, "{tail:?}");
        let reason = evidence.to_string();
        assert!(
            reason.contains("without on the last 40 rows (may be 5 % and chance"),
            "{reason}"
        );
    }

    #[test]
    fn a_full_linear_model_is_leant_on_and_a_poisoned_one_is_refused() {
        let rows = history(400);
        let initial = GlobalModel::initial(2, 1);
        let trained = |change: fn(&mut Vec<f32>)| {
            let mut descent = initial.descent();
            let mut values = descent.average.values().to_vec();
            change(&mut values);
            descent.average = crate::linear::FullWeights::new(2, values).unwrap();
            initial.with_descent(&descent).unwrap()
        };
        let honest = trained(|values| values[0] += 0.3);
        let GateOutcome::Accepted(accepted) =
            judge(&local(&rows), &rows, &honest, local(&rows).options()).outcome
        else {
            panic!("refused")
        };
        assert_eq!(accepted.options().full_prior, honest.linear());
        assert_ne!(
            accepted.forecaster,
            local(&rows)
                .refit_with_global(&rows, &initial, local(&rows).options())
                .unwrap()
                .forecaster
        );
        // Only what the first channel does to the second: the own-lag part is as good as before.
        let poisoned = trained(|values| (0..5).for_each(|lag| values[lag * 4 + 1] = 1.0));
        assert_eq!(
            judge(&local(&rows), &rows, &poisoned, local(&rows).options()).outcome,
            GateOutcome::WorseOnTail
        );
    }

    #[test]
    fn says_why_it_cannot_judge() {
        let rows = history(100);
        let current = local(&rows);
        assert_eq!(
            judge(&current, &rows, &GlobalModel::initial(3, 1), current.options()).outcome,
            GateOutcome::LayoutMismatch
        );
        assert_eq!(
            judge(
                &current,
                &rows.tail(20),
                &GlobalModel::initial(2, 1),
                current.options()
            )
            .outcome,
            GateOutcome::TooFewRows
        );
    }

    #[test]
    fn history_of_constants_or_nothing_but_missing_values_is_judged() {
        for value in [0.5, f32::NAN] {
            let rows = Series::new(2, vec![value; 200]).unwrap();
            let current = local(&rows);
            let outcome = judge(&current, &rows, &GlobalModel::initial(2, 1), current.options()).outcome;
            assert!(matches!(outcome, GateOutcome::Accepted(_)), "{outcome:?}");
        }
    }
}
