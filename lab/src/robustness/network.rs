//! A small autoencoder, 20-12-4-12-20 with tanh, whose gradients are written by hand: 624 parameters.

use crate::attack::statistics::narrow;

/// Features of a row.
pub const FEATURES: usize = 20;
const HIDDEN: usize = 12;
const CODE: usize = 4;

/// Layers: inputs and outputs.
const LAYERS: [(usize, usize); 4] = [
    (FEATURES, HIDDEN),
    (HIDDEN, CODE),
    (CODE, HIDDEN),
    (HIDDEN, FEATURES),
];

/// Number of parameters.
pub const PARAMETERS: usize = {
    let (mut sum, mut layer) = (0, 0);
    while layer < LAYERS.len() {
        sum += (LAYERS[layer].0 + 1) * LAYERS[layer].1;
        layer += 1;
    }
    sum
};

/// Values of every layer for one row, its input first.
type Values = [[f32; FEATURES]; LAYERS.len() + 1];

fn forward(weights: &[f32], row: &[f32; FEATURES]) -> Values {
    let mut values = [[0.0; FEATURES]; LAYERS.len() + 1];
    values[0] = *row;
    let mut at = 0;
    for (layer, (inputs, outputs)) in LAYERS.into_iter().enumerate() {
        let (matrix, bias) = weights[at..].split_at(inputs * outputs);
        let (before, after) = values.split_at_mut(layer + 1);
        let (before, after) = (&before[layer], &mut after[0]);
        after[..outputs].copy_from_slice(&bias[..outputs]);
        for (value, row) in before[..inputs].iter().zip(matrix.chunks_exact(outputs)) {
            after[..outputs]
                .iter_mut()
                .zip(row)
                .for_each(|(sum, weight)| *sum += value * weight);
        }
        if activated(layer) {
            after[..outputs]
                .iter_mut()
                .for_each(|value| *value = value.tanh());
        }
        at += (inputs + 1) * outputs;
    }
    values
}

/// Code and output are linear.
fn activated(layer: usize) -> bool {
    layer.is_multiple_of(2)
}

/// Mean squared error of what comes out against what went in.
pub fn error(weights: &[f32], row: &[f32; FEATURES]) -> f64 {
    let out = forward(weights, row)[LAYERS.len()];
    let sum: f64 = out.iter().zip(row).map(|(a, b)| f64::from(a - b).powi(2)).sum();
    sum / FEATURES as f64
}

/// Adds the gradient of the squared error of one row, times `scale`, to `gradient`.
pub fn add_gradient(weights: &[f32], row: &[f32; FEATURES], scale: f32, gradient: &mut [f32]) {
    let values = forward(weights, row);
    let mut back = [0.0_f32; FEATURES];
    for (index, back) in back.iter_mut().enumerate() {
        *back = 2.0 * scale * (values[LAYERS.len()][index] - row[index]);
    }
    let mut at = PARAMETERS;
    for (layer, (inputs, outputs)) in LAYERS.into_iter().enumerate().rev() {
        at -= (inputs + 1) * outputs;
        if activated(layer) {
            for (back, value) in back[..outputs].iter_mut().zip(&values[layer + 1]) {
                *back *= 1.0 - value * value;
            }
        }
        let (matrix, bias) = gradient[at..].split_at_mut(inputs * outputs);
        bias[..outputs]
            .iter_mut()
            .zip(&back)
            .for_each(|(sum, back)| *sum += back);
        let mut next = [0.0_f32; FEATURES];
        let weights = &weights[at..at + inputs * outputs];
        for input in 0..inputs {
            let value = values[layer][input];
            let here = input * outputs..(input + 1) * outputs;
            let mut sum = 0.0;
            for ((gradient, weight), back) in matrix[here.clone()].iter_mut().zip(&weights[here]).zip(&back) {
                *gradient += value * back;
                sum += weight * back;
            }
            next[input] = sum;
        }
        back = next;
    }
}

/// Area under the ROC curve: the chance that an anomaly has the larger score. Ties count half; NaN counts as 0.
pub fn auroc(normal: &[f64], anomalous: &[f64]) -> f64 {
    let mut all: Vec<(f64, bool)> = normal
        .iter()
        .map(|v| (*v, false))
        .chain(anomalous.iter().map(|v| (*v, true)))
        .map(|(v, bad)| (if v.is_nan() { 0.0 } else { v }, bad))
        .collect();
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut rank_sum, mut index) = (0.0, 0);
    while index < all.len() {
        let same = all[index..]
            .iter()
            .take_while(|(v, _)| *v <= all[index].0)
            .count();
        let rank = index as f64 + f64::midpoint(same as f64, 1.0);
        let bad = all[index..index + same].iter().filter(|(_, bad)| *bad).count();
        rank_sum += rank * bad as f64;
        index += same;
    }
    let (n, m) = (normal.len() as f64, anomalous.len() as f64);
    (rank_sum - m * (m + 1.0) / 2.0) / (n * m)
}

/// Weights to start from: normal with standard deviation 1/4.
pub fn initial(mut draw: impl FnMut() -> f32) -> Vec<f32> {
    (0..PARAMETERS)
        .map(|_| narrow(0.25 * f64::from(draw())))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attack::statistics::Gaussian;
    use theriac_protocol::units::Round;

    #[test]
    fn gradient_is_that_of_differences() {
        assert_eq!(PARAMETERS, 624);
        let mut noise = Gaussian::new(3, Round(1), 0);
        let weights = initial(|| noise.draw());
        let row: [f32; FEATURES] = std::array::from_fn(|_| noise.draw());
        let mut gradient = vec![0.0; PARAMETERS];
        add_gradient(&weights, &row, 1.0, &mut gradient);
        for index in [0, 100, 239, 245, 260, 299, 301, 330, 353, 360, 500, 603, 604, 623] {
            let at = |step: f32| {
                let mut moved = weights.clone();
                moved[index] += step;
                error(&moved, &row) * FEATURES as f64
            };
            let slope = (at(1e-2) - at(-1e-2)) / 2e-2;
            assert!(
                (slope - f64::from(gradient[index])).abs() < 1e-2 * (1.0 + slope.abs()),
                "{index}: {slope} {}",
                gradient[index]
            );
        }
    }

    #[test]
    fn auroc_of_known_cases() {
        assert!((auroc(&[1.0, 2.0], &[3.0, 4.0]) - 1.0).abs() < 1e-12);
        assert!((auroc(&[3.0, 4.0], &[1.0, 2.0])).abs() < 1e-12);
        assert!((auroc(&[1.0, 1.0], &[1.0, 1.0]) - 0.5).abs() < 1e-12);
        assert!((auroc(&[1.0, 3.0], &[2.0, 4.0]) - 0.75).abs() < 1e-12);
    }
}
