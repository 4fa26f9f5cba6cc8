//! What one site can do by itself.

use super::statistics::{Gaussian, Spread, narrow, norm};

/// How far [`sign_flip`] enlarges what it negates: enough to outweigh the other four edges of a small fleet under a plain mean.
pub const SIGN_FLIP_FACTOR: f32 = -5.0;

/// Every how many values [`plant_nan`] plants one.
const NAN_STRIDE: usize = 17;

/// How many times the update's own root mean square the noise of [`scaled_noise`] reaches.
const NOISE_FACTOR: f64 = 20.0;

/// Part of the honest standard deviation that an echo is disguised with.
const ECHO_NOISE: f32 = 0.1;

/// Minus five times the own update.
pub fn sign_flip(own: &[f32]) -> Vec<f32> {
    own.iter().map(|value| value * SIGN_FLIP_FACTOR).collect()
}

/// Noise twenty times as strong as the own update.
pub fn scaled_noise(own: &[f32], noise: &mut Gaussian) -> Vec<f32> {
    let norm = norm(own).max(f64::from(f32::MIN_POSITIVE)) * NOISE_FACTOR;
    noise_of_norm(own.len(), norm, noise)
}

/// `length` Gaussian values whose norm is `wanted`.
pub fn noise_of_norm(length: usize, wanted: f64, noise: &mut Gaussian) -> Vec<f32> {
    let values: Vec<f32> = (0..length).map(|_| noise.draw()).collect();
    let scale = wanted / norm(&values).max(f64::from(f32::MIN_POSITIVE));
    values
        .into_iter()
        .map(|value| narrow(f64::from(value) * scale))
        .collect()
}

/// What the last round gave, or zero before any, with noise of a tenth of the honest standard deviation.
pub fn echo(length: usize, previous: Option<&[f32]>, honest: &Spread, noise: &mut Gaussian) -> Vec<f32> {
    (0..length)
        .map(|index| {
            let last = previous.and_then(|p| p.get(index)).copied().unwrap_or(0.0);
            let deviation = honest.deviation.get(index).copied().unwrap_or(0.0);
            last + ECHO_NOISE * deviation * noise.draw()
        })
        .collect()
}

/// NaN at every 17th place.
pub fn plant_nan(own: &[f32]) -> Vec<f32> {
    let mut values = own.to_vec();
    values
        .iter_mut()
        .step_by(NAN_STRIDE)
        .for_each(|value| *value = f32::NAN);
    values
}

/// The own update with another first value.
pub fn first_set_to(own: &[f32], value: f32) -> Vec<f32> {
    let mut values = own.to_vec();
    if let Some(first) = values.first_mut() {
        *first = value;
    }
    values
}
