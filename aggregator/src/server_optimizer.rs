//! Server optimisers: from the robust aggregate Δ of a round of weight changes to the model's step.
//!
//! Reddi et al. 2021, "Adaptive Federated Optimization" (ICLR, arXiv 2003.00295), algorithm 2, with the aggregate that a robust rule made in place of
//! the mean; `fedavgm` is Hsu, Qi and Brown 2019 (arXiv 1909.06335), equation in section 4. With t the round:
//!
//! | name | m | v | step |
//! |---|---|---|---|
//! | `fedavg` | | | ηΔ |
//! | `fedavgm` | m = βm + Δ | | ηm |
//! | `fedadam` | m = β₁m + (1 − β₁)Δ | v = β₂v + (1 − β₂)Δ² | ηm / (√v + τ) |
//! | `fedyogi` | as `fedadam` | v = v − (1 − β₂)Δ² sign(v − Δ²) | ηm / (√v + τ) |
//!
//! Conventions, which differ between programs: m begins at 0 and v at τ² (the paper asks for at least τ²); there is **no bias correction** (the paper has
//! none, Kingma and Ba's Adam has); τ is added after the square root; squares, products and sums are in `f64` and rounded to `f32` once, where they are
//! kept. So the same stored round gives the same bits, and `rounds replay` can tell.
//!
//! A bad round stays in m and v for about 1/(1 − β) rounds. The rule bounds what it can be, and a model that is rolled back to begins without any
//! memory: it belongs to one version of the model and is looked up by it.
//!
//! Only for weight changes. Moments are solved for weights anew in each round: there is no step to smooth, and scaling them would
//! change their ratio to the noise that the solve assumes.

use std::fmt;

use serde::{Deserialize, Serialize};

/// First bytes of a stored memory.
const MAGIC: &[u8; 8] = b"thopt\x00v1";

/// The optimisers by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerName {
    /// The aggregate times the rate.
    FedAvg,
    /// With momentum.
    FedAvgM,
    /// Steps scaled by a running mean of squares.
    FedAdam,
    /// The same, with a mean of squares that shrinks only as fast as squares are large.
    FedYogi,
}

impl OptimizerName {
    /// Every optimiser.
    pub const ALL: [Self; 4] = [Self::FedAvg, Self::FedAvgM, Self::FedAdam, Self::FedYogi];

    /// The name in files and records.
    pub fn word(self) -> &'static str {
        match self {
            Self::FedAvg => "fedavg",
            Self::FedAvgM => "fedavgm",
            Self::FedAdam => "fedadam",
            Self::FedYogi => "fedyogi",
        }
    }

    /// Vectors that it remembers.
    fn vectors(self) -> usize {
        match self {
            Self::FedAvg => 0,
            Self::FedAvgM => 1,
            Self::FedAdam | Self::FedYogi => 2,
        }
    }
}

impl fmt::Display for OptimizerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// An optimiser with its parameters, in range.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ServerOptimizer {
    /// Which.
    pub name: OptimizerName,
    /// η, above 0.
    pub rate: f64,
    /// β of `fedavgm`, β₁ of the others; 0 to below 1.
    pub momentum: f64,
    /// β₂, 0 to below 1.
    pub second_momentum: f64,
    /// τ, above 0: how small a change may be and still be scaled up.
    pub adaptivity: f64,
}

impl Default for ServerOptimizer {
    fn default() -> Self {
        Self {
            name: OptimizerName::FedAvg,
            rate: 1.0,
            momentum: 0.9,
            second_momentum: 0.99,
            adaptivity: 1e-3,
        }
    }
}

/// What an optimiser remembers after a model.
#[derive(Debug, Clone, PartialEq)]
pub struct OptimizerState {
    name: OptimizerName,
    /// Rounds that are in it.
    steps: u64,
    /// m, then v: `[vectors × d]`.
    values: Vec<f32>,
}

/// A value of the step or of the memory is not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("value {index} of the server optimiser's step is not finite")]
pub struct NotFinite {
    /// Which value.
    pub index: usize,
}

impl ServerOptimizer {
    /// Whether it only hands the aggregate on.
    pub fn is_plain(&self) -> bool {
        *self
            == Self {
                name: OptimizerName::FedAvg,
                rate: 1.0,
                ..*self
            }
    }

