//! Well-formed updates that must not count: each is refused by exactly its code, and the model is the one that the others
//! would have made alone.

use bytes::Bytes;
use theriac_protocol::codec::decode_to_aggregator;
use theriac_protocol::compress::encode_f32;
use theriac_protocol::frame::HEADER_BYTES;
use theriac_protocol::message::{Encoding, ToAggregator, UpdateKind, UpdateV1};
use theriac_protocol::refusal::{RefusalCode, RoundOutcome};
use theriac_protocol::units::{Digest, L2Norm, NodeId, NoiseMultiplier, Round};

use crate::centre::{Answer, Centre, DEADLINE};
use crate::honest;

/// A good update, changed.
type Attack = fn(UpdateV1, Vec<u8>) -> (UpdateV1, Vec<u8>);

/// The update with other values, its length and digest made to fit.
fn with_values(mut header: UpdateV1, change: impl FnOnce(&mut Vec<f32>)) -> (UpdateV1, Vec<u8>) {
    let mut values = vec![1.0; header.values as usize];
    change(&mut values);
    let payload = encode_f32(&values);
    header.encoding = Encoding::F32;
    header.payload_digest = Digest::of(&payload);
    (header, payload)
}

fn with_scale(header: UpdateV1, payload: Vec<u8>, scale: f32) -> (UpdateV1, Vec<u8>) {
    (
        UpdateV1 {
            encoding: Encoding::Int8 { scale },
            ..header
        },
        payload,
    )
}

/// The norm that no honest update of these terms passes: 64 blocks of norm C, and noise.
fn honest_norm_max(values: u32) -> f32 {
    let (clip_norm, sigma) = (588.0_f32, 1.27_f32);
    #[expect(clippy::cast_precision_loss, reason = "a few hundred values")]
    let values = values as f32;
    64.0 * clip_norm + sigma * clip_norm * (values.sqrt() + 5.0)
}

