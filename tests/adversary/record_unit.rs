//! The unit `record`: whatever one sample was, what its site releases moves by no more than was charged for it.

use std::time::Duration;

use proptest::prelude::*;
use theriac_model::moments::{BLOCK_ROWS, MOMENTS_PER_CHANNEL, block};
use theriac_privacy::ledger::{Ledger, ReleasePlan, Reserved};
use theriac_privacy::noise::FixedNoise;
use theriac_privacy::policy::Policy;
use theriac_privacy::update::LocalUpdate;
use theriac_protocol::message::UpdateKind;
use theriac_protocol::units::{Digest, L2Norm, NoiseMultiplier, Round, Timestamp};

const CHANNELS: usize = 2;
const BLOCKS: usize = 3;
const SAMPLES: usize = BLOCKS * BLOCK_ROWS;

/// One vector for each block, made of that block's samples alone.
fn vectors(samples: &[f32]) -> Vec<Vec<f32>> {
    samples
        .chunks_exact(BLOCK_ROWS * CHANNELS)
        .map(|rows| block(rows, BLOCK_ROWS))
        .collect()
}

/// The clipped sum as an edge releases it, without its noise; and how far one sample may move it, as it was charged.
fn released(samples: &[f32], clip_norm: f64) -> (Vec<f64>, f64) {
    let folder = tempfile::tempdir().unwrap();
    let policy = Policy::parse("site = \"site-a\"\nunit = \"record\"\nblock = \"60s\"\nepsilon = 8").unwrap();
    let node = policy.site().clone();
    let mut ledger = Ledger::open(&folder.path().join("l"), &node, policy, Timestamp(0)).unwrap();
    let plan = ReleasePlan {
        round: Round(1),
        nonce: 1,
        kind: UpdateKind::Moments,
        values: u32::try_from(CHANNELS * MOMENTS_PER_CHANNEL).unwrap(),
        block_span: Duration::from_mins(1),
        blocks: (0..BLOCKS as u64).collect(),
        sampling_rate: 1.0,
        steps: 1,
        clip_norm: L2Norm::new(clip_norm).unwrap(),
        noise_multiplier: NoiseMultiplier::new(2.0).unwrap(),
    };
    let Reserved::Fresh(reservation) = ledger.reserve(plan, Timestamp(1)).unwrap() else {
        panic!("charged before")
    };
    let charged = reservation.sensitivity() * clip_norm;
    let noisy = LocalUpdate::moments(reservation, Digest::of(b"layout"), |_| vectors(samples))
        .unwrap()
        .clip()
        .noise(&FixedNoise(0.0))
        .unwrap();
    (noisy.values().iter().map(|x| f64::from(*x)).collect(), charged)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn one_sample_moves_the_release_by_at_most_what_was_charged(
        samples in prop::collection::vec(-8.0_f32..8.0, SAMPLES * CHANNELS),
        at in 0_usize..SAMPLES,
        other in prop::collection::vec(prop_oneof![any::<f32>(), Just(f32::NAN), -1e6_f32..1e6], CHANNELS),
        clip in 1.0_f64..400.0,
    ) {
        let mut changed = samples.clone();
        changed[at * CHANNELS..(at + 1) * CHANNELS].copy_from_slice(&other);
        let ((before, charged), (after, _)) = (released(&samples, clip), released(&changed, clip));
        let moved = before.iter().zip(&after).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
        prop_assert!(moved <= charged * (1.0 + 1e-6), "{moved} > {charged}");
        prop_assert!((charged / clip - 2.0).abs() < 1e-12);
        // No window reaches over a block's edge: every other block's vector is the same to the last bit.
        let (before, after) = (vectors(&samples), vectors(&changed));
        for (block, (before, after)) in before.iter().zip(&after).enumerate() {
            prop_assert!(block == at / BLOCK_ROWS || before == after, "block {} has changed", block);
        }
    }
}
