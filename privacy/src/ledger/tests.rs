use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use theriac_protocol::units::{L2Norm, NoiseMultiplier};

use theriac_protocol::message::{DeclineReason, UpdateKind};
use theriac_protocol::units::{NodeId, Round};

use super::chain::Storage;
use super::loss::Loss;
use super::record::{Charged, Genesis};
use super::*;

const HOUR: Duration = Duration::from_hours(1);

/// A disk in memory that can fail in the middle of a write.
#[derive(Debug, Clone, Default)]
struct Disk(Arc<Mutex<DiskState>>);

#[derive(Debug, Default)]
struct DiskState {
    bytes: Vec<u8>,
    /// Bytes that still fit.
    room: Option<usize>,
    sync_fails: bool,
    truncate_fails: bool,
    syncs: usize,
}

impl Disk {
    fn with(bytes: Vec<u8>) -> Self {
        let disk = Self::default();
        disk.state().bytes = bytes;
        disk
    }

    fn state(&self) -> std::sync::MutexGuard<'_, DiskState> {
        self.0.lock().unwrap()
    }

    fn bytes(&self) -> Vec<u8> {
        self.state().bytes.clone()
    }

    fn open(&self, policy: &Policy) -> Result<Ledger, LedgerError> {
        let bytes = self.bytes();
        let path = std::path::Path::new("ledger.log");
        Ledger::take_over(
            path,
            policy.site(),
            policy.clone(),
            Box::new(self.clone()),
            &bytes,
            Timestamp(5),
        )
    }
}

impl Storage for Disk {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.state();
        let fits = state.room.map_or(bytes.len(), |room| room.min(bytes.len()));
        state.bytes.extend(&bytes[..fits]);
        if fits < bytes.len() {
            Err(io::ErrorKind::StorageFull.into())
        } else {
            Ok(())
        }
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut state = self.state();
        state.syncs += 1;
        if state.sync_fails {
            Err(io::Error::other("the disk is gone"))
        } else {
            Ok(())
        }
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        let mut state = self.state();
        if state.truncate_fails {
            return Err(io::Error::other("the disk is gone"));
        }
        state.bytes.truncate(usize::try_from(length).unwrap());
        Ok(())
    }
}

fn policy(extra: &str) -> Policy {
    let epsilon = if extra.contains("epsilon") {
        ""
    } else {
        "epsilon = 4.0\n"
    };
    Policy::parse(&format!("site = \"site-a\"\n{epsilon}{extra}\n")).unwrap()
}

fn genesis(policy: &Policy) -> Record {
    Record::Genesis(Genesis {
        node: policy.site().clone(),
        unit: policy.unit(),
        block_ms: u64::try_from(policy.block_span().as_millis()).unwrap(),
        at: Timestamp(1),
    })
}

fn new_disk(policy: &Policy) -> Disk {
    let genesis = genesis(policy);
    Disk::with(chain::file_of(&[genesis.to_bytes()]))
}

fn plan(round: u64, blocks: impl IntoIterator<Item = u64>, sigma: f64) -> ReleasePlan {
    ReleasePlan {
        round: Round(round),
        nonce: round * 1000 + 7,
        kind: UpdateKind::Moments,
        values: 4,
        block_span: HOUR,
        blocks: blocks.into_iter().collect(),
        windows: None,
        sampling_rate: 1.0,
        steps: 1,
        clip_norm: L2Norm::new(1.0).unwrap(),
        noise_multiplier: NoiseMultiplier::new(sigma).unwrap(),
    }
}

fn delta_plan(round: u64, sigma: f64) -> ReleasePlan {
    ReleasePlan {
        kind: UpdateKind::Delta,
        ..plan(round, [], sigma)
    }
}

fn fresh(reserved: Result<Reserved, ReserveError>) -> Reservation {
    match reserved.unwrap() {
        Reserved::Fresh(reservation) => reservation,
        Reserved::AlreadyCharged { id, .. } => panic!("{id:?} was charged before"),
    }
}

/// At the tests' δ.
fn epsilon(loss: &Loss) -> f64 {
    loss.epsilon(Delta::new(1e-6).unwrap()).epsilon
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * a.abs().max(b.abs())
}

#[test]
fn disjoint_blocks_compose_in_parallel_and_the_lifetime_adds_up() {
    let policy = policy("");
    let mut ledger = new_disk(&policy).open(&policy).unwrap();
    assert!(ledger.spent().epsilon == 0.0 && ledger.spent().releases == 0);
    let one = Loss::gaussian(1.0, 1.5, 1.0, 1);
    let rho = Rho::gaussian(1.0, NoiseMultiplier::new(1.5).unwrap());
    for round in 1..=6 {
        let reservation = fresh(ledger.reserve(plan(round, round * 10..round * 10 + 5, 1.5), Timestamp(9)));
        assert_eq!(reservation.rho(), rho);
    }
    let spent = ledger.spent();
    let six = Loss::gaussian(1.0, 1.5, 1.0, 6);
    assert!(close(spent.epsilon, one.epsilon(policy.delta()).epsilon));
    assert!(close(spent.epsilon_lifetime, six.epsilon(policy.delta()).epsilon));
    assert!(spent.epsilon_lifetime > spent.epsilon && spent.releases == 6);
    let blocks: u64 = ledger
        .charged_blocks()
        .iter()
        .map(|run| run.end() - run.start() + 1)
        .sum();
    assert_eq!(blocks, 30);
}

