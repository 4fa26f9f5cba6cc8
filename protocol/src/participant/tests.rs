//! Each rule of the module's page, one test a rule.

use super::*;
use crate::message::{ModelV1, ReceiptV1, UpdateKind};
use crate::refusal::{AbortReason, RefusalCode};
use crate::units::{L2Norm, NodeId, NoiseMultiplier, Timestamp};

const NONCE: u64 = 77;

fn digest(fill: u8) -> Digest {
    Digest([fill; 32])
}

fn config() -> ParticipantConfig {
    ParticipantConfig {
        noise_multiplier_min: NoiseMultiplier::new(0.5).unwrap(),
        clip_norm_max: Some(L2Norm::new(2.0).unwrap()),
        layout_digests: LayoutDigests {
            model: digest(101),
            linear_model: digest(105),
            moments: digest(102),
            delta: digest(103),
            gradient: digest(104),
        },
    }
}

fn model(version: u64) -> BaseModel {
    BaseModel {
        version: ModelVersion(version),
        digest: digest(u8::try_from(version).unwrap()),
    }
}

fn announce(round: u64, base: u64) -> AnnounceV1 {
    AnnounceV1 {
        round: Round(round),
        nonce: NONCE + round,
        kind: UpdateKind::Moments,
        values: 180,
        layout_digest: digest(102),
        base_version: model(base).version,
        base_digest: model(base).digest,
        clip_norm: L2Norm::new(1.0).unwrap(),
        noise_multiplier: NoiseMultiplier::new(0.5).unwrap(),
        block_rows: 3600,
        blocks_min: 4,
        blocks_max: 24,
        deadline_ms: 30_000,
    }
}

fn welcome(base: u64, round: Option<AnnounceV1>) -> Input {
    Input::Welcome(WelcomeV1 {
        protocol: 1,
        federation: "demo".into(),
        node: NodeId::new("a").unwrap(),
        time: Timestamp(0),
        frame_bytes_max: 1 << 20,
        model_version: model(base).version,
        model_digest: model(base).digest,
        audit_checkpoint: (0, Digest::default()),
        audit_consistency: vec![],
        round,
    })
}

fn receipt(round: u64, fill: u8) -> Input {
    Input::Receipt(ReceiptV1 {
        round: Round(round),
        payload_digest: digest(fill),
        leaf_index: 0,
        ledger_head: Digest::default(),
        signature: vec![0; 64],
    })
}

fn refusal(round: Option<u64>, code: RefusalCode) -> Input {
    Input::Refusal(RefusalV1 {
        code,
        round: round.map(Round),
        retry_after_ms: 1500,
    })
}

fn published(round: u64, version: u64) -> Input {
    let outcome = RoundOutcome::Published(ModelVersion(version));
    Input::Closed(ClosedV1 {
        round: Round(round),
        outcome,
    })
}

fn aborted(round: u64) -> Input {
    let outcome = RoundOutcome::Aborted(AbortReason::QuorumMissed);
    Input::Closed(ClosedV1 {
        round: Round(round),
        outcome,
    })
}

fn trained(round: u64) -> Input {
    Input::Trained {
        round: Round(round),
        nonce: NONCE + round,
        payload_digest: digest(200),
    }
}

fn model_header(version: u64) -> Input {
    let header = ModelV1 {
        version: ModelVersion(version),
        round: Round(1),
        layout_digest: digest(101),
        values: 2,
        payload_digest: model(version).digest,
        rule: "mean".into(),
        contributors: 3,
    };
    Input::Model { header }
}

fn judged(version: u64, verdict: GateVerdict) -> Input {
    Input::Judged {
        version: ModelVersion(version),
        verdict,
    }
}

fn at(seconds: u64) -> Moment {
    Moment(Duration::from_secs(seconds))
}

/// Gives the input and collects what is to be done, without the reports.
fn give(participant: &mut Participant, input: Input) -> Vec<Output> {
    participant.handle(at(0), input);
    outputs(participant)
}

fn outputs(participant: &mut Participant) -> Vec<Output> {
    std::iter::from_fn(|| participant.poll_output())
        .filter(|output| !matches!(output, Output::Report(_)))
        .collect()
}

