//! The model that crosses sites, and the layouts of what is sent.

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha20Rng;

use crate::LAG_COUNT;
use crate::forecaster::HIDDEN;
use crate::gradient::Descent;
use crate::linear::FullWeights;
use crate::moments::MOMENTS_PER_CHANNEL;
use crate::params::ParamLayout;

/// What every lag's own weight is before anything is learnt: a channel is predicted as 0.19 times the sum of its
/// own five lags. A public constant; it depends on no data.
pub const PUBLIC_OWN_WEIGHT: f32 = 0.19;

const OWN_LAG: &str = "own_lag.weight";
const OWN_LEVEL: &str = "own_lag.level";
const AVERAGE: &str = "linear.average";
const ITERATE: &str = "linear.iterate";
const STEPS: &str = "linear.steps";
const VELOCITY: &str = "linear.velocity";
/// Tensors of the residual network, `[out, in]` for weights.
pub(crate) const NETWORK: [&str; 4] = [
    "network.hidden.bias",
    "network.hidden.weight",
    "network.output.bias",
    "network.output.weight",
];

/// Why flat values are no global model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GlobalError {
    /// Another number of values.
    #[error(
        "a model for {channels} channels has {expected} values, found {found}: it was made for another layout"
    )]
    Length {
        /// Channels of the model.
        channels: usize,
        /// Values that its layout has.
        expected: usize,
        /// Values that were given.
        found: usize,
    },
    /// A value is NaN or infinite.
    #[error("value {index} of the model is not finite")]
    NonFinite {
        /// Position in the flat vector.
        index: usize,
    },
}

/// Weights of every channel on its own lags, `[channel, lag]`, without intercept, lags as in [`crate::LAGS`]; and how far each channel
/// usually is from the mean of its lags elsewhere, its level, in publicly scaled units (0 = not known).
#[derive(Debug, Clone, PartialEq)]
pub struct OwnLagWeights {
    weights: Vec<f32>,
    levels: Vec<f32>,
}

impl OwnLagWeights {
    /// Takes `[channel, lag]` values.
    ///
    /// # Errors
    /// [`GlobalError::Length`] when they are not 5 per channel; [`GlobalError::NonFinite`].
    pub fn new(channels: usize, weights: Vec<f32>) -> Result<Self, GlobalError> {
        check(&weights, channels, channels * LAG_COUNT)?;
        let levels = vec![0.0; channels];
        Ok(Self { weights, levels })
    }

    /// The same with levels `[channel]`.
    ///
    /// # Errors
    /// [`GlobalError::Length`] when they are not one per channel; [`GlobalError::NonFinite`].
    pub fn with_levels(self, levels: Vec<f32>) -> Result<Self, GlobalError> {
        check(&levels, self.channels(), self.channels())?;
        Ok(Self { levels, ..self })
    }

    /// Takes what is known to be finite and of fitting lengths.
    pub(crate) fn finite(weights: Vec<f32>, levels: Vec<f32>) -> Self {
        debug_assert_eq!(weights.len(), levels.len() * LAG_COUNT);
        Self { weights, levels }
    }

    /// The public constant for every channel and lag.
    pub fn public_constant(channels: usize) -> Self {
        Self {
            weights: vec![PUBLIC_OWN_WEIGHT; channels * LAG_COUNT],
            levels: vec![0.0; channels],
        }
    }

    /// All weights `[channel, lag]`.
    pub fn values(&self) -> &[f32] {
        &self.weights
    }

    /// The level of every channel, `[channel]`.
    pub fn levels(&self) -> &[f32] {
        &self.levels
    }

    /// The five weights of one channel.
    ///
    /// # Panics
    /// When there is no such channel.
    pub fn channel(&self, channel: usize) -> &[f32] {
        &self.weights[channel * LAG_COUNT..][..LAG_COUNT]
    }

    /// Number of channels.
    pub fn channels(&self) -> usize {
        self.weights.len() / LAG_COUNT
    }
}

/// The published model: own-lag weights, the residual network and, where rounds of gradients made it, the full linear model; one flat
/// vector in layout order.
#[derive(Debug, Clone, PartialEq)]
pub struct GlobalModel {
    channels: usize,
    layout: ParamLayout,
    values: Vec<f32>,
}

