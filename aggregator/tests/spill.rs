//! Rounds whose rows lie in a file: the same bits, records and replays as with all rows in memory, whatever rule combines them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    reason = "a failed helper is a failed test"
)]

mod federation;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use federation::centre::{Centre, Edge};
use federation::hand::Hand;
use federation::{header, series};
use theriac_aggregator::accumulate::Accumulate;
use theriac_aggregator::average::SiteAverage;
use theriac_aggregator::central::{CentralNoiseSettings, CentralStatus};
use theriac_aggregator::combine::RoundResult;
use theriac_aggregator::config::{LimitSettings, RoundKind, RoundSettings, Settings};
use theriac_aggregator::data_dir::DataDir;
use theriac_aggregator::evidence::{Decision, Record};
use theriac_aggregator::publish::PublishError;
use theriac_aggregator::robust::{PlacedRow, RuleName};
use theriac_aggregator::serve;
use theriac_aggregator::store::{StoreError, evidence, history};
use theriac_protocol::compress::{encode_f32, encode_int8};
use theriac_protocol::message::{ToAggregator, ToEdge};
use theriac_protocol::refusal::{AbortReason, RoundOutcome};
use theriac_protocol::units::Round;

const SITES: [&str; 9] = ["a", "b", "c", "d", "e", "f", "g", "h", "i"];

/// Every rule that a round takes, pre-aggregations among them.
const RULES: [&str; 16] = [
    "mean",
    "median",
    "trimmed_mean",
    "meamed",
    "multi_krum",
    "geometric_median",
    "geometric_median_converged",
    "mda",
    "monna",
    "caf",
    "bulyan",
    "nnm+krum",
    "nnm+trimmed_mean",
    "dedup+nnm+trimmed_mean",
    "arc+nnm+median",
    "bucketing+geometric_median",
];

fn released(hand: &Hand, site: &str, round: u64) -> Vec<f32> {
    let channels = hand.config.model.channels().unwrap();
    let clip = hand.clip.value() as f32;
    let noise = hand.config.rounds.noise_multiplier.value() as f32 * clip;
    let seed = u32::from(site.as_bytes()[0]) * 1_000 + round as u32;
    series::release(channels, clip, noise, seed)
}

/// Noise of the agreed strength: as long as a delta or a gradient is.
fn noise(hand: &Hand, site: &str, round: u64) -> Vec<f32> {
    let scale = (hand.clip.value() * hand.config.rounds.noise_multiplier.value()) as f32;
    let mut state = u32::from(site.as_bytes()[0]) * 7_919 + round as u32;
    let mut uniform = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 16_777_216.0 - 0.5
    };
    let mut normal = || (0..12).map(|_| uniform()).sum::<f32>();
    (0..hand.terms().values).map(|_| scale * normal()).collect()
}

fn federation_of(kind: RoundKind) -> Hand {
    let rounds = RoundSettings {
        kind,
        block_rows: 60,
        blocks_min: 3,
        blocks_max: 20,
        ..RoundSettings::default()
    };
    let values = if kind == RoundKind::Moments {
        released
    } else {
        noise
    };
    let mut hand = Hand::new(rounds, &SITES, values);
    if kind == RoundKind::Moments {
        hand.plan.accumulate = Accumulate {
            keep: 3,
            age_ms: 7 * 86_400_000,
        };
    } else {
        hand.plan.site_average = SiteAverage::new(0.5).unwrap();
    }
    hand
}

/// A round with sites that send `f32` and `int8`, one that copies, one that comes late and one that is carried where releases add up.
fn fill(hand: &mut Hand, round: u64) {
    let announce = hand.open(round);
    // The last one only in every other round.
    let sending = 7 - usize::from(round.is_multiple_of(2));
    for (at, site) in SITES.iter().take(sending).enumerate() {
        let values = hand.values(site, round);
        if at % 2 == 0 {
            hand.send_values(&announce, site, &values);
        } else {
            let (encoding, payload) = encode_int8(&values, || 0.5);
            hand.send_encoded(&announce, site, encoding, &payload);
        }
    }
    if round == 2 {
        let copied = hand.values("b", round);
        hand.send_values(&announce, "h", &copied);
    }
}