    /// The model's step for the aggregate Δ (`[d]`), and the memory after it (`None` for one that has none). A memory of another optimiser or length
    /// is not used: it begins anew.
    ///
    /// # Errors
    /// [`NotFinite`].
    pub fn step(
        &self,
        aggregate: Vec<f32>,
        memory: Option<&OptimizerState>,
    ) -> Result<(Vec<f32>, Option<OptimizerState>), NotFinite> {
        if self.is_plain() {
            return Ok((aggregate, None));
        }
        let d = aggregate.len();
        let mut state = memory
            .filter(|memory| memory.name == self.name && memory.values.len() == self.name.vectors() * d)
            .cloned()
            .unwrap_or_else(|| self.begin(d));
        state.steps = state.steps.saturating_add(1);
        let (first, second) = state.values.split_at_mut(d.min(self.name.vectors() * d));
        let mut step = aggregate;
        for (index, value) in step.iter_mut().enumerate() {
            let change = f64::from(*value);
            let square = change * change;
            let mut made = match self.name {
                OptimizerName::FedAvg => change,
                OptimizerName::FedAvgM => {
                    first[index] = narrow(self.momentum * f64::from(first[index]) + change);
                    f64::from(first[index])
                }
                OptimizerName::FedAdam | OptimizerName::FedYogi => {
                    let m = self.momentum * f64::from(first[index]) + (1.0 - self.momentum) * change;
                    first[index] = narrow(m);
                    let v = f64::from(second[index]);
                    let v = if self.name == OptimizerName::FedAdam {
                        self.second_momentum * v + (1.0 - self.second_momentum) * square
                    } else {
                        v - (1.0 - self.second_momentum) * square * sign(v - square)
                    };
                    second[index] = narrow(v);
                    f64::from(first[index]) / (f64::from(second[index]).sqrt() + self.adaptivity)
                }
            };
            made *= self.rate;
            *value = narrow(made);
            let remembered = first.get(index).is_none_or(|m| m.is_finite())
                && second.get(index).is_none_or(|v| v.is_finite());
            if !value.is_finite() || !remembered {
                return Err(NotFinite { index });
            }
        }
        let keeps = self.name.vectors() > 0;
        Ok((step, keeps.then_some(state)))
    }

    fn begin(&self, d: usize) -> OptimizerState {
        let mut values = vec![0.0; self.name.vectors() * d];
        if self.name.vectors() == 2 {
            values[d..].fill(narrow(self.adaptivity * self.adaptivity));
        }
        OptimizerState {
            name: self.name,
            steps: 0,
            values,
        }
    }
}

impl OptimizerState {
    /// Rounds that are in it.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// As it is stored: a mark, the optimiser, the number of rounds, and the vectors as little-endian `f32`.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(17 + 4 * self.values.len());
        bytes.extend_from_slice(MAGIC);
        let place = OptimizerName::ALL.iter().position(|name| *name == self.name);
        bytes.push(u8::try_from(place.unwrap_or_default()).unwrap_or_default());
        bytes.extend_from_slice(&self.steps.to_le_bytes());
        for value in &self.values {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    /// The way back; `None` for anything else than what [`OptimizerState::to_bytes`] gave.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let rest = bytes.strip_prefix(MAGIC)?;
        let (place, rest) = rest.split_first()?;
        let (steps, values) = rest.split_first_chunk::<8>()?;
        let name = *OptimizerName::ALL.get(usize::from(*place))?;
        let chunks = values.chunks_exact(4);
        let whole = chunks.remainder().is_empty() && name.vectors() > 0;
        let values: Vec<f32> = chunks
            .filter_map(|value| value.try_into().ok().map(f32::from_le_bytes))
            .collect();
        let fits = whole
            && values.len().is_multiple_of(name.vectors())
            && values.iter().all(|value| value.is_finite());
        fits.then_some(Self {
            name,
            steps: u64::from_le_bytes(*steps),
            values,
        })
    }
}

/// −1, 0 or 1. (`f64::signum` has no 0.)
fn sign(value: f64) -> f64 {
    if value > 0.0 {
        1.0
    } else if value < 0.0 {
        -1.0
    } else {
        0.0
    }
}