impl GlobalModel {
    /// The model before any round: the public constant, and a network whose hidden layer is drawn from `seed` and
    /// whose last layer is zero, so that it predicts nothing yet. Everybody who knows both numbers computes the
    /// same bits.
    pub fn initial(channels: usize, seed: u64) -> Self {
        let layout = model_layout(channels);
        let mut values = vec![0.0; layout.len()];
        let mut rng = ChaCha20Rng::seed_from_u64(seed);
        // Glorot's uniform bound for a tanh layer (Glorot and Bengio 2010, equation 16).
        let bound = (6.0 / (channels * LAG_COUNT + HIDDEN) as f32).sqrt();
        for (name, _, range) in layout.iter() {
            match name {
                OWN_LAG => values[range].fill(PUBLIC_OWN_WEIGHT),
                "network.hidden.weight" => {
                    values[range]
                        .iter_mut()
                        .for_each(|w| *w = rng.random_range(-bound..bound));
                }
                _ => {}
            }
        }
        Self {
            channels,
            layout,
            values,
        }
    }

    /// Takes flat values in the order of [`model_layout`] or [`linear_model_layout`], as received; which one, their number says.
    ///
    /// # Errors
    /// [`GlobalError::Length`] for another number of values; [`GlobalError::NonFinite`] for NaN or infinity.
    pub fn from_values(channels: usize, values: Vec<f32>) -> Result<Self, GlobalError> {
        let mut layout = model_layout(channels);
        if values.len() != layout.len() {
            let linear = linear_model_layout(channels);
            if values.len() == linear.len() {
                layout = linear;
            }
        }
        check(&values, channels, layout.len())?;
        Ok(Self {
            channels,
            layout,
            values,
        })
    }

    /// The same model with other own-lag weights and levels: what a round of moments makes.
    ///
    /// # Errors
    /// [`GlobalError::Length`] when they are for other channels.
    pub fn with_own_lag(&self, own: &OwnLagWeights) -> Result<Self, GlobalError> {
        check(&own.weights, self.channels, self.channels * LAG_COUNT)?;
        let mut next = self.clone();
        for (name, values) in [(OWN_LAG, &own.weights), (OWN_LEVEL, &own.levels)] {
            if let Some(range) = self.layout.range(name) {
                next.values[range].copy_from_slice(values);
            }
        }
        Ok(next)
    }

    /// The same model with `delta` (in the order of [`delta_layout`]) added to the network: what a round of
    /// weight deltas makes.
    ///
    /// # Errors
    /// [`GlobalError::Length`], [`GlobalError::NonFinite`].
    pub fn with_delta(&self, delta: &[f32]) -> Result<Self, GlobalError> {
        let layout = delta_layout(self.channels);
        check(delta, self.channels, layout.len())?;
        let mut next = self.clone();
        for (name, _, from) in layout.iter() {
            if let Some(to) = self.layout.range(name) {
                next.values[to]
                    .iter_mut()
                    .zip(&delta[from])
                    .for_each(|(value, step)| *value += step);
            }
        }
        check(&next.values, self.channels, next.values.len())?;
        Ok(next)
    }

