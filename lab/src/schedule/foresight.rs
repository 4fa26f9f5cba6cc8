//! Failures and what a predictor said before them.

use std::fmt;

use rand::Rng as _;
use rand_chacha::ChaCha12Rng;

/// What a predictor is like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Foresight {
    /// There is none: it abstains.
    None,
    /// It warns of the share `recall` of the failures, 10 to 120 s before them, and the share `precision` of its warnings is true. It
    /// claims its precision.
    Fair {
        /// 0 to 1.
        recall: f64,
        /// Above 0, to 1.
        precision: f64,
    },
    /// It warns at random, so many times between two failures on average, and is sure each time.
    Random {
        /// Warnings in a mean time between failures.
        often: f64,
    },
    /// It always warns.
    Always,
    /// It warns of every failure, too late for a checkpoint.
    TooLate,
    /// It is fair with recall and precision 0.7 for the first half, and then warns at random ten times between failures.
    Turncoat,
}

/// One warning, in seconds of the life.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Spell {
    pub(super) from: f64,
    pub(super) to: f64,
    /// What it claims.
    pub(super) claim: f64,
}

/// The service from its start to its failure.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Life {
    pub(super) length_s: f64,
    pub(super) cost_s: f64,
    /// Whether a predictor speaks at all.
    pub(super) predicted: bool,
    /// In the order of their beginning; they may overlap.
    pub(super) warnings: Vec<Spell>,
}

impl Foresight {
    /// The predictors of the table, then those that are useless.
    pub fn all() -> Vec<Self> {
        let fair = |recall, precision| Self::Fair { recall, precision };
        vec![
            Self::None,
            fair(0.5, 0.5),
            fair(0.7, 0.7),
            fair(0.85, 0.82),
            fair(0.7, 0.1),
            Self::Random { often: 1.0 },
            Self::Random { often: 10.0 },
            Self::Always,
            Self::TooLate,
            Self::Turncoat,
        ]
    }

    /// Whether what it says is worth nothing, so that Young/Daly is the best there is.
    pub fn is_useless(self) -> bool {
        matches!(
            self,
            Self::None | Self::Random { .. } | Self::Always | Self::TooLate
        )
    }
}

impl fmt::Display for Foresight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Fair { recall, precision } => write!(f, "recall {recall}, precision {precision}"),
            Self::Random { often } => write!(f, "random, {often} a failure"),
            Self::Always => f.write_str("always warns"),
            Self::TooLate => f.write_str("too late"),
            Self::Turncoat => f.write_str("0.7/0.7, then random"),
        }
    }
}

impl Life {
    /// Draws a life; `progress` is how much of the run is over, 0 to 1.
    pub(super) fn draw(
        rng: &mut ChaCha12Rng,
        mtbf_s: f64,
        cost_s: f64,
        foresight: Foresight,
        progress: f64,
    ) -> Self {
        // The failure comes from a stream of its own draw first, so that every predictor meets the same ones.
        let length_s = exponential(rng, mtbf_s);
        let mut warnings = Vec::new();
        // Later draws must not move the next failure.
        let mut own = {
            use rand::SeedableRng as _;
            ChaCha12Rng::seed_from_u64(rng.random())
        };
        let fair = |own: &mut ChaCha12Rng, warnings: &mut Vec<Spell>, recall: f64, precision: f64| {
            if own.random_bool(recall) {
                let lead = own.random_range(LEAD_S);
                warnings.push(Spell {
                    from: (length_s - lead).max(0.0),
                    to: length_s,
                    claim: precision,
                });
            }
            let false_rate = recall * (1.0 - precision) / precision / mtbf_s;
            at_random(own, warnings, false_rate, length_s, precision);
        };
        match foresight {
            Foresight::None => {}
            Foresight::Fair { recall, precision } => fair(&mut own, &mut warnings, recall, precision),
            Foresight::Turncoat if progress < 0.5 => fair(&mut own, &mut warnings, 0.7, 0.7),
            Foresight::Turncoat => at_random(&mut own, &mut warnings, 10.0 / mtbf_s, length_s, 0.7),
            Foresight::Random { often } => at_random(&mut own, &mut warnings, often / mtbf_s, length_s, 0.9),
            Foresight::Always => warnings.push(Spell {
                from: 0.0,
                to: length_s,
                claim: 0.9,
            }),
            Foresight::TooLate => {
                let lead = own.random_range(0.0..cost_s);
                warnings.push(Spell {
                    from: (length_s - lead).max(0.0),
                    to: length_s,
                    claim: 0.99,
                });
            }
        }
        warnings.sort_by(|a, b| a.from.total_cmp(&b.from));
        Self {
            length_s,
            cost_s,
            predicted: foresight != Foresight::None,
            warnings,
        }
    }

    /// What is claimed at `at`: the boldest warning that is up, 0 without one.
    pub(super) fn claim_at(&self, at: f64) -> f64 {
        let up = self
            .warnings
            .iter()
            .filter(|spell| spell.from <= at && at < spell.to);
        up.map(|spell| spell.claim).fold(0.0, f64::max)
    }

    /// The next moment after `at` at which the claim may change or is said again.
    pub(super) fn next_word(&self, at: f64) -> f64 {
        let edges = self.warnings.iter().flat_map(|spell| [spell.from, spell.to]);
        let next = edges.filter(|edge| *edge > at).fold(f64::INFINITY, f64::min);
        if self.claim_at(at) > 0.0 {
            next.min(at + SAID_AGAIN_S)
        } else {
            next
        }
    }
}

fn at_random(own: &mut ChaCha12Rng, warnings: &mut Vec<Spell>, rate: f64, length_s: f64, claim: f64) {
    if rate <= 0.0 {
        return;
    }
    let mut at = 0.0;
    loop {
        at += exponential(own, 1.0 / rate);
        if at >= length_s {
            return;
        }
        warnings.push(Spell {
            from: at,
            to: (at + LEAD_S.end).min(length_s),
            claim,
        });
    }
}

fn exponential(rng: &mut ChaCha12Rng, mean: f64) -> f64 {
    -mean * (1.0 - rng.random::<f64>()).ln()
}

/// From warning to failure.
pub(super) const LEAD_S: std::ops::Range<f64> = 10.0..120.0;
/// A warning that is up is said again after this time.
const SAID_AGAIN_S: f64 = 60.0;