/// Recipe B: twenty rounds over the same blocks are within ε = 4, and the twenty-first is not.
#[test]
fn twenty_rounds_of_gradients_compose_on_their_blocks_and_the_next_is_refused() {
    let policy = policy("mechanisms = [\"gradient\"]\nblock_releases_max = 100");
    let disk = new_disk(&policy);
    let mut ledger = disk.open(&policy).unwrap();
    let gradient = |round, blocks: std::ops::Range<u64>| ReleasePlan {
        kind: UpdateKind::Gradient,
        ..plan(round, blocks, 5.69)
    };
    for round in 1..=20 {
        let reservation = fresh(ledger.reserve(gradient(round, 0..9), Timestamp(round)));
        assert!((reservation.sensitivity() - 1.0).abs() < 1e-12);
        drop(reservation);
        // Composition adds at each order.
        let steps = u32::try_from(round).unwrap();
        assert!(close(
            ledger.spent().epsilon,
            epsilon(&Loss::gaussian(1.0, 5.69, 1.0, steps))
        ));
    }
    let spent = ledger.spent();
    assert!((3.9..=4.0).contains(&spent.epsilon), "{}", spent.epsilon);
    let refused = ledger.reserve(gradient(21, 0..9), Timestamp(21)).unwrap_err();
    assert!(matches!(refused, ReserveError::BudgetSpent { .. }), "{refused}");
    assert_eq!(refused.decline_reason(), DeclineReason::BudgetSpent);
    assert_eq!(
        (ledger.spent(), disk.open(&policy).unwrap().spent()),
        (spent, spent)
    );
    // One spent block spoils a release; the others can still be read.
    assert!(ledger.reserve(gradient(22, 8..12), Timestamp(22)).is_err());
    assert_eq!(
        ledger.affordable(&gradient(22, 7..12), Timestamp(22)),
        [9, 10, 11]
    );
    let _ = fresh(ledger.reserve(gradient(22, 9..12), Timestamp(22)));
    // Two releases at the most, whatever they cost.
    let twice = self::policy("mechanisms = [\"gradient\"]\nblock_releases_max = 2");
    let mut ledger = new_disk(&twice).open(&twice).unwrap();
    for round in 1..=2 {
        let _ = fresh(ledger.reserve(gradient(round, 3..5), Timestamp(round)));
    }
    assert_eq!(ledger.affordable(&gradient(3, 3..6), Timestamp(3)), [5]);
    // A job in one charge is not how rounds are charged, and the default policy allows none.
    let job = ReleasePlan {
        steps: 20,
        ..gradient(9, 50..51)
    };
    assert!(ledger.reserve(job, Timestamp(9)).is_err());
    let default = self::policy("");
    let mut ledger = new_disk(&default).open(&default).unwrap();
    assert!(matches!(
        ledger.reserve(gradient(1, 0..1), Timestamp(1)),
        Err(ReserveError::KindNotAllowed { .. })
    ));
}

#[test]
fn a_block_is_charged_once_unless_the_policy_allows_more() {
    let once = policy("");
    let mut ledger = new_disk(&once).open(&once).unwrap();
    let _ = fresh(ledger.reserve(plan(1, [3, 4, 5], 2.0), Timestamp(1)));
    let again = ledger.reserve(plan(2, [5, 6], 2.0), Timestamp(1));
    assert!(matches!(
        again,
        Err(ReserveError::BlockAlreadyCharged {
            block: 5,
            releases: 1,
            releases_max: 1
        })
    ));
    assert!(!ledger.is_chargeable(5) && ledger.is_chargeable(6));

    let twice = policy("block_releases_max = 2");
    let mut ledger = new_disk(&twice).open(&twice).unwrap();
    let _ = fresh(ledger.reserve(plan(1, [5], 2.0), Timestamp(1)));
    let _ = fresh(ledger.reserve(plan(2, [5], 2.0), Timestamp(1)));
    assert!(close(
        ledger.spent().epsilon,
        epsilon(&Loss::gaussian(1.0, 2.0, 1.0, 2))
    ));
    assert!(matches!(
        ledger.reserve(plan(3, [5], 2.0), Timestamp(1)),
        Err(ReserveError::BlockAlreadyCharged { .. })
    ));
}

#[test]
fn a_weight_delta_is_charged_to_every_block_at_twice_the_sensitivity() {
    let policy = policy("mechanisms = [\"moments\", \"delta\"]\nepsilon = 10");
    let mut ledger = new_disk(&policy).open(&policy).unwrap();
    let block = fresh(ledger.reserve(plan(1, [1], 3.0), Timestamp(1))).rho();
    let node = fresh(ledger.reserve(delta_plan(2, 3.0), Timestamp(1))).rho();
    assert!(
        close(node.value(), 4.0 * block.value()),
        "a delta is replaced, not removed: sensitivity 2C"
    );
    let both = Loss::gaussian(1.0, 3.0, 1.0, 1).plus(&Loss::gaussian(2.0, 3.0, 1.0, 1));
    assert!(close(ledger.spent().epsilon, epsilon(&both)));
    // A block measured later bears it as well.
    let _ = fresh(ledger.reserve(plan(3, [99], 3.0), Timestamp(1)));
    assert!(close(ledger.spent().epsilon, epsilon(&both)));
}

#[test]
fn refuses_when_the_next_release_would_pass_the_limit_and_writes_nothing() {
    let policy = policy("mechanisms = [\"delta\"]\nepsilon = 4");
    let disk = new_disk(&policy);
    let mut ledger = disk.open(&policy).unwrap();
    let mut charged = 0;
    let refused = loop {
        match ledger.reserve(delta_plan(charged + 1, 8.0), Timestamp(1)) {
            Ok(Reserved::Fresh(_)) => charged += 1,
            Ok(other) => panic!("{other:?}"),
            Err(error) => break error,
        }
        assert!(charged < 1000, "the budget never ends");
    };
    assert!(charged > 2, "only {charged} releases fitted");
    let before = disk.bytes();
    assert_eq!(refused.decline_reason(), DeclineReason::BudgetSpent);
    let ReserveError::BudgetSpent {
        epsilon_after,
        epsilon_limit,
        ..
    } = refused
    else {
        panic!("{refused:?}")
    };
    assert!(epsilon_after > epsilon_limit.value() && ledger.spent().epsilon <= epsilon_limit.value());
    assert_eq!((disk.bytes(), ledger.spent().releases), (before, charged));
}

