//! Local gradient steps of the residual network, in candle.
//!
//! The network learns what the linear path leaves over, on locally scaled rows (the scaler stays local). What comes out is the
//! change of its weights: **raw**, to be clipped and noised by `theriac-privacy` before it leaves.

use std::time::Duration;

use candle_core::{Device, Tensor, Var};
use candle_nn::loss::huber;
use candle_nn::optim::{Optimizer as _, SGD};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha20Rng;

use crate::detector::{NetworkOptions, ROWS_MIN, ScaledRows, forecaster, local_scaler};
use crate::feature::FeatureSchema;
use crate::forecaster::{Forecaster, HIDDEN, NETWORK_INPUT_MAX, ResidualNetwork};
use crate::global::{GlobalModel, delta_layout};
use crate::ridge::{NormalEquations, Priors, Unsolvable};
use crate::series::{Series, SeriesError};
use crate::window::lags_of;
use crate::{LAG_COUNT, LAG_MAX};

/// Rows of one step.
const BATCH_ROWS: usize = 256;
/// Length of one step, for a loss that is a mean over rows and a sum over channels.
const LEARNING_RATE: f64 = 0.1;
/// Where the Huber loss turns from squares to absolute values, in scaled units.
const HUBER_DELTA: f64 = 1.0;

