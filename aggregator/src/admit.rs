//! Whether an authenticated site may take part now: compatible, within its quota, and with a ledger that never went back.

use std::time::{Duration, Instant};

use theriac_protocol::message::{FEATURE_GRADIENT, HelloV1, PROTOCOL_MAX, PROTOCOL_MIN, UpdateKind};
use theriac_protocol::refusal::RefusalCode;
use theriac_protocol::units::Digest;

use crate::config::LimitSettings;
use crate::layout::ModelSpec;
use crate::store::records::LedgerHead;

/// Bytes that one plain message (a decline, a verdict) may have, for the quota.
pub const PLAIN_MESSAGE_BYTES: u64 = 1_024;

/// Why a site is not admitted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AdmitError {
    /// No protocol version in common.
    #[error("the edge speaks protocol {min} to {max}, this aggregator {PROTOCOL_MIN} to {PROTOCOL_MAX}")]
    Version {
        /// Lowest version of the edge.
        min: u16,
        /// Highest version of the edge.
        max: u16,
    },
    /// Another feature profile.
    #[error(
        "the edge has feature profile {found} ({found_digest}), this federation uses {expected} ({expected_digest})"
    )]
    Profile {
        /// Ours.
        expected: String,
        /// Its digest.
        expected_digest: Digest,
        /// The edge's.
        found: String,
        /// Its digest.
        found_digest: Digest,
    },
    /// Another model layout.
    #[error("the edge's model has layout {found}, this federation's {expected}")]
    Layout {
        /// Ours.
        expected: Digest,
        /// The edge's.
        found: Digest,
    },
    /// The edge cannot read what this federation's rounds collect.
    #[error(
        "the rounds collect gradients, and the edge ({software}) does not know `{FEATURE_GRADIENT}`: update it"
    )]
    Feature {
        /// What the edge calls itself.
        software: String,
    },
    /// The privacy ledger went backwards or forked.
    #[error(
        "the privacy ledger has {} records with head {}, on record are {} with head {}: a restored snapshot or a copied disk",
        offered.records, offered.head, on_record.records, on_record.head
    )]
    Ledger {
        /// What was counter-signed last.
        on_record: LedgerHead,
        /// What the edge shows.
        offered: LedgerHead,
    },
    /// It has begun a new ledger, and the fleet's floor wants an operator's leave for that.
    #[error(
        "the site was enrolled anew and began a new privacy ledger, which [privacy_floor] ledger_continuity refuses until an operator allows it: \
         `theriac-aggregator sites show NAME` says what it had spent before, `sites allow-ledger NAME` takes the new one"
    )]
    NewLedger,
}

impl AdmitError {
    /// What the edge is told.
    pub fn code(&self) -> RefusalCode {
        match self {
            Self::Version { .. } => RefusalCode::UnsupportedVersion,
            Self::Profile { .. } | Self::Layout { .. } | Self::Feature { .. } => RefusalCode::LayoutMismatch,
            Self::Ledger { .. } | Self::NewLedger => RefusalCode::LedgerRollback,
        }
    }
}

/// Whether the two programs fit together, in a federation whose rounds collect `kind`. Gives the protocol version to speak.
///
/// # Errors
/// [`AdmitError::Version`], [`AdmitError::Profile`], [`AdmitError::Layout`], [`AdmitError::Feature`].
pub fn check_hello(hello: &HelloV1, spec: &ModelSpec, kind: UpdateKind) -> Result<u16, AdmitError> {
    let protocol = hello.protocol_max.min(PROTOCOL_MAX);
    if protocol < hello.protocol_min.max(PROTOCOL_MIN) {
        return Err(AdmitError::Version {
            min: hello.protocol_min,
            max: hello.protocol_max,
        });
    }
    if hello.profile_digest != spec.profile_digest() {
        return Err(AdmitError::Profile {
            expected: spec.profile_name().to_owned(),
            expected_digest: spec.profile_digest(),
            found: hello.profile.clone(),
            found_digest: hello.profile_digest,
        });
    }
    if hello.layout_digest != spec.layout_digest() {
        return Err(AdmitError::Layout {
            expected: spec.layout_digest(),
            found: hello.layout_digest,
        });
    }
    // An announcement or a model that it cannot read would end its session, again and again.
    if kind == UpdateKind::Gradient && !hello.features.iter().any(|name| name == FEATURE_GRADIENT) {
        return Err(AdmitError::Feature {
            software: hello.software.clone(),
        });
    }
    Ok(protocol)
}

/// The ledger rule: a head never goes backwards, and one number of records has one head. A restored snapshot or a copied
/// disk breaks it.
///
/// # Errors
/// [`AdmitError::Ledger`].
pub fn check_ledger(on_record: LedgerHead, offered: LedgerHead) -> Result<(), AdmitError> {
    let behind = offered.records < on_record.records;
    let forked = offered.records == on_record.records && offered.head != on_record.head;
    if behind || forked {
        Err(AdmitError::Ledger { on_record, offered })
    } else {
        Ok(())
    }
}

/// What one site may still send in the round at hand.
#[derive(Debug, Clone)]
pub struct Quota {
    messages_max: u32,
    bytes_max: u64,
    round: u64,
    messages: u32,
    bytes: u64,
}

impl Quota {
    /// A fresh quota. `update_bytes` is the largest update of this federation.
    pub fn new(limits: &LimitSettings, update_bytes: u64) -> Self {
        let plain = u64::from(limits.messages_per_round_max).saturating_mul(PLAIN_MESSAGE_BYTES);
        let bytes_max = u64::from(limits.updates_per_round_max)
            .saturating_mul(update_bytes)
            .saturating_add(plain);
        Self {
            messages_max: limits.messages_per_round_max,
            bytes_max,
            round: 0,
            messages: 0,
            bytes: 0,
        }
    }

