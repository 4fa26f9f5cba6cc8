use theriac_model::feature::FeatureSchema;
use theriac_model::sample::Sample;
use theriac_privacy::noise::ExactGaussian;
use theriac_privacy::policy::Policy;
use theriac_protocol::units::{L2Norm, ModelVersion, NodeId, Round};

use super::*;

const STEP: Duration = Duration::from_secs(1);

fn lane(rows: u32) -> Arc<LaneShared> {
    let lane = LaneShared::new("kv", FeatureSchema::host_service_v1(), 10_000);
    for row in 0..rows {
        let values = (0..16)
            .map(|c| 0.1 * c as f32 + 0.01 * (row % 7) as f32)
            .collect();
        lane.history().push(
            Sample {
                at_ms: 1_000_000_020_000 + u64::from(row) * 1000,
                values,
            },
            row % 50 != 0,
        );
    }
    Arc::new(lane)
}

fn ledger(dir: &std::path::Path, epsilon: f64) -> Ledger {
    let policy =
        format!("site = 'site-a'\nepsilon = {epsilon:?}\nblock = '1m'\nnoise_multiplier_min = 0.7\n");
    let node: NodeId = "site-a".parse().unwrap();
    Ledger::open(
        &dir.join("ledger.log"),
        &node,
        Policy::parse(&policy).unwrap(),
        Timestamp(1),
    )
    .unwrap()
}

fn releaser(dir: &std::path::Path, rows: u32, epsilon: f64, tamper: Option<Tamper>) -> Releaser {
    Releaser::new(
        ledger(dir, epsilon),
        lane(rows),
        STEP,
        2,
        Box::new(ExactGaussian),
        tamper,
    )
}

fn announce(round: u64) -> AnnounceV1 {
    AnnounceV1 {
        round: Round(round),
        nonce: round * 7,
        kind: UpdateKind::Moments,
        values: 352,
        layout_digest: Digest(moments_layout(16).digest()),
        base_version: ModelVersion(0),
        base_digest: Digest([1; 32]),
        clip_norm: L2Norm::new(588.0).unwrap(),
        noise_multiplier: NoiseMultiplier::new(1.27).unwrap(),
        block_rows: 60,
        blocks_min: 2,
        blocks_max: 3,
        deadline_ms: 10_000,
    }
}

fn base() -> GlobalModel {
    GlobalModel::initial(16, 1)
}

fn fresh(release: Release) -> (OutboxRow, ReservationId) {
    match release {
        Release::Fresh { row, id } => (row, id),
        Release::Stored => panic!("charged before"),
    }
}

#[test]
fn a_release_is_charged_bounded_and_readable() {
    let dir = tempfile::tempdir().unwrap();
    let mut releaser = releaser(dir.path(), 400, 4.0, None);
    let (row, id) = fresh(releaser.release(&announce(1), &base()).unwrap());
    releaser.mark_released(id, row.payload_digest).unwrap();
    let ToAggregator::Update(header, payload) = message_of(&row).unwrap() else {
        panic!("no update")
    };
    assert_eq!((header.round, header.values, payload.len()), (Round(1), 352, 352));
    assert_eq!(Digest::of(&payload), header.payload_digest);
    assert_eq!(
        header.blocks_bound, 3,
        "the public bound, not the number of blocks"
    );
    let charged: Vec<u64> = releaser.ledger().charged_blocks().into_iter().flatten().collect();
    assert_eq!(charged.len(), 3, "the newest three of the complete blocks");
    assert!(releaser.ledger().spent().epsilon > 0.0);
    assert_eq!(
        encode_body(&message_of(&row).unwrap()).unwrap(),
        row.body,
        "a retry sends the same bytes"
    );
}

