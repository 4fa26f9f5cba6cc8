//! What the ledger's records say. One record is one line of JSON, so that anyone can read and recompute it.

use serde::{Deserialize, Serialize};
use theriac_protocol::message::UpdateKind;
use theriac_protocol::units::{Delta, Digest, Epsilon, L2Norm, NodeId, NoiseMultiplier, Round, Timestamp};

use super::loss::Loss;
use super::state::reads_everything;
use super::{ReleasePlan, ReservationId};
use crate::accountant::{RdpCurve, Rho};
use crate::policy::{Period, Policy, PrivacyUnit};
use crate::windows::BlockWindows;

/// One entry of the ledger. **A kind that was shipped is never changed**: ledgers outlive builds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Record {
    /// The first record: whose ledger this is and what a block is. Both hold for ever.
    Genesis(Genesis),
    /// The policy in force from here on.
    Policy(PolicyNote),
    /// A charge of the first format, in zCDP. Read for ever, not written any more.
    Reserve(Charged),
    /// A charge, with its loss at every order. Written and synced before any data are read.
    Charge(Box<Charge>),
    /// The noised bytes of a reservation exist and may have left. For the record only: it refunds nothing.
    Released {
        round: Round,
        nonce: u64,
        #[serde(with = "hex")]
        payload: Digest,
        at: Timestamp,
    },
    /// The aggregator has signed how far this ledger had come: a copy that lacks this is too old.
    Sealed(Seal),
}

/// See [`Record::Genesis`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Genesis {
    pub(crate) node: NodeId,
    pub(crate) unit: PrivacyUnit,
    pub(crate) block_ms: u64,
    pub(crate) at: Timestamp,
}

/// See [`Record::Policy`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PolicyNote {
    #[serde(with = "hex")]
    pub(crate) hash: Digest,
    pub(crate) epsilon: Epsilon,
    pub(crate) delta: Delta,
    /// 0 in records of builds that knew no versions.
    #[serde(default)]
    pub(crate) version: u64,
    #[serde(default)]
    pub(crate) period: Period,
    /// The file and its signature, so that the ledger alone says under which policy a charge was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) text: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) signature: Option<String>,
    pub(crate) at: Timestamp,
}

/// See [`Record::Reserve`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Charged {
    pub(crate) round: Round,
    pub(crate) nonce: u64,
    pub(crate) kind: UpdateKind,
    pub(crate) values: u32,
    /// First and last id of each run of blocks; empty for [`UpdateKind::Delta`], which charges every block.
    pub(crate) blocks: Vec<(u64, u64)>,
    pub(crate) clip_norm: L2Norm,
    pub(crate) noise_multiplier: NoiseMultiplier,
    /// In multiples of the clipping norm.
    pub(crate) sensitivity: f64,
    pub(crate) rho: f64,
    #[serde(with = "hex")]
    pub(crate) policy: Digest,
    pub(crate) at: Timestamp,
}

/// See [`Record::Charge`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Charge {
    /// Number of records before this one.
    pub(crate) sequence: u64,
    pub(crate) round: Round,
    pub(crate) nonce: u64,
    pub(crate) kind: UpdateKind,
    pub(crate) unit: PrivacyUnit,
    pub(crate) values: u32,
    /// First and last id of each run of blocks; empty when every block is charged.
    pub(crate) blocks: Vec<(u64, u64)>,
    /// The windows that each block was cut into; absent: one vector for each block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) windows: Option<BlockWindows>,
    pub(crate) clip_norm: L2Norm,
    pub(crate) noise_multiplier: NoiseMultiplier,
    pub(crate) sampling_rate: f64,
    pub(crate) steps: u32,
    /// In multiples of the clipping norm.
    pub(crate) sensitivity: f64,
    /// Rényi loss at each of [`super::loss::ORDERS`].
    pub(crate) rdp: RdpCurve,
    /// Number of the policy's period.
    pub(crate) period: u64,
    #[serde(with = "hex")]
    pub(crate) policy: Digest,
    pub(crate) at: Timestamp,
    /// 128 random bits in hexadecimal, so that nobody who is told the chain's head finds by trying which blocks were charged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) salt: Option<String>,
}

/// A counter-signature of the aggregator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seal {
    /// Records that the aggregator had seen charged.
    pub records: u64,
    /// Head of the last of them.
    #[serde(with = "hex")]
    pub head: Digest,
    /// When it signed, by its clock.
    pub signed: Timestamp,
    /// Its log's public key, in the form of `audit export`.
    pub key: String,
    /// Ed25519 signature, 128 hexadecimal digits.
    pub signature: String,
}

/// What the loss of a charge follows from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Terms {
    sensitivity: f64,
    sigma: f64,
    sampling_rate: f64,
    steps: u32,
}

