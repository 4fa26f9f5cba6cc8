//! One list of messages for each struct: every variant of every enum occurs, every option is once full and once empty.

use bytes::Bytes;
use theriac_protocol::codec::{
    self, CodecError, Encoded, decode_join_reply, decode_join_request, decode_to_aggregator, decode_to_edge,
};
use theriac_protocol::message::*;
use theriac_protocol::refusal::{AbortReason, RefusalCode, RefusalV1, RoundOutcome};
use theriac_protocol::units::*;

/// A message of any direction.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Message {
    ToAggregator(ToAggregator),
    ToEdge(ToEdge),
    JoinRequest(JoinRequestV1),
    JoinReply(JoinReplyV1),
}

impl Message {
    pub(crate) fn encode(&self) -> Result<Encoded, CodecError> {
        match self {
            Self::ToAggregator(message) => codec::encode_to_aggregator(message),
            Self::ToEdge(message) => codec::encode_to_edge(message),
            Self::JoinRequest(request) => codec::encode_join_request(request),
            Self::JoinReply(reply) => codec::encode_join_reply(reply),
        }
    }

    /// Decodes by whichever direction knows the kind.
    pub(crate) fn decode(kind: u16, body: Bytes) -> Result<Self, CodecError> {
        decode_to_aggregator(kind, body.clone())
            .map(Self::ToAggregator)
            .or_else(|error| unknown(error, || decode_to_edge(kind, body.clone()).map(Self::ToEdge)))
            .or_else(|error| {
                unknown(error, || {
                    decode_join_request(kind, body.clone()).map(Self::JoinRequest)
                })
            })
            .or_else(|error| {
                unknown(error, || {
                    decode_join_reply(kind, body.clone()).map(Self::JoinReply)
                })
            })
    }
}

fn unknown(
    error: CodecError,
    other: impl FnOnce() -> Result<Message, CodecError>,
) -> Result<Message, CodecError> {
    if matches!(error, CodecError::UnsupportedKind { .. }) {
        other()
    } else {
        Err(error)
    }
}

fn digest(fill: u8) -> Digest {
    Digest([fill; 32])
}

fn node() -> NodeId {
    NodeId::new("site-7").unwrap()
}

pub(crate) fn announce(kind: UpdateKind) -> AnnounceV1 {
    AnnounceV1 {
        round: Round(41),
        nonce: 0x0123_4567_89ab_cdef,
        kind,
        values: 180,
        layout_digest: digest(2),
        base_version: ModelVersion(40),
        base_digest: digest(3),
        clip_norm: L2Norm::new(1.5).unwrap(),
        noise_multiplier: NoiseMultiplier::new(0.75).unwrap(),
        block_rows: 3600,
        blocks_min: 4,
        blocks_max: 24,
        deadline_ms: 30_000,
    }
}

fn update(encoding: Encoding, payload: &[u8]) -> Message {
    update_of(UpdateKind::Moments, encoding, payload)
}

fn update_of(kind: UpdateKind, encoding: Encoding, payload: &[u8]) -> Message {
    let header = UpdateV1 {
        round: Round(41),
        nonce: 0x0123_4567_89ab_cdef,
        kind,
        base_digest: digest(3),
        layout_digest: digest(2),
        values: 4,
        encoding,
        payload_digest: Digest::of(payload),
        blocks_bound: 24,
        privacy: PrivacyClaimV1 {
            clip_norm: L2Norm::new(1.5).unwrap(),
            noise_multiplier: NoiseMultiplier::new(0.75).unwrap(),
            epsilon_spent: Epsilon::new(2.25).unwrap(),
            delta: Delta::new(1e-6).unwrap(),
            ledger_head: digest(4),
            ledger_records: 12,
        },
    };
    Message::ToAggregator(ToAggregator::Update(header, Bytes::copy_from_slice(payload)))
}

fn hello(full: bool) -> Message {
    Message::ToAggregator(ToAggregator::Hello(HelloV1 {
        protocol_min: PROTOCOL_MIN,
        protocol_max: PROTOCOL_MAX,
        software: "theriac-edge 0.1.0".into(),
        features: if full {
            vec!["int8".into(), "delta".into()]
        } else {
            vec![]
        },
        profile: "host-service-v1".into(),
        profile_digest: digest(1),
        layout_digest: digest(2),
        noise_multiplier_min: NoiseMultiplier::new(0.5).unwrap(),
        ledger_head: digest(4),
        ledger_records: 12,
        model_version: ModelVersion(40),
        model_digest: digest(3),
        audit_checkpoint: full.then(|| (99, digest(5))),
        receipt_missing: full.then_some(Round(41)),
    }))
}