fn send(round: u64) -> Output {
    Output::SendUpdate { round: Round(round) }
}

fn drop_outbox(round: u64) -> Output {
    Output::DropOutbox { round: Round(round) }
}

fn fetch(version: u64) -> Output {
    Output::FetchModel {
        version: ModelVersion(version),
    }
}

fn decline(round: u64, reason: DeclineReason) -> Output {
    Output::SendDecline(DeclineV1 {
        round: Round(round),
        reason,
    })
}

fn train(round: u64, base: u64) -> Output {
    Output::Train {
        announce: announce(round, base),
    }
}

/// A participant that holds model 4 and is welcomed while no round is open.
fn welcomed() -> Participant {
    let mut participant = Participant::new(config(), model(4), None, at(0));
    assert_eq!(give(&mut participant, Input::Connected), []);
    assert!(!participant.status().welcomed, "connected is not yet welcomed");
    assert_eq!(give(&mut participant, welcome(4, None)), []);
    participant
}

fn training() -> Participant {
    let mut participant = welcomed();
    assert_eq!(
        give(&mut participant, Input::Announce(announce(1, 4))),
        [train(1, 4)]
    );
    participant
}

fn reporting() -> Participant {
    let mut participant = training();
    assert_eq!(give(&mut participant, trained(1)), [send(1)]);
    participant
}

fn reconnect(participant: &mut Participant, welcome: Input) -> Vec<Output> {
    assert_eq!(give(participant, Input::Disconnected), []);
    assert_eq!(give(participant, Input::Connected), []);
    give(participant, welcome)
}

#[test]
fn trains_reports_keeps_the_outbox_past_the_receipt_and_applies_the_model() {
    let mut participant = reporting();
    assert_eq!(participant.receipt_missing(), Some(Round(1)));
    assert_eq!(
        give(&mut participant, receipt(1, 200)),
        [],
        "the outbox stays until the round is over"
    );
    assert_eq!(participant.receipt_missing(), None);
    assert_eq!(
        give(&mut participant, published(1, 5)),
        [drop_outbox(1), fetch(5)]
    );
    assert_eq!(
        give(&mut participant, model_header(5)),
        [Output::Judge {
            version: ModelVersion(5)
        }]
    );
    let verdict = VerdictV1 {
        version: ModelVersion(5),
        verdict: GateVerdict::Accepted,
    };
    assert_eq!(
        give(&mut participant, judged(5, GateVerdict::Accepted)),
        [Output::SendVerdict(verdict)]
    );
    assert_eq!(
        (participant.status().phase, participant.status().model),
        (PhaseName::Idle, model(5))
    );
    assert_eq!(participant.counters().acknowledged, 1);
}

#[test]
fn round_in_the_welcome_is_an_announcement_and_the_same_one_again_is_ignored() {
    let mut participant = Participant::new(config(), model(4), None, at(0));
    give(&mut participant, Input::Connected);
    assert_eq!(
        give(&mut participant, welcome(4, Some(announce(1, 4)))),
        [train(1, 4)]
    );
    assert_eq!(give(&mut participant, Input::Announce(announce(1, 4))), []);
    assert_eq!(give(&mut participant, trained(1)), [send(1)]);
    assert_eq!(
        give(&mut participant, Input::Announce(announce(1, 4))),
        [],
        "it is on its way"
    );
    assert_eq!(participant.counters().ignored[&Ignored::AnnounceRepeated], 2);
}