#[test]
fn refuses_plans_outside_the_policy() {
    let policy = policy("noise_multiplier_min = 1.5\nreleases_max = 1");
    let mut ledger = new_disk(&policy).open(&policy).unwrap();
    let refused = |ledger: &mut Ledger, plan| ledger.reserve(plan, Timestamp(1)).unwrap_err();
    assert!(matches!(
        refused(&mut ledger, plan(1, [1], 1.49)),
        ReserveError::TermsTooWeak { .. }
    ));
    assert!(matches!(
        refused(&mut ledger, delta_plan(1, 9.0)),
        ReserveError::KindNotAllowed { .. }
    ));
    assert!(matches!(
        refused(&mut ledger, plan(1, [], 2.0)),
        ReserveError::NoBlocks
    ));
    for blocks in [vec![2, 1], vec![1, 1]] {
        assert!(matches!(
            refused(&mut ledger, plan(1, blocks, 2.0)),
            ReserveError::BadPlan(_)
        ));
    }
    let minutes = ReleasePlan {
        block_span: Duration::from_mins(1),
        ..plan(1, [1], 2.0)
    };
    assert!(matches!(
        refused(&mut ledger, minutes),
        ReserveError::OtherBlocks { .. }
    ));
    for values in [0, VALUES_MAX + 1] {
        let odd = ReleasePlan {
            values,
            ..plan(1, [1], 2.0)
        };
        assert!(matches!(refused(&mut ledger, odd), ReserveError::BadPlan(_)));
    }
    for clip_norm in [1e-10, 1e13] {
        let odd = ReleasePlan {
            clip_norm: L2Norm::new(clip_norm).unwrap(),
            ..plan(1, [1], 2.0)
        };
        assert!(matches!(refused(&mut ledger, odd), ReserveError::BadPlan(_)));
    }
    assert!(ledger.check(&plan(1, [1], 2.0), Timestamp(1)).is_ok());
    let _ = fresh(ledger.reserve(plan(1, [1], 2.0), Timestamp(1)));
    let spent = refused(&mut ledger, plan(2, [2], 2.0));
    assert!(matches!(
        spent,
        ReserveError::ReleasesSpent {
            releases: 1,
            releases_max: 1
        }
    ));
}

#[test]
fn a_retry_is_not_charged_and_gets_no_key_to_the_data() {
    let policy = policy("");
    let disk = new_disk(&policy);
    let mut ledger = disk.open(&policy).unwrap();
    let id = fresh(ledger.reserve(plan(1, [1, 2], 2.0), Timestamp(1))).id();
    let payload = Digest::of(b"noised bytes");
    let length = disk.bytes().len();
    assert!(matches!(
        ledger.reserve(plan(1, [8, 9], 3.0), Timestamp(2)),
        Ok(Reserved::AlreadyCharged { id: again, payload_digest: None }) if again == id
    ));
    assert_eq!(disk.bytes().len(), length, "the retry was written");
    ledger.mark_released(id, payload, Timestamp(3)).unwrap();
    ledger.mark_released(id, payload, Timestamp(4)).unwrap();
    assert!(matches!(
        ledger.mark_released(id, Digest::of(b"x"), Timestamp(4)),
        Err(LedgerError::OtherBytes { .. })
    ));
    let unknown = ReservationId {
        round: Round(9),
        nonce: 9,
    };
    assert!(matches!(
        ledger.mark_released(unknown, payload, Timestamp(4)),
        Err(LedgerError::NotReserved { .. })
    ));
    let mut ledger = disk.open(&policy).unwrap();
    assert!(matches!(
        ledger.reserve(plan(1, [1, 2], 2.0), Timestamp(2)),
        Ok(Reserved::AlreadyCharged { payload_digest: Some(digest), .. }) if digest == payload
    ));
    assert_eq!(ledger.reservation(id), Some(Some(payload)));
}

#[test]
fn a_charge_is_synced_before_reserve_returns() {
    let policy = policy("");
    let disk = new_disk(&policy);
    let mut ledger = disk.open(&policy).unwrap();
    let before = disk.state().syncs;
    let reservation = fresh(ledger.reserve(plan(1, [1], 2.0), Timestamp(1)));
    assert_eq!(disk.state().syncs, before + 1);
    let reread = disk.open(&policy).unwrap();
    assert!(!reread.is_chargeable(1));
    assert_eq!(reread.spent(), ledger.spent());
    let claim = reservation.claim();
    assert_eq!(
        (claim.ledger_head, claim.ledger_records),
        (ledger.spent().head, ledger.spent().records)
    );
}

/// Power fails at every byte of an append: what `reserve` had returned for is still charged, and the ledger opens.
#[test]
fn a_crash_at_any_byte_of_an_append_loses_no_charge() {
    let policy = policy("");
    let disk = new_disk(&policy);
    let mut ledger = disk.open(&policy).unwrap();
    let _ = fresh(ledger.reserve(plan(1, [1, 2, 3], 2.0), Timestamp(1)));
    let (first, after_first) = (disk.bytes().len(), ledger.spent());
    let _ = fresh(ledger.reserve(plan(2, [7], 2.0), Timestamp(2)));
    let (whole, after_second) = (disk.bytes(), ledger.spent());
    for length in first..=whole.len() {
        let crashed = Disk::with(whole[..length].to_vec());
        let mut reopened = crashed.open(&policy).unwrap();
        let expected = if length == whole.len() {
            after_second
        } else {
            after_first
        };
        assert_eq!(reopened.spent(), expected, "cut at {length}");
        assert_eq!(
            reopened.opening().torn_bytes,
            if length == whole.len() {
                0
            } else {
                (length - first) as u64
            }
        );
        // The round can be done, or is known to be done; either way the file is whole again.
        drop(reopened.reserve(plan(2, [7], 2.0), Timestamp(3)).unwrap());
        assert_eq!(crashed.open(&policy).unwrap().spent().releases, 2);
    }
}

#[test]
fn a_flipped_bit_anywhere_stops_training() {
    let policy = policy("");
    let disk = new_disk(&policy);
    let mut ledger = disk.open(&policy).unwrap();
    let id = fresh(ledger.reserve(plan(1, [1, 2, 9], 2.0), Timestamp(1))).id();
    ledger
        .mark_released(id, Digest::of(b"bytes"), Timestamp(2))
        .unwrap();
    let whole = disk.bytes();
    for byte in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[byte] ^= 1 << (byte % 8);
        let opened = Disk::with(damaged).open(&policy);
        assert!(
            matches!(opened, Err(LedgerError::Damaged { .. })),
            "byte {byte}: {opened:?}"
        );
    }
}

