use proptest::prelude::*;

use super::*;
use crate::global::{GlobalModel, OwnLagWeights};
use crate::moments::BLOCK_ROWS;
use crate::ridge::{Lean, NormalEquations, Priors};

/// `rows` rows of slow channels with shocks; channel 1 follows channel 0 by one row.
fn process(rows: usize, channels: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut values = vec![0.0_f32; rows * channels];
    for t in 1..rows {
        for c in 0..channels {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let shock = (state >> 8) as f32 / 16_777_216.0 - 0.5;
            let before = values[(t - 1) * channels + usize::from(c > 1) * c];
            values[t * channels + c] = 0.9 * before + shock;
        }
    }
    values
}

fn weights(channels: usize, seed: u32) -> FullWeights {
    let mut state = seed;
    let values = (0..full_values(channels)).map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 16_777_216.0 - 0.5
    });
    FullWeights::new(channels, values.collect()).unwrap()
}

/// The gradient of one block, row by row and weight by weight, in `f64`, unwhitened.
fn plain_gradient(weights: &FullWeights, block: &BlockRows) -> Vec<f64> {
    let channels = weights.channels();
    let size = channels * LAG_COUNT + 1;
    let mut gradient = vec![0.0; size * channels];
    for row in LAG_MAX..LAG_MAX + block.regression_rows() {
        let mut inputs: Vec<f64> = LAGS
            .iter()
            .flat_map(|lag| block.row(row - lag).iter().map(|v| f64::from(*v)))
            .collect();
        inputs.push(1.0);
        for channel in 0..channels {
            if block.missing.get(row * channels + channel) == Some(&true) {
                continue;
            }
            let forecast: f64 = inputs
                .iter()
                .enumerate()
                .map(|(i, a)| a * f64::from(weights.values()[i * channels + channel]))
                .sum();
            let residual = forecast - f64::from(block.row(row)[channel]);
            for (i, a) in inputs.iter().enumerate() {
                gradient[i * channels + channel] += a * residual;
            }
        }
    }
    gradient
}

