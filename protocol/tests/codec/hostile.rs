//! Bytes that no honest peer sends: refused, never a panic, never a large allocation.
//!
//! The same claims are fuzzed with coverage in `fuzz/`; here is what runs everywhere, with fixed seeds.

use bytes::{BufMut, Bytes, BytesMut};
use proptest::prelude::*;
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use theriac_protocol::codec::{
    CodecError, JOIN_BYTES_MAX, PLAIN_BYTES_MAX, body_bytes_max, decode_to_aggregator, decode_to_edge,
};
use theriac_protocol::frame::{HEADER_BYTES, kind};
use theriac_protocol::message::*;
use theriac_protocol::refusal::RefusalCode;

use crate::samples::{self, Message};

const KINDS: [u16; 25] = [
    kind::HEALTH_V1,
    kind::LEASE_REQUEST_V1,
    kind::LEASE_RELEASE_V1,
    kind::FLEET_REPORT_V1,
    kind::LEASE_GRANTED_V1,
    kind::LEASE_REFUSED_V1,
    kind::APPRAISAL_V1,
    kind::LEDGER_SEAL_V1,
    kind::GUARANTEE_V1,
    kind::HELLO_V1,
    kind::UPDATE_V1,
    kind::DECLINE_V1,
    kind::FETCH_MODEL_V1,
    kind::VERDICT_V1,
    kind::EDGE_GOODBYE_V1,
    kind::JOIN_REQUEST_V1,
    kind::JOIN_REPLY_V1,
    kind::WELCOME_V1,
    kind::REFUSAL_V1,
    kind::ANNOUNCE_V1,
    kind::RECEIPT_V1,
    kind::MODEL_V1,
    kind::CANDIDATE_V1,
    kind::CLOSED_V1,
    kind::AGGREGATOR_GOODBYE_V1,
];

/// Kind and body of every sample.
fn bodies() -> Vec<(u16, Vec<u8>)> {
    let messages = samples::all().into_iter().flat_map(|(_, messages)| messages);
    messages
        .map(|message| {
            let encoded = message.encode().unwrap();
            let kind = u16::from_le_bytes([encoded.head[5], encoded.head[6]]);
            (kind, [&encoded.head[HEADER_BYTES..], &encoded.payload].concat())
        })
        .collect()
}