#[test]
fn weaker_terms_and_unknown_layouts_are_declined() {
    let noise = NoiseMultiplier::new(0.49).unwrap();
    let cases = [
        (
            AnnounceV1 {
                noise_multiplier: noise,
                ..announce(1, 4)
            },
            DeclineReason::TermsTooWeak,
        ),
        (
            AnnounceV1 {
                clip_norm: L2Norm::new(2.1).unwrap(),
                ..announce(1, 4)
            },
            DeclineReason::TermsTooWeak,
        ),
        (
            AnnounceV1 {
                layout_digest: digest(103),
                ..announce(1, 4)
            },
            DeclineReason::UnknownLayout,
        ),
        (
            AnnounceV1 {
                kind: UpdateKind::Delta,
                ..announce(1, 4)
            },
            DeclineReason::UnknownLayout,
        ),
        (
            AnnounceV1 {
                blocks_max: 0,
                ..announce(1, 4)
            },
            DeclineReason::UnknownLayout,
        ),
    ];
    for (announce, reason) in cases {
        let mut participant = welcomed();
        assert_eq!(
            give(&mut participant, Input::Announce(announce)),
            [decline(1, reason)]
        );
        assert_eq!(participant.counters().trainings, 0);
    }
    let delta = AnnounceV1 {
        kind: UpdateKind::Delta,
        layout_digest: digest(103),
        ..announce(1, 4)
    };
    assert!(matches!(
        &give(&mut welcomed(), Input::Announce(delta))[..],
        [Output::Train { .. }]
    ));
}

#[test]
fn spent_budget_declines_once_and_again_to_an_aggregator_that_has_not_heard() {
    let mut participant = training();
    let reason = DeclineReason::BudgetSpent;
    let cannot = Input::CannotTrain {
        round: Round(1),
        nonce: NONCE + 1,
        reason,
    };
    assert_eq!(give(&mut participant, cannot), [decline(1, reason)]);
    assert_eq!(
        reconnect(&mut participant, welcome(4, Some(announce(1, 4)))),
        [decline(1, reason)]
    );
    assert_eq!(participant.counters().trainings, 1);
    // The next round is another question.
    assert_eq!(
        give(&mut participant, Input::Announce(announce(2, 4))),
        [train(2, 4)]
    );
}

#[test]
fn restart_with_an_outbox_sends_the_very_same_update_and_never_trains() {
    let outbox = Some((Round(1), NONCE + 1, digest(200)));
    for round in [Some(announce(1, 4)), None] {
        let mut participant = Participant::new(config(), model(4), outbox, at(0));
        assert_eq!(participant.receipt_missing(), Some(Round(1)));
        give(&mut participant, Input::Connected);
        assert_eq!(give(&mut participant, welcome(4, round)), [send(1)]);
        assert_eq!(give(&mut participant, Input::Announce(announce(1, 4))), []);
        assert_eq!(give(&mut participant, receipt(1, 200)), []);
        assert_eq!(
            reconnect(&mut participant, welcome(4, Some(announce(1, 4)))),
            [],
            "acknowledged"
        );
        assert_eq!(participant.counters().trainings, 0);
    }
}

#[test]
fn lost_session_sends_the_same_update_again() {
    let mut participant = reporting();
    assert_eq!(
        reconnect(&mut participant, welcome(4, Some(announce(1, 4)))),
        [send(1)]
    );
    // Trained while the session was away: sent with the next Welcome.
    let mut participant = training();
    give(&mut participant, Input::Disconnected);
    assert_eq!(give(&mut participant, trained(1)), []);
    give(&mut participant, Input::Connected);
    assert_eq!(
        give(&mut participant, welcome(4, Some(announce(1, 4)))),
        [send(1)]
    );
}

#[test]
fn later_round_ends_an_earlier_one() {
    let mut participant = reporting();
    let out = give(&mut participant, Input::Announce(announce(2, 4)));
    assert_eq!(out, [drop_outbox(1), train(2, 4)]);
    let out = give(&mut participant, Input::Announce(announce(3, 4)));
    assert_eq!(out, [Output::CancelTraining { round: Round(2) }, train(3, 4)]);
    // The cancelled training ends after all.
    assert_eq!(give(&mut participant, trained(2)), [drop_outbox(2)]);
    assert_eq!(give(&mut participant, Input::Announce(announce(2, 4))), []);
    assert_eq!(participant.counters().ignored[&Ignored::AnnounceStale], 1);
}

#[test]
fn end_of_the_round_cancels_training() {
    let mut participant = training();
    assert_eq!(
        give(&mut participant, aborted(1)),
        [Output::CancelTraining { round: Round(1) }]
    );
    assert_eq!(give(&mut participant, trained(1)), [drop_outbox(1)]);
    assert_eq!(
        give(&mut participant, Input::Announce(announce(1, 4))),
        [],
        "older than its end"
    );
    // The end of an earlier round does not.
    let mut participant = training();
    assert_eq!(give(&mut participant, aborted(0)), []);
    assert_eq!(participant.status().phase, PhaseName::Training);
}

