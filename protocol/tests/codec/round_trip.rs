//! Any message that keeps its documented limits goes there and back unchanged.

use bytes::Bytes;
use proptest::collection::vec;
use proptest::option::of;
use proptest::prelude::*;
use theriac_protocol::frame::{FrameHeader, HEADER_BYTES};
use theriac_protocol::message::*;
use theriac_protocol::refusal::{AbortReason, RefusalCode, RefusalV1, RoundOutcome};
use theriac_protocol::units::*;

use crate::samples::Message;

proptest! {
    #[test]
    fn any_message_survives(message in message()) {
        let encoded = message.encode().unwrap();
        prop_assert_eq!(encoded.len(), encoded.head.len() + encoded.payload.len());
        let head: &[u8; HEADER_BYTES] = encoded.head[..HEADER_BYTES].try_into().unwrap();
        let header = FrameHeader::parse(head, u32::MAX).unwrap();
        let body: Bytes = [&encoded.head[HEADER_BYTES..], &encoded.payload].concat().into();
        prop_assert_eq!(body.len(), usize::try_from(header.length).unwrap());
        prop_assert_eq!(Message::decode(header.kind, body).unwrap(), message);
    }
}

fn message() -> impl Strategy<Value = Message> {
    prop_oneof![
        to_aggregator().prop_map(Message::ToAggregator),
        to_edge().prop_map(Message::ToEdge),
        join()
    ]
}

fn to_aggregator() -> impl Strategy<Value = ToAggregator> {
    prop_oneof![
        hello().prop_map(ToAggregator::Hello),
        (update(), payload()).prop_map(|(header, payload)| ToAggregator::Update(header, payload)),
        (any::<u64>(), decline_reason()).prop_map(|(round, reason)| ToAggregator::Decline(DeclineV1 {
            round: Round(round),
            reason
        })),
        any::<u64>().prop_map(|version| ToAggregator::FetchModel(FetchModelV1 {
            version: ModelVersion(version)
        })),
        (any::<u64>(), gate_verdict()).prop_map(|(version, verdict)| ToAggregator::Verdict(VerdictV1 {
            version: ModelVersion(version),
            verdict
        })),
        guarantee().prop_map(ToAggregator::Guarantee),
        appraisal().prop_map(ToAggregator::Appraisal),
        (any::<u16>(), any::<u16>())
            .prop_map(|(unhealthy, acting)| ToAggregator::Health(HealthV1 { unhealthy, acting })),
        (any::<u64>(), lease_kind(), any::<u8>(), any::<u32>()).prop_map(
            |(request, kind, share, need_ms)| {
                ToAggregator::LeaseRequest(LeaseRequestV1 {
                    request,
                    kind,
                    share,
                    need_ms,
                })
            }
        ),
        (lease_kind(), any::<u64>())
            .prop_map(|(kind, lease)| ToAggregator::LeaseRelease(LeaseReleaseV1 { kind, lease })),
        Just(ToAggregator::Goodbye),
    ]
}

fn lease_kind() -> impl Strategy<Value = LeaseKind> {
    prop::sample::select(LeaseKind::ALL.to_vec())
}

fn of_fleet() -> impl Strategy<Value = ToEdge> {
    let reason = prop_oneof![
        Just(LeaseRefusal::Taken),
        Just(LeaseRefusal::Young),
        Just(LeaseRefusal::TooShort)
    ];
    prop_oneof![
        any::<(u32, u32, u32)>().prop_map(|(nodes, unhealthy, acting)| ToEdge::Fleet(FleetReportV1 {
            nodes,
            unhealthy,
            acting
        })),
        (any::<u64>(), lease_kind(), any::<u64>(), any::<u32>()).prop_map(
            |(request, kind, lease, ttl_ms)| {
                ToEdge::LeaseGranted(LeaseGrantedV1 {
                    request,
                    kind,
                    lease,
                    ttl_ms,
                })
            }
        ),
        (any::<u64>(), lease_kind(), reason, any::<u32>()).prop_map(
            |(request, kind, reason, retry_after_ms)| ToEdge::LeaseRefused(LeaseRefusedV1 {
                request,
                kind,
                reason,
                retry_after_ms
            })
        ),
    ]
}

fn appraisal() -> impl Strategy<Value = AppraisalV1> {
    let appraisal = prop_oneof![
        Just(Appraisal::NotWorse),
        Just(Appraisal::Worse),
        Just(Appraisal::CannotTell)
    ];
    (any::<u64>(), digest(), appraisal, any::<u32>()).prop_map(
        |(round, payload_digest, appraisal, ratio_permille)| AppraisalV1 {
            round: Round(round),
            payload_digest,
            appraisal,
            ratio_permille,
        },
    )
}

fn candidate() -> impl Strategy<Value = CandidateV1> {
    (
        any::<u64>(),
        any::<u64>(),
        digest(),
        digest(),
        any::<u32>(),
        digest(),
        any::<u32>(),
    )
        .prop_map(
            |(round, base, base_digest, layout_digest, values, payload_digest, deadline_ms)| CandidateV1 {
                round: Round(round),
                base_version: ModelVersion(base),
                base_digest,
                layout_digest,
                values,
                payload_digest,
                deadline_ms,
            },
        )
}