/// Name, what is sent, and how it must be answered.
fn attacks() -> Vec<(&'static str, Attack, RefusalCode)> {
    vec![
        (
            "one value more",
            |h, p| {
                (
                    UpdateV1 {
                        values: h.values + 1,
                        ..h
                    },
                    p,
                )
            },
            RefusalCode::WrongLength,
        ),
        (
            "one value less",
            |h, p| {
                (
                    UpdateV1 {
                        values: h.values - 1,
                        ..h
                    },
                    p,
                )
            },
            RefusalCode::WrongLength,
        ),
        (
            "no values at all",
            |h, _| (UpdateV1 { values: 0, ..h }, vec![]),
            RefusalCode::WrongLength,
        ),
        (
            "2^32 - 1 values",
            |h, p| {
                (
                    UpdateV1 {
                        values: u32::MAX,
                        ..h
                    },
                    p,
                )
            },
            RefusalCode::WrongLength,
        ),
        (
            "truncated payload",
            |h, p| (h, p[..p.len() - 1].to_vec()),
            RefusalCode::WrongLength,
        ),
        (
            "half a payload, its digest right",
            |h, p| {
                let half = p[..p.len() / 2].to_vec();
                (
                    UpdateV1 {
                        payload_digest: Digest::of(&half),
                        ..h
                    },
                    half,
                )
            },
            RefusalCode::WrongLength,
        ),
        (
            "a byte appended",
            |h, p| (h, [p, vec![0]].concat()),
            RefusalCode::WrongLength,
        ),
        (
            "f32 header over int8 bytes",
            |h, p| {
                (
                    UpdateV1 {
                        encoding: Encoding::F32,
                        ..h
                    },
                    p,
                )
            },
            RefusalCode::WrongLength,
        ),
        (
            "another layout",
            |h, p| {
                (
                    UpdateV1 {
                        layout_digest: Digest([9; 32]),
                        ..h
                    },
                    p,
                )
            },
            RefusalCode::LayoutMismatch,
        ),
        (
            "another kind",
            |h, p| {
                (
                    UpdateV1 {
                        kind: UpdateKind::Delta,
                        ..h
                    },
                    p,
                )
            },
            RefusalCode::LayoutMismatch,
        ),
        (
            "digest of other bytes",
            |h, p| {
                (
                    UpdateV1 {
                        payload_digest: Digest::of(b"x"),
                        ..h
                    },
                    p,
                )
            },
            RefusalCode::DigestMismatch,
        ),
        (
            "a payload byte changed on the way",
            |h, mut p| {
                p[3] ^= 1;
                (h, p)
            },
            RefusalCode::DigestMismatch,
        ),
        (
            "NaN",
            |h, _| with_values(h, |v| v[17] = f32::NAN),
            RefusalCode::NonFinite,
        ),
        (
            "a signalling NaN",
            |h, _| with_values(h, |v| v[0] = f32::from_bits(0x7f80_0001)),
            RefusalCode::NonFinite,
        ),
        (
            "infinity",
            |h, _| with_values(h, |v| v[0] = f32::INFINITY),
            RefusalCode::NonFinite,
        ),
        (
            "minus infinity",
            |h, _| with_values(h, |v| *v.last_mut().unwrap() = f32::NEG_INFINITY),
            RefusalCode::NonFinite,
        ),
        (
            "1e30",
            |h, _| with_values(h, |v| v[5] = 1e30),
            RefusalCode::NormExceeded,
        ),
        (
            "the largest number everywhere",
            |h, _| with_values(h, |v| v.fill(f32::MAX)),
            RefusalCode::NormExceeded,
        ),
        (
            "a norm just beyond the honest",
            |h, _| {
                let most = honest_norm_max(h.values);
                with_values(h, |v| v[0] = most * 1.02)
            },
            RefusalCode::NormExceeded,
        ),
        (
            "a huge int8 step",
            |h, p| with_scale(h, p, 1e30),
            RefusalCode::NormExceeded,
        ),
        (
            "the largest int8 step",
            |h, p| with_scale(h, p, f32::MAX),
            RefusalCode::NormExceeded,
        ),
        (
            "a replayed nonce",
            |h, p| {
                (
                    UpdateV1 {
                        nonce: h.nonce ^ 1,
                        ..h
                    },
                    p,
                )
            },
            RefusalCode::WrongNonce,
        ),
        (
            "an old round",
            |h, p| (UpdateV1 { round: Round(0), ..h }, p),
            RefusalCode::RoundClosed,
        ),
        (
            "a coming round",
            |h, p| {
                (
                    UpdateV1 {
                        round: h.round.next(),
                        ..h
                    },
                    p,
                )
            },
            RefusalCode::RoundUnknown,
        ),
        (
            "the last round of all",
            |h, p| {
                (
                    UpdateV1 {
                        round: Round(u64::MAX),
                        ..h
                    },
                    p,
                )
            },
            RefusalCode::RoundUnknown,
        ),
        (
            "another base model",
            |h, p| {
                (
                    UpdateV1 {
                        base_digest: Digest([9; 32]),
                        ..h
                    },
                    p,
                )
            },
            RefusalCode::WrongBase,
        ),
        (
            "less noise than agreed",
            |mut h, p| {
                h.privacy.noise_multiplier = NoiseMultiplier::new(1.26).unwrap();
                (h, p)
            },
            RefusalCode::PrivacyTooWeak,
        ),
        (
            "hardly any noise",
            |mut h, p| {
                h.privacy.noise_multiplier = NoiseMultiplier::new(1e-300).unwrap();
                (h, p)
            },
            RefusalCode::PrivacyTooWeak,
        ),
        (
            "a larger clipping norm",
            |mut h, p| {
                h.privacy.clip_norm = L2Norm::new(589.0).unwrap();
                (h, p)
            },
            RefusalCode::PrivacyTooWeak,
        ),
        (
            "more blocks than agreed",
            |h, p| {
                (
                    UpdateV1 {
                        blocks_bound: 65,
                        ..h
                    },
                    p,
                )
            },
            RefusalCode::PrivacyTooWeak,
        ),
    ]
}

fn centre() -> (Centre, NodeId) {
    let mut nodes = ["site-a", "site-b", "site-c", "site-d", "site-e"]
        .map(honest::node)
        .to_vec();
    nodes.push(honest::node("mallory"));
    (Centre::new(honest::terms(), &nodes), honest::node("mallory"))
}

fn take_apart(frame: &[u8]) -> (UpdateV1, Vec<u8>) {
    let body = Bytes::copy_from_slice(&frame[HEADER_BYTES..]);
    match decode_to_aggregator(theriac_protocol::frame::kind::UPDATE_V1, body).unwrap() {
        ToAggregator::Update(header, payload) => (header, payload.to_vec()),
        other => panic!("{other:?}"),
    }
}

fn deliver(centre: &mut Centre, frames: &[(NodeId, Vec<u8>)]) {
    for (node, frame) in frames {
        assert!(
            matches!(centre.deliver(node, frame), Answer::Receipt(_)),
            "{node} was turned away"
        );
    }
}