/// Why no delta was made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// Too few rows for one lag window.
    #[error("{found} rows are too few to train on: wait for at least {needed}")]
    TooFewRows {
        /// Rows needed.
        needed: usize,
        /// Rows given.
        found: usize,
    },
    /// Model, profile and rows do not have the same channels.
    #[error(transparent)]
    Channels(#[from] SeriesError),
    /// The linear path could not be fitted.
    #[error(transparent)]
    Unsolvable(#[from] Unsolvable),
    /// The steps led to a weight that is not finite.
    #[error("training diverged after {steps} steps: a weight is not finite")]
    Diverged {
        /// Number of steps.
        steps: usize,
    },
    /// The tensor library failed.
    #[error("the tensor library failed: {0}")]
    Tensor(#[from] candle_core::Error),
}

/// Change of the network's weights, in the order of [`delta_layout`], after `steps` gradient steps of 256 rows drawn by `seed`
/// on what the linear path (fitted on these rows with the global model as prior) leaves over. Huber loss, plain
/// gradient descent; same inputs, same bits on the same machine. All zero for no steps.
///
/// Memory: a copy of the series, and tensors of 256 rows.
///
/// # Errors
/// [`TrainError`]
pub fn delta(
    global: &GlobalModel,
    schema: &FeatureSchema,
    series: &Series,
    steps: usize,
    seed: u64,
) -> Result<Vec<f32>, TrainError> {
    let channels = global.channels();
    for found in [schema.channels(), series.channels()] {
        if found != channels {
            return Err(SeriesError::Channels {
                expected: channels,
                found,
            }
            .into());
        }
    }
    if series.rows() < ROWS_MIN {
        return Err(TrainError::TooFewRows {
            needed: ROWS_MIN,
            found: series.rows(),
        });
    }
    let rows = ScaledRows::new(&local_scaler(schema, series, true), series, Duration::MAX);
    let mut equations = NormalEquations::new(channels);
    equations.add_rows(&rows.values, 0..rows.rows());
    let own = global.own_lag();
    let linear = forecaster(&equations, Priors::own_lag(Some(&own)), None)?;

    let start = global.network();
    let end = descend(&linear, &rows, &start, steps, seed)?;
    Ok(end.iter().zip(&start).map(|(end, start)| end - start).collect())
}

/// Trains the residual network of `forecaster` on the rows that its linear path was fitted on, from where it stands, or from a
/// fresh one whose last layer is zero.
pub(crate) fn fit_network(
    forecaster: &mut Forecaster,
    rows: &ScaledRows,
    options: NetworkOptions,
) -> Result<(), TrainError> {
    let channels = forecaster.channels();
    let start = forecaster.network.take().map_or_else(
        || GlobalModel::initial(channels, options.seed).network(),
        |network| network.values().to_vec(),
    );
    let end = descend(forecaster, rows, &start, options.steps, options.seed)?;
    forecaster.network = ResidualNetwork::new(channels, end);
    Ok(())
}

/// Gradient steps from `start` on what `linear`, which has no network, leaves over.
fn descend(
    linear: &Forecaster,
    rows: &ScaledRows,
    start: &[f32],
    steps: usize,
    seed: u64,
) -> Result<Vec<f32>, TrainError> {
    let channels = linear.channels();
    let network = Network::new(channels, start)?;
    let mut descent = SGD::new(network.vars(), LEARNING_RATE)?;
    let mut rng = ChaCha20Rng::seed_from_u64(seed);
    let (mut inputs, mut targets) = (vec![0.0; channels * LAG_COUNT], vec![0.0; channels]);
    if rows.with_lags(0..rows.rows()).next().is_none() {
        return Ok(start.to_vec());
    }
    for _ in 0..steps {
        let (mut input, mut target) = (Vec::new(), Vec::new());
        for _ in 0..BATCH_ROWS {
            let row = loop {
                let row = rng.random_range(LAG_MAX..rows.rows());
                if rows.with_lags(row..row + 1).next().is_some() {
                    break row;
                }
            };
            lags_of(&rows.values, channels, row, &mut inputs);
            linear.full(&inputs, &mut targets);
            let values = &rows.values[row * channels..][..channels];
            target.extend(
                values
                    .iter()
                    .zip(&targets)
                    .map(|(value, forecast)| value - forecast),
            );
            input.extend_from_slice(&inputs);
        }
        let input = Tensor::from_vec(input, (BATCH_ROWS, channels * LAG_COUNT), &Device::Cpu)?;
        let target = Tensor::from_vec(target, (BATCH_ROWS, channels), &Device::Cpu)?;
        let loss = (huber(&network.forward(&input)?, &target, HUBER_DELTA)? * channels as f64)?;
        descent.backward_step(&loss)?;
    }
    let end = network.values()?;
    if end.iter().any(|weight| !weight.is_finite()) {
        return Err(TrainError::Diverged { steps });
    }
    Ok(end)
}

/// The residual network as candle variables, in the order of [`delta_layout`]:
/// hidden bias, hidden weight, output bias, output weight.
struct Network {
    vars: Vec<Var>,
}

impl Network {
    fn new(channels: usize, values: &[f32]) -> Result<Self, candle_core::Error> {
        let layout = delta_layout(channels);
        let var = |(_, shape, range): (_, &[usize], std::ops::Range<usize>)| {
            Var::from_slice(&values[range], shape, &Device::Cpu)
        };
        Ok(Self {
            vars: layout.iter().map(var).collect::<Result<_, _>>()?,
        })
    }

    fn vars(&self) -> Vec<Var> {
        self.vars.clone()
    }

    /// `V tanh(U a + u) + v` for inputs `[batch, lag × channel]`; `[batch, channel]`.
    fn forward(&self, input: &Tensor) -> Result<Tensor, candle_core::Error> {
        let [hidden_bias, hidden_weight, output_bias, output_weight] = &self.vars[..] else {
            candle_core::bail!("the network has {} tensors, not 4", self.vars.len());
        };
        let input = input.clamp(-NETWORK_INPUT_MAX, NETWORK_INPUT_MAX)?;
        let hidden = input
            .matmul(&hidden_weight.t()?)?
            .broadcast_add(hidden_bias)?
            .tanh()?;
        debug_assert_eq!(hidden.dims()[1], HIDDEN);
        hidden.matmul(&output_weight.t()?)?.broadcast_add(output_bias)
    }

    fn values(&self) -> Result<Vec<f32>, candle_core::Error> {
        let parts = self.vars.iter().map(|var| var.flatten_all()?.to_vec1::<f32>());
        Ok(parts.collect::<Result<Vec<_>, _>>()?.concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A channel that follows the sign of another, which a linear path sees only in part.
    fn series(rows: usize) -> Series {
        let mut state = 3_u32;
        let mut values = vec![0.0_f32; 2];
        for t in 1..rows {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let shock = (state >> 8) as f32 / 8_388_608.0 - 1.0;
            values.extend([shock, values[2 * (t - 1)].signum()]);
        }
        Series::new(2, values).unwrap()
    }

    fn schema() -> FeatureSchema {
        FeatureSchema::recorded("t", 2)
    }

    fn loss(global: &GlobalModel, rows: &Series) -> f64 {
        let scaled = ScaledRows::new(&local_scaler(&schema(), rows, true), rows, Duration::MAX);
        let mut equations = NormalEquations::new(2);
        equations.add_rows(&scaled.values, 0..scaled.rows());
        let network = ResidualNetwork::new(2, global.network());
        let own = global.own_lag();
        let priors = Priors::own_lag(Some(&own));
        let forecaster = forecaster(&equations, priors, network).unwrap();
        let mut residuals = vec![0.0; scaled.values.len()];
        scaled.residuals(&forecaster, crate::detector::Path::Full, &mut residuals);
        residuals.iter().map(|r| f64::from(*r)).sum::<f64>() / residuals.len() as f64
    }

    #[test]
    fn steps_learn_what_the_linear_path_cannot() {
        let rows = series(1500);
        let global = GlobalModel::initial(2, 4);
        let delta = delta(&global, &schema(), &rows, 300, 9).unwrap();
        let trained = global.with_delta(&delta).unwrap();
        let (before, after) = (loss(&global, &rows), loss(&trained, &rows));
        assert!(after < 0.9 * before, "mean residual {before} became {after}");
    }

    #[test]
    fn same_seed_gives_the_same_bits_and_no_steps_give_zero() {
        let rows = series(100);
        let global = GlobalModel::initial(2, 4);
        let one = delta(&global, &schema(), &rows, 5, 9).unwrap();
        assert_eq!(one, delta(&global, &schema(), &rows, 5, 9).unwrap());
        assert_ne!(one, delta(&global, &schema(), &rows, 5, 10).unwrap());
        assert!(
            delta(&global, &schema(), &rows, 0, 9)
                .unwrap()
                .iter()
                .all(|step| *step == 0.0)
        );
        assert_eq!(one.len(), delta_layout(2).len());
    }

    /// The loops that score and the tensors that learn are one function.
    #[test]
    fn network_in_candle_is_the_network_that_scores() {
        let rows = series(100);
        let global = GlobalModel::initial(2, 4);
        let global = global
            .with_delta(&delta(&global, &schema(), &rows, 20, 1).unwrap())
            .unwrap();
        let input: Vec<f32> = (0..10_i8).map(|i| f32::from(i - 5) * 2.5).collect();
        let tensor = Tensor::from_vec(input.clone(), (1, 10), &Device::Cpu).unwrap();
        let network = Network::new(2, &global.network()).unwrap();
        let expected = network
            .forward(&tensor)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap();
        let mut found = [0.0; 2];
        ResidualNetwork::new(2, global.network())
            .unwrap()
            .add(&input, &mut found);
        assert!(
            expected.iter().zip(&found).all(|(a, b)| (a - b).abs() < 1e-6),
            "{expected:?} {found:?}"
        );
    }

    #[test]
    fn refuses_too_few_rows_and_other_channels() {
        let global = GlobalModel::initial(2, 4);
        assert!(matches!(
            delta(&global, &schema(), &series(12), 1, 0),
            Err(TrainError::TooFewRows {
                needed: 20,
                found: 12
            })
        ));
        let other = GlobalModel::initial(3, 4);
        assert!(matches!(
            delta(&other, &schema(), &series(50), 1, 0),
            Err(TrainError::Channels(_))
        ));
    }
}
