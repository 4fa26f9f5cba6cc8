use candle_core::{DType, Device, Result, Tensor, Var};

use super::*;
use crate::global::GlobalModel;

/// Numbers in [−1, 1) that are the same in every run.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn tensor(shape: (usize, usize), seed: u32, scale: f32) -> Tensor {
    let values: Vec<f32> = numbers(shape.0 * shape.1, seed)
        .into_iter()
        .map(|x| x * scale)
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn layer(inputs: usize, outputs: usize, seed: u32) -> DenseLayer {
    DenseLayer {
        weight: tensor((outputs, inputs), seed, 0.4),
        bias: tensor((1, outputs), seed + 1, 0.2).flatten_all().unwrap(),
    }
}

/// Three layers and a linear path.
fn network() -> DenseNetwork {
    let layers = vec![layer(12, 9, 1), layer(9, 5, 3), layer(5, 4, 5)];
    DenseNetwork::new(layers, Some(tensor((4, 12), 7, 0.3))).unwrap()
}

fn gradients(network: &DenseNetwork, input: &Tensor, target: &Tensor, rows: usize) -> UnitGradients {
    UnitGradients::new(network.trace(input, target).unwrap(), rows).unwrap()
}

/// The definition: every unit passed through on its own, clipped in `f64`, added up.
fn one_at_a_time(
    network: &DenseNetwork,
    input: &Tensor,
    target: &Tensor,
    rows: usize,
    clip: f64,
) -> Vec<f64> {
    let units = input.dim(0).unwrap() / rows;
    let mut sum = vec![0.0; network.parameters()];
    for unit in 0..units {
        let part = |all: &Tensor| all.narrow(0, unit * rows, rows).unwrap().contiguous().unwrap();
        let gradient = gradients(network, &part(input), &part(target), rows)
            .sum()
            .unwrap();
        let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        let factor = clip / norm.max(clip);
        sum.iter_mut()
            .zip(&gradient)
            .for_each(|(sum, g)| *sum += factor * f64::from(*g));
    }
    sum
}

fn relative(found: &[f32], expected: &[f64]) -> f64 {
    let size = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
    let gap = found
        .iter()
        .zip(expected)
        .map(|(a, b)| (f64::from(*a) - b).powi(2))
        .sum::<f64>()
        .sqrt();
    gap / size
}

#[test]
fn clipped_sums_are_those_of_one_unit_at_a_time() {
    let network = network();
    let (input, target) = (tensor((192, 12), 11, 2.0), tensor((192, 4), 13, 2.0));
    for rows in [1, 8, 16, 64] {
        let gradients = gradients(&network, &input, &target, rows);
        let norms = gradients.norms().unwrap();
        let mut sorted = norms.clone();
        sorted.sort_by(f32::total_cmp);
        // About half of the units are clipped.
        let clip = sorted[sorted.len() / 2];
        let found = gradients.clipped_sum(clip).unwrap();
        let expected = one_at_a_time(&network, &input, &target, rows, f64::from(clip));
        let off = relative(&found.sum, &expected);
        assert!(off < 1e-5, "{rows} rows a unit: off by {off}");
        assert_eq!(found.not_finite, 0);
    }
}

#[test]
fn each_unit_has_the_gradient_and_the_norm_of_its_own_pass() {
    let network = network();
    let (input, target) = (tensor((48, 12), 11, 2.0), tensor((48, 4), 13, 2.0));
    for rows in [1, 6] {
        let all = gradients(&network, &input, &target, rows);
        let (each, norms) = (all.each().unwrap(), all.norms().unwrap());
        for (unit, (gradient, norm)) in each.iter().zip(&norms).enumerate() {
            let part = |all: &Tensor| all.narrow(0, unit * rows, rows).unwrap().contiguous().unwrap();
            let alone = gradients(&network, &part(&input), &part(&target), rows)
                .sum()
                .unwrap();
            let alone: Vec<f64> = alone.into_iter().map(f64::from).collect();
            assert!(relative(gradient, &alone) < 1e-5, "unit {unit}");
            let length = alone.iter().map(|x| x * x).sum::<f64>().sqrt();
            assert!(
                (f64::from(*norm) / length - 1.0).abs() < 1e-5,
                "unit {unit}: {norm} {length}"
            );
        }
    }
}

/// Errors at every layer's output by candle's autograd: a variable of zeros is added before each activation, and its gradient is read.
fn tapped(network: &DenseNetwork, input: &Tensor, target: &Tensor) -> Result<Vec<Tensor>> {
    let rows = input.dim(0)?;
    let taps = network
        .layers()
        .iter()
        .map(|layer| Var::zeros((rows, layer.weight.dim(0)?), DType::F32, &Device::Cpu));
    let taps = taps.collect::<Result<Vec<_>>>()?;
    let mut current = input.clone();
    for (index, (layer, tap)) in network.layers().iter().zip(&taps).enumerate() {
        let sum = current
            .matmul(&layer.weight.t()?)?
            .broadcast_add(&layer.bias)?
            .add(tap.as_tensor())?;
        current = if index + 1 < taps.len() { sum.tanh()? } else { sum };
    }
    if let Some(skip) = network.skip() {
        current = (current + input.matmul(&skip.t()?)?)?;
    }
    let channels = target.dim(1)? as f64;
    let loss = ((current - target)?.sqr()?.sum_all()? * (0.5 / channels))?;
    let store = loss.backward()?;
    let gradient = |tap: &Var| store.get(tap.as_tensor()).cloned();
    Ok(taps.iter().filter_map(gradient).collect())
}