#[test]
fn blocks_are_charged_once_until_none_is_left() {
    let dir = tempfile::tempdir().unwrap();
    // Blocks begin at a whole minute: 400 rows from second 20 on hold six complete ones.
    let mut releaser = releaser(dir.path(), 400, 4.0, None);
    let _first = fresh(releaser.release(&announce(1), &base()).unwrap());
    let spent = releaser.ledger().spent().epsilon;
    let _second = fresh(releaser.release(&announce(2), &base()).unwrap());
    assert!(
        (releaser.ledger().spent().epsilon - spent).abs() < 1e-12,
        "disjoint blocks compose in parallel"
    );
    let error = releaser.release(&announce(3), &base()).unwrap_err();
    assert!(
        matches!(error, Unreleased::TooFewBlocks { needed: 2, found: 0 }),
        "{error}"
    );
    assert_eq!(error.decline_reason(), DeclineReason::TooFewBlocks);
}

#[test]
fn the_same_round_is_never_noised_twice() {
    let dir = tempfile::tempdir().unwrap();
    let mut releaser = releaser(dir.path(), 800, 4.0, None);
    let (row, _) = fresh(releaser.release(&announce(1), &base()).unwrap());
    let again = AnnounceV1 {
        blocks_min: 1,
        ..announce(1)
    };
    assert!(matches!(
        releaser.release(&again, &base()).unwrap(),
        Release::Stored
    ));
    drop(releaser);
    let mut reopened = Releaser::new(
        ledger(dir.path(), 4.0),
        lane(800),
        STEP,
        2,
        Box::new(ExactGaussian),
        None,
    );
    assert!(matches!(
        reopened.release(&again, &base()).unwrap(),
        Release::Stored
    ));
    reopened.confirm(&row).unwrap();
    let foreign = OutboxRow {
        payload_digest: Digest([9; 32]),
        ..row.clone()
    };
    assert!(
        reopened.confirm(&foreign).is_err(),
        "other bytes for the same charge were confirmed"
    );
    let uncharged = OutboxRow {
        round: Round(77),
        ..row
    };
    assert!(
        reopened.confirm(&uncharged).is_err(),
        "bytes without a charge were confirmed"
    );
}

fn sample(at_ms: u64, value: f32) -> Sample {
    Sample {
        at_ms,
        values: vec![value; 16],
    }
}

/// Block edges are fixed in UTC, and rows whose lags would reach over one are not used.
#[test]
fn a_block_is_computed_from_its_own_rows_alone() {
    let dir = tempfile::tempdir().unwrap();
    let releaser = releaser(dir.path(), 180, 4.0, None);
    let first = 1_000_000_020_000 / 60_000;
    let before = releaser.moments(&[first + 1], 60);
    let other = LaneShared::new("kv", FeatureSchema::host_service_v1(), 10_000);
    for row in 0_u64..180 {
        let at_ms = 1_000_000_020_000 + row * 1000;
        let same = (0..16)
            .map(|c| 0.1 * c as f32 + 0.01 * (row % 7) as f32)
            .collect();
        let values = if row / 60 == 1 { same } else { vec![9.0; 16] };
        other.history().push(Sample { at_ms, values }, true);
    }
    let changed = Releaser {
        lane: Arc::new(other),
        ..releaser
    };
    assert_eq!(
        changed.moments(&[first + 1], 60),
        before,
        "another block's rows were used"
    );
    assert_ne!(changed.moments(&[first], 60), before);
}

#[test]
fn a_clock_set_back_over_a_block_edge_releases_nothing_twice() {
    let dir = tempfile::tempdir().unwrap();
    let mut releaser = releaser(dir.path(), 400, 4.0, None);
    let all = AnnounceV1 {
        blocks_max: 60,
        ..announce(1)
    };
    let _charged = fresh(releaser.release(&all, &base()).unwrap());
    let before = releaser.ledger().spent();
    // Three minutes back: the same blocks are measured again, and end again.
    for row in 0..240 {
        let back = 1_000_000_020_000 + 200_000 + row * 1000;
        releaser.lane.history().push(sample(back, 0.5), true);
    }
    let again = AnnounceV1 {
        blocks_min: 1,
        ..announce(2)
    };
    let released = releaser.release(&again, &base());
    let charged: Vec<u64> = releaser.ledger().charged_blocks().into_iter().flatten().collect();
    let mut once = charged.clone();
    once.dedup();
    assert_eq!(charged, once);
    let after = releaser.ledger().spent();
    assert!(
        (after.epsilon - before.epsilon).abs() < 1e-12,
        "a block was charged twice"
    );
    if let Err(error) = released {
        assert_eq!(error.decline_reason(), DeclineReason::TooFewBlocks, "{error}");
    }
}

