//! The frame around every message: twelve bytes that say what follows and how long it is.
//!
//! | bytes | what |
//! |---|---|
//! | 0..4 | magic `THRC` |
//! | 4 | frame version, 1 |
//! | 5..7 | kind, `u16` little-endian, see [`kind`] |
//! | 7 | flags, 0 |
//! | 8..12 | bytes of the body that follows, `u32` little-endian |
//!
//! The kind stands outside the body's encoding, so an unknown one is answered "unsupported" instead of failing
//! to decode. There is no checksum: QUIC protects the bytes. A reader parses the header, compares the length
//! with what it is ready to hold, and only then allocates.

use crate::refusal::RefusalCode;

/// Bytes of a frame header.
pub const HEADER_BYTES: usize = 12;

/// First bytes of every frame.
pub const MAGIC: [u8; 4] = *b"THRC";

/// Version of the frame itself. Versions of the messages are part of their kind.
pub const FRAME_VERSION: u8 = 1;

/// The number of each message. The upper byte names the message (its top bit: said by an aggregator), the lower
/// byte its version.
pub mod kind {
    /// [`HelloV1`](crate::message::HelloV1), edge to aggregator.
    pub const HELLO_V1: u16 = 0x0101;
    /// [`UpdateV1`](crate::message::UpdateV1) and its payload, edge to aggregator.
    pub const UPDATE_V1: u16 = 0x0201;
    /// [`DeclineV1`](crate::message::DeclineV1), edge to aggregator.
    pub const DECLINE_V1: u16 = 0x0301;
    /// [`FetchModelV1`](crate::message::FetchModelV1), edge to aggregator.
    pub const FETCH_MODEL_V1: u16 = 0x0401;
    /// [`VerdictV1`](crate::message::VerdictV1), edge to aggregator.
    pub const VERDICT_V1: u16 = 0x0501;
    /// [`GuaranteeV1`](crate::message::GuaranteeV1), edge to aggregator.
    pub const GUARANTEE_V1: u16 = 0x0701;
    /// [`AppraisalV1`](crate::message::AppraisalV1), edge to aggregator.
    pub const APPRAISAL_V1: u16 = 0x0801;
    /// [`HealthV1`](crate::message::HealthV1), edge to aggregator.
    pub const HEALTH_V1: u16 = 0x0901;
    /// [`LeaseRequestV1`](crate::message::LeaseRequestV1), edge to aggregator.
    pub const LEASE_REQUEST_V1: u16 = 0x0A01;
    /// [`LeaseReleaseV1`](crate::message::LeaseReleaseV1), edge to aggregator.
    pub const LEASE_RELEASE_V1: u16 = 0x0B01;
    /// Goodbye of an edge; no body.
    pub const EDGE_GOODBYE_V1: u16 = 0x0601;

    /// [`JoinRequestV1`](crate::message::JoinRequestV1), new edge to join listener.
    pub const JOIN_REQUEST_V1: u16 = 0x4001;
    /// [`JoinReplyV1`](crate::message::JoinReplyV1), join listener to new edge.
    pub const JOIN_REPLY_V1: u16 = 0xC001;

    /// [`WelcomeV1`](crate::message::WelcomeV1), aggregator to edge.
    pub const WELCOME_V1: u16 = 0x8101;
    /// [`RefusalV1`](crate::refusal::RefusalV1), aggregator to edge.
    pub const REFUSAL_V1: u16 = 0x8201;
    /// [`AnnounceV1`](crate::message::AnnounceV1), aggregator to edge.
    pub const ANNOUNCE_V1: u16 = 0x8301;
    /// [`ReceiptV1`](crate::message::ReceiptV1), aggregator to edge.
    pub const RECEIPT_V1: u16 = 0x8401;
    /// [`ModelV1`](crate::message::ModelV1) and its payload, aggregator to edge.
    pub const MODEL_V1: u16 = 0x8501;
    /// [`ClosedV1`](crate::message::ClosedV1), aggregator to edge.
    pub const CLOSED_V1: u16 = 0x8601;
    /// [`LedgerSealV1`](crate::message::LedgerSealV1), aggregator to edge.
    pub const LEDGER_SEAL_V1: u16 = 0x8801;
    /// [`CandidateV1`](crate::message::CandidateV1) and its payload, aggregator to edge.
    pub const CANDIDATE_V1: u16 = 0x8901;
    /// [`FleetReportV1`](crate::message::FleetReportV1), aggregator to edge.
    pub const FLEET_REPORT_V1: u16 = 0x8A01;
    /// [`LeaseGrantedV1`](crate::message::LeaseGrantedV1), aggregator to edge.
    pub const LEASE_GRANTED_V1: u16 = 0x8B01;
    /// [`LeaseRefusedV1`](crate::message::LeaseRefusedV1), aggregator to edge.
    pub const LEASE_REFUSED_V1: u16 = 0x8C01;
    /// [`GoodbyeV1`](crate::message::GoodbyeV1), aggregator to edge.
    pub const AGGREGATOR_GOODBYE_V1: u16 = 0x8701;
}