#[test]
fn round_that_is_over_is_not_trained_for_again_whatever_a_later_session_says() {
    for mut participant in [training(), reporting()] {
        give(&mut participant, aborted(1));
        assert_eq!(reconnect(&mut participant, welcome(4, Some(announce(1, 4)))), []);
        assert_eq!(participant.counters().trainings, 1);
        assert_eq!(participant.counters().ignored[&Ignored::AnnounceRepeated], 1);
    }
}

#[test]
fn refusal_for_good_is_not_answered_by_sending_until_the_round_is_announced_again() {
    for code in [
        RefusalCode::RoundClosed,
        RefusalCode::Duplicate,
        RefusalCode::WrongNonce,
        RefusalCode::NormExceeded,
    ] {
        let mut participant = reporting();
        assert_eq!(
            give(&mut participant, refusal(Some(1), code)),
            [],
            "the outbox stays: the round may be resumed"
        );
        participant.handle_timeout(at(1000));
        assert_eq!(
            (outputs(&mut participant), participant.poll_timeout()),
            (vec![], None)
        );
        assert_eq!(reconnect(&mut participant, welcome(4, None)), []);
        assert_eq!(
            reconnect(&mut participant, welcome(4, Some(announce(1, 4)))),
            [send(1)]
        );
        assert_eq!(
            reconnect(&mut participant, welcome(4, Some(announce(2, 4)))),
            [drop_outbox(1), train(2, 4)]
        );
        assert_eq!(participant.counters().refused[&code], 1);
    }
}

#[test]
fn refusal_for_now_is_met_by_the_same_update_later_and_ever_later() {
    for code in [
        RefusalCode::Busy,
        RefusalCode::StorageFull,
        RefusalCode::RoundUnknown,
    ] {
        let mut participant = reporting();
        give(&mut participant, refusal(Some(1), code));
        let first = participant.poll_timeout().unwrap();
        assert_eq!(
            first,
            Moment(Duration::from_millis(1500)),
            "as long as it was asked to"
        );
        participant.handle_timeout(first);
        assert_eq!(outputs(&mut participant), [send(1)]);
        participant.handle(first, refusal(Some(1), code));
        assert_eq!(
            participant.poll_timeout(),
            Some(first.after(Duration::from_secs(2)))
        );
        give(&mut participant, Input::Disconnected);
        assert_eq!(participant.poll_timeout(), None);
    }
}

#[test]
fn receipt_for_other_bytes_or_another_round_is_none() {
    let mut participant = reporting();
    give(&mut participant, receipt(1, 201));
    give(&mut participant, receipt(2, 200));
    assert_eq!(participant.receipt_missing(), Some(Round(1)));
    assert_eq!(participant.counters().ignored[&Ignored::ReceiptUnknown], 2);
}

#[test]
fn newer_model_at_the_welcome_ends_the_round_once_the_update_is_answered() {
    let mut participant = reporting();
    assert_eq!(reconnect(&mut participant, welcome(5, None)), [send(1)]);
    assert_eq!(
        give(&mut participant, receipt(1, 200)),
        [drop_outbox(1), fetch(5)]
    );
    let mut participant = reporting();
    reconnect(&mut participant, welcome(5, None));
    assert_eq!(
        give(&mut participant, refusal(Some(1), RefusalCode::RoundClosed)),
        [drop_outbox(1), fetch(5)]
    );
    let mut participant = training();
    let out = reconnect(&mut participant, welcome(5, None));
    assert_eq!(out, [Output::CancelTraining { round: Round(1) }, fetch(5)]);
}