    /// Where the descent of the full linear model stands; before the first round of gradients it begins at the own-lag weights.
    pub fn descent(&self) -> Descent {
        let Some(average) = self.linear() else {
            return Descent::begin(FullWeights::of_own_lag(&self.own_lag()));
        };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "whatever a foreign model says, a float becomes a count without wrapping"
        )]
        let steps = self.part(STEPS).first().copied().unwrap_or(0.0) as u32;
        Descent {
            iterate: FullWeights::finite(self.channels, self.part(ITERATE)),
            velocity: self.part(VELOCITY),
            average,
            steps,
        }
    }

    /// The same model after a step of the full linear model: what a round of gradients makes. Own-lag weights and levels stay what they are, the
    /// public constant or what a round of moments made of them: a full model's weights on a channel's own lags forecast little without the rest.
    ///
    /// # Errors
    /// [`GlobalError`] for other channels, or a value that is not finite.
    pub fn with_descent(&self, descent: &Descent) -> Result<Self, GlobalError> {
        let layout = linear_model_layout(self.channels);
        let mut values = vec![0.0; layout.len()];
        for (name, _, range) in layout.iter() {
            let part = match name {
                AVERAGE => descent.average.values().to_vec(),
                ITERATE => descent.iterate.values().to_vec(),
                VELOCITY => descent.velocity.clone(),
                STEPS => vec![descent.steps as f32],
                other => self.part(other),
            };
            check(&part, self.channels, range.len())?;
            values[range].copy_from_slice(&part);
        }
        Ok(Self {
            channels: self.channels,
            layout,
            values,
        })
    }

    /// The same model without its full linear part: what a round of another kind builds on.
    #[must_use]
    pub fn without_linear(&self) -> Self {
        let layout = model_layout(self.channels);
        let values = layout.iter().flat_map(|(name, ..)| self.part(name)).collect();
        Self {
            channels: self.channels,
            layout,
            values,
        }
    }

    /// The full linear model that edges use, where rounds of gradients made one.
    pub fn linear(&self) -> Option<FullWeights> {
        let average = self.layout.range(AVERAGE)?;
        Some(FullWeights::finite(self.channels, self.values[average].to_vec()))
    }

    /// One tensor; empty when the layout has none of this name.
    fn part(&self, name: &str) -> Vec<f32> {
        self.values[self.layout.range(name).unwrap_or_default()].to_vec()
    }

    /// The own-lag part.
    pub fn own_lag(&self) -> OwnLagWeights {
        OwnLagWeights {
            weights: self.part(OWN_LAG),
            levels: self.part(OWN_LEVEL),
        }
    }

    /// The network's part, in the order of [`delta_layout`].
    pub fn network(&self) -> Vec<f32> {
        let ranges = NETWORK.iter().filter_map(|name| self.layout.range(name));
        ranges.flat_map(|range| &self.values[range]).copied().collect()
    }

    /// All values in layout order.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Number of channels.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Names, shapes and order.
    pub fn layout(&self) -> &ParamLayout {
        &self.layout
    }
}

pub(crate) fn check(values: &[f32], channels: usize, expected: usize) -> Result<(), GlobalError> {
    if values.len() != expected {
        return Err(GlobalError::Length {
            channels,
            expected,
            found: values.len(),
        });
    }
    match values.iter().position(|v| !v.is_finite()) {
        Some(index) => Err(GlobalError::NonFinite { index }),
        None => Ok(()),
    }
}

/// Layout of a [`GlobalModel`].
pub fn model_layout(channels: usize) -> ParamLayout {
    let own = [(OWN_LAG, vec![channels, LAG_COUNT]), (OWN_LEVEL, vec![channels])];
    ParamLayout::new(network_shapes(channels).into_iter().chain(own))
}

/// Layout of a [`GlobalModel`] with a full linear part.
pub fn linear_model_layout(channels: usize) -> ParamLayout {
    let full = vec![channels * LAG_COUNT + 1, channels];
    let linear = [AVERAGE, ITERATE, VELOCITY].map(|name| (name.to_owned(), full.clone()));
    let steps = (STEPS.to_owned(), vec![1]);
    let base = model_layout(channels);
    let base = base
        .iter()
        .map(|(name, shape, _)| (name.to_owned(), shape.to_vec()));
    ParamLayout::new(base.chain(linear).chain([steps]))
}

/// Layout of the gradient that a site releases: of the full linear model, `[5C + 1, channel]`, in whitened coordinates.
pub fn gradient_layout(channels: usize) -> ParamLayout {
    ParamLayout::new([("gradient", vec![channels * LAG_COUNT + 1, channels])])
}

/// Layout of the moments that a site releases: per channel 15 entries of `Σ p pᵀ`, 5 of `Σ p y`, presence
/// and level.
pub fn moments_layout(channels: usize) -> ParamLayout {
    ParamLayout::new([("moments", vec![channels, MOMENTS_PER_CHANNEL])])
}

/// Layout of the weight delta that a site releases: the network's tensors.
pub fn delta_layout(channels: usize) -> ParamLayout {
    ParamLayout::new(network_shapes(channels))
}