/// Every attack, sent before, among and after the honest updates.
#[test]
fn every_bad_update_is_refused_by_its_code_and_leaves_the_model_as_it_was() {
    let (mut quiet, _) = centre();
    let frames = honest::frames(quiet.announced());
    deliver(&mut quiet, &frames);
    quiet.wait(DEADLINE);
    let alone = quiet.ended[0].clone();
    assert!(matches!(alone.outcome, RoundOutcome::Published(_)) && alone.members.len() == 5);
    let (good, payload) = take_apart(&frames[4].1);
    for (name, attack, code) in attacks() {
        let (header, bytes) = attack(good.clone(), payload.clone());
        let frame = honest::frame(&header, &bytes.into());
        for honest_first in [0, 2, 5] {
            let (mut centre, mallory) = centre();
            deliver(&mut centre, &frames[..honest_first]);
            let answer = centre.deliver(&mallory, &frame);
            assert_eq!(
                answer,
                Answer::Refused(code),
                "{name}, after {honest_first} honest updates"
            );
            deliver(&mut centre, &frames[honest_first..]);
            centre.wait(DEADLINE);
            assert_eq!(
                centre.ended[0], alone,
                "{name}, after {honest_first} honest updates"
            );
        }
    }
}

/// All attacks in one round, many times over: still nothing but refusals, and the same model.
#[test]
fn a_flood_of_bad_updates_does_not_keep_the_round_open() {
    let (mut quiet, _) = centre();
    let frames = honest::frames(quiet.announced());
    deliver(&mut quiet, &frames);
    quiet.wait(DEADLINE);
    let (mut centre, mallory) = centre();
    let (good, payload) = take_apart(&frames[4].1);
    for (name, attack, code) in (0..20).flat_map(|_| attacks()) {
        let (header, bytes) = attack(good.clone(), payload.clone());
        let answer = centre.deliver(&mallory, &honest::frame(&header, &bytes.into()));
        assert_eq!(answer, Answer::Refused(code), "{name}");
    }
    deliver(&mut centre, &frames);
    centre.wait(DEADLINE);
    assert_eq!(centre.ended[0], quiet.ended[0]);
}

#[test]
fn the_first_update_counts_and_other_bytes_are_refused() {
    let (mut first_only, mallory) = centre();
    let frames = honest::frames(first_only.announced());
    let first = frames[4].1.clone();
    let second = frames[3].1.clone();
    let (mut centre, _) = centre();
    for centre in [&mut first_only, &mut centre] {
        assert!(matches!(centre.deliver(&mallory, &first), Answer::Receipt(_)));
    }
    let receipt = centre.deliver(&mallory, &first);
    assert!(
        matches!(receipt, Answer::Receipt(_)),
        "the same bytes get the same receipt"
    );
    assert_eq!(
        centre.deliver(&mallory, &second),
        Answer::Refused(RefusalCode::Duplicate)
    );
    for centre in [&mut first_only, &mut centre] {
        deliver(centre, &frames);
        centre.wait(DEADLINE);
    }
    assert_eq!(centre.ended[0], first_only.ended[0]);
    assert_eq!(centre.ended[0].members.len(), 6);
}

#[test]
fn updates_of_the_last_round_do_not_count_in_the_next() {
    let (mut centre, mallory) = centre();
    let old = honest::frames(centre.announced());
    deliver(&mut centre, &old);
    centre.wait(DEADLINE);
    centre.wait(DEADLINE / 5);
    assert_eq!(centre.announced().round, Round(2));
    let (stale, payload) = take_apart(&old[0].1);
    let announced = centre.announced().clone();
    assert_ne!(announced.nonce, stale.nonce, "two rounds share a nonce");
    assert_eq!(
        centre.deliver(&mallory, &old[0].1),
        Answer::Refused(RefusalCode::RoundClosed)
    );
    let relabelled = UpdateV1 {
        round: announced.round,
        ..stale.clone()
    };
    let answer = centre.deliver(&mallory, &honest::frame(&relabelled, &payload.clone().into()));
    assert_eq!(answer, Answer::Refused(RefusalCode::WrongNonce));
    // A site that lost its receipt and sends the stored bytes again is told that they are durable.
    let (site, frame) = &old[2];
    assert_eq!(
        centre.deliver(site, frame),
        Answer::Receipt(take_apart(frame).0.payload_digest)
    );
    let new = honest::frames(&announced);
    deliver(&mut centre, &new);
    centre.wait(DEADLINE);
    assert_eq!(centre.ended[1].members.len(), 5);
    assert!(matches!(centre.ended[1].outcome, RoundOutcome::Published(_)));
}

#[test]
fn with_only_bad_updates_the_round_ends_without_a_model() {
    let (mut centre, mallory) = centre();
    let frames = honest::frames(centre.announced());
    let (good, payload) = take_apart(&frames[0].1);
    for (_, attack, code) in attacks() {
        let (header, bytes) = attack(good.clone(), payload.clone());
        assert_eq!(
            centre.deliver(&mallory, &honest::frame(&header, &bytes.into())),
            Answer::Refused(code)
        );
    }
    centre.wait(DEADLINE);
    assert!(matches!(centre.ended[0].outcome, RoundOutcome::Aborted(_)));
    assert!(centre.ended[0].combined.is_empty());
}