/// Somebody who rewrites the file with correct hashes still cannot write a charge that contradicts itself.
#[test]
fn records_that_contradict_themselves_are_damage() {
    let policy = policy("");
    let disk = new_disk(&policy);
    let mut ledger = disk.open(&policy).unwrap();
    let _ = fresh(ledger.reserve(plan(1, [1], 2.0), Timestamp(1)));
    let bodies: Vec<Vec<u8>> = chain::read(&disk.bytes())
        .unwrap()
        .records
        .iter()
        .map(|(_, body, _)| body.to_vec())
        .collect();
    let text = String::from_utf8(bodies[2].clone()).unwrap();
    let cheaper = text.replace("\"noise_multiplier\":2.0", "\"noise_multiplier\":20.0");
    let gentler = text.replace("\"sensitivity\":1.0", "\"sensitivity\":0.5");
    let moved = text.replace("\"sequence\":2", "\"sequence\":1");
    let sampled = text.replace("\"sampling_rate\":1.0", "\"sampling_rate\":0.1");
    let other = text.replace("\"unit\":\"block\"", "\"unit\":\"record\"");
    let changed = [&cheaper, &gentler, &moved, &sampled, &other];
    assert!(
        changed.iter().all(|changed| **changed != text),
        "the record reads otherwise: {text}"
    );
    for changed in changed {
        let bodies = [bodies[0].clone(), bodies[1].clone(), changed.clone().into_bytes()];
        let opened = Disk::with(chain::file_of(&bodies)).open(&policy);
        assert!(
            matches!(opened, Err(LedgerError::Damaged { .. })),
            "{changed}: {opened:?}"
        );
    }
    let cases = [
        vec![bodies[0].clone(), bodies[2].clone(), bodies[2].clone()],
        vec![bodies[0].clone(), bodies[0].clone()],
        vec![bodies[2].clone()],
        vec![bodies[0].clone(), b"{}".to_vec()],
        vec![],
    ];
    for (n, case) in cases.iter().enumerate() {
        let opened = Disk::with(chain::file_of(case)).open(&policy);
        assert!(
            matches!(opened, Err(LedgerError::Damaged { .. })),
            "case {n}: {opened:?}"
        );
    }
}

#[test]
fn a_full_disk_charges_nothing_and_leaves_the_file_as_it_was() {
    let policy = policy("");
    let disk = new_disk(&policy);
    let mut ledger = disk.open(&policy).unwrap();
    let (before, spent) = (disk.bytes(), ledger.spent());
    for room in [0, 1, 7, 8, 100] {
        disk.state().room = Some(room);
        let refused = ledger.reserve(plan(1, [1], 2.0), Timestamp(1)).unwrap_err();
        assert!(
            matches!(refused, ReserveError::Ledger(LedgerError::StorageFull { .. })),
            "{refused:?}"
        );
        assert_eq!(refused.decline_reason(), DeclineReason::StorageUnavailable);
        assert_eq!((disk.bytes(), ledger.spent()), (before.clone(), spent));
    }
    disk.state().room = None;
    let _ = fresh(ledger.reserve(plan(1, [1], 2.0), Timestamp(1)));
}

#[test]
fn after_a_failed_sync_or_repair_nothing_is_charged_until_the_file_is_read_again() {
    let policy = policy("");
    let sync = |disk: &Disk, on| disk.state().sync_fails = on;
    let repair = |disk: &Disk, on: bool| {
        let mut state = disk.state();
        state.room = on.then_some(3);
        state.truncate_fails = on;
    };
    for fail in [&sync as &dyn Fn(&Disk, bool), &repair] {
        let disk = new_disk(&policy);
        let mut ledger = disk.open(&policy).unwrap();
        fail(&disk, true);
        assert!(ledger.reserve(plan(1, [1], 2.0), Timestamp(1)).is_err());
        fail(&disk, false);
        let broken = ledger.reserve(plan(2, [2], 2.0), Timestamp(1)).unwrap_err();
        assert!(
            matches!(broken, ReserveError::Ledger(LedgerError::Broken { .. })),
            "{broken:?}"
        );
        assert!(ledger.check(&plan(2, [2], 2.0), Timestamp(1)).is_err());
        let mut reopened = disk.open(&policy).unwrap();
        let _ = fresh(reopened.reserve(plan(2, [2], 2.0), Timestamp(1)));
    }
}

#[test]
fn a_restored_snapshot_is_seen_by_its_head_and_count() {
    let policy = policy("");
    let disk = new_disk(&policy);
    let mut ledger = disk.open(&policy).unwrap();
    let _ = fresh(ledger.reserve(plan(1, [1], 2.0), Timestamp(1)));
    let snapshot = disk.bytes();
    let _ = fresh(ledger.reserve(plan(2, [2], 2.0), Timestamp(1)));
    let seen = ledger.spent();
    let mut restored = Disk::with(snapshot).open(&policy).unwrap();
    assert!(restored.spent().records < seen.records && !restored.contains_head(&seen.head));
    // Catching up in count does not hide it: the chain is another one.
    let _ = fresh(restored.reserve(plan(3, [3], 2.0), Timestamp(1)));
    assert!(restored.spent().records == seen.records && !restored.contains_head(&seen.head));
    assert!(ledger.contains_head(&seen.head) && ledger.contains_head(&Digest::default()));
}

#[test]
fn keeps_its_node_and_its_unit() {
    let first = policy("");
    let disk = new_disk(&first);
    drop(disk.open(&first).unwrap());
    let other_node = Policy::parse("site = \"site-b\"\nepsilon = 4").unwrap();
    assert!(matches!(
        disk.open(&other_node),
        Err(LedgerError::OtherNode { .. })
    ));
    for changed in ["block = \"30m\"", "unit = \"record\""] {
        assert!(
            matches!(disk.open(&policy(changed)), Err(LedgerError::UnitChanged { .. })),
            "{changed}"
        );
    }
    let records = disk.open(&first).unwrap().spent().records;
    assert!(matches!(
        disk.open(&policy("epsilon = 3.0")),
        Err(LedgerError::PolicyUnversioned { version: 1 })
    ));
    let second = policy("epsilon = 3.0\nversion = 2");
    let tightened = disk.open(&second).unwrap();
    assert_eq!(
        tightened.spent().records,
        records + 1,
        "a changed policy is recorded"
    );
    assert_eq!(disk.open(&second).unwrap().spent().records, records + 1);
    assert!(matches!(
        disk.open(&first),
        Err(LedgerError::PolicyOlder { found: 1, seen: 2 })
    ));
}