fn network_shapes(channels: usize) -> [(&'static str, Vec<usize>); 4] {
    let [hidden_bias, hidden_weight, output_bias, output_weight] = NETWORK;
    [
        (hidden_bias, vec![HIDDEN]),
        (hidden_weight, vec![HIDDEN, channels * LAG_COUNT]),
        (output_bias, vec![channels]),
        (output_weight, vec![channels, HIDDEN]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(digest: [u8; 32]) -> String {
        data_encoding::HEXLOWER.encode(&digest)
    }

    /// A change here makes every deployed edge refuse the next model: make a new layout name instead. Computed with
    /// Python's hashlib over the text that `ParamLayout::digest` documents.
    #[test]
    fn digests_of_layouts_are_golden() {
        assert_eq!(
            hex(model_layout(38).digest()),
            "91388daf13d89343b8565096cd3e0ae8f49878b43f6915bbc4b6f68447f1b714"
        );
        assert_eq!(
            hex(moments_layout(38).digest()),
            "2269ab3836cdf8504cc62652fecca2afedb796612fb6fb6790c3011be3de5ffa"
        );
        assert_eq!(
            hex(delta_layout(38).digest()),
            "a7f68f8fec21d834b4cf767bf19d44efdbb520be4b6b93cbd97fba16a1569a9a"
        );
    }

    #[test]
    fn sizes_are_those_of_the_recipe() {
        assert_eq!(moments_layout(38).len(), 836);
        assert_eq!(delta_layout(38).len(), 190 * HIDDEN + HIDDEN + 38 * HIDDEN + 38);
        assert_eq!(model_layout(38).len(), delta_layout(38).len() + 190 + 38);
    }

    #[test]
    fn initial_model_is_the_public_constant_and_a_silent_network() {
        let model = GlobalModel::initial(3, 7);
        assert_eq!(model.own_lag(), OwnLagWeights::public_constant(3));
        assert_eq!(model, GlobalModel::initial(3, 7));
        assert_ne!(model, GlobalModel::initial(3, 8));
        let layout = delta_layout(3);
        let network = model.network();
        for name in ["network.output.bias", "network.output.weight"] {
            assert!(network[layout.range(name).unwrap()].iter().all(|w| *w == 0.0));
        }
        assert!(
            network[layout.range("network.hidden.weight").unwrap()]
                .iter()
                .any(|w| *w != 0.0)
        );
    }

    #[test]
    fn refuses_other_lengths_and_non_finite_values() {
        let model = GlobalModel::initial(2, 0);
        assert_eq!(
            GlobalModel::from_values(2, vec![0.0; 3]),
            Err(GlobalError::Length {
                channels: 2,
                expected: model.values().len(),
                found: 3
            })
        );
        let mut weights = vec![0.1; 10];
        weights[4] = f32::NAN;
        assert_eq!(
            OwnLagWeights::new(2, weights),
            Err(GlobalError::NonFinite { index: 4 })
        );
        let other = OwnLagWeights::public_constant(3);
        assert!(matches!(
            model.with_own_lag(&other),
            Err(GlobalError::Length { .. })
        ));
        let known = OwnLagWeights::public_constant(2);
        assert!(known.clone().with_levels(vec![0.1; 3]).is_err());
        assert!(known.with_levels(vec![0.1, f32::INFINITY]).is_err());
        let huge = vec![f32::MAX; delta_layout(2).len()];
        let once = model.with_delta(&huge).unwrap();
        assert!(once.with_delta(&huge).is_err(), "an overflowing sum was taken");
    }

    #[test]
    fn parts_survive_the_flat_form() {
        let own = OwnLagWeights::new(2, vec![0.5; 10]).unwrap();
        let own = own.with_levels(vec![0.1, 0.2]).unwrap();
        let model = GlobalModel::initial(2, 1).with_own_lag(&own).unwrap();
        let delta: Vec<f32> = (0..delta_layout(2).len()).map(|i| i as f32).collect();
        let moved = model.with_delta(&delta).unwrap();
        assert_eq!(moved.own_lag(), own);
        let back = GlobalModel::from_values(2, moved.values().to_vec()).unwrap();
        assert_eq!(back, moved);
        let steps: Vec<f32> = back
            .network()
            .iter()
            .zip(model.network())
            .map(|(b, a)| b - a)
            .collect();
        assert!(
            steps
                .iter()
                .zip(&delta)
                .all(|(got, sent)| (got - sent).abs() < 1e-4)
        );
    }
}