#[test]
fn the_backward_pass_by_hand_is_that_of_autograd() {
    let network = network();
    let (input, target) = (tensor((20, 12), 21, 1.5), tensor((20, 4), 22, 1.5));
    let by_hand = network.trace(&input, &target).unwrap();
    let by_autograd = tapped(&network, &input, &target).unwrap();
    assert_eq!((by_hand.len(), by_autograd.len()), (4, 3));
    for (hand, auto) in by_hand.iter().zip(&by_autograd) {
        let gap = (hand.errors() - auto).unwrap().abs().unwrap().max_all().unwrap();
        assert!(gap.to_scalar::<f32>().unwrap() < 1e-6);
    }
}

#[test]
fn a_unit_that_is_not_finite_counts_as_zero() {
    let network = network();
    let (input, target) = (tensor((12, 12), 31, 1.0), tensor((12, 4), 32, 1.0));
    for bad in [f32::NAN, f32::INFINITY] {
        let mut spoilt = input.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        // The second of four units of three rows.
        spoilt[4 * 12 + 3] = bad;
        let spoilt = Tensor::from_vec(spoilt, (12, 12), &Device::Cpu).unwrap();
        let found = gradients(&network, &spoilt, &target, 3).clipped_sum(0.1).unwrap();
        assert_eq!(found.not_finite, 1);
        let rest = |all: &Tensor| {
            let parts = [all.narrow(0, 0, 3).unwrap(), all.narrow(0, 6, 6).unwrap()];
            Tensor::cat(&parts, 0).unwrap()
        };
        let expected = one_at_a_time(&network, &rest(&input), &rest(&target), 3, 0.1);
        assert!(relative(&found.sum, &expected) < 1e-5);
    }
}

#[test]
fn a_short_unit_is_filled_up_with_silent_rows() {
    let network = network();
    let (input, target) = (tensor((5, 12), 41, 1.0), tensor((5, 4), 42, 1.0));
    let traces = network.trace(&input, &target).unwrap();
    let filled: Vec<Trace> = traces
        .iter()
        .map(|trace| {
            let longer = |values: &Tensor, fill: f64| {
                let more = (Tensor::ones((3, values.dim(1).unwrap()), DType::F32, &Device::Cpu).unwrap()
                    * fill)
                    .unwrap();
                Tensor::cat(&[values, &more], 0).unwrap()
            };
            Trace::new(longer(trace.inputs(), 9.0), longer(trace.errors(), 0.0), true)
        })
        .collect();
    let whole: Vec<Trace> = traces
        .iter()
        .map(|trace| Trace::new(trace.inputs().clone(), trace.errors().clone(), true))
        .collect();
    let (filled, whole) = (
        UnitGradients::new(filled, 8).unwrap(),
        UnitGradients::new(whole, 5).unwrap(),
    );
    assert!((filled.norms().unwrap()[0] / whole.norms().unwrap()[0] - 1.0).abs() < 1e-5);
    let expected: Vec<f64> = whole.sum().unwrap().into_iter().map(f64::from).collect();
    assert!(relative(&filled.sum().unwrap(), &expected) < 1e-5);
}

#[test]
fn steps_against_the_gradient_lower_the_loss_of_the_shipped_model() {
    let global = GlobalModel::initial(2, 4);
    let mut network = DenseNetwork::shipped(&global, Some(&[0.0; 20])).unwrap();
    let input = tensor((128, 10), 51, 1.0);
    let target = input.narrow(1, 3, 2).unwrap().contiguous().unwrap();
    let loss = |network: &DenseNetwork| {
        let gap = (network.forward(&input).unwrap() - &target).unwrap();
        gap.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap()
    };
    let before = loss(&network);
    for _ in 0..400 {
        let sum = gradients(&network, &input, &target, 8)
            .clipped_sum(5.0)
            .unwrap()
            .sum;
        network = network.step(&sum, 0.05 / 16.0).unwrap();
    }
    assert!(
        loss(&network) < 0.2 * before,
        "{before} became {}",
        loss(&network)
    );
    assert!(network.step(&[0.0], 1.0).is_err());
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    assert!(DenseNetwork::new(vec![], None).is_err());
    assert!(DenseNetwork::new(vec![layer(3, 4, 1), layer(5, 2, 1)], None).is_err());
    assert!(DenseNetwork::new(vec![layer(3, 4, 1)], Some(tensor((3, 4), 1, 1.0))).is_err());
    let traces = network()
        .trace(&tensor((10, 12), 1, 1.0), &tensor((10, 4), 1, 1.0))
        .unwrap();
    assert!(UnitGradients::new(traces.clone(), 3).is_err());
    assert!(UnitGradients::new(traces, 0).is_err());
}