fn same(one: &RoundResult, other: &RoundResult, what: &str) {
    assert_eq!(one.candidate.payload, other.candidate.payload, "{what}");
    assert_eq!(one.candidate.evidence, other.candidate.evidence, "{what}");
    let bits = |result: &RoundResult| -> Vec<u32> {
        let combined = result.candidate.combined.iter();
        combined.map(|value| value.to_bits()).collect()
    };
    assert_eq!(bits(one), bits(other), "{what}");
    assert_eq!(one.account, other.account, "{what}");
}

#[test]
fn every_rule_gives_the_same_bits_and_figures_whatever_of_the_rows_is_in_memory() {
    for kind in [RoundKind::Moments, RoundKind::Delta, RoundKind::Gradient] {
        let mut hand = federation_of(kind);
        fill(&mut hand, 1);
        hand.publish(1);
        let first = history::announced(hand.database.read(), Round(1)).unwrap();
        hand.send_late(&first, "i");
        fill(&mut hand, 2);
        let (all, none) = (hand.memory.clone(), hand.memory_of(1));
        // Some rows here and some there.
        let values = u64::from(hand.terms().values);
        let some = hand.memory_of(20 * values);
        let placed = |memory| {
            let inputs = hand.inputs(2, memory).unwrap();
            let there = inputs
                .rows
                .iter()
                .chain(inputs.seen.iter().filter_map(|seen| seen.row.as_ref()));
            let there = there.chain(inputs.carried.iter().map(|row| &row.row));
            let (files, memory): (Vec<_>, Vec<_>) = there.partition(|row| matches!(row, PlacedRow::File(_)));
            (files.len(), memory.len())
        };
        let rows = placed(&all).1;
        assert_eq!((placed(&all).0, placed(&none)), (0, (rows, 0)), "{kind:?}");
        assert!(
            placed(&some).0 > 0 && placed(&some).1 > 0,
            "{kind:?}: {:?}",
            placed(&some)
        );
        for name in RULES {
            hand.plan.rule = name.parse::<RuleName>().unwrap();
            hand.plan.byzantine = usize::from(name != "mean");
            let expected = hand.combined(2, &all).unwrap();
            for memory in [&none, &some] {
                let found = hand.combined(2, memory).unwrap();
                same(&expected, &found, &format!("{kind:?} {name} {memory:?}"));
            }
        }
        let left = std::fs::read_dir(folder(&hand)).unwrap().count();
        assert_eq!(left, 0, "nothing stays");
    }
}

#[test]
fn records_and_replays_do_not_tell_where_the_rows_were() {
    for kind in [RoundKind::Moments, RoundKind::Delta] {
        let run = |bytes: u64| {
            let mut hand = federation_of(kind);
            hand.plan.rule = RuleName::CAF;
            hand.plan.byzantine = 2;
            hand.memory = hand.memory_of(bytes);
            for round in 1..=4 {
                fill(&mut hand, round);
                if round == 3 {
                    let second = history::announced(hand.database.read(), Round(2)).unwrap();
                    hand.send_late(&second, "i");
                }
                hand.publish(round);
            }
            hand
        };
        let (there, here) = (run(1), run(u64::MAX));
        let records = |hand: &Hand| -> Vec<Record> {
            let read = hand.database.read();
            (1..=4)
                .flat_map(|round| evidence::of_round(read, Round(round)).unwrap())
                .collect()
        };
        assert_eq!(records(&there), records(&here), "{kind:?}");
        let is = |decision| move |record: &Record| record.decision == decision;
        let found = records(&there);
        assert!(found.iter().any(is(Decision::Screened)), "{kind:?}");
        assert_eq!(
            found.iter().any(is(Decision::Carried)),
            kind == RoundKind::Moments,
            "{kind:?}"
        );
        for round in 1..=4 {
            let (file, memory) = (there.memory_of(1), there.memory_of(u64::MAX));
            let again = (there.replay_in(round, &file), there.replay_in(round, &memory));
            assert!(matches!(again, (Ok(one), Ok(other)) if one == other), "{again:?}");
        }
    }
}