fn welcome(full: bool) -> Message {
    Message::ToEdge(ToEdge::Welcome(WelcomeV1 {
        protocol: 1,
        federation: "demo".into(),
        node: node(),
        time: Timestamp(1_790_000_000_000),
        frame_bytes_max: 1 << 20,
        model_version: ModelVersion(40),
        model_digest: digest(3),
        audit_checkpoint: (100, digest(6)),
        audit_consistency: if full { vec![digest(7), digest(8)] } else { vec![] },
        round: full.then(|| announce(UpdateKind::Moments)),
    }))
}

fn to_edge<T>(values: impl IntoIterator<Item = T>, wrap: impl Fn(T) -> ToEdge) -> Vec<Message> {
    values
        .into_iter()
        .map(|value| Message::ToEdge(wrap(value)))
        .collect()
}

fn to_aggregator<T>(values: impl IntoIterator<Item = T>, wrap: impl Fn(T) -> ToAggregator) -> Vec<Message> {
    values
        .into_iter()
        .map(|value| Message::ToAggregator(wrap(value)))
        .collect()
}

/// Every struct and version by the name of its golden file.
pub(crate) fn all() -> Vec<(&'static str, Vec<Message>)> {
    use DeclineReason as D;
    use GateVerdict as G;
    use JoinRefusal as J;
    let outcomes = [
        RoundOutcome::Published(ModelVersion(41)),
        RoundOutcome::Aborted(AbortReason::QuorumMissed),
        RoundOutcome::Aborted(AbortReason::AggregationFailed),
        RoundOutcome::Aborted(AbortReason::Operator),
    ];
    let declines = [
        D::BudgetSpent,
        D::TermsTooWeak,
        D::TooFewBlocks,
        D::UnknownLayout,
        D::StorageUnavailable,
        D::ReceiveOnly,
    ];
    let verdicts = [
        G::Accepted,
        G::WorseOnTail,
        G::NonFinite,
        G::LayoutMismatch,
        G::Stale,
        G::TooFewRows,
    ];
    let join_refusals = [J::UnknownToken, J::Expired, J::Spent, J::BadRequest, J::Busy];
    let enrolled = JoinReplyV1::Enrolled {
        node: node(),
        federation: "demo".into(),
        aggregator: "aggregator.example:7443".into(),
        certificate: vec![1; 20],
        edge_authority: vec![2; 21],
        aggregator_authority: vec![3; 22],
    };
    let model = ModelV1 {
        version: ModelVersion(41),
        round: Round(41),
        layout_digest: digest(2),
        values: 2,
        payload_digest: Digest::of(&[0; 8]),
        rule: "trimmed_mean".into(),
        contributors: 5,
    };
    let receipt = ReceiptV1 {
        round: Round(41),
        payload_digest: digest(9),
        leaf_index: 1234,
        ledger_head: digest(4),
        signature: (0..64).collect(),
    };
    let seal = LedgerSealV1 {
        records: 77,
        head: digest(4),
        signed: Timestamp(1_700_000_000_000),
        key: "theriac/plant+01234567+AAAA".into(),
        signature: (0..64).collect(),
    };
    let candidate = CandidateV1 {
        round: Round(41),
        base_version: ModelVersion(40),
        base_digest: digest(3),
        layout_digest: digest(2),
        values: 2,
        payload_digest: Digest::of(&[0; 8]),
        deadline_ms: 30_000,
    };
    let join_request = JoinRequestV1 {
        token_id: [1; 8],
        secret: [2; 16],
        csr: vec![3; 30],
    };
    vec![
        ("hello_v1", vec![hello(true), hello(false)]),
        (
            "update_v1",
            vec![
                update(
                    Encoding::F32,
                    &[0, 0, 128, 63, 0, 0, 0, 64, 0, 0, 64, 64, 0, 0, 128, 64],
                ),
                update(Encoding::Int8 { scale: 0.125 }, &[1, 2, 255, 127]),
            ],
        ),
        (
            "decline_v1",
            to_aggregator(declines, |reason| {
                ToAggregator::Decline(DeclineV1 {
                    round: Round(41),
                    reason,
                })
            }),
        ),
        (
            "fetch_model_v1",
            to_aggregator([ModelVersion(41)], |version| {
                ToAggregator::FetchModel(FetchModelV1 { version })
            }),
        ),
        (
            "verdict_v1",
            to_aggregator(verdicts, |verdict| {
                ToAggregator::Verdict(VerdictV1 {
                    version: ModelVersion(41),
                    verdict,
                })
            }),
        ),
        (
            "edge_goodbye_v1",
            vec![Message::ToAggregator(ToAggregator::Goodbye)],
        ),
        ("welcome_v1", vec![welcome(true), welcome(false)]),
        (
            "refusal_v1",
            to_edge(RefusalCode::ALL, |code| {
                let round = code.retryable().then_some(Round(41));
                ToEdge::Refusal(RefusalV1 {
                    code,
                    round,
                    retry_after_ms: 500,
                })
            }),
        ),
        (
            "announce_v1",
            to_edge([UpdateKind::Moments, UpdateKind::Delta], |kind| {
                ToEdge::Announce(announce(kind))
            }),
        ),
        (
            "gradient_v1",
            vec![
                Message::ToEdge(ToEdge::Announce(announce(UpdateKind::Gradient))),
                update_of(
                    UpdateKind::Gradient,
                    Encoding::Int8 { scale: 0.5 },
                    &[1, 2, 255, 0],
                ),
            ],
        ),
        ("receipt_v1", to_edge([receipt], ToEdge::Receipt)),
        (
            "model_v1",
            to_edge([model], |model| ToEdge::Model(model, Bytes::from_static(&[0; 8]))),
        ),
        (
            "closed_v1",
            to_edge(outcomes, |outcome| {
                ToEdge::Closed(ClosedV1 {
                    round: Round(41),
                    outcome,
                })
            }),
        ),
        (
            "aggregator_goodbye_v1",
            to_edge([GoodbyeV1 { retry_after_ms: 5000 }], ToEdge::Goodbye),
        ),
        ("ledger_seal_v1", to_edge([seal], ToEdge::Seal)),
        (
            "guarantee_v1",
            to_aggregator(
                [(GuaranteeUnit::Block, "thpk1_ab"), (GuaranteeUnit::Record, "")],
                |(unit, signer)| {
                    ToAggregator::Guarantee(GuaranteeV1 {
                        unit,
                        block_ms: 3_600_000,
                        epsilon: Epsilon::new(4.0).unwrap(),
                        delta: Delta::new(1e-6).unwrap(),
                        period: "rolling".into(),
                        noise_multiplier_min: NoiseMultiplier::new(1.25).unwrap(),
                        policy_version: 3,
                        policy_hash: digest(6),
                        policy_signer: signer.into(),
                    })
                },
            ),
        ),
        (
            "candidate_v1",
            to_edge([candidate], |candidate| {
                ToEdge::Candidate(candidate, Bytes::from_static(&[0; 8]))
            }),
        ),
        (
            "appraisal_v1",
            to_aggregator(
                [
                    (Appraisal::NotWorse, 987),
                    (Appraisal::Worse, u32::MAX),
                    (Appraisal::CannotTell, 0),
                ],
                |(appraisal, ratio_permille)| {
                    ToAggregator::Appraisal(AppraisalV1 {
                        round: Round(41),
                        payload_digest: digest(9),
                        appraisal,
                        ratio_permille,
                    })
                },
            ),
        ),
        (
            "health_v1",
            to_aggregator(
                [HealthV1 {
                    unhealthy: 2,
                    acting: 1,
                }],
                ToAggregator::Health,
            ),
        ),
        (
            "lease_request_v1",
            to_aggregator(LeaseKind::ALL, |kind| {
                ToAggregator::LeaseRequest(LeaseRequestV1 {
                    request: 0x0123_4567_89ab_cdef,
                    kind,
                    share: 20,
                    need_ms: 120_000,
                })
            }),
        ),
        (
            "lease_release_v1",
            to_aggregator(LeaseKind::ALL, |kind| {
                ToAggregator::LeaseRelease(LeaseReleaseV1 { kind, lease: 7 })
            }),
        ),
        (
            "fleet_report_v1",
            to_edge(
                [FleetReportV1 {
                    nodes: 20,
                    unhealthy: 9,
                    acting: 4,
                }],
                ToEdge::Fleet,
            ),
        ),
        (
            "lease_granted_v1",
            to_edge(LeaseKind::ALL, |kind| {
                ToEdge::LeaseGranted(LeaseGrantedV1 {
                    request: 0x0123_4567_89ab_cdef,
                    kind,
                    lease: 7,
                    ttl_ms: 300_000,
                })
            }),
        ),
        (
            "lease_refused_v1",
            to_edge(
                [LeaseRefusal::Taken, LeaseRefusal::Young, LeaseRefusal::TooShort],
                |reason| {
                    ToEdge::LeaseRefused(LeaseRefusedV1 {
                        request: 0x0123_4567_89ab_cdef,
                        kind: LeaseKind::Action,
                        reason,
                        retry_after_ms: 2_000,
                    })
                },
            ),
        ),
        ("join_request_v1", vec![Message::JoinRequest(join_request)]),
        (
            "join_reply_v1",
            std::iter::once(enrolled)
                .chain(join_refusals.into_iter().map(JoinReplyV1::Refused))
                .map(Message::JoinReply)
                .collect(),
        ),
    ]
}