#[test]
fn a_clock_that_goes_backwards_changes_no_charge() {
    let policy = policy("");
    let mut ledger = new_disk(&policy).open(&policy).unwrap();
    let _ = fresh(ledger.reserve(plan(1, [100], 2.0), Timestamp(1_000_000)));
    let _ = fresh(ledger.reserve(plan(2, [99], 2.0), Timestamp(10)));
    let again = ledger.reserve(plan(3, [100], 2.0), Timestamp(0));
    assert!(matches!(
        again,
        Err(ReserveError::BlockAlreadyCharged { block: 100, .. })
    ));
}

#[test]
fn on_disk_it_is_locked_private_and_the_same_after_reopening() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.log");
    let policy = policy("");
    let open = || Ledger::open(&path, policy.site(), policy.clone(), Timestamp(1));
    let mut ledger = open().unwrap();
    assert!(ledger.opening().created);
    assert_eq!(
        std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    assert!(matches!(open(), Err(LedgerError::InUse { .. })));
    let _ = fresh(ledger.reserve(plan(1, [4, 5], 2.0), Timestamp(2)));
    let (spent, status) = (ledger.spent(), ledger.status());
    assert_eq!(
        Ledger::inspect(&path, policy.clone()).unwrap(),
        status,
        "a reader needs no lock"
    );
    assert!(status.blocks_charged == 2 && status.to_string().contains("epsilon"));
    drop(ledger);
    let ledger = open().unwrap();
    assert_eq!((ledger.spent(), ledger.opening().created), (spent, false));
    drop(ledger);
    let other = NodeId::new("site-b").unwrap();
    assert!(matches!(
        Ledger::open(&path, &other, policy.clone(), Timestamp(1)),
        Err(LedgerError::OtherSite { .. })
    ));
    std::fs::write(&path, b"not a ledger").unwrap();
    assert!(matches!(open(), Err(LedgerError::Damaged { offset: 0, .. })));
    assert!(matches!(
        Ledger::open(
            &folder.path().join("none/ledger.log"),
            policy.site(),
            policy.clone(),
            Timestamp(1)
        ),
        Err(LedgerError::Io { .. })
    ));
}

#[test]
fn a_ledger_is_held_to_what_is_known_of_it_and_left_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.log");
    let policy = policy("");
    let open = |known: &KnownHead| {
        Ledger::open_known(&path, policy.site(), policy.clone(), Some(known), Timestamp(1))
    };
    let mut ledger = Ledger::open(&path, policy.site(), policy.clone(), Timestamp(1)).unwrap();
    let snapshot = std::fs::read(&path).unwrap();
    let earlier = ledger.known_head();
    let _ = fresh(ledger.reserve(plan(1, [1], 2.0), Timestamp(2)));
    let known = ledger.known_head();
    drop(ledger);
    drop(open(&known).unwrap());
    drop(open(&earlier).unwrap());
    std::fs::write(&path, &snapshot).unwrap();
    assert!(matches!(
        open(&known),
        Err(LedgerError::WentBackwards { records, .. }) if records == known.records
    ));
    assert!(Ledger::inspect_known(&path, policy.clone(), Some(&known)).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), snapshot);
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(open(&known), Err(LedgerError::Lost { .. })));
    assert!(!path.exists(), "a new ledger was begun in place of the lost one");
}

#[derive(Debug, Clone)]
enum Op {
    Moments { first: u64, blocks: u64, sigma: f64 },
    Delta { sigma: f64 },
    Retry { back: u64 },
    Release,
    Crash { cut: usize },
    FullDisk { room: usize },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0_u64..40, 1_u64..6, 0.5..6.0).prop_map(|(first, blocks, sigma)| Op::Moments { first, blocks, sigma }),
        1 => (0.5..20.0).prop_map(|sigma| Op::Delta { sigma }),
        1 => (0_u64..4).prop_map(|back| Op::Retry { back }),
        1 => Just(Op::Release),
        2 => (1_usize..300).prop_map(|cut| Op::Crash { cut }),
        1 => (0_usize..300).prop_map(|room| Op::FullDisk { room }),
    ]
}

proptest! {
    /// Whatever happens, and in whatever order: what is spent never falls, never passes the limit, and a reopened
    /// ledger says the same as the open one.
    #[test]
    fn what_is_spent_never_falls_and_never_passes_the_limit(ops in prop::collection::vec(op(), 1..40)) {
        let policy = policy("mechanisms = [\"moments\", \"delta\"]\nblock_releases_max = 3");
        let disk = new_disk(&policy);
        let mut ledger = disk.open(&policy).unwrap();
        let mut round = 0;
        let mut most = ledger.spent();
        for op in ops {
            let written = disk.bytes().len();
            match op {
                Op::Moments { first, blocks, sigma } => {
                    round += 1;
                    drop(ledger.reserve(plan(round, first..first + blocks, sigma), Timestamp(round)));
                }
                Op::Delta { sigma } => {
                    round += 1;
                    drop(ledger.reserve(delta_plan(round, sigma), Timestamp(round)));
                }
                Op::Retry { back } => {
                    let known = plan(round.saturating_sub(back), [50], 5.0);
                    if ledger.reservation(known.id()).is_some() {
                        let is_known = matches!(
                            ledger.reserve(known, Timestamp(0)),
                            Ok(Reserved::AlreadyCharged { .. })
                        );
                        prop_assert!(is_known);
                        prop_assert_eq!(disk.bytes().len(), written);
                    }
                }
                Op::Release => {
                    let id = plan(round, [], 1.0).id();
                    drop(ledger.mark_released(id, Digest::of(&round.to_le_bytes()), Timestamp(round)));
                }
                Op::Crash { cut } => {
                    // A write was under way that had not returned: some of its bytes are there.
                    let next = plan(round + 1, [60], 5.0);
                    let charged = ledger.state.charge_of(&policy, &next, Timestamp(0));
                    if let Ok(charged) = charged {
                        let shadow = Disk::with(disk.bytes());
                        let mut other = shadow.open(&policy).unwrap();
                        other.append(&Record::Charge(Box::new(charged))).unwrap();
                        let whole = shadow.bytes();
                        let keep = (written + cut).min(whole.len() - 1);
                        disk.state().bytes = whole[..keep].to_vec();
                    }
                    ledger = disk.open(&policy).unwrap();
                }
                Op::FullDisk { room } => {
                    round += 1;
                    disk.state().room = Some(room);
                    let refused = ledger.reserve(plan(round, [70 + round], 5.0), Timestamp(0));
                    disk.state().room = None;
                    if refused.is_err() {
                        prop_assert_eq!(disk.bytes().len(), written);
                    }
                }
            }
            let spent = ledger.spent();
            prop_assert!(spent.epsilon >= most.epsilon && spent.epsilon_lifetime >= most.epsilon_lifetime);
            prop_assert!(spent.releases >= most.releases && spent.records >= most.records);
            prop_assert!(spent.epsilon <= policy.epsilon().value());
            prop_assert_eq!(disk.open(&policy).unwrap().spent(), spent);
            most = spent;
        }
    }
}