fn folder(hand: &Hand) -> PathBuf {
    DataDir::new(&hand.config.data_dir).spill()
}

/// Empties the nameless files of this process in `folder`.
fn cut_short(folder: &Path) {
    let mut cut = 0;
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        let path = entry.unwrap().path();
        if std::fs::read_link(&path).is_ok_and(|file| file.starts_with(folder)) {
            File::options()
                .write(true)
                .open(&path)
                .unwrap()
                .set_len(0)
                .unwrap();
            cut += 1;
        }
    }
    assert_eq!(cut, 1, "a round has one file");
}

#[test]
fn a_file_that_cannot_be_made_is_an_error_and_one_that_is_cut_short_gives_no_model() {
    let mut hand = federation_of(RoundKind::Delta);
    fill(&mut hand, 1);
    let memory = hand.memory_of(1);
    std::fs::write(folder(&hand), b"in the way").unwrap();
    let error = hand.inputs(1, &memory).unwrap_err();
    assert!(matches!(error, StoreError::Io { .. }), "{error}");
    std::fs::remove_file(folder(&hand)).unwrap();
    let inputs = hand.inputs(1, &memory).unwrap();
    cut_short(&folder(&hand));
    let result = inputs.run(&hand.config.model, None);
    assert!(matches!(result, Err(PublishError::Spill(_))), "{result:?}");
    assert!(hand.combined(1, &memory).is_ok(), "the same round again");
}

/// What keeps rows of a round from their file.
enum Obstacle {
    /// A file where the folder should be.
    File(PathBuf),
    /// A file system of one page, which a row does not fit.
    Disk(PathBuf),
}

impl Obstacle {
    fn file(spill: &Path) -> Self {
        std::fs::write(spill, b"in the way").unwrap();
        Self::File(spill.to_owned())
    }

    /// `None`, with a word, where that is not allowed.
    fn disk(spill: &Path) -> Option<Self> {
        std::fs::create_dir(spill).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=4k,mode=0700", "tmpfs"])
            .arg(spill)
            .output();
        if mounted.is_ok_and(|mounted| mounted.status.success()) {
            return Some(Self::Disk(spill.to_owned()));
        }
        println!("left out: a full disk, because no file system can be mounted here (root may)");
        std::fs::remove_dir(spill).unwrap();
        None
    }
}

impl Drop for Obstacle {
    fn drop(&mut self) {
        match self {
            Self::File(path) => drop(std::fs::remove_file(path)),
            // Lazily: a file may be open still. The folder stays, the server may be about to use it.
            Self::Disk(path) => drop(Command::new("umount").arg("-l").arg(&*path).status()),
        }
    }
}

/// Rounds of two sites whose rows are all in the file.
fn settings(central_noise: CentralNoiseSettings) -> Settings {
    Settings {
        rounds: RoundSettings {
            kind: RoundKind::Delta,
            quorum: 2,
            deadline: Duration::from_secs(50),
            pause: Duration::ZERO,
            rule: RuleName::MEAN,
            byzantine: 0,
            rounds_max: Some(3),
            ..RoundSettings::default()
        },
        limits: LimitSettings {
            round_memory_bytes: 0,
            ..LimitSettings::default()
        },
        central_noise,
        ..Settings::default()
    }
}

/// Sends an update of noise.
async fn send(edge: &mut Edge, at: u32, round: u32) {
    let announce = edge.announced_for(round.into()).await;
    let scale = (announce.clip_norm.value() * announce.noise_multiplier.value()) as f32;
    let mut state = 1_000 * at + round;
    let mut noise = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 8) as f32 / 16_777_216.0 - 0.5) * 3.46 * scale
    };
    let values: Vec<f32> = (0..announce.values).map(|_| noise()).collect();
    let payload = encode_f32(&values);
    let header = header(&announce, &payload, round.into());
    let update = ToAggregator::Update(header, payload.into());
    edge.session.send(&update).await.unwrap();
}

