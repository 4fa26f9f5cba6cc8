//! Bytes that are no message: each is answered with its code, costs nothing but itself, and moves no round.

use bytes::Bytes;
use proptest::prelude::*;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use theriac_protocol::codec::encode_to_aggregator;
use theriac_protocol::frame::{FrameHeader, HEADER_BYTES, kind};
use theriac_protocol::message::{
    DeclineReason, DeclineV1, FetchModelV1, GateVerdict, GuaranteeUnit, GuaranteeV1, HelloV1, ToAggregator,
    UpdateV1, VerdictV1,
};
use theriac_protocol::refusal::{RefusalCode, RoundOutcome};
use theriac_protocol::units::{Delta, Digest, Epsilon, ModelVersion, NodeId, NoiseMultiplier, Round};

use crate::centre::{Answer, Centre, DEADLINE, Ended};
use crate::honest;

/// A fleet with one attacker, and what its round makes of the honest updates alone.
struct World {
    centre: Centre,
    mallory: NodeId,
    honest: Vec<(NodeId, Vec<u8>)>,
    alone: Ended,
}

impl World {
    fn new() -> Self {
        let mallory = honest::node("mallory");
        let mut nodes = ["site-a", "site-b", "site-c", "site-d", "site-e"]
            .map(honest::node)
            .to_vec();
        nodes.push(mallory.clone());
        let mut quiet = Centre::new(honest::terms(), &nodes);
        let honest = honest::frames(quiet.announced());
        let alone = finish(&mut quiet, &honest);
        let centre = Centre::new(honest::terms(), &nodes);
        assert_eq!(alone.members.len(), 5);
        Self {
            centre,
            mallory,
            honest,
            alone,
        }
    }

    fn send(&mut self, frame: &[u8]) -> Answer {
        let mallory = self.mallory.clone();
        self.centre.deliver(&mallory, frame)
    }

    /// The honest updates arrive, and the round must end as it does without the attacker.
    fn must_end_as_if_alone(mut self) {
        let ended = finish(&mut self.centre, &self.honest);
        assert_eq!(ended, self.alone, "the attacker changed the round");
    }
}

/// Delivers the honest updates and lets the deadline pass.
fn finish(centre: &mut Centre, honest: &[(NodeId, Vec<u8>)]) -> Ended {
    for (node, frame) in honest {
        assert!(
            matches!(centre.deliver(node, frame), Answer::Receipt(_)),
            "{node} was turned away"
        );
    }
    centre.wait(DEADLINE);
    let ended = centre.ended.first().cloned().expect("the round has ended");
    assert!(
        matches!(ended.outcome, RoundOutcome::Published(_)),
        "{:?}",
        ended.outcome
    );
    ended
}

fn frame_of(kind: u16, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap();
    [FrameHeader { kind, length }.encode().as_slice(), body].concat()
}

fn body_of(message: &ToAggregator) -> (u16, Vec<u8>) {
    let encoded = encode_to_aggregator(message).unwrap();
    let header = FrameHeader::parse(encoded.head.first_chunk().unwrap(), u32::MAX).unwrap();
    let body = [&encoded.head[HEADER_BYTES..], &encoded.payload].concat();
    (header.kind, body)
}

fn hello() -> HelloV1 {
    HelloV1 {
        protocol_min: 1,
        protocol_max: 1,
        software: "theriac-edge/0.1.0".to_owned(),
        features: vec!["int8".to_owned()],
        profile: "host-service-v1".to_owned(),
        profile_digest: Digest([1; 32]),
        layout_digest: Digest([2; 32]),
        noise_multiplier_min: NoiseMultiplier::new(0.7).unwrap(),
        ledger_head: Digest([3; 32]),
        ledger_records: 4,
        model_version: ModelVersion(0),
        model_digest: Digest([5; 32]),
        audit_checkpoint: Some((7, Digest([6; 32]))),
        receipt_missing: None,
    }
}

