//! What a hostile edge does to the values it releases.
//!
//! Every attack is a pure function on values that are already clipped and noised. It stands for an edge whose
//! program was replaced: no such code is reachable from the `theriac-edge` binary.

use std::fmt;
use std::str::FromStr;

use theriac_protocol::units::Round;

/// An attack on the values of one update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Attack {
    /// Every value is negated and enlarged.
    SignFlip,
    /// Some values are not a number.
    Nan,
    /// One value is 1e30.
    Huge,
    /// The update is replaced by noise far stronger than the agreed law.
    ScaledNoise,
}

/// How far [`Attack::SignFlip`] enlarges what it negates: enough to outweigh the other four edges of a small fleet
/// under a plain mean.
pub const SIGN_FLIP_FACTOR: f32 = -5.0;

/// Every how many values [`Attack::Nan`] plants one.
const NAN_STRIDE: usize = 17;

/// How many times the update's own root mean square the noise of [`Attack::ScaledNoise`] reaches.
const NOISE_FACTOR: f32 = 20.0;

impl Attack {
    /// Every attack, in the order of `attack list`.
    pub const ALL: [Self; 4] = [Self::SignFlip, Self::Nan, Self::Huge, Self::ScaledNoise];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::SignFlip => "sign-flip",
            Self::Nan => "nan",
            Self::Huge => "huge",
            Self::ScaledNoise => "scaled-noise",
        }
    }

    /// What it does, in one line.
    pub fn description(self) -> &'static str {
        match self {
            Self::SignFlip => "negates every value and multiplies it by five: pulls the model the wrong way",
            Self::Nan => "plants NaN among the values: ruins any rule that averages without looking",
            Self::Huge => "sets one value to 1e30: a plain mean follows it anywhere",
            Self::ScaledNoise => "replaces the update by noise twenty times as strong: drowns the others",
        }
    }

    /// The values that go out in place of `values` in `round`. Same inputs, same result.
    ///
    /// An empty update stays empty.
    #[must_use]
    pub fn apply(self, round: Round, mut values: Vec<f32>) -> Vec<f32> {
        match self {
            Self::SignFlip => values.iter_mut().for_each(|value| *value *= SIGN_FLIP_FACTOR),
            Self::Nan => values
                .iter_mut()
                .step_by(NAN_STRIDE)
                .for_each(|value| *value = f32::NAN),
            Self::Huge => {
                if let Some(first) = values.first_mut() {
                    *first = 1e30;
                }
            }
            Self::ScaledNoise => {
                let level = root_mean_square(&values).max(f32::MIN_POSITIVE) * NOISE_FACTOR;
                let mut state = round.0;
                for value in &mut values {
                    *value = level * signed_unit(&mut state);
                }
            }
        }
        values
    }
}

impl fmt::Display for Attack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is none of [`Attack::ALL`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{got}` is no attack; `theriac-lab attack list` shows them: {known}")]
pub struct UnknownAttack {
    got: String,
    known: String,
}

impl FromStr for Attack {
    type Err = UnknownAttack;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|attack| attack.name() == name)
            .ok_or_else(|| UnknownAttack {
                got: name.to_owned(),
                known: Self::ALL.map(Self::name).join(", "),
            })
    }
}

fn root_mean_square(values: &[f32]) -> f32 {
    let sum: f64 = values.iter().map(|value| f64::from(*value).powi(2)).sum();
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a level for noise; precision is of no matter"
    )]
    let level = (sum / values.len().max(1) as f64).sqrt() as f32;
    level
}

/// A number in [-1.7, 1.7], uniform, of variance 1 (`SplitMix64`; Steele, Lea and Flood 2014).
fn signed_unit(state: &mut u64) -> f32 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    let top = u16::try_from((z ^ (z >> 31)) >> 48).unwrap_or(u16::MAX);
    (f32::from(top) / f32::from(u16::MAX) * 2.0 - 1.0) * 3.0_f32.sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_attack_is_found_by_its_name_and_described_in_one_line() {
        for attack in Attack::ALL {
            assert_eq!(attack.name().parse(), Ok(attack));
            assert!(!attack.description().is_empty() && !attack.description().contains('\n'));
        }
        let refused = "sign_flip".parse::<Attack>().unwrap_err().to_string();
        assert!(refused.contains("sign-flip"), "{refused}");
    }

    #[test]
    fn keeps_the_length_and_is_the_same_every_time() {
        for attack in Attack::ALL {
            for length in [0, 1, 100] {
                let honest: Vec<f32> = (0_u16..length).map(|i| f32::from(i) - 3.0).collect();
                let once = attack.apply(Round(7), honest.clone());
                let twice = attack.apply(Round(7), honest.clone());
                assert_eq!(once.len(), honest.len());
                assert!(once.iter().zip(&twice).all(|(a, b)| a.to_bits() == b.to_bits()));
            }
        }
    }

    #[test]
    fn each_does_what_it_says() {
        let honest: Vec<f32> = (0_u16..340).map(|i| (f32::from(i) / 50.0).sin()).collect();
        let flipped = Attack::SignFlip.apply(Round(1), honest.clone());
        assert!(
            flipped
                .iter()
                .zip(&honest)
                .all(|(a, b)| (a + 5.0 * b).abs() < 1e-5)
        );
        assert_eq!(
            Attack::Nan
                .apply(Round(1), honest.clone())
                .iter()
                .filter(|v| v.is_nan())
                .count(),
            20
        );
        assert!(Attack::Huge.apply(Round(1), honest.clone())[0] > 9e29);
        let ratio = root_mean_square(&Attack::ScaledNoise.apply(Round(1), honest.clone()))
            / root_mean_square(&honest);
        assert!((17.0..23.0).contains(&ratio), "noise is {ratio} times as strong");
        assert_ne!(
            Attack::ScaledNoise.apply(Round(1), honest.clone()),
            Attack::ScaledNoise.apply(Round(2), honest)
        );
    }
}