/// Bits of the inputs and errors of all layers, row by row from `first` on.
fn bits(traces: &[Trace], first: usize, rows: usize) -> Vec<Vec<u32>> {
    let of = |values: &Tensor| -> Vec<u32> {
        let part = values.narrow(0, first, rows).unwrap().flatten_all().unwrap();
        part.to_vec1::<f32>()
            .unwrap()
            .into_iter()
            .map(f32::to_bits)
            .collect()
    };
    traces
        .iter()
        .flat_map(|trace| [of(trace.inputs()), of(trace.errors())])
        .collect()
}

/// What the exact clipping of `theriac-privacy` rests on: factors of a row follow from that row alone. If another batch rounded them in another way, one unit more would
/// change all others.
#[test]
fn the_factors_of_a_row_do_not_depend_on_the_rows_beside_it_to_the_last_bit() {
    let shipped = DenseNetwork::shipped(&GlobalModel::initial(38, 1), Some(&numbers(38 * 190, 3))).unwrap();
    let autoencoder =
        [(38, 64), (64, 16), (16, 64), (64, 38)].map(|(inputs, outputs)| layer(inputs, outputs, 8));
    let autoencoder = DenseNetwork::new(autoencoder.to_vec(), None).unwrap();
    // Longer sums than the matrix library takes at once.
    let wide = DenseNetwork::new(vec![layer(1500, 9, 5), layer(9, 38, 6)], None).unwrap();
    // Products with one and two columns go other ways in the matrix library.
    let narrow = |outputs| DenseNetwork::new(vec![layer(5, 2, 9), layer(2, outputs, 10)], None).unwrap();
    let mut others = Vec::new();
    for (network, inputs, outputs) in [
        (shipped, 190, 38),
        (autoencoder, 38, 38),
        (wide, 1500, 38),
        (narrow(1), 5, 1),
        (narrow(2), 5, 2),
    ] {
        const ALL: usize = 300;
        let (input, target) = (tensor((ALL, inputs), 61, 3.0), tensor((ALL, outputs), 62, 3.0));
        let all = network.trace(&input, &target).unwrap();
        let sizes = (1..=40).chain([
            47, 48, 63, 64, 65, 71, 72, 73, 96, 100, 127, 128, 129, 255, 256, 257, 299,
        ]);
        for rows in sizes {
            for first in [0, 1, ALL - rows] {
                let part = |all: &Tensor| all.narrow(0, first, rows).unwrap().contiguous().unwrap();
                let some = network.trace(&part(&input), &part(&target)).unwrap();
                if bits(&some, 0, rows) != bits(&all, first, rows) {
                    others.push((inputs, rows, first));
                }
            }
        }
    }
    assert!(
        others.is_empty(),
        "other factors than among all (inputs, rows, first): {others:?}"
    );
}

/// Large products are split over threads.
#[test]
fn the_factors_of_a_row_are_the_same_in_a_batch_of_thousands() {
    const ALL: usize = 4_099;
    let network = DenseNetwork::shipped(&GlobalModel::initial(38, 1), Some(&numbers(38 * 190, 3))).unwrap();
    let (input, target) = (tensor((ALL, 190), 63, 3.0), tensor((ALL, 38), 64, 3.0));
    let all = network.trace(&input, &target).unwrap();
    for (rows, first) in [(1, 0), (1, ALL - 1), (73, 2_000), (1_024, 3_000), (2_050, 7)] {
        let part = |all: &Tensor| all.narrow(0, first, rows).unwrap().contiguous().unwrap();
        let some = network.trace(&part(&input), &part(&target)).unwrap();
        assert!(
            bits(&some, 0, rows) == bits(&all, first, rows),
            "{rows} rows from {first}"
        );
    }
}

#[test]
fn factors_are_the_inputs_and_errors_and_shared_where_they_are_the_same() {
    let network = network();
    let (input, target) = (tensor((6, 12), 11, 2.0), tensor((6, 4), 13, 2.0));
    let traces = network.trace(&input, &target).unwrap();
    let gradients = UnitGradients::new(traces.clone(), 3).unwrap();
    assert_eq!((gradients.units(), gradients.rows()), (2, 3));
    let flat = |values: &Tensor| values.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    gradients
        .with_factors(|layers| {
            for (layer, trace) in layers.iter().zip(&traces) {
                assert_eq!(layer.inputs, flat(trace.inputs()));
                assert_eq!(layer.errors, flat(trace.errors()));
            }
            let ranges: Vec<_> = layers
                .iter()
                .map(|layer| (layer.bias, layer.range_log2))
                .collect();
            assert_eq!(ranges, [(true, 3), (true, 0), (true, 0), (false, 3)]);
            assert!(
                std::ptr::eq(layers[0].inputs, layers[3].inputs),
                "the linear path reads the same rows"
            );
            assert!(
                std::ptr::eq(layers[2].errors, layers[3].errors),
                "and ends in the same errors"
            );
        })
        .unwrap();
}