#[test]
fn round_on_a_base_that_is_not_held_waits_for_the_model() {
    let mut participant = welcomed();
    assert_eq!(
        give(&mut participant, Input::Announce(announce(1, 5))),
        [fetch(5)]
    );
    give(&mut participant, model_header(5));
    let out = give(&mut participant, judged(5, GateVerdict::WorseOnTail));
    assert!(
        matches!(&out[..], [Output::SendVerdict(_), Output::Train { announce: a }] if *a == announce(1, 5))
    );
    // Too late by then.
    let mut participant = welcomed();
    give(&mut participant, Input::Announce(announce(1, 5)));
    give(&mut participant, model_header(5));
    participant.handle(at(30), judged(5, GateVerdict::Accepted));
    assert!(matches!(&outputs(&mut participant)[..], [Output::SendVerdict(_)]));
    // Closed by then.
    let mut participant = welcomed();
    give(&mut participant, Input::Announce(announce(1, 5)));
    give(&mut participant, aborted(1));
    give(&mut participant, model_header(5));
    assert!(matches!(
        &give(&mut participant, judged(5, GateVerdict::Accepted))[..],
        [Output::SendVerdict(_)]
    ));
}

#[test]
fn a_held_model_is_built_on_at_once_and_nothing_is_said_of_it() {
    let mut participant = welcomed();
    give(&mut participant, published(1, 5));
    give(&mut participant, model_header(5));
    assert_eq!(give(&mut participant, Input::Announce(announce(2, 5))), []);
    let held = Input::Held {
        version: ModelVersion(5),
    };
    // The round's answer follows without a word about the model, and without waiting for anything that looks at rows.
    assert_eq!(give(&mut participant, held.clone()), [train(2, 5)]);
    assert_eq!(participant.status().model, model(5));
    assert_eq!(give(&mut participant, held), [], "once");
    assert_eq!(participant.counters().ignored[&Ignored::UnexpectedAnswer], 1);
}

#[test]
fn round_announced_while_judging_waits_for_the_gate() {
    let mut participant = welcomed();
    give(&mut participant, published(1, 5));
    give(&mut participant, model_header(5));
    assert_eq!(give(&mut participant, Input::Announce(announce(2, 5))), []);
    assert_eq!(give(&mut participant, Input::Announce(announce(2, 5))), []);
    let out = give(&mut participant, judged(5, GateVerdict::TooFewRows));
    assert_eq!(out[1], train(2, 5));
}

#[test]
fn model_turned_down_for_its_form_is_not_fetched_again_and_its_rounds_are_declined() {
    let mut participant = welcomed();
    assert_eq!(give(&mut participant, published(1, 5)), [fetch(5)]);
    give(&mut participant, model_header(5));
    assert!(matches!(
        &give(&mut participant, judged(5, GateVerdict::NonFinite))[..],
        [Output::SendVerdict(_)]
    ));
    assert_eq!(participant.status().model, model(4));
    assert_eq!(reconnect(&mut participant, welcome(5, None)), []);
    assert_eq!(give(&mut participant, published(1, 5)), []);
    let reason = DeclineReason::UnknownLayout;
    assert_eq!(
        give(&mut participant, Input::Announce(announce(2, 5))),
        [decline(2, reason)]
    );
}

#[test]
fn model_of_another_layout_or_digest_is_not_judged() {
    let Input::Model { header } = model_header(5) else {
        unreachable!()
    };
    let mut participant = welcomed();
    give(&mut participant, published(1, 5));
    let foreign = ModelV1 {
        layout_digest: digest(9),
        ..header.clone()
    };
    let verdict = VerdictV1 {
        version: ModelVersion(5),
        verdict: GateVerdict::LayoutMismatch,
    };
    assert_eq!(
        give(&mut participant, Input::Model { header: foreign }),
        [Output::SendVerdict(verdict)]
    );

    let mut participant = welcomed();
    give(&mut participant, Input::Announce(announce(1, 5)));
    let other = ModelV1 {
        payload_digest: digest(9),
        ..header
    };
    let out = give(&mut participant, Input::Model { header: other });
    assert_eq!(out, [decline(1, DeclineReason::UnknownLayout)]);
}

