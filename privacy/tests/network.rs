//! The shipped network's steps, from rows to the noisy mean: what one unit of rows can move.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::num::NonZeroU32;
use std::time::Duration;

use candle_core::{Device, Tensor};
use theriac_model::global::GlobalModel;
use theriac_model::private_train::{DenseNetwork, UnitGradients};
use theriac_privacy::descent::{NoisyDescent, UnitSum};
use theriac_privacy::factors::{LayerFactors, UnitFactors};
use theriac_privacy::ledger::{Ledger, ReleasePlan, Reserved};
use theriac_privacy::noise::FixedNoise;
use theriac_privacy::policy::Policy;
use theriac_protocol::message::UpdateKind;
use theriac_protocol::units::{L2Norm, NoiseMultiplier, Round, Timestamp};

const CHANNELS: usize = 6;
const INPUTS: usize = 5 * CHANNELS;
const UNITS: usize = 40;
const CLIP: f64 = 0.5;
const SEED: u64 = 20_260_726;

fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = SEED ^ seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / 8_388_608.0 - 1.0) * 3.0
    };
    (0..count).map(|_| next()).collect()
}

fn network() -> DenseNetwork {
    let linear: Vec<f32> = numbers(CHANNELS * INPUTS, 9).iter().map(|x| x * 0.1).collect();
    DenseNetwork::shipped(&GlobalModel::initial(CHANNELS, 4), Some(&linear)).unwrap()
}

/// Gradients of all units but one, at the same weights.
fn gradients(rows: usize, left_out: Option<usize>) -> UnitGradients {
    let part = |width: usize, seed: u64| {
        let all = numbers(UNITS * rows * width, seed);
        let units = all.chunks_exact(rows * width).enumerate();
        let kept: Vec<f32> = units
            .filter(|(unit, _)| Some(*unit) != left_out)
            .flat_map(|(_, values)| values.to_vec())
            .collect();
        let count = kept.len() / width;
        Tensor::from_vec(kept, (count, width), &Device::Cpu).unwrap()
    };
    let traces = network().trace(&part(INPUTS, 1), &part(CHANNELS, 2)).unwrap();
    UnitGradients::new(traces, rows).unwrap()
}

fn add(gradients: &UnitGradients, sum: &mut UnitSum) {
    gradients
        .with_factors(|layers| {
            let layers: Vec<_> = layers
                .iter()
                .map(|layer| LayerFactors {
                    inputs: layer.inputs,
                    errors: layer.errors,
                    bias: layer.bias,
                    range_log2: layer.range_log2,
                })
                .collect();
            sum.add_factors(&UnitFactors::new(&layers, gradients.units(), gradients.rows()).unwrap());
        })
        .unwrap();
}

/// The mean of one charged step without its noise, times the number of blocks.
fn released(read: impl FnOnce(&mut UnitSum)) -> Vec<f64> {
    let folder = tempfile::tempdir().unwrap();
    let policy = Policy::parse("site = \"site-a\"\nepsilon = 8").unwrap();
    let node = policy.site().clone();
    let mut ledger = Ledger::open(&folder.path().join("l"), &node, policy, Timestamp(0)).unwrap();
    let plan = ReleasePlan {
        round: Round(1),
        nonce: 1,
        kind: UpdateKind::Moments,
        values: u32::try_from(network().parameters()).unwrap(),
        block_span: Duration::from_hours(1),
        blocks: (0..UNITS as u64).collect(),
        windows: None,
        sampling_rate: 1.0,
        steps: 1,
        clip_norm: L2Norm::new(CLIP).unwrap(),
        noise_multiplier: NoiseMultiplier::new(1.28).unwrap(),
    };
    let Reserved::Fresh(reservation) = ledger.reserve(plan, Timestamp(1)).unwrap() else {
        panic!("charged before")
    };
    let mut descent = NoisyDescent::new(reservation, NonZeroU32::MIN).unwrap();
    let mean = descent.step_each(&FixedNoise(0.0), |_, sum| read(sum)).unwrap();
    mean.into_iter().map(|x| f64::from(x) * UNITS as f64).collect()
}

fn length(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

#[test]
fn one_unit_of_rows_moves_a_step_of_the_shipped_network_by_at_most_the_clipping_norm() {
    println!("seed {SEED}");
    for rows in [1, 7] {
        let all = released(|sum| add(&gradients(rows, None), sum));
        for unit in 0..UNITS {
            let without = released(|sum| add(&gradients(rows, Some(unit)), sum));
            let moved = length(all.iter().zip(&without).map(|(a, b)| a - b));
            // The mean is told in single precision.
            assert!(
                moved <= CLIP * (1.0 + 1e-5),
                "unit {unit} of {rows} rows: {moved}"
            );
            assert!(moved > 0.5 * CLIP, "unit {unit} of {rows} rows adds only {moved}");
        }
    }
}

#[test]
fn factors_and_single_gradients_give_the_same_step() {
    for rows in [1, 7] {
        let gradients = gradients(rows, None);
        let quick = released(|sum| add(&gradients, sum));
        let slow = released(|sum| {
            let each = gradients.each().unwrap();
            for unit in &each {
                sum.add(unit);
            }
        });
        let off = length(quick.iter().zip(&slow).map(|(a, b)| a - b)) / length(slow.iter().copied());
        println!("{rows} rows: off by {off:.1e}");
        assert!(off < 3e-4, "{rows} rows: {off}");
    }
}