/// A ledger of the first release, as it wrote it: read, counted as it was, and continued in its own format.
#[test]
fn a_ledger_of_version_1_is_read_and_continued() {
    let policy = policy("block_releases_max = 2");
    let rho = Rho::gaussian(1.0, NoiseMultiplier::new(2.0).unwrap()).value();
    let charged = Charged {
        round: Round(1),
        nonce: 7,
        kind: UpdateKind::Moments,
        values: 4,
        blocks: vec![(3, 5)],
        clip_norm: L2Norm::new(1.0).unwrap(),
        noise_multiplier: NoiseMultiplier::new(2.0).unwrap(),
        sensitivity: 1.0,
        rho,
        policy: policy.hash(),
        at: Timestamp(2),
    };
    let note = format!(
        "{{\"record\":\"policy\",\"hash\":\"{}\",\"epsilon\":4.0,\"delta\":1e-6,\"at\":1}}",
        policy.hash()
    );
    let bodies = [
        genesis(&policy).to_bytes(),
        note.into_bytes(),
        Record::Reserve(charged).to_bytes(),
    ];
    let disk = Disk::with(chain::file_of_version(1, &bodies));
    let mut ledger = disk.open(&policy).unwrap();
    let one = epsilon(&Loss::gaussian(1.0, 2.0, 1.0, 1));
    assert!(close(ledger.spent().epsilon, one) && ledger.spent().releases == 1);
    assert!(matches!(
        ledger.reserve(
            ReleasePlan {
                nonce: 7,
                ..plan(1, [9], 2.0)
            },
            Timestamp(3)
        ),
        Ok(Reserved::AlreadyCharged { .. })
    ));
    let _ = fresh(ledger.reserve(plan(2, [5], 2.0), Timestamp(3)));
    let two = epsilon(&Loss::gaussian(1.0, 2.0, 1.0, 2));
    assert!(close(ledger.spent().epsilon, two));
    assert_eq!(disk.bytes()[8], 1, "the header was rewritten");
    assert_eq!(disk.open(&policy).unwrap().spent(), ledger.spent());
}

#[test]
fn steps_and_sampling_are_charged_at_once_and_held_to_the_policy() {
    let policy = policy("mechanisms = [\"delta\"]\nsampling_rate_max = 0.1\nsteps_max = 100\nepsilon = 8");
    let mut ledger = new_disk(&policy).open(&policy).unwrap();
    let training = |round, rate, steps| ReleasePlan {
        kind: UpdateKind::Delta,
        sampling_rate: rate,
        steps,
        ..plan(round, [1, 2, 3], 1.0)
    };
    let refused = |ledger: &mut Ledger, plan| ledger.reserve(plan, Timestamp(1)).unwrap_err();
    assert!(matches!(
        refused(&mut ledger, training(1, 0.2, 10)),
        ReserveError::SamplingRateTooHigh { .. }
    ));
    assert!(matches!(
        refused(&mut ledger, training(1, 0.1, 101)),
        ReserveError::TooManySteps {
            found: 101,
            expected: 100
        }
    ));
    for (rate, steps) in [(0.0, 1), (-0.1, 1), (f64::NAN, 1), (0.1, 0)] {
        assert!(matches!(
            refused(&mut ledger, training(1, rate, steps)),
            ReserveError::BadPlan(_)
        ));
    }
    let reservation = fresh(ledger.reserve(training(1, 0.05, 20), Timestamp(1)));
    assert!(close(reservation.sensitivity(), 1.0));
    let loss = Loss::gaussian(1.0, 1.0, 0.05, 20);
    assert!(close(ledger.spent().epsilon, epsilon(&loss)));
    assert!(
        ledger.spent().epsilon < epsilon(&Loss::gaussian(1.0, 1.0, 1.0, 20)),
        "sampling amplifies"
    );
    // Charged to every block in the pool, drawn or not.
    assert!(!ledger.is_chargeable(1) && !ledger.is_chargeable(3) && ledger.is_chargeable(4));
}

const MONTH: &str = "period = \"month\"\nblock_releases_max = 100\nepsilon = 3.5";
/// 2026-11-15, 2026-11-30 and 2026-12-01, UTC.
const NOVEMBER: Timestamp = Timestamp(1_794_700_800_000);
const DECEMBER: Timestamp = Timestamp(1_796_083_200_000);

#[test]
fn a_new_month_is_a_new_limit_and_no_reset() {
    let policy = policy(MONTH);
    let disk = new_disk(&policy);
    let mut ledger = disk.open(&policy).unwrap();
    let one = epsilon(&Loss::gaussian(1.0, 1.5, 1.0, 1));
    assert!(one < 3.5 && epsilon(&Loss::gaussian(1.0, 1.5, 1.0, 2)) > 3.5);
    let _ = fresh(ledger.reserve(plan(1, [5], 1.5), NOVEMBER));
    let refused = ledger.reserve(plan(2, [5], 1.5), NOVEMBER).unwrap_err();
    assert!(refused.to_string().contains("2026-11"), "{refused}");
    let _ = fresh(ledger.reserve(plan(3, [5], 1.5), DECEMBER));
    let spent = ledger.spent();
    assert!(close(spent.epsilon, one), "of December alone");
    let two = epsilon(&Loss::gaussian(1.0, 1.5, 1.0, 2));
    assert!(close(spent.epsilon_unit_lifetime, two), "of all time");
    assert_eq!(ledger.status().period, "2026-12");
    assert_eq!(disk.open(&policy).unwrap().spent(), spent);
}

