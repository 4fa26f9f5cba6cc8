//! Weights of every channel on all lags: the full linear model.

use crate::LAG_COUNT;
use crate::global::{GlobalError, OwnLagWeights, check};

/// Values of a full linear model for so many channels: `(5C + 1)·C`, 7 258 at 38.
pub fn full_values(channels: usize) -> usize {
    (channels * LAG_COUNT + 1) * channels
}

/// Weights of every channel on all lags of all channels and a constant, `[5C + 1, channel]`, row-major: row `lag · C + channel`, lags as
/// in [`crate::LAGS`], the constant last.
#[derive(Debug, Clone, PartialEq)]
pub struct FullWeights {
    channels: usize,
    values: Vec<f32>,
}

impl FullWeights {
    /// Takes `[5C + 1, channel]` values.
    ///
    /// # Errors
    /// [`GlobalError::Length`] when they are not `(5C + 1)·C`; [`GlobalError::NonFinite`].
    pub fn new(channels: usize, values: Vec<f32>) -> Result<Self, GlobalError> {
        check(&values, channels, full_values(channels))?;
        Ok(Self { channels, values })
    }

    /// Takes what is known to be finite and of the right length.
    pub(crate) fn finite(channels: usize, values: Vec<f32>) -> Self {
        debug_assert_eq!(values.len(), full_values(channels));
        Self { channels, values }
    }

    /// Own-lag weights written as a full model: other channels' lags and the constant count nothing.
    pub fn of_own_lag(own: &OwnLagWeights) -> Self {
        let channels = own.channels();
        let mut values = vec![0.0; full_values(channels)];
        for channel in 0..channels {
            for (lag, weight) in own.channel(channel).iter().enumerate() {
                values[(lag * channels + channel) * channels + channel] = *weight;
            }
        }
        Self { channels, values }
    }

    /// All values, `[5C + 1, channel]`.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Number of channels.
    pub fn channels(&self) -> usize {
        self.channels
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forecaster::{forecast_full, forecast_own};

    #[test]
    fn own_lags_written_in_full_forecast_the_same() {
        let weights: Vec<f32> = (0..15_u8).map(|i| 0.19 + f32::from(i) / 1000.0).collect();
        let own = OwnLagWeights::new(3, weights).unwrap();
        let full = FullWeights::of_own_lag(&own);
        let lags: Vec<f32> = (0..15_u8).map(|i| f32::from(i * 7 % 11) - 5.0).collect();
        let with_constant: Vec<f32> = own
            .values()
            .chunks_exact(LAG_COUNT)
            .flat_map(|w| w.iter().copied().chain([0.0]))
            .collect();
        let (mut a, mut b) = ([0.0; 3], [0.0; 3]);
        forecast_own(&with_constant, 3, &lags, &mut a);
        forecast_full(full.values(), 3, &lags, &mut b);
        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5), "{a:?} {b:?}");
    }

    #[test]
    fn refuses_other_lengths_and_non_finite_values() {
        assert!(FullWeights::new(2, vec![0.0; 21]).is_err());
        let mut values = vec![0.0; 22];
        assert!(FullWeights::new(2, values.clone()).is_ok());
        values[3] = f32::INFINITY;
        assert_eq!(
            FullWeights::new(2, values),
            Err(GlobalError::NonFinite { index: 3 })
        );
    }
}