#[test]
fn a_spent_budget_refuses_and_reads_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut releaser = releaser(dir.path(), 400, 0.5, None);
    let error = releaser.release(&announce(1), &base()).unwrap_err();
    assert_eq!(error.decline_reason(), DeclineReason::BudgetSpent, "{error}");
    assert_eq!(releaser.ledger().spent().releases, 0);
}

#[test]
fn foreign_block_lengths_and_layouts_are_declined_before_any_charge() {
    let dir = tempfile::tempdir().unwrap();
    let mut releaser = releaser(dir.path(), 400, 4.0, None);
    let longer = AnnounceV1 {
        block_rows: 120,
        blocks_min: 1,
        ..announce(1)
    };
    assert_eq!(
        releaser.release(&longer, &base()).unwrap_err().decline_reason(),
        DeclineReason::TermsTooWeak
    );
    let wider = AnnounceV1 {
        values: 760,
        ..announce(1)
    };
    assert_eq!(
        releaser.release(&wider, &base()).unwrap_err().decline_reason(),
        DeclineReason::UnknownLayout
    );
    assert_eq!(releaser.ledger().spent().releases, 0);
}

#[test]
fn a_hostile_edge_changes_noised_values_only() {
    let dir = tempfile::tempdir().unwrap();
    let tamper: Tamper = Arc::new(|_, values| values.into_iter().map(|value| value * 0.0 + 5.0).collect());
    let mut releaser = releaser(dir.path(), 400, 4.0, Some(tamper));
    let (row, _) = fresh(releaser.release(&announce(1), &base()).unwrap());
    let ToAggregator::Update(header, payload) = message_of(&row).unwrap() else {
        panic!("no update")
    };
    assert!(
        payload.iter().all(|byte| *byte == payload[0]),
        "all values are the same"
    );
    assert!(
        header.privacy.epsilon_spent.value() > 0.0,
        "the charge was made all the same"
    );
}

/// A ledger whose policy lets rounds of gradients read the same blocks again.
fn gradient_releaser(dir: &std::path::Path, releases_max: u32) -> Releaser {
    let policy = format!(
        "site = 'site-a'\nepsilon = 4.0\nblock = '1m'\nmechanisms = ['gradient']\nblock_releases_max = {releases_max}\n"
    );
    let (path, node) = (dir.join("ledger.log"), "site-a".parse().unwrap());
    let ledger = Ledger::open(&path, &node, Policy::parse(&policy).unwrap(), Timestamp(1)).unwrap();
    Releaser::new(ledger, lane(400), STEP, 2, Box::new(ExactGaussian), None)
}

fn gradients(round: u64) -> AnnounceV1 {
    AnnounceV1 {
        kind: UpdateKind::Gradient,
        values: 81 * 16,
        layout_digest: Digest(gradient_layout(16).digest()),
        clip_norm: L2Norm::new(200.0).unwrap(),
        noise_multiplier: NoiseMultiplier::new(5.69).unwrap(),
        ..announce(round)
    }
}