#[test]
fn a_clock_that_goes_back_brings_no_earlier_budget_back() {
    let policy = policy(MONTH);
    let disk = new_disk(&policy);
    let mut ledger = disk.open(&policy).unwrap();
    let _ = fresh(ledger.reserve(plan(1, [5], 1.5), NOVEMBER));
    let _ = fresh(ledger.reserve(plan(2, [5], 1.5), DECEMBER));
    // Neither in November, which is over, nor in December, which is spent.
    for now in [NOVEMBER, Timestamp(0), DECEMBER] {
        assert!(matches!(
            ledger.reserve(plan(3, [5], 1.5), now),
            Err(ReserveError::BudgetSpent { .. })
        ));
    }
    // What another block is charged counts in December.
    let _ = fresh(ledger.reserve(plan(4, [6], 1.5), NOVEMBER));
    assert_eq!(disk.open(&policy).unwrap().status().period, "2026-12");
}

#[test]
fn a_policy_that_changes_its_period_starts_with_what_was_lost_before() {
    let rolling = policy("block_releases_max = 100\nepsilon = 3.5");
    let disk = new_disk(&rolling);
    let _ = fresh(disk.open(&rolling).unwrap().reserve(plan(1, [5], 1.5), NOVEMBER));
    let monthly = policy(&format!("{MONTH}\nversion = 2"));
    let mut ledger = disk.open(&monthly).unwrap();
    assert!(matches!(
        ledger.reserve(plan(2, [5], 1.5), NOVEMBER),
        Err(ReserveError::BudgetSpent { .. })
    ));
}

#[test]
fn a_block_past_its_retention_is_never_read_again() {
    let policy = policy("retention = \"2h\"");
    let mut ledger = new_disk(&policy).open(&policy).unwrap();
    let hour = |hours: u64| Timestamp(hours * 3_600_000);
    // Block 10 ends at hour 11, so it is too old after hour 13.
    assert!(matches!(
        ledger.reserve(plan(1, [10, 20], 2.0), Timestamp(hour(13).0 + 1)),
        Err(ReserveError::BlockTooOld { block: 10 })
    ));
    let _ = fresh(ledger.reserve(plan(1, [10, 20], 2.0), hour(13)));
}

fn seal_of(known: KnownHead) -> Seal {
    Seal {
        records: known.records,
        head: known.head,
        signed: Timestamp(9),
        key: "theriac/test+00000000+AAAA".to_owned(),
        signature: "00".repeat(64),
    }
}

#[test]
fn a_copy_that_lacks_what_the_aggregator_has_signed_is_too_old_even_if_it_grew() {
    let policy = policy("");
    let disk = new_disk(&policy);
    let mut ledger = disk.open(&policy).unwrap();
    let _ = fresh(ledger.reserve(plan(1, [1], 2.0), Timestamp(1)));
    let snapshot = disk.bytes();
    let _ = fresh(ledger.reserve(plan(2, [2], 2.0), Timestamp(1)));
    let seal = seal_of(ledger.known_head());
    ledger.keep_seal(seal.clone()).unwrap();
    let kept = ledger.known_head();
    ledger.keep_seal(seal.clone()).unwrap();
    assert_eq!(ledger.known_head(), kept, "the same seal was written twice");
    assert_eq!(disk.open(&policy).unwrap().seal(), Some(&seal));

    let mut restored = Disk::with(snapshot).open(&policy).unwrap();
    for round in 3..6 {
        let _ = fresh(restored.reserve(plan(round, [round], 2.0), Timestamp(1)));
    }
    assert!(restored.spent().records > seal.records);
    let before = restored.known_head();
    assert!(matches!(
        restored.keep_seal(seal),
        Err(LedgerError::WentBackwards { .. })
    ));
    assert_eq!(restored.known_head(), before, "something was written");
}

/// A disk that forgets what was not synced, all of it or any part, when power fails.
#[derive(Debug, Clone, Default)]
struct ForgetfulDisk(Arc<Mutex<Forgetful>>);

#[derive(Debug, Default)]
struct Forgetful {
    durable: Vec<u8>,
    pending: Vec<u8>,
    /// Calls until power fails.
    calls_left: usize,
}

impl ForgetfulDisk {
    fn call(&self) -> io::Result<std::sync::MutexGuard<'_, Forgetful>> {
        let mut state = self.0.lock().unwrap();
        match state.calls_left.checked_sub(1) {
            Some(left) => state.calls_left = left,
            None => return Err(io::Error::other("power is off")),
        }
        Ok(state)
    }
}

impl Storage for ForgetfulDisk {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        // The write that power fails in has begun.
        let mut state = self.0.lock().unwrap();
        if state.calls_left > 0 || state.pending.is_empty() {
            state.pending.extend(bytes);
        }
        drop(state);
        self.call().map(drop)
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut state = self.call()?;
        let pending = std::mem::take(&mut state.pending);
        state.durable.extend(pending);
        Ok(())
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        let mut state = self.call()?;
        let length = usize::try_from(length).unwrap();
        let kept = length.saturating_sub(state.durable.len());
        state.pending.truncate(kept);
        state.durable.truncate(length);
        Ok(())
    }
}