#[expect(clippy::cast_possible_truncation, reason = "rounded once, where it is kept")]
fn narrow(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(name: OptimizerName) -> ServerOptimizer {
        ServerOptimizer {
            name,
            rate: 0.1,
            momentum: 0.9,
            second_momentum: 0.99,
            adaptivity: 0.01,
        }
    }

    /// Steps over three rounds of two values.
    fn run(optimizer: ServerOptimizer) -> Vec<Vec<f32>> {
        let mut memory = None;
        let rounds = [[0.5_f32, -0.02], [0.25, 0.04], [-0.125, 0.0]];
        rounds
            .iter()
            .map(|change| {
                let (step, next) = optimizer.step(change.to_vec(), memory.as_ref()).unwrap();
                memory = next;
                step
            })
            .collect()
    }

    /// Computed with numpy in `float64` from the equations of this file's head:
    /// `m=b1*m+(1-b1)*d; v=b2*v+(1-b2)*d*d` (Yogi: `v-=(1-b2)*d*d*np.sign(v-d*d)`); `eta*m/(np.sqrt(v)+tau)`, v₀ = τ².
    #[test]
    fn steps_are_those_of_the_equations() {
        let expected = [
            (
                OptimizerName::FedAvg,
                [[0.05, -0.002], [0.025, 0.004], [-0.0125, 0.0]],
            ),
            (
                OptimizerName::FedAvgM,
                [[0.05, -0.002], [0.07, 0.0022], [0.0505, 0.001_98]],
            ),
            (
                OptimizerName::FedAdam,
                [
                    [0.081_993_574, -0.009_926_104],
                    [0.105_182_570, 0.010_545_793],
                    [0.074_660_823, 0.009_516_048],
                ],
            ),
            (
                OptimizerName::FedYogi,
                [
                    [0.081_980_390, -0.009_901_951],
                    [0.104_807_547, 0.010_498_963],
                    [0.074_102_860, 0.009_449_066],
                ],
            ),
        ];
        for (name, steps) in expected {
            let found = run(with(name));
            for (found, expected) in found.iter().flatten().zip(steps.iter().flatten()) {
                let expected: f64 = *expected;
                assert!(
                    (f64::from(*found) - expected).abs() < 1e-7,
                    "{name}: {found} is not {expected}"
                );
            }
        }
    }

    #[test]
    fn plain_averaging_keeps_every_bit_and_no_memory() {
        let values = vec![0.1_f32, -0.0, 1e-40];
        let (step, memory) = ServerOptimizer::default().step(values.clone(), None).unwrap();
        assert!(step.iter().zip(&values).all(|(a, b)| a.to_bits() == b.to_bits()));
        assert_eq!(memory, None);
    }

    #[test]
    fn memory_comes_back_from_its_bytes_and_goes_on_with_the_same_bits() {
        for name in [
            OptimizerName::FedAvgM,
            OptimizerName::FedAdam,
            OptimizerName::FedYogi,
        ] {
            let optimizer = with(name);
            let (_, memory) = optimizer.step(vec![0.3, -0.7], None).unwrap();
            let memory = memory.unwrap();
            let back = OptimizerState::from_bytes(&memory.to_bytes()).unwrap();
            assert_eq!((&back, back.steps()), (&memory, 1));
            assert_eq!(
                optimizer.step(vec![0.1, 0.2], Some(&back)),
                optimizer.step(vec![0.1, 0.2], Some(&memory))
            );
            let bytes = memory.to_bytes();
            for cut in [0, 8, 16, bytes.len() - 1] {
                assert_eq!(OptimizerState::from_bytes(&bytes[..cut]), None, "{cut} bytes");
            }
        }
    }

    #[test]
    fn memory_of_another_optimiser_or_model_is_not_used() {
        let (_, memory) = with(OptimizerName::FedAdam).step(vec![5.0; 4], None).unwrap();
        let fresh = with(OptimizerName::FedAvgM).step(vec![1.0; 4], None).unwrap();
        assert_eq!(
            with(OptimizerName::FedAvgM)
                .step(vec![1.0; 4], memory.as_ref())
                .unwrap(),
            fresh
        );
        let shorter = with(OptimizerName::FedAdam).step(vec![1.0; 2], None).unwrap();
        assert_eq!(
            with(OptimizerName::FedAdam)
                .step(vec![1.0; 2], memory.as_ref())
                .unwrap(),
            shorter
        );
    }

    #[test]
    fn what_overflows_is_refused_with_its_place() {
        let optimizer = ServerOptimizer {
            rate: 10.0,
            ..with(OptimizerName::FedAvgM)
        };
        assert_eq!(
            optimizer.step(vec![1.0, f32::MAX], None),
            Err(NotFinite { index: 1 })
        );
    }
}
