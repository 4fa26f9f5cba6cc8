use std::cell::Cell;
use std::time::Duration;

use theriac_protocol::compress::decode_range;
use theriac_protocol::units::{L2Norm, NoiseMultiplier, Round, Timestamp};

use super::*;
use crate::ledger::{Ledger, ReserveError, Reserved};
use crate::noise::{ExactGaussian, FixedNoise};
use crate::policy::Policy;

struct Site {
    ledger: Ledger,
    _folder: tempfile::TempDir,
}

fn site(extra: &str) -> Site {
    let folder = tempfile::tempdir().unwrap();
    let epsilon = if extra.contains("epsilon") {
        ""
    } else {
        "epsilon = 4\n"
    };
    let policy = Policy::parse(&format!("site = \"site-a\"\n{epsilon}{extra}")).unwrap();
    let node = policy.site().clone();
    let ledger = Ledger::open(&folder.path().join("ledger.log"), &node, policy, Timestamp(0)).unwrap();
    Site {
        ledger,
        _folder: folder,
    }
}

fn plan(round: u64, kind: UpdateKind, blocks: impl IntoIterator<Item = u64>, values: u32) -> ReleasePlan {
    ReleasePlan {
        round: Round(round),
        nonce: round,
        kind,
        values,
        block_span: Duration::from_hours(1),
        blocks: blocks.into_iter().collect(),
        windows: None,
        sampling_rate: 1.0,
        steps: 1,
        clip_norm: L2Norm::new(10.0).unwrap(),
        noise_multiplier: NoiseMultiplier::new(4.0).unwrap(),
    }
}

impl Site {
    fn reserve(&mut self, plan: ReleasePlan) -> Result<Reservation, ReserveError> {
        match self.ledger.reserve(plan, Timestamp(0))? {
            Reserved::Fresh(reservation) => Ok(reservation),
            Reserved::AlreadyCharged { id, .. } => panic!("{id:?} was charged before"),
        }
    }
}

const LAYOUT: Digest = Digest([7; 32]);

#[test]
fn moments_are_summed_clipped_and_noised_on_the_sum() {
    let mut site = site("");
    let reservation = site.reserve(plan(1, UpdateKind::Moments, [4, 5, 6], 2)).unwrap();
    let asked = Cell::new(vec![]);
    let local = LocalUpdate::moments(reservation, LAYOUT, |blocks| {
        asked.set(blocks.to_vec());
        vec![vec![3.0, 4.0], vec![300.0, 400.0], vec![f32::NAN, 1.0]]
    })
    .unwrap();
    assert_eq!(asked.take(), [4, 5, 6]);
    // (3, 4) stays, (300, 400) becomes (6, 8), the unit with a NaN counts as zero; one deviation is 40, one grid step 4e-5.
    let noisy = local.clip().noise(&FixedNoise(1.0)).unwrap();
    assert!(
        (noisy.values()[0] - 49.0).abs() < 1e-4 && (noisy.values()[1] - 52.0).abs() < 1e-4,
        "{noisy:?}"
    );
}

#[test]
fn the_message_carries_terms_digest_and_claim_and_not_the_number_of_blocks() {
    let mut site = site("");
    let reservation = site.reserve(plan(3, UpdateKind::Moments, [1, 2], 5)).unwrap();
    let claim = reservation.claim().clone();
    let read = |blocks: &[u64]| blocks.iter().map(|_| vec![1.0; 5]).collect();
    let noisy = LocalUpdate::moments(reservation, LAYOUT, read)
        .unwrap()
        .clip()
        .noise(&ExactGaussian)
        .unwrap();
    let values = noisy.values().to_vec();
    let compressed = noisy.compress(|| 0.5);
    assert_eq!(compressed.payload_digest(), Digest::of(compressed.payload()));
    let (header, payload) = compressed.into_message(Digest([9; 32]), 64);
    assert_eq!(
        (header.round, header.nonce, header.values, header.blocks_bound),
        (Round(3), 3, 5, 64)
    );
    assert_eq!(
        (header.layout_digest, header.base_digest),
        (LAYOUT, Digest([9; 32]))
    );
    assert_eq!(
        (header.payload_digest, header.privacy),
        (Digest::of(&payload), claim)
    );
    let mut decoded = [0.0; 5];
    decode_range(header.encoding, &payload, 0, &mut decoded);
    let Encoding::Int8 { scale } = header.encoding else {
        panic!("the update is not one byte a value")
    };
    for (sent, noised) in decoded.iter().zip(values) {
        assert!((sent - noised).abs() <= scale);
    }
}