/// Power failures at every call to the disk, each keeping any prefix of what was not synced: every charge that `reserve` had returned for
/// is there afterwards. `THERIAC_POWER_FAILURES=10000` makes the full number.
#[test]
fn power_failures_lose_no_charge_that_reserve_had_returned_for() {
    use rand::{Rng as _, SeedableRng as _};
    let failures: usize = std::env::var("THERIAC_POWER_FAILURES").map_or(500, |text| text.parse().unwrap());
    let seed = 77;
    eprintln!("seed {seed}, {failures} power failures");
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let policy = policy("");
    let open = |disk: &ForgetfulDisk, bytes: &[u8]| {
        let path = std::path::Path::new("ledger.log");
        let storage = Box::new(disk.clone());
        Ledger::take_over(path, policy.site(), policy.clone(), storage, bytes, Timestamp(5))
    };
    let mut bytes = new_disk(&policy).bytes();
    let (mut round, mut returned) = (0, Vec::<ReservationId>::new());
    for failure in 0..failures {
        if bytes.len() > 40_000 {
            (bytes, returned) = (new_disk(&policy).bytes(), Vec::new());
        }
        let disk = ForgetfulDisk::default();
        {
            let mut state = disk.0.lock().unwrap();
            state.durable = bytes.clone();
            state.calls_left = rng.random_range(0..14);
        }
        // It may fail while it is opened, which writes as well.
        if let Ok(mut ledger) = open(&disk, &bytes) {
            for _ in 0..8 {
                round += 1;
                let next = plan(round, [round], 2.0);
                let id = next.id();
                match ledger.reserve(next, Timestamp(round)) {
                    Ok(_) => returned.push(id),
                    Err(_) => break,
                }
                drop(ledger.mark_released(id, Digest::of(&round.to_le_bytes()), Timestamp(round)));
            }
        }
        let state = disk.0.lock().unwrap();
        bytes = state.durable.clone();
        let kept = rng.random_range(0..=state.pending.len());
        bytes.extend(&state.pending[..kept]);
        let after = Disk::with(bytes.clone());
        let ledger = after
            .open(&policy)
            .unwrap_or_else(|error| panic!("failure {failure}: {error}"));
        for id in &returned {
            assert!(
                ledger.reservation(*id).is_some(),
                "failure {failure}: {id:?} was lost"
            );
        }
        bytes = after.bytes();
    }
    assert!(returned.len() > 2, "nothing was ever charged");
}

/// A process that was killed between a write and its sync leaves bytes that only memory holds. Whoever opens the ledger then tells its head to others, so
/// they must be durable by then.
#[test]
fn what_is_told_of_an_opened_ledger_survives_a_power_failure() {
    let policy = policy("");
    let disk = new_disk(&policy);
    let mut ledger = disk.open(&policy).unwrap();
    let before = disk.bytes().len();
    let _ = fresh(ledger.reserve(plan(1, [1], 2.0), Timestamp(1)));
    let bytes = disk.bytes();
    let killed = ForgetfulDisk::default();
    {
        let mut state = killed.0.lock().unwrap();
        state.durable = bytes[..before].to_vec();
        state.pending = bytes[before..].to_vec();
        state.calls_left = 100;
    }
    let path = std::path::Path::new("ledger.log");
    let storage = Box::new(killed.clone());
    let opened =
        Ledger::take_over(path, policy.site(), policy.clone(), storage, &bytes, Timestamp(5)).unwrap();
    let known = opened.known_head();
    drop(opened);
    let durable = killed.0.lock().unwrap().durable.clone();
    assert!(Disk::with(durable).open(&policy).unwrap().holds(&known));
}

/// A stricter policy refuses blocks that lost more than it allows, and those alone: others lose nothing by their loss.
#[test]
fn a_stricter_policy_keeps_fresh_blocks_going() {
    let first = policy("block_releases_max = 9");
    let disk = new_disk(&first);
    let mut ledger = disk.open(&first).unwrap();
    let _ = fresh(ledger.reserve(plan(1, [1], 1.3), Timestamp(1)));
    let spent = ledger.spent().epsilon;
    assert!(spent > 3.5, "{spent}");
    let stricter = policy("version = 2\nepsilon = 2\nblock_releases_max = 9");
    let mut ledger = disk.open(&stricter).unwrap();
    let mild = |round, blocks: &[u64]| plan(round, blocks.iter().copied(), 4.6);
    assert_eq!(ledger.affordable(&mild(2, &[1, 2]), Timestamp(2)), [2]);
    let refused = ledger.reserve(mild(2, &[1, 2]), Timestamp(2)).unwrap_err();
    assert!(matches!(refused, ReserveError::BudgetSpent { .. }), "{refused}");
    let _ = fresh(ledger.reserve(mild(3, &[2]), Timestamp(3)));
    assert!(
        close(ledger.spent().epsilon, spent),
        "the old block's loss is still the figure"
    );
    assert_eq!(disk.open(&stricter).unwrap().spent(), ledger.spent());
}

/// Heads are told to the aggregator; nobody finds by trying what was charged under them.
#[test]
fn no_two_ledgers_with_the_same_charges_have_the_same_head() {
    let policy = policy("");
    let head = || {
        let mut ledger = new_disk(&policy).open(&policy).unwrap();
        let _ = fresh(ledger.reserve(plan(1, [1], 2.0), Timestamp(1)));
        ledger.known_head().head
    };
    assert_ne!(head(), head());
}

/// The unit of one record: what windows a block is cut into follows from the policy, is on record, and gives the charge.
#[test]
fn windows_are_charged_their_part_and_are_those_of_the_policy() {
    use crate::windows::RecordWindows;

    let record = policy("unit = \"record\"\nrecord_window = 20\nepsilon = 20");
    let disk = new_disk(&record);
    let mut ledger = disk.open(&record).unwrap();
    let windows = |window, stride, rows| RecordWindows::new(window, stride).unwrap().in_block(rows).ok();
    let cut = |round, windows| ReleasePlan {
        windows,
        ..plan(round, [round], 1.0)
    };
    let reservation = fresh(ledger.reserve(cut(1, windows(20, 20, 3_600)), Timestamp(1)));
    assert!(close(reservation.sensitivity(), 1.0 / 180.0));
    assert!(close(
        ledger.spent().epsilon,
        epsilon(&Loss::gaussian(1.0 / 180.0, 1.0, 1.0, 1))
    ));
    for other in [windows(20, 10, 3_600), windows(30, 30, 3_600)] {
        let refused = ledger.reserve(cut(2, other), Timestamp(2)).unwrap_err();
        assert!(matches!(refused, ReserveError::BadPlan(_)), "{refused}");
    }
    // Whole vectors of blocks may turn around: twice C.
    let whole = fresh(ledger.reserve(cut(3, None), Timestamp(3)));
    assert!(close(whole.sensitivity(), 2.0));
    assert_eq!(disk.open(&record).unwrap().spent(), ledger.spent());
    let block = policy("");
    let mut ledger = new_disk(&block).open(&block).unwrap();
    assert!(
        ledger
            .reserve(cut(1, windows(20, 20, 3_600)), Timestamp(1))
            .is_err()
    );
}