fn narrowed(values: &[f64]) -> Vec<f32> {
    values.iter().map(|v| narrow(*v)).collect()
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let squares = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
    squares.sum::<f64>().sqrt()
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn a_gradient_is_the_loop_over_rows_and_weights() {
    let (channels, whitening) = (4, Whitening::new());
    let weights = weights(channels, 9);
    let point = GradientPoint::new(&weights);
    for (rows, seed) in [(BLOCK_ROWS, 1), (25, 2), (11, 3)] {
        let mut values = process(rows, channels, seed);
        values[5 * channels + 2] = f32::NAN;
        values[(rows - 1) * channels + 3] = f32::NAN;
        let block = BlockRows::new(&values, rows);
        let expected = whitening.shrink(&narrowed(&plain_gradient(&weights, &block)), channels);
        let found = point.gradient(&block);
        let error = distance(&found, &expected) / norm(&expected);
        assert!(error < 1e-5, "{rows} rows: {error}");
    }
}

#[test]
fn whitening_is_the_identity_on_the_forecast_and_back() {
    let (channels, whitening) = (5, Whitening::new());
    let weights = weights(channels, 4);
    let stretched = whitening.stretch(weights.values(), channels);
    let back = whitening.shrink(&stretched, channels);
    assert!(distance(&back, weights.values()) < 1e-5 * norm(weights.values()));
    // (A S)(S⁻¹ W) = A W, whatever the row.
    let row: Vec<f32> = (0..channels * LAG_COUNT)
        .map(|i| (i * 7 % 13) as f32 - 6.0)
        .collect();
    let mut whitened = vec![0.0; row.len()];
    for (to, factors) in whitening.shrink.iter().enumerate() {
        for (from, factor) in factors.iter().enumerate() {
            for channel in 0..channels {
                whitened[to * channels + channel] += factor * row[from * channels + channel];
            }
        }
    }
    let (mut plain, mut other) = (vec![0.0; channels], vec![0.0; channels]);
    crate::forecaster::forecast_full(weights.values(), channels, &row, &mut plain);
    crate::forecaster::forecast_full(&stretched, channels, &whitened, &mut other);
    assert!(distance(&plain, &other) < 1e-4, "{plain:?} {other:?}");
    // A series that hardly moves from row to row looks alike from every lag: whitened it does not weigh five times as much.
    let alike: f32 = whitening
        .shrink
        .iter()
        .map(|row| row.iter().sum::<f32>().powi(2))
        .sum();
    assert!((1.0..2.2).contains(&alike), "{alike}");
}

#[test]
fn without_noise_the_descent_reaches_the_central_ridge() {
    let (channels, sites, blocks) = (3, 4, 30);
    let rows: Vec<Vec<BlockRows>> = (0..sites)
        .map(|site| {
            let values = process(blocks * BLOCK_ROWS, channels, 100 + site);
            values
                .chunks_exact(BLOCK_ROWS * channels)
                .map(|block| BlockRows::new(block, BLOCK_ROWS))
                .collect()
        })
        .collect();
    let mut central = NormalEquations::new(channels);
    for block in rows.iter().flatten() {
        central.add_rows(&block.values, LAG_MAX..BLOCK_ROWS);
    }
    let start = FullWeights::of_own_lag(&OwnLagWeights::public_constant(channels));
    let goal = central
        .solve_full(Lean::on(
            Priors {
                own: None,
                full: Some(&start),
            },
            1e-3,
        ))
        .unwrap();
    let excess = |weights: &[f32]| {
        let mut loss = 0.0;
        for block in rows.iter().flatten() {
            let mut forecast = vec![0.0; channels];
            for row in LAG_MAX..BLOCK_ROWS {
                let lags: Vec<f32> = LAGS
                    .iter()
                    .flat_map(|lag| block.row(row - lag).to_vec())
                    .collect();
                crate::forecaster::forecast_full(weights, channels, &lags, &mut forecast);
                loss += distance(&forecast, block.row(row)).powi(2);
            }
        }
        loss
    };
    let mut model = GlobalModel::initial(channels, 1);
    let begun = excess(start.values());
    let best = excess(&goal);
    let mut left = Vec::new();
    for _ in 0..200 {
        let descent = model.descent();
        let point = GradientPoint::new(&descent.iterate);
        let mut mean = vec![0.0; full_values(channels)];
        for block in rows.iter().flatten() {
            let gradient = point.gradient(block);
            mean.iter_mut()
                .zip(gradient)
                .for_each(|(m, g)| *m += g / sites as f32);
        }
        let next = descent.step(&mean, 30, 60, 0.0).unwrap();
        model = model.with_descent(&next).unwrap();
        left.push((excess(model.linear().unwrap().values()) - best) / (begun - best));
    }
    assert!(left[19] < 0.35 && left[199] < 0.02, "{} {}", left[19], left[199]);
    assert_eq!(model.descent().steps, 200);
}

#[test]
fn after_twenty_steps_the_released_mean_is_that_of_the_last_ten() {
    let channels = 2;
    let mut descent = Descent::begin(weights(channels, 3));
    let sums = vec![1.0; full_values(channels)];
    let mut iterates = Vec::new();
    for _ in 0..20 {
        descent = descent.step(&sums, 2, 60, 5.69).unwrap();
        iterates.push(descent.iterate.values().to_vec());
    }
    let mean: Vec<f32> = (0..full_values(channels))
        .map(|i| iterates[10..].iter().map(|w| w[i]).sum::<f32>() / 10.0)
        .collect();
    assert!(distance(&mean, descent.average.values()) < 1e-4);
}

#[test]
fn the_step_is_the_one_worked_out_by_hand() {
    let descent = Descent::begin(FullWeights::new(1, vec![0.0; 6]).unwrap());
    // Only the constant has a gradient; it is not mixed. Two blocks of 50 regression rows.
    let sums = [0.0, 0.0, 0.0, 0.0, 0.0, 100.0];
    let once = descent.step(&sums, 2, 60, 0.0).unwrap();
    let twice = once.step(&sums, 2, 60, 0.0).unwrap();
    assert!((once.iterate.values()[5] + 0.03).abs() < 1e-7);
    assert!((twice.iterate.values()[5] + 0.03 + 0.054).abs() < 1e-6);
    let noisy = descent.step(&sums, 2, 60, 20.3).unwrap();
    assert!((noisy.iterate.values()[5] + 0.015).abs() < 1e-6);
}

#[test]
fn one_local_step_is_the_sum_of_gradients_and_many_reach_the_ridge() {
    let channels = 3;
    let blocks: Vec<BlockRows> = process(20 * BLOCK_ROWS, channels, 21)
        .chunks_exact(BLOCK_ROWS * channels)
        .map(|block| BlockRows::new(block, BLOCK_ROWS))
        .collect();
    let start = FullWeights::of_own_lag(&OwnLagWeights::public_constant(channels));
    let (point, mut local) = (GradientPoint::new(&start), LocalDescent::new(channels));
    let mut sum = vec![0.0; full_values(channels)];
    for block in &blocks {
        local.add(block);
        let gradient = point.gradient(block);
        sum.iter_mut().zip(gradient).for_each(|(s, g)| *s += g);
    }
    let once = local.descend(&start, 1, 0.0);
    assert!(distance(&once, &sum) < 1e-3 * norm(&sum));
    let step = |sums: &[f32]| {
        let descent = Descent::begin(start.clone());
        descent.step_with(sums, 20, 60, RATE, 0.0).unwrap().iterate
    };
    let mut equations = NormalEquations::new(channels);
    for block in &blocks {
        equations.add_rows(&block.values, LAG_MAX..BLOCK_ROWS);
    }
    let goal = equations
        .solve_full(Lean::on(
            Priors {
                own: None,
                full: Some(&start),
            },
            1e-3,
        ))
        .unwrap();
    let gap = |weights: FullWeights| distance(&weights.values()[..5], &goal[..5]) / norm(&goal[..5]);
    let (far, near) = (gap(step(&once)), gap(step(&local.descend(&start, 3000, 0.0))));
    assert!(near < 0.05 && near < far, "{near} {far}");
    let held = gap(step(&local.descend(&start, 3000, 10.0)));
    assert!(
        held > near,
        "the proximal term holds the site back: {held} {near}"
    );
}

#[test]
fn a_step_refuses_what_no_model_can_be_made_of() {
    let descent = Descent::begin(weights(1, 1));
    assert!(descent.step(&[0.0; 5], 1, 60, 0.0).is_err());
    assert!(descent.step(&[f32::NAN; 6], 1, 60, 0.0).is_err());
    let huge = descent.step(&[f32::MAX; 6], 1, 11, 0.0);
    assert!(huge.is_err() || huge.unwrap().iterate.values().iter().all(|w| w.is_finite()));
}

#[test]
fn where_a_channel_rests_does_not_matter_and_short_blocks_say_nothing() {
    let low = process(BLOCK_ROWS, 2, 8);
    let high: Vec<f32> = low.iter().map(|v| v + 3.0).collect();
    let point = GradientPoint::new(&weights(2, 5));
    let gradient = |values: &[f32]| point.gradient(&BlockRows::new(values, values.len() / 2));
    assert!(distance(&gradient(&low), &gradient(&high)) < 1e-2);
    assert!(gradient(&low[..20]).iter().all(|v| *v == 0.0));
    assert!(gradient(&[]).iter().all(|v| *v == 0.0));
}

proptest! {
    /// Whatever comes in, what goes out to be clipped is a number, and a block without values adds nothing to the lags.
    #[test]
    fn a_gradient_is_finite(values in prop::collection::vec(any::<f32>(), 30 * 3)) {
        let point = GradientPoint::new(&weights(3, 2));
        prop_assert!(point.gradient(&BlockRows::new(&values, 30)).iter().all(|v| v.is_finite()));
    }
}
