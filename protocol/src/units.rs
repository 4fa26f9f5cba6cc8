//! Numbers and names that cross the network, each checked when made and when decoded.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};

/// Why a unit could not be made.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum UnitError {
    /// A node id is not 1 to 63 characters of `a-z`, `0-9` and `-`, starting and ending with a letter or digit.
    #[error("`{0}` is no node id: use 1 to 63 characters of a-z, 0-9 and -, not beginning or ending with -")]
    NodeId(String),
    /// A number is outside its range.
    #[error("{what} must be {range}, got {got}")]
    Range {
        /// The quantity's name.
        what: &'static str,
        /// The range that holds, in words.
        range: &'static str,
        /// The value that was refused.
        got: f64,
    },
    /// A digest is not 64 hexadecimal digits.
    #[error("`{0}` is no SHA-256 digest: 64 hexadecimal digits are needed")]
    Digest(String),
}

/// The name of one edge (a site) within a federation. It is derived from the peer's certificate
/// (`spiffe://FEDERATION/edge/NODE`) and never taken from a field of a message.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(String);

impl NodeId {
    /// Longest name, in bytes: one DNS label.
    pub const LEN_MAX: usize = 63;

    /// Checks and takes a name.
    ///
    /// # Errors
    /// [`UnitError::NodeId`] when it is empty, too long, or holds anything but `a-z`, `0-9` and inner `-`.
    pub fn new(name: impl Into<String>) -> Result<Self, UnitError> {
        let name = name.into();
        let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let ok = (1..=Self::LEN_MAX).contains(&name.len())
            && name.bytes().all(inner)
            && !name.starts_with('-')
            && !name.ends_with('-');
        if ok {
            Ok(Self(name))
        } else {
            Err(UnitError::NodeId(name))
        }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for NodeId {
    type Err = UnitError;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Self::new(s)
    }
}

impl Serialize for NodeId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for NodeId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        pub struct $name(pub u64);

        impl $name {
            /// The following number; stays at the largest one.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0.saturating_add(1))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

counter! {
    /// The number of a round, from 1; it never repeats within a federation.
    Round
}
counter! {
    /// The number of a published model; 0 is the initial model that everybody can compute.
    ModelVersion
}

macro_rules! ranged {
    ($(#[$doc:meta])* $name:ident, $what:literal, $range:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
        pub struct $name(f64);

        impl $name {
            /// Checks and takes a value.
            ///
            /// # Errors
            /// [`UnitError::Range`] outside the range, and for NaN.
            pub fn new(value: f64) -> Result<Self, UnitError> {
                let check: fn(f64) -> bool = $check;
                if check(value) {
                    Ok(Self(value))
                } else {
                    Err(UnitError::Range { what: $what, range: $range, got: value })
                }
            }

            /// The plain number.
            pub fn value(self) -> f64 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                self.0.serialize(serializer)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Self::new(f64::deserialize(deserializer)?).map_err(serde::de::Error::custom)
            }
        }
    };
}

ranged! {
    /// Privacy loss ε of (ε, δ)-differential privacy, > 0 and finite.
    Epsilon, "epsilon", "above 0 and finite", |v| v > 0.0 && v.is_finite()
}
ranged! {
    /// Failure probability δ of (ε, δ)-differential privacy, in (0, 1).
    Delta, "delta", "above 0 and below 1", |v| v > 0.0 && v < 1.0
}
ranged! {
    /// A clipping norm or a norm bound (Euclidean), > 0 and finite, in the units of the update's values.
    L2Norm, "L2 norm", "above 0 and finite", |v| v > 0.0 && v.is_finite()
}
ranged! {
    /// Noise multiplier σ: the noise's standard deviation over the clipping norm, > 0 and finite.
    NoiseMultiplier, "noise multiplier", "above 0 and finite", |v| v > 0.0 && v.is_finite()
}

/// Wall-clock time in milliseconds since the Unix epoch. For records and people, never for deadlines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Timestamp(pub u64);

/// Monotonic time since an arbitrary start, handed into the state machines, which read no clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Moment(pub Duration);

impl Moment {
    /// The moment `span` later; stays at the last one.
    #[must_use]
    pub fn after(self, span: Duration) -> Self {
        Self(self.0.saturating_add(span))
    }

    /// Time from `earlier` until this moment; zero when it lies ahead.
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// A SHA-256 digest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The first eight hexadecimal digits, for people.
    pub fn short(&self) -> String {
        self.to_string()[..8].to_owned()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = UnitError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let wrong = || UnitError::Digest(s.chars().take(80).collect());
        if s.len() != 64 || !s.is_ascii() {
            return Err(wrong());
        }
        let mut digest = [0_u8; 32];
        for (byte, pair) in digest.iter_mut().zip(s.as_bytes().chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| wrong())?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| wrong())?;
        }
        Ok(Self(digest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_node_ids_that_could_be_mistaken_for_something_else() {
        for bad in ["", "-a", "a-", "A", "a b", "a/b", "é", &"a".repeat(64)] {
            assert!(NodeId::new(bad).is_err(), "{bad:?} was taken");
        }
        for good in ["a", "site-7", &"a".repeat(63)] {
            assert!(NodeId::new(good).is_ok(), "{good:?} was refused");
        }
    }

    #[test]
    fn refuses_values_outside_their_range() {
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(
                Epsilon::new(bad).is_err() && L2Norm::new(bad).is_err() && NoiseMultiplier::new(bad).is_err()
            );
        }
        for bad in [0.0, 1.0, f64::NAN] {
            assert!(Delta::new(bad).is_err());
        }
    }

    #[test]
    fn digest_survives_text() {
        let digest = Digest::of(b"theriac");
        assert_eq!(digest.to_string().parse(), Ok(digest));
        assert!("ab".parse::<Digest>().is_err());
        assert!("é".repeat(32).parse::<Digest>().is_err());
    }
}
