//! What an honest site releases: clipped moments of a series, with noise. The same numbers again for the same seed.

use theriac_model::moments::{BLOCK_ROWS, MOMENTS_PER_CHANNEL, block};

/// The sum of the clipped moments of twenty blocks of `x_t = 0.9 x_{t−1} + shock` in each channel, `[channel, 22]`, with noise of standard deviation `noise` on every value.
pub(crate) fn release(channels: usize, clip: f32, noise: f32, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut shock = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 16_777_216.0 - 0.5
    };
    let mut sum = vec![0.0_f32; channels * MOMENTS_PER_CHANNEL];
    let mut level = vec![0.0_f32; channels];
    for _ in 0..20 {
        let mut rows = Vec::new();
        for _ in 0..BLOCK_ROWS {
            for level in &mut level {
                *level = 0.9 * *level + shock();
                rows.push(*level);
            }
        }
        let moments = block(&rows, BLOCK_ROWS);
        let norm = moments.iter().map(|v| v * v).sum::<f32>().sqrt();
        let factor = (clip / norm).min(1.0);
        sum.iter_mut()
            .zip(&moments)
            .for_each(|(sum, v)| *sum += v * factor);
    }
    for value in &mut sum {
        *value += noise * (0..12).map(|_| shock()).sum::<f32>();
    }
    sum
}
