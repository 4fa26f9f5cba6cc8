//! What the next row should be: each channel from its own lags, and each channel from all lags.
//!
//! ```text
//! own    x̂_c = Σ_l w_{c,l} · x_{c,t−l} + b_c                          6·C weights
//! full   x̂   = a_t W + g(a_t),  a_t = all lags of all channels, 1      (5C + 1)·C weights
//! g(a)   = V tanh(U a + u) + v                                         a small residual network, V = v = 0 at first
//! ```
//!
//! A forecast is plain loops over flat `f32` weights, so that one row costs microseconds and no allocation; the
//! network is trained in candle (see [`train`](crate::train)), whose result these loops reproduce.

use crate::LAG_COUNT;
use crate::global::delta_layout;

/// Units of the residual network's hidden layer: at 38 channels 1 870 weights. A released weight delta carries noise
/// on each of them, so the network stays under 2 000.
pub const HIDDEN: usize = 8;

/// Bound of the network's inputs, in scaled units.
pub(crate) const NETWORK_INPUT_MAX: f32 = 8.0;

/// Both linear paths and the network.
#[derive(Debug, Clone, PartialEq)]
pub struct Forecaster {
    channels: usize,
    /// `[channel, 5 lags + 1]`.
    pub(crate) own: Vec<f32>,
    /// `[5C + 1, channel]`, or empty.
    pub(crate) full: Vec<f32>,
    /// Flat, in the order of [`delta_layout`]; `None` while its last layer is zero.
    pub(crate) network: Option<ResidualNetwork>,
}

impl Forecaster {
    /// Takes weights `[channel, 6]` and `[5C + 1, channel]`, or none of the latter: then the full path is the own one.
    ///
    /// # Panics
    /// When a length does not match.
    pub(crate) fn new(
        channels: usize,
        own: Vec<f32>,
        full: Vec<f32>,
        network: Option<ResidualNetwork>,
    ) -> Self {
        assert_eq!(own.len(), channels * (LAG_COUNT + 1), "own-lag weights");
        assert!(
            full.is_empty() || full.len() == (channels * LAG_COUNT + 1) * channels,
            "full weights"
        );
        Self {
            channels,
            own,
            full,
            network,
        }
    }

    /// Number of channels.
    pub(crate) fn channels(&self) -> usize {
        self.channels
    }

    /// Forecast from own lags; `lags` as [`LagRing::lags`](crate::window::LagRing::lags) writes them.
    pub fn own(&self, lags: &[f32], out: &mut [f32]) {
        forecast_own(&self.own, self.channels, lags, out);
    }

    /// Forecast from all lags, with the network where there is one; from own lags where there are no weights for all.
    pub fn full(&self, lags: &[f32], out: &mut [f32]) {
        if self.full.is_empty() {
            self.own(lags, out);
        } else {
            forecast_full(&self.full, self.channels, lags, out);
        }
        if let Some(network) = &self.network {
            network.add(lags, out);
        }
    }
}

/// Every channel from its own lags by weights `[channel, 5 lags + 1]`.
pub(crate) fn forecast_own(weights: &[f32], channels: usize, lags: &[f32], out: &mut [f32]) {
    for (channel, (weights, out)) in weights.chunks_exact(LAG_COUNT + 1).zip(out).enumerate() {
        *out = weights[LAG_COUNT];
        for (lag, weight) in weights[..LAG_COUNT].iter().enumerate() {
            *out += weight * lags[lag * channels + channel];
        }
    }
}

/// Every channel from all lags by weights `[5C + 1, channel]`.
pub(crate) fn forecast_full(weights: &[f32], channels: usize, lags: &[f32], out: &mut [f32]) {
    out.copy_from_slice(&weights[lags.len() * channels..]);
    for (lag, weights) in lags.iter().zip(weights.chunks_exact(channels.max(1))) {
        for (out, weight) in out.iter_mut().zip(weights) {
            *out += lag * weight;
        }
    }
}