#[test]
fn twenty_rounds_of_gradients_read_the_same_blocks_and_the_next_is_declined() {
    let dir = tempfile::tempdir().unwrap();
    let mut releaser = gradient_releaser(dir.path(), 100);
    let mut base = base();
    for round in 1..=20 {
        let (row, id) = fresh(releaser.release(&gradients(round), &base).unwrap());
        releaser.mark_released(id, row.payload_digest).unwrap();
        let ToAggregator::Update(header, payload) = message_of(&row).unwrap() else {
            panic!("no update")
        };
        assert_eq!((header.kind, payload.len()), (UpdateKind::Gradient, 81 * 16));
        let next = base.descent().step(&vec![0.5; 81 * 16], 3, 60, 5.69).unwrap();
        base = base.with_descent(&next).unwrap();
    }
    let charged: Vec<u64> = releaser.ledger().charged_blocks().into_iter().flatten().collect();
    assert_eq!(charged.len(), 3, "the newest three, again and again");
    let spent = releaser.ledger().spent();
    assert!((3.9..=4.0).contains(&spent.epsilon), "{}", spent.epsilon);
    // Three older blocks are left that nobody has read: they go on.
    let _older = fresh(releaser.release(&gradients(21), &base).unwrap());
    let all = AnnounceV1 {
        blocks_min: 6,
        blocks_max: 6,
        ..gradients(22)
    };
    let error = releaser.release(&all, &base).unwrap_err();
    assert_eq!(error.decline_reason(), DeclineReason::BudgetSpent, "{error}");
    assert_eq!(releaser.ledger().spent().releases, 21);
}

#[test]
fn a_round_of_gradients_whose_bytes_were_lost_in_a_crash_is_never_noised_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut releaser = gradient_releaser(dir.path(), 100);
    // Charged and made, and the process died before the bytes were kept.
    let (row, _) = fresh(releaser.release(&gradients(1), &base()).unwrap());
    drop(releaser);
    let mut reopened = gradient_releaser(dir.path(), 100);
    let again = reopened.release(&gradients(1), &base()).unwrap();
    assert!(matches!(again, Release::Stored), "no second noise for one charge");
    assert_eq!(reopened.ledger().spent().releases, 1);
    // The bytes were kept after all: they, and no others, may be sent.
    reopened.confirm(&row).unwrap();
    let other = OutboxRow {
        payload_digest: Digest([3; 32]),
        ..row
    };
    assert!(reopened.confirm(&other).is_err());
    // The next round is charged on top.
    let _next = fresh(reopened.release(&gradients(2), &base()).unwrap());
    assert_eq!(reopened.ledger().spent().releases, 2);
}

#[test]
fn a_policy_that_does_not_name_gradients_declines_them_and_one_that_is_used_up_too() {
    let dir = tempfile::tempdir().unwrap();
    let mut plain = releaser(dir.path(), 400, 4.0, None);
    let error = plain.release(&gradients(1), &base()).unwrap_err();
    assert_eq!(error.decline_reason(), DeclineReason::UnknownLayout, "{error}");
    assert_eq!(plain.ledger().spent().releases, 0);
    let dir = tempfile::tempdir().unwrap();
    let mut once = gradient_releaser(dir.path(), 1);
    let _first = fresh(once.release(&gradients(1), &base()).unwrap());
    let _others = fresh(once.release(&gradients(2), &base()).unwrap());
    let error = once.release(&gradients(3), &base()).unwrap_err();
    assert_eq!(error.decline_reason(), DeclineReason::TooFewBlocks, "{error}");
    assert_eq!(error.word(), "block_already_charged");
}

/// What is released is what the model crate works out, block by block, from those blocks' rows alone.
#[test]
fn a_gradient_is_computed_from_its_own_rows_alone() {
    let dir = tempfile::tempdir().unwrap();
    let releaser = gradient_releaser(dir.path(), 2);
    let first = 1_000_000_020_000 / 60_000;
    let found = releaser.gradients(&[first + 1], 60, &base());
    let series = releaser.lane.history().block(first + 1, 60_000, 60);
    let rows = BlockRows::new(&moments::public_values(&releaser.lane.schema, &series), 60);
    let point = GradientPoint::new(&base().descent().iterate);
    assert_eq!(found, [point.gradient(&rows)]);
    assert!(found[0].iter().any(|value| *value != 0.0));
    assert_ne!(found, releaser.gradients(&[first + 2], 60, &base()));
}