fn guarantee() -> impl Strategy<Value = GuaranteeV1> {
    let unit = prop_oneof![Just(GuaranteeUnit::Block), Just(GuaranteeUnit::Record)];
    (
        unit,
        any::<u64>(),
        positive(),
        1e-12..1e-3,
        "[a-z]{0,16}",
        positive(),
        any::<u64>(),
        digest(),
        "[a-z0-9_]{0,128}",
    )
        .prop_map(
            |(unit, block_ms, epsilon, delta, period, noise, policy_version, policy_hash, policy_signer)| {
                GuaranteeV1 {
                    unit,
                    block_ms,
                    epsilon: Epsilon::new(epsilon).unwrap(),
                    delta: Delta::new(delta).unwrap(),
                    period,
                    noise_multiplier_min: NoiseMultiplier::new(noise).unwrap(),
                    policy_version,
                    policy_hash,
                    policy_signer,
                }
            },
        )
}

fn to_edge() -> impl Strategy<Value = ToEdge> {
    prop_oneof![
        welcome().prop_map(ToEdge::Welcome),
        (refusal_code(), of(any::<u64>().prop_map(Round)), any::<u32>()).prop_map(
            |(code, round, retry_after_ms)| ToEdge::Refusal(RefusalV1 {
                code,
                round,
                retry_after_ms
            })
        ),
        announce().prop_map(ToEdge::Announce),
        (
            any::<u64>(),
            digest(),
            any::<u64>(),
            digest(),
            vec(any::<u8>(), 64)
        )
            .prop_map(|(round, payload_digest, leaf_index, ledger_head, signature)| {
                ToEdge::Receipt(ReceiptV1 {
                    round: Round(round),
                    payload_digest,
                    leaf_index,
                    ledger_head,
                    signature,
                })
            }),
        (model(), payload()).prop_map(|(header, payload)| ToEdge::Model(header, payload)),
        (candidate(), payload()).prop_map(|(header, payload)| ToEdge::Candidate(header, payload)),
        (any::<u64>(), outcome()).prop_map(|(round, outcome)| ToEdge::Closed(ClosedV1 {
            round: Round(round),
            outcome
        })),
        (
            any::<u64>(),
            digest(),
            any::<u64>(),
            "[a-z/+]{0,512}",
            vec(any::<u8>(), 64)
        )
            .prop_map(
                |(records, head, signed, key, signature)| ToEdge::Seal(LedgerSealV1 {
                    records,
                    head,
                    signed: Timestamp(signed),
                    key,
                    signature,
                })
            ),
        of_fleet(),
        any::<u32>().prop_map(|retry_after_ms| ToEdge::Goodbye(GoodbyeV1 { retry_after_ms })),
    ]
}

fn join() -> impl Strategy<Value = Message> {
    let der = || vec(any::<u8>(), 0..=4096);
    prop_oneof![
        (any::<[u8; 8]>(), any::<[u8; 16]>(), der()).prop_map(
            |(token_id, secret, csr)| Message::JoinRequest(JoinRequestV1 {
                token_id,
                secret,
                csr
            })
        ),
        (node(), text(255), text(261), der(), der(), der()).prop_map(
            |(node, federation, aggregator, certificate, edge_authority, aggregator_authority)| {
                Message::JoinReply(JoinReplyV1::Enrolled {
                    node,
                    federation,
                    aggregator,
                    certificate,
                    edge_authority,
                    aggregator_authority,
                })
            }
        ),
        prop::sample::select(vec![
            JoinRefusal::UnknownToken,
            JoinRefusal::Expired,
            JoinRefusal::Spent,
            JoinRefusal::BadRequest,
            JoinRefusal::Busy,
            JoinRefusal::RevokedKey,
            JoinRefusal::StorageFull,
        ])
        .prop_map(|refusal| Message::JoinReply(JoinReplyV1::Refused(refusal))),
    ]
}

prop_compose! {
    fn hello()(
        protocol_min: u16, protocol_max: u16, software in text(64), features in vec(text(32), 0..=16), profile in text(32),
        digests in any::<[[u8; 32]; 4]>(), noise in positive(), ledger_records: u64, model_version: u64,
        audit_checkpoint in of((any::<u64>(), digest())), receipt_missing in of(any::<u64>().prop_map(Round)),
    ) -> HelloV1 {
        HelloV1 {
            protocol_min, protocol_max, software, features, profile,
            profile_digest: Digest(digests[0]),
            layout_digest: Digest(digests[1]),
            noise_multiplier_min: NoiseMultiplier::new(noise).unwrap(),
            ledger_head: Digest(digests[2]),
            ledger_records,
            model_version: ModelVersion(model_version),
            model_digest: Digest(digests[3]),
            audit_checkpoint, receipt_missing,
        }
    }
}

