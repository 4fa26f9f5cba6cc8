//! Why a peer, or something it sent, is turned away: a short code for the peer; the log holds the rest.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::units::{ModelVersion, Round};

/// A refusal's code. The numbers are part of the protocol and never change meaning: a code travels as its number,
/// and is written as its [`word`](RefusalCode::word) where people read it (JSON, records).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
pub enum RefusalCode {
    // The peer is incompatible.
    /// No protocol version in common.
    UnsupportedVersion = 1,
    /// The frame's kind is unknown here.
    UnsupportedKind = 2,
    /// The feature profile or the parameter layout differs.
    LayoutMismatch = 3,
    // The peer is not welcome.
    /// The certificate names no site that the registry knows.
    UnknownSite = 10,
    /// The site is suspended.
    Suspended = 11,
    /// The certificate's key is not the one on record, or was revoked.
    Revoked = 12,
    /// The edge's privacy ledger went backwards: a restored snapshot or a copied disk.
    LedgerRollback = 13,
    // Come back later.
    /// Too many connections, uploads or bytes right now.
    Busy = 20,
    /// The aggregator's disk is full.
    StorageFull = 21,
    // The message is no good.
    /// The bytes do not decode.
    Malformed = 30,
    /// Longer than the limit.
    TooLarge = 31,
    /// Not expected now.
    OutOfTurn = 32,
    /// The round is not open: too late.
    RoundClosed = 33,
    /// The round has not begun: too early.
    RoundUnknown = 34,
    /// The nonce is not the announced one: a replay.
    WrongNonce = 35,
    /// Another base model.
    WrongBase = 36,
    /// A different update of this site is already stored for this round.
    Duplicate = 37,
    /// Another number of values.
    WrongLength = 38,
    /// The payload's digest is not the announced one.
    DigestMismatch = 39,
    /// A value is NaN or infinite.
    NonFinite = 40,
    /// The norm exceeds what an honest edge can reach.
    NormExceeded = 41,
    /// Moments that no time series has.
    Implausible = 42,
    /// The claimed protection is weaker than the round's terms.
    PrivacyTooWeak = 43,
}

impl RefusalCode {
    /// Every code, for tables and tests.
    pub const ALL: [Self; 23] = [
        Self::UnsupportedVersion,
        Self::UnsupportedKind,
        Self::LayoutMismatch,
        Self::UnknownSite,
        Self::Suspended,
        Self::Revoked,
        Self::LedgerRollback,
        Self::Busy,
        Self::StorageFull,
        Self::Malformed,
        Self::TooLarge,
        Self::OutOfTurn,
        Self::RoundClosed,
        Self::RoundUnknown,
        Self::WrongNonce,
        Self::WrongBase,
        Self::Duplicate,
        Self::WrongLength,
        Self::DigestMismatch,
        Self::NonFinite,
        Self::NormExceeded,
        Self::Implausible,
        Self::PrivacyTooWeak,
    ];

    /// A stable word for records, metrics and JSON.
    pub fn word(self) -> &'static str {
        match self {
            Self::UnsupportedVersion => "unsupported_version",
            Self::UnsupportedKind => "unsupported_kind",
            Self::LayoutMismatch => "layout_mismatch",
            Self::UnknownSite => "unknown_site",
            Self::Suspended => "suspended",
            Self::Revoked => "revoked",
            Self::LedgerRollback => "ledger_rollback",
            Self::Busy => "busy",
            Self::StorageFull => "storage_full",
            Self::Malformed => "malformed",
            Self::TooLarge => "too_large",
            Self::OutOfTurn => "out_of_turn",
            Self::RoundClosed => "round_closed",
            Self::RoundUnknown => "round_unknown",
            Self::WrongNonce => "wrong_nonce",
            Self::WrongBase => "wrong_base",
            Self::Duplicate => "duplicate",
            Self::WrongLength => "wrong_length",
            Self::DigestMismatch => "digest_mismatch",
            Self::NonFinite => "non_finite",
            Self::NormExceeded => "norm_exceeded",
            Self::Implausible => "implausible",
            Self::PrivacyTooWeak => "privacy_too_weak",
        }
    }

    /// The code's number on the wire.
    pub fn number(self) -> u16 {
        self as u16
    }

    /// Whether the same thing may succeed later without anyone changing anything.
    pub fn retryable(self) -> bool {
        matches!(
            self,
            Self::Busy | Self::StorageFull | Self::RoundClosed | Self::RoundUnknown
        )
    }
}

impl std::fmt::Display for RefusalCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.word())
    }
}

impl Serialize for RefusalCode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            self.word().serialize(serializer)
        } else {
            self.number().serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for RefusalCode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let found = |wanted: &dyn Fn(Self) -> bool| Self::ALL.into_iter().find(|code| wanted(*code));
        if deserializer.is_human_readable() {
            let word = String::deserialize(deserializer)?;
            found(&|code| code.word() == word)
                .ok_or_else(|| D::Error::custom(format!("no refusal code `{word}`")))
        } else {
            let number = u16::deserialize(deserializer)?;
            found(&|code| code.number() == number)
                .ok_or_else(|| D::Error::custom(format!("no refusal code {number}")))
        }
    }
}

/// A refusal as it is sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusalV1 {
    /// Why.
    pub code: RefusalCode,
    /// The round it concerns, if any.
    pub round: Option<Round>,
    /// Do not try again sooner than this; 0 when trying again is useless.
    pub retry_after_ms: u32,
}

/// How a round ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RoundOutcome {
    /// A new model is published.
    Published(ModelVersion),
    /// Nothing is published; the model stays.
    Aborted(AbortReason),
}

/// Why a round published nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum AbortReason {
    /// Fewer valid updates than the quorum at the deadline.
    QuorumMissed,
    /// The rule could not produce a model, or a validator turned down the one that it produced.
    AggregationFailed,
    /// An operator ended it.
    Operator,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_code_has_its_own_number_and_word() {
        let numbers: BTreeSet<u16> = RefusalCode::ALL.into_iter().map(RefusalCode::number).collect();
        let words: BTreeSet<&str> = RefusalCode::ALL.into_iter().map(RefusalCode::word).collect();
        assert_eq!(
            (numbers.len(), words.len()),
            (RefusalCode::ALL.len(), RefusalCode::ALL.len())
        );
        assert_eq!(RefusalCode::Duplicate.number(), 37);
    }
}