/// Decodes; whatever decodes must be what these very bytes encode to.
fn judge(kind: u16, body: &[u8]) -> bool {
    match Message::decode(kind, Bytes::copy_from_slice(body)) {
        Ok(message) => {
            let encoded = message.encode().unwrap();
            assert_eq!(
                [&encoded.head[HEADER_BYTES..], &encoded.payload].concat(),
                body,
                "{message:?}"
            );
            true
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            false
        }
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_decoded_or_refused(
        kind in prop::sample::select(KINDS.to_vec()),
        body in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        judge(kind, &body);
    }

    #[test]
    fn unknown_kinds_are_called_unknown(kind: u16, body in prop::collection::vec(any::<u8>(), 0..20)) {
        prop_assume!(!KINDS.contains(&kind));
        let error = Message::decode(kind, body.into()).unwrap_err();
        prop_assert_eq!(error.refusal_code(), RefusalCode::UnsupportedKind);
        prop_assert_eq!(body_bytes_max(kind, 0), None);
    }
}

/// Mutations of real messages reach deeper than noise: flips, cuts, insertions, spliced lengths.
#[test]
fn a_hundred_thousand_mutated_messages_are_decoded_or_refused() {
    let mut rng = ChaCha8Rng::seed_from_u64(0x7468_6572_6961_6321);
    let bodies = bodies();
    let mut decoded = 0;
    for _ in 0..100_000 {
        let (kind, body) = &bodies[rng.random_range(0..bodies.len())];
        let kind = if rng.random_ratio(1, 20) {
            KINDS[rng.random_range(0..KINDS.len())]
        } else {
            *kind
        };
        let mut body = body.clone();
        for _ in 0..rng.random_range(0..4) {
            mutate(&mut rng, &mut body);
        }
        decoded += u32::from(judge(kind, &body));
    }
    assert!(
        (10_000..90_000).contains(&decoded),
        "{decoded} decoded: the mutations are too weak or too strong"
    );
}

fn mutate(rng: &mut ChaCha8Rng, body: &mut Vec<u8>) {
    let at = rng.random_range(0..=body.len());
    match rng.random_range(0..5) {
        0 => body.truncate(at),
        1 => body.insert(at, rng.random()),
        2 if at < body.len() => body[at] ^= 1 << rng.random_range(0..8),
        3 if at + 8 <= body.len() => {
            let lengths = [0, 1, 65, 4097, 1 << 20, 1 << 40, u64::MAX];
            body[at..at + 8].copy_from_slice(&lengths[rng.random_range(0..lengths.len())].to_le_bytes());
        }
        _ => {
            let mut noise = [0; 4];
            rng.fill_bytes(&mut noise);
            body.extend_from_slice(&noise);
        }
    }
}

#[test]
fn every_truncation_is_refused() {
    for (kind, body) in bodies() {
        // A payload runs to the end of the frame, so only a cut in the header shows here; the payload's digest shows the rest.
        let header = if [kind::UPDATE_V1, kind::MODEL_V1, kind::CANDIDATE_V1].contains(&kind) {
            4 + usize::try_from(u32::from_le_bytes(body[..4].try_into().unwrap())).unwrap()
        } else {
            body.len()
        };
        for cut in 0..header {
            let error = Message::decode(kind, Bytes::copy_from_slice(&body[..cut])).unwrap_err();
            assert_eq!(
                error.refusal_code(),
                RefusalCode::Malformed,
                "{kind:#06x} cut at {cut}"
            );
        }
    }
}

#[test]
fn trailing_bytes_are_refused() {
    for (kind, mut body) in bodies() {
        if [kind::UPDATE_V1, kind::MODEL_V1, kind::CANDIDATE_V1].contains(&kind) {
            // One more byte between header and payload, counted to the header.
            let header = u32::from_le_bytes(body[..4].try_into().unwrap());
            body[..4].copy_from_slice(&(header + 1).to_le_bytes());
            body.insert(4 + usize::try_from(header).unwrap(), 0);
        } else {
            body.push(0);
        }
        let error = Message::decode(kind, body.into()).unwrap_err();
        assert!(
            matches!(error, CodecError::Trailing { .. }),
            "{kind:#06x}: {error}"
        );
    }
}

#[test]
fn length_prefix_of_2_to_the_40_is_refused_wherever_a_length_stands() {
    for (kind, body) in bodies() {
        for at in 0..body.len().saturating_sub(7) {
            let found = u64::from_le_bytes(body[at..at + 8].try_into().unwrap());
            // Whatever looks like a length may be one; those that are none may well decode.
            if found <= 4096 {
                let mut body = body.clone();
                body[at..at + 8].copy_from_slice(&(1_u64 << 40).to_le_bytes());
                judge(kind, &body);
            }
        }
    }
    // HelloV1.software begins after the two versions.
    let (kind, mut hello) = bodies().remove(0);
    assert_eq!(hello[4..12], 18_u64.to_le_bytes());
    hello[4..12].copy_from_slice(&(1_u64 << 40).to_le_bytes());
    let error = Message::decode(kind, hello.into()).unwrap_err();
    assert_eq!(error.refusal_code(), RefusalCode::Malformed);
}

#[test]
fn header_length_of_an_update_beyond_its_limit_is_refused() {
    for length in [u32::MAX, 65_537] {
        let mut body = BytesMut::new();
        body.put_u32_le(length);
        body.put_bytes(0, 70_000);
        let error = decode_to_aggregator(kind::UPDATE_V1, body.freeze()).unwrap_err();
        assert_eq!(error.refusal_code(), RefusalCode::TooLarge);
    }
}

#[test]
fn bodies_beyond_their_kind_are_refused_whole() {
    let plain = Bytes::from(vec![0; PLAIN_BYTES_MAX + 1]);
    assert_eq!(
        decode_to_aggregator(kind::HELLO_V1, plain.clone())
            .unwrap_err()
            .refusal_code(),
        RefusalCode::TooLarge
    );
    assert_eq!(
        decode_to_edge(kind::WELCOME_V1, plain)
            .unwrap_err()
            .refusal_code(),
        RefusalCode::TooLarge
    );
    let join = Bytes::from(vec![0; JOIN_BYTES_MAX + 1]);
    let error = Message::decode(kind::JOIN_REQUEST_V1, join).unwrap_err();
    assert_eq!(error.refusal_code(), RefusalCode::TooLarge);
    for kind in [kind::HEALTH_V1, kind::LEASE_REQUEST_V1, kind::FLEET_REPORT_V1] {
        assert_eq!(body_bytes_max(kind, 1 << 20), Some(64));
        let error = Message::decode(kind, Bytes::from(vec![0; 65])).unwrap_err();
        assert_eq!(error.refusal_code(), RefusalCode::TooLarge);
    }
    for kind in KINDS {
        assert!(
            body_bytes_max(kind, 1 << 20).is_some(),
            "{kind:#06x} has no limit"
        );
    }
}

#[test]
fn fields_beyond_their_documented_maximum_are_refused_on_both_sides() {
    let message = |change: &dyn Fn(&mut HelloV1)| {
        let Message::ToAggregator(ToAggregator::Hello(mut hello)) = samples::all().remove(0).1.remove(0)
        else {
            panic!("the first sample is a hello");
        };
        change(&mut hello);
        Message::ToAggregator(ToAggregator::Hello(hello))
    };
    for (field, message) in [
        (
            "HelloV1.software",
            message(&|hello| hello.software = "x".repeat(65)),
        ),
        (
            "HelloV1.features",
            message(&|hello| hello.features = vec![String::new(); 17]),
        ),
        (
            "HelloV1.features[..]",
            message(&|hello| hello.features = vec!["x".repeat(33)]),
        ),
        (
            "HelloV1.profile",
            message(&|hello| hello.profile = "x".repeat(33)),
        ),
    ] {
        let Err(CodecError::Field { field: found, .. }) = message.encode() else {
            panic!("{field}: sent");
        };
        assert_eq!(found, field);
    }
    // By hand, since the encoder refuses to: a feature list of 2^16 - 1 empty names, within the byte limit of no kind.
    let (kind, hello) = bodies().remove(1);
    let list = 4 + 8 + 18;
    assert_eq!(
        hello[list..list + 8],
        0_u64.to_le_bytes(),
        "the second hello has no features"
    );
    let mut long = hello[..list].to_vec();
    long.extend_from_slice(&17_u64.to_le_bytes());
    long.extend_from_slice(&[0; 17 * 8]);
    long.extend_from_slice(&hello[list + 8..]);
    let error = Message::decode(kind, long.into()).unwrap_err();
    assert!(
        matches!(
            error,
            CodecError::Field {
                field: "HelloV1.features",
                found: 17,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn signatures_of_another_length_and_scales_that_are_no_step_are_refused() {
    for (_, messages) in samples::all() {
        for message in messages {
            match message {
                Message::ToEdge(ToEdge::Receipt(mut receipt)) => {
                    receipt.signature.pop();
                    let error = Message::ToEdge(ToEdge::Receipt(receipt)).encode().unwrap_err();
                    assert!(matches!(error, CodecError::Field { found: 63, .. }));
                }
                Message::ToEdge(ToEdge::Seal(mut seal)) => {
                    seal.signature.push(0);
                    let error = Message::ToEdge(ToEdge::Seal(seal)).encode().unwrap_err();
                    assert!(matches!(error, CodecError::Field { found: 65, .. }));
                }
                Message::ToAggregator(ToAggregator::Update(header, payload)) => {
                    for scale in [f32::NAN, f32::INFINITY, -1.0] {
                        let header = UpdateV1 {
                            encoding: Encoding::Int8 { scale },
                            ..header.clone()
                        };
                        let message = Message::ToAggregator(ToAggregator::Update(header, payload.clone()));
                        assert!(matches!(message.encode(), Err(CodecError::Scale { .. })));
                    }
                }
                _ => {}
            }
        }
    }
}

#[test]
fn numbers_out_of_range_are_refused_by_their_type() {
    // The noise multiplier of the first announcement, between clip norm and block rows.
    let (kind, body) = bodies()
        .into_iter()
        .find(|(kind, _)| *kind == kind::ANNOUNCE_V1)
        .unwrap();
    let at = 8 + 8 + 4 + 4 + 32 + 8 + 32 + 8;
    assert_eq!(body[at..at + 8], 0.75_f64.to_le_bytes());
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let mut body = body.clone();
        body[at..at + 8].copy_from_slice(&bad.to_le_bytes());
        let error = Message::decode(kind, body.into()).unwrap_err();
        assert!(error.to_string().contains("noise multiplier"), "{error}");
    }
}