/// The small network `g`, as flat `f32` weights.
#[derive(Debug, Clone, PartialEq)]
pub struct ResidualNetwork {
    channels: usize,
    values: Vec<f32>,
}

impl ResidualNetwork {
    /// Takes flat weights in the order of [`delta_layout`]; `None` when the last layer is zero (it would add
    /// nothing) or the length is another.
    pub fn new(channels: usize, values: Vec<f32>) -> Option<Self> {
        let layout = delta_layout(channels);
        let speaks = |name: &str| {
            layout
                .range(name)
                .is_some_and(|range| values[range].iter().any(|w| *w != 0.0))
        };
        if values.len() != layout.len() {
            return None;
        }
        (speaks("network.output.weight") || speaks("network.output.bias"))
            .then_some(Self { channels, values })
    }

    /// Its weights in the order of [`delta_layout`].
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Adds `g(lags)` to `out`.
    pub fn add(&self, lags: &[f32], out: &mut [f32]) {
        // The order of `delta_layout`: hidden bias, hidden weight, output bias, output weight.
        let inputs = self.channels * LAG_COUNT;
        let (hidden_bias, rest) = self.values.split_at(HIDDEN);
        let (hidden_weight, rest) = rest.split_at(HIDDEN * inputs);
        let (output_bias, output_weight) = rest.split_at(self.channels);
        let mut hidden = [0.0_f32; HIDDEN];
        for (unit, (bias, weights)) in hidden_bias
            .iter()
            .zip(hidden_weight.chunks_exact(inputs.max(1)))
            .enumerate()
        {
            let products = weights
                .iter()
                .zip(lags)
                .map(|(w, lag)| w * lag.clamp(-NETWORK_INPUT_MAX, NETWORK_INPUT_MAX));
            hidden[unit] = (bias + products.sum::<f32>()).tanh();
        }
        for ((out, bias), weights) in out
            .iter_mut()
            .zip(output_bias)
            .zip(output_weight.chunks_exact(HIDDEN))
        {
            *out += bias + dot(weights, &hidden);
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::global::GlobalModel;

    #[test]
    fn both_paths_agree_when_the_full_one_holds_only_own_lags() {
        let own: Vec<f32> = (0..12_u8).map(|i| f32::from(i) / 10.0).collect();
        let mut full = vec![0.0; 11 * 2];
        for channel in 0..2 {
            for lag in 0..LAG_COUNT {
                full[(lag * 2 + channel) * 2 + channel] = own[channel * 6 + lag];
            }
            full[10 * 2 + channel] = own[channel * 6 + 5];
        }
        let forecaster = Forecaster::new(2, own, full, None);
        let lags: Vec<f32> = (0..10_u8).map(|i| 1.0 - f32::from(i)).collect();
        let (mut a, mut b) = ([0.0; 2], [0.0; 2]);
        forecaster.own(&lags, &mut a);
        forecaster.full(&lags, &mut b);
        assert!((a[0] - b[0]).abs() < 1e-5 && (a[1] - b[1]).abs() < 1e-5);
        assert!(a[0] != 0.0);
    }

    #[test]
    fn silent_network_is_left_out() {
        assert!(ResidualNetwork::new(3, GlobalModel::initial(3, 1).network()).is_none());
        assert!(ResidualNetwork::new(3, vec![1.0; 4]).is_none());
        let mut values = GlobalModel::initial(3, 1).network();
        *values.last_mut().unwrap() = 0.5;
        assert!(ResidualNetwork::new(3, values).is_some());
    }

    #[test]
    fn network_is_bounded_whatever_it_is_fed() {
        let network = ResidualNetwork::new(2, vec![1.0; delta_layout(2).len()]).unwrap();
        let mut out = [0.0; 2];
        network.add(&[1e30; 10], &mut out);
        assert!(out.iter().all(|v| v.abs() <= 1.0 + HIDDEN as f32));
    }
}