    /// Counts a message of `bytes` that came while `round` was at hand; false: it is beyond the quota.
    #[must_use]
    pub fn take(&mut self, round: u64, bytes: u64) -> bool {
        if round != self.round {
            (self.round, self.messages, self.bytes) = (round, 0, 0);
        }
        self.messages = self.messages.saturating_add(1);
        self.bytes = self.bytes.saturating_add(bytes);
        self.messages <= self.messages_max && self.bytes <= self.bytes_max
    }
}

/// What one session may say to the fleet, whatever round is at hand: [`Self::BURST`] messages at once, one more every
/// [`Self::REFILL`]. An honest edge says one in five seconds, and two or three more around an action.
#[derive(Debug, Clone)]
pub struct FleetQuota {
    left: u32,
    refilled: Instant,
}

impl FleetQuota {
    /// Messages at once.
    pub const BURST: u32 = 40;
    /// Time after which one more may be said.
    pub const REFILL: Duration = Duration::from_millis(500);

    /// A full one.
    pub fn new(now: Instant) -> Self {
        Self {
            left: Self::BURST,
            refilled: now,
        }
    }

    /// Counts a message; false: it is beyond the quota.
    #[must_use]
    pub fn take(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.refilled).as_millis() / Self::REFILL.as_millis();
        let refill = u32::try_from(passed).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(refill).min(Self::BURST);
        if refill > 0 {
            self.refilled += Self::REFILL * refill.min(1 << 20);
            self.refilled = self.refilled.max(now.checked_sub(Self::REFILL).unwrap_or(now));
        }
        let within = self.left > 0;
        self.left = self.left.saturating_sub(1);
        within
    }
}

#[cfg(test)]
mod tests {
    use theriac_protocol::units::{ModelVersion, NoiseMultiplier};

    use super::*;

    fn head(records: u64, byte: u8) -> LedgerHead {
        LedgerHead {
            head: Digest([byte; 32]),
            records,
        }
    }

    #[test]
    fn ledger_may_grow_or_stay_but_neither_shrink_nor_fork() {
        assert!(check_ledger(head(3, 1), head(3, 1)).is_ok());
        assert!(check_ledger(head(3, 1), head(4, 2)).is_ok());
        for wrong in [head(2, 1), head(3, 2), head(0, 0)] {
            assert_eq!(
                check_ledger(head(3, 1), wrong).unwrap_err().code(),
                RefusalCode::LedgerRollback
            );
        }
    }

    #[test]
    fn an_edge_that_cannot_read_gradients_is_told_so_at_the_door() {
        let spec = ModelSpec::profile("host-service-v1", 1).unwrap();
        let hello = |features: &[&str]| HelloV1 {
            protocol_min: PROTOCOL_MIN,
            protocol_max: PROTOCOL_MAX,
            software: "theriac-edge 0.1.0".to_owned(),
            features: features.iter().map(|name| (*name).to_owned()).collect(),
            profile: spec.profile_name().to_owned(),
            profile_digest: spec.profile_digest(),
            layout_digest: spec.layout_digest(),
            noise_multiplier_min: NoiseMultiplier::new(1.0).unwrap(),
            ledger_head: Digest::default(),
            ledger_records: 0,
            model_version: ModelVersion(0),
            model_digest: Digest::default(),
            audit_checkpoint: None,
            receipt_missing: None,
        };
        let old = hello(&["ledger-seal-1"]);
        for kind in [UpdateKind::Moments, UpdateKind::Delta] {
            assert_eq!(check_hello(&old, &spec, kind), Ok(PROTOCOL_MAX));
        }
        let refused = check_hello(&old, &spec, UpdateKind::Gradient).unwrap_err();
        assert_eq!(refused.code(), RefusalCode::LayoutMismatch);
        assert!(refused.to_string().contains("theriac-edge 0.1.0"), "{refused}");
        let new = hello(&["ledger-seal-1", FEATURE_GRADIENT]);
        assert_eq!(check_hello(&new, &spec, UpdateKind::Gradient), Ok(PROTOCOL_MAX));
    }

    #[test]
    fn what_is_said_to_the_fleet_is_bounded_by_time_alone() {
        let start = Instant::now();
        let mut quota = FleetQuota::new(start);
        assert!((0..FleetQuota::BURST).all(|_| quota.take(start)));
        assert!(!quota.take(start + FleetQuota::REFILL / 2));
        let mut said = 0;
        for step in 1..=1_000 {
            said += u32::from(quota.take(start + Duration::from_millis(100) * step));
        }
        assert!((195..=201).contains(&said), "{said} in 100 s");
        assert!(quota.take(start + Duration::from_hours(24)));
    }

    #[test]
    fn quota_is_renewed_by_the_next_round_only() {
        let limits = LimitSettings {
            messages_per_round_max: 4,
            updates_per_round_max: 1,
            ..LimitSettings::default()
        };
        let mut quota = Quota::new(&limits, 1_000);
        assert!((0..4).all(|_| quota.take(1, 10)));
        assert!(!quota.take(1, 10), "a fifth message was taken");
        assert!(quota.take(2, 10));
        assert!(
            !quota.take(2, 1_000 + 4 * PLAIN_MESSAGE_BYTES),
            "too many bytes were taken"
        );
    }
}
