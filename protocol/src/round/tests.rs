//! Each rule of the module's page, one test a rule.

use std::time::Duration;

use super::*;
use crate::message::{DeclineReason, UpdateKind};
use crate::refusal::AbortReason;
use crate::units::{L2Norm, ModelVersion, NoiseMultiplier};

const DEADLINE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_secs(5);
const SEED: [u8; 32] = [7; 32];

fn config() -> RoundConfig {
    RoundConfig {
        quorum: 2,
        byzantine: 0,
        deadline: DEADLINE,
        pause: PAUSE,
        updates_max: usize::MAX,
        rounds_max: None,
        late_updates: false,
        terms: RoundTerms {
            kind: UpdateKind::Moments,
            values: 180,
            layout_digest: digest(1),
            clip_norm: L2Norm::new(1.0).unwrap(),
            noise_multiplier: NoiseMultiplier::new(0.5).unwrap(),
            block_rows: 3600,
            blocks_min: 4,
            blocks_max: 24,
        },
    }
}

fn base() -> BaseModel {
    BaseModel {
        version: ModelVersion(4),
        digest: digest(4),
    }
}

fn digest(fill: u8) -> Digest {
    Digest([fill; 32])
}

fn node(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

fn at(seconds: u64) -> Moment {
    Moment(Duration::from_secs(seconds))
}

fn outputs(machine: &mut RoundMachine) -> Vec<Output> {
    std::iter::from_fn(|| machine.poll_output()).collect()
}

/// Gives the input at that second and collects what comes of it.
fn give(machine: &mut RoundMachine, seconds: u64, input: Input) -> Vec<Output> {
    machine.handle(at(seconds), input);
    outputs(machine)
}

fn update(name: &str, fill: u8) -> Input {
    let nonce = nonce_of(Round(1));
    Input::Update {
        node: node(name),
        round: Round(1),
        nonce,
        base_digest: base().digest,
        payload_digest: digest(fill),
    }
}

fn nonce_of(round: Round) -> u64 {
    Context::new(config(), base(), Round(0), SEED).nonce(round)
}

fn stored(name: &str) -> Input {
    Input::Stored {
        node: node(name),
        round: Round(1),
    }
}

fn refused(name: &str, code: RefusalCode) -> Vec<Output> {
    vec![Output::Refuse {
        node: node(name),
        round: Round(1),
        code,
    }]
}

fn receipt(name: &str, fill: u8) -> Output {
    Output::Receipt {
        node: node(name),
        round: Round(1),
        payload_digest: digest(fill),
    }
}

fn admit(machine: &mut RoundMachine, names: &[&str]) {
    for name in names {
        machine.handle(at(0), Input::Admitted { node: node(name) });
    }
}

/// A machine that collects round 1 from these nodes since second 0.
fn collecting(names: &[&str]) -> RoundMachine {
    let mut machine = RoundMachine::new(config(), base(), Round(0), SEED, at(0));
    admit(&mut machine, names);
    machine.handle(at(0), Input::Opened { round: Round(1) });
    // Those who came after the quorum was there are in the announcement as well.
    let announced = outputs(&mut machine).into_iter().any(
        |output| matches!(output, Output::Announce { to, .. } if to == names.iter().map(|n| node(n)).collect::<Vec<_>>()),
    );
    assert!(announced);
    machine
}

/// Offers and stores.
fn report(machine: &mut RoundMachine, name: &str, fill: u8) -> Vec<Output> {
    let store = give(machine, 1, update(name, fill));
    assert_eq!(
        store,
        [Output::Store {
            node: node(name),
            round: Round(1),
            payload_digest: digest(fill)
        }]
    );
    give(machine, 1, stored(name))
}

fn members(list: &[(&str, u8)]) -> Vec<(NodeId, Digest)> {
    list.iter()
        .map(|(name, fill)| (node(name), digest(*fill)))
        .collect()
}

#[test]
fn opens_with_the_quorum_and_announces_only_what_is_durable() {
    let mut machine = RoundMachine::new(config(), base(), Round(0), SEED, at(0));
    assert_eq!(give(&mut machine, 0, Input::Admitted { node: node("b") }), []);
    assert_eq!(
        machine.poll_timeout(),
        None,
        "below the quorum there is nothing to wake up for"
    );
    let out = give(&mut machine, 0, Input::Admitted { node: node("a") });
    let [Output::Open { announce, cohort }] = &out[..] else {
        panic!("{out:?}")
    };
    assert_eq!(cohort, &[node("a"), node("b")]);
    assert_eq!(
        (announce.round, announce.base_version, announce.deadline_ms),
        (Round(1), ModelVersion(4), 30_000)
    );
    assert_eq!(machine.announcement(at(0)), None);
    assert_eq!(
        give(&mut machine, 1, Input::Opened { round: Round(9) }),
        [],
        "another round's answer"
    );

    let out = give(&mut machine, 2, Input::Opened { round: Round(1) });
    assert_eq!(
        out,
        [Output::Announce {
            to: cohort.clone(),
            announce: announce.clone()
        }]
    );
    assert_eq!(
        machine.poll_timeout(),
        Some(at(32)),
        "the deadline counts from the announcement"
    );
    assert_eq!(machine.status().phase, PhaseName::Collecting);
}

#[test]
fn nonce_is_the_documented_hash_of_seed_and_round() {
    // sha256(bytes([7]*32) + (1).to_bytes(8, 'little'))[:8] as little-endian, by Python's hashlib.
    assert_eq!(nonce_of(Round(1)), NONCE_1);
    assert_ne!(nonce_of(Round(1)), nonce_of(Round(2)));
}

const NONCE_1: u64 = 18_147_640_579_084_043_950;

#[test]
fn node_admitted_during_a_round_is_told_and_waited_for() {
    let mut machine = collecting(&["a", "b"]);
    let out = give(&mut machine, 10, Input::Admitted { node: node("c") });
    let [Output::Announce { to, announce }] = &out[..] else {
        panic!("{out:?}")
    };
    assert_eq!((&to[..], announce.deadline_ms), (&[node("c")][..], 20_000));
    report(&mut machine, "a", 1);
    assert_eq!(
        report(&mut machine, "b", 2),
        [receipt("b", 2)],
        "the round waits for c"
    );
    let out = report(&mut machine, "c", 3);
    assert!(
        matches!(&out[1], Output::Aggregate { members: m, .. } if *m == members(&[("a", 1), ("b", 2), ("c", 3)]))
    );
}

#[test]
fn round_goes_from_updates_to_publication_and_pauses() {
    let mut machine = collecting(&["a", "b"]);
    assert_eq!(report(&mut machine, "b", 2), [receipt("b", 2)]);
    let ordered = members(&[("a", 1), ("b", 2)]);
    let out = report(&mut machine, "a", 1);
    assert_eq!(
        out[1],
        Output::Aggregate {
            round: Round(1),
            base: base(),
            members: ordered.clone()
        }
    );

    let aggregated = Input::Aggregated {
        round: Round(1),
        version: ModelVersion(5),
        digest: digest(5),
    };
    let out = give(&mut machine, 3, aggregated);
    let publish = Output::Publish {
        round: Round(1),
        version: ModelVersion(5),
        digest: digest(5),
        members: ordered,
    };
    assert_eq!(out, [publish]);
    assert_eq!(machine.status().base, base(), "not before it is durable");

    let out = give(&mut machine, 4, Input::Published { round: Round(1) });
    let closed = ClosedV1 {
        round: Round(1),
        outcome: RoundOutcome::Published(ModelVersion(5)),
    };
    assert_eq!(
        out,
        [Output::Closed {
            to: vec![node("a"), node("b")],
            closed
        }]
    );
    assert_eq!(
        machine.status().base,
        BaseModel {
            version: ModelVersion(5),
            digest: digest(5)
        }
    );
    assert_eq!(machine.poll_timeout(), Some(at(9)));

    machine.handle_timeout(at(9));
    let out = outputs(&mut machine);
    assert!(matches!(&out[..], [Output::Open { announce, .. }]
        if announce.round == Round(2) && announce.base_version == ModelVersion(5) && announce.nonce == nonce_of(Round(2))));
}

#[test]
fn deadline_with_the_quorum_aggregates_without_the_silent() {
    let mut machine = collecting(&["a", "b", "c"]);
    report(&mut machine, "a", 1);
    report(&mut machine, "c", 3);
    machine.handle_timeout(at(29));
    assert_eq!(outputs(&mut machine), []);
    machine.handle_timeout(at(30));
    let out = outputs(&mut machine);
    assert!(
        matches!(&out[..], [Output::Aggregate { members: m, .. }] if *m == members(&[("a", 1), ("c", 3)]))
    );
}

#[test]
fn deadline_without_the_quorum_aborts_and_keeps_the_model() {
    let mut machine = collecting(&["a", "b", "c"]);
    report(&mut machine, "a", 1);
    machine.handle_timeout(at(30));
    let reason = AbortReason::QuorumMissed;
    assert_eq!(
        outputs(&mut machine),
        [Output::Abort {
            round: Round(1),
            reason
        }]
    );
    let out = give(&mut machine, 31, Input::Aborted { round: Round(1) });
    assert!(
        matches!(&out[..], [Output::Closed { closed, .. }] if closed.outcome == RoundOutcome::Aborted(reason))
    );
    assert_eq!(
        (machine.status().base, machine.counters().rounds_aborted),
        (base(), 1)
    );
    assert_eq!(
        give(&mut machine, 32, update("a", 1)),
        [receipt("a", 1)],
        "what was stored stays receipted"
    );
}

#[test]
fn update_on_its_way_to_the_disk_at_the_deadline_is_waited_for_and_counts() {
    let mut machine = collecting(&["a", "b", "c"]);
    report(&mut machine, "a", 1);
    give(&mut machine, 29, update("b", 2));
    machine.handle_timeout(at(30));
    assert_eq!((outputs(&mut machine), machine.poll_timeout()), (vec![], None));
    assert_eq!(
        give(&mut machine, 31, update("c", 3)),
        refused("c", RefusalCode::RoundClosed)
    );
    assert_eq!(machine.announcement(at(31)), None);
    let out = give(&mut machine, 32, stored("b"));
    assert_eq!(out[0], receipt("b", 2));
    assert!(matches!(&out[1], Output::Aggregate { members: m, .. } if *m == members(&[("a", 1), ("b", 2)])));
}

#[test]
fn input_at_the_deadline_comes_after_the_deadline() {
    let mut machine = collecting(&["a", "b"]);
    let out = give(&mut machine, 30, update("a", 1));
    assert!(matches!(
        &out[..],
        [
            Output::Abort { .. },
            Output::Refuse {
                code: RefusalCode::RoundClosed,
                ..
            }
        ]
    ));
}

#[test]
fn same_bytes_get_the_same_receipt_and_other_bytes_are_refused() {
    let mut machine = collecting(&["a", "b", "c"]);
    give(&mut machine, 1, update("a", 1));
    assert_eq!(
        give(&mut machine, 1, update("a", 1)),
        [],
        "the receipt follows when it is durable"
    );
    assert_eq!(
        give(&mut machine, 1, update("a", 9)),
        refused("a", RefusalCode::Duplicate)
    );
    assert_eq!(give(&mut machine, 1, stored("a")), [receipt("a", 1)]);
    assert_eq!(give(&mut machine, 2, update("a", 1)), [receipt("a", 1)]);
    assert_eq!(
        give(&mut machine, 2, update("a", 9)),
        refused("a", RefusalCode::Duplicate)
    );
    assert_eq!(
        give(&mut machine, 2, stored("a")),
        [],
        "an answer that nothing asked for"
    );
    assert_eq!(machine.status().stored, 1);
    report(&mut machine, "b", 2);
    report(&mut machine, "c", 3);
    // Aggregating, publishing and after the end: still the same answers.
    let aggregated = Input::Aggregated {
        round: Round(1),
        version: ModelVersion(5),
        digest: digest(5),
    };
    for step in [Input::Stop, aggregated, Input::Published { round: Round(1) }] {
        give(&mut machine, 3, step);
        assert_eq!(give(&mut machine, 3, update("a", 1)), [receipt("a", 1)]);
        assert_eq!(
            give(&mut machine, 3, update("a", 9)),
            refused("a", RefusalCode::Duplicate)
        );
        assert_eq!(
            give(&mut machine, 3, update("d", 9)),
            refused("d", RefusalCode::RoundClosed)
        );
    }
    assert_eq!(machine.status().phase, PhaseName::Closed);
    assert_eq!(machine.counters().ignored[&Ignored::RepeatedWhileStoring], 1);
    assert_eq!(machine.counters().updates_repeated, 4);
}

#[test]
fn replayed_foreign_early_and_late_updates_are_refused_each_by_its_reason() {
    let mut machine = collecting(&["a", "b"]);
    let mut offer = |round: u64, nonce: u64, base_digest: Digest| {
        let input = Input::Update {
            node: node("a"),
            round: Round(round),
            nonce,
            base_digest,
            payload_digest: digest(1),
        };
        let out = give(&mut machine, 1, input);
        let [Output::Refuse { code, .. }] = out[..] else {
            panic!("{out:?}")
        };
        code
    };
    let nonce = nonce_of(Round(1));
    assert_eq!(offer(1, nonce ^ 1, base().digest), RefusalCode::WrongNonce);
    assert_eq!(offer(1, nonce, digest(9)), RefusalCode::WrongBase);
    assert_eq!(
        offer(2, nonce_of(Round(2)), base().digest),
        RefusalCode::RoundUnknown
    );
    assert_eq!(offer(0, nonce, base().digest), RefusalCode::RoundClosed);
    assert_eq!(machine.counters().refused.values().sum::<u64>(), 4);
    assert_eq!(
        machine.poll_timeout(),
        Some(at(30)),
        "nothing of it moves the deadline"
    );
}

#[test]
fn update_before_the_announcement_is_early() {
    let mut machine = RoundMachine::new(config(), base(), Round(0), SEED, at(0));
    assert_eq!(
        give(&mut machine, 0, update("a", 1)),
        refused("a", RefusalCode::RoundUnknown)
    );
    admit(&mut machine, &["a", "b"]);
    outputs(&mut machine);
    assert_eq!(machine.status().phase, PhaseName::Opening);
    assert_eq!(
        give(&mut machine, 0, update("a", 1)),
        refused("a", RefusalCode::RoundUnknown)
    );
}

#[test]
fn declines_shorten_the_wait_but_make_no_quorum() {
    let decline = |name| Input::Declined {
        node: node(name),
        round: Round(1),
        reason: DeclineReason::BudgetSpent,
    };
    let mut machine = collecting(&["a", "b", "c"]);
    report(&mut machine, "a", 1);
    report(&mut machine, "b", 2);
    let out = give(&mut machine, 2, decline("c"));
    assert!(matches!(&out[..], [Output::Aggregate { members: m, .. }] if m.len() == 2));

    let mut machine = collecting(&["a", "b", "c"]);
    report(&mut machine, "a", 1);
    assert_eq!(give(&mut machine, 2, decline("b")), []);
    assert_eq!(give(&mut machine, 2, decline("c")), []);
    assert_eq!(give(&mut machine, 2, decline("c")), []);
    assert_eq!(give(&mut machine, 2, decline("a")), []);
    assert_eq!(machine.status().declined, 2);
    let ignored = &machine.counters().ignored;
    assert_eq!(
        (
            ignored[&Ignored::DeclineRepeated],
            ignored[&Ignored::DeclineAfterUpdate]
        ),
        (1, 1)
    );
    // A node whose disk has room again may report after all.
    let out = report(&mut machine, "b", 2);
    assert!(matches!(&out[1], Output::Aggregate { members: m, .. } if *m == members(&[("a", 1), ("b", 2)])));
}

#[test]
fn node_that_leaves_is_not_waited_for_and_one_that_returns_is() {
    let left = |name| Input::Left { node: node(name) };
    let mut machine = collecting(&["a", "b", "c"]);
    report(&mut machine, "a", 1);
    give(&mut machine, 2, left("c"));
    let out = give(&mut machine, 3, Input::Admitted { node: node("c") });
    assert!(matches!(&out[..], [Output::Announce { to, .. }] if to == &[node("c")]));
    assert_eq!(
        report(&mut machine, "b", 2),
        [receipt("b", 2)],
        "c is back and waited for"
    );
    assert!(matches!(
        &give(&mut machine, 4, left("c"))[..],
        [Output::Aggregate { .. }]
    ));

    // One whose update is stored is not told of the round again.
    let mut machine = collecting(&["a", "b", "c"]);
    report(&mut machine, "a", 1);
    give(&mut machine, 2, left("a"));
    assert_eq!(give(&mut machine, 3, Input::Admitted { node: node("a") }), []);
}

#[test]
fn an_outage_that_drops_everybody_waits_for_their_return() {
    let mut machine = collecting(&["a", "b", "c"]);
    report(&mut machine, "a", 1);
    report(&mut machine, "b", 2);
    for name in ["a", "b", "c"] {
        assert_eq!(give(&mut machine, 2, Input::Left { node: node(name) }), []);
    }
    machine.handle_timeout(at(3));
    assert_eq!(
        (outputs(&mut machine), machine.poll_timeout()),
        (vec![], Some(at(30)))
    );
    give(&mut machine, 4, Input::Admitted { node: node("c") });
    assert_eq!(report(&mut machine, "c", 3).len(), 2, "receipt and aggregation");
}

#[test]
fn store_failure_is_told_as_full_disk_and_the_same_bytes_may_come_again() {
    let mut machine = collecting(&["a", "b"]);
    give(&mut machine, 1, update("a", 1));
    let failed = Input::StoreFailed {
        node: node("a"),
        round: Round(1),
    };
    assert_eq!(
        give(&mut machine, 1, failed.clone()),
        refused("a", RefusalCode::StorageFull)
    );
    assert_eq!(give(&mut machine, 1, failed), []);
    assert_eq!(machine.status().stored, 0);
    assert_eq!(report(&mut machine, "a", 1), [receipt("a", 1)]);
}

#[test]
fn failed_aggregation_ends_the_round_without_a_model() {
    for answer in [
        Input::AggregationFailed { round: Round(1) },
        // A version that does not follow the base by one is no result.
        Input::Aggregated {
            round: Round(1),
            version: ModelVersion(6),
            digest: digest(6),
        },
    ] {
        let mut machine = collecting(&["a", "b"]);
        report(&mut machine, "a", 1);
        report(&mut machine, "b", 2);
        let reason = AbortReason::AggregationFailed;
        assert_eq!(
            give(&mut machine, 2, answer),
            [Output::Abort {
                round: Round(1),
                reason
            }]
        );
        give(&mut machine, 3, Input::Aborted { round: Round(1) });
        assert_eq!(
            (machine.status().phase, machine.status().base),
            (PhaseName::Idle, base())
        );
    }
}

fn refusal_of(name: &str) -> Input {
    Input::Refused {
        node: node(name),
        round: Round(1),
        faulty: true,
    }
}

#[test]
fn refused_node_that_may_be_honest_counts_as_a_silent_one() {
    let mut machine = RoundMachine::new(withstands_one(), base(), Round(0), SEED, at(0));
    for name in ["a", "b", "c"] {
        machine.handle(at(0), Input::Admitted { node: node(name) });
    }
    machine.handle(at(0), Input::Opened { round: Round(1) });
    outputs(&mut machine);
    let refusal = |faulty| Input::Refused {
        node: node("c"),
        round: Round(1),
        faulty,
    };
    give(&mut machine, 1, refusal(false));
    report(&mut machine, "a", 1);
    assert_eq!(
        report(&mut machine, "b", 2),
        [receipt("b", 2)],
        "two of three, f = 1"
    );
    // What no honest node sends makes it one of the f.
    let out = give(&mut machine, 2, refusal(true));
    assert!(matches!(&out[..], [Output::Aggregate { .. }]), "{out:?}");
}

#[test]
fn refused_node_is_not_waited_for_not_even_when_it_comes_back() {
    let mut machine = collecting(&["a", "b", "liar"]);
    assert_eq!(give(&mut machine, 1, refusal_of("liar")), []);
    machine.handle(at(1), Input::Left { node: node("liar") });
    let out = give(&mut machine, 1, Input::Admitted { node: node("liar") });
    assert!(matches!(&out[..], [Output::Announce { .. }]), "{out:?}");
    report(&mut machine, "a", 1);
    let out = report(&mut machine, "b", 2);
    assert!(matches!(&out[1], Output::Aggregate { members: m, .. } if *m == members(&[("a", 1), ("b", 2)])));
}

#[test]
fn refused_node_may_still_report() {
    let mut machine = collecting(&["a", "b", "c"]);
    give(&mut machine, 1, refusal_of("c"));
    assert_eq!(report(&mut machine, "c", 3), [receipt("c", 3)]);
    // What is there stays there.
    give(&mut machine, 1, refusal_of("c"));
    report(&mut machine, "a", 1);
    let out = report(&mut machine, "b", 2);
    assert!(matches!(&out[1], Output::Aggregate { members: m, .. } if m.len() == 3));
}

/// Quorum 3, one faulty node withstood.
fn withstands_one() -> RoundConfig {
    RoundConfig {
        quorum: 3,
        byzantine: 1,
        ..config()
    }
}

#[test]
fn as_many_refused_nodes_as_the_rule_withstands_count_towards_the_quorum() {
    let mut machine = RoundMachine::new(withstands_one(), base(), Round(0), SEED, at(0));
    admit(&mut machine, &["a", "b", "liar"]);
    machine.handle(at(0), Input::Opened { round: Round(1) });
    outputs(&mut machine);
    report(&mut machine, "a", 1);
    assert_eq!(give(&mut machine, 1, refusal_of("liar")), []);
    let out = report(&mut machine, "b", 2);
    assert!(
        matches!(&out[1], Output::Aggregate { members: m, .. } if m.len() == 2),
        "{out:?}"
    );
}

#[test]
fn more_refused_nodes_than_the_rule_withstands_do_not_replace_updates() {
    let mut machine = RoundMachine::new(withstands_one(), base(), Round(0), SEED, at(0));
    admit(&mut machine, &["a", "b", "c"]);
    machine.handle(at(0), Input::Opened { round: Round(1) });
    outputs(&mut machine);
    give(&mut machine, 1, refusal_of("b"));
    give(&mut machine, 1, refusal_of("c"));
    report(&mut machine, "a", 1);
    machine.handle_timeout(at(30));
    let out = outputs(&mut machine);
    assert!(matches!(&out[..], [Output::Abort { .. }]), "{out:?}");
}

#[test]
fn resumed_round_remembers_whom_it_refused() {
    let open_round = OpenRound {
        refused: BTreeSet::from([node("liar")]),
        faulty: BTreeSet::from([node("liar")]),
        ..open(&["a", "b", "liar"], &[("a", 1), ("b", 2)], 20)
    };
    let mut machine = RoundMachine::resume(withstands_one(), open_round, SEED, at(100));
    assert!(matches!(&outputs(&mut machine)[..], [Output::Aggregate { .. }]));
}

fn open(cohort: &[&str], stored: &[(&str, u8)], remaining: u64) -> OpenRound {
    OpenRound {
        round: Round(1),
        nonce: nonce_of(Round(1)),
        base: base(),
        cohort: cohort.iter().map(|name| node(name)).collect(),
        stored: members(stored).into_iter().collect(),
        declined: BTreeSet::new(),
        refused: BTreeSet::new(),
        faulty: BTreeSet::new(),
        remaining: Duration::from_secs(remaining),
    }
}

#[test]
fn resumed_round_has_the_same_number_nonce_and_updates() {
    // Another seed than the first run's: the nonce comes from the store.
    let open_round = open(&["a", "b", "c"], &[("a", 1)], 20);
    let mut machine = RoundMachine::resume(config(), open_round, [9; 32], at(100));
    assert_eq!(
        (outputs(&mut machine), machine.poll_timeout()),
        (vec![], Some(at(120)))
    );
    assert_eq!(
        give(&mut machine, 100, Input::Admitted { node: node("a") }),
        [],
        "it has reported"
    );
    assert_eq!(
        give(&mut machine, 100, update("a", 1)),
        [receipt("a", 1)],
        "it missed its receipt"
    );
    let out = give(&mut machine, 105, Input::Admitted { node: node("b") });
    let [Output::Announce { announce, .. }] = &out[..] else {
        panic!("{out:?}")
    };
    assert_eq!(
        (announce.round, announce.nonce, announce.deadline_ms),
        (Round(1), nonce_of(Round(1)), 15_000)
    );
    give(&mut machine, 105, update("b", 2));
    assert_eq!(
        give(&mut machine, 105, stored("b")),
        [receipt("b", 2)],
        "c of the cohort is waited for"
    );
    machine.handle_timeout(at(120));
    assert!(matches!(&outputs(&mut machine)[..], [Output::Aggregate { members: m, .. }] if m.len() == 2));
}

#[test]
fn resumed_round_whose_cohort_has_reported_is_aggregated_at_once() {
    let open_round = open(&["a", "b"], &[("a", 1), ("b", 2)], 20);
    let mut machine = RoundMachine::resume(config(), open_round, SEED, at(100));
    assert!(matches!(
        &outputs(&mut machine)[..],
        [Output::Aggregate { round: Round(1), .. }]
    ));
    // Its time is over: with the quorum it is aggregated, without it ends.
    let mut machine = RoundMachine::resume(
        config(),
        open(&["a", "b", "c"], &[("a", 1), ("b", 2)], 0),
        SEED,
        at(100),
    );
    assert!(matches!(&outputs(&mut machine)[..], [Output::Aggregate { .. }]));
    let mut machine = RoundMachine::resume(config(), open(&["a", "b"], &[("a", 1)], 0), SEED, at(100));
    assert!(matches!(&outputs(&mut machine)[..], [Output::Abort { .. }]));
}

#[test]
fn resumed_round_of_an_unknown_cohort_ends_at_its_deadline_only() {
    let mut machine = RoundMachine::resume(config(), open(&[], &[("a", 1), ("b", 2)], 20), SEED, at(100));
    assert_eq!(give(&mut machine, 101, Input::Admitted { node: node("a") }), []);
    machine.handle_timeout(at(120));
    assert!(matches!(&outputs(&mut machine)[..], [Output::Aggregate { .. }]));
}

#[test]
fn stop_lets_the_open_round_end_and_opens_no_other() {
    let mut machine = collecting(&["a", "b"]);
    give(&mut machine, 1, Input::Stop);
    report(&mut machine, "a", 1);
    report(&mut machine, "b", 2);
    give(
        &mut machine,
        2,
        Input::Aggregated {
            round: Round(1),
            version: ModelVersion(5),
            digest: digest(5),
        },
    );
    give(&mut machine, 2, Input::Published { round: Round(1) });
    assert_eq!(
        (machine.status().phase, machine.poll_timeout()),
        (PhaseName::Closed, None)
    );
    machine.handle_timeout(at(1000));
    assert_eq!(outputs(&mut machine), []);
}

#[test]
fn last_round_is_the_configured_one() {
    let config = RoundConfig {
        rounds_max: Some(1),
        ..config()
    };
    let machine = RoundMachine::new(config.clone(), base(), Round(1), SEED, at(0));
    assert_eq!(machine.status().phase, PhaseName::Closed);
    let machine = RoundMachine::new(config, base(), Round(0), SEED, at(0));
    assert_eq!(machine.status().phase, PhaseName::Idle);
}

#[test]
fn every_input_is_taken_in_every_phase() {
    let inputs = || {
        let (node, round) = (node("z"), Round(1));
        let foreign = Round(77);
        [
            Input::Admitted { node: node.clone() },
            update("z", 1),
            Input::Declined {
                node: node.clone(),
                round: foreign,
                reason: DeclineReason::ReceiveOnly,
            },
            Input::Refused {
                node: node.clone(),
                round: foreign,
                faulty: true,
            },
            Input::Stored {
                node: node.clone(),
                round: foreign,
            },
            Input::StoreFailed {
                node: node.clone(),
                round: foreign,
            },
            Input::Opened { round: foreign },
            Input::Aggregated {
                round: foreign,
                version: ModelVersion(5),
                digest: digest(5),
            },
            Input::AggregationFailed { round: foreign },
            Input::Published { round: foreign },
            Input::Aborted { round: foreign },
            Input::Left { node: node.clone() },
            Input::Left { node },
            Input::Declined {
                node: self::node("y"),
                round,
                reason: DeclineReason::ReceiveOnly,
            },
        ]
    };
    // Idle, opening, collecting, aggregating, publishing, aborting, closed.
    let machine = || RoundMachine::new(config(), base(), Round(0), SEED, at(0));
    let opening = || {
        let mut machine = machine();
        admit(&mut machine, &["a", "b"]);
        machine
    };
    let collecting = || collecting(&["a", "b"]);
    let aggregating = || {
        let mut machine = collecting();
        report(&mut machine, "a", 1);
        report(&mut machine, "b", 2);
        machine
    };
    let publishing = || {
        let mut machine = aggregating();
        machine.handle(
            at(1),
            Input::Aggregated {
                round: Round(1),
                version: ModelVersion(5),
                digest: digest(5),
            },
        );
        machine
    };
    let aborting = || {
        let mut machine = collecting();
        machine.handle_timeout(at(30));
        machine
    };
    let closed = || {
        let mut machine = machine();
        machine.handle(at(0), Input::Stop);
        machine
    };
    for (mut machine, name) in [
        (machine(), PhaseName::Idle),
        (opening(), PhaseName::Opening),
        (collecting(), PhaseName::Collecting),
        (aggregating(), PhaseName::Aggregating),
        (publishing(), PhaseName::Publishing),
        (aborting(), PhaseName::Aborting),
        (closed(), PhaseName::Closed),
    ] {
        let counted = |machine: &RoundMachine| {
            let counters = machine.counters();
            counters.ignored.values().sum::<u64>()
                + counters.refused.values().sum::<u64>()
                + counters.updates_taken
                + counters.declines
        };
        assert_eq!(machine.status().phase, name);
        let before = counted(&machine);
        for input in inputs() {
            machine.handle(at(1), input);
        }
        assert_eq!(
            counted(&machine) - before,
            12,
            "{name:?}: all but coming and leaving are counted"
        );
        assert_eq!(machine.status().phase, name, "none of it moves {name:?}");
    }
}

fn takes_late() -> RoundMachine {
    let config = RoundConfig {
        late_updates: true,
        ..config()
    };
    let mut machine = RoundMachine::new(config, base(), Round(0), SEED, at(0));
    for name in ["a", "b", "c", "d"] {
        machine.handle(at(0), Input::Admitted { node: node(name) });
    }
    machine.handle(at(0), Input::Opened { round: Round(1) });
    outputs(&mut machine);
    for (name, fill) in [("a", 1), ("b", 2)] {
        give(&mut machine, 1, update(name, fill));
        give(&mut machine, 1, stored(name));
    }
    machine.handle_timeout(at(30));
    assert!(matches!(outputs(&mut machine)[..], [Output::Aggregate { .. }]));
    machine
}

fn late(name: &str, fill: u8) -> Output {
    Output::StoreLate {
        node: node(name),
        round: Round(1),
        payload_digest: digest(fill),
    }
}

/// The machine collects its second round.
fn next_round(machine: &mut RoundMachine) {
    let aggregated = Input::Aggregated {
        round: Round(1),
        version: ModelVersion(5),
        digest: digest(5),
    };
    give(machine, 31, aggregated);
    give(machine, 31, Input::Published { round: Round(1) });
    machine.handle_timeout(at(36));
    assert!(matches!(outputs(machine)[..], [Output::Open { .. }]));
    give(machine, 36, Input::Opened { round: Round(2) });
    assert_eq!(machine.status().phase, PhaseName::Collecting);
}

#[test]
fn late_update_is_stored_once_apart_from_its_round_until_the_next_one_stops_collecting() {
    let mut machine = takes_late();
    assert_eq!(give(&mut machine, 31, update("c", 3)), [late("c", 3)]);
    assert_eq!(give(&mut machine, 31, update("c", 3)), [], "it is on its way");
    assert_eq!(
        give(&mut machine, 31, update("c", 9)),
        refused("c", RefusalCode::Duplicate)
    );
    assert_eq!(give(&mut machine, 31, stored("c")), [receipt("c", 3)]);
    assert_eq!(machine.status().stored, 2, "the round is what it was");
    assert_eq!(give(&mut machine, 31, update("a", 1)), [receipt("a", 1)]);
    assert_eq!(
        give(&mut machine, 31, update("a", 9)),
        refused("a", RefusalCode::Duplicate)
    );
    next_round(&mut machine);
    assert_eq!(give(&mut machine, 37, update("c", 3)), [receipt("c", 3)]);
    assert_eq!(
        give(&mut machine, 37, update("c", 9)),
        refused("c", RefusalCode::Duplicate)
    );
    assert_eq!(give(&mut machine, 37, update("d", 4)), [late("d", 4)]);
    let status = machine.status();
    assert_eq!(
        (status.round, status.stored),
        (Round(2), 0),
        "nobody has reported in it"
    );
    let failed = Input::StoreFailed {
        node: node("d"),
        round: Round(1),
    };
    assert_eq!(
        give(&mut machine, 37, failed),
        refused("d", RefusalCode::StorageFull)
    );
    machine.handle_timeout(at(66));
    assert!(
        matches!(outputs(&mut machine)[..], [Output::Abort { .. }]),
        "late updates make no quorum"
    );
    assert_eq!(
        give(&mut machine, 67, update("d", 4)),
        refused("d", RefusalCode::RoundClosed)
    );
    assert_eq!(machine.counters().updates_late, 2);
}

#[test]
fn late_update_with_another_nonce_or_base_is_refused_by_its_reason() {
    let mut machine = takes_late();
    next_round(&mut machine);
    let offer = |nonce, base_digest| Input::Update {
        node: node("c"),
        round: Round(1),
        nonce,
        base_digest,
        payload_digest: digest(3),
    };
    let nonce = nonce_of(Round(1));
    assert_eq!(
        give(&mut machine, 37, offer(nonce ^ 1, base().digest)),
        refused("c", RefusalCode::WrongNonce)
    );
    // The base of the second round is no base of the first.
    assert_eq!(
        give(&mut machine, 37, offer(nonce, digest(5))),
        refused("c", RefusalCode::WrongBase)
    );
    assert_eq!(
        give(&mut machine, 37, offer(nonce, base().digest)),
        [late("c", 3)]
    );
}

#[test]
fn late_update_that_becomes_durable_after_the_next_round_still_gets_its_receipt() {
    let mut machine = takes_late();
    assert_eq!(give(&mut machine, 31, update("c", 3)), [late("c", 3)]);
    next_round(&mut machine);
    machine.handle_timeout(at(66));
    assert!(matches!(outputs(&mut machine)[..], [Output::Abort { .. }]));
    assert_eq!(give(&mut machine, 67, stored("c")), [receipt("c", 3)]);
}

#[test]
fn of_too_many_nodes_each_round_asks_as_many_as_its_rule_can_combine_and_in_time_all() {
    let names: Vec<String> = (0..12).map(|at| format!("n{at}")).collect();
    let config = RoundConfig {
        updates_max: 5,
        pause: Duration::ZERO,
        ..config()
    };
    let mut now = Moment::default();
    let mut machine = RoundMachine::new(config, base(), Round(0), SEED, now);
    let mut asked = BTreeSet::new();
    let node = |name: &String| NodeId::new(name.clone()).unwrap();
    for name in &names[..2] {
        machine.handle(now, Input::Admitted { node: node(name) });
    }
    let mut outputs: Vec<Output> = std::iter::from_fn(|| machine.poll_output()).collect();
    // Ends the first round, of the two that were there first.
    for _ in 0..40 {
        let mut round = Round(0);
        let mut told: Vec<NodeId> = Vec::new();
        for output in std::mem::take(&mut outputs) {
            match output {
                Output::Open { announce, .. } => {
                    round = announce.round;
                    machine.handle(now, Input::Opened { round });
                }
                Output::Announce { to, .. } => told.extend(to),
                Output::Abort { round, .. } => machine.handle(now, Input::Aborted { round }),
                _ => {}
            }
        }
        for name in &names {
            machine.handle(now, Input::Admitted { node: node(name) });
        }
        while let Some(output) = machine.poll_output() {
            match output {
                Output::Announce { to, .. } => told.extend(to),
                other => outputs.push(other),
            }
        }
        let places: BTreeSet<NodeId> = told.iter().cloned().collect();
        assert!(places.len() <= 5, "{places:?}");
        if round != Round(0) && places.len() == 5 {
            asked.extend(places.iter().cloned());
            let stranger = names
                .iter()
                .map(node)
                .find(|node| !places.contains(node))
                .unwrap();
            let status = machine.status();
            let announce = machine.announcement(now).unwrap();
            machine.handle(
                now,
                Input::Update {
                    node: stranger.clone(),
                    round: status.round,
                    nonce: announce.nonce,
                    base_digest: announce.base_digest,
                    payload_digest: digest(9),
                },
            );
            let refused = machine.poll_output().unwrap();
            assert!(
                matches!(&refused, Output::Refuse { node, code: RefusalCode::Busy, .. } if *node == stranger),
                "{refused:?}"
            );
        }
        if let Some(due) = machine.poll_timeout() {
            now = now.max(due);
            machine.handle_timeout(now);
        }
        outputs.extend(std::iter::from_fn(|| machine.poll_output()));
    }
    assert_eq!(
        asked.len(),
        names.len(),
        "who was never asked in forty rounds? {asked:?}"
    );
}

#[test]
fn while_rounds_are_held_none_opens_and_then_it_does_at_once() {
    let mut machine = RoundMachine::new(config(), base(), Round(0), SEED, at(0));
    assert!(machine.hold(at(0), true) && !machine.hold(at(0), true));
    admit(&mut machine, &["a", "b"]);
    machine.handle_timeout(at(600));
    assert_eq!(
        (outputs(&mut machine), machine.poll_timeout()),
        (Vec::new(), None)
    );
    assert!(machine.hold(at(601), false));
    assert!(matches!(outputs(&mut machine)[..], [Output::Open { .. }]));
    // One that is open goes on.
    machine.hold(at(602), true);
    let opened = give(&mut machine, 602, Input::Opened { round: Round(1) });
    assert!(matches!(opened[..], [Output::Announce { .. }]), "{opened:?}");
}

#[test]
fn who_is_told_has_a_place_on_disk_whoever_comes_and_goes_while_the_round_opens() {
    let config = RoundConfig {
        updates_max: 2,
        ..config()
    };
    let mut machine = RoundMachine::new(config, base(), Round(0), SEED, at(0));
    admit(&mut machine, &["a", "b"]);
    let opened = outputs(&mut machine);
    let [Output::Open { cohort, .. }] = &opened[..] else {
        panic!("{opened:?}")
    };
    assert_eq!(*cohort, [node("a"), node("b")]);
    machine.handle(at(0), Input::Left { node: node("a") });
    admit(&mut machine, &["c", "d", "e"]);
    let told = give(&mut machine, 0, Input::Opened { round: Round(1) });
    let [Output::Announce { to, .. }] = &told[..] else {
        panic!("{told:?}")
    };
    assert_eq!(*to, [node("b")], "a keeps its place, so there is none for others");
    let back = give(&mut machine, 1, Input::Admitted { node: node("a") });
    assert!(matches!(back[..], [Output::Announce { .. }]), "{back:?}");
}