prop_compose! {
    fn welcome()(
        protocol: u16, federation in text(255), node in node(), time: u64, frame_bytes_max: u32, model_version: u64,
        model_digest in digest(), audit_checkpoint in (any::<u64>(), digest()), audit_consistency in vec(digest(), 0..=64),
        round in of(announce()),
    ) -> WelcomeV1 {
        WelcomeV1 {
            protocol, federation, node, time: Timestamp(time), frame_bytes_max, model_version: ModelVersion(model_version),
            model_digest, audit_checkpoint, audit_consistency, round,
        }
    }
}

prop_compose! {
    fn announce()(
        round: u64, nonce: u64, kind in update_kind(), values: u32, layout_digest in digest(), base_version: u64,
        base_digest in digest(), clip in positive(), noise in positive(), block_rows: u32, blocks_min: u32,
        blocks_max: u32, deadline_ms: u32,
    ) -> AnnounceV1 {
        AnnounceV1 {
            round: Round(round), nonce, kind, values, layout_digest, base_version: ModelVersion(base_version), base_digest,
            clip_norm: L2Norm::new(clip).unwrap(), noise_multiplier: NoiseMultiplier::new(noise).unwrap(),
            block_rows, blocks_min, blocks_max, deadline_ms,
        }
    }
}

prop_compose! {
    fn update()(
        round: u64, nonce: u64, kind in update_kind(), digests in any::<[[u8; 32]; 4]>(), values: u32, encoding in encoding(),
        blocks_bound: u32, numbers in [positive(), positive(), positive()], delta in 1e-12_f64..0.5, ledger_records: u64,
    ) -> UpdateV1 {
        UpdateV1 {
            round: Round(round), nonce, kind, base_digest: Digest(digests[0]), layout_digest: Digest(digests[1]), values, encoding,
            payload_digest: Digest(digests[2]), blocks_bound,
            privacy: PrivacyClaimV1 {
                clip_norm: L2Norm::new(numbers[0]).unwrap(),
                noise_multiplier: NoiseMultiplier::new(numbers[1]).unwrap(),
                epsilon_spent: Epsilon::new(numbers[2]).unwrap(),
                delta: Delta::new(delta).unwrap(),
                ledger_head: Digest(digests[3]),
                ledger_records,
            },
        }
    }
}

prop_compose! {
    fn model()(
        version: u64, round: u64, layout_digest in digest(), values: u32, payload_digest in digest(), rule in text(32),
        contributors: u32,
    ) -> ModelV1 {
        ModelV1 { version: ModelVersion(version), round: Round(round), layout_digest, values, payload_digest, rule, contributors }
    }
}

fn digest() -> impl Strategy<Value = Digest> {
    any::<[u8; 32]>().prop_map(Digest)
}

fn node() -> impl Strategy<Value = NodeId> {
    // proptest's patterns need a feature that is off: letters, digits and inner hyphens by hand.
    vec(prop::sample::select(b"abcxyz0189-".to_vec()), 0..=61)
        .prop_map(|inner| NodeId::new(format!("a{}z", String::from_utf8(inner).unwrap())).unwrap())
}

fn text(bytes_max: usize) -> impl Strategy<Value = String> {
    vec(any::<char>(), 0..=bytes_max).prop_map(move |chars| {
        let mut text = String::new();
        for c in chars {
            if text.len() + c.len_utf8() <= bytes_max {
                text.push(c);
            }
        }
        text
    })
}

fn positive() -> impl Strategy<Value = f64> {
    prop::num::f64::POSITIVE.prop_filter("finite and above 0", |v| v.is_finite() && *v > 0.0)
}

fn payload() -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 0..200).prop_map(Bytes::from)
}

fn encoding() -> impl Strategy<Value = Encoding> {
    prop_oneof![
        Just(Encoding::F32),
        (0.0_f32..1e30).prop_map(|scale| Encoding::Int8 { scale })
    ]
}

fn update_kind() -> impl Strategy<Value = UpdateKind> {
    prop::sample::select(vec![UpdateKind::Moments, UpdateKind::Delta, UpdateKind::Gradient])
}

fn decline_reason() -> impl Strategy<Value = DeclineReason> {
    use DeclineReason as D;
    prop::sample::select(vec![
        D::BudgetSpent,
        D::TermsTooWeak,
        D::TooFewBlocks,
        D::UnknownLayout,
        D::StorageUnavailable,
        D::ReceiveOnly,
    ])
}

fn gate_verdict() -> impl Strategy<Value = GateVerdict> {
    use GateVerdict as G;
    prop::sample::select(vec![
        G::Accepted,
        G::WorseOnTail,
        G::NonFinite,
        G::LayoutMismatch,
        G::Stale,
        G::TooFewRows,
    ])
}

fn refusal_code() -> impl Strategy<Value = RefusalCode> {
    prop::sample::select(RefusalCode::ALL.to_vec())
}

fn outcome() -> impl Strategy<Value = RoundOutcome> {
    use AbortReason as A;
    prop_oneof![
        any::<u64>().prop_map(|version| RoundOutcome::Published(ModelVersion(version))),
        prop::sample::select(vec![A::QuorumMissed, A::AggregationFailed, A::Operator])
            .prop_map(RoundOutcome::Aborted),
    ]
}
