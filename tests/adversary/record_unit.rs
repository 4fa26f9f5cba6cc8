//! The unit `record`: whatever one sample was, what its site releases moves by no more than was charged for it.

use std::time::Duration;

use proptest::prelude::*;
use theriac_edge::history::History;
use theriac_model::moments::{BLOCK_ROWS, MOMENTS_PER_CHANNEL, block};
use theriac_model::sample::Sample;
use theriac_privacy::ledger::{Ledger, ReleasePlan, Reserved};
use theriac_privacy::noise::FixedNoise;
use theriac_privacy::policy::Policy;
use theriac_privacy::update::LocalUpdate;
use theriac_privacy::windows::{BlockWindows, RecordWindows};
use theriac_protocol::message::UpdateKind;
use theriac_protocol::units::{Digest, L2Norm, NoiseMultiplier, Round, Timestamp};

const CHANNELS: usize = 2;
const BLOCKS: usize = 3;
const SAMPLES: usize = BLOCKS * BLOCK_ROWS;
const SPAN_MS: u64 = 60_000;

/// One sample and the millisecond of its turn at which it was taken.
type Row = Option<(u64, [f32; CHANNELS])>;

fn windows(window: u32, stride: u32) -> BlockWindows {
    let rows = u32::try_from(BLOCK_ROWS).unwrap();
    RecordWindows::new(window, stride)
        .unwrap()
        .in_block(rows)
        .unwrap()
}

/// What an edge makes of these samples: one vector for each whole window of each block.
fn vectors(rows: &[Row], windows: BlockWindows) -> Vec<Vec<f32>> {
    let mut history = History::new(CHANNELS, 2 * SAMPLES, 0);
    for (turn, row) in rows.iter().enumerate() {
        if let Some((late, values)) = row {
            let at_ms = turn as u64 * 1000 + late;
            history.push(
                Sample {
                    at_ms,
                    values: values.to_vec(),
                },
                true,
            );
        }
    }
    (0..BLOCKS as u64)
        .flat_map(|id| history.windows(id, SPAN_MS, windows))
        .map(|series| block(series.values(), series.rows()))
        .collect()
}

/// The clipped sum as an edge releases it, without its noise; and how far one sample may move it, as it was charged.
fn released(rows: &[Row], windows: BlockWindows, clip_norm: f64) -> (Vec<f64>, f64) {
    let folder = tempfile::tempdir().unwrap();
    let policy = format!(
        "site = \"site-a\"\nunit = \"record\"\nrecord_window = {}\nrecord_stride = {}\nblock = \"60s\"\nepsilon = 8",
        windows.window(),
        windows.stride()
    );
    let policy = Policy::parse(&policy).unwrap();
    let node = policy.site().clone();
    let mut ledger = Ledger::open(&folder.path().join("l"), &node, policy, Timestamp(0)).unwrap();
    let plan = ReleasePlan {
        round: Round(1),
        nonce: 1,
        kind: UpdateKind::Moments,
        values: u32::try_from(CHANNELS * MOMENTS_PER_CHANNEL).unwrap(),
        block_span: Duration::from_mins(1),
        blocks: (0..BLOCKS as u64).collect(),
        windows: Some(windows),
        sampling_rate: 1.0,
        steps: 1,
        clip_norm: L2Norm::new(clip_norm).unwrap(),
        noise_multiplier: NoiseMultiplier::new(2.0).unwrap(),
    };
    let Reserved::Fresh(reservation) = ledger.reserve(plan, Timestamp(1)).unwrap() else {
        panic!("charged before")
    };
    let charged = reservation.sensitivity() * clip_norm;
    let noisy = LocalUpdate::moments(reservation, Digest::of(b"layout"), |_| vectors(rows, windows))
        .unwrap()
        .clip()
        .noise(&FixedNoise(0.0))
        .unwrap();
    (noisy.values().iter().map(|x| f64::from(*x)).collect(), charged)
}

fn moved(one: &[f64], other: &[f64]) -> f64 {
    one.iter()
        .zip(other)
        .map(|(a, b)| (a - b).powi(2))
        .sum::<f64>()
        .sqrt()
}

fn row() -> impl Strategy<Value = (u64, [f32; CHANNELS])> {
    let value = prop_oneof![9 => -8.0_f32..8.0, 1 => any::<f32>(), 1 => Just(f32::NAN)];
    (0_u64..1000, [value.clone(), value])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// One sample more or less moves the sum by at most m/n·C, whatever it was and whatever the others are; another in its place by at
    /// most twice that.
    #[test]
    fn one_sample_moves_the_release_by_at_most_what_was_charged(
        samples in prop::collection::vec(prop::option::weighted(0.97, row()), SAMPLES),
        at in 0_usize..SAMPLES,
        added in row(),
        (window, stride) in prop_oneof![
            Just((60, 60)), Just((20, 20)), Just((11, 11)), Just((11, 10)), Just((11, 1)), Just((20, 7)), (11_u32..=60, 1_u32..70),
        ],
        clip in 1.0_f64..400.0,
    ) {
        let windows = windows(window, stride);
        let (mut with, mut without) = (samples.clone(), samples.clone());
        with[at] = Some(added);
        without[at] = None;
        let (with, charged) = released(&with, windows, clip);
        let (without, _) = released(&without, windows, clip);
        let expected = f64::from(windows.multiplicity()) / f64::from(windows.count()) * clip;
        prop_assert!((charged / expected - 1.0).abs() < 1e-12 && charged <= clip);
        // The sums are rounded to single precision on their way here.
        let slack = 1e-5 * clip * BLOCKS as f64;
        let found = moved(&with, &without);
        prop_assert!(found <= charged + slack, "{found} > {charged}");
        let (before, _) = released(&samples, windows, clip);
        let found = moved(&with, &before);
        prop_assert!(found <= 2.0 * charged + slack, "{found} > 2 · {charged}");
    }

    /// A second sample of the same turn makes its windows disappear, and changes no other.
    #[test]
    fn a_sample_too_many_moves_the_release_by_no_more(
        samples in prop::collection::vec(row().prop_map(Some), SAMPLES), at in 0_usize..SAMPLES, late in 0_u64..1000,
    ) {
        let windows = windows(20, 8);
        let vectors = |more: Option<u64>| {
            let mut history = History::new(CHANNELS, 2 * SAMPLES, 0);
            for (turn, row) in samples.iter().enumerate() {
                let (later, values) = row.unwrap();
                history.push(Sample { at_ms: turn as u64 * 1000 + later, values: values.to_vec() }, true);
                if let Some(late) = more.filter(|_| turn == at) {
                    history.push(Sample { at_ms: turn as u64 * 1000 + late, values: vec![1.0; CHANNELS] }, true);
                }
            }
            (0..BLOCKS as u64)
                .map(|id| history.windows(id, SPAN_MS, windows).len())
                .sum::<usize>()
        };
        let (all, fewer) = (vectors(None), vectors(Some(late)));
        prop_assert!(all >= fewer && all - fewer <= windows.multiplicity() as usize);
    }
}
