use theriac_model::feature::FeatureSchema;
use theriac_model::sample::Sample;
use theriac_privacy::noise::ExactGaussian;
use theriac_privacy::policy::Policy;
use theriac_protocol::units::{L2Norm, ModelVersion, NodeId, Round};

use super::*;
use crate::config::DetectionSettings;

const STEP: Duration = Duration::from_secs(1);

/// Six blocks of a minute are over when 400 rows from the first on were taken.
const FIRST: u64 = 1_000_000_020_000;

fn clock() -> Timestamp {
    Timestamp(FIRST + 401_000)
}

fn lane(rows: u32) -> Arc<LaneShared> {
    let lane = LaneShared::new(
        "kv",
        FeatureSchema::host_service_v1(),
        10_000,
        &DetectionSettings::default(),
        Duration::from_secs(1),
    )
    .started_at(Timestamp(FIRST), 10_000);
    for row in 0..rows {
        let values = (0..16)
            .map(|c| 0.1 * c as f32 + 0.01 * (row % 7) as f32)
            .collect();
        lane.history().push(
            Sample {
                at_ms: FIRST + u64::from(row) * 1000,
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
    .with_clock(clock)
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
    )
    .with_clock(clock);
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
    let first = FIRST / 60_000;
    let before = releaser.moments(&[first + 1], 60, None);
    let other = LaneShared::new(
        "kv",
        FeatureSchema::host_service_v1(),
        10_000,
        &DetectionSettings::default(),
        STEP,
    );
    for row in 0_u64..180 {
        let at_ms = FIRST + row * 1000;
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
        changed.moments(&[first + 1], 60, None),
        before,
        "another block's rows were used"
    );
    assert_ne!(changed.moments(&[first], 60, None), before);
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
        let back = FIRST + 200_000 + row * 1000;
        releaser.lane.history().push(sample(back, 0.5), true);
    }
    let again = AnnounceV1 {
        blocks_min: 1,
        ..announce(2)
    };
    let released = releaser.release(&again, &base());
    let error = released.unwrap_err();
    assert_eq!(error.decline_reason(), DeclineReason::TooFewBlocks, "{error}");
    assert_eq!(releaser.ledger().spent(), before, "a block was charged twice");
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
    Releaser::new(ledger, lane(400), STEP, 2, Box::new(ExactGaussian), None).with_clock(clock)
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
    let first = FIRST / 60_000;
    let found = releaser.gradients(&[first + 1], 60, None, &base());
    let series = releaser
        .lane
        .history()
        .complete_block(first + 1, 60_000, 60)
        .unwrap();
    let rows = BlockRows::new(&moments::public_values(&releaser.lane.schema, &series), 60);
    let point = GradientPoint::new(&base().descent().iterate);
    assert_eq!(found, [point.gradient(&rows)]);
    assert!(found[0].iter().any(|value| *value != 0.0));
    assert_ne!(found, releaser.gradients(&[first + 2], 60, None, &base()));
}

/// A lane of these rows; where `values` gives nothing, none was taken.
fn lane_of(rows: u64, values: impl Fn(u64) -> Option<Vec<f32>>) -> Arc<LaneShared> {
    lane_since(FIRST, rows, values)
}

/// The same of a program that was started at another time.
fn lane_since(started_ms: u64, rows: u64, values: impl Fn(u64) -> Option<Vec<f32>>) -> Arc<LaneShared> {
    let lane = LaneShared::new(
        "kv",
        FeatureSchema::host_service_v1(),
        10_000,
        &DetectionSettings::default(),
        STEP,
    )
    .started_at(Timestamp(started_ms), 10_000);
    for row in 0..rows {
        if let Some(values) = values(row) {
            let at_ms = FIRST + row * 1000 + 3;
            lane.history().push(Sample { at_ms, values }, true);
        }
    }
    Arc::new(lane)
}

fn values_of(row: u64) -> Vec<f32> {
    (0..16)
        .map(|channel| 0.3 + 0.01 * ((row * 7 + channel * 13) % 29) as f32)
        .collect()
}

fn releaser_of(dir: &std::path::Path, lane: Arc<LaneShared>, unit: &str) -> Releaser {
    let policy = format!("site = 'site-a'\nepsilon = 20\nblock = '1m'\n{unit}\n");
    let (path, node) = (dir.join("ledger.log"), "site-a".parse().unwrap());
    let ledger = Ledger::open(&path, &node, Policy::parse(&policy).unwrap(), Timestamp(1)).unwrap();
    Releaser::new(ledger, lane, STEP, 2, Box::new(ExactGaussian), None).with_clock(clock)
}

/// The vectors of the first, less those of the second, and the other way round.
fn differing(one: &[Vec<f32>], other: &[Vec<f32>]) -> (usize, usize) {
    let missing =
        |of: &[Vec<f32>], from: &[Vec<f32>]| of.iter().filter(|vector| !from.contains(vector)).count();
    (missing(one, other), missing(other, one))
}

/// Neighbouring data sets differ by one block: every release names the same blocks all the same, so that one more block moves this release by one
/// vector and none that comes after.
#[test]
fn which_blocks_a_release_names_does_not_depend_on_which_are_there() {
    let full = lane_of(400, |row| Some(values_of(row)));
    for gone in 0..6 {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let without = lane_of(400, |row| (row / 60 != gone).then(|| values_of(row)));
        let mut with = releaser_of(dirs[0].path(), Arc::clone(&full), "");
        let mut without = releaser_of(dirs[1].path(), without, "");
        let mut moved = 0;
        for round in 1..=2 {
            let announce = announce(round);
            let plans = [&with, &without].map(|releaser| releaser.plan(&announce).unwrap());
            assert_eq!(plans[0].blocks, plans[1].blocks, "block {gone}, round {round}");
            let vectors = [&with, &without].map(|releaser| releaser.moments(&plans[0].blocks, 60, None));
            let (more, fewer) = differing(&vectors[0], &vectors[1]);
            assert_eq!(fewer, 0, "block {gone}, round {round}");
            moved += more;
            let _released = [
                fresh(with.release(&announce, &base()).unwrap()),
                fresh(without.release(&announce, &base()).unwrap()),
            ];
        }
        assert_eq!(moved, 1, "block {gone}");
        assert_eq!(with.ledger().charged_blocks(), without.ledger().charged_blocks());
    }
}

/// The first row of all, on either side of a tenth of its block, and a whole first block: what is named stays, and no more is moved than was charged.
#[test]
fn which_blocks_a_release_names_does_not_depend_on_the_first_row() {
    let all = AnnounceV1 {
        blocks_max: 60,
        ..announce(1)
    };
    for (unit, multiplicity) in [
        ("", 1),
        ("unit = 'record'\nrecord_window = 11\nrecord_stride = 10", 2),
    ] {
        for (started, blocks) in [(4, 6), (6, 6), (7, 5)] {
            // Rows of the second block begin just after its tenth mark: without the first block they are the first of all.
            let rows = |first: u64| {
                lane_since(FIRST + started * 1000, 400, move |row| {
                    let there = row >= first && !(54..66).contains(&row);
                    there.then(|| values_of(row))
                })
            };
            let release = |first: u64| {
                let dir = tempfile::tempdir().unwrap();
                let releaser = releaser_of(dir.path(), rows(first), unit);
                let plan = releaser.plan(&all).unwrap();
                let vectors = releaser.moments(&plan.blocks, 60, plan.windows);
                (plan.blocks, vectors)
            };
            for first in 0..12 {
                let (with, without) = (release(first), release(first + 1));
                assert_eq!(
                    (with.0.len(), &with.0),
                    (blocks, &without.0),
                    "{unit}, {started}, {first}"
                );
                let (more, fewer) = differing(&with.1, &without.1);
                assert!(more <= multiplicity && fewer <= 1, "{unit}, {started}, {first}");
            }
            let (with, without) = (release(0), release(66));
            assert_eq!(with.0, without.0, "{unit}, {started}: the first block");
            if unit.is_empty() {
                // Its block is complete in one of the two, where it is named, and all others are in both.
                assert_eq!(
                    differing(&with.1, &without.1),
                    (usize::from(blocks == 6), 0),
                    "{started}"
                );
                assert_eq!(without.1.len(), 5, "{started}");
            }
        }
    }
}

/// The unit of one record: a sample more or less makes at most as many windows appear or disappear as were charged.
#[test]
fn a_sample_more_or_less_changes_no_more_windows_than_are_charged() {
    for (unit, multiplicity) in [
        ("unit = 'record'\nrecord_window = 20", 1),
        ("unit = 'record'\nrecord_window = 20\nrecord_stride = 8", 3),
        ("unit = 'record'\nrecord_window = 11\nrecord_stride = 10", 2),
        ("unit = 'record'", 1),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let full = releaser_of(dir.path(), lane_of(400, |row| Some(values_of(row))), unit);
        let plan = full.plan(&announce(1)).unwrap();
        let windows = plan.windows.unwrap();
        assert_eq!(windows.multiplicity(), multiplicity);
        let all = full.moments(&plan.blocks, 60, plan.windows);
        assert_eq!(all.len(), plan.blocks.len() * windows.count() as usize, "{unit}");
        let mut most = 0;
        // The newest three blocks are read: rows 180 to 359.
        for gone in 120..400 {
            let dir = tempfile::tempdir().unwrap();
            let lane = lane_of(400, |row| (row != gone).then(|| values_of(row)));
            let without = releaser_of(dir.path(), lane, unit);
            assert_eq!(without.plan(&announce(1)).unwrap(), plan, "{unit}, row {gone}");
            let vectors = without.moments(&plan.blocks, 60, plan.windows);
            let (more, fewer) = differing(&all, &vectors);
            assert!(
                fewer == 0 && more <= multiplicity as usize,
                "{unit}, row {gone}: {more}"
            );
            most = most.max(more);
        }
        assert_eq!(most, multiplicity as usize, "{unit}: the bound is reached");
    }
}

#[test]
fn a_record_is_charged_its_windows_part_of_what_a_block_is() {
    let spent = |unit: &str| {
        let dir = tempfile::tempdir().unwrap();
        let mut releaser = releaser_of(dir.path(), lane(400), unit);
        let (row, id) = fresh(releaser.release(&announce(1), &base()).unwrap());
        releaser.mark_released(id, row.payload_digest).unwrap();
        let ToAggregator::Update(header, _) = message_of(&row).unwrap() else {
            panic!("no update")
        };
        assert_eq!(
            header.privacy.clip_norm,
            announce(1).clip_norm,
            "a block adds at most C"
        );
        releaser.ledger().spent().epsilon
    };
    let (block, record) = (spent(""), spent("unit = 'record'\nrecord_window = 20"));
    let third = theriac_privacy::ledger::loss::Loss::gaussian(1.0 / 3.0, 1.27, 1.0, 1);
    let expected = third
        .epsilon(theriac_protocol::units::Delta::new(1e-6).unwrap())
        .epsilon;
    assert!(
        (record - expected).abs() < 1e-9 && record < block / 2.0,
        "{record}, {block}"
    );
    let whole = spent("unit = 'record'");
    assert!((whole - block).abs() < 1e-12, "one window of the whole block");
}

#[test]
fn windows_longer_than_the_rounds_blocks_are_declined_before_any_charge() {
    let dir = tempfile::tempdir().unwrap();
    let mut releaser = releaser_of(dir.path(), lane(400), "unit = 'record'\nrecord_window = 61");
    let error = releaser.release(&announce(1), &base()).unwrap_err();
    assert!(error.to_string().contains("record_window"), "{error}");
    assert_eq!(releaser.ledger().spent().releases, 0);
}