/// One message of each kind that an edge can send without a payload.
fn plain_messages() -> Vec<ToAggregator> {
    vec![
        ToAggregator::Hello(hello()),
        ToAggregator::Decline(DeclineV1 {
            round: Round(1),
            reason: DeclineReason::BudgetSpent,
        }),
        ToAggregator::FetchModel(FetchModelV1 {
            version: ModelVersion(1),
        }),
        ToAggregator::Verdict(VerdictV1 {
            version: ModelVersion(1),
            verdict: GateVerdict::Accepted,
        }),
        ToAggregator::Guarantee(GuaranteeV1 {
            unit: GuaranteeUnit::Block,
            block_ms: 3_600_000,
            epsilon: Epsilon::new(4.0).unwrap(),
            delta: Delta::new(1e-6).unwrap(),
            period: "rolling".into(),
            noise_multiplier_min: NoiseMultiplier::new(0.7).unwrap(),
            policy_version: 1,
            policy_hash: Digest([1; 32]),
            policy_signer: String::new(),
        }),
        ToAggregator::Goodbye,
    ]
}

#[test]
fn frames_of_other_programs_versions_and_sizes_are_refused_by_their_code() {
    let mut world = World::new();
    let good = frame_of(kind::FETCH_MODEL_V1, &1_u64.to_le_bytes());
    let with = |at: usize, byte: u8| {
        let mut frame = good.clone();
        frame[at] = byte;
        frame
    };
    let long = |length: u32| {
        let mut frame = good.clone();
        frame[8..12].copy_from_slice(&length.to_le_bytes());
        frame
    };
    let cases = [
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), RefusalCode::Malformed),
        (with(0, b'X'), RefusalCode::Malformed),
        (with(4, 2), RefusalCode::UnsupportedVersion),
        (with(7, 1), RefusalCode::UnsupportedVersion),
        (long(u32::MAX), RefusalCode::TooLarge),
        (long(70_000), RefusalCode::TooLarge),
        (frame_of(0x7777, &[]), RefusalCode::UnsupportedKind),
        (frame_of(kind::ANNOUNCE_V1, &[]), RefusalCode::UnsupportedKind),
        (frame_of(kind::JOIN_REQUEST_V1, &[]), RefusalCode::UnsupportedKind),
    ];
    for (frame, code) in cases {
        assert_eq!(world.send(&frame), Answer::Refused(code), "{:02x?}", &frame[..12]);
    }
    world.must_end_as_if_alone();
}

#[test]
fn every_cut_and_every_appended_byte_of_every_message_is_refused() {
    let mut world = World::new();
    for message in plain_messages() {
        let (kind, body) = body_of(&message);
        for length in 0..body.len() {
            let answer = world.send(&frame_of(kind, &body[..length]));
            assert_eq!(
                answer,
                Answer::Refused(RefusalCode::Malformed),
                "{message:?} cut at {length}"
            );
        }
        let longer = [body.as_slice(), &[0]].concat();
        let answer = world.send(&frame_of(kind, &longer));
        // A goodbye has no body at all: its limit is met before its bytes are read.
        let code = if body.is_empty() {
            RefusalCode::TooLarge
        } else {
            RefusalCode::Malformed
        };
        assert_eq!(answer, Answer::Refused(code), "{message:?} with a byte appended");
    }
    world.must_end_as_if_alone();
}

#[test]
fn a_length_prefix_of_two_to_the_forty_is_refused_and_not_allocated() {
    let mut world = World::new();
    let (kind, body) = body_of(&ToAggregator::Hello(hello()));
    let software = hello().software;
    // protocol_min and protocol_max, then the string's length; behind the string the list's length.
    for at in [4, 12 + software.len(), 20 + software.len()] {
        for length in [1_u64 << 40, u64::MAX, 65] {
            let mut body = body.clone();
            body[at..at + 8].copy_from_slice(&length.to_le_bytes());
            let answer = world.send(&frame_of(kind, &body));
            assert_eq!(
                answer,
                Answer::Refused(RefusalCode::Malformed),
                "length {length} at byte {at}"
            );
        }
    }
    world.must_end_as_if_alone();
}