impl Terms {
    pub(crate) fn of(plan: &ReleasePlan, unit: PrivacyUnit) -> Self {
        Self {
            sensitivity: sensitivity(unit, plan.kind, plan.blocks.len(), plan.windows),
            sigma: plan.noise_multiplier.value(),
            sampling_rate: plan.sampling_rate,
            steps: plan.steps,
        }
    }

    pub(crate) fn sensitivity(&self) -> f64 {
        self.sensitivity
    }

    pub(crate) fn loss(&self) -> Loss {
        Loss::gaussian(self.sensitivity, self.sigma, self.sampling_rate, self.steps)
    }
}

/// Sensitivity of one step in multiples of C. Where a weight change names its blocks, every unit's gradient was clipped on its own; where
/// it does not, one vector was made of all data. Windows say it themselves.
fn sensitivity(unit: PrivacyUnit, kind: UpdateKind, blocks: usize, windows: Option<BlockWindows>) -> f64 {
    if let Some(windows) = windows {
        windows.sensitivity()
    } else if kind == UpdateKind::Delta && !reads_everything(unit, kind, blocks) {
        1.0
    } else {
        unit.sensitivity(kind)
    }
}

/// A charge that was checked, of either format.
#[derive(Debug)]
pub(crate) struct Counted {
    pub(crate) id: ReservationId,
    /// Empty: every block.
    pub(crate) blocks: Vec<(u64, u64)>,
    pub(crate) loss: Loss,
    pub(crate) period: u64,
}

impl Charged {
    /// Whether the written ρ is the one that sensitivity and noise give, the sensitivity is not below the unit's, and the runs ascend.
    pub(crate) fn check(self, unit: PrivacyUnit) -> Result<Counted, &'static str> {
        let rho = Rho::gaussian(self.sensitivity, self.noise_multiplier).value();
        let consistent =
            (self.rho / rho - 1.0).abs() < 1e-9 && self.sensitivity >= unit.sensitivity(self.kind);
        if !consistent || !ascends(&self.blocks) || self.blocks.is_empty() != (self.kind == UpdateKind::Delta)
        {
            return Err(INCONSISTENT);
        }
        Ok(Counted {
            id: ReservationId {
                round: self.round,
                nonce: self.nonce,
            },
            blocks: self.blocks,
            loss: Loss::zcdp(self.rho),
            period: 0,
        })
    }
}

impl Charge {
    pub(crate) fn terms(&self) -> Terms {
        Terms {
            sensitivity: self.sensitivity,
            sigma: self.noise_multiplier.value(),
            sampling_rate: self.sampling_rate,
            steps: self.steps,
        }
    }

    /// Whether the written loss is `expected`, the one that the terms give, and the terms are possible.
    pub(crate) fn check(self, expected: &Loss) -> Result<Counted, &'static str> {
        let named = usize::from(!self.blocks.is_empty());
        let expected_sensitivity = sensitivity(self.unit, self.kind, named, self.windows);
        let sensitive = self.sensitivity.to_bits() == expected_sensitivity.to_bits();
        let windowed = self.windows.is_none() || (self.unit == PrivacyUnit::Record && named > 0);
        let sampled = self.sampling_rate > 0.0 && self.sampling_rate <= 1.0 && self.steps > 0;
        let placed = if self.unit == PrivacyUnit::Node {
            named == 0
        } else {
            named > 0 || reads_everything(self.unit, self.kind, named)
        };
        if !(expected.agrees_with(&self.rdp)
            && sensitive
            && windowed
            && sampled
            && placed
            && ascends(&self.blocks))
        {
            return Err(INCONSISTENT);
        }
        Ok(Counted {
            id: ReservationId {
                round: self.round,
                nonce: self.nonce,
            },
            blocks: self.blocks,
            loss: expected.clone(),
            period: self.period,
        })
    }
}

fn ascends(blocks: &[(u64, u64)]) -> bool {
    blocks.iter().all(|(first, last)| first <= last) && blocks.windows(2).all(|pair| pair[0].1 < pair[1].0)
}

impl Record {
    /// The policy as a record.
    pub(crate) fn policy(policy: &Policy, at: Timestamp) -> Self {
        Self::Policy(PolicyNote {
            hash: policy.hash(),
            epsilon: policy.epsilon(),
            delta: policy.delta(),
            version: policy.version(),
            period: policy.period(),
            text: Some(policy.text().to_owned()),
            signature: policy.signature().map(ToString::to_string),
            at,
        })
    }

    /// The record's bytes.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        #[expect(
            clippy::expect_used,
            reason = "structs of finite numbers, words and digests always have a JSON form"
        )]
        let bytes = serde_json::to_vec(self).expect("a record has a JSON form");
        bytes
    }
}

/// A digest as 64 hexadecimal digits.
mod hex {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};
    use theriac_protocol::units::Digest;

    pub(super) fn serialize<S: Serializer>(digest: &Digest, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(digest)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(D::Error::custom)
    }
}

const INCONSISTENT: &str = "a charge does not follow from its terms";