/// Promise 2 and section 1.4 of the privacy design: when the budget is spent, data are not read.
#[test]
fn the_closure_that_reads_data_is_never_called_once_the_budget_is_spent() {
    let mut site = site("mechanisms = [\"moments\", \"delta\"]");
    let reads = Cell::new(0);
    let mut refusals = 0;
    for round in 1..=40 {
        let before = reads.get();
        let reserved = site.reserve(plan(round, UpdateKind::Delta, [], 3));
        let released = reserved.map(|reservation| {
            LocalUpdate::delta(reservation, LAYOUT, || {
                reads.set(reads.get() + 1);
                vec![1.0; 3]
            })
        });
        match released {
            Ok(update) => {
                update.unwrap().clip().noise(&ExactGaussian).unwrap();
                assert_eq!(reads.get(), before + 1);
            }
            Err(refused) => {
                assert!(matches!(refused, ReserveError::BudgetSpent { .. }), "{refused:?}");
                assert_eq!(reads.get(), before, "data were read though the budget is spent");
                refusals += 1;
            }
        }
    }
    assert!(
        refusals > 0 && reads.get() > 0,
        "{refusals} refusals, {} reads",
        reads.get()
    );
    assert_eq!(u64::try_from(reads.get()).unwrap(), site.ledger.spent().releases);
    // Another kind, which would fit alone, finds the same empty purse.
    let moments = ReleasePlan {
        noise_multiplier: NoiseMultiplier::new(1.5).unwrap(),
        ..plan(99, UpdateKind::Moments, [1], 3)
    };
    assert!(matches!(
        site.reserve(moments),
        Err(ReserveError::BudgetSpent { .. })
    ));
}

#[test]
fn more_units_than_were_charged_or_other_lengths_are_refused() {
    let mut site = site("");
    let reservation = site.reserve(plan(1, UpdateKind::Moments, [1], 2)).unwrap();
    let many = LocalUpdate::moments(reservation, LAYOUT, |_| vec![vec![0.0; 2]; 2]);
    assert!(
        matches!(many, Err(UpdateError::TooManyUnits { charged: 1, found: 2 })),
        "{many:?}"
    );
    let reservation = site.reserve(plan(2, UpdateKind::Moments, [2], 2)).unwrap();
    let long = LocalUpdate::moments(reservation, LAYOUT, |_| vec![vec![0.0; 3]]);
    assert!(
        matches!(
            long,
            Err(UpdateError::WrongLength {
                expected: 2,
                found: 3
            })
        ),
        "{long:?}"
    );
    let reservation = site.reserve(plan(3, UpdateKind::Moments, [3], 2)).unwrap();
    let other = LocalUpdate::delta(reservation, LAYOUT, || panic!("data were read for another kind"));
    assert!(matches!(other, Err(UpdateError::OtherKind { .. })), "{other:?}");
}

#[test]
fn gradients_are_clipped_block_by_block_and_one_block_moves_the_sum_by_at_most_the_norm() {
    let gradients = |blocks: &[u64]| -> Vec<Vec<f32>> {
        let one = |block: &u64| {
            (0..40)
                .map(|i| ((block * 31 + i * 7) % 19) as f32 - 9.0)
                .collect()
        };
        blocks.iter().map(one).collect()
    };
    let sum = |blocks: std::ops::Range<u64>| {
        let mut site = site("mechanisms = [\"gradient\"]\nepsilon = 100");
        let reservation = site.reserve(plan(1, UpdateKind::Gradient, blocks, 40)).unwrap();
        let local = LocalUpdate::gradient(reservation, LAYOUT, gradients).unwrap();
        local.clip().noise(&FixedNoise(0.0)).unwrap().values().to_vec()
    };
    let (with, without) = (sum(0..8), sum(0..7));
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
    let moved = norm(&mut with.iter().zip(&without).map(|(a, b)| a - b));
    assert!((9.9..=10.0 + 1e-4).contains(&moved), "{moved}");
    // One after another, each scaled to the norm.
    for (index, value) in with.iter().enumerate() {
        let expected: f32 = gradients(&[0, 1, 2, 3, 4, 5, 6, 7])
            .iter()
            .map(|g| g[index] * (10.0 / norm(&mut g.iter().copied())).min(1.0))
            .sum();
        assert!((value - expected).abs() < 1e-3, "{value} {expected}");
    }
    let mut site = site("mechanisms = [\"gradient\", \"moments\"]");
    let reservation = site.reserve(plan(1, UpdateKind::Moments, [1], 2)).unwrap();
    let other = LocalUpdate::gradient(reservation, LAYOUT, |_| panic!("data were read for another kind"));
    assert!(matches!(other, Err(UpdateError::OtherKind { .. })), "{other:?}");
}

#[test]
fn blocks_without_data_make_a_noised_zero_and_not_an_error() {
    let mut site = site("");
    let reservation = site.reserve(plan(1, UpdateKind::Moments, [1, 2], 3)).unwrap();
    let noisy = LocalUpdate::moments(reservation, LAYOUT, |_| vec![])
        .unwrap()
        .clip()
        .noise(&FixedNoise(0.0))
        .unwrap();
    assert_eq!(noisy.values(), [0.0; 3]);
}

#[test]
fn debug_output_of_values_before_the_noise_holds_none() {
    let mut site = site("");
    let reservation = site.reserve(plan(1, UpdateKind::Moments, [1], 1)).unwrap();
    let local = LocalUpdate::moments(reservation, LAYOUT, |_| vec![vec![6.062_5]]).unwrap();
    assert!(!format!("{local:?}").contains("6.06"));
    let clipped = local.clip();
    assert!(!format!("{clipped:?}").contains("6.06"));
}