#[test]
fn an_update_whose_header_length_lies_is_refused() {
    let mut world = World::new();
    let (_, honest) = world.honest[0].clone();
    let body = &honest[HEADER_BYTES..];
    let true_length = u32::from_le_bytes(*body.first_chunk().unwrap());
    for length in [
        0,
        1,
        true_length - 1,
        true_length + 1,
        u32::try_from(body.len()).unwrap(),
        1 << 31,
        u32::MAX,
    ] {
        let mut lying = body.to_vec();
        lying[..4].copy_from_slice(&length.to_le_bytes());
        let answer = world.send(&frame_of(kind::UPDATE_V1, &lying));
        let refused = matches!(
            answer,
            Answer::Refused(RefusalCode::Malformed | RefusalCode::TooLarge)
        );
        assert!(refused, "a header length of {length} was answered {answer:?}");
    }
    for length in 0..4 + true_length as usize {
        let answer = world.send(&frame_of(kind::UPDATE_V1, &body[..length]));
        assert_eq!(
            answer,
            Answer::Refused(RefusalCode::Malformed),
            "an update cut at {length}"
        );
    }
    world.must_end_as_if_alone();
}

/// Steps that are no number, infinite or negative stop at the codec; see `poisoned` for those that are merely huge.
#[test]
fn an_int8_scale_that_is_no_step_is_refused() {
    let mut world = World::new();
    let (_, honest) = world.honest[0].clone();
    let scale = scale_of(&honest);
    let at = honest
        .windows(4)
        .position(|bytes| bytes == scale.to_le_bytes())
        .unwrap();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0] {
        let mut frame = honest.clone();
        frame[at..at + 4].copy_from_slice(&bad.to_le_bytes());
        assert_eq!(
            world.send(&frame),
            Answer::Refused(RefusalCode::Malformed),
            "a scale of {bad}"
        );
    }
    world.must_end_as_if_alone();
}

#[test]
fn garbage_is_refused_and_moves_nothing() {
    let mut world = World::new();
    let mut rng = ChaCha8Rng::seed_from_u64(2026);
    let kinds = [
        kind::HELLO_V1,
        kind::UPDATE_V1,
        kind::DECLINE_V1,
        kind::FETCH_MODEL_V1,
        kind::VERDICT_V1,
    ];
    for n in 0..3_000 {
        let body: Vec<u8> = (0..rng.random_range(9..600)).map(|_| rng.random()).collect();
        let frame = frame_of(kinds[n % kinds.len()], &body);
        let answer = world.send(&frame);
        assert!(
            matches!(
                answer,
                Answer::Refused(RefusalCode::Malformed | RefusalCode::TooLarge)
            ),
            "{n}: {answer:?}"
        );
    }
    world.must_end_as_if_alone();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// One byte of a good update is changed anywhere before the payload. It may still be a good update (the claimed ε is any
    /// number), but it is one update of one node: the others are all in the model, and the round ends.
    #[test]
    fn a_changed_byte_in_an_update_is_at_most_one_update(at in 0_usize..400, flip in 1_u8..=255) {
        let mut world = World::new();
        let (_, honest) = world.honest[0].clone();
        let head = honest.len() - usize::try_from(honest::terms().values).unwrap();
        let mut frame = honest;
        frame[at % head] ^= flip;
        let taken = matches!(world.send(&frame), Answer::Receipt(_));
        let ended = finish(&mut world.centre, &world.honest);
        prop_assert_eq!(ended.members.len(), 5 + usize::from(taken));
        prop_assert!(taken || ended == world.alone);
    }
}

/// The step of a frame's update.
fn scale_of(frame: &[u8]) -> f32 {
    let body = Bytes::copy_from_slice(&frame[HEADER_BYTES..]);
    let message = theriac_protocol::codec::decode_to_aggregator(kind::UPDATE_V1, body).unwrap();
    let ToAggregator::Update(
        UpdateV1 {
            encoding: theriac_protocol::message::Encoding::Int8 { scale },
            ..
        },
        _,
    ) = message
    else {
        panic!("the honest update is no int8 update")
    };
    scale
}