async fn outcome(edge: &mut Edge) -> RoundOutcome {
    loop {
        match edge.recv().await {
            ToEdge::Closed(closed) => return closed.outcome,
            ToEdge::Announce(announce) => edge.round = Some(announce),
            ToEdge::Refusal(refusal) => panic!("{refusal:?}"),
            _ => {}
        }
    }
}

/// Three rounds of a whole server: in the first the rows have nowhere to be, in the second the disk is full for a while, the third goes as it should.
async fn three_rounds(central_noise: CentralNoiseSettings) -> Centre {
    let mut centre = Centre::made(settings(central_noise));
    let spill = DataDir::new(&centre.dir).spill();
    std::fs::create_dir(&spill).unwrap();
    std::fs::write(spill.join("7.1.0.rows"), b"left over").unwrap();
    let identities = centre.enrol(&["a", "b"]);
    centre.serve().await;
    assert_eq!(
        std::fs::read_dir(&spill).unwrap().count(),
        0,
        "removed at the start"
    );
    std::fs::remove_dir(&spill).unwrap();
    let mut obstacle = Some(Obstacle::file(&spill));
    let mut edges = Vec::new();
    for identity in &identities {
        edges.push(centre.dial_soon(identity, centre.hello(0, &[])).await);
    }
    for round in 1..=3 {
        for (at, edge) in (0..).zip(&mut edges) {
            send(edge, at, round).await;
        }
        if matches!(obstacle, Some(Obstacle::Disk(_))) {
            // It says so for as long as it waits, whatever else can be written.
            centre.until_ready(false).await;
            obstacle = None;
        }
        for edge in &mut edges {
            let outcome = outcome(edge).await;
            if round == 1 {
                let failed = AbortReason::AggregationFailed;
                assert_eq!(outcome, RoundOutcome::Aborted(failed));
            } else {
                assert!(
                    matches!(outcome, RoundOutcome::Published(_)),
                    "round {round}: {outcome:?}"
                );
            }
        }
        centre.until_ready(true).await;
        drop(obstacle.take());
        if round == 1 {
            obstacle = Obstacle::disk(&spill);
        }
    }
    centre.stop().await;
    let database = centre.database();
    for (round, word) in [(1, Some("aggregation_failed")), (2, None), (3, None)] {
        let detail = history::detail(database.read(), Round(round)).unwrap();
        assert_eq!(detail.round.abort_reason.as_deref(), word, "round {round}");
    }
    centre
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_skips_a_round_whose_rows_have_no_place_and_waits_for_a_full_disk_within_the_round() {
    let centre = three_rounds(CentralNoiseSettings::default()).await;
    for round in 2..=3 {
        assert_eq!(centre.replay(round).unwrap().combined, 2, "round {round}");
    }
}

/// What cannot be had back is charged once for each model, and for nothing else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_round_that_waits_for_room_or_finds_none_spends_nothing_more_of_the_centres_budget() {
    let centre = three_rounds(CentralNoiseSettings {
        enabled: true,
        epsilon: 6.0,
        noise_multiplier: 12.0,
        clip_norm: Some(1.0),
        sites: Some(2),
        ..CentralNoiseSettings::default()
    })
    .await;
    let spent = CentralStatus::read(&centre.checked()).unwrap().unwrap();
    assert_eq!(spent.rounds, 2, "two models, the first round gave none");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_makes_the_folder_for_rows_at_its_start_or_does_not_start() {
    let mut centre = Centre::made(settings(CentralNoiseSettings::default()));
    let dir = DataDir::new(&centre.dir);
    let in_the_way = Obstacle::file(&dir.spill());
    let (_stop, stopped) = tokio::sync::watch::channel(false);
    let error = serve(centre.checked(), stopped).await.unwrap_err();
    assert!(error.to_string().contains("spill"), "{error}");
    assert!(!dir.addresses().exists(), "no port was opened");
    drop(in_the_way);
    centre.serve().await;
    assert!(dir.spill().is_dir());
    centre.stop().await;
}