/// A parsed frame header. Its kind may be one that nobody knows; its length is within the reader's limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// What the body is, see [`kind`].
    pub kind: u16,
    /// Bytes of the body.
    pub length: u32,
}

impl FrameHeader {
    /// Reads a header and refuses a body longer than `length_max` bytes before anything is allocated for it.
    ///
    /// # Errors
    /// [`FrameError`] when these twelve bytes begin no frame of ours, or one that is too long.
    pub fn parse(bytes: &[u8; HEADER_BYTES], length_max: u32) -> Result<Self, FrameError> {
        let [m0, m1, m2, m3, version, k0, k1, flags, l0, l1, l2, l3] = *bytes;
        let magic = [m0, m1, m2, m3];
        if magic != MAGIC {
            return Err(FrameError::Magic { found: magic });
        }
        if version != FRAME_VERSION {
            return Err(FrameError::Version { found: version });
        }
        if flags != 0 {
            return Err(FrameError::Flags { found: flags });
        }
        let header = Self {
            kind: u16::from_le_bytes([k0, k1]),
            length: u32::from_le_bytes([l0, l1, l2, l3]),
        };
        if header.length > length_max {
            return Err(FrameError::TooLong {
                kind: header.kind,
                length: header.length,
                length_max,
            });
        }
        Ok(header)
    }

    /// The twelve bytes of this header.
    pub fn encode(self) -> [u8; HEADER_BYTES] {
        let [m0, m1, m2, m3] = MAGIC;
        let [k0, k1] = self.kind.to_le_bytes();
        let [l0, l1, l2, l3] = self.length.to_le_bytes();
        [m0, m1, m2, m3, FRAME_VERSION, k0, k1, 0, l0, l1, l2, l3]
    }
}

/// Why twelve bytes begin no frame that we read. The stream cannot be read on after any of these.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// Another program is talking.
    #[error("frame begins with {found:02x?}, expected {MAGIC:02x?}: the peer speaks another protocol")]
    Magic {
        /// The first four bytes.
        found: [u8; 4],
    },
    /// Another framing.
    #[error("frame version {found}, expected {FRAME_VERSION}: the older side needs an upgrade")]
    Version {
        /// The version byte.
        found: u8,
    },
    /// Flags that nobody has defined.
    #[error("frame flags {found:#04x}, expected 0: the older side needs an upgrade")]
    Flags {
        /// The flags byte.
        found: u8,
    },
    /// More than the reader holds for this peer now.
    #[error("frame of kind {kind:#06x} announces {length} bytes, at most {length_max} are taken here")]
    TooLong {
        /// The frame's kind.
        kind: u16,
        /// Announced bytes.
        length: u32,
        /// The reader's limit.
        length_max: u32,
    },
}

impl FrameError {
    /// What the peer is told before the stream is closed.
    pub fn refusal_code(&self) -> RefusalCode {
        match self {
            Self::Magic { .. } => RefusalCode::Malformed,
            Self::Version { .. } | Self::Flags { .. } => RefusalCode::UnsupportedVersion,
            Self::TooLong { .. } => RefusalCode::TooLarge,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn header_bytes_stay_as_documented() {
        let bytes = FrameHeader {
            kind: kind::UPDATE_V1,
            length: 0x0102_0304,
        }
        .encode();
        assert_eq!(&bytes, b"THRC\x01\x01\x02\x00\x04\x03\x02\x01");
    }

    #[test]
    fn refuses_a_length_above_the_limit_and_takes_the_limit() {
        let header = FrameHeader {
            kind: kind::HELLO_V1,
            length: 100,
        };
        assert_eq!(FrameHeader::parse(&header.encode(), 100), Ok(header));
        let error = FrameHeader::parse(&header.encode(), 99).unwrap_err();
        assert_eq!(
            error,
            FrameError::TooLong {
                kind: kind::HELLO_V1,
                length: 100,
                length_max: 99
            }
        );
        assert_eq!(error.refusal_code(), RefusalCode::TooLarge);
    }

    #[test]
    fn refuses_another_magic_version_or_flags() {
        let good = FrameHeader {
            kind: kind::HELLO_V1,
            length: 0,
        }
        .encode();
        for (byte, code) in [
            (0, RefusalCode::Malformed),
            (3, RefusalCode::Malformed),
            (4, RefusalCode::UnsupportedVersion),
            (7, RefusalCode::UnsupportedVersion),
        ] {
            let mut bad = good;
            bad[byte] ^= 0x40;
            assert_eq!(
                FrameHeader::parse(&bad, 100).unwrap_err().refusal_code(),
                code,
                "byte {byte}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_kind_and_length_survive(kind: u16, length: u32) {
            let header = FrameHeader { kind, length };
            prop_assert_eq!(FrameHeader::parse(&header.encode(), u32::MAX), Ok(header));
        }

        #[test]
        fn any_twelve_bytes_are_parsed_or_refused(bytes: [u8; 12], length_max: u32) {
            if let Ok(header) = FrameHeader::parse(&bytes, length_max) {
                prop_assert!(header.length <= length_max);
                prop_assert_eq!(header.encode(), bytes);
            }
        }
    }
}