#[test]
fn fetch_is_repeated_when_busy_and_given_up_when_refused() {
    let mut participant = welcomed();
    give(&mut participant, Input::Announce(announce(1, 5)));
    assert_eq!(give(&mut participant, refusal(None, RefusalCode::Busy)), []);
    let again = participant.poll_timeout().unwrap();
    participant.handle_timeout(again);
    assert_eq!(outputs(&mut participant), [fetch(5)]);
    let out = give(&mut participant, refusal(None, RefusalCode::Malformed));
    assert_eq!(out, [decline(1, DeclineReason::UnknownLayout)]);
}

#[test]
fn verdict_that_found_no_session_is_told_in_the_next() {
    let mut participant = welcomed();
    give(&mut participant, published(1, 5));
    give(&mut participant, model_header(5));
    give(&mut participant, Input::Disconnected);
    assert_eq!(give(&mut participant, judged(5, GateVerdict::Accepted)), []);
    give(&mut participant, Input::Connected);
    assert!(matches!(
        &give(&mut participant, welcome(5, None))[..],
        [Output::SendVerdict(_)]
    ));
    assert_eq!(reconnect(&mut participant, welcome(5, None)), []);
}

#[test]
fn aggregator_restored_from_a_backup_is_believed_in_a_new_session() {
    let mut participant = training();
    give(&mut participant, Input::Announce(announce(9, 4)));
    give(&mut participant, trained(9));
    // Its rounds and its models begin again at lower numbers.
    let out = reconnect(&mut participant, welcome(3, Some(announce(2, 3))));
    assert_eq!(out, [drop_outbox(9), fetch(3)]);
    give(&mut participant, model_header(3));
    assert_eq!(
        give(&mut participant, judged(3, GateVerdict::WorseOnTail))[1],
        train(2, 3)
    );
}

#[test]
fn nothing_counts_outside_an_admitted_session() {
    let words = || {
        [
            Input::Announce(announce(1, 4)),
            receipt(1, 200),
            model_header(5),
            published(1, 5),
            welcome(5, None),
        ]
    };
    let mut participant = Participant::new(config(), model(4), None, at(0));
    for word in words() {
        assert_eq!(give(&mut participant, word), []);
    }
    assert_eq!(participant.counters().ignored[&Ignored::NotWelcomed], 5);
    give(&mut participant, Input::Connected);
    for word in words().into_iter().take(4) {
        assert_eq!(give(&mut participant, word), []);
    }
    // A refusal instead of a Welcome is heard: it says why there is no Welcome.
    give(&mut participant, refusal(None, RefusalCode::Suspended));
    assert_eq!(participant.counters().refused[&RefusalCode::Suspended], 1);
    assert_eq!(participant.status().phase, PhaseName::Idle);
}

#[test]
fn every_input_is_taken_in_every_phase() {
    let applying = || {
        let mut participant = welcomed();
        give(&mut participant, published(1, 5));
        participant
    };
    let judging = || {
        let mut participant = applying();
        give(&mut participant, model_header(5));
        participant
    };
    let foreign = [
        receipt(7, 1),
        refusal(Some(7), RefusalCode::Duplicate),
        Input::Model {
            header: {
                let Input::Model { header } = model_header(9) else {
                    unreachable!()
                };
                header
            },
        },
        aborted(0),
        Input::Trained {
            round: Round(7),
            nonce: 1,
            payload_digest: digest(1),
        },
        Input::CannotTrain {
            round: Round(7),
            nonce: 1,
            reason: DeclineReason::ReceiveOnly,
        },
        judged(9, GateVerdict::Accepted),
        welcome(4, None),
    ];
    for (mut participant, name) in [
        (welcomed(), PhaseName::Idle),
        (training(), PhaseName::Training),
        (reporting(), PhaseName::Reporting),
        (applying(), PhaseName::Applying),
        (judging(), PhaseName::Applying),
    ] {
        assert_eq!(participant.status().phase, name);
        let before: u64 = participant.counters().ignored.values().sum();
        for input in foreign.clone() {
            participant.handle(at(1), input);
        }
        let after: u64 = participant.counters().ignored.values().sum();
        assert_eq!(
            after - before,
            8,
            "{name:?}: each is ignored on purpose and counted"
        );
        assert_eq!(participant.status().phase, name, "none of it moves {name:?}");
    }
}
